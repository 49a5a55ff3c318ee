"""SPIR-V followed through, compute shaders and OpenCL's kernels: integers computed, what is computed on data counted.
It is what a driver is given; what it makes of it is not seen.

Source: SPIR-V Specification 1.6, section 3; GLSL.std.450 and OpenCL.std (extended instructions).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from npulab.gpu.counting.mix import OWN, SUMS, TEXELS, Argument, Counted, Mix, NotRead, add
from npulab.gpu.counting.spirv_module import Module, parse
from npulab.gpu.counting.turns import of_a_turn

CODE = "SPIR-V, as the driver is given it"
INPUT, UNIFORM, PRIVATE, FUNCTION, GENERIC, PUSH = 1, 2, 6, 7, 8, 9
OWN_CLASSES = (PRIVATE, FUNCTION)
WALKED = (INPUT, UNIFORM, PUSH, *OWN_CLASSES)
"""Classes of variables whose parts are told apart; of the others' content nothing is known."""
PARTS_MOST, CALLS_MOST = 16, 64
"""Of a way to a part of a variable, of calls in each other. Source: assumed."""
COUNTED = {126: "add", 127: "add", 128: "add", 129: "add", 130: "add", 131: "add", 132: "mul", 133: "mul", 134: "div",
           135: "div", 136: "div", 142: "mul"}
EXTENDED = {"GLSL.std.450": {50: "fma", 31: "sqrt", 32: "rsqrt"},
            "OpenCL.std": {26: "fma", 42: "fma", 61: "sqrt", 79: "sqrt", 93: "sqrt", 56: "rsqrt", 77: "rsqrt",
                           91: "rsqrt", 68: "div", 82: "div", 167: "fma", 168: "fma", 169: "mul", 170: "mul"}}
"""fma, mad, sqrt, rsqrt, half_ and native_ ones, divisions, mad24 and mul24."""
LEAST: dict[str, dict[int, Callable[[int, int], int]]] = {"GLSL.std.450": {38: min, 41: max},
                                                          "OpenCL.std": {159: min, 157: max}}
VLOAD, VSTORE, HALVES = 171, 172, range(173, 182)
"""Of OpenCL.std; those of halves in memory are not followed."""
DOTS = range(4450, 4456)
"""Of four bytes in a word, to a word."""
SCALARS: dict[int, Callable[[int, int, int], int]] = {
    128: lambda a, b, n: a + b, 130: lambda a, b, n: a - b, 132: lambda a, b, n: a * b,
    134: lambda a, b, n: a // b if b else 0, 137: lambda a, b, n: a % b if b else 0,
    194: lambda a, b, n: a >> (b % n), 195: lambda a, b, n: signed(a, n) >> (b % n),
    196: lambda a, b, n: a << (b % n), 197: lambda a, b, n: a | b, 198: lambda a, b, n: a ^ b,
    199: lambda a, b, n: a & b, 164: lambda a, b, n: a == b, 165: lambda a, b, n: a != b,
    166: lambda a, b, n: a | b, 167: lambda a, b, n: a & b, 170: lambda a, b, n: a == b, 171: lambda a, b, n: a != b,
    172: lambda a, b, n: a > b, 173: lambda a, b, n: signed(a, n) > signed(b, n), 174: lambda a, b, n: a >= b,
    175: lambda a, b, n: signed(a, n) >= signed(b, n), 176: lambda a, b, n: a < b,
    177: lambda a, b, n: signed(a, n) < signed(b, n), 178: lambda a, b, n: a <= b,
    179: lambda a, b, n: signed(a, n) <= signed(b, n)}
"""By opcode, of numbers of n bits."""
BUILTINS = {24: 3, 25: 2, 26: 0, 27: 1, 28: 1, 31: 4, 32: 2, 33: 0}
"""NumWorkgroups, WorkgroupSize, WorkgroupId, LocalInvocationId, GlobalInvocationId, GlobalSize, EnqueuedWorkgroupSize,
GlobalOffset -> a column of what is known; the group is the first."""
FUNCTIONS = {"get_num_groups": 24, "get_local_size": 25, "get_group_id": 26, "get_local_id": 27, "get_global_id": 28,
             "get_global_size": 31, "get_enqueued_local_size": 32, "get_global_offset": 33}
"""The same as functions of OpenCL C, where a module calls them (_Z13get_global_idj)."""
LINEAR = (29, 34)  # LocalInvocationIndex, GlobalLinearId
DAMAGED = (struct.error, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What comes of reading words that are not what they should be."""
T = TypeVar("T")


def signed(value: int, bits: int = 32) -> int:
    return value - (value >> (bits - 1) << bits)


@dataclass(frozen=True, slots=True)
class Pointer:
    """path: to a part of the variable; (None,) where that is not known, or does not matter."""

    variable: int
    path: tuple[int | None, ...]
    type: int
    storage: int


def count(module: bytes, size: Sequence[int], group: Sequence[int], block: bytes, turns: int, binding: int = -1,
          entry: str = "main") -> Counted:
    """A turn of a shader's loop, in each work item: of the group's first, middle and last.

    block  content of the shader's arguments: the uniform block at `binding`, or its push constants (-1).
    turns  the place in it, in bytes, of how often the loop turns, a word.
    """
    def of(many: int) -> Callable[[Module, int], _Thread]:
        known = block[:turns] + many.to_bytes(4, "little") + block[turns + 4:]
        return lambda m, item: _Thread(m, item, size, group, known, binding)

    return _count(module, entry, followed(group), of)


def count_kernel(module: bytes, kernel: str, size: Sequence[int], group: Sequence[int], arguments: Sequence[Argument],
                 turns: int) -> Counted:
    """As `count`, of a kernel of OpenCL. Argument number `turns` is how often the loop turns."""
    def of(many: int) -> Callable[[Module, int], _Thread]:
        given = [many.to_bytes(4, "little") if k == turns else a for k, a in enumerate(arguments)]
        return lambda m, item: _Thread(m, item, size, group, arguments=given)

    return _count(module, kernel, followed(group), of)


def followed(group: Sequence[int]) -> list[int]:
    """Work items that stand for all: the group's first, middle and last."""
    return sorted({0, group[0] // 2, group[0] - 1})


def _count(module: bytes, entry: str, items: Sequence[int], of: Callable[[int], Callable[[Module, int], _Thread]]
            ) -> Counted:
    """of: how often the loop turns -> (module, work item) -> what goes through it."""
    try:
        m = sound(lambda: parse(module, entry))
    except NotRead as e:
        return Counted(None, CODE, why=str(e))

    def follow(many: int) -> Mix:
        out: Mix = {}
        for item in items:
            add(out, sound(lambda item=item: of(many)(m, item).follow()))  # type: ignore[misc]
        return out

    return of_a_turn(follow, len(items), CODE)


def sound(read: Callable[[], T]) -> T:
    """Raises: NotRead of a damaged module."""
    try:
        return read()
    except DAMAGED:
        raise NotRead("the SPIR-V module is damaged, or not of a kind that is followed") from None


def whole(module: bytes, size: Sequence[int], group: Sequence[int], entry: str = "main") -> Mix:
    """What the first row of the first group's work items do in all, of a shader without arguments. Raises: NotRead."""
    m, out = parse(module, entry), Mix()
    for item in range(group[0]):
        add(out, _Thread(m, item, size, group).follow())
    return out


class _Thread:
    """One work item of the first group."""

    def __init__(self, m: Module, item: int, size: Sequence[int], group: Sequence[int], block: bytes = b"",
                 binding: int = 0, arguments: Sequence[Argument] = ()) -> None:
        self.m, self.item, self.block, self.binding = m, item, block, binding
        self.values: dict[int, Any] = dict(m.constants)
        self.memory: dict[int, Any] = {}
        whole, local = (*size, 1, 1, 1)[:3], (*group, 1, 1, 1)[:3]
        self.known = [[0, item if axis == 0 else 0, local[axis], whole[axis] // local[axis], whole[axis]]
                      for axis in range(3)]
        for v, (type_, storage) in m.variables.items():
            self.values[v] = Pointer(v, (), m.types[type_].of[0], storage)
        for p, given in zip(m.parameters[m.entry], arguments, strict=False):
            t = m.types[m.result[p]]
            if t.kind == "pointer" and given is None:
                self.values[p] = Pointer(p, (None,), t.of[0], t.storage)
            elif t.kind == "int" and isinstance(given, bytes):
                self.values[p] = int.from_bytes(given, "little")

    def follow(self) -> Mix:
        out: Mix = {}
        m, values = self.m, self.values
        at, steps, label, before = m.functions[m.entry], 0, -1, -1
        calls: list[tuple[int, int, int, int]] = []
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
            elif op in (250, 251):
                taken = values.get(a[0])
                if taken is None:
                    raise NotRead("where the code goes hangs on data")
                at = m.labels[(a[1] if taken else a[2]) if op == 250 else self._case(taken, a)]
            elif op in (253, 254):
                if not calls:
                    return out
                at, result, label, before = calls.pop()
                values[result] = values.get(a[0]) if op == 254 else None
            elif op == 57 and a[2] in m.functions:
                if len(calls) >= CALLS_MOST:
                    raise NotRead(f"more than {CALLS_MOST} calls in each other")
                calls.append((at, a[1], label, before))
                for p, v in zip(m.parameters[a[2]], a[3:], strict=True):
                    values[p] = values.get(v)
                at = m.functions[a[2]]
            elif op in (252, 255):
                raise NotRead("the code has an end that is not followed")
            elif op == 245:
                first = at - 1
                while m.code[at][0] == 245:
                    at += 1
                came = [next((values.get(v) for v, b in zip(p[2::2], p[3::2], strict=True) if b == before), None)
                        for _, p in m.code[first:at]]  # all at once
                values.update(zip((p[1] for _, p in m.code[first:at]), came, strict=True))
            else:
                self._step(op, a, out)
        raise NotRead("the SPIR-V function does not end")

    def _case(self, value: int, a: tuple[int, ...]) -> int:
        """The label of a switch."""
        words = 2 if self.m.bits(self.m.result[a[0]]) > 32 else 1
        for k in range(2, len(a), words + 1):
            if value == sum(a[k + i] << 32 * i for i in range(words)):
                return a[k + words]
        return a[1]

    def _step(self, op: int, a: tuple[int, ...], out: Mix) -> None:
        m, values = self.m, self.values
        if op == 59:
            self.memory[a[1]] = values.get(a[3]) if len(a) > 3 else None
        elif op == 61:
            values[a[1]] = self._load(values[a[2]], a[0], out)
        elif op == 62:
            self._store(values[a[0]], m.size(m.result[a[1]]), values.get(a[1]), out)
        elif op in (63, 64):
            bytes_ = m.size(values[a[0]].type) if op == 63 else values[a[2]]
            if values[a[1]].storage not in OWN_CLASSES:
                add(out, {"load bytes": bytes_, "loads": 1})
            self._store(values[a[0]], bytes_, None, out)
        elif op in (65, 66, 67, 70):
            values[a[1]] = self._part(values[a[2]], a[3:], m.types[a[0]].of[0], op > 66)
        elif op == 224:
            add(out, {"barriers": 1})
        elif op in (88, 95, 98):  # of images
            add(out, {"texel bytes": m.size(a[0]), TEXELS: 1})
            values[a[1]] = None
        elif op == 99:
            add(out, {"store bytes": m.size(m.result[a[2]]), "stores": 1})
        elif op in DOTS:
            add(out, {"fma int8": 4})
            values[a[1]] = None
        elif op == 148:
            kind, lanes = m.element(m.result[a[2]])
            add(out, {f"mul {kind}": lanes, f"add {kind}": lanes - 1})
            values[a[1]] = None
        elif op == 12:
            values[a[1]] = self._extended(a, out)
        elif op == 57:
            values[a[1]] = self._elsewhere(a, out)
        elif len(a) > 1 and a[0] in m.types:
            if op in COUNTED:
                kind, lanes = m.element(a[0])
                add(out, {f"{COUNTED[op]} {kind}": lanes})
            values[a[1]] = self._value(op, a)
            if op in (128, 130) and m.bits(a[0]) == 32:
                known = values[a[1]] if isinstance(values[a[1]], list) else [values[a[1]]] * m.types[a[0]].count
                add(out, {SUMS: sum(v is None for v in known)})

    def _extended(self, a: tuple[int, ...], out: Mix) -> int | None:
        set_, number = self.m.sets.get(a[2], ""), a[3]
        if number in EXTENDED.get(set_, {}):
            kind, lanes = self.m.element(a[0])
            add(out, {f"{EXTENDED[set_][number]} {kind}": lanes})
        if set_ == "OpenCL.std":
            if number in HALVES:
                add(out, {"calls": 1})
            elif number == VLOAD and self.values[a[5]].storage not in OWN_CLASSES:
                add(out, {"load bytes": self.m.size(a[0]), "loads": 1})
            elif number == VSTORE:
                self._store(self.values[a[6]], self.m.size(self.m.result[a[4]]), None, out)
        if number in LEAST.get(set_, {}):
            x, y = (self.values.get(v) for v in a[4:6])
            return LEAST[set_][number](x, y) if isinstance(x, int) and isinstance(y, int) else None
        return None

    def _elsewhere(self, a: tuple[int, ...], out: Mix) -> int | None:
        """A call of a function that is not in the module."""
        name = self.m.names.get(a[2], "").removeprefix("_Z").lstrip("0123456789")
        if name in ("get_work_dim", "get_work_dimv"):
            return None  # no place hangs on it
        builtin = FUNCTIONS.get(name.removesuffix("j"))
        if builtin is None:
            add(out, {"calls": 1})
            return None
        axis = self.values.get(a[3])
        return None if axis is None else self.known[axis][BUILTINS[builtin]]

    def _value(self, op: int, a: tuple[int, ...]) -> Any:
        t = self.m.types[a[0]]
        given = [self.values.get(x) for x in a[2:]] if op not in (79, 81, 82) else []
        if op == 79:
            lanes = [v for x in a[2:4] for v in self._lanes(x)]
            return [lanes[k] if k < len(lanes) else None for k in a[4:]]
        if op == 80:
            return given if t.kind == "vector" and len(given) == t.count and not any(
                isinstance(v, list) for v in given) else None
        if op == 81:
            return self._walk(self.values.get(a[2]), a[3:])
        if op == 82:
            if t.kind != "vector" or len(a) != 5:
                return None
            lanes = list(self._lanes(a[3]))
            lanes[a[4]] = self.values.get(a[2])
            return lanes
        if t.kind == "pointer" and op in (83, 121, 122, 123, 124) and isinstance(p := given[0], Pointer):
            storage = p.storage if t.storage == GENERIC else t.storage
            return Pointer(p.variable, p.path if t.of[0] == p.type else (None,), t.of[0], storage)
        if op == 169:
            if isinstance(given[0], int):
                return given[1] if given[0] else given[2]
            return given[1] if isinstance(given[1], int) and given[1] == given[2] else None
        if t.kind == "vector" and given and all(isinstance(v, list) and len(v) == t.count for v in given):
            return [self._number(op, a, v) for v in zip(*given, strict=True)]
        return self._number(op, a, given)

    def _lanes(self, vector: int) -> list[Any]:
        found = self.values.get(vector)
        return found if isinstance(found, list) else [None] * self.m.types[self.m.result[vector]].count

    def _number(self, op: int, a: tuple[int, ...], given: Sequence[Any]) -> int | None:
        """A number, or one of a vector's."""
        t = self.m.types[a[0]]
        kind, bits = (self.m.types[t.of[0]].kind if t.kind == "vector" else t.kind), self.m.bits(a[0])
        if kind not in ("int", "bool") or not given or not all(isinstance(v, int) for v in given):
            return None
        own = self.m.bits(self.m.result[a[2]])
        if op in (83, 113, 124):
            return int(given[0]) & ((1 << bits) - 1) if op != 124 or own == bits else None
        if op == 114:
            return signed(int(given[0]), own) & ((1 << bits) - 1)
        if op == 168:
            return int(not given[0])
        if op in SCALARS and len(given) == 2:
            return int(SCALARS[op](given[0], given[1], own)) & ((1 << bits) - 1)
        return None

    # memory

    def _part(self, base: Pointer, places: Sequence[int], type_: int, of_array: bool) -> Pointer:
        """of_array: the first place is how many of what is pointed to further on."""
        found = [self.values.get(x) for x in places]
        path = (*base.path, *found[1:]) if of_array and found[0] == 0 else (
            (None,) if of_array else (*base.path, *found))
        if len(path) > PARTS_MOST:
            raise NotRead("a part of a variable is too deep in it")
        unknown = base.storage not in WALKED or not all(isinstance(k, int) for k in path)
        return Pointer(base.variable, (None,) if unknown else path, type_, base.storage)

    def _load(self, pointer: Pointer, type_: int, out: Mix) -> Any:
        if pointer.storage in OWN_CLASSES:
            return self._walk(self.memory.get(pointer.variable), pointer.path)
        builtin = self.m.decorations.get((pointer.variable, -1, 11))
        if builtin in BUILTINS:
            return self._walk([axis[BUILTINS[builtin]] for axis in self.known], pointer.path)
        if builtin in LINEAR:
            return self.item
        if self._is_block(pointer.variable, pointer.storage):
            type_of_all = self.m.types[self.m.variables[pointer.variable][0]].of[0]
            offset = self._offset(type_of_all, pointer.path)
            return None if offset is None else self._read(offset, type_)
        if self.m.types[type_].kind != "other":
            add(out, {"load bytes": self.m.size(type_), "loads": 1})
        return None

    def _store(self, pointer: Pointer, bytes_: float, value: Any, out: Mix) -> None:
        if pointer.storage not in OWN_CLASSES:
            add(out, {"store bytes": bytes_, "stores": 1})
        else:  # of a part none of it is known
            self.memory[pointer.variable] = None if pointer.path else value

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
