"""How far outputs are from the float network's: what is heard of a sample, and what is more than chance."""

from dataclasses import replace

import numpy as np
import pytest

from npulab.exporters.onnx import to_view
from npulab.importers.onnx import read_onnx
from npulab.quantization.calibrate import calibrate, statistics
from npulab.quantization.compare import Noise
from npulab.quantization.distance import Distance, End, distance, ends_of, heard, simplest
from npulab.quantization.network import network
from npulab.quantization.types import ListedSamples
from npulab.targets.facts.quantization import rules_of

onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")

RNG = np.random.default_rng(0)


def of(noises):
    """A distance by the noise of each sample's one end, whose signal is 1."""
    return Distance([[Noise(1.0, n, 1.0, 1.0)] for n in noises])


def test_each_sample_counts_alike():
    before = np.full(64, 1e-3)
    nearer = before / 2
    nearer[5] = 1e-1  # its answer tips over
    gain, error = of(nearer).less_than(of(before))
    assert gain == pytest.approx((63 * 10 * np.log10(2) - 20) / 64, abs=1e-3)
    assert gain > error
    assert of(nearer).decibels < of(before).decibels  # by the energy of all it is worse


def test_a_gain_of_few_samples_is_chance():
    before = np.full(8, 1e-3)
    one = before.copy()
    one[3] = 1e-8
    gain, error = of(one).less_than(of(before))
    assert 0 < gain <= error * (1 + 1e-9)
    assert simplest({"first": of(before), "second": of(one)}) == "first"
    assert simplest({"first": of(before), "second": of(before / 2)}) == "second"


def test_of_ways_that_chance_does_not_tell_apart_the_first_is_taken():
    noises = 1e-3 * np.exp(RNG.normal(size=32))
    alike = noises * np.tile([0.9, 1.1], 16)  # 0.02 dB nearer, standard error 0.08
    assert of(alike).less_than(of(noises))[0] > 0
    assert simplest({"far": of(10 * noises), "near": of(noises), "alike": of(alike)}) == "near"
    assert simplest({"far": of(10 * noises), "alike": of(alike), "near": of(noises)}) == "alike"


def test_one_exact_sample_is_not_worth_all_others():
    before = np.full(8, 1e-4)
    exact = before * 4
    exact[0] = 0.0
    gain, error = of(exact).less_than(of(before))
    assert gain < error
    assert of(np.zeros(8)).less_than(of(np.zeros(8))) == (0.0, 0.0)
    assert of([0.5]).less_than(of([1.0])) == (pytest.approx(10 * np.log10(2)), 0.0)


def test_of_a_softmax_the_distances_of_the_first_class_are_heard():
    x = RNG.normal(size=(1, 1000)).astype(np.float32)
    x[0, 7] = 20
    clipped, shifted, last = x.copy(), x + 5, x.copy()
    clipped[0, 7] = 12
    last[0, np.argmin(x)] -= 8
    plain, classes = End("z"), End("z", 1)
    assert plain.heard(x, clipped).noise == pytest.approx(plain.heard(x, last).noise)  # one of a thousand, either way
    assert classes.heard(x, clipped).noise == pytest.approx(32 * 64, rel=1e-4)
    assert classes.heard(x, last).noise == 0.0  # no rival
    assert classes.heard(x, shifted).noise == pytest.approx(0.0, abs=1e-6)
    one = np.ones((1, 1), np.float32)
    assert classes.heard(one, one + 1).noise == 1.0  # of one class there are no rivals


def graph_of(axis, opset, behind=()):
    from onnx import TensorProto, helper, numpy_helper

    data = helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 3, 4, 5))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    attributes = {} if axis is None else {"axis": axis}
    nodes = [helper.make_node("Conv", ["x", "w"], ["z"]), helper.make_node("Softmax", ["z"], ["p"], **attributes),
             *behind, helper.make_node("Identity", [behind[-1].output[0] if behind else "p"], ["y"])]
    weight = numpy_helper.from_array(RNG.normal(size=(6, 3, 1, 1)).astype(np.float32), "w")
    model = helper.make_model(helper.make_graph(nodes, "g", [data], [result], [weight]),
                              opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return network(read_onnx(model.SerializeToString(), "g"), rules_of("generic-onnx"))


@pytest.mark.parametrize(("axis", "opset", "end"), [
    (None, 13, End("z", 3)), (1, 13, End("z", 1)), (-3, 13, End("z", 1)), (None, 11, End("z", 1, True)),
    (2, 11, End("z", 2, True)), (-1, 11, End("z", 3, True))])
def test_rows_of_classes_are_those_of_the_softmax(axis, opset, end):
    from onnx import helper

    assert ends_of(graph_of(axis, opset)) == [end]
    assert ends_of(graph_of(axis, opset, [helper.make_node("Transpose", ["p"], ["t"], perm=[0, 2, 3, 1])])) == [end]
    x = RNG.normal(size=(2, 6, 4, 5)).astype(np.float32)
    y = x + RNG.normal(size=x.shape).astype(np.float32)
    if end.flat:
        rows = [z.reshape(int(np.prod(x.shape[: end.classes])), -1) for z in (x, y)]
    else:
        rows = [np.moveaxis(z, end.classes, -1).reshape(-1, x.shape[end.classes]) for z in (x, y)]
    wanted = 0.0
    for p, q in zip(*rows, strict=True):
        order = sorted(range(len(p)), key=lambda i: -p[i])[:33]
        wanted += sum(((p[order[0]] - p[i]) - (q[order[0]] - q[i])) ** 2 for i in order[1:])
    assert end.heard(x, y).noise == pytest.approx(wanted, rel=1e-4)


def test_classes_are_heard_as_their_own_integers_show_them():
    net = graph_of(1, 13)
    data = ListedSamples([{"x": RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)} for _ in range(3)])
    calibrate(net, statistics(net, data))
    ends, floats = ends_of(net), to_view(net.graph, shapes=False)
    wanted = heard(floats, ends, data)
    whole = distance(net, ends, wanted, data)
    point = next(p for p in net.points if net.name(p.value) == "z")
    point.params = replace(point.params, scales=point.params.scales / 4)
    clipped = distance(net, ends, wanted, data)
    assert whole.decibels > 30 > 20 > clipped.decibels
    gain, error = whole.less_than(clipped)
    assert gain > 10 > error


def test_behind_other_operators_the_outputs_are_heard():
    from onnx import helper

    assert ends_of(graph_of(1, 13, [helper.make_node("Sigmoid", ["p"], ["s"])])) == [End("y")]
