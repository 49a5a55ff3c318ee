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

from collections.abc import Mapping

import numpy as np

from npulab.errors import UnsupportedError
from npulab.gpu.compute import attention_cpu, attention_gpu, chain, vectors
from npulab.gpu.compute.problems import Attention
from npulab.gpu.compute.types import Argument, Buffer, Launch, Lowered, Traits


def lower(what: Attention, traits: Traits, choice: Mapping[str, int] | None = None, halves: bool = False) -> Lowered:
    """choice: on a CPU "vectors" of queries and "keys" of a tile; on a GPU "across" work items for keys, "down" for
    queries, "each": keys and queries of each. halves: of float16, on a GPU, four products at a time are added up as
    halves, before they are added as floats. Raises: UnsupportedError unless float32 or float16, and for halves unless
    float16, on a device that computes on them and is no CPU; CapacityError if local memory (a GPU's) or a thread's
    stack (a CPU's) has no room."""
    scale = what.scale
    if halves:
        vectors.checked_halves(what.number, traits)
        if traits.cpu:
            raise UnsupportedError("attention on a CPU computes on floats", got=traits.name, want="a GPU",
                                   try_="without halves: they are stored, floats computed")
    if traits.cpu:
        kernel, size, group = attention_cpu.kernel(what, traits, choice or {})
        scale *= vectors.LOG2E
    else:
        kernel, size, group = attention_gpu.kernel(what, traits, choice or {}, halves)
    arguments: tuple[Argument, ...] = (Buffer("input"), Buffer("input1"), Buffer("input2"), Buffer("output"),
                                       np.int32(what.queries), np.int32(what.keys), np.float32(scale))
    traffic = vectors.number_bytes(what.number) * what.batch * (what.queries + what.keys) * (what.depth + what.width)
    return Lowered((Launch(kernel, size, group, arguments, "attention", operations(what), traffic),))


def unfused(what: Attention, traits: Traits) -> Lowered:
    """Three launches. Raises: UnsupportedError if causal, or unless float32 or float16."""
    return chain.lower(what, traits)


def operations(what: Attention) -> float:
    """Of what is seen: half of it where causal."""
    if not what.causal:
        return what.operations
    seen = sum(min(q + 1, what.keys) for q in range(what.queries))
    return what.operations * seen / (what.queries * what.keys)
