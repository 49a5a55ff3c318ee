"""What a board makes of the passes: which are taken, where, in pairs; and that the same input gives the same bytes."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from npulab import zoo
from npulab.exporters.onnx import to_onnx
from npulab.importers import load
from npulab.importers.onnx import read_onnx
from npulab.passes import pipeline
from npulab.passes.pipeline import patched, run
from npulab.passes.shapes import inferred
from npulab.passes.types import Pass
from test_patch import Net, check, ops

pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")


def board(*taken, less=lambda n, g: False):
    """A board that takes these operators, but for nodes of which `less`."""
    return lambda g: {n.index for n in g.nodes if n.op.name not in taken or less(n, g)}


def large(n, g):
    """A convolution with a kernel above 5x5, or a pool above 3x3."""
    return max(n.op.attributes.get("kernel_shape", g.values[n.inputs[-1]].shape[2:] or (1,))) > (
        3 if n.op.name == "MaxPool" else 5)


@pytest.mark.parametrize("name", ["mobilenet-v3", "yolov8n", "vit-tiny"])
def test_shapes_inferred_in_place_are_those_of_the_file_read_anew(name):
    graph = run(load(zoo.build(name, 64)), [p for p in pipeline.PASSES if p.name in ("constants", "identities")])[0]
    again = read_onnx(to_onnx(graph, shapes=False), graph.name)

    def shapes(g):
        return {v.name: (v.shape, v.dtype, v.dynamic_axes, v.has_shape, v.is_constant) for v in g.values}
    assert shapes(inferred(graph)) == shapes(again)
    assert to_onnx(inferred(graph)) == to_onnx(again)


def test_shapes_of_unknown_sizes_are_inferred_too():
    n = Net(0)
    y = n.op("Reshape", n.op("Relu", "x"), n.constant([0, -1], np.int64))
    n.shape = (1, 4, "h", 7)
    g = n.graph(y)
    again = inferred(g)

    assert to_onnx(again) == to_onnx(read_onnx(to_onnx(g, shapes=False), g.name))
    assert again.values[again.nodes[0].outputs[0]].dynamic_axes == (2,)


def test_a_pass_leaves_alone_what_it_does_not_clear():
    """Pools of 5x5 become chains of 3x3 which the board takes, but not where they are named 'odd'."""
    n = Net(0)
    y = "x"
    for _ in range(3):
        y = n.op("Relu", n.op("MaxPool", y, kernel_shape=[5, 5], pads=[2] * 4, strides=[1, 1]))
    odd = n.nodes[2].name
    after, changes = check(n.graph(y), off=board("Relu", "MaxPool", less=lambda m, g: (
        large(m, g) or m.name.startswith(odd))), expect=["pool-chain"])

    assert [m.name for m in after.nodes if m.name == odd] == [odd]
    assert ops(after) == ["MaxPool", "MaxPool", "Relu", "MaxPool", "Relu", "MaxPool", "MaxPool", "Relu"]
    assert len(changes) == 2


def test_two_passes_that_only_help_together_are_found():
    n = Net(0)
    y = n.op("HardSigmoid", n.conv("x", 4), alpha=0.2, beta=0.5)
    taken = ("Conv", "Mul", "Add", "Sub", "Relu", "Neg")
    after, changes = check(n.graph(y), off=board(*taken))

    assert set(ops(after)) <= set(taken)
    assert {"hardsigmoid-to-clip", "clip-to-relu"} <= {c.name for c in changes}


@pytest.mark.parametrize(("opset", "names"), [(None, ["gelu"]), (20, ["gelu"]), (19, []), (14, [])])
def test_no_pass_for_a_board_raises_the_opset_above_what_its_tools_read(opset, names):
    n = Net(0)
    half = n.op("Mul", "x", n.constant(0.5))
    erf = n.op("Erf", n.op("Div", "x", n.constant(np.sqrt(2))))
    y = n.op("Mul", half, n.op("Add", erf, n.constant(1.0)))
    after, _ = check(n.graph(y), off=board("Gelu", "Mul", "Div", "Add"), opset=opset, expect=names)

    assert dict(after.header.opsets)[""] == (20 if names else 17)


def test_passes_that_undo_each_other_come_to_an_end(monkeypatch):
    def swap(a, b):
        def apply(r):
            """One into the other."""
            found = [n for n in r.live() if n.op.name == a and r.wanted(n)]
            for n in found:
                r.change(n, op=b)
            return [f"{n.name}: {b}" for n in found]
        return Pass(f"{a}-{b}", apply, always=False)
    monkeypatch.setattr(pipeline, "PASSES", (swap("Abs", "Neg"), swap("Neg", "Abs")))
    n = Net(0)
    g = n.graph(n.op("Abs", n.op("Neg", "x")))

    assert patched(g, (), board("Relu"))[1] == []
    assert len(run(g, pipeline.PASSES)[1]) <= 4 * pipeline.ROUNDS


def test_the_same_network_gives_the_same_bytes_whatever_the_seed_of_hashes():
    code = ("import hashlib; from npulab import zoo; from npulab.importers import load; "
            "from npulab.exporters.onnx import to_onnx; from npulab.passes.pipeline import patched; "
            "from npulab.targets.facts.board import find_board; b = find_board('ethos_u55'); "
            "g = load(zoo.build('vit-tiny', 32)); off = lambda g: {f.node for f in b.check(g, 'int8').findings "
            "if f.where != 'npu'}; print(hashlib.sha256(to_onnx(patched(g, (), off)[0])).hexdigest())")
    found = {subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                            capture_output=True, text=True).stdout for seed in ("1", "2")}
    assert len(found) == 1
    assert len(found.pop().strip()) == 2 * hashlib.sha256().digest_size
