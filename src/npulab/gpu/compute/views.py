"""Views: how a tensor of a network lies in a dense buffer. Transposes, slices and most reshapes move nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


def row_major(shape: Sequence[int]) -> Shape:
    """Strides of a dense tensor, in elements."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class View:
    """Element (i, j, ...) lies at offset + i strides[0] + j strides[1] + ... of buffer `tensor`. Counted in elements.

    A stride of 0 repeats; negative ones go backwards.
    """

    tensor: int
    shape: Shape
    strides: Shape
    offset: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_dense(self) -> bool:
        """Row by row from the buffer's beginning. Strides of axes with one element do not matter."""
        return self.offset == 0 and all(
            n == 1 or a == b for n, a, b in zip(self.shape, self.strides, row_major(self.shape), strict=True))

    def transposed(self, perm: Sequence[int]) -> View:
        return View(self.tensor, tuple(self.shape[p] for p in perm), tuple(self.strides[p] for p in perm), self.offset)

    def sliced(self, axis: int, start: int, count: int, step: int = 1) -> View:
        """`count` elements from `start` on."""
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + start * strides[axis]
        shape[axis], strides[axis] = count, strides[axis] * step
        return View(self.tensor, tuple(shape), tuple(strides), offset)

    def picked(self, axis: int, index: int) -> View:
        """One element along the axis, which is gone."""
        found = self.sliced(axis, index, 1)
        return View(self.tensor, found.shape[:axis] + found.shape[axis + 1 :],
                    found.strides[:axis] + found.strides[axis + 1 :], found.offset)

    def broadcast(self, shape: Sequence[int]) -> View:
        """As ONNX and NumPy broadcast: to the right, axes of one element repeat."""
        missing = len(shape) - len(self.shape)
        own, strides = (1,) * missing + self.shape, (0,) * missing + self.strides
        return View(self.tensor, tuple(shape),
                    tuple(0 if n == 1 != m else s for n, m, s in zip(own, shape, strides, strict=True)), self.offset)

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """The same elements row by row under another shape; None if no strides do that."""
        if not self.elements:
            return View(self.tensor, tuple(shape), row_major(shape), self.offset)
        blocks: list[tuple[int, int]] = []  # (elements, stride of the last axis) of axes that run on into each other
        for n, s in zip(self.shape, self.strides, strict=True):
            if n == 1:
                continue
            if blocks and blocks[-1][1] == n * s:
                blocks[-1] = (blocks[-1][0] * n, s)
            else:
                blocks.append((n, s))
        strides: list[int] = []
        rest, step = (blocks.pop() if blocks else (1, 1))
        for n in reversed(shape):
            if n == 1:
                strides.append(0)
                continue
            while rest == 1 and blocks:
                rest, step = blocks.pop()
            if rest % n:
                return None
            strides.append(step)
            rest, step = rest // n, step * n
        return View(self.tensor, tuple(shape), tuple(reversed(strides)), self.offset)


def dense(tensor: int, shape: Sequence[int]) -> View:
    return View(tensor, tuple(shape), row_major(shape))


def nested(view: View) -> Shape:
    """Axes from the longest stride to the shortest: the order in which a dense copy lies most like the original.
    Repeated and single axes keep their places at the front."""
    return tuple(sorted(range(len(view.shape)), key=lambda i: (
        -abs(view.strides[i]) if view.strides[i] and view.shape[i] > 1 else -math.inf, i)))


def collapsed(shape: Shape, walks: Sequence[Shape]) -> tuple[Shape, list[Shape]]:
    """The same walk with as few axes as possible: those of one element go, those that run on in every one of `walks`
    (strides over `shape`) are one. At least one axis is left."""
    axes: list[tuple[int, list[int]]] = []
    for i, n in enumerate(shape):
        steps = [w[i] for w in walks]
        if n == 1:
            continue
        if axes and all(a == n * b for a, b in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = (axes[-1][0] * n, steps)
        else:
            axes.append((n, steps))
    axes = axes or [(1, [1] * len(walks))]
    return tuple(n for n, _ in axes), [tuple(s[k] for _, s in axes) for k in range(len(walks))]
