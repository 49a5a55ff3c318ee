"""A finished network of integers as the checks look at it, read from the file's own Graph, TFLite or ONNX alike.

TFLite's tensors carry scale and zero point. In ONNX, QuantizeLinear and DequantizeLinear around float operators say
what is stored: an operand is what its DequantizeLinear reads, a result what the QuantizeLinear behind it makes, behind
a Relu or Clip too, which tools compute as one with what is before them. Names of operators are ONNX's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import OnnxOp
from npulab.targets.facts.names import TFLITE
from npulab.targets.facts.operands import PARAMETERS

Array = NDArray[Any]
INTEGERS = ("int2", "int4", "int8", "int16", "uint4", "uint8", "uint16")
"""Element types that data and weights may have."""
FLOATS = ("float16", "bfloat16", "float32", "float64")
BITS = {DType.INT2: 2, DType.INT4: 4, DType.UINT4: 4}
"""Elements that share bytes, the first in the lowest bits."""
MARKS = ("QuantizeLinear", "DequantizeLinear")
WEIGHTED = ("Conv", "DepthwiseConv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose second operand, if it is constant, is a weight."""
NEAREST = {"PACK": "Concat", "UNPACK": "Split", "BATCH_TO_SPACE_ND": "Reshape", "SPACE_TO_BATCH_ND": "Reshape",
           "REVERSE_V2": "Slice"}
"""Operators of TFLite without a name in ONNX -> one that moves data as they do."""
TAKEN_UP = ("Relu", "Clip", "LeakyRelu")
"""Operators of ONNX that are computed as one with what is before them."""
PLAIN = ("Shape", "Size", "Constant", "ConstantOfShape", "Range", "Identity", "Cast", "NonMaxSuppression", "ArgMax",
         "ArgMin", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "TopK", "NonZero")
"""Operators whose results are no data of the network."""


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor as integers: real = scale * (integer - zero point), one of each or one a channel along `axis`.

    `value` holds the integers if they are constant, as the file has them.
    """

    name: str
    dtype: str
    scales: NDArray[np.float32]
    zeros: NDArray[np.int64]
    axis: int
    value: Value

    @property
    def range(self) -> tuple[int, int]:
        """The numbers that the type, one of INTEGERS, holds."""
        bits = int(self.dtype.lstrip("uint"))
        return (0, 2**bits - 1) if self.dtype.startswith("u") else (-(2**(bits - 1)), 2**(bits - 1) - 1)

    def integers(self) -> Array:
        """The constant's integers, one an element. Raises ModelError for a buffer of the wrong length."""
        v = self.value
        bits = BITS.get(v.dtype)
        if bits is None or v.constant is None:
            return v.array()
        if len(v.constant) != (v.elements * bits + 7) // 8:
            raise ModelError(f"tensor '{v.name}' has a buffer of the wrong length",
                             want=f"{(v.elements * bits + 7) // 8} bytes for {v.dtype.value}{list(v.shape)}",
                             got=f"{len(v.constant)} bytes")
        packed = np.frombuffer(v.constant, np.uint8)
        parts = np.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], 1).reshape(-1)
        codes = parts[:v.elements].astype(np.int8)
        if v.dtype is not DType.UINT4:
            codes = np.where(codes >= 2**(bits - 1), codes - 2**bits, codes).astype(np.int8)
        return codes.reshape(v.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """An operator. Of data, results, weights and bias each is what is stored, or the bare tensor where none is said.

    op        ONNX's name.      label  for people.      channel  the axis of the weights that counts results.
    floats    whether it computes on floats.              groups   of a ConvTranspose, whose weights are I,O/groups.
    """

    node: Node
    op: str
    label: str
    data: tuple[Stored | Value, ...] = ()
    results: tuple[Stored | Value, ...] = ()
    weights: Stored | Value | None = None
    bias: Stored | Value | None = None
    channel: int = 0
    floats: bool = False
    groups: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """`layers` in order; `ends` are nodes that convert the network's inputs and results, and nothing else."""

    graph: Graph
    layers: tuple[Layer, ...]
    ends: frozenset[int] = field(default_factory=frozenset)


def view(graph: Graph) -> View:
    """Raises: ModelError for scales and zero points that the file does not hold as constants, or damaged ones."""
    reader = _Onnx(graph) if graph.format == "onnx" else _Tflite(graph)
    return View(graph, tuple(reader.layers()), frozenset(_ends(graph)))


def _ends(graph: Graph) -> Iterator[int]:
    """Nodes beside which the network's inputs and results keep another type than the network's own."""
    for n in graph.nodes:
        if (n.op.name == "QUANTIZE" and n.inputs and n.outputs
                and (n.inputs[0] in graph.inputs or n.outputs[0] in graph.outputs)) \
                or (n.op.name == "DEQUANTIZE" and n.outputs and n.outputs[0] in graph.outputs):
            yield n.index


def label(node: Node, graph: Graph) -> str:
    """The operator by the file's name for it, and the tensor that it makes."""
    out = next((graph.values[v].name for v in node.outputs if v >= 0), "")
    return f"{node.op.name} (node {node.index})" + (f" '{(node.name or out)[:60]}'" if node.name or out else "")


class _Tflite:
    """Layers of a TFLite graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def layers(self) -> Iterator[Layer]:
        g = self.graph
        for n in g.nodes:
            op = NEAREST.get(n.op.name) or TFLITE.get(n.op.name, f"tflite:{n.op.name}")
            inputs = [g.values[v] if v >= 0 else None for v in n.inputs]
            weights, bias, channel = None, None, 0
            at = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1,
                  "CONV_3D": 1}.get(n.op.name)
            if at is not None and len(inputs) > at and inputs[at] is not None and inputs[at].is_constant:  # type: ignore[union-attr]
                weights = inputs[at]
                channel = 3 if n.op.name == "DEPTHWISE_CONV_2D" else 4 if n.op.name == "CONV_3D" else 0
            b = 3 if n.op.name == "TRANSPOSE_CONV" else 2
            if at is not None and len(inputs) > b:
                bias = inputs[b]
            skipped = PARAMETERS.get(n.op.name, ())
            data = [v for i, v in enumerate(inputs) if v is not None and i not in skipped and v is not weights
                    and v is not bias]
            results = [g.values[v] for v in n.outputs if v >= 0]
            floats = any(v.dtype.value in FLOATS for v in (*data, *results))
            yield Layer(n, op, label(n, g), tuple(map(self._stored, data)), tuple(map(self._stored, results)),
                        self._stored(weights) if weights is not None else None,
                        self._stored(bias) if bias is not None else None, channel, floats)

    @staticmethod
    def _stored(v: Value) -> Stored | Value:
        q = v.quantization
        if q is None or v.dtype.value not in (*INTEGERS, "int32", "int64"):
            return v
        return Stored(v.name, v.dtype.value, np.array(q.scales, np.float32), np.array(q.zero_points, np.int64), q.axis,
                      v)


class _Onnx:
    """Layers of an ONNX graph: every operator but the marks."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def layers(self) -> Iterator[Layer]:
        g = self.graph
        for n in g.nodes:
            op = n.op
            if not isinstance(op, OnnxOp) or op.name in MARKS:
                continue
            name = op.name
            inputs = [v if v >= 0 else None for v in n.inputs]
            operands = {i: self._operand(v) for i, v in enumerate(inputs) if v is not None}
            weights, bias, channel = None, None, 0
            if name in WEIGHTED and 1 in operands and self._constant(operands[1]):
                weights = operands[1]
                channel = self._channel(op, weights)
                bias = operands.get(2)
                if name == "Conv" and self._depthwise(op, weights):
                    name = "DepthwiseConv"
            skipped = PARAMETERS.get(name, ())
            data = [s for i, s in operands.items() if i not in skipped and s is not weights and s is not bias]
            results = [self._result(v, n) for v in n.outputs if v >= 0]
            floats = name not in PLAIN and any(isinstance(s, Value) and s.dtype.value in FLOATS and not s.is_constant
                                               for s in (*(() if self._taken_up(n) else data), *results))
            yield Layer(n, name if not op.domain else f"{op.domain}:{name}", label(n, g), tuple(data), tuple(results),
                        weights, bias, channel, floats, self._groups(op, weights))

    def _taken_up(self, node: Node) -> bool:
        """Whether an operator is computed as one with the operator before it, whose only reader it is."""
        v = node.inputs[0] if node.inputs else -1
        maker = self.graph.producer.get(v)
        return (node.op.name in TAKEN_UP and maker is not None and maker.op.name not in MARKS
                and len(self.graph.consumers.get(v, ())) == 1 and v not in self.graph.outputs)

    def _groups(self, op: OnnxOp, w: Stored | Value | None) -> int:
        group = op.attributes.get("group", 1)
        if op.name != "ConvTranspose" or w is None or not isinstance(group, int) or group < 1:
            return 1
        shape = (w.value if isinstance(w, Stored) else w).shape
        return group if shape and shape[0] % group == 0 else 1

    def _constant(self, s: Stored | Value) -> bool:
        return (s.value if isinstance(s, Stored) else s).is_constant

    def _channel(self, op: OnnxOp, w: Stored | Value) -> int:
        rank = len((w.value if isinstance(w, Stored) else w).shape)
        match op.name:
            case "ConvTranspose":
                return 1
            case "Gemm":
                return 0 if op.attributes.get("transB") else 1
            case "MatMul":
                return max(rank - 1, 0)
        return 0

    def _depthwise(self, op: OnnxOp, w: Stored | Value) -> bool:
        shape = (w.value if isinstance(w, Stored) else w).shape
        group = op.attributes.get("group", 1)
        return isinstance(group, int) and group > 1 and len(shape) > 1 and shape[1] == 1 and shape[0] % group == 0

    def _operand(self, v: int) -> Stored | Value:
        maker = self.graph.producer.get(v)
        if maker is None or maker.op.name != "DequantizeLinear":
            return self.graph.values[v]
        return self._marked(maker, self.graph.values[maker.inputs[0]])

    def _result(self, v: int, node: Node) -> Stored | Value:
        """What is kept of a result: that of the QuantizeLinear behind it, if no other operator reads it first."""
        g, seen = self.graph, 0
        first = g.values[v]
        while seen < 4:
            readers = g.consumers.get(v, ())
            marks = [r for r in readers if r.op.name == "QuantizeLinear"]
            if marks and len(marks) == len(readers) and v not in g.outputs:
                return self._marked(marks[0], g.values[marks[0].outputs[0]])
            if len(readers) != 1 or readers[0].op.name not in TAKEN_UP or v in g.outputs:
                break
            v, seen = readers[0].outputs[0], seen + 1
        return first

    def _marked(self, mark: Node, stored: Value) -> Stored:
        """Of a QuantizeLinear or DequantizeLinear, the tensor `stored` on its integer side."""
        g, who = self.graph, f"{mark}"
        scale, zero = g.value(mark, 1), g.value(mark, 2)
        if scale is None or not scale.is_constant or (zero is not None and not zero.is_constant):
            raise ModelError(f"{who} has no constant scale and zero point", want="constants")
        scales = np.asarray(scale.array(), np.float32).reshape(-1)
        if zero is None:
            zeros = np.zeros(scales.size, np.int64)
        else:
            zeros = np.asarray(Stored("", zero.dtype.value, scales, scales.astype(np.int64), 0, zero).integers(),
                               np.int64).reshape(-1)
        if zeros.size not in (1, scales.size) or not scales.size:
            raise ModelError(f"{who} has {scales.size} scales and {zeros.size} zero points", want="as many, or one")
        dtype = stored.dtype if stored.dtype is not DType.UNKNOWN else zero.dtype if zero else DType.UINT8
        axis = mark.op.attributes.get("axis", 1) if isinstance(mark.op, OnnxOp) else 1
        rank = max(len(stored.shape), 1)
        axis = int(axis) % rank if isinstance(axis, int) else 0
        return Stored(stored.name, dtype.value, scales, np.broadcast_to(zeros, scales.shape), axis, stored)
