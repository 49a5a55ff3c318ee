"""Integers in the lanes of vector registers, followed from where they are put there one by one to where they are taken
out: coordinates of images go that way. What is computed in vectors is not known. Source: as in npulab.gpu.counting.x86.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Known = int | None
Lanes = tuple[Known, Known, Known, Known]
"""32 bits each, the lowest 128 of a register."""
NONE: Lanes = (None, None, None, None)
Read = Callable[[], Known]
Write = Callable[[Known], None]
MOVES = ("movdqa", "movdqu", "movaps", "movups", "movapd", "movupd", "movdqa32", "movdqu32", "movdqa64", "movdqu64")
EXCLUSIVE = ("pxor", "xorps", "xorpd", "pxord", "pxorq")


def parts(value: Known) -> tuple[Known, Known]:
    return (None, None) if value is None else (value & 0xffff_ffff, value >> 32)


def whole(low: Known, high: Known) -> Known:
    return None if low is None or high is None else high << 32 | low


def step(registers: dict[str, Lanes], i: Any, cs: Any, reader: Callable[[Any], Read], writer: Callable[[Any], Write]
         ) -> Callable[[], None] | None:
    """What an instruction does that puts lanes in or takes them out; None: it is none of those.

    registers  what is known, by the names "xmm0"...     reader, writer  of operands that are integers.
    """
    name, ops = i.mnemonic.removeprefix("v"), i.operands
    if not ops or any(o.type == cs.X86_OP_REG and i.reg_name(o.reg)[0] in "yzk" for o in ops):
        return None

    def vector(op: Any) -> str:
        text = str(i.reg_name(op.reg)) if op.type == cs.X86_OP_REG else ""
        return text if text.startswith("xmm") else ""

    first, last = vector(ops[0]), vector(ops[-1])
    if name in ("movd", "movq") and len(ops) == 2:
        wide = name == "movq"
        if first and last:
            return lambda: registers.update({first: (*registers.get(last, NONE)[:2], 0, 0)}) if wide else None
        if first:
            read = reader(ops[1])
            return lambda: registers.update({first: ((*parts(read()), 0, 0) if wide else (read(), 0, 0, 0))})
        write = writer(ops[0])
        return lambda: write(whole(*registers.get(last, NONE)[:2]) if wide else registers.get(last, NONE)[0])
    if name in ("pinsrd", "pinsrq") and first:
        read, from_, at = reader(ops[-2]), vector(ops[-3]) or first, int(ops[-1].imm)

        def put() -> None:
            lanes = list(registers.get(from_, NONE))
            if name == "pinsrd":
                lanes[at & 3] = read()
            else:
                lanes[2 * (at & 1):2 * (at & 1) + 2] = parts(read())
            registers[first] = (lanes[0], lanes[1], lanes[2], lanes[3])

        return put
    if name in ("pextrd", "pextrq"):
        write, from_, at = writer(ops[0]), vector(ops[1]), int(ops[2].imm)

        def take() -> None:
            lanes = registers.get(from_, NONE)
            write(lanes[at & 3] if name == "pextrd" else whole(*lanes[2 * (at & 1):2 * (at & 1) + 2]))

        return take
    if name in EXCLUSIVE and first and all(vector(o) == last for o in ops[-2:]):
        return lambda: registers.update({first: (0, 0, 0, 0)})
    if name in MOVES and first and last and len(ops) == 2:
        return lambda: registers.update({first: registers.get(last, NONE)})
    return None


def forget(registers: dict[str, Lanes], i: Any) -> Callable[[], None] | None:
    """For any other instruction: what it writes is not known."""
    written = {"xmm" + n[3:] for n in map(i.reg_name, (*i.regs_access()[1], *(o.reg for o in i.operands[:1])))
               if n and n[1:3] == "mm" and n[0] in "xyz"}
    if not written:
        return None

    def lose() -> None:
        for name in written:
            registers.pop(name, None)

    return lose
