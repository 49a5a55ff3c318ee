"""Front-end command words: the few opcodes and registers that start NN and TP jobs, and the streams built of them.

Source: rnndb register names and Mesa 25.0.7's streams, gathered in the project's TP notes, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence

OPCODES = {1: "LOAD_STATE", 2: "END", 3: "NOP", 7: "WAIT", 8: "LINK", 9: "STALL", 10: "CALL", 11: "RETURN",
           15: "WAIT_FENCE", 19: "SNAP_PAGES"}
"""Opcode, in bits 31:27 of a command's first word. 0 is padding: two zero words do nothing."""

LOAD_STATE, END, NOP, WAIT, LINK, STALL = 1, 2, 3, 7, 8, 9

PA_SYSTEM_MODE = 0x0A28
PS_NN_INST_ADDR = 0x10A0
PS_UNK10A4 = 0x10A4
PS_TP_INST_ADDR = 0x10B8
GL_FLUSH_CACHE = 0x380C
GL_API_MODE = 0x384C
GL_NN_CONFIG = 0x3930
GL_SRAM_REMAP_ADDRESS = 0x3938
GL_OCB_REMAP_START = 0x393C
GL_OCB_REMAP_END = 0x3940
GL_TP_CONFIG = 0x394C
GL_UNK3950 = 0x3950

REGISTERS = {
    PA_SYSTEM_MODE: "PA_SYSTEM_MODE",
    PS_NN_INST_ADDR: "PS_NN_INST_ADDR",
    PS_UNK10A4: "PS_UNK10A4",
    PS_TP_INST_ADDR: "PS_TP_INST_ADDR",
    0x3800: "GL_PIPE_SELECT",
    0x3804: "GL_EVENT",
    0x3808: "GL_SEMAPHORE_TOKEN",
    GL_FLUSH_CACHE: "GL_FLUSH_CACHE",
    GL_API_MODE: "GL_API_MODE",
    0x389C: "GL_SHADER_INDEX",
    GL_NN_CONFIG: "GL_NN_CONFIG",
    GL_SRAM_REMAP_ADDRESS: "GL_SRAM_REMAP_ADDRESS",
    GL_OCB_REMAP_START: "GL_OCB_REMAP_START",
    GL_OCB_REMAP_END: "GL_OCB_REMAP_END",
    GL_TP_CONFIG: "GL_TP_CONFIG",
    GL_UNK3950: "GL_UNK3950",
    0x3C00: "GL_STALL_TOKEN",
}
"""Byte address -> name. Those named UNK have no public name; what they do is inferred from use."""

NN_ADDRESS_MASK, TP_ADDRESS_MASK = ~0x3F & 0xFFFFFFFF, ~0x1F & 0xFFFFFFFF
"""The low bits of an instruction address are an event id, not address (descriptors are 64-byte aligned)."""

SMALL_BATCH = 0x10
FLUSH_ALL = 0xC23
"""depth | colour | shader L1 | bit 10 | bit 11: what the driver writes, twice, at a batch's end."""


def load_state(register: int, value: int) -> tuple[int, int]:
    """Write one register: two words."""
    return LOAD_STATE << 27 | 1 << 16 | register // 4, value


def _writes(pairs: Sequence[tuple[int, int]]) -> list[int]:
    return [w for register, value in pairs for w in load_state(register, value)]


def init_stream(sram_address: int = 0) -> list[int]:
    """What a process submits once before its first job; with `sram_address`, on-chip SRAM appears there (inferred)."""
    sram = [(GL_SRAM_REMAP_ADDRESS, sram_address)] if sram_address else []
    return [0] * 8 + _writes([(PA_SYSTEM_MODE, 0x11), (GL_API_MODE, 2), *sram]) + [0, 0]


def nn_job(descriptor: int) -> list[int]:
    """Start the NN job whose descriptor lies at `descriptor`."""
    return _writes([(GL_OCB_REMAP_START, 0), (GL_OCB_REMAP_END, 0), (GL_NN_CONFIG, SMALL_BATCH),
                    (PS_NN_INST_ADDR, descriptor), (PS_UNK10A4, 0)])


def tp_job(descriptors: Sequence[int], pad: bool = False) -> list[int]:
    """Start a TP job, one descriptor a core. `pad` jobs set register 0x3950 to 8 on all but the last."""
    out: list[int] = []
    for i, address in enumerate(descriptors):
        last = i == len(descriptors) - 1
        out += _writes([(GL_OCB_REMAP_START, 0), (GL_OCB_REMAP_END, 0), (GL_TP_CONFIG, 0),
                        (GL_UNK3950, 8 if pad and not last else 0), (PS_TP_INST_ADDR, address | (0 if last else 1))])
    return out + _writes([(PS_UNK10A4, 0)])


def batch(jobs: Sequence[Sequence[int]]) -> list[int]:
    """The stream of one submission: its jobs in order, then the cache flush that ends it."""
    return [0] * 8 + [w for job in jobs for w in job] + _writes([(GL_FLUSH_CACHE, FLUSH_ALL)] * 2) + [0, 0]
