"""TP jobs that move tensors between layouts: NHWC to planes and back, space-to-depth, padding.

Planar means C planes of H rows of W bytes. Facts: Mesa 25.0.7 and the tests of its notes (TP section 2.4). The jobs
that npulab's own plans use are right for every size; `reference_reshuffle` and `reference_pad` repeat that driver.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from npulab.targets.vivante.jobs import Share
from npulab.targets.vivante.tiling import cdiv

TABLE_TILE_X, TABLE_TILE_Y = 64, 16
"""Of table jobs, in elements and rows (TP notes 2.5)."""


def to_planar(height: int, width: int, channels: int, zero_point: int, cores: int = 1) -> tuple[Share, ...]:
    """NHWC bytes -> planes; rows dealt out to `cores`."""
    return tuple(Share(first * width * channels, first * width, {
        "in_image_x_size": channels, "in_image_y_size": width, "in_image_z_size": rows,
        "in_image_stride": channels, "in_image_slice": width * channels,
        "in_window_x_end": channels - 1, "in_window_y_end": width - 1,
        "in_tile_y_size": width, "in_tile_y_inc": width,
        "out_loop_0_count": width,
        "out_loop_1_inc": height * width, "out_loop_1_count": channels,
        "out_loop_2_inc": width, "out_loop_2_count": rows,
        "in_zp": zero_point, "out_zp": zero_point,
    }) for first, rows in dealt(height, cores))


def dealt(units: int, cores: int) -> list[tuple[int, int]]:
    """(first, count) of each core's share; none is empty, unless there is nothing to deal out."""
    cores = max(1, min(cores, units))
    cuts = [units * i // cores for i in range(cores + 1)]
    return [(a, b - a) for a, b in pairwise(cuts)]


def from_planar(height: int, width: int, channels: int, zero_point: int, cores: int = 1) -> tuple[Share, ...]:
    """Planes -> NHWC bytes. On one core the planes are read as one run of H-byte rows; several share the channels."""
    if width * channels > 0x8000 or cores > 1:  # a window's end is a signed 16-bit number: read plane by plane instead
        return tuple(Share(first * height * width, first, {
            "in_image_x_size": width, "in_image_y_size": height, "in_image_z_size": planes,
            "in_image_stride": width, "in_image_slice": height * width,
            "in_window_x_end": width - 1, "in_window_y_end": height - 1,
            "in_tile_x_size": width, "in_tile_y_size": height, "in_tile_x_inc": width, "in_tile_y_inc": height,
            "out_loop_0_inc": channels, "out_loop_0_count": width,
            "out_loop_1_inc": width * channels, "out_loop_1_count": height,
            "out_loop_2_inc": 1, "out_loop_2_count": planes,
            "in_zp": zero_point, "out_zp": zero_point,
        }) for first, planes in dealt(channels, cores))
    return (Share(0, 0, {
        "in_image_x_size": height, "in_image_y_size": width * channels, "in_image_z_size": 1,
        "in_image_stride": height, "in_image_slice": height * width * channels,
        "in_window_x_end": height - 1, "in_window_y_end": width * channels - 1,
        "in_tile_y_size": 1, "in_tile_y_inc": 1,
        "out_loop_0_inc": channels, "out_loop_0_count": width,
        "out_loop_2_inc": width * channels, "out_loop_2_count": height,
        "out_loop_3_inc": 1, "out_loop_3_count": channels,
        "out_loop_4_inc": height * width * channels,
        "in_zp": zero_point, "out_zp": zero_point,
    }),)


def _space_to_depth_fields(window_x: tuple[int, int], window_y: tuple[int, int], out_x: int, out_y: int,
                           plane: int, row: int) -> dict[str, int]:
    """The loop nest of a space-to-depth by two: `out_x` by `out_y` positions into planes of `plane` bytes."""
    tile_x, tile_y = 2 * out_x, 2 * out_y
    return {
        "in_window_x_start": window_x[0], "in_window_x_end": window_x[1],
        "in_window_y_start": window_y[0], "in_window_y_end": window_y[1],
        "in_tile_x_size": tile_x, "in_tile_y_size": tile_y, "in_tile_x_inc": tile_x, "in_tile_y_inc": tile_y,
        "out_loop_0_inc": plane, "out_loop_0_count": 2,
        "out_loop_1_inc": 1, "out_loop_1_count": out_x,
        "out_loop_2_inc": 2 * plane, "out_loop_2_count": 2,
        "out_loop_3_inc": row, "out_loop_3_count": out_y,
        "out_loop_6_inc": 4 * plane,
        "out_loop_1_reset": 1, "out_loop_3_reset": 1,
    }


def space_to_depth(height: int, width: int, channels: int, out_y: int, out_x: int, pad_y: int, pad_x: int,
                   zero_point: int, cores: int) -> tuple[Share, ...]:
    """Plane 4c + 2(y % 2) + (x % 2), pixel (y // 2, x // 2), of the planar input moved by (pad_y, pad_x).

    Writes 4 * channels planes of out_y by out_x bytes; what lies outside the input reads its zero point. Split over
    `cores` along channels, or along rows where there are more of those.
    """
    plane = out_y * out_x
    by_channel = channels > 1
    units = channels if by_channel else out_y
    cores = min(cores, units)
    if not by_channel and 2 * (out_y - cdiv(out_y, cores)) - pad_y >= height - 1:
        cores = 1  # a share of padding alone would have an empty image, which nobody has tried on silicon
    shares = []
    done = 0
    for core in range(cores):
        count = cdiv(units - done, cores - core)
        if by_channel:
            first, rows, slices, start = 0, height, count, -pad_y
            source, result = done * height * width, done * 4 * plane
            count_y = out_y
        else:
            first = max(0, 2 * done - pad_y)
            stop = min(height, 2 * (done + count) - pad_y)
            rows, slices, start = max(0, stop - first), channels, 2 * done - pad_y - first
            source, result = min(first, height - 1) * width, done * out_x
            count_y = count
        shares.append(Share(source, result, {
            "in_image_x_size": width, "in_image_y_size": rows, "in_image_z_size": slices,
            "in_image_stride": width, "in_image_slice": height * width,
            **_space_to_depth_fields((-pad_x, 2 * out_x - 1 - pad_x), (start, start + 2 * count_y - 1), out_x, count_y,
                                     plane, out_x),
            "in_zp": zero_point, "out_zp": zero_point,
        }))
        done += count
    return tuple(shares)


def pad_planes(height: int, width: int, channels: int, before: tuple[int, int], after: tuple[int, int],
               in_zp: int, out_zp: int, cores: int = 1) -> tuple[Share, ...]:
    """Planes with `before` and `after` (y, x) pixels of the zero point around them; planes dealt out to `cores`."""
    out_y, out_x = before[0] + height + after[0], before[1] + width + after[1]
    return tuple(Share(first * height * width, first * out_y * out_x, {
        "in_image_x_size": width, "in_image_y_size": height, "in_image_z_size": planes,
        "in_image_stride": width, "in_image_slice": height * width,
        "in_window_x_start": -before[1], "in_window_x_end": width - 1 + after[1],
        "in_window_y_start": -before[0], "in_window_y_end": height - 1 + after[0],
        "in_tile_x_size": out_x, "in_tile_y_size": out_y, "in_tile_x_inc": out_x, "in_tile_y_inc": out_y,
        "out_loop_0_inc": 0,
        "out_loop_1_inc": 1, "out_loop_1_count": out_x,
        "out_loop_2_inc": out_x, "out_loop_2_count": out_y,
        "out_loop_6_inc": out_x * out_y,
        "in_zp": in_zp, "out_zp": out_zp,
    }) for first, planes in dealt(channels, cores))


def rescale_bytes(count: int, in_zp: int, out_zp: int, multiplier: int, shift: int) -> tuple[Share, ...]:
    """out = saturate((in - in_zp) * (1 + multiplier / 2**15) * 2**-shift + out_zp) over `count` bytes, in place order.

    The bytes are read as rows of up to 4096 (16 bits hold an extent), with a second share for the rest.
    """
    return tuple(Share(start, start, {
        **_whole_image(x, lines, slices),
        "in_tile_x_size": x, "in_tile_y_size": lines, "in_tile_x_inc": x, "in_tile_y_inc": lines,
        "out_loop_0_inc": 0,
        "out_loop_1_inc": 1, "out_loop_1_count": x,
        "out_loop_2_inc": x, "out_loop_2_count": lines,
        "out_loop_6_inc": x * lines,
        "alu_output_post_multiplier": multiplier, "alu_output_postshift": shift,
        "in_zp": in_zp, "out_zp": out_zp,
    }) for start, x, lines, slices in _as_images(count))


def _as_images(count: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, x, y, z) of images that `count` bytes in a row are; more rows than 16 bits hold become slices."""
    row = min(count, 4096)
    rows, rest = divmod(count, row)
    slices = 1 if rows <= 0x7FFF else next(s for s in range(cdiv(rows, 0x7FFF), rows + 1) if rows % s == 0)
    yield 0, row, rows // slices, slices
    if rest:
        yield row * rows, rest, 1, 1


def _whole_image(x: int, y: int, z: int) -> dict[str, int]:
    """The fields of a window over all of an image whose rows and slices lie one behind the other."""
    return {
        "in_image_x_size": x, "in_image_y_size": y, "in_image_z_size": z,
        "in_image_stride": x, "in_image_slice": x * y, "in_window_x_end": x - 1, "in_window_y_end": y - 1,
    }


def through_table(shape: tuple[int, ...], in_zp: int, out_zp: int, multiplier: int, shift: int,
                  cores: int) -> tuple[Share, ...]:
    """A table function over all bytes of a tensor, in place order: the table's output is scaled as in `rescale_bytes`.

    The walk is that of Mesa 26 for (1, H, W, C) tensors, which cuts H over the cores if there are six rows; tensors of
    other ranks are cut into rows. The table's address is still to be filled in.
    """
    if len(shape) == 4:
        _, height, width, channels = shape
        images = [(first * width * channels, channels, width, rows)
                  for first, rows in dealt(height, cores if height >= 6 else 1)]
    else:
        images = [(first + start, x, y, z) for first, count in dealt(math.prod(shape), cores)
                  for start, x, y, z in _as_images(count)]
    return tuple(Share(start, start, {
        **_whole_image(x, y, z),
        "alu_pwl_enable": 1, "alu_load_pwl_lut": 1, "alu_load_pwl_lut_global_mem": 1, "alu_pwl_sign_support": 1,
        "in_tile_x_size": TABLE_TILE_X, "in_tile_y_size": TABLE_TILE_Y,
        "in_tile_x_inc": TABLE_TILE_X, "in_tile_y_inc": TABLE_TILE_Y,
        "out_loop_0_inc": 0,
        "out_loop_1_inc": 1, "out_loop_1_count": 0, "out_loop_1_reset": 1,
        "out_loop_2_inc": x, "out_loop_2_count": 0, "out_loop_2_reset": 1,
        "out_loop_3_inc": TABLE_TILE_X, "out_loop_3_count": cdiv(x, TABLE_TILE_X),
        "out_loop_4_inc": TABLE_TILE_Y * x, "out_loop_4_count": cdiv(y, TABLE_TILE_Y),
        "out_loop_6_inc": x * y,
        "alu_output_post_multiplier": multiplier, "alu_output_postshift": shift,
        "in_zp": in_zp, "out_zp": out_zp,
    }) for start, x, y, z in images)


def reference_reshuffle(d1: int, d2: int, channels: int, kernel: int, same: bool, zero_point: int,
                        tp_cores: int) -> tuple[Share, ...]:
    """Space-to-depth as Mesa 25.0.7 emits it, its defects on images that are not square included (TP notes 2.4.3)."""
    in_x, in_y = (d2, d1) if d2 > d1 else (d1, d2)
    grow = 0 if not same else 2 if kernel == 5 else 1
    out_x, out_y = cdiv(in_x, 2) + grow, cdiv(in_y, 2) + grow
    extra = int(kernel == 5)
    pad_x, pad_y = (extra + in_x % 2, extra + in_y % 2) if same else (0, 0)
    plane = out_x * out_y
    cores = tp_cores if (d1 > 8 or channels > 1) and not (channels == 3 and d1 in (224, 320)) else 1
    out = (out_x, out_y, channels)
    axis = int(out[1] >= out[0])
    if channels >= out[axis]:
        axis = 2
    shares = []
    done = taken = 0
    sizes = [in_x, in_y, channels]
    pads = (pad_x, pad_y, 0)
    step_in = (1, d2, in_x * in_y)
    step_out = (1, out_y, 4 * plane)
    for core in range(cores):
        count = cdiv(out[axis] - done, cores - core)
        extent = list(sizes)
        start = [-pad_x, -pad_y]
        units = [out_x, out_y]
        if axis < 2:
            units[axis] = count
            if core:
                start[axis] = 0
        if core == cores - 1:
            extent[axis] = sizes[axis] - taken
        else:
            extent[axis] = count if axis == 2 else 2 * count - (pads[axis] if core == 0 else 0)
        shares.append(Share(taken * step_in[axis], done * step_out[axis], {
            "in_image_x_size": extent[0] & 0xFFFF, "in_image_y_size": extent[1] & 0xFFFF,
            "in_image_z_size": extent[2] & 0xFFFF,
            "in_image_stride": d2, "in_image_slice": in_x * in_y,
            **_space_to_depth_fields((start[0], start[0] + 2 * units[0] - 1), (start[1], start[1] + 2 * units[1] - 1),
                                     units[0], units[1], plane, out_x),
            "in_zp": zero_point, "out_zp": zero_point,
        }))
        done += count
        taken += extent[axis]
    return tuple(shares)


def reference_pad(d1: int, d2: int, channels: int, in_zp: int, out_zp: int, tp_cores: int) -> tuple[Share, ...]:
    """One pixel around planes, as Mesa 25.0.7 emits it: axes not exchanged, so right on square data only."""
    shares = []
    done = 0
    plane = (d1 + 2) * (d2 + 2)
    for core in range(tp_cores):
        count = cdiv(channels - done, tp_cores - core)
        fields = dict(pad_planes(d2, d1, count, (1, 1), (1, 1), in_zp, out_zp)[0].fields)
        shares.append(Share(done * d1 * d2, done * plane, fields))
        done += count
    return tuple(shares)
