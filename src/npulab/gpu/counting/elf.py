"""The little of ELF that a kernel's code is read by: its functions and what is loaded where (System V ABI, chapter 4,
and its AMD64 supplement, 4.4; 64 bits, little-endian).

Of a shared object that is what its segments say. A relocatable object has none: its sections are put one after the
other here, and its relocations are applied. What is in no file gets a place of its own where nothing is loaded.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

from npulab.gpu.counting.mix import NotRead

X86_64 = 62
MACHINES = {3: "x86", 40: "Arm", X86_64: "x86-64", 183: "AArch64", 243: "RISC-V"}
LOAD, WRITES = 1, 2
SYMBOLS, RELOCATIONS, EMPTY, RELATIVE = 2, 4, 8, 8
RELOCATABLE = 1
"""A kind of file."""
SECTION_WRITES, SECTION_LOADED = 1, 2
SECTIONS, ELSEWHERE = 0x40_0000, 0x6000_0000
"""Where the sections of a relocatable object are put, within 2 GiB as the small code model has it, and what it only
names."""
NAMED = 1 << 12
PLACES = {1: (8, False), 2: (4, True), 4: (4, True), 10: (4, False), 11: (4, False), 24: (8, True)}
"""R_X86_64_64, PC32, PLT32, 32, 32S, PC64: bytes, and whether counted from the place."""


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
            (self.kind, machine, _, _, at, sections, _, _, size, count, each, many, named) = struct.unpack_from(
                "<HHIQQQIHHHHHH", data, 16)
            self.machine = MACHINES.get(machine, f"machine {machine}")
            self.segments = []
            for i in range(count):
                kind, flags, offset, address, _, held, _, _ = struct.unpack_from("<IIQQQQQQ", data, at + i * size)
                if kind == LOAD:
                    self.segments.append(Segment(address, data[offset:offset + held], bool(flags & WRITES)))
            self._sections = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * each) for i in range(many)]
        except (struct.error, OverflowError):
            raise NotRead("the ELF file ends early") from None
        self._names = self._sections[named][4] if named < many else 0
        self._places: dict[int, int] = {}
        self.elsewhere: dict[int, str] = {}
        """Places that stand for what another library has, with its name."""
        if self.kind == RELOCATABLE:
            self._load()

    def section(self, name: str) -> bytes | None:
        """Of the first one of this name."""
        return next((self._data[s[4]:s[4] + s[5]] for s in self._sections if self._text(self._names + s[0]) == name),
                    None)

    def _text(self, at: int) -> str:
        """The name there; "" if none of NAMED bytes ends."""
        return self._data[at:max(0, self._data.find(b"\0", at, at + NAMED))].decode("ascii", "replace")

    def _load(self) -> None:
        """Sections to their places, then relocations. Raises: NotRead."""
        if any(offset + size > len(self._data) for _, kind, _, _, offset, size, *_ in self._sections if kind != EMPTY):
            raise NotRead("the ELF file ends early")
        if sum(s[5] for s in self._sections if s[1] != EMPTY) > len(self._data):
            raise NotRead("sections of the ELF file overlap")
        at, contents = SECTIONS, {}
        for i, (_, kind, flags, _, offset, size, _, _, align, _) in enumerate(self._sections):
            if not flags & SECTION_LOADED:
                continue
            at = -(-at // (align or 1)) * (align or 1)
            if at + size > ELSEWHERE:
                raise NotRead("the ELF file's sections have no room")
            self._places[i] = at
            if kind != EMPTY:
                contents[i] = bytearray(self._data[offset:offset + size])
            at += size
        for _, kind, _, _, offset, size, link, info, _, _ in self._sections:
            if kind == RELOCATIONS and info in contents:
                for entry in range(offset, offset + size - 23, 24):
                    place, how, addend = struct.unpack_from("<QQq", self._data, entry)
                    self._relocate(contents[info], self._places[info], link, place, how, addend)
        self.segments = [Segment(self._places[i], bytes(content), bool(self._sections[i][2] & SECTION_WRITES))
                         for i, content in contents.items()]

    def _relocate(self, content: bytearray, base: int, symbols: int, place: int, info: int, addend: int) -> None:
        kind, number = info & 0xffff_ffff, info >> 32
        if kind not in PLACES:
            raise NotRead(f"a relocation of kind {kind} is not known")
        size, counted = PLACES[kind]
        value = self._symbol(symbols, number) + addend - (base + place if counted else 0)
        if place + size > len(content):
            raise NotRead("a relocation is not in its section")
        if size == 4 and not -1 << 31 <= value < 1 << (32 if kind == 10 else 31):
            raise NotRead("a relocation does not fit")
        content[place:place + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def _symbol(self, symbols: int, number: int) -> int:
        """Address of a symbol; of one that is not in the file, a place of ELSEWHERE."""
        if (symbols >= len(self._sections) or self._sections[symbols][1] != SYMBOLS
                or 24 * number + 24 > self._sections[symbols][5]):
            raise NotRead("a relocation names no symbol")
        at = self._sections[symbols][4] + 24 * number
        name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", self._data, at)
        if section in self._places:
            return self._places[section] + int(value)
        link = self._sections[symbols][6]
        if section or link >= len(self._sections):
            raise NotRead("a relocation names what is not loaded")
        address = ELSEWHERE + 16 * number
        self.elsewhere[address] = self._text(self._sections[link][4] + name)
        return address

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
                    out[self._text(names + name)] = self._places.get(section, 0) + value
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
