"""Some of many samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
