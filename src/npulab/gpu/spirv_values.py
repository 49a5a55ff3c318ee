"""What shaders compute with: kinds and types of values, and values that write down what is done to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from npulab.gpu.spirv_builder import Shader

Kind = Literal["bool", "uint", "int", "float", "half"]
BYTES = {"uint": 4, "int": 4, "float": 4, "half": 2}


@dataclass(frozen=True, slots=True)
class Type:
    kind: Kind
    lanes: int = 1

    @property
    def size(self) -> int:
        """Bytes."""
        return BYTES[self.kind] * self.lanes


@dataclass(frozen=True, slots=True)
class Value:
    """Something computed: a result id with its type. Numbers beside it are taken as constants of that type."""

    shader: Shader
    id: int
    type: Type

    def __add__(self, other: Value | float) -> Value:
        return self.shader.binary("+", self, other)

    def __sub__(self, other: Value | float) -> Value:
        return self.shader.binary("-", self, other)

    def __mul__(self, other: Value | float) -> Value:
        return self.shader.binary("*", self, other)

    def __truediv__(self, other: Value | float) -> Value:
        return self.shader.binary("/", self, other)

    def __floordiv__(self, other: Value | int) -> Value:
        return self.shader.typed("UDiv", self.type, self, self.shader.like(other, self))

    def __mod__(self, other: Value | int) -> Value:
        return self.shader.typed("UMod", self.type, self, self.shader.like(other, self))

    def __and__(self, other: Value | int) -> Value:
        return self.shader.typed("BitwiseAnd", self.type, self, self.shader.like(other, self))

    def __or__(self, other: Value | int) -> Value:
        return self.shader.typed("BitwiseOr", self.type, self, self.shader.like(other, self))

    def __xor__(self, other: Value | int) -> Value:
        return self.shader.typed("BitwiseXor", self.type, self, self.shader.like(other, self))

    def __lshift__(self, other: Value | int) -> Value:
        return self.shader.typed("ShiftLeftLogical", self.type, self, self.shader.like(other, self))

    def __rshift__(self, other: Value | int) -> Value:
        """Of an int with its sign."""
        opcode = "ShiftRightArithmetic" if self.type.kind == "int" else "ShiftRightLogical"
        return self.shader.typed(opcode, self.type, self, self.shader.like(other, self))

    def __ge__(self, other: Value | int) -> Value:
        return self.shader.compare("SGreaterThanEqual" if self.type.kind == "int" else "UGreaterThanEqual", self, other)

    def __lt__(self, other: Value | int) -> Value:
        return self.shader.compare("SLessThan" if self.type.kind == "int" else "ULessThan", self, other)

    def same(self, other: Value | int) -> Value:
        return self.shader.compare("IEqual", self, other)

    def differs(self, other: Value | int) -> Value:
        return self.shader.compare("INotEqual", self, other)


@dataclass(frozen=True, slots=True)
class Variable:
    """Of one thread."""

    shader: Shader
    id: int
    type: Type

    def get(self) -> Value:
        return self.shader.typed("Load", self.type, self.id)

    def set(self, value: Value) -> None:
        assert value.type == self.type
        self.shader.do("Store", self.id, value.id)
