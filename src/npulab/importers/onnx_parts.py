"""ONNX files without their large constants, and put together again: weights need not be in memory to work on the rest.

A `Thin` model is the message with the content of its large initializers left out, which lies where the file is mapped
or is computed when it is written. What is written is what protobuf itself writes, byte for byte.

Source: the wire format, https://protobuf.dev/programming-guides/encoding; numbers of fields, onnx.proto of ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from npulab.program.pages import Buffer, content_of, put_away

if TYPE_CHECKING:
    import onnx

LARGE = 1 << 14
"""Bytes of a constant from which it is left out."""
GRAPH = 7
"""Field of ModelProto."""
NODE, INITIALIZER = 1, 5
"""Of GraphProto."""
OPERATOR, ATTRIBUTE, TENSOR = 4, 5, 5
"""NodeProto.op_type, NodeProto.attribute, AttributeProto.t."""
RAW_DATA = 9
"""Of TensorProto. Nothing that npulab leaves out has a field behind it."""
BYTES = 2
"""The wire type of what has a length."""
FIELDS_MAX = 1 << 8
"""Of a tensor, an attribute or a Constant node: extents are at most 32, and little else is there more than once."""
FIXED = {1: 8, 5: 4}
"""Bytes of the other wire types, 0 aside, which is a number of its own length."""
Make = Callable[[], Buffer]


class DamagedError(Exception):
    """Bytes are no message. Not for users: whoever reads lets protobuf say what is wrong."""


@dataclass(eq=False)
class Thin:
    """An ONNX model. `contents`: of the initializers by name whose own is left out, how many bytes, and what gives
    them."""

    proto: onnx.ModelProto
    contents: dict[str, tuple[int, Make]] = field(default_factory=dict)

    def constant(self, name: str, array: NDArray[Any]) -> None:
        """One more initializer."""
        from onnx import helper, numpy_helper

        array = np.asarray(array, order="C")
        if array.nbytes < LARGE:
            self.proto.graph.initializer.append(numpy_helper.from_array(array, name))
            return
        self.later(name, array.shape, int(helper.np_dtype_to_tensor_dtype(array.dtype)), array.nbytes,
                   lambda: content_of(array))

    def packed(self, name: str, shape: tuple[int, ...], dtype: int, content: bytes) -> None:
        """One of elements that NumPy has no type for."""
        self.proto.graph.initializer.add(dims=shape, data_type=dtype, name=name, raw_data=content)

    def later(self, name: str, shape: tuple[int, ...], dtype: int, size: int, make: Make) -> None:
        """One whose content is made when it is written."""
        self.proto.graph.initializer.add(dims=shape, data_type=dtype, name=name)
        self.contents[name] = size, make

    def pieces(self) -> tuple[int, Iterator[Buffer]]:
        """The whole file: its size, and its bytes, piece by piece."""
        light = memoryview(self.proto.SerializeToString(deterministic=True))
        names = iter([t.name for t in self.proto.graph.initializer])
        parts: list[Buffer | tuple[int, Make]] = []
        total = 0

        def put(part: Buffer | tuple[int, Make]) -> int:
            parts.append(part)
            return part[0] if isinstance(part, tuple) else len(part)

        for number, first, start, end in fields(light, 0, len(light)):
            if number != GRAPH:
                total += put(light[first:end])
                continue
            position, size = len(parts), 0
            for kind, at, low, high in fields(light, start, end):
                content = self.contents.get(next(names)) if kind == INITIALIZER else None
                if content is None:
                    size += put(light[at:high])
                    continue
                head = _tag(RAW_DATA) + _varint(content[0])
                size += put(_tag(INITIALIZER) + _varint(high - low + len(head) + content[0]))
                size += put(light[low:high]) + put(head) + put(content)
            opening = _tag(GRAPH) + _varint(size)
            parts.insert(position, opening)
            total += len(opening) + size
        return total, (part[1]() if isinstance(part, tuple) else part for part in parts)

    def file(self) -> memoryview:
        """The whole file's bytes, in a file if they are many."""
        size, pieces = self.pieces()
        return put_away(pieces, size)

    def __bytes__(self) -> bytes:
        return b"".join(self.pieces()[1])


def thin(data: Buffer) -> Thin:
    """The model of a file, its large initializers views of it. Raises as protobuf does for bytes that are none."""
    import onnx

    try:
        light, large, nodes = left_out(data)
        if nodes:  # their content has no place in a Thin
            raise DamagedError
        found = Thin(onnx.ModelProto.FromString(light))
    except DamagedError:
        found, large = Thin(onnx.ModelProto.FromString(data)), {}
    view = memoryview(data)
    for i, place in large.items():
        found.contents[found.proto.graph.initializer[i].name] = place.stop - place.start, partial(_part, view, place)
    return found


def _part(view: memoryview, place: slice) -> memoryview:
    return view[place]


def left_out(data: Buffer) -> tuple[bytes, dict[int, slice], dict[int, slice]]:
    """A model file without the content of large initializers and Constant nodes, and where in the file these lie, by
    number of the initializer and of the node.

    Raises: DamagedError if the bytes are no message, or one written in an unusual way.
    """
    view = memoryview(data).cast("B")
    out: list[bytes] = []
    places: dict[int, dict[int, slice]] = {NODE: {}, INITIALIZER: {}}
    counts = {NODE: 0, INITIALIZER: 0}
    for number, first, start, end in fields(view, 0, len(view)):
        if number != GRAPH:
            out.append(bytes(view[first:end]))
            continue
        inner: list[bytes] = []
        taken = start  # all before this is in `inner`
        for kind, at, low, high in fields(view, start, end):
            if kind not in counts:
                continue
            found = _lightened(view, kind, low, high)
            if found is not None:
                light, places[kind][counts[kind]] = found
                inner += [bytes(view[taken:at]), _tag(kind), _varint(len(light)), light]
                taken = high
            counts[kind] += 1
        inner.append(bytes(view[taken:end]))
        out += [_tag(GRAPH), _varint(sum(map(len, inner))), *inner]
    return b"".join(out), places[INITIALIZER], places[NODE]


def _lightened(view: memoryview, kind: int, start: int, end: int) -> tuple[bytes, slice] | None:
    """An initializer or a Constant node without its content, and the place of that; None where it is small, and for
    other nodes."""
    if end - start < LARGE:
        return None
    if kind == INITIALIZER:
        return _without(view, start, end, (RAW_DATA,))
    names = [bytes(view[a:b]) for number, _, a, b in _few(view, start, end) if number == OPERATOR]
    return _without(view, start, end, (ATTRIBUTE, TENSOR, RAW_DATA)) if names == [b"Constant"] else None


def _without(view: memoryview, start: int, end: int, path: tuple[int, ...]) -> tuple[bytes, slice] | None:
    """A message without the large field at the end of the path, and its place; None if it is not there once."""
    inside = [f for f in _few(view, start, end) if f[0] == path[0]]
    if len(inside) != 1 or inside[0][3] - inside[0][2] < LARGE:
        return None
    _, first, low, high = inside[0]
    if len(path) == 1:
        return bytes(view[start:first]) + bytes(view[high:end]), slice(low, high)
    found = _without(view, low, high, path[1:])
    if found is None:
        return None
    light, place = found
    return bytes(view[start:first]) + _tag(path[0]) + _varint(len(light)) + light + bytes(view[high:end]), place


def _few(view: memoryview, at: int, end: int) -> list[tuple[int, int, int, int]]:
    """The fields of a small message; none of one with more than FIELDS_MAX, which is left to protobuf."""
    found = list(islice(fields(view, at, end), FIELDS_MAX + 1))
    return found if len(found) <= FIELDS_MAX else []


def fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, where the field begins, where its content begins, where it ends) of each field of a message, in order.
    Raises: DamagedError."""
    while at < end:
        first = at
        key, at = _number(view, at, end)
        wire = key & 7
        if wire == BYTES:
            size, at = _number(view, at, end)
            start, at = at, at + size
        elif wire == 0:
            start, at = at, _number(view, at, end)[1]
        elif wire in FIXED:
            start, at = at, at + FIXED[wire]
        else:
            raise DamagedError
        if at > end or not key >> 3:
            raise DamagedError
        yield (key >> 3 if wire == BYTES else 0), first, start, at


def _number(view: memoryview, at: int, end: int) -> tuple[int, int]:
    """A varint, and where it ends."""
    found = shift = 0
    while True:
        if at >= end or shift > 63:
            raise DamagedError
        b = view[at]
        at += 1
        found |= (b & 0x7F) << shift
        if b < 0x80:
            return found, at
        shift += 7


def _varint(n: int) -> bytes:
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out) + bytes((n,))


def _tag(number: int) -> bytes:
    return _varint(number << 3 | BYTES)
