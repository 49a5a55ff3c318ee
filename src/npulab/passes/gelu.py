"""GELU: one operator, its error function or tanh spelled out, or something that more chips have."""

from __future__ import annotations

import math
from collections.abc import Iterator

from npulab.ir import Node
from npulab.passes.patterns import At, affine, along, any_wanted, each, near, product, raised, title, with_number
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

CUBIC = 0.044715
"""Of the tanh form: Hendrycks, Gimpel, arXiv:1606.08415."""
ROOT = math.sqrt(2 / math.pi)


def fuse(r: Rewrite) -> list[str]:
    """x / 2 (1 + Erf(x / sqrt 2)), in whatever order, and the form with Tanh become Gelu, an operator of opset 20, to
    which the network is raised."""
    done = []
    for n, x, form, nodes in _found(r):
        if n.op.name != "Gelu" and any_wanted(r, n, *nodes) and raised(r, 20):
            r.change(n, op="Gelu", inputs=(x,), attributes={"approximate": form})
            done.append(f"{title(n)}: Gelu" + (" by tanh" if form == "tanh" else ""))
    return done


def split(r: Rewrite) -> list[str]:
    """Gelu becomes x / 2 (1 + Erf(x / sqrt 2)), or what it is with approximate=tanh,
    x / 2 (1 + Tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    done = []
    for n, own in each(r, "Gelu"):
        at, x = At(r, n), n.inputs[0]
        if own.get("approximate", "none") in ("tanh", b"tanh"):
            _by_tanh(at, x)
        else:
            bell = at.op("Erf", at.op("Mul", x, math.sqrt(0.5)))
            at.replace(at.op("Mul", at.op("Mul", x, 0.5), at.op("Add", bell, 1.0)))
        done.append(f"{title(n)}: Gelu spelled out")
    return done


def to_tanh(r: Rewrite) -> list[str]:
    """GELU becomes its form with Tanh, which is within 0.0005 of it. The outputs change slightly: look at the accuracy;
    RETRAINING is rarely needed."""
    done = []
    for n, x, form, _ in _found(r):
        if form == "none":
            _by_tanh(At(r, n), x)
            done.append(f"{title(n)}: Gelu by tanh")
    return done


def to_sigmoid(r: Rewrite) -> list[str]:
    """GELU becomes x * Sigmoid(1.702 x), which is within 0.021 of it (Hendrycks, Gimpel 2016). The outputs change: look
    at the accuracy, RETRAINING is needed if it fell."""
    done = []
    for n, x, _, _ in _found(r):
        at = At(r, n)
        at.replace(at.op("Mul", x, at.op("Sigmoid", at.op("Mul", x, 1.702))))
        done.append(f"{title(n)}: Gelu is x * Sigmoid(1.702 x)")
    return done


def to_relu(r: Rewrite) -> list[str]:
    """GELU becomes Relu(x), which is within 0.17 of it. The outputs change: RETRAINING is needed, or at least a look at
    the accuracy."""
    done = []
    for n, x, _, _ in _found(r):
        r.change(n, op="Relu", inputs=(x,), attributes={})
        done.append(f"{title(n)}: Gelu is Relu")
    return done


def _by_tanh(at: At, x: int) -> None:
    inner = at.op("Add", at.op("Mul", at.op("Mul", x, x), CUBIC), 1.0)
    tanh = at.op("Tanh", at.op("Mul", at.op("Mul", x, ROOT), inner))
    at.replace(at.op("Mul", at.op("Mul", x, 0.5), at.op("Add", tanh, 1.0)))


def _found(r: Rewrite) -> Iterator[tuple[Node, int, str, list[Node]]]:
    """(node, x, "none" or "tanh", nodes within) of whatever makes a GELU."""
    for n, own in each(r, "Gelu", all_=True):
        form = own.get("approximate", "none")
        yield n, n.inputs[0], form if isinstance(form, str) else form.decode(), []
    keep = {v for n, _ in each(r, "Erf", all_=True) for v in along(r, n.inputs[0])}
    keep |= {n.inputs[0] for n, _ in each(r, "Pow", "Mul", all_=True)
             if n.op.name == "Pow" or n.inputs[0] == n.inputs[1]}
    for n, _ in each(r, "Mul", "Div", all_=True):
        c, factors, nodes = product(r, n.outputs[0], keep)
        for x, bell in (factors, factors[::-1]) if len(factors) == 2 else ():
            value, a, b, chain = affine(r, bell)
            if a and near(a, b) and near(a * c, 0.5):
                inner = r.maker(value, "Erf", "Tanh")
                form = _inside(r, inner, x) if inner is not None else None
                if inner is not None and form:
                    yield n, x, form[0], [*nodes, *chain, inner, *form[1]]
                    break


def _inside(r: Rewrite, n: Node, x: int) -> tuple[str, list[Node]] | None:
    """Which form it is if the node is the Erf or Tanh of one, and the nodes inside."""
    if n.op.name == "Erf":
        source, a, b, chain = affine(r, n.inputs[0], x)
        return ("none", chain) if source == x and not b and near(a, math.sqrt(0.5)) else None
    c, factors, nodes = product(r, n.inputs[0], (x,))
    if not near(c, ROOT):
        return None
    if len(factors) == 1:  # x + 0.044715 x^3
        add = r.maker(factors[0], "Add")
        for a, b in (add.inputs, add.inputs[::-1]) if add is not None else ():
            k, cube, inner = product(r, b, (x,))
            if add is not None and a == x and near(k, CUBIC) and sum(_power(r, f, x) for f in cube) == 3:
                return "tanh", [*nodes, add, *inner]
    if len(factors) == 2:  # x (1 + 0.044715 x^2)
        for a, b in (factors, factors[::-1]):
            total = with_number(r, b, "Add")
            k, square, inner = product(r, total[1], (x,)) if total is not None else (0.0, [], [])
            if total is not None and a == x and near(total[2], 1) and near(k, CUBIC) \
                    and sum(_power(r, f, x) for f in square) == 2:
                return "tanh", [*nodes, total[0], *inner]
    return None


def _power(r: Rewrite, value: int, x: int) -> float:
    """k where the value is x to the power of k; else a number that fits nothing."""
    found = with_number(r, value, "Pow")
    return 1 if value == x else found[2] if found is not None and found[1] == x else math.inf


FUSE = Pass("gelu", fuse, always=False)
SPLIT = Pass("gelu-to-erf", split, always=False)
TANH = Pass("gelu-to-tanh", to_tanh, exact=False, always=False)
SIGMOID = Pass("gelu-to-sigmoid", to_sigmoid, exact=False, always=False)
RELU = Pass("gelu-to-relu", to_relu, exact=False, always=False)
PASSES = (FUSE, SPLIT, TANH, SIGMOID, RELU)
