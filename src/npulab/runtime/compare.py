"""How far the NPU's numbers are from LiteRT's reference kernels, layer by layer and as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError
from npulab.exporters.tflite import cut
from npulab.ir import Graph
from npulab.program.types import NpuStep, Program
from npulab.runtime.host import HostModel

Array = NDArray[Any]

LAYER_LIMIT = 1
"""A layer computed on the same input may differ by this many steps of its quantization: the chip rounds once, LiteRT's
reference kernels twice."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor against LiteRT's. `nodes` computed it from the same input; `max_abs` is in steps of the tensor's
    quantization, or in its own unit if it is floating point. `note` says why there is no number."""

    name: str
    ops: tuple[str, ...]
    nodes: tuple[int, ...]
    dtype: str
    elements: int
    mismatched: int
    max_abs: float | None
    note: str = ""

    @property
    def is_layer(self) -> bool:
        """One operator on the same input; what several do in a row adds up, and no limit holds for it."""
        return len(self.nodes) == 1

    @property
    def is_close(self) -> bool:
        """A layer within its limit. True also where no limit holds, or LiteRT has nothing to compare with."""
        if not self.is_layer:
            return True
        return not self.mismatched if self.max_abs is None else self.max_abs <= LAYER_LIMIT


def compare_layers(program: Program, graph: Graph, known: Mapping[int, Array]) -> list[Difference]:
    """Every tensor of an NPU step that is in `known`, against LiteRT on the same input.

    From each such tensor we walk back to the nearest tensors that are known too; the nodes passed on the way are cut
    out and run on those. A program that keeps all tensors is thus compared layer by layer, any other region by region.
    """
    rows: list[Difference] = []
    for step in program.steps:
        if isinstance(step, NpuStep):
            wanted = [t.value for t in step.downloads if t.value in known]
            for nodes, outputs in _groups(graph, wanted, known):
                rows += _group(graph, nodes, outputs, known)
    return rows


def compare_outputs(program: Program, graph: Graph, known: Mapping[int, Array]) -> list[Difference]:
    """The model's outputs against LiteRT running the whole model on the same input."""
    nodes = tuple(n.index for n in graph.nodes)
    values = tuple(dict.fromkeys(program.outputs))
    try:
        theirs = HostModel(graph.source, f"the whole of {graph.name}").run([known[v] for v in graph.inputs])
    except UnsupportedError as e:
        return [_refused(graph, v, nodes, str(e.facts.get("got", e.message))) for v in values]
    by_value = dict(zip(graph.outputs, theirs, strict=True))
    return [_difference(graph, v, nodes, known[v], by_value[v]) for v in values]


def _groups(graph: Graph, wanted: list[int], known: Mapping[int, Array]) -> list[tuple[list[int], list[int]]]:
    """(nodes, outputs) to run in one go: outputs whose paths back to known tensors share nodes are together."""
    groups: list[tuple[set[int], list[int]]] = []
    for v in wanted:
        nodes = _behind(graph, v, known)
        outputs = [v]
        for other in [g for g in groups if g[0] & nodes]:
            groups.remove(other)
            nodes |= other[0]
            outputs = other[1] + outputs
        groups.append((nodes, outputs))
    return sorted((sorted(nodes), outputs) for nodes, outputs in groups)


def _behind(graph: Graph, value: int, known: Mapping[int, Array]) -> set[int]:
    """The nodes between `value` and the known tensors behind it."""
    nodes: set[int] = set()
    todo = [graph.producer[value]]
    while todo:
        n = todo.pop()
        if n.index not in nodes:
            nodes.add(n.index)
            todo += [graph.producer[v] for v in n.inputs if v >= 0 and v not in known and v in graph.producer]
    return nodes


def _group(graph: Graph, nodes: list[int], outputs: list[int], known: Mapping[int, Array]) -> list[Difference]:
    inputs = list(dict.fromkeys(v for n in nodes for v in graph.nodes[n].inputs
                                if v in known and not graph.values[v].is_constant))
    ops = [graph.nodes[n].op.name for n in nodes]
    try:
        what = f"{ops[0]} (node {nodes[0]})" if len(nodes) == 1 else f"nodes {nodes[0]}..{nodes[-1]}"
        theirs = HostModel(cut(graph, nodes, inputs, outputs), what).run([known[v] for v in inputs])
    except UnsupportedError as e:
        return [_refused(graph, v, tuple(nodes), str(e.facts.get("got", e.message))) for v in outputs]
    return [_difference(graph, v, tuple(nodes), known[v], b) for v, b in zip(outputs, theirs, strict=True)]


def _difference(graph: Graph, v: int, nodes: tuple[int, ...], ours: Array, theirs: Array) -> Difference:
    value = graph.values[v]
    ops = tuple(graph.nodes[n].op.name for n in nodes)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return Difference(value.name, ops, nodes, value.dtype.value, ours.size, ours.size, None,
                          f"LiteRT gives {theirs.dtype}{list(theirs.shape)}, npulab {ours.dtype}{list(ours.shape)}")
    if ours.dtype.kind not in "iufb":
        same = bool(np.array_equal(ours, theirs))
        return Difference(value.name, ops, nodes, value.dtype.value, ours.size, 0 if same else ours.size,
                          0.0 if same else None, "" if same else "differs")
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    largest = float(np.max(np.nan_to_num(apart, nan=np.inf), initial=0.0))
    return Difference(value.name, ops, nodes, value.dtype.value, ours.size, int(np.count_nonzero(apart)), largest)


def _refused(graph: Graph, v: int, nodes: tuple[int, ...], said: str) -> Difference:
    value = graph.values[v]
    return Difference(value.name, tuple(graph.nodes[n].op.name for n in nodes), nodes, value.dtype.value,
                      value.elements, 0, None, f"LiteRT cannot run it: {said}")
