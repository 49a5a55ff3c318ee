"""ONNX graphs to TFLite: node by node, in integers where the graph is quantized so, and what cannot be said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from npulab.dialects import functions as f
from npulab.dialects import layouts, matrices, moves, resizes, windows
from npulab.dialects.conversion import MISFITS, TYPES, Conversion, Held, NotThereError, wide
from npulab.dialects.integers import clamped
from npulab.dialects.layouts import Order
from npulab.dialects.prepare import prepared
from npulab.dialects.quantities import Meaning, Quantities, is_op
from npulab.dialects.tflite_file import Spec
from npulab.errors import ModelError, UnsupportedError
from npulab.ir import DType, Graph, Node
from npulab.ir.ops import OnnxOp

EIGHT = ("int8", "uint8")
TABLE: dict[str, f.Translate] = {
    "Conv": windows.conv, "ConvTranspose": windows.conv_transpose, "MaxPool": windows.max_pool,
    "AveragePool": windows.average_pool, "GlobalAveragePool": windows.global_pool,
    "GlobalMaxPool": windows.global_pool, "Resize": resizes.resize, "Upsample": resizes.resize,
    "Gemm": matrices.gemm, "MatMul": matrices.matmul,
    "Add": f.two("ADD", True), "Sub": f.two("SUB", True), "Mul": f.two("MUL", True), "Div": f.divide,
    "Sum": f.two("ADD", True), "Max": f.extreme("MAXIMUM"), "Min": f.extreme("MINIMUM"), "Mean": f.mean_of_several,
    "Pow": f.power, "Mod": f.two("FLOOR_MOD"), "PRelu": f.only(EIGHT, f.prelu), "Where": f.where,
    "Equal": f.two("EQUAL"), "Greater": f.two("GREATER"), "Less": f.two("LESS"),
    "GreaterOrEqual": f.two("GREATER_EQUAL"), "LessOrEqual": f.two("LESS_EQUAL"),
    "And": f.two("LOGICAL_AND"), "Or": f.two("LOGICAL_OR"), "Not": f.one("LOGICAL_NOT"),
    "Abs": f.only(("int8", "int16"), f.one("ABS")), "Neg": f.one("NEG"), "Exp": f.only(("int8",), f.one("EXP")),
    "Log": f.one("LOG"), "Sqrt": f.one("SQRT"),
    "Floor": f.one("FLOOR"), "Ceil": f.one("CEIL"), "Round": f.one("ROUND"), "Sin": f.one("SIN"), "Cos": f.one("COS"),
    "Sign": f.one("SIGN"), "Reciprocal": f.reciprocal, "Relu": f.relu, "Clip": f.clip, "Elu": f.elu,
    "Sigmoid": f.fixed("LOGISTIC", 1 / 256, 0), "Tanh": f.fixed("TANH", 1 / 128, 128),
    "HardSwish": f.hard_swish, "HardSigmoid": f.hard_sigmoid, "Swish": f.swish,
    "Softplus": f.softplus, "Mish": f.mish, "Gelu": f.only(EIGHT, f.gelu),
    "LeakyRelu": f.leaky_relu, "Softmax": f.softmax, "LogSoftmax": f.softmax, "ArgMax": f.arg_extreme,
    "ArgMin": f.arg_extreme, "CumSum": f.cum_sum, "BatchNormalization": f.batch_norm,
    "LayerNormalization": f.layer_norm, "InstanceNormalization": f.instance_norm,
    "ReduceMean": f.reduce("MEAN"), "ReduceSum": f.reduce("SUM"), "ReduceMax": f.reduce("REDUCE_MAX"),
    "ReduceMin": f.reduce("REDUCE_MIN"), "ReduceProd": f.reduce("REDUCE_PROD"), "ReduceL1": f.reduce("SUM", "ABS"),
    "ReduceL2": f.reduce("SUM", "SQUARE", "SQRT"), "ReduceSumSquare": f.reduce("SUM", "SQUARE"),
    "ReduceLogSum": f.reduce("SUM", "", "LOG"),
    "Identity": moves.hand_on, "Dropout": moves.hand_on, "Transpose": moves.transpose, "Reshape": moves.reshape,
    "Flatten": moves.reshape, "Squeeze": moves.reshape, "Unsqueeze": moves.reshape, "Concat": moves.concat,
    "Split": moves.split, "Slice": moves.slice_, "Pad": moves.pad, "Gather": moves.gather, "Expand": moves.expand,
    "Tile": moves.tile, "GatherND": moves.gather_nd, "DepthToSpace": moves.depth_to_space,
    "SpaceToDepth": moves.depth_to_space, "Cast": moves.cast,
}
"""ONNX operators and their translations."""
ELEMENTS_MAX = 1 << 28
"""Of one tensor: a gigabyte of floats, half of what a TFLite file can be."""
FUSING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Sum", "MaxPool", "AveragePool",
          "BatchNormalization")
"""Those whose TFLite operators take an activation along."""
EXACT = ("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Split", "Slice", "Pad", "Gather",
         "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Identity", "Dropout", "Concat", "Relu", "Clip",
         "GlobalMaxPool", "ReduceMax", "ReduceMin")
"""In integers the result has its input's quantization and loses nothing by that."""
ROUNDING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "AveragePool", "GlobalAveragePool",
            "ReduceMean", "Sigmoid", "Tanh", "Softmax", "HardSwish", "LeakyRelu", "Resize", "Upsample", "Relu", "Clip",
            "Concat", "Max", "Min", "Abs", "Exp", "Gelu", "PRelu", "HardSigmoid", "Div")
"""In integers the result is rounded: only where it is quantized at once."""
SEVERAL = ("Add", "Sub", "Mul", "Concat", "Max", "Min")
"""All whose operands are data; of other operators the first."""


@dataclass(frozen=True, slots=True)
class Converted:
    """A graph in the other dialect. `inputs` and `outputs` are those whose axes lie in another order than before: new
    axis i is old axis order[i]. `notes`: what a user should know beside that."""

    graph: Graph
    inputs: dict[str, Order]
    outputs: dict[str, Order]
    notes: tuple[str, ...] = ()


def from_onnx(graph: Graph, keep_layout: bool = False) -> Converted:
    """The TFLite graph that computes the same; pictures come and go channels last unless `keep_layout`.

    Raises: UnsupportedError naming every operator that TFLite has no words for.
    """
    ready = prepared(graph)
    _check(graph, ready)
    try:
        quantities = Quantities(ready)
    except MISFITS as e:
        raise ModelError(f"'{graph.name}' has scales that do not fit what they quantize", got=str(e)[:200]) from e
    pictures = [] if keep_layout else [v for v in ready.inputs if len(ready.values[v].shape) == 4]
    best: tuple[int, Conversion] | None = None
    for last in ([pictures, []] if pictures else [[]]):
        c = Conversion(ready, quantities, last)
        _Translator(c).run()
        if best is None or c.moved < best[0]:
            best = (c.moved, c)
        if not c.moved:
            break
    assert best is not None
    return _finished(best[1], keep_layout)


def _check(graph: Graph, ready: Graph) -> None:
    """Every operator and element type that there is no translation for, at once."""
    missing = Counter(f"{n.op.domain + '.' if n.op.domain else ''}{n.op.name}" for n in ready.nodes
                      if isinstance(n.op, OnnxOp) and not _is_known(n))
    if missing:
        raise UnsupportedError(
            f"'{graph.name}' has operators that TFLite has no words for", got=_listed(missing),
            try_="cut the network before them, or compute them on the host")
    inner = set(ready.producer) - set(ready.outputs)
    for v in ready.values:
        if v.index in ready.producer or v.index in ready.inputs:
            if v.dynamic_axes or not v.has_shape:
                raise UnsupportedError(f"'{v.name}' of '{graph.name}' has no fixed size", want="fixed sizes",
                                       try_="--dim NAME=SIZE")
            if v.dtype not in TYPES and not (v.dtype is DType.UINT16 and v.index in inner):
                raise UnsupportedError(f"'{v.name}' of '{graph.name}' has elements that are not converted",
                                       got=v.dtype.value, want=", ".join(t.value for t in TYPES))
            if not 0 < v.elements <= ELEMENTS_MAX:
                raise UnsupportedError(f"'{v.name}' of '{graph.name}' has a size that is not converted", got=str(v),
                                       want=f"1 to {ELEMENTS_MAX} elements")


def _is_known(n: Node) -> bool:
    assert isinstance(n.op, OnnxOp)
    return is_op(n, "QuantizeLinear", "DequantizeLinear") or (n.op.name in TABLE and not n.op.domain)


def _listed(names: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in sorted(names.items()))


class _Translator:
    """Goes through the nodes of a conversion."""

    def __init__(self, c: Conversion) -> None:
        self.c = c
        self.done: set[int] = set()
        self.failed: list[str] = []
        self.clamp: tuple[float, float] | None = None
        self.last: Node | None = None

    def run(self) -> None:
        c = self.c
        for n in c.graph.nodes:
            if n.index in self.done:
                continue
            c.node, c.file.origin = n, n.name or f"{n.op.name}_{n.index}"
            try:
                self._node(n)
            except NotThereError as e:
                self.failed.append(f"{n.op.name} '{c.file.origin}': {e}")
                for v in (*n.outputs, c.end):
                    self._stand_in(v)
            except MISFITS as e:
                raise ModelError(f"{n.op.name} '{c.file.origin}' of '{c.graph.name}' has attributes or operands that "
                                 "do not fit it", got=f"{type(e).__name__}: {e}"[:200]) from e
        if self.failed:
            raise UnsupportedError(
                f"'{c.graph.name}' has operators that TFLite has no words for",
                got="; ".join(self.failed[:20]) + (f"; and {len(self.failed) - 20} more" if self.failed[20:] else ""))

    def _stand_in(self, v: int) -> None:
        """Something of the right shape, so that the rest can be looked at."""
        if v >= 0 and v not in self.c.held:
            value = self.c.graph.values[v]
            self.c.held[v] = _held(self.c, self.c.file.tensor(value.name, value.shape, value.dtype.value), v)

    def _node(self, n: Node) -> None:
        c = self.c
        c.activation, c.end, c.quantized, c.integer, c.addend = "NONE", n.outputs[0], None, False, -1
        c.dtype, c.narrow, self.clamp, self.last = c.quantities.dtype, None, None, None
        if is_op(n, "QuantizeLinear"):
            self._quantize(n)
        elif is_op(n, "DequantizeLinear"):
            self._dequantize(n)
        else:
            self._integer(n, self._fused(n))
            try:
                TABLE[n.op.name](c)
                self._behind()
            except NotThereError:
                if not c.integer:
                    raise
                for v in (c.end, *n.outputs):  # then in floats, between DEQUANTIZE and QUANTIZE
                    c.held.pop(v, None)
                c.integer, c.quantized, c.narrow = False, None, None
                self._release()
                TABLE[n.op.name](c)

    def _behind(self) -> None:
        """What is left to do behind an operator in integers: limits that TFLite fuses nowhere, 16 bits to 8."""
        c = self.c
        h = c.held[c.end] if c.integer and c.end in c.held else None
        if h is not None and c.narrow is not None and c.file.specs[h.tensor].dtype == "int16":
            h = Held(c.requantized(h.tensor, c.narrow[1], c.narrow[0]), h.order)
        if h is not None and self.clamp is not None:
            h = Held(clamped(c, h.tensor, *self.clamp), h.order)
        if h is not None:
            c.held[c.end] = h

    def _release(self) -> None:
        """A clamp that only goes along in integers is an operator of its own again."""
        if self.last is not None:
            self.done.discard(self.last.index)
            self.c.end = self.last.inputs[0]
        self.clamp = self.last = None

    def _fused(self, n: Node) -> int:
        """The value behind the activation that goes along with `n`, which is then done."""
        c = self.c
        if n.op.name not in FUSING or len(n.outputs) != 1 or c.out.dtype is not DType.FLOAT32:
            return c.end
        reader = self._only_reader(c.end)
        if reader is not None and is_op(n, "MatMul") and (addend := _bias_in(c, n, reader)) is not None:
            c.addend, c.end = addend, reader.outputs[0]
            self.done.add(reader.index)
            reader = self._only_reader(c.end)
        if reader is None:
            return c.end
        name = f.activation_of(c, reader)
        if name and n.op.name != "Div":
            c.activation, c.end = name, reader.outputs[0]
            self.done.add(reader.index)
        elif (name or is_op(reader, "Clip")) and c.quantities.wanted(reader.outputs[0]) is not None:
            limits = (0.0, np.inf) if is_op(reader, "Relu") else f.limits(c, reader)
            if not np.isnan(limits).any():  # in integers the result is clamped
                self.clamp, self.last, c.end = limits, reader, reader.outputs[0]
                self.done.add(reader.index)
        return c.end

    def _only_reader(self, value: int) -> Node | None:
        readers = self.c.graph.consumers.get(value, ())
        return readers[0] if len(readers) == 1 and value not in self.c.graph.outputs else None

    def _integer(self, n: Node, end: int) -> None:
        """Whether `n` is computed in integers: its data are, and so is its result, at once or without loss."""
        c = self.c
        self._decide(n, end)
        if not c.integer and self.last is not None:
            self._release()
            self._decide(n, c.end)

    def _decide(self, n: Node, end: int) -> None:
        c, name = self.c, n.op.name
        data = n.inputs if name in SEVERAL else n.inputs[:1]
        if name == "MatMul" and c.quantities.real(n.inputs[1]) is None:
            data = n.inputs
        if name not in (*EXACT, *ROUNDING) or not all(self._is_integer(v) for v in data):
            return
        if not any(v in c.held for v in data):
            return
        if name in ("Conv", "ConvTranspose", "Gemm", "MatMul") and n.inputs[1] not in c.quantities.coded \
                and n.inputs[1] not in data:
            return
        wanted = c.quantities.wanted(end)
        if c.graph.values[end].dtype is not DType.FLOAT32:
            wanted = c.quantities.meaning(end)
        q = c.quantities.as_stored(wanted) if wanted else None
        wide_data = any(self._is_wide(v) for v in data)
        if name in ROUNDING and wanted and q:
            c.integer, c.quantized, c.dtype = True, q, c.quantities.stored_type(wanted)
            if wide_data and c.dtype != "int16" and name != "Concat":
                c.narrow, c.quantized, c.dtype = (c.dtype, q), wide(q), "int16"
        elif name in EXACT and self.last is None and (name != "Concat" or self._same(data)):
            c.integer = True
            c.dtype = "int16" if wide_data else c.dtype

    def _is_integer(self, v: int) -> bool:
        c = self.c
        if v in c.held:
            return c.file.specs[c.held[v].tensor].is_integer
        code = c.quantities.coded.get(v)
        return code is not None and c.quantities.stored(code, "int16") is not None

    def _is_wide(self, v: int) -> bool:
        c = self.c
        return c.file.specs[c.held[v].tensor].dtype == "int16" if v in c.held else c.quantities.is_wide(v)

    def _same(self, values: Sequence[int]) -> bool:
        c = self.c
        specs = [c.file.specs[c.held[v].tensor] if v in c.held else None for v in values]
        return len({(s.dtype, s.quantization) if s else None for s in specs}) == 1

    def _quantize(self, n: Node) -> None:
        c = self.c
        meaning = c.quantities.meaning(n.outputs[0])
        if meaning is None or c.quantities.parameters(n) is None:
            raise NotThereError("other than to 8 or 16 bits by one constant scale")
        q = c.quantities.as_stored(meaning)
        if q is None:
            raise NotThereError("to 16 bits with a zero point")
        h = c.held.get(n.inputs[0])
        h = h or _held(c, c.input(0), n.outputs[0])
        if n.inputs[0] in c.columns:
            c.columns[n.outputs[0]] = c.columns[n.inputs[0]]
        c.held[n.outputs[0]] = Held(c.requantized(h.tensor, q, c.quantities.stored_type(meaning)), h.order)

    def _dequantize(self, n: Node) -> None:
        c = self.c
        if n.outputs[0] in c.quantities.coded:
            return
        meaning, parameters = c.quantities.meaning(n.inputs[0]), c.quantities.parameters(n)
        if meaning is None or parameters is None or n.inputs[0] not in c.held:
            raise NotThereError("other than from 8 or 16 bits by one constant scale")
        own = Meaning(float(parameters[0][0]), int(parameters[1][0]), c.value(0).dtype.value)
        if own != meaning:
            raise NotThereError("by another scale than the one that the integers were made with")
        c.held[n.outputs[0]] = c.held[n.inputs[0]]
        if n.inputs[0] in c.columns:
            c.columns[n.outputs[0]] = c.columns[n.inputs[0]]


def _bias_in(c: Conversion, product: Node, reader: Node) -> int | None:
    """The constant that `reader` adds to each row of a product with a constant matrix."""
    if not is_op(reader, "Add") or c.quantities.real(product.inputs[1]) is None:
        return None
    shape = c.graph.values[product.inputs[1]].shape
    other = next((v for v in reader.inputs if v != product.outputs[0]), -1)
    if len(shape) != 2 or other < 0 or c.quantities.real(other) is None:
        return None
    addend = c.graph.values[other]
    rank = len(c.graph.values[product.outputs[0]].shape)
    return other if addend.shape[-1:] == shape[1:] and addend.elements == shape[1] and len(addend.shape) <= rank \
        else None


def _held(c: Conversion, tensor: int, value: int) -> Held:
    return Held(tensor, layouts.plain(len(c.graph.values[value].shape)))


def _finished(c: Conversion, keep_layout: bool) -> Converted:
    """Inputs and outputs under their names, of their types, each a tensor of its own."""
    graph = c.graph
    outputs: dict[int, None] = {}
    moved: dict[str, Order] = {}
    for i in graph.outputs:
        v = graph.values[i]
        c.file.origin = f"output {v.name}"
        c.integer, c.dtype = True, c.quantities.dtype
        rank = len(v.shape)
        h = c.held.get(i)
        if h is None:
            tensor, order = c.constant_tensor(v, layouts.plain(rank)), layouts.plain(rank)
        else:
            last = layouts.channels_last(rank)
            order = last if h.order == last and rank == 4 and not keep_layout else layouts.plain(rank)
            tensor = c.ordered(h.tensor, v.shape, h.order, order)
        spec = c.file.specs[tensor]
        if spec.is_integer and v.dtype is DType.FLOAT32:
            tensor = c.real(tensor)
        elif spec.is_integer and spec.dtype != v.dtype.value:
            meaning = c.quantities.meaning(i)
            assert meaning is not None
            tensor = c.file.make("QUANTIZE", [tensor],
                                 Spec(spec.shape, v.dtype.value, c.quantities.as_stored(meaning, v.dtype.value)))
        if tensor in outputs or tensor in c.inputs or c.file.builder.tensors[tensor]["buffer"]:
            tensor = c.file.make("RESHAPE", [tensor, c.file.numbers(*c.file.specs[tensor].shape)],
                                 c.file.specs[tensor], new_shape=list(c.file.specs[tensor].shape))
        if order != layouts.plain(rank):
            moved[v.name] = order
        outputs[tensor] = None
    for tensor, i in zip((*c.inputs, *outputs), (*graph.inputs, *graph.outputs), strict=True):
        c.file.renamed(tensor, graph.values[i].name)
    inputs = {graph.values[i].name: c.held[i].order for i in graph.inputs
              if c.held[i].order != layouts.plain(len(c.held[i].order))}
    made = c.file.graph(graph.name, c.inputs, list(outputs))
    notes = tuple(f"{text} ({count} of them)" if count > 1 else text for text, count in sorted(c.notes.items()))
    return Converted(replace(made, name=graph.name), inputs, moved, notes)
