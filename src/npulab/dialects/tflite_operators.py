"""Each TFLite operator in ONNX's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npulab.dialects import layouts
from npulab.dialects import tflite_moves as moves
from npulab.dialects.conversion import NotThereError
from npulab.dialects.fake_quant import nudged
from npulab.dialects.layouts import Order
from npulab.dialects.onnx_file import INT32_MAX, Held, OnnxFile
from npulab.dialects.windows import same_padding
from npulab.ir import DType, Quantization
from npulab.ir.ops import Conv2D, DepthwiseConv2D, Elementwise, FullyConnected, Pool2D, Softmax

Translate = Callable[[OnnxFile], None]
FIRST = layouts.channels_first(4)


# windows


def conv(f: OnnxFile) -> None:
    op = f.now.op
    assert isinstance(op, Conv2D | DepthwiseConv2D)
    weights = f.shape(1)
    _, h, w, c = f.shape(0)
    kernel = weights[1:3]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, op.dilation, strict=True)]
    pads = pads_of(op.padding, (h, w), reach, op.stride)
    order: Order = (3, 0, 1, 2) if isinstance(op, DepthwiseConv2D) else FIRST
    groups = c if isinstance(op, DepthwiseConv2D) else c // weights[3]
    inputs = [f.input(0, FIRST), f.input(1, order)]
    bias = bias_of(f, 2, f.value(1).quantization)
    inputs += [bias] if bias is not None else []
    f.give(f.op("Conv", inputs, kernel_shape=kernel, strides=op.stride, dilations=op.dilation, group=groups, pads=pads),
           FIRST, op.activation)


def pads_of(padding: str, sizes: Any, reach: Any, stride: Any) -> list[int]:
    if padding == "valid":
        return [0, 0, 0, 0]
    pairs = [same_padding(n, r, s) for n, r, s in zip(sizes, reach, stride, strict=True)]
    return [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]]


def bias_of(f: OnnxFile, i: int, weights: Quantization | None) -> int | None:
    """The bias; sums of 32 or 64 bits by the scale of the data times that of the weights, as TFLite reads them."""
    if not f.has(i):
        return None
    v, data = f.value(i), f.value(2 if f.now.op.name == "TRANSPOSE_CONV" else 0)
    if v.dtype not in (DType.INT32, DType.INT64):
        return f.input(i)
    if data.quantization is None or weights is None or not v.is_constant:
        raise NotThereError("an integer bias without scales")
    scales = tuple(float(np.float32(data.quantization.scale) * np.float32(s)) for s in weights.scales)
    sums = v.array().astype(np.int64)
    if np.abs(sums).max(initial=0) > INT32_MAX:  # ONNX dequantizes no more
        return f.constant((sums * np.array(scales)).astype(np.float32), v.name)
    return f.real(f.constant(sums.astype(np.int32), v.name), Quantization(scales, (0,) * len(scales), 0), DType.INT32)


def transpose_conv(f: OnnxFile) -> None:
    own = f.options
    h, w = f.shape(2)[1:3]
    kh, kw = f.shape(1)[1:3]
    stride = (own["stride_h"], own["stride_w"])
    outs = f.out.shape[1:3]
    total = [max((size - 1) * s + k - out, 0) for size, s, k, out in zip((h, w), stride, (kh, kw), outs, strict=True)]
    if own["padding"] == "valid":
        total = [0, 0]
    before = [t // 2 for t in total]
    full = [(size - 1) * s + k for size, s, k in zip((h, w), stride, (kh, kw), strict=True)]
    after = [fu - b - out for fu, b, out in zip(full, before, outs, strict=True)]
    extra = [max(-a, 0) for a in after]
    if any(e >= s for e, s in zip(extra, stride, strict=True)):
        raise NotThereError("results larger than the kernel reaches")
    inputs = [f.input(2, FIRST), f.input(1, (3, 0, 1, 2))]
    bias = bias_of(f, 3, f.value(1).quantization)
    inputs += [bias] if bias is not None else []
    f.give(f.op("ConvTranspose", inputs, kernel_shape=(kh, kw), strides=stride, output_padding=extra,
                pads=[*before, *(max(a, 0) for a in after)]), FIRST, f.fused)


def pool(f: OnnxFile) -> None:
    op = f.now.op
    assert isinstance(op, Pool2D)
    pads = pads_of(op.padding, f.shape(0)[1:3], op.window, op.stride)
    name = "MaxPool" if op.kind == "max" else "AveragePool"
    f.give(f.op(name, [f.input(0, FIRST)], kernel_shape=op.window, strides=op.stride, pads=pads), FIRST, op.activation)


def resize(f: OnnxFile) -> None:
    own = f.options
    align, half = own.get("align_corners"), own.get("half_pixel_centers")
    kind = "align_corners" if align else "half_pixel" if half else "asymmetric"
    nearest = f.now.op.name == "RESIZE_NEAREST_NEIGHBOR"
    n, h, w, c = f.out.shape
    extra = {"nearest_mode": "round_prefer_ceil" if align or half else "floor"} if nearest else {}
    f.give(f.op("Resize", [f.input(0, FIRST), -1, -1, f.numbers(n, c, h, w)], mode="nearest" if nearest else "linear",
                coordinate_transformation_mode=kind, **extra), FIRST)


def space(f: OnnxFile) -> None:
    name = "DepthToSpace" if f.now.op.name == "DEPTH_TO_SPACE" else "SpaceToDepth"
    f.give(f.op(name, [f.input(0, FIRST)], blocksize=f.options["block_size"]), FIRST)


# matrices


def fully_connected(f: OnnxFile) -> None:
    op = f.now.op
    assert isinstance(op, FullyConnected)
    weights, data = f.value(1), f.value(0)
    depth = weights.shape[1]
    held = f.columns.get(data.index)
    if held and weights.is_constant:  # what a reshape left in another order
        shape, order = held
        columns = np.arange(depth).reshape(shape[1:]).transpose([a - 1 for a in order[1:]]).reshape(-1)
        matrix = f.constant(weights.integers()[:, columns], weights.name, weights.dtype)
        matrix = f.real(matrix, weights.quantization, weights.dtype) if weights.quantization else matrix
    else:
        matrix = f.input(1, (0, 1))
    x = f.input(0, layouts.plain(len(data.shape)))
    if len(data.shape) != 2 or data.shape[1] != depth:
        x = f.op("Reshape", [x, f.numbers(data.elements // depth, depth)])
    bias = bias_of(f, 2, weights.quantization)
    y = f.op("Gemm", [x, matrix, *([bias] if bias is not None else [])], transB=1)
    f.give(y, layouts.plain(len(f.out.shape)), op.activation, shape=(data.elements // depth, weights.shape[0]))


def batch_matmul(f: OnnxFile) -> None:
    parts = []
    for i, name in ((0, "adj_x"), (1, "adj_y")):
        rank = len(f.shape(i))
        swapped = (*range(rank - 2), rank - 1, rank - 2)
        parts.append(f.input(i, swapped if f.options.get(name) else layouts.plain(rank)))
    f.give(f.op("MatMul", parts), layouts.plain(len(f.out.shape)))


# element by element


def one(name: str, **attributes: Any) -> Translate:
    def translate(f: OnnxFile) -> None:
        f.give(f.op(name, [f.input(0)], **attributes), f.order(0))
    return translate


def activation(kind: str) -> Translate:
    def translate(f: OnnxFile) -> None:
        f.give(f.input(0), f.order(0), kind)
    return translate


def two(name: str) -> Translate:
    def translate(f: OnnxFile) -> None:
        order = f.common(len(f.out.shape), range(len(f.now.inputs)))
        parts = [f.aligned(i, order) for i in range(len(f.now.inputs))]
        f.give(f.op(name, parts), order, f.fused)
    return translate


def not_equal(f: OnnxFile) -> None:
    order = f.common(len(f.out.shape), (0, 1))
    f.give(f.op("Not", [f.op("Equal", [f.aligned(i, order) for i in (0, 1)])]), order)


def squared_difference(f: OnnxFile) -> None:
    order = f.common(len(f.out.shape), (0, 1))
    d = f.op("Sub", [f.aligned(i, order) for i in (0, 1)])
    f.give(f.op("Mul", [d, d]), order)


def floor_div(f: OnnxFile) -> None:
    """The largest number not above the quotient; of integers (a - a mod b) / b, as Div cuts towards zero."""
    order = f.common(len(f.out.shape), (0, 1))
    a, b = (f.aligned(i, order) for i in (0, 1))
    if f.out.dtype is DType.FLOAT32:
        f.give(f.op("Floor", [f.op("Div", [a, b])]), order)
    else:
        f.give(f.op("Div", [f.op("Sub", [a, f.op("Mod", [a, b])]), b]), order)


def square(f: OnnxFile) -> None:
    x = f.input(0)
    f.give(f.op("Mul", [x, x]), f.order(0))


def rsqrt(f: OnnxFile) -> None:
    f.give(f.op("Reciprocal", [f.op("Sqrt", [f.input(0)])]), f.order(0))


def leaky(f: OnnxFile) -> None:
    op = f.now.op
    assert isinstance(op, Elementwise)
    f.give(f.op("LeakyRelu", [f.input(0)], alpha=op.alpha), f.order(0))


def gelu(f: OnnxFile) -> None:
    """Spelled out: the operator is of opset 20."""
    x = f.input(0)

    def number(n: float) -> int:
        return f.constant(np.array(n, np.float32), "number")
    half = f.op("Mul", [x, number(0.5)])
    if f.options.get("approximate"):
        cube = f.op("Mul", [f.op("Mul", [x, x]), number(0.044715)])
        inner = f.op("Mul", [f.op("Mul", [x, number((2 / np.pi) ** 0.5)]), f.op("Add", [cube, number(1)])])
        bell = f.op("Tanh", [inner])
    else:
        bell = f.op("Erf", [f.op("Mul", [x, number(0.5**0.5)])])
    f.give(f.op("Mul", [half, f.op("Add", [bell, number(1)])]), f.order(0))


def prelu(f: OnnxFile) -> None:
    order = f.order(0)
    f.give(f.op("PRelu", [f.input(0), f.aligned(1, order)]), order)


def softmax(f: OnnxFile) -> None:
    """Along the last axis, wherever that is held."""
    order, rank = f.order(0), len(f.shape(0))
    x, op = f.input(0), f.now.op
    if isinstance(op, Softmax) and op.beta != 1:
        x = f.op("Mul", [x, f.constant(np.array(op.beta, np.float32), "beta")])
    name = "LogSoftmax" if op.name == "LOG_SOFTMAX" else "Softmax"
    f.give(f.op(name, [x], axis=order.index(rank - 1)), order)


def cast(f: OnnxFile) -> None:
    """Of the stored integers, whatever they stand for."""
    from npulab.dialects.onnx_file import TYPES

    v = f.value(0)
    h = f.held[v.index] if v.index in f.held else Held(f.constant(v.array(), v.name), layouts.plain(len(v.shape)))
    if f.out.dtype not in TYPES:
        raise NotThereError(f"to {f.out.dtype.value}")
    f.held[f.out.index] = Held(f.op("Cast", [h.tensor], f.out.name, to=TYPES[f.out.dtype]), h.order)


def quantize(f: OnnxFile) -> None:
    """QUANTIZE and DEQUANTIZE: the same real number in another form."""
    f.give(f.input(0), f.order(0))


def fake_quant(f: OnnxFile) -> None:
    """The range that training found, as QuantizeLinear and DequantizeLinear say it."""
    own = f.options
    p = nudged(own["min"], own["max"], own["num_bits"] or 8, bool(own["narrow_range"]))
    x = f.input(0)
    if not p.fills:
        limits = [f.constant(np.array(n, np.float32), "limit") for n in p.limits]
        x = f.op("Clip", [x, *limits])
    ends = f.scale_and_zero(p.quantization, p.holder)
    f.give(f.op("DequantizeLinear", [f.op("QuantizeLinear", [x, *ends]), *ends]), f.order(0))


# along axes


def reduce(name: str) -> Translate:
    def translate(f: OnnxFile) -> None:
        rank, order = len(f.shape(0)), f.order(0)
        gone = {int(a) % rank for a in f.known(1, "axes").reshape(-1)}
        keep = bool(getattr(f.now.op, "keep_dims", f.options.get("keep_dims", False)))
        left = order if keep else tuple(a - sum(g < a for g in gone) for a in order if a not in gone)
        at = sorted(order.index(a) for a in gone)
        x = f.input(0)
        if not gone:
            f.give(x, order)
        elif name == "ReduceSum" or f.opset >= 18:
            f.give(f.op(name, [x, f.numbers(*at)], keepdims=int(keep)), left)
        else:
            f.give(f.op(name, [x], axes=at, keepdims=int(keep)), left)
    return translate


def arg_extreme(f: OnnxFile) -> None:
    from npulab.dialects.onnx_file import TYPES

    rank, order = len(f.shape(0)), f.order(0)
    axis = int(f.known(1, "axes").reshape(-1)[0]) % rank
    y = f.op("ArgMax" if f.now.op.name == "ARG_MAX" else "ArgMin", [f.input(0)], axis=order.index(axis), keepdims=0)
    if f.out.dtype is not DType.INT64:
        y = f.op("Cast", [y], to=TYPES[f.out.dtype])
    f.give(y, tuple(a - (a > axis) for a in order if a != axis))


def cum_sum(f: OnnxFile) -> None:
    rank, order = len(f.shape(0)), f.order(0)
    axis = order.index(int(f.known(1, "axes").reshape(-1)[0]) % rank)
    own = f.options
    f.give(f.op("CumSum", [f.input(0), f.constant(np.array(axis, np.int64))], exclusive=int(own.get("exclusive", 0)),
                reverse=int(own.get("reverse", 0))), order)


TABLE: dict[str, Translate] = {
    "CONV_2D": conv, "DEPTHWISE_CONV_2D": conv, "TRANSPOSE_CONV": transpose_conv, "AVERAGE_POOL_2D": pool,
    "MAX_POOL_2D": pool, "RESIZE_BILINEAR": resize, "RESIZE_NEAREST_NEIGHBOR": resize, "DEPTH_TO_SPACE": space,
    "SPACE_TO_DEPTH": space, "FULLY_CONNECTED": fully_connected, "BATCH_MATMUL": batch_matmul,
    "ADD": two("Add"), "SUB": two("Sub"), "MUL": two("Mul"), "DIV": two("Div"), "MAXIMUM": two("Max"),
    "MINIMUM": two("Min"), "POW": two("Pow"), "FLOOR_MOD": two("Mod"), "FLOOR_DIV": floor_div,
    "SQUARED_DIFFERENCE": squared_difference, "EQUAL": two("Equal"), "NOT_EQUAL": not_equal,
    "GREATER": two("Greater"), "GREATER_EQUAL": two("GreaterOrEqual"), "LESS": two("Less"),
    "LESS_EQUAL": two("LessOrEqual"), "LOGICAL_AND": two("And"), "LOGICAL_OR": two("Or"), "SELECT_V2": two("Where"),
    "LOGICAL_NOT": one("Not"), "ABS": one("Abs"), "NEG": one("Neg"), "EXP": one("Exp"), "LOG": one("Log"),
    "SQRT": one("Sqrt"), "FLOOR": one("Floor"), "CEIL": one("Ceil"), "ROUND": one("Round"), "SIN": one("Sin"),
    "COS": one("Cos"), "SIGN": one("Sign"), "SQUARE": square, "RSQRT": rsqrt, "LOGISTIC": one("Sigmoid"),
    "TANH": one("Tanh"), "ELU": one("Elu"), "HARD_SWISH": one("HardSwish"), "LEAKY_RELU": leaky, "GELU": gelu,
    "PRELU": prelu, "RELU": activation("relu"), "RELU6": activation("relu6"),
    "RELU_N1_TO_1": activation("relu_n1_to_1"), "RELU_0_TO_1": activation("relu_0_to_1"), "SOFTMAX": softmax,
    "LOG_SOFTMAX": softmax, "CAST": cast, "FAKE_QUANT": fake_quant,
    "QUANTIZE": quantize, "DEQUANTIZE": quantize, "MEAN": reduce("ReduceMean"),
    "SUM": reduce("ReduceSum"), "REDUCE_MAX": reduce("ReduceMax"), "REDUCE_MIN": reduce("ReduceMin"),
    "REDUCE_PROD": reduce("ReduceProd"), "ARG_MAX": arg_extreme, "ARG_MIN": arg_extreme, "CUMSUM": cum_sum,
    "RESHAPE": moves.reshape, "SQUEEZE": moves.reshape, "EXPAND_DIMS": moves.reshape, "TRANSPOSE": moves.transpose,
    "CONCATENATION": moves.concat, "SPLIT": moves.split, "SPLIT_V": moves.split, "PACK": moves.pack,
    "UNPACK": moves.unpack, "PAD": moves.pad, "PADV2": moves.pad, "MIRROR_PAD": moves.pad,
    "SLICE": moves.slice_, "STRIDED_SLICE": moves.strided_slice, "GATHER": moves.gather, "GATHER_ND": moves.gather_nd,
    "BROADCAST_TO": moves.broadcast, "TILE": moves.tile, "SHAPE": moves.shape_of,
}
"""TFLite operators and their translations."""
