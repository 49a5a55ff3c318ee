"""Rates where something else takes units of the cores: a simulated GPU whose references do not see it."""

from dataclasses import replace

import numpy as np
import pytest

from npulab.gpu import bounds
from npulab.gpu.analysis import rates
from npulab.gpu.analysis.meter import Meter, Refused
from npulab.gpu.simulated import Cache, Hidden, Simulated
from npulab.gpu.types import Timing

FMA, MUL = ("fma", "float32"), ("mul", "float32")
HIDDEN = Hidden(
    warp=32, cores=4, max_threads=1024, register_file=128 << 10, register_grain=8, clock=1e9,
    caches=(Cache(24 << 10, 64, 30, 512),), rates={FMA: 64, MUL: 64}, latencies={FMA: 64, MUL: 64}, local_banks=32,
    memory_latency=300e-9, memory_bandwidth=30e9, write_share=0.8, launch=20e-6, barrier=50e-9, transfer_start=10e-6,
    transfer_bandwidth=8e9)
"""Latencies are long: the references, of four chains a thread, do not fill the units."""
TRUE = 64 * 4 * 1e9


class Shared(Simulated):
    """Half of the units are taken for those experiments on full cores that `taken(number, operation)` says, counted
    from 0 on. References, of four chains a thread, are as always."""

    def __init__(self, taken):
        super().__init__(HIDDEN)
        self.taken, self.asked = taken, 0

    def chain(self, operation, element, width, chains, threads):
        found = super().chain(operation, element, width, chains, threads)
        reference = (width, chains, threads) == (1, 4, self.limits.compute_units * self.limits.group_max)
        if reference or threads == 1:
            return found
        self.asked += 1
        slow = 2.0 if self.taken(self.asked - 1, operation) else 1.0
        return Timing(tuple(slow * s for s in found.seconds), found.work)


def both(taken):
    meter = Meter(Shared(taken))
    return meter, *(rates.rate(meter, *what) for what in (FMA, MUL))


def test_a_rate_is_the_most_that_was_reached():
    searched = Shared(lambda *_: False)
    rates.rate(Meter(searched), *FMA)
    last = searched.asked - 3
    found = rates.rate(Meter(Shared(lambda number, _: number >= last)), *FMA)
    assert found.value == pytest.approx(TRUE, rel=0.03)
    assert found.interval[0] == pytest.approx(TRUE / 2, rel=0.05)
    assert found.why.endswith("when asked again: something else has the device")


def test_what_ends_soon_leaves_nothing():
    searched = Shared(lambda *_: False)
    rates.rate(Meter(searched), *FMA)
    last = searched.asked - 3
    found = rates.rate(Meter(Shared(lambda number, _: last <= number < last + 3)), *FMA)
    assert found.interval[0] == pytest.approx(TRUE, rel=0.03)
    assert "something else" not in found.why


def test_a_shape_that_was_slow_once_is_not_given_up():
    """Whatever a neighbour takes part of: eight chains of a processor's multiplications once lost to four for that."""
    searched = Shared(lambda *_: False)
    rates.rate(Meter(searched), *FMA)
    for first in range(0, searched.asked - 3, 2):
        found = rates.rate(Meter(Shared(lambda number, _, first=first: first <= number < first + 2)), *FMA)
        assert found.value == pytest.approx(TRUE, rel=0.03), first


def test_multiply_adds_against_multiplications():
    found = rates.against_multiply(*both(lambda *_: False))
    assert found.value == pytest.approx(1, rel=0.03)


def test_rates_of_other_moments_are_not_compared():
    searched = Shared(lambda *_: False)
    rates.rate(Meter(searched), *FMA)
    of_fma = searched.asked
    meter, fma, mul = both(lambda number, _: number < of_fma)
    assert np.isclose(fma.value / mul.value, 0.5, rtol=0.05)
    with pytest.raises(Refused, match=r"one after the other are 0\.5\d? times each other, in turns (1\.0|0\.9)"):
        rates.against_multiply(meter, fma, mul)


def test_rates_of_an_earlier_run_are_compared_as_they_are():
    _, fma, mul = both(lambda *_: False)
    assert rates.against_multiply(Meter(Shared(lambda *_: True)), fma, mul).value == pytest.approx(1, rel=0.03)


class Turbo(Simulated):
    """A processor at 4 GHz that states 2.6, with sums of integers each cycle, or so many times as often."""

    def __init__(self, cycles):
        parts = {FMA: 4, ("add", "int32"): cycles, ("mul", "int32"): cycles}
        super().__init__(replace(HIDDEN, clock=4e9, latencies=parts, rates=dict.fromkeys(parts, 64)))

    @property
    def limits(self):
        return replace(super().limits, clock_hz=2.6e9)


def test_a_sum_of_integers_takes_a_cycle_of_a_clock_that_is_not_stated():
    found = rates.latency(Meter(Turbo(1)), "add", "int32")
    assert found.value == pytest.approx(0.25e-9, rel=0.01)
    assert bounds.checked(found, Turbo(1).limits) == found


def test_nothing_takes_less_and_only_sums_take_no_more():
    for cycles, operation in ((1, "mul"), (0.5, "add")):
        with pytest.raises(Refused, match="steps were put together"):
            rates.latency(Meter(Turbo(cycles)), operation, "int32")
