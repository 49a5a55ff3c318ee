"""Memory that streams go through: filled once, kept for the next time, with what its vectors add up to."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from npulab.gpu.types import Way

if TYPE_CHECKING:
    from npulab.gpu.opencl import OpenCL

WORTH = 1 << 24
"""Bytes from which on a buffer is kept: to fill one of 512 MiB takes a hundred times as long as to read it, and pages
of small ones, which fall on sets of caches by chance, are to be others each time."""


ROUNDS = 64
"""Through a memory at most that are added up one by one."""
REMEMBERED = 256  # ways through one


def available() -> int:
    """Bytes of memory that may be taken without taking others'."""
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return 1 << 30


class Sums:
    """What the vectors at each place of a memory add up to, modulo 2**32, and along ways through it: each is asked for
    in every repetition. size: places."""

    def __init__(self, of: NDArray[np.uint32]) -> None:
        self._of, self.size = of, len(of)
        self.along = lru_cache(REMEMBERED)(self._along)

    def _along(self, first: int, step: int, count: int) -> int:
        """Of `count` places, `step` apart, from `first` on and round again; both are less than there are places."""
        period = self.size // math.gcd(self.size, step) if step else 1  # the places repeat
        whole, rest = divmod(count, period)
        return ((self._added(first, step, period) * whole if whole else 0) + self._added(first, step, rest)) % (1 << 32)

    def _added(self, first: int, step: int, count: int) -> int:
        if count * step > ROUNDS * self.size:
            places = (first + np.arange(count, dtype=np.int64) * step) % self.size
            return int(self._of[places].sum(dtype=np.uint64))
        total = 0  # a round at a time: a list of a large memory's places takes longer than the device
        while count:
            here = min(count, -(-(self.size - first) // step) if step else count)
            total += (int(self._of[first:first + here * step:step].sum(dtype=np.uint64)) if step else
                      here * int(self._of[first]))
            first, count = (first + here * step) % self.size, count - here
        return total


class Filled:
    """Buffers of one device, each for one way of going through it: the last ones, as far as they are no larger together
    than the largest that it allows, and than a quarter of the host's memory, of which they may be. `clear` when it has
    no room for others."""

    def __init__(self) -> None:
        self._most = available() // 4
        self._kept: OrderedDict[tuple[Way, int, int, int], tuple[Any, Sums]] = OrderedDict()

    def __call__(self, bench: OpenCL, way: Way, parts: int, size: int, lanes: int) -> tuple[Any, Sums]:
        """(a buffer of `parts` parts of `size` vectors of `lanes` 32-bit integers, twice that for "copy"; what the
        vectors at each place of the parts add up to, until one was written to)."""
        key = way, parts, size, lanes
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        data = (np.arange(parts * size * lanes, dtype=np.uint32) * np.uint32(2654435761)) >> np.uint32(7)
        sums = data.reshape(parts, size, lanes).sum(axis=(0, 2), dtype=np.uint32)
        made = bench._buffer(data if way != "copy" else np.concatenate([data, np.zeros_like(data)])), Sums(sums)
        if _bytes(key) >= WORTH:
            self._kept[key] = made
            while len(self._kept) > 1 and sum(map(_bytes, self._kept)) > min(bench.limits.buffer_max, self._most):
                self._kept.popitem(last=False)
        return made

    def clear(self) -> bool:
        """Whether there was something to give back."""
        had = bool(self._kept)
        self._kept.clear()
        return had


def _bytes(key: tuple[Way, int, int, int]) -> int:
    way, parts, size, lanes = key
    return 4 * parts * size * lanes * (2 if way == "copy" else 1)
