"""Loops of rounding rows of weights by a Cholesky factor: in C (_rounding.c), or NumPy where that is not built.

Factors are float32 (groups, K, K), of which the lower triangle counts; rows (groups, R, K).
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from npulab.quantization.types import F32, Array, Scheme

Costs = NDArray[np.float64]
loops: ModuleType | None
"""The compiled ones. Tests set it to None to see that the others agree."""
try:
    loops = importlib.import_module("npulab._rounding")
except ImportError:
    loops = None


def factor(h: F32) -> bool:
    """L of H = L L^T in the place of H. Gives whether that is positive definite."""
    if loops is not None:
        return bool(loops.factor(h, *h.shape[:2]))
    try:
        h[...] = np.linalg.cholesky(h)
    except np.linalg.LinAlgError:
        return False
    return bool(np.isfinite(h).all())


def solve(lower: F32, rows: F32) -> None:
    """Rows times the inverse of L L^T, in their place."""
    if loops is not None:
        loops.solve(lower, rows, *rows.shape)
        return
    lower = np.tril(lower)
    half = np.linalg.solve(lower, rows.transpose(0, 2, 1))
    rows[...] = np.linalg.solve(lower.transpose(0, 2, 1), half).transpose(0, 2, 1)


def lengths(lower: F32, rows: F32) -> Costs:
    """|row L|^2 of each row, (groups, R)."""
    if loops is not None:
        found = np.empty(rows.shape[:2])
        loops.lengths(lower, rows, found, *rows.shape)
        return found
    return np.asarray(np.square(rows @ np.tril(lower)).sum(axis=2, dtype=np.float64))


def sequential(lower: F32, target: F32, scale: F32, zero: F32, scheme: Scheme) -> tuple[Array, Costs]:
    """Integers near the targets, the last weight of a row first, each making up for those before it; what rounding
    costs each row: |(scale * (codes - zero) - target) L|^2. `scale` and `zero` (groups, R)."""
    codes = np.empty(target.shape, scheme.holder)
    if loops is not None:
        costs = np.empty(target.shape[:2])
        loops.sequential(lower, target, scale, zero, codes, costs, *target.shape, scheme.low, scheme.high,
                         codes.itemsize)
        return codes, costs
    known = np.zeros_like(target)
    for j in reversed(range(target.shape[2])):
        pivot = lower[:, j, j, None]
        steps = np.rint((target[:, :, j] - known[:, :, j] / pivot) / scale)
        steps = np.clip(steps + zero, scheme.low, scheme.high)
        codes[:, :, j] = steps
        known[:, :, : j + 1] += ((steps - zero) * scale - target[:, :, j])[:, :, None] * lower[:, None, j, : j + 1]
    return codes, np.square(known).sum(axis=2, dtype=np.float64)
