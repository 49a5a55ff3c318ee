"""What training with quantization found, put upon a network for a target: kept to the last bit where the target can.

A target that stores tensors otherwise gets the nearest that it has, and what changed is said. Nothing is lost where
only the type shifts from signed to unsigned or to more bits, or one scale is repeated for each channel: the integers
then stand for the same numbers. A scale that must be a power of two, a zero point that must be in the middle, or one
scale instead of one a channel means rounding a second time.

Tensors without a pair are calibrated, except around layers that training left in floats: those stay so on targets
that have floats. Tensors that are connected by operators which only move numbers share the params of the first pair;
where a later pair has others, each keeps its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from npulab.ir import Graph, Node
from npulab.program.pages import Buffer
from npulab.quantization import refit
from npulab.quantization.calibrate import roomy
from npulab.quantization.emit import integer_model
from npulab.quantization.network import MOVES, Layer, Network, Point, network
from npulab.quantization.pairs import Stored, Trained, as_trained, is_trained, same_levels
from npulab.quantization.ranges import params_of
from npulab.quantization.refit import MUCH, Said, names_of, tensor, tensor_schemes, weight_schemes
from npulab.quantization.types import Array, Feeds, ListedSamples, Params, Rules, Samples, Scheme

__all__ = ["Kept", "Trained", "apply", "as_it_was", "as_trained", "is_trained", "probes", "stored"]

AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean", "Resize", "Upsample")
PROBES = 4
EVERYTHING = tuple(Scheme(bits, signed) for bits in (8, 16) for signed in (True, False))
ANY = Rules("as trained", "the network as it was trained", "onnx", EVERYTHING, tuple(
    Scheme(bits, signed, per_channel=many) for bits in (8, 4, 2, 16) for signed in (True, False)
    for many in (True, False)))
"""Rules of a target that takes everything."""


@dataclass(frozen=True, eq=False)
class Kept:
    """Params that come from training: of points by their values, of layers by their nodes with the integers (None: the
    nearest). `notes`: what was changed for the target, what was left out."""

    points: Mapping[tuple[int, ...], Params]
    layers: Mapping[int, tuple[Params, Array | None]]
    notes: Sequence[str]

    def put_back(self, net: Network) -> None:
        """Undo what a calibration of the whole network did to what was trained. What has another scheme by now, or
        none, was asked to."""
        for p in net.points:
            params = self.points.get(tuple(p.values))
            if params is not None and p.scheme == params.scheme:
                p.params = params
        for layer in net.layers:
            if layer.node in self.layers and layer.scheme == self.layers[layer.node][0].scheme:
                params, codes = self.layers[layer.node]
                layer.params = _with_room(net, layer, params)
                layer.codes = codes if layer.params is params else None

    def is_complete(self, net: Network) -> bool:
        """Whether nothing is left to be calibrated."""
        return (all(p.params is not None for p in net.quantized_points())
                and all(layer.params is not None for layer in net.layers if layer.scheme is not None))


def apply(net: Network, trained: Trained, activations: int | None = None, weights: int | None = None,
          per_channel: bool | None = None) -> Kept:
    """Give points, layers and constants of a float network what training found, as its target takes it.

    activations, weights, per_channel   what is asked for, in bits and scales; None: as trained where it may be.
    """
    asked = any(x is not None for x in (activations, weights, per_channel))
    said = Said("" if asked else net.rules.title)
    constants = {v.name: v.index for v in net.graph.values}
    tensors = _by_value(net, trained, constants)
    layers = {layer.node: found for layer in net.layers if (found := stored(net, layer, trained)) is not None}
    schemes = tensor_schemes(net.rules, tensors.values(), layers.values(), activations)
    first = next((s for s in schemes if s.bits == net.rules.activations[0].bits), schemes[0])
    for p in list(net.points):
        _split(net, p, tensors, said)
    for p in net.points:
        if p.scheme is not None:
            p.scheme = first
        known = next((tensors[v] for v in p.values if v in tensors), None)
        if known is not None:
            p.params = tensor(net, p, known, schemes, said)
            p.scheme = p.params.scheme
    notes = _left_in_floats(net, layers)
    if net.rules is not ANY:
        _averages(net, said)
    for v in net.operands:
        name = net.name(v)
        if name in trained.constants:
            net.operands[v] = tensor(net, None, trained.constants[name].params, schemes, said, name)
        elif first != net.rules.activations[0]:
            array = np.asarray(net.graph.values[v].array(), np.float32)
            net.operands[v] = params_of((float(array.min(initial=0)), float(array.max(initial=0))), first)
    kept: dict[int, tuple[Params, Array | None]] = {}
    for layer in net.layers:
        if layer.scheme is None:
            continue
        own = net.rules.depthwise_weights if layer.is_depthwise and net.rules.depthwise_weights else net.rules.weights
        allowed = weight_schemes(net.rules, own, first, weights, per_channel)
        if layer.node not in layers:
            layer.scheme = allowed[0]
            continue
        params, codes = refit.weights(net, layer, layers[layer.node], allowed, said)
        layer.scheme, layer.params, layer.codes = params.scheme, params, codes
        if _with_room(net, layer, params) is not params:
            said.add("layer", "the bias does not fit sums in the trained scales, and the weights get larger ones",
                     layer.name)
        kept[layer.node] = params, codes
    points = {tuple(p.values): p.params for p in net.quantized_points() if p.params is not None}
    made = Kept(points, kept, ())
    made.put_back(net)
    for p in net.quantized_points():
        if p.params is None:
            said.add("tensor", "no scale in the trained network, calibrated", net.name(p.value))
    for layer in net.layers:
        if layer.scheme is not None and layer.params is None:
            said.add("layer", "no integer weights in the trained network, calibrated", layer.name)
    return replace(made, notes=(*trained.notes, *said.lines(), *notes))


def _by_value(net: Network, trained: Trained, values: Mapping[str, int]) -> dict[int, Params]:
    """What training says of tensors of the network, where one was folded away of what it was made of."""
    found: dict[int, Params] = {}
    for name, params in trained.tensors.items():
        here: str | None = name
        while here is not None and here not in values:
            here = trained.aliases.get(here)
        if here is not None:
            found.setdefault(values[here], params)
    return found


def stored(net: Network, layer: Layer, trained: Trained) -> Stored | None:
    """The trained integers of a layer's weights. Where a batch normalization was folded into them, its factors are in
    the scales, and the integers of channels with a negative one change their sign. None: training has none for them."""
    name = net.name(layer.weight_value)
    if name not in trained.constants:
        out = next((net.name(v) for v in (net.graph.nodes[layer.node].outputs[0], layer.linear, layer.result)
                    if net.name(v) in trained.weights_of), "")
        name = trained.weights_of.get(out, "")
    found = trained.constants.get(name)
    if found is None or found.codes.shape != layer.weight.shape or found.params.axis not in (None, layer.axis):
        return None
    real = found.real
    if np.array_equal(real, layer.weight):
        return found
    a, b = layer.rows(real).astype(np.float64), layer.rows().astype(np.float64)
    factors = (a * b).sum(axis=1) / np.maximum((a * a).sum(axis=1), 1e-300)
    factors = np.where(factors == 0, 1.0, factors)  # a channel of zeros
    if np.abs(a * factors[:, None] - b).max(initial=0) > 1e-5 * np.abs(b).max(initial=0):
        return None
    p = found.params
    zeros = np.broadcast_to(p.zeros, layer.channels)
    scales = (np.broadcast_to(p.scales, layer.channels) * np.abs(factors)).astype(np.float32)
    rows = layer.rows(found.codes).astype(np.int32) - zeros[:, None]
    rows = np.where(factors[:, None] < 0, -rows, rows) + zeros[:, None]
    codes = np.clip(rows, p.scheme.low, p.scheme.high).astype(found.codes.dtype)
    return Stored(layer.from_rows(codes), Params(replace(p.scheme, per_channel=True), scales, zeros.copy(), layer.axis))


def _with_room(net: Network, layer: Layer, p: Params) -> Params:
    """The params, with larger scales only where a bias is none of 32 bits otherwise: those of training need no more."""
    data = net.of.get(layer.data)
    if layer.bias is None or data is None or data.params is None:
        return p
    steps = np.abs(layer.bias.astype(np.float64)) / (p.scales.astype(np.float64) * float(data.params.scales[0]))
    return p if (steps < 2**31 - 1).all() else roomy(net, layer, p)


# tensors that are moved

def _split(net: Network, p: Point, tensors: Mapping[int, Params], said: Said) -> None:
    """Moved tensors that were trained with params of their own become points of their own: in ONNX files moves lie
    between pairs, and in TFLite files a QUANTIZE follows. Where a tool that reads ONNX wants one scale, the first
    pair's is taken."""
    known = [v for v in p.values if v in tensors]
    others = [v for v in known if not same_levels(tensors[v], tensors[known[0]])]
    if not others:
        return
    if net.rules.file == "onnx" and net.rules.same_scale:
        for v in others:
            said.add("tensor", f"the scale of what they are moved from, as {net.rules.title} has one for both: steps "
                     f"{MUCH} times as large", net.name(v),
                     float(tensors[known[0]].scales[0] / tensors[v].scales[0]))
        return
    inside = set(p.values)
    owner: dict[int, int] = {}
    for v in p.values:  # in the order in which they are computed
        made = net.graph.producer.get(v)
        source = next((u for u in made.inputs if u in inside), -1) if made is not None else -1
        before = owner.get(source, p.values[0])
        own = v in tensors and v != before and not (before in tensors and same_levels(tensors[v], tensors[before]))
        owner[v] = v if own and source in inside else before
    groups: dict[int, list[int]] = {}
    for v in p.values:
        groups.setdefault(owner[v], []).append(v)
    for values in groups.values():
        if values[0] == p.values[0]:
            p.values = values
        else:
            net.points.append(Point(values, p.scheme))
        net.of.update((v, p if values is p.values else net.points[-1]) for v in values)


def _averages(net: Network, said: Said) -> None:
    """Averages without a pair of their own have the scale of what they average, whose range they cannot leave; so has
    PyTorch, which observes them together."""
    for p in net.quantized_points():
        made = net.graph.producer.get(p.value)
        if p.params is None and made is not None and made.op.name in AVERAGES and made.inputs[0] in net.of:
            source = net.of[made.inputs[0]]
            if source.params is not None:
                p.scheme, p.params = source.scheme, source.params
                said.add("tensor", "no scale in the trained network, that of what it averages", net.name(p.value))


# what training left in floats

def _left_in_floats(net: Network, layers: Mapping[int, Stored]) -> list[str]:
    """Layers without trained integers, and tensors without a pair that only such layers and other floats touch, stay in
    floats where the target has them, unless training left all weights alone."""
    out = [layer for layer in net.layers if layer.node not in layers]
    if not layers or not out or not net.rules.float_islands:
        return []
    for layer in out:
        layer.scheme = layer.params = layer.codes = None
    nodes = {n: layer for layer in net.layers for n in (layer.node, layer.added)}
    floats: set[int] = set()

    def is_float(v: int) -> bool:
        return v in net.of and id(net.of[v]) in floats

    def in_floats(n: Node, towards: Sequence[int]) -> bool | None:
        """Whether a node computes in floats: a layer by its weights, others by the tensors on their other side."""
        if n.index in nodes:
            return nodes[n.index].scheme is None
        return any(is_float(v) for v in towards)

    changed = True
    while changed:
        changed = False
        for p in net.points:
            if p.params is not None or id(p) in floats:
                continue
            inside = set(p.values)
            behind = [_maker(net, v) for v in p.values]
            makers = [n for n in behind if n is not None and not (n.op.name in MOVES and inside & set(n.inputs))]
            readers = [n for v in p.values for n in net.readers(v) if not (n.op.name in MOVES
                                                                           and inside & set(n.outputs))]
            from_floats = any(in_floats(n, n.inputs) for n in makers)
            to_floats = bool(readers) and all(in_floats(n, n.outputs) for n in readers)
            integer = any(n.index in nodes and nodes[n.index].scheme is not None for n in (*makers, *readers))
            if (from_floats or to_floats) and not integer:
                floats.add(id(p))
                changed = True
    for p in net.points:
        if id(p) in floats:
            p.scheme, p.params, p.why = None, None, "training left it in floats"
    return [f"{len(out)} of {len(net.layers)} layers were trained in floats, and stay so: "
            + names_of(x.name for x in out)]


def _maker(net: Network, value: int) -> Node | None:
    """What makes a value: of a layer's result its operator, before clamps and biases."""
    layer = net.layer_of(value)
    return net.graph.nodes[layer.node] if layer is not None else net.graph.producer.get(value)


# beside the network

def as_it_was(graph: Graph, trained: Trained) -> Buffer:
    """The trained network as an ONNX file of pairs, floats coming and going, under the names of the float network."""
    net = network(graph, ANY)
    apply(net, trained)
    return integer_model(net)


class Dequantized:
    """Samples of a file whose inputs are integers, as the float network takes them; floats are left as they are."""

    def __init__(self, samples: Samples, inputs: Mapping[str, Params]) -> None:
        self.samples, self.inputs = samples, inputs
        self.origin = samples.origin

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self):  # type: ignore[no-untyped-def]
        for feeds in self.samples:
            yield {k: self.inputs[k].real(np.asarray(x)) if k in self.inputs and np.asarray(x).dtype.kind in "iu" else x
                   for k, x in feeds.items()}


def probes(net: Network, seed: int = 0) -> Samples:
    """Inputs for comparing a network that needs no data: evenly spread over the trained range of each input."""
    rng = np.random.default_rng(seed)
    feeds: list[Feeds] = []
    for _ in range(PROBES):
        one: dict[str, Array] = {}
        for v in net.graph.inputs:
            p = net.of[v].params if v in net.of else None
            low, high = (-1.0, 1.0) if p is None else (
                float(p.scales[0]) * (end - int(p.zeros[0])) for end in (p.scheme.low, p.scheme.high))
            value = net.graph.values[v]
            dtype = value.dtype.numpy or np.dtype(np.float32)
            if dtype.kind in "iu":  # cast inside
                low, high = 0.0, 127.0
            one[value.name] = rng.uniform(low, high, value.shape).astype(dtype)
        feeds.append(one)
    return ListedSamples(feeds, "noise, to compare with")
