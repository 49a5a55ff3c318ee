"""Rooflines: layers by hand, the study of the Mali-G52, ceilings that are missing or refused, damaged results."""

import dataclasses
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import asdict
from fractions import Fraction
from html.parser import HTMLParser

import numpy as np
import pytest

from npulab import api, zoo
from npulab.cli import run_arguments
from npulab.errors import InvariantError, ModelError, UnsupportedError, UsageError
from npulab.gpu.ceilings import Ceiling, Ceilings, KernelModel, kernel_model, kernels, published, read_result, solve
from npulab.gpu.types import Quantity
from npulab.importers import load
from npulab.report.roofline import page, sketch
from npulab.rooflines import as_data, ceilings_of, roofline
from npulab.targets.facts.schema import ids
from npulab.teardown import tear_down
from npulab.teardown import totals as teardown_totals

onnx = pytest.importorskip("onnx")
F = onnx.TensorProto.FLOAT
MALI = "mali_g52_a311d"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def model(nodes, inputs, outputs, constants=()):
    graph = onnx.helper.make_graph(
        nodes, "t", [onnx.helper.make_tensor_value_info(*i) for i in inputs],
        [onnx.helper.make_tensor_value_info(*o) for o in outputs],
        [onnx.numpy_helper.from_array(a, n) for n, a in constants])
    opsets = [onnx.helper.make_opsetid("", 17)]
    return load(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def node(op, inputs, output, **attributes):
    return onnx.helper.make_node(op, inputs.split(), [output], name=output, **attributes)


def device(*ceilings):
    return Ceilings("d", "a device", ceilings)


def compute(value, numbers="fp32", standing="measured"):
    return Ceiling("compute", value, standing, "by hand", numbers)


def memory(value, name="DRAM", standing="measured"):
    return Ceiling(name, value, standing, "by hand")


def small():
    """conv 1x1 -> relu -> depthwise 3x3 -> reshape -> matrix product; every number below is by hand."""
    zeros = np.zeros
    return model(
        [node("Conv", "x w1", "a"), node("Relu", "a", "b"), node("Conv", "b w2", "c", group=6, pads=[1, 1, 1, 1]),
         node("Reshape", "c s", "d"), node("MatMul", "d w3", "y")],
        [("x", F, [1, 8, 4, 5])], [("y", F, [6, 7])],
        [("w1", zeros((6, 8, 1, 1), np.float32)), ("w2", zeros((6, 1, 3, 3), np.float32)),
         ("s", np.array([6, 20], np.int64)), ("w3", zeros((20, 7), np.float32))])


BY_HAND = [  # label, multiply-adds, elements of weights, input, output
    ("conv 1x1", 6 * 8 * 20, 48, 160, 120), ("dw 3x3", 6 * 9 * 20, 54, 120, 120), ("matmul", 6 * 20 * 7, 140, 120, 42)]


@pytest.mark.parametrize(("numbers", "size"), [(None, 4), ("fp32", 4), ("fp16", 2), ("int8", 1)])
def test_layers_by_hand(numbers, size):
    found = roofline(small(), device(compute(3e6, numbers or "fp32"), memory(7e5)), numbers)

    assert found.hidden == 2  # Relu, Reshape
    for x, (label, macs, *elements) in zip(found.layers, BY_HAND, strict=True):
        assert (x.layer.label, x.operations) == (label, 2 * macs)
        assert [x.weights, x.inputs, x.outputs] == [size * n for n in elements]
        assert x.intensity == float(Fraction(2 * macs, size * sum(elements)))
        at = [Fraction(2 * macs, 3_000_000), Fraction(size * sum(elements), 700_000)]
        assert [pytest.approx(float(t), rel=1e-15) for t in at] == list(x.floors)
        assert x.seconds == max(x.floors)
        assert x.bound == ("compute" if at[0] > at[1] else "DRAM")
    assert found.seconds == sum(x.seconds for x in found.layers)
    assert sum(map(found.share, found.layers)) == pytest.approx(1)
    assert found.ridge(1) == pytest.approx(30 / 7)
    whole = size * (48 + 54 + 140 + 160 + 42)  # weights, the network's input and output
    assert (found.whole.operations, found.whole.bytes) == (2 * sum(r[1] for r in BY_HAND), whole)
    assert found.whole.seconds <= found.seconds


def test_each_layer_is_bound_by_what_takes_longest():
    only = {"compute": (compute(1.0), memory(1e9)), "DRAM": (compute(1e9), memory(1.0)),
            "L2": (compute(1e9), memory(1e9), memory(1.0, "L2"))}
    for resource, ceilings in only.items():
        assert {x.bound for x in roofline(small(), device(*ceilings)).layers} == {resource}


def test_of_two_figures_of_one_resource_the_higher_limits_and_both_are_shown():
    found = roofline(small(), device(compute(1e9), memory(10.0), memory(40.0, standing="assumed")))

    assert found.limits == (0, 2)
    assert all(x.seconds == x.floors[2] == x.floors[1] / 4 for x in found.layers)
    assert [c["limits"] for c in as_data(found)["ceilings"]] == [True, False, True]


def test_all_lists_what_multiplies_nothing_but_no_views():
    found = roofline(small(), device(compute(1e6), memory(1e6)), everything=True)
    relu = found.layers[1]

    assert [x.layer.op for x in found.layers] == ["Conv", "Relu", "Conv", "MatMul"]
    assert (relu.operations, relu.bytes, relu.bound, relu.intensity) == (0, 2 * 4 * 120, "DRAM", 0)
    assert len(re.findall("<circle", page(found))) == 3, "a layer without operations has no place on a logarithm"


def test_an_output_that_is_quantized_behind_its_activation_is_written_as_integers():
    one = [("s", np.float32(0.1)), ("z", np.int8(0)), ("w", np.zeros((4, 3, 1, 1), np.float32))]
    g = model([node("Conv", "x w", "a"), node("Relu", "a", "b"), node("QuantizeLinear", "b s z", "q"),
               node("DequantizeLinear", "q s z", "y")],
              [("x", F, [1, 3, 2, 2])], [("y", F, [1, 4, 2, 2])], one)
    (x,) = roofline(g, device(compute(1.0), memory(1.0))).layers

    assert (x.inputs, x.weights, x.outputs) == (48, 48, 16)


def test_a_tensor_that_somebody_else_reads_too_is_written_as_it_is():
    one = [("s", np.float32(0.1)), ("z", np.int8(0)), ("w", np.zeros((4, 3, 1, 1), np.float32))]
    g = model([node("Conv", "x w", "a"), node("QuantizeLinear", "a s z", "q"), node("DequantizeLinear", "q s z", "y")],
              [("x", F, [1, 3, 2, 2])], [("y", F, [1, 4, 2, 2]), ("a", F, [1, 4, 2, 2])], one)

    assert roofline(g, device(compute(1.0), memory(1.0))).layers[0].outputs == 64


# the study of the Mali-G52


@pytest.fixture(scope="module")
def repvgg(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "repvgg-a2.onnx"
    path.write_bytes(zoo.build("repvgg-a2"))
    return path


@pytest.fixture(scope="module")
def repvgg_graph(repvgg):
    return load(repvgg)


def test_the_studys_own_arithmetic():
    """RepVGG-A2 as the study counts it: 5 G and 53 MB. Its G are multiply-adds (the next test), so 130 ms, not 65."""
    peak, dram = published()[MALI].ceilings[:2]

    assert (peak.value, peak.numbers, peak.standing) == (76.8e9, "fp32", "stated")
    assert peak.value == 2 * 2 * 3 * 8 * 800e6  # two operations; cores, engines, lanes, Hz
    assert (dram.value, dram.standing) == (pytest.approx(6399 * 2**20, rel=2e-4), "measured")
    assert 5e9 / peak.value == pytest.approx(65e-3, rel=0.01)
    assert 2 * 5e9 / peak.value == pytest.approx(130e-3, rel=0.01)
    assert 53e6 / dram.value == pytest.approx(8e-3, rel=0.02)
    assert peak.value / dram.value == pytest.approx(11.4, rel=0.01)
    assert 2 * 5116e6 / (peak.value / dram.value) > 53e6, "far right of the ridge"


def test_repvgg_on_the_mali_is_bound_by_compute(repvgg_graph):
    found = roofline(repvgg_graph, MALI)
    counted = teardown_totals(tear_down(repvgg_graph, everything=True))

    assert sum(x.operations for x in found.layers) == pytest.approx(2e6 * counted.mmacs, rel=1e-12)
    assert 5.1e9 < counted.mmacs * 1e6 < 5.15e9, "the 5 G of the study are multiply-adds"
    assert found.at(0) == pytest.approx(2e6 * counted.mmacs / 76.8e9, rel=1e-12)
    assert 130e-3 < found.whole.seconds < 134e-3
    assert 133e-3 < found.seconds < 135e-3
    assert found.whole.bound == "compute"
    bound = {x.layer.name: x.bound for x in found.layers}
    assert [name for name, b in bound.items() if b != "compute"] == ["stage0/0/conv", found.layers[-1].layer.name]
    assert found.layers[-1].intensity == pytest.approx(0.5, rel=0.01)  # a product with a vector


def test_repvgg_in_half_precision_moves_what_the_study_says(repvgg_graph):
    found = roofline(repvgg_graph, MALI, "fp16")
    convolutions = [x for x in found.layers if x.layer.kind == "convolution"]
    size = sum(x.weights + x.inputs for x in convolutions)

    assert sum(x.weights for x in convolutions) == pytest.approx(47e6, rel=0.03)
    assert size == pytest.approx(53e6, rel=0.04)
    assert size / 6.709e9 == pytest.approx(8e-3, rel=0.04)
    assert found.ceilings[0].standing == "assumed", "nobody measured its speed in fp16"
    assert found.notes == ("no rate of fp16 is known; that of fp32 stands in, and fp16 may well be faster: floors of "
                           "compute are no floors then",)


ROWS = {  # multiplies an invocation -> published G multiplications/s, G slots/s, share of multiplies in the slots (%)
    "dot products, 16": (16, 1.2, 3.75, 32), "dot products, 48": (48, 5.03, 13.62, 37),
    "dot products, 107": (107, 9.99, 24.09, 41), "dot products, 169": (169, 17.03, 39.70, 43),
    "Julia": (4000, 11.5, 74.75, 15)}


def test_the_published_rows_agree_with_themselves():
    found = {k.name: k for k in kernels(MALI)}

    assert set(ROWS) < set(found)
    for name, (multiplies, gflops, gops, percent) in ROWS.items():
        k = found[name]
        assert (k.multiplies, k.gflops, k.gops) == (multiplies, gflops, gops)
        assert k.slots / k.seconds / 1e9 == pytest.approx(gops, rel=1e-3), "slots are two a tuple"
        assert abs(100 * k.multiplies / k.slots - percent) <= 0.51


ERRORS = {  # per cent; "fit": solved from these two
    "dot products, 16": 0.0, "dot products, 48": 0.0, "dot products, 107": -10.9, "dot products, 169": 1.5,
    "dot products, 169, overlap": 5.9, "Julia": -2.6}


def test_two_parameters_explain_the_studys_kernels_within_15_percent():
    m = kernel_model(MALI)

    assert [k.name for k in kernels(MALI) if k.role == "fit"] == ["dot products, 16", "dot products, 48"]
    assert m.slot_rate == 76.8e9  # stated, not fitted
    assert m.byte_rate == pytest.approx(13.9e9, rel=0.01)
    assert m.group_seconds == pytest.approx(79e-9, rel=0.01)
    for k in kernels(MALI):  # the law again, from the rows, not through the model's method
        seconds = m.group_seconds / k.group + max(2 * k.tuples / 76.8e9, k.bytes / m.byte_rate)
        error = 100 * (seconds * k.gflops * 1e9 / k.multiplies - 1)
        assert 100 * m.error(k) == pytest.approx(error, abs=1e-9)
        assert error == pytest.approx(ERRORS[k.name], abs=0.1)
        assert abs(error) < 15
    assert {k.name: m.bound(k) for k in kernels(MALI)}["Julia"] == "slots"


def test_the_roofline_alone_explains_all_but_two_of_them():
    """Without a group's cost and with the published bandwidth: what the second parameter is for."""
    plain = KernelModel(76.8e9, 6.709e9, 0.0)
    off = {k.name: round(100 * plain.error(k)) for k in kernels(MALI)}

    assert off == {"dot products, 16": -46, "dot products, 48": 0, "dot products, 107": -11, "dot products, 169": -4,
                   "dot products, 169, overlap": -29, "Julia": -3}


def test_kernels_that_compute_tell_no_bandwidth():
    julia, overlap = (next(k for k in kernels(MALI) if k.name == n) for n in ("Julia", "dot products, 169, overlap"))

    with pytest.raises(InvariantError, match="do not tell the model's parameters"):
        solve(julia, overlap, 76.8e9)


# ceilings: chips, boards, results


def test_a_chip_with_a_timing_model_has_that_models_numbers():
    found = ceilings_of("a311d")

    assert [(c.resource, c.numbers, c.standing) for c in found.ceilings] == [
        ("compute", "int8", "assumed"), ("DRAM", None, "assumed")]
    assert found.ceilings[0].value == 2 * 8 * 64 * 6 * 800e6
    assert found.ceilings[1].value == pytest.approx(3.9357e9)
    assert "fitted" in found.ceilings[1].source
    assert found.sizes == {"SRAM": 0x80000}


def test_a_described_board_has_what_is_stated_and_says_what_is_not():
    found = roofline(small(), "rk3588")

    assert [(c.resource, c.value, c.standing) for c in found.ceilings] == [("compute", 6e12, "stated")]
    assert "Firefly" in found.ceilings[0].source
    assert found.notes == ("counted as int8, the only format that a rate is known of; the file has fp32",
                           "no bandwidth of DRAM is known: it is left out, and floors may be far below")
    assert (found.numbers, found.layers[0].weights) == ("int8", 48)


def test_every_board_has_a_ceiling_or_a_clear_no():
    g, having = small(), {MALI, "rk3588", "hailo8", "hailo8l", "coral_edgetpu", "nvidia_dla_orin", "vivante_stm32mp2"}
    for board in ids():
        if board in having:
            assert all(c.standing == "stated" and c.source for c in roofline(g, board).ceilings if c.numbers)
            continue
        with pytest.raises(UnsupportedError, match=f"no ceiling of {board} is known for fp32") as e:
            roofline(g, board)
        assert "npulab probe" in e.value.facts["try"]


def test_a_format_that_only_wider_or_narrower_rates_are_known_of():
    with pytest.raises(UnsupportedError, match="no ceiling of d is known for fp32"):
        roofline(small(), device(compute(1.0, "int8")), "fp32")
    found = roofline(small(), device(compute(1.0, "int8"), memory(1.0)), "fp32")
    assert {c.resource for c in found.ceilings} == {"DRAM"}
    assert "no rate of fp32 is known, only of int8: compute is left out" in found.notes[0]

    found = roofline(small(), device(compute(2.0, "fp16"), compute(1.0, "fp32"), memory(1.0)), "int8")
    assert (found.ceilings[0].value, found.ceilings[0].standing) == (2.0, "assumed")
    assert found.ceilings[0].note == "the rate of fp16 (measured), since none of int8 is known"


def quantity(name, value, unit, status="measured", interval=None, why=""):
    return asdict(Quantity(name, value, unit, interval, status, why))


RESULT = {"identity": {"api": "opencl", "vendor": "ACME", "name": "Vortex", "driver": "1.0"}, "quantities": [
    quantity("fma float32 rate", 4e11, "operations/s", interval=[3.9e11, 4.1e11], why="median of 9"),
    quantity("mul float32 rate", 4e11, "operations/s"),
    quantity("fma float16 rate", None, "operations/s", "refused", why="faster than its clock allows"),
    quantity("fma int8x4 rate", 4e11, "operations/s"),
    quantity("memory bandwidth", 30.0, "GB/s", interval=[29.0, None]), quantity("L2 bandwidth", 1.2e11, "bytes/s"),
    quantity("L1 bandwidth", None, "bytes/s", "refused"), quantity("L2 size", 1 << 20, "bytes"),
    quantity("launch cost", 1e-5, "s")]}


@pytest.fixture
def result(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT))
    return path


def test_a_probes_result(result):
    found = read_result(result)

    assert found.title == "ACME Vortex"
    assert [(c.name, c.value, c.standing) for c in found.ceilings] == [
        ("fp32 compute", 8e11, "measured"), ("int8 compute", 8e11, "measured"), ("DRAM", 3e10, "measured"),
        ("L2", 1.2e11, "measured")]
    assert found.ceilings[0].interval == (7.8e11, 8.2e11)
    assert found.sizes == {"L2": 1 << 20}
    assert [(x.name, x.why) for x in found.left_out] == [
        ("fma float16 rate", "refused: faster than its clock allows"),
        ("L1 bandwidth", "refused: the probe does not say why")]


def test_refused_quantities_are_not_used_and_this_is_said(result, tmp_path, capsys):
    path = tmp_path / "small.onnx"
    path.write_bytes(zoo.build("squeezenet"))

    assert run_arguments(["roofline", str(path), "--device", str(result), "--numbers", "fp16"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "fma float16 rate is not used: refused: faster than its clock allows" in text
    assert "no rate of fp16 is known; that of fp32 stands in" in text
    assert "1 fp16 compute 800 Gop/s assumed" in text


def changed(**kinds):
    return {"identity": {}, "quantities": [quantity("memory bandwidth", 3e10, "bytes/s") | kinds]}


@pytest.mark.parametrize(("text", "problem"), [
    ('{"identity": {}, "quantities": [{"na', "is not a probe's result"), ("", "is not a probe's result"),
    ("[]", "is not a probe's result"), ("{}", "is not a probe's result"), ("\x00\xff", "is not a probe's result"),
    ('{"identity": {}, "quantities": ' + "[" * 100_000, "is not a probe's result"),
    (json.dumps(changed(value="3e10")), "is not a probe's result"),
    (json.dumps(changed(value=float("nan"))), "is not a probe's result"),
    (json.dumps(changed()).replace("30000000000.0", "1e999"), "no device can have|is not a probe"),
    (json.dumps(changed(status="guessed")), "is not a probe's result"),
    (json.dumps(changed(name=7)), "is not a probe's result"),
    (json.dumps(changed(interval=[1])), "is not a probe's result"),
    (json.dumps(changed(value=-3e10)), "no device can have"), (json.dumps(changed(value=0)), "no device can have"),
    (json.dumps(changed(value=None)), "no device can have"), (json.dumps(changed(value=1e30)), "no device can have"),
    (json.dumps(changed(interval=[-1, 4e10])), "no device can have"),
    (json.dumps(changed(interval=[4e10, 5e10])), "outside its own interval"),
    (json.dumps(changed(unit="GiB/s")), "unknown unit"),
    (json.dumps(changed(unit="GB/s")), "no device can have"),
    (json.dumps(changed() | {"quantities": changed()["quantities"] * 2}), "has a quantity twice"),
    (" " * ((4 << 20) + 1), "too large"),
])
def test_a_damaged_result_is_one_clear_error(text, problem, tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_text(text, encoding="latin-1")

    with pytest.raises(ModelError, match=problem):
        read_result(path)
    assert run_arguments(["roofline", "none.onnx", "--device", str(path)]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("npulab: error: ")
    assert "Traceback" not in told.err
    assert len(told.err) < 1000


def test_a_device_that_nobody_knows():
    with pytest.raises(UsageError, match="there is no device 'rk3589'") as e:
        ceilings_of("rk3589")
    assert "rk3588" in e.value.facts["want"]
    with pytest.raises(UsageError, match=r"cannot read nowhere\.json as a probe's result"):
        ceilings_of("nowhere.json")
    with pytest.raises(UsageError, match="there is no number format 'fp8'"):
        roofline(small(), MALI, "fp8")


def test_a_result_without_any_ceiling(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"identity": {}, "quantities": [quantity("launch cost", 1e-5, "s")]}))

    with pytest.raises(UnsupportedError, match=r"no ceiling of result\.json is known for fp32"):
        roofline(small(), path)


# what people and programs get


def test_json(repvgg, capsys):
    assert run_arguments(["roofline", str(repvgg), "--device", MALI, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert set(found) == {"model", "device", "numbers", "bytes_as", "ceilings", "layers", "totals", "network",
                          "left_out", "notes"}
    assert found["device"]["sizes"]["L2"] == 128 * 1024
    assert (found["numbers"], found["bytes_as"]) == ("fp32", "file")
    for c in found["ceilings"]:
        assert set(c) == {"resource", "numbers", "value", "unit", "standing", "source", "note", "interval", "limits",
                          "seconds", "ridge"}
        assert c["source"]
    assert [(c["resource"], c["standing"], c["limits"]) for c in found["ceilings"]] == [
        ("compute", "stated", True), ("DRAM", "measured", True), ("L1", "assumed", True), ("L1", "measured", False)]
    assert found["ceilings"][1]["ridge"] == pytest.approx(11.4, rel=0.01)
    for x in found["layers"]:
        assert set(x) == {"name", "label", "op", "operations", "weight_bytes", "input_bytes", "output_bytes", "bytes",
                          "intensity", "floors", "seconds", "bound", "share"}
        assert len(x["floors"]) == len(found["ceilings"])
        assert x["bytes"] == x["weight_bytes"] + x["input_bytes"] + x["output_bytes"]
    assert found["totals"]["layers"] == len(found["layers"]) == 23
    assert found["totals"]["seconds"] == pytest.approx(sum(x["seconds"] for x in found["layers"]))
    assert sum(found["totals"]["by_bound"].values()) == pytest.approx(found["totals"]["seconds"])


def test_the_api_says_the_same_as_the_command(repvgg, repvgg_graph):
    assert as_data(api.roofline(repvgg, MALI)) == as_data(roofline(repvgg_graph, MALI))


@pytest.mark.parametrize("numbers", ["fp32", "int8"])
@pytest.mark.parametrize("on", [MALI, "rk3588", "a311d", "result"])
def test_the_terminal_fits_80_columns(repvgg, result, on, numbers, capsys):
    code = run_arguments(["roofline", str(repvgg), "--device", str(result) if on == "result" else on,
                          "--numbers", numbers])
    text = capsys.readouterr().out

    if (on, numbers) == ("rk3588", "fp32"):
        assert (code, text) == (1, "")
        return
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^13 x +conv 3x3 +14 384>384 +520M ", text, re.M)
    assert re.search(r"^ {3}op/s$", text, re.M)


@pytest.mark.parametrize("name", ["mobilenet-v2", "vit-tiny", "yolov8n"])
def test_other_networks_fit_too(name, tmp_path, capsys):
    (tmp_path / "n.onnx").write_bytes(zoo.build(name))

    assert run_arguments(["roofline", str(tmp_path / "n.onnx"), "--device", MALI, "--all"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_sketch_shows_roof_and_layers():
    lines = sketch(roofline(small(), device(compute(3e6), memory(7e5))))
    picture = "".join(line[9:] for line in lines[1:-2])

    assert max(map(len, lines)) <= 80
    assert picture.count("o") + picture.count("@") == 3
    assert {"/", "-"} < set(picture)
    assert "/" not in "".join(sketch(roofline(small(), device(compute(1.0))))[1:-2]), "no memory, no slope"
    assert "--" not in "".join(line[9:] for line in sketch(roofline(small(), device(memory(1.0))))[1:-2])


class Tags(HTMLParser):
    """Whether every tag is closed in its order."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


HOSTILE = "</script><img src=x onerror=alert(1)>"


def test_the_page_is_well_formed_with_one_point_a_layer(repvgg_graph):
    text = page(roofline(repvgg_graph, MALI))
    tags = Tags()
    tags.feed(text)
    picture = ET.fromstring(re.search(r'<svg class="roofline".*?</svg>', text, re.S)[0])
    points = picture.findall("circle")

    assert (tags.open, tags.wrong) == ([], [])
    assert len(points) == 23
    assert len({p.find("title").text for p in points}) == 23
    assert all("at least" in p.find("title").text for p in points)
    for p in points:
        assert 66 <= float(p.get("cx")) <= 886
        assert 18 <= float(p.get("cy")) <= 392
    names = [t.text for t in picture.findall("text") if t.get("class") == "roofname"]
    assert names == ["fp32 compute 76.8 Gop/s, stated [1]", "DRAM 6.709 GB/s, measured [2]",
                     "L1 95 GB/s, assumed [3]", "L1 19.5 GB/s, measured [4]"]
    assert len({p.get("stroke-dasharray") for p in picture.findall("path")}) == 3, "a line a standing"
    assert text == page(roofline(repvgg_graph, MALI))
    odd = dataclasses.replace(ceilings_of(MALI), sizes={"L1": 52160, "L3": 31203124})
    assert "L1: 50.9 kB; L3: 30500 kB" in page(roofline(repvgg_graph, odd))


def test_names_of_strangers_are_shown_and_not_obeyed():
    d = Ceilings("d", HOSTILE, (Ceiling("compute", 1.0, "measured", HOSTILE, "fp32", HOSTILE),), {HOSTILE: 1})

    assert "<img" not in page(roofline(small(), d))


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium on the path")
def test_a_browser_has_no_complaint(tmp_path, repvgg_graph):
    (tmp_path / "page.html").write_text(page(roofline(repvgg_graph, MALI)))
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'user'}", "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True)

    assert re.findall(r".*CONSOLE.*", done.stderr) == []
    assert len(re.findall("<circle", done.stdout)) == 23


def test_the_page_is_written_whole_or_not_at_all(repvgg, tmp_path, capsys):
    assert run_arguments(["roofline", str(repvgg), "--device", MALI, "--html", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert run_arguments(["roofline", str(repvgg), "--device", MALI, "--html", str(tmp_path / "no" / "r.html")]) == 2
    assert "cannot write" in capsys.readouterr().err
