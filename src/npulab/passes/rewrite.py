"""A graph being changed: what passes add, replace and remove, until it is a Graph again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import Embedded, OnnxOp, captures
from npulab.postprocess.types import Stage

if TYPE_CHECKING:
    import onnx

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
        self._names: set[str] = set()
        self._added: dict[int, list[Node]] = {}
        self._readers: dict[int, set[int]] = {}  # of values whose readers are no longer those of the source graph
        self._makers: dict[int, int] = {}  # of new values

    def _readers_of(self, value: int) -> set[int]:
        """The readers of a value, to be changed."""
        if value not in self._readers:
            self._readers[value] = {n.index for n in self.source.consumers.get(value, ())}
        return self._readers[value]

    def _enter(self, i: int, n: Node) -> None:
        for v in (*n.inputs, *captures(n.op)):
            if v >= 0:
                self._readers_of(v).add(i)
        for v in n.outputs:
            if v >= 0:
                self._makers[v] = i

    def _put(self, i: int, new: Node) -> None:
        """Another node in the place of node `i`."""
        old = self.nodes[i]
        for v in (*old.inputs, *captures(old.op)):
            if v >= 0:
                self._readers_of(v).discard(i)
        self.nodes[i] = new
        self._enter(i, new)

    # looking

    def live(self) -> Iterator[Node]:
        """The nodes as they are when their turn comes, new ones last; `Node.index` is their key here."""
        for i in range(len(self.nodes)):
            yield self.nodes[i]

    def wanted(self, node: Node) -> bool:
        """Whether a pass that only some boards need should touch this node, one of the source graph."""
        return self.off is None or node.index in self.off

    def maker(self, value: int, *names: str) -> Node | None:
        """The node that computes a value, if it is one of ONNX's own operators of these names."""
        i = self._makers.get(value)
        if i is None and (made := self.source.producer.get(value)) is not None:
            i = made.index
        op = self.nodes[i].op if i is not None else None
        if i is None or not isinstance(op, OnnxOp) or op.domain or (names and op.name not in names):
            return None
        return self.nodes[i]

    def readers(self, value: int) -> list[Node]:
        """The nodes that read a value, in order."""
        if value not in self._readers:
            return [self.nodes[n.index] for n in self.source.consumers.get(value, ())]
        return [self.nodes[i] for i in sorted(self._readers[value])]

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
        default the first input). A shape that is told beside one of unknown sizes is not believed: it may be made of
        the ones that stand for them, until shapes are inferred anew."""
        model = self.values[like if like is not None else inputs[0]]
        v = Value(len(self.values), self._unused(f"{name}_out"), model.shape if shape is None else shape, model.dtype,
                  dynamic_axes=model.dynamic_axes if shape is None else (),
                  has_shape=model.has_shape and (shape is None or not model.dynamic_axes))
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
        return new

    def release_name(self, node: Node) -> None:
        """Let the next node have the name of this one, which is to be replaced."""
        self._taken().discard(node.name)
        self.nodes[node.index] = replace(self.nodes[node.index], name="")

    def substitute(self, old: int, new: int) -> None:
        """Let all who read `old` read `new`, bodies too. An output of the graph keeps its name: `new` takes it over."""
        if old in self.outputs:
            name, other = self.values[old].name, self.values[new].name
            self._named(old, self._unused(name))  # the two are never called the same
            self._named(new, name)
            self._named(old, other)
            self.outputs = [new if v == old else v for v in self.outputs]
        for i in sorted(self._readers_of(old)):
            n = self.nodes[i]
            op = n.op
            if old in captures(op):
                assert isinstance(op, OnnxOp)
                names = {self.values[old].name: self.values[new].name}
                op = replace(op, attributes={k: _renamed(a, names, {old: new}) if isinstance(a, Embedded) else a
                                             for k, a in op.attributes.items()})
            self._put(i, replace(n, op=op, inputs=tuple(new if v == old else v for v in n.inputs)))

    def _named(self, value: int, name: str) -> None:
        """Another name for a value, in the bodies that read it too."""
        names = {self.values[value].name: name}
        self.values[value] = replace(self.values[value], name=name)
        for i in sorted(self._readers_of(value)):
            n = self.nodes[i]
            if value in captures(n.op):
                assert isinstance(n.op, OnnxOp)
                self._put(i, replace(n, op=replace(n.op, attributes={
                    k: _renamed(a, names, {}) if isinstance(a, Embedded) else a for k, a in n.op.attributes.items()})))

    def _taken(self) -> set[str]:
        """Every name in use."""
        self._names = self._names or {
            *(v.name for v in self.source.values), *(n.name for n in self.source.nodes),
            *(name for n in self.source.nodes if isinstance(n.op, OnnxOp) for a in n.op.attributes.values()
              if isinstance(a, Embedded) for name in _names_in(a))}
        return self._names

    def _unused(self, name: str) -> str:
        taken = self._taken()
        found, k = name, 1
        while found in taken:
            k += 1
            found = f"{name}_{k}"
        taken.add(found)
        return found

    # the end

    def sources(self) -> dict[str, int]:
        """For each node that was added or given another operator, by name, the node of the source graph it is for."""
        count = len(self.source.nodes)
        found = {n.name: i for i, n in enumerate(self.nodes[:count]) if n.name and n.op is not self.source.nodes[i].op}
        todo = [(i, i) for i in self._added if i < count]
        while todo:
            i, own = todo.pop()
            for n in self._added.get(i, ()):
                found[n.name] = own
                todo.append((n.index, own))
        return found

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

        def record(i: int, n: Node) -> Node:
            op = n.op
            assert isinstance(op, OnnxOp)
            if captures(op):
                op = replace(op, attributes={
                    k: Embedded(a.data, renumbered(a.captures)) if isinstance(a, Embedded) else a
                    for k, a in op.attributes.items()})
            return Node(i, op, renumbered(n.inputs), renumbered(n.outputs), n.version, n.name)

        def value(i: int, v: Value) -> Value:
            return v if v.index == i else replace(v, index=i)

        found = replace(
            self.source, values=tuple(value(i, self.values[v]) for v, i in number.items()),
            nodes=tuple(record(i, n) for i, n in enumerate(kept)),
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


def _names_in(a: Embedded) -> set[str]:
    """Every name in a body: ONNX wants those of the graph around it to be others."""
    import onnx

    def of(body: onnx.GraphProto) -> Iterator[str]:
        yield from (x.name for x in (*body.input, *body.output, *body.initializer))
        for n in body.node:
            yield from (n.name, *n.input, *n.output)
            for inner in _bodies(n.attribute):
                yield from of(inner)
    return {name for body in _bodies([onnx.AttributeProto.FromString(a.data)]) for name in of(body)}


def _bodies(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.GraphProto]:
    for a in attributes:
        yield from (*([a.g] if a.HasField("g") else []), *a.graphs)


def _renamed(a: Embedded, names: Mapping[str, str], numbers: Mapping[int, int]) -> Embedded:
    """A body that reads what is called otherwise, and are other values of the graph around it."""
    import onnx

    def rename(body: onnx.GraphProto, names: Mapping[str, str]) -> None:
        own = {x.name for x in (*body.input, *body.initializer)} | {o for n in body.node for o in n.output}
        names = {old: new for old, new in names.items() if old not in own}
        for n in body.node:
            n.input[:] = [names.get(i, i) for i in n.input]
            for inner in _bodies(n.attribute):
                rename(inner, names)
        for o in body.output:
            o.name = names.get(o.name, o.name)

    proto = onnx.AttributeProto.FromString(a.data)
    for body in _bodies([proto]):
        rename(body, names)
    captured = tuple(dict.fromkeys(numbers.get(v, v) for v in a.captures))
    return Embedded(proto.SerializeToString(deterministic=True), captured)
