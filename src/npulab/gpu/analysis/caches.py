"""Cache levels by pointer chase: where the time of a load leaves one plateau for the next, from small to large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from npulab.errors import CapacityError, NpulabError
from npulab.gpu.analysis.chase import PIECE, Chase
from npulab.gpu.analysis.cliffs import Broad, Cliff, NoRise, cliff
from npulab.gpu.analysis.curve import FLAT, end, rises
from npulab.gpu.analysis.kept import Before
from npulab.gpu.analysis.latency import latency
from npulab.gpu.analysis.meter import STILL, Meter, Refused, reason
from npulab.gpu.analysis.shared import BEHIND, Held, held
from npulab.gpu.analysis.statistics import Estimate

SMALLEST = 1 << 10  # bytes of a footprint
LEAST = 1 << 20  # of the largest: less says nothing of memory
LEVELS = 4
STRIDE = 32  # bytes, no line is shorter
LINE_MAX = 1024  # of places; lines are at most a quarter of it
LINES = 4  # more attempts at a line
STEADY = 6  # attempts at a comparison during which the clock stays
FALSE_ALARMS = 6
RISE = 1.08  # a load that takes so much longer has left its level
DISORDER = 0.08, 0.04  # of a rise and of a load's time, both: loads further apart may take less by that
KEPT = 0.2  # of loads that the level before may answer, and is known to
APART = 1.6  # times a level's latency that the next one's is at least
COARSE = 128  # bytes: the stride from COARSE_FROM on, where all places at smaller strides would take too long to touch
COARSE_FROM = 1 << 25


@dataclass(frozen=True, slots=True)
class Level:
    """latency: seconds of a load, `rests`: what it rests on."""

    cliff: Cliff
    line: int
    latency: Estimate
    rests: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.cliff.size


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """memory: a load that no level holds; None, with the reason in `fault`, if no footprint was large enough."""

    levels: tuple[Level, ...]
    memory: Estimate | None
    fault: str = ""
    rests: str = ""


def hierarchy(meter: Meter) -> Hierarchy:
    """Raises: Refused if there is no plateau at all."""
    chase = Chase(meter)
    levels: list[Level] = []
    whole: Held | None = None
    at, stride, false_alarms = SMALLEST, STRIDE, 0
    while len(levels) < LEVELS:
        flat = None
        try:
            flat = _plateau_end(chase, at, stride)
            if flat is None:
                break
            level, at = _level(chase, flat, at, stride, _before(levels))
        except NoRise as e:
            false_alarms += 1
            if false_alarms > FALSE_ALARMS:
                return _ended(levels, f"the level after {flat} bytes: {e}")
            at = int(flat or at) * 3 // 2
            continue
        except Broad as e:
            whole = _kept(chase)  # first: chases that lose to neighbours may leave no time for it
            fault = _gradual(chase, levels, max(at, int(flat or at) // 4), max(stride, *e.args))
            if levels and whole and _shared(chase, levels, whole):
                fault = ""
            else:
                whole = None
            if fault or not levels:
                return _ended(levels, fault or "no footprint takes longer than a smaller one, for good")
            break
        except CapacityError as e:  # less memory than the device states
            chase.largest //= 2
            if chase.largest < LEAST:
                return _ended(levels, reason(e))
            continue
        except (Refused, NpulabError) as e:
            return _ended(levels, f"the level after {flat or at} bytes: {reason(e)}")
        levels.append(level)
        stride = level.line
    if not levels:
        raise Refused("every footprint takes the same time a load")
    if whole:
        return Hierarchy(tuple(levels), whole.memory, "", f"random loads of what {BEHIND} times as much was read after")
    largest = chase.largest
    if levels[-1].size * 2 > largest:
        return Hierarchy(tuple(levels), None, f"no footprint until {largest} bytes is large enough to miss all caches")
    beyond = min(largest, max(8 * levels[-1].size, 1 << 24))
    try:
        meter.cores_bound = _cores_bound(meter, levels)
        found, less = latency(chase, beyond, levels[-1].line, _before(levels), "memory", levels[-1].latency.value)
        return Hierarchy(tuple(levels), found, "", f"random chase through {beyond} bytes, one thread"
                         + (f"; {less}" if less else ""))
    except (Refused, NpulabError) as e:
        return Hierarchy(tuple(levels), None, reason(e))


def _cores_bound(meter: Meter, levels: list[Level]) -> float:
    """Seconds of a byte that the last level answers; 0 where that is not known, or the cores' clock stayed and it does
    not matter."""
    if abs(meter.pace() - 1) <= STILL:
        return 0.0
    footprint = max(1024, levels[-1].size * 3 // 4096 * 1024)
    try:  # beside the references, which are of the same code
        return meter.seconds(lambda: meter.bench.stream(footprint, 1, 16, "read"), "bytes", "core", 2, 0.005,
                             divided=True).value
    except (Refused, NpulabError):
        return 0.0


def _gradual(chase: Chase, levels: list[Level], start: int, stride: int) -> str:
    """Adds the levels whose cliffs are gradual; what was no cliff."""
    found, fault = rises(chase, start, stride)
    for rise in found[:LEVELS - len(levels)]:
        try:
            line, _ = _line(chase, rise.beyond, rise.inside, stride)
        except (Refused, NpulabError):
            line = levels[-1].line if levels else stride
        try:
            took, less = latency(chase, rise.inside, line, _before(levels))
        except (Refused, NpulabError) as e:
            took = Estimate(rise.seconds, rise.seconds / FLAT, rise.seconds * FLAT)
            less = f"as its plateau in pieces: {reason(e)}"
        levels.append(Level(rise.cliff, line, took, f"random chase through {rise.inside} bytes, one thread"
                            + (f"; {less}" if less else "")))
        stride = line
    return fault


def _kept(chase: Chase) -> Held | None:
    """What all threads read at once leaves in the last level; None if nothing is known of that."""
    try:
        return held(chase)
    except (Refused, NpulabError):
        return None


def _shared(chase: Chase, levels: list[Level], whole: Held) -> bool:
    """The last level as large as what all threads read at once leaves of itself in it, where chases found less or none;
    False if they have found none below memory."""
    try:
        mine = [level for level in levels if level.latency.value * APART < whole.seconds]
        if not mine:
            return False
        last = levels[len(mine)] if levels[len(mine):] else None  # what chases found beyond are parts of it
        if not last:
            mine[-1] = _narrowed(chase, mine[-1], whole)
            inside = int(math.sqrt(2 * mine[-1].size * whole.cliff.size / 2))
            took, less = latency(chase, inside, mine[-1].line, _before(mine))
            last = Level(whole.cliff, mine[-1].line, took, f"random chase through {inside} bytes, one thread"
                         + (f"; {less}" if less else ""))
    except (Refused, NpulabError):
        return False
    if last.latency.value > APART * whole.seconds:  # others had taken what the chase came back to
        took = Estimate(whole.seconds, whole.seconds / FLAT, whole.seconds * FLAT)
        last = replace(last, latency=took, rests="random loads of what all threads have read")
    if whole.cliff.size > max(level.size for level in (last, *levels[len(mine):])):
        last = replace(last, cliff=whole.cliff)
    levels[:] = [*mine, last]
    return True


def _narrowed(chase: Chase, level: Level, whole: Held) -> Level:
    """A level whose cliff chases saw as one with that of the level after it ends where half of its own rise is done."""
    middle = end(chase, level.size, level.line, (level.latency.value + whole.seconds) / 2)
    if middle >= level.size:
        return level
    why = (f"load time rises from {level.latency.value * 1e9:.4g} to {whole.seconds * 1e9:.4g} ns, in chases higher "
           "without a plateau: the middle of the former, half an octave to each side")
    return replace(level, cliff=Cliff(middle, (middle / math.sqrt(2), middle * math.sqrt(2)), "gradual", why))


def _before(levels: list[Level]) -> Before | None:
    if not levels:
        return None
    last = levels[-1]
    return Before(last.size, last.line, last.latency.value, last.cliff.shape, _before(levels[:-1]))


def _ended(levels: list[Level], fault: str) -> Hierarchy:
    if not levels:
        raise Refused(fault)
    return Hierarchy(tuple(levels), None, fault)


def _plateau_end(chase: Chase, start: int, stride: int) -> int | None:
    """The last footprint, in steps of half an octave, before time a load rises for good; None if it never does."""
    if start > chase.largest:
        return None
    fine = chase(start, stride)
    flat, seen = start, [fine]
    footprint = start
    while True:
        footprint = int(footprint * math.sqrt(2)) // 256 * 256
        if footprint > chase.largest:
            return None
        s = max(stride, COARSE) if footprint >= COARSE_FROM else stride
        now, base = chase(footprint, s), float(np.median(seen))
        if now > RISE * base and chase.again(footprint, s, 2) > RISE * base and (
                2 * footprint > chase.largest or chase(footprint * 3 // 2, s) > RISE * base):
            if s == stride:
                return flat
            # a cache that binds no line to a set holds more places where they are further apart than lines
            if chase(footprint, stride) > RISE * fine:
                while flat > start and chase(flat, stride) > RISE * fine:
                    flat = int(flat / math.sqrt(2))
                return flat
            seen, now = [fine], fine
        if now <= RISE * base:
            seen.append(now)
            flat = footprint


def _level(chase: Chase, flat: int, start: int, stride: int, before: Before | None) -> tuple[Level, int]:
    """The level that `flat` bytes still fit in, and the footprint from which the next one's plateau is flat."""
    inside = max(start, int(flat / 1.42))
    line, share = _line(chase, 2 * flat, inside, stride, before)
    low = chase.again(inside, line, 3)
    # the next plateau: where half an octave more changes little, or begins to change more than before
    footprint = 2 * flat
    at, now = footprint, chase(footprint, line)
    previous = math.inf
    while True:
        footprint = int(footprint * math.sqrt(2)) // line * line
        if footprint > chase.largest:
            break
        after = chase(footprint, line)
        rise = after - now
        if rise < 0.02 * (after - low) or rise > previous:
            break
        at, now, previous = footprint, after, max(rise, 0.05 * (after - low))
    if now < 1.05 * low:
        raise NoRise("time a load rose and fell again")
    try:
        found = cliff(chase, inside, flat, at, line, share, before)
    except Broad:
        raise Broad(line) from None
    # a large footprint, of which the level before keeps nothing, or, where this one was seen to begin late, little
    at_most = int(0.85 * found.size)
    if at_most < start < found.size:
        at_most = start
    took, less = latency(chase, at_most, line, before)
    rests = f"random chase through {at_most} bytes, one thread" + (f"; {less}" if less else "")
    return Level(found, line, took, rests), max(at, flat * 2)


def _line(chase: Chase, footprint: int, inside: int, stride: int, level: Before | None = None) -> tuple[int, float]:
    """`_line_once`; of the first level, whose loads a busy machine disturbs most, as it comes out twice in a row.
    Raises: Refused, NoRise."""
    found = _line_once(chase, footprint, inside, stride, level)
    for _ in range(0 if level else LINES):
        before, found = found, _line_once(chase, footprint, inside, stride, level)
        if before[0] == found[0]:
            return found
    if level:
        return found
    raise Refused(f"its line does not come out the same twice: {before[0]}, then {found[0]} bytes")


def _line_once(chase: Chase, footprint: int, inside: int, stride: int, level: Before | None) -> tuple[int, float]:
    """(the smallest distance of places at which no load helps another, seconds of a load at that distance that
    translation takes): until then those in one line do, beyond it a footprint twice the cache has fewer lines than it
    holds (or, where lines are bound to sets, as many a set). `level`, the one before, must not hold them."""
    def kept(footprint: int, stride: int) -> float:
        found = level.kept(footprint // stride, stride) if level else 0.0
        return 1.0 if found is None else found

    # pieces that the cache holds: of a line's places the first misses, once a turn, and the others hit
    piece = min(PIECE, max(inside // 2, 4 * stride))

    def asked(footprint: int, stride: int) -> float:
        t, k = chase.again(footprint, stride, 3, max(piece, 4 * stride)), kept(footprint, stride)
        return (t - k * level.seconds) / (1 - k) if level and k <= KEPT else t

    strides: list[int] = []
    while stride <= min(LINE_MAX, footprint // 16) and (not strides or kept(footprint, stride) <= KEPT):
        strides.append(stride)
        stride *= 2
    if not strides:
        raise Refused("it is smaller than 16 lines")
    far, wide = strides[-2:], footprint
    if level and strides[-1] < LINE_MAX:
        far = [LINE_MAX // 4, LINE_MAX // 2]
        while kept(wide, far[1]) > KEPT and wide < chase.largest // 2:
            wide = wide * 5 // 4
    for _ in range(STEADY):  # they are compared with each other: at one clock, which memory need not share
        before = chase.meter.pace()
        low = chase.again(inside, strides[0], 3)
        times = [asked(footprint, s) for s in strides]
        while chase.pieces and piece < PIECE and _dips(strides, times, low):
            piece = min(PIECE, 2 * piece)
            times = [asked(footprint, s) for s in strides]
        ends = [asked(wide, s) for s in far] if far != strides[-2:] else times[-2:]
        if abs(chase.meter.pace() / before - 1) < 0.02:
            break
    most, slope = max(times), 0.0
    # what grows with the distance beyond any line's end is translation: a miss a page, shared by fewer and fewer loads
    if far[0] >= LINE_MAX // 4 and ends[1] > ends[0] + 0.02 * low:
        slope = (ends[1] - ends[0]) / (far[1] - far[0])
        times = [t - slope * s for s, t in zip(strides, times, strict=True)]
        most = max(times)
    if most < 1.03 * low:
        raise NoRise(f"{footprint} bytes take no longer a load than half of them, a little more than half did")
    # in pieces two places of a line that is gone cost one miss, at half a line's distance: half of `most`
    short = 0.25 if chase.pieces else 0.08
    line = next(s for s, t in zip(strides, times, strict=True) if t > most - short * (most - low))
    return line, slope * line


def _dips(strides: Sequence[int], times: Sequence[float], low: float) -> bool:
    """Loads that are further apart take clearly less, and still further apart more again, other than translation makes
    it, evenly with the distance: no line makes that, nor lines so few that the cache holds them, but a prefetcher that
    finds an order in few places."""
    if len(times) > 1 and strides[-2] >= LINE_MAX // 4:
        slope = max(0.0, times[-1] - times[-2]) / (strides[-1] - strides[-2])
        times = [t - slope * s for s, t in zip(strides, times, strict=True)]
    before, after = np.maximum.accumulate(times), np.maximum.accumulate(times[::-1])[::-1]
    of_rise, of_all = DISORDER
    least = np.minimum(before, after)
    return bool((least - times > np.maximum(of_rise * (max(times) - low), of_all * least)).any())
