"""The nouns of quantization: how tensors are stored in integers, what a chip takes, samples, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
F32 = NDArray[np.float32]
BLOCK = 1 << 18
"""Elements that are rounded at a time: double precision takes eight bytes of each."""
Feeds = Mapping[str, Array]
"""An array for each input of a network, by name."""
Arithmetic = Literal["tflite", "onnx", "multiplier16", "esp32s3", "esp32p4"]
"""Whose rounding: TFLite's reference kernels, ONNX Runtime's QDQ, a multiplier of 16 bits and a shift, ESP-DL's half up
and half even."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How tensors of a kind are stored: real = scale * (stored - zero point).

    bits            2, 4, 8 or 16.
    signed          int8 rather than uint8.
    symmetric       the zero point is 0 (signed) or the middle of the range (unsigned).
    narrow          a signed range without its lowest number, -127..127: what TFLite demands of weights.
    per_channel     one scale for each output channel (weights only).
    power_of_two    every scale is a power of two.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = False
    narrow: bool = False
    per_channel: bool = False
    power_of_two: bool = False

    @property
    def low(self) -> int:
        return (-(1 << (self.bits - 1)) + self.narrow) if self.signed else 0

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric tensor."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def dtype(self) -> str:
        """The element type by its name in files: "int8", "uint4", "int16"."""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def holder(self) -> np.dtype[Any]:
        """The NumPy type that such integers are held in here, one an element."""
        return np.dtype(f"{'i' if self.signed else 'u'}{max(1, self.bits // 8)}")

    def __str__(self) -> str:
        words = [self.dtype, "symmetric" if self.symmetric else "asymmetric",
                 "per channel" if self.per_channel else "per tensor"]
        return " ".join([*words, "power of two"] if self.power_of_two else words)


@dataclass(frozen=True, slots=True, eq=False)
class Params:
    """Scales and zero points of a tensor: one of each, or one a channel along `axis`.

    scales  float32, finite, above 0.    zeros  int32, within the scheme's range.
    """

    scheme: Scheme
    scales: F32
    zeros: NDArray[np.int32]
    axis: int | None = None

    def __post_init__(self) -> None:
        assert self.scales.dtype == np.float32
        assert self.scales.shape == self.zeros.shape == (self.scales.size,)

    def along(self, rank: int) -> tuple[int, ...]:
        """The shape in which scales meet a tensor of this rank."""
        return tuple(-1 if i == self.axis else 1 for i in range(rank)) if self.axis is not None else (1,) * rank

    def codes(self, real: Array) -> Array:
        """The integers that stand for `real`: rounded half to even as QuantizeLinear does, clamped."""
        shape = self.along(real.ndim)
        scales, zeros = self.scales.reshape(shape), self.zeros.reshape(shape)
        codes = np.empty(real.shape, self.scheme.holder)
        each = max(1, len(real) * BLOCK // max(1, real.size)) if real.ndim else 1
        for i in range(0, len(real) if real.ndim else 1, each):
            at = slice(i, i + each) if real.ndim else ...
            own = at if self.axis == 0 else ...
            steps = np.rint(real[at] / scales[own]) + zeros[own]
            codes[at] = np.clip(steps, self.scheme.low, self.scheme.high)
        return codes

    def real(self, codes: Array) -> F32:
        """What integers stand for."""
        shape = self.along(codes.ndim)
        return np.asarray((codes.astype(np.int32) - self.zeros.reshape(shape)).astype(np.float32)
                          * self.scales.reshape(shape), np.float32)

    def seen(self, real: Array) -> F32:
        """`real` as the integers show it: `real(codes(x))`."""
        shown = self.steps(real)
        shown *= self.scales.reshape(self.along(real.ndim))
        return shown

    def steps(self, real: Array) -> F32:
        """How many scales from zero the integers show `real` at: `codes(x) - zeros`, as floats."""
        shape = self.along(real.ndim)
        scales, zeros = self.scales.reshape(shape), self.zeros.reshape(shape).astype(np.float32)
        steps = np.asarray(real / scales)
        np.rint(steps, out=steps)
        np.clip(steps, self.scheme.low - zeros, self.scheme.high - zeros, out=steps)
        return steps.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a chip, or a file format, takes of a quantized network. The first of several is the default.

    name            the target's name.
    title           for people.
    file            the format that its tools read.
    activations     schemes that computed tensors may have (per tensor, always).
    weights         schemes that weights of convolutions and matrix products may have.
    arithmetic      how the chip rounds; None: not published.
    fixed           results whose scale and zero point the format prescribes, by ONNX operator and element type:
                    ("Softmax", "int8") -> (1 / 256, -128).
    float_islands   whether operators may stay in floats beside integer ones (computed by the host, or by the chip).
    depthwise_weights   schemes of depthwise weights where they differ; () where not.
    bias_bits       of the integers that biases are.
    accumulator_bits    sums of products stay below 2 ** (accumulator_bits - 1).
    weight_sum_max  the sum of |weight code - zero point| of an output channel; None: no limit.
    requantize_below    input scale * weight scale / output scale is below this; None: no limit.
    same_scale      ONNX operators whose operands and results must share one scale.
    sources         where each of these is published, by field; a field without one is `assumed`.
    """

    name: str
    title: str
    file: Literal["tflite", "onnx"]
    activations: tuple[Scheme, ...]
    weights: tuple[Scheme, ...]
    arithmetic: Arithmetic | None = None
    fixed: Mapping[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    float_islands: bool = True
    depthwise_weights: tuple[Scheme, ...] = ()
    bias_bits: int = 32
    accumulator_bits: int = 32
    weight_sum_max: int | None = None
    requantize_below: float | None = None
    same_scale: frozenset[str] = frozenset()
    sources: Mapping[str, str] = field(default_factory=dict)


class Samples(Protocol):
    """Inputs of a network, one sample after another; the same each time that one goes through them.

    Each is a mapping from the network's input names to float32 arrays of the inputs' own shapes (batch 1 where
    the network has one). `origin` says where they are from, for people.
    """

    @property
    def origin(self) -> str: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Feeds]: ...


class ListedSamples:
    """Samples that are held in memory."""

    def __init__(self, feeds: Sequence[Feeds], origin: str = "arrays") -> None:
        self.feeds = feeds
        self.origin = origin

    def __len__(self) -> int:
        return len(self.feeds)

    def __iter__(self) -> Iterator[Feeds]:
        return iter(self.feeds)

    def take(self, positions: Sequence[int]) -> ListedSamples:
        return ListedSamples([self.feeds[i] for i in positions], self.origin)
