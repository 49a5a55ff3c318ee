"""Graph: the model as values and operator records, and the law it obeys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from npulab.errors import ModelError
from npulab.ir.ops import Op, captures
from npulab.ir.types import Value


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One operator. `index` is its position in the source file; an absent optional input or output is -1.

    `name` is what the file calls the node, "" where formats or files have no names for nodes.
    """

    index: int
    op: Op
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    version: int = 1
    name: str = ""

    def __str__(self) -> str:
        return f"{self.op.name} (node {self.index})"


@dataclass(frozen=True, slots=True)
class Header:
    """What an ONNX file says beside its graph, kept for writing it again.

    opsets    (domain, version) that operators are of.   shell  the file without nodes, tensors and their types.
    declared  inputs in the file's order, constants among them that a caller may replace.
    types     ValueInfo, serialized, of values that are no tensors of fixed size.
    """

    opsets: tuple[tuple[str, int], ...]
    shell: bytes
    declared: tuple[int, ...]
    types: Mapping[int, bytes]


@dataclass(frozen=True, eq=False)
class Graph:
    """The main subgraph of a model, in execution order. Values are indexed by position.

    `source` is the whole file, kept so that parts of it can be cut out for the host; `digest` is its SHA-256 in hex.
    """

    name: str
    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: memoryview
    digest: str
    format: str
    signature_inputs: tuple[tuple[str, int], ...] = ()
    signature_outputs: tuple[tuple[str, int], ...] = ()
    header: Header | None = None

    @cached_property
    def producer(self) -> dict[int, Node]:
        """value index -> the node that computes it."""
        return {v: n for n in self.nodes for v in n.outputs if v >= 0}

    @cached_property
    def consumers(self) -> dict[int, tuple[Node, ...]]:
        """value index -> the nodes that read it, in order."""
        found: dict[int, list[Node]] = {}
        for n in self.nodes:
            for v in dict.fromkeys((*n.inputs, *captures(n.op))):
                if v >= 0:
                    found.setdefault(v, []).append(n)
        return {v: tuple(ns) for v, ns in found.items()}

    def value(self, node: Node, i: int) -> Value | None:
        """Input `i` of `node`, or None if it is absent."""
        if i >= len(node.inputs) or node.inputs[i] < 0:
            return None
        return self.values[node.inputs[i]]

    def verify(self) -> None:
        """The law: indices exist, each value has one producer, and nothing is read before it is computed.

        Raises: ModelError naming the node.
        """
        count = len(self.values)
        ready = {v.index for v in self.values if v.is_constant or v.is_variable} | set(self.inputs)
        for i, value in enumerate(self.values):
            if value.index != i:
                raise ModelError(f"value {i} of '{self.name}' carries the index {value.index}")
        for v in (*self.inputs, *self.outputs):
            if not 0 <= v < count:
                raise ModelError(f"graph '{self.name}' names tensor {v}, which does not exist", want=f"0..{count - 1}")
        made: set[int] = set()
        for n in self.nodes:
            for v in n.inputs:
                if not -1 <= v < count:
                    raise ModelError(f"{n} reads tensor {v}, which does not exist", want=f"-1..{count - 1}")
                if v >= 0 and v not in ready:
                    raise ModelError(f"{n} reads tensor {v} ('{self.values[v].name}') before anything computed it")
            for v in n.outputs:
                if not -1 <= v < count:
                    raise ModelError(f"{n} writes tensor {v}, which does not exist", want=f"-1..{count - 1}")
                if v < 0:
                    continue
                if v in made:
                    raise ModelError(f"{n} writes tensor {v} ('{self.values[v].name}') a second time")
                if self.values[v].is_constant:
                    raise ModelError(f"{n} writes tensor {v} ('{self.values[v].name}'), which is constant")
                made.add(v)
                ready.add(v)
        for v in self.outputs:
            if v not in ready:
                raise ModelError(f"output tensor {v} ('{self.values[v].name}') is never computed")
