"""Adaptive rounding of weights of 8 bits and more (`rounding.py`): sequential rounding alone, from moments in brief.

One pass of the samples through the network writes to a file what layers read; then one layer after another is rounded.
In memory are one layer's second moments, in single precision, and some of its rows.

In brief: what the float network has, x, is taken as each q_k (what the integer network reads) by a factor b_k of its
own, and noise that goes along with nothing else. Then covariances S of q, and sums over single x_k and q_k, are enough.
With W b for the rows whose weights are multiplied by the b_k, the mean squared error of rows V of weights is

    |V - W b|^2 by S  +  sum over k of W_k^2 (var x_k - b_k^2 var q_k)

and with D added to S (damping) the least of |V - T|^2 by S + D is sought, T = W b + W (1 - b) D (S + D)^-1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError, UsageError
from npulab.importers.onnx_parts import Thin
from npulab.program.pages import Scratch, arrays_away, content_of, let_go
from npulab.quantization.calibrate import roomy
from npulab.quantization.gram import Patches, Reference, checked, grouped, upto
from npulab.quantization.network import Layer, Network
from npulab.quantization.parts import apart
from npulab.quantization.ranges import params_of_channels
from npulab.quantization.rounding_loops import factor, lengths, sequential, solve
from npulab.quantization.sampling import some
from npulab.quantization.session import Progress, give_back
from npulab.quantization.types import F32, Array, Params, Samples

Sums = NDArray[np.float64]
BITS = 8
"""Of weights, from which on this is enough. Descent, pairs and scales fitted again bring 4 bits some tenths of a
decibel each; EfficientNet-Lite0 in 8 bits comes out as well without."""
SHARES = (1.0, 0.85, 0.7)
"""Of the weights' range, that scales are tried for. Power-of-two scales: FEWER."""
FEWER = (1.0, 0.5, 0.25)
SAMPLES = 64
DAMPING = 0.01
"""Of the mean variance of what a channel reads, added to all: keeps weights near that the samples say nothing about."""
BLUR = 1e-6
"""The same at least for each weight of a channel: what single precision may do to a variance."""
DISK = 1 << 28
"""Bytes of what layers read that lie in the file at once; more layers take another pass."""
AT_ONCE = 1 << 20
"""Bytes of patches that are multiplied at once."""
PANEL = 256
"""Rows of second moments that are computed at once, up to the diagonal."""
ROWS, ROWS_BYTES = 64, 1 << 18
"""Of weights that one thread has at once: so many rows, or so many bytes if these are more rows."""
WORKERS = 2


@dataclass(eq=False)
class Reading:
    """What a layer reads over the samples: where q lies in the file, and sums over patches, (groups, K), of d = x - q,
    of d q and of d d. These differences are small: single precision is enough, which x q and x x would need twice.

    params  of q; None: floats, and q is x.     pieces  where q lies in the file, and how many patches.
    """

    layer: Layer
    take: Patches
    params: Params | None
    d: F32
    dq: F32
    dd: F32
    count: int = 0
    pieces: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, net: Network, layer: Layer, samples: int) -> Reading:
        groups, _, k = grouped(layer).shape
        params = net.of[layer.data].params if layer.data in net.of else None
        d, dq, dd = np.zeros((3, groups, k), np.float32)
        return cls(layer, Patches(net, layer, samples, True), params, d, dq, dd)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of what lies in the file."""
        return np.dtype(np.float32) if self.params is None else self.params.scheme.holder

    def bytes(self, samples: int) -> int:
        """That it takes in the file, at most."""
        return int(samples * self.take.wanted * self.d.size * self.dtype.itemsize)

    def share(self, number: int, data: Array) -> tuple[Array, list[F32]]:
        """Of one sample: patches as they are written, and sums."""
        x = self.take.rows(data, self.take.places(number))
        if self.params is None:
            return x, []
        q = self.params.steps(x)
        kept = (q + self.params.zeros).astype(self.dtype)
        q *= self.params.scales
        x -= q
        return kept, [x.sum(axis=0), *(np.einsum("ngk,ngk->gk", x, other) for other in (q, x))]

    def add(self, kept: Array, sums: Sequence[F32], file: Scratch) -> None:
        """One more sample, in the samples' order."""
        self.pieces.append((file.size, len(kept)))
        self.count += len(kept)
        file.write(content_of(kept))
        for total, one in zip((self.d, self.dq, self.dd), sums, strict=False):
            total += one

    def patches(self, file: Scratch) -> Iterator[F32]:
        """q (n, groups, K), some patches at a time."""
        waiting: list[Array] = []
        for i, (at, count) in enumerate(self.pieces, 1):
            waiting.append(file.array(at, self.dtype, (count, *self.d.shape)))
            if i == len(self.pieces) or sum(a.size for a in waiting) * 4 >= AT_ONCE:
                found = np.concatenate(waiting, dtype=np.float32)
                waiting.clear()
                if self.params is not None:
                    found -= self.params.zeros
                    found *= self.params.scales
                yield found


def round_briefly(net: Network, layers: Sequence[Layer], samples: Samples, aim: Reference, scales: bool = True,
                  progress: Progress | None = None) -> list[str]:
    """Codes, params and biases of layers that see the float network's tensors as integers. Returns, raises:
    `rounding.adaround`."""
    from threadpoolctl import threadpool_limits

    if not len(samples):
        raise UsageError("there are no samples to round with", got=samples.origin)
    model, number = aim.model(), {layer.node: i for i, layer in enumerate(net.layers)}
    biases, notes, samples = aim.biases, list[str](), some(samples, SAMPLES)
    for readings in _within([Reading.of(net, layer, len(samples)) for layer in layers], len(samples)):
        with Scratch() as file, threadpool_limits(1, "blas"):  # one thread: the same sums to the last bit
            _read(net, readings, upto(model, [net.name(r.layer.data) for r in readings]), samples, file, progress)
            give_back()
            with ThreadPoolExecutor(WORKERS) as pool:
                for r in readings:
                    notes.append(_Rounding(net, r, file, pool).run(biases[number[r.layer.node]], scales))
                    give_back()
    for layer, codes in zip(layers, arrays_away([layer.codes for layer in layers if layer.codes is not None]),
                            strict=True):
        layer.codes = codes
    return notes


def _within(readings: Sequence[Reading], samples: int) -> Iterator[list[Reading]]:
    """In order, as many at a time as the file takes, or one."""
    part: list[Reading] = []
    for one in readings:
        if part and sum(r.bytes(samples) for r in (*part, one)) > DISK:
            yield part
            part = []
        part.append(one)
    yield part


def _read(net: Network, readings: Sequence[Reading], model: Thin, samples: Samples, file: Scratch,
          progress: Progress | None) -> None:
    """What the samples bring."""
    by_name: dict[str, list[Reading]] = {}
    for r in readings:
        by_name.setdefault(net.name(r.layer.data), []).append(r)

    def shares(number: int, arrays: Mapping[str, Array]) -> list[tuple[Reading, tuple[Array, list[F32]]]]:
        return [(r, r.share(number, checked(x, name, number, samples))) for name, x in arrays.items()
                for r in by_name[name]]

    for _, made in apart(model, list(by_name), samples, shares, progress):
        for reading, one in made:
            reading.add(*one, file)


def ranges_tried(net: Network, layer: Layer, weight: Array, shares: Sequence[float]) -> list[Params]:
    """The layer's params, and those of parts of the weights' range."""
    assert layer.params is not None
    assert layer.scheme is not None
    rows = weight.reshape(layer.channels, -1)
    lows, highs = rows.min(axis=1), rows.max(axis=1)
    if layer.params.axis is None:
        lows, highs = lows.min(keepdims=True), highs.max(keepdims=True)
    return [layer.params, *(roomy(net, layer, params_of_channels(lows * share, highs * share, layer.scheme,
                                                                 layer.params.axis)) for share in shares)]


class _Rounding:
    """Of one layer. Weights of a channel are sorted by the variance that they read, ascending."""

    def __init__(self, net: Network, reading: Reading, file: Scratch, pool: ThreadPoolExecutor) -> None:
        self.net, self.layer, self.file, self.pool = net, reading.layer, file, pool
        self.weight = grouped(reading.layer)
        let_go(reading.layer.weight)
        n = max(1, reading.count)
        q = np.zeros(self.weight.shape[::2])
        square = np.zeros_like(q)
        for patches in reading.patches(file):
            q += patches.sum(axis=0, dtype=np.float64)
            square += np.einsum("ngk,ngk->gk", patches, patches)
        self.mean_q, mean_d = q / n, reading.d / n
        self.mean_x = self.mean_q + mean_d
        self.centred = reading.layer.bias is not None or reading.layer.kind != "matmul"  # a bias takes means away
        variance = np.maximum(square / n - self.mean_q**2 * self.centred, 0)
        self.order = np.argsort(variance, axis=1, kind="stable")
        between = reading.dq / n - mean_d * self.mean_q * self.centred
        own = variance + 2 * between + reading.dd / n - mean_d**2 * self.centred
        factors = 1 + np.divide(between, variance, out=np.zeros_like(between), where=variance > 0)
        self.left = self._sorted(own - factors**2 * variance)
        self.factors = self._sorted(factors).astype(np.float32)
        self.lower, self.damping = self._factor(reading)

    def _sorted(self, array: Array) -> Array:
        return np.take_along_axis(array, self.order, axis=1)

    def _factor(self, reading: Reading) -> tuple[F32, F32]:
        """L of S + D, and D of each group."""
        groups, k = self.order.shape
        found = np.zeros((groups, k, k), np.float32)
        mean = (self.mean_q * self.centred).astype(np.float32)
        parts = _slices(k, PANEL) if groups == 1 else _slices(groups, -(-groups // WORKERS))
        for q in reading.patches(self.file):
            q -= mean
            rows = q[:, 0, self.order[0]] if groups == 1 else q.transpose(1, 0, 2)

            def add(at: slice, rows: F32 = rows) -> None:
                if groups == 1:
                    found[0, at, : at.stop] += rows[:, at].T @ rows[:, : at.stop]
                else:
                    found[at] += rows[at].transpose(0, 2, 1) @ rows[at]

            list(self.pool.map(add, parts))
        if groups > 1:  # small ones, sorted at the end
            found = np.take_along_axis(found, self.order[:, :, None], axis=1)
            found = np.take_along_axis(found, self.order[:, None, :], axis=2)
        found /= max(1, reading.count)
        diagonal = np.arange(k)
        power = found[:, diagonal, diagonal].mean(axis=1, dtype=np.float64)
        damping = np.maximum(max(DAMPING, BLUR * k) * power, 1e-9 * power.max() + 1e-30).astype(np.float32)
        found[:, diagonal, diagonal] += damping[:, None]
        if not factor(found):
            raise InvariantError(f"second moments of '{self.layer.name}' are not positive definite")
        return found, damping[:, None]

    def run(self, bias: Array | None, scales: bool) -> str:
        """Codes, params and bias of the layer; `bias`: the float network's. Returns: the note."""
        layer = self.layer
        assert layer.scheme is not None
        assert layer.params is not None
        shares = () if not scales else FEWER if layer.scheme.power_of_two else SHARES
        tried = ranges_tried(self.net, layer, self.weight, shares)
        groups, rows, k = self.weight.shape
        each = max(ROWS, ROWS_BYTES // (4 * groups * k) // ROWS * ROWS)
        parts = _slices(rows, each)
        codes = np.empty((len(tried), groups, rows, k), layer.scheme.holder)
        costs = np.empty((len(tried), groups, rows))
        signal, before, after, drift = (np.empty((groups, rows)) for _ in range(4))

        def solved(at: slice) -> None:
            """Rows rounded in all ranges."""
            w, target = self._rows(at)
            aimed = w * self.factors[:, None]
            signal[:, at], before[:, at] = (self._error(a, w) for a in (
                aimed, self._shown(self._nearest(w, tried[0], at), tried[0], at) - aimed))
            for i, p in enumerate(tried):
                codes[i, :, at], costs[i, :, at] = sequential(self.lower, target, *self._grid(p, at), p.scheme)

        list(self.pool.map(solved, parts))
        if layer.params.axis is None:
            best = np.full((groups, rows), np.argmin(costs.sum(axis=(1, 2))))
            params = tried[int(best.flat[0])]
        else:
            best = np.argmin(costs, axis=0)
            at = best.ravel(), np.arange(best.size)
            params = Params(layer.scheme, np.stack([p.scales for p in tried])[at],
                            np.stack([p.zeros for p in tried])[at], layer.params.axis)
        chosen = np.empty(self.weight.shape, layer.scheme.holder)

        def settled(at: slice) -> None:
            """The best of each row."""
            w = self._weights(at)
            picked = np.take_along_axis(codes[:, :, at], best[None, :, at, None], axis=0)[0]
            shown = self._shown(picked, params, at)
            after[:, at] = self._error(shown - w * self.factors[:, None], w)
            drift[:, at] = _dot(w, self._sorted(self.mean_x)) - _dot(shown, self._sorted(self.mean_q))
            np.put_along_axis(chosen[:, at], np.broadcast_to(self.order[:, None], picked.shape), picked, axis=2)

        list(self.pool.map(settled, parts))
        layer.params, layer.codes = params, layer.from_rows(chosen.reshape(layer.channels, -1))
        if self.centred:
            start = np.zeros(layer.channels) if bias is None else bias.astype(np.float64)
            layer.bias = (start + drift.ravel()).astype(np.float32)
        power = max(float(self._positive(signal)), 1e-30)
        was, now = (10 * np.log10(max(self._positive(e) / power, 1e-30)) for e in (before, after))
        return f"{layer.name}: noise {was:.1f} -> {now:.1f} dB"

    @staticmethod
    def _positive(errors: Array) -> float:
        return float(np.maximum(errors, 0).sum())

    def _weights(self, at: slice) -> F32:
        """Some rows, sorted."""
        found = np.take_along_axis(self.weight[:, at], self.order[:, None], axis=2)
        let_go(self.weight[:, at])
        return np.ascontiguousarray(found, np.float32)

    def _rows(self, at: slice) -> tuple[F32, F32]:
        """The same, and what they are rounded to come near to."""
        w = self._weights(at)
        target = w * ((1 - self.factors) * self.damping)[:, None]
        solve(self.lower, target)
        target += w * self.factors[:, None]
        return w, target

    def _grid(self, p: Params, at: slice) -> tuple[F32, F32]:
        """Scales and zero points of rows, (groups, rows)."""
        shape = self.weight.shape[:2]
        scale, zero = (np.broadcast_to(a, (self.layer.channels,)).reshape(shape)[:, at] for a in (p.scales, p.zeros))
        return np.ascontiguousarray(scale), np.ascontiguousarray(zero, np.float32)

    def _nearest(self, w: F32, p: Params, at: slice) -> F32:
        scale, zero = self._grid(p, at)
        return np.asarray(np.clip(np.rint(w / scale[..., None]) + zero[..., None], p.scheme.low, p.scheme.high))

    def _shown(self, codes: Array, p: Params, at: slice) -> F32:
        scale, zero = self._grid(p, at)
        return (codes - zero[..., None]) * scale[..., None]

    def _error(self, off: F32, w: F32) -> Sums:
        """Mean squared error of rows whose weights are `off` beside W b."""
        square = np.square(off).sum(axis=2, dtype=np.float64)
        return np.asarray(lengths(self.lower, off) - self.damping * square + _dot(np.square(w), self.left))


def _slices(count: int, each: int) -> list[slice]:
    return [slice(i, min(i + each, count)) for i in range(0, count, each)]


def _dot(rows: Array, by: Sums) -> Sums:
    """(groups, R, K) with (groups, K), in double precision."""
    return np.asarray((rows.astype(np.float64) @ by[:, :, None])[..., 0])
