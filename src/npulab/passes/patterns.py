"""What passes share: reading operators and constants, and writing small pieces of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from npulab.ir import Node
from npulab.ir.ops import OnnxOp, captures
from npulab.passes.rewrite import Rewrite

COMMUTE = ("Add", "Mul", "Max", "Min")
STABLE = frozenset({
    "Abs", "Add", "And", "ArgMax", "ArgMin", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Celu", "Clip",
    "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "DepthToSpace", "DequantizeLinear",
    "Div", "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather",
    "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "LRN",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "LpNormalization", "MatMul",
    "Max", "MaxPool", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "NonMaxSuppression", "Not", "OneHot", "Or",
    "PRelu", "Pad", "Pow", "QuantizeLinear", "Range", "Reciprocal", "Relu", "Reshape", "Resize", "Round", "Selu",
    "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth",
    "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose",
    "Trilu", "Unsqueeze", "Where", "Xor",
})
"""Operators that compute from opset 14 on what they compute in every later one."""
REDUCERS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
            "ReduceLogSumExp", "ReduceSumSquare")
"""Operators whose axes are an attribute up to opset 17 and an input since. Of ReduceSum they are one since opset 13."""
RAISED_FROM = 14


def each(r: Rewrite, *names: str, all_: bool = False) -> Iterator[tuple[Node, Mapping[str, Any]]]:
    """ONNX's own operators of these names and their attributes, as they are when their turn comes; those that are
    wanted, or `all_`. Not those whose results a body reads: there they cannot be replaced."""
    inside: set[int] | None = None
    for i in range(len(r.nodes)):
        n = r.nodes[i]
        op = n.op
        if not isinstance(op, OnnxOp) or op.domain or op.name not in names:
            continue
        if inside is None:
            inside = {v for m in r.nodes for v in captures(m.op)}
        if (all_ or r.wanted(n)) and inside.isdisjoint(n.outputs):
            yield n, op.attributes


def attributes(n: Node) -> Mapping[str, Any]:
    return n.op.attributes if isinstance(n.op, OnnxOp) else {}


def title(n: Node) -> str:
    """What a person calls the node."""
    return n.name or n.op.name


def any_wanted(r: Rewrite, *nodes: Node) -> bool:
    return any(map(r.wanted, nodes))


def present(n: Node, i: int) -> bool:
    """Whether input `i` is there."""
    return i < len(n.inputs) and n.inputs[i] >= 0


def shape_of(r: Rewrite, value: int) -> tuple[int, ...] | None:
    """A shape of which all is known."""
    v = r.values[value]
    return v.shape if v.has_shape and not v.dynamic_axes else None


def is_float(r: Rewrite, value: int) -> bool:
    dtype = r.values[value].dtype.numpy
    return dtype is not None and np.issubdtype(dtype, np.floating)


def scalar(r: Rewrite, value: int) -> float | None:
    """A constant of one element."""
    found = r.constant(value)
    return float(found.reshape(-1)[0]) if found is not None and found.size == 1 and found.dtype.kind in "fiu" else None


def near(a: float | None, b: float) -> bool:
    """Equal up to the rounding of what exporters print."""
    return a is not None and math.isclose(a, b, rel_tol=2e-6, abs_tol=1e-12)


def with_number(r: Rewrite, value: int, *names: str) -> tuple[Node, int, float] | None:
    """(node, x, c) where `value` is x + c, x * c, x - c, x / c or x ** c, of the operators named."""
    n = r.maker(value, *names)
    if n is None or len(n.inputs) != 2:
        return None
    for x, c in (n.inputs, n.inputs[::-1]) if n.op.name in COMMUTE else (n.inputs,):
        number = scalar(r, c)
        if number is not None and scalar(r, x) is None and len(r.values[c].shape) <= len(r.values[x].shape):
            return n, x, number
    return None


def affine(r: Rewrite, value: int, until: int = -1) -> tuple[int, float, float, list[Node]]:
    """(x, a, b, nodes) with value = a x + b, through Add, Sub, Mul and Div by numbers, as far as `until` or as they
    go."""
    chain: list[tuple[str, float]] = []
    nodes: list[Node] = []
    while value != until and len(chain) < 8:
        found = with_number(r, value, "Add", "Sub", "Mul", "Div")
        if found is None or (found[0].op.name == "Div" and found[2] == 0):
            break
        n, value, c = found
        chain.append((n.op.name, c))
        nodes.append(n)
    a, b = 1.0, 0.0
    for name, c in reversed(chain):
        match name:
            case "Add":
                b += c
            case "Sub":
                b -= c
            case "Mul":
                a, b = a * c, b * c
            case _:
                a, b = a / c, b / c
    return value, a, b, nodes


def along(r: Rewrite, value: int) -> list[int]:
    """The value and those that `affine` may stop at."""
    return [value, *(v for n in affine(r, value)[3] for v in n.inputs)]


def product(r: Rewrite, value: int, keep: Collection[int] = ()) -> tuple[float, list[int], list[Node]]:
    """(c, factors, nodes) with value = c * factor * factor ..., through Mul and Div by numbers; `keep` are factors as
    they are, whatever makes them."""
    c, queue = 1.0, [value]
    factors: list[int] = []
    nodes: list[Node] = []
    while queue:
        v = queue.pop()
        n = r.maker(v, "Mul", "Div")
        number = scalar(r, v)
        if number is not None:
            c *= number
        elif n is None or len(nodes) >= 8 or (v in keep and v != value):
            factors.append(v)
        elif n.op.name == "Mul":
            nodes.append(n)
            queue += n.inputs
        elif (divisor := scalar(r, n.inputs[1])):
            c /= divisor
            nodes.append(n)
            queue.append(n.inputs[0])
        else:
            factors.append(v)
    return c, factors, nodes


class At:
    """Where new nodes go: in front of a node, and named after it."""

    def __init__(self, r: Rewrite, before: Node) -> None:
        self.r = r
        self.before = before
        self.name = title(before)

    def op(self, op: str, *inputs: int | float, shape: Sequence[int] | None = None, **given: object) -> int:
        """A new operator; numbers among the inputs (floats) are constants of the type of the first value."""
        like = next(v for v in inputs if isinstance(v, int) and v >= 0)
        dtype = self.r.values[like].dtype.numpy
        values = [v if isinstance(v, int) else
                  self.r.add_constant(f"{self.name}_number", np.array(v, dtype)) for v in inputs]
        return self.r.add(self.before, f"{self.name}_{op.lower()}", op, values, given, like=like,
                          shape=None if shape is None else tuple(shape))

    def integers(self, numbers: Sequence[int]) -> int:
        return self.r.add_constant(f"{self.name}_integers", np.array(numbers, np.int64))

    def reshape(self, x: int, shape: Sequence[int]) -> int:
        return self.op("Reshape", x, self.integers(shape), shape=shape)

    def transpose(self, x: int, perm: Sequence[int]) -> int:
        shape = self.r.values[x].shape
        return self.op("Transpose", x, shape=[shape[p] for p in perm], perm=tuple(perm))

    def slice(self, x: int, axis: int, start: int, end: int) -> int:
        shape = list(self.r.values[x].shape)
        shape[axis] = end - start
        return self.op("Slice", x, *(self.integers([v]) for v in (start, end, axis)), shape=shape)

    def reduce(self, op: str, x: int, axes: Sequence[int], keepdims: bool = True) -> int:
        """Reduce* as the opset has it."""
        old = self.r.values[x].shape
        shape = [1 if i in axes else n for i, n in enumerate(old) if keepdims or i not in axes]
        if opset(self.r) >= (13 if op == "ReduceSum" else 18):
            return self.op(op, x, self.integers(axes), shape=shape, keepdims=int(keepdims))
        return self.op(op, x, shape=shape, axes=tuple(axes), keepdims=int(keepdims))

    def replace(self, value: int) -> None:
        """Readers of the node's output read `value`."""
        self.r.substitute(self.before.outputs[0], value)


def reduced(r: Rewrite, n: Node) -> tuple[tuple[int, ...], bool] | None:
    """(axes from 0, keepdims) of a Reduce*; None if they are computed or the rank is not known."""
    if not r.values[n.inputs[0]].has_shape:
        return None
    rank = len(r.values[n.inputs[0]].shape)
    given: Any = attributes(n).get("axes")
    if present(n, 1):
        constant = r.constant(n.inputs[1])
        if constant is None:
            return None
        given = tuple(int(a) for a in constant.reshape(-1))
    if not given:
        given = () if attributes(n).get("noop_with_empty_axes") else tuple(range(rank))
    if any(not -rank <= a < rank for a in given):
        return None
    return tuple(sorted(a % rank for a in given)), bool(attributes(n).get("keepdims", 1))


def opset(r: Rewrite) -> int:
    """The version of ONNX's own operators that the graph is written in."""
    header = r.source.header
    return next((v for d, v in header.opsets if not d), 1) if header is not None else 1


def raised(r: Rewrite, to: int) -> bool:
    """Make it a graph of opset `to` or a later one. False where an operator of it has changed between the two."""
    header = r.source.header
    now = opset(r)
    if now >= to:
        return True
    if header is None or now < RAISED_FROM:
        return False
    for n in r.live():
        op = n.op
        if not isinstance(op, OnnxOp) or (not op.domain and (
                op.name not in (*STABLE, *REDUCERS, "ReduceSum") or _changes(r, n, now, to))):
            return False
    if now < 18 <= to:
        for n, own in each(r, *REDUCERS, all_=True):
            rest = {k: v for k, v in own.items() if k != "axes"}
            if "axes" in own:
                axes = r.add_constant(f"{title(n)}_axes", np.array(own["axes"], np.int64))
                r.change(n, inputs=(n.inputs[0], axes), attributes=rest)
        for n, own in each(r, "Split", all_=True):
            if len(n.inputs) < 2 and "num_outputs" not in own:
                r.change(n, attributes={**own, "num_outputs": len(n.outputs)})
    import onnx

    shell = onnx.ModelProto.FromString(header.shell)
    for o in shell.opset_import:
        o.version = o.version if o.domain else to
    opsets = tuple((o.domain, o.version) for o in shell.opset_import)
    r.source = replace(r.source, header=replace(header, opsets=opsets, shell=shell.SerializeToString()))
    return True


def _changes(r: Rewrite, n: Node, now: int, to: int) -> bool:
    """Whether a node means something else, or nothing, in the later opset."""
    own = attributes(n)
    if n.op.name in ("AveragePool", "MaxPool") and own.get("ceil_mode"):
        return now < 19 <= to  # windows that begin in the padding at the end are left out since
    if n.op.name == "Resize":
        return now < 19 <= to and "tf_half_pixel_for_nn" in str(own.get("coordinate_transformation_mode"))
    if n.op.name == "Split" and now < 18 <= to and len(n.inputs) < 2:
        return len({r.values[v].shape for v in n.outputs if v >= 0}) > 1
    return False
