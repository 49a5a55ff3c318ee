"""Networks that were trained with quantization keep what training found. Witnesses: ONNX Runtime and LiteRT run the
network as it came and as it goes; its scales are read from the file."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from npulab import api, quantizing
from npulab.dialects.prepare import prepared
from npulab.errors import UnsupportedError, UsageError
from npulab.exporters.onnx import to_onnx
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers.onnx import read_onnx
from npulab.importers.tflite import read_tflite
from npulab.quantization import trained
from npulab.quantization.emit import integer_model
from npulab.quantization.job import Options
from npulab.quantization.network import network
from npulab.quantization.session import runner
from npulab.quantization.types import ListedSamples, Params, Scheme
from npulab.targets.facts.quantization import rules_of
from quantized import samples, small
from shared import MODELS, needs_shared

TYPES = {"int8": "QInt8", "uint8": "QUInt8"}


def by_ort(tmp_path, activations="int8", weights="int8", per_channel=False, form="QDQ", exclude=()):
    """`small` as ONNX Runtime's quantizer makes it: bytes."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, data):
            self.data = iter(data)

        def get_next(self):
            return next(self.data, None)

    g = small()
    source, out = tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    source.write_bytes(to_onnx(g))
    quantize_static(str(source), str(out), Reader(list(samples(g, 4))), quant_format=QuantFormat[form],
                    per_channel=per_channel, activation_type=QuantType[TYPES[activations]],
                    weight_type=QuantType[TYPES[weights]], nodes_to_exclude=list(exclude))
    return out.read_bytes()


def outputs(model, feeds, name="y"):
    return runner(model, [name], plain=True)(feeds)[0]


def lite(data, x):
    """LiteRT's reference kernels, real numbers in and out, channels last inside; and the output's scale."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    it = Interpreter(model_content=data, experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    it.allocate_tensors()
    i, o = it.get_input_details()[0], it.get_output_details()[0]
    if x.ndim == 4 and tuple(i["shape"]) != x.shape:
        x = x.transpose(0, 2, 3, 1)
    if i["dtype"] != np.float32:
        scale, zero = i["quantization"]
        limits = np.iinfo(i["dtype"])
        x = np.clip(np.rint(x / np.float32(scale)) + zero, limits.min, limits.max).astype(i["dtype"])
    it.set_tensor(i["index"], x)
    it.invoke()
    y = it.get_tensor(o["index"])
    scale, zero = o["quantization"]
    return (y, 0.0) if y.dtype == np.float32 else ((y.astype(np.int64) - zero) * np.float32(scale), scale)


def scales_of(model):
    """(scale, zero point, type) of every QuantizeLinear of a computed tensor, from the file."""
    proto = onnx.ModelProto.FromString(model)
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    found = set()
    for n in proto.graph.node:
        if n.op_type == "QuantizeLinear" and n.input[0] not in constants:
            scale, zero = (constants[i] for i in n.input[1:3])
            found.add((scale.tobytes(), int(zero), zero.dtype.name))
    return found


def codes_of(model):
    """The integers of every constant of 8 bits that is more than a zero point, as sorted bytes."""
    proto = onnx.ModelProto.FromString(model)
    arrays = [numpy_helper.to_array(t) for t in proto.graph.initializer]
    return sorted(a.tobytes() for a in arrays if a.dtype in (np.int8, np.uint8) and a.ndim > 1)


FORMS = [("int8", "int8", False), ("int8", "int8", True), ("uint8", "int8", False), ("uint8", "int8", True),
         ("uint8", "uint8", False)]


@pytest.mark.parametrize(("activations", "weights", "per_channel"), FORMS)
def test_what_onnx_runtime_quantized_comes_out_as_it_went_in(tmp_path, activations, weights, per_channel):
    model = by_ort(tmp_path, activations, weights, per_channel)
    g = read_onnx(model, "small")
    made = quantizing.quantize(g, None, rules_of("generic-onnx"))
    assert scales_of(made.data) == scales_of(model)
    assert codes_of(made.data) == codes_of(model)
    for feeds in samples(g, 4, 7):
        assert np.array_equal(outputs(made.data, feeds), outputs(model, feeds))
    assert not any("made up" in n or "calibrated" in n for n in made.notes)
    (stage,) = made.stages
    assert stage.notes == ["as trained"]
    assert stage.decibels == 200  # against the network as it was trained
    assert made.recipe.name == "as trained"


@pytest.mark.parametrize(("activations", "per_channel"), [("int8", False), ("uint8", True)])
def test_operators_on_integers_are_taken_apart(tmp_path, activations, per_channel):
    model = by_ort(tmp_path, activations, "int8", per_channel, "QOperator")
    assert b"QLinearConv" in model
    g = read_onnx(model, "small")
    made = quantizing.quantize(g, None, rules_of("generic-onnx"))
    apart = to_onnx(prepared(g))
    assert codes_of(made.data) == codes_of(apart)
    step = max(float(np.frombuffer(s)[0]) if len(s) == 8 else float(np.frombuffer(s, np.float32)[0])
               for s, _, _ in scales_of(apart))
    for feeds in samples(g, 4, 7):
        assert np.array_equal(outputs(made.data, feeds), outputs(apart, feeds))
        assert np.abs(outputs(made.data, feeds) - outputs(model, feeds)).max() <= 2 * step


@pytest.mark.parametrize(("activations", "weights", "per_channel"), FORMS[:3])
def test_what_onnx_runtime_quantized_runs_in_tflite(tmp_path, activations, weights, per_channel):
    model = by_ort(tmp_path, activations, weights, per_channel)
    g = read_onnx(model, "small")
    made = api.quantize(g, None, "generic-int8")  # checks the file
    shifted = [n for n in made.notes if "int8 instead of uint8, the zero point moved along, nothing lost" in n]
    assert bool(shifted) == (activations == "uint8")
    for feeds in samples(g, 4, 7):
        got, step = lite(made.data, feeds["x"])
        assert np.abs(got - outputs(model, feeds)).max() <= 1.01 * step


def test_a_network_of_ours_keeps_every_bit():
    g = small(1)
    made = quantizing.quantize(g, samples(g), rules_of("generic-onnx"), Options("mse+weights-mse+adaround"))
    again = quantizing.quantize(read_onnx(made.qdq, "small"), None, rules_of("generic-onnx"))
    before = {made.network.name(p.value): p.params for p in made.network.quantized_points()}
    after = {again.network.name(v): p.params for p in again.network.quantized_points() for v in p.values}
    for name, p in before.items():
        assert p is not None
        assert (after[name].scales.tobytes(), after[name].zeros.tobytes()) == (p.scales.tobytes(), p.zeros.tobytes())
    assert again.qdq == again.data
    for a, b in zip(made.network.layers, again.network.layers, strict=True):
        assert np.array_equal(a.codes if a.codes is not None else a.params.codes(a.weight), b.codes)
        assert a.params.scales.tobytes() == b.params.scales.tobytes()
    for feeds in samples(g, 4, 3):
        assert np.array_equal(outputs(made.qdq, feeds), outputs(again.qdq, feeds))


def test_ends_in_integers_become_floats_and_integers_again():
    g = small(2)
    made = quantizing.quantize(g, samples(g), rules_of("generic-onnx"), Options("min-max", integer_ends=True))
    assert [made.graph.values[v].dtype.value for v in (*made.graph.inputs, *made.graph.outputs)] == ["int8", "int8"]
    again = quantizing.quantize(made.graph, None, rules_of("generic-onnx"))
    assert [again.graph.values[v].dtype.value for v in (*again.graph.inputs, *again.graph.outputs)] == ["float32"] * 2
    for feeds in samples(g, 3, 7):
        assert np.array_equal(outputs(again.data, feeds), outputs(made.qdq, feeds))
    again = quantizing.quantize(made.graph, None, rules_of("generic-onnx"), Options(integer_ends=True))
    codes = np.random.default_rng(1).integers(-128, 128, (1, 3, 16, 16)).astype(np.int8)
    assert np.array_equal(outputs(again.data, {"x": codes}), outputs(made.data, {"x": codes}))


def test_uint8_and_back(tmp_path):
    """Retargeted to a chip of uint8 and back, nothing is lost: weights with one scale in the middle of int8."""
    model = by_ort(tmp_path)
    g = read_onnx(model, "small")
    there = quantizing.quantize(g, None, dataclasses.replace(rules_of("generic-onnx"), activations=(Scheme(8, False),),
                                                             weights=(Scheme(8, False),)))
    assert {t for _, _, t in scales_of(there.data)} == {"uint8"}
    assert any("nothing lost" in n and "layers: uint8 weights instead of int8" in n for n in there.notes)
    back = quantizing.quantize(there.graph, None, dataclasses.replace(
        rules_of("generic-onnx"), activations=(Scheme(8),), weights=(Scheme(8, symmetric=True),)))
    assert scales_of(back.data) == scales_of(model)
    assert codes_of(back.data) == codes_of(model)
    for feeds in samples(g, 3, 7):
        assert np.array_equal(outputs(there.data, feeds), outputs(model, feeds))


def test_powers_of_two_are_said_and_a_relu_that_only_the_integers_had_stays(tmp_path):
    model = by_ort(tmp_path)  # its quantizer leaves ReLU to the zero point
    assert b"Relu" not in model
    g = read_onnx(model, "small")
    rules = dataclasses.replace(rules_of("esp32_espdl"), arithmetic=None)
    made = quantizing.quantize(g, None, rules)
    assert sum(n.op.name in ("Relu", "Clip") for n in made.graph.nodes) == 2
    text = "\n".join(made.notes)
    assert "int8 symmetric per tensor power of two, as ESP-DL" in text or "power of two, as" in text
    assert "does not take int8 asymmetric per tensor: steps " in text
    assert "rounded a second time" in text
    for p in made.network.quantized_points():
        assert (np.frexp(p.params.scales)[0] == 0.5).all()
        assert (p.params.zeros == 0).all()
    want = np.concatenate([outputs(model, f) for f in samples(g, 8, 7)])
    got = np.concatenate([outputs(made.qdq, f) for f in samples(g, 8, 7)])
    assert np.linalg.norm(want - got) < 0.1 * np.linalg.norm(want)


def test_one_scale_for_weights_is_asked_for(tmp_path):
    g = read_onnx(by_ort(tmp_path, per_channel=True), "small")
    made = quantizing.quantize(g, None, rules_of("generic-onnx"), Options(per_channel=False))
    assert all(layer.params.axis is None for layer in made.network.layers)
    assert any("as is asked for, instead of int8 symmetric per channel: rounded a second time" in n for n in made.notes)


def test_layers_in_floats_stay_so_and_chips_without_floats_calibrate_them(tmp_path):
    model = by_ort(tmp_path, exclude=["project"])
    g = read_onnx(model, "small")
    made = quantizing.quantize(g, None, rules_of("generic-onnx"))
    assert [layer.name for layer in made.network.layers if layer.scheme is None] == ["project"]
    assert any(n.startswith("1 of 4 layers were trained in floats, and stay so: project") for n in made.notes)
    for feeds in samples(g, 3, 7):
        assert np.array_equal(outputs(made.data, feeds), outputs(model, feeds))
    made = api.quantize(g, None, "generic-int8")
    for feeds in samples(g, 3, 7):
        got, step = lite(made.data, feeds["x"])
        assert np.abs(got - outputs(model, feeds)).max() <= 1.01 * step
    data = samples(g, 8)
    made = quantizing.quantize(g, data, rules_of("hailo8"))
    assert all(layer.params is not None for layer in made.network.layers)
    assert any(n.startswith("1 layer: no integer weights in the trained network") for n in made.notes)
    kept = {s for s, _, _ in scales_of(model)}
    assert kept <= {s for s, _, _ in scales_of(made.data)}  # the calibration left them alone
    assert [s.name for s in made.stages] == ["ranges"]


# by hand

class Hand:
    """An ONNX file, node by node."""

    def __init__(self, x=(1, 3, 8, 8), opset=17):
        self.nodes, self.constants, self.x, self.opset = [], [], x, opset

    def constant(self, name, array):
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind, inputs, out, domain="", **attributes):
        self.nodes.append(helper.make_node(kind, inputs, [out], f"{out}_node", domain=domain, **attributes))
        return out

    def pair(self, x, scale, zero, **attributes):
        s, z = self.constant(f"{x}_s", np.asarray(scale, np.float32)), self.constant(f"{x}_z", zero)
        q = self.op("QuantizeLinear", [x, s, z], f"{x}_q", **attributes)
        return self.op("DequantizeLinear", [q, s, z], f"{x}_dq", **attributes)

    def bytes(self, out, shape):
        graph = helper.make_graph(
            self.nodes, "hand", [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.x)],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, shape)], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset),
                                                       helper.make_opsetid("com.microsoft", 1)],
                                 ir_version=8).SerializeToString()


def pytorch(norm=False, middle=None):
    """Weights as floats before a pair by channel, a transposed dense layer, as PyTorch exports them."""
    rng = np.random.default_rng(5)
    h = Hand()
    x = h.pair("x", 0.03, np.int8(3))
    w = h.constant("w", rng.normal(size=(4, 3, 3, 3)).astype(np.float32))
    wq = h.pair(w, np.abs(numpy_helper.to_array(h.constants[-1])).max((1, 2, 3)) / 127, np.zeros(4, np.int8), axis=0)
    y = h.op("Conv", [x, wq, h.constant("b", rng.normal(size=4).astype(np.float32))], "conv", pads=[1, 1, 1, 1])
    if norm:
        y = h.op("BatchNormalization", [y, *(h.constant(k, np.asarray(v, np.float32)) for k, v in (
            ("gamma", [0.5, -1.5, 2, 1]), ("beta", [0, 0.1, 0, -0.2]), ("mean", [0, 1, 0, 0.5]),
            ("var", [1, 2, 0.5, 1])))], "norm")
    y = h.op("Relu", [y], "relu")
    if middle:
        y = middle(h, y)
    y = h.pair(y, 0.06, np.int8(-128))
    y = h.op("MaxPool", [y], "pool", kernel_shape=[2, 2], strides=[2, 2])
    y = h.pair(y, 0.06, np.int8(-128))
    y = h.op("Flatten", [y], "flat")
    d = h.pair(h.constant("d", rng.normal(size=(5, 64)).astype(np.float32)), np.full(5, 0.025), np.zeros(5, np.int8),
               axis=0)
    y = h.op("Transpose", [d], "dt", perm=[1, 0]) and h.op("MatMul", ["flat", "dt"], "product")
    y = h.op("Add", [y, h.constant("db", rng.normal(size=5).astype(np.float32))], "sum")
    y = h.pair(y, 0.4, np.int8(0))
    return h.bytes(y, [1, 5]), y


def hand_samples(count=4, seed=2):
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32) * 1.5} for _ in range(count)]


def test_weights_of_pytorch_keep_scales_and_integers():
    model, y = pytorch()
    made = quantizing.quantize(read_onnx(model, "hand"), None, rules_of("generic-onnx"))
    conv, dense = made.network.layers
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.ModelProto.FromString(model).graph.initializer}
    assert np.array_equal(conv.params.scales, constants["w_s"])
    assert np.array_equal(conv.codes, np.rint(constants["w"] / constants["w_s"].reshape(-1, 1, 1, 1)))
    assert (dense.params.axis, dense.codes.shape) == (1, (64, 5))
    assert np.array_equal(dense.codes, np.clip(np.rint(constants["d"] / np.float32(0.025)), -128, 127).T)
    for feeds in hand_samples():  # biases were floats, and are sums in integers now: a step at most where it was close
        assert np.abs(outputs(made.data, feeds, y) - outputs(model, feeds, y)).max() <= 0.41
    made = api.quantize(read_onnx(model, "hand"), None, "generic-int8")
    for feeds in hand_samples():
        got, step = lite(made.data, feeds["x"])
        assert step == np.float32(0.4)
        assert np.abs(got - outputs(model, feeds, y)).max() <= 1.01 * step


def test_averages_without_a_pair_have_the_scale_of_what_they_average():
    h = Hand()
    x = h.pair("x", 0.03, np.int8(3))
    y = h.op("GlobalAveragePool", [x], "mean")
    y = h.op("Flatten", [y], "flat")
    w = h.op("DequantizeLinear", [h.constant("w", np.eye(3, dtype=np.int8)), h.constant("ws", np.float32(1))], "w_dq")
    y = h.pair(h.op("Gemm", [y, w], "dense"), 0.03, np.int8(3))
    model = h.bytes(y, [1, 3])
    made = api.quantize(read_onnx(model, "hand"), None, "generic-int8")
    assert made.notes == ("1 tensor: no scale in the trained network, that of what it averages (mean)",)
    assert [float(p.params.scales[0]) for p in made.network.quantized_points()] == [np.float32(0.03)] * 3
    for feeds in hand_samples():
        assert np.abs(lite(made.data, feeds["x"])[0] - outputs(model, feeds, y)).max() <= 0.0301


def test_batch_normalization_goes_into_scales():
    model, y = pytorch(norm=True)
    made = quantizing.quantize(read_onnx(model, "hand"), None, rules_of("generic-onnx"))
    conv = made.network.layers[0]
    w = {t.name: numpy_helper.to_array(t) for t in onnx.ModelProto.FromString(model).graph.initializer}
    factor = w["gamma"] / np.sqrt(w["var"] + 1e-5)
    np.testing.assert_allclose(conv.params.scales, w["w_s"] * np.abs(factor), rtol=1e-5)
    codes = np.rint(w["w"] / w["w_s"].reshape(-1, 1, 1, 1)) * np.sign(factor).reshape(-1, 1, 1, 1)
    assert np.array_equal(conv.codes, codes)
    assert made.stages[0].notes == ["as trained"]
    for feeds in hand_samples():
        assert np.abs(outputs(made.data, feeds, y) - outputs(model, feeds, y)).max() <= 0.41


def test_a_reduced_range_is_said():
    def clip(h, y):
        s, z = h.constant("r_s", np.float32(0.1)), h.constant("r_z", np.uint8(0))
        q = h.op("QuantizeLinear", [y, s, z], "r_q")
        q = h.op("Clip", [q, h.constant("r0", np.uint8(0)), h.constant("r127", np.uint8(127))], "r_c")
        return h.op("DequantizeLinear", [q, s, z], "r_dq")

    model, _ = pytorch(middle=clip)
    made = quantizing.quantize(read_onnx(model, "hand"), None, rules_of("generic-onnx"))
    assert any("'relu' had codes 0..127 in training, and has 0..255 with the same steps" in n for n in made.notes)
    scales = {p.params.scales[0] for p in made.network.quantized_points()}
    assert scales == {np.float32(s) for s in (0.03, 0.1, 0.06, 0.4)}


def pooled(scale=0.25):
    """A pool whose result has another scale than what it reads."""
    h = Hand()
    x = h.pair("x", 0.03, np.int8(3))
    w = h.constant("w", np.random.default_rng(1).integers(-127, 128, (4, 3, 1, 1)).astype(np.int8))
    s = h.constant("ws", np.float32(0.01))
    w = h.op("DequantizeLinear", [w, s], "w_dq")
    y = h.pair(h.op("Conv", [x, w], "conv"), 0.1, np.int8(0))
    y = h.op("MaxPool", [y], "pool", kernel_shape=[2, 2], strides=[2, 2])
    y = h.pair(y, scale, np.int8(-5))
    return h.bytes(y, [1, 4, 4, 4]), y


def test_moves_between_two_scales_keep_both():
    model, y = pooled()
    g = read_onnx(model, "hand")
    made = quantizing.quantize(g, None, rules_of("generic-onnx"))
    assert scales_of(made.data) == scales_of(model)
    for feeds in hand_samples():
        assert np.array_equal(outputs(made.data, feeds, y), outputs(model, feeds, y))
    made = api.quantize(g, None, "generic-int8")
    assert [n.op.name for n in made.graph.nodes] == ["CONV_2D", "MAX_POOL_2D", "QUANTIZE"]
    for feeds in hand_samples():
        got, step = lite(made.data, feeds["x"])
        assert step == 0.25
        assert np.abs(got.transpose(0, 3, 1, 2) - outputs(model, feeds, y)).max() <= 1.01 * step
    rules = dataclasses.replace(rules_of("generic-onnx"), same_scale=frozenset(("MaxPool",)))
    made = quantizing.quantize(g, None, rules)
    assert any(n.startswith("1 tensor: the scale of what they are moved from") and "steps 0.4 times as large" in n
               for n in made.notes)
    assert {p.params.scales[0] for p in made.network.quantized_points()} == {np.float32(0.03), np.float32(0.1)}


def test_what_has_no_place_is_refused_in_words():
    def refused(build, text, **facts):
        h = Hand((1, 4))
        out = build(h)
        with pytest.raises(UnsupportedError) as e:
            quantizing.quantize(read_onnx(h.bytes(out, [1, 4]), "hand"), None, rules_of("generic-onnx"))
        assert text in e.value.message
        for k, v in facts.items():
            assert v in e.value.facts[k]

    def dense(h, x):
        w = h.op("DequantizeLinear", [h.constant("w", np.eye(4, dtype=np.int8)), h.constant("ws", np.float32(1))], "wd")
        return h.op("MatMul", [x, w], "y")

    def at_run_time(h):
        h.op("ReduceMax", ["x"], "s", keepdims=0)
        q = h.op("QuantizeLinear", ["x", "s", h.constant("z", np.int8(0))], "q")
        return dense(h, h.op("DequantizeLinear", [q, "s", "z"], "xd"))

    refused(at_run_time, "has a scale that is computed when the network runs", **{"try": "static quantization"})
    refused(lambda h: dense(h, h.pair("x", [1, 2, 3, 4], np.zeros(4, np.int8), axis=1)),
            "'x' of 'hand' is a computed tensor with a scale for each channel", got="4 scales")
    refused(lambda h: dense(h, h.pair("x", -1, np.int8(0))), "has a scale that is none", got="-1")

    def other(h):
        x = h.pair("x", 1, np.int8(0))
        q = h.op("QuantizeLinear", [x, "x_s", "x_z"], "q2")
        q = h.op("QLinearLeakyRelu2", [q, "x_s", "x_z"], "l", domain="com.microsoft")
        return dense(h, h.op("DequantizeLinear", [q, "x_s", "x_z"], "ld"))

    refused(other, "has operators on integers that are not taken apart", got="QLinearLeakyRelu2")


def test_repairs_that_change_tensors_are_refused_and_others_run_on_demand(tmp_path):
    g = read_onnx(by_ort(tmp_path), "small")
    with pytest.raises(UsageError) as e:
        quantizing.quantize(g, None, rules_of("generic-onnx"), Options("equalize+min-max"))
    assert "was trained with quantization, and equalize changes the tensors" in e.value.message
    made = quantizing.quantize(g, samples(g, 8), rules_of("generic-onnx"), Options("min-max+correct"))
    assert [s.name for s in made.stages] == ["ranges", "correct"]
    assert not made.notes
    made = quantizing.quantize(g, None, rules_of("generic-onnx"), Options("min-max+correct"))
    assert any("without data: calibrated with noise" in n for n in made.notes)


def test_integers_in_a_file_of_integers_are_samples_too(tmp_path):
    """A TFLite file with integer ends: its samples are the integers that it takes; an unquantized rest is calibrated
    with what they stand for."""
    g = read_onnx(by_ort(tmp_path), "small")
    file = read_tflite(api.quantize(g, None, "generic-int8").data, "small")
    x = file.values[file.inputs[0]]
    assert x.dtype.value == "int8"
    rng = np.random.default_rng(0)
    feeds = [{x.name: rng.integers(-128, 128, x.shape).astype(np.int8)} for _ in range(4)]
    made = api.quantize(file, ListedSamples(feeds), "a311d")
    scale, zero = x.quantization.scale, x.quantization.zero_point
    real = np.stack([f[x.name] for f in feeds]).astype(np.float32)
    seen = np.stack([f[x.name] for f in made.samples])
    np.testing.assert_allclose(seen, (real - zero).transpose(0, 1, 4, 2, 3) * np.float32(scale), rtol=1e-6)
    assert {made.graph.values[v].dtype.value for v in made.graph.inputs} <= {"int8", "uint8"}
    for f in feeds:
        a = (f[x.name].astype(np.float32) - zero) * np.float32(scale)
        (got, step), (want, _) = lite(made.data, a), lite(bytes(file.source), a)
        assert np.abs(got - want).max() <= 1.01 * step


def fake_quantized():
    rng = np.random.default_rng(0)
    m = ModelBuilder("fake")

    def tensor(name, shape, data=None):
        return m.tensor(name, shape, "float32", data=None if data is None else data.astype(np.float32))

    def fake(x, name, shape, low, high):  # LiteRT runs none of narrow range
        y = tensor(name, shape)
        m.op("FAKE_QUANT", [x], [y], min=low, max=high, num_bits=8, narrow_range=False)
        return y

    x = tensor("x", (1, 8, 8, 3))
    xq = fake(x, "xq", (1, 8, 8, 3), -2.0, 2.5)
    w = fake(tensor("w", (4, 3, 3, 3), rng.normal(size=(4, 3, 3, 3)) / 4), "wq", (4, 3, 3, 3), -0.8, 0.79375)
    y, d = tensor("y", (1, 8, 8, 4)), tensor("d", (1, 4))
    m.op("CONV_2D", [xq, w, tensor("b", (4,), rng.normal(size=4))], [y], padding="SAME", stride_h=1, stride_w=1,
         dilation_h_factor=1, dilation_w_factor=1, fused_activation_function="RELU6")
    yq = fake(y, "yq", (1, 8, 8, 4), 0.0, 6.0)
    m.op("MEAN", [yq, m.tensor("axes", (2,), "int32", data=np.array([1, 2], np.int32))], [d], keep_dims=False)
    dq = fake(d, "dq", (1, 4), 0.0, 3.0)
    return read_tflite(m.build([x], [dq]), "fake")


def test_fake_quantized_tflite_becomes_integers_without_data():
    g = fake_quantized()
    made = api.quantize(g, None, "generic-int8")
    assert not any("made up" in n or "calibrated" in n for n in made.notes)
    q = made.graph.values[made.graph.inputs[0]].quantization
    assert q.scale == pytest.approx(4.5 / 255)
    rng = np.random.default_rng(4)
    for _ in range(3):
        x = rng.uniform(-2, 2.5, (1, 8, 8, 3)).astype(np.float32)
        got, step = lite(made.data, x)
        assert step == pytest.approx(3 / 255)
        assert np.abs(got - lite(bytes(g.source), x)[0]).max() <= 1.51 * step


def test_the_command_needs_no_data(tmp_path, capsys):
    from npulab.cli import run_arguments

    source, made = tmp_path / "q.onnx", tmp_path / "q.tflite"
    source.write_bytes(by_ort(tmp_path))
    assert run_arguments(["quantize", str(source), "--target", "a311d", "-o", str(made)]) == 0
    out = capsys.readouterr().out
    assert "as trained" in out
    assert "made up" not in out
    assert max(len(line) for line in out.splitlines() if str(made) not in line) <= 80
    assert made.stat().st_size > 0


def test_zero_points_and_bits_are_fitted_to_the_last_bit():
    from npulab.quantization.refit import fitted

    p = Params(Scheme(8, False), np.array([0.0123], np.float32), np.array([7], np.int32))
    (same,), (shift,), (wide,) = ([fitted(p, s)] for s in ([Scheme(8), Scheme(8, False)], [Scheme(16), Scheme(8)],
                                                           [Scheme(16, symmetric=True)]))
    codes = np.arange(256, dtype=np.uint8)
    assert (same.scheme, same.zeros[0]) == (Scheme(8, False), 7)
    assert np.array_equal(shift.real((codes.astype(int) - 128).astype(np.int8)), p.real(codes))
    assert np.array_equal(wide.real(((codes.astype(int) - 7) * 128).astype(np.int16)), p.real(codes))


@needs_shared
@pytest.mark.parametrize(("name", "target", "steps"), [
    ("pretrainedResnet_quant", "generic-int8", 0), ("mobilenet_v1_0.25_128_quant", "a311d", 0),
    ("pretrainedResnet_quant", "hailo8", 1), ("mobilenet_v1_0.25_128_quant", "generic-int8", 5)])
def test_real_networks_go_to_other_chips(name, target, steps):
    """Kept, and of the other signedness: without loss for Hailo's int8 weights beside uint8; TFLite's int8 has
    symmetric weights only, so those of a uint8 network are rounded a second time (`steps` measured)."""
    file = MODELS / "quantized" / f"{name}.tflite"
    g = api.load(file)
    made = api.quantize(g, None, target)
    x = g.values[g.inputs[0]]
    out = made.graph.values[made.graph.outputs[0]].name
    rng = np.random.default_rng(0)
    for _ in range(3):
        codes = rng.integers(np.iinfo(x.dtype.value).min, np.iinfo(x.dtype.value).max + 1, x.shape)
        real = ((codes - x.quantization.zero_point) * np.float32(x.quantization.scale)).astype(np.float32)
        want, step = lite(file.read_bytes(), real)
        got = lite(made.data, real)[0] if made.rules.file == "tflite" else runner(made.data, [out], plain=True)(
            {made.graph.values[made.graph.inputs[0]].name: np.ascontiguousarray(real.transpose(0, 3, 1, 2))})[0]
        assert np.abs(got - want).max() <= (steps + 0.01) * step
    if target == "hailo8":  # bit for bit what it was, up to the type
        bare, found = trained.as_trained(api_onnx(g))
        was = trained.as_it_was(bare, found)
        feeds = next(iter(trained.probes(made.network)))
        assert np.array_equal(outputs(was, feeds, out), outputs(made.data, feeds, out))


def api_onnx(graph):
    from npulab.dialects import from_tflite

    return from_tflite(graph).graph


def test_a_float_network_says_nothing():
    g = small()
    assert not trained.is_trained(g)
    net = network(g, rules_of("generic-onnx"))
    kept = trained.apply(net, trained.Trained())
    assert not kept.is_complete(net)
    assert integer_model(net)


def requantized():
    """A tensor quantized a second time before an operator that only moves it, and before one that computes."""
    h = Hand()
    x = h.pair("x", 0.03, np.int8(3))
    w = h.op("DequantizeLinear", [h.constant("w", np.eye(3, dtype=np.int8).reshape(3, 3, 1, 1)),
                                  h.constant("ws", np.float32(1))], "w_dq")
    y = h.pair(h.op("Conv", [x, w], "conv"), 0.02, np.int8(0))
    s, z = h.constant("s2", np.float32(0.05)), h.constant("z2", np.int8(9))
    again = h.op("DequantizeLinear", [h.op("QuantizeLinear", [y, s, z], "again_q"), s, z], "again")
    moved = h.pair(h.op("MaxPool", [again], "pool", kernel_shape=[2, 2], strides=[2, 2]), 0.05, np.int8(9))
    return h, moved, again


def test_a_second_rounding_before_a_move_is_one_behind_it():
    h, moved, _ = requantized()
    model = h.bytes(moved, [1, 3, 4, 4])
    made = quantizing.quantize(read_onnx(model, "hand"), None, rules_of("generic-onnx"))
    assert not made.notes
    for feeds in hand_samples():
        assert np.array_equal(outputs(made.data, feeds, moved), outputs(model, feeds, moved))
    h, _, again = requantized()
    y = h.pair(h.op("Sigmoid", [again], "act"), 1 / 256, np.int8(-128))
    made = quantizing.quantize(read_onnx(h.bytes(y, [1, 3, 8, 8]), "hand"), None, rules_of("generic-onnx"))
    assert made.notes == ("'conv' was quantized twice, and keeps the first: steps of 0.02, not 0.05",)
