"""A SPIR-V module as parts: types, constants, functions' code. Nothing larger is made of it than it is.

Source: SPIR-V Specification 1.6, section 3.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from npulab.gpu.counting.mix import NotRead

MAGIC = 0x07230203
LANES_MOST = 16
"""Of a vector (section 2.16.1)."""


@dataclass(frozen=True, slots=True)
class Type:
    """kind: int, float, bool, vector, array, struct, pointer, other.     of: the parts' or what is pointed to.
    bytes: of a value."""

    kind: str
    bits: int = 0
    of: tuple[int, ...] = ()
    count: int = 1
    storage: int = -1
    bytes: float = 0.0


@dataclass(slots=True)
class Module:
    """code: (opcode, operands) of all functions.     labels, functions: the first instruction of each.
    names: of functions that are not in the module.     sets: of extended instructions."""

    entry: int = -1
    types: dict[int, Type] = field(default_factory=dict)
    constants: dict[int, Any] = field(default_factory=dict)
    variables: dict[int, tuple[int, int]] = field(default_factory=dict)  # type, storage class
    decorations: dict[tuple[int, int, int], int] = field(default_factory=dict)  # id, member or -1, decoration
    code: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    labels: dict[int, int] = field(default_factory=dict)
    functions: dict[int, int] = field(default_factory=dict)
    parameters: dict[int, list[int]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    sets: dict[int, str] = field(default_factory=dict)
    result: dict[int, int] = field(default_factory=dict)  # id -> type

    def size(self, type_: int) -> float:
        """Bytes of a value."""
        return self.types[type_].bytes

    def element(self, type_: int) -> tuple[str, int]:
        """(kind of a Mix, lanes) of a number or a vector."""
        t = self.types[type_]
        part = self.types[t.of[0]] if t.kind == "vector" else t
        return f"{part.kind}{part.bits}", t.count

    def bits(self, type_: int) -> int:
        """Of a number, or of each of a vector's."""
        t = self.types[type_]
        return self.types[t.of[0]].bits if t.kind == "vector" else t.bits


def parse(data: bytes, entry: str) -> Module:
    """Raises: NotRead."""
    if len(data) < 20 or len(data) % 4 or struct.unpack_from("<I", data)[0] != MAGIC:
        raise NotRead("no SPIR-V module")
    words = struct.unpack(f"<{len(data) // 4}I", data)
    m, at, inside = Module(), 5, -1
    while at < len(words):
        length, op = words[at] >> 16, words[at] & 0xffff
        if not length or at + length > len(words):
            raise NotRead("the SPIR-V module ends early")
        a = words[at + 1:at + length]
        at += length
        if op == 15:
            m.entry = a[1] if text(a[2:]) == entry else m.entry
        elif op == 54:
            inside = a[1]
            m.functions[inside], m.parameters[inside] = len(m.code), []
        elif op == 56:
            if m.functions[inside] == len(m.code):  # without code
                del m.functions[inside]
            inside = -1
        elif op == 55:
            m.parameters[inside].append(a[1])
            m.result[a[1]] = a[0]
        elif inside >= 0:
            if op == 248:
                m.labels[a[0]] = len(m.code)
            m.code.append((op, a))
            if op == 59:
                m.variables[a[1]] = (a[0], a[2])
            if len(a) > 1 and a[0] in m.types:
                m.result[a[1]] = a[0]
        else:
            _declare(m, op, a)
    if m.entry not in m.functions:
        raise NotRead(f"the SPIR-V has no entry {entry}")
    return m


def text(words: Sequence[int]) -> str:
    return struct.pack(f"<{len(words)}I", *words).split(b"\0")[0].decode("utf-8", "replace")


def _declare(m: Module, op: int, a: tuple[int, ...]) -> None:
    if op == 11:
        m.sets[a[0]] = text(a[1:])
    elif op == 71:
        m.decorations[a[0], -1, a[1]] = a[2] if len(a) > 2 else 0
        if a[1] == 41:  # linkage
            m.names[a[0]] = text(a[2:])
    elif op == 72:
        m.decorations[a[0], a[1], a[2]] = a[3] if len(a) > 3 else 0
    elif op in (20, 21, 22):
        bits = a[1] if op > 20 else 32
        if not 0 < bits <= 64:
            raise NotRead(f"numbers of {bits} bits are not followed")
        m.types[a[0]] = Type({20: "bool", 21: "int", 22: "float"}[op], bits, bytes=bits / 8)
    elif op == 23:
        if a[2] > LANES_MOST:
            raise NotRead(f"vectors of {a[2]} are not followed")
        m.types[a[0]] = Type("vector", of=(a[1],), count=a[2], bytes=a[2] * m.size(a[1]))
    elif op in (28, 29):
        count = m.constants.get(a[2], 0) if op == 28 else 0
        m.types[a[0]] = Type("array", of=(a[1],), count=count, bytes=count * m.size(a[1]))
    elif op == 30:
        m.types[a[0]] = Type("struct", of=a[1:], bytes=sum(map(m.size, a[1:])))
    elif op == 32:
        m.types[a[0]] = Type("pointer", of=(a[2],), storage=a[1], bytes=8)
    elif op in (19, 25, 26, 27, 31, 33, *range(34, 39)):
        m.types[a[0]] = Type("other")
    elif op in (1, 41, 42, 43, 44, 45, 46, 48, 49, 50, 51):
        m.result[a[1]] = a[0]
        m.constants[a[1]] = _constant(m, op, m.types[a[0]], a)
    elif op == 59:
        m.variables[a[1]] = (a[0], a[2])


def _constant(m: Module, op: int, t: Type, a: tuple[int, ...]) -> Any:
    if op in (41, 42, 48, 49):
        return int(op in (41, 48))
    if op in (44, 51):
        return [m.constants[x] for x in a[2:]] if t.kind == "vector" else None
    if op == 46:
        return [0] * t.count if t.kind == "vector" else 0 if t.kind in ("int", "bool") else None
    if op not in (43, 50) or t.kind != "int":
        return None
    return (a[2] | (a[3] << 32 if t.bits > 32 else 0)) & ((1 << t.bits) - 1)
