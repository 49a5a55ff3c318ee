"""Operator records: what a node does and with which attributes, as frozen values that `match` can take apart.

Operators that some target compiles have a record of their own; every other one is `Generic`, named and typed with its
attributes, or `Custom`. Sizes and strides are (height, width). Data is NHWC, kernels O,H,W,I.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Padding = Literal["same", "valid"]
Activation = Literal["none", "relu", "relu_n1_to_1", "relu6", "tanh", "sign_bit"]


@dataclass(frozen=True, slots=True)
class Conv2D:
    """inputs: data N,H,W,C; weights O,H,W,I; bias O (or absent)."""

    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: Padding
    activation: Activation
    name: str = field(default="CONV_2D", init=False)


@dataclass(frozen=True, slots=True)
class DepthwiseConv2D:
    """inputs: data N,H,W,C; weights 1,H,W,C*multiplier; bias (or absent)."""

    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: Padding
    activation: Activation
    multiplier: int
    name: str = field(default="DEPTHWISE_CONV_2D", init=False)


@dataclass(frozen=True, slots=True)
class FullyConnected:
    """inputs: data; weights M,N; bias M (or absent)."""

    activation: Activation
    keep_dims: bool
    name: str = field(default="FULLY_CONNECTED", init=False)


@dataclass(frozen=True, slots=True)
class Pool2D:
    """`kind` average or max over `window` (height, width)."""

    kind: Literal["average", "max"]
    window: tuple[int, int]
    stride: tuple[int, int]
    padding: Padding
    activation: Activation

    @property
    def name(self) -> str:
        return f"{self.kind.upper()}_POOL_2D"


@dataclass(frozen=True, slots=True)
class Add:
    activation: Activation
    name: str = field(default="ADD", init=False)


@dataclass(frozen=True, slots=True)
class Concat:
    axis: int
    activation: Activation
    name: str = field(default="CONCATENATION", init=False)


@dataclass(frozen=True, slots=True)
class Split:
    """inputs: axis constant, data."""

    pieces: int
    name: str = field(default="SPLIT", init=False)


@dataclass(frozen=True, slots=True)
class Pad:
    """inputs: data, paddings [rank, 2], and for `valued` the value to pad with."""

    valued: bool
    mode: Literal["constant", "reflect", "symmetric"]

    @property
    def name(self) -> str:
        return "MIRROR_PAD" if self.mode != "constant" else "PADV2" if self.valued else "PAD"


@dataclass(frozen=True, slots=True)
class Reshape:
    """The new shape is that of the output value. SQUEEZE and EXPAND_DIMS are the same move."""

    name: str = "RESHAPE"


@dataclass(frozen=True, slots=True)
class Mean:
    """inputs: data, axes constant."""

    keep_dims: bool
    name: str = field(default="MEAN", init=False)


@dataclass(frozen=True, slots=True)
class Softmax:
    beta: float
    name: str = field(default="SOFTMAX", init=False)


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A function of one number, for each element; its name is the format's. `alpha`: LEAKY_RELU's slope below zero."""

    name: str
    alpha: float = 0.0


@dataclass(frozen=True, slots=True)
class Generic:
    """Any other builtin operator, by its format's own name, with its attributes. `subgraphs` are those it calls."""

    name: str
    attributes: Mapping[str, object]
    subgraphs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Custom:
    """A custom operator: its code and its options as the file has them."""

    name: str
    options: bytes


@dataclass(frozen=True, slots=True)
class Embedded:
    """An attribute that npulab hands on unread, as the file has it: a body of IF or LOOP, a type, a sparse tensor.

    `captures` are values of the graph around it that a body reads.
    """

    data: bytes
    captures: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OnnxOp:
    """An ONNX operator as its file has it: data is NCHW, kernels O,I,H,W. `domain` "" is ONNX's own.

    Attributes are int, float, str or bytes, tuples of those, NumPy arrays for tensors, and Embedded for the rest.
    """

    name: str
    attributes: Mapping[str, object]
    domain: str = ""


Op = (Conv2D | DepthwiseConv2D | FullyConnected | Pool2D | Add | Concat | Split | Pad | Reshape | Mean | Softmax
      | Elementwise | Generic | Custom | OnnxOp)


def captures(op: Op) -> tuple[int, ...]:
    """Values that the bodies inside an operator read, beside its inputs."""
    if not isinstance(op, OnnxOp):
        return ()
    return tuple(v for a in op.attributes.values() if isinstance(a, Embedded) for v in a.captures)
