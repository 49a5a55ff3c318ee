"""Exact integer sums of products, fast: ONNX Runtime's integer kernels where installed, else NumPy's float64.

Both give the same 32-bit sums, which wrap as a 32-bit register does; sums of 16-bit activations have 64 bits.
Everything is made uint8 first: int8 codes and their zero points move up by 128, which no sum notices, and u8 x u8 is
the pair that ONNX Runtime computes exactly on every CPU (s8 x u8 saturates on those without VNNI).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.reference.types import Array

Sums = Callable[[Array], Array]
Pads = tuple[int, int, int, int]
"""Rows above, columns to the left, rows below, columns to the right."""

runtime: ModuleType | None
"""ONNX Runtime, or None where it is not installed. Tests set it to None to see that NumPy agrees."""
try:
    runtime = importlib.import_module("onnxruntime")
    importlib.import_module("onnx")
except ImportError:
    runtime = None

EXACT_IN_FLOAT32 = 2**24 // 255**2
"""So many products of two 8-bit numbers (less their zero points) have sums that float32 holds exactly."""
BLOCK = 1 << 22
"""Elements of patches that NumPy unfolds at a time."""


def matrix(weights: Array, zero_w: Array | int, zero_x: int, dtype: np.dtype[Any]) -> Sums:
    """x (M, K) -> sum over k of (x - zero_x) * (weights - zero_w), int32 (M, N); int64 for 16-bit `dtype`.

    Shapes:  weights (N, K) of 8 bits; zero_w a number.    Types:  x is of `dtype`.
    """
    if runtime is None or dtype.itemsize > 1 or weights.dtype.itemsize > 1 or np.ndim(zero_w) or not weights.size:
        kernel = (weights.astype(np.float64) - np.asarray(zero_w, np.float64).reshape(-1, 1)).T
        final = _final(dtype, weights.dtype)

        def plain(x: Array) -> Array:
            return final((x.astype(np.float64) - zero_x) @ kernel)

        return plain
    w, zw = _unsigned(weights, int(zero_w))
    shift = _shift(dtype)
    run = _session("MatMulInteger", {}, {
        "w": np.ascontiguousarray(w.T), "zx": _byte(zero_x, shift), "zw": _byte(zw)}, 2)

    def product(x: Array) -> Array:
        return run(_moved(x, shift)) if len(x) else np.zeros((0, len(weights)), np.int32)

    return product


def windows(weights: Array, zero_w: Array | int, zero_x: int, dtype: np.dtype[Any], stride: tuple[int, int],
            dilation: tuple[int, int], pads: Pads, groups: int) -> Sums:
    """x (N, C, H, W) -> sums over windows, (N, O, Y, X) as `matrix`; outside the image is `zero_x`.

    Shapes:  weights (O, C // groups, kh, kw).
    """
    _, per, kh, kw = weights.shape
    if runtime is None or dtype.itemsize > 1 or weights.dtype.itemsize > 1 or np.ndim(zero_w):
        return _unfolded(weights, zero_w, zero_x, dtype, stride, dilation, pads, groups)
    attributes = {"strides": stride, "dilations": dilation, "pads": pads, "group": groups, "kernel_shape": (kh, kw)}
    shift = _shift(dtype)
    if groups > 1 and per * kh * kw <= EXACT_IN_FLOAT32:  # whose float kernel is much the faster
        kernel = weights.astype(np.float32) - np.float32(zero_w)
        centre = np.asarray(zero_x + (128 if shift else 0), np.float32)
        run = _session("Conv", attributes, {"w": kernel, "zx": centre}, 4)
    else:
        w, zw = _unsigned(weights, int(zero_w))
        run = _session("ConvInteger", attributes,
                       {"w": w, "zx": _byte(zero_x, shift), "zw": _byte(zw)}, 4)
    return lambda x: run(_moved(x, shift))


def _unfolded(weights: Array, zero_w: Array | int, zero_x: int, dtype: np.dtype[Any], stride: tuple[int, int],
              dilation: tuple[int, int], pads: Pads, groups: int) -> Sums:
    """The same with NumPy: patches times kernels in float64, exact below 2**53."""
    o, per, kh, kw = weights.shape
    kernel = (weights.astype(np.float64) - np.asarray(zero_w, np.float64).reshape(-1, 1, 1, 1)).reshape(
        groups, o // groups, per * kh * kw)
    reach = ((kh - 1) * dilation[0] + 1, (kw - 1) * dilation[1] + 1)
    final = _final(dtype, weights.dtype)

    def sums(x: Array) -> Array:
        n, c, h, w = x.shape
        top, left, bottom, right = pads
        held = np.zeros((n, c, h + top + bottom, w + left + right))
        held[:, :, top : top + h, left : left + w] = x.astype(np.float64) - zero_x
        views = np.lib.stride_tricks.sliding_window_view(held, reach, axis=(2, 3))
        views = views[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
        rows, columns = views.shape[2:4]
        found = np.empty((n, o, rows, columns), np.int64 if dtype.itemsize > 1 else np.int32)
        some = max(1, BLOCK // max(1, columns * c * kh * kw))
        for i in range(n):
            for y in range(0, rows, some):
                part = views[i, :, y : y + some].reshape(groups, per, -1, columns, kh, kw)
                patches = part.transpose(0, 1, 4, 5, 2, 3).reshape(groups, per * kh * kw, -1)
                found[i, :, y : y + some] = final(kernel @ patches).reshape(o, -1, columns)
        return found

    return sums


def _final(x: np.dtype[Any], w: np.dtype[Any]) -> Callable[[NDArray[np.float64]], Array]:
    """float64 sums as whole numbers: of 64 bits where a factor has more than 8, else the low 32 bits."""
    if x.itemsize > 1 or w.itemsize > 1:
        return lambda sums: sums.astype(np.int64)
    return lambda sums: sums.astype(np.int64).astype(np.int32)


def _shift(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "i"


def _byte(zero: int, shift: bool = False) -> Array:
    return np.asarray(zero + (128 if shift else 0), np.uint8)


def _moved(x: Array, shift: bool) -> Array:
    """int8 codes as uint8: 128 more."""
    x = np.ascontiguousarray(x)
    return x.view(np.uint8) ^ np.uint8(0x80) if shift else x


def _unsigned(weights: Array, zero: int) -> tuple[Array, int]:
    signed = weights.dtype.kind == "i"
    return _moved(weights, signed), zero + (128 if signed else 0)


def _session(op: str, attributes: Mapping[str, Any], constants: Mapping[str, Array], rank: int) -> Sums:
    """One operator as an ONNX Runtime session on uint8 `x` of `rank` dimensions, its result int32."""
    from onnx import TensorProto, helper, numpy_helper

    assert runtime is not None
    if op == "Conv":
        nodes = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
                 helper.make_node("Sub", ["f", "zx"], ["d"]),
                 helper.make_node("Conv", ["d", "w"], ["s"], **attributes),
                 helper.make_node("Cast", ["s"], ["y"], to=TensorProto.INT32)]
    else:
        nodes = [helper.make_node(op, ["x", "w", "zx", "zw"], ["y"], **attributes)]
    graph = helper.make_graph(
        nodes, op, [helper.make_tensor_value_info("x", TensorProto.UINT8, [f"d{i}" for i in range(rank)])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = open_session(model.SerializeToString())
    return lambda x: np.asarray(session.run(None, {"x": x})[0])


def open_session(model: bytes, optimized: bool = True) -> Any:
    """A session of one thread on the CPU, silent."""
    assert runtime is not None
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # each of a network's many sessions would keep what it once had
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def same_pads(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
              ) -> Pads:
    """TFLite's SAME: outputs are ceil(size / stride), what is odd goes below and to the right."""
    total = [max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
             for n, k, s, d in zip(size, window, stride, dilation, strict=True)]
    return total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2
