"""Verdicts against real compilers': Arm's, as `bench/vela.py` recorded them, and the open driver for Vivante."""

import json
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import pytest

from npulab.importers import load
from npulab.targets.facts.board import find_board
from npulab.targets.target import find_target
from shared import MODELS, SHARED, needs_shared

ROOT = Path(__file__).resolve().parents[1]
RECORDS = sorted(Path(__file__).parent.glob("vela_5_2_0*.json"))
GOLDEN = SHARED / "golden" / "vivante"


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_check_agrees_with_what_vela_said_of_generated_operators(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from vela_operators import One

    told = json.loads(path.read_text())
    board, checksum, wrong, places = find_board(told["board"]), 0, [], Counter(told["places"])
    for i, place in enumerate(told["places"]):
        data = One(told["first"] + i).build()
        checksum = zlib.crc32(data, checksum)
        finding = board.check(load(data)).findings[0]
        if (finding.where == "npu") != (place == "n"):
            wrong.append((told["first"] + i, finding.op, place, [str(r) for r in finding.reasons]))
    assert f"{checksum:08x}" == told["models"], "the generator has changed: record again, bench/vela.py --record"
    assert len(told["places"]) >= 500
    assert min(places["n"], places["h"] + places["f"]) > 150  # neither answer is right by always giving it
    assert len(wrong) <= len(told["places"]) // 100, wrong


WHY = {"op type": "Plan reference has lowerings for",
       "relu6 not clamped by output quantization": "With a fused RELU6 the output's quantized range ends at 6.0"}
"""The driver's words -> how our rule begins."""


@needs_shared
def test_the_check_agrees_with_the_open_driver_s_reasons():
    """Every operator of every recorded case: on the NPU or not, and why not; of two it left no reason."""
    if not GOLDEN.is_dir():
        pytest.skip(f"needs the recordings in {GOLDEN}")
    compared, wrong = Counter(), []
    for path in sorted(GOLDEN.glob("*/*.zip")):
        with zipfile.ZipFile(path) as z:
            told = json.loads(z.read("a311d/index.json"))["tflite_ops"]
            inside = "model.tflite" in z.namelist()
            model = z.read("model.tflite") if inside else MODELS / "quantized" / f"{path.stem}.tflite"
        findings = find_target("a311d").check(load(model), "reference")
        for theirs, ours in zip(told, findings, strict=True):
            want, got = theirs["why_not"], [r.rule for r in ours.reasons]
            compared[theirs["delegated"], bool(want)] += 1
            exact = len(want) == len(got) or not want
            if theirs["delegated"] != (ours.where == "npu") or theirs["delegated"] == bool(got) or not exact or not all(
                    any(g.startswith(WHY[w]) for g in got) for w in want):
                wrong.append((path.stem, ours.node, theirs["op"], want, got))
    assert compared == {(True, False): 378, (False, True): 22, (False, False): 2}
    assert not wrong, wrong
