"""What a cache keeps of a chase that does not fit: by replacement, sets, and how far apart its lines are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Shape = Literal["step", "ramp", "random", "gradual"]
EMPTY, FULL = 1.6, 0.95  # times what sets of two lines and more hold: nothing is kept, or all


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


@dataclass(frozen=True, slots=True)
class Before:
    """The level before, and the one before that. size, line: bytes. seconds: of a load that it answers."""

    size: int
    line: int
    seconds: float
    shape: Shape
    before: Before | None

    def kept(self, lines: int, stride: int) -> float | None:
        """The share that it answers of a cycle through so many lines, `stride` bytes apart; None where that is not
        known. Lines that are bound to sets fall on the fewer of them the further apart they are."""
        full = lines * (stride if self.shape == "ramp" else self.line) / self.size
        if self.shape == "random":
            return 1 - missed(full)
        empty = {"step": 1.05, "ramp": EMPTY}.get(self.shape, 4.0)
        return 0.0 if full >= empty else 1.0 if full <= FULL and self.shape != "gradual" else None
