"""Passes on TFLite files: heads of YOLO cut off floats and integers, ONNX there and back, the certificate in LiteRT."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from npulab import zoo
from npulab.cli import run_arguments
from npulab.dialects import from_onnx
from npulab.errors import UnsupportedError
from npulab.exporters.onnx import to_onnx
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers import load
from npulab.passes import litert, tflite_passes, tflite_yolo
from npulab.passes.tflite_certificate import compared_tflite
from npulab.passes.tflite_passes import patched_tflite
from npulab.passes.tflite_yolo import _Regular, dequantized, tail, without_yolo
from npulab.postprocess import apply, detect
from npulab.postprocess.program import standalone
from npulab.postprocess.types import YoloV5, YoloV8, read_post, to_json
from shared import MODELS, SHARED, needs_shared

onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
pytest.importorskip("ai_edge_litert", reason="pip install 'npulab[litert]'")

from dialects import feeds  # noqa: E402
from test_heads import ANCHORS, SIZE, ssd_network, v5, v8  # noqa: E402
from test_patch import Net  # noqa: E402


def run(data, graph, feed):
    """Outputs by position, by LiteRT's reference kernels."""
    from npulab.runtime.host import HostModel

    return HostModel(data, "it").run([feed[graph.values[v].name] for v in graph.inputs])


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """An ONNX graph as an int8 TFLite graph, quantized by ONNX Runtime, its constants too."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    folder, made = tmp_path_factory.mktemp("quantized"), {}

    class Pictures:
        def __init__(self, graph):
            self.left = [{k: np.abs(x) for k, x in feeds(graph, seed).items()} for seed in range(3)]

        def get_next(self):
            return self.left.pop() if self.left else None

    def quantize(name, graph):
        if name not in made:
            logging.disable(logging.WARNING)
            (folder / "a.onnx").write_bytes(to_onnx(graph))
            quantize_static(folder / "a.onnx", folder / "b.onnx", Pictures(graph), quant_format=QuantFormat.QDQ,
                            activation_type=QuantType.QInt8, weight_type=QuantType.QInt8)
            logging.disable(logging.NOTSET)
            made[name] = from_onnx(load(folder / "b.onnx")).graph
        return made[name]
    return quantize


def pools(seed=0, size=5):
    """Max-pooling between convolutions, channels last."""
    n = Net(seed, size=(12, 14))
    y = n.op("MaxPool", n.op("Relu", n.conv("x", 6)), kernel_shape=[size] * 2, pads=[size // 2] * 4)
    return n.graph(n.conv(y, 5, 1, channels=6))


def silu(seed=0):
    n = Net(seed)
    y = n.conv("x", 6)
    return from_onnx(n.graph(n.conv(n.op("Mul", y, n.op("Sigmoid", y)), 4, channels=6))).graph


def overlap(a, b):
    """Intersection over union of two boxes by their corners."""
    both = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    return both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both)


def ends(graph):
    return [[(v.name, v.shape, v.dtype) for v in (graph.values[i] for i in side)]
            for side in (graph.inputs, graph.outputs)]


# heads


@pytest.mark.parametrize("variant", ["plain", "other arithmetic", "places first", "small first", "fractions"])
def test_yolov5_is_cut_off_a_float_network(variant):
    graph = from_onnx(v5(variant)).graph
    made = patched_tflite(graph, ["cut-head"])
    (stage,) = made.post.stages
    unit = SIZE if variant == "fractions" else 1

    assert isinstance(stage, YoloV5)
    assert sorted(s * unit for s in stage.strides) == pytest.approx([8, 16, 32], rel=1e-5)
    assert sorted(a[0] * unit for level in stage.anchors for a in level) == pytest.approx(
        sorted(a[0] for level in ANCHORS for a in level), rel=1e-5)
    assert {n.op.name for n in made.graph.nodes} == {"CONV_2D", "PAD"}
    assert all(v.shape[3] == 2 * 12 for v in (made.graph.values[i] for i in made.graph.outputs))  # channels last
    agreements, kernels = compared_tflite(graph, made)
    assert kernels == litert.REFERENCE
    assert len(agreements) == 3
    assert all(a.equal for a in agreements), agreements


@pytest.mark.parametrize("options", [{}, {"form": "xyxy"}, {"columns_last": True}, {"apart": True}])
def test_yolov8_is_cut_off_a_float_network(options):
    graph = from_onnx(v8(**options)).graph
    made = patched_tflite(graph, ["cut-head"])
    (stage,) = made.post.stages

    assert isinstance(stage, YoloV8)
    assert stage.strides == pytest.approx([8, 16, 32])
    assert all(a.equal for a in compared_tflite(graph, made)[0])


@pytest.mark.parametrize(("make", "name"), [(lambda: v5("fractions"), "v5"), (v8, "v8")])
def test_a_quantized_head_is_cut_and_what_it_meant_is_found(quantized, make, name):
    graph = quantized(name, make())
    t = tail(graph)
    assert all(graph.values[v].dtype.value == "int8" for v in t.maps)
    made = patched_tflite(graph, ["cut-head"])
    (stage,) = made.post.stages

    unit = SIZE if name == "v5" else 1
    assert sorted(s * unit for s in stage.strides) == pytest.approx([8, 16, 32], rel=1e-5)
    assert set(made.post.quantization) == set(made.post.body)
    feed = feeds(graph, 1)
    whole = litert.networks(graph, list(made.post.outputs), made.data, list(made.post.body))
    maps = whole.second(feed)
    assert {x.dtype.name for x in maps.values()} == {"int8"}
    agreements, _ = compared_tflite(graph, made)
    floats = [a for a in agreements if a.steps is None]
    assert len(floats) == (3 if name == "v5" else 2)
    assert all(a.equal and a.relative < 1e-5 and "tail in floats" in a.output for a in floats), floats
    rounded = [a for a in agreements if a.steps is not None]
    assert all(0 < a.steps < 16 and a.limit == 16 and "untouched" in a.output for a in rounded), rounded


def test_the_body_gives_the_very_integers_that_the_network_had(quantized):
    graph = quantized("v8", v8())
    made = patched_tflite(graph, ["cut-head"])
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    feed = feeds(graph, 3)
    whole = Interpreter(model_content=bytes(graph.source), experimental_preserve_all_tensors=True,
                        experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    whole.allocate_tensors()
    whole.set_tensor(whole.get_input_details()[0]["index"], feed["x"])
    whole.invoke()
    by_name = {d["name"]: d["index"] for d in whole.get_tensor_details()}
    for name, x in zip(made.post.body, run(made.data, graph, feed), strict=True):
        np.testing.assert_array_equal(x, whole.get_tensor(by_name[name]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1.0, 8.0, 1 / 8]), st.sampled_from([-0.5, 0.0, 0.5]),
       st.booleans(), st.sampled_from([(8, 8), (4, 8)]))
def test_grids_are_found_again_after_rounding(seed, unit, offset, pairs, size):
    h, w = size
    grid = np.stack([np.tile(np.arange(w), h), np.repeat(np.arange(h), w)], 1) + offset
    real = (grid * unit)[None].astype(np.float32)
    real = real if pairs else np.ascontiguousarray(real.transpose(0, 2, 1))
    scale = np.abs(real).max() / 127
    rounded = (np.rint(real / scale) * scale).astype(np.float32)
    regular = _Regular([size, (h // 2, w // 2)], (8 * h, 8 * w))
    rng = np.random.default_rng(seed)

    np.testing.assert_allclose(regular.near(rounded, 0.51 * scale), real, rtol=1e-6, atol=1e-7)
    other = rng.normal(0, 3, rounded.shape).astype(np.float32)
    assert regular.near(other, 0.51 * scale) is other


def test_a_constant_beyond_half_a_step_is_not_rounding(quantized):
    """A grid whose first place is wrong: nothing fits it, and the head is none of YOLO's."""
    graph = quantized("v8", v8())
    t = tail(graph)
    grids = [v for n in t.nodes for v in n.inputs if v >= 0 and graph.values[v].is_constant
             and graph.values[v].quantization and graph.values[v].elements > 100]
    data = bytearray(graph.source)
    for v in grids:
        stored = bytes(graph.values[v].constant)
        at = bytes(graph.source).find(stored)
        data[at] = (data[at] + 90) % 256
    broken = load(bytes(data))

    assert grids
    with pytest.raises(UnsupportedError, match="computes neither YOLOv5's boxes nor YOLOv8's"):
        without_yolo(broken)
    assert without_yolo(broken, lambda n: True) is None  # a board that nobody asked about heads: it just stays
    assert dequantized(broken.values[grids[0]]).shape == broken.values[grids[0]].shape


def test_a_head_that_is_almost_yolov5_is_refused_with_a_reason():
    with pytest.raises(UnsupportedError, match="computes neither YOLOv5's boxes nor YOLOv8's"):
        patched_tflite(from_onnx(v5("wrong")).graph, ["cut-head"])


def test_the_head_goes_where_a_board_does_not_take_it():
    graph = from_onnx(v8()).graph
    made = patched_tflite(graph, (), lambda g: {n.index for n in g.nodes if n.op.name == "SOFTMAX"})
    assert [c.name for c in made.changes] == ["cut-head"]
    same = patched_tflite(graph, (), lambda g: {n.index for n in g.nodes if n.op.name == "ARG_MAX"})
    assert same.post is None
    assert same.data == bytes(graph.source)


def test_a_wrong_decoder_is_found_out(quantized):
    """The certificate must be able to fail: another stride, and maps taken for one another."""
    import msgspec

    graph = quantized("v8", v8())
    made = patched_tflite(graph, ["cut-head"])
    (stage,) = made.post.stages
    wrong = msgspec.structs.replace(stage, strides=(*stage.strides[:2], stage.strides[2] * 1.001))
    post = msgspec.structs.replace(made.post, stages=(wrong,))
    head = tflite_passes.Cut(made.head.data, made.head.body, post, made.head.change)
    broken = [a for a in compared_tflite(graph, tflite_passes.Patched(made.graph, made.data, made.changes, [], head))[0]
              if not a.equal]
    assert broken
    assert all("xywh, tail in floats" in a.output for a in broken)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_the_program_takes_the_maps_as_litert_gives_them(tmp_path, quantized, kind):
    graph = quantized("v8", v8()) if kind == "int8" else from_onnx(v8()).graph
    made = patched_tflite(graph, ["cut-head"])
    post = read_post(to_json(made.post))
    outputs = dict(zip(post.body, run(made.data, graph, feeds(graph, 2)), strict=True))
    (tmp_path / "net_post.py").write_text(standalone(post))
    np.savez(tmp_path / "in.npz", *outputs.values())
    code = f"""
import sys
sys.modules["npulab"] = None
import numpy as np, net_post
stored = np.load("in.npz")
outputs = dict(zip({list(outputs)!r}, (stored[k] for k in stored.files)))
np.savez("out.npz", *net_post.postprocess(outputs).values(), *net_post.detect(outputs, 0.2))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path)
    stored = np.load(tmp_path / "out.npz")
    for k, x in zip(stored.files, [*apply(post, outputs).values(), *detect(post, outputs, 0.2)], strict=True):
        np.testing.assert_array_equal(stored[k], x)


# passes, there and back


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_a_pass_changes_a_file_that_keeps_its_ends(quantized, kind):
    graph = from_onnx(pools()).graph if kind == "float" else quantized("pools", pools())
    made = patched_tflite(graph, ["pool-chain"])

    assert [c.name for c in made.changes] == ["pool-chain"]
    assert [n.op.name for n in made.graph.nodes].count("MAX_POOL_2D") == 2
    assert len(made.graph.nodes) == len(graph.nodes) + 1
    assert ends(made.graph) == ends(graph)
    assert ends(load(made.data)) == ends(graph)
    for seed in range(3):
        feed = feeds(graph, seed)
        for a, b in zip(run(graph.source, graph, feed), run(made.data, graph, feed), strict=True):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_what_is_not_exact_says_so(seed):
    graph = silu(seed)
    made = patched_tflite(graph, ["silu-to-relu"])
    agreements, kernels = compared_tflite(graph, made)
    assert [n.op.name for n in made.graph.nodes] == ["CONV_2D", "CONV_2D"]
    assert not all(c.exact for c in made.changes)
    assert not all(a.equal for a in agreements)
    assert kernels == litert.REFERENCE


def test_a_board_is_asked_about_tflite(quantized):
    asked = []

    def off(graph):
        asked.append(graph.format)
        return {n.index for n in graph.nodes if n.op.name == "MAX_POOL_2D" and max(n.op.window) > 3}

    for graph in (from_onnx(pools()).graph, quantized("pools", pools())):
        made = patched_tflite(graph, (), off)
        assert [c.name for c in made.changes] == ["pool-chain"]
        assert not off(made.graph)
    assert set(asked) == {"tflite"}


@pytest.mark.parametrize("off", [None, lambda g: set(), lambda g: {n.index for n in g.nodes}])
def test_a_file_that_needs_nothing_stays_as_it_is(quantized, off):
    for graph in (silu(), quantized("pools", pools(size=3))):
        made = patched_tflite(graph, (), off)
        assert not made.changes
        assert made.data == bytes(graph.source)


def test_integers_stay_integers(quantized):
    """SiLU as ReLU would need other scales: the layer would become one of floats."""
    n = Net(0)
    y = n.conv("x", 6)
    graph = quantized("silu", n.graph(n.conv(n.op("Mul", y, n.op("Sigmoid", y)), 4, channels=6)))
    made = patched_tflite(graph, (), lambda g: {n.index for n in g.nodes if n.op.name == "LOGISTIC"})
    assert made.data == bytes(graph.source)
    floats = sum(v.dtype.value == "float32" for v in graph.values if not v.is_constant)
    after = patched_tflite(graph, ["silu-to-relu"]).graph
    assert sum(v.dtype.value == "float32" for v in after.values if not v.is_constant) <= floats


def hybrid():
    """8-bit weights beside data in floats."""
    m = ModelBuilder("hybrid")
    x, y = m.tensor("x", (1, 4), "float32"), m.tensor("y", (1, 3), "float32")
    w = m.tensor("w", (3, 4), "int8", scale=0.01, zero_point=0, data=np.arange(12, dtype=np.int8).reshape(3, 4))
    m.op("FULLY_CONNECTED", [x, w, -1], [y], fused_activation_function="NONE")
    return m.build([x], [y])


# the command


@pytest.mark.parametrize(("name", "arguments", "code", "text"), [
    ("hybrid", ["--pass", "gemm-to-convolution"], 1, "8-bit weights beside data in floats stay as they are"),
    ("hybrid", ["--pass", "cut-head"], 1, "has no head that can be cut off"),
    ("ssd", ["--pass", "focus"], 1, "cut its head off too: --pass cut-head --pass focus"),
    ("silu", ["--pass", "nonsense"], 2, "there is no pass 'nonsense'"),
])
def test_mistakes_are_told(tmp_path, capsys, name, arguments, code, text):
    data = {"hybrid": hybrid, "silu": lambda: bytes(silu().source), "ssd": lambda: bytes(ssd_network(0).source)}[name]()
    (tmp_path / "net.tflite").write_bytes(data)

    command = ["patch", str(tmp_path / "net.tflite"), "-o", str(tmp_path / "out.tflite"), *arguments]
    assert run_arguments(command) == code
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out.tflite").exists()


def test_nothing_to_do_writes_the_same_file_and_says_why(tmp_path, capsys):
    (tmp_path / "net.tflite").write_bytes(hybrid())
    command = ["patch", str(tmp_path / "net.tflite"), "-o", str(tmp_path / "out.tflite"), "--target", "rk3588"]
    assert run_arguments(command) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "No pass found anything to change." in text
    assert "It is the same file." in text
    assert "Other passes were not tried: 8-bit weights beside data in floats" in text
    assert (tmp_path / "out.tflite").read_bytes() == hybrid()


def test_patch_and_run_a_quantized_detector(tmp_path, capsys, quantized):
    (tmp_path / "net.tflite").write_bytes(bytes(quantized("v8", v8()).source))
    out, report = tmp_path / "body.tflite", tmp_path / "report.json"
    command = ["patch", str(tmp_path / "net.tflite"), "-o", str(out), "--pass", "cut-head", "--target", "ethos_u65",
               "--report", str(report)]
    assert run_arguments(command) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.replace(str(tmp_path), "").splitlines()) <= 80
    assert "Equivalent with its post-processing, up to rounding" in text
    assert "Measured with LiteRT's reference kernels." in text
    data = json.loads(report.read_text())
    assert data["equivalent"]
    assert data["post_processing"]
    assert data["measured_with"] == litert.REFERENCE
    assert [o["steps"] is None for o in data["outputs"]] == [True, True, False, False]
    assert sum(data["verdicts_before"].values()) == data["before"]["nodes"]
    assert sum(data["verdicts_after"].values()) == data["after"]["nodes"]

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(tmp_path / "x.png")
    assert run_arguments(["run", str(out), "--target", "a311d", "--input", str(tmp_path / "x.png"), "--score", "0.1",
                          "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["boxes"]


# real networks


@needs_shared
@pytest.mark.parametrize(("file", "kind"), [("yolov5n-int8", YoloV5), ("yolov8n_full_integer_quant_416", YoloV8)])
def test_real_quantized_detectors_find_the_bus(file, kind):
    graph = load(MODELS / "quantized" / f"{file}.tflite")
    made = patched_tflite(graph, ["cut-head"])
    picture = made.post.picture
    assert isinstance(made.post.stages[0], kind)
    assert [s * picture.width for s in made.post.stages[0].strides] == pytest.approx([8, 16, 32], rel=1e-5)
    name = "000000213605.jpg"
    image = Image.open(SHARED / "images" / "coco-138" / "images" / name).convert("RGB")
    x = graph.values[graph.inputs[0]]
    pixels = np.asarray(image.resize((picture.width, picture.height)))[None]
    pixels = (pixels.astype(np.int16) - 128).astype(np.int8) if x.dtype.value == "int8" else pixels
    both = litert.networks(graph, list(made.post.outputs), made.data, list(made.post.body))
    maps = both.second({x.name: pixels})
    found, _, classes = detect(made.post, maps, 0.5)
    labels = json.loads((SHARED / "images" / "coco-138" / "instances.json").read_text())
    (id_,) = [i["id"] for i in labels["images"] if i["file_name"] == name]
    left, top, wide, high = next(a["bbox"] for a in labels["annotations"] if a["image_id"] == id_
                                 and a["category_id"] == 5)
    true = np.array([left, top, left + wide, top + high]) / (np.array(image.size * 2))
    assert overlap(found[classes == 5][0], true) > 0.8
    assert 2 in classes  # the car beside it


@needs_shared
def test_real_float_networks_there_and_back():
    def off(g):
        return {n.index for n in g.nodes if n.op.name == "AVERAGE_POOL_2D" and max(n.op.window) > 7}

    graph = load(MODELS / "float" / "pretrainedResnet.tflite")
    made = patched_tflite(graph, (), off)
    assert off(graph)
    assert not off(made.graph)
    assert ends(made.graph) == ends(graph)
    agreements, kernels = compared_tflite(graph, made)
    assert all(a.equal for a in agreements)
    assert kernels == litert.REFERENCE


def test_a_topology_loses_its_head_in_both_dialects():
    onnx_net = load(zoo.build("yolov8n", 96))
    graph = from_onnx(onnx_net).graph
    made = without_yolo(graph)
    assert made.post.stages[0].strides == pytest.approx([8, 16, 32])
    assert tflite_yolo.tail(made.body) is None
