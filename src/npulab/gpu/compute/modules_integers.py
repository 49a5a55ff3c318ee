"""int8 convolutions and products as SPIR-V, for Vulkan, byte for byte as TFLite's reference kernels compute them: what
`integers` does in OpenCL C, and the same arguments.

Devices need no 64-bit integers: the product of a sum and its multiplier is added up from 16-bit parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.gpu.compute import modules_convolution
from npulab.gpu.compute.integers import checked, filters_of
from npulab.gpu.compute.modules import Layer
from npulab.gpu.compute.modules_numbers import STORED, WHOLE, padded
from npulab.gpu.compute.modules_shapes import Shape
from npulab.gpu.compute.modules_tiles import Finish, shapes_of
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.spirv_builder import Shader, Value


def product(batch: int, rows: int, inner: int, columns: int, weights: NDArray[Any], bias: NDArray[Any] | None,
            zero_in: int, multipliers: Sequence[int], shifts: Sequence[int], zero_out: int, low: int = -128,
            high: int = 127, shape: Shape | None = None) -> Layer:
    """"input" [batch, rows, inner] -> "output" [batch, rows, columns]; weights: [columns, inner]."""
    what = Convolution(batch, 1, rows, inner, columns, number="int8")
    found = convolution(what, filters_of(weights, inner, columns), bias, zero_in, multipliers, shifts, zero_out, low,
                        high, shape)
    return replace(found, shapes={"input": (batch, rows, inner), "output": (batch, rows, columns)})


def convolution(what: Convolution, weights: NDArray[Any], bias: NDArray[Any] | None, zero_in: int,
                multipliers: Sequence[int], shifts: Sequence[int], zero_out: int, low: int = -128, high: int = 127,
                shape: Shape | None = None) -> Layer:
    """weights: int8 OHWI [filters, *kernel, channels // groups], zero point 0; bias: int32 [filters].
    multipliers (0 or 2**30..2**31 - 1), shifts (-31..30): of each filter. Activations are in low and high; they and the
    zero points are bytes. shape: as of `modules_products.product`.

    Raises: as `integers.checked`; UnsupportedError where 32 bits do not count all elements, too.
    """
    checked(what, weights, bias, zero_in, multipliers, shifts, zero_out, low, high)
    start = np.zeros(what.filters, np.int64) if bias is None else np.asarray(bias, np.int64)
    own = modules_convolution.is_depthwise(what) or modules_convolution.is_gathered(what)
    # what the zero point adds to sums: of each tap where some may be outside, of all
    taps = zero_in * modules_convolution.packed(what, weights, np.int64).sum(1)[:, :what.filters]
    roles = {"input": modules_convolution.read_as(what), "weights": STORED["int8"]}
    constants = {"weights": modules_convolution.packed(what, weights, np.int8)}
    if any(what.pads) and not own and zero_in:
        roles["corrections"], constants["corrections"] = WHOLE, padded(-taps, np.int32)
    elif not own:
        start = start - taps.sum(0)
    constants["rescale"] = rescale_of(start, multipliers, shifts)
    roles |= {"rescale": WHOLE, "output": STORED["int8"]}
    module = modules_convolution.module(what, roles, ending(zero_out, low, high), zero_in, shape=shape)
    return Layer((module,), shapes_of(what), "int8", constants)


def rescale_of(start: NDArray[Any], multipliers: Sequence[int], shifts: Sequence[int]) -> NDArray[np.int32]:
    """One buffer: devices need bind no more than four, and many bind eight."""
    table = padded(np.array([start, multipliers, shifts], np.int64), np.int32)  # int32 wraps, as there
    return np.ascontiguousarray(table.reshape(3, -1, 4).transpose(1, 0, 2))


def ending(zero_out: int, low: int, high: int, divided: int = 0) -> Finish:
    """Of sums * 2**divided, with the table of `rescale`."""
    def finish(s: Shader, buffers: Mapping[str, int], value: Value, column: Value, at: Value) -> Value:
        start, multiplier, shift = (s.load(buffers["rescale"], column * 3 + i) for i in range(3))
        value = s.typed("ShiftRightArithmetic", value.type, value, s.like(divided, value)) if divided else value
        value = requantized(s, value + start, multiplier, shift) + zero_out
        return s.builtin("SMin", s.builtin("SMax", value, s.like(low, value)), s.like(high, value))

    return finish


def requantized(s: Shader, sums: Value, multiplier: Value, shift: Value) -> Value:
    """sums * multiplier * 2**(shift - 31), with both roundings of TFLite's MultiplyByQuantizedMultiplier, of ints or
    vectors of them. What is shifted left wraps."""
    none = s.like(0, shift)
    left, right = (s.bits(s.builtin("SMax", x, none), "uint") for x in (shift, none - shift))
    x = doubled_high(s, s.bits(s.bits(sums, "uint") << left, "int"), multiplier)
    mask = (s.like(1, right) << right) - 1
    below, most = s.bits(x, "uint") & mask, s.select(x < 0, 1, s.like(0, right)) + (mask >> 1)
    down = s.typed("ShiftRightArithmetic", x.type, x, right)
    return s.select(below < most + 1, none, s.like(1, none)) + down


def doubled_high(s: Shader, x: Value, m: Value) -> Value:
    """(x m + 2**30) >> 31, of ints, 0 <= m: x m / 2**31, ties up."""
    negative = x < 0
    size, by = s.bits(s.select(negative, s.like(0, x) - x, x), "uint"), s.bits(m, "uint")
    high, low = wide(s, size, by)
    # of what is negative, ties go to the smaller size
    added = low + s.select(negative, (1 << 30) - 1, s.like(1 << 30, low))
    high = high + s.select(added < low, 1, s.like(0, high))
    found = s.bits(high << 1 | added >> 31, "int")
    return s.select(negative, s.like(0, found) - found, found)


def wide(s: Shader, a: Value, b: Value) -> tuple[Value, Value]:
    """(high, low) words of a b, of uints."""
    a0, a1, b0, b1 = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    first = a1 * b0 + (a0 * b0 >> 16)  # below 2**32
    second = a0 * b1 + (first & 0xFFFF)
    return a1 * b1 + (first >> 16) + (second >> 16), a * b
