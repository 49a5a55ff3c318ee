"""Kernels of networks as SPIR-V: products and convolutions against NumPy, on whole numbers, exactly."""

import shutil
import subprocess

import numpy as np
import pytest

from npulab.errors import UnsupportedError
from npulab.gpu import vulkan
from npulab.gpu.compute.modules import ENDINGS, Convolution, convolution, matmul, packed, packed_weights, run


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("wgpu", reason="needs wgpu: pip install 'npulab[vulkan]'")
    if not vulkan.devices():
        pytest.skip("needs a Vulkan device: apt install mesa-vulkan-drivers")
    return vulkan.open_device(0)


def whole(shape, seed):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def ended(x, activation):
    return x if activation == "none" else np.clip(x, 0, 6 if activation == "relu6" else None)


def convolved(x, weights, bias, c):
    """Tap by tap: x (H, W, I), weights (O, H, W, I)."""
    high, wide = c.size
    out = np.broadcast_to(bias, (high, wide, c.outputs)).astype(np.float64)
    for oy in range(high):
        for ox in range(wide):
            for ky in range(c.kernel[0]):
                for kx in range(c.kernel[1]):
                    y = oy * c.stride[0] + ky * c.dilation[0] - c.pad[0]
                    z = ox * c.stride[1] + kx * c.dilation[1] - c.pad[1]
                    if 0 <= y < c.height and 0 <= z < c.width:
                        out[oy, ox] += weights[:, ky, kx] @ x[y, z]
    return out


@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 1, 1), (64, 64, 64), (33, 7, 19), (5, 130, 1), (3, 4, 513)])
@pytest.mark.parametrize("activation", ENDINGS)
def test_a_matrix_product_is_exact_on_whole_numbers(bench, rows, columns, inner, activation):
    a, b, bias = whole((rows, inner), 1), whole((inner, columns), 2), whole((1, columns), 3)
    found, seconds = run(bench, matmul(rows, columns, inner, activation),
                         {"input": a, "weights": packed(b), "bias": packed(bias)}, (rows, columns))
    np.testing.assert_array_equal(found, ended(a @ b + bias, activation))
    assert seconds >= 0


@pytest.mark.parametrize("c", [
    Convolution(6, 5, 3, 8, (3, 3), pad=(1, 1), size=(6, 5)),
    Convolution(9, 9, 5, 6, (3, 3), (2, 2), pad=(0, 1), size=(4, 5)),
    Convolution(7, 8, 4, 4, (1, 1), size=(7, 8)),
    Convolution(8, 8, 2, 3, (1, 1), (2, 3), size=(4, 3)),
    Convolution(11, 10, 2, 5, (3, 2), dilation=(2, 3), pad=(2, 0), size=(11, 7)),
    Convolution(1, 1, 1, 1, (5, 5), pad=(2, 2), size=(1, 1)),
], ids=lambda c: f"{c.kernel[0]}x{c.kernel[1]}/{c.stride[0]}")
@pytest.mark.parametrize("activation", ENDINGS)
def test_a_convolution_is_exact_on_whole_numbers(bench, c, activation):
    x, weights = whole((c.height, c.width, c.channels), 1), whole((c.outputs, *c.kernel, c.channels), 2)
    bias = whole((1, c.outputs), 3)
    found, _ = run(bench, convolution(c, activation), {"input": x, "weights": packed_weights(weights),
                                                       "bias": packed(bias)}, (*c.size, c.outputs))
    np.testing.assert_array_equal(found, ended(convolved(x, weights, bias[0], c), activation))


def test_real_numbers_are_as_near_as_float32_sums_are(bench):
    """A sum of n products is off by about n 2**-24 of their magnitudes at most (Higham, 2002, section 3.1)."""
    r = np.random.default_rng(0)
    a, b = r.standard_normal((40, 300)).astype(np.float32), r.standard_normal((300, 20)).astype(np.float32)
    found, _ = run(bench, matmul(40, 20, 300), {"input": a, "weights": packed(b), "bias": np.zeros((1, 20))}, (40, 20))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert (np.abs(found - exact) <= 301 * 2.0**-24 * (np.abs(a).astype(np.float64) @ np.abs(b))).all()


@pytest.mark.skipif(not shutil.which("spirv-val"), reason="needs spirv-val: apt install spirv-tools")
def test_modules_are_valid_for_vulkan(tmp_path):
    for i, module in enumerate((matmul(33, 7, 19, "relu6"), convolution(Convolution(6, 5, 3, 8, size=(4, 3)), "relu"))):
        file = tmp_path / f"{i}.spv"
        file.write_bytes(module.words)
        checked = subprocess.run(["spirv-val", "--target-env", "vulkan1.1", file], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr + checked.stdout


def test_a_sum_that_the_driver_would_cut_short(bench, monkeypatch):
    monkeypatch.setattr(bench, "turns_max", 64)
    a = whole((1, 65), 1)
    with pytest.raises(UnsupportedError, match="ends loops after 64 turns") as e:
        run(bench, matmul(1, 4, 65), {"input": a, "weights": whole((65, 4), 2), "bias": whole((1, 4), 3)}, (1, 4))
    assert e.value.facts["want"] == "65"


def test_what_shaders_have_not():
    with pytest.raises(UnsupportedError, match="no shader with the activation gelu") as e:
        matmul(1, 1, 1, "gelu")
    assert e.value.facts["want"] == "none, relu, relu6"
    with pytest.raises(UnsupportedError, match="count in 32 bits"):
        matmul(1 << 20, 1 << 12, 4)
