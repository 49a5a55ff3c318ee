"""Integers in vector registers, followed lane by lane: coordinates of images go that way, and places in memory, counts
of turns and masks where a compiler does several work items at once. What is not here, and numbers of floats, makes what
it writes unknown. Source: as in npulab.gpu.counting.x86.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from npulab.gpu.counting.x86_masks import mask_of

if TYPE_CHECKING:
    from npulab.gpu.counting.x86_state import State

Known = int | None
Lanes = tuple[Known, ...]
"""32 bits each, the lowest first: 16 of a register."""
Step = Callable[[], None]
WORDS = 16
ZERO: Lanes = (0,) * WORDS
NONE: Lanes = (None,) * WORDS
BITS = {"b": 8, "w": 16, "d": 32, "q": 64}
MOVE = re.compile(r"v?(movdq[au](8|16|32|64)?|mov[au]p[sd])$")
LOGIC = re.compile(r"v?(?:p(and|andn|or|xor)([dq]?)|(and|andn|or|xor)p([sd]))$")
ARITHMETIC = re.compile(r"v?p(add|sub|mull|minu|maxu|mins|maxs)([bwdq])$")
SHIFT = re.compile(r"v?p(sll|srl|sra)(v?)([wdq])$")
WIDER = re.compile(r"v?pmov(s|z)x([bwd])([wdq])$")
COMPARED = re.compile(r"vpcmp(eq|gt|lt|le|neq|nlt|nle)(u?)([bwdq])$")
TESTED = re.compile(r"vptest(n?)m([bwdq])$")
PART = re.compile(r"v(extract|insert)([fi])(128|32x4|64x2|32x8|64x4)$")
BROADCAST = re.compile(r"v(?:pbroadcast([bwdq])|broadcasts([sd])|broadcast[if](128|32x2|32x4|64x2|32x8|64x4))$")
COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq, "gt": operator.gt, "lt": operator.lt, "le": operator.le, "neq": operator.ne,
    "nlt": operator.ge, "nle": operator.gt}
COMPUTE: dict[str, Callable[[int, int], int]] = {
    "and": operator.and_, "andn": lambda a, b: ~a & b, "or": operator.or_, "xor": operator.xor, "add": operator.add,
    "sub": operator.sub, "mull": operator.mul, "minu": min, "maxu": max, "mins": min, "maxs": max}


def split(lanes: Sequence[Known], bits: int) -> list[Known]:
    """Elements of so many bits."""
    if bits == 32:
        return list(lanes)
    if bits == 64:
        return [None if a is None or b is None else b << 32 | a for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
    mask = (1 << bits) - 1
    return [None if x is None else x >> at & mask for x in lanes for at in range(0, 32, bits)]


def join(elements: Sequence[Known], bits: int) -> Lanes:
    if bits == 32:
        return tuple(elements)
    if bits == 64:
        return tuple(w for x in elements for w in ((None, None) if x is None else (x & 0xffff_ffff, x >> 32)))
    each = 32 // bits
    return tuple(None if None in (part := elements[k:k + each]) else
                 sum(x << bits * j for j, x in enumerate(part) if x) for k in range(0, len(elements), each))


def signed(value: int, bits: int) -> int:
    return value - (value >> (bits - 1) << bits)


def number(i: Any, cs: Any, op: Any) -> int:
    """Of a vector register, -1 of another operand."""
    name = str(i.reg_name(op.reg)) if op.type == cs.X86_OP_REG else ""
    return int(name[3:]) if name[1:3] == "mm" and name[0] in "xyz" else -1


def step(s: State, i: Any) -> Step | None:
    """What an instruction does to vector registers, or by them; None: it touches none, or is not known."""
    cs, name = s.cs.x86, i.mnemonic
    ops = [o for k, o in enumerate(i.operands) if not (k and mask_of(i, cs, o))]
    under = next((m for o in i.operands[1:] if (m := mask_of(i, cs, o))), "")
    if not ops or all(number(i, cs, o) < 0 for o in ops) or "gather" in name or "scatter" in name:
        return None
    return _between(s, i, name, ops) or _whole(s, i, name, ops, under)


def forget(s: State, i: Any) -> Step | None:
    """For any other instruction: what it writes is not known."""
    names = [i.reg_name(r) for r in i.regs_access()[1]] + [i.reg_name(o.reg) for o in i.operands[:1] if o.type == 1]
    written = {int(n[3:]) for n in names if n and n[1:3] == "mm" and n[0] in "xyz"}
    if not written:
        return None

    def lose() -> None:
        for register in written:
            s.vectors.pop(register, None)

    return lose


def _reader(s: State, i: Any, op: Any, bits: int, size: int) -> Callable[[], Lanes | None]:
    """`size` bytes of a register or of memory, or what is there for one element in all; None: nothing of it known."""
    cs = s.cs.x86
    if (register := number(i, cs, op)) >= 0:
        words = size // 4
        return lambda: None if (found := s.vectors.get(register)) is None else found[:words]
    if op.type != cs.X86_OP_MEM:
        return lambda: None
    address = s.address(i, op)
    times = size * 8 // bits if "{1to" in i.op_str else 1

    def read() -> Lanes | None:
        at = address()
        if at is None:
            return None
        if times > 1:
            return join([s.load(at, bits // 8)] * times, bits)
        if not s.holds(at, size) and s.elf.bytes_at(at, 1, constant=True) is None:
            return None
        return tuple(s.load(at + k, 4) for k in range(0, size, 4)) if size > 2 else (s.load(at, size),)

    return read


def _writer(s: State, i: Any, op: Any, under: str, bits: int) -> Callable[[Lanes | None], None]:
    """Under a mask: the other elements stay, or become 0."""
    register = number(i, s.cs.x86, op)
    zeroes = any(getattr(o, "avx_zero_opmask", False) for o in i.operands)
    legacy = i.mnemonic[0] != "v"
    address, size = s.address(i, op) if register < 0 else None, int(op.size)

    def write(value: Lanes | None) -> None:
        mask = s.masks.get(under) if under else -1
        if mask is None:
            value = None
        elif address is not None and value is not None:
            at = address()
            for k, x in enumerate(split(value, bits) if at is not None else ()):
                if mask >> k & 1:
                    s.store((at or 0) + k * bits // 8, bits // 8, x)
            return
        elif under:
            before = split((ZERO if zeroes else s.vectors.get(register, NONE))[:size // 4], bits)
            new = split(value or NONE[:size // 4], bits)
            value = join([new[k] if mask >> k & 1 else x for k, x in enumerate(before)], bits)
        if address is not None:
            s.store(address(), size, None)
        elif value is None or all(x is None for x in value):
            s.vectors.pop(register, None)
        else:
            rest = s.vectors.get(register, NONE)[len(value):] if legacy else ZERO[len(value):]
            s.vectors[register] = (*value, *rest)

    return write


def _whole(s: State, i: Any, name: str, ops: Sequence[Any], under: str) -> Step | None:
    """From vectors to a vector or a mask."""
    cs, first, last = s.cs.x86, ops[0], ops[-1]
    size = max(o.size for o in ops if number(i, cs, o) >= 0)
    two = ops[-2:] if len(ops) > 2 else ops

    def elementwise(bits: int, sources: Sequence[Any], compute: Callable[..., int], signs: bool = False) -> Step:
        reads = [_reader(s, i, o, bits, size) for o in sources]
        write, mask = _writer(s, i, first, under, bits), (1 << bits) - 1

        def run() -> None:
            given = [r() for r in reads]
            if None in given:
                return write(None)
            columns = [split(g, bits) for g in given if g is not None]
            if signs:
                columns = [[None if x is None else signed(x, bits) for x in c] for c in columns]
            return write(join([None if None in x else compute(*x) & mask for x in zip(*columns, strict=True)], bits))

        return run

    if m := MOVE.match(name):
        return elementwise(int(m[2]) if m[2] else 64 if name.endswith("pd") else 32, [last], lambda x: x)
    if m := LOGIC.match(name):
        bits = 64 if "q" in (m[2], m[4]) or m[4] == "d" else 32
        logic = m[1] or m[3]
        if logic == "xor" and number(i, cs, two[0]) == number(i, cs, two[1]) >= 0 and not under:
            write = _writer(s, i, first, "", bits)
            return lambda: write(ZERO[:size // 4])
        return elementwise(bits, two, COMPUTE[logic])
    if m := ARITHMETIC.match(name):
        return elementwise(BITS[m[2]], two, COMPUTE[m[1]], m[1] in ("mins", "maxs"))
    if name in ("pmuludq", "vpmuludq"):
        return elementwise(64, two, lambda a, b: (a & 0xffff_ffff) * (b & 0xffff_ffff))
    if (m := SHIFT.match(name)) and (m[2] or last.type == cs.X86_OP_IMM):
        return elementwise(BITS[m[3]], two if m[2] else [two[0]], _shift(m[1], BITS[m[3]], last, bool(m[2])))
    if m := WIDER.match(name):
        low, high = BITS[m[2]], BITS[m[3]]
        read, write = _reader(s, i, last, 32, max(4, size * low // high)), _writer(s, i, first, under, high)
        count = size * 8 // high

        signs = m[1] == "s"

        def widen() -> None:
            found = read()
            elements = [] if found is None else split(found, low)[:count]
            write(None if found is None else join([
                signed(x, low) & ((1 << high) - 1) if x is not None and signs else x for x in elements], high))

        return widen
    if (m := BROADCAST.match(name)) and first.size == size:
        return _broadcast(s, i, m, ops, size, under)
    if m := PART.match(name):
        return _part(s, i, m, ops, under)
    if name in ("pshufd", "vpshufd"):
        order = [last.imm >> 2 * (k & 3) & 3 | k & ~3 for k in range(size // 4)]
        read, write = _reader(s, i, ops[1], 32, size), _writer(s, i, first, under, 32)
        return lambda: write(None if (x := read()) is None else tuple(x[k] for k in order))
    if (m := re.match(r"v?pcmp(eq|gt)([bwdq])$", name)) and number(i, cs, first) >= 0:
        ones, compare = (1 << BITS[m[2]]) - 1, COMPARE[m[1]]
        if m[1] == "eq" and number(i, cs, two[0]) == number(i, cs, two[1]) >= 0:
            write = _writer(s, i, first, "", 32)
            return lambda: write((0xffff_ffff,) * (size // 4))
        return elementwise(BITS[m[2]], two, lambda a, b: ones * compare(a, b), m[1] == "gt")
    if (m := COMPARED.match(name) or TESTED.match(name)) and mask_of(i, cs, first):
        bits = BITS[m[m.lastindex or 0]]
        if m.re is TESTED:
            return _compare(s, i, mask_of(i, cs, first), under, two, bits, size,
                            _nothing_in_common if m[1] else _something_in_common, False)
        return _compare(s, i, mask_of(i, cs, first), under, two, bits, size, COMPARE[m[1]], not m[2])
    if name in ("vpternlogd", "vpternlogq") and last.imm == 0xff and not under:
        write = _writer(s, i, first, "", 32)
        return lambda: write((0xffff_ffff,) * (size // 4))
    if name in ("vpternlogd", "vpternlogq"):
        return elementwise(BITS[name[-1]], ops[:3], _of_three(int(last.imm)))
    return None


def _of_three(table: int) -> Callable[..., int]:
    """Bit by bit, the bit of a table that three bits are the number of."""
    def compute(*x: int) -> int:
        a, b, c = x
        return sum((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
                   for k in range(8) if table >> k & 1)  # no two of these have a bit in common

    return compute


def _something_in_common(a: int, b: int) -> bool:
    return a & b != 0


def _nothing_in_common(a: int, b: int) -> bool:
    return a & b == 0


def _shift(kind: str, bits: int, last: Any, by_lane: bool) -> Callable[..., int]:
    def shift(x: int, by: int) -> int:
        if kind == "sra":
            return signed(x, bits) >> min(by, bits - 1)
        return 0 if by >= bits else x << by if kind == "sll" else x >> by

    fixed = 0 if by_lane else int(last.imm)
    return shift if by_lane else lambda x: shift(x, fixed)


def _broadcast(s: State, i: Any, m: re.Match[str], ops: Sequence[Any], size: int, under: str) -> Step:
    bits = BITS[m[1]] if m[1] else {"s": 32, "d": 64}[m[2]] if m[2] else 32 * {
        "128": 4, "32x2": 2, "32x4": 4, "64x2": 4, "32x8": 8, "64x4": 8}[m[3]]
    write = _writer(s, i, ops[0], under, min(bits, 64))
    if ops[1].type == s.cs.x86.X86_OP_REG and number(i, s.cs.x86, ops[1]) < 0:
        integer = s.reader(i, ops[1])
        mask = (1 << bits) - 1
        return lambda: write(None if (x := integer()) is None else join([x & mask] * (size * 8 // bits), bits))
    if ops[1].type == s.cs.x86.X86_OP_MEM and bits < 32:
        address = s.address(i, ops[1])
        return lambda: write(None if (x := s.load(address(), bits // 8)) is None else join([x] * (size * 8 // bits),
                                                                                          bits))
    read = _reader(s, i, ops[1], 32, max(4, bits // 8))

    def spread() -> None:
        found = read()
        if found is None:
            write(None)
        elif bits < 32:
            write(join(split(found, bits)[:1] * (size * 8 // bits), bits))
        else:
            write(found * (size * 8 // bits))

    return spread


def _part(s: State, i: Any, m: re.Match[str], ops: Sequence[Any], under: str) -> Step:
    words, at = 8 if m[3] in ("32x8", "64x4") else 4, int(ops[-1].imm)
    whole = max(o.size for o in ops) // 4
    first = words * (at & (whole // words - 1))
    write = _writer(s, i, ops[0], under, 64 if m[3].startswith("64") else 32)
    read = _reader(s, i, ops[-3] if m[1] == "insert" else ops[1], 32, 4 * whole)
    if m[1] == "extract":
        return lambda: write(None if (x := read()) is None else x[first:first + words])
    piece = _reader(s, i, ops[-2], 32, 4 * words)

    def insert() -> None:
        x, y = read() or NONE[:whole], piece() or NONE[:words]
        write((*x[:first], *y, *x[first + words:]))

    return insert


def _compare(s: State, i: Any, mask: str, under: str, two: Sequence[Any], bits: int, size: int,
             to_mask: Callable[[int, int], bool], signs: bool) -> Step:
    reads = [_reader(s, i, o, bits, size) for o in two]
    same = number(i, s.cs.x86, two[0]) == number(i, s.cs.x86, two[1]) >= 0

    def run() -> None:
        a, b = (r() for r in reads)
        kept = s.masks.get(under) if under else -1
        if same and to_mask(0, 0) == to_mask(1, 1):  # whatever is in it
            a = b = ZERO[:size // 4]
        s.masks.pop(mask, None)
        if kept == 0:
            s.masks[mask] = 0
        if a is None or b is None or kept is None:
            return
        out = 0
        for k, (x, y) in enumerate(zip(split(a, bits), split(b, bits), strict=True)):
            if not kept >> k & 1:
                continue
            if x is None or y is None:
                return
            out |= to_mask(*((signed(x, bits), signed(y, bits)) if signs else (x, y))) << k
        s.masks[mask] = out

    return run


def _between(s: State, i: Any, name: str, ops: Sequence[Any]) -> Step | None:
    """From a vector to an integer, or the other way."""
    cs, name, legacy = s.cs.x86, name.removeprefix("v"), name[0] != "v"
    first, last = number(i, cs, ops[0]), number(i, cs, ops[-1])
    if name in ("movd", "movq", "movss", "movsd") and len(ops) == 2 and (name[3] in "dq" or min(first, last) < 0):
        bits = 64 if name in ("movq", "movsd") else 32
        def lowest() -> Known:
            return split(s.vectors.get(last, NONE)[:2], bits)[0]

        if first < 0:
            write = s.writer(i, ops[0])
            return lambda: write(lowest())
        read = lowest if last >= 0 else s.reader(i, ops[1])

        def alone() -> None:
            above = s.vectors.get(first, NONE) if legacy else ZERO
            s.vectors[first] = (*join([read()], bits), *ZERO[bits // 32:4], *above[4:])

        return alone
    if name in ("pinsrd", "pinsrq") and first >= 0:
        bits, at, from_ = BITS[name[-1]], int(ops[-1].imm), number(i, cs, ops[-3]) if len(ops) > 3 else first
        read = s.reader(i, ops[-2])

        def put() -> None:
            old = s.vectors.get(from_, NONE)
            elements = split(old[:4], bits)
            elements[at & (len(elements) - 1)] = read()
            s.vectors[first] = (*join(elements, bits), *(old if legacy else ZERO)[4:])

        return put
    if name in ("pextrd", "pextrq"):
        write, bits, at, from_ = s.writer(i, ops[0]), BITS[name[-1]], int(ops[2].imm), number(i, cs, ops[1])

        def take() -> None:
            elements = split(s.vectors.get(from_, NONE)[:4], bits)
            write(elements[at & (len(elements) - 1)])

        return take
    return None
