"""The validator: networks that are right pass, and every way to be wrong is found and named."""

import ast
import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from layers import litert
from npulab.errors import ModelError
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers import load
from npulab.importers.onnx import read_onnx
from npulab.importers.tflite import read_tflite
from npulab.ir import DType, Quantization
from npulab.quantization.types import Scheme
from npulab.targets.facts.quantization import rules_of
from npulab.validation import violations
from npulab.validation.view import view
from shared import MODELS, needs_shared

SRC = Path(__file__).resolve().parents[1] / "src" / "npulab"
QUANTIZED = sorted((MODELS / "quantized").glob("*.tflite"))


# a TFLite network that is right

def network(dtype="int8", per_channel=True, wide=False, scale=0.05):
    """CONV, pool, DEPTHWISE, CONCATENATION, RESHAPE, FULLY_CONNECTED, ADD, SOFTMAX; every scale as TFLite says."""
    rng = np.random.default_rng(5)
    m = ModelBuilder("right")
    unsigned = dtype == "uint8"
    x_zero = 0 if wide else 128 if unsigned else -3

    def data(name, shape, s, z=None):
        return m.tensor(name, shape, "int16" if wide else dtype, scale=s, zero_point=x_zero if z is None else z)

    def layer(name, shape, axis, channels, x_scale):
        codes = rng.integers(1 if unsigned else -127, 256 if unsigned else 128, shape)
        scales = np.float32(rng.uniform(0.001, 0.01, channels if per_channel else 1))
        w = m.tensor(f"{name}_w", shape, dtype, scales=scales.tolist(), axis=axis,
                     zero_points=[128 if unsigned else 0] * scales.size, data=codes.astype(dtype))
        sums = np.float32(x_scale) * scales
        b = m.tensor(f"{name}_b", (channels,), "int64" if wide else "int32", scales=sums.tolist(),
                     data=rng.integers(-2000, 2000, channels).astype(np.int64 if wide else np.int32))
        return [w, b]

    same = {"stride_h": 1, "stride_w": 1, "padding": "SAME"}
    x = data("x", (1, 8, 8, 3), scale)
    a, p, d = data("a", (1, 8, 8, 4), 0.04), data("p", (1, 4, 4, 4), 0.04), data("d", (1, 4, 4, 4), 0.04)
    both, flat = data("both", (1, 4, 4, 8), 0.04), data("flat", (1, 128), 0.04)
    f, g = data("f", (1, 5), 0.2), data("g", (1, 5), 0.3)
    y = data("y", (1, 5), 1 / 32768 if wide else 1 / 256, 0 if wide or unsigned else -128)
    m.op("CONV_2D", [x, *layer("conv", (4, 3, 3, 3), 0, 4, scale)], [a], **same)
    m.op("MAX_POOL_2D", [a], [p], filter_height=2, filter_width=2, stride_h=2, stride_w=2, padding="VALID",
         version=3 if wide else 2)
    m.op("DEPTHWISE_CONV_2D", [p, *layer("dw", (1, 3, 3, 4), 3, 4, 0.04)], [d], depth_multiplier=1, **same)
    m.op("CONCATENATION", [p, d], [both], axis=3, version=3 if wide else 2)
    shape = m.tensor("shape", (2,), "int32", data=np.array([1, 128], np.int32))
    m.op("RESHAPE", [both, shape], [flat])
    m.op("FULLY_CONNECTED", [flat, *layer("fc", (5, 128), 0, 5, 0.04)], [f], version=7 if wide else 5)
    m.op("ADD", [f, f], [g], version=3 if wide else 2)
    m.op("SOFTMAX", [g], [y], beta=1.0, version=3 if wide else 2)
    return m.build([x], [y])


KINDS = {"int8": ({}, "generic-int8"), "per tensor": ({"per_channel": False}, "generic-int8"),
         "int16": ({"wide": True}, "generic-int8"), "uint8": ({"dtype": "uint8", "per_channel": False}, "a311d"),
         "artpec": ({}, "axis_artpec9"), "coral": ({}, "coral_edgetpu"), "ethos": ({"wide": True}, "ethos_u55")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_network_passes_and_runs(kind):
    options, rules = KINDS[kind]
    model = network(**options)
    assert [str(v) for v in violations(read_tflite(model, kind), rules)] == []
    dtype = np.int16 if options.get("wide") else np.dtype(options.get("dtype", "int8"))
    assert litert(model, {"x": np.ones((1, 8, 8, 3), dtype)})["y"].shape == (1, 5)


def changed(graph, name, **what):
    """The graph with another tensor in the place of one, by name."""
    values = tuple(dataclasses.replace(v, **what) if v.name == name else v for v in graph.values)
    assert any(v.name == name for v in graph.values)
    return dataclasses.replace(graph, values=values)


def value(graph, name):
    return next(v for v in graph.values if v.name == name)


def scaled(graph, name, scales=None, zeros=None, axis=None):
    q = value(graph, name).quantization
    scales = tuple(scales if scales is not None else q.scales)
    zeros = tuple(zeros if zeros is not None else q.zero_points[:1] * len(scales))
    return changed(graph, name, quantization=Quantization(scales, zeros, q.axis if axis is None else axis))


def codes(graph, name, array):
    return changed(graph, name, constant=memoryview(np.ascontiguousarray(array).tobytes()))


def edited(graph, name, place, number):
    array = value(graph, name).array().copy()
    array.reshape(-1)[place] = number
    return codes(graph, name, array)


def factor(name, by):
    return lambda g: scaled(g, name, [float(np.float32(s * by)) for s in value(g, name).quantization.scales])


NARROW = dataclasses.replace(rules_of("generic-int8"), bias_bits=16)
DATA = ("x", "a", "p", "d", "both", "flat", "f", "g", "y")
WEIGHTS = {"conv": 0, "dw": 3, "fc": 0}
WRONG = [  # (what, network, rules, mutation of the graph, where, words of the rule, found)
    *((f"{t} unsigned", "int8", "generic-int8", lambda g, t=t: changed(g, t, dtype=DType.UINT8),
       f"tensor '{t}'", "Data are of these element types", "uint8") for t in DATA if t not in ("y",)),
    *((f"{t} per channel", "int8", "generic-int8", lambda g, t=t: scaled(g, t, [0.04, 0.05]), f"tensor '{t}'",
       "Data have one scale for the whole tensor", "2 scales") for t in DATA),
    *((f"{t} without scale", "int8", "generic-int8", lambda g, t=t: changed(g, t, quantization=None), f"tensor '{t}'",
       "Integers have a positive, finite scale", "none") for t in DATA),
    *((f"{t} zero point out of range", "int8", "generic-int8", lambda g, t=t: scaled(g, t, zeros=[128]),
       f"tensor '{t}'", "zero point is a number of the type", "128") for t in DATA),
    *((f"{t} zero scale", "int8", "generic-int8", lambda g, t=t: scaled(g, t, [0.0]), f"tensor '{t}'",
       "Data have a positive, finite scale", "0") for t in DATA),
    *((f"{t} infinite", "int8", "generic-int8", lambda g, t=t: scaled(g, t, [float("inf")]), f"tensor '{t}'",
       "Data have a positive, finite scale", "inf") for t in DATA),
    *((f"{t} shifted", "int16", "generic-int8", lambda g, t=t: scaled(g, t, zeros=[1]), f"tensor '{t}'",
       "Data are symmetric: the zero point is 0", "1") for t in DATA),
    *((f"{t} no power of two", "int8", "max78000", lambda g: g, f"tensor '{t}'", "Data have powers of two as scales",
       "0.") for t in DATA if t != "y"),
    *((f"{w} at -128", "int8", "generic-int8", lambda g, w=w: edited(g, f"{w}_w", 7, -128), f"tensor '{w}_w'",
       "Weights leave the lowest number of the type out", "-128") for w in WEIGHTS),
    *((f"{w} zero point", "int8", "generic-int8", lambda g, w=w: scaled(g, f"{w}_w", zeros=[1] * len(
        value(g, f"{w}_w").quantization.scales)), f"tensor '{w}_w'", "Weights are symmetric: the zero point is 0", "1")
      for w in WEIGHTS),
    *((f"{w} along axis {(axis + 1) % 2}", "int8", "generic-int8",
       lambda g, w=w, axis=axis: scaled(g, f"{w}_w", axis=(axis + 1) % 2), f"tensor '{w}_w'",
       "scales along the output channels", f"axis {(axis + 1) % 2}") for w, axis in WEIGHTS.items()),
    *((f"{w} too few scales", "int8", "generic-int8",
       lambda g, w=w: scaled(g, f"{w}_w", value(g, f"{w}_w").quantization.scales[:-1]), f"tensor '{w}_w'",
       "one scale", "scales") for w in WEIGHTS),
    *((f"{w} per channel", "int8", "a311d", lambda g: g, f"tensor '{w}_w'",
       "Weights have one scale for the whole tensor", "scales") for w in WEIGHTS),
    *((f"{w} unsigned", "int8", "generic-int8", lambda g, w=w: changed(g, f"{w}_w", dtype=DType.UINT8),
       f"tensor '{w}_w'", "Weights are of these element types", "uint8") for w in WEIGHTS),
    *((f"{w} without scale", "int8", "generic-int8", lambda g, w=w: changed(g, f"{w}_w", quantization=None),
       f"tensor '{w}_w'", "Integers have a positive, finite scale", "none") for w in WEIGHTS),
    *((f"{w} NaN", "int8", "generic-int8", lambda g, w=w: scaled(g, f"{w}_w", [float("nan")] + [0.01] * (
        len(value(g, f"{w}_w").quantization.scales) - 1)), f"tensor '{w}_w'", "Weights have a positive, finite scale",
       "nan") for w in WEIGHTS),
    *((f"{w} bias scale", "int8", "generic-int8", factor(f"{w}_b", 1 + 1e-5), f"tensor '{w}_b'",
       "scale of a bias is input scale * weight scale", "") for w in WEIGHTS),
    *((f"{w} bias zero point", "int8", "generic-int8", lambda g, w=w: scaled(g, f"{w}_b", zeros=[3] * len(
        value(g, f"{w}_b").quantization.scales)), f"tensor '{w}_b'", "zero point of a bias is 0", "3")
      for w in WEIGHTS),
    *((f"{w} bias of fewer scales", "int8", "generic-int8", lambda g, w=w: scaled(
        g, f"{w}_b", value(g, f"{w}_b").quantization.scales[:2]), f"tensor '{w}_b'", "as many scales as the weights",
       "2 scales") for w in WEIGHTS),
    *((f"{w} bias axis", "int8", "generic-int8", lambda g, w=w: scaled(g, f"{w}_b", axis=3), f"tensor '{w}_b'",
       "axis of scales is one of the tensor's", "axis 3") for w in WEIGHTS),
    *((f"{w} bias of 16 bits", "int8", "generic-int8", lambda g, w=w: changed(
        g, f"{w}_b", dtype=DType.INT16, constant=memoryview(bytes(2 * value(g, f"{w}_b").elements))),
       f"tensor '{w}_b'", "Biases are int32", "int16") for w in WEIGHTS),
    *((f"{w} bias of floats", "int8", "generic-int8", lambda g, w=w: changed(
        g, f"{w}_b", dtype=DType.FLOAT32, quantization=None), f"tensor '{w}_b'", "Biases are int32", "float32")
      for w in WEIGHTS),
    *((f"{w} bias of 64 bits", "int8", "generic-int8", lambda g, w=w: changed(
        g, f"{w}_b", dtype=DType.INT64, constant=memoryview(bytes(8 * value(g, f"{w}_b").elements))),
       f"tensor '{w}_b'", "Biases are int32", "int64") for w in WEIGHTS),
    *((f"{w} overflows", "int8", "generic-int8", lambda g, w=w: edited(g, f"{w}_b", 2, 2**31 - 9), op,
       "Sums of products fit into 32 bits whatever the input", "in channel 2")
      for w, op in (("conv", "CONV_2D"), ("dw", "DEPTHWISE_CONV_2D"), ("fc", "FULLY_CONNECTED"))),
    ("wide bias", "int8", NARROW, lambda g: edited(g, "conv_b", 1, 2**15), "tensor 'conv_b'",
     "Biases fit into 16 bits", "32768"),
    ("bias of 41 bits", "int16", "ethos_u55", lambda g: edited(g, "fc_b", 1, -(2**39)), "tensor 'fc_b'",
     "Biases fit into 40 bits", "549755813888"),
    ("pool", "int8", "generic-int8", factor("p", 1.001), "MAX_POOL_2D", "MaxPool have one scale", "'p'"),
    ("pool zero point", "int8", "generic-int8", lambda g: scaled(g, "p", zeros=[-2]), "MAX_POOL_2D",
     "MaxPool have one scale", "zero point -2"),
    ("concat", "int8", "generic-int8", factor("d", 1.001), "CONCATENATION", "Concat have one scale", "'d'"),
    ("reshape", "int8", "generic-int8", factor("flat", 2), "RESHAPE", "Reshape have one scale", "'flat'"),
    ("softmax", "int8", "generic-int8", factor("y", 1.001), "SOFTMAX", "prescribed scale and zero point", "0.00391"),
    ("softmax zero", "int8", "generic-int8", lambda g: scaled(g, "y", zeros=[-127]), "SOFTMAX",
     "prescribed scale and zero point", "zero point -127"),
    ("softmax 16", "int16", "generic-int8", factor("y", 2), "SOFTMAX", "prescribed scale and zero point", "6.10"),
    ("softmax uint8", "uint8", "a311d", lambda g: scaled(g, "y", zeros=[1]), "SOFTMAX", "prescribed scale", "point 1"),
    ("ratio", "int8", "axis_artpec9", factor("conv_w", 1e9), "CONV_2D", "output scale is below 65536", ""),
    ("ratio a311d", "uint8", "a311d", factor("fc_w", 1e6), "FULLY_CONNECTED", "output scale is below 256", ""),
    ("join", "int8", "axis_artpec9", factor("both", 1 / 200), "CONCATENATION", "at least 1/128 of each input's", ""),
    ("float weights", "int8", "generic-int8", lambda g: changed(
        g, "fc_w", dtype=DType.FLOAT32, quantization=None, constant=memoryview(bytes(4 * 640))), "tensor 'fc_w'",
     "operator on integers has weights of integers", "float32"),
    ("hybrid", "int8", "generic-int8", lambda g: changed(changed(g, "x", dtype=DType.FLOAT32, quantization=None), "a",
                                                         dtype=DType.FLOAT32, quantization=None), "CONV_2D",
     "operator that has weights of integers has data of integers", "floats"),
    ("float operator", "int8", "axis_artpec9", lambda g: changed(changed(
        g, "g", dtype=DType.FLOAT32, quantization=None), "y", dtype=DType.FLOAT32, quantization=None), "SOFTMAX",
     "No operator computes on floats", "floats"),
    ("two types", "int8", "ethos_u55", lambda g: changed(scaled(g, "f", zeros=[0]), "f", dtype=DType.INT16), "ADD",
     "Operands and results have one element type", "int16 and int8"),
    ("file", "int8", "generic-onnx", lambda g: g, "the file", "tools read one format", "tflite"),
]


@pytest.mark.parametrize(("kind", "rules", "mutate", "where", "rule", "found"), [w[1:] for w in WRONG],
                         ids=[w[0] for w in WRONG])
def test_what_is_wrong_is_found_where_it_is(kind, rules, mutate, where, rule, found):
    graph = mutate(GRAPHS[kind])
    seen = violations(graph, rules)
    assert any(v.where.startswith(where) and rule in v.rule and found in v.found and v.allowed and v.source
               for v in seen), "\n".join(map(str, seen))


GRAPHS = {kind: read_tflite(network(**options), kind) for kind, (options, _) in KINDS.items()}


@pytest.mark.filterwarnings("error")
def test_whatever_a_file_holds_is_judged_or_refused_by_name():
    """Damaged networks: other shapes, types, scales, axes and buffers in any combination."""
    rng = np.random.default_rng(11)
    odd = [0.0, -1.0, float("inf"), float("nan"), 1e-45, 3e38, 0.05]
    judged, refused = 0, set()
    for _ in range(400):
        graph = GRAPHS[rng.choice(["int8", "int16", "uint8"])]
        for name in rng.choice([v.name for v in graph.values], 2):
            v = value(graph, name)
            n = int(rng.choice([1, 2, max(1, *v.shape[:1], 1)]))
            kinds = {
                "shape": lambda v=v: tuple(int(x) for x in rng.choice([0, 1, 3, 5], rng.integers(0, 5))),
                "dtype": lambda: rng.choice([DType.INT8, DType.UINT8, DType.INT4, DType.INT16, DType.FLOAT32,
                                             DType.BOOL]),
                "quantization": lambda n=n: Quantization(tuple(map(float, rng.choice(odd, n))), tuple(
                    map(int, rng.integers(-300, 300, n))), int(rng.integers(-2, 5))),
                "constant": lambda: memoryview(bytes(rng.integers(0, 256, rng.integers(0, 40)).astype(np.uint8)))}
            kind = str(rng.choice(list(kinds)))
            graph = changed(graph, name, **{kind: kinds[kind]()})
        try:
            found = violations(graph, str(rng.choice(["generic-int8", "a311d", "axis_artpec9", "ethos_u85"])))
        except ModelError as e:
            refused.add(e.message.partition("'")[2].partition("'")[2])
        else:
            judged += 1
            assert all(v.where and v.rule and v.found and v.allowed and v.source for v in found)
    assert judged > 200
    assert refused == {" has a buffer of the wrong length"}


def test_a_bias_is_exact_to_a_millionth():
    right = factor("conv_b", 1 + 2e-7)(GRAPHS["int8"])
    assert violations(right, "generic-int8") == []


def test_concatenations_of_uint8_may_rescale_as_the_kernel_does():
    apart = factor("d", 1.5)(GRAPHS["uint8"])
    assert violations(apart, "a311d") == []


def weighty(count, weight=127, dtype="int8", bias=0, zero=0, w_zero=0):
    m = ModelBuilder("sum")
    x = m.tensor("x", (1, count), dtype, scale=0.5, zero_point=zero)
    w = m.tensor("w", (1, count), dtype, scale=0.25, zero_point=w_zero, data=np.full(count, weight, dtype))
    b = m.tensor("b", (1,), "int32", scale=0.125, data=np.array([bias], np.int32))
    y = m.tensor("y", (1, 1), dtype, scale=0.5, zero_point=zero)
    m.op("FULLY_CONNECTED", [x, w, b], [y])
    return read_tflite(m.build([x], [y]), "sum")


def test_weights_add_up_to_what_the_chip_sums():
    assert violations(weighty(65536), "ethos_u55") == []
    found = violations(weighty(65537), "ethos_u55")
    assert any("add up to no more than 8323072" in v.rule and v.found.startswith("8323199") for v in found)
    assert violations(weighty(65537), "coral_edgetpu") == []  # only where the chip has such a limit


@pytest.mark.parametrize(("count", "bias", "zero", "fits"), [
    (1000, 2**31 - 1 - 1000 * 127 * 128, 0, True), (1000, 2**31 - 1000 * 127 * 128, 0, False),
    (1000, -(2**31 - 1 - 1000 * 127 * 128), 0, True), (1000, -(2**31 - 1000 * 127 * 128), 0, False),
    (1000, 2**31 - 1 - 1000 * 127 * 255, -128, True), (1000, 2**31 - 1000 * 127 * 255, -128, False),
    (1000, 2**31 - 1 - 1000 * 127 * 255, 127, True), (1000, 2**31 - 1000 * 127 * 255, 127, False)])
def test_the_worst_case_of_a_sum_is_exact(count, bias, zero, fits):
    found = violations(weighty(count, bias=bias, zero=zero), "generic-int8")
    assert any("Sums of products" in v.rule for v in found) != fits


def test_distances_of_weights_are_from_their_zero_point():
    assert violations(weighty(33026, 255, "uint8"), "a311d")[0].rule.startswith("Sums of products fit into 32 bits")
    assert violations(weighty(33025, 255, "uint8"), "a311d") == []
    assert violations(weighty(60000, 255, "uint8", w_zero=255), "a311d") == []


def test_four_and_two_bits_are_read_from_shared_bytes():
    m = ModelBuilder("four")
    x = m.tensor("x", (1, 4), "int8", scale=0.5, zero_point=0)
    w = m.tensor("w", (3, 4), "int4", scale=0.25, zero_point=0,
                 data=np.array([0x21, 0x7F, 0x19, 0, 0, 0], np.uint8))  # 1 2 -1 7 | -7 1 0 0 | 0 0 0 0
    y = m.tensor("y", (1, 3), "int8", scale=0.5, zero_point=0)
    m.op("FULLY_CONNECTED", [x, w, -1], [y])
    graph = read_tflite(m.build([x], [y]), "four")
    weights = view(graph).layers[0].weights
    assert weights.integers().tolist() == [[1, 2, -1, 7], [-7, 1, 0, 0], [0, 0, 0, 0]]
    assert violations(graph, "generic-int8") == []
    low = codes(graph, "w", np.array([0x21, 0x7F, 0x18, 0, 0, 0], np.uint8))  # -8
    assert [v.found for v in violations(low, "generic-int8")] == ["-8"]
    assert "element types" in violations(graph, "coral_edgetpu")[0].rule
    two = changed(changed(graph, "w", dtype=DType.INT2), "w", constant=memoryview(b"\xe4\x00\x00"))
    assert view(two).layers[0].weights.integers()[0].tolist() == [0, 1, -2, -1]


# ONNX

def qdq(symmetric=False, per_channel=True):
    """A network that ONNX Runtime's static quantizer made: Conv, Relu, MaxPool, depthwise Conv, Gemm."""
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    rng = np.random.default_rng(2)

    def weight(name, *shape):
        return numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), name)

    nodes = [helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv", pads=[1, 1, 1, 1]),
             helper.make_node("Relu", ["c1"], ["r1"]),
             helper.make_node("MaxPool", ["r1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
             helper.make_node("Conv", ["p1", "w2", "b2"], ["c2"], "dw", group=4, pads=[1, 1, 1, 1]),
             helper.make_node("Flatten", ["c2"], ["f"]),
             helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "fc")]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [weight("w1", 4, 3, 3, 3), weight("b1", 4), weight("w2", 4, 1, 3, 3), weight("b2", 4), weight("w3", 64, 5),
         weight("b3", 5)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    class Reader(CalibrationDataReader):
        left = 4

        def get_next(self):
            self.left -= 1
            return {"x": rng.normal(0, 1, (1, 3, 8, 8)).astype(np.float32)} if self.left >= 0 else None

    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "a.onnx"), Path(folder, "b.onnx")
        before.write_bytes(model.SerializeToString())
        quantize_static(before, after, Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel,
                        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
                        extra_options={"ActivationSymmetric": symmetric})
        return read_onnx(after.read_bytes(), "net")


ONNX = {(s, c): qdq(s, c) for s in (False, True) for c in (False, True)}


def test_what_onnx_runtime_quantized_passes():
    for graph in ONNX.values():
        assert [str(v) for v in violations(graph, "generic-onnx")] == []
    for per_channel in (False, True):
        assert [str(v) for v in violations(ONNX[True, per_channel], "nvidia_tensorrt")
                if "QuantizeLinear" not in v.rule] == []
    asymmetric = violations(ONNX[False, True], "nvidia_tensorrt")
    assert {v.rule for v in asymmetric} >= {"Data are symmetric: the zero point is 0."}


def parameter(graph, tensor, which):
    """The name of the scale (1) or zero point (2) of the DequantizeLinear that reads a tensor."""
    node = next(n for n in graph.nodes if n.op.name == "DequantizeLinear" and graph.values[n.inputs[0]].name == tensor)
    return graph.values[node.inputs[which]].name


ONNX_WRONG = {
    "weight scale zero": (lambda g: codes(g, parameter(g, "w1_quantized", 1), np.zeros(4, np.float32)),
                          "generic-onnx", "tensor 'w1_quantized'", "positive, finite scale", "0, 0, 0 and 1 more"),
    "bias scale": (lambda g: codes(g, parameter(g, "b1_quantized", 1), value(
        g, parameter(g, "b1_quantized", 1)).array() * np.float32(1.01)), "generic-onnx", "tensor 'b1_quantized'",
        "input scale * weight scale", ""),
    "bias zero point": (lambda g: codes(g, parameter(g, "b3_quantized", 2), np.full(value(
        g, parameter(g, "b3_quantized", 2)).shape, 4, np.int32)), "generic-onnx", "tensor 'b3_quantized'",
        "zero point of a bias is 0", "4"),
    "weight zero point": (lambda g: codes(g, parameter(g, "w2_quantized", 2), np.array([0, 1, 0, 0], np.int8)),
                          "generic-onnx", "tensor 'w2_quantized'", "Weights are symmetric", "1"),
    "overflow": (lambda g: edited(g, "b1_quantized", 1, 2**31 - 2), "generic-onnx", "Conv (node",
                 "Sums of products fit into 32 bits", "in channel 1"),
    "powers of two": (lambda g: g, "esp32s3", "tensor 'x_QuantizeLinear", "Data have powers of two as scales", ""),
    "per channel": (lambda g: g, "esp32s3", "tensor 'w1_quantized'", "Weights have", "4 scales"),
    "unsigned": (lambda g: g, "hailo8", "tensor 'x_QuantizeLinear", "Data are of these element types", "int8"),
    "biases of 8 bits": (lambda g: edited(g, "b1_quantized", 1, 40000), NARROW, "tensor 'b1_quantized'",
                         "Biases fit into 16 bits", "40000"),
    "file": (lambda g: g, "generic-int8", "the file", "tools read one format", "onnx"),
}


@pytest.mark.parametrize("case", ONNX_WRONG)
def test_what_is_wrong_in_onnx_is_found_where_it_is(case):
    mutate, rules, where, rule, found = ONNX_WRONG[case]
    seen = violations(mutate(ONNX[False, True]), rules)
    assert any(v.where.startswith(where) and rule in v.rule and found in v.found for v in seen), \
        "\n".join(map(str, seen))


def test_the_axis_of_weights_is_the_one_that_counts_results():
    layers = {la.op: la for la in view(ONNX[False, True]).layers if la.weights is not None}
    assert {op: (la.channel, la.weights.axis, la.weights.scales.size) for op, la in layers.items()} == {
        "Conv": (0, 0, 4), "DepthwiseConv": (0, 0, 4), "Gemm": (1, 1, 5)}
    relu = next(la for la in view(ONNX[False, True]).layers if la.op == "Conv")
    assert relu.results[0].name.startswith("r1"), "a Relu is computed as one with the Conv before it"


def test_operators_that_stay_floats_are_counted_where_none_may_stay():
    graph = ONNX[False, True]
    marks = [n for n in graph.nodes if n.op.name not in ("QuantizeLinear", "DequantizeLinear")]
    assert all(not la.floats for g in ONNX.values() for la in view(g).layers)
    assert any(la.op == "Relu" for g in ONNX.values() for la in view(g).layers), "one with the Conv before it"
    gemm = next(n for n in marks if n.op.name == "Gemm")
    loose = dataclasses.replace(graph, outputs=(*graph.outputs, gemm.outputs[0]))
    found = violations(loose, "max78000")
    assert [(v.where.split()[0], v.kind) for v in found if v.rule == "No operator computes on floats."] == [
        ("Gemm", "operators")]
    refused = {v.where.split()[0] for v in found if v.kind == "operators"}
    assert refused == {"Gemm", "Conv"}, "the list has no depthwise convolution; marks are no operators"
    assert not any("floats" in v.rule for v in violations(loose, "generic-onnx"))


# boards, real networks, independence

def test_what_a_boards_operator_rules_refuse_is_told_with_their_remedy():
    m = ModelBuilder("custom")
    x, y = (m.tensor(n, (1, 4), "int8", scale=0.5, zero_point=0) for n in "xy")
    m.custom("Unheard", [x], [y])
    found = violations(read_tflite(m.build([x], [y]), "custom"), "tflm_cpu")
    assert [(v.where, v.allowed, v.kind) for v in found] == [
        ("Unheard (node 0) 'y'", "end the network before it and compute the rest on the CPU", "operators")]
    assert "tflite:Unheard is not on it" in found[0].found


def test_sources_say_what_is_assumed():
    found = {v.rule: v.source for v in violations(GRAPHS["int8"], "max78000")}
    assert found["Data have powers of two as scales."].startswith("ai8x-training README")
    assert found["The target's tools read one format."].startswith("assumed")


TYPES_ONLY = {"Data are of these element types.", "Weights are of these element types."}


@needs_shared
@pytest.mark.parametrize("path", QUANTIZED, ids=lambda p: p.stem)
def test_real_networks_obey_the_published_specification(path):
    """TensorFlow's converter made the int8 ones; those of uint8 are older than the specification of int8."""
    graph = load(path)
    found = Counter(v.rule for v in violations(graph, "generic-int8"))
    if path.stem == "person_detect":  # LiteRT refuses it for this
        assert set(found) == {"The axis of scales is one of the tensor's."}
        with pytest.raises((RuntimeError, ValueError), match="quantized_dimension must be in range"):
            litert(path.read_bytes(), {})
        return
    assert set(found) <= TYPES_ONLY
    unsigned = [v for v in graph.values if v.dtype is DType.UINT8 and v.quantization is not None]
    assert bool(found) == (len(unsigned) > 2)
    if "Weights are of these element types." in found:  # uint8 throughout: what the chip and its driver take
        assert violations(graph, "a311d") == []
        assert violations(graph, "rk3588_rocket_open") == []


def test_the_validator_shares_only_the_records_with_the_quantizer():
    for path in (SRC / "validation").glob("*.py"):
        for n in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in n.names] if isinstance(n, ast.Import | ast.ImportFrom) else []
            module = getattr(n, "module", None) or ""
            assert not any(name.startswith("npulab.quantization") for name in names)
            if module.startswith("npulab.quantization"):
                assert module == "npulab.quantization.types"
                assert set(names) <= {"Rules", "Scheme"}
    code = ("import sys, npulab.validation; loaded = {m for m in sys.modules if m.startswith('npulab.quantization')}; "
            "assert loaded <= {'npulab.quantization', 'npulab.quantization.types'}, loaded")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_scheme_of_depthwise_weights_goes_before_that_of_weights():
    rules = dataclasses.replace(rules_of("generic-int8"), depthwise_weights=(Scheme(8, symmetric=True),))
    found = violations(GRAPHS["int8"], rules)
    assert [(v.where, v.found) for v in found] == [("tensor 'dw_w'", "4 scales")]
