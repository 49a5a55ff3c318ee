"""Products of matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError
from npulab.gpu.compute import blocks, tiles, vectors
from npulab.gpu.compute.problems import Product
from npulab.gpu.compute.tiles import Choice, Matrix, Tile
from npulab.gpu.compute.types import Buffer, Kernel, Launch, Lowered, Traits


def lower(what: Product, traits: Traits, b: NDArray[Any] | None, bias: NDArray[Any] | None,
          choice: Choice | None = None, halves: bool = False) -> Lowered:
    """`b`: what.inner x what.columns (or the other way round, if transposed), with a batch in front if batched; None:
    it is "input1". The residual is the last input. halves: without a choice, the model's first whose tile has them.

    Raises: InvariantError for arrays of other shapes, or a choice of another algorithm; UnsupportedError for halves
    unless float16, on a device that computes on them.
    """
    choice = choice or tiles.first(what, traits, halves)
    if not isinstance(choice, Matrix):
        raise InvariantError("a product is no convolution", got=choice)
    if choice.tile.halves:
        vectors.checked_halves(what.number, traits)
    tile, batch = choice.tile, what.batch if what.batched else 1
    rows = blocks.Rows(what.rows if what.batched else what.rows * what.batch, what.inner, what.inner, batch)
    packed = choice.packed or what.transposed or what.columns % tile.columns != 0
    columns = blocks.Columns(what.columns, packed=packed)
    ending = blocks.Ending(what.scale, bias is not None, what.residual, what.activation, what.slope)
    launches: list[Launch] = []
    constants: dict[str, NDArray[Any]] = {}
    scratch: dict[str, int] = {}
    role = "input1"
    if b is not None:
        shape = (what.columns, what.inner) if what.transposed else (what.inner, what.columns)
        if b.shape != ((what.batch, *shape) if what.batched else shape):
            raise InvariantError("B is of another shape", want=shape, got=b.shape)
        matrix = b.reshape(batch, *shape)
        matrix = matrix.transpose(0, 2, 1) if what.transposed else matrix
        role, columns = "columns", blocks.Columns(what.columns)
        constants[role] = blocks.pack(matrix, tile, what.number)
    elif packed:
        role = "packed"
        panels = -(-what.columns // tile.columns)
        scratch[role] = batch * panels * what.inner * tile.columns * (2 if what.number == "float16" else 4)
        launches.append(_packing(what, tile, panels, batch, traits.cpu))
    if bias is not None:
        if bias.shape != (what.columns,):
            raise InvariantError("the bias is of another shape", want=(what.columns,), got=bias.shape)
        constants["bias"] = blocks.pack_bias(bias, 1, tile)
    roles = {"rows": "input", "columns": role, "output": "output", "bias": "bias",
             "residual": "input1" if b is not None else "input2"}
    launches.append(blocks.launch(rows, columns, ending, tile, what.number, roles,
                                  f"product {what.rows}x{what.inner}x{what.columns}", what.operations))
    return Lowered(tuple(launches), constants, scratch)


def _packing(what: Product, tile: Tile, panels: int, batch: int, cpu: bool) -> Launch:
    """B as panels. On a CPU a work item makes a step of a panel, on a GPU one number."""
    place = "column * inner + k" if what.transposed else "k * columns + column"
    body = f"""    int column = panel * TILE + i;
    size_t at_packed = ((z * panels + panel) * inner + k) * TILE + i;
    packed[at_packed] = column < columns ? matrix[z * inner * columns + {place}] : 0;"""
    number = "ushort" if what.number == "float16" else "float"  # bits are moved
    group = (1, 1, 1) if cpu else (math.gcd(64, tile.columns), 1, 1)
    head = ("int panel = get_global_id(0);\n    for (int i = 0; i < TILE; i++) {" if cpu else
            "int at = get_global_id(0), panel = at / TILE, i = at % TILE;\n    {")
    source = f"""#define TILE {tile.columns}
__kernel __attribute__((reqd_work_group_size({group[0]}, 1, 1)))
void pack(__global const {number} *restrict matrix, __global {number} *restrict packed,
          int inner, int columns, int panels)
{{
    size_t z = get_global_id(2);
    int k = get_global_id(1);
    {head}
{body}
    }}
}}
"""
    each = 2 if what.number == "float16" else 4
    across = panels if cpu else panels * tile.columns
    moved = each * batch * what.inner * (what.columns + panels * tile.columns)
    return Launch(Kernel(source, "pack"), (across, what.inner, batch), group,
                  (Buffer("input1"), Buffer("packed"), np.int32(what.inner), np.int32(what.columns),
                   np.int32(panels)), "pack columns", 0.0, float(moved))


