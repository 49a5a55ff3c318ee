"""The kernel that integer products and convolutions share on OpenCL devices: rows by columns of int32 sums of int16
products, two neighbours at a time.

    sums[z, row, column] = S input[z, row, k] weights[z, k, column]

Pairs of int16 are what processors multiply and add in one instruction (x86: PMADDWD, or VPDPWSSD, which LLVM takes of
itself where a processor has it). Where the compiler offers none, two multiplications of int32 are the same. Rows are
pixels of an image that has its pads already; a matrix is an image of one row. Columns come in panels, pairs of rows
side by side: [z][panel][tap][pair][column][2]. Numbers behind the last of a pixel may be anything: their weights are 0.

On a CPU a work item is a group of its own, with vectors as wide as the device's. All sums wrap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import CapacityError
from npulab.gpu.compute import vectors
from npulab.gpu.compute.moves import INDEX_MAX
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Traits


@dataclass(frozen=True, slots=True)
class Tile:
    """rows x vectors of `width` sums in registers; each: tiles of rows that a work item does one after the other."""

    rows: int
    vectors: int
    width: int
    each: int
    group: tuple[int, int]

    @property
    def columns(self) -> int:
        return self.vectors * self.width


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the pairs of the output's rows lie; all of it counts pairs or pixels.

    out     images, height and width of the output.    size   height and width of an image, with pads.
    inner   of a tap.      pitch   from a pixel to the next.     step   from a z to the next.
    """

    out: tuple[int, int, int]
    size: tuple[int, int]
    inner: int
    pitch: int
    step: int
    taps: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)

    @property
    def count(self) -> int:
        return math.prod(self.out)


@dataclass(frozen=True, slots=True)
class Columns:
    """count: of one z.    z: products, each of own columns.    pitch, step: of the output, from a row to the next, from
    a z to the next."""

    count: int
    z: int
    pitch: int
    step: int


@dataclass(frozen=True, slots=True)
class Bytes:
    """How sums become bytes: `rescaled`, then clamp(zero + ..., low, high). left: some shifts are above 0."""

    zero: int
    low: int
    high: int
    left: bool


@dataclass(frozen=True, slots=True)
class Size:
    """Of a launch: rows, pairs of a sum, columns, products; and whether sums become bytes."""

    rows: int
    pairs: int
    columns: int
    z: int
    ending: bool


def tile_of(traits: Traits, size: Size) -> Tile:
    """The model's first."""
    return candidates(traits, size)[0]


def candidates(traits: Traits, size: Size) -> list[Tile]:
    """By the model, the likely best first; on a GPU 4 rows of vectors of 4 come before all others."""
    if not traits.cpu:
        width = min(4, vectors.fitting(traits, size.columns) if traits.vector > 1 else 4)
        usual = vectors.group_items(traits)
        groups = [usual, *(n for n in _GROUPS if n <= traits.group_max and n % min(traits.warp, n) == 0)]
        first, *others = dict.fromkeys(
            Tile(r, v, width, 1, (across, down)) for n in groups for r, v in ((4, 1), (2, 1), (8, 1), (4, 2), (8, 2))
            if r * v * width <= max(4 * width, traits.registers)
            for across, down in [vectors.split(n, -(-size.columns // (v * width)), -(-size.rows // r))])
        return [first, *sorted(others, key=lambda t: cycles(traits, t, size))]
    widths = [w for w in (traits.vector, traits.vector // 2) if w == traits.vector or w >= 4]
    registers = max(8, traits.registers // traits.vector)
    shapes = [Tile(r, v, w, 1, (1, 1)) for w in widths for v in (1, 2, 3, 4) for r in range(1, 15)
              if (r + 1) * v + 2 <= registers]
    return [_filled(traits, t, size) for t in sorted(shapes, key=lambda t: cycles(traits, t, size))]


def _filled(traits: Traits, tile: Tile, size: Size) -> Tile:
    """With tiles enough for a work item."""
    items = -(-size.rows // tile.rows) * -(-size.columns // tile.columns) * size.z
    each = min(math.ceil(_LEAST / (size.pairs * tile.rows * tile.vectors)), items // (_TURNS * traits.compute_units))
    return replace(tile, each=max(1, each))


def cycles(traits: Traits, tile: Tile, size: Size) -> float:
    """Of the core that has most to do, and until the weights are there."""
    items = -(-size.rows // tile.rows) * -(-size.columns // tile.columns) * size.z
    sums = tile.rows * tile.vectors if traits.cpu else tile.rows * tile.columns / _LANES
    loads = (tile.rows + tile.vectors) if traits.cpu else 0
    each = size.pairs * (_PAIR * sums + _LOAD * loads) + _START + (_ENDING if size.ending else _STORE) * sums
    return -(-items // traits.compute_units) * each + 4.0 * size.z * size.pairs * size.columns / _STREAMED


LAUNCH, MOVED = 60_000.0, 14.0
"""Cycles of one more launch; bytes a cycle of a core that are written and read again: measured on two cores of an AMD
Zen 5 with PoCL 3.1, as are the next."""
_PAIR, _LOAD, _START, _ENDING, _STORE = 0.6, 0.2, 60.0, 20.0, 3.0
"""Cycles of a vector's pairs, of a load, of a tile's beginning, of a vector that becomes bytes, or does not."""
_STREAMED = 24.0
"""Bytes a cycle that weights come at, all cores together: fitted there to which algorithm was quicker in 25 layers."""
_LEAST, _TURNS = 4000.0, 8
"""Cycles of a work item, and work items of a core, at least."""
_LANES = 16
"""Of a GPU's core: as good as such a vector, assumed."""
_GROUPS = (32, 64, 128, 256)
"""Work items of a GPU's group that are tried."""


def pack(matrix: NDArray[Any], tile: Tile) -> NDArray[np.int16]:
    """[z, taps, inner, columns] -> [z, panels, taps, pairs, tile.columns, 2], zeros behind the last."""
    z, taps, inner, columns = matrix.shape
    panels, pairs = -(-columns // tile.columns), -(-inner // 2)
    padded = np.zeros((z, taps, 2 * pairs, panels * tile.columns), np.int16)
    padded[:, :, :inner, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(z, taps, pairs, 2, panels, tile.columns).transpose(0, 4, 1, 2, 5, 3))


def pack_rescale(table: NDArray[np.int64], z: int, width: int) -> NDArray[np.int32]:
    """[3, z * columns] biases, multipliers, shifts -> [z, panels, 3, width], zeros behind the last. int32 wraps, as in
    sums."""
    columns = table.shape[1] // z
    padded = np.zeros((3, z, vectors.up(columns, width)), np.int64)
    padded[:, :, :columns] = table.reshape(3, z, columns)
    return np.ascontiguousarray(padded.reshape(3, z, -1, width).transpose(1, 2, 0, 3).astype(np.int32))


def launch(rows: Rows, columns: Columns, tile: Tile, ending: Bytes | None, roles: Mapping[str, str], label: str,
           operations: float) -> Launch:
    """roles: of "rows", "weights", "output". With an ending the output is bytes, by the role "rescale", without it
    int32, of whose rows `columns.pitch` numbers are written to the end of the last panel."""
    panels = -(-columns.count // tile.columns)
    numbers = [rows.count, rows.inner, columns.count, panels, rows.pitch, columns.pitch, rows.step, columns.step,
               rows.out[1], rows.out[2], math.prod(rows.size), rows.size[1], *rows.strides,
               rows.dilations[0] * rows.size[1] * rows.pitch, rows.dilations[1] * rows.pitch]
    weights = panels * tile.columns * rows.inner * math.prod(rows.taps)
    if max(*numbers, math.prod(rows.size) * rows.out[0] * rows.pitch, rows.step * columns.z,
           rows.count * columns.pitch * columns.z, weights) > INDEX_MAX:
        raise CapacityError(f"{label} has more elements than kernels count", want=INDEX_MAX)
    kernel = Kernel(_source(tile, rows.taps, ending, ending is not None and columns.count % tile.columns != 0), "block")
    names = ("rows", "weights", *(("rescale",) if ending else ()), "output")
    arguments: list[Argument] = [Buffer(roles[n]) for n in names]
    arguments += [np.int32(n) for n in numbers]
    across, down = tile.group
    size = (vectors.up(panels, across), vectors.up(-(-rows.count // (tile.rows * tile.each)), down))
    size = size if tile.group != (1, 1) else size[::-1]  # on a CPU rows follow in time, the panel stays in its caches
    traffic = 4 * (rows.step + weights) * columns.z + (1 if ending else 4) * rows.count * columns.count * columns.z
    return Launch(kernel, (*size, columns.z), (*tile.group, 1), tuple(arguments), label, operations, float(traffic))


def _source(tile: Tile, taps: tuple[int, int], ending: Bytes | None, ragged: bool) -> str:
    across = int(tile.group == (1, 1))
    ms, ns, w = range(tile.rows), range(tile.vectors), tile.width
    wide = w * tile.vectors

    def step(k: str) -> str:
        loads = " ".join(f"I w{n} = {load(w, f'w + ({k}) * {wide} + {n * w}')};" for n in ns)
        return f"            {{ {loads}\n" + "\n".join(
            f"            {{ int a = a{m}[{k}]; " + " ".join(f"DOT(c{m}_{n}, a, w{n});" for n in ns) + " }"
            for m in ms) + " }"

    many = [(a, t) for a, t in zip("yx", taps, strict=True) if t > 1]
    loops = "".join(f"        for (int k{a} = 0; k{a} < {t}; k{a}++)\n" for a, t in many)
    tap = " + ".join(f"k{a} * tap_{a}" for a, _ in many) or "0"
    pixels = "\n".join(
        f"        int p{m} = min(first + {m}, rows - 1), q{m} = p{m} / out_width, b{m} = q{m} / out_height;\n"
        f"        __global const int *restrict r{m} = input + ((size_t)b{m} * plane + (q{m} - b{m} * out_height) * "
        f"stride_y * width + (p{m} - q{m} * out_width) * stride_x) * pitch;" for m in ms)
    number = "char" if ending else "int"
    ends = "\n".join(f"        if (first + {m} < rows) {{\n"
                     f"            __global {number} *to = output + (size_t)(first + {m}) * out_pitch + column;\n"
                     + "\n".join(f"            {_store(ending, ragged, f'c{m}_{n}', n, w)}" for n in ns)
                     + "\n        }" for m in ms)
    rescale = "\n".join(f"    I {name}{n} = {load(w, f'rescale + {(i * tile.vectors + n) * w}')};"
                        for i, name in enumerate(("start", "by", "shift")) for n in ns) if ending else ""
    moved = f"    rescale += ((size_t)z * panels + panel) * {3 * wide};\n{rescale}" if ending else ""
    sums = "\n".join(f"        I {', '.join(f'c{m}_{n} = ' + (f'start{n}' if ending else '(I)(0)') for n in ns)};"
                     for m in ms)
    return f"""{dots(w)}{requantized(w, ending) if ending else ""}
__kernel {vectors.attribute((*tile.group, 1))} void block(__global const int *restrict input,
        __global const int *restrict weights, {"__global const int *restrict rescale, " if ending else ""}
        __global {number} *restrict output, int rows, int inner, int columns, int panels, int pitch,
        int out_pitch, int step, int out_step, int out_height, int out_width, int plane, int width, int stride_y,
        int stride_x, int tap_y, int tap_x) {{
    int panel = get_global_id({across}), z = get_global_id(2);
    if (panel >= panels) return;
    input += (size_t)z * step;
    output += (size_t)z * out_step;
    weights += ((size_t)z * panels + panel) * inner * {math.prod(taps) * wide};
{moved}
    int column = panel * {wide}, left = columns - column;
    for (int t = 0; t < {tile.each}; t++) {{
        int first = ((int)get_global_id({1 - across}) * {tile.each} + t) * {tile.rows};
        if (first >= rows) return;
{pixels}
{sums}
        __global const int *restrict w = weights;
{loops}        {{
            int tap = {tap};
            {" ".join(f"__global const int *restrict a{m} = r{m} + tap;" for m in ms)}
            int k = 0;
            for (; k + 2 <= inner; k += 2) {{
{step("k")}
{step("k + 1")}
            }}
            for (; k < inner; k++)
{step("k")}
            w += (size_t)inner * {wide};
        }}
{ends}
    }}
}}
"""


def _store(ending: Bytes | None, ragged: bool, value: str, n: int, w: int) -> str:
    if ending is None:
        return store(w, value, f"to + {n * w}") + ";"
    found = f"requantized({value}, by{n}, shift{n})"
    if not ragged:
        return f"put({found}, to + {n * w});"
    return f"if (left > {n * w}) put_some({found}, to + {n * w}, left - {n * w});"


def load(w: int, at: str) -> str:
    return f"*({at})" if w == 1 else f"vload{w}(0, {at})"


def store(w: int, value: str, at: str) -> str:
    return f"*({at}) = {value}" if w == 1 else f"vstore{w}({value}, 0, {at})"


def stores(name: str, of: str, w: int) -> str:
    """name(v, p): `w` chars or shorts to p, in one piece: PoCL's vstore16 of them is sixteen stores."""
    if w == 1:
        return f"inline void {name}({of} v, __global {of} *p) {{ *p = v; }}\n"
    return f"""#ifdef __clang__
typedef {of}{w} {name}_t __attribute__((aligned({1 if of == "char" else 2})));
inline void {name}({of}{w} v, __global {of} *p) {{ *(__global {name}_t *)p = v; }}
#else
inline void {name}({of}{w} v, __global {of} *p) {{ vstore{w}(v, 0, p); }}
#endif
"""


_MADD = {16: ("512", "__AVX512BW__"), 8: ("256", "__AVX2__"), 4: ("128", "__SSE2__")}
"""Bits, and the macro of what has PMADDWD of so many (Intel SDM 2B)."""


def dots(w: int) -> str:
    """I: `w` ints. DOT(c, a, b): of each lane c += the product of a's and b's low halves + that of the high halves;
    where PLAIN is defined, as if the compiler had no builtin."""
    n = "" if w == 1 else str(w)
    plain = """#define LOW(x) ((x) << 16 >> 16)
#define DOT(c, a, b) c += (I)(LOW(a)) * LOW(b) + (I)((a) >> 16) * ((b) >> 16)
"""
    text = f"typedef int{n} I;\n"
    if w not in _MADD:
        return text + plain
    bits, macro = _MADD[w]
    return text + f"""#if defined({macro}) && defined(__has_builtin) && !defined(PLAIN)
#if __has_builtin(__builtin_ia32_pmaddwd{bits})
#define PAIRS
#endif
#endif
#ifdef PAIRS
typedef short S __attribute__((ext_vector_type({2 * w})));
#define DOT(c, a, b) c += __builtin_astype(__builtin_ia32_pmaddwd{bits}( \\
    __builtin_astype((I)(a), S), __builtin_astype(b, S)), I)
#else
{plain}#endif
"""


def requantized(w: int, ending: Bytes) -> str:
    """C requantized(sum, multiplier, shift), of `w` lanes: MultiplyByQuantizedMultiplier, the zero point, the limits;
    put(C, to): all of them; put_some(C, to, left): the first `left`."""
    n = "" if w == 1 else str(w)
    spread = "*t = v" if w == 1 else f"vstore{n}(v, 0, t)"
    shifted = "sum << max(shift, (I)(0))" if ending.left else "sum"
    return f"""
typedef long{n} L;
typedef char{n} C;
C requantized(I sum, I m, I shift) {{
    // wraps when it is shifted left; the high product of two 32-bit numbers, doubled, ties up
    I x = convert_int{n}((convert_long{n}({shifted}) * convert_long{n}(m) + (L)(1L << 30)) >> (L)(31));
    I right = max(-shift, (I)(0));
    I mask = convert_int{n}(((L)(1) << convert_long{n}(right)) - (L)(1));
    I half_up = (mask >> (I)(1)) + (x < (I)(0) ? (I)(1) : (I)(0));
    x = (x >> min(right, (I)(31))) + ((x & mask) > half_up ? (I)(1) : (I)(0));
    return convert_char{n}(clamp(x + (I)({ending.zero}), (I)({ending.low}), (I)({ending.high})));
}}
{stores("put", "char", w)}__attribute__((noinline)) void put_some(C v, __global char *p, int left) {{
    if (left >= {w}) {{ put(v, p); return; }}
    char t[{w}];
    {spread};
    for (int i = 0; i < left; i++) p[i] = t[i];
}}
"""
