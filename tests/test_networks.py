"""The small trained networks that low-bit quantization is measured on: files, figures, images."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from npulab.errors import UsageError
from npulab.importers import load
from npulab.samples import networks
from scripts import loaded

onnx = pytest.importorskip("onnx", reason="needs ONNX: pip install 'npulab[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'npulab[onnx]'")

ROOT = Path(__file__).resolve().parents[1]
FACTS = networks.facts()
STRUCTURE = {  # operators of each file and how many
    "depthwise": {"Conv": 23, "BatchNormalization": 23, "Clip": 16, "Add": 3, "Gemm": 1},
    "residual": {"Conv": 13, "BatchNormalization": 13, "Relu": 11, "Add": 5, "Gemm": 1},
    "attention": {"Conv": 1, "LayerNormalization": 7, "Softmax": 3, "Erf": 3, "MatMul": 24, "Gemm": 1},
}


@pytest.fixture(scope="module")
def script():
    """scripts/train_networks.py as a module."""
    pytest.importorskip("torch", reason="needs PyTorch: pip install 'npulab[quantize]'")
    pytest.importorskip("sklearn", reason="needs scikit-learn for the digits: pip install 'npulab[sample]'")
    with loaded("scripts/train_networks.py") as module:
        yield module


def answers(model, images):
    """Classes that ONNX Runtime finds, one image after another."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.array([session.run(None, {"image": i[None]})[0].argmax() for i in images])


def channel_ranges(model):
    """max |w| of each output channel of each depthwise convolution, its batch normalization folded into it."""
    graph = onnx.load_from_string(model).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    norms = {n.input[0]: n for n in graph.node if n.op_type == "BatchNormalization"}
    for n in graph.node:
        if n.op_type == "Conv" and n.output[0] in norms and arrays[n.input[1]].shape[1] == 1 < len(arrays[n.input[1]]):
            norm = norms[n.output[0]]
            scale, _, _, variance = (arrays[i] for i in norm.input[1:])
            factor = scale / np.sqrt(variance + next(a.f for a in norm.attribute if a.name == "epsilon"))
            yield np.abs(arrays[n.input[1]]).max(axis=(1, 2, 3)) * np.abs(factor)


@pytest.mark.parametrize("name", networks.NAMES)
def test_the_file_is_the_one_its_figures_were_measured_on(name):
    data, facts = networks.path(name).read_bytes(), FACTS["networks"][name]

    assert hashlib.sha256(data).hexdigest() == facts["sha256"]
    assert len(data) == facts["bytes"] < 700_000
    assert 20_000 <= facts["parameters"] <= 150_000


@pytest.mark.parametrize("name", networks.NAMES)
def test_the_accuracy_written_down_is_the_accuracy_measured(name):
    _, images, labels = networks.data(name)

    accuracy = (answers(networks.path(name).read_bytes(), images) == labels).mean()

    assert accuracy == pytest.approx(FACTS["networks"][name]["accuracy"], abs=0.0013)  # one image may be a tie
    assert accuracy >= 0.95


@pytest.mark.parametrize("name", networks.NAMES)
def test_the_network_has_the_layers_it_is_named_for(name):
    graph = load(networks.path(name))
    counts = Counter(n.op.name for n in graph.nodes)

    assert {op: counts[op] for op in STRUCTURE[name]} == STRUCTURE[name]
    assert [graph.values[v].shape for v in graph.inputs] == [tuple(FACTS["input"]["shape"])]
    assert [graph.values[v].shape for v in graph.outputs] == [(1, 10)]


def test_the_channels_of_a_depthwise_layer_differ_as_quantizers_dread():
    ratios = [float(r.max() / np.median(r)) for r in channel_ranges(networks.path("depthwise").read_bytes())]

    assert len(ratios) == 8  # the stem has one input channel as well
    assert max(ratios) > 20  # four bits hold the median channel in less than a third of a step


def test_the_images_are_enough_and_as_the_networks_take_them():
    calibration, test, labels = networks.data("residual")

    assert calibration.shape == (FACTS["calibration_samples"], 1, 24, 24) == (256, 1, 24, 24)
    assert test.shape == (FACTS["held_out_samples"], 1, 24, 24) == (797, 1, 24, 24)
    assert calibration.dtype == test.dtype == np.float32
    assert labels.dtype == np.int64
    assert min(np.bincount(labels, minlength=10)) >= 60  # a classifier cannot win by a favourite
    assert -1 <= test.min() < -0.9 < 0.9 < test.max() <= 1
    assert not {i.tobytes() for i in calibration} & {i.tobytes() for i in test}
    assert (networks.FOLDER / "images.npz").stat().st_size < 500_000


def test_the_images_are_those_the_script_makes_and_no_held_out_one_is_trained_on(script):
    digits, labels = script.load_images()
    training, test = script.split(len(digits))
    made = script.stored()
    with np.load(networks.FOLDER / "images.npz") as images:
        stored = dict(images)

    assert not set(training) & set(test)
    assert len(set(training) | set(test)) == 1797
    assert not {d.tobytes() for d in digits[training]} & {d.tobytes() for d in digits[test]}
    np.testing.assert_array_equal(stored["labels"], labels[test])
    for name in ("calibration", "test"):  # another math library may round a few pixels to the next of 64 levels
        assert stored[name].shape == made[name].shape
        assert (stored[name] != made[name]).mean() < 1e-3


@pytest.mark.parametrize("name", networks.NAMES)
def test_the_file_that_is_written_computes_what_pytorch_computes(script, name):
    """Before training, with batch statistics of some images."""
    script.torch.manual_seed(1)
    net = script.build(name)
    calibration, _, _ = networks.data(name)
    with script.torch.no_grad():
        net.train()(script.torch.from_numpy(calibration[:64]))
        expected = net.eval()(script.torch.from_numpy(calibration[64:68])).numpy()

    said = script.answers(script.Export(name, net).onnx(), calibration[64:68])

    np.testing.assert_allclose(said, expected, atol=1e-5)


def test_training_repeats_to_the_byte(script):
    digits, labels = script.load_images()

    def once():
        script.torch.manual_seed(2)
        net = script.build("depthwise")
        script.train(net, digits[:100], labels[:100], script.Training("adam", 1e-2, 0, 2), np.random.default_rng(2))
        return script.Export("depthwise", net).onnx()

    threads = script.torch.get_num_threads()
    script.torch.set_num_threads(1)
    try:
        assert once() == once()
    finally:
        script.torch.set_num_threads(threads)


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(UsageError, match="depthwise, residual, attention"):
        networks.path("resnet")
    with pytest.raises(UsageError, match="resnet"):
        networks.data("resnet")
