"""Averages, maxima and means of codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from npulab.reference.accumulate import Pads
from npulab.reference.requantize import multiply, nearest_up, quantized_multiplier, wrapped
from npulab.reference.types import Array, Stored


def average(x: Array, window: tuple[int, int], stride: tuple[int, int], pads: Pads, low: int, high: int) -> Array:
    """TFLite's AVERAGE_POOL_2D of codes (N, H, W, C): of the pixels inside alone, halves away from 0 (in codes).

    Input and output have one scale and zero point: that of the input is not looked at.
    """
    sums, count = window_sums(x.astype(np.int64), window, stride, pads)
    half = count // 2
    means = np.where(sums > 0, (sums + half) // count, -((half - sums) // count))
    return np.clip(means, low, high).astype(x.dtype)


def window_sums(x: Array, window: tuple[int, int], stride: tuple[int, int], pads: Pads) -> tuple[Array, Array]:
    """(sums over windows of (N, H, W, C), how many pixels each has inside, (Y, X, 1))."""
    top, left, bottom, right = pads
    ones = np.ones((1, *x.shape[1:3], 1), np.int64)
    grown = [np.pad(a, ((0, 0), (top, bottom), (left, right), (0, 0))) for a in (x, ones)]
    sums, count = (_over_windows(a, window, stride, np.add) for a in grown)
    return sums, count[0]


def maximum(x: Array, window: tuple[int, int], stride: tuple[int, int], pads: Pads, low: int, high: int) -> Array:
    """MAX_POOL_2D of codes (N, H, W, C)."""
    top, left, bottom, right = pads
    lowest = np.iinfo(x.dtype).min
    grown = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=lowest)
    return np.clip(_over_windows(grown, window, stride, np.maximum), low, high).astype(x.dtype)


def _over_windows(x: Array, window: tuple[int, int], stride: tuple[int, int],
                  both: Callable[[Array, Array], Array]) -> Array:
    """Rows first, then columns: windows of k by k take 2 k steps."""
    def along(a: Array, axis: int, size: int, step: int) -> Array:
        length = (a.shape[axis] - size) // step + 1
        picks = [np.take(a, range(i, i + (length - 1) * step + 1, step), axis) for i in range(size)]
        found = picks[0]
        for other in picks[1:]:
            found = both(found, other)
        return found

    return along(along(x, 1, window[0], stride[0]), 2, window[1], stride[1])


def engine_average(x: Stored, out: Stored, window: tuple[int, int], stride: tuple[int, int], low: int, high: int
                   ) -> Callable[[Array], Array]:
    """The v7 NN engine's average over windows without padding: a convolution whose weights are all one byte.

    The byte and the factor are those whose product, as the engine cuts it to 16 bits, is nearest above the exact one.
    """
    want = x.scale / out.scale / (window[0] * window[1])
    found = []
    for weight in range(1, 256):
        exponent = int(np.floor(np.log2(want / weight)))
        factor = float(np.float32(np.ceil(want / weight / 2.0**exponent * 2**15) * 2.0 ** (exponent - 15)))
        found.append((weight * factor - want, weight, factor))
    _, weight, factor = min(f for f in found if f[0] >= 0)
    rescale = nearest_up(factor)

    def step(codes: Array) -> Array:
        sums, _ = window_sums(codes.astype(np.int64) - x.zero, window, stride, (0, 0, 0, 0))
        return rescale(sums * weight, out, low, high)

    return step


def mean(x: Stored, out: Stored, axes: Sequence[int], keep: bool) -> Callable[[Array], Array]:
    """TFLite's MEAN of codes: 1 / count is folded into the multiplier, cut off."""
    m, shift = quantized_multiplier(float(x.scale) / float(out.scale))

    def step(codes: Array) -> Array:
        where = tuple(sorted({a % codes.ndim for a in axes}))
        count = int(np.prod([codes.shape[a] for a in where], dtype=np.int64))
        bits = min(count.bit_length() - 1, 32, 31 + shift)
        factor, right = (m << bits) // count, shift - bits
        sums = codes.sum(axis=where, keepdims=keep, dtype=np.int64) - x.zero * count
        return np.clip(multiply(wrapped(sums), factor, right) + out.zero, out.low, out.high).astype(out.dtype)

    return step
