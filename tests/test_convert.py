"""Quantized networks in both dialects, compiled for a chip; real models there and back; `npulab convert`."""

import contextlib
import json
import logging
from collections import Counter
from functools import cache

import numpy as np
import pytest

from dialects import check_onnx, feeds, furthest, layer_differences, replace_dynamic, run, run_converted
from npulab import api, zoo
from npulab.cli import run_arguments
from npulab.dialects import from_onnx, from_tflite
from npulab.errors import NpulabError, UnsupportedError, UsageError
from npulab.exporters.onnx import to_onnx
from npulab.importers import load
from npulab.runtime.compare import compare_layers
from shared import MODELS, model_files, needs_shared
from test_patch import Net

onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
pytest.importorskip("ai_edge_litert", reason="pip install 'npulab[litert]'")

CLOSE = 1e-5


class Pictures:
    """What ONNX Runtime's quantizer calibrates with."""

    def __init__(self, graph):
        self.left = [feeds(graph, seed) for seed in range(6)]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.fixture(scope="module")
def quantize(tmp_path_factory):
    """(model bytes, form, type of activations, of weights, per channel) -> a model that ONNX Runtime quantized."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    folder = tmp_path_factory.mktemp("quantized")

    @cache
    def made(data, form, activations, weights, per_channel=False):
        logging.disable(logging.WARNING)
        (folder / "a.onnx").write_bytes(data)
        quantize_static(folder / "a.onnx", folder / "b.onnx", Pictures(load(data)), quant_format=QuantFormat[form],
                        activation_type=QuantType[activations], weight_type=QuantType[weights],
                        per_channel=per_channel)
        logging.disable(logging.NOTSET)
        return (folder / "b.onnx").read_bytes()
    return made


def small():
    """Convolutions, a depthwise one, sums, poolings, a concatenation of different ranges, a dense layer."""
    n = Net(3, 3, (16, 16))
    x = n.op("Relu", n.conv("x", 8, channels=3))
    y = n.op("Relu", n.conv(x, 8, groups=8, channels=8))
    x = n.op("MaxPool", n.op("Add", x, y), kernel_shape=[2, 2], strides=[2, 2])
    a, b = n.conv(x, 6, 1, channels=8), n.op("Sigmoid", n.conv(x, 10, channels=8))
    x = n.op("AveragePool", n.op("Concat", a, b, axis=1), kernel_shape=[2, 2], strides=[2, 2])
    x = n.op("Mul", x, n.op("GlobalAveragePool", x))
    w = n.constant(n.rng.normal(size=(10, 256)) / 16)
    return to_onnx(n.graph(n.op("Gemm", n.op("Flatten", x), w, n.constant(n.rng.normal(size=10)), transB=1)))


KINDS = [(form, a, w, c) for form in ("QDQ", "QOperator")
         for a, w, c in (("QUInt8", "QUInt8", False), ("QUInt8", "QInt8", False), ("QInt8", "QInt8", False),
                         ("QUInt8", "QInt8", True), ("QInt8", "QInt8", True))]


@pytest.mark.parametrize(("form", "activations", "weights", "per_channel"), KINDS)
def test_a_quantized_network_becomes_integers(quantize, form, activations, weights, per_channel):
    g = load(quantize(small(), form, activations, weights, per_channel))
    made = from_onnx(g)
    names = Counter(n.op.name for n in made.graph.nodes)
    integer = "int8" if per_channel or activations == "QInt8" else "uint8"

    assert (names["DEQUANTIZE"], names["CONV_2D"], names["FULLY_CONNECTED"], names["TRANSPOSE"]) == (1, 3, 1, 0)
    assert {v.dtype.value for n in made.graph.nodes for v in (made.graph.values[n.outputs[0]],)} \
        == {integer, "float32"}
    for seed in range(3):
        inputs = feeds(g, seed)
        want = run(g, inputs)
        step = max(v.quantization.scale for n in made.graph.nodes[-2:] for i in n.outputs
                   if (v := made.graph.values[i]).quantization)
        got = run_converted(made, inputs)
        for name, w in want.items():
            assert np.abs(w - got[name]).max() <= 2.01 * step, name


def test_each_quantized_layer_is_within_a_step_of_onnx_runtime(quantize):
    """Layer by layer, in both directions: LiteRT computes on what the layer before gave, and so does ONNX Runtime."""
    g = from_onnx(load(quantize(small(), "QDQ", "QUInt8", "QUInt8"))).graph
    rows = [r for seed in range(3) for r in layer_differences(g, from_tflite, seed)]

    assert max(r[3] for r in rows if r[0] != "DEQUANTIZE") <= 1
    assert sum(r[2] for r in rows) < 0.02 * sum(r[1] for r in rows)


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_a_quantized_onnx_network_compiles_and_runs_on_the_virtual_npu(quantize, form):
    g = load(quantize(small(), form, "QUInt8", "QUInt8"))
    program = api.compile(g, "a311d", keep_all=True)
    made = from_onnx(g)
    inputs = feeds(g, 5)
    known = {}
    there = {name: a.transpose(made.inputs[name]) for name, a in inputs.items()}
    outputs = api.open_session(program).run(there, trace=known.__setitem__)
    layers = compare_layers(program, made.graph, known)

    assert sum(len(s.jobs) > 0 for s in program.steps if hasattr(s, "jobs")) >= 1
    assert len([d for d in layers if d.is_layer]) >= 5
    assert all(d.is_close for d in layers)
    made_from = [o for op, o in zip(program.ops, program.origins, strict=True) if op == "DEPTHWISE_CONV_2D"]
    assert made_from[0].removesuffix("_quant") == "n3"
    (name, want), = run(g, inputs).items()
    step = made.graph.values[made.graph.nodes[-1].inputs[0]].quantization.scale
    assert np.abs(want - outputs[name]).max() <= 3.01 * step  # some layers of a step each
    assert {r.origin.removesuffix("_quant") for r in api.profile(g, "a311d").rows} >= {"n1", "n3"}
    assert api.read_program(npu_bytes(program)) == program


def test_a_quantized_network_of_the_zoo_runs_on_the_virtual_npu(quantize):
    g = load(quantize(zoo.build("mobilenet-v2", size=32, classes=10), "QDQ", "QUInt8", "QUInt8"))
    graph = api.convert(g, "tflite")
    program = api.compile(graph, "a311d", keep_all=True)
    known = {}
    arrays = {"input": feeds(g)["input"].transpose(0, 2, 3, 1)}
    api.open_session(program).run(arrays, trace=known.__setitem__)
    layers = [d for d in compare_layers(program, graph, known) if d.is_layer]

    assert len(graph.nodes) - len(program.host_nodes) == len(layers) >= 65
    assert max(d.max_abs for d in layers) <= 1


def npu_bytes(program):
    from npulab.program.container import program_bytes

    return program_bytes(program)


def test_what_integers_cannot_do_is_done_in_floats():
    """Unsymmetric int8 weights: TFLite's kernels have none, and the graph's other layers stay in integers."""
    from onnx import helper

    n = Net(4)

    def quantized(x, scale, zero, dtype=np.int8):
        s, z = n.constant(np.float32(scale)), n.constant(np.array(zero), dtype)
        return n.op("DequantizeLinear", n.op("QuantizeLinear", x, s, z), s, z)

    def weights(zero, axis_scales):
        codes = n.constant(n.rng.integers(-120, 120, (4, 4, 3, 3)), np.int8)
        return n.op("DequantizeLinear", codes, n.constant(axis_scales), n.constant([zero] * len(axis_scales), np.int8),
                    axis=0)
    x = quantized("x", 0.03, -5)
    y = quantized(n.op("Conv", x, weights(0, [0.01, 0.02, 0.03, 0.01]), pads=[1] * 4), 0.4, 3)
    z = quantized(n.op("Conv", y, weights(9, [0.01, 0.02, 0.03, 0.01]), pads=[1] * 4), 2.0, 3)
    g = n.graph(z)
    made = from_onnx(g)
    convs = [made.graph.values[v.outputs[0]].dtype.value for v in made.graph.nodes if v.op.name == "CONV_2D"]

    assert convs == ["int8", "float32"]
    inputs = feeds(g)
    got, want = run_converted(made, inputs), run(g, inputs)
    assert max(np.abs(want[k] - got[k]).max() for k in want) <= 2.01
    assert helper  # the graph is ONNX's own


SINGLE = {  # operator -> attributes, scale of the result
    "HardSwish": ({}, 0.0213), "LeakyRelu": ({"alpha": 0.2}, 0.0213), "Tanh": ({}, 1 / 127), "Sigmoid": ({}, 1 / 200),
    "Softmax": ({"axis": 1}, 1 / 256), "Relu": ({}, 0.0213), "ReduceMean": ({"axes": [2, 3]}, 0.01),
    "GlobalAveragePool": ({}, 0.01), "Resize": ({"mode": "linear"}, 0.03), "ConvTranspose": ({"strides": [2, 2]}, 0.4),
    "Conv": ({"pads": [0, 1, 2, 1]}, 0.4), "Sub": ({}, 0.05), "Mul": ({}, 0.08), "Pad": ({}, 0.03),
    "Transpose": ({"perm": [0, 3, 1, 2]}, 0.03), "Slice": ({}, 0.03), "MaxPool": (
        {"kernel_shape": [3, 3], "pads": [1] * 4}, 0.03), "AveragePool": ({"kernel_shape": [2, 2]}, 0.0213),
    "DepthToSpace": ({"blocksize": 2}, 0.03), "Gather": ({"axis": 1}, 0.03), "Clip": ({}, 0.03), "Elu": ({}, 0.03),
}


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("name", SINGLE)
def test_one_quantized_operator(name, kind):
    """From integers to integers; one without an integer kernel (Elu) goes through floats."""
    n = Net(7, 4, (8, 10))
    own, scale = SINGLE[name]
    zero = 0 if kind == "int8" else 128

    def code(x, s, z, op="QuantizeLinear"):
        return n.op(op, x, n.constant(np.float32(s)), n.constant(np.array(z), np.dtype(kind)))

    def dequantized(s, z):
        return code(code("x", s, z), s, z, "DequantizeLinear")
    x = dequantized(0.03, zero - 7)
    more = []
    if name in ("Conv", "ConvTranspose"):
        codes = n.constant(n.rng.integers(zero - 100, zero + 100, (4, 4, 3, 3)), np.dtype(kind))
        more = [code(codes, 0.01, zero, "DequantizeLinear")]
    elif name in ("Sub", "Mul"):
        more = [code(code(n.op("Transpose", "x", perm=[0, 1, 2, 3]), 0.021, zero + 9), 0.021, zero + 9,
                     "DequantizeLinear")]
    elif name == "Resize":
        more = ["", "", n.constant([1, 4, 16, 20], np.int64)]
    elif name == "Pad":
        more = [n.constant([0, 0, 1, 0, 0, 0, 2, 1], np.int64)]
    elif name == "Slice":
        more = [n.constant([c], np.int64) for c in (1, 7, 3)]
    elif name == "Gather":
        more = [n.constant([3, 1], np.int64)]
    elif name == "Clip":
        more = [n.constant(np.float32(0)), n.constant(np.float32(6))]
    y = code(n.op(name, x, *more, **own), scale, zero - 3)
    g = n.graph(code(y, scale, zero - 3, "DequantizeLinear"))
    made = from_onnx(g)
    inputs = feeds(g)
    (want,), (got,) = run(g, inputs).values(), run_converted(made, inputs).values()
    ops = Counter(x.op.name for x in made.graph.nodes)

    assert np.abs(want - got).max() <= 1.01 * scale
    assert (np.abs(want - got) > scale / 2).mean() < 0.3  # two roundings where TFLite's kernel has a fixed scale
    assert ops["DEQUANTIZE"] == (2 if name == "Elu" else 1)


@pytest.mark.parametrize("keep_layout", [False, True])
def test_integers_keep_their_type_at_the_border(keep_layout):
    """uint8 comes and goes; inside it is int8, as the weights have a scale per channel."""
    from onnx import helper

    n = Net(8)
    s, z = n.constant(np.float32(0.02)), n.constant(np.array(100), np.uint8)
    w = n.op("DequantizeLinear", n.constant(n.rng.integers(-99, 99, (4, 4, 3, 3)), np.int8),
             n.constant([0.01, 0.02, 0.03, 0.04]), n.constant([0] * 4, np.int8), axis=0)
    y = n.op("QuantizeLinear", n.op("Conv", n.op("DequantizeLinear", "x", s, z), w), n.constant(np.float32(0.5)), z)
    g = helper.make_graph(n.nodes, "net", [helper.make_tensor_value_info("x", 2, n.shape)],
                          [helper.make_tensor_value_info(y, 2, None)], n.constants)
    g = load(helper.make_model(g, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
    made = from_onnx(g, keep_layout)
    inputs = feeds(g)
    (want,), (got,) = run(g, inputs).values(), run_converted(made, inputs).values()

    assert [x.op.name for x in made.graph.nodes if x.op.name != "TRANSPOSE"] == ["QUANTIZE", "CONV_2D", "QUANTIZE"]
    assert got.dtype == np.uint8
    assert np.abs(want.astype(int) - got).max() <= 1


def test_a_concatenation_of_integers_brings_them_to_one_scale(quantize):
    made = from_onnx(load(quantize(small(), "QDQ", "QInt8", "QInt8"))).graph
    concat = next(n for n in made.nodes if n.op.name == "CONCATENATION")
    assert len({made.values[v].quantization for v in (*concat.inputs, *concat.outputs)}) == 1


# whole networks


@pytest.mark.parametrize("name", ["squeezenet", "mobilenet-v2", "mobilenet-v3", "yolov8n", "ssdlite", "vit-tiny"])
def test_networks_of_the_zoo_there_and_back(name):
    g = load(zoo.build(name, size=zoo.find(name).size if name == "vit-tiny" else 64))
    there_and_back_from_onnx(g)


def there_and_back_from_onnx(g):
    made = from_onnx(g)
    inputs = feeds(g)
    want = run(g, inputs)
    assert furthest(want, run_converted(made, inputs)) <= CLOSE
    back = from_tflite(made.graph)
    check_onnx(back)
    there = {k: a.transpose(made.inputs.get(k, range(a.ndim))) for k, a in inputs.items()}
    got = run_converted(back, there)
    got = {k: a.transpose(np.argsort(made.outputs[k])) if k in made.outputs else a for k, a in got.items()}
    assert furthest(want, got) <= CLOSE


@needs_shared
@pytest.mark.parametrize(("file", "dims"), [
    ("ch_ppocr_mobile_v2.0_cls_infer.onnx", {"x.2": 48, "x.3": 192}), ("efficientnet_lite0_imagenet_float.onnx", None),
    ("yolov5n_coco_float.onnx", None)])
def test_real_onnx_networks_there_and_back(file, dims):
    there_and_back_from_onnx(load(MODELS / "float" / file, dims))


WITHOUT_WORDS = {
    "selfie_segmentation": "Convolution2DTransposeBias", "keras_lstm_mnist_ptq": "UNIDIRECTIONAL_SEQUENCE_LSTM",
    "coco_ssd_mobilenet_v1_1.0_quant_2018_06_29": "TFLite_Detection_PostProcess",
    "ssdlite_mobiledet_coco_qat_postprocess": "TFLite_Detection_PostProcess",
    "posenet_mobilenet_v1_075_353_481_16_quant_decoder": "PosenetDecoderOp",
}
HYBRID = ("kws_ref_model_float32",)
"""Weights of 8 bits beside floats: LiteRT rounds the activations too, ONNX Runtime does not."""
REFUSED = ("person_detect",)
"""By LiteRT itself: an axis of scales that is not there."""


@needs_shared
@pytest.mark.parametrize("path", [p for p in model_files() if p.parent.name == "float" or p.stat().st_size < 2e6]
                         or [None], ids=lambda p: p.stem if p else "none")
def test_real_tflite_networks_there_and_back(path):
    """Through ONNX to TFLite again: the same numbers, of integers exactly."""
    g = replace_dynamic(load(path))
    if path.stem in WITHOUT_WORDS:
        with pytest.raises(UnsupportedError, match="operators that are not converted to ONNX") as e:
            from_tflite(g)
        assert e.value.facts["got"] == WITHOUT_WORDS[path.stem]
        return
    middle = from_tflite(g)
    check_onnx(middle)
    back = from_onnx(middle.graph)
    if path.stem in REFUSED:
        return
    inputs = feeds(g)
    want = run(g, inputs)
    there = {k: a.transpose(middle.inputs.get(k, range(a.ndim))) for k, a in inputs.items()}
    got = run_converted(back, there)
    got = {k: a.transpose(np.argsort(middle.outputs[k])) if k in middle.outputs else a for k, a in got.items()}
    integers = all(a.dtype.kind in "iu" for a in want.values())
    assert furthest(want, got) <= (0.05 if path.stem in HYBRID else 0 if integers else CLOSE)
    if not integers and path.stem not in HYBRID:
        assert furthest(want, run_converted(middle, inputs)) <= CLOSE


@needs_shared
@pytest.mark.parametrize("name", ["kws_ref_model", "mobilenet_v1_0.25_128_quant", "pretrainedResnet_quant",
                                  "vww_96_int8"])
def test_each_layer_of_a_real_quantized_network_is_within_a_step(name):
    rows = list(layer_differences(load(MODELS / "quantized" / f"{name}.tflite"), from_tflite))
    assert max(r[3] for r in rows) <= 1
    assert sum(r[2] for r in rows) < 0.02 * sum(r[1] for r in rows)


# the command line


def call(capsys, *arguments):
    code = run_arguments([str(a) for a in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_converts_and_says_what_became_of_it(capsys, tmp_path):
    model, there, back = tmp_path / "net.onnx", tmp_path / "net.tflite", tmp_path / "back.onnx"
    model.write_bytes(small())
    code, out, err = call(capsys, "convert", model, "-o", there)
    assert (code, err) == (0, "")
    assert out.startswith("net: ONNX, 15 nodes, to TFLite, 13 nodes\n")
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80
    assert "input   x     float32  1x16x16x3  0, 2, 3, 1\n" in out
    assert "Pictures are channels last now; --keep-layout keeps them as they were." in out

    code, out, _ = call(capsys, "convert", there, "-o", back, "--json")
    data = json.loads(out)
    assert (code, data["from"], data["to"], data["nodes_after"]) == (0, "tflite", "onnx", len(load(back).nodes))
    assert data["inputs"] == [{"name": "x", "dtype": "float32", "shape": [1, 3, 16, 16], "order": [0, 3, 1, 2]}]
    a, b = load(model), load(back)
    assert furthest(run(a, feeds(a)), run(b, feeds(a))) <= CLOSE

    code, out, _ = call(capsys, "convert", model, "-o", there, "--keep-layout")
    assert code == 0
    assert "1x3x16x16  as before" in out
    assert "Pictures" not in out


def test_the_same_dialect_is_written_again(capsys, tmp_path):
    model, copy = tmp_path / "net.onnx", tmp_path / "copy.onnx"
    model.write_bytes(small())
    code, out, _ = call(capsys, "convert", model, "-o", copy)
    assert (code, "Note: it was in this dialect before." in out) == (0, True)
    assert load(copy).nodes[0].name == load(model).nodes[0].name


def test_there_are_two_dialects():
    with pytest.raises(UsageError, match="there is no dialect 'tensorrt'") as e:
        api.convert(load(small()), "tensorrt")
    assert e.value.facts["want"] == "tflite or onnx"


def test_the_command_says_what_it_cannot_do_and_writes_nothing(capsys, tmp_path):
    model = tmp_path / "net.onnx"
    n = Net(1)
    model.write_bytes(to_onnx(n.graph(n.op("Erf", "x"))))
    code, out, err = call(capsys, "convert", model, "-o", tmp_path / "net.tflite")
    assert (code, out) == (1, "")
    assert err == ("npulab: error: 'net' has operators that TFLite has no words for\n  got     Erf\n"
                   "  try     cut the network before them, or compute them on the host\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx"]
    code, _, err = call(capsys, "convert", model, "-o", tmp_path / "net.bin")
    assert (code, "want    a name that ends in .tflite or .onnx" in err) == (2, True)


def test_compile_says_what_an_operator_was_made_from(capsys, tmp_path, quantize):
    model = tmp_path / "net.onnx"
    model.write_bytes(quantize(small(), "QDQ", "QUInt8", "QUInt8"))
    code, out, _ = call(capsys, "compile", model, "--target", "a311d")
    assert code == 0
    assert "made from" in out
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = call(capsys, "compile", model, "--target", "a311d", "--json")
    data = json.loads(out)
    made = {o: origin for s in data["steps"] for o, origin in zip(s["ops"], s["origins"], strict=True)}
    assert (made["DEPTHWISE_CONV_2D"], made["FULLY_CONNECTED"]) == ("n3", "n15")
    image = tmp_path / "x.npy"
    np.save(image, feeds(load(model))["x"].transpose(0, 2, 3, 1))
    code, out, _ = call(capsys, "run", model, "--target", "a311d", "--input", image, "--compare", "litert")
    assert code == 0
    assert "all within 1 step" in out


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_fail_in_words(seed):
    rng = np.random.default_rng(seed)
    data = bytearray(small())
    for _ in range(3):
        data[rng.integers(0, len(data))] = rng.integers(0, 256)
    with contextlib.suppress(NpulabError):
        from_onnx(load(bytes(data)))
