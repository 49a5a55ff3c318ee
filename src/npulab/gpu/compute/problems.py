"""What a layer is to compute, whatever the kernels that do it: shapes, constants' shapes, what is fused to it.

Roles of buffers: "input" (and "input1", ... in the order of the fields' description), "output".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from npulab.errors import InvariantError
from npulab.gpu.compute.types import Activation, Number


def _checked(kind: str, what: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(what, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if min(numbers) < least:
            raise InvariantError(f"there is no such {kind}", got=f"{name} {', '.join(map(str, numbers))}",
                                 want=f"at least {least}")


@dataclass(frozen=True, slots=True)
class Convolution:
    """input: [batch, height, width, channels]; weights OHWI: [filters, *kernel, channels // groups]; bias: [filters].

    pads       top, left, bottom, right.    groups  == channels: depthwise.
    residual   "input1", of the output's shape, is added before the activation.
    slope      of the activation "leaky".
    """

    batch: int
    height: int
    width: int
    channels: int
    filters: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    residual: bool = False
    activation: Activation = "none"
    slope: float = 0.01
    number: Number = "float32"

    def __post_init__(self) -> None:
        """Raises: InvariantError for sizes below 1, and pads below 0."""
        _checked("convolution", self, 1, "batch", "height", "width", "channels", "filters", "kernel", "strides",
                 "dilations", "groups")
        _checked("convolution", self, 0, "pads")

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        top, left, bottom, right = self.pads
        extents = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        return ((self.height + top + bottom - extents[0]) // self.strides[0] + 1,
                (self.width + left + right - extents[1]) // self.strides[1] + 1)

    @property
    def operations(self) -> float:
        """Two for each multiply-add, padding's included."""
        return 2.0 * self.batch * math.prod(self.out) * self.filters * math.prod(self.kernel) * (
            self.channels // self.groups)


@dataclass(frozen=True, slots=True)
class Product:
    """input A: [batch, rows, inner]; B: [inner, columns] constant or "input1", of all the batch or with `batched`
    [batch, inner, columns]; output [batch, rows, columns] = activation(A B * scale + bias + residual).

    transposed   B is [columns, inner].    bias: [columns], constant.    residual: last input, of the output's shape.
    """

    batch: int
    rows: int
    inner: int
    columns: int
    transposed: bool = False
    batched: bool = False
    scale: float = 1.0
    residual: bool = False
    activation: Activation = "none"
    slope: float = 0.01
    number: Number = "float32"

    def __post_init__(self) -> None:
        """Raises: InvariantError for sizes below 1."""
        _checked("product", self, 1, "batch", "rows", "inner", "columns")

    @property
    def operations(self) -> float:
        return 2.0 * self.batch * self.rows * self.inner * self.columns


@dataclass(frozen=True, slots=True)
class Softmax:
    """Along the last axis of input [rows, columns]; `scale` multiplies it first."""

    rows: int
    columns: int
    scale: float = 1.0
    number: Number = "float32"


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Along the last axis of input [rows, columns], constants gamma and beta [columns] or none of them."""

    rows: int
    columns: int
    epsilon: float = 1e-5
    number: Number = "float32"


@dataclass(frozen=True, slots=True)
class Attention:
    """softmax(Q K^T * scale) V. Q: [batch, queries, depth] "input"; K: [batch, keys, depth] "input1"; V: [batch, keys,
    width] "input2"; output [batch, queries, width]. Heads are counted in the batch."""

    batch: int
    queries: int
    keys: int
    depth: int
    width: int
    scale: float
    causal: bool = False
    number: Number = "float32"

    @property
    def operations(self) -> float:
        return 2.0 * self.batch * self.queries * self.keys * (self.depth + self.width)
