"""The atlas: every figure as published, none of ours; conflicts kept; errors only where we make the timed program."""

import ast
import hashlib
import json
import tomllib
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import typer

from npulab.atlas import compare
from npulab.atlas.load import PUBLISHED, conflicts, load, select
from npulab.atlas.types import Row
from npulab.cli.atlas import atlas as atlas_command
from npulab.errors import ModelError, NpulabError, UnsupportedError, UsageError
from npulab.targets.target import PlanOptions, Prediction, find_target
from shared import MODELS, needs_shared

ATLAS = load()
ROWS = {r.id: r for r in ATLAS.rows}
PREDICTED = [c for r in ATLAS.rows if (c := compare.predict(r)) is not None]


@pytest.fixture
def npulab_atlas(capsys):
    """Runs `npulab atlas`: (exit code or error, stdout, stderr)."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(atlas_command)

    def call(*arguments):
        try:
            app([str(a) for a in arguments], standalone_mode=False)
            code = 0
        except NpulabError as e:
            code = e
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


# what is in it

TABLE = {  # device, stack: {network: figures, as the sources print them}; ms, or fps where so named
    ("A311D", "Mesa Etnaviv"): {"mobilenet_v1": [15.7, 15.65, 15, 9.9, 9.991, 6.6, 7.549, 33.094],
                                "mobilenet_v2": [15.5, 6.9],
                                "mobiledet": [129, 56.1, 56.149, 53, 32.7, 32.692, 27, 24.8]},
    ("A311D", "VeriSilicon proprietary"): {"mobilenet_v1": [5.5, 8], "mobiledet": [19.5]},
    ("A311D", "Tengine with TIM-VX"): {"mobilenet_v1": [4.3], "mobilenet_v2": [5.2], "resnet50": [14.6],
                                       "yolov5s": [68.9], "resnet18": [5.5], "squeezenet": [2.6], "vgg16": [18.7],
                                       "yolov3": [78.6], "yolox_s": [55.2]},
    ("A311D", None): {"mobilenet_v2": [5], "resnet50": [27], "yolov5s": [100, 30]},
    ("A311D", "ncnn"): {"mobilenet_v1": [22.44], "mobilenet_v2": [39.56], "resnet50": [124.17]},
    ("A311D", "TFLite vx-delegate"): {"mobilenet_v1": [6424.51]},  # us
    ("i.MX8MP", "Tengine with TIM-VX"): {"mobilenet_v1": [2.3], "mobilenet_v2": [5.1], "resnet50": [11.7],
                                         "resnet18": [4.5], "squeezenet": [2.5], "vgg16": [22.8], "yolov3": [78.2]},
    ("i.MX8MP", "Mesa Etnaviv"): {"mobilenet_v1": [7.9], "mobilenet_v2": [8], "mobiledet": [24.4]},
    ("i.MX95", "eIQ Neutron"): {"mobilenet_v2": [3.17, 87.38]},
    ("VS680", "SyNAP"): {"mobilenet_v1_0_25": [0.77], "mobilenet_v2": [1.79], "yolov5s": [75.83],
                         "yolov5m": [118.82], "inception_v4": [19.59]},
    ("VS640", "SyNAP"): {"mobilenet_v1_0_25": [0.93], "mobilenet_v2": [2.31], "yolov5s": [103.36],
                         "yolov5m": [178], "inception_v4": [53.82]},
    ("RK3588", "Mesa Rocket"): {"mobilenet_v1": [10.776, 18], "mobilenet_v2": [21], "mobiledet": [30, 48]},
    ("RK3588", "RKNN"): {"mobilenet_v2": [450.7], "resnet50": [110.1], "yolov5s_relu": [66.1],
                         "yolov5s": [48.4, 27.5, 18.84, 9.86, 19065, 76, 12, 27.4491, 49.0747, 65.3673, 63.3204,
                                     71.8407, 72.059],
                         "yolov8n": [73.5, 29, 14], "yolov8s": [38], "yolox_s": [37.1]},
    ("RK3588", "ncnn"): {"yolov5s": [85]},
    ("RK3576", "RKNN"): {"mobilenet_v2": [467], "resnet50": [99], "yolov5s": [57.5], "yolov5s_relu": [65],
                         "yolov8n": [90.2], "yolov8s": [40.8], "yolox_s": [41.5]},
    ("RK3566/RK3568", "RKNN"): {"mobilenet_v2": [180.7], "resnet50": [37.9], "yolov5s": [19.3], "yolov5s_relu": [25.5],
                                "yolov8n": [34], "yolov8s": [15.1], "yolox_s": [15.2]},
    ("RK3562", "RKNN"): {"mobilenet_v2": [281.3], "resnet50": [54.9], "yolov5s": [23.6], "yolov5s_relu": [33.2],
                         "yolov8n": [40.9], "yolov8s": [18.4], "yolox_s": [18.3]},
    ("RK3568", None): {"mobilenet_v2": [10], "resnet50": [44], "yolov5s": [170, 18, 50]},
    ("Coral Dev Board", "Edge TPU"): {"mobilenet_v1": [2.4], "mobilenet_v2": [2.6], "resnet50": [56],
                                      "ssd_mobilenet_v1": [11], "ssd_mobilenet_v2": [14, 20.9],
                                      "ssd_mobilenet_v1_0_75": [15.7], "inception_v1": [4.1], "inception_v4": [102],
                                      "squeezenet": [2], "vgg16": [343]},
    ("Coral USB Accelerator", "Edge TPU"): {"mobilenet_v1": [2.4, 3.9], "mobilenet_v2": [2.6, 400], "resnet50": [49],
                                            "ssd_mobilenet_v1": [6.5], "ssd_mobilenet_v2": [7.2, 12, 18.2],
                                            "ssd_mobilenet_v1_0_75": [14.9], "inception_v1": [3.4],
                                            "inception_v4": [85], "squeezenet": [2.1], "vgg16": [296],
                                            "efficientnet_l": [31]},
    ("Coral", "Edge TPU"): {"mobilenet_v2": [3], "yolov5s": [200, 47], "resnet50": [51.5]},
    ("Hailo-8", "HailoRT"): {"mobilenet_v1": [3305], "mobilenet_v2": [2597, 2597, 3.5],
                             "resnet50": [1372, 1372, 1328.83, 2.93646, 28], "yolov5s": [543, 543, 20, 5],
                             "ssd_mobilenet_v1": [1015, 1015, 6], "inception_v1": [2454], "vit_tiny": [89, 406],
                             "deit_tiny": [70, 406], "yolov8n": [1036, 1036], "yolov8s": [491, 491], "yolov6n": [7]},
    ("Hailo-8L", "HailoRT"): {"mobilenet_v1": [1866], "mobilenet_v2": [1738, 1738], "resnet50": [138, 503],
                              "yolov5s": [98, 168], "ssd_mobilenet_v1": [356, 356, 10], "vit_tiny": [68, 258],
                              "deit_tiny": [68, 258], "yolov8n": [202, 438], "yolov8s": [110, 208], "yolov6n": [11]},
    ("Jetson Nano", "ncnn Vulkan"): {"mobilenet_v1": [16.1], "mobilenet_v2": [13], "resnet50": [93.1]},
    ("Jetson Nano", None): {"mobilenet_v2": [20], "resnet50": [29], "yolov5s": [120, 30]},
    ("Jetson Orin Nano", "ncnn Vulkan"): {"mobilenet_v1": [3.7], "mobilenet_v2": [3.8], "resnet50": [9.4]},
    ("Jetson Orin Nano 8GB", None): {"resnet50": [1], "ssd_mobilenet_v1": [0.5], "yolov5s": [3.32]},
    ("Jetson AGX Orin 64GB", "TensorRT DLA"): {"resnet50": [2037], "ssd_mobilenet_v1": [2664]},
    ("Jetson AGX Orin 64GB", None): {"resnet50": [0.2], "ssd_mobilenet_v1": [0.13], "yolov5s": [1]},
    ("Raspberry Pi 3", "ncnn"): {"yolov5s": [3000, 3300, 490, 550]},
    ("Raspberry Pi 4", "ncnn"): {"mobilenet_v1": [34.37], "mobilenet_v2": [61.88], "resnet50": [196.65]},
    ("Raspberry Pi 4", "TFLite"): {"ssd_mobilenet_v2": [112.6], "ssd_mobilenet_v1_0_75": [82.7],
                                   "ssd_mobilenet_v1": [150, 62, 980]},
    ("Raspberry Pi 5", "ncnn"): {"mobilenet_v1": [8.7], "mobilenet_v2": [10.5, 14], "resnet50": [40.8, 67, 89],
                                 "yolov5s": [165, 210, 21]},
    ("AX620A", None): {"yolov5s": [22]},
    ("Ethos-U55-256", "Vela estimate"): {"mobilenet_v1": [10.66], "mobilenet_v2": [10.96], "mobiledet": [24.42],
                                         "yolox": [29.1]},
    ("Ethos-U65-512", "Vela estimate"): {"mobilenet_v1": [2], "mobiledet": [6.25], "yolox": [8.35, 12.73]},
}


@pytest.mark.parametrize(("device", "stack"), TABLE, ids=lambda v: str(v))
def test_every_figure_of_the_table_is_there_as_published(device, stack):
    there = Counter((r.model, r.value) for r in ATLAS.rows if (r.device, r.stack) == (device, stack))
    missing = [(m, v) for m, values in TABLE[device, stack].items() for v in values if there[m, v] < values.count(v)]

    assert not missing
    assert {m for m, _ in there} == set(TABLE[device, stack])


def test_rows_are_as_many_as_their_sources_have():
    assert len(ATLAS.rows) == len(ROWS) == 319
    assert Counter(r.kind for r in ATLAS.rows) == {"latency": 188, "throughput": 131}
    assert {d: n for d, n in Counter(r.device for r in ATLAS.rows).items() if n >= 14} == {
        "A311D": 43, "RK3588": 27, "Hailo-8": 26, "Hailo-8L": 19, "Coral USB Accelerator": 15, "Hailo-10H": 14,
        "Hailo-15H": 14}
    lecture = Counter(r.device for r in ATLAS.rows if r.source == "lecture")
    assert sum(lecture.values()) == 58
    assert (lecture["RK3588"], lecture["Raspberry Pi 5"], lecture["A311D"]) == (8, 6, 4)


def test_the_page_counts_them_right_and_the_package_ships_them():
    root = Path(__file__).parents[1]
    page = " ".join((root / "docs" / "atlas.md").read_text().split())
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["npulab"]

    assert (f"lists {len(ATLAS.rows)} published figures of how long a network takes on an edge device (188 latencies, "
            f"131 throughputs; {len(ATLAS.devices)} devices)") in page
    assert PUBLISHED in {p for pattern in data for p in (root / "src" / "npulab").glob(pattern)}


def test_a_throughput_has_no_latency_and_no_reciprocal_of_one_is_an_entry():
    for r in ATLAS.rows:
        assert (r.ms is None) == (r.kind == "throughput") == (r.unit in ("fps", "img/s")), r.id
    for rate in (r for r in ATLAS.rows if r.kind == "throughput"):
        for r in ATLAS.rows:
            if r.ms is not None and (r.device, r.model, r.source) == (rate.device, rate.model, rate.source):
                assert abs(r.ms * rate.value / 1000 - 1) > 0.02, f"{r.id} is 1/{rate.id}"


def test_what_the_lecture_leaves_out_is_marked():
    threads = [ROWS[f"rk3588-lecture-yolov5s-{n}-threads"] for n in range(1, 7)]

    assert [r.value for r in threads] == [27.4491, 49.0747, 65.3673, 63.3204, 71.8407, 72.059]
    assert all(r.unit == "fps" and r.unit_inferred and r.kind == "throughput" for r in threads)
    assert [ROWS[f"{d}-lecture-mobilenet_v2"].unit_inferred for d in ("hailo-8", "coral")] == [True, False]
    low, high = ROWS["raspberry-pi-5-lecture-resnet50-low"], ROWS["raspberry-pi-5-lecture-resnet50-high"]
    assert (low.ms, high.ms, low.range, high.range) == (67, 89, "67-89 ms", "67-89 ms")
    assert all(r.evidence == "talk" for r in ATLAS.rows if r.source == "lecture")


def test_estimates_say_so():
    assert {r.evidence for r in ATLAS.rows if r.stack == "Vela estimate"} == {"estimate"}
    assert not [r.id for r in ATLAS.rows if r.evidence == "estimate" and r.stack != "Vela estimate"]


def test_units_of_time_become_milliseconds_exactly():
    assert ROWS["a311d-vx-delegate-mobilenet_v1"].ms == 6.42451
    assert ROWS["rk3588-rknn-yolov5s-multithreading"].ms == 19.065


def test_only_figures_of_the_a311d_compare_with_its_model():
    assert {r.device for r in ATLAS.rows if r.comparable != "none"} == {"A311D"}
    assert {r.stack for r in ATLAS.rows if r.comparable == "same program"} == {"Mesa Etnaviv"}
    assert "Mesa Etnaviv" not in {r.stack for r in ATLAS.rows if r.comparable == "same silicon, other compiler"}
    assert not [r.id for r in ATLAS.rows if r.engine != "npu" and r.comparable != "none"]


# the rows that our timing model predicts

LADDER = {
    "a311d-mesa-mobilenet_v1-before-zero-runs": (15.7, PlanOptions(False, "multiple-of-cores", True, False)),
    "a311d-mesa-mobilenet_v1-zero-runs": (9.9, PlanOptions(True, "multiple-of-cores", True, False)),
    "a311d-mesa-mobilenet_v1-input-cache": (6.6, PlanOptions()),
    "a311d-mesa-mobiledet-before-zero-runs": (56.1, PlanOptions(False, "multiple-of-cores", True, False)),
    "a311d-mesa-mobiledet-zero-runs": (32.7, PlanOptions(True, "multiple-of-cores", True, False)),
    "a311d-mesa-mobiledet-any-channels": (27.0, PlanOptions(image_cache=False)),
    "a311d-mesa-mobiledet-input-cache": (24.8, PlanOptions()),
}


@pytest.mark.parametrize("id_", LADDER)
def test_a_point_of_the_drivers_history_is_a_row_with_its_program_and_the_target_predicts_it(id_):
    row, (ms, options) = ROWS[id_], LADDER[id_]
    prediction = find_target("a311d").predict(id_)

    assert (row.ms, row.program.plan, row.program.target, row.program.options()) == (ms, "reference", "a311d", options)
    assert prediction is not None
    assert prediction.interval_ms[0] <= prediction.ms <= prediction.interval_ms[1]


def test_the_calibration_was_made_from_these_figures():
    script = ast.parse((Path(__file__).parents[1] / "scripts" / "calibrate.py").read_text())
    ladder = next(n.value for n in script.body
                  if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "LADDER")
    used = {ast.literal_eval(k): ast.literal_eval(v.elts[2]) for k, v in zip(ladder.keys, ladder.values, strict=True)}

    assert used == {id_: ROWS[id_].ms for id_ in used}
    assert set(LADDER) <= set(used)


class FakeTarget:
    """Predicts what it is given."""

    def __init__(self, **predictions):
        self.predictions = predictions

    def predict(self, row):
        return self.predictions.get(row)


def fake(monkeypatch, **predictions):
    target = FakeTarget(**{k.replace("__", "-"): Prediction(*p) for k, p in predictions.items()})
    monkeypatch.setattr(compare, "find_target", lambda name: target)


def test_errors_are_of_the_model_and_fit_and_test_are_kept_apart(monkeypatch):
    ids = list(LADDER)
    made = {ids[0]: (15.7 * 1.02, (15, 17), "fit"), ids[1]: (9.9 * 0.96, (9, 9.8), "fit"),
            ids[3]: (56.1 * 0.9, (50, 60), "test")}
    fake(monkeypatch, **made)
    found = [c for r in ATLAS.rows if (c := compare.predict(r)) is not None]

    assert {c.row.id: round(c.error_percent, 9) for c in found} == {ids[0]: 2, ids[1]: -4, ids[3]: -10}
    for role, rows, mean, worst, inside in (("fit", 2, 3, -4, 1), ("test", 1, 10, -10, 1)):
        e = compare.errors(found, role)
        assert (e.rows, e.inside) == (rows, inside)
        assert (e.mean_absolute_percent, e.worst_percent) == (pytest.approx(mean), pytest.approx(worst))
    assert compare.errors([], "fit") is None


def test_another_figure_of_a_program_is_not_compared_twice():
    again = [r for r in ATLAS.rows if r.same_program_as is not None]

    assert len(again) == 12
    assert all(compare.predict(r) is None and ROWS[r.same_program_as].program for r in again)


# conflicts

def a_row(id_, value=1.0, **k):
    return Row(**{"id": id_, "device": "d", "model": "m", "kind": "latency", "value": value, "unit": "ms",
                  "source": "s", "evidence": "measured"} | k)


def sets(*rows):
    return [[r.id for r in c.rows] for c in conflicts(rows)]


def test_figures_of_one_thing_that_differ_are_kept_and_grouped_with_their_spread():
    proprietary = next(c for c in conflicts(ATLAS.rows) if c.rows[0].id == "a311d-proprietary-mobilenet_v1-2024-02")

    assert [r.value for r in proprietary.rows] == [5.5, 8]
    assert (proprietary.lowest, proprietary.highest, proprietary.unit) == (5.5, 8, "ms")
    assert proprietary.ratio == pytest.approx(16 / 11)
    in_one = {frozenset(r.id for r in c.rows) for c in conflicts(ATLAS.rows)}
    assert {"a311d-tengine-resnet50", "a311d-lecture-resnet50"} in in_one
    assert {"coral-usb-accelerator-mobilenet_v1", "coral-usb-accelerator-mobilenet_v1-2026"} in in_one
    assert {"hailo-8-zoo-resnet50-batch-1", "hailo-8-hailortcli-resnet50-fps"} in in_one


@pytest.mark.parametrize(("a", "b"), [
    ({"device": "x"}, {}), ({"model": "x"}, {}), ({"setup": "x"}, {}), ({"engine": "cpu"}, {"engine": "npu"}),
    ({"kind": "throughput", "unit": "fps"}, {}), ({"stack": "x"}, {"stack": "y"}), ({"batch": 1}, {"batch": 8}),
    ({"input": "224x224"}, {"input": "320x320"}), ({"precision": "int8"}, {"precision": "fp16"}),
    ({"precision": "fp32"}, {"precision": "fp16"}), ({"cores": 1}, {"cores": 3}), ({"threads": 1}, {"threads": 2}),
    ({"included": "device"}, {"included": "pipeline"}), ({"range": "1-2 ms"}, {"range": "1-2 ms"}),
])
def test_figures_of_different_things_are_no_conflict(a, b):
    assert sets(a_row("a", 1, **a), a_row("b", 2, **b)) == []


@pytest.mark.parametrize(("a", "b"), [
    ({}, {}), ({"stack": "x"}, {}), ({"precision": "int8"}, {"precision": "uint8"}),
    ({"precision": "fp16"}, {"precision": "float"}),
    ({"batch": 1}, {}), ({"range": "1-2 ms"}, {"range": "2-3 ms"}), ({"value": 0.5, "unit": "s"}, {"value": 2}),
])
def test_what_is_not_stated_could_be_the_same(a, b):
    assert sets(a_row("a", **{"value": 1} | a), a_row("b", **{"value": 2} | b)) in ([["a", "b"]], [["b", "a"]])


def test_sets_hold_only_rows_that_agree_pairwise_and_equal_figures_are_no_conflict():
    assert sets(a_row("a", 1, stack="x"), a_row("b", 4), a_row("c", 2, stack="y")) == [["a", "b"], ["c", "b"]]
    assert sets(a_row("a", 1), a_row("b", 1)) == []
    assert sets(a_row("a", 1), a_row("b", 1), a_row("c", 3)) == [["a", "b", "c"]]


# filters

def test_filters_look_for_text_in_any_case():
    assert {r.device for r in select(ATLAS, device="AMLOGIC")} == {"A311D"}
    assert {r.device for r in select(ATLAS, device="vim3")} == {"A311D"}
    assert {r.model for r in select(ATLAS, model="MobileDet")} == {"mobiledet"}
    assert {r.stack for r in select(ATLAS, stack="mesa")} == {"Mesa Etnaviv", "Mesa Rocket"}
    assert {r.source for r in select(ATLAS, source="tomeuvizoso.net/2024")} == {
        "blog-2024-01-10", "blog-2024-02", "blog-2024-02-23", "blog-2024-03-28"}
    assert {r.kind for r in select(ATLAS, kind="throughput")} == {"throughput"}
    assert {r.id for r in select(ATLAS, predicted=True)} == {
        *LADDER, "a311d-mesa-mobilenet_v2-before-zero-runs", "a311d-mesa-mobilenet_v2-input-cache"}
    assert select(ATLAS) == list(ATLAS.rows)


@pytest.mark.parametrize(("asked", "text"), [
    ({"device": "z80"}, "the atlas has no row with device 'z80'\n  want    A311D, AX620A, Coral, "),
    ({"device": "a311d", "model": "vit"},
     "the atlas has no row of device 'a311d' with model 'vit'\n  want    mobiledet, mobilenet_v1, "
     "mobilenet_v2, resnet18, resnet50, squeezenet, vgg16, yolov3, yolov5s, yolox_s"),
    ({"stack": "hailo", "kind": "latency", "source": "toradex"},
     "the atlas has no latency of stack 'hailo' with source 'toradex'\n  want    frigate, hailo-cli, lecture"),
    ({"kind": "throughput", "predicted": True}, "the atlas has no throughput that npulab can model\n"
     "  want    latencies: only times are modelled"),
])
def test_no_match_names_what_there_is(asked, text):
    with pytest.raises(UnsupportedError) as e:
        select(ATLAS, **asked)

    assert str(e.value).startswith(text)
    assert e.value.exit_code == 1


# a damaged file

def damaged(tmp_path, old, new, count=1):
    text = PUBLISHED.read_text()
    assert old in text
    path = tmp_path / "a.toml"
    path.write_text(text.replace(old, new, count))
    return path


LAST = f'id = "{ATLAS.rows[-1].id}"'
BEFORE_LAST = f'id = "{ATLAS.rows[-2].id}"'


@pytest.mark.parametrize(("old", "new", "message"), [
    ("[[rows]]\n", "[[rows]]\nspeed = 3\n",
     "is not an atlas of latencies\n  got     Object contains unknown field `speed`\n  where   $.rows[0]"),
    ('unit = "fps"', 'unit = "Hz"', "is not an atlas of latencies\n  got     Invalid enum value 'Hz'"),
    ('value = 15.7\n', 'value = "15.7"\n', "is not an atlas of latencies\n  got     Expected `float`, got `str`"),
    ('value = 15.7\n', '', "is not an atlas of latencies\n  got     Object missing required field `value`"),
    ('value = 15.7\n', 'value = nan\n',
     "where   a311d-mesa-mobilenet_v1-before-zero-runs\n  want    a value above 0\n  got     nan"),
    ('value = 15.7\n', 'value = -1.0\n', "want    a value above 0\n  got     -1.0"),
    ('value = 15.7\nunit = "ms"', 'value = 15.7\nunit = "fps"', "where   a311d-mesa-mobilenet_v1-before-zero-runs\n"
     "  want    a latency in us, ms or s; a throughput in fps or img/s\n  got     a latency in fps"),
    (LAST, BEFORE_LAST, f"where   {ATLAS.rows[-2].id}\n  want    unique ids, in order\n  got     it stands behind"),
    (LAST, 'id = "aaa"', "where   aaa\n  want    unique ids, in order"),
    ('source = "frigate"', 'source = "nobody"', "want    a source that the file declares\n  got     nobody"),
    ('batch = 8', 'batch = 0', "want    batch of 1 or more\n  got     0"),
    ('same_program_as = "', 'same_program_as = "x',
     "want    same_program_as: the id of another row, which has the program"),
    ('comparable = "same program"\n', '', "breaks the law"),
    ("[[rows]]", "[[rows", "is not an atlas of latencies\n  got     "),
])
def test_a_damaged_file_is_refused_with_the_place(tmp_path, old, new, message):
    path = damaged(tmp_path, old, new)
    with pytest.raises(ModelError) as e:
        load(path)

    text = str(e.value)
    assert text.startswith(str(path))
    assert message in text
    assert e.value.exit_code == 3


def test_a_file_that_is_not_there_is_a_wrong_argument(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .* as an atlas of latencies"):
        load(tmp_path / "none.toml")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="is not an atlas of latencies"):
        load(path)


def test_records_cannot_be_changed():
    with pytest.raises(AttributeError):
        ATLAS.rows[0].value = 1
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"key": "k", "title": "t", "url": "u", "more": 1}, type(ATLAS.sources[0]))


# the command

def test_the_table_fits_80_columns_and_keeps_fit_and_test_apart(npulab_atlas):
    code, out, err = npulab_atlas()

    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "319 rows: 188 latencies, 131 throughputs (fps, never turned into ms)." in out
    assert "Figures that may well be of the same thing, and differ:" in out
    for role, n in Counter(c.role for c in PREDICTED).items():
        assert f"{role + ':':<5}  {n} rows, mean absolute error " in out


def test_modelled_times_intervals_errors_and_roles_are_printed(npulab_atlas, monkeypatch):
    fake(monkeypatch, **{"a311d-mesa-mobilenet_v1-before-zero-runs": (15.0, (12.5, 18), "fit"),
                         "a311d-mesa-mobiledet-input-cache": (31.0, (25, 39), "test")})
    code, out, _ = npulab_atlas("--predicted")
    rest = out.split("Published times of programs that npulab makes too, and its timing model:\n")[1]

    assert code == 0
    assert [line.split() for line in rest.splitlines()[1:5]] == [
        ["MobileNetV1", "Mesa", "Etnaviv,", "15.7", "ms", "15.00", "ms", "12.5-18.0", "-4.5", "%", "fit"],
        ["before", "zero", "runs"],
        ["SSDLite", "Mesa", "Etnaviv,", "24.8", "ms", "31.00", "ms", "25.0-39.0", "+25.0", "%", "test"],
        ["MobileDet", "input", "cache"]]
    assert "fit:   1 rows, mean absolute error 4.5 %, worst -4.5 %, 1 within the interval" in rest
    assert "test:  1 rows, mean absolute error 25.0 %, worst +25.0 %, 0 within the interval" in rest
    assert "7 more could be modelled" in rest


def test_json_has_every_row_and_null_where_nothing_is_modelled(npulab_atlas):
    code, out, _ = npulab_atlas("--json")
    data = json.loads(out)
    rows = {r["id"]: r for r in data["rows"]}

    assert (code, len(rows)) == (0, 319)
    assert {"id", "device", "stack", "model", "published_ms", "value", "unit", "kind", "modelled_ms", "interval_ms",
            "error_percent", "role", "comparable", "included", "precision", "batch", "source"} <= set(data["rows"][0])
    assert {r["id"] for r in data["rows"] if r["modelled_ms"] is not None} == {c.row.id for c in PREDICTED}
    for r in data["rows"]:
        assert (r["modelled_ms"] is None) == (r["role"] is None) == (r["error_percent"] is None)
        assert (r["published_ms"] is None) == (r["kind"] == "throughput")
        if r["role"]:
            assert r["error_percent"] == pytest.approx(100 * (r["modelled_ms"] / r["published_ms"] - 1))
    summary = data["summary"]
    assert (summary["rows"], summary["latency"], summary["throughput"]) == (319, 188, 131)
    assert {x: summary[x]["rows"] for x in ("fit", "test")} == Counter(c.role for c in PREDICTED)
    assert summary["predicted"] == len(PREDICTED) >= len(LADDER)
    worst = max((r for r in data["rows"] if r["role"] == "test"), key=lambda r: abs(r["error_percent"]))
    assert summary["test"]["worst_percent"] == worst["error_percent"]
    rate, old = rows["rk3588-rknn-yolov5s"], rows["a311d-proprietary-mobilenet_v1-2023-11"]
    assert (rate["published_ms"], rate["value"], rate["unit"]) == (None, 48.4, "fps")
    assert old["conflicts_with"] == ["a311d-proprietary-mobilenet_v1-2024-02"]
    assert old["source"] == "Tomeu Vizoso's blog, Etnaviv NPU update 11: Now twice as fast!"


def test_no_match_is_told_and_nothing_printed(npulab_atlas):
    error, out, _ = npulab_atlas("--device", "z80", "--json")

    assert (error.exit_code, out) == (1, "")


def test_a_folder_without_the_models_or_with_another_file_is_refused(npulab_atlas, tmp_path):
    error, out, _ = npulab_atlas("--models", tmp_path / "none")
    assert (str(error), out) == (f"--models: {tmp_path / 'none'} is not a folder\n"
                                 "  try     a folder that holds the model files", "")
    error, _, _ = npulab_atlas("--models", tmp_path)
    assert str(error) == (
        f"--models: {tmp_path} holds no model of the atlas\n  want    mobilenet_v1_1.0_224_quant.tflite, "
        "mobilenet_v2_1.0_224_quant.tflite, ssdlite_mobiledet_coco_qat_postprocess.tflite")
    other = tmp_path / "mobilenet_v1_1.0_224_quant.tflite"
    other.write_bytes(b"another")
    error, _, _ = npulab_atlas("--models", tmp_path)
    assert str(error).startswith(f"{other} is not the file that the figures are of\n  want    SHA-256 1ef5ede5")
    assert f"got     SHA-256 {hashlib.sha256(b'another').hexdigest()}" in str(error)
    assert error.exit_code == 3


def test_a_model_whose_digest_nobody_published_is_taken_by_its_name(npulab_atlas, tmp_path):
    sample = Path(__file__).parents[1] / "src" / "npulab" / "samples" / "digits.tflite"
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "mobilenet_v2_1.0_224_quant.tflite").write_bytes(sample.read_bytes())
    arguments = "--device", "a311d", "--model", "mobilenet_v2", "--models", tmp_path
    _, out, _ = npulab_atlas(*arguments, "--json")
    rows = {r["id"]: r for r in json.loads(out)["rows"]}

    first, last = (rows[f"a311d-mesa-mobilenet_v2-{x}"] for x in ("before-zero-runs", "input-cache"))
    assert len({first["modelled_ms"], last["modelled_ms"]} - {0, None}) == 2
    assert (first["role"], first["made_from"], first["best_plan_ms"]) == ("test", "model file", None)
    tengine = rows["a311d-tengine-mobilenet_v2"]
    assert (tengine["modelled_ms"], tengine["role"], tengine["error_percent"]) == (None, None, None)
    assert tengine["best_plan_ms"] > 0

    _, out, _ = npulab_atlas(*arguments)
    assert "* compiled from the model file" in out
    assert "it is no error of the model." in " ".join(out.split())


@needs_shared
def test_recorded_counts_are_those_of_the_model_files(npulab_atlas):
    _, recorded, _ = npulab_atlas("--predicted", "--model", "mobilenet_v1", "--json")
    _, compiled, _ = npulab_atlas("--predicted", "--model", "mobilenet_v1", "--json", "--models", MODELS)

    def times(text):
        return {r["id"]: (r["modelled_ms"], r["interval_ms"], r["role"]) for r in json.loads(text)["rows"]}

    assert times(recorded) == times(compiled)
    assert {r["made_from"] for r in json.loads(compiled)["rows"]} == {"model file"}
