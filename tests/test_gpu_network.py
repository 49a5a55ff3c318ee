"""Whole float networks on an OpenCL device (PoCL, or whatever device is number 0) against ONNX Runtime and LiteRT."""

import json
import subprocess
import sys
from queue import SimpleQueue

import numpy as np
import pytest

from npulab import importers, zoo
from npulab.cli import run_arguments
from npulab.dialects import to_onnx
from npulab.errors import CapacityError, DeviceError, UnsupportedError, UsageError
from npulab.exporters.onnx import to_onnx as exported
from npulab.gpu.compute import fusing, operators
from npulab.gpu.compute.memory import Need, arranged
from npulab.gpu.compute.network import compile_network
from npulab.gpu.compute.problems import Attention, Convolution, LayerNorm, Product
from npulab.gpu.compute.types import Traits
from npulab.gpu.compute.views import View, collapsed, dense, nested, row_major
from npulab.importers import load
from npulab.passes.certificate import random_inputs, session
from shared import MODELS, needs_shared

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
F = onnx.TensorProto.FLOAT
RNG = np.random.default_rng(7)
GPU = Traits("a GPU", cpu=False, compute_units=4, vector=1, registers=64, warp=32, local_bytes=32 << 10, group_max=256)


@pytest.fixture(scope="module")
def traits(device):
    from npulab.gpu.compute.traits import traits_of

    return traits_of(device)


def floats(*shape, scale=1.0):
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def node(op, inputs, outputs, **attributes):
    out = outputs.split()
    return onnx.helper.make_node(op, [i.strip("-") for i in inputs.split()], out, name=out[0], **attributes)


def model(nodes, inputs, outputs, opset=17, **constants):
    graph = onnx.helper.make_graph(
        nodes, "net", [onnx.helper.make_tensor_value_info(n, F, s) for n, s in inputs.items()],
        [onnx.helper.make_tensor_value_info(n, F, None) for n in outputs],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    return load(proto.SerializeToString())


def reference(graph, feeds):
    made = session(to_onnx(graph, keep_layout=True))
    return made.run(None, feeds)


def agrees(graph, device, traits, limit=1e-5, feeds=None):
    """The plan, when all outputs are within `limit` of the largest value of ONNX Runtime's."""
    feeds = feeds or {v.name: floats(*v.shape) for v in (graph.values[i] for i in graph.inputs)}
    plan = compile_network(graph, traits)
    found = plan.open(device).run(feeds)
    assert list(found) == [graph.values[i].name for i in graph.outputs]
    for x, y in zip(found.values(), reference(graph, feeds), strict=True):
        assert x.shape == y.shape
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, y, rtol=limit, atol=limit * float(np.abs(y[np.isfinite(y)]).max(initial=1.0)))
    return plan


# operators


X = {"x": [1, 6, 9, 7]}


def i64(*numbers):
    return np.array(numbers, np.int64)


CASES = {
    "conv": (X, [node("Conv", "x w b", "y", pads=[1, 0, 2, 1], strides=[2, 1], dilations=[1, 2])],
             {"w": floats(5, 6, 3, 2), "b": floats(5)}),
    "conv same": (X, [node("Conv", "x w", "y", auto_pad="SAME_LOWER", strides=[2, 2])], {"w": floats(5, 6, 4, 3)}),
    "conv grouped": (X, [node("Conv", "x w b", "y", group=3)], {"w": floats(9, 2, 3, 3), "b": floats(9)}),
    "conv depthwise twice": (X, [node("Conv", "x w b", "y", group=6, pads=[1, 1, 1, 1])],
                             {"w": floats(12, 1, 3, 3), "b": floats(12)}),
    "conv batch": ({"x": [3, 4, 5, 5]}, [node("Conv", "x w", "y")], {"w": floats(7, 4, 3, 3)}),
    "conv 1d": ({"x": [2, 4, 11]}, [node("Conv", "x w b", "y", pads=[2, 1], strides=[2])],
                {"w": floats(6, 4, 3), "b": floats(6)}),
    "conv transposed": (X, [node("ConvTranspose", "x w b", "y", strides=[2, 3], pads=[1, 0, 0, 1],
                                 output_padding=[1, 0], group=2)], {"w": floats(6, 4, 3, 4), "b": floats(8)}),
    "conv transposed same": (X, [node("ConvTranspose", "x w", "y", strides=[2, 2], auto_pad="SAME_UPPER")],
                             {"w": floats(6, 4, 3, 3)}),
    "conv transposed to a size": (X, [node("ConvTranspose", "x w", "y", strides=[2, 2], output_shape=[18, 14])],
                                  {"w": floats(6, 4, 3, 3)}),
    "gemm": ({"x": [4, 9]}, [node("Gemm", "x w b", "y", alpha=0.5, beta=2.0, transB=1)],
             {"w": floats(7, 9), "b": floats(7)}),
    "gemm turned": ({"x": [9, 4]}, [node("Gemm", "x w b", "y", transA=1)], {"w": floats(9, 7), "b": floats(1, 7)}),
    "gemm of a matrix": ({"x": [4, 9]}, [node("Gemm", "x w b", "y")], {"w": floats(9, 7), "b": floats(4, 7)}),
    "gemm of a column": ({"x": [4, 9]}, [node("Gemm", "x w b", "y")], {"w": floats(9, 7), "b": floats(4, 1)}),
    "gemm of two": ({"x": [4, 9], "z": [9, 3]}, [node("Gemm", "x z", "y")], {}),
    "matmul": ({"x": [2, 3, 4, 9]}, [node("MatMul", "x w", "y")], {"w": floats(9, 7)}),
    "matmul batched": ({"x": [2, 3, 4, 9], "z": [2, 3, 9, 5]}, [node("MatMul", "x z", "y")], {}),
    "matmul transposed": ({"x": [2, 3, 4, 9], "z": [2, 3, 5, 9]},
                          [node("Transpose", "z", "t", perm=[0, 1, 3, 2]), node("MatMul", "x t", "y")], {}),
    "matmul of a vector": ({"x": [9], "z": [9, 5]}, [node("MatMul", "x z", "y")], {}),
    "matmul by a vector": ({"x": [3, 4, 9], "z": [9]}, [node("MatMul", "x z", "y")], {}),
    "matmul by a constant vector": ({"x": [3, 4, 9]}, [node("MatMul", "x w", "y")], {"w": floats(9)}),
    "matmul of two vectors": ({"x": [9], "z": [9]}, [node("MatMul", "x z", "y")], {}),
    "matmul of a vector, batched": ({"x": [9], "z": [2, 3, 9, 5]}, [node("MatMul", "x z", "y")], {}),
    "matmul of a vector and a constant": ({"x": [9]}, [node("MatMul", "x w", "p"), node("Add", "p b", "y")],
                                          {"w": floats(9, 5), "b": floats(5)}),
    "matmul by a vector, and rows' numbers": ({"x": [3, 4, 9], "z": [9]},
                                              [node("MatMul", "x z", "p"), node("Add", "p b", "y")], {"b": floats(4)}),
    "matmul by a vector, a number and a sum": (
        {"x": [3, 4, 9], "z": [9], "r": [3, 4]}, [node("MatMul", "x z", "p"), node("Add", "p b", "s"),
                                                  node("Add", "s r", "t"), node("Relu", "t", "y")], {"b": floats(1)}),
    "matmul of a vector that is transposed": ({"x": [9], "z": [5, 9]}, [
        node("Transpose", "z", "t", perm=[1, 0]), node("MatMul", "x t", "y")], {}),
    "matmul broadcast": ({"x": [3, 4, 9], "z": [2, 1, 9, 5]}, [node("MatMul", "x z", "y")], {}),
    "max pool": (X, [node("MaxPool", "x", "y", kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1],
                          dilations=[2, 1])], {}),
    "max pool ceil": (X, [node("MaxPool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], {}),
    "average pool": (X, [node("AveragePool", "x", "y", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 1, 0])], {}),
    "average pool padded": (X, [node("AveragePool", "x", "y", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1],
                                     count_include_pad=1)], {}),
    "global pool": (X, [node("GlobalAveragePool", "x", "y")], {}),
    "global max": (X, [node("GlobalMaxPool", "x", "y")], {}),
    "mean": (X, [node("ReduceMean", "x", "y", axes=[2, 1], keepdims=0)], {}),
    "sum": (X, [node("ReduceSum", "x a", "y", keepdims=1)], {"a": i64(1, 3)}),
    "max min": (X, [node("ReduceMax", "x", "a", axes=[1], keepdims=1), node("ReduceMin", "x", "b", axes=[1]),
                    node("Sub", "a b", "y")], {}),
    "norms": (X, [node("ReduceL2", "x", "a", axes=[1]), node("ReduceL1", "x", "b", axes=[1]),
                  node("ReduceSumSquare", "x", "c", axes=[1]), node("ReduceProd", "x", "d", axes=[1]),
                  node("Sum", "a b c d", "y")], {}),
    "broadcast": ({"x": [2, 3, 1, 5], "z": [4, 1]}, [node("Mul", "x z", "a"), node("Sub", "a k", "b"),
                                                    node("Div", "b e", "c"), node("Add", "c x", "y")],
                  {"k": floats(3, 1, 1), "e": floats(1) + 3}),
    "max of many": (X, [node("Max", "x a b", "m"), node("Min", "m c", "n"), node("Mean", "n x a", "y")],
                    {"a": floats(1, 6, 1, 1), "b": floats(7), "c": np.float32(0.8)}),
    "where": (X, [node("Where", "q x k", "y")], {"q": RNG.random((9, 7)) > 0.5, "k": np.float32(3)}),
    "batch norm": (X, [node("Relu", "x", "r"), node("BatchNormalization", "r g b m v", "y")],
                   {"g": floats(6), "b": floats(6), "m": floats(6), "v": np.abs(floats(6)) + 0.1}),
    "layer norm": ({"x": [2, 5, 24]}, [node("LayerNormalization", "x g b", "y", epsilon=1e-3)],
                   {"g": floats(24), "b": floats(24)}),
    "layer norm of two axes": ({"x": [2, 5, 24]}, [node("LayerNormalization", "x g", "y", axis=1)],
                               {"g": floats(5, 24)}),
    "softmax": (X, [node("Softmax", "x", "y", axis=-1)], {}),
    "softmax of channels": (X, [node("Softmax", "x", "y", axis=1)], {}),
    "log softmax": (X, [node("LogSoftmax", "x", "y", axis=2)], {}),
    "concat": (X, [node("Relu", "x", "r"), node("Concat", "x r k", "y", axis=1)], {"k": floats(1, 2, 9, 7)}),
    "concat of rows": (X, [node("Neg", "x", "r"), node("Concat", "r x", "y", axis=2)], {}),
    "split": (X, [node("Split", "x s", "a b", axis=1), node("Concat", "b a", "y", axis=1)], {"s": i64(2, 4)}),
    "slice": (X, [node("Slice", "x s e a t", "y")],
              {"s": i64(-1, 1), "e": i64(-100, 6), "a": i64(2, 3), "t": i64(-2, 2)}),
    "gather": (X, [node("Gather", "x i", "y", axis=2)], {"i": i64(3, -1, 0, 3)}),
    "gather one": (X, [node("Gather", "x i", "y", axis=1)], {"i": np.array(-2, np.int64)}),
    "gather of pairs": (X, [node("Gather", "x i", "y", axis=3)], {"i": i64(0, 5, 1, 2).reshape(2, 2)}),
    "pad": (X, [node("Pad", "x p v", "y")], {"p": i64(0, 1, 2, 0, 0, 0, 1, 3), "v": np.float32(1.5)}),
    "pad cut": (X, [node("Pad", "x p", "y")], {"p": i64(0, 0, -2, 1, 0, 0, -1, -3)}),
    "pad reflect": (X, [node("Pad", "x p", "y", mode="reflect")], {"p": i64(0, 0, 2, 1, 0, 0, 1, 3)}),
    "pad edge": (X, [node("Pad", "x p", "y", mode="edge")], {"p": i64(0, 2, 0, 1, 0, 0, 1, 0)}),
    "reshape": (X, [node("Reshape", "x s", "a"), node("Transpose", "a", "b", perm=[1, 0, 2]),
                    node("Reshape", "b t", "y")], {"s": i64(2, 27, 7), "t": i64(27, -1)}),
    "transpose": (X, [node("Transpose", "x", "a", perm=[3, 0, 2, 1]), node("Tanh", "a", "y")], {}),
    "squeeze": (X, [node("Squeeze", "x a", "s"), node("Unsqueeze", "s b", "u"), node("Flatten", "u", "y", axis=2)],
                {"a": i64(0), "b": i64(1, 3)}),
    "expand": ({"x": [3, 1, 5]}, [node("Expand", "x s", "e"), node("Reshape", "e t", "y")],
               {"s": i64(2, 3, 4, 5), "t": i64(6, 20)}),
    "tile": (X, [node("Tile", "x r", "y")], {"r": i64(2, 1, 3, 2)}),
    "depth to space": ({"x": [2, 12, 3, 5]}, [node("DepthToSpace", "x", "y", blocksize=2)], {}),
    "depth to space crd": ({"x": [2, 12, 3, 5]}, [node("DepthToSpace", "x", "y", blocksize=2, mode="CRD")], {}),
    "space to depth": ({"x": [2, 3, 6, 4]}, [node("SpaceToDepth", "x", "y", blocksize=2)], {}),
    "conv then blocks": ({"x": [1, 8, 4, 6]}, [node("Conv", "x w", "c"), node("DepthToSpace", "c", "d", blocksize=2),
                                               node("SpaceToDepth", "d", "y", blocksize=2)], {"w": floats(8, 8, 1, 1)}),
    "resize nearest": (X, [node("Resize", "x - s", "y", coordinate_transformation_mode="asymmetric",
                                nearest_mode="floor")], {"s": np.array([1, 1, 2, 2], np.float32)}),
    "resize linear": (X, [node("Resize", "x - - s", "y", mode="linear",
                               coordinate_transformation_mode="pytorch_half_pixel")], {"s": i64(1, 6, 13, 4)}),
    "resize corners": (X, [node("Resize", "x - - s", "y", mode="linear",
                                coordinate_transformation_mode="align_corners")], {"s": i64(1, 6, 20, 3)}),
    "whole vectors": (
        {"x": [2, 32, 9, 7]},
        [node("Conv", "x w", "c"), node("MaxPool", "c", "m", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 1, 0]),
         node("AveragePool", "m", "a", kernel_shape=[2, 2], pads=[1, 0, 0, 1], count_include_pad=1),
         node("Resize", "a - - s", "r", mode="linear"), node("GlobalMaxPool", "r", "g"),
         node("ReduceMean", "r", "n", axes=[2]), node("ReduceMin", "n", "l", axes=[2], keepdims=0),
         node("Mul", "g n", "y"), node("ReduceL2", "l", "z", axes=[0])],
        {"w": floats(32, 32, 1, 1, scale=0.2), "s": i64(2, 32, 11, 9)}),
    "a constant output": (X, [node("Relu", "x", "y"), node("Identity", "k", "z")], {"k": floats(2, 3)}),
    "an input as output": (X, [node("Identity", "x", "y"), node("Transpose", "x", "z")], {}),
    "large sums": ({"x": [1, 2, 300, 300]}, [node("ReduceMean", "x", "y", axes=[2, 3])], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_compute_what_onnx_runtime_does(name, device, traits):
    inputs, nodes, constants = CASES[name]
    outputs = ["y", "z"] if any("z" in n.output for n in nodes) else ["y"]

    agrees(model(nodes, inputs, outputs, **constants), device, traits)


ACTIVATIONS = {
    "Relu": {}, "Sigmoid": {}, "Tanh": {}, "HardSwish": {}, "HardSigmoid": {"alpha": 1 / 6, "beta": 0.5},
    "LeakyRelu": {}, "Gelu": {}, "Clip": {},
    "Elu": {}, "Celu": {"alpha": 0.7}, "Selu": {}, "ThresholdedRelu": {"alpha": 0.3},
    "Softplus": {}, "Softsign": {}, "Mish": {}, "Exp": {}, "Abs": {}, "Neg": {}, "Floor": {}, "Ceil": {}, "Round": {},
    "Erf": {}, "Sin": {}, "Cos": {}, "Sign": {}, "Reciprocal": {},
}


def test_functions_of_one_number(device, traits):
    """A few of them in each launch, which are added: kernels take long to compile."""
    more = {"Clip": " zero six"}
    variants = [*ACTIVATIONS.items(), ("LeakyRelu", {"alpha": 0.3}), ("HardSigmoid", {}),
                ("Gelu", {"approximate": "tanh"})]
    nodes = [node(op, f"x{more.get(op, '')}", f"a{i}", **own) for i, (op, own) in enumerate(variants)]
    sums = [range(i, min(i + 5, len(variants))) for i in range(0, len(variants), 5)]
    nodes += [node("Sum", " ".join(f"a{i}" for i in part), f"s{k}") for k, part in enumerate(sums)]
    graph = model(nodes, {"x": [4, 300]}, [f"s{k}" for k in range(len(sums))], opset=20, zero=np.float32(0),
                  six=np.float32(6))
    plan = agrees(graph, device, traits, 2e-6, {"x": floats(4, 300, scale=2)})

    assert len(plan.steps) == len(sums)


FUSED = ("Relu", "Clip", "Sigmoid", "Tanh", "Gelu", "HardSwish", "HardSigmoid", "LeakyRelu", "Swish")


def test_activations_behind_a_convolution_are_its_own(device, traits):
    """And those with other numbers, which kernels do not have, are not."""
    nodes = [node("Conv", "x w", "c0"), node("Sigmoid", "c0", "s"), node("Mul", "c0 s", "y0")]
    for i, op in enumerate(FUSED[:-1], 1):
        nodes += [node("Conv", "x w", f"c{i}"), node(op, f"c{i}{' zero six' if op == 'Clip' else ''}", f"y{i}",
                                                     **ACTIVATIONS[op])]
    nodes += [node("Conv", "x w", "c9"), node("HardSigmoid", "c9", "y9")]
    graph = model(nodes, {"x": [1, 3, 5, 7]}, [f"y{i}" for i in range(10)], opset=20, w=floats(4, 3, 1, 1),
                  zero=np.float32(0), six=np.float32(6))
    plan = agrees(graph, device, traits, 2e-6, {"x": floats(1, 3, 5, 7, scale=2)})
    found = [x.operators for x in plan.network.layers if isinstance(x.what, Convolution)]

    assert found == ["Conv+Swish", *(f"Conv+{op}" for op in FUSED[:-1]), "Conv"]


def test_softmax_of_old_opsets_goes_over_all_that_follows(device, traits):
    graph = model([node("Softmax", "x", "y", axis=1)], {"x": [2, 3, 4]}, ["y"], opset=11)

    agrees(graph, device, traits)


# fusion


def problems(graph, kind):
    """(operators, problem) of layers of this kind."""
    normal = fusing.normal(graph)
    found = operators.network(normal, fusing.groups(normal))
    return [(x.operators, x.what) for x in found.layers if isinstance(x.what, kind)], found


def residual(first):
    """conv -> bn -> relu -> conv -> bn, plus the input, -> relu; the sum in both orders."""
    ones = {f"{k}{i}": np.abs(floats(8)) + 0.5 for i in "12" for k in "gbmv"}
    return model(
        [node("Relu", "x", "r"), node("Conv", "r w1", "c1", pads=[1] * 4),
         node("BatchNormalization", "c1 g1 b1 m1 v1", "n1"), node("Relu", "n1", "r1"),
         node("Conv", "r1 w2", "c2", pads=[1] * 4), node("BatchNormalization", "c2 g2 b2 m2 v2", "n2"),
         node("Add", "n2 r" if first else "r n2", "a"), node("Relu", "a", "y")],
        {"x": [1, 8, 6, 6]}, ["y"], w1=floats(8, 8, 3, 3, scale=0.2), w2=floats(8, 8, 3, 3, scale=0.2), **ones)


@pytest.mark.parametrize("first", [True, False])
def test_a_residual_block_is_two_launches(first, device, traits):
    graph = residual(first)
    found, _ = problems(graph, Convolution)

    assert [(o, c.residual, c.activation) for o, c in found] == [
        ("Conv+Relu", False, "relu"), ("Conv+Add+Relu", True, "relu")]
    agrees(graph, device, traits)


def test_of_two_convolutions_that_are_added_the_later_takes_the_sum(device, traits):
    graph = model([node("Relu", "x", "r"), node("Conv", "x a", "p"), node("Conv", "r b", "q"), node("Add", "p q", "s"),
                   node("Relu", "s", "y")], {"x": [1, 3, 5, 5]}, ["y"], a=floats(4, 3, 1, 1), b=floats(4, 3, 1, 1))
    found, _ = problems(graph, Convolution)

    assert [o for o, _ in found] == ["Conv", "Conv+Add+Relu"]
    agrees(graph, device, traits)


def test_what_somebody_else_reads_is_not_fused_away(device, traits):
    graph = model([node("Conv", "x w", "c"), node("Relu", "c", "r"), node("Add", "r c", "y")],
                  {"x": [1, 3, 5, 5]}, ["y"], w=floats(4, 3, 1, 1))
    found, _ = problems(graph, Convolution)

    assert [o for o, _ in found] == ["Conv"]
    agrees(graph, device, traits)
    graph = model([node("Conv", "x w", "y"), node("Relu", "y", "z")], {"x": [1, 3, 5, 5]}, ["y", "z"],
                  w=floats(4, 3, 1, 1))
    agrees(graph, device, traits)


def test_a_product_takes_bias_residual_and_activation(device, traits):
    graph = model([node("Relu", "x", "r"), node("MatMul", "r w", "m"), node("Add", "b m", "a"), node("Add", "a r", "s"),
                   node("Tanh", "s", "y")], {"x": [2, 5, 8]}, ["y"], w=floats(8, 8), b=floats(8))
    (found,), _ = problems(graph, Product)

    assert found == ("MatMul+Add+Add+Tanh", Product(1, 10, 8, 8, residual=True, activation="tanh"))
    agrees(graph, device, traits)


def test_factors_behind_a_product_are_its_scale(device, traits):
    """Not those behind the sum."""
    graph = model([node("MatMul", "x z", "m"), node("Mul", "c m", "a"), node("Div", "a d", "b"),
                   node("Add", "b r", "s"), node("Mul", "s c", "y")],
                  {"x": [2, 5, 8], "z": [2, 8, 6], "r": [2, 5, 6]}, ["y"], c=np.float32(3), d=np.float32(4))
    (found,), _ = problems(graph, Product)

    assert found == ("MatMul+Mul+Div+Add", Product(2, 5, 8, 6, batched=True, scale=0.75, residual=True))
    agrees(graph, device, traits)


def test_an_empty_third_input_leaves_room_for_a_bias(device, traits):
    """The sum behind it was lost."""
    graph = model([node("Conv", "x w -", "c"), node("Add", "c b", "y")], {"x": [1, 4, 5, 6]}, ["y"],
                  w=floats(3, 4, 3, 3), b=floats(3, 1, 1))
    assert [k for k, _ in problems(graph, Convolution)[0]] == ["Conv+Add"]
    agrees(graph, device, traits)


def test_gemm_adds_matrices_with_a_factor_and_two_of_them(device, traits):
    for third, more in (("c", {"beta": 2.0}), ("z", {"beta": -0.5}), ("c", {}), ("z", {"alpha": 0.5})):
        graph = model([node("Gemm", f"x w {third}", "g", **more), node("Add", "g u", "s"), node("Relu", "s", "y")],
                      {"x": [3, 4], "u": [3, 5]} | ({"z": [3, 5]} if third == "z" else {}), ["y"],
                      w=floats(4, 5), **({"c": floats(3, 5)} if third == "c" else {}))
        agrees(graph, device, traits)


@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_numbers_of_attributes_that_no_source_can_hold(device, traits, number):
    graph = model([node("Conv", "x w", "c"), node("LeakyRelu", "c", "y", alpha=float(number))], {"x": [1, 4, 5, 6]},
                  ["y"], w=floats(3, 4, 1, 1))
    agrees(graph, device, traits)
    graph = model([node("Gemm", "x w", "y", alpha=float(number))], {"x": [3, 4]}, ["y"], w=floats(4, 5))
    with pytest.raises(UnsupportedError, match=f"Gemm: its alpha is {number}"):
        compile_network(graph, traits)


def test_an_own_add_is_not_fused():
    """Whatever a domain of its own means by it."""
    nodes = [node("Conv", "x w", "c"), onnx.helper.make_node("Add", ["c", "z"], ["y"], domain="own")]
    graph = onnx.helper.make_graph(nodes, "net", [onnx.helper.make_tensor_value_info(n, F, [1, 4, 3, 3]) for n in "xz"],
                                   [onnx.helper.make_tensor_value_info("y", F, [1, 4, 3, 3])],
                                   [onnx.numpy_helper.from_array(floats(4, 4, 1, 1), "w")])
    proto = onnx.helper.make_model(graph, ir_version=10, opset_imports=[
        onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("own", 1)])
    graph = fusing.normal(load(proto.SerializeToString()))
    with pytest.raises(UnsupportedError, match="Add: an operator of own"):
        operators.network(graph, fusing.groups(graph))


@pytest.mark.parametrize(("numbers", "fused"), [((1e30, 1e30), 1), ((1e-30, 1e-30), 1), ((1e30, 1e-30), 2)])
def test_factors_that_no_kernel_has_together_are_left_apart(device, traits, numbers, fused):
    """1e30 twice is infinity: of 0 it made NaN."""
    graph = model([node("MatMul", "x z", "m"), node("Mul", "m a", "n"), node("Mul", "n b", "y")],
                  {"x": [1, 5, 8], "z": [1, 8, 6]}, ["y"], a=np.float32(numbers[0]), b=np.float32(numbers[1]))
    assert problems(graph, Product)[0][0][0] == "MatMul" + "+Mul" * fused
    agrees(graph, device, traits, feeds={"x": np.zeros((1, 5, 8), np.float32), "z": floats(1, 8, 6)})


@pytest.mark.parametrize(("op", "number"), [("Mul", np.inf), ("Mul", np.nan), ("Div", 1e-45)])
def test_a_factor_that_no_kernel_can_have_is_left_apart(device, traits, op, number):
    """Infinity, NaN, and 1 / 1e-45, which float32 has not."""
    graph = model([node("MatMul", "x z", "m"), node(op, "m c", "y")], {"x": [1, 5, 8], "z": [1, 8, 6]}, ["y"],
                  c=np.float32(number))
    (found,), _ = problems(graph, Product)
    assert found == ("MatMul", Product(1, 5, 8, 6, batched=False))
    feeds = {"x": floats(1, 5, 8), "z": floats(1, 8, 6)}
    y = compile_network(graph, traits).open(device).run(feeds)["y"]
    np.testing.assert_array_equal(y, reference(graph, feeds)[0])  # infinity of both signs, or NaN


def attention(mask=None, scaled="Mul", heads=3, tokens=12, depth=8):
    width = heads * depth
    shape = i64(2, tokens, heads, depth)
    nodes = []
    for n in "qkv":
        nodes += [node("MatMul", f"x w{n}", f"{n}0"), node("Reshape", f"{n}0 shape", f"{n}1"),
                  node("Transpose", f"{n}1", n, perm=[0, 2, 3, 1] if n == "k" else [0, 2, 1, 3])]
    nodes += [node("MatMul", "q k", "s0"), node(scaled, "s0 c", "s1")]
    if mask is not None:
        nodes.append(node("Add", "s1 mask", "s2"))
    nodes += [node("Softmax", "s2" if mask is not None else "s1", "p", axis=-1), node("MatMul", "p v", "o"),
              node("Transpose", "o", "t", perm=[0, 2, 1, 3]), node("Reshape", "t last", "y")]
    number = np.float32(depth**-0.5 if scaled == "Mul" else depth**0.5)
    return model(nodes, {"x": [2, tokens, width]}, ["y"], c=number, shape=shape, last=i64(2, tokens, width),
                 **({} if mask is None else {"mask": mask}), **{f"w{n}": floats(width, width) for n in "qkv"})


def causal(tokens, low=-np.inf):
    return np.where(np.tril(np.ones((tokens, tokens), bool)), 0, low).astype(np.float32)[None, None]


@pytest.mark.parametrize("scaled", ["Mul", "Div"])
def test_attention_is_one_launch(scaled, device, traits):
    graph = attention(scaled=scaled)
    (found,), _ = problems(graph, Attention)

    assert found[0] == f"MatMul+{scaled}+Softmax+MatMul"
    assert (found[1].batch, found[1].queries, found[1].keys, found[1].depth, found[1].width) == (6, 12, 12, 8, 8)
    assert found[1].scale == pytest.approx(8**-0.5)
    assert not found[1].causal
    agrees(graph, device, traits)


def test_a_causal_mask_is_the_kernels_own_and_others_are_added(device, traits):
    graph = attention(causal(12))
    (found,), _ = problems(graph, Attention)
    assert found[1].causal
    agrees(graph, device, traits)

    for mask in (causal(12, low=-1.0), floats(12, 12), floats(1, 1, 1, 12)):
        graph = attention(mask)
        assert problems(graph, Attention)[0] == []
        agrees(graph, device, traits)


def scores(opset=17, mask=None, **softmax):
    return model([node("Transpose", "k", "t", perm=[0, 2, 1]), node("MatMul", "q t", "s"),
                  *([] if mask is None else [node("Add", "s mask", "m")]),
                  node("Softmax", "s" if mask is None else "m", "p", **softmax), node("MatMul", "p v", "y")],
                 {n: [2, 3, 4] for n in "qkv"}, ["y"], opset, **({} if mask is None else {"mask": mask}))


@pytest.mark.parametrize(("opset", "axis", "fused"), [
    (11, None, 0), (11, 1, 0), (11, 2, 1), (11, -1, 1), (13, None, 1), (13, 2, 1), (13, 1, 0)])
def test_the_softmax_of_attention_goes_along_the_keys(device, traits, opset, axis, fused):
    """Up to opset 12 it is over all axes behind the first unless the node says otherwise."""
    graph = scores(opset, **({} if axis is None else {"axis": axis}))
    assert len(problems(graph, Attention)[0]) == fused
    agrees(graph, device, traits)


@pytest.mark.parametrize(("key", "value"), [([2, 3, 5], [2, 3, 4]), ([2, 3, 4], [2, 5, 4])])
def test_attention_of_what_does_not_fit_is_refused(key, value):
    """Its kernels would read behind the end; shapes that the file states hide it."""
    sizes = {"q": [2, 3, 4], "k": key, "v": value}
    nodes = [node("Transpose", "k", "t", perm=[0, 2, 1]), node("MatMul", "q t", "s"), node("Softmax", "s", "p"),
             node("MatMul", "p v", "y")]
    graph = onnx.helper.make_graph(
        nodes, "net", [onnx.helper.make_tensor_value_info(n, F, s) for n, s in sizes.items()],
        [onnx.helper.make_tensor_value_info("y", F, [2, 3, 4])],
        value_info=[onnx.helper.make_tensor_value_info(n, F, [2, 3, 3]) for n in "sp"])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    graph = fusing.normal(load(proto.SerializeToString()))
    found = fusing.groups(graph)
    assert [g.kind for g in found if g.kind != "single"] == ["attention"]
    with pytest.raises(UnsupportedError, match="it multiplies rows of"):
        operators.network(graph, found)


def test_a_mask_that_gives_scores_another_axis_is_added(device, traits):
    graph = scores(mask=causal(3).reshape(1, 1, 3, 3), axis=-1)
    assert problems(graph, Attention)[0] == []
    agrees(graph, device, traits)


def test_layer_norm_is_found_in_its_parts(device, traits):
    graph = model([node("ReduceMean", "x", "m", axes=[-1]), node("Sub", "x m", "d"), node("Pow", "d two", "q"),
                   node("ReduceMean", "q", "v", axes=[-1]), node("Add", "v e", "ve"), node("Sqrt", "ve", "s"),
                   node("Div", "d s", "n"), node("Mul", "n g", "ng"), node("Add", "ng b", "y")],
                  {"x": [2, 7, 20]}, ["y"], two=np.float32(2), e=np.float32(1e-5), g=floats(20), b=floats(20))
    found, whole = problems(graph, LayerNorm)

    assert len(found) == len(whole.layers) == 1
    agrees(graph, device, traits)


def test_functions_in_a_chain_are_one_launch(device, traits):
    graph = model([node("Add", "x k", "a"), node("Clip", "a lo hi", "b"), node("Mul", "b x", "c"),
                   node("Exp", "c", "d"), node("Transpose", "d", "e", perm=[0, 2, 3, 1]), node("Div", "e k", "y")],
                  {"x": [1, 4, 5, 6]}, ["y"], k=np.float32(3), lo=np.float32(-0.5), hi=np.float32(4.5))

    # two at the most: the result is asked for in another order than it is computed best in
    assert len(problems(graph, object)[1].layers) == 1
    agrees(graph, device, traits)


def test_moves_move_nothing_until_somebody_needs_them_dense():
    graph = model([node("Conv", "x w", "c"), node("Transpose", "c", "t", perm=[0, 2, 3, 1]),
                   node("Reshape", "t s", "r"), node("MatMul", "r v", "y")],
                  {"x": [1, 3, 4, 5]}, ["y"], w=floats(8, 3, 1, 1), v=floats(8, 6), s=i64(1, 20, 8))
    _, whole = problems(graph, object)

    # the picture comes channels first and must be turned once; channels last is what the product reads
    assert [type(x.what).__name__ for x in whole.layers] == ["Map", "Convolution", "Product"]


# views


@pytest.mark.parametrize("seed", range(60))
def test_views_are_numpys(seed):
    """Random transposes, slices and reshapes: the view's addresses are those of NumPy's view."""
    r = np.random.default_rng(seed)
    shape = tuple(r.integers(1, 5, r.integers(1, 5)))
    whole = np.arange(np.prod(shape)).reshape(shape)
    view, array = dense(0, [int(n) for n in shape]), whole
    for _ in range(6):
        match r.integers(0, 4):
            case 0:
                perm = [int(p) for p in r.permutation(array.ndim)]
                view, array = view.transposed(perm), array.transpose(perm)
            case 1 if array.ndim:
                axis = int(r.integers(0, array.ndim))
                step = int(r.choice([-2, -1, 1, 2]))
                places = range(array.shape[axis])[::step]
                view = view.sliced(axis, places.start, len(places), step)
                array = array[(slice(None),) * axis + (slice(None, None, step),)]
            case 2 if array.ndim > 1:
                axis = int(r.integers(0, array.ndim - 1))
                other = (*array.shape[:axis], array.shape[axis] * array.shape[axis + 1], *array.shape[axis + 2 :])
                changed = view.reshaped([int(n) for n in other])
                base = array.reshape(other)
                # no view where NumPy has one would be a needless copy; a view where it has none is wrong
                assert (changed is not None) == np.shares_memory(base, whole)
                if changed is not None:
                    view, array = changed, base
            case 3:
                wide = (2, *array.shape)
                view, array = view.broadcast([int(n) for n in wide]), np.broadcast_to(array, wide)
    flat = np.ravel(whole)
    index = view.offset + sum((np.arange(n).reshape([-1 if i == k else 1 for k in range(len(view.shape))]) * s
                               for i, (n, s) in enumerate(zip(view.shape, view.strides, strict=True))),
                              start=np.zeros(view.shape, int))
    assert view.shape == array.shape
    np.testing.assert_array_equal(flat[index], array)
    assert view.is_dense == (array.size == 0 or (index == np.arange(index.size).reshape(index.shape)).all()
                             ) or 0 in view.strides
    merged, (steps,) = collapsed(view.shape, [view.strides])
    assert np.prod(merged) == np.prod(view.shape)
    walk = [view.offset + sum(i * s for i, s in zip(place, steps, strict=True)) for place in np.ndindex(merged)]
    np.testing.assert_array_equal(walk, index.reshape(-1))
    assert sorted(nested(view)) == list(range(len(view.shape)))


def test_strides_of_dense_tensors():
    assert row_major((2, 3, 4)) == (12, 4, 1)
    assert not View(0, (2, 3), (1, 2)).is_dense
    assert View(0, (2, 3), (1, 2)).transposed((1, 0)).is_dense


# memory


@pytest.mark.parametrize("seed", range(40))
def test_no_two_tensors_that_live_at_the_same_time_overlap(seed):
    r = np.random.default_rng(seed)
    count, steps = int(r.integers(1, 40)), 20
    needs = []
    for i in range(count):
        first, last = sorted(int(t) for t in r.integers(-1, steps + 1, 2))
        needs.append(Need(f"t{i}", int(r.integers(0, 5000)), first, last))
    largest = 1 << 62 if seed % 2 else 12_000
    found = arranged(needs, 128, largest)

    for time in range(-1, steps + 1):  # every byte of every moment has one owner at most
        owners = [np.full(size, -1) for size in found.sizes]
        for i, n in enumerate(needs):
            if n.first <= time <= n.last:
                arena, at = found.places[n.name]
                assert at % 128 == 0
                assert at + n.size <= found.sizes[arena] <= largest
                assert (owners[arena][at : at + n.size] == -1).all()
                owners[arena][at : at + n.size] = i
    assert found.bytes <= found.apart
    if largest > 1 << 60:
        assert found.bound <= found.bytes


def test_a_tensor_larger_than_any_buffer_is_said():
    with pytest.raises(CapacityError) as e:
        arranged([Need("t0", 5000, 0, 1)], 128, 4096)

    assert str(e.value) == ("the device has no buffer for one of the network's tensors\n"
                            "  got     5000 bytes\n  want    at most 4096")


def test_memory_is_used_again(traits):
    graph = load(zoo.build("mobilenet-v2", 64))
    plan = compile_network(graph, traits)
    arenas = plan.arenas()

    assert arenas.bytes < arenas.apart / 3
    assert arenas.bytes == arenas.bound
    weights = sum(v.elements for v in graph.values if v.is_constant and v.dtype.value == "float32")
    assert weights * 4 <= plan.weights < 2 * weights * 4  # packed, and padded to tiles or transformed


def test_a_network_that_does_not_fit_is_refused_before_anything_is_allocated(device, traits, monkeypatch):
    plan = compile_network(load(zoo.build("squeezenet", 32)), traits)
    small = type("", (), {"mem_base_addr_align": 1024, "global_mem_size": 1 << 20})()
    monkeypatch.setattr(device, "device", small)
    monkeypatch.setattr(device, "allocate", lambda size: pytest.fail("allocated"))
    with pytest.raises(CapacityError) as e:
        plan.open(device)

    assert "does not fit" in str(e.value)
    assert "want    at most 1048576 bytes" in str(e.value)


# whole networks


@pytest.mark.parametrize(("name", "size"), [
    ("repvgg-a2", 32), ("mobilenet-v2", 32), ("vit-tiny", 32)])
def test_networks_of_the_zoo(name, size, device, traits):
    graph = load(zoo.build(name, size))

    agrees(graph, device, traits, 1e-5, random_inputs(graph, 0))


def test_a_network_runs_again_and_again(device, traits):
    graph = residual(True)
    opened = compile_network(graph, traits).open(device)
    one, other = random_inputs(graph, 1), random_inputs(graph, 2)
    first = opened.run(one)["y"]
    second = opened.run(other)["y"]

    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(opened.run(one)["y"], first)


def test_what_is_not_a_number_stays_so(device, traits):
    graph = model([node("Conv", "x w", "c"), node("Relu", "c", "y")], {"x": [1, 2, 3, 3]}, ["y"], w=floats(4, 2, 1, 1))
    x = floats(1, 2, 3, 3)
    x[0, 0, 1, 1] = np.nan
    found = compile_network(graph, traits).open(device).run({"x": x})["y"]

    assert np.isfinite(np.delete(found.reshape(4, 9), 4, 1)).all()
    graph = model([node("MaxPool", "x", "y", kernel_shape=[2, 2]), node("ReduceMax", "x", "z", axes=[2]),
                   node("Add", "x x", "w")], {"x": [1, 2, 3, 3]}, ["y", "z", "w"])
    found = compile_network(graph, traits).open(device).run({"x": x})
    assert np.isnan(found["y"][0, 0]).all()  # ONNX Runtime's pool forgets one that another number follows
    assert np.isfinite(found["y"][0, 1]).all()
    np.testing.assert_array_equal(found["z"], x.max(2, keepdims=True))
    np.testing.assert_array_equal(found["w"], x + x)


@needs_shared
@pytest.mark.parametrize("name", ["ad01_fp32", "pretrainedResnet"])
def test_tflite_networks_against_litert(name, device, traits):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter(
        str(MODELS / "float" / f"{name}.tflite"), num_threads=1)
    interpreter.allocate_tensors()
    graph = load(MODELS / "float" / f"{name}.tflite")
    feeds = random_inputs(to_onnx(graph, keep_layout=True), 0)
    for d in interpreter.get_input_details():
        interpreter.set_tensor(d["index"], feeds[d["name"]])
    interpreter.invoke()
    wanted = {d["name"]: interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()}
    found = compile_network(graph, traits).open(device).run(feeds)

    assert set(found) == set(wanted)
    for n, x in found.items():
        np.testing.assert_allclose(x, wanted[n], rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(wanted[n]).max())))


@needs_shared
def test_weights_that_are_stored_as_integers_are_floats(device, traits):
    """LiteRT would round the activations of such a network, too; ONNX Runtime does not."""
    graph = to_onnx(load(MODELS / "float" / "kws_ref_model_float32.tflite"), keep_layout=True)

    agrees(graph, device, traits, 1e-5, random_inputs(graph, 0))


# what cannot be


def test_every_node_without_a_kernel_is_named():
    graph = model([node("Det", "x", "d"), node("Relu", "x", "r"), node("CumSum", "r a", "s"), node("Det", "r", "e"),
                   node("Add", "d e", "y")],
                  {"x": [2, 3, 3]}, ["y", "s"], a=np.array(1, np.int32))
    with pytest.raises(UnsupportedError) as e:
        compile_network(graph, GPU)

    text = str(e.value)
    assert text.startswith("'model' has nodes that there are no OpenCL kernels for\n")
    assert "Det: no such kernel (2: d, e)" in text
    assert "CumSum: no such kernel (1: s)" in text
    assert "--device onnxruntime" in text


def test_nodes_are_refused_with_the_reason():
    graph = model([node("TopK", "x k", "v i"), node("Resize", "p - s", "c", mode="cubic"),
                   node("Conv", "p w", "y")],
                  {"x": [2, 9], "p": [1, 3, 4, 4], "w": [2, 3, 1, 1]}, ["v", "c", "y"], k=i64(2),
                  s=np.array([1, 1, 2, 2], np.float32))
    with pytest.raises(UnsupportedError) as e:
        compile_network(graph, GPU)

    assert "Resize: mode cubic (1: c)" in str(e.value)
    assert "Conv: its weights are computed (1: y)" in str(e.value)
    assert "TopK: its result is of int64 (1: v)" in str(e.value)


def test_nodes_that_break_the_rules_are_refused():
    graph = model([node("Conv", "x w", "y", strides=[2]), node("LeakyRelu", "x", "z", alpha="steep")],
                  {"x": [1, 3, 4, 4]}, ["y", "z"], w=floats(2, 3, 1, 1))
    with pytest.raises(UnsupportedError) as e:
        operators.network(graph, fusing.groups(graph))

    assert "Conv: the size of its result is known only when it runs (1: y)" in str(e.value)
    assert "LeakyRelu: its attributes or operands do not fit it, ValueError: " in str(e.value)


def test_inputs_that_are_no_floats_are_refused():
    graph = onnx.helper.make_graph(
        [node("Cast", "x", "y", to=F)], "n", [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.INT64, [2])],
        [onnx.helper.make_tensor_value_info("y", F, [2])])
    opsets = [onnx.helper.make_opsetid("", 17)]
    with pytest.raises(UnsupportedError, match="the input 'x' of 'model' is not of floats"):
        compile_network(load(onnx.helper.make_model(graph, opset_imports=opsets).SerializeToString()), GPU)


def test_inputs_of_no_fixed_size_are_refused():
    graph = model([node("Relu", "x", "y")], {"x": [1, 3, "height", "width"]}, ["y"])
    with pytest.raises(UsageError, match="the input 'x' of 'model' has no fixed size"):
        compile_network(graph, GPU)


def test_inputs_are_checked(device, traits):
    opened = compile_network(model([node("Relu", "x", "y")], {"x": [2, 3]}, ["y"]), traits).open(device)
    good = np.zeros((2, 3), np.float32)
    for feeds, text in (({}, "has inputs that are not given"), ({"x": good, "z": good}, "has no input 'z'"),
                        ({"x": good.astype(np.float64)}, "want    float32[2, 3]\n  got     float64[2, 3]"),
                        ({"x": good[:1]}, "got     float32[1, 3]")):
        with pytest.raises(UsageError) as e:
            opened.run(feeds)
        assert text in str(e.value)


def test_plans_for_gpus_have_groups_that_they_take():
    """No GPU is here: what can be checked is that launches obey OpenCL's rules."""
    for name in ("mobilenet-v2", "vit-tiny", "yolov8n"):
        for step in compile_network(load(zoo.build(name, 64)), GPU).steps:
            size, group = step.launch.size, step.launch.group
            assert len(size) == len(group)
            assert all(s % g == 0 and s > 0 for s, g in zip(size, group, strict=True))
            assert np.prod(group) <= GPU.group_max


# the command


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(zoo.build("squeezenet", 32, classes=10))
    x = RNG.random((1, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return path, tmp_path / "x.npy", x


def test_a_network_runs_from_the_command_line(small, device, capsys, tmp_path):
    path, array, x = small
    out = tmp_path / "y.npz"
    assert run_arguments(["run", str(path), "--device", "opencl:0", "--input", str(array), "--output", str(out)]) == 0
    text = capsys.readouterr().out
    (wanted,) = reference(load(path), {"input": x})

    np.testing.assert_allclose(np.load(out)["output"], wanted, rtol=1e-5, atol=1e-5)
    assert "net on opencl:0, " in text
    assert "Device's clock: " in text
    assert "uploaded once" in text
    assert max(map(len, text.replace(str(out), "").splitlines())) <= 80


def test_kernels_are_tuned_kept_and_used(device, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = np.random.default_rng(0).standard_normal((16, 8, 3, 3)).astype(np.float32)
    graph = model([node("Conv", "input w", "output", pads=[1, 1, 1, 1])], {"input": (1, 8, 12, 12)}, ["output"],
                  w=weights)
    path, array, out = tmp_path / "c.onnx", tmp_path / "x.npy", tmp_path / "y.npz"
    path.write_bytes(exported(graph))
    x = np.random.default_rng(1).standard_normal((1, 8, 12, 12)).astype(np.float32)
    np.save(array, x)
    arguments = ["run", str(path), "--device", "opencl:0", "--input", str(array), "--output", str(out), "--json"]
    assert run_arguments([*arguments, "--tune", "6"]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"] == 1
    assert len(list((tmp_path / "cache" / "npulab" / "kernels").iterdir())) == 1
    assert run_arguments(arguments) == 0
    assert json.loads(capsys.readouterr().out)["tuned"] == 1
    np.testing.assert_allclose(np.load(out)["output"], reference(graph, {"input": x})[0], rtol=1e-5, atol=1e-5)
    assert run_arguments([*arguments, "--tuned", str(tmp_path / "none")]) == 0
    assert json.loads(capsys.readouterr().out)["tuned"] == 0


def test_attention_is_tuned_too(device, traits, tmp_path, monkeypatch):
    """Of a network its attention is a problem that has candidates; what is chosen of them is used."""
    from npulab.cli.run_opencl import tune_all
    from npulab.gpu.compute import choices, tuner
    from npulab.gpu.compute.network import layers_of, planned, tunable

    network = layers_of(attention())
    (what,) = (w for w in tunable(network) if isinstance(w, Attention))
    first, *_, last = choices.candidates(what, traits)
    monkeypatch.setattr(choices, "candidates", lambda w, *a: [first, last] if w == what else [])
    tune_all(network, device, traits, tmp_path, 120, lambda line: None)
    assert len(list(tmp_path.iterdir())) == 1
    assert tuner.best(tmp_path, device, traits, what) in (first, last)
    kernels = [[s.launch.kernel for s in planned(network, traits, {what: choice}.get).steps
                if s.launch.label == "attention"] for choice in (None, first, last)]
    assert [len(k) for k in kernels] == [1, 1, 1]
    assert kernels[0] == kernels[1] != kernels[2]


def test_json_has_layers_memory_and_how_far_from_the_roof(small, device, capsys, tmp_path):
    path, array, _ = small
    probe = tmp_path / "gpu.json"
    rows = [{"name": n, "value": v, "unit": u, "status": "measured"} for n, v, u in (
        ("fma float32 rate", 1e12, "operations/s"), ("memory bandwidth", 100.0, "GB/s"))]
    probe.write_text(json.dumps({"identity": {"name": "it"}, "quantities": rows}))
    arguments = ["run", str(path), "--device", "opencl:0", "--input", str(array), "--repeat", "2"]
    assert run_arguments([*arguments, "--probe", str(probe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert (found["where"], found["runs"]) == ("opencl:0", 2)
    assert found["memory"]["tensors_bytes"] < found["memory"]["tensors_apart_bytes"]
    layer = next(x for x in found["layers"] if x["title"] == "fire2/squeeze" or "Conv" in x["operators"])
    assert layer["bound"] in ("compute", "memory")
    assert layer["least_seconds"] == pytest.approx(max(layer["operations"] / 2e12, layer["traffic"] / 1e11))
    assert sum(x["seconds"] for x in found["layers"]) > 0
    assert "device's own clock" in found["device_seconds_are"]

    assert run_arguments([*arguments, "--probe", str(probe)]) == 0
    text = capsys.readouterr().out
    assert "of roof" in text
    assert max(map(len, text.splitlines())) <= 80

    refused = {"value": None, "status": "refused", "why": "its work was not counted in compiled code"}
    for left, none, some in ((1, "Not in the roof: the probe's", "of roof"), (0, "No roof: the probe's", "share")):
        probe.write_text(json.dumps({"identity": {"name": "it"}, "quantities": [
            {**row, **(refused if k >= left else {})} for k, row in enumerate(rows)]}))
        assert run_arguments([*arguments, "--probe", str(probe)]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"{none} memory bandwidth: refused: its work was not counted in compiled code." in text
        assert some in text
        assert ("of roof" in text) == (left > 0)

def test_onnx_runtime_by_name(small, capsys):
    path, array, _ = small
    assert run_arguments(["run", str(path), "--device", "onnxruntime", "--input", str(array)]) == 0
    assert "in ONNX Runtime" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "code", "text"), [
    (["--device", "cuda"], 2, "there is no device 'cuda'\n  want    onnxruntime"),
    (["--device", "opencl:x"], 2, "there is no device 'opencl:x'"),
    (["--device", "opencl:0", "--target", "a311d"], 2, "--target compiles it for a chip"),
    (["--probe", "p.json"], 2, "--probe is for OpenCL devices"),
    (["--patience", "9"], 2, "--patience is for OpenCL devices"),
    (["--device", "opencl:0", "--compare", "litert"], 2, "--compare is not for OpenCL devices"),
    (["--device", "opencl:0", "-o", "y.txt"], 2, "cannot tell how to write"),
])
def test_wrong_usage(small, capsys, arguments, code, text):
    path, array, _ = small
    assert run_arguments(["run", str(path), "--input", str(array), *arguments]) == code
    assert text in capsys.readouterr().err


def test_no_such_device_is_said(small, device, capsys):
    path, array, _ = small
    assert run_arguments(["run", str(path), "--input", str(array), "--device", "opencl:99"]) == 4
    assert "there is no OpenCL device 99" in capsys.readouterr().err


BROKEN = {"strides": ({"strides": [0, 0]}, "strides 0, 0"), "dilations": ({"dilations": [0, 1]}, "dilations 0, 1"),
          "group": ({"group": 0}, "group 0"), "negative": ({"strides": [1, -1]}, "strides 1, -1")}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", [
    ["run", "--input", "x.npy", "--device", "opencl:0"], ["run", "--input", "x.npy"], ["check", "--target", "a311d"],
    ["check", "--target", "hailo8"], ["quantize", "--data", "x.npy", "--target", "a311d", "-o", "q.tflite"],
    ["patch", "--target", "hailo8", "-o", "p.onnx"], ["teardown"], ["convert", "-o", "c.tflite"]],
    ids=lambda c: "-".join(w.strip("-") for w in c if "." not in w))
def test_strides_dilations_and_groups_below_one_are_the_file_s_fault(npulab, tmp_path, monkeypatch, name, command):
    """Whoever reads it: one message. A group of 0 ended ONNX Runtime's process, and ours with it."""
    more, text = BROKEN[name]
    monkeypatch.chdir(tmp_path)
    made = onnx.helper.make_model(onnx.helper.make_graph(
        [node("Conv", "x w", "y", **more)], "net", [onnx.helper.make_tensor_value_info("x", F, [1, 4, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", F, [1, 4, 6, 6])],
        [onnx.numpy_helper.from_array(floats(4, 4, 3, 3), "w")]), opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=10)
    onnx.save(made, "broken.onnx")
    np.save("x.npy", floats(1, 4, 8, 8))
    code, out, err = npulab(command[0], "broken.onnx", *command[1:])
    assert (code, out) == (3, "")
    assert err == f"npulab: error: Conv 'y' of 'broken' has {text}\n  want    at least 1\n"


MISFITS = {
    "groups": (node("Conv", "x w", "y", group=3), {"w": floats(4, 4, 3, 3)}, [1, 4, 6, 6]),
    "channels": (node("Conv", "x w", "y"), {"w": floats(4, 3, 3, 3)}, [1, 4, 6, 6]),
    "bias": (node("Conv", "x w b", "y"), {"w": floats(4, 4, 3, 3), "b": floats(3)}, [1, 4, 6, 6]),
    "kernel": (node("Conv", "x w", "y", kernel_shape=[2, 2]), {"w": floats(4, 4, 3, 3)}, [1, 4, 7, 7]),
    "pads": (node("Conv", "x w", "y", pads=[1, 1, 1, 1, 0, 0]), {"w": floats(4, 4, 3, 3)}, [1, 4, 8, 8]),
    "far strides": (node("Conv", "x w", "y", strides=[2**31, 2**31]), {"w": floats(4, 4, 3, 3)}, [1, 4, 1, 1]),
    "far dilations": (node("Conv", "x w", "y", dilations=[2**31, 2**31]), {"w": floats(4, 4, 1, 1)}, [1, 4, 8, 8]),
    "far pads": (node("Conv", "x w", "y", pads=[2**31, 0, 2**31, 0], strides=[2**31, 1]), {"w": floats(4, 4, 3, 3)},
                 [1, 4, 3, 6]),
    "transposed bias": (node("ConvTranspose", "x w b", "y"), {"w": floats(4, 4, 3, 3), "b": floats(3)}, [1, 4, 10, 10]),
    "transposed groups": (node("ConvTranspose", "x w", "y", group=3), {"w": floats(4, 4, 3, 3)}, [1, 12, 10, 10]),
    "inner": (node("Gemm", "x w", "y"), {"w": floats(3, 5)}, [8, 5], [8, 8]),
    "inner turned": (node("Gemm", "x w", "y", transA=1, transB=1), {"w": floats(5, 3)}, [8, 5], [8, 8]),
    "inner of two": (node("Gemm", "x x", "y"), {}, [4, 8], [4, 8]),
    "axes": (node("Gemm", "x w", "y"), {"w": floats(8, 5)}, [4, 5]),
    "inner of a product": (node("MatMul", "x w", "y"), {"w": floats(3, 5)}, [1, 4, 8, 5]),
    "inner of a batch": (node("MatMul", "x x", "y"), {}, [2, 4, 8], [2, 4, 8]),
    "too small": (node("MatMul", "x w", "y"), {"w": floats(8, 5)}, [1, 4, 8, 2]),
    "too small gemm": (node("Gemm", "x w", "y"), {"w": floats(8, 5)}, [8, 2], [8, 8]),
    "too few axes": (node("MatMul", "x w", "y"), {"w": floats(8, 5)}, [8, 5]),
    "another function": (node("Relu", "x", "y"), {}, [1, 4, 8, 7]),
    "pool far": (node("MaxPool", "x", "y", kernel_shape=[2, 2], strides=[2**31, 2**31]), {}, [1, 4, 1, 1]),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_together_is_refused_with_its_node(device, traits, monkeypatch, name):
    """Not a defect of npulab, and no kernel that reads behind a buffer's end. Graphs need not come from a file, whose
    channels and groups are looked at when it is read."""
    monkeypatch.setattr(importers.onnx, "_check_groups", lambda *_: None)
    n, constants, out, *given = MISFITS[name]
    x = given[0] if given else [1, 4, 8, 8]
    graph = onnx.helper.make_graph([n], "net", [onnx.helper.make_tensor_value_info("x", F, x)],
                                   [onnx.helper.make_tensor_value_info("y", F, out)],
                                   [onnx.numpy_helper.from_array(a, k) for k, a in constants.items()])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    with pytest.raises(UnsupportedError, match="has nodes that there are no OpenCL kernels for") as e:
        compile_network(load(proto.SerializeToString()), traits)
    assert e.value.facts["got"].startswith(f"{n.op_type}: ")


def test_a_device_that_is_lost_leaves_no_file(small, device, capsys, tmp_path, monkeypatch):
    from npulab.gpu.compute.device import Device

    def lost(self, launches, buffers):
        def run():
            raise DeviceError("the device failed", got="OUT_OF_RESOURCES")

        return run

    monkeypatch.setattr(Device, "prepared", lost)
    path, array, _ = small
    out = tmp_path / "y.npz"
    assert run_arguments(["run", str(path), "--input", str(array), "--device", "opencl:0", "-o", str(out)]) == 4
    assert "npulab: error: the device failed" in capsys.readouterr().err
    assert not out.exists()


def test_a_kernel_that_hangs_ends_the_command(small, device, tmp_path):
    path, array, _ = small
    out = tmp_path / "y.npz"
    code = """
import sys
from queue import SimpleQueue
from dataclasses import replace
import npulab.gpu.compute.network as n
from npulab.cli import run_arguments
lowered = n.lowered
def hanging(layer, traits, choose):
    first, *rest = (found := lowered(layer, traits, choose)).launches
    source = first.kernel.source.replace(") {", ") { volatile int on = 1; while (on);")
    return replace(found, launches=(replace(first, kernel=replace(first.kernel, source=source)), *rest))
n.lowered = hanging
sys.exit(run_arguments(sys.argv[1:]))
"""
    for patience in (3, 30, 90):  # a busy machine takes longer to compile kernels than the first
        done = subprocess.run(
            [sys.executable, "-c", code, "run", str(path), "--input", str(array), "--device", "opencl:0", "-o",
             str(out), "--patience", str(patience)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 4
        assert f"did not answer for {patience} s\n  where   " in done.stderr
        if "  where   launch " in done.stderr:
            break
    assert "  where   launch 1 of " in done.stderr
    assert "--patience SECONDS gives a slow one more time" in done.stderr
    assert not list(tmp_path.glob("y*"))


def test_work_that_goes_on_is_not_silent():
    from types import SimpleNamespace

    from npulab.gpu.compute.watch import Doing, watched

    doing = Doing()
    assert doing.silent() == (0, "")
    doing.begin("launches")
    events = [SimpleNamespace(command_execution_status=s) for s in (0, 1, 3)]
    doing.labels, doing.events, doing.since = "abc", events, doing.since - 100
    seconds, what = doing.silent()  # one has ended since
    assert seconds < 50
    assert what == "launch 2 of 3, b"
    doing.since -= 100
    assert doing.silent()[0] > 50  # nothing has
    said = SimpleQueue()
    with watched(doing, 0.01, said.put):
        assert said.get(timeout=60) == "launch 2 of 3, b"
    assert said.empty()
    doing.end()
    assert doing.silent() == (0, "")


def test_a_launch_that_cannot_be_asked_for_has_not_ended():
    """Of a device that is lost: the watch goes on, or nobody would notice that it hangs, too."""
    from npulab.gpu.compute.watch import Doing, watched

    class Lost:
        @property
        def command_execution_status(self):
            raise RuntimeError("clGetEventInfo failed: OUT_OF_RESOURCES")

    doing = Doing()
    doing.begin("launches")
    doing.labels, doing.events, said = ["a"], [Lost()], SimpleQueue()
    with watched(doing, 0.01, said.put):
        assert said.get(timeout=10) == "launch 1 of 1, a"


def test_launches_that_begin_while_the_last_are_looked_at_are_counted_anew():
    from types import SimpleNamespace

    from npulab.gpu.compute.watch import Doing

    class Last:
        """Of launches that have ended: the next ones begin meanwhile."""

        @property
        def command_execution_status(self):
            doing.begin("launches")
            doing.labels, doing.events = "xy", [SimpleNamespace(command_execution_status=s) for s in (0, 1)]
            return 0

    doing = Doing()
    doing.begin("launches")
    doing.labels, doing.events = "a", [Last()]
    doing.silent()
    doing.since -= 100
    seconds, what = doing.silent()  # the first of the new ones has ended since
    assert seconds < 50
    assert what == "launch 2 of 2, y"


def test_a_kernel_that_does_not_compile_is_said(device, traits, monkeypatch):
    from npulab.gpu.compute import moves
    from npulab.gpu.compute.types import Kernel

    monkeypatch.setattr(moves, "map_kernel", lambda *a: Kernel("__kernel void map() { nonsense; }", "map"))
    plan = compile_network(model([node("Relu", "x", "y")], {"x": [2, 3]}, ["y"]), traits)
    with pytest.raises(DeviceError, match="does not compile the kernel 'map'"):
        plan.open(device)


def test_importing_needs_no_driver():
    code = ("import sys, npulab.gpu.compute.network; "
            "assert not {'pyopencl', 'onnx', 'onnxruntime'} & set(sys.modules)")

    subprocess.run([sys.executable, "-c", code], check=True)
