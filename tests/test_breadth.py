"""Every model at hand against every board and chip: an answer in under 2 s, in the shape that programs rely on."""

import importlib
import json
import time

import pytest

from npulab import zoo
from npulab.cli import run_arguments
from npulab.importers import load
from npulab.targets.facts.board import boards
from npulab.targets.facts.outlook import STATES, outlook
from npulab.targets.target import all_targets
from shared import MODELS

verb = importlib.import_module("npulab.cli.check")  # npulab.cli.check is the function
SECONDS = 2.0
ZOO = ("mobilenet-v1", "mobilenet-v2", "mobilenet-v3", "squeezenet", "yolov5s", "yolov8n", "ssdlite",
       "vit-tiny")
"""bench/breadth.py has the large ones too."""
FILES = sorted(p for p in MODELS.glob("*/*") if p.suffix in (".onnx", ".tflite"))
VERDICTS = ("npu", "host", "refused", "unknown")


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Facts are parsed once a process; bench/breadth.py counts that too."""
    pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
    boards()
    all_targets()


def graph_of(what):
    return load(what) if what in FILES else load(zoo.build(what, 64))


def is_check(data, nodes):
    """The interface of the issue, and what stands beside it."""
    assert {"target", "nodes", "summary"} <= data.keys()
    assert [n["node"] for n in data["nodes"]] == list(range(nodes))
    for n in data["nodes"]:
        assert n["verdict"] in VERDICTS
        assert isinstance(n["op"], str)
        assert isinstance(n["remedies"], list)
        assert all({"rule", "found", "allowed", "source"} <= r.keys() for r in n["reasons"])
        assert all(r["rule"] and r["source"] for r in n["reasons"])
        assert (n["verdict"] == "npu") is (not n["reasons"])
    counts = {v: sum(n["verdict"] == v for n in data["nodes"]) for v in VERDICTS}
    assert {v: data["summary"][v] for v in VERDICTS} == counts
    for a in data["findings"]:
        assert all(a[key] for key in ("found", "why", "remedy", "price", "source"))


@pytest.mark.parametrize("what", [*FILES, *ZOO], ids=lambda w: getattr(w, "stem", w))
def test_every_board_answers(what):
    graph = graph_of(what)
    worst = ("", 0.0)
    for board in boards().values():
        began = time.process_time()
        found = outlook(graph, board)
        data = verb._board_data(graph, found)
        worst = max(worst, (board.name, time.process_time() - began), key=lambda p: p[1])
        is_check(data, len(graph.nodes))
        assert data["state"] in STATES
        assert data["verdict"].startswith(f"{board.name}: ")
        assert data["summary"]["npu_macs"] <= data["summary"]["macs"]
        json.dumps(data)

    assert worst[1] < SECONDS, worst


@pytest.mark.parametrize("what", [p for p in FILES if p.stem in (
    "person_detect", "yolov5n-int8", "ssdlite_mobiledet_coco_qat_postprocess", "keras_lstm_mnist_ptq", "ad01_fp32",
    "split_concat")], ids=lambda p: p.stem)
def test_every_chip_answers(what, capsys):
    seconds = {}
    for chip in all_targets():
        began = time.process_time()
        code = run_arguments(["check", str(what), "--target", chip, "--json"])
        seconds[chip] = time.process_time() - began
        out, err = capsys.readouterr()
        assert code in (0, 1), err
        data = json.loads(out)
        is_check(data, len(data["nodes"]))

    assert max(seconds.values()) < SECONDS, seconds
