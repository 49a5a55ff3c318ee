"""Where a cache ends: the footprint at which the time of a load goes from one plateau to the next, and how.

A step: one line more and all loads miss (any line anywhere, least recent use). A ramp: lines are bound to sets, and
each more overfills one of them. Random: random replacement. Gradual: none of these; pages that fall on some sets more
than on others, or a cache that is shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from npulab.gpu.analysis.chase import Chase
from npulab.gpu.analysis.meter import Refused

Shape = Literal["step", "ramp", "random", "gradual"]
ATTEMPTS = 3
STEADY = 6
WAYS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32)
RISE = 1.08
STEPS = 0.8  # share of a rise that a step makes within two lines to each side
FITS = 0.02  # scatter that a model may leave
POINTS = (0.67, 0.85, 0.92, 0.96, 0.98, 1.0, 1.02, 1.04, 1.08, 1.13, 1.2, 1.35, 1.5, 1.7, 1.9, 2.25, 2.7, 3.3)
"""Of the lines at which 0.4 of a rise is made."""

NEAR = 1.4  # times those lines, where what lies farther does not fit


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


def cliff(chase: Chase, inside: int, flat: int, beyond: int, line: int, share: float = 0.0) -> Cliff:
    """Of a level that holds `inside` bytes for sure, `flat` as it seems, and little of `beyond`. share: seconds of a
    load, `line` bytes from others, that translation takes where its buffer is too small.

    Raises: NoRise, Refused; Broad if it is gradual."""
    for attempt in range(ATTEMPTS):
        before = chase.meter.pace()
        low, high = chase.again(inside, line, 3), chase.again(beyond, line, 3)
        if high < RISE * low:
            raise NoRise(f"time a load goes from {low * 1e9:.4g} to {high * 1e9:.4g} ns only")
        try:
            first, after = _crossing(chase, flat // line // 2, 2 * flat // line, line, low + 0.4 * (high - low))
            # the plateaus are of another clock than the cliff: memory need not slow with the cores
            if attempt == ATTEMPTS - 1 or abs(chase.meter.pace() / before - 1) < 0.02:
                break
        except Refused:
            if attempt == ATTEMPTS - 1:
                raise Broad from None
        chase.forget()  # something disturbed an experiment, or the clock fell
    below, above = (chase.again(max(1, n) * line, line, 3) for n in (first - 2, after + 2))
    if above - below > STEPS * (high - low) and above > RISE * below:
        return Cliff(first * line, None, "step", f"{first * line} bytes take {low * 1e9:.4g} ns a load, one line more "
                                                 f"{high * 1e9:.4g}")
    return _fitted(chase, after, beyond, line, low, high, share)


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


def overfilled(lines_over_capacity: NDArray[np.float64], ways: int) -> NDArray[np.float64]:
    """Misses of a cycle through x times the lines that a cache with sets of so many lines, of least recent use, has.

    x C - C lines are one too many for as many sets, in which all ways + 1 miss: (x - 1) (ways + 1) / x; once each set
    has one too many all lines miss."""
    return np.clip((1 - 1 / lines_over_capacity) * (ways + 1), 0, 1)


def _fitted(chase: Chase, after: int, beyond: int, line: int, low: float, high: float, share: float) -> Cliff:
    """A cliff as random replacement or sets make it. `after`: lines at 0.4 of the rise. The buffer of translations may
    end at any power of two among them, `share` more from there on. Raises: Broad."""
    lines = sorted({int(after * f) for f in POINTS if after * f * line <= max(beyond, 2 * after * line)})
    n = np.array(lines, np.float64)
    sizes = after * np.geomspace(0.6, 1.2, 1601)
    models = [np.array([[missed(k / s) for k in lines] for s in sizes])] + [
        overfilled(n / sizes[:, None], w) for w in WAYS]
    reaches = [1 << i for i in range(12, 31) if n[0] * line <= 1 << i < n[-1] * line] if share else []
    noise, still, errors = math.inf, False, np.zeros((1, 1))
    for attempt in range(STEADY):  # a clock that falls meanwhile bends the curve: memory may not slow with the cores
        before = chase.meter.pace()
        t = np.array([chase.again(k * line, line, 4) for k in lines])
        curves = [t - share * (n * line > reach) for reach in (*reaches, math.inf)]
        fits = [np.array([_misfits(m, c) for m in models]) for c in curves]
        best = min(range(len(fits)), key=lambda i: float(fits[i].min()))
        t, now = curves[best], fits[best]
        scatter = math.sqrt(now.min() / max(1, len(n) - 3))
        stayed = abs(chase.meter.pace() / before - 1) < 0.02
        if (stayed, -scatter) > (still, -noise):
            still, noise, errors = stayed, scatter, now
        if (still and noise < 0.006) or (attempt and noise > 3 * FITS):
            break
    near = n < NEAR * after
    closer = np.array([_misfits(m[:, near], t[near]) for m in models])
    scatter = math.sqrt(closer.min() / max(1, int(near.sum()) - 3))
    if noise > 0.006 and scatter < noise / 2:  # something else begins beyond: translation, or the next level
        noise, errors = scatter, closer
    model, at = np.unravel_index(int(errors.argmin()), errors.shape)
    if noise > FITS or at in (0, len(sizes) - 1):
        raise Broad
    # 4 standard deviations of one parameter; the reference clock's are common to neighbours, no scatter shows them
    inside = sizes[(errors < errors.min() + 16 * (noise**2 + 0.002**2)).any(axis=0)]
    step = float(sizes[1] / sizes[0])  # the grid's
    interval = (float(inside.min()) * line / step, float(inside.max()) * line * step)
    shape: Shape = "ramp" if model else "random"
    how = f"as sets of {WAYS[model - 1]} lines make it" if model else "as with random replacement"
    size, why = round(float(sizes[at])) * line, (
        f"load time rises from {low * 1e9:.4g} to {high * 1e9:.4g} ns {how}, within {noise * 100:.2g} %")
    rounds = round_sizes(*interval)
    if len(rounds) == 1:
        return Cliff(rounds[0], interval, shape, f"{why}; the only multiple of 2^n bytes by up to 31 in the interval")
    return Cliff(size, interval, shape, why)


def _misfits(misses: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of squared relative errors of the best low + (high - low) m, for each row m of `misses`."""
    weight = 1 / times
    a, b = (1 - misses) * weight, misses * weight  # both plateaus' shares, relative
    aa, ab, bb = (a * a).sum(1), (a * b).sum(1), (b * b).sum(1)
    ya, yb = a.sum(1), b.sum(1)
    determinant = np.maximum(aa * bb - ab * ab, 1e-9 * (aa + bb) ** 2)  # of one plateau alone: none fits
    low, high = (ya * bb - yb * ab) / determinant, (yb * aa - ya * ab) / determinant
    found: NDArray[np.float64] = ((low[:, None] * a + high[:, None] * b - 1) ** 2).sum(1)
    return np.where((high > low) & (low > 0), found, np.inf)


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


def round_sizes(low: float, high: float) -> list[int]:
    """Sizes in low..high as caches are built: an odd number up to 31, times a power of two."""
    return sorted(k << n for k in range(1, 32, 2) for n in range(5, 30) if low <= k << n <= high)
