"""The engines in the slow, obvious way, straight from the notes: one bit, one tap, one element at a time.

The oracle of the virtual NPU's own code. Memory is a dict of address -> byte; nothing here is shared with that code
but the declared layouts of the descriptors.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np


def requantize(acc: int, multiplier: int, shift: int, zero_point: int, low: int) -> int:
    exact = Fraction(acc * (2**15 + multiplier), 2**shift)
    return max(low, min(255, floor(exact + Fraction(1, 2)) + zero_point))


class Bits:
    def __init__(self, data: bytes) -> None:
        self.value, self.at, self.run, self.next = int.from_bytes(data, "little"), 0, 0, None

    def get(self, n: int) -> int:
        out = self.value >> self.at & ((1 << n) - 1)
        self.at += n
        return out

    def weight(self, z: int, zero: int) -> int:
        if self.run:
            self.run -= 1
            return zero
        if self.next is not None:
            value, self.next = self.next, None
            return value
        self.run = self.get(z)
        value = self.get(8)
        if self.run:
            self.run -= 1
            self.next = value
            return zero
        return value


def decode(stream: bytes, d) -> list[tuple[np.ndarray, int, int]]:
    """(weights [in_c, ky, kx], bias, offset) of each kernel in one core's stream."""
    bits = Bits(stream)
    z, total = bits.get(8), bits.get(16)
    in_c, ky, kx = d.kernel_z, d.kernel_y, d.kernel_x
    first = min(3, kx) if kx > 3 else kx
    taps = []
    for top in range(0, ky, 2):
        rows = [y for y in (top, top + 1) if y < ky]
        taps += [(y, x) for y in rows for x in range(first)] + [(y, x) for y in rows for x in range(first, kx)]
    kernels = []
    while len(kernels) < total:
        n = min(d.kernels_per_core, total - len(kernels))
        w, bias, offset = np.zeros((n, in_c, ky, kx), int), [0] * n, [0] * n

        def kernel_channel(t, c, w=w, bias=bias, offset=offset):
            for i, (y, x) in enumerate(taps):
                w[t, c, y, x] = bits.weight(z, d.coef_zero_point)
                if c == 0 and i == 0:
                    bias[t] = bits.get(32)
            if c == in_c - 1:
                offset[t] = bits.get(32)

        if kx == ky == 1 and d.out_z_size > 8:
            group = min(in_c, 6)
            order = [(t, c) for g in range(0, in_c, group) for t in range(n) for c in range(g, min(g + group, in_c))]
        else:
            order = [(t, c) for c in range(in_c) for t in range(n)]
        for t, c in order:
            kernel_channel(t, c)
        kernels += [(w[t], bias[t] - (bias[t] >> 31 << 32), offset[t]) for t in range(n)]
    return kernels


def nn_job(memory: dict[int, int], d, cores: int) -> None:
    def u32(a):
        return sum(memory[a + i] << 8 * i for i in range(4))

    sizes = [u32(d.kernel_address + 4 * i) for i in range(cores)]
    at = d.kernel_address + -(-4 * cores // 64) * 64
    step = 2 if d.pooling == 3 else 1
    results = {}
    for size in sizes:
        if not size:
            continue
        for w, bias, offset in decode(bytes(memory[at + i] for i in range(size)), d):
            if offset >= d.out_z_size * d.out_x_stride * d.out_y_stride:
                continue
            for oy in range(0, d.out_y_size, step):
                for ox in range(0, d.out_x_size, step):
                    acc = bias
                    for c in range(d.kernel_z):
                        for i in range(d.kernel_y):
                            for j in range(d.kernel_x):
                                y, x = oy + d.in_y_offset + i, ox + d.in_x_offset + j
                                v = d.in_border_const
                                if 0 <= y < d.in_y_size and 0 <= x < d.in_x_size:
                                    v = memory[d.in_image_address + (c * d.in_y_stride + y) * d.in_x_stride + x]
                                acc += int(w[c, i, j] - d.coef_zero_point) * v
                    acc = (acc + 2**31) % 2**32 - 2**31
                    low = d.out_zero_point if d.relu else 0
                    to = d.out_image_address + offset + oy // step * d.out_x_stride + ox // step
                    results[to] = requantize(acc, d.post_multiplier, d.post_shift, d.out_zero_point, low)
        at += size
    memory.update(results)


def tp_job(memory: dict[int, int], d) -> None:
    inc = [getattr(d, f"out_loop_{k}_inc") for k in range(7)]
    count = [getattr(d, f"out_loop_{k}_count") for k in range(6)] + [0]
    i = [0] * 7

    def bump(k):
        while True:
            i[k] += 1
            if k == 6 or count[k] == 0 or i[k] < count[k]:
                return
            i[k] = 0
            k += 1

    stored = {}
    for z in range(-d.in_window_z_start_overfetch, d.in_image_z_size + d.in_window_z_end_overfetch):
        for ty in range(d.in_window_y_start, d.in_window_y_end + 1, d.in_tile_y_inc):
            for tx in range(d.in_window_x_start, d.in_window_x_end + 1, d.in_tile_x_inc):
                for y in range(ty, min(ty + d.in_tile_y_size, d.in_window_y_end + 1)):
                    for x in range(tx, min(tx + d.in_tile_x_size, d.in_window_x_end + 1)):
                        v = d.in_image_border_const
                        if 0 <= x < d.in_image_x_size and 0 <= y < d.in_image_y_size and 0 <= z < d.in_image_z_size:
                            at = d.in_image_base_address + z * d.in_image_slice + y * d.in_image_stride + x
                            v = memory[at] - d.in_zp
                        scaled = Fraction(v * (2**15 + d.alu_output_post_multiplier), 2**15)
                        scaled *= Fraction(1, 2) ** d.alu_output_postshift
                        q = max(0, min(255, round(scaled) + d.out_zp))  # round(): halves to even
                        stored[d.out_image_base_address + sum(a * b for a, b in zip(i, inc, strict=True))] = q
                        bump(0)
                    if count[1] == 0 and d.out_loop_1_reset:
                        i[0] = i[1] = 0
                        bump(2)
                if count[2] == 0 and d.out_loop_2_reset:
                    i[0] = i[1] = i[2] = 0
                    bump(3)
    memory.update(stored)
