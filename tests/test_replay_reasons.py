"""That the reasons in `replay_deviations.toml` are the reasons: undo the recorded driver's mistake, and the reference
comes out. Each mistake is undone inside the virtual NPU; the recording stays as it is.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zipfile

import numpy as np
import pytest

from npulab.targets.vivante.chips import A311D
from npulab.targets.vivante.machine import coefficients, convolve
from npulab.targets.vivante.nn import NNDescriptor
from npulab.targets.vivante.replay import _Case, _submits, replay
from npulab.targets.vivante.tp import TPDescriptor
from shared import SHARED, needs_shared

TINY = SHARED / "golden" / "vivante" / "tiny"
pytestmark = needs_shared

MORE_THAN_BYTES = {
    "i8_add_ne": "addition", "i8_resid_h14c24": "addition", "i8_resid_h7c160": "addition", "i8_resid_s1gt": "addition",
    "i8_resid_s2gt": "addition", "i8_fc_28_20": "fully connected", "i8_dw3x3_s2_same_h9_c1": "H5",
    "i8_dw5x5_s2_same_h9_c1": "H5", "i8_dw5x5_s2_same_h7_c64": "H4", "i8_conv3x3_s2_same_12x8_i8_o16": "not square",
    "i8_conv5x5_s2_same_h9_i1_o8": "a core's share of the rearranging is padding only",
}
"""int8 cases with a second mistake: NN notes 4.4 (zero points of additions), 4.7, H4, H5; TP notes 2.4.3."""


def largest(name):
    return replay(TINY / f"{name}.zip", A311D).max_abs_diff


def with_bytes_moved(memory, d, *rest):
    """Decode, then put the 128 on each weight that the driver forgot, in the weight and in its share of the bias."""
    k = coefficients.decode(memory, d, *rest)
    weights = k.dense
    if weights is None:
        weights = np.zeros(k.shape, np.int16)
        weights[k.kernel, k.channel, k.tap] = k.value
    moved = ((weights + d.coef_zero_point) ^ 0x80) - d.coef_zero_point
    bias = k.biases + ((weights.astype(np.int64) - moved) * d.in_border_const).sum(axis=(1, 2))
    return dataclasses.replace(k, dense=moved.astype(np.int16), biases=bias)


def test_int8_replays_are_right_once_weight_bytes_are_moved_by_128(monkeypatch):
    """H8."""
    monkeypatch.setattr(convolve, "decode", with_bytes_moved)

    wrong = {p.stem for p in TINY.glob("i8_*.zip") if largest(p.stem) > 1}

    assert wrong == MORE_THAN_BYTES.keys()


@pytest.mark.parametrize("name", ["u8_conv5x5_s1_valid_h9_i1_o8", "u8_fc_64_10"])
def test_kernels_written_in_whole_rows_are_right_when_read_so(monkeypatch, name):
    """H7, and NN notes 4.7: the driver does not cut these kernels into patches of three columns."""
    assert largest(name) > 1
    monkeypatch.setattr(coefficients, "tap_positions", lambda ky, kx: np.arange(ky * kx))

    assert largest(name) <= 1


@pytest.mark.parametrize(("name", "offset"), [("u8_dw5x5_s2_same_h9_c1", -2), ("u8_dw5x5_s2_same_h5_c24", 0)])
def test_padding_corner_cases_are_right_with_the_offset_that_padding_means(monkeypatch, name, offset):
    """H5."""
    padded = convolve._padded

    def with_offset(d, *rest):
        fields = {f: getattr(d, f) for f in d.fields} | {"in_x_offset": offset, "in_y_offset": offset}
        return padded(NNDescriptor(**fields), *rest)

    assert largest(name) > 1
    monkeypatch.setattr(convolve, "_padded", with_offset)

    assert largest(name) <= 1


def descriptors(name):
    """(operation, its descriptors) of a recorded case."""
    with zipfile.ZipFile(TINY / f"{name}.zip") as z:
        for op in json.loads(z.read("a311d/index.json"))["subgraphs"][0]["hw_ops"]:
            layout = NNDescriptor if op["type"] == "NN" else TPDescriptor
            files = [op["files"]["nn"]] if op["type"] == "NN" else op["files"]["tp"]
            yield op, [layout.decode(struct.unpack(f"<{layout.words}I", z.read(f"a311d/{f}"))) for f in files]


def test_one_core_of_the_recorded_rearranging_gets_an_image_of_minus_one_rows():
    """TP notes 2.4.3, second defect."""
    rows = [d.in_image_y_size for op, ds in descriptors("i8_conv5x5_s2_same_h9_i1_o8")
            if op.get("tp_type") == "RESHUFFLE" for d in ds]

    assert 0xFFFF in rows


@pytest.mark.parametrize("name", ["u8_dw3x3_s2_valid_h7_c64", "u8_dw5x5_s2_same_h7_c64", "u8_dw5x5_s2_valid_h7_c64",
                                  "i8_dw5x5_s2_same_h7_c64"])
def test_weights_for_a_rearranged_input_meet_one_that_is_not(name):
    """H4: four times the channels, and no job that rearranges."""
    ops = list(descriptors(name))

    assert not any(op.get("tp_type") == "RESHUFFLE" for op, _ in ops)
    (nn,) = [(op, d) for op, (d, *_) in ops if op["type"] == "NN"]
    assert nn[1].kernel_z == 4 * 64


@pytest.mark.parametrize("name", ["u8_conv3x3_s2_same_12x8_i8_o16", "i8_conv3x3_s2_same_12x8_i8_o16"])
def test_the_axes_of_a_tall_image_are_exchanged(name):
    """H3: the result of a 12x8 image is 6 rows of 4; the recorded job makes 4 rows of 6."""
    (d,) = [d for op, (d, *_) in descriptors(name) if op["type"] == "NN"]

    assert (d.out_y_size, d.out_x_size) == (4, 6)


@pytest.mark.parametrize("name", ["real/mobilenet_v1_0.25_128_quant", "real/mobilenet_v1_1.0_224_quant"])
def test_every_job_of_a_chain_is_within_one_of_the_reference_on_the_references_input(name):
    """Job by job: whatever a job gives is compared, then replaced by what the reference has there."""
    case = _Case(TINY.parent / f"{name}.zip", "a311d")
    reference = case.reference()
    compared = 0
    for _, npu, _, subgraph in _submits(case, case.index(), reference, A311D, None):
        if subgraph is None:
            continue
        named = {t["index"] for op in subgraph["pipe_ops"] for t in op["outputs"]}  # others are the driver's own
        for op in subgraph["hw_ops"]:
            words = np.frombuffer(case.read(f"a311d/{op['files']['cmd']}"), "<u4").tolist()
            assert npu.submit(words) == []
            if op["output"]["tensor"] not in named:
                continue
            expected = reference[f"t{op['output']['tensor']}"][0]
            if op["type"] == "NN":
                expected = np.moveaxis(expected, -1, 0)
            va = int(op["output"]["va"], 16)
            difference = np.abs(npu.read(va, expected.size) - expected.reshape(-1).astype(int))
            assert difference.max() <= 1
            npu.write(va, expected)
            compared += 1
    assert compared >= 3
