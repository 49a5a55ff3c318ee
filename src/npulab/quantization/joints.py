"""Concatenations of tensors with very different ranges: boxes of 0..640 beside scores of 0..1 under one scale.

With one scale for both, the smaller ones have a handful of levels, or one. Detectors are full of them, at their ends.
Where nothing with weights follows, the tensors are joined in floats, each from its own scale, and whatever computes the
large ones from a layer's result (anchors, strides, powers) is left in floats as well: it is a few additions and
products per box, and its rounding would be pixels. Elsewhere the joined tensor gets 16 bits if the chip has them.
"""

from __future__ import annotations

from collections.abc import Mapping

from npulab.ir import Node
from npulab.quantization.network import MOVES, Network, Point
from npulab.quantization.observe import Statistics

JOINS = "joins tensors of different ranges"
LEVELS = 32
"""Of the joint scale's 256, that a tensor keeps at least."""


def part_mixed(net: Network, seen: Mapping[int, Statistics]) -> list[str]:
    """Every concatenation that would leave one of its tensors fewer than LEVELS levels taken care of; what was done."""
    notes = []
    for n in net.graph.nodes:
        if n.op.name != "Concat" or n.outputs[0] not in net.of or net.of[n.outputs[0]].scheme is None:
            continue
        small = _starved(net, n, seen)
        if not small:
            continue
        what = f"{n.name or 'Concat'} joins {_listed(net, n, seen)}"
        tail = _tail(net, n)
        wide = next((s for s in net.rules.activations if s.bits == 16), None)
        if tail is not None and net.rules.float_islands:
            for p in tail:
                _leave(p, f"{JOINS}: {n.name}")
            left = [p for v in n.inputs if v not in small for p in _computed_from_layers(net, v)]
            for p in left:
                _leave(p, f"feeds {n.name}, whose numbers are large")
            notes.append(f"{what}: joined in floats, each from its own scale"
                         + (f", and {len(left)} tensors before it stay floats" if left else ""))
        elif wide is not None:
            net.of[n.outputs[0]].scheme = wide
            notes.append(f"{what}: joined in 16 bits")
        else:
            notes.append(f"{what}: {len(small)} of them keep fewer than {LEVELS} levels, and {net.rules.title} has "
                         "neither floats nor 16 bits; take the head off: npulab patch --pass cut-head")
    return notes


def parted(net: Network) -> list[int]:
    """The tensors that meet at the parted ends, which say more of a detector than its output, where boxes drown scores;
    none where nothing was parted."""
    joins = [n for n in net.graph.nodes if n.op.name == "Concat" and n.outputs[0] in net.of
             and net.of[n.outputs[0]].why.startswith(JOINS)]
    results = {v for n in joins for p in (net.of[n.outputs[0]],) for v in p.values}
    return list(dict.fromkeys(v for n in joins for v in n.inputs
                              if v not in results and not net.graph.values[v].is_constant))


def _range(seen: Mapping[int, Statistics], net: Network, v: int) -> float:
    p = net.of.get(v)
    if p is not None and p.value in seen:
        s = seen[p.value]
        return max(s.high, 0.0) - min(s.low, 0.0)
    return 0.0


def _starved(net: Network, n: Node, seen: Mapping[int, Statistics]) -> list[int]:
    """The tensors that the joint scale does not do justice to."""
    joint = _range(seen, net, n.outputs[0])
    return [v for v in n.inputs if v in net.of and 0 < _range(seen, net, v) < joint * LEVELS / 256]


def _listed(net: Network, n: Node, seen: Mapping[int, Statistics]) -> str:
    ranges = sorted({_range(seen, net, v) for v in n.inputs if v in net.of})
    return f"ranges of {ranges[0]:.3g} and {ranges[-1]:.3g}"


def _tail(net: Network, n: Node) -> list[Point] | None:
    """The points behind a concatenation if its numbers are only moved from there to the network's outputs."""
    found: dict[int, Point] = {}
    todo = [n.outputs[0]]
    while todo:
        v = todo.pop()
        p = net.of.get(v)
        if p is None:
            continue
        if id(p) not in found:
            found[id(p)] = p
            todo.extend(u for u in p.values if u != v)
        for r in net.readers(v):
            if r.op.name not in MOVES and r.op.name != "Concat":
                return None
            todo.extend(r.outputs)
    return list(found.values())


def _computed_from_layers(net: Network, value: int) -> list[Point]:
    """The points of arithmetic between `value` and results of layers or functions with a range of their own."""
    found: dict[int, Point] = {}
    todo = [value]
    while todo:
        v = todo.pop()
        p = net.of.get(v)
        made = net.graph.producer.get(v)
        if made is None or net.layer_of(v) is not None or made.op.name in ("Sigmoid", "Tanh", "Softmax"):
            continue
        if p is not None and len(p.values) > 1:
            continue  # shared with what is moved elsewhere
        if p is not None:
            if any(r.op.name not in ("Concat", "Mul", "Add", "Sub", "Pow", "Exp", "Div") for r in net.readers(v)):
                continue
            found[id(p)] = p
        if made.op.name in ("Mul", "Add", "Sub", "Pow", "Exp", "Div"):
            todo.extend(u for u in made.inputs if u >= 0 and not net.graph.values[u].is_constant)
    return list(found.values())


def _leave(p: Point, why: str) -> None:
    p.scheme, p.params, p.why = None, None, why
