"""Where a cache ends: the footprint at which the time of a load goes from one plateau to the next, and how.

A step: one line more and all loads miss (any line anywhere, least recent use). A ramp: lines are bound to sets, and
each more overfills one of them. Random: random replacement. Gradual: none of these; pages that fall on some sets more
than on others, or a cache that is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npulab.gpu.analysis.chase import Chase
from npulab.gpu.analysis.fit import GOOD, fit
from npulab.gpu.analysis.kept import Before, Shape
from npulab.gpu.analysis.meter import Refused

ATTEMPTS = 3
PASSES = 6
RISE = 1.08
STEPS = 0.8  # share of a rise that a step makes within two lines to each side
FITS = 0.02  # scatter that a model may leave
POINTS = (0.67, 0.85, 0.92, 0.96, 0.98, 1.0, 1.02, 1.04, 1.08, 1.13, 1.2, 1.35, 1.5, 1.7, 1.9, 2.25, 2.7, 3.3)
"""Of the lines at which 0.4 of a rise is made."""


class NoRise(Refused):
    """Time a load seemed to rise and, looked at closely, does not."""


class Broad(Exception):  # noqa: N818 - not an error: another way is to be gone
    """A cliff is gradual: it is to be seen in the curve of all footprints alone."""


@dataclass(frozen=True, slots=True)
class Cliff:
    """size: bytes; interval None where found to a line."""

    size: int
    interval: tuple[float, float] | None
    shape: Shape
    why: str


def cliff(chase: Chase, inside: int, flat: int, beyond: int, line: int, share: float = 0.0,
          before: Before | None = None) -> Cliff:
    """Of a level that holds `inside` bytes for sure, `flat` as it seems, and little of `beyond`. share: seconds of a
    load, `line` bytes from others, that translation takes where its buffer is too small. before: the level before.

    Raises: NoRise, Refused; Broad if it is gradual."""
    for attempt in range(ATTEMPTS):
        pace = chase.meter.pace()
        low, high = chase.again(inside, line, 3), chase.again(beyond, line, 3)
        if high < RISE * low:
            raise NoRise(f"time a load goes from {low * 1e9:.4g} to {high * 1e9:.4g} ns only")
        try:
            first, after = _crossing(chase, flat // line // 2, 2 * flat // line, line, low + 0.4 * (high - low))
            below, above = (chase.again(max(1, n) * line, line, 3) for n in (first - 2, after + 2))
            # the plateaus are of another clock than the cliff: memory need not slow with the cores
            if attempt == ATTEMPTS - 1 or abs(chase.meter.pace() / pace - 1) < 0.02:
                break
        except Refused:
            if attempt == ATTEMPTS - 1:
                raise Broad from None
        chase.forget()  # something disturbed an experiment, or the clock fell
    if above - below > STEPS * (high - low) and above > RISE * below:
        return Cliff(first * line, None, "step", f"{first * line} bytes take {low * 1e9:.4g} ns a load, one line more "
                                                 f"{high * 1e9:.4g}")
    return _fitted(chase, inside, after, beyond, line, low, high, share, before)


def _crossing(chase: Chase, low: int, high: int, line: int, limit: float) -> tuple[int, int]:
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


def _fitted(chase: Chase, inside: int, after: int, beyond: int, line: int, low: float, high: float, share: float,
            before: Before | None) -> Cliff:
    """A cliff as random replacement or sets make it. `after`: lines at 0.4 of the rise.

    Gone through again, PASSES times at most, until the clock stayed for it and the times allow one round size alone.
    Raises: Broad."""
    lines = sorted({int(after * f) for f in POINTS if after * f * line <= max(beyond, 2 * after * line)})
    kept = np.array([(before.kept(k, line) if before else None) or 0.0 for k in lines])
    steady: list[NDArray[np.float64]] = []
    moved: list[NDArray[np.float64]] = []
    for attempt in range(PASSES):
        pace = chase.meter.pace()
        times = np.empty(len(lines))
        for i in (*range(0, len(lines), 2), *reversed(range(1, len(lines), 2))):  # there and back: drift is scatter
            times[i] = chase.again(lines[i] * line, line, 4)
        if before:  # loads that the level before still answers
            share_inside = before.kept(inside // line, line) or 0.0
            times += kept * max(0.0, low - before.seconds) / (1 - min(0.5, share_inside))
        (steady if abs(chase.meter.pace() / pace - 1) < 0.02 else moved).append(times)
        found = fit(lines, steady or moved, after, line, share)
        if steady and found.noise < GOOD and (len(found.rounds) == 1 or chase.meter.quick):
            break
        if attempt and found.noise > 3 * FITS:
            break
    if found.noise > FITS or found.edge:
        raise Broad
    interval = (found.low * line, found.high * line)
    how = f"as sets of {found.ways} lines make it" if found.ways else "as with random replacement"
    shape: Shape = "ramp" if found.ways else "random"
    why = f"load time rises from {low * 1e9:.4g} to {high * 1e9:.4g} ns {how}, within {found.noise * 100:.2g} %"
    if len(found.rounds) == 1:
        return Cliff(found.rounds[0], interval, shape,
                     f"{why}; the only multiple of 2^n bytes by up to 31 in the interval")
    return Cliff(round(found.size) * line, interval, shape, why)


def rising(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls, by least squares (pool adjacent violators: Barlow et al., 1972)."""
    pools: list[tuple[float, int]] = []
    for v in values:
        mean, count = v, 1
        while pools and pools[-1][0] > mean:
            before, more = pools.pop()
            mean, count = (mean * count + before * more) / (count + more), count + more
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]
