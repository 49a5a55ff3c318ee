"""Layouts: in which order a stored tensor keeps the axes of the tensor that the source graph speaks of.

An order is a tuple: stored axis i is axis order[i] of the source. (0, 2, 3, 1) stores NCHW as NHWC. A transposition of
the source is then another order of the same bytes, and costs nothing until somebody needs a certain one.
"""

from __future__ import annotations

from collections.abc import Sequence

Order = tuple[int, ...]


def plain(rank: int) -> Order:
    """The source's own order."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """Channels, the second axis, at the end: (0, 2, 3, 1)."""
    return (0, *range(2, rank), 1)


def channels_first(rank: int) -> Order:
    """Channels, the last axis, behind the batch: (0, 3, 1, 2). The inverse of `channels_last`."""
    return (0, rank - 1, *range(1, rank - 1))


def inverse(order: Sequence[int]) -> Order:
    """
    >>> inverse((0, 2, 3, 1))
    (0, 3, 1, 2)
    """
    out = [0] * len(order)
    for i, axis in enumerate(order):
        out[axis] = i
    return tuple(out)


def stored(shape: Sequence[int], order: Order) -> tuple[int, ...]:
    """The stored shape of a tensor.

    >>> stored((1, 3, 8, 9), (0, 2, 3, 1))
    (1, 8, 9, 3)
    """
    return tuple(shape[axis] for axis in order)


def between(old: Order, new: Order) -> Order:
    """The permutation that TRANSPOSE takes to bring stored order `old` to `new`."""
    at = inverse(old)
    return tuple(at[axis] for axis in new)


def alike(shape: Sequence[int], a: Order, b: Order) -> bool:
    """Whether both orders keep the elements in the same sequence: axes of one element may lie anywhere.

    >>> alike((1, 3, 1, 1), (0, 1, 2, 3), (0, 2, 3, 1))
    True
    """
    return [axis for axis in a if shape[axis] != 1] == [axis for axis in b if shape[axis] != 1]


def transposed(order: Order, perm: Sequence[int]) -> Order:
    """The order of the same bytes after the source's Transpose by `perm`."""
    back = inverse(perm)
    return tuple(back[axis] for axis in order)


def reshaped(old: Sequence[int], new: Sequence[int], order: Order) -> Order | None:
    """The order in which bytes stored by `order` are the source's tensor reshaped from `old` to `new`; None: none.

    Axes split or merge within blocks of equal size; a layout survives if it moves such blocks as a whole.

    >>> reshaped((1, 6, 4, 5), (1, 2, 3, 4, 5), (0, 2, 3, 1))
    (0, 3, 4, 1, 2)
    """
    blocks = _blocks(old, new)
    if blocks is None:
        return None
    big = [axis for axis in order if old[axis] != 1]
    pieces: list[tuple[int, tuple[int, ...]]] = []
    loose: list[int] = []
    for olds, news in blocks:
        own = [axis for axis in olds if old[axis] != 1]
        if not own:
            loose += news
            continue
        at = big.index(own[0])
        if big[at : at + len(own)] != own:
            return None
        pieces.append((at, news))
    pieces.sort()
    if not pieces:
        return plain(len(new))
    found = [axis for _, news in pieces for axis in news]
    for axis in loose:  # where it lies does not matter; in the source's place if the neighbours allow it
        found.insert(found.index(axis - 1) + 1 if axis - 1 in found else 0, axis)
    return tuple(found)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Runs of axes, as short as can be, that hold equally many elements on both sides."""
    out: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b, i0, j0 = 1, 1, i, j
        if i < len(old) and old[i] == 1:
            i += 1
        elif j < len(new) and new[j] == 1:
            j += 1
        else:
            if i >= len(old) or j >= len(new):
                return None
            a, b, i, j = old[i], new[j], i + 1, j + 1
            while a != b:
                if a < b and i < len(old):
                    a, i = a * old[i], i + 1
                elif b < a and j < len(new):
                    b, j = b * new[j], j + 1
                else:
                    return None
        out.append((tuple(range(i0, i)), tuple(range(j0, j))))
    return out
