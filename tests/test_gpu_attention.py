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

from npulab.errors import CapacityError, InvariantError, UnsupportedError
from npulab.gpu import opencl
from npulab.gpu.compute import activations, attention, depthwise, normalize, softmax, vectors
from npulab.gpu.compute.problems import Attention, Convolution, LayerNorm, Softmax
from npulab.gpu.compute.types import Activation, Buffer, Kernel, Launch, Lowered, Traits

EPS = 2.0**-24
HALF = 2.0**-11
CPU = Traits("a CPU", cpu=True, compute_units=2, vector=16, registers=512, warp=1, local_bytes=1 << 20, group_max=4096,
             caches=(48 << 10, 1280 << 10))
SMALL_CPU = replace(CPU, vector=4, registers=128)
GPU = Traits("a GPU", cpu=False, compute_units=4, vector=1, registers=64, warp=32, local_bytes=48 << 10, group_max=256)
MALI = replace(GPU, vector=4, warp=8, local_bytes=32 << 10)
TRAITS = {"cpu": CPU, "small cpu": SMALL_CPU, "gpu": GPU, "mali": MALI}


@pytest.fixture(scope="module")
def device():
    pytest.importorskip("pyopencl", reason="needs OpenCL: pip install 'npulab[gpu]'")
    if not opencl.devices():
        pytest.skip("needs an OpenCL device: apt install pocl-opencl-icd")
    from npulab.gpu.compute.device import Device
    return Device(0)


@pytest.fixture(params=TRAITS)
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


@pytest.mark.parametrize("number", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 16), (3, 17), (9, 31), (33, 197), (2, 1000), (1, 5000)])
def test_softmax(device, traits, shape, number):
    x = (numbers(shape) * 5).astype(number)
    want = softmax_of(x, 0.5)
    found = computed(device, softmax.lower(Softmax(*shape, 0.5, number), traits), [x], shape, number)
    within(found, want, want * softmax_bound(x, 0.5) + stored(want, number) + 1e-37)


@pytest.mark.parametrize("row", [[-1e30] * 37, [3e38] + [0] * 36, [-3e38] * 36 + [1], [88.0, -88.0] * 18 + [0],
                                 [-np.inf] * 36 + [0]])
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


@pytest.mark.parametrize("number", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 16), (3, 17), (33, 197), (1, 5000)])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(device, traits, shape, number, affine):
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


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise(device, traits, name):
    check_depthwise(device, traits, DEPTHWISE[name])


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


@pytest.mark.parametrize("width", [1, 4, 16])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(device, kind, width):
    x = np.concatenate([np.linspace(-13, 13, 4001), np.linspace(-90, 90, 3871), np.logspace(-30, 0, 60),
                        -np.logspace(-30, 0, 60), [0.0, 1e30, -1e30, 3, -3, 6, 3.0000002, -3.0000002]])
    x = np.ascontiguousarray(x[:len(x) // 16 * 16].astype(np.float32))
    source = vectors.preamble("float32", width) + activations.helpers(kind, width) + f"""
__kernel void f(__global const float *x, __global float *y) {{
    int i = get_global_id(0) * {width};
    V v = LOAD(x + i);
    STORE({activations.activation(kind, "v", width, 0.2)}, y + i);
}}"""
    launch = Launch(Kernel(source, "f"), (len(x) // width,), (1,), (Buffer("input"), Buffer("output")), kind)
    found = computed(device, Lowered((launch,)), [x], x.shape)
    with np.errstate(over="ignore"):
        want = ACTIVATIONS[kind](x.astype(np.float64), 0.2)
    hard = 1e-7 * np.abs(x) * (kind == "hardswish") + 1e-7 * (kind == "hardsigmoid")  # near -3: what x + 3 is off by
    within(found, want, 1e-6 * np.abs(want) + hard + 1e-36)  # where exp() is infinite or a denormal, nothing


# attention


def attention_of(what: Attention, q, k, v):
    """In float64, and what each output is off by at most when computed in float32."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores, size = q @ k.swapaxes(1, 2) * what.scale, np.abs(q) @ np.abs(k).swapaxes(1, 2) * abs(what.scale)
    if what.causal:
        scores = np.where(np.arange(what.keys) > np.arange(what.queries)[:, None], -np.inf, scores)
    part = softmax_of(scores)
    # a score is off by so much, twice (it and the largest); exp is off by 5 units, the sum by one a key
    off = 2 * (what.depth + 3) * EPS * size.max(-1, keepdims=True) * 2 + (2 * what.keys + 20) * EPS
    return part @ v, (part @ np.abs(v)) * off


def check_attention(device, what: Attention, lowered: Lowered, spread=1.0, extra=0.0):
    q, k, v = (numbers((what.batch, n, d), what.number, i) for i, (n, d) in enumerate(
        ((what.queries, what.depth), (what.keys, what.depth), (what.keys, what.width))))
    q = (q * spread).astype(what.number)
    shape = (what.batch, what.queries, what.width)
    found = computed(device, lowered, [q, k, v], shape, what.number)
    want, bound = attention_of(what, q, k, v)
    within(found, want, bound + stored(want, what.number) + extra)


ATTENTION = {
    "one of each": Attention(1, 1, 1, 1, 1, 1.0),
    "ragged": Attention(3, 37, 53, 24, 20, 0.2),
    "narrow": Attention(2, 5, 7, 3, 5, 0.5),
    "odd heads": Attention(1, 33, 100, 33, 17, 0.17),
    "long": Attention(1, 18, 331, 16, 16, 0.25),
    "wide": Attention(1, 40, 20, 8, 70, 0.3),
    "causal": Attention(2, 45, 45, 16, 16, 0.25, causal=True),
    "causal, more keys": Attention(1, 21, 64, 8, 8, 0.3, causal=True),
    "causal, fewer keys": Attention(1, 64, 21, 8, 8, 0.3, causal=True),
    "half": Attention(2, 35, 43, 16, 20, 0.25, number="float16"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(device, traits, name):
    what = ATTENTION[name]
    check_attention(device, what, attention.lower(what, traits))


@pytest.mark.parametrize("choice", [{"vectors": 1, "keys": 16}, {"vectors": 3, "keys": 500}, {"vectors": 4, "keys": 7}])
def test_attention_as_chosen(device, choice):
    check_attention(device, ATTENTION["ragged"], attention.lower(ATTENTION["ragged"], CPU, choice))


@pytest.mark.parametrize("choice", [(16, 16, 4), (8, 4, 2), (1, 1, 1), (2, 8, 3)])
def test_attention_as_chosen_on_a_gpu(device, choice):
    choice = dict(zip(("across", "down", "each"), choice, strict=True))
    check_attention(device, ATTENTION["ragged"], attention.lower(ATTENTION["ragged"], GPU, choice))


@pytest.mark.parametrize("name", [n for n, a in ATTENTION.items() if not a.causal])
def test_attention_unfused(device, traits, name):
    what = ATTENTION[name]
    # as halves, scores of up to s are stored a 2**-11 off, and so are their exponentials
    half = what.number == "float16"
    check_attention(device, what, attention.unfused(what, traits), extra=4 * HALF * 8 if half else 0.0)


def test_attention_with_large_scores(device, traits):
    """exp() of them is infinite or nothing."""
    check_attention(device, ATTENTION["ragged"], attention.lower(ATTENTION["ragged"], traits), spread=3000)


@pytest.mark.parametrize("score", [-1e30, 0.0, 1e30])
def test_attention_with_equal_scores(device, traits, score):
    """The mean of the values."""
    what = Attention(1, 19, 23, 1, 5, 1.0)
    q, k, v = np.full((1, 19, 1), score, np.float32), np.ones((1, 23, 1), np.float32), numbers((1, 23, 5))
    found = computed(device, attention.lower(what, traits), [q, k, v], (1, 19, 5))
    within(found, np.broadcast_to(v.astype(np.float64).mean(1, keepdims=True), found.shape), 60 * EPS)


def test_attention_with_growing_scores(device, traits):
    """Each key is better than all before: what was summed is scaled down at every tile."""
    what = Attention(1, 17, 300, 1, 3, 1.0)
    q, v = np.ones((1, 17, 1), np.float32), numbers((1, 300, 3))
    k = np.arange(300, dtype=np.float32).reshape(1, 300, 1) * 0.7
    found = computed(device, attention.lower(what, traits), [q, k, v], (1, 17, 3))
    want, bound = attention_of(what, q, k, v)
    within(found, want, bound)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20),
       st.booleans(), st.sampled_from(sorted(TRAITS)))
def test_attention_of_any_size(device, batch, queries, keys, depth, width, causal, traits):
    what = Attention(batch, queries, keys, depth, width, depth**-0.5, causal)
    check_attention(device, what, attention.lower(what, TRAITS[traits]))


def test_attention_without_room():
    with pytest.raises(CapacityError, match="no room in local memory"):
        attention.lower(Attention(1, 8, 8, 4096, 4096, 1.0), replace(GPU, local_bytes=1024))


def test_the_chain_has_no_mask():
    with pytest.raises(UnsupportedError, match="no mask"):
        attention.unfused(ATTENTION["causal"], CPU)
