"""Networks that run without ONNX Runtime give what it gives: within what sums in single precision may differ by, moves
and integers to the last bit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from npulab.errors import UnsupportedError
from npulab.importers.onnx_parts import thin
from npulab.quantization import light, light_operators
from npulab.quantization.light import opened

ort = pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
floats = light_operators.loops
if floats is None:
    pytest.skip("npulab._floats was not built", allow_module_level=True)

UNIT = 2.0**-24
"""Half the distance of neighbouring float32 numbers around 1."""
F = TensorProto.FLOAT


def model(nodes, inputs, constants=(), outputs=("y",), opset=17):
    """`inputs` and `constants`: arrays by name; of the first only shapes and types."""
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
                     for k, v in inputs.items()],
        [onnx.ValueInfoProto(name=o) for o in outputs], [numpy_helper.from_array(v, k) for k, v in
                                                         dict(constants).items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10).SerializeToString()


def both(data, inputs, names):
    """What the two give."""
    ready = opened(thin(data), names)
    assert ready is not None, "left to ONNX Runtime"
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return ready(inputs), session.run(list(names), dict(inputs))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def within(x, w, b, attributes, want, got, depth):
    """Both within the bound of a sum of `depth` products, by the sum of their magnitudes."""
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)
    data = model([node], {"x": x}, {"w": np.abs(w), "b": np.abs(b)})
    (most,) = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": np.abs(x)})
    assert got.shape == want.shape
    assert (np.abs(got - want) <= 2 * (depth + 2) * UNIT * most).all()


SHAPES = [
    # channels, size, filters, kernel, groups, strides, pads, dilations
    (3, (13, 17), 7, (3, 3), 1, [2, 2], [0, 0, 1, 1], [1, 1]),
    (16, (9, 9), 24, (1, 1), 1, [1, 1], [0, 0, 0, 0], [1, 1]),
    (16, (9, 10), 5, (1, 1), 1, [2, 3], [0, 0, 0, 0], [1, 1]),
    (4, (11, 8), 9, (5, 2), 1, [1, 2], [3, 1, 2, 4], [1, 1]),
    (6, (12, 12), 12, (3, 3), 2, [1, 1], [2, 2, 2, 2], [2, 2]),
    (8, (14, 15), 8, (3, 3), 8, [1, 1], [1, 1, 1, 1], [1, 1]),
    (8, (15, 14), 8, (5, 5), 8, [2, 2], [1, 1, 2, 2], [1, 1]),
    (5, (16, 9), 10, (3, 4), 5, [3, 2], [0, 2, 1, 0], [2, 1]),
    (5, (7, 7), 5, (3, 3), 5, [1, 1], [4, 4, 4, 4], [3, 3]),
    (5, (16, 16), 5, (2, 2), 5, [3, 3], [1, 1, 0, 0], [2, 2]),
    (4, (1, 1), 4, (3, 3), 4, [1, 1], [1, 1, 1, 1], [1, 1]),
    (1, (6, 6), 3, (3, 3), 1, [1, 1], [0, 0, 0, 0], [1, 1]),
    (6, (19,), 8, (3,), 1, [2], [1, 0], [2]),
    (6, (19,), 6, (4,), 6, [1], [3, 0], [1]),
    (700, (5, 7), 35, (1, 1), 1, [1, 1], [0, 0, 0, 0], [1, 1]),
]


@pytest.mark.parametrize("most", [4, 8, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_convolutions_are_the_runtimes(shape, most):
    channels, size, filters, kernel, group, strides, pads, dilations = shape
    x, b = random(2, channels, *size), random(filters, seed=1)
    w = random(filters, channels // group, *kernel, seed=2)
    attributes = {"group": group, "strides": strides, "pads": pads, "dilations": dilations}
    data = model([helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)], {"x": x}, {"w": w, "b": b})
    floats.level(most)
    try:
        (got,), (want,) = both(data, {"x": x}, ["y"])
    finally:
        floats.level(16)
    within(x, w, b, attributes, want, got, w[0].size)


def test_widths_of_vectors_and_places_of_weights_change_no_bit():
    """Where products are fused with sums: AVX2 and AVX-512."""
    if floats.level(16) < 8:
        pytest.skip("this processor has one width")
    found = []
    for width in {8, floats.level(16)}:
        floats.level(width)
        for shift in (0, 1):  # weights lie in files at any address
            got = []
            for channels, size, filters, kernel, group, strides, pads, dilations in SHAPES[:12]:
                x, w = random(2, channels, *size), random(filters, channels // group, *kernel, seed=2)
                raw = bytes(shift) + w.tobytes()
                moved = np.frombuffer(memoryview(raw)[shift:], np.float32).reshape(w.shape)
                ends = [(n + pads[i] + pads[i + 2] - d * (k - 1) - 1) // s + 1
                        for i, (n, d, k, s) in enumerate(zip(size, dilations, kernel, strides, strict=True))]
                y = np.empty((2, filters, *ends), np.float32)
                floats.conv(x, moved, None, y, (2, channels, *size, filters, *kernel, *ends, *strides, *dilations,
                                                *pads[:2], group), -1.0, 1.5)
                got.append(y.tobytes())
            for m in (1, 3, 9):
                a, b = random(m, 77), random(50, 77)
                y = np.empty((m, 50), np.float32)
                floats.matmul(a, b, None, y, m, 77, 50, True, -np.inf, np.inf)
                got.append(y.tobytes())
            x = random(1001)
            got += [floats.extremes(x), floats.extremes(x[:63])]
            found.append(got)
    floats.level(16)
    assert all(f == found[0] for f in found)


def test_sizes_that_are_none_are_refused():
    x, w, y = random(1, 4, 5, 5), random(8, 4, 3, 3), np.empty((1, 8, 3, 3), np.float32)
    right = (1, 4, 5, 5, 8, 3, 3, 3, 3, 1, 1, 1, 1, 0, 0, 1)
    floats.conv(x, w, None, y, right, -1.0, 1.0)
    for i in range(9):
        for wrong in (right[i] + 1, 0, -1, 2**31 - 1):
            with pytest.raises(ValueError, match="size that the shapes say"):
                floats.conv(x, w, None, y, (*right[:i], wrong, *right[i + 1:]), -1.0, 1.0)
    for i in (9, 10, 11, 12, 15):
        with pytest.raises(ValueError, match="size that the shapes say"):
            floats.conv(x, w, None, y, (*right[:i], 0, *right[i + 1:]), -1.0, 1.0)
    with pytest.raises(ValueError, match="size that the shapes say"):
        floats.conv(x, w, y, y, right, -1.0, 1.0)
    with pytest.raises(ValueError, match="size that the shapes say"):
        floats.matmul(x, w, None, y, 4, 5, 6, False, -1.0, 1.0)
    with pytest.raises(ValueError, match="size that the shapes say"):
        floats.dequantize(np.zeros(3, np.int8), y, 0, 1.0, 0)


def test_extremes_pass_nan_on_only_in_the_sum():
    x = random(1000)
    low, high, total = floats.extremes(x)
    assert (low, high) == (x.min(), x.max())
    assert abs(total - x.sum(dtype=np.float64)) <= 1000 * UNIT * np.abs(x).sum()
    x[777] = np.nan
    assert np.isnan(floats.extremes(x)[2])
    x[777] = np.inf
    assert floats.extremes(x)[1:] == (np.inf, np.inf)


N = helper.make_node
X, P = random(2, 6, 8, 9), np.abs(random(2, 6, 8, 9)) + np.float32(0.1)
V, I64 = random(6, 1, 1, seed=3), np.int64
TWO = np.array([2, -1], I64)
CASES = {  # nodes, inputs, constants, opset, whether to the last bit
    "add": ([N("Add", ["x", "c"], ["y"])], X, {"c": V}, 17, True),
    "sub": ([N("Sub", ["c", "x"], ["y"])], X, {"c": V}, 17, True),
    "mul": ([N("Mul", ["x", "x"], ["y"])], X, {}, 17, True),
    "div": ([N("Div", ["c", "x"], ["y"])], P, {"c": V}, 17, True),
    "relu": ([N("Relu", ["x"], ["y"])], X, {}, 17, True),
    "clip": ([N("Clip", ["x", "", "c"], ["y"])], X, {"c": np.float32(0.5)}, 17, True),
    "clip of old": ([N("Clip", ["x"], ["y"], min=-0.5, max=0.25)], X, {}, 9, True),
    "leaky": ([N("LeakyRelu", ["x"], ["y"], alpha=0.125)], X, {}, 17, True),
    "sigmoid": ([N("Sigmoid", ["x"], ["y"])], 9 * X, {}, 17, False),
    "hard sigmoid": ([N("HardSigmoid", ["x"], ["y"])], 4 * X, {}, 17, False),
    "hard swish": ([N("HardSwish", ["x"], ["y"])], 4 * X, {}, 17, False),
    "tanh": ([N("Tanh", ["x"], ["y"])], X, {}, 17, False),
    "softmax": ([N("Softmax", ["x"], ["y"], axis=1)], 5 * X, {}, 17, False),
    "softmax of old": ([N("Softmax", ["x"], ["y"], axis=2)], 5 * X, {}, 11, False),
    "global average": ([N("GlobalAveragePool", ["x"], ["y"])], X, {}, 17, False),
    "average": ([N("AveragePool", ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1])], X, {}, 17,
                False),
    "average counting": ([N("AveragePool", ["x"], ["y"], kernel_shape=[2, 3], pads=[1, 1, 0, 2],
                            count_include_pad=1)], X, {}, 17, False),
    "largest": ([N("MaxPool", ["x"], ["y"], kernel_shape=[3, 2], strides=[2, 3], pads=[1, 1, 2, 1],
                   dilations=[2, 1])], X, {}, 17, True),
    "mean": ([N("ReduceMean", ["x"], ["y"], axes=[-1, 1], keepdims=0)], X, {}, 17, False),
    "mean of new": ([N("ReduceMean", ["x", "c"], ["y"])], X, {"c": TWO}, 18, False),
    "sum": ([N("ReduceSum", ["x", "c"], ["y"], keepdims=0)], X, {"c": TWO}, 17, False),
    "min": ([N("ReduceMin", ["x"], ["y"], axes=[0])], X, {}, 17, True),
    "max": ([N("ReduceMax", ["x", "c"], ["y"], keepdims=0)], X, {"c": TWO}, 18, True),
    "reshape": ([N("Reshape", ["x", "c"], ["y"])], X, {"c": np.array([0, -1, 4], I64)}, 17, True),
    "flatten": ([N("Flatten", ["x"], ["y"], axis=2)], X, {}, 17, True),
    "transpose": ([N("Transpose", ["x"], ["y"], perm=[0, 3, 1, 2])], X, {}, 17, True),
    "squeeze": ([N("Unsqueeze", ["x", "c"], ["u"]), N("Squeeze", ["u"], ["y"])], X, {"c": TWO}, 17, True),
    "unsqueeze of old": ([N("Unsqueeze", ["x"], ["y"], axes=[0, 3])], X, {}, 11, True),
    "concat": ([N("Concat", ["x", "x"], ["y"], axis=-2)], X, {}, 17, True),
    "pad": ([N("Pad", ["x", "c", "v"], ["y"])], X, {"c": np.array([0, 1, 2, 0, 1, 0, 0, 3], I64),
                                                    "v": np.float32(-1.5)}, 17, True),
    "gather": ([N("Gather", ["x", "c"], ["y"], axis=2)], X, {"c": np.array([[7, 0], [-1, 3]], I64)}, 17, True),
    "slice": ([N("Slice", ["x", "a", "b", "c", "d"], ["y"])], X, {
        "a": np.array([1, -2], I64), "b": np.array([2**62, -(2**62)], I64), "c": TWO, "d": np.array([3, -2], I64)}, 17,
        True),
    "split": ([N("Split", ["x", "c"], ["a", "b"], axis=1), N("Sub", ["a", "b"], ["y"])], X, {
        "c": np.array([3, 3], I64)}, 17, True),
    "matmul": ([N("MatMul", ["x", "c"], ["y"])], X, {"c": random(9, 21)}, 17, False),
    "matmul of many": ([N("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]), N("MatMul", ["x", "t"], ["y"])], X, {}, 17,
                       False),
    "matmul of a vector": ([N("MatMul", ["x", "c"], ["y"])], X, {"c": random(9)}, 17, False),
    "gemm": ([N("Flatten", ["x"], ["f"], axis=1), N("Gemm", ["f", "w", "b"], ["y"], transB=1)], X, {
        "w": random(50, 432), "b": random(50)}, 17, False),
    "gemm on its side": ([N("Flatten", ["x"], ["f"], axis=3), N("Gemm", ["f", "w", "b"], ["g"], transA=1),
                          N("Relu", ["g"], ["y"])], X, {"w": random(96, 40), "b": random(9, 1)}, 17, False),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_are_the_runtimes(name):
    nodes, x, constants, opset, exact = CASES[name]
    x = x.copy()
    came = x.copy()
    (got,), (want,) = both(model(nodes, {"x": x}, constants, opset=opset), {"x": x}, ["y"])

    assert got.dtype == want.dtype
    assert got.shape == want.shape
    np.testing.assert_array_equal(x, came)
    if exact:
        np.testing.assert_array_equal(got, want)
    else:  # what sums of so many numbers near 1 may be apart, and a few units more for exponentials
        np.testing.assert_allclose(got, want, rtol=16 * UNIT, atol=1000 * UNIT * max(1.0, np.abs(want).max() / 100))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("zero", [0, 3])
def test_integers_are_the_runtimes_to_the_last_bit(dtype, zero):
    """Ties, what is beyond the ends, -0, infinities and NaN are among the numbers."""
    scale = np.float32(0.0371)
    x = np.concatenate([random(4000) * 6, np.arange(-300, 300, dtype=np.float32) * scale / 2,
                        np.array([0.0, -0.0, np.inf, -np.inf, 1e30, -1e30, -1e-9], np.float32)]).astype(np.float32)
    nodes = [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "s", "z"], ["y"])]
    data = model(nodes, {"x": x}, {"s": scale, "z": np.array(zero, dtype)}, outputs=("q", "y"), opset=21)
    got, want = both(data, {"x": x}, ["q", "y"])
    for a, b in zip(got, want, strict=True):
        assert a.tobytes() == b.tobytes()
    alone = opened(thin(data), ["y"])
    assert len(alone.steps) == 1
    assert alone({"x": x})[0].tobytes() == want[1].tobytes()


@pytest.mark.parametrize(("dtype", "axis"), [("int8", 0), ("uint8", 1), ("int32", 0), ("int32", 2), ("int16", 1)])
def test_weights_of_channels_are_the_runtimes_to_the_last_bit(dtype, axis):
    info = np.iinfo(dtype)
    codes = np.random.default_rng(0).integers(info.min, info.max, (4, 5, 6), endpoint=True).astype(dtype)
    n = codes.shape[axis]
    zeros = np.zeros(n, dtype) if dtype == "int32" else np.arange(n).astype(dtype)
    constants = {"s": np.abs(random(n)), "z": zeros}
    x = random(4, 5, 6)
    nodes = [N("DequantizeLinear", ["c", "s", "z"], ["w"], axis=axis), N("Add", ["x", "w"], ["y"])]
    (got,), (want,) = both(model(nodes, {"x": x}, {"c": codes, **constants}, opset=21), {"x": x}, ["y"])
    np.testing.assert_array_equal(got, want)
    if dtype != "int32":
        nodes = [N("QuantizeLinear", ["x", "s", "z"], ["y"], axis=axis)]
        (got,), (want,) = both(model(nodes, {"x": 9 * x}, constants, opset=21), {"x": 9 * x}, ["y"])
        np.testing.assert_array_equal(got, want)


def test_what_is_asked_inside_stays_as_it_was():
    """Clamps are computed with what makes their inputs, sums in the place of these: not where somebody asks."""
    x, w = random(1, 8, 40, 40), random(8, 8, 3, 3, seed=2)
    nodes = [N("Conv", ["x", "w"], ["a"], pads=[1] * 4), N("Relu", ["a"], ["b"]), N("Add", ["b", "a"], ["c"]),
             N("Relu", ["c"], ["d"]), N("Reshape", ["d", "s"], ["e"]), N("Add", ["d", "x"], ["y"])]
    names = ["a", "b", "c", "d", "e", "y"]
    data = model(nodes, {"x": x}, {"w": w, "s": np.array([8, -1], I64)}, names)
    together = opened(thin(data), names)
    wanted = together({"x": x})
    for _ in range(3):  # buffers are used again
        for got, want in zip(together({"x": x}), wanted, strict=True):
            np.testing.assert_array_equal(got, want)
    for name, want in zip(names, wanted, strict=True):
        np.testing.assert_array_equal(opened(thin(data), [name])({"x": x})[0], want)
    for got, want in zip(wanted, both(data, {"x": x}, names)[1], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_extremes_of_a_tensor_are_one_step():
    x = random(1, 8, 40, 40)
    nodes = [N("Relu", ["x"], ["a"]), *(N(f"Reduce{w}", ["a"], [w], keepdims=0) for w in ("Min", "Max", "Sum"))]
    data = model(nodes, {"x": x}, outputs=("Min", "Max", "Sum"))
    assert len(opened(thin(data), ["Max", "Sum", "Min"]).steps) == 2
    got, want = both(data, {"x": x}, ["Min", "Max", "Sum"])
    assert [g.shape for g in got] == [()] * 3
    assert got[:2] == want[:2]
    np.testing.assert_allclose(got[2], want[2], rtol=1e-5)
    x[0, 0, 0, 0] = np.nan
    assert all(np.isnan(g) for g in opened(thin(data), ["Min", "Max", "Sum"])({"x": x}))


def test_what_is_not_in_the_list_is_left_to_the_runtime():
    x = random(1, 3, 8, 8)
    for node in (N("Erf", ["x"], ["y"]), N("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], ceil_mode=1),
                 N("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER"), N("Relu", ["nothing"], ["y"])):
        assert opened(thin(model([node], {"x": x}, {"w": random(2, 3, 3, 3)})), ["y"]) is None
    halves = x.astype(np.float16)
    assert opened(thin(model([N("Relu", ["x"], ["y"])], {"x": halves})), ["y"]) is None
    assert opened(thin(model([N("Relu", ["x"], ["y"])], {"x": x})), ["other"]) is None


def test_samples_that_do_not_fit_are_refused():
    x = random(1, 3, 8, 8)
    ready = opened(thin(model([N("Conv", ["x", "w"], ["y"])], {"x": x}, {"w": random(2, 3, 3, 3)})), ["y"])
    for wrong in ({"x": x.astype(np.float64)}, {}, {"x": random(1, 4, 8, 8)}, {"x": random(1, 3, 2, 2)}):
        with pytest.raises(UnsupportedError, match="does not run on this sample"):
            ready(wrong)
    assert ready({"x": x})[0].shape == (1, 2, 6, 6)


def test_buffers_go_with_the_last_network(monkeypatch):
    monkeypatch.setattr(light, "_pool", light._Pool())
    x = random(1, 8, 64, 64)
    data = model([N("Relu", ["x"], ["a"]), N("Tanh", ["a"], ["b"]), N("ReduceMax", ["b"], ["y"])], {"x": x})
    first, second = (opened(thin(data), ["y"]) for _ in range(2))
    first({"x": x})
    del first
    second({"x": x})
    assert light._pool.free
    del second
    assert not light._pool.users
    assert not light._pool.free


QUIET = """
import sys
import numpy as np
from npulab.importers.onnx_parts import thin
from npulab.quantization.parts import each
from npulab.quantization.types import ListedSamples
some = ListedSamples([{"x": np.ones((1, 3, 8, 8), np.float32)}] * 6, "ones")
model = open(sys.argv[1], "rb").read()
print([float(a[0].sum()) for a in each(model, ["y"], some, list)], "onnxruntime" in sys.modules)
"""


def test_networks_of_common_operators_do_not_load_the_runtime(tmp_path):
    path = tmp_path / "net.onnx"
    x = random(1, 3, 8, 8)
    path.write_bytes(model([N("Conv", ["x", "w"], ["y"])], {"x": x}, {"w": np.ones((2, 3, 3, 3), np.float32)}))
    done = subprocess.run([sys.executable, "-c", QUIET, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("]")[1].strip() == "False"
    assert "1944.0" in done.stdout
