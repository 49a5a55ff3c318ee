"""Cache levels by pointer chase: where the time of a load leaves one plateau for the next, from small to large."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from npulab.errors import NpulabError
from npulab.gpu.analysis.meter import Kind, Meter, Refused, reason
from npulab.gpu.analysis.statistics import Estimate

SMALLEST, LARGEST = 1 << 10, 1 << 29  # bytes of a footprint
LEVELS = 4
STRIDE = 32  # bytes, no line is shorter
LINE_MAX = 1024
ATTEMPTS = 3
FALSE_ALARMS = 6
RISE = 1.08  # a load that takes so much longer has left its level
COARSE = 128  # bytes: the stride from COARSE_FROM on, where all places at smaller strides would take too long to touch
COARSE_FROM = 1 << 25


@dataclass(frozen=True, slots=True)
class Level:
    """size: bytes, interval None where found to a line. shape: how the cliff looks. latency: seconds of a load."""

    size: int
    interval: tuple[float, float] | None
    line: int
    shape: Literal["step", "random", "unknown"]
    latency: Estimate
    why: str


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """memory: a load that no level holds; None, with the reason in `fault`, if no footprint was large enough."""

    levels: tuple[Level, ...]
    memory: Estimate | None
    fault: str = ""


def hierarchy(meter: Meter) -> Hierarchy:
    """Raises: Refused if there is no plateau at all."""
    chase = _Chase(meter)
    levels: list[Level] = []
    at, stride, false_alarms = SMALLEST, STRIDE, 0
    while len(levels) < LEVELS:
        flat = None
        try:
            flat = _plateau_end(chase, at, stride)
            if flat is None:
                break
            level, at = _level(chase, flat, at, stride)
        except NoRise as e:
            false_alarms += 1
            if false_alarms > FALSE_ALARMS:
                return _ended(levels, f"the level after {flat} bytes: {e}")
            at = int(flat or at) * 3 // 2
            continue
        except (Refused, NpulabError) as e:
            return _ended(levels, f"the level after {flat or at} bytes: {reason(e)}")
        levels.append(level)
        stride = level.line
    if not levels:
        raise Refused("every footprint takes the same time a load")
    largest = chase.largest
    if levels[-1].size * 2 > largest:
        return Hierarchy(tuple(levels), None, f"no footprint until {largest} bytes is large enough to miss all caches")
    beyond = min(largest, max(8 * levels[-1].size, 1 << 24))
    try:
        return Hierarchy(tuple(levels), chase.precisely(beyond, stride, "memory", levels[-1].latency.value))
    except (Refused, NpulabError) as e:
        return Hierarchy(tuple(levels), None, reason(e))


class NoRise(Refused):
    """Time a load seemed to rise and, looked at closely, does not."""


def _ended(levels: list[Level], fault: str) -> Hierarchy:
    if not levels:
        raise Refused(fault)
    return Hierarchy(tuple(levels), None, fault)


class _Chase:
    """Seconds of a load, each footprint and stride asked once."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.largest = min(LARGEST >> (3 if meter.quick else 0), meter.limits.buffer_max)
        self._known: dict[tuple[int, int], float] = {}

    def __call__(self, footprint: int, stride: int) -> float:
        what = footprint // stride * stride, stride
        if what not in self._known:
            self._known[what] = self.again(footprint, stride)
        return self._known[what]

    def forget(self) -> None:
        self._known.clear()

    def again(self, footprint: int, stride: int, calls: int = 1) -> float:
        footprint = footprint // stride * stride
        return self.meter.seconds(lambda: self.meter.bench.chase(footprint, stride), "loads", calls=calls).value

    def precisely(self, footprint: int, stride: int, kind: Kind = "core", through: float = 0.0) -> Estimate:
        footprint = footprint // stride * stride
        return self.meter.seconds(lambda: self.meter.bench.chase(footprint, stride), "loads", kind, 4, 0.004, through)


def _plateau_end(chase: _Chase, start: int, stride: int) -> int | None:
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


def _level(chase: _Chase, flat: int, start: int, stride: int) -> tuple[Level, int]:
    """The level that `flat` bytes still fit in, and the footprint from which the next one's plateau is flat."""
    low = chase.again(max(start, int(flat / 1.42)), stride, 3)
    line = _line(chase, 2 * flat, stride, low)
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
    for attempt in range(ATTEMPTS):
        low, high = chase.again(max(start, int(flat / 1.42)), line, 3), chase.again(at, line, 3)
        try:
            first, cliff = _crossing(chase, flat // line // 2, 2 * flat // line, line, low + 0.4 * (high - low))
            break
        except Refused:
            if attempt == ATTEMPTS - 1:
                raise
            chase.forget()  # something disturbed an experiment, or the clock fell
    below, above = (chase.again(int(cliff * f) * line, line, 3) for f in (0.97, 1.03))
    if above - below > 0.8 * (high - low):
        size, interval, shape = first * line, None, "step"
        why = f"{size} bytes take {low * 1e9:.4g} ns a load, one line more {high * 1e9:.4g}"
    else:
        size, interval, shape, why = _gradual(chase, cliff, at, line, low, high)
    # a large footprint, of which the level before keeps nothing
    latency = chase.precisely(max(start, int(0.85 * size) if shape != "unknown" else int(flat / 1.42)), line)
    return Level(size, interval, line, shape, latency, why), max(at, flat * 2)  # type: ignore[arg-type]


def _line(chase: _Chase, footprint: int, stride: int, low: float) -> int:
    """The smallest distance of places at which no load helps another: until then those in one line do, beyond it a
    footprint twice the cache has fewer lines than it holds (or, where lines are bound to sets, as many a set)."""
    strides = []
    while stride <= min(LINE_MAX, footprint // 16):
        strides.append(stride)
        stride *= 2
    if not strides:
        raise Refused("it is smaller than 16 lines")
    times = [chase.again(footprint, s, 3) for s in strides]
    most = max(times)
    if most < 1.03 * low:
        raise NoRise(f"{footprint} bytes take no longer a load than half of them, a little more than half did")
    return next(s for s, t in zip(strides, times, strict=True) if t > most - 0.08 * (most - low))


def _crossing(chase: _Chase, low: int, high: int, line: int, limit: float) -> tuple[int, int]:
    """(lines that take less than `limit`, one more) by bisection."""
    for _ in range(3):
        if chase(low * line, line) < limit:
            break
        low //= 2
    if low < 1 or chase(low * line, line) >= limit or chase(high * line, line) < limit:
        raise Refused("its cliff is not where it was seen before")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chase(middle * line, line) < limit else (low, middle)
    # a disturbed experiment on the way leaves the bisection on the wrong side of the cliff
    if chase.again(low * line, line, 2) >= limit * 1.02 or chase.again(high * line, line, 2) < limit * 0.98:
        raise Refused(f"its cliff moves: {low} and {high} lines do not take the same twice")
    return low, high


@lru_cache(4096)
def missed(lines_over_capacity: float) -> float:
    """Misses of a random cycle through x times the lines that a cache with random replacement has: m = 1 - exp(-x m).

    A line stays while none of the x C m misses until its next turn throws it out, each one with 1 / C."""
    x = lines_over_capacity
    if x <= 1:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(50):
        m = (low + high) / 2
        low, high = (m, high) if 1 - math.exp(-x * m) > m else (low, m)
    return (low + high) / 2


def _gradual(chase: _Chase, cliff: int, flat: int, line: int, low: float,
             high: float) -> tuple[int, tuple[float, float] | None, str, str]:
    """(bytes, interval, shape, why) of a cliff that is no step: as random replacement makes it, or neither."""
    about = cliff / 1.2
    lines = sorted({int(about * f) for f in (0.8, 1.1, 1.2, 1.3, 1.45, 1.6, 1.8, 2.0, 2.3, 2.7, 3.2, 4.0)
                    if about * f * line <= max(flat, 2 * about * line)})
    n = np.array(lines, np.float64)
    calls = 4
    sizes = about * np.geomspace(0.7, 1.4, 1401)

    def misfit(size: float, times: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        m = np.array([missed(k / size) for k in n])
        basis = np.stack([1 - m, m], 1) / times[:, None]  # relative errors
        both, *_ = np.linalg.lstsq(basis, np.ones(len(n)), rcond=None)
        return float(((basis @ both - 1) ** 2).sum())

    noise, still = math.inf, False
    for _ in range(6):  # a clock that falls meanwhile bends the curve: memory may not slow with the cores
        before = chase.meter.pace()
        t = np.array([chase.again(k * line, line, calls) for k in lines])
        now = np.array([misfit(s, t) for s in sizes])
        scatter = math.sqrt(now.min() / max(1, len(n) - 3))
        stayed = abs(chase.meter.pace() / before - 1) < 0.02
        if (stayed, -scatter) > (still, -noise):
            still, noise, errors = stayed, scatter, now
        if still and noise < 0.006:
            break
    best = int(errors.argmin())
    # 4 standard deviations of one parameter; the reference clock's are common to neighbours, no scatter shows them
    inside = sizes[errors < errors[best] + 16 * (noise**2 + 0.002**2)]
    interval = (float(inside.min()) * line, float(inside.max()) * line)
    if noise > 0.02 or best in (0, len(sizes) - 1):
        # neither: between the last footprint that all fits and the one of which half does not
        edge = _crossing(chase, max(1, int(cliff * 0.3)), cliff, line, low + 0.1 * (high - low))[0] * line
        return edge, (edge * 0.9, float(cliff * line)), "unknown", (
            f"load time rises from {low * 1e9:.4g} to {high * 1e9:.4g} ns, neither in a step nor as random replacement "
            "would have it")
    size, why = round(float(sizes[best])) * line, (
        f"load time rises from {low * 1e9:.4g} to {high * 1e9:.4g} ns as with random replacement, within "
        f"{noise * 100:.2g} %")
    rounds = round_sizes(*interval)
    if len(rounds) == 1:
        return rounds[0], interval, "random", f"{why}; the only multiple of 2^n bytes by up to 31 in the interval"
    return size, interval, "random", why


def round_sizes(low: float, high: float) -> list[int]:
    """Sizes in low..high as caches are built: an odd number up to 31, times a power of two."""
    return sorted(k << n for k in range(1, 32, 2) for n in range(5, 30) if low <= k << n <= high)
