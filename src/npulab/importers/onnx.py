"""ONNX files to Graphs: every operator, name and attribute as the file has it.

Parsing, shapes and tensors are the onnx package's. What it does not do is done here: the file is not believed. Sizes
have bounds, weights outside the file are looked for beside it alone, nodes are put in order, and whatever is wrong is
said with the node's name.
"""

from __future__ import annotations

import hashlib
import heapq
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from npulab.errors import ModelError, UsageError
from npulab.importers.onnx_parts import DamagedError, left_out
from npulab.importers.tflite import ELEMENTS_MAX, shown
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.graph import Header
from npulab.ir.ops import Embedded, OnnxOp
from npulab.program.pages import passing

if TYPE_CHECKING:
    import onnx

SIZE_MAX = 2**31 - 1
"""Bytes of a protobuf message, by protobuf itself."""
NODES_MAX = 1_000_000
RANK_MAX = 32
SMALL = 1024
"""Elements of constants that shape inference gets to see: shapes and axes, not weights."""
OUTSIDE_MAX = 2**33
"""Bytes of weights outside the file, each use counted: they are hashed, and copied where a model is written."""
NAME_MAX = 2**16
WORD_MAX = 256
"""Characters of a name, and of an operator, its domain or an attribute's name."""
PROPAGATED_MAX = 2**16
"""Elements of a shape that inference may work out: it holds each as a message."""
SHAPE_MOVES = ("Cast", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze")
"""Operators through which inference follows the content of their first input, besides joints and sums."""
POSITIVE = ("dilations", "group", "kernel_shape", "strides")
"""Attributes of ONNX's own operators that are at least 1. With a group of 0 ONNX Runtime divides by it."""
FILTERS = {"Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3}
"""Convolutions, and which input their filters are."""
DIMENSION_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_. /+*-]*")

_DTYPES = {
    1: DType.FLOAT32, 2: DType.UINT8, 3: DType.INT8, 4: DType.UINT16, 5: DType.INT16, 6: DType.INT32, 7: DType.INT64,
    8: DType.STRING, 9: DType.BOOL, 10: DType.FLOAT16, 11: DType.FLOAT64, 12: DType.UINT32, 13: DType.UINT64,
    14: DType.COMPLEX64, 15: DType.COMPLEX128, 16: DType.BFLOAT16, 21: DType.UINT4, 22: DType.INT4, 26: DType.INT2,
    0: DType.UNKNOWN,
}
"""TensorProto.DataType -> DType; the 8-bit and 4-bit floats are not there."""


def read_onnx(data: bytes | memoryview, name: str, folder: Path | None = None,
              dims: Mapping[str, int] | None = None) -> Graph:
    """The graph of an ONNX file, under the name `name`.

    `folder` is where weights outside the file are looked for. `dims` gives sizes to what is dynamic: by the file's own
    name of a dimension ("height"), or as "INPUT.AXIS" ("images.2"). What is left open along axis 0 is a batch of one;
    other open axes stay dynamic. Constant nodes become constants.

    Raises: ModelError for whatever is wrong with the file; UsageError for a name in `dims` that it does not have.
    """
    source = memoryview(data).cast("B").toreadonly()
    proto, large = _parsed(source, name)
    return graph_of(proto, name, large, source, None, folder, dims)


def graph_of(proto: onnx.ModelProto, name: str, large: Mapping[str, memoryview], source: memoryview,
             digest: str | None, folder: Path | None = None, dims: Mapping[str, int] | None = None) -> Graph:
    """The graph of a message, which is used up. `large`: the content of constants that have none in the message.
    `source`: the file that the graph is of, `digest` of it; None: to be computed. The rest as `read_onnx`.
    """
    graph = proto.graph
    if len(graph.node) > NODES_MAX:
        raise ModelError(f"'{name}' has too many nodes", got=len(graph.node), want=f"at most {NODES_MAX}")
    if graph.sparse_initializer:
        raise ModelError(f"'{name}' has sparse constants", try_="store them dense")
    _bind(proto, name, dict(dims or {}))
    outside = _Outside(folder, name)
    constants: dict[str, onnx.TensorProto] = {}
    for t in graph.initializer:
        if constants.setdefault(t.name, t) is not t:
            raise ModelError(f"'{name}' has two constants called {shown(t.name)}")
    nodes = []
    for n in graph.node:
        if (tensor := _constant(n)) is not None:
            if constants.setdefault(n.output[0], tensor) is not tensor:
                raise ModelError(f"'{name}' writes {shown(n.output[0])} a second time")
        else:
            nodes.append(n)
    for some in (nodes, *(f.node for f in proto.functions)):
        _check_attributes(some, name)
    types = _types(proto, nodes, constants, name)
    values = _Values(name, large)
    declared = []
    for i in graph.input:
        declared.append(values.index(i.name))
        if i.name in constants:
            values.constant(i.name, constants[i.name], outside)
        else:
            values.typed(i.name, types.get(i.name, i))
    for label, t in constants.items():
        values.constant(label, t, outside)
    ordered = _in_order(nodes, {*constants, *(i.name for i in graph.input)}, name)
    for n in ordered:
        for label in n.output:
            if label:
                values.typed(label, types.get(label))
    made = tuple(_node(i, n, values) for i, n in enumerate(ordered))
    outputs = tuple(values.known(o.name, "an output") for o in graph.output)
    for o in graph.output:
        values.typed(o.name, types.get(o.name, o))
    inputs = tuple(values.index(i.name) for i in graph.input if i.name not in constants)
    found = Graph(
        name, tuple(values.all()), made, inputs, outputs, source, digest or outside.digest(source), "onnx",
        header=Header(tuple((o.domain, o.version) for o in proto.opset_import), _shell(proto), tuple(declared),
                      values.infos),
    )
    found.verify()
    for i, (n, node) in enumerate(zip(ordered, made, strict=True)):
        if n.op_type in FILTERS and n.domain in ("", "ai.onnx"):
            _check_groups(_who(n, i), [found.values[v] if v >= 0 else None for v in node.inputs], n, name)
    return found


def _check_groups(who: str, inputs: Sequence[Value | None], n: onnx.NodeProto, model: str) -> None:
    """Raises: ModelError for a convolution whose groups, channels and filters do not go together (ONNX operators,
    Conv: C equals the filters' channels times the groups, which divide the outputs). What is open is not looked at."""
    at = FILTERS[n.op_type]
    data, filters = (inputs[k] if k < len(inputs) else None for k in (0, at))
    if data is None or filters is None or len(data.shape) < 3 or len(filters.shape) < 3 \
            or 1 in data.dynamic_axes or filters.dynamic_axes:
        return
    groups = next((a.i for a in n.attribute if a.name == "group"), 1)
    channels, (first, second) = data.shape[1], filters.shape[:2]
    wanted, whole = (first, first) if n.op_type == "ConvTranspose" else (second * groups, first)
    if channels != wanted or whole % groups:
        raise ModelError(f"{who} of '{model}' has filters for another number of channels, or of groups",
                         got=f"{channels} channels, {groups} groups, filters {'x'.join(map(str, filters.shape))}",
                         want="filters " + ("INxOUT/GROUPSx..., with groups that divide IN"
                                            if n.op_type == "ConvTranspose" else
                                            "OUTxIN/GROUPSx..., with groups that divide IN and OUT"))


def _parsed(data: memoryview, name: str) -> tuple[onnx.ModelProto, dict[str, memoryview]]:
    """The file as a message without large constants, and these by name, as views of the file."""
    try:
        light, initializers, nodes = left_out(data) if len(data) <= SIZE_MAX else (b"", {}, {})
    except DamagedError:
        return parse(data, name), {}
    if not initializers and not nodes:
        return parse(data, name), {}
    proto = parse(light, name)
    graph = proto.graph
    if any(_constant(n) is None or n.attribute[0].name != "value" for n in map(graph.node.__getitem__, nodes)):
        return parse(data, name), {}
    return proto, {**{graph.initializer[i].name: data[at] for i, at in initializers.items()},
                   **{graph.node[i].output[0]: data[at] for i, at in nodes.items()}}


def parse(data: bytes | memoryview, name: str) -> onnx.ModelProto:
    """The file as a message. Raises ModelError if it is none, or has no graph; UsageError without the onnx package."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise UsageError(f"'{name}' is an ONNX model, and the package onnx is not installed",
                         try_="pip install 'npulab[onnx]'") from None
    if len(data) > SIZE_MAX:
        raise ModelError(f"'{name}' is too large for an ONNX file", got=f"{len(data)} bytes", want="less than 2 GiB",
                         try_="store the weights outside the file")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except (DecodeError, ValueError, RecursionError) as e:
        raise ModelError(f"'{name}' is not an ONNX model, or damaged", got=str(e)[:200],
                         try_="get the file again") from None
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.initializer):
        raise ModelError(f"'{name}' is an ONNX model without a graph", try_="get the file again")
    texts = [*_texts(proto.graph), *(o.domain for o in proto.opset_import)]
    if any(isinstance(text, bytes) for text in texts):
        raise ModelError(f"'{name}' has names that are no text", want="UTF-8", try_="get the file again")
    if (longest := max(map(len, texts), default=0)) > NAME_MAX:
        raise ModelError(f"'{name}' has a name of {longest} characters", want=f"at most {NAME_MAX}")
    if (longest := max(map(len, _words(proto.graph)), default=0)) > WORD_MAX:
        raise ModelError(f"'{name}' has an operator or attribute whose name has {longest} characters",
                         want=f"at most {WORD_MAX}")
    return proto


def _texts(graph: onnx.GraphProto) -> Iterator[str | bytes]:
    """Every name in a graph and its bodies. Protobuf gives bytes for what is not UTF-8."""
    yield graph.name
    for n in graph.node:
        yield from (n.op_type, n.domain, n.name, n.overload, *n.input, *n.output)
        for a in n.attribute:
            yield a.name
            for body in (*([a.g] if a.HasField("g") else []), *a.graphs):
                yield from _texts(body)
    for t in graph.initializer:
        yield t.name
        yield from (text for e in t.external_data for text in (e.key, e.value))
    for i in (*graph.input, *graph.output, *graph.value_info):
        yield i.name
        yield from (d.dim_param for d in i.type.tensor_type.shape.dim)


def _words(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of operators, domains and attributes in a graph and its bodies."""
    for n in graph.node:
        yield from (n.op_type, n.domain)
        for a in n.attribute:
            yield a.name
            for body in (*([a.g] if a.HasField("g") else []), *a.graphs):
                yield from _words(body)


def _shell(proto: onnx.ModelProto) -> bytes:
    """The file without what becomes nodes and values, which `proto` loses."""
    for name in ("node", "initializer", "input", "output", "value_info"):
        proto.graph.ClearField(name)
    out: bytes = proto.SerializeToString(deterministic=True)
    return out


# sizes


def _bind(proto: onnx.ModelProto, name: str, dims: dict[str, int]) -> None:
    """Write the sizes that are given into the inputs, and batches of one."""
    constants = {t.name for t in proto.graph.initializer}
    unused = set(dims)
    known = set()
    for size in dims.values():
        if not 1 <= size <= 2**31:
            raise UsageError(f"a dimension of '{name}' cannot be {size}", want="1 or more")
    for i in proto.graph.input:
        if i.name in constants or not i.type.tensor_type.HasField("shape"):
            continue
        for axis, d in enumerate(i.type.tensor_type.shape.dim):
            if d.dim_value > 0:
                continue
            own = f"{i.name}.{axis}"
            param = d.dim_param if DIMENSION_NAME.fullmatch(d.dim_param) else ""
            known |= {own, param} - {""}
            size = dims.get(own, dims.get(param, 1 if axis == 0 else 0))
            unused -= {own, param}
            if size:
                d.dim_value = size
    if unused:
        raise UsageError(f"'{name}' has no dynamic dimension {shown(min(unused))}",
                         want=", ".join(sorted(known)) or "none")


def _types(proto: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto],
           name: str) -> dict[str, onnx.ValueInfoProto]:
    """The types and shapes that the file states or that follow, by name."""
    import onnx
    from onnx.shape_inference import infer_shapes

    light = onnx.ModelProto(ir_version=max(proto.ir_version, 4), opset_import=proto.opset_import,
                            functions=proto.functions)
    light.graph.name = "shapes"
    light.graph.node.extend(nodes)
    light.graph.output.extend(proto.graph.output)
    light.graph.value_info.extend(proto.graph.value_info)
    light.graph.input.extend(i for i in proto.graph.input if i.name not in constants)
    for label, t in constants.items():
        if len(t.dims) <= 1 and _elements(t) <= SMALL and t.data_location != onnx.TensorProto.EXTERNAL:
            small = light.graph.initializer.add()
            small.CopyFrom(t)
            small.name = label
        else:
            light.graph.input.append(onnx.helper.make_tensor_value_info(label, t.data_type, list(t.dims)))
    try:
        graph = infer_shapes(light, data_prop=not grows(light.graph, {})).graph
    except Exception as e:  # the inference is C++: it raises what it likes
        raise ModelError(f"the shapes of '{name}' cannot be inferred", got=str(e).strip()[:300],
                         try_="check the file with onnx.checker") from None
    return {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}


def grows(graph: onnx.GraphProto, outer: Mapping[str, int]) -> bool:
    """Whether constants joined again and again would make shapes of more than PROPAGATED_MAX elements. What other
    operators than those of shapes compute is data, whose content inference does not follow."""
    size = dict(outer) | {t.name: _elements(t) for t in graph.initializer}
    for n in graph.node:
        known = [size.get(i, 0) for i in n.input]
        if n.op_type == "Concat":
            found = sum(known)
            if found > PROPAGATED_MAX:
                return True
        elif n.op_type == "Shape":
            found = RANK_MAX
        elif n.op_type in ("Add", "Div", "Mul", "Sub"):
            found = max(known) if known and all(known) else 0
        else:
            found = known[0] if known and n.op_type in SHAPE_MOVES else 0
        size.update((o, found) for o in n.output)
        for a in n.attribute:
            for body in (*([a.g] if a.HasField("g") else []), *a.graphs):
                if grows(body, size):
                    return True
    return False


def _elements(t: onnx.TensorProto) -> int:
    count = 1
    for n in t.dims:
        count *= n
    return count


# values


class _Values:
    """Values by name, in order of appearance."""

    def __init__(self, model: str, large: Mapping[str, memoryview] | None = None) -> None:
        self.model = model
        self.large = large or {}
        self.infos: dict[int, bytes] = {}
        self._index: dict[str, int] = {}
        self._values: dict[int, Value] = {}

    def index(self, name: str) -> int:
        return self._index.setdefault(name, len(self._index))

    def known(self, name: str, who: str) -> int:
        """The index of a value that must be there."""
        if name not in self._index:
            raise ModelError(f"{who} of '{self.model}' is {shown(name)}, which nothing computes")
        return self._index[name]

    def all(self) -> Iterator[Value]:
        for i in range(len(self._index)):
            yield self._values[i]

    def typed(self, name: str, info: onnx.ValueInfoProto | None) -> None:
        """A computed value."""
        i = self.index(name)
        if i in self._values:
            return
        dtype, shape, dynamic, ranked = DType.UNKNOWN, [], [], False
        if info is not None and info.type.WhichOneof("value") == "tensor_type":
            tensor = info.type.tensor_type
            dtype = _dtype(tensor.elem_type, name)
            ranked = tensor.HasField("shape")
            for axis, d in enumerate(tensor.shape.dim):
                if d.dim_value < 0 or (d.dim_value == 0 and not d.HasField("dim_value")):
                    dynamic.append(axis)
                shape.append(d.dim_value if axis not in dynamic else 1)
            _check_shape(shape, name)
        elif info is not None and info.type.WhichOneof("value"):
            dtype = DType.VARIANT
        if info is not None and (dynamic or dtype is DType.VARIANT):
            self.infos[i] = info.SerializeToString(deterministic=True)
        self._values[i] = Value(i, name, tuple(shape), dtype, dynamic_axes=tuple(dynamic), has_shape=ranked)

    def constant(self, name: str, tensor: onnx.TensorProto, outside: _Outside) -> None:
        i = self.index(name)
        if i not in self._values:
            dtype = _dtype(tensor.data_type, name)
            _check_shape(tensor.dims, name)
            self._values[i] = Value(i, name, tuple(tensor.dims), dtype, constant=_content(tensor, name, dtype, outside,
                                                                                              self.large.get(name)))


def _dtype(code: int, name: str) -> DType:
    if code not in _DTYPES:
        raise ModelError(f"tensor {shown(name)} has elements that npulab does not read", got=f"ONNX type {code}")
    return _DTYPES[code]


def _check_shape(shape: Iterable[int], name: str) -> None:
    dims = list(shape)
    count = 1
    for n in dims:
        if n < 0:
            raise ModelError(f"tensor {shown(name)} has a negative extent", got=dims[:RANK_MAX])
        count *= max(n, 1)
    if len(dims) > RANK_MAX or count > ELEMENTS_MAX:
        raise ModelError(f"tensor {shown(name)} is too large", got=f"{len(dims)} dimensions, {count} elements",
                         want=f"at most {RANK_MAX} and {ELEMENTS_MAX}")


def _content(t: onnx.TensorProto, name: str, dtype: DType, outside: _Outside, large: memoryview | None) -> memoryview:
    """A constant's bytes: little-endian, elements of 4 bits two a byte, of 2 four. `large`: those that are not in the
    message."""
    from onnx import TensorProto, numpy_helper

    bits = {DType.INT4: 4, DType.UINT4: 4, DType.INT2: 2, DType.BFLOAT16: 16}.get(dtype)
    size = None if dtype.numpy is None and bits is None else (
        (_elements(t) * bits + 7) // 8 if bits else _elements(t) * dtype.numpy.itemsize)  # type: ignore[union-attr]
    if t.data_location == TensorProto.EXTERNAL:
        found = outside.content(t, name, size)
    elif large is not None:
        found = large
    elif t.HasField("raw_data"):
        found = memoryview(t.raw_data)
    elif dtype is DType.STRING:
        return memoryview(b"\0".join(t.string_data))
    elif bits in (2, 4):
        found = memoryview(bytes(x & 0xFF for x in t.int32_data))
    else:
        try:
            found = memoryview(np.ascontiguousarray(numpy_helper.to_array(t)).tobytes())
        except (ValueError, TypeError, OverflowError) as e:
            raise ModelError(f"constant {shown(name)} is damaged", got=str(e)[:200]) from None
    if size is not None and len(found) != size:
        raise ModelError(f"constant {shown(name)} has data of the wrong length", got=f"{len(found)} bytes",
                         want=f"{size} bytes for {dtype.value}{list(t.dims)}")
    return found


class _Outside:
    """Weights in files beside the model, mapped. Only regular files below the model's folder are opened."""

    def __init__(self, folder: Path | None, model: str) -> None:
        self.folder = folder.resolve() if folder else None
        self.model = model
        self._files: dict[str, memoryview] = {}
        self._used: dict[str, set[tuple[int, int]]] = {}
        self._total = 0

    def content(self, t: onnx.TensorProto, name: str, size: int | None) -> memoryview:
        where = {e.key: e.value for e in t.external_data}
        location = where.get("location", "")
        data = self._files.get(location)
        if data is None:
            data = self._files[location] = self._open(location, name)
        try:
            offset = int(where.get("offset") or 0)
            length = int(where["length"]) if where.get("length") else size if size is not None else len(data) - offset
        except ValueError:
            raise ModelError(f"constant {shown(name)} lies at a place that is no number",
                             got=shown(str({k: v[:40] for k, v in where.items()}))) from None
        if not 0 <= offset <= offset + length <= len(data):
            raise ModelError(f"constant {shown(name)} lies outside {shown(location)}",
                             got=f"bytes {offset}..{offset + length}", want=f"0..{len(data)}")
        self._total += length
        if self._total > OUTSIDE_MAX:
            raise ModelError(f"'{self.model}' has too many weights outside the file",
                             got=f"{self._total} bytes or more", want=f"at most {OUTSIDE_MAX} bytes")
        self._used.setdefault(location, set()).add((offset, offset + length))
        return data[offset : offset + length]

    def _open(self, location: str, name: str) -> memoryview:
        if self.folder is None:
            raise ModelError(f"constant {shown(name)} lies in the file {shown(location)}, but this model has no folder",
                             try_="load the model by its path")
        try:
            path = (self.folder / location).resolve()
        except (OSError, ValueError, RuntimeError) as e:  # a zero in the name, a link to itself
            raise ModelError(f"{shown(location)} cannot be read", where=f"constant {shown(name)}", got=e) from None
        if not location or Path(location).is_absolute() or not path.is_relative_to(self.folder):
            raise ModelError(f"constant {shown(name)} lies outside the model's folder", got=shown(location),
                             want="a file beside the model")
        try:
            if not path.is_file():  # no pipe, no device
                raise ModelError(f"constant {shown(name)} lies in {shown(location)}, which is not there",
                                 where=f"looked in the folder of '{self.model}'", try_="get the weights too")
            with path.open("rb") as f:
                if not os.fstat(f.fileno()).st_size:
                    return memoryview(b"")
                return memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as e:
            raise ModelError(f"{shown(location)} cannot be read", got=getattr(e, "strerror", None) or e) from None

    def digest(self, data: memoryview) -> str:
        """SHA-256 of the model and of what it uses of its weights' files, in order of use, each byte once."""
        found = hashlib.sha256()
        for piece in passing(data):
            found.update(piece)
        for location, content in self._files.items():
            end = 0
            for first, last in sorted(self._used.get(location, ())):
                for piece in passing(content[max(first, end) : last]):
                    found.update(piece)
                end = max(last, end)
        return found.hexdigest()


# nodes


def _constant(n: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor of a Constant node; None for other nodes, and for constants that are no dense tensor of numbers."""
    from onnx import TensorProto, numpy_helper

    if n.op_type != "Constant" or n.domain not in ("", "ai.onnx") or len(n.attribute) != 1 or len(n.output) != 1:
        return None
    a = n.attribute[0]
    made: TensorProto | None = None
    match a.name:
        case "value" if a.HasField("t"):
            made = a.t
        case "value_float":
            made = numpy_helper.from_array(np.array(a.f, np.float32))
        case "value_floats":
            made = numpy_helper.from_array(np.array(a.floats, np.float32))
        case "value_int":
            made = numpy_helper.from_array(np.array(a.i, np.int64))
        case "value_ints":
            made = numpy_helper.from_array(np.array(a.ints, np.int64))
    return made


def _in_order(nodes: list[onnx.NodeProto], ready: set[str], model: str) -> list[onnx.NodeProto]:
    """The nodes, each behind those it reads; the file's own order where that is one."""
    maker: dict[str, int] = {}
    for i, n in enumerate(nodes):
        for label in n.output:
            if label and (label in ready or maker.setdefault(label, i) != i):
                raise ModelError(f"{_who(n, i)} of '{model}' writes {shown(label)} a second time")
    waits: list[set[int]] = []
    readers: list[list[int]] = [[] for _ in nodes]
    for i, n in enumerate(nodes):
        needs = set()
        for label in (*n.input, *_free(n)):
            if label in maker:
                needs.add(maker[label])
            elif label and label not in ready:
                raise ModelError(f"{_who(n, i)} of '{model}' reads {shown(label)}, which nothing computes")
        waits.append(needs)
        for j in needs:
            readers[j].append(i)
    heap = [i for i, needs in enumerate(waits) if not needs]
    out = []
    while heap:
        i = heapq.heappop(heap)
        out.append(nodes[i])
        for j in readers[i]:
            waits[j].discard(i)
            if not waits[j]:
                heapq.heappush(heap, j)
    if len(out) < len(nodes):
        i = next(i for i, needs in enumerate(waits) if needs)
        raise ModelError(f"'{model}' has a cycle: {_who(nodes[i], i)} waits for its own result",
                         got=f"{len(nodes) - len(out)} nodes in or behind cycles")
    return out


def _who(n: onnx.NodeProto, i: int) -> str:
    return f"{n.op_type[:60] or 'a node without a type'} {shown(n.name)}" if n.name else f"{n.op_type[:60]} (node {i})"


def _check_attributes(nodes: Iterable[onnx.NodeProto], model: str) -> None:
    """Raises: ModelError for those below 1 that may not be, in bodies too."""
    for i, n in enumerate(nodes):
        for a in n.attribute:
            numbers = (a.i,) if a.type == a.INT else a.ints
            if a.name in POSITIVE and n.domain in ("", "ai.onnx") and min(numbers, default=1) < 1:
                raise ModelError(f"{_who(n, i)} of '{model}' has {a.name} {', '.join(map(str, numbers[:RANK_MAX]))}",
                                 want="at least 1")
            for body in (*([a.g] if a.HasField("g") else []), *a.graphs):
                _check_attributes(body.node, model)


def _free(n: onnx.NodeProto) -> Iterator[str]:
    """Names that the bodies of a node read from the graph around it."""
    for a in n.attribute:
        for body in (*([a.g] if a.HasField("g") else []), *a.graphs):
            yield from _free_of(body)


def _free_of(body: onnx.GraphProto) -> Iterator[str]:
    own = {i.name for i in body.input} | {t.name for t in body.initializer} | {o for n in body.node for o in n.output}
    for n in body.node:
        yield from (label for label in (*n.input, *_free(n)) if label and label not in own)
    yield from (o.name for o in body.output if o.name and o.name not in own)


def _node(i: int, n: onnx.NodeProto, values: _Values) -> Node:
    if not n.op_type:
        raise ModelError(f"{_who(n, i)} of '{values.model}' has no operator")
    if n.overload:
        raise ModelError(f"{_who(n, i)} of '{values.model}' is an overloaded function", got=shown(n.overload))
    reads = tuple(dict.fromkeys(values.index(label) for label in _free(n)))
    op = OnnxOp(n.op_type, {a.name: _attribute(a, reads, _who(n, i)) for a in n.attribute},
                "" if n.domain == "ai.onnx" else n.domain)
    inputs = tuple(values.index(label) if label else -1 for label in n.input)
    outputs = tuple(values.index(label) if label else -1 for label in n.output)
    return Node(i, op, inputs, outputs, name=n.name)


def _attribute(a: onnx.AttributeProto, reads: tuple[int, ...], who: str) -> object:
    from onnx import AttributeProto, numpy_helper

    match a.type:
        case AttributeProto.FLOAT:
            return a.f
        case AttributeProto.INT:
            return a.i
        case AttributeProto.STRING:
            return _text(a.s)
        case AttributeProto.FLOATS:
            return tuple(a.floats)
        case AttributeProto.INTS:
            return tuple(a.ints)
        case AttributeProto.STRINGS:
            return tuple(_text(s) for s in a.strings)
        case AttributeProto.TENSOR if a.t.data_location != a.t.EXTERNAL:
            try:
                return numpy_helper.to_array(a.t)
            except (ValueError, TypeError, OverflowError) as e:
                raise ModelError(f"attribute {shown(a.name)} of {who} is damaged", got=str(e)[:200]) from None
    bodies = a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    return Embedded(a.SerializeToString(deterministic=True), reads if bodies else ())


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
