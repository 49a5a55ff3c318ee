"""Where a network's tensors lie: few buffers for all of them, used again as soon as nobody reads what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npulab.errors import CapacityError
from npulab.plan.memory import Lifetime, place


@dataclass(frozen=True, slots=True)
class Need:
    """A tensor or scratch space: bytes, and the first and last layer that need it, both included."""

    name: str
    size: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Arenas:
    """places: name -> (arena, offset).    sizes: bytes of each arena.    apart: bytes if nothing were used again.
    bound: bytes alive at the busiest time, aligned: no arrangement needs fewer."""

    places: dict[str, tuple[int, int]]
    sizes: tuple[int, ...]
    apart: int
    bound: int

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


def arranged(needs: Sequence[Need], alignment: int, largest: int) -> Arenas:
    """One arena, or several where a device has no buffers of that size. Those alive at the same time do not overlap.

    largest  bytes of a buffer.      alignment  bytes that each beginning is a multiple of.

    Raises: CapacityError for a tensor that is larger than a buffer.
    """
    for n in needs:
        if n.size > largest:
            raise CapacityError("the device has no buffer for one of the network's tensors", got=f"{n.size} bytes",
                                want=f"at most {largest}")
    apart = sum(-(-n.size // alignment) * alignment for n in needs)
    placement = place([Lifetime(n.size, n.first, n.last) for n in needs], alignment)
    if placement.peak <= largest:
        places = {n.name: (0, at) for n, at in zip(needs, placement.offsets, strict=True)}
        return Arenas(places, (placement.peak,), apart, placement.bound)
    # too much for one buffer: the largest first, each into the first arena in which it finds room
    arenas: list[list[tuple[Need, int]]] = []
    places = {}
    for n in sorted(needs, key=lambda n: (-n.size, n.first, n.name)):
        for i, arena in enumerate([*arenas, []]):
            at = _room(n, arena, alignment, largest)
            if at is not None:
                if i == len(arenas):
                    arenas.append([])
                arenas[i].append((n, at))
                places[n.name] = (i, at)
                break
    sizes = tuple(max(at + n.size for n, at in arena) for arena in arenas)
    return Arenas(places, sizes, apart, placement.bound)


def _room(need: Need, arena: Sequence[tuple[Need, int]], alignment: int, largest: int) -> int | None:
    """The lowest offset at which nothing that is alive with it lies."""
    at = 0
    for other, start in sorted(((o, s) for o, s in arena if o.first <= need.last and need.first <= o.last),
                               key=lambda p: p[1]):
        if at + need.size <= start:
            break
        at = max(at, -(-(start + other.size) // alignment) * alignment)
    return at if at + need.size <= largest else None
