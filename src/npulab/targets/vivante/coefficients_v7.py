"""Encode weights, biases and output offsets as the v7 engine's coefficient streams, one for each NN core.

A stream is a bit string: u8 zero-run width z, u16 kernel count, then symbols `(run: z bits, value: 8 bits)` that mean
"run times the zero point, then value", with each kernel's 32-bit bias raw behind its first weight and the 32-bit byte
offset of its output plane raw behind its last. Facts: Mesa 25.0.7 (project notes, NN section 7).

Symbols have one width between raw words, and the number of symbols follows from the lengths of the runs of zeros
alone. So the size under every width is known from a histogram, before anything is encoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from npulab.errors import CapacityError
from npulab.targets.vivante.tiling import align, cdiv

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]
Order = Literal["pointwise", "spatial", "single"]


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Kernels as the engine sees them. Kernel o has taps in `values.shape[1]` channels from `first[o]` on.

    values  (out_c, channels, kernel_y, kernel_x) bytes; everywhere else the kernel is `filler`.
    A dense convolution has first = 0 and channels = in_c; a dense-lowered depthwise one has a single channel a kernel,
    which is never blown up to the in_c channels that the stream describes.
    """

    values: U8
    first: I64
    in_c: int
    filler: int

    @property
    def out_c(self) -> int:
        return int(self.values.shape[0])

    def dense(self) -> Weights:
        """The same kernels with every filler written out."""
        out_c, channels, ky, kx = self.values.shape
        if channels == self.in_c:
            return self
        full = np.full((out_c, self.in_c, ky, kx), self.filler, np.uint8)
        rows = np.arange(out_c)[:, None]
        full[rows, self.first[:, None] + np.arange(channels)] = self.values
        return Weights(full, np.zeros(out_c, np.int64), self.in_c, self.filler)


@dataclass(frozen=True, slots=True, eq=False)
class Kernels:
    """All that one job's streams say, and the order in which they say it.

    order     "pointwise": groups of six channels, all kernels of a group together (1x1);
              "spatial": channel by channel, all kernels of a channel together;
              "single": kernel by kernel (one input channel).
    split     patches of three columns by two rows (kernels wider than three); else whole rows, in pairs.
    zero      the byte that means zero: what runs are made of.
    biases    (out_c) as the engine adds them, input zero point already folded in.
    offsets   (out_c) the 32-bit word behind each kernel's last weight: the byte offset of its output plane.
    """

    weights: Weights
    order: Order
    split: bool
    zero: int
    biases: I64
    offsets: I64
    plane: int
    cores: int
    superblocks: int

    @property
    def used_cores(self) -> int:
        return min(self.weights.out_c, self.cores)

    @property
    def kernels_per_core(self) -> int:
        return cdiv(self.weights.out_c, self.used_cores)


@dataclass(frozen=True, slots=True, eq=False)
class Coefficients:
    """The encoded buffer: header of stream sizes, then the streams, each padded to 64 bytes."""

    data: bytes
    zero_run_bits: int
    stream_sizes: tuple[int, ...]

    @property
    def cache_bytes(self) -> int:
        """What the driver reckons for the kernel cache: the largest stream, times the cores in use."""
        return max(self.stream_sizes) * len(self.stream_sizes)


def tap_order(kernel_y: int, kernel_x: int, split: bool) -> NDArray[np.int64]:
    """Raster index (y * kernel_x + x) of each tap, in the order of the stream: rows in pairs, columns in patches."""
    first = min(3, kernel_x) if split else kernel_x
    out = []
    for top in range(0, kernel_y, 2):
        rows = range(top, min(top + 2, kernel_y))
        out += [y * kernel_x + x for y in rows for x in range(first)]
        out += [y * kernel_x + x for y in rows for x in range(first, kernel_x)]
    return np.array(out, np.int64)


def superblock_channels(kernels: Kernels) -> list[NDArray[np.int64]]:
    """Per superblock, the channel of kernel t on core p: arrays (used cores, kernels). Those >= out_c are padding."""
    used, per_core = kernels.used_cores, kernels.kernels_per_core
    full = cdiv(per_core, kernels.superblocks)
    out = []
    for block in range(kernels.superblocks):
        count = full if block < kernels.superblocks - 1 else per_core - full * (kernels.superblocks - 1)
        if count < 1:
            raise CapacityError("a superblock is left without kernels", got=f"{per_core} kernels a core",
                                want=f"at least {kernels.superblocks}", source="NN notes, section 7.2")
        out.append(np.arange(used)[:, None] * count + np.arange(count) + block * full * used)
    return out


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """One superblock of the streams, all cores alike: what is where, counted in weights.

    length    weights a core reads in this superblock.
    flushes   ascending positions before which a pending run must end.
    raws      for each flush: 0 no raw word, 1 the next bias, 2 the next offset.
    """

    channels: NDArray[np.int64]
    length: int
    flushes: I64
    raws: NDArray[np.int8]


def _layout(kernels: Kernels) -> list[_Block]:
    w = kernels.weights
    taps, in_c = w.values.shape[2] * w.values.shape[3], w.in_c
    blocks = []
    every = superblock_channels(kernels)
    for i, channels in enumerate(every):
        n = channels.shape[1]
        t = np.arange(n)
        length = n * in_c * taps
        if kernels.order == "single":
            bias, offset = t * taps + 1, (t + 1) * taps
        elif kernels.order == "spatial":
            bias, offset = t * taps + 1, (in_c - 1) * n * taps + (t + 1) * taps
        else:
            group = min(in_c, 6)
            last = in_c - (cdiv(in_c, group) - 1) * group
            bias, offset = t * group + 1, n * (in_c - last) + (t + 1) * last
        at = np.concatenate([bias, offset])
        kind = np.concatenate([np.full(n, 1, np.int8), np.full(n, 2, np.int8)])
        if kernels.order == "spatial" and i == len(every) - 1:
            more = (np.arange(in_c) + 1) * n * taps
            at, kind = np.concatenate([at, more]), np.concatenate([kind, np.zeros(in_c, np.int8)])
        rank = np.argsort(at, kind="stable")
        blocks.append(_Block(channels, length, at[rank], kind[rank]))
    return blocks


class Streams:
    """The weights of every core in stream order, as positions of what is not zero."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        if kernels.weights.filler != kernels.zero or kernels.order == "pointwise":
            # The reference driver's int8 kernels have a filler that is not what the engine takes for zero; and the
            # groups of the pointwise order are laid out below for dense kernels only.
            self.kernels = kernels = Kernels(kernels.weights.dense(), kernels.order, kernels.split, kernels.zero,
                                             kernels.biases, kernels.offsets, kernels.plane, kernels.cores,
                                             kernels.superblocks)
        self.blocks = _layout(kernels)
        w = kernels.weights
        out_c, channels, ky, kx = w.values.shape
        order = tap_order(ky, kx, kernels.split)
        self._taps = w.values.reshape(out_c, channels, ky * kx)[:, :, order]

    def _kernels_of(self, channels: NDArray[np.int64]) -> U8:
        """Taps of `channels` (any shape) -> (*shape, channels, taps); padding kernels are all zero."""
        out_c = self.kernels.weights.out_c
        if int(channels[-1, -1]) < out_c:
            return self._taps[channels]
        picked = self._taps[np.minimum(channels, out_c - 1)]
        picked[channels >= out_c] = self.kernels.zero
        return picked

    def dense_bytes(self, block: _Block) -> U8:
        """(used cores, length): every weight of a superblock, as bytes in stream order."""
        k = self.kernels
        picked = self._kernels_of(block.channels)
        cores, n, channels, taps = picked.shape
        if channels != k.weights.in_c:
            full = np.full((cores, k.weights.in_c, n, taps), k.zero, np.uint8)
            first = k.weights.first[np.minimum(block.channels, k.weights.out_c - 1)]
            at = first[:, :, None] + np.arange(channels)
            full[np.arange(cores)[:, None, None], at, np.arange(n)[None, :, None]] = picked
            return full.reshape(cores, block.length)
        if k.order == "pointwise":
            return self._in_groups_of_six(picked.reshape(cores, n, channels)).reshape(cores, block.length)
        if k.order == "spatial":
            return picked.transpose(0, 2, 1, 3).reshape(cores, block.length)
        return picked.reshape(cores, block.length)

    @staticmethod
    def _in_groups_of_six(picked: U8) -> U8:
        cores, n, channels = picked.shape
        group = min(channels, 6)
        whole = channels // group * group
        head = picked[:, :, :whole].reshape(cores, n, whole // group, group).transpose(0, 2, 1, 3)
        return np.concatenate([head.reshape(cores, -1), picked[:, :, whole:].reshape(cores, -1)], axis=1)

    def non_zero(self, block: _Block) -> list[tuple[I64, U8]]:
        """Per core: ascending positions of the weights that are not zero, and those weights."""
        k = self.kernels
        if k.weights.values.shape[1] == k.weights.in_c:
            rows = self.dense_bytes(block)
            found = [np.flatnonzero(row != k.zero) for row in rows]
            return [(at, row[at]) for at, row in zip(found, rows, strict=True)]
        picked = self._kernels_of(block.channels)
        cores, n, channels, taps = picked.shape
        first = k.weights.first[np.minimum(block.channels, k.weights.out_c - 1)]
        z = first[:, :, None] + np.arange(channels)
        at = ((z * n + np.arange(n)[None, :, None]) * taps)[..., None] + np.arange(taps)
        out = []
        for core in range(cores):
            positions, values = at[core].ravel(), picked[core].ravel()
            rank = np.argsort(positions, kind="stable")
            positions, values = positions[rank], values[rank]
            kept = values != k.zero
            out.append((positions[kept], values[kept]))
        return out

    @cached_property
    def gaps(self) -> list[list[_Gaps]]:
        """Per core and superblock, the runs of zeros and what ends each."""
        per_block = [[_gaps(at, values, block) for at, values in self.non_zero(block)] for block in self.blocks]
        return [list(core) for core in zip(*per_block, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class _Gaps:
    """Runs of zeros in order. `length[i]` zeros, then `value[i]`, or a flush where `value[i]` is -1.

    raw[i]    for a flush, the raw word that follows it: 0 none, 1 bias, 2 offset.
    """

    length: I64
    value: NDArray[np.int16]
    raw: NDArray[np.int8]


def _gaps(at: I64, values: U8, block: _Block) -> _Gaps:
    # A flush at position p comes after the weight at p - 1 and before the one at p. Without it the anchor of the
    # next run stays; with it the anchor is p.
    slot = np.searchsorted(at, block.flushes)
    count = len(at) + len(slot)
    is_flush = np.zeros(count, bool)
    is_flush[slot + np.arange(len(slot))] = True
    ends = np.empty(count, np.int64)
    ends[is_flush] = block.flushes
    ends[~is_flush] = at
    value = np.full(count, -1, np.int16)
    value[~is_flush] = values
    raw = np.zeros(count, np.int8)
    raw[is_flush] = block.raws
    anchors = np.empty(count, np.int64)
    anchors[0] = 0
    anchors[1:] = ends[:-1] + ~is_flush[:-1]
    return _Gaps(ends - anchors, value, raw)


def symbol_counts(streams: Streams, widths: range) -> NDArray[np.int64]:
    """(cores, widths): symbols each core's stream needs at each zero-run width, in closed form.

    A run of L zeros before a value takes floor(L / 2**z) symbols of its own; before a flush, ceil(L / 2**z).
    """
    z = np.array(widths)
    out = np.zeros((len(streams.gaps), len(widths)), np.int64)
    for core, blocks in enumerate(streams.gaps):
        for g in blocks:
            runs = np.flatnonzero(g.length)  # most weights follow another directly
            length = g.length[runs]
            tail = g.value[runs] < 0
            out[core] += np.count_nonzero(g.value >= 0)
            out[core] += (length[~tail, None] >> z).sum(axis=0)
            out[core] += (length[tail, None] + (1 << z) - 1 >> z).sum(axis=0)
    return out


def stream_bytes(streams: Streams, widths: range) -> NDArray[np.int64]:
    """(cores, widths): bytes of each core's stream at each zero-run width, rounded up to a 32-bit word."""
    bits = 24 + 64 * streams.kernels.kernels_per_core + symbol_counts(streams, widths) * (8 + np.array(widths))
    out: NDArray[np.int64] = (bits + 31) // 32 * 4
    return out


def best_zero_run_bits(streams: Streams, most: int) -> int:
    """The width with the smallest streams, the smaller one on a tie: the true minimum over 0..most."""
    total = stream_bytes(streams, range(most + 1)).sum(axis=0)
    return int(np.argmin(total))


def reference_zero_run_bits(streams: Streams, most: int) -> int:
    """The width that the reference driver keeps: downward from `most`, it stops at the first that is worse."""
    total = stream_bytes(streams, range(most + 1)).sum(axis=0)
    kept = most
    for z in range(most - 1, -1, -1):
        if total[z] > total[kept]:
            break
        kept = z
    return kept


def encode(streams: Streams, zero_run_bits: int) -> Coefficients:
    """Encode every core's stream at one width, and put the buffer together."""
    k = streams.kernels
    if zero_run_bits == 0:
        rows = _plain(streams)
    else:
        rows = [_runs(streams, core, zero_run_bits) for core in range(k.used_cores)]
    sizes = tuple(align(len(row), 64) for row in rows)
    header = align(4 * k.cores, 64)
    out = np.zeros(header + sum(sizes), np.uint8)
    out[: 4 * len(sizes)] = np.array(sizes, "<u4").view(np.uint8)
    at = header
    for row, size in zip(rows, sizes, strict=True):
        out[at : at + len(row)] = row
        at += size
    return Coefficients(out.tobytes(), zero_run_bits, sizes)


def _raw_words(streams: Streams) -> Iterator[tuple[_Block, NDArray[np.uint32]]]:
    """Per superblock: (used cores, kernels, 2) the bias and offset words; padding kernels have bias 0."""
    k = streams.kernels
    for block in streams.blocks:
        real = np.minimum(block.channels, k.weights.out_c - 1)
        padding = block.channels >= k.weights.out_c
        bias = np.where(padding, 0, k.biases[real]) & 0xFFFFFFFF
        offset = np.where(padding, k.plane * block.channels, k.offsets[real]) & 0xFFFFFFFF
        yield block, np.stack([bias, offset], axis=-1).astype(np.uint32)


def _plain(streams: Streams) -> list[U8]:
    """Width 0: every weight is a byte, and all cores have one layout."""
    k = streams.kernels
    head = np.array([0, k.kernels_per_core & 0xFF, k.kernels_per_core >> 8], np.uint8)
    parts = [np.broadcast_to(head, (k.used_cores, 3))]
    for block, words in _raw_words(streams):
        weights = streams.dense_bytes(block)
        raws = block.raws[block.raws > 0]
        before = block.flushes[block.raws > 0]
        n = words.shape[1]
        in_order = words.transpose(0, 2, 1).reshape(k.used_cores, 2 * n)
        pick = np.where(raws == 1, np.cumsum(raws == 1) - 1, n + np.cumsum(raws == 2) - 1)
        raw_bytes = np.ascontiguousarray(in_order[:, pick]).view(np.uint8).reshape(k.used_cores, -1)
        at = (before + 4 * np.arange(len(before)))[:, None] + np.arange(4)
        out = np.empty((k.used_cores, block.length + 4 * len(before)), np.uint8)
        is_raw = np.zeros(out.shape[1], bool)
        is_raw[at.ravel()] = True
        out[:, ~is_raw] = weights
        out[:, is_raw] = raw_bytes
        parts.append(out)
    return list(np.concatenate(parts, axis=1))


def _runs(streams: Streams, core: int, z: int) -> U8:
    """Width z > 0: the bit string of one core."""
    k = streams.kernels
    width, mask = 8 + z, (1 << z) - 1
    bits = [_bits(np.array([z], np.uint16), 8), _bits(np.array([k.kernels_per_core], np.uint16), 16)]
    for gaps, (_block, words) in zip(streams.gaps[core], _raw_words(streams), strict=True):
        flush = gaps.value < 0
        whole, rest = gaps.length >> z, gaps.length & mask
        final = ~flush | (rest > 0)
        ends = np.cumsum(whole + final)
        symbols = np.full(int(ends[-1]), mask | k.zero << z, np.uint16)
        value = np.where(flush, k.zero, gaps.value)
        run = np.where(flush, rest - 1, rest)
        symbols[ends[final] - 1] = (run[final] | value[final].astype(np.int64) << z).astype(np.uint16)
        stream = _bits(symbols, width)
        raw_at = np.flatnonzero(gaps.raw)
        kind = gaps.raw[raw_at]
        n = words.shape[1]
        pick = np.where(kind == 1, np.cumsum(kind == 1) - 1, n + np.cumsum(kind == 2) - 1)
        raw_bits = np.unpackbits(words[core].T.reshape(-1)[pick].view(np.uint8), bitorder="little").reshape(-1, 32)
        cut = 0
        for at, raw in zip((ends[raw_at] * width).tolist(), raw_bits, strict=True):
            bits += [stream[cut:at], raw]
            cut = at
        bits.append(stream[cut:])
    packed = np.packbits(np.concatenate(bits), bitorder="little")
    return np.pad(packed, (0, -len(packed) % 4))


def _bits(symbols: NDArray[np.uint16], width: int) -> U8:
    """The low `width` bits of each symbol, low bit first, one byte a bit."""
    return np.unpackbits(symbols.view(np.uint8).reshape(-1, 2), axis=1, count=width, bitorder="little").reshape(-1)
