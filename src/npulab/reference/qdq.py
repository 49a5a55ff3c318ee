"""ONNX networks with QuantizeLinear and DequantizeLinear, as ONNX Runtime computes them on a CPU.

DequantizeLinear, operator, QuantizeLinear becomes one step on integers where ONNX Runtime has an integer kernel for
the operator, and a copy where the operator only moves elements and both sides are stored alike. Everything else stays
in float32 between the two, and ONNX Runtime's own kernels compute it (`islands`). docs/arithmetic.md lists which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import OnnxOp
from npulab.reference import onnx_moves, qlinear
from npulab.reference.accumulate import matrix, windows
from npulab.reference.convolve import biased
from npulab.reference.islands import sigmoid, single
from npulab.reference.requantize import nearest_even
from npulab.reference.types import Array, Step, Stored, codes

Steps = list[tuple[str, tuple[int, ...], tuple[int, ...], Step]]
MOVES = ("Expand", "Flatten", "Gather", "GatherElements", "Reshape", "Slice", "Squeeze", "Tile", "Transpose",
         "Unsqueeze", "MaxPool", "Resize", "ReduceMax", "ReduceMin", "Split")
"""Operators that ONNX Runtime runs on codes where input and output are stored alike."""
F = np.float32


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """What a DequantizeLinear reads: a constant or a computed tensor `value`, and how it is stored."""

    value: Value
    scales: Array
    zeros: Array
    axis: int

    @property
    def stored(self) -> Stored:
        dtype = self.value.dtype.numpy
        assert dtype is not None
        return Stored(float(self.scales[0]), int(self.zeros[0]), dtype)

    def is_byte(self) -> bool:
        return self.value.dtype in (DType.INT8, DType.UINT8)


def steps_of(graph: Graph) -> tuple[Steps, dict[int, Array], list[int]]:
    """(steps, constants that they read, indices of the nodes that stay in float32)."""
    units = {n.index: u for n in graph.nodes if (u := _unit(graph, n)) is not None}
    absorbed = {q for u in units.values() for q in u.absorbs}
    steps: Steps = []
    constants: dict[int, Array] = {}
    islands: list[int] = []
    for n in graph.nodes:
        if n.index in absorbed:
            continue
        if n.index in units:
            steps.append((str(n), units[n.index].reads, units[n.index].writes, units[n.index].step))
        elif _is(n, "DequantizeLinear") or _is(n, "QuantizeLinear"):
            readers = graph.consumers.get(n.outputs[0], ())
            if _is(n, "DequantizeLinear") and n.outputs[0] not in graph.outputs and all(
                    r.index in units for r in readers):
                continue  # whoever reads it reads the codes
            _convert(graph, n, steps, constants)
        else:
            reads = tuple(dict.fromkeys(v for v in n.inputs if v >= 0 and not graph.values[v].is_constant
                                        and v not in constants))
            step = onnx_moves.step_of(graph, n, reads, constants)
            if step is None:
                islands.append(n.index)
                step = single(graph, n, reads, known=constants)
            steps.append((str(n), reads, n.outputs, step))
    return steps, constants, islands


def _of(node: Node) -> Mapping[str, Any]:
    """The attributes of an ONNX node."""
    assert isinstance(node.op, OnnxOp)
    return node.op.attributes


def _is(node: Node, *names: str) -> bool:
    return isinstance(node.op, OnnxOp) and node.op.name in names and node.op.domain in ("", "ai.onnx", "com.microsoft")


def coded(graph: Graph, node: Node) -> Coded | None:
    """How a QuantizeLinear or DequantizeLinear stores; None where its numbers are not constant, or in blocks."""
    op = node.op
    assert isinstance(op, OnnxOp)
    scale, zero = graph.value(node, 1), graph.value(node, 2)
    if scale is None or not scale.is_constant or (zero is not None and not zero.is_constant) or _of(node).get(
            "block_size"):
        return None
    scales = np.atleast_1d(scale.array()).astype(F)
    zeros = np.zeros(scales.shape, np.int64) if zero is None else np.atleast_1d(codes(zero)).astype(np.int64)
    v = node.inputs[0] if op.name == "DequantizeLinear" else node.outputs[0]
    return Coded(graph.values[v], scales.reshape(-1), zeros.reshape(-1), int(_of(node).get("axis", 1)))


def _convert(graph: Graph, node: Node, steps: Steps, constants: dict[int, Array]) -> None:
    """A QuantizeLinear or DequantizeLinear by itself."""
    c = coded(graph, node)
    assert isinstance(node.op, OnnxOp)
    source = graph.values[node.inputs[0]]
    if c is None or c.value.dtype.numpy is None:
        reads = () if source.is_constant else (source.index,)
        steps.append((str(node), reads, node.outputs, single(graph, node, reads)))
        return
    rank = len(source.shape)
    shape = tuple(-1 if i == c.axis % max(rank, 1) else 1 for i in range(rank)) if c.scales.size > 1 else ()
    scales, zeros = c.scales.reshape(shape), c.zeros.reshape(shape)
    to = c.stored
    if node.op.name == "DequantizeLinear":
        every = qlinear.every_code(to) if c.is_byte() and not shape else None

        def run(x: Array) -> Array:
            if every is not None:
                return np.take(every, np.ascontiguousarray(x).reshape(x.shape).view(np.uint8))
            return np.asarray((x.astype(np.int64) - zeros).astype(F) * scales, F)
    else:
        def run(x: Array) -> Array:
            steps = np.asarray(x.astype(F) / scales)
            np.clip(steps, (to.low - zeros).astype(F), (to.high - zeros).astype(F), out=steps)
            np.rint(steps, out=steps)
            steps += zeros.astype(F)
            return steps.astype(to.dtype)

    if source.is_constant:
        constants[node.outputs[0]] = run(codes(source))
    else:
        steps.append((str(node), (source.index,), node.outputs, lambda arrays: [run(arrays[0])]))


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A node on codes. `absorbs` are the nodes after it that it stands for too."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    absorbs: tuple[int, ...]
    step: Step


def _unit(graph: Graph, node: Node) -> Unit | None:
    if not isinstance(node.op, OnnxOp) or _is(node, "QuantizeLinear", "DequantizeLinear") or not node.inputs:
        return None
    first = _source(graph, node, 0)
    if first is None or not first.is_byte():
        return None
    if node.op.name == "Split":
        return _split(graph, node, first)
    after = _after(graph, node)
    if after is None:
        return _to_floats(graph, node, first) if node.op.name in ("MatMul", "Gemm") else None
    absorbs, out = after
    if not out.is_byte() or out.scales.size > 1:
        return None
    made = _moved(graph, node, first, out) if node.op.name in MOVES else _kernel(graph, node, first, out)
    if made is None:
        return None
    reads, step = made
    return Unit(reads, (out.value.index,), absorbs, step)


def _source(graph: Graph, node: Node, i: int) -> Coded | None:
    """What the DequantizeLinear behind input `i` reads."""
    if i >= len(node.inputs) or node.inputs[i] < 0:
        return None
    producer = graph.producer.get(node.inputs[i])
    return coded(graph, producer) if producer is not None and _is(producer, "DequantizeLinear") else None


def _after(graph: Graph, node: Node) -> tuple[tuple[int, ...], Coded] | None:
    """(nodes up to the one QuantizeLinear that reads the result, how it stores it).

    A Relu or Clip in between counts for nothing if the stored range has nothing beyond it.
    """
    v = node.outputs[0]
    passed: list[int] = []
    while True:
        readers = graph.consumers.get(v, ())
        if len(readers) != 1 or v in graph.outputs or len([o for o in node.outputs if o >= 0]) != 1:
            return None
        reader = readers[0]
        if _is(reader, "QuantizeLinear"):
            c = coded(graph, reader)
            if c is None or c.value.dtype.numpy is None or c.scales.size > 1:
                return None
            if not all(_redundant(graph, graph.nodes[p], c.stored) for p in passed):
                return None
            return (*passed, reader.index), c
        if not _is(reader, "Relu", "Clip") or passed:
            return None
        passed.append(reader.index)
        v = reader.outputs[0]


def _redundant(graph: Graph, node: Node, out: Stored) -> bool:
    """Whether a Relu or Clip keeps everything that `out` can store."""
    assert isinstance(node.op, OnnxOp)
    if node.op.name == "Relu":
        return out.zero == out.low
    bounds = [graph.value(node, i) for i in (1, 2)]
    low = _of(node).get("min", -np.inf) if bounds[0] is None else _number(bounds[0])
    high = _of(node).get("max", np.inf) if bounds[1] is None else _number(bounds[1])
    if low is None or high is None:
        return False
    bottom, top = F(out.scale) * F(out.low - out.zero), F(out.scale) * F(out.high - out.zero)
    eps = np.finfo(F).eps
    return bool(F(low) - bottom <= eps and top - F(high) <= eps)


def _number(value: Value) -> float | None:
    return float(value.array().reshape(-1)[0]) if value.is_constant else None


def _kernel(graph: Graph, node: Node, x: Coded, out: Coded) -> tuple[tuple[int, ...], Step] | None:
    """The operators that have integer kernels."""
    op = node.op
    assert isinstance(op, OnnxOp)
    a, to = _of(node), out.stored
    if x.scales.size > 1 or x.value.dtype is not out.value.dtype:
        return None
    reads = (x.value.index,)
    match op.name:
        case "Conv":
            return _convolution(graph, node, x, out)
        case "MatMul" | "Gemm":
            made = _product(graph, node, x, F(to.scale))
            if made is None:
                return None
            sums, real = made
            rescale = nearest_even(real)
            return reads, lambda arrays: [rescale(sums(arrays[0]), to)]
        case "Add" | "Mul":
            y = _source(graph, node, 1)
            if y is None or y.scales.size > 1 or y.value.dtype is not x.value.dtype:
                return None
            both = (qlinear.add if op.name == "Add" else qlinear.mul)(x.stored, y.stored, to)
            given = [codes(c.value) if c.value.is_constant else None for c in (x, y)]
            two = tuple(dict.fromkeys(c.value.index for c, g in zip((x, y), given, strict=True) if g is None))
            places = [None if g is not None else two.index(c.value.index) for c, g in zip((x, y), given, strict=True)]

            def step(arrays: Sequence[Array]) -> list[Array]:
                p, q = (arrays[n] if n is not None else g for n, g in zip(places, given, strict=True))
                return [both(np.asarray(p), np.asarray(q))]

            return two, step
        case "AveragePool" if len(x.value.shape) == 4 and not a.get("ceil_mode") and _auto(a) and all(
                d == 1 for d in _ints(a, "dilations", ())):
            window = _ints(a, "kernel_shape", ())
            pool = qlinear.average_pool(x.stored, to, window, _ints(a, "strides", (1, 1)),
                                        _ints(a, "pads", (0, 0, 0, 0)), bool(a.get("count_include_pad", 0)))
            return reads, lambda arrays: [pool(arrays[0])]
        case "GlobalAveragePool":
            mean = qlinear.global_average_pool(x.stored, to)
            return reads, lambda arrays: [mean(arrays[0])]
        case "LeakyRelu":
            alpha = F(a.get("alpha", 0.01))
            lut = qlinear.table(x.stored, to, lambda v: np.where(v >= 0, v, alpha * v))
            return reads, lambda arrays: [lut(arrays[0])]
        case "Sigmoid":
            lut = qlinear.table(x.stored, to, sigmoid(graph, node))
            return reads, lambda arrays: [lut(arrays[0])]
        case "Softmax":
            rank = len(x.value.shape)
            if dict(graph.header.opsets if graph.header else ()).get("", 13) < 13:
                return None
            soft = qlinear.softmax(x.stored, to, int(a.get("axis", -1)) % rank)
            return reads, lambda arrays: [soft(arrays[0])]
        case "Concat":
            return _concat(graph, node, out)
    return None


def _ints(attributes: Mapping[str, Any], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(v) for v in attributes.get(name) or default)


def _auto(attributes: Mapping[str, Any]) -> bool:
    """Whether the pads are said in numbers."""
    return attributes.get("auto_pad", "NOTSET") in ("NOTSET", b"NOTSET", "", "VALID", b"VALID")


def _convolution(graph: Graph, node: Node, x: Coded, out: Coded) -> tuple[tuple[int, ...], Step] | None:
    w, a = _source(graph, node, 1), _of(node)
    if w is None or not w.value.is_constant or not w.is_byte() or len(x.value.shape) != 4 or not _auto(a):
        return None
    bias = None
    if len(node.inputs) > 2 and node.inputs[2] >= 0:
        b = _source(graph, node, 2)
        if b is None or b.value.dtype is not DType.INT32 or not b.value.is_constant:
            return None
        bias = codes(b.value)
    if len(set(w.zeros.tolist())) > 1:
        return None
    source = x.stored
    stride, dilation = cast("Any", _ints(a, "strides", (1, 1))), cast("Any", _ints(a, "dilations", (1, 1)))
    pads = cast("Any", _ints(a, "pads", (0, 0, 0, 0)))
    sums = windows(codes(w.value), int(w.zeros[0]), source.zero, source.dtype, stride, dilation, pads,
                   int(a.get("group", 1)))
    rescale = nearest_even(F(source.scale) * w.scales / F(out.stored.scale))
    to = out.stored
    plus = None if bias is None else bias.reshape(-1, 1, 1)
    return (x.value.index,), lambda arrays: [rescale(biased(sums(arrays[0]), plus), to, axis=1)]


def _product(graph: Graph, node: Node, x: Coded, scale: np.float32 | None
             ) -> tuple[Callable[[Array], Array], Array] | None:
    """(codes to sums with the bias, factor of each column or of all), of MatMul and Gemm with constant weights.

    `scale` of the output; None leaves it out.
    """
    op = node.op
    assert isinstance(op, OnnxOp)
    a, w = _of(node), _source(graph, node, 1)
    if w is None or not w.value.is_constant or not w.is_byte() or len(w.value.shape) != 2 or x.value.is_constant:
        return None
    kernel = codes(w.value)
    alpha = F(1)
    bias = None
    if op.name == "Gemm":
        if a.get("transA"):
            return None
        alpha = F(a.get("alpha", 1.0))
        if len(node.inputs) > 2 and node.inputs[2] >= 0:
            b = _source(graph, node, 2)
            if b is None or b.value.dtype is not DType.INT32 or not b.value.is_constant or F(
                    a.get("beta", 1.0)) != 1 or alpha != 1:
                return None
            bias = codes(b.value)
    if not a.get("transB"):
        kernel = kernel.T
    if len(set(w.zeros.tolist())) > 1:
        return None
    source = x.stored
    run = matrix(kernel, int(w.zeros[0]), source.zero, source.dtype)
    n, k = kernel.shape

    def sums(data: Array) -> Array:
        return biased(run(data.reshape(-1, k)).reshape(*data.shape[:-1], n), bias)

    real = alpha * F(source.scale) * w.scales
    return sums, np.asarray(real if scale is None else real / scale, F)


def _to_floats(graph: Graph, node: Node, x: Coded) -> Unit | None:
    """A matrix product of codes whose result stays float32: sum times factor."""
    if x.scales.size > 1 or node.outputs[0] < 0:
        return None
    made = _product(graph, node, x, None)
    if made is None:
        return None
    sums, real = made
    return Unit((x.value.index,), node.outputs, (), lambda arrays: [sums(arrays[0]).astype(F) * real])


def _concat(graph: Graph, node: Node, out: Coded) -> tuple[tuple[int, ...], Step] | None:
    parts = [_source(graph, node, i) for i in range(len(node.inputs))]
    if any(p is None or p.scales.size > 1 or p.value.dtype is not out.value.dtype for p in parts):
        return None
    known = [p for p in parts if p is not None]
    to, axis = out.stored, int(_of(node)["axis"])
    tables = [None if p.stored.same(to) else qlinear.table(p.stored, to, lambda v: v) for p in known]
    reads = tuple(dict.fromkeys(p.value.index for p in known if not p.value.is_constant))
    given = [codes(p.value) if p.value.is_constant else reads.index(p.value.index) for p in known]

    def step(arrays: Sequence[Array]) -> list[Array]:
        found = [arrays[g] if isinstance(g, int) else g for g in given]
        return [np.concatenate([f if t is None else t(f) for f, t in zip(found, tables, strict=True)], axis)]

    return reads, step


def _moved(graph: Graph, node: Node, x: Coded, out: Coded) -> tuple[tuple[int, ...], Step] | None:
    """A move of codes that are stored alike on both sides: the operator itself, on integers."""
    if x.scales.size > 1 or x.value.dtype is not out.value.dtype or not x.stored.same(out.stored):
        return None
    if node.op.name == "Resize" and _of(node).get("mode", "nearest") not in ("nearest", b"nearest"):
        return None
    others = tuple(v for v in node.inputs[1:] if v >= 0 and not graph.values[v].is_constant)
    reads, own = (x.value.index, *others), (node.inputs[0], *others)
    return reads, onnx_moves.step_of(graph, node, own) or single(graph, node, own, x.value.dtype)


def _split(graph: Graph, node: Node, x: Coded) -> Unit | None:
    outs = []
    for v in node.outputs:
        readers = graph.consumers.get(v, ())
        if len(readers) != 1 or v in graph.outputs or not _is(readers[0], "QuantizeLinear"):
            return None
        c = coded(graph, readers[0])
        if c is None or c.scales.size > 1 or c.value.dtype is not x.value.dtype or not x.stored.same(c.stored):
            return None
        outs.append((readers[0].index, c.value.index))
    return Unit((x.value.index,), tuple(v for _, v in outs), tuple(n for n, _ in outs),
                single(graph, node, (node.inputs[0],), x.value.dtype))
