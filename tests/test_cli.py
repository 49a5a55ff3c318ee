"""The command line: what it prints, where, with which exit code; never a traceback for a user's mistake."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from npulab import api, cli
from npulab.cli import printing

SAMPLES = Path(__file__).resolve().parents[1] / "src" / "npulab" / "samples"
MODEL, PICTURE = str(SAMPLES / "digits.tflite"), str(SAMPLES / "digit.png")
TARGET = ("--target", "a311d")


def process(*arguments, **options):
    command = [sys.executable, "-m", "npulab", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_help_is_instant_and_names_every_verb():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = process("--help")
        times.append(time.perf_counter() - start)

    assert done.returncode == 0
    for verb in ("run", "check", "patch", "compile", "profile", "compare", "cliffs", "sweep", "teardown", "zoo",
                 "roofline", "probe", "atlas", "disasm", "replay", "targets"):
        assert re.search(rf"^  {verb}  ", done.stdout, re.M)
    assert min(times) < 0.6  # 0.3 is asked for, on a machine that does nothing else


@pytest.mark.parametrize(("arguments", "code", "text"), [
    ((), 2, "Usage: npulab"),
    (("fly",), 2, "npulab: error: no such command 'fly'\n  try     npulab --help"),
    (("compile", MODEL), 2, "npulab: error: missing option '--target'\n  try     npulab compile --help"),
    (("compile", MODEL, *TARGET, "--plan", "worst"), 2, "'worst'"),
    (("compile", MODEL, "--target", "z80"), 2, "npulab: error: there is no target 'z80'\n  want    a311d"),
    (("compile", "no.tflite", *TARGET), 3, "npulab: error: no.tflite"),
    (("compile", PICTURE, *TARGET), 3, "npulab: error: 'digit' is neither a TFLite nor an ONNX model"),
    (("run", MODEL, "--input", PICTURE), 2, "a model needs a target\n  want    a311d\n  try     --target a311d"),
    (("run", MODEL, *TARGET), 2, "the model takes 1 input\n  want    image: uint8[1, 32, 32, 3]"),
    (("run", MODEL, *TARGET, "--input", "no.png"), 2, "cannot read no.png"),
    (("run", MODEL, *TARGET, "--input", MODEL), 3, "digits.tflite is not an image that Pillow reads"),
    (("run", MODEL, *TARGET, "--input", PICTURE, "-o", "y.txt"), 2, "want    a name that ends in .npz or .npy"),
    (("run", MODEL, *TARGET, "--input", PICTURE, "--draw", "y.txt"), 2, "cannot tell how to draw y.txt"),
    (("run", MODEL, *TARGET, "--input", PICTURE, "--draw", "y.png"), 2, "--draw is for detectors"),
    (("run", MODEL, *TARGET, "--input", PICTURE, "--labels", PICTURE), 3, "digit.png is not a label file"),
    (("disasm", MODEL), 3, "it is not a program file of npulab"),
    (("targets", "z80"), 2, "there is no target 'z80'"),
])
def test_mistakes_are_told_on_stderr_with_their_exit_code(npulab, arguments, code, text):
    got, out, err = npulab(*arguments)

    assert (got, out) == (code, "")
    assert text in err
    assert "Traceback" not in err


def test_check_gives_reasons_and_a_verdict(npulab):
    code, out, _ = npulab("check", MODEL, *TARGET)
    data = json.loads(npulab("check", MODEL, *TARGET, "--json")[1])

    assert code == 0
    assert "18 of 19 operators of digits run on the NPU of a311d, plan best; 1 on the host." in out
    assert data["npu"] == 18
    assert data["nodes"][18]["where"] == "host"
    assert set(data["nodes"][18]["reasons"][0]) == {"rule", "found", "allowed", "source", "remedy"}
    assert {n["verdict"] for n in data["nodes"]} == {"npu", "host"}


def test_targets_are_listed_with_their_rules(npulab):
    assert "a311d" in npulab("targets")[1]
    assert json.loads(npulab("targets", "--json")[1])["targets"][0]["name"] == "a311d"
    assert "Strides are equal in both directions, and 1 or 2." in npulab("targets", "a311d")[1]
    assert set(json.loads(npulab("targets", "a311d", "--json")[1])["rules"][0]) == {"operator", "rule", "source"}


@pytest.fixture(scope="module")
def program_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("npu") / "digits.npu"
    api.write_program(api.compile(MODEL), path)
    return path


def test_compile_writes_what_is_asked_for_and_nothing_else(npulab, tmp_path, monkeypatch, program_file):
    monkeypatch.chdir(tmp_path)
    code, out, _ = npulab("compile", MODEL, *TARGET)
    assert (code, os.listdir(tmp_path)) == (0, [])
    assert out.startswith("digits for a311d, plan best\n\nstep  where  operators")

    code, out, _ = npulab("compile", MODEL, *TARGET, "-o", "d.npu", "--dump", "d", "--json")
    data = json.loads(out)
    assert (code, sorted(os.listdir(tmp_path))) == (0, ["d", "d.npu"])
    assert [s["where"] for s in data["steps"]] == ["npu", "host"]
    assert Path("d.npu").read_bytes() == program_file.read_bytes()
    report = json.loads(Path("d/jobs.json").read_text())
    assert len(report["jobs"]) == data["steps"][0]["jobs"]
    assert len(report["submits"]) == 2


def test_disasm_names_jobs_and_the_operators_they_come_from(npulab, program_file):
    _, out, _ = npulab("disasm", program_file)

    assert "job 0:" in out
    assert "CONV_2D (node 0)" in out
    assert json.loads(npulab("disasm", program_file, "--json")[1])["lines"] == out.splitlines()


def test_run_answers_and_says_what_was_done_and_what_ran_where(npulab):
    code, out, err = npulab("run", MODEL, *TARGET, "--input", PICTURE)

    assert (code, err) == (0, "")
    assert re.search(r"^    7  7      0\.99", out, re.M)  # digits.labels.txt lies beside the model
    assert "squashed to\n       32x32, bilinear; stored: the pixel" in out
    assert re.search(r"^   1  host   SOFTMAX", out, re.M)
    assert "it\nsays nothing of a board." in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_program_file_answers_like_the_model(npulab, program_file, tmp_path):
    outputs = []
    for i, model in enumerate((MODEL, program_file)):
        code, out, _ = npulab("run", model, *TARGET, "--input", f"image={PICTURE}", "--json",
                              "-o", tmp_path / f"{i}.npz")
        data = json.loads(out)
        assert (code, data["classes"][0]["index"]) == (0, 7)
        outputs.append((tmp_path / f"{i}.npz").read_bytes())
    assert outputs[0] == outputs[1]
    with np.load(tmp_path / "0.npz") as z:
        assert list(z) == [t["name"] for t in data["outputs"]]
    code, _, err = npulab("run", program_file, "--input", PICTURE, "--compare", "litert")
    assert (code, "--compare needs the model" in err) == (2, True)


def test_arrays_go_in_and_out_as_they_are(npulab, tmp_path):
    pixels = np.asarray(Image.open(PICTURE).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
    np.save(tmp_path / "x.npy", pixels[None])
    np.save(tmp_path / "one.npy", pixels)
    np.save(tmp_path / "wrong.npy", pixels.astype(np.float32))
    answers = []
    for name in ("x.npy", "one.npy"):
        code, out, _ = npulab("run", MODEL, *TARGET, "--input", tmp_path / name, "-o", tmp_path / "y.npy", "--json")
        answers.append((code, json.loads(out)["classes"]))
    assert answers[0] == answers[1]
    assert np.load(tmp_path / "y.npy").shape == (1, 10)

    code, _, err = npulab("run", MODEL, *TARGET, "--input", tmp_path / "wrong.npy")
    assert code == 2
    assert "want    uint8[1, 32, 32, 3]\n  got     float32[32, 32, 3]" in err
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00\x76\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1"
                                       + b"0" * 12 + b",)}" + b" " * 51 + b"\n")
    code, _, err = npulab("run", MODEL, *TARGET, "--input", tmp_path / "bad.npy")
    assert code == 3
    assert "is not an array that NumPy reads" in err


def test_compare_gives_a_row_for_every_layer_and_output(npulab):
    code, out, _ = npulab("run", MODEL, *TARGET, "--input", PICTURE, "--compare", "litert", "--json")
    found = json.loads(out)["compare"]

    assert (code, found["close"], found["layer_limit"]) == (0, True, 1)
    assert {n for d in found["layers"] for n in d["nodes"]} >= {0, 1, 2, 17}
    assert max(d["max_abs"] for d in found["layers"]) <= 1
    assert [d["ops"][-1] for d in found["outputs"]] == ["SOFTMAX"]
    _, out, _ = npulab("run", MODEL, *TARGET, "--input", PICTURE, "--compare", "litert", "--plan", "reference")
    assert "Layers that can be looked at alone: 1, all within 1 step." in out


def test_a_layer_far_from_litert_is_a_no(npulab, monkeypatch):
    from npulab.runtime import compare

    monkeypatch.setattr(compare, "LAYER_LIMIT", -1)

    assert npulab("run", MODEL, *TARGET, "--input", PICTURE, "--compare", "litert")[0] == 1


def test_a_defect_is_one_line_that_says_how_to_see_more(npulab, monkeypatch):
    def broken(*_):
        raise KeyError("inside")

    monkeypatch.setattr(api, "load", broken)
    code, _, err = npulab("check", MODEL, *TARGET)
    assert code == 4
    assert err == ("npulab: error: KeyError: 'inside'\n  This is a defect of npulab; please report it.\n"
                   "  try     NPULAB_TRACEBACK=1 shows where it happened\n")
    monkeypatch.setenv("NPULAB_TRACEBACK", "1")
    assert "Traceback" in npulab("check", MODEL, *TARGET)[2]


def test_an_interrupt_is_130(npulab, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "load", interrupted)

    assert npulab("check", MODEL, *TARGET) == (130, "", "")


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m npulab targets a311d | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)

    assert done.stderr == ""
    assert done.stdout.startswith("a311d")


def test_the_version_is_the_packages(npulab):
    import npulab as package

    assert npulab("--version") == (0, f"npulab {package.__version__}\n", "")


def test_text_from_a_file_cannot_steer_the_terminal(capsys):
    printing.table(["name+", ">n"], [("a\x1b[2Jb\rc", 1), ("z" * 200, 2)])
    out = capsys.readouterr().out

    assert "\x1b" not in out
    assert "\r" not in out
    assert "a\\x1b[2Jb\\rc" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(("n", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (1234567, "1.23 M"), (5.687e8, "569 M"),
                                         (999.9e6, "1 G")])
def test_amounts_have_three_digits(n, text):
    assert printing.amount(n) == text


def test_node_lists_are_short():
    assert printing.ranges([5, 0, 1, 2]) == "0-2, 5"
    assert cli.app.info.name == "npulab"
