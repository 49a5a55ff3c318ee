"""Read and write FlatBuffers by a declared schema; every read is checked against the file.

The library's own Python reader trusts offsets, which a hostile file chooses. Here a table is a position and a schema
record; each access checks that what it is about to read lies inside the file, so a bad file is a `ModelError` that says
where. Nothing is copied or visited before it is asked for. Writing goes through the library's `Builder`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npulab.errors import InvariantError, ModelError

_SCALARS = {
    "bool": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q",
    "f32": "f", "f64": "d",
}
_SIZES = {name: struct.calcsize(code) for name, code in _SCALARS.items()}
_UNPACK = {name: struct.Struct("<" + code).unpack_from for name, code in _SCALARS.items()}


@dataclass(frozen=True, slots=True)
class Field:
    """Field number `index` of a table. `kind` is a scalar, enum, table, "string" or "union:<enum>"."""

    name: str
    index: int
    kind: str
    vector: bool
    default: bool | int | float


@dataclass(frozen=True, slots=True)
class Schema:
    """Tables and enums by name, parsed from the compact text form (see `parse`)."""

    tables: Mapping[str, Mapping[str, Field]]
    enums: Mapping[str, Mapping[str, int]]
    bases: Mapping[str, str]
    names: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Schema:
        """Lines ``enum Name base KEY=value ...`` and ``table Name field:type[=default] ...``, fields in id order.

        A type is a scalar, an enum, a table, ``string``, ``union:<enum>``, or one of them in brackets for a vector.
        The field that holds a union's type stands right before it. ``_:deprecated`` keeps a number taken.
        """
        tables: dict[str, dict[str, Field]] = {}
        enums: dict[str, dict[str, int]] = {}
        bases: dict[str, str] = {}
        for line in text.splitlines():
            what, name, *parts = line.split() or ("#", "")
            if what == "enum":
                bases[name] = parts[0]
                enums[name] = {k: int(v) for k, v in (p.split("=") for p in parts[1:])}
            elif what == "table":
                fields = {}
                for index, part in enumerate(parts):
                    left, _, default = part.partition("=")
                    key, _, kind = left.partition(":")
                    if key != "_":
                        vector = kind.startswith("[")
                        value = default == "true" if default in ("true", "false") else float(default or 0)
                        if kind not in ("f32", "f64") and not isinstance(value, bool):
                            value = int(value)
                        fields[key] = Field(key, index, kind.strip("[]"), vector, value)
                tables[name] = fields
        names = {e: {v: k for k, v in values.items()} for e, values in enums.items()}
        return Schema(tables, enums, bases, names)

    def scalar(self, kind: str) -> str | None:
        """The scalar type that stores `kind`, or None for tables, strings and unions."""
        return kind if kind in _SIZES else self.bases.get(kind)


def _broken(what: str, at: int, size: int) -> ModelError:
    return ModelError(f"the file is damaged: {what}", where=f"byte {at} of {size}", try_="get the file again")


class Table:
    """A table in a file: fields by name, read when asked for."""

    __slots__ = ("_data", "_fields", "_position", "_schema", "_table", "_vtable", "_vtable_size")

    def __init__(self, schema: Schema, table: str, data: memoryview, position: int) -> None:
        self._schema, self._table, self._data, self._position = schema, table, data, position
        self._fields = schema.tables[table]
        size = len(data)
        if not 4 <= position <= size - 4:
            raise _broken(f"a {table} table lies outside it", position, size)
        (back,) = _UNPACK["i32"](data, position)
        vtable = position - back
        if not 0 <= vtable <= size - 4:
            raise _broken(f"the field list of a {table} table lies outside it", position, size)
        (length,) = _UNPACK["u16"](data, vtable)
        if length < 4 or vtable + length > size:
            raise _broken(f"the field list of a {table} table is {length} bytes long", vtable, size)
        self._vtable, self._vtable_size = vtable, length

    @classmethod
    def root(cls, schema: Schema, table: str, data: memoryview) -> Table:
        if len(data) < 8:
            raise _broken("it is too short", 0, len(data))
        (position,) = _UNPACK["u32"](data, 0)
        return cls(schema, table, data, position)

    def _at(self, f: Field, size: int) -> int:
        """Where field `f` of `size` bytes lies, or 0 if it is absent."""
        slot = 4 + 2 * f.index
        if slot + 2 > self._vtable_size:
            return 0
        (offset,) = _UNPACK["u16"](self._data, self._vtable + slot)
        if not offset:
            return 0
        at = self._position + int(offset)
        if at + size > len(self._data):
            raise _broken(f"{self._table}.{f.name} lies outside it", at, len(self._data))
        return at

    def _target(self, at: int, what: str) -> int:
        (offset,) = _UNPACK["u32"](self._data, at)
        target = at + int(offset)
        if target + 4 > len(self._data):
            raise _broken(f"{what} points outside it", at, len(self._data))
        return target

    def has(self, name: str) -> bool:
        return self._at(self._fields[name], 0) != 0

    def number(self, name: str) -> Any:
        """A scalar or enum field as a Python number (its default if absent)."""
        f = self._fields[name]
        kind = self._schema.scalar(f.kind)
        assert kind is not None
        at = self._at(f, _SIZES[kind])
        return _UNPACK[kind](self._data, at)[0] if at else f.default

    def integer(self, name: str) -> int:
        return int(self.number(name))

    def table(self, name: str, kind: str = "") -> Table | None:
        """A table field; `kind` names the member table of a union."""
        f = self._fields[name]
        at = self._at(f, 4)
        if not at:
            return None
        return Table(self._schema, kind or f.kind, self._data, self._target(at, f"{self._table}.{name}"))

    def _vector(self, f: Field, item: int) -> tuple[int, int]:
        """(first byte, count) of a vector field."""
        at = self._at(f, 4)
        if not at:
            return 0, 0
        start = self._target(at, f"{self._table}.{f.name}")
        (count,) = _UNPACK["u32"](self._data, start)
        if start + 4 + int(count) * item > len(self._data):
            raise _broken(f"{self._table}.{f.name} claims {count} entries, more than the file holds", start,
                          len(self._data))
        return start + 4, int(count)

    def bytes(self, name: str) -> memoryview | None:
        """A vector of bytes (or a string's bytes) as a view of the file; None if absent."""
        f = self._fields[name]
        start, count = self._vector(f, 1)
        return self._data[start : start + count] if start else None

    def text(self, name: str) -> str:
        raw = self.bytes(name)
        return bytes(raw).decode("utf-8", "replace") if raw is not None else ""

    def numbers(self, name: str) -> list[Any] | None:
        """A vector of scalars; None if absent."""
        f = self._fields[name]
        kind = self._schema.scalar(f.kind)
        assert kind is not None
        start, count = self._vector(f, _SIZES[kind])
        if not start:
            return None
        dtype = np.dtype("<" + {"bool": "u1"}.get(kind, kind[0] + str(_SIZES[kind])))
        values: list[Any] = np.frombuffer(self._data, dtype, count, start).tolist()
        return [bool(v) for v in values] if kind == "bool" else values

    def count(self, name: str) -> int:
        return self._vector(self._fields[name], 4)[1]

    def tables(self, name: str) -> Iterator[Table]:
        """A vector of tables, one at a time."""
        f = self._fields[name]
        start, count = self._vector(f, 4)
        for i in range(count):
            at = start + 4 * i
            yield Table(self._schema, f.kind, self._data, self._target(at, f"{self._table}.{name}[{i}]"))

    def value(self, name: str) -> object:
        """Any field as plain Python: numbers, enum names in lower case, strings, tuples."""
        f = self._fields[name]
        if f.kind == "string" and not f.vector:
            return self.text(name)
        if self._schema.scalar(f.kind) is None:
            return None
        if f.vector:
            return tuple(self.numbers(name) or ())
        raw = self.number(name)
        if f.kind in self._schema.enums:
            return self._schema.names[f.kind].get(int(raw), str(raw)).lower()
        return raw

    def unpack(self, depth: int = 24) -> dict[str, Any]:
        """The table and all below it as dictionaries that `pack` takes; byte vectors stay views."""
        if not depth:
            raise _broken(f"tables are nested too deep at {self._table}", self._position, len(self._data))
        out: dict[str, Any] = {}
        for f in self._fields.values():
            if not self.has(f.name):
                continue
            scalar = self._schema.scalar(f.kind)
            if f.kind.startswith("union:"):
                members = self._schema.names[f.kind[6:]]
                member = members.get(self.integer(f"{f.name}_type"), "")
                inner = self.table(f.name, member) if member in self._schema.tables else None
                if inner is not None:
                    out[f.name] = (member, inner.unpack(depth - 1))
            elif f.name.endswith("_type") and f"{f.name[:-5]}" in self._fields and f.kind == "u8":
                continue
            elif f.kind == "string":
                if not f.vector:
                    out[f.name] = self.text(f.name)
            elif scalar is None:
                if f.vector:
                    out[f.name] = [t.unpack(depth - 1) for t in self.tables(f.name)]
                else:
                    inner = self.table(f.name)
                    out[f.name] = inner.unpack(depth - 1) if inner else {}
            elif f.vector:
                out[f.name] = self.bytes(f.name) if _SIZES[scalar] == 1 else self.numbers(f.name)
            else:
                out[f.name] = self.number(f.name)
        return out


def pack(schema: Schema, table: str, content: Mapping[str, Any], identifier: bytes) -> bytes:
    """A file whose root is `content`: dictionaries as `Table.unpack` gives them. Equal content, equal bytes."""
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(_pack(builder, schema, table, content), identifier)
    return bytes(builder.Output())


def _pack(b: Any, schema: Schema, table: str, content: Mapping[str, Any]) -> int:
    fields = schema.tables[table]
    if unknown := content.keys() - fields.keys():
        raise InvariantError(f"{table} has no field {', '.join(sorted(unknown))}", want=", ".join(fields))
    references: dict[str, int] = {}
    unions: dict[str, int] = {}
    for name, value in content.items():
        f = fields[name]
        scalar = schema.scalar(f.kind)
        if f.kind.startswith("union:"):
            member, inner = value
            unions[f"{name}_type"] = schema.enums[f.kind[6:]][member]
            references[name] = _pack(b, schema, member, inner)
        elif f.kind == "string":
            references[name] = b.CreateString(value)
        elif f.vector and scalar is None:
            references[name] = _offsets(b, [_pack(b, schema, f.kind, v) for v in value])
        elif f.vector:
            references[name] = _scalars(b, value, str(scalar))
        elif scalar is None:
            references[name] = _pack(b, schema, f.kind, value)
    b.StartObject(max((f.index for f in fields.values()), default=-1) + 1)
    for name, f in sorted(fields.items(), key=lambda item: item[1].index):
        if name in references:
            b.PrependUOffsetTRelativeSlot(f.index, references[name], 0)
        elif name in unions:
            b.PrependUint8Slot(f.index, unions[name], 0)
        elif name in content:
            value = content[name]
            if isinstance(value, str):
                value = schema.enums[f.kind][value.upper()]
            slot = {"bool": "Bool", "i8": "Int8", "u8": "Uint8", "i16": "Int16", "u16": "Uint16", "i32": "Int32",
                    "u32": "Uint32", "i64": "Int64", "u64": "Uint64", "f32": "Float32", "f64": "Float64"}
            getattr(b, f"Prepend{slot[str(schema.scalar(f.kind))]}Slot")(f.index, value, f.default)
    return int(b.EndObject())


def _offsets(b: Any, items: Sequence[int]) -> int:
    b.StartVector(4, len(items), 4)
    for offset in reversed(items):
        b.PrependUOffsetTRelative(offset)
    return int(b.EndVector())


def _scalars(b: Any, value: Any, scalar: str) -> int:
    if scalar in ("u8", "i8", "bool"):
        raw = bytes(value)
        b.StartVector(1, len(raw), 16)  # tensors want 16-byte alignment
        b.head = b.Head() - len(raw)
        b.Bytes[b.Head() : b.Head() + len(raw)] = raw
        return int(b.EndVector())
    dtype = np.dtype("<" + scalar[0] + str(_SIZES[scalar]))
    return int(b.CreateNumpyVector(np.asarray(value, dtype)))
