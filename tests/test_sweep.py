"""Sweeps: the same rows however they are made, none lost and none twice whoever is killed, and files that say what is
wrong with them."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from npulab import api
from npulab.cli.sweep import how
from npulab.errors import DeviceError, ModelError, UnsupportedError, UsageError
from npulab.profiling.join import as_data
from npulab.sweep import cluster, points, pool
from npulab.sweep.grid import read_grid
from npulab.sweep.points import NODE_COLUMNS, Point, Record, measure
from npulab.sweep.run import sweep
from npulab.sweep.store import APPLICATION, COLUMNS, Store
from npulab.targets.target import PlanOptions

DIGITS = Path(__file__).resolve().parents[1] / "src" / "npulab" / "samples" / "digits.tflite"
HEAD = 'models = ["digits.tflite"]\ntargets = ["a311d"]\n'
CLOCKS = [4e8 + 1e8 * i for i in range(10)]
BANDWIDTHS = [2e9 + 1e8 * i for i in range(20)]
TWO_HUNDRED = f'{HEAD}plans = ["reference"]\n[set]\nclock = {CLOCKS}\ndram_bandwidth = {BANDWIDTHS}\n'
OPTIONS = {"zero_runs": True, "channels": "any", "kernel_cache": True, "image_cache": True, "features": []}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the sample, and in it."""
    shutil.copy(DIGITS, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text, name="grid.toml"):
    Path(name).write_text(text)
    return name


def rows(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT * FROM results ORDER BY key").fetchall()


def count(path):
    """Rows of a file that somebody else may be writing."""
    try:
        return len(rows(path))
    except sqlite3.Error:
        return 0


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    """The rows of TWO_HUNDRED, measured in this process, one after the other."""
    home = tmp_path_factory.mktemp("one_by_one")
    shutil.copy(DIGITS, home)
    (home / "grid.toml").write_text(TWO_HUNDRED)
    with Store(home / "rows.sqlite") as store:
        for p in read_grid(home / "grid.toml").points.values():
            store.write([(p, measure(p, DIGITS.read_bytes))])
    return rows(home / "rows.sqlite")


# --- grids to points


def test_a_grid_is_every_combination_and_plan_reference_has_no_features(folder):
    grid = read_grid(write(HEAD + 'plans = ["best", "reference"]\n[options]\nkernel_cache = [true, false]\n'
                           'features = [[], ["tp-split", "tiles"]]\n[set]\nsram = ["default", "512KiB"]\n'
                           'dram_bandwidth = [4e9, "8GB/s", 8_000_000_000]\n'))

    cache, sets = [True, False], [(s, b) for s in (None, 524288) for b in (4e9, 8e9)]
    expected = [("best", k, f, *s) for k, f, s in itertools.product(cache, ([], ["tiles", "tp-split"]), sets)]
    expected += [("reference", k, [], *s) for k, s in itertools.product(cache, sets)]
    assert [(p.plan, p.options["kernel_cache"], p.options["features"], p.what_if.get("sram"),
             p.what_if["dram_bandwidth"]) for p in grid.points.values()] == expected
    assert {p.model for p in grid.points.values()} == {"digits.tflite"}
    assert all(key == p.key() for key, p in grid.points.items())


def test_options_of_a_grid_are_all_of_the_plan_options_that_change_a_program(folder):
    [point] = read_grid(write(HEAD)).points.values()

    assert point == Point("digits.tflite", point.digest, "a311d", "best", OPTIONS, {})
    assert point.plan_options() == PlanOptions()
    assert {*point.options, "search_log"} == {f.name for f in dataclasses.fields(PlanOptions)}


def test_the_grid_of_the_page_is_one(folder):
    page = (Path(__file__).resolve().parents[1] / "docs" / "sweep.md").read_text()
    (folder / "nets").mkdir()
    shutil.copy("digits.tflite", "nets")

    found = read_grid(write(re.search("```toml\n(.*?)```", page, re.S)[1])).points

    assert f"The grid above is {len(found)} points for one model." in page
    assert {v for p in found.values() for v in p.what_if.items()} == {
        ("dram_bandwidth", 8e9), ("dram_bandwidth", 4e9), ("clock", 1e9), ("sram", 524288), ("nn_cores", 4)}


def test_patterns_are_of_the_grids_folder_and_a_file_counts_once(folder, tmp_path, monkeypatch):
    (folder / "a" / "b").mkdir(parents=True)
    shutil.copy(DIGITS, folder / "a" / "b" / "copy.tflite")
    (folder / "a" / "other.tflite").write_bytes(b"other")
    (folder / "a" / "folder.tflite").mkdir()
    write('models = ["**/*.tflite", "digits.tflite"]\ntargets = ["a311d"]\n')
    monkeypatch.chdir("/")

    grid = read_grid(folder / "grid.toml")

    assert [p.model for p in grid.points.values()] == ["a/b/copy.tflite", "a/other.tflite"]
    assert sorted(grid.files.values()) == [folder / "a/b/copy.tflite", folder / "a/other.tflite"]


BAD_GRIDS = [
    ("models = [", 3, "npulab: error: grid.toml is not a TOML file\n  got     Invalid value (at end of document)"),
    (b"\xff", 3, "npulab: error: grid.toml is not a TOML file\n  got     bytes that are not UTF-8, at 0"),
    ("a = " + "[" * 100_000, 3, "npulab: error: grid.toml is not a TOML file"),
    ("a = " + "9" * 5000, 3, "npulab: error: grid.toml is not a TOML file"),
    ("#" * (2**20 + 1), 3, "grid.toml is too large for a sweep grid\n  want    at most 1048576 bytes"),
    ("", 3, "grid.toml is not a sweep grid\n  got     object missing required field `models`\n"
            "  where   the top level\n  try     docs/sweep.md has every key"),
    (HEAD + "colour = 1", 3, "got     object contains unknown field `colour`\n  where   the top level\n"),
    (HEAD + "[options]\nzero_run = [true]", 3, "unknown field `zero_run`\n  where   options\n"),
    (HEAD + "[set]\nvoltage = [1]", 3, "unknown field `voltage`\n  where   set\n"),
    (HEAD + 'plans = ["worst"]', 3, "got     invalid enum value 'worst'\n  where   plans[0]\n"),
    (HEAD + "plans = []", 3, "length >= 1\n  where   plans\n"),
    (HEAD + "[options]\nzero_runs = true", 3, "got     expected `array`, got `bool`\n  where   options.zero_runs\n"),
    (HEAD + "[options]\nzero_runs = [1]", 3, "got     expected `bool`, got `int`\n  where   options.zero_runs[0]\n"),
    (HEAD + "[set]\nclock = [true]", 3, "got `bool`\n  where   set.clock[0]\n"),
    (HEAD + '[set]\nclock = ["fast"]', 3, "grid.toml: clock=fast is not a number and a unit\n  where   set.clock\n"
     "  want    NUMBER[Hz|kHz|MHz|GHz]\n  got     fast"),
    (HEAD + '[set]\nclock = ["1GB/s"]', 3, "clock=1GB/s is not a number and a unit\n  where   set.clock\n"),
    (HEAD + "[set]\ndram_bandwidth = [0]", 3, "grid.toml: dram_bandwidth=0 is out of range\n"
     "  where   set.dram_bandwidth\n"),
    (HEAD + "[set]\ndram_bandwidth = [nan]", 3, "where   set.dram_bandwidth\n"),
    (HEAD + "[set]\nnn_cores = [1.5]", 3, "where   set.nn_cores\n"),
    (HEAD.replace("digits", "cat"), 3,
     "grid.toml: no file matches 'cat.tflite'\n  where   models\n  got     looked in /"),
    (HEAD.replace("digits", "\\u0000/*"), 3, "is no pattern of file names\n  where   models\n"),
    (HEAD.replace("a311d", "z80"), 3, "grid.toml: there is no target 'z80'\n  where   targets\n  want    a311d"),
    (HEAD + '[options]\nfeatures = [["speed"]]', 3, "grid.toml: none of its targets has a feature 'speed'\n"
     "  where   options.features\n  want    "),
    (HEAD + f"[set]\nclock = {[1e6 + i for i in range(1001)]}\ndram_bandwidth = {[1e6 + i for i in range(1000)]}", 3,
     "grid.toml has too many points\n  got     1001000\n  want    at most 1000000"),
]


@pytest.mark.parametrize(("text", "code", "said"), BAD_GRIDS, ids=range(len(BAD_GRIDS)))
def test_a_bad_grid_is_told_and_leaves_no_file(folder, npulab, text, code, said):
    (folder / "grid.toml").write_bytes(text if isinstance(text, bytes) else text.encode())

    got, out, err = npulab("sweep", "grid.toml")

    assert (got, out) == (code, "")
    assert said in err
    assert sorted(p.name for p in folder.iterdir()) == ["digits.tflite", "grid.toml"]


@pytest.mark.parametrize(("arguments", "said"), [
    (["no.toml"], "npulab: error: cannot read no.toml as a sweep grid\n  got     No such file or directory"),
    (["."], "npulab: error: cannot read . as a sweep grid\n  got     Is a directory"),
    (["grid.toml", "--workers", "0"], "npulab: error: invalid value for '--workers'"),
    (["grid.toml", "--workers", "1", "--scheduler", "tcp://127.0.0.1:1"], "a cluster has its own workers"),
    (["grid.toml", "-o", "no/results.sqlite"], "cannot write no/results.sqlite\n  got     no is not a folder"),
    (["grid.toml", "-o", "."], ". exists and is not a file"),
])
def test_wrong_usage_is_told(folder, npulab, arguments, said):
    write(HEAD)

    code, out, err = npulab("sweep", *arguments)

    assert (code, out) == (2, "")
    assert said in err


def test_a_key_is_of_the_content_and_not_of_the_name():
    point = Point("a.tflite", "0" * 64, "a311d", "best", OPTIONS, {"clock": 1e9})
    other = {
        "digest": "1" * 64, "target": "other", "plan": "reference", "options": OPTIONS | {"features": ["tiles"]},
        "what_if": {"clock": 1e9, "sram": 0},
    }

    keys = {point.key()} | {msgspec.structs.replace(point, **{name: v}).key() for name, v in other.items()}

    assert len(keys) == 6
    assert Point("b.tflite", "0" * 64, "a311d", "best", dict(reversed(OPTIONS.items())),
                 {"clock": 1e9}).key() == point.key()
    assert all(re.fullmatch("[0-9a-f]{64}", k) for k in keys)


def test_a_key_changes_with_the_code_that_profiles_come_from(tmp_path, monkeypatch):
    for name in ("profile/join.py", "targets/x/data.toml", "cli/sweep.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(points.npulab, "__file__", str(tmp_path / "__init__.py"))
    versions = [points.version.__wrapped__()]

    for name in ("cli/sweep.py", "profile/join.py", "targets/x/data.toml"):
        (tmp_path / name).write_text("2")
        versions.append(points.version.__wrapped__())

    assert re.fullmatch(r"0\.1\.0\+[0-9a-f]{12}\.1", versions[0])
    assert versions[0] == versions[1]
    assert len(set(versions)) == 3


# --- points to records


@pytest.mark.parametrize(("plan", "options", "what_if"), [
    ("best", {}, {}), ("best", {"features": ["tiles"], "zero_runs": False}, {"dram_bandwidth": 1e9, "nn_cores": 4}),
    ("reference", {"image_cache": False}, {}), ("reference", {}, {"dram_bandwidth": 1e9}),
    ("reference", {}, {"clock": 4e8, "dram_bandwidth": 2e10}), ("reference", {}, {"sram": 262144, "clock": 4e8}),
])
def test_a_record_is_what_profile_says(plan, options, what_if):
    point = Point("digits", "the sample", "a311d", plan, OPTIONS | options, what_if)

    record = measure(point, DIGITS.read_bytes)

    profile = api.profile(DIGITS, plan=plan, options=point.plan_options(), what_if=what_if)
    data = as_data(profile)
    assert record == Record(
        "done", data["total_ms"], *data["interval_ms"], data["bound"], data["dram_bytes"], data["sram_bytes"],
        len({s.nodes[0] for s in profile.spans if s.unit in ("nn", "tp") and s.nodes}),
        len({s.nodes[0] for s in profile.spans if s.unit == "host" and s.nodes}),
        nodes={c: [n[c] for n in data["nodes"]] for c in NODE_COLUMNS})
    assert sum(record.nodes["ms"]) == pytest.approx(record.total_ms)


def test_points_that_only_change_speeds_share_a_program_of_plan_reference(monkeypatch):
    compiled = []
    real = api.compile
    monkeypatch.setattr(api, "compile", lambda *a, **k: compiled.append(a) or real(*a, **k))
    monkeypatch.setattr(points, "_programs", points._Latest())

    def ms(plan, **what_if):
        return measure(Point("d", "the sample", "a311d", plan, OPTIONS, what_if), DIGITS.read_bytes).total_ms

    assert ms("reference", clock=4e8) > ms("reference") > ms("reference", dram_bandwidth=1e11)
    assert len(compiled) == 1
    assert ms("best") > ms("best", dram_bandwidth=1e11)  # a search by speed, which `profile` has to see
    assert len(compiled) == 1


@pytest.mark.parametrize(("point", "data", "kind", "text"), [
    (Point("x", "1", "a311d", "best", OPTIONS, {}), b"no model", "ModelError", "'model' is neither a TFLite nor"),
    (Point("x", "2", "z80", "best", OPTIONS, {}), DIGITS.read_bytes(), "UsageError",
     "there is no target 'z80'\n  want    a311d"),
    (Point("x", "2", "a311d", "best", OPTIONS, {"nn_cores": 3}), DIGITS.read_bytes(), None, None),
])
def test_what_goes_wrong_is_the_record(point, data, kind, text):
    record = measure(point, lambda: data)

    if kind is None:  # a chip that may exist
        assert record.state == "done"
    else:
        assert (record.state, record.error_class) == ("failed", kind)
        assert record.error.startswith(text)
        assert record.total_ms is record.nodes is None


def test_a_defect_is_a_record_too(monkeypatch):
    monkeypatch.setattr(api, "profile", lambda *a: 1 / 0)

    record = measure(Point("x", "the sample", "a311d", "best", OPTIONS, {}), DIGITS.read_bytes)

    assert record == Record("failed", error_class="ZeroDivisionError", error=(
        "ZeroDivisionError: division by zero\n  This is a defect of npulab; please report it."))


# --- the results file

A = Point("a.tflite", "a" * 64, "a311d", "best", OPTIONS, {"clock": 1e9})
B = Point("b.tflite", "b" * 64, "a311d", "best", OPTIONS, {})
DONE = Record("done", 1.5, 1.0, 2.0, "macs", 10, 20, 3, 1, nodes={"node": [0, None], "ms": [0.5, 1.0]})
FAILED = Record("failed", error_class="ModelError", error="no\n  got     ♥")


def test_rows_come_back_as_they_went_in(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        assert (store.states(), list(store.records({})), store.nodes("x")) == ({}, [], None)
        assert not list(tmp_path.iterdir())
        store.write([(A, DONE), (B, FAILED)])
    with Store(tmp_path / "r.sqlite") as store:
        assert store.states() == {A.key(): "done", B.key(): "failed"}
        found = dict(store.records({A.key(): 0, B.key(): 0}))
        assert found == {A.key(): msgspec.structs.replace(DONE, nodes=None), B.key(): FAILED}
        assert (store.nodes(A.key()), store.nodes(B.key())) == (DONE.nodes, None)

    first = next(r for r in rows(tmp_path / "r.sqlite") if r[0] == A.key())
    assert dict(zip(COLUMNS, first, strict=True)) | {"nodes": None} == {
        "key": A.key(), "model": "a.tflite", "model_sha256": "a" * 64, "target": "a311d", "plan": "best",
        "options": '{"channels":"any","features":[],"image_cache":true,"kernel_cache":true,"zero_runs":true}',
        "what_if": '{"clock":1000000000.0}', "npulab": points.version(), "state": "done", "total_ms": 1.5,
        "low_ms": 1.0, "high_ms": 2.0, "bound": "macs", "dram_bytes": 10, "sram_bytes": 20, "npu_ops": 3,
        "host_ops": 1, "error_class": None, "error": None, "nodes": None}


def test_a_done_row_stays_and_a_failed_one_is_replaced(tmp_path):
    slower = msgspec.structs.replace(DONE, total_ms=9.0)
    with Store(tmp_path / "r.sqlite") as store:
        store.write([(A, DONE), (B, FAILED)])
        store.write([(A, slower), (A, FAILED), (B, slower)])
        assert {key: r.total_ms for key, r in store.records(store.states())} == {A.key(): 1.5, B.key(): 9.0}


def test_a_batch_is_written_whole_or_not_at_all(tmp_path):
    with Store(tmp_path / "r.sqlite") as store:
        store.write([(A, DONE)])
        with pytest.raises(ModelError, match="CHECK constraint"):
            store.write([(B, DONE), (msgspec.structs.replace(B, target="x"), Record("unheard of"))])
        assert store.states() == {A.key(): "done"}


def damaged(what, path):
    """A file at `path` that is not a results file; what is said of it."""
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-4096])
        return "r.sqlite is damaged\n  got     database disk image is malformed\n  try     another file with -o;"
    if what == "half a header":
        path.write_bytes(path.read_bytes()[:50])
        return "r.sqlite is not a results file of npulab sweep\n  try     another file with -o"
    if what == "noise inside":
        data = bytearray(path.read_bytes())
        data[4096:] = b"\x55" * (len(data) - 4096)
        path.write_bytes(data)
        return "r.sqlite is damaged\n  got     "
    if what == "text":
        path.write_text("my notes, " * 100)
        return "r.sqlite is not a results file of npulab sweep"
    with contextlib.closing(sqlite3.connect(path)) as db:
        if what == "a newer schema":
            db.execute("PRAGMA user_version = 2")
            said = ("r.sqlite is a results file of another version of npulab\n  got     schema 2\n"
                    "  want    schema 1\n  try     another file with -o")
        elif what == "another table":
            db.executescript("DROP TABLE results; CREATE TABLE results (key, total_ms)")
            said = "r.sqlite is damaged\n  got     its table is another one"
        elif what == "a state that is none":
            db.executescript("PRAGMA ignore_check_constraints = ON; UPDATE results SET state = 'odd'")
            said = "r.sqlite is damaged\n  got     CHECK constraint failed in results"
        elif what == "a word for a number":
            db.execute("UPDATE results SET total_ms = 'fast'")
            said = "r.sqlite is damaged\n  got     Expected `float | null`, got `str`"
        else:
            assert what == "another program's"
            db.execute("PRAGMA application_id = 7")
            said = "r.sqlite is not a results file of npulab sweep"
        db.commit()
    return said


@pytest.mark.parametrize("what", [
    "truncated", "half a header", "noise inside", "text", "a newer schema", "another table", "a state that is none",
    "a word for a number", "another program's"])
def test_a_file_that_is_not_a_results_file_is_refused_and_left_alone(folder, npulab, what):
    write(HEAD)
    [point] = read_grid("grid.toml").points.values()
    with Store("r.sqlite") as store:
        store.write([(point, DONE), (A, DONE), (B, FAILED)])
    said = damaged(what, Path("r.sqlite"))
    before = Path("r.sqlite").read_bytes()

    code, out, err = npulab("sweep", "grid.toml", "-o", "r.sqlite")

    assert (code, out) == (3, "")
    assert f"npulab: error: {said}" in err
    assert Path("r.sqlite").read_bytes() == before
    assert sorted(os.listdir()) == ["digits.tflite", "grid.toml", "r.sqlite"]


def test_a_file_that_was_killed_at_birth_is_a_new_one(tmp_path):
    (tmp_path / "empty.sqlite").touch()
    with contextlib.closing(sqlite3.connect(tmp_path / "born.sqlite")) as db:
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute("PRAGMA user_version = 1")

    for name in ("empty.sqlite", "born.sqlite"):
        with Store(tmp_path / name) as store:
            store.write([(A, DONE)])
            assert store.states() == {A.key(): "done"}


def test_a_file_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    path = tmp_path / "r.sqlite"
    with Store(path) as store, contextlib.closing(sqlite3.connect(path)) as other:
        store.write([(A, DONE)])
        store._db.execute("PRAGMA busy_timeout = 0")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UsageError, match=r"cannot use .*r\.sqlite as a results file") as e:
            store.write([(B, DONE)])
        assert e.value.facts["got"] == "database is locked"


# --- sweeps on this machine


def test_the_same_rows_from_processes_as_one_by_one(folder, npulab, one_by_one):
    write(TWO_HUNDRED)

    code, out, _ = npulab("sweep", "grid.toml", "--workers", 2)

    assert code == 0
    assert rows("grid.sqlite") == one_by_one
    assert len(one_by_one) == 200
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert re.fullmatch("digits.tflite", lines[0])
    assert re.split(" {2,}", lines[1].strip()) == ["ms", "interval", "DRAM", "SRAM", "NPU", "host", "with"]
    times = [float(line.split()[0]) for line in lines if re.match(r" *\d+\.\d{3} ", line)]
    best = sorted(r[COLUMNS.index("total_ms")] for r in one_by_one)
    assert times == [float(f"{t:.3f}") for t in best[:12]]
    assert "and 188 slower ones; --json has all." in out
    assert "200 points, 200 of them measured now, 0 failed. grid.sqlite has them." in " ".join(out.split())


def test_json_has_every_point_in_the_grids_order_and_nothing_runs_twice(folder, npulab):
    name = write(HEAD + 'plans = ["reference"]\n[set]\ndram_bandwidth = [8e9, 2e9]\n')
    assert npulab("sweep", name, "-o", "r.sqlite", "--workers", 1)[0] == 0
    first = rows("r.sqlite")
    write(HEAD + 'plans = ["reference"]\n[set]\ndram_bandwidth = [4e9, 2e9]\n')

    code, out, _ = npulab("sweep", name, "-o", "r.sqlite", "--json", "--workers", 1)

    data = json.loads(out)
    assert code == 0
    assert {k: data[k] for k in ("grid", "results", "points", "ran", "failed")} == {
        "grid": "grid.toml", "results": "r.sqlite", "points": 2, "ran": 1, "failed": 0}
    assert [r["what_if"] for r in data["rows"]] == [{"dram_bandwidth": 4e9}, {"dram_bandwidth": 2e9}]
    expected = api.profile(DIGITS, plan="reference", what_if={"dram_bandwidth": 4e9})
    assert data["rows"][0]["total_ms"] == expected.total_ns / 1e6
    assert data["rows"][0]["key"] == next(iter(read_grid(name).points))
    assert [r for r in rows("r.sqlite") if r in first] == first  # the other grid's points are kept
    assert len(rows("r.sqlite")) == 3


def test_points_that_fail_are_rows_and_run_again_only_when_asked(folder, npulab):
    write('models = ["*.tflite"]\ntargets = ["a311d"]\nplans = ["reference"]\n')
    Path("broken.tflite").write_bytes(b"not a model")

    code, out, err = npulab("sweep", "grid.toml", "--workers", 1)

    assert (code, err) == (1, "")
    assert "failed: broken.tflite, reference\n  'model' is neither a TFLite nor an ONNX model" in out
    assert "2 points, 2 of them measured now, 1 failed." in out
    again = npulab("sweep", "grid.toml")
    assert again[0] == 1
    assert again[1] == out.replace("2 of them", "0 of them")
    retried = npulab("sweep", "grid.toml", "--retry-failed", "--workers", 1)
    assert retried[1] == out.replace("2 of them", "1 of them")
    assert len(rows("grid.sqlite")) == 2


def test_a_model_that_changes_under_way_is_no_result(folder):
    grid = read_grid(write(HEAD))
    Path("digits.tflite").write_bytes(DIGITS.read_bytes() + b" ")
    [(digest, path)] = grid.files.items()

    with pytest.raises(ModelError, match="the model's file changed while the sweep ran"):
        points.read_model(path, digest)


@pytest.mark.parametrize(("p", "text"), [
    (A, "a311d, best, clock=1GHz"),
    (Point("", "", "a311d", "reference", OPTIONS | {"zero_runs": False, "channels": "multiple-of-cores"},
           {"sram": 524288, "dram_bandwidth": 3.94e9}),
     "a311d, reference, no-zero-runs, channels=multiple-of-cores, sram=512KiB, dram_bandwidth=3.94GB/s"),
    (Point("", "", "a311d", "best", OPTIONS | {"features": ["tiles", "tp-split"]}, {"sram": 0, "nn_cores": 8}),
     "a311d, best, features=tiles,tp-split, sram=0B, nn_cores=8"),
    (Point("", "", "a311d", "best", OPTIONS, {"clock": 123456789.25}), "a311d, best, clock=123456789.25Hz"),
])
def test_what_sets_a_point_apart_is_said_as_the_command_line_takes_it(p, text):
    assert how(p) == text
    assert how(p, one_target=True) == text.removeprefix("a311d, ")


def start(*arguments, **options):
    """A sweep in its own process group, with Ctrl-C as a terminal gives it: shells take it from background jobs."""
    return subprocess.Popen([sys.executable, "-m", "npulab", "sweep", *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options)


def wait_until(what, seconds=30.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def living(group):
    """Processes of a group that are not dead; zombies wait for whoever is process 1 here."""
    out = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            out += [stat.parent.name] if int(pgrp) == group and state != "Z" else []
    return out


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_sweep_that_was_killed_goes_on_and_nothing_is_lost_or_run_twice(folder, one_by_one):
    write(TWO_HUNDRED)
    process = start("grid.toml", "--workers", 2)
    wait_until(lambda: count("grid.sqlite") >= 30)
    process.kill()
    process.communicate()
    wait_until(lambda: not living(process.pid))  # its workers know

    with Store("grid.sqlite") as store:
        before = len(store.states())
    finished = sweep("grid.toml", "grid.sqlite", workers=2)

    assert 30 <= before < 200
    assert finished.ran == 200 - before
    assert rows("grid.sqlite") == one_by_one


@pytest.mark.parametrize(("signals", "code"), [
    ((signal.SIGINT,), 130), ((signal.SIGTERM,), 143)], ids=["ctrl-c", "terminated"])
def test_a_sweep_that_was_stopped_leaves_a_valid_file_and_no_traceback(folder, one_by_one, signals, code):
    write(TWO_HUNDRED)
    process = start("grid.toml", "--workers", 2)
    wait_until(lambda: count("grid.sqlite") >= 10)
    os.killpg(process.pid, signals[0])  # as a terminal does
    out, err = process.communicate(timeout=20)

    assert (process.returncode, out, err) == (code, "", "")
    some = rows("grid.sqlite")
    assert 10 <= len(some) < 200
    assert set(some) <= set(one_by_one)
    assert sorted(os.listdir()) == ["digits.tflite", "grid.sqlite", "grid.toml"]


def _dies(pipe, always):
    """A worker that dies of a point: of those with a clock of 1 GHz, if there is no file 'died', or always."""
    pipe.send_bytes(b"started")
    with contextlib.suppress(EOFError):
        while True:
            point, path = pipe.recv()
            if point.what_if["clock"] == 1e9 and (always or not Path("died").exists()):
                Path("died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            pipe.send_bytes(msgspec.json.encode(measure(point, functools.partial(points.read_model, path,
                                                                                       point.digest))))


_dies_once = functools.partial(_dies, always=False)
_dies_always = functools.partial(_dies, always=True)
CLOCK_GRID = HEAD + 'plans = ["reference"]\n[set]\nclock = [8e8, 9e8, 1e9, 1.1e9, 1.2e9]\n'


def test_a_point_whose_worker_was_killed_runs_again(folder, monkeypatch):
    monkeypatch.setattr(pool, "_work", _dies_once)

    swept = sweep(write(CLOCK_GRID), "r.sqlite", workers=2)

    assert Path("died").exists()
    assert [r.state for _, _, r in swept.rows] == ["done"] * 5


def test_a_point_that_kills_its_workers_has_failed_and_the_others_have_not(folder, monkeypatch):
    monkeypatch.setattr(pool, "_work", _dies_always)

    swept = sweep(write(CLOCK_GRID), "r.sqlite", workers=2)

    assert [r.state for _, _, r in swept.rows] == ["done", "done", "failed", "done", "done"]
    assert swept.rows[2][2] == Record("failed", error_class="WorkerDied", error=(
        "the process that measured it died, 2 times\n  got     signal 9\n"
        "  try     fewer --workers, if memory ran out; then --retry-failed"))


def _never_starts(pipe):
    sys.exit(7)


def test_workers_that_do_not_start_end_the_sweep(folder, monkeypatch):
    monkeypatch.setattr(pool, "_work", _never_starts)

    with pytest.raises(DeviceError, match="a worker process of the sweep did not start") as e:
        sweep(write(CLOCK_GRID), "r.sqlite", workers=2)

    assert e.value.facts == {"got": "exit code 7", "try": "fewer --workers"}
    assert not Path("r.sqlite").exists()


# --- sweeps on a cluster


@pytest.fixture
def local_cluster():
    """Makes a Dask cluster on this machine: a scheduler here, workers in processes of their own."""
    distributed = pytest.importorskip("distributed", reason="needs dask.distributed, the extra npulab[dask]")
    dask = pytest.importorskip("dask")
    with contextlib.ExitStack() as stack:
        def make(workers=2, **scheduler):
            stack.enter_context(dask.config.set({f"distributed.scheduler.{k}": v for k, v in scheduler.items()}))
            return stack.enter_context(distributed.LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0",
                host="127.0.0.1", silence_logs=60))

        yield make


def killer(dask, kills):
    """Tells nobody, but kills workers: number of points done -> which; and the list of those it killed."""
    killed = []

    def tell(done, failed, of):
        for after in [n for n in kills if done >= n]:
            for worker in [dask.workers[i] for i in kills.pop(after)]:
                if worker.pid is not None:  # else it is not up again
                    killed.append(worker.pid)
                    os.kill(worker.pid, signal.SIGKILL)

    return killed, tell


def test_a_cluster_that_loses_workers_half_way_gives_the_same_rows(folder, one_by_one, local_cluster):
    dask = local_cluster(2, **{"allowed-failures": 10})
    killed, tell = killer(dask, {60: [0], 130: [0, 1]})  # one; then every one, and the model with them

    swept = sweep(write(TWO_HUNDRED), "r.sqlite", scheduler=dask.scheduler_address, tell=tell)

    assert len(killed) >= 2
    assert swept.ran == len(swept.rows) == 200
    assert rows("r.sqlite") == one_by_one


def test_a_point_that_the_scheduler_gives_up_has_failed_and_can_run_again(folder, npulab, local_cluster):
    dask = local_cluster(2, **{"allowed-failures": 0})
    _, tell = killer(dask, {3: [0]})
    write(f"{HEAD}[set]\ndram_bandwidth = {BANDWIDTHS}\n")

    swept = sweep("grid.toml", "grid.sqlite", scheduler=dask.scheduler_address, tell=tell)

    failed = [r for _, _, r in swept.rows if r.state == "failed"]
    assert 0 < len(failed) < 20
    assert {(r.error_class, r.error.split("\n")[0]) for r in failed} == {
        ("KilledWorker", "every worker that got it was lost; the scheduler gave it up")}
    done = {r for r in rows("grid.sqlite") if r[COLUMNS.index("state")] == "done"}
    code, out, err = npulab("sweep", "grid.toml", "--retry-failed", "--scheduler", dask.scheduler_address)
    assert (code, err) == (0, "")
    assert f"20 points, {len(failed)} of them measured now, 0 failed." in out
    assert done < set(rows("grid.sqlite"))


def test_a_cluster_without_workers_or_with_other_ones_is_told_and_a_broken_model_is_a_row(folder, monkeypatch,
                                                                                          local_cluster):
    name = write('models = ["*.tflite"]\ntargets = ["a311d"]\nplans = ["reference"]\n')
    Path("broken.tflite").write_bytes(b"not a model")
    dask = local_cluster(0)
    monkeypatch.setattr(cluster, "WORKERLESS_SECONDS", 1)

    with pytest.raises(DeviceError, match="the scheduler has no workers") as e:
        sweep(name, "r.sqlite", scheduler=dask.scheduler_address)
    assert e.value.facts["where"] == dask.scheduler_address
    assert not Path("r.sqlite").exists()

    dask.scale(1)
    monkeypatch.setattr(cluster, "WORKERLESS_SECONDS", 30)
    ours = points.version()
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "version", lambda: "0.0.9")
        with pytest.raises(DeviceError, match="a worker of the cluster has another npulab") as e:
            sweep(name, "r.sqlite", scheduler=dask.scheduler_address)
        assert (e.value.facts["got"], e.value.facts["want"]) == (ours, "0.0.9")
        assert e.value.facts["where"].startswith("tcp://127.0.0.1:")

    swept = sweep(name, "r.sqlite", scheduler=dask.scheduler_address)
    assert [(p.model, r.state, r.error_class) for _, p, r in swept.rows] == [
        ("broken.tflite", "failed", "ModelError"), ("digits.tflite", "done", None)]


def test_a_scheduler_that_goes_away_ends_the_sweep_and_keeps_what_is_done(folder, local_cluster):
    dask = local_cluster(1)

    def tell(done, failed, of):
        if done:
            dask.close()

    with pytest.raises(DeviceError, match="the scheduler is gone") as e:
        sweep(write(TWO_HUNDRED), "r.sqlite", scheduler=dask.scheduler_address, tell=tell)

    assert e.value.facts["try"] == "the same command goes on from the results so far, when it is back"
    assert 0 < len(rows("r.sqlite")) < 200


def test_a_scheduler_that_is_not_there_is_told_within_seconds(folder, npulab, monkeypatch):
    assert cluster.CONNECT_SECONDS <= 5
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    pytest.importorskip("distributed", reason="needs dask.distributed, the extra npulab[dask]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()

    code, out, err = npulab("sweep", write(HEAD), "--scheduler", address)

    assert (code, out, err) == (4, "", (
        f"npulab: error: there is no answer from a Dask scheduler\n  where   {address}\n  got     nothing in 1 s\n"
        "  try     start one with `dask scheduler`\n"))
    assert time.monotonic() - start < 5
    assert not Path("grid.sqlite").exists()


def test_somebody_else_who_answers_is_no_scheduler(folder):
    pytest.importorskip("distributed", reason="needs dask.distributed, the extra npulab[dask]")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def answer():
            with other.accept()[0] as them:
                them.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                them.recv(1000)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(DeviceError, match="there is no answer from a Dask scheduler") as e:
            sweep(write(HEAD), "r.sqlite", scheduler=f"tcp://127.0.0.1:{other.getsockname()[1]}")

    assert e.value.facts["got"] == "an answer of another kind"


@pytest.mark.parametrize("address", ["", "127.0.0.1:8786", "foo://127.0.0.1:8786", "tcp://127.0.0.1", "tcp://[::1"])
def test_what_is_no_address_is_wrong_usage(folder, address):
    pytest.importorskip("distributed", reason="needs dask.distributed, the extra npulab[dask]")
    with pytest.raises(UsageError, match=re.escape(f"'{address}' is no scheduler's address")) as e:
        sweep(write(HEAD), "r.sqlite", scheduler=address)

    assert e.value.facts["want"] == "tcp://HOST:PORT"


def test_a_cluster_needs_its_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)

    with pytest.raises(UnsupportedError, match=r"--scheduler needs dask\.distributed") as e:
        sweep(write(HEAD), "r.sqlite", scheduler="tcp://127.0.0.1:1")

    assert e.value.facts["try"] == "pip install 'npulab[dask]'"
