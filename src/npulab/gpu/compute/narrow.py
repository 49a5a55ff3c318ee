"""Convolutions of few channels on a CPU, as networks begin with: a work item makes a row of the output.

It copies the rows of the image that it needs, zeros around them, to memory of its own that stays in the first cache.
All places there are constants, the inner loop goes through a row of taps and tests nothing.
"""

from __future__ import annotations

import math

from npulab.gpu.compute import activations, blocks, vectors
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.compute.tiles import Tile, is_narrow
from npulab.gpu.compute.types import Buffer, Kernel, Launch, Traits

COPIED = 64 << 10
"""Most bytes of a work item's copy: a stack has more, a cache would not hold it."""
_UNROLLED = 12
"""Most steps of the inner loop written out."""


def fits(what: Convolution, traits: Traits, tile: Tile) -> bool:
    """Whether `launch` is for it."""
    return is_narrow(what) and traits.cpu and tile.group == (1, 1) and 4 * what.kernel[0] * _pitch(what, tile) <= COPIED


def _pitch(what: Convolution, tile: Tile) -> int:
    """Numbers from a copied row to the next, with what the last tile reads beyond it."""
    computed = -(-what.out[1] // tile.rows) * tile.rows
    read = (computed - 1) * what.strides[1] + what.kernel[1]
    return max(what.width + what.pads[1] + what.pads[3], read) * what.channels


def launch(what: Convolution, tile: Tile, bias: bool, label: str) -> Launch:
    """Roles: "input", "weights" (`blocks.pack` of [1, taps * channels, filters]), "bias", "input1", "output"."""
    inner, (height, width) = what.kernel[1] * what.channels, what.out
    chunk = max(n for n in range(1, min(_UNROLLED, inner) + 1) if inner % n == 0)
    step = what.strides[1] * what.channels
    ending = blocks.Ending(1.0, bias, what.residual, what.activation, what.slope)
    optional = "".join(["__global const float *restrict bias,\n    " if bias else "",
                        "__global const N *restrict residual,\n    " if what.residual else ""])
    if tile.halves:
        one, number = "HALF_ONE", "H1"
        steps = blocks.added_as_halves(tile, chunk, lambda k, n: f"HALF_MANY(w + {k * tile.columns} + {n} * W)",
                                       lambda k, m: f"a[{m * step + k}]")
    else:
        one, number, steps = "one", "float", []
    for k in range(0 if tile.halves else chunk):
        steps.append("            { " + " ".join(f"V w{n} = many(w + {k * tile.columns} + {n} * W);"
                                                for n in range(tile.vectors)))
        steps += [f"              V s{m} = (V)(a[{m * step + k}]); " + " ".join(
            f"c{m}_{n} = fma(s{m}, w{n}, c{m}_{n});" for n in range(tile.vectors)) for m in range(tile.rows)]
        steps.append("            }")
    body = "\n".join(steps)
    panels, pitch = -(-what.filters // tile.columns), _pitch(what, tile)
    before, image = what.pads[1] * what.channels, what.width * what.channels
    on_halves = vectors.half_operations(tile.width) if tile.halves else ""
    source = f"""{vectors.prelude(what.number, tile.width)}{on_halves}{activations.helpers(what.activation, tile.width)}
#define TILE {tile.columns}
__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void narrow(__global const N *restrict input, __global const N *restrict weights,
    {optional}__global N *restrict output)
{{
    const int rows = {width}, columns = {what.filters}, out_pitch = columns, lx = 0;
    int row = get_global_id(0), image = row / {height};
    int y = (row - image * {height}) * {what.strides[0]} - {what.pads[0]};
    {number} copied[{what.kernel[0] * pitch}];
    for (int ky = 0; ky < {what.kernel[0]}; ky++) {{
        int v = y + ky * {what.dilations[0]};
        {number} *to = copied + ky * {pitch};
        if ((uint)v >= {what.height}u) {{
            for (int i = 0; i < {pitch}; i++) to[i] = 0.0f;
            continue;
        }}
        __global const N *from = input + ((size_t)image * {what.height} + v) * {image};
        for (int i = 0; i < {before}; i++) to[i] = 0.0f;
        for (int i = 0; i < {image}; i++) to[{before} + i] = {one}(from, i);
        for (int i = {before + image}; i < {pitch}; i++) to[i] = 0.0f;
    }}
    output += (size_t)row * rows * out_pitch;
    {"residual += (size_t)row * rows * out_pitch;" if what.residual else ""}
    for (int first = 0; first < rows; first += {tile.rows})
    for (int panel = 0; panel < {panels}; panel++) {{
    int column = panel * TILE;
    __global const N *restrict w = weights + panel * {what.kernel[0] * inner} * TILE;
{blocks.accumulators(tile)}
    for (int ky = 0; ky < {what.kernel[0]}; ky++) {{
        const {number} *a = copied + ky * {pitch} + first * {step};
        for (int k = 0; k < {inner}; k += {chunk}) {{
{body}
            a += {chunk};
            w += {chunk} * TILE;
        }}
    }}
{blocks.stores(what.filters % tile.columns != 0, width % tile.rows == 0, ending, tile, False)}
    }}
}}
"""
    outputs = what.batch * height * width * what.filters
    numbers = (what.batch * what.height * image + what.kernel[0] * inner * what.filters
               + outputs * (2 if what.residual else 1))
    roles = ("input", "weights", *(("bias",) if bias else ()), *(("input1",) if what.residual else ()), "output")
    return Launch(Kernel(source, "narrow"), (what.batch * height,), (1,), tuple(map(Buffer, roles)), label,
                  what.operations, float(math.prod((numbers, 2 if what.number == "float16" else 4))))
