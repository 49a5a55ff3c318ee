"""x86-64 machine code followed through: integers computed, vectors only counted.

Registers, flags and the own stack are numbers or None, not known: what is read from buffers is not. An instruction that
is not in the tables makes what it writes unknown. Source: Intel 64 and IA-32 Architectures Software Developer's Manual,
volume 2; decoding by capstone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from npulab.gpu.counting.elf import Elf
from npulab.gpu.counting.mix import OWN, Mix, NotRead, add
from npulab.gpu.counting.x86_mix import kinds

Known = int | None
STACK, STACK_BYTES = 0x7000_0000_0000, 1 << 22
HOME = 0x6fff_dead_0000
"""The return address of the function that is followed."""
NAMES: dict[str, tuple[int, int, int]] = {name: (i, bits, shift) for i, base in enumerate(
    ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")) for name, bits, shift in (
    (base, 64, 0), ("e" + base[1:], 32, 0), (base[1:], 16, 0),
    *(((base[1] + "l", 8, 0), (base[1] + "h", 8, 8)) if i < 4 else ((base[1:] + "l", 8, 0),)))}
NAMES |= {f"r{i}{end}": (i, bits, 0) for i in range(8, 16) for end, bits in (("", 64), ("d", 32), ("w", 16), ("b", 8))}
CALLER_SAVED = (0, 1, 2, 6, 7, 8, 9, 10, 11)
RAX, RCX, RDX, RSP, RBP, RSI, RDI = 0, 1, 2, 4, 5, 6, 7
Step = Callable[[], None]


class Machine:
    """One thread of an ELF file's code; `memory`: bytes that are known beside the file's constants."""

    def __init__(self, elf: Elf, memory: Mapping[int, int]) -> None:
        import capstone

        if elf.machine != "x86-64":
            raise NotRead(f"machine code of {elf.machine} is not read")
        self._cs = capstone
        self._decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        self._decoder.detail = True
        self._elf, self._initial = elf, dict(memory)
        self._blocks: dict[int, tuple[list[Step], Mix, Callable[[], int]]] = {}
        self.r: list[Known] = [None] * 16
        self.low: list[Known] = [None] * 16  # bytes of registers whose rest is not known
        self.calls = 0
        self.cf: bool | None = None
        self.zf: bool | None = None
        self.sf: bool | None = None
        self.of: bool | None = None
        self.memory: dict[int, Known] = {}

    def follow(self, function: int, *arguments: int) -> Mix:
        """What a call does. Raises: NotRead."""
        self.r, self.low, self.calls = [None] * 16, [None] * 16, 0
        self.cf = self.zf = self.sf = self.of = None
        self.memory = dict(self._initial)
        for register, value in zip((RDI, RSI, RDX, RCX, 8, 9), arguments, strict=False):
            self.r[register] = value
        self.r[RSP] = STACK
        self._push(HOME)
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
            for step in block[0]:
                step()
            at = block[2]()
        out: Mix = {}
        for at, times in done.items():
            add(out, self._blocks[at][1], times)
        if self.calls:
            out["calls"] = self.calls
        return out

    # decoding

    def _decode(self, start: int) -> tuple[list[Step], Mix, Callable[[], int]]:
        """(what changes what is known, what it counts, where to go) of a block."""
        code, size = b"", 1 << 14
        while not code and size:
            code, size = self._elf.bytes_at(start, size) or b"", size >> 1
        while more := self._elf.bytes_at(start + len(code), 16):
            code += more
            if len(code) > 1 << 16:
                break
        steps: list[Step] = []
        mix: Mix = {}
        cs = self._cs.x86
        for i in self._decoder.disasm(code, start):
            name = i.mnemonic.removeprefix("notrack ").removeprefix("bnd ")
            after = i.address + i.size
            if name[0] == "j" or name in ("ret", "call", "hlt", "ud2", "int3"):
                if name == "call":
                    return steps, mix, self._call(i, after)
                return steps, mix, self._jump(i, name, after)
            add(mix, kinds(i, cs, self._own))
            step = self._step(i, name)
            if step:
                steps.append(step)
        raise NotRead(f"bytes at {start:#x} are no instructions")

    def _own(self, base: str) -> bool:
        """Whether a register points into the stack; the frame's does all through a function."""
        if base not in ("rsp", "rbp"):
            return False
        value = self.r[NAMES[base][0]]
        return value is not None and STACK - STACK_BYTES <= value <= STACK

    def _jump(self, i: Any, name: str, after: int) -> Callable[[], int]:
        cs = self._cs.x86
        if name == "ret":
            return lambda: self._whither(self._pop(), after)
        if name in ("hlt", "ud2", "int3"):
            raise NotRead(f"the code stops at {i.address:#x}")
        op = i.operands[0]
        if name == "jmp":
            if op.type == cs.X86_OP_IMM:
                target = int(op.imm)
                return lambda: target
            read = self._reader(i, op)
            slot = self._address(i, op) if op.type == cs.X86_OP_MEM else None

            def leap() -> int:
                if slot and self._elf.slots.get(at := slot() or 0, at) is None:  # another library's, which returns
                    self.calls += 1
                    for register in CALLER_SAVED:
                        self.r[register] = self.low[register] = None
                    return self._whither(self._pop(), i.address)
                return self._whither(read(), i.address)

            return leap
        target, condition = int(op.imm), self._condition(name[1:])

        def go() -> int:
            taken = condition()
            if taken is None:
                raise NotRead(f"where the code goes at {i.address:#x} hangs on data")
            return target if taken else after

        return go

    def _call(self, i: Any, after: int) -> Callable[[], int]:
        read = self._reader(i, i.operands[0])

        def go() -> int:
            target = self._whither(read(), i.address)
            self._push(after)
            return target

        return go

    @staticmethod
    def _whither(value: Known, at: int) -> int:
        if value is None:
            raise NotRead(f"where the code goes at {at:#x} is not known")
        return value

    # operands

    def _address(self, i: Any, op: Any) -> Callable[[], Known]:
        m = op.mem
        cs, disp = self._cs.x86, int(m.disp)
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

    def _reader(self, i: Any, op: Any) -> Callable[[], Known]:
        cs = self._cs.x86
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
        address, size = self._address(i, op), int(op.size)
        return lambda: self._load(address(), size)

    def _writer(self, i: Any, op: Any) -> Callable[[Known], None]:
        cs = self._cs.x86
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
        address, size = self._address(i, op), op.size
        return lambda value: self._store(address(), size, value)

    def _load(self, address: Known, size: int) -> Known:
        if address is None or size > 8:
            return None
        if size == 8 and address in self._elf.slots:
            return self._elf.slots[address]
        constant = self._elf.bytes_at(address, size, constant=True)
        if constant is not None:
            return int.from_bytes(constant, "little")
        value = 0
        for k in range(size):
            byte = self.memory.get(address + k)
            if byte is None:
                return None
            value |= byte << 8 * k
        return value

    def _store(self, address: Known, size: int, value: Known) -> None:
        """A store to an unknown address is one to a buffer: compilers keep what they save by fixed places."""
        if address is None:
            return
        for k in range(size):
            self.memory[address + k] = None if value is None else value >> 8 * k & 255

    def _push(self, value: Known) -> None:
        top = self.r[RSP]
        if top is None:
            raise NotRead("the stack's place is not known")
        self.r[RSP] = top - 8
        self._store(top - 8, 8, value)

    def _pop(self) -> Known:
        top = self.r[RSP]
        if top is None:
            raise NotRead("the stack's place is not known")
        self.r[RSP] = top + 8
        return self._load(top, 8)

    # what instructions do

    def _condition(self, code: str) -> Callable[[], bool | None]:
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

    def _flags(self, value: Known, bits: int, cf: bool | None, of: bool | None) -> None:
        self.cf, self.of = cf, of
        self.zf, self.sf = (None, None) if value is None else (value == 0, bool(value >> (bits - 1) & 1))

    def _step(self, i: Any, name: str) -> Step | None:
        """What an instruction changes in what is known; None: nothing."""
        if name.startswith(("nop", "endbr", "prefetch", "vzero", "lfence", "mfence", "sfence")):
            return None
        ops = i.operands
        if name in ARITHMETIC and len(ops) == 2:
            return self._arithmetic(i, name)
        if name in ("mov", "movabs", "movzx"):
            read, write = self._reader(i, ops[1]), self._writer(i, ops[0])
            return lambda: write(read())
        if name in ("movsx", "movsxd"):
            read, write, low, high = self._reader(i, ops[1]), self._writer(i, ops[0]), ops[1].size, ops[0].size
            return lambda: write(extended(read(), 8 * low, 8 * high))
        if name == "lea":
            address, write = self._address(i, ops[1]), self._writer(i, ops[0])
            return lambda: write(address())
        if name in ("inc", "dec", "neg", "not"):
            return self._unary(i, name)
        if name in ("shl", "sal", "shr", "sar", "shlx", "shrx", "sarx", "rorx", "rol", "ror"):
            return self._shift(i, name)
        if name == "imul" and len(ops) > 1:
            a, b = self._reader(i, ops[-2]), self._reader(i, ops[-1])
            write, bits = self._writer(i, ops[0]), 8 * ops[0].size

            def multiply() -> None:
                x, y = a(), b()
                write(None if x is None or y is None else x * y & ((1 << bits) - 1))
                self.cf = self.zf = self.sf = self.of = None

            return multiply
        if name in ("mul", "div"):
            return self._wide(i, name)
        if name.startswith("cmov"):
            condition, read = self._condition(name[4:]), self._reader(i, ops[1])
            old, write = self._reader(i, ops[0]), self._writer(i, ops[0])

            def choose() -> None:
                taken = condition()
                a, b = read(), old()
                write(a if taken else b if taken is False else a if a == b else None)

            return choose
        if name.startswith("set"):
            condition, write = self._condition(name[3:]), self._writer(i, ops[0])

            def setcc() -> None:
                taken = condition()
                write(None if taken is None else int(taken))

            return setcc
        if name == "push":
            read = self._reader(i, ops[0])
            return lambda: self._push(read())
        if name == "pop":
            write = self._writer(i, ops[0])
            return lambda: write(self._pop())
        if name == "leave":
            def leave() -> None:
                self.r[RSP] = self.r[RBP]
                self.r[RBP] = self._pop()

            return leave
        if name == "xchg":
            one, two = self._reader(i, ops[0]), self._reader(i, ops[1])
            first, second = self._writer(i, ops[0]), self._writer(i, ops[1])

            def exchange() -> None:
                x, y = one(), two()
                first(y)
                second(x)

            return exchange
        return self._unknown(i)

    def _unknown(self, i: Any) -> Step | None:
        """What it writes is not known any more: registers, flags, places of the stack."""
        cs = self._cs.x86
        _, written = i.regs_access()
        registers = {NAMES[n][0] for n in map(i.reg_name, written) if n in NAMES}
        writers = []
        if i.operands:
            first = i.operands[0]
            if first.type == cs.X86_OP_REG and i.reg_name(first.reg) in NAMES:
                registers.add(NAMES[i.reg_name(first.reg)][0])
            elif first.type == cs.X86_OP_MEM:
                writers.append(self._writer(i, first))
        flags = "rflags" in map(i.reg_name, written)
        if not (registers or writers or flags):
            return None

        def forget() -> None:
            for register in registers:
                self.r[register] = self.low[register] = None
            for write in writers:
                write(None)
            if flags:
                self.cf = self.zf = self.sf = self.of = None

        return forget

    def _arithmetic(self, i: Any, name: str) -> Step:
        ops, bits = i.operands, 8 * i.operands[0].size
        a, b, write = self._reader(i, ops[0]), self._reader(i, ops[1]), self._writer(i, ops[0])
        mask, top = (1 << bits) - 1, 1 << (bits - 1)
        same = ops[0].type == ops[1].type == self._cs.x86.X86_OP_REG and ops[0].reg == ops[1].reg
        keep = name in ("cmp", "test")
        logic = ARITHMETIC[name] if name in ("and", "or", "xor", "test") else None
        if same and name in ("xor", "sub"):
            def zero() -> None:
                write(0)
                self._flags(0, bits, False, False)

            return zero

        def run() -> None:
            x, y = a(), b()
            if x is None or y is None:
                if not keep:
                    write(0 if name == "and" and (x == 0 or y == 0) else None)
                self.cf = self.zf = self.sf = self.of = None
                return
            y &= mask
            carry: int | None = 0
            if name in ("adc", "sbb"):
                carry = None if self.cf is None else int(self.cf)
                if carry is None:
                    write(None)
                    self._flags(None, bits, None, None)
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
            self._flags(value, bits, cf, of)
            if not keep:
                write(value)

        return run

    def _unary(self, i: Any, name: str) -> Step:
        op = i.operands[0]
        bits, read, write = 8 * op.size, self._reader(i, op), self._writer(i, op)
        mask = (1 << bits) - 1

        def run() -> None:
            x = read()
            if x is None:
                write(None)
                if name != "not":
                    self._flags(None, bits, self.cf if name != "neg" else None, None)
                return
            value = {"inc": x + 1, "dec": x - 1, "neg": -x, "not": ~x}[name] & mask
            write(value)
            if name != "not":
                edge = 1 << (bits - 1)
                of = value == (edge - 1 if name == "dec" else edge)
                self._flags(value, bits, x != 0 if name == "neg" else self.cf, of)

        return run

    def _shift(self, i: Any, name: str) -> Step:
        ops = i.operands
        read = self._reader(i, ops[0] if len(ops) < 3 else ops[1])
        by = self._reader(i, ops[-1]) if len(ops) > 1 else lambda: 1
        write, bits = self._writer(i, ops[0]), 8 * ops[0].size
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
                self._flags(value if name[0] == "s" else None, bits, None, None)

        return run

    def _wide(self, i: Any, name: str) -> Step:
        """mul, div: of rdx:rax."""
        op = i.operands[0]
        bits, read = 8 * op.size, self._reader(i, op)
        mask = (1 << bits) - 1

        def run() -> None:
            x, low, high = read(), self.r[RAX], self.r[RDX]
            self.cf = self.zf = self.sf = self.of = None
            self.r[RAX] = self.r[RDX] = self.low[RAX] = self.low[RDX] = None
            if bits < 32 or x is None or low is None or (high is None and name == "div"):
                return
            if name == "mul":
                whole = (low & mask) * x
                self.r[RAX], self.r[RDX] = whole & mask, whole >> bits
            elif x and high is not None:
                whole = (high & mask) << bits | low & mask
                self.r[RAX], self.r[RDX] = whole // x & mask, whole % x

        return run


ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "and": int.__and__, "test": int.__and__, "or": int.__or__, "xor": int.__xor__,
    **dict.fromkeys(("add", "adc", "sub", "sbb", "cmp"), int.__add__)}


def extended(value: Known, low: int, high: int) -> Known:
    """With its sign, from `low` bits to `high`."""
    return None if value is None else (value - (value >> (low - 1) << low)) & ((1 << high) - 1)
