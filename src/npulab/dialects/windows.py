"""Convolutions and poolings of ONNX as TFLite has them: channels last, padding as a word or as an operator before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.dialects import layouts
from npulab.dialects.conversion import FINER, Conversion, NotThereError
from npulab.dialects.weights import bias_of, integer_bias, weights_of
from npulab.ir import Quantization

Array = NDArray[Any]
CONSTANT_MAX = 1 << 24
"""Elements of a constant that a conversion makes."""
Pairs = list[tuple[int, int]]
"""(before, after) along the rows and the columns."""


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """(before, after) of TFLite's SAME; `kernel` as far as it reaches."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Window:
    """The geometry of a convolution or pooling over rows and columns; with one spatial axis, that is the columns.

    sizes    of the input.   outs  of the output.   reach  of the kernel, dilated.   pads  (before, after).
    """

    def __init__(self, c: Conversion, kernel: Sequence[int]) -> None:
        shape, out = c.shape(0), c.out.shape
        rank = len(shape) - 2
        if rank not in (1, 2):
            raise NotThereError(f"{rank} spatial dimensions")
        self.rank = rank
        self.batch, self.channels = shape[:2]
        self.sizes = self._two(shape[2:])
        self.outs = self._two(out[2:])
        self.kernel = self._two(kernel)
        self.stride = self._two(c.attribute("strides", (1,) * rank))
        self.dilation = self._two(c.attribute("dilations", (1,) * rank))
        self.reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        self.pads = self._pads(c, rank)

    def _two(self, numbers: Sequence[int]) -> list[int]:
        return [1] * (2 - self.rank) + [int(n) for n in numbers]

    def _pads(self, c: Conversion, rank: int) -> Pairs:
        given, auto = c.attribute("pads", (0,) * (2 * rank)), c.attribute("auto_pad", "NOTSET")
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            both = [same_padding(n, r, s) for n, r, s in zip(self.sizes, self.reach, self.stride, strict=True)]
            return [p if auto == "SAME_UPPER" else p[::-1] for p in both]
        if auto == "VALID":
            return [(0, 0), (0, 0)]
        pairs = [(int(given[i]), int(given[i + rank])) for i in range(rank)]
        return [(0, 0)] * (2 - rank) + pairs

    def over(self) -> Pairs:
        """The padding with which every output has a whole window: `ceil_mode` goes beyond what is stated."""
        if any((o - 1) * s >= n + a for (a, _), o, s, n in zip(self.pads, self.outs, self.stride, self.sizes,
                                                               strict=True)):
            raise NotThereError("windows that begin in the padding at the end")
        return [(a, max((o - 1) * s + r - n - a, b)) for (a, b), o, s, r, n in
                zip(self.pads, self.outs, self.stride, self.reach, self.sizes, strict=True)]

    def word(self, pads: Pairs) -> str | None:
        """TFLite's name of this padding, if it has one."""
        if self.outs == [(n - r) // s + 1 for n, r, s in zip(self.sizes, self.reach, self.stride, strict=True)] \
                and all(p == (0, 0) for p in pads):
            return "VALID"
        same = [same_padding(n, r, s) for n, r, s in zip(self.sizes, self.reach, self.stride, strict=True)]
        needed = [(a, max((o - 1) * s + r - n - a, 0)) for (a, _), o, s, r, n in
                  zip(pads, self.outs, self.stride, self.reach, self.sizes, strict=True)]
        fits = self.outs == [-(-n // s) for n, s in zip(self.sizes, self.stride, strict=True)]
        return "SAME" if fits and same == needed else None

    def data(self, c: Conversion) -> int:
        """The input as batch, rows, columns, channels."""
        tensor = c.input(0, layouts.channels_last(self.rank + 2))
        return c.reshape(tensor, (self.batch, *self.sizes, self.channels))

    def padded(self, c: Conversion, tensor: int, pads: Pairs, value: float = 0.0) -> int:
        """The tensor with borders; by less than nothing, without some."""
        cut = [(max(-a, 0), max(-b, 0)) for a, b in pads]
        if any(p != (0, 0) for p in cut):
            n, *sizes, depth = c.file.specs[tensor].shape
            kept = [s - a - b for s, (a, b) in zip(sizes, cut, strict=True)]
            begin, size = c.file.numbers(0, cut[0][0], cut[1][0], 0), c.file.numbers(n, *kept, depth)
            tensor = c.step("SLICE", [tensor, begin, size], (n, *kept, depth))
        pads = [(max(a, 0), max(b, 0)) for a, b in pads]
        if all(p == (0, 0) for p in pads):
            return tensor
        return padded(c, tensor, [(0, 0), *pads, (0, 0)], value)

    def result(self, channels: int) -> tuple[int, ...]:
        return (self.batch, *self.outs, channels)

    def give(self, c: Conversion, name: str, inputs: Sequence[int], channels: int, like: int | None = None,
             **options: Any) -> None:
        c.emit(name, inputs, layouts.channels_last(self.rank + 2), self.result(channels), like, **options)

    def strides(self) -> dict[str, int]:
        return {"stride_h": self.stride[0], "stride_w": self.stride[1]}


def padded(c: Conversion, tensor: int, pads: Sequence[tuple[int, int]], value: float = 0.0) -> int:
    """PAD with zeros, PADV2 with anything else, of a tensor of floats or integers."""
    spec = c.file.specs[tensor]
    shape = [n + a + b for n, (a, b) in zip(spec.shape, pads, strict=True)]
    table = c.file.constant("paddings", np.array(pads, np.int32).reshape(-1, 2))
    if value == 0:
        return c.step("PAD", [tensor, table], shape)
    if spec.is_integer:
        assert spec.quantization
        q = spec.quantization
        limits = np.iinfo(spec.dtype)
        code = np.clip(np.round(value / q.scale) + q.zero_point, limits.min, limits.max)
        filling = c.file.constant("padding", np.array([code]).astype(spec.dtype), q)
    else:
        filling = c.file.constant("padding", np.array([value], spec.dtype))
    return c.step("PADV2", [tensor, table, filling], shape)


# convolutions


def _with_ones(array: Array, rank: int) -> Array:
    """Weights of one spatial axis with rows of one."""
    return array if rank == 2 else np.expand_dims(array, 2)


def conv(c: Conversion) -> None:
    weights = c.shape(1)
    w = Window(c, weights[2:])
    groups, outputs = c.attribute("group", 1), weights[0]
    word = w.word(w.pads)
    data = w.data(c)
    if word is None:
        data = w.padded(c, data, w.pads)
    depthwise = groups == w.channels and groups > 1
    name = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    own = weights_of(c, name, 0, 3 if depthwise else 0)
    array = _with_ones(own.array, w.rank)
    bias = bias_of(c, data, own.quantization, outputs)
    common: dict[str, Any] = {"padding": word or "VALID", "fused_activation_function": c.activation, **w.strides(),
              "dilation_h_factor": w.dilation[0], "dilation_w_factor": w.dilation[1]}
    if depthwise:
        common["depth_multiplier"] = outputs // groups
    kernel = own.constant(c, array.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1)))
    w.give(c, name, [data, kernel, bias], outputs, **common)


def conv_transpose(c: Conversion) -> None:
    weights = c.shape(1)
    w = Window(c, weights[2:])
    groups, outputs = c.attribute("group", 1), weights[1] * c.attribute("group", 1)
    own = weights_of(c, "TRANSPOSE_CONV", 1, 0)
    q = own.quantization
    array = _dilated(_with_ones(own.array, w.rank), w.dilation, q)
    kernel = array.shape[2:]
    full = [(n - 1) * s + k for n, s, k in zip(w.sizes, w.stride, kernel, strict=True)]
    before = [a for a, _ in _transposed_pads(c, w, full)]
    same = [same_padding(o, k, s) for o, k, s in zip(w.outs, kernel, w.stride, strict=True)]
    data = w.data(c)
    bias = bias_of(c, data, q, outputs)
    is_same = before == [p[0] for p in same] and all(-(-o // s) == n for o, s, n in zip(w.outs, w.stride, w.sizes,
                                                                                      strict=True))
    grown = list(w.outs) if is_same else [max(f, a + o) for f, a, o in zip(full, before, w.outs, strict=True)]
    options: dict[str, Any] = {"padding": "SAME" if is_same else "VALID", **w.strides()}
    cropped = not is_same and (grown != list(w.outs) or any(before))
    fused = "NONE" if cropped or groups > 1 else c.activation
    shape = (w.batch, *grown, outputs)
    if groups == 1:
        operands = [c.file.numbers(*shape), own.constant(c, array.transpose(1, 2, 3, 0)), data, bias]
        if not cropped:
            w.give(c, "TRANSPOSE_CONV", operands, outputs, fused_activation_function=fused, **options)
            return
        whole = c.step("TRANSPOSE_CONV", operands, shape, *_type_of_result(c), **options)
    else:
        whole = _grouped_transpose(c, w, array, q, data, bias, groups, shape, options)
    begin, size = c.file.numbers(0, *before, 0), c.file.numbers(*w.result(outputs))
    if cropped:
        whole = c.step("SLICE", [whole, begin, size], w.result(outputs))
    if c.activation != "NONE":
        whole = c.step(c.activation, [whole])
    c.put(whole, layouts.channels_last(w.rank + 2))


def _type_of_result(c: Conversion) -> tuple[str, Quantization | None]:
    return (c.dtype, c.quantized) if c.integer else ("float32", None)


def _transposed_pads(c: Conversion, w: Window, full: Sequence[int]) -> Pairs:
    """What ONNX cuts off the full result, from its output_shape or auto_pad if it says so."""
    auto = c.attribute("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID") and c.attribute("output_shape") is None:
        return w.pads if auto == "NOTSET" else [(0, 0), (0, 0)]
    extra = w._two(c.attribute("output_padding", (0,) * w.rank))
    found = []
    for f, e, o in zip(full, extra, w.outs, strict=True):
        total = max(f + e - o, 0)
        small = total // 2
        found.append((small, total - small) if auto == "SAME_UPPER" else (total - small, small))
    return found


def _dilated(array: Array, dilation: Sequence[int], q: Quantization | None) -> Array:
    """The kernel with zeros between its elements: what TFLite's operator has no option for."""
    if list(dilation) == [1, 1]:
        return array
    zero = q.zero_point if q else 0
    o, i, h, wide = array.shape
    if o * i * ((h - 1) * dilation[0] + 1) * ((wide - 1) * dilation[1] + 1) > CONSTANT_MAX:
        raise NotThereError("kernels that reach so far")
    out = np.full((o, i, (h - 1) * dilation[0] + 1, (wide - 1) * dilation[1] + 1), zero, array.dtype)
    out[:, :, :: dilation[0], :: dilation[1]] = array
    return out


def _grouped_transpose(c: Conversion, w: Window, array: Array, q: Quantization | None, data: int, bias: int,
                       groups: int, shape: tuple[int, ...], options: dict[str, Any]) -> int:
    """One transposed convolution a group, side by side; the bias behind them."""
    if q is not None or groups > 64:
        raise NotThereError("many groups" if groups > 64 else "quantized groups")
    n, rows, columns, outputs = shape
    own = w.channels // groups
    parts = []
    for g in range(groups):
        begin, size = c.file.numbers(0, 0, 0, own * g), c.file.numbers(n, *w.sizes, own)
        part = c.step("SLICE", [data, begin, size], (n, *w.sizes, own))
        kernel = c.file.constant(f"{c.file.origin}_weights", array[own * g : own * (g + 1)].transpose(1, 2, 3, 0))
        parts.append(c.step("TRANSPOSE_CONV", [c.file.numbers(n, rows, columns, outputs // groups), kernel, part],
                            (n, rows, columns, outputs // groups), "float32", **options))
    whole = c.step("CONCATENATION", parts, shape, axis=3, fused_activation_function="NONE")
    return c.step("ADD", [whole, bias], shape, fused_activation_function="NONE")


# poolings


def max_pool(c: Conversion) -> None:
    if len([v for v in c.node.outputs if v >= 0]) > 1:
        raise NotThereError("indices of the largest elements")
    w = Window(c, c.attribute("kernel_shape"))
    if w.dilation != [1, 1]:
        raise NotThereError("dilated poolings")
    pads = w.over()
    word = w.word(pads) or w.word(w.pads)
    data = w.data(c)
    if word is None:
        data = w.padded(c, data, pads, float(np.finfo(np.float32).min))
    w.give(c, "MAX_POOL_2D", [data], w.channels, data, padding=word or "VALID", filter_height=w.kernel[0],
           filter_width=w.kernel[1], fused_activation_function=c.activation, **w.strides())


def average_pool(c: Conversion) -> None:
    """SAME does not count the padding, nor does ONNX by default; otherwise zeros are averaged too, and the result is
    corrected by the share of elements that count."""
    w = Window(c, c.attribute("kernel_shape"))
    if w.dilation != [1, 1]:
        raise NotThereError("dilated poolings")
    counts_padding = bool(c.attribute("count_include_pad", 0))
    pads = w.over()
    options: dict[str, Any] = {"filter_height": w.kernel[0], "filter_width": w.kernel[1], **w.strides()}
    word = w.word(pads)
    if word == "VALID" or (word == "SAME" and not counts_padding):
        data = w.data(c)
        q = c.file.specs[data].quantization
        if c.integer and c.quantized and q != c.quantized:
            if word == "VALID" and w.kernel[0] * w.kernel[1] * w.channels <= CONSTANT_MAX:
                _average_as_convolution(c, w, data)
                return
            assert q
            if q.scale > FINER * c.quantized.scale:  # it rounds to steps of the data first
                raise NotThereError("an average in finer steps than its data")
        w.give(c, "AVERAGE_POOL_2D", [data], w.channels, data, padding=word, fused_activation_function=c.activation,
               **options)
        return
    if c.integer:
        raise NotThereError("this padding in integers")
    if w.outs[0] * w.outs[1] > CONSTANT_MAX:
        raise NotThereError("results of this size")
    counted = [_counted(*args, counts_padding) for args in zip(w.sizes, w.outs, w.kernel, w.stride, w.pads,
                                                               strict=True)]
    share = np.outer(*(k / n for k, n in zip(w.kernel, counted, strict=True))).astype(np.float32)
    pooled = c.step("AVERAGE_POOL_2D", [w.padded(c, w.data(c), pads)], w.result(w.channels), padding="VALID",
                    fused_activation_function="NONE", **options)
    if (share != 1).any():
        pooled = c.step("MUL", [pooled, c.file.constant("share", share.reshape(1, *w.outs, 1))],
                        fused_activation_function="NONE")
    if c.activation != "NONE":
        pooled = c.step(c.activation, [pooled])
    c.put(pooled, layouts.channels_last(w.rank + 2))


def _counted(size: int, out: int, kernel: int, stride: int, pads: tuple[int, int], padding: bool) -> Array:
    """How many elements along one axis each window averages; beyond the stated padding there are none to count."""
    first = np.arange(out) * stride - pads[0]
    low, high = (-pads[0], size + pads[1]) if padding else (0, size)
    out_of: Array = np.maximum(np.minimum(first + kernel, high) - np.maximum(first, low), 1)
    return out_of


def _average_as_convolution(c: Conversion, w: Window, data: int) -> None:
    """A depthwise convolution with equal weights: it rounds once to the output's own scale, the pooling cannot."""
    area = w.kernel[0] * w.kernel[1]
    q = Quantization((float(np.float32(1 / area)),), (0,), 3)
    kernel = c.file.constant("average", np.ones((1, *w.kernel, w.channels), "uint8" if c.dtype == "uint8" else "int8"),
                             q)
    bias = integer_bias(c, -1, data, q, w.channels)
    w.give(c, "DEPTHWISE_CONV_2D", [data, kernel, bias], w.channels, padding="VALID", depth_multiplier=1,
           fused_activation_function=c.activation, dilation_h_factor=1, dilation_w_factor=1, **w.strides())


def global_pool(c: Conversion) -> None:
    """MEAN or REDUCE_MAX over all but batch and channels, in whatever order they lie."""
    order = c.order(0)
    axes = [i for i, axis in enumerate(order) if axis > 1]
    data = c.input(0)
    largest = c.op.name == "GlobalMaxPool"
    c.emit("REDUCE_MAX" if largest else "MEAN", [data, c.file.numbers(*axes)], order, None, data if largest else None,
           keep_dims=True)
