"""Products and convolutions on an OpenCL device against float64, on PoCL or whatever device is number 0."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab.errors import CapacityError, InvariantError, UnsupportedError
from npulab.gpu.compute import (
    attention,
    blocks,
    checks,
    choices,
    convolution,
    integer_attention,
    integer_blocks,
    integer_winograd,
    integers,
    matrices,
    tiles,
    trials,
    tuner,
    winograd,
)
from npulab.gpu.compute.attention_cpu import Lanes
from npulab.gpu.compute.attention_gpu import Items
from npulab.gpu.compute.integers import Integer
from npulab.gpu.compute.problems import Attention, Convolution, Product
from npulab.gpu.compute.tiles import Direct, Matrix, Tile, Winograd
from npulab.gpu.compute.traits import traits_of
from npulab.gpu.compute.types import Lowered, Traits

PROCESSOR = Traits("a CPU", True, 2, 16, 512, 1, 0, 4096, (48 << 10, 1 << 20))
GRAPHICS = Traits("a GPU", False, 4, 1, 64, 8, 32 << 10, 256, (16 << 10, 128 << 10))
BARE = replace(GRAPHICS, name="a GPU without local memory", local_bytes=0, warp=16)


def random(*shape, seed=0, kind=np.float32):
    return np.random.default_rng([seed, *shape]).uniform(-1, 1, shape).astype(kind)


def run(device, lowered, inputs, shape, kind=np.float32):
    """What the launches leave in "output", which is full of NaNs before."""
    buffers = {role: device.upload(array) for role, array in {**inputs, **lowered.constants}.items()}
    buffers |= {role: device.allocate(size) for role, size in lowered.scratch.items()}
    buffers["output"] = device.upload(np.full(shape, np.nan, kind))
    device.run(lowered.launches, buffers)
    return device.download(buffers["output"], shape, kind)


def convolved(device, what, traits, choice, bias=True):
    """(found, wanted, bound)"""
    kind = np.float16 if what.number == "float16" else np.float32
    x = random(what.batch, what.height, what.width, what.channels, kind=kind)
    weights = random(what.filters, *what.kernel, what.channels // what.groups, seed=1, kind=kind)
    b = random(what.filters, seed=2) if bias else None
    outputs = (what.batch, *what.out, what.filters)
    residual = random(*outputs, seed=3, kind=kind) if what.residual else None
    inputs = {"input": x} | ({"input1": residual} if what.residual else {})
    lowered = convolution.lower(what, traits, weights, b, choice)
    found = run(device, lowered, inputs, outputs, kind)
    return found, *checks.convolution(what, x, weights, b, residual, choice)


def right(found, want, bound):
    assert found.shape == want.shape
    assert (np.abs(found - want) <= bound).all(), float((np.abs(found - want) / bound).max())


CHOICES = {
    "processor": (PROCESSOR, Tile(3, 1, 16)), "processor, small": (PROCESSOR, Tile(3, 1, 8, 4)),
    "passes": (PROCESSOR, Tile(3, 1, 16, 2, passes=3)), "one number": (PROCESSOR, Tile(1, 1, 1)),
    "graphics": (BARE, Tile(4, 2, 4, 2, (8, 4))),
    "local memory": (GRAPHICS, Tile(4, 1, 4, 1, (8, 4), 8)), "uneven": (GRAPHICS, Tile(2, 2, 2, 1, (4, 6), 5)),
}
SHAPES = {
    "three channels": Convolution(1, 9, 11, 3, 10, (3, 3), (2, 2), pads=(1, 1, 1, 1)),
    "uneven pads": Convolution(1, 6, 7, 5, 18, (3, 3), pads=(0, 1, 2, 1), activation="relu"),
    "a batch": Convolution(3, 5, 4, 8, 16, (3, 3), pads=(1, 1, 1, 1), residual=True, activation="silu"),
    "dilated": Convolution(1, 9, 8, 4, 6, (3, 2), dilations=(2, 3), pads=(2, 2, 2, 2)),
    "flat kernel": Convolution(2, 6, 6, 5, 7, (5, 1), (1, 3), pads=(2, 0, 1, 0), residual=True),
    "groups": Convolution(1, 7, 5, 12, 8, (3, 3), pads=(1, 1, 1, 1), groups=4, residual=True, activation="relu6"),
    "each its own": Convolution(1, 7, 5, 6, 6, (3, 3), (2, 1), pads=(1, 1, 1, 1), groups=6),
    "strided points": Convolution(2, 7, 7, 9, 20, strides=(2, 2)),
    "padded points": Convolution(1, 4, 4, 3, 5, pads=(1, 0, 2, 1)),
    "wide": Convolution(1, 2, 2000, 3, 5, (3, 3), (1, 2), pads=(1, 1, 1, 1)),  # a copy of its rows is too large
    "whole image": Convolution(1, 4, 4, 6, 96, (4, 4)),
}


EVERY = [(shape, "processor") for shape in SHAPES] + [
    ("a batch", "processor, small"), ("flat kernel", "one number"), ("groups", "passes"), ("whole image", "passes"),
    ("three channels", "graphics"), ("groups", "graphics"),
    ("three channels", "local memory"), ("each its own", "local memory"), ("a batch", "uneven")]


@pytest.mark.parametrize(("shape", "choice"), EVERY)
def test_direct_convolutions_are_right(device, shape, choice):
    traits, tile = CHOICES[choice]
    right(*convolved(device, SHAPES[shape], traits, Direct(tile)))


@pytest.mark.parametrize("choice", ["processor", "local memory"])
def test_convolutions_of_one_tap_are_products(device, choice):
    what = Convolution(2, 5, 7, 24, 40, residual=True, activation="hardswish")
    traits, tile = CHOICES[choice]
    right(*convolved(device, what, traits, Matrix(tile)))


IMAGES = {
    "even": Convolution(1, 8, 8, 8, 24, (3, 3), pads=(1, 1, 1, 1)),
    "uneven": Convolution(2, 7, 9, 8, 20, (3, 3), pads=(0, 1, 2, 1), residual=True, activation="relu"),
    "odd": Convolution(1, 5, 3, 5, 3, (3, 3), pads=(1, 1, 1, 1), residual=True),
}


@pytest.mark.parametrize(("image", "choice"), [
    ("even", "passes"), ("uneven", "processor, small"), ("odd", "graphics")])
@pytest.mark.parametrize("size", tiles.SIZES)
def test_winograd_is_right(device, image, size, choice):
    traits, tile = CHOICES[choice]
    right(*convolved(device, IMAGES[image], traits, Winograd(tile, size)))


@pytest.mark.parametrize("size", tiles.SIZES)
def test_winograd_is_about_as_exact_as_promised(device, size):
    """The bound above holds for the worst signs. On random numbers the largest error, of the largest output: F(2x2)
    1e-6, F(4x4) 5e-6 with 64 channels."""
    what = Convolution(1, 16, 16, 64, 64, (3, 3), pads=(1, 1, 1, 1))
    found, want, _ = convolved(device, what, PROCESSOR, Winograd(Tile(3, 1, 16), size))
    assert np.abs(found - want).max() / np.abs(want).max() < {2: 1e-6, 4: 5e-6}[size]


@pytest.mark.parametrize("size", tiles.SIZES)
def test_winograd_matrices_are_exact(size):
    """A^T (G g . B^T d) is the correlation of d and g, over the rationals."""
    a, g, b = winograd.matrices(size)
    for i in range(3):
        for j in range(size + 2):
            product = [g[k][i] * b[k][j] for k in range(size + 2)]
            assert [sum(x * y for x, y in zip(row, product, strict=True)) for row in a] == [
                int(j - i == o) for o in range(size)]


@pytest.mark.parametrize(("constant", "choice"), [
    (True, "passes"), (False, "processor"), (False, "graphics"), (True, "local memory")])
@pytest.mark.parametrize("what", [
    Product(1, 33, 17, 40), Product(2, 5, 64, 48, scale=0.5), Product(1, 1, 100, 10, transposed=True),
    Product(3, 8, 16, 24, batched=True, transposed=True, scale=-2.0, residual=True, activation="gelu"),
    Product(2, 7, 3, 5, batched=True, residual=True, activation="leaky", slope=0.25),
], ids=["odd", "a batch", "a row", "batched", "small"])
def test_products_are_right(device, what, constant, choice):
    traits, tile = CHOICES[choice]
    a = random(what.batch, what.rows, what.inner)
    shape = (what.columns, what.inner) if what.transposed else (what.inner, what.columns)
    b = random(*([what.batch] if what.batched else []), *shape, seed=1)
    bias = random(what.columns, seed=2)
    outputs = (what.batch, what.rows, what.columns)
    others = [*([] if constant else [b]), *([random(*outputs, seed=3)] if what.residual else [])]
    inputs = {"input": a} | {f"input{i}": x for i, x in enumerate(others, 1)}
    for packed in (True, False):
        lowered = matrices.lower(what, traits, b if constant else None, bias, Matrix(tile, packed))
        right(run(device, lowered, inputs, outputs),
              *checks.product(what, a, b, bias, others[-1] if what.residual else None))


@pytest.mark.parametrize("columns", [12, 96])
def test_columns_of_any_tile_are_packed_within_their_buffer(device, columns):
    """Panels of 96 columns by groups of 64: a group and a half. What it wrote too much was the next matrix's."""
    what = Product(2, 5, 7, 20, batched=True)
    a, b = random(2, 5, 7), random(2, 7, 20, seed=1)
    tile = Tile(2, columns // 12, 4, 1, (3, 4))
    lowered = matrices.lower(what, BARE, None, None, Matrix(tile))
    pack = lowered.launches[0]
    assert pack.size[0] == -(-what.columns // columns) * columns  # a work item for each column, none beyond
    right(run(device, lowered, {"input": a, "input1": b}, (2, 5, 20)), *checks.product(what, a, b))


@pytest.mark.parametrize("choice", ["processor, small", "graphics"])
def test_half_floats_are_stored_and_floats_computed(device, choice):
    traits, tile = CHOICES[choice]
    what = Convolution(1, 6, 7, 5, 10, (3, 3), pads=(1, 1, 1, 1), residual=True, activation="relu", number="float16")
    right(*convolved(device, what, traits, Direct(tile) if traits.cpu else Winograd(tile, 2)))
    product = Product(1, 9, 20, 11, number="float16")
    a, b = random(1, 9, 20, kind=np.float16), random(20, 11, seed=1, kind=np.float16)
    for constant in (b, None):
        lowered = matrices.lower(product, traits, constant, None, Matrix(tile))
        right(run(device, lowered, {"input": a} | ({} if constant is not None else {"input1": b}), (1, 9, 11),
                  np.float16), *checks.product(product, a, b))


def any_convolution(data, residual=True, **more):
    """Of any small shape, padding beyond the kernel's size included."""
    def some(low, high):
        return data.draw(st.integers(low, high))

    groups = some(1, 3)
    kernel, strides, dilations = ((some(1, 4), some(1, 4)), (some(1, 3), some(1, 3)), (some(1, 2), some(1, 2)))
    pads = tuple(some(0, k + 1) for k in (*kernel, *kernel))
    height, width = ((k - 1) * d + some(1, 9) for k, d in zip(kernel, dilations, strict=True))
    return Convolution(some(1, 2), height, width, groups * some(1, 8), groups * some(1, 20), kernel, strides, dilations,
                       pads, groups, residual and data.draw(st.booleans()), **more)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.data())
def test_any_convolution_is_right(device, data):
    what = any_convolution(data)
    traits, tile = CHOICES[data.draw(st.sampled_from(["processor", "local memory"]))]
    right(*convolved(device, what, traits, Direct(tile)))


def test_the_oracle_agrees_with_another():
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'npulab[quantize]'")
    for what in SHAPES.values():
        x, w = random(what.batch, what.height, what.width, what.channels), random(
            what.filters, *what.kernel, what.channels // what.groups, seed=1)
        top, left, bottom, right_ = what.pads
        padded = torch.nn.functional.pad(torch.tensor(x).double().permute(0, 3, 1, 2), (left, right_, top, bottom))
        other = torch.nn.functional.conv2d(padded, torch.tensor(w).double().permute(0, 3, 1, 2), None, what.strides, 0,
                                           what.dilations, what.groups).permute(0, 2, 3, 1).numpy()
        found, _ = checks.convolution(replace(what, residual=False, activation="none"), x, w)
        np.testing.assert_allclose(found, other, rtol=1e-12, atol=1e-12)


def test_a_wrong_number_is_beyond_the_bound():
    """Of one term too few in one output: the bound is no excuse."""
    what = SHAPES["a batch"]
    x, w = random(3, 5, 4, 8), random(16, 3, 3, 8, seed=1)
    want, bound = checks.convolution(what, x, w)
    less = w.copy()
    less[3, 1, 1, 2] = 0
    found, _ = checks.convolution(what, x, less)
    assert (np.abs(found - want) > bound)[..., 3].mean() > 0.95


# choices


def test_candidates_fit_the_device_and_one_is_first():
    for what in (Product(1, 64, 64, 64), Product(4, 1, 9, 5, batched=True), *SHAPES.values()):
        for traits in (PROCESSOR, GRAPHICS, BARE, replace(PROCESSOR, vector=4, registers=64),
                       replace(GRAPHICS, warp=64, group_max=64), replace(GRAPHICS, group_max=1)):
            found = tiles.candidates(what, traits)
            assert found
            assert found == tiles.candidates(what, traits)
            assert len(set(found)) == len(found)
            for c in found:
                assert c.tile.group[0] * c.tile.group[1] <= traits.group_max
                assert c.tile.local_bytes <= traits.local_bytes or not c.tile.depth


def test_the_model_takes_winograd_where_it_pays():
    first = tiles.candidates(Convolution(1, 56, 56, 64, 64, (3, 3), pads=(1, 1, 1, 1)), PROCESSOR)[0]
    assert isinstance(first, Winograd)
    for other in (Convolution(1, 56, 56, 64, 64, (3, 3), (2, 2), pads=(1, 1, 1, 1)),
                  Convolution(1, 224, 224, 3, 32, (3, 3), pads=(1, 1, 1, 1))):
        assert isinstance(tiles.candidates(other, PROCESSOR)[0], Direct)
    assert isinstance(tiles.candidates(Convolution(1, 14, 14, 64, 64), PROCESSOR)[0], Matrix)


def test_what_does_not_suit_is_refused():
    weights = np.zeros((4, 3, 3, 4), np.float32)
    strided = Convolution(1, 8, 8, 4, 4, (3, 3), (2, 2))
    with pytest.raises(InvariantError, match="Winograd's algorithm is here for"):
        convolution.lower(strided, PROCESSOR, weights, None, Winograd(Tile()))
    with pytest.raises(InvariantError, match="a product's rows are not this convolution's"):
        convolution.lower(strided, PROCESSOR, weights, None, Matrix(Tile()))
    own = Convolution(1, 8, 8, 4, 4, (3, 3), groups=4)
    for choice, why in ((Winograd(Tile()), "Winograd's algorithm is here for"), (Matrix(Tile()), "a product's rows")):
        with pytest.raises(InvariantError, match=why):
            convolution.lower(own, PROCESSOR, np.zeros((4, 3, 3, 1), np.float32), None, choice)
    with pytest.raises(InvariantError, match="the weights are of another shape"):
        convolution.lower(strided, PROCESSOR, weights[1:], None)
    with pytest.raises(InvariantError, match="the bias is of another shape"):
        convolution.lower(strided, PROCESSOR, weights, np.zeros(3))
    with pytest.raises(InvariantError, match="B is of another shape"):
        matrices.lower(Product(1, 2, 3, 4), PROCESSOR, np.zeros((4, 3)), None)
    with pytest.raises(InvariantError, match="a product is no convolution"):
        matrices.lower(Product(1, 2, 3, 4), PROCESSOR, None, None, Direct(Tile()))


@pytest.mark.parametrize(("more", "text"), [
    ({"strides": (0, 1)}, "strides 0, 1"), ({"dilations": (1, -1)}, "dilations 1, -1"), ({"groups": 0}, "groups 0"),
    ({"kernel": (0, 3)}, "kernel 0, 3"), ({"batch": 0}, "batch 0"), ({"channels": 0}, "channels 0"),
    ({"pads": (0, -1, 0, 0)}, "pads 0, -1, 0, 0")])
def test_there_is_no_convolution_of_nothing(more, text):
    with pytest.raises(InvariantError, match="there is no such convolution") as e:
        Convolution(**{"batch": 1, "height": 8, "width": 8, "channels": 4, "filters": 4} | more)
    assert e.value.facts["got"] == text


@pytest.mark.parametrize("more", [{"batch": 0}, {"rows": 0}, {"inner": -1}, {"columns": 0}])
def test_there_is_no_product_of_nothing(more):
    with pytest.raises(InvariantError, match="there is no such product"):
        Product(**{"batch": 1, "rows": 2, "inner": 3, "columns": 4} | more)


def test_a_layer_says_what_it_needs():
    what = Convolution(1, 8, 8, 16, 32, (3, 3), pads=(1, 1, 1, 1))
    for choice in (Direct(Tile(6, 4, 16)), Winograd(Tile(6, 4, 16), 2)):
        lowered = convolution.lower(what, PROCESSOR, np.zeros((32, 3, 3, 16), np.float32), None, choice)
        assert sum(x.operations for x in lowered.launches) == what.operations
        assert all(x.traffic > 0 for x in lowered.launches)
        for x in lowered.launches:
            assert all(s % g == 0 for s, g in zip(x.size, x.group, strict=True))
    direct = convolution.lower(what, PROCESSOR, np.zeros((32, 3, 3, 16), np.float32), None, Direct(Tile(6, 4, 16)))
    assert direct.launches[0].traffic == 4 * (8 * 8 * 16 + 9 * 16 * 32 + 8 * 8 * 32)


def test_layers_of_other_sizes_share_a_kernel():
    """Compiling takes longer than running. Not those of few channels: a network has one."""
    small, large = (convolution.lower(Convolution(1, n, n, 16, 64, (3, 3), pads=(1, 1, 1, 1)), PROCESSOR,
                                      np.zeros((64, 3, 3, 16), np.float32), None, Direct(Tile(4, 4, 16)))
                    for n in (8, 24))
    assert small.launches[0].kernel == large.launches[0].kernel


def test_what_32_bits_do_not_count_is_refused():
    """Steps from a panel of columns to the next; no array is made."""
    with pytest.raises(CapacityError, match="more elements than kernels count"):
        matrices.lower(Product(1, 1, 1 << 28, 1), PROCESSOR, None, None, Matrix(Tile(1, 1, 16)))


def test_panels_keep_every_number():
    matrix = random(2, 5, 7)
    packed = blocks.pack(matrix, Tile(1, 1, 4), "float32")
    assert packed.shape == (2, 2, 5, 4)
    assert (packed.transpose(0, 2, 1, 3).reshape(2, 5, 8)[..., :7] == matrix).all()
    assert not packed[:, 1, :, 3].any()


# traits


def probe(device, **more):
    quantities = {"warp width": (32, "work items"), "register file": (65536, "bytes"),
                  "resident threads": (512, "threads"), "L1 size": (49152, "bytes"), "L2 size": (1 << 20, "bytes"),
                  "fma float32 rate": (1e11, "operations/s"), "memory bandwidth": (20, "GB/s")}
    found = [{"name": n, "value": v, "unit": u, "status": "measured"} for n, (v, u) in quantities.items()]
    return {"identity": {"name": device.identity.name, "driver": device.identity.driver}, "quantities": found} | more


def test_traits_are_measured_stated_or_assumed(device):
    plain, probed = traits_of(device), traits_of(device, probe(device))
    assert set(plain.sources.values()) <= {"stated", "assumed"}
    assert (plain.operations, plain.bandwidth) == (0, 0)
    assert (probed.operations, probed.bandwidth, probed.caches) == (2e11, 2e10, (49152, 1 << 20))
    assert {probed.sources[x] for x in ("operations", "bandwidth", "caches")} == {"measured"}
    assert set(plain.sources) == set(probed.sources) == {
        "cpu", "compute_units", "vector", "registers", "warp", "local_bytes", "group_max", "caches", "operations",
        "bandwidth", "halves"}


def test_traits_of_a_graphics_processor_come_from_its_probe(device):
    kinds = SimpleNamespace(device_type=SimpleNamespace(CPU=2),
                            device_local_mem_type=SimpleNamespace(LOCAL=1))
    graphics = SimpleNamespace(
        cl=kinds, identity=device.identity, limits=device.limits, device=SimpleNamespace(
            type=4, native_vector_width_float=1, local_mem_type=1, global_mem_cache_size=131072))
    found = traits_of(graphics, probe(device))
    assert (found.cpu, found.warp, found.registers, found.vector) == (False, 32, 32, 1)
    assert found.local_bytes == device.limits.local_bytes
    assert found.sources["registers"] == found.sources["warp"] == "measured"


@pytest.mark.parametrize("result", [
    {}, {"identity": None}, {"identity": {"name": "another"}}, [], "text", {"quantities": 5},
    {"identity": {"name": "another", "driver": "1"}, "quantities": [{"name": "warp width", "value": 8}]}])
def test_another_devices_probe_is_not_used(device, result):
    assert traits_of(device, result) == traits_of(device)


@pytest.mark.parametrize("value", [None, "many", float("nan"), float("inf"), -1, 0, True, 1e300])
def test_numbers_that_cannot_be_are_not_used(device, value):
    quantity = {"name": "fma float32 rate", "value": value, "unit": "operations/s", "status": "measured"}
    assert traits_of(device, probe(device, quantities=[quantity, 5, None, {"status": "measured"}])) == traits_of(device)
    refused = [{"name": "fma float32 rate", "value": 1e11, "unit": "operations/s", "status": "refused"}]
    assert traits_of(device, probe(device, quantities=refused)).operations == 0


# the tuner

SMALL = Product(1, 8, 8, 16)
HEADS = Attention(1, 8, 50, 4, 4, 0.5)
KINDS = {
    "product": (SMALL, [Matrix(Tile(2, 1, 4)), Matrix(Tile(4, 1, 4)), Matrix(Tile(1, 1, 4))],
                ("int k = 0;", "int k = 0; inner--;")),
    "int8 convolution": (Convolution(1, 6, 6, 4, 8, (3, 3), pads=(1, 1, 1, 1), number="int8"), [
        Integer("direct", integer_blocks.Tile(2, 1, 4, 1, (1, 1))),
        Integer("winograd", integer_blocks.Tile(4, 1, 8, 2, (1, 1))),
        Integer("direct", integer_blocks.Tile(4, 2, 4, 1, (1, 1)))], ("x + (I)(-5)", "x + (I)(-4)")),
    "attention": (HEADS, [Lanes(1), Lanes(1, 24), Lanes(1, 48)], ("1.0f / sum0", "1.0001f / sum0")),
    "int8 attention": (replace(HEADS, number="int8"), [Lanes(1), Lanes(1, 24), Lanes(1, 48)],
                       ("gain / sum0", "gain * 1.05f / sum0")),
}
"""A problem, three candidates, and what makes a kernel of it wrong."""


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """what: to compute. few: three candidates. wrong: text of the kernel, and other text."""
    what, few, wrong = KINDS[request.param]
    monkeypatch.setattr(choices, "candidates", lambda what, traits, halves=False: few)
    return SimpleNamespace(what=what, few=few, wrong=wrong)


def stored(folder):
    files = list(folder.glob("*.json"))
    assert len(files) == 1
    return files[0], msgspec.json.decode(files[0].read_bytes(), type=tuner.Tuned)


def script(text):
    return sys.executable, "-c", text


def tuned(device, kind, *more, **others):
    return tuner.tune(device, PROCESSOR, kind.what, *more, **others)


def plain(choice):
    """As a worker reads it."""
    return msgspec.json.decode(msgspec.json.encode(choice))


def answers(few, *seconds):
    """A worker that measures so much for the three candidates."""
    return script(f"import sys, json\nfew, times = {plain(few)}, {seconds}\n"
                  "sys.stdin.readline()\n"
                  "for line in sys.stdin:\n"
                  "    a = json.loads(line)\n"
                  "    took = [times[few.index(a[k])] if a[k] else 1 for k in ('choice', 'rival')]\n"
                  "    print('a word of the driver')\n"
                  "    print(json.dumps({'seconds': [took[0]] * 3, 'rival': [took[1]] * 3}), flush=True)\n")


def test_the_tuner_finds_and_keeps_a_candidate(device, kind, tmp_path):
    heard = []
    found = tuned(device, kind, tmp_path / "new", 60, heard.append)
    assert found in kind.few
    assert tuner.best(tmp_path / "new", device, PROCESSOR, kind.what) == found
    _, kept = stored(tmp_path / "new")
    assert [t.choice for t in kept.tried] == kind.few
    assert all(t.seconds > 0 and not t.why for t in kept.tried)
    assert len(heard) == 3
    assert tuner.best(tmp_path / "new", device, PROCESSOR, replace(kind.what, batch=9)) is None
    again = tuned(device, kind, tmp_path / "new", 60, worker=script("raise SystemExit(1)"))
    assert again == found  # nothing is tried a second time


def test_the_quickest_wins(device, kind, tmp_path):
    assert tuned(device, kind, tmp_path, 60, worker=answers(kind.few, 3e-6, 1e-6, 2e-6)) == kind.few[1]


def test_one_that_is_quicker_now_and_then_does_not_win():
    slow, mixed = (1.0,) * 11, (0.5,) * 6 + (2.0,) * 5
    assert tuner._judged(Matrix(Tile(1)), None, trials.Answer("", slow)).won
    assert not tuner._judged(Matrix(Tile(1)), Matrix(Tile(2)), trials.Answer("", mixed, slow)).won
    assert tuner._judged(Matrix(Tile(1)), Matrix(Tile(2)), trials.Answer("", (0.9,) * 8 + (2.0,) * 3, slow)).won


def test_one_that_wins_by_luck_does_not_win_again(device, kind, tmp_path):
    """It is the quicker one in all turns of one time, then never again."""
    lucky = script(f"import sys, json\nlast, many = {plain(kind.few[2])}, 0\nsys.stdin.readline()\n"
                   "for line in sys.stdin:\n"
                   "    many += json.loads(line)['choice'] == last\n"
                   "    took = 1e-6 if many == 1 else 3e-6\n"
                   "    print(json.dumps({'seconds': [took] * 3, 'rival': [2e-6] * 3}), flush=True)")
    assert tuned(device, kind, tmp_path, 60, worker=lucky) == kind.few[0]
    _, kept = stored(tmp_path)
    assert [t.won for t in kept.tried] == [True, False, False]


def test_a_wrong_candidate_is_left_out(device, kind, tmp_path):
    """Its kernel is another: results are a little off, or by one."""
    wrong = script("from npulab.gpu.compute import trials\n"
                   "from dataclasses import replace\n"
                   "real = trials.trial\n"
                   "def changed(x):\n"
                   f"    source = x.kernel.source.replace{kind.wrong}\n"
                   "    return replace(x, kernel=replace(x.kernel, source=source))\n"
                   "def trial(what, traits):\n"
                   "    found, seen = real(what, traits), []\n"
                   "    def lower(choice):\n"
                   "        seen.append(choice)\n"
                   "        lowered = found.lower(choice)\n"
                   "        return lowered if list(dict.fromkeys(seen)).index(choice) != 1 else replace(\n"
                   "            lowered, launches=tuple(map(changed, lowered.launches)))\n"
                   "    return replace(found, lower=lower)\n"
                   "trials.trial = trial\n"
                   "trials.main()")
    found = tuned(device, kind, tmp_path, 60, worker=wrong)
    assert found != kind.few[1]
    _, kept = stored(tmp_path)
    assert "numbers are wrong" in kept.tried[1].why
    assert not kept.tried[0].why
    assert not kept.tried[2].why


def test_a_candidate_that_does_not_compile_is_left_out(device, monkeypatch):
    t = trials.Trials(device, PROCESSOR, SMALL)
    monkeypatch.setattr(blocks, "stores", lambda *a: "nonsense")
    assert "does not compile" in t.answer(trials.Asked(Matrix(Tile(3, 1, 4)))).why


@pytest.mark.parametrize("worker", ["import time; time.sleep(60)", "import sys\nwhile True: print('x' * 80)"],
                         ids=["hangs", "babbles"])
def test_the_time_is_kept_whatever_a_candidate_does(device, kind, tmp_path, monkeypatch, worker):
    monkeypatch.setattr(tuner, "FAIR", 0.0)
    start = time.monotonic()
    for _ in range(tuner.ATTEMPTS):
        assert tuned(device, kind, tmp_path, 0.5, worker=script(worker)) == kind.few[0]
    assert time.monotonic() - start < 20  # not 60; a busy machine is given time
    assert tuned(device, kind, tmp_path, 60, worker=answers(kind.few, 3e-6, 1e-6, 2e-6)) == kind.few[1]
    _, kept = stored(tmp_path)
    assert kept.tried[0].why == "the tuner ended while it was tried"


def test_a_worker_that_dies_costs_its_candidate_alone(device, kind, tmp_path):
    dies = script(f"import sys, json\nFIRST = {plain(kind.few[0])}\nsys.stdin.readline()\n"
                  "for line in sys.stdin:\n"
                  "    if json.loads(line)['choice'] == FIRST: sys.exit(1)\n"
                  "    print(json.dumps({'seconds': [1e-6]}), flush=True)")
    assert tuned(device, kind, tmp_path, 60, worker=dies) == kind.few[1]
    assert stored(tmp_path)[1].tried[0].why == "the process died of it"


def test_a_tuner_that_is_killed_goes_on(device, kind, tmp_path):
    """Killed while the second candidate is tried, by a signal that nothing can catch."""
    code = f"""
import sys, pathlib
import msgspec
from npulab.gpu.compute import choices, tuner
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.problems import Attention, Convolution, Product
from npulab.gpu.compute.types import Traits
few = msgspec.json.decode({msgspec.json.encode(kind.few)}, type=list[choices.Choice])
choices.candidates = lambda *a: few
worker = (sys.executable, "-c", '''
import sys, json, time
sys.stdin.readline(); sys.stdin.readline()
print(json.dumps({{"seconds": [1e-6]}}), flush=True)
sys.stdin.readline()
''' + "sys.stdin.readline()")
what, store = {kind.what!r}, pathlib.Path(sys.argv[1])
tuner.tune(Device(0), {PROCESSOR!r}, what, store, 60, lambda s: print(s, flush=True), worker)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})
    assert b"1 of 3" in child.stdout.readline()
    deadline = time.monotonic() + 30
    while stored(tmp_path)[1].trying is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    _, kept = stored(tmp_path)
    assert [t.choice for t in kept.tried] == kind.few[:1]
    assert kept.trying == kind.few[1]
    assert tuned(device, kind, tmp_path, 60, worker=answers(kind.few, 3e-6, 1e-6, 2e-6)) == kind.few[1]
    _, kept = stored(tmp_path)
    assert [t.choice for t in kept.tried] == kind.few


@pytest.mark.parametrize("damage", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"key": {}, "tried": []}', b"[" * 100000, None])
def test_a_damaged_store_is_as_good_as_none(device, kind, tmp_path, damage):
    tuned(device, kind, tmp_path, 60, worker=answers(kind.few, 1e-6, 2e-6, 3e-6))
    path, kept = stored(tmp_path)
    if damage is None:  # right but for what it holds: a choice that is none of the candidates, times that cannot be
        path.write_bytes(msgspec.json.encode(tuner.Tuned(kept.key, (
            tuner.Tried(Matrix(Tile(10**6)), 1e-9, 1.0, True), tuner.Tried(kind.few[0], -1.0, 1.0, True)))))
    else:
        path.write_bytes(damage)
    assert tuner.best(tmp_path, device, PROCESSOR, kind.what) is None
    assert tuned(device, kind, tmp_path, 60, worker=answers(kind.few, 2e-6, 1e-6, 3e-6)) == kind.few[1]


def test_what_was_kept_before_there_were_other_kinds_is_still_found(device, tmp_path):
    """The name of a file and its key, of kernels of floats."""
    for what in (SMALL, Convolution(1, 6, 6, 4, 8, (3, 3))):
        path, key = tuner._of(tmp_path, device, what, False)
        here = Path(tuner.__file__).parent
        made = hashlib.sha256(b"".join((here / f"{n}.py").read_bytes() for n in (
            "activations", "blocks", "convolution", "matrices", "narrow", "vectors", "winograd")))
        before = {"device": asdict(device.identity), "npulab": f"{version('npulab')}+{made.hexdigest()[:12]}",
                  "problem": type(what).__name__, **asdict(what), "halves": False}
        before = msgspec.json.decode(msgspec.json.encode(before))
        assert key == before
        assert path.stem == hashlib.sha256(msgspec.json.encode(before, order="sorted")).hexdigest()[:24]


@pytest.mark.parametrize("what", [
    Convolution(1, 8, 8, 16, 16, (3, 3), groups=16, number="int8"), Attention(1, 8, 8, 1 << 20, 4, 1.0),
    Attention(1, 8, 8, 1 << 20, 4, 1.0, number="int8")], ids=["depthwise", "no room", "int8, no room"])
def test_where_there_is_nothing_to_choose_nothing_is_tried(device, tmp_path, what):
    for traits in (PROCESSOR, GRAPHICS):
        assert choices.candidates(what, traits) == []
        assert tuner.tune(device, traits, what, tmp_path, 60, worker=script("raise SystemExit(1)")) is None
        assert tuner.best(tmp_path, device, traits, what) is None
    assert not list(tmp_path.iterdir())


LAYERS = {
    "3x3": Convolution(1, 9, 7, 6, 20, (3, 3), pads=(1, 1, 1, 1), number="int8"),
    "strided, groups": Convolution(2, 9, 8, 10, 6, (3, 2), (2, 1), pads=(1, 0, 0, 1), groups=2, number="int8"),
    "product": Product(2, 7, 33, 19, transposed=True, number="int8"),
    "attention": Attention(2, 37, 53, 9, 7, 0.3), "causal": Attention(2, 37, 53, 9, 7, 0.3, causal=True),
    "attention of halves": Attention(1, 70, 53, 16, 16, 0.3, number="float16"),
    "int8 attention": Attention(2, 37, 53, 9, 7, 0.3, number="int8"),
    "int8, causal": Attention(2, 70, 53, 9, 7, 0.3, True, number="int8"),
}


@pytest.mark.parametrize("traits", [PROCESSOR, GRAPHICS], ids=["processor", "graphics"])
@pytest.mark.parametrize("name", LAYERS)
def test_any_candidate_of_the_other_kinds_is_right(device, name, traits):
    """The first is what is taken unasked; of the others some."""
    what = LAYERS[name]
    ways = choices.candidates(what, traits)
    assert len(ways) == len(set(ways)) > 4
    t = trials.Trials(device, traits, what)
    assert t.trial.lower(None).launches == t.trial.lower(ways[0]).launches
    if t.trial.kind is np.int8:  # spread over the bytes: a test of all of them
        assert len(np.unique(np.round(t.trial.wanted(ways[0])[0]))) > 60
    for choice in ways[1::max(1, len(ways) // 3)]:
        lowered = t.trial.lower(choice)
        t.kept[choice] = lowered, {role: device.upload(a) for role, a in lowered.constants.items()} | {
            role: device.allocate(size) for role, size in lowered.scratch.items()}
        assert t.wrong(choice) == ""


@pytest.mark.parametrize("name", LAYERS)
def test_numbers_that_are_not_written_are_wrong(device, name):
    """All of them, where the run before wrote what is right."""
    t, (choice, *_) = trials.Trials(device, PROCESSOR, LAYERS[name]), choices.candidates(LAYERS[name], PROCESSOR)
    assert t.answer(trials.Asked(choice)).why == ""
    t.kept[choice] = Lowered(()), {}
    count = np.prod(t.trial.shape)
    assert t.wrong(choice).startswith(f"{count} of {count} numbers are wrong, the first at (0, 0, 0")


def test_the_first_of_each_algorithm_come_first():
    ways = choices.candidates(LAYERS["3x3"], PROCESSOR)
    assert {w.algorithm for w in ways[:2]} == {"direct", "winograd"}
    costs = [integers._cycles(LAYERS["3x3"], PROCESSOR, w) for w in ways]
    assert costs[:2] == sorted(costs[:2])
    assert costs[2:] == sorted(costs[2:])


def test_winograd_s_algorithm_is_chosen_only_where_any_weights_suit():
    """Weights of -128 and a zero point of 127 allow 1827 channels."""
    for channels, right in ((1827, True), (1828, False)):
        what = Convolution(1, 2, 2, channels, 1, (3, 3), pads=(1, 1, 1, 1), number="int8")
        assert integer_winograd.suits(what, np.full((1, 3, 3, channels), -128, np.int8), 127) is right
        assert any(c.algorithm == "winograd" for c in choices.candidates(what, PROCESSOR)) is right


@pytest.mark.parametrize("changed", [{"scale": 2.0}, {"residual": True}, {"batched": True}, {"activation": "relu"}])
def test_integer_products_with_more_are_refused(changed):
    with pytest.raises(UnsupportedError, match="integer products are of constant weights"):
        choices.candidates(replace(LAYERS["product"], **changed), PROCESSOR)


@pytest.mark.parametrize("lower", [
    lambda *a: attention.lower(HEADS, *a),
    lambda *a: integer_attention.lower(replace(HEADS, number="int8"), a[0], (1.0,) * 3, (0,) * 3, 1.0, 0, a[1])])
def test_a_choice_for_the_other_kind_of_device_is_refused(lower):
    for traits, choice in ((PROCESSOR, Items(4, 4, 1)), (GRAPHICS, Lanes(1))):
        with pytest.raises(InvariantError, match="for another kind of device"):
            lower(traits, choice)


def test_a_store_that_cannot_be_written_is_named(device, kind, tmp_path):
    from npulab.errors import UsageError

    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        tuned(device, kind, Path(tmp_path / "file"), 60)
