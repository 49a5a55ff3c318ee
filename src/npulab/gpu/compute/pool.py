"""Pooling of NHWC images and reductions over neighbours, vectors along the channels.

    lower_max(what, traits), lower_average(what, traits) -> Lowered
        "input" [batch, height, width, channels] -> "output" [batch, *what.out, channels]
    reduce(kind, batch, count, channels, traits, number) -> Lowered
        "input" [batch, count, channels] -> "output" [batch, channels]: "sum", "mean", "max" or "min"
    global_average(batch, pixels, channels, traits, number) -> Lowered      reduce("mean", ...)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npulab.gpu.compute import vectors
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Number, Traits

Reduction = Literal["sum", "mean", "max", "min"]


@dataclass(frozen=True, slots=True)
class Pool:
    """pads: top, left, bottom, right. count_pads: an average divides by the whole window's size, else by what of it
    lies in the image. Windows that lie in the padding alone are not allowed."""

    batch: int
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    count_pads: bool = False
    number: Number = "float32"

    @property
    def out(self) -> tuple[int, int]:
        top, left, bottom, right = self.pads
        extents = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        return ((self.height + top + bottom - extents[0]) // self.strides[0] + 1,
                (self.width + left + right - extents[1]) // self.strides[1] + 1)


def lower_max(what: Pool, traits: Traits) -> Lowered:
    """Raises: UnsupportedError unless float32 or float16."""
    return _lower(what, traits, "max pool", "-INFINITY", "s = v > s ? v : s", "s")


def lower_average(what: Pool, traits: Traits) -> Lowered:
    """Raises: UnsupportedError unless float32 or float16."""
    divisor = str(math.prod(what.kernel)) if what.count_pads else "count"
    return _lower(what, traits, "average pool", "0.0f", "s += v", f"s / (float){divisor}")


def _lower(what: Pool, traits: Traits, label: str, first: str, step: str, end: str) -> Lowered:
    w = vectors.fitting(traits, what.channels)
    strips, (height, width) = -(-what.channels // w), what.out
    each = width if traits.cpu else 1
    group = (1, 1, 1) if traits.cpu else (*vectors.split(vectors.group_items(traits), strips, width), 1)
    (kh, kw), (sy, sx), (dy, dx) = what.kernel, what.strides, what.dilations
    source = vectors.preamble(what.number, w) + f"""
__kernel {vectors.attribute(group)} void pool(__global const T *input, __global T *output, int height, int width,
                                              int channels, int out_height, int out_width, int each) {{
    if ((int)get_global_id(0) * {w} >= channels) return;
    int c = min((int)get_global_id(0) * {w}, channels - {w});  // the last vector overlaps the one before
    int row = get_global_id(2), b = row / out_height, iy = row % out_height * {sy} - {what.pads[0]};
    int from = get_global_id(1) * each, most = min(from + each, out_width);
    __global const T *image = input + (size_t)b * height * width * channels + c;
    for (int ox = from; ox < most; ox++) {{
        V s = (V)({first});
        int count = 0;
        for (int ky = 0; ky < {kh}; ky++) for (int kx = 0; kx < {kw}; kx++) {{
            int y = iy + ky * {dy}, x = ox * {sx} - {what.pads[1]} + kx * {dx};
            if (y < 0 || y >= height || x < 0 || x >= width) continue;
            V v = LOAD(image + ((size_t)y * width + x) * channels);
            {step};
            count++;
        }}
        STORE({end}, output + ((size_t)row * out_width + ox) * channels + c);
    }}
}}
"""
    size = (vectors.up(strips, group[0]), vectors.up(-(-width // each), group[1]), what.batch * height)
    arguments: tuple[Argument, ...] = (Buffer("input"), Buffer("output"), *(
        np.int32(v) for v in (what.height, what.width, what.channels, height, width, each)))
    outputs = what.batch * height * width * what.channels
    traffic = vectors.number_bytes(what.number) * (what.batch * what.height * what.width * what.channels + outputs)
    return Lowered((Launch(Kernel(source, "pool"), size, group, arguments, label, float(outputs * kh * kw), traffic),))


def global_average(batch: int, pixels: int, channels: int, traits: Traits, number: Number = "float32") -> Lowered:
    return reduce("mean", batch, pixels, channels, traits, number)


def reduce(kind: Reduction, batch: int, count: int, channels: int, traits: Traits, number: Number = "float32"
           ) -> Lowered:
    """Four sums side by side: they round less, and wait less for each other. Where channels are 1, rows are summed by
    one work item each. Raises: UnsupportedError unless float32 or float16."""
    w = vectors.fitting(traits, channels)
    strips = -(-channels // w)
    group = (1, 1) if traits.cpu else (*vectors.split(vectors.group_items(traits), strips), 1)
    first = {"max": "-INFINITY", "min": "INFINITY"}.get(kind, "0.0f")
    step = {"max": "{s} = {v} > {s} ? {v} : {s};", "min": "{s} = {v} < {s} ? {v} : {s};"}.get(kind, "{s} += {v};")
    sums = " ".join(step.format(s=f"s{i}", v=f"v{i}") for i in range(4))
    loads = " ".join(f"V v{i} = LOAD(x + (size_t)(i + {i}) * channels);" for i in range(4))
    joined = " ".join(step.format(s="s0", v=f"s{i}") for i in (1, 2, 3))
    source = vectors.preamble(number, w) + f"""
__kernel {vectors.attribute(group)} void reduce(__global const T *input, __global T *output, int count, int channels) {{
    if ((int)get_global_id(0) * {w} >= channels) return;
    int c = min((int)get_global_id(0) * {w}, channels - {w}), i = 0;
    size_t b = get_global_id(1);
    __global const T *x = input + b * count * channels + c;
    V s0 = (V)({first}), s1 = s0, s2 = s0, s3 = s0;
    for (; i + 4 <= count; i += 4) {{ {loads} {sums} }}
    for (; i < count; i++) {{ V v0 = LOAD(x + (size_t)i * channels); {step.format(s="s0", v="v0")} }}
    {joined}
    STORE(s0{" / (float)count" if kind == "mean" else ""}, output + b * channels + c);
}}
"""
    arguments = (Buffer("input"), Buffer("output"), np.int32(count), np.int32(channels))
    return Lowered((Launch(Kernel(source, "reduce"), (vectors.up(strips, group[0]), batch), group, arguments, kind,
                           float(batch * count * channels),
                           vectors.number_bytes(number) * batch * (count + 1.0) * channels),))
