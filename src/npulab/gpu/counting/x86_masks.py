"""Registers of masks (AVX-512), followed where they are put there as a whole: gathers have one even if it leaves no
lane out. What is compared in vectors is not known. Source: as in npulab.gpu.counting.x86.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Known = int | None
BITS = {"b": 8, "w": 16, "d": 32, "q": 64}
BYTES = {"b": 1, "w": 2, "d": 4, "q": 8}
LOGIC = re.compile(r"k(xnor|xor|mov|ortest)([bwdq])$")
EQUAL = re.compile(r"vpcmpeq([bwdq])$")
MASK = re.compile("k[0-7]$")


def mask_of(i: Any, cs: Any, op: Any) -> str:
    """The name of a mask's register, "" of another operand."""
    name = str(i.reg_name(op.reg)) if op.type == cs.X86_OP_REG else ""
    return name if MASK.match(name) else ""


def lanes_by_mask(i: Any, cs: Any) -> tuple[str, int] | None:
    """(mask, lanes) of a gather or scatter that has a mask's register."""
    name = i.mnemonic
    if "gather" not in name and "scatter" not in name:
        return None
    mask = next((m for o in i.operands if (m := mask_of(i, cs, o))), "")
    size = max((o.size for o in i.operands if o.type == cs.X86_OP_REG and i.reg_name(o.reg)[1:3] == "mm"), default=0)
    return (mask, size // (8 if name.endswith(("q", "pd")) else 4)) if mask else None


def step(masks: dict[str, int], i: Any, name: str, cs: Any, reader: Callable[[Any], Callable[[], Known]],
         writer: Callable[[Any], Callable[[Known], None]], flags: Callable[[Known, int], None]
         ) -> Callable[[], None] | None:
    """What an instruction does to masks, or by them; None: nothing to any.

    masks  what is known, by name.     reader, writer  of other operands.     flags  sets them by a result of so many
    bits, or of one that is not known.
    """
    ops = i.operands
    names = [mask_of(i, cs, o) for o in ops]
    if not any(names):
        return None

    def put(mask: str, value: Known) -> None:
        if value is None:
            masks.pop(mask, None)
        else:
            masks[mask] = value

    if gathered := lanes_by_mask(i, cs):
        return lambda: put(gathered[0], 0)  # lanes that are done
    m = LOGIC.match(name)
    if m and m[1] == "ortest":
        def test() -> None:
            a, b = masks.get(names[0]), masks.get(names[1])
            flags(None if a is None or b is None else (a | b) & ((1 << BITS[m[2]]) - 1), BITS[m[2]])

        return test
    if m and m[1] == "mov":
        whole = (1 << BITS[m[2]]) - 1

        def of(value: Known) -> Known:
            return None if value is None else value & whole

        if names[0]:
            if names[1]:
                return lambda: put(names[0], of(masks.get(names[1])))
            read = reader(ops[1])
            return lambda: put(names[0], of(read()))
        write = writer(ops[0])
        return lambda: write(of(masks.get(names[1])))
    if m and names[1] == names[2]:
        same = (1 << BITS[m[2]]) - 1 if m[1] == "xnor" else 0
        return lambda: put(names[0], same)
    e = EQUAL.match(name)
    if e and len(ops) == 3 and ops[1].type == ops[2].type == cs.X86_OP_REG and ops[1].reg == ops[2].reg:
        ones = (1 << ops[1].size // BYTES[e[1]]) - 1
        return lambda: put(names[0], ones)
    return (lambda: put(names[0], None)) if names[0] else None
