"""Exact sums of products in C: against whole numbers at the extremes, against the other ways, and what they refuse."""

import numpy as np
import pytest

from npulab.reference import accumulate

U8, S8 = np.dtype(np.uint8), np.dtype(np.int8)
sums = pytest.importorskip("npulab._sums")
TILES = range(sums.TILES)


def ends(rng, shape, dtype):
    """Codes, half of them the least and the greatest."""
    i = np.iinfo(dtype)
    return np.where(rng.random(shape) < 0.5, rng.choice([i.min, i.max], shape),
                    rng.integers(i.min, i.max + 1, shape)).astype(dtype)


def zero(rng, dtype):
    i = np.iinfo(dtype)
    return int(rng.choice([i.min, i.max, 0, i.min + 3]))


def wrapped(number):
    return (int(number) + 2**31) % 2**32 - 2**31


def plain_windows(x, w, zero_x, zero_w, stride, dilation, pads, groups):
    """In Python's whole numbers."""
    n, _, h, wide = x.shape
    o, per, kh, kw = w.shape
    size = [(a + p + q - (k - 1) * d - 1) // s + 1 for a, p, q, k, d, s in zip(
        (h, wide), pads[:2], pads[2:], (kh, kw), dilation, stride, strict=True)]
    found = np.zeros((n, o, *size), np.int64)
    for i, k, y, z in np.ndindex(*found.shape):
        for j, ky, kx in np.ndindex(per, kh, kw):
            row, column = y * stride[0] + ky * dilation[0] - pads[0], z * stride[1] + kx * dilation[1] - pads[1]
            if 0 <= row < h and 0 <= column < wide:
                code = int(x[i, k // (o // groups) * per + j, row, column])
                found[i, k, y, z] += (code - zero_x) * (int(w[k, j, ky, kx]) - zero_w)
    return np.vectorize(wrapped)(found)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("seed", range(12))
def test_windows_are_sums_of_whole_numbers(monkeypatch, tile, seed):
    rng = np.random.default_rng(seed)
    tx, tw = ((U8, U8), (S8, S8), (U8, S8), (S8, U8))[seed % 4]
    groups, per, each = (1, 5, 7) if seed % 3 == 0 else (3, 1, 2) if seed % 3 == 1 else (2, 3, 1)
    (kh, kw), stride, dilation = (tuple(map(int, rng.integers(1, n, 2))) for n in (4, 4, 3))
    pads = tuple(map(int, rng.integers(0, 3, 4)))
    h, wide = (int(rng.integers((k - 1) * d + 1, 9)) for k, d in zip((kh, kw), dilation, strict=True))
    x, w = ends(rng, (2, groups * per, h, wide), tx), ends(rng, (groups * each, per, kh, kw), tw)
    zero_x, zero_w = zero(rng, tx), zero(rng, tw)
    monkeypatch.setattr(accumulate, "BEST", tile)
    got = accumulate.windows(w, zero_w, zero_x, tx, stride, dilation, pads, groups)(x)
    last = accumulate.windows(np.ascontiguousarray(w.transpose(0, 2, 3, 1)), zero_w, zero_x, tx, stride, dilation, pads,
                              groups, last=True)(x)

    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, plain_windows(x, w, zero_x, zero_w, stride, dilation, pads, groups))
    np.testing.assert_array_equal(got, last)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("k", [1, 511, 512, 513, 1025])
@pytest.mark.parametrize("m", [1, 11, 12, 261])
def test_products_are_sums_of_whole_numbers(monkeypatch, tile, k, m):
    rng = np.random.default_rng(m + k)
    monkeypatch.setattr(accumulate, "BEST", tile)
    for n, (tx, tw) in ((1, (U8, S8)), (6, (S8, S8)), (258, (U8, U8)), (33, (S8, U8))):
        x, w, zero_x, zero_w = ends(rng, (m, k), tx), ends(rng, (n, k), tw), zero(rng, tx), zero(rng, tw)
        want = (x.astype(np.int64) - zero_x) @ (w.astype(np.int64) - zero_w).T
        turned = np.ascontiguousarray(w.T).T

        np.testing.assert_array_equal(accumulate.matrix(w, zero_w, zero_x, tx)(x), want)
        np.testing.assert_array_equal(accumulate.matrix(turned, zero_w, zero_x, tx)(x), want)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("code", [0, 255])
def test_sums_beyond_32_bits_wrap(monkeypatch, tile, m, code):
    """All at once: every product is 255 * 255, or minus that."""
    k = 70_001
    monkeypatch.setattr(accumulate, "BEST", tile)
    x, w = np.full((m, k), code, np.uint8), np.full((3, k), 255, np.uint8)
    found = accumulate.matrix(w, 0, 255 - code, U8)(x)
    picture = accumulate.windows(w.reshape(3, k, 1, 1), 0, 255 - code, U8, (1, 1), (1, 1), (0, 0, 0, 0), 1)(
        x.T.reshape(1, k, 1, m))

    assert (found == wrapped((2 * code - 255) * 255 * k)).all()
    assert (picture == found.T.reshape(1, 3, 1, m)).all()


@pytest.mark.parametrize("way", ["runtime", "numpy"])
def test_the_other_ways_give_the_same_sums(monkeypatch, way):
    if way == "runtime":
        pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(3)
    cases = []
    for tx, tw, groups, per, each, size, window, stride in (
            (U8, U8, 1, 70, 9, (17, 19), 3, (2, 1)), (S8, S8, 24, 1, 1, (30, 31), 5, (2, 2)),
            (S8, U8, 1, 300, 8, (16, 17), 1, (1, 1)), (U8, S8, 4, 6, 5, (12, 8), 2, (1, 3)),
            (S8, S8, 3, 1, 1, (40, 40), 17, (1, 1)), (U8, U8, 5, 1, 3, (9, 9), 1, (1, 1))):
        x, w = ends(rng, (2, groups * per, *size), tx), ends(rng, (groups * each, per, window, window), tw)
        cases.append((x, (w, zero(rng, tw), zero(rng, tx), tx, stride, (1, 1), (1, 2, 0, 1), groups)))
    products = [(ends(rng, (m, 300), S8), (ends(rng, (40, 300), S8), zero(rng, S8), zero(rng, S8), S8))
                for m in (1, 99)]
    found = [accumulate.windows(*a)(x) for x, a in cases] + [accumulate.matrix(*a)(x) for x, a in products]
    monkeypatch.setattr(accumulate, "kernels", None)
    if way == "numpy":
        monkeypatch.setattr(accumulate, "runtime", lambda: None)

    others = [accumulate.windows(*a)(x) for x, a in cases] + [accumulate.matrix(*a)(x) for x, a in products]
    for one, other in zip(found, others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_plane_with_more_room_than_there_should_be_is_unfolded_too():
    """Steps so long that a depthwise kernel's plane, written out as a whole, would take a terabyte."""
    x = np.arange(8, dtype=np.uint8).reshape(1, 2, 2, 2)
    one, two = (np.full((2, 1, n, 1), 3, np.uint8) for n in (1, 2))
    got = accumulate.windows(one, 0, 0, U8, (1 << 20, 1 << 20), (1, 1), (0, 0, 0, 0), 2)(x)
    far = accumulate.windows(two, 0, 1, U8, (1, 1), (1 << 20, 1), (1 << 19, 0, 1 << 19, 0), 2)(x)

    assert got.reshape(-1).tolist() == [0, 12]
    assert far.shape == (1, 2, 2, 2)
    assert not far.any()


X, W, OUT = np.zeros((1, 4, 5, 6), np.uint8), np.zeros((8, 2, 3, 3), np.int8), np.zeros((1, 8, 3, 4), np.int32)
GOOD = [X, W, OUT, X.shape, W.shape, (3, 4), (1, 1), (1, 1), (0, 0), (False, 0), (True, 0), False, 0]


@pytest.mark.parametrize(("place", "value"), [
    (0, X[:, :3].copy()), (0, np.zeros((1, 4, 5, 7), np.uint8)), (1, W[:7].copy()), (2, OUT[:, :, :2].copy()),
    (2, OUT.astype(np.int64)), (3, (0, 4, 5, 6)), (3, (1, 4, -5, -6)), (3, (2**32, 4, 5, 2**32)), (3, (1, 4, 5, 2**62)),
    (4, (8, 3, 3, 2)), (4, (9, 2, 2, 4)), (4, (8, 2, 3, 0)), (5, (3, 0)), (5, (4, 4)), (5, (2**33, 2**33)),
    (6, (0, 1)), (6, (1, -1)), (6, (1, 2**31)), (7, (0, 1)), (7, (2**40, 1)), (8, (-1, 0)), (8, (0, 2**31)),
    (9, (False, 256)), (9, (False, -1)), (9, (True, 128)), (9, (True, -129)), (10, (True, 200)), (12, -1), (12, 99),
])
def test_what_does_not_fit_is_refused(place, value):
    sums.windows(*GOOD)
    with pytest.raises(ValueError, match="do not fit together"):
        sums.windows(*GOOD[:place], value, *GOOD[place + 1 :])


@pytest.mark.parametrize("change", [
    {"x": np.zeros(11, np.uint8)}, {"w": np.zeros(21, np.int8)}, {"out": np.zeros(13, np.int32)},
    {"sizes": (3, 4, 0)}, {"sizes": (-3, -4, 5)}, {"sizes": (2**31, 2**31, 2**31)}, {"one": (False, 256)},
    {"two": (True, -129)}, {"tile": -1}])
def test_products_that_do_not_fit_are_refused(change):
    parts = {"x": np.zeros(15, np.uint8), "w": np.zeros(20, np.int8), "out": np.zeros(12, np.int32), "sizes": (3, 4, 5),
             "one": (False, 255), "two": (True, -128), "tile": 0}
    sums.product(*parts.values())
    with pytest.raises(ValueError, match="do not fit together"):
        sums.product(*(parts | change).values())
    with pytest.raises((TypeError, BufferError)):
        sums.product(*(parts | {"out": bytes(48)}).values())


def test_windows_larger_than_the_picture_and_other_channels_are_said():
    run = accumulate.windows(W, 0, 0, U8, (1, 1), (1, 1), (0, 0, 0, 0), 2)
    for shape in ((1, 4, 2, 6), (1, 6, 5, 6)):
        with pytest.raises(ValueError, match="do not fit"):
            run(np.zeros(shape, np.uint8))
    assert run(np.zeros((0, 4, 5, 6), np.uint8)).shape == (0, 8, 3, 4)
    assert accumulate.matrix(np.zeros((3, 5), np.uint8), 0, 0, U8)(np.zeros((0, 5), np.uint8)).shape == (0, 3)
