"""Convolutions of 3 x 3 taps with fewer multiplications, after Winograd and Toom and Cook.

    Y = A^T [(G g G^T) . (B^T d B)] A      d: a patch of the input, (m + 2)^2; g: 3 x 3 weights; Y: m x m outputs

F(m x m, 3 x 3) multiplies (m + 2)^2 times where m^2 9 would be; each of the (m + 2)^2 points is a product of matrices
of its own, [patches, channels] by [channels, filters]. The matrices follow from m + 1 points and infinity by exact
fractions.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015, arXiv:1509.09308. Points of less
error: Barabasz et al., Error Analysis and Improving the Accuracy of Winograd Convolution for DNNs, 2018,
arXiv:1803.10986.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError, UnsupportedError
from npulab.gpu.compute import activations, blocks, tiles, vectors
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.compute.tiles import Choice, Winograd
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Number, Traits

Rational = tuple[tuple[Fraction, ...], ...]
_POINTS = {2: (0, 1, -1), 4: (0, 1, -1, Fraction(1, 2), -2)}
"""Beside infinity, by m."""


@cache
def matrices(m: int) -> tuple[Rational, Rational, Rational]:
    """A^T [m, m + 2], G [m + 2, 3], B^T [m + 2, m + 2].

    Of polynomials' values at the points, the transposed product: A and G are Vandermonde matrices with a last row for
    infinity, B^T the transposed inverse of one. Rows of B^T are made whole, those of G divided by as much.
    """
    points, n = [Fraction(p) for p in _POINTS[m]], m + 2

    def values(length: int) -> list[list[Fraction]]:
        return [[p ** k for k in range(length)] for p in points] + [[Fraction(int(k == length - 1))
                                                                     for k in range(length)]]

    a, g, b = values(m), values(3), [list(row) for row in zip(*_inverse(values(n)), strict=True)]
    for i, row in enumerate(b):
        whole = 1
        for x in row:
            whole = whole * x.denominator // np.gcd(whole, x.denominator)
        b[i] = [x * int(whole) for x in row]
        g[i] = [x / int(whole) for x in g[i]]
    return tuple(zip(*a, strict=True)), tuple(map(tuple, g)), tuple(map(tuple, b))


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    """By Gauss and Jordan, exactly."""
    n = len(matrix)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(n))] for i, row in enumerate(matrix)]
    for i in range(n):
        pivot = next(r for r in range(i, n) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for r in range(n):
            if r != i and rows[r][i]:
                rows[r] = [x - rows[r][i] * y for x, y in zip(rows[r], rows[i], strict=True)]
    return [row[n:] for row in rows]


def lower(what: Convolution, traits: Traits, weights: NDArray[Any], bias: NDArray[Any] | None,
          choice: Choice | None = None) -> Lowered:
    """Without a choice the model's first of this algorithm.

    Raises: InvariantError for another algorithm's choice, or anything but 3 x 3 taps, one group, strides and dilations
    of 1; UnsupportedError for halves.
    """
    if not tiles.suits_winograd(what):
        raise InvariantError("Winograd's algorithm is here for 3 x 3 taps and strides of 1", got=what)
    choice = choice or next(c for c in tiles.candidates(what, traits) if isinstance(c, Winograd))
    if not isinstance(choice, Winograd):
        raise InvariantError("another algorithm's choice", got=choice)
    if choice.tile.halves:
        raise UnsupportedError("Winograd's algorithm computes on floats: its patches outgrow halves", got=choice,
                               want="a direct convolution")
    m, tile = choice.size, choice.tile
    n = m + 2
    height, width = what.out
    down, across = -(-height // m), -(-width // m)
    patches = what.batch * down * across
    _, g, _ = matrices(m)
    g64 = np.array(g, np.float64)
    u = np.einsum("ay,bx,oyxi->abio", g64, g64, weights.astype(np.float64)).reshape(n * n, what.channels, what.filters)
    constants: dict[str, NDArray[Any]] = {"weights": blocks.pack(u, tile, "float32")}
    if bias is not None:
        constants["bias"] = blocks.pack_bias(bias, 1, tile)
    scratch = {"patches": 4 * n * n * patches * what.channels, "products": 4 * n * n * patches * what.filters}
    wide = [max((w for w in (16, 8, 4) if w <= (traits.vector if traits.cpu else 4) and n % w == 0), default=4)
            for n in (what.channels, what.filters)]
    return Lowered((
        _to_patches(what, m, wide[0], (down, across), traits),
        blocks.launch(blocks.Rows(patches, what.channels, what.channels, n * n), blocks.Columns(what.filters),
                      blocks.Ending(), tile, "float32", {"rows": "patches", "columns": "weights", "output": "products"},
                      f"winograd {m}x{m} {what.channels} to {what.filters}", what.operations),
        _from_products(what, m, wide[1], (down, across), bias is not None, traits)), constants, scratch)


def _to_patches(what: Convolution, m: int, wide: int, grid: tuple[int, int], traits: Traits) -> Launch:
    """[points, patches, channels] B^T d B of the image's patches."""
    n = m + 2
    _, _, b = matrices(m)
    ragged = what.channels % wide != 0
    parts = -(-what.channels // wide)
    load = "some(p, left)" if ragged else "many(p)"
    lines = [f"    V {', '.join(f't{i}_{x}' for i in range(n) for x in range(n))};"]
    for x in range(n):  # a column after the other: few numbers live
        lines.append("    {\n    V " + ", ".join(f"d{y} = (V)(0.0f)" for y in range(n)) + ";")
        lines.append(f"    if ((uint)(x + {x}) < (uint)width) {{")
        for y in range(n):
            lines.append(f"        if ((uint)(y + {y}) < (uint)height) {{ __global const N *p = from + "
                         f"((size_t){y} * width + {x}) * channels; d{y} = {load}; }}")
        lines.append("    }")
        lines += [f"    t{i}_{x} = {_sum(b[i], [f'd{y}' for y in range(n)])};" for i in range(n)]
        lines.append("    }")
    for i in range(n):
        for j in range(n):
            value = _sum(b[j], [f"t{i}_{x}" for x in range(n)])
            put = "put_floats_some" if ragged else "put_floats"
            lines.append(f"    {put}({value}, to + {i * n + j} * plane{', left' if ragged else ''});")
    body = "\n".join(lines)
    source = f"""{_prelude(what.number, wide)}
__kernel void to_patches(__global const N *restrict input, __global float *restrict patches, int channels, int height,
                         int width, int down, int across, int top, int left_pad, int parts, int work)
{{
    int at = get_global_id(0);
    if (at >= work) return;
    int part = at % parts, patch = at / parts;
    int x = patch % across * {m} - left_pad, q = patch / across;
    int y = q % down * {m} - top, image = q / down;
    {"int left = channels - part * W;" if ragged else ""}
    size_t plane = (size_t)(work / parts) * channels;
    __global const N *restrict from = input + ((long)(image * height + y) * width + x) * channels + part * W;
    __global float *restrict to = patches + (size_t)patch * channels + part * W;
{body}
}}
"""
    work = what.batch * grid[0] * grid[1] * parts
    numbers = (what.channels, what.height, what.width, *grid, what.pads[0], what.pads[1], parts, work)
    each = 2 if what.number == "float16" else 4
    moved = each * what.batch * what.height * what.width * what.channels + 4 * n * n * work // parts * what.channels
    return _launch(Kernel(source, "to_patches"), work, ("input", "patches"), numbers, traits, "winograd patches", moved)


def _from_products(what: Convolution, m: int, wide: int, grid: tuple[int, int], bias: bool, traits: Traits) -> Launch:
    """A^T M A of each patch's products, and what is fused to the convolution."""
    n = m + 2
    a, _, _ = matrices(m)
    ragged = what.filters % wide != 0
    parts = -(-what.filters // wide)
    load = "floats_some(from + {0} * plane, left)" if ragged else "floats(from + {0} * plane)"
    lines = []
    for x in range(n):
        lines += [f"    V p{y}_{x} = {load.format(y * n + x)};" for y in range(n)]
        lines += [f"    V t{i}_{x} = {_sum(a[i], [f'p{y}_{x}' for y in range(n)])};" for i in range(m)]
    for i in range(m):
        for j in range(m):
            lines.append(f"    if (y + {i} < height && x + {j} < width) {{")
            lines.append(f"        size_t o = at_out + ((size_t){i} * width + {j}) * filters;")
            lines.append(f"        V r = {_sum(a[j], [f't{i}_{x}' for x in range(n)])};")
            if bias:
                lines.append("        r += floats(bias + part * W);")
            if what.residual:
                lines.append(f"        r += {'some(residual + o, left)' if ragged else 'many(residual + o)'};")
            if what.activation != "none":
                lines.append(f"        r = {activations.activation(what.activation, 'r', wide, what.slope)};")
            lines.append(f"        {'put_some(r, output + o, left)' if ragged else 'put(r, output + o)'};\n    }}")
    body = "\n".join(lines)
    optional = ("__global const float *restrict bias, " if bias else "") + (
        "__global const N *restrict residual, " if what.residual else "")
    source = f"""{_prelude(what.number, wide)}{activations.helpers(what.activation, wide)}
__kernel void from_products(__global const float *restrict products, {optional}__global N *restrict output,
                            int filters, int height, int width, int down, int across, int parts, int work)
{{
    int at = get_global_id(0);
    if (at >= work) return;
    int part = at % parts, patch = at / parts;
    int x = patch % across * {m}, q = patch / across;
    int y = q % down * {m}, image = q / down;
    {"int left = filters - part * W;" if ragged else ""}
    size_t plane = (size_t)(work / parts) * filters;
    size_t at_out = ((size_t)(image * height + y) * width + x) * filters + part * W;
    __global const float *restrict from = products + (size_t)patch * filters + part * W;
{body}
}}
"""
    work = what.batch * grid[0] * grid[1] * parts
    numbers = (what.filters, *what.out, *grid, parts, work)
    each = 2 if what.number == "float16" else 4
    outputs = what.batch * what.out[0] * what.out[1] * what.filters
    moved = 4 * n * n * work // parts * what.filters + each * outputs * (2 if what.residual else 1)
    roles = ("products", *(("bias",) if bias else ()), *(("input1",) if what.residual else ()), "output")
    return _launch(Kernel(source, "from_products"), work, roles, numbers, traits, "winograd outputs", moved)


def _launch(kernel: Kernel, work: int, roles: tuple[str, ...], numbers: tuple[int, ...], traits: Traits, label: str,
            moved: float) -> Launch:
    group = min(traits.group_max, 16 if traits.cpu else 64)
    arguments: list[Argument] = [Buffer(r) for r in roles]
    arguments += [np.int32(x) for x in numbers]
    return Launch(kernel, (-(-work // group) * group,), (group,), tuple(arguments), label, 0.0, float(moved))


def _sum(factors: tuple[Fraction, ...], names: list[str]) -> str:
    """Of the terms that are not zero, multiplications by one left out, by fma."""
    ones = [(f, x) for f, x in zip(factors, names, strict=True) if abs(f) == 1]
    rest = [(f, x) for f, x in zip(factors, names, strict=True) if f and abs(f) != 1]
    text = ""
    for f, x in ones:
        text = (f"{text} + {x}" if f > 0 else f"{text} - {x}") if text else (x if f > 0 else f"-{x}")
    for f, x in rest:
        factor = vectors.literal(float(f))
        text = f"fma({x}, (V)({factor}), {text})" if text else f"{x} * (V)({factor})"
    return text


def _prelude(number: Number, wide: int) -> str:
    """`vectors.prelude` and the same for floats, whatever the numbers of images."""
    put = "*p = v" if wide == 1 else f"vstore{wide}(v, 0, p)"
    spread = "*t = v" if wide == 1 else f"vstore{wide}(v, 0, t)"
    gather = "*t" if wide == 1 else f"vload{wide}(0, t)"
    return f"""{vectors.prelude(number, wide)}
inline void put_floats(V v, __global float *p) {{ {put}; }}
__attribute__((noinline)) void put_floats_some(V v, __global float *p, int left) {{
    if (left >= W) {{ put_floats(v, p); return; }}
    float t[W];
    {spread};
    for (int i = 0; i < left; i++) p[i] = t[i];
}}
__attribute__((noinline)) V floats_some(__global const float *p, int left) {{
    if (left >= W) return floats(p);
    float t[W];
    for (int i = 0; i < W; i++) t[i] = i < left ? p[i] : 0.0f;
    return {gather};
}}
"""
