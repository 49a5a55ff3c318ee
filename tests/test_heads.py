"""Heads cut off networks: post-processing against ONNX Runtime and LiteRT, recognition of tails, files and commands."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from npulab import zoo
from npulab.cli import run_arguments
from npulab.errors import ModelError, UnsupportedError
from npulab.exporters.onnx import to_onnx
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers import load
from npulab.passes import head_forms, tflite_head
from npulab.passes.certificate import compared, session
from npulab.passes.pipeline import patched, post_of
from npulab.passes.tflite_head import same_detections, without_head
from npulab.postprocess import apply, boxes, detect, yolo
from npulab.postprocess.program import standalone
from npulab.postprocess.suppress import nms
from npulab.postprocess.types import Nms, Ssd, YoloV5, YoloV8, read_post, to_json
from npulab.targets.facts.board import boards, find_board
from shared import MODELS, SHARED, needs_shared

onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
pytest.importorskip("ai_edge_litert", reason="pip install 'npulab[litert]'")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from test_patch import Net, ops  # noqa: E402

CLASSES, SIZE, ANCHORS = 7, 64, (((10, 13), (16, 30)), ((30, 61), (62, 45)), ((116, 90), (156, 198)))


def random_boxes(rng, n, grid=None):
    """Corners, near one first; on a coarse grid if there are to be equal ones and ones that only touch."""
    b = rng.random((n, 2)) if grid is None else rng.integers(0, grid, (n, 2)) / grid
    return np.concatenate([b, b + (rng.random((n, 2)) if grid is None else rng.integers(0, grid, (n, 2)) / grid)],
                          1).astype(np.float32)


# suppression


def overlap(a, b):
    """Intersection over union of a box with each of `b`, in float32."""
    w = np.maximum(np.minimum(a[2], b[:, 2]) - np.maximum(a[0], b[:, 0]), 0)
    h = np.maximum(np.minimum(a[3], b[:, 3]) - np.maximum(a[1], b[:, 1]), 0)
    first, second = (a[2] - a[0]) * (a[3] - a[1]), (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    whole = first + second - w * h
    return np.where((first > 0) & (second > 0) & (whole > 0), w * h / np.where(whole == 0, 1, whole), 0)


@np.errstate(invalid="ignore", over="ignore")
def obviously(b, classes, iou, limit, per_class):
    """One box after the other."""
    kept = []
    for i in range(len(b)):
        mine = [k for k in kept if classes[k] == classes[i]]
        if len(kept) == limit:
            break
        if len(mine) < per_class and not (overlap(b[i], b[mine]) > np.float32(iou)).any():
            kept.append(i)
    return kept


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 250), st.sampled_from([1, 3, 50]), st.sampled_from([0.0, 0.3, 0.5, 1.0]),
       st.sampled_from([1, 7, 100, 1000]), st.sampled_from([1, 5, 1000]), st.sampled_from([None, 6]))
def test_suppression_is_what_the_obvious_loop_gives(seed, n, kinds, iou, limit, per_class, grid):
    rng = np.random.default_rng(seed)
    b, classes = random_boxes(rng, n, grid), rng.integers(0, kinds, n)

    assert boxes.greedy(b, classes, iou, limit, per_class).tolist() == obviously(b, classes, iou, limit, per_class)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1e-21, 1e-3, 1, 640, 1e18]), st.sampled_from([0.0, 0.45, 0.65, 1.0]),
       st.sampled_from([1, 40]), st.booleans())
def test_suppression_of_boxes_of_any_size_and_of_near_copies(seed, size, iou, kinds, broken):
    rng = np.random.default_rng(seed)
    b = np.repeat(random_boxes(rng, 12), 25, 0) * np.float32(size)
    b *= rng.choice(np.float32([1, 1 + 1e-6, 1.2, 1.55]), (len(b), 1))  # the same ones, or almost `iou`
    b = b[rng.permutation(len(b))]
    if broken:
        b[rng.integers(0, len(b), 30), rng.integers(0, 4, 30)] = rng.choice([np.inf, -np.inf, np.nan, -size], 30)
    classes = rng.integers(0, kinds, len(b))

    assert boxes.greedy(b, classes, iou, 200).tolist() == obviously(b, classes, iou, 200, 1000)


def test_suppression_beyond_what_it_takes_up_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    b, classes = random_boxes(rng, 900, 30), rng.integers(0, 3, 900)
    want = obviously(b, classes, 0.5, 900, 1000)
    monkeypatch.setattr(boxes, "WINDOW", 100)
    monkeypatch.setattr(boxes, "CHUNK", 16)

    assert boxes.greedy(b, classes, 0.5).tolist() == want
    assert len(want) > 300


@given(st.lists(st.integers(0, 5)), st.integers(0, 30))
def test_the_best_are_those_of_a_whole_stable_sort(scores, most):
    scores = np.array(scores, np.float32)
    assert boxes.best_first(scores, most).tolist() == sorted(range(len(scores)), key=lambda i: -scores[i])[:most]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([0, 1, 4, 500]), st.sampled_from([None, 0.3, 0.9]),
       st.sampled_from([0.0, 0.4, 0.7]), st.booleans())
def test_onnx_suppression_is_onnx_runtime_s(seed, centred, most, score, iou, ties):
    rng = np.random.default_rng(seed)
    b = np.stack([random_boxes(rng, 60) for _ in range(2)])
    if not centred:
        b[:, ::3] = b[:, ::3][..., [2, 3, 0, 1]]  # either corner may come first
    scores = rng.random((2, 3, 60)).astype(np.float32)
    scores = np.round(scores * 8) / 8 if ties else scores
    numbers = [numpy_helper.from_array(np.array(x, t), n) for n, x, t in (
        ("most", [most], np.int64), ("iou", [iou], np.float32), ("score", [score or 0], np.float32))]
    node = helper.make_node("NonMaxSuppression", ["b", "s", "most", "iou", *(["score"] if score else [])], ["y"],
                            center_point_box=int(centred))
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info(k, TensorProto.FLOAT, x.shape) for k, x in (
        ("b", b), ("s", scores))], [helper.make_tensor_value_info("y", TensorProto.INT64, None)], numbers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    want = ort.InferenceSession(model.SerializeToString()).run(None, {"b": b, "s": scores})[0]
    got = nms({"b": b, "s": scores}, boxes="b", scores="s", centred=centred, most=most, iou=iou, score=score,
              result="y")["y"]

    np.testing.assert_array_equal(got, want)


# TFLite's operator


def ssd_network(seed, n=90, classes=5, background=True, quantized=False, **options):
    """A network of TFLite_Detection_PostProcess alone, over boxes and scores that are inputs."""
    from flatbuffers import flexbuffers

    rng = np.random.default_rng(seed)
    build = flexbuffers.Builder()
    build.MapFromElements({"max_detections": 20, "max_classes_per_detection": 1, "detections_per_class": 100,
                           "num_classes": classes, "nms_score_threshold": 0.2, "nms_iou_threshold": 0.5,
                           "y_scale": 10.0, "x_scale": 8.0, "h_scale": 5.0, "w_scale": 4.0,
                           "use_regular_nms": False} | options)
    m = ModelBuilder("ssd")
    anchors = rng.uniform(0.1, 0.9, (n, 4)).astype(np.float32)
    kind = "uint8" if quantized else "float32"
    b = m.tensor("codes", (1, n, 4), kind, **({"scale": 0.07, "zero_point": 120} if quantized else {}))
    s = m.tensor("likely", (1, n, classes + background), kind,
                 **({"scale": 1 / 256, "zero_point": 0} if quantized else {}))
    twice = [m.tensor(f"{k}2", sh, kind, **q) for k, sh, q in (
        ("codes", (1, n, 4), {"scale": 0.07, "zero_point": 120} if quantized else {}),
        ("likely", (1, n, classes + background), {"scale": 1 / 256, "zero_point": 0} if quantized else {}))]
    m.op("RESHAPE", [b], [twice[0]], new_shape=[1, n, 4])
    m.op("RESHAPE", [s], [twice[1]], new_shape=[1, n, classes + background])
    a = m.tensor("anchors", (n, 4), kind, **({"scale": 1 / 255, "zero_point": 0,
                                             "data": np.rint(anchors * 255).astype(np.uint8)}
                                            if quantized else {"data": anchors}))
    results = [m.tensor(f"r{i}", (), "float32") for i in range(4)]
    m.custom("TFLite_Detection_PostProcess", [*twice, a], results, bytes(build.Finish()))
    return load(m.build([b, s], results))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.booleans(), st.sampled_from([1, 3]), st.sampled_from([3, 20, 200]),
       st.sampled_from([1, 2, 100]))
def test_ssd_is_what_litert_s_operator_gives(seed, background, regular, per_box, most, per_class):
    graph = ssd_network(seed, background=background, use_regular_nms=regular, max_classes_per_detection=per_box,
                        max_detections=most, detections_per_class=per_class)
    rng = np.random.default_rng(seed)
    feed = {"codes": rng.normal(0, 3, (1, 90, 4)).astype(np.float32),
            "likely": rng.random((1, 90, 5 + background)).astype(np.float32)}
    for a in same_detections(graph, without_head(graph), feed):
        assert a.largest == 0, a


def test_quantized_ssd_has_the_same_bits_and_its_body_is_quantized():
    graph = ssd_network(3, quantized=True)
    made = without_head(graph)

    assert [made.body.values[v].dtype.value for v in made.body.outputs] == ["uint8", "uint8"]
    assert made.post.quantization["codes2"] == (pytest.approx(0.07), 120)
    assert all(a.largest == 0 for a in same_detections(graph, made))


def test_a_head_behind_dequantize_is_cut_in_front_of_it():
    m = ModelBuilder("d")
    b, q = m.tensor("codes", (1, 2, 4), "int8", scale=0.1, zero_point=3), m.tensor("q", (1, 2, 4), "float32")
    inner = m.tensor("inner", (1, 2, 4), "int8", scale=0.1, zero_point=3)
    s, p = m.tensor("likely", (1, 2, 3), "float32"), m.tensor("p", (1, 2, 3), "float32")
    m.op("RESHAPE", [b], [inner], new_shape=[1, 2, 4])
    m.op("DEQUANTIZE", [inner], [q])
    m.op("RESHAPE", [s], [p], new_shape=[1, 2, 3])
    whole = ssd_network(0, n=2, classes=2)
    a = m.tensor("anchors", (2, 4), "float32", data=np.full((2, 4), 0.5, np.float32))
    results = [m.tensor(f"r{i}", (), "float32") for i in range(4)]
    m.custom("TFLite_Detection_PostProcess", [q, p, a], results, whole.nodes[-1].op.options)
    graph = load(m.build([b, s], results))
    made = without_head(graph)

    assert ops(made.body) == ["RESHAPE", "RESHAPE"]
    assert list(made.post.body) == ["inner", "p"]
    assert all(x.equal for x in same_detections(graph, made))  # the kernel of DEQUANTIZE rounds twice


def test_tensors_without_names_or_with_the_same_are_told_apart():
    graph = ssd_network(0)
    for v in graph.values:
        object.__setattr__(v, "name", "same" if v.index % 2 else "")
    made = without_head(graph)

    assert len(made.post.body) == 2
    assert len(set(made.post.outputs)) == 4
    assert all(a.largest == 0 for a in same_detections(ssd_network(0), made))


@pytest.mark.parametrize(("options", "error", "text"), [
    (b"", ModelError, "are no FlexBuffer map"),
    (b"\xff" * 40, ModelError, "TFLite_Detection_PostProcess"),
    (b"\0" * (1 << 17), ModelError, "too many options"),
])
def test_damaged_options_are_told(monkeypatch, options, error, text):
    graph = ssd_network(0)
    object.__setattr__(graph.nodes[-1].op, "options", options)

    with pytest.raises(error, match=text):
        without_head(graph)


def test_damaged_options_never_end_in_something_else():
    graph = ssd_network(0)
    good, rng = graph.nodes[-1].op.options, np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(int(rng.integers(1, 6))):
            bad[int(rng.integers(len(bad)))] = int(rng.integers(256))
        object.__setattr__(graph.nodes[-1].op, "options", bytes(bad[: int(rng.integers(len(bad) + 1))] or bad))
        with contextlib.suppress(ModelError, UnsupportedError):
            without_head(graph)


# YOLO


def v5_tail(n, level, m, hw, variant, size=SIZE):
    """The boxes of one map as an exporter might write them."""
    h, w = hw
    anchors = np.array(ANCHORS[level], np.float32)
    a, stride = len(anchors), size / h
    grid = np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(np.float32)
    y = n.op("Reshape", m, n.constant([1, a, 5 + CLASSES, h, w], np.int64))
    if variant == "places first":
        y = n.op("Transpose", y, perm=[0, 3, 4, 1, 2])
        grid, anchors = grid[None, :, :, None], anchors.reshape(1, 1, 1, a, 2)
    else:
        y = n.op("Transpose", y, perm=[0, 1, 3, 4, 2])
        grid, anchors = grid[None, None], anchors.reshape(1, a, 1, 1, 2)
    y = n.op("Sigmoid", y)
    xy, wh, rest = (n.op("Slice", y, *(n.constant([v], np.int64) for v in (i, j, 4))) for i, j in (
        (0, 2), (2, 4), (4, 5 + CLASSES)))
    unit = 1 / size if variant == "fractions" else 1.0
    if variant == "other arithmetic":  # 2 y stride + (grid - 0.5) stride; (2 y) (2 y anchor)
        xy = n.op("Add", n.op("Mul", xy, n.constant(2 * stride)), n.constant((grid - 0.5) * stride))
        two = n.op("Mul", wh, n.constant(2.0))
        wh = n.op("Mul", two, n.op("Mul", two, n.constant(anchors)))
    else:
        xy = n.op("Mul", n.op("Add", n.op("Mul", xy, n.constant(2.0)), n.constant(grid - 0.5)),
                  n.constant(stride * unit))
        power = 3.0 if variant == "wrong" and level == 1 else 2.0
        wh = n.op("Mul", n.op("Pow", n.op("Mul", wh, n.constant(2.0)), n.constant(power)), n.constant(anchors * unit))
    y = n.op("Concat", xy, wh, rest, axis=4)
    return n.op("Reshape", y, n.constant([1, a * h * w, 5 + CLASSES], np.int64))


def pyramid(n):
    """Maps of 4 channels at strides 8, 16 and 32."""
    y, found = "x", []
    for channels in (3, 4, 4, 4, 4):
        y = n.op("Relu", n.conv(y, 4, 3, channels=channels, strides=[2, 2]))
        found.append(y)
    return found[2:]


def v5(variant, seed=0):
    n = Net(seed, channels=3, size=(SIZE, SIZE))
    rows = []
    for level, y in enumerate(pyramid(n)):
        stride = 8 << level
        m = n.conv(y, 2 * (5 + CLASSES), 1, channels=4)
        rows.append(v5_tail(n, level, m, (SIZE // stride,) * 2, variant))
    if variant == "small first":
        rows.reverse()
    y = n.op("Concat", *rows, axis=1)
    outputs = [y]
    if variant == "apart":
        b, o, c = (n.op("Slice", y, *(n.constant([v], np.int64) for v in (i, j, 2))) for i, j in (
            (0, 4), (4, 5), (5, 5 + CLASSES)))
        half = n.constant(np.array([[1, 0, 1, 0], [0, 1, 0, 1], [-0.5, 0, 0.5, 0], [0, -0.5, 0, 0.5]]))
        outputs = [n.op("MatMul", b, half), n.op("Transpose", n.op("Mul", o, c), perm=[0, 2, 1])]
    return n.graph(*outputs)


@pytest.mark.parametrize("variant", ["plain", "other arithmetic", "places first", "small first", "fractions"])
def test_yolov5_is_known_however_it_was_written(variant):
    graph = v5(variant)
    body, changes = patched(graph, ["cut-head"])
    post = post_of(graph, body, changes)
    (stage,) = post.stages

    assert isinstance(stage, YoloV5)
    assert [ops(body).count(k) for k in ("Conv", "Relu")] == [8, 5]
    assert len(body.nodes) == 13
    unit = SIZE if variant == "fractions" else 1
    assert sorted(s * unit for s in stage.strides) == pytest.approx([8, 16, 32], rel=1e-5)
    assert sorted(a[0] * unit for level in stage.anchors for a in level) == pytest.approx(
        sorted(a[0] for level in ANCHORS for a in level), rel=1e-5)
    assert stage.order == ("yxa" if variant == "places first" else "ayx")
    assert all(a.equal for a in compared(graph, body, None, post))
    assert len(compared(graph, body, None, post)) == 3  # boxes, object and classes apart


def test_a_head_that_is_almost_yolov5_is_refused_with_a_reason():
    graph = v5("wrong")
    with pytest.raises(UnsupportedError, match="computes neither YOLOv5's boxes nor YOLOv8's"):
        patched(graph, ["cut-head"])
    hailo = find_board("hailo8")
    _, changes = patched(graph, (), lambda g: {f.node for f in hailo.check(g).findings if f.where != "npu"})
    assert not [c for c in changes if c.stage]  # nobody asked: it just stays


def test_a_proof_that_fails_cuts_nothing(monkeypatch):
    monkeypatch.setattr(head_forms, "TOLERANCE", -1.0)
    with pytest.raises(UnsupportedError, match="neither"):
        patched(v5("plain"), ["cut-head"])


def whole_numbers(n, output, kind=TensorProto.INT64):
    """As Net.graph, of an output in whole numbers."""
    made = helper.make_graph(n.nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, n.shape)],
                             [helper.make_tensor_value_info(output, kind, None)], n.constants)
    return load(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())


def v8(form="xywh", columns_last=False, apart=False, bins=16, classes=CLASSES, suppressed=False, seed=0):
    n = Net(seed, channels=3, size=(SIZE, SIZE))
    flat, centres, strides = [], [], []
    for stride, y in zip((8, 16, 32), pyramid(n), strict=True):
        k = SIZE // stride
        pair = [n.conv(y, c, 1, channels=4) for c in (4 * bins, classes)]
        both = n.op("Concat", *pair, axis=1)
        flat.append(n.op("Reshape", both, n.constant([1, 4 * bins + classes, k * k], np.int64)))
        centres.append(np.stack(np.meshgrid(np.arange(k) + 0.5, np.arange(k) + 0.5)).reshape(2, -1))
        strides.append(np.full(k * k, stride))
    centre, stride = np.concatenate(centres, 1), np.concatenate(strides)
    y = n.op("Concat", *flat, axis=2)
    b, c = (n.op("Slice", y, *(n.constant([v], np.int64) for v in (i, j, 1))) for i, j in (
        (0, 4 * bins), (4 * bins, 4 * bins + classes)))
    b = n.op("Reshape", b, n.constant([1, 4, bins, len(stride)], np.int64))
    b = n.op("Softmax", n.op("Transpose", b, perm=[0, 2, 1, 3]), axis=1)
    b = n.op("Conv", b, n.constant(np.arange(bins).reshape(1, bins, 1, 1)))
    b = n.op("Reshape", b, n.constant([1, 4, len(stride)], np.int64))
    near, far = (n.op("Slice", b, *(n.constant([v], np.int64) for v in (i, i + 2, 1))) for i in (0, 2))
    near, far = n.op("Sub", n.constant(centre[None]), near), n.op("Add", n.constant(centre[None]), far)
    if form == "xywh":
        near, far = (n.op("Mul", n.op("Add", near, far), n.constant(0.5)), n.op("Sub", far, near))
    b = n.op("Mul", n.op("Concat", near, far, axis=1), n.constant(stride[None, None]))
    c = n.op("Sigmoid", c)
    if suppressed:
        rows = n.op("Transpose", b, perm=[0, 2, 1])
        return whole_numbers(n, n.op("NonMaxSuppression", rows, c, n.constant([20], np.int64), n.constant([0.45]),
                                     n.constant([0.3]), center_point_box=int(form == "xywh")))
    outputs = [b, c] if apart else [n.op("Concat", b, c, axis=1)]
    return n.graph(*(n.op("Transpose", x, perm=[0, 2, 1]) if columns_last else x for x in outputs))


@pytest.mark.parametrize("options", [
    {}, {"form": "xyxy"}, {"columns_last": True}, {"apart": True}, {"bins": 8},
    {"apart": True, "columns_last": True, "form": "xyxy"}, {"classes": 64}, {"classes": 1}, {"classes": 80, "bins": 4}],
    ids=str)
def test_yolov8_is_known_however_it_was_written(options):
    graph = v8(**options)
    body, changes = patched(graph, ["cut-head"])
    post = post_of(graph, body, changes)
    (stage,) = post.stages

    assert isinstance(stage, YoloV8)
    assert [ops(body).count(k) for k in ("Conv", "Relu")] == [11, 5]
    assert stage.strides == (8, 16, 32)
    assert [post.body[b][1] for b in stage.boxes] == [4 * options.get("bins", 16)] * 3
    assert all(a.equal for a in compared(graph, body, None, post))


@pytest.mark.parametrize("form", ["xywh", "xyxy"])
def test_suppression_and_the_head_before_it_are_cut_one_after_the_other(form):
    graph = v8(form, suppressed=True)
    body, changes = patched(graph, ["cut-head"])
    post = post_of(graph, body, changes)

    assert [type(s) for s in post.stages] == [YoloV8, Nms]
    assert [ops(body).count(k) for k in ("Conv", "Relu")] == [11, 5]
    x = np.random.default_rng(1).normal(0, 1, (1, 3, SIZE, SIZE)).astype(np.float32)
    want = session(graph).run(None, {"x": x})[0]
    got = apply(post, dict(zip(post.body, session(body).run(list(post.body), {"x": x}), strict=True)))
    assert len(want) > 20
    np.testing.assert_array_equal(got[post.outputs[0]], want)


def test_suppression_that_others_read_is_refused():
    n = Net(0)
    y = n.op("Reshape", n.conv("x", 4, 3), n.constant([1, -1, 4], np.int64))
    s = n.op("Transpose", n.op("Slice", y, *(n.constant([v], np.int64) for v in (0, 1, 2))), perm=[0, 2, 1])
    found = n.op("NonMaxSuppression", y, s, n.constant([5], np.int64), n.constant([0.5]), n.constant([0.1]))
    graph = whole_numbers(n, n.op("Cast", found, to=TensorProto.INT32), TensorProto.INT32)

    with pytest.raises(UnsupportedError, match="cannot be cut off") as e:
        patched(graph, ["cut-head"])
    assert "others read it" in e.value.facts["got"]


@pytest.mark.parametrize("name", ["squeezenet", "ssdlite", "vit-tiny"])
def test_networks_without_such_a_head_stay_as_they_are(name):
    graph = load(zoo.build(name, 224 if name == "vit-tiny" else 128))
    assert not [c for c in patched(graph, ["cut-head"])[1] if c.stage]


# what is found


def looked_at(post, outputs, score, iou, limit):
    """Objects the slow way: from the untouched output, with the obvious suppression."""
    rows = apply(post, outputs)[post.outputs[0]][0].T
    best, scores = rows[:, 4:].argmax(1), rows[:, 4:].max(1)
    order = [i for i in np.argsort(-scores, kind="stable") if scores[i] > score]
    corners = boxes.turned(rows[order, :4] / SIZE, "xyxy")
    keep = obviously(corners, best[order], iou, limit, 10**9)
    return corners[keep], scores[order][keep], best[order][keep]


def obvious_objects(post, outputs, score, iou, limit, several):
    """The same objects to the bit, from all boxes: every score, one sort, box after box."""
    (stage,) = post.stages
    given = {k: v for k, v in post.plain[0].items() if k != "kind"}
    levels, at, scores = [], [], []
    for level, name in enumerate(stage.maps if isinstance(stage, YoloV5) else stage.classes):
        m = outputs[name]
        cells = m.shape[2] * m.shape[3]
        rows = m.reshape(len(stage.anchors[level]) if isinstance(stage, YoloV5) else 1, -1, cells)
        logits = np.concatenate(list(rows), 1)
        p = boxes.sigmoid(logits[5:]) * boxes.sigmoid(logits[4]) if isinstance(stage, YoloV5) else boxes.sigmoid(logits)
        if not several:
            best = (logits[5:] if isinstance(stage, YoloV5) else logits).argmax(0)
            p = np.where(np.arange(len(p))[:, None] == best, p, -1)
        scores.append(p)
        at.append(np.arange(p.shape[1]))
        levels.append(np.full(p.shape[1], level))
    scores, at, levels = np.concatenate(scores, 1), np.concatenate(at), np.concatenate(levels)
    corners = (yolo.yolov5_corners if isinstance(stage, YoloV5) else yolo.yolov8_corners)(outputs, levels, at, **given)
    kinds, box = np.nonzero(scores > score)
    if not several:
        box, kinds = (x[np.argsort(box, kind="stable")] for x in (box, kinds))
    order = np.argsort(-scores[kinds, box], kind="stable")
    kinds, box = kinds[order], box[order]
    keep = obviously(corners[box], kinds, iou, limit, 10**9)
    return corners[box][keep], scores[kinds, box][keep], kinds[keep]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("make", ["v5", "v8"])
def test_objects_are_the_obvious_ones_to_the_bit(monkeypatch, make, ties):
    monkeypatch.setattr(yolo, "FIRST", 40)  # so that more has to be decoded now and then
    graph = v5("plain") if make == "v5" else v8()
    body, changes = patched(graph, ["cut-head"])
    post = post_of(graph, body, changes)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        outputs = {name: rng.normal(-1, 3, s).astype(np.float32) for name, s in post.body.items()}
        if ties:
            outputs = {name: np.rint(x) * 2 for name, x in outputs.items()}
        for score, several, limit in ((0.3, True, 500), (0.3, False, 20), (0.9, True, 300), (0.001, False, 60),
                                      (0.999, True, 300), (0.0, False, 30), (1.0, True, 300), (-1.0, False, 10)):
            got = detect(post, outputs, score, 0.4, limit, several)
            for a, b in zip(got, obvious_objects(post, outputs, score, 0.4, limit, several), strict=True):
                np.testing.assert_array_equal(a, b)


def test_objects_are_those_of_the_untouched_output():
    graph = v8()
    body, changes = patched(graph, ["cut-head"])
    post = post_of(graph, body, changes)
    rng = np.random.default_rng(0)
    outputs = {name: rng.normal(0, 2, s).astype(np.float32) for name, s in post.body.items()}
    for score, limit in ((0.001, 30), (0.5, 300), (0.9, 300), (1.0, 300)):
        got, want = detect(post, outputs, score, 0.5, limit), looked_at(post, outputs, score, 0.5, limit)
        np.testing.assert_allclose(got[0], want[0], atol=1e-5)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
        np.testing.assert_array_equal(got[2], want[2])
    assert len(detect(post, outputs, 1.0)[0]) == 0
    several = detect(post, outputs, 0.3, 1.0, 10**6, several=True)
    assert len(several[0]) == sum((boxes.sigmoid(outputs[c]) > 0.3).sum() for c in post.stages[0].classes)


def test_maps_may_have_other_names_and_channels_last():
    graph = v8(classes=8)  # 8 x 8 places of 8 classes: its shape alone says nothing
    body, changes = patched(graph, ["cut-head"])
    post = post_of(graph, body, changes)
    rng = np.random.default_rng(0)
    outputs = {name: rng.normal(0, 2, s).astype(np.float32) for name, s in post.body.items()}
    turned = {f"StatefulPartitionedCall:{i}": x.transpose(0, 2, 3, 1) for i, x in enumerate(outputs.values())}
    (a,), (b,) = apply(post, outputs).values(), apply(post, turned).values()

    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("change", [
    lambda o: o.pop(next(iter(o))), lambda o: o.update({next(iter(o)): np.zeros((1, 2, 3), np.float32)}),
    lambda o: o.update({next(iter(o)): np.zeros((1, 64, 8, 8), np.int8)})])
def test_wrong_outputs_are_told(change):
    graph = v8()
    body, changes = patched(graph, ["cut-head"])
    post = post_of(graph, body, changes)
    outputs = {name: np.zeros(s, np.float32) for name, s in post.body.items()}
    change(outputs)

    with pytest.raises(ModelError, match="the post-processing of 'model'"):
        apply(post, outputs)


def test_stages_that_do_not_fit_each_other_are_told():
    graph = v8(suppressed=True)
    body, changes = patched(graph, ["cut-head"])
    data = json.loads(to_json(post_of(graph, body, changes)))
    data["stages"][0]["results"][0]["columns"] = ["scores"]
    post = read_post(json.dumps(data).encode())

    with pytest.raises(ModelError, match="does not fit together"):
        apply(post, {name: np.zeros(s, np.float32) for name, s in post.body.items()})


def test_boxes_go_back_to_the_picture():
    whole = np.array([[0, 0.125, 1, 0.875], [0.5, 0.5, 0.75, 2]])  # 640 x 480 in a square, grey above and below
    np.testing.assert_allclose(boxes.on_picture(whole, (320, 320), (480, 640)),
                               [[0, 0, 640, 480], [320, 240, 480, 480]])
    np.testing.assert_allclose(boxes.on_picture(whole[:1], (320, 320), (480, 640), "squash"), [[0, 60, 640, 420]])


# files


def test_the_record_survives_its_file_and_what_is_wrong_with_one_is_told():
    graph = v8(suppressed=True)
    body, changes = patched(graph, ["cut-head"])
    for post in (post_of(graph, body, changes), without_head(ssd_network(0)).post):
        assert read_post(to_json(post)) == post
        data = json.loads(to_json(post))
        for damage, text in (
            (lambda d: d.update(stages=[]), "does not fit together"),
            (lambda d: d["stages"][0].update(kind="magic"), "no post-processing"),
            (lambda d: d.update(outputs=["nothing"]), "does not fit together"),
            (lambda d: d.update(body={}), "does not fit together"),
            (lambda d: d.update(body={k: [1 << 30, 1 << 30, 4, 4] for k in d["body"]}), "does not fit together"),
            (lambda d: d["stages"][0].update(strides=[0, 8, 16], scales=[0, 1, 1, 1]), "no post-processing"),
            (lambda d: d["stages"][0].update({"strides": [8, 0, 16]} if "strides" in d["stages"][0]
                                             else {"scales": [0, 1, 1, 1]}), "does not fit together"),
            (lambda d: d.update(format="npulab post-processing 2"), "no post-processing"),
        ):
            bad = json.loads(json.dumps(data))
            damage(bad)
            with pytest.raises(ModelError, match=text):
                read_post(json.dumps(bad).encode())
    for text in (b"", b"[]", b"{", b"\xff", b"[" * 100000):
        with pytest.raises(ModelError, match="no post-processing that npulab patch wrote"):
            read_post(text)


@pytest.mark.parametrize("make", ["v5", "v8", "ssd"])
def test_the_program_needs_numpy_alone_and_gives_the_same(tmp_path, make):
    if make == "ssd":
        made = without_head(ssd_network(1, quantized=True))
        post, rng = made.post, np.random.default_rng(0)
        outputs = {name: rng.integers(0, 256, s).astype(np.uint8) for name, s in post.body.items()}
    else:
        graph = v5("plain") if make == "v5" else v8()
        body, changes = patched(graph, ["cut-head"])
        post, rng = post_of(graph, body, changes), np.random.default_rng(0)
        outputs = {name: rng.normal(0, 2, s).astype(np.float32) for name, s in post.body.items()}
    (tmp_path / "net_post.py").write_text(standalone(post))
    np.savez(tmp_path / "in.npz", *outputs.values())
    code = f"""
import importlib.util, sys
sys.path.insert(0, ".")
assert not any(map(importlib.util.find_spec, ("npulab", "msgspec", "onnx", "PIL")))
import numpy as np, net_post
stored = np.load("in.npz")
outputs = dict(zip({list(outputs)!r}, (stored[k] for k in stored.files)))
np.savez("out.npz", *net_post.postprocess(outputs).values(), *net_post.detect(outputs, 0.4))
"""
    packages = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (packages / name).exists():
            (tmp_path / name).symlink_to(packages / name)
    subprocess.run([sys.executable, "-I", "-S", "-W", "error", "-c", code], check=True, cwd=tmp_path)
    stored = np.load(tmp_path / "out.npz")
    want = [*apply(post, outputs).values(), *detect(post, outputs, 0.4)]

    assert len(want[-1])
    for k, x in zip(stored.files, want, strict=True):
        np.testing.assert_array_equal(stored[k], x)


# the commands


@pytest.fixture(scope="module")
def patched_v8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    (folder / "net.onnx").write_bytes(to_onnx(v8()))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 96, 3), np.uint8)).save(folder / "picture.png")
    return folder


def test_patch_writes_body_record_and_program(patched_v8, capsys):
    out, report = patched_v8 / "my-body.onnx", patched_v8 / "report.json"

    assert run_arguments(["patch", str(patched_v8 / "net.onnx"), "-o", str(out), "--target", "hailo8", "--report",
                          str(report)]) == 0
    text = capsys.readouterr().out
    assert "YOLOv8's head at strides 8, 16, 32, left to NumPy; 6 maps are outputs" in text
    assert "Equivalent with its post-processing: the outputs agree within 1e-5" in text
    assert "my_body_post.py: post-processing that needs NumPy alone." in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= max(80, len(str(out)) + 30)
    data = json.loads(report.read_text())
    assert (data["post_processing"], data["verdicts_after"]["npu"], data["after"]["nodes"]) == (True, 16, 16)
    assert all(o["equal"] for o in data["outputs"])
    assert sorted(p.name for p in patched_v8.glob("my*")) == ["my-body.onnx", "my-body.post.json", "my_body_post.py"]


def test_run_finds_objects_with_the_record_beside_the_body(patched_v8, capsys):
    out = patched_v8 / "body.onnx"
    assert run_arguments(["patch", str(patched_v8 / "net.onnx"), "-o", str(out), "--pass", "cut-head"]) == 0
    capsys.readouterr()
    arguments = ["--input", str(patched_v8 / "picture.png"), "--fit", "pad", "--score", "0.6"]
    assert run_arguments(["run", str(out), *arguments, "--draw", str(patched_v8 / "drawn.png"), "-o",
                          str(patched_v8 / "out.npy"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    graph = load(patched_v8 / "net.onnx")
    assert run_arguments(["run", str(patched_v8 / "net.onnx"), *arguments, "-o",
                          str(patched_v8 / "untouched.npy")]) == 0
    assert "net in ONNX Runtime\n" in capsys.readouterr().out
    want = np.load(patched_v8 / "untouched.npy")
    np.testing.assert_allclose(np.load(patched_v8 / "out.npy"), want, atol=1e-4)
    best = max(data["boxes"], key=lambda b: b["score"])
    assert best["score"] == pytest.approx(want[0, 4:].max(), abs=1e-5)
    assert best["index"] == want[0, 4:].max(1).argmax()
    i = want[0, 4:].max(0).argmax()
    assert best["left"] == pytest.approx((want[0, 0, i] - want[0, 2, i] / 2) / SIZE, abs=1e-5)
    assert Image.open(patched_v8 / "drawn.png").size == (96, 48)
    assert graph.format == "onnx"

    assert run_arguments(["run", str(out), *arguments]) == 0
    assert "body in ONNX Runtime, with its post-processing" in capsys.readouterr().out


def test_a_record_of_another_network_is_told(patched_v8, capsys):
    (patched_v8 / "net.post.json").write_bytes((patched_v8 / "my-body.post.json").read_bytes()
                                               if (patched_v8 / "my-body.post.json").exists() else b"")
    code = run_arguments(["run", str(patched_v8 / "net.onnx"), "--input", str(patched_v8 / "picture.png")])
    (patched_v8 / "net.post.json").unlink()

    assert code == 3
    assert "post-processing" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code", "text"), [
    (["patch", "ssd.tflite", "-o", "out.tflite", "--pass", "focus"], 1, "the pass 'focus' cannot be done on 'ssd'"),
    (["patch", "plain.tflite", "-o", "out.tflite", "--pass", "cut-head"], 1, "has no head that can be cut off"),
    (["run", "net.onnx", "--input", "x.npy", "--compare", "litert"], 2, "--compare is for what is compiled"),
    (["run", "net.onnx"], 2, "the model takes 1 input"),
    (["run", "broken.onnx", "--input", "x.npy"], 3, "broken.post.json is no post-processing that npulab patch wrote"),
])
def test_mistakes_are_told(tmp_path, capsys, monkeypatch, arguments, code, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ssd.tflite").write_bytes(bytes(ssd_network(0).source))
    m = ModelBuilder("plain")
    x, y = m.tensor("x", (1, 4), "float32"), m.tensor("y", (1, 4), "float32")
    m.op("ADD", [x, x], [y], fused_activation_function="NONE")
    (tmp_path / "plain.tflite").write_bytes(m.build([x], [y]))
    for name in ("net", "broken"):
        (tmp_path / f"{name}.onnx").write_bytes(to_onnx(v8()))
    (tmp_path / "broken.post.json").write_text("{}")

    assert run_arguments(arguments) == code
    assert text in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_patch_and_run_a_tflite_detector(tmp_path, capsys):
    (tmp_path / "ssd.tflite").write_bytes(bytes(ssd_network(5, quantized=True).source))
    out = tmp_path / "body.tflite"

    assert run_arguments(["patch", str(tmp_path / "ssd.tflite"), "-o", str(out), "--target", "ethos_u65"]) == 0
    assert "TFLite_Detection_PostProcess (node 2): left to NumPy" in capsys.readouterr().out
    rng = np.random.default_rng(0)
    given = []
    for name, shape in (("codes", (1, 90, 4)), ("likely", (1, 90, 6))):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, shape).astype(np.uint8))
        given += ["--input", f"{name}={tmp_path / name}.npy"]
    found = []
    for name in ("ssd", "body"):
        assert run_arguments(["run", str(tmp_path / f"{name}.tflite"), "--target", "a311d", *given, "--score", "0.9",
                              "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["boxes"])
    assert found[0] == found[1]
    assert len(found[0]) > 3


# real networks


@needs_shared
def test_yolov5n_finds_the_same_objects_on_pictures():
    graph = load(MODELS / "float" / "yolov5n_coco_float.onnx")
    body, changes = patched(graph, ["cut-head"])
    post = post_of(graph, body, changes)
    first, second = session(graph), session(body)
    files = sorted((SHARED / "images" / "coco-138" / "images").iterdir())[:1]
    for file in files:
        image = np.asarray(Image.open(file).convert("RGB").resize((640, 640)), np.float32) / 255
        x = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
        (rows,) = first.run(None, {"input": x})
        outputs = dict(zip(post.body, second.run(list(post.body), {"input": x}), strict=True))
        scores = rows[0, :, 4:5] * rows[0, :, 5:]
        which, classes = np.nonzero(scores > 0.1)
        order = np.argsort(-scores[which, classes], kind="stable")
        corners = boxes.turned(rows[0, which[order], :4], "xyxy")
        keep = obviously(corners, classes[order], 0.6, 300, 300)
        got = detect(post, outputs, 0.1, 0.6, 300, several=True)
        np.testing.assert_allclose(got[0] * 640, corners[keep], atol=1e-2)
        np.testing.assert_array_equal(got[2], classes[order][keep])
        assert len(keep) > 2


@needs_shared
@pytest.mark.parametrize(("name", "side"), [("coco_ssd_mobilenet_v1_1.0_quant_2018_06_29", 300),
                                            ("ssdlite_mobiledet_coco_qat_postprocess", 320)])
def test_real_detectors_have_the_same_bits_as_litert_s_operator(name, side):
    graph = load(MODELS / "quantized" / f"{name}.tflite")
    made = without_head(graph)
    assert isinstance(made.post.stages[0], Ssd)
    assert len(made.body.nodes) == len(graph.nodes) - 1
    files = sorted((SHARED / "images" / "coco-138" / "images").iterdir())[:1]
    for file in files:
        x = np.asarray(Image.open(file).convert("RGB").resize((side, side)))[None]
        found = same_detections(graph, made, {graph.values[graph.inputs[0]].name: x})
        assert all(a.largest == 0 for a in found)


@needs_shared
def test_yolov5n_needs_no_hint_for_ten_boards():
    graph = patched(load(MODELS / "float" / "yolov5n_coco_float.onnx"))[0]
    body = patched(graph, ["cut-head"])[0]
    new = [b.name for b in boards().values() if all(f.where == "npu" for f in b.check(body).findings)
           and any(f.where != "npu" for f in b.check(graph).findings)]
    assert len(new) >= 10
    board = find_board(new[0])
    made, changes = patched(graph, (), lambda g: {f.node for f in board.check(g).findings if f.where != "npu"})
    assert [c.name for c in changes if c.stage] == ["cut-head"]
    assert len(made.nodes) == len(body.nodes)
    assert tflite_head.detection(made) is None
