"""What a convolution keeps in VIP SRAM: its coefficients, and the input tile that several superblocks re-read.

Facts: Mesa 25.0.7 (project notes, NN section 6.4). Caching never changes results, only traffic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from npulab.targets.vivante.chips import Chip
from npulab.targets.vivante.nn import CACHE_FULL, CACHE_NONE, CACHE_PARTIAL
from npulab.targets.vivante.tiling import Tiling, align

RESERVED = 0x800
"""The first bytes of VIP SRAM, which the driver leaves alone."""

_PATTERNS = (
    (1024, 0x13, 0x00080000),
    (512, 0x3D, 0x2AAAAAA0 << 32),
    (256, 0x3E, 0x7FFFFFFF << 32 | 0xFFFFAAAA),
    (160, 0x06, 0x0000007E),
    (0, 0x3F, 0xFFFFFFFF << 32 | 0xFFFFFFFE),
)
"""(output channels from, length - 1, bits): values seen in the vendor's streams, by output channels; not computed."""


@dataclass(frozen=True, slots=True)
class Caching:
    """The caching fields of an NN descriptor. Addresses are byte offsets in VIP SRAM."""

    kernel_mode: int
    kernel_end: int
    pattern_msb: int
    pattern: int
    image_mode: int
    image_start: int
    image_end: int
    kernel_start: int = RESERVED


Image = Literal["driver", "first", "never"]
"""Whether the input tile gets SRAM: as the driver decides, which gives it nothing when the coefficients alone fill the
SRAM; before the coefficients, whatever their size; not at all."""


def cache(coefficient_bytes: int, tiling: Tiling, kernel_x: int, in_c: int, out_c: int, chip: Chip, *,
          kernels: bool = True, image: Image = "driver") -> Caching:
    """Divide the SRAM between coefficients and the input tile, when superblocks re-read it.

    `coefficient_bytes` is the streams without their header. `kernels` False keeps no coefficients.
    """
    size = chip.vip_sram
    if size <= RESERVED:
        kernels, image = False, "never"
    tile_bytes = 0
    if tiling.superblocks > 1 and image != "never":
        side = kernel_x - 1
        tile_bytes = align(align((tiling.tile_x + side) * (tiling.tile_y + side), 16) * in_c, 128)
    msb = pattern = 0
    if RESERVED + coefficient_bytes + tile_bytes < size:
        mode = CACHE_FULL
        end = max(min(align(RESERVED + coefficient_bytes, 128), size), 0xA00)
    else:
        mode = CACHE_PARTIAL
        msb, pattern = next((m, p) for least, m, p in _PATTERNS if out_c >= least)
        end = 0
        if RESERVED + coefficient_bytes >= size and image != "first":
            end, tile_bytes = size, 0
        elif tile_bytes > size - RESERVED * (image == "first"):
            end, tile_bytes = (size, 0) if image == "first" else (0, 0)
        else:
            end = size - tile_bytes
    if not kernels:
        mode, msb, pattern = CACHE_NONE, 0, 0
    start, stop = (end, min(end + tile_bytes, size)) if tile_bytes >= RESERVED else (0, RESERVED)
    return Caching(mode, end, msb, pattern, CACHE_FULL if tile_bytes else CACHE_NONE, start, stop)
