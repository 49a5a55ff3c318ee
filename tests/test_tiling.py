"""Tiles and superblocks of known layers (NN notes, section 5: sample results of the open driver)."""

import pytest

from npulab.targets.vivante.chips import A311D
from npulab.targets.vivante.tiling import Tiling, tile


@pytest.mark.parametrize(("size", "out_c", "kernel", "expected"), [
    (112, 64, 1, Tiling(64, 12, 2)),
    (56, 128, 1, Tiling(56, 12, 4)),
    (14, 512, 1, Tiling(14, 14, 8)),
    (7, 1024, 1, Tiling(7, 7, 8)),
    (1, 1001, 1, Tiling(1, 1, 6)),
    (112, 32, 3, Tiling(64, 10, 1)),
    (28, 256, 3, Tiling(28, 22, 7)),
    (80, 256, 5, Tiling(64, 8, 4)),
])
def test_layers_of_known_networks_tile_as_the_driver_does(size, out_c, kernel, expected):
    assert tile(size, size, out_c, kernel, kernel, 1, A311D) == expected
