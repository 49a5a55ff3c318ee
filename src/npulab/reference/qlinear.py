"""The integer kernels that ONNX Runtime puts in place of DequantizeLinear, operator, QuantizeLinear (N,C,H,W).

What it computes in float32 on the way is computed so here, in its order. Where its kernels multiply and add in one
rounding (x86 with AVX2) this does too, by way of float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from npulab.reference.requantize import nearest_even
from npulab.reference.types import Array, Stored

F = np.float32


def quantize(real: Array, out: Stored) -> Array:
    """QuantizeLinear: x / scale in float32, rounded half to even, clamped."""
    steps = np.rint(np.clip(real.astype(F) / F(out.scale), F(out.low - out.zero), F(out.high - out.zero)))
    return np.asarray(steps.astype(np.int64) + out.zero, out.dtype)


def dequantize(codes: Array, x: Stored) -> Array:
    """DequantizeLinear."""
    return np.asarray((codes.astype(np.int32) - x.zero).astype(F) * F(x.scale), F)


def every_code(x: Stored) -> Array:
    """What each byte stands for."""
    return np.roll(dequantize(np.arange(x.low, x.high + 1), x), x.low)


def table(x: Stored, out: Stored, function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function of one number: every code through float32."""
    codes = np.arange(x.low, x.high + 1)
    values = np.roll(quantize(function(dequantize(codes, x)), out), x.low)
    return lambda data: np.take(values, np.ascontiguousarray(data).view(np.uint8))


def _moved(t: Stored) -> Stored:
    """An int8 tensor as uint8. On x86 ONNX Runtime makes int8 networks uint8 before anything else: codes and zero
    points move up by 128, which additions in float32 do notice."""
    return Stored(t.scale, t.zero + 128, np.dtype(np.uint8))


def _flipped(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """A kernel of uint8 as one of int8."""
    def flip(codes: Array) -> Array:
        return np.ascontiguousarray(codes).reshape(codes.shape).view(np.uint8) ^ np.uint8(0x80)

    return lambda *arrays: flip(kernel(*(flip(a) for a in arrays))).view(np.int8)


def add(a: Stored, b: Stored, out: Stored) -> Callable[[Array, Array], Array]:
    """QLinearAdd: both codes times a ratio of scales, added to what the zero points come to."""
    if out.dtype == np.int8:
        return _flipped(add(_moved(a), _moved(b), _moved(out)))
    first, second = F(a.scale) / F(out.scale), F(b.scale) / F(out.scale)
    fixed = F(F(out.zero) - F(F(first * F(a.zero)) + F(second * F(b.zero))))

    def step(x: Array, y: Array) -> Array:
        match _scalar(x.shape, y.shape):
            case "second":
                total = _fused(x, first, _fused_or_not(fixed, y, second))
            case "first":
                total = _fused(y, second, _fused_or_not(swapped, x, first))
            case _:
                total = _fused(y, second, _fused(x, first, fixed))
        return np.asarray(np.clip(np.rint(total), out.low, out.high), out.dtype)

    swapped = F(F(out.zero) - F(F(second * F(b.zero)) + F(first * F(a.zero))))
    return step


def _fused_or_not(fixed: np.float32, x: Array, ratio: np.float32) -> Array:
    return np.asarray(fixed + x.astype(F) * ratio, F)


def _fused(x: Array, ratio: np.float32, plus: Array | np.float32) -> Array:
    """x * ratio + plus, rounded once: float64 holds the product exactly."""
    return np.asarray(x.astype(np.float64) * np.float64(ratio) + np.asarray(plus, np.float64), F)


def _scalar(x: Sequence[int], y: Sequence[int]) -> str:
    """Which operand is one number along the innermost axis that is longer than 1."""
    rank = max(len(x), len(y))
    for n, m in zip(reversed((1,) * (rank - len(x)) + tuple(x)), reversed((1,) * (rank - len(y)) + tuple(y)),
                    strict=True):
        if n != m:
            return "first" if n == 1 else "second"
        if n > 1:
            return "neither"
    return "first"


def mul(a: Stored, b: Stored, out: Stored) -> Callable[[Array, Array], Array]:
    """QLinearMul: the product of both differences, times one ratio, plus the zero point, in float32."""
    if out.dtype == np.int8:
        return _flipped(mul(_moved(a), _moved(b), _moved(out)))
    ratio = F(F(a.scale) * F(b.scale)) / F(out.scale)

    def step(x: Array, y: Array) -> Array:
        products = (x.astype(np.int32) - a.zero) * (y.astype(np.int32) - b.zero)
        total = products.astype(F) * ratio + F(out.zero)
        return np.asarray(np.clip(np.rint(total), out.low, out.high), out.dtype)

    return step


def average_pool(x: Stored, out: Stored, window: Sequence[int], stride: Sequence[int], pads: Sequence[int],
                 include_pad: bool) -> Callable[[Array], Array]:
    """QLinearAveragePool: float32 sums, a pixel after another; y / scale + zero rounded half to even.

    A window that is the whole image goes the way of QLinearGlobalAveragePool.
    """
    if out.dtype == np.int8:
        return _flipped(average_pool(_moved(x), _moved(out), window, stride, pads, include_pad))
    whole = global_average_pool(x, out)

    def step(codes: Array) -> Array:
        if tuple(window) == codes.shape[2:] and not any(pads):
            return whole(codes)
        real = dequantize(codes, x)
        top, left = pads[0], pads[1]
        h, w = codes.shape[2:]
        size = [(n + pads[i] + pads[i + 2] - k) // s + 1
                for i, (n, k, s) in enumerate(zip((h, w), window, stride, strict=True))]
        reach = [(n - 1) * s + k for n, s, k in zip(size, stride, window, strict=True)]
        grown = np.zeros((*codes.shape[:2], max(reach[0], h + top), max(reach[1], w + left)), F)
        inside = np.zeros(grown.shape[2:], F)
        grown[:, :, top : top + h, left : left + w] = real
        inside[top : top + h, left : left + w] = 1
        total = np.zeros((*codes.shape[:2], *size), F)
        count = np.zeros(size, F)
        for i in range(window[0]):
            for j in range(window[1]):
                cut = (slice(i, i + (size[0] - 1) * stride[0] + 1, stride[0]),
                       slice(j, j + (size[1] - 1) * stride[1] + 1, stride[1]))
                total += grown[:, :, cut[0], cut[1]]
                count += inside[cut]
        total = total / (F(window[0] * window[1]) if include_pad else count)
        steps = np.rint(total / F(out.scale) + F(out.zero))
        return np.asarray(np.clip(steps, out.low, out.high), out.dtype)

    return step


def global_average_pool(x: Stored, out: Stored) -> Callable[[Array], Array]:
    """QLinearGlobalAveragePool: the integer sum times one float32 number."""
    def step(codes: Array) -> Array:
        axes = tuple(range(2, codes.ndim))
        pixels = int(np.prod(codes.shape[2:]))
        sums = codes.sum(axis=axes, keepdims=True, dtype=np.int32) - x.zero * pixels
        return nearest_even(F(x.scale) / (F(out.scale) * F(pixels)))(sums, out)

    return step


def softmax(x: Stored, out: Stored, axis: int) -> Callable[[Array], Array]:
    """QLinearSoftmax: exponentials from a table of float32, summed one after another; 1 / scale is cut to a whole
    number."""
    whole = np.floor(F(1) / F(out.scale))

    def step(codes: Array) -> Array:
        length = codes.shape[axis]
        # room for the sum of so many: FLT_MAX over the length, in logarithms, less 5
        shift = max(0.0, float(np.log(np.float64(np.finfo(F).max / F(length)))) - 5) / float(F(x.scale))
        exps = np.exp((np.arange(256, dtype=np.float64) - 255 + shift) * float(F(x.scale))).astype(F)
        rows = np.moveaxis(codes, axis, -1).astype(np.int64)
        values = exps[rows - rows.max(axis=-1, keepdims=True) + 255]
        total = np.cumsum(values, axis=-1, dtype=F)[..., -1:]
        shares = values * whole / total
        # a row of one element has no room left: its share is infinite, and what x86 makes of that is 0
        steps = np.rint(np.where(np.isfinite(shares), shares, 0)).astype(np.int64) + out.zero
        found = np.clip(steps, out.low, out.high).astype(out.dtype)  # int8 is computed as uint8
        return np.ascontiguousarray(np.moveaxis(found, -1, axis))

    return step
