"""Statistics of tensors over samples, one sample after another: memory does not grow with their number.

Each sample runs by itself, in one thread, and what it gives is added in the samples' order. So the same samples give
the same statistics to the last bit, however many run side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError
from npulab.importers.onnx_parts import Thin, thin
from npulab.program.pages import Buffer
from npulab.quantization.parts import apart
from npulab.quantization.session import Progress
from npulab.quantization.types import F32, Array, Samples

HALF = 2048
"""Bins of a histogram on each side of zero."""
COUNTED = 1 << 20
COUNTED_EACH = 1 << 12, 1 << 15
"""Elements of a tensor that are counted into its histogram, over all samples; of one sample at least and at most so
many, evenly spread. Extremes are of all."""
REDUCED = 1 << 14
"""Elements of a tensor from which its extremes are computed inside the runtime, which then need not give it away."""
LEAST_WIDTH = 2.0**-100
"""Of a bin: its inverse is a float32, too."""
MOVING = 0.01
"""Weight of a new sample in moving averages, as in TensorFlow's FakeQuant (decay 0.99); the first sets the start."""


class Statistics:
    """What is known of a tensor: extremes, moving averages of the extremes of samples, moments, a histogram.

    low, high   extremes over all samples.         smooth_low, smooth_high   their moving averages.
    count, total, squares   elements, their sum, the sum of their squares (float64).
    width       of a histogram's bin, a power of two; bins[i] counts x with floor(x / width) == i - HALF, of large
                tensors of some of their elements (COUNTED).
    channel_*   along axis 1 (rank 3 and more) or the last: extremes, sums, squares; elements a channel.
    """

    def __init__(self, histogram: bool, channels: bool) -> None:
        self.low, self.high = np.inf, -np.inf
        self.smooth_low = self.smooth_high = 0.0
        self.samples = self.count = 0
        self.total = self.squares = 0.0
        self.width = 0.0
        self.bins: NDArray[np.int64] | None = np.zeros(2 * HALF, np.int64) if histogram else None
        self.channels = channels
        self.channel_low = self.channel_high = self.channel_total = self.channel_squares = np.zeros(0)
        self.channel_count = 0

    def add(self, seen: _Seen) -> None:
        """What one sample showed."""
        self.low, self.high = min(self.low, seen.low), max(self.high, seen.high)
        share = MOVING if self.samples else 1.0
        self.smooth_low += share * (seen.low - self.smooth_low)
        self.smooth_high += share * (seen.high - self.smooth_high)
        self.samples += 1
        self.count += seen.count
        self.total += seen.total
        self.squares += seen.squares
        if self.bins is not None and seen.bins is not None:
            self._merge(seen.bins, seen.width)
        if seen.channels is not None:
            low, high, total, squares = seen.channels
            if not self.channel_count:
                self.channel_low, self.channel_high = low, high
                self.channel_total, self.channel_squares = total, squares
            else:
                self.channel_low, self.channel_high = np.minimum(self.channel_low, low), np.maximum(self.channel_high,
                                                                                                    high)
                self.channel_total, self.channel_squares = self.channel_total + total, self.channel_squares + squares
            self.channel_count += seen.count // max(1, len(low))

    def _merge(self, bins: NDArray[np.int64], width: float) -> None:
        assert self.bins is not None
        mine, own = self.bins, self.width
        if not width:
            width = own  # nothing but zeros: their bin is the same at any width
        own = own or width
        while own < width:
            mine, own = halved(mine), own * 2
        while width < own:
            bins, width = halved(bins), width * 2
        self.bins, self.width = mine + bins, own

    @property
    def edges(self) -> NDArray[np.float64]:
        """Of the histogram's bins, ascending, one more than bins."""
        return np.arange(-HALF, HALF + 1, dtype=np.float64) * np.float64(self.width or 1.0)

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    @property
    def variance(self) -> float:
        return max(0.0, self.squares / max(1, self.count) - self.mean**2)

    @property
    def channel_means(self) -> NDArray[np.float64]:
        return self.channel_total / max(1, self.channel_count)

    @property
    def channel_deviations(self) -> NDArray[np.float64]:
        return np.sqrt(np.maximum(0.0, self.channel_squares / max(1, self.channel_count) - self.channel_means**2))


def halved(bins: NDArray[np.int64]) -> NDArray[np.int64]:
    """The histogram with bins of twice the width: bin i takes 2i and 2i + 1, counted from zero."""
    pairs = bins.reshape(-1, 2).sum(axis=1)
    out = np.zeros_like(bins)
    out[HALF // 2 : HALF // 2 + HALF] = pairs
    return out


class _Seen:
    """What one sample shows of a tensor."""

    __slots__ = ("bins", "channels", "count", "high", "low", "squares", "total", "width")

    def __init__(self, count: int, low: float, high: float, some: F32 | None) -> None:
        """`some`: the elements that are counted; None: without a histogram."""
        self.count, self.low, self.high = count, low, high
        self.total = self.squares = 0.0
        self.bins: NDArray[np.int64] | None = None
        self.width = 0.0
        self.channels: tuple[Any, ...] | None = None
        if some is not None and np.isfinite(low) and np.isfinite(high):
            self.width = width_for(max(-low, high))
            self.bins = count_bins(some, self.width)

    @classmethod
    def whole(cls, x: Array, histogram: int, channels: bool) -> _Seen:
        """`histogram`: elements that are counted at most; 0: none."""
        x = np.asarray(x, np.float32)
        low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
        self = cls(x.size, low, high, spread(x, histogram) if histogram else None)
        if channels:
            rows = x.reshape(1, -1) if x.ndim < 2 else np.moveaxis(x, 1 if x.ndim > 2 else -1, 0).reshape(
                x.shape[1 if x.ndim > 2 else -1], -1)
            totals = rows.sum(axis=1, dtype=np.float64)
            squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
            self.channels = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64), totals, squares
            self.total, self.squares = float(totals.sum()), float(squares.sum())
        return self


def spread(x: F32, most: int) -> F32:
    """At most `most` elements or so, evenly spread."""
    return x.reshape(-1)[:: distance(x.size, most)]


def distance(size: int, most: int) -> int:
    """Between elements of which `most` or so are taken: odd, so that not always the same columns are."""
    return (size // most) | 1 if size > most else 1


def width_for(largest: float) -> float:
    """The least power of two that, as width, puts |x| <= largest into HALF bins; 0 for nothing but zeros."""
    if largest <= 0:
        return 0.0
    return max(LEAST_WIDTH, float(2.0 ** np.frexp(largest)[1] / HALF))  # frexp: largest < 2 ** exponent


def count_bins(x: F32, width: float) -> NDArray[np.int64]:
    """How many elements fall into each bin."""
    if not width:
        bins = np.zeros(2 * HALF, np.int64)
        bins[HALF] = x.size
        return bins
    steps = x * np.float32(1 / width)  # exact: the width is a power of two
    below = (steps == 0) & (x < 0) if width > 1 else None  # but what underflows, which is in the bin below 0
    index = np.floor(steps, out=steps).astype(np.int16)
    if below is not None:
        index -= below
    index += HALF
    return np.bincount(index.ravel(), minlength=2 * HALF)


def observe(model: Buffer, names: Sequence[str], samples: Samples, histograms: bool = False,
            channels: Sequence[str] = (), progress: Progress | None = None, sizes: Mapping[str, int] | None = None
            ) -> dict[str, Statistics]:
    """Statistics of the tensors `names` of an ONNX model over the samples. `channels`: of these, by channel too.

    sizes  elements of tensors where they are known; large ones then never leave the runtime.

    Raises: UsageError without samples or without ONNX Runtime; ModelError for a tensor that is not finite;
    UnsupportedError if ONNX Runtime does not run the model.
    """
    by_channel = set(channels)
    found = {name: Statistics(histograms, name in by_channel) for name in names}
    most = min(max(COUNTED // max(1, len(samples)), COUNTED_EACH[0]), COUNTED_EACH[1]) if histograms else 0
    large = {name: size for name, size in (sizes or {}).items() if size >= REDUCED and name in found
             and name not in by_channel}
    reduced, outputs = _reduced(model, large, most)
    asked = [name for n in names for name in outputs.get(n, [n])]
    owner = {name: n for n in names for name in outputs.get(n, [n])}

    def look(_: int, arrays: Mapping[str, Array]) -> dict[str, _Seen]:
        seen: dict[str, _Seen] = {}
        for name in dict.fromkeys(owner[a] for a in arrays):
            if name not in large:
                seen[name] = _Seen.whole(arrays[name], most, name in by_channel)
                continue
            *extremes, some = (*(arrays[a] for a in outputs[name]), None)[:4]
            low, high, total = (float(x.reshape(-1)[0]) for x in extremes if x is not None)
            seen[name] = _Seen(large[name], low if np.isfinite(total) else total, high, some)
        return seen

    groups = [outputs[n] for n in names if n in large]
    for number, seen in apart(reduced, asked, samples, look, progress, groups):
        for name, one in seen.items():
            if not (np.isfinite(one.low) and np.isfinite(one.high)):
                raise ModelError(f"'{name}' is not finite", got=f"sample {number + 1} of {samples.origin}",
                                 try_="look for NaN in the data, or for overflow in the network")
            found[name].add(one)
    return found


def _reduced(model: Buffer, sizes: Mapping[str, int], most: int) -> tuple[Thin, dict[str, list[str]]]:
    """The model with nodes for the extremes, the sum (which no NaN gets past) and `most` elements of tensors, each
    behind what makes the tensor, and the names of those by tensor."""
    from onnx import NodeProto, helper

    made, outputs = thin(model), dict[str, list[str]]()
    graph = made.proto.graph
    indices: dict[int, str] = {}
    more: dict[str, list[NodeProto]] = {}
    for name, size in sizes.items():
        outputs[name] = [f"{name}_{what}_observed" for what in ("low", "high", "sum", "some")[: 4 if most else 3]]
        own = more[name] = [helper.make_node(op, [name], [out], out, keepdims=0)
                            for op, out in zip(("ReduceMin", "ReduceMax", "ReduceSum"), outputs[name], strict=False)]
        if most:
            if size not in indices:
                indices[size] = f"{name}_indices_observed"
                made.constant(indices[size], np.arange(0, size, distance(size, most), dtype=np.int64))
            flat = f"{name}_flat_observed"
            own += [helper.make_node("Flatten", [name], [flat], flat, axis=0),
                    helper.make_node("Gather", [flat, indices[size]], [outputs[name][3]], outputs[name][3], axis=1)]
    nodes = [*(n for i in graph.input for n in more.get(i.name, ())),
             *(m for n in graph.node for m in (n, *(x for o in n.output for x in more.get(o, ()))))]
    del graph.node[:]
    graph.node.extend(nodes)
    return made, outputs
