"""Winograd's algorithm on bytes: nothing is rounded, so that its bytes are those of direct sums, which npulab's
reference rounds and LiteRT has, too."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npulab.errors import InvariantError
from npulab.gpu.compute import integer_winograd, integers
from npulab.gpu.compute.problems import Convolution
from npulab.gpu.compute.winograd import matrices
from test_gpu_attention import CPU, INTEGERS, TRAITS, computed, integers_of, litert_of, turns


def layer(height, width, channels, filters, pads=(1, 1, 1, 1), batch=1):
    return Convolution(batch, height, width, channels, filters, (3, 3), pads=pads, number="int8")


LAYERS = {
    "one number": layer(1, 1, 1, 1),
    "no pads": layer(6, 8, 16, 16, (0, 0, 0, 0)),
    "odd": layer(7, 9, 5, 20),
    "batch, uneven pads": layer(5, 4, 37, 33, (0, 2, 1, 0), 3),
    "wide pads": layer(2, 3, 8, 4, (3, 4, 5, 2)),
    "one row": layer(3, 30, 19, 70, (0, 1, 0, 1), 2),
    "300 channels": layer(4, 6, 300, 65),
}
ONE = {"zero_out": 0, "multipliers": 1 << 30, "shifts": 1}
"""What makes a sum a byte as it is."""


def drawn(what, seed=0, zero_in=None, **other):
    """(x, the arguments of integers.convolution); multipliers, shifts: of each filter, or one of all."""
    r = np.random.default_rng(seed)
    x = r.integers(-128, 128, (what.batch, what.height, what.width, what.channels)).astype(np.int8)
    given = {"weights": r.integers(-128, 128, (what.filters, 3, 3, what.channels)).astype(np.int8),
             "bias": r.integers(-9999, 9999, what.filters),
             "zero_in": int(r.integers(-128, 128)) if zero_in is None else zero_in,
             "multipliers": r.integers(2**30, 2**31, what.filters), "shifts": r.integers(-9, -4, what.filters),
             "zero_out": int(r.integers(-40, 40)), "low": -128, "high": 127} | other
    for name in ("multipliers", "shifts"):
        given[name] = np.broadcast_to(given[name], what.filters)
    return x, given


def found_of(device, traits, what, x, given, algorithm="winograd"):
    lowered = integers.convolution(what, traits, **given, algorithm=algorithm)
    assert algorithm != "winograd" or "patches" in lowered.scratch
    return computed(device, lowered, [x], (what.batch, *what.out, what.filters), "int8")


def check(device, traits, what, x, given):
    found = found_of(device, traits, what, x, given)
    w = given["weights"]
    np.testing.assert_array_equal(found, integers_of(what, x, w, *(given[n] for n in list(given)[1:])))
    return found


@turns("name", LAYERS)
def test_bytes_are_the_reference(device, traits, name):
    found = check(device, traits, LAYERS[name], *drawn(LAYERS[name]))
    assert len(np.unique(found)) > 20 or found.size < 100


@pytest.mark.parametrize("name", ["small cpu", "mali"])
def test_other_vectors(device, name):
    check(device, TRAITS[name], LAYERS["odd"], *drawn(LAYERS["odd"]))


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_every_bit_of_sums(device, kind):
    """Sums that are bytes themselves."""
    what = layer(7, 9, 3, 20)
    x, given = drawn(what, zero_in=3, bias=np.arange(20) - 10, **ONE)
    given["weights"] = np.random.default_rng(1).integers(-1, 2, (20, 3, 3, 3)).astype(np.int8)
    found = check(device, TRAITS[kind], what, (x // 32 + 3).astype(np.int8), given)
    assert np.abs(found).max() < 127
    assert (found % 4 > 0).any()


@turns("byte, zero_in", [(-128, 127), (127, -128), (-128, -128), (0, 0)])
def test_extremes(device, traits, byte, zero_in):
    what = layer(5, 5, 33, 18)
    x, given = drawn(what, zero_in=zero_in, bias=None, shifts=-12)
    given["weights"] = np.full_like(given["weights"], -128)
    given["weights"][::2] = 127
    check(device, traits, what, np.full_like(x, byte), given)


def test_biases_wrap_as_in_direct_sums(device):
    what = layer(4, 4, 9, 62)
    r = np.random.default_rng(3)
    check(device, CPU, what, *drawn(what, bias=r.integers(-2**31, 2**31, 62), shifts=np.arange(-31, 31)))


def test_bytes_are_clamped(device):
    found = check(device, CPU, LAYERS["odd"], *drawn(LAYERS["odd"], low=-10, high=30))
    assert (found.min(), found.max()) == (-10, 30)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_layer(device, data):
    pads = data.draw(st.tuples(*[st.integers(0, 3)] * 4))
    height, width = (data.draw(st.integers(max(1, 3 - pads[i] - pads[i + 2]), 11)) for i in (0, 1))
    what = layer(height, width, data.draw(st.integers(1, 300)), data.draw(st.integers(1, 90)), pads,
                 data.draw(st.integers(1, 3)))
    x, given = drawn(what, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([None, -128, 127])))
    check(device, TRAITS[data.draw(st.sampled_from(sorted(TRAITS)))], what, x, given)


@turns("channels", [6, 40])
def test_bytes_are_litert(device, traits, channels):
    pytest.importorskip("ai_edge_litert")
    what, (w, bias, zero_in, multipliers, shifts, zero_out), x, want = litert_of(
        replace(INTEGERS["3x3"], channels=channels))
    lowered = integers.convolution(what, traits, w, bias, zero_in, multipliers, shifts, zero_out, algorithm="winograd")
    assert len(np.unique(want)) > 20
    np.testing.assert_array_equal(computed(device, lowered, [x], want.shape, "int8"), want)


# why nothing is rounded, and where it ends


def test_numbers_are_whole_and_fit_16_bits():
    a, g, b = matrices(2)
    g = [[2 * x for x in row] for row in g]
    for matrix in (a, g, b):
        assert all(x.denominator == 1 for row in matrix for x in row)
    widest = [max(sum(map(abs, row)) for row in matrix) for matrix in (b, g)]
    assert [n**2 * size for n, size in zip(widest, (255, 128), strict=True)] == [1020, 1152]
    assert all(x in (-1, 0, 1) for matrix in (a, b) for row in matrix for x in row)  # what `_sum` has


def at_the_limit(channels):
    """Of the pixel in the middle the largest sum there is, of those beside it less."""
    what = layer(3, 3, channels, 2)
    x, given = drawn(what, zero_in=127, bias=np.zeros(2, int), shifts=-22)
    given["weights"] = np.full_like(given["weights"], -128)
    return what, np.full_like(x, -128), given


def test_sums_are_whole_up_to_the_limit(device):
    what, x, given = at_the_limit(1827)
    assert integer_winograd.most(what, given["weights"], 127) == 9 * 1827 * 255 * 128 < 2**29
    found = check(device, CPU, what, x, given)
    assert found[0, 1, 1, 0] > 20


def test_beyond_the_limit_sums_are_direct(device, monkeypatch):
    what, x, given = at_the_limit(1828)
    want = integers_of(what, x, given["weights"], *(given[n] for n in list(given)[1:]))
    with pytest.raises(InvariantError) as e:
        integers.convolution(what, CPU, **given, algorithm="winograd")
    assert e.value.message == ("Winograd's algorithm is here for 3 x 3 taps, strides and dilations of 1, one group, "
                               "and sums below 2**29")
    assert e.value.facts == {"got": "3 x 3 taps, strides (1, 1), dilations (1, 1), 1 groups, sums up to 536993280",
                             "try": "direct sums: the bytes are the same"}
    np.testing.assert_array_equal(found_of(device, CPU, what, x, given, None), want)
    monkeypatch.setattr(integer_winograd, "suits", lambda *_: True)
    assert (found_of(device, CPU, what, x, given) != want).any()  # the limit is one


def test_the_largest_sum_is_of_the_weights_at_hand():
    what = layer(3, 3, 2, 3)
    w = np.random.default_rng(0).integers(-128, 128, (3, 3, 3, 2)).astype(np.int8)
    for zero_in in (-128, -5, 127):
        sums = [[np.where(w[f] * sign > 0, 127 - zero_in, -128 - zero_in) * w[f].astype(int) for f in range(3)]
                for sign in (1, -1)]
        assert integer_winograd.most(what, w, zero_in) == max(abs(s.sum()) for row in sums for s in row)


@pytest.mark.parametrize(("changed", "algorithm"), [
    ({}, "winograd"), ({"strides": (2, 1)}, "direct"), ({"dilations": (1, 2)}, "direct"), ({"channels": 3}, "direct"),
    ({"groups": 2}, "direct"), ({"kernel": (3, 1)}, "direct")])
def test_which_algorithm(changed, algorithm):
    what = replace(layer(28, 28, 128, 128), **changed)
    given = drawn(layer(1, 1, 1, 128))[1] | {
        "weights": np.ones((128, *what.kernel, what.channels // what.groups), np.int8)}
    lowered = integers.convolution(what, CPU, **given)
    assert ("patches" in lowered.scratch) == (algorithm == "winograd")
    if changed and changed != {"channels": 3}:
        with pytest.raises(InvariantError, match="Winograd's algorithm is here for 3 x 3 taps"):
            integers.convolution(what, CPU, **given, algorithm="winograd")


# that these tests see what is wrong


def flipped(which, at):
    """A^T, G and B^T with one sign that is wrong."""
    wrong = [[list(row) for row in matrix] for matrix in matrices(2)]
    wrong[which][at[0]][at[1]] *= Fraction(-1)
    return wrong


@pytest.mark.parametrize(("which", "at"), [(0, (1, 2)), (1, (2, 1)), (2, (3, 1))])
def test_a_wrong_entry_is_seen(device, monkeypatch, which, at):
    wrong = flipped(which, at)
    assert wrong[which][at[0]][at[1]]
    monkeypatch.setattr(integer_winograd, "matrices", lambda m: wrong)
    with pytest.raises(AssertionError, match="not equal"):
        check(device, CPU, LAYERS["odd"], *drawn(LAYERS["odd"]))


@pytest.mark.parametrize("algorithm", ["winograd", "direct"])
def test_pairs_without_instructions_of_their_own(device, algorithm):
    """Where the compiler has none."""
    what = LAYERS["odd"]
    x, given = drawn(what)
    lowered = integers.convolution(what, CPU, **given, algorithm=algorithm)
    launches = tuple(replace(one, kernel=replace(one.kernel, source="#define PLAIN\n" + one.kernel.source))
                     for one in lowered.launches)
    found = computed(device, replace(lowered, launches=launches), [x], (1, 7, 9, 20), "int8")
    np.testing.assert_array_equal(found, integers_of(what, x, given["weights"], *(given[n] for n in list(given)[1:])))
