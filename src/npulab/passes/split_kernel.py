"""Large and dilated kernels as sums of small ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import WEIGHTS_MAX, Convolution, Pair, add, add_conv, add_slice, add_sum, convolution, nodes

TILES_MAX = 64
"""Of one kernel: more convolutions than that help nobody."""
SHIFT = 2
"""Rows or columns that a 3x3 kernel moves an image at most."""


def split(r: Rewrite) -> list[str]:
    """A convolution whose kernel, zeros of its dilation included, is larger than NUMBER (3) is the sum of convolutions
    with its stride and parts of the kernel of at most NUMBER x NUMBER, each over the image padded or cropped to where
    the part lies. Parts of zeros are left out."""
    done = []
    limit = r.number or 3
    for n in nodes(r, "Conv"):
        c = convolution(r, n)
        if c is None or max(c.reach) <= limit or c.large:
            continue
        tiles = list(_tiles(c.dense(), limit))
        if not 0 < len(tiles) <= TILES_MAX:
            continue
        cropped: dict[tuple[int, ...], int] = {}
        parts: list[int] = []
        for (y, x), weights in tiles:
            rows = _needed(c, 0, y, weights.shape[2])
            columns = _needed(c, 1, x, weights.shape[3])
            if rows is None or columns is None:
                continue
            key = (*rows[:2], *columns[:2])
            if key not in cropped:
                whole = key == (0, c.size[0], 0, c.size[1])
                cropped[key] = c.data if whole else add_slice(
                    r, n, f"{c.name}_crop_{len(cropped)}", c.data, (2, 3), (key[0], key[2]), (key[1], key[3]))
            parts.append(add_conv(r, n, f"{c.name}_part_{len(parts)}", cropped[key], weights,
                                  c.bias if not parts else -1, strides=c.strides, groups=c.groups,
                                  pads=(rows[2], columns[2], rows[3], columns[3])))
        if not parts:
            continue
        r.substitute(n.outputs[0], add_sum(r, n, c.name, parts))
        done.append(f"{c.name}: {c.kernel[0]}x{c.kernel[1]} is {len(parts)} of at most {limit}x{limit}")
    return done


def _tiles(weights: NDArray[np.float32], limit: int) -> Iterator[tuple[Pair, NDArray[np.float32]]]:
    """((row, column), part) of a kernel, without rows and columns of zeros at a part's border."""
    for y in _starts(weights.any(axis=(0, 1, 3)), limit):
        band = weights[:, :, y : y + limit]
        for x in _starts(band.any(axis=(0, 1, 2)), limit):
            part = band[:, :, :, x : x + limit]
            rows, columns = (np.flatnonzero(part.any(axis=axes)) for axes in ((0, 1, 3), (0, 1, 2)))
            yield (y + int(rows[0]), x + int(columns[0])), part[:, :, rows[0] : rows[-1] + 1,
                                                                columns[0] : columns[-1] + 1]


def _starts(used: Any, limit: int) -> list[int]:
    """Where parts of `limit` begin so that they cover all that is used."""
    found: list[int] = []
    for i in np.flatnonzero(used).tolist():
        if not found or i >= found[-1] + limit:
            found.append(i)
    return found


def _needed(c: Convolution, axis: int, offset: int, length: int) -> tuple[int, int, int, int] | None:
    """(first, end, padding before, after): what of rows or columns a part at `offset` of the kernel reads; None if
    nothing but padding."""
    size, stride = c.size[axis], c.strides[axis]
    start = offset - c.pads[axis]
    end = start + (c.out[axis] - 1) * stride + length
    if end <= 0 or start >= size:
        return None
    first, before, after = max(start, 0), max(-start, 0), max(end - size, 0)
    return first, (end if size - end >= stride else size), before, after


def small(r: Rewrite) -> list[str]:
    """A convolution with a kernel above 3x3, padded to its image's size, is the sum of 3x3 convolutions of stride 1
    with padding of at most 2, over the image moved by 3x3 convolutions of one 1; where it has a stride, a max-pool of
    1x1 takes every so many rows and columns. Nothing but Conv, Add and MaxPool; several times the multiplications."""
    done = []
    for n in nodes(r, "Conv"):
        c = convolution(r, n)
        if c is None or max(c.reach) <= 3 or c.large or 9 * c.channels**2 > WEIGHTS_MAX:
            continue
        tiles = list(_tiles(c.dense(), 3))
        fine = (c.size[0] + c.pads[0] + c.pads[2] - c.reach[0] + 1, c.size[1] + c.pads[1] + c.pads[3] - c.reach[1] + 1)
        places = [(_moved(c, 0, fine[0], y, w.shape[2]), _moved(c, 1, fine[1], x, w.shape[3])) for (y, x), w in tiles]
        if not 0 < len(tiles) <= TILES_MAX or any(p is None or q is None for p, q in places):
            continue
        images: dict[Pair, int] = {(0, 0): c.data}
        parts: list[int] = []
        for (_, weights), (rows, columns) in zip(tiles, places, strict=True):
            assert rows is not None
            assert columns is not None
            data = _move(r, c, images, (rows[0], columns[0]))
            square = np.zeros((*weights.shape[:2], 3, 3), np.float32)
            square[:, :, : weights.shape[2], : weights.shape[3]] = weights
            spread = 3 - weights.shape[2], 3 - weights.shape[3]
            pads = (rows[1], columns[1], rows[2] + spread[0], columns[2] + spread[1])
            if max(pads) > SHIFT:
                square, pads = weights, (rows[1], columns[1], rows[2], columns[2])
            parts.append(add_conv(r, n, f"{c.name}_part_{len(parts)}", data, square, c.bias if not parts else -1,
                                  groups=c.groups, pads=pads))
        total = add_sum(r, n, c.name, parts)
        if c.strides != (1, 1):
            total = add(r, n, f"{c.name}_every", "MaxPool", (total,), {"kernel_shape": (1, 1), "strides": c.strides},
                          shape=r.values[n.outputs[0]].shape)
        r.substitute(n.outputs[0], total)
        moves = len(images) - 1
        done.append(f"{c.name}: {c.kernel[0]}x{c.kernel[1]} is {len(parts)} of 3x3, and {moves} that move the image"
                    + (f"; {c.strides[0] * c.strides[1]} times the multiplications"
                       if c.strides != (1, 1) else ""))
    return done


def _moved(c: Convolution, axis: int, out: int, offset: int, length: int) -> tuple[int, int, int] | None:
    """(move, padding before, after) so that a part at `offset` of the kernel reads the moved image: row i of it is row
    i + move of the image. None where that needs a crop or more padding."""
    size = c.size[axis]
    start = offset - c.pads[axis]
    move = start if start > 0 else min(start + SHIFT, 0)
    before = move - start
    after = start - move + out - 1 + length - size
    if not 0 <= before <= SHIFT or not 0 <= after <= SHIFT or abs(move) >= size or (move < 0 and after > 0):
        return None
    return move, before, after


def _move(r: Rewrite, c: Convolution, images: dict[Pair, int], move: Pair) -> int:
    """The image moved by `move` rows and columns, by as few convolutions as are left to do."""
    if move in images:
        return images[move]
    step = (int(np.clip(move[0], -SHIFT, SHIFT)), int(np.clip(move[1], -SHIFT, SHIFT)))
    data = _move(r, c, images, (move[0] - step[0], move[1] - step[1]))
    groups = 1 if c.groups == 1 else c.channels
    weights = np.zeros((c.channels, c.channels // groups, 3, 3), np.float32)
    top, left = (1 if abs(s) < SHIFT else 2 if s < 0 else 0 for s in step)
    pads = (top, left, 2 - top, 2 - left)
    every = np.arange(c.channels)
    weights[every, every % weights.shape[1], step[0] + top, step[1] + left] = 1
    images[move] = add_conv(r, c.node, f"{c.name}_move_{len(images) - 1}", data, weights, pads=pads, groups=groups)
    return images[move]


PASS = Pass("split-kernel", split, always=False, number=3)
SMALL = Pass("small-kernels", small, always=False)
