"""Accumulators to bytes, as the NN engine's output stage does it."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

kernels: ModuleType | None
"""The compiled loops, or None where npulab was built without a C compiler: NumPy gives the same bytes."""
try:
    kernels = importlib.import_module("npulab._kernels")
except ImportError:
    kernels = None

CHUNK = 1 << 15
"""Elements that NumPy works on at a time, so that its passes stay in cache."""


def requantize(acc: NDArray[np.float32], bias: NDArray[np.int32], multiplier: int, shift: int, zero_point: int,
               low: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """out = clamp(floor((acc + bias) * (2**15 + multiplier) / 2**shift + 1/2) + zero_point, low, 255)

    acc + bias wraps at 32 bits. One rounding, to the nearest; exact ties go up. That ties of negative sums go up is
    inferred; that rounding is to the nearest is proven by the vendor's self-test (NN notes 10.1).

    Shapes:  acc (rows, n) whole numbers below 2**24 in magnitude; bias (rows,) -> (rows, n), into `out` if given.
    Ranges:  multiplier 0..2**15 - 1, shift 0..127, zero_point and low 0..255.
    """
    scale = (2**15 + multiplier) / 2.0**shift
    out = np.empty(acc.shape, np.uint8) if out is None else out
    if kernels is not None:
        kernels.requantize(np.ascontiguousarray(acc), bias, out, scale, zero_point, low)
        return out
    rows, n = acc.shape
    # In units of 2**-shift everything below is a whole number under 2**53, so float64 is exact and one addition serves.
    at_once = shift <= 44 and bool((np.abs(bias.astype(np.int64)) < 2**31 - 2**24).all())
    added = bias * scale + (zero_point + 0.5)
    some, chunk = max(1, CHUNK // max(n, 1)), min(CHUNK, n)
    room = np.empty((min(some, rows), chunk), np.float64)
    for top in range(0, rows, some):
        for left in range(0, n, CHUNK):
            part = acc[top : top + some, left : left + CHUNK]
            q = room[: part.shape[0], : part.shape[1]]
            if at_once:
                np.multiply(part, scale, out=q)
                q += added[top : top + some, None]
            else:
                whole = part.astype(np.int32)
                whole += bias[top : top + some, None]
                np.multiply(whole, scale, out=q)  # exact: 32 bits times 16 bits times a power of two
                q += 0.5
                np.floor(q, out=q)
                q += zero_point
            np.clip(q, low, 255, out=q)
            out[top : top + some, left : left + CHUNK] = q  # what is left of a fraction is cut off: the floor
    return out
