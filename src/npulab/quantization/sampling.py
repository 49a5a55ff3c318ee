"""Some of many samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.program.pages import arrays_away, let_go
from npulab.quantization.types import Feeds, ListedSamples, Samples


def taken(samples: Samples, positions: Sequence[int]) -> Samples:
    """The samples at these positions, ascending. Those that can be picked are; others are gone through each time."""
    pick: Any = getattr(samples, "take", None)
    found: Samples = pick(list(positions)) if pick is not None else _Taken(samples, frozenset(positions))
    return found


def some(samples: Samples, count: int) -> Samples:
    """At most `count` samples, evenly spread: neighbours are often of one class."""
    total = len(samples)
    return samples if total <= count else taken(samples, [i * total // count for i in range(count)])


def drawn(wanted: int, total: int, *seed: int) -> NDArray[np.int64]:
    """So many of `total` places, ascending, each as likely as any other: those that SplitMix64 (Steele et al. 2014,
    doi:10.1145/2714064.2660195) gives the least numbers. The same for ever; NumPy's generators would take 4 MiB."""
    start: NDArray[np.uint64] = np.zeros(1, np.uint64)
    for number in seed:
        start = _mixed(np.add(start, number, dtype=np.uint64))
    numbers = _mixed(np.add(start, np.arange(total), dtype=np.uint64, casting="unsafe"))
    return np.sort(np.argpartition(numbers, wanted - 1)[:wanted])


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    return x ^ (x >> np.uint64(31))


class _Away(ListedSamples):
    """Of arrays in a file: each is out of memory again when the next is asked for."""

    def __iter__(self) -> Iterator[Feeds]:
        for feeds in self.feeds:
            yield feeds
            for x in feeds.values():
                let_go(x)

    def take(self, positions: Sequence[int]) -> _Away:
        return _Away([self.feeds[i] for i in positions], self.origin)


def held(samples: Samples) -> ListedSamples:
    """At hand: in memory, in a file if they are many bytes."""
    listed = [{name: np.asarray(x) for name, x in feeds.items()} for feeds in samples]
    away = iter(arrays_away([x for feeds in listed for x in feeds.values()]))
    return _Away([{name: next(away) for name in feeds} for feeds in listed], samples.origin)


@dataclass(frozen=True, eq=False)
class _Taken:
    samples: Samples
    kept: frozenset[int]

    @property
    def origin(self) -> str:
        return self.samples.origin

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[Feeds]:
        return (feeds for i, feeds in enumerate(self.samples) if i in self.kept)

    def take(self, positions: Sequence[int]) -> Samples:
        order = sorted(self.kept)
        return taken(self.samples, [order[i] for i in positions])
