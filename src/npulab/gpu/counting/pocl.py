"""Kernels as PoCL compiled them, out of its program binary: a shared object for each size of work group.

The container is a list of files, each its name's length, its name, its length and its content (PoCL 3.0 and 3.1,
lib/CL/pocl_binary.c). A kernel is a function (arguments, context, group x, y, z) that does all work items of a group;
`arguments` points to pointers to the values, or to the addresses of buffers, or of what describes an image (dev_image_t
in include/pocl_image_types.h).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

from npulab.gpu.counting import x86
from npulab.gpu.counting.elf import Elf
from npulab.gpu.counting.mix import MACHINE, Argument, Counted, NotRead, Picture

MAGIC = b"poclbin\0"
ARGUMENTS, CELLS, BUFFERS, CONTEXT = 0x5000_0000, 0x5100_0000, 0x10_0000_0000, 0x5200_0000
IMAGE_BYTES = 56
MORE = 8
"""Pointers behind the arguments: local memory that the kernel declares."""


def objects(binary: bytes, kernel: str, group: Sequence[int]) -> dict[str, bytes]:
    """The shared objects for work groups of this size, by their names in the container.

    Raises: NotRead if there are none.
    """
    if not binary.startswith(MAGIC):
        raise NotRead("the program's binary is none of PoCL's")
    size = "-".join(str(n) for n in (*group, 1, 1, 1)[:3])
    found, sizes = {}, set()
    for m in re.finditer(rb"/" + re.escape(kernel.encode()) + rb"/(\d+-\d+-\d+)([\w-]*)/[\w.]+\.so", binary):
        at = m.end()
        if m.start() < 4 or struct.unpack_from("<I", binary, m.start() - 4)[0] != len(m[0]) or at + 4 > len(binary):
            continue
        length, = struct.unpack_from("<I", binary, at)
        sizes.add(m[1].decode())
        if m[1].decode() == size:
            found[m[0].decode()] = binary[at + 4:at + 4 + length]
    if not found:
        raise NotRead(f"the binary has no code of {kernel} for work groups of {size}, only of "
                      f"{', '.join(sorted(sizes)) or 'none'}")
    return found


def count(binary: bytes, kernel: str, size: Sequence[int], group: Sequence[int], arguments: Sequence[Argument],
          turns: int) -> Counted:
    """A turn of a kernel's loop, in each work item. Argument number `turns` is how often the loop turns.
    What the binary has for the size must agree (PoCL makes some for small launches)."""
    try:
        found = [_count(Elf(data), kernel, size, group, arguments, turns)
                 for _, data in sorted(objects(binary, kernel, group).items())]
    except NotRead as e:
        return Counted(None, MACHINE, why=str(e))
    for other in found[1:]:
        if other != found[0]:
            return Counted(None, MACHINE, why="the binary has two codes of the kernel that differ")
    return found[0]


def _count(elf: Elf, kernel: str, size: Sequence[int], group: Sequence[int], arguments: Sequence[Argument],
           turns: int) -> Counted:
    name = f"_pocl_kernel_{kernel}_workgroup"
    if name not in elf.functions:
        raise NotRead(f"the shared object has no function {name}")
    items = 1
    for n in group:
        items *= n

    def memory(many: int) -> dict[int, int]:
        return _memory([many.to_bytes(4, "little") if k == turns else a for k, a in enumerate(arguments)], size, group)

    pictures = [range(at := BUFFERS * (k + 1), at + IMAGE_BYTES) for k, a in enumerate(arguments)
                if isinstance(a, Picture)]
    return x86.count(elf, elf.functions[name], (ARGUMENTS, CONTEXT, 0, 0, 0), memory, items, pictures)


def described(image: Picture, data: int) -> bytes:
    """Address of its data, columns, rows, depth, layers, bytes of a row and of a slice, levels, samples, order and type
    of channels, how many, bytes of one."""
    return struct.pack("<Q12i", data, image.width, image.height, 0, 0, image.row, 0, 0, 0, image.order, image.kind,
                       image.channels, image.channel_bytes)


def _memory(arguments: Sequence[Argument], size: Sequence[int], group: Sequence[int]) -> dict[int, int]:
    memory: dict[int, int] = {}

    def put(address: int, content: bytes) -> None:
        memory.update((address + k, byte) for k, byte in enumerate(content))

    for k, value in enumerate([*arguments, *[None] * MORE]):
        put(ARGUMENTS + 8 * k, (CELLS + 64 * k).to_bytes(8, "little"))
        put(CELLS + 64 * k, value if isinstance(value, bytes) else (BUFFERS * (k + 1)).to_bytes(8, "little"))
        if isinstance(value, Picture):
            put(BUFFERS * (k + 1), described(value, BUFFERS * (k + 1) + (BUFFERS >> 1)))
    whole, local = (*size, 1, 1, 1)[:3], (*group, 1, 1, 1)[:3]
    context = [a // b for a, b in zip(whole, local, strict=True)], (0, 0, 0), local  # groups, offset, local size
    for k, n in enumerate(n for part in context for n in part):
        put(CONTEXT + 8 * k, n.to_bytes(8, "little"))
    return memory
