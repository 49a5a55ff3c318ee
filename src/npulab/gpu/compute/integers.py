"""int8 convolutions and products, byte for byte as TFLite's reference kernels compute them.

    convolution(what, traits, weights, bias, zero_in, multipliers, shifts, zero_out, low, high) -> Lowered
        "input" int8 [batch, height, width, channels] -> "output" int8 [batch, *out, filters]
    product(batch, rows, inner, columns, traits, weights, ...) -> Lowered
        "input" int8 [batch, rows, inner] -> "output" int8 [batch, rows, columns]

    sum = bias + S (x - zero_in) w in int32; output = clamp(zero_out + sum * multiplier * 2**(shift - 31), low, high)

with the two roundings of MultiplyByQuantizedMultiplier: a rounding doubling high product, ties up, then a rounding
division by a power of two, ties away from 0 (tensorflow/lite/kernels/internal/common.h; npulab.reference.requantize).
Sums are of pairs of int16 (`integer_blocks`), by 3 x 3 taps also by Winograd's algorithm (`integer_winograd`): the
bytes are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError, UnsupportedError
from npulab.gpu.compute import convolution as floats
from npulab.gpu.compute import integer_blocks, integer_winograd, vectors
from npulab.gpu.compute.integer_blocks import Bytes, Size, Tile, load
from npulab.gpu.compute.problems import Convolution, Product
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Traits

Algorithm = Literal["direct", "winograd"]
ALGORITHMS: tuple[Algorithm, ...] = ("direct", "winograd")
PIXELS = 6
"""Of a row at a time where groups are single channels, on a CPU: each with one vector of filters."""


class Integer(msgspec.Struct, frozen=True, tag="integer"):
    """How sums are made; the tile is of `integer_blocks`."""

    algorithm: Algorithm
    tile: Tile


def product(batch: int, rows: int, inner: int, columns: int, traits: Traits, weights: NDArray[Any],
            bias: NDArray[Any] | None, zero_in: int, multipliers: Sequence[int], shifts: Sequence[int], zero_out: int,
            low: int = -128, high: int = 127, choice: Integer | None = None) -> Lowered:
    """weights: [columns, inner], as TFLite's fully connected layers have them."""
    what = as_convolution(Product(batch, rows, inner, columns, transposed=True, number="int8"))
    return convolution(what, traits, filters_of(weights, inner, columns), bias, zero_in, multipliers, shifts,
                       zero_out, low, high, choice=choice)


def convolution(what: Convolution, traits: Traits, weights: NDArray[Any], bias: NDArray[Any] | None, zero_in: int,
                multipliers: Sequence[int], shifts: Sequence[int], zero_out: int, low: int = -128, high: int = 127,
                algorithm: Algorithm | None = None, choice: Integer | None = None) -> Lowered:
    """weights: int8 OHWI [filters, *kernel, channels // groups], zero point 0; bias: int32 [filters].
    multipliers (0 or 2**30..2**31 - 1), shifts (-31..30): of each filter. Activations are in low and high. Without an
    algorithm the likely quicker one. choice: algorithm and tile, of `candidates`.

    Raises: as `checked`; InvariantError for Winograd's algorithm where `integer_winograd.suits` says no.
    """
    checked(what, weights, bias, zero_in, multipliers, shifts, zero_out, low, high)
    zero_in, tile = int(zero_in), choice.tile if choice else None
    algorithm = choice.algorithm if choice else algorithm
    if algorithm == "winograd":
        integer_winograd.checked(what, weights, zero_in)
    elif algorithm is None and integer_winograd.suits(what, weights, zero_in) and _quicker(what, traits):
        algorithm = "winograd"
    ending = Bytes(int(zero_out), int(low), int(high), bool(max(shifts) > 0))
    rescale = np.array([np.zeros(what.filters) if bias is None else bias, multipliers, shifts], np.int64)
    if algorithm == "winograd":
        return integer_winograd.lower(what, traits, weights, zero_in, rescale.astype(np.int32), ending, tile)
    if what.groups == what.channels > 1 and not choice:
        return _depthwise(what, traits, weights, zero_in, rescale, ending)
    return _direct(what, traits, weights, zero_in, rescale, ending, tile)


def candidates(what: Convolution, traits: Traits) -> list[Integer]:
    """The model's first of each algorithm, the likely quicker one before the other, then the rest in the model's order.
    Winograd's algorithm is among them where it is right for any weights. None of depthwise sums: they have one kernel.
    """
    if what.groups == what.channels > 1:
        return []
    algorithms = ALGORITHMS if integer_winograd.suits_any(what) else ALGORITHMS[:1]
    ways = [(i > 0, _cycles(what, traits, Integer(a, t)), Integer(a, t)) for a in algorithms
            for i, t in enumerate(integer_blocks.candidates(traits, _size(what, a)))]
    return [c for *_, c in sorted(ways, key=lambda w: w[:2])]


def as_convolution(what: Product) -> Convolution:
    """A product of bytes: of an image of one row. Raises: UnsupportedError for what these products have not."""
    plain = Product(what.batch, what.rows, what.inner, what.columns, what.transposed, number="int8")
    if what != plain:
        raise UnsupportedError("integer products are of constant weights, one matrix, without scale, residual and "
                               "activation", got=str(what), want=str(plain))
    return Convolution(what.batch, 1, what.rows, what.inner, what.columns, number="int8")


def _quicker(what: Convolution, traits: Traits) -> bool:
    """Winograd's algorithm than direct sums, of what has 3 x 3 taps, by a model of cycles."""
    direct, winograd = (_cycles(what, traits, Integer(a, integer_blocks.tile_of(traits, _size(what, a))))
                        for a in ALGORITHMS)
    return winograd < direct


def _cycles(what: Convolution, traits: Traits, choice: Integer) -> float:
    if choice.algorithm == "winograd":
        return integer_winograd.cycles(what, traits, choice.tile)
    return integer_blocks.cycles(traits, choice.tile, _size(what, "direct")) + 2 * integer_blocks.LAUNCH


def _size(what: Convolution, algorithm: Algorithm) -> Size:
    """Of the launch that sums products."""
    if algorithm == "winograd":
        return integer_winograd.size_of(what)
    pairs = vectors.up(what.channels // what.groups, 2) // 2 * math.prod(what.kernel)
    return Size(what.batch * math.prod(what.out), pairs, what.filters // what.groups, what.groups, True)


def _direct(what: Convolution, traits: Traits, weights: NDArray[Any], zero_in: int, rescale: NDArray[np.int64],
            ending: Bytes, tile: Tile | None) -> Lowered:
    """A copy of the image as int16 without the zero point, pads around it; sums of all taps."""
    groups, filters, inner = what.groups, what.filters // what.groups, what.channels // what.groups
    (kh, kw), (top, left, bottom, right) = what.kernel, what.pads
    size, even = (what.height + top + bottom, what.width + left + right), vectors.up(inner, 2)
    matrix = np.zeros((groups, kh * kw, even, filters), np.int64)
    matrix[:, :, :inner] = weights.reshape(groups, filters, kh * kw, inner).transpose(0, 2, 3, 1)
    taps = what.kernel
    if groups == 1 and what.dilations[1] == 1:  # taps of a row lie side by side
        matrix, taps = matrix.reshape(1, kh, kw * even, filters), (kh, 1)
    pairs = matrix.shape[2] // 2
    out, pitch = (what.batch, *what.out), groups * even // 2
    tile = tile or integer_blocks.tile_of(traits, _size(what, "direct"))
    rows = integer_blocks.Rows(out, size, pairs, pitch, even // 2, taps, what.strides, what.dilations)
    columns = integer_blocks.Columns(filters, groups, what.filters, filters)
    label = f"int8 {kh}x{kw} convolution {what.channels} to {what.filters}"
    constants: dict[str, NDArray[Any]] = {
        "weights": integer_blocks.pack(matrix, tile),
        "rescale": integer_blocks.pack_rescale(rescale, groups, tile.columns)}
    return Lowered((_widening(what, traits, size, even, zero_in),
                    integer_blocks.launch(rows, columns, tile, ending,
                                          {"rows": "wide", "weights": "weights", "rescale": "rescale",
                                           "output": "output"}, label, what.operations)),
                   constants, {"wide": 4 * what.batch * math.prod(size) * pitch})


def _widening(what: Convolution, traits: Traits, size: tuple[int, int], even: int, zero_in: int) -> Launch:
    """int16 [batch, *size, groups * even] of the image's bytes less the zero point, which is what pads are of."""
    inner = what.channels // what.groups
    runs, length = (1, what.channels) if inner == even else (what.groups, inner)
    w = vectors.fitting(traits, length)
    many, pitch, each = "" if w == 1 else str(w), what.groups * even, size[1] if traits.cpu else 1
    group = (1, 1) if traits.cpu else vectors.split(vectors.group_items(traits), size[1], what.batch * size[0])
    source = f"""typedef short{many} P;
{integer_blocks.stores("put", "short", w)}
__kernel {vectors.attribute(group)} void widen(__global const char *restrict input, __global short *restrict wide,
        int height, int width, int padded_height, int padded_width, int rows) {{
    int row = get_global_id(1), begin = get_global_id(0) * {each}, end = min(begin + {each}, padded_width);
    if (row >= rows) return;
    int image = row / padded_height, y = row - image * padded_height - {what.pads[0]};
    for (int at = begin; at < end; at++) {{
        int x = at - {what.pads[1]};
        bool inside = (uint)y < (uint)height && (uint)x < (uint)width;
        __global const char *restrict from = input + (inside ? (((size_t)image * height + y) * width + x) * {
            what.channels} : 0);
        __global short *restrict to = wide + ((size_t)row * padded_width + at) * {pitch};
        for (int run = 0; run < {runs}; run++)
            for (int c = 0; c < {length}; c += {w}) {{
                int k = min(c, {length - w});  // the last vector overlaps the one before
                P p = convert_short{many}({load(w, f"from + run * {length} + k")}) - (P)({zero_in});
                p = inside ? p : (P)(0);
                put(p, to + run * {even} + k);
            }}
    }}
}}
"""
    rows = what.batch * size[0]
    arguments: tuple[Argument, ...] = (Buffer("input"), Buffer("wide"),
                                       *(np.int32(n) for n in (what.height, what.width, *size, rows)))
    moved = what.batch * what.height * what.width * what.channels + 2 * rows * size[1] * pitch
    return Launch(Kernel(source, "widen"), (vectors.up(-(-size[1] // each), group[0]), vectors.up(rows, group[1])),
                  group, arguments, "int8 image as int16", 0.0, float(moved))


def _depthwise(what: Convolution, traits: Traits, weights: NDArray[Any], zero_in: int, rescale: NDArray[np.int64],
               ending: Bytes) -> Lowered:
    w = vectors.fitting(traits, what.filters)
    height, width = what.out
    pixels = min(PIXELS if traits.cpu else 4, width)
    strips, tiles = -(-what.filters // w), -(-width // pixels)
    each = tiles if traits.cpu else 1
    group = (1, 1, 1) if traits.cpu else (*vectors.split(vectors.group_items(traits), strips, tiles), 1)
    start = rescale[0] - zero_in * weights.reshape(what.filters, -1).astype(np.int64).sum(1)
    constants: dict[str, NDArray[Any]] = {
        "weights": np.ascontiguousarray(weights.transpose(1, 2, 3, 0), np.int8),
        "rescale": np.array([start, *rescale[1:]]).astype(np.int32)}  # int32 wraps, here as there
    kernel = Kernel(_source(what, w, pixels, each, group, zero_in, ending), "convolve")
    arguments: tuple[Argument, ...] = (
        Buffer("input"), *(Buffer(r) for r in constants), Buffer("output"),
        *(np.int32(v) for v in (what.height, what.width, what.channels, what.filters, height, width)))
    size = (vectors.up(strips, group[0]), vectors.up(-(-tiles // each), group[1]), what.batch * height)
    traffic = (what.batch * what.height * what.width * what.channels + weights.size
               + what.batch * math.prod(what.out) * what.filters)
    return Lowered((Launch(kernel, size, group, arguments, "int8 depthwise", what.operations, float(traffic)),),
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


def _source(what: Convolution, w: int, pixels: int, each: int, group: tuple[int, ...], zero_in: int, ending: Bytes
            ) -> str:
    """The zero point is in the bias: padding is read as zero_in, so that every sum lacks the same zero_in S w."""
    n = "" if w == 1 else str(w)
    (kh, kw), (sy, sx), (dy, dx), (top, left) = what.kernel, what.strides, what.dilations, what.pads[:2]
    many = what.filters // what.channels
    ps = range(pixels)
    sums = " ".join(f"I s{p} = start;" for p in ps)
    lines = "\n".join(f"            int x{p} = (ox + {p}) * {sx} - {left} + kx * {dx}; "
                      f"bool in{p} = inside && x{p} >= 0 && x{p} < width;\n            "
                      f"__global const char *l{p} = image + ((long)y * width + x{p}) * channels;" for p in ps)
    if many == 1:
        value = f"convert_int{n}({load(w, 'l{0} + f')})"
    elif w == 1:
        value = f"l{{0}}[f / {many}]"
    else:
        value = "(I)(" + ", ".join(f"l{{0}}[(f + {i}) / {many}]" for i in range(w)) + ")"
    steps = "\n".join(f"            s{p} += (in{p} ? {value.format(p)} : (I)({zero_in})) * k;" for p in ps)
    ends = "\n".join(f"        if (ox + {p} < out_width) "
                     f"put(requantized(s{p}, m, shift), output + ((size_t)row * out_width + ox + {p}) * filters + f);"
                     for p in ps)
    return f"""
typedef int{n} I;
{integer_blocks.requantized(w, ending)}
__kernel {vectors.attribute(group)} void convolve(__global const char *input, __global const char *weights,
        __global const int *rescale, __global char *output, int height, int width, int channels, int filters,
        int out_height, int out_width) {{
    if ((int)get_global_id(0) * {w} >= filters) return;
    int f = min((int)get_global_id(0) * {w}, filters - {w});  // the last vector overlaps the one before
    int row = get_global_id(2), b = row / out_height, iy = row % out_height * {sy} - {top};
    int first = get_global_id(1) * {each * pixels}, most = min(first + {each * pixels}, out_width);
    __global const char *image = input + (size_t)b * height * width * channels;
    I start = {load(w, 'rescale + f')}, m = {load(w, 'rescale + filters + f')};
    I shift = {load(w, 'rescale + 2 * filters + f')};
    for (int ox = first; ox < most; ox += {pixels}) {{
        {sums}
        for (int tap = 0; tap < {kh * kw}; tap++) {{
            int y = iy + tap / {kw} * {dy}, kx = tap % {kw};
            bool inside = y >= 0 && y < height;
{lines}
            I k = convert_int{n}({load(w, 'weights + (size_t)tap * filters + f')});
{steps}
        }}
{ends}
    }}
}}
"""
