"""Winograd's algorithm on bytes, as SPIR-V: the layers and oracles are those of the OpenCL kernels."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab.errors import InvariantError, UnsupportedError
from npulab.gpu.compute import integer_winograd
from npulab.gpu.compute.modules import run
from npulab.gpu.compute.modules_integer_winograd import convolution
from test_gpu_attention import integers_of
from test_gpu_integer_winograd import LAYERS, ONE, at_the_limit, drawn, flipped, layer
from test_gpu_modules import THREADS, unpadded, valid


def check(vulkan_bench, what, x, given, shape=None):
    found, _ = run(vulkan_bench, convolution(what, **given, shape=shape), {"input": x})
    np.testing.assert_array_equal(found, integers_of(what, x, given["weights"], *(given[n] for n in list(given)[1:])))
    unpadded(found)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_bytes_are_the_reference(vulkan_bench, name):
    found = check(vulkan_bench, LAYERS[name], *drawn(LAYERS[name]))
    assert len(np.unique(found)) > 20 or found.size < 100


def test_every_bit_of_sums(vulkan_bench):
    what = layer(7, 9, 3, 20)
    x, given = drawn(what, zero_in=3, bias=np.arange(20) - 10, **ONE)
    given["weights"] = np.random.default_rng(1).integers(-1, 2, (20, 3, 3, 3)).astype(np.int8)
    assert (check(vulkan_bench, what, (x // 32 + 3).astype(np.int8), given) % 4 > 0).any()


@pytest.mark.parametrize("threads", THREADS, ids=str)
def test_however_threads_share_the_products_bytes_are_the_same(vulkan_bench, threads):
    check(vulkan_bench, LAYERS["odd"], *drawn(LAYERS["odd"]), shape=threads)


@pytest.mark.parametrize(("byte", "zero_in"), [(-128, 127), (127, -128)])
def test_extremes(vulkan_bench, byte, zero_in):
    what = layer(5, 5, 33, 18)
    x, given = drawn(what, zero_in=zero_in, bias=None, shifts=-12)
    given["weights"] = np.full_like(given["weights"], -128)
    check(vulkan_bench, what, np.full_like(x, byte), given)


def test_biases_wrap_as_in_direct_sums(vulkan_bench):
    what = layer(4, 4, 9, 62)
    bias = np.random.default_rng(3).integers(-2**31, 2**31, 62)
    check(vulkan_bench, what, *drawn(what, bias=bias, shifts=np.arange(-31, 31)))


def test_bytes_are_clamped(vulkan_bench):
    found = check(vulkan_bench, LAYERS["odd"], *drawn(LAYERS["odd"], low=-10, high=30))
    assert (found.min(), found.max()) == (-10, 30)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_layer(vulkan_bench, data):
    pads = data.draw(st.tuples(*[st.integers(0, 3)] * 4))
    height, width = (data.draw(st.integers(max(1, 3 - pads[i] - pads[i + 2]), 11)) for i in (0, 1))
    what = layer(height, width, data.draw(st.integers(1, 70)), data.draw(st.integers(1, 90)), pads,
                 data.draw(st.integers(1, 3)))
    x, given = drawn(what, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([None, -128, 127])))
    check(vulkan_bench, what, x, given)


def test_sums_are_whole_up_to_the_limit(vulkan_bench):
    found = check(vulkan_bench, *at_the_limit(1827))
    assert found[0, 1, 1, 0] > 20
    what, _, given = at_the_limit(1828)
    with pytest.raises(InvariantError, match="sums below 2\\*\\*29"):
        convolution(what, **given)


@pytest.mark.parametrize(("which", "at"), [(0, (1, 2)), (1, (2, 1)), (2, (3, 1))])
def test_a_wrong_entry_is_seen(vulkan_bench, monkeypatch, which, at):
    from npulab.gpu.compute import modules_winograd
    wrong = flipped(which, at)
    for module in (integer_winograd, modules_winograd):
        monkeypatch.setattr(module, "matrices", lambda m: wrong)
    with pytest.raises(AssertionError, match="not equal"):
        check(vulkan_bench, LAYERS["odd"], *drawn(LAYERS["odd"]))


def test_modules_are_valid_for_vulkan(tmp_path):
    valid(tmp_path, [convolution(what, **drawn(what)[1]) for what in LAYERS.values()])


def test_what_it_has_not():
    what = layer(4, 4, 4, 4)
    with pytest.raises(UnsupportedError, match="integer kernels add no residual"):
        convolution(replace(what, residual=True), **drawn(what)[1])
