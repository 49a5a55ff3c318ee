"""ONNX's moves in NumPy against ONNX Runtime, and constants of shapes against ONNX's own evaluator."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import npulab
from npulab.ir.ops import OnnxOp
from npulab.passes import constants
from npulab.reference import islands, onnx_moves

INT64 = TensorProto.INT64


def one(op, shape, second=None, opset=17, **attributes):
    """A graph of one node on x, float32 of this shape; `second` is a constant."""
    node = helper.make_node(op, ["x"] if second is None else ["x", "s"], ["y"], **attributes)
    made = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
                             [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                             [] if second is None else [numpy_helper.from_array(np.array(second, np.int64), "s")])
    return npulab.load(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)],
                                         ir_version=8).SerializeToString())


MOVES = [
    ("Flatten", (2, 3, 4, 5), None, 17, {}), ("Flatten", (2, 3, 4), None, 17, {"axis": 0}),
    ("Flatten", (2, 3, 4), None, 17, {"axis": 3}), ("Flatten", (2, 3, 4), None, 17, {"axis": -1}),
    ("Flatten", (2, 3), None, 17, {"axis": -2}), ("Reshape", (2, 3, 4), (0, -1), 17, {}),
    ("Reshape", (2, 3, 4), (4, 0, 2), 17, {}), ("Reshape", (2, 3, 4), (24,), 17, {}), ("Reshape", (1,), (), 17, {}),
    ("Reshape", (0, 3), (3, 0), 17, {"allowzero": 1}), ("Squeeze", (1, 3, 1), (0, -1), 17, {}),
    ("Squeeze", (1, 3, 1), None, 12, {"axes": [2]}), ("Unsqueeze", (3, 4), (0, -1), 17, {}),
    ("Unsqueeze", (3, 4), None, 12, {"axes": [1, 2]}), ("Transpose", (2, 3, 4), None, 17, {}),
    ("Transpose", (2, 3, 4), None, 17, {"perm": [1, 2, 0]}), ("Transpose", (), None, 17, {}),
]


@pytest.mark.parametrize(("op", "shape", "second", "opset", "attributes"), MOVES)
def test_moves_are_those_of_onnx_runtime(op, shape, second, opset, attributes):
    pytest.importorskip("onnxruntime")
    graph = one(op, shape, second, opset, **attributes)
    (node,), x = graph.nodes, np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    step = onnx_moves.step_of(graph, node, node.inputs[:1])
    assert step is not None
    (got,), (want,) = step([x]), islands.single(graph, node, node.inputs[:1])([x])

    assert got.shape == want.shape
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, want)


def test_other_operators_and_places_that_are_computed_are_left_to_the_runtime():
    graph = one("Relu", (2, 3))
    assert onnx_moves.step_of(graph, graph.nodes[0], graph.nodes[0].inputs) is None
    graph = one("Squeeze", (1, 3))
    assert onnx_moves.step_of(graph, graph.nodes[0], graph.nodes[0].inputs) is None
    graph = one("Reshape", (2, 3), (3, 2))
    assert onnx_moves.step_of(graph, graph.nodes[0], graph.nodes[0].inputs) is None  # reads both


X, PAIRS = np.arange(-3, 9).astype(np.int64), np.arange(12).reshape(3, 4)
SHAPES = [
    ("Cast", [X], {"to": INT64}), ("Concat", [X, X[:2]], {"axis": 0}), ("Concat", [PAIRS, PAIRS], {"axis": -1}),
    ("ConstantOfShape", [np.array([2, 3])], {"value": numpy_helper.from_array(np.array([7], np.int64))}),
    ("Gather", [X, np.array(3)], {}), ("Gather", [PAIRS, np.array([-1, 0])], {"axis": 1}),
    ("Reshape", [PAIRS, np.array([0, -1, 2])], {}), ("Slice", [X, np.array([2]), np.array([-2]), np.array([0])], {}),
    ("Slice", [PAIRS, np.array([-1]), np.array([-(2**63) + 1]), np.array([0]), np.array([-1])], {}),
    ("Slice", [PAIRS, np.array([0, 1]), np.array([2**63 - 1, 3]), np.array([-1, 0]), np.array([2, 1])], {}),
    ("Transpose", [PAIRS], {}), ("Transpose", [PAIRS], {"perm": [1, 0]}), ("Unsqueeze", [X, np.array([0, -1])], {}),
]


@pytest.mark.parametrize(("op", "given", "attributes"), SHAPES)
def test_constants_of_shapes_are_what_the_evaluator_makes_of_them(op, given, attributes):
    node = helper.make_node(op, [f"x{i}" for i in range(len(given))], ["y"], **attributes)
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info(n, INT64, None) for n in node.input],
                              [onnx.ValueInfoProto(name="y")])
    (want,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])).run(
        None, dict(zip(node.input, given, strict=True)))
    plain = {k: numpy_helper.to_array(v) if isinstance(v, TensorProto) else v for k, v in attributes.items()}
    got = constants._of_shapes(OnnxOp(op, plain), given)

    assert got is not None
    assert got.dtype == want.dtype
    assert got.shape == np.shape(want)
    np.testing.assert_array_equal(got, want)
