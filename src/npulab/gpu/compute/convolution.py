"""Convolutions: which algorithm, and those that are products whose rows lie in the image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError
from npulab.gpu.compute import blocks, depthwise, narrow, tiles, vectors, winograd
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.compute.tiles import Choice, Direct, Matrix, Winograd
from npulab.gpu.compute.types import Buffer, Kernel, Launch, Lowered, Traits


def lower(what: Convolution, traits: Traits, weights: NDArray[Any], bias: NDArray[Any] | None,
          choice: Choice | None = None, halves: bool = False) -> Lowered:
    """`weights`: OHWI, `bias`: [filters] or None. Without a choice the model's first; halves: the first whose tile has
    them.

    Raises: InvariantError for arrays of other shapes, or an algorithm that the convolution does not suit;
    UnsupportedError for halves unless float16, on a device that computes on them.
    """
    checked(what, weights, bias)
    if what.groups == what.channels > 1 and choice is None:
        return depthwise.lower(what, traits, weights, bias, halves=halves)
    choice = choice or tiles.first(what, traits, halves)
    if isinstance(choice, Winograd):
        return winograd.lower(what, traits, weights, bias, choice)
    if isinstance(choice, Matrix) and not tiles.is_pointwise(what):
        raise InvariantError("a product's rows are not this convolution's", got=what)
    if choice.tile.halves:
        vectors.checked_halves(what.number, traits)
    tile, groups = choice.tile, what.groups
    taps, inner = math.prod(what.kernel), what.channels // groups
    count = what.batch * math.prod(what.out)
    launches: list[Launch] = []
    scratch: dict[str, int] = {}
    constants: dict[str, NDArray[Any]] = {}
    matrix = weights.reshape(groups, what.filters // groups, taps * inner).transpose(0, 2, 1)
    constants["weights"] = blocks.pack(matrix, tile, what.number)
    if bias is not None:
        constants["bias"] = blocks.pack_bias(bias, groups, tile)
    label = f"{'x'.join(map(str, what.kernel))} convolution {what.channels} to {what.filters}"
    if isinstance(choice, Direct) and narrow.fits(what, traits, tile):
        return Lowered((narrow.launch(what, tile, bias is not None, label),), constants)
    image = "input"
    if isinstance(choice, Direct) and tiles.is_narrow(what):
        top, left, bottom, right = what.pads
        size = (what.height + top + bottom, what.width + left + right)
        if any(what.pads):
            image = "padded"
            launches.append(_padding(what, size, traits))
            scratch[image] = what.batch * math.prod(size) * what.channels * (2 if what.number == "float16" else 4)
        rows = blocks.Rows(count, what.kernel[1] * what.channels, what.channels, 1, what.out, size,
                           (what.kernel[0], 1), what.strides, what.dilations)
    elif isinstance(choice, Direct):
        rows = blocks.Rows(count, inner, what.channels, 1, what.out, (what.height, what.width), what.kernel,
                           what.strides, what.dilations, what.pads[:2], any(what.pads))
    else:
        rows = blocks.Rows(count, inner, inner)
    if rows.outside:
        constants["zeros"] = np.zeros(what.channels, np.float16 if what.number == "float16" else np.float32)
    ending = blocks.Ending(1.0, bias is not None, what.residual, what.activation, what.slope)
    roles = {"rows": image, "columns": "weights", "output": "output", "bias": "bias", "residual": "input1",
             "zeros": "zeros"}
    columns = blocks.Columns(what.filters // groups, groups)
    launches.append(blocks.launch(rows, columns, ending, tile, what.number, roles, label, what.operations))
    return Lowered(tuple(launches), constants, scratch)


def _padding(what: Convolution, size: tuple[int, int], traits: Traits) -> Launch:
    """The image with zeros around it. A work item makes a row on a CPU, else a number."""
    number = "ushort" if what.number == "float16" else "float"  # bits are moved
    each = size[1] * what.channels
    group = 1 if traits.cpu else min(64, traits.group_max)
    head = ("int row = get_global_id(0);\n    for (int i = 0; i < each; i++) {" if traits.cpu else
            "size_t id = get_global_id(0);\n    int row = id / each, i = id % each;\n    if (row < rows) {")
    source = f"""__kernel __attribute__((reqd_work_group_size({group}, 1, 1)))
void pad(__global const {number} *restrict image, __global {number} *restrict padded, int each, int rows,
         int padded_height, int height, int top, int first, int count)
{{
    {head}
        int y = row % padded_height - top, from = i - first;
        bool inside = (uint)y < (uint)height && (uint)from < (uint)count;
        size_t at = ((size_t)(row / padded_height) * height + y) * count + from;
        padded[(size_t)row * each + i] = inside ? image[at] : 0;
    }}
}}
"""
    rows = what.batch * size[0]
    numbers = (each, rows, size[0], what.height, what.pads[0], what.pads[1] * what.channels, what.width * what.channels)
    work = rows if traits.cpu else -(-rows * each // group) * group
    numbers_moved = rows * each + what.batch * what.height * what.width * what.channels
    moved = (2 if what.number == "float16" else 4) * numbers_moved
    return Launch(Kernel(source, "pad"), (work,), (group,), (
        Buffer("input"), Buffer("padded"), *map(np.int32, numbers)), "pad", 0.0, float(moved))


def checked(what: Convolution, weights: NDArray[Any], bias: NDArray[Any] | None) -> None:
    """Raises: InvariantError unless there is such a convolution, and the arrays are of its shapes."""
    if min(what.out) < 1 or what.channels % what.groups or what.filters % what.groups:
        raise InvariantError("there is no such convolution", got=f"an output of {what.out[0]} x {what.out[1]}, "
                             f"{what.channels} channels and {what.filters} filters in {what.groups} groups")
    shape = (what.filters, *what.kernel, what.channels // what.groups)
    if weights.shape != shape:
        raise InvariantError("the weights are of another shape", want=shape, got=weights.shape)
    if bias is not None and bias.shape != (what.filters,):
        raise InvariantError("the bias is of another shape", want=(what.filters,), got=bias.shape)
