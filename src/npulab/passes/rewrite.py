"""A graph being changed: what passes add, replace and remove, until it is a Graph again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import Embedded, OnnxOp, captures
from npulab.postprocess.types import Stage

_DTYPES = {d.numpy: d for d in DType if d.numpy is not None}


class Rewrite:
    """An ONNX graph as lists. Values keep their numbers until `graph`; nodes keep their order, new ones where asked.

    off     nodes that the board at hand does not take; None: no board is at hand, and every place is meant.
    number  what the user gave a pass with NAME=NUMBER, which says what it is.
    stage   what a pass took off the end, for NumPy to do.
    """

    def __init__(self, graph: Graph, off: Collection[int] | None = None, number: int | None = None) -> None:
        if graph.format != "onnx":
            raise InvariantError(f"passes work on ONNX graphs; '{graph.name}' is {graph.format}")
        self.source = graph
        self.off = off
        self.number = number
        self.stage: Stage | None = None
        self.values: list[Value] = list(graph.values)
        self.nodes: list[Node] = list(graph.nodes)
        self.outputs = list(graph.outputs)
        self._names = {v.name for v in graph.values} | {n.name for n in graph.nodes}
        self._added: dict[int, list[Node]] = {}
        self._readers: dict[int, set[int]] = {}
        self._makers: dict[int, int] = {}
        for i, n in enumerate(graph.nodes):
            self._enter(i, n)

    def _enter(self, i: int, n: Node) -> None:
        for v in (*n.inputs, *captures(n.op)):
            if v >= 0:
                self._readers.setdefault(v, set()).add(i)
        for v in n.outputs:
            if v >= 0:
                self._makers[v] = i

    def _put(self, i: int, new: Node) -> None:
        """Another node in the place of node `i`."""
        old = self.nodes[i]
        for v in (*old.inputs, *captures(old.op)):
            self._readers.get(v, set()).discard(i)
        self.nodes[i] = new
        self._enter(i, new)

    # looking

    def live(self) -> Iterator[Node]:
        """The nodes as they are when their turn comes, new ones last; `Node.index` is their key here."""
        for i in range(len(self.nodes)):
            yield replace(self.nodes[i], index=i)

    def wanted(self, node: Node) -> bool:
        """Whether a pass that only some boards need should touch this node, one of the source graph."""
        return self.off is None or node.index in self.off

    def maker(self, value: int, *names: str) -> Node | None:
        """The node that computes a value, if it is one of ONNX's own operators of these names."""
        i = self._makers.get(value)
        op = self.nodes[i].op if i is not None else None
        if i is None or not isinstance(op, OnnxOp) or op.domain or (names and op.name not in names):
            return None
        return replace(self.nodes[i], index=i)

    def readers(self, value: int) -> list[Node]:
        """The nodes that read a value, in order."""
        return [replace(self.nodes[i], index=i) for i in sorted(self._readers.get(value, ()))]

    def only_reader(self, value: int, *names: str) -> Node | None:
        """The one node that reads a value which is no output of the graph, if it is of these names."""
        found = self.readers(value)
        if len(found) != 1 or value in self.outputs:
            return None
        op = found[0].op
        return found[0] if isinstance(op, OnnxOp) and not op.domain and (not names or op.name in names) else None

    def constant(self, value: int) -> NDArray[np.generic] | None:
        """A constant's content; None for what is computed, absent, or has no NumPy type."""
        if value < 0 or not self.values[value].is_constant or self.values[value].dtype.numpy is None:
            return None
        return self.values[value].array()

    # changing

    def add_constant(self, name: str, array: NDArray[np.generic]) -> int:
        array = np.asarray(array, order="C")
        if array.dtype not in _DTYPES:
            raise InvariantError(f"a constant of {array.dtype} has no type in ONNX graphs")
        v = Value(len(self.values), self._unused(name), array.shape, _DTYPES[array.dtype],
                  constant=memoryview(array.tobytes()))
        self.values.append(v)
        return v.index

    def add(self, before: Node, name: str, op: str, inputs: Sequence[int],
            attributes: Mapping[str, object] | None = None, like: int | None = None,
            shape: tuple[int, ...] | None = None) -> int:
        """A new node in front of `before`. Gives its one output, of the type and, unless told, the shape of `like` (by
        default the first input)."""
        model = self.values[like if like is not None else inputs[0]]
        v = Value(len(self.values), self._unused(f"{name}_out"), model.shape if shape is None else shape, model.dtype,
                  dynamic_axes=model.dynamic_axes if shape is None else (), has_shape=model.has_shape)
        self.values.append(v)
        node = Node(len(self.nodes), OnnxOp(op, dict(attributes or {})), tuple(inputs), (v.index,),
                    name=self._unused(name))
        self.nodes.append(node)
        self._enter(node.index, node)
        self._added.setdefault(before.index, []).append(node)
        return v.index

    def change(self, node: Node, *, inputs: Sequence[int] | None = None, attributes: Mapping[str, object] | None = None,
               op: str | None = None) -> Node:
        """The node with other inputs, attributes or operator."""
        old = self.nodes[node.index]
        assert isinstance(old.op, OnnxOp)
        record = OnnxOp(op or old.op.name, dict(old.op.attributes if attributes is None else attributes), old.op.domain)
        new = replace(old, op=record, inputs=tuple(old.inputs if inputs is None else inputs))
        self._put(node.index, new)
        return replace(new, index=node.index)

    def substitute(self, old: int, new: int) -> None:
        """Let all who read `old` read `new`. An output of the graph keeps its name: `new` takes it over."""
        for i in list(self._readers.get(old, ())):
            n = self.nodes[i]
            if any(isinstance(a, Embedded) and old in a.captures for a in getattr(n.op, "attributes", {}).values()):
                raise InvariantError(f"{n} reads a value from its body, which cannot be replaced")
            self._put(i, replace(n, inputs=tuple(new if v == old else v for v in n.inputs)))
        if old in self.outputs:
            name, other = self.values[old].name, self.values[new].name
            self.values[old] = replace(self.values[old], name=other)
            self.values[new] = replace(self.values[new], name=name)
            self.outputs = [new if v == old else v for v in self.outputs]

    def _unused(self, name: str) -> str:
        found, k = name, 1
        while found in self._names:
            k += 1
            found = f"{name}_{k}"
        self._names.add(found)
        return found

    # the end

    def graph(self) -> Graph:
        """The Graph of what is left: nodes that nothing needs are gone, and so are values."""
        order = self._in_order()
        needed = set(self.outputs)
        kept: list[Node] = []
        for n in reversed(order):
            if needed.intersection(n.outputs):
                kept.append(n)
                needed.update(v for v in (*n.inputs, *captures(n.op)) if v >= 0)
        kept.reverse()
        header = self.source.header
        assert header is not None
        used = {*header.declared, *self.source.inputs, *self.outputs}
        for n in kept:
                used.update(v for v in (*n.inputs, *n.outputs, *captures(n.op)) if v >= 0)
        number = {v: i for i, v in enumerate(sorted(used))}

        def renumbered(values: Sequence[int]) -> tuple[int, ...]:
            return tuple(number[v] if v >= 0 else -1 for v in values)

        def record(n: Node) -> Node:
            op = n.op
            assert isinstance(op, OnnxOp)
            attributes = {k: Embedded(a.data, renumbered(a.captures)) if isinstance(a, Embedded) else a
                          for k, a in op.attributes.items()}
            return replace(n, op=replace(op, attributes=attributes), inputs=renumbered(n.inputs),
                           outputs=renumbered(n.outputs))

        found = replace(
            self.source, values=tuple(replace(self.values[v], index=i) for v, i in number.items()),
            nodes=tuple(replace(record(n), index=i) for i, n in enumerate(kept)),
            inputs=renumbered(self.source.inputs), outputs=renumbered(self.outputs),
            header=replace(header, declared=renumbered(header.declared),
                           types={number[v]: t for v, t in header.types.items() if v in number}),
        )
        found.verify()
        return found

    def _in_order(self) -> list[Node]:
        """Old nodes in their order, new ones in front of what they were added for."""
        out: list[Node] = []

        def put(key: int) -> None:
            for n in self._added.get(key, ()):
                put(n.index)
            out.append(self.nodes[key])

        for i in range(len(self.source.nodes)):
            put(i)
        return out
