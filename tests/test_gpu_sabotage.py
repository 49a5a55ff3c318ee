"""Experiments that lie are refused, each for its reason, and the same ones left as they are accepted: the lists are
those of bench/gpu_sabotage.py. Kernels run on PoCL or whatever device is number 0; times are not compared, so that a
busy machine decides nothing."""

import re

import pytest

from npulab.gpu import bounds
from npulab.gpu.types import Limits, Quantity
from scripts import loaded

with loaded("bench/gpu_sabotage.py") as sabotage:
    pass

UNREAD = ("launch", "barrier", "map", "up", "down")
"""Nothing to count."""


@pytest.fixture(scope="module")
def bench(opencl_bench):
    pytest.importorskip("capstone", reason="reads machine code: pip install 'npulab[gpu]'")
    opencl_bench.one_by_one = False  # the cases are about neighbours in a group
    return opencl_bench


def names(cases):
    return [c.name for c in cases]


def test_there_are_enough_of_them(bench):
    assert len({*names(sabotage.KERNELS), *names(sabotage.DEVICES)}) == len(sabotage.KERNELS) + len(sabotage.DEVICES)
    assert len(sabotage.KERNELS) >= 30
    assert len(list(sabotage.honest(bench))) >= 30


@pytest.mark.parametrize("case", sabotage.KERNELS, ids=names(sabotage.KERNELS))
def test_a_sabotaged_kernel_is_refused_for_its_reason(bench, case):
    if "PoCL" not in bench.identity.platform and "compiled" in case.reason:
        pytest.skip("what a compiler does to a kernel is known of PoCL's")
    with sabotage.unhurried():
        assert re.search(case.reason, case.do(bench))


@pytest.mark.parametrize("case", sabotage.DEVICES, ids=names(sabotage.DEVICES))
def test_a_lying_device_is_refused_for_its_reason(case):
    assert re.search(case.reason, case.do(None))


def test_honest_experiments_are_accepted_and_their_work_was_counted(bench):
    with sabotage.unhurried():
        for name, run in sabotage.honest(bench):
            t = run()
            assert t.wrong == "", name
            assert len(t.seconds) >= 2, name
            assert all(s > 0 for s in t.seconds), name
            assert all(v > 0 for v in t.work.values()), name
            if "PoCL" in bench.identity.platform and name not in UNREAD:
                assert t.counted == "work counted in x86-64 machine code", name


def test_honest_devices_are_believed():
    """The cases of DEVICES without their lies."""
    rates = sabotage.rates
    for name, unit, task in (("fma float32 rate", "operations/s", lambda m: [rates.rate(m, "fma", "float32")]),
                             ("launch cost", "s", lambda m: [rates.launch(m)]),
                             ("memory bandwidth", "GB/s", lambda m: [rates.memory_bandwidth(m, None, "read")]),
                             ("transfer to device bandwidth", "GB/s", lambda m: rates.transfers(m, True))):
        assert sabotage.finding(sabotage.Simulated(sabotage.machine()), name, unit, task) == ""


# bounds that no case has


LIMITS = Limits(4, 256, 32768, 1 << 30, frozenset(("float32", "float16")), 1e9)


def said(name, value, unit, interval=None, others=()):
    return bounds.objection(Quantity(name, value, unit, interval), LIMITS, others)


def test_what_real_devices_do_is_within_the_bounds():
    """Published: an M1 has 8 cores of 128 lanes at 1.28 GHz and 68 GB/s, an H200 132 of 128 at 1.98 GHz and 4.8 TB/s.
    """
    m1 = Limits(8, 256, 32768, 1 << 30, frozenset(("float32",)), 1.0e9)
    h200 = Limits(132, 1024, 49152, 1 << 34, frozenset(("float32",)), 1.98e9)
    for limits, rate, memory in ((m1, 8 * 128 * 1.28e9, 68.0), (h200, 132 * 128 * 1.98e9, 4800.0)):
        assert bounds.objection(Quantity("fma float32 rate", rate, "operations/s"), limits) == ""
        assert bounds.objection(Quantity("memory bandwidth", memory, "GB/s"), limits) == ""


@pytest.mark.parametrize(("name", "value", "unit", "interval", "reason"), [
    ("launch cost", float("nan"), "s", None, "is no measure"), ("launch cost", 0.0, "s", None, "is no measure"),
    ("barrier cost", -1e-9, "s", None, "is no measure"),
    ("launch cost", 2e-6, "s", (3e-6, 4e-6), "outside of its own interval"),
    ("L1 bandwidth", 12.0, "GiB/s", None, "is in GiB/s, not in GB/s"),
    ("mul float32 latency", 4.0, "ns", None, "is in ns, not in s"),
    ("fma float16 rate", 3.2e12, "operations/s", None, "3.07e+12: 4 compute units at 1.5 times the stated 1 GHz, 512"),
    ("fma float32 latency", 5e-10, "s", None, "less than a cycle"),
    ("L1 latency", 5e-10, "s", None, "less than a cycle"),
])
def test_what_cannot_be_is_named(name, value, unit, interval, reason):
    assert reason in said(name, value, unit, interval)


def test_levels_further_out_are_not_faster():
    levels = (Quantity("L1 bandwidth", 100.0, "GB/s"), Quantity("L2 bandwidth", 60.0, "GB/s"),
              Quantity("L1 latency", 5e-9, "s"))
    assert said("L2 bandwidth", 120.0, "GB/s", None, levels) == ""
    assert "above that of L1" in said("L2 bandwidth", 130.0, "GB/s", None, levels)
    assert "above that of L2 before it, 60" in said("memory bandwidth", 80.0, "GB/s", None, levels)
    assert "less than that of L1" in said("L2 latency", 4e-9, "s", None, levels)
    assert said("local memory bandwidth", 400.0, "GB/s", None, levels) == ""


def test_repetitions_of_an_honest_timer_are_times():
    assert bounds.times_objection((4e-6, 5e-6, 4e-6, 4e-6, 5e-6, 4e-6)) == ""  # of a microsecond's ticks
    assert bounds.times_objection((2e-3,) * 9) == ""
    assert bounds.drift_objection((1.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0)) == ""  # one disturbed
    assert "1.40 times" in bounds.drift_objection((1.0, 1.0, 1.0, 1.2, 1.2, 1.2, 1.4, 1.4, 1.4))


@pytest.mark.parametrize(("values", "element", "wrong"), [
    ((1.0, 2.0**-126, 0.0), "float32", False), ((2.0**-127,), "float32", True), ((2.0**-15,), "float16", True),
    ((2.0**-15,), "float32", False), ((3,), "int32", False), ((float("nan"),), "float32", True)])
def test_numbers_that_are_not_normal_are_found(values, element, wrong):
    assert bool(bounds.subnormal(values, element)) == wrong
