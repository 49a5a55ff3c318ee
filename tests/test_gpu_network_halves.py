"""Whole networks in float16 on an OpenCL device: of files in float16, and float32 ones stored so between layers."""

import json
from dataclasses import replace

import numpy as np
import pytest

from npulab import zoo
from npulab.dialects import to_onnx
from npulab.errors import UnsupportedError
from npulab.exporters.onnx import to_onnx as exported
from npulab.gpu.compute import blocks, checks, moves, vectors, windows
from npulab.gpu.compute.network import compile_network
from npulab.gpu.compute.problems import Attention, Convolution, Product
from npulab.gpu.compute.views import row_major
from npulab.importers import load
from npulab.ir import DType
from npulab.passes.certificate import random_inputs, session
from shared import MODELS, needs_shared
from test_gpu_halves import emulated
from test_gpu_kernels import GRAPHICS, PROCESSOR, run
from test_gpu_network import CASES, GPU, attention, floats, model, node

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


def rounding(wide):
    """The network of float32 with each result of a node rounded to float16."""
    proto = onnx.ModelProto.FromString(exported(wide))
    del proto.graph.value_info[:]
    real = {v.name for v in wide.values if v.dtype is DType.FLOAT32}
    nodes = []
    for n in proto.graph.node:
        nodes.append(n)
        for i, name in enumerate(n.output):
            if name not in real:
                continue
            n.output[i] = f"{name} exact"
            nodes += [onnx.helper.make_node("Cast", [f"{name} exact"], [f"{name} half"], to=F16),
                      onnx.helper.make_node("Cast", [f"{name} half"], [name], to=F32)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return load(proto.SerializeToString())


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize(("name", "size"), [("repvgg-a2", 32), ("mobilenet-v2", 32), ("vit-tiny", 32)])
def test_networks_of_float16_are_as_exact_as_rounding_each_node_s_result(name, size, device, traits):
    """The same network in float32 whose every result is rounded, in ONNX Runtime, is the witness. Here the result of a
    group of nodes is rounded once, and the weights that BatchNormalization is folded into are: two sources of errors
    that are as large, so that their squares are at most twice as large together. (ONNX Runtime's run of the float16
    file keeps float32 between nodes on an x86 processor, and rounds outputs alone.)"""
    wide, half = rounded(load(zoo.build(name, size)))
    feeds = random_inputs(half, 0)
    same = {n: x.astype(np.float32) for n, x in feeds.items()}
    exact, each = runs(wide, same), runs(rounding(wide), same)
    plan, asked = compile_network(half, traits), compile_network(wide, traits, number="float16")
    for opened, given, kind in ((plan, feeds, np.float16), (asked, same, np.float32)):
        found = opened.open(device).run(given)
        for x, y, e in zip(found.values(), exact, each, strict=True):
            assert x.dtype == kind
            assert 0 < rms(x - y) <= 2 ** 0.5 * rms(e - y)
            assert x.argmax() == y.argmax()
    whole = compile_network(wide, traits)
    assert plan.weights < 0.52 * whole.weights  # biases stay float32
    assert plan.arenas().bytes <= 0.5 * whole.arenas().bytes


@needs_shared
@pytest.mark.parametrize("name", ["efficientnet_lite0_imagenet_float.onnx", "mobilenet_v1_0.25_224_1_default_1.tflite"])
def test_trained_networks_stored_as_float16(name, device, traits):
    """Likewise; the witness has its weights rounded, too."""
    graph = to_onnx(load(MODELS / "float" / name), keep_layout=True)
    feeds = random_inputs(graph, 0)
    found = ran(graph, feeds, device, traits, number="float16")
    for x, y, e in zip(found.values(), runs(graph, feeds), runs(rounding(rounded(graph)[0]), feeds), strict=True):
        assert 0 < rms(x - y) <= 2 ** 0.5 * rms(e - y)
        assert x.argmax() == y.argmax()


# networks of both


def typed(nodes, inputs, outputs, opset=17, **constants):
    """model() with inputs and outputs as (type, shape)."""
    def infos(of):
        return [onnx.helper.make_tensor_value_info(n, t, s) for n, (t, s) in of.items()]

    graph = onnx.helper.make_graph(nodes, "net", infos(inputs), infos(outputs),
                                   [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    return load(proto.SerializeToString())


def cast(x, y, to):
    return node("Cast", x, y, to=to)


def ran(graph, feeds, device, traits, **options):
    return compile_network(graph, traits, **options).open(device).run(feeds)


def test_a_cast_rounds_whoever_reads_it(device, traits):
    """Though nothing is stored between them."""
    graph = typed([cast("x", "h", F16), cast("h", "z", F32), node("Mul", "z z", "p"), cast("p", "q", F16),
                   cast("q", "y", F32)], {"x": (F32, [4, 300])}, {"y": (F32, None), "z": (F32, None)})
    x = floats(4, 300)
    found = ran(graph, {"x": x}, device, traits)
    z = x.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found["z"], z)
    np.testing.assert_array_equal(found["y"], (z * z).astype(np.float16).astype(np.float32))


def test_a_network_of_float16_between_casts(device, traits):
    """Inputs and outputs of float32, as converters leave them; one part that is left in float32."""
    w, v = floats(8, 3, 3, 3).astype(np.float16), floats(4, 8, 1, 1).astype(np.float16)
    graph = typed(
        [cast("x", "h", F16), node("Conv", "h w", "c", pads=[1] * 4), node("Relu", "c", "r"), cast("r", "f", F32),
         node("ReduceMean", "f", "m", axes=[2, 3]), cast("m", "g", F16), node("Conv", "g v", "d"), cast("d", "y", F32)],
        {"x": (F32, [1, 3, 9, 7])}, {"y": (F32, None), "m": (F32, None), "r": (F16, None)}, w=w, v=v)
    x = floats(1, 3, 9, 7)
    plan = compile_network(graph, traits)
    found = plan.open(device).run({"x": x})
    numbers = [layer.what.stored if hasattr(layer.what, "stored") else layer.what.number
               for layer in plan.network.layers]
    assert numbers == [("float16", "float32"), "float16", ("float32", "float16"), "float32", ("float16", "float32"),
                       "float16", ("float32", "float16"), ("float16", "float16")]
    for (n, y), z in zip(found.items(), runs(graph, {"x": x}), strict=True):
        assert y.dtype == z.dtype, n
        within(y, z, 4 * ROUNDING * np.abs(z).max())


def test_a_copy_of_one_type_is_none_of_the_other(device, traits):
    """Both pools want the same tensor with its channels last."""
    graph = typed([node("MaxPool", "x", "y", kernel_shape=[2, 2]), cast("x", "f", F32),
                   node("MaxPool", "f", "z", kernel_shape=[2, 2])], {"x": (F16, [1, 6, 5, 4])},
                  {"y": (F16, None), "z": (F32, None)})
    feeds = {"x": floats(1, 6, 5, 4).astype(np.float16)}
    found = ran(graph, feeds, device, traits)
    for x, y in zip(found.values(), runs(graph, feeds), strict=True):
        np.testing.assert_array_equal(x, y)


def test_weights_of_float16_in_a_network_of_float32(device, traits):
    """A Cast of constants is folded: all else is float32."""
    w = floats(5, 3, 1, 1).astype(np.float16)
    graph = typed([cast("w", "f", F32), node("Conv", "x f", "y")], {"x": (F32, [1, 3, 4, 4])}, {"y": (F32, None)}, w=w)
    plan = compile_network(graph, traits)
    x = floats(1, 3, 4, 4)
    (wanted,) = runs(graph, {"x": x})
    np.testing.assert_allclose(plan.open(device).run({"x": x})["y"], wanted, rtol=1e-5, atol=1e-5)
    assert {t.number for t in plan.network.tensors} == {"float32"}


@pytest.mark.parametrize("name", ["conv grouped", "max min", "norms", "layer norm", "resize linear", "whole vectors"])
def test_results_that_are_rounded_by_casts(name, device, traits):
    """Of every node, in a network of float32: as ONNX Runtime rounds them, but where float32 differs in its last
    place."""
    inputs, nodes, constants = CASES[name]
    outputs = ["y", "z"] if any("z" in n.output for n in nodes) else ["y"]
    graph = rounding(rounded(model(nodes, inputs, outputs, **constants))[0])
    feeds = {n: floats(*s).astype(np.float16).astype(np.float32) for n, s in inputs.items()}
    found = ran(graph, feeds, device, traits)
    for x, y in zip(found.values(), runs(graph, feeds), strict=True):
        np.testing.assert_array_equal(x, x.astype(np.float16))
        within(x, y, 2 * len(nodes) * ROUNDING * np.abs(y).max())
        assert (x == y).mean() > 0.9


# networks of float32, stored as float16


@pytest.mark.parametrize("name", CASES)
def test_operators_of_float32_stored_as_float16(name, device, traits):
    """Inputs and weights are rounded, too."""
    inputs, nodes, constants = CASES[name]
    outputs = ["y", "z"] if any("z" in n.output for n in nodes) else ["y"]
    wide, _ = rounded(model(nodes, inputs, outputs, **constants))
    feeds = {n: floats(*s).astype(np.float16).astype(np.float32) for n, s in inputs.items()}
    plan = compile_network(wide, traits, number="float16")
    found = plan.open(device).run(feeds)
    assert {number for *_, number in (*plan.inputs.values(), *plan.outputs.values())} == {"float32"}
    for x, y in zip(found.values(), runs(wide, feeds), strict=True):
        assert x.dtype == np.float32
        within(x, y, (ROUNDING * len(plan.steps) + 1e-5) * np.abs(y).max() + SMALLEST)


def test_a_network_of_float16_stored_as_float32(device, traits):
    wide, half = rounded(load(zoo.build("squeezenet", 32)))
    feeds = random_inputs(half, 0)
    plan = compile_network(half, traits, number="float32")
    found = plan.open(device).run(feeds)
    for x, y in zip(found.values(), runs(wide, {n: a.astype(np.float32) for n, a in feeds.items()}), strict=True):
        assert x.dtype == np.float16
        within(x, y, 1.01 * ROUNDING * np.abs(y) + 1e-5 * np.abs(y).max())
    assert {t.number for t in plan.network.tensors if t.constant is None} == {"float16", "float32"}  # inputs, outputs


def test_what_float16_has_no_room_for_is_infinite(device, traits):
    """As ONNX Runtime has it."""
    graph = typed([node("Mul", "x x", "m"), node("Conv", "m w", "y")], {"x": (F16, [1, 1, 2, 3])}, {"y": (F16, None)},
                  w=np.ones((1, 1, 1, 1), np.float16))
    x = np.array([1, 250, 255.75, 256, -300, 60000], np.float16).reshape(1, 1, 2, 3)
    found = ran(graph, {"x": x}, device, traits)["y"]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, x * x)
    np.testing.assert_array_equal(found, runs(graph, {"x": x})[0])


def test_weights_that_float16_has_no_room_for_are_said_with_their_layer(traits):
    nodes = [node("Conv", "x w", "c"), node("MatMul", "c m", "p"), node("Conv", "p v", "y"),
             node("ConvTranspose", "p w", "z")]
    graph = model(nodes, {"x": [1, 1, 4, 4]}, ["y", "z"], w=np.full((1, 1, 1, 1), 7e4, np.float32),
                  m=np.full((1, 1, 4, 4), -1e30, np.float32), v=np.full((1, 1, 1, 1), 65504, np.float32))
    with pytest.raises(UnsupportedError) as e:
        compile_network(graph, traits, number="float16")
    text = str(e.value)
    assert "Conv: its constants reach 70000, float16 ends at 65504; --number float32 has room (1: c)" in text
    assert "MatMul: its constants reach 1e+30, float16 ends at 65504; --number float32 has room (1: p)" in text
    assert "ConvTranspose: its constants reach 70000" in text
    assert "(1: y)" not in text
    compile_network(graph, traits)


def test_numbers_of_sums_may_be_beyond_float16(device, traits):
    """Masks of attention are, and biases: what is added to, and no product's operand, stays float32."""
    graph = model([node("Add", "x m", "s"), node("Softmax", "s", "y", axis=-1)], {"x": [1, 2, 5, 5]}, ["y"],
                  m=np.where(np.tri(5), 0, -1e9).astype(np.float32))
    x = floats(1, 2, 5, 5)
    (wanted,) = runs(graph, {"x": x})
    within(ran(graph, {"x": x}, device, traits, number="float16")["y"], wanted, 8 * ROUNDING)


def test_logarithms_of_probabilities_that_float16_has_not(device, traits):
    """e**-20 is less than the smallest of float16's numbers."""
    graph = typed([node("LogSoftmax", "x", "y", axis=-1)], {"x": (F16, [2, 3])}, {"y": (F16, None)})
    x = np.array([[0, -20, -4], [9, -11, 0]], np.float16)
    within(ran(graph, {"x": x}, device, traits)["y"], runs(graph, {"x": x})[0], 32 * ROUNDING)


def test_other_types_are_refused_by_name():
    bfloat = onnx.TensorProto.BFLOAT16
    for nodes, inputs, text in (
            ([node("Relu", "x", "y")], {"x": (bfloat, [2, 3])}, "the input 'x' of 'model' is not of floats\n  got     "
             "x: bfloat16[2, 3]\n  want    float32 or float16"),
            ([cast("x", "b", bfloat), cast("b", "y", F16)], {"x": (F16, [2, 3])}, "Cast: its result is of bfloat16"),
            ([cast("x", "b", onnx.TensorProto.DOUBLE), cast("b", "y", F16)], {"x": (F16, [2, 3])},
             "Cast: its result is of float64 (1: b)"),
            ([node("Relu", "x", "r"), cast("r", "y", onnx.TensorProto.INT32)], {"x": (F16, [2, 3])},
             "Cast: its result is of int32 (1: y)")):
        to = {"y": (onnx.TensorProto.INT32 if "int32" in text else bfloat if "bfloat16[" in text else F16, None)}
        with pytest.raises(UnsupportedError) as e:
            compile_network(typed(nodes, inputs, to), GPU)
        assert text in str(e.value)


# layers


def near(device, lowered, inputs, wanted, computing=1e-5):
    """Within the rounding of what is stored and what floats compute, against NumPy in float64."""
    found = run(device, lowered, inputs, wanted.shape, np.float16)
    within(found, wanted, ROUNDING * np.abs(wanted) * (1 + computing) + computing * np.abs(wanted).max() + SMALLEST)


def some(*shape):
    x = floats(*shape).astype(np.float16)
    return x, x.astype(np.float64)


WIDTHS = {"a CPU": PROCESSOR, "a GPU": GRAPHICS}
"""Vectors of as many channels, and single numbers."""
across = pytest.mark.parametrize("where", WIDTHS)
REDUCED = {"sum": np.sum, "mean": np.mean, "max": np.max, "min": np.min, "product": np.prod,
           "l1": lambda x, axis: np.abs(x).sum(axis), "l2": lambda x, axis: np.sqrt((x * x).sum(axis)),
           "squares": lambda x, axis: (x * x).sum(axis)}


@across
@pytest.mark.parametrize("kind", REDUCED)
def test_reductions(device, kind, where):
    x, exact = some(3, 17, 32)
    what = windows.Reduce(kind, x.shape, (1,), (row_major(x.shape), 0), "float16")
    near(device, windows.lower_reduce(what, WIDTHS[where]), {"input": x}, REDUCED[kind](exact, axis=1))


def test_sums_of_numbers_that_a_half_would_not_add(device):
    """2048 + 1 is 2048 in float16: sums are of floats."""
    x = np.ones((2, 5000), np.float16)
    what = windows.Reduce("sum", x.shape, (1,), (row_major(x.shape), 0), "float16")
    found = run(device, windows.lower_reduce(what, PROCESSOR), {"input": x}, (2,), np.float16)
    np.testing.assert_array_equal(found, 5000)


@across
@pytest.mark.parametrize("channels", [16, 5])
@pytest.mark.parametrize("kind", ["max", "average"])
def test_pools(device, kind, channels, where):
    x, exact = some(2, 8, 7, channels)
    what = windows.Pool(kind, (2, 8, 7, channels), (4, 5), (2, 3), (2, 1), (1, 1), (0, 0), number="float16")
    parts = np.lib.stride_tricks.sliding_window_view(exact, (2, 3), (1, 2))[:, ::2]
    wanted = parts.max((-1, -2)) if kind == "max" else parts.mean((-1, -2))
    near(device, windows.lower_pool(what, WIDTHS[where]), {"input": x}, wanted)


@across
def test_resizing(device, where):
    x, exact = some(2, 3, 4, 16)
    r = np.random.default_rng(0)
    rows, columns = r.integers(0, 3, (5, 2), np.int32), r.integers(0, 4, (6, 2), np.int32)
    by_rows, by_columns = r.random((5, 2), np.float32), r.random((6, 2), np.float32)
    wanted = np.einsum("bipjqc,ip,jq->bijc", exact[:, rows[:, :, None, None], columns], by_rows, by_columns,
                       dtype=np.float64)
    near(device, windows.lower_resample(windows.Resample((2, 3, 4, 16), (5, 6), 2, "float16"), WIDTHS[where]),
         {"input": x, "input1": rows, "input2": by_rows, "input3": columns, "input4": by_columns}, wanted)


def test_transposed_convolutions(device):
    (x, exact), (w, weights), bias = some(1, 3, 4, 6), some(5, 2, 2, 6), floats(5)
    what = windows.TransposedConvolution((1, 3, 4, 6), 5, (6, 8), (2, 2), (2, 2), (1, 1), (0, 0), 1, "float16")
    wanted = np.einsum("bhwc,fpqc->bhpwqf", exact, weights).reshape(1, 6, 8, 5) + bias
    near(device, windows.lower_transposed(what, PROCESSOR), {"input": x, "input1": w, "input2": bias}, wanted)


def test_what_is_taken_and_copied_is_the_same_to_the_bit(device):
    """Whatever it stands for: nothing is computed."""
    x = np.arange(65536, dtype=np.uint16).reshape(64, 1024).view(np.float16)
    table = np.random.default_rng(0).permutation(64).astype(np.int32)
    what = moves.Take(1, 64, 64, 1024, "float16")
    found = run(device, moves.lower_take(what, PROCESSOR), {"input": x, "input1": table}, x.shape, np.float16)
    np.testing.assert_array_equal(found.view(np.uint16), x[table].view(np.uint16))
    copy = moves.Map("{0}", (1024, 64), (((1, 1024), 0),), ((64, 1), 0), ("float16", "float16"))
    found = run(device, moves.lower_map(copy, PROCESSOR), {"input": x}, (1024, 64), np.float16)
    np.testing.assert_array_equal(found.view(np.uint16), x.T.view(np.uint16))


@pytest.mark.parametrize("stored", [("float16", "float16", "float32"), ("float32", "float16", "float16"),
                                    ("float16", "float32", "float32")])
def test_expressions_of_what_is_stored_differently(device, stored):
    (x, z), kinds = (floats(6, 50) for _ in range(2)), [np.dtype(s) for s in stored]
    x, z = x.astype(kinds[1]), z.astype(kinds[2])
    what = moves.Map("({0} * {1} + half_({1}))", (6, 50), (((50, 1), 0),) * 2, ((50, 1), 0), stored, 2)
    found = run(device, moves.lower_map(what, PROCESSOR), {"input": x, "input1": z}, (6, 50), kinds[0])
    wanted = x.astype(np.float64) * z + z.astype(np.float16).astype(np.float64)
    limit = ROUNDING if stored[0] == "float16" else 1e-6
    within(found, wanted, limit * np.abs(wanted) + 1e-6 + SMALLEST)


@across
@pytest.mark.parametrize("columns", [37, 32, 16, 15])
@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_expressions_of_operands_that_lie_in_any_way(device, where, columns, stored):
    """Row by row, column by column, backwards, one for each row, one for each column, and one for all; into a part of a
    tensor."""
    shape, wide = (3, 5, columns), columns + 4
    x, turned, back, rows, line, one = (floats(*s).astype(np.float16) for s in (
        shape, (3, columns, 5), shape, (3, 5, 1), (columns,), (1,)))
    reads = (((5 * columns, columns, 1), 0), ((5 * columns, 1, 5), 0), ((5 * columns, columns, -1), columns - 1),
             ((5, 1, 0), 0), ((0, 0, 1), 0), ((0, 0, 0), 0))
    what = moves.Map("({0} + {1} * {2} - {3} * relu_({4}) + {5})", shape, reads, ((5 * wide, wide, 1), 2),
                     (stored, *("float16",) * 6), 6)
    inputs = dict(zip(("input", *(f"input{i}" for i in range(1, 6))), (x, turned, back, rows, line, one), strict=True))
    found = run(device, moves.lower_map(what, WIDTHS[where]), inputs, (3, 5, wide), np.dtype(stored))
    x, turned, back, rows, line, one = (a.astype(np.float64) for a in inputs.values())
    wanted = x + turned.transpose(0, 2, 1) * back[..., ::-1] - rows * np.maximum(line, 0) + one
    within(found[..., 2:-2], wanted, (ROUNDING if stored == "float16" else 0) * np.abs(wanted) + 1e-5)
    assert np.isnan(found[..., :2]).all()
    assert np.isnan(found[..., -2:]).all()


# on halves


@pytest.fixture(params=["real", "emulated"])
def graphics(request, device, monkeypatch):
    """Traits of a GPU that computes on halves, whoever does."""
    if request.param == "emulated":
        for module in (vectors, blocks):
            monkeypatch.setattr(module, "half_operations", emulated)
    elif "float16" not in device.limits.elements:
        pytest.skip("needs a device that computes on halves (cl_khr_fp16)")
    return replace(GRAPHICS, halves=True)


@pytest.mark.parametrize("kind", ["grouped", "depthwise", "product"])
def test_kernels_of_networks_compute_on_halves_where_a_device_does(kind, device, graphics):
    """And not where it is a CPU, or numbers are float32."""
    if kind == "product":
        shape, nodes, constants = [1, 9, 40], [node("MatMul", "x w", "y")], {"w": floats(40, 24)}
    else:
        shape, groups = [1, 8, 9, 7], 8 if kind == "depthwise" else 2
        nodes = [node("Conv", "x w b", "c", group=groups, pads=[1] * 4), node("Relu", "c", "y")]
        constants = {"w": floats(8, 8 // groups, 3, 3), "b": floats(8)}
    _, half = rounded(model(nodes, {"x": shape}, ["y"], **constants))
    plan = compile_network(half, graphics)
    (layer,) = (x for x in plan.network.layers if isinstance(x.what, Convolution | Product))
    x = floats(*shape).astype(np.float16)
    found = plan.open(device).run({"x": x})["y"]
    weights, bias = layer.packed
    if kind == "product":
        wanted, bound = checks.product(layer.what, x, weights, bias, halves=True)
    else:
        wanted, bound = checks.convolution(layer.what, x.transpose(0, 2, 3, 1), weights, bias, halves=True)
        wanted, bound = (a.transpose(0, 3, 1, 2) for a in (wanted, bound))
    within(found, wanted, bound)

    def on_halves(plan):
        return any("HALF_FMA" in s.launch.kernel.source for s in plan.steps)

    assert on_halves(plan)
    assert not on_halves(compile_network(half, replace(PROCESSOR, halves=True)))
    assert not on_halves(compile_network(half, graphics, number="float32"))
    assert not on_halves(compile_network(half, GRAPHICS))


def test_attention_of_float16(device, graphics, traits):
    wide, half = rounded(attention())
    feeds = {"x": floats(2, 12, 24, scale=0.2).astype(np.float16)}  # scores of about 1: their errors are the result's
    (wanted,) = runs(wide, {"x": feeds["x"].astype(np.float32)})
    for where in (traits, GRAPHICS, graphics):
        plan = compile_network(half, where)
        assert sum(isinstance(x.what, Attention) for x in plan.network.layers) == 1
        within(plan.open(device).run(feeds)["y"], wanted, 8 * ROUNDING * np.abs(wanted).max())


def test_plans_for_gpus_have_groups_that_they_take_and_half_the_bytes():
    for name in ("mobilenet-v2", "yolov8n"):
        graph = load(zoo.build(name, 64))
        plan, whole = (compile_network(graph, replace(GPU, halves=True), number=n) for n in ("float16", "float32"))
        for step in plan.steps:
            size, group = step.launch.size, step.launch.group
            assert all(s % g == 0 and s > 0 for s, g in zip(size, group, strict=True))
            assert np.prod(group) <= GPU.group_max
        moved, before = (sum(s.launch.traffic for s in p.steps) for p in (plan, whole))
        assert 0.45 < moved / before < 0.65  # inputs, outputs and what Winograd keeps are float32


# the command


@pytest.fixture
def files(tmp_path):
    """A network in both types, and an input."""
    wide, half = rounded(load(zoo.build("squeezenet", 32, classes=10)))
    (tmp_path / "wide.onnx").write_bytes(exported(wide))
    (tmp_path / "half.onnx").write_bytes(exported(half))
    x = np.random.default_rng(0).random((1, 3, 32, 32)).astype(np.float16)
    np.save(tmp_path / "half.npy", x)
    np.save(tmp_path / "wide.npy", x.astype(np.float32))
    return tmp_path


@pytest.mark.parametrize(("name", "options", "stored"), [
    ("half", [], ["float16"]), ("wide", ["--number", "float16"], ["float16", "float32"]),
    ("half", ["--number", "float32"], ["float16", "float32"]), ("wide", [], ["float32"])])
def test_networks_run_from_the_command_line(files, device, npulab, monkeypatch, name, options, stored):
    monkeypatch.setenv("XDG_CACHE_HOME", str(files))
    arguments = ["run", files / f"{name}.onnx", "--input", files / f"{name}.npy", "-o", files / "y.npz", "--json"]
    code, out, _ = npulab(*arguments, "--device", "opencl:0", *options)
    assert code == 0
    assert json.loads(out)["stored_as"] == stored
    found = np.load(files / "y.npz")["output"]
    assert npulab(*arguments, "--device", "onnxruntime")[0] == 0
    wanted = np.load(files / "y.npz")["output"]
    assert found.dtype == wanted.dtype == {"half": np.float16, "wide": np.float32}[name]
    within(found, wanted.astype(np.float64), 8 * ROUNDING * np.abs(wanted).max())


def test_inputs_of_the_other_type_are_refused_as_onnx_runtime_s_are(files, device, npulab):
    said = {npulab("run", files / "half.onnx", "--input", files / "wide.npy", "--device", d)
            for d in ("opencl:0", "onnxruntime")}
    ((code, out, err),) = said
    assert (code, out) == (2, "")
    assert "wide.npy does not fit the input 'input'\n  want    float16[1, 3, 32, 32]\n  got     float32[1" in err


def test_numbers_are_for_opencl_devices(files, npulab):
    code, _, err = npulab("run", files / "wide.onnx", "--input", files / "wide.npy", "--number", "float16")
    assert code == 2
    assert "--number is for OpenCL devices\n  try     --device opencl:0" in err


def test_kernels_of_float16_are_tuned_on_their_own(device, npulab, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    graph = model([node("Conv", "x w", "y", pads=[1] * 4)], {"x": [1, 8, 12, 12]}, ["y"], w=floats(16, 8, 3, 3))
    (tmp_path / "c.onnx").write_bytes(exported(graph))
    np.save(tmp_path / "x.npy", floats(1, 8, 12, 12))
    arguments = ["run", tmp_path / "c.onnx", "--device", "opencl:0", "--input", tmp_path / "x.npy", "--json"]
    assert npulab(*arguments, "--number", "float16", "--tune", "6")[0] == 0
    (kept,) = (tmp_path / "npulab" / "kernels").iterdir()
    assert json.loads(kept.read_text())["key"]["number"] == "float16"
    assert json.loads(npulab(*arguments)[1])["tuned"] == 0
    assert json.loads(npulab(*arguments, "--number", "float16")[1])["tuned"] == 1
