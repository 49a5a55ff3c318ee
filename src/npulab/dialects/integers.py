"""What operators of ONNX that TFLite has no word for become in integers, and kernels with scales of their own."""

from __future__ import annotations

from typing import Any

import numpy as np

from npulab.dialects.conversion import FINER, Conversion, NotThereError
from npulab.dialects.tflite_file import Spec
from npulab.ir import Quantization

PLAIN: dict[str, Any] = {"fused_activation_function": "NONE"}
CHANNELS_MAX = 1 << 20
"""Of a convolution that stands for a function of one number."""


def fixed_result(c: Conversion, name: str, data: int, scale: float, zero: int, **options: Any) -> int:
    own = Quantization((scale,), (zero - 128 if c.dtype == "int8" else zero,))
    if c.dtype == "int16":
        own = Quantization((1 / 32768,), (0,))
    if c.quantized and own.scale > FINER * c.quantized.scale:
        raise NotThereError("results in much finer steps than the kernel's")
    out = c.step(name, [data], None, c.dtype, own, **options)
    return c.requantized(out, c.quantized) if c.quantized else out


def clamped(c: Conversion, tensor: int, low: float, high: float) -> int:
    """A tensor of integers with its real numbers kept within limits, which are rounded as they are."""
    spec = c.file.specs[tensor]
    assert spec.quantization
    for code, edge, name in zip(codes_of(spec, low, high), edges(spec), ("MAXIMUM", "MINIMUM"), strict=True):
        if code != edge:
            tensor = c.step(name, [tensor, c.file.constant("limit", np.array(code, spec.dtype), spec.quantization)])
    return tensor


def codes_of(spec: Spec, low: float, high: float) -> tuple[int, int]:
    """The codes of two limits, within those that there are."""
    assert spec.quantization
    first, last = edges(spec)
    found = [np.clip(np.rint(np.float32(x) / np.float32(spec.quantization.scale)) + spec.quantization.zero_point, first,
                     last) for x in (low, high)]
    return int(found[0]), int(found[1])


def edges(spec: Spec) -> tuple[int, int]:
    return int(np.iinfo(spec.dtype).min), int(np.iinfo(spec.dtype).max)


def affine(c: Conversion, data: int, factor: float, addend: float, q: Quantization) -> int:
    """factor * x + addend in integers by `q`, rounded once: a depthwise convolution with 1x1 kernels of one number."""
    shape = c.file.specs[data].shape
    at = shape if len(shape) == 4 else (1, 1, int(np.prod(shape)), 1)
    channels = at[-1]
    x = c.reshape(data, at)
    own = c.file.specs[x].quantization
    if own is None or not np.isfinite(factor) or factor == 0 or (factor < 0 and c.dtype == "uint8") \
            or channels > CHANNELS_MAX:
        raise NotThereError("such a function in integers")
    scale = float(np.float32(abs(factor)))
    kernel = c.file.constant("factor", np.full((1, 1, 1, channels), np.sign(factor)).astype(
        "uint8" if c.dtype == "uint8" else "int8"), Quantization((scale,), (0,), 3))
    steps = np.float64(addend) / (np.float64(own.scale) * scale)
    dtype, most = (np.int64, 2**62) if c.dtype == "int16" else (np.int32, 2**31 - 1)
    bias = c.file.constant("addend", np.full(channels, np.clip(np.rint(steps), -most, most)).astype(dtype),
                           Quantization((float(np.float32(own.scale * scale)),), (0,)))
    made = c.step("DEPTHWISE_CONV_2D", [x, kernel, bias], at, c.dtype, q, padding="VALID", stride_h=1, stride_w=1,
                  depth_multiplier=1, dilation_h_factor=1, dilation_w_factor=1, **PLAIN)
    return c.reshape(made, shape)
