"""Repairs without gradients: exact in floats where they say so, and better in integers. ONNX Runtime is the witness."""

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from npulab.errors import InvariantError, UsageError
from npulab.importers.onnx import read_onnx
from npulab.quantization.absorb import absorb
from npulab.quantization.calibrate import calibrate, statistics
from npulab.quantization.chains import links, scale_input, scale_output, without_ceiling
from npulab.quantization.clip import clip
from npulab.quantization.correct import fast, full, linear_means
from npulab.quantization.emit import float_model, integer_model
from npulab.quantization.equalize import MARGIN, equalize, spread
from npulab.quantization.moments import ceilings_met, clipped_normal, input_moments, results_seen
from npulab.quantization.network import network
from npulab.quantization.session import runner
from npulab.quantization.smooth import smooth
from npulab.quantization.types import ListedSamples, Rules, Scheme

PER_TENSOR = Rules("t", "t", "onnx", (Scheme(),), (Scheme(symmetric=True, narrow=True),))
PER_CHANNEL = Rules("c", "c", "onnx", (Scheme(),), (Scheme(symmetric=True, narrow=True, per_channel=True),))


class Build:
    """An ONNX file, node by node; each method gives the name of its result."""

    def __init__(self, shape, seed=0, opset=17):
        self.rng = np.random.default_rng(seed)
        self.nodes, self.constants = [], []
        self.shape, self.opset = shape, opset

    def constant(self, array):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, name, *inputs, **attributes):
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(name, list(inputs), [out], f"{name}_{len(self.nodes)}", **attributes))
        return out

    def conv(self, x, inputs, outputs, kernel=1, group=1, bad=0.0, shift=0.0, **attributes):
        """`bad`: how many powers of ten the channels' ranges are apart."""
        w = self.rng.normal(size=(outputs, inputs // group, kernel, kernel)) / math.sqrt(inputs // group * kernel**2)
        factors = 10 ** self.rng.uniform(-bad / 2, bad / 2, outputs)
        b = (self.rng.normal(size=outputs) * 0.3 + shift) * factors
        w *= factors.reshape(-1, 1, 1, 1)
        return self.op("Conv", x, self.constant(w.astype(np.float32)), self.constant(b.astype(np.float32)), group=group,
                       pads=[kernel // 2] * 4, kernel_shape=[kernel, kernel], **attributes)

    def gemm(self, x, inputs, outputs):
        w = self.rng.normal(size=(inputs, outputs)).astype(np.float32) / math.sqrt(inputs)
        return self.op("Gemm", x, self.constant(w), self.constant(np.zeros(outputs, np.float32)))

    def matmul(self, x, inputs, outputs, add=True):
        out = self.op("MatMul", x, self.constant(self.rng.normal(size=(inputs, outputs)).astype(np.float32)
                                                 / np.float32(math.sqrt(inputs))))
        return self.op("Add", out, self.constant(self.rng.normal(size=outputs).astype(np.float32))) if add else out

    def relu6(self, x):
        return self.op("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))

    def graph(self, *outputs):
        model = helper.make_model(
            helper.make_graph(self.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
                              [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
                              self.constants), opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        model = onnx.shape_inference.infer_shapes(model)  # of the outputs
        onnx.checker.check_model(model)
        return read_onnx(model.SerializeToString(), "g")

    def network(self, *outputs, rules=PER_TENSOR):
        return network(self.graph(*outputs), rules)


def samples_of(net, count=6, seed=1, scale=1.0):
    shape = net.graph.values[net.graph.inputs[0]].shape
    rng = np.random.default_rng(seed)
    return ListedSamples([{"x": (scale * rng.normal(size=shape)).astype(np.float32)} for _ in range(count)])


def outputs(net, samples, model=None):
    names = [net.name(v) for v in net.graph.outputs]
    run = runner(model or float_model(net), names)
    return [np.concatenate([a.ravel() for a in run(feeds)]) for feeds in samples]


def decibels(net, reference, samples, how="min-max"):
    """Signal to noise of the integer network's outputs."""
    got = outputs(net, samples, integer_model(net))
    error = sum(float(np.sum((a - b) ** 2)) for a, b in zip(got, reference, strict=True))
    return 10 * math.log10(sum(float(np.sum(a**2)) for a in reference) / error)


def assert_same(before, after):
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max())


def relu_net(seed=0, act=None, bad=3.0):
    """Convolution, depthwise, pointwise, a residual sum, pooling, flattening, product."""
    b = Build((1, 3, 8, 8), seed)
    act = act or (lambda x: b.op("Relu", x))
    x = act(b.conv("x", 3, 8, 3, bad=bad))
    x = act(b.conv(x, 8, 8, 3, group=8, bad=bad))
    skip = b.conv(x, 8, 6)
    x = act(b.conv(skip, 6, 12, bad=bad))
    x = b.conv(x, 12, 6)
    x = b.op("Add", skip, x)
    x = act(b.conv(x, 6, 10, bad=bad))
    x = b.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = b.gemm(b.op("Flatten", x), 160, 5)
    return b, x


# equalization


def between(b, kind, x):
    """Something that lets factors of the 6 channels of (1, 6, 8, 8) pass, and a layer that reads them."""
    match kind:
        case "none":
            pass
        case "leaky":
            x = b.op("LeakyRelu", x, alpha=0.1)
        case "prelu":
            x = b.op("PRelu", x, b.constant(b.rng.uniform(0, 1, (6, 1, 1)).astype(np.float32)))
        case "pools":
            x = b.op("MaxPool", b.op("Relu", x), kernel_shape=[3, 3], pads=[1] * 4)
            x = b.op("AveragePool", x, kernel_shape=[2, 2], pads=[1] * 4, count_include_pad=1)
            x = b.op("Pad", x, b.constant(np.array([0, 0, 1, 0, 0, 0, 0, 2])))
        case "flatten":
            return b.gemm(b.op("Flatten", b.op("Relu", x)), 384, 4)
        case "channels last":
            x = b.op("Transpose", b.op("Relu", x), perm=[0, 2, 3, 1])
            x = b.op("Reshape", x, b.constant(np.array([1, 64, 6])))
            return b.matmul(x, 6, 4)
        case "mean":
            x = b.op("ReduceMean", b.op("Relu", x), axes=[2, 3], keepdims=0)
            return b.gemm(x, 6, 4)
        case "two readers":
            x = b.op("Relu", x)
            return b.op("Concat", b.conv(x, 6, 3, 3), b.conv(b.op("MaxPool", x, kernel_shape=[1, 1]), 6, 6, group=6),
                        axis=1)
        case "transposed":
            w = b.rng.normal(size=(6, 5, 2, 2)).astype(np.float32)
            return b.op("ConvTranspose", b.op("Relu", x), b.constant(w), strides=[2, 2])
        case "groups":
            return b.conv(b.op("Relu", x), 6, 8, 3, group=2)
    return b.conv(x, 6, 4, 3)


@pytest.mark.parametrize("kind", ["none", "leaky", "prelu", "pools", "flatten", "channels last", "mean", "two readers",
                                  "transposed", "groups"])
def test_equalizing_changes_no_result(kind):
    b = Build((1, 3, 8, 8), 3)
    net = b.network(between(b, kind, b.conv("x", 3, 6, 3, bad=4.0)))
    samples = samples_of(net)
    before, worst = outputs(net, samples), spread(net.layers[0])
    notes = equalize(net)
    assert spread(net.layers[0]) < worst / 2
    assert len(notes) == 1
    assert notes[0].startswith("Conv_0: channels by ")
    assert_same(before, outputs(net, samples))


@pytest.mark.parametrize("seed", range(3))
def test_equalizing_a_network_leaves_residual_sums_alone(seed):
    b, out = relu_net(seed)
    net = b.network(out)
    samples = samples_of(net)
    before = outputs(net, samples)
    kept = [layer.rows().copy() for layer in net.layers]
    equalize(net)
    assert_same(before, outputs(net, samples))
    made = {layer.name: layer for layer in net.layers}
    summed = [layer for layer in net.layers if any(n.op.name == "Add" for n in net.readers(layer.result))]
    assert len(summed) == 2
    for layer in summed:  # rows are divided by input channel only: their order of magnitude is that of their inputs
        assert layer not in [link.first for link in links(net)]
    read_alone = made[net.layers[3].name]  # reads the one summand, whose factors may not move
    old, new = kept[3], read_alone.rows()
    ratio = new[np.abs(old) > 1e-9] / old[np.abs(old) > 1e-9]
    assert np.allclose(ratio.reshape(len(old), -1), ratio.reshape(len(old), -1)[:, :1], rtol=1e-4)  # by output alone


def test_equalizing_settles_where_both_ranges_are_equally_filled():
    b = Build((1, 3, 8, 8), 5)
    net = b.network(b.conv(b.op("Relu", b.conv("x", 3, 6, 3, bad=4.0)), 6, 4))
    equalize(net)
    first, second = net.layers
    r1, r2 = np.abs(first.rows()).max(axis=1), np.abs(second.weight).max(axis=(0, 2, 3))
    np.testing.assert_allclose(r1 / r1.max(), r2 / r2.max(), rtol=1e-2)
    assert equalize(net) == []  # settled


def test_what_reads_a_tensor_beside_layers_stops_factors():
    b = Build((1, 3, 8, 8))
    x = b.op("Relu", b.conv("x", 3, 6, bad=2.0))
    net = b.network(b.conv(x, 6, 4), b.op("Sigmoid", x))
    assert equalize(net) == []
    net = b.network(b.conv(x, 6, 4), x)  # an output of the network
    assert equalize(net) == []


def relu6_net(seed=2):
    b = Build((1, 3, 8, 8), seed)
    return b, b.conv(b.relu6(b.conv("x", 3, 16, bad=2.0)), 16, 4)


def test_factors_keep_channels_below_a_relu6_below():
    b, out = relu6_net()
    net = b.network(out)
    samples = samples_of(net, 20, scale=2.0)
    seen = results_seen(net, samples)[net.layers[0].linear]
    reach = seen.high * MARGIN >= 6
    assert 0 < np.count_nonzero(reach) < 16
    before, weight = outputs(net, samples), net.layers[0].weight
    notes = equalize(net, ceilings_met(net, samples))
    assert_same(before, outputs(net, samples))
    assert f"{np.count_nonzero(reach)} of 16 held by ReLU6" in notes[0]
    np.testing.assert_array_equal(net.layers[0].weight[reach], weight[reach])
    assert results_seen(net, samples)[net.layers[0].linear].high[~reach].max() < 6.001 / MARGIN


def test_relu6_by_the_other_ways():
    b, out = relu6_net()
    assert equalize(b.network(out), ceilings="skip") == []
    assert equalize(b.network(out)) == []  # nothing is known of what lies below 6
    net = b.network(out)
    notes = equalize(net, ceilings="drop")
    assert notes[0] == "Conv_0: ReLU6 became ReLU"
    assert net.layers[0].clamp == (0.0, math.inf)
    assert [n.op.name for n in net.graph.nodes] == ["Conv", "Relu", "Conv"]
    small = samples_of(net, scale=0.01)
    assert_same(outputs(b.network(out), small), outputs(net, small))
    with pytest.raises(UsageError, match="no way 'twist' to treat ReLU6") as e:
        equalize(net, ceilings="twist")
    assert e.value.facts["want"] == "keep, skip, drop"
    with pytest.raises(InvariantError, match="has no ReLU6"):
        without_ceiling(net, net.layers[1])


def test_heights_below_a_relu6_are_the_largest_numbers_of_the_channels():
    b, out = relu6_net()
    net = b.network(out)
    samples = samples_of(net, 40, scale=2.0)
    linear = net.layers[0].linear
    run = runner(float_model(net), [net.name(linear)])
    z = np.concatenate([run(f)[0][0].reshape(16, -1) for f in samples], axis=1)
    np.testing.assert_array_equal(ceilings_met(net, samples)[linear], z.max(axis=1))


# absorption


def high_net(kernel=1):
    b = Build((1, 3, 8, 8), 4)
    x = b.op("Relu", b.conv("x", 3, 8, 3, shift=4.0))
    return b, b.conv(x, 8, 4, kernel)


def test_absorbing_changes_no_result_on_the_samples():
    b, out = high_net()
    net = b.network(out)
    samples = samples_of(net)
    before, bias = outputs(net, samples), net.layers[0].bias
    notes = absorb(net, results_seen(net, samples), exact=True)
    assert_same(before, outputs(net, samples))
    assert (net.layers[0].bias <= bias).all()
    assert (net.layers[0].bias < bias - 0.5).any()
    assert "channels lowered, by at most" in notes[0]
    np.testing.assert_allclose(results_seen(net, samples)[net.layers[0].linear].low.min(), 0, atol=1e-5)


def test_absorbing_by_deviations_is_near_and_padding_stops_it():
    b, out = high_net()
    net = b.network(out)
    samples = samples_of(net)
    before, seen = outputs(net, samples), results_seen(net, samples)[net.layers[0].linear]
    bias = net.layers[0].bias
    absorb(net, results_seen(net, samples))
    np.testing.assert_allclose(bias - net.layers[0].bias, np.maximum(0, seen.mean - 3 * seen.deviation), atol=1e-4)
    off = sum(np.sum((a - b) ** 2) for a, b in zip(before, outputs(net, samples), strict=True))
    assert off < 1e-4 * sum(np.sum(a**2) for a in before)
    b, out = high_net(3)
    net = b.network(out)
    assert absorb(net, results_seen(net, samples), exact=True) == []


# batch normalization


def normalized_net(act="Relu"):
    b = Build((1, 3, 16, 16), 6)
    x = b.op("Conv", "x", b.constant(b.rng.normal(size=(8, 3, 1, 1)).astype(np.float32)))
    shape = [b.rng.uniform(0.5, 2, 8), b.rng.normal(size=8) + 5.0, b.rng.normal(size=8), b.rng.uniform(0.5, 2, 8)]
    x = b.op("BatchNormalization", x, *(b.constant(s.astype(np.float32)) for s in shape))
    return b, b.conv(b.op(act, x), 8, 4), shape


def test_moments_of_batch_normalization_survive_its_folding_and_repairs():
    b, out, (gamma, beta, _, _) = normalized_net()
    net = b.network(out)
    mean, deviation = net.moments[net.layers[0].linear]
    np.testing.assert_allclose(mean, beta, rtol=1e-6)
    np.testing.assert_allclose(deviation, gamma, rtol=1e-6)
    first = net.layers[0].weight
    equalize(net)
    factors = (net.layers[0].weight / first)[:, 0, 0, 0]
    np.testing.assert_allclose(net.moments[net.layers[0].linear][0], beta * factors, rtol=1e-5)
    got, _ = input_moments(net)[net.layers[1].node]
    want, _ = clipped_normal(beta * factors, gamma * factors, 0.0, math.inf)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("limits", [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, math.inf)])
def test_moments_of_a_clamped_normal_variable(limits):
    mean, deviation = np.array([-3.0, -0.5, 0.0, 2.0, 5.9, 40.0]), np.array([1.0, 2.0, 0.5, 3.0, 1.0, 2.0])
    got = clipped_normal(mean, deviation, *limits)
    z = np.linspace(-10, 10, 400001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    for i in range(len(mean)):
        x = np.clip(mean[i] + deviation[i] * z, *limits)
        first = float(np.sum(x * density))
        assert got[0][i] == pytest.approx(first, abs=1e-4)
        assert got[1][i] == pytest.approx(math.sqrt(max(0.0, float(np.sum(x * x * density)) - first**2)), abs=2e-3)


def test_absorbing_and_correcting_without_data():
    b, out, _ = normalized_net()
    net = b.network(out)
    notes = absorb(net)
    assert notes
    assert (net.moments[net.layers[0].linear][0] < 6).all()
    calibrate(net, statistics(net, samples_of(net)))
    notes = fast(net, None)
    assert "Conv_0: nothing is known of its input's means, not corrected" in notes
    second = net.layers[1]
    inputs, _ = input_moments(net)[second.node]
    off = (second.seen - second.weight)[:, :, 0, 0] @ inputs
    given = b.network(out)
    absorb(given)
    np.testing.assert_allclose(given.layers[1].bias - second.bias, off, atol=1e-6)


# bias correction


def test_fast_correction_leaves_no_mean_error_of_the_weights():
    b = Build((1, 4, 9, 9), 7)
    out = b.conv("x", 4, 6, 3, bad=2.0, strides=[2, 2])  # padding and strides: means of inputs alone are not enough
    net = b.network(out)
    ramp = np.linspace(0, 4, 9, dtype=np.float32)
    samples = ListedSamples([{"x": f["x"] + ramp} for f in samples_of(net)])
    want = np.mean([a.reshape(6, -1).mean(axis=1) for a in outputs(net, samples)], axis=0)
    calibrate(net, statistics(net, samples))
    layer = net.layers[0]

    def off():
        layer.weight, kept = layer.seen, layer.weight
        got = np.mean([a.reshape(6, -1).mean(axis=1) for a in outputs(net, samples)], axis=0)
        layer.weight = kept
        return np.abs(got - want).max()

    before = off()
    notes = fast(net, samples)
    assert off() < 1e-3 * before
    assert notes[0].startswith("Conv_0: means were off by ")


LAYERS = {
    "groups": lambda b: b.op("Conv", "x", b.constant(b.rng.normal(size=(6, 2, 3, 2)).astype(np.float32)), group=2,
                             dilations=[2, 1], strides=[1, 2], pads=[2, 0, 1, 1], kernel_shape=[3, 2]),
    "depthwise": lambda b: b.op("Conv", "x", b.constant(b.rng.normal(size=(4, 1, 5, 5)).astype(np.float32)), group=4,
                                auto_pad="SAME_UPPER", strides=[2, 2], kernel_shape=[5, 5]),
    "transposed": lambda b: b.op("ConvTranspose", "x", b.constant(b.rng.normal(size=(4, 3, 3, 3)).astype(np.float32)),
                                 strides=[2, 1], dilations=[1, 2], pads=[1, 0, 0, 2], output_padding=[1, 0],
                                 kernel_shape=[3, 3]),
    "matmul": lambda b: b.matmul("x", 9, 5),
    "gemm": lambda b: b.gemm(b.op("Flatten", "x"), 4 * 7 * 9, 5),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_fast_correction_of_any_layer(kind):
    """The means of what the layer makes with its weights as integers show them are those that it made before."""
    b = Build((1, 4, 7, 9), 3)
    net = b.network(LAYERS[kind](b))
    (layer,) = net.layers
    ramp = np.linspace(0, 4, 9, dtype=np.float32)
    samples = ListedSamples([{"x": f["x"] + ramp} for f in samples_of(net)])
    calibrate(net, statistics(net, samples))
    bias, kept = np.zeros(layer.channels) if layer.bias is None else layer.bias.astype(np.float64), layer.weight

    def means():
        rows = [a.reshape(net.graph.values[net.graph.outputs[0]].shape) for a in outputs(net, samples)]
        axis = 1 if layer.kind in ("conv", "transposed") else -1
        return np.mean([np.moveaxis(a, axis, 0).reshape(layer.channels, -1).mean(axis=1) for a in rows], axis=0)

    want = means()
    layer.weight = layer.seen
    off = means() - want
    layer.weight = kept
    fast(net, samples)
    assert np.abs(off).max() > 1e-4
    np.testing.assert_allclose(bias - layer.bias, off, atol=2e-3 * np.abs(off).max())


def means_off(net, means, samples):
    """Mean error by channel of each layer in the integer network, in steps of the layer's sums."""
    names = [f"{net.name(layer.linear)}_float" if layer.linear in net.graph.outputs else net.name(layer.linear)
             for layer in net.layers]
    run = runner(integer_model(net), names, plain=True)
    found = []
    rows = [run(feeds) for feeds in samples]
    for i, layer in enumerate(net.layers):
        got = np.mean([np.moveaxis(r[i], 1, 0).reshape(layer.channels, -1).mean(axis=1) for r in rows], axis=0)
        found.append(np.abs(got - means[layer.node].mean(axis=0)).max() / np.abs(means[layer.node]).max())
    return found


@pytest.mark.parametrize("rules", [PER_TENSOR, PER_CHANNEL], ids=["tensor", "channel"])
def test_full_correction_leaves_no_mean_error_anywhere(rules):
    b, out = relu_net(3)
    net = b.network(out, rules=rules)
    samples = samples_of(net, 12)
    calibrate(net, statistics(net, samples))
    means = linear_means(net, samples)
    before = means_off(net, means, samples)
    notes = full(net, samples, means)
    after = means_off(net, means, samples)
    assert len(notes) == len(net.layers)
    assert max(before) > 5e-3
    assert max(after) < 1e-3  # sums that lie between two integers are rounded one way here, the other there


def test_full_correction_takes_fewer_samples_where_memory_is_short():
    b, out = relu_net(3)
    biases = []
    for cache, count in ((1 << 20, 8), (8000, 8), (1 << 20, 3)):
        net = b.network(out)
        samples = samples_of(net, count)
        calibrate(net, statistics(net, samples_of(net, 8)))
        notes = full(net, samples, cache=cache)
        biases.append([layer.bias for layer in net.layers])
        if cache == 8000:
            assert notes[-1].startswith("full bias correction saw ")
            assert "of 8 samples: more do not fit into 0 MiB" in notes[-1]
    assert all(np.isfinite(x).all() for x in biases[1])
    with pytest.raises(UsageError, match="no samples"):
        full(net, ListedSamples([]))


def test_a_bias_appears_where_there_was_none():
    b = Build((1, 4, 8, 8), 8)
    out = b.op("Relu", b.op("Conv", "x", b.constant(b.rng.normal(size=(6, 4, 3, 3)).astype(np.float32))))
    net = b.network(out)
    samples = samples_of(net)
    calibrate(net, statistics(net, samples))
    assert net.layers[0].bias is None
    full(net, samples)
    assert net.layers[0].bias.shape == (6,)
    assert np.isfinite(decibels(net, outputs(b.network(out), samples), samples))


# clipping


def test_clipping_narrows_ranges_that_outliers_made():
    b = Build((1, 8, 8, 8), 9)
    x = b.op("Relu", b.conv("x", 8, 8, shift=0.5))
    net = b.network(b.op("Relu", b.conv(x, 8, 8, 3)))
    samples = samples_of(net, 8)
    reference = outputs(net, samples)
    seen = statistics(net, samples)
    net.layers[1].weight = net.layers[1].weight.copy()
    net.layers[1].weight[:, 0] = 0  # nobody looks at the channel with the outliers
    reference = outputs(net, samples)
    first = net.of[net.layers[0].result]
    seen[first.value].high = 30.0
    for bits in (8, 4):
        first.scheme = Scheme(bits=bits)
        calibrate(net, seen)
        before, scale = decibels(net, reference, samples), float(first.params.scales[0])
        notes = clip(net, samples)
        assert any(n.startswith(f"{net.name(first.value)}: range to ") for n in notes)
        assert first.params.scales[0] < 0.7 * scale
        assert decibels(net, reference, samples) > before + 2


def test_clipping_keeps_ranges_that_are_prescribed_or_needed():
    b = Build((1, 8, 8, 8), 9)
    x = b.op("Sigmoid", b.conv("x", 8, 8))
    net = network(b.graph(b.conv(x, 8, 8)), Rules("t", "t", "onnx", (Scheme(),), (Scheme(symmetric=True),),
                                                  fixed={("Sigmoid", "int8"): (1 / 256, -128)}))
    samples = samples_of(net, 4)
    calibrate(net, statistics(net, samples))
    clip(net, samples)
    assert float(net.of[net.layers[1].data].params.scales[0]) == 1 / 256


# migration


def attention_net(kind, seed=0):
    b = Build((1, 12, 16), seed)
    gamma = np.ones(16, np.float32)
    gamma[[3, 11]] = 60.0  # channels of outliers
    beta = b.rng.normal(size=16).astype(np.float32)
    match kind:
        case "norm":
            x = b.op("LayerNormalization", "x", b.constant(gamma), b.constant(beta))
        case "spelled":
            mean = b.op("ReduceMean", "x", axes=[-1])
            d = b.op("Sub", "x", mean)
            v = b.op("Sqrt", b.op("ReduceMean", b.op("Mul", d, d), axes=[-1]))
            x = b.op("Add", b.op("Mul", b.op("Div", d, v), b.constant(gamma)), b.constant(beta))
        case "layer":
            w = (b.rng.normal(size=(16, 16)) * gamma).astype(np.float32)
            x = b.op("Relu", b.op("Add", b.op("MatMul", "x", b.constant(w)), b.constant(beta)))
    out = b.op("Add", b.matmul(x, 16, 8), b.matmul(x, 16, 8, add=False))
    for t in b.constants[-3:]:  # what large channels are worth is not large
        if t.dims == [16, 8]:
            w = numpy_helper.to_array(t) / np.where(gamma > 1, 60, 1).astype(np.float32)[:, None]
            t.CopyFrom(numpy_helper.from_array(w, t.name))
    return b, out


@pytest.mark.parametrize("kind", ["norm", "spelled", "layer"])
def test_migration_changes_no_result_and_helps(kind):
    b, out = attention_net(kind)
    net = b.network(out)
    samples = samples_of(net, 8)
    reference = outputs(net, samples)
    calibrate(net, statistics(net, samples))
    before = decibels(net, reference, samples)
    net = b.network(out)
    notes = smooth(net, samples)
    assert len(notes) == 1
    assert "times the median, divided by" in notes[0]
    assert_same(reference, outputs(net, samples))
    onnx.checker.check_model(onnx.ModelProto.FromString(float_model(net)))
    calibrate(net, statistics(net, samples))
    assert decibels(net, reference, samples) > before + 3


def test_migration_by_a_multiplication_only_where_asked():
    b = Build((1, 12, 16))
    net = b.network(b.matmul("x", 16, 8))
    samples = ListedSamples([{"x": f["x"] * np.where(np.arange(16) == 5, 40, 1).astype(np.float32)}
                             for f in samples_of(net, 8)])
    reference = outputs(net, samples)
    assert smooth(net, samples) == []
    assert [n.op.name for n in net.graph.nodes] == ["MatMul", "Add"]
    assert len(smooth(net, samples, insert=True)) == 1
    assert [n.op.name for n in net.graph.nodes] == ["Mul", "MatMul", "Add"]
    net.graph.verify()
    assert_same(reference, outputs(net, samples))
    calibrate(net, statistics(net, samples))
    assert decibels(net, reference, samples) > 20


def test_migration_leaves_networks_without_outliers_alone():
    b, out = relu_net(bad=0.5)
    net = b.network(out)
    assert smooth(net, samples_of(net), insert=True) == []
    with pytest.raises(UsageError, match="out of range") as e:
        smooth(net, samples_of(net), alpha=1.5)
    assert e.value.facts["got"] == "alpha = 1.5"


# all together


def spoiled(seed):
    """A network whose channels' ranges are far apart, though none matters more than the others."""
    b, out = relu_net(seed, bad=0.0)
    net = b.network(out)
    rng = np.random.default_rng(seed)
    for link in links(net):
        factors = 10 ** rng.uniform(-1, 1, link.first.channels)
        scale_output(net, link.first, factors)
        for reader, channels in link.readers:
            scale_input(reader, 1 / factors[channels])
    return net


def repaired(seed):
    net = spoiled(seed)
    samples = samples_of(net, 12)
    notes = equalize(net, ceilings_met(net, samples))
    notes += absorb(net, results_seen(net, samples))
    calibrate(net, statistics(net, samples))
    notes += clip(net, samples)
    notes += full(net, samples)
    return net, notes


@pytest.mark.parametrize("seed", range(3))
def test_repairs_rescue_a_network_with_bad_channels(seed):
    net = spoiled(seed)
    samples, fresh = samples_of(net, 12), samples_of(net, 12, seed=99)
    reference = outputs(net, fresh)
    calibrate(net, statistics(net, samples))
    plain = decibels(net, reference, fresh)
    assert decibels(repaired(seed)[0], reference, fresh) > plain + 6


def test_repairs_give_the_same_bytes_each_time():
    (a, notes), (b, again) = repaired(1), repaired(1)
    assert notes == again
    assert integer_model(a) == integer_model(b)
