"""The numbers of each chip of the family, each with its source.

Source of the table: the hardware feature database in Mesa's src/etnaviv/hwdb and the vendor's dual MIT/GPL kernel
driver (project notes: NN section 2, TP section 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from npulab.errors import UsageError
from npulab.profiling.host import HostCPU

LANES = 64
"""Output pixels that a core computes at once."""
MULTIPLIERS = 6
"""Taps that a lane multiplies in a cycle (the XYDP6 and ZDP6 features). Cores x 64 x 6 x 800 MHz is the 4.9 TOPS that
the A311D is sold with, so the reading of the feature names is probably right (NN notes, section 12: inferred)."""
AXI_SRAM_ADDRESS = 0x0040_0000
"""Where the vendor's streams map on-chip SRAM (register GL_SRAM_REMAP_ADDRESS; what it maps is inferred)."""


@dataclass(frozen=True, slots=True)
class Chip:
    """One NPU, and what its board puts beside it. Sizes in bytes; depths in the engine's own rows.

    clock           Hz of the NN and TP cores.
    sram_width      bytes that VIP SRAM moves in a cycle.
    tp_rate         elements that a TP core moves in a cycle.
    launch_seconds  of one descriptor, until its engine works.
    submit_seconds  of one kernel call until its end is seen, apart from the jobs.
    copy_bandwidth  bytes per second that the CPU copies to and from NPU memory.
    """

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
    clock: float
    clock_source: str
    sram_width: int
    host: HostCPU
    tp_rate: float = 1.0
    launch_seconds: float = 5e-6
    submit_seconds: float = 50e-6
    copy_bandwidth: float = 2e9
    tile_x_max: int = 64

    image_size_max: int = 8191
    """Largest x or y of an image: 13 bits, all chips."""


CORTEX_A73 = HostCPU(
    name="one Cortex-A73 core at 2.2 GHz (A311D)", macs_per_second=6.35e9, bytes_per_second=2e9, element_seconds=2e-9,
    start_seconds=5e-6,
    source="ncnn's benchmark table: MobileNetV1 int8, 0.569 GMAC, 22.4 ms on four threads; a quarter of that rate",
)
"""TFLite runs host operators on one thread unless told otherwise."""

A311D = Chip(
    name="a311d", title="Amlogic A311D (VIPNano-QI.7120): Khadas VIM3, Libre Computer Alta",
    model=0x8000, revision=0x7120, generation=7, nn_cores=8, input_buffer_depth=12, accumulation_buffer_depth=64,
    vip_sram=0x80000, axi_sram=0x100000, zero_run_bits=5, tp_cores=4, kernel_max=11, offset_bits=4,
    clock=800e6, clock_source="from the 5 TOPS that the chip is sold with",
    sram_width=32, host=CORTEX_A73,
)

CHIPS = {chip.name: chip for chip in (A311D,)}

LIMITS = {"dram_bandwidth": (1e6, 1e12, "B/s"), "clock": (1e6, 1e10, "Hz"), "sram": (0, 1 << 24, "B"),
          "nn_cores": (1, 16, "cores")}
"""What-ifs a user may ask for: least, most, unit. Sixteen cores are what GL_NN_CONFIG's four bits can count."""


def varied(chip: Chip, settings: Mapping[str, float]) -> Chip:
    """The chip with another VIP SRAM, core count or clock. Raises UsageError for what no chip can have."""
    for name, value in settings.items():
        if name not in LIMITS:
            raise UsageError(f"there is no setting '{name}'", want=", ".join(LIMITS))
        least, most, unit = LIMITS[name]
        if not least <= value <= most or (name in ("sram", "nn_cores") and value != int(value)):
            whole = "a whole number, " if name in ("sram", "nn_cores") else ""
            raise UsageError(f"no chip has this {name}", got=f"{value:g} {unit}",
                             want=f"{whole}{least:g} to {most:g} {unit}")
    return replace(chip, vip_sram=int(settings.get("sram", chip.vip_sram)),
                   nn_cores=int(settings.get("nn_cores", chip.nn_cores)),
                   clock=float(settings.get("clock", chip.clock)))
