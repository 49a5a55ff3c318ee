"""Work that nobody counted in compiled code: refused, unless it is asked for, or a result or a ratio needs no count."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest

from npulab.cli import run_arguments
from npulab.cli.probe import show
from npulab.gpu import counting, kernels, opencl
from npulab.gpu.analysis.conclude import conclude
from npulab.gpu.counting import Counted
from npulab.gpu.counting.opencl import NO_CAPSTONE
from npulab.gpu.simulated import Simulated, random_hidden
from npulab.gpu.types import Identity

UNREAD = f"{counting.STATED}{counting.UNREAD}the driver's binary is of no known kind"
CHASED = UNREAD.replace(counting.STATED, counting.PROVEN)
COUNTED = "work counted in SPIR-V"
METHODS = dict.fromkeys(("stream", "chain", "diverge", "hold", "local", "local_write", "barrier", "image", "constant"),
                        UNREAD) | dict.fromkeys(("chase", "chase_pieces"), CHASED)
NOTHING_TO_COUNT = {"launch cost", "map cost", "transfer to device bandwidth", "transfer to device cost",
                    "transfer from device bandwidth", "transfer from device cost", "lowest clock"}
BY_RATIO = {"warp width", "local memory banks"}
BY_RESULT = {"memory latency", *(f"L{i} {what}" for i in range(1, 5) for what in ("size", "line", "latency"))}


class Unread(Simulated):
    """A device behind OpenCL whose compiled code is not read."""

    def __init__(self, counted=None, machine=3):
        super().__init__(random_hidden(machine), 3)
        for name, said in {**METHODS, **(counted or {})}.items():
            setattr(self, name, partial(self.saying, getattr(self, name), said))

    @staticmethod
    def saying(experiment, said, *a):
        return replace(experiment(*a), counted=said(*a) if callable(said) else said)

    @property
    def identity(self):
        return Identity("opencl", "a platform", "a device", "nobody", "1", "OpenCL 3.0")


def named(found):
    return {q.name: q for q in found}


@pytest.fixture(scope="module")
def refused():
    return named(conclude(Unread()))


@pytest.fixture(scope="module")
def trusted():
    return named(conclude(Unread(), trust_source=True))


def test_what_rests_on_the_sources_count_is_refused(refused, trusted):
    left = {n for n, q in refused.items() if q.status == "measured"}
    assert left == {n for n, q in trusted.items() if q.status == "measured"} & (
        NOTHING_TO_COUNT | BY_RATIO | BY_RESULT)
    assert {"launch cost", "warp width", "L1 size", "L1 latency", "memory latency", "lowest clock"} <= left
    for name in ("fma float32 rate", "fma float32 latency", "memory bandwidth", "L1 bandwidth", "barrier cost",
                 "local memory bandwidth", "register file", "image bandwidth", "constant bandwidth"):
        q = refused[name]
        assert (q.status, q.value, q.interval) == ("refused", None, None), name


def test_the_reason_says_what_was_not_read_what_it_would_be_and_what_to_try(refused, trusted):
    q = trusted["barrier cost"]
    assert refused["barrier cost"].why == (
        "its work was not counted in compiled code: the driver's binary is of no known kind; by the source's count it "
        f"would be {q.value:.4g} s; try --device vulkan:N if the device is there, too: SPIR-V is counted; or "
        "--trust-source, which takes what the source states")
    assert f"it would be {trusted['fma float32 rate'].value:.4g} operations/s" in refused["fma float32 rate"].why
    assert refused["fma against mul float32"].why == "needs the rates of both, one of which was refused"


def test_what_is_trusted_says_so_before_all_else(trusted):
    said = "NOT COUNTED in compiled code, taken by --trust-source: "
    for name in ("fma float32 rate", "memory bandwidth", "barrier cost", "resident threads"):
        assert trusted[name].why.startswith(said), name
        assert trusted[name].why.endswith(UNREAD), name
    for name in NOTHING_TO_COUNT | BY_RATIO | BY_RESULT:
        assert "NOT COUNTED" not in getattr(trusted.get(name), "why", ""), name


def test_chases_rest_on_their_ends_and_ratios_on_none(refused):
    for name in ("L1 size", "L1 latency", "memory latency"):
        assert refused[name].why.endswith(CHASED), name
    assert refused["warp width"].why.endswith(
        "a ratio of times of one code, in which its work divides out, not read from compiled code: the driver's binary "
        "is of no known kind")


def test_where_capstone_is_missing_it_is_what_to_install():
    missing = UNREAD.replace("the driver's binary is of no known kind", NO_CAPSTONE)
    found = named(conclude(Unread({"barrier": missing}), quick=True))
    assert "; try pip install 'npulab[gpu]'; or --device vulkan:N" in found["barrier cost"].why
    assert "pip install" not in found["fma float32 rate"].why


@pytest.mark.parametrize("method", ["chain", "stream"])
def test_one_experiment_that_a_finding_rests_on_is_enough(method):
    """Of all that are asked for only one was not counted."""
    asked = []

    def said(*a):
        asked.append(a)
        return UNREAD if a == last else COUNTED

    last = None
    honest = named(conclude(Unread({n: COUNTED for n in METHODS} | {method: said}), quick=True))
    name = {"chain": "fma float32 latency", "stream": "memory bandwidth"}[method]
    assert honest[name].status == "measured"
    assert honest[name].why.endswith(COUNTED)
    last = ("fma", "float32", 1, 1, 1) if method == "chain" else max(a for a in asked if a[2:] == (16, "read"))
    found = named(conclude(Unread({n: COUNTED for n in METHODS} | {method: said}), quick=True))
    assert found[name].status == "refused"
    assert "was not counted" in found[name].why


def test_a_shape_that_was_only_tried_costs_nothing():
    """Vectors of 16 are not read, and others are faster."""
    found = named(conclude(Unread({n: COUNTED for n in METHODS} | {
        "chain": lambda *a: UNREAD if a[2] == 16 else COUNTED}, machine=4), quick=True))
    rate = found["fma float32 rate"]
    assert "vectors of 16" not in rate.why
    assert rate.status == "measured", rate.why


def test_references_may_stay_uncounted():
    """Of four chains on all threads; what is asked for has other shapes."""
    bench = Unread({n: COUNTED for n in METHODS})
    most = bench.limits.compute_units * bench.limits.group_max
    bench = Unread({n: COUNTED for n in METHODS} | {
        "chain": lambda *a: UNREAD if a == ("fma", "float32", 1, 4, most) else COUNTED})
    found = named(conclude(bench, quick=True))
    for name in ("fma float32 latency", "memory bandwidth", "barrier cost", "lowest clock", "L1 latency"):
        assert found[name].status == "measured", found[name].why


def test_what_cannot_be_is_refused_for_that():
    """The stronger reason comes first."""
    def boasting(*a, f=Simulated.chain):
        t = f(bench, *a)
        return replace(t, seconds=tuple(s * 1e-6 for s in t.seconds), counted=UNREAD)

    bench = Unread()
    bench.chain = boasting
    assert "above a physical bound" in named(conclude(bench, quick=True))["fma float32 rate"].why


# the terminal, and who reads the file


def result(found, trust):
    from dataclasses import asdict

    return {"identity": asdict(Unread().identity), "trust_source": trust, "quantities": [asdict(q) for q in found]}


def test_the_terminal_says_once_what_to_try(refused, capsys):
    show(result(refused.values(), False))
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("--trust-source") == 1
    assert text.count("Where work was not counted, try --device vulkan:N if the device is there, too") == 1
    assert "(!)" not in text
    assert "by the source's" in text


def test_the_terminal_marks_what_is_trusted(trusted, capsys):
    show(result(trusted.values(), True))
    out = capsys.readouterr().out
    assert "fma float32 rate (!)" in out
    assert "L1 size (!)" not in out
    assert "launch cost (!)" not in out
    assert "NOT COUNTED in compiled code, taken by --trust-source" in " ".join(out.split())


@pytest.mark.parametrize("given", [[], ["--trust-source"]])
def test_the_option_comes_to_the_probe(monkeypatch, capsys, given):
    asked = []

    def probe(*a, **more):
        asked.append(more)
        return result([], more["trust_source"])

    monkeypatch.setattr("npulab.probing.probe", probe)
    assert run_arguments(["probe", *given]) == 0
    assert asked == [{"trust_source": bool(given)}]


def test_a_roofline_of_refused_rates_says_why(refused, tmp_path, capsys):
    from npulab import zoo

    model, file = tmp_path / "net.onnx", tmp_path / "gpu.json"
    model.write_bytes(zoo.build("squeezenet"))
    file.write_text(json.dumps(result(refused.values(), False)))
    assert run_arguments(["roofline", str(model), "--device", str(file)]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "no ceiling of" in said
    assert "fma float32 rate: refused: its work was not counted in compiled code: the driver's binary" in said
    assert "--trust-source" in said


def test_a_roof_of_refused_rates_is_none(refused, tmp_path):
    from npulab.gpu.ceilings import read_result
    from npulab.gpu.compute.profiling import roof_of

    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(result(refused.values(), False)))
    roof = roof_of(read_result(file))
    assert (roof.operations, roof.bandwidth) == (None, None)
    assert [m.partition(": its work was not")[0] for m in roof.missing] == [
        "fma float32 rate: refused", "memory bandwidth: refused"]


# a device: what is said of experiments whose code is not read


@pytest.fixture
def unread(opencl_bench, monkeypatch):
    """A device of no known binaries."""
    monkeypatch.setattr(opencl, "SCALES", 0.0)
    monkeypatch.setattr(opencl, "ENOUGH", 1e-5)
    monkeypatch.setattr(opencl, "REPEATS", 2)
    monkeypatch.setattr(counting, "count", lambda *_: Counted(None, why="the driver's binary is of no known kind"))
    monkeypatch.setattr(opencl_bench, "_counts", {})
    monkeypatch.setattr(opencl_bench, "_ways", {})
    return opencl_bench


def test_a_chase_is_counted_by_its_end(unread):
    assert unread.chase(1 << 14, 64).counted == CHASED
    assert unread.chase_pieces(1 << 16, 64, 1 << 12).counted == CHASED
    assert unread.chain("fma", "float32", 1, 2, 8).counted == UNREAD
    assert unread.stream(1 << 16, 2, 16, "read").counted == UNREAD
    assert unread.diverge(2).counted == UNREAD
    if unread.one_by_one:
        assert unread.primed(1 << 22, 0).counted == CHASED


def test_a_chase_that_leaves_whole_rounds_out_is_not_believed(unread, monkeypatch):
    """It ends where it must. 16 places, 8 loads a turn: two turns are a round."""
    lazy = kernels.CHASE.replace("i < turns", "i < (turns & 1)")
    monkeypatch.setattr(kernels, "CHASE", lazy)
    t = unread.chase(1024, 64)
    assert re.fullmatch(r"the chase did 0 loads, not \d+", t.wrong)
    assert t.counted == UNREAD


def test_a_kernel_that_calls_what_is_not_seen_has_the_work_that_the_source_states(unread):
    asked = counting.Asked("operations", {"mul float32": 16})
    seen = Counted({"calls": 1.0, "mul float32": 3.0}, "x")
    assert counting.work(seen, asked) == 16
    assert counting.source(seen).startswith(counting.STATED)


def test_a_device_is_told_from_one_whose_code_is_read(opencl_bench, monkeypatch):
    monkeypatch.setattr(opencl, "SCALES", 0.0)
    if "PoCL" not in opencl_bench.identity.platform:
        pytest.skip("what is read of another driver is not known")
    pytest.importorskip("capstone")
    assert opencl_bench.chase(1 << 14, 64).counted == "work counted in x86-64 machine code"
