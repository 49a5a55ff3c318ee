"""The little of ELF that a kernel's shared object is read by: its functions and what is loaded where (System V ABI,
chapter 4; 64 bits, little-endian)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

from npulab.gpu.counting.mix import NotRead

X86_64 = 62
MACHINES = {3: "x86", 40: "Arm", X86_64: "x86-64", 183: "AArch64", 243: "RISC-V"}
LOAD, WRITES = 1, 2
SYMBOLS, RELOCATIONS, RELATIVE = 2, 4, 8


@dataclass(frozen=True, slots=True)
class Segment:
    address: int
    content: bytes
    writes: bool


class Elf:
    """Raises: NotRead of what is no such file."""

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:
            raise NotRead("the binary is no 64-bit ELF file")
        self._data = data
        try:
            (_, machine, _, _, at, sections, _, _, size, count, each, many, _) = struct.unpack_from("<HHIQQQIHHHHHH",
                                                                                                     data, 16)
            self.machine = MACHINES.get(machine, f"machine {machine}")
            self.segments = []
            for i in range(count):
                kind, flags, offset, address, _, held, _, _ = struct.unpack_from("<IIQQQQQQ", data, at + i * size)
                if kind == LOAD:
                    self.segments.append(Segment(address, data[offset:offset + held], bool(flags & WRITES)))
            self._sections = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * each) for i in range(many)]
        except (struct.error, OverflowError):
            raise NotRead("the ELF file ends early") from None

    @cached_property
    def functions(self) -> dict[str, int]:
        """Addresses by name."""
        out = {}
        for _, kind, _, _, offset, size, link, _, _, _ in self._sections:
            if kind != SYMBOLS or link >= len(self._sections):
                continue
            names = self._sections[link][4]
            for at in range(offset, min(offset + size, len(self._data) - 23), 24):
                name, info, _, section, value, _ = struct.unpack_from("<IBBHQQ", self._data, at)
                if info & 15 == 2 and section:
                    end = self._data.find(b"\0", names + name)
                    out[self._data[names + name:end].decode("ascii", "replace")] = value
        return out

    @cached_property
    def slots(self) -> dict[int, int | None]:
        """What the dynamic linker writes where; None: the address of another library's function."""
        out: dict[int, int | None] = {}
        for _, kind, _, _, offset, size, link, _, _, _ in self._sections:
            if kind != RELOCATIONS:
                continue
            symbols = self._sections[link][4] if link < len(self._sections) else 0
            for at in range(offset, min(offset + size, len(self._data) - 23), 24):
                address, info, addend = struct.unpack_from("<QQq", self._data, at)
                if info & 0xffff_ffff == RELATIVE:
                    out[address] = addend
                elif (symbol := symbols + 24 * (info >> 32)) + 24 <= len(self._data):
                    _, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", self._data, symbol)
                    out[address] = value + addend if section else None
        return out

    def bytes_at(self, address: int, size: int, constant: bool = False) -> bytes | None:
        """What is loaded there; None if nothing is, or it may be written while `constant` is asked for."""
        for s in self.segments:
            at = address - s.address
            if at >= 0 and at + size <= len(s.content) and not (constant and s.writes):
                return s.content[at:at + size]
        return None
