"""The last cache where neighbours use it, too: a processor written out, whose chases lose to them what reads keep."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from npulab.gpu.analysis import caches, shared
from npulab.gpu.analysis.chase import PIECE
from npulab.gpu.analysis.meter import Meter, Objection, Refused
from npulab.gpu.types import Limits, Timing

L1, L2, L3 = 48 << 10, 1 << 20, 32 << 20
NS = 1e-9


class Shared:
    """L1 and L2 of its own, 1.4 and 4.2 ns; neighbours read `taken` bytes a second through L3 of 14 ns; memory 145."""

    identity = SimpleNamespace(api="written out")
    limits = Limits(2, 256, 1 << 14, 1 << 31, frozenset(("float32",)))

    def __init__(self, taken=12e9, last=L3, seed=0):
        self.taken, self.last, self.r = taken, last, np.random.default_rng(seed)

    def chain(self, *_):
        return Timing((1e-3,) * 9, {"operations": 1e6})

    def stream(self, *_):
        return Timing((1e-3,) * 9, {"bytes": 40e6})

    def held(self, speed):
        return self.last * speed / (speed + self.taken * self.r.uniform(0.7, 1.3))

    def chase_pieces(self, footprint, stride, piece):
        speed = 64 / (14 * NS) if footprint < self.held(64 / (14 * NS)) else 64 / (145 * NS)
        found = 1.4
        for size, ns in ((L1, 4.2), (L2, 14.0), (self.held(speed), 145.0)):  # gradual: pages fall on sets at random
            found += (ns - found) / (1 + math.exp(-9 * math.log2(footprint / size / 1.1)))
        return self.timing(found)

    chase = staticmethod(lambda *_: None)

    def primed(self, footprint, behind):
        there = max(0.0, min(footprint, self.held(45e9) - behind)) / footprint
        return self.timing(14 + (145 - 14) * (1 - there))

    def timing(self, ns):
        return Timing(tuple(ns * NS * 1e6 * self.r.normal(1, 0.01, 9)), {"loads": 1e6})


def whole(bench, quick=False):
    return shared.held(caches.Chase(Meter(bench, quick)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("quick", [False, True])
def test_what_is_read_at_once_keeps_most_of_a_cache(seed, quick):
    found = whole(Shared(seed=seed), quick)
    assert 0.75 * L3 < found.cliff.size < 1.1 * L3
    assert found.cliff.interval[0] < L3 < found.cliff.interval[1]
    assert (found.seconds, found.memory.value) == (pytest.approx(14 * NS, rel=0.05), pytest.approx(145 * NS, rel=0.02))


def test_a_cache_without_neighbours_is_all_there():
    assert whole(Shared(taken=0.0)).cliff.size == pytest.approx(L3, rel=0.05)


def test_a_cache_that_is_larger_than_what_is_read_is_refused():
    with pytest.raises(Refused, match="no footprint is large enough"):
        whole(Shared(0.0, 64 << 20), quick=True)
    assert whole(Shared(0.0, 64 << 20)).cliff.size == pytest.approx(64 << 20, rel=0.05)


def test_no_cache_is_refused():
    with pytest.raises(Refused, match=r"loads of what all threads have read take .* no cache"):
        whole(Shared(0.0, 1))
    with pytest.raises(Refused, match="too few footprints"):
        shared.concluded([])


def test_a_footprint_that_cannot_be_timed_is_left_out(monkeypatch):
    real = shared._loads

    def loads(chase, footprint, behind):
        if footprint == 1 << 25:
            raise Objection("the clock moved")
        return real(chase, footprint, behind)

    monkeypatch.setattr(shared, "_loads", loads)
    assert 0.7 * L3 < whole(Shared()).cliff.size < 1.1 * L3


@pytest.mark.parametrize("seed", range(3))
def test_a_processor_in_a_crowd_has_its_three_levels(monkeypatch, seed):
    """By chases alone its third is less than half of what it is."""
    monkeypatch.setattr(Shared, "chase", lambda self, footprint, stride: self.chase_pieces(footprint, stride, 0))
    found = caches.hierarchy(Meter(Shared(seed=seed), quick=True))
    assert all(abs(2 * math.log2(x.size / size)) < 1 for x, size in zip(found.levels, (L1, L2, L3), strict=True))
    assert found.fault == ""
    assert found.memory.value == pytest.approx(145 * NS, rel=0.02)
    assert found.levels[2].latency.value == pytest.approx(14 * NS, rel=0.1)
    monkeypatch.setattr(caches, "held", lambda *_: (_ for _ in ()).throw(Refused("not asked")))
    alone = caches.hierarchy(Meter(Shared(seed=seed), quick=True))
    assert len(alone.levels) < 3 or alone.levels[2].size < 0.6 * L3


def test_a_level_that_was_seen_as_one_with_the_next_is_narrowed():
    """Neighbours took nearly all: chases go from L2 to memory."""
    bench = Shared(taken=0.0)
    chase = caches.Chase(Meter(bench))
    level = caches.Level(caches.Cliff(2 << 20, None, "gradual", ""), 64, caches.Estimate(*(4.2 * NS,) * 3), "")
    last = shared.Held(caches.Cliff(L3, None, "gradual", ""), 14 * NS, caches.Estimate(*(145 * NS,) * 3))
    assert caches._narrowed(chase, level, last).size == pytest.approx(1.1 * L2, rel=0.1)
    short = caches.replace(level, cliff=caches.Cliff(L2, None, "gradual", ""))
    assert caches._narrowed(chase, short, last).size == L2


class Prefetching:
    """Lines of 64 bytes of a cache of 48 KiB; a prefetcher brings neighbours in pieces of less than 32 KiB, most of all
    where they are 128 bytes apart."""

    pieces, largest = True, 1 << 24
    meter = SimpleNamespace(pace=lambda: 1.0)

    def __init__(self, least):
        self.least, self.asked = least, []

    def again(self, footprint, stride, calls=1, piece=PIECE):
        if footprint <= L1:
            return 1.4 * NS
        self.asked.append(piece)
        missed = min(1.0, stride / 64)
        if piece < self.least:
            missed *= {64: 0.5, 128: 0.35, 256: 0.55}.get(stride, 1.0)
        return (1.4 + 2.8 * missed) * NS


def test_a_prefetcher_in_small_pieces_makes_no_line_longer():
    chase = Prefetching(1 << 15)
    assert caches._line(chase, 84992, 29926, 32)[0] == 64
    assert max(chase.asked) > 1 << 15
    still = Prefetching(0)
    assert caches._line(still, 84992, 29926, 32)[0] == 64
    assert max(still.asked) < 1 << 15  # without one the first pieces are the last


@pytest.mark.parametrize(("came", "want"), [([64, 64], 64), ([128, 64, 64], 64), ([64, 128, 512, 128, 128], 128)])
def test_a_line_is_what_comes_twice_in_a_row(monkeypatch, came, want):
    """Once in twelve a neighbour made 128 or 512 bytes of 64."""
    each = iter(came)
    monkeypatch.setattr(caches, "_line_once", lambda *_: (next(each), 0.0))
    assert caches._line(None, 84992, 29926, 32) == (want, 0.0)
    assert list(each) == []


def test_a_line_that_never_comes_twice_is_refused(monkeypatch):
    each = itertools.cycle([64, 128, 256])
    monkeypatch.setattr(caches, "_line_once", lambda *_: (next(each), 0.0))
    with pytest.raises(Refused, match="does not come out the same twice: 64, then 128 bytes"):
        caches._line(None, 84992, 29926, 32)
