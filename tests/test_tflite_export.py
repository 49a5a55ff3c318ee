"""Parts cut out of TFLite models compute what the whole computes; files we write are files that LiteRT runs."""

import contextlib
import random
import struct

import numpy as np
import pytest

from npulab.errors import InvariantError, ModelError, UsageError
from npulab.exporters.tflite import cut, write_tflite
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.formats.flatbuffer import Table
from npulab.formats.tflite import schema
from npulab.importers import load
from npulab.ir import DType
from shared import MODELS, needs_shared


def interpreter(data: bytes):
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="needs LiteRT: pip install 'npulab[litert]'")
    run = litert.Interpreter(model_content=bytes(data), num_threads=1, experimental_preserve_all_tensors=True,
                             experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF)
    run.allocate_tensors()
    return run


def random_input(detail, rng):
    if np.issubdtype(detail["dtype"], np.floating):
        return rng.standard_normal(detail["shape"]).astype(detail["dtype"])
    info = np.iinfo(detail["dtype"])
    return rng.integers(info.min, info.max + 1, detail["shape"]).astype(detail["dtype"])


def run_whole(data: bytes, seed: int):
    """An interpreter of the whole model after one run on random inputs; every tensor keeps its value."""
    run, rng = interpreter(data), np.random.default_rng(seed)
    for detail in run.get_input_details():
        run.set_tensor(detail["index"], random_input(detail, rng))
    run.invoke()
    return run


def boundary(graph, nodes):
    """(inputs, outputs) of a part: what it reads from outside, what is read outside or leaves the model."""
    made = [v for n in nodes for v in graph.nodes[n].outputs]
    read = [v for n in nodes for v in graph.nodes[n].inputs if v >= 0]
    inputs = [v for v in dict.fromkeys(read) if v not in made and not graph.values[v].is_constant
              and not graph.values[v].is_variable]
    chosen = set(nodes)
    outputs = [v for v in made if v in graph.outputs or any(c.index not in chosen for c in graph.consumers.get(v, ()))]
    return inputs, outputs


def expect_same(path, nodes, seed=1):
    """Cut `nodes` out, feed the part what the whole model computed, compare every output bit for bit."""
    graph = load(path)
    nodes = [n % len(graph.nodes) for n in nodes]
    inputs, outputs = boundary(graph, nodes)
    whole = run_whole(graph.source, seed)
    part = interpreter(cut(graph, nodes, inputs, outputs))
    for v, detail in zip(inputs, part.get_input_details(), strict=True):
        assert detail["name"] == graph.values[v].name
        part.set_tensor(detail["index"], whole.get_tensor(v))
    part.invoke()
    assert outputs
    for v, detail in zip(outputs, part.get_output_details(), strict=True):
        np.testing.assert_array_equal(part.get_tensor(detail["index"]), whole.get_tensor(v))
    return graph, part


QUANTIZED = MODELS / "quantized"


@needs_shared
@pytest.mark.parametrize(("name", "nodes"), [
    ("mobilenet_v1_0.25_128_quant", range(-4, 0)),
    ("mobilenet_v1_0.25_128_quant", range(6, 12)),
    ("mobilenet_v1_0.25_128_quant", [0]),
    ("keras_lstm_mnist_ptq", range(6)),
    ("pretrainedResnet_quant", range(3, 9)),
    ("movenet_single_pose_lightning_ptq", range(-40, 0)),
    ("ssdlite_mobiledet_coco_qat_postprocess", [-1]),
    ("yolov8n_full_integer_quant_416", range(-60, 0)),
    ("split_concat", range(3)),
])
def test_a_part_computes_what_it_computes_in_the_whole(name, nodes):
    expect_same(QUANTIZED / f"{name}.tflite", nodes)


@needs_shared
def test_a_part_of_a_float_model_computes_the_same():
    expect_same(MODELS / "float" / "pretrainedResnet.tflite", range(2, 10))


@needs_shared
def test_a_part_has_only_the_tensors_and_operator_codes_it_needs():
    graph = load(QUANTIZED / "mobilenet_v1_0.25_128_quant.tflite")
    names = [n.op.name for n in graph.nodes[-4:]]
    assert names == ["AVERAGE_POOL_2D", "CONV_2D", "RESHAPE", "SOFTMAX"]
    nodes = [n.index for n in graph.nodes[-2:]]
    part = load(cut(graph, nodes, *boundary(graph, nodes)))
    model = Table.root(schema(), "Model", part.source)

    assert [n.op for n in part.nodes] == [n.op for n in graph.nodes[-2:]]
    assert model.count("operator_codes") == 2
    assert len(part.values) == 4
    assert len(part.source) < 2000
    assert model.text("description") == "npulab"


@needs_shared
def test_variables_stay_variables_and_keep_their_state_between_runs():
    path = QUANTIZED / "keras_lstm_mnist_ptq.tflite"
    graph = load(path)
    variables = [v.name for v in graph.values if v.is_variable]
    part = load(cut(graph, range(len(graph.nodes)), graph.inputs, graph.outputs))

    assert variables
    assert [v.name for v in part.values if v.is_variable] == variables
    whole, again = interpreter(graph.source), interpreter(part.source)
    rng = np.random.default_rng(3)
    for _ in range(3):
        fed = random_input(whole.get_input_details()[0], rng)
        results = []
        for run in (whole, again):
            run.set_tensor(run.get_input_details()[0]["index"], fed)
            run.invoke()
            results.append(run.get_tensor(run.get_output_details()[0]["index"]))
        np.testing.assert_array_equal(*results)


@needs_shared
def test_a_custom_operator_keeps_its_code_and_options():
    graph = load(QUANTIZED / "ssdlite_mobiledet_coco_qat_postprocess.tflite")
    last = graph.nodes[-1]
    part = load(cut(graph, [last.index], *boundary(graph, [last.index])))

    assert part.nodes[0].op == last.op
    assert last.op.name == "TFLite_Detection_PostProcess"
    assert last.op.options


@needs_shared
def test_the_same_cut_gives_the_same_bytes():
    path = QUANTIZED / "pretrainedResnet_quant.tflite"

    first, second = (cut(g, range(4, 8), *boundary(g, range(4, 8))) for g in (load(path), load(path.read_bytes())))

    assert first == second


# Models made here


def chain() -> ModelBuilder:
    """out = ((x + c) + c) + d, on floats."""
    model = ModelBuilder("chain")
    x = model.tensor("x", (4,), "float32")
    c = model.tensor("c", (4,), "float32", data=np.array([1, 2, 3, 4], np.float32))
    a, b = model.tensor("a", (4,), "float32"), model.tensor("b", (4,), "float32")
    d = model.tensor("d", (4,), "float32", data=np.array([10, 20, 30, 40], np.float32))
    out = model.tensor("out", (4,), "float32")
    for one, other, result in ((x, c, a), (a, c, b), (b, d, out)):
        model.op("ADD", [one, other], [result], fused_activation_function="NONE")
    return model


def answers(data: bytes, *inputs):
    run = interpreter(data)
    for detail, value in zip(run.get_input_details(), inputs, strict=True):
        run.set_tensor(detail["index"], np.asarray(value, detail["dtype"]))
    run.invoke()
    return [run.get_tensor(d["index"]).tolist() for d in run.get_output_details()]


def test_constants_that_lie_behind_the_flatbuffer_come_inside_once():
    model = chain().model([0], [5])
    model["buffers"][1] = {"offset": 4096, "size": 16}
    data = write_tflite(model)
    data += bytes(4096 - len(data)) + np.array([5, 6, 7, 8], np.float32).tobytes()
    part = cut(load(data), [0, 1], [0], [3])

    assert answers(part, [0, 0, 0, 0]) == [[10, 12, 14, 16]]
    assert len(part) < 1500
    buffers = list(Table.root(schema(), "Model", memoryview(part)).tables("buffers"))
    assert [(len(b.view("data") or b""), b.integer("offset")) for b in buffers] == [(0, 0), (16, 0)]


def test_inputs_and_outputs_keep_the_order_asked_for():
    graph = load(chain().build([0], [5]))
    part = cut(graph, [2, 0], [3, 0], [5, 2])

    assert answers(part, [0, 0, 0, 1], [0, 0, 0, 2]) == [[10, 20, 30, 41], [1, 2, 3, 6]]


def test_large_custom_options_behind_the_flatbuffer_come_inside():
    model = ModelBuilder("large")
    x, y = model.tensor("x", (1,), "float32"), model.tensor("y", (1,), "float32")
    model.custom("Big", [x], [y])
    content = model.model([x], [y])
    content["subgraphs"][0]["operators"][0] |= {"custom_options": None, "large_custom_options_offset": 2048,
                                                "large_custom_options_size": 5}
    data = write_tflite(content)
    graph = load(data + bytes(2048 - len(data)) + b"12345")

    assert graph.nodes[0].op.options == b"12345"
    assert load(cut(graph, [0], [x], [y])).nodes[0].op.options == b"12345"


def branches(options) -> bytes:
    """if flag: x + c else x * c; c is one buffer in both branches. Then a copy, so that there is something to leave."""
    codes = [{"deprecated_builtin_code": c, "builtin_code": c} for c in (118, 0, 18, 59)]  # IF, ADD, MUL, NEG

    def tensor(name, **more):
        return {"name": name, "shape": [2], "type": "FLOAT32", **more}

    def branch(code, options):
        return {"tensors": [tensor("x"), tensor("c", buffer=1), tensor("y")], "inputs": [0], "outputs": [2],
                "operators": [{"opcode_index": code, "inputs": [0, 1], "outputs": [2], "builtin_options": options}]}

    main = {
        "tensors": [{"name": "flag", "shape": [1], "type": "BOOL"}, tensor("x"), tensor("y"), tensor("z")],
        "inputs": [0, 1], "outputs": [3],
        "operators": [{"opcode_index": 0, "inputs": [0, 1], "outputs": [2], "builtin_options": ("IfOptions", options)},
                      {"opcode_index": 3, "inputs": [2], "outputs": [3]}],
    }
    return write_tflite({"version": 3, "operator_codes": codes, "buffers": [
        {}, {"data": np.array([3, 4], np.float32).tobytes()}], "subgraphs": [
        main, branch(1, ("AddOptions", {})), branch(2, ("MulOptions", {}))]})


def test_an_operator_that_calls_subgraphs_takes_them_along():
    graph = load(branches({"then_subgraph_index": 1, "else_subgraph_index": 2}))
    assert graph.nodes[0].op.subgraphs == (1, 2)
    part = cut(graph, [0], [0, 1], [2])

    assert answers(part, [True], [10, 10]) == [[13, 14]]
    assert answers(part, [False], [10, 10]) == [[30, 40]]
    model = Table.root(schema(), "Model", memoryview(part))
    assert (model.count("subgraphs"), model.count("buffers"), model.count("operator_codes")) == (3, 2, 3)


def test_subgraphs_that_nothing_calls_stay_behind():
    graph = load(branches({"then_subgraph_index": 1, "else_subgraph_index": 2}))

    assert Table.root(schema(), "Model", memoryview(cut(graph, [1], [2], [3]))).count("subgraphs") == 1


def test_a_subgraph_that_names_an_absent_tensor_is_refused():
    content = Table.root(schema(), "Model", load(branches({"then_subgraph_index": 1})).source).unpack()
    content["subgraphs"][2]["operators"][0]["inputs"] = [0, 9]

    with pytest.raises(ModelError, match="names tensor 9 in a subgraph that has none of that number"):
        cut(load(write_tflite(content)), [0], [0, 1], [2])


def test_an_operator_with_options_that_we_do_not_know_is_not_cut_out():
    content = chain().model([0], [5])
    content["operator_codes"][0] |= {"builtin_code": 1234}
    data = bytearray(write_tflite(content))
    operators = next(Table.root(schema(), "Model", memoryview(data)).tables("subgraphs")).tables("operators")
    for o in operators:
        data[o._find(schema().tables["Operator"]["builtin_options_type"], 1)] = 250
    graph = load(bytes(data))

    assert graph.nodes[0].op.name == "BUILTIN_1234"
    with pytest.raises(ModelError, match="the file is newer than this npulab"):
        cut(graph, [0], [0], [2])


def test_damaged_files_that_can_be_read_can_be_cut_or_are_refused():
    """Cutting visits what reading does not: other subgraphs, sparsity, the details of quantization."""
    data, rng = branches({"then_subgraph_index": 1, "else_subgraph_index": 2}), random.Random(1)
    cuts = 0
    for _ in range(1500):
        damaged = bytearray(data)
        at = rng.randrange(8, len(data) - 4) & ~3
        damaged[at : at + 4] = rng.choice([rng.randbytes(4), bytes(4), struct.pack("<I", rng.randrange(len(data)))])
        with contextlib.suppress(ModelError):
            graph = load(bytes(damaged))
            cut(graph, range(len(graph.nodes)), graph.inputs, graph.outputs)
            cuts += 1

    assert 100 < cuts < 1500


@pytest.mark.parametrize(("nodes", "inputs", "outputs", "message"), [
    ([1], [0], [3], "ADD (node 1) cannot be cut out: nothing in the part gives it what it reads\n"
     "  got     values [2]\n  want    inputs, constants, or values computed before it"),
    ([0], [0], [3], "a part of 'model' has outputs that nothing in it computes\n  got     values [3]"),
    ([7], [0], [3], "'model' has no node 7\n  want    0..2"),
    ([0], [99], [3], "'model' has no value 99\n  want    0..5"),
])
def test_a_part_that_makes_no_sense_is_refused(nodes, inputs, outputs, message):
    with pytest.raises(InvariantError) as e:
        cut(load(chain().build([0], [5])), nodes, inputs, outputs)

    assert str(e.value) == message


# ModelBuilder


def test_what_is_built_is_read_and_run():
    rng = np.random.default_rng(5)
    weights = rng.integers(-127, 128, (4, 3, 3, 2)).astype(np.int8)
    bias = rng.integers(-500, 500, 4).astype(np.int32)
    scales = [0.01, 0.02, 0.03, 0.04]
    model = ModelBuilder("conv")
    x = model.tensor("x", (1, 5, 5, 2), "int8", scale=0.5, zero_point=-3)
    w = model.tensor("w", weights.shape, "int8", scales=scales, data=weights)
    b = model.tensor("b", (4,), "int32", scales=[0.5 * s for s in scales], data=bias)
    y = model.tensor("y", (1, 3, 3, 4), "int8", scale=1.5, zero_point=7)
    model.op("CONV_2D", [x, w, b], [y], padding="VALID", stride_w=1, stride_h=1, fused_activation_function="NONE")
    data = model.build([x], [y])
    graph = load(data)

    assert [(v.name, v.shape, v.dtype) for v in graph.values[:2]] == [
        ("x", (1, 5, 5, 2), DType.INT8), ("w", (4, 3, 3, 2), DType.INT8)]
    np.testing.assert_array_equal(graph.values[w].array(), weights)
    fed = rng.integers(-128, 128, (1, 5, 5, 2)).astype(np.int8)
    (found,) = answers(data, fed)
    acc = np.zeros((3, 3, 4), np.int64)
    for i in range(3):
        for j in range(3):
            window = fed[0, i : i + 3, j : j + 3].astype(np.int64) + 3
            acc[i, j] = np.einsum("hwc,ohwc->o", window, weights.astype(np.int64)) + bias
    real = acc * 0.5 * np.array(scales) / 1.5 + 7
    assert np.abs(np.asarray(found[0]) - np.clip(real, -128, 127)).max() < 0.6


def test_tensor_data_lies_at_multiples_of_sixteen_bytes():
    model = ModelBuilder("aligned")
    for i in range(1, 9):
        model.tensor(f"c{i}", (i,), "int8", data=np.full(i, 100 + i, np.int8))
    data = model.build([], [])

    for i in range(1, 9):
        assert data.index(bytes([100 + i] * i)) % 16 == 0


def test_options_of_the_second_union_are_written_there():
    model = ModelBuilder("second")
    x, y = model.tensor("x", (2,), "float32"), model.tensor("y", (4,), "float32")
    model.op("STABLEHLO_IOTA", [x], [y], iota_dimension=3)
    op = load(model.build([x], [y])).nodes[0].op

    assert (op.name, op.attributes) == ("STABLEHLO_IOTA", {"iota_dimension": 3})


def test_equal_models_give_equal_bytes():
    assert chain().build([0], [5]) == chain().build([0], [5])


@pytest.mark.parametrize(("make", "message"), [
    (lambda m: m.op("CONV2D", [], []), "TFLite has no operator 'CONV2D'\n"
     "  try     the names of BuiltinOperator, such as CONV_2D"),
    (lambda m: m.op("RELU", [], [], alpha=1.0), "RELU takes no options\n  got     alpha"),
    (lambda m: m.op("SOFTMAX", [], [], betta=1.0), "SOFTMAX has no option betta\n  want    beta"),
    (lambda m: m.tensor("t", (2, 3), "int16", data=np.zeros(6, np.int8)),
     "the data of tensor 't' has the wrong size\n  got     6 bytes\n  want    12 bytes for int16[2, 3]"),
])
def test_a_mistake_in_a_built_model_is_named(make, message):
    with pytest.raises(UsageError) as e:
        make(ModelBuilder("wrong"))

    assert str(e.value) == message


def test_an_element_type_that_tflite_lacks_is_refused():
    with pytest.raises(UsageError, match="tensor 't' cannot have type 'int3'"):
        ModelBuilder("wrong").tensor("t", (1,), "int3")


def test_an_option_value_that_tflite_lacks_is_refused():
    model = ModelBuilder("wrong")
    model.op("MAX_POOL_2D", [], [], padding="FULL")

    with pytest.raises(UsageError) as e:
        model.build([], [])

    assert str(e.value) == "Pool2DOptions.padding cannot be 'FULL'\n  want    SAME, VALID"
