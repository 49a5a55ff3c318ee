"""x86-64 machine code followed through: integers computed, vectors counted, and followed where they carry integers.

Registers, flags and the own stack are numbers or None, not known: what is read from buffers is not. Source: Intel 64
and IA-32 Architectures Software Developer's Manual, volume 2; decoding by capstone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from npulab.gpu.counting.elf import Elf
from npulab.gpu.counting.mix import OWN, Mix, NotRead, add
from npulab.gpu.counting.x86_masks import lanes_by_mask
from npulab.gpu.counting.x86_mix import kinds
from npulab.gpu.counting.x86_state import NAMES, RCX, RDI, RDX, RSI, RSP, Known, State, Step
from npulab.gpu.counting.x86_steps import step

STACK, STACK_BYTES = 0x7000_0000_0000, 1 << 22
HOME = 0x6fff_dead_0000
"""The return address of the function that is followed."""
CALLER_SAVED = (0, 1, 2, 6, 7, 8, 9, 10, 11)
OCL_SVML = "__ocl_svml_z0_"
"""Functions that keep rsi: those of Intel's mathematics for AVX-512 (LLVM, X86CallingConv.td: Intel_OCL_BI_AVX512)."""
ROOTS = re.compile(r"__ocl_svml_[a-z]\d_(r?sqrt)f(1|2|4|8|16)")
"""Functions whose name says what they do in how many lanes; those of masks have another end."""
BLOCK = 1 << 18
"""Bytes of code without a jump to read at most."""


class Machine(State):
    """One thread of an ELF file's code.

    calls  of what is not seen.     known  sums of 32 bits whose result is known.     partial  gathers and scatters
    whose mask is not known to leave no lane out.
    """

    def __init__(self, elf: Elf, memory: Mapping[int, int], described: Sequence[range] = ()) -> None:
        if elf.machine != "x86-64":
            raise NotRead(f"machine code of {elf.machine} is not read")
        super().__init__(elf, memory, described)
        self._decoder = self.cs.Cs(self.cs.CS_ARCH_X86, self.cs.CS_MODE_64)
        self._decoder.detail = True
        self._blocks: dict[int, tuple[list[Step], Mix, Callable[[], int]]] = {}
        self.calls = self.known = self.partial = 0

    def follow(self, function: int, *arguments: int) -> Mix:
        """What a call does. Raises: NotRead."""
        self.forget()
        self.calls = self.known = self.partial = 0
        for register, value in zip((RDI, RSI, RDX, RCX, 8, 9), arguments, strict=False):
            self.r[register] = value
        self.r[RSP] = STACK
        self.push(HOME)
        done: dict[int, int] = {}
        at, steps = function, 0
        while at != HOME:
            if at not in self._blocks:
                self._blocks[at] = self._decode(at)
            block = self._blocks[at]
            done[at] = done.get(at, 0) + 1
            steps += len(block[0]) + 1
            if steps > OWN:
                raise NotRead(f"more than {OWN} instructions")
            for does in block[0]:
                does()
            at = block[2]()
        out: Mix = {}
        for at, times in done.items():
            add(out, self._blocks[at][1], times)
        if self.calls:
            out["calls"] = self.calls
        if self.partial:
            out["masked"] = out.get("masked", 0.0) + self.partial
        if self.aside:
            out["load bytes"] = out.get("load bytes", 0.0) - self.aside
        return out

    # decoding

    def _decode(self, start: int) -> tuple[list[Step], Mix, Callable[[], int]]:
        """(what changes what is known, what it counts, where to go) of a block."""
        if start in self.elf.elsewhere:
            return self._named(start, self.elf.elsewhere[start])
        code, size = b"", 1 << 14
        while size and len(code) < BLOCK:  # to the last byte
            more = self.elf.bytes_at(start + len(code), size)
            code, size = code + (more or b""), size if more else size >> 1
        steps: list[Step] = []
        mix: Mix = {}
        cs = self.cs.x86
        for i in self._decoder.disasm(code, start):
            name = i.mnemonic.removeprefix("notrack ").removeprefix("bnd ")
            after = i.address + i.size
            if name[0] == "j" or name in ("ret", "call", "hlt", "ud2", "int3"):
                if name == "call":
                    return steps, mix, self._call(i, after)
                return steps, mix, self._jump(i, name, after)
            counted = kinds(i, cs, self._own)
            add(mix, counted)
            if loaded := counted.get("load bytes"):
                steps += [self._constant(i, o, loaded) for o in i.operands if o.type == cs.X86_OP_MEM]
            if masked := lanes_by_mask(i, cs):
                steps.append(self._looking(*masked))
            if does := step(self, i, name):
                steps.append(does)
            if counted.get("add int32") == 1:
                steps.append(self._noting(i))
        raise NotRead(f"bytes at {start:#x} are no instructions")

    def _noting(self, i: Any) -> Step:
        """Behind a sum: whether it is known."""
        read = self.reader(i, i.operands[0])

        def note() -> None:
            self.known += read() is not None

        return note

    def _constant(self, i: Any, op: Any, size: float) -> Step:
        """Before a load: whether it is of a constant of the program, whose address a register has."""
        address = self.address(i, op)

        def look() -> None:
            if (at := address()) is not None and self.elf.bytes_at(at, 1, constant=True) is not None:
                self.aside += size

        return look

    def _looking(self, mask: str, lanes: int) -> Step:
        """Before a gather: whether all of its lanes are done."""
        whole = (1 << lanes) - 1

        def look() -> None:
            self.partial += self.masks.get(mask, 0) & whole != whole

        return look

    def _own(self, base: str) -> bool:
        """Whether a register points into the stack; the frame's does all through a function."""
        if base not in ("rsp", "rbp"):
            return False
        value = self.r[NAMES[base][0]]
        return value is not None and STACK - STACK_BYTES <= value <= STACK

    def _jump(self, i: Any, name: str, after: int) -> Callable[[], int]:
        cs = self.cs.x86
        if name == "ret":
            return lambda: self._whither(self.pop(), after)
        if name in ("hlt", "ud2", "int3"):
            raise NotRead(f"the code stops at {i.address:#x}")
        op = i.operands[0]
        if name == "jmp":
            if op.type == cs.X86_OP_IMM:
                target = int(op.imm)
                return lambda: target
            read = self.reader(i, op)
            slot = self.address(i, op) if op.type == cs.X86_OP_MEM else None

            def leap() -> int:
                if slot and self.elf.slots.get(at := slot() or 0, at) is None:
                    self.calls += 1
                    return self._elsewhere(i.address)
                return self._whither(read(), i.address)

            return leap
        target, condition = int(op.imm), self.condition(name[1:])

        def go() -> int:
            taken = condition()
            if taken is None:
                raise NotRead(f"where the code goes at {i.address:#x} hangs on data")
            return target if taken else after

        return go

    def _named(self, at: int, name: str) -> tuple[list[Step], Mix, Callable[[], int]]:
        """A function that the file only names: a call of what is not seen, or of what its name says."""
        m = ROOTS.fullmatch(name)

        def go() -> int:
            self.calls += not m
            return self._elsewhere(at, (RSI,) if name.startswith(OCL_SVML) else ())

        return [], {f"{m[1]} float32": int(m[2])} if m else {}, go

    def _elsewhere(self, at: int, kept: Sequence[int] = ()) -> int:
        """Back from a function of another library."""
        for register in CALLER_SAVED:
            if register not in kept:
                self.r[register] = self.low[register] = None
        self.vectors.clear()
        self.masks.clear()
        return self._whither(self.pop(), at)

    def _call(self, i: Any, after: int) -> Callable[[], int]:
        read = self.reader(i, i.operands[0])

        def go() -> int:
            target = self._whither(read(), i.address)
            self.push(after)
            return target

        return go

    @staticmethod
    def _whither(value: Known, at: int) -> int:
        if value is None:
            raise NotRead(f"where the code goes at {at:#x} is not known")
        return value
