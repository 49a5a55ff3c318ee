"""Kernels made larger with zeros, so that their sides and their padding are what a chip takes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import Convolution, Pair, change_conv, convolution, nodes

SIDE_MAX = 9
"""Of a kernel made larger."""


def square(r: Rewrite) -> list[str]:
    """A convolution with a kernel of two different or of even sides, of at most 9, or with more padding on one side
    than on the other gets a square kernel of an odd side, filled up with zeros, and where that can be equal padding."""
    return _grown(r, lambda c, i, k, first: first)


def same(r: Rewrite) -> list[str]:
    """A convolution padded in another way than TensorFlow's SAME, but to the size that SAME gives, or of an even side
    above 2, gets a kernel with odd sides of at most 9, filled up with zeros so that its padding is that of SAME."""
    return _grown(r, lambda c, i, k, first: max((c.out[i] - 1) * c.strides[i] + k - c.size[i], 0) - first,
                  lambda c: c.out == tuple(-(-m // s) for m, s in zip(c.size, c.strides, strict=True)))


After = Callable[[Convolution, int, int, int], int]
"""(convolution, axis, side of the kernel, padding before) -> padding behind that is wanted."""


def _grown(r: Rewrite, after: After, fits: Callable[[Convolution], bool] | None = None) -> list[str]:
    done = []
    for n in nodes(r, "Conv"):
        c = convolution(r, n)
        if c is None or c.dilations != (1, 1) or (fits is not None and not fits(c)):
            continue
        found = _same(c, after) if fits else _square(c, after)
        if found is None:
            continue
        (up, left), side, pads = found
        wide = np.zeros((*c.weights.shape[:2], *side), np.float32)
        wide[:, :, up : up + c.kernel[0], left : left + c.kernel[1]] = c.weights
        change_conv(r, c, wide, pads=(pads[0][0], pads[1][0], pads[0][1], pads[1][1]))
        more = side[0] * side[1] / (c.kernel[0] * c.kernel[1])
        done.append(f"{c.name}: {c.kernel[0]}x{c.kernel[1]} padded by {_text(c.pads)} is {side[0]}x{side[1]} padded by "
                    f"{_text((pads[0][0], pads[1][0], pads[0][1], pads[1][1]))}; {more:.3g} times the multiplications")
    return done


Grown = tuple[Pair, Pair, tuple[Pair, Pair]]
"""(zeros before), sides, ((before, behind) of rows, of columns)."""


def _square(c: Convolution, after: After) -> Grown | None:
    """The smallest odd square with equal padding; without, if that cannot be and the kernel is none yet."""
    k = max(c.kernel)
    is_odd = c.kernel[0] == c.kernel[1] and k % 2 == 1
    even = c.pads[:2] == c.pads[2:]
    if is_odd and even:
        return None
    for side in range(k | 1, SIDE_MAX + 1, 2):
        axes = [_place(c, i, side, after) for i in (0, 1)]
        if axes[0] is not None and axes[1] is not None:
            return (axes[0][0], axes[1][0]), (side, side), (axes[0][1], axes[1][1])
    if is_odd or k >= SIDE_MAX:
        return None
    side = k | 1
    low = [(side - c.kernel[i]) // 2 for i in (0, 1)]
    ends = [(c.pads[i] + low[i], c.pads[i + 2] + side - c.kernel[i] - low[i]) for i in (0, 1)]
    return (low[0], low[1]), (side, side), (ends[0], ends[1])


def _same(c: Convolution, after: After) -> Grown | None:
    """The smallest sides, odd or 1 or 2 and square if they were, with the padding of SAME."""
    found = [_first(c, i, after) for i in (0, 1)]
    if found[0] is None or found[1] is None:
        return None
    sides = found[0][0], found[1][0]
    if c.kernel[0] == c.kernel[1]:
        sides = (max(sides), max(sides))
    both = [_place(c, i, sides[i], after, same=True) for i in (0, 1)]
    if both[0] is None or both[1] is None:
        return None
    (up, rows), (left, columns) = both[0], both[1]
    if sides == c.kernel and (rows[0], columns[0], rows[1], columns[1]) == c.pads:
        return None
    return (up, left), sides, (rows, columns)


def _first(c: Convolution, i: int, after: After) -> tuple[int, tuple[int, Pair]] | None:
    for side in range(c.kernel[i], SIDE_MAX + 1):
        if (side % 2 or side == 2) and (p := _place(c, i, side, after, same=True)) is not None:
            return side, p
    return None


def _place(c: Convolution, i: int, side: int, after: After, *, same: bool = False) -> tuple[int, Pair] | None:
    """(zeros before, (padding before, behind)) of a side of the kernel, so that the result is as it was."""
    for zeros in range(side - c.kernel[i] + 1):
        before = c.pads[i] + zeros
        behind = after(c, i, side, before)
        room = c.size[i] + before + behind - side
        if behind >= 0 and room >= 0 and room // c.strides[i] + 1 == c.out[i] \
                and (not same or before == (before + behind) // 2):
            return zeros, (before, behind)
    return None


def _text(numbers: tuple[int, ...] | NDArray[np.int64]) -> str:
    return ",".join(map(str, numbers))


SQUARE = Pass("square-kernel", square, always=False)
SAME = Pass("same-padding", same, always=False)
