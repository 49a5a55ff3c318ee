"""A network as layers: problems for kernels, the tensors between them, and nothing moved that need not be.

What a value of the graph is held as (`Held`): an expression over views of dense tensors. Transposes, slices and most
reshapes change views only; sums, products and functions of single elements wait until somebody needs the result dense,
and are then one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from npulab.errors import CapacityError
from npulab.gpu.compute.fusing import Group, opset
from npulab.gpu.compute.moves import INDEX_MAX, Map, Take
from npulab.gpu.compute.problems import Attention, Convolution, LayerNorm, Product, Softmax
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
    """A dense buffer of float32, or of what `constant` is."""

    elements: int
    constant: NDArray[np.generic] | None = None

    @property
    def bytes(self) -> int:
        return self.elements * (4 if self.constant is None else self.constant.itemsize)


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
    expression: str
    operands: tuple[View, ...]
    shape: Shape
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
    """Layers being made. `held` is filled by operators, group by group."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.opset = opset(graph)
        self.tensors: list[Tensor] = []
        self.layers: list[Layer] = []
        self.held: dict[int, Held] = {}
        self.title = self.operators = ""
        self._folded: dict[int, NDArray[np.generic]] = {}
        self._stored: dict[View, int] = {}
        self._constants: dict[int, Held] = {}

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

    def shape(self, value: int) -> Shape:
        found = self.constant(value)
        return found.shape if found is not None else self.graph.values[value].shape

    def get(self, value: int) -> Held:
        """What a value is held as. Constants of one element are written into the expression."""
        if value in self.held:
            return self.held[value]
        array = self.constant(value)
        if array is None:
            raise RefusedError(f"it reads '{self.graph.values[value].name}', which is not computed here")
        if array.dtype.kind not in "fiub":
            raise RefusedError(f"it computes on {array.dtype}")
        if value not in self._constants:
            tensor = self.tensor(array.size, np.ascontiguousarray(array, np.float32).reshape(-1))
            self._constants[value] = Held("{0}", (dense(tensor, array.shape),), array.shape)
        return self._constants[value]

    # tensors

    def tensor(self, elements: int, constant: NDArray[np.generic] | None = None) -> int:
        if elements > INDEX_MAX:
            raise CapacityError(f"'{self.graph.name}' has a tensor with more elements than kernels count",
                                got=elements, want=INDEX_MAX)
        self.tensors.append(Tensor(elements, constant))
        return len(self.tensors) - 1

    def emit(self, what: Problem, reads: Sequence[int], shape: Shape,
             packed: Sequence[NDArray[np.float32] | None] = ()) -> View:
        """A layer with a dense result."""
        out = self.tensor(math.prod(shape))
        self.layers.append(Layer(what, tuple(reads), out, tuple(packed), self.title, self.operators))
        return dense(out, shape)

    def place(self, held: Held, where: View) -> None:
        """Compute into a part of a tensor."""
        reads = tuple((v.broadcast(held.shape).strides, v.offset) for v in held.operands)
        what = Map(held.expression, held.shape, reads, (where.strides, where.offset), held.operations)
        if math.prod(held.shape):
            self.layers.append(Layer(what, tuple(v.tensor for v in held.operands), where.tensor, (), self.title,
                                     self.operators))

    def view(self, value: int) -> View:
        """The value in memory, however it lies."""
        return self.stored(self.get(value))

    def stored(self, held: Held, order: Shape | None = None) -> View:
        """In memory; where it must be computed or is asked for in an order of axes, outermost first, dense."""
        view = held.view
        if view is not None and (order is None or view.transposed(order).is_dense):
            return view
        if view is not None and order is not None and view.transposed(order) in self._stored:
            return _in_order(dense(self._stored[view.transposed(order)], [held.shape[i] for i in order]), order)
        if order is None:
            widest = max((v.broadcast(held.shape) for v in held.operands), key=lambda v: v.elements and sum(
                s != 0 for s in v.strides), default=None)
            order = nested(widest) if widest is not None else tuple(range(len(held.shape)))
        out = dense(self.tensor(math.prod(held.shape)), [held.shape[i] for i in order])
        found = _in_order(out, order)
        self.place(held, found)
        if view is not None:
            self._stored[view.transposed(order)] = out.tensor
        return found

    def dense(self, value: int, order: Shape | None = None) -> int:
        """The tensor that has the value row by row, its axes in this order."""
        return self.dense_of(self.get(value), order)

    def dense_of(self, held: Held, order: Shape | None = None) -> int:
        return self.stored(held, order if order is not None else tuple(range(len(held.shape)))).tensor

    def set(self, value: int, held: Held | View) -> None:
        """The value's own. An expression that several read is computed here, once.

        Raises: RefusedError where the file states another shape: who reads it, and its buffers, go by that.
        """
        if isinstance(held, View):
            held = Held("{0}", (held,), held.shape)
        if held.shape != self.graph.values[value].shape:
            raise RefusedError(f"its result is {list(held.shape)}, not {list(self.graph.values[value].shape)}")
        readers = self.graph.consumers.get(value, ())
        count = sum(n.inputs.count(value) for n in readers) + self.graph.outputs.count(value)
        if held.view is None and (count != 1 or len(held.operands) > OPERANDS_MAX // 2
                                  or len(held.expression) > EXPRESSION_MAX):
            held = self.as_held(self.stored(held))
        self.held[value] = held

    @staticmethod
    def as_held(view: View) -> Held:
        return Held("{0}", (view,), view.shape)

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
        return Held(_substituted(expression, texts), tuple(views), shape,
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
