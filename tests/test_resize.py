"""Networks at other sizes and convolutions with other channels: shapes as LiteRT infers them, and values too."""

from pathlib import Path

import numpy as np
import pytest

import npulab
from layers import Layers, litert
from npulab.errors import UnsupportedError, UsageError
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers import load
from npulab.passes.resize import input_size, kept_nodes, reshaped, with_channels, with_input_size
from npulab.program.types import NpuStep
from npulab.runtime.compare import compare_layers
from shared import MODELS, needs_shared

SAMPLES = Path(__file__).resolve().parents[1] / "src" / "npulab" / "samples"
QUANTIZED = MODELS / "quantized"


def litert_shapes(graph):
    """Every tensor's shape as LiteRT computes it, by number."""
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="needs LiteRT: pip install 'npulab[litert]'")
    run = interpreter.Interpreter(model_content=bytes(graph.source), num_threads=1,
                                  experimental_op_resolver_type=interpreter.OpResolverType.BUILTIN_REF)
    run.allocate_tensors()
    return {d["index"]: tuple(int(n) for n in d["shape"]) for d in run.get_tensor_details()}


def expect_litert_agrees(graph):
    theirs = litert_shapes(graph)
    assert [theirs[v.index] for v in graph.values] == [v.shape for v in graph.values]


def digits():
    return load(SAMPLES / "digits.tflite")


def every_record(h, w):
    """A network of the operators that have records of their own, on an image of h x w."""
    n = Layers(3, False)
    x = n.input(1, h, w, 4)
    a = n.conv(x, 8, (3, 3), stride=2)
    b = n.add(a, n.depthwise(a, (3, 3)))
    left, right = n.split(n.pad(n.concat(a, b), (1, 1), (0, 2)), 2)
    c = n.conv(n.concat(left, right), 6, (3, 3), padding="VALID", dilation=(2, 2))
    _, ch, cw, cc = n.shapes[c]
    boxes = n.reshape(c, 1, ch * cw * 2, cc // 2)
    mean = n.dense(n.mean(n.pool(c, (2, 2), 2)), 5)
    head = n.reshape(n.average(c), 1, cc)
    return n, (boxes, mean, head)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (25, 31), (48, 12), (120, 121)])
def test_every_operator_with_a_record_follows_as_if_it_had_been_built_at_that_size(height, width):
    small, outputs = every_record(24, 24)
    want, want_outputs = every_record(height, width)
    graph = with_input_size(load(small.build(*outputs)), height, width)
    built = load(want.build(*want_outputs))

    assert [v.shape for v in graph.values[: len(built.values)]] == [v.shape for v in built.values]
    assert [n.op for n in graph.nodes] == [n.op for n in built.nodes]
    assert [graph.values[v].shape for v in graph.outputs] == [built.values[v].shape for v in built.outputs]
    expect_litert_agrees(graph)
    inputs = want.samples()
    theirs, ours = litert(bytes(built.source), inputs), litert(bytes(graph.source), inputs)
    for name in theirs:  # the same weights on the same image
        np.testing.assert_array_equal(ours[name], theirs[name])


def run_layers(graph):
    """Layers that the virtual NPU computed, and the largest difference from LiteRT on the same input."""
    program = npulab.compile(graph, keep_all=True)
    rng = np.random.default_rng(5)
    values = [graph.values[v] for v in graph.inputs]
    known = {}
    npulab.open_session(program).run({v.name: rng.integers(0, 256, v.shape).astype(v.dtype.value) for v in values},
                                     trace=known.__setitem__)
    rows = [r for r in compare_layers(program, graph, known) if r.is_layer]
    assert len(rows) == sum(len(s.nodes) for s in program.steps if isinstance(s, NpuStep))
    return len(rows), max(r.max_abs for r in rows)


@pytest.mark.parametrize("size", [(32, 32), (33, 35), (24, 40), (64, 64)])
def test_the_sample_at_other_sizes_runs_and_every_layer_is_within_one_of_litert(size):
    pytest.importorskip("ai_edge_litert")
    graph = with_input_size(digits(), *size)
    layers, worst = run_layers(graph)

    assert graph.values[graph.inputs[0]].shape == (1, *size, 3)
    assert graph.values[graph.outputs[0]].shape == (1, 10)
    assert (layers, worst <= 1) == (18, True)


@needs_shared
@pytest.mark.parametrize("size", [(96, 96), (161, 128)])
def test_mobilenet_at_other_sizes_runs_and_every_layer_is_within_one_of_litert(size):
    pytest.importorskip("ai_edge_litert")
    layers, worst = run_layers(with_input_size(load(QUANTIZED / "mobilenet_v1_0.25_128_quant.tflite"), *size))

    assert (layers, worst <= 1) == (30, True)


@needs_shared
@pytest.mark.parametrize(("name", "sizes"), [
    ("quantized/ssdlite_mobiledet_coco_qat_postprocess", [(640, 640), (321, 323)]),
    ("quantized/coco_ssd_mobilenet_v1_1.0_quant_2018_06_29", [(332, 364), (155, 300)]),
    ("quantized/yolox_nano_uint8_416x320", [(640, 832), (352, 480)]),
    ("quantized/posenet_mobilenet_v1_075_353_481_16_quant_decoder", [(385, 545)]),
    ("float/face_detection_short_range", [(129, 131)]),
    ("float/selfie_segmentation", [(288, 320)]),
    ("float/mobilenet_v1_0.25_224_1_default_1", [(117, 224)]),
])
def test_real_networks_have_the_shapes_that_litert_infers(name, sizes):
    graph = load(MODELS / f"{name}.tflite")
    for size in sizes:
        resized = with_input_size(graph, *size)
        assert input_size(resized) == size
        expect_litert_agrees(resized)


def test_the_models_own_size_changes_no_value_and_no_operator():
    graph = digits()
    same = with_input_size(graph, 32, 32)

    assert [(v.name, v.shape, v.constant and bytes(v.constant)) for v in same.values] == \
        [(v.name, v.shape, v.constant and bytes(v.constant)) for v in graph.values]
    assert [n.op for n in same.nodes] == [n.op for n in graph.nodes]


@pytest.mark.parametrize(("before", "now", "target", "want"), [
    ((1, 19, 19, 273), (1, 20, 21, 273), (1, 1083, 91), (1, 1260, 91)),
    ((1, 19, 19, 12), (1, 38, 38, 12), (1, 1083, 4), (1, 4332, 4)),  # 4 could double twice, too
    ((1, 1, 1, 273), (1, 2, 3, 273), (1, 3, 91), (1, 18, 91)),
    ((1, 1, 1, 4), (1, 2, 2, 4), (1, 1, 4), (1, 4, 4)),
    ((1, 1, 1, 12), (1, 2, 2, 12), (1, 3, 1, 4), (1, 12, 1, 4)),
    ((1, 1, 1, 8), (1, 2, 2, 8), (1, 1, 2, 4), (1, 4, 2, 4)),  # the first of two axes that could
    ((1, 7, 7, 64), (1, 8, 8, 64), (1, 3136), (1, 4096)),
    ((1, 20, 20, 255), (1, 40, 24, 255), (1, 20, 20, 3, 85), (1, 40, 24, 3, 85)),
    ((1, 144, 52, 52), (1, 144, 60, 40), (1, 144, 2704), (1, 144, 2400)),
    ((1, 64, 3549), (1, 64, 14196), (1, 4, 16, 3549), (1, 4, 16, 14196)),
    ((1, 8, 8, 2), (1, 9, 8, 2), (1, 8, 8, 2), (1, 9, 8, 2)),
    ((1, 1, 1, 9), (1, 1, 1, 9), (1, 9), (1, 9)),
    ((1, 2704, 4), (1, 3136, 4), (1, 52, 52, 4), None),  # which of the two?
    ((1, 6, 6, 4), (1, 7, 6, 4), (1, 9, 16), None),  # rows that do not divide into the new ones
])
def test_a_reshape_follows_where_the_order_of_elements_leaves_no_choice(before, now, target, want):
    assert reshaped(before, now, target) == want
    if want is not None:
        assert np.prod(want) == np.prod(now)


def test_a_flattened_image_before_a_fully_connected_cannot_follow():
    n = Layers(1, False)
    x = n.input(1, 8, 8, 3)
    out = n.dense(n.reshape(n.conv(x, 4, (3, 3)), 1, 256), 10)

    with pytest.raises(UnsupportedError) as e:
        with_input_size(load(n.build(out)), 9, 8)
    assert str(e.value) == (
        "FULLY_CONNECTED (node 2) of 'model' cannot follow to an input of 9x8: "
        "its weights are made for one image size\n  want    256 inputs\n  got     288\n"
        "  try     a network that averages over the image before its FULLY_CONNECTED")


def test_a_window_that_no_longer_fits_is_named():
    n = Layers(1, False)
    out = n.conv(n.input(1, 8, 8, 3), 4, (5, 5), padding="VALID")

    with pytest.raises(UnsupportedError, match=r"CONV_2D \(node 0\) of 'model' .* 4x8: its input is too small"):
        with_input_size(load(n.build(out)), 4, 8)


def test_a_constant_of_the_old_size_is_named():
    n = Layers(1, False)
    x = n.input(1, 4, 4, 2)
    grid = n._tensor((1, 4, 4, 2), 0.1, 3, np.zeros((1, 4, 4, 2), "uint8"))
    out = n.add(x, grid)

    with pytest.raises(UnsupportedError) as e:
        with_input_size(load(n.build(out)), 8, 8)
    assert e.value.message == \
        "ADD (node 0) of 'model' cannot follow to an input of 8x8: a constant belongs to the old size"
    assert "got     1x8x8x2 and 1x4x4x2" in str(e.value)


def upsampled(*size):
    """Two levels of a feature pyramid: the smaller one is resized to the larger one and added."""
    n = Layers(2, False)
    x = n.input(1, *size, 3)
    a = n.conv(x, 4, (3, 3), stride=2, out_scale=0.1, out_zero=7)
    b = n.conv(a, 4, (3, 3), stride=2, out_scale=0.1, out_zero=7)
    target = n._tensor((2,), None, None, np.array(n.shapes[a][1:3], "int32"), "int32")
    up = n._tensor(n.shapes[a], 0.1, 7)
    n.model.op("RESIZE_NEAREST_NEIGHBOR", [b, target], [up], align_corners=False, half_pixel_centers=False)
    return n, n.add(a, up)


def test_targets_of_resizing_follow_where_they_are_multiples():
    small, out = upsampled(16, 16)
    graph = with_input_size(load(small.build(out)), 24, 40)
    want, out = upsampled(24, 40)

    expect_litert_agrees(graph)
    inputs = want.samples()
    (theirs,), (ours,) = (litert(m, inputs).values() for m in (want.build(out), bytes(graph.source)))
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(UnsupportedError, match="operands no longer have one shape") as e:
        with_input_size(load(small.build(upsampled(16, 16)[1])), 18, 16)
    assert "try     a size that every stride divides" in str(e.value)


def test_a_window_and_a_stride_that_cover_the_whole_image_follow_it():
    b = ModelBuilder("whole")
    x, y = (b.tensor(name, (1, *size, 3), "uint8", scale=0.1, zero_point=0) for name, size in
            (("x", (8, 6)), ("y", (1, 1))))
    b.op("AVERAGE_POOL_2D", [x], [y], padding="SAME", stride_h=8, stride_w=6, filter_height=8, filter_width=6,
         fused_activation_function="NONE")
    graph = with_input_size(load(b.build([x], [y])), 20, 21)

    assert (graph.nodes[0].op.window, graph.nodes[0].op.stride) == ((20, 21), (20, 21))
    assert graph.values[y].shape == (1, 1, 1, 3)
    expect_litert_agrees(graph)


def test_slices_over_a_whole_axis_follow_and_others_are_named():
    def sliced(begin, end, step, shape):
        b = ModelBuilder("slices")
        x = b.tensor("x", (1, 8, 8, 2), "uint8", scale=0.1, zero_point=0)
        limits = [b.tensor(f"l{i}", (4,), "int32", data=np.array(v, "int32")) for i, v in enumerate((begin, end, step))]
        y = b.tensor("y", shape, "uint8", scale=0.1, zero_point=0)
        b.op("STRIDED_SLICE", [x, *limits], [y])
        return load(b.build([x], [y]))

    odd_rows = sliced((0, 1, 0, 0), (1, 8, 8, 1), (1, 2, 1, 1), (1, 4, 8, 1))
    graph = with_input_size(odd_rows, 12, 9)
    expect_litert_agrees(graph)
    x = np.arange(12 * 9 * 2, dtype="uint8").reshape(1, 12, 9, 2)
    np.testing.assert_array_equal(litert(bytes(graph.source), {"x": x})["y"], x[:, 1::2, :, :1])
    with pytest.raises(UnsupportedError, match="it takes a part of axis 1") as e:
        with_input_size(sliced((0, 0, 0, 0), (1, 4, 8, 2), (1, 1, 1, 1), (1, 4, 8, 2)), 12, 9)
    assert "got     0..4 of 8, which is 12 now" in str(e.value)


def test_reshapes_that_share_a_shape_each_get_their_own():
    n = Layers(4, False)
    x = n.input(1, 4, 4, 2)
    shape = n._tensor((2,), None, None, np.array((1, 32), "int32"), "int32")
    outs = []
    for y in (x, n.conv(n.conv(x, 4, (3, 3)), 8, (2, 2), stride=2)):
        outs.append(n._tensor((1, 32), n.scales[y], n.zeros[y]))
        n.model.op("RESHAPE", [y, shape], [outs[-1]], new_shape=[1, 32])
    graph = with_input_size(load(n.build(*outs)), 5, 4)

    assert [graph.values[v].shape for v in graph.outputs] == [(1, 40), (1, 48)]
    expect_litert_agrees(graph)


def test_a_custom_operator_and_what_follows_it_are_left_out():
    n = Layers(5, False)
    x = n.input(1, 8, 8, 3)
    y, z = n.conv(x, 4, (3, 3)), n.conv(x, 2, (3, 3))
    lost = n._tensor((1, 5), 0.1, 0)
    n.model.custom("Detector", [y], [lost])
    tail = n.dense(lost, 3)
    last = n.conv(z, 2, (1, 1))
    graph = load(n.build(tail, last))
    resized = with_input_size(graph, 10, 10)

    assert kept_nodes(graph) == [0, 1, 4]
    assert [n.op.name for n in resized.nodes] == ["CONV_2D"] * 3
    assert [resized.values[v].name for v in resized.outputs] == [f"t{last}", f"t{y}"]
    expect_litert_agrees(resized)


def test_what_is_no_image_or_no_size_is_refused():
    n = Layers(1, False)
    flat = n.input(1, 8)
    vector = load(n.build(n.dense(flat, 4)))
    two = Layers(1, False)
    pair = load(two.build(two.conv(two.input(1, 8, 8, 1), 2, (1, 1)), two.conv(two.input(1, 4, 8, 1), 2, (1, 1))))

    with pytest.raises(UnsupportedError, match="takes no image"):
        input_size(vector)
    with pytest.raises(UnsupportedError, match="takes images of several sizes"):
        with_input_size(pair, 8, 8)
    for size, name in (((0, 8), "height of 0"), ((8, 65536), "width of 65536")):
        with pytest.raises(UsageError, match=f"an image cannot have a {name}"):
            with_input_size(digits(), *size)


def one_convolution(kind, signed=False):
    n = Layers(9, signed)
    x = n.input(1, 9, 9, 6)
    return n, load(n.build(n.conv(x, 10, (3, 3)) if kind == "conv" else n.depthwise(x, (3, 3), multiplier=2)))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("kind", "outputs", "inputs"), [
    ("conv", 4, None), ("conv", 10, None), ("conv", 23, 13), ("conv", 8, 2), ("depthwise", 6, None),
    ("depthwise", 34, None),
])
def test_a_convolution_with_other_channels_runs_as_litert_runs_it(kind, outputs, inputs, signed):
    pytest.importorskip("ai_edge_litert")
    _, graph = one_convolution(kind, signed)
    depth = inputs or (6 if kind == "conv" else outputs // 2)
    single = with_channels(graph, 0, outputs, inputs)
    x, y = single.values[single.inputs[0]], single.values[single.outputs[0]]
    old, new = (g.value(g.nodes[0], 1).array() for g in (graph, single))

    assert (x.shape, y.shape) == ((1, 9, 9, depth), (1, 9, 9, outputs))
    assert single.nodes[0].op == graph.nodes[0].op
    axis = 0 if kind == "conv" else 3
    np.testing.assert_array_equal(new.take(outputs - 1, axis).take(0, -1),  # the last kernel repeats an old one
                                  old.take((outputs - 1) % old.shape[axis], axis).take(0, -1))
    rng = np.random.default_rng(0)
    image = (rng.integers(-128, 128, x.shape) if signed else rng.integers(0, 256, x.shape)).astype(x.dtype.value)
    want = litert(bytes(single.source), {x.name: image})[y.name]
    got = npulab.open_session(npulab.compile(single)).run({x.name: image})[y.name]
    assert np.abs(want.astype(int) - got.astype(int)).max() <= 1


def test_scales_of_each_channel_repeat_with_their_kernels():
    b = ModelBuilder("per channel")
    x = b.tensor("x", (1, 4, 4, 2), "int8", scale=0.1, zero_point=0)
    w = b.tensor("w", (3, 1, 1, 2), "int8", data=np.arange(6, dtype="int8"), scales=[0.5, 0.25, 0.125], axis=0)
    bias = b.tensor("b", (3,), "int32", data=np.array((7, 8, 9), "int32"), scales=[0.05, 0.025, 0.0125])
    y = b.tensor("y", (1, 4, 4, 3), "int8", scale=0.1, zero_point=0)
    b.op("CONV_2D", [x, w, bias], [y], padding="SAME", stride_w=1, stride_h=1, dilation_w_factor=1, dilation_h_factor=1)
    single = with_channels(load(b.build([x], [y])), 0, 5)
    node = single.nodes[0]

    assert single.value(node, 1).quantization.scales == (0.5, 0.25, 0.125, 0.5, 0.25)
    assert single.value(node, 2).array().tolist() == [7, 8, 9, 7, 8]


def test_channels_that_cannot_change_are_refused():
    n = Layers(1, False)
    x = n.input(1, 4, 4, 4)
    graph = load(n.build(n.add(n.conv(x, 4, (1, 1), groups=2), n.depthwise(x, (3, 3), multiplier=1))))
    _, pair = one_convolution("depthwise")

    with pytest.raises(UnsupportedError, match="grouped convolution"):
        with_channels(graph, 0, 8)
    with pytest.raises(UnsupportedError, match=r"ADD \(node 2\) of 'model' has no channels to change"):
        with_channels(graph, 2, 8)
    with pytest.raises(UsageError, match="cannot have 0 outputs"):
        with_channels(graph, 1, 0)
    with pytest.raises(UsageError) as e:
        with_channels(pair, 0, 7)
    assert "want    outputs that are 2 times the inputs" in str(e.value)
