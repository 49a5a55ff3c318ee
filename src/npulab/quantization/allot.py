"""The multiple-choice knapsack: one option of each item, so that the sums of costs and of noises are both low."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npulab.quantization.types import Array

POINTS = 1 << 14
"""Sums kept after each item; beyond that the best of each of so many equal steps of cost."""
STOPS = 64
"""Of a search along a front."""


@dataclass(frozen=True, eq=False)
class Front:
    """Choices that no other beats in both sums, by rising cost: (n,) costs and noises, and what each chose."""

    costs: NDArray[np.float64]
    noises: NDArray[np.float64]
    steps: Sequence[tuple[Array, Array]]

    def __len__(self) -> int:
        return len(self.costs)

    def choice(self, i: int) -> tuple[int, ...]:
        """The option of each item."""
        found = []
        for parents, options in reversed(self.steps):
            found.append(int(options[i]))
            i = int(parents[i])
        return tuple(found[::-1])

    def within(self, most: float) -> int:
        """The last choice that costs no more; -1: none."""
        return int(np.searchsorted(self.costs, most, side="right")) - 1

    def reaching(self, noise: float) -> int:
        """The cheapest with no more noise; the last where none has."""
        return min(int(np.searchsorted(-self.noises, -noise, side="left")), len(self) - 1)


def front(items: Sequence[Sequence[tuple[float, float]]]) -> Front:
    """By dynamic programming over the items' options (cost, noise), of which each has at least one: exact as long as
    no more than POINTS choices stand side by side."""
    costs, noises = np.zeros(1), np.zeros(1)
    steps: list[tuple[Array, Array]] = []
    for options in items:
        own = np.array(options, np.float64).reshape(-1, 2)
        all_costs = (costs[:, None] + own[:, 0]).ravel()
        all_noises = (noises[:, None] + own[:, 1]).ravel()
        order = np.lexsort((all_noises, all_costs))
        least = np.minimum.accumulate(all_noises[order])
        kept = order[np.concatenate([[True], all_noises[order][1:] < least[:-1]])]
        if len(kept) > POINTS:
            kept = _thinned(all_costs, kept)
        costs, noises = all_costs[kept], all_noises[kept]
        steps.append((kept // len(own), kept % len(own)))
    return Front(costs, noises, steps)


def _thinned(costs: Array, kept: Array) -> Array:
    """The last, which has the least noise, of each step of cost; the first in any case."""
    low, high = costs[kept[0]], costs[kept[-1]]
    step = np.minimum(((costs[kept] - low) / (high - low) * (POINTS - 1)).astype(np.int64), POINTS - 1)
    last = np.concatenate([step[1:] != step[:-1], [True]])
    last[0] = True
    return np.asarray(kept[last])


def stops(f: Front) -> list[int]:
    """At most STOPS + 1 places of a front, about evenly by the logarithm of noise, both ends among them."""
    if len(f) <= STOPS:
        return list(range(len(f)))
    level = np.log(np.maximum(f.noises, f.noises[0] * 1e-12 + 1e-300))
    wanted = np.linspace(level[0], level[-1], STOPS)
    found = np.searchsorted(-level, -wanted, side="left")
    return sorted({0, len(f) - 1, *(int(min(i, len(f) - 1)) for i in found)})


def first_good(places: Sequence[int], good: Callable[[int], bool]) -> int | None:
    """The first place that is good, where all behind a good one are: by halving. None if the last is not good."""
    if not places or not good(places[-1]):
        return None
    low, high = 0, len(places) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(places[middle]) else (middle + 1, high)
    return places[high]
