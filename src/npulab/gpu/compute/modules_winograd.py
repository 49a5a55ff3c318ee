"""Convolutions of 3 x 3 taps with fewer multiplications, as SPIR-V, for Vulkan: three modules, of which the second is a
product for each of the (m + 2)^2 points. The algorithm and its matrices are those of `winograd`.

The image's patches and the products are float32 in scratch memory, whatever the numbers of images; of bytes int32
(`modules_integer_winograd`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError
from npulab.gpu.compute import modules_products, tiles
from npulab.gpu.compute.convolution import checked
from npulab.gpu.compute.modules import Layer, Module
from npulab.gpu.compute.modules_numbers import (
    FOUR,
    STORED,
    WHOLE,
    computed,
    counted,
    floats,
    fours,
    kept,
    load,
    padded,
    store,
)
from npulab.gpu.compute.modules_shapes import Shape
from npulab.gpu.compute.modules_tiles import Finish, ending, roles_of, shapes_of
from npulab.gpu.compute.problems import Convolution, Product
from npulab.gpu.compute.winograd import matrices
from npulab.gpu.spirv_builder import Shader, Type, Value

GROUP = Shape().group
"""Threads of what is before and after the products: channels or filters (in fours), patches."""


def convolution(what: Convolution, weights: NDArray[Any], bias: NDArray[Any] | None = None, size: int = 2,
                shape: Shape | None = None) -> Layer:
    """As `modules_convolution.convolution`. size: outputs of a patch each way, 2 or 4. shape: of the products' threads.

    Raises: UnsupportedError for int8, and unless taps are 3 x 3, strides and dilations 1 and groups 1.
    """
    floats(what.number, "Winograd's convolutions")
    if not tiles.suits_winograd(what) or size not in tiles.SIZES:
        raise UnsupportedError("Winograd's algorithm is here for 3 x 3 taps and strides of 1, F(2x2) and F(4x4)",
                               got=f"{what.kernel[0]} x {what.kernel[1]} taps, strides {what.strides}, dilations "
                                   f"{what.dilations}, {what.groups} groups, F({size}x{size})")
    checked(what, weights, bias)
    points, grid = (size + 2) ** 2, (-(-what.out[0] // size), -(-what.out[1] // size))
    patches = what.batch * grid[0] * grid[1]
    counted(what.batch * what.height * what.width * (what.channels + 3),
            what.batch * what.out[0] * what.out[1] * (what.filters + 3))
    g = np.array(matrices(size)[1], np.float64)
    u = np.einsum("ay,bx,oyxi->abio", g, g, weights.astype(np.float64)).reshape(points, what.channels, what.filters)
    middle = Product(points, patches, what.channels, what.filters, batched=True)
    product = modules_products.module(middle, {"input": FOUR, "weights": FOUR, "output": FOUR}, ending(middle),
                                      shape=shape)
    constants = {"weights": modules_products.packed(middle, u)}
    if bias is not None:
        constants["bias"] = padded(bias, np.float32)
    scratch = {"patches": 16 * points * patches * fours(what.channels),
               "products": 16 * points * patches * fours(what.filters)}
    outputs = from_products(what, size, grid, roles_of(what, {"products": FOUR}, bias is not None), ending(what))
    return Layer((to_patches(what, size, grid), replace(product, buffers=("patches", "weights", "products")), outputs),
                 shapes_of(what), what.number, constants, scratch)


def to_patches(what: Convolution, m: int, grid: tuple[int, int], zero: int = 0) -> Module:
    """[points, patches, channels] B^T d B of the image's patches, less the zero point."""
    s = Shader(GROUP, (STORED[what.number], WHOLE if what.number == "int8" else FOUR), ())
    n, width, b = m + 2, fours(what.channels), matrices(m)[2]
    patches = what.batch * grid[0] * grid[1]
    with s.when(s.both(s.global_id < width, s.global_y < patches)):
        image, y, x = _place(s, m, grid)
        columns: list[list[Value]] = []
        for j in range(n):  # a column after the other: few numbers live
            column = [_pixel(s, what, image, y + i - what.pads[0], x + j - what.pads[1], zero) for i in range(n)]
            columns.append([_sum(s, row, column) for row in b])
        for i in range(n):
            for j in range(n):
                value = _sum(s, b[j], [column[i] for column in columns])
                s.store(1, (s.global_y + (i * n + j) * patches) * width + s.global_id, value)
    return Module(s.assemble(), _groups(width, patches), ("input", "patches"), 0.0, 0)


def _pixel(s: Shader, what: Convolution, image: Value, y: Value, x: Value, zero: int) -> Value:
    """Four channels less the zero point, 0 of what is beyond the image."""
    there = s.both(y < what.height, x < what.width)
    at = s.select(there, (image * what.height + y) * what.width + x, s.constant(0))
    value = load(s, what.number, 0, at * fours(what.channels) + s.global_id)
    return s.select(there, value - zero if zero else value, s.constant(0, computed(what.number), 4))


def from_products(what: Convolution, m: int, grid: tuple[int, int], roles: Mapping[str, Type], finish: Finish
                  ) -> Module:
    """A^T M A of each patch's products, the first role, and what is fused to the convolution."""
    s, buffers = Shader(GROUP, list(roles.values()), ()), {r: i for i, r in enumerate(roles)}
    n, width, a = m + 2, fours(what.filters), matrices(m)[0]
    patches, (high, wide) = what.batch * grid[0] * grid[1], what.out
    with s.when(s.both(s.global_id < width, s.global_y < patches)):
        image, y, x = _place(s, m, grid)
        columns: list[list[Value]] = []
        for j in range(n):
            column = [s.load(0, (s.global_y + (i * n + j) * patches) * width + s.global_id) for i in range(n)]
            columns.append([_sum(s, row, column) for row in a])
        for i in range(m):
            for j in range(m):
                value = _sum(s, a[j], [column[i] for column in columns])
                with s.when(s.both(y + i < high, x + j < wide)):
                    at = ((image * high + y + i) * wide + x + j) * width + s.global_id
                    value = finish(s, buffers, value, s.global_id, at)
                    store(s, what.number, buffers["output"], at, kept(s, value, s.global_id, what.filters))
    return Module(s.assemble(), _groups(width, patches), tuple(roles), 0.0, 0)


def _place(s: Shader, m: int, grid: tuple[int, int]) -> tuple[Value, Value, Value]:
    """(image, row, column) of the thread's patch: of its first output."""
    down, across = grid
    return s.global_y // (down * across), s.global_y // across % down * m, s.global_y % across * m


def _groups(width: int, patches: int) -> tuple[int, int]:
    return -(-width // GROUP[0]), -(-patches // GROUP[1])


def _sum(s: Shader, factors: Sequence[Fraction], values: Sequence[Value]) -> Value:
    """Of the terms that are not zero, those by 1 and -1 first, the others by multiply-add."""
    terms = sorted(((f, v) for f, v in zip(factors, values, strict=True) if f), key=lambda term: abs(term[0]) != 1)
    first, value = terms[0]
    total = value if first == 1 else value * float(first)
    for factor, value in terms[1:]:
        if abs(factor) == 1:
            total = total + value if factor > 0 else total - value
        else:
            total = s.fma(value, s.like(float(factor), value), total)
    return total
