"""Recorded streams of the open driver on the virtual NPU: no fault anywhere, and the reference's tensors.

Where a replay differs by more than 1, `replay_deviations.toml` says by how much and which known defect of that driver
it is; the test checks that the case has the shape that the defect needs, and that nothing else deviates.
"""

import json
import tomllib
import zipfile
from pathlib import Path

import pytest

from npulab.errors import ModelError
from npulab.targets.target import find_target
from shared import SHARED, needs_shared

GOLDEN = SHARED / "golden" / "vivante"
DEVIATIONS = tomllib.loads((Path(__file__).parent / "replay_deviations.toml").read_text())
CASES = sorted(GOLDEN.glob("tiny/*.zip"))
REAL = [GOLDEN / "real" / f"{name}.zip" for name in ("mobilenet_v1_0.25_128_quant", "mobilenet_v1_1.0_224_quant")]


def operations(case):
    """Each operation as the driver got it, with (D1, D2, C) of its data."""
    with zipfile.ZipFile(case) as z:
        index = json.loads(z.read("a311d/index.json"))
    for subgraph in index["subgraphs"]:
        for op in subgraph["pipe_ops"]:
            yield op, [*op["inputs"][0]["dims"][1:], 0, 0, 0][:3]


def strided_same(op):
    return "CONV" in op["type"] and op["stride"][0] == 2 and op["padding_same"]


HAZARDS = {
    "H3": lambda op, d: "CONV" in op["type"] and d[0] > d[1],
    "H4": lambda op, d: "CONV" in op["type"] and op["depthwise"] and op["stride"][0] == 2 and d[0] in (6, 7),
    "H5": lambda op, d: strided_same(op) and (d[0] <= 5 or (op["depthwise"] and d[0] % 2)),
    "H7": lambda op, d: op["type"] == "CONV" and d[2] == 1 and op["weight"]["dims"][1] == 5 and d[0] <= 64,
    "H8": lambda op, d: op["outputs"][0]["signed"],
    "FC": lambda op, d: op["type"] == "FCON",
}
"""NN notes, section 13; FC: section 4.7, the order of a fully connected stream on v7 is unproven."""


@needs_shared
@pytest.mark.parametrize("case", CASES, ids=lambda p: p.stem)
def test_a_replay_has_no_fault_and_gives_the_reference_within_one(case):
    result = find_target("a311d").replay(case)

    assert result.faults == ()
    listed = DEVIATIONS.get(case.stem)
    if listed is None:
        assert result.max_abs_diff <= 1
    else:
        assert result.max_abs_diff == listed["largest"] > 1
        if listed["why"] == "chain":
            jobs = len(list(operations(case)))
            assert result.max_abs_diff <= jobs
        else:
            assert any(HAZARDS[listed["why"]](op, d) for op, d in operations(case))


@needs_shared
def test_every_listed_deviation_is_of_a_case_that_exists():
    assert DEVIATIONS.keys() <= {c.stem for c in (*CASES, *REAL)}


@needs_shared
@pytest.mark.parametrize("case", REAL, ids=lambda p: p.stem)
def test_a_real_network_replays_without_fault(case):
    """27 layers one behind another add up; the last layer, given the reference's input, is within 1."""
    result = find_target("a311d").replay(case)

    assert result.faults == ()
    chain, last = result.outputs
    assert last.max_abs_diff <= 1
    assert chain.max_abs_diff == DEVIATIONS[case.stem]["largest"]


def test_what_is_not_a_recorded_case_is_refused_with_a_reason(tmp_path):
    plain = tmp_path / "case.zip"
    plain.write_bytes(b"hello")
    with pytest.raises(ModelError, match="is not a recorded case\n  got     File is not a zip file"):
        find_target("a311d").replay(plain)
    with zipfile.ZipFile(plain, "w") as z:
        z.writestr("imx8mp/index.json", "{}")
    with pytest.raises(ModelError, match=r"has no 'a311d/index.json'\n  try     use a case recorded for this NPU"):
        find_target("a311d").replay(plain)
