"""int8 convolutions and products, byte for byte as TFLite's reference kernels compute them.

    convolution(what, traits, weights, bias, zero_in, multipliers, shifts, zero_out, low, high) -> Lowered
        "input" int8 [batch, height, width, channels] -> "output" int8 [batch, *out, filters]
    product(batch, rows, inner, columns, traits, weights, ...) -> Lowered
        "input" int8 [batch, rows, inner] -> "output" int8 [batch, rows, columns]

    sum = bias + S (x - zero_in) w in int32; output = clamp(zero_out + sum * multiplier * 2**(shift - 31), low, high)

with the two roundings of MultiplyByQuantizedMultiplier: a rounding doubling high product, ties up, then a rounding
division by a power of two, ties away from 0 (tensorflow/lite/kernels/internal/common.h; npulab.reference.requantize).
The zero point is folded into the bias: padding is read as zero_in, so that every sum lacks the same zero_in S w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError, UnsupportedError
from npulab.gpu.compute import convolution as floats
from npulab.gpu.compute import vectors
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Traits

PIXELS = 6
"""Of a row at a time, on a CPU: each with one vector of filters."""


def product(batch: int, rows: int, inner: int, columns: int, traits: Traits, weights: NDArray[Any],
            bias: NDArray[Any] | None, zero_in: int, multipliers: Sequence[int], shifts: Sequence[int], zero_out: int,
            low: int = -128, high: int = 127) -> Lowered:
    """weights: [columns, inner], as TFLite's fully connected layers have them."""
    what = Convolution(batch, 1, rows, inner, columns, number="int8")
    return convolution(what, traits, filters_of(weights, inner, columns), bias, zero_in, multipliers, shifts,
                       zero_out, low, high)


def convolution(what: Convolution, traits: Traits, weights: NDArray[Any], bias: NDArray[Any] | None, zero_in: int,
                multipliers: Sequence[int], shifts: Sequence[int], zero_out: int, low: int = -128, high: int = 127
                ) -> Lowered:
    """weights: int8 OHWI [filters, *kernel, channels // groups], zero point 0; bias: int32 [filters].
    multipliers (0 or 2**30..2**31 - 1), shifts (-31..30): of each filter. Activations are in low and high.
    Groups: 1, or as many as channels (depthwise). Raises: InvariantError for other groups; as `checked`."""
    checked(what, weights, bias, zero_in, multipliers, shifts, zero_out, low, high)
    depthwise = what.groups == what.channels and what.groups > 1
    if what.groups not in (1, what.channels):
        raise InvariantError("integer convolutions have one group, or one for each channel", got=f"{what.groups}")
    w = vectors.fitting(traits, what.filters)
    height, width = what.out
    pixels = min(PIXELS if traits.cpu else 4, width)
    strips, tiles = -(-what.filters // w), -(-width // pixels)
    each = tiles if traits.cpu else 1
    group = (1, 1, 1) if traits.cpu else (*vectors.split(vectors.group_items(traits), strips, tiles), 1)
    taps = weights.reshape(what.filters, -1).astype(np.int64)
    start = (np.zeros(what.filters, np.int64) if bias is None else np.asarray(bias, np.int64)) - zero_in * taps.sum(1)
    constants = {"weights": np.ascontiguousarray(weights.transpose(1, 2, 3, 0), np.int8),
                 "start": start.astype(np.int32),  # int32 wraps, here as there
                 "multipliers": np.array(multipliers, np.int32), "shifts": np.array(shifts, np.int32)}
    kernel = Kernel(_source(what, w, pixels, each, group, depthwise, zero_in, zero_out, low, high), "convolve")
    arguments: tuple[Argument, ...] = (
        Buffer("input"), *(Buffer(r) for r in constants), Buffer("output"),
        *(np.int32(v) for v in (what.height, what.width, what.channels, what.filters, height, width)))
    size = (vectors.up(strips, group[0]), vectors.up(-(-tiles // each), group[1]), what.batch * height)
    traffic = (what.batch * what.height * what.width * what.channels + weights.size
               + what.batch * math.prod(what.out) * what.filters)
    return Lowered((Launch(kernel, size, group, arguments, "int8 convolution", what.operations, float(traffic)),),
                   constants)


def checked(what: Convolution, weights: NDArray[Any], bias: NDArray[Any] | None, zero_in: int,
            multipliers: Sequence[int], shifts: Sequence[int], zero_out: int, low: int, high: int) -> None:
    """Raises: InvariantError for arrays of other shapes, and numbers that the integers have not in which they are
    computed: they would be cut to others. UnsupportedError for a residual, another number or activation."""
    if what.number != "int8" or what.residual or what.activation != "none":
        raise UnsupportedError("integer kernels add no residual, and have activations in the limits of their outputs",
                               got=f"{what.number}, {what.activation}{', a residual' if what.residual else ''}")
    floats.checked(what, weights, bias)
    bytes_alone("the weights", weights)
    for name, byte in (("zero_in", zero_in), ("zero_out", zero_out), ("low", low), ("high", high)):
        if not -128 <= byte <= 127 or byte != int(byte):
            raise InvariantError(f"{name} is no byte", want="-128..127", got=byte)
    if low > high:
        raise InvariantError("low is above high", got=f"{low}, {high}")
    for name, values, least, most in (("multipliers", multipliers, 0, (1 << 31) - 1), ("shifts", shifts, -31, 30)):
        if len(values) != what.filters:
            raise InvariantError(f"{name} are one for each filter", want=what.filters, got=len(values))
        whole(name, np.asarray(values), least, most)
    if bias is not None:
        whole("the biases", np.asarray(bias), -(1 << 31), (1 << 31) - 1)


def filters_of(weights: NDArray[Any], inner: int, columns: int) -> NDArray[Any]:
    """A product's weights as a convolution's. Raises: InvariantError for those of another shape."""
    if weights.shape != (columns, inner):
        raise InvariantError("the weights are of another shape", want=(columns, inner), got=weights.shape)
    return weights.reshape(columns, 1, 1, inner)


def bytes_alone(name: str, array: NDArray[Any]) -> None:
    """Raises: InvariantError for numbers that int8 has not."""
    if array.dtype != np.int8:
        whole(name, array, -128, 127, "bytes")


def whole(name: str, array: NDArray[Any], least: int, most: int, kind: str = "whole numbers in their range") -> None:
    """Raises: InvariantError for any but whole numbers of least..most."""
    beyond = array[~((array >= least) & (array <= most) & (array == np.trunc(array)))]
    if beyond.size:
        raise InvariantError(f"{name} are no {kind}", want=f"{least}..{most}", got=beyond.flat[0])


def _source(what: Convolution, w: int, pixels: int, each: int, group: tuple[int, ...], depthwise: bool, zero_in: int,
            zero_out: int, low: int, high: int) -> str:
    n = "" if w == 1 else str(w)
    (kh, kw), (sy, sx), (dy, dx), (top, left) = what.kernel, what.strides, what.dilations, what.pads[:2]
    many = what.filters // what.channels
    ps = range(pixels)

    def load(at: str) -> str:
        return f"*({at})" if w == 1 else f"vload{n}(0, {at})"

    sums = " ".join(f"I s{p} = start_sum;" for p in ps)
    lines = "\n".join(f"            int x{p} = (ox + {p}) * {sx} - {left} + kx * {dx}; "
                      f"bool in{p} = inside && x{p} >= 0 && x{p} < width;\n            "
                      f"__global const char *l{p} = image + ((long)y * width + x{p}) * channels;" for p in ps)
    if depthwise:
        if many == 1:
            value = f"convert_int{n}({load('l{0} + f')})"
        elif w == 1:
            value = f"l{{0}}[f / {many}]"
        else:
            value = "(I)(" + ", ".join(f"l{{0}}[(f + {i}) / {many}]" for i in range(w)) + ")"
        steps = "\n".join(f"            s{p} += (in{p} ? {value.format(p)} : (I)({zero_in})) * k;" for p in ps)
        body = f"            I k = convert_int{n}({load('weights + (size_t)tap * filters + f')});\n{steps}"
    else:
        steps = "\n".join(f"                s{p} += (I)(in{p} ? (int)l{p}[c] : {zero_in}) * k;" for p in ps)
        at = load("weights + ((size_t)tap * channels + c) * filters + f")
        body = (f"            for (int c = 0; c < channels; c++) {{\n                I k = convert_int{n}({at});\n"
                f"{steps}\n            }}")
    to = "output + ((size_t)row * out_width + ox + {0}) * filters + f"
    store = f"*({to}) = r" if w == 1 else f"vstore{n}(r, 0, {to})"
    ends = "\n".join(f"        if (ox + {p} < out_width) {{ C r = requantized(s{p}, m, shift); {store.format(p)}; }}"
                     for p in ps)
    return f"""
typedef int{n} I;
typedef long{n} L;
typedef char{n} C;
C requantized(I sum, I m, I shift) {{
    // wraps when it is shifted left; the high product of two 32-bit numbers, doubled, ties up
    I x = convert_int{n}((convert_long{n}(sum << max(shift, (I)(0))) * convert_long{n}(m) + (L)(1L << 30)) >> (L)(31));
    I right = max(-shift, (I)(0));
    I mask = convert_int{n}(((L)(1) << convert_long{n}(right)) - (L)(1));
    I half_up = (mask >> (I)(1)) + (x < (I)(0) ? (I)(1) : (I)(0));
    x = (x >> min(right, (I)(31))) + ((x & mask) > half_up ? (I)(1) : (I)(0));
    return convert_char{n}(clamp(x + (I)({zero_out}), (I)({low}), (I)({high})));
}}
__kernel {vectors.attribute(group)} void convolve(__global const char *input, __global const char *weights,
        __global const int *start, __global const int *multipliers, __global const int *shifts, __global char *output,
        int height, int width, int channels, int filters, int out_height, int out_width) {{
    if ((int)get_global_id(0) * {w} >= filters) return;
    int f = min((int)get_global_id(0) * {w}, filters - {w});  // the last vector overlaps the one before
    int row = get_global_id(2), b = row / out_height, iy = row % out_height * {sy} - {top};
    int first = get_global_id(1) * {each * pixels}, most = min(first + {each * pixels}, out_width);
    __global const char *image = input + (size_t)b * height * width * channels;
    I start_sum = {load('start + f')}, m = {load('multipliers + f')}, shift = {load('shifts + f')};
    for (int ox = first; ox < most; ox += {pixels}) {{
        {sums}
        for (int tap = 0; tap < {kh * kw}; tap++) {{
            int y = iy + tap / {kw} * {dy}, kx = tap % {kw};
            bool inside = y >= 0 && y < height;
{lines}
{body}
        }}
{ends}
    }}
}}
"""
