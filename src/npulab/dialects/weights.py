"""Weights and biases of ONNX's layers as TFLite's operators store them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.dialects.conversion import Conversion, NotThereError
from npulab.ir import Quantization

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Weights:
    """Constant weights: the stored numbers, their quantization (None: floats) and the file's element type."""

    array: Array
    quantization: Quantization | None
    dtype: str | None = None

    def constant(self, c: Conversion, array: Array) -> int:
        """A constant of the file with the weights in another order."""
        return c.file.constant(f"{c.file.origin}_weights", array, self.quantization, self.dtype)


SMALL_WEIGHTS = {("CONV_2D", 4): ("int8", "int16"), ("DEPTHWISE_CONV_2D", 4): ("int8",),
                 ("FULLY_CONNECTED", 4): ("int8", "int16"), ("FULLY_CONNECTED", 2): ("int8", "int16")}
"""Operators that take weights of so many bits, beside data of these types. Source: LiteRT 2.3's reference kernels, run:
the same results as of the same codes in int8. Its DEPTHWISE_CONV_2D reads 4-bit weights beside 16-bit data as bytes."""


def integer_weights(c: Conversion, name: str, outputs: int, stored_outputs: int) -> Weights:
    """The weights, input 1, as the operator `name` stores them, scales per tensor or along their axis `outputs`, which
    becomes `stored_outputs`.

    Raises: NotThereError if TFLite's integer kernels do not take them: unsymmetric int8, or 16 bits.
    """
    code = c.coded(1)
    if code is None or code.bits > 8:
        raise NotThereError("such quantized weights")
    many = code.scales.size > 1
    if c.dtype != "uint8" and code.is_symmetric and not (many and code.axis != outputs):
        array = (code.array.astype(np.int16) - code.middle).astype(np.int8)
        q = Quantization(tuple(float(s) for s in code.scales), (0,) * code.scales.size, stored_outputs)
        small = c.dtype in SMALL_WEIGHTS.get((name, code.bits), ())
        if code.bits < 8 and not small:
            c.notes[f"{name} on {c.dtype} takes no weights of {code.bits} bits: int8, with the same codes"] += 1
        return Weights(array, q, f"int{code.bits}" if small else "int8")
    found = c.quantities.stored(code, c.dtype) if c.dtype == "uint8" else None
    if found is None:
        raise NotThereError("such quantized weights")
    return Weights(*found, "uint8")


def integer_bias(c: Conversion, value: int, data: int, weights: Quantization, count: int, factor: float = 1.0) -> int:
    """The bias by the scale of the sums: that of the data times that of the weights. Without a `value`: 0.

    int32, beside data of 16 bits int64 (TFLite).
    """
    q = c.file.specs[data].quantization
    assert q
    dtype, largest = (np.int64, 2**62) if c.file.specs[data].dtype == "int16" else (np.int32, 2**31 - 1)
    scales = tuple(float(np.float32(q.scale) * np.float32(s)) for s in weights.scales)
    code, real = c.quantities.coded.get(value), c.quantities.real(value) if value >= 0 else None
    if value >= 0 and real is None:
        raise NotThereError("a bias that is computed, in integers")
    quantization = Quantization(scales, (0,) * len(scales))
    if code is not None and code.array.dtype == np.int32 and factor == 1 and not code.zeros.any() \
            and np.allclose(code.scales, scales, rtol=1e-6, atol=0):
        array = np.broadcast_to(code.array.reshape(-1), (count,)).astype(dtype)
    else:
        exact = np.zeros(1) if real is None else real.astype(np.float64).reshape(-1) * factor / np.array(scales)
        array = np.broadcast_to(np.clip(np.round(exact), -largest - 1, largest).astype(dtype), (count,))
    return c.file.constant(f"{c.file.origin}_bias", np.ascontiguousarray(array), quantization)


def weights_of(c: Conversion, name: str, outputs: int, stored_outputs: int) -> Weights:
    if c.integer:
        return integer_weights(c, name, outputs, stored_outputs)
    return Weights(c.needed(1, "weights"), None)


def bias_of(c: Conversion, data: int, q: Quantization | None, count: int) -> int:
    if q is not None:
        return integer_bias(c, c.node.inputs[2] if c.has(2) else -1, data, q, count)
    if not c.has(2):
        return c.file.constant("no_bias", np.zeros(count, np.float32))
    bias = c.constant(2)
    return c.input(2) if bias is None else c.file.constant(f"{c.file.origin}_bias", bias)
