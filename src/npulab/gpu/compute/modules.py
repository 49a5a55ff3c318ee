"""Kernels of networks as SPIR-V, for Vulkan: a matrix product, a convolution and a depthwise one, each with bias and
activation. Others are in `modules_rows` and `modules_attention`.

Tensors are dense float32, images NHWC, matrices row by row. A thread computes TILE rows (matrix rows, or neighbouring
pixels) of four columns (channels), which it keeps in registers; columns are padded to multiples of four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import CapacityError, UnsupportedError
from npulab.gpu.compute.modules_endings import end
from npulab.gpu.compute.types import Activation
from npulab.gpu.spirv_builder import Kind, Shader, Type, Value
from npulab.gpu.vulkan import Vulkan

TILE = 4
GROUP = (8, 8)
"""Threads: columns (in fours), rows (in tiles)."""
FOUR = Type("float", 4)


@dataclass(frozen=True, slots=True)
class Module:
    """words   SPIR-V.      groups  (x, y).
    buffers    roles of bindings 0, 1, ...
    operations scalar operations that are needed (a fused multiply-add is two).
    turns      of loops that a thread does, at most.
    lanes      the output's columns are padded to a multiple of it.
    local_bytes  of local memory that a group holds.
    """

    words: bytes
    groups: tuple[int, int]
    buffers: tuple[str, ...]
    operations: float
    turns: int
    lanes: int = 4
    local_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Convolution:
    """height, width, channels: of the input. outputs: channels. pad: top, left; what is beyond the input is 0."""

    height: int
    width: int
    channels: int
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    """Of the output, rows and columns."""


def run(bench: Vulkan, module: Module, tensors: Mapping[str, NDArray[Any]],
        shape: tuple[int, ...]) -> tuple[NDArray[np.float32], float]:
    """(output, seconds by the device's clock). Raises: what the bench does; UnsupportedError if its driver does not do
    all turns of the loops; CapacityError if it has not the local memory.

    Shapes:  tensors by roles, packed; `shape` is the output's without padding, columns last.
    """
    if module.turns > bench.turns_max:  # llvmpipe: silently
        raise UnsupportedError(f"{bench.identity.name} ends loops after {bench.turns_max} turns", want=module.turns)
    if module.local_bytes > bench.limits.local_bytes:
        raise CapacityError(f"{bench.identity.name} has no room for what a work group holds",
                            want=f"{module.local_bytes} bytes of local memory", got=bench.limits.local_bytes)
    columns = -(-shape[-1] // module.lanes) * module.lanes
    given = {**tensors, "output": np.zeros((*shape[:-1], columns), np.float32)}
    buffers = {role: bench._buffer(np.ascontiguousarray(given[role], np.float32)) for role in module.buffers}
    seconds = bench.compute(module.words, module.groups, [buffers[role] for role in module.buffers])
    found = bench._read(buffers["output"], given["output"].size, np.float32)
    return found.reshape(given["output"].shape)[..., :shape[-1]], seconds


def packed(matrix: NDArray[Any]) -> NDArray[np.float32]:
    """(rows, columns) with columns padded by zeros to a multiple of four."""
    return np.ascontiguousarray(np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % 4))), np.float32)


def packed_weights(weights: NDArray[Any]) -> NDArray[np.float32]:
    """OHWI to (H W I, O), padded."""
    return packed(weights.transpose(1, 2, 3, 0).reshape(-1, weights.shape[0]))


def matmul(rows: int, columns: int, inner: int, activation: Activation = "none", slope: float = 0.01) -> Module:
    """output = activation(input @ weights + bias): (rows, inner) by (inner, columns); all but input packed."""
    def body(s: Shader, column: Value, first: Value, width: int) -> list[Value]:
        starts = [s.builtin("UMin", first + i, s.constant(rows - 1)) * inner for i in range(TILE)]
        return _sums(s, inner, starts, column, s.constant(0), width, s.load(2, column))

    return _module(rows, columns, (activation, slope), body, 2.0 * rows * columns * inner, inner)


def convolution(c: Convolution, activation: Activation = "none", slope: float = 0.01) -> Module:
    """output = activation(convolution(input, weights) + bias); weights by `packed_weights`, output (rows, columns,
    outputs), its channels padded to a multiple of four. Groups of channels: 1."""
    def body(s: Shader, column: Value, first: Value, width: int) -> list[Value]:
        tops, lefts = _corners(s, c, first)
        sums = [s.variable(s.load(2, column)) for _ in range(TILE)]
        with s.loop(c.kernel[0]) as ky, s.loop(c.kernel[1]) as kx:
            starts, inside = _seen(s, c, tops, lefts, ky, kx, c.channels)
            tap = (ky * c.kernel[1] + kx) * c.channels
            parts = _sums(s, c.channels, starts, column, tap, width, s.constant(0.0, "float", 4))
            for total, part, share in zip(sums, parts, inside, strict=True):
                total.set(s.fma(part, share, total.get()))
        return [x.get() for x in sums]

    high, wide = c.size
    taps = c.kernel[0] * c.kernel[1] * c.channels
    turns = c.kernel[0] * (1 + c.kernel[1] * (1 + c.channels))
    return _module(high * wide, c.outputs, (activation, slope), body, 2.0 * high * wide * c.outputs * taps, turns)


def depthwise(c: Convolution, activation: Activation = "none", slope: float = 0.01) -> Module:
    """output = activation(depthwise convolution(input, weights) + bias): an output channel of each channel.

    Shapes:  input (rows, columns, channels), packed; weights (taps, channels) by `packed_depthwise`; output and bias
             have `channels` channels, padded to a multiple of four.
    Raises:  UnsupportedError unless c.outputs == c.channels.
    """
    if c.outputs != c.channels:
        raise UnsupportedError("a depthwise shader makes one channel of each", want=c.channels, got=c.outputs)

    def body(s: Shader, column: Value, first: Value, width: int) -> list[Value]:
        tops, lefts = _corners(s, c, first)
        sums = [s.variable(s.load(2, column)) for _ in range(TILE)]
        with s.loop(c.kernel[0]) as ky, s.loop(c.kernel[1]) as kx:
            starts, inside = _seen(s, c, tops, lefts, ky, kx, width)
            row = s.load(1, (ky * c.kernel[1] + kx) * width + column)
            for start, share, total in zip(starts, inside, sums, strict=True):
                total.set(s.fma(s.load(0, start + column) * s.spread(share, 4), row, total.get()))
        return [x.get() for x in sums]

    high, wide = c.size
    taps = c.kernel[0] * c.kernel[1]
    return _module(high * wide, c.channels, (activation, slope), body, 2.0 * high * wide * c.channels * taps,
                   c.kernel[0] * (1 + c.kernel[1]), FOUR)


def packed_depthwise(weights: NDArray[Any]) -> NDArray[np.float32]:
    """(rows, columns, channels) to (taps, channels), padded."""
    return packed(weights.reshape(-1, weights.shape[-1]))


def _corners(s: Shader, c: Convolution, first: Value) -> tuple[list[Value], list[Value]]:
    """(rows, columns) of the window's corner in the padded input, of TILE pixels from `first` on."""
    high, wide = c.size
    pixels = [s.builtin("UMin", first + i, s.constant(high * wide - 1)) for i in range(TILE)]
    return [p // wide * c.stride[0] for p in pixels], [p % wide * c.stride[1] for p in pixels]


def _seen(s: Shader, c: Convolution, tops: Sequence[Value], lefts: Sequence[Value], ky: Value, kx: Value,
          stride: int) -> tuple[list[Value], list[Value]]:
    """Where the pixel under a tap begins, `stride` elements each, and 1.0 if it is in the input; else 0 and 0.0."""
    starts, inside = [], []
    for top, left in zip(tops, lefts, strict=True):
        y = top + ky * c.dilation[0] - c.pad[0]  # below zero: very large
        x = left + kx * c.dilation[1] - c.pad[1]
        there = s.both(y < c.height, x < c.width)
        starts.append(s.select(there, (y * c.width + x) * stride, s.constant(0)))
        inside.append(s.select(there, 1.0, s.constant(0.0, "float")))
    return starts, inside


def _sums(s: Shader, inner: int, starts: Sequence[Value], column: Value, tap: Value, width: int,
          begin: Value) -> list[Value]:
    """begin + products of `inner` numbers of the input from each of `starts` on with rows of weights from `tap` on."""
    sums = [s.variable(begin) for _ in starts]
    with s.loop(inner) as k:
        row = s.load(1, (tap + k) * width + column)
        for start, total in zip(starts, sums, strict=True):
            total.set(s.fma(s.spread(s.load(0, start + k), 4), row, total.get()))
    return [x.get() for x in sums]


def _module(rows: int, columns: int, ending: tuple[Activation, float],
            body: Callable[[Shader, Value, Value, int], list[Value]], operations: float, turns: int,
            given: Type | Kind = "float") -> Module:
    """given: an element of the input."""
    if min(rows, columns) < 1 or rows * (columns + 3) >= 1 << 31:
        raise UnsupportedError("shaders count in 32 bits", got=f"{rows} rows of {columns}")
    s = Shader(GROUP, (given, FOUR, FOUR, FOUR), ())
    width = -(-columns // 4)
    column, first = s.global_id, s.global_y * TILE
    with s.when(s.both(column < width, first < rows)):
        for i, value in enumerate(body(s, column, first, width)):
            value = end(s, value, *ending)
            with s.when(first + i < rows):
                s.store(3, (first + i) * width + column, value)
    groups = -(-width // GROUP[0]), -(-rows // (TILE * GROUP[1]))
    return Module(s.assemble(), groups, ("input", "weights", "bias", "output"), operations, turns)
