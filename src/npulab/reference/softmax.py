"""Softmax of codes in fixed point, as TFLite's reference kernel computes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from npulab.errors import UnsupportedError
from npulab.reference.requantize import divide_by_power, high_mul, multiply, quantized_multiplier, wrapped
from npulab.reference.types import Array, Stored

EXTRA_BITS = 12
"""Integer bits of sums of exponentials, which leaves 19 fraction bits."""


def softmax(x: Stored, out: Stored, beta: float) -> Callable[[Array], Array]:
    """Codes (..., C) -> codes along the last axis; out.scale is 1/256 (16 bits: 1/32768) and taken for granted.

    Raises: UnsupportedError for types that have no such kernel.
    """
    if x.dtype == out.dtype == np.int16:
        return _sixteen(x, beta)
    if x.dtype.itemsize > 1:
        raise UnsupportedError("SOFTMAX has no integer arithmetic of these types", got=f"{x.dtype} to {out.dtype}")
    exps = exponentials(x.scale, beta)
    shares = divide_by_power(exps, EXTRA_BITS)
    bits = out.dtype.itemsize * 8

    def step(codes: Array) -> Array:
        place = codes.astype(np.int64) - codes.max(axis=-1, keepdims=True) + 255
        total = np.sum(shares[place], axis=-1, keepdims=True)
        zeros = 32 - np.frexp(total.astype(np.float64))[1].astype(np.int64)  # leading zeros of 32 bits
        scale = one_over_one_plus((total << zeros) - (1 << 31))
        steps = divide_by_power(high_mul(scale, exps[place]), EXTRA_BITS - zeros + 31 - bits)
        return np.asarray(np.clip(steps + out.low, out.low, out.high), out.dtype)

    return step


def exponentials(scale: float, beta: float) -> Array:
    """exp(beta scale (i - 255)) in units of 2**-31, i in 0..255: of a code that is 255 - i below the row's largest.
    0 of those so far below that they count for nothing.

    Raises: UnsupportedError where TFLite's fixed point does not hold beta scale.
    """
    real = min(float(np.float32(beta)) * float(np.float32(scale)) * (1 << 26), 2.0**31 - 1)
    if real <= 1:
        raise UnsupportedError("SOFTMAX has an input scale too small for its fixed point", got=f"{scale:g}")
    m, left = quantized_multiplier(real)
    lowest = -int(np.floor(31 * 2.0**26 / 2.0**left))
    differences = np.arange(-255, 1, dtype=np.int64)
    exps = exp_of_negative(high_mul(wrapped(differences << left), m))
    return np.where(differences < lowest, 0, exps)


def exp_of_negative(a: Array) -> Array:
    """exp of numbers with 26 fraction bits, not above 0, in units of 2**-31.

    The part above -1/4 by a polynomial, the rest by a product of exp(-1/4), exp(-1/2), ... exp(-16).
    """
    quarter = np.int64(1) << 24
    rest = (a & (quarter - 1)) - quarter
    result = _exp_near_zero(wrapped(rest << 5))
    remainder = rest - a
    for exponent in range(-2, 5):
        factor = int(np.rint(np.exp(-(2.0**exponent)) * 2**31))
        result = np.where(remainder & (1 << (26 + exponent)), high_mul(result, factor), result)
    return np.asarray(np.where(a == 0, 2**31 - 1, result), np.int64)


def _exp_near_zero(a: Array) -> Array:
    """exp of -1/4..0 in units of 2**-31: Taylor about -1/8, to the fourth power."""
    start, third = int(np.rint(np.exp(-1 / 8) * 2**31)), int(np.rint(2**31 / 3))
    x = a + (1 << 28)
    x2 = high_mul(x, x)
    x3, x4 = high_mul(x2, x), high_mul(x2, x2)
    tail = divide_by_power(high_mul(divide_by_power(x4, 2) + x3, third) + x2, 1)
    return np.asarray(np.minimum(start + high_mul(x + tail, start), 2**31 - 1), np.int64)


def one_over_one_plus(a: Array) -> Array:
    """1 / (1 + a) of 0..1 in units of 2**-31: three Newton steps from 48/17 - 32/17 x."""
    half = (a + (1 << 31)) >> 1  # (a + 1) / 2, 1 being 2**31 - 1, halves up
    x = round(48 / 17 * 2**29) + high_mul(half, round(-32 / 17 * 2**29))
    for _ in range(3):
        product = high_mul(half, x)
        x = wrapped(x + wrapped(_saturating_shift(high_mul(x, (1 << 29) - product), 2)))
    return _saturating_shift(x, 1)


def _saturating_shift(x: Array, left: int) -> Array:
    return np.asarray(np.clip(x << left, -(2**31), 2**31 - 1), np.int64)


def _sixteen(x: Stored, beta: float) -> Callable[[Array], Array]:
    """16 bits: exponentials and reciprocals from tables of 513 numbers with interpolation."""
    real = float(np.float32(x.scale) * np.float32(beta)) / (10.0 / 65535.0)
    m, shift = quantized_multiplier(real)

    def step(codes: Array) -> Array:
        exps_of, reciprocal_of = _tables()
        wide = codes.astype(np.int64)
        scaled = multiply(wide - wide.max(axis=-1, keepdims=True), m, shift)
        exps = _lookup(np.clip(scaled + 32767, -32768, 32767), exps_of)
        total = exps.sum(axis=-1, keepdims=True)
        zeros = 32 - np.frexp(total.astype(np.float64))[1].astype(np.int64)
        shifted = ((total << (zeros - 1)) + (1 << 13)) >> 14
        reciprocal = _lookup(np.clip(shifted - (1 << 15) - (1 << 16), -32768, 32767), reciprocal_of)
        right = 31 - zeros
        return np.asarray(np.clip((exps * reciprocal + (np.int64(1) << (right - 1))) >> right, 0, 32767), np.int16)

    return step


@lru_cache(maxsize=1)
def _tables() -> tuple[Array, Array]:
    """(exp of -10..0, 1 / (1 + x) of 0..1), 513 numbers each in units of 2**-15."""
    return (_sampled(np.exp, 10.0 / 65535, 32767), _sampled(lambda v: 1 / (1 + v), 1.0 / 65535, -32768))


def _sampled(of: Callable[[Array], Array], scale: float, zero: int) -> Array:
    bottom, top = scale * (-32768 - zero), scale * (32767 - zero)
    step = (top - bottom) / 512
    unit = 65536 / (2.0 / 65535 * 65535)
    i = np.arange(512)
    value, next_value = of(bottom + i * step), of(bottom + (i + 1) * step)
    middle = of(bottom + i * step + step / 2)
    sample = _half_away(value * unit)
    between = _half_away((next_value * unit + sample) / 2)
    bias = _half_away((between - _half_away(middle * unit)) / 2)
    last = _half_away(of(np.array([top])) * unit)
    return np.asarray(np.clip(np.concatenate([sample - bias, last]), -32768, 32767), np.int64)


def _lookup(v: Array, table: Array) -> Array:
    place, offset = 256 + (v >> 7), v & 0x7F
    base = table[place]
    return np.asarray(base + (((table[place + 1] - base) * offset + 64) >> 7), np.int64)


def _half_away(x: Array) -> Array:
    return np.asarray(np.trunc(x + np.copysign(0.5, x)))
