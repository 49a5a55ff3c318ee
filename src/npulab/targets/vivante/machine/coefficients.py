"""Decode the v7 engine's coefficient streams from their bytes.

What the engine knows is the descriptor: kernel size, input channels, kernels a core takes in a superblock, and whether
the kernel is 1x1. From that follow the order of the weights and where the raw words stand (NN notes 7.4 and 9.3). The
rule that picks the order from the descriptor is inferred (H13), as is the order of taps in kernels wider than five.

Between two raw words symbols have one width, so they decode as arrays. Zero runs are never written out: a depthwise
layer blown up to a dense one is nearly all zeros, and the work here goes with the bytes of a stream, not with the
weights that it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npulab.targets.vivante.machine.faults import Budget, JobFault
from npulab.targets.vivante.machine.memory import Memory
from npulab.targets.vivante.nn import NNDescriptor

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
POINTWISE_GROUP = 6
"""Input channels that 1x1 kernels are consumed by (NN notes 7.4)."""
SHORT = 32
"""Weights between two raw words up to which a loop over symbols is faster than arrays."""
SPARSE = 8
"""Kernels with fewer weights in use than one in this many are kept as a list."""
DENSE_MAX = 1 << 26
"""Weights of one job that are kept written out, so that memory has a bound. No real network has a tenth."""


@dataclass(frozen=True, slots=True, eq=False)
class DecodedKernels:
    """Every kernel of a job. Weights have the zero point taken off.

    dense     (kernels, in_c, ky * kx) int16; or None, and then
    kernel, channel, tap, value   say what is not zero, one entry a weight;
    biases    (kernels) int64 as signed 32 bits;  offsets (kernels) of output planes, in bytes.
    stream_bytes   of the header and the streams.
    """

    shape: tuple[int, int, int]
    dense: NDArray[np.int16] | None
    kernel: I64
    channel: I64
    tap: I64
    value: NDArray[np.int16]
    biases: I64
    offsets: I64
    stream_bytes: int


def tap_positions(kernel_y: int, kernel_x: int) -> I64:
    """Raster index of each tap in stream order: rows in pairs, the first three columns, then the others."""
    first = min(3, kernel_x)
    order = []
    for top in range(0, kernel_y, 2):
        rows = [y for y in (top, top + 1) if y < kernel_y]
        order += [y * kernel_x + x for columns in (range(first), range(first, kernel_x)) for y in rows for x in columns]
    return np.array(order, np.int64)


class _Order:
    """Where in one superblock of `n` kernels each weight and raw word stands, counted in weights.

    A kernel's bias follows its first weight, its offset the last. 1x1 kernels ("pointwise") come in groups of six
    input channels, all kernels of a group together; others channel by channel, all kernels of a channel together.
    """

    def __init__(self, d: NNDescriptor, n: int) -> None:
        self.n, self.in_c = n, d.kernel_z
        self.taps = tap_positions(d.kernel_y, d.kernel_x)
        self.pointwise = d.kernel_x == d.kernel_y == 1 and d.out_z_size > 8
        if self.pointwise:
            self.first = min(self.in_c, POINTWISE_GROUP)
            self.last = self.in_c - (-(-self.in_c // self.first) - 1) * self.first
        else:
            self.first = self.last = len(self.taps)
        self.length = n * self.in_c * len(self.taps)
        t = np.arange(n)
        at = np.concatenate([t * self.first + 1, self.length - (n - 1 - t) * self.last])
        self.rank = np.argsort(at, kind="stable")
        self.raws = at[self.rank]

    def sort_raws(self, words: NDArray[np.uint32]) -> tuple[I64, I64]:
        """Raw words in stream order -> (biases, offsets)."""
        out = np.empty(2 * self.n, np.int64)
        out[self.rank] = words
        return out[: self.n], out[self.n :]

    def dense(self, weights: U8) -> U8:
        """All weights in stream order -> (n, in_c, taps)."""
        if not self.pointwise:
            out = np.empty((self.n, self.in_c, len(self.taps)), np.uint8)
            out[:, :, self.taps] = weights.reshape(self.in_c, self.n, -1).transpose(1, 0, 2)
            return out
        cut = self.in_c - self.last
        head = weights[: self.n * cut].reshape(-1, self.n, self.first).transpose(1, 0, 2).reshape(self.n, cut)
        return np.concatenate([head, weights[self.n * cut :].reshape(self.n, self.last)], axis=1)[:, :, None]

    def places(self, at: I64) -> tuple[I64, I64, I64]:
        """Positions in stream order -> (kernel, channel, tap)."""
        if not self.pointwise:
            rest, step = np.divmod(at, len(self.taps))
            channel, kernel = np.divmod(rest, self.n)
            return kernel, channel, self.taps[step]
        group, rest = np.divmod(at, self.n * self.first)
        size = np.where((group + 1) * self.first > self.in_c, self.last, self.first)
        kernel, step = np.divmod(rest, size)
        return kernel, group * self.first + step, np.zeros_like(at)


class _Stream:
    """One core's bits, read from the front."""

    def __init__(self, data: U8, address: int) -> None:
        self.bits, self.address = 8 * len(data), address
        self.data = data.tobytes() + bytes(64)  # so that looking ahead needs no care
        self.at = 24
        self.zero_run_bits = self.data[0]
        self.kernels = int.from_bytes(self.data[1:3], "little")

    def fail(self, message: str) -> JobFault:
        return JobFault("undecodable stream", message, self.address + min(self.at, self.bits) // 8)

    def _check(self) -> None:
        if self.at > self.bits:
            raise self.fail("the stream ends before its last weight")

    def plain(self, order: _Order) -> tuple[U8, NDArray[np.uint32]]:
        """Zero-run width 0: every weight is a byte. (weights, raw words)."""
        start, size = self.at // 8, order.length + 4 * len(order.raws)
        self.at += 8 * size
        self._check()
        stream = np.frombuffer(self.data, np.uint8, size, start)
        is_weight = np.ones(size, np.bool_)
        is_weight[((order.raws + 4 * np.arange(len(order.raws)))[:, None] + np.arange(4)).reshape(-1)] = False
        return stream[is_weight], stream[~is_weight].view("<u4")

    def runs(self, order: _Order, zero: int) -> tuple[I64, U8, NDArray[np.uint32]]:
        """(positions of weights that are not zero, those weights, raw words)."""
        z, width = self.zero_run_bits, 8 + self.zero_run_bits
        low, whole = (1 << z) - 1, (1 << width) - 1
        words: list[int] = []
        few_at: list[int] = []
        few: list[int] = []
        parts: list[tuple[I64, U8]] = []
        done = 0
        for end in order.raws.tolist():
            if end - done > SHORT:
                if few:
                    parts.append((np.array(few_at, np.int64), np.array(few, np.uint8)))
                    few_at, few = [], []
                parts += self._many(done, end, zero)
                done = end
            window = int.from_bytes(self.data[self.at >> 3 : (self.at >> 3) + SHORT * 2 + 8], "little") >> (self.at & 7)
            used = 0
            while done < end:
                symbol = window >> used & whole
                used += width
                done += (symbol & low) + 1
                value = symbol >> z
                if value != zero:
                    few_at.append(done - 1)
                    few.append(value)
            if done > end:
                raise self.fail("a run of zeros goes on where a raw word must stand")
            words.append(window >> used & 0xFFFFFFFF)
            self.at += used + 32
            self._check()
        parts.append((np.array(few_at, np.int64), np.array(few, np.uint8)))
        return (np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]),
                np.array(words, np.uint32))

    def _many(self, done: int, end: int, zero: int) -> list[tuple[I64, U8]]:
        """The symbols of weights `done` to `end`, by arrays."""
        z, width = self.zero_run_bits, 8 + self.zero_run_bits
        parts = []
        while done < end:
            count = min(max(64, end - done >> z), end - done, (self.bits - self.at) // width)
            if count < 1:
                raise self.fail("the stream ends before its last weight")
            symbols = self._fields(count, width)
            ends = done + np.cumsum((symbols & (1 << z) - 1) + 1, dtype=np.int64)
            taken = int(np.searchsorted(ends, end, side="right"))
            if not taken or (taken < count and ends[taken - 1] != end):
                self.at += width * taken
                raise self.fail("a run of zeros goes on where a raw word must stand")
            values = symbols[:taken] >> z
            kept = np.flatnonzero(values != zero)
            parts.append((ends[kept] - 1, values[kept].astype(np.uint8)))
            self.at += width * taken
            done = int(ends[taken - 1])
        return parts

    def _fields(self, count: int, width: int) -> NDArray[np.uint32]:
        """`count` fields of `width` bits (at most 16) from here on. Eight of them begin every `width` bytes."""
        rows = -(-count // 8)
        missing = (self.at >> 3) + (rows + 1) * width + 8 - len(self.data)
        if missing > 0:
            self.data += bytes(missing)
        out = np.empty((rows, 8), np.uint32)
        for phase in range(8):
            start = self.at + phase * width
            column: NDArray[np.uint32] = np.ndarray(rows, "<u4", self.data, start >> 3, width)
            np.right_shift(column, start & 7, out=out[:, phase])
        out &= (1 << width) - 1
        return out.reshape(-1)[:count]


def decode(memory: Memory, d: NNDescriptor, cores: int, zero_run_max: int, budget: Budget) -> DecodedKernels:
    """Every kernel of a job, padding kernels included, in the order of cores and superblocks.

    Faults: a header, stream or count that cannot be right, with the address of the byte that shows it.
    """
    base = d.kernel_address
    sizes = memory.words(base, cores, "coefficient header")
    if not any(sizes):
        raise JobFault("undecodable stream", "no core has a coefficient stream", base)
    at = -(-4 * cores // 64) * 64
    data = memory.read(base, at + sum(sizes), "coefficient buffer")
    volume = d.kernel_x * d.kernel_y * d.kernel_z
    blocks: list[_Block] = []
    orders: dict[int, _Order] = {}
    for size in sizes:
        if not size:
            continue
        s = _Stream(data[at : at + size], base + at)
        if s.zero_run_bits > zero_run_max:
            raise s.fail(f"a zero-run width of {s.zero_run_bits} bits, where the chip takes {zero_run_max}")
        if not d.kernels_per_core or not s.kernels:
            raise s.fail(f"{s.kernels} kernels, {d.kernels_per_core} in each superblock")
        if s.kernels * volume > (1 << s.zero_run_bits) * 8 * size:
            raise s.fail(f"{s.kernels} kernels of {volume} weights cannot be in {size} bytes")
        budget.spend("weights", s.kernels * volume)
        for first in range(0, s.kernels, d.kernels_per_core):
            n = min(d.kernels_per_core, s.kernels - first)
            if n not in orders:
                orders[n] = _Order(d, n)
            blocks.append(_Block(s, orders[n], d.coef_zero_point))
        at += size
    return _joined(blocks, d, len(data))


class _Block:
    """One superblock of one core, decoded: `weights` in full, or the `values` `at` positions of the stream."""

    def __init__(self, s: _Stream, order: _Order, zero: int) -> None:
        self.order = order
        self.weights: U8 | None = None
        self.at, self.values = np.empty(0, np.int64), np.empty(0, np.uint8)
        if s.zero_run_bits == 0:
            self.weights, words = s.plain(order)
            self.used = int(np.count_nonzero(self.weights != zero))
        else:
            self.at, self.values, words = s.runs(order, zero)
            self.used = len(self.at)
        self.biases, self.offsets = order.sort_raws(words)

    def listed(self, zero: int) -> tuple[I64, U8]:
        if self.weights is None:
            return self.at, self.values
        at = np.flatnonzero(self.weights != zero)
        return at, self.weights[at]


def _joined(blocks: list[_Block], d: NNDescriptor, size: int) -> DecodedKernels:
    zero, taps = d.coef_zero_point, d.kernel_y * d.kernel_x
    biases = np.concatenate([b.biases for b in blocks])
    biases = biases - ((biases >> 31) << 32)
    offsets = np.concatenate([b.offsets for b in blocks])
    shape = (len(biases), d.kernel_z, taps)
    total = shape[0] * shape[1] * shape[2]
    nothing = np.empty(0, np.int64)
    if sum(b.used for b in blocks) * SPARSE >= total:
        if total > DENSE_MAX:
            raise JobFault("work limit", f"a job with {total} weights in use", d.kernel_address)
        dense = np.zeros(shape, np.int16)
        first = 0
        for b in blocks:
            part = dense[first : first + b.order.n]
            if b.weights is not None:
                np.subtract(b.order.dense(b.weights), zero, out=part, dtype=np.int16)
            else:
                part[b.order.places(b.at)] = b.values.astype(np.int16) - zero
            first += b.order.n
        return DecodedKernels(shape, dense, nothing, nothing, nothing, np.empty(0, np.int16), biases, offsets,
                              size)
    kernel, channel, tap, value = [], [], [], []
    first = 0
    for b in blocks:
        at, values = b.listed(zero)
        k, c, t = b.order.places(at)
        kernel.append(k + first)
        channel.append(c)
        tap.append(t)
        value.append(values.astype(np.int16) - zero)
        first += b.order.n
    return DecodedKernels(shape, None, np.concatenate(kernel), np.concatenate(channel), np.concatenate(tap),
                          np.concatenate(value), biases, offsets, size)
