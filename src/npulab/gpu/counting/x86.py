"""x86-64 machine code followed through: integers computed, vectors counted, and followed where they carry integers.

Registers, flags and the own stack are numbers or None, not known: what is read from buffers is not. Source: Intel 64
and IA-32 Architectures Software Developer's Manual, volume 2; decoding by capstone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from npulab.gpu.counting.elf import Elf
from npulab.gpu.counting.mix import MACHINE, OWN, SUMS, Counted, Mix, NotRead, add
from npulab.gpu.counting.turns import of_a_turn
from npulab.gpu.counting.x86_lanes import NONE, number
from npulab.gpu.counting.x86_masks import written
from npulab.gpu.counting.x86_mix import kinds
from npulab.gpu.counting.x86_state import NAMES, RCX, RDI, RDX, RSI, RSP, Known, State, Step
from npulab.gpu.counting.x86_steps import step

STACK, STACK_BYTES = 0x7000_0000_0000, 1 << 22
HOME = 0x6fff_dead_0000
"""The return address of the function that is followed."""
CALLER_SAVED = (0, 1, 2, 6, 7, 8, 9, 10, 11)
OCL_SVML = "__ocl_svml_z0_"
"""Functions of Intel's mathematics for AVX-512, which keep rbx, rsi, r14, r15, zmm16 to zmm31 and k4 to k7 (LLVM,
X86CallingConv.td: CSR_64_Intel_OCL_BI_AVX512)."""
SVML_CHANGES = (0, 1, 2, 7, 8, 9, 10, 11, 12, 13)
QUOTIENTS = OCL_SVML + "udiv16"
"""Of 16 numbers without a sign in zmm0 by those in zmm1, to zmm0."""
ROOTS = re.compile(r"__ocl_svml_[a-z]\d_(r?sqrt)f(1|2|4|8|16)")
"""Functions whose name says what they do in how many lanes; those of masks have another end."""
TOO_MANY = "more than"
BLOCK = 1 << 18
"""Bytes of code without a jump to read at most."""



def count(elf: Elf, function: int, given: Sequence[int], memory: Callable[[int], Mapping[int, int]], items: int,
          described: Sequence[range] = ()) -> Counted:
    """A turn of the loop in each of `items` that a call does. Vectors are followed only where it takes them: that is
    slow. memory: what is known of it with so many turns. described: as in State."""
    def follow(machine: Machine, many: int) -> Mix:
        machine.initial = dict(memory(many))
        out = machine.follow(function, *given)
        return {**out, SUMS: out.get("add int32", 0.0) - machine.known}

    found = Counted(None)
    for lanes in (False, True)[bool(described):]:
        found = of_a_turn(partial(follow, Machine(elf, {}, described, lanes)), items, MACHINE)
        if found.mix is not None or found.why.startswith(TOO_MANY):
            break
    return found


class Machine(State):
    """One thread of an ELF file's code.

    calls  of what is not seen.     known  sums of 32 bits whose result is known.     partial  gathers and scatters
    whose mask is not known to leave no lane out.
    """

    def __init__(self, elf: Elf, memory: Mapping[int, int], described: Sequence[range] = (), lanes: bool = False
                 ) -> None:
        if elf.machine != "x86-64":
            raise NotRead(f"machine code of {elf.machine} is not read")
        super().__init__(elf, memory, described, lanes)
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
                raise NotRead(f"{TOO_MANY} {OWN} instructions")
            for does in block[0]:
                does()
            at = block[2]()
        out: Mix = {}
        for at, times in done.items():
            add(out, self._blocks[at][1], times)
        if self.calls:
            out["calls"] = self.calls
        if self.partial:
            out["masked"] = self.partial
        add(out, self.aside)
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
            under = written(i, cs) if counted else None
            places = [o for o in i.operands if o.type == cs.X86_OP_MEM and any(k.endswith("bytes") for k in counted)]
            if under:
                steps.append(self._in_lanes(i, counted, *under, places))
            else:
                add(mix, counted)
                steps += [self._placed(i, o, counted) for o in places if "spill bytes" not in counted]
            if does := step(self, i, name):
                steps.append(does)
            if sums := counted.get("add int32"):
                if sums == 1:
                    steps.append(self._noting(i))
                elif self.lanes and not under and number(i, cs, i.operands[0]) >= 0:
                    steps.append(self._noting_lanes(number(i, cs, i.operands[0]), int(sums)))
        raise NotRead(f"bytes at {start:#x} are no instructions")

    def _noting(self, i: Any) -> Step:
        """Behind a sum: whether it is known."""
        read = self.reader(i, i.operands[0])

        def note() -> None:
            self.known += read() is not None

        return note

    def _noting_lanes(self, register: int, lanes: int) -> Step:
        def note() -> None:
            if (found := self.vectors.get(register)) is not None:
                self.known += sum(x is not None for x in found[:lanes])

        return note

    def _placed(self, i: Any, op: Any, counted: Mix) -> Step:
        """Before a load or store: whether it is of a constant of the program, or of the stack by an index."""
        address = self.address(i, op)
        loaded, stored = counted.get("load bytes", 0.0), counted.get("store bytes", 0.0)
        loads, stores = counted.get("loads", 0.0), counted.get("stores", 0.0)

        def look() -> None:
            if (at := address()) is None:
                return
            if own := STACK - STACK_BYTES <= at <= STACK:
                self.besides("spill bytes", loaded + stored)
                self.besides("store bytes", -stored)
                self.besides("stores", -stores)
            if own or self.elf.bytes_at(at, 1, constant=True) is not None:
                self.besides("load bytes", -loaded)
                self.besides("loads", -loads)

        return look

    def _in_lanes(self, i: Any, counted: Mix, mask: str, lanes: int, places: Sequence[Any]) -> Step:
        """Before what is done in the lanes of a mask: how many those are."""
        address = self.address(i, places[0]) if places else lambda: None

        def look() -> None:
            having = self.masks.get(mask)
            share = 1.0
            if having is None or not lanes:
                self.partial += 1
            else:
                share = (having & ((1 << lanes) - 1)).bit_count() / lanes
            at = address()
            own = at is not None and STACK - STACK_BYTES <= at <= STACK
            constant = at is not None and self.elf.bytes_at(at, 1, constant=True) is not None
            for kind, count in counted.items():
                if kind.endswith("bytes") and (own or constant):
                    kind = "spill bytes" if own else ""
                if kind in ("loads", "stores"):  # of a vector one, however much of it
                    kind, of = "" if own or constant else kind, share if count > 1 else float(share > 0)
                else:
                    of = share
                if kind:
                    self.besides(kind, count * of)

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
        root = ROOTS.fullmatch(name)

        def go() -> int:
            self.calls += not root
            given = self.vectors.get(0, NONE), self.vectors.get(1, NONE)
            after = self._elsewhere(at, name.startswith(OCL_SVML))
            if name == QUOTIENTS:
                self.vectors[0] = tuple(None if x is None or not y else x // y for x, y in zip(*given, strict=True))
            return after

        return [], {f"{root[1]} float32": int(root[2])} if root else {}, go

    def _elsewhere(self, at: int, svml: bool = False) -> int:
        """Back from a function of another library."""
        for register in SVML_CHANGES if svml else CALLER_SAVED:
            self.r[register] = self.low[register] = None
        for vector in range(16 if svml else 32):
            self.vectors.pop(vector, None)
        for mask in range(4 if svml else 8):
            self.masks.pop(f"k{mask}", None)
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
