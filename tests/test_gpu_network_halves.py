"""Whole networks in float16 on an OpenCL device: of files in float16, and float32 ones stored so between layers."""

import numpy as np
import pytest

from npulab import zoo
from npulab.errors import UnsupportedError
from npulab.exporters.onnx import to_onnx as exported
from npulab.gpu.compute.network import compile_network
from npulab.importers import load
from npulab.passes.certificate import random_inputs, session
from test_gpu_network import CASES, GPU, floats, model, node

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
    nodes = []
    for n in proto.graph.node:
        nodes.append(n)
        for i, name in enumerate(n.output):
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
