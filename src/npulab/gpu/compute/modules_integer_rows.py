"""int8 softmax and layer normalization as SPIR-V, for Vulkan: what `integer_rows` does in OpenCL C, of the same
arguments but the traits. Devices need no 64-bit integers.

Softmax is the same byte for byte. Of layer normalization Vulkan promises less than OpenCL, as it lets devices round
sums and products either way: before rint the first term is off by 17 2**-24 of itself at most, the second by 3 2**-24.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from npulab.gpu.compute.integer_rows import MOST, NEWTON, exponentials_of, factors_of
from npulab.gpu.compute.modules import Layer
from npulab.gpu.compute.modules_integers import doubled_high, wide
from npulab.gpu.compute.modules_numbers import inside, kept, load, padded
from npulab.gpu.compute.modules_rows import Row
from npulab.gpu.compute.problems import LayerNorm, Softmax
from npulab.gpu.spirv_builder import Shader, Value


def softmax(what: Softmax, scale_in: float) -> Layer:
    """`what.scale` is TFLite's beta. Raises: as `integer_rows.exponentials_of`, and where 32 bits do not count all
    elements."""
    constants = {"exponentials": exponentials_of(what, scale_in)}
    row = Row(what, ("input", "exponentials", "output"))
    s, least = row.s, row.s.constant(-128, "int", 4)

    def codes(i: Value) -> Value:
        return load(s, "int8", 0, row.start + i)

    most = s.variable(least)
    with row.each() as i:
        found = codes(i) if what.columns % 4 == 0 else s.select(inside(s, i, what.columns), codes(i), least)
        most.set(s.builtin("SMax", most.get(), found))
    lowest = s.constant(255, "int") - row.joined(most.get(), lambda a, b: s.builtin("SMax", a, b))

    def exponentials(i: Value) -> Value:
        at = s.bits(codes(i) + lowest, "uint")
        at = s.builtin("UMin", at, s.like(255, at))  # padding is 0, and may be above the largest
        return s.vector(*(s.load(1, s.lane(at, lane)) for lane in range(4)))

    def added(a: Value, b: Value) -> Value:
        return s.builtin("SMin", a + b, s.like(MOST, a))

    sums = s.variable(s.constant(0, "int", 4))
    with row.each() as i:
        sums.set(added(sums.get(), kept(s, s.bits((exponentials(i) + (1 << 11)) >> 12, "int"), i, what.columns)))
    factor, zeros = reciprocal(s, row.joined(sums.get(), added))

    row.stored(2, lambda i: shares(s, exponentials(i), factor, zeros))
    return row.layer(5.0, constants)


def reciprocal(s: Shader, total: Value) -> tuple[Value, Value]:
    """(1 / x, zeros): x = total << zeros, 1 to 2, in units of 2**-31 as the quotient; total: 2**19 to 2**28."""
    zeros = s.constant(12)
    for bit in range(20, 29):
        zeros = s.select(total >= 1 << bit, s.constant(31 - bit), zeros)
    half = s.bits(s.bits(total, "uint") << zeros >> 1, "int")
    y = doubled_high(s, s.constant(NEWTON[1], "int"), half) + NEWTON[0]
    for _ in range(3):
        y = y + (doubled_high(s, s.constant(1 << 29, "int") - doubled_high(s, half, y), y) << 2)
    return s.builtin("UMin", s.bits(y, "uint") << 1, s.constant((1 << 31) - 1)), zeros


def shares(s: Shader, exponentials: Value, factor: Value, zeros: Value) -> Value:
    """Products with `factor` over 2**31, then over 2**(35 - zeros): both roundings at once, in words of 32 bits."""
    high, low = wide(s, exponentials, s.spread(factor, 4))
    high = high + s.spread(s.constant(1) << (s.constant(33) - zeros), 4)
    high = s.select(low < (1 << 32) - (1 << 30), high, high + 1) >> s.spread(s.constant(34) - zeros, 4)
    return s.bits(s.builtin("UMin", high, s.like(255, high)), "int") - 128


def layer_norm(what: LayerNorm, scale_in: float, scale_out: float, zero_out: int, gamma: NDArray[Any] | None = None,
               beta: NDArray[Any] | None = None) -> Layer:
    """gamma, beta: [columns]; none: ones, zeros. Raises: as `integer_rows.factors_of`, and where 32 bits do not count
    all elements."""
    constants, epsilon = factors_of(what, scale_in, scale_out, zero_out, gamma, beta)
    row = Row(what, ("input", "gamma", "beta", "output"))
    s = row.s

    def codes(i: Value) -> Value:
        return load(s, "int8", 0, row.start + i)

    total, squares = row.total(codes), row.total(lambda i: codes(i) * codes(i))
    size = s.bits(s.builtin("SMax", total, s.constant(0, "int") - total), "uint")
    high, low = wide(s, s.constant(what.columns), s.bits(squares, "uint"))
    less_high, less_low = wide(s, size, size)
    high = high - less_high - s.select(low < less_low, 1, s.constant(0))
    v = s.fma(s.convert(high, "float"), s.constant(2.0**32, "float"), s.convert(low - less_low, "float"))
    part = s.spread(s.builtin("InverseSqrt", v + epsilon), 4)

    def normal(i: Value) -> Value:
        d = s.convert(codes(i) * what.columns - total, "float")
        value = s.fma(d * part, s.load(1, i), s.load(2, i))
        value = s.builtin("FMin", s.builtin("FMax", value, s.like(-128.0 - zero_out, value)),
                          s.like(127.0 - zero_out, value))
        return s.convert(s.builtin("RoundEven", value), "int") + zero_out

    row.stored(3, normal)
    return row.layer(8.0, {role: padded(array, array.dtype) for role, array in constants.items()})
