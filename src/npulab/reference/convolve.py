"""Convolutions, transposed convolutions and matrix products, as TFLite lays them out (N,H,W,C; kernels O,H,W,I)."""

from __future__ import annotations

from typing import Any

import numpy as np

from npulab.reference.accumulate import Pads, Sums, matrix, windows
from npulab.reference.types import Array

NO_PADS: Pads = (0, 0, 0, 0)


def convolution(weights: Array, zero_w: int, zero_x: int, dtype: np.dtype[Any], stride: tuple[int, int],
                dilation: tuple[int, int], pads: Pads, channels: int) -> Sums:
    """x (N, H, W, C) -> sums (N, Y, X, O). There are C / I groups.

    Shapes:  weights (O, H, W, I).
    """
    o, kh, kw, per = weights.shape
    if (kh, kw) == (1, 1) and pads == NO_PADS and per == channels:
        product = matrix(weights.reshape(o, per), zero_w, zero_x, dtype)

        def pointwise(x: Array) -> Array:
            x = x[:, :: stride[0], :: stride[1]]
            return product(x.reshape(-1, per)).reshape(*x.shape[:3], o)

        return pointwise
    sums = windows(weights, zero_w, zero_x, dtype, stride, dilation, pads, channels // per, last=True)
    return lambda x: sums(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)


def depthwise(weights: Array, zero_w: int, zero_x: int, dtype: np.dtype[Any], stride: tuple[int, int],
              dilation: tuple[int, int], pads: Pads, channels: int) -> Sums:
    """x (N, H, W, C) -> sums (N, Y, X, C * m); output c * m + i is of input c.

    Shapes:  weights (1, H, W, C * m).
    """
    kernel = np.ascontiguousarray(weights.transpose(3, 0, 1, 2))
    sums = windows(kernel, zero_w, zero_x, dtype, stride, dilation, pads, channels)
    return lambda x: sums(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)


def transposed(weights: Array, zero_w: int, zero_x: int, dtype: np.dtype[Any], stride: tuple[int, int],
               pads: tuple[int, int], size: tuple[int, int]) -> Sums:
    """x (N, H, W, I) -> sums (N, *size, O): each input spreads its products over a window of the output.

    `pads` are the rows and columns of the first windows that lie outside. What has no place in `size` is lost.

    Shapes:  weights (O, H, W, I).
    """
    o, kh, kw, per = weights.shape
    product = matrix(np.ascontiguousarray(weights.transpose(1, 2, 0, 3)).reshape(kh * kw * o, per), zero_w, zero_x,
                     dtype)

    def spread(x: Array) -> Array:
        n, h, w, _ = x.shape
        parts = product(x.reshape(-1, per)).reshape(n, h, w, kh, kw, o)
        room = np.zeros((n, (h - 1) * stride[0] + kh + size[0], (w - 1) * stride[1] + kw + size[1], o), parts.dtype)
        for i in range(kh):
            for j in range(kw):
                room[:, i : i + (h - 1) * stride[0] + 1 : stride[0], j : j + (w - 1) * stride[1] + 1 : stride[1]] += (
                    parts[:, :, :, i, j])
        return np.ascontiguousarray(room[:, pads[0] : pads[0] + size[0], pads[1] : pads[1] + size[1]])

    return spread


def transposed_pads(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], same: bool
                    ) -> tuple[int, int]:
    """TFLite's padding of a transposed convolution: that of the convolution from `size` (the output) back."""
    found = []
    for n, k, s in zip(size, window, stride, strict=True):
        back = -(-n // s) if same else (n + s - k) // s
        found.append(max((back - 1) * s + k - n, 0) // 2)
    return found[0], found[1]


def biased(sums: Array, bias: Array | None) -> Array:
    """Sums plus the bias of each channel (last), in place; 32-bit sums wrap."""
    if bias is not None:
        sums += bias.astype(sums.dtype)
    return sums
