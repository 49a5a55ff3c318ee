"""int8 attention in one kernel: tensors are bytes, both products are of integers, and scores never reach memory.

    lower(what, traits, scales, zeros, scale_out, zero_out, choice) -> Lowered
        "input" Q, "input1" K, "input2" V -> "output", int8, of the shapes of `Attention`

With q = scales[0] (Q - zeros[0]) and so on it is softmax(q k^T scale) v in steps of scale_out from zero_out:

    s = S (Q - zeros[0]) K                  int32, exact. The zero point of K adds the same to all scores of a query,
                                            so that softmax is the same without it
    m = the largest s of a tile of keys     f = scales[0] scales[1] scale; if that is negative, -f and -s in their place
    p = round(steps exp((s - m) f))         whole numbers of 0..steps: 32767 on a CPU, 255 on a GPU
    a, l = S p (V - zeros[2]), S p          int32, exact, over the keys of the tile
    A = S a exp((m - M) f), L likewise      floats, over tiles, M the largest m: what was added up is scaled as M grows
    output = clamp(round(zero_out + A / L scales[2] / scale_out), -128, 127)

Rounding shares is all that the result owes to tiles: each share is half a step of its tile's largest off at most, and
no more than itself. A sum of weights that are rounded alike stays between the least and the largest V.

Sources: Chen et al., INT-FlashAttention (arXiv 2409.16997): both products of int8, shares rounded where they were
exponentials; Dao et al., FlashAttention (arXiv 2205.14135): tiles. Here shares are rounded relative to their tile's
largest, not the largest so far (what that is worth: docs/kernels-attention.md), and L is the sum of what was rounded.

integer_attention_cpu: a work item has a tile of queries. integer_attention_gpu: a group has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npulab.errors import CapacityError, InvariantError, UnsupportedError
from npulab.gpu.compute import attention_cpu, attention_gpu, integer_attention_cpu, integer_attention_gpu, vectors
from npulab.gpu.compute.attention import Choice, chosen, operations, with_room
from npulab.gpu.compute.problems import Attention
from npulab.gpu.compute.types import Argument, Buffer, Launch, Lowered, Traits

LOW = -(1 << 30)
DEPTH_MOST = -LOW // (255 * 128)
"""A score is a sum of products of 255 by 128, and the difference of two must fit 32 bits."""


@dataclass(frozen=True, slots=True)
class Factors:
    """zeros of Q, K, V; zero_out.    score, sign  the exponent of a difference of scores is score * sign times it.
    out  a step of V in steps of the output.           low  below all scores: nothing was seen."""

    zeros: tuple[int, int, int]
    zero_out: int
    score: float
    sign: int
    out: float
    low: int = LOW


def lower(what: Attention, traits: Traits, scales: Sequence[float], zeros: Sequence[int], scale_out: float,
          zero_out: int, choice: Choice | None = None) -> Lowered:
    """scales, zeros: of Q, K, V. Raises: as `checked`; CapacityError if local memory (a GPU's) or a thread's stack (a
    CPU's) has no room; InvariantError for a choice of the other kind of device."""
    found, (lanes, items) = checked(what, scales, zeros, scale_out, zero_out), chosen(choice, traits)
    if traits.cpu:
        kernel, size, group = integer_attention_cpu.kernel(what, traits, lanes, found)
    else:
        kernel, size, group = integer_attention_gpu.kernel(what, traits, items, found)
    arguments: tuple[Argument, ...] = (
        Buffer("input"), Buffer("input1"), Buffer("input2"), Buffer("output"), np.int32(what.queries),
        np.int32(what.keys), np.float32(found.score * vectors.LOG2E), np.float32(found.out))
    traffic = float(what.batch * (what.queries + what.keys) * (what.depth + what.width))
    return Lowered((Launch(kernel, size, group, arguments, "int8 attention", operations(what), traffic),))


def candidates(what: Attention, traits: Traits) -> list[Choice]:
    """What is taken unasked first; none if there is no room for any. Raises: UnsupportedError for another number."""
    offered: Sequence[Choice] = (attention_cpu.candidates(what, traits) if traits.cpu else
                                 attention_gpu.candidates(traits, integer_attention_gpu.SHAPES))
    return with_room(offered, lambda c: lower(what, traits, (1.0,) * 3, (0,) * 3, 1.0, 0, c))


def checked(what: Attention, scales: Sequence[float], zeros: Sequence[int], scale_out: float, zero_out: int) -> Factors:
    """Raises: UnsupportedError for another number; InvariantError for zero points that are no bytes, scales that are
    not finite or not above 0, and factors that float32 has not; CapacityError for vectors whose scores may not fit 32
    bits."""
    if what.number != "int8":
        raise UnsupportedError("integer attention is of bytes", got=what.number, want="int8",
                               try_="attention.lower for floats")
    if len(scales) != 3 or len(zeros) != 3:
        raise InvariantError("scales and zeros are one each for Q, K and V", got=f"{len(scales)}, {len(zeros)}")
    for name, byte in zip(("Q", "K", "V", "the output"), (*zeros, zero_out), strict=True):
        if not -128 <= byte <= 127 or byte != int(byte):
            raise InvariantError(f"the zero point of {name} is no byte", want="-128..127", got=byte)
    for name, scale in zip(("Q", "K", "V", "the output"), (*scales, scale_out), strict=True):
        if not 0 < scale < math.inf:
            raise InvariantError(f"the scale of {name} is none", want="finite, above 0", got=scale)
    factors = {"of the scores": scales[0] * scales[1] * what.scale, "of the output": scales[2] / scale_out}
    for name, factor in factors.items():
        if not abs(factor) < _LARGEST:
            raise InvariantError(f"the factor {name} is no float32", want=f"below {_LARGEST:.3g}", got=factor)
    if what.depth > DEPTH_MOST:
        raise CapacityError("scores of such vectors may not fit 32 bits", got=f"vectors of {what.depth}",
                            want=f"at most {DEPTH_MOST}")
    score, out = factors.values()
    q, k, v = map(int, zeros)
    return Factors((q, k, v), int(zero_out), abs(score), -1 if score < 0 else 1, out)


_LARGEST = 2.0**127
"""Times log2(e) it is a float32, too."""
