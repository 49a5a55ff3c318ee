"""Four numbers at a time, in shaders: how they lie in memory, and what is computed on them.

    float32  four floats.    float16  two words of two halves each; float32 is computed.    int8  a word of four bytes;
    int32 is computed.

Halves and bytes are taken apart by instructions that every Vulkan device has: no capability is asked for. Rounding to
halves is the driver's: to either neighbour (Vulkan 1.3, appendix "Precision and Operation of SPIR-V Instructions").
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError
from npulab.gpu.compute.types import Number
from npulab.gpu.spirv_builder import Kind, Shader, Type, Value

FOUR, WHOLE = Type("float", 4), Type("int", 4)
STORED: dict[Number, Type] = {"float32": FOUR, "float16": Type("uint", 2), "int8": Type("uint")}
"""What four numbers are in a buffer."""
ONE: dict[Number, Type] = {"float32": Type("float"), "float16": Type("uint"), "int8": Type("uint")}
"""What a buffer is of, to be read number by number: `single`."""
DTYPES: dict[Number, Any] = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


def fours(count: int) -> int:
    return -(-count // 4)


def padded(array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """The last axis padded with zeros to a multiple of four."""
    axes = [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % 4)]
    return np.ascontiguousarray(np.pad(array, axes), dtype)


def computed(number: Number) -> Kind:
    """What sums are of."""
    return "int" if number == "int8" else "float"


def counted(*elements: int) -> None:
    """Raises: UnsupportedError where 32 bits do not count as many elements, or there are none."""
    for count in elements:
        if not 1 <= count < 1 << 31:
            raise UnsupportedError("shaders count in 32 bits", got=f"{count} elements", want="1 to 2147483647")


def floats(number: Number, what: str, halves: bool = False) -> None:
    """Raises: UnsupportedError for int8, and to compute on halves what is not stored as halves."""
    if number == "int8":
        raise UnsupportedError(f"the shader of {what} computes on floats", got=number, want="float32 or float16")
    if halves and number != "float16":
        raise UnsupportedError("only what is stored as halves is computed as halves", got=number, want="float16")


def load(s: Shader, number: Number, buffer: int, index: Value) -> Value:
    """Four floats or ints; `index` counts fours."""
    found = s.load(buffer, index)
    if number == "float16":
        low, high = (s.unpacked(s.lane(found, i)) for i in range(2))
        return s.vector(*(s.lane(half, i) for half in (low, high) for i in range(2)))
    if number == "int8":
        words = s.bits(s.spread(found, 4), "int")
        return (words << s.vector(*(s.constant(n, "int") for n in (24, 16, 8, 0)))) >> 24
    return found


def single(s: Shader, number: Number, buffer: int, index: Value) -> Value:
    """A float or an int; `index` counts numbers, the buffer is of `ONE`."""
    if number == "float16":
        return s.lane(s.unpacked(s.load(buffer, index >> 1) >> ((index & 1) << 4)), 0)
    if number == "int8":
        return s.bits(s.load(buffer, index >> 2) << (s.constant(24) - ((index & 3) << 3)), "int") >> 24
    return s.load(buffer, index)


def store(s: Shader, number: Number, buffer: int, index: Value, value: Value) -> None:
    """Four floats, or ints of -128..127."""
    if number == "float16":
        value = s.vector(*(s.packed(s.vector(s.lane(value, i), s.lane(value, i + 1))) for i in (0, 2)))
    elif number == "int8":
        placed = (s.bits(value, "uint") & 255) << s.vector(*(s.constant(n) for n in (0, 8, 16, 24)))
        low, high = (s.lane(placed, i) | s.lane(placed, i + 1) for i in (0, 2))
        value = low | high
    s.store(buffer, index, value)


def kept(s: Shader, value: Value, column: Value, columns: int) -> Value:
    """0 in lanes of the `column`-th four that are beyond `columns`: what is in padding."""
    if columns % 4 == 0:
        return value
    return s.select(inside(s, column, columns), value, s.constant(0, value.type.kind, 4))


def inside(s: Shader, column: Value, columns: int) -> Value:
    """Lane by lane."""
    return s.spread(column * 4, 4) + s.vector(*(s.constant(i) for i in range(4))) < columns


def multiply_add(s: Shader, a: Value, b: Value, c: Value) -> Value:
    """a b + c; of ints the low 32 bits."""
    return a * b + c if a.type.kind == "int" else s.fma(a, b, c)
