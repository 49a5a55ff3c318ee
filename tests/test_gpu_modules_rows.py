"""Softmax and LayerNorm as SPIR-V, against NumPy in float64: as near as float32, rounding to halves and Vulkan's
promises let them be."""

import numpy as np
import pytest

from npulab.errors import InvariantError, UnsupportedError
from npulab.gpu.compute.modules import run
from npulab.gpu.compute.modules_rows import THREADS, layer_norm, softmax
from npulab.gpu.compute.problems import LayerNorm, Softmax
from test_gpu_modules import HALF, ULP, unpadded, valid

U = ULP / 2
SHAPES = [(1, 1), (3, 2), (5, 63), (2, 64), (7, 65), (2, 1000), (1, 20011)]


def drawn(shape, spread=1.0, seed=0, number="float32"):
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(number)


def depth(columns):
    """Additions on the way of an element into the sum: a thread's own, the lanes, then the tree's."""
    return -(-columns // (4 * THREADS)) + 3 + THREADS.bit_length() - 1


def stored(exact, allowed, number):
    """What may be off once it is stored."""
    return allowed if number == "float32" else allowed + HALF * (np.abs(exact) + allowed) + 2.0**-24


@pytest.mark.parametrize("number", ["float32", "float16"])
def test_softmax_is_as_near_as_its_sums_and_exp(vulkan_bench, number):
    for shape in SHAPES:
        for spread, scale, about in ((1, 1.0, 0), (30, 0.125, 0), (3000, 1.0, 0), (1, 1.0, -500)):
            x = (drawn(shape, spread) + about).astype(number)
            found, _ = run(vulkan_bench, softmax(Softmax(*shape, scale, number)), {"input": x})
            unpadded(found)
            scaled = scale * x.astype(np.float64)
            below = scaled - scaled.max(1, keepdims=True)
            each = np.exp(below)
            exact = each / each.sum(1, keepdims=True)
            # of an exponential: its argument's rounding (product and difference), and 3 + 2 |x| units in the last place
            argument = U * (2 * np.abs(scaled).max(1, keepdims=True) - below)
            off = np.expm1(argument) + (3 + 2 * -below) * ULP
            # of the sum: what its terms are off, weighed, and the additions; of the quotient 2.5 units
            sums = (off * exact).sum(1, keepdims=True) + depth(shape[1]) * U
            allowed = stored(exact, exact * 1.01 * (off + sums + 2.5 * ULP) + 1e-37, number)
            np.testing.assert_array_less(np.abs(found - exact), allowed)
            assert number == "float16" or np.abs(found.sum(1) - 1).max() <= 1e-3


@pytest.mark.parametrize("number", ["float32", "float16"])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_as_near_as_its_sums(vulkan_bench, affine, number):
    for shape in SHAPES:
        for about in (0.0, 100.0):
            x, gamma, beta = (drawn(shape) + about).astype(number), drawn(shape[1], seed=1), drawn(shape[1], seed=2)
            layer = layer_norm(LayerNorm(*shape, number=number), *((gamma, beta) if affine else ()))
            found, _ = run(vulkan_bench, layer, {"input": x})
            unpadded(found)
            d = x.astype(np.float64)
            mean, variance = d.mean(1, keepdims=True), d.var(1, keepdims=True) + 1e-5
            normal = (d - mean) / np.sqrt(variance)
            exact = normal * gamma + beta if affine else normal
            steps = depth(shape[1])
            mean_off = (steps + 2) * U * np.abs(d).mean(1, keepdims=True)
            each_off = mean_off + U * (np.abs(d - mean) + mean_off)
            # squares: twice what a difference is off, its own rounding; the sum; the root halves it, and 2 units
            variance_off = (2 * np.abs(d - mean) * each_off + each_off**2).mean(1, keepdims=True)
            root_off = (variance_off / variance + (steps + 5) * U) / 2 + 2 * ULP
            off = each_off / np.sqrt(variance) + np.abs(normal) * (root_off + ULP)
            allowed = off * (np.abs(gamma) if affine else 1) + ULP * np.abs(exact)
            assert (np.abs(found - exact) <= stored(exact, 1.01 * allowed + 1e-37, number)).all()


def test_more_rows_than_one_row_of_groups(vulkan_bench):
    shape = (32770, 3)
    x = drawn(shape)
    found, _ = run(vulkan_bench, softmax(Softmax(*shape)), {"input": x})
    each = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(found, each / each.sum(1, keepdims=True),
                               rtol=2 * (3 + 2 * 10) * ULP)  # no two are further apart than 10


def test_modules_of_rows_are_valid_for_vulkan(tmp_path):
    for number in ("float32", "float16"):
        norm = LayerNorm(3, 5, number=number)
        valid(tmp_path, [softmax(Softmax(3, 5, number=number)), softmax(Softmax(3, 4, number=number)), layer_norm(norm),
                         layer_norm(norm, np.ones(5), np.ones(5))])


def test_what_shaders_of_rows_have_not():
    with pytest.raises(UnsupportedError, match="computes on floats"):
        softmax(Softmax(1, 1, number="int8"))
    with pytest.raises(UnsupportedError, match="32 bits"):
        layer_norm(LayerNorm(1 << 20, 1 << 12))
    for arrays in ((np.ones(4),), (np.ones(4), np.ones(3)), (None, np.ones(4))):
        with pytest.raises(InvariantError, match="both gamma and beta"):
            layer_norm(LayerNorm(2, 4), *arrays)
