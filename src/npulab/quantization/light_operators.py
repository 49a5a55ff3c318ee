"""What ONNX operators mean, for networks that run without ONNX Runtime (light.py): floats in single precision.

Each builder takes a node and what is known of its inputs before a sample is, and gives what computes it, and the
element types of the results. What it does not take is Foreign, and left to ONNX Runtime.

Source: https://onnx.ai/onnx/operators; integers as QuantizeLinear and DequantizeLinear have them there.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from npulab.quantization.types import Array

if TYPE_CHECKING:
    import onnx

loops: ModuleType | None
"""The compiled loops; None where npulab was built without a C compiler: ONNX Runtime runs everything then."""
try:
    loops = importlib.import_module("npulab._floats")
except ImportError:
    loops = None

F32 = np.dtype(np.float32)
I64 = np.dtype(np.int64)
CODES = [np.dtype(t) for t in ("int8", "uint8", "int16", "uint16", "int32")]
"""Integers that stand for numbers, in the order of _floats.dequantize."""
OPEN = -math.inf, math.inf
Dtype = np.dtype[Any]


class Foreign(Exception):  # noqa: N818 - no error: it is said by which road a network goes
    """Not in the list."""


class Place(Protocol):
    """Where results go (light.Room)."""

    def new(self, shape: Sequence[int], dtype: Any = ...) -> Array: ...

    def over(self, shape: Sequence[int], dtype: Any = ...) -> Array: ...


Given = Sequence[Any]
"""The inputs of a node: arrays, None for what is left out."""
Made = Callable[[Given, Place], Sequence[Array]]


@dataclass(eq=False)
class Node:
    """An operator. `clamp`: of what follows it, when that is computed with it."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    clamp: tuple[float, float] = OPEN

    @classmethod
    def of(cls, node: onnx.NodeProto) -> Node:
        from onnx.helper import get_attribute_value

        if node.domain not in ("", "ai.onnx"):
            raise Foreign
        return cls(node.op_type, list(node.input), list(node.output),
                   {a.name: get_attribute_value(a) for a in node.attribute})


@dataclass(eq=False)
class Known:
    """What is known of a node before a sample is: element types of inputs, None for those left out, and constants,
    None for others."""

    node: Node
    dtypes: list[Dtype | None]
    constants: list[Array | None]
    opset: int

    def attributes(self, **defaults: Any) -> tuple[Any, ...]:
        """Those of the node by their names. Others than these are Foreign."""
        if self.node.attributes.keys() - defaults.keys():
            raise Foreign
        return tuple(self.node.attributes.get(name, default) for name, default in defaults.items())

    def take(self, *dtypes: Dtype, at: Sequence[int] | None = None) -> Dtype:
        """Inputs, of those places that are there, are all of the first one's type, and that is one of these."""
        found = [t for i, t in enumerate(self.dtypes) if t is not None and (at is None or i in at)]
        if not found or any(t != found[0] for t in found) or (dtypes and found[0] not in dtypes):
            raise Foreign
        return found[0]

    def constant(self, i: int) -> Array | None:
        """A constant input; None if it is left out."""
        if i >= len(self.constants) or self.dtypes[i] is None:
            return None
        found = self.constants[i]
        if found is None:
            raise Foreign
        return found

    def integers(self, i: int) -> list[int] | None:
        found = self.constant(i)
        return None if found is None else [int(x) for x in found.reshape(-1)]

    def axes(self, i: int, since: int) -> list[int] | None:
        """An attribute before the opset `since`, then an input."""
        if self.opset < since:
            found = self.node.attributes.get("axes")
            return None if found is None else list(found)
        if "axes" in self.node.attributes:
            raise Foreign
        return self.integers(i)


Built = tuple[Made, list[Dtype]]


def one(make: Callable[[Given, Place], Array], dtype: Dtype = F32) -> Built:
    return lambda given, room: (make(given, room),), [dtype]


def clip(x: Array, low: float, high: float) -> Array:
    """In place. NaN stays."""
    if low != -math.inf:
        np.maximum(x, np.float32(low), out=x)
    if high != math.inf:
        np.minimum(x, np.float32(high), out=x)
    return x


# convolutions and products


def conv(k: Known) -> Built:
    auto, dilations, group, kernel, pads, strides = k.attributes(auto_pad=b"NOTSET", dilations=None, group=1,
                                                                 kernel_shape=None, pads=None, strides=None)
    k.take(F32)
    if auto not in (b"NOTSET", b"VALID") or (auto == b"VALID" and pads):
        raise Foreign
    w = k.constant(1)
    if w is None or w.ndim not in (3, 4) or (kernel and tuple(kernel) != w.shape[2:]):
        raise Foreign
    rank = w.ndim - 2
    steps, spread = (list(v or [1] * rank) for v in (strides, dilations))
    edges = list(pads or [0] * (2 * rank))
    if min(edges) < 0 or min(steps) < 1 or min(spread) < 1:
        raise Foreign
    low, high = k.node.clamp
    kernel = w.shape[2:]

    def make(given: Given, room: Place) -> Array:
        x, w, bias = (*given, None)[:3]
        ends = tuple((n + edges[i] + edges[i + rank] - spread[i] * (kernel[i] - 1) - 1) // steps[i] + 1
                     for i, n in enumerate(x.shape[2:]))
        y = room.new((x.shape[0], w.shape[0], *ends))
        plane = [1, 1][rank:]
        assert loops is not None
        loops.conv(x, w, bias, y, (*x.shape[:2], *plane, *x.shape[2:], w.shape[0], *plane, *kernel, *plane, *ends,
                                   *plane, *steps, *plane, *spread, *[0, 0][rank:], *edges[:rank], group), low, high)
        return y
    return one(make)


def times(a: Array, b: Array, bias: Array | None, turned: bool, clamp: tuple[float, float], out: Array) -> None:
    """The product of two matrices, the second maybe lying on its side."""
    assert loops is not None
    loops.matmul(a, b, bias, out, a.shape[0], a.shape[1], b.shape[0 if turned else 1], turned, *clamp)


def gemm(k: Known) -> Built:
    alpha, beta, over, turned = k.attributes(alpha=1.0, beta=1.0, transA=0, transB=0)
    k.take(F32)
    if alpha != 1 or beta != 1:
        raise Foreign

    def make(given: Given, room: Place) -> Array:
        a, b, c = (*given, None)[:3]
        a = np.ascontiguousarray(a.T) if over else a
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1 if turned else 0]:
            raise ValueError(f"Gemm of {a.shape} and {b.shape}")
        y = room.new((a.shape[0], b.shape[0 if turned else 1]))
        row = c is None or (c.size == y.shape[1] and c.shape[-1:] == y.shape[1:])
        times(a, b, c if row else None, bool(turned), k.node.clamp if row else OPEN, y)
        if not row:
            y += c
            clip(y, *k.node.clamp)
        return y
    return one(make)


def matmul(k: Known) -> Built:
    k.attributes()
    k.take(F32)

    def make(given: Given, room: Place) -> Array:
        first, second = given
        a = first[None] if first.ndim == 1 else first
        b = second[:, None] if second.ndim == 1 else second
        if a.shape[-1] != b.shape[-2]:
            raise ValueError(f"MatMul of {first.shape} and {second.shape}")
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        y = room.new((*lead, a.shape[-2], b.shape[-1]))
        if b.ndim == 2:
            times(a.reshape(-1, a.shape[-1]), b, None, False, k.node.clamp, y)
        else:
            each, other = (np.broadcast_to(m, (*lead, *m.shape[-2:])) for m in (a, b))
            for at in np.ndindex(*lead):
                times(each[at], other[at], None, False, k.node.clamp, y[at])
        ends = (*(() if first.ndim == 1 else a.shape[-2:-1]), *(() if second.ndim == 1 else b.shape[-1:]))
        return y.reshape(*lead, *ends)
    return one(make)


# element by element


def binary(function: Any, *dtypes: Dtype) -> Callable[[Known], Built]:
    def build(k: Known) -> Built:
        k.attributes()
        dtype = k.take(*dtypes)

        def make(given: Given, room: Place) -> Array:
            a, b = given
            shape = np.broadcast_shapes(a.shape, b.shape)
            return np.asarray(function(a, b, out=room.over(shape, dtype)))
        return one(make, dtype)
    return build


def unary(function: Callable[..., object], **defaults: Any) -> Callable[[Known], Built]:
    """`function(x, out, attributes...)`; out may be x."""
    def build(k: Known) -> Built:
        values = k.attributes(**defaults)
        k.take(F32)

        def make(given: Given, room: Place) -> Array:
            (x,) = given
            y = room.over(x.shape)
            function(x, y, *values)
            return y
        return one(make)
    return build


def sigmoid(x: Array, out: Array) -> None:
    np.negative(x, out=out)
    np.exp(out, out=out)
    out += 1
    np.reciprocal(out, out=out)


def hard_sigmoid(x: Array, out: Array, alpha: float, beta: float) -> None:
    np.multiply(x, np.float32(alpha), out=out)
    out += np.float32(beta)
    clip(out, 0, 1)


def hard_swish(x: Array, out: Array) -> None:
    share = x * np.float32(1 / 6)
    share += np.float32(0.5)
    np.multiply(x, clip(share, 0, 1), out=out)


def leaky(x: Array, out: Array, alpha: float) -> None:
    np.multiply(x, np.float32(alpha), out=out, where=x < 0)
    if out is not x:
        np.copyto(out, x, where=~(x < 0))


def bounds(k: Known) -> tuple[float, float]:
    """Of Clip and Relu."""
    if k.node.op == "Relu":
        k.attributes()
        return 0.0, math.inf
    if k.opset < 11:
        low, high = k.attributes(min=-math.inf, max=math.inf)
        return float(low), float(high)
    k.attributes()
    found = [k.constant(i) for i in (1, 2)]
    if any(v is not None and v.size != 1 for v in found):
        raise Foreign
    low, high = (default if v is None else float(v.reshape(())) for v, default in zip(found, OPEN, strict=True))
    if math.isnan(low) or math.isnan(high) or low > high:
        raise Foreign
    return low, high


def clamp(k: Known) -> Built:
    low, high = bounds(k)
    k.take(F32)

    def make(given: Given, room: Place) -> Array:
        x = given[0]
        y = room.over(x.shape)
        if y is not x:
            np.copyto(y, x)
        return clip(y, low, high)
    return one(make)


def softmax(k: Known) -> Built:
    (axis,) = k.attributes(axis=-1 if k.opset >= 13 else 1)
    k.take(F32)

    def make(given: Given, room: Place) -> Array:
        (x,) = given
        y = room.over(x.shape)
        rows = y if k.opset >= 13 else y.reshape(math.prod(x.shape[: axis if axis >= 0 else x.ndim + axis]), -1)
        along = axis if k.opset >= 13 else 1
        np.subtract(x.reshape(rows.shape), x.reshape(rows.shape).max(axis=along, keepdims=True), out=rows)
        np.exp(rows, out=rows)
        rows /= rows.sum(axis=along, keepdims=True)
        return y
    return one(make)


# reductions and pools


def reduction(function: Callable[..., Any], since: int) -> Callable[[Known], Built]:
    def build(k: Known) -> Built:
        k.attributes(axes=None, keepdims=1, noop_with_empty_axes=0)
        axes = k.axes(1, since)
        if k.node.attributes.get("noop_with_empty_axes") and not axes:
            raise Foreign
        k.take(F32, at=[0])
        kept = bool(k.node.attributes.get("keepdims", 1))

        def make(given: Given, room: Place) -> Array:
            return np.asarray(function(given[0], axis=tuple(axes) if axes else None, keepdims=kept), np.float32)
        return one(make)
    return build


def extremes(k: Known) -> Built:
    """Of light.joined: all of ReduceMin, ReduceMax and ReduceSum of a whole tensor that are wanted."""
    k.take(F32, at=[0])
    (kept,) = k.attributes(keepdims=1)

    def make(given: Given, room: Place) -> Sequence[Array]:
        (x,) = given
        assert loops is not None
        found = loops.extremes(x)
        if math.isnan(found[2]) and np.isnan(x).any():
            found = (math.nan,) * 3
        return [np.full((1,) * x.ndim if kept else (), v, np.float32) for v in found]
    return make, [F32] * 3


def global_average(k: Known) -> Built:
    k.attributes()
    k.take(F32)
    return one(lambda given, room: np.asarray(
        given[0].reshape(*given[0].shape[:2], -1).mean(axis=2).reshape(*given[0].shape[:2],
                                                                       *[1] * (given[0].ndim - 2)), np.float32))


def pool(k: Known) -> Built:
    largest = k.node.op == "MaxPool"
    kernel, strides, pads, dilations, auto, ceil, order, counted = k.attributes(
        kernel_shape=None, strides=None, pads=None, dilations=None, auto_pad=b"NOTSET", ceil_mode=0, storage_order=0,
        count_include_pad=0)
    k.take(F32)
    if not kernel or ceil or order or auto != b"NOTSET" or len(k.node.outputs) != 1:
        raise Foreign
    rank = len(kernel)
    steps, spread = (list(v or [1] * rank) for v in (strides, dilations))
    edges = list(pads or [0] * (2 * rank))
    if min(edges) < 0:
        raise Foreign

    def windows(x: Array) -> Iterator[Array]:
        """What each tap of the kernel reads, for all outputs."""
        ends = [(n - d * (size - 1) - 1) // s + 1
                for n, d, size, s in zip(x.shape[2:], spread, kernel, steps, strict=True)]
        for tap in product(*map(range, kernel)):
            at = [slice(t * d, t * d + (n - 1) * s + 1, s)
                  for t, d, n, s in zip(tap, spread, ends, steps, strict=True)]
            yield x[slice(None), slice(None), *at]

    def padded(x: Array, value: float) -> Array:
        if not any(edges):
            return x
        inner = [slice(a, a + n) for a, n in zip(edges[:rank], x.shape[2:], strict=True)]
        wide = [n + a + b for n, a, b in zip(x.shape[2:], edges[:rank], edges[rank:], strict=True)]
        y = np.full((*x.shape[:2], *wide), value, np.float32)
        y[slice(None), slice(None), *inner] = x
        return y

    def make(given: Given, room: Place) -> Array:
        (x,) = given
        y: Array | None = None
        for part in windows(padded(x, -math.inf if largest else 0.0)):
            if y is None:
                y = room.new(part.shape)
                np.copyto(y, part)
            else:
                (np.maximum if largest else np.add)(y, part, out=y)
        assert y is not None
        if not largest and (counted or not any(edges)):
            y /= np.float32(math.prod(kernel))
        elif not largest:
            y /= sum(windows(padded(np.ones((1, 1, *x.shape[2:]), np.float32), 0.0)))
        return y
    return one(make)


# moves


def reshape(k: Known) -> Built:
    (zeros,) = k.attributes(allowzero=0)
    wanted = k.integers(1)
    if wanted is None:
        raise Foreign
    return one(lambda given, room: given[0].reshape(
        [given[0].shape[i] if n == 0 and not zeros else n for i, n in enumerate(wanted)]), k.take(at=[0]))


def flatten(k: Known) -> Built:
    (axis,) = k.attributes(axis=1)

    def make(given: Given, room: Place) -> Array:
        (x,) = given
        return np.asarray(x.reshape(math.prod(x.shape[: axis if axis >= 0 else x.ndim + axis]), -1))
    return one(make, k.take())


def settled(view: Array, room: Place) -> Array:
    """What a view shows, in one piece."""
    y = room.new(view.shape, view.dtype)
    np.copyto(y, view)
    return y


def transpose(k: Known) -> Built:
    (order,) = k.attributes(perm=None)
    return one(lambda given, room: settled(given[0].transpose(order), room), k.take())


def squeeze(k: Known) -> Built:
    k.attributes(axes=None)
    axes = k.axes(1, 13)
    return one(lambda given, room: np.asarray(given[0].squeeze(tuple(axes) if axes is not None else None)),
               k.take(at=[0]))


def unsqueeze(k: Known) -> Built:
    k.attributes(axes=None)
    axes = k.axes(1, 13)
    if axes is None:
        raise Foreign
    return one(lambda given, room: np.expand_dims(given[0], tuple(axes)), k.take(at=[0]))


def concat(k: Known) -> Built:
    (axis,) = k.attributes(axis=None)
    dtype = k.take()

    def make(given: Given, room: Place) -> Array:
        shape = list(given[0].shape)
        shape[axis] = sum(x.shape[axis] for x in given)
        return np.concatenate(given, axis, out=room.new(shape, dtype))
    return one(make, dtype)


def pad(k: Known) -> Built:
    mode, pads, value = k.attributes(mode=b"constant", pads=None, value=0.0)
    dtype = k.take(F32, at=[0])
    if k.opset >= 11:
        pads, fill = k.integers(1), k.constant(2)
        value = 0.0 if fill is None else float(fill.reshape(()))
        if pads is None or k.constant(3) is not None:
            raise Foreign
    if mode != b"constant" or min(pads) < 0:
        raise Foreign

    def make(given: Given, room: Place) -> Array:
        x = given[0]
        rank = x.ndim
        y = room.new([n + pads[i] + pads[i + rank] for i, n in enumerate(x.shape)])
        y.fill(value)
        y[tuple(slice(pads[i], pads[i] + n) for i, n in enumerate(x.shape))] = x
        return y
    return one(make, dtype)


def gather(k: Known) -> Built:
    (axis,) = k.attributes(axis=0)
    indices = k.constant(1)
    if indices is None or indices.dtype.kind != "i":
        raise Foreign
    return one(lambda given, room: np.asarray(np.take(given[0], given[1], axis)), k.take(at=[0]))


def cut(k: Known) -> Built:
    k.attributes(starts=None, ends=None, axes=None)
    if k.opset < 10:
        starts, ends, axes = (k.node.attributes.get(name) for name in ("starts", "ends", "axes"))
        steps = None
    else:
        starts, ends, axes, steps = (k.integers(i) for i in range(1, 5))
    if starts is None or ends is None:
        raise Foreign
    axes = list(range(len(starts))) if axes is None else axes
    steps = steps or [1] * len(starts)

    def make(given: Given, room: Place) -> Array:
        at = [slice(None)] * given[0].ndim
        for a, start, end, step in zip(axes, starts, ends, steps, strict=True):
            at[a] = slice(start, end, step)
        return settled(given[0][tuple(at)], room)
    return one(make, k.take(at=[0]))


def split(k: Known) -> Built:
    axis, sizes, _ = k.attributes(axis=0, split=None, num_outputs=None)
    dtype, count = k.take(at=[0]), len(k.node.outputs)
    sizes = k.integers(1) if k.opset >= 13 else sizes

    def make(given: Given, room: Place) -> Sequence[Array]:
        x = given[0]
        each = sizes
        if each is None:
            most = -(-x.shape[axis] // count)
            each = [most] * (count - 1) + [x.shape[axis] - most * (count - 1)]
        if sum(each) != x.shape[axis]:
            raise ValueError(f"Split of {x.shape[axis]} into {each}")
        return [settled(part, room) for part in np.split(x, np.cumsum(each)[:-1], axis)]
    return make, [dtype] * count


def identity(k: Known) -> Built:
    return one(lambda given, room: given[0], k.take())


def constant(k: Known) -> Built:
    from onnx import numpy_helper

    (value,) = k.attributes(value=None)
    if value is None:
        raise Foreign
    array = numpy_helper.to_array(value)
    if array.dtype not in (F32, I64, np.dtype(bool), *CODES):
        raise Foreign
    return one(lambda given, room: array, array.dtype)


def constant_of_shape(k: Known) -> Built:
    from onnx import numpy_helper

    (value,) = k.attributes(value=None)
    fill = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    if fill.dtype not in (F32, I64):
        raise Foreign
    return one(lambda given, room: np.full([int(n) for n in given[0]], fill.reshape(()), fill.dtype), fill.dtype)


def cast(k: Known) -> Built:
    """Whole numbers, and what changes nothing; fractions are left to ONNX Runtime."""
    (to,) = k.attributes(to=0)
    dtypes: dict[int, Dtype] = {1: F32, 6: np.dtype(np.int32), 7: I64}
    dtype = dtypes.get(to)
    if dtype is None or (k.take() == F32 and dtype != F32):
        raise Foreign
    return one(lambda given, room: given[0].astype(dtype), dtype)


# integers


def limits(dtype: Dtype) -> tuple[int, int]:
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def scales(k: Known) -> tuple[Array, Array]:
    """Of QuantizeLinear and DequantizeLinear: scales and zero points, all there before a sample is."""
    _, size, _, kind = k.attributes(axis=1, block_size=0, saturate=1, output_dtype=0)
    scale, zero = k.constant(1), k.constant(2)
    if size or kind or scale is None or scale.dtype != F32 or scale.ndim > 1:
        raise Foreign
    if zero is None:
        zero = np.zeros(scale.shape, k.dtypes[0] if k.node.op == "DequantizeLinear" else np.uint8)
    if zero.shape != scale.shape or zero.dtype not in CODES or (zero.dtype == np.int32) != (
            k.node.op == "DequantizeLinear" and k.dtypes[0] == np.int32):
        raise Foreign
    return scale, zero


def along(values: Array, rank: int, axis: int) -> Array:
    """Numbers, one a channel, as they meet a tensor."""
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def quantize(k: Known) -> Built:
    scale, zero = scales(k)
    k.take(F32, at=[0])
    axis = k.node.attributes.get("axis", 1)
    low, high = limits(zero.dtype)

    def make(given: Given, room: Place) -> Array:
        x = given[0]
        y = room.new(x.shape, zero.dtype)
        assert loops is not None
        if scale.size == 1:
            loops.quantize(x, y, y.itemsize, float(scale.reshape(())), int(zero.reshape(())), low, high)
            return y
        zeros = along(zero, x.ndim, axis).astype(np.int32)
        steps = np.rint(x / along(scale, x.ndim, axis)) + zeros
        np.copyto(y, np.nan_to_num(np.clip(steps, low, high), nan=low), casting="unsafe")
        return y
    return one(make, zero.dtype)


def dequantize(k: Known) -> Built:
    scale, zero = scales(k)
    kind = CODES.index(k.take(*CODES, at=[0]))
    if zero.dtype != k.dtypes[0]:
        raise Foreign
    axis = k.node.attributes.get("axis", 1)

    def make(given: Given, room: Place) -> Array:
        x = given[0]
        y = room.new(x.shape)
        assert loops is not None
        if scale.size == 1:
            loops.dequantize(x, y, kind, float(scale.reshape(())), int(zero.reshape(())))
        elif x.ndim > 1 and axis % x.ndim == 0:
            for codes, out, s, z in zip(x, y, scale, zero, strict=True):
                loops.dequantize(codes, out, kind, float(s), int(z))
        else:
            np.subtract(x, along(zero, x.ndim, axis), out=y, dtype=np.int32, casting="unsafe")
            y *= along(scale, x.ndim, axis)
        return y
    return one(make)


def shown(k: Known) -> Built:
    """Of light.joined: QuantizeLinear and DequantizeLinear one behind the other, of one scale."""
    scale, zero = scales(k)
    k.take(F32, at=[0])
    if scale.size != 1:
        raise Foreign
    step, point = float(scale.reshape(())), int(zero.reshape(()))
    low, high = (v - point for v in limits(zero.dtype))

    def make(given: Given, room: Place) -> Array:
        x = given[0]
        y = room.over(x.shape)
        assert loops is not None
        loops.shown(x, y, step, low, high)
        return y
    return one(make)


OPERATORS: dict[str, Callable[[Known], Built]] = {
    "Conv": conv, "Gemm": gemm, "MatMul": matmul,
    "Add": binary(np.add, F32, I64), "Sub": binary(np.subtract, F32, I64), "Mul": binary(np.multiply, F32, I64),
    "Div": binary(np.divide, F32),
    "Relu": clamp, "Clip": clamp, "Sigmoid": unary(sigmoid), "LeakyRelu": unary(leaky, alpha=0.01),
    "HardSigmoid": unary(hard_sigmoid, alpha=0.2, beta=0.5), "HardSwish": unary(hard_swish),
    "Tanh": unary(partial(np.tanh)), "Softmax": softmax,
    "GlobalAveragePool": global_average, "AveragePool": pool, "MaxPool": pool,
    "ReduceMean": reduction(np.mean, 18), "ReduceSum": reduction(np.sum, 13), "ReduceMin": reduction(np.min, 18),
    "ReduceMax": reduction(np.max, 18), "Extremes": extremes,
    "Reshape": reshape, "Flatten": flatten, "Transpose": transpose, "Squeeze": squeeze, "Unsqueeze": unsqueeze,
    "Concat": concat, "Pad": pad, "Gather": gather, "Slice": cut, "Split": split, "Identity": identity,
    "Constant": constant, "ConstantOfShape": constant_of_shape, "Cast": cast,
     "QuantizeLinear": quantize, "DequantizeLinear": dequantize, "Shown": shown,
}
