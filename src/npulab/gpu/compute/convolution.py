"""Convolutions: which algorithm, and those that are products whose rows lie in the image."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError
from npulab.gpu.compute import blocks, tiles, winograd
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.compute.tiles import Choice, Direct, Matrix, Winograd
from npulab.gpu.compute.types import Lowered, Traits


def lower(what: Convolution, traits: Traits, weights: NDArray[Any], bias: NDArray[Any] | None,
          choice: Choice | None = None) -> Lowered:
    """`weights`: OHWI, `bias`: [filters] or None. Without a choice the model's first.

    Raises: InvariantError for arrays of other shapes, or an algorithm that the convolution does not suit.
    """
    checked(what, weights, bias)
    if choice is None and what.groups == what.channels and what.groups > 1 and what.filters % what.channels == 0:
        from npulab.gpu.compute import depthwise

        return depthwise.lower(what, traits, weights, bias)
    choice = choice or tiles.candidates(what, traits)[0]
    if isinstance(choice, Winograd):
        return winograd.lower(what, traits, weights, bias, choice)
    if isinstance(choice, Matrix) and not tiles.is_pointwise(what):
        raise InvariantError("a product's rows are not this convolution's", got=what)
    tile, groups = choice.tile, what.groups
    taps, inner = math.prod(what.kernel), what.channels // groups
    count = what.batch * math.prod(what.out)
    if isinstance(choice, Direct):
        rows = blocks.Rows(count, inner, what.channels, 1, what.out, (what.height, what.width), what.kernel,
                           what.strides, what.dilations, what.pads[:2], any(what.pads))
    else:
        rows = blocks.Rows(count, inner, inner)
    constants: dict[str, NDArray[Any]] = {}
    matrix = weights.reshape(groups, what.filters // groups, taps * inner).transpose(0, 2, 1)
    constants["weights"] = blocks.pack(matrix, tile, what.number)
    if bias is not None:
        constants["bias"] = blocks.pack_bias(bias, groups, tile)
    if rows.outside:
        constants["zeros"] = np.zeros(what.channels, np.float16 if what.number == "float16" else np.float32)
    ending = blocks.Ending(1.0, bias is not None, what.residual, what.activation, what.slope)
    roles = {"rows": "input", "columns": "weights", "output": "output", "bias": "bias", "residual": "input1",
             "zeros": "zeros"}
    label = f"{'x'.join(map(str, what.kernel))} convolution {what.channels} to {what.filters}"
    launch = blocks.launch(rows, blocks.Columns(what.filters // groups, groups), ending, tile, what.number, roles,
                           label, what.operations)
    return Lowered((launch,), constants)


def checked(what: Convolution, weights: NDArray[Any], bias: NDArray[Any] | None) -> None:
    """Raises: InvariantError unless the arrays are of `what`'s shapes."""
    shape = (what.filters, *what.kernel, what.channels // what.groups)
    if weights.shape != shape:
        raise InvariantError("the weights are of another shape", want=shape, got=weights.shape)
    if bias is not None and bias.shape != (what.filters,):
        raise InvariantError("the bias is of another shape", want=(what.filters,), got=bias.shape)
