"""What is known while x86-64 machine code is followed: registers, flags, memory; and operands as functions that read
and write it. Source: as in npulab.gpu.counting.x86.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from npulab.gpu.counting.elf import Elf
from npulab.gpu.counting.mix import Mix, NotRead
from npulab.gpu.counting.x86_lanes import Lanes

Known = int | None
Step = Callable[[], None]
NAMES: dict[str, tuple[int, int, int]] = {name: (i, bits, shift) for i, base in enumerate(
    ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")) for name, bits, shift in (
    (base, 64, 0), ("e" + base[1:], 32, 0), (base[1:], 16, 0),
    *(((base[1] + "l", 8, 0), (base[1] + "h", 8, 8)) if i < 4 else ((base[1:] + "l", 8, 0),)))}
NAMES |= {f"r{i}{end}": (i, bits, 0) for i in range(8, 16) for end, bits in (("", 64), ("d", 32), ("w", 16), ("b", 8))}
LINE = 6
RAX, RCX, RDX, RSP, RBP, RSI, RDI = 0, 1, 2, 4, 5, 6, 7


class State:
    """Of one thread; None is not known.

    memory      bytes that are known beside the file's constants.
    described   places of what a runtime says of images: what is read there is no work.
    lanes       whether vector registers are followed, too.
    vectors     what is known of them, by number.     masks  registers of masks that are known.
    aside       what instructions do more or less than they say: loads of constants, lanes by masks, ...
    """

    def __init__(self, elf: Elf, memory: Mapping[int, int], described: Sequence[range] = (), lanes: bool = False
                 ) -> None:
        import capstone

        self.cs, self.elf = capstone, elf
        self.initial, self.described = dict(memory), tuple(described)
        self.lanes = lanes
        self.vectors: dict[int, Lanes] = {}  # the same all along: steps hold it
        self.masks: dict[str, int] = {}
        self.forget()

    def forget(self) -> None:
        """As before the first instruction."""
        self.r: list[Known] = [None] * 16
        self.low: list[Known] = [None] * 16  # bytes of registers whose rest is not known
        self.cf: bool | None = None
        self.zf: bool | None = None
        self.sf: bool | None = None
        self.of: bool | None = None
        self.memory: dict[int, Known] = dict(self.initial)
        self.held = {address >> LINE for address in self.initial}
        self.vectors.clear()
        self.masks.clear()
        self.aside: Mix = {}

    def besides(self, kind: str, count: float) -> None:
        self.aside[kind] = self.aside.get(kind, 0.0) + count

    def address(self, i: Any, op: Any) -> Callable[[], Known]:
        m = op.mem
        cs, disp = self.cs.x86, int(m.disp)
        if m.segment not in (0, cs.X86_REG_DS, cs.X86_REG_SS, cs.X86_REG_ES, cs.X86_REG_CS):
            return lambda: None
        if m.base == cs.X86_REG_RIP:
            fixed = i.address + i.size + disp
            return lambda: fixed
        parts = [(NAMES[i.reg_name(r)][0], scale) for r, scale in ((m.base, 1), (m.index, m.scale))
                 if r and i.reg_name(r) in NAMES]
        if len(parts) != bool(m.base) + bool(m.index):
            return lambda: None  # a vector of addresses
        r_of = self

        def address() -> Known:
            total = disp
            for register, scale in parts:
                value = r_of.r[register]
                if value is None:
                    return None
                total += value * scale
            return total & 0xffff_ffff_ffff_ffff

        return address

    def reader(self, i: Any, op: Any) -> Callable[[], Known]:
        cs = self.cs.x86
        if op.type == cs.X86_OP_IMM:
            value: int = int(op.imm) & ((1 << 8 * int(op.size)) - 1)
            return lambda: value
        if op.type == cs.X86_OP_REG:
            name = i.reg_name(op.reg)
            if name not in NAMES:
                return lambda: None
            register, bits, shift = NAMES[name]
            if bits == 64:
                return lambda: self.r[register]
            mask = (1 << bits) - 1

            def read() -> Known:
                value = self.r[register]
                if value is None:
                    return self.low[register] if bits == 8 and not shift else None
                return value >> shift & mask

            return read
        address, size = self.address(i, op), int(op.size)
        return lambda: self.load(address(), size)

    def writer(self, i: Any, op: Any) -> Callable[[Known], None]:
        cs = self.cs.x86
        if op.type == cs.X86_OP_REG:
            name = i.reg_name(op.reg)
            if name not in NAMES:
                return lambda value: None
            register, bits, shift = NAMES[name]
            mask = ((1 << bits) - 1) << shift

            def write(value: Known) -> None:
                old = self.r[register]
                self.low[register] = value if bits == 8 and not shift else None
                if bits < 32 and value is not None:
                    self.r[register] = None if old is None else old & ~mask | value << shift & mask
                else:
                    self.r[register] = None if value is None else value & mask

            return write
        address, size = self.address(i, op), op.size
        return lambda value: self.store(address(), size, value)

    def load(self, address: Known, size: int) -> Known:
        if address is None or size > 8:
            return None
        if (first := self.memory.get(address)) is not None:
            if self.described and any(address in places for places in self.described):
                self.besides("load bytes", -size)
                self.besides("loads", -1)
            value = first
            for k in range(1, size):
                byte = self.memory.get(address + k)
                if byte is None:
                    return None
                value |= byte << 8 * k
            return value
        if size == 8 and address in self.elf.slots:
            return self.elf.slots[address]
        constant = self.elf.bytes_at(address, size, constant=True)
        return None if constant is None else int.from_bytes(constant, "little")

    def store(self, address: Known, size: int, value: Known) -> None:
        """A store to an unknown address is one to a buffer: compilers keep what they save by fixed places."""
        if address is None or (value is None and not self.holds(address, size)):
            return
        self.held.update((address >> LINE, address + size - 1 >> LINE))
        for k in range(size):
            self.memory[address + k] = None if value is None else value >> 8 * k & 255

    def holds(self, address: int, size: int) -> bool:
        """Whether something is known of at most 64 bytes there, or near by."""
        return address >> LINE in self.held or address + size - 1 >> LINE in self.held

    def push(self, value: Known) -> None:
        top = self.r[RSP]
        if top is None:
            raise NotRead("the stack's place is not known")
        self.r[RSP] = top - 8
        self.store(top - 8, 8, value)

    def pop(self) -> Known:
        top = self.r[RSP]
        if top is None:
            raise NotRead("the stack's place is not known")
        self.r[RSP] = top + 8
        return self.load(top, 8)

    def condition(self, code: str) -> Callable[[], bool | None]:
        def either(a: bool | None, b: bool | None) -> bool | None:
            return True if a or b else None if a is None or b is None else False

        def differ(a: bool | None, b: bool | None) -> bool | None:
            return None if a is None or b is None else a != b

        def no(a: bool | None) -> bool | None:
            return None if a is None else not a

        def no_more(mask: int) -> bool | None:
            left = self.r[RCX]
            return None if left is None else not left & mask

        table: dict[str, Callable[[], bool | None]] = {
            "o": lambda: self.of, "b": lambda: self.cf, "e": lambda: self.zf, "s": lambda: self.sf,
            "be": lambda: either(self.cf, self.zf), "l": lambda: differ(self.sf, self.of),
            "le": lambda: either(self.zf, differ(self.sf, self.of)), "p": lambda: None, "np": lambda: None,
            "rcxz": lambda: no_more((1 << 64) - 1), "ecxz": lambda: no_more((1 << 32) - 1)}
        opposite = {"no": "o", "ae": "b", "ne": "e", "ns": "s", "a": "be", "ge": "l", "g": "le"}
        if code in opposite:
            inner = table[opposite[code]]
            return lambda: no(inner())
        if code not in table:
            raise NotRead(f"a condition {code} is not known")
        return table[code]

    def flags(self, value: Known, bits: int, cf: bool | None, of: bool | None) -> None:
        self.cf, self.of = cf, of
        self.zf, self.sf = (None, None) if value is None else (value == 0, bool(value >> (bits - 1) & 1))
