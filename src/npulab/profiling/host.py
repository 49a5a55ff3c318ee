"""What the host's share costs: a record of a CPU, and an estimate of TFLite operators on it.

A rough model, and always marked so: multiply-accumulates at the rate a published benchmark shows, bytes at the rate of
a copy, function values at a fixed price. Its interval is a factor of two either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from npulab.ir import Graph, Node
from npulab.ir.ops import Conv2D, DepthwiseConv2D, FullyConnected
from npulab.profiling.types import Constant

SPREAD = 2.0
"""A host time is expected between a half and the double of what is modelled."""

_MOVES = frozenset({"RESHAPE", "SQUEEZE", "EXPAND_DIMS", "QUANTIZE", "DEQUANTIZE", "CONCATENATION", "TRANSPOSE",
                    "SPLIT", "SPLIT_V", "SLICE", "STRIDED_SLICE", "GATHER", "PAD", "PADV2", "PACK", "UNPACK", "CAST",
                    "TILE", "SPACE_TO_DEPTH", "DEPTH_TO_SPACE", "RESIZE_NEAREST_NEIGHBOR", "SHAPE"})
"""Operators that move bytes and compute next to nothing. A RESHAPE is a copy too when its output is the host's."""


@dataclass(frozen=True, slots=True)
class HostCPU:
    """One core of a board's CPU, running TFLite as it comes.

    macs_per_second   8-bit multiply-accumulates of a convolution.
    bytes_per_second  of operators that move bytes.
    element_seconds   of any other operator, for each element of its largest tensor.
    start_seconds     of each operator, whatever its size.
    """

    name: str
    macs_per_second: float
    bytes_per_second: float
    element_seconds: float
    start_seconds: float
    source: str

    def constants(self) -> Iterator[Constant]:
        """The record's numbers as a report shows them."""
        units = {"macs_per_second": "MAC/s", "bytes_per_second": "B/s", "element_seconds": "s", "start_seconds": "s"}
        for f in fields(self):
            if f.name in units:
                stated = f.name == "macs_per_second"
                yield Constant(f"host_{f.name}", float(getattr(self, f.name)), units[f.name],
                               "stated" if stated else "assumed", self.source if stated else "no witness")


@dataclass(frozen=True, slots=True)
class HostWork:
    """What one operator asks of a CPU: multiply-accumulates, bytes to move, elements to compute."""

    macs: int
    bytes: int
    elements: int

    def seconds(self, cpu: HostCPU) -> float:
        return (cpu.start_seconds + self.macs / cpu.macs_per_second + self.bytes / cpu.bytes_per_second
                + self.elements * cpu.element_seconds)


def host_work(graph: Graph, node: Node) -> HostWork:
    """The work of one operator of a graph."""
    values = [graph.values[v] for v in (*node.inputs, *node.outputs) if v >= 0]
    sizes = [(v.elements, v.elements * _item(v.dtype.numpy)) for v in values if not v.is_constant]
    moved = sum(b for _, b in sizes)
    if isinstance(node.op, Conv2D | DepthwiseConv2D | FullyConnected):
        kernel, out = graph.values[node.inputs[1]], graph.values[node.outputs[0]]
        if isinstance(node.op, DepthwiseConv2D):
            return HostWork(kernel.elements // max(1, kernel.shape[-1]) * out.elements, moved, 0)
        per_output = kernel.elements // max(1, kernel.shape[0])
        return HostWork(per_output * out.elements, moved, 0)
    if node.op.name in _MOVES:
        return HostWork(0, moved, 0)
    return HostWork(0, moved, max((n for n, _ in sizes), default=0))


def _item(dtype: np.dtype[np.generic] | type | None) -> int:
    return 1 if dtype is None else int(np.dtype(dtype).itemsize)
