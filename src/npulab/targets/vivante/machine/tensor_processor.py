"""Execute one TP descriptor: walk a window of an image, put each value through the ALU, store where an odometer points.

    value = saturate(round_half_even(f(v - in_zero_point) * (1 + m / 2**15) * 2**-s) + out_zero_point)

with f the identity or a piecewise linear table. Source: TP notes 2.3 and 2.5; executing the open driver's descriptors
by this model gives the tensors that are mathematically expected. Inferred: the rounding of ties, linear interpolation
between table entries, and that elements outside the image are the border constant before the ALU.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from npulab.targets.vivante.machine.convolve import Work
from npulab.targets.vivante.machine.faults import Budget, JobFault
from npulab.targets.vivante.machine.memory import Memory
from npulab.targets.vivante.tp import TPDescriptor

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
NO_CIRCULAR_BUFFER = 0x03FFFFFF
TABLE_ENTRIES = 1024

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
        return Work(0, 0, 0)
    budget.spend("elements", wide * high * deep)
    window = _window(memory, d, (deep, high, wide))
    values = _in_tile_order(d, window)
    budget.spend("elements", max(0, values.size - wide * high * deep))
    counts = _counts(d)
    if 0 in counts:
        _store_at(memory, d, values, _with_resets(d, counts, deep, list(_tiles(d, high, wide))))
    else:
        _store(memory, d, values, counts)
    return Work(0, window.size, values.size)


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
        v = _piecewise_linear(_table(memory, d), v)
    scaled = v * (1 + d.alu_output_post_multiplier / 2**15) * 2.0**-d.alu_output_postshift
    out = np.clip(np.rint(scaled) + d.out_zp, 0, 255).astype(np.uint8)
    identity = not d.alu_pwl_enable and bool((out[:256] == np.arange(256)).all())
    return None if identity else out[:256], int(out[256])


def _table(memory: Memory, d: TPDescriptor) -> NDArray[np.float64]:
    """The 1024 entries of the table as numbers."""
    if not (d.alu_load_pwl_lut and d.alu_load_pwl_lut_global_mem and d.alu_pwl_sign_support):
        raise JobFault("unimplemented feature", "a TP table that is not loaded from memory, or has no negative half")
    return fp21_value(np.array(memory.words(d.alu_load_pwl_lut_address, TABLE_ENTRIES, "TP table"), np.int64))


def fp21_value(bits: I64) -> NDArray[np.float64]:
    """What a 21-bit float means: sign 20, exponent 19:15 (bias 15), mantissa 14:0; subnormals below 2**-14."""
    exponent, mantissa = bits >> 15 & 31, bits & 0x7FFF
    normal = (1 + mantissa / 2**15) * np.exp2(exponent - 15.0)
    return np.where(bits >> 20 & 1, -1.0, 1.0) * np.where(exponent == 0, mantissa * 2.0**-29, normal)


def fp21_bits(values: NDArray[np.float64]) -> I64:
    """The nearest 21-bit float, ties to even, saturated."""
    sign = np.signbit(values).astype(np.int64) << 20
    size = np.abs(values)
    exponent = np.clip(np.floor(np.log2(np.maximum(size, 2.0**-40))), -14, 15)
    mantissa = np.rint(size / np.exp2(exponent) * 2**15).astype(np.int64)  # 2**15 and up, unless subnormal
    bits = np.where(size < 2.0**-14, np.rint(size * 2.0**29).astype(np.int64),
                    (exponent.astype(np.int64) + 14 << 15) + mantissa)
    return sign | np.minimum(bits, 0xF7FFF)


def _piecewise_linear(table: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entry (sign, exponent, top four mantissa bits), and a line to the next by the other eleven bits."""
    bits = fp21_bits(v)
    index, fraction = bits >> 11, (bits & 0x7FF) / 2**11
    after = np.minimum(index + 1, TABLE_ENTRIES - 1)
    out: NDArray[np.float64] = table[index] + (table[after] - table[index]) * fraction
    return out


def _tiles(d: TPDescriptor, high: int, wide: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, first column, columns) of each tile, window coordinates, clipped at the window's end."""
    if (-(-high // d.in_tile_y_inc)) * (-(-wide // d.in_tile_x_inc)) > 1 << 20:
        raise JobFault("work limit", "a TP window has more than a million tiles")
    for y in range(0, high, d.in_tile_y_inc):
        for x in range(0, wide, d.in_tile_x_inc):
            yield y, min(d.in_tile_y_size, high - y), x, min(d.in_tile_x_size, wide - x)


def _in_tile_order(d: TPDescriptor, window: U8) -> U8:
    """The window's values in the order in which they are produced."""
    deep, high, wide = window.shape
    ty, step_y = min(d.in_tile_y_size, high), min(d.in_tile_y_inc, high)
    tx, step_x = min(d.in_tile_x_size, wide), min(d.in_tile_x_inc, wide)
    if (ty, tx) == (step_y, step_x) and high % ty == 0 and wide % tx == 0:
        return window.reshape(deep, high // ty, ty, wide // tx, tx).transpose(0, 1, 3, 2, 4).reshape(-1)
    tiles = list(_tiles(d, high, wide))
    total = sum(rows * columns for _, rows, _, columns in tiles)
    if deep * len(tiles) > 1 << 20 or total * deep > 1 << 28:
        raise JobFault("work limit", "a TP window has too many tiles")
    return np.concatenate([plane[y : y + rows, x : x + columns].reshape(-1)
                           for plane in window for y, rows, x, columns in tiles])


def _counts(d: TPDescriptor) -> list[int]:
    return [getattr(d, f"out_loop_{k}_count") for k in range(6)]


def _increments(d: TPDescriptor) -> list[int]:
    return [getattr(d, f"out_loop_{k}_inc") for k in range(7)]


def _store(memory: Memory, d: TPDescriptor, values: U8, counts: list[int]) -> None:
    """Store where every loop has a count: the odometer is a number in mixed radix."""
    inner = int(np.prod([c for c in counts], dtype=np.float64))
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
    at = np.zeros(values.size, np.int64)
    left = np.arange(values.size, dtype=np.int64)
    for count, increment in zip(counts, increments[:6], strict=True):
        at += left % count * increment
        left //= count
    _store_at(memory, d, values, at + left * increments[6])


def _apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """No two steps of the loops fall on one address, so that the order of stores does not matter."""
    reach = 0
    for stride, n in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if stride <= reach:
            return False
        reach += (n - 1) * stride
    return True


def _store_at(memory: Memory, d: TPDescriptor, values: U8, at: I64) -> None:
    low, high = int(at.min()), int(at.max())
    r = memory.find(d.out_image_base_address + low, high - low + 1, "TP output")
    where = at + (d.out_image_base_address - r.address)
    r.data[where] = values
    if r.written is not None:
        r.written[where] = True
    memory.touched(r)


def _with_resets(d: TPDescriptor, counts: list[int], deep: int, tiles: list[tuple[int, int, int, int]]) -> I64:
    """Byte offsets where loops without a count end with a tile row (loop 1) or a tile (loop 2)."""
    total = deep * sum(rows * columns for _, rows, _, columns in tiles)
    if total > 1 << 21:
        raise JobFault("work limit", "a TP job with reset loops has more than two million elements")
    increments = _increments(d)
    position = [0] * 7
    out = np.empty(total, np.int64)

    def bump(k: int) -> None:
        while True:
            position[k] += 1
            if k == 6 or counts[k] == 0 or position[k] < counts[k]:
                return
            position[k] = 0
            k += 1

    n = 0
    for _ in range(deep):
        for _, rows, _, columns in tiles:
            for _ in range(rows):
                for _ in range(columns):
                    out[n] = sum(i * step for i, step in zip(position, increments, strict=True))
                    n += 1
                    bump(0)
                if counts[1] == 0 and d.out_loop_1_reset:
                    position[0] = position[1] = 0
                    bump(2)
            if counts[2] == 0 and d.out_loop_2_reset:
                position[0] = position[1] = position[2] = 0
                bump(3)
    return out
