"""Sensitivities against networks with one part in integers, choices against all choices, and what budgets promise."""

import itertools
import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import npulab.quantization.allot as allot
import npulab.quantization.sensitivity as sensitivity
from npulab.dialects import from_tflite
from npulab.errors import CapacityError, UsageError
from npulab.importers import load
from npulab.importers.onnx import read_onnx
from npulab.quantization.agreement import agreement, expected_agreement, noise_power, predicted_agreement
from npulab.quantization.allot import first_good, front, stops
from npulab.quantization.calibrate import calibrate, statistics
from npulab.quantization.compare import noises
from npulab.quantization.configurations import (
    FLOAT,
    Configuration,
    Trial,
    assign,
    configuration,
    size,
    total,
)
from npulab.quantization.emit import float_model, integer_model
from npulab.quantization.mixed import Budget, by_time, parse_seconds, parse_size, search
from npulab.quantization.network import network
from npulab.quantization.sensitivity import (
    decibels,
    ends,
    expected_noise,
    macs,
    rank_correlation,
    ratio,
    relative,
    sensitivities,
)
from npulab.quantization.session import runner
from npulab.quantization.types import ListedSamples, Rules, Scheme
from npulab.quantization.wide import search_wide
from npulab.quantizing_budget import Asked, keep, latency
from npulab.runtime.datasets import input_tensors, open_samples
from npulab.targets.facts.quantization import rules_of
from shared import MODELS, SHARED, needs_shared

TENSORS = (Scheme(), Scheme(16, symmetric=True))
WEIGHTS = tuple(Scheme(bits, symmetric=True, narrow=True, per_channel=True) for bits in (8, 4, 2))
RULES = Rules("t", "Chip", "onnx", TENSORS, WEIGHTS)


def model(softmax=False, join=False, seed=1):
    """Convolutions, a residual sum, a depthwise one, a mean and a matrix product; 10 classes."""
    rng = np.random.default_rng(seed)
    nodes, constants = [], []

    def layer(x, name, outs, ins, kernel, group=1, relu=True):
        w = rng.normal(size=(outs, ins // group, kernel, kernel)) / math.sqrt(ins // group * kernel**2) * 1.4
        constants.append(numpy_helper.from_array(w.astype(np.float32), f"{name}_w"))
        constants.append(numpy_helper.from_array(rng.normal(size=outs).astype(np.float32) * 0.1, f"{name}_b"))
        pad = [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", [x, f"{name}_w", f"{name}_b"], [f"{name}_y"], name, pads=pad,
                                      group=group))
        if not relu:
            return f"{name}_y"
        nodes.append(helper.make_node("Relu", [f"{name}_y"], [f"{name}_r"], f"{name}_relu"))
        return f"{name}_r"

    x = layer("x", "stem", 8, 3, 3)
    y = layer(x, "branch", 8, 8, 3, relu=False)
    nodes.append(helper.make_node("Add", [x, y], ["sum"], "add"))
    x = layer("sum", "deep", 8, 8, 3, group=8)
    if join:
        nodes.append(helper.make_node("Concat", [x, "sum"], ["joined"], "concat", axis=1))
        x = layer("joined", "point", 16, 16, 1)
    else:
        x = layer(x, "point", 16, 8, 1)
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["mean"], "pool"))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"], "flatten"))
    constants.append(numpy_helper.from_array(rng.normal(size=(16, 10)).astype(np.float32), "last_w"))
    nodes.append(helper.make_node("Gemm", ["flat", "last_w"], ["logits"], "last"))
    if softmax:
        nodes.append(helper.make_node("Softmax", ["logits"], ["chances"], "softmax"))
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("chances" if softmax else "logits", TensorProto.FLOAT, [1, 10])], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=11)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def small(rules=RULES, **how):
    return network(read_onnx(model(**how), "small"), rules)


def samples(count=12, seed=5):
    rng = np.random.default_rng(seed)
    return ListedSamples([{"x": rng.normal(size=(1, 3, 12, 12)).astype(np.float32)} for _ in range(count)])


def trial(rules=RULES, **how):
    net = small(rules, **how)
    return Trial(net, samples(), statistics(net, samples()))


# the knapsack


@pytest.mark.parametrize("seed", range(6))
def test_the_front_is_that_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    items = [[(float(c), float(n)) for c, n in zip(rng.integers(0, 6, k), rng.integers(0, 9, k) / 8, strict=True)]
             for k in rng.integers(1, 5, 6)]
    sums = {tuple(np.sum([o[i] for o, i in zip(items, choice, strict=True)], axis=0))
            for choice in itertools.product(*(range(len(o)) for o in items))}
    best = sorted(s for s in sums if not any(t != s and t[0] <= s[0] and t[1] <= s[1] for t in sums))
    found = front(items)
    assert list(zip(found.costs, found.noises, strict=True)) == best
    for i in range(len(found)):
        chosen = [o[k] for o, k in zip(items, found.choice(i), strict=True)]
        assert tuple(np.sum(chosen, axis=0)) == best[i]
    for most in range(20):
        i = found.within(most)
        assert i == max((k for k, s in enumerate(best) if s[0] <= most), default=-1)


def test_a_long_front_is_thinned_to_choices_that_are_there(monkeypatch):
    rng = np.random.default_rng(1)
    items = [[(0.0, 1.0 * w), (1.0 + w, 0.3 * w), (3.0 + w, 0.0)] for w in rng.uniform(0.5, 2, 14)]
    full = front(items)
    monkeypatch.setattr(allot, "POINTS", 200)
    thin = front(items)
    assert len(thin) <= 200 < len(full)
    for i in range(0, len(thin), 17):
        chosen = np.sum([o[k] for o, k in zip(items, thin.choice(i), strict=True)], axis=0)
        assert np.allclose(chosen, [thin.costs[i], thin.noises[i]])
        assert full.noises[full.within(thin.costs[i])] <= thin.noises[i] + 1e-12
    assert thin.noises[thin.within(15.0)] <= full.noises[full.within(15.0)] * 1.05


def test_halving_finds_the_first_good_one():
    assert [first_good(range(9), lambda i, k=k: i >= k) for k in range(9)] == list(range(9))
    assert first_good(range(9), lambda i: False) is None
    f = front([[(0, 1.0), (1, 0.5)]] * 10 + [[(0, w), (2, w / 3)] for w in np.linspace(1, 2, 30)])
    places = stops(f)
    assert places[0] == 0
    assert places[-1] == len(f) - 1
    assert len(places) <= allot.STOPS + 2


# sensitivities


@pytest.mark.parametrize("join", [False, True])
def test_each_sensitivity_is_that_of_a_network_with_one_part_in_integers(join):
    net, few = small(join=join), samples(3)
    seen = statistics(net, few)
    rows = sensitivities(net, few, seen)
    assert {(r.kind, r.bits) for r in rows} == {("weights", 8), ("weights", 4), ("weights", 2), ("tensor", 8),
                                                ("tensor", 16)}
    for r in rows:
        one = small(join=join)
        part = (one.layers if r.kind == "weights" else one.points)[r.index]
        for other in (one.layers if r.kind == "weights" else one.points):
            other.scheme = next(s for s in (WEIGHTS if r.kind == "weights" else TENSORS) if s.bits == r.bits)
        calibrate(one, seen)
        for other in (*one.points, *one.layers):
            if other is not part:
                other.scheme = other.params = None
        assert r.name == (part.name if r.kind == "weights" else one.name(part.value))
        got = noises(float_model(one), integer_model(one), {"logits": "logits"}, few)["logits"]
        assert r.noise == pytest.approx(got.noise / got.signal, rel=0.02, abs=1e-11), r
    assert sum(r.share for r in rows if r.bits == 8) == pytest.approx(1)


def test_a_concatenation_of_tensors_in_its_own_scale_adds_nothing():
    net = small(join=True)
    seen = statistics(net, samples())
    assert "joined" in {r.name for r in sensitivities(net, samples(), seen)}  # the sum has a scale of its own
    seen = {v: seen[next(p.value for p in net.points if net.name(p.value) == "joined")] for v in seen}
    names = {r.name for r in sensitivities(net, samples(), seen)}
    assert "joined" not in names
    assert "deep_r" in names


def test_the_noise_of_the_whole_is_about_the_sum_and_the_prediction_ranks_alike():
    net, many = small(), samples(8)
    seen = statistics(net, many)
    rows = sensitivities(net, many, seen)
    cheap = sensitivities(net, many, seen, measured=False)
    assert [(r.name, r.bits) for r in rows] == [(r.name, r.bits) for r in cheap]
    assert rank_correlation([r.noise for r in rows], [r.noise for r in cheap]) > 0.95
    calibrate(net, seen)
    got = relative(noises(float_model(net), integer_model(net), {"logits": "logits"}, many).values())
    assert decibels(expected_noise(net, rows)) == pytest.approx(decibels(got), abs=1.5)
    assert decibels(expected_noise(net, cheap)) == pytest.approx(decibels(got), abs=2.5)


def test_rank_correlation_is_spearmans():
    assert rank_correlation([1, 2, 3, 4], [10, 100, 1000, 1e9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_noise_is_measured_in_front_of_a_softmax():
    net = small(softmax=True)
    assert [net.name(v) for v in ends(net)] == ["logits"]
    plain = small()
    rows = [sensitivities(n, samples(2), statistics(n, samples(2)), weights=[4], tensors=[]) for n in (net, plain)]
    assert [r.noise for r in rows[0]] == pytest.approx([r.noise for r in rows[1]], rel=1e-5)


def test_sensitivities_do_not_depend_on_the_number_of_cores(monkeypatch):
    net = small()
    seen = statistics(net, samples())
    found = []
    for cores in (1, 4):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        found.append(sensitivities(net, samples(), seen))
    assert found[0] == found[1]


def test_samples_are_dropped_where_they_do_not_fit(monkeypatch):
    net = small()
    seen = statistics(net, samples())
    few = sensitivities(net, samples(), seen, count=1)
    monkeypatch.setattr(sensitivity, "CACHE", 1)
    dropped = sensitivities(net, samples(), seen)
    assert [r.noise for r in dropped] == pytest.approx([r.noise for r in few])
    with pytest.raises(UsageError, match="no samples to measure"):
        sensitivities(net, ListedSamples([]), seen)


@needs_shared
def test_a_real_network():
    graph = load(MODELS / "float" / "pretrainedResnet.tflite")
    source = from_tflite(graph)
    pictures = open_samples(SHARED / "images" / "cifar10-5000.zip", input_tensors(graph), "raw", limit=16)
    feeds = ListedSamples([{k: x.transpose(source.inputs.get(k, range(x.ndim))) for k, x in f.items()}
                           for f in pictures])
    net = network(source.graph, rules_of("generic-int8"))
    seen = statistics(net, feeds)
    t = Trial(net, feeds, seen)
    rows = t.rows()
    cheap = sensitivities(net, t.check, seen, measured=False)
    assert rank_correlation([r.noise for r in rows], [r.noise for r in cheap]) > 0.9
    base = configuration(net)
    assert decibels(total(rows, base)) == pytest.approx(decibels(t.noise(base)), abs=1.5)
    lines = search(t, Budget(size=parse_size("60%", net)), rows=rows)
    chosen = configuration(net)
    assert size(net, chosen.weights) <= 0.6 * size(net, base.weights)
    four = Configuration((4,) * len(base.weights), base.tensors)
    assert t.noise(chosen) < t.noise(four) / 4, lines  # 6 dB better, of all that goes there


# configurations


def test_widths_are_assigned_and_refused():
    net = small()
    c = configuration(net)
    assert assign(net, c) == []
    lines = assign(net, Configuration((8, 4, 2, FLOAT, FLOAT), c.tensors))
    assert [layer.scheme.bits if layer.scheme else None for layer in net.layers] == [8, 4, 2, None, None]
    assert "2-bit weights: 1 of 5: deep" in lines
    assert "floats: 2 of 5: point, last" in lines
    free = {net.name(p.value) for p in net.points if p.scheme is None}
    assert free == {"logits"}  # the mean's result is read by a layer, but not made by one
    with pytest.raises(UsageError, match="Chip takes no weights of 3 bits"):
        assign(net, Configuration((3, *c.weights[1:]), c.tensors))
    with pytest.raises(UsageError, match="has no floats"):
        assign(small(Rules("t", "Chip", "onnx", TENSORS, WEIGHTS, float_islands=False)),
               Configuration((FLOAT, *c.weights[1:]), c.tensors))


def test_sizes_and_work_are_counted():
    net = small()
    weights = [8 * 27, 8 * 72, 8 * 9, 16 * 8, 160]
    scales, biases = [8, 8, 8, 16, 10], [8, 8, 8, 16, 0]
    for bits in (8, 4, 2):
        assert size(net, [bits] * 5) == sum(w * bits // 8 for w in weights) + 4 * sum(scales) + 4 * sum(biases)
    assert size(net, [FLOAT] * 5) == 4 * sum(weights) + 4 * sum(biases)
    assert [macs(net, layer) for layer in net.layers] == [144 * w for w in weights[:4]] + [160]


def test_a_layer_in_floats_between_integers_is_computed_in_floats():
    net = small()
    seen = statistics(net, samples())
    assign(net, Configuration((8, FLOAT, 8, 8, 8), configuration(net).tensors))
    net.layers[1].weight = net.layers[1].weight.copy()
    net.layers[1].weight[0] *= 100  # whoever quantizes it per tensor loses the other channels
    calibrate(net, seen)
    feeds = samples().feeds[0]
    fast, plain = (runner(integer_model(net), ["deep_r"], plain=i)(feeds)[0] for i in (False, True))
    assert np.mean(np.abs(fast - plain)) < 0.01 * np.mean(np.abs(plain))


# budgets


def test_a_size_is_kept_with_the_least_noise_of_all_choices():
    t = trial()
    rows = t.rows()
    most = parse_size("70%", t.net)
    lines = search(t, Budget(size=most), rows=rows)
    chosen = configuration(t.net)
    assert size(t.net, chosen.weights) <= most
    every = [Configuration(w, chosen.tensors) for w in itertools.product((2, 4, 8), repeat=5)]
    best = min((c for c in every if size(t.net, c.weights) <= most), key=lambda c: total(rows, c))
    assert t.noise(chosen) <= t.noise(best)  # what the sum says is best, or what measures even better
    assert all(layer.params is not None and layer.params.scheme == layer.scheme for layer in t.net.layers)
    assert f"outputs at {decibels(t.noise(chosen)):.1f} dB" in lines[-1]
    with pytest.raises(CapacityError, match="no widths of weights make so small a network for Chip") as e:
        search(t, Budget(size=100), rows=rows)
    assert e.value.facts["want"] == f"at least {size(t.net, [2] * 5)} bytes"


def test_a_quality_is_reached_with_fewer_bytes():
    t = trial()
    rows = t.rows()
    base = t.base
    goal = decibels(t.noise(base)) - 12
    search(t, Budget(decibels=goal), rows=rows)
    chosen = configuration(t.net)
    assert decibels(t.noise(chosen)) >= goal
    assert size(t.net, chosen.weights) < size(t.net, base.weights)
    better = Budget(decibels=decibels(t.noise(base)) + 12)
    search(t, better, rows=rows)  # no weights of integers do that
    wide = configuration(t.net)
    assert decibels(t.noise(wide)) >= better.decibels
    assert FLOAT in wide.weights or 16 in wide.tensors
    with pytest.raises(CapacityError, match="do not come to 150 dB on Chip"):
        search(t, Budget(decibels=150.0), rows=rows)


def test_a_wide_search_takes_as_little_as_possible():
    t = trial()
    rows = t.rows()
    assert search_wide(t, rows, ratio(3.0)) == t.base
    most = t.noise(t.base) / 6
    found = search_wide(t, rows, most)
    assert t.noise(found) <= most
    layers = [macs(t.net, layer) for layer in t.net.layers]
    assert sum(m for m, b in zip(layers, found.weights, strict=True) if b == FLOAT) < sum(layers)
    narrow = Rules("t", "Chip", "onnx", TENSORS[:1], WEIGHTS[:1], float_islands=False)
    with pytest.raises(CapacityError, match="do not come to"):
        search_wide(trial(narrow), trial(narrow).rows(), ratio(60))


def test_a_score_is_kept():
    t = trial()
    search(t, Budget(score=-2.9), score=lambda net: -sum(layer.scheme.bits < 8 for layer in net.layers))
    assert sum(b < 8 for b in configuration(t.net).weights) <= 2
    with pytest.raises(CapacityError, match="score 1") as e:
        search(t, Budget(score=1.0), score=lambda net: 0.0)
    assert e.value.facts["got"] == "0 at best"


def test_a_time_is_kept_by_whoever_tells_it():
    t = trial()
    rows = t.rows()

    def cost(net):
        bits = [32 if layer.scheme is None else layer.scheme.bits for layer in net.layers]
        return math.inf if bits[4] == 2 else sum(b * layer.weight.size for b, layer in zip(bits, net.layers,
                                                                                           strict=True)) * 1e-9

    eight = sum(8 * layer.weight.size for layer in t.net.layers) * 1e-9
    for share in (0.6, 1.0, 1.5):
        c = by_time(t, rows, eight * share, cost)
        t.take(c)
        assert cost(t.net) <= eight * share
        assert share < 1 or t.noise(c) <= t.noise(t.base)
    with pytest.raises(CapacityError, match="no configuration is that quick"):
        by_time(t, rows, 1e-9, cost)


def test_budgets_are_read():
    net = small()
    assert parse_size("50%", net) == size(net, [8] * 5) // 2
    assert [parse_size(s, net) for s in ("300k", "1.5M", "1234", "2 kB")] == [300_000, 1_500_000, 1234, 2000]
    assert [parse_seconds(s) for s in ("3ms", "250us", "0.5 s")] == pytest.approx([3e-3, 250e-6, 0.5])
    for wrong in ("much", "-1", "0%"):
        with pytest.raises(UsageError, match="is no size"):
            parse_size(wrong, net)
    with pytest.raises(UsageError, match="is no time"):
        parse_seconds("3")
    with pytest.raises(UsageError, match="one budget at a time"):
        search(trial(), Budget(size=1, decibels=2.0), rows=[])


def test_latency_is_told_by_chips_with_a_timing_model_only():
    with pytest.raises(UsageError, match="no timing model of rk3588") as e:
        latency("rk3588")
    assert e.value.facts["want"] == "a311d"
    net = small(rules_of("a311d"))
    seen = statistics(net, samples())
    calibrate(net, seen)
    base = latency("a311d")(net)
    assert 1e-6 < base < 1e-3
    lines = keep(net, samples(), seen, Asked(latency=f"{base * 3e6:.0f}us"))
    assert latency("a311d")(net) <= base * 3.01
    assert any(line.startswith("weights of") for line in lines)


def test_the_float_networks_answers_are_kept():
    net = small()
    seen = statistics(net, samples(40))
    keep(net, samples(40), seen, Asked(agreement=0.9))
    assert any(layer.scheme.bits < 8 for layer in net.layers)
    run = [runner(m, ["logits"]) for m in (float_model(net), integer_model(net))]
    x, y = (np.concatenate([r(f)[0] for f in samples(40)]) for r in run)
    assert agreement(x, y) >= 0.9


# what the noise does to answers


def test_expected_agreement_is_that_of_noise():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, 10)) * 2
    for sigma in (0.1, 0.5, 1.5):
        drawn = np.mean([agreement(x, x + rng.normal(size=x.shape) * sigma) for _ in range(200)])
        assert expected_agreement(x, sigma**2) == pytest.approx(drawn, abs=0.004)
    two = np.array([[1.0, 0.0]])
    assert expected_agreement(two, 0.25) == pytest.approx(0.5 * math.erfc(-1 / (0.5 * 2)), abs=1e-6)  # Phi(sqrt 2)
    assert expected_agreement(x, 0.0) == 1.0


def test_noise_that_all_classes_share_counts_for_nothing():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(4000, 8))
    assert noise_power(x, x + rng.normal(size=(4000, 1))) == pytest.approx(0, abs=1e-20)
    assert noise_power(x, -x) == math.inf
    assert noise_power(x, 0.5 * x) == pytest.approx(0, abs=1e-20)  # weaker, and all in the same order
    assert predicted_agreement(x, 0.09) == pytest.approx(expected_agreement(x, 0.09), abs=0.01)
    assert expected_agreement(x, math.inf) == 1 / 8
    assert noise_power(x, x + 0.3 * rng.normal(size=x.shape)) == pytest.approx(0.09, rel=0.02)
