"""Convolutions of NHWC images as SPIR-V, for Vulkan, with bias, residual and activation: of one group, of several, and
depthwise ones. `modules_winograd` has those of 3 x 3 taps with fewer multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError
from npulab.gpu.compute.convolution import checked
from npulab.gpu.compute.modules import Layer, Module
from npulab.gpu.compute.modules_numbers import (
    DTYPES,
    ONE,
    STORED,
    computed,
    counted,
    floats,
    fours,
    load,
    multiply_add,
    padded,
    single,
)
from npulab.gpu.compute.modules_products import add
from npulab.gpu.compute.modules_shapes import Shape
from npulab.gpu.compute.modules_tiles import Finish, Tile, ending, roles_of, shapes_of
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.spirv_builder import Shader, Type, Value, Variable


def convolution(what: Convolution, weights: NDArray[Any], bias: NDArray[Any] | None = None, halves: bool = False,
                shape: Shape | None = None) -> Layer:
    """output = activation(convolution(input, weights) + bias + residual). `weights`: OHWI, `bias`: [filters] or None.
    halves, shape: as of `modules_products.product`.

    Raises: InvariantError for arrays of other shapes; UnsupportedError for int8 (`modules_integers`), for halves unless
    float16 and by fours of channels, and where 32 bits do not count all elements.
    """
    floats(what.number, "convolutions", halves)
    if halves and (is_depthwise(what) or is_gathered(what)):
        raise UnsupportedError("a convolution with few channels for a filter adds nothing up as halves",
                               got=f"{what.channels} channels in {what.groups} groups")
    checked(what, weights, bias)
    constants = {"weights": packed(what, weights, DTYPES[what.number])}
    if bias is not None:
        constants["bias"] = padded(bias, np.float32)
    roles = {"input": read_as(what), "weights": STORED[what.number]}
    made = module(what, roles_of(what, roles, bias is not None), ending(what), halves=halves,
                  shape=shape)
    return Layer((made,), shapes_of(what), what.number, constants)


def is_depthwise(what: Convolution) -> bool:
    """A filter of each channel."""
    return what.groups == what.channels == what.filters


def is_gathered(what: Convolution) -> bool:
    """Four filters do not read fours of the same channels: each has its own, one after the other."""
    ragged = what.channels // what.groups % 4 or what.filters // what.groups % 4
    return what.groups > 1 and not is_depthwise(what) and bool(ragged)


def read_as(what: Convolution) -> Type:
    """What the image's buffer is of."""
    return (ONE if is_gathered(what) else STORED)[what.number]


def packed(what: Convolution, weights: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """OHWI to [taps, channels of a group, filters]; the last two are padded, channels where they are read by fours."""
    by_fours = not (is_depthwise(what) or is_gathered(what))
    matrix = weights.transpose(1, 2, 3, 0).reshape(math.prod(what.kernel), -1, what.filters)
    return padded(np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % 4 if by_fours else 0), (0, 0))), dtype)


def module(what: Convolution, roles: dict[str, Type], finish: Finish, zero: int = 0, halves: bool = False,
           shape: Shape | None = None) -> Module:
    """zero: the image's zero point, of int8; what is beyond the image is that. With "corrections" among the roles,
    [taps, filters] of int32, sums over a tap begin with them; otherwise, unless each filter reads its own channels,
    nothing is done about it here: `finish` is to."""
    height, width = what.out
    rows, group = what.batch * height * width, what.channels // what.groups
    counted(what.batch * what.height * what.width * (what.channels + 3), math.prod(what.kernel) * (group + 3)
            * (what.filters + 3))
    t = Tile(rows, what.filters, 1, roles, shape)
    s, number = t.s, what.number
    with s.when(t.there):
        window = _Window(s, what, t.mine())
        sums = t.sums(number)
        with s.loop(what.kernel[0]) as ky, s.loop(what.kernel[1]) as kx:
            tap = ky * what.kernel[1] + kx
            starts, shares = window.seen(ky, kx)
            if is_depthwise(what):
                row, deep = load(s, number, t.buffers["weights"], tap * t.width + t.column), 0
                xs = [load(s, number, t.buffers["input"], start * t.width + t.column) for start in starts]
                _weigh(s, sums, xs, shares, row, zero)
            elif is_gathered(what):
                deep = group
                _gathered(t, what, sums, starts, shares, tap, zero)
            else:
                deep = fours(group)
                parts = sums
                if shares is not None:
                    begin = s.load(t.buffers["corrections"], tap * t.width + t.column) if zero else None
                    parts = t.sums(number, begin)
                _dense(t, what, parts, starts, tap, halves)
                if shares is not None:
                    for total, part, share in zip(sums, parts, shares, strict=True):
                        total.set(multiply_add(s, part.get(), s.spread(share, 4), total.get()))
        t.stored(number, [x.get() for x in sums], finish)
    return t.module(what.operations, what.kernel[0] * (1 + what.kernel[1] * (1 + deep)))


class _Window:
    """Where the taps of some pixels of the output are in the image."""

    def __init__(self, s: Shader, what: Convolution, pixels: Sequence[Value]) -> None:
        self.s, self.what = s, what
        height, width = what.out
        self.images = [p // (height * width) * what.height for p in pixels]
        self.tops = [p // width % height * what.strides[0] for p in pixels]
        self.lefts = [p % width * what.strides[1] for p in pixels]

    def seen(self, ky: Value, kx: Value) -> tuple[list[Value], list[Value] | None]:
        """Pixels under a tap, and 1 for those in the image, 0 and 0 for the others; None where no tap is outside."""
        s, what = self.s, self.what
        kind = computed(what.number)
        places, shares = [], []
        for image, top, left in zip(self.images, self.tops, self.lefts, strict=True):
            y = top + ky * what.dilations[0] - what.pads[0]  # below zero: very large
            x = left + kx * what.dilations[1] - what.pads[1]
            place = (image + y) * what.width + x
            if any(what.pads):
                there = s.both(y < what.height, x < what.width)
                place = s.select(there, place, s.constant(0))
                shares.append(s.select(there, 1, s.constant(0, kind)))
            places.append(place)
        return places, shares or None


def _dense(t: Tile, what: Convolution, sums: Sequence[Variable], starts: Sequence[Value], tap: Value, halves: bool
           ) -> None:
    """Products of a tap, by fours of channels."""
    s, number, inner = t.s, what.number, fours(what.channels // what.groups)
    before = t.column // (what.filters // what.groups // 4) * inner if what.groups > 1 else s.constant(0)
    starts = [start * fours(what.channels) + before for start in starts]
    with s.loop(inner) as k:
        xs = [load(s, number, t.buffers["input"], start + k) for start in starts]
        first = (tap * inner + k) * 4
        rows = [load(s, number, t.buffers["weights"], (first + i) * t.width + t.column) for i in range(4)]
        add(t, sums, xs, rows, halves)


def _gathered(t: Tile, what: Convolution, sums: Sequence[Variable], starts: Sequence[Value],
              shares: Sequence[Value] | None, tap: Value, zero: int) -> None:
    """Products of a tap: each filter has its own channels."""
    s, inner, each = t.s, what.channels // what.groups, what.filters // what.groups
    filters = [s.builtin("UMin", t.column * 4 + i, s.constant(what.filters - 1)) for i in range(4)]
    channels = [f // each * inner for f in filters]
    with s.loop(inner) as k:
        row = load(s, what.number, t.buffers["weights"], (tap * inner + k) * t.width + t.column)
        xs = [s.vector(*(single(s, what.number, t.buffers["input"], start * (4 * fours(what.channels)) + c + k)
                         for c in channels)) for start in starts]
        _weigh(s, sums, xs, shares, row, zero)


def _weigh(s: Shader, sums: Sequence[Variable], xs: Sequence[Value], shares: Sequence[Value] | None, row: Value,
           zero: int) -> None:
    """To each of `sums` its four numbers of `xs`, less the zero point, times those of `row`."""
    for i, (total, x) in enumerate(zip(sums, xs, strict=True)):
        if zero:
            x = x - zero
        if shares is not None:
            x = x * s.spread(shares[i], 4)
        total.set(multiply_add(s, x, row, total.get()))
