"""Depthwise convolution of NHWC images, with bias, residual and activation in the same kernel.

    lower(what, traits, weights, bias, choice) -> Lowered
        "input" [batch, height, width, channels] (and "input1": the residual) -> "output" [batch, *out, filters]

A work item has a vector of output channels and goes along the output's row, some pixels at a time: an input column
that several of them read is loaded once. Filter f reads channel f // (filters // channels).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError
from npulab.gpu.compute import activations, vectors
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Traits
from npulab.gpu.compute.vectors import FOUR

PIXELS = 8
"""Of a row at a time at most: with 3 columns of weights and 10 of input they fit the registers of a wide CPU."""
UNROLLED = 16
"""Columns of a filter up to which each has its own statements."""


def lower(what: Convolution, traits: Traits, weights: NDArray[Any], bias: NDArray[Any] | None = None,
          choice: Mapping[str, int] | None = None, halves: bool = False) -> Lowered:
    """weights: OHWI [filters, *kernel, 1]. bias: [filters].
    choice: "pixels" that a work item computes at a time, "width" of vectors; the traits say, if they are left out.
    halves: of float16, four products of a row of taps at a time are added up as halves, before they are added as
    floats.
    Raises: UnsupportedError unless float32 or float16; for halves unless float16, on a device that computes on them.
    """
    if halves:
        vectors.checked_halves(what.number, traits)
    if what.groups != what.channels or what.filters % what.channels or weights.shape[3] != 1:
        raise InvariantError("this convolution is not depthwise", got=f"{what.channels} channels in {what.groups}")
    choice = choice or {}
    height, width = what.out
    lanes = choice.get("width", vectors.fitting(traits, what.filters))
    pixels = min(choice.get("pixels", PIXELS if traits.cpu else 4), width)
    tiles, strips = -(-width // pixels), -(-what.filters // lanes)
    each = tiles if traits.cpu else 1  # tiles for a work item, one after the other
    group = (1, 1, 1) if traits.cpu else (*vectors.split(vectors.group_items(traits), strips, tiles), 1)
    size = (vectors.up(strips, group[0]), vectors.up(-(-tiles // each), group[1]), what.batch * height)
    kernel = Kernel(_source(what, lanes, pixels, each, bias is not None, group, halves), "depthwise")
    stored = np.float16 if what.number == "float16" else np.float32
    constants = {"weights": np.ascontiguousarray(weights[..., 0].transpose(1, 2, 0), stored)}
    if bias is not None:
        constants["bias"] = np.ascontiguousarray(bias, np.float32)
    arguments: tuple[Argument, ...] = (
        Buffer("input"), Buffer("weights"), *([Buffer("bias")] if bias is not None else []),
        *([Buffer("input1")] if what.residual else []), Buffer("output"),
        *map(np.int32, (what.height, what.width, what.channels, what.filters, height, width)))
    outputs = what.batch * height * width * what.filters
    traffic = vectors.number_bytes(what.number) * (
        what.batch * what.height * what.width * what.channels + outputs * (1 + what.residual)
        + what.filters * math.prod(what.kernel))
    return Lowered((Launch(kernel, size, group, arguments, "depthwise", what.operations, traffic),), constants)


def _source(what: Convolution, lanes: int, pixels: int, each: int, biased: bool, group: tuple[int, ...],
            halves: bool) -> str:
    (kh, kw), (sy, sx), (dy, dx), (top, left) = what.kernel, what.strides, what.dilations, what.pads[:2]
    many = what.filters // what.channels
    load, load1, vector = ("HALF_MANY({0})", "HALF_ONE({0}, 0)", "H") if halves else ("LOAD({0})", "LOAD1({0})", "V")
    if many == 1:
        channel, read = "f", load.format("x")
    elif lanes == 1:
        channel, read = f"f / {many}", load1.format("x")
    else:  # lanes of channels that repeat
        channel = "0"
        read = f"({vector})(" + ", ".join(load1.format(f"x + (f + {i}) / {many}") for i in range(lanes)) + ")"
    start = f"{'bias[f]' if lanes == 1 else f'vload{lanes}(0, bias + f)'}" if biased else "(V)(0.0f)"
    sums = "\n".join(f"        V s{p} = start;" for p in range(pixels))
    ends = "\n".join(f"        if (ox + {p} < out_width) finish(s{p}, {p});" for p in range(pixels))
    residual = "r = r + LOAD(residual + o);" if what.residual else ""
    # an output's pixels from the left edge of its tile; a tile at the right edge computes some that it drops
    fast, slow = (_columns(kw, sx, dx, pixels, read, checked, halves) for checked in (False, True))
    last = (pixels - 1) * sx + (kw - 1) * dx
    on_halves = vectors.half_operations(lanes) if halves else ""
    return vectors.preamble(what.number, lanes) + on_halves + activations.helpers(what.activation, lanes) + f"""
#define finish(sum, p) {{ V r = sum; size_t o = (((size_t)row * out_width) + ox + p) * filters + f; \\
    {residual} STORE({activations.activation(what.activation, "r", lanes, what.slope)}, output + o); }}
__kernel {vectors.attribute(group)} void depthwise(__global const T *input, __global const T *weights,
        {"__global const float *bias, " if biased else ""}{"__global const T *residual, " if what.residual else ""}
        __global T *output, int height, int width, int channels, int filters, int out_height, int out_width) {{
    if ((int)get_global_id(0) * {lanes} >= filters) return;
    int f = min((int)get_global_id(0) * {lanes}, filters - {lanes});  // the last vector overlaps the one before
    int row = get_global_id(2), b = row / out_height, iy = row % out_height * {sy} - {top};
    int first = get_global_id(1) * {each * pixels}, most = min(first + {each * pixels}, out_width);
    __global const T *image = input + (size_t)b * height * width * channels + {channel};
    V start = {start};
    for (int ox = first; ox < most; ox += {pixels}) {{
        int ix = ox * {sx} - {left};
{sums}
        for (int ky = 0; ky < {kh}; ky++) {{
            int y = iy + ky * {dy};
            if (y < 0 || y >= height) continue;
            __global const T *line = image + (long)y * width * channels;
            __global const T *w = weights + ky * {kw} * filters + f, *x;
            if (ix >= 0 && ix + {last} < width) {{
{fast}
            }} else {{
{slow}
            }}
        }}
{ends}
    }}
}}
"""


def _columns(kw: int, sx: int, dx: int, pixels: int, read: str, checked: bool, halves: bool) -> str:
    """One row of a filter for `pixels` outputs, each input column once."""
    vector, load = ("H", "HALF_MANY") if halves else ("V", "LOAD")
    if kw > UNROLLED:
        add = f"+= {vectors.short_sum([(read, 'k')])}" if halves else f"= fma({read}, k, s{{0}})"
        taps = "\n".join(f"    c = ix + {p * sx} + kx * {dx};\n    if (c >= 0 && c < width) {{ "
                         f"x = line + (long)c * channels; s{p} {add.format(p)}; }}" for p in range(pixels))
        return f"for (int kx = 0; kx < {kw}; kx++) {{\n    {vector} k = {load}(w + kx * filters); int c;\n{taps}\n}}"
    text = [f"{vector} k{k} = {load}(w + {k} * filters);" for k in range(kw)]
    if halves:
        text += [f"H h{p} = (H)(0);" for p in range(pixels)]
    readers: dict[int, list[tuple[int, int]]] = {}
    for p in range(pixels):
        for k in range(kw):
            readers.setdefault(p * sx + k * dx, []).append((p, k))
    for column, pairs in sorted(readers.items()):
        if halves:
            sums = " ".join(f"h{p} = HALF_FMA(v, k{k}, h{p});" for p, k in pairs)
            ends = [f"s{p} += HALF_FLOATS(h{p}); h{p} = (H)(0);" for p, k in pairs
                    if k + 1 == kw or (k + 1) % FOUR == 0]
        else:
            sums, ends = " ".join(f"s{p} = fma(v, k{k}, s{p});" for p, k in pairs), []
        guard = f"if (ix + {column} >= 0 && ix + {column} < width) " if checked else ""
        text.append(f"{guard}{{ x = line + (long)(ix + {column}) * channels; {vector} v = {read}; {sums} }}")
        text += ends
    return "\n".join(text)
