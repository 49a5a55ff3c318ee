"""Roundings learned from second moments: the error that they say is the one there is, and none better is found."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npulab.errors import ModelError, UsageError
from npulab.importers import load
from npulab.quantization import rounding
from npulab.quantization.calibrate import calibrate, statistics
from npulab.quantization.emit import float_model, integer_model
from npulab.quantization.gram import Moments, Patches, grouped, moments, reference, upto
from npulab.quantization.network import network
from npulab.quantization.rounding import Grid, Problem, adaround, descent, nearest, relaxed, sequential, staged
from npulab.quantization.session import runner
from npulab.quantization.types import ListedSamples, Rules, Scheme
from npulab.zoo.builder import Net
from quantized import samples, small

pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")

PER_CHANNEL = Scheme(4, symmetric=True, narrow=True, per_channel=True)
SCHEMES = [PER_CHANNEL, Scheme(4, symmetric=True, narrow=True), Scheme(2, symmetric=True, per_channel=True),
           Scheme(4, symmetric=True, narrow=True, per_channel=True, power_of_two=True),
           Scheme(4, signed=False, per_channel=True), Scheme(4, signed=False)]


def ready(scheme=PER_CHANNEL, graph=None, count=12):
    graph = graph or small()
    net = network(graph, Rules("g", "g", "onnx", (Scheme(),), (scheme,)))
    data = samples(graph, count)
    calibrate(net, statistics(net, data))
    return net, data


def keeps(layer, scheme):
    """What was rounded is of the scheme."""
    assert layer.codes.dtype == scheme.holder
    assert layer.codes.shape == layer.weight.shape
    assert layer.codes.min() >= scheme.low
    assert layer.codes.max() <= scheme.high
    assert layer.params.scheme == scheme
    assert (layer.params.axis is None) == (not scheme.per_channel)
    assert not scheme.power_of_two or np.all(np.frexp(layer.params.scales)[0] == 0.5)
    assert not scheme.symmetric or np.all(layer.params.zeros == scheme.middle)


def every_kind():
    """A strided convolution with uneven pads, a grouped, a dilated and a transposed one, a matrix product."""
    net = Net("kinds", 3)
    x = net.input("x", 1, 4, 9, 8)
    rng = np.random.default_rng(3)

    def weight(name, *shape):
        return net.constant(name, rng.normal(size=shape).astype(np.float32) * 0.3)

    x = net.node("Conv", [x, weight("w0", 6, 4, 3, 3), weight("b0", 6)], (1, 6, 5, 4), "uneven",
                 strides=[2, 2], pads=[0, 1, 2, 0], kernel_shape=[3, 3])
    x = net.node("Conv", [x, weight("w1", 4, 3, 3, 1), weight("b1", 4)], (1, 4, 5, 4), "groups", group=2,
                 auto_pad="SAME_LOWER", kernel_shape=[3, 1])
    x = net.node("Conv", [x, weight("w2", 4, 4, 2, 2)], (1, 4, 3, 2), "dilated", dilations=[2, 2], kernel_shape=[2, 2])
    x = net.node("ConvTranspose", [x, weight("w3", 4, 3, 3, 3), weight("b3", 3)], (1, 3, 6, 4), "transposed",
                 strides=[2, 2], pads=[1, 0, 0, 1], kernel_shape=[3, 3])
    x = net.node("ConvTranspose", [x, weight("w5", 3, 3, 3, 2)], (1, 3, 13, 7), "of a size", strides=[2, 2],
                 output_shape=[13, 7], output_padding=[1, 0], kernel_shape=[3, 2])
    x = net.node("MatMul", [x, weight("w4", 7, 5)], (1, 3, 13, 5), "product")
    net.output(x, "y")
    return load(net.onnx())


def outputs(net, model, data, layer):
    """Results of a layer before its clamp over the samples, (channels, n)."""
    axis = -1 if layer.kind in ("gemm", "matmul") else 1
    run = runner(upto(model, [net.name(layer.linear)]), [net.name(layer.linear)])
    return np.concatenate([np.moveaxis(run(f)[0], axis, 0).reshape(layer.channels, -1) for f in data], axis=1)


@pytest.mark.parametrize("make", [every_kind, small])
def test_the_error_of_second_moments_is_the_error_of_the_results(make):
    """The witness is ONNX Runtime: the float network, and the same with other weights reading quantized tensors."""
    net, data = ready(graph=make(), count=5)
    aim = reference(net)
    found = moments(net, net.layers, data, aim)
    rng = np.random.default_rng(1)
    for layer, m in zip(net.layers, found, strict=True):
        was, bias = layer.weight, layer.bias
        before = outputs(net, aim.model(), data, layer).astype(np.float64)
        centred = layer.bias is not None or layer.kind != "matmul"
        problem = Problem.of(grouped(layer).astype(np.float64), *m.covariances(centred))
        layer.weight = (was + 0.1 * rng.normal(size=was.shape)).astype(np.float32)
        said = problem.error(grouped(layer).astype(np.float64))
        point = net.of[layer.data].params
        if centred:
            layer.bias = ((0 if bias is None else bias) + m.drift(grouped(layer))).astype(np.float32)
        name = net.name(layer.data)
        run = runner(upto(aim.model(), [name]), [name])
        model = float_model(net)
        cut = _reading(model, name)
        made = []
        for f in data:
            seen = point.seen(run(f)[0])
            made.append(outputs(net, cut, [{**_fed(cut, f), name: seen}], layer))
        after = np.concatenate(made, axis=1)
        true = ((after - before) ** 2).mean(axis=1)
        np.testing.assert_allclose(said, true, rtol=2e-3, atol=1e-7 * float((before**2).mean()), err_msg=layer.name)
        layer.weight, layer.bias = was, bias


def _reading(model, name):
    """The model with its tensor `name` as an input."""
    import onnx

    proto = onnx.ModelProto.FromString(model)
    if name in {i.name for i in proto.graph.input}:
        return model
    for node in proto.graph.node:
        for i, out in enumerate(node.output):
            if out == name:
                node.output[i] = f"{name}_unused"
    proto.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return proto.SerializeToString()


def _fed(model, feeds):
    import onnx

    names = {i.name for i in onnx.ModelProto.FromString(model).graph.input}
    return {k: v for k, v in feeds.items() if k in names}


def test_few_places_of_large_tensors_are_enough_and_the_same_each_time(monkeypatch):
    net, data = ready()
    layer = net.layers[0]
    full = moments(net, [layer], data, reference(net))[0]
    monkeypatch.setattr("npulab.quantization.gram.ROWS", 12 * 20)
    monkeypatch.setattr("npulab.quantization.gram.PATCHES_A_WEIGHT", 1)
    few, again = (moments(net, [layer], data, reference(net))[0] for _ in range(2))
    assert (full.count, few.count) == (12 * 64, 12 * 20)
    assert few.second.tobytes() == again.second.tobytes()
    assert len({tuple(Patches(net, layer, 12).places(i)) for i in range(12)}) == 12  # others in each sample
    assert np.trace(few.second[0]) / few.count == pytest.approx(np.trace(full.second[0]) / full.count, rel=0.2)


def problem_of(seed, k, rows=3, bits=4):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(k, k)) * 10 ** rng.uniform(-1, 0.5, size=k)
    second = (mixed @ mixed.T / k)[None]
    weight = rng.normal(size=(1, rows, k))
    problem = Problem.of(weight, second, second, np.einsum("grk,gkl,grl->gr", weight, second, weight).ravel())
    scheme = Scheme(bits, symmetric=True, narrow=True, per_channel=True)
    scale = np.abs(weight).max(axis=2, keepdims=True) / scheme.high
    return problem, Grid(None, scheme, scale, np.zeros_like(scale))


def cost(problem, grid, codes):
    return problem.cost((codes - grid.zero) * grid.scale - problem.target)[0]


def least(problem, grid):
    """Of all roundings down and up, by trying each."""
    floor = np.floor(problem.target[0] / grid.scale[0])
    low, high = grid.scheme.low, grid.scheme.high
    ups = np.array(list(itertools.product((0, 1), repeat=floor.shape[1])))
    found = []
    for f, scale, target in zip(floor, grid.scale[0, :, 0], problem.target[0], strict=True):
        off = np.clip(f + ups, low, high) * scale - target
        found.append(((off @ problem.second[0]) * off).sum(axis=1).min())
    return np.array(found)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 20), k=st.integers(1, 8), bits=st.sampled_from((2, 4)))
def test_behind_descent_no_step_of_a_single_weight_helps(seed, k, bits):
    problem, grid = problem_of(seed, k, bits=bits)
    found = rounding.best_of(problem, grid)
    assert np.all(cost(problem, grid, found) <= cost(problem, grid, nearest(problem.target, grid)) + 1e-12)
    step = np.square(grid.scale[0]) * np.diagonal(problem.second[0])
    for i in range(k):
        for way in (-1, 1):
            moved = found.copy()
            moved[..., i] = np.clip(moved[..., i] + way, grid.scheme.low, grid.scheme.high)
            assert np.all(cost(problem, grid, moved) >= cost(problem, grid, found) - 2e-6 * step[:, i] - 1e-12)


def test_on_average_descent_is_within_a_twentieth_of_the_best():
    ratios = []
    for seed in range(40):
        problem, grid = problem_of(seed, 8)
        ratios.append(cost(problem, grid, rounding.best_of(problem, grid)).sum() / least(problem, grid).sum())
    assert np.mean(ratios) < 1.05
    assert np.mean(np.array(ratios) <= 1 + 1e-9) > 0.4


def test_sequential_rounding_is_babais_nearest_plane_in_exact_numbers():
    """The oracle: Fractions, and the projection as it is defined."""
    problem, grid = problem_of(5, 5, rows=1)
    order = [int(i) for i in np.argsort(np.diagonal(problem.second[0]), kind="stable")]
    h = [[Fraction(float(problem.second[0, i, j])) for j in order] for i in order]
    t, s = [Fraction(float(problem.target[0, 0, i])) for i in order], Fraction(float(grid.scale[0, 0, 0]))
    # H = U^T D U with unit U: eliminate from the first on
    a = [row[:] for row in h]
    for i in range(5):
        for j in range(i + 1, 5):
            f = a[j][i] / a[i][i]
            a[j] = [x - f * y for x, y in zip(a[j], a[i], strict=True)]
    off, codes = [Fraction(0)] * 5, [0] * 5
    for i in reversed(range(5)):
        wish = (t[i] - sum(a[i][j] / a[i][i] * off[j] for j in range(i + 1, 5))) / s
        codes[i] = max(-7, min(7, round(wish)))
        off[i] = codes[i] * s - t[i]
    found = sequential(problem, [grid])[0, 0, 0]
    assert [int(found[i]) for i in order] == codes


def test_all_solvers_beat_the_nearest_integers_on_related_inputs():
    problem, grid = problem_of(0, 60, rows=20)
    plain = cost(problem, grid, nearest(problem.target, grid)).sum()
    first = sequential(problem, [grid])[0]
    then = descent(problem, grid, first)
    soft = relaxed(problem, grid, 300)
    assert cost(problem, grid, first).sum() < 0.7 * plain
    assert cost(problem, grid, then).sum() <= cost(problem, grid, first).sum()
    assert cost(problem, grid, soft).sum() < 0.8 * plain
    for codes in (first, then, soft):
        assert codes.min() >= -7
        assert codes.max() <= 7
        assert (codes == np.rint(codes)).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("solver", ["descent", "relaxed"])
def test_every_scheme_is_kept_and_noise_shrinks(scheme, solver, monkeypatch):
    monkeypatch.setattr(rounding, "ITERATIONS", 60)
    net, data = ready(scheme)
    truth = _truth(net, data)
    before = _noise(net, data, truth)
    notes = adaround(net, data, solver=solver)
    assert [n.split(":")[0] for n in notes] == [layer.name for layer in net.layers]
    for layer in net.layers:
        keeps(layer, scheme)
    assert _noise(net, data, truth) < before
    for note in notes:
        start, end = (float(x) for x in note.split("noise ")[1].removesuffix(" dB").split(" -> "))
        assert end <= start, note


def _truth(net, data):
    run = runner(float_model(net), ["y"])
    return [run(f)[0] for f in data]


def _noise(net, data, truth):
    run = runner(integer_model(net), ["y"], plain=True)
    return float(sum(((run(f)[0] - y) ** 2).sum() for f, y in zip(data, truth, strict=True)))


def test_scales_stay_where_they_are_not_to_change():
    net, data = ready()
    before = [layer.params for layer in net.layers]
    adaround(net, data, scales=False)
    assert [layer.params for layer in net.layers] == before


def test_the_same_bytes_each_time_and_with_passes(monkeypatch):
    made = []
    for cores in (1, 2, 1):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        net, data = ready()
        adaround(net, data, passes=0)
        made.append(integer_model(net))
    assert made[0] == made[1] == made[2]


def test_groups_of_layers_follow_each_other():
    net, _ = ready()
    whole = staged(net, net.layers, 0)
    assert [layer.name for g in whole for layer in g] == [layer.name for layer in net.layers]
    assert len(whole) == 4
    halves = staged(net, net.layers, 2)
    assert len(halves) == 2
    assert [x for g in halves for x in g] == [x for g in whole for x in g]


def test_passes_take_the_rounded_layers_before_into_account(monkeypatch):
    seen = []
    real = moments

    def spy(net, layers, *rest, **more):
        seen.append(([x.name for x in layers], [x.name for x in net.layers if x.codes is not None]))
        return real(net, layers, *rest, **more)

    monkeypatch.setattr(rounding, "moments", spy)
    net, data = ready()
    adaround(net, data, passes=0)
    groups = [[x.name for x in g] for g in staged(net, net.layers, 0)]
    assert seen == [(g, [x.name for x in net.layers if any(x.name in h for h in groups[:i])])
                    for i, g in enumerate(groups)]


def test_biases_take_the_mean_error_away():
    net, data = ready()
    layer = net.layers[0]
    aim = reference(net)
    m = moments(net, [layer], data, aim)[0]
    rounding.round_layer(net, m, aim.biases[0])
    shown = net.of[layer.data].params
    x = [shown.seen(f["x"]) for f in data]
    run = runner(upto(_swapped(net), [net.name(layer.linear)]), [net.name(layer.linear)])
    after = np.mean([run({"x": a})[0].mean(axis=(0, 2, 3)) for a in x], axis=0)
    before = outputs(net, aim.model(), data, layer).mean(axis=1)
    np.testing.assert_allclose(after, before, atol=1e-5)


def _swapped(net):
    was = [layer.weight for layer in net.layers]
    for layer in net.layers:
        layer.weight = layer.seen
    try:
        return float_model(net)
    finally:
        for layer, w in zip(net.layers, was, strict=True):
            layer.weight = w


def test_the_float_network_that_is_aimed_at_may_be_from_before_biases_changed():
    net, data = ready()
    aim = reference(net)
    adaround(net, data)
    once = integer_model(net)
    for layer in net.layers:
        layer.codes = None
    other, data = ready()
    start = reference(other)
    for layer in other.layers:
        layer.bias = layer.bias + 5
    adaround(other, data, aim=start)
    assert integer_model(other) == once
    assert aim.model() == start.model()


def test_what_goes_wrong_is_said():
    net, data = ready()
    with pytest.raises(UsageError, match="no solver 'best'") as e:
        adaround(net, data, solver="best")
    assert e.value.facts["want"] == "descent or relaxed"
    with pytest.raises(UsageError, match="no samples"):
        adaround(net, ListedSamples([]))
    bad = ListedSamples([{"x": np.full((1, 3, 16, 16), np.nan, np.float32)}], "a test")
    with pytest.raises(ModelError, match="is not finite") as e:
        adaround(net, bad)
    assert e.value.facts["got"] == "sample 1 of a test"


def test_numbers_whose_sums_are_no_float32_are_refused():
    net, data = ready()
    large = ListedSamples([{"x": f["x"] * np.float32(1e19)} for f in data], "a test")
    for passes in (1, 2):
        calibrate(net, statistics(net, large))
        with pytest.raises(UsageError, match="numbers too large for adaptive rounding") as e:
            adaround(net, large, passes)
        assert "e+19" in e.value.facts["got"]
        assert all(layer.codes is None for layer in net.layers)


def test_layers_whose_inputs_are_all_zero_keep_their_nearest_integers():
    net, _ = ready()
    zeros = ListedSamples([{"x": np.zeros((1, 3, 16, 16), np.float32)}])
    plain = net.layers[0].params
    adaround(net, zeros, scales=False)
    assert (net.layers[0].codes == plain.codes(net.layers[0].weight)).all()
    assert np.isfinite(net.layers[0].bias).all()
    assert isinstance(moments(net, net.layers[:1], zeros, reference(net))[0], Moments)
