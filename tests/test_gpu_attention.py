"""Depthwise convolution, softmax, layer norm, attention and their like on an OpenCL device, against float64 NumPy.

Bounds: a sum of n products in float32 is within (n + 2) 2**-24 of the sum of their magnitudes, in whatever order
(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: gamma_n).
"""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layers import litert
from npulab.errors import CapacityError, InvariantError, UnsupportedError
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.gpu.compute import (
    activations,
    attention,
    checks,
    depthwise,
    integers,
    normalize,
    softmax,
    vectors,
)
from npulab.gpu.compute.attention_cpu import STEP_MOST, Lanes
from npulab.gpu.compute.attention_gpu import Items
from npulab.gpu.compute.problems import Attention, Convolution, LayerNorm, Softmax
from npulab.gpu.compute.types import Activation, Buffer, Kernel, Launch, Lowered, Traits
from npulab.reference import requantize
from test_gpu_kernels import any_convolution

EPS = 2.0**-24
HALF = 2.0**-11
CPU = Traits("a CPU", cpu=True, compute_units=2, vector=16, registers=512, warp=1, local_bytes=1 << 20, group_max=4096,
             caches=(48 << 10, 1280 << 10))
SMALL_CPU = replace(CPU, vector=4, registers=128)
GPU = Traits("a GPU", cpu=False, compute_units=4, vector=1, registers=64, warp=16, local_bytes=48 << 10, group_max=8)
MALI = replace(GPU, vector=4, warp=8, local_bytes=32 << 10)
TRAITS = {"cpu": CPU, "small cpu": SMALL_CPU, "gpu": GPU, "mali": MALI}
"""Groups of the GPUs are small: PoCL takes seconds to compile larger ones."""


def turns(names, cases, first="cpu"):
    """Each case on one kind of device, in turn: nearly all the time is the compiler's."""
    kinds = ["cpu", "gpu"] if first == "cpu" else ["gpu", "cpu"]
    rows = [(*(case if isinstance(case, tuple) and names.count(",") else (case,)), TRAITS[kinds[i % 2]])
            for i, case in enumerate(cases)]
    return pytest.mark.parametrize((*names.split(", "), "traits"), rows,
                                   ids=[f"{str(r[0])[:20]}-{r[-1].name[2:]}" for r in rows])


@pytest.fixture(params=["cpu", "gpu"])
def traits(request):
    return TRAITS[request.param]


def computed(device, lowered: Lowered, inputs: list, shape, number="float32", out=None):
    """Output is filled with NaN (or -77) before, so that what is not written is seen."""
    dtype = np.dtype(number)
    junk = np.full(shape, np.nan if dtype.kind == "f" else -77, out or dtype)
    buffers = {"output": device.upload(junk)}
    for i, x in enumerate(inputs):
        buffers[f"input{i or ''}"] = device.upload(x)
    buffers |= {k: device.upload(v) for k, v in lowered.constants.items()}
    buffers |= {k: device.allocate(v) for k, v in lowered.scratch.items()}
    for launch in lowered.launches:
        assert all(s % g == 0 for s, g in zip(launch.size, launch.group, strict=True))
    device.run(lowered.launches, buffers)
    return device.download(buffers["output"], shape, out or dtype)


def within(found, want, bound):
    """Everywhere."""
    wrong = ~(np.abs(found.astype(np.float64) - want) <= bound)
    assert not wrong.any(), (int(wrong.sum()), found[wrong][:4], want[wrong][:4])


def numbers(shape, number="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(number)


def stored(want, number):
    """What rounding to the stored number may add."""
    return np.abs(want) * (HALF if number == "float16" else 0) + (2.0**-24 if number == "float16" else 0)


# softmax and layer norm


def softmax_of(x, scale=1.0):
    x = x.astype(np.float64) * scale
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_bound(x, scale=1.0):
    """exp of a rounded argument of size a is a 2**-24 off and 4 units more; so is the sum."""
    x = np.abs(x.astype(np.float64) * scale).max(-1, keepdims=True)
    return (4 * x + 18) * EPS


ROWS = [((1, 1), "float32"), ((5, 3), "float32"), ((3, 17), "float32"), ((33, 197), "float32"), ((9, 31), "float16"),
        ((1, 5000), "float32")]


@turns("shape, number", ROWS)
def test_softmax(device, traits, shape, number):
    x = (numbers(shape) * 5).astype(number)
    want = softmax_of(x, 0.5)
    found = computed(device, softmax.lower(Softmax(*shape, 0.5, number), traits), [x], shape, number)
    within(found, want, want * softmax_bound(x, 0.5) + stored(want, number) + 1e-37)


@turns("row", [[-1e30] * 37, [3e38] + [0] * 36, [-3e38] * 36 + [1], [88.0, -88.0] * 18 + [0], [-np.inf] * 36 + [0]])
def test_softmax_of_extremes(device, traits, row):
    x = np.array([row, row[::-1]], np.float32)
    want = softmax_of(x)
    found = computed(device, softmax.lower(Softmax(2, 37), traits), [x], x.shape)
    within(found, want, want * softmax_bound(np.clip(x, -100, 100)) + 1e-37)


def test_softmax_in_place(device, traits):
    x = numbers((5, 37)) * 3
    buffer = device.upload(x)
    device.run(softmax.lower(Softmax(5, 37), traits).launches, {"input": buffer, "output": buffer})
    found = device.download(buffer, x.shape)
    within(found, softmax_of(x), softmax_of(x) * softmax_bound(x))


@turns("shape, number", ROWS, "gpu")
def test_layer_norm(device, traits, shape, number):
    affine = shape[1] % 3 > 0
    x = (numbers(shape) + 10).astype(number)
    gamma, beta = (numbers(shape[1], seed=1), numbers(shape[1], seed=2)) if affine else (None, None)
    found = computed(device, normalize.lower(LayerNorm(*shape, 1e-5, number), traits, gamma, beta), [x], shape, number)
    x = x.astype(np.float64)
    mean, part = x.mean(-1, keepdims=True), 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    want = (x - mean) * part
    n = shape[1]
    # the mean is off by n roundings of the largest; the rest follows from it
    bound = ((n + 3) * EPS * np.abs(x).max(-1, keepdims=True) * part + (n + 8) * EPS * np.abs(want)) * 2
    if affine:
        want, bound = want * gamma + beta, bound * np.abs(gamma) + 2 * EPS * (np.abs(want * gamma) + np.abs(beta))
    within(found, want, bound + stored(want, number))


def test_layer_norm_far_from_zero(device, traits):
    """The mean of squares less the square of the mean would be nothing but rounding here."""
    x = numbers((3, 77)) + np.float32(10000)
    d = x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True)
    want = d / np.sqrt((d**2).mean(-1, keepdims=True) + 1e-5)
    found = computed(device, normalize.lower(LayerNorm(3, 77), traits), [x], x.shape)
    within(found, want, 80 * EPS * 10000)


@pytest.mark.parametrize("base", ["exponential", "exponential2"])
def test_exponentials(device, base):
    x = np.concatenate([np.linspace(-87, 0, 20001), np.linspace(-1, 0, 2001), -np.logspace(-30, 0, 60), [-0.0]])
    x = np.resize(x.astype(np.float32), -(-x.size // 16) * 16)
    x = np.concatenate([x, np.float32([-np.inf, -128, -1e30, -3e38] * 3), np.full(4, np.nan, np.float32)])
    source = vectors.preamble("float32", 16) + getattr(vectors, base)(16) + f"""
__kernel void f(__global const float *x, __global float *y) {{
    int i = get_global_id(0) * 16;
    STORE({base}(LOAD(x + i)), y + i);
}}"""
    launch = Launch(Kernel(source, "f"), (len(x) // 16,), (1,), (Buffer("input"), Buffer("output")), base)
    found = computed(device, Lowered((launch,)), [x], x.shape)
    assert (found[-16:-4] == 0).all()
    assert np.isnan(found[-4:]).all()
    want = (np.exp if base == "exponential" else np.exp2)(x[:-16].astype(np.float64))
    within(found[:-16], want, 3e-7 * want)


# depthwise


def depthwise_of(what: Convolution, x, w, bias, residual):
    """In float64, and the sum of magnitudes."""
    top, left, bottom, right = what.pads
    x = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    x = np.repeat(x, what.filters // what.channels, axis=3)
    h, wd = what.out
    both = []
    for sign in (lambda v: v.astype(np.float64), lambda v: np.abs(v.astype(np.float64))):
        xs, ws = sign(x), sign(w)
        out = np.zeros((what.batch, h, wd, what.filters))
        for ky, kx in product(range(what.kernel[0]), range(what.kernel[1])):
            y0, x0 = ky * what.dilations[0], kx * what.dilations[1]
            out += xs[:, y0:y0 + (h - 1) * what.strides[0] + 1:what.strides[0],
                     x0:x0 + (wd - 1) * what.strides[1] + 1:what.strides[1]] * ws[:, ky, kx, 0]
        both.append(out)
    want, size = both
    for more in (bias, residual):
        if more is not None:
            want, size = want + more.astype(np.float64), size + np.abs(more.astype(np.float64))
    return want, size


def check_depthwise(device, traits, what: Convolution, biased=True, choice=None):
    x = numbers((what.batch, what.height, what.width, what.channels), what.number)
    w = numbers((what.filters, *what.kernel, 1), what.number, 1)
    bias = numbers(what.filters, seed=2) if biased else None
    shape = (what.batch, *what.out, what.filters)
    residual = numbers(shape, what.number, 3) if what.residual else None
    found = computed(device, depthwise.lower(what, traits, w, bias, choice),
                     [x] + ([residual] if what.residual else []), shape, what.number)
    want, size = depthwise_of(what, x, w, bias, residual)
    if what.activation != "none":
        want = ACTIVATIONS[what.activation](want, what.slope)
    n = what.kernel[0] * what.kernel[1]
    within(found, want, (n + 4) * EPS * size * 1.2 + 1e-6 * np.abs(want) + stored(want, what.number))


DEPTHWISE = {
    "3x3": Convolution(1, 7, 9, 24, 24, (3, 3), pads=(1, 1, 1, 1), groups=24),
    "stride 2": Convolution(2, 9, 8, 17, 17, (3, 3), (2, 2), pads=(0, 0, 1, 1), groups=17, activation="relu6"),
    "5x5 dilated": Convolution(1, 11, 13, 5, 5, (5, 5), (1, 1), (2, 3), (4, 6, 4, 6), 5, activation="hardswish"),
    "1 channel": Convolution(1, 5, 30, 1, 1, (3, 3), pads=(1, 1, 1, 1), groups=1),
    "multiplier": Convolution(1, 6, 6, 3, 18, (3, 3), pads=(1, 1, 1, 1), groups=3),
    "multiplier 2": Convolution(1, 6, 7, 33, 66, (2, 3), (2, 1), pads=(0, 1, 1, 1), groups=33, activation="silu"),
    "residual": Convolution(1, 8, 8, 40, 40, (3, 3), pads=(1, 1, 1, 1), groups=40, residual=True, activation="relu"),
    "1x31": Convolution(1, 3, 37, 20, 20, (1, 31), pads=(0, 15, 0, 15), groups=20),
    "no pads": Convolution(1, 4, 21, 16, 16, (4, 2), (1, 2), groups=16, activation="gelu"),
    "half": Convolution(1, 9, 9, 19, 19, (3, 3), pads=(1, 1, 1, 1), groups=19, residual=True, activation="leaky",
                        number="float16"),
}


@turns("name", DEPTHWISE)
def test_depthwise(device, traits, name):
    check_depthwise(device, traits, DEPTHWISE[name])


@pytest.mark.parametrize("name", ["small cpu", "mali"])
def test_vectors_of_four(device, name):
    check_depthwise(device, TRAITS[name], DEPTHWISE["stride 2"])
    x = numbers((5, 37))
    found = computed(device, softmax.lower(Softmax(5, 37), TRAITS[name]), [x], x.shape)
    within(found, softmax_of(x), softmax_of(x) * softmax_bound(x))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), st.integers(1, 4), st.integers(1, 4),
       st.integers(1, 3), st.integers(0, 2), st.sampled_from(sorted(TRAITS)))
def test_depthwise_of_any_size(device, height, width, channels, kh, kw, stride, pad, traits):
    if height + 2 * pad < kh or width + 2 * pad < kw:
        return
    check_depthwise(device, TRAITS[traits], Convolution(1, height, width, channels, channels, (kh, kw), (stride, 1),
                                                        pads=(pad,) * 4, groups=channels))


def test_depthwise_as_chosen(device):
    check_depthwise(device, CPU, DEPTHWISE["3x3"], biased=False, choice={"pixels": 3, "width": 8})


def test_only_depthwise_is_depthwise():
    with pytest.raises(InvariantError, match="not depthwise"):
        depthwise.lower(Convolution(1, 4, 4, 4, 4, (3, 3), groups=2), CPU, np.zeros((4, 3, 3, 2), np.float32))


def test_kernels_of_floats_refuse_others(traits):
    with pytest.raises(UnsupportedError, match="no kernel for int8"):
        softmax.lower(Softmax(2, 2, number="int8"), traits)


# activations


def erf(x):
    from math import erf
    return np.vectorize(erf, otypes=[float])(x)


def erfc(x):
    from math import erfc
    return np.vectorize(erfc, otypes=[float])(x)


ACTIVATIONS = {
    "none": lambda x, s: x, "relu": lambda x, s: np.maximum(x, 0), "relu6": lambda x, s: np.clip(x, 0, 6),
    "silu": lambda x, s: x / (1 + np.exp(-x)), "sigmoid": lambda x, s: 1 / (1 + np.exp(-x)),
    "hardswish": lambda x, s: x * np.clip(x + 3, 0, 6) / 6, "hardsigmoid": lambda x, s: np.clip(x / 6 + 0.5, 0, 1),
    "tanh": lambda x, s: np.tanh(x), "gelu": lambda x, s: x * erfc(-x / np.sqrt(2)) / 2,
    "leaky": lambda x, s: np.where(x < 0, s * x, x),
}


def test_every_activation_is_tested():
    from typing import get_args
    assert set(ACTIVATIONS) == set(get_args(Activation))


@pytest.mark.parametrize("width", [16, 1])
def test_activations(device, width):
    x = np.concatenate([np.linspace(-13, 13, 4001), np.linspace(-90, 90, 3871), np.logspace(-30, 0, 60),
                        -np.logspace(-30, 0, 60), [0.0, -0.0, 1e4, -1e4, 1e30, -1e30, 3, -3, 6, 3.0000002, -3.0000002]])
    x = np.resize(x.astype(np.float32), -(-x.size // 16) * 16)
    found = activated(device, x, width)
    for y, kind in zip(found, ACTIVATIONS, strict=True):
        with np.errstate(over="ignore"):
            want = ACTIVATIONS[kind](x.astype(np.float64), 0.2)
        within(y, want, 1e-6 * np.abs(want) + 1e-36)  # where exp() is infinite or a denormal, nothing


def activated(device, x, width):
    """[kind, element]: by one kernel, as every kernel takes a third of a second to compile."""
    stores = "\n".join(f"    STORE({activations.activation(kind, 'v', width, 0.2)}, y + {i * x.size} + i);"
                       for i, kind in enumerate(ACTIVATIONS))
    source = vectors.preamble("float32", width) + activations.helpers("gelu", width) + f"""
__kernel void f(__global const float *x, __global float *y) {{
    int i = get_global_id(0) * {width};
    V v = LOAD(x + i);
{stores}
}}"""
    launch = Launch(Kernel(source, "f"), (x.size // width,), (1,), (Buffer("input"), Buffer("output")), "activations")
    return computed(device, Lowered((launch,)), [x], (len(ACTIVATIONS), x.size))


def test_activations_of_nan(device):
    """It stays, where the result depends on it: a network that has gone wrong says so. Of hardsigmoid OpenCL leaves it
    open."""
    found = activated(device, np.array([np.nan, *range(15)], np.float32), 16)
    assert np.isnan(found[[k != "hardsigmoid" for k in ACTIVATIONS], 0]).all()
    assert not np.isnan(found[:, 1:]).any()


def test_an_unknown_activation_is_named():
    with pytest.raises(InvariantError, match="there is no activation 'swoosh'"):
        activations.activation("swoosh", "x", 1)


# attention


def check_attention(device, what: Attention, lowered: Lowered, spread=1.0, extra=0.0):
    q, k, v = (numbers((what.batch, n, d), what.number, i) for i, (n, d) in enumerate(
        ((what.queries, what.depth), (what.keys, what.depth), (what.keys, what.width))))
    q = (q * spread).astype(what.number)
    shape = (what.batch, what.queries, what.width)
    found = computed(device, lowered, [q, k, v], shape, what.number)
    want, bound = checks.attention(what, q, k, v)
    within(found, want, bound + extra)


ATTENTION = {
    "one of each": Attention(1, 1, 1, 1, 1, 1.0),
    "ragged": Attention(3, 37, 53, 24, 20, 0.2),
    "narrow": Attention(2, 5, 7, 3, 5, 0.5),
    "two queries": Attention(2, 2, 9, 5, 6, 0.4),
    "odd heads": Attention(1, 33, 100, 33, 17, 0.17),
    "causal": Attention(2, 45, 45, 16, 16, 0.25, causal=True),
    "causal, more keys": Attention(1, 21, 64, 8, 8, 0.3, causal=True),
    "causal, fewer keys": Attention(1, 64, 21, 8, 8, 0.3, causal=True),
    "half": Attention(2, 35, 43, 16, 20, 0.25, number="float16"),
}


@pytest.mark.parametrize(("name", "kind"), [
    *((n, "cpu") for n in ("one of each", "two queries", "odd heads", "causal", "causal, more keys", "half")),
    *((n, "gpu") for n in ("ragged", "causal, fewer keys", "half"))])
def test_attention(device, name, kind):
    check_attention(device, ATTENTION[name], attention.lower(ATTENTION[name], TRAITS[kind]))


@pytest.mark.parametrize("choice", [Lanes(1, 16), Lanes(3, 20)])
def test_attention_as_chosen(device, choice):
    check_attention(device, ATTENTION["ragged"], attention.lower(ATTENTION["ragged"], CPU, choice))


def test_attention_with_few_registers(device):
    """Of 16 vector registers 12 are sums: half as many vectors of queries."""
    few = replace(CPU, vector=8, registers=128)
    lowered = attention.lower(ATTENTION["odd heads"], few)
    assert lowered.launches[0].size == (3 * STEP_MOST, 1)  # 33 queries: two tiles of 2 vectors of 8, and one
    check_attention(device, ATTENTION["odd heads"], lowered)


@pytest.mark.parametrize(("batch", "queries", "groups"), [
    (1, 64, 32), (2, 4096, 1024), (64, 1024, 1024), (8, 16384, 2048)])
def test_cores_get_few_tiles_at_once(batch, queries, groups):
    """PoCL deals out 64 of at most 1024 groups at once to one of 2 cores: those of some tiles are empty."""
    size = attention.lower(Attention(batch, queries, 64, 16, 16, 0.25), CPU).launches[0].size
    assert size[0] * size[1] == groups
    assert size[0] % (queries // 64) == 0


def test_attention_without_the_compilers_shuffles(device):
    """A transposition is the same with vectors that are written out lane by lane."""
    lowered = attention.lower(ATTENTION["ragged"], CPU)
    launch, = lowered.launches
    source = launch.kernel.source.replace("__has_builtin(__builtin_shufflevector)", "0")
    assert source != launch.kernel.source
    kernel = replace(launch.kernel, source=source)
    check_attention(device, ATTENTION["ragged"], replace(lowered, launches=(replace(launch, kernel=kernel),)))


@pytest.mark.parametrize("choice", [(2, 2, 3)])
def test_attention_as_chosen_on_a_gpu(device, choice):
    check_attention(device, ATTENTION["ragged"], attention.lower(ATTENTION["ragged"], GPU, Items(*choice)))


@turns("name", ["ragged", "ragged", "half", "narrow"])
def test_attention_unfused(device, traits, name):
    what = ATTENTION[name]
    # as halves, scores of up to s are stored a 2**-11 off, and so are their exponentials
    half = what.number == "float16"
    traits = replace(traits, group_max=16)  # tiles of more than one work item
    check_attention(device, what, attention.unfused(what, traits), extra=4 * HALF * 8 if half else 0.0)


def test_attention_with_large_scores(device, traits):
    """exp() of them is infinite or nothing."""
    check_attention(device, ATTENTION["ragged"], attention.lower(ATTENTION["ragged"], traits), spread=3000)


@turns("score", [-1e30, 0.0, 1e30])
def test_attention_with_equal_scores(device, traits, score):
    """The mean of the values."""
    what = Attention(1, 19, 23, 1, 5, 1.0)
    q, k, v = np.full((1, 19, 1), score, np.float32), np.ones((1, 23, 1), np.float32), numbers((1, 23, 5))
    found = computed(device, attention.lower(what, traits), [q, k, v], (1, 19, 5))
    within(found, np.broadcast_to(v.astype(np.float64).mean(1, keepdims=True), found.shape), 60 * EPS)


@turns("step", [0.7, -0.7, 20.0, -0.3])
def test_attention_with_growing_scores(device, traits, step):
    """Each key is better than all before: what was summed is scaled down at every tile. Or worse: it fades away, past
    the smallest float."""
    what = Attention(1, 17, 600, 1, 3, 1.0)
    q, v = np.ones((1, 17, 1), np.float32), numbers((1, 600, 3))
    k = np.arange(600, dtype=np.float32).reshape(1, 600, 1) * step
    found = computed(device, attention.lower(what, traits), [q, k, v], (1, 17, 3))
    want, bound = checks.attention(what, q, k, v)
    within(found, want, bound)


def test_scores_of_one_query_grow(device):
    """Of one in a vector, once, in the third tile: the others' stay as they are; below the first tile's or above."""
    what = Attention(1, 70, 200, 2, 5, 1.0)
    q, k, v = numbers((1, 70, 2)), numbers((1, 200, 2), seed=1), numbers((1, 200, 5), seed=2)
    q[..., 1], k[..., 1] = 0, 0
    q[0, 21, 1], k[0, 150, 1] = 1, 90
    found = computed(device, attention.lower(what, CPU, Lanes(4, 48)), [q, k, v], (1, 70, 5))
    want, bound = checks.attention(what, q, k, v)
    within(found, want, bound)
    assert np.allclose(want[0, 21], v[0, 150])


@pytest.mark.parametrize("width", [16, 4])
def test_powers_of_2(device, width):
    """Within 3e-7 between 2**-126 and 2**127; nothing below, or a denormal; NaN stays."""
    x = np.concatenate([np.linspace(-126, 127, 40000, dtype=np.float32), np.float32([-0.0, -1e-30, 1e-30, -1e-8, 64]),
                        np.arange(-126, 127, dtype=np.float32)])
    edges = np.float32([-np.inf, -3e38, -1e5, -150, -127.5, -126.4, 128, 1e5, 3e38, np.inf, np.nan])
    x = np.concatenate([x, edges, np.zeros(-(x.size + edges.size) % 16, np.float32)])
    source = vectors.preamble("float32", width) + vectors.exponential2(width) + f"""
__kernel void f(__global const float *x, __global float *y) {{
    int i = get_global_id(0) * {width};
    STORE(exponential2(LOAD(x + i)), y + i);
}}"""
    launch = Launch(Kernel(source, "f"), (x.size // width,), (1,), (Buffer("input"), Buffer("output")), "powers")
    found = computed(device, Lowered((launch,)), [x], x.shape).astype(np.float64)
    inside = (x >= -126) & (x <= 127)
    want = 2.0**x[inside].astype(np.float64)
    assert (np.abs(found[inside] - want) <= 3e-7 * want).all()
    assert ((found[x < -126] >= 0) & (found[x < -126] <= 2.0**-126)).all()
    assert (found[x < -127] == 0).all()
    assert (found[x > 127] >= 2.0**126).all()
    assert np.isnan(found[np.isnan(x)]).all()


def test_attention_of_nan(device):
    """It is not hidden by maxima that leave it out."""
    q, k, v = numbers((1, 20, 4)), numbers((1, 30, 4), seed=1), numbers((1, 30, 4), seed=2)
    k[0, 7, 2] = np.nan
    found = computed(device, attention.lower(Attention(1, 20, 30, 4, 4, 0.5), CPU), [q, k, v], (1, 20, 4))
    assert np.isnan(found).all()


def test_a_network_is_the_same_unfused(device):
    """As it is exported: K is transposed by a node, the scale is a product."""
    onnx = pytest.importorskip("onnx")
    from npulab.gpu.compute.network import compile_network
    from npulab.importers import load
    helper, shapes = onnx.helper, {"q": [2, 37, 24], "k": [2, 53, 24], "v": [2, 53, 20], "o": [2, 37, 20]}
    info = [helper.make_tensor_value_info(n, 1, s) for n, s in shapes.items()]
    nodes = [helper.make_node("Transpose", ["k"], ["t"], perm=[0, 2, 1]), helper.make_node("MatMul", ["q", "t"], ["s"]),
             helper.make_node("Mul", ["s", "c"], ["m"]), helper.make_node("Softmax", ["m"], ["p"], axis=-1),
             helper.make_node("MatMul", ["p", "v"], ["o"])]
    graph = helper.make_graph(nodes, "g", info[:3], info[3:], [onnx.numpy_helper.from_array(np.float32(0.2), "c")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    feeds = {n: numbers(shapes[n], seed=i) for i, n in enumerate("qkv")}
    want, bound = checks.attention(Attention(2, 37, 53, 24, 20, 0.2), *feeds.values())
    for fuse in (True, False):
        plan = compile_network(load(model), CPU, fuse_attention=fuse)
        assert (len(plan.steps) == 1) == fuse
        within(plan.open(device).run(feeds)["o"], want, bound)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20),
       st.booleans(), st.sampled_from(sorted(TRAITS)))
def test_attention_of_any_size(device, batch, queries, keys, depth, width, causal, traits):
    what = Attention(batch, queries, keys, depth, width, depth**-0.5, causal)
    check_attention(device, what, attention.lower(what, TRAITS[traits]))


def test_attention_without_room():
    with pytest.raises(CapacityError, match="no room in local memory"):
        attention.lower(Attention(1, 8, 8, 4096, 4096, 1.0), replace(GPU, local_bytes=1024))
    with pytest.raises(CapacityError, match="no room on a thread's stack"):
        attention.lower(Attention(1, 64, 64, 20000, 20000, 1.0), CPU)  # ended the process before it was refused


def test_the_chain_has_keys_that_no_stack_holds(device):
    """256 bytes of 64 keys for each of a head's numbers, 10 MiB, ended the process. The scale may be NumPy's."""
    what = Attention(1, 7, 64, 40960, 3, np.float64(40960) ** -0.5)
    q, k, v = numbers((1, 7, 40960)), numbers((1, 64, 40960), seed=1), numbers((1, 64, 3), seed=2)
    lowered = attention.unfused(what, CPU)
    assert "bt[" not in lowered.launches[0].kernel.source
    within(computed(device, lowered, [q, k, v], (1, 7, 3)), *checks.attention(what, q, k, v))


def test_the_chain_has_no_mask():
    with pytest.raises(UnsupportedError, match="no mask"):
        attention.unfused(ATTENTION["causal"], CPU)


# integers


def integers_of(what: Convolution, x, w, bias, zero_in, multipliers, shifts, zero_out, low, high):
    """Sums in int64, wrapped to 32 bits; npulab's reference rounds them."""
    top, left, bottom, right = what.pads
    x = np.pad(x.astype(np.int64) - zero_in, ((0, 0), (top, bottom), (left, right), (0, 0)))
    h, wd = what.out
    sums = np.zeros((what.batch, h, wd, what.filters), np.int64) + (0 if bias is None else bias)
    for ky, kx in product(*map(range, what.kernel)):
        y0, x0 = ky * what.dilations[0], kx * what.dilations[1]
        part = x[:, y0:y0 + (h - 1) * what.strides[0] + 1:what.strides[0],
                 x0:x0 + (wd - 1) * what.strides[1] + 1:what.strides[1]]
        part = part.reshape(*part.shape[:3], what.groups, -1)
        taps = w[:, ky, kx].reshape(what.groups, -1, part.shape[4]).astype(np.int64)
        sums += np.einsum("bhwgi,gfi->bhwgf", part, taps).reshape(sums.shape)
    sums = requantize.multiply(requantize.wrapped(sums), np.array(multipliers), np.array(shifts))
    return np.clip(sums + zero_out, low, high).astype(np.int8)


INTEGERS = {
    "1x1": Convolution(2, 5, 7, 19, 33, number="int8"),
    "3x3": Convolution(1, 7, 9, 5, 20, (3, 3), pads=(1, 1, 1, 1), number="int8"),
    "strided, dilated": Convolution(1, 13, 14, 3, 9, (3, 2), (2, 3), (2, 1), (1, 0, 2, 1), number="int8"),
    "depthwise": Convolution(1, 8, 9, 37, 37, (3, 3), (2, 2), pads=(0, 0, 1, 1), groups=37, number="int8"),
    "multiplier": Convolution(1, 6, 6, 5, 20, (3, 3), pads=(1, 1, 1, 1), groups=5, number="int8"),
}

GROUPS = {
    "groups of fours": Convolution(2, 5, 6, 16, 24, (3, 3), pads=(1, 0, 1, 1), groups=2, number="int8"),
    "odd groups": Convolution(1, 6, 7, 9, 6, (2, 3), (2, 1), pads=(1, 1, 0, 1), groups=3, number="int8"),
    "groups, no pads": Convolution(1, 6, 7, 10, 15, (2, 3), groups=5, number="int8"),
    "groups, 1x1": Convolution(1, 5, 9, 66, 44, groups=2, number="int8"),
    "groups, dilated": Convolution(2, 9, 8, 12, 76, (3, 3), (1, 2), (2, 3), (2, 3, 2, 3), 4, number="int8"),
    "groups of one filter": Convolution(1, 6, 7, 10, 5, (3, 3), pads=(1, 1, 1, 1), groups=5, number="int8"),
}


def check_integers(device, traits, what: Convolution, seed=0, shifts=None, big=False, low=-128, high=127, few=False):
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (what.batch, what.height, what.width, what.channels)).astype(np.int8)
    w = rng.integers(-127, 128, (what.filters, *what.kernel, what.channels // what.groups)).astype(np.int8)
    bias = rng.integers(-2**31 if big else -9999, 2**31 if big else 9999, what.filters)
    m = rng.integers(2**30, 2**31, what.filters)
    shifts = shifts if shifts is not None else rng.integers(-9, -4, what.filters)
    zero_in, zero_out = int(rng.integers(-128, 128)), int(rng.integers(-40, 40))
    lowered = integers.convolution(what, traits, w, bias, zero_in, m, shifts, zero_out, low, high)
    shape = (what.batch, *what.out, what.filters)
    found = computed(device, lowered, [x], shape, "int8")
    want = integers_of(what, x, w, bias, zero_in, m, shifts, zero_out, low, high)
    assert big or few or len(np.unique(want)) > 20
    assert (found == want).all()


@turns("name", INTEGERS)
def test_integers_are_the_reference_byte_for_byte(device, traits, name):
    check_integers(device, traits, INTEGERS[name])


def test_integers_are_clamped(device, traits):
    check_integers(device, traits, INTEGERS["3x3"], low=-10, high=30)


@pytest.mark.parametrize("seed", range(2))
def test_sums_of_all_sizes_are_rounded_right(device, traits, seed):
    """Every shift there is, sums of up to 32 bits that wrap."""
    what = Convolution(1, 1, 40, 1, 62, number="int8")
    check_integers(device, traits, what, seed, np.arange(-31, 31), big=True)


def test_ties_are_rounded_as_twice(device, traits):
    """Sums of -20..20 halved, quartered...: every tie of both roundings."""
    x = np.arange(-20, 21, dtype=np.int8).reshape(1, 1, 41, 1)
    what = Convolution(1, 1, 41, 1, 8, number="int8")
    m, shifts, w = [2**30] * 4 + [3 * 2**29] * 4, [0, -1, -2, -3] * 2, np.ones((8, 1, 1, 1), np.int8)
    found = computed(device, integers.convolution(what, traits, w, None, 0, m, shifts, 0), [x], (1, 1, 41, 8), "int8")
    assert (found == integers_of(what, x, w, None, 0, m, shifts, 0, -128, 127)).all()


def test_integer_products(device, traits):
    rng = np.random.default_rng(5)
    x, w = rng.integers(-128, 128, (2, 7, 37)).astype(np.int8), rng.integers(-127, 128, (21, 37)).astype(np.int8)
    m, shifts = [2**30 + 12345] * 21, [-7] * 21
    found = computed(device, integers.product(2, 7, 37, 21, traits, w, None, 3, m, shifts, -1), [x], (2, 7, 21), "int8")
    sums = (x.astype(np.int64) - 3) @ w.T.astype(np.int64)
    assert (found == np.clip(requantize.multiply(sums, np.array(m), np.array(shifts)) - 1, -128, 127)).all()


@turns("name", GROUPS)
def test_integers_in_groups(device, traits, name):
    check_integers(device, traits, GROUPS[name], 3)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_integers(device, data):
    what = any_convolution(data, residual=False, number="int8")
    kind, seed = data.draw(st.sampled_from(sorted(TRAITS))), data.draw(st.integers(0, 99))
    check_integers(device, TRAITS[kind], what, seed, few=True)


@pytest.mark.parametrize("name", ["small cpu", "mali"])
def test_integers_of_other_vectors(device, name):
    check_integers(device, TRAITS[name], INTEGERS["3x3"])
    check_integers(device, TRAITS[name], GROUPS["odd groups"], 3)


NO_BYTES = [
    ({"zero_in": 128}, "zero_in is no byte"), ({"zero_out": -129}, "zero_out is no byte"),
    ({"zero_in": 0.5}, "zero_in is no byte"), ({"low": -129}, "low is no byte"), ({"high": 200}, "high is no byte"),
    ({"low": 5, "high": 4}, "low is above high"), ({"weights": np.full((4, 4), 200)}, "the weights are no bytes"),
    ({"weights": np.full((4, 4), 3 * 10**9)}, "the weights are no bytes"),
    ({"weights": np.full((4, 4), 0.5)}, "the weights are no bytes"),
    ({"weights": np.ones((4, 3))}, "the weights are of another shape"),
    ({"bias": np.ones(3, int)}, "the bias is of another shape"),
    ({"bias": np.full(4, 0.5)}, "the biases are no whole"), ({"bias": np.full(4, 1 << 31)}, "the biases are no"),
    ({"multipliers": [1 << 30] * 3}, "multipliers are one for each"), ({"shifts": [0]}, "shifts are one for each"),
    ({"multipliers": [1 << 31] * 4}, "multipliers are no whole"), ({"shifts": [0.5] * 4}, "shifts are no whole"),
    ({"multipliers": [-1] * 4}, "multipliers are no whole numbers"), ({"shifts": [-32] * 4}, "shifts are no whole"),
]
"""Of a product of 4 by 4, and what is said of it: numbers that would be cut to others."""
BYTES = {"weights": np.ones((4, 4)), "bias": None, "zero_in": 0, "multipliers": [1 << 30] * 4, "shifts": [0] * 4,
         "zero_out": 0, "low": -128, "high": 127}


@pytest.mark.parametrize(("changed", "message"), NO_BYTES)
def test_what_is_no_byte_is_not_cut_to_one(changed, message):
    with pytest.raises(InvariantError, match=message):
        integers.product(1, 2, 4, 4, CPU, **BYTES | changed)


def test_integers_have_no_residual_and_no_activation():
    what = Convolution(1, 1, 1, 4, 4, number="int8")
    for more in ({"residual": True}, {"activation": "relu"}, {"number": "float32"}):
        with pytest.raises(UnsupportedError, match="integer kernels add no residual"):
            integers.convolution(replace(what, **more), CPU, **BYTES | {"weights": np.ones((4, 1, 1, 4))})


def litert_of(what: Convolution):
    """What LiteRT's reference kernels compute, with scales of each channel: (what with LiteRT's pads, the arguments of
    integers.convolution but for the traits, x, y)."""
    rng = np.random.default_rng(7)
    if any(what.pads) and what.kernel != (3, 3):
        what = replace(what, pads=(0, 0, 0, 0))  # TFLite pads less often
    depth = what.groups == what.channels > 1
    x = rng.integers(-128, 128, (1, what.height, what.width, what.channels)).astype(np.int8)
    w = rng.integers(-127, 128, (what.filters, *what.kernel, what.channels // what.groups)).astype(np.int8)
    bias = rng.integers(-999, 999, what.filters).astype(np.int32)
    scale_in, scale_out, zero_in, zero_out = np.float32(0.05), np.float32(0.8), -11, 5
    scales = rng.uniform(0.002, 0.02, what.filters).astype(np.float32)
    model = ModelBuilder("integers")
    a = model.tensor("x", x.shape, "int8", scale=float(scale_in), zero_point=zero_in)
    kernel = w.transpose(3, 1, 2, 0) if depth else w
    b = model.tensor("w", kernel.shape, "int8", scales=[float(s) for s in scales], axis=3 if depth else 0, data=kernel)
    c = model.tensor("b", bias.shape, "int32", scales=[float(scale_in) * float(s) for s in scales], data=bias)
    d = model.tensor("y", (1, *what.out, what.filters), "int8", scale=float(scale_out), zero_point=zero_out)
    model.op("DEPTHWISE_CONV_2D" if depth else "CONV_2D", [a, b, c], [d], padding="SAME" if any(what.pads) else "VALID",
             stride_h=what.strides[0], stride_w=what.strides[1], dilation_h_factor=what.dilations[0],
             dilation_w_factor=what.dilations[1], fused_activation_function="NONE",
             **({"depth_multiplier": what.filters // what.channels} if depth else {}))
    want = litert(model.build([a], [d]), {"x": x})["y"]
    if any(what.pads):
        from npulab.reference.accumulate import same_pads
        top, left, bottom, right = same_pads((what.height, what.width), what.kernel, what.strides, what.dilations)
        what = replace(what, pads=(top, left, bottom, right))
    factors = [requantize.quantized_multiplier(float(scale_in) * float(s) / float(scale_out)) for s in scales]
    return what, (w, bias, zero_in, *zip(*factors, strict=True), zero_out), x, want


@turns("name", [*INTEGERS, *GROUPS], "gpu")
def test_integers_are_litert_byte_for_byte(device, traits, name):
    pytest.importorskip("ai_edge_litert")
    what, (w, *rest), x, want = litert_of(replace((INTEGERS | GROUPS)[name], batch=1))
    found = computed(device, integers.convolution(what, traits, w, *rest), [x], want.shape, "int8")
    assert len(np.unique(want)) > 20
    assert (found == want).all()
