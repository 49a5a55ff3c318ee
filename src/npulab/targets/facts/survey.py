"""What a graph is like, whatever the board: its body and its tail, its strides, its odd joints."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from npulab.errors import ModelError
from npulab.ir import Graph, Node, Value
from npulab.targets.facts import names as naming
from npulab.targets.facts.board import NMS, view_of
from npulab.targets.facts.costs import derived
from npulab.targets.facts.ranges import Ranges

APART = 4.0
"""Times that ranges which share one scale may differ: beyond it the smaller one keeps less than 6 of 8 bits."""
IMAGE = 32
"""Pixels from which on an input's sides are an image's."""
SMALLEST = 4
"""Sides of maps down to which strides count: the last ones of a detector's pyramid are rounded whatever the input."""
EXPECTATION = 64
"""Input channels of a 1x1 convolution to one channel that is a weighted mean (DFL), and no part of a network's body."""
BODY = frozenset({"Conv", "DepthwiseConv", "Conv3D", "ConvTranspose", "ConvInteger", "Gemm", "MatMul", "MatMulInteger",
                  "LSTM", "GRU", "RNN", "tflite:SVDF"})
SHIFTS = frozenset({"Sub", "Div", "Mul", "Add", "BatchNormalization"})
ELEMENTS = 1 << 16
"""Of scales that are read."""


@dataclass(frozen=True, slots=True)
class Joint:
    """A concatenation whose inputs lie in ranges that one scale does not serve.

    inputs  (value, size of its range), largest first.     kept  of 256 steps, what is left to the smallest.
    """

    node: int
    inputs: tuple[tuple[int, float], ...]
    kept: float


@dataclass(frozen=True, slots=True)
class Image:
    """An input image whose sides are no multiples of the network's `stride`."""

    value: int
    height: int
    width: int
    stride: int

    @property
    def rounded(self) -> tuple[int, int]:
        """The next size up that fits."""
        return tuple(-(-n // self.stride) * self.stride for n in (self.height, self.width))  # type: ignore[return-value]


class Survey:
    """One graph, looked at once for all boards.

    fixed      values that a converter works out.       body   nodes with weights, and all before them.
    tail       nodes behind the last of those.          heads  values that the tail takes from the body, in order.
    macs       of the nodes with weights.               joints, image, scaling: see there.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        view = view_of(graph, "")
        self.properties = view.nodes
        self.names = {i: naming.label(names) for i, names in view.names.items()}
        self.fixed = derived(graph)
        weighted = [n for n in graph.nodes if self._has_weights(n)]
        self.macs = {n.index: view.macs[n.index] for n in weighted}
        self.body = ancestors(graph, {n.index for n in weighted if not self._expectation(n)})
        loose = {n.index for n in graph.nodes if not any(v not in self.fixed for v in n.outputs if v >= 0)}
        self.tail = {n.index for n in graph.nodes} - self.body - loose if self.body else set()
        self.heads = self.entries(self.tail)
        self.nms = tuple(n.index for n in graph.nodes if self.names[n.index] in NMS)
        self.joints = tuple(self._joints())
        self.image = self._image()
        self.scaling = self._scaling()

    def _has_weights(self, n: Node) -> bool:
        w = self.properties[n.index].weights
        return self.names[n.index].split(":")[-1].removeprefix("QLinear") in BODY and w is not None \
            and (w.index in self.fixed or self.names[n.index] not in ("MatMul", "Gemm"))

    def _expectation(self, n: Node) -> bool:
        p = self.properties[n.index]
        return p.get("out_channels") == 1 and p.get("kernel_h") == p.get("kernel_w") == 1 \
            and (p.get("channels") or 0) <= EXPECTATION and bool(self.graph.producer.get(n.inputs[0]))

    def entries(self, nodes: set[int]) -> tuple[int, ...]:
        """Values that `nodes` take from other nodes, in order of their making."""
        made = {v: n.index for n in self.graph.nodes for v in n.outputs if v >= 0 and n.index not in nodes}
        found = {v for n in self.graph.nodes if n.index in nodes for v in n.inputs if v in made and v not in self.fixed}
        return tuple(sorted(found, key=lambda v: made[v]))

    # joints

    def _joints(self) -> Iterator[Joint]:
        ranges = Ranges(self.graph, self.names, self.properties)
        for n in self.graph.nodes:
            if self.names[n.index].removeprefix("QLinear") not in ("Concat", "tflite:PACK"):
                continue
            values = list(dict.fromkeys(v for v in n.inputs if v >= 0 and not self.graph.values[v].is_constant))
            spans = {v: self._span(ranges, v) for v in values}
            known = sorted(((v, s) for v, s in spans.items() if s), key=lambda p: -p[1])
            shared = self._shared(n) or (known[0][1] if known else 0.0)
            if len(known) > 1 and shared > APART * known[-1][1]:
                yield Joint(n.index, tuple(known), 256 * known[-1][1] / shared)

    def _span(self, ranges: Ranges, v: int) -> float:
        """How much of the number line a tensor needs, zero included; 0.0 if nothing says."""
        low, high = ranges.of(v)
        bound = max(high, 0.0) - min(low, 0.0)
        scale = self._scale(v)
        if scale:
            return min(bound, 255 * scale)
        return bound if bound != float("inf") else 0.0

    def _scale(self, v: int) -> float:
        """Of 8-bit data quantized per tensor; 0.0 of anything else."""
        value = self.graph.values[v]
        q = value.quantization
        if q is not None:
            return q.scale if q.per_tensor and value.dtype.value in ("int8", "uint8") else 0.0
        maker = self.graph.producer.get(v)
        if maker is None or maker.op.name != "DequantizeLinear":
            return 0.0
        scale = self.graph.value(maker, 1)
        return _number(scale) if scale is not None and scale.elements == 1 else 0.0

    def _shared(self, n: Node) -> float:
        """The range of a quantized concatenation's one scale."""
        out = next((v for v in n.outputs if v >= 0), None)
        if out is None:
            return 0.0
        scale = self._scale(out)
        readers = self.graph.consumers.get(out, ())
        if not scale and len(readers) == 1 and readers[0].op.name == "QuantizeLinear":
            found = self.graph.value(readers[0], 1)
            scale = _number(found) if found is not None and found.elements == 1 else 0.0
        return 255 * scale

    # the image

    def _image(self) -> Image | None:
        """The first input that is an image and does not fit the strides."""
        for v in self.graph.inputs:
            reader = next(iter(self.graph.consumers.get(v, ())), None)
            value = self.graph.values[v]
            if reader is None or len(value.shape) != 4 or value.dynamic_axes[1:]:
                continue
            sides = self.properties[reader.index].spatial(value) if value.has_shape else None
            if sides is None or len(sides) != 2 or None in sides or min(s or 0 for s in sides) < IMAGE:
                continue
            height, width = (int(s or 0) for s in sides)
            stride = self._stride(v)
            if stride > 1 and (height % stride or width % stride) and min(height, width) > stride:
                return Image(v, height, width, stride)
        return None

    def _stride(self, v: int) -> int:
        """By how much the sides of input `v` shrink at most, as far as strides of windows say."""
        factor = {v: 1.0}
        most = 1.0
        for n in self.graph.nodes:
            before = max((factor[i] for i in n.inputs if i in factor), default=0.0)
            if not before:
                continue
            after = before * self._step(n)
            for out in n.outputs:
                if out >= 0 and len(self.graph.values[out].shape) == 4:
                    factor[out] = after
            if n.index in self.body and (self.properties[n.index].get("out_height") or 0) >= SMALLEST:
                most = max(most, after)
        return int(most)

    def _step(self, n: Node) -> float:
        p, name = self.properties[n.index], self.names[n.index]
        if name == "SpaceToDepth":
            size = p.get("attr_blocksize")
            return float(size) if isinstance(size, int) else 1.0
        if name in ("Resize", "Upsample"):
            scale = p.get("scale_h")
            return 1 / scale if isinstance(scale, int | float) and scale > 0 else 1.0
        if name in ("DepthwiseConv", "Conv", "MaxPool", "AveragePool", "ConvTranspose") and p.get("out_height") != 1:
            step = p.get("stride_h")
            return (1 / step if name == "ConvTranspose" else float(step)) if isinstance(step, int) and step else 1.0
        return 1.0

    # the beginning

    def _scaling(self) -> tuple[int, ...]:
        """Nodes between an input and the first convolution that add or multiply constants: normalization of pixels."""
        found: list[int] = []
        for v in self.graph.inputs:
            if len(self.graph.values[v].shape) != 4:
                continue
            while True:
                readers = self.graph.consumers.get(v, ())
                if len(readers) != 1:
                    break
                n = readers[0]
                name = self.names[n.index]
                others = [i for i in n.inputs if i >= 0 and i != v]
                if name in SHIFTS and others and all(self.graph.values[i].is_constant for i in others):
                    found.append(n.index)
                elif name not in ("Transpose", "Cast", "Identity"):
                    if name not in ("Conv", "DepthwiseConv"):
                        found.clear()
                    break
                v = n.outputs[0]
            if found:
                return tuple(found)
        return ()


def _number(value: Value) -> float:
    try:
        return float(value.array().reshape(-1)[0])
    except (ModelError, TypeError, ValueError, IndexError):
        return 0.0


def ancestors(graph: Graph, of: Iterable[int]) -> set[int]:
    """Nodes `of` and all that they need."""
    found = set(of)
    wanted: set[int] = set()
    for n in reversed(graph.nodes):
        if n.index in found or any(v in wanted for v in n.outputs):
            found.add(n.index)
            wanted.update(v for v in n.inputs if v >= 0)
    return found


def descendants(graph: Graph, of: Iterable[int]) -> set[int]:
    """Nodes `of` and all that need them."""
    found = set(of)
    made: set[int] = set()
    for n in graph.nodes:
        if n.index in found or any(v in made for v in n.inputs):
            found.add(n.index)
            made.update(v for v in n.outputs if v >= 0)
    return found


_KEPT: weakref.WeakKeyDictionary[Graph, Survey] = weakref.WeakKeyDictionary()


def survey(graph: Graph) -> Survey:
    """The survey of a graph, made once."""
    if graph not in _KEPT:
        _KEPT[graph] = Survey(graph)
    return _KEPT[graph]
