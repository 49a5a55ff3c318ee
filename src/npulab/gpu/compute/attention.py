"""Attention in one kernel: softmax(Q K^T scale) V without a matrix of queries by keys in memory.

    lower(what, traits, choice) -> Lowered      "input" Q, "input1" K, "input2" V -> "output"
    unfused(what, traits) -> Lowered            the same as product, softmax, product with scratch "scores"

Keys and values are gone through once, in tiles. For each query a largest score so far and the sum of exponentials are
kept; when it grows, what was summed is scaled down (Dao et al., FlashAttention, arXiv 2205.14135; the running sum:
Milakov and Gimelshein, arXiv 1805.02867).

causal: query q sees keys 0..q.

attention_cpu: a work item has a tile of queries. attention_gpu: a group has, and tiles of K and V in local memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from npulab.errors import CapacityError, InvariantError, UnsupportedError
from npulab.gpu.compute import attention_cpu, attention_gpu, chain, vectors
from npulab.gpu.compute.attention_cpu import Lanes
from npulab.gpu.compute.attention_gpu import Items
from npulab.gpu.compute.problems import Attention
from npulab.gpu.compute.types import Argument, Buffer, Launch, Lowered, Traits

Choice = Lanes | Items
"""On a CPU, on a GPU."""


def lower(what: Attention, traits: Traits, choice: Choice | None = None, halves: bool = False) -> Lowered:
    """halves: of float16, on a GPU, four products at a time are added up as halves, before they are added as floats; a
    choice says it itself. Raises: UnsupportedError unless float32 or float16, and for halves unless float16, on a
    device that computes on them and is no CPU; CapacityError if local memory (a GPU's) or a thread's stack (a CPU's)
    has no room; InvariantError for a choice of the other kind of device."""
    scale, (lanes, items) = what.scale, chosen(choice, traits)
    halves = items.halves if items else halves and not lanes
    if halves:
        _checked_halves(what, traits)
    if traits.cpu:
        kernel, size, group = attention_cpu.kernel(what, traits, lanes)
        scale *= vectors.LOG2E
    else:
        kernel, size, group = attention_gpu.kernel(what, traits, items, halves)
    arguments: tuple[Argument, ...] = (Buffer("input"), Buffer("input1"), Buffer("input2"), Buffer("output"),
                                       np.int32(what.queries), np.int32(what.keys), np.float32(scale))
    traffic = vectors.number_bytes(what.number) * what.batch * (what.queries + what.keys) * (what.depth + what.width)
    return Lowered((Launch(kernel, size, group, arguments, "attention", operations(what), traffic),))


def candidates(what: Attention, traits: Traits, halves: bool = False) -> list[Choice]:
    """What is taken unasked first; none if there is no room for any. halves: with those on halves. Raises: as
    `lower`."""
    if halves:
        _checked_halves(what, traits)
    kinds = (True, False) if halves else (False,)
    offered: Iterable[Choice] = attention_cpu.candidates(what, traits) if traits.cpu else (
        Items(i.across, i.down, i.each, kind) for i in attention_gpu.candidates(traits) for kind in kinds)
    return with_room(offered, lambda c: lower(what, traits, c))


def with_room(offered: Iterable[Choice], make: Callable[[Choice], Lowered]) -> list[Choice]:
    """Those that `make` does not refuse."""
    found = []
    for choice in offered:
        try:
            make(choice)
        except CapacityError:
            continue
        found.append(choice)
    return found


def chosen(choice: Choice | None, traits: Traits) -> tuple[Lanes | None, Items | None]:
    """A CPU's, a GPU's. Raises: InvariantError for one of the other kind."""
    kind = Lanes if traits.cpu else Items
    if choice is not None and not isinstance(choice, kind):
        raise InvariantError("the choice is for another kind of device", got=str(choice), want=kind.__name__,
                             where=traits.name)
    return (choice if isinstance(choice, Lanes) else None), (choice if isinstance(choice, Items) else None)


def _checked_halves(what: Attention, traits: Traits) -> None:
    vectors.checked_halves(what.number, traits)
    if traits.cpu:
        raise UnsupportedError("attention on a CPU computes on floats", got=traits.name, want="a GPU",
                               try_="without halves: they are stored, floats computed")


def unfused(what: Attention, traits: Traits) -> Lowered:
    """Three launches. Raises: UnsupportedError if causal, or unless float32 or float16."""
    return chain.lower(what, traits)


def operations(what: Attention) -> float:
    """Of what is seen: half of it where causal."""
    if not what.causal:
        return what.operations
    seen = sum(min(q + 1, what.keys) for q in range(what.queries))
    return what.operations * seen / (what.queries * what.keys)
