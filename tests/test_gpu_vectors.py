"""Rates and latencies of operations by width of vectors: what simulated GPUs hide, what is refused, how it is shown."""

from dataclasses import asdict, replace

import pytest

from npulab.cli.probe import show
from npulab.errors import UnsupportedError
from npulab.gpu import bounds
from npulab.gpu.analysis import conclude, rates, vectors
from npulab.gpu.analysis.conclude import tried
from npulab.gpu.analysis.meter import Meter
from npulab.gpu.simulated import Simulated, random_hidden, truth
from npulab.gpu.types import Quantity

HIDDEN = replace(random_hidden(3), clock=1e9, jitter=0.0, outliers=0.0, throttle_after=float("inf"), throttle_to=1.0,
                 tick=1e-9, translation=None, vectors=(0.9, 0.5, 0.25))


def found(bench, operation, element):
    meter = Meter(bench)
    rates.rate(meter, operation, element)
    return {q.name: q for name, unit, task in vectors.tasks(meter) if name.startswith(f"{operation} {element} ")
            for q in tried(meter, name, unit, task)}


@pytest.mark.parametrize(("operation", "element"), [("fma", "float32"), ("add", "int32"), ("special", "float32")])
def test_each_width_is_what_the_machine_has_of_it(operation, element):
    known = truth(HIDDEN)
    got = found(Simulated(HIDDEN), operation, element)
    assert {name: q.value for name, q in got.items()} == pytest.approx({name: known[name] for name in got}, rel=0.01)
    of = [got[vectors.name(operation, element, "rate", w)].value for w in vectors.WIDTHS]
    assert [x / of[0] for x in of] == pytest.approx([1, 1, 0.9, 0.5, 0.25], rel=0.01)
    late = [got[vectors.name(operation, element, "latency", w)].value for w in vectors.WIDTHS[1:]]
    assert late == sorted(late)


def test_wide_vectors_wait_for_narrow_units():
    """A step of 16 in a warp of 32 through 8 lanes, a quarter of which it reaches, takes 256 cycles."""
    slow = replace(HIDDEN, warp=32, rates={**HIDDEN.rates, ("fma", "float32"): 8})
    got = found(Simulated(slow), "fma", "float32")
    assert got["fma float32 latency, vectors of 16"].value == pytest.approx(256e-9, rel=0.01)


def test_narrow_vectors_fill_the_units_too():
    """The fastest shape has few threads where wide vectors fill long waits; a scalar needs more of them."""
    machine = replace(random_hidden(108078), jitter=0.0, outliers=0.0)
    got = found(Simulated(machine, 108078), "add", "float32")
    name = "add float32 rate, vectors of 1"
    assert got[name].value == pytest.approx(truth(machine)[name], rel=0.03)


def test_halves_come_in_pairs():
    machine = next(h for h in map(random_hidden, range(40)) if ("fma", "float16") in h.rates)
    got = found(Simulated(replace(machine, throttle_after=float("inf"), vectors=(1.0, 1.0, 1.0))), "fma", "float16")
    assert got["fma float16 rate, vectors of 2"].value == pytest.approx(
        2 * got["fma float16 rate, vectors of 1"].value, rel=0.03)


def test_a_quick_run_leaves_them_out_and_one_that_was_stopped_goes_on():
    whole = {q.name: q for q in conclude(Simulated(HIDDEN))}
    names = {name for name in truth(HIDDEN) if "vectors of" in name}
    assert names == {name for name in whole if "vectors of" in name}
    assert not [q for q in conclude(Simulated(HIDDEN), quick=True) if "vectors" in q.name]
    known = [q for name, q in whole.items() if name not in names]
    again = {q.name: q for q in conclude(Simulated(HIDDEN), known=known)}
    for name in names:
        assert again[name].value == pytest.approx(truth(HIDDEN)[name], rel=0.02), name


def test_what_a_device_has_not_is_refused_for_itself():
    class Narrow(Simulated):
        def chain(self, operation, element, width, chains, threads):
            if width == 16:
                raise UnsupportedError("no vectors of 16 here")
            return super().chain(operation, element, width, chains, threads)

    got = found(Narrow(HIDDEN), "fma", "float32")
    assert {q.name for q in got.values() if q.status == "refused"} == {
        "fma float32 rate, vectors of 16", "fma float32 latency, vectors of 16"}
    assert "no vectors of 16 here" in got["fma float32 rate, vectors of 16"].why


def test_physical_bounds_hold_for_them():
    limits = Simulated(HIDDEN).limits
    for name, value, unit in (("fma float32 rate, vectors of 4", 1e18, "operations/s"),
                              ("fma float32 latency, vectors of 4", 1e-12, "s")):
        q = Quantity(name, value, unit, (value, value), "measured", "")
        assert bounds.objection(q, limits)
        assert not bounds.objection(replace(q, value=1e-8 if unit == "s" else 1e9, interval=None), limits)
    wrong = Quantity("fma float32 rate, vectors of 4", 1.0, "GB/s", None, "measured", "")
    assert "is in GB/s, not in operations/s" in bounds.objection(wrong, limits)


def test_they_are_shown_as_tables_that_fit_80_columns(capsys):
    bench = Simulated(HIDDEN)
    quantities = [asdict(q) for q in (*found(bench, "fma", "float32").values(), *found(bench, "mul", "int32").values())]
    refused = [q for q in quantities if q["name"].startswith("mul int32 rate")]
    for q in refused:
        q.update(value=None, interval=None, status="refused", why="the clock does not stay")
    show({"identity": asdict(bench.identity), "quantities": quantities})
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "G operations/s, vectors of so many:" in text
    assert "ns from a step to the next, vectors of so many:" in text
    assert "mul int32 rate, 5 vectors" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("fma float32")]
    assert [len(r) for r in rows] == [7, 6]
    assert float(rows[0][2]) == pytest.approx(1e-9 * truth(HIDDEN)["fma float32 rate, vectors of 1"], rel=0.01)


def test_who_shares_the_device_for_a_while_does_not_halve_a_rate():
    """Two of three experiments run on half of the device, without the reference seeing it."""
    class Shared(Simulated):
        asked = 0

        def chain(self, operation, element, width, chains, threads):
            t = super().chain(operation, element, width, chains, threads)
            if (operation, width) != ("mul", 16):
                return t
            self.asked += 1
            return t if self.asked % 3 == 0 else replace(t, seconds=[2 * s for s in t.seconds])

    name = "mul float32 rate, vectors of 16"
    machine = replace(HIDDEN, vectors=(1.0, 1.0, 1.0))
    meter = Meter(Shared(machine))
    meter.shapes["mul", "float32"] = 16, 8, 4 * machine.cores * machine.group_max
    (got,) = vectors.rate(meter, "mul", "float32", 16)
    assert got.value == pytest.approx(truth(machine)[name], rel=0.01)
