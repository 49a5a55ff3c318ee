"""Ranges that training with quantization found: FAKE_QUANT of TFLite as scales and zero points, constants as integers.

Source: TensorFlow's FakeQuantWithMinMaxVars: the scale is the range over the steps, and the zero point is brought to
the nearest step, so that 0 has a code of its own and the range moves a little ("nudged").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.dialects.conversion import NotThereError
from npulab.ir import DType, Graph, Node, Quantization, Value
from npulab.ir.ops import Generic
from npulab.ir.types import packed


@dataclass(frozen=True, slots=True)
class Nudged:
    """The range of a FAKE_QUANT as signed integers: codes from `low` to `high` of element type `dtype`."""

    quantization: Quantization
    low: int
    high: int
    dtype: DType

    @property
    def holder(self) -> DType:
        """The type of computed codes: of less than 8 bits there are none."""
        return DType.INT8 if self.dtype in (DType.INT4, DType.INT2) else self.dtype

    @property
    def fills(self) -> bool:
        """Whether the codes are all that the computed type has."""
        info = np.iinfo(self.holder.value)
        return bool((self.low, self.high) == (info.min, info.max))

    @property
    def limits(self) -> tuple[float, float]:
        q = self.quantization
        return q.scale * (self.low - q.zero_point), q.scale * (self.high - q.zero_point)

    def codes(self, real: NDArray[Any]) -> NDArray[Any]:
        """Constants as integers; halves are rounded up, as training did."""
        q = self.quantization
        steps = np.floor(real.astype(np.float64) / q.scale + 0.5) + q.zero_point
        return np.asarray(np.clip(steps, self.low, self.high), np.int16 if self.dtype is DType.INT16 else np.int8)


def nudged(low: float, high: float, bits: int, narrow: bool) -> Nudged:
    """The integers that a FAKE_QUANT from `low` to `high` rounds to; int8 from 5 bits on, int16 from 9.

    Raises: NotThereError for an empty range, or of other than 2 to 16 bits.
    """
    if not (2 <= bits <= 16 and low < high and math.isfinite(high - low)):
        raise NotThereError(f"a range from {low:g} to {high:g} of {bits} bits")
    first, last = int(narrow), (1 << bits) - 1
    scale = np.float32((np.float32(high) - np.float32(low)) / np.float32(last - first))
    if not scale > 0:
        raise NotThereError(f"a range from {low:g} to {high:g}")
    from_min = first - np.float32(low) / scale
    zero = first if from_min < first else last if from_min > last else math.floor(from_min + np.float32(0.5))
    dtype = DType.INT16 if bits > 8 else DType.INT8 if bits > 4 else DType.INT4 if bits > 2 else DType.INT2
    middle = 1 << (bits - 1)
    return Nudged(Quantization((float(scale),), (int(zero) - middle,)), first - middle, last - middle, dtype)


def folded(graph: Graph) -> Graph:
    """The graph with constants behind FAKE_QUANT or DEQUANTIZE as the quantized constants that they are."""
    values, nodes = list(graph.values), []
    for n in graph.nodes:
        made = _constant(n, values) if n.op.name in ("FAKE_QUANT", "DEQUANTIZE") else None
        if made is None or n.outputs[0] in graph.outputs:
            nodes.append(n)
        else:
            values[n.outputs[0]] = made
    return replace(graph, values=tuple(values), nodes=tuple(nodes)) if len(nodes) < len(graph.nodes) else graph


def _constant(n: Node, values: list[Value]) -> Value | None:
    source, out = values[n.inputs[0]], values[n.outputs[0]]
    if not source.is_constant or source.shape != out.shape:
        return None
    if n.op.name == "DEQUANTIZE":
        small = source.dtype in (DType.INT8, DType.UINT8, DType.INT4, DType.INT2) and source.quantization is not None
        return replace(source, index=out.index, name=out.name) if small else None
    if source.dtype is not DType.FLOAT32 or not isinstance(n.op, Generic):
        return None
    own: Any = n.op.attributes
    try:
        p = nudged(own["min"], own["max"], own["num_bits"] or 8, bool(own["narrow_range"]))
    except (NotThereError, KeyError):
        return None  # the translation says what is wrong
    codes = p.codes(source.array())
    bits = {DType.INT4: 4, DType.INT2: 2}.get(p.dtype)
    data = packed(codes, bits) if bits else codes.tobytes()
    return replace(out, dtype=p.dtype, quantization=p.quantization, constant=memoryview(data))
