"""Random models of one TFLite operator each, for `vela.py`: every family that Vela's list names, and some it does not.

A seed gives one model. Sizes, types, quantization and parameters are drawn from what is common, from both sides of each
limit of that list, and from its exceptions. Shapes follow from operands as TFLite has them.
"""

from __future__ import annotations

import numpy as np
from vela_operands import INTEGERS, Operands, Shape


class One(Operands):
    """One operator with random operands."""

    def build(self) -> bytes:
        """The file."""
        kind = self.pick(*KINDS)
        outputs = getattr(self, kind)()
        return self.model.build(self.inputs, outputs)

    # operators with a window

    def _window(self, size: Shape, kernel: Shape, stride: Shape, same: bool, dilation: Shape = (1, 1)) -> Shape:
        return tuple(-(-n // s) if same else -(-(n - (k - 1) * d) // s)
                     for n, k, s, d in zip(size, kernel, stride, dilation, strict=True))

    def _sized(self, kernel: Shape, dilation: Shape = (1, 1)) -> tuple[int, int, int, int]:
        """An image that a window fits into."""
        n, h, w, c = self.image()
        big = [max(n, (k - 1) * d + 1 + self.pick(0, 1, 4)) for n, k, d in zip((h, w), kernel, dilation, strict=True)]
        return n, big[0], big[1], c if max(big) < 70 else 1

    def convolution(self, depthwise: bool = False) -> list[int]:
        kernel = self.pick(1, 2, 3, 5, 7), self.pick(1, 2, 3, 5, 7)
        if self.chance(0.1):
            kernel = self.pick((65, 1), (1, 65), (64, 64), (65, 64), (9, 9), (1, 80))
        stride = (self.pick(1, 1, 2, 3, 4, 5),) * 2 if self.chance(0.6) else (self.pick(1, 2, 3, 4), self.pick(1, 2, 4))
        dilation = (self.pick(1, 1, 1, 2, 3), self.pick(1, 1, 1, 2)) if max(kernel) < 9 else (1, 1)
        n, h, w, c = self._sized(kernel, dilation)
        if self.chance(0.06) and not depthwise:
            kernel, dilation, h, w = (17, 17), (1, 1), 17, 17
            c = self.pick(200, 300)  # sums of weights on both sides of the limit
        same = self.chance(0.55)
        groups = self.pick(1, 1, 1, 2, 4) if c % 8 == 0 and not depthwise else 1
        out = c * self.pick(1, 1, 2) if depthwise else groups * self.pick(1, 4, 5)
        shape = (1, *kernel, out) if depthwise else (out, *kernel, c // groups)
        x = self.given(n, h, w, c)
        operands = [x, self.weights(shape, out, 3 if depthwise else 0)[0], *self.bias(out)]
        y = self.result(n, *self._window((h, w), kernel, stride, same, dilation), out)
        options = {"depth_multiplier": out // c} if depthwise else {}
        self.model.op("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", operands, y, stride_h=stride[0],
                      padding="SAME" if same else "VALID", stride_w=stride[1], dilation_h_factor=dilation[0],
                      dilation_w_factor=dilation[1], fused_activation_function=self.fused(), **options)
        return y

    def depthwise(self) -> list[int]:
        return self.convolution(True)

    def transposed(self) -> list[int]:
        n, h, w, c = self.image()
        kernel = (self.pick(1, 2, 3, 4),) * 2 if self.chance(0.6) else (self.pick(1, 3), self.pick(1, 2, 3))
        stride = (self.pick(1, 2, 2, 2, 3),) * 2 if self.chance(0.7) else self.pick((1, 2), (2, 1))
        if stride[0] != stride[1] and self.chance(0.6):
            h, w = (1, w) if stride == (1, 2) else (h, 1)
            kernel = (1, self.pick(1, 2, 3)) if stride == (1, 2) else (self.pick(1, 2, 3), 1)
        same, out = self.chance(0.6), self.pick(1, 8)
        size = [i * s if same else (i - 1) * s + max(k, s) for i, k, s in zip((h, w), kernel, stride, strict=True)]
        if self.chance(0.1):
            size[0] += self.pick(-1, 1) if same and stride[0] > 1 and size[0] > 1 else 1
        weights = self.weights((out, *kernel, c), out, 0)[0]
        x = self.given(n, h, w, c)
        y = self.result(n, *size, out)
        self.model.op("TRANSPOSE_CONV", [self.numbers(n, *size, out), weights, x, *self.bias(out)], y,
                      stride_h=stride[0], stride_w=stride[1], padding="SAME" if same else "VALID")
        return y

    def pool(self) -> list[int]:
        kernel = self.pick(1, 2, 3, 7, 8, 9), self.pick(1, 2, 3, 7, 8, 9)
        same = self.chance(0.5)
        if self.chance(0.2):
            kernel = self.pick((256, 1), (257, 1), (1, 257), (256, 256), (255, 257), (256, 257), (64, 80))
        stride = self.pick(1, 2, 3, 4), self.pick(1, 2, 3, 5)
        n, h, w, c = self._sized(kernel)
        x = self.given(n, h, w, c)
        y = self.result(n, *self._window((h, w), kernel, stride, same), c)
        name = self.pick(*["MAX_POOL_2D"] * 3, *["AVERAGE_POOL_2D"] * 4, "L2_POOL_2D")
        self.model.op(name, [x], y, stride_h=stride[0], padding="SAME" if same else "VALID", stride_w=stride[1],
                      filter_height=kernel[0], filter_width=kernel[1], fused_activation_function=self.fused())
        return y

    def dense(self) -> list[int]:
        n, m = self.pick(4, 64, 500), self.pick(1, 10, 64)
        if self.chance(0.06):
            n, m = self.pick(65536, 65537, 70000), 1
        front = self.pick((1,), (4,), (1, 1), (2, 3), (1, 2, 2))
        keep = len(front) > 1 and self.chance(0.6)
        x = self.given(*front, n)
        operands = [x, self.weights((m, n), m, 0)[0], *self.bias(m)]
        rows = int(np.prod(front))
        y = self.result(*(front if keep else (rows,)), m)
        self.model.op("FULLY_CONNECTED", operands, y, keep_num_dims=keep, fused_activation_function=self.fused())
        return y

    def product(self) -> list[int]:
        batch = self.pick((), (1,), (2,), (1, 1), (1, 3))
        a, b, c = self.pick(1, 4, 9), self.pick(1, 8, 20), self.pick(1, 5, 16)
        across = self.chance(0.3)
        x = self.given(*batch, a, b)
        shape = (*batch, c, b) if across else (*batch, b, c)
        z = self.tensor(shape, data=np.ones(shape, self.dtype), scale=0.1) if self.chance(0.15) else self.given(*shape)
        y = self.result(*batch, a, c)
        self.model.op("BATCH_MATMUL", [x, z], y, adj_y=across)
        return y

    # operators for each element

    def two(self) -> list[int]:
        shape = self.shape()
        other = shape
        if self.chance(0.35):
            other = self.pick((), (1,), tuple(n if self.chance(0.5) else 1 for n in shape), shape[-1:])
        name = self.pick("ADD", "ADD", "SUB", "MUL", "MUL", "MINIMUM", "MAXIMUM", "SQUARED_DIFFERENCE", "DIV",
                         "FLOOR_DIV", "POW", "PRELU")
        kind = self.pick("int8", "int16", "int32", "uint8") if self.dtype in INTEGERS and self.chance(0.07) else ""
        x = self.given(*shape)
        if name == "PRELU":
            other = (1,) * max(len(shape) - 2, 0) + shape[-1:]
        if self.chance(0.3) or name == "PRELU":
            kind = kind or self.dtype
            z = self.tensor(other, kind, np.ones(other, kind), scale=None if kind == "float32" else 0.1)
        else:
            z = self.given(*other, dtype=kind)
        operands = [z, x] if self.chance(0.2) and name not in ("PRELU", "POW") else [x, z]
        y = self.result(*shape)
        takes = name in ("ADD", "SUB", "MUL", "DIV")
        self.model.op(name, operands, y, **({"fused_activation_function": self.fused()} if takes else {}))
        return y

    def function(self) -> list[int]:
        shape = self.shape()
        name = self.pick("LOGISTIC", "TANH", "RELU", "RELU6", "RELU_N1_TO_1", "RELU_0_TO_1", "HARD_SWISH", "LEAKY_RELU",
                         "ABS", "EXP", "ELU", "GELU", "LOG", "RSQRT", "NEG", "SQRT", "SQUARE", "SIN", "CEIL", "ROUND",
                         "FLOOR", "SIGN", "COS", "ZEROS_LIKE")
        x = self.given(*shape)
        known = {"LOGISTIC": (1 / 256, -128), "TANH": (1 / 128, 0)}.get(name)
        rest = {"scale": known[0], "zero": known[1] if self.dtype == "int8" else 0} if known else {}
        y = self.result(*shape, **rest)
        options = {"alpha": self.pick(0.1, 0.0, -0.5, 1.5)} if name == "LEAKY_RELU" else {}
        self.model.op(name, [x], y, **options)
        return y

    def softmax(self) -> list[int]:
        shape = self.pick((1, 5), (2, 40), (1, 300), (3, 4, 5), self.image(), (2, 2, 2, 3, 4))
        if self.chance(0.15):
            shape = self.pick((65535, 2), (65536, 2), (65537, 2), (1, 256, 256, 2), (1, 256, 257, 2), (2, 255, 256, 2))
        x = self.given(*shape)
        name = self.pick(*["SOFTMAX"] * 4, "LOG_SOFTMAX", "L2_NORMALIZATION")
        y = self.result(*shape, scale=1 / 256, zero=-128 if self.dtype == "int8" else 0)
        self.model.op(name, [x], y, **({"beta": self.pick(1.0, 1.0, 1.0, 2.0, -1.0, 0.0)} if name == "SOFTMAX" else {}))
        return y

    def cast(self) -> list[int]:
        shape = self.shape()
        x = self.given(*shape)
        name = self.pick("QUANTIZE", "QUANTIZE", "QUANTIZE", "DEQUANTIZE", "CAST")
        kind = {"QUANTIZE": self.pick("int8", "uint8", "int16", "int32"), "DEQUANTIZE": "float32"}.get(name, "int32")
        y = self.result(*shape, dtype=kind)
        self.model.op(name, [x], y)
        return y

    def compared(self) -> list[int]:
        shape = self.shape()
        x, z = self.given(*shape), self.given(*shape)
        y = self.result(*shape, dtype="bool")
        self.model.op(self.pick("EQUAL", "NOT_EQUAL", "GREATER", "LESS", "GREATER_EQUAL", "LESS_EQUAL"), [x, z], y)
        return y

    # operators along axes

    def reduced(self) -> list[int]:
        shape = self.pick(self.image(), self.image(), self.image(), (4, 6), (2, 5, 6), (1, 2, 3, 4, 5))
        axes = sorted(int(a) for a in self.rng.choice(len(shape), self.pick(1, 1, 2), replace=False))
        if self.chance(0.5) and len(shape) == 4:
            axes = [1, 2]
        if self.chance(0.15):
            shape, axes = self.pick(((1, 4096, 2, 3), [1]), ((1, 4097, 2, 3), [1]), ((1, 2, 4097, 2), [2]),
                                    ((1, 256, 256, 1), [1, 2]), ((1, 256, 257, 1), [1, 2]), ((1, 2, 1, 4097), [3]))
        keep = self.chance(0.7)
        name = self.pick(*["MEAN"] * 5, "SUM", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD")
        x = self.given(*shape)
        left = (1 if i in axes else n for i, n in enumerate(shape)) if keep else (
            n for i, n in enumerate(shape) if i not in axes)
        y = self.result(*left)
        at = [a - len(shape) if self.chance(0.2) else a for a in axes]
        self.model.op(name, [x, self.numbers(*at)], y, keep_dims=keep)
        return y

    def largest(self) -> list[int]:
        shape = self.pick((1, 8), (1, 127), (1, 128), (1, 4, 5, 127), (1, 4, 5, 128), (1, 7, 7, 3), (2, 3, 4), (9,))
        axis = self.pick(len(shape) - 1, len(shape) - 1, -1, 0)
        name, kind = self.pick("ARG_MAX", "ARG_MAX", "ARG_MAX", "ARG_MIN"), self.pick("int32", "int64")
        x = self.given(*shape)
        y = [self.tensor(tuple(n for i, n in enumerate(shape) if i != axis % len(shape)), kind)]
        self.model.op(name, [x, self.numbers(axis, shape=(1,) if self.chance(0.5) else ())], y,
                      output_type=kind.upper())
        return y

    def joined(self) -> list[int]:
        shape = self.pick(self.image(), self.image(), (2, 6), (1, 2, 3, 4, 5), (7,))
        axis = int(self.rng.integers(len(shape)))
        parts = [self.given(*shape) for _ in range(self.pick(1, 2, 2, 3))]
        if self.chance(0.15):
            parts.append(self.tensor(shape, data=np.ones(shape, self.dtype), scale=0.1))
        pack = self.chance(0.3)
        if pack:
            y = self.result(*shape[:axis], len(parts), *shape[axis:])
            self.model.op("PACK", parts, y, axis=axis, values_count=len(parts))
        else:
            y = self.result(*(s * len(parts) if i == axis else s for i, s in enumerate(shape)))
            self.model.op("CONCATENATION", parts, y, axis=axis - len(shape) if self.chance(0.2) else axis,
                          fused_activation_function=self.pick("NONE", "NONE", "NONE", "NONE", "NONE", "RELU"))
        return y

    def taken_apart(self) -> list[int]:
        shape = self.pick((1, 4, 6, 8), (1, 4, 6, 8), (2, 6), (1, 2, 3, 4, 6), (12,), (1, 8, 6))
        axis = self.pick(*(i for i, n in enumerate(shape) if n % 2 == 0))
        name, count = self.pick("SPLIT", "SPLIT", "SPLIT_V", "UNPACK"), 2
        x = self.given(*shape)
        sizes = [shape[axis] // 2] * 2
        if name == "SPLIT_V" and shape[axis] > 2:
            sizes = [1, shape[axis] - 1]
        if name == "UNPACK":
            count = shape[axis]
            y = [self.result(*(n for i, n in enumerate(shape) if i != axis))[0] for _ in range(count)]
            self.model.op("UNPACK", [x], y, num=count, axis=axis)
            return y
        y = [self.result(*(s if i == axis else n for i, n in enumerate(shape)))[0] for s in sizes]
        at = self.numbers(axis - len(shape) if self.chance(0.2) and axis else axis, shape=(), computed=0)
        if name == "SPLIT":
            self.model.op("SPLIT", [at, x], y, num_splits=count)
        else:
            stated = [sizes[0], -1] if self.chance(0.3) else sizes
            self.model.op("SPLIT_V", [x, self.numbers(*stated, computed=0), at], y, num_splits=count)
        return y

    def cut(self) -> list[int]:
        shape = self.pick(self.image(), self.image(), (6, 8), (9,), (2, 5, 6), (1, 2, 4, 4, 5))
        begin = [int(self.rng.integers(0, max(1, s // 2))) for s in shape]
        x = self.given(*shape)
        if self.chance(0.4):
            size = [s - b for s, b in zip(shape, begin, strict=True)]
            y = self.result(*size)
            self.model.op("SLICE", [x, self.numbers(*begin), self.numbers(*(
                -1 if self.chance(0.2) else n for n in size))], y)
            return y
        step = [self.pick(1, 1, 1, 2) if len(shape) > 1 and self.chance(0.3) else 1 for _ in shape]
        end, masks = list(shape), {}
        if len(shape) == 4 and self.chance(0.6):
            step = [1, self.pick(1, 2, 3), self.pick(1, 2), 1]
        back = self.chance(0.08)
        if back:
            step[-1], begin[-1], end[-1], masks = -1, shape[-1] - 1, 0, {"end_mask": 1 << (len(shape) - 1)}
        elif self.chance(0.3):
            begin, masks = [0] * len(shape), {"begin_mask": (1 << len(shape)) - 1}
        left = [-(-(e - b) // t) if t > 0 else n for n, b, e, t in zip(shape, begin, end, step, strict=True)]
        if self.chance(0.15) and len(shape) > 1 and not back:
            end[0], step[0], masks["shrink_axis_mask"] = begin[0] + 1, 1, 1
            left = left[1:]
        y = self.result(*left)
        self.model.op("STRIDED_SLICE", [x, self.numbers(*begin), self.numbers(*end), self.numbers(*step)], y, **masks)
        return y

    # operators that move

    def reshaped(self) -> list[int]:
        n, h, w, c = self.image()
        x = self.given(n, h, w, c)
        name = self.pick("RESHAPE", "RESHAPE", "RESHAPE", "SQUEEZE", "EXPAND_DIMS")
        if name == "RESHAPE":
            to = self.pick((n, h * w, c), (n, h * w * c), (n * h * w * c,), (n, h, w, c, 1), (n, 1, h * w, c))
            y = self.result(*to)
            self.model.op(name, [x, self.numbers(*to)] if self.chance(0.9) else [x], y, new_shape=list(to))
        elif name == "SQUEEZE":
            y = self.result(*(i for i in (n, h, w, c) if i != 1))
            self.model.op(name, [x], y)
        else:
            y = self.result(n, 1, h, w, c)
            self.model.op(name, [x, self.numbers(1, shape=())], y)
        return y

    def turned(self) -> list[int]:
        shape = self.pick(self.image(), self.image(), (5, 6), (2, 5, 6), (7,), (1, 2, 3, 4, 5), (1, 2, 1, 3, 1, 2))
        if self.chance(0.12):
            shape = self.pick((1, 3, 5, 16384), (1, 3, 5, 16385), (1, 2, 65537, 1), (2, 2, 65537))
        perm = [int(i) for i in self.rng.permutation(len(shape))]
        if len(shape) == 4 and self.chance(0.5):
            perm = self.pick([0, 2, 1, 3], [0, 1, 3, 2], [0, 3, 1, 2], [0, 2, 3, 1], [0, 1, 2, 3])
        x = self.given(*shape, dtype="int32" if self.chance(0.15) else "")
        kind = self.model.tensors[x]["type"].lower()
        y = self.result(*(shape[i] for i in perm), dtype=kind)
        self.model.op("TRANSPOSE", [x, self.numbers(*perm)], y)
        return y

    def padded(self) -> list[int]:
        shape = self.pick(self.image(), self.image(), (5, 6), (2, 5, 6), (7,), (1, 2, 3, 4, 5))
        name = self.pick("PAD", "PAD", "PADV2", "MIRROR_PAD")
        most = [1 if name != "MIRROR_PAD" or n > 1 else 0 for n in shape]
        pads = [(self.pick(0, m), self.pick(0, 0, m)) for m in most]
        kind = self.pick("int32", "int32", "int32", "int64")
        x = self.given(*shape)
        operands = [x, self.numbers(*(n for p in pads for n in p), shape=(len(pads), 2), dtype=kind)]
        if name == "PADV2":
            operands.append(self.tensor((1,), data=np.ones(1, self.dtype), scale=0.1))
        y = self.result(*(s + sum(p) for s, p in zip(shape, pads, strict=True)))
        options = {"mode": self.pick("REFLECT", "SYMMETRIC")} if name == "MIRROR_PAD" else {}
        self.model.op(name, operands, y, **options)
        return y

    def resized(self) -> list[int]:
        n, h, w, c = self.image()
        times = [self.pick(1, 2, 2, 3, 4, 8, 16)] * 2
        if self.chance(0.2):
            times[1] = self.pick(1, 2, 4)
        corners = self.chance(0.3)
        size = [max(s * t - (t - 1) * corners, 1) for s, t in zip((h, w), times, strict=True)]
        if self.chance(0.15):
            size[0] += 1
        x = self.given(n, h, w, c)
        y = self.result(n, *size, c)
        half = self.chance(0.35 if not corners else 0.1)
        self.model.op(self.pick("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"), [x, self.numbers(*size)], y,
                      align_corners=corners, half_pixel_centers=half)
        return y

    def moved(self) -> list[int]:
        """Other moves."""
        name = self.pick("TILE", "TILE", "REVERSE_V2", "GATHER", "DEPTH_TO_SPACE", "SPACE_TO_DEPTH", "SHAPE",
                         "BATCH_TO_SPACE_ND", "BROADCAST_TO", "CUMSUM")
        n, h, w, c = shape = (1, 4, 6, 8)
        x = self.given(*shape)
        match name:
            case "TILE":
                times = [self.pick(1, 1, 2, 3) for _ in shape]
                operands, to = [self.numbers(*times)], [s * t for s, t in zip(shape, times, strict=True)]
            case "REVERSE_V2":
                operands, to = [self.numbers(self.pick(1, 2, 3))], list(shape)
            case "GATHER":
                operands, to = [self.numbers(0, 2, 1)], [3, h, w, c]
            case "BATCH_TO_SPACE_ND":
                operands, to = [self.numbers(1, 1), self.numbers(0, 0, 0, 0, shape=(2, 2))], list(shape)
            case "BROADCAST_TO":
                operands, to = [self.numbers(3, h, w, c)], [3, h, w, c]
            case "CUMSUM":
                operands, to = [self.numbers(1, computed=0)], list(shape)
            case _:
                operands = []
                to = {"DEPTH_TO_SPACE": [n, h * 2, w * 2, c // 4], "SPACE_TO_DEPTH": [n, h // 2, w // 2, c * 4]}.get(
                    name, [4])
        y = [self.tensor((4,), "int32")] if name == "SHAPE" else self.result(*to)
        options = {"block_size": 2} if "DEPTH" in name else {}
        self.model.op(name, [x, *operands], y, **options)
        return y


KINDS = ("convolution", "convolution", "depthwise", "depthwise", "transposed", "pool", "pool", "dense", "product",
         "two", "two", "two", "function", "function", "softmax", "cast", "compared", "reduced", "reduced", "largest",
         "joined", "taken_apart", "cut", "reshaped", "turned", "padded", "resized", "moved")
"""Families, by weight."""
