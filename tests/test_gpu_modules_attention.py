"""Attention as SPIR-V, against NumPy in float64: as near as float32 and Vulkan's promises let it be, at sizes that no
tile divides."""

from dataclasses import replace

import numpy as np
import pytest

from npulab.errors import CapacityError, UnsupportedError
from npulab.gpu.compute.modules import run
from npulab.gpu.compute.modules_attention import LANES, LOCAL, attention
from npulab.gpu.compute.problems import Attention
from npulab.gpu.counting import spirv
from test_gpu_modules import HALF, ULP, unpadded, valid

U = ULP / 2
CASES = [
    Attention(1, 1, 1, 1, 1, 1.0),
    Attention(2, 33, 17, 5, 7, 0.4),
    Attention(2, 70, 50, 64, 64, 0.125),
    Attention(3, 31, 31, 8, 20, 0.35, True),
    Attention(1, 3, 40, 16, 4, 0.25, True),
    Attention(1, 40, 3, 6, 130, 0.4, True),
    Attention(1, 20, 37, 128, 128, 0.09),
]


def drawn(what, spread=1.0):
    r = np.random.default_rng(what.queries * what.depth)
    return [(spread * r.standard_normal((what.batch, n, d))).astype(what.number) for n, d in (
        (what.queries, what.depth), (what.keys, what.depth), (what.keys, what.width))]


def checked(vulkan_bench, what, q, k, v, **more):
    """Runs it, and holds it to its bound; the largest part of the bound that was used."""
    layer = attention(what, **more)
    found, _ = run(vulkan_bench, layer, {"input": q, "input1": k, "input2": v})
    unpadded(found)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    seen = np.arange(what.keys) <= np.arange(what.queries)[:, None] if what.causal else np.True_
    scores = q @ k.transpose(0, 2, 1) * what.scale
    below = np.where(seen, scores - np.where(seen, scores, -np.inf).max(-1, keepdims=True), -np.inf)
    share = np.exp(below)
    share /= share.sum(-1, keepdims=True)
    exact, size = share @ v, share @ np.abs(v)
    # A score: a chain of multiply-adds a lane, the lanes, the scale.
    magnitudes = np.abs(q) @ np.abs(k).transpose(0, 2, 1) * what.scale
    score = (-(-what.depth // 4) + 4) * U * magnitudes.max(-1, keepdims=True)
    apart = -np.where(seen, below, 0).min(-1, keepdims=True) + 2 * score
    tiles = -(-what.keys // 4)  # at most
    # exp: what its argument is off, and 3 + 2 |x| units. That of the largest so far: once a tile, but the |x| of all
    # tiles are together what scores are apart. Then a product a tile, and the additions.
    part = score + 2 * U * apart + (3 + 2 * apart) * ULP + (3 * tiles + 2 * apart) * ULP + (tiles + what.keys) * U
    allowed = 2.02 * part * size + 2.5 * ULP * np.abs(exact) + 1e-37
    assert (part < 0.01).all()
    if what.number == "float16":
        allowed = allowed + HALF * (np.abs(exact) + allowed) + 2.0**-24
    used = np.abs(found - exact) / allowed
    assert used.max() <= 1
    return used.max()


@pytest.mark.parametrize("number", ["float32", "float16"])
@pytest.mark.parametrize("what", CASES, ids=lambda w: f"{w.batch}x{w.queries}x{w.keys}x{w.depth}x{w.width}")
def test_attention_is_as_near_as_its_sums_and_exp(vulkan_bench, what, number):
    what = replace(what, number=number)
    checked(vulkan_bench, what, *drawn(what))


def test_smaller_tiles_where_local_memory_is_small(vulkan_bench):
    what = Attention(1, 37, 21, 20, 12, 0.2, True)
    sizes = set()
    for local_bytes in (LOCAL, 5000, 3100, 2450):
        sizes.add(attention(what, local_bytes).modules[0].local_bytes)
        checked(vulkan_bench, what, *drawn(what), local_bytes=local_bytes)
    assert len(sizes) == 4


def test_scores_that_grow_from_tile_to_tile_and_are_far_from_zero(vulkan_bench):
    what = Attention(1, 5, 64, 4, 8, 1.0)
    for first, last in ((-300, 300), (300, -300), (900, 990)):
        q, k, v = drawn(what)
        q[:], k[:] = (1, 0, 0, 0), 0
        k[0, :, 0] = np.linspace(first, last, 64)
        checked(vulkan_bench, what, q, k, v)


@pytest.mark.parametrize(("what", "seen"), [(Attention(1, 64, 64, 32, 64, 1.0), 64),
                                            (Attention(1, 64, 64, 32, 64, 1.0, True), 32)])
def test_the_shader_has_the_multiply_adds_that_attention_needs_and_no_more(what, seen):
    """The threads of the first row of the first group: two queries, of the tile of 32 that begins at 0."""
    module, = attention(what).modules
    found = spirv.whole(module.words, (LANES * module.groups[0], 16), (LANES, 16))
    assert found["fma float32"] == 2 * seen * (what.depth + what.width)
    scores = 64 * 65 // 2 if what.causal else 64 * 64
    assert module.operations == 2 * scores * (what.depth + what.width)
    assert found["barriers"] == LANES * 4 * seen / 16


def test_many_keys_and_no_buffer_of_scores(vulkan_bench):
    what = Attention(1, 64, 2048, 8, 8, 0.35)
    assert attention(what).modules[0].buffers == ("input", "input1", "input2", "output")
    checked(vulkan_bench, what, *drawn(what))


def test_modules_of_attention_are_valid_for_vulkan(tmp_path):
    valid(tmp_path, [attention(replace(what, number=n)) for what in CASES for n in ("float32", "float16")])


def test_what_the_shader_of_attention_has_not(vulkan_bench):
    with pytest.raises(UnsupportedError, match="computes on floats"):
        attention(Attention(1, 1, 1, 1, 1, 1.0, number="int8"))
    with pytest.raises(UnsupportedError, match="32 bits"):
        attention(Attention(1 << 16, 1 << 10, 1, 1 << 10, 1, 1.0))
    with pytest.raises(CapacityError, match="no tile of attention fits"):
        attention(Attention(1, 1, 1, 4096, 1, 1.0))
    what = Attention(1, 1, 1, 4096, 1, 1.0)
    with pytest.raises(CapacityError, match="no room for what a work group holds"):
        run(vulkan_bench, attention(what, 1 << 20), dict(zip(("input", "input1", "input2"), drawn(what), strict=True)))
