"""The teardown: a published table row by row, layers by hand, real models against the topologies built from code."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from layers import Layers
from npulab import zoo
from npulab.cli import run_arguments
from npulab.cli.options import parse_dims
from npulab.errors import ModelError, UsageError
from npulab.importers import load
from npulab.teardown import as_data, fold, layers, tear_down, totals
from shared import MODELS, needs_shared

onnx = pytest.importorskip("onnx")
F = onnx.TensorProto.FLOAT

REPVGG = [
    # repeat, size, channels in, out, kB of input, kB of weights, M MACs: fp16, 224 x 224
    (1, 224, 3, 64, 294, 3, 22), (1, 112, 64, 96, 1568, 108, 173), (1, 56, 96, 96, 588, 162, 260),
    (1, 56, 96, 192, 588, 324, 130), (3, 28, 192, 192, 294, 648, 260), (1, 28, 192, 384, 294, 1296, 130),
    (13, 14, 384, 384, 147, 2592, 260), (1, 14, 384, 1408, 147, 9504, 238),
]
"""RepVGG-A2's convolutions: the breakdown in github.com/collabora/compute-benchmarks begins and ends so, and has totals
of 6272 kB, 47037 kB and 5116 M. It prints 12 repeats of the 14 x 14 layer; its totals are of 13, as is the network."""


@pytest.fixture(scope="module")
def repvgg(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "repvgg-a2.onnx"
    path.write_bytes(zoo.build("repvgg-a2"))
    return path


def test_the_published_breakdown_row_by_row(repvgg, capsys):
    assert run_arguments(["teardown", str(repvgg), "--dtype", "fp16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert [(r["repeat"], r["in_size"], r["in_channels"], r["out_channels"], round(r["input_kb"]),
             round(r["weight_kb"]), round(r["mmacs"])) for r in found["rows"]] == REPVGG
    assert {k: round(v) for k, v in found["totals"].items() if not isinstance(v, dict)} == {
        "layers": 22, "input_kb": 6272, "weight_kb": 47037, "mmacs": 5116}
    assert found["rows"][0]["weight_kb"] == 3.375  # 64 x 3 x 3 x 3 of 2 bytes: biases are not counted
    assert found["rows"][6]["names"] == [f"stage3/{i}/conv" for i in range(1, 14)]
    assert found["dtype"] == "fp16"


def test_the_classifier_is_left_out_where_it_is_a_trifle_and_a_row_with_all(repvgg, capsys):
    assert run_arguments(["teardown", str(repvgg), "--dtype", "fp16", "--all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (last,) = (r for r in found["rows"] if r["op"] == "Gemm")

    assert (last["in_size"], last["in_channels"], last["out_channels"]) == (1, 1408, 1000)
    assert (last["input_kb"], last["weight_kb"], last["mmacs"]) == (2.75, 2750, 1.408)
    assert {k: round(v) for k, v in found["totals"]["convolutions"].items()} == {
        "layers": 22, "input_kb": 6272, "weight_kb": 47037, "mmacs": 5116}
    assert found["totals"]["fully_connected"]["weight_kb"] == 2750
    assert run_arguments(["teardown", str(repvgg), "--dtype", "fp16"]) == 0
    assert "1.41 M MACs and 2,750 kB of weights, are not shown" in " ".join(capsys.readouterr().out.split())


def test_fully_connected_layers_are_rows_where_they_work(tmp_path, capsys):
    path = tmp_path / "vit.onnx"
    path.write_bytes(zoo.build("vit-tiny"))

    assert run_arguments(["teardown", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["totals"]
    assert found["fully_connected"]["mmacs"] > found["convolutions"]["mmacs"] > 0


def test_the_table_says_the_same_in_80_columns(repvgg, capsys):
    assert run_arguments(["teardown", str(repvgg), "--dtype", "fp16"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()

    assert max(map(len, lines)) <= 80
    assert re.search(r"^13 x +conv 3x3 +14 +384>384 +147 +2,592 +260 +66\.1 +#+$", text, re.M)
    assert re.search(r"^ +conv 3x3/2 +14 +384>1408 +147 +9,504 +238 +4\.7 +#$", text, re.M)
    assert "22 convolutions: 6,272 kB of inputs, 47,037 kB of weights, 5,116 M MACs" in text
    shares = [float(m) for m in re.findall(r" (\d+\.\d)(?: +#+)?$", "\n".join(lines[1:9]), re.M)]
    assert len(shares) == 8
    assert sum(shares) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize(("numbers", "times"), [("fp32", 2), (None, 2), ("int8", 0.5)])
def test_bytes_follow_the_number_format(repvgg, numbers, times):
    found = totals(tear_down(load(repvgg), numbers), "convolution")

    assert (found.input_kb, found.weight_kb) == (6272 * times, 47037.375 * times)


# layers by hand, ONNX


def model(nodes, inputs, outputs, constants=()):
    """The Graph of an ONNX model of these nodes; tensors as (name, type, shape), constants as (name, array)."""
    graph = onnx.helper.make_graph(
        nodes, "t", [onnx.helper.make_tensor_value_info(*i) for i in inputs],
        [onnx.helper.make_tensor_value_info(*o) for o in outputs],
        [onnx.numpy_helper.from_array(a, n) for n, a in constants])
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    return load(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def one(graph, numbers=None, everything=True):
    """The only layer that multiplies."""
    found = [x for x in layers(graph, numbers) if x.macs]
    assert len(found) == 1
    return found[0]


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def node(op, inputs, output="y", **attributes):
    return onnx.helper.make_node(op, inputs, [output], "n", **attributes)


@pytest.mark.parametrize(("attributes", "shape", "weights", "label", "out", "macs"), [
    ({}, (1, 6, 9, 11), (4, 6, 3, 3), "conv 3x3", (7, 9), 7 * 9 * 4 * 6 * 9),
    ({"strides": [2, 1], "pads": [1, 0, 1, 0]}, (2, 6, 9, 11), (4, 6, 3, 1), "conv 3x1/2x1", (5, 11), 2 * 55 * 4 * 18),
    ({"group": 2}, (1, 6, 8, 8), (4, 3, 1, 1), "gconv 1x1", (8, 8), 64 * 4 * 3),
    ({"group": 6, "dilations": [2, 2]}, (1, 6, 8, 8), (12, 1, 3, 3), "dw 3x3", (4, 4), 16 * 12 * 9),
    ({}, (1, 5, 20), (7, 5, 4), "conv 1x4", (17,), 17 * 7 * 5 * 4),
    ({"strides": [2, 2, 2]}, (1, 2, 4, 6, 8), (3, 2, 2, 2, 2), "conv 2x2x2/2", (2, 3, 4), 24 * 3 * 2 * 8),
])
def test_a_convolution(attributes, shape, weights, label, out, macs):
    g = model([node("Conv", ["x", "w"], **attributes)], [("x", F, shape)], [("y", F, (shape[0], weights[0], *out))],
              [("w", zeros(*weights))])
    found = one(g)

    assert (found.label, found.kind, found.macs) == (label, "convolution", macs)
    assert (found.in_channels, found.out_channels) == (shape[1], weights[0])
    assert found.in_size == (shape[2:] if len(shape) > 3 else (1, shape[2]))
    assert (found.input_bits, found.weight_bits) == (32 * np.prod(shape), 32 * np.prod(weights))


def brute_transposed(shape, weights, groups):
    """Multiplications of a transposed convolution, one by one."""
    count, channels = 0, shape[1]
    for _n in range(shape[0]):
        for c in range(channels):
            for _pixel in range(shape[2] * shape[3]):
                count += sum(1 for o in range(weights[1] * groups) if o // weights[1] == c // (channels // groups)
                             for _tap in range(weights[2] * weights[3]))
    return count


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution(groups):
    shape, weights = (1, 4, 5, 3), (4, 6 // groups, 2, 2)
    g = model([node("ConvTranspose", ["x", "w"], strides=[2, 2], group=groups)], [("x", F, shape)],
              [("y", F, (1, 6, 10, 6))], [("w", zeros(*weights))])
    found = one(g)

    assert found.macs == brute_transposed(shape, weights, groups)
    assert (found.label, found.in_channels, found.out_channels, found.in_size) == ("deconv 2x2/2", 4, 6, (5, 3))


@pytest.mark.parametrize(("op", "attributes", "shapes", "label", "size", "channels", "macs"), [
    ("Gemm", {"transB": 1}, ((1, 20), (7, 20)), "fc", (1, 1), (20, 7), 140),
    ("Gemm", {"transA": 1}, ((20, 3), (20, 7)), "fc", (1, 3), (20, 7), 420),
    ("MatMul", {}, ((1, 5, 20), (20, 7)), "matmul", (1, 5), (20, 7), 700),
    ("MatMul", {}, ((2, 5, 20), (2, 20, 7)), "matmul", (1, 10), (20, 7), 1400),
    ("MatMul", {}, ((1, 20), (20,)), "fc", (1, 1), (20, 1), 20),
])
def test_a_product_with_constant_weights(op, attributes, shapes, label, size, channels, macs):
    a, b = shapes
    out = np.broadcast_shapes(a[:-2], b[:-2]) + (
        (a[1] if attributes.get("transA") else a[-2],) + (((b[0] if attributes.get("transB") else b[-1]),)
                                                          if len(b) > 1 else ()))
    found = one(model([node(op, ["a", "b"], **attributes)], [("a", F, a)], [("y", F, out)], [("b", zeros(*b))]))

    assert (found.label, found.kind, found.in_size, found.macs) == (label, "fully connected", size, macs)
    assert (found.in_channels, found.out_channels) == channels
    assert (found.input_bits, found.weight_bits) == (32 * np.prod(a), 32 * np.prod(b))


def test_weights_may_be_on_the_left():
    found = one(model([node("MatMul", ["w", "x"])], [("x", F, (1, 20, 5))], [("y", F, (1, 7, 5))],
                      [("w", zeros(7, 20))]))

    assert (found.kind, found.in_channels, found.out_channels, found.macs) == ("fully connected", 20, 7, 700)
    assert (found.input_bits, found.weight_bits) == (3200, 32 * 140)


def test_a_product_of_two_data_is_shown_with_all_only():
    g = model([node("MatMul", ["a", "b"])], [("a", F, (1, 3, 5, 20)), ("b", F, (1, 3, 20, 7))],
              [("y", F, (1, 3, 5, 7))])

    assert tear_down(g) == ()
    (row,) = tear_down(g, everything=True)
    assert (row.layer.kind, row.layer.macs, row.layer.weight_bits) == ("other", 3 * 5 * 7 * 20, 0)


def test_quantized_weights_count_as_the_integers_that_they_are():
    """QDQ: data and weights are dequantized just before the convolution."""
    scale, zero = np.array(0.1, np.float32), np.array(0, np.int8)
    g = model([onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
               onnx.helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
               onnx.helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["w"]), node("Conv", ["xd", "w"])],
              [("x", F, (1, 4, 8, 8))], [("y", F, (1, 6, 8, 8))],
              [("s", scale), ("z", zero), ("wq", zeros(6, 4, 1, 1, dtype=np.int8))])
    found = one(g)

    assert (found.input_bits, found.weight_bits) == (8 * 256, 8 * 24)
    assert one(g, "fp16").weight_bits == 16 * 24


def test_integer_operators_and_half_precision():
    u8, one_scale, nought = onnx.TensorProto.UINT8, np.array(1, np.float32), np.array(0, np.uint8)
    names = ["x", "s", "z", "w", "s", "z", "s", "z"]
    g = model([node("QLinearConv", names)], [("x", u8, (1, 4, 8, 8))], [("y", u8, (1, 6, 6, 6))],
              [("s", one_scale), ("z", nought), ("w", zeros(6, 4, 3, 3, dtype=np.uint8))])
    assert (one(g).weight_bits, one(g).macs) == (8 * 216, 36 * 216)
    half = onnx.TensorProto.FLOAT16
    g = model([node("Conv", ["x", "w"])], [("x", half, (1, 4, 8, 8))], [("y", half, (1, 6, 6, 6))],
              [("w", zeros(6, 4, 3, 3, dtype=np.float16))])
    assert one(g).weight_bits == 16 * 216


def test_a_recurrent_layer_multiplies_every_matrix_once_a_step():
    g = model([onnx.helper.make_node("LSTM", ["x", "w", "r"], ["y"], "n", hidden_size=6, direction="bidirectional")],
              [("x", F, (10, 1, 5))], [("y", F, (10, 2, 1, 6))], [("w", zeros(2, 24, 5)), ("r", zeros(2, 24, 6))])

    assert one(g).macs == 10 * 2 * 24 * (5 + 6)


def test_only_equal_neighbours_fold():
    nodes = [onnx.helper.make_node("Conv", [a, w], [b], f"{a}{b}", pads=[1] * 4)
             for a, w, b in (("x", "u", "a"), ("a", "u", "b"), ("b", "v", "c"), ("c", "v", "d"), ("d", "u", "e"))]
    g = model(nodes, [("x", F, (1, 4, 8, 8))], [("e", F, (1, 4, 8, 8))],
              [("u", zeros(4, 4, 3, 3)), ("v", zeros(4, 4, 3, 3, dtype=np.float32))])
    assert [(r.repeat, r.names) for r in tear_down(g)] == [(5, ("xa", "ab", "bc", "cd", "de"))]

    found = list(layers(g))
    changed = [found[0], found[1], one(model([node("Conv", ["x", "w"])], [("x", F, (1, 4, 8, 8))],
                                             [("y", F, (1, 4, 8, 8))], [("w", zeros(4, 4, 1, 1))])), found[2]]
    assert [r.repeat for r in fold(changed)] == [2, 1, 1]
    data = as_data(fold(changed))
    assert data["totals"]["layers"] == 4
    assert data["totals"]["mmacs"] == pytest.approx(sum(r["repeat"] * r["mmacs"] for r in data["rows"]))


def test_an_open_size_is_asked_for(tmp_path, capsys):
    g = onnx.helper.make_graph(
        [node("Conv", ["x", "w"])], "t", [onnx.helper.make_tensor_value_info("x", F, ["n", 3, "height", 16])],
        [onnx.helper.make_tensor_value_info("y", F, None)], [onnx.numpy_helper.from_array(zeros(4, 3, 1, 1), "w")])
    path = tmp_path / "open.onnx"
    path.write_bytes(onnx.helper.make_model(g, opset_imports=[onnx.helper.make_opsetid("", 17)],
                                            ir_version=8).SerializeToString())

    assert run_arguments(["teardown", str(path)]) == 3
    said = capsys.readouterr().err
    assert "size of tensor 'x' of Conv (node 0) 'n' is not known" in said
    assert "--dim NAME=SIZE" in said
    assert run_arguments(["teardown", str(path), "--dim", "height=8", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["in_size"], row["mmacs"]) == ([8, 16], 8 * 16 * 12 / 1e6)


def test_a_size_that_constants_decide_is_computed():
    """PyTorch's exporter has the pads of a padding behind six operators on constants."""
    nodes = [onnx.helper.make_node("ConstantOfShape", ["n"], ["zeros"],
                                   value=onnx.numpy_helper.from_array(np.zeros(1, np.int64))),
             onnx.helper.make_node("Concat", ["some", "zeros"], ["all"], axis=0),
             onnx.helper.make_node("Reshape", ["all", "pairs"], ["rows"]),
             onnx.helper.make_node("Slice", ["rows", "from", "to", "axis", "back"], ["turned"]),
             onnx.helper.make_node("Transpose", ["turned"], ["ends"], perm=[1, 0]),
             onnx.helper.make_node("Reshape", ["ends", "flat"], ["pads"]),
             onnx.helper.make_node("Pad", ["x", "pads"], ["a"]), node("Conv", ["a", "w"])]
    numbers = {"n": [4], "some": [0, 1, 0, 1], "pairs": [-1, 2], "from": [-1], "to": [-(2**62)], "axis": [0],
               "back": [-1], "flat": [-1]}
    g = model(nodes, [("x", F, (1, 4, 8, 8))], [("y", F, (1, 4, 7, 7))],
              [("w", zeros(4, 4, 3, 3)), *((k, np.array(v, np.int64)) for k, v in numbers.items())])

    (row,) = tear_down(g)
    assert (row.names, row.layer.macs) == (("n",), 7 * 7 * 4 * 36)


# TFLite


def test_layers_of_tflite():
    b = Layers(3, signed=True)
    x = b.input(1, 9, 7, 4)
    x = b.conv(x, 8, (3, 3), stride=2)
    x = b.depthwise(x, (3, 3))
    g = load(b.build(x))
    conv, dw = (layer for layer in layers(g) if layer.macs)

    assert (conv.label, conv.in_size, conv.in_channels, conv.out_channels) == ("conv 3x3/2", (9, 7), 4, 8)
    assert (conv.input_bits, conv.weight_bits, conv.macs) == (8 * 9 * 7 * 4, 8 * 8 * 9 * 4, 5 * 4 * 8 * 9 * 4)
    assert (dw.label, dw.weight_bits, dw.macs) == ("dw 3x3", 8 * 9 * 8, 5 * 4 * 8 * 9)


@needs_shared
def test_mobilenet_v1_of_tensorflow_is_the_one_built_from_code():
    """Row by row, but for the classifier, which is a convolution in the one and fully connected in the other."""
    theirs = tear_down(load(MODELS / "quantized" / "mobilenet_v1_1.0_224_quant.tflite"))
    ours = tear_down(load(zoo.build("mobilenet-v1", classes=1001)), "int8")

    def numbers(row):
        x = row.layer
        return row.repeat, x.in_size, x.in_channels, x.out_channels, x.input_bits, x.weight_bits, x.macs

    assert list(map(numbers, theirs)) == list(map(numbers, ours))
    assert totals(theirs).mmacs == pytest.approx(569, rel=0.001)  # arXiv:1704.04861, table 4


@needs_shared
@pytest.mark.parametrize("path", sorted(MODELS.glob("*/*.tflite")), ids=lambda p: p.stem)
def test_every_real_model_can_be_torn_down(path, capsys):
    assert run_arguments(["teardown", str(path), "--all"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    g = load(path)
    assert sum(r.repeat for r in tear_down(g, everything=True)) == len(g.nodes)
    assert out.splitlines()[0].split()[-1] in ("%", "MACs")


@needs_shared
def test_half_precision_weights_behind_dequantize_are_counted_as_stored():
    g = load(MODELS / "float" / "face_detection_short_range.tflite")
    conv = next(x for x in layers(g) if x.kind == "convolution")
    node = next(n for n in g.nodes if n.op.name == "CONV_2D")

    assert g.value(node, 1).is_constant is False
    assert conv.weight_bits == 16 * g.value(node, 1).elements


# the command


@pytest.mark.parametrize("text", ["height", "=3", "h=x", "h=-1", "h=0", "h=99999999999"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match=f"--dim {text} is not NAME=SIZE"):
        parse_dims([text])


def test_two_sizes_of_one_dimension_are_refused():
    assert parse_dims(["h=3", "h=3"]) == {"h": 3}
    with pytest.raises(UsageError, match="gives h two sizes"):
        parse_dims(["h=3", "h=4"])


def test_a_dimension_name_may_have_an_equals_sign():
    assert parse_dims(["a=b=3", "x.2=4"]) == {"a=b": 3, "x.2": 4}


def test_the_command_refuses(tmp_path, capsys):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model at all")

    assert run_arguments(["teardown", str(bad)]) == 3
    assert run_arguments(["teardown", str(bad), "--dtype", "fp8"]) == 2


def test_a_model_without_layers_says_so(tmp_path, capsys):
    g = onnx.helper.make_graph([node("Relu", ["x"])], "t", [onnx.helper.make_tensor_value_info("x", F, (1, 3))],
                               [onnx.helper.make_tensor_value_info("y", F, (1, 3))])
    path = tmp_path / "relu.onnx"
    path.write_bytes(onnx.helper.make_model(g, opset_imports=[onnx.helper.make_opsetid("", 17)],
                                            ir_version=8).SerializeToString())
    assert run_arguments(["teardown", str(path)]) == 0
    assert "1 other operator is not shown" in capsys.readouterr().out
    assert run_arguments(["teardown", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == []
    assert found["totals"]["layers"] == found["totals"]["mmacs"] == 0


def test_an_operator_of_another_domain_is_not_taken_for_onnx_s_own():
    g = onnx.helper.make_graph([node("Conv", ["x"], domain="elsewhere")], "t",
                               [onnx.helper.make_tensor_value_info("x", F, (1, 3))],
                               [onnx.helper.make_tensor_value_info("y", F, (1, 3))])
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("elsewhere", 1)]
    g = load(onnx.helper.make_model(g, opset_imports=opsets, ir_version=8).SerializeToString())

    assert [x.kind for x in layers(g)] == ["other"]


def test_attributes_of_a_wrong_type_do_no_harm():
    made = node("Gemm", ["a", "b"])
    made.attribute.append(onnx.helper.make_attribute("beta", onnx.numpy_helper.from_array(zeros(2))))
    g = model([made], [("a", F, (1, 20))], [("y", F, (1, 7))], [("b", zeros(20, 7))])
    odd = replace(g.nodes[0], op=replace(g.nodes[0].op, attributes={"transB": zeros(2), "transA": "yes"}))

    assert layers(replace(g, nodes=(odd,)))[0].macs == 140


def test_a_damaged_rank_is_an_error_of_the_file():
    g = load(zoo.build("squeezenet", 32, 1))
    conv = g.nodes[0]
    values = list(g.values)
    values[conv.inputs[0]] = replace(values[conv.inputs[0]], shape=(3, 32))
    with pytest.raises(ModelError, match="too few or too many dimensions"):
        layers(replace(g, values=tuple(values)))
