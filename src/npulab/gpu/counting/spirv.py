"""SPIR-V compute shaders followed through: integers computed, what is computed on data counted. It is what a driver is
given; what it makes of it is not seen.

Source: SPIR-V Specification 1.6, section 3; GLSL.std.450 (extended instructions).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from npulab.gpu.counting.mix import OWN, SUMS, Counted, Mix, NotRead, add
from npulab.gpu.counting.turns import of_a_turn

CODE = "SPIR-V"
MAGIC, WORD = 0x07230203, 0xffff_ffff
UNIFORM, WORKGROUP, PRIVATE, FUNCTION, PUSH = 2, 4, 6, 7, 9
OWN_CLASSES = (PRIVATE, FUNCTION)
COUNTED = {126: "add", 127: "add", 128: "add", 129: "add", 130: "add", 131: "add", 132: "mul", 133: "mul", 134: "div",
           135: "div", 136: "div", 142: "mul"}
EXTENDED = {50: "fma", 31: "sqrt", 32: "rsqrt"}
DOTS = range(4450, 4456)
"""Of four bytes in a word, to a word."""
SCALARS: dict[int, Callable[[int, int], int]] = {
    128: lambda a, b: a + b, 130: lambda a, b: a - b, 132: lambda a, b: a * b, 134: lambda a, b: a // b if b else 0,
    137: lambda a, b: a % b if b else 0, 194: lambda a, b: a >> (b & 31), 195: lambda a, b: signed(a) >> (b & 31),
    196: lambda a, b: a << (b & 31), 197: lambda a, b: a | b, 198: lambda a, b: a ^ b, 199: lambda a, b: a & b,
    164: lambda a, b: a == b, 165: lambda a, b: a != b, 166: lambda a, b: a | b, 167: lambda a, b: a & b,
    170: lambda a, b: a == b, 171: lambda a, b: a != b, 172: lambda a, b: a > b,
    173: lambda a, b: signed(a) > signed(b), 174: lambda a, b: a >= b, 175: lambda a, b: signed(a) >= signed(b),
    176: lambda a, b: a < b, 177: lambda a, b: signed(a) < signed(b), 178: lambda a, b: a <= b,
    179: lambda a, b: signed(a) <= signed(b)}
BUILTINS = {24: 3, 25: 2, 26: 0, 27: 1, 28: 1}
"""NumWorkgroups, WorkgroupSize, WorkgroupId, LocalInvocationId, GlobalInvocationId -> a column of what is known; the
group is the first."""


def signed(value: int) -> int:
    return value - (value >> 31 << 32)


@dataclass(frozen=True, slots=True)
class Type:
    """kind: int, float, bool, vector, array, struct, pointer, other.     of: the parts' or what is pointed to."""

    kind: str
    bits: int = 0
    of: tuple[int, ...] = ()
    count: int = 1
    storage: int = -1


@dataclass(frozen=True, slots=True)
class Pointer:
    variable: int
    path: tuple[int | None, ...]
    type: int


@dataclass(slots=True)
class Module:
    """code: (opcode, operands) of the entry's function.     labels: the instruction behind each."""

    types: dict[int, Type] = field(default_factory=dict)
    constants: dict[int, Any] = field(default_factory=dict)
    variables: dict[int, tuple[int, int]] = field(default_factory=dict)  # type, storage class
    decorations: dict[tuple[int, int, int], int] = field(default_factory=dict)  # id, member or -1, decoration
    code: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    labels: dict[int, int] = field(default_factory=dict)
    result: dict[int, int] = field(default_factory=dict)  # id -> type

    def size(self, type_: int) -> float:
        """Bytes of a value."""
        t = self.types[type_]
        if t.kind in ("vector", "array"):
            return t.count * self.size(t.of[0])
        return sum(map(self.size, t.of)) if t.kind == "struct" else t.bits / 8

    def element(self, type_: int) -> tuple[str, int]:
        """(kind of a Mix, lanes) of a number or a vector."""
        t = self.types[type_]
        if t.kind == "vector":
            return self.element(t.of[0])[0], t.count
        return f"{t.kind}{t.bits}", 1


def count(module: bytes, size: Sequence[int], group: Sequence[int], block: bytes, turns: int, binding: int = -1,
          entry: str = "main") -> Counted:
    """A turn of a shader's loop, in each work item: of the group's first, middle and last.

    block  content of the shader's arguments: the uniform block at `binding`, or its push constants (-1).
    turns  the place in it, in bytes, of how often the loop turns, a word.
    """
    try:
        m = parse(module, entry)
    except NotRead as e:
        return Counted(None, CODE, why=str(e))
    except (struct.error, IndexError, KeyError):
        return Counted(None, CODE, why="the SPIR-V module is damaged")
    items = sorted({0, group[0] // 2, group[0] - 1})

    def follow(many: int) -> Mix:
        out: Mix = {}
        known = block[:turns] + many.to_bytes(4, "little") + block[turns + 4:]
        for item in items:
            try:
                add(out, _Thread(m, known, binding, item, size, group).follow())
            except (IndexError, KeyError, TypeError, AttributeError, ValueError):
                raise NotRead("the SPIR-V module is damaged, or not of a kind that is followed") from None
        return out

    return of_a_turn(follow, len(items), CODE)


def whole(module: bytes, size: Sequence[int], group: Sequence[int], entry: str = "main") -> Mix:
    """What the first row of the first group's work items do in all, of a shader without arguments. Raises: NotRead."""
    m, out = parse(module, entry), Mix()
    for item in range(group[0]):
        add(out, _Thread(m, b"", 0, item, size, group).follow())
    return out


def parse(data: bytes, entry: str) -> Module:
    """Raises: NotRead."""
    if len(data) < 20 or len(data) % 4 or struct.unpack_from("<I", data)[0] != MAGIC:
        raise NotRead("no SPIR-V module")
    words = struct.unpack(f"<{len(data) // 4}I", data)
    m, at, wanted, inside = Module(), 5, -1, -1
    while at < len(words):
        length, op = words[at] >> 16, words[at] & 0xffff
        if not length or at + length > len(words):
            raise NotRead("the SPIR-V module ends early")
        a = words[at + 1:at + length]
        at += length
        if op == 15:
            name = struct.pack(f"<{len(a) - 2}I", *a[2:]).split(b"\0")[0].decode("utf-8", "replace")
            wanted = a[1] if name == entry else wanted
        elif op == 54:
            inside = a[1]
        elif op == 56:
            inside = -1
        elif inside == wanted and inside >= 0:
            if op == 248:
                m.labels[a[0]] = len(m.code)
            m.code.append((op, a))
            if op == 59:
                m.variables[a[1]] = (a[0], a[2])
            if len(a) > 1 and a[0] in m.types:
                m.result[a[1]] = a[0]
        elif inside < 0:
            _declare(m, op, a)
    if wanted < 0 or not m.code:
        raise NotRead(f"the SPIR-V has no entry {entry}")
    return m


def _declare(m: Module, op: int, a: tuple[int, ...]) -> None:
    if op == 71:
        m.decorations[a[0], -1, a[1]] = a[2] if len(a) > 2 else 0
    elif op == 72:
        m.decorations[a[0], a[1], a[2]] = a[3] if len(a) > 3 else 0
    elif op in (20, 21, 22):
        m.types[a[0]] = Type({20: "bool", 21: "int", 22: "float"}[op], a[1] if op > 20 else 32)
    elif op == 23:
        m.types[a[0]] = Type("vector", of=(a[1],), count=a[2])
    elif op in (28, 29):
        m.types[a[0]] = Type("array", of=(a[1],), count=m.constants.get(a[2], 0) if op == 28 else 0)
    elif op == 30:
        m.types[a[0]] = Type("struct", of=a[1:])
    elif op == 32:
        m.types[a[0]] = Type("pointer", of=(a[2],), storage=a[1])
    elif op in (19, 25, 26, 27, 33):
        m.types[a[0]] = Type("other")
    elif op in (41, 42, 43, 44, 46, 48, 49, 50, 51):
        m.result[a[1]] = a[0]
        t = m.types[a[0]]
        m.constants[a[1]] = (int(op in (41, 48)) if op in (41, 42, 48, 49) else [m.constants[x] for x in a[2:]]
                             if op in (44, 51) else 0 if op == 46 else a[2] if t.kind == "int" else None)
    elif op == 59:
        m.variables[a[1]] = (a[0], a[2])


class _Thread:
    """One work item of the first group."""

    def __init__(self, m: Module, block: bytes, binding: int, item: int, size: Sequence[int], group: Sequence[int]
                 ) -> None:
        self.m, self.block, self.binding = m, block, binding
        self.values: dict[int, Any] = dict(m.constants)
        self.memory: dict[int, Any] = {}
        whole, local = (*size, 1, 1, 1)[:3], (*group, 1, 1, 1)[:3]
        self.known = [list(row) for row in zip(
            (0, item, local[0], whole[0] // local[0]), (0, 0, local[1], whole[1] // local[1]),
            (0, 0, local[2], whole[2] // local[2]), strict=True)]
        for v, (type_, _) in m.variables.items():
            self.values[v] = Pointer(v, (), m.types[type_].of[0])

    def follow(self) -> Mix:
        out: Mix = {}
        m, at, steps, label, before = self.m, 0, 0, -1, -1
        while at < len(m.code):
            op, a = m.code[at]
            at += 1
            steps += 1
            if steps > OWN:
                raise NotRead(f"more than {OWN} instructions")
            if op == 248:
                label, before = a[0], label
            elif op == 249:
                at = m.labels[a[0]]
            elif op == 250:
                taken = self.values.get(a[0])
                if taken is None:
                    raise NotRead("where the shader goes hangs on data")
                at = m.labels[a[1] if taken else a[2]]
            elif op in (253, 254):
                return out
            elif op in (251, 252, 255, 57):
                raise NotRead("the shader has a switch, a call or an end that is not followed")
            elif op == 245:
                self.values[a[1]] = next((self.values.get(v) for v, b in zip(a[2::2], a[3::2], strict=True)
                                          if b == before), None)
            else:
                self._step(op, a, out)
        raise NotRead("the SPIR-V function does not end")

    def _step(self, op: int, a: tuple[int, ...], out: Mix) -> None:
        m, values = self.m, self.values
        if op == 59:
            self.memory[a[1]] = values.get(a[3]) if len(a) > 3 else None
        elif op == 61:
            values[a[1]] = self._load(values[a[2]], a[0], out)
        elif op == 62:
            self._store(values[a[0]], a[1], out)
        elif op in (65, 66):
            base = values[a[2]]
            path = (*base.path, *(values.get(x) for x in a[3:]))
            values[a[1]] = Pointer(base.variable, path, m.types[a[0]].of[0])
        elif op == 224:
            add(out, {"barriers": 1})
        elif op in (88, 95, 98):  # of images
            add(out, {"load bytes": m.size(a[0])})
            values[a[1]] = None
        elif op == 99:
            add(out, {"store bytes": m.size(m.result[a[2]])})
        elif op in DOTS:
            add(out, {"fma int8": 4})
            values[a[1]] = None
        elif op == 148:
            kind, lanes = m.element(m.result[a[2]])
            add(out, {f"mul {kind}": lanes, f"add {kind}": lanes - 1})
            values[a[1]] = None
        elif op == 12:
            if a[3] in EXTENDED:
                kind, lanes = m.element(a[0])
                add(out, {f"{EXTENDED[a[3]]} {kind}": lanes})
            values[a[1]] = self._least(a) if a[3] in (38, 41) else None
        elif len(a) > 1 and a[0] in m.types:
            if op in COUNTED:
                kind, lanes = m.element(a[0])
                add(out, {f"{COUNTED[op]} {kind}": lanes})
            values[a[1]] = self._value(op, a)
            if op in (128, 130) and values[a[1]] is None:
                add(out, {SUMS: m.element(a[0])[1]})

    def _least(self, a: tuple[int, ...]) -> int | None:
        x, y = (self.values.get(v) for v in a[4:6])
        return (min if a[3] == 38 else max)(x, y) if isinstance(x, int) and isinstance(y, int) else None

    def _value(self, op: int, a: tuple[int, ...]) -> Any:
        given = [self.values.get(x) for x in a[2:]] if op not in (81, 82, 79) else []
        if op == 80:
            return given if self.m.types[a[0]].kind != "vector" or len(given) == self.m.types[a[0]].count else None
        if op == 81:
            found = self.values.get(a[2])
            for k in a[3:]:
                found = found[k] if isinstance(found, list) and k < len(found) else None
            return found
        if op in (83, 113, 124):
            return given[0] if self.m.types[a[0]].kind in ("int", "bool") else None
        if op == 169:
            if isinstance(given[0], int):
                return given[1] if given[0] else given[2]
            return given[1] if given[1] == given[2] else None
        if op == 168:
            return None if given[0] is None else int(not given[0])
        if op in SCALARS and isinstance(x := given[0], int) and isinstance(y := given[1], int):
            return int(SCALARS[op](x, y)) & WORD
        return None

    # memory

    def _load(self, pointer: Pointer, type_: int, out: Mix) -> Any:
        t, storage = self.m.variables[pointer.variable]
        if storage in OWN_CLASSES:
            return self._walk(self.memory.get(pointer.variable), pointer.path)
        builtin = self.m.decorations.get((pointer.variable, -1, 11))
        if builtin in BUILTINS:
            return self._walk([axis[BUILTINS[builtin]] for axis in self.known], pointer.path)
        if builtin == 29:
            return self.known[0][1]
        if self._is_block(pointer.variable, storage):
            offset = self._offset(self.m.types[t].of[0], pointer.path)
            return None if offset is None else self._read(offset, type_)
        if self.m.types[type_].kind != "other":
            add(out, {"load bytes": self.m.size(type_)})
        return None

    def _store(self, pointer: Pointer, value: int, out: Mix) -> None:
        storage = self.m.variables[pointer.variable][1]
        if storage not in OWN_CLASSES:
            add(out, {"store bytes": self.m.size(self.m.result[value])})
        elif not pointer.path:
            self.memory[pointer.variable] = self.values.get(value)
        else:
            self.memory[pointer.variable] = None  # a part of it: none of it is known

    @staticmethod
    def _walk(value: Any, path: Sequence[int | None]) -> Any:
        for k in path:
            value = value[k] if isinstance(value, list) and k is not None and k < len(value) else None
        return value

    def _is_block(self, variable: int, storage: int) -> bool:
        return storage == PUSH if self.binding < 0 else (
            storage == UNIFORM and self.m.decorations.get((variable, -1, 33)) == self.binding)

    def _offset(self, type_: int, path: Sequence[int | None]) -> int | None:
        """Bytes into the block."""
        offset = 0
        for k in path:
            t = self.m.types[type_]
            if k is None:
                return None
            if t.kind == "struct":
                offset += self.m.decorations.get((type_, k, 35), 0)
                type_ = t.of[k]
            else:
                stride = self.m.decorations.get((type_, -1, 6), int(self.m.size(t.of[0])))
                offset, type_ = offset + k * stride, t.of[0]
        return offset

    def _read(self, offset: int, type_: int) -> Any:
        t = self.m.types[type_]
        if t.kind == "int" and offset + 4 <= len(self.block):
            return int.from_bytes(self.block[offset:offset + 4], "little")
        if t.kind == "vector":
            return [self._read(offset + k * int(self.m.size(t.of[0])), t.of[0]) for k in range(t.count)]
        return None
