"""int8 convolutions of 3 x 3 taps with fewer multiplications, as SPIR-V, for Vulkan: what `integer_winograd` does in
OpenCL C, and the same bytes. Three modules, as of floats (`modules_winograd`); patches and products are int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.gpu.compute import integer_winograd, modules_products, modules_winograd
from npulab.gpu.compute.integer_winograd import POINTS, SIZE
from npulab.gpu.compute.integers import checked
from npulab.gpu.compute.modules import Layer
from npulab.gpu.compute.modules_integers import ending, rescale_of
from npulab.gpu.compute.modules_numbers import STORED, WHOLE, counted, fours, padded
from npulab.gpu.compute.modules_shapes import Shape
from npulab.gpu.compute.modules_tiles import shapes_of
from npulab.gpu.compute.problems import Convolution, Product


def convolution(what: Convolution, weights: NDArray[Any], bias: NDArray[Any] | None, zero_in: int,
                multipliers: Sequence[int], shifts: Sequence[int], zero_out: int, low: int = -128, high: int = 127,
                shape: Shape | None = None) -> Layer:
    """As `modules_integers.convolution`. Raises: InvariantError where `integer_winograd.suits` says no, too."""
    checked(what, weights, bias, zero_in, multipliers, shifts, zero_out, low, high)
    integer_winograd.checked(what, weights, int(zero_in))
    grid = -(-what.out[0] // SIZE), -(-what.out[1] // SIZE)
    patches = what.batch * grid[0] * grid[1]
    counted(what.batch * what.height * what.width * (what.channels + 3),
            what.batch * what.out[0] * what.out[1] * (what.filters + 3))
    middle = Product(POINTS, patches, what.channels, what.filters, batched=True)
    product = modules_products.module(middle, dict.fromkeys(("input", "weights", "output"), WHOLE),
                                      lambda s, buffers, sums, *_: sums, shape=shape)
    u = np.pad(integer_winograd.transformed(weights), ((0, 0), (0, -what.channels % 4), (0, 0)))
    constants = {"weights": padded(u, np.int32),
                 "rescale": rescale_of(np.zeros(what.filters) if bias is None else bias, multipliers, shifts)}
    scratch = {"patches": 16 * POINTS * patches * fours(what.channels),
               "products": 16 * POINTS * patches * fours(what.filters)}
    roles = {"products": WHOLE, "rescale": WHOLE, "output": STORED["int8"]}
    return Layer((modules_winograd.to_patches(what, SIZE, grid, int(zero_in)),
                  replace(product, buffers=("patches", "weights", "products")),
                  modules_winograd.from_products(what, SIZE, grid, roles, ending(zero_out, low, high, divided=2))),
                 shapes_of(what), "int8", constants, scratch)
