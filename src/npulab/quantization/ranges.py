"""From statistics to ranges, and from ranges to scales and zero points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UsageError
from npulab.quantization.observe import HALF, Statistics
from npulab.quantization.types import F32, Array, Params, Scheme

Floats = NDArray[np.float64]
Range = tuple[float, float]
Method = Literal["min-max", "moving-average", "percentile", "entropy", "mse"]

PERCENTILE = 99.99
"""Of the elements that lie inside the range, by default."""
LEAST_SCALE = float(np.float32(2.0**-40))
"""For tensors of nothing but zeros, and as a bound: products of two scales and their quotients stay normal floats."""
CLIPS = 100
"""Clipped ranges that the search for the least squared error tries at first."""


def min_max(s: Statistics, _: Scheme) -> Range:
    """The extremes over all samples."""
    return s.low, s.high


def moving_average(s: Statistics, _: Scheme) -> Range:
    """The average of the samples' extremes, recent samples weighing more (Jacob et al. 2018, arXiv:1712.05877)."""
    return s.smooth_low, s.smooth_high


def percentile(s: Statistics, _: Scheme, share: float = PERCENTILE) -> Range:
    """The range that leaves out (100 - share) / 2 % of the elements at each end."""
    bins, edges = _histogram(s)
    out = bins.sum() * (100 - share) / 200
    upto = np.cumsum(bins)
    low = edges[int(np.searchsorted(upto, out, side="right"))]
    high = edges[int(np.searchsorted(upto, bins.sum() - out, side="left")) + 1]
    return max(s.low, float(low)), min(s.high, float(high))


def entropy(s: Statistics, scheme: Scheme) -> Range:
    """The clipped range whose quantized distribution loses least information: the Kullback-Leibler divergence from the
    distribution clipped to the range to the one that the levels can show (S. Migacz, GTC 2017)."""
    bins, _ = _histogram(s)
    levels = 1 << (scheme.bits - (1 if scheme.symmetric or s.low < 0 else 0))
    magnitudes = bins[HALF:] + bins[:HALF][::-1]
    magnitudes[0] = magnitudes[1]  # zero is a level of its own: the peak that ReLU puts there says nothing about ranges
    last = int(np.flatnonzero(magnitudes)[-1]) + 1 if magnitudes.any() else 1
    first = min(last, max(levels, last // 16))
    ends = sorted({int(end) for end in np.linspace(first, last, 64)})  # np.unique would load masked arrays, 2 MiB
    divergence = [_divergence(magnitudes, end, levels) for end in ends]
    limit = float(ends[int(np.argmin(divergence))]) * s.width
    return max(s.low, -limit), min(s.high, limit)


def _divergence(magnitudes: NDArray[np.int64], end: int, levels: int) -> float:
    inside = magnitudes[:end].astype(np.float64)
    reference = inside.copy()
    reference[-1] += magnitudes[end:].sum()
    edges = np.linspace(0, end, min(levels, end) + 1)
    level = np.minimum(np.searchsorted(edges, np.arange(end) + 0.5) - 1, len(edges) - 2)
    sums, filled = np.bincount(level, inside), np.bincount(level, inside > 0)
    shown = np.where(inside > 0, (sums / np.maximum(filled, 1))[level], 0.0)
    p, q = reference / max(reference.sum(), 1e-30), shown / max(shown.sum(), 1e-30)
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))))


def mse(s: Statistics, scheme: Scheme) -> Range:
    """The range whose scale and zero point give the least squared error over the histogram: extremes shrunk together,
    then each by itself."""
    bins, edges = _histogram(s)
    some = np.flatnonzero(bins)
    centres = np.clip((edges[some] + edges[some + 1]) / 2, s.low, s.high)
    counts = bins[some].astype(np.float64)
    within = s.width**2 / 12  # of the elements of a bin around its centre

    def error(low: float, high: float) -> float:
        p = params_of((low, high), scheme)
        off = (p.seen(centres).astype(np.float64) - centres) ** 2
        scale = float(p.scales[0])
        return float(np.sum(counts * (off + min(within, scale**2 / 12))))

    return _least(error, s.low, s.high)


def _least(error: Callable[[float, float], float], low: float, high: float) -> Range:
    """Coarse to fine over shrunk ranges; deterministic."""
    shares = np.linspace(1.0, 0.02, CLIPS // 2)
    best = min((error(low * c, high * c), -c) for c in shares)
    a = b = -best[1]
    least = best[0]
    step = 0.1
    while step > 0.01:
        moved = False
        for da, db in ((-step, 0), (step, 0), (0, -step), (0, step)):
            na, nb = min(1.0, a + da), min(1.0, b + db)
            if min(na, nb) <= 0:
                continue
            now = error(low * na, high * nb)
            if now < least:
                least, a, b, moved = now, na, nb, True
        if not moved:
            step /= 2
    return low * a, high * b


def _histogram(s: Statistics) -> tuple[NDArray[np.int64], Floats]:
    assert s.bins is not None
    bins, edges = s.bins, s.edges
    if not bins.any():
        bins = bins.copy()
        bins[HALF] = 1
    return bins, edges


METHODS: Mapping[str, Callable[[Statistics, Scheme], Range]] = {
    "min-max": min_max, "moving-average": moving_average, "percentile": percentile, "entropy": entropy, "mse": mse}
NEEDS_HISTOGRAM = frozenset(("percentile", "entropy", "mse"))


def method(name: str) -> Callable[[Statistics, Scheme], Range]:
    """The function of a method's name. Raises: UsageError for another name."""
    if name not in METHODS:
        raise UsageError(f"there is no calibration '{name}'", want=", ".join(METHODS))
    return METHODS[name]


def params_of(limits: Range, scheme: Scheme) -> Params:
    """Scale and zero point of one tensor: zero is always a level of its own, so that padding is exact."""
    return params_of_channels(np.array([limits[0]]), np.array([limits[1]]), scheme, None)


def params_of_channels(lows: Array, highs: Array, scheme: Scheme, axis: int | None) -> Params:
    """Scales and zero points of ranges (n,), each widened to hold zero."""
    low, high = np.minimum(lows, 0.0).astype(np.float64), np.maximum(highs, 0.0).astype(np.float64)
    if scheme.symmetric:
        scale = np.maximum(-low / (scheme.middle - scheme.low), high / (scheme.high - scheme.middle))
    else:
        scale = (high - low) / (scheme.high - scheme.low)
    scale = np.where(scale > 0, scale, 1.0 / max(1, scheme.high - scheme.low))  # all zeros: any scale will do
    scale = np.maximum(scale, LEAST_SCALE)
    if scheme.power_of_two:
        scale = 2.0 ** np.ceil(np.log2(scale) - 1e-9)
    scales = scale.astype(np.float32)
    if scheme.symmetric:
        zeros = np.full(scales.shape, scheme.middle, np.int32)
    else:
        zeros = np.clip(np.rint(scheme.low - low / scales.astype(np.float64)), scheme.low, scheme.high).astype(np.int32)
    return Params(scheme, scales, zeros, axis)


def weight_params(rows: F32, scheme: Scheme, axis: int, clip: str = "min-max") -> Params:
    """Of weights (channels, n). `clip`: "min-max", or "mse" for the clipped range of least squared error."""
    if scheme.per_channel:
        lows, highs = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
        if clip == "mse":
            share = _clipped_share(rows, lows, highs, scheme)
            lows, highs = lows * share, highs * share
        return params_of_channels(lows, highs, scheme, axis)
    lows, highs = np.array([rows.min()], np.float64), np.array([rows.max()], np.float64)
    if clip == "mse":
        share = _clipped_share(rows.reshape(1, -1), lows, highs, scheme)
        lows, highs = lows * share, highs * share
    return params_of_channels(lows, highs, scheme, None)


def _clipped_share(rows: F32, lows: Floats, highs: Floats, scheme: Scheme) -> Floats:
    """How much of each row's range to keep."""
    best, least = np.ones(len(rows)), np.full(len(rows), np.inf)
    least_share, steps = (0.6, 17) if scheme.bits >= 8 else (0.3, 71) if scheme.bits > 2 else (0.1, 91)
    for share in np.linspace(1.0, least_share, steps):
        p = params_of_channels(lows * share, highs * share, scheme, 0)
        error = np.sum((p.seen(rows).astype(np.float64) - rows) ** 2, axis=1)
        better = error < least * (1 - 1e-9)
        best[better], least[better] = share, error[better]
    return best


def fixed(scale: float, zero: int, scheme: Scheme) -> Params:
    """What a format prescribes."""
    return Params(scheme, np.array([scale], np.float32), np.array([zero], np.int32))
