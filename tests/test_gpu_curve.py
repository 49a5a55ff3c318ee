"""The curve of a load's time over footprints, by chases written out; the chase in C that stands beside it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from npulab.gpu.analysis import curve
from npulab.gpu.analysis.meter import Objection
from scripts import loaded


@pytest.fixture(scope="module")
def bench():
    with loaded("bench/gpu_caches.py") as program:
        yield program


class Curved:
    """A chase with cliffs, {bytes: seconds beyond}; each try is longer by what `more(footprint, piece)` says."""

    largest = 1 << 24
    pieces = True

    def __init__(self, cliffs, more=lambda footprint, piece: 0.0):
        self.cliffs, self.more = cliffs, more
        self.meter = SimpleNamespace(quick=False)

    def again(self, footprint, line, calls, piece):
        beyond = [s for at, s in self.cliffs.items() if footprint > at]
        return (beyond[-1] if beyond else 2e-9) + self.more(footprint, piece)


class Doubted(Curved):
    """One cliff at 32 KiB, and some tries cannot be timed."""

    def __init__(self, every):
        super().__init__({1 << 15: 5e-9})
        self.every, self.asked = every, 0

    def again(self, footprint, line, calls, piece):
        self.asked += 1
        if self.asked % self.every == 0:
            raise Objection("the clock moved")
        return super().again(footprint, line, calls, piece)


def test_a_curve_may_lack_some_footprints():
    """The cliff is where it is seen with all of them."""
    whole, _ = curve.rises(Doubted(1000), 1 << 10, 32)
    found, fault = curve.rises(Doubted(14), 1 << 10, 32)
    assert ([r.cliff.size for r in found], fault) == ([r.cliff.size for r in whole], "")
    assert [1 << 15 < r.cliff.size < 5 << 13 for r in found] == [True]


def test_a_curve_may_not_lack_many():
    with pytest.raises(Objection, match="the clock moved"):
        curve.rises(Doubted(1), 1 << 10, 32)


@pytest.mark.parametrize("seed", range(5))
def test_a_neighbour_makes_no_cache_smaller(seed):
    """Another program has half of the cache in three of four tries; the least of several is the cache's."""
    r = np.random.default_rng(seed)

    def more(footprint, piece):
        return 10e-9 if r.random() < 0.75 and 640 << 10 < footprint <= 1280 << 10 else 0.0

    chase = Curved({48 << 10: 4e-9, 1280 << 10: 14e-9}, more)
    found, fault = curve.rises(chase, 1 << 10, 64)
    assert fault == ""
    assert [round(2 * math.log2(x.cliff.size / size)) for x, size in zip(found, (48 << 10, 1280 << 10), strict=True)
            ] == [0, 0]
    footprints = [int(1024 * 2 ** (i / 4)) for i in range(56)]
    spoiled, _ = curve.found_in(footprints, [np.mean([chase.again(f, 64, 1, f) for _ in range(200)])
                                             for f in footprints])
    assert spoiled[-1].cliff.size < 2**-0.5 * (1280 << 10)


def test_what_a_prefetcher_throws_out_in_pieces_stays_at_random():
    def more(footprint, piece):
        return 10e-9 if piece < footprint and 1000 << 10 < footprint <= 1280 << 10 else 0.0

    found, _ = curve.rises(Curved({48 << 10: 4e-9, 1280 << 10: 14e-9}, more), 1 << 10, 64)
    assert found[0].cliff.why.endswith("its middle, half an octave to each side")
    assert 1200 << 10 < found[1].cliff.size < 1500 << 10
    assert "at random through all of it from 4 to 14 ns" in found[1].cliff.why


def test_translation_at_random_moves_no_cliff():
    """At random loads take longer from 256 KiB on, or from where is no cliff in pieces: those are kept."""
    for reach in (256 << 10, 3 << 20):
        def more(footprint, piece, reach=reach):
            return 30e-9 if piece >= footprint > reach else 0.0

        found, _ = curve.rises(Curved({48 << 10: 4e-9, 1280 << 10: 14e-9}, more), 1 << 10, 64)
        plain, _ = curve.rises(Curved({48 << 10: 4e-9, 1280 << 10: 14e-9}), 1 << 10, 64)
        assert [x.cliff.size for x in found] == [x.cliff.size for x in plain]


def between(*plateaus):
    """Times at quarter octaves from 8 KiB on: plateaus (last KiB of them, ns), linear in the logarithms between."""
    at, ns = zip(*plateaus, strict=True)
    footprints = [int(8192 * 2 ** (i / 4)) // 64 * 64 for i in range(48)]
    return footprints, np.exp(np.interp(np.log(footprints), np.log(np.array(at) * 1024), np.log(ns))) * 1e-9


def test_a_level_whose_plateau_the_next_one_tilts_is_one():
    """As L2 and a guest's share of L3 were seen on a processor: 20 % more in half an octave, far less than around."""
    tilted = (8, 1.5), (42, 1.5), (59, 4.2), (700, 4.4), (1450, 13), (2440, 17), (3200, 47), (99999, 47)
    found, fault = curve.found_in(*between(*tilted))
    assert fault == ""
    assert [round(x.cliff.size / 1024) for x in found] == [pytest.approx(s, rel=0.1) for s in (50, 1150, 2600)]
    evenly = (8, 1.5), (42, 1.5), (59, 4.2), (700, 4.4), (2440, 17), (3200, 47), (99999, 47)
    assert len(curve.found_in(*between(*evenly))[0]) == 2


def test_a_ledge_that_is_little_higher_is_no_level():
    found, fault = curve.found_in(*between((8, 1.5), (42, 1.5), (59, 4.2), (900, 4.4), (1344, 13.6), (2688, 13.6),
                                           (3000, 18.4), (5376, 18.4), (7000, 44), (99999, 44)))
    assert fault == ""
    assert [round(x.cliff.size / 1024) for x in found] == [pytest.approx(s, rel=0.1) for s in (50, 1150, 5900)]


def test_a_chase_in_c_leaves_where_it_does(bench):
    """The witness of bench/gpu_caches.py: a rise over several footprints, one that is too small, a disturbed one."""
    times = [1.4] * 6 + [1.5, 4.0] + [4.0, 4.05, 5.9, 4.1] + [6, 9, 13, 14] + [14.1, 14.2]
    left = bench.leavings([(1024 * 2**i, t) for i, t in enumerate(times)])
    assert [(round(math.log2(x / 1024), 1), low, high) for x, low, high in left] == [(6.5, 1.4, 4.0), (13.0, 4.1, 14)]
    assert bench.leavings([(1024 * 2**i, 1.0 + i / 100) for i in range(20)]) == []
    assert bench.steps(905, 1280) == "-1.0"


def test_stated_caches_are_of_data(bench, tmp_path):
    said = ("1", "Data", "48K"), ("1", "Instruction", "32K"), ("3", "Unified", "2M")
    for i, (level, kind, size) in enumerate(said):
        (tmp_path / f"index{i}").mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", "0-1")):
            (tmp_path / f"index{i}" / name).write_text(text + "\n")
    assert bench.stated(tmp_path) == [("L1", 48 << 10, "0-1"), ("L3", 2 << 20, "0-1")]
    assert bench.stated(tmp_path / "none") == []
