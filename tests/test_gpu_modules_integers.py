"""int8 products and convolutions as SPIR-V, byte for byte: the oracles are those of the OpenCL kernels."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab.errors import InvariantError, UnsupportedError
from npulab.gpu.compute import checks
from npulab.gpu.compute.modules import run
from npulab.gpu.compute.modules_integers import convolution, doubled_high, product, requantized
from npulab.gpu.compute.modules_numbers import WHOLE
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.spirv_builder import Shader
from npulab.reference import requantize
from test_gpu_attention import BYTES, GROUPS, INTEGERS, NO_BYTES, integers_of, litert_of
from test_gpu_kernels import any_convolution
from test_gpu_modules import THREADS, unpadded, valid


def drawn(what, seed=0, shifts=None, big=False):
    """(x, the arguments of convolution)"""
    r = np.random.default_rng(seed)
    x = r.integers(-128, 128, (what.batch, what.height, what.width, what.channels)).astype(np.int8)
    w = r.integers(-127, 128, (what.filters, *what.kernel, what.channels // what.groups)).astype(np.int8)
    bias = r.integers(-2**31 if big else -9999, 2**31 if big else 9999, what.filters)
    shifts = shifts if shifts is not None else r.integers(-9, -4, what.filters)
    return x, (w, bias, int(r.integers(-128, 128)), r.integers(2**30, 2**31, what.filters), shifts,
               int(r.integers(-40, 40)))


def check(vulkan_bench, what, x, given_, low=-128, high=127, want=None, shape=None):
    if want is None:
        want = integers_of(what, x, *given_, low, high)
    found, _ = run(vulkan_bench, convolution(what, *given_, low, high, shape), {"input": x})
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, want)
    unpadded(found)
    return found


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_the_reference_byte_for_byte(vulkan_bench, name):
    assert len(np.unique(check(vulkan_bench, INTEGERS[name], *drawn(INTEGERS[name])))) > 20


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_litert_byte_for_byte(vulkan_bench, name):
    pytest.importorskip("ai_edge_litert")
    what, arguments, x, want = litert_of(replace(INTEGERS[name], batch=1))
    assert len(np.unique(check(vulkan_bench, what, x, arguments, want=want))) > 20


def grouped_of(what, x, w, bias, zero_in, multipliers, shifts, zero_out):
    """float64 holds these sums exactly."""
    sums, _ = checks.convolution(replace(what, number="float32"), x.astype(np.int64) - zero_in, w, bias)
    sums = requantize.multiply(sums.astype(np.int64), np.array(multipliers), np.array(shifts))
    return np.clip(sums + zero_out, -128, 127).astype(np.int8)


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_integers(vulkan_bench, name):
    what = GROUPS[name]
    x, arguments = drawn(what, 3)
    check(vulkan_bench, what, x, arguments, want=grouped_of(what, x, *arguments))


@pytest.mark.parametrize("threads", THREADS, ids=str)
def test_however_threads_share_the_work_bytes_are_the_same(vulkan_bench, threads):
    for name in INTEGERS:
        check(vulkan_bench, INTEGERS[name], *drawn(INTEGERS[name]), shape=threads)
    for name in GROUPS:
        x, arguments = drawn(GROUPS[name], 3)
        check(vulkan_bench, GROUPS[name], x, arguments, want=grouped_of(GROUPS[name], x, *arguments), shape=threads)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_any_integers(vulkan_bench, data):
    what = any_convolution(data, residual=False, number="int8")
    x, (w, bias, _, *rest) = drawn(what, data.draw(st.integers(0, 99)))
    arguments = (w, bias, data.draw(st.sampled_from([0, -128, 127, 3])), *rest)
    check(vulkan_bench, what, x, arguments, want=grouped_of(what, x, *arguments))


def test_integers_are_clamped(vulkan_bench):
    found = check(vulkan_bench, INTEGERS["3x3"], *drawn(INTEGERS["3x3"]), low=-10, high=30)
    assert (found.min(), found.max()) == (-10, 30)


@pytest.mark.parametrize("seed", range(2))
def test_sums_of_all_sizes_are_rounded_right(vulkan_bench, seed):
    """Every shift there is, sums of up to 32 bits that wrap."""
    what = Convolution(1, 1, 40, 1, 62, number="int8")
    check(vulkan_bench, what, *drawn(what, seed, np.arange(-31, 31), big=True))


def test_rounding_of_sums_at_the_edges(vulkan_bench):
    """32-bit results, not those that are left of them in a byte: the smallest and largest sums, ties, all shifts."""
    edges = [-2**31, -2**31 + 1, -2**30 - 1, -2**30, -3, -2, -1, 0, 1, 2, 3, 2**30 - 1, 2**30, 2**31 - 1]
    r = np.random.default_rng(0)
    sums = np.concatenate([edges, r.integers(-2**31, 2**31, 98), r.integers(-100, 100, 48)]).astype(np.int32)
    multipliers = np.array([0, 2**30, 2**30 + 1, 3 * 2**29, 2**31 - 1, *r.integers(2**30, 2**31, 5)], np.int32)
    sums, multipliers, shifts = (x.astype(np.int32).ravel() for x in np.broadcast_arrays(
        sums[:, None, None], multipliers[:, None], np.arange(-31, 31)))
    for made, want in ((lambda s, *x: requantized(s, *x), requantize.multiply(sums, multipliers, shifts)),
                       (lambda s, x, m, _: doubled_high(s, x, m),
                        requantize.high_mul(sums.astype(np.int64), multipliers.astype(np.int64)))):
        s = Shader(64, (WHOLE,) * 4, ())
        with s.when(s.global_id < len(sums) // 4):
            s.store(3, s.global_id, made(s, *(s.load(i, s.global_id) for i in range(3))))
        buffers = [vulkan_bench._buffer(x) for x in (sums, multipliers, shifts, np.zeros_like(sums))]
        vulkan_bench.compute(s.assemble(), (-(-len(sums) // 256),), buffers)
        np.testing.assert_array_equal(vulkan_bench._read(buffers[3], len(sums), np.int32), want)


def test_integer_products(vulkan_bench):
    r = np.random.default_rng(5)
    x, w = r.integers(-128, 128, (2, 7, 37)).astype(np.int8), r.integers(-127, 128, (21, 37)).astype(np.int8)
    m, shifts = [2**30 + 12345] * 21, [-7] * 21
    sums = (x.astype(np.int64) - 3) @ w.T.astype(np.int64)
    want = np.clip(requantize.multiply(sums, np.array(m), np.array(shifts)) - 1, -128, 127)
    for threads in (None, *THREADS):
        found, _ = run(vulkan_bench, product(2, 7, 37, 21, w, None, 3, m, shifts, -1, shape=threads), {"input": x})
        np.testing.assert_array_equal(found, want)


def test_modules_of_integers_are_valid_for_vulkan(tmp_path):
    valid(tmp_path, [convolution(what, *drawn(what)[1]) for what in (*INTEGERS.values(), *GROUPS.values())])


def test_what_integers_have_not():
    what = INTEGERS["1x1"]
    arguments = drawn(what)[1]
    for other in (replace(what, residual=True), replace(what, activation="relu"), replace(what, number="float32")):
        with pytest.raises(UnsupportedError, match="integer kernels add no residual"):
            convolution(other, *arguments)
    with pytest.raises(InvariantError, match="the weights are of another shape"):
        convolution(replace(what, channels=3), *arguments)


@pytest.mark.parametrize(("changed", "message"), NO_BYTES)
def test_what_is_no_byte_is_not_cut_to_one(changed, message):
    with pytest.raises(InvariantError, match=message):
        product(1, 2, 4, 4, **BYTES | changed)


def test_tensors_of_what_is_no_byte(vulkan_bench):
    layer = product(1, 1, 4, 4, np.eye(4, dtype=np.int8), None, 0, [1 << 30] * 4, [1] * 4, 0)
    for x in ([1, 200, 3, 4], [1, 0.5, 3, 4], [1, np.nan, 3, 4]):
        with pytest.raises(InvariantError, match="numbers of the tensor 'input' are no bytes") as e:
            run(vulkan_bench, layer, {"input": np.array([x])})
        assert e.value.facts["got"] == str(x[1])
    found, _ = run(vulkan_bench, layer, {"input": np.array([[1.0, 127, -128, 0]])})
    assert found.tolist() == [[[1, 127, -128, 0]]]
