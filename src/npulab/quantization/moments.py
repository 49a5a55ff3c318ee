"""Extremes, means and deviations of channels: measured; or, without data, what batch normalization says, carried on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from npulab.dialects.quantities import is_op
from npulab.errors import ModelError
from npulab.ir import Graph, Node
from npulab.quantization.chains import POOLS, SHAPES, Floats, by_input, channel_axis
from npulab.quantization.emit import float_model
from npulab.quantization.network import Layer, Network, clamp_of
from npulab.quantization.parts import apart
from npulab.quantization.session import Progress
from npulab.quantization.types import Array, Samples

Moments = tuple[Floats, Floats]
LARGE = 1e18
"""Numbers below it have squares that are float32."""
_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True, eq=False)
class Seen:
    """What samples show of a tensor's channels: extremes, means, mean squares (channels,)."""

    low: Floats
    high: Floats
    mean: Floats
    square: Floats

    @property
    def deviation(self) -> Floats:
        return np.sqrt(np.maximum(0.0, self.square - self.mean**2))


def results_seen(net: Network, samples: Samples, progress: Progress | None = None) -> dict[int, Seen]:
    """Of all layers' results before the clamp in the float network as it is now, by value."""
    return seen(net, {layer.linear: channel_axis(layer, len(net.graph.values[layer.linear].shape))
                      for layer in net.layers}, samples, progress)


def seen(net: Network, axes: Mapping[int, int], samples: Samples, progress: Progress | None = None) -> dict[int, Seen]:
    """Of tensors of the float network, by value. `axes`: of each, the one that channels lie along.

    Raises: ModelError where a tensor is not finite; UsageError without samples.
    """
    by_name = {net.name(v): axis for v, axis in axes.items()}

    def work(_: int, arrays: Mapping[str, Array]) -> dict[str, Floats]:
        found = {}
        for name, a in arrays.items():
            others = _but(by_name[name], a.ndim)
            low, high = a.min(axis=others), a.max(axis=others)
            wide = a if np.abs((low, high)).max(initial=0) < LARGE else a.astype(np.float64)
            found[name] = np.stack([low, high, a.mean(axis=others, dtype=np.float64),
                                    np.square(wide).mean(axis=others, dtype=np.float64)]).astype(np.float64)
        return found

    totals: dict[str, Floats] = {}
    for _, now in apart(float_model(net), list(by_name), samples, work, progress):
        for name, one in now.items():
            if not np.isfinite(one).all():
                raise ModelError(f"'{name}' is not finite", got=samples.origin,
                                 try_="look for NaN in the data, or for overflow in the network")
            total = totals.setdefault(name, np.stack([one[0], one[1], *np.zeros_like(one[2:])]))
            total[0], total[1] = np.minimum(total[0], one[0]), np.maximum(total[1], one[1])
            total[2:] += one[2:]
    return {v: Seen(t[0], t[1], t[2] / len(samples), t[3] / len(samples))
            for v, t in ((v, totals[net.name(v)]) for v in axes)}


def _but(axis: int, rank: int) -> tuple[int, ...]:
    """The other axes."""
    return tuple(i for i in range(rank) if i != axis % rank)


def ceilings_met(net: Network, samples: Samples, progress: Progress | None = None) -> dict[int, Floats]:
    """How high each channel below an upper limit (ReLU6) goes, for layers that have one, by the value before the
    clamp."""
    layers = {net.name(layer.linear): layer for layer in net.layers
              if np.isfinite(layer.clamp[1]) and layer.clamp[1] > 0}
    if not layers:
        return {}

    def work(_: int, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: a.max(axis=_but(channel_axis(layers[name], a.ndim), a.ndim)) for name, a in arrays.items()}

    found: dict[str, Floats] = {}
    for _, now in apart(float_model(net), list(layers), samples, work, progress):
        for name, high in now.items():
            found[name] = np.maximum(found.get(name, -np.inf), high.astype(np.float64))
    return {layer.linear: found[name] for name, layer in layers.items()}


def input_moments(net: Network) -> dict[int, Moments]:
    """Means and deviations of layers' input channels by layer.node, where they are known.

    Each channel is taken as normally distributed behind batch normalization (mean beta, deviation |gamma|), clamps cut
    it off (Nagel et al. 2019, arXiv:1906.04721, appendix C); sums of tensors as of independent ones; channels of layers
    without batch normalization likewise, from their inputs, as if nothing were padded.
    """
    graph = net.graph
    by_node = {layer.node: layer for layer in net.layers}
    by_linear = {layer.linear: layer for layer in net.layers}
    known: dict[int, Moments] = {}
    found: dict[int, Moments] = {}
    for n in graph.nodes:
        layer = by_node.get(n.index)
        if layer is not None and layer.data in known:
            mean, deviation = known[layer.data]
            if len(mean) == len(by_input(layer, layer.weight)):
                found[layer.node] = mean, deviation
        out = n.outputs[0]
        if out in by_linear:
            owner = by_linear[out]
            if out in net.moments:
                beta, gamma = net.moments[out]
                known[out] = beta.astype(np.float64), gamma.astype(np.float64)
            elif owner.node in found and owner.kind != "transposed":
                known[out] = _behind(owner, found[owner.node])
        elif layer is None and (now := _carried(graph, n, known)) is not None:
            known[out] = now
    return found


def sums(layer: Layer, by_channel: Floats, inputs: Floats) -> Floats:
    """sum over input channels and taps of weights (input channels, the rest) * inputs, by output channel."""
    if layer.kind == "conv":  # the rest: output channels of the group, taps
        out = layer.channels // layer.groups
        taps = by_channel.reshape(layer.groups, -1, out, by_channel.shape[1] // out).sum(axis=3)
        return np.asarray(np.einsum("gio,gi->go", taps, inputs.reshape(layer.groups, -1)).reshape(-1), np.float64)
    return np.asarray(by_channel.reshape(len(inputs), layer.channels, -1).sum(axis=2).T @ inputs)


def clipped_normal(mean: Floats, deviation: Floats, low: float, high: float) -> Moments:
    """Mean and deviation of a normal variable clamped to low..high."""
    sigma = np.maximum(deviation, 1e-12)

    def parts(limit: float) -> tuple[Floats, Floats]:
        """Of the standard normal at a limit: distribution and density."""
        if np.isinf(limit):
            return np.full(mean.shape, float(limit > 0)), np.zeros(mean.shape)
        z = (limit - mean) / sigma
        return 0.5 * (1 + _erf(z / math.sqrt(2))), np.exp(-0.5 * np.minimum(z * z, 1400)) / math.sqrt(2 * math.pi)

    (below, d0), (upto, d1) = parts(low), parts(high)
    inside = upto - below
    a, b = (0.0 if np.isinf(low) else low), (0.0 if np.isinf(high) else high)
    first = a * below + b * (1 - upto) + mean * inside + sigma * (d0 - d1)
    second = a * a * below + b * b * (1 - upto) + (mean**2 + sigma**2) * inside \
        + sigma * ((mean + a) * d0 - (mean + b) * d1)
    return first, np.sqrt(np.maximum(second - first**2, 0.0))


def _behind(layer: Layer, given: Moments) -> Moments:
    """Of a layer's result from its input."""
    w = by_input(layer, layer.weight).astype(np.float64)
    mean = sums(layer, w, given[0]) + (0.0 if layer.bias is None else layer.bias.astype(np.float64))
    return mean, np.sqrt(sums(layer, w**2, given[1] ** 2))


def _carried(graph: Graph, n: Node, known: dict[int, Moments]) -> Moments | None:
    """Of a node's result, where its inputs are known and each channel stays by itself."""
    if n.inputs[0] not in known:
        return None
    given = known[n.inputs[0]]
    before, behind = graph.values[n.inputs[0]].shape, graph.values[n.outputs[0]].shape
    if is_op(n, "Relu", "Clip"):
        limits = clamp_of(graph, n)
        return clipped_normal(*given, *limits) if limits is not None else None
    if is_op(n, "Identity", "Dropout", *(p for p in POOLS if "Average" in p)):
        return given
    if is_op(n, *SHAPES):
        axes = [s for s in before[1:] if s != 1], [s for s in behind[1:] if s != 1]
        return given if axes[0] == axes[1] == [len(given[0])] else None
    if is_op(n, "Add") and n.inputs[1] in known and before == graph.values[n.inputs[1]].shape:
        other = known[n.inputs[1]]
        return given[0] + other[0], np.sqrt(given[1] ** 2 + other[1] ** 2)
    return None
