"""Quantized networks of 2, 4, 8 and 16 bits between the dialects: ONNX Runtime against LiteRT's reference kernels."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, currently_in_test_context, example, given, settings
from hypothesis import strategies as st

from dialects import check_onnx, feeds, run, run_converted
from npulab import dialects
from npulab.dialects import from_onnx, from_tflite
from npulab.dialects.fake_quant import nudged
from npulab.errors import ModelError, UnsupportedError
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers import load
from npulab.importers.tflite import read_tflite
from npulab.ir import DType, Value
from npulab.ir.types import packed
from test_patch import Net

onnx = pytest.importorskip("onnx", reason="pip install 'npulab[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'npulab[onnx]'")
pytest.importorskip("ai_edge_litert", reason="pip install 'npulab[litert]'")
from onnx import TensorProto, helper  # noqa: E402

OPSETS = {2: 25, 4: 21, 8: 21}


class Quantized(Net):
    """A network of DequantizeLinear and QuantizeLinear."""

    def ends(self, scale, zero, dtype):
        return self.constant(np.float32(scale)), self.constant(np.array(zero), np.dtype(dtype))

    def codes(self, x, scale, zero=0, dtype="int8"):
        return self.op("QuantizeLinear", x, *self.ends(scale, zero, dtype))

    def pair(self, x, scale, zero=0, dtype="int8"):
        ends = self.ends(scale, zero, dtype)
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *ends), *ends)

    def weights(self, shape, scales, bits=8, axis=0, unsigned=False, zero=None):
        """Constant codes over the whole range of so many bits, dequantized."""
        middle = 1 << (bits - 1) if unsigned else 0
        low, high = (0, 2 * middle - 1) if unsigned else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        array = self.rng.integers(low, high + 1, shape).astype("uint8" if unsigned else "int8")
        zeros = np.full(np.shape(scales), middle if zero is None else zero).astype(array.dtype)
        names = [self.small(array, bits, unsigned), self.constant(np.float32(scales)),
                 self.small(zeros, bits, unsigned)]
        return self.op("DequantizeLinear", *names, **({"axis": axis} if np.ndim(scales) else {}))

    def small(self, array, bits, unsigned):
        if bits == 8:
            return self.constant(array, array.dtype)
        name = f"c{len(self.constants)}"
        kind = f"{'U' if unsigned else ''}INT{bits}"
        self.constants.append(onnx.TensorProto(name=name, dims=array.shape, raw_data=packed(array, bits),
                                               data_type=TensorProto.DataType.Value(kind)))
        return name

    def bias(self, count, scales):
        codes = self.constant(self.rng.integers(-3000, 3000, count), np.int32)
        scales = np.broadcast_to(np.float32(scales), count if np.ndim(scales) else ())
        return self.op("DequantizeLinear", codes, self.constant(scales), **({"axis": 0} if scales.ndim else {}))

    def integer_graph(self, kinds, *outputs, opset=21):
        """With integer inputs and outputs of these types."""
        first, last = (TensorProto.DataType.Value(k.upper()) for k in kinds)
        made = helper.make_graph(self.nodes, "net", [helper.make_tensor_value_info("x", first, self.shape)],
                                 [helper.make_tensor_value_info(o, last, None) for o in outputs], self.constants)
        return load(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
                    .SerializeToString())


def steps_apart(graph, made, scale, seed=0, spread=8, off_ties=None):
    """The largest difference of the first output, in steps of `scale`, and the share of elements that differ.

    Input `x` is moved where x divided by one of `off_ties` ends on a half: QuantizeLinear takes ties to even, TFLite's
    QUANTIZE away from zero, and a step of an input may be any number of steps of the output.
    """
    inputs = feeds(graph, seed)
    while off_ties is not None:
        codes = inputs["x"].astype(np.float64) / np.reshape(off_ties, (-1, 1, 1, 1, 1))
        near = (np.abs(codes - np.floor(codes) - 0.5) < 0.01).any(0)  # a float32 of 15 bits is good to 0.001
        if not near.any():
            break
        inputs["x"][near] += 0.1 * min(map(abs, off_ties))
    want = next(iter(run(graph, inputs).values())).astype(np.float64)
    got = next(iter(run_converted(made, inputs).values())).astype(np.float64)
    assert want.shape == got.shape
    varied = np.ptp(want) > spread * scale  # else it says nothing
    if currently_in_test_context():
        assume(varied)
    assert varied
    apart = np.abs(want - got) / scale
    return apart.max(), (apart > 0.5).mean()


def ops(graph):
    return [n.op.name for n in graph.nodes]


def types(graph, op, i=1):
    return [graph.values[n.inputs[i]].dtype.value for n in graph.nodes if n.op.name == op]


def layer(n, x, kind, scale, bits, per_channel, unsigned=False, bias=True):
    """A layer of 4 to 6 channels (dense: 396 to 5) on `x`, whose scale is `scale`; its weights are of so many bits."""
    outputs = {"dense": 6, "grouped": 6, "depthwise": 4, "transposed": 6, "gemm": 5, "matmul": 5}[kind]
    steps = np.linspace(0.5, 1.0, outputs) if per_channel else np.float64(0.8)
    scales = (steps * 2.0 ** (3 - bits)).astype(np.float32)
    sums = scales * np.float32(scale)
    match kind:
        case "gemm":
            w = n.weights((5, 396), scales, bits, 0, unsigned)
            return n.op("Gemm", n.op("Flatten", x), w, *([n.bias(5, sums)] if bias else []), transB=1)
        case "matmul":
            return n.op("MatMul", n.op("Flatten", x), n.weights((396, 5), scales, bits, 1, unsigned))
        case "transposed":
            w = n.weights((4, 6, 3, 3), scales, bits, 1, unsigned)
            return n.op("ConvTranspose", x, w, *([n.bias(6, sums)] if bias else []), strides=[2, 2])
        case _:
            groups = {"dense": 1, "grouped": 2, "depthwise": 4}[kind]
            w = n.weights((outputs, 4 // groups, 3, 3), scales, bits, 0, unsigned)
            return n.op("Conv", x, w, *([n.bias(outputs, sums)] if bias else []), group=groups, pads=[1] * 4)


TAKES = {("dense", 4): "int4", ("grouped", 4): "int4", ("depthwise", 4): "int4", ("gemm", 4): "int4",
         ("matmul", 4): "int4", ("gemm", 2): "int2", ("matmul", 2): "int2"}
OPERATOR = {"dense": "CONV_2D", "grouped": "CONV_2D", "depthwise": "DEPTHWISE_CONV_2D", "gemm": "FULLY_CONNECTED",
            "matmul": "FULLY_CONNECTED", "transposed": "TRANSPOSE_CONV"}
RESULT = {"gemm": 30.0, "matmul": 30.0}
"""Largest number of a layer's result, about."""

# weights of few bits


@pytest.mark.parametrize("width", ["int8", "int16"])
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("kind", OPERATOR)
@pytest.mark.parametrize("per_channel", [True, False])
def test_small_weights_stay_small_where_litert_takes_them(kind, bits, width, per_channel):
    n = Quantized(1)
    high = 127 if width == "int8" else 32767
    s, t = 4 / high, RESULT.get(kind, 10) / high
    y = layer(n, n.pair("x", s, 0, width), kind, s, bits, per_channel)
    g = n.graph(n.pair(y, t, 0, width), opset=OPSETS[bits])
    made = from_onnx(g)
    stored = TAKES.get((kind, bits), "int8")
    if (kind, width) == ("depthwise", "int16"):
        stored = "int8"

    assert types(made.graph, OPERATOR[kind]) == [stored]
    worst, share = steps_apart(g, made, t)
    assert worst <= 1.01
    assert share < (0.05 if width == "int8" else 0.4)
    name = OPERATOR[kind]
    assert made.notes == (() if stored != "int8" else (
        f"{name} on {width} takes no weights of {bits} bits: int8, with the same codes",))

    back = from_tflite(made.graph)  # and the other way: the same codes again
    check_onnx(back)
    again = from_onnx(back.graph)
    there = {k: a.transpose(made.inputs.get(k, range(a.ndim))) for k, a in feeds(g).items()}
    (want,), (got,) = run(made.graph, there).values(), run_converted_twice(back, again, there).values()
    np.testing.assert_array_equal(want, got)
    assert types(again.graph, OPERATOR[kind]) == [stored]


def run_converted_twice(back, again, inputs):
    """What went from TFLite to ONNX and to TFLite again, with inputs and outputs as the first had them."""
    middle = {k: a.transpose(back.inputs.get(k, range(a.ndim))) for k, a in inputs.items()}
    out = run_converted(again, middle)
    return {k: a.transpose(np.argsort(back.outputs[k])) if k in back.outputs else a for k, a in out.items()}


@pytest.mark.parametrize("kind", OPERATOR)
def test_small_weights_compute_what_the_same_codes_in_int8_do(kind, monkeypatch):
    n = Quantized(2)
    y = layer(n, n.pair("x", 0.03, 7), kind, 0.03, 4, True)
    g = n.graph(n.pair(y, RESULT.get(kind, 10) / 127, 3), opset=21)
    small = run_converted(from_onnx(g), feeds(g))
    monkeypatch.setattr("npulab.dialects.weights.SMALL_WEIGHTS", {})
    bytes_each = from_onnx(g)
    assert types(bytes_each.graph, OPERATOR[kind]) == ["int8"]
    np.testing.assert_array_equal(*small.values(), *run_converted(bytes_each, feeds(g)).values())


def test_unsigned_weights_of_four_bits_are_moved_to_signed_ones():
    n = Quantized(3)
    y = layer(n, n.pair("x", 0.03, 120, "uint8"), "dense", 0.03, 4, False, unsigned=True)
    g = n.graph(n.pair(y, 0.08, 128, "uint8"), opset=21)
    made = from_onnx(g)
    assert types(made.graph, "CONV_2D") == ["int4"]
    assert types(made.graph, "CONV_2D", 0) == ["int8"]
    assert steps_apart(g, made, 0.08)[0] <= 1.01


def test_a_constant_operand_of_four_bits():
    n = Quantized(4)
    c = n.weights((4, 1, 1), np.float32(0.1), 4, unsigned=True, zero=3)
    y = n.op("Add", n.pair("x", 0.03, 7), c)
    g = n.graph(n.pair(y, 0.04, 3), opset=21)
    made = from_onnx(g)
    assert ops(made.graph) == ["QUANTIZE", "ADD", "DEQUANTIZE"]
    assert steps_apart(g, made, 0.04)[0] <= 1.01


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([DType.INT4, DType.UINT4, DType.INT2]), st.lists(st.integers(1, 5), min_size=0, max_size=3),
       st.integers(0, 2**32))
def test_packing_is_undone(dtype, shape, seed):
    bits = 2 if dtype is DType.INT2 else 4
    low = 0 if dtype is DType.UINT4 else -(1 << (bits - 1))
    codes = np.random.default_rng(seed).integers(low, low + (1 << bits), shape).astype(
        np.uint8 if dtype is DType.UINT4 else np.int8)
    data = packed(codes, bits)
    value = Value(0, "w", tuple(shape), dtype, constant=memoryview(data))
    np.testing.assert_array_equal(value.integers(), codes)
    assert value.integers().dtype == codes.dtype
    if codes.size:  # the onnx package reads it alike
        kind = {DType.INT4: "INT4", DType.UINT4: "UINT4", DType.INT2: "INT2"}[dtype]
        proto = onnx.TensorProto(name="w", dims=shape, raw_data=data, data_type=TensorProto.DataType.Value(kind))
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(proto).astype(np.int8), codes.astype(np.int8))
    with pytest.raises(ModelError, match="buffer of the wrong length"):
        Value(0, "w", tuple(shape), dtype, constant=memoryview(data + b"\0")).integers()


# 16 bits


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["dense", "depthwise", "transposed", "gemm", "matmul"]),
       st.sampled_from(["int8", "int16"]), st.sampled_from(["int8", "int16"]), st.booleans(), st.booleans(),
       st.sampled_from(["", "Relu", "Clip"]))
def test_layers_whose_ends_have_any_width(seed, kind, first, last, per_channel, bias, behind):
    n = Quantized(seed)
    s, t = (top / (127 if w == "int8" else 32767) for top, w in ((4, first), (RESULT.get(kind, 10), last)))
    y = layer(n, n.pair("x", s, 9 if first == "int8" else 0, first), kind, s, 8, per_channel, bias=bias)
    if behind:
        y = n.op(behind, y, *([n.constant(np.float32(v)) for v in (-0.5, 3)] if behind == "Clip" else []))
    g = n.graph(n.pair(y, t, -5 if last == "int8" else 0, last), opset=21)
    made = from_onnx(g)
    wide = "int16" if "int16" in (first, last) else "int8"
    op = OPERATOR[kind]

    assert types(made.graph, op, 2 if op == "TRANSPOSE_CONV" else 0) == [wide]
    assert types(made.graph, op, 3 if op == "TRANSPOSE_CONV" else 2) == ["int64" if wide == "int16" else "int32"]
    assert ops(made.graph).count("DEQUANTIZE") == 1
    most = 2.01 if last == "int16" else 1.01  # LiteRT multiplies 64-bit sums by numbers of 16 bits
    assert steps_apart(g, made, t, seed, spread=-1 if behind else 8)[0] <= most
    check_onnx(from_tflite(made.graph))


FUNCTIONS = {  # operator -> attributes, largest number of the result, most steps apart in 16 bits (None: in floats)
    "Sigmoid": ({}, 1, 2), "Tanh": ({}, 1, 3), "Softmax": ({"axis": 1}, 1, 3), "HardSwish": ({}, 4, 2),
    "LeakyRelu": ({"alpha": 0.2}, 4, 1), "Gelu": ({}, 4, None), "HardSigmoid": ({"alpha": 0.17, "beta": 0.4}, 1, 1),
    "Relu": ({}, 4, 1), "Abs": ({}, 4, 1), "Exp": ({}, 40, None), "Elu": ({}, 4, None), "Sqrt": ({}, 2, None),
    "ReduceMean": ({}, 2, 1), "GlobalAveragePool": ({}, 2, 1), "MaxPool": ({"kernel_shape": [2, 2]}, 4, 1),
    "AveragePool": ({"kernel_shape": [2, 2]}, 3, 1), "DepthToSpace": ({"blocksize": 2}, 4, None),
    "Transpose": ({"perm": [0, 3, 1, 2]}, 4, 1), "Flatten": ({}, 4, 1), "ReduceMax": ({"axes": [2]}, 4, 1),
}


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_tensor_in_every_width(name, kind):
    own, top, most = FUNCTIONS[name]
    n = Quantized(5, 4, (8, 10))
    zero = {"int8": 5, "uint8": 133, "int16": 0}[kind]
    steps = 32767 if kind == "int16" else 127
    x = n.pair("x", 4 / steps, zero, kind)
    more = [n.constant([2, 3], np.int64)] if name == "ReduceMean" else []
    if name == "ReduceMax":
        own, more = {}, [n.constant([2], np.int64)]
    if name == "Sqrt":
        x = n.pair(n.op("Abs", x), 4 / steps, zero, kind)
    signed = {"int8": 0, "uint8": 128, "int16": 0}[kind]
    y = n.op(name, x, *more, **own)
    g = n.graph(n.pair(y, top / steps, signed, kind), opset=21)
    made = from_onnx(g)
    limit = (most if kind == "int16" and most else 1) + 0.01
    worst, share = steps_apart(g, made, top / steps)
    assert worst <= limit, name
    assert share < (0.9 if kind == "int16" else 0.45)
    in_floats = {"Elu", "Sqrt"} | {n for n, (_, _, m) in FUNCTIONS.items() if m is None and kind == "int16"}
    in_floats |= {"Exp"} if kind != "int8" else set()
    in_floats |= {"Abs"} if kind == "uint8" else set()
    extra = 1 if name == "Sqrt" and kind == "uint8" else 0  # its Abs
    assert ops(made.graph).count("DEQUANTIZE") == (2 if name in in_floats else 1) + extra


@settings(max_examples=60, deadline=None)
@example(277, "Add", "int16 int8 int16", False)  # a tie at an input whose step is 1.3 of the output's
@given(st.integers(0, 2**32), st.sampled_from(["Add", "Sub", "Mul", "Max", "Min", "Concat", "MatMul"]),
       st.sampled_from(["int8 int8 int8", "int16 int16 int16", "int8 int16 int8", "int16 int8 int16", "int8 int8 int16",
                        "uint8 uint8 uint8", "uint8 int16 uint8"]), st.booleans())
def test_functions_of_two_tensors_of_any_width(seed, name, kinds, broadcast):
    n = Quantized(seed)
    first, second, last = kinds.split()
    steps = {"int8": 127, "uint8": 127, "int16": 32767}
    zeros = {"int8": -7, "uint8": 117, "int16": 0}
    a = n.pair("x", 4 / steps[first], zeros[first], first)
    b = n.op("Mul", "x", n.constant(np.float32(-0.7)))
    if name == "MatMul":
        b = n.op("Transpose", b, perm=[0, 1, 3, 2])
    elif broadcast and name != "Concat":
        b = n.op("ReduceMax", b, n.constant([2, 3], np.int64))
    b = n.pair(b, 3 / steps[second], zeros[second], second)
    top = {"Add": 3, "Sub": 7, "Mul": 8, "Max": 4, "Min": 4, "Concat": 4, "MatMul": 20}[name]
    y = n.op(name, a, b, **({"axis": 1} if name == "Concat" else {}))
    g = n.graph(n.pair(y, top / steps[last], zeros[last], last), opset=21)
    made = from_onnx(g)
    worst, _ = steps_apart(g, made, top / steps[last], seed, off_ties=(4 / steps[first], 3 / steps[second] / -0.7))
    assert worst <= 1.01
    in_integers = not (name == "MatMul" and kinds == "uint8 uint8 uint8")
    expected = {"Max": "MAXIMUM", "Min": "MINIMUM", "Concat": "CONCATENATION", "MatMul": "BATCH_MATMUL"}
    node = [x for x in made.graph.nodes if x.op.name == expected.get(name, name.upper())][-1]
    assert (made.graph.values[node.inputs[0]].dtype.value != "float32") == in_integers


def mixed():
    """8 bits, 16 bits, floats and 8 bits again."""
    n = Quantized(6)
    x = n.pair("x", 0.03, 7)
    a = n.pair(n.op("Relu", layer(n, x, "depthwise", 0.03, 8, True)), 0.03, -128)
    b = n.pair(layer(n, a, "depthwise", 0.03, 8, True), 0.0004, 0, "int16")
    c = n.pair(n.op("Add", b, a), 0.0006, 0, "int16")
    d = n.pair(n.op("Elu", c), 0.1, 3)
    return n, n.pair(n.op("Conv", d, n.weights((5, 4, 1, 1), [0.01] * 5, 4)), 0.1, 1)


def test_a_network_of_mixed_widths_and_a_float_island():
    n, y = mixed()
    g = n.graph(y, opset=21)
    made = from_onnx(g)
    assert ops(made.graph) == ["QUANTIZE", "DEPTHWISE_CONV_2D", "QUANTIZE", "DEPTHWISE_CONV_2D", "ADD", "DEQUANTIZE",
                               "ELU", "QUANTIZE", "CONV_2D", "DEQUANTIZE"]
    assert steps_apart(g, made, 0.1)[0] <= 1.01
    back = from_tflite(made.graph)
    check_onnx(back)
    assert back.graph.header.opsets[0][1] == 21


def test_16_bits_with_a_zero_point_are_refused_in_words():
    n = Quantized(7)
    with pytest.raises(UnsupportedError, match="operators that TFLite has no words for") as e:
        from_onnx(n.graph(n.pair("x", 0.001, 5, "int16"), opset=21))
    assert e.value.facts["got"] == "QuantizeLinear 'n1': to 16 bits with a zero point"


def test_unsigned_16_bits_around_their_middle_are_int16():
    n = Quantized(8)
    y = n.op("Relu", n.pair("x", 0.0002, 32768, "uint16"))
    g = n.graph(n.pair(y, 0.0002, 32768, "uint16"), opset=21)
    made = from_onnx(g)
    assert types(made.graph, "RELU", 0) == ["int16"]
    assert steps_apart(g, made, 0.0002)[0] <= 1.01


# clamps


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32),
       st.sampled_from([(0, 1), (0, 6), (-1, 1), (-0.5, 0.75), (0, 3.3), (None, 0.5), (0, None)]),
       st.sampled_from(["exact", "wide"]), st.sampled_from(["Conv", "Add", "MaxPool", "Transpose"]),
       st.sampled_from(["int8", "uint8", "int16"]))
def test_any_limits_in_integers(seed, limits, span, before, kind):
    """Where the range of the integers is that of the limits, nothing is left of the clamp."""
    n = Quantized(seed)
    steps, first = (32767, -32768) if kind == "int16" else (255, -128 if kind == "int8" else 0)
    s = 4 / (steps if kind == "int16" else 127)
    x = n.pair("x", s, {"int8": 3, "uint8": 125, "int16": 0}[kind], kind)
    low, high = limits
    match before:
        case "Conv":
            y = n.op("Conv", x, n.weights((4, 4, 3, 3), np.float32(0.01), unsigned=kind == "uint8"))
        case "Add":
            y = n.op("Add", x, n.pair(n.op("Neg", "x"), s * 0.9, {"int8": 3, "uint8": 125, "int16": 0}[kind], kind))
        case "MaxPool":
            y = n.op("MaxPool", x, kernel_shape=[2, 2])
        case _:
            y = n.op("Transpose", x, perm=[0, 2, 3, 1])
    y = n.op("Clip", y, *(n.constant(np.float32(v)) if v is not None else "" for v in limits))
    exact = span == "exact" and None not in limits and kind != "int16"
    if exact:
        t = (high - low) / steps
        zero = first + round(-low / t)
    else:
        t, zero = 5 / (steps if kind == "int16" else 127), 128 if kind == "uint8" else 0
    g = n.graph(n.pair(y, t, zero, kind), opset=21)
    made = from_onnx(g)
    inputs = feeds(g, seed)
    (want,), (got,) = run(g, inputs).values(), run_converted(made, inputs).values()
    assert np.abs(want - got).max() <= (2.01 if kind == "int16" else 1.01) * t
    assert Counter(ops(made.graph))["DEQUANTIZE"] == 1
    if exact:
        assert not {"MINIMUM", "MAXIMUM", "RELU6", "RELU_0_TO_1"} & set(ops(made.graph))


def test_pieces_of_a_hard_swish_in_integers():
    """As exporters spell it: x * clip(x + 3, 0, 6) / 6."""
    n = Quantized(9)
    x = n.pair(n.op("Mul", "x", n.constant(np.float32(3))), 0.07, 5)
    three = n.weights((1,), np.float32(3 / 127))
    n.constants[int(n.nodes[-1].input[0][1:])].CopyFrom(onnx.numpy_helper.from_array(
        np.array([127], np.int8), n.nodes[-1].input[0]))
    gate = n.pair(n.op("Clip", n.op("Add", x, three), *(n.constant(np.float32(v)) for v in (0, 6))), 6 / 255, -128)
    sixth = n.pair(n.op("Div", gate, n.constant(np.float32(6))), 1 / 255, -128)
    g = n.graph(n.pair(n.op("Mul", x, sixth), 0.07, 1))
    made = from_onnx(g)
    assert ops(made.graph) == ["MUL", "QUANTIZE", "ADD", "DEPTHWISE_CONV_2D", "MUL", "DEQUANTIZE"]
    assert steps_apart(g, made, 0.07)[0] <= 1.01


def test_prelu_in_integers():
    for quantized in (False, True):
        n = Quantized(10)
        shape = (4, 1, 1)
        slope = n.weights(shape, np.float32(0.004)) if quantized else n.constant(n.rng.uniform(-0.3, 0.6, shape))
        g = n.graph(n.pair(n.op("PRelu", n.pair("x", 0.03, 7), slope), 0.03, 3))
        made = from_onnx(g)
        assert ops(made.graph) == ["QUANTIZE", "PRELU", "DEQUANTIZE"]
        assert steps_apart(g, made, 0.03)[0] <= 1.01


@pytest.mark.parametrize(("name", "scale"), [("Softmax", 0.3 / 255), ("Tanh", 0.2 / 127)])
def test_results_in_finer_steps_than_the_kernels_own_are_computed_in_floats(name, scale):
    n = Quantized(11)
    x = n.pair(n.op("Mul", "x", n.constant(np.float32(0.1))), 0.003, 7)
    g = n.graph(n.pair(n.op(name, x), scale, 0))
    made = from_onnx(g)
    assert steps_apart(g, made, scale)[0] <= 1.01


@pytest.mark.parametrize("scale", [0.01, 0.02, 0.03])
def test_a_padded_average_with_a_scale_of_its_own(scale):
    n = Quantized(12)
    y = n.op("AveragePool", n.pair("x", 0.03, 7), kernel_shape=[3, 3], pads=[1] * 4)
    g = n.graph(n.pair(y, scale, 3))
    assert steps_apart(g, from_onnx(g), scale)[0] <= 1.01


# integer ends


@pytest.mark.parametrize("kinds", [("int8", "int8"), ("int16", "int16"), ("int8", "int16"), ("int16", "int8"),
                                   ("uint8", "uint8")])
def test_integers_come_and_go_as_they_are(kinds):
    n = Quantized(13)
    first, last = kinds
    scale, zero = {"int8": (0.03, 7), "uint8": (0.03, 130), "int16": (0.0001, 0)}[first]
    x = n.op("DequantizeLinear", "x", *n.ends(scale, zero, first))
    t = {"int8": (0.08, 3), "uint8": (0.08, 131), "int16": (0.0003, 0)}[last]
    y = n.op("Conv", x, n.weights((6, 4, 3, 3), np.float32(0.01), unsigned=first == "uint8"))
    g = n.integer_graph(kinds, n.codes(y, *t, last))
    made = from_onnx(g)
    inputs = feeds(g)
    (want,), (got,) = run(g, inputs).values(), run_converted(made, inputs).values()
    assert (got.dtype.name, made.graph.values[made.graph.inputs[0]].dtype.value) == (last, first)
    assert np.abs(want.astype(int) - got).max() <= 1
    assert [o for o in ops(made.graph) if o != "QUANTIZE"] == ["CONV_2D"]
    assert ops(made.graph).count("QUANTIZE") == (0 if first == last else 1)  # between 8 and 16 bits
    v = made.graph.values[made.graph.outputs[0]]
    assert (v.quantization.scale, v.quantization.zero_point) == (pytest.approx(t[0]), t[1])


# training


def float32_net(seed=0, bits=8, narrow=True, low=-1.3, high=2.2):
    """A network as training with quantization leaves it: a convolution, a residual sum, a dense layer."""
    rng = np.random.default_rng(seed)
    m = ModelBuilder("trained")

    def tensor(name, shape, data=None):
        return m.tensor(name, shape, "float32", data=None if data is None else data.astype(np.float32))

    def fake(x, name, shape, low, high, bits=8, narrow=False):
        y = tensor(name, shape)
        m.op("FAKE_QUANT", [x], [y], min=low, max=high, num_bits=bits, narrow_range=narrow)
        return y
    side = 0.4 if narrow else 0.45  # symmetric or not
    x = tensor("x", (1, 6, 6, 4))
    xq = fake(x, "xq", (1, 6, 6, 4), low, high)
    w = fake(tensor("w", (8, 3, 3, 4), rng.normal(size=(8, 3, 3, 4)) / 6), "wq", (8, 3, 3, 4), -0.4, side, bits, narrow)
    b = tensor("b", (8,), rng.normal(size=8) / 4)
    y, z = tensor("y", (1, 6, 6, 8)), tensor("z", (1, 6, 6, 8))
    m.op("CONV_2D", [xq, w, b], [y], padding="SAME", stride_h=1, stride_w=1, dilation_h_factor=1, dilation_w_factor=1,
         fused_activation_function="RELU6")
    yq = fake(y, "yq", (1, 6, 6, 8), 0.0, 3.0)
    m.op("ADD", [yq, yq], [z], fused_activation_function="NONE")
    zq = fake(z, "zq", (1, 6, 6, 8), 0.0, 6.0)
    flat, out = tensor("flat", (1, 288)), tensor("out", (1, 5))
    m.op("RESHAPE", [zq, m.tensor("s", (2,), "int32", data=np.array([1, 288], np.int32))], [flat])
    d = fake(tensor("d", (5, 288), rng.normal(size=(5, 288)) / 20), "dq", (5, 288), -0.16, side * 0.4, bits, narrow)
    m.op("FULLY_CONNECTED", [flat, d, -1], [out], fused_activation_function="NONE")
    outq = fake(out, "outq", (1, 5), -6.0, 6.0)
    return read_tflite(m.build([x], [outq]), "trained")


@pytest.mark.parametrize(("bits", "narrow"), [(8, True), (8, False), (4, True), (4, False)])
def test_a_network_trained_with_quantization_becomes_one_of_integers(bits, narrow):
    g = float32_net(1, bits, narrow)
    middle = from_tflite(g)
    check_onnx(middle)
    assert middle.graph.header.opsets[0][1] == (21 if bits == 4 else 17)
    names = Counter(ops(middle.graph))
    assert (names["QuantizeLinear"], names["DequantizeLinear"]) == (4, 6)
    made = from_onnx(middle.graph)
    assert [o for o in ops(made.graph) if "TRANSPOSE" not in o] == [
        "QUANTIZE", "CONV_2D", "ADD", "RESHAPE", "FULLY_CONNECTED", "DEQUANTIZE"]
    symmetric = narrow
    assert types(made.graph, "CONV_2D") == [("int4" if bits == 4 else "int8") if symmetric else "uint8"]

    inputs = {"x": np.random.default_rng(2).normal(size=(1, 6, 6, 4)).astype(np.float32)}
    want = run(g, inputs) if not narrow else None  # LiteRT runs no narrow ranges
    qdq = run_converted(middle, inputs)["outq"]
    got = run_converted_twice(middle, made, inputs)["outq"]
    assert np.abs(qdq - got).max() <= 2.01 * 12 / 255
    if want is not None:
        assert np.abs(want["outq"] - qdq).max() <= 1.01 * 12 / 255


@settings(max_examples=60, deadline=None)
@given(st.floats(-20, 0.5), st.floats(0.01, 30), st.sampled_from([2, 3, 4, 6, 8, 12, 16]))
def test_ranges_are_nudged_as_litert_does(low, span, bits):
    low, high = float(np.float32(low)), float(np.float32(low + span))
    if low >= high:
        return
    m = ModelBuilder("m")
    a, b = m.tensor("a", (1, 400), "float32"), m.tensor("b", (1, 400), "float32")
    m.op("FAKE_QUANT", [a], [b], min=low, max=high, num_bits=bits, narrow_range=False)
    g = read_tflite(m.build([a], [b]), "m")
    x = np.linspace(low - 1, high + 1, 400, dtype=np.float32)[None]
    want = run(g, {"a": x})["b"]
    p = nudged(low, high, bits, False)
    q = p.quantization
    got = run_converted(from_tflite(g), {"a": x})["b"]
    between = np.abs((x / q.scale + q.zero_point) % 1 - 0.5) < 2e-2 if bits < 16 else np.ones(x.shape, bool)
    assert np.abs(want - got)[~between].max(initial=0) <= 1e-5 * max(abs(low), abs(high), 1)
    assert np.abs(want - got).max() <= 1.01 * q.scale + 1e-6
    assert p.limits[0] <= 0 <= p.limits[1]


def test_narrow_ranges_leave_out_their_lowest_code():
    p = nudged(-1.27, 1.27, 8, True)
    assert (p.low, p.high, p.quantization.zero_point) == (-127, 127, 0)
    assert p.quantization.scale == pytest.approx(0.01)
    m = ModelBuilder("m")
    a, b = m.tensor("a", (1, 5), "float32"), m.tensor("b", (1, 5), "float32")
    m.op("FAKE_QUANT", [a], [b], min=-1.27, max=1.27, num_bits=8, narrow_range=True)
    made = from_tflite(read_tflite(m.build([a], [b]), "m"))
    out = run_converted(made, {"a": np.array([[-9, -1.27, 0.013, 1, 9]], np.float32)})["b"]
    np.testing.assert_allclose(out, [[-1.27, -1.27, 0.01, 1, 1.27]], atol=1e-6)


def test_an_empty_range_is_refused_in_words():
    m = ModelBuilder("m")
    a, b = m.tensor("a", (1, 5), "float32"), m.tensor("b", (1, 5), "float32")
    m.op("FAKE_QUANT", [a], [b], min=1.0, max=1.0, num_bits=8)
    with pytest.raises(UnsupportedError) as e:
        dialects.to_onnx(read_tflite(m.build([a], [b]), "m"))
    assert "a range from 1 to 1 of 8 bits" in e.value.facts["got"]


def test_dequantized_weights_beside_floats_stay_integers():
    """What a converter leaves of a layer that runs in floats: DEQUANTIZE of constant 8-bit weights."""
    m = ModelBuilder("m")
    rng = np.random.default_rng(3)
    x, y = m.tensor("x", (1, 6), "float32"), m.tensor("y", (1, 3), "float32")
    w = m.tensor("w", (3, 6), "int8", data=rng.integers(-127, 128, (3, 6)).astype(np.int8), scales=[0.01, 0.02, 0.03])
    v = m.tensor("v", (3, 6), "float32")
    m.op("DEQUANTIZE", [w], [v], version=5)
    m.op("FULLY_CONNECTED", [x, v, -1], [y], fused_activation_function="NONE")
    g = read_tflite(m.build([x], [y]), "m")
    made = from_tflite(g)
    assert ops(made.graph) == ["DequantizeLinear", "Gemm"]
    inputs = feeds(g)
    np.testing.assert_allclose(run(g, inputs)["y"], run_converted(made, inputs)["y"], rtol=1e-5, atol=1e-6)
