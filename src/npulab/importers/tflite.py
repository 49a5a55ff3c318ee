"""TFLite files to the Graph: every operator named, typed and with its attributes; constants stay in the file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal, cast

from npulab.errors import ModelError
from npulab.formats.flatbuffer import Table
from npulab.formats.tflite import schema
from npulab.ir import DType, Graph, Node, Quantization, Value
from npulab.ir.ops import (
    Activation,
    Add,
    Concat,
    Conv2D,
    Custom,
    DepthwiseConv2D,
    FullyConnected,
    Generic,
    Mean,
    Op,
    Pad,
    Padding,
    Pool2D,
    Reshape,
    Softmax,
    Split,
)

ELEMENTS_MAX = 2**40
"""Elements of one tensor: far beyond any device, and products of shapes stay small numbers."""
RANK_MAX = 32
CUSTOM = 32
"""BuiltinOperator CUSTOM: the operator's name is text."""


def read_tflite(data: bytes | memoryview, name: str) -> Graph:
    """The main subgraph of a TFLite file.

    `data` is kept: constants are views of it. Raises ModelError for whatever is wrong with the file.
    """
    data = memoryview(data)
    model = Table.root(schema(), "Model", data)
    version = model.integer("version")
    if version != 3:
        raise ModelError(f"'{name}' has TFLite schema version {version}", want="3")
    codes = [_operator_code(t) for t in model.tables("operator_codes")]
    buffers = _Buffers(model, data)
    subgraph = next(model.tables("subgraphs"), None)
    if subgraph is None:
        raise ModelError(f"'{name}' has no subgraph")
    values = tuple(_value(i, t, buffers) for i, t in enumerate(subgraph.tables("tensors")))
    nodes = tuple(_node(i, t, codes, values, data) for i, t in enumerate(subgraph.tables("operators")))
    signatures = [s for s in model.tables("signature_defs") if s.integer("subgraph_index") == 0]
    graph = Graph(
        name, values, nodes, _indices(subgraph, "inputs"), _indices(subgraph, "outputs"), data,
        hashlib.sha256(data).hexdigest(), "tflite",
        _signature(signatures[0], "inputs", len(values)) if signatures else (),
        _signature(signatures[0], "outputs", len(values)) if signatures else (),
    )
    graph.verify()
    return graph


def _indices(table: Table, name: str) -> tuple[int, ...]:
    return tuple(int(v) for v in table.numbers(name) or ())


def _signature(table: Table, name: str, count: int) -> tuple[tuple[str, int], ...]:
    pairs = ((t.text("name"), t.integer("tensor_index")) for t in table.tables(name))
    return tuple((text, v) for text, v in pairs if v < count)


def _operator_code(table: Table) -> tuple[int, str]:
    """(builtin code, custom code). Old files have the code in a byte, new ones in both places or the wide one."""
    code = max(table.integer("builtin_code"), table.integer("deprecated_builtin_code"))
    return code, table.text("custom_code")


class _Buffers:
    """The file's buffers, inside the FlatBuffer or behind it (`offset` and `size`)."""

    def __init__(self, model: Table, data: memoryview) -> None:
        self.data = data
        self.tables = list(model.tables("buffers"))

    def constant(self, index: int, name: str) -> memoryview | None:
        """The bytes of buffer `index`, or None where it holds nothing."""
        if not index:
            return None  # buffer 0 is empty by convention
        if index >= len(self.tables):
            raise ModelError(f"tensor '{name}' uses buffer {index}, which does not exist",
                             want=f"0..{len(self.tables) - 1}")
        table = self.tables[index]
        offset, size = table.integer("offset"), table.integer("size")
        if offset > 1:  # 0 is absent, 1 was a placeholder of writers
            if offset + size > len(self.data):
                raise ModelError(f"tensor '{name}' has its bytes outside the file",
                                 got=f"{size} bytes at {offset} of {len(self.data)}", try_="get the file again")
            return self.data[offset : offset + size] if size else None
        inside = table.bytes("data")
        return inside if inside is not None and len(inside) else None


def _value(index: int, table: Table, buffers: _Buffers) -> Value:
    name = table.text("name")
    shape = tuple(int(n) for n in table.numbers("shape") or ())
    if len(shape) > RANK_MAX or any(n < 0 for n in shape) or math.prod(shape) > ELEMENTS_MAX:
        raise ModelError(f"tensor '{name}' has an impossible shape", got=str(list(shape))[:80],
                         want=f"at most {RANK_MAX} dimensions of 0 or more, at most 2**40 elements")
    code = table.integer("type")
    type_name = schema().names["TensorType"].get(code)
    if type_name is None or type_name not in DType.__members__:
        raise ModelError(f"tensor '{name}' has element type {type_name or code}, which npulab does not know")
    signature = table.numbers("shape_signature") or ()
    dynamic = tuple(i for i, n in enumerate(signature) if n < 0)
    return Value(index, name, shape, DType[type_name], _quantization(table, name),
                 buffers.constant(table.integer("buffer"), name), bool(table.number("is_variable")), dynamic)


def _quantization(tensor: Table, name: str) -> Quantization | None:
    q = tensor.table("quantization")
    if q is None:
        return None
    scales = q.numbers("scale") or []
    if not scales or not all(math.isfinite(s) and s > 0 for s in scales):
        return None
    zeros = [int(z) for z in q.numbers("zero_point") or ()] or [0]
    if len(zeros) == 1:
        zeros *= len(scales)
    if len(zeros) != len(scales):
        raise ModelError(f"tensor '{name}' has {len(scales)} scales and {len(zeros)} zero points")
    return Quantization(tuple(scales), tuple(zeros), q.integer("quantized_dimension"))


def _node(index: int, table: Table, codes: list[tuple[int, str]], values: tuple[Value, ...], data: memoryview) -> Node:
    which = table.integer("opcode_index")
    if which >= len(codes):
        raise ModelError(f"node {index} has operator code {which}, which does not exist", want=f"0..{len(codes) - 1}")
    code, custom = codes[which]
    inputs, outputs = _indices(table, "inputs"), _indices(table, "outputs")
    if code == CUSTOM:
        return Node(index, Custom(custom, _custom_options(table, data)), inputs, outputs)
    name = schema().names["BuiltinOperator"].get(code, f"BUILTIN_{code}")
    options = _options(table)
    shapes = [values[v].shape if 0 <= v < len(values) else () for v in inputs]
    return Node(index, _RECORDS.get(name, _generic)(name, _Options(options), shapes), inputs, outputs)


def _custom_options(table: Table, data: memoryview) -> bytes:
    offset, size = table.integer("large_custom_options_offset"), table.integer("large_custom_options_size")
    if offset > 1:
        if offset + size > len(data):
            raise ModelError("custom options lie outside the file", got=f"{size} bytes at {offset} of {len(data)}")
        return bytes(data[offset : offset + size])
    return bytes(table.bytes("custom_options") or b"")


def _options(table: Table) -> dict[str, object]:
    """The options of an operator by field name, of either union, defaults included."""
    for union, enum in (("builtin_options", "BuiltinOptions"), ("builtin_options_2", "BuiltinOptions2")):
        member = schema().names[enum].get(table.integer(f"{union}_type"), "NONE")
        if member in schema().tables:
            inner = table.table(union, member)
            fields = schema().tables[member]
            if inner is not None:
                return {name: inner.value(name) for name in fields}
    return {}


class _Options:
    """Options read with the type that a record wants."""

    def __init__(self, options: dict[str, object]) -> None:
        self.all = options

    def integer(self, name: str, default: int = 0) -> int:
        return int(cast(int, self.all.get(name, default)))

    def pair(self, name: str, default: int = 0) -> tuple[int, int]:
        """(height, width) of a pair of options whose names end so."""
        high, wide = name.replace("?", "h"), name.replace("?", "w")
        return self.integer(high, default), self.integer(wide, default)

    @property
    def padding(self) -> Padding:
        return "valid" if self.all.get("padding") == "valid" else "same"

    @property
    def activation(self) -> Activation:
        return cast(Activation, self.all.get("fused_activation_function", "none"))


def _generic(name: str, o: _Options, _shapes: list[tuple[int, ...]]) -> Op:
    called = [v for k, v in o.all.items() if k.endswith(("subgraph_index", "subgraph")) and isinstance(v, int)]
    called += [i for k, v in o.all.items() if k.endswith("subgraph_indices") and isinstance(v, tuple) for i in v]
    return Generic(name, o.all, tuple(called))


def _depthwise(_name: str, o: _Options, shapes: list[tuple[int, ...]]) -> Op:
    multiplier = o.integer("depth_multiplier", 1)
    if len(shapes) > 1 and len(shapes[0]) == 4 and shapes[0][3] and shapes[1]:
        multiplier = shapes[1][-1] // shapes[0][3]  # the option is wrong in some files; the shapes cannot be
    return DepthwiseConv2D(o.pair("stride_?"), o.pair("dilation_?_factor", 1), o.padding, o.activation, multiplier)


def _pool(kind: Literal["average", "max"]) -> Callable[[str, _Options, Any], Op]:
    def make(_name: str, o: _Options, _shapes: Any) -> Op:
        window = o.integer("filter_height"), o.integer("filter_width")
        return Pool2D(kind, window, o.pair("stride_?"), o.padding, o.activation)

    return make


_RECORDS: dict[str, Callable[[str, _Options, list[tuple[int, ...]]], Op]] = {
    "CONV_2D": lambda _n, o, _s: Conv2D(o.pair("stride_?"), o.pair("dilation_?_factor", 1), o.padding, o.activation),
    "DEPTHWISE_CONV_2D": _depthwise,
    "FULLY_CONNECTED": lambda _n, o, _s: FullyConnected(o.activation, bool(o.all.get("keep_num_dims"))),
    "AVERAGE_POOL_2D": _pool("average"),
    "MAX_POOL_2D": _pool("max"),
    "ADD": lambda _n, o, _s: Add(o.activation),
    "CONCATENATION": lambda _n, o, _s: Concat(o.integer("axis"), o.activation),
    "SPLIT": lambda _n, o, _s: Split(o.integer("num_splits")),
    "PAD": lambda _n, _o, _s: Pad(False, "constant"),
    "PADV2": lambda _n, _o, _s: Pad(True, "constant"),
    "MIRROR_PAD": lambda _n, o, _s: Pad(False, "symmetric" if o.all.get("mode") == "symmetric" else "reflect"),
    "RESHAPE": lambda n, _o, _s: Reshape(n),
    "SQUEEZE": lambda n, _o, _s: Reshape(n),
    "EXPAND_DIMS": lambda n, _o, _s: Reshape(n),
    "MEAN": lambda _n, o, _s: Mean(bool(o.all.get("keep_dims"))),
    "SOFTMAX": lambda _n, o, _s: Softmax(float(cast(float, o.all.get("beta", 0.0)))),
}
