"""Registers of masks (AVX-512): gathers have one even if it leaves no lane out. What is compared in vectors is known
where their lanes are followed (npulab.gpu.counting.x86_lanes). Source: as in npulab.gpu.counting.x86.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Known = int | None
BITS = {"b": 8, "w": 16, "d": 32, "q": 64}
BYTES = {"b": 1, "w": 2, "d": 4, "q": 8}
LOGIC = re.compile(r"k(xnor|xor|and|andn|or|not|mov|ortest|test|shiftl|shiftr|unpck)([bwdq])[wdq]?$")
COMPUTE: dict[str, Callable[[int, int], int]] = {
    "xnor": lambda a, b: ~(a ^ b), "xor": int.__xor__, "and": int.__and__, "andn": lambda a, b: ~a & b,
    "or": int.__or__}
EQUAL = re.compile(r"vpcmpeq([bwdq])$")
MASK = re.compile("k[0-7]$")
ELEMENT = re.compile(r"(?<=dq[au])(8|16|32|64)$|[ps][sdh]$|[bwdq]$")
ELEMENTS = {"ps": 32, "pd": 64, "ph": 16, "ss": 32, "sd": 64, "sh": 16, **BITS, **{str(n): n for n in (8, 16, 32, 64)}}
"""Bits of one, by the end of a name."""


def mask_of(i: Any, cs: Any, op: Any) -> str:
    """The name of a mask's register, "" of another operand."""
    name = str(i.reg_name(op.reg)) if op.type == cs.X86_OP_REG else ""
    return name if MASK.match(name) else ""


def lanes_by_mask(i: Any, cs: Any) -> tuple[str, int] | None:
    """(mask, lanes) of a gather or scatter that has a mask's register."""
    return written(i, cs) if "gather" in i.mnemonic or "scatter" in i.mnemonic else None


def written(i: Any, cs: Any) -> tuple[str, int] | None:
    """(mask, lanes) of what is done in those lanes alone that a mask has; lanes 0: how many is not known."""
    mask = next((m for o in i.operands[1:] if (m := mask_of(i, cs, o)) not in ("", "k0")), "")
    if not mask or i.mnemonic[0] != "v":
        return None
    size = max((o.size for o in i.operands if o.type == cs.X86_OP_REG and i.reg_name(o.reg)[1:3] == "mm"), default=0)
    e = ELEMENT.search(i.mnemonic)
    return mask, 1 if e and e[0] in ("ss", "sd", "sh") else size * 8 // ELEMENTS[e[0]] if e else 0


def step(masks: dict[str, int], i: Any, name: str, cs: Any, reader: Callable[[Any], Callable[[], Known]],
         writer: Callable[[Any], Callable[[Known], None]],
         flags: Callable[[bool | None, bool | None], None]) -> Callable[[], None] | None:
    """What an instruction does to masks, or by them; None: nothing to any.

    masks  what is known, by name.     reader, writer  of other operands.     flags  sets those for zero and carry.
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
    if m and m[1] in ("ortest", "test"):
        ones = (1 << BITS[m[2]]) - 1

        def test() -> None:
            a, b = masks.get(names[0]), masks.get(names[1])
            if a is None or b is None:
                flags(None, None)
            elif m[1] == "ortest":
                flags(not (a | b) & ones, (a | b) & ones == ones)
            else:
                flags(not a & b & ones, not ~a & b & ones)

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
    if m:
        bits, kind = BITS[m[2]], m[1]
        full = (1 << bits) - 1
        if kind in ("shiftl", "shiftr"):
            by = int(ops[2].imm)

            def shift() -> None:
                a = masks.get(names[1])
                put(names[0], None if a is None else (a & full) << by & full if kind == "shiftl" else (a & full) >> by)

            return shift
        if kind == "not":
            return lambda: put(names[0], None if (a := masks.get(names[1])) is None else ~a & full)
        if kind == "unpck":
            def unpack() -> None:
                a, b = masks.get(names[1]), masks.get(names[2])
                put(names[0], None if a is None or b is None else (a & full) << bits | b & full)

            return unpack
        if names[1] == names[2] and kind in ("xnor", "xor"):
            return lambda: put(names[0], full if kind == "xnor" else 0)

        def compute() -> None:
            a, b = masks.get(names[1]), masks.get(names[2])
            if kind == "and" and (a == 0 or b == 0):
                a = b = 0
            put(names[0], None if a is None or b is None else COMPUTE[kind](a, b) & full)

        return compute
    e = EQUAL.match(name)
    if e and len(ops) == 3 and ops[1].type == ops[2].type == cs.X86_OP_REG and ops[1].reg == ops[2].reg:
        ones = (1 << ops[1].size // BYTES[e[1]]) - 1
        return lambda: put(names[0], ones)
    return (lambda: put(names[0], None)) if names[0] else None
