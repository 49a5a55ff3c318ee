"""An ONNX graph being made from TFLite: what is held how, and what an operator's translation may ask for.

Integers that stand for real numbers are dequantized before an operator and quantized behind it: the form called QDQ.
Every TFLite tensor is held in some order of its axes (layouts.py): convolutions want channels first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.dialects import layouts
from npulab.dialects.conversion import NotThereError
from npulab.dialects.layouts import Order
from npulab.importers.onnx import read_onnx
from npulab.ir import DType, Graph, Node, Quantization, Value
from npulab.ir.ops import Generic
from npulab.ir.types import packed

Array = NDArray[Any]
OPSETS = {17: 8, 21: 10, 25: 13}
"""The opsets that files have, with their IR versions: from 21 on integers of 16 and 4 bits can be dequantized, from 25
on of 2 (ONNX's DequantizeLinear)."""
QUANTIZED = (DType.INT8, DType.UINT8, DType.INT16)
"""Element types of computed tensors that stand for real numbers."""
SMALL = {DType.INT4: 22, DType.INT2: 26}
"""Element types of constants that files hold several a byte, with ONNX's numbers."""
TYPES = {DType.FLOAT32: 1, DType.UINT8: 2, DType.INT8: 3, DType.INT16: 5, DType.INT32: 6, DType.INT64: 7, DType.BOOL: 9}
"""Element types of computed tensors, with ONNX's numbers."""
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Held:
    tensor: int
    order: Order


def is_quantized(v: Value) -> bool:
    """Whether the tensor's integers stand for real numbers, by one scale."""
    return v.quantization is not None and v.dtype in QUANTIZED and v.quantization.per_tensor


def opset_of(graph: Graph) -> int:
    """The oldest of OPSETS that has words for the graph's integers."""
    types = {v.dtype for v in graph.values if v.dtype is not DType.INT16 or v.quantization is not None}
    wide = any(n.op.name == "FAKE_QUANT" and isinstance(n.op, Generic) and int(str(n.op.attributes["num_bits"])) > 8
               for n in graph.nodes)
    return 25 if DType.INT2 in types else 21 if wide or types & {DType.INT4, DType.INT16} else 17


class OnnxFile:
    """Nodes and constants so far; tensors are numbers that get their names at the end."""

    def __init__(self, graph: Graph, first: Sequence[int]) -> None:
        self.graph = graph
        self.opset = opset_of(graph)
        self.labels: list[str] = []
        self.nodes: list[tuple[str, list[int], list[int], str, dict[str, Any]]] = []
        self.constants: list[tuple[int, Array, DType | None]] = []
        self.held: dict[int, Held] = {}
        self.columns: dict[int, tuple[tuple[int, ...], Order]] = {}
        self.node = graph.nodes[0] if graph.nodes else None
        self.origin = ""
        self.moved = 0
        self._made: dict[tuple[Any, ...], int] = {}
        self.inputs: list[int] = []
        for i in graph.inputs:
            v = graph.values[i]
            order = layouts.channels_first(len(v.shape)) if i in first else layouts.plain(len(v.shape))
            self.held[i] = Held(self.tensor(v.name), order)
            self.inputs.append(self.held[i].tensor)

    # writing

    def tensor(self, label: str) -> int:
        self.labels.append(label)
        return len(self.labels) - 1

    def constant(self, array: Array, label: str = "", dtype: DType | None = None) -> int:
        """A constant; equal small ones are there once. `dtype` INT4 or INT2: packed."""
        array = np.asarray(array, order="C")
        dtype = dtype if dtype in SMALL else None
        key = ("constant", array.dtype.str, array.shape, array.tobytes(), dtype) if array.size <= 64 else None
        if key is None or key not in self._made:
            made = self.tensor(label or f"{self.origin}_constant")
            self.constants.append((made, array, dtype))
            if key is None:
                return made
            self._made[key] = made
        return self._made[key]

    def numbers(self, *values: int) -> int:
        return self.constant(np.array(values, np.int64), "numbers")

    def op(self, name: str, inputs: Sequence[int], label: str = "", **attributes: Any) -> int:
        """A node with one output; -1 is an absent input."""
        out = self.tensor(label or f"{self.origin}_{name.lower()}")
        self.nodes.append((name, list(inputs), [out], self.origin, attributes))
        return out

    def ops(self, name: str, inputs: Sequence[int], count: int, **attributes: Any) -> list[int]:
        outs = [self.tensor(f"{self.origin}_{i}") for i in range(count)]
        self.nodes.append((name, list(inputs), outs, self.origin, attributes))
        return outs

    # reading

    @property
    def now(self) -> Node:
        assert self.node is not None
        return self.node

    def has(self, i: int) -> bool:
        return i < len(self.now.inputs) and self.now.inputs[i] >= 0

    def value(self, i: int) -> Value:
        if not self.has(i):
            raise NotThereError(f"input {i} is missing")
        return self.graph.values[self.now.inputs[i]]

    def shape(self, i: int) -> tuple[int, ...]:
        return self.value(i).shape

    @property
    def out(self) -> Value:
        return self.graph.values[self.now.outputs[0]]

    def known(self, i: int, what: str) -> Array:
        """The content of a constant input that is no data: axes, sizes, paddings."""
        v = self.value(i)
        if not v.is_constant:
            raise NotThereError(f"{what} that are computed")
        return v.array()

    @property
    def options(self) -> Any:
        """The attributes of an operator that has no record."""
        op = self.now.op
        return op.attributes if isinstance(op, Generic) else {}

    @property
    def fused(self) -> str:
        """The activation behind the operator."""
        return str(getattr(self.now.op, "activation", self.options.get("fused_activation_function", "none")))

    def order(self, i: int) -> Order:
        v = self.value(i)
        return self.held[v.index].order if v.index in self.held else layouts.plain(len(v.shape))

    def input(self, i: int, order: Order | None = None) -> int:
        """Input `i` as real numbers (or as the integers or truth values it is), in this order."""
        v = self.value(i)
        if v.index not in self.held:
            if not v.is_constant:
                raise NotThereError(f"'{v.name}', which nothing computes")
            return self.constant_of(v, order or layouts.plain(len(v.shape)))
        h = self.held[v.index]
        tensor = self.ordered(h.tensor, v.shape, h.order, order or h.order)
        return self.real(tensor, v.quantization, v.dtype) if is_quantized(v) and v.quantization else tensor

    def constant_of(self, v: Value, order: Order, shape: Sequence[int] | None = None) -> int:
        """A constant in this order (and then of this shape); quantized ones behind a DequantizeLinear."""
        array = v.integers().transpose(order)
        array = array if shape is None else array.reshape(shape)
        if v.dtype is DType.FLOAT16:
            array = array.astype(np.float32)
        if v.quantization is None or v.dtype not in (*QUANTIZED, *SMALL, DType.INT32):
            return self.constant(array, v.name)
        q = v.quantization
        if not q.per_tensor:
            q = Quantization(q.scales, q.zero_points, order.index(q.axis))
        return self.real(self.constant(array, v.name, v.dtype), q, v.dtype)

    def ordered(self, tensor: int, shape: Sequence[int], old: Order, new: Order) -> int:
        if old == new:
            return tensor
        key = (tensor, old, new)
        if key not in self._made:
            if layouts.alike(shape, old, new):
                self._made[key] = self.op("Reshape", [tensor, self.numbers(*layouts.stored(shape, new))])
            else:
                self._made[key] = self.op("Transpose", [tensor], perm=layouts.between(old, new))
                self.moved += int(np.prod(shape))
        return self._made[key]

    def real(self, tensor: int, q: Quantization, dtype: DType) -> int:
        """DequantizeLinear of a tensor of integers of `dtype`."""
        key = ("real", tensor, q)
        if key not in self._made:
            label = f"{self.labels[tensor]}_real"
            many = {} if q.per_tensor else {"axis": q.axis}
            self._made[key] = self.op("DequantizeLinear", [tensor, *self.scale_and_zero(q, dtype)], label, **many)
        return self._made[key]

    def scale_and_zero(self, q: Quantization, dtype: DType) -> list[int]:
        scales = np.array(q.scales, np.float32)
        zeros = np.array(q.zero_points).astype(np.int8 if dtype in SMALL else dtype.numpy)
        return [self.constant(scales.reshape(()) if q.per_tensor else scales, "scale"),
                self.constant(zeros.reshape(()) if q.per_tensor else zeros, "zero", dtype)]

    def aligned(self, i: int, order: Order) -> int:
        """Input `i` for an operator that broadcasts, with the dimensions and in the order of the result."""
        v, rank = self.value(i), len(order)
        shape = (1,) * (rank - len(v.shape)) + v.shape
        if v.index not in self.held:
            if v.elements == 1 or len(v.shape) == rank:
                return self.constant_of(v, layouts.plain(len(v.shape)) if v.elements == 1 else order)
            array = v.integers().reshape(shape)
            if v.quantization is None and v.dtype is not DType.FLOAT16:
                return self.constant(array.transpose(order), v.name)
            return self.constant_of(v, layouts.plain(len(v.shape)), layouts.stored(shape, order)) \
                if layouts.alike(shape, layouts.plain(rank), order) else self._move(i, shape, order)
        return self.input(i, order) if len(v.shape) == rank else self._move(i, shape, order)

    def _move(self, i: int, shape: tuple[int, ...], order: Order) -> int:
        tensor = self.op("Reshape", [self.input(i, layouts.plain(len(self.shape(i)))), self.numbers(*shape)])
        return self.ordered(tensor, shape, layouts.plain(len(shape)), order)

    def common(self, rank: int, operands: Sequence[int]) -> Order:
        best: tuple[int, Order] = (0, layouts.plain(rank))
        for i in operands:
            if self.has(i) and self.now.inputs[i] in self.held and len(self.shape(i)) == rank:
                best = max(best, (self.value(i).elements, self.order(i)), key=lambda b: b[0])
        return best[1]

    # results

    def give(self, tensor: int, order: Order, activation: object = "none", output: int = 0,
             shape: Sequence[int] | None = None) -> None:
        """Real numbers (or what the output is) as the node's result, behind its activation, quantized if it is.

        `shape`: the tensor's elements are those of the result, but it has another shape now, and needs a Reshape.
        """
        v = self.graph.values[self.now.outputs[output]]
        if shape is not None and tuple(shape) != layouts.stored(v.shape, order):
            tensor = self.op("Reshape", [tensor, self.numbers(*layouts.stored(v.shape, order))])
        tensor = self.activated(tensor, str(activation), v.name)
        if is_quantized(v) and v.quantization:
            tensor = self.op("QuantizeLinear", [tensor, *self.scale_and_zero(v.quantization, v.dtype)],
                             v.name)
        self.held[v.index] = Held(tensor, order)

    def activated(self, tensor: int, activation: str, label: str = "") -> int:
        match activation:
            case "none":
                return tensor
            case "relu":
                return self.op("Relu", [tensor], label)
            case "relu6" | "relu_n1_to_1" | "relu_0_to_1":
                low, high = {"relu6": (0, 6), "relu_n1_to_1": (-1, 1), "relu_0_to_1": (0, 1)}[activation]
                limits = [self.constant(np.array(n, np.float32), "limit") for n in (low, high)]
                return self.op("Clip", [tensor, *limits], label)
            case "tanh":
                return self.op("Tanh", [tensor], label)
            case _:
                raise NotThereError(f"the activation {activation}")

    # the end

    def graph_of(self, outputs: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> Graph:
        """The file as a Graph. `outputs` and their `shapes` are in the order of the source's outputs."""
        from onnx import helper

        names = self._names(outputs)
        values = self.graph.values
        infos = [helper.make_tensor_value_info(names[t], TYPES[values[i].dtype],
                                               layouts.stored(values[i].shape, self.held[i].order))
                 for t, i in zip(self.inputs, self.graph.inputs, strict=True)]
        results = [helper.make_tensor_value_info(names[t], TYPES[values[i].dtype], shape)
                   for t, i, shape in zip(outputs, self.graph.outputs, shapes, strict=True)]
        taken: dict[str, int] = {}
        nodes = []
        for op, ins, outs, label, attributes in self.nodes:
            taken[label] = taken.get(label, 0) + 1
            name = label if taken[label] == 1 else f"{label}_{op}_{taken[label]}"
            nodes.append(helper.make_node(op, [names[t] if t >= 0 else "" for t in ins], [names[t] for t in outs], name,
                                          **attributes))
        made = helper.make_graph(nodes, self.graph.name, infos, results,
                                 [self._tensor(*constant, names) for constant in self.constants])
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", self.opset)],
                                  ir_version=OPSETS[self.opset], producer_name="npulab")
        return read_onnx(model.SerializeToString(deterministic=True), self.graph.name)

    def _tensor(self, tensor: int, array: Array, dtype: DType | None, names: Sequence[str]) -> Any:
        from onnx import TensorProto, numpy_helper

        if dtype is None:
            return numpy_helper.from_array(array, names[tensor])
        return TensorProto(name=names[tensor], dims=array.shape, data_type=SMALL[dtype],
                           raw_data=packed(array, 4 if dtype is DType.INT4 else 2))

    def _names(self, outputs: Sequence[int]) -> list[str]:
        """Inputs and outputs have the source's names, all others what is free."""
        fixed = {t: self.graph.values[i].name
                 for t, i in zip((*self.inputs, *outputs), (*self.graph.inputs, *self.graph.outputs), strict=True)}
        used, names = set(fixed.values()), []
        for t, label in enumerate(self.labels):
            name, k = fixed.get(t, label or "tensor"), 1
            while t not in fixed and name in used:
                k += 1
                name = f"{label}_{k}"
            used.add(name)
            names.append(name)
        return names
