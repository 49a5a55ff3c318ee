"""The analysis finds what simulated GPUs hide, from their times alone, and says so where it cannot."""

import ast
import math
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from npulab.errors import CapacityError, DeviceError, UnsupportedError
from npulab.gpu import analysis
from npulab.gpu.analysis import conclude, registers
from npulab.gpu.analysis.caches import hierarchy
from npulab.gpu.analysis.chase import Chase
from npulab.gpu.analysis.cliffs import cliff, rising
from npulab.gpu.analysis.curve import found_in
from npulab.gpu.analysis.fit import fit, round_sizes
from npulab.gpu.analysis.kept import Before, missed, overfilled
from npulab.gpu.analysis.latency import in_pieces, latency
from npulab.gpu.analysis.meter import Meter, Refused
from npulab.gpu.analysis.rates import memory_bandwidth
from npulab.gpu.analysis.registers import explain
from npulab.gpu.analysis.statistics import estimate, jump
from npulab.gpu.bounds import times_objection
from npulab.gpu.simulated import Cache, Hidden, Simulated, Translation, hit_rate, hits, random_hidden
from npulab.gpu.types import Timing
from scripts import loaded

QUIET = Hidden(
    warp=32, cores=4, max_threads=1024, register_file=128 << 10, register_grain=8,
    caches=(Cache(24 << 10, 64, 30, 512), Cache(3 << 19, 64, 90, 150, "random")), clock=1e9,
    rates={("fma", "float32"): 64, ("mul", "float32"): 64, ("add", "float32"): 64, ("special", "float32"): 16,
           ("fma", "int8x4"): 256},
    latencies={("fma", "float32"): 4, ("mul", "float32"): 4, ("add", "float32"): 4, ("special", "float32"): 20,
               ("fma", "int8x4"): 4},
    local_banks=32, memory_latency=300e-9, memory_bandwidth=30e9, write_share=0.8, launch=20e-6, barrier=50e-9,
    transfer_start=10e-6, transfer_bandwidth=8e9)


def named(found):
    return {q.name: q for q in found}


def wrong_rows(hidden, seed):
    with loaded("bench/gpu_recovery.py") as program:
        rows = list(program.compare(hidden, seed))
    assert len(rows) > 25
    return [(r.name, r.want, r.got, r.why) for r in rows if not r.right]


@pytest.mark.parametrize("seed", [34, 12083, 12135, 12146, 20102, 30578, 70125, 80157, 83066, 90493, 97540, 99081,
                                  108106, 108121])
def test_a_random_machine_is_recovered(seed):
    """Those are drawn with noise, disturbed repetitions, coarse timers and clocks that fall. 12083: loads beside
    small pages. 12135: the clock falls while a cliff is looked for. 12146: a disturbed repetition among ticks. 20102:
    three caches that replace at random, and the clock falls. 30578: a buffer of translations that ends within a cache.
    70125: a stream through memory comes to wait for the cores. 80157: 16 pages of 4 KiB end between two caches.
    83066: translation takes more and more beyond lines so few that the cache holds them, as behind a prefetcher.
    90493: the plateau between two caches that replace at random is found late, beyond the second. 97540: the first of
    memory's references is disturbed. 99081: the clock falls between a cliff and a look at both of its sides. 108106: of
    two tries of a level's narrow loads the one that scattered less was 3 % off. 108121: every second line of memory is
    asked for, and the last cache keeps twice as much of it."""
    assert wrong_rows(random_hidden(seed), seed) == []


def test_a_quiet_machine_is_recovered():
    assert wrong_rows(QUIET, 0) == []


def test_drawn_machines_are_of_all_kinds():
    drawn = [random_hidden(seed) for seed in range(200)]
    assert {h.warp for h in drawn} == {8, 16, 32, 64, 128}
    assert {len(h.caches) for h in drawn} == {1, 2, 3}
    assert {c.replacement for h in drawn for c in h.caches} == {"lru", "random"}
    assert {c.line for h in drawn for c in h.caches} == {32, 64, 128, 256}
    assert sum(h.throttle_to < 1 for h in drawn) > 50
    assert sum(c.size & (c.size - 1) > 0 for h in drawn for c in h.caches) > 50
    assert max(h.jitter for h in drawn) > 0.015
    assert max(h.outliers for h in drawn) > 0.05
    pages = [h for h in drawn if h.translation]
    assert {h.translation.page for h in pages} == {1 << 12, 1 << 16, 1 << 21}
    assert not any(h.translation.entries * h.translation.page == c.size for h in pages for c in h.caches)


def test_the_same_seed_gives_the_same_findings():
    assert conclude(Simulated(random_hidden(3), 5), quick=True) == conclude(Simulated(random_hidden(3), 5), quick=True)


# what the simulation says, against exact caches

def chased(lines, capacity, places, replacement, seed=0, rounds=12):
    """Hits of a random cycle through all places, in a cache that is simulated access by access."""
    r = np.random.default_rng(seed)
    order = (r.permutation(lines * places) // places).tolist()
    held, slots, hits, steps = OrderedDict(), [], 0, 0
    for turn in range(rounds):
        for line in order:
            if line in held:
                hits += turn > rounds // 2
                if replacement == "lru":
                    held.move_to_end(line)
            elif replacement == "lru":
                held[line] = None
                if len(held) > capacity:
                    held.popitem(last=False)
            elif len(slots) < capacity:
                held[line] = None
                slots.append(line)
            else:
                i = int(r.integers(capacity))
                del held[slots[i]]
                slots[i], held[line] = line, None
            steps += turn > rounds // 2
    return hits / steps


@pytest.mark.parametrize("replacement", ["lru", "random"])
@pytest.mark.parametrize("places", [1, 2, 4])
@pytest.mark.parametrize("over", [1.0, 1.1, 2.0])
def test_hit_rates_are_those_of_a_cache(replacement, places, over):
    capacity = 1024
    lines = int(over * capacity)
    got = np.mean([chased(lines, capacity, places, replacement, s) for s in range(2)])
    assert hit_rate(lines, capacity, places, replacement) == pytest.approx(got, abs=0.015)


def chased_in_pieces(lines, capacity, places, piece, replacement):
    """As `chased`, all places of `piece` lines before those of others."""
    r = np.random.default_rng(1)
    order = np.concatenate([(np.arange(p * piece * places, (p + 1) * piece * places))[r.permutation(piece * places)]
                            for p in r.permutation(lines // piece)]) // places
    held, slots, hit, steps = OrderedDict(), [], 0, 0
    for turn in range(10):
        for line in order.tolist():
            if line in held:
                hit += turn > 4
                if replacement == "lru":
                    held.move_to_end(line)
            elif replacement == "lru" or len(slots) < capacity:
                held[line] = None
                slots.append(line)
                if replacement == "lru" and len(held) > capacity:
                    held.popitem(last=False)
            else:
                i = int(r.integers(capacity))
                del held[slots[i]]
                slots[i], held[line] = line, None
            steps += turn > 4
    return hit / steps


@pytest.mark.parametrize("replacement", ["lru", "random"])
@pytest.mark.parametrize("places", [1, 2, 4])
@pytest.mark.parametrize(("capacity", "piece"), [(512, 128), (512, 1024)])
def test_hit_rates_of_chases_in_pieces_are_those_of_a_cache(replacement, places, capacity, piece):
    got = chased_in_pieces(2048, capacity, places, piece, replacement)
    assert hit_rate(2048, capacity, places, replacement, piece) == pytest.approx(got, abs=0.03)


@pytest.mark.parametrize("ways", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("more", [0, 1, 20, 64, 300])
def test_sets_miss_as_they_do_access_by_access(ways, more):
    """256 sets; and the analysis has its own formula for it."""
    cache, lines = Cache(256 * ways * 64, 64, 1, 1, "lru", ways), 256 * ways + more
    held, missed_, order = [OrderedDict() for _ in range(256)], 0, np.random.default_rng(0).permutation(lines).tolist()
    for turn in range(3):
        for line in order:
            found = held[line % 256]
            missed_ += turn == 2 and line not in found
            found[line] = None
            found.move_to_end(line)
            if len(found) > ways:
                found.popitem(last=False)
    assert 1 - hits(cache, lines, 64) == pytest.approx(missed_ / lines, abs=1e-12)
    if more <= 256:
        assert overfilled(np.array([lines / (256 * ways)]), ways)[0] == pytest.approx(missed_ / lines, abs=1e-12)


def test_the_analysis_knows_random_replacement_by_itself():
    for over in (1.0, 1.05, 1.5, 3.0, 8.0):
        assert missed(over) == pytest.approx(1 - hit_rate(over * 1e4, 1e4, 1, "random"), abs=1e-9)
    assert missed(2.0) == pytest.approx(0.7968121300200199, abs=1e-9)  # the giant component of a random graph


def test_the_analysis_sees_nothing_but_a_bench():
    for path in Path(analysis.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("simulated" in n for n in names), path
            assert not (isinstance(node, ast.Attribute) and node.attr in ("_h", "_busy", "__dict__")), path


# what disturbs caches

@pytest.mark.parametrize("ways", [2, 16])
def test_caches_of_sets_are_found_to_the_line(ways):
    """The cliff is a ramp, from the size on."""
    sets = replace(QUIET, caches=(Cache(32 << 10, 64, 30, 512, "lru", ways), Cache(1 << 20, 64, 90, 150, "lru", ways)),
                   jitter=0.005)
    assert wrong_rows(sets, 0) == []


@pytest.mark.parametrize(("entries", "page"), [(32, 1 << 12)])
def test_translation_of_addresses_is_taken_for_no_cache(entries, page):
    slow = replace(QUIET, translation=Translation(entries, page, 120), jitter=0.003)
    assert wrong_rows(slow, 0) == []
    found = named(conclude(Simulated(slow, 0)))
    assert ("translation of addresses" in found["memory latency"].why) == (entries * page < 1 << 24)


@pytest.mark.parametrize(("line", "shape"), [(64, "lru"), (128, "lru"), (128, "random")])
def test_what_translation_takes_of_a_chase_in_pieces_is_taken_off(line, shape):
    """A miss a page of 4 KiB: 120 cycles for 32 lines of 128 bytes."""
    slow = replace(QUIET, caches=(Cache(16 << 10, line, 30, 512, shape), Cache(1 << 20, line, 60, 150)),
                   translation=Translation(16, 1 << 12, 120))
    chase = Chase(Meter(Simulated(slow, 0)))
    first = Before(16 << 10, line, 30e-9, "random" if shape == "random" else "step", None)
    assert chase.precisely(700 << 10, line).value == pytest.approx(1e-9 * (60 + 120 * line / 4096), rel=0.005)
    assert in_pieces(chase, 700 << 10, line, first).value == pytest.approx(60e-9, rel=0.003)
    far = replace(slow, translation=Translation(512, 1 << 12, 120))  # reaches all of it
    assert in_pieces(Chase(Meter(Simulated(far, 0))), 700 << 10, line, first).value == pytest.approx(60e-9, rel=0.003)


def test_a_prefetcher_of_pairs_is_not_taken_for_translation():
    """Two lines a miss: a load twice as far takes longer, four times as far no longer still."""
    class Pairs(Simulated):
        def chase_pieces(self, footprint, stride, piece):
            t = super().chase_pieces(footprint, stride, piece)
            return replace(t, seconds=tuple(s * (0.7 if stride == 64 else 1.0) for s in t.seconds))

    plain = replace(QUIET, caches=(Cache(16 << 10, 64, 30, 512), Cache(1 << 20, 64, 60, 150)))
    first = Before(16 << 10, 64, 30e-9, "step", None)
    assert in_pieces(Chase(Meter(Pairs(plain, 0))), 700 << 10, 64, first).value == pytest.approx(42e-9, rel=0.003)


def test_what_a_level_keeps_depends_on_its_shape():
    def level(shape):
        return Before(1 << 16, 64, 1e-8, shape, None)

    assert level("step").kept(1024, 64) is None
    assert (level("step").kept(900, 64), level("step").kept(900, 128), level("step").kept(1100, 64)) == (1, 1, 0)
    assert (level("ramp").kept(900, 64), level("ramp").kept(900, 128), level("ramp").kept(1100, 64)) == (1, 0, None)
    assert level("random").kept(2048, 128) == pytest.approx(1 - missed(2.0))
    assert (level("gradual").kept(900, 64), level("gradual").kept(2048, 64), level("gradual").kept(4096, 64)) == (
        None, None, 0)


def test_a_disturbed_repetition_is_no_tick():
    assert times_objection((24e-6,) * 8 + (65e-6,)) == ""
    assert "ticks of 0.001 s are too coarse" in times_objection((0.0,) * 5 + (1e-3,) * 4)


def test_times_between_two_ticks_are_their_mean():
    """3.5 ticks, 6 % disturbed: not far enough from the median to be told by its deviation, which is a tick or none."""
    r, errors = np.random.default_rng(0), []
    for _ in range(40):
        took = np.full(360, 3.5) * np.where(r.random(360) < 0.06, 1.1 + r.exponential(0.7, 360), 1.0)
        errors.append(estimate(np.floor(r.random(360) + took)).value / 3.5 - 1)
    assert abs(np.mean(errors)) < 0.012
    assert max(np.abs(errors)) < 0.03


def test_without_chases_in_pieces_the_others_do():
    class Plain(Simulated):
        chase_pieces = None

    found = named(conclude(Plain(QUIET, 0)))
    assert (found["L1 size"].value, found["L2 size"].value) == (24 << 10, 3 << 19)
    assert not latency(Chase(Meter(Plain(QUIET, 0))), 1 << 14, 64)[1]


def by_colours(footprint, size, ways, low, high):
    """Time where pages of 4 KiB fall on the parts of a cache at random: those parts miss that got more than fit."""
    k = footprint / size * ways  # pages that a part gets, by Poisson's law; all of those in one with too many miss
    m = 1 - sum(math.exp(-k) * k**i / math.factorial(i) for i in range(ways))
    return low + m * (high - low)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_gradual_cliffs_are_found_within_half_an_octave(noise):
    """A processor behind a bench: 48 KiB, 1.25 MiB of 20 ways that pages fall on at random, 4 MiB behind it."""
    r = np.random.default_rng(3)
    footprints = [int(1024 * 2 ** (i / 4)) // 64 * 64 for i in range(64)]

    def time(f):
        t = 1.5 if f <= 48 << 10 else by_colours(f, 1.25 * 2**20, 20, 4.1, 14.5)
        t += (by_colours(f, 5 << 20, 12, 0, 30) if f > 2 << 20 else 0)
        return 1e-9 * t * math.exp(noise * abs(r.standard_normal()))

    found, fault = found_in(footprints, [time(f) for f in footprints])
    assert fault == ""
    assert len(found) == 3
    for rise, size in zip(found, (48 << 10, 1.25 * 2**20, 5 << 20), strict=True):
        assert rise.cliff.interval[0] < size < rise.cliff.interval[1]
        assert rise.cliff.shape == "gradual"
        assert rise.inside < size < rise.beyond


def test_a_rise_without_end_is_no_cliff():
    footprints = [int(1024 * 2 ** (i / 4)) // 64 * 64 for i in range(64)]
    slope = [1e-9 * min(40, max(1, (f / 16384) ** 0.4)) for f in footprints]
    found, fault = found_in(footprints, slope)
    assert not found
    assert fault.endswith("bytes on until the largest footprint, 56431552: no plateau")
    footprints = [int(1024 * 2 ** (i / 4)) // 64 * 64 for i in range(80)]
    found, fault = found_in(footprints, [1e-9 * min(40, max(1, (f / 16384) ** 0.4)) for f in footprints])
    assert not found
    assert fault.startswith("no cliff: load time rises from")
    assert found_in(footprints, [1e-9] * 64) == ([], "")


def test_the_nearest_rising_sequence():
    assert rising([1, 2, 3]) == [1, 2, 3]
    assert rising([3, 1, 2, 5, 4]) == [2, 2, 2, 4.5, 4.5]


# benches that have less

class Bare:
    """A bench with the experiments of the protocol and no others."""

    def __init__(self):
        self._bench = Simulated(QUIET, 0)
        self.identity, self.limits = self._bench.identity, self._bench.limits

    def __getattr__(self, name):
        if name in ("chase_pieces", "image", "constant", "local_write", "map"):
            raise AttributeError(name)
        return getattr(self._bench, name)


def test_experiments_that_a_bench_has_not_are_refused_for_it():
    found = named(conclude(Bare()))
    for name, method in (("image bandwidth", "image"), ("constant bandwidth", "constant"), ("map cost", "map"),
                         ("local memory write bandwidth", "local_write")):
        assert found[name].why == f"there is no experiment '{method}' through simulated yet"
    assert sum(q.status == "measured" for q in found.values()) > 40
    assert found["L2 size"].value == 3 << 19


class Boasting(Simulated):
    """States buffers of 1 GiB and has 32 MiB."""

    def _fits(self, footprint):
        if footprint > 32 << 20:
            raise CapacityError("the device has no room for an experiment")

    def chase_pieces(self, footprint, stride, piece):
        self._fits(footprint)
        return super().chase_pieces(footprint, stride, piece)

    def stream(self, footprint, stride, width, way):
        self._fits(footprint * (2 if way == "copy" else 1))
        return super().stream(footprint, stride, width, way)


def test_a_device_with_less_memory_than_it_states_is_asked_for_less():
    found = named(conclude(Boasting(QUIET, 0)))
    assert (found["L1 size"].value, found["L2 size"].value) == (24 << 10, 3 << 19)
    assert found["memory bandwidth"].value == pytest.approx(30, rel=0.03)
    assert found["memory copy bandwidth"].value == pytest.approx(30 / 1.125, rel=0.03)
    assert found["memory latency"].value == pytest.approx(300e-9, rel=0.03)


# statistics

def test_a_mean_survives_outliers_and_ticks():
    r = np.random.default_rng(0)
    values = 5e-6 * np.exp(0.01 * r.standard_normal(99))
    values[::12] *= 3
    assert estimate(list(values)).value == pytest.approx(5e-6, rel=0.004)
    ticks = (np.floor(r.random(99) + 5.1) * 1e-6).tolist()  # 5 or 6 ticks: 5.1 in the mean
    assert estimate(ticks).value == pytest.approx(5.1e-6, rel=0.02)


def test_intervals_hold_the_truth_as_often_as_they_say():
    r = np.random.default_rng(0)
    inside = 0
    for _ in range(1500):
        e = estimate(list(np.exp(0.01 * r.standard_normal(18))))
        inside += e.low <= math.exp(0.01**2 / 2) <= e.high
    assert 0.925 < inside / 1500 < 0.97


@pytest.mark.parametrize(("values", "at"), [
    ([1, 1.02, 2, 2.01], 2), ([1, 1, 1, 1], None), ([1, 1.2, 1.4, 1.6, 1.8], None), ([2, 2, 1, 1], None), ([1, 2], 1),
    ([1, 1.1, 1.25], None)])
def test_jumps(values, at):
    assert jump(values) == at


POINTS = [int(4096 * f) for f in (0.67, 0.85, 0.92, 0.96, 1.0, 1.04, 1.08, 1.13, 1.2, 1.35, 1.5, 1.7, 1.9, 2.25, 2.7)]


def passes(lines, noise, slow, seed=0, end=math.inf):
    """Of a cache of 3500 lines, random replacement: 20 ns, and 60 ns that a falling clock of the cores alone makes
    `slow` times shorter beside them; 2 ns more from `end` lines on."""
    r = np.random.default_rng(seed)
    curve = np.array([missed(n / 3500) for n in lines])
    return [(20e-9 + 60e-9 / s * curve + 2e-9 * (np.array(lines) > end)) * np.exp(noise * r.standard_normal(len(lines)))
            for s in slow]


def test_a_fit_finds_size_and_replacement_at_several_clocks():
    found = fit(POINTS, passes(POINTS, 0.002, (1.0, 1.3, 1.9)), 4096, 64, 0.0)
    assert (found.ways, found.edge) == (0, False)
    assert found.size == pytest.approx(3500, rel=0.005)
    assert found.low < 3500 < found.high
    assert found.noise < 0.004


def test_more_passes_narrow_a_fit_and_a_disturbed_one_does_no_harm():
    one, six = (fit(POINTS, passes(POINTS, 0.004, [1.0] * n), 4096, 64, 0.0) for n in (1, 6))
    assert six.high / six.low - 1 < 0.6 * (one.high / one.low - 1)
    assert six.low < 3500 < six.high
    for seed in range(1, 5):
        bad = passes(POINTS, 0.15, [1.0], seed)
        with_it = fit(POINTS, [*passes(POINTS, 0.004, [1.0] * 6), *bad], 4096, 64, 0.0)
        assert with_it.size == pytest.approx(six.size, rel=0.002)
        assert with_it.noise < 0.006


def test_a_fit_sees_an_end_of_translation_that_is_there_and_no_other():
    """Lines of 64 bytes: a buffer that reaches 256 KiB ends at line 4096."""
    for seed in range(5):
        found = fit(POINTS, passes(POINTS, 0.003, [1.0] * 2, seed, end=4096), 4096, 64, 2e-9)
        assert found.low < 3500 < found.high
        assert found.noise < 0.006
        without = fit(POINTS, passes(POINTS, 0.003, [1.0] * 2, seed), 4096, 64, 2e-9)
        assert without.low < 3500 < without.high
        assert without.size == pytest.approx(3500, rel=0.01)


def test_what_the_level_before_still_answers_is_left_out_of_a_fit():
    """24 KiB of random replacement before 192 KiB of the same: a twelfth of the lines at the first footprints."""
    machine = replace(QUIET, caches=(Cache(24 << 10, 64, 30, 512, "random"), Cache(192 << 10, 128, 90, 150, "random")))
    chase = Chase(Meter(Simulated(machine, 0)))
    first = Before(24 << 10, 64, 30e-9, "random", None)
    found = cliff(chase, 130 << 10, 180 << 10, 1 << 20, 128, before=first)
    assert found.size == 192 << 10
    assert found.interval[1] / found.interval[0] < 1.03
    assert latency(chase, 150 << 10, 128, first)[0].value == pytest.approx(90e-9, rel=0.002)
    assert latency(chase, 150 << 10, 128)[0].value < 0.97 * 90e-9


@pytest.mark.parametrize(("line", "cost"), [(128, 134), (64, 240)])
def test_a_buffer_of_translations_that_the_level_before_hides_at_wide_strides_is_no_cache(line, cost):
    """16 pages of 4 KiB end at 64 KiB; 1024 bytes apart, or 512, the lines of twice that fit the first cache."""
    machine = replace(QUIET, caches=(Cache(16 << 10, line, 20, 512), Cache(256 << 10, line, 32, 225)),
                      translation=Translation(16, 1 << 12, cost), memory_latency=96e-9)
    found = hierarchy(Meter(Simulated(machine, 0)))
    assert [level.size for level in found.levels] == [16 << 10, 256 << 10]


def test_memory_is_not_slower_than_it_is_for_a_stream_that_waits_for_the_cores():
    """Cores at half their clock: a stream through memory takes 1.6 times as long and a load's way through DRAM what
    it took."""
    machine = replace(QUIET, caches=(Cache(24 << 10, 64, 30, 512), Cache(3 << 19, 64, 90, 37.5)), memory_bandwidth=30e9,
                      throttle_after=0.5, throttle_over=0.01, throttle_to=0.5)
    found = hierarchy(Meter(Simulated(machine, 0)))
    assert found.memory.value == pytest.approx(300e-9, rel=0.01)
    assert found.levels[1].latency.value == pytest.approx(90e-9, rel=0.01)


def test_a_cache_that_keeps_some_of_the_reference_of_memory_does_not_change_its_pace():
    """80 MiB of random replacement keep 4.5 % of a stream through 256 MiB, and streams come to wait for the cores."""
    machine = replace(QUIET, caches=(Cache(24 << 10, 64, 30, 512), Cache(80 << 20, 64, 90, 50, "random")),
                      memory_bandwidth=48e9, throttle_after=0.5, throttle_over=0.01, throttle_to=0.5)
    meter = Meter(Simulated(machine, 0))
    for _ in range(200):
        meter.seconds(lambda: meter.bench.chain("fma", "float32", 1, 4, 1), "operations", "alone")
    assert meter.pace() == pytest.approx(2, rel=0.01)
    assert memory_bandwidth(meter, None, "read").value == pytest.approx(48, rel=0.01)


def test_a_reference_of_memory_that_the_device_has_not_is_halved():
    class Small(Simulated):
        def stream(self, footprint, stride, width, way):
            if footprint > 128 << 20:
                raise CapacityError("no such buffer")
            return super().stream(footprint, stride, width, way)

    meter = Meter(Small(QUIET, 0))
    assert "memory" not in meter.faults
    assert meter.pace("memory") == 1


def test_round_sizes():
    assert round_sizes(23000, 25000) == [23 << 10, 24 << 10]
    assert round_sizes(1.55e6, 1.59e6) == [3 << 19]


def test_registers_that_are_given_in_multiples_and_spare_ones_are_seen_through():
    def fit(size, grain, spare, warp=32):
        given = {r: math.ceil((r + spare) / grain) * grain for r in (32, 48, 64, 80, 96, 112, 128)}
        return {r: size // (g * 4 * warp) for r, g in given.items()}

    assert explain(fit(256 << 10, 8, 0), 32)[0] == 256 << 10
    assert explain(fit(96 << 10, 1, 0), 32)[0] == 96 << 10
    assert explain(fit(256 << 10, 8, 5), 32)[0] == 256 << 10
    assert explain({32: 40, 64: 7, 96: 31}, 32) is None


class Hosted(Simulated):
    """The host's processor, which no level of this machine is quick enough for."""

    @property
    def limits(self):
        return replace(super().limits, processor=True)


def test_a_processor_whose_first_level_is_slow_has_no_first_cache_that_shows():
    """lavapipe and SwiftShader do so much for each load that L1 and L2 do not show: what was left of L3 was L1."""
    found = named(conclude(Hosted(QUIET, 0), quick=True))
    assert found["L1 size"].status == "refused"
    assert re.fullmatch(r"the first level that shows takes [\d.]+ ns a load, a processor's first cache at most 5: .*",
                        found["L1 size"].why)
    assert found["memory latency"].status == "measured"
    assert not {"L1 line", "L1 latency", "L2 size"} & found.keys()
    assert found["memory bandwidth"].status == "measured"


def test_more_registers_never_make_room_for_more_threads(monkeypatch):
    """Seen on a processor, whose times said 1 or 2 by chance, and taken for a register file of 9 KiB."""
    seen = dict(zip(registers.COUNTS, (1, 1, 2, 2, 2, 2, 1, 1), strict=True))
    monkeypatch.setattr(registers, "_resident", lambda meter, count, warp: seen[count])
    meter = SimpleNamespace(quick=False)
    with pytest.raises(Refused, match="more threads fit at once with more registers each: 16 with 16, 16 with 32, 32"):
        registers.registers(meter, 16)
    seen.update(dict(zip(registers.COUNTS, (64, 64, 42, 32, 25, 21, 18, 32), strict=True)))  # the largest was spilled
    assert registers.registers(meter, 32)[1].value == 256 << 10


# clocks that fall, benches that lie

@pytest.mark.parametrize("memory", [False, True])
def test_throttling_is_seen_and_taken_out(memory):
    hot = replace(QUIET, throttle_after=1.0, throttle_over=0.3, throttle_to=0.6, jitter=0.005, memory_throttles=memory)
    assert wrong_rows(hot, 0) == []
    q = named(conclude(Simulated(hot, 0)))["lowest clock"]
    assert q.value == pytest.approx(0.6, rel=0.03)
    assert q.why.startswith("throttling: a reference chain came to take 1.6")
    still = named(conclude(Simulated(QUIET, 0), quick=True))["lowest clock"]
    assert still.value == 1.0
    assert "throttling" not in still.why


class Lying:
    """A bench that does as a simulated one but for one experiment, or all."""

    def __init__(self, lie, methods=()):
        self._bench, self._lie, self._methods = Simulated(replace(QUIET, jitter=0.005), 0), lie, methods
        self.identity, self.limits = self._bench.identity, self._bench.limits

    def __getattr__(self, name):
        true = getattr(self._bench, name)
        return (lambda *a: self._lie(true(*a))) if not self._methods or name in self._methods else true


def raises(error):
    def lie(_):
        raise error
    return lie


METHODS = ("chase", "stream", "chain", "diverge", "hold", "local", "launch", "barrier", "transfer")
LIES = {
    "wrong": (lambda t: replace(t, wrong="the sum is 3, not 4"), "the sum is 3, not 4"),
    "zero": (lambda t: replace(t, seconds=(0.0,) * 9), "the experiment's times are not times: 0, 0, 0"),
    "nan": (lambda t: replace(t, seconds=(math.nan,) * 9), "the experiment's times are not times: nan, nan, nan"),
    "negative": (lambda t: replace(t, seconds=(-1.0, *t.seconds)), "the experiment's times are not times: -1, "),
    "infinite": (lambda t: replace(t, seconds=(math.inf,)), "the experiment's times are not times: inf"),
    "none": (lambda t: Timing(()), ""),
    "no work": (lambda t: replace(t, work={}), "the experiment did not say how many"),
    "unsupported": (raises(UnsupportedError("no such thing here", got="x")), "no such thing here"),
    "lost": (raises(DeviceError("the device is lost")), "the device is lost"),
}


@pytest.mark.parametrize("lie", LIES)
def test_of_a_bench_that_lies_nothing_is_believed(lie):
    change, why = LIES[lie]
    found = conclude(Lying(change), quick=True)
    measured = {q.name for q in found if q.status == "measured"}
    assert measured <= ({"launch cost", "map cost"} if lie == "no work" else set()) | (
        {"transfer to device cost", "transfer to device bandwidth", "transfer from device cost",
         "transfer from device bandwidth"} if lie == "no work" else set())
    refused = [q for q in found if q.status == "refused"]
    assert all(q.value is None and q.interval is None and q.why for q in refused)
    assert sum(why in q.why for q in refused) > 12


@pytest.mark.parametrize("method", METHODS)
def test_what_one_experiment_lies_about_does_not_touch_the_others(method):
    found = named(conclude(Lying(lambda t: replace(t, wrong="a wrong result"), (method,)), quick=True))
    refused = {n for n, q in found.items() if q.status == "refused"}
    want = {"chase": {"L1 size"}, "diverge": {"warp width", "register file"}, "hold": {"register file"},
            "local": {"local memory banks", "local memory bandwidth"}, "launch": {"launch cost"},
            "barrier": {"barrier cost"}, "transfer": {"transfer to device bandwidth", "transfer from device bandwidth"}}
    if method in want:
        assert refused == want[method]
    else:
        assert len([q for q in found.values() if q.status == "measured"]) >= 8
        assert all("a wrong result" in found[n].why for n in refused)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_a_device_whose_times_say_nothing_is_refused(sigma):
    """Flat or pure noise, as a processor behind the bench may be: nothing made up of it, and it ends."""
    r = np.random.default_rng(0)
    noise = lambda t: replace(t, seconds=tuple(1e-3 * np.exp(sigma * r.standard_normal(9))),  # noqa: E731
                              work={"operations": 1e6, "loads": 1e6, "bytes": 1e6, "barriers": 1e3})
    found = named(conclude(Lying(noise), quick=True))
    for name in ("warp width", "register file", "local memory banks", "L1 size"):
        assert found[name].status == "refused", found[name]
    assert "no step" in found["warp width"].why
    assert not any(n.startswith("L1 ") and q.status == "measured" for n, q in found.items())


def test_an_objection_now_and_then_is_asked_again():
    """As on a busy machine, where a check of times fails once."""
    r = np.random.default_rng(0)
    some = Lying(lambda t: replace(t, doubtful="busy" if r.random() < 0.05 else ""))
    assert sum(q.status == "refused" for q in conclude(some)) <= 2
    often = Lying(lambda t: replace(t, doubtful="busy" if r.random() < 0.9 else ""))
    assert sum(q.status == "measured" for q in conclude(often, quick=True)) <= 4


def test_a_wrong_result_is_refused_at_once():
    """Not asked for until it happens to be right."""
    asked = []

    def once(t):
        asked.append(t)
        return replace(t, wrong="the sum is 3, not 4" if len(asked) == 1 else "")

    meter = Meter(Lying(once, ("diverge",)), quick=True)
    with pytest.raises(Refused, match="the sum is 3, not 4"):
        meter.seconds(lambda: meter.bench.diverge(1))
    assert len(asked) == 1


def test_experiments_are_bounded():
    meter = Meter(Simulated(QUIET, 0), quick=True)
    asked = meter.experiments
    for _ in range(2000 - asked):
        meter.seconds(meter.bench.launch, kind="host")
    with pytest.raises(Refused, match="measuring takes too long: 2001 experiments"):
        meter.seconds(meter.bench.launch, kind="host")
    assert 0 < asked < 20


def test_progress_goes_forward():
    seen = []
    conclude(Simulated(QUIET, 0), lambda what, share: seen.append((what, share)), quick=True)
    shares = [s for _, s in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert seen[0][0] == "warp width"
    assert seen[-1][0] == "done"


def test_an_interrupted_run_goes_on_and_ends_with_the_same_findings():
    batches = []
    whole = conclude(Simulated(random_hidden(3), 3), keep=lambda made: batches.append(list(made)), quick=True)
    assert [q for batch in batches for q in batch] == whole
    for cut in (1, len(batches) // 2):
        half, told = [q for batch in batches[:cut] for q in batch], []
        again = conclude(Simulated(random_hidden(3), 3), lambda name, _, told=told: told.append(name), True, half)
        assert again[: len(half)] == half
        assert [q.name for q in again] == [q.name for q in whole]
        assert not {q.name for q in half} & set(told)


class Overcounting(Simulated):
    """Says that it did 64 times the operations, as where a compiler put steps together."""

    @property
    def limits(self):
        return replace(super().limits, clock_hz=1e9)

    def chain(self, *arguments):
        t = super().chain(*arguments)
        return replace(t, work={"operations": 64 * t.work["operations"]})


def test_more_than_a_step_a_cycle_is_refused():
    found = {q.name: q for q in conclude(Overcounting(random_hidden(3), 3), quick=True)}
    for name in ("fma float32 rate", "fma float32 latency"):
        assert found[name].status == "refused"
        assert "cycles of the stated 1 GHz: steps were put together, or not done" in found[name].why
    assert found["warp width"].status == found["L1 size"].status == "measured"


def test_bandwidths_of_known_levels_are_found_or_refused():
    """Another process went on: sizes are known, but what bandwidths need of them is not."""
    before = conclude(Simulated(QUIET, 0))
    names = [q.name for q in before]
    assert names.index("L2 write bandwidth") < names.index("memory bandwidth")
    known = [q for q in before[:names.index("L1 bandwidth")] if q.name != "warp width"]
    again = named(conclude(Simulated(QUIET, 1), quick=True, known=known))
    assert again["L2 bandwidth"].value == pytest.approx(named(before)["L2 bandwidth"].value, rel=0.03)

    class Lost(Simulated):
        def chase(self, *_):
            raise DeviceError("the device is lost")

        chase_pieces = chase

    lost = named(conclude(Lost(QUIET, 1), quick=True, known=known))
    for name in ("L1 bandwidth", "L2 bandwidth"):
        assert lost[name].why == ("needs the caches, whose levels were not found again: the level after 1024 bytes: "
                                  "the device is lost")
    assert lost["memory bandwidth"].status == "measured"
