"""Kernels that compute on halves against float64: where the device has cl_khr_fp16 with its own, everywhere emulated.

Emulated, a half is a float that is rounded to halves after each operation. Conversions are the same to the bit. A fused
multiply-add is rounded twice, to float32 and then to halves (the product of two halves is exact in float32, its sum
with a third is not): where the first makes a tie of what was none, the second may go the other way, so that the result
is 2**-11 + 2**-23 of it off in place of 2**-11. Halves of hardware may be rounded towards zero, 2**-10, and denormals
taken for zero: that is emulated, too, and all are held to the same bound, which is of the worst.
"""

import re
from dataclasses import replace
from fractions import Fraction
from functools import partial

import msgspec
import numpy as np
import pytest

from npulab.errors import UnsupportedError
from npulab.gpu.compute import (
    attention,
    blocks,
    checks,
    choices,
    convolution,
    depthwise,
    matrices,
    tiles,
    trials,
    tuner,
    vectors,
)
from npulab.gpu.compute.attention_gpu import Items
from npulab.gpu.compute.problems import Attention, Convolution, Product
from npulab.gpu.compute.tiles import Direct, Matrix, Tile, Winograd
from npulab.gpu.compute.types import Buffer, Kernel, Launch, Lowered
from test_gpu_kernels import BARE, GRAPHICS, PROCESSOR, SHAPES, random, right, run

CPU, GPU, NEAR = (replace(t, halves=True) for t in (PROCESSOR, BARE, GRAPHICS))
TILES = {
    "processor": (CPU, Tile(3, 1, 16, halves=True)), "passes": (CPU, Tile(3, 1, 16, 2, passes=3, halves=True)),
    "one number": (CPU, Tile(1, 1, 1, halves=True)), "graphics": (GPU, Tile(4, 2, 4, 2, (8, 4), halves=True)),
    "local memory": (NEAR, Tile(4, 1, 4, 1, (8, 4), 8, halves=True)),
    "uneven": (NEAR, Tile(2, 2, 2, 1, (4, 6), 5, halves=True)),
}


def emulated(width, rounding="", zero="0.0f"):
    """zero: what is smaller counts as zero."""
    n = "" if width == 1 else width
    return f"""typedef float H1;
typedef float{n} H;
inline H seen(H v) {{ return fabs(v) < {zero} ? (H)(0.0f) : v; }}
inline H1 seen_one(H1 v) {{ return fabs(v) < {zero} ? 0.0f : v; }}
inline H rounded(H v) {{
    ushort t[{width}];
    vstore_half{n}{rounding}(v, 0, (half *)t);
    return seen(vload_half{n}(0, (const half *)t));
}}
#define HALF_ONE(p, i) seen_one(vload_half(i, p))
#define HALF_MANY(p) seen(vload_half{n}(0, p))
#define HALF_FMA(a, b, c) rounded(fma(a, b, c))
#define HALVES(v) rounded(v)
#define HALF_FLOATS(h) (h)
"""


REAL = vectors.half_operations
EMULATED = {"emulated": emulated, "towards zero": partial(emulated, rounding="_rtz", zero="0x1p-14f")}


@pytest.fixture(params=["real", "emulated"])
def halves(request, device, monkeypatch):
    """Kernels are made with the device's halves, or with emulated ones."""
    if request.param in EMULATED:
        for module in (vectors, blocks):
            monkeypatch.setattr(module, "half_operations", EMULATED[request.param])
    elif "float16" not in device.limits.elements:
        pytest.skip("needs a device that computes on halves (cl_khr_fp16)")
    return request.param


every = pytest.mark.parametrize("halves", ["real", *EMULATED], indirect=True)
"""Where it makes a difference, or stands for the rest: nearly all the time is the compiler's."""


def whole(*shape, seed=0, kind=np.float16):
    return np.random.default_rng([seed, *shape]).integers(-4, 5, shape).astype(kind)


def some(*shape, seed=0, kind=np.float16):
    return random(*shape, seed=seed, kind=kind)


def multiplied(device, what, traits, tile, constant=True, make=some, packed=True, change=lambda x: x):
    """(found, wanted, bound)"""
    a = make(what.batch, what.rows, what.inner)
    b = make(*([what.batch] if what.batched else []),
             *((what.columns, what.inner) if what.transposed else (what.inner, what.columns)), seed=1)
    bias = make(what.columns, seed=2, kind=np.float32)
    outputs = what.batch, what.rows, what.columns
    residual = make(*outputs, seed=3) if what.residual else None
    others = [x for x in (None if constant else b, residual) if x is not None]
    lowered = matrices.lower(what, traits, b if constant else None, bias, Matrix(tile, packed))
    found = run(device, change(lowered), {"input": a} | {f"input{i}": x for i, x in enumerate(others, 1)}, outputs,
                np.float16)
    return found, *checks.product(what, a, b, bias, residual, tile.halves)


def convolved(device, what, traits, tile, make=some, kind=Direct, change=lambda x: x):
    """(found, wanted, bound)"""
    x = make(what.batch, what.height, what.width, what.channels)
    weights = make(what.filters, *what.kernel, what.channels // what.groups, seed=1)
    bias = make(what.filters, seed=2, kind=np.float32)
    outputs = what.batch, *what.out, what.filters
    residual = make(*outputs, seed=3) if what.residual else None
    if tile is None:
        lowered = depthwise.lower(what, traits, weights, bias, halves=True)
    else:
        lowered = convolution.lower(what, traits, weights, bias, kind(tile))
    inputs = {"input": x} | ({"input1": residual} if what.residual else {})
    return run(device, change(lowered), inputs, outputs, np.float16), *checks.convolution(
        what, x, weights, bias, residual, halves=True)


def added_as_halves(computed, *arguments, exact=True, **more):
    """Whole numbers come out exactly, others within the bound."""
    if exact:
        found, want, _ = computed(*arguments, make=whole, **more)
        assert np.abs(want).max() < 2048  # up to there halves hold whole numbers
        np.testing.assert_array_equal(found, want)
    found, want, bound = computed(*arguments, **more)
    right(found, want, bound)
    return found, want, bound


# what an operation is


def names(text):
    return set(re.findall(r"(?:#define|typedef \w+) (\w+)", text))


def tiny(*shape, seed=0, kind=np.float16):
    """Products of them are denormal halves."""
    return some(*shape, seed=seed, kind=kind) * kind(2**-8 if seed < 2 else 0)


@pytest.mark.parametrize("width", vectors.WIDTHS)
def test_what_is_emulated_is_what_kernels_use(width):
    assert names(REAL(width)) == names(emulated(width)) == {"H1", "H", "HALF_ONE", "HALF_MANY", "HALF_FMA", "HALVES",
                                                          "HALF_FLOATS"}
    assert "cl_khr_fp16 : enable" in REAL(width)
    assert "cl_khr_fp16" not in emulated(width)


@every
def test_an_operation_is_as_near_as_the_bound_takes_it(device, halves):
    """2**-10 of the result. The first is the one that rounding twice takes the other way."""
    r = np.random.default_rng(0)
    a, b, c = (np.ldexp(r.uniform(1, 2, 4096), r.integers(-6, 7, 4096)) * r.choice([-1, 1], 4096) for _ in range(3))
    a[0], b[0], c[0] = 1 + 2**-10, 2**-11 * (1 - 2**-10), 1 + 2**-10
    c[1:64] = -(a * b)[1:64]  # little is left
    a, b, c = (x.astype(np.float16) for x in (a, b, c))
    source = vectors.preamble("float16", 4) + vectors.half_operations(4) + """
__kernel void f(__global const T *a, __global const T *b, __global const T *c, __global float *y) {
    int i = get_global_id(0) * 4;
    vstore4(HALF_FLOATS(HALF_FMA(HALF_MANY(a + i), HALF_MANY(b + i), HALF_MANY(c + i))), 0, y + i);
}"""
    inputs = {"input": a, "input1": b, "input2": c}
    launch = Launch(Kernel(source, "f"), (1024,), (1,), tuple(map(Buffer, (*inputs, "output"))), "f")
    found = run(device, Lowered((launch,)), inputs, (4096,))
    np.testing.assert_array_equal(found, found.astype(np.float16))
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    off = [abs(Fraction(float(f)) - e) for f, e in zip(found, exact, strict=True)]
    assert all(o <= abs(e) / 2**10 + Fraction(1, 2**14) for o, e in zip(off, exact, strict=True))
    if halves == "emulated":  # to the nearest, but for that
        assert found[0] == 1 + 2**-9
        assert all(o <= abs(e) * (Fraction(1, 2**11) + Fraction(1, 2**23)) + Fraction(1, 2**25)
                   for o, e in zip(off, exact, strict=True))


# kernels


PRODUCTS = {
    "odd": Product(1, 33, 17, 40), "a batch": Product(2, 5, 64, 48, scale=0.5),
    "a row": Product(1, 1, 101, 10, transposed=True),
    "batched": Product(3, 8, 16, 24, batched=True, transposed=True, scale=-2.0, residual=True, activation="hardswish"),
    "small": Product(2, 7, 3, 5, batched=True, residual=True, activation="leaky", slope=0.25),
}


@pytest.mark.parametrize(("name", "constant", "choice"), [
    ("odd", True, "passes"), ("odd", False, "local memory"), ("a batch", False, "processor"),
    ("a batch", True, "graphics"), ("a row", True, "one number"), ("a row", False, "passes"),
    ("batched", False, "graphics"), ("batched", True, "uneven"), ("small", False, "processor"),
    ("small", True, "local memory")])
def test_products(device, halves, name, constant, choice):
    what = replace(PRODUCTS[name], number="float16")
    added_as_halves(multiplied, device, what, *TILES[choice], constant, exact=name != "batched",
                    packed=choice != "graphics")


@pytest.mark.parametrize(("shape", "choice"), [
    ("three channels", "processor"), ("uneven pads", "processor"), ("a batch", "processor"), ("dilated", "one number"),
    ("flat kernel", "passes"), ("groups", "passes"), ("whole image", "passes"), ("wide", "processor"),
    ("three channels", "graphics"), ("groups", "graphics"), ("each its own", "local memory"), ("a batch", "uneven")])
def test_direct_convolutions(device, halves, shape, choice):
    what = replace(SHAPES[shape], number="float16")
    added_as_halves(convolved, device, what, *TILES[choice], exact=what.activation != "silu")


@every
@pytest.mark.parametrize("choice", ["processor", "local memory"])
def test_convolutions_of_one_tap(device, halves, choice):
    what = Convolution(2, 5, 7, 24, 40, residual=True, activation="relu", number="float16")
    added_as_halves(convolved, device, what, *TILES[choice], kind=Matrix)


DEPTHWISE = {
    "3x3": Convolution(1, 7, 9, 24, 24, (3, 3), pads=(1, 1, 1, 1), groups=24),
    "5x5 dilated": Convolution(1, 11, 13, 5, 5, (5, 5), (1, 1), (2, 3), (4, 6, 4, 6), 5, activation="relu6"),
    "multiplier": Convolution(1, 6, 6, 3, 18, (3, 3), pads=(1, 1, 1, 1), groups=3),
    "residual": Convolution(2, 8, 8, 17, 17, (3, 3), (2, 1), pads=(1, 0, 1, 1), groups=17, residual=True),
    "1x31": Convolution(1, 3, 37, 20, 20, (1, 31), pads=(0, 15, 0, 15), groups=20),
}


@pytest.mark.parametrize("traits", [CPU, GPU], ids=["processor", "graphics"])
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise(device, halves, name, traits):
    added_as_halves(convolved, device, replace(DEPTHWISE[name], number="float16"), traits, None)


def attended(device, what, lowered, make, change=lambda x: x):
    """(found, wanted, bound)"""
    q, k, v = (make(what.batch, n, d, seed=i) for i, (n, d) in enumerate(
        ((what.queries, what.depth), (what.keys, what.depth), (what.keys, what.width))))
    found = run(device, change(lowered), {"input": q, "input1": k, "input2": v},
                (what.batch, what.queries, what.width), np.float16)
    return found, *checks.attention(what, q, k, v, halves=True)


ATTENTION = {
    "one of each": Attention(1, 1, 1, 1, 1, 1.0),
    "ragged": Attention(3, 37, 53, 24, 20, 0.2),
    "narrow": Attention(2, 5, 7, 3, 5, 0.5),
    "causal, fewer keys": Attention(1, 64, 21, 8, 8, 0.3, causal=True),
}


@pytest.mark.parametrize(("name", "choice"), [*((name, None) for name in ATTENTION), (
    "ragged", Items(4, 2, 3, True)), ("ragged", Items(2, 2, 1, True))])
def test_attention(device, halves, name, choice):
    what = replace(ATTENTION[name], number="float16")
    traits = replace(NEAR, group_max=8, warp=8)
    right(*attended(device, what, attention.lower(what, traits, choice, halves=True), some))


# the bound finds what it is to find


def rounding_sums(width):
    """A change of kernels: their sums in registers are halves, too."""
    n = "" if width == 1 else width
    helper = f"""float{n} kept(float{n} v) {{
    ushort t[{width}];
    vstore_half{n}(v, 0, (half *)t);
    return vload_half{n}(0, (const half *)t);
}}
"""

    def change(lowered):
        last = lowered.launches[-1]
        source, count = re.subn(r"\b([cso]\d+(?:_\d+)?) \+= ([^;]*(?:HALF_FLOATS|added)[^;]*);", r"\1 = kept(\1 + \2);",
                                last.kernel.source)
        assert count
        source = source.replace("__kernel", helper + "__kernel", 1)
        return replace(lowered, launches=(*lowered.launches[:-1], replace(last, kernel=replace(last.kernel,
                                                                                              source=source))))
    return change


def positive(*shape, seed=0, kind=np.float16):
    return np.random.default_rng([seed, *shape]).uniform(0.5, 1, shape).astype(kind)


LONG = {
    "product": (multiplied, (Product(1, 3, 16384, 16, number="float16"), *TILES["processor"]), 16),
    "product, local memory": (multiplied, (Product(1, 3, 16384, 16, number="float16"), *TILES["local memory"]), 4),
    "convolution": (convolved, (Convolution(1, 9, 9, 200, 20, (9, 9), number="float16"), *TILES["graphics"]), 4),
    "first layer": (convolved, (Convolution(1, 40, 40, 8, 16, (40, 40), number="float16"), *TILES["processor"]), 16),
    "depthwise": (convolved, (Convolution(1, 128, 100, 4, 4, (128, 100), groups=4, number="float16"), GPU, None), 1),
}


@pytest.mark.parametrize("name", LONG)
def test_long_sums_of_halves_alone_are_beyond_the_bound(device, halves, name):
    computed, arguments, width = LONG[name]
    right(*computed(device, *arguments, make=positive))
    found, want, bound = computed(device, *arguments, make=positive, change=rounding_sums(width))
    assert (np.abs(found - want) > bound).all()


def test_long_sums_of_attention_are_floats(device, halves):
    """Of 16384 keys that all count the same."""
    def make(*shape, seed):
        return positive(*shape) if seed == 2 else np.zeros(shape, np.float16)

    what = Attention(1, 2, 16384, 4, 4, 1.0, number="float16")
    lowered = attention.lower(what, replace(NEAR, group_max=8, warp=8), halves=True)
    right(*attended(device, what, lowered, make))
    found, want, bound = attended(device, what, lowered, make, rounding_sums(1))
    assert (np.abs(found - want) > bound).all()


def lost(*shape, seed=0, kind=np.float16):
    """Of products 1 and 63 times 2**-11: halves next to 1 are 2**-10 from each other."""
    found = np.zeros(shape, kind)
    if seed < 2:
        found[...] = 1 if seed == 0 else 2.0**-11
        if seed == 1:
            found[0] = 1
    return found


@pytest.mark.parametrize("choice", ["processor", "local memory"])
def test_no_more_than_four_products_are_added_as_halves(device, halves, choice, monkeypatch):
    traits, tile = TILES[choice]
    if tile.depth:
        tile = Tile(2, 1, 4, 1, (4, 2), 64, halves=True)
    what = Product(1, 2, 64, 16, number="float16")
    right(*multiplied(device, what, traits, tile, make=lost))
    for module in (vectors, tiles):
        monkeypatch.setattr(module, "FOUR", 64)
    found, want, bound = multiplied(device, what, traits, tile, make=lost)
    assert (np.abs(found - want) > bound).all()


def test_it_is_halves_that_are_added(device, halves):
    """Not within what floats are."""
    what = Product(1, 9, 200, 16, number="float16")
    traits, tile = TILES["processor"]
    found, want, _ = multiplied(device, what, traits, tile)
    *_, floats = multiplied(device, what, traits, Tile(3, 1, 16))
    assert (np.abs(found - want) > floats).mean() > 0.1


@every
def test_small_numbers_may_be_lost(device, halves):
    what = Product(1, 9, 200, 16, number="float16")
    found, want, bound = multiplied(device, what, *TILES["processor"], make=tiny)
    right(found, want, bound)
    assert (halves == "towards zero") <= (np.abs(found - want) > 2.0**-14).any()  # a denormal's worth and more


# who may have them


def test_a_device_without_halves_is_named():
    what, layer = Product(1, 2, 3, 4, number="float16"), Convolution(1, 2, 2, 4, 4, number="float16")
    own = Convolution(1, 2, 2, 4, 4, groups=4, number="float16")
    heads = Attention(1, 2, 2, 4, 4, 1.0, number="float16")
    tile, weights = Tile(halves=True), np.zeros((4, 1, 1, 4), np.float16)
    for ask in (lambda: matrices.lower(what, PROCESSOR, None, None, Matrix(tile)),
                lambda: matrices.lower(what, PROCESSOR, None, None, halves=True),
                lambda: convolution.lower(layer, PROCESSOR, weights, None, Direct(tile)),
                lambda: convolution.lower(layer, PROCESSOR, weights, None, halves=True),
                lambda: convolution.lower(own, PROCESSOR, weights[..., :1], None, halves=True),
                lambda: attention.lower(heads, GRAPHICS, halves=True),
                lambda: tiles.candidates(what, PROCESSOR, halves=True)):
        with pytest.raises(UnsupportedError, match=r"a (CPU|GPU) does not compute on halves") as e:
            ask()
        assert e.value.facts == {"want": "the extension cl_khr_fp16",
                                 "try": "without halves: they are stored, floats computed"}


def test_what_has_no_halves_is_said():
    for number in ("float32", "int8"):
        with pytest.raises(UnsupportedError, match="only what is stored as halves is computed as halves") as e:
            matrices.lower(Product(1, 2, 3, 4, number=number), CPU, None, None, halves=True)
        assert e.value.facts == {"got": number, "want": "float16"}
    image = Convolution(1, 8, 8, 4, 4, (3, 3), number="float16")
    with pytest.raises(UnsupportedError, match="Winograd's algorithm computes on floats"):
        convolution.lower(image, CPU, np.zeros((4, 3, 3, 4)), None, Winograd(Tile(halves=True)))
    with pytest.raises(UnsupportedError, match="attention on a CPU computes on floats"):
        attention.lower(Attention(1, 2, 2, 4, 4, 1.0, number="float16"), CPU, halves=True)


# choices


@pytest.mark.parametrize("what", [Product(1, 64, 64, 64, number="float16"), Convolution(
    1, 16, 16, 32, 32, (3, 3), pads=(1, 1, 1, 1), number="float16")], ids=["product", "convolution"])
def test_candidates_on_halves_come_where_they_are_asked_for(what):
    for traits in (CPU, GPU, NEAR):
        plain, asked = tiles.candidates(what, traits), tiles.candidates(what, traits, halves=True)
        assert not any(c.tile.halves for c in plain)
        assert [c for c in asked if not c.tile.halves] == plain
        own = [c for c in asked if c.tile.halves]
        assert own
        assert len(set(asked)) == len(asked)
        assert not any(isinstance(c, Winograd) for c in own)
        assert all(c.tile.local_bytes <= traits.local_bytes or not c.tile.depth for c in own)
        assert tiles.first(what, traits, halves=True) == own[0]
        assert tiles.first(what, traits) == plain[0]
    for traits in (GPU, NEAR):
        assert tiles.candidates(Product(1, 64, 64, 64, number="float16"), traits, halves=True)[0].tile.halves
    weights = np.zeros((32, 3, 3, 32) if isinstance(what, Convolution) else (64, 64), np.float16)
    module = convolution if isinstance(what, Convolution) else matrices
    assert "HALF_FMA" in module.lower(what, CPU, weights, None, halves=True).launches[-1].kernel.source
    assert "HALF_FMA" not in module.lower(what, CPU, weights, None).launches[-1].kernel.source


def test_halves_take_half_the_local_memory():
    tile = Tile(4, 1, 4, 1, (8, 4), 8)
    fixed = 12 * tile.block
    assert msgspec.structs.replace(tile, halves=True).local_bytes - fixed == (tile.local_bytes - fixed) // 2


def test_trials_hold_each_to_its_own_bound(device, halves, monkeypatch):
    """Candidates on halves are tried; one on floats that is off by as much as halves may be is out."""
    t = trials.Trials(device, CPU, Product(1, 9, 200, 16, number="float16"))
    on_halves, on_floats = Matrix(Tile(3, 1, 16, halves=True)), Matrix(Tile(3, 1, 16))
    assert t.answer(trials.Asked(on_halves, on_floats)).why == ""
    real = matrices.lower
    monkeypatch.setattr(matrices, "lower", lambda *a: real(*a[:-1], on_halves))
    t.kept.clear()
    assert "numbers are wrong" in t.answer(trials.Asked(on_floats)).why
    assert t.answer(trials.Asked(on_halves)).why == ""


def test_the_tuner_tries_attention_on_halves(device, halves):
    """Both of each shape, halves first; they are held to their own bound. A CPU's are refused, as its kernels."""
    what, traits = Attention(1, 20, 24, 8, 8, 0.3, number="float16"), replace(NEAR, group_max=16, warp=8)
    ways = choices.candidates(what, traits, True)
    assert [w.halves for w in ways[:4]] == [True, False] * 2
    assert not any(w.halves for w in choices.candidates(what, traits))
    t = trials.Trials(device, traits, what)
    assert t.trial.lower(ways[0]).launches == attention.lower(what, traits, halves=True).launches
    assert t.answer(trials.Asked(ways[0], ways[1])).why == ""
    assert (t.trial.wanted(ways[0])[1] > t.trial.wanted(ways[1])[1]).all()
    with pytest.raises(UnsupportedError, match="attention on a CPU computes on floats"):
        choices.candidates(what, CPU, True)


def test_the_tuner_keeps_choices_on_halves_on_their_own(device, tmp_path, monkeypatch):
    """What it found without is not lost, nor given to who did not ask."""
    what = Product(1, 8, 8, 16, number="float16")
    traits = replace(CPU, name="an emulator")
    found = {False: [Matrix(Tile(2, 1, 4))], True: [Matrix(Tile(2, 1, 4, 4, halves=True))]}
    monkeypatch.setattr(tiles, "candidates", lambda what, traits, halves=False: found[halves])
    monkeypatch.setattr(tuner, "_Child", lambda *a: type("Child", (), {
        "ask": lambda self, asked, end: trials.Answer("", (1e-6,) * 3), "end": lambda self: None})())
    for halves in (True, False):
        assert tuner.tune(device, traits, what, tmp_path, 60, halves=halves) == found[halves][0]
    for halves in (True, False):
        assert tuner.best(tmp_path, device, traits, what, halves) == found[halves][0]
    assert len(list(tmp_path.glob("*.json"))) == 2
