"""What x86-64 instructions change in what is known. One that is not here makes what it writes unknown. Source: as in
npulab.gpu.counting.x86.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npulab.gpu.counting import x86_lanes, x86_masks
from npulab.gpu.counting.x86_state import NAMES, RAX, RBP, RDX, RSP, Known, State, Step


def step(s: State, i: Any, name: str) -> Step | None:
    """What an instruction changes in what is known; None: nothing."""
    if name.startswith(("nop", "endbr", "prefetch", "vzero", "lfence", "mfence", "sfence")):
        return None
    ops = i.operands
    if name in ARITHMETIC and len(ops) == 2:
        return arithmetic(s, i, name)
    if name in ("mov", "movabs", "movzx"):
        read, write = s.reader(i, ops[1]), s.writer(i, ops[0])
        return lambda: write(read())
    if name in ("movsx", "movsxd"):
        read, write, low, high = s.reader(i, ops[1]), s.writer(i, ops[0]), ops[1].size, ops[0].size
        return lambda: write(extended(read(), 8 * low, 8 * high))
    if name == "lea":
        address, write = s.address(i, ops[1]), s.writer(i, ops[0])
        return lambda: write(address())
    if name in ("inc", "dec", "neg", "not"):
        return unary(s, i, name)
    if name in ("shl", "sal", "shr", "sar", "shlx", "shrx", "sarx", "rorx", "rol", "ror"):
        return shift(s, i, name)
    if name == "imul" and len(ops) > 1:
        a, b = s.reader(i, ops[-2]), s.reader(i, ops[-1])
        write, bits = s.writer(i, ops[0]), 8 * ops[0].size

        def multiply() -> None:
            x, y = a(), b()
            write(None if x is None or y is None else x * y & ((1 << bits) - 1))
            s.cf = s.zf = s.sf = s.of = None

        return multiply
    if name in ("mul", "div"):
        return wide(s, i, name)
    if name.startswith("cmov"):
        condition, read = s.condition(name[4:]), s.reader(i, ops[1])
        old, write = s.reader(i, ops[0]), s.writer(i, ops[0])

        def choose() -> None:
            taken = condition()
            a, b = read(), old()
            write(a if taken else b if taken is False else a if a == b else None)

        return choose
    if name.startswith("set"):
        condition, write = s.condition(name[3:]), s.writer(i, ops[0])

        def setcc() -> None:
            taken = condition()
            write(None if taken is None else int(taken))

        return setcc
    if name == "push":
        read = s.reader(i, ops[0])
        return lambda: s.push(read())
    if name == "pop":
        write = s.writer(i, ops[0])
        return lambda: write(s.pop())
    if name == "leave":
        def leave() -> None:
            s.r[RSP] = s.r[RBP]
            s.r[RBP] = s.pop()

        return leave
    if name == "xchg":
        one, two = s.reader(i, ops[0]), s.reader(i, ops[1])
        first, second = s.writer(i, ops[0]), s.writer(i, ops[1])

        def exchange() -> None:
            x, y = one(), two()
            first(y)
            second(x)

        return exchange
    def tested(zero: bool | None, carry: bool | None) -> None:
        s.zf, s.cf, s.sf, s.of = zero, carry, False, False

    if s.lanes and (does := x86_lanes.step(s, i)):
        return does
    lost = x86_lanes.forget(s, i) if s.lanes and "scatter" not in name else None
    if masks := x86_masks.step(s.masks, i, name, s.cs.x86, lambda op: s.reader(i, op), lambda op: s.writer(i, op),
                               tested):
        return masks if name.startswith(("kmov", "kortest", "ktest")) else both(both(unknown(s, i), lost), masks)
    return both(unknown(s, i), lost)


def unknown(s: State, i: Any) -> Step | None:
    """What it writes is not known any more: registers, flags, places of the stack."""
    cs = s.cs.x86
    _, written = i.regs_access()
    registers = {NAMES[n][0] for n in map(i.reg_name, written) if n in NAMES}
    writers = []
    if i.operands:
        first = i.operands[0]
        if first.type == cs.X86_OP_REG and i.reg_name(first.reg) in NAMES:
            registers.add(NAMES[i.reg_name(first.reg)][0])
        elif first.type == cs.X86_OP_MEM:
            writers.append(s.writer(i, first))
    flags = "rflags" in map(i.reg_name, written)
    if not (registers or writers or flags):
        return None

    def forget() -> None:
        for register in registers:
            s.r[register] = s.low[register] = None
        for write in writers:
            write(None)
        if flags:
            s.cf = s.zf = s.sf = s.of = None

    return forget


def arithmetic(s: State, i: Any, name: str) -> Step:
    ops, bits = i.operands, 8 * i.operands[0].size
    a, b, write = s.reader(i, ops[0]), s.reader(i, ops[1]), s.writer(i, ops[0])
    mask, top = (1 << bits) - 1, 1 << (bits - 1)
    same = ops[0].type == ops[1].type == s.cs.x86.X86_OP_REG and ops[0].reg == ops[1].reg
    keep = name in ("cmp", "test")
    logic = ARITHMETIC[name] if name in ("and", "or", "xor", "test") else None
    if same and name in ("xor", "sub"):
        def zero() -> None:
            write(0)
            s.flags(0, bits, False, False)

        return zero

    def run() -> None:
        x, y = a(), b()
        if x is None or y is None:
            if not keep:
                write(0 if name == "and" and (x == 0 or y == 0) else None)
            s.cf = s.zf = s.sf = s.of = None
            return
        y &= mask
        carry: int | None = 0
        if name in ("adc", "sbb"):
            carry = None if s.cf is None else int(s.cf)
            if carry is None:
                write(None)
                s.flags(None, bits, None, None)
                return
        if logic:
            value, cf, of = logic(x, y), False, False
        elif name in ("add", "adc"):
            whole = x + y + carry
            value, cf = whole & mask, whole > mask
            of = bool((x ^ value) & (y ^ value) & top)
        else:
            value, cf = (x - y - carry) & mask, x < y + carry
            of = bool((x ^ y) & (x ^ value) & top)
        s.flags(value, bits, cf, of)
        if not keep:
            write(value)

    return run


def unary(s: State, i: Any, name: str) -> Step:
    op = i.operands[0]
    bits, read, write = 8 * op.size, s.reader(i, op), s.writer(i, op)
    mask = (1 << bits) - 1

    def run() -> None:
        x = read()
        if x is None:
            write(None)
            if name != "not":
                s.flags(None, bits, s.cf if name != "neg" else None, None)
            return
        value = {"inc": x + 1, "dec": x - 1, "neg": -x, "not": ~x}[name] & mask
        write(value)
        if name != "not":
            edge = 1 << (bits - 1)
            of = value == (edge - 1 if name == "dec" else edge)
            s.flags(value, bits, x != 0 if name == "neg" else s.cf, of)

    return run


def shift(s: State, i: Any, name: str) -> Step:
    ops = i.operands
    read = s.reader(i, ops[0] if len(ops) < 3 else ops[1])
    by = s.reader(i, ops[-1]) if len(ops) > 1 else lambda: 1
    write, bits = s.writer(i, ops[0]), 8 * ops[0].size
    mask, flags = (1 << bits) - 1, not name.endswith("x")

    def run() -> None:
        x, n = read(), by()
        value: Known = None
        if x is not None and n is not None:
            n &= 63 if bits == 64 else 31
            kind = name.rstrip("x")
            if kind in ("shl", "sal"):
                value = x << n & mask
            elif kind == "shr":
                value = x >> n
            elif kind == "sar":
                value = (x - (x >> (bits - 1) << bits)) >> n & mask
            else:
                n = (n if kind == "ror" else -n) % bits
                value = (x >> n | x << (bits - n)) & mask
        write(value)
        if flags and not (n == 0 and value is not None):
            s.flags(value if name[0] == "s" else None, bits, None, None)

    return run


def wide(s: State, i: Any, name: str) -> Step:
    """mul, div: of rdx:rax."""
    op = i.operands[0]
    bits, read = 8 * op.size, s.reader(i, op)
    mask = (1 << bits) - 1

    def run() -> None:
        x, low, high = read(), s.r[RAX], s.r[RDX]
        s.cf = s.zf = s.sf = s.of = None
        s.r[RAX] = s.r[RDX] = s.low[RAX] = s.low[RDX] = None
        if bits < 32 or x is None or low is None or (high is None and name == "div"):
            return
        if name == "mul":
            whole = (low & mask) * x
            s.r[RAX], s.r[RDX] = whole & mask, whole >> bits
        elif x and high is not None:
            whole = (high & mask) << bits | low & mask
            s.r[RAX], s.r[RDX] = whole // x & mask, whole % x

    return run


def both(one: Step | None, two: Step | None) -> Step | None:
    if one is None or two is None:
        return one or two

    def run() -> None:
        one()
        two()

    return run


ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "and": int.__and__, "test": int.__and__, "or": int.__or__, "xor": int.__xor__,
    **dict.fromkeys(("add", "adc", "sub", "sbb", "cmp"), int.__add__)}


def extended(value: Known, low: int, high: int) -> Known:
    """With its sign, from `low` bits to `high`."""
    return None if value is None else (value - (value >> (low - 1) << low)) & ((1 << high) - 1)
