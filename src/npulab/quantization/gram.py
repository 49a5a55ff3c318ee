"""Second moments of what layers with weights read: all that the error of rounded weights depends on.

A layer's results are W x + b in the float network and Wq x^ + bq in the integer one. With the best bq, the mean squared
difference of a channel is a quadratic form of its row of Wq: of the covariances of x^ and between x and x^. They are
summed sample by sample, so memory does not grow with the samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError, UsageError
from npulab.importers.onnx_parts import Thin, thin
from npulab.ir.ops import OnnxOp
from npulab.program.pages import Buffer
from npulab.quantization.emit import float_model, integer_model
from npulab.quantization.network import Layer, Network
from npulab.quantization.parts import apart
from npulab.quantization.sampling import drawn
from npulab.quantization.session import Progress, give_back, in_order, runner
from npulab.quantization.types import F32, Array, Feeds, Params, Samples

T = TypeVar("T")
ROWS = 16384
"""Patches of a layer over all samples that are enough if they hold no more than ELEMENTS, else fewer, but at least
PATCHES_A_WEIGHT times the weights of a channel."""
ELEMENTS = 1 << 25
PATCHES_A_WEIGHT = 8
BRIEF_ROWS = 4096
BRIEF_ELEMENTS = 1 << 23
BRIEF_PATCHES_A_WEIGHT = 4
"""The same for `rounding_brief`: 8-bit weights are hardly better for more."""
FLUSH = 2048
FLUSH_BYTES = 1 << 21
"""Patches that are multiplied at once: so many, or so many bytes."""
F32_BYTES = 4
SMALL_STEPS = 8
"""Bits of integers whose distances from their zero point fit int16."""
WIDE = 1024
"""Weights of a channel from which sums are kept in float32: float64 would double hundreds of megabytes."""
LARGEST = 2.0**46
"""Number whose squares can be summed in float32 over all patches and all weights of a channel."""
ROWS_AT_ONCE = 128
"""Of a matrix of sums."""


@dataclass(eq=False)
class Reference:
    """The float network that roundings aim at: taken before biases are corrected.

    net  with the layers as they were then.
    """

    net: Network

    @property
    def biases(self) -> list[F32 | None]:
        """Of the layers, in their order."""
        return [layer.bias for layer in self.net.layers]

    def model(self) -> Buffer:
        """The ONNX file, written when it is asked for: it is as large as all weights."""
        return float_model(self.net)

    @contextmanager
    def biases_in(self, net: Network) -> Iterator[None]:
        """The biases as they were then, in the network that came of it."""
        now = [layer.bias for layer in net.layers]
        for layer, bias in zip(net.layers, self.biases, strict=True):
            layer.bias = bias
        try:
            yield
        finally:
            for layer, bias in zip(net.layers, now, strict=True):
                layer.bias = bias


def reference(net: Network) -> Reference:
    """The network as its layers' float weights and biases are now."""
    return Reference(replace(net, layers=[copy.copy(layer) for layer in net.layers]))


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one sample brings to the Moments of a layer: its sums, and its patches (of q and x), for products that are
    made of many samples at once. Those of q are kept in the steps of a scale where they are integers: half of floats.
    """

    sums: NDArray[np.float64]
    float_sums: NDArray[np.float64]
    patches: tuple[Array, Array]


@dataclass(eq=False)
class Moments:
    """Sums over patches of one layer: x of the float network, q what the integer one reads. (groups, K) a patch.

    second  sum of q q^T, (groups, K, K).      cross  sum of x q^T.      sums, float_sums  of q and x, (groups, K).
    power   sums of y^2 over y = W x, (channels,).                       count  patches.      weight  W.
    params  of what the integer layer reads; None: floats.
    """

    layer: Layer
    weight: F32
    second: NDArray[Any]
    cross: NDArray[Any]
    sums: NDArray[np.float64]
    float_sums: NDArray[np.float64]
    power: NDArray[np.float64]
    params: Params | None = None
    count: int = 0
    waiting: list[tuple[Array, Array]] = field(default_factory=list)

    def share(self, x: F32, rows: F32) -> Share:
        """Of one sample's patches (n, groups, K): x of the float network, `rows` of what the integer layer reads,
        before its integers show it."""
        kept: Array = rows
        q = rows
        if self.params is not None:
            steps = self.params.steps(rows)
            kept = steps.astype(np.int16) if self.params.scheme.bits <= SMALL_STEPS else steps
            q = steps * self.params.scales
        return Share(q.sum(axis=0, dtype=np.float64), x.sum(axis=0, dtype=np.float64), (kept, x))

    def add(self, one: Share) -> None:
        """One more sample, in the samples' order."""
        self.sums += one.sums
        self.float_sums += one.float_sums
        self.count += len(one.patches[0])
        self.waiting.append(one.patches)
        numbers = sum(a[0].size for a in self.waiting)
        if sum(len(a[0]) for a in self.waiting) >= FLUSH or numbers * F32_BYTES >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        q, x = (np.ascontiguousarray(np.concatenate(a).transpose(1, 0, 2), np.float32)
                      for a in zip(*self.waiting, strict=True))
        self.waiting.clear()
        if self.params is not None:
            q *= self.params.scales
        self.second += q.transpose(0, 2, 1) @ q
        self.cross += x.transpose(0, 2, 1) @ q
        y = (x @ grouped(self.layer, self.weight).transpose(0, 2, 1)).astype(np.float64)
        self.power += (y * y).sum(axis=1).ravel()

    def covariances(self, centred: bool) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]:
        """(of q, between x and q, powers of y): about their means if `centred`, a bias taking care of these."""
        n = max(1, self.count)
        second, cross, power = self.second / n, self.cross / n, self.power / n
        q, x = self.sums / n, self.float_sums / n
        if centred:
            _less(second, q, q)
            _less(cross, x, q)
            power -= self._means() ** 2
        return second, cross, np.maximum(power, 0.0)

    def blur(self) -> NDArray[np.float64]:
        """What rounding of products in float32 may have done to a variance, (groups,)."""
        k = self.second.shape[1]
        mean = np.trace(self.second, axis1=1, axis2=2) / (k * max(1, self.count))
        return np.asarray(mean * 1e-6 * k, np.float64)

    def forget(self) -> None:
        """The large sums, once covariances were made of them."""
        self.second = self.cross = np.zeros((len(self.sums), 0, 0))

    def drift(self, rounded: Array) -> NDArray[np.float64]:
        """What to add to the bias, (channels,), so that the means stay with `rounded` weights (groups, R, K)."""
        n = max(1, self.count)
        now = np.einsum("grk,gk->gr", rounded.astype(np.float64), self.sums / n).ravel()
        return np.asarray(self._means() - now)

    def _means(self) -> NDArray[np.float64]:
        """Of the float results without bias, (channels,)."""
        weight = grouped(self.layer, self.weight).astype(np.float64)
        return np.asarray(np.einsum("grk,gk->gr", weight, self.float_sums / max(1, self.count)).ravel())


def _less(sums: NDArray[Any], x: NDArray[np.float64], q: NDArray[np.float64]) -> None:
    """Subtracts x q^T, (groups, K) each, some rows at a time: in float64 all of them may be twice what they are taken
    from."""
    for i in range(0, x.shape[1], ROWS_AT_ONCE):
        rows = slice(i, i + ROWS_AT_ONCE)
        sums[:, rows] -= (x[:, rows, None] * q[:, None, :]).astype(sums.dtype)


def grouped(layer: Layer, array: Array | None = None) -> Array:
    """The weights, or an array of their shape, as (groups, channels of a group, K)."""
    rows = layer.rows(array)
    return np.ascontiguousarray(rows.reshape(layer.groups, layer.channels // layer.groups, -1))


def moments(net: Network, layers: Sequence[Layer], samples: Samples, aim: Reference, rounded: bool = False,
            progress: Progress | None = None) -> list[Moments]:
    """Sums over the samples for some layers.

    rounded  False: the integer network reads the float network's tensors, each as its integers show it.
             True: it reads what it computes itself: integers between all layers, rounded weights in those that have
             codes, float ones in the others.

    Raises: UsageError without samples or ONNX Runtime, and for numbers beyond LARGEST; ModelError for tensors that are
    not finite.
    """
    if not len(samples):
        raise UsageError("there are no samples to round with", got=samples.origin)
    names = list(dict.fromkeys(net.name(layer.data) for layer in layers))
    takes = [Patches(net, layer, len(samples)) for layer in layers]
    found = [_empty(layer, net.of[layer.data].params if layer.data in net.of else None) for layer in layers]

    def shares(number: int, floats: Mapping[str, Array], integers: Mapping[str, Array] | None = None
               ) -> list[tuple[Moments, Share]]:
        """Of the layers that read these tensors of a sample."""
        out = []
        for take, m in zip(takes, found, strict=True):
            x = floats.get(name := net.name(m.layer.data))
            if x is None:
                continue
            checked(x, name, number, samples)
            places = take.places(number)
            patches = take.rows(x, places)
            out.append((m, m.share(patches, patches if integers is None else take.rows(integers[name], places))))
        return out

    from threadpoolctl import threadpool_limits

    model = upto(aim.model(), names)
    with threadpool_limits(1, "blas"):  # one thread: the same sums to the last bit
        for _, made in (_both(model, upto(_partly_rounded(net), names), names, samples, shares, progress) if rounded
                        else apart(model, names, samples, shares, progress)):
            for m, one in made:
                m.add(one)
        give_back()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Moments.flush, found))
    return found


def checked(x: Array, name: str, number: int, samples: Samples) -> Array:
    """A sample's tensor. Raises: ModelError, UsageError as `moments` does."""
    largest = max(float(x.max(initial=0)), -float(x.min(initial=0)))  # NaN stays; no second tensor is made
    if not np.isfinite(largest):
        raise ModelError(f"'{name}' is not finite", got=f"sample {number + 1} of {samples.origin}",
                         try_="look for NaN in the data, or for overflow in the network")
    if largest > LARGEST:
        raise UsageError(f"'{name}' has numbers too large for adaptive rounding", want=f"at most {LARGEST:.0e}",
                         got=f"{largest:.3g}, sample {number + 1} of {samples.origin}",
                         try_="smaller data, or a recipe without adaround")
    return x


def _both(model: Thin, other: Thin, names: Sequence[str], samples: Samples, work: Callable[..., T],
          progress: Progress | None) -> Iterator[tuple[int, T]]:
    """`work` on each sample's tensors in two networks, samples in order."""
    runs = runner(model, names), runner(other, names, plain=True)

    def job(sample: tuple[int, Feeds]) -> tuple[int, T]:
        number, feeds = sample
        return number, work(number, *(dict(zip(names, run(feeds), strict=True)) for run in runs))

    count = len(samples)
    with ThreadPoolExecutor(2) as pool:
        for done, found in enumerate(in_order(pool, job, enumerate(samples), 3), 1):
            if progress:
                progress(done, count)
            yield found


def _empty(layer: Layer, params: Params | None) -> Moments:
    g, r, k = grouped(layer).shape
    dtype = np.float32 if k >= WIDE else np.float64
    return Moments(layer, layer.weight, np.zeros((g, k, k), dtype), np.zeros((g, k, k), dtype), np.zeros((g, k)),
                   np.zeros((g, k)), np.zeros(g * r), params)


def moments_bytes(layer: Layer) -> int:
    """What `Moments` of a layer hold."""
    g, _, k = grouped(layer).shape
    return int(2 * g * k * k * (4 if k >= WIDE else 8))


def _partly_rounded(net: Network) -> Buffer:
    """The integer network, layers without codes with their float weights."""
    kept = [(layer, layer.params) for layer in net.layers if layer.codes is None]
    for layer, _ in kept:
        layer.params = None
    try:
        return integer_model(net)
    finally:
        for layer, params in kept:
            layer.params = params


def upto(model: Buffer, names: Sequence[str]) -> Thin:
    """The model without what the tensors `names` do not need."""
    import onnx

    made = thin(model)
    proto = made.proto
    needed, kept = set(names), []
    for node in reversed(proto.graph.node):
        if needed.intersection(node.output):
            if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
                return made  # its body may read anything
            needed.update(node.input)
            kept.append(node)
    kept.reverse()
    shapes = [o for o in proto.graph.output if o.name in names]
    constants = [t for t in proto.graph.initializer if t.name in needed]
    for part, items in ((proto.graph.node, kept), (proto.graph.output, shapes), (proto.graph.initializer, constants)):
        del part[:]
        part.extend(items)
    return made


class Patches:
    """Which numbers meet a row of weights at a place of the result: im2col of some places, chosen by a seed."""

    def __init__(self, net: Network, layer: Layer, samples: int, brief: bool = False) -> None:
        self.layer = layer
        k = layer.rows().shape[1]
        least, most, elements = (BRIEF_PATCHES_A_WEIGHT, BRIEF_ROWS, BRIEF_ELEMENTS) if brief else (
            PATCHES_A_WEIGHT, ROWS, ELEMENTS)
        rows = max(least * k, min(most, elements // (layer.groups * k)))
        self.wanted = max(1, -(-rows // samples))
        data, result = net.graph.values[layer.data].shape, net.graph.values[layer.linear].shape
        if layer.kind in ("gemm", "matmul"):
            self.out: tuple[int, ...] = data[:-1]
            self.gather: Callable[[Array, Array], Array] = lambda x, at: x.reshape(-1, x.shape[-1])[at][:, None, :]
        else:
            op = net.graph.nodes[layer.node].op
            assert isinstance(op, OnnxOp)
            self.out = (result[0], *result[2:])
            self.gather = _window(op, layer, data, result)

    def places(self, number: int) -> NDArray[np.int64]:
        """Of sample `number`: all of them, or as many as wanted."""
        total = int(np.prod(self.out))
        if total <= self.wanted:
            return np.arange(total)
        return drawn(self.wanted, total, self.layer.node, number)

    def rows(self, x: Array, places: NDArray[np.int64]) -> F32:
        """(places, groups, K)."""
        return np.asarray(self.gather(x, places), np.float32)


def placed(op: OnnxOp, layer: Layer, data: tuple[int, ...], result: tuple[int, ...]
           ) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    """Strides, dilations and the pads in front of a convolution, along each axis; of a transposed one, the pads that
    it takes from its result."""
    rank = len(data) - 2
    kernel = layer.weight.shape[2:]

    def numbers(name: str) -> tuple[int, ...]:
        found = op.attributes.get(name)
        return tuple(int(n) for n in found) if isinstance(found, tuple) else (1,) * rank

    strides, dilations = numbers("strides"), numbers("dilations")
    extra = numbers("output_padding") if "output_padding" in op.attributes else (0,) * rank
    auto = op.attributes.get("auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else str(auto)
    pads = op.attributes.get("pads")
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    flipped = layer.kind == "transposed"
    begins = []
    for i in range(rank):
        size, out = data[2 + i], result[2 + i]
        if flipped:
            total = max(0, strides[i] * (size - 1) + reach[i] + extra[i] - out)
        else:
            total = max(0, (out - 1) * strides[i] + reach[i] - size)
        if auto.startswith("SAME") or (flipped and "output_shape" in op.attributes):  # which has no use for pads
            begins.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
        else:
            begins.append(int(pads[i]) if isinstance(pads, tuple) and auto == "NOTSET" else 0)
    return strides, dilations, begins


def _window(op: OnnxOp, layer: Layer, data: tuple[int, ...], result: tuple[int, ...]
            ) -> Callable[[Array, Array], Array]:
    """Patches of a convolution; of a transposed one, those of the convolution over its input with zeros between."""
    rank = len(data) - 2
    kernel, flipped = layer.weight.shape[2:], layer.kind == "transposed"
    strides, dilations, begins = placed(op, layer, data, result)

    def gather(x: Array, at: Array) -> Array:
        where = np.unravel_index(at, (result[0], *result[2:]))
        ok = np.ones((len(at), *kernel), bool)
        index: list[Array] = []
        for i in range(rank):
            lane = [1] * (rank + 1)
            lane[1 + i] = kernel[i]
            steps = (np.arange(kernel[i]) * dilations[i]).reshape(lane)
            start = where[1 + i].reshape(-1, *[1] * rank)
            if flipped:
                far = start + begins[i] - steps  # input * stride = output + pad - tap * dilation
                ok &= far % strides[i] == 0
                place = far // strides[i]
            else:
                place = start * strides[i] - begins[i] + steps
            ok &= (place >= 0) & (place < x.shape[2 + i])
            index.append(np.clip(place, 0, x.shape[2 + i] - 1))
        first = where[0].reshape(-1, *[1] * rank)
        found = np.moveaxis(x, 1, -1)[(first, *np.broadcast_arrays(*index))] * ok[..., None]  # (n, *kernel, C)
        found = np.moveaxis(found, -1, 1)  # (n, C, *kernel)
        return np.asarray(found.reshape(len(at), layer.groups, -1))

    return gather
