"""Kernels as Mesa's rusticl keeps them in its program binary: the SPIR-V that its drivers (panfrost, iris, radeonsi,
llvmpipe...) compile. What they make of it is not seen.

Mesa 22.3.6 puts three words before it: 1, its length, and the kind of the binary (CL_PROGRAM_BINARY_TYPE). Nothing
rests on them, as other versions may have others: a module is found by its magic number and by its own structure, and
ends where no function follows the last.

Source: SPIR-V Specification 1.6, sections 2.3 and 2.4; the layout as read from binaries of 22.3.6.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from npulab.gpu.counting import spirv, spirv_module
from npulab.gpu.counting.mix import Argument, Counted

MAGIC = struct.pack("<I", spirv_module.MAGIC)
TRIED = 64
"""Places of the magic number that are looked at."""
BOUND_MOST = 0x3f_ffff
"""Of a module's ids (SPIR-V 1.6, section 2.17)."""
LAST_VERSION = 0x1_06
CAPABILITY, MEMORY_MODEL, ENTRY, FUNCTION, FUNCTION_END = 17, 14, 15, 54, 56
PHYSICAL, OPENCL = (1, 2), 2
"""Addressing, and memory model."""
BETWEEN = (0, 8, 317)
"""What may be between functions: OpNop, OpLine, OpNoLine."""


def is_rusticl(binary: bytes) -> bool:
    return next(modules(binary), None) is not None


def count(binary: bytes, kernel: str, size: Sequence[int], group: Sequence[int], arguments: Sequence[Argument],
          turns: int) -> Counted:
    """A turn of a kernel's loop, in each work item: of the group's first, middle and last. Argument number `turns` is
    how often the loop turns."""
    found = list(modules(binary))
    if not found:
        return Counted(None, spirv.CODE, why="the program's binary has no SPIR-V of OpenCL's kind")
    if any(module != found[0] for module in found[1:]):
        return Counted(None, spirv.CODE, why="the program's binary has several modules that differ")
    return spirv.count_kernel(found[0], kernel, size, group, arguments, turns)


def modules(binary: bytes) -> Iterator[bytes]:
    """Modules of OpenCL's kind, with a function."""
    at = -1
    for _ in range(TRIED):
        at = binary.find(MAGIC, at + 1)
        if at < 0:
            return
        if end := _end(binary, at):
            yield binary[at:end]
            at = end - 1


def _end(binary: bytes, at: int) -> int:
    """Of the module that begins there; 0 if none does."""
    if at + 20 > len(binary):
        return 0
    _, version, _, bound, schema = struct.unpack_from("<5I", binary, at)
    if version & 0xff0000ff or not 0x1_00 <= version >> 8 <= LAST_VERSION or bound > BOUND_MOST or schema:
        return 0
    at, end, kernels, inside = at + 20, 0, False, False
    while at + 4 <= len(binary):
        word, = struct.unpack_from("<I", binary, at)
        length, op = 4 * (word >> 16), word & 0xffff
        if end and not inside and op not in (FUNCTION, *BETWEEN):
            break
        if not length or at + length > len(binary):
            return 0 if inside or not end else end
        if op == MEMORY_MODEL and length == 12:
            addressing, model = struct.unpack_from("<2I", binary, at + 4)
            kernels = addressing in PHYSICAL and model == OPENCL
        at += length
        if op == FUNCTION:
            inside = True
        elif op == FUNCTION_END:
            inside, end = False, at
    return end if kernels and not inside else 0
