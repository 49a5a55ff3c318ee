"""Passes on convolutions: random ones before and after in ONNX Runtime, and what is left of them."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab.errors import ModelError
from npulab.passes.certificate import compared
from npulab.passes.convolutions import PASSES
from npulab.passes.pipeline import patched
from npulab.passes.rewrite import Rewrite
from npulab.passes.windows import convolution
from npulab.targets.facts.board import find_board

pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
import test_patch
from test_patch import Net, ops

SEEDS = st.integers(0, 2**32)
SIDES = st.tuples(st.integers(6, 13), st.integers(6, 13))


def check(before, passes=(), expect=None):
    """The graph behind the passes and what these, not those of other files, changed; equal in ONNX Runtime."""
    after, changes = test_patch.check(before, passes)
    changes = [c for c in changes if c.name in {p.name for p in PASSES}]
    assert expect is None or sorted({c.name for c in changes}) == sorted(expect)
    return after, changes


def conv(n, x, out, kernel, *, channels=4, groups=1, bias=True, **attributes):
    w = n.constant(n.rng.normal(size=(out, channels // groups, *kernel)) / (3 * max(kernel)))
    b = [n.constant(n.rng.normal(size=out))] if bias else []
    return n.op("Conv", x, w, *b, group=groups, **attributes)


def convs(graph):
    """Every convolution of a graph, with its attributes written out."""
    r = Rewrite(graph)
    return [c for node in graph.nodes if (c := convolution(r, node)) is not None]


# normalization of the input


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.lists(st.sampled_from(["Sub", "Rsub", "Add", "Mul", "Div"]), min_size=1, max_size=4),
       st.integers(0, 2), st.sampled_from([1, 3]), st.booleans())
def test_normalization_goes_into_the_first_convolutions(seed, steps, pad, groups, two):
    n = Net(seed, channels=3)
    x = "x"
    for step in steps:
        c = n.constant(n.rng.uniform(0.5, 2, [(), (1,), (3, 1, 1), (1, 3, 1, 1)][int(n.rng.integers(4))]))
        x = n.op("Sub", c, x) if step == "Rsub" else n.op(step, x, c)
    outputs = [conv(n, x, 6, (3, 3), channels=3, groups=groups, pads=[pad] * 4) for _ in range(1 + two)]
    after, changes = check(n.graph(*outputs))

    shifts = any(s in ("Sub", "Rsub", "Add") for s in steps)
    if not (pad and shifts):
        assert set(ops(after)) == {"Conv"}
    elif len(steps) > 1:
        assert [o for o in ops(after) if o != "Conv"] == ["Add"]
        assert "the scale only: one Add stays" in changes[0].text
    else:
        assert not changes


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from([9, 11, 17]), st.booleans(), st.integers(1, 2))
def test_padding_is_with_what_normalizes_to_zero(seed, opset, two, readers):
    n = Net(seed, channels=3)
    x = n.op("Sub", "x", n.constant(n.rng.uniform(0.3, 0.6)))
    x = n.op("Div", x, n.constant(n.rng.uniform(0.2, 0.5, (3, 1, 1)))) if two else x
    before = n.graph(*(conv(n, x, 6, (3, 3), channels=3, pads=[1, 0, 2, 1]) for _ in range(readers)), opset=opset)
    after, changes = check(before, ["normalization-to-pad"])
    if two:  # what is left of the two is found in the round after
        assert "the scale only: one Add stays" in changes[0].text
    assert sorted(ops(after)) == [*["Conv"] * readers, "Pad"]


def test_normalization_that_others_read_stays():
    n = Net(0, channels=3)
    x = n.op("Mul", "x", n.constant(2.0))
    assert not check(n.graph(n.conv(x, 4, channels=3), n.op("Relu", x)))[1]
    assert not check(n.graph(n.conv(x, 4, channels=3), x))[1]


def test_a_constant_for_each_pixel_is_no_normalization():
    n = Net(0, channels=3, size=(4, 4))
    assert not check(n.graph(n.conv(n.op("Add", "x", n.constant(n.rng.normal(size=(4, 4)))), 4, channels=3)))[1]


# kernels


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.tuples(st.integers(1, 11), st.integers(1, 11)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
       st.tuples(*[st.integers(0, 6)] * 4), st.sampled_from([1, 2, 4]), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_large_and_dilated_kernels_are_sums_of_small_ones(seed, kernel, strides, pads, groups, dilations):
    n = Net(seed, size=(12, 14))
    kernel = tuple(min(k, (12 + pads[i] + pads[i + 2] - 1) // dilations[i] + 1) for i, k in enumerate(kernel))
    pads = [min(p, k * d - 1) for p, k, d in zip(pads, kernel * 2, dilations * 2, strict=True)]
    kernel = tuple(min(k, (12 + pads[i] + pads[i + 2] - 1) // dilations[i] + 1) for i, k in enumerate(kernel))
    before = n.graph(conv(n, "x", 4, kernel, groups=groups, strides=strides, pads=pads, dilations=dilations))
    large = max((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)) > 3
    after, _ = check(before, ["split-kernel"], expect=["split-kernel"] if large else [])

    assert not large or all(max(c.reach) <= 3 and c.strides == strides for c in convs(after))


def test_a_part_may_be_as_large_as_is_asked_for():
    n = Net(0, size=(20, 20))
    after, (change,) = check(n.graph(n.conv("x", 4, 11)), ["split-kernel=6"])
    assert change.text == "n1: 11x11 is 4 of at most 6x6"
    assert {c.kernel for c in convs(after)} == {(6, 6), (6, 5), (5, 6), (5, 5)}


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([5, 7, 9]), st.integers(1, 3), st.sampled_from([1, 4]), SIDES)
def test_kernels_of_3x3_and_moves_are_enough(seed, kernel, stride, groups, size):
    n = Net(seed, size=(size[0] + 4, size[1] + 4))
    before = n.graph(n.conv("x", 4, kernel, groups=groups, strides=[stride] * 2))
    after, _ = check(before, ["small-kernels"], expect=["small-kernels"])

    assert set(ops(after)) - {"MaxPool"} == {"Conv", "Add"}
    assert all(c.kernel == (3, 3) and c.strides == (1, 1) and max(c.pads) <= 2 for c in convs(after))


def test_a_kernel_that_would_need_a_crop_is_not_moved():
    n = Net(0)
    assert not check(n.graph(n.conv("x", 4, 5, pads=[0] * 4)), ["small-kernels"])[1]


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(1, 4), st.integers(1, 4)),
       st.tuples(*[st.integers(0, 4)] * 4), st.sampled_from([1, 2, 4]), st.sampled_from([(1, 1), (2, 1)]))
def test_dilated_kernels_are_dense_ones(seed, kernel, dilations, pads, groups, strides):
    n = Net(seed, size=(12, 10))
    before = n.graph(conv(n, "x", 4, kernel, groups=groups, pads=list(pads), dilations=dilations, strides=strides))
    after, _ = check(before, ["dilation-to-dense"])
    (c,) = convs(after)
    (was,) = convs(before)

    assert (c.dilations == (1, 1)) == (max(was.reach) <= 7)
    assert c.kernel == (was.reach if c.dilations == (1, 1) else was.kernel)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(2, 4),
       st.tuples(*[st.integers(0, 6)] * 4), st.sampled_from([1, 2, 4]), SIDES)
def test_dilated_convolutions_work_on_phases(seed, kernel, d, pads, groups, size):
    n = Net(seed, size=(size[0] + 7, size[1] + 7))
    before = n.graph(conv(n, "x", 4, kernel, groups=groups, pads=list(pads), dilations=[d, d]))
    after, _ = check(before, ["dilation-to-phases"], expect=["dilation-to-phases"])

    assert all(c.dilations == (1, 1) for c in convs(after))


def test_phases_of_an_image_that_divides_need_no_more_nodes():
    n = Net(0, size=(12, 12))
    after, _ = check(n.graph(n.conv("x", 4, 3, dilations=[4, 4], pads=[4] * 4)), ["dilation-to-phases"])
    assert ops(after) == ["SpaceToDepth", "Conv", "DepthToSpace"]


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.tuples(st.integers(1, 8), st.integers(1, 8)), st.tuples(*[st.integers(0, 3)] * 4),
       st.tuples(st.integers(1, 2), st.integers(1, 2)), st.sampled_from([1, 4]), SIDES)
def test_kernels_become_square_and_odd(seed, kernel, pads, strides, groups, size):
    n = Net(seed, size=(size[0] + 2, size[1] + 2))
    before = n.graph(conv(n, "x", 4, kernel, groups=groups, pads=list(pads), strides=strides))
    after, _ = check(before, ["square-kernel"])
    (c,) = convs(after)

    assert c.kernel[0] == c.kernel[1]
    assert c.kernel[0] % 2
    if kernel[0] % 2 == kernel[1] % 2 == 1 and pads[:2] == pads[2:] and max(kernel) < 7:
        assert c.pads[:2] == c.pads[2:]


def test_uneven_padding_goes_into_the_kernel():
    n = Net(0, size=(12, 12))
    (c,) = convs(check(n.graph(n.conv("x", 4, 3, pads=[0, 0, 2, 2])), ["square-kernel"])[0])
    assert (c.kernel, c.pads) == ((5, 5), (2, 2, 2, 2))
    (c,) = convs(check(n.graph(n.conv("x", 4, 2, strides=[2, 2], pads=[0] * 4)), ["square-kernel"])[0])
    assert (c.kernel, c.pads) == ((3, 3), (1, 1, 1, 1))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(2, 7), st.integers(1, 3), SIDES, st.integers(0, 3))
def test_padding_becomes_that_of_tensorflow(seed, kernel, stride, size, top):
    n = Net(seed, size=(size[0] + 2, size[1] + 2))
    pads = [min(top, kernel - 1)] * 2 + [kernel // 2] * 2
    before = n.graph(n.conv("x", 4, kernel, pads=pads, strides=[stride] * 2))
    after, changes = check(before, ["same-padding"])
    (c,) = convs(after)
    if changes:
        totals = [max((c.out[i] - 1) * stride + c.kernel[i] - c.size[i], 0) for i in (0, 1)]
        assert c.pads == (totals[0] // 2, totals[1] // 2, -(-totals[0] // 2), -(-totals[1] // 2))


def test_a_stride_of_2_padded_evenly_is_that_of_tensorflow_with_5x5():
    n = Net(0, size=(12, 12))
    _, (change,) = check(n.graph(n.conv("x", 4, 3, strides=[2, 2])), ["same-padding"])
    assert change.text == "n1: 3x3 padded by 1,1,1,1 is 5x5 padded by 1,1,2,2; 2.78 times the multiplications"


# strides and groups


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([1, 2, 3]), st.sampled_from([(2, 2), (2, 1), (3, 2)]), st.sampled_from([1, 4]),
       st.sampled_from(["stride-to-pool", "stride-to-slice"]), st.integers(0, 1))
def test_strides_are_taken_by_others(seed, kernel, strides, groups, name, pad):
    n = Net(seed)
    before = n.graph(n.op("Relu", n.conv("x", 4, kernel, groups, strides=strides, pads=[pad] * 4)))
    after, _ = check(before, [name], expect=[name])

    assert all(c.strides == (1, 1) for c in convs(after))
    other = "MaxPool" if name == "stride-to-pool" else "Slice"
    assert ops(after) == ([other, "Conv", "Relu"] if kernel == 1 and not pad else ["Conv", other, "Relu"])


@settings(max_examples=8, deadline=None)
@given(SEEDS, st.sampled_from([4, 8, 16]))
def test_patches_are_chains_of_stride_2(seed, stride):
    n = Net(seed, channels=3, size=(2 * stride, 3 * stride))
    before = n.graph(conv(n, "x", 5, (stride, stride), channels=3, strides=[stride] * 2))
    after, _ = check(before, ["stride-to-twos"], expect=["stride-to-twos"])

    assert ops(after) == ["Conv"] * (stride.bit_length() - 1)
    assert all((c.kernel, c.strides) == ((3, 3), (2, 2)) for c in convs(after))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([2, 4]), st.booleans(), st.sampled_from([11, 13, 17, 18, 20]), st.integers(1, 2))
def test_groups_are_convolutions_of_their_own_or_one(seed, groups, bias, opset, stride):
    n = Net(seed, channels=8)
    before = n.graph(conv(n, "x", 12, (3, 3), channels=8, groups=groups, bias=bias, strides=[stride] * 2,
                          dilations=[2, 1]), opset=opset)
    after, _ = check(before, ["grouped-to-split"], expect=["grouped-to-split"])
    assert ops(after) == ["Split", *["Conv"] * groups, "Concat"]
    after, (change,) = check(before, ["grouped-to-dense"], expect=["grouped-to-dense"])
    assert ops(after) == ["Conv"]
    assert change.text == f"n1: {groups} groups are one; {groups} times the multiplications"


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from([1, 2]), st.integers(1, 2))
def test_depthwise_is_dense_and_back(seed, multiplier, stride):
    n = Net(seed)
    before = n.graph(n.conv("x", 4 * multiplier, 3, groups=4, strides=[stride] * 2))
    dense, _ = check(before, ["depthwise-to-dense"], expect=["depthwise-to-dense"])
    assert convs(dense)[0].groups == 1
    again, _ = check(dense, ["dense-to-depthwise"], expect=["dense-to-depthwise"])
    assert np.array_equal(convs(again)[0].weights, convs(before)[0].weights)
    assert not check(n.graph(n.conv("x", 4)), ["dense-to-depthwise"])[1]


# transposed convolutions, blocks, resizing


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.tuples(st.integers(1, 6), st.integers(1, 6)), st.integers(1, 4), st.tuples(*[st.integers(0, 3)] * 4),
       st.sampled_from([1, 2, 4]), st.booleans(), st.integers(1, 2), st.integers(0, 3))
def test_transposed_convolutions_are_convolutions(seed, kernel, stride, pads, groups, bias, dilation, more):
    n = Net(seed, size=(5, 6))
    out = 3 * groups if groups != 4 else 4
    reach = [(k - 1) * dilation + 1 for k in kernel]
    pads = [min(p, k - 1) for p, k in zip(pads, reach * 2, strict=True)]
    more = min(more, stride - 1)
    w = n.constant(n.rng.normal(size=(4, out // groups, *kernel)))
    y = n.op("ConvTranspose", "x", w, *([n.constant(n.rng.normal(size=out))] if bias else []), group=groups, pads=pads,
             strides=[stride] * 2, dilations=[dilation] * 2, output_padding=[more] * 2)
    before = n.graph(y)
    after, _ = check(before, ["transposed-to-depth"], expect=["transposed-to-depth"])
    assert "ConvTranspose" not in ops(after)
    after, _ = check(before, ["transposed-to-convolution"])
    assert ("ConvTranspose" in ops(after)) == (stride > 1)


def test_the_usual_transposed_convolution_is_two_nodes():
    n = Net(0)
    w = n.constant(n.rng.normal(size=(4, 3, 4, 4)))
    after, (change,) = check(n.graph(n.op("ConvTranspose", "x", w, strides=[2, 2], pads=[1] * 4)),
                             ["transposed-to-depth"])
    assert ops(after) == ["Conv", "DepthToSpace"]
    assert change.text == "n1: 4x4 with stride 2 is 3x3 with 4 times the channels"


def test_ones_are_the_nearest():
    n = Net(0)
    before = n.graph(n.op("ConvTranspose", "x", n.constant(np.ones((4, 1, 2, 3))), group=4, strides=[2, 3]))
    after, _ = check(before, ["transposed-to-resize"], expect=["transposed-to-resize"])
    assert ops(after) == ["Resize"]
    n = Net(0)
    before = n.graph(n.op("ConvTranspose", "x", n.constant(np.full((4, 1, 2, 3), 2)), group=4, strides=[2, 3]))
    assert not check(before, ["transposed-to-resize"])[1]


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(2, 3), st.sampled_from(["DCR", "CRD", "depth"]))
def test_blocks_are_transposed_and_back(seed, block, kind):
    n = Net(seed, channels=2 * block * block, size=(2 * block, 3 * block))
    y = n.op("SpaceToDepth", "x", blocksize=block) if kind == "depth" else n.op("DepthToSpace", "x", blocksize=block,
                                                                               mode=kind)
    before = n.graph(y)
    after, _ = check(before, ["blocks-to-transpose"], expect=["blocks-to-transpose"])
    assert ops(after) == ["Reshape", "Transpose", "Reshape"]
    again, _ = check(after, ["transpose-to-blocks"], expect=["transpose-to-blocks"])
    assert [(o.op.name, o.op.attributes.get("mode", "DCR")) for o in again.nodes] == [
        ("SpaceToDepth", "DCR") if kind == "depth" else ("DepthToSpace", kind)]


NEAREST = [("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("asymmetric", "round_prefer_floor"),
           ("half_pixel", "ceil"), ("align_corners", "round_prefer_ceil"), ("pytorch_half_pixel", "floor")]
LINEAR = [(c, "floor") for c in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")]


def resized(n, mode, coordinates, nearest, scales=None, sizes=None):
    roi = n.constant(np.zeros(0))
    by = [n.constant([1, 1, *scales])] if scales else [n.constant(np.zeros(0)), n.constant([1, 4, *sizes], np.int64)]
    return n.op("Resize", "x", roi, *by, mode=mode, coordinate_transformation_mode=coordinates, nearest_mode=nearest)


@pytest.mark.parametrize("name", ["resize-to-transposed", "resize-to-depth", "resize-to-expand", "resize-to-matmul"])
@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([("nearest", m) for m in NEAREST] + [("linear", m) for m in LINEAR]), st.integers(2, 4),
       st.integers(1, 4), st.sampled_from([11, 13, 18]))
def test_resizing_is_exact_or_left_alone(name, seed, mode, by, other, opset):
    n = Net(seed, size=(3, 5))
    kind, (coordinates, nearest) = mode
    y = resized(n, kind, coordinates, nearest, (by, other if seed % 2 else by))
    after, changes = check(n.graph(y, opset=opset), [name])

    even = not seed % 2 or other == by
    plain = mode in (("nearest", NEAREST[0]), ("nearest", NEAREST[1]))
    smooth = kind == "linear" and coordinates != "align_corners"
    expected = {"resize-to-transposed": plain or (smooth and even), "resize-to-depth": (plain or smooth) and even,
                "resize-to-expand": plain, "resize-to-matmul": True}[name]
    if expected or not changes:
        assert bool(changes) == expected or not (plain or smooth or expected)
    assert ("Resize" in ops(after)) == (not changes)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([("nearest", m) for m in NEAREST] + [("linear", m) for m in LINEAR]),
       st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_any_size_is_two_matrices(seed, mode, sizes):
    n = Net(seed, size=(4, 6))
    after, _ = check(n.graph(resized(n, mode[0], *mode[1], sizes=sizes)), ["resize-to-matmul"])
    assert "Resize" not in ops(after)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("name", ["resize-to-transposed", "resize-to-depth", "resize-to-expand", "resize-to-matmul"])
@pytest.mark.parametrize("opset", [9, 10])
def test_older_files_resize_alike(name, mode, opset):
    n = Net(0, size=(3, 5))
    y = n.op("Upsample" if opset == 9 else "Resize", "x", n.constant([1, 1, 2, 2]), mode=mode)
    after, changes = check(n.graph(y, opset=opset), [name])
    assert bool(changes) == (mode == "nearest" or name not in ("resize-to-expand", "resize-to-depth"))
    assert not changes or not {"Upsample", "Resize"} & set(ops(after))


def test_other_kinds_of_resizing_stay():
    n = Net(0, size=(4, 6))
    for g in (n.graph(resized(n, "cubic", "half_pixel", "floor", (2, 2))),
              n.graph(resized(n, "linear", "tf_crop_and_resize", "floor", (2, 2)))):
        with_roi = [p for p in ("resize-to-matmul", "resize-to-depth", "resize-to-transposed", "resize-to-expand")
                    if patched(g, [p])[1]]
        assert not with_roi


# pools


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.tuples(st.integers(2, 4), st.integers(2, 4)), st.integers(1, 3), st.integers(0, 1), SIDES)
def test_pools_round_down(seed, kernel, stride, pad, size):
    n = Net(seed, size=size)
    y = n.op("MaxPool", "x", kernel_shape=kernel, strides=[stride] * 2, pads=[pad] * 4, ceil_mode=1)
    before = n.graph(n.op("Relu", y))
    # a last window in nothing but padding counts in onnx's shapes and not in ONNX Runtime: such pools are left alone
    lost = any(-(-(m + 2 * pad - k) // stride) * stride >= m + pad for m, k in zip(size, kernel, strict=True))
    after, _ = check(before, expect=[] if lost else ["pool-floor"])

    assert lost or not after.nodes[0].op.attributes.get("ceil_mode")
    assert compared(before, after)[0].largest == 0


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(2, 7), st.integers(1, 3), st.tuples(*[st.integers(0, 6)] * 4), SIDES)
def test_pools_are_chains_of_2x2(seed, kernel, stride, pads, size):
    n = Net(seed, size=size)
    pads = [min(p, kernel - 1) for p in pads]
    y = n.op("MaxPool", "x", kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads)
    before = n.graph(n.op("Neg", y)) if min(size) + min(pads) >= kernel else None
    if before is None:
        return
    after, _ = check(before, ["pool-pairs"], expect=["pool-pairs"] if kernel > 2 and stride < 3 else [])

    if kernel > 2 and stride < 3:
        assert ops(after) == ["MaxPool"] * (kernel - 1) + ["Neg"]
    assert compared(before, after)[0].largest == 0


@pytest.mark.parametrize("kind", ["global", "window", "mean", "mean without axes"])
@pytest.mark.parametrize("opset", [13, 18])
def test_averages_are_each_other(kind, opset):
    n = Net(0, size=(14, 12))
    axes = ({"axes": [2, 3]}, []) if opset < 18 else ({}, [n.constant([2, 3], np.int64)])
    match kind:
        case "global":
            y = n.op("GlobalAveragePool", "x")
        case "window":
            y = n.op("AveragePool", "x", kernel_shape=[14, 12])
        case _:
            y = n.op("ReduceMean", "x", *axes[1], **axes[0], keepdims=int(kind == "mean"))
    g = n.graph(n.op("Relu", y), opset=opset)
    own = {"global": "GlobalAveragePool", "window": "AveragePool"}.get(kind, "ReduceMean")

    for name, others in (("global-pool-to-average", ["AveragePool"]), ("average-to-global-pool", ["GlobalAveragePool"]),
                         ("average-to-mean", ["ReduceMean"]), ("average-chain", ["AveragePool"] * 2),
                         ("average-to-convolution", ["Conv"])):
        after, changes = check(g, [name])
        if changes:
            flat = ["Reshape"] if kind == "mean without axes" else []
            assert ops(after) == [*others, *flat, "Relu"]
        else:
            assert own in others or kind == "mean without axes" or (name, kind) in (
                ("global-pool-to-average", "window"), ("global-pool-to-average", "mean"), ("average-to-mean", "mean"))


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(2, 4), st.integers(1, 2), st.integers(0, 1), st.booleans())
def test_small_averages_are_depthwise(seed, kernel, stride, pad, counted):
    n = Net(seed)
    before = n.graph(n.op("AveragePool", "x", kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4,
                          count_include_pad=int(counted)))
    after, _ = check(before, ["average-to-convolution"])
    assert ops(after) == (["AveragePool"] if pad and not counted else ["Conv"])


# products


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from(["Gemm", "MatMul"]), st.sampled_from(["Flatten", "Reshape", "none"]), st.booleans(),
       st.booleans())
def test_products_are_convolutions(seed, kind, flat, turned, bias):
    n = Net(seed, size=(3, 2))
    if flat == "none":
        n.shape, x = (2, 24), "x"
    else:
        x = n.op("Flatten", "x") if flat == "Flatten" else n.op("Reshape", "x", n.constant([1, 24], np.int64))
    w = n.rng.normal(size=(24, 5)) / 5
    if kind == "MatMul":
        y = n.op("MatMul", x, n.constant(w))
    else:
        y = n.op("Gemm", x, n.constant(w.T if turned else w), *([n.constant(n.rng.normal(size=5))] if bias else []),
                 transB=int(turned), alpha=0.5, beta=2.0)
    after, _ = check(n.graph(y), ["gemm-to-convolution"], expect=["gemm-to-convolution"])
    assert ops(after) == (["Reshape", "Conv", "Reshape"] if flat == "none" else ["Conv", flat])
    again, _ = check(after, ["convolution-to-gemm"], expect=["convolution-to-gemm"])
    assert "Gemm" in ops(again)


# joins


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(1, 2), st.booleans())
def test_a_concat_before_convolutions_is_a_sum_behind_them(seed, parts, readers, output):
    n = Net(seed)
    joined = n.op("Concat", *(n.conv("x", c) for c in parts), axis=1)
    outputs = [n.op("Relu", n.conv(joined, 6, 3, channels=sum(parts), bias=bool(seed % 2))) for _ in range(readers)]
    after, changes = check(n.graph(*outputs, *([joined] if output else [])), ["concat-to-sums"])
    assert bool(changes) != output
    assert ("Concat" in ops(after)) == output


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(["none", "silu", "relu6", "chain", "scaled"]), st.booleans())
def test_a_split_behind_a_convolution_is_two_convolutions(seed, kind, shared):
    n = Net(seed)
    y = n.conv("x", 10)
    match kind:
        case "silu":
            z = n.op("Mul", y, n.op("Sigmoid", y))
        case "relu6":
            z = n.op("Clip", y, n.constant(0.0), n.constant(6.0))
        case "chain":
            z = n.op("Add", n.op("Relu", y), n.op("Mul", n.op("Tanh", y), n.constant(0.5)))
        case "scaled":
            z = n.op("Mul", y, n.constant(n.rng.normal(size=(10, 1, 1))))
        case _:
            z = y
    name = f"v{n.count + 1}"
    n.count += 1
    from onnx import helper
    n.nodes.append(helper.make_node("Split", [z, n.constant([4, 6], np.int64)], [name, "rest"], "cut", axis=1))
    after, changes = check(n.graph(n.op("Neg", name), n.op("Abs", "rest"), *([n.op("Exp", z)] if shared else [])),
                           ["split-to-convolutions"])
    assert bool(changes) != shared
    assert ("Split" in ops(after)) == shared
    assert ops(after).count("Conv") == (1 if shared else 2)


# channels and sizes


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(["chain", "residual", "depthwise", "gate", "pool", "concat"]),
       st.sampled_from([4, 8, 16]))
def test_channels_are_padded_between_convolutions(seed, kind, number):
    n = Net(seed)
    y = n.conv("x", 6)
    match kind:
        case "chain":
            z = n.op("Sigmoid", n.op("Add", y, n.constant(n.rng.normal(size=(1, 6, 1, 1)))))
        case "residual":
            z = n.op("Add", n.op("Relu", y), n.conv(n.op("HardSwish", n.conv(y, 5, 1, channels=6)), 6, channels=5))
        case "depthwise":
            z = n.op("Clip", n.conv(y, 6, groups=6, channels=6), n.constant(0.0), n.constant(6.0))
        case "gate":
            gate = n.op("GlobalAveragePool", y)
            gate = n.conv(n.op("Relu", n.conv(gate, 3, 1, channels=6)), 6, 1, channels=3)
            z = n.op("Mul", y, n.op("HardSigmoid", gate))
        case "pool":
            z = n.op("AveragePool", n.op("MaxPool", y, kernel_shape=[2, 2]), kernel_shape=[2, 2])
        case "concat":
            z = n.op("Concat", y, y, axis=1)
    before = n.graph(n.op("Relu", n.conv(z, 5, channels=12 if kind == "concat" else 6)))
    after, changes = check(before, [f"pad-channels={number}"])

    assert bool(changes) == (kind != "concat")
    inner = [c.channels for c in convs(after)[1:]]
    assert kind == "concat" or all(c % number == 0 for c in inner)
    assert after.values[after.outputs[0]].shape == before.values[before.outputs[0]].shape


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(["Conv", "MaxPool", "AveragePool"]), st.integers(1, 5), st.integers(1, 3),
       st.integers(0, 2), st.tuples(st.integers(10, 40), st.integers(10, 40)))
def test_images_are_split_until_they_fit(seed, kind, kernel, stride, pad, size):
    n = Net(seed, size=size)
    pad = min(pad, kernel - 1)
    if kind == "Conv":
        y = n.conv("x", 3, kernel, strides=[stride] * 2, pads=[pad] * 4)
    else:
        y = n.op(kind, "x", kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)
    after, _ = check(n.graph(n.op("Relu", y)), ["split-rows=12"])

    sides = [max(after.values[node.inputs[0]].shape[2:]) for node in after.nodes if node.op.name == kind]
    assert max(sides) <= max(12, 2 * kernel + stride)
    if kind == "MaxPool":
        assert max(size) <= 12 or len(sides) > 1


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(["Conv", "depthwise", "Gemm"]), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_channels_are_split_until_they_fit(seed, kind, inputs, outputs, bias):
    n = Net(seed, channels=inputs, size=(4, 4))
    if kind == "Gemm":
        n.shape = (2, inputs)
        y = n.op("Gemm", "x", n.constant(n.rng.normal(size=(inputs, outputs)) / 9),
                 *([n.constant(n.rng.normal(size=outputs))] if bias else []))
    else:
        outputs = 2 * inputs if kind == "depthwise" else outputs
        y = n.conv("x", outputs, 3, inputs if kind == "depthwise" else 1, bias=bias)
    after, changes = check(n.graph(n.op("Relu", y)), ["split-channels=16"])

    assert bool(changes) == (max(inputs, outputs) > 16)
    for c in convs(after):
        assert max(c.channels, len(c.weights)) <= 16


# for a board, and for files that are not right


def off(name):
    board = find_board(name)
    return lambda g: {f.node for f in board.check(g, "int8").findings if f.where != "npu"}


def left(name, graph):
    """Operators that a board does not take, before and after the passes for it; equal outputs."""
    after, changes = patched(graph, (), off(name))
    assert all(a.equal for a in compared(graph, after))
    where = off(name)
    return ([graph.nodes[i].op.name for i in sorted(where(graph))],
            [after.nodes[i].op.name for i in sorted(where(after))], {c.name for c in changes})


@pytest.mark.parametrize("make", [
    pytest.param((lambda n: n.conv("x", 4, 7, strides=[2, 2]), "max78000", "small-kernels"), id="kernel and stride"),
    pytest.param((lambda n: n.conv("x", 4, 3, strides=[2, 2]), "max78002", "stride-to-pool"), id="stride"),
    pytest.param((lambda n: n.conv("x", 4, 3, 4), "max78000", "depthwise-to-dense"), id="depthwise"),
    pytest.param((lambda n: n.conv("x", 4, 3, 2), "kendryte_k210", "grouped-to-dense"), id="groups"),
    pytest.param((lambda n: n.conv("x", 4, 3, dilations=[2, 2], pads=[2] * 4), "vivante_a311d", "dilation-to-dense"),
                 id="dilation"),
    pytest.param((lambda n: n.op("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), "kendryte_k210",
                  "pool-pairs"), id="pool"),
    pytest.param((lambda n: n.op("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1), "rk3588",
                  "pool-floor"), id="rounding"),
    pytest.param((lambda n: n.op("Resize", "x", "", n.constant([1, 1, 2, 2]), mode="nearest"), "kendryte_k210",
                  "resize-to-transposed"), id="resize"),
    pytest.param((lambda n: n.op("GlobalAveragePool", "x"), "vivante_a311d", "average-to-convolution"), id="average"),
    pytest.param((lambda n: n.conv("x", 4, 6, strides=[2, 2], pads=[2] * 4), "axis_artpec9", "same-padding"),
                 id="even"),
    pytest.param((lambda n: conv(n, "x", 4, (16, 16), strides=[16, 16]), "rk3588", "stride-to-twos"), id="patches"),
    pytest.param((lambda n: n.conv(n.op("Concat", n.conv("x", 4), n.conv("x", 5), axis=1), 4, channels=9),
                  "vivante_a311d", "concat-to-sums"), id="concat"),
    pytest.param((lambda n: n.op("ConvTranspose", "x", n.constant(np.ones((4, 4, 4, 4))), strides=[2, 2], pads=[1] * 4),
                  "axis_artpec9", "transposed-to-depth"), id="transposed"),
])
def test_a_board_gets_what_it_needs(make):
    build, board, name = make
    n = Net(0, size=(32, 32))
    before, after, used = left(board, n.graph(build(n)))
    assert before
    assert not after
    assert name in used


def test_another_name_for_the_same_mean_is_no_help():
    n = Net(0, channels=1030, size=(2, 2))
    assert left("max78000", n.graph(n.op("GlobalAveragePool", "x")))[1] == ["GlobalAveragePool"]


def test_nodes_that_the_board_takes_are_left_alone():
    n = Net(0, size=(32, 32))
    g = n.graph(n.op("Relu", n.conv(n.op("Relu", n.conv("x", 4, 3)), 4, 3, strides=[2, 2])))
    after, _ = patched(g, (), off("max78002"))
    assert ops(after) == ["Conv", "Relu", "Conv", "MaxPool", "Relu"]
    assert ops(patched(g, (), off("rk3588"))[0]) == ["Conv", "Relu", "Conv", "Relu"]


@pytest.mark.parametrize("attributes", [
    {"strides": 2}, {"strides": [0, 1]}, {"strides": ["a", "b"]}, {"pads": [1, 1]}, {"pads": [-1] * 4}, {"group": 0},
    {"group": 3}, {"dilations": [-1, 1]}, {"dilations": [1 << 40] * 2}, {"auto_pad": "SOME"}, {"kernel_shape": 1.5},
    {"strides": [1 << 40] * 2}, {"pads": [1 << 40] * 4}, {"blocksize": 0}, {"perm": [9] * 6}, {"axis": "x"},
    {"blocksize": 1 << 40}, {"axes": [2, 3, 4]}, {"mode": "no"}, {"output_padding": [1 << 40] * 2},
])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "MaxPool", "AveragePool", "ReduceMean", "Resize", "Concat",
                                  "DepthToSpace", "SpaceToDepth", "Split", "GlobalAveragePool", "Gemm", "Transpose"])
def test_attributes_that_are_wrong_are_left_alone(kind, attributes):
    n = Net(0)
    weights = n.constant(np.ones((4, 4, 5, 5)))
    operands = {"Conv": ["x", weights], "ConvTranspose": ["x", weights], "Resize": ["x", "", n.constant([1, 1, 2, 2])],
                "Concat": ["x", "x"], "Gemm": [n.op("Flatten", "x"), n.constant(np.ones((396, 3)))]}.get(kind, ["x"])
    relu = n.op("Relu", n.op(kind, *operands, **attributes))
    with contextlib.suppress(ModelError):
        g = n.graph(relu)
        for p in PASSES:
            patched(g, [p.name])
