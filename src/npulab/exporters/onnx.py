"""Graphs to ONNX files: what `npulab.importers.onnx` read, and what passes made of it."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from npulab.errors import CapacityError, UnsupportedError
from npulab.importers.onnx import _DTYPES, SIZE_MAX, graph_of
from npulab.importers.onnx_parts import LARGE, Thin
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import Embedded, OnnxOp

if TYPE_CHECKING:
    import onnx

CODES = {dtype: code for code, dtype in _DTYPES.items()}
IR_WITH_FREE_CONSTANTS = 4
"""IR version from which constants need not be inputs too. Source: ONNX's IR specification."""


def to_onnx(graph: Graph, shapes: bool = True) -> bytes:
    """The graph as an ONNX file, weights inside. The same graph gives the same bytes. `shapes`: those inside it too.

    Raises: UnsupportedError if the graph did not come from an ONNX file; CapacityError from 2 GiB on.
    """
    return bytes(to_thin(graph, shapes))


def to_view(graph: Graph, shapes: bool = True) -> memoryview:
    """The same bytes, in a file without a name if they are many."""
    return to_thin(graph, shapes).file()


def to_thin(graph: Graph, shapes: bool = True, without: Collection[int] = ()) -> Thin:
    """The same as a message whose large constants are the graph's own, but for the constants `without`, which something
    else is to take the place of."""
    import onnx

    if graph.header is None:
        raise UnsupportedError(f"'{graph.name}' did not come from an ONNX file", got=graph.format, want="onnx")
    proto: onnx.ModelProto = onnx.ModelProto.FromString(graph.header.shell)
    proto.ir_version = max(proto.ir_version, IR_WITH_FREE_CONSTANTS)
    constants = [v for v in graph.values if v.is_constant]
    if sum(len(v.constant or b"") for v in constants) > SIZE_MAX:
        raise CapacityError(f"'{graph.name}' does not fit one ONNX file", want="less than 2 GiB of weights")
    proto.graph.name = proto.graph.name or graph.name
    proto.graph.node.extend(_node(graph, n) for n in graph.nodes)
    made = Thin(proto)
    for v in constants:
        if v.index in without:
            continue
        if v.constant is not None and len(v.constant) >= LARGE and v.dtype is not DType.STRING:
            made.later(v.name, v.shape, CODES[v.dtype], len(v.constant), partial(_same, v.constant))
        else:
            _put_tensor(proto.graph.initializer.add(), v)
    proto.graph.input.extend(_info(graph, v) for v in graph.header.declared if v not in without)
    proto.graph.output.extend(_info(graph, v) for v in graph.outputs)
    border = {*graph.header.declared, *graph.outputs}
    proto.graph.value_info.extend(_info(graph, v.index) for v in graph.values
                                  if shapes and v.index not in border and not v.is_constant and v.has_shape)
    return made


def _same(content: memoryview) -> memoryview:
    return content


def reread(graph: Graph) -> Graph:
    """The graph as reading what `to_onnx` writes would give it: shapes inferred anew. Its constants stay where they
    are, and its source and digest are those of the file that it came from.

    Raises: as `to_onnx`; ModelError if shapes do not fit.
    """
    made = to_thin(graph, shapes=False)
    large = {name: memoryview(make()) for name, (_, make) in made.contents.items()}
    return graph_of(made.proto, graph.name, large, graph.source, graph.digest)


def _node(graph: Graph, node: Node) -> onnx.NodeProto:
    import onnx

    op = node.op
    if not isinstance(op, OnnxOp):
        raise UnsupportedError(f"{node} of '{graph.name}' is no ONNX operator")
    made = onnx.NodeProto(op_type=op.name, domain=op.domain, name=node.name)
    made.input.extend(graph.values[v].name if v >= 0 else "" for v in node.inputs)
    made.output.extend(graph.values[v].name if v >= 0 else "" for v in node.outputs)
    made.attribute.extend(attribute(name, value) for name, value in op.attributes.items())
    return made


def attribute(name: str, value: object) -> onnx.AttributeProto:
    """An attribute of a node. Raises UnsupportedError for a value that ONNX does not have."""
    from onnx import AttributeProto, numpy_helper

    made = AttributeProto(name=name)
    match value:
        case Embedded(data, _):
            made.ParseFromString(data)
        case int():
            made.type, made.i = AttributeProto.INT, value
        case float():
            made.type, made.f = AttributeProto.FLOAT, value
        case str() | bytes():
            made.type, made.s = AttributeProto.STRING, _bytes(value)
        case np.ndarray() | np.generic():
            made.type = AttributeProto.TENSOR
            made.t.CopyFrom(numpy_helper.from_array(np.asarray(value)))
        case tuple():
            _sequence(made, value)
        case _:
            raise UnsupportedError(f"attribute '{name}' has a value that ONNX does not have", got=type(value).__name__)
    return made


def _sequence(made: onnx.AttributeProto, values: tuple[Any, ...]) -> None:
    if any(isinstance(v, str | bytes) for v in values):
        made.type = made.STRINGS
        made.strings.extend(_bytes(v) for v in values)
    elif any(isinstance(v, float) for v in values):
        made.type = made.FLOATS
        made.floats.extend(values)
    else:
        made.type = made.INTS
        made.ints.extend(values)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _tensor(v: Value) -> onnx.TensorProto:
    import onnx

    made = onnx.TensorProto()
    _put_tensor(made, v)
    return made


def _put_tensor(made: onnx.TensorProto, v: Value) -> None:
    made.name, made.data_type = v.name, CODES[v.dtype]
    made.dims.extend(v.shape)
    if v.dtype is DType.STRING:
        made.string_data.extend(bytes(v.constant or b"").split(b"\0") if v.elements else [])
    else:
        made.raw_data = bytes(v.constant or b"")


def _info(graph: Graph, index: int) -> onnx.ValueInfoProto:
    """A value's type: as the file had it where npulab's own cannot say it, else made from the value."""
    import onnx

    v = graph.values[index]
    assert graph.header is not None
    if index in graph.header.types:
        stated: onnx.ValueInfoProto = onnx.ValueInfoProto.FromString(graph.header.types[index])
        stated.name = v.name
        return stated
    made = onnx.ValueInfoProto(name=v.name)
    if v.dtype is not DType.UNKNOWN:
        made.type.tensor_type.elem_type = CODES[v.dtype]
        if v.has_shape:
            made.type.tensor_type.shape.dim.extend(onnx.TensorShapeProto.Dimension(dim_value=n) for n in v.shape)
    return made
