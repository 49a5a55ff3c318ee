"""The kernel that products and convolutions share: rows by columns of the output in registers.

Rows are a matrix's, or an image's pixels one after the other; the inner loop goes through a row's numbers (a pixel's
channels), for each tap of a convolution anew. What lies outside of an image is read from a row of zeros, chosen
once for a pixel and tap, so that the inner loop tests nothing. Columns (filters) come in panels, the numbers of
one step of the inner loop side by side: [group][panel][tap][inner][columns of a panel].

On a CPU a work item is a group of its own. On GPUs neighbours take neighbouring columns; with `depth` a group copies
that many steps of its rows and columns to local memory first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import CapacityError
from npulab.gpu.compute import activations
from npulab.gpu.compute.moves import INDEX_MAX
from npulab.gpu.compute.tiles import Tile
from npulab.gpu.compute.types import Activation, Argument, Buffer, Kernel, Launch, Number
from npulab.gpu.compute.vectors import FETCH, by_fours, half_operations, literal, prelude, short_sum


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the numbers of the output's rows lie.

    count     of rows, in all of the batch if that is one matrix.     inner   numbers of a tap of a row.
    pitch     from a row (pixel) to the next.                         batch   matrices, each with its own columns.
    out       height and width of the output image, None of matrices; the rest is of images alone.
    """

    count: int
    inner: int
    pitch: int
    batch: int = 1
    out: tuple[int, int] | None = None
    size: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    outside: bool = False

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)


@dataclass(frozen=True, slots=True)
class Columns:
    """count: of one group.    groups: each reads `Rows.inner` numbers of a pixel further on.    packed: False of a
    matrix [inner, count] as it is."""

    count: int
    groups: int = 1
    packed: bool = True


@dataclass(frozen=True, slots=True)
class Ending:
    """What is done to sums before they are stored: * scale + bias + residual, then the activation."""

    scale: float = 1.0
    bias: bool = False
    residual: bool = False
    activation: Activation = "none"
    slope: float = 0.01


_LINE = 64
"""Bytes of a cache line, of what is fetched at once."""


def pack(matrix: NDArray[Any], tile: Tile, number: Number) -> NDArray[Any]:
    """[groups, inner, columns] -> [groups, panels, inner, tile.columns], zeros behind the last column."""
    groups, inner, columns = matrix.shape
    panels = -(-columns // tile.columns)
    padded = np.zeros((groups, inner, panels * tile.columns), np.float16 if number == "float16" else np.float32)
    padded[:, :, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(groups, inner, panels, tile.columns).transpose(0, 2, 1, 3))


def pack_bias(bias: NDArray[Any], groups: int, tile: Tile) -> NDArray[np.float32]:
    """[groups * columns] -> [groups, panels * tile.columns], zeros behind the last column."""
    columns = bias.size // groups
    padded = np.zeros((groups, -(-columns // tile.columns) * tile.columns), np.float32)
    padded[:, :columns] = bias.reshape(groups, columns)
    return padded


def launch(rows: Rows, columns: Columns, ending: Ending, tile: Tile, number: Number, roles: dict[str, str],
           label: str, operations: float) -> Launch:
    """roles: of "rows", "columns", "output" and where the ending, or what is outside, needs them "bias", "residual",
    "zeros"."""
    ragged = columns.count % tile.columns != 0
    whole = rows.count % tile.block == 0
    panels = -(-columns.count // tile.columns)
    blocks = -(-rows.count // tile.block)
    kernel = Kernel(_source(rows.out is not None, rows.outside, ragged, whole, ending, tile, number,
                            columns.groups > 1), "block")
    numbers = [rows.count, rows.inner, columns.count, rows.pitch, columns.count * columns.groups]
    steps = (rows.inner * rows.taps * tile.columns, tile.columns) if columns.packed else (tile.columns, columns.count)
    each = panels * steps[0] if columns.packed else rows.inner * columns.count
    numbers += [*steps, each]
    if rows.out is not None:
        numbers += [*rows.size, *rows.out, *rows.kernel, *rows.strides, *rows.dilations, *rows.pads, panels]
    if max(numbers) > INDEX_MAX:
        raise CapacityError(f"{label} has more elements than kernels count", got=max(numbers), want=INDEX_MAX)
    names = ["rows", "columns", *(n for n, has in (("bias", ending.bias), ("residual", ending.residual),
                                                    ("zeros", rows.outside)) if has), "output"]
    arguments: list[Argument] = [Buffer(roles[n]) for n in names]
    arguments += [np.int32(n) for n in numbers]
    across, down = tile.group
    size = (panels * columns.groups * across, blocks * down)
    size, group = (size, tile.group) if tile.group != (1, 1) else (size[::-1], (1, 1))
    width = 2 if number == "float16" else 4
    outputs = rows.batch * rows.count * columns.count * columns.groups
    inputs = rows.batch * rows.count * rows.pitch if rows.out is None else (
        math.prod(rows.size) * rows.pitch * (rows.count // max(1, math.prod(rows.out))))
    weights = rows.batch * rows.inner * rows.taps * columns.count * columns.groups
    traffic = width * (inputs + weights + outputs * (2 if ending.residual else 1))
    return Launch(kernel, (*size, rows.batch), (*group, 1), tuple(arguments), label, operations, float(traffic))


def _source(image: bool, outside: bool, ragged: bool, whole: bool, ending: Ending, tile: Tile, number: Number,
            grouped: bool) -> str:
    across, down = tile.group
    body = _shared(image, outside, tile) if tile.depth else (
        _alone if tile.passes == 1 else _passes)(image, outside, tile, number)
    ending_text = stores(ragged, whole, ending, tile, grouped)
    if tile.passes > 1:
        ending_text = _each_pass(tile, ending_text)
    order = (0, 1) if tile.group != (1, 1) else (1, 0)
    optional = "".join([
        "__global const float *restrict bias,\n    " if ending.bias else "",
        "__global const N *restrict residual,\n    " if ending.residual else "",
        "__global const N *restrict zeros,\n    " if outside else ""])
    sizes = (", int height, int width, int out_height, int out_width, int kernel_height, int kernel_width,\n"
             "    int stride_y, int stride_x, int dilation_y, int dilation_x, int top, int left, int panels"
             if image else "")
    where = """    int group = panel / panels;
    input += group * inner;
    int column = (panel - group * panels) * TILE + lx * W;
""" if grouped else "    int column = panel * TILE + lx * W;\n"
    on_halves = half_operations(tile.width) if tile.halves else ""
    return f"""{prelude(number, tile.width)}{on_halves}{activations.helpers(ending.activation, tile.width)}
#define ACROSS {across}
#define DOWN {down}
#define TILE {tile.columns}
#define BLOCK {tile.block}
{FETCH if tile.passes > 1 else ""}__kernel __attribute__((reqd_work_group_size({across}, {down}, 1)))
void block(__global const N *restrict input, __global const N *restrict weights,
    {optional}__global N *restrict output,
    int rows, int inner, int columns, int pitch, int out_pitch, int panel_step, int row_step, int each{sizes})
{{
    int panel = get_group_id({order[0]}), lx = get_local_id(0), ly = get_local_id(1);
    int first = (int)get_group_id({order[1]}) * BLOCK + ly * {tile.rows};
    size_t z = get_global_id(2);
    {"" if image else "input += z * rows * pitch;"}
    output += z * rows * out_pitch;
    {"residual += z * rows * out_pitch;" if ending.residual else ""}
    __global const N *restrict w = weights + z * each + (size_t)panel * panel_step;
{where}{accumulators(tile) if tile.passes == 1 else ""}
{body}
{ending_text}
}}
"""


def accumulators(tile: Tile) -> str:
    return "\n".join("    V " + ", ".join(f"c{m}_{n} = (V)(0.0f)" for n in range(tile.vectors)) + ";"
                     for m in range(tile.rows))


def _pixel(m: str, row: str) -> str:
    """Where pixel `row` of the output begins to read."""
    return (f"int q{m} = {row} / out_width, x{m} = ({row} - q{m} * out_width) * stride_x - left, b{m} = q{m} /"
            f" out_height;\n    int y{m} = (q{m} - b{m} * out_height) * stride_y - top; b{m} *= height;")


_ONCE = 16
"""Steps whose numbers of rows are made floats at once."""
_TAPS = """    for (int ky = 0; ky < kernel_height; ky++)
    for (int kx = 0; kx < kernel_width; kx++) {"""


def _alone(image: bool, outside: bool, tile: Tile, number: Number) -> str:
    """Each work item reads what it needs."""
    rows = range(tile.rows)
    lines = [f"    int p{m} = min(first + {m}, rows - 1);" for m in rows]
    if image:
        lines += [f"    {_pixel(str(m), f'p{m}')}" for m in rows] + [_TAPS]
        for m in rows:
            lines.append(f"        int v{m} = y{m} + ky * dilation_y, u{m} = x{m} + kx * dilation_x;")
            place = f"input + ((size_t)(b{m} + v{m}) * width + u{m}) * pitch"
            inside = f"(uint)v{m} < (uint)height && (uint)u{m} < (uint)width"
            lines.append(f"        __global const N *restrict a{m} = " + (
                f"({inside}) ? {place} : zeros;" if outside else f"{place};"))
    else:
        lines += [f"    __global const N *restrict a{m} = input + (size_t)p{m} * pitch;" for m in rows]

    return "\n".join([*lines, "    int k = 0;", *_steps(tile, number, "inner"), *(["    }"] if image else [])])


def added_as_halves(tile: Tile, count: int, column: Callable[[int, int], str], number: Callable[[int, int], str]
                    ) -> list[str]:
    """To each sum the products of `count` steps, by fours. column(k, n): vector n of step k. number(k, m): row m's."""
    lines = []
    for ks in by_fours(count):
        lines.append("        { " + " ".join(f"H w{k}_{n} = {column(k, n)};" for k in ks for n in range(tile.vectors)))
        for m in range(tile.rows):
            lines.append("          { " + " ".join(f"H s{k} = (H)({number(k, m)});" for k in ks) + " " + " ".join(
                f"c{m}_{n} += {short_sum([(f's{k}', f'w{k}_{n}') for k in ks])};" for n in range(tile.vectors)) + " }")
        lines.append("        }")
    return lines


def _steps(tile: Tile, number: Number, end: str, more: str = "") -> list[str]:
    """Of the inner loop from k to `end`; `more` is done for each `unroll` of them. A CPU gets float16 of rows as floats
    first, many steps at once: one after the other took three times as long as all the rest."""
    def place(n: int) -> str:
        return f"{f'{n * tile.group[0]} * W + ' if n else ''}lx * W"

    def step(k: str, row: str = "one(a{m}, {k})") -> list[str]:
        s = ["        { " + " ".join(f"V w{n} = many(w + {place(n)});" for n in range(tile.vectors))]
        s += ["          " + f"V s{m} = (V)({row.format(m=m, k=k)}); " + " ".join(
            f"c{m}_{n} = fma(s{m}, w{n}, c{m}_{n});" for n in range(tile.vectors)) for m in range(tile.rows)]
        return [*s, "          w += row_step; }"]

    def on_halves(count: int) -> list[str]:
        found = added_as_halves(tile, count, lambda k, n: f"HALF_MANY(w + (size_t){k} * row_step + {place(n)})",
                                lambda k, m: f"HALF_ONE(a{m}, k + {k})")
        return [*found, f"        w += (size_t){count} * row_step;"]

    lines = []
    if number == "float16" and not tile.halves and tile.group == (1, 1) and _ONCE % tile.unroll == 0:
        lines += [f"    for (; k <= {end} - {_ONCE}; k += {_ONCE}) {{", f"        float as[{tile.rows * _ONCE}];",
                  *(f"        vstore{_ONCE}(vload_half{_ONCE}(0, a{m} + k), 0, as + {m * _ONCE});"
                    for m in range(tile.rows)),
                  f"        for (int j = 0; j < {_ONCE}; j += {tile.unroll}) {{{more}",
                  *(x for u in range(tile.unroll) for x in step(f"j + {u}", f"as[{{m}} * {_ONCE} + {{k}}]")),
                  "        }", "    }"]
    if tile.steps > 1:
        lines += [f"    for (; k <= {end} - {tile.steps}; k += {tile.steps}) {{{more}"]
        lines += on_halves(tile.steps) if tile.halves else [x for u in range(tile.steps) for x in step(f"k + {u}")]
        lines.append("    }")
    return [*lines, f"    for (; k < {end}; k++) {{", *(on_halves(1) if tile.halves else step("k")), "    }"]


def _passes(image: bool, outside: bool, tile: Tile, number: Number) -> str:
    """A work item's tiles of rows in turn for each stretch of the inner loop; what follows is fetched meanwhile."""
    rows, vectors = range(tile.rows), range(tile.vectors)
    sums = " ".join(f"c{m}_{n} = sums[(t * {tile.rows} + {m}) * {tile.vectors} + {n}];" for m in rows for n in vectors)
    kept = " ".join(f"sums[(t * {tile.rows} + {m}) * {tile.vectors} + {n}] = c{m}_{n};" for m in rows for n in vectors)
    pixels = f"""    int at_y[BLOCK], at_x[BLOCK], at_b[BLOCK];
    for (int i = 0; i < BLOCK; i++) {{
        int p = min(first + i, rows - 1);
        {_pixel("i", "p")}
        at_y[i] = yi; at_x[i] = xi; at_b[i] = bi;
    }}
{_TAPS}
"""
    inside = "(uint)v < (uint)height && (uint)u < (uint)width" if outside else "1"
    place = (f"int v = at_y[i] + ky * dilation_y, u = at_x[i] + kx * dilation_x;\n        from[i] = ({inside}) ?"
             f" input + ((size_t)(at_b[i] + v) * width + u) * pitch : {'zeros' if outside else 'input'};"
             if image else "from[i] = input + (size_t)min(first + i, rows - 1) * pitch;")
    lines = -(-tile.columns * 4 * tile.steps // (_LINE * tile.passes))
    fetch = "".join(f" FETCH(next + {i * _LINE // 4});" for i in range(lines)) + f" next += {lines * _LINE // 4};"
    steps = "\n".join(_steps(tile, number, "end", fetch))
    return f"""    V sums[BLOCK * {tile.vectors}];
    for (int i = 0; i < BLOCK * {tile.vectors}; i++) sums[i] = (V)(0.0f);
    int passes = min({tile.passes}, (rows - first + {tile.rows - 1}) / {tile.rows});
    __global const N *from[BLOCK];
{pixels if image else ""}
    for (int i = 0; i < BLOCK; i++) {{
        {place}
    }}
    __global const N *stretch = w;
    for (int begin = 0; begin < inner; begin += {tile.stretch}) {{
        int end = min(begin + {tile.stretch}, inner);
        for (int t = 0; t < passes; t++) {{
            {" ".join(f"__global const N *a{m} = from[t * {tile.rows} + {m}];" for m in rows)}
            V {sums.replace("; ", ", ")}
            __global const N *next = stretch + (size_t)(end - begin) * row_step + t * {
                lines * _LINE // 4 * (tile.stretch // tile.steps)};
            w = stretch;
            int k = begin;
{steps}
            {kept}
        }}
        stretch = w;
    }}
{"    }" if image else ""}"""


def _each_pass(tile: Tile, stores: str) -> str:
    sums = ", ".join(f"c{m}_{n} = sums[(t * {tile.rows} + {m}) * {tile.vectors} + {n}]"
                     for m in range(tile.rows) for n in range(tile.vectors))
    return f"""    int start = first;
    for (int t = 0; t < passes; t++) {{
    int first = start + t * {tile.rows};
    V {sums};
{stores}
    }}"""


def _shared(image: bool, outside: bool, tile: Tile) -> str:
    """A group's work items copy `depth` steps to local memory, then each computes from there."""
    rows, vectors, depth = range(tile.rows), range(tile.vectors), tile.depth
    pixel = f"""    __local int at_y[BLOCK], at_x[BLOCK], at_b[BLOCK];
    for (int i = lid; i < BLOCK; i += ACROSS * DOWN) {{
        int p = min(first - ly * {tile.rows} + i, rows - 1);
        {_pixel("i", "p")}
        at_y[i] = yi; at_x[i] = xi; at_b[i] = bi;
    }}
    barrier(CLK_LOCAL_MEM_FENCE);
{_TAPS}"""
    if image:
        inside = "(uint)v < (uint)height && (uint)u < (uint)width" if outside else "1"
        row = (f"int v = at_y[r] + ky * dilation_y, u = at_x[r] + kx * dilation_x;\n"
               f"            __global const N *restrict a = ({inside}) ? input + ((size_t)(at_b[r] + v) * width + u)"
               f" * pitch : {'zeros' if outside else 'input'};")
    else:
        row = (f"__global const N *restrict a = input + (size_t)min(first - ly * {tile.rows} + r, rows - 1)"
               " * pitch;")
    if tile.halves:
        one, many, number, vector, zero = "HALF_ONE", "HALF_MANY", "H1", "H", "(H)(0)"
        compute = "\n".join(added_as_halves(
            tile, depth, lambda k, n: f"ws[({k} * {tile.vectors} + {n}) * ACROSS + lx]",
            lambda k, m: f"as[{k} * BLOCK + ly * {tile.rows} + {m}]"))
    else:
        one, many, number, vector, zero = "one", "many", "float", "V", "(V)(0.0f)"
        compute = "\n".join([
            f"        for (int k = 0; k < {depth}; k++) {{",
            "            " + " ".join(f"V w{n} = ws[(k * {tile.vectors} + {n}) * ACROSS + lx];" for n in vectors),
            *("            " + f"V s{m} = (V)(as[k * BLOCK + ly * {tile.rows} + {m}]); " + " ".join(
                f"c{m}_{n} = fma(s{m}, w{n}, c{m}_{n});" for n in vectors) for m in rows), "        }"])
    return f"""    __local {number} as[{depth} * BLOCK];
    __local {vector} ws[{depth} * {tile.vectors} * ACROSS];
    int lid = ly * ACROSS + lx;
{pixel if image else ""}
    for (int k0 = 0; k0 < inner; k0 += {depth}) {{
        for (int i = lid; i < {depth} * BLOCK; i += ACROSS * DOWN) {{
            int r = i / {depth}, k = i % {depth};
            {row}
            as[k * BLOCK + r] = k0 + k < inner ? {one}(a, k0 + k) : ({number})0;
        }}
        for (int i = lid; i < {depth} * {tile.vectors} * ACROSS; i += ACROSS * DOWN) {{
            int k = i / ({tile.vectors} * ACROSS), j = i % ({tile.vectors} * ACROSS);
            ws[i] = k0 + k < inner ? {many}(w + (size_t)(k0 + k) * row_step + j * W) : {zero};
        }}
        barrier(CLK_LOCAL_MEM_FENCE);
{compute}
        barrier(CLK_LOCAL_MEM_FENCE);
    }}
{"    w += (size_t)inner * row_step; }" if image else ""}"""


def stores(ragged: bool, whole: bool, ending: Ending, tile: Tile, grouped: bool) -> str:
    lines = []
    offset = "group * columns + column" if grouped else "column"
    for n in range(tile.vectors):
        if ending.bias:
            lines.append(f"    V bias{n} = floats(bias + (size_t)panel * TILE + lx * W + {n * tile.group[0]} * W);")
        if ragged:
            lines.append(f"    int left{n} = columns - column - {n * tile.group[0]} * W;")
    for m in range(tile.rows):
        lines.append(f"    {'' if whole else f'if (first + {m} < rows) '}{{")
        lines.append(f"        size_t at = (size_t)(first + {m}) * out_pitch + {offset};")
        for n in range(tile.vectors):
            place = f"at + {n * tile.group[0]} * W"
            r = f"c{m}_{n}"
            if ending.scale != 1.0:
                lines.append(f"        {r} *= (V)({literal(ending.scale)});")
            if ending.bias:
                lines.append(f"        {r} += bias{n};")
            guard = f"if (left{n} > 0) " if ragged else ""
            if ending.residual:
                load = f"some(residual + {place}, left{n})" if ragged else f"many(residual + {place})"
                lines.append(f"        {guard}{r} += {load};")
            if ending.activation != "none":
                lines.append(f"        {r} = {activations.activation(ending.activation, r, tile.width, ending.slope)};")
            store = f"put_some({r}, output + {place}, left{n})" if ragged else f"put({r}, output + {place})"
            lines.append(f"        {guard}{store};")
        lines.append("    }")
    return "\n".join(lines)
