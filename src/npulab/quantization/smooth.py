"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): large channels of activations are divided by s, the weights that
meet them are multiplied by it: s = max|X|^a / max|W|^(1 - a) by channel. The function stays what it is.

The division goes into what makes the tensor: the scale and shift of a normalization, a layer's output channels, else,
if asked, a multiplication of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from npulab.dialects.quantities import is_op
from npulab.errors import UsageError
from npulab.ir import DType, Node, Value
from npulab.ir.ops import OnnxOp
from npulab.quantization.chains import (
    Floats,
    Indices,
    by_input,
    channel_axis,
    links,
    readers_of,
    scale_input,
    scale_output,
)
from npulab.quantization.moments import Seen, seen
from npulab.quantization.network import Layer, Network, Point
from npulab.quantization.session import Progress
from npulab.quantization.types import F32, Samples

ALPHA = 0.5
OUTLIERS = 8.0
"""A tensor has outliers where its largest channel is this many times the median one; channels of trained convolutions
stay below (after equalization), outliers of transformers are beyond 20 (Xiao et al., figure 4)."""
GAIN = 0.8
"""The predicted squared error behind the readers must fall at least to this share."""
LEAST, MOST = 2.0**-12, 2.0**12

Readers = tuple[tuple[Layer, Indices], ...]


@dataclass(frozen=True, eq=False)
class _Place:
    """A tensor whose channels may be scaled: who reads them, and what takes the factors."""

    name: str
    value: int
    axis: int
    readers: Readers
    scale: Callable[[Floats], None]


def smooth(net: Network, samples: Samples, alpha: float = ALPHA, insert: bool = False, outliers: float = OUTLIERS,
           progress: Progress | None = None) -> list[str]:
    """Migrate scales where activations have outliers and the error that rounding is predicted to make falls. To be
    called before calibration.

    alpha     how much of the range moves to the weights, 0..1.
    insert    put a multiplication where nothing takes the factors; it costs an operator.
    outliers  see OUTLIERS; 1 for all.
    Raises: UsageError for another alpha.
    """
    if not 0 <= alpha <= 1:
        raise UsageError("the share of the range that moves to the weights is out of range", want="0..1",
                         got=f"alpha = {alpha:g}")
    places = list(_places(net, insert))
    if not places:
        return []
    looked = seen(net, {p.value: p.axis for p in places}, samples, progress)
    notes = []
    for place in places:
        found = looked[place.value]
        largest = np.maximum(np.abs(found.low), np.abs(found.high))
        some = largest[largest > 0]
        if not some.size or largest.max() < outliers * np.median(some):
            continue
        s = _factors(place.readers, largest, alpha)
        before, behind = _error(place.readers, found, np.ones_like(s)), _error(place.readers, found, s)
        if behind > GAIN * before:
            continue
        for reader, channels in place.readers:  # before `scale`, which may renumber
            scale_input(reader, s[channels])
        place.scale(1.0 / s)
        notes.append(f"{place.name}: channels up to {largest.max() / np.median(some):.3g} times the median, divided by "
                     f"{s.min():.3g} to {s.max():.3g}")
    return notes


def _factors(readers: Readers, largest: Floats, alpha: float) -> Floats:
    weights = np.zeros_like(largest)
    for reader, channels in readers:
        np.maximum.at(weights, channels, np.abs(by_input(reader, reader.weight)).max(axis=1).astype(np.float64))
    s = np.ones_like(largest)
    some = (largest > 0) & (weights > 0)
    if some.any():
        s[some] = largest[some] ** alpha / weights[some] ** (1 - alpha)
        s[some] /= np.exp(np.mean(np.log(s[some])))  # a factor of all changes nothing
    return np.clip(s, LEAST, MOST)


def _error(readers: Readers, found: Seen, s: Floats) -> float:
    """The squared error behind the readers, relative to their results' squares, that rounding of data divided by s and
    of weights multiplied by s makes if errors are independent: steps squared / 12 of one times squares of the other."""
    low, high = min(0.0, float((found.low / s).min())), max(0.0, float((found.high / s).max()))
    total = 0.0
    for reader, channels in readers:
        f, squares = s[channels], (found.square / s**2)[channels]
        w = by_input(reader, reader.weight).astype(np.float64) * f[:, None]
        bits = reader.scheme.bits if reader.scheme is not None else 16
        per_channel = reader.scheme is not None and reader.scheme.per_channel
        scaled = np.abs(reader.rows(reader.weight * reader.by_input(f.astype(np.float32)))).max(axis=1)
        steps = (scaled if per_channel else np.full_like(scaled, scaled.max())) / 2.0 ** (bits - 1)
        of_data = ((high - low) / 255) ** 2 * float(np.sum(w**2))
        # w.shape[1]: output channels of an input channel's group, times taps
        of_weights = float(np.mean(steps.astype(np.float64) ** 2)) * w.shape[1] * float(np.sum(squares))
        signal = float(np.sum(w**2 * squares[:, None]))
        total += (of_data + of_weights) / max(signal, 1e-30)
    return total


def _places(net: Network, insert: bool) -> Iterator[_Place]:
    taken: set[int] = set()
    for link in links(net):
        layer = link.first
        if np.isfinite(layer.clamp[1]) or layer.clamp[0] not in (0.0, -np.inf):
            continue
        shape = net.graph.values[layer.result].shape
        if any(taken & {r.node} for r, _ in link.readers):
            continue
        taken |= {r.node for r, _ in link.readers}
        yield _Place(layer.name, layer.result, channel_axis(layer, len(shape)), link.readers,
                     partial(scale_output, net, layer))
    for n in net.graph.nodes:
        wanted = _normalization(net, n)
        readers = readers_of(net, n.outputs[0]) if wanted is not None else ()
        if wanted is None or not readers or taken & {r.node for r, _ in readers}:
            continue
        taken |= {r.node for r, _ in readers}
        yield _Place(n.name or n.op.name, n.outputs[0], -1, readers,
                     partial(_scale_constants, net, wanted))
    if not insert:
        return
    rest: dict[int, list[Layer]] = {}
    for layer in net.layers:
        if layer.node not in taken and layer.scheme is not None:
            rest.setdefault(layer.data, []).append(layer)
    for value, layers in rest.items():
        axes = {channel_axis(layer, len(net.graph.values[value].shape)) for layer in layers}
        if len(axes) > 1:
            continue
        axis = axes.pop()
        channels = np.arange(net.graph.values[value].shape[axis], dtype=np.int32)
        yield _Place(net.name(value), value, axis, tuple((layer, channels) for layer in layers),
                     partial(_insert, net, value, layers, axis))


def _normalization(net: Network, n: Node) -> list[tuple[int, int]] | None:
    """(value of a node's result, position of the input) of the constants, along the last axis, that a normalization's
    result is proportional to all together: scale and shift."""
    graph = net.graph
    out = graph.values[n.outputs[0]]
    width = out.shape[-1] if out.has_shape and out.shape else 0

    def constant(m: Node) -> int | None:
        """The position of a constant of a number for each channel."""
        for i, v in enumerate(m.inputs):
            value = graph.values[v] if v >= 0 else None
            if value is not None and value.is_constant and value.dtype is DType.FLOAT32 and value.elements == width \
                    and value.shape[-1:] == (width,):
                return i
        return None

    if width == 0 or any(layer.added == n.index for layer in net.layers):
        return None
    if is_op(n, "LayerNormalization", "RMSNormalization"):
        if any(v >= 0 for v in n.outputs[1:]):
            return None
        places = [i for i in (1, 2) if len(n.inputs) > i and n.inputs[i] >= 0]
        whole = all(graph.values[n.inputs[i]].is_constant and graph.values[n.inputs[i]].shape == (width,)
                    for i in places)
        return [(n.outputs[0], i) for i in places] if whole else None
    if is_op(n, "Mul") and (i := constant(n)) is not None and not graph.values[n.inputs[1 - i]].is_constant:
        return [(n.outputs[0], i)]
    if is_op(n, "Add") and (i := constant(n)) is not None:
        before = n.inputs[1 - i]
        made = graph.producer.get(before)
        if made is not None and is_op(made, "Mul") and len(graph.consumers.get(before, ())) == 1 \
                and before not in graph.outputs and (j := constant(made)) is not None:
            return [(before, j), (n.outputs[0], i)]
    return None


def _add_value(net: Network, name: str, like: Value, array: F32 | None = None) -> Value:
    """A new constant, or a new tensor like another."""
    names = {v.name for v in net.graph.values}
    while name in names:
        name += "_"
    v = Value(len(net.graph.values), name, like.shape if array is None else array.shape, DType.FLOAT32,
              constant=None if array is None else memoryview(np.ascontiguousarray(array, np.float32).tobytes()))
    net.graph = replace(net.graph, values=(*net.graph.values, v))
    return v


def _scale_constants(net: Network, places: Sequence[tuple[int, int]], factors: Floats) -> None:
    for value, position in places:
        _scale_constant(net, value, position, factors)


def _scale_constant(net: Network, value: int, position: int, factors: Floats) -> None:
    """Another constant for the node that makes a value: the old one times factors along the last axis."""
    node = net.graph.producer[value]
    old = net.graph.values[node.inputs[position]]
    array = (np.asarray(old.array(), np.float64) * factors).astype(np.float32)
    new = _add_value(net, f"{old.name}_smoothed", old, array)
    changed = replace(node, inputs=tuple(new.index if i == position else v for i, v in enumerate(node.inputs)))
    net.graph = replace(net.graph, nodes=tuple(changed if n.index == node.index else n for n in net.graph.nodes))
    if old.index in net.operands:
        net.operands[new.index] = None
        if not net.graph.consumers.get(old.index):
            del net.operands[old.index]


def _insert(net: Network, value: int, layers: list[Layer], axis: int, factors: Floats) -> None:
    """A multiplication between a tensor and layers that read it; later nodes' numbers move up."""
    at = min(layer.node for layer in layers)
    old = net.graph.values[value]
    shape = [-1 if i == axis % len(old.shape) else 1 for i in range(len(old.shape))]
    factor = _add_value(net, f"{old.name}_smoothing", old, factors.astype(np.float32).reshape(shape))
    out = _add_value(net, f"{old.name}_smoothed", old)
    like = net.graph.nodes[at]
    readers = {layer.node for layer in layers}
    nodes = []
    for n in net.graph.nodes:
        inputs = (out.index, *n.inputs[1:]) if n.index in readers else n.inputs
        nodes.append(replace(n, index=n.index + (n.index >= at), inputs=inputs))
    mul = replace(like, index=at, op=OnnxOp("Mul", {}), inputs=(value, factor.index), outputs=(out.index,),
                  name=out.name)
    nodes.insert(at, mul)
    net.graph = replace(net.graph, nodes=tuple(nodes))
    for layer in net.layers:
        layer.node += layer.node >= at
        layer.added += layer.added >= at
    for layer in layers:
        layer.data = out.index
    before = net.of.get(value)
    point = Point([out.index], before.scheme if before is not None else net.rules.activations[0])
    net.points.insert(net.points.index(before) + 1 if before is not None else len(net.points), point)
    net.of[out.index] = point
    net.operands[factor.index] = None
