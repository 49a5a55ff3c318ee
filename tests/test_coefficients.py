"""Coefficient streams against the specification's state machine, written out slowly; widths against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab.targets.vivante.chips import A311D
from npulab.targets.vivante.coefficients_v7 import (
    Kernels,
    Streams,
    Weights,
    best_zero_run_bits,
    encode,
    stream_bytes,
    superblock_channels,
    tap_order,
)


class Bits:
    """The encoder of NN notes 7.3 as it is written there: one pending run, one symbol at a time."""

    def __init__(self, z, zero):
        self.bits, self.z, self.zero, self.run = [], z, zero, 0

    def emit(self, value, width):
        self.bits += [value >> i & 1 for i in range(width)]

    def put(self, v):
        if self.z == 0:
            self.emit(v, 8)
        elif self.run == 2**self.z - 1 or v != self.zero:
            self.emit(self.run, self.z)
            self.emit(v, 8)
            self.run = 0
        else:
            self.run += 1

    def flush(self):
        if self.run > 0:
            self.emit(self.run - 1, self.z)
            self.emit(self.zero, 8)
            self.run = 0

    def raw(self, word):
        self.flush()
        self.emit(word & 0xFFFFFFFF, 32)


def slow_stream(k, core, z):
    """One core's stream, kernel by kernel, by the orders of NN notes 7.4."""
    w = k.weights.dense().values.astype(int)
    out_c, in_c, ky, kx = w.shape
    taps = [(t // kx, t % kx) for t in tap_order(ky, kx, k.split)]
    out = Bits(z, k.zero)
    out.emit(z, 8)
    out.emit(k.kernels_per_core, 16)
    blocks = superblock_channels(k)

    def weight(ch, c, t):
        return k.zero if ch >= out_c else w[ch, c, t[0], t[1]]

    def bias(ch):
        out.raw(0 if ch >= out_c else int(k.biases[ch]))

    def offset(ch):
        out.raw(k.plane * ch if ch >= out_c else int(k.offsets[ch]))

    for i, block in enumerate(blocks):
        channels = block[core]
        if k.order == "pointwise":
            g = min(in_c, 6)
            for first in range(0, in_c, g):
                for ch in channels:
                    for c in range(first, min(first + g, in_c)):
                        out.put(weight(ch, c, (0, 0)))
                        if c == 0:
                            bias(ch)
                        if c == in_c - 1:
                            offset(ch)
        elif k.order == "spatial":
            for c in range(in_c):
                for ch in channels:
                    for n, t in enumerate(taps):
                        out.put(weight(ch, c, t))
                        if c == 0 and n == 0:
                            bias(ch)
                    if c == in_c - 1:
                        offset(ch)
                if i == len(blocks) - 1:
                    out.flush()
        else:
            for ch in channels:
                for n, t in enumerate(taps):
                    out.put(weight(ch, 0, t))
                    if n == 0:
                        bias(ch)
                offset(ch)
    out.flush()
    packed = np.packbits(np.array(out.bits, np.uint8), bitorder="little")
    return np.pad(packed, (0, -len(packed) % 4)).tobytes()


@st.composite
def kernels(draw):
    order = draw(st.sampled_from(["pointwise", "spatial", "single"]))
    ky, kx = (1, 1) if order == "pointwise" else draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    out_c = draw(st.integers(1, 40))
    in_c = 1 if order == "single" else draw(st.integers(2, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    zero = draw(st.integers(0, 255))
    depthwise = order != "single" and draw(st.booleans())
    channels = 1 if depthwise else in_c
    values = rng.integers(0, 256, (out_c, channels, ky, kx)).astype(np.uint8)
    values[rng.random(values.shape) < draw(st.sampled_from([0.0, 0.5, 0.97, 1.0]))] = zero
    first = np.arange(out_c) % in_c if depthwise else np.zeros(out_c, np.int64)
    per_core = -(-out_c // min(out_c, 8))
    wanted = draw(st.integers(1, per_core))
    superblocks = -(-per_core // -(-per_core // wanted))
    return Kernels(
        Weights(values, first, in_c, zero), order, kx > 3, zero, rng.integers(-(2**31), 2**31, out_c),
        np.arange(out_c) * 77, 77, 8, superblocks,
    )


@settings(max_examples=150, deadline=None)
@given(kernels(), st.integers(0, 5))
def test_streams_are_those_of_the_state_machine(k, z):
    coded = encode(Streams(k), z)

    at = 64
    for core, size in enumerate(coded.stream_sizes):
        slow = slow_stream(k, core, z)
        assert coded.data[at : at + len(slow)] == slow
        assert not any(coded.data[at + len(slow) : at + size])
        at += size
    assert at == len(coded.data)


@settings(max_examples=100, deadline=None)
@given(kernels())
def test_the_zero_run_width_is_the_best_of_all_that_brute_force_tries(k):
    streams = Streams(k)
    brute = [sum(len(slow_stream(k, core, z)) for core in range(k.used_cores)) for z in range(6)]

    assert stream_bytes(streams, range(6)).sum(axis=0).tolist() == brute
    assert best_zero_run_bits(streams, 5) == min(range(6), key=lambda z: (brute[z], z))


@settings(max_examples=50, deadline=None)
@given(kernels())
def test_every_channel_is_on_one_core_once(k):
    channels = np.concatenate([c.ravel() for c in superblock_channels(k)])

    assert sorted(channels)[: k.weights.out_c] == list(range(k.weights.out_c))
    assert len(channels) == k.used_cores * k.kernels_per_core


@pytest.mark.parametrize(("size", "split", "columns"), [
    (3, False, "012 012|012"),
    (5, True, "012 012 34 34|012 012 34 34|012 34"),
])
def test_taps_come_in_pairs_of_rows_and_patches_of_columns(size, split, columns):
    got = [int(t) for t in tap_order(size, size, split)]

    want = []
    for pair, text in enumerate(columns.split("|")):
        runs = text.split()
        rows = [2 * pair] if len(runs) in (1, 2) and 2 * pair + 1 >= size else [2 * pair, 2 * pair + 1]
        want += [rows[i % len(rows)] * size + int(c) for i, run in enumerate(runs) for c in run]
    assert got == want


def test_the_worked_example_of_three_outputs():
    """NN notes 11.1: 1x1, two inputs, three outputs, with folded biases and plane offsets."""
    values = np.array([[10, 20], [30, 40], [50, 60]], np.uint8).reshape(3, 2, 1, 1)
    weights = Weights(values, np.zeros(3, np.int64), 2, 5)
    k = Kernels(weights, "pointwise", False, 5, np.array([40, -380, 0]), np.arange(3) * 16, 16, A311D.nn_cores, 1)

    data = encode(Streams(k), 0).data

    assert data[:12] == bytes.fromhex("40000000 40000000 40000000")
    assert data[0x40:0x4D] == bytes.fromhex("00 01 00 0a 28 00 00 00 14 00 00 00 00")
    assert data[0x80:0x8D] == bytes.fromhex("00 01 00 1e 84 fe ff ff 28 10 00 00 00")
    assert data[0xC0:0xCD] == bytes.fromhex("00 01 00 32 00 00 00 00 3c 20 00 00 00")


def test_the_worked_example_with_runs():
    """NN notes 11.2: 3x3 on one channel; width 2 is the smallest of the best."""
    values = np.array([5, 5, 5, 5, 9, 5, 5, 5, 12], np.uint8).reshape(1, 1, 3, 3)
    weights = Weights(values, np.zeros(1, np.int64), 1, 5)
    k = Kernels(weights, "single", False, 5, np.array([967]), np.zeros(1, np.int64), 36, 8, 1)
    streams = Streams(k)

    assert stream_bytes(streams, range(6))[0].tolist() == [20, 20, 16, 16, 16, 16]
    assert best_zero_run_bits(streams, 5) == 2
    assert encode(streams, 2).data[64:80] == bytes.fromhex("02 01 00 14 1c 0f 00 00 9c 30 03 00 00 00 00 00")
