"""A probe in a process of its own: devices that hang, die and lie cost a finding each."""

import json
import os
import time
from dataclasses import asdict

import pytest

from npulab import probing
from npulab.cli.probe import scaled
from npulab.errors import DeviceError, UsageError
from npulab.gpu import opencl
from npulab.gpu.types import Identity, Quantity

WHO = Identity("opencl", "a platform", "a device", "nobody", "1", "OpenCL 3.0")
NAMES = ("warp width", "register file", "L1 size")


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(opencl, "devices", lambda: [WHO])


def steps(pipe, known):
    """The names that are not known yet, each announced."""
    for i, name in enumerate(NAMES):
        if name not in {q.name for q in known}:
            pipe.send(("now", (name, i / len(NAMES))))
            yield name


def find(pipe, name):
    pipe.send(("found", [asdict(Quantity(name, 32.0, "threads", (31.0, 33.0), "measured", "seen"))]))


def honest(pipe, number, quick, trusting, known):
    pipe.send(("limits", {"compute_units": 2}))
    for name in steps(pipe, known):
        find(pipe, name)
    pipe.send(("done", None))


def hangs(pipe, number, quick, trusting, known):
    for name in steps(pipe, known):
        if name == "register file":
            time.sleep(600)
        find(pipe, name)
    pipe.send(("done", None))


def dies(pipe, number, quick, trusting, known):
    for name in steps(pipe, known):
        if name == "L1 size":
            os._exit(139)
        find(pipe, name)
    pipe.send(("done", None))


def raises(pipe, number, quick, trusting, known):
    for name in steps(pipe, known):
        if name == "L1 size":
            raise RuntimeError("the driver's own words")
        find(pipe, name)
    pipe.send(("done", None))


def never_starts(pipe, number, quick, trusting, known):
    os._exit(1)


def is_lost(pipe, number, quick, trusting, known):
    pipe.send(("failed", ("the device is gone", {"got": "CL_OUT_OF_RESOURCES"})))


def test_all_findings_come_back(tmp_path):
    told = []
    found = probing.probe(tell=lambda name, share: told.append((name, share)), work=honest)
    assert [q["name"] for q in found["quantities"]] == list(NAMES)
    assert all(q["status"] == "measured" and q["interval"] == (31.0, 33.0) for q in found["quantities"])
    assert found["identity"] == asdict(WHO)
    assert found["limits"] == {"compute_units": 2}
    assert [name for name, _ in told] == list(NAMES)


@pytest.mark.parametrize(("work", "name", "why"), [
    (hangs, "register file", "the device did not answer for 8 s"),
    (dies, "L1 size", "the process that measured died: the driver, as a rule"),
    (raises, "L1 size", "RuntimeError: the driver's own words (NPULAB_TRACEBACK=1 shows where)")])
def test_one_finding_is_lost_and_the_others_are_kept(work, name, why, monkeypatch, capfd):
    monkeypatch.delenv("NPULAB_TRACEBACK", raising=False)
    found = {q["name"]: q for q in probing.probe(work=work, patience=8)["quantities"]}
    assert set(found) == set(NAMES)
    assert (found[name]["status"], found[name]["why"], found[name]["value"]) == ("refused", why, None)
    assert all(q["status"] == "measured" for n, q in found.items() if n != name)
    assert "Traceback" not in capfd.readouterr().err


def test_a_device_that_never_starts_is_an_error():
    with pytest.raises(DeviceError, match="a device fails before anything is measured") as e:
        probing.probe(work=never_starts)
    assert e.value.facts["got"] == "the process that measured died: the driver, as a rule"


def test_what_the_device_says_is_passed_on():
    with pytest.raises(DeviceError, match="the device is gone") as e:
        probing.probe(work=is_lost)
    assert e.value.facts["got"] == "CL_OUT_OF_RESOURCES"


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    save = tmp_path / "found.part"
    probing.probe(work=honest, save=save)
    data = json.loads(save.read_text())
    assert [q["name"] for q in data["quantities"]] == list(NAMES)
    data["quantities"] = data["quantities"][:1]
    save.write_text(json.dumps(data))
    told = []
    found = probing.probe(work=honest, save=save, tell=lambda name, _: told.append(name))
    assert told == list(NAMES[1:])
    assert [q["name"] for q in found["quantities"]] == list(NAMES)


@pytest.mark.parametrize("change", [
    lambda d: d["identity"].update(driver="2"), lambda d: d.update(npulab="0"), lambda d: d.update(quick=True),
    lambda d: d.update(trust_source=True), lambda d: d.pop("trust_source"), lambda d: d.pop("identity"),
    lambda d: d["quantities"].append({"name": "x"}), lambda d: d.update(quantities=3)])
def test_findings_of_another_run_or_damaged_ones_are_not_used(tmp_path, change):
    save = tmp_path / "found.part"
    probing.probe(work=honest, save=save)
    data = json.loads(save.read_text())
    change(data)
    save.write_text(json.dumps(data))
    told = []
    probing.probe(work=honest, save=save, tell=lambda name, _: told.append(name))
    assert told == list(NAMES)


def trusting(pipe, number, quick, trusting, known):
    pipe.send(("found", [asdict(Quantity(f"trusting: {trusting}", 1.0, "s"))]))
    pipe.send(("done", None))


def test_a_run_that_trusts_the_source_is_another_run(tmp_path):
    """Neither goes on from what the other found."""
    save = tmp_path / "found.part"
    for trust in (False, True, False):
        found = probing.probe(work=trusting, save=save, trust_source=trust)
        assert [q["name"] for q in found["quantities"]] == [f"trusting: {trust}"]
        assert found["trust_source"] is trust
    assert len(probing.probe(work=trusting, save=save)["quantities"]) == 2  # the same again goes on


def test_half_a_file_is_not_used(tmp_path):
    save = tmp_path / "found.part"
    save.write_text('{"npulab": "0.1", "quan')
    assert len(probing.probe(work=honest, save=save)["quantities"]) == 3


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path):
    told = []
    with pytest.raises(UsageError, match="cannot write"):
        probing.probe(work=honest, save=tmp_path / "no" / "x.json", tell=lambda name, _: told.append(name))
    assert not told


@pytest.mark.parametrize(("value", "unit", "text"), [
    (3.2e-9, "s", "3.2 ns"), (5e-6, "s", "5 us"), (2e-3, "s", "2 ms"), (32768, "bytes", "32 KiB"),
    (1.5 * 2**20, "bytes", "1.5 MiB"), (196608, "bytes a core", "192 KiB a core"), (64, "bytes", "64 bytes"),
    (12.34, "GB/s", "12.34 GB/s"), (38.4e9, "operations/s", "38.4 G operations/s"), (32, "threads", "32 threads")])
def test_numbers_have_the_prefix_that_a_person_reads(value, unit, text):
    assert scaled(value, unit) == text
