"""Whole networks in float16 on an OpenCL device: of files in float16, and float32 ones stored so between layers."""

import numpy as np
import pytest

from npulab.exporters.onnx import to_onnx as exported
from npulab.gpu.compute.network import compile_network
from npulab.importers import load
from npulab.passes.certificate import session
from test_gpu_network import CASES, GPU, X, floats, model, node

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
F16, F32 = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
ROUNDING = 2.0 ** -11
"""Of a number that is stored as float16, that it may be off."""
SMALLEST = 2.0 ** -25
"""Half of the smallest number that float16 has."""


@pytest.fixture(scope="module")
def traits(device):
    from npulab.gpu.compute.traits import traits_of

    return traits_of(device)


def rounded(graph):
    """(a network of float32 whose constants float16 has, the same network in float16)"""
    proto = onnx.ModelProto.FromString(exported(graph))
    kept = {n.input[i] for n in proto.graph.node for i in (1, 2) if n.op_type in ("Resize", "Upsample")
            and len(n.input) > i}  # scales are float32 in any network
    del proto.graph.value_info[:]
    for t in proto.graph.initializer:
        if t.data_type == F32 and t.name not in kept:
            t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(t).astype(np.float16), t.name))
    half = onnx.ModelProto.FromString(proto.SerializeToString())
    for t in proto.graph.initializer:
        if t.data_type == F16:
            t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(t).astype(np.float32), t.name))
    for v in (*half.graph.input, *half.graph.output):
        if v.type.tensor_type.elem_type == F32:
            v.type.tensor_type.elem_type = F16
    return load(proto.SerializeToString()), load(half.SerializeToString())


def runs(graph, feeds):
    return session(graph).run(None, feeds)


def within(found, wanted, bound):
    error = np.abs(found.astype(np.float64) - wanted)
    assert (error <= bound).all(), f"{np.nanmax(error / bound):.3g} times the bound"


# networks whose file is float16


@pytest.mark.parametrize("name", CASES)
def test_operators_of_float16(name, device, traits):
    """A launch rounds what it stores once, to 2**-11 of it; what follows may take that along, once more at the most
    in these networks. Of one launch each number is held to that."""
    inputs, nodes, constants = CASES[name]
    outputs = ["y", "z"] if any("z" in n.output for n in nodes) else ["y"]
    wide, half = rounded(model(nodes, inputs, outputs, **constants))
    feeds = {n: floats(*s).astype(np.float16) for n, s in inputs.items()}
    plan = compile_network(half, traits)
    found = plan.open(device).run(feeds)
    assert {number for *_, number in (*plan.inputs.values(), *plan.outputs.values())} == {"float16"}
    for (n, x), y in zip(found.items(), runs(wide, {n: a.astype(np.float32) for n, a in feeds.items()}), strict=True):
        assert (x.dtype, x.shape) == (np.float16, y.shape), n
        top = float(np.abs(y).max())
        own = np.abs(y) if len(plan.steps) == 1 else len(plan.steps) * top
        within(x, y, ROUNDING * own + 1e-5 * top + SMALLEST)
