"""How the NN engine cuts an output plane into tiles, and its kernels into superblocks.

Facts: Mesa 25.0.7's tiler for the v7 engine (project notes, NN section 5); byte-identical on every golden case.
"""

from __future__ import annotations

from dataclasses import dataclass

from npulab.errors import CapacityError
from npulab.targets.vivante.chips import Chip


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile width and height in output pixels; `superblocks` passes over the input, each with a share of the kernels."""

    tile_x: int
    tile_y: int
    superblocks: int


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def align(value: int, step: int) -> int:
    """`value`, rounded up to a multiple of `step`."""
    return cdiv(value, step) * step


def interleave(tile_x: int, kernel_y: int) -> int:
    """How many rows of a tile share the 64 lanes of a core.

    The limits 36 and 18 are (64 + 8) / 2 and (64 + 8) / 4. The v7 rule gives 4 to medium spans and only 2 to the
    narrowest; odd, but it is what the driver does.
    """
    span = kernel_y - 1 + tile_x
    if span > 36:
        return 1
    most = 1 if tile_x > 32 else 2 if tile_x > 16 else 4 if tile_x > 8 else 8
    return min(most, 4 if span > 18 else 2)


def tile(out_x: int, out_y: int, out_c: int, kernel_x: int, kernel_y: int, stride: int, chip: Chip) -> Tiling:
    """Tiles of a job with `out_c` output channels (1 for an addition).

    `out_x` and `out_y` are the extents that the engine evaluates: doubled when only first pixels are kept. `stride` is
    the operator's own, even when it has been lowered away: it makes tile heights even.
    """
    tile_x = min(out_x, chip.tile_x_max)
    il = interleave(tile_x, kernel_y)
    tile_y = chip.input_buffer_depth * il - kernel_y + 1
    tile_y = min(tile_y, il * chip.accumulation_buffer_depth, out_y)
    if stride > 1 and tile_y % 2:
        tile_y -= 1
    tile_y = max(tile_y, 1)

    depth = chip.accumulation_buffer_depth
    per_core = cdiv(out_c, chip.nn_cores)
    kernels = depth * il // tile_y
    if kernel_x == 1:
        kernels = min(kernels, depth // 3)
    kernels = min(kernels, per_core, 127)
    if kernels < 1:
        raise CapacityError("no kernel fits the accumulation buffer beside one tile", got=f"tile {tile_x}x{tile_y}",
                            source="NN notes, section 5")
    passes = cdiv(out_c, chip.nn_cores * kernels)
    per_pass = cdiv(out_c, passes * chip.nn_cores)
    return Tiling(tile_x, tile_y, cdiv(per_core, per_pass))
