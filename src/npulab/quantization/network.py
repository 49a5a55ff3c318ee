"""A float network on its way to integers: its layers with weights, and the tensors that will be integers.

The network is an ONNX graph made ready as for a conversion: batch normalization folded, constants folded, quantized
operators of ONNX's own taken apart. Repairs change weights, biases and codes of layers and params of points; `emit.py`
writes what became of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from npulab.dialects.prepare import prepared
from npulab.dialects.quantities import is_op
from npulab.errors import ModelError, UnsupportedError
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import OnnxOp
from npulab.program.pages import arrays_away, let_go
from npulab.quantization.types import F32, Array, Params, Rules, Scheme

Kind = Literal["conv", "transposed", "gemm", "matmul"]

KINDS: Mapping[str, Kind] = {"Conv": "conv", "ConvTranspose": "transposed", "Gemm": "gemm", "MatMul": "matmul"}
MOVES = frozenset(("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Slice", "Split", "Gather",
                   "Identity", "Dropout", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Pad", "GlobalMaxPool"))
"""Operators whose results are some of the numbers that they read: both have one scale."""
COMPUTES = frozenset(("Add", "Sub", "Mul", "AveragePool", "GlobalAveragePool", "ReduceMean", "Sigmoid", "Tanh",
                      "Softmax", "HardSwish", "LeakyRelu", "Resize", "Upsample", "Relu", "Clip", "Concat", "MatMul"))
"""Operators that integer kernels have beside those with weights; what is in neither list stays in floats."""
FUSING = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul"))
"""Operators that take a clamp behind them along."""
CLAMPS = ((0.0, np.inf), (0.0, 6.0), (-1.0, 1.0))
"""Limits of clamps that every integer kernel takes along: ReLU, ReLU6, ReLU1."""


@dataclass(eq=False)
class Layer:
    """An operator with trained weights, and what goes along with it into one integer operator. Its arrays are not
    written into: whoever changes it gives it others.

    data      the value that it reads.       linear  its result before the clamp.      result  the one behind that.
    weight    float32, in the operator's own order; output channels along `axis`.      bias    (channels,) or None.
    clamp     (low, high) of the activation, (-inf, inf) without one.
    scheme    of the weights; None: the layer stays in floats.
    params    of the weights, once they are chosen.    codes  the integers, where a repair chose the rounding.
    added     the node that adds the bias, where that is one of its own; -1 else.
    """

    node: int
    name: str
    kind: Kind
    data: int
    linear: int
    result: int
    weight_value: int
    bias_value: int
    weight: F32
    bias: F32 | None
    axis: int
    groups: int
    clamp: tuple[float, float]
    scheme: Scheme | None = None
    params: Params | None = None
    codes: Array | None = None
    added: int = -1

    @property
    def channels(self) -> int:
        return int(self.weight.shape[self.axis])

    @property
    def is_depthwise(self) -> bool:
        return self.kind == "conv" and self.groups > 1 and self.weight.shape[1] == 1

    def rows(self, array: Array | None = None) -> Array:
        """The weights, or an array of their shape, as (channels, weights of a channel)."""
        array = self.weight if array is None else array
        return np.moveaxis(array, self.axis, 0).reshape(self.channels, -1)

    def from_rows(self, rows: Array) -> Array:
        """The inverse of `rows`."""
        moved = np.moveaxis(self.weight, self.axis, 0).shape
        return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, self.axis))

    def by_input(self, factors: F32) -> F32:
        """Factors of the input channels in a shape that multiplies the weights: `weight * by_input(f)`."""
        w = self.weight
        if self.kind == "conv":
            per_group = factors.reshape(self.groups, w.shape[1])  # groups lie behind each other in output channels
            return np.repeat(per_group, w.shape[0] // self.groups, axis=0).reshape(
                w.shape[0], w.shape[1], *(1,) * (w.ndim - 2))
        if self.kind == "transposed":
            return factors.reshape(-1, *(1,) * (w.ndim - 1))
        return np.expand_dims(factors, self.axis)

    def by_output(self, factors: F32) -> F32:
        """Factors of the output channels in a shape that multiplies the weights."""
        return factors.reshape([-1 if i == self.axis else 1 for i in range(self.weight.ndim)])

    @property
    def seen(self) -> F32:
        """The weights as the integers show them; as they are without any."""
        if self.params is None:
            return self.weight
        return self.params.real(self.codes) if self.codes is not None else self.params.seen(self.weight)


@dataclass(eq=False)
class Point:
    """Tensors that share one scale: `values`, connected by operators that only move numbers.

    scheme  None: they stay in floats.    why  for people, where something else than the usual was decided.
    """

    values: list[int]
    scheme: Scheme | None = None
    params: Params | None = None
    why: str = ""

    @property
    def value(self) -> int:
        """The one that stands for all: the first that is computed."""
        return self.values[0]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What of a Network may change."""

    graph: Graph
    layers: list[Layer]
    points: list[Point]
    operands: dict[int, Params | None]
    moments: dict[int, tuple[F32, F32]]
    notes: list[str]


@dataclass(eq=False)
class Network:
    """The prepared graph, its layers by node, its points, and constants that are operands beside tensors.

    of        value -> the point that it belongs to.
    operands  constant values that integer operators read -> their params (None: chosen when written).
    moments   value -> (means, deviations) of its channels as batch normalization has them, before it was folded.
    """

    graph: Graph
    rules: Rules
    layers: list[Layer]
    points: list[Point]
    of: dict[int, Point]
    operands: dict[int, Params | None]
    moments: dict[int, tuple[F32, F32]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def name(self, value: int) -> str:
        return self.graph.values[value].name

    def readers(self, value: int) -> tuple[Node, ...]:
        return self.graph.consumers.get(value, ())

    def layer_of(self, value: int) -> Layer | None:
        """The layer whose result a value is."""
        return next((layer for layer in self.layers if layer.result == value), None)

    def snapshot(self) -> Snapshot:
        """All that repairs change, as it is now."""
        return Snapshot(self.graph, [copy.copy(layer) for layer in self.layers],
                        [replace(p, values=list(p.values)) for p in self.points], dict(self.operands),
                        dict(self.moments), list(self.notes))

    def restore(self, then: Snapshot) -> None:
        """As it was at the snapshot, which may be taken up again."""
        self.graph, self.layers = then.graph, [copy.copy(layer) for layer in then.layers]
        self.points = [replace(p, values=list(p.values)) for p in then.points]
        self.of = {v: p for p in self.points for v in p.values}
        self.operands, self.moments, self.notes = dict(then.operands), dict(then.moments), list(then.notes)

    def quantized_points(self) -> Iterator[Point]:
        return (p for p in self.points if p.scheme is not None)


def network(graph: Graph, rules: Rules) -> Network:
    """`graph`, a float ONNX graph, with everything that the rules' integer kernels can compute marked for integers by
    their default schemes.

    Raises: UnsupportedError if nothing is there to be quantized, or the network is quantized already; ModelError for
    weights that are no numbers.
    """
    moments = _moments(graph)
    ready = prepared(graph)
    if any(is_op(n, "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear") for n in ready.nodes):
        raise UnsupportedError(f"'{graph.name}' is quantized already", try_="the float network that it was made of")
    dynamic = [v.name for v in ready.values if v.dynamic_axes and not v.is_constant]
    if dynamic:
        raise UnsupportedError(f"'{dynamic[0]}' of '{graph.name}' has no fixed size", want="fixed sizes",
                               try_="--dim NAME=SIZE")
    layers, inner, clamps = _layers(ready)
    for layer, weight in zip(layers, arrays_away([layer.weight for layer in layers]), strict=True):
        layer.weight = weight
        own = rules.depthwise_weights if layer.is_depthwise and rules.depthwise_weights else rules.weights
        layer.scheme = own[0]
    net = Network(ready, rules, layers, [], {}, {})
    _points(net, inner, clamps)
    if not net.points:
        raise UnsupportedError(f"'{graph.name}' has nothing to quantize", want="convolutions or matrix products with "
                               "constant weights")
    names = {v.name: v.index for v in ready.values}
    for (before, behind), m in moments.items():  # folded into a layer, whose result keeps the name that it had
        if (name := behind if behind in names else before) in names:
            net.moments[names[name]] = m
    return net


def softmax_of(graph: Graph, output: int) -> Node | None:
    """The Softmax that makes an output, but for moves behind it."""
    made = graph.producer.get(output)
    while made is not None and made.op.name in MOVES:
        made = graph.producer.get(made.inputs[0])
    return made if made is not None and made.op.name in ("Softmax", "LogSoftmax") else None


def _moments(graph: Graph) -> dict[tuple[str, str], tuple[F32, F32]]:
    """Means and deviations that batch normalization gives its results, by names before and behind it: beta, |gamma|."""
    found = {}
    for n in graph.nodes:
        if is_op(n, "BatchNormalization") and all(graph.values[v].is_constant for v in n.inputs[1:3]):
            gamma, beta = (np.asarray(graph.values[v].array(), np.float32) for v in n.inputs[1:3])
            names = graph.values[n.inputs[0]].name, graph.values[n.outputs[0]].name
            found[names] = (beta, np.abs(gamma))
    return found


def _constant(graph: Graph, value: int) -> F32 | None:
    if value < 0:
        return None
    v = graph.values[value]
    if not v.is_constant or v.dtype is not DType.FLOAT32:
        return None
    array = np.asarray(v.array(), np.float32)
    finite = bool(np.isfinite(array).all())
    let_go(array)
    if not finite:
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise ModelError(f"'{v.name}' of '{graph.name}' has weights that are no numbers",
                         got=f"{bad} of {array.size} are NaN or infinite", try_="the network before it diverged")
    return array


def _layers(graph: Graph) -> tuple[list[Layer], set[int], dict[int, tuple[float, float]]]:
    """Layers in order; values inside of layers and other fused pairs; clamps by the value behind them."""
    layers: list[Layer] = []
    inner: set[int] = set()
    clamps: dict[int, tuple[float, float]] = {}
    for n in graph.nodes:
        op = n.op
        assert isinstance(op, OnnxOp)
        if op.domain or op.name not in FUSING or graph.values[n.outputs[0]].dtype is not DType.FLOAT32:
            continue
        layer = _layer(graph, n, op)
        linear = layer.linear if layer else n.outputs[0]
        if linear != n.outputs[0]:
            inner.add(n.outputs[0])
        result, clamp = _clamped(graph, linear)
        if result != linear:
            inner.add(linear)
            clamps[result] = clamp
        if layer:
            layer.result, layer.clamp = result, clamp
            layers.append(layer)
    return layers, inner, clamps


def _layer(graph: Graph, n: Node, op: OnnxOp) -> Layer | None:
    kind = KINDS.get(op.name)
    if kind is None or graph.values[n.inputs[0]].is_constant:
        return None
    weight = _constant(graph, n.inputs[1])
    if weight is None or (kind == "gemm" and (op.attributes.get("transA") or op.attributes.get("alpha", 1.0) != 1
                                              or op.attributes.get("beta", 1.0) != 1)) \
            or (kind == "matmul" and weight.ndim != 2):
        return None
    groups = op.attributes.get("group", 1)
    assert isinstance(groups, int)
    if kind == "transposed" and groups != 1:
        return None
    axis = {"conv": 0, "transposed": 1, "gemm": 0 if op.attributes.get("transB") else 1, "matmul": 1}[kind]
    out = n.outputs[0]
    linear, added = out, -1
    bias_value = n.inputs[2] if len(n.inputs) > 2 else -1
    bias = _constant(graph, bias_value)
    if bias_value >= 0 and (bias is None or bias.size not in (1, weight.shape[axis])):
        return None
    if kind == "matmul" and (found := _addend(graph, out, weight.shape[axis])) is not None:
        adding, bias_value = found
        bias, linear, added = _constant(graph, bias_value), adding.outputs[0], adding.index
    if bias is not None:
        bias = np.broadcast_to(bias.reshape(-1), (weight.shape[axis],)).copy()
    return Layer(n.index, n.name or f"{op.name}_{n.index}", kind, n.inputs[0], linear, linear, n.inputs[1], bias_value,
                 weight, bias, axis, groups, (-np.inf, np.inf), added=added)


def _addend(graph: Graph, out: int, channels: int) -> tuple[Node, int] | None:
    """The node that adds a constant to each row of a product, and the constant."""
    readers = graph.consumers.get(out, ())
    if len(readers) != 1 or out in graph.outputs or not is_op(readers[0], "Add"):
        return None
    other = next((v for v in readers[0].inputs if v != out), -1)
    bias = _constant(graph, other)
    if bias is None or bias.size != channels or bias.shape[-1:] != (channels,):
        return None
    return readers[0], other


def _clamped(graph: Graph, value: int) -> tuple[int, tuple[float, float]]:
    """The value behind a clamp that only it reads, with the limits."""
    readers = graph.consumers.get(value, ())
    none = (-np.inf, np.inf)
    if len(readers) != 1 or value in graph.outputs or not is_op(readers[0], "Relu", "Clip"):
        return value, none
    limits = clamp_of(graph, readers[0])
    return (readers[0].outputs[0], limits) if limits in CLAMPS else (value, none)


def clamp_of(graph: Graph, n: Node) -> tuple[float, float] | None:
    """Limits of a Relu or Clip; None where they are computed."""
    op = n.op
    assert isinstance(op, OnnxOp)
    if op.name == "Relu":
        return 0.0, np.inf
    found: list[float] = []
    for i, (name, default) in enumerate((("min", -np.inf), ("max", np.inf))):
        limit = op.attributes.get(name, default)
        if len(n.inputs) > i + 1 and n.inputs[i + 1] >= 0:
            array = _constant(graph, n.inputs[i + 1])
            if array is None or array.size != 1:
                return None
            limit = float(array.reshape(-1)[0])
        assert isinstance(limit, int | float)
        found.append(float(limit) if abs(limit) < 1e30 else float(np.copysign(np.inf, limit)))
    return found[0], found[1]


def _points(net: Network, inner: set[int], clamps: Mapping[int, tuple[float, float]]) -> None:
    """Tensors that an integer operator reads or makes, joined where they are only moved."""
    graph = net.graph
    weighted = {layer.node for layer in net.layers}
    adders = {layer.added for layer in net.layers}
    behind = {layer.bias_value for layer in net.layers} | {layer.weight_value for layer in net.layers}

    def is_tensor(v: int) -> bool:
        return v >= 0 and not graph.values[v].is_constant and graph.values[v].dtype is DType.FLOAT32 and v not in inner

    wanted: dict[int, None] = {}
    joined: list[tuple[int, int]] = []
    for n in graph.nodes:
        op = n.op
        assert isinstance(op, OnnxOp)
        if op.domain:
            continue
        moves = op.name in MOVES or (op.name in net.rules.same_scale and op.name != "Concat")  # that is requantized
        computes = op.name in COMPUTES and not moves
        if n.index in weighted or moves or computes:
            data = n.inputs[:1] if op.name in MOVES or n.index in weighted else n.inputs
            for v in (*data, *n.outputs[: 1 if op.name in ("MaxPool", "Dropout") else None]):
                if is_tensor(v):
                    wanted.setdefault(v)
            if moves and is_tensor(n.inputs[0]):
                joined += [(n.inputs[0], v) for v in (*data[1:], *n.outputs) if is_tensor(v)]
            if computes and n.index not in weighted and n.index not in adders and op.name not in ("Clip", "Resize",
                                                                                                 "Upsample"):
                for v in n.inputs:
                    if v >= 0 and v not in behind and _is_operand(graph.values[v]):
                        net.operands[v] = None
    order = {v: i for i, v in enumerate((*graph.inputs, *(v for n in graph.nodes for v in n.outputs)))}
    leader = {v: v for v in wanted}

    def root(v: int) -> int:
        while leader[v] != v:
            v = leader[v]
        return v

    for a, b in joined:
        ra, rb = root(a), root(b)
        first, second = sorted((ra, rb), key=lambda v: order[v])
        leader[second] = first
    members: dict[int, list[int]] = {}
    for v in sorted(wanted, key=lambda v: order[v]):
        members.setdefault(root(v), []).append(v)
    scheme = net.rules.activations[0]
    for values in members.values():
        point = Point(values, scheme)
        net.points.append(point)
        net.of.update((v, point) for v in values)


def _is_operand(v: Value) -> bool:
    return v.is_constant and v.dtype is DType.FLOAT32
