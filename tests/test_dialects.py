"""ONNX to TFLite and back: operator by operator, ONNX Runtime against LiteRT's reference kernels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialects import check_onnx, feeds, furthest, run, run_converted
from npulab import dialects
from npulab.dialects import from_onnx, from_tflite, layouts
from npulab.errors import UnsupportedError
from npulab.importers import load
from test_patch import Net

onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
pytest.importorskip("ai_edge_litert", reason="pip install 'npulab[litert]'")
from onnx import TensorProto, helper  # noqa: E402

CLOSE = 1e-5


def agree(graph, seed=0, back=True, close=CLOSE, keep_layout=False):
    """Convert there and back; both compute what the graph computes. Gives the TFLite graph."""
    made = from_onnx(graph, keep_layout)
    inputs = feeds(graph, seed)
    want = run(graph, inputs)
    assert furthest(want, run_converted(made, inputs)) <= close
    if back:
        again = from_tflite(made.graph, keep_layout)
        check_onnx(again)
        there = {name: a.transpose(made.inputs.get(name, range(a.ndim))) for name, a in inputs.items()}
        assert furthest(run(made.graph, there), run_converted(again, there)) <= close
    return made


def ops(made):
    return [n.op.name for n in made.graph.nodes]


def ints(n, *numbers):
    return n.constant(numbers, np.int64)


def number(n, x):
    return n.constant(np.float32(x))


def as_float(n, x):
    return n.op("Cast", x, to=TensorProto.FLOAT)


# operators

UNARY = {
    "Relu": {}, "Sigmoid": {}, "Tanh": {}, "HardSwish": {}, "HardSigmoid": {"alpha": 0.17, "beta": 0.6}, "Elu": {},
    "LeakyRelu": {"alpha": 0.2}, "Abs": {}, "Neg": {}, "Exp": {}, "Floor": {}, "Ceil": {}, "Round": {}, "Sin": {},
    "Cos": {}, "Sign": {}, "Softplus": {}, "Reciprocal": {}, "Identity": {},
    "GlobalAveragePool": {}, "GlobalMaxPool": {}, "Flatten": {}, "ArgMax": {"axis": 1}, "ArgMin": {"axis": 3},
    "LogSoftmax": {"axis": 1}, "Transpose": {"perm": [0, 2, 3, 1]}, "Gelu": {}, "Mish": {},
    "DepthToSpace": {"blocksize": 2}, "SpaceToDepth": {"blocksize": 2},
}


@pytest.mark.parametrize("name", UNARY)
def test_a_function_of_one_tensor(name):
    n = Net(1, 8, (6, 10))
    x = n.conv("x", 8, 3)
    y = n.op(name, x, **UNARY[name])
    agree(n.graph(as_float(n, y) if name.startswith("Arg") else y, opset=20))


@pytest.mark.parametrize("name", ["Log", "Sqrt"])
def test_a_function_of_positive_numbers(name):
    n = Net(2)
    agree(n.graph(n.op(name, n.op("Add", n.op("Abs", n.conv("x", 4)), number(n, 0.5)))))


@pytest.mark.parametrize("name", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Greater", "LessOrEqual", "Equal", "PRelu"])
@pytest.mark.parametrize("other", [(), (4, 1, 1), (11,), (1, 4, 9, 11), (9, 1)])
def test_a_function_of_a_tensor_and_a_constant_that_is_broadcast(name, other):
    n = Net(3)
    c = n.constant(n.rng.uniform(0.5, 2, other))
    logical = name in ("Greater", "LessOrEqual", "Equal")
    y = n.op(name, n.conv("x", 4), c)
    agree(n.graph(as_float(n, y) if logical else y))
    if name != "PRelu":
        n = Net(3)
        x = n.op("Add", n.op("Abs", n.conv("x", 4)), number(n, 0.5))
        y = n.op(name, n.constant(n.rng.uniform(0.5, 2, other)), x)
        agree(n.graph(as_float(n, y) if logical else y))


@pytest.mark.parametrize("name", ["Add", "Sub", "Mul", "Max"])
def test_a_function_of_two_computed_tensors_of_different_ranks(name):
    n = Net(4)
    x = n.conv("x", 4)
    row = n.op("ReduceMean", x, axes=[0, 1, 2], keepdims=0)
    agree(n.graph(n.op(name, x, row), n.op(name, row, x)))


def test_where_pow_and_several_operands():
    n = Net(5)
    x, y = n.conv("x", 4), n.conv("x", 4, 1)
    positive = n.op("Abs", y)
    greater = n.op("Greater", x, y)
    agree(n.graph(n.op("Where", n.op("Not", greater), x, y),
                  n.op("Pow", positive, number(n, 2)), n.op("Pow", positive, number(n, 0.5)),
                  n.op("Pow", positive, number(n, 1.7)), n.op("Sum", x, y, positive), n.op("Max", x, y, positive),
                  n.op("Mean", x, y, positive), as_float(n, n.op("And", greater, n.op("Less", x, positive)))))


@pytest.mark.parametrize("limits", [(0, 6), (0, None), (-1, 1), (0, 1), (-0.5, 0.75), (None, 0.5)])
@pytest.mark.parametrize("alone", [False, True])
def test_clips_are_fused_where_tflite_fuses_them(limits, alone):
    n = Net(6)
    x = n.op("Tanh", n.conv("x", 4)) if alone else n.conv("x", 4)
    bounds = [number(n, limit) if limit is not None else "" for limit in limits]
    made = agree(n.graph(n.op("Clip", x, *bounds)))
    if limits in ((0, 6), (0, None), (-1, 1)) and not alone:
        assert ops(made) == ["CONV_2D"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["dense", "grouped", "depthwise", "multiplied"]),
       st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 2]),
       st.sampled_from(["none", "half", "uneven", "SAME_UPPER", "SAME_LOWER", "VALID"]), st.booleans())
def test_convolutions(seed, kind, kernel, stride, dilation, padding, bias):
    n = Net(seed)
    groups, out = {"dense": (1, 6), "grouped": (2, 6), "depthwise": (4, 4), "multiplied": (4, 8)}[kind]
    dilation = 1 if padding.isupper() else dilation  # ONNX Runtime has not both
    own = {"strides": [stride, stride], "dilations": [dilation, dilation]}
    pads = {"none": [0] * 4, "half": [(kernel - 1) * dilation // 2] * 4, "uneven": [0, 1, 2, 1]}.get(padding)
    own |= {"auto_pad": padding, "pads": None} if pads is None else {"pads": pads}
    y = n.conv("x", out, kernel, groups, bias, **own)
    made = agree(n.graph(n.op("Relu", y)))
    assert made.inputs == {"x": (0, 2, 3, 1)}
    assert made.outputs == {"v2": (0, 2, 3, 1)}
    assert "TRANSPOSE" not in ops(made)
    assert ops(made)[-1] == ("DEPTHWISE_CONV_2D" if groups == 4 else "CONV_2D")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2]), st.sampled_from([2, 3, 4]), st.sampled_from([1, 2, 3]),
       st.sampled_from([1, 2]), st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0)]), st.booleans())
def test_transposed_convolutions(seed, groups, kernel, stride, dilation, pads, extra):
    n = Net(seed)
    w = n.constant(n.rng.normal(size=(4, 3, kernel, kernel)))
    b = n.constant(n.rng.normal(size=3 * groups))
    more = {"output_padding": [stride - 1] * 2} if extra and stride > 1 else {}
    y = n.op("ConvTranspose", "x", w, b, group=groups, strides=[stride] * 2, pads=pads, dilations=[dilation] * 2,
             **more)
    agree(n.graph(n.op("Relu", y)))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["MaxPool", "AveragePool"]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3]),
       st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 1), (1, 0, 0, 1)]), st.booleans(), st.booleans())
def test_poolings(name, kernel, stride, pads, ceil_mode, count):
    if max(pads) >= kernel:
        pads = (0, 0, 0, 0)
    n = Net(7)
    more = {"count_include_pad": int(count)} if name == "AveragePool" else {}
    y = n.op(name, n.conv("x", 4), kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads,
             ceil_mode=int(ceil_mode), **more)
    outside = ceil_mode and any(
        -(-(size + a + b - kernel) // stride) * stride >= size + a
        for size, a, b in zip((9, 11), pads[:2], pads[2:], strict=True))
    if outside:
        with pytest.raises(UnsupportedError, match="windows that begin in the padding at the end"):
            from_onnx(n.graph(y, opset=19))
    else:
        agree(n.graph(y, opset=19))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("size", [(18, 22), (13, 30), (5, 11), (1, 1)])
@pytest.mark.parametrize("rounding", ["floor", "round_prefer_floor", "round_prefer_ceil", "ceil"])
def test_resizes(mode, coordinates, size, rounding):
    if mode == "linear" and rounding != "floor":
        return
    n = Net(8)
    y = n.op("Resize", n.conv("x", 4), "", "", ints(n, 1, 4, *size), mode=mode,
             coordinate_transformation_mode=coordinates, nearest_mode=rounding)
    agree(n.graph(y))


@pytest.mark.parametrize("name", ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
                                  "ReduceSumSquare", "ReduceSum"])
@pytest.mark.parametrize(("axes", "keep"), [((1,), 1), ((2, 3), 0), ((-1,), 0), ((0, 2), 1), ((), 1)])
def test_reductions_where_the_axes_lie(name, axes, keep):
    n = Net(9)
    x = n.op("Exp", n.op("Mul", n.conv("x", 4), number(n, 0.1)))
    if name == "ReduceSum":
        y = n.op(name, x, *([ints(n, *axes)] if axes else []), keepdims=keep)
    else:
        y = n.op(name, x, keepdims=keep, **({"axes": axes} if axes else {}))
    agree(n.graph(y))


def moves(n, x):
    yield n.op("Concat", x, n.conv("x", 2), axis=1)
    yield n.op("Concat", x, x, axis=-1)
    yield n.op("Slice", x, ints(n, 1, 2), ints(n, 9, -1), ints(n, 2, 3))
    yield n.op("Slice", x, ints(n, 0, 1), ints(n, 100, 4), ints(n, 3, 1), ints(n, 2, 2))
    yield n.op("Slice", x, ints(n, -1), ints(n, -100), ints(n, 2), ints(n, -1))
    yield n.op("Pad", x, ints(n, 0, 1, 2, 0, 0, 0, 1, 3), number(n, 0.5))
    yield n.op("Pad", x, ints(n, 0, 0, -1, 0, 0, 0, 2, -2))
    yield n.op("Pad", x, ints(n, 0, 0, 2, 1, 0, 0, 1, 2), mode="reflect")
    yield n.op("Gather", x, ints(n, 2, 0, -1), axis=1)
    yield n.op("Gather", x, n.constant(1, np.int64), axis=1)
    yield n.op("Gather", x, n.constant([[1, 2], [0, 3]], np.int64), axis=2)
    yield n.op("Tile", x, ints(n, 1, 2, 1, 3))
    yield n.op("Expand", n.op("ReduceMean", x, axes=[2, 3]), ints(n, 1, 4, 3, 5))
    yield n.op("Reshape", n.op("Transpose", x, perm=[0, 3, 2, 1]), ints(n, 11, -1))
    yield n.op("Reshape", x, ints(n, 1, 2, 2, 9, 11))
    yield n.op("Transpose", n.op("Reshape", x, ints(n, 1, 2, 2, 99)), perm=[0, 3, 1, 2])
    yield n.op("Squeeze", n.op("Unsqueeze", x, ints(n, 0)), ints(n, 1))
    yield n.op("Cast", n.op("Cast", x, to=TensorProto.INT32), to=TensorProto.FLOAT)
    yield n.op("Softmax", x, axis=1)
    yield n.op("Softmax", x, axis=3)
    yield n.op("CumSum", x, n.constant(1, np.int64))
    yield n.op("DepthToSpace", x, blocksize=2, mode="CRD")
    yield n.op("InstanceNormalization", x, n.constant(n.rng.normal(size=4)), n.constant(n.rng.normal(size=4)))
    yield n.op("LayerNormalization", x, n.constant(n.rng.normal(size=11)), n.constant(n.rng.normal(size=11)))
    yield n.op("GatherND", x, n.constant([[0, 1, 2], [0, 3, 4]], np.int64))
    yield n.batch_norm(n.op("Relu", x), 4)


@pytest.mark.parametrize("which", range(26))
def test_moves_and_norms(which):
    n = Net(10)
    x = n.conv("x", 4)
    wanted = next(y for i, y in enumerate(moves(n, x)) if i == which)
    agree(n.graph(wanted))
    agree(n.graph(wanted), keep_layout=True)


def test_what_broadcasts_is_not_expanded():
    n = Net(19)
    x = n.conv("x", 4)
    row = n.op("Expand", n.op("ReduceMean", x, axes=[2, 3]), ints(n, 1, 4, 9, 11))
    grid = n.op("Expand", n.constant(n.rng.normal(size=(9, 1))), ints(n, 1, 4, 9, 11))
    made = agree(n.graph(n.op("Mul", n.op("Add", x, row), grid)))
    assert ops(made) == ["CONV_2D", "MEAN", "ADD", "MUL"]


def test_splits():
    n = Net(11)
    x = n.conv("x", 6)
    n.nodes.append(helper.make_node("Split", [x], ["a", "b"], "s1", axis=1))
    n.nodes.append(helper.make_node("Split", [x, ints(n, 4, 7)], ["c", "d"], "s2", axis=3))
    made = agree(n.graph("a", "b", "c", "d"))
    assert ops(made)[-2:] == ["SPLIT", "SPLIT_V"]


@pytest.mark.parametrize("kind", ["gemm", "gemm transposed", "gemm scaled", "gemm computed", "matmul", "matmul rank 3",
                                  "matmul computed", "attention"])
def test_matrices(kind):
    n = Net(12)
    flat = n.op("Flatten", n.conv("x", 4))
    match kind:
        case "gemm" | "gemm transposed" | "gemm scaled":
            w = n.constant(n.rng.normal(size=(396, 5) if kind == "gemm" else (5, 396)) / 20)
            own = {"alpha": 0.5, "beta": 2.0} if kind == "gemm scaled" else {}
            y = n.op("Relu", n.op("Gemm", flat, w, n.constant(n.rng.normal(size=5)), transB=int(kind != "gemm"), **own))
        case "gemm computed":
            y = n.op("Gemm", flat, flat, transB=1)
        case "matmul":
            y = n.op("Add", n.op("MatMul", flat, n.constant(n.rng.normal(size=(396, 5)) / 20)),
                     n.constant(n.rng.normal(size=5)))
        case "matmul rank 3":
            rows = n.op("Reshape", "x", ints(n, 1, 36, 11))
            y = n.op("MatMul", rows, n.constant(n.rng.normal(size=(11, 5))))
        case "matmul computed":
            y = n.op("MatMul", n.conv("x", 4), n.op("Transpose", n.conv("x", 4), perm=[0, 1, 3, 2]))
        case _:
            rows = n.op("Reshape", "x", ints(n, 1, 9, 44))
            q, k, v = (n.op("Transpose", n.op("Reshape", n.op(
                "MatMul", rows, n.constant(n.rng.normal(size=(44, 44)) / 7)), ints(n, 1, 9, 4, 11)), perm=[0, 2, 1, 3])
                for _ in range(3))
            weights = n.op("Softmax", n.op("MatMul", q, n.op("Transpose", k, perm=[0, 1, 3, 2])))
            y = n.op("Transpose", n.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    made = agree(n.graph(y))
    if kind in ("gemm", "gemm transposed", "gemm scaled", "matmul"):
        assert ops(made) == ["CONV_2D", "RESHAPE", "FULLY_CONNECTED"]


def test_one_spatial_axis():
    n = Net(13)
    n.shape = (1, 4, 30)
    w = n.constant(n.rng.normal(size=(6, 4, 3)))
    y = n.op("MaxPool", n.op("Relu", n.op("Conv", "x", w, pads=[1, 1], strides=[2])), kernel_shape=[2], strides=[2])
    z = n.op("ConvTranspose", y, n.constant(n.rng.normal(size=(6, 2, 4))), strides=[2], pads=[1, 1])
    agree(n.graph(z, n.op("GlobalAveragePool", y)))


# versions


def in_the_words_of(opset):
    """A network of operators whose attributes became inputs, as a file of this opset."""
    n = Net(14)
    x = n.conv("x", 4)
    if opset < 11:
        x = n.op("Clip", x, min=0.0, max=6.0)
        x = n.op("Pad", x, pads=[0, 0, 1, 1, 0, 0, 1, 1], mode="constant", value=0.25)
        x = n.op("Upsample", x, n.constant([1, 1, 2, 2]), mode="nearest")
    else:
        x = n.op("Clip", x, number(n, 0), number(n, 6))
        x = n.op("Pad", x, ints(n, 0, 0, 1, 1, 0, 0, 1, 1), number(n, 0.25))
        x = n.op("Resize", x, "" if opset >= 13 else n.constant(np.zeros(0)), n.constant([1, 1, 2, 2]), mode="nearest",
                 coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    if opset < 10:
        x = n.op("Slice", x, starts=[1, 1], ends=[20, 20], axes=[2, 3])
    else:
        x = n.op("Slice", x, ints(n, 1, 1), ints(n, 20, 20), ints(n, 2, 3))
    x = n.op("ReduceMean", x, ints(n, 3)) if opset >= 18 else n.op("ReduceMean", x, axes=[3])
    x = n.op("Squeeze", x, ints(n, 3)) if opset >= 13 else n.op("Squeeze", x, axes=[3])
    x = n.op("Softmax", x)
    made = helper.make_graph(n.nodes, "net", [helper.make_tensor_value_info("x", 1, n.shape)],
                             [helper.make_tensor_value_info(x, 1, None)], n.constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=4 if opset < 15 else 9)
    return model.SerializeToString()


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21, 23])
def test_every_opset_says_the_same(opset):
    agree(load(in_the_words_of(opset)))


def test_the_newest_opset_says_what_21_says():
    """ONNX Runtime is some versions behind the onnx package."""
    newest = onnx.defs.onnx_opset_version()
    assert from_onnx(load(in_the_words_of(newest))).graph.digest == from_onnx(load(in_the_words_of(21))).graph.digest


# what cannot be said


def test_all_operators_without_words_are_named_at_once():
    n = Net(15)
    x = n.conv("x", 4)
    g = n.graph(n.op("Erf", x), n.op("Erf", n.op("Celu", x)))
    with pytest.raises(UnsupportedError) as e:
        dialects.to_tflite(g)
    assert str(e.value).split("\n")[:2] == ["'model' has operators that TFLite has no words for",
                                            "  got     Celu, 2 Erf"]


def test_options_without_words_are_named_at_once():
    n = Net(16)
    x = n.conv("x", 4)
    g = n.graph(n.op("MaxPool", x, kernel_shape=[2, 2], dilations=[2, 2]), n.op("Elu", x, alpha=0.5),
                n.op("Pad", x, ints(n, *[1] * 8), mode="edge"))
    with pytest.raises(UnsupportedError) as e:
        dialects.to_tflite(g)
    text = str(e.value)
    assert "MaxPool 'n2': dilated poolings; Elu 'n3': alpha other than 1; Pad 'n4': mode edge" in text


def test_open_sizes_are_asked_for():
    n = Net(17)
    y = n.conv("x", 4)
    made = helper.make_graph(n.nodes, "net", [helper.make_tensor_value_info("x", 1, [1, 4, "height", 8])],
                             [helper.make_tensor_value_info(y, 1, None)], n.constants)
    data = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    with pytest.raises(UnsupportedError, match="has no fixed size") as e:
        dialects.to_tflite(load(data))
    assert e.value.facts["try"] == "--dim NAME=SIZE"
    assert dialects.to_tflite(load(data, {"height": 8})).values[0].shape == (1, 8, 8, 4)


def test_tflite_operators_without_words_are_named_at_once():
    from npulab.exporters.tflite_builder import ModelBuilder

    m = ModelBuilder("m")
    x, y, z = (m.tensor(name, (1, 4), "float32") for name in "xyz")
    m.custom("Thing", [x], [y])
    m.op("L2_NORMALIZATION", [y], [z], fused_activation_function="NONE")
    with pytest.raises(UnsupportedError, match="operators that are not converted to ONNX") as e:
        dialects.to_onnx(load(m.build([x], [z])))
    assert e.value.facts["got"] == "L2_NORMALIZATION, Thing"


# layouts


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_reshape_in_another_order_moves_no_element(data):
    old = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=5))
    order = tuple(data.draw(st.permutations(range(len(old)))))
    new, rest = [1] * data.draw(st.integers(0, 1)), int(np.prod(old))
    while rest > 1 and len(new) < 6:
        new.append(data.draw(st.sampled_from([k for k in (2, 3, 4, 6, rest) if rest % k == 0])))
        rest //= new[-1]
    new.insert(data.draw(st.integers(0, len(new))), rest)
    after = layouts.reshaped(old, new, order)
    x = np.arange(np.prod(old)).reshape(old)
    if after is not None:
        assert sorted(after) == list(range(len(new)))
        np.testing.assert_array_equal(x.transpose(order).reshape(-1), x.reshape(new).transpose(after).reshape(-1))
    elif order == layouts.plain(len(old)):
        raise AssertionError("what is held in its own order can always be reshaped")


def test_names_and_layouts_are_those_of_the_source():
    n = Net(18)
    made = agree(n.graph(n.op("Relu", n.conv("x", 4)), n.op("Relu", "x")))
    g = made.graph
    assert [g.values[v].name for v in (*g.inputs, *g.outputs)] == ["x", "v2", "v3"]
    assert made.inputs["x"] == made.outputs["v2"] == made.outputs["v3"] == (0, 2, 3, 1)
    assert [x.name for x in g.nodes] == ["n1", "n3"]
    kept = from_onnx(n.graph("v2", "v3"), keep_layout=True)
    assert kept.inputs == kept.outputs == {}
    assert kept.graph.values[kept.graph.inputs[0]].shape == (1, 4, 9, 11)
