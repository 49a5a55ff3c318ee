"""What integers mean in a quantized ONNX graph, and how TFLite stores that.

QuantizeLinear and DequantizeLinear with constant scales say what integers mean. Tensors of 16 bits are int16 with zero
point 0 in TFLite. Of 8 bits, its kernels want activations and weights of one signedness: int8 where weights have a
scale per channel (these are symmetric) or less than 8 bits, or tensors of 16 bits are about; else what the graph has.
int8 weights beside uint8 activations become uint8 by adding 128 to them and to their zero point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.ir import DType, Graph, Node, Quantization
from npulab.ir.ops import OnnxOp

Array = NDArray[Any]
DOMAINS = ("", "com.microsoft")
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Slice", "Split", "Gather", "Identity",
         "Concat", "Expand", "Tile", "DepthToSpace", "SpaceToDepth")
"""Operators whose results are some of the integers that they read."""
ACTIVATIONS = ("int8", "uint8", "int16", "uint16")
"""Element types of computed tensors that stand for real numbers."""
SMALL = {DType.INT4: 4, DType.UINT4: 4, DType.INT2: 2}
"""Element types of less than a byte, of constants."""
WIDER = 128
"""Steps of 16 bits to one of 8: the difference of two 8-bit codes, at most 255, stays a number of 16 bits."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """Scale and zero point of integers, `dtype` one of ACTIVATIONS."""

    scale: float
    zero_point: int
    dtype: str

    @property
    def is_wide(self) -> bool:
        return self.dtype in ("int16", "uint16")


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A constant that DequantizeLinear reads: scale * (array - zero point), along `axis` if there are several.

    `bits` of an element in the file; `array` has at least 8.
    """

    array: Array
    scales: NDArray[np.float32]
    zeros: NDArray[np.int64]
    axis: int
    bits: int = 8

    @property
    def real(self) -> NDArray[np.float32]:
        shape = [-1 if i == self.axis else 1 for i in range(self.array.ndim)] if self.scales.size > 1 else [1]
        shape = shape if self.array.ndim else []
        out: NDArray[np.float32] = ((self.array.astype(np.int64) - self.zeros.reshape(shape)).astype(np.float32)
                                    * self.scales.reshape(shape))
        return out

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1) if self.array.dtype.kind == "u" else 0

    @property
    def is_symmetric(self) -> bool:
        return bool((self.zeros == self.middle).all())


def is_op(node: Node, *names: str) -> bool:
    op = node.op
    return isinstance(op, OnnxOp) and op.domain in DOMAINS and op.name in names


class Quantities:
    """What the quantized values of a graph mean. `signed`: tensors of 8 bits are int8 in the TFLite file."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.coded: dict[int, Coded] = {}
        self._meanings: dict[int, Meaning] = {}
        self._reals: dict[int, Array] = {}
        for n in graph.nodes:
            self._read(n)
        for _ in range(2):
            for n in (*graph.nodes, *reversed(graph.nodes)):
                self._pass_on(n)
        self.signed = self._signed()

    @property
    def dtype(self) -> str:
        return "int8" if self.signed else "uint8"

    def meaning(self, value: int) -> Meaning | None:
        return self._meanings.get(value)

    def stored_type(self, m: Meaning) -> str:
        """The element type of the tensor that holds what `m` says."""
        return "int16" if m.is_wide else self.dtype

    def as_stored(self, m: Meaning, dtype: str | None = None) -> Quantization | None:
        """The quantization of a tensor of `dtype` (by default the stored type) that holds what `m` says; None where
        TFLite has none: 16 bits with a zero point."""
        dtype = dtype or self.stored_type(m)
        low = np.iinfo(dtype).min - np.iinfo(m.dtype).min
        zero = m.zero_point + int(low)
        return None if m.is_wide and zero else Quantization((m.scale,), (zero,))

    def stored(self, code: Coded, dtype: str) -> tuple[Array, Quantization] | None:
        """A constant operand as integers of `dtype`; None if they do not hold it, or it has several scales."""
        if code.array.dtype.name not in ACTIVATIONS or code.scales.size > 1:
            return None
        scale, zero = float(code.scales[0]), int(code.zeros[0])
        limits = np.iinfo(dtype)
        if dtype == "int16":
            array = code.array.astype(np.int64) - zero
            zero = 0
        else:
            shift = int(limits.min - np.iinfo(code.array.dtype).min)
            array = code.array.astype(np.int64) + shift
            zero += shift
        if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
            return None
        return array.astype(dtype), Quantization((scale,), (zero,))

    def real(self, value: int) -> Array | None:
        """The content of a constant, or of a dequantized one."""
        if value in self.coded:
            if value not in self._reals:
                self._reals[value] = self.coded[value].real
            return self._reals[value]
        v = self.graph.values[value]
        return v.array() if v.is_constant and v.dtype.numpy is not None else None

    def is_wide(self, value: int) -> bool:
        """Whether a constant has codes of 16 bits."""
        return value in self.coded and self.coded[value].bits == 16

    def wanted(self, value: int) -> Meaning | None:
        """What all readers of a float value quantize it to."""
        readers = self.graph.consumers.get(value, ())
        if value in self.graph.outputs or not readers or not all(is_op(n, "QuantizeLinear") for n in readers):
            return None
        found = {self._meanings.get(n.outputs[0]) for n in readers if n.inputs[0] == value}
        return found.pop() if len(found) == 1 else None

    def parameters(self, node: Node) -> tuple[NDArray[np.float32], NDArray[np.int64], int] | None:
        """(scales, zero points, axis) of Quantize- or DequantizeLinear; None if they are computed, or in blocks."""
        op = node.op
        assert isinstance(op, OnnxOp)
        scale = self._array(node, 1)
        if scale is None or scale.ndim > 1 or op.attributes.get("block_size") or not (scale > 0).all() \
                or not np.isfinite(scale).all():
            return None
        zero = self._array(node, 2)
        if len(node.inputs) > 2 and node.inputs[2] >= 0 and zero is None:
            return None
        scales = scale.reshape(-1).astype(np.float32)
        zeros = np.zeros(scales.size, np.int64) if zero is None else zero.reshape(-1).astype(np.int64)
        axis: Any = op.attributes.get("axis", 1)
        rank = len(self.graph.values[node.inputs[0]].shape)
        return scales, np.broadcast_to(zeros, scales.shape), axis + rank if axis < 0 else axis

    def _array(self, node: Node, i: int) -> Array | None:
        v = self.graph.value(node, i)
        return v.integers() if v is not None and v.is_constant and (v.dtype.numpy is not None or v.dtype in SMALL) \
            else None

    def _read(self, n: Node) -> None:
        if is_op(n, "DequantizeLinear"):
            found, v = self.parameters(n), self.graph.values[n.inputs[0]]
            if found is None:
                return
            scales, zeros, axis = found
            if v.is_constant and (v.dtype.value in (*ACTIVATIONS, "int32") or v.dtype in SMALL):
                if scales.size > 1 and (axis >= len(v.shape) or v.shape[axis] != scales.size):
                    return
                array = v.integers()
                self.coded[n.outputs[0]] = Coded(array, scales, zeros, axis, SMALL.get(v.dtype, 8 * array.itemsize))
            elif scales.size == 1 and v.dtype.value in ACTIVATIONS:
                self._meanings.setdefault(v.index, Meaning(float(scales[0]), int(zeros[0]), v.dtype.value))
        elif is_op(n, "QuantizeLinear"):
            found, v = self.parameters(n), self.graph.values[n.outputs[0]]
            if found and found[0].size == 1 and v.dtype.value in ACTIVATIONS:
                self._meanings[v.index] = Meaning(float(found[0][0]), int(found[1][0]), v.dtype.value)

    def _pass_on(self, n: Node) -> None:
        """Integers that are only moved keep their meaning, forwards and backwards."""
        if not is_op(n, *MOVES) or self.graph.values[n.outputs[0]].dtype.value not in ACTIVATIONS:
            return
        ends = [v for v in (*(n.inputs if is_op(n, "Concat") else n.inputs[:1]), *n.outputs[:1 if is_op(n, "MaxPool")
                                                                                          else None]) if v >= 0]
        known = {self._meanings[v] for v in ends if v in self._meanings}
        if len(known) == 1:
            for v in ends:
                if not self.graph.values[v].is_constant:
                    self._meanings.setdefault(v, next(iter(known)))

    def _weights(self) -> Iterator[Coded]:
        for n in self.graph.nodes:
            if is_op(n, "Conv", "ConvTranspose", "Gemm", "MatMul") and len(n.inputs) > 1:
                code = self.coded.get(n.inputs[1])
                if code is not None and code.array.dtype != np.int32:
                    yield code

    def _signed(self) -> bool:
        weights = list(self._weights())
        if any(w.scales.size > 1 or (w.bits < 8 and w.is_symmetric) for w in weights):
            return True
        if any(m.is_wide for m in self._meanings.values()):
            return True
        signed = [m.dtype == "int8" for m in self._meanings.values()]
        return bool(signed) and all(signed) and all(w.is_symmetric for w in weights)
