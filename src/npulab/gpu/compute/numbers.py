"""What the floats of a network are stored as, in its file and between layers.

Passes, and what finds groups, know float32 alone. A network of float16 is widened for them: every number that float16
has float32 has, too. What was float16 is known by its name afterwards, and is stored so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.gpu.compute.types import Number
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import OnnxOp

LARGEST = float(np.finfo(np.float16).max)
_KINDS: dict[DType, Number] = {DType.FLOAT32: "float32", DType.FLOAT16: "float16"}
_CODES = {DType.FLOAT32: 1, DType.FLOAT16: 10}
"""As ONNX numbers types (TensorProto.DataType)."""
_TYPED = ("to", "dtype", "output_dtype")
"""Attributes that name a type."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """border: of inputs and outputs, by name.    between: of values that are computed. What is not there is float32."""

    border: Mapping[str, Number] = field(default_factory=dict)
    between: Mapping[int, Number] = field(default_factory=dict)


def numbers_of(graph: Graph, names: Mapping[str, Number], asked: Number | None = None) -> Numbers:
    """`names`: of the values of the file; what passes made is stored as what it is made of. `asked`: what is stored
    between inputs and outputs, whatever the file says."""
    border = {v.name: names[v.name] for v in (graph.values[i] for i in (*graph.inputs, *graph.outputs))
              if v.name in names}
    found: dict[int, Number] = {i: names.get(graph.values[i].name, "float32") for i in graph.inputs}
    for n in graph.nodes:
        made: Number = "float16" if any(found.get(v) == "float16" for v in n.inputs) else "float32"
        for v in (graph.values[i] for i in n.outputs if i >= 0):
            found[v.index] = asked or ("float16" if v.dtype is DType.FLOAT16 else names.get(v.name, made))
    return Numbers(border, found)


def widened(graph: Graph) -> tuple[Graph, dict[str, Number]]:
    """The ONNX graph with float32 in place of float16, and what its floats were, by name. A Cast between the two rounds
    to float16 and goes back to float32: its middle is the one float16 that is left."""
    names = {v.name: _KINDS[v.dtype] for v in graph.values if v.dtype in _KINDS}
    if "float16" not in names.values():
        return graph, names
    values = [_wide(v) for v in graph.values]
    nodes: list[Node] = []
    fresh = (name for k in count() if (name := f"rounded_{k}") not in names)
    for n in graph.nodes:
        kinds = {graph.values[v].dtype for v in (*n.inputs, *n.outputs) if v >= 0}
        op = n.op
        assert isinstance(op, OnnxOp)
        if op.name == "Cast" and not op.domain and kinds == set(_CODES):
            result = values[n.outputs[0]]
            values.append(replace(result, index=len(values), name=next(fresh), dtype=DType.FLOAT16))
            for source, to in ((n.inputs[0], values[-1]), (values[-1].index, result)):
                cast = replace(op, attributes={**op.attributes, "to": _CODES[to.dtype]})
                nodes.append(replace(n, index=len(nodes), op=cast, inputs=(source,), outputs=(to.index,)))
        else:
            wide = replace(op, attributes={k: _attribute(k, a) for k, a in op.attributes.items()})
            nodes.append(replace(n, index=len(nodes), op=op if op.domain else wide))
    header = graph.header
    assert header is not None
    header = replace(header, types={v: _type(t) for v, t in header.types.items()})
    return replace(graph, values=tuple(values), nodes=tuple(nodes), header=header), names


def fits(array: NDArray[Any]) -> bool:
    """Whether float16 has room for floats: what is not infinite stays so."""
    return array.dtype.kind == "f" and largest(array) <= LARGEST


def largest(array: NDArray[Any]) -> float:
    """Of the sizes of what is finite."""
    return float(np.abs(array).max(initial=0, where=np.isfinite(array)))


def _wide(v: Value) -> Value:
    if v.dtype is not DType.FLOAT16:
        return v
    constant = memoryview(v.array().astype(np.float32).tobytes()) if v.is_constant else None
    return replace(v, dtype=DType.FLOAT32, constant=constant)


def _attribute(name: str, a: object) -> object:
    if name in _TYPED and a == _CODES[DType.FLOAT16]:
        return _CODES[DType.FLOAT32]
    return a.astype(np.float32) if isinstance(a, np.ndarray) and a.dtype == np.float16 else a


def _type(info: bytes) -> bytes:
    """Of a value without a fixed size."""
    import onnx

    found = onnx.ValueInfoProto.FromString(info)
    if found.type.tensor_type.elem_type == _CODES[DType.FLOAT16]:
        found.type.tensor_type.elem_type = _CODES[DType.FLOAT32]
    return bytes(found.SerializeToString(deterministic=True))
