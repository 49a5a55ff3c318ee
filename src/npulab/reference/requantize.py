"""Sums of products to codes: the one step in which chips differ.

Each rule here takes the real factor between a sum's unit and the output's, and gives a function that rounds sums as
that rule does. docs/arithmetic.md says where each rule is from and what witnesses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from npulab.errors import CapacityError, UnsupportedError
from npulab.quantization.types import Arithmetic
from npulab.reference.types import Array, Numbers, Stored

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

CHUNK = 1 << 16
"""Elements that are worked on at a time, so that the passes over them stay in cache."""


class Rescale(Protocol):
    """Sums (channels last, or along `axis` 1) to codes of `out`, clamped to low..high (the type's range if None)."""

    def __call__(self, sums: Array, out: Stored, low: int | None = None, high: int | None = None,
                 axis: Literal[-1, 1] = -1) -> Array: ...


def quantized_multiplier(real: float) -> tuple[int, int]:
    """(m, shift) with real ~ m * 2 ** (shift - 31), m in 2**30..2**31 - 1, or 0: TFLite's QuantizeMultiplier."""
    if real == 0:
        return 0, 0
    fraction, shift = math.frexp(real)
    m = math.floor(fraction * 2**31 + 0.5)
    if m == 2**31:
        m, shift = 2**30, shift + 1
    return (0, 0) if shift < -31 else (m, shift)


def high_mul(a: I64, b: I64 | int) -> I64:
    """SaturatingRoundingDoublingHighMul of 32-bit numbers: a * b / 2**31, ties up. Only both -2**31 would saturate."""
    return np.asarray((a * b + (1 << 30)) >> 31, np.int64)


def divide_by_power(x: I64, exponent: I64 | int) -> I64:
    """RoundingDivideByPOT: x / 2**exponent, ties away from zero."""
    e = np.asarray(exponent, np.int64)
    mask = (np.int64(1) << e) - 1
    return np.asarray((x >> e) + ((x & mask) > (mask >> 1) + (x < 0)), np.int64)


def wrapped(x: I64) -> I64:
    """The low 32 bits, as a signed number: what a 32-bit register keeps."""
    return x.astype(np.int32).astype(np.int64)


def multiply(x: Array, m: Array | int, shift: Array | int) -> I64:
    """TFLite's MultiplyByQuantizedMultiplier of 32-bit numbers, with its two roundings, in plain integers."""
    shift = np.asarray(shift, np.int64)
    left, right = np.maximum(shift, 0), np.maximum(-shift, 0)
    return divide_by_power(high_mul(wrapped(x.astype(np.int64) << left), np.asarray(m, np.int64)), right)


def multiply_wide(x: Array, m: Array | int, shift: Array | int) -> I64:
    """The same of 64-bit sums (16-bit activations): the multiplier cut to 16 bits, one rounding, ties up."""
    m, total = np.asarray(m, np.int64), 15 - np.asarray(shift, np.int64)
    reduced = np.where(m < 0x7FFF0000, (m + (1 << 15)) >> 16, 0x7FFF)
    return wrapped((x.astype(np.int64) * reduced + (np.int64(1) << (total - 1))) >> total)


def tflite(real: Numbers) -> Rescale:
    """TFLite's reference kernels: 32-bit sums are rounded twice, 64-bit sums once.

    real  factor of each channel, or of all, as float64.
    """
    pairs = [quantized_multiplier(float(r)) for r in np.atleast_1d(np.asarray(real, np.float64))]
    m, shift = (np.array([p[i] for p in pairs], np.int64) for i in (0, 1))
    scale = m * np.exp2(shift - 31.0)
    # two roundings are one with a shifted half: floor(floor(y + 1/2) / 2**s + 1/2) for y >= 0 (docs/arithmetic.md)
    nudge = np.where(shift < 0, np.exp2(shift - 1.0), 0.0)
    left = int(shift.max(initial=0))

    deepest = -int(shift.min(initial=0))

    def exact_in_doubles(most: int, span: int) -> bool:
        """Whether nothing wraps, and every number on the way that is not clamped anyway has at most 52 bits."""
        most <<= max(left, 0)
        return most < 2**31 and deepest <= 20 and (most < 2**21 or deepest < 20 - math.log2(span))

    def plain(sums: Array, out: Stored, low: int, high: int, axis: Literal[-1, 1]) -> Array:
        shape = _along(sums, axis)
        wide = sums.dtype == np.int64
        steps = (multiply_wide if wide else multiply)(sums, m.reshape(shape(m)), shift.reshape(shape(m)))
        return np.clip(steps + out.zero, low, high).astype(out.dtype)

    def rescale(sums: Array, out: Stored, low: int | None = None, high: int | None = None,
                axis: Literal[-1, 1] = -1) -> Array:
        low, high = _limits(out, low, high)
        if sums.dtype == np.int64 or not exact_in_doubles(_magnitude(sums), 2 * (out.high - out.low + 1)):
            return plain(sums, out, low, high, axis)
        signed = low < out.zero  # negative sums are clamped otherwise, whatever their rounding
        apart = deepest + 31 + math.log2(out.high - out.low + 1) >= 52  # the zero point has no room beside the fraction
        result = np.empty(sums.shape, out.dtype)
        for a, (k, n), to, q, room in _chunked(sums, axis, (scale, nudge), result):
            np.multiply(a, k, out=q)
            np.add(q, np.copysign(n, q, out=room) if signed else n, out=q)
            if apart:
                np.add(q, 0.5, out=q)
                np.floor(q, out=q)
            _store(q, out.zero + (0.0 if apart else 0.5), low, high, to)
        return result

    return rescale


def nearest_away(real: Numbers) -> Rescale:
    """TFLite's FULLY_CONNECTED (LiteRT 2.3): round(float64(sum) * float64(real)), halves away.

    real  factor of each channel, or of all, as float64.
    """
    scale = np.atleast_1d(np.asarray(real, np.float64))

    def rescale(sums: Array, out: Stored, low: int | None = None, high: int | None = None,
                axis: Literal[-1, 1] = -1) -> Array:
        low, high = _limits(out, low, high)
        result = np.empty(sums.shape, out.dtype)
        for a, (k,), to, q, whole in _chunked(sums, axis, (scale,), result):
            np.multiply(a, k, out=q)
            np.trunc(q, out=whole)
            np.subtract(q, whole, out=q)
            whole += np.where(np.abs(q) >= 0.5, np.sign(q), 0.0)
            _store(whole, out.zero, low, high, to)
        return result

    return rescale


def nearest_even(real: Numbers) -> Rescale:
    """ONNX Runtime's integer kernels: rint(float32(sum) * float32(real)) + zero, ties to even."""
    scale = np.atleast_1d(np.asarray(real, np.float32))

    def rescale(sums: Array, out: Stored, low: int | None = None, high: int | None = None,
                axis: Literal[-1, 1] = -1) -> Array:
        low, high = _limits(out, low, high)
        result = np.empty(sums.shape, out.dtype)
        for a, (k,), to, q, _ in _chunked(sums, axis, (scale,), result, np.float32):
            np.copyto(q, a, casting="unsafe")
            np.multiply(q, k, out=q)
            np.clip(q, np.float32(low - out.zero), np.float32(high - out.zero), out=q)
            np.rint(q, out=q)
            np.add(q, np.float32(out.zero), out=q)
            np.copyto(to, q, casting="unsafe")
        return result

    return rescale


def power_of_two(real: Numbers, half: Literal["up", "even"]) -> Rescale:
    """ESP-DL: a shift, rounding half up (ESP32-S3) or half to even (ESP32-P4).

    Raises: UnsupportedError if a factor is no power of two.
    """
    scale = np.atleast_1d(np.asarray(real, np.float64))
    if (np.frexp(scale)[0] != 0.5).any():
        raise UnsupportedError("this chip rescales by shifts alone", want="scales that are powers of two",
                               got=f"a factor of {scale[np.frexp(scale)[0] != 0.5][0]:g} between sums and output",
                               try_="quantize for it with power-of-two scales")

    def rescale(sums: Array, out: Stored, low: int | None = None, high: int | None = None,
                axis: Literal[-1, 1] = -1) -> Array:
        low, high = _limits(out, low, high)
        result = np.empty(sums.shape, out.dtype)
        for a, (k,), to, q, _ in _chunked(sums, axis, (scale,), result):
            np.multiply(a, k, out=q)  # exact: only the exponent changes
            if half == "even":
                np.rint(q, out=q)
            _store(q, out.zero + (0.0 if half == "even" else 0.5), low, high, to)
        return result

    return rescale


def engine_multiplier(real: float) -> tuple[int, int]:
    """(m, shift) with real ~ (2**15 + m) / 2**shift: the float32's top 15 fraction bits, the rest cut off.

    Raises: CapacityError outside 2**-112..2**15.
    """
    bits = int(np.float32(real).view(np.uint32))
    shift = 142 - (bits >> 23)
    if not 0 <= shift <= 127:
        raise CapacityError(f"a requantization factor of {real:g} does not fit the engine", want="2**-112 .. 2**15")
    return (bits & 0x7FFFFF) >> 8, shift


def nearest_up(real: Numbers) -> Rescale:
    """The v7 NN engine: floor(sum * (2**15 + m) / 2**shift + 1/2) + zero; sums have 32 bits."""
    pairs = [engine_multiplier(float(r)) for r in np.atleast_1d(np.asarray(real))]
    scale = np.array([(2**15 + m) / 2.0**s for m, s in pairs])

    def rescale(sums: Array, out: Stored, low: int | None = None, high: int | None = None,
                axis: Literal[-1, 1] = -1) -> Array:
        low, high = _limits(out, low, high)
        result = np.empty(sums.shape, out.dtype)
        for a, (k,), to, q, _ in _chunked(sums.astype(np.int32, copy=False), axis, (scale,), result):
            np.multiply(a, k, out=q)  # exact: 32 bits times 16 bits times a power of two
            np.add(q, 0.5, out=q)
            np.floor(q, out=q)  # by itself: with the zero point added first, 53 bits would not do for large shifts
            _store(q, out.zero, low, high, to)
        return result

    return rescale


ENGINE: Arithmetic = "multiplier16"
"""The name under which `nearest_up` and its additions and averages are chosen."""
RULES: dict[str, Callable[[Any], Rescale]] = {
    "tflite": tflite,
    "onnx": nearest_even,
    "esp32s3": lambda real: power_of_two(real, "up"),
    "esp32p4": lambda real: power_of_two(real, "even"),
    ENGINE: nearest_up,
}


def _limits(out: Stored, low: int | None, high: int | None) -> tuple[int, int]:
    return out.low if low is None else low, out.high if high is None else high


def _magnitude(sums: Array) -> int:
    return max(-int(sums.min(initial=0)), int(sums.max(initial=0)))


def _along(sums: Array, axis: int) -> Callable[[Array], tuple[int, ...]]:
    """The shape in which numbers a channel meet the sums."""
    return lambda per: (per.size,) if axis == -1 or per.size == 1 else (per.size, *(1,) * (sums.ndim - 2))


def _store(q: F64, offset: float, low: int, high: int, to: Array) -> None:
    """floor(q + offset), clamped, as codes. `q` is overwritten."""
    np.add(q, offset - low, out=q)
    np.clip(q, 0, high - low, out=q)
    if to.dtype.itemsize == 1:  # what is left of a fraction is cut off: the floor of what is not negative
        raw = to.view(np.uint8)
        np.copyto(raw, q, casting="unsafe")
        np.add(raw, np.uint8(low & 255), out=raw)  # wraps
    else:
        np.floor(q, out=q)
        np.add(q, low, out=q)
        np.copyto(to, q, casting="unsafe")


def _chunked(sums: Array, axis: int, per: tuple[Array, ...], result: Array, room: Any = np.float64
             ) -> Iterator[tuple[Array, tuple[Array, ...], Array, Array, Array]]:
    """(sums, numbers a channel that meet them, where their codes go, two pieces of room), a piece at a time."""
    rows = _rows(sums, axis, per[0].size)
    shape = (sums.size // max(rows[1], 1), rows[1])
    if per[0].size == 1 and shape[0] == 1:
        shape = (1, sums.size)
    a, to = np.ascontiguousarray(sums).reshape(shape), result.reshape(shape)
    if axis == 1 and per[0].size > 1:
        per = tuple(np.tile(p, shape[0] // p.size)[:, None] for p in per)
    height = max(1, min(shape[0], CHUNK // max(shape[1], 1)))
    width = min(shape[1], CHUNK)
    one, two = np.empty((height, width), room), np.empty((height, width), room)
    for y in range(0, shape[0], height):
        for x in range(0, shape[1], CHUNK):
            part = a[y : y + height, x : x + CHUNK]
            some = tuple(p if p.size == 1 else p[y : y + height] if p.ndim == 2 else p[x : x + CHUNK] for p in per)
            h, w = part.shape
            yield part, some, to[y : y + height, x : x + CHUNK], one[:h, :w], two[:h, :w]


def _rows(sums: Array, axis: int, channels: int) -> tuple[int, int]:
    """(rows, columns) of the sums as a table with channels along one side."""
    if channels == 1:
        return 1, sums.size
    if axis == -1:
        return sums.size // channels, channels
    return sums.shape[0] * sums.shape[1], math.prod(sums.shape[2:])
