"""Plan best on the virtual NPU against LiteRT's reference kernels: every layer that the rules let through, within 1."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npulab
from layers import Layers, litert
from npulab.errors import CapacityError
from npulab.program.types import HostStep, NpuStep
from npulab.targets.vivante import family

pytest.importorskip("ai_edge_litert", reason="LiteRT is the oracle: pip install 'npulab[litert]'")


@pytest.fixture(autouse=True, scope="module")
def averages_stay_on_the_npu():
    """Small ones go to the host where that is faster, which is not what is tested here."""
    kept, family.SMALL = family.SMALL, 0
    yield
    family.SMALL = kept


def run(model, inputs, plan="best", all_on_npu=True):
    program = npulab.compile(npulab.load(model), plan=plan)
    if all_on_npu:
        assert not [s for s in program.steps if isinstance(s, HostStep)], program.host_nodes
    return npulab.open_session(program).run(inputs)


def differs_by(model, inputs, **options):
    want, got = litert(model, inputs), run(model, inputs, **options)
    assert want.keys() == got.keys()
    return max(int(np.abs(want[k].astype(int) - got[k].astype(int)).max()) for k in want)


@st.composite
def convolutions(draw):
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (5, 5)]) | st.tuples(st.integers(1, 11), st.integers(1, 11)))
    padding, stride, dilation = draw(st.sampled_from(["SAME", "VALID"])), draw(st.integers(1, 2)), (1, 1)
    if stride == 1 and draw(st.booleans()):
        dilation = tuple(draw(st.integers(1, min(3, max(1, 10 // max(k - 1, 1))))) for k in kernel)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(draw(st.integers(1 if padding == "SAME" else r, r + 14)) for r in reach)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    layer = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation,
             "activation": draw(st.sampled_from(["NONE", "RELU", "RELU6"]))}
    if draw(st.integers(0, 2)) == 2:
        layer["multiplier"] = draw(st.integers(1, 2))
    else:
        layer |= {"out_c": groups * draw(st.integers(1, 21)), "groups": groups,
                  "sparse": draw(st.sampled_from([0, 0.9]))}
    shape = (1, *size, groups * draw(st.integers(1, 9)))
    return draw(st.integers(0, 2**32)), draw(st.booleans()), shape, layer


@settings(max_examples=200, deadline=None)
@given(convolutions())
def test_a_convolution_of_any_shape_is_within_one_of_litert(case):
    seed, signed, shape, layer = case
    n = Layers(seed, signed)
    x = n.input(*shape)
    out = n.depthwise(x, **layer) if "multiplier" in layer else n.conv(x, **layer)

    assert differs_by(n.build(out), n.samples()) <= 1


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scale", [6.00001 / 255, 8 / 255, 3 / 255, 0.0235294122248888])
def test_relu6_clamps_exactly_for_any_output_range(signed, scale):
    n = Layers(7, signed)
    zero = -128 if signed else 0
    x = n.input(1, 9, 9, 8, scale=0.02)
    y = n.conv(x, 16, (3, 3), activation="RELU6", out_scale=float(np.float32(scale)), out_zero=zero)
    z = n.depthwise(y, (3, 3), activation="RELU6")
    model, inputs = n.build(y, z), n.samples()

    assert differs_by(model, inputs) <= 1
    top = run(model, inputs)["t4" if f"t{y}" == "t4" else f"t{y}"].astype(int).max()
    assert top <= zero + round(6 / scale)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.integers(1, 23), st.integers(1, 23), st.integers(1, 17),
       st.sampled_from(["NONE", "RELU", "RELU6"]), st.booleans())
def test_an_addition_of_any_size_and_scales_is_within_one_of_litert(seed, signed, h, w, c, activation, planar):
    n = Layers(seed, signed)
    a, b = n.input(1, h, w, c), n.input(1, h, w, c)
    if planar:
        a, b = n.conv(a, c, (1, 1)), n.conv(b, c, (3, 3))
    model, inputs = n.build(n.add(a, b, activation)), n.samples()

    # A step more where a convolution before it may differ: the sum's scale is the sum of the operands' scales.
    assert differs_by(model, inputs) <= (2 if planar else 1)


def test_an_addition_with_scales_far_apart_is_within_one_of_litert():
    for seed, ratio in enumerate((0.001, 0.01, 0.3, 1.0, 3.0, 77.0, 1000.0)):
        n = Layers(seed, False)
        a, b = n.input(1, 8, 8, 8, scale=0.02), n.input(1, 8, 8, 8, scale=float(np.float32(0.02 * ratio)))
        out = n.add(a, b, out_scale=float(np.float32(0.02 * max(ratio, 1) * 0.4)))
        assert differs_by(n.build(out), n.samples()) <= 1, ratio


@pytest.mark.parametrize("signed", [False, True])
def test_a_residual_chain_concat_split_and_pad_agree_with_litert(signed):
    n = Layers(3, signed)
    x = n.input(1, 13, 9, 6)
    a = n.conv(x, 8, (3, 3), stride=2)
    b = n.conv(a, 8, (1, 1))
    c = n.add(a, b)
    d = n.depthwise(c, (5, 5))
    e = n.add(c, d)
    f, g = n.split(e, 2)
    h = n.concat(f, g, f)
    i = n.pad(h, (2, 1), (0, 3))
    j = n.conv(i, 5, (3, 3), padding="VALID")
    model, inputs = n.build(j, e, h), n.samples()

    assert differs_by(model, inputs) <= 3  # seven layers one behind another; each alone is tested above


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.integers(1, 12), st.integers(1, 12), st.integers(1, 200))
def test_averages_over_the_image_are_within_one_of_litert(seed, signed, h, w, c):
    n = Layers(seed, signed)
    x = n.input(1, h, w, c)

    assert differs_by(n.build(n.average(x), n.mean(x)), n.samples()) <= 1


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.tuples(st.integers(1, 11), st.integers(1, 11)), st.integers(1, 2),
       st.tuples(st.integers(0, 9), st.integers(0, 9)), st.integers(1, 30), st.sampled_from(["NONE", "RELU", "RELU6"]))
def test_an_average_over_windows_is_within_one_of_litert(seed, signed, window, stride, more, c, activation):
    n = Layers(seed, signed)
    x = n.input(1, window[0] + more[0], window[1] + more[1], c)

    assert differs_by(n.build(n.pool(x, window, stride, activation)), n.samples()) <= 1


def test_an_unsigned_average_is_exactly_that_of_litert():
    for h, w in ((7, 7), (2, 2), (3, 5), (10, 10), (14, 14), (1, 4)):
        n = Layers(h * w, False)
        x = n.input(1, h, w, 1024)
        assert differs_by(n.build(n.average(x)), n.samples()) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.integers(1, 6), st.integers(1, 6), st.integers(1, 12),
       st.integers(1, 40), st.sampled_from(["NONE", "RELU", "RELU6"]))
def test_fully_connected_behind_a_reshape_is_within_one_of_litert(seed, signed, h, w, c, m, activation):
    n = Layers(seed, signed)
    x = n.input(1, h, w, c)
    y = n.reshape(x, 1, h * w * c)

    assert differs_by(n.build(n.dense(y, m, activation)), n.samples()) <= 1


def test_a_large_addition_is_cut_into_jobs_that_the_engine_takes():
    n = Layers(1, False)
    a, b = n.input(1, 112, 113, 121), n.input(1, 112, 113, 121)
    model, inputs = n.build(n.add(a, b)), n.samples()

    with pytest.raises(CapacityError) as e:
        npulab.compile(npulab.load(model), plan="reference")
    assert str(e.value) == (
        "'model' does not fit the engine: NNDescriptor.in_x_size = 27346 px does not fit\n"
        "  want    0..8191\n"
        "  bits    w1[6:18]\n"
        "  source  Mesa 25.0.7 etnaviv_ml_nn; vendor kernel driver (NN notes 6.1)\n"
        "  try     --plan best"
    )
    program = npulab.compile(npulab.load(model))
    (step,) = (s for s in program.steps if isinstance(s, NpuStep))
    assert [j.role for j in step.jobs] == ["addition"] * 3
    assert differs_by(model, inputs) <= 1


@pytest.mark.parametrize("signed", [False])
def test_both_plans_give_the_same_bytes_where_the_reference_is_right(signed):
    n = Layers(11, signed)
    x = n.input(1, 16, 16, 8, scale=0.02)
    a = n.conv(x, 16, (3, 3), stride=2, activation="RELU")
    b = n.depthwise(a, (3, 3), activation="RELU")
    c = n.conv(b, 16, (1, 1))
    d = n.add(a, c)
    model, inputs = n.build(n.conv(d, 24, (5, 5))), n.samples()

    ours, theirs = run(model, inputs), run(model, inputs, plan="reference")
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
