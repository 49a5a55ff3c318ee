"""Execute one TP descriptor: walk a window of an image, put each value through the ALU, store where an odometer points.

    value = saturate(round_half_even(f(v - in_zero_point) * (1 + m / 2**15) * 2**-s) + out_zero_point)

with f the identity or a piecewise linear table. Source: TP notes 2.3 and 2.5; executing the open driver's descriptors
by this model gives the tensors that are mathematically expected. Inferred: the rounding of ties, linear interpolation
between table entries, and that elements outside the image are the border constant before the ALU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from npulab.targets.vivante.fp21 import TABLE_BYTES, TABLE_ENTRIES, fp21_value, interpolated
from npulab.targets.vivante.machine.convolve import Work
from npulab.targets.vivante.machine.faults import Budget, JobFault
from npulab.targets.vivante.machine.memory import Memory
from npulab.targets.vivante.tp import TPDescriptor

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
NO_CIRCULAR_BUFFER = 0x03FFFFFF
ELEMENTS_MAX = 1 << 28
"""Elements of one descriptor, so that memory has a bound."""
WALK_MAX = 1 << 24
"""Elements of one descriptor where each needs its own address."""

_ONLY = {
    "in_tile_sequence": 0, "in_tile_global_mem": 0, "in_image_global_mem": 1, "alu_i2f_enable": 1,
    "alu_square_enable": 0, "alu_horz_processing": 0, "alu_vert_processing": 0, "alu_nms_enable": 0,
    "alu_mult_enable": 0, "alu_f2i_enable": 1, "in_tile_list_address": 0, "out_tile_skip_at_border": 0,
    "out_image_global_mem": 1, "out_brick_mode": 0, "alu_z_filter_mode": 0, "alu_square_preshift": 0,
    "in_image_data_type": 0, "out_image_data_type": 0, "alu_relu_enable": 0, "alu_filter_pwl_swap": 0,
    "flat_rounding_mode": 1, "integer_rounding_mode": 1, "alu_input_preshift": 0, "alu_reorder_bits_used": 0,
    "alu_reorder_loop_2_mode": 0, "in_image_border_mode": 0, "in_circular_buf_size": 0, "out_circular_buf_size": 0,
    "in_circular_buf_end": NO_CIRCULAR_BUFFER, "out_circular_buf_end": NO_CIRCULAR_BUFFER,
}
"""Fields whose other values are not known well enough to execute."""


def check_features(d: TPDescriptor) -> None:
    """Fault on fields whose meaning is unknown, and on windows and tiles that walk nowhere."""
    for name, value in _ONLY.items():
        if getattr(d, name) != value:
            raise JobFault("unimplemented feature", f"TP descriptor field {name} = {getattr(d, name)}")
    if d.in_window_x_end < d.in_window_x_start or d.in_window_y_end < d.in_window_y_start:
        raise JobFault("bad descriptor", "a TP window ends before it starts")
    if not all((d.in_tile_x_size, d.in_tile_y_size, d.in_tile_x_inc, d.in_tile_y_inc)):
        raise JobFault("bad descriptor", "a TP tile has an extent of zero")


def run(memory: Memory, d: TPDescriptor, budget: Budget) -> Work:
    """One core's share of a TP job."""
    wide = d.in_window_x_end - d.in_window_x_start + 1
    high = d.in_window_y_end - d.in_window_y_start + 1
    deep = d.in_window_z_start_overfetch + d.in_image_z_size + d.in_window_z_end_overfetch
    if not deep:
        return Work(0, 0, 0, 0)
    rows, columns = _cut(high, d.in_tile_y_size, d.in_tile_y_inc), _cut(wide, d.in_tile_x_size, d.in_tile_x_inc)
    elements = deep * int(rows[1].sum()) * int(columns[1].sum())
    budget.spend("elements", max(wide * high * deep, elements))
    if max(wide * high * deep, elements) > ELEMENTS_MAX:
        raise JobFault("work limit", f"a TP job of {max(wide * high * deep, elements)} elements")
    window = _window(memory, d, (deep, high, wide))
    walk = None if _regular(d, high, wide) else _walk(rows, columns, deep)
    values = _in_tile_order(d, window) if walk is None else window[:, walk.y, walk.x].reshape(-1)
    counts = _counts(d)
    if 0 in counts:
        _store_at(memory, d, values, _with_resets(d, counts, deep, walk or _walk(rows, columns, deep)))
    else:
        _store(memory, d, values, counts)
    seen = range(max(0, d.in_window_x_start), min(d.in_window_x_end + 1, d.in_image_x_size))
    lines = range(max(0, d.in_window_y_start), min(d.in_window_y_end + 1, d.in_image_y_size))
    table = TABLE_BYTES if d.alu_pwl_enable else 0
    return Work(0, table, d.in_image_z_size * len(lines) * len(seen), values.size)


def _cut(extent: int, size: int, step: int) -> tuple[I64, I64]:
    """Along one axis of the window: where each tile starts, and its size, clipped at the window's end."""
    starts = np.arange(0, extent, step, dtype=np.int64)
    return starts, np.minimum(size, extent - starts)


@dataclass(frozen=True, slots=True, eq=False)
class _Walk:
    """One slice, element by element in the order of production; all arrays of one length.

    y, x     place in the window.           tile     number of the tile in the slice.
    row      number of the row in its tile. column   number of the element in its row.
    rows_before   rows of earlier tiles of the slice.
    """

    y: I64
    x: I64
    tile: I64
    row: I64
    column: I64
    within: I64
    rows_before: I64
    tiles: int
    rows: int


def _walk(rows: tuple[I64, I64], columns: tuple[I64, I64], deep: int) -> _Walk:
    (top, high), (left, wide) = rows, columns
    tiles = len(top) * len(left)
    elements = int(high.sum()) * int(wide.sum())
    if elements * deep > WALK_MAX:
        raise JobFault("work limit", f"a TP job of {elements * deep} elements whose tiles do not divide its window")
    sizes = np.outer(high, wide).reshape(-1)
    tile = np.repeat(np.arange(tiles), sizes)
    within = np.arange(elements) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    down, across = np.divmod(tile, len(left))
    row, column = np.divmod(within, wide[across])
    rows_per_tile = np.repeat(high, len(left))
    before = (np.cumsum(rows_per_tile) - rows_per_tile)[tile]
    return _Walk(top[down] + row, left[across] + column, tile, row, column, within, before, tiles,
                 int(rows_per_tile.sum()))


def _regular(d: TPDescriptor, high: int, wide: int) -> bool:
    """Tiles side by side that divide the window."""
    ty, tx = min(d.in_tile_y_size, high), min(d.in_tile_x_size, wide)
    return (ty, tx) == (min(d.in_tile_y_inc, high), min(d.in_tile_x_inc, wide)) and high % ty == 0 and wide % tx == 0


def _window(memory: Memory, d: TPDescriptor, shape: tuple[int, int, int]) -> U8:
    """The window's values behind the ALU, as (z, y, x)."""
    table, border = _alu(memory, d)
    y0, x0 = max(0, d.in_window_y_start), max(0, d.in_window_x_start)
    y1, x1 = min(d.in_image_y_size, d.in_window_y_end + 1), min(d.in_image_x_size, d.in_window_x_end + 1)
    out = np.full(shape, border, np.uint8)
    if y1 > y0 and x1 > x0 and d.in_image_z_size:
        base = d.in_image_base_address + y0 * d.in_image_stride + x0
        image, _ = memory.box(base, (d.in_image_z_size, y1 - y0, x1 - x0), (d.in_image_slice, d.in_image_stride, 1),
                              "TP input", store=False)
        at_z, at_y, at_x = d.in_window_z_start_overfetch, y0 - d.in_window_y_start, x0 - d.in_window_x_start
        out[at_z : at_z + d.in_image_z_size, at_y : at_y + y1 - y0, at_x : at_x + x1 - x0] = (
            image if table is None else table[image])
    return out


def _alu(memory: Memory, d: TPDescriptor) -> tuple[U8 | None, int]:
    """(output byte of each input byte, or None for the identity; output byte of the border)."""
    v = np.append(np.arange(256), d.in_image_border_const + d.in_zp) - float(d.in_zp)
    if d.alu_pwl_enable:
        v = interpolated(_table(memory, d), v)
    scaled = v * (1 + d.alu_output_post_multiplier / 2**15) * 2.0**-d.alu_output_postshift
    out = np.clip(np.rint(scaled) + d.out_zp, 0, 255).astype(np.uint8)
    identity = not d.alu_pwl_enable and bool((out[:256] == np.arange(256)).all())
    return None if identity else out[:256], int(out[256])


def _table(memory: Memory, d: TPDescriptor) -> NDArray[np.float64]:
    """The 1024 entries of the table as numbers."""
    if not (d.alu_load_pwl_lut and d.alu_load_pwl_lut_global_mem and d.alu_pwl_sign_support):
        raise JobFault("unimplemented feature", "a TP table that is not loaded from memory, or has no negative half")
    return fp21_value(np.array(memory.words(d.alu_load_pwl_lut_address, TABLE_ENTRIES, "TP table"), np.int64))


def _in_tile_order(d: TPDescriptor, window: U8) -> U8:
    """The window's values in the order in which they are produced, where tiles are regular."""
    deep, high, wide = window.shape
    ty, tx = min(d.in_tile_y_size, high), min(d.in_tile_x_size, wide)
    return window.reshape(deep, high // ty, ty, wide // tx, tx).transpose(0, 1, 3, 2, 4).reshape(-1)


def _counts(d: TPDescriptor) -> list[int]:
    return [getattr(d, f"out_loop_{k}_count") for k in range(6)]


def _increments(d: TPDescriptor) -> list[int]:
    return [getattr(d, f"out_loop_{k}_inc") for k in range(7)]


def _store(memory: Memory, d: TPDescriptor, values: U8, counts: list[int]) -> None:
    """Store where every loop has a count: the odometer is a number in mixed radix."""
    inner = math.prod(counts)
    increments = _increments(d)
    # Loops that never get to their end would only add empty space to the view.
    if inner <= values.size and values.size % inner == 0:
        shape = (values.size // inner, *reversed(counts))
        strides = tuple(reversed(increments))
        if _apart(shape, strides):
            span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            r = memory.find(d.out_image_base_address, span, "TP output")
            start = d.out_image_base_address - r.address
            as_strided(r.data[start:], shape, strides)[...] = values.reshape(shape)
            if r.written is not None:
                as_strided(r.written[start:], shape, strides)[...] = True
            memory.touched(r)
            return
    if values.size > WALK_MAX:
        raise JobFault("work limit", f"a TP job that stores {values.size} elements one by one")
    _store_at(memory, d, values, _odometer(np.arange(values.size, dtype=np.int64), [*counts, 0], increments))


def _apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether no two elements of a strided view share an address, so that the order of stores does not matter."""
    reach = 0
    for step, n in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if step <= reach:
            return False
        reach += step * (n - 1)
    return True


def _store_at(memory: Memory, d: TPDescriptor, values: U8, at: I64) -> None:
    low, high = int(at.min()), int(at.max())
    r = memory.find(d.out_image_base_address + low, high - low + 1, "TP output")
    where = at + (d.out_image_base_address - r.address)
    r.data[where] = values
    if r.written is not None:
        r.written[where] = True
    memory.touched(r)


def _with_resets(d: TPDescriptor, counts: list[int], deep: int, walk: _Walk) -> I64:
    """Byte offsets where loops without a count end with a tile row (loop 1) or a tile (loop 2).

    Ending a loop zeroes it and all faster ones and carries one step into the next (TP notes 2.3). So the faster loops
    count elements since the last end, and the slower ones count ends.
    """
    counts, steps = [*counts, 0], _increments(d)
    z = np.arange(deep)[:, None]
    tile, row = z * walk.tiles + walk.tile, z * walk.rows + walk.rows_before + walk.row
    by_row, by_tile = counts[1] == 0 and d.out_loop_1_reset, counts[2] == 0 and d.out_loop_2_reset
    if by_row:
        at = _odometer(walk.column, counts[:2], steps[:2])
        if by_tile:
            at = at + walk.row * steps[2] + _odometer(tile, counts[3:], steps[3:])
        else:
            at = at + _odometer(row, counts[2:], steps[2:])
    elif by_tile:
        at = _odometer(walk.within, counts[:3], steps[:3]) + _odometer(tile, counts[3:], steps[3:])
    else:
        at = _odometer(z * len(walk.y) + np.arange(len(walk.y)), counts, steps)
    return at.reshape(-1)


def _odometer(n: I64, counts: list[int], steps: list[int]) -> I64:
    """Sum of loop index times increment after `n` steps, fastest loop first. A loop without a count takes all."""
    out = np.zeros_like(n)
    for count, step in zip(counts, steps, strict=True):
        if not count:
            return out + n * step
        n, index = np.divmod(n, count)
        out += index * step
    return out
