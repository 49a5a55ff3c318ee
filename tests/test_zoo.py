"""The topologies: published sizes and counts, ONNX's own checks, ONNX Runtime, and what the builder promises."""

import json
import re
from functools import cache

import numpy as np
import pytest

from npulab.cli import run_arguments
from npulab.errors import UsageError
from npulab.importers import load
from npulab.teardown import tear_down, totals
from npulab.zoo import build, topologies
from npulab.zoo.repvgg import EPSILON, BatchNorm, Branch, fuse

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

NAMES = sorted(topologies())
PARAMETERS = {
    # parameters, and where they are published
    "resnet50": 25_557_032,      # torchvision, ResNet50_Weights
    "mobilenet-v1": 4_231_976,   # Keras Applications, trainable ones
    "mobilenet-v2": 3_504_872,   # torchvision, MobileNet_V2_Weights
    "mobilenet-v3": 5_483_032,   # torchvision, MobileNet_V3_Large_Weights
    "squeezenet": 1_235_496,     # torchvision, SqueezeNet1_1_Weights
    "yolov5s": 7_225_885,        # what YOLOv5 prints of the fused model
    "yolov8n": 3_151_904,        # what Ultralytics prints of the fused model
    "vit-tiny": 5_717_416,       # timm, vit_tiny_patch16_224
}
UNFOLDED = {"resnet50", "mobilenet-v1", "mobilenet-v2", "mobilenet-v3"}
"""Counted with batch normalizations of two numbers a channel, where the files here have one bias."""
MMACS = {
    # millions, tolerance, and where they are published
    "repvgg-a2": (5_100, 0.01),    # arXiv:2101.03697, table 4
    "resnet50": (4_089, 0.001),    # torchvision: 4.089 G
    "mobilenet-v1": (569, 0.001),  # arXiv:1704.04861, table 4
    "mobilenet-v2": (300, 0.005),  # arXiv:1801.04381, table 4
    "mobilenet-v3": (219, 0.015),  # arXiv:1905.02244, table 3; torchvision: 217
    "squeezenet": (349, 0.002),    # torchvision: 0.349 G
    "ssdlite": (800, 0.05),        # arXiv:1801.04381, table 6: 0.8 G
    "yolov5s": (8_250, 0.01),      # 16.5 GFLOPs of 2 a MAC
    "yolov8n": (4_350, 0.01),      # 8.7 GFLOPs of 2 a MAC
    "vit-tiny": (1_260, 0.01),     # timm, vit_tiny_patch16_224: 1.26 GMACs, attention included
}
OUTPUTS = {
    "yolov5s": {"output0": (1, 25200, 85)},
    "yolov8n": {"output0": (1, 84, 8400)},
    "ssdlite": {"boxes": (1, 2034, 4), "classes": (1, 2034, 91)},
}


@cache
def content(name):
    return build(name)


@cache
def proto(name):
    return onnx.load_from_string(content(name))


def learned(model):
    """Numbers that training finds, by tensor."""
    kinds = (".weight", ".bias", ".scale", ".shift", "class_token", "positions")
    return {t.name: int(np.prod(t.dims)) for t in model.graph.initializer
            if t.data_type == onnx.TensorProto.FLOAT and t.name.endswith(kinds)}


def run(data, x, optimized=True):
    options = ort.SessionOptions()
    if not optimized:  # every tensor is asked for: nothing may be fused away
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: x}), strict=True))


def image(size, seed=1):
    return np.random.default_rng(seed).standard_normal((1, 3, size, size), np.float32)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_it_has_exactly_the_published_parameters(name):
    model = proto(name)
    found = learned(model)
    count = sum(found.values())
    if name in UNFOLDED:
        count += sum(found[f"{n.name}.bias"] for n in model.graph.node if n.op_type == "Conv" and "/se/" not in n.name)

    assert count == PARAMETERS[name]


def test_repvgg_has_the_published_parameters_deployed_and_in_training():
    """arXiv:2101.03697 and its repository: 25.49 M deployed, 28.21 M in training."""
    deployed, trained = sum(learned(proto("repvgg-a2")).values()), sum(learned(proto("repvgg-a2-train")).values())

    assert deployed == 9 * 2_675_904 + 7_808 + 1_409_000
    assert int(deployed / 1e4) / 100 == 25.49
    assert int(trained / 1e4) / 100 == 28.21


def test_ssdlite_has_the_published_parameters_with_the_classes_of_the_paper():
    """arXiv:1801.04381, table 6: 4.3 M, for 80 classes and the background."""
    assert sum(learned(onnx.load_from_string(build("ssdlite", classes=81))).values()) == pytest.approx(4.3e6, rel=0.01)


@pytest.mark.parametrize("name", sorted(MMACS))
def test_it_multiplies_as_often_as_published(name):
    published, tolerance = MMACS[name]

    assert totals(tear_down(load(content(name)), everything=True)).mmacs == pytest.approx(published, rel=tolerance)


def light(model):
    """The model with its weights as inputs: shapes need no more, and large files are slow to check."""
    out = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    out.graph.CopyFrom(onnx.GraphProto(name="light", node=model.graph.node, value_info=model.graph.value_info,
                                       input=model.graph.input, output=model.graph.output))
    for t in model.graph.initializer:
        if np.prod(t.dims) > 1024:
            out.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims))
        else:
            out.graph.initializer.append(t)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_onnx_finds_the_shapes_that_the_builder_wrote(name):
    """Strict inference fails where a stated shape contradicts it; bare of them it must find the same."""
    model = light(proto(name))
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    stated = {v.name: v for v in (*model.graph.value_info, *model.graph.output)}
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)

    assert {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)} == stated
    assert stated.keys() == {o for n in model.graph.node for o in n.output}
    assert (model.opset_import[0].version, model.ir_version) == (17, 8)
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)


@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_runs_it_and_no_signal_grows_or_fades(name):
    """Outputs as exporters name and shape them; every tensor finite; layers within about a decade of the input."""
    size = topologies()[name].size
    model = onnx.ModelProto()
    model.CopyFrom(proto(name))
    layers = {n.output[0] for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul", "Relu", "Clip", "Add")}
    outputs = {o.name for o in model.graph.output}
    model.graph.output.extend(list(model.graph.value_info))
    found = run(model.SerializeToString(), image(size), optimized=False)

    assert {k: found[k].shape for k in outputs} == OUTPUTS.get(name, {"output": (1, 1000)})
    for tensor, x in found.items():
        assert np.isfinite(x).all(), tensor
        if tensor in layers and not tensor.startswith(("24/", "22/")) and "attention" not in tensor:  # boxes: pixels
            assert 0.1 < float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) < 15, tensor
    assert all(found[k].std() > 0.1 for k in outputs)


def test_the_deployed_repvgg_is_the_trained_one():
    x = image(64)
    deployed, trained = (run(build(name, 64, 10, 5), x, False) for name in ("repvgg-a2", "repvgg-a2-train"))

    assert np.abs(trained["output"]).max() > 0.1
    np.testing.assert_allclose(deployed["output"], trained["output"], atol=2e-4 * np.abs(trained["output"]).max())


def test_fused_weights_by_hand():
    """One channel: 3x3 of ones, 1x1 of 4, the identity; each scaled by 3 / sqrt(8.99999 + EPSILON) = 1."""
    norm = BatchNorm(*(np.array([v], np.float32) for v in (3, 0.5, 2, 9 - EPSILON)))
    weights, bias = fuse((Branch(np.ones((1, 1, 3, 3), np.float32), norm),
                          Branch(np.full((1, 1, 1, 1), 4, np.float32), norm), Branch(None, norm)), 1)

    np.testing.assert_allclose(weights[0, 0], [[1, 1, 1], [1, 6, 1], [1, 1, 1]], rtol=1e-5)
    np.testing.assert_allclose(bias, [3 * (0.5 - 2)], rtol=1e-5)


def test_yolov5_decodes_boxes_as_its_formulas():
    """Raw rows through the formulas of YOLOv5's repository, place by place."""
    model = onnx.ModelProto()
    model.ParseFromString(build("yolov5s", 64, 3))
    model.graph.output.extend(v for v in model.graph.value_info if re.fullmatch(r"24/\d/conv", v.name))
    found = run(model.SerializeToString(), image(64))
    anchors = [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 119)], [(116, 90), (156, 198), (373, 326)]]
    rows = []
    for level, stride in enumerate((8, 16, 32)):
        raw = 1 / (1 + np.exp(-found[f"24/{level}/conv"][0].astype(np.float64)))
        for a in range(3):
            for y in range(64 // stride):
                for x in range(64 // stride):
                    p = raw[8 * a:8 * a + 8, y, x]
                    w, h = anchors[level][a]
                    rows.append([(2 * p[0] - 0.5 + x) * stride, (2 * p[1] - 0.5 + y) * stride,
                                 (2 * p[2])**2 * w, (2 * p[3])**2 * h, *p[4:]])
    np.testing.assert_allclose(found["output0"][0], rows, rtol=1e-4, atol=1e-4)


def test_yolov8_decodes_boxes_as_its_formulas():
    model = onnx.ModelProto()
    model.ParseFromString(build("yolov8n", 64, 3))
    model.graph.output.extend(v for v in model.graph.value_info if re.fullmatch(r"22/cv\d/\d/2", v.name))
    found = run(model.SerializeToString(), image(64))
    rows = []
    for level, stride in enumerate((8, 16, 32)):
        box, score = (found[f"22/{b}/{level}/2"][0].astype(np.float64) for b in ("cv2", "cv3"))
        for y in range(64 // stride):
            for x in range(64 // stride):
                e = np.exp(box[:, y, x].reshape(4, 16))
                left, top, right, bottom = (e / e.sum(1, keepdims=True)) @ np.arange(16)
                x0, y0, x1, y1 = x + 0.5 - left, y + 0.5 - top, x + 0.5 + right, y + 0.5 + bottom
                rows.append([*(stride * np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])),
                             *(1 / (1 + np.exp(-score[:, y, x])))])
    np.testing.assert_allclose(found["output0"][0].T, rows, rtol=1e-3, atol=1e-3)


def test_the_same_arguments_give_the_same_bytes_and_others_do_not():
    first = build("squeezenet", 64, 10, 7)

    assert build("squeezenet", 64, 10, 7) == first
    assert len({first, build("squeezenet", 64, 10, 8), build("squeezenet", 80, 10, 7),
                build("squeezenet", 64, 11, 7)}) == 4


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"repvgg-a2", "repvgg-a2-train", "resnet50"}))
@pytest.mark.parametrize("size", [32, 96])
def test_small_sizes_run(name, size):
    found = run(build(name, size, 3), image(size))

    assert all(np.isfinite(v).all() for v in found.values())


@pytest.mark.parametrize(("arguments", "says"), [
    ({"size": 100}, "resnet50 cannot have an input of 100x100\n  got     100\n  try     --size 96\n"
                    "  want    32..2048 pixels, a multiple of 32"),
    ({"size": 0}, "--size 32"),
    ({"size": 4096}, "--size 2048"),
    ({"classes": 0}, "--classes 0\n  want    1..25000"),
    ({"classes": 10**9}, "1..25000"),
    ({"seed": -1}, "--seed -1"),
])
def test_what_is_out_of_range_is_refused(arguments, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        build("resnet50", **arguments)


def test_an_unknown_name_is_told_what_there_is():
    with pytest.raises(UsageError, match="no topology 'ResNet_50'") as e:
        build("ResNet_50")

    assert e.value.facts["try"] == "resnet50"
    assert all(n in e.value.facts["want"] for n in NAMES)


def test_without_onnx_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'npulab[onnx]'")):
        build("squeezenet", 32, 1)


def test_the_command_writes_the_file_and_says_so(tmp_path, capsys):
    path = tmp_path / "net.onnx"

    assert run_arguments(["zoo", "build", "squeezenet", "-o", str(path), "--size", "64", "--classes", "5"]) == 0
    assert path.read_bytes() == build("squeezenet", 64, 5)
    assert "input 64x64, 5" in capsys.readouterr().out
    assert run_arguments(["zoo", "build", "squeezenet", "-o", str(path), "--size", "48", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": "squeezenet", "file": str(path), "bytes": path.stat().st_size, "size": 48, "classes": 1000, "seed": 0}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("arguments", "says"), [
    (["alexnet", "-o", "x.onnx"], "no topology 'alexnet'"),
    (["squeezenet", "-o", "x.tflite"], "does not write x.tflite"),
    (["squeezenet", "-o", "none/x.onnx", "--size", "32"], "cannot write none/x.onnx"),
    (["squeezenet", "-o", "x.onnx", "--size", "33"], "--size 32"),
    (["squeezenet", "-o", "x.onnx", "--seed", "-1"], "invalid value for '--seed'"),
])
def test_the_command_refuses_and_leaves_nothing(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert run_arguments(["zoo", "build", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_list_fits_the_terminal(capsys):
    assert run_arguments(["zoo", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:lines.index("")] if line[:1].strip()] == list(topologies())
    assert run_arguments(["zoo", "list", "--json"]) == 0
    assert {t["name"] for t in json.loads(capsys.readouterr().out)["topologies"]} == set(NAMES)
