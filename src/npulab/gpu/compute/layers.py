"""A network as layers: problems for kernels, the tensors between them, and nothing moved that need not be.

What a value of the graph is held as (`Held`): an expression over views of dense tensors. Transposes, slices and most
reshapes change views only; sums, products and functions of single elements wait until somebody needs the result dense,
and are then one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import CapacityError
from npulab.gpu.compute.fusing import Group, opset
from npulab.gpu.compute.moves import INDEX_MAX, Map, Take
from npulab.gpu.compute.numbers import LARGEST, fits, largest
from npulab.gpu.compute.problems import Attention, Convolution, LayerNorm, Product, Softmax
from npulab.gpu.compute.types import Number
from npulab.gpu.compute.vectors import number_bytes
from npulab.gpu.compute.views import Shape, View, dense, nested
from npulab.gpu.compute.windows import Pool, Reduce, Resample, TransposedConvolution
from npulab.ir import Graph

Problem = (Convolution | Product | Softmax | LayerNorm | Attention | Map | Take | Reduce | Pool | Resample
           | TransposedConvolution)
OPERANDS_MAX = 8
"""Of one expression: each is an argument with strides."""
EXPRESSION_MAX = 1000
"""Characters."""


class RefusedError(Exception):
    """Why a node is not computed."""


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A dense buffer of floats, or of what `constant` is. number: what floats are stored as."""

    elements: int
    constant: NDArray[np.generic] | None = None
    number: Number = "float32"

    @property
    def bytes(self) -> int:
        return self.elements * (number_bytes(self.number) if self.constant is None else self.constant.itemsize)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A problem on tensors: `reads` in the order of the roles "input", "input1", ....

    packed  constants that the kernels pack as they want: weights and bias, B and bias, gamma and beta; or nothing.
    title, operators  of the nodes that it computes; `mover` that it only moves what they need.
    """

    what: Problem
    reads: tuple[int, ...]
    writes: int
    packed: tuple[NDArray[np.float32] | None, ...] = ()
    title: str = ""
    operators: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """number: what it is stored as where it must be, unless it is asked for as another."""

    expression: str
    operands: tuple[View, ...]
    shape: Shape
    number: Number
    operations: int = 0

    @property
    def view(self) -> View | None:
        return self.operands[0] if self.expression == "{0}" else None


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """Layers in order. inputs, outputs: name -> (tensor, shape), dense and in the model's own layout."""

    name: str
    tensors: tuple[Tensor, ...]
    layers: tuple[Layer, ...]
    inputs: dict[str, tuple[int, Shape]]
    outputs: dict[str, tuple[int, Shape]]
    groups: tuple[Group, ...] = field(default=())


class Builder:
    """Layers being made. `held` is filled by operators, group by group. number: what the group's tensors are stored
    as; kernels get what they read as the same."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.number: Number = "float32"
        self.opset = opset(graph)
        self.tensors: list[Tensor] = []
        self.layers: list[Layer] = []
        self.held: dict[int, Held] = {}
        self.title = self.operators = ""
        self._folded: dict[int, NDArray[np.generic]] = {}
        self._stored: dict[tuple[View, Number], int] = {}
        self._constants: dict[tuple[int, Number], Held] = {}

    # values of the graph

    def constant(self, value: int) -> NDArray[np.generic] | None:
        """What is known before anything runs; never to be written to."""
        if value in self._folded:
            return self._folded[value]
        v = self.graph.values[value] if value >= 0 else None
        return v.array() if v is not None and v.is_constant and v.dtype.numpy is not None else None

    def fold(self, value: int, array: NDArray[np.generic]) -> None:
        self._folded[value] = array

    def numbers(self, value: int) -> NDArray[np.float32] | None:
        """A constant of floats."""
        found = self.constant(value)
        return found.astype(np.float32, copy=False) if found is not None and found.dtype.kind == "f" else None

    def packed(self, value: int) -> NDArray[np.float32] | None:
        """A constant of floats that kernels are to store as the group's number. Raises: RefusedError if that ends
        before."""
        found = self.numbers(value)
        return None if found is None else self._stored_as(found, self.number)

    @staticmethod
    def _stored_as(array: NDArray[Any], number: Number) -> NDArray[Any]:
        if number == "float16" and not fits(array):
            raise RefusedError(f"its constants reach {largest(array):.6g}, float16 ends at {LARGEST:.0f}; "
                               "--number float32 has room")
        return array

    def shape(self, value: int) -> Shape:
        found = self.constant(value)
        return found.shape if found is not None else self.graph.values[value].shape

    def get(self, value: int) -> Held:
        """What a value is held as. Constants are stored as the group's tensors where they are many and fit."""
        if value in self.held:
            return self.held[value]
        array = self.constant(value)
        if array is None:
            raise RefusedError(f"it reads '{self.graph.values[value].name}', which is not computed here")
        if array.dtype.kind not in "fiub":
            raise RefusedError(f"it computes on {array.dtype}")
        key = value, self.number
        if key not in self._constants:
            kind = np.float16 if self.number == "float16" and array.size > 1 and fits(array) else np.float32
            tensor = self.tensor(array.size, np.ascontiguousarray(array, kind).reshape(-1))
            self._constants[key] = self.as_held(dense(tensor, array.shape))
        return self._constants[key]

    # tensors

    def tensor(self, elements: int, constant: NDArray[np.generic] | None = None, number: Number | None = None) -> int:
        if elements > INDEX_MAX:
            raise CapacityError(f"'{self.graph.name}' has a tensor with more elements than kernels count",
                                got=elements, want=INDEX_MAX)
        number = number or self.number if constant is None else "float16" if constant.dtype == np.float16 else "float32"
        self.tensors.append(Tensor(elements, constant, number))
        return len(self.tensors) - 1

    def number_in(self, view: View) -> Number:
        return self.tensors[view.tensor].number

    def emit(self, what: Problem, reads: Sequence[int], shape: Shape,
             packed: Sequence[NDArray[np.float32] | None] = ()) -> View:
        """A layer with a dense result."""
        out = self.tensor(math.prod(shape))
        self.layers.append(Layer(what, tuple(reads), out, tuple(packed), self.title, self.operators))
        return dense(out, shape)

    def place(self, held: Held, where: View) -> None:
        """Compute into a part of a tensor."""
        reads = tuple((v.broadcast(held.shape).strides, v.offset) for v in held.operands)
        stored = tuple(self.number_in(v) for v in (where, *held.operands))
        what = Map(held.expression, held.shape, reads, (where.strides, where.offset), stored, held.operations)
        if math.prod(held.shape):
            self.layers.append(Layer(what, tuple(v.tensor for v in held.operands), where.tensor, (), self.title,
                                     self.operators))

    def view(self, value: int) -> View:
        """The value in memory, however it lies."""
        return self.stored(self.get(value))

    def stored(self, held: Held, order: Shape | None = None, number: Number | None = None) -> View:
        """In memory; where it must be computed, or is asked for in an order of axes, outermost first, or as another
        number, dense."""
        view = held.view
        number = number or (held.number if view is None else self.number_in(view))
        if view is not None and self.number_in(view) == number and (
                order is None or view.transposed(order).is_dense):
            return view
        if view is not None and (array := self.tensors[view.tensor].constant) is not None:
            self._stored_as(array, number)
        if order is None:
            widest = max((v.broadcast(held.shape) for v in held.operands), key=lambda v: v.elements and sum(
                s != 0 for s in v.strides), default=None)
            order = nested(widest) if widest is not None else tuple(range(len(held.shape)))
        key = None if view is None else (view.transposed(order), number)
        made = self._stored.get(key) if key is not None else None
        out = made if made is not None else self.tensor(math.prod(held.shape), number=number)
        found = _in_order(dense(out, [held.shape[i] for i in order]), order)
        if made is None:
            self.place(held, found)
        if key is not None:
            self._stored[key] = out
        return found

    def dense(self, value: int, order: Shape | None = None) -> int:
        """The tensor that has the value row by row, its axes in this order, as the group's number."""
        return self.dense_of(self.get(value), order)

    def dense_of(self, held: Held, order: Shape | None = None) -> int:
        return self.stored(held, order if order is not None else tuple(range(len(held.shape))), self.number).tensor

    def set(self, value: int, held: Held | View) -> None:
        """The value's own. An expression that several read is computed here, once.

        Raises: RefusedError where the file states another shape: who reads it, and its buffers, go by that.
        """
        if isinstance(held, View):
            held = self.as_held(held)
        if held.shape != self.graph.values[value].shape:
            raise RefusedError(f"its result is {list(held.shape)}, not {list(self.graph.values[value].shape)}")
        readers = self.graph.consumers.get(value, ())
        count = sum(n.inputs.count(value) for n in readers) + self.graph.outputs.count(value)
        if held.view is None and (count != 1 or len(held.operands) > OPERANDS_MAX // 2
                                  or len(held.expression) > EXPRESSION_MAX):
            held = self.as_held(self.stored(held))
        self.held[value] = held

    def as_held(self, view: View) -> Held:
        return Held("{0}", (view,), view.shape, self.number_in(view))

    def applied(self, expression: str, operands: Sequence[Held], shape: Shape, operations: int = 1) -> Held:
        """An expression of expressions."""
        while sum(len(h.operands) for h in operands) > OPERANDS_MAX and any(h.view is None for h in operands):
            most = max(range(len(operands)), key=lambda i: len(operands[i].operands))
            operands = [self.as_held(self.stored(h)) if i == most else h for i, h in enumerate(operands)]
        views: list[View] = []
        texts = []
        for h in operands:
            indices = []
            for v in h.operands:
                wide = v.broadcast(h.shape).broadcast(shape)
                if wide not in views:
                    views.append(wide)
                indices.append(views.index(wide))
            texts.append(_renumbered(h.expression, indices))
        return Held(_substituted(expression, texts), tuple(views), shape, self.number,
                    operations + sum(h.operations for h in operands))


def _in_order(view: View, order: Shape) -> View:
    """The view whose axes, taken in `order`, are those of `view`."""
    inverse = sorted(range(len(order)), key=lambda i: order[i])
    return view.transposed(inverse)


def _renumbered(expression: str, indices: Sequence[int]) -> str:
    return _substituted(expression, [f"{{{i}}}" for i in indices])


def _substituted(expression: str, texts: Sequence[str]) -> str:
    """{0}, {1}, ... by these texts."""
    parts = expression.split("{")
    out = [parts[0]]
    for p in parts[1:]:
        number, _, rest = p.partition("}")
        out += [texts[int(number)], rest]
    return "".join(out)
