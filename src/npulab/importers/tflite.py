"""TFLite files to the Graph: every operator named, typed and with its attributes; constants stay in the file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from npulab.errors import ModelError
from npulab.formats.flatbuffer import Table
from npulab.formats.tflite import IDENTIFIER, VERSION, options_of, schema
from npulab.ir import DType, Graph, Node, Quantization, Value
from npulab.ir.ops import (
    Activation,
    Add,
    Concat,
    Conv2D,
    Custom,
    DepthwiseConv2D,
    Elementwise,
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
"""Dimensions of one tensor; LiteRT's kernels stop at 8."""
CUSTOM = 32
"""BuiltinOperator CUSTOM: the operator's name is text."""

Shape = tuple[int, ...]


def read_tflite(data: bytes | memoryview, name: str) -> Graph:
    """The main subgraph of a TFLite file, under the name `name`.

    `data` is kept: constants are views of it. An operator that the schema lacks becomes ``Generic("BUILTIN_<code>")``.

    Raises: ModelError for whatever is wrong with the file.
    """
    data = memoryview(data).cast("B").toreadonly()
    if not is_tflite(data):
        found, advice = what_is(data)
        raise ModelError(f"'{name}' is not a TFLite model", want="identifier TFL3 at byte 4", got=found, try_=advice)
    model = Table.root(schema(), "Model", data)
    if (version := model.integer("version")) != VERSION:
        raise ModelError(f"'{name}' has TFLite schema version {version}", want=VERSION,
                         try_="convert the original model with a current converter")
    main = next(model.tables("subgraphs"), None)
    if main is None:
        raise ModelError(f"'{name}' holds no graph", want="1 subgraph or more", got="0")
    codes = [_operator_code(t) for t in model.tables("operator_codes")]
    buffers = Buffers(model, data)
    operators = list(main.tables("operators"))
    computed = {v for t in operators for v in t.numbers("outputs")} | set(main.numbers("inputs"))
    values = tuple(_value(i, t, buffers, i in computed) for i, t in enumerate(main.tables("tensors")))
    subgraphs = model.count("subgraphs")
    nodes = tuple(_node(i, t, codes, values, buffers, subgraphs) for i, t in enumerate(operators))
    signature = next((s for s in model.tables("signature_defs") if s.integer("subgraph_index") == 0), None)
    graph = Graph(
        name, values, nodes, main.numbers("inputs"), main.numbers("outputs"), data, hashlib.sha256(data).hexdigest(),
        "tflite", _signature(signature, "inputs", len(values)), _signature(signature, "outputs", len(values)),
    )
    graph.verify()
    return graph


def is_tflite(data: memoryview) -> bool:
    """Whether the file bears TFLite's identifier."""
    return bytes(data[4:8]) == IDENTIFIER


def is_onnx(data: memoryview) -> bool:
    """Whether the file begins as ONNX's protobuf does: ir_version, then one of the fields 2 to 8 or 14."""
    head = bytes(data[:3])
    return len(head) == 3 and head[0] == 0x08 and 0 < head[1] < 32 and head[2] in b"\x12\x1a\x22\x2a\x32\x3a\x42\x72"


def what_is(data: memoryview) -> tuple[str, str]:
    """(what a file that is no TFLite model looks like, what to do about it), from its first bytes."""
    head = bytes(data[:64])
    for start, found, advice in _KINDS:
        if head.startswith(start):
            return found, advice
    if head[4:8] == b"ORTM":
        return "an ONNX Runtime model", _FROM_ORT
    if not head:
        return "an empty file", _GET_AGAIN
    if len(data) < 8:
        return f"{len(data)} bytes", _GET_AGAIN
    return f"bytes {head[:8].hex(' ')}", "give a .tflite or .onnx file"


_GET_AGAIN = "get the file again"
_FROM_ORT = "give the ONNX file that it was made from"
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file", "git lfs pull"),
    (b"NPULAB\r\n", "a program that npulab compiled", "npulab run FILE.npu"),
    (b"PK\x03\x04", "a zip archive (a Keras or PyTorch model, or packed files)", "unpack it, or convert it to TFLite"),
    (b"\x89HDF", "an HDF5 file (a Keras model)", "convert it to TFLite"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\x89PNG", "a PNG image", "give the model, a .tflite or .onnx file, here"),
    (b"\xff\xd8\xff", "a JPEG image", "give the model, a .tflite or .onnx file, here"),
    (b"<", "a web page or other markup", "download the file itself, not the page about it"),
)


def _operator_code(table: Table) -> tuple[int, str, int]:
    """(builtin code, custom code, version). Old files have the code in a byte, new ones in both places."""
    code = max(table.integer("builtin_code"), table.integer("deprecated_builtin_code"))
    return code, table.text("custom_code") if code == CUSTOM else "", table.integer("version")


def _signature(table: Table | None, field: str, count: int) -> tuple[tuple[str, int], ...]:
    pairs = tuple((t.text("name"), t.integer("tensor_index")) for t in table.tables(field)) if table else ()
    for text, v in pairs:
        if v >= count:
            raise ModelError(f"signature {field[:-1]} {shown(text)} names tensor {v}, which does not exist",
                             want=f"0..{count - 1}")
    return pairs


def shown(name: str) -> str:
    """A name from a file as errors show it: in quotes, short, and without control characters for the terminal."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:100])
    return f"'{plain}{'...' if len(name) > 100 else ''}'"


class Buffers:
    """The bytes that a file holds for its tensors, inside the FlatBuffer or behind it (`offset` and `size`)."""

    def __init__(self, model: Table, data: memoryview) -> None:
        self._data = data
        self._tables = list(model.tables("buffers"))

    def content(self, index: int, who: str) -> memoryview | None:
        """The bytes of buffer `index`, or None if it holds none; as LiteRT, `data` goes before `offset`.

        Raises: ModelError naming `who` if there is no such buffer or its bytes are not in the file.
        """
        if not index:
            return None  # empty by convention
        if index >= len(self._tables):
            raise ModelError(f"{who} uses buffer {index}, which does not exist", want=f"0..{len(self._tables) - 1}")
        table = self._tables[index]
        if inside := table.view("data"):
            return inside
        return self.behind(table.integer("offset"), table.integer("size"), who)

    def behind(self, offset: int, size: int, who: str) -> memoryview | None:
        """`size` bytes at `offset` of the file, or None if there are none. Offset 1 is a writer's placeholder."""
        if offset <= 1 or not size:
            return None
        if offset + size > len(self._data):
            raise ModelError(f"{who} has its bytes outside the file", got=f"{size} bytes at byte {offset}",
                             want=f"the file's {len(self._data)} bytes", try_="get the file again")
        return self._data[offset : offset + size]


def _value(index: int, table: Table, buffers: Buffers, computed: bool) -> Value:
    """One tensor. `computed` says that an operator or the caller fills it, so that no bytes means no constant."""
    name = table.text("name")
    shape = table.numbers("shape") if table.count("shape") <= RANK_MAX else (-1,)
    if (shape and min(shape) < 0) or math.prod(shape) > ELEMENTS_MAX:
        raise ModelError(f"tensor {index} {shown(name)} has an impossible shape",
                         got=list(table.numbers("shape")[: RANK_MAX + 1]),
                         want=f"at most {RANK_MAX} dimensions, none negative, at most 2**40 elements")
    code = table.integer("type")
    type_name = schema().names["TensorType"].get(code, "")
    if type_name not in DType.__members__:
        raise ModelError(f"tensor {index} {shown(name)} has an element type that npulab does not know",
                         got=type_name or code, want=", ".join(d.value for d in DType))
    signature = table.numbers("shape_signature") if table.count("shape_signature") <= RANK_MAX else (-1,) * 99
    if signature and len(signature) != len(shape):
        raise ModelError(f"tensor {index} {shown(name)} has a shape signature of another rank than its shape",
                         want=f"{len(shape)} dimensions", got=table.count("shape_signature"))
    constant = buffers.content(table.integer("buffer"), f"tensor {index} {shown(name)}")
    if constant is None and table.integer("external_buffer"):
        raise ModelError(f"tensor {index} {shown(name)} keeps its bytes in another file",
                         got=f"external buffer {table.integer('external_buffer')}",
                         try_="convert the model to a single file")
    is_variable = bool(table.number("is_variable"))
    if constant is None and 0 in shape and not computed and not is_variable:
        constant = memoryview(b"")  # a constant without elements, such as the axes of nothing
    return Value(index, name, shape, DType[type_name], _quantization(table, f"tensor {index} {shown(name)}"), constant,
                 is_variable, tuple(i for i, n in enumerate(signature) if n < 0))


def _quantization(tensor: Table, who: str) -> Quantization | None:
    """None also where a scale is zero, infinite or no number: such tensors exist and are never computed with."""
    q = tensor.table("quantization")
    scales = q.numbers("scale") if q else ()
    if q is None or not scales or not all(0 < s < math.inf for s in scales):
        return None
    zeros = q.numbers("zero_point") or (0,)
    if any(not -(2**31) <= z < 2**31 for z in zeros):
        raise ModelError(f"{who} has a zero point that no element type holds", got=max(zeros, key=abs), want="32 bits")
    if len(zeros) == 1:
        zeros *= len(scales)
    if len(zeros) != len(scales):
        raise ModelError(f"{who} has {len(scales)} scales and {len(zeros)} zero points",
                         want="as many zero points as scales, or one, or none")
    return Quantization(scales, zeros, q.integer("quantized_dimension"))


def _node(index: int, table: Table, codes: list[tuple[int, str, int]], values: tuple[Value, ...], buffers: Buffers,
          subgraphs: int) -> Node:
    which = table.integer("opcode_index")
    if which >= len(codes):
        raise ModelError(f"node {index} has operator code {which}, which does not exist", want=f"0..{len(codes) - 1}")
    code, custom, version = codes[which]
    inputs, outputs = table.numbers("inputs"), table.numbers("outputs")
    if code == CUSTOM:
        op: Op = Custom(custom, _custom_options(table, buffers, f"{shown(custom)} (node {index})"))
    else:
        name = schema().names["BuiltinOperator"].get(code, f"BUILTIN_{code}")
        if make := _RECORDS.get(name):
            shapes = [values[v].shape if 0 <= v < len(values) else () for v in inputs[:2]]
            op = make(_options(name, index, table), shapes)
        elif name in _FUNCTIONS:
            op = Elementwise(name)
        else:
            op = _generic(name, index, table, subgraphs)
    return Node(index, op, inputs, outputs, version)


def _custom_options(table: Table, buffers: Buffers, who: str) -> bytes:
    inside = table.view("custom_options")
    if not inside:
        offset, size = table.integer("large_custom_options_offset"), table.integer("large_custom_options_size")
        inside = buffers.behind(offset, size, who)
    return bytes(inside or b"")


def _generic(name: str, index: int, table: Table, subgraphs: int) -> Generic:
    options = table.union("builtin_options") or table.union("builtin_options_2")
    if options is None:
        return Generic(name, {})
    attributes = {field: options.value(field) for field in schema().tables[options.name]}
    called = tuple(v for field, value in attributes.items() if _names_subgraph(field)
                   for v in (value if isinstance(value, tuple) else (cast(int, value),)))
    for v in called:
        if not 0 <= v < subgraphs:
            raise ModelError(f"{name} (node {index}) calls subgraph {v}, which does not exist",
                             want=f"0..{subgraphs - 1}")
    return Generic(name, attributes, called)


def _names_subgraph(field: str) -> bool:
    return field.endswith(("subgraph", "subgraph_index", "subgraph_indices")) or field == "called_computations"


@dataclass(frozen=True, slots=True)
class _Options:
    """The options of a builtin operator that has a record: those of the file, or else the schema's defaults."""

    node: str
    table: Table | None
    defaults: Mapping[str, int | float]

    def integer(self, name: str) -> int:
        return self.table.integer(name) if self.table else int(self.defaults[name])

    def number(self, name: str) -> float:
        return float(self.table.number(name) if self.table else self.defaults[name])

    def pair(self, high: str, wide: str) -> tuple[int, int]:
        """(height, width) of what must be at least 1, such as a stride.

        Raises: ModelError naming the operator if one of them is not.
        """
        pair = self.integer(high), self.integer(wide)
        if min(pair) < 1:
            raise ModelError(f"{self.node} has {high} {pair[0]} and {wide} {pair[1]}", want="at least 1")
        return pair

    @property
    def stride(self) -> tuple[int, int]:
        return self.pair("stride_h", "stride_w")

    @property
    def dilation(self) -> tuple[int, int]:
        return self.pair("dilation_h_factor", "dilation_w_factor")

    @property
    def padding(self) -> Padding:
        return cast(Padding, self.table.choice("padding") if self.table else "same")

    @property
    def activation(self) -> Activation:
        return cast(Activation, self.table.choice("fused_activation_function") if self.table else "none")


def _options(name: str, index: int, table: Table) -> _Options:
    place = options_of(name)
    assert place is not None, name
    node = f"{name} (node {index})"
    options = table.union("builtin_options") or table.union("builtin_options_2")
    if options is not None and options.name != place[1]:
        raise ModelError(f"{node} has the options of another operator", want=place[1], got=options.name)
    return _Options(node, options, {f.name: f.default for f in schema().tables[place[1]].values()})


def _depthwise(o: _Options, shapes: list[Shape]) -> Op:
    """The multiplier follows from the shapes where they allow: the option is 0 in some files, and LiteRT ignores it."""
    multiplier = o.integer("depth_multiplier")
    match shapes:
        case [(_, _, _, channels), (_, _, _, outputs)] if channels and outputs and outputs % channels == 0:
            multiplier = outputs // channels
    return DepthwiseConv2D(o.stride, o.dilation, o.padding, o.activation, multiplier)


def _pool(kind: Literal["average", "max"]) -> Callable[[_Options, list[Shape]], Op]:
    return lambda o, _: Pool2D(kind, o.pair("filter_height", "filter_width"), o.stride, o.padding, o.activation)


def _mirror_pad(o: _Options, _: list[Shape]) -> Op:
    return Pad(False, cast(Literal["reflect", "symmetric"], o.table.choice("mode") if o.table else "reflect"))


_FUNCTIONS = ("ABS", "ELU", "HARD_SWISH", "LOGISTIC", "RELU", "RELU6", "RELU_N1_TO_1", "TANH")
"""Functions of one number, without options."""

_RECORDS: dict[str, Callable[[_Options, list[Shape]], Op]] = {
    "CONV_2D": lambda o, _: Conv2D(o.stride, o.dilation, o.padding, o.activation),
    "DEPTHWISE_CONV_2D": _depthwise,
    "FULLY_CONNECTED": lambda o, _: FullyConnected(o.activation, bool(o.integer("keep_num_dims"))),
    "AVERAGE_POOL_2D": _pool("average"),
    "MAX_POOL_2D": _pool("max"),
    "ADD": lambda o, _: Add(o.activation),
    "CONCATENATION": lambda o, _: Concat(o.integer("axis"), o.activation),
    "SPLIT": lambda o, _: Split(o.integer("num_splits")),
    "PAD": lambda _o, _: Pad(False, "constant"),
    "PADV2": lambda _o, _: Pad(True, "constant"),
    "MIRROR_PAD": _mirror_pad,
    "RESHAPE": lambda _o, _: Reshape("RESHAPE"),
    "SQUEEZE": lambda _o, _: Reshape("SQUEEZE"),
    "EXPAND_DIMS": lambda _o, _: Reshape("EXPAND_DIMS"),
    "MEAN": lambda o, _: Mean(bool(o.integer("keep_dims"))),
    "SOFTMAX": lambda o, _: Softmax(o.number("beta")),
    "LEAKY_RELU": lambda o, _: Elementwise("LEAKY_RELU", o.number("alpha")),
}
