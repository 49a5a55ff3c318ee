"""Winograd's convolutions as SPIR-V: F(2x2) exactly on whole numbers, else within the algorithm's bound."""

from dataclasses import replace

import numpy as np
import pytest

from npulab.errors import InvariantError, UnsupportedError
from npulab.gpu.compute import tiles
from npulab.gpu.compute.modules_winograd import convolution
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.compute.tiles import Tile, Winograd
from test_gpu_modules import THREADS, convolved, random, right, unpadded, valid, whole

IMAGES = {
    "even": Convolution(1, 8, 8, 8, 24, (3, 3), pads=(1, 1, 1, 1), activation="relu"),
    "uneven": Convolution(2, 7, 9, 8, 20, (3, 3), pads=(0, 1, 2, 1), residual=True, activation="hardswish"),
    "odd": Convolution(1, 5, 3, 5, 3, (3, 3), pads=(1, 1, 1, 1), residual=True),
    "no pads": Convolution(3, 11, 6, 3, 9, (3, 3), activation="leaky", slope=0.2),
    "one pixel": Convolution(1, 1, 1, 1, 1, (3, 3), pads=(1, 1, 1, 1)),
}


@pytest.mark.parametrize("image", IMAGES)
def test_f2x2_is_exact_on_whole_numbers(vulkan_bench, image):
    """Its factors are 1 and 1/2: no sum is rounded."""
    what = replace(IMAGES[image], activation="relu6")
    found, want, _ = convolved(vulkan_bench, what, make=whole, layer=convolution, size=2)
    np.testing.assert_array_equal(found, want)
    unpadded(found)


@pytest.mark.parametrize("number", ["float32", "float16"])
@pytest.mark.parametrize("size", tiles.SIZES)
@pytest.mark.parametrize("image", IMAGES)
def test_winograd_is_right(vulkan_bench, image, size, number):
    what = replace(IMAGES[image], number=number)
    choice = Winograd(Tile(), size)
    right(*convolved(vulkan_bench, what, bias=image != "odd", layer=convolution, choice=choice, size=size), number)


@pytest.mark.parametrize("threads", THREADS, ids=str)
def test_however_threads_share_the_products_they_are_right(vulkan_bench, threads):
    what = replace(IMAGES["uneven"], activation="relu6")
    found, want, _ = convolved(vulkan_bench, what, make=whole, layer=convolution, size=2, shape=threads)
    np.testing.assert_array_equal(found, want)
    plain, made = (convolution(what, random(20, 3, 3, 8), shape=s).modules for s in (None, threads))
    assert [a == b for a, b in zip(plain, made, strict=True)] == [True, False, True]


@pytest.mark.parametrize("size", tiles.SIZES)
def test_winograd_is_about_as_exact_as_promised(vulkan_bench, size):
    """As in OpenCL C: on random numbers the largest error, of the largest output."""
    what = Convolution(1, 16, 16, 64, 64, (3, 3), pads=(1, 1, 1, 1))
    found, want, _ = convolved(vulkan_bench, what, layer=convolution, size=size)
    assert np.abs(found - want).max() / np.abs(want).max() < {2: 1e-6, 4: 5e-6}[size]


@pytest.mark.parametrize("size", tiles.SIZES)
def test_the_middle_module_multiplies_less(size):
    """A point's product for each patch, of m x m outputs: (m + 2)^2 multiplications where m^2 9 would be."""
    what = Convolution(1, 16, 16, 64, 64, (3, 3), pads=(1, 1, 1, 1))
    layer = convolution(what, np.zeros((64, 3, 3, 64)), size=size)
    assert layer.modules[1].operations == what.operations * (size + 2) ** 2 / (9 * size**2)
    assert [m.buffers for m in layer.modules] == [("input", "patches"), ("patches", "weights", "products"),
                                                  ("products", "output")]
    points = (size + 2) ** 2 * (16 // size) ** 2 * 64
    assert layer.scratch == {"patches": 4 * points, "products": 4 * points}


def test_modules_of_winograd_are_valid_for_vulkan(tmp_path):
    valid(tmp_path, [convolution(replace(what, number=number), random(what.filters, 3, 3, what.channels),
                                 random(what.filters), size) for what in IMAGES.values() for size in tiles.SIZES
                     for number in ("float32", "float16")])


def test_what_winograd_is_not_for():
    what, weights = Convolution(1, 8, 8, 4, 4, (3, 3)), np.zeros((4, 3, 3, 4))
    for other in (replace(what, strides=(2, 2)), replace(what, groups=4), replace(what, dilations=(2, 1)),
                  replace(what, kernel=(3, 5))):
        with pytest.raises(UnsupportedError, match="3 x 3 taps and strides of 1"):
            convolution(other, weights)
    with pytest.raises(UnsupportedError, match="3 x 3 taps") as e:
        convolution(what, weights, size=6)
    assert "F(6x6)" in e.value.facts["got"]
    with pytest.raises(UnsupportedError, match="computes on floats"):
        convolution(replace(what, number="int8"), weights)
    with pytest.raises(InvariantError, match="the weights are of another shape"):
        convolution(what, weights[1:])
