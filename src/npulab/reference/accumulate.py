"""Exact integer sums of products, fast: npulab's own kernels in C where they are built, else ONNX Runtime's where that
is installed, else NumPy's float64.

All give the same 32-bit sums, which wrap as a 32-bit register does; sums of 16-bit activations have 64 bits. The
kernels in C read weights where they lie; ONNX Runtime keeps a copy of its own of each layer's.
For ONNX Runtime everything is made uint8 first: int8 codes and their zero points move up by 128, which no sum notices,
and u8 x u8 is the pair that it computes exactly on every CPU (s8 x u8 saturates on those without VNNI).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.reference.types import Array

Sums = Callable[[Array], Array]
Pads = tuple[int, int, int, int]
"""Rows above, columns to the left, rows below, columns to the right."""

kernels: ModuleType | None
"""The sums in C, or None where they are not built. Tests set it to None to see that the others agree."""
try:
    kernels = importlib.import_module("npulab._sums")
except ImportError:
    kernels = None


@cache
def runtime() -> ModuleType | None:
    """ONNX Runtime, or None where it is not installed. It takes 20 MiB: it is imported when it is wanted."""
    try:
        importlib.import_module("onnx")
        return importlib.import_module("onnxruntime")
    except ImportError:
        return None


BEST = 0
"""Of the ways in which the kernels multiply, best first: the first that this processor has."""
EXACT_IN_FLOAT32 = 2**24 // 255**2
"""So many products of two 8-bit numbers (less their zero points) have sums that float32 holds exactly."""
BLOCK = 1 << 22
"""Elements of patches that NumPy unfolds at a time."""
ONE, NONE = (1, 1), (0, 0)


def matrix(weights: Array, zero_w: Array | int, zero_x: int, dtype: np.dtype[Any]) -> Sums:
    """x (M, K) -> sum over k of (x - zero_x) * (weights - zero_w), int32 (M, N); int64 for 16-bit `dtype`.

    Shapes:  weights (N, K) of 8 bits; zero_w a number.    Types:  x is of `dtype`.
    """
    if not _bytes(weights, zero_w, dtype):
        return _multiplied(weights, zero_w, zero_x, dtype)
    if kernels is not None:
        return _in_c(weights, int(zero_w), zero_x, dtype)
    if runtime() is None:
        return _multiplied(weights, zero_w, zero_x, dtype)
    w, zw = _unsigned(weights, int(zero_w))
    shift = _shift(dtype)
    run = _session("MatMulInteger", {}, {
        "w": np.ascontiguousarray(w.T), "zx": _byte(zero_x, shift), "zw": _byte(zw)}, 2)

    def product(x: Array) -> Array:
        return run(_moved(x, shift)) if len(x) else np.zeros((0, len(weights)), np.int32)

    return product


def windows(weights: Array, zero_w: Array | int, zero_x: int, dtype: np.dtype[Any], stride: tuple[int, int],
            dilation: tuple[int, int], pads: Pads, groups: int, last: bool = False) -> Sums:
    """x (N, C, H, W) -> sums over windows, (N, O, Y, X) as `matrix`; outside the image is `zero_x`.

    Shapes:  weights (O, C // groups, kh, kw); with `last`, (O, kh, kw, C // groups).
    """
    whole = _bytes(weights, zero_w, dtype)
    if whole and kernels is not None:
        return _windows_in_c(weights, int(zero_w), zero_x, dtype, stride, dilation, pads, groups, last)
    if last:
        weights = np.ascontiguousarray(weights.transpose(0, 3, 1, 2))
    if not whole or runtime() is None:
        return _unfolded(weights, zero_w, zero_x, dtype, stride, dilation, pads, groups)
    _, per, kh, kw = weights.shape
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


def _bytes(weights: Array, zero_w: Array | int, dtype: np.dtype[Any]) -> bool:
    """Whether the operands are those of the kernels: bytes, weights with one zero point."""
    return dtype.itemsize == weights.dtype.itemsize == 1 and not np.ndim(zero_w) and weights.size > 0


def _in_c(weights: Array, zero_w: int, zero_x: int, dtype: np.dtype[Any]) -> Sums:
    run = kernels
    assert run is not None
    n, k = weights.shape
    ways = (_shift(dtype), zero_x), (_shift(weights.dtype), zero_w)
    columns = weights.T if weights.T.flags.c_contiguous and not weights.flags.c_contiguous else None
    rows = np.ascontiguousarray(weights) if columns is None else weights

    def product(x: Array) -> Array:
        m = len(x)
        x, found = np.ascontiguousarray(x, dtype), np.empty((m, n), np.int32)
        if m and columns is not None:  # as kernels of one pixel over an image of k channels, one pixel a column
            run.windows(columns, x, found, (1, k, 1, n), (m, k, 1, 1), (1, n), ONE, ONE, NONE, ways[1], ways[0], False,
                        BEST)
        elif run.FEW <= m <= n // 4:  # the panel that is written is of the few, not of the many
            turned = np.empty((n, m), np.int32)
            run.product(rows, x, turned, (n, m, k), *reversed(ways), BEST)
            found[...] = turned.T
        elif m:
            run.product(x, rows, found, (m, n, k), *ways, BEST)
        return found

    return product


def _windows_in_c(weights: Array, zero_w: int, zero_x: int, dtype: np.dtype[Any], stride: tuple[int, int],
                  dilation: tuple[int, int], pads: Pads, groups: int, last: bool) -> Sums:
    run = kernels
    assert run is not None
    weights = np.ascontiguousarray(weights)
    o, per, kh, kw = (weights.shape[i] for i in ((0, 3, 1, 2) if last else (0, 1, 2, 3)))

    def sums(x: Array) -> Array:
        n, c, h, w = x.shape
        size = tuple((a + before + behind - (k - 1) * d - 1) // s + 1 for a, before, behind, k, d, s in zip(
            (h, w), pads[:2], pads[2:], (kh, kw), dilation, stride, strict=True))
        if c != per * groups or min(size) < 1:
            raise ValueError(f"windows of {o}x{per}x{kh}x{kw} in {groups} groups do not fit {n}x{c}x{h}x{w}")
        found = np.empty((n, o, *size), np.int32)
        if found.size:
            run.windows(np.ascontiguousarray(x, dtype), weights, found, x.shape, (o, per, kh, kw), size, tuple(stride),
                        tuple(dilation), tuple(pads[:2]), (_shift(dtype), zero_x), (_shift(weights.dtype), zero_w),
                        last, BEST)
        return found

    return sums


def _multiplied(weights: Array, zero_w: Array | int, zero_x: int, dtype: np.dtype[Any]) -> Sums:
    """The same with NumPy, in float64, exact below 2**53."""
    kernel = (weights.astype(np.float64) - np.asarray(zero_w, np.float64).reshape(-1, 1)).T
    final = _final(dtype, weights.dtype)
    return lambda x: final((x.astype(np.float64) - zero_x) @ kernel)


def _unfolded(weights: Array, zero_w: Array | int, zero_x: int, dtype: np.dtype[Any], stride: tuple[int, int],
              dilation: tuple[int, int], pads: Pads, groups: int) -> Sums:
    """The same with NumPy: patches times kernels, in float64."""
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
    ort = runtime()
    assert ort is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # each of a network's many sessions would keep what it once had
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def same_pads(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
              ) -> Pads:
    """TFLite's SAME: outputs are ceil(size / stride), what is odd goes below and to the right."""
    total = [max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
             for n, k, s, d in zip(size, window, stride, dilation, strict=True)]
    return total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2
