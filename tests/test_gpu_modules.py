"""Kernels of networks as SPIR-V: products and convolutions, on whole numbers exactly, else within what sums allow."""

import math
import shutil
import struct
import subprocess
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab.errors import CapacityError, InvariantError, UnsupportedError
from npulab.gpu.compute import checks
from npulab.gpu.compute import convolution as opencl_convolution
from npulab.gpu.compute.modules import run
from npulab.gpu.compute.modules_convolution import convolution
from npulab.gpu.compute.modules_endings import ENDINGS
from npulab.gpu.compute.modules_numbers import DTYPES
from npulab.gpu.compute.modules_products import product
from npulab.gpu.compute.modules_rows import softmax
from npulab.gpu.compute.modules_shapes import Shape
from npulab.gpu.compute.problems import Convolution, Product, Softmax
from test_gpu_kernels import GRAPHICS, any_convolution

ULP, HALF = 2.0**-23, 2.0**-10
"""Of float32 and float16: what rounding either way may be off."""


def whole(*shape, seed=0, kind=np.float32):
    return np.random.default_rng([seed, *shape]).integers(-4, 5, shape).astype(kind)


def random(*shape, seed=0, kind=np.float32):
    return np.random.default_rng([seed, *shape]).uniform(-1, 1, shape).astype(kind)


def right(found, want, bound, number="float32"):
    """checks' bound takes it that halves are rounded to the nearest; Vulkan lets drivers round either way."""
    assert found.shape == want.shape
    assert found.dtype == DTYPES[number]
    if number == "float16":
        bound = bound + HALF / 2 * (np.abs(want) + bound) + 2.0**-25
    assert (np.abs(found - want) <= bound).all(), float((np.abs(found - want) / bound).max())
    unpadded(found)


def unpadded(found):
    """What shaders write behind the last column is 0."""
    columns = found.shape[-1]
    assert not found.base.reshape(-1, -(-columns // 4) * 4)[:, columns:].any()


def multiplied(vulkan_bench, what, constant=True, bias=True, make=random, layer=product):
    """(found, wanted, bound)"""
    kind = DTYPES[what.number]
    a = make(what.batch, what.rows, what.inner, kind=kind)
    b = make(*([what.batch] if what.batched else []),
             *((what.columns, what.inner) if what.transposed else (what.inner, what.columns)), seed=1, kind=kind)
    c = make(what.columns, seed=2) if bias else None
    outputs = what.batch, what.rows, what.columns
    residual = make(*outputs, seed=3, kind=kind) if what.residual else None
    others = [x for x in (None if constant else b, residual) if x is not None]
    found, seconds = run(vulkan_bench, layer(what, b if constant else None, c),
                         {"input": a} | {f"input{i}": x for i, x in enumerate(others, 1)})
    assert seconds >= 0
    return found, *checks.product(what, a, b, c, residual)


def convolved(vulkan_bench, what, bias=True, make=random, layer=convolution, choice=None, **more):
    """(found, wanted, bound)"""
    kind = DTYPES[what.number]
    x = make(what.batch, what.height, what.width, what.channels, kind=kind)
    weights = make(what.filters, *what.kernel, what.channels // what.groups, seed=1, kind=kind)
    b = make(what.filters, seed=2) if bias else None
    outputs = what.batch, *what.out, what.filters
    residual = make(*outputs, seed=3, kind=kind) if what.residual else None
    found, _ = run(vulkan_bench, layer(what, weights, b, **more),
                   {"input": x} | ({"input1": residual} if what.residual else {}))
    return found, *checks.convolution(what, x, weights, b, residual, choice)


@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 1, 1), (64, 64, 64), (33, 7, 19), (5, 130, 1), (3, 4, 513)])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_a_matrix_product_is_exact_on_whole_numbers(vulkan_bench, rows, columns, inner, activation):
    found, want, _ = multiplied(vulkan_bench, Product(1, rows, inner, columns, activation=activation), make=whole)
    np.testing.assert_array_equal(found, want)
    unpadded(found)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("number", ["float32", "float16"])
@pytest.mark.parametrize("what", [
    Product(1, 33, 17, 40), Product(2, 5, 64, 48, scale=0.5), Product(1, 1, 101, 10, transposed=True),
    Product(3, 8, 16, 24, batched=True, transposed=True, scale=-2.0, residual=True, activation="hardswish"),
    Product(2, 7, 3, 5, batched=True, residual=True, activation="leaky", slope=0.25),
], ids=["odd", "a batch", "a row", "batched", "small"])
def test_products_are_right(vulkan_bench, what, number, constant):
    what = replace(what, number=number)
    for bias in (True, False):
        right(*multiplied(vulkan_bench, what, constant, bias), number)


SHAPES = {
    "three channels": Convolution(1, 9, 11, 3, 10, (3, 3), (2, 2), pads=(1, 1, 1, 1)),
    "uneven pads": Convolution(1, 6, 7, 5, 18, (3, 3), pads=(0, 1, 2, 1), activation="relu"),
    "a batch": Convolution(3, 5, 4, 8, 16, (3, 3), pads=(1, 1, 1, 1), residual=True, activation="hardswish"),
    "dilated": Convolution(1, 9, 8, 4, 6, (3, 2), dilations=(2, 3), pads=(2, 2, 2, 2)),
    "flat kernel": Convolution(2, 6, 6, 5, 7, (5, 1), (1, 3), pads=(2, 0, 1, 0), residual=True),
    "one pixel": Convolution(1, 1, 1, 1, 1, (5, 5), pads=(2, 2, 2, 2)),
    "strided points": Convolution(2, 7, 7, 9, 20, strides=(2, 2)),
    "whole image": Convolution(1, 4, 4, 6, 96, (4, 4)),
    "groups of fours": Convolution(2, 5, 6, 16, 24, (3, 3), pads=(1, 1, 1, 1), groups=2, activation="relu6"),
    "groups": Convolution(2, 7, 5, 12, 8, (3, 3), pads=(1, 1, 1, 1), groups=4, residual=True, activation="relu6"),
    "odd groups": Convolution(1, 4, 5, 6, 9, (2, 2), groups=3),
    "depthwise": Convolution(2, 9, 9, 37, 37, (3, 3), (2, 1), pads=(0, 1, 1, 1), groups=37, residual=True),
    "flat depthwise": Convolution(1, 11, 10, 8, 8, (5, 2), dilations=(2, 3), pads=(4, 0, 4, 0), groups=8),
    "multiplier": Convolution(2, 6, 6, 5, 20, (3, 3), pads=(1, 1, 1, 1), groups=5),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_convolution_is_exact_on_whole_numbers(vulkan_bench, shape):
    found, want, _ = convolved(vulkan_bench, replace(SHAPES[shape], activation="relu"), make=whole)
    np.testing.assert_array_equal(found, want)
    unpadded(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_halves_are_stored_and_floats_computed(vulkan_bench, shape):
    what = replace(SHAPES[shape], number="float16")
    right(*convolved(vulkan_bench, what, bias=shape != "a batch"), "float16")


THREADS = [Shape(1, (64, 1)), Shape(2, (4, 16)), Shape(8, (8, 8)), Shape(8, (16, 16)), Shape(4, (3, 5))]


@pytest.mark.parametrize("number", ["float32", "float16"])
@pytest.mark.parametrize("threads", THREADS, ids=str)
def test_however_threads_share_the_work_it_is_right(vulkan_bench, threads, number):
    """Whole numbers exactly: rows that two threads have, or none, would show."""
    cases = [(multiplied, product, Product(1, 33, 17, 40)), (multiplied, product, Product(1, 1, 5, 70)),
             (multiplied, product, Product(3, 9, 16, 24, batched=True, transposed=True, residual=True))]
    cases += [(convolved, convolution, SHAPES[name]) for name in ("three channels", "a batch", "groups of fours",
                                                                  "groups", "depthwise")]
    for computed, layer, what in cases:
        what = replace(what, number=number, activation="relu")
        found, want, _ = computed(vulkan_bench, what, layer=partial(layer, shape=threads), make=whole)
        np.testing.assert_array_equal(found, want)
        unpadded(found)


def test_a_thread_has_as_many_rows_as_it_is_given():
    """No more than there are: of 3 rows, 4."""
    what = Product(1, 100, 5, 33)
    assert [product(what, shape=Shape(n, (4, 5))).modules[0].groups for n in (1, 2, 4, 8)] == [
        (3, 20), (3, 10), (3, 5), (3, 3)]
    assert product(replace(what, rows=3), shape=Shape(8, (4, 1))).modules[0].groups == (3, 1)
    assert product(what).modules[0] == product(what, shape=Shape(4, (8, 8))).modules[0]


def test_a_shape_that_there_is_not():
    for rows, group in ((3, (8, 8)), (16, (8, 8)), (4, (0, 8))):
        with pytest.raises(InvariantError, match="no such shape of threads") as e:
            Shape(rows, group)
        assert e.value.facts["got"] == f"{rows} rows, groups of {group}"


def test_a_group_of_more_threads_than_the_device_has(vulkan_bench):
    most = vulkan_bench.limits.group_max
    layer = product(Product(1, 1, 1, 1), whole(1, 1), shape=Shape(1, (2 * most, 1)))
    with pytest.raises(CapacityError, match="no work groups of so many threads") as e:
        run(vulkan_bench, layer, {"input": whole(1, 1)})
    assert e.value.facts["want"] == f"{2 * most} threads"


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_convolution_is_right(vulkan_bench, data):
    number = data.draw(st.sampled_from(["float32", "float16"]))
    what = any_convolution(data, number=number)
    right(*convolved(vulkan_bench, what), number)


def test_halves_are_added_up_by_fours(vulkan_bench):
    """Four products, of halves that may be rounded either way and flushed where they are denormal."""
    if "float16" not in vulkan_bench.limits.elements:
        pytest.skip("needs a device that computes on halves")
    cases = [(multiplied, product, Product(2, 9, 50, 21, number="float16", activation="relu", residual=True), 50)]
    for name, terms in (("uneven pads", 45), ("groups of fours", 72), ("strided points", 9)):
        cases.append((convolved, convolution, replace(SHAPES[name], number="float16", activation="relu"), terms))
    for computed, layer, what, terms in cases:
        found, want, _ = computed(vulkan_bench, what, layer=partial(layer, halves=True), make=whole)
        assert np.abs(want).max() < 2048  # up to there halves hold whole numbers
        np.testing.assert_array_equal(found, want)
        found, want, bound = computed(vulkan_bench, what, layer=partial(layer, halves=True))
        assert (np.abs(found - want) > bound).any()  # it is halves that were added
        right(found, want, bound + terms * (5 * HALF + 2.0**-14), "float16")


def test_a_device_without_halves(vulkan_bench, monkeypatch):
    layer = product(Product(1, 1, 1, 1, number="float16"), whole(1, 1), halves=True)
    monkeypatch.setattr(vulkan_bench, "limits", replace(vulkan_bench.limits, elements=frozenset({"float32"})))
    with pytest.raises(UnsupportedError, match="does not compute on halves"):
        run(vulkan_bench, layer, {"input": whole(1, 1)})


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
def test_activations_are_as_near_as_vulkan_promises(vulkan_bench, activation):
    x = np.concatenate((np.linspace(-12, 12, 4093), [0, 1e-30, -1e-30, 87, -87, 104, -104, 3e4, -3e4, 1e30, -1e30]))
    x = x.astype(np.float32).reshape(1, 1, -1, 4)
    what = Convolution(1, 1, x.shape[2], 4, 4, groups=4, activation=activation, slope=0.2)
    found, _ = run(vulkan_bench, convolution(what, np.ones((4, 1, 1, 1))), {"input": x})
    exact, allowed = (f(x.astype(np.float64)) for f in ACTIVATIONS[activation])
    assert (np.abs(found - exact) <= allowed + 1e-30).all()


def test_the_error_of_a_name_lists_the_activations_there_are():
    with pytest.raises(UnsupportedError, match="no shader with the activation softplus") as e:
        product(Product(1, 1, 1, 1, activation="softplus"), np.zeros((1, 1)))
    assert e.value.facts["want"] == ", ".join(ENDINGS)


def test_real_numbers_are_as_near_as_float32_sums_are(vulkan_bench):
    """A sum of n products is off by about n 2**-24 of their magnitudes at most (Higham, 2002, section 3.1)."""
    r = np.random.default_rng(0)
    a, b = r.standard_normal((40, 300)).astype(np.float32), r.standard_normal((300, 20)).astype(np.float32)
    found, _ = run(vulkan_bench, product(Product(1, 40, 300, 20), b), {"input": a})
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert (np.abs(found - exact) <= 301 * 2.0**-24 * (np.abs(a).astype(np.float64) @ np.abs(b))).all()


def valid(folder, layers):
    """spirv-val's word; and no module asks for more than every device has, or for halves."""
    for layer in layers:
        for module in layer.modules:
            words = struct.unpack_from("<8I", module.words, 20)
            assert words[:2] == (2 << 16 | 17, 1)  # Capability Shader
            if module.halves:
                assert words[2:4] == (2 << 16 | 17, 9)  # and Float16
            assert words[4 if module.halves else 2] & 0xFFFF == 11  # ExtInstImport: there are no others
    if not shutil.which("spirv-val"):
        pytest.skip("needs spirv-val: apt install spirv-tools")
    for i, module in enumerate(m for layer in layers for m in layer.modules):
        file = folder / f"{i}.spv"
        file.write_bytes(module.words)
        checked = subprocess.run(["spirv-val", "--target-env", "vulkan1.1", file], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr + checked.stdout


def test_modules_are_valid_for_vulkan(tmp_path):
    small = Convolution(1, 4, 3, 3, 3, groups=3)
    valid(tmp_path, [convolution(replace(small, activation=kind), np.ones((3, 1, 1, 1))) for kind in ENDINGS])
    for number in ("float32", "float16"):
        layers = [convolution(replace(what, number=number), random(what.filters, *what.kernel, what.channels
                                                                   // what.groups)) for what in SHAPES.values()]
        for batched in (True, False):
            what = Product(2, 3, 5, 7, batched=batched, transposed=True, residual=True, number=number)
            layers += [product(what), product(replace(what, transposed=False)),
                       product(what, random(*([2] if batched else []), 7, 5), random(7))]
        valid(tmp_path, layers)
    half = replace(what, transposed=False)
    valid(tmp_path, [product(half, halves=True), convolution(replace(SHAPES["a batch"], number="float16"),
                                                             random(16, 3, 3, 8), halves=True)])
    for threads in THREADS:
        valid(tmp_path, [product(replace(what, rows=20), shape=threads), convolution(
            SHAPES["a batch"], random(16, 3, 3, 8), shape=threads)])


def test_rows_that_are_not_there_are_not_read(vulkan_bench):
    """Of B's last four rows: what follows it does not matter."""
    a, b = random(2, 3, 5), random(2, 5, 7)
    b[1] = np.inf
    found, _ = run(vulkan_bench, product(Product(2, 3, 5, 7, batched=True)), {"input": a, "input1": b})
    assert np.isfinite(found[0]).all()


def test_a_module_is_compiled_once(vulkan_bench):
    layer, tensors = product(Product(1, 3, 5, 7), random(5, 7)), {"input": random(1, 3, 5)}
    first, _ = run(vulkan_bench, layer, tensors)
    made = vulkan_bench._whole.cache_info().misses
    again, _ = run(vulkan_bench, layer, tensors)
    assert vulkan_bench._whole.cache_info().misses == made
    np.testing.assert_array_equal(first, again)


def test_a_sum_that_the_driver_would_cut_short(vulkan_bench, monkeypatch):
    monkeypatch.setattr(vulkan_bench, "turns_max", 16)
    with pytest.raises(UnsupportedError, match="ends loops after 16 turns") as e:
        run(vulkan_bench, product(Product(1, 1, 65, 4), whole(65, 4)), {"input": whole(1, 65)})
    assert e.value.facts["want"] == "17"


def test_what_shaders_have_not():
    with pytest.raises(UnsupportedError, match="count in 32 bits"):
        product(Product(1, 1 << 20, 4, 1 << 12))
    with pytest.raises(UnsupportedError, match="the shader of products computes on floats"):
        product(Product(1, 1, 1, 1, number="int8"))
    with pytest.raises(UnsupportedError, match="only what is stored as halves"):
        product(Product(1, 1, 1, 1), halves=True)
    with pytest.raises(UnsupportedError, match="adds nothing up as halves"):
        convolution(replace(SHAPES["depthwise"], number="float16"), whole(37, 3, 3, 1), halves=True)
    with pytest.raises(UnsupportedError, match="the shader of convolutions computes on floats"):
        convolution(Convolution(1, 1, 1, 1, 1, number="int8"), whole(1, 1, 1, 1))


def test_arrays_of_other_shapes():
    with pytest.raises(InvariantError, match="B is of another shape"):
        product(Product(1, 2, 3, 4), whole(4, 3))
    with pytest.raises(InvariantError, match="the bias is of another shape"):
        product(Product(1, 2, 3, 4), whole(3, 4), whole(3))
    with pytest.raises(InvariantError, match="the weights are of another shape"):
        convolution(Convolution(1, 2, 2, 3, 4), whole(3, 1, 1, 4))


@pytest.mark.parametrize(("what", "got"), [
    (Convolution(1, 1, 1, 4, 4, (3, 3)), "an output of -1 x -1"), (Convolution(1, 2, 9, 4, 4, (3, 3)), "0 x 7"),
    (Convolution(1, 4, 4, 5, 4, groups=2), "5 channels and 4 filters in 2 groups"),
    (Convolution(1, 4, 4, 4, 5, groups=2), "4 channels and 5 filters in 2 groups"),
])
def test_what_is_no_convolution(what, got):
    """Two sides of -1 are an area of 1; the last of five filters would read the next pixel."""
    weights = whole(what.filters, *what.kernel, what.channels // what.groups)
    for layer in (convolution, partial(opencl_convolution.lower, traits=GRAPHICS, bias=None)):
        with pytest.raises(InvariantError, match="there is no such convolution") as e:
            layer(what, weights=weights)
        assert got in e.value.facts["got"]


def test_of_nothing_it_is_said():
    with pytest.raises(UnsupportedError) as e:
        softmax(Softmax(0, 4))
    assert e.value.facts["got"] == "0 elements"


@pytest.mark.parametrize("tensors", [{}, {"input": whole(6)}, {"input": whole(1, 1, 3)}, {"input": whole(3, 2)}])
def test_tensors_of_other_shapes(vulkan_bench, tensors):
    with pytest.raises(InvariantError, match="the tensor 'input' is of another shape") as e:
        run(vulkan_bench, product(Product(1, 2, 3, 4), whole(3, 4)), tensors)
    assert e.value.facts["want"] == "(1, 2, 3)"
