"""What a tensor is: element type, shape, quantization, and where its constant bytes lie."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError


class DType(enum.Enum):
    """Element types of TFLite and ONNX. `value` is the name users see."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"
    UINT64 = "uint64"
    UINT32 = "uint32"
    UINT16 = "uint16"
    UINT8 = "uint8"
    UINT4 = "uint4"
    BOOL = "bool"
    STRING = "string"
    COMPLEX64 = "complex64"
    COMPLEX128 = "complex128"
    RESOURCE = "resource"
    VARIANT = "variant"
    UNKNOWN = "unknown"
    """Of a tensor whose type nothing says."""

    @property
    def numpy(self) -> np.dtype[np.generic] | None:
        """The NumPy type of one element, or None where NumPy has none (sub-byte, string, handles)."""
        return _NUMPY.get(self)


_NUMPY: dict[DType, np.dtype[np.generic]] = {
    d: np.dtype(d.value)
    for d in DType
    if d not in (DType.BFLOAT16, DType.INT4, DType.INT2, DType.UINT4, DType.STRING, DType.RESOURCE, DType.VARIANT,
                 DType.UNKNOWN)
}


@dataclass(frozen=True, slots=True)
class Quantization:
    """Affine quantization: real = scale * (stored - zero_point), per tensor or along `axis`.

    Scales are float32, as the files store them; one scale means per tensor.
    """

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int = 0

    @property
    def per_tensor(self) -> bool:
        return len(self.scales) == 1

    @property
    def scale(self) -> float:
        """The scale of a per-tensor quantization (the first one of a per-channel quantization)."""
        return self.scales[0]

    @property
    def zero_point(self) -> int:
        return self.zero_points[0]

    def __str__(self) -> str:
        if self.per_tensor:
            return f"scale {self.scale:.6g} zero point {self.zero_point}"
        return f"{len(self.scales)} scales along axis {self.axis}"


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor of the graph. `constant` is a view of the file's own bytes, never a copy where the file allows.

    `dynamic_axes` have no fixed size; `shape` has 1 there. Without `has_shape` not even the rank is known.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: DType
    quantization: Quantization | None = None
    constant: memoryview | None = None
    is_variable: bool = False
    dynamic_axes: tuple[int, ...] = ()
    has_shape: bool = True

    @property
    def elements(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def is_constant(self) -> bool:
        return self.constant is not None

    def array(self) -> NDArray[np.generic]:
        """The constant as a read-only array over the file's bytes, shaped.

        Raises: ModelError if the tensor is not constant, has no NumPy type, or its buffer has the wrong length.
        """
        if self.constant is None:
            raise ModelError(f"tensor '{self.name}' is computed, not constant")
        dtype = self.dtype.numpy
        if dtype is None:
            raise ModelError(f"tensor '{self.name}' of type {self.dtype.value} has no array form here")
        if len(self.constant) != self.elements * dtype.itemsize:
            raise ModelError(
                f"tensor '{self.name}' has a buffer of the wrong length",
                want=f"{self.elements * dtype.itemsize} bytes for {self.dtype.value}{list(self.shape)}",
                got=f"{len(self.constant)} bytes",
            )
        return np.frombuffer(self.constant, dtype).reshape(self.shape)

    def integers(self) -> NDArray[np.generic]:
        """The constant one number an element, also where a byte holds several: INT4 and INT2 as int8, UINT4 as uint8.
        The first one lies in the low bits (TFLite, ONNX). Others as `array` has them.

        Raises: ModelError if the tensor is not constant, has no such form, or its buffer has the wrong length.
        """
        bits = {DType.INT4: 4, DType.UINT4: 4, DType.INT2: 2}.get(self.dtype)
        if bits is None or self.constant is None:
            return self.array()
        each = 8 // bits
        if len(self.constant) != -(-self.elements // each):
            raise ModelError(
                f"tensor '{self.name}' has a buffer of the wrong length",
                want=f"{-(-self.elements // each)} bytes for {self.dtype.value}{list(self.shape)}",
                got=f"{len(self.constant)} bytes",
            )
        packed = np.frombuffer(self.constant, np.uint8)[:, None]
        codes = (packed >> (np.arange(each, dtype=np.uint8) * np.uint8(bits))) & np.uint8((1 << bits) - 1)
        flat = codes.reshape(-1)[: self.elements]
        if self.dtype is not DType.UINT4:
            sign = np.int8(1 << (bits - 1))
            return ((flat.astype(np.int8) ^ sign) - sign).reshape(self.shape)
        return flat.reshape(self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype.value}{list(self.shape)}"


def packed(codes: NDArray[np.generic], bits: int) -> bytes:
    """Integers of 4 or 2 bits as files hold them, several a byte: the inverse of `Value.integers`."""
    each = 8 // bits
    low = (codes.reshape(-1).astype(np.int16) & ((1 << bits) - 1)).astype(np.uint8)
    rows = np.pad(low, (0, -low.size % each)).reshape(-1, each) << (np.arange(each, dtype=np.uint8) * np.uint8(bits))
    return bytes(np.bitwise_or.reduce(rows, axis=1).astype(np.uint8))
