"""Read and write FlatBuffers by a declared schema; every read is checked against the file.

The `flatbuffers` package's own reader trusts offsets, which a hostile file chooses. Here a table is a position and a
schema record. Each access first checks that what it is about to read lies inside the file, so a bad file is a
`ModelError` that says where. Nothing is copied or visited before it is asked for, and alignment is never relied upon.

A small file may point at one table a million times. So each file carries an allowance: what is read from it, repeats
included, may come to `SHARE` times its size and `FREE_BYTES` more, and to `MOST_BYTES` at most. That bounds time and
memory. Views of byte vectors are free.

Writing goes through the package's `Builder`, which is imported only then.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from npulab.errors import CapacityError, InvariantError, ModelError, UsageError

SHARE = 2
"""Bytes read per byte of file. Source: the 27 models that npulab is tested with take 0.004 to 0.93."""
FREE_BYTES = 2**16
"""Allowance whatever the size: small files share more of their content. Source: assumed."""
MOST_BYTES = 2**26
"""Allowance of the largest files: two million tables, or all but the weights of a model far beyond any edge NPU."""
TABLE_BYTES = 32
"""What visiting a table takes from the allowance: more than most take in the file, since visiting costs time too."""
DEPTH_MAX = 24
"""Tables within tables. The TFLite schema itself ends at 6."""

_CODES = {
    "bool": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q",
    "f32": "f", "f64": "d",
}
_SIZES = {name: struct.calcsize(code) for name, code in _CODES.items()}
_UNPACK = {name: struct.Struct("<" + code).unpack_from for name, code in _CODES.items()}
_I32, _U32, _U16 = _UNPACK["i32"], _UNPACK["u32"], _UNPACK["u16"]
_SLOTS = {"bool": "Bool", "i8": "Int8", "u8": "Uint8", "i16": "Int16", "u16": "Uint16", "i32": "Int32", "u32": "Uint32",
          "i64": "Int64", "u64": "Uint64", "f32": "Float32", "f64": "Float64"}


@dataclass(frozen=True, slots=True)
class Field:
    """Field number `index` of a table.

    `kind` is a scalar, an enum, a table, "string", or for a union the enum that lists its members (`union` is True).
    `scalar` is the scalar type that stores one element, "" for tables, strings and unions. `align` is the alignment in
    bytes that a vector's content is written with, beyond that of its elements.
    """

    name: str
    index: int
    kind: str
    scalar: str
    vector: bool = False
    union: bool = False
    default: bool | int | float = 0
    align: int = 1


@dataclass(frozen=True)
class Schema:
    """Tables and enums by name. `widths` counts the field numbers of a table, deprecated ones included."""

    tables: Mapping[str, Mapping[str, Field]]
    widths: Mapping[str, int]
    enums: Mapping[str, Mapping[str, int]]
    bases: Mapping[str, str]

    @cached_property
    def names(self) -> Mapping[str, Mapping[int, str]]:
        """enum -> value -> name."""
        return {e: {v: k for k, v in values.items()} for e, values in self.enums.items()}

    @staticmethod
    def parse(text: str) -> Schema:
        """The schema in its compact form: one enum or table a line, fields in the order of their numbers.

            enum Color u8 RED=0 GREEN=1
            table Point x:f32 y:f32=1.5 color:Color=GREEN path:[i32] next:Point picture:[u8]@16 extra:union:Extras

        A type is a scalar, an enum, a table or ``string``; in brackets a vector, with ``@16`` aligned to 16 bytes.
        ``union:<enum>`` takes two numbers: first ``<name>_type``, the member's number, then the member. ``_`` keeps the
        number of a deprecated field. A line that begins with ``#`` is a comment.

        Raises: InvariantError naming the line that does not say this.
        """
        lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        enums = {w[1]: {k: int(v) for k, v in (p.split("=") for p in w[3:])} for w in lines if w[0] == "enum"}
        bases = {w[1]: w[2] for w in lines if w[0] == "enum"}
        known = {w[1] for w in lines if w[0] == "table"} | {"string"}
        tables: dict[str, dict[str, Field]] = {}
        widths: dict[str, int] = {}
        for what, name, *parts in lines:
            if what == "table":
                fields: dict[str, Field] = {}
                index = 0
                for part in parts:
                    for f in _fields(part, index, enums, bases, known):
                        fields[f.name] = f
                    index += 2 if ":union:" in part else 1
                tables[name], widths[name] = fields, index
            elif what != "enum":
                raise InvariantError(f"a schema line begins with {what!r}", want="enum or table")
        return Schema(tables, widths, enums, bases)


def _fields(part: str, index: int, enums: Mapping[str, Mapping[str, int]], bases: Mapping[str, str],
            known: set[str]) -> list[Field]:
    """The fields that one ``name:type`` of a schema line declares: none, one, or two for a union."""
    if part == "_":
        return []
    left, _, default = part.partition("=")
    name, _, kind = left.partition(":")
    kind, _, align = kind.partition("@")
    if kind.startswith("union:"):
        members = kind.removeprefix("union:")
        return [Field(f"{name}_type", index, members, bases[members]), Field(name, index + 1, members, "", union=True)]
    vector = kind.startswith("[")
    kind = kind.strip("[]")
    scalar = kind if kind in _SIZES else bases.get(kind, "")
    if not scalar and kind not in known:
        raise InvariantError(f"schema field {part!r} has a type that nothing declares", want="a scalar, enum or table")
    value: bool | int | float = 0.0 if scalar in ("f32", "f64") else False if scalar == "bool" else 0
    if default:
        value = (enums[kind][default] if kind in enums else default == "true" if scalar == "bool"
                 else float(default) if isinstance(value, float) else int(default))
    return [Field(name, index, kind, scalar, vector, False, value, int(align or 1))]


class _File:
    """What the tables of one file share: its bytes, its schema, and how much may still be read from it."""

    __slots__ = ("data", "left", "schema", "size", "slots")

    def __init__(self, schema: Schema, data: memoryview) -> None:
        self.schema, self.data, self.size = schema, data, len(data)
        self.left = min(SHARE * self.size + FREE_BYTES, MOST_BYTES)
        self.slots: dict[tuple[int, str], tuple[int, ...]] = {}


class Table:
    """A table in a file: fields by name, read when asked for.

    Every method raises ModelError, with the byte and the path from the root, if the file is not what it claims to be.
    """

    __slots__ = ("_at", "_fields", "_file", "_parent", "_slots", "_via", "_vtable", "name")

    def __init__(self, file: _File, name: str, at: int, parent: Table | None, via: str | tuple[str, int]) -> None:
        self._file, self.name, self._at, self._parent, self._via = file, name, at, parent, via
        self._fields = file.schema.tables[name]
        self._take(TABLE_BYTES, at)
        if not 4 <= at <= file.size - 4:
            raise self._broken("a table lies outside it", at)
        vtable = at - _I32(file.data, at)[0]
        self._vtable = vtable
        slots = file.slots.get((vtable, name))
        if slots is None:
            slots = file.slots[vtable, name] = self._read_slots(vtable)
        self._slots = slots

    @classmethod
    def root(cls, schema: Schema, name: str, data: memoryview) -> Table:
        """The root table of a file whose first four bytes point at it."""
        file = _File(schema, data)
        if file.size < 8:
            raise ModelError("the file is damaged: it ends before its first table", got=f"{file.size} bytes",
                             try_="get the file again")
        return cls(file, name, _U32(data, 0)[0], None, name)

    def _read_slots(self, vtable: int) -> tuple[int, ...]:
        """Where each field lies, counted from the table; 0 where absent. Numbers that the schema lacks are left out."""
        file = self._file
        if not 0 <= vtable <= file.size - 4:
            raise self._broken("a table's list of fields lies outside it", self._at, got=f"byte {vtable}")
        (length,) = _U16(file.data, vtable)
        if length < 4 or vtable + length > file.size:
            raise self._broken("a table's list of fields has an impossible length", vtable, got=f"{length} bytes")
        width = file.schema.widths[self.name]
        count = min((length - 4) // 2, width)
        return (*struct.unpack_from(f"<{count}H", file.data, vtable + 4), *(0,) * (width - count))

    @property
    def path(self) -> str:
        """How to get here from the root, as in ``Model.subgraphs[0].tensors[3]``."""
        steps: list[str] = []
        table: Table | None = self
        while table is not None:
            via = table._via
            steps.append(via if isinstance(via, str) else f"{via[0]}[{via[1]}]")
            table = table._parent
        return ".".join(reversed(steps))

    def _broken(self, what: str, at: int, name: str = "", **facts: object) -> ModelError:
        where = f"byte {at} of {self._file.size}, {self.path}{'.' if name else ''}{name}"
        return ModelError(f"the file is damaged: {what}", **facts, where=where, try_="get the file again")

    def _take(self, count: int, at: int) -> None:
        file = self._file
        file.left -= count
        if file.left < 0:
            raise self._broken("its parts are used over and over, or are far too many", at,
                               want=f"at most {SHARE} bytes read per byte of file, and {MOST_BYTES} bytes in all")

    def _find(self, f: Field, size: int) -> int:
        """Where field `f` of `size` bytes lies, or 0 if it is absent."""
        offset = self._slots[f.index]
        if not offset:
            return 0
        at = self._at + offset
        if at + size > self._file.size:
            raise self._broken("a field lies outside it", at, f.name)
        return at

    def _follow(self, at: int, name: str) -> int:
        target = at + int(_U32(self._file.data, at)[0])
        if target + 4 > self._file.size:
            raise self._broken("an offset points outside it", at, name, got=f"byte {target}")
        return target

    def _vector(self, f: Field, item: int) -> tuple[int, int]:
        """(first byte, count) of a vector field; (0, 0) if it is absent."""
        at = self._find(f, 4)
        if not at:
            return 0, 0
        start = self._follow(at, f.name)
        count = int(_U32(self._file.data, start)[0])
        if start + 4 + count * item > self._file.size:
            raise self._broken("a vector is longer than the file", start, f.name,
                               got=f"{count} elements of {item} bytes")
        return start + 4, count

    def has(self, name: str) -> bool:
        """Whether the file holds the field, rather than leaving it at its default."""
        return self._slots[self._fields[name].index] != 0

    def number(self, name: str) -> bool | int | float:
        """A scalar or enum field, or its default if absent."""
        f = self._fields[name]
        if not self._slots[f.index]:
            return f.default
        at = self._find(f, _SIZES[f.scalar])
        value: bool | int | float = _UNPACK[f.scalar](self._file.data, at)[0]
        return value

    def integer(self, name: str) -> int:
        return int(self.number(name))

    def choice(self, name: str) -> str:
        """An enum field by its name, in lower case.

        Raises: ModelError if the enum has no such value.
        """
        f = self._fields[name]
        value = self.integer(name)
        text = self._file.schema.names[f.kind].get(value)
        if text is None:
            raise self._broken(f"{f.kind} has no value {value}", self._at, name,
                               want=", ".join(self._file.schema.enums[f.kind]).lower())
        return text.lower()

    def table(self, name: str) -> Table | None:
        """A table field, or None if it is absent."""
        f = self._fields[name]
        at = self._find(f, 4)
        return Table(self._file, f.kind, self._follow(at, name), self, name) if at else None

    def union(self, name: str) -> Table | None:
        """The member of a union, or None if it is absent or its kind is none that the schema knows."""
        f = self._fields[name]
        member = self._file.schema.names[f.kind].get(self.integer(f"{name}_type"), "")
        at = self._find(f, 4)
        if not at or member not in self._file.schema.tables:
            return None
        return Table(self._file, member, self._follow(at, name), self, name)

    def tables(self, name: str) -> Iterator[Table]:
        """A vector of tables, one at a time."""
        f = self._fields[name]
        start, count = self._vector(f, 4)
        for i in range(count):
            yield Table(self._file, f.kind, self._follow(start + 4 * i, name), self, (name, i))

    def count(self, name: str) -> int:
        """How many elements a vector has."""
        f = self._fields[name]
        return self._vector(f, _SIZES[f.scalar] if f.scalar else 4)[1]

    def view(self, name: str) -> memoryview | None:
        """A vector of bytes, or a string's bytes, as a view of the file; None if absent."""
        start, count = self._vector(self._fields[name], 1)
        return self._file.data[start : start + count] if start else None

    def text(self, name: str) -> str:
        """A string field, "" if absent. What is not UTF-8 becomes U+FFFD."""
        start, count = self._vector(self._fields[name], 1)
        if not count:
            return ""
        self._take(count, start)
        return str(self._file.data[start : start + count], "utf-8", "replace")

    def numbers(self, name: str) -> tuple[Any, ...]:
        """A vector of scalars, () if absent."""
        f = self._fields[name]
        size = _SIZES[f.scalar]
        start, count = self._vector(f, size)
        if not count:
            return ()
        self._take(count * size, start)
        return struct.unpack_from(f"<{count}{_CODES[f.scalar]}", self._file.data, start)

    def value(self, name: str) -> object:
        """Any scalar, enum, string or vector of them, for people: enums by name in lower case, bytes as bytes.

        An enum value that has no name stays a number. Raises InvariantError for tables and unions.
        """
        f = self._fields[name]
        if f.kind == "string" and not f.vector:
            return self.text(name)
        if not f.scalar:
            raise InvariantError(f"{self.name}.{name} is no plain value")
        names = self._file.schema.names.get(f.kind)
        if f.vector and f.kind == "u8":
            start, count = self._vector(f, 1)
            self._take(count, start)
            return bytes(self._file.data[start : start + count])
        if f.vector:
            values = self.numbers(name)
            return tuple(_lower(names, v) for v in values) if names else values
        number = self.number(name)
        return _lower(names, int(number)) if names else number

    def unpack(self, depth: int = DEPTH_MAX) -> dict[str, Any]:
        """The fields that are present, and all below them, as dictionaries that `pack` takes; byte vectors stay views.

        Raises: ModelError also for content that the schema does not know: copying the rest would change its meaning.
        """
        if not depth:
            raise self._broken("tables are nested too deep", self._at)
        known = 4 + 2 * len(self._slots)
        length = int(_U16(self._file.data, self._vtable)[0])
        if length > known:
            self._take(length, self._vtable)
            if any(self._file.data[self._vtable + known : self._vtable + length]):
                raise self._newer(f"fields of {self.name}")
        return {f.name: self._unpack_field(f, depth) for f in self._fields.values() if self._slots[f.index]}

    def _unpack_field(self, f: Field, depth: int) -> Any:
        if f.union:
            inner = self.union(f.name)
            if inner is None:
                raise self._newer(f"the {f.kind} that {self.path} has")
            return inner.name, inner.unpack(depth - 1)
        if f.vector and not f.scalar:
            return [t.unpack(depth - 1) for t in self.tables(f.name)]
        if f.vector:
            return self.view(f.name) if _SIZES[f.scalar] == 1 else self.numbers(f.name)
        if f.kind == "string":
            return self.text(f.name)
        if f.scalar:
            return self.number(f.name)
        inner = self.table(f.name)
        return inner.unpack(depth - 1) if inner else {}

    def _newer(self, what: str) -> ModelError:
        return ModelError(f"the file is newer than this npulab: it does not know {what}", where=self.path,
                          try_="update npulab, or convert the model with an older converter")


def _lower(names: Mapping[int, str] | None, value: int) -> object:
    return names[value].lower() if names and value in names else value


def pack(schema: Schema, table: str, content: Mapping[str, Any], identifier: bytes) -> bytes:
    """A file whose root is `content`: dictionaries as `Table.unpack` gives them. Equal content gives equal bytes.

    Enums may be given by name; a union is (member's name, dictionary); None leaves a field out.

    Raises: UsageError for a field or value that the schema does not have; CapacityError beyond 2 GiB.
    """
    import flatbuffers
    from flatbuffers.builder import BuilderSizeError

    builder = flatbuffers.Builder(1024)
    try:
        builder.Finish(_pack(builder, schema, table, content), identifier)
    except BuilderSizeError:
        raise CapacityError(f"a {table} file would be too large to write", want="at most 2 GiB") from None
    return bytes(builder.Output())


def _pack(b: Any, schema: Schema, table: str, content: Mapping[str, Any]) -> int:
    """Write the table's children, then the table; its offset."""
    fields = schema.tables[table]
    if unknown := content.keys() - fields.keys():
        raise UsageError(f"{table} has no field {', '.join(sorted(unknown))}", want=", ".join(fields) or "no fields")
    ready: dict[str, Any] = {}
    for f in fields.values():
        value = content.get(f.name)
        if value is None:
            continue
        if f.union:
            member, inner = value
            ready[f"{f.name}_type"] = _number(schema, table, fields[f"{f.name}_type"], member)
            ready[f.name] = _pack(b, schema, member, inner)
        elif f.vector and f.scalar:
            ready[f.name] = _write_numbers(b, schema, table, f, value)
        elif f.vector:
            ready[f.name] = _write_offsets(b, [_pack(b, schema, f.kind, v) for v in value])
        elif f.kind == "string":
            ready[f.name] = b.CreateString(value)
        elif f.scalar:
            ready[f.name] = _number(schema, table, f, value)
        else:
            ready[f.name] = _pack(b, schema, f.kind, value)
    b.StartObject(schema.widths[table])
    for name, value in ready.items():
        f = fields[name]
        if f.scalar and not f.vector:
            try:
                getattr(b, f"Prepend{_SLOTS[f.scalar]}Slot")(f.index, value, f.default)
            except (TypeError, struct.error) as e:
                raise UsageError(f"{table}.{name} cannot be {value!r}", want=f.scalar) from e
        else:
            b.PrependUOffsetTRelativeSlot(f.index, value, 0)
    return int(b.EndObject())


def _number(schema: Schema, table: str, f: Field, value: Any) -> Any:
    """`value` as stored: an enum's name becomes its number."""
    if not isinstance(value, str):
        return value
    names = schema.enums.get(f.kind, {})
    number = names.get(value, names.get(value.upper()))
    if number is None:
        raise UsageError(f"{table}.{f.name} cannot be {value!r}", want=", ".join(names) or f.scalar)
    return number


def _write_offsets(b: Any, items: Sequence[int]) -> int:
    b.StartVector(4, len(items), 4)
    for offset in reversed(items):
        b.PrependUOffsetTRelative(offset)
    return int(b.EndVector())


def _write_numbers(b: Any, schema: Schema, table: str, f: Field, value: Any) -> int:
    if isinstance(value, bytes | bytearray | memoryview):
        raw = bytes(value)
    else:
        numbers = [_number(schema, table, f, v) for v in value]
        try:
            raw = struct.pack(f"<{len(numbers)}{_CODES[f.scalar]}", *numbers)
        except struct.error as e:
            raise UsageError(f"{table}.{f.name} cannot be written", want=f"numbers of type {f.scalar}",
                             got=f"{str(numbers)[:60]}: {e}") from e
    size = _SIZES[f.scalar]
    b.StartVector(size, len(raw) // size, max(f.align, size))
    b.head = b.Head() - len(raw)
    b.Bytes[b.head : b.head + len(raw)] = raw
    return int(b.EndVector())
