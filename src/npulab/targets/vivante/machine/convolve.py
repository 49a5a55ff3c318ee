"""Execute one NN job: decode its kernels, convolve exactly, requantize, store each kernel's plane.

    acc = bias + sum (w - coef_zero_point) * x        x a byte, or the border constant outside the image
    out = clamp(round(acc * (2**15 + m) / 2**s) + out_zero_point, relu ? out_zero_point : 0, 255)

Source: NN notes, section 9 (arithmetic checked against the vendor's self-test and against Mesa's models).

Sums run as float32 matrix products, which are exact while every partial sum stays below 2**24; the decoded weights
give that bound, and longer sums are cut into pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npulab.targets.vivante.machine.coefficients import decode
from npulab.targets.vivante.machine.faults import Budget, JobFault
from npulab.targets.vivante.machine.memory import Memory
from npulab.targets.vivante.machine.requantize import kernels, requantize
from npulab.targets.vivante.nn import (
    NO_CIRCULAR_BUFFER,
    POOLING_FIRST_PIXEL,
    POOLING_NONE,
    NNDescriptor,
)

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
EXACT = 1 << 24
"""Whole numbers up to here are exact in float32."""
WORKING_SET = 1 << 24
"""Bytes of gathered input that a spatial convolution holds at a time."""

_ONLY = {
    "layer_type": 0, "no_z_offset": 0, "prelu": 0, "kernel_data_type": 0, "in_data_type": 0, "out_data_type": 0,
    "brick_mode": 0, "brick_distance": 0, "rounding_mode": 1, "in_border_mode": 0, "out_circular_buf_size": 0,
    "in_circular_buf_size": 0, "out_circular_buf_end": NO_CIRCULAR_BUFFER, "in_circular_buf_end": NO_CIRCULAR_BUFFER,
    "per_channel_post_mul": 0, "kernel_direct_stream": 0, "depthwise": 0, "in_x_offset_bit4": 0, "in_y_offset_bit4": 0,
}
"""Fields whose other values are not known well enough to execute."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A job's kernels, ready to multiply. `dense` (kernels, K) or `depthwise` (kernels, ky, kx) with `channels`."""

    dense: tuple[F32, ...]
    pieces: tuple[int, ...]
    depthwise: NDArray[np.int16] | None
    channels: NDArray[np.int64]
    biases: NDArray[np.int32]
    offsets: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Work:
    """What a job did, for traces."""

    macs: int
    bytes_read: int
    bytes_written: int


def check_features(d: NNDescriptor) -> None:
    """Fault on fields whose meaning is unknown, rather than compute something else."""
    for name, value in _ONLY.items():
        if getattr(d, name) != value:
            raise JobFault("unimplemented feature", f"NN descriptor field {name} = {getattr(d, name)}")
    if d.pooling not in (POOLING_NONE, POOLING_FIRST_PIXEL):
        raise JobFault("unimplemented feature", f"NN descriptor field pooling = {d.pooling}")
    sizes = (d.kernel_x, d.kernel_y, d.kernel_z, d.in_x_size, d.in_y_size, d.out_x_size, d.out_y_size, d.out_z_size)
    if not all(sizes):
        raise JobFault("bad descriptor", "an NN job has an extent of zero")


def prepare(memory: Memory, d: NNDescriptor, cores: int, budget: Budget) -> Prepared:
    """Decode the job's streams and lay its kernels out for multiplication. Padding kernels are dropped."""
    found = decode(memory, d, cores, budget)
    plane = d.out_x_stride * d.out_y_stride
    real = np.flatnonzero(found.offsets < d.out_z_size * plane)
    if not len(real):
        raise JobFault("bad descriptor", "every kernel's output plane lies outside the output")
    weights = found.weights[real].astype(np.int16)
    weights -= d.coef_zero_point
    biases = found.biases[real].astype(np.int32)
    offsets = found.offsets[real]
    used = weights.reshape(len(real), d.kernel_z, -1).any(axis=2)
    if d.kernel_z > 1 and used.sum(axis=1).max() <= 1:
        channels = used.argmax(axis=1)
        own = np.ascontiguousarray(weights[np.arange(len(real)), channels])
        return Prepared((), (), own, channels, biases, offsets)
    rows = weights.reshape(len(real), -1)
    pieces = _pieces(rows)
    dense = tuple(rows[:, a:b].astype(np.float32) for a, b in zip((0, *pieces[:-1]), pieces, strict=True))
    return Prepared(dense, pieces, None, np.arange(0), biases, offsets)


def _pieces(rows: NDArray[np.int16]) -> tuple[int, ...]:
    """Where to cut the sums so that each piece stays exact, whatever the 8-bit input."""
    largest = np.abs(rows).sum(axis=1, dtype=np.int64).max() * 255
    if largest < EXACT:
        return (rows.shape[1],)
    step = max(1, (EXACT - 1) // (255 * 255))
    running = np.abs(rows).cumsum(axis=1, dtype=np.int64)
    cuts, start = [], 0
    while start < rows.shape[1]:
        base = running[:, start - 1] if start else np.zeros(len(rows), np.int64)
        reach = ((running - base[:, None]) * 255 < EXACT).all(axis=0)
        end = start + max(step, int(np.count_nonzero(reach[start:])))
        cuts.append(min(end, rows.shape[1]))
        start = cuts[-1]
    return tuple(cuts)


def run(memory: Memory, d: NNDescriptor, p: Prepared, budget: Budget) -> Work:
    """Convolve, requantize and store. `p` are the job's own kernels."""
    step = 2 if d.pooling == POOLING_FIRST_PIXEL else 1
    out_y, out_x = -(-d.out_y_size // step), -(-d.out_x_size // step)
    taps = d.kernel_y * d.kernel_x
    depth = 1 if p.depthwise is not None else d.kernel_z
    macs = len(p.offsets) * depth * taps * out_y * out_x
    budget.spend("macs", macs)
    budget.spend("elements", d.kernel_z * d.in_y_size * d.in_x_size + len(p.offsets) * out_y * out_x)
    strides = (d.in_y_stride * d.in_x_stride, d.in_x_stride, 1)
    image, _ = memory.box(d.in_image_address, (d.kernel_z, d.in_y_size, d.in_x_size), strides, "NN input", store=False)
    low = d.out_zero_point if d.relu else 0
    planes = _depthwise if p.depthwise is not None else _dense
    out = planes(d, p, image, out_y, out_x, step, low)
    _store(memory, d, p.offsets, out)
    return Work(macs, image.size, out.size)


def _store(memory: Memory, d: NNDescriptor, offsets: NDArray[np.int64], out: U8) -> None:
    """Each kernel's plane to its own byte offset; in one piece where offsets are whole planes, as they always are."""
    _, high, wide = out.shape
    pitch = d.out_x_stride * d.out_y_stride
    numbers, rest = np.divmod(offsets, max(pitch, 1))
    if not rest.any() and high * d.out_x_stride <= pitch:
        low = int(numbers.min())
        shape = (int(numbers.max()) - low + 1, high, wide)
        base = d.out_image_address + low * pitch
        view, marks = memory.box(base, shape, (pitch, d.out_x_stride, 1), "NN output", store=True)
        in_order = len(numbers) == shape[0] and bool((np.diff(numbers) == 1).all())
        where: slice | NDArray[np.int64] = slice(None) if in_order else numbers - low
        view[where] = out
        if marks is not None:
            marks[where] = True
        return
    for plane, offset in zip(out, offsets.tolist(), strict=True):
        base = d.out_image_address + offset
        view, marks = memory.box(base, (1, high, wide), (0, d.out_x_stride, 1), "NN output", store=True)
        view[0] = plane
        if marks is not None:
            marks[0] = True


def _padded(d: NNDescriptor, image: U8, out_y: int, out_x: int, step: int) -> U8:
    """The part of the input that the output looks at, border included."""
    high, wide = (out_y - 1) * step + d.kernel_y, (out_x - 1) * step + d.kernel_x
    top, left = -d.in_y_offset, -d.in_x_offset
    if top == left == 0 and high <= image.shape[1] and wide <= image.shape[2]:
        return image[:, :high, :wide]
    out = np.full((image.shape[0], high, wide), d.in_border_const & 0xFF, np.uint8)
    y0, x0 = max(0, -top), max(0, -left)
    rows, columns = min(image.shape[1] - y0, high - max(0, top)), min(image.shape[2] - x0, wide - max(0, left))
    if rows > 0 and columns > 0:
        to_y, to_x = max(0, top), max(0, left)
        out[:, to_y : to_y + rows, to_x : to_x + columns] = image[:, y0 : y0 + rows, x0 : x0 + columns]
    return out


def _depthwise(d: NNDescriptor, p: Prepared, image: U8, out_y: int, out_x: int, step: int, low: int) -> U8:
    """Kernels with one input channel each."""
    assert p.depthwise is not None
    if (p.channels == np.arange(image.shape[0])).all() if len(p.channels) == image.shape[0] else False:
        source = _padded(d, image, out_y, out_x, step)
    else:
        source = _padded(d, image, out_y, out_x, step)[p.channels]
    scale = (2**15 + d.post_multiplier) / 2.0**d.post_shift
    if kernels is not None:
        out = np.empty((len(p.offsets), out_y, out_x), np.uint8)
        source = np.ascontiguousarray(source)
        kernels.depthwise(source, p.depthwise, p.biases, out, source.shape[1], source.shape[2], d.kernel_y, d.kernel_x,
                           out_y, out_x, step, scale, d.out_zero_point, low)
        return out
    acc = np.zeros((len(p.offsets), out_y, out_x), np.float32)  # at most 15 * 15 taps: exact
    for y in range(d.kernel_y):
        for x in range(d.kernel_x):
            tap = source[:, y : y + (out_y - 1) * step + 1 : step, x : x + (out_x - 1) * step + 1 : step]
            acc += tap * p.depthwise[:, y, x, None, None].astype(np.float32)
    flat = requantize(acc.reshape(len(acc), -1), p.biases, d.post_multiplier, d.post_shift, d.out_zero_point, low)
    return flat.reshape(acc.shape)


def _dense(d: NNDescriptor, p: Prepared, image: U8, out_y: int, out_x: int, step: int, low: int) -> U8:
    """Kernels over all channels: gather the taps of a band of rows, then multiply."""
    source = _padded(d, image, out_y, out_x, step)
    taps = d.kernel_y * d.kernel_x
    out = np.empty((len(p.offsets), out_y, out_x), np.uint8)
    band = max(1, min(out_y, WORKING_SET // (4 * d.kernel_z * taps * out_x)))
    for top in range(0, out_y, band):
        rows = min(band, out_y - top)
        gathered = np.empty((d.kernel_z, taps, rows, out_x), np.float32)
        for y in range(d.kernel_y):
            for x in range(d.kernel_x):
                first = top * step + y
                gathered[:, y * d.kernel_x + x] = source[:, first : first + (rows - 1) * step + 1 : step,
                                                         x : x + (out_x - 1) * step + 1 : step]
        columns = gathered.reshape(d.kernel_z * taps, rows * out_x)
        if len(p.dense) == 1:
            acc, bias = p.dense[0] @ columns, p.biases
            flat = requantize(acc, bias, d.post_multiplier, d.post_shift, d.out_zero_point, low)
        else:
            flat = _long(d, p, columns, low)
        out[:, top : top + rows] = flat.reshape(len(p.offsets), rows, out_x)
    return out


def _long(d: NNDescriptor, p: Prepared, columns: F32, low: int) -> U8:
    """Sums too long for float32: exact pieces, added as wrapping 32-bit integers (that they wrap is inferred)."""
    total = np.zeros((len(p.offsets), columns.shape[1]), np.int32)
    start = 0
    for weights, end in zip(p.dense, p.pieces, strict=True):
        total += (weights @ columns[start:end]).astype(np.int32)
        start = end
    total += p.biases[:, None]
    q = total.astype(np.float64)
    q *= (2**15 + d.post_multiplier) / 2.0**d.post_shift
    q += 0.5
    np.floor(q, out=q)
    q += d.out_zero_point
    return np.clip(q, low, 255).astype(np.uint8)
