"""How tensors are stored, as the functions here take it, and constants of fewer than 8 bits unpacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError, UnsupportedError
from npulab.ir import DType, Value

Array = NDArray[Any]
Numbers = Array | np.number[Any] | float
"""Factors: one, or one a channel."""
Step = Callable[[Sequence[Array]], list[Array]]
"""A node made ready: its computed inputs, in order (constants left out), to its outputs."""


@dataclass(frozen=True, slots=True)
class Stored:
    """real = scale * (code - zero), for codes of an integer type. `scale` is a float32 number."""

    scale: float
    zero: int
    dtype: np.dtype[Any]

    @property
    def low(self) -> int:
        return int(np.iinfo(self.dtype).min)

    @property
    def high(self) -> int:
        return int(np.iinfo(self.dtype).max)

    def same(self, other: Stored) -> bool:
        return self.scale == other.scale and self.zero == other.zero


def stored(value: Value) -> Stored:
    """How a tensor that is quantized as a whole is stored.

    Raises: UnsupportedError if it is not.
    """
    q, dtype = value.quantization, holder(value.dtype)
    if q is None or not q.per_tensor or dtype is None or dtype.kind not in "iu":
        raise UnsupportedError(f"tensor '{value.name}' has no integer arithmetic",
                               want="integers with one scale and one zero point", got=f"{value.dtype.value}, {q}")
    return Stored(q.scale, q.zero_point, dtype)


def holder(dtype: DType) -> np.dtype[Any] | None:
    """The NumPy type whose elements hold such numbers, one each."""
    return np.dtype(np.int8) if dtype in (DType.INT4, DType.INT2) else dtype.numpy


def codes(value: Value) -> Array:
    """A constant's elements, one an element also where the file packs several into a byte.

    Packed elements begin in the low bits of a byte (TFLite's INT4 and INT2, ONNX's the same).

    Raises: ModelError if the buffer has the wrong length, or the tensor is not constant.
    """
    bits = {DType.INT4: 4, DType.UINT4: 4, DType.INT2: 2}.get(value.dtype)
    if bits is None or value.constant is None:
        return value.array()
    each = 8 // bits
    if len(value.constant) != -(-value.elements // each):
        raise ModelError(f"tensor '{value.name}' has a buffer of the wrong length", got=f"{len(value.constant)} bytes",
                         want=f"{-(-value.elements // each)} bytes for {value.dtype.value}{list(value.shape)}")
    packed = np.frombuffer(value.constant, np.uint8)
    flat = np.stack([packed >> np.uint8(bits * i) for i in range(each)], axis=1).reshape(-1)[: value.elements]
    flat = flat & np.uint8((1 << bits) - 1)
    if value.dtype is not DType.UINT4:  # the sign bit of so many bits
        sign = 1 << (bits - 1)
        return ((flat.astype(np.int8) ^ sign) - sign).astype(np.int8).reshape(value.shape)
    return flat.reshape(value.shape)
