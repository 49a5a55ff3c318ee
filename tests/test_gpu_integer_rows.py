"""int8 softmax and layer normalization on an OpenCL device: byte for byte LiteRT's softmax; of layer normalization the
exact quotient rounded once, wherever the floats on the way cannot reach a tie."""

from dataclasses import replace
from fractions import Fraction
from math import isqrt

import numpy as np
import pytest

from layers import litert
from npulab.errors import InvariantError, UnsupportedError
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.gpu.compute import integer_rows
from npulab.gpu.compute.integer_rows import COLUMNS
from npulab.gpu.compute.problems import LayerNorm, Softmax
from npulab.gpu.compute.types import Buffer, Kernel, Launch, Lowered
from npulab.reference import softmax as reference
from npulab.reference.types import Stored
from test_gpu_attention import CPU, TRAITS, computed, traits, turns

__all__ = ["traits"]
SHAPES = [(1, 1), (5, 3), (3, 17), (33, 64), (3, 1000), (2, 4097)]
U = 2.0**-24


def drawn(shape, seed=0, low=-128, high=127):
    return np.random.default_rng([seed, *shape]).integers(low, high + 1, shape).astype(np.int8)


def rows_of(columns):
    """Random, all equal, all extreme, each extreme alone, one largest among smallest numbers, the other way round."""
    r = np.random.default_rng(columns)
    rows = [r.integers(-128, 128, columns), np.full(columns, 5), np.where(r.random(columns) < 0.5, -128, 127),
            np.full(columns, -128), np.full(columns, 127), np.full(columns, -128), np.full(columns, 127)]
    rows[5][columns // 2], rows[6][columns // 3] = 127, -128
    return np.array(rows, np.int8)


# softmax


def softmax_of(x, scale, beta=1.0):
    return reference.softmax(Stored(scale, 0, np.dtype(np.int8)), Stored(1 / 256, -128, np.dtype(np.int8)), beta)(x)


def litert_of(x, scale, beta):
    """LiteRT ends the process where a row's exponentials add up to 512, or nearly."""
    assert np.exp((x.astype(float) - x.max(-1, keepdims=True)) * scale * beta).sum(-1).max() < 511
    model = ModelBuilder("softmax")
    a = model.tensor("x", x.shape, "int8", scale=scale, zero_point=-7)
    b = model.tensor("y", x.shape, "int8", scale=1 / 256, zero_point=-128)
    model.op("SOFTMAX", [a], [b], version=2, beta=beta)
    return litert(model.build([a], [b]), {"x": x})["y"]


def float32(value):
    return float(np.float32(value))


def peaked(shape):
    """(x, scale, beta): few numbers are large, so that their shares are."""
    r = np.random.default_rng(shape)
    for beta in (0.5, 1.0, 3.0):
        yield np.floor(256 * r.random(shape) ** 8 - 128).astype(np.int8), float32(r.uniform(0.1, 0.2)), beta


def many_sums():
    """All differences, and 0 to 439 more numbers at some distance from the largest."""
    x = np.full((600, 700), -128, np.int8)
    for i, row in enumerate(x):
        row[:256] = np.arange(-128, 128)
        row[256:256 + i % 440] = 127 - i % 90
    return x


def softmax(device, traits, x, scale, beta=1.0):
    what = Softmax(*x.shape, beta, "int8")
    return computed(device, integer_rows.softmax(what, traits, scale), [x], x.shape, "int8")


@pytest.mark.parametrize("name", TRAITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_is_litert_byte_for_byte(device, name, shape):
    pytest.importorskip("ai_edge_litert")
    seen = set()
    for x, scale, beta in peaked(shape):
        want = litert_of(x, scale, beta)
        np.testing.assert_array_equal(softmax(device, TRAITS[name], x, scale, beta), want)
        seen |= set(want.flat)
    assert len(seen) >= min(8, shape[1])


@pytest.mark.parametrize("columns", [c for _, c in SHAPES])
def test_extreme_rows_are_litert_byte_for_byte(device, traits, columns):
    """All those that LiteRT ends with."""
    pytest.importorskip("ai_edge_litert")
    x = rows_of(columns)
    if columns > 500:
        x = x[[0, 5]]
    scale = float32(0.07)
    np.testing.assert_array_equal(softmax(device, traits, x, scale), litert_of(x, scale, 1.0))


@pytest.mark.parametrize("columns", [511, 512, 513, 4097, 8192, 70000])
@pytest.mark.parametrize("scale", [2e-8, 1e-3, 0.07, 3.0, 1e30])
def test_softmax_is_the_reference_byte_for_byte(device, traits, columns, scale):
    """Sums of 512 and more among them, and such as 32 bits do not hold."""
    x = rows_of(columns)
    want = softmax_of(x, scale)
    assert (want[1] == (-127 if columns < 512 else -128)).all()
    np.testing.assert_array_equal(softmax(device, traits, x, scale), want)


def test_every_difference_and_many_sums(device, traits):
    x = many_sums()
    for scale in (0.02, 0.11):
        np.testing.assert_array_equal(softmax(device, traits, x, scale), softmax_of(x, scale))


def sums_and_exponentials():
    """(sums, their reciprocals, exponentials, codes) of the reference: sums of all sizes and at their borders;
    exponentials whose codes are about to change, where each rounding tells."""
    r = np.random.default_rng(0)
    borders = [(1 << bit) + d for bit in range(19, 29) for d in (-1, 0, 1)][1:-1]
    sums = np.repeat([*borders, *np.exp2(r.uniform(19, 28, 4000)).astype(np.int64)], 8)
    zeros = 32 - np.frexp(sums.astype(float))[1].astype(np.int64)
    factors = reference.one_over_one_plus((sums << zeros) - (1 << 31))
    ties = (np.exp2(66.0 - zeros) * (r.integers(0, 256, len(sums)) + 0.5) / factors).astype(np.int64)
    e = np.clip(ties + r.integers(-1, 2, len(sums)), 0, 2**31 - 1)
    codes = reference.divide_by_power(reference.high_mul(factors, e), 35 - zeros)
    return sums, factors, e, np.clip(codes - 128, -128, 127).astype(np.int8)


def test_reciprocals_and_shares(device):
    sums, factors, e, codes = sums_and_exponentials()
    kernel = Kernel(integer_rows.SHARES + """
__kernel void f(__global const uint *sums, __global const uint *e, __global int *output) {
    int i = get_global_id(0), zeros = clz(sums[i]);
    uint factor = reciprocal(sums[i], zeros);
    output[2 * i] = factor;
    output[2 * i + 1] = share(e[i], factor, 66 - zeros);
}""", "f")
    launch = Launch(kernel, (len(e),), (1,), (Buffer("input"), Buffer("input1"), Buffer("output")), "shares")
    found = computed(device, Lowered((launch,)), [sums.astype(np.uint32), e.astype(np.uint32)], (len(e), 2), "int32")
    np.testing.assert_array_equal(found[:, 0], factors)
    np.testing.assert_array_equal(found[:, 1], codes)


@pytest.mark.parametrize("changed", [{"scale_in": 0.0}, {"scale_in": -1.0}, {"scale_in": np.nan}, {"scale_in": np.inf},
                                     {"beta": np.nan}, {"beta": -1.0}, {"beta": 1e39}])
def test_what_is_no_scale_of_a_softmax(changed):
    given = {"scale_in": 1.0, "beta": 1.0} | changed
    with pytest.raises(InvariantError, match=f"{next(iter(changed))} is no scale"):
        integer_rows.softmax(Softmax(2, 3, given["beta"], "int8"), CPU, given["scale_in"])


def test_a_scale_that_tflite_does_not_hold():
    with pytest.raises(UnsupportedError, match="too small for its fixed point"):
        integer_rows.softmax(Softmax(2, 3, number="int8"), CPU, 1e-9)


# layer normalization


def moments(row, scale, epsilon):
    """(d, 1 / sqrt(V + ...)) of the row's numbers, the root cut off at 2**-120."""
    n, q = len(row), row.astype(np.int64)
    total = int(q.sum())
    below = n * int((q * q).sum()) - total**2 + Fraction(epsilon) * (n / Fraction(scale)) ** 2
    return n * q - total, Fraction(isqrt((below.denominator << 240) // below.numerator), 1 << 120) if below else 0


def bounds_of(x, arguments, gamma, beta, epsilon, at, off):
    """(the least and the largest code that each output may have): they differ where floats may reach a tie. off: what
    both terms are off, of themselves."""
    (scale_in, scale_out, zero_out), found = arguments, []
    for row in x:
        d, root = moments(row, scale_in, epsilon)
        for distance, g, b in zip(d[at], gamma[at], beta[at], strict=True):
            first = int(distance) * root * Fraction(float(g)) / Fraction(scale_out)
            second = Fraction(float(b)) / Fraction(scale_out)
            bound = (off[0] * abs(first) + off[1] * abs(second)) * Fraction(U)
            found.append([round(first + second + sign * bound) + zero_out for sign in (-1, 1)])
    return np.clip(np.array(found).reshape(len(x), -1, 2), -128, 127)


def normalized(device, traits, x, arguments, gamma=None, beta=None, epsilon=1e-5):
    lowered = integer_rows.layer_norm(LayerNorm(*x.shape, epsilon, "int8"), traits, *arguments, gamma, beta)
    return computed(device, lowered, [x], x.shape, "int8")


def check_normal(run, x, arguments, affine=True, epsilon=1e-5, at=slice(None), off=(10, 2)):
    columns = x.shape[1]
    both = np.random.default_rng(3).standard_normal((2, columns)) if affine else (np.ones(columns), np.zeros(columns))
    found = run(x, arguments, *(both if affine else (None, None)), epsilon)[:, at]
    limits = bounds_of(x, arguments, *both, epsilon, at, off)
    assert ((limits[..., 0] <= found) & (found <= limits[..., 1])).all()
    told = limits[..., 0] == limits[..., 1]
    assert told.mean() > 0.99  # else nearly anything would do
    return found


@pytest.mark.parametrize("name", TRAITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_is_rounded_once(device, name, shape):
    def run(*given):
        return normalized(device, TRAITS[name], *given)

    found = check_normal(run, drawn(shape), (0.037, 0.021, -9))
    assert len(np.unique(found)) >= min(found.size, 60) / 2
    check_normal(run, drawn(shape, 1), (0.0004, 0.4 / 127, 127), affine=False)  # as much epsilon as variance
    check_normal(run, drawn(shape, 2, 100, 103), (30.0, 0.02, 0))  # far from zero


def means_of_all_sizes(columns=1000):
    r = np.random.default_rng(8)
    return np.array([r.integers(low, 128, columns) for low in range(-128, 127, 15)], np.int8)


def test_moments_of_all_sizes(device, traits):
    """V is what two numbers of more than 32 bits differ by."""
    check_normal(lambda *given: normalized(device, traits, *given), means_of_all_sizes(), (0.05, 0.05, 3))


@pytest.mark.parametrize("columns", [1, 3, 17, 64, 1000])
@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-5, 0.3])
def test_layer_norm_of_extremes(device, traits, columns, epsilon):
    found = check_normal(lambda *given: normalized(device, traits, *given), rows_of(columns), (0.05, 0.05, 3),
                         epsilon=epsilon)
    assert (found[1] == found[3]).all()  # of equal numbers only beta is left
    assert (found[3] == found[4]).all()


def test_equal_numbers_are_beta(device, traits):
    beta = np.arange(-20, 21) / 8  # in steps of 1/4: ties go to even
    found = normalized(device, traits, np.full((2, 41), 77, np.int8), (0.1, 0.25, 1), np.ones(41), beta, 0.0)
    assert (found == np.rint(beta / 0.25) + 1).all()


def test_as_many_columns_as_there_may_be(device, traits):
    """Sums of squares of 31 bits, differences beyond 2**24."""
    for rows in (np.full(COLUMNS, -128), np.where(np.arange(COLUMNS) % 3, -128, 127)):
        rows[0] = 127
        check_normal(lambda *given: normalized(device, traits, *given), rows[None].astype(np.int8), (0.05, 0.05, 0),
                     at=slice(0, 400))


def test_large_factors_are_clamped(device, traits):
    gamma, beta = np.array([3e38, -3e38, 1.0]), np.array([3e38, 0.0, -3e38])
    found = normalized(device, traits, np.array([[3, 1, 0]], np.int8), (1.0, 1.0, 100), gamma, beta)
    assert found.tolist() == [[127, 127, -128]]


@pytest.mark.parametrize("layer", ["softmax", "layer_norm"])
@turns("shape", [(5, 37), (3, 300)])
def test_in_place(device, traits, layer, shape):
    x = drawn(shape)
    arguments = (0.05,) if layer == "softmax" else (0.05, 0.05, 0)
    what = (Softmax if layer == "softmax" else LayerNorm)(*shape, number="int8")
    lowered = getattr(integer_rows, layer)(what, traits, *arguments)
    buffer = device.upload(x)
    constants = {role: device.upload(array) for role, array in lowered.constants.items()}
    device.run(lowered.launches, {"input": buffer, "output": buffer} | constants)
    np.testing.assert_array_equal(device.download(buffer, shape, np.dtype(np.int8)),
                                  computed(device, lowered, [x], shape, "int8"))


def quantized_by_onnx_runtime(x, scale_in, zero_in, scale_out, zero_out, gamma, beta, epsilon):
    """DequantizeLinear, LayerNormalization, QuantizeLinear."""
    runtime, helper = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx").helper
    proto, tensors = pytest.importorskip("onnx").TensorProto, pytest.importorskip("onnx").numpy_helper
    constants = {"si": np.float32(scale_in), "zi": np.int8(zero_in), "so": np.float32(scale_out),
                 "zo": np.int8(zero_out), "gamma": gamma.astype(np.float32), "beta": beta.astype(np.float32)}
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["x", "si", "zi"], ["f"]),
         helper.make_node("LayerNormalization", ["f", "gamma", "beta"], ["n"], axis=-1, epsilon=epsilon),
         helper.make_node("QuantizeLinear", ["n", "so", "zo"], ["y"])], "norm",
        *([helper.make_tensor_value_info(name, proto.INT8, x.shape)] for name in "xy"),
        [tensors.from_array(np.asarray(v), k) for k, v in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


@pytest.mark.parametrize("zero_in", [-128, 5])
@pytest.mark.parametrize("columns", [17, 64, 197])
def test_layer_norm_is_onnx_runtimes_but_beside_ties(device, traits, columns, zero_in):
    """The same byte wherever ONNX Runtime's float32 sums, whichever way they are added, cannot have reached a tie."""
    x, r = drawn((40, columns)), np.random.default_rng(columns)
    gamma, beta = r.standard_normal((2, columns)).astype(np.float32)
    scale_in, scale_out, zero_out = float32(0.04), float32(0.03), 11
    other = quantized_by_onnx_runtime(x, scale_in, zero_in, scale_out, zero_out, gamma, beta, 1e-5)
    found = normalized(device, traits, x, (scale_in, scale_out, zero_out), gamma, beta)
    numbers = (x.astype(float) - zero_in) * scale_in
    mean, variance = numbers.mean(1, keepdims=True), numbers.var(1, keepdims=True) + 1e-5
    normal = (numbers - mean) / np.sqrt(variance)
    # mean and mean square of columns terms, each rounded before; the variance is what is left of both
    mean_off = (columns + 2) * U * np.abs(numbers).mean(1, keepdims=True)
    variance_off = (columns + 4) * U * (numbers**2).mean(1, keepdims=True) + 2 * np.abs(mean) * mean_off + U * mean**2
    off = (mean_off + U * np.abs(numbers)) / np.sqrt(variance) + np.abs(normal) * (variance_off / variance / 2 + 8 * U)
    exact = (normal * gamma + beta) / scale_out
    allowed = 1.01 * (off * np.abs(gamma) + 4 * U * (np.abs(normal * gamma) + np.abs(beta))) / scale_out
    told = np.rint(exact - allowed) == np.rint(exact + allowed)
    assert told.mean() > 0.97
    assert (np.abs(found.astype(int) - other) <= ~told).all()


NO_NORMS = [
    ({"scale_in": 0.0}, "scale_in is no scale"), ({"scale_out": np.inf}, "scale_out is no scale"),
    ({"scale_out": np.nan}, "scale_out is no scale"), ({"zero_out": 128}, "the zero points are no bytes"),
    ({"zero_out": 0.5}, "the zero points are no bytes"), ({"epsilon": -1e-5}, "epsilon .* is no number from 0"),
    ({"epsilon": np.nan}, "epsilon .* is no number from 0"), ({"scale_in": 1e-30}, "epsilon .* is no number from 0"),
    ({"scale_in": 1e-200}, "epsilon .* is no number from 0"),
    ({"gamma": np.ones(4), "scale_out": 1e-309}, "gamma / scale_out has a number that float32 has not"),
    ({"gamma": np.ones(3)}, "gamma is of another shape"), ({"beta": np.ones((1, 4))}, "beta is of another shape"),
    ({"gamma": np.array([1, np.nan, 1, 1])}, "gamma / scale_out has a number that float32 has not"),
    ({"beta": np.full(4, 1e38), "scale_out": 1e-3}, "beta / scale_out has a number that float32 has not"),
]
"""Of two rows of 4, and what is said of it."""
NORM = {"scale_in": 0.1, "scale_out": 0.1, "zero_out": 0, "gamma": None, "beta": None}


@pytest.mark.parametrize(("changed", "message"), NO_NORMS)
def test_what_layer_norm_refuses(changed, message):
    changed = dict(changed)
    with pytest.raises(InvariantError, match=message):
        integer_rows.layer_norm(LayerNorm(2, 4, changed.pop("epsilon", 1e-5), "int8"), CPU, **NORM | changed)


def test_rows_that_integers_have_not():
    for what, arguments in ((Softmax(2, 4, number="int8"), (0.1,)), (LayerNorm(2, 4, number="int8"), (0.1, 0.1, 0))):
        make = integer_rows.softmax if isinstance(what, Softmax) else integer_rows.layer_norm
        for number in ("float32", "float16"):
            with pytest.raises(UnsupportedError, match="kernels of integer rows read int8"):
                make(replace(what, number=number), CPU, *arguments)
        for size in ({"rows": 0}, {"columns": 0}, {"rows": 1 << 31}, {"rows": 1.5}):
            with pytest.raises(InvariantError, match="rows and columns are no whole numbers in their range"):
                make(replace(what, **size), CPU, *arguments)
    with pytest.raises(UnsupportedError, match="squares in 31 bits"):
        integer_rows.layer_norm(LayerNorm(1, COLUMNS + 1, number="int8"), CPU, 0.1, 0.1, 0)
