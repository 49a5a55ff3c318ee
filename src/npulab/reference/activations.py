"""Functions of one number: clamps, and everything that 8 bits turn into a table of 256 codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from npulab.errors import UnsupportedError
from npulab.reference.requantize import divide_by_power, multiply, quantized_multiplier
from npulab.reference.types import Array, Stored

One = Callable[[Array], Array]
BOUNDS = {"relu": (0.0, np.inf), "relu6": (0.0, 6.0), "relu_n1_to_1": (-1.0, 1.0), "relu_0_to_1": (0.0, 1.0)}


def fused(activation: str, out: Stored) -> tuple[int, int]:
    """(lowest, highest) code after a fused activation: its ends as codes, rounded half away, within the type.

    Raises: UnsupportedError for one that is no clamp.
    """
    if activation == "none":
        return out.low, out.high
    if activation not in BOUNDS:
        raise UnsupportedError(f"a fused {activation} has no integer arithmetic",
                               want="none, relu, relu6, relu_n1_to_1")
    bottom, top = BOUNDS[activation]
    scale = np.float32(out.scale)
    low = max(out.low, out.zero + int(_round(np.asarray(bottom, np.float32) / scale)))
    high = out.high if np.isinf(top) else min(out.high, out.zero + int(_round(np.asarray(top, np.float32) / scale)))
    return low, high


def rectifier(activation: str, x: Stored, out: Stored) -> One:
    """TFLite's standalone RELU, RELU6, ...: rescaled, then clamped."""
    low, high = fused(activation, out)
    m, shift = quantized_multiplier(float(np.float32(x.scale) / np.float32(out.scale)))
    return _each_code(x, out, lambda d: np.clip(multiply(d, m, shift) + out.zero, low, high))


def leaky(alpha: float, x: Stored, out: Stored) -> One:
    """TFLite's LEAKY_RELU: two factors, computed in float32; a negative slope is applied by its magnitude."""
    f = np.float32
    same = quantized_multiplier(float(f(x.scale) / f(out.scale)))
    slope = float(f(x.scale) * f(alpha) / f(out.scale))
    m, shift = quantized_multiplier(abs(slope))

    def values(d: Array) -> Array:
        below = np.sign(slope).astype(np.int64) * multiply(d, m, shift)
        return np.asarray(np.clip(np.where(d >= 0, multiply(d, *same), below) + out.zero, out.low, out.high))

    return _each_code(x, out, values)


def parametric(x: Stored, alpha: Stored, out: Stored) -> Callable[[Array, Array], Array]:
    """TFLite's PRELU: x where it is not negative, else x times its slope."""
    f = np.float32
    same = quantized_multiplier(float(f(x.scale) / f(out.scale)))
    sloped = quantized_multiplier(float(f(x.scale) * f(alpha.scale) / f(out.scale)))

    def step(data: Array, slopes: Array) -> Array:
        d = data.astype(np.int64) - x.zero
        below = multiply(d * (slopes.astype(np.int64) - alpha.zero), *sloped)
        steps = np.where(d >= 0, multiply(d, *same), below) + out.zero
        return np.asarray(np.clip(steps, out.low, out.high), out.dtype)

    return step


def function(name: str, x: Stored, out: Stored) -> One:
    """TFLite's LOGISTIC and TANH of 8 bits: float32 of each code, rounded half away."""
    f = np.float32
    codes = np.arange(x.low, x.high + 1)
    real = (f(x.scale) * (codes - x.zero).astype(f)).astype(np.float64)
    if name == "LOGISTIC":
        with np.errstate(over="ignore"):
            exp = np.exp(-real).astype(f)
        value = f(1) / (f(1) + exp)
    else:
        value = np.tanh(real).astype(f)
    steps = _round(value * (f(1) / f(out.scale))) + f(out.zero)
    return _table(x, np.clip(steps.astype(np.int64), out.low, out.high).astype(out.dtype))


def hard_swish(x: Stored, out: Stored) -> One:
    """TFLite's HARD_SWISH of 8 bits, in 16-bit fixed point.

    Raises: UnsupportedError where the output scale is too fine for it, as LiteRT does.
    """
    f = np.float32
    fine = f(1 / 128) * f(x.scale)
    m_out, e_out = quantized_multiplier(float(fine / f(out.scale)))
    m_relu, e_relu = quantized_multiplier(float(fine / f(3 / 32768)))
    if e_out > 0:
        raise UnsupportedError("HARD_SWISH has an output scale that its kernel has no shift for",
                               want="at least 1/128 of the input's", got=f"{out.scale:g} for {x.scale:g}")
    m_out, m_relu = (min((m + (1 << 15)) >> 16, 32767) for m in (m_out, m_relu))

    def values(d: Array) -> Array:
        hires = (d << 7).astype(np.int16).astype(np.int64)
        pre = _high_mul_16(hires, m_out)
        gate = _saturated(hires << (e_relu - 1)) if e_relu > 0 else hires
        gate = _high_mul_16(gate, m_relu)
        if e_relu > 0:
            gate = _saturated(gate << 1)
        elif e_relu < 0:
            gate = divide_by_power(gate, -e_relu)
        gate = (gate + (1 << 15)) >> 1
        product = gate * pre
        product = np.sign(product) * (np.abs(product) >> 15)
        steps = divide_by_power(product, -e_out)
        return np.asarray(np.clip(steps + out.zero, out.low, out.high))

    return _each_code(x, out, values)


def requantized(x: Stored, out: Stored) -> Callable[[Array], Array]:
    """TFLite's QUANTIZE of integers: rescaled as sums are."""
    m, shift = quantized_multiplier(float(np.float64(x.scale) / np.float64(out.scale)))
    return _each_code(x, out, lambda d: np.clip(multiply(d, m, shift) + out.zero, out.low, out.high))


def quantized(out: Stored) -> Callable[[Array], Array]:
    """TFLite's QUANTIZE of floats: x / scale in float32, rounded half away."""
    def step(x: Array) -> Array:
        steps = _round(x.astype(np.float32) / np.float32(out.scale)).astype(np.float64) + out.zero
        return np.asarray(np.clip(steps, out.low, out.high), out.dtype)

    return step


def dequantized(x: Stored) -> Callable[[Array], Array]:
    """TFLite's DEQUANTIZE: the product in float64, as float32."""
    return lambda codes: (float(x.scale) * (codes.astype(np.int64) - x.zero)).astype(np.float32)


ONE_ABOVE = (4, 8, 12, 14, 15, 16, 17, 19, 20, 21, 22, 25, 27, 28, 29, 30, 31, 33, 34, 35, 37, 39, 40, 41, 43, 44, 45,
             46, 49, 50, 54, 62, 63, 64, 66, 82, 86, 93, 100, 103, 112, 116, 135, 255)
"""Where TFLite's table (internal/common.h) is one above the rounded sigmoid, so that interpolation errs less."""


@lru_cache(maxsize=1)
def sigmoid_16() -> Array:
    """sigmoid(i / 24) for i in 0..255 in units of 2**-16: what TFLite interpolates 16-bit functions in."""
    table = np.rint(65536 / (1 + np.exp(-np.arange(256) / 24))).astype(np.int64)
    table[list(ONE_ABOVE)] += 1
    return table


def logistic_16(x: Stored) -> One:
    """TFLite's LOGISTIC of 16 bits: a table with interpolation."""
    m, left = _scale_16(x.scale)
    rounding = 1 << (left - 1) if left > 0 else 0

    def step(codes: Array) -> Array:
        v = (codes.astype(np.int64) * m + rounding) >> left
        height = np.abs(v)
        table, place = sigmoid_16(), np.minimum(height >> 9, 254)
        result = (table[place] << 9) + (height & 0x1FF) * (table[place + 1] - table[place])
        result = np.where(height >> 9 >= 255, 0x7FFF << 10, result)
        result = np.where(v >= 0, result + (1 << 9), (1 << 25) - result + (1 << 9) - 1)
        return (result >> 10).astype(np.int16)

    return step


def tanh_16(x: Stored) -> One:
    """TFLite's TANH of 16 bits: the same table, as tanh(x) = 2 sigmoid(2 x) - 1."""
    m, left = _scale_16(x.scale)
    rounding = 1 << (left - 1) if left > 0 else 0

    def step(codes: Array) -> Array:
        v = (codes.astype(np.int64) * m + rounding) >> left
        height = np.abs(v)
        table, place = sigmoid_16(), np.minimum(height >> 8, 254)
        result = (table[place] << 8) + (height & 0xFF) * (table[place + 1] - table[place])
        result = np.where(height >> 8 >= 255, 0xFFFF << 8, result)
        result = np.where(v >= 0, result - (1 << 23) + (1 << 7), -result + (1 << 23) + (1 << 7) - 1)
        return (result >> 8).astype(np.int16)

    return step


def _scale_16(scale: float) -> tuple[int, int]:
    """(multiplier, right shift) to units of 1 / (3 * 4096)."""
    if scale == 2.0**-12:
        return 3, 0
    real, left = float(np.float32(scale)) * 4096 * 3, 0
    while real <= 32767 / 2 and left <= 30:
        real, left = real * 2, left + 1
    return int(real), left


def _each_code(x: Stored, out: Stored, values: Callable[[Array], Array]) -> One:
    """`values` of every code less the zero point, as a table where codes have 8 bits."""
    if x.dtype.itemsize > 1:
        return lambda codes: values(codes.astype(np.int64) - x.zero).astype(out.dtype)
    return _table(x, values(np.arange(x.low, x.high + 1, dtype=np.int64) - x.zero).astype(out.dtype))


def _table(x: Stored, values: Array) -> One:
    by_byte = np.roll(values, x.low)  # value of -128 is that of byte 128
    return lambda codes: np.take(by_byte, np.ascontiguousarray(codes).view(np.uint8))


def _round(x: Array) -> Array:
    """float32 to whole numbers, ties away from zero."""
    whole = np.trunc(x)
    return np.asarray(whole + np.where(np.abs(x - whole) >= np.float32(0.5), np.sign(x), np.float32(0)), np.float32)


def _saturated(x: Array) -> Array:
    return np.clip(x, -(1 << 15), (1 << 15) - 1)


def _high_mul_16(a: Array, b: int) -> Array:
    """SaturatingRoundingDoublingHighMul of 16 bits, ties up."""
    return np.asarray((a * b + (1 << 14)) >> 15)


