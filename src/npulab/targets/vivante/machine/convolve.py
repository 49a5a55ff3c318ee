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

from npulab.targets.vivante.chips import Chip
from npulab.targets.vivante.machine.coefficients import DENSE_MAX, DecodedKernels, decode
from npulab.targets.vivante.machine.faults import Budget, JobFault
from npulab.targets.vivante.machine.memory import Memory
from npulab.targets.vivante.machine.requantize import CHUNK, kernels, requantize
from npulab.targets.vivante.nn import (
    MINUS_INFINITY,
    NO_CIRCULAR_BUFFER,
    PLUS_INFINITY,
    POOLING_FIRST_PIXEL,
    POOLING_NONE,
    NNDescriptor,
)

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
EXACT = 1 << 24
"""Whole numbers up to here are exact in float32."""
PIECE = 128
"""Products after which a sum may be cut: 128 * 255 * 255 is less than EXACT."""
WORKING_SET = 1 << 22
"""Bytes of gathered input that a convolution holds at a time."""
LOOKED_AT_MAX = 1 << 28
"""Bytes of one job's input with its border."""

_ONLY = {
    "layer_type": 0, "no_z_offset": 0, "prelu": 0, "kernel_data_type": 0, "in_data_type": 0, "out_data_type": 0,
    "brick_mode": 0, "brick_distance": 0, "rounding_mode": 1, "in_border_mode": 0, "out_circular_buf_size": 0,
    "in_circular_buf_size": 0, "out_circular_buf_end": NO_CIRCULAR_BUFFER, "in_circular_buf_end": NO_CIRCULAR_BUFFER,
    "per_channel_post_mul": 0, "kernel_direct_stream": 0, "depthwise": 0, "in_x_offset_bit4": 0, "in_y_offset_bit4": 0,
    "no_flush": 0, "slow_output": 0,
}
"""Fields whose other values are not known well enough to execute."""
_CLAMPS = {"unk_28": (0, 0x03FFFFFF), "unk_29": (0, PLUS_INFINITY), "unk_30": (0, MINUS_INFINITY)}
"""What drivers write to words that may clamp the output (inferred): nothing, or no bound."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A job's kernels, in the order of their output planes, ready to multiply.

    dense      (kernels, K) float32, cut along K into pieces whose sums are exact; empty for depthwise.
    pieces     where each piece ends.
    taps       the (y, x) that K goes over, the last factor of K: those at which any kernel is not zero.
    depthwise  (kernels, ky, kx), where each kernel reads one input channel, `channels`; else None.
    """

    dense: tuple[F32, ...]
    pieces: tuple[int, ...]
    taps: tuple[tuple[int, int], ...]
    depthwise: NDArray[np.int16] | None
    channels: NDArray[np.int64]
    biases: NDArray[np.int32]
    offsets: NDArray[np.int64]
    stream_bytes: int

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(w.nbytes for w in self.dense) + (0 if self.depthwise is None else self.depthwise.nbytes)


@dataclass(frozen=True, slots=True)
class Work:
    """What a job did, for traces. Bytes are distinct ones: a byte that many taps look at counts once.

    weights   of coefficient streams, header included.
    read      of the input image; border that is not in memory does not count.
    written   of the output.
    """

    macs: int
    weights: int
    read: int
    written: int


def check_features(d: NNDescriptor) -> None:
    """Fault on fields whose meaning is unknown, rather than compute something else."""
    for name, value in _ONLY.items():
        if getattr(d, name) != value:
            raise JobFault("unimplemented feature", f"NN descriptor field {name} = {getattr(d, name)}")
    if d.pooling not in (POOLING_NONE, POOLING_FIRST_PIXEL):
        raise JobFault("unimplemented feature", f"NN descriptor field pooling = {d.pooling}")
    for name, values in _CLAMPS.items():
        if getattr(d, name) not in values:
            raise JobFault("unimplemented feature", f"NN descriptor field {name} = {getattr(d, name):#x}")
    for name, top in (("post_multiplier", 2**15 - 1), ("in_border_const", 255)):
        if getattr(d, name) > top:
            raise JobFault("bad descriptor", f"NN descriptor field {name} = {getattr(d, name)}, more than {top}")
    sizes = (d.kernel_x, d.kernel_y, d.kernel_z, d.in_x_size, d.in_y_size, d.out_x_size, d.out_y_size, d.out_z_size)
    if not all(sizes):
        raise JobFault("bad descriptor", "an NN job has an extent of zero")
    if d.out_x_stride < -(-d.out_x_size // (2 if d.pooling == POOLING_FIRST_PIXEL else 1)):
        raise JobFault("bad descriptor", f"output rows overlap: out_x_stride = {d.out_x_stride}")


def prepare(memory: Memory, d: NNDescriptor, chip: Chip, budget: Budget) -> Prepared:
    """Decode the job's streams and lay its kernels out for multiplication. Padding kernels are dropped."""
    found = decode(memory, d, chip.nn_cores, chip.zero_run_bits, budget)
    plane = d.out_x_stride * d.out_y_stride
    real = np.flatnonzero(found.offsets < d.out_z_size * plane)
    if not len(real):
        raise JobFault("bad descriptor", "every kernel's output plane lies outside the output")
    real = real[np.argsort(found.offsets[real], kind="stable")]
    biases, offsets = found.biases[real].astype(np.int32), found.offsets[real]
    if (np.diff(offsets) < _plane_bytes(d)).any():
        raise JobFault("bad descriptor", "two kernels write to the same output bytes")
    one = _one_channel_each(found, real)
    if one is not None:
        channels, own = one
        return Prepared((), (), (), own.reshape(len(real), d.kernel_y, d.kernel_x), channels, biases, offsets,
                        found.stream_bytes)
    weights = _written_out(found, d)[real]
    used = np.flatnonzero((weights != 0).any(axis=(0, 1))).tolist() or [0]
    taps = tuple(divmod(t, d.kernel_x) for t in used)
    rows = (weights if len(used) == weights.shape[2] else weights[:, :, used]).reshape(len(real), -1)
    pieces = _pieces(rows)
    dense = tuple(rows[:, a:b].astype(np.float32) for a, b in zip((0, *pieces[:-1]), pieces, strict=True))
    return Prepared(dense, pieces, taps, None, np.arange(0), biases, offsets, found.stream_bytes)


def _plane_bytes(d: NNDescriptor) -> int:
    """From the first to the last byte that one kernel stores."""
    step = 2 if d.pooling == POOLING_FIRST_PIXEL else 1
    return (-(-d.out_y_size // step) - 1) * d.out_x_stride + -(-d.out_x_size // step)


def _one_channel_each(found: DecodedKernels, real: I64) -> tuple[I64, NDArray[np.int16]] | None:
    """(channel of each kernel, its taps there) if no kernel reads two channels: a depthwise layer blown up."""
    count, in_c, taps = found.shape
    if found.dense is not None:
        if in_c == 1:
            return None
        used = (found.dense != 0).any(axis=2)
        per_kernel = used.sum(axis=1)
        if per_kernel.max() > 1:
            return None
        channels = np.where(per_kernel > 0, used.argmax(axis=1), np.minimum(np.arange(count), in_c - 1))
        return channels[real], found.dense[real, channels[real]]
    channels = np.minimum(np.arange(count), in_c - 1)
    channels[found.kernel] = found.channel
    if (channels[found.kernel] != found.channel).any():
        return None
    own = np.zeros((count, taps), np.int16)
    own[found.kernel, found.tap] = found.value
    return channels[real], own[real]


def _written_out(found: DecodedKernels, d: NNDescriptor) -> NDArray[np.int16]:
    """(kernels, in_c, taps)."""
    if found.dense is not None:
        return found.dense
    total = found.shape[0] * found.shape[1] * found.shape[2]
    if total > DENSE_MAX:
        raise JobFault("work limit", f"a job of {total} weights over several channels each", d.kernel_address)
    out = np.zeros(found.shape, np.int16)
    out[found.kernel, found.channel, found.tap] = found.value
    return out


def _pieces(rows: NDArray[np.int16]) -> tuple[int, ...]:
    """Where to cut the sums so that each piece stays exact, whatever the 8-bit input."""
    starts = range(0, rows.shape[1], PIECE)
    sums = np.add.reduceat(np.abs(rows), starts, axis=1, dtype=np.int64) * 255
    cuts, running = [], np.zeros(len(rows), np.int64)
    for start, part in zip(starts, sums.T, strict=True):
        running += part
        if running.max() >= EXACT:
            cuts.append(start)
            running = part.copy()
    return (*cuts, rows.shape[1])


def run(memory: Memory, d: NNDescriptor, p: Prepared, budget: Budget) -> Work:
    """Convolve, requantize and store. `p` are the job's own kernels."""
    step = 2 if d.pooling == POOLING_FIRST_PIXEL else 1
    out_y, out_x = -(-d.out_y_size // step), -(-d.out_x_size // step)
    depth = 1 if p.depthwise is not None else d.kernel_z
    macs = len(p.offsets) * depth * d.kernel_y * d.kernel_x * out_y * out_x
    looked_at = max(d.kernel_z, len(p.offsets)) * ((out_y - 1) * step + d.kernel_y) * ((out_x - 1) * step + d.kernel_x)
    budget.spend("macs", macs)
    budget.spend("elements", d.kernel_z * d.in_y_size * d.in_x_size + looked_at)
    if looked_at > LOOKED_AT_MAX:
        raise JobFault("work limit", f"an NN job that looks at {looked_at} bytes, border included")
    strides = (d.in_y_stride * d.in_x_stride, d.in_x_stride, 1)
    image, _ = memory.box(d.in_image_address, (d.kernel_z, d.in_y_size, d.in_x_size), strides, "NN input", store=False)
    span = int(p.offsets[-1] - p.offsets[0]) + _plane_bytes(d)
    memory.find(d.out_image_address + int(p.offsets[0]), span, "NN output")
    planes = _depthwise if p.depthwise is not None else _dense
    out = planes(d, p, image, out_y, out_x, step)
    _store(memory, d, p.offsets, out)
    rows, columns = _inside(d, out_y, out_x, step)
    return Work(macs, p.stream_bytes, d.kernel_z * len(rows) * len(columns), out.size)


def _inside(d: NNDescriptor, out_y: int, out_x: int, step: int) -> tuple[range, range]:
    """(rows, columns) of the input image that some tap looks at."""
    y, x = d.in_y_offset, d.in_x_offset
    return (range(max(0, y), min(y + (out_y - 1) * step + d.kernel_y, d.in_y_size)),
            range(max(0, x), min(x + (out_x - 1) * step + d.kernel_x, d.in_x_size)))


def _store(memory: Memory, d: NNDescriptor, offsets: I64, out: U8) -> None:
    """Each kernel's plane to its own byte offset; in one piece where they are evenly spaced, as they always are."""
    count, high, wide = out.shape
    pitch = int(offsets[1] - offsets[0]) if count > 1 else 0
    base = d.out_image_address + int(offsets[0])
    if (np.diff(offsets) == pitch).all():
        view, marks = memory.box(base, out.shape, (pitch, d.out_x_stride, 1), "NN output", store=True)
        view[...] = out
        if marks is not None:
            marks[...] = True
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
    out = np.full((image.shape[0], high, wide), d.in_border_const, np.uint8)
    y0, x0 = max(0, -top), max(0, -left)
    rows, columns = min(image.shape[1] - y0, high - max(0, top)), min(image.shape[2] - x0, wide - max(0, left))
    if rows > 0 and columns > 0:
        to_y, to_x = max(0, top), max(0, left)
        out[:, to_y : to_y + rows, to_x : to_x + columns] = image[:, y0 : y0 + rows, x0 : x0 + columns]
    return out


def _low(d: NNDescriptor) -> int:
    return d.out_zero_point if d.relu else 0


def _depthwise(d: NNDescriptor, p: Prepared, image: U8, out_y: int, out_x: int, step: int) -> U8:
    """Kernels with one input channel each, some channels at a time."""
    assert p.depthwise is not None
    count = len(p.offsets)
    in_order = count <= len(image) and bool((p.channels == np.arange(count)).all())
    out = np.empty((count, out_y, out_x), np.uint8)
    scale = (2**15 + d.post_multiplier) / 2.0**d.post_shift
    size = ((out_y - 1) * step + d.kernel_y) * ((out_x - 1) * step + d.kernel_x)
    some = max(1, (CHUNK if kernels is None else WORKING_SET) // size)
    for first in range(0, count, some):
        part = slice(first, min(first + some, count))
        source = _padded(d, image[part] if in_order else image[p.channels[part]], out_y, out_x, step)
        weights, biases = p.depthwise[part], p.biases[part]
        if kernels is not None:
            source = np.ascontiguousarray(source)
            kernels.depthwise(source, weights, biases, out[part], source.shape[1], source.shape[2], d.kernel_y,
                              d.kernel_x, out_y, out_x, step, scale, d.out_zero_point, _low(d))
        else:
            acc = _one_plane_each(source.astype(np.float32), weights.astype(np.float32), out_y, out_x, step)
            requantize(acc.reshape(len(acc), -1), biases, d.post_multiplier, d.post_shift, d.out_zero_point, _low(d),
                       out[part].reshape(len(acc), -1))
    return out


def _one_plane_each(source: F32, weights: F32, out_y: int, out_x: int, step: int) -> F32:
    """sum over taps, per channel. Exact: at most 15 * 15 taps."""
    acc = np.zeros((len(source), out_y, out_x), np.float32)
    product = np.empty_like(acc)
    for y, x in np.argwhere((weights != 0).any(axis=0)).tolist():
        tap = source[:, y : y + (out_y - 1) * step + 1 : step, x : x + (out_x - 1) * step + 1 : step]
        np.multiply(tap, weights[:, y, x, None, None], out=product)
        acc += product
    return acc


def _dense(d: NNDescriptor, p: Prepared, image: U8, out_y: int, out_x: int, step: int) -> U8:
    """Kernels over all channels: gather the taps of a band of rows, then multiply."""
    source = _padded(d, image, out_y, out_x, step)
    count, taps = len(p.offsets), len(p.taps)
    out = np.empty((count, out_y, out_x), np.uint8)
    band = max(1, min(out_y, WORKING_SET // (4 * (d.kernel_z * taps + count) * out_x)))
    for top in range(0, out_y, band):
        rows = min(band, out_y - top)
        gathered = np.empty((d.kernel_z, taps, rows, out_x), np.float32)
        for k, (y, x) in enumerate(p.taps):
            first = top * step + y
            gathered[:, k] = source[:, first : first + (rows - 1) * step + 1 : step,
                                    x : x + (out_x - 1) * step + 1 : step]
        columns = gathered.reshape(d.kernel_z * taps, rows * out_x)
        if len(p.dense) == 1:
            acc = p.dense[0] @ columns
            flat = requantize(acc, p.biases, d.post_multiplier, d.post_shift, d.out_zero_point, _low(d))
        else:
            flat = _long(d, p, columns)
        out[:, top : top + rows] = flat.reshape(count, rows, out_x)
    return out


def _long(d: NNDescriptor, p: Prepared, columns: F32) -> U8:
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
    return np.clip(q, _low(d), 255).astype(np.uint8)
