"""A Session: bytes up, streams submitted, bytes down, host parts run, mistakes told."""

import numpy as np
import pytest

from npulab.errors import DeviceError, UnsupportedError, UsageError
from npulab.program.types import HostStep, Tensor
from npulab.runtime.session import Session, tensor_names
from programs import FAULT, SHAPE, AddOne, program

pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install 'npulab[litert]'")


def picture(seed=0):
    return np.random.default_rng(seed).integers(-100, 100, SHAPE).astype(np.int8)


def test_steps_run_in_order_on_both_places_and_every_tensor_is_traced():
    device, seen = AddOne(), {}
    session = Session(program(), device)

    outputs = session.run({"x": picture()}, trace=seen.__setitem__)

    assert list(outputs) == ["p"]
    assert sorted(seen) == [0, 1, 2]
    assert np.array_equal(seen[1], picture() + 1)  # the sign bits were turned on the way up and down
    assert seen[1].dtype == np.int8
    assert np.allclose((outputs["p"].astype(int) + 128).sum(-1) / 256, 1, atol=0.04)
    assert [len(s) for s in device.streams] == [2, 8]


def test_a_session_runs_again_and_initialises_once():
    device = AddOne()
    session = Session(program(), device)

    first = session.run({0: picture(1)})
    session.run({0: picture(2)})
    again = session.run({0: picture(1)})

    assert np.array_equal(first["p"], again["p"])
    assert [len(s) for s in device.streams] == [2, 8, 8, 8]


def test_records_say_what_ran_where():
    session = Session(program(), AddOne())
    session.run({"x": picture()})

    npu, host = session.records
    assert (npu.where, npu.ops, npu.jobs, npu.macs, npu.upload_bytes) == ("npu", ("CONV_2D", "RESHAPE"), 2, 4096, 64)
    assert (host.where, host.ops, host.jobs) == ("host", ("SOFTMAX",), 0)
    assert min(npu.seconds, host.seconds) >= 0


@pytest.mark.parametrize(("inputs", "text"), [
    ({}, "not every input is given\n  want    'x'\n  got     nothing for 'x'"),
    ({"y": np.zeros(SHAPE, np.int8)}, "the model has no input 'y'\n  want    'x'"),
    ({1: np.zeros(SHAPE, np.int8)}, "the model has no input 1\n  want    'x'"),
    ({0: np.zeros(SHAPE, np.int8), "x": np.zeros(SHAPE, np.int8)}, "input 'x' is given twice"),
    ({"x": np.zeros(SHAPE, np.uint8)},
     "input 'x' is of another shape or type\n  want    int8[1, 2, 4, 8]\n  got     uint8[1, 2, 4, 8]"),
    ({"x": np.zeros((2, 4, 8), np.int8)},
     "input 'x' is of another shape or type\n  want    int8[1, 2, 4, 8]\n  got     int8[2, 4, 8]"),
])
def test_wrong_inputs_are_told_with_what_is_wanted(inputs, text):
    with pytest.raises(UsageError) as e:
        Session(program(), AddOne()).run(inputs)

    assert str(e.value) == text


def test_faults_become_one_error_that_lists_them():
    session = Session(program(init=()), AddOne([FAULT] * 7))

    with pytest.raises(DeviceError) as e:
        session.run({"x": picture()})

    lines = str(e.value).splitlines()
    assert lines[0] == "the NPU reports 7 faults in step 0"
    assert lines[1] == ("  got     unmapped: reads 64 bytes that no section holds "
                        "(word 12, job 3, address 0x00900000)")
    assert lines[-1].strip() == "and 2 more"


def test_a_program_with_npu_steps_needs_a_device():
    with pytest.raises(UsageError, match="no device was given"):
        Session(program(), None)


def test_names_that_are_empty_or_not_unique_get_the_value_index():
    tensors = (Tensor(0, "x", "int8", SHAPE), Tensor(1, "x", "int8", SHAPE), Tensor(2, "", "int8", SHAPE))

    assert tensor_names(program(tensors=tensors)) == {0: "x#0", 1: "x#1", 2: "tensor#2"}


def test_a_host_part_that_litert_refuses_is_told_with_what_it_said():
    from npulab.exporters.tflite_builder import ModelBuilder

    m = ModelBuilder("odd")
    a, b = (m.tensor(n, SHAPE, "int8", scale=0.1, zero_point=0) for n in "ab")
    m.custom("PosenetDecoderOp", [a], [b])
    odd = HostStep((2,), (1,), (2,), m.build([a], [b]))

    with pytest.raises(UnsupportedError) as e:
        Session(program(steps=(program().steps[0], odd)), AddOne())
    assert str(e.value).startswith("LiteRT has no custom operator 'PosenetDecoderOp', which the host part SOFTMAX "
                                   "(node 2 of hand) needs\n  got     Encountered unresolved custom op")

    broken = HostStep((2,), (1,), (2,), b"\x1c\0\0\0TFL3" + bytes(100))
    with pytest.raises(UnsupportedError, match="LiteRT refuses the host part SOFTMAX"):
        Session(program(steps=(program().steps[0], broken)), AddOne())


def test_a_missing_litert_is_one_error_that_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(UnsupportedError, match=r"try     pip install 'npulab\[litert\]'"):
        Session(program(), AddOne())
