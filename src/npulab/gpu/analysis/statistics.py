"""One value and its interval out of repetitions that scatter, are disturbed, and come from a clock that ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KEPT = 4.0  # robust standard deviations


@dataclass(frozen=True, slots=True)
class Estimate:
    """low, high: 95 % interval of the value."""

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the interval, relative to the value."""
        return (self.high - self.low) / 2 / self.value


def estimate(values: Sequence[float], extra: float = 0.0) -> Estimate:
    """The mean of the values that are not far from their median, all > 0.

    A mean, not the median: a timer with coarse ticks gives only a few different values, whose mean is right and whose
    median is a tick off. Far: beyond 4 robust standard deviations (of the median absolute deviation), or one and a half
    of the smallest steps between values where those are larger or all the values scatter by: times between two ticks.

    extra: a relative uncertainty (standard deviation) that the values share, as that of a reference clock.
    """
    v = np.sort(np.asarray(values, np.float64))
    kept = v[near(v)]
    center = float(kept.mean())
    error = float(kept.std(ddof=1)) / math.sqrt(len(kept)) if len(kept) > 1 else 0.0
    free = max(1, len(kept) - 1)
    student = 1.96 + 2.372 / free + 2.822 / free**2 + 2.556 / free**3  # Student's quantile: Cornish-Fisher expansion
    half = min(math.hypot(student * error, 1.96 * extra * center), 0.99 * center)
    if len(kept) == 1:
        half = 0.99 * center  # one value says nothing of its spread
    return Estimate(center, center - half, center + half)


def near(v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the sorted values are not outliers."""
    middle = float(np.median(v))
    steps = np.diff(v)
    steps = steps[steps > 1e-12 * middle]
    tick = float(steps.min()) if len(steps) else 0.0
    width = KEPT * 1.4826 * float(np.median(np.abs(v - middle)))
    if max(width / KEPT / 1.4826, middle - float(np.quantile(v, 0.025))) < 1.01 * tick:
        width = 0.0  # what is disturbed is longer, never shorter: they differ by ticks alone
    width = max(width, 1.5 * tick, 1e-4 * middle)
    return np.asarray(np.abs(v - middle) <= width)


def jump(values: Sequence[float]) -> int | None:
    """The index before which values are of one plateau and from which on they are of another, higher one.

    None if there is no such: the plateaus must be apart by 30 % and each be flat within a third of that.
    """
    v = [float(x) for x in values]
    for i in range(1, len(v)):
        first, second = v[:i], v[i:]
        step = min(second) - max(first)
        if step > 0.3 * max(first) and max(max(first) - min(first), max(second) - min(second)) < step / 3:
            return i
    return None
