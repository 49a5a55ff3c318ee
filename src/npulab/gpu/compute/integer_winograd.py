"""int8 convolutions of 3 x 3 taps with 4 multiplications where 9 would be, and the same bytes: F(2 x 2, 3 x 3).

    4 S = A^T [(2 G g (2 G)^T) . (B^T d B)] A      d: a patch of the input, 4 x 4; g: 3 x 3 weights; S: 2 x 2 sums

A, B and 2 G (`winograd.matrices`) are whole, so that all of it is: nothing is rounded. |d| = |x - zero_in| <= 255, two
ones a row of B^T: |B^T d B| <= 4 * 255 = 1020. |g| <= 128, rows of 2 G add up to 3 at most: |2 G g (2 G)^T| <= 9 * 128
= 1152. Both are int16, their products are summed in int32.

int32 wraps, on the way too, and that does no harm: additions and multiplications of what has wrapped give the low 32
bits of 4 S all the same. The division by 4 is the one step that needs 4 S whole: |4 S| < 2**31. The bias is added
after it, and wraps as in a direct sum. So `suits` adds up the most and the least that 9 channels of the weights at hand
can make of bytes; where that reaches 2**29, sums are direct. Weights of -128 all over, and zero_in = 127, allow 1827
channels: 9 * 1827 * 255 * 128 < 2**29.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError
from npulab.gpu.compute import integer_blocks, tiles, vectors
from npulab.gpu.compute.integer_blocks import Bytes, Size, Tile, load
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Traits
from npulab.gpu.compute.winograd import matrices

SIZE, POINTS = 2, 16


def most(what: Convolution, weights: NDArray[Any], zero_in: int) -> int:
    """The largest |sum| without a bias that bytes can make of these weights: it is reached."""
    w = weights.reshape(what.filters, -1).astype(np.int64)
    ends = [w * (byte - zero_in) for byte in (-128, 127)]
    return int(max(np.maximum(*ends).sum(1).max(), -np.minimum(*ends).sum(1).min()))


def suits(what: Convolution, weights: NDArray[Any], zero_in: int) -> bool:
    return tiles.suits_winograd(what) and most(what, weights, zero_in) < 1 << 29


def suits_any(what: Convolution) -> bool:
    """Whether it `suits`, whatever the weights and the zero point."""
    return tiles.suits_winograd(what) and 9 * what.channels * 255 * 128 < 1 << 29


def checked(what: Convolution, weights: NDArray[Any], zero_in: int) -> None:
    """Raises: InvariantError for what does not `suits`."""
    if not suits(what, weights, zero_in):
        raise InvariantError(
            "Winograd's algorithm is here for 3 x 3 taps, strides and dilations of 1, one group, and sums below 2**29",
            got=f"{what.kernel[0]} x {what.kernel[1]} taps, strides {what.strides}, dilations {what.dilations}, "
                f"{what.groups} groups, sums up to {most(what, weights, zero_in)}",
            try_="direct sums: the bytes are the same")


def transformed(weights: NDArray[Any]) -> NDArray[np.int64]:
    """[points, channels, filters] 2 G g (2 G)^T."""
    g = np.array([[2 * x for x in row] for row in matrices(SIZE)[1]], np.int64)
    u: NDArray[np.int64] = np.einsum("ay,bx,oyxi->abio", g, g, weights.astype(np.int64))
    return u.reshape(POINTS, *u.shape[2:])


def cycles(what: Convolution, traits: Traits, tile: Tile) -> float:
    """Of the launches, by a model."""
    size = size_of(what)
    moved = POINTS * size.rows * (4 * what.channels + 8 * what.filters) / integer_blocks.MOVED
    return integer_blocks.cycles(traits, tile, size) + moved / traits.compute_units + 3 * integer_blocks.LAUNCH


def size_of(what: Convolution) -> Size:
    """Of its products."""
    patches = what.batch * math.prod(-(-n // SIZE) for n in what.out)
    return Size(patches, -(-what.channels // 2), what.filters, POINTS, False)


def lower(what: Convolution, traits: Traits, weights: NDArray[Any], zero_in: int, rescale: NDArray[np.int32],
          ending: Bytes, tile: Tile | None = None) -> Lowered:
    """What `suits`, of checked arguments. rescale: [3, filters] biases, multipliers, shifts."""
    height, width = what.out
    grid = -(-height // SIZE), -(-width // SIZE)
    size = size_of(what)
    patches, pairs, tile = size.rows, size.pairs, tile or integer_blocks.tile_of(traits, size)
    pitch = vectors.up(what.filters, tile.columns)
    rows = integer_blocks.Rows((1, 1, patches), (1, patches), pairs, pairs, patches * pairs)
    columns = integer_blocks.Columns(what.filters, POINTS, pitch, patches * pitch)
    u = integer_blocks.pack(transformed(weights)[:, None], tile)
    constants: dict[str, NDArray[Any]] = {"weights": u, "rescale": rescale}
    scratch = {"patches": 4 * POINTS * patches * pairs, "products": 4 * POINTS * patches * pitch}
    product = integer_blocks.launch(rows, columns, tile, None,
                                    {"rows": "patches", "weights": "weights", "output": "products"},
                                    f"int8 winograd {what.channels} to {what.filters}", what.operations)
    return Lowered((_to_patches(what, traits, grid, 2 * pairs, zero_in), product,
                    _from_products(what, traits, grid, pitch, ending)), constants, scratch)


def _to_patches(what: Convolution, traits: Traits, grid: tuple[int, int], pitch: int, zero_in: int) -> Launch:
    """[points, patches, pitch] B^T d B, int16."""
    w, n = min(16, vectors.fitting(traits, what.channels)), SIZE + 2
    b, many = matrices(SIZE)[2], "" if w == 1 else str(w)
    parts = -(-what.channels // w)
    lines = [f"    P {', '.join(f't{i}_{x}' for i in range(n) for x in range(n))};"]
    for x in range(n):
        lines.append("    {\n    P " + ", ".join(f"d{y} = (P)(0)" for y in range(n)) + ";")
        lines.append(f"    if ((uint)(x + {x}) < (uint)width) {{")
        lines += [f"        if ((uint)(y + {y}) < (uint)height) d{y} = convert_short{many}("
                  f"{load(w, f'from + ((long){y} * width + {x}) * channels')}) - (P)({zero_in});" for y in range(n)]
        lines.append("    }")
        lines += [f"    t{i}_{x} = {_sum(b[i], [f'd{y}' for y in range(n)])};" for i in range(n)]
        lines.append("    }")
    lines += [f"    put({_sum(b[j], [f't{i}_{x}' for x in range(n)])}, to + {i * n + j} * plane);"
              for i in range(n) for j in range(n)]
    body = "\n".join(lines)
    source = f"""typedef short{many} P;
{integer_blocks.stores("put", "short", w)}
__kernel void to_patches(__global const char *restrict input, __global short *restrict patches, int channels,
        int height, int width, int down, int across, int top, int left, int parts, int pitch, int work, int each) {{
    int begin = get_global_id(0) * each, end = min(begin + each, work);
    size_t plane = (size_t)(work / parts) * pitch;
    for (int at = begin; at < end; at++) {{
    int part = min(at % parts * {w}, channels - {w}), patch = at / parts;  // the last overlaps the one before
    int x = patch % across * {SIZE} - left, q = patch / across;
    int y = q % down * {SIZE} - top, image = q / down;
    __global const char *restrict from = input + (((long)image * height + y) * width + x) * channels + part;
    __global short *restrict to = patches + (size_t)patch * pitch + part;
{body}
    }}
}}
"""
    patches = what.batch * math.prod(grid)
    numbers = (what.channels, what.height, what.width, *grid, *what.pads[:2], parts, pitch, patches * parts)
    moved = what.batch * what.height * what.width * what.channels + 2 * POINTS * patches * pitch
    return _launch(Kernel(source, "to_patches"), ("input", "patches"), numbers, grid[1] * parts, traits,
                   "int8 winograd patches", moved)


def _from_products(what: Convolution, traits: Traits, grid: tuple[int, int], pitch: int, ending: Bytes) -> Launch:
    """A^T M A / 4 of each patch's products, and their bytes."""
    w, n = vectors.fitting(traits, what.filters), SIZE + 2
    a, parts = matrices(SIZE)[0], -(-what.filters // w)
    lines = []
    for x in range(n):
        lines += [f"    I m{y}_{x} = {load(w, f'from + {y * n + x} * plane')};" for y in range(n)]
        lines += [f"    I t{i}_{x} = {_sum(a[i], [f'm{y}_{x}' for y in range(n)])};" for i in range(SIZE)]
    for i in range(SIZE):
        for j in range(SIZE):
            value = f"requantized((({_sum(a[j], [f't{i}_{x}' for x in range(n)])}) >> (I)(2)) + start, by, shift)"
            lines.append(f"    if (y + {i} < height && x + {j} < width) "
                         f"put({value}, to + ((size_t){i} * width + {j}) * filters);")
    body = "\n".join(lines)
    source = f"""typedef int{"" if w == 1 else w} I;
{integer_blocks.requantized(w, ending)}
__kernel void from_products(__global const int *restrict products, __global const int *restrict rescale,
        __global char *restrict output, int filters, int height, int width, int down, int across, int parts, int pitch,
        int work, int each) {{
    int begin = get_global_id(0) * each, end = min(begin + each, work);
    size_t plane = (size_t)(work / parts) * pitch;
    for (int at = begin; at < end; at++) {{
    int part = min(at % parts * {w}, filters - {w}), patch = at / parts;  // the last overlaps the one before
    int x = patch % across * {SIZE}, q = patch / across;
    int y = q % down * {SIZE}, image = q / down;
    __global char *restrict to = output + (((size_t)image * height + y) * width + x) * filters + part;
    __global const int *restrict from = products + (size_t)patch * pitch + part;
    I start = {load(w, "rescale + part")}, by = {load(w, "rescale + filters + part")};
    I shift = {load(w, "rescale + 2 * filters + part")};
{body}
    }}
}}
"""
    patches = what.batch * math.prod(grid)
    numbers = (what.filters, *what.out, *grid, parts, pitch, patches * parts)
    moved = 4 * POINTS * patches * pitch + what.batch * math.prod(what.out) * what.filters
    return _launch(Kernel(source, "from_products"), ("products", "rescale", "output"), numbers, grid[1] * parts, traits,
                   "int8 winograd outputs", moved)


def _launch(kernel: Kernel, roles: Sequence[str], numbers: Sequence[int], row: int, traits: Traits, label: str,
            moved: int) -> Launch:
    """A work item makes a row of patches on a CPU, else one vector."""
    work, group = numbers[-1], 1 if traits.cpu else min(traits.group_max, vectors.GROUP)
    each = row if traits.cpu else 1
    arguments: list[Argument] = [Buffer(r) for r in roles]
    arguments += [np.int32(x) for x in (*numbers, each)]
    return Launch(kernel, (vectors.up(-(-work // each), group),), (group,), tuple(arguments), label, 0.0, float(moved))


def _sum(factors: Sequence[Fraction], names: Sequence[str]) -> str:
    """Factors are 1, -1 and 0."""
    terms = [f" {'+' if f > 0 else '-'} {x}" for f, x in zip(factors, names, strict=True) if f]
    return "".join(terms).removeprefix(" + ")
