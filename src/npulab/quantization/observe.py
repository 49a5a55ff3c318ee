"""Statistics of tensors over samples, one sample after another: memory does not grow with their number.

Each sample runs by itself, in one thread, and what it gives is added in the samples' order. So the same samples give
the same statistics to the last bit, however many run side by side.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError, UnsupportedError, UsageError
from npulab.quantization.types import F32, Array, Feeds, Samples

if TYPE_CHECKING:
    import onnx

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
T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with samples done and samples in all."""


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


def observe(model: bytes, names: Sequence[str], samples: Samples, histograms: bool = False,
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
    model, outputs = _reduced(model, large, most)
    asked = [name for n in names for name in outputs.get(n, [n])]

    def look(arrays: Sequence[Array]) -> list[_Seen]:
        left, seen = iter(arrays), []
        for name in names:
            if name not in large:
                seen.append(_Seen.whole(next(left), most, name in by_channel))
                continue
            low, high, total = (float(next(left).reshape(-1)[0]) for _ in range(3))
            seen.append(_Seen(large[name], low if np.isfinite(total) else total, high, next(left) if most else None))
        return seen

    looked = each(model, asked, samples, look, progress)
    del model  # the session has the weights of its own
    for number, seen in enumerate(looked):
        for name, one in zip(names, seen, strict=True):
            if not (np.isfinite(one.low) and np.isfinite(one.high)):
                raise ModelError(f"'{name}' is not finite", got=f"sample {number + 1} of {samples.origin}",
                                 try_="look for NaN in the data, or for overflow in the network")
            found[name].add(one)
    return found


def _reduced(model: bytes, sizes: Mapping[str, int], most: int) -> tuple[bytes, dict[str, list[str]]]:
    """The model with nodes for the extremes, the sum (which no NaN gets past) and `most` elements of tensors, and the
    names of those by tensor. Appended to the bytes, for messages of protobuf are merged so: weights are not copied."""
    from onnx import GraphProto, ModelProto, helper, numpy_helper

    more, outputs = GraphProto(), {}
    indices: dict[int, str] = {}
    for name, size in sizes.items():
        outputs[name] = [f"{name}_{what}_observed" for what in ("low", "high", "sum", "some")[: 4 if most else 3]]
        for op, out in zip(("ReduceMin", "ReduceMax", "ReduceSum"), outputs[name], strict=False):
            more.node.append(helper.make_node(op, [name], [out], out, keepdims=0))
        if most:
            if size not in indices:
                indices[size] = f"{name}_indices_observed"
                where = np.arange(0, size, distance(size, most), dtype=np.int64)
                more.initializer.append(numpy_helper.from_array(where, indices[size]))
            flat = f"{name}_flat_observed"
            more.node.append(helper.make_node("Flatten", [name], [flat], flat, axis=0))
            more.node.append(helper.make_node("Gather", [flat, indices[size]], [outputs[name][3]], outputs[name][3],
                                              axis=1))
    return (model + ModelProto(graph=more).SerializeToString() if sizes else model), outputs


def each(model: bytes, names: Sequence[str], samples: Samples, work: Callable[[Sequence[Array]], T],
         progress: Progress | None = None) -> Iterator[T]:
    """`work` on the tensors `names` of each sample, samples side by side, results in their order."""
    if not len(samples):
        raise UsageError("there are no samples to calibrate with", got=samples.origin)
    run = runner(model, names)
    del model
    workers = max(1, min(8, os.cpu_count() or 1))

    def job(feeds: Feeds) -> T:
        return work(run(feeds))

    with ThreadPoolExecutor(workers) as pool:
        yield from in_order(pool, job, samples, workers, progress)


def in_order(pool: ThreadPoolExecutor, job: Callable[[Feeds], T], samples: Samples, ahead: int,
             progress: Progress | None = None) -> Iterator[T]:
    """Results of `job`, in the samples' order, with at most `ahead` of them in memory."""
    waiting: deque[Future[T]] = deque()
    done, total = 0, len(samples)
    source: Iterable[Feeds] = samples
    try:
        for feeds in source:
            waiting.append(pool.submit(job, feeds))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
                done += 1
                if progress:
                    progress(done, total)
        while waiting:
            yield waiting.popleft().result()
            done += 1
            if progress:
                progress(done, total)
    finally:
        for f in waiting:
            f.cancel()


def _widen(proto: onnx.ModelProto) -> None:
    """Constants of 2 bits as bytes: kernels that ONNX Runtime fuses out of DequantizeLinear take none such."""
    from onnx import TensorProto, numpy_helper

    bytes_of = {getattr(TensorProto, "INT2", -1): np.int8, getattr(TensorProto, "UINT2", -1): np.uint8}
    for t in proto.graph.initializer:
        if t.data_type in bytes_of:
            t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t).astype(bytes_of[t.data_type]), t.name))


def give_back() -> None:
    """Memory that sessions had, to the system: glibc keeps what lies between other things, 100 MB of EfficientNet's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def runner(model: bytes, names: Sequence[str], threads: int = 1, plain: bool = False
           ) -> Callable[[Feeds], list[Array]]:
    """A function from inputs to the tensors `names`, which may lie inside the model: ONNX Runtime, `threads` a run.

    Layers between DequantizeLinear and QuantizeLinear are computed in floats: integer kernels would differ from CPU to
    CPU. `plain`: no optimizations at all.

    Raises: UsageError without ONNX Runtime; UnsupportedError if it does not run the model.
    """
    try:
        import onnx
        import onnxruntime as ort
    except ImportError:
        raise UsageError("quantizing runs networks in ONNX Runtime, which is not installed",
                         try_="pip install 'npulab[onnx]'") from None
    give_back()
    proto = onnx.ModelProto.FromString(model)
    del model
    have = {o.name for o in proto.graph.output}
    for name in dict.fromkeys(names):
        if name not in have:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    _widen(proto)
    inputs = {i.name for i in proto.graph.input}
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else data become int8 by the way
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    asked = [n for n in names if n not in inputs]
    model = proto.SerializeToString()
    del proto  # its weights, before the session has its own
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"],
                                       disabled_optimizers=["WeightBiasQuantization"])  # of layers in floats, unasked
    except Exception as e:  # the runtime is C++: it raises what it likes
        raise UnsupportedError("ONNX Runtime does not run the network", got=str(e).strip()[:300]) from None
    del model

    def run(feeds: Feeds) -> list[Array]:
        try:
            made = dict(zip(asked, session.run(asked, dict(feeds)) if asked else [], strict=True))
        except Exception as e:
            raise UnsupportedError("ONNX Runtime does not run the network on this sample",
                                   got=str(e).strip()[:300]) from None
        return [np.asarray(feeds[n]) if n in inputs else made[n] for n in names]

    return run
