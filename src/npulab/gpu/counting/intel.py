"""Kernels as Intel's OpenCL runtime for processors compiled them, out of its program binary: a relocatable object for
all work groups.

The binary is an ELF file without segments (kind 0xff04); its section .ocl.obj is the object. A kernel is a function
(arguments, group, ...) that does all work items of a group. `arguments` are packed as C packs a struct: scalars, and
addresses of buffers; then, aligned to 8 bytes, what get_global_size and others answer. `group` are its three numbers
and the address of its local memory, or 0: it is on the stack then. Kernels with barriers have two codes: that of the
name _ZGVeN16uu_kernel (vector function ABI: 16 at once, without a mask) does groups whose first size it divides.

Source: no document. Read from code of kernels that ask for one number each, and from the runtime's own memory, which
machine code in place of a kernel's copied out (PyPI: intel-opencl-rt 2026.2.0, build 2026.22.10.0.01).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

from npulab.gpu.counting import x86
from npulab.gpu.counting.elf import Elf
from npulab.gpu.counting.mix import MACHINE, Argument, Counted, NotRead, Picture

KIND = 0xff04
OBJECT = ".ocl.obj"
ARGUMENTS, GROUP, LOCAL, BUFFERS = 0x9_0000_0000, 0x9_0100_0000, 0xa_0000_0000, 0x10_0000_0000


def is_intel(binary: bytes) -> bool:
    return binary.startswith(b"\x7fELF") and binary[16:18] == struct.pack("<H", KIND)


def count(binary: bytes, kernel: str, size: Sequence[int], group: Sequence[int], arguments: Sequence[Argument],
          turns: int) -> Counted:
    """A turn of a kernel's loop, in each work item. Argument number `turns` is how often the loop turns."""
    items = 1
    for n in group:
        items *= n
    try:
        code = Elf(binary).section(OBJECT)
        if code is None:
            raise NotRead(f"the program's binary has no section {OBJECT}")
        elf = Elf(code)
        start = entry(elf, kernel, group)

        def memory(many: int) -> dict[int, int]:
            return _memory([many.to_bytes(4, "little") if k == turns else a for k, a in enumerate(arguments)], size,
                           group)

        packed(arguments)
        return x86.count(elf, start, (ARGUMENTS, GROUP), memory, items)
    except NotRead as e:
        return Counted(None, MACHINE, why=str(e))


def entry(elf: Elf, kernel: str, group: Sequence[int]) -> int:
    """Address of the code that does groups of this size. Raises: NotRead."""
    for name, address in elf.functions.items():
        m = re.fullmatch(r"_ZGV\w(N|M)(\d+)[a-z0-9]*_" + re.escape(kernel), name)
        if not m:
            continue
        if m[1] == "M" or len(group) > 1:
            raise NotRead(f"which groups the code {name} is for is not known")
        if int(m[2]) and group[0] % int(m[2]) == 0:
            return address
    if kernel not in elf.functions:
        raise NotRead(f"the object has no function {kernel}")
    return elf.functions[kernel]


def packed(arguments: Sequence[Argument]) -> bytes:
    """Raises: NotRead of one whose layout is not known."""
    out = b""
    for k, value in enumerate(arguments):
        if isinstance(value, Picture):
            raise NotRead("texels are read by functions of the runtime, which are not in the program's binary")
        content = value if value is not None else (BUFFERS * (k + 1)).to_bytes(8, "little")
        if len(content) not in (1, 2, 4, 8):
            raise NotRead(f"how an argument of {len(content)} bytes is passed is not known")
        out += bytes(-len(out) % len(content)) + content
    return out + bytes(-len(out) % 8)


def launch(size: Sequence[int], group: Sequence[int]) -> list[int | None]:
    """The numbers behind the arguments; None: not known, addresses of the runtime's own."""
    whole, local = (*size, 1, 1, 1)[:3], (*group, 1, 1, 1)[:3]
    groups = [a // b for a, b in zip(whole, local, strict=True)]
    # dimensions, offset, size, size of groups and of the last ones, groups; then what code reads of that
    return [len(size), 0, 0, 0, *whole, *local, *local, *groups, None, None, *whole, *local, *local, *groups]


def _memory(arguments: Sequence[Argument], size: Sequence[int], group: Sequence[int]) -> dict[int, int]:
    memory: dict[int, int] = {}

    def put(address: int, content: bytes) -> None:
        memory.update((address + k, byte) for k, byte in enumerate(content))

    given = packed(arguments)
    put(ARGUMENTS, given)
    for k, n in enumerate(launch(size, group)):
        if n is not None:
            put(ARGUMENTS + len(given) + 8 * k, n.to_bytes(8, "little"))
    for k, n in enumerate((0, 0, 0, LOCAL)):  # not on the stack: that is told from what is spilled
        put(GROUP + 8 * k, n.to_bytes(8, "little"))
    return memory
