"""An ONNX graph on its way to TFLite: what is held how, and what an operator's translation may ask for.

Every value of the source is held by a tensor of the file in some order of its axes (layouts.py). Translations say which
order they need; transpositions appear only where what is held lies otherwise. A value that QuantizeLinear made is held
by a tensor of integers, and so is the float that DequantizeLinear makes of it: whoever needs floats gets a DEQUANTIZE.
TFLite's kernels want data and results of one width: where they differ, 8 bits are brought to 16, which loses nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.dialects import layouts
from npulab.dialects.layouts import Order
from npulab.dialects.quantities import WIDER, Coded, Quantities
from npulab.dialects.tflite_file import Spec, TFLiteFile
from npulab.ir import DType, Graph, Node, Quantization, Value
from npulab.ir.ops import OnnxOp

Array = NDArray[Any]
RANK_MAX = 6
"""Dimensions that TFLite's TRANSPOSE takes."""
TYPES = (DType.FLOAT32, DType.INT32, DType.INT64, DType.BOOL, DType.INT8, DType.UINT8, DType.INT16)
"""Element types of computed tensors that both dialects have operators for."""
FINER = 1.9
"""Steps of a result to one of the numbers that it is rounded to before, so that both roundings stay within a step."""
MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""What Python raises where a file's attributes or shapes do not fit its operators."""


def wide(q: Quantization) -> Quantization:
    """The quantization by which 16 bits hold all numbers of these 8 bits."""
    return Quantization((float(np.float32(q.scale / WIDER)),), (0,))


class NotThereError(Exception):
    """What TFLite has no words for; the text says what."""


@dataclass(frozen=True, slots=True)
class Held:
    tensor: int
    order: Order


class Conversion:
    """The state of a conversion, and the node that is being translated.

    end         the value that the node's first output becomes: behind the activation that is fused into it.
    activation  that activation, by TFLite's name.
    addend      the value that is added to a product as its bias, and the operator that does so is left out; -1: none.
    integer     whether the node is computed in integers, of element type `dtype`.
    quantized   the quantization of what it computes then, where the graph says one.
    narrow      what its 16-bit result is brought to afterwards, where the graph wants 8 bits: type and quantization.
    notes       what a user should know, by how often.
    """

    def __init__(self, graph: Graph, quantities: Quantities, last: Sequence[int]) -> None:
        self.graph = graph
        self.file = TFLiteFile(graph.name)
        self.quantities = quantities
        self.held: dict[int, Held] = {}
        self.node: Node = graph.nodes[0] if graph.nodes else Node(0, OnnxOp("Identity", {}), (), ())
        self.end = -1
        self.activation = "NONE"
        self.addend = -1
        self.quantized: Quantization | None = None
        self.integer = False
        self.dtype = quantities.dtype
        self.narrow: tuple[str, Quantization] | None = None
        self.notes: Counter[str] = Counter()
        self.moved = 0
        self.columns: dict[int, tuple[tuple[int, ...], Order]] = {}
        self._made: dict[tuple[Any, ...], int] = {}
        self.inputs: list[int] = []
        for i in graph.inputs:
            self._input(graph.values[i], i in last)

    def _input(self, v: Value, last: bool) -> None:
        order = layouts.channels_last(len(v.shape)) if last else layouts.plain(len(v.shape))
        q = self.quantities.meaning(v.index)
        own = self.quantities.as_stored(q, v.dtype.value) if q else None
        tensor = self.file.tensor(v.name, layouts.stored(v.shape, order), v.dtype.value, own)
        self.inputs.append(tensor)
        if q and own and v.dtype.value != self.quantities.stored_type(q):
            self.file.origin = v.name
            tensor = self.file.make("QUANTIZE", [tensor], Spec(
                layouts.stored(v.shape, order), self.quantities.stored_type(q), self.quantities.as_stored(q)))
        self.held[v.index] = Held(tensor, order)

    # the node

    @property
    def op(self) -> OnnxOp:
        assert isinstance(self.node.op, OnnxOp)
        return self.node.op

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.op.attributes.get(name, default)

    @property
    def opset(self) -> int:
        assert self.graph.header is not None
        return next((version for domain, version in self.graph.header.opsets if domain in ("", "ai.onnx")), 1)

    def has(self, i: int) -> bool:
        return i < len(self.node.inputs) and self.node.inputs[i] >= 0

    def value(self, i: int) -> Value:
        if not self.has(i):
            raise NotThereError(f"input {i} is missing")
        return self.graph.values[self.node.inputs[i]]

    def shape(self, i: int) -> tuple[int, ...]:
        return self.value(i).shape

    @property
    def out(self) -> Value:
        return self.graph.values[self.node.outputs[0]]

    def constant(self, i: int) -> Array | None:
        """The content of input `i`, as real numbers, if it does not depend on the graph's inputs."""
        return self.quantities.real(self.node.inputs[i]) if self.has(i) else None

    def needed(self, i: int, what: str) -> Array:
        """Like `constant`, for what TFLite wants to know beforehand."""
        found = self.constant(i)
        if found is None:
            raise NotThereError(f"{what} that are computed")
        return found

    def coded(self, i: int) -> Coded | None:
        """Input `i` as the integers of a constant that is dequantized."""
        return self.quantities.coded.get(self.node.inputs[i]) if self.has(i) else None

    # operands

    def order(self, i: int) -> Order:
        """The order in which input `i` is held now; of constants the source's."""
        h = self.held.get(self.node.inputs[i])
        return h.order if h else layouts.plain(len(self.shape(i)))

    def input(self, i: int, order: Order | None = None, as_it_is: bool = False) -> int:
        """Input `i` as a tensor of the file, of integers or floats as the node is computed, in this order.

        `as_it_is`: integers of whatever width.
        """
        v = self.value(i)
        if v.index not in self.held:
            return self.constant_tensor(v, order or layouts.plain(len(v.shape)))
        h = self.held[v.index]
        tensor = self.ordered(h.tensor, v.shape, h.order, order or h.order)
        if not self.integer:
            return self.real(tensor)
        return tensor if as_it_is else self.widened(tensor)

    def widened(self, tensor: int) -> int:
        """8 bits as 16, of the same real numbers, if the node is computed so."""
        spec = self.file.specs[tensor]
        if self.dtype != "int16" or spec.dtype == "int16" or spec.quantization is None:
            return tensor
        return self.requantized(tensor, wide(spec.quantization), "int16")

    def constant_tensor(self, v: Value, order: Order, shape: Sequence[int] | None = None) -> int:
        """A constant, seen as of another `shape`, as a tensor of the file."""
        shape = v.shape if shape is None else shape
        code = self.quantities.coded.get(v.index)
        if code is not None and self.integer:
            stored = self.quantities.stored(code, self.dtype)
            if stored is None:
                raise NotThereError("a constant operand quantized so")
            return self.file.constant(v.name, stored[0].reshape(shape).transpose(order), stored[1])
        array = self.quantities.real(v.index)
        if array is None:
            raise NotThereError(f"'{v.name}', which nothing computes")
        return self.file.constant(v.name, array.reshape(shape).transpose(order))

    def ordered(self, tensor: int, shape: Sequence[int], old: Order, new: Order) -> int:
        """The tensor with its axes in order `new`: as it is, seen in another shape, or transposed."""
        if old == new:
            return tensor
        key = (tensor, old, new)
        if key not in self._made:
            spec = self.file.specs[tensor]
            moved = Spec(layouts.stored(shape, new), spec.dtype, spec.quantization)
            if layouts.alike(shape, old, new):
                self._made[key] = self.reshape(tensor, moved.shape)
            elif len(old) > RANK_MAX:
                raise NotThereError(f"a transposition of {len(old)} dimensions")
            else:
                perm = self.file.numbers(*layouts.between(old, new))
                self._made[key] = self.file.make("TRANSPOSE", [tensor, perm], moved)
                self.moved += int(np.prod(shape))
        return self._made[key]

    def reshape(self, tensor: int, shape: Sequence[int]) -> int:
        """The same elements under another stored shape."""
        spec = self.file.specs[tensor]
        if spec.shape == tuple(shape):
            return tensor
        return self.file.make("RESHAPE", [tensor, self.file.numbers(*shape)],
                              Spec(tuple(shape), spec.dtype, spec.quantization), new_shape=[int(n) for n in shape])

    def real(self, tensor: int) -> int:
        """Floats, dequantized where the tensor holds integers that stand for such."""
        spec = self.file.specs[tensor]
        if not spec.is_integer:
            return tensor
        if ("real", tensor) not in self._made:
            self._made["real", tensor] = self.file.make("DEQUANTIZE", [tensor], Spec(spec.shape, "float32"))
        return self._made["real", tensor]

    def requantized(self, tensor: int, q: Quantization, dtype: str | None = None) -> int:
        """The tensor, of floats or of integers, in integers of `dtype` (by default as the node is computed) by `q`."""
        spec, dtype = self.file.specs[tensor], dtype or self.dtype
        if spec.quantization == q and spec.dtype == dtype:
            return tensor
        key = ("quantized", tensor, q, dtype)
        if key not in self._made:
            self._made[key] = self.file.make("QUANTIZE", [tensor], Spec(spec.shape, dtype, q))
        return self._made[key]

    def aligned(self, i: int, order: Order) -> int:
        """Input `i` for an operator that broadcasts, with the dimensions and in the order of the result."""
        v = self.value(i)
        rank = len(order)
        if v.elements == 1 and v.index not in self.held and not self.integer:
            array = self.quantities.real(v.index)
            assert array is not None
            return self.file.constant(v.name, array.reshape(()))
        if len(v.shape) == rank:
            return self.input(i, order)
        shape = (1,) * (rank - len(v.shape)) + v.shape
        if v.index not in self.held:
            return self.constant_tensor(v, order, shape)
        tensor = self.reshape(self.input(i, layouts.plain(len(v.shape))), shape)
        return self.ordered(tensor, shape, layouts.plain(rank), order)

    def common(self, rank: int, operands: Sequence[int]) -> Order:
        """The order of the largest operand that has all dimensions of the result."""
        best: tuple[int, Order] = (0, layouts.plain(rank))
        for i in operands:
            if self.has(i) and self.node.inputs[i] in self.held and len(self.shape(i)) == rank:
                best = max(best, (self.value(i).elements, self.order(i)), key=lambda b: b[0])
        return best[1]

    # results

    def step(self, name: str, inputs: Sequence[int], shape: Sequence[int] | None = None, dtype: str | None = None,
             quantization: Quantization | None = None, **options: Any) -> int:
        """An operator on the way to the node's result; of the shape and type of its first input unless told."""
        like = self.file.specs[inputs[0]]
        spec = Spec(like.shape if shape is None else tuple(int(n) for n in shape), dtype or like.dtype,
                    quantization or (like.quantization if dtype is None else None))
        return self.file.make(name, inputs, spec, **options)

    def emit(self, name: str, inputs: Sequence[int], order: Order, shape: Sequence[int] | None = None,
             like: int | None = None, **options: Any) -> None:
        """The operator that gives the node's first result: in `order`, or of the stored `shape`.

        `like`: computed in integers, the result has the quantization of this tensor.
        """
        v = self.graph.values[self.end]
        at = layouts.stored(v.shape, order) if shape is None else tuple(shape)
        dtype, q = v.dtype.value, None
        if self.integer:
            dtype, q = self.dtype, self.quantized
            if like is not None:
                dtype, q = self.file.specs[like].dtype, self.file.specs[like].quantization
        tensor = self.file.make(name, inputs, Spec(at, dtype, q), v.name, **options)
        self.put(tensor, order)

    def put(self, tensor: int, order: Order, output: int = 0) -> None:
        """The node's result is in this tensor, whose elements lie as `order` says."""
        v = self.graph.values[self.end if output == 0 else self.node.outputs[output]]
        self.held[v.index] = Held(self.reshape(tensor, layouts.stored(v.shape, order)), order)
