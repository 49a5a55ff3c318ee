"""Which layers' output channels another layer reads, channel by channel, so that factors can move between the two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError
from npulab.ir import Graph, Node
from npulab.ir.ops import OnnxOp, captures
from npulab.quantization.network import Layer, Network, clamp_of
from npulab.quantization.types import Array

Indices = NDArray[np.int32]
Floats = NDArray[np.float64]

HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout")
"""f(s x) = s f(x) for s > 0, element by element."""
POOLS = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "LpPool", "GlobalLpPool")
"""Homogeneous too, each channel by itself."""
SHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
LABELS_MAX = 1 << 24
"""Elements of a tensor whose channels are followed through a change of shape."""


@dataclass(frozen=True, eq=False)
class Link:
    """A layer whose results only layers read, through operators that take a factor of a channel along.

    readers  with the channel of `first` that each of their input channels is.
    adds     whether the operators between take an added constant along as well: none but the clamp and moves.
    """

    first: Layer
    readers: tuple[tuple[Layer, Indices], ...]
    adds: bool


def channel_axis(layer: Layer, rank: int) -> int:
    """The axis of a layer's data, and of its result, that holds channels."""
    return 1 if layer.kind in ("conv", "transposed") else rank - 1


def links(net: Network) -> Iterator[Link]:
    """Those of the network, in order of their first layers. The one clamp with an upper limit that is passed is the
    first layer's own."""
    by_node = {layer.node: layer for layer in net.layers}
    for layer in net.layers:
        shape = net.graph.values[layer.linear].shape
        axis = channel_axis(layer, len(shape))
        labels = np.arange(layer.channels, dtype=np.int32).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        found = _follow(net, by_node, layer, layer.linear, labels)
        if found is not None and found[0]:
            yield Link(layer, tuple(found[0]), found[1])


def readers_of(net: Network, value: int) -> tuple[tuple[Layer, Indices], ...]:
    """The layers that read a tensor's channels, which lie along its last axis; none where something else does."""
    shape = net.graph.values[value].shape
    labels = np.arange(shape[-1], dtype=np.int32).reshape([1] * (len(shape) - 1) + [-1])
    found = _follow(net, {layer.node: layer for layer in net.layers}, None, value, labels)
    return tuple(found[0]) if found is not None else ()


def _follow(net: Network, by_node: dict[int, Layer], first: Layer | None, value: int, labels: Indices
            ) -> tuple[list[tuple[Layer, Indices]], bool] | None:
    """Readers of a tensor whose elements belong to the channels `labels` (of size 1 along axes where they are the
    same); None where something reads it that a factor cannot pass."""
    graph = net.graph
    if value in graph.outputs:
        return None
    readers: list[tuple[Layer, Indices]] = []
    adds = True
    for n in graph.consumers.get(value, ()):
        if value in captures(n.op) or n.inputs[0] != value or value in n.inputs[1:]:
            return None
        layer = by_node.get(n.index)
        if layer is not None:
            channels = _along(labels, channel_axis(layer, labels.ndim), graph.values[value].shape)
            if channels is None:
                return None
            readers.append((layer, channels))
            continue
        passed = _passed(graph, n, first, value, labels)
        further = _follow(net, by_node, first, n.outputs[0], passed[0]) if passed is not None else None
        if passed is None or further is None:
            return None
        readers += further[0]
        adds = adds and passed[1] and further[1]
    return readers, adds


def _along(labels: Indices, axis: int, shape: tuple[int, ...]) -> Indices | None:
    """The channel of each position of `axis`; None if it depends on others."""
    if labels.size != labels.shape[axis]:
        return None
    return np.broadcast_to(labels.reshape(-1), shape[axis])


def _passed(graph: Graph, n: Node, first: Layer | None, value: int, labels: Indices) -> tuple[Indices, bool] | None:
    """Labels behind a node, and whether it takes added constants along; None where factors do not pass."""
    op = n.op
    assert isinstance(op, OnnxOp)
    if op.domain or len([v for v in n.outputs if v >= 0]) != 1:
        return None
    clamps = first is not None and n.outputs[0] == first.result != first.linear
    if op.name in ("Relu", "Clip") and (clamps or clamp_of(graph, n) == (0.0, np.inf)):
        return labels, clamps
    if op.name in HOMOGENEOUS:
        return labels, op.name in ("Identity", "Dropout")
    plain = labels.ndim > 2 and labels.size == labels.shape[1]  # each channel on axis 1, whole
    if op.name in POOLS:
        padded = op.name == "AveragePool" and bool(op.attributes.get("count_include_pad"))
        return (labels, op.name not in ("LpPool", "GlobalLpPool") and not padded) if plain else None
    if op.name == "ReduceMean":
        axes = _axes(graph, n, labels.ndim)
        kept = bool(op.attributes.get("keepdims", 1))
        if not plain or axes is None or 0 in axes or 1 in axes:
            return None
        return (labels if kept else labels.reshape(labels.shape[: labels.ndim - len(axes)])), True
    if op.name == "Pad":
        return (labels, False) if plain and _pads_zeros(graph, n, labels.ndim) else None
    if op.name == "Transpose":
        perm = op.attributes.get("perm", list(range(labels.ndim))[::-1])
        assert isinstance(perm, list | tuple)
        return labels.transpose(perm), True
    if op.name in SHAPES:
        shape = graph.values[value].shape
        if graph.values[value].elements > LABELS_MAX:
            return None
        return _compact(np.broadcast_to(labels, shape).reshape(graph.values[n.outputs[0]].shape)), True
    return None


def _axes(graph: Graph, n: Node, rank: int) -> list[int] | None:
    """The axes of a reduction, none below 0; None where they are computed or all."""
    found: object = n.op.attributes.get("axes") if isinstance(n.op, OnnxOp) else None
    if len(n.inputs) > 1 and n.inputs[1] >= 0:
        v = graph.values[n.inputs[1]]
        found = v.array().tolist() if v.is_constant else None
    return [int(a) % rank for a in found] if isinstance(found, list | tuple) and found else None


def _pads_zeros(graph: Graph, n: Node, rank: int) -> bool:
    """Whether a Pad leaves channels what they are, and puts zeros or copies around them."""
    assert isinstance(n.op, OnnxOp)
    mode = n.op.attributes.get("mode", "constant")
    fill: object = n.op.attributes.get("value", 0.0)
    pads: object = n.op.attributes.get("pads")
    if len(n.inputs) > 3 and n.inputs[3] >= 0:
        return False
    if len(n.inputs) > 2 and n.inputs[2] >= 0:
        v = graph.values[n.inputs[2]]
        fill = float(v.array().reshape(-1)[0]) if v.is_constant else None
    if len(n.inputs) > 1:
        v = graph.values[n.inputs[1]]
        pads = v.array().tolist() if v.is_constant else None
    if not isinstance(pads, list | tuple) or len(pads) != 2 * rank or any(pads[i] for i in (0, 1, rank, rank + 1)):
        return False
    return mode != "constant" or fill == 0.0


def _compact(labels: Indices) -> Indices:
    """Axes along which nothing changes, of size 1."""
    for axis in range(labels.ndim):
        start = labels.take([0], axis)
        if (labels == start).all():
            labels = start
    return np.ascontiguousarray(labels)


def by_input(layer: Layer, array: Array) -> Array:
    """Weights (input channels, the rest): those that an input channel meets."""
    w = array
    if layer.kind == "conv":
        grouped = w.reshape(layer.groups, w.shape[0] // layer.groups, *w.shape[1:])
        return np.moveaxis(grouped, 2, 1).reshape(layer.groups * w.shape[1], -1)
    if layer.kind == "transposed":
        return w.reshape(w.shape[0], -1)
    return np.moveaxis(w, 1 - layer.axis, 0).reshape(w.shape[1 - layer.axis], -1)


def scale_output(net: Network, layer: Layer, factors: Floats) -> None:
    """Multiply a layer's output channels, what batch normalization said of them too."""
    layer.weight = layer.weight * layer.by_output(factors.astype(np.float32))
    scale_results(net, layer, factors)


def scale_results(net: Network, layer: Layer, factors: Floats) -> None:
    """The same of all but the weights."""
    f = factors.astype(np.float32)
    if layer.bias is not None:
        layer.bias = layer.bias * f
    if layer.linear in net.moments:
        mean, deviation = net.moments[layer.linear]
        net.moments[layer.linear] = mean * f, deviation * f


def scale_input(layer: Layer, factors: Floats) -> None:
    """Multiply what a layer takes of each input channel."""
    layer.weight = layer.weight * layer.by_input(factors.astype(np.float32))


def without_ceiling(net: Network, layer: Layer) -> None:
    """ReLU6 becomes ReLU. The function changes where numbers go beyond 6."""
    clamp = net.graph.producer[layer.result]
    if layer.result == layer.linear or layer.clamp[0] != 0.0:
        raise InvariantError(f"'{layer.name}' has no ReLU6")
    relu = replace(clamp, op=OnnxOp("Relu", {}), inputs=clamp.inputs[:1])
    nodes = tuple(relu if n.index == clamp.index else n for n in net.graph.nodes)
    net.graph = replace(net.graph, nodes=nodes)
    layer.clamp = (0.0, np.inf)
