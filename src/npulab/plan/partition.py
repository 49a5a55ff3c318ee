"""Cut a graph into regions: maximal runs of nodes for one place that never wait for each other in a circle.

The rule is TFLite's own for delegates: walk the graph in epochs; an epoch takes every node of its kind whose inputs
are ready, in order, again and again, until none is left to take. Each epoch becomes one region. As a region only reads
what earlier epochs made, regions cannot depend on each other in a cycle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from npulab.ir import Graph, Node


@dataclass(frozen=True, slots=True)
class Part:
    """Nodes that run together, in order. `inputs` are computed before it, `outputs` are needed after it."""

    on_npu: bool
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def partition(graph: Graph, on_npu: Callable[[Node], bool], start: bool | None = None) -> list[Part]:
    """Regions in execution order. `start` is the kind of the first epoch; None takes that of the first ready node."""
    wanted = {n.index: on_npu(n) for n in graph.nodes}
    pending = list(graph.nodes)
    waiting = {v for n in graph.nodes for v in n.outputs}
    epochs: list[tuple[bool, list[Node]]] = []
    while pending:
        kind, taken = start, []
        start = None
        moved = True
        while moved:
            moved = False
            left = []
            for n in pending:
                ready = not any(v in waiting for v in n.inputs if v >= 0)
                if ready and (kind is None or wanted[n.index] == kind):
                    kind = wanted[n.index]
                    taken.append(n)
                    waiting.difference_update(n.outputs)
                    moved = True
                else:
                    left.append(n)
            pending = left
        if kind is not None and taken:
            epochs.append((kind, taken))
    return [_part(graph, kind, nodes) for kind, nodes in epochs]


def fewest_regions(graph: Graph, on_npu: Callable[[Node], bool]) -> list[Part]:
    """The partition with fewer NPU regions of the two that start on the NPU or on the host."""
    both = [partition(graph, on_npu, start) for start in (None, True, False)]
    return min(both, key=lambda parts: (sum(p.on_npu for p in parts), len(parts)))


def _part(graph: Graph, on_npu: bool, nodes: list[Node]) -> Part:
    inside = {n.index for n in nodes}
    made = {v for n in nodes for v in n.outputs}
    at_home = {v.index for v in graph.values if v.is_constant or v.is_variable}  # they come along with the nodes
    inputs = dict.fromkeys(v for n in nodes for v in n.inputs if v >= 0 and v not in made and v not in at_home)
    wanted = set(graph.outputs)
    outputs = [v for n in nodes for v in n.outputs
               if v in wanted or any(c.index not in inside for c in graph.consumers.get(v, ()))]
    return Part(on_npu, tuple(nodes), tuple(inputs), tuple(dict.fromkeys(outputs)))
