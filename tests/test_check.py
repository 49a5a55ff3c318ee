"""npulab check over described boards: tables, JSON, and what it says of mistakes."""

import json

import pytest

from npulab import zoo
from npulab.cli import run_arguments
from npulab.targets.facts.board import boards

pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")


@pytest.fixture(scope="module")
def yolo(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "yolov5s.onnx"
    path.write_bytes(zoo.build("yolov5s", 64))
    return str(path)


@pytest.fixture
def npulab(capsys):
    def call(*arguments):
        code = run_arguments([str(a) for a in arguments])
        return code, *capsys.readouterr()
    return call


def test_a_board_s_reasons_and_its_verdict_fit_the_terminal(npulab, yolo):
    code, out, _ = npulab("check", yolo, "--target", "coral_edgetpu", "--as", "int8")

    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "Everything behind" in out
    text = " ".join(out.split())
    assert "of yolov5s run on the NPU" in text
    assert "of the multiplications, in 1 region;" in text


def test_the_json_has_the_stable_keys(npulab, yolo):
    data = json.loads(npulab("check", yolo, "--target", "rk3588", "--as", "int8", "--json")[1])

    assert data["target"] == "rk3588"
    assert {"node", "op", "verdict", "reasons", "remedies"} <= data["nodes"][0].keys()
    off = [n for n in data["nodes"] if n["verdict"] != "npu"]
    assert all(n["reasons"] and {"rule", "found", "allowed", "source"} <= n["reasons"][0].keys() for n in off)
    counts = data["summary"]
    assert sum(counts[k] for k in ("npu", "host", "refused", "unknown")) == len(data["nodes"])
    assert counts["npu"] == sum(n["verdict"] == "npu" for n in data["nodes"])
    assert counts["npu_macs"] <= counts["macs"]


def test_boards_stand_side_by_side(npulab, yolo):
    code, out, _ = npulab("check", yolo, "--target", "rk3588", "--target", "hailo8", "--as", "int8")
    everything = json.loads(npulab("check", yolo, "--all", "--json")[1])

    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert [line.split()[0] for line in out.splitlines()[1:] if line.startswith(("rk3588 ", "hailo8 "))] == [
        "rk3588", "hailo8"]
    assert [t["target"] for t in everything["targets"]] == list(boards())


@pytest.mark.parametrize(("arguments", "text"), [
    ((), "npulab check needs a target, or --all"),
    (("--all", "--target", "rk3588"), "--all and --target exclude each other"),
    (("--target", "rk3589"), "there is no board 'rk3589'"),
    (("--target", "rk3588", "--as", "int3"), "data cannot become 'int3'"),
    (("--target", "rk3588", "--target", "a311d"), "a311d is compiled for, and not described"),
    (("--target", "rk3588", "--dim", "height=8"), "has no dynamic dimension 'height'"),
])
def test_mistakes_are_told(npulab, yolo, arguments, text):
    code, out, err = npulab("check", yolo, *arguments)

    assert (code, out) == (2, "")
    assert text in err


def test_the_boards_are_listed(npulab):
    code, out, _ = npulab("targets", "--boards")

    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert len(boards()) == 43
    assert "hailo8" in out
    assert {b["name"] for b in json.loads(npulab("targets", "--boards", "--json")[1])["boards"]} == set(boards())
