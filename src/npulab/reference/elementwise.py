"""Sums and products of two tensors, element by element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npulab.reference.requantize import (
    RULES,
    Rescale,
    divide_by_power,
    multiply,
    nearest_up,
    quantized_multiplier,
    wrapped,
)
from npulab.reference.types import Array, Stored

Two = Callable[[Array, Array], Array]


def add(a: Stored, b: Stored, out: Stored, low: int, high: int, sign: Literal[1, -1] = 1) -> Two:
    """TFLite's ADD, or SUB with `sign` -1: operands are scaled to a common unit, 2**20 (16 bits: 2**15) times finer."""
    left = 15 if out.dtype.itemsize > 1 else 20
    twice = 2 * max(np.float32(a.scale), np.float32(b.scale))  # in float32, as the kernel has it
    m1, s1 = quantized_multiplier(float(np.float32(a.scale)) / float(twice))
    m2, s2 = quantized_multiplier(float(np.float32(b.scale)) / float(twice))
    m3, s3 = quantized_multiplier(float(twice) / float(np.float32(2**left) * np.float32(out.scale)))

    def operand(x: Stored, m: int, shift: int) -> Array:
        """What each code stands for in the common unit; 8-bit codes in order of their bytes."""
        codes = np.arange(x.low, x.high + 1, dtype=np.int64)
        return np.asarray(multiply(wrapped((codes - x.zero) << left), m, shift), np.int64)

    first, second = operand(a, m1, s1), sign * operand(b, m2, s2)

    def step(x: Array, y: Array) -> Array:
        total = np.take(first, x.astype(np.int64) - a.low) + np.take(second, y.astype(np.int64) - b.low)
        return np.asarray(np.clip(multiply(wrapped(total), m3, s3) + out.zero, low, high), out.dtype)

    return step


def power_of_two_add(a: Stored, b: Stored, out: Stored, low: int, high: int, sign: Literal[1, -1] = 1) -> Two:
    """TFLite's ADD of 16-bit tensors that were marked as having scales of powers of two: one operand is shifted."""
    shifts = [round(np.log2(x.scale)) - round(np.log2(out.scale)) for x in (a, b)]

    def step(x: Array, y: Array) -> Array:
        p, q = (divide_by_power(v.astype(np.int64), -s) for v, s in zip((x, y), shifts, strict=True))
        return np.asarray(np.clip(p + sign * q, low, high), out.dtype)

    return step


def multiply_tensors(a: Stored, b: Stored, out: Stored, low: int, high: int, rule: str = "tflite") -> Two:
    """TFLite's MUL; its factor is computed in float32. Other rules round the products their own way."""
    real = float(np.float32(a.scale) * np.float32(b.scale) / np.float32(out.scale))
    if rule.startswith("esp"):
        real = a.scale * b.scale / out.scale
    rescale = RULES[rule](real)

    def step(x: Array, y: Array) -> Array:
        products = (x.astype(np.int32) - a.zero) * (y.astype(np.int32) - b.zero)
        return rescale(products, out, low, high)

    return step


def shifted_add(a: Stored, b: Stored, out: Stored, low: int, high: int, rule: str, sign: Literal[1, -1] = 1) -> Two:
    """A sum on a chip that rescales by shifts: exact in the operands' finer unit, then one rounding (inferred)."""
    unit = min(a.scale, b.scale)
    first, second = round(a.scale / unit), sign * round(b.scale / unit)
    rescale = RULES[rule](unit / out.scale)
    RULES[rule](a.scale / b.scale)  # both must be powers of two

    def step(x: Array, y: Array) -> Array:
        total = first * (x.astype(np.int64) - a.zero) + second * (y.astype(np.int64) - b.zero)
        return rescale(total, out, low, high)

    return step


@dataclass(frozen=True, slots=True)
class EngineSum:
    """An addition as the NN engine does it: a convolution with the two weights, on codes made uint8."""

    first: int
    second: int
    weight_scale: float
    bias: int


def engine_sum(a: Stored, b: Stored, out: Stored, zero_a: int, zero_b: int) -> EngineSum:
    """The two bytes that the engine's operands are multiplied with.

    The larger scale gets 255 and the smaller its share, in float32, where that is at most three quarters of a step
    off; otherwise the pair of bytes whose ratio is nearest to that of the scales.
    """
    f = np.float32
    ratio = f(b.scale) / f(a.scale)
    unit = f(max(ratio, f(1)) / f(255))
    first, second = _half_away(float(f(1) / unit)) & 255, _half_away(float(ratio) / float(unit)) & 255
    shift = _half_away(float(f(f(zero_a - zero_b) * f(b.scale)) / f(unit * f(a.scale))))
    theirs = EngineSum(first, second, float(unit), shift - _half_away(float(ratio) / float(unit)) * zero_a)
    exact = b.scale / a.scale
    if 255 * a.scale / out.scale * (abs(first * float(unit) - 1) + abs(second * float(unit) - exact)) <= 0.75:
        return theirs
    larger = np.arange(1, 256)
    share = min(exact, 1 / exact)
    smaller = np.rint(larger * share)
    best = int(np.argmin(np.abs(smaller / larger - share)))
    big, small = int(larger[best]), int(smaller[best])
    first, second, exact_unit = (big, small, 1 / big) if exact <= 1 else (small, big, exact / big)
    return EngineSum(first, second, float(f(exact_unit)), -second * zero_b)


def engine_add(a: Stored, b: Stored, out: Stored, low: int, high: int) -> Two:
    """ADD on the v7 NN engine."""
    up = 128 if a.dtype.kind == "i" else 0
    za, zb = a.zero + up, b.zero + up
    pair = engine_sum(a, b, out, za, zb)
    f = np.float32
    rescale: Rescale = nearest_up(f(f(a.scale) * f(pair.weight_scale)) / f(out.scale))
    start = pair.bias - pair.first * za

    def step(x: Array, y: Array) -> Array:
        total = (x.astype(np.int32) + up) * pair.first + (y.astype(np.int32) + up) * pair.second + start
        return rescale(total, out, low, high)

    return step


def _half_away(x: float) -> int:
    return int(np.trunc(x + np.copysign(0.5, x)))
