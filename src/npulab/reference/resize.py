"""Images enlarged or made smaller, in codes, as TFLite does it (N,H,W,C)."""

from __future__ import annotations

import numpy as np

from npulab.reference.types import Array


def nearest(x: Array, size: tuple[int, int], corners: bool, centres: bool) -> Array:
    """RESIZE_NEAREST_NEIGHBOR; places are computed in float32."""
    f = np.float32
    picks = []
    for n, wanted in zip(x.shape[1:3], size, strict=True):
        scale = f(n - 1) / f(wanted - 1) if corners and wanted > 1 else f(n) / f(wanted)
        places = (np.arange(wanted).astype(f) + f(0.5 if centres else 0)) * scale
        whole = np.floor(places + f(0.5)) if corners else np.floor(places)
        picks.append(np.clip(whole.astype(np.int64), 0, n - 1))
    return x[:, picks[0]][:, :, picks[1]]


def bilinear(x: Array, size: tuple[int, int], corners: bool, centres: bool) -> Array:
    """RESIZE_BILINEAR: signed codes in integers with 10 fraction bits a side, unsigned ones in float32."""
    return _in_floats(x, size, corners, centres) if x.dtype == np.uint8 else _in_integers(x, size, corners, centres)


def _in_integers(x: Array, size: tuple[int, int], corners: bool, centres: bool) -> Array:
    low, high, share = [], [], []
    for n, wanted in zip(x.shape[1:3], size, strict=True):
        scale = ((n - 1 << 10) + (wanted - 1) // 2) // (wanted - 1) if corners and wanted > 1 else (
            ((n << 10) + wanted // 2) // wanted)
        place = np.arange(wanted, dtype=np.int64) * scale
        if centres:
            place += scale // 2 - (1 << 9)
        first = np.maximum(_towards_zero(place, 1 << 10), 0)
        low.append(first)
        high.append(np.minimum(_towards_zero(place + (1 << 10) - 1, 1 << 10), n - 1))
        share.append(place - (first << 10))
    wide = x.astype(np.int64)
    y, z = share[0][:, None, None], share[1][:, None]
    rows = wide[:, low[0]] * ((1 << 10) - y), wide[:, high[0]] * y
    total = sum(r[:, :, low[1]] * ((1 << 10) - z) + r[:, :, high[1]] * z for r in rows)
    assert isinstance(total, np.ndarray)
    return _towards_zero(total + np.where(total > 0, 1 << 19, -(1 << 19)), 1 << 20).astype(x.dtype)


def _in_floats(x: Array, size: tuple[int, int], corners: bool, centres: bool) -> Array:
    f = np.float32
    low, high, share = [], [], []
    for n, wanted in zip(x.shape[1:3], size, strict=True):
        scale = f(n - 1) / f(wanted - 1) if corners and wanted > 1 else f(n) / f(wanted)
        at = np.arange(wanted).astype(f)
        place = (at + f(0.5)) * scale - f(0.5) if centres else at * scale
        first = np.maximum(np.floor(place).astype(np.int64), 0)
        low.append(first)
        high.append(np.minimum(np.ceil(place).astype(np.int64), n - 1))
        share.append(place - first.astype(f))
    real = x.astype(f)
    y, z = share[0][:, None, None], share[1][:, None]
    top, bottom, left, right = f(1) - y, y, f(1) - z, z
    upper, lower = real[:, low[0]], real[:, high[0]]
    total = (upper[:, :, low[1]] * top * left + lower[:, :, low[1]] * bottom * left
             + upper[:, :, high[1]] * top * right + lower[:, :, high[1]] * bottom * right)
    return np.asarray((total + f(0.5)).astype(np.int64), x.dtype)


def _towards_zero(a: Array, b: int) -> Array:
    return np.asarray(np.sign(a) * (np.abs(a) // b))
