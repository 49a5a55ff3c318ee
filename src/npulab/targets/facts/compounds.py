"""Operators that a file spells out: x * Sigmoid(x) is Swish, x / 2 * (1 + Erf(x / sqrt 2)) is Gelu.

What vendors list under one name, their converters find in a graph; so does this. Of such nodes only the last one's
result is read from outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from npulab.ir import Graph, Node
from npulab.targets.facts.properties import Properties, numbers

Names = Mapping[int, tuple[str, ...]]
NEAR = 1e-4
"""Share by which a number may differ from the formula's: exporters round to float16."""
STEPS = 3
"""Products behind 1 + Erf: by x, by a half, or by x / 2."""


@dataclass(frozen=True, slots=True)
class Compound:
    """`nodes`, in order, are what `name` is alone; `first` of them tells types and shapes. `parts` for people."""

    name: str
    nodes: tuple[int, ...]
    first: int
    parts: str


def compounds(graph: Graph, names: Names, properties: Mapping[int, Properties]) -> Iterator[Compound]:
    """All of a graph. `names`: canonical ones of each node."""
    for n in graph.nodes:
        own = names[n.index]
        if "Sigmoid" in own or "HardSigmoid" in own:
            found = _swish(graph, names, properties, n)
        elif "Softplus" in own:
            found = _mish(graph, names, n)
        elif "Erf" in own:
            found = _gelu(graph, names, n)
        else:
            continue
        if found is not None:
            yield found


def _reader(graph: Graph, n: Node) -> Node | None:
    """The one node that reads a result which nobody else sees."""
    if not n.outputs or n.outputs[0] in graph.outputs:
        return None
    readers = graph.consumers.get(n.outputs[0], ())
    return readers[0] if len(readers) == 1 else None


def _other(n: Node, value: int) -> int | None:
    """The other one of two inputs."""
    if len(n.inputs) != 2 or value not in n.inputs:
        return None
    return n.inputs[0] if n.inputs[1] == value else n.inputs[1]


def _swish(graph: Graph, names: Names, properties: Mapping[int, Properties], n: Node) -> Compound | None:
    """x * sigmoid(x); of HardSigmoid with the numbers that HardSwish has."""
    mul = _reader(graph, n)
    if mul is None or "Mul" not in names[mul.index] or not n.inputs or _other(mul, n.outputs[0]) != n.inputs[0]:
        return None
    if "HardSigmoid" not in names[n.index]:
        return Compound("Swish", (n.index, mul.index), n.index, "Sigmoid and Mul of one value")
    alpha, beta = (properties[n.index].get(a) for a in ("alpha", "beta"))
    usual = isinstance(alpha, int | float) and isinstance(beta, int | float)
    if usual and abs(alpha - 1 / 6) < NEAR and abs(beta - 0.5) < NEAR:
        return Compound("HardSwish", (n.index, mul.index), n.index, "HardSigmoid and Mul of one value")
    return None


def _mish(graph: Graph, names: Names, n: Node) -> Compound | None:
    """x * tanh(softplus(x))."""
    tanh = _reader(graph, n)
    mul = _reader(graph, tanh) if tanh is not None and "Tanh" in names[tanh.index] else None
    if tanh is None or mul is None or "Mul" not in names[mul.index] or _other(mul, tanh.outputs[0]) != n.inputs[0]:
        return None
    return Compound("Mish", (n.index, tanh.index, mul.index), n.index, "Softplus, Tanh and Mul")


def _scaled(graph: Graph, names: Names, n: Node | None) -> tuple[int, float] | None:
    """(x, c) of a node that computes c * x."""
    kinds = names[n.index] if n is not None else ()
    if n is None or len(n.inputs) != 2 or not {"Mul", "Div"} & set(kinds):
        return None
    for x, c in (n.inputs, n.inputs[::-1]) if "Mul" in kinds else (n.inputs,):
        number = _number(graph, c)
        if number and _number(graph, x) is None:
            return x, 1 / number if "Div" in kinds else number
    return None


def _number(graph: Graph, value: int) -> float | None:
    found = numbers(graph.values[value]) if value >= 0 else None
    return float(found[0]) if found is not None and len(found) == 1 and isinstance(found[0], int | float) else None


def _gelu(graph: Graph, names: Names, n: Node) -> Compound | None:
    """x / 2 (1 + erf(x / sqrt 2)), the products in any order."""
    inner = graph.producer.get(n.inputs[0]) if n.inputs else None
    scaled = _scaled(graph, names, inner)
    add = _reader(graph, n)
    if inner is None or scaled is None or not math.isclose(scaled[1], math.sqrt(0.5), rel_tol=NEAR) \
            or _reader(graph, inner) is not n or add is None or "Add" not in names[add.index]:
        return None
    one = _other(add, n.outputs[0])
    x, factor, left = scaled[0], 1.0, True
    if one is None or _number(graph, one) != 1:
        return None
    nodes = [inner.index, n.index, add.index]
    at: Node | None = add
    for _ in range(STEPS):
        before, at = at, _reader(graph, at) if at is not None else None
        if before is None or at is None:
            return None
        own, other = _scaled(graph, names, at), _other(at, before.outputs[0])
        if own is not None and own[0] == before.outputs[0]:
            factor *= own[1]
        elif left and other is not None and "Mul" in names[at.index]:
            maker = graph.producer.get(other)
            half = _scaled(graph, names, maker)
            if other == x:
                pass
            elif maker is not None and half is not None and half[0] == x and _reader(graph, maker) is at:
                factor *= half[1]
                nodes.append(maker.index)
            else:
                return None
            left = False
        else:
            return None
        nodes.append(at.index)
        if not left and math.isclose(factor, 0.5, rel_tol=NEAR):
            return Compound("Gelu", tuple(sorted(nodes)), inner.index, "Erf and what is around it")
    return None
