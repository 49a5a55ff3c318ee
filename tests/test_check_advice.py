"""What the check finds beyond operators: tails, ranges, strides, channels, sizes, memory; costs of the fallback."""

import json

import numpy as np
import pytest

pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")

from onnx import TensorProto, helper

from npulab import zoo
from npulab.cli import run_arguments
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers import load
from npulab.targets.facts.advice import for_chip
from npulab.targets.facts.board import boards, find_board, regions
from npulab.targets.facts.costs import cost, epochs, nbytes
from npulab.targets.facts.outlook import STATES, best_first, outlook
from npulab.targets.facts.ranges import Ranges
from npulab.targets.facts.survey import survey
from shared import MODELS, needs_shared

FLOAT = TensorProto.FLOAT


def graph(nodes, constants=None, inputs=(("x", (1, 3, 64, 64)),), outputs=("y",)):
    tensors = [helper.make_tensor(k, TensorProto.INT64 if v.dtype == np.int64 else FLOAT, v.shape, v.ravel())
               for k, v in (constants or {}).items()]
    made = helper.make_graph([helper.make_node(op, i, o, **a) for op, i, o, a in nodes], "net",
                             [helper.make_tensor_value_info(n, FLOAT, d) for n, d in inputs],
                             [helper.make_tensor_value_info(n, FLOAT, None) for n in outputs], tensors)
    return load(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())


def weights(o, i, k=3, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, (o, i, k, k)).astype(np.float32)


def conv(x, w, y, stride=1, k=3):
    return "Conv", [x, w], [y], {"kernel_shape": [k, k], "pads": [k // 2] * 4, "strides": [stride] * 2}


def kinds(found):
    return {a.kind: a for a in found.advice}


@pytest.fixture(scope="module")
def yolo5():
    return load(zoo.build("yolov5s", 64))


@pytest.fixture(scope="module")
def yolo8():
    return load(zoo.build("yolov8n", 64))


# tails


def test_the_tail_of_a_detector_begins_behind_its_last_convolutions(yolo5, yolo8):
    for net, heads in ((yolo5, 3), (yolo8, 6)):
        known = survey(net)

        assert len(known.heads) == heads
        assert all(net.producer[v].op.name == "Conv" for v in known.heads)
        # nothing in the tail feeds a convolution, but the mean of DFL
        behind = [n for n in net.nodes if n.index in known.tail and n.op.name == "Conv"]
        assert all(net.values[n.outputs[0]].shape[1] == 1 for n in behind)
        assert len(behind) == (1 if heads == 6 else 0)


def test_a_tail_is_to_be_cut_where_the_sentence_says(yolo5):
    found = outlook(yolo5, find_board("rk3588"), "int8", "my net.onnx")
    tail = kinds(found)["tail"]

    assert found.state == "tail"
    assert {f.node for f in found.check.findings if f.where != "npu"} <= set(tail.nodes)
    assert all(yolo5.values[v].name in tail.remedy for v in survey(yolo5).heads)
    assert "one tail behind the last convolutions" in found.verdict
    assert tail.command in ("", "npulab patch 'my net.onnx' --target rk3588 --as int8 --pass cut-head -o OUT")


def test_one_branch_is_cut_before_what_does_not_run():
    net = graph([conv("x", "w", "a"), ("Relu", ["a"], ["p"], {}), ("Det", ["p"], ["d"], {}), ("Neg", ["d"], ["y"], {})],
                {"w": weights(8, 3)})
    found = outlook(net, find_board("rk3588"), "int8")

    assert found.check.findings[2].where != "npu"
    assert "end the network at p " in kinds(found)["tail"].remedy
    assert kinds(found)["tail"].nodes == (2, 3)


def test_what_lies_between_convolutions_is_no_tail():
    net = graph([conv("x", "w", "a"), ("Det", ["a"], ["d"], {}), ("Add", ["a", "d2"], ["b"], {}),
                 ("Unsqueeze", ["d", "two"], ["d2"], {}), conv("b", "v", "y")],
                {"w": weights(8, 3), "v": weights(8, 8), "two": np.array([2, 3])})
    found = outlook(net, find_board("rk3588"), "int8")

    assert "tail" not in kinds(found)
    assert found.state in ("refused", "host", "unknown")


# ranges


def test_boxes_beside_scores_are_found_by_interval_arithmetic(yolo5, yolo8):
    five, eight = survey(yolo5).joints, survey(yolo8).joints

    assert len(eight) == 1
    assert [yolo5.nodes[j.node].name for j in five if j.inputs[-1][1] == 1.0] == [
        "24/0/concat", "24/1/concat", "24/2/concat"]
    five = tuple(j for j in five if j.inputs[-1][1] == 1.0)  # one more: at 64 pixels the levels' anchors lie apart
    assert all(j.kept < 2 for j in five + eight)
    assert all(j.inputs[-1][1] == 1.0 for j in five + eight)  # the scores, 0 to 1
    names = {yolo8.values[v].name for v, _ in eight[0].inputs}
    assert names == {yolo8.values[v].name for v in yolo8.nodes[eight[0].node].inputs}


def test_intervals_hold_what_onnx_runtime_computes(yolo8):
    """Every value with a bound, over random inputs."""
    ort = pytest.importorskip("onnxruntime")
    import onnx

    from npulab.exporters.onnx import to_onnx

    known = survey(yolo8)
    ranges = Ranges(yolo8, known.names, known.properties)
    bound = {v: ranges.of(v) for n in yolo8.nodes for v in n.outputs if np.isfinite(ranges.of(v)).all()}
    floats = {v: b for v, b in bound.items() if yolo8.values[v].dtype.value == "float32"}
    proto = onnx.load_from_string(to_onnx(yolo8))
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(yolo8.values[v].name, FLOAT, None) for v in floats)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    image = yolo8.values[yolo8.inputs[0]]
    x = np.random.default_rng(1).normal(0, 3, image.shape).astype(np.float32)

    assert len(floats) > 60
    for (low, high), y in zip(floats.values(), session.run(None, {image.name: x}), strict=True):
        slack = 1e-4 * max(abs(low), abs(high))
        assert low - slack <= y.min()
        assert y.max() <= high + slack


def quantized_concat(small, large, out):
    b = ModelBuilder("joint")
    x = b.tensor("x", (1, 8, 8, 4), "int8", scale=small, zero_point=0)
    z = b.tensor("z", (1, 8, 8, 4), "int8", scale=large, zero_point=0)
    y = b.tensor("y", (1, 8, 8, 8), "int8", scale=out, zero_point=0)
    b.op("CONCATENATION", [x, z], [y], axis=3, fused_activation_function="NONE")
    return load(bytes(b.build([x, z], [y])))


@pytest.mark.parametrize(("small", "large", "kept"), [(0.01, 0.03, None), (0.01, 0.05, 51.2), (0.001, 1.0, 0.256)])
def test_scales_of_a_quantized_concatenation_may_differ_by_four(small, large, kept):
    found = survey(quantized_concat(small, large, large)).joints

    assert [round(j.kept, 3) for j in found] == ([] if kept is None else [kept])


def test_ranges_are_told_of_what_will_be_quantized_only(yolo5):
    assert "ranges" in kinds(outlook(yolo5, find_board("rk3588"), "int8"))
    assert "ranges" not in kinds(outlook(yolo5, find_board("rk3588")))
    assert "3 more are like it" in kinds(outlook(yolo5, find_board("hailo8"), "int8"))["ranges"].found


# sizes


def strided(size, strides=(2, 2, 2)):
    names = ["x", "a", "b", "y"]
    return graph([conv(names[i], f"w{i}", names[i + 1], s) for i, s in enumerate(strides)],
                 {f"w{i}": weights(8, 3 if i == 0 else 8) for i in range(3)}, (("x", (1, 3, size, size)),))


@pytest.mark.parametrize(("size", "rounded"), [(64, None), (60, (64, 64)), (65, (72, 72)), (96, None)])
def test_an_image_that_does_not_fit_the_strides_is_found(size, rounded):
    image = survey(strided(size)).image

    assert (None if image is None else image.rounded) == rounded
    if image is not None:
        a = kinds(outlook(strided(size), find_board("rk3588"), "int8"))["image"]
        assert f"{size}x{size}, and the network shrinks it by 8" in a.found
        assert f"{rounded[0]}x{rounded[1]}" in a.remedy
        assert a.price == f"{100 * (rounded[0] ** 2 / size ** 2 - 1):+.1f} % pixels"


def test_enlarging_takes_strides_back():
    larger = ("Resize", ["a", "", "s"], ["b"], {"mode": "nearest"})
    net = graph([conv("x", "w", "a", 2), larger, conv("b", "v", "y", 2)],
                {"w": weights(8, 3), "v": weights(8, 8), "s": np.array([1, 1, 2, 2], np.float32)},
                (("x", (1, 3, 62, 62)),))

    assert survey(net).image is None  # by 2 in all, not 4


@pytest.mark.parametrize(("channels", "told"), [(16, False), (17, True), (20, True), (21, False), (15, False)])
def test_channels_just_over_what_the_chip_computes_at_once(channels, told):
    net = graph([conv("x", "w", "a"), conv("a", "v", "y")], {"w": weights(16, 3), "v": weights(channels, 16)})
    found = kinds(outlook(net, find_board("amd_dpucahx8h"), "int8"))

    assert ("channels" in found) is told
    if told:
        assert found["channels"].nodes == (1,)
        assert f"node 1 has {channels} channels, {channels - 16} over 16" in found["channels"].found


def test_tensors_over_the_chip_s_limits_are_gathered():
    net = graph([conv("x", "w", "y")], {"w": weights(8, 3)}, (("x", (1, 3, 640, 640)),))
    found = kinds(outlook(net, find_board("kendryte_k210"), "int8"))

    assert found["size"].nodes == (0,)
    assert "640" in found["size"].found
    assert "320" in found["size"].why
    assert found["size"].source


def test_memories_that_must_hold_everything_are_compared():
    net = graph([conv("x", "w", "a"), conv("a", "v", "y")], {"w": weights(256, 3), "v": weights(512, 256)},
                (("x", (1, 3, 32, 32)),))
    found = [a for a in outlook(net, find_board("max78000"), "int8").advice if a.kind == "memory"]
    need = (256 * 3 + 512 * 256) * 9 / 1024

    assert any(f"{need:.0f} KiB of weights" in a.found and "432 KiB" in a.why for a in found)


# the beginning, NMS, types


def test_normalization_of_pixels_is_found():
    constants = {"w": weights(8, 3), "m": np.full((1, 3, 1, 1), 0.5, np.float32), "s": np.array(4.0, np.float32)}
    net = graph([("Sub", ["x", "m"], ["a"], {}), ("Mul", ["a", "s"], ["b"], {}), conv("b", "w", "y")], constants)
    other = graph([("Mul", ["x", "s"], ["a"], {}), ("Relu", ["a"], ["b"], {}), conv("b", "w", "y")], constants)

    assert survey(net).scaling == (0, 1)
    assert survey(other).scaling == ()  # what is not linear cannot be folded
    assert kinds(outlook(net, find_board("rk3588"), "int8"))["normalization"].nodes == (0, 1)


def test_suppression_is_told_by_the_board_s_class():
    net = graph([("NonMaxSuppression", ["b", "s", "n"], ["y"], {})], {"n": np.array([5])},
                (("b", (1, 8, 4)), ("s", (1, 2, 8))))
    said = {name: kinds(outlook(net, find_board(name), "int8"))["nms"] for name in (
        "rk3588", "axelera_metis", "sony_imx500")}

    assert "cut it off" in said["rk3588"].remedy
    assert said["rk3588"].found == "the vendor's tool does not take it"
    assert "the CPU runs it" in said["axelera_metis"].found
    assert "built in" in said["sony_imx500"].found


def test_a_float_network_is_counted_as_what_the_board_wants(yolo5):
    found = outlook(yolo5, find_board("ethos_u85"))

    assert (found.state, found.dtype) == ("quantize", "int8")
    assert found.quantized == find_board("ethos_u85").check(yolo5, "int8")
    assert f"quantized to int8, {found.quantized.count('npu')} of {len(yolo5.nodes)}" in found.verdict
    assert outlook(yolo5, find_board("ethos_u85"), "int8").state != "quantize"


# costs


def hand():
    """conv (NPU), Det (off), conv (NPU): what crosses can be counted by hand."""
    return graph([conv("x", "w", "a"), ("Det", ["a"], ["d"], {}), ("Unsqueeze", ["d", "two"], ["e"], {}),
                  ("Add", ["a", "e"], ["b"], {}), conv("b", "v", "y")],
                 {"w": weights(8, 3), "v": weights(4, 8), "two": np.array([2, 3])})


def test_what_crosses_the_border_is_counted():
    net = hand()
    board = find_board("rk3588")
    check = board.check(net, "int8")
    assert [f.where == "npu" for f in check.findings] == [True, False, True, True, True]
    found = cost(net, check, board.facts, "int8")

    # a goes to the CPU (8x64x64), d comes back (8 numbers); x and y are the network's own
    assert (found.transfers, found.bytes, found.open) == (2, 8 * 64 * 64 + 8, 0)
    assert found.host_macs == 0
    assert found.host_elements == 8
    assert [(r.in_bytes, r.out_bytes) for r in found.regions] == [(3 * 64 * 64, 8 * 64 * 64), (8, 4 * 64 * 64)]
    assert cost(net, check, board.facts).bytes == 4 * found.bytes  # as float32
    assert found.least_ms is None  # of shared DRAM no standard gives a time
    assert found.topology == "shared-dram"


def test_a_link_with_a_line_rate_bounds_the_time():
    net = hand()
    usb, dram = find_board("coral_edgetpu"), find_board("rk3588")
    check = dram.check(net, "int8")
    found = cost(net, check, usb.facts, "int8")

    assert found.least_ms == pytest.approx((8 * 64 * 64 + 8) / 500e6 * 1e3)
    assert "USB 3.0" in found.basis


@pytest.mark.parametrize("name", ["yolov5s", "ssdlite", "vit-tiny", "mobilenet-v3"])
def test_regions_are_those_of_the_check(name):
    net = load(zoo.build(name, 64))
    for board in boards().values():
        check = board.check(net, "int8")
        on = {f.node for f in check.findings if f.where == "npu"}
        found = cost(net, check, board.facts, "int8")

        assert len(found.regions) == check.partitions == regions(net, on)
        assert sorted(i for r in found.regions for i in r.nodes) == sorted(on)
        assert set(epochs(net, on)) == {n.index for n in net.nodes}
        if not {f.where for f in check.findings} - {"npu"}:
            assert (found.transfers, found.bytes, found.host_macs) == (0, 0, 0)


def test_sizes_of_tensors(yolo5):
    v = yolo5.values[yolo5.inputs[0]]

    assert nbytes(v) == 4 * 3 * 64 * 64
    assert nbytes(v, "int8") == 3 * 64 * 64
    assert nbytes(v, "int4") == 3 * 64 * 64 // 2


# the sentence and the table


def test_boards_come_best_first(yolo5):
    ranked = best_first(outlook(yolo5, b, "int8") for b in boards().values())

    order = [STATES.index(o.state) for o in ranked]
    assert order == sorted(order)
    assert ranked[0].state in ("all", "tail")
    for o in ranked:
        off = {f.node for f in o.check.findings if f.where != "npu"}
        assert o.verdict.startswith(f"{o.check.board}: {o.check.count('npu')} of {len(yolo5.nodes)} operators")
        assert (o.state in ("all", "limit")) is (not off)
        if o.state == "tail":
            assert off <= survey(yolo5).tail


def test_the_terminal_and_json_say_the_same(tmp_path, capsys, yolo5):
    path = tmp_path / "net.onnx"
    path.write_bytes(zoo.build("yolov5s", 64))
    assert run_arguments(["check", str(path), "--target", "rk3588", "--as", "int8"]) == 0
    text = capsys.readouterr().out
    assert run_arguments(["check", str(path), "--target", "rk3588", "--as", "int8", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)

    assert max(map(len, text.replace(str(tmp_path), "").splitlines())) <= 80
    assert " ".join(data["verdict"].split()) in " ".join(text.split())
    assert data["state"] == "tail"
    assert {"kind", "nodes", "found", "why", "remedy", "price", "source", "command"} == set(data["findings"][0])
    assert data["cost"]["label"] == "from shapes"
    assert len(data["cost"]["regions"]) == data["summary"]["partitions"]
    assert data["quantized"] is None


@needs_shared
def test_a_chip_s_fallback_has_modelled_times(capsys):
    path = str(MODELS / "quantized" / "ssdlite_mobiledet_coco_qat_postprocess.tflite")
    run_arguments(["check", path, "--target", "a311d", "--json"])
    found = json.loads(capsys.readouterr().out)["cost"]

    assert found["label"] == "modelled"
    parts = sum(found[f"{k}_ms"] for k in ("npu", "host", "transfer", "submit"))
    assert found["total_ms"] == pytest.approx(parts)
    assert found["host_ms"] > 0
    low, high = found["interval_ms"]
    assert low < found["total_ms"] < high


def test_a_chip_s_tail_is_found_from_its_verdicts():
    from npulab import api

    b = ModelBuilder("net")
    x = b.tensor("x", (1, 8, 8, 3), "uint8", scale=0.5, zero_point=3)
    w = b.tensor("w", (4, 3, 3, 3), "uint8", scale=0.1, zero_point=0, data=np.ones((4, 3, 3, 3), np.uint8))
    c = b.tensor("b", (4,), "int32", scale=0.05, zero_point=0, data=np.arange(4, dtype=np.int32))
    y = b.tensor("y", (1, 8, 8, 4), "uint8", scale=0.25, zero_point=128)
    z = b.tensor("z", (1, 8, 8, 4), "uint8", scale=1 / 256, zero_point=0)
    b.op("CONV_2D", [x, w, c], [y], padding="SAME", stride_w=1, stride_h=1, fused_activation_function="NONE")
    b.op("SOFTMAX", [y], [z], beta=1.0)
    net = load(bytes(b.build([x], [z])))
    found = {a.kind: a for a in for_chip(net, api.check(net, "a311d"), "a311d")}

    assert found["tail"].nodes == (1,)
    assert "end the network at y " in found["tail"].remedy
