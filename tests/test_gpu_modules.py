"""Kernels of networks as SPIR-V: products and convolutions against NumPy, on whole numbers, exactly."""

import math
import shutil
import subprocess

import numpy as np
import pytest

from npulab.errors import UnsupportedError
from npulab.gpu import vulkan
from npulab.gpu.compute.modules import (
    Convolution,
    convolution,
    depthwise,
    matmul,
    packed,
    packed_depthwise,
    packed_weights,
    run,
)
from npulab.gpu.compute.modules_endings import ENDINGS

EXACT = ("none", "relu", "relu6")
ULP = 2.0**-23


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
@pytest.mark.parametrize("activation", EXACT)
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
@pytest.mark.parametrize("activation", EXACT)
def test_a_convolution_is_exact_on_whole_numbers(bench, c, activation):
    x, weights = whole((c.height, c.width, c.channels), 1), whole((c.outputs, *c.kernel, c.channels), 2)
    bias = whole((1, c.outputs), 3)
    found, _ = run(bench, convolution(c, activation), {"input": x, "weights": packed_weights(weights),
                                                       "bias": packed(bias)}, (*c.size, c.outputs))
    np.testing.assert_array_equal(found, ended(convolved(x, weights, bias[0], c), activation))


@pytest.mark.parametrize("c", [
    Convolution(6, 5, 3, 3, (3, 3), pad=(1, 1), size=(6, 5)),
    Convolution(9, 9, 37, 37, (3, 3), (2, 2), pad=(0, 1), size=(4, 5)),
    Convolution(11, 10, 8, 8, (5, 2), dilation=(2, 3), pad=(4, 0), size=(11, 7)),
    Convolution(1, 1, 1, 1, (5, 5), pad=(2, 2), size=(1, 1)),
], ids=lambda c: f"{c.kernel[0]}x{c.kernel[1]}/{c.stride[0]}")
@pytest.mark.parametrize("activation", EXACT)
def test_a_depthwise_convolution_is_exact_on_whole_numbers(bench, c, activation):
    x, weights = whole((c.height, c.width, c.channels), 1), whole((*c.kernel, c.channels), 2)
    bias = whole((1, c.channels), 3)
    each = np.einsum("hwc,oc->ohwc", weights, np.eye(c.channels))  # of all other channels: 0
    given = {"input": packed(x.reshape(-1, c.channels)), "weights": packed_depthwise(weights), "bias": packed(bias)}
    found, _ = run(bench, depthwise(c, activation), given, (*c.size, c.channels))
    np.testing.assert_array_equal(found, ended(convolved(x, each, bias[0], c), activation))


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def sigmoid_off(x):
    """exp's error (3 + 2 |x| units: Vulkan) through the derivative; a sum, and a quotient (2.5 units)."""
    return (sigmoid(x) * sigmoid(-x) * (3 + 2 * np.abs(x)) + 4 * sigmoid(x)) * ULP


ACTIVATIONS = {  # kind: what it is, how far a shader may be off
    "none": (lambda x: x, lambda x: 0 * x),
    "relu": (lambda x: np.maximum(x, 0), lambda x: 0 * x),
    "relu6": (lambda x: np.clip(x, 0, 6), lambda x: 0 * x),
    "sigmoid": (sigmoid, sigmoid_off),
    "silu": (lambda x: x * sigmoid(x), lambda x: np.abs(x) * (sigmoid_off(x) + ULP * sigmoid(x))),
    "tanh": (np.tanh, lambda x: 2 * sigmoid_off(-2 * x) + ULP),
    "hardsigmoid": (lambda x: np.clip(x / 6 + 0.5, 0, 1), lambda x: ULP * np.minimum(np.abs(x) / 6 + 0.5, 1)),
    "hardswish": (lambda x: x * np.clip(x + 3, 0, 6) / 6, lambda x: 2 * ULP * np.abs(x)),
    "gelu": (lambda x: 0.5 * x * np.vectorize(lambda v: math.erfc(-v / math.sqrt(2)))(x),
             lambda x: 1e-6 + ULP * np.abs(x)),
    "leaky": (lambda x: np.where(x < 0, np.float32(0.2) * x, x), lambda x: ULP * np.abs(x)),
}


@pytest.mark.parametrize("activation", ENDINGS)
def test_activations_are_as_near_as_vulkan_promises(bench, activation):
    x = np.concatenate((np.linspace(-12, 12, 4093), [0, 1e-30, -1e-30, 87, -87, 104, -104, 3e4, -3e4, 1e30, -1e30]))
    x = x.astype(np.float32).reshape(1, -1, 4)
    c = Convolution(1, x.shape[1], 4, 4, (1, 1), size=x.shape[:2])
    found, _ = run(bench, depthwise(c, activation, 0.2),
                   {"input": x, "weights": np.ones((1, 4)), "bias": np.zeros((1, 4))}, x.shape)
    exact, allowed = (f(x.astype(np.float64)) for f in ACTIVATIONS[activation])
    assert (np.abs(found - exact) <= allowed + 1e-30).all()


def test_the_error_of_a_name_lists_the_activations_there_are():
    with pytest.raises(UnsupportedError, match="no shader with the activation softplus") as e:
        matmul(1, 1, 1, "softplus")
    assert e.value.facts["want"] == ", ".join(ENDINGS)


def test_real_numbers_are_as_near_as_float32_sums_are(bench):
    """A sum of n products is off by about n 2**-24 of their magnitudes at most (Higham, 2002, section 3.1)."""
    r = np.random.default_rng(0)
    a, b = r.standard_normal((40, 300)).astype(np.float32), r.standard_normal((300, 20)).astype(np.float32)
    found, _ = run(bench, matmul(40, 20, 300), {"input": a, "weights": packed(b), "bias": np.zeros((1, 20))}, (40, 20))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert (np.abs(found - exact) <= 301 * 2.0**-24 * (np.abs(a).astype(np.float64) @ np.abs(b))).all()


def valid(folder, modules):
    """spirv-val's word."""
    if not shutil.which("spirv-val"):
        pytest.skip("needs spirv-val: apt install spirv-tools")
    for i, module in enumerate(modules):
        file = folder / f"{i}.spv"
        file.write_bytes(module.words)
        checked = subprocess.run(["spirv-val", "--target-env", "vulkan1.1", file], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr + checked.stdout


def test_modules_are_valid_for_vulkan(tmp_path):
    c = Convolution(6, 5, 3, 3, size=(4, 3))
    valid(tmp_path, [depthwise(c, kind) for kind in ENDINGS] + [matmul(33, 7, 19, "relu6"), convolution(c, "gelu")])


def test_a_sum_that_the_driver_would_cut_short(bench, monkeypatch):
    monkeypatch.setattr(bench, "turns_max", 64)
    a = whole((1, 65), 1)
    with pytest.raises(UnsupportedError, match="ends loops after 64 turns") as e:
        run(bench, matmul(1, 4, 65), {"input": a, "weights": whole((65, 4), 2), "bias": whole((1, 4), 3)}, (1, 4))
    assert e.value.facts["want"] == "65"


def test_what_shaders_have_not():
    with pytest.raises(UnsupportedError, match="one channel of each"):
        depthwise(Convolution(4, 4, 2, 4, size=(2, 2)))
    with pytest.raises(UnsupportedError, match="count in 32 bits"):
        matmul(1 << 20, 1 << 12, 4)
