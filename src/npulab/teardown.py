"""What each layer of a network reads and multiplies: a table of the network itself, of no chip.

Layers are convolutions and products with constant matrices. Weights are kernels and matrices, without biases; inputs
are the data a layer reads, once. Bodies of control flow are not looked into.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any, Literal

from npulab.errors import ModelError
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import Conv2D, DepthwiseConv2D, FullyConnected, Generic, OnnxOp

Kind = Literal["convolution", "fully connected", "other"]
Numbers = Literal["fp32", "fp16", "int8"]

BITS: dict[Numbers, int] = {"fp32": 32, "fp16": 16, "int8": 8}
_BITS = {DType.BFLOAT16: 16, DType.INT4: 4, DType.UINT4: 4, DType.INT2: 2}
_DATA = {DType.FLOAT64, DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.INT16, DType.UINT16, DType.INT8,
         DType.UINT8, DType.INT4, DType.UINT4, DType.INT2, DType.UNKNOWN}
"""Types of tensors that another number format would stand for; the rest are indices, sizes and truths."""
_SAME = {"DequantizeLinear", "QuantizeLinear", "Cast", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze",
         "DEQUANTIZE", "QUANTIZE", "CAST", "TRANSPOSE", "RESHAPE"}
"""Operators behind which a constant is still the same weights."""
_STEPS = 16
"""Such operators in a row that are followed."""
_DOMAINS = ("", "com.microsoft")
_CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3, "ConvTranspose": 1}
_PRODUCTS = {"MatMul": 1, "FusedMatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3, "Gemm": 1, "FusedGemm": 1,
             "QGemm": 3}
"""ONNX operator -> its input that holds the weights; data is input 0."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator; two that do the same are equal. Sizes in pixels, (height, width) or more; n rows of a matrix: 1, n.

    `label` says what it does in a few characters: "conv 3x3/2", "dw 3x3", "fc", "matmul".
    """

    label: str
    op: str
    kind: Kind
    in_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    input_bits: int
    weight_bits: int
    macs: int
    name: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Row:
    """A layer, and the names of those that follow each other and do the same."""

    layer: Layer
    names: tuple[str, ...]

    @property
    def repeat(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class Totals:
    layers: int
    input_kb: float
    weight_kb: float
    mmacs: float


def tear_down(graph: Graph, numbers: Numbers | None = None, everything: bool = False) -> tuple[Row, ...]:
    """The layers of a network in its order, equal ones that follow each other in one row.

    `numbers`: count bytes as if all data had this format; None: as the file has it. `everything`: other operators too.

    Raises: ModelError where a layer's size is not known.
    """
    return fold(layer for layer in layers(sized(graph), numbers) if everything or layer.kind != "other")


def layers(graph: Graph, numbers: Numbers | None = None) -> tuple[Layer, ...]:
    """Every operator as a Layer. Raises: ModelError where the size of one that multiplies is not known."""
    reader = _Reader(graph, numbers)
    return tuple(reader.layer(n) for n in graph.nodes)


def sized(graph: Graph) -> Graph:
    """The graph; where a layer's size is not known, without the operators on constants that decide it."""
    try:
        layers(graph)
    except ModelError:
        if graph.format == "onnx":
            from npulab.passes import pipeline

            return pipeline.run(graph, pipeline.find_passes(["constants"]))[0]
    return graph


def kinds(found: Sequence[Layer]) -> tuple[Kind, ...]:
    """The kinds of layers worth a row: convolutions, and products with matrices where those are a tenth of the work."""
    macs = {kind: sum(x.macs for x in found if x.kind == kind) for kind in ("convolution", "fully connected")}
    small = 9 * macs["fully connected"] < macs["convolution"]
    return ("convolution",) if small else ("convolution", "fully connected")


def fold(found: Iterable[Layer]) -> tuple[Row, ...]:
    """Equal neighbours as one row."""
    groups = (list(g) for _, g in groupby(found))
    return tuple(Row(g[0], tuple(layer.name for layer in g)) for g in groups)


def totals(rows: Iterable[Row], kind: Kind | None = None) -> Totals:
    """Sums over all layers of the rows, or those of one kind. kB of 1024 bytes, millions of MACs."""
    rows = [r for r in rows if kind in (None, r.layer.kind)]
    return Totals(
        sum(r.repeat for r in rows), kb(sum(r.repeat * r.layer.input_bits for r in rows)),
        kb(sum(r.repeat * r.layer.weight_bits for r in rows)), sum(r.repeat * r.layer.macs for r in rows) / 1e6)


def bits(graph: Graph, value: Value, numbers: Numbers | None = None) -> int:
    """Bits of a tensor as a layer reads it: of integers that are only dequantized before use, the integers'."""
    return _Reader(graph, numbers).bits(value)


def kb(bits: int) -> float:
    """kB of 1024 bytes."""
    return bits / 8192


def as_data(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows and totals for programs. A row's numbers are those of one of its layers; `totals` counts each of them.

    `in_size` is a number where all sides are equal, else a list.
    """
    return {
        "rows": [{
            "repeat": r.repeat, "in_size": size(r.layer.in_size), "in_channels": r.layer.in_channels,
            "input_kb": kb(r.layer.input_bits), "weight_kb": kb(r.layer.weight_bits), "mmacs": r.layer.macs / 1e6,
            "out_channels": r.layer.out_channels, "kernel": list(r.layer.kernel), "op": r.layer.op,
            "kind": r.layer.kind, "label": r.layer.label, "names": list(r.names),
        } for r in rows],
        "totals": _totals_data(totals(rows)) | {"convolutions": _totals_data(totals(rows, "convolution")),
                                                "fully_connected": _totals_data(totals(rows, "fully connected"))},
    }


def _totals_data(t: Totals) -> dict[str, Any]:
    return {"layers": t.layers, "input_kb": t.input_kb, "weight_kb": t.weight_kb, "mmacs": t.mmacs}


def size(sides: tuple[int, ...]) -> int | list[int]:
    """(224, 224) -> 224; (1, 197) -> [1, 197]."""
    return sides[0] if sides and len(set(sides)) == 1 else list(sides)


class _Reader:
    def __init__(self, graph: Graph, numbers: Numbers | None) -> None:
        self.graph = graph
        self.numbers = numbers

    def layer(self, n: Node) -> Layer:
        match n.op:
            case Conv2D(stride=stride):
                return self._convolution_tflite(n, "conv", stride)
            case DepthwiseConv2D(stride=stride):
                return self._convolution_tflite(n, "dw", stride)
            case FullyConnected():
                return self._fully_connected(n)
            case Generic(name="TRANSPOSE_CONV", attributes=a):
                return self._transposed_tflite(n, (_int(a.get("stride_h")), _int(a.get("stride_w"))))
            case Generic(name="BATCH_MATMUL", attributes=a):
                return self._product(n, 1, _flag(a.get("adj_x")), _flag(a.get("adj_y")))
            case OnnxOp(name=name, attributes=a, domain=d) if d in _DOMAINS and name in _CONVOLUTIONS:
                return self._convolution_onnx(n, _CONVOLUTIONS[name], a.get("strides"), a.get("group"))
            case OnnxOp(name=name, attributes=a, domain=d) if d in _DOMAINS and name in _PRODUCTS:
                return self._product(n, _PRODUCTS[name], _flag(a.get("transA")), _flag(a.get("transB")))
        return self._other(n)

    # convolutions

    def _convolution_tflite(self, n: Node, what: str, stride: tuple[int, int]) -> Layer:
        data, weights, out = self._known(n, 0, 4), self._known(n, 1, 4), self._made(n, 4)
        kernel, channels = weights.shape[1:3], data.shape[3]
        if what == "conv" and weights.shape[3] != channels:
            what = "gconv"
        per_output = prod(kernel) * (1 if what == "dw" else weights.shape[3])
        return self._convolution(n, what, data, data.shape[1:3], channels, out.shape[3], weights, kernel, stride,
                                 out.elements * per_output)

    def _transposed_tflite(self, n: Node, stride: tuple[int, int]) -> Layer:
        data, weights = self._known(n, 2, 4), self._known(n, 1, 4)
        macs = data.elements * weights.shape[0] * prod(weights.shape[1:3])
        return self._convolution(n, "deconv", data, data.shape[1:3], data.shape[3], weights.shape[0], weights,
                                 weights.shape[1:3], stride, macs)

    def _convolution_onnx(self, n: Node, at: int, strides: object, group: object) -> Layer:
        data = self._known(n, 0, 3)
        weights, out = self._known(n, at, len(data.shape)), self._made(n, len(data.shape))
        channels, kernel, groups = data.shape[1], weights.shape[2:], _int(group)
        if n.op.name == "ConvTranspose":
            what, outputs, macs = "deconv", out.shape[1], data.elements * weights.shape[1] * prod(kernel)
        else:
            what = "conv" if groups == 1 else "dw" if groups == channels else "gconv"
            outputs, macs = weights.shape[0], out.elements * weights.shape[1] * prod(kernel)
        stride = tuple(_int(s) for s in strides) if isinstance(strides, tuple) else (1,) * len(kernel)
        return self._convolution(n, what, data, data.shape[2:], channels, outputs, weights, kernel, stride, macs)

    def _convolution(self, n: Node, what: str, data: Value, sides: tuple[int, ...], channels: int, outputs: int,
                     weights: Value, kernel: tuple[int, ...], stride: tuple[int, ...], macs: int) -> Layer:
        if len(kernel) == 1:
            sides, kernel, stride = (1, *sides), (1, *kernel), (1, *stride)
        label = f"{what} {_by(kernel)}"
        if any(s > 1 for s in stride):
            label += f"/{stride[0]}" if len(set(stride)) == 1 else f"/{_by(stride)}"
        return Layer(label, n.op.name, "convolution", sides, channels, outputs, kernel, self.bits(data),
                     self.bits(weights), macs, self._name(n))

    # products of matrices

    def _fully_connected(self, n: Node) -> Layer:
        data, weights = self._known(n, 0, 1), self._known(n, 1, 2)
        inputs, outputs = weights.shape[-1], prod(weights.shape[:-1])
        rows = data.elements // max(inputs, 1)
        return Layer("fc", n.op.name, "fully connected", (1, rows), inputs, outputs, (), self.bits(data),
                     self.bits(weights), rows * inputs * outputs, self._name(n))

    def _product(self, n: Node, at: int, flip_a: bool, flip_b: bool) -> Layer:
        """A product: of data with weights from either side, else of two data, which makes it an other operator."""
        a, b, out = self._known(n, 0, 1), self._known(n, at, 1), self._made(n, 0)
        inner = a.shape[-2 if flip_a and len(a.shape) > 1 else -1]
        macs = out.elements * inner
        fixed = self._is_constant(b), self._is_constant(a)
        data, weights = (b, a) if fixed[1] and not fixed[0] else (a, b)
        outputs = _side(a, 0, flip_a) if weights is a else _side(b, 1, flip_b)
        rows = out.elements // max(outputs, 1)
        gemm = "Gemm" in n.op.name or rows == 1
        if not any(fixed):
            return Layer("matmul", n.op.name, "other", (1, rows), inner, outputs, (), self.bits(a) + self.bits(b), 0,
                         macs, self._name(n))
        return Layer("fc" if gemm else "matmul", n.op.name, "fully connected", (1, rows), inner, outputs, (),
                     self.bits(data), self.bits(weights), macs, self._name(n))

    # the rest

    def _other(self, n: Node) -> Layer:
        """Inputs that are computed count as input, constant ones as weights."""
        read = [self.graph.values[v] for v in dict.fromkeys(n.inputs) if v >= 0]
        data = [v for v in read if not v.is_constant]
        shape = data[0].shape if data else ()
        channels_last = self.graph.format == "tflite"
        channels = shape[-1 if channels_last else 1] if len(shape) > 1 else 1
        sides = (shape[1:-1] if channels_last else shape[2:]) or (1, 1)
        made = self.graph.values[n.outputs[0]].shape if n.outputs and n.outputs[0] >= 0 else ()
        outputs = made[-1 if channels_last else 1] if len(made) > 1 else 1
        sides = (1, *sides) if len(sides) == 1 else sides
        return Layer(n.op.name.lower(), n.op.name, "other", sides, channels, outputs, (),
                     sum(self.bits(v) for v in data), sum(self.bits(v) for v in read if v.is_constant),
                     _recurrent_macs(n, read, self.graph), self._name(n))

    def _name(self, n: Node) -> str:
        return n.name or (self.graph.values[n.outputs[0]].name if n.outputs and n.outputs[0] >= 0 else "")

    def _known(self, n: Node, i: int, rank: int) -> Value:
        value = self.graph.value(n, i)
        if value is None:
            raise ModelError(f"{self._who(n)} lacks its input {i}")
        return self._sized(n, value, rank)

    def _made(self, n: Node, rank: int) -> Value:
        if not n.outputs or n.outputs[0] < 0:
            raise ModelError(f"{self._who(n)} has no output")
        return self._sized(n, self.graph.values[n.outputs[0]], rank)

    def _sized(self, n: Node, value: Value, rank: int) -> Value:
        """`value`, with all of its shape known; TFLite's dynamic axes are batches of 1, as its runtime takes them."""
        if not value.has_shape or (self.graph.format == "onnx" and value.dynamic_axes):
            axes = f"axes {', '.join(map(str, value.dynamic_axes))}" if value.has_shape else "the whole shape"
            raise ModelError(f"the size of tensor '{value.name}' of {self._who(n)} is not known", got=f"{axes} open",
                             try_="give the model's dynamic dimensions sizes: --dim NAME=SIZE")
        if len(value.shape) < rank or (isinstance(n.op, Conv2D | DepthwiseConv2D) and len(value.shape) != rank):
            raise ModelError(f"tensor '{value.name}' of {self._who(n)} has too few or too many dimensions",
                             want=rank, got=len(value.shape))
        return value

    def _who(self, n: Node) -> str:
        return f"{n} '{n.name}'" if n.name else str(n)

    def bits(self, value: Value) -> int:
        dtype = self._stored(value)
        if self.numbers is not None and dtype in _DATA:
            return value.elements * BITS[self.numbers]
        own = dtype.numpy
        return value.elements * (_BITS.get(dtype, 0) if own is None else 8 * own.itemsize)

    def _stored(self, value: Value) -> DType:
        """The type a value has in memory: of integers that are only dequantized before use, the integers'."""
        dtype = value.dtype
        for _ in range(_STEPS):
            node = self.graph.producer.get(value.index)
            if node is None or node.op.name not in _SAME or self.graph.value(node, 0) is None:
                return value.dtype if value.is_constant else dtype
            if node.op.name in ("QuantizeLinear", "QUANTIZE"):
                return value.dtype
            value = self.graph.values[node.inputs[0]]
            if node.op.name in ("DequantizeLinear", "DEQUANTIZE"):
                return value.dtype
        return dtype

    def _is_constant(self, value: Value) -> bool:
        for _ in range(_STEPS):
            node = self.graph.producer.get(value.index)
            if value.is_constant or node is None or node.op.name not in _SAME or self.graph.value(node, 0) is None:
                break
            value = self.graph.values[node.inputs[0]]
        return value.is_constant


def _side(value: Value, side: int, flip: bool) -> int:
    """Rows (0) or columns (1) of a matrix, or of the last two dimensions of more; a vector is what fits."""
    if len(value.shape) < 2:
        return 1
    return value.shape[-2:][side ^ flip]


def _recurrent_macs(n: Node, read: Sequence[Value], graph: Graph) -> int:
    """MACs of a recurrent layer: every matrix once a step."""
    if isinstance(n.op, OnnxOp) and n.op.name in ("LSTM", "GRU", "RNN"):
        data, matrices = graph.value(n, 0), [graph.value(n, 1), graph.value(n, 2)]
        steps = data.elements // max(data.shape[-1], 1) if data and data.shape else 0
        return steps * sum(m.elements for m in matrices if m)
    if n.op.name in ("UNIDIRECTIONAL_SEQUENCE_LSTM", "UNIDIRECTIONAL_SEQUENCE_RNN") and read and read[0].shape:
        steps = read[0].elements // max(read[0].shape[-1], 1)
        return steps * sum(v.elements for v in read[1:] if v.is_constant and len(v.shape) == 2)
    return 0


def _by(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))


def _flag(value: object) -> bool:
    return isinstance(value, int) and bool(value)


def _int(value: object) -> int:
    return value if isinstance(value, int) else 1
