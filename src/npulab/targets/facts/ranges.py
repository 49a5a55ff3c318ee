"""Between which numbers a tensor's elements lie, as far as the operators before it say.

Interval arithmetic from what bounds its own output: a sigmoid lies in 0..1 whatever it reads. That tells boxes in
pixels from scores, which no names are needed for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from npulab.errors import ModelError
from npulab.ir import Graph, Node, Value
from npulab.targets.facts.properties import Properties

Interval = tuple[float, float]
ALL: Interval = (-math.inf, math.inf)
DEPTH = 48
"""Operators before a tensor that are looked at, one behind the other."""
ELEMENTS = 1 << 20
"""Of constants that are read."""
MOVES = frozenset({
    "Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Gather", "Dropout",
    "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin",
    "ReduceMean", "GlobalAveragePool", "QuantizeLinear", "DequantizeLinear", "Cast", "tflite:UNPACK", "tflite:PACK",
})
"""Operators whose outputs lie where their first input lies."""


class Ranges:
    """Intervals of a graph's values. `names`: the canonical name of each node."""

    def __init__(self, graph: Graph, names: Mapping[int, str], properties: Mapping[int, Properties]) -> None:
        self.graph = graph
        self.names = names
        self.properties = properties
        self._kept: dict[int, Interval] = {}

    def of(self, v: int, depth: int = DEPTH) -> Interval:
        """The interval of value `v`; infinite ends where nothing bounds it."""
        if v not in self._kept:
            self._kept[v] = self._find(v, depth) if depth else ALL
        return self._kept[v]

    def _find(self, v: int, depth: int) -> Interval:
        value = self.graph.values[v]
        if value.is_constant:
            return _extent(value)
        n = self.graph.producer.get(v)
        if n is None or not n.inputs or n.inputs[0] < 0:
            return ALL
        name = self.names[n.index]

        def inputs() -> list[Interval]:
            return [self.of(i, depth - 1) for i in n.inputs if i >= 0]

        if name in ("Sigmoid", "Softmax", "HardSigmoid"):
            return 0.0, 1.0
        if name in MOVES:
            data = self.properties[n.index].data
            return self.of(data.index, depth - 1) if data is not None else ALL
        if name == "Conv":
            return self._convolved(n, depth)
        return _arithmetic(name, inputs, self.properties[n.index])

    def _convolved(self, n: Node, depth: int) -> Interval:
        """Of constant weights without groups over bounded data; zeros of the padding are inside the bounds too."""
        p = self.properties[n.index]
        w = p.weights
        if w is None or not w.is_constant or w.elements > ELEMENTS or w.dtype.value not in ("float32", "float64"):
            return ALL
        low, high = self.of(n.inputs[0], depth - 1)
        if not (math.isfinite(low) and math.isfinite(high)):
            return ALL
        low, high = min(low, 0.0), max(high, 0.0)
        kernels = np.asarray(w.array(), np.float64).reshape(w.shape[0], -1)
        up, down = np.maximum(kernels, 0).sum(1), np.minimum(kernels, 0).sum(1)
        bias = _extent(p.bias) if p.bias is not None else (0.0, 0.0)
        return float((up * low + down * high).min()) + bias[0], float((up * high + down * low).max()) + bias[1]


def _extent(value: Value) -> Interval:
    """The smallest and largest element of a constant; of quantized ones, in real numbers."""
    if value.elements > ELEMENTS or not value.elements or value.dtype.numpy is None:
        return ALL
    try:
        a = value.array()
        low, high = float(np.min(a)), float(np.max(a))
    except (ModelError, TypeError, ValueError):
        return ALL
    q = value.quantization
    if q is not None:
        if not q.per_tensor:
            return ALL
        low, high = (q.scale * (x - q.zero_point) for x in (low, high))
    return (low, high) if math.isfinite(low) and math.isfinite(high) else ALL


def _arithmetic(name: str, inputs: Callable[[], Iterable[Interval]], p: Properties) -> Interval:
    if name in ("Tanh", "Sin", "Cos", "Erf"):
        return -1.0, 1.0
    if name == "Clip":
        low, high = p.get("attr_min"), p.get("attr_max")
        return (float(low) if isinstance(low, int | float) else -math.inf,
                float(high) if isinstance(high, int | float) else math.inf)
    found = list(inputs())
    if not found:
        return ALL
    a, b = found[0], found[-1]
    if name in ("Relu", "Abs"):
        return (max(a[0], 0.0), max(a[1], 0.0)) if name == "Relu" else (0.0, max(abs(a[0]), abs(a[1])))
    if name in ("Concat", "Max", "Min", "Where"):
        return min(x[0] for x in found), max(x[1] for x in found)
    if name == "Exp":
        return tuple(math.exp(x) if x < 700 else math.inf for x in a)  # type: ignore[return-value]
    if name == "Pow" and b == (2.0, 2.0):
        ends = [x * x for x in a]
        return (0.0 if a[0] < 0 < a[1] else min(ends)), max(ends)
    if len(found) != 2:
        return ALL
    if name == "Add":
        return _known(a[0] + b[0], a[1] + b[1])
    if name == "Sub":
        return _known(a[0] - b[1], a[1] - b[0])
    if name == "Mul":
        return _hull(x * y for x in a for y in b)
    if name == "Div" and (b[0] > 0 or b[1] < 0):
        return _hull(x / y for x in a for y in b)
    return ALL


def _known(low: float, high: float) -> Interval:
    return ALL if math.isnan(low) or math.isnan(high) else (low, high)


def _hull(products: Iterable[float]) -> Interval:
    found = list(products)
    return ALL if any(math.isnan(x) for x in found) else (min(found), max(found))
