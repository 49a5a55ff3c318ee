"""Random quantized layers in exact integers, byte for byte against LiteRT's reference kernels and ONNX Runtime.

    python bench/integer_layers.py [N] [--seed S] [--only tflite|onnx] [--json FILE]

N layers (10,000) of each format from a seeded generator: shapes, strides, dilations, paddings, groups, activations,
int8, uint8 and int16, scales per tensor and per channel, of ordinary size and far out, zero points anywhere and at the
ends, data that saturates. Every byte of every output is compared. Prints, for each operator, layers, bytes, bytes that
differ, and layers that the other side refuses; exits 1 if a byte differs. What differs is named by its seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from npulab.errors import NpulabError
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.importers import load
from npulab.reference import prepare


@dataclass
class Layer:
    """A model of one operator, and inputs for it."""

    operator: str
    model: bytes
    feeds: dict[str, np.ndarray]


class Draw:
    """Random numbers as layers need them. Each layer has its own generator, so that it can be drawn alone."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.exact = self.chance(0.2)  # all scales powers of two: ties wherever there can be some

    def among(self, *choices):
        return choices[int(self.rng.integers(len(choices)))]

    def whole(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def chance(self, p):
        return bool(self.rng.random() < p)

    def scale(self, low=1e-3, high=0.2):
        power = self.rng.uniform(np.log2(low), np.log2(high))
        return float(np.float32(2.0 ** (np.ceil(power) if self.exact else power)))

    def near(self, scale, reach=3.0):
        """A scale of about that size."""
        power = self.rng.uniform(-reach, reach)
        return float(np.float32(scale * 2.0 ** (np.rint(power) if self.exact else power)))

    def zero(self, dtype):
        i = np.iinfo(dtype)
        if i.bits > 8:
            return 0
        return self.among(i.min, i.max, 0 if i.min else 128, *(self.whole(i.min, i.max) for _ in range(5)))

    def codes(self, shape, dtype):
        i = np.iinfo(dtype)
        kind = self.whole(0, 9)
        if kind == 0:
            return self.rng.choice(np.array([i.min, i.max], dtype), shape)
        if kind == 1:
            return np.full(shape, self.among(i.min, i.max), dtype)
        if kind == 2:
            middle = self.whole(i.min, i.max)
            return np.clip(middle + self.rng.integers(-3, 4, shape), i.min, i.max).astype(dtype)
        return self.rng.integers(i.min, i.max + 1, shape).astype(dtype)

    def factor(self):
        """What sums are multiplied with: of ordinary size, or anywhere."""
        power = self.rng.uniform(-34, 6) if self.chance(0.15) else self.rng.uniform(-14, -3)
        return float(np.exp2(np.rint(power) if self.exact else power))


class TFLite(ModelBuilder):
    """A model with one operator, drawn at random."""

    def __init__(self, draw):
        super().__init__("layer")
        self.draw = draw
        self.inputs = []
        self.feeds = {}
        self.count = 0

    def put(self, shape, dtype, scale=None, zero=0, data=None, **more):
        self.count += 1
        kind = np.dtype(dtype).name
        return self.tensor(f"t{self.count}", shape, kind, scale=scale, zero_point=zero, data=data, **more)

    def input(self, shape, dtype, scale, zero):
        v = self.put(shape, dtype, scale, zero)
        self.inputs.append(v)
        self.feeds[f"t{self.count}"] = self.draw.codes(shape, dtype)
        return v

    def layer(self, operator, *outputs):
        return Layer(operator, self.build(self.inputs, list(outputs)), self.feeds)


def clamp(d, *more):
    return d.among("NONE", "NONE", "RELU", "RELU6", "RELU_N1_TO_1", *more)


def weighted(d, m, dtype, shape, axis, channels, sx, bits=8, biased=0.8, wide=0.7):
    """(weights, bias or -1, output scale, more options) for weights of `shape` with channels along `axis`."""
    per = dtype != np.uint8 and d.chance(0.6)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dtype != np.uint8 else (0, 255)
    w = d.rng.integers(low, high + 1, shape)
    if d.chance(0.1):
        w[:] = d.among(low, high)
    zero = d.zero(np.uint8) if dtype == np.uint8 else 0
    scales = [d.scale(1e-4, 5e-2) for _ in range(channels if per else 1)]
    kind = "uint8" if dtype == np.uint8 else "int8"
    data = w.astype(kind)
    if bits == 4:
        flat = np.concatenate([data.reshape(-1), np.zeros(data.size % 2, np.int8)]).astype(np.uint8) & 15
        data, kind = flat[::2] | flat[1::2] << 4, "int4"
    weights = m.tensor("w", shape, kind, data=data, scales=scales, zero_points=[zero] * len(scales), axis=axis)
    sums = float(np.float32(sx)) * max(scales)
    out = float(np.float32(sums / d.factor()))
    bias = -1
    wide = dtype == np.int16 and d.chance(wide)
    if d.chance(biased):
        reach = int(min(2**31 - 1, 2 ** d.rng.uniform(4, 16 if d.chance(0.9) else 26)))
        b = d.rng.integers(-reach, reach + 1, channels).astype(np.int64 if wide else np.int32)
        bias = m.tensor("b", (channels,), "int64" if wide else "int32", data=b,
                        scales=[float(np.float32(sx) * np.float32(s)) for s in scales], axis=0)
    narrow = dtype == np.int16 and bias >= 0 and not wide  # which LiteRT wants to be told, or it reads 64 bits
    return weights, bias, out, {"quantized_bias_type": "INT32"} if narrow else {}


def image(d, dtype, wide=12):
    return 1, d.whole(1, wide), d.whole(1, wide), d.whole(1, 9)


def extent(n, k, stride, dilation, same):
    reach = (k - 1) * dilation + 1
    return -(-(n if same else n - reach + 1) // stride)


def kind8(d):
    return d.among(np.int8, np.int8, np.uint8)


def kind(d):
    return d.among(np.int8, np.int8, np.int8, np.uint8, np.uint8, np.int16)


def windows(d, shape, dilate=True):
    """(kernel, stride, dilation, padding, output size) that fit the image."""
    same = d.chance(0.5)
    found = []
    for n in shape[1:3]:
        k = d.whole(1, 5)
        stride = d.whole(1, 3)
        dilation = d.whole(1, 3) if dilate and d.chance(0.2) else 1
        if not same:
            k = min(k, n)
            while (k - 1) * dilation + 1 > n:
                dilation -= 1
        found.append((k, stride, dilation, extent(n, k, stride, dilation, same)))
    return *(tuple(f[i] for f in found) for i in range(3)), "SAME" if same else "VALID", tuple(f[3] for f in found)


def conv_2d(d):
    m, dtype = TFLite(d), kind(d)
    n, h, w, c = image(d, dtype)
    groups = d.among(1, 1, 1, 2, 3) if dtype != np.uint8 else 1
    c *= groups
    x = m.input((n, h, w, c), dtype, sx := d.scale(), d.zero(dtype))
    kernel, stride, dilation, padding, size = windows(d, (n, h, w, c))
    o = d.whole(1, 8) * groups
    bits = 4 if dtype == np.int8 and d.chance(0.15) else 8
    weights, bias, sy, more = weighted(d, m, dtype, (o, *kernel, c // groups), 0, o, sx, bits, biased=1)
    y = m.put((n, *size, o), dtype, sy, d.zero(dtype))
    m.op("CONV_2D", [x, weights, bias], [y], version=8, padding=padding, stride_h=stride[0], stride_w=stride[1],
         dilation_h_factor=dilation[0], dilation_w_factor=dilation[1], fused_activation_function=clamp(d), **more)
    return m.layer(f"CONV_2D{' int4' if bits == 4 else ''}", y)


def depthwise_conv_2d(d):
    m, dtype = TFLite(d), kind(d)
    n, h, w, c = image(d, dtype)
    x = m.input((n, h, w, c), dtype, sx := d.scale(), d.zero(dtype))
    kernel, stride, dilation, padding, size = windows(d, (n, h, w, c))
    times = d.among(1, 1, 2, 3)
    o = c * times
    weights, bias, sy, _ = weighted(d, m, dtype, (1, *kernel, o), 3, o, sx, wide=1)
    y = m.put((n, *size, o), dtype, sy, d.zero(dtype))
    m.op("DEPTHWISE_CONV_2D", [x, weights, *([bias] if bias >= 0 else [])], [y], version=6, padding=padding,
         stride_h=stride[0], stride_w=stride[1], dilation_h_factor=dilation[0], dilation_w_factor=dilation[1],
         depth_multiplier=times, fused_activation_function=clamp(d))
    return m.layer("DEPTHWISE_CONV_2D", y)


def transpose_conv(d):
    m, dtype = TFLite(d), kind(d)
    n, h, w, c = image(d, dtype, 6)
    x = m.input((n, h, w, c), dtype, sx := d.scale(), d.zero(dtype))
    kernel, stride = (d.whole(1, 5), d.whole(1, 5)), (d.whole(1, 3), d.whole(1, 3))
    same = d.chance(0.5)
    size = tuple(a * s if same else (a - 1) * s + k for a, s, k in zip((h, w), stride, kernel, strict=True))
    o = d.whole(1, 6)
    weights, bias, sy, more = weighted(d, m, dtype, (o, *kernel, c), 0, o, sx)
    shape = m.put((4,), "int32", data=np.array([n, *size, o], np.int32))
    y = m.put((n, *size, o), dtype, sy, d.zero(dtype))
    m.op("TRANSPOSE_CONV", [shape, weights, x, *([bias] if bias >= 0 else [])], [y], version=4,
         padding="SAME" if same else "VALID", stride_h=stride[0], stride_w=stride[1],
         fused_activation_function=d.among("NONE", "RELU", "RELU6"), **more)
    return m.layer("TRANSPOSE_CONV", y)


def fully_connected(d):
    m, dtype = TFLite(d), kind(d)
    rows, n, o = d.whole(1, 4), d.whole(1, 300 if d.chance(0.2) else 40), d.whole(1, 12)
    x = m.input((rows, n), dtype, sx := d.scale(), d.zero(dtype))
    bits = 4 if dtype == np.int8 and d.chance(0.15) else 8
    weights, bias, sy, more = weighted(d, m, dtype, (o, n), 0, o, sx, bits)
    y = m.put((rows, o), dtype, sy, d.zero(dtype))
    m.op("FULLY_CONNECTED", [x, weights, bias], [y], version=12, keep_num_dims=False,
         fused_activation_function=clamp(d), **more)
    return m.layer(f"FULLY_CONNECTED{' int4' if bits == 4 else ''}", y)


def pair(d, m, dtype):
    shape = image(d, dtype)
    other = shape if d.chance(0.6) else tuple(1 if d.chance(0.5) else n for n in shape)
    a, b = (d.scale(1e-3, 1), d.scale(1e-3, 1)) if d.chance(0.8) else (d.scale(1e-6, 1e3), d.scale(1e-6, 1e3))
    first, second = m.input(shape, dtype, a, d.zero(dtype)), m.input(other, dtype, b, d.zero(dtype))
    return shape, first, second, a, b


def sum_of(name, d):
    m, dtype = TFLite(d), kind(d)
    shape, first, second, a, b = pair(d, m, dtype)
    y = m.put(shape, dtype, d.near(max(a, b) * 2), d.zero(dtype))
    more = {"pot_scale_int16": False} if dtype == np.int16 or d.chance(0.5) else {}
    m.op(name, [first, second], [y], version=4 if dtype == np.int16 else 2, fused_activation_function=clamp(d), **more)
    return m.layer(name, y)


def mul(d):
    m, dtype = TFLite(d), kind(d)
    shape, first, second, a, b = pair(d, m, dtype)
    y = m.put(shape, dtype, float(np.float32(a * b / d.factor())), d.zero(dtype))
    m.op("MUL", [first, second], [y], version=4 if dtype == np.int16 else 2, fused_activation_function=clamp(d))
    return m.layer("MUL", y)


def concatenation(d):
    m, dtype = TFLite(d), kind(d)
    shape = image(d, dtype)
    axis = d.whole(0, 3)
    s, z = d.scale(), d.zero(dtype)
    parts, total = [], 0
    for _ in range(d.whole(2, 4)):
        own = [*shape]
        own[axis] = d.whole(1, 5)
        total += own[axis]
        free = dtype == np.uint8 and d.chance(0.6)
        parts.append(m.input(tuple(own), dtype, d.scale() if free else s, d.zero(dtype) if free else z))
    out = [*shape]
    out[axis] = total
    y = m.put(tuple(out), dtype, s, z)
    m.op("CONCATENATION", parts, [y], axis=axis if d.chance(0.5) else axis - 4, fused_activation_function="NONE",
         version=3 if dtype == np.int16 else 2)
    return m.layer("CONCATENATION", y)


def pool(name, d):
    m, dtype = TFLite(d), kind(d)
    n, h, w, c = image(d, dtype)
    s, z = d.scale(), d.zero(dtype)
    x = m.input((n, h, w, c), dtype, s, z)
    kernel, stride, _, padding, size = windows(d, (n, h, w, c), dilate=False)
    y = m.put((n, *size, c), dtype, s, z)
    m.op(name, [x], [y], version=3 if dtype == np.int16 else 2, padding=padding, stride_h=stride[0], stride_w=stride[1],
         filter_height=kernel[0], filter_width=kernel[1], fused_activation_function=clamp(d))
    return m.layer(name, y)


def mean(d):
    m, dtype = TFLite(d), kind(d)
    shape = image(d, dtype)
    x = m.input(shape, dtype, s := d.scale(), d.zero(dtype))
    axes = d.among([1, 2], [1, 2], [2, 1], [3], [-1], [1], [1, 2, 3], [2, 3])
    keep = d.chance(0.5)
    where = {a % 4 for a in axes}
    out = [1 if i in where else n for i, n in enumerate(shape) if keep or i not in where]
    y = m.put(out, dtype, d.near(s), d.zero(dtype))
    table = m.put((len(axes),), "int32", data=np.array(axes, np.int32))
    m.op("MEAN", [x, table], [y], version=3 if dtype == np.int16 else 2, keep_dims=keep)
    return m.layer("MEAN", y)


def softmax(d):
    m, dtype = TFLite(d), kind(d)
    rows, c = d.whole(1, 6), d.whole(1, 60)
    x = m.input((rows, c), dtype, d.scale(1e-3, 2) if dtype != np.int16 else d.scale(1e-5, 1e-2), d.zero(dtype))
    wide = dtype == np.int16
    to = np.int16 if wide or d.chance(0.1) else dtype
    scale, zero = (1 / 32768, 0) if to == np.int16 else (1 / 256, -128 if dtype == np.int8 else 0)
    y = m.put((rows, c), to, scale, zero if wide or to != np.int16 else -32768)
    m.op("SOFTMAX", [x], [y], version=3 if wide else 2, beta=d.among(1.0, 1.0, 0.5, 2.0))
    return m.layer("SOFTMAX", y)


def one(name, d):
    """A function of one number."""
    m = TFLite(d)
    sixteen = name in ("LOGISTIC", "TANH", "LEAKY_RELU", "RELU", "RELU6")
    dtype = kind(d) if sixteen else kind8(d)
    shape = image(d, dtype)
    s = d.scale(1e-3, 0.5) if dtype != np.int16 else d.among(2.0**-12, d.scale(1e-5, 1e-3))
    x = m.input(shape, dtype, s, d.zero(dtype))
    scale, zero = d.near(s, 2), d.zero(dtype)
    more = {}
    if name in ("LOGISTIC", "TANH"):
        bottom = np.iinfo(dtype).min
        scale, zero = ((1 / 256, bottom) if name == "LOGISTIC" else (1 / 128, 0 if bottom else 128))
        if dtype == np.int16:
            scale, zero = 1 / 32768, 0
    elif name == "LEAKY_RELU":
        more = {"alpha": float(np.float32(d.rng.uniform(0, 1.5)))}
    elif name == "HARD_SWISH":
        scale = max(scale, float(np.float32(s / 100)))
    y = m.put(shape, dtype, scale, zero)
    version = {"HARD_SWISH": 1, "RELU_N1_TO_1": 1, "LOGISTIC": 3, "TANH": 3, "RELU": 3}.get(name, 2)
    m.op(name, [x], [y], version=version, **more)
    return m.layer(name, y)


def prelu(d):
    m, dtype = TFLite(d), kind8(d)
    shape = image(d, dtype)
    x = m.input(shape, dtype, s := d.scale(), d.zero(dtype))
    slope = (1, 1, shape[3])
    alpha = m.put(slope, dtype, a := d.scale(1e-4, 1e-2), d.zero(dtype), data=d.codes(slope, dtype))
    y = m.put(shape, dtype, d.near(s, 2), d.zero(dtype))
    del a
    m.op("PRELU", [x, alpha], [y])
    return m.layer("PRELU", y)


def pad(name, d):
    m, dtype = TFLite(d), kind(d)
    shape = image(d, dtype)
    s, z = d.scale(), d.zero(dtype)
    x = m.input(shape, dtype, s, z)
    pads = [(d.whole(0, 3), d.whole(0, 3)) if i else (0, 0) for i in range(4)]
    if name == "MIRROR_PAD":
        mode = d.among("REFLECT", "SYMMETRIC")
        pads = [(min(a, n - (mode == "REFLECT")), min(b, n - (mode == "REFLECT")))
                for (a, b), n in zip(pads, shape, strict=True)]
    table = m.put((4, 2), "int32", data=np.array(pads, np.int32))
    y = m.put([n + a + b for n, (a, b) in zip(shape, pads, strict=True)], dtype, s, z)
    if name == "MIRROR_PAD":
        m.op(name, [x, table], [y], mode=mode, version=3 if dtype == np.int16 else 2)
    elif name == "PADV2":
        value = m.put((1,), dtype, s, z, data=d.codes((1,), dtype))
        m.op(name, [x, table, value], [y], version=3 if dtype == np.int16 else 2)
    else:
        m.op(name, [x, table], [y], version=3 if dtype == np.int16 else 2)
    return m.layer(name, y)


def resize(name, d):
    m, dtype = TFLite(d), kind(d)
    n, h, w, c = image(d, dtype)
    s, z = d.scale(), d.zero(dtype)
    x = m.input((n, h, w, c), dtype, s, z)
    size = (d.whole(1, 20), d.whole(1, 20)) if d.chance(0.7) else (2 * h, 2 * w)
    corners, centres = d.among((False, False), (True, False), (False, True))
    table = m.put((2,), "int32", data=np.array(size, np.int32))
    y = m.put((n, *size, c), dtype, s, z)
    m.op(name, [x, table], [y], align_corners=corners, half_pixel_centers=centres,
         version=4 if dtype == np.int16 else 3)
    return m.layer(name, y)


def quantize(d):
    m = TFLite(d)
    shape = image(d, np.int8)
    which = d.among((np.int8, np.uint8), (np.uint8, np.int8), (np.int8, np.int8), (np.uint8, np.uint8),
                    (np.int16, np.int8), (np.int16, np.int16), ("float32", np.int8), ("float32", np.uint8),
                    ("float32", np.int16))
    to = which[1]
    if which[0] == "float32":
        x = m.put(shape, "float32")
        m.inputs.append(x)
        s = d.scale()
        real = d.rng.normal(0, 60 * s, shape)
        if d.chance(0.3):
            real = np.rint(real / s) * s + d.among(0, s / 2)
        m.feeds[f"t{m.count}"] = real.astype(np.float32)
        y = m.put(shape, to, s, d.zero(to))
    else:
        s, z = d.scale(), d.zero(which[0])
        x = m.input(shape, which[0], s, z)
        flip = {np.int8: 128, np.uint8: -128}.get(which[0], 0)
        if which[0] != to and to != np.int16 and which[0] != np.int16 and d.chance(0.5):
            y = m.put(shape, to, s, z + flip)
        else:
            y = m.put(shape, to, d.near(s), d.zero(to))
    m.op("QUANTIZE", [x], [y], version=3 if to == np.int16 or which[0] == np.int16 else 2)
    return m.layer("QUANTIZE", y)


def dequantize(d):
    m, dtype = TFLite(d), kind(d)
    shape = image(d, dtype)
    x = m.input(shape, dtype, d.scale(), d.zero(dtype))
    y = m.put(shape, "float32")
    m.op("DEQUANTIZE", [x], [y], version=3 if dtype == np.int16 else 2)
    return m.layer("DEQUANTIZE", y)


TFLITE = [
    *[conv_2d] * 8, *[depthwise_conv_2d] * 6, *[fully_connected] * 4, *[transpose_conv] * 3,
    *[lambda d: sum_of("ADD", d)] * 3, *[lambda d: sum_of("SUB", d)] * 2, *[mul] * 3, *[concatenation] * 2,
    *[lambda d: pool("AVERAGE_POOL_2D", d)] * 2, lambda d: pool("MAX_POOL_2D", d), *[mean] * 2,
    *[softmax] * 2, *[lambda d: one("LOGISTIC", d)] * 2, lambda d: one("TANH", d),
    lambda d: one("RELU", d), lambda d: one("RELU6", d), lambda d: one("RELU_N1_TO_1", d),
    *[lambda d: one("LEAKY_RELU", d)] * 2, *[lambda d: one("HARD_SWISH", d)] * 2, prelu, lambda d: pad("PAD", d),
    lambda d: pad("PADV2", d), lambda d: pad("MIRROR_PAD", d), lambda d: resize("RESIZE_NEAREST_NEIGHBOR", d),
    *[lambda d: resize("RESIZE_BILINEAR", d)] * 2, *[quantize] * 2, dequantize,
]


def tflite_layer(seed, i):
    """Layer `i` of a run; operators take turns."""
    return TFLITE[i % len(TFLITE)](Draw([seed, 0, i]))


def litert(layer):
    """The outputs by name under LiteRT's reference kernels; None if it refuses the layer."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    try:
        run = Interpreter(model_content=layer.model, experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
                          num_threads=1)
        run.allocate_tensors()
        for d in run.get_input_details():
            run.set_tensor(d["index"], layer.feeds[d["name"]])
        run.invoke()
    except (ValueError, RuntimeError) as e:
        return str(e)
    return {d["name"]: run.get_tensor(d["index"]) for d in run.get_output_details()}


class Onnx:
    """A QDQ model: float inputs through QuantizeLinear and DequantizeLinear into one operator, and its output too."""

    def __init__(self, draw, dtype):
        from onnx import helper, numpy_helper

        self.h, self.from_array = helper, numpy_helper.from_array
        self.draw, self.dtype = draw, np.dtype(dtype)
        self.nodes, self.constants, self.inputs = [], [], []
        self.feeds = {}

    def constant(self, name, array):
        self.constants.append(self.from_array(np.asarray(array), name))
        return name

    def stored(self, name, scale, zero, dtype=None):
        """[scale, zero point] as constants."""
        return [self.constant(f"{name}_s", np.asarray(scale, np.float32)),
                self.constant(f"{name}_z", np.asarray(zero, dtype or self.dtype))]

    def node(self, op, inputs, output, **attributes):
        self.nodes.append(self.h.make_node(op, inputs, [output], **attributes))
        return output

    def input(self, name, shape, scale, zero):
        self.inputs.append((name, shape))
        codes = self.draw.codes(shape, self.dtype).astype(np.int64)
        noise = self.draw.among(0.0, 0.5, self.draw.rng.uniform(-0.5, 0.5, shape))
        self.feeds[name] = ((codes - int(zero) + noise) * np.float32(scale)).astype(np.float32)
        q = self.stored(name, scale, zero)
        self.node("QuantizeLinear", [name, *q], f"{name}_q")
        return self.node("DequantizeLinear", [f"{name}_q", *q], f"{name}_d")

    def weights(self, name, array, scales, zeros, axis=None):
        self.constant(f"{name}_q", array)
        more = {} if axis is None else {"axis": axis}
        return self.node("DequantizeLinear", [f"{name}_q", *self.stored(name, scales, zeros, array.dtype)], f"{name}_d",
                         **more)

    def output(self, value, scale, zero):
        q = self.stored("y", scale, zero)
        self.node("QuantizeLinear", [value, *q], "y_q")
        self.node("DequantizeLinear", ["y_q", *q], "y")

    def layer(self, operator, opset=17):
        h, f32 = self.h, 1
        graph = h.make_graph(self.nodes, "layer", [h.make_tensor_value_info(n, f32, s) for n, s in self.inputs],
                             [h.make_tensor_value_info("y", f32, None)], self.constants)
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=8)
        return Layer(operator, model.SerializeToString(), self.feeds)


def planar(d):
    return 1, d.whole(1, 9), d.whole(1, 12), d.whole(1, 12)


def onnx_weights(d, m, shape, channels, sx, axis):
    """(name of the weights, name of the bias or None, an output scale that fits)."""
    dtype = m.draw.among(np.uint8, np.int8) if m.dtype == np.uint8 else np.int8
    per = dtype == np.int8 and d.chance(0.6)
    i = np.iinfo(dtype)
    w = d.rng.integers(i.min, i.max + 1, shape).astype(dtype)
    scales = [d.scale(1e-4, 5e-2) for _ in range(channels)] if per else d.scale(1e-4, 5e-2)
    zeros = np.zeros(channels, dtype) if per else d.zero(dtype) if dtype == np.uint8 else 0
    name = m.weights("w", w, scales, zeros, axis if per else None)
    bias = None
    if d.chance(0.8):
        reach = int(2 ** d.rng.uniform(4, 16 if d.chance(0.9) else 26))
        b = d.rng.integers(-reach, reach + 1, channels).astype(np.int32)
        both = np.float32(sx) * np.asarray(scales, np.float32)
        bias = m.weights("b", b, both, np.zeros(both.shape, np.int32), 0 if per else None)
    return name, bias, float(np.float32(np.float32(sx) * np.max(scales) / d.factor()))


def onnx_windows(d, shape, dilate=True):
    found = []
    for n in shape[2:]:
        k, stride = d.whole(1, 5), d.whole(1, 3)
        dilation = d.whole(1, 3) if dilate and d.chance(0.2) else 1
        a, b = d.whole(0, min(k - 1, 2)), d.whole(0, min(k - 1, 2))
        while (k - 1) * dilation + 1 > n + a + b:
            k, a, b = k - 1, min(a, k - 2), min(b, k - 2)
        k, a, b = max(k, 1), max(a, 0), max(b, 0)
        found.append((k, stride, dilation, a, b))
    (k, s, t, a, b), (other, r, u, e, f) = found
    return [k, other], [s, r], [t, u], [a, e, b, f]


def onnx_conv(d):
    m = Onnx(d, kind8(d))
    n, c, h, w = planar(d)
    groups = d.among(1, 1, 1, 2, 0)
    o = c * d.among(1, 2) if not groups else groups * d.whole(1, 6)
    c, groups = (c, c) if not groups else (c * groups, groups)
    x = m.input("x", (n, c, h, w), sx := d.scale(), d.zero(m.dtype))
    kernel, stride, dilation, pads = onnx_windows(d, (n, c, h, w))
    weights, bias, sy = onnx_weights(d, m, (o, c // groups, *kernel), o, sx, 0)
    v = m.node("Conv", [x, weights, *([bias] if bias else [])], "v", kernel_shape=kernel, strides=stride,
               dilations=dilation, pads=pads, group=groups)
    zero = d.zero(m.dtype)
    if d.chance(0.3):
        zero = np.iinfo(m.dtype).min
        v = m.node("Relu", [v], "r")
    m.output(v, sy, zero)
    return m.layer("Conv")


def onnx_product(name, d):
    m = Onnx(d, kind8(d))
    rows, k, o = d.whole(1, 5), d.whole(1, 300 if d.chance(0.2) else 40), d.whole(1, 12)
    x = m.input("x", (rows, k), sx := d.scale(), d.zero(m.dtype))
    flip = name == "Gemm" and d.chance(0.7)
    weights, bias, sy = onnx_weights(d, m, (o, k) if flip else (k, o), o, sx, 0 if flip else 1)
    if name == "Gemm":
        alpha = float(np.float32(d.among(1, 1, 1, 0.5)))
        more = {"transB": int(flip)} | ({"alpha": alpha} if alpha != 1 else {})
        v = m.node("Gemm", [x, weights, *([bias] if bias else [])], "v", **more)
    else:
        if bias:
            m.nodes.pop()
            m.constants = [c for c in m.constants if not c.name.startswith("b")]
        v = m.node("MatMul", [x, weights], "v")
    m.output(v, sy, d.zero(m.dtype))
    return m.layer(name)


def onnx_pair(name, d):
    m = Onnx(d, kind8(d))
    shape = planar(d)
    other = shape if d.chance(0.5) else tuple(1 if d.chance(0.5) else n for n in shape)
    if d.chance(0.15):
        other = other[d.whole(1, 3):]
    a, b = d.scale(1e-3, 1), d.scale(1e-3, 1)
    x, y = m.input("x", shape, a, d.zero(m.dtype)), m.input("z", other, b, d.zero(m.dtype))
    if d.chance(0.3):
        x, y = y, x
    v = m.node(name, [x, y], "v")
    out = a * b / d.factor() if name == "Mul" else d.near(max(a, b) * 2)
    m.output(v, float(np.float32(out)), d.zero(m.dtype))
    return m.layer(name)


def onnx_pool(name, d):
    m = Onnx(d, kind8(d))
    shape = planar(d)
    s, z = d.scale(), d.zero(m.dtype)
    x = m.input("x", shape, s, z)
    more = {}
    if name != "GlobalAveragePool":
        kernel, stride, _, pads = onnx_windows(d, shape, dilate=False)
        if d.chance(0.2):
            kernel, pads = list(shape[2:]), [0, 0, 0, 0]
        more = {"kernel_shape": kernel, "strides": stride, "pads": pads}
        if name == "AveragePool" and d.chance(0.5):
            more["count_include_pad"] = 1
    v = m.node(name, [x], "v", **more)
    same = d.chance(0.8 if name == "MaxPool" else 0.5)  # one scale on both sides: averages are ties often
    m.output(v, s if same else d.near(s, 2), z if same else d.zero(m.dtype))
    return m.layer(name)


def onnx_one(name, d):
    m = Onnx(d, kind8(d))
    shape = planar(d)
    x = m.input("x", shape, s := d.scale(1e-3, 0.5), d.zero(m.dtype))
    more = {"LeakyRelu": {"alpha": float(np.float32(d.rng.uniform(0, 1.5)))}, "Softmax": {"axis": d.among(1, 3, -1)},
            "ReduceMean": {"axes": d.among([2, 3], [1], [3]), "keepdims": d.among(0, 1)}}.get(name, {})
    bottom = np.iinfo(m.dtype).min
    fixed = {"Sigmoid": (1 / 256, bottom), "Softmax": (1 / 256, bottom), "Tanh": (1 / 128, bottom + 128)}
    scale, zero = fixed.get(name, (d.near(s, 2), d.zero(m.dtype)))
    extra = []
    if name == "Clip":
        extra = [m.constant("low", np.float32(0)), m.constant("high", np.float32(6))]
    if name == "PRelu":
        extra = [m.weights("slope", d.codes((shape[1], 1, 1), np.int8), d.scale(1e-3, 1e-2), np.int8(0))]
    m.output(m.node(name, [x, *extra], "v", **more), float(np.float32(scale)), zero)
    return m.layer(name)


def onnx_concat(d):
    m = Onnx(d, kind8(d))
    shape, axis = planar(d), d.whole(0, 3)
    s, z = d.scale(), d.zero(m.dtype)
    parts = []
    for i in range(d.whole(2, 4)):
        own = list(shape)
        own[axis] = d.whole(1, 5)
        free = d.chance(0.5)
        parts.append(m.input(f"x{i}", tuple(own), d.scale() if free else s, d.zero(m.dtype) if free else z))
    m.output(m.node("Concat", parts, "v", axis=axis), s, z)
    return m.layer("Concat")


def onnx_move(name, d):
    m = Onnx(d, kind8(d))
    shape = planar(d)
    s, z = d.scale(), d.zero(m.dtype)
    x = m.input("x", shape, s, z)
    more, extra = {}, []
    if name == "Transpose":
        more = {"perm": [int(a) for a in d.rng.permutation(4)]}
    elif name == "Reshape":
        extra = [m.constant("shape", np.array([1, -1], np.int64))]
    elif name == "Slice":
        extra = [m.constant("starts", np.array([d.whole(0, shape[1] - 1)], np.int64)),
                 m.constant("ends", np.array([shape[1]], np.int64)), m.constant("axes", np.array([1], np.int64))]
    elif name == "Resize":
        mode = d.among("nearest", "linear")
        extra = ["", "", m.constant("sizes", np.array([*shape[:2], d.whole(1, 20), d.whole(1, 20)], np.int64))]
        more = {"mode": mode, "coordinate_transformation_mode": d.among("half_pixel", "asymmetric", "align_corners")}
    same = d.chance(0.8)
    m.output(m.node(name, [x, *extra], "v", **more), s if same else d.scale(), z if same else d.zero(m.dtype))
    return m.layer(name)


def onnx_transposed(d):
    m = Onnx(d, kind8(d))
    n, c, h, w = planar(d)
    x = m.input("x", (n, c, h, w), sx := d.scale(), d.zero(m.dtype))
    o = d.whole(1, 6)
    weights, bias, sy = onnx_weights(d, m, (c, o, d.whole(1, 4), d.whole(1, 4)), o, sx, 1)
    m.output(m.node("ConvTranspose", [x, weights, *([bias] if bias else [])], "v", strides=[d.whole(1, 3)] * 2), sy,
             d.zero(m.dtype))
    return m.layer("ConvTranspose")


ONNX = [
    *[onnx_conv] * 14, *[lambda d: onnx_product("Gemm", d)] * 4, *[lambda d: onnx_product("MatMul", d)] * 4,
    *[lambda d: onnx_pair("Add", d)] * 4, *[lambda d: onnx_pair("Mul", d)] * 4, lambda d: onnx_pair("Sub", d),
    *[lambda d: onnx_pool("AveragePool", d)] * 3, *[lambda d: onnx_pool("GlobalAveragePool", d)] * 2,
    lambda d: onnx_pool("MaxPool", d), *[lambda d: onnx_one("LeakyRelu", d)] * 2,
    *[lambda d: onnx_one("Sigmoid", d)] * 2,
    *[lambda d: onnx_one("Softmax", d)] * 2, lambda d: onnx_one("Tanh", d), lambda d: onnx_one("HardSwish", d),
    lambda d: onnx_one("Relu", d), lambda d: onnx_one("Clip", d), lambda d: onnx_one("PRelu", d),
    lambda d: onnx_one("ReduceMean", d), *[onnx_concat] * 2, onnx_transposed, lambda d: onnx_move("Transpose", d),
    lambda d: onnx_move("Reshape", d), lambda d: onnx_move("Slice", d), lambda d: onnx_move("Resize", d),
]


def onnx_layer(seed, i):
    """Layer `i` of a run; operators take turns."""
    return ONNX[i % len(ONNX)](Draw([seed, 1, i]))


def ort(layer):
    """The outputs by name under ONNX Runtime as it comes, with all its optimizations; text if it refuses the layer."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(layer.model, options, providers=["CPUExecutionProvider"])
        return dict(zip((o.name for o in session.get_outputs()), session.run(None, layer.feeds), strict=True))
    except Exception as e:  # its errors have no common type of their own
        return " ".join(str(e).split())[:120]


@dataclass
class Row:
    """What was found of one operator. `differing` are (layer, bytes that differ, greatest difference)."""

    layers: int = 0
    bytes: int = 0
    wrong: int = 0
    refused: int = 0
    differing: list[tuple[int, int, float]] = field(default_factory=list)
    reasons: set[str] = field(default_factory=set)


def compare(layers, oracle, arithmetic):
    """operator -> Row, of numbered layers."""
    rows = defaultdict(Row)
    for i, layer in layers:
        row = rows[layer.operator]
        want = oracle(layer)
        try:
            got = prepare(load(layer.model), arithmetic).run(layer.feeds)
        except NpulabError as e:
            got = str(e)
        if isinstance(want, str) and isinstance(got, str):
            row.refused += 1
            row.reasons.add(want.splitlines()[0][:100])
            continue
        if isinstance(want, str) or isinstance(got, str):
            if isinstance(want, str):
                row.refused += 1
                row.reasons.add(want.splitlines()[0][:100])
            else:
                row.layers += 1
                row.wrong += sum(a.nbytes for a in want.values())
                row.differing.append((i, -1, 0.0))
                row.reasons.add(f"not here: {got.splitlines()[0][:100]}")
            continue
        row.layers += 1
        for name, w in want.items():
            g = got[name]
            row.bytes += w.nbytes
            if g.shape != w.shape or g.dtype != w.dtype:
                row.wrong += w.nbytes
                row.differing.append((i, -2, 0.0))
            elif g.tobytes() != w.tobytes():
                differ = np.frombuffer(g.tobytes(), np.uint8) != np.frombuffer(w.tobytes(), np.uint8)
                row.wrong += int(differ.sum())
                far = np.abs(g.astype(np.float64) - w.astype(np.float64)).max()
                row.differing.append((i, int(differ.sum()), float(far)))
    return rows


def table(title, rows, seconds):
    print(f"{title}: {sum(r.layers for r in rows.values()):,} layers in {seconds:.0f} s")
    print(f"  {'operator':<24}{'layers':>8}{'bytes':>13}{'differ':>8}{'refused':>9}")
    for name, r in sorted(rows.items()):
        print(f"  {name:<24}{r.layers:>8,}{r.bytes:>13,}{r.wrong:>8,}{r.refused:>9,}")
        for i, count, far in r.differing[:4]:
            print(f"    layer {i}: {count} bytes, at most {far:g} apart")
        if r.differing:
            print(f"    {len(r.differing)} layers differ")
        for reason in sorted(r.reasons)[:3]:
            print(f"    {reason}")
    print(f"  {'all':<24}{sum(r.layers for r in rows.values()):>8,}{sum(r.bytes for r in rows.values()):>13,}"
          f"{sum(r.wrong for r in rows.values()):>8,}{sum(r.refused for r in rows.values()):>9,}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("tflite", "onnx"))
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    found = {}
    for name, layer, oracle, arithmetic in FORMATS:
        if a.only in (None, name):
            start = time.perf_counter()
            rows = compare(((i, layer(a.seed, i)) for i in range(a.count)), oracle, arithmetic)
            table(name, rows, time.perf_counter() - start)
            found[name] = {k: {"layers": r.layers, "bytes": r.bytes, "differ": r.wrong, "refused": r.refused}
                           for k, r in sorted(rows.items())}
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(r["differ"] for rows in found.values() for r in rows.values()))


FORMATS = [("tflite", tflite_layer, litert, "tflite"), ("onnx", onnx_layer, ort, "onnx")]

if __name__ == "__main__":
    sys.exit(main())
