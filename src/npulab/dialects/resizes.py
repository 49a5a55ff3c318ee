"""Resize of ONNX as TFLite's two operators, where the positions that they read agree."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.dialects import layouts
from npulab.dialects.conversion import Conversion, NotThereError
from npulab.dialects.tflite_file import Spec

Array = NDArray[Any]


def resize(c: Conversion) -> None:
    """Nearest neighbours by index, or linear; along other axes than rows and columns nothing may change."""
    shape, out = c.shape(0), c.out.shape
    if len(shape) != 4 or shape[:2] != out[:2]:
        raise NotThereError("changes of anything but rows and columns")
    mode = c.attribute("mode", "nearest")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode not in ("nearest", "linear") or c.attribute("antialias", 0):
        raise NotThereError(f"mode {mode}{', antialiased' if c.attribute('antialias', 0) else ''}")
    data = c.input(0, layouts.channels_last(4))
    wanted = [_positions(c, axis) for axis in (2, 3)]
    name = "RESIZE_NEAREST_NEIGHBOR" if mode == "nearest" else "RESIZE_BILINEAR"
    for align, half in ((False, False), (False, True), (True, False)):
        if all(_agree(mode, w, tflite_positions(shape[a], out[a], align, half, mode), shape[a])
               for a, w in zip((2, 3), wanted, strict=True)):
            size = c.file.numbers(*out[2:])
            c.emit(name, [data, size], layouts.channels_last(4), None, data, version=3, align_corners=align,
                   half_pixel_centers=half)
            return
    if mode != "nearest":
        raise NotThereError(f"these coordinates ({c.attribute('coordinate_transformation_mode', 'half_pixel')})")
    spec = c.file.specs[data]
    for axis, where in zip((1, 2), wanted, strict=True):
        index = c.file.constant("rows", where.astype(np.int32))
        new = [len(where) if i == axis else n for i, n in enumerate(c.file.specs[data].shape)]
        data = c.file.make("GATHER", [data, index], Spec(tuple(new), spec.dtype, spec.quantization), axis=axis)
    c.put(data, layouts.channels_last(4))


def _scale(c: Conversion, axis: int) -> float:
    """Output over input, as the node says it: `scales` need not be the quotient of the sizes."""
    i = 1 if c.op.name == "Upsample" or c.opset < 11 else 2
    found = c.constant(i)
    if found is None and isinstance(c.attribute("scales"), tuple):
        found = np.array(c.attribute("scales"))
    if found is not None and found.size == len(c.shape(0)):
        return float(found[axis])
    return c.out.shape[axis] / c.shape(0)[axis]


def _positions(c: Conversion, axis: int) -> Array:
    """Where along `axis` of the input each element of the output lies. Source: ONNX's Resize."""
    size, out = c.shape(0)[axis], c.out.shape[axis]
    scale, x = _scale(c, axis), np.arange(out, dtype=np.float64)
    kind = "asymmetric" if c.op.name == "Upsample" or c.opset < 11 else \
        c.attribute("coordinate_transformation_mode", "half_pixel")
    match kind:
        case "half_pixel":
            at = (x + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            at = (x + 0.5) / scale - 0.5 if out > 1 else x * 0
        case "asymmetric":
            at = x / scale
        case "align_corners":
            at = x * ((size - 1) / (out - 1)) if out > 1 else x * 0
        case "half_pixel_symmetric":
            at = size / 2 * (1 - out / (scale * size)) + (x + 0.5) / scale - 0.5
        case _:
            raise NotThereError(f"coordinates {kind}")
    at = np.round(at, 9)
    if c.attribute("mode", "nearest") != "nearest":
        return np.clip(at, 0, size - 1)
    rounding = c.attribute("nearest_mode", "round_prefer_floor")
    if c.op.name == "Upsample" or c.opset < 11:
        rounding = "floor"
    found = {"round_prefer_floor": np.ceil(at - 0.5), "round_prefer_ceil": np.floor(at + 0.5), "floor": np.floor(at),
             "ceil": np.ceil(at)}[rounding]
    return np.clip(found, 0, size - 1)


def tflite_positions(size: int, out: int, align: bool, half: bool, mode: str) -> Array:
    """The same of TFLite's operators. Source: TensorFlow Lite's reference kernels."""
    x = np.arange(out, dtype=np.float64)
    scale = (size - 1) / (out - 1) if align and out > 1 else size / out
    if mode == "nearest":
        at = (x + (0.5 if half else 0)) * scale
        rounded = np.floor(np.round(at, 9) + 0.5) if align else np.floor(np.round(at, 9))
        return np.clip(rounded, 0, size - 1)
    at = (x + 0.5) * scale - 0.5 if half else x * scale
    return np.clip(at, 0, size - 1)


def _agree(mode: str, a: Array, b: Array, size: int) -> bool:
    return bool((a == b).all()) if mode == "nearest" else bool(np.abs(a - b).max(initial=0) < 1e-6 * max(size, 1))
