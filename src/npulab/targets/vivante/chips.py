"""The numbers of each chip of the family, each with its source.

Source of the table: the hardware feature database in Mesa's src/etnaviv/hwdb and the vendor's dual MIT/GPL kernel
driver (project notes: NN section 2, TP section 7).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chip:
    """One NPU. Sizes in bytes; depths in the engine's own rows."""

    name: str
    title: str
    model: int
    revision: int
    generation: int
    nn_cores: int
    input_buffer_depth: int
    accumulation_buffer_depth: int
    vip_sram: int
    axi_sram: int
    zero_run_bits: int
    tp_cores: int
    kernel_max: int
    offset_bits: int
    tile_x_max: int = 64

    image_size_max: int = 8191
    """Largest x or y of an image: 13 bits, all chips."""


A311D = Chip(
    name="a311d", title="Amlogic A311D (VIPNano-QI.7120): Khadas VIM3, Libre Computer Alta",
    model=0x8000, revision=0x7120, generation=7, nn_cores=8, input_buffer_depth=12, accumulation_buffer_depth=64,
    vip_sram=0x80000, axi_sram=0x100000, zero_run_bits=5, tp_cores=4, kernel_max=11, offset_bits=4,
)

CHIPS = {chip.name: chip for chip in (A311D,)}
