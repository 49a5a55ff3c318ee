"""int8 softmax and layer normalization as SPIR-V: the oracles are those of the OpenCL kernels."""

import numpy as np
import pytest

from npulab.errors import InvariantError, UnsupportedError
from npulab.gpu.compute.integer_rows import COLUMNS
from npulab.gpu.compute.modules import run
from npulab.gpu.compute.modules_integer_rows import layer_norm, reciprocal, shares, softmax
from npulab.gpu.compute.modules_numbers import WHOLE
from npulab.gpu.compute.problems import LayerNorm, Softmax
from npulab.gpu.spirv_builder import Shader
from test_gpu_integer_rows import (
    NO_NORMS,
    NORM,
    SHAPES,
    check_normal,
    drawn,
    litert_of,
    many_sums,
    means_of_all_sizes,
    peaked,
    rows_of,
    softmax_of,
    sums_and_exponentials,
)
from test_gpu_modules import unpadded, valid

OFF = 17, 3
"""Of layer normalization's terms, in units of 2**-24."""


def softmaxed(vulkan_bench, x, scale, beta=1.0):
    found, _ = run(vulkan_bench, softmax(Softmax(*x.shape, beta, "int8"), scale), {"input": x})
    assert found.dtype == np.int8
    unpadded(found)
    return found


def normalizing(vulkan_bench):
    def do(x, arguments, gamma=None, beta=None, epsilon=1e-5):
        layer = layer_norm(LayerNorm(*x.shape, epsilon, "int8"), *arguments, gamma, beta)
        found, _ = run(vulkan_bench, layer, {"input": x})
        unpadded(found)
        return found

    return do


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_is_litert_byte_for_byte(vulkan_bench, shape):
    pytest.importorskip("ai_edge_litert")
    for x, scale, beta in peaked(shape):
        np.testing.assert_array_equal(softmaxed(vulkan_bench, x, scale, beta), litert_of(x, scale, beta))


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 17, 64, 511, 512, 4097, 70000])
def test_softmax_is_the_reference_byte_for_byte(vulkan_bench, columns):
    x = rows_of(columns)
    for scale in (2e-8, 1e-3, 0.07, 3.0, 1e30):
        np.testing.assert_array_equal(softmaxed(vulkan_bench, x, scale), softmax_of(x, scale))


def test_every_difference_and_many_sums(vulkan_bench):
    x = many_sums()
    for scale in (0.02, 0.11):
        np.testing.assert_array_equal(softmaxed(vulkan_bench, x, scale), softmax_of(x, scale))


def test_reciprocals_and_shares(vulkan_bench):
    """A thread has one sum and four equal exponentials."""
    sums, factors, e, codes = sums_and_exponentials()
    s = Shader(64, ("int", "uint", WHOLE), ())
    with s.when(s.global_id < len(sums)):
        factor, zeros = reciprocal(s, s.load(0, s.global_id))
        found = shares(s, s.spread(s.load(1, s.global_id), 4), factor, zeros)
        s.store(2, s.global_id, s.vector(s.bits(factor, "int"), *(s.lane(found, i) for i in range(3))))
    given = sums.astype(np.int32), e.astype(np.uint32), np.zeros((len(e), 4), np.int32)
    buffers = [vulkan_bench._buffer(x) for x in given]
    vulkan_bench.compute(s.assemble(), (-(-len(sums) // 64),), buffers)
    found = vulkan_bench._read(buffers[2], 4 * len(sums), np.int32).reshape(-1, 4)
    np.testing.assert_array_equal(found, np.stack([factors, codes, codes, codes], 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_is_rounded_once(vulkan_bench, shape):
    do = normalizing(vulkan_bench)
    check_normal(do, drawn(shape), (0.037, 0.021, -9), off=OFF)
    check_normal(do, drawn(shape, 1), (0.0004, 0.4 / 127, 127), affine=False, off=OFF)
    check_normal(do, drawn(shape, 2, 100, 103), (30.0, 0.02, 0), off=OFF)


def test_moments_of_all_sizes(vulkan_bench):
    """V is what two numbers of more than 32 bits differ by, in words with a borrow."""
    check_normal(normalizing(vulkan_bench), means_of_all_sizes(), (0.05, 0.05, 3), off=OFF)


@pytest.mark.parametrize("columns", [1, 3, 17, 64, 1000])
def test_layer_norm_of_extremes(vulkan_bench, columns):
    for epsilon in (0.0, 1e-12, 1e-5, 0.3):
        check_normal(normalizing(vulkan_bench), rows_of(columns), (0.05, 0.05, 3), epsilon=epsilon, off=OFF)


def test_equal_numbers_are_beta(vulkan_bench):
    beta = np.arange(-20, 21) / 8
    found = normalizing(vulkan_bench)(np.full((2, 41), 77, np.int8), (0.1, 0.25, 1), np.ones(41), beta, 0.0)
    np.testing.assert_array_equal(found, np.tile(np.rint(beta / 0.25) + 1, (2, 1)))


def test_as_many_columns_as_there_may_be(vulkan_bench):
    for row in (np.full(COLUMNS, -128), np.where(np.arange(COLUMNS) % 3, -128, 127)):
        row[0] = 127
        check_normal(normalizing(vulkan_bench), row[None].astype(np.int8), (0.05, 0.05, 0), at=slice(0, 400), off=OFF)


def test_large_factors_are_clamped(vulkan_bench):
    gamma, beta = np.array([3e38, -3e38, 1.0]), np.array([3e38, 0.0, -3e38])
    found = normalizing(vulkan_bench)(np.array([[3, 1, 0]], np.int8), (1.0, 1.0, 100), gamma, beta)
    assert found.tolist() == [[127, 127, -128]]


def test_more_rows_than_one_row_of_groups(vulkan_bench):
    x = drawn((32770, 3))
    np.testing.assert_array_equal(softmaxed(vulkan_bench, x, 0.02), softmax_of(x, 0.02))


def test_modules_of_integer_rows_are_valid_for_vulkan(tmp_path):
    valid(tmp_path, [softmax(Softmax(3, 5, number="int8"), 0.1), softmax(Softmax(3, 4, number="int8"), 0.1),
                     layer_norm(LayerNorm(3, 5, number="int8"), 0.1, 0.1, 3)])


@pytest.mark.parametrize(("changed", "message"), NO_NORMS)
def test_what_layer_norm_refuses(changed, message):
    changed = dict(changed)
    with pytest.raises(InvariantError, match=message):
        layer_norm(LayerNorm(2, 4, changed.pop("epsilon", 1e-5), "int8"), **NORM | changed)


def test_what_shaders_of_integer_rows_have_not():
    with pytest.raises(UnsupportedError, match="kernels of integer rows read int8"):
        softmax(Softmax(2, 4), 0.1)
    with pytest.raises(UnsupportedError, match="kernels of integer rows read int8"):
        layer_norm(LayerNorm(2, 4), 0.1, 0.1, 0)
    with pytest.raises(InvariantError, match="scale_in is no scale"):
        softmax(Softmax(2, 4, number="int8"), 0.0)
    with pytest.raises(UnsupportedError, match="32 bits"):
        softmax(Softmax(1 << 20, 1 << 12, number="int8"), 0.1)
    with pytest.raises(UnsupportedError, match="squares in 31 bits"):
        layer_norm(LayerNorm(1, COLUMNS + 1, number="int8"), 0.1, 0.1, 0)
