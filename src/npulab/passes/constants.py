"""What constants alone decide, decided."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npulab.ir.ops import OnnxOp, captures
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

ELEMENTS_MAX = 1 << 20
"""Of a folded result: larger ones would make the file larger than the graph is worth."""
TOTAL_MAX = 1 << 23
"""Elements of all results of one run."""
HEAVY = frozenset({
    "Conv", "ConvTranspose", "ConvInteger", "DeformConv", "MaxPool", "AveragePool", "LpPool", "MaxRoiPool", "RoiAlign",
    "Resize", "Upsample", "GridSample", "Einsum", "LSTM", "GRU", "RNN", "Loop", "Scan", "If", "SequenceMap", "DFT",
    "STFT", "NonMaxSuppression", "RegexFullMatch", "StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique",
    "ImageDecoder", "Attention", "Det",
})
"""Operators that the evaluator runs in Python, element by element, or whose work their sizes do not bound."""
KEEPING = frozenset({
    "Abs", "Cast", "Ceil", "Clip", "Exp", "Flatten", "Floor", "Identity", "Log", "Neg", "Not", "Reciprocal", "Reshape",
    "Round", "Shape", "Sign", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Tanh", "Transpose", "Unsqueeze",
})
"""Operators whose result has no more elements than their first input."""
INT64 = 7
"""Of TensorProto.DataType."""
RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli",
          "Dropout")


def fold(r: Rewrite) -> list[str]:
    """A node that reads only constants becomes its result, of at most a million elements, and so does the Shape or Size
    of a tensor of fixed size. Evaluated by ONNX's own reference evaluator; random numbers and bodies are left alone."""
    done = []
    total = 0
    for n in r.live():
        op = n.op
        if not isinstance(op, OnnxOp) or op.domain or op.name in RANDOM or captures(op) or len(n.outputs) != 1:
            continue
        result = r.values[n.outputs[0]]
        source = r.values[n.inputs[0]] if n.inputs and n.inputs[0] >= 0 else None
        found: np.ndarray | None = None
        if op.name in ("Shape", "Size") and source is not None and source.has_shape and not source.dynamic_axes:
            shape = np.array(source.shape, np.int64)
            found = shape.prod() if op.name == "Size" else shape[_part(op)]
        elif n.inputs and all(v < 0 or r.constant(v) is not None for v in n.inputs):
            found = _evaluated(r, n.inputs, op, n.outputs[0])
        if found is None or found.size > ELEMENTS_MAX or result.index in r.outputs:
            continue
        total += found.size
        if total > TOTAL_MAX:
            break
        r.substitute(result.index, r.add_constant(result.name, np.asarray(found)))
        done.append(f"{n.name or op.name}: {op.name} of constants")
    return done


def _part(op: OnnxOp) -> slice:
    start, end = op.attributes.get("start", 0), op.attributes.get("end")
    assert isinstance(start, int)
    assert end is None or isinstance(end, int)
    return slice(start, end)


def _evaluated(r: Rewrite, inputs: tuple[int, ...], op: OnnxOp, out: int) -> np.ndarray | None:
    """The result, or None where the evaluator has no such operator or does not like its operands."""
    if op.name in HEAVY or max(_size_of(r, inputs, op), _size_of_result(r, inputs, op, out)) > ELEMENTS_MAX:
        return None
    given = [r.constant(v) for v in inputs if v >= 0]
    if len(given) == len(inputs) and all(x is not None and x.dtype == np.int64 for x in given):
        try:
            plain = _of_shapes(op, [x for x in given if x is not None])
        except (ValueError, IndexError, TypeError, KeyError, MemoryError):  # the evaluator may know better
            plain = None
        if plain is not None:
            return np.array(plain, np.int64, order="C")
    import onnx
    from onnx.reference import ReferenceEvaluator

    from npulab.exporters.onnx import attribute

    header = r.source.header
    assert header is not None
    node = onnx.NodeProto(op_type=op.name, output=["y"])
    node.input.extend("" if v < 0 else f"x{i}" for i, v in enumerate(inputs))
    node.attribute.extend(attribute(name, value) for name, value in op.attributes.items())
    feeds = {f"x{i}": r.constant(v) for i, v in enumerate(inputs) if v >= 0}
    graph = onnx.helper.make_graph([node], "one", [onnx.ValueInfoProto(name=name) for name in feeds],
                                   [onnx.ValueInfoProto(name="y")])
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in header.opsets if not domain]
    try:
        (found,) = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets)).run(None, feeds)
    except Exception:  # it raises what it likes; the node then stays as it is
        return None
    return found if isinstance(found, np.ndarray) else None


def _of_shapes(op: OnnxOp, given: list[np.ndarray]) -> np.ndarray | None:
    """What exporters compute of shapes and pads, in NumPy as the evaluator does: importing that takes 8 MiB."""
    x = given[0]
    a: dict[str, Any] = dict(op.attributes)
    match op.name, len(given):
        case "Cast", 1 if a.get("to") == INT64:
            return x
        case "Concat", _:
            return np.concatenate(given, a["axis"])
        case "ConstantOfShape", 1 if isinstance(a.get("value"), np.ndarray):
            value = np.asarray(a["value"])
            return np.full(x, value.reshape(-1)[0]) if value.dtype == np.int64 and value.size == 1 else None
        case "Gather", 2:
            return np.take(x, given[1], a.get("axis", 0))
        case "Reshape", 2 if not a.get("allowzero"):
            return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(given[1].tolist())])
        case "Slice", 4 | 5:
            cuts = [slice(None)] * x.ndim
            steps = given[4].tolist() if len(given) == 5 else [1] * len(given[1])
            for first, end, axis, step in zip(*(g.tolist() for g in given[1:4]), steps, strict=True):
                cuts[axis] = slice(first, end, step)
            return x[tuple(cuts)]
        case "Transpose", 1:
            return x.transpose(a.get("perm"))
        case "Unsqueeze", 2:
            return np.expand_dims(x, tuple(given[1].tolist()))
    return None


def _size_of_result(r: Rewrite, inputs: tuple[int, ...], op: OnnxOp, out: int) -> int:
    """Elements of the result by its inferred shape; without one, the most that its inputs can make together."""
    value = r.values[out]
    if value.has_shape and not value.dynamic_axes:
        return value.elements
    sizes = [r.values[v].elements for v in inputs if v >= 0]
    return sum(sizes) if op.name == "Concat" else max(sizes[:1], default=0) if op.name in KEEPING else math.prod(sizes)


def _size_of(r: Rewrite, inputs: tuple[int, ...], op: OnnxOp) -> int:
    """Elements that the node would make, as far as that shows beforehand: a bound on memory for hostile files."""
    if op.name in ("ConstantOfShape", "Expand", "Tile", "Resize", "Upsample", "Pad", "OneHot", "Range"):
        largest = 1.0
        for v in inputs:
            c = r.constant(v)
            if c is not None and np.issubdtype(c.dtype, np.number) and 0 < c.size <= 32:
                largest = max(largest, float(np.prod(np.maximum(np.abs(c.astype(np.float64)), 1))))
        return int(min(largest * max(r.values[inputs[0]].elements, 1), 2**62)) if op.name != "ConstantOfShape" \
            else int(min(largest, 2**62))
    return max((r.values[v].elements for v in inputs if v >= 0), default=0)


PASS = Pass("constants", fold)
