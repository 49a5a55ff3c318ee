"""Passes beside values that bodies of If and Loop read, and beside sizes that nobody knows."""

import numpy as np
import pytest

from npulab.exporters.onnx import to_onnx
from npulab.importers import load
from npulab.passes.certificate import compared
from npulab.passes.pipeline import PASSES, patched, post_of
from npulab.targets.facts.board import find_board
from test_patch import FLOAT, Net

onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
from onnx import TensorProto, helper  # noqa: E402


def rows(n):
    """Values of a network with something for most passes."""
    top = n.op("Pad", "x", n.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    yield top
    for step in (
        lambda y: n.conv(y, 4, bias=False), lambda y: n.batch_norm(y, 4), lambda y: n.op("Identity", y),
        lambda y: n.op("Mul", y, n.op("Sigmoid", y)),
        lambda y: n.op("MaxPool", y, kernel_shape=[5, 5], pads=[2] * 4, strides=[1, 1]),
        lambda y: n.op("Transpose", y, perm=[0, 2, 3, 1]), lambda y: n.op("Relu", y),
        lambda y: n.op("Transpose", y, perm=[0, 3, 1, 2]),
        lambda y: n.op("Mul", y, n.constant(np.array([2.0]))), lambda y: n.op("Add", y, n.constant(np.ones((4, 1, 1)))),
        lambda y: n.op("Add", n.conv(y, 4, 3), n.conv(y, 4, 1)),
        lambda y: n.op("Mul", y, n.op("HardSigmoid", y)), lambda y: n.op("Clip", y, n.constant(0.0), n.constant(6.0)),
        lambda y: n.op("Div", y, n.constant(3.0)), lambda y: n.op("Sub", y, n.constant(3.0)),
        lambda y: n.op("LeakyRelu", y, alpha=0.1), lambda y: n.op("GlobalAveragePool", y),
        lambda y: n.op("Flatten", y), lambda y: n.op("Reshape", y, n.constant([4, 1], np.int64)),
        lambda y: n.op("Reshape", y, n.constant([1, 4], np.int64)),
        lambda y: n.op("Gemm", y, n.constant(np.ones((4, 3))), transB=0), lambda y: n.op("Softmax", y, axis=1),
        lambda y: n.op("Add", y, n.op("Neg", n.constant(np.ones(3)))),
        lambda y: n.op("Expand", y, n.op("Concat", n.constant([1], np.int64), n.constant([3], np.int64), axis=0)),
    ):
        top = step(top)
        yield top


def inside(n, value, kind):
    """An If or a Loop whose body reads the value from around it."""
    if kind == "If":
        total = n.op("ReduceSum", "x", keepdims=0)
        flag = n.op("Greater", total, n.constant(0.0))
        bodies = [helper.make_graph([helper.make_node(op, [value], [f"{op}_out"])], op, [],
                                    [helper.make_tensor_value_info(f"{op}_out", FLOAT, None)])
                  for op in ("Abs", "Neg")]
        return n.op("If", flag, then_branch=bodies[0], else_branch=bodies[1])
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("ReduceSum", [value], ["one"], keepdims=0),
         helper.make_node("Add", ["sum", "one"], ["next"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", 9, []),
         helper.make_tensor_value_info("sum", FLOAT, [])],
        [helper.make_tensor_value_info("on", 9, []), helper.make_tensor_value_info("next", FLOAT, [])])
    return n.op("Loop", n.constant(3, np.int64), "", n.constant(0.0), body=body)


EXACT = [p.name for p in PASSES if p.exact]
COUNT = len(list(rows(Net(0))))


@pytest.mark.parametrize("place", range(COUNT))
def test_what_a_body_reads_stays(place):
    n, kind = Net(place), ("If", "Loop")[place % 2]
    made = list(rows(n))
    same(n.graph(made[-1], inside(n, made[place], kind)), EXACT if place in (6, 11, 20) else ())


def same(before, names, off=None):
    after, changes = patched(before, names, off)
    for a in compared(before, after, None, post_of(before, after, changes)):
        assert a.relative <= 1e-5 or a.largest <= 2e-6, a
    return after


@pytest.mark.parametrize(("kind", "board"), [("If", "max78000"), ("Loop", "ethos_u55")])
def test_boards_keep_what_a_body_reads(kind, board):
    described = find_board(board)

    def off(g):
        return {f.node for f in described.check(g, "int8").findings if f.where != "npu"}
    for place in (2, 11, 20):
        n = Net(place)
        made = list(rows(n))
        same(n.graph(made[-1], inside(n, made[place], kind)), (), off)


def test_a_body_reads_what_took_the_place_of_its_value():
    """Two bodies, an absent input in one of them, a name in one that a new value of the network may not get."""
    n = Net(0)
    y = n.batch_norm(n.conv("x", 4), 4)
    z = n.op("Identity", n.op("Relu", y))
    low = helper.make_node("Clip", [z, "", "top"], ["n2_out"])
    body = helper.make_graph([helper.make_node("Constant", [], ["top"], value_float=0.5), low], "b", [],
                             [helper.make_tensor_value_info("n2_out", FLOAT, None)])
    flag = n.op("Greater", n.op("ReduceSum", "x", keepdims=0), n.constant(0.0))
    one = n.op("If", flag, then_branch=body, else_branch=body)
    g = n.graph(z, one, inside(n, z, "If"), inside(n, y, "Loop"))
    after = same(g, EXACT)

    assert after.values[after.outputs[0]].name == z
    assert not {"Identity", "BatchNormalization"} & {m.op.name for m in after.nodes}


@pytest.mark.parametrize("dynamic", [("h", "w"), (9, "w")])
def test_unknown_sizes_stop_no_pass(dynamic):
    described = find_board("coral_edgetpu")

    def off(g):
        return {f.node for f in described.check(g).findings if f.where != "npu"}
    for place in (6, 12, 17, COUNT - 1):
        n = Net(place)
        made = list(rows(n))
        n.shape = (1, 4, *dynamic)
        before = n.graph(made[place])
        after, _ = patched(before, EXACT)
        for g in (after, patched(before, (), off)[0]):
            sizes = {f"x.{a}": s for a, s in ((2, 9), (3, 11)) if isinstance(dynamic[a - 2], str)}
            fixed, other = (load(to_onnx(m), dims=sizes) for m in (before, g))
            assert all(a.relative <= 1e-5 or a.largest <= 2e-6 for a in compared(fixed, other))
