"""Decode the v7 engine's coefficient streams from their bytes.

What the engine knows is the descriptor: kernel size, input channels, kernels a core takes in a superblock, and whether
the kernel is 1x1. From that follow the order of the weights and where the raw words stand (NN notes 7.4 and 9.3). The
rule that picks the order from the descriptor is inferred (H13), as is the order of taps in kernels wider than five.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npulab.targets.vivante.machine.faults import Budget, JobFault
from npulab.targets.vivante.machine.memory import Memory
from npulab.targets.vivante.nn import NNDescriptor

U8 = NDArray[np.uint8]
POINTWISE_GROUP = 6
"""Input channels that 1x1 kernels are consumed by (NN notes 7.4)."""


@dataclass(frozen=True, slots=True, eq=False)
class DecodedKernels:
    """weights (kernels, in_c, kernel_y, kernel_x) as bytes; biases int64 as signed 32 bits; plane offsets in bytes."""

    weights: U8
    biases: NDArray[np.int64]
    offsets: NDArray[np.int64]


def tap_positions(kernel_y: int, kernel_x: int) -> NDArray[np.int64]:
    """Raster index of each tap in stream order: rows in pairs, the first three columns, then the others."""
    first = min(3, kernel_x)
    order = []
    for top in range(0, kernel_y, 2):
        rows = [y for y in (top, top + 1) if y < kernel_y]
        order += [y * kernel_x + x for columns in (range(first), range(first, kernel_x)) for y in rows for x in columns]
    return np.array(order, np.int64)


class _Stream:
    """One core's bits, read from the front: symbols of one width, raw words in between."""

    def __init__(self, data: U8, address: int) -> None:
        self.data, self.address = data, address
        self.at = 0  # in bits
        self.zero_run_bits = self.raw(8)
        self.kernels = self.raw(16)
        self.pending = 0  # zeros of a run that are still to come
        self.value = -1  # the weight behind them, or -1

    def fail(self, message: str) -> JobFault:
        return JobFault("undecodable stream", message, self.address + self.at // 8)

    def raw(self, width: int) -> int:
        end = self.at + width
        if end > 8 * len(self.data):
            raise self.fail("the stream ends inside a word")
        chunk = int.from_bytes(self.data[self.at // 8 : (end + 7) // 8].tobytes(), "little")
        out = chunk >> self.at % 8 & (1 << width) - 1
        self.at = end
        return out

    def word(self) -> int:
        """A raw 32-bit word. No run may be pending where one stands."""
        if self.pending or self.value >= 0:
            raise self.fail("a run of zeros goes on where a raw word must stand")
        return self.raw(32)

    def weights(self, count: int, zero: int) -> U8:
        """The next `count` weights."""
        out = np.full(count, zero, np.uint8)
        done = 0
        while done < count:
            take = min(self.pending, count - done)
            done += take
            self.pending -= take
            if self.pending:
                break
            if self.value >= 0 and done < count:
                out[done] = self.value
                done += 1
                self.value = -1
            if done < count:
                done = self._symbols(out, done)
        return out

    def _symbols(self, out: U8, done: int) -> int:
        """Decode as many whole symbols as `out` can hold, and one more that starts inside it."""
        z, wanted = self.zero_run_bits, len(out) - done
        width = 8 + z
        available = (8 * len(self.data) - self.at) // width
        if not available:
            raise self.fail("the stream ends before its last weight")
        if z == 0 and self.at % 8 == 0:
            take = min(wanted, available)
            start = self.at // 8
            out[done : done + take] = self.data[start : start + take]
            self.at += 8 * take
            return done + take
        if z > 8:
            raise self.fail(f"a zero-run width of {z} bits")
        symbols = self._fields(min(wanted, available, 1 << 16), width)
        runs, values = symbols & (1 << z) - 1, symbols >> z
        ends = np.cumsum(runs + 1)
        whole = int(np.searchsorted(ends, wanted, side="right"))
        out[done + ends[:whole] - 1] = values[:whole]
        self.at += width * whole
        done += int(ends[whole - 1]) if whole else 0
        if whole < len(symbols) and done < len(out):  # this one reaches past what is wanted now
            self.at += width
            self.pending, self.value = int(runs[whole]), int(values[whole])
        return done

    def _fields(self, count: int, width: int) -> NDArray[np.int64]:
        """`count` fields of `width` bits (at most 16) from here on, not yet taken."""
        at = self.at + width * np.arange(count, dtype=np.int64)
        low = at >> 3
        last = len(self.data) - 1
        wide = self.data[low].astype(np.int64)
        wide |= self.data[np.minimum(low + 1, last)].astype(np.int64) << 8
        wide |= self.data[np.minimum(low + 2, last)].astype(np.int64) << 16
        out: NDArray[np.int64] = wide >> (at & 7) & (1 << width) - 1
        return out


def decode(memory: Memory, d: NNDescriptor, cores: int, budget: Budget) -> DecodedKernels:
    """Every kernel of a job, padding kernels included, in the order of cores and superblocks.

    Faults: a header, stream or count that cannot be right, with the address of the byte that shows it.
    """
    base = d.kernel_address
    header = -(-4 * cores // 64) * 64
    sizes = memory.words(base, cores, "coefficient header")
    if not any(sizes):
        raise JobFault("undecodable stream", "no core has a coefficient stream", base)
    at = base + header
    parts: list[tuple[U8, list[int], list[int]]] = []
    for core, size in enumerate(sizes):
        if not size:
            continue
        data = memory.read(at, size, f"coefficient stream of core {core}")
        stream = _Stream(data, at)
        volume = d.kernel_x * d.kernel_y * d.kernel_z
        if stream.kernels * volume > (1 << max(stream.zero_run_bits, 0)) * 8 * size:
            raise stream.fail(f"{stream.kernels} kernels of {volume} weights cannot be in {size} bytes")
        budget.spend("weights", stream.kernels * volume)
        parts.append(_core(stream, d))
        at += size
    weights = np.concatenate([p[0] for p in parts])
    biases = np.array([b for p in parts for b in p[1]], np.int64)
    offsets = np.array([o for p in parts for o in p[2]], np.int64)
    return DecodedKernels(weights, biases - ((biases >> 31) << 32), offsets)


def _core(stream: _Stream, d: NNDescriptor) -> tuple[U8, list[int], list[int]]:
    """One core's kernels: (kernels, in_c, ky, kx) bytes, bias words, offset words."""
    per_block = d.kernels_per_core
    if not per_block or not stream.kernels:
        raise stream.fail(f"{stream.kernels} kernels, {per_block} in each superblock")
    pointwise = d.kernel_x == d.kernel_y == 1 and d.out_z_size > 8
    blocks, biases, offsets = [], [], []
    for first in range(0, stream.kernels, per_block):
        n = min(per_block, stream.kernels - first)
        block, bias, offset = _pointwise(stream, d, n) if pointwise else _spatial(stream, d, n)
        blocks.append(block)
        biases += bias
        offsets += offset
    return np.concatenate(blocks), biases, offsets


def _pointwise(s: _Stream, d: NNDescriptor, n: int) -> tuple[U8, list[int], list[int]]:
    """Groups of six channels; each kernel's weights of a group together."""
    in_c, zero = d.kernel_z, d.coef_zero_point
    group = min(in_c, POINTWISE_GROUP)
    last = in_c - (-(-in_c // group) - 1) * group
    out = np.empty((n, in_c), np.uint8)
    biases, offsets = [], []
    one_group = in_c == group
    for t in range(n):
        out[t, :1] = s.weights(1, zero)
        biases.append(s.word())
        out[t, 1:group] = s.weights(group - 1, zero)
        if one_group:
            offsets.append(s.word())
    if not one_group:
        middle = in_c - group - last
        body = s.weights(n * middle, zero).reshape(middle // group, n, group)
        out[:, group : in_c - last] = body.transpose(1, 0, 2).reshape(n, middle)
        for t in range(n):
            out[t, in_c - last :] = s.weights(last, zero)
            offsets.append(s.word())
    return out.reshape(n, in_c, 1, 1), biases, offsets


def _spatial(s: _Stream, d: NNDescriptor, n: int) -> tuple[U8, list[int], list[int]]:
    """Channel by channel, all kernels of a channel together."""
    in_c, zero = d.kernel_z, d.coef_zero_point
    order = tap_positions(d.kernel_y, d.kernel_x)
    taps = len(order)
    out = np.empty((in_c, n, taps), np.uint8)
    biases, offsets = [], []
    for t in range(n):
        out[0, t, :1] = s.weights(1, zero)
        biases.append(s.word())
        out[0, t, 1:] = s.weights(taps - 1, zero)
        if in_c == 1:
            offsets.append(s.word())
    if in_c > 1:
        out[1:-1] = s.weights((in_c - 2) * n * taps, zero).reshape(in_c - 2, n, taps)
        for t in range(n):
            out[-1, t] = s.weights(taps, zero)
            offsets.append(s.word())
    raster = np.empty_like(out)
    raster[:, :, order] = out
    return raster.transpose(1, 0, 2).reshape(n, in_c, d.kernel_y, d.kernel_x), biases, offsets
