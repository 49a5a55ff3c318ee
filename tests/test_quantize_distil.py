"""Distillation: the network in PyTorch is the one that ONNX Runtime runs, and learning lessens its error."""

import importlib

import numpy as np
import pytest

from npulab.errors import UsageError
from npulab.importers import load
from npulab.quantization.calibrate import calibrate, choose_weights, statistics
from npulab.quantization.distil import blocks, distil
from npulab.quantization.emit import float_model, integer_model
from npulab.quantization.gram import reference
from npulab.quantization.network import network
from npulab.quantization.session import runner
from npulab.quantization.types import ListedSamples, Rules, Scheme
from npulab.samples import networks
from npulab.zoo.builder import Net
from quantized import detector, samples, small

pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")


def test_without_pytorch_the_error_names_the_extra(monkeypatch):
    def missing(name, *rest):
        if name == "torch":
            raise ImportError(name)
        return real(name, *rest)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", missing)
    net, data = ready(small())
    with pytest.raises(UsageError, match="PyTorch, which is not installed") as e:
        distil(net, data)
    assert e.value.facts["try"] == "pip install 'npulab[quantize]'"


def ready(graph, scheme=None, count=24, rules=None):
    scheme = scheme or Scheme(4, symmetric=True, narrow=True, per_channel=True)
    net = network(graph, rules or Rules("g", "g", "onnx", (Scheme(),), (scheme,)))
    data = samples(graph, count, name=net.name(net.graph.inputs[0]))
    calibrate(net, statistics(net, data))
    return net, data


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="pip install 'npulab[quantize]'")


def operators():
    """One of each operator that is translated, where the small networks have none."""
    net = Net("operators", 5)
    rng = np.random.default_rng(5)

    def weight(name, *shape):
        return net.constant(name, rng.normal(size=shape).astype(np.float32) * 0.3)

    def whole(name, *numbers):
        return net.constant(name, np.array(numbers, np.int64))

    x = net.input("x", 1, 4, 9, 8)
    x = net.node("Conv", [x, weight("w0", 8, 4, 3, 3), weight("b0", 8)], (1, 8, 5, 4), "uneven", strides=[2, 2],
                 pads=[0, 1, 2, 0], kernel_shape=[3, 3])
    x = net.node("LeakyRelu", [x], (1, 8, 5, 4), "leaky", alpha=0.2)
    x = net.node("ConvTranspose", [x, weight("w1", 8, 4, 3, 3), weight("b1", 4)], (1, 4, 10, 8), "transposed",
                 strides=[2, 2], pads=[1, 0, 0, 1], kernel_shape=[3, 3])
    x = net.node("ConvTranspose", [x, weight("w3", 4, 4, 2, 3)], (1, 4, 10, 8), "of a size", output_shape=[10, 8],
                 kernel_shape=[2, 3])
    x = net.node("HardSwish", [x], (1, 4, 10, 8), "swish")
    x = net.node("AveragePool", [x], (1, 4, 5, 4), "mean", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = net.node("Resize", [x, "", net.constant("twice", np.array([1, 1, 2, 2], np.float32))], (1, 4, 10, 8), "grown",
                 mode="linear", coordinate_transformation_mode="half_pixel")
    y = net.node("Slice", [x, whole("start", 1), whole("end", 9), whole("axis", 2), whole("step", 2)], (1, 4, 4, 8),
                 "rows")
    y = net.node("Pad", [y, whole("pads", 0, 0, 1, 0, 0, 0, 0, 2)], (1, 4, 5, 10), "padded")
    y = net.node("Gather", [y, whole("places", 0, 3, -1)], (1, 3, 5, 10), "some", axis=1)
    y = net.node("Transpose", [y], (1, 5, 10, 3), "turned", perm=[0, 2, 3, 1])
    y = net.node("Reshape", [y, whole("shape", 1, 50, 3)], (1, 50, 3), "flat")
    y = net.node("LayerNormalization", [y, weight("scale", 3), weight("shift", 3)], (1, 50, 3), "norm", axis=-1)
    y = net.node("MatMul", [y, weight("w2", 3, 6)], (1, 50, 6), "product")
    y = net.node("Erf", [y], (1, 50, 6), "erf")
    y = net.node("Softmax", [y], (1, 50, 6), "shares", axis=-1)
    y = net.node("ReduceMean", [y], (1, 6), "total", axes=[1], keepdims=0)  # not over shares, whose mean is known
    net.output(y, "y")
    return load(net.onnx())


def students(net, data):
    from npulab.quantization.distil import _data
    from npulab.quantization.torch_block import Student

    (block,), left = blocks(net, 0)
    assert not left
    shown, floats, results = _data(net, block, data, reference(net))
    return block, shown, floats, results, lambda quantized: Student(net, block, quantized=quantized)


def sample_network(name):
    return load(networks.path(name))


@pytest.mark.parametrize("make", [small, detector, operators, lambda: sample_network("residual"),
                                  lambda: sample_network("depthwise"), lambda: sample_network("attention")],
                         ids=["small", "detector", "operators", "residual", "depthwise", "attention"])
def test_the_network_in_pytorch_is_the_one_of_onnx_runtime(make, torch):
    net, data = ready(make(), count=5)
    block, shown, floats, results, student = students(net, data)
    with torch.no_grad():
        made = student(False)([torch.from_numpy(x) for x in floats])
        rounded = student(True)([torch.from_numpy(x) for x in shown])
    for have, want in zip(made, results, strict=True):
        np.testing.assert_allclose(have.numpy(), want, atol=1e-4 * max(1, np.abs(want).max()))
    names = [net.name(v) for v in block.results]
    run = runner(integer_model(net), names, plain=True)
    for i, v in enumerate(block.results):
        want = np.stack([run(f)[i] for f in data])
        point = net.of.get(v)
        want = want if point is None or point.params is None else point.params.seen(want)
        error = ((rounded[i].numpy() - want) ** 2).mean()
        plain = ((results[i] - want) ** 2).mean()
        assert error < 0.05 * plain + 1e-12, names[i]  # biases are rounded there: far less than what learning is about


def teacher(net):
    """Name of the result, and the float network."""
    name = net.name(net.graph.outputs[0])
    return name, runner(float_model(net), [name])


def noise(net, data, run, name):
    """Of the integer network as ONNX Runtime runs it, on the samples that learning does not see."""
    made = runner(integer_model(net), [name], plain=True)
    held = list(data)[-max(1, len(data) // 5) :]
    return sum(float(((made(f)[0] - run(f)[0]) ** 2).sum()) for f in held)


@pytest.mark.parametrize("scheme", [Scheme(4, symmetric=True, narrow=True, per_channel=True),
                                    Scheme(4, symmetric=True, narrow=True), Scheme(4, signed=False, per_channel=True),
                                    Scheme(4, symmetric=True, narrow=True, power_of_two=True)], ids=str)
def test_learning_lessens_the_error_on_samples_that_were_held_out(scheme, torch):
    net, data = ready(small(), scheme, 60)
    name, run = teacher(net)
    before = noise(net, data, run, name)
    ticks = []
    (note,) = distil(net, data, 40, 0, progress=lambda done, total: ticks.append((done, total)))
    assert noise(net, data, run, name) < 0.7 * before
    assert note.startswith(f"{net.layers[0].name} .. {net.layers[-1].name} ({len(net.layers)} layers): held-out noise")
    assert ticks[-1] == (40, 40)
    for layer in net.layers:
        assert layer.codes.dtype == scheme.holder
        assert scheme.low <= layer.codes.min() <= layer.codes.max() <= scheme.high
        assert not scheme.power_of_two or (np.frexp(layer.params.scales)[0] == 0.5).all()


def test_each_block_learns_from_what_the_one_before_became(torch):
    net, data = ready(small(), count=40)
    found, left = blocks(net, 2)
    assert [layer.name for b in found for layer in b.layers] == [layer.name for layer in net.layers]
    assert not left
    name, run = teacher(net)
    before = noise(net, data, run, name)
    notes = distil(net, data, 20, layers=1, drop=0.5)
    assert len(notes) == len(blocks(net, 1)[0])
    assert noise(net, data, run, name) < before


def chain():
    net = Net("chain", 2)
    x = net.input("x", 1, 3, 8, 8)
    for i in range(4):
        x = net.conv(x, 6, 3, 1, "relu", name=f"c{i}")
        if i == 1:
            x = net.node("Round", [x], (1, 6, 8, 8), "odd")
    net.output(x, "y")
    return load(net.onnx())


def test_blocks_end_where_one_tensor_goes_on_and_around_what_is_not_translated(torch):
    net, data = ready(chain())
    found, left = blocks(net, 0)
    assert [net.graph.nodes[n].op.name for n in left] == ["Round"]
    assert [[layer.name for layer in b.layers] for b in found] == [["c0", "c1"], ["c2", "c3"]]
    assert [len(b.layers) for b in blocks(net, 1)[0]] == [1, 1, 1, 1]
    notes = distil(net, data, 2, 0)
    assert notes[0] == "Round 'odd' is not translated to PyTorch: no layer learns through it"
    assert len(notes) == 3


def test_what_is_prescribed_stays(torch):
    rules = Rules("g", "g", "onnx", (Scheme(),), (Scheme(4, symmetric=True, narrow=True),),
                  fixed={("Sigmoid", "int8"): (1 / 256, -128)})
    net, data = ready(detector(), rules=rules)
    sigmoid = next(p for p in net.points if net.name(p.value).startswith("scores"))
    assert float(sigmoid.params.scales[0]) == 1 / 256
    first = net.of[net.graph.inputs[0]].params
    distil(net, data, 10, 0)
    assert float(sigmoid.params.scales[0]) == 1 / 256
    assert int(sigmoid.params.zeros[0]) == -128
    assert net.of[net.graph.inputs[0]].params is first


def test_the_same_bytes_each_time(torch):
    made = []
    for threads in (1, 2):
        was = torch.get_num_threads()
        torch.set_num_threads(threads)
        net, data = ready(small(), count=20)
        distil(net, data, 12, 0, drop=0.3, seed=4)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(was)
        made.append(integer_model(net))
    assert made[0] == made[1]


def test_learning_starts_from_clipped_weights_where_these_are_nearer(torch):
    net, data = ready(small(), count=20)
    before = [layer.params.scales for layer in net.layers]
    choose_weights(net, "mse")
    clipped = [layer.params.scales for layer in net.layers]
    choose_weights(net)
    (note,) = distil(net, data, 1, 0, rate=0.0)
    assert " -> " in note
    for layer, old, new in zip(net.layers, before, clipped, strict=True):
        assert np.array_equal(layer.params.scales, new)
        assert (new < old).any()


def test_a_result_that_is_no_better_is_not_kept(torch):
    net, data = ready(small(), count=20)
    choose_weights(net, "mse")
    before = integer_model(net)
    (note,) = distil(net, data, 5, 0, rate=1e3)
    assert note.endswith("stays: learning did not lessen it")
    assert integer_model(net) == before


def test_the_best_so_far_is_kept_when_it_is_to_stop(torch):
    net, data = ready(chain(), count=30)
    asked = iter([False] * 30)
    notes = distil(net, data, 40, 0, rate=0.5, stop=lambda: next(asked, True))
    assert " -> " in notes[1]
    assert notes[-1] == "stopped: 1 of 2 blocks stay as they were"
    assert net.layers[0].codes is not None
    assert net.layers[3].codes is None


def test_too_few_samples_are_an_error(torch):
    net, data = ready(small())
    with pytest.raises(UsageError, match="too few samples") as e:
        distil(net, ListedSamples(list(data)[:2], "a test"))
    assert e.value.facts["got"] == "2 of a test"
