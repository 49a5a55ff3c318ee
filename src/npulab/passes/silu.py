"""SiLU, x * Sigmoid(x): one operator or two, or something that more chips have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from npulab.ir import Node
from npulab.passes.patterns import At, any_wanted, attributes, each, near, raised, title, with_number
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def fuse(r: Rewrite) -> list[str]:
    """x * Sigmoid(x) and x * Sigmoid(a x) become Swish, an operator of opset 24, to which the network is raised. Not by
    itself for any board: those with a table for SiLU take the two operators as one."""
    done: list[str] = []
    if r.off is not None:
        return done
    for n, x, alpha, gate in _found(r):
        if n.op.name == "Mul" and any_wanted(r, n, gate) and raised(r, 24):
            r.change(n, op="Swish", inputs=(x,), attributes={"alpha": alpha})
            done.append(f"{title(n)}: x * Sigmoid(x) is Swish")
    return done


def split(r: Rewrite) -> list[str]:
    """Swish(x) becomes x * Sigmoid(a x), a being 1 in most networks."""
    done = []
    for n, own in each(r, "Swish"):
        at, x, alpha = At(r, n), n.inputs[0], float(own.get("alpha", 1.0))
        gate = at.op("Sigmoid", x if alpha == 1 else at.op("Mul", x, alpha))
        r.change(n, op="Mul", inputs=(x, gate), attributes={})
        done.append(f"{title(n)}: Swish is x * Sigmoid(x)")
    return done


def to_relu(r: Rewrite) -> list[str]:
    """x * Sigmoid(x), or Swish, becomes Relu(x), which is within 0.28 of it. The outputs change: RETRAINING is needed,
    or at least a look at the accuracy."""
    return _replaced(r, "Relu")


def to_hard_swish(r: Rewrite) -> list[str]:
    """x * Sigmoid(x), or Swish, becomes HardSwish(x), which is within 0.15 of it. The outputs change: look at the
    accuracy, RETRAINING is needed if it fell."""
    return _replaced(r, "HardSwish")


def _found(r: Rewrite) -> Iterator[tuple[Node, int, float, Node]]:
    """(node, x, a, node of the gate) of what makes x * Sigmoid(a x)."""
    for n, own in each(r, "Swish", all_=True):
        yield n, n.inputs[0], float(own.get("alpha", 1.0)), n
    for n, _ in each(r, "Mul", all_=True):
        for x, gate in (n.inputs, n.inputs[::-1]):
            sigmoid = r.maker(gate, "Sigmoid")
            if sigmoid is None:
                continue
            scaled = with_number(r, sigmoid.inputs[0], "Mul")
            if sigmoid.inputs[0] == x or (scaled is not None and scaled[1] == x):
                yield n, x, 1.0 if scaled is None or sigmoid.inputs[0] == x else scaled[2], sigmoid
                break


def _replaced(r: Rewrite, other: str) -> list[str]:
    done = []
    for n, x, alpha, _ in _found(r):
        own: Any = attributes(n)
        if near(alpha, 1.0) and own.get("alpha", 1.0) == alpha:
            r.change(n, op=other, inputs=(x,), attributes={})
            done.append(f"{title(n)}: x * Sigmoid(x) is {other}")
    return done


FUSE = Pass("silu-to-swish", fuse, always=False)
SPLIT = Pass("swish-to-sigmoid", split, always=False)
RELU = Pass("silu-to-relu", to_relu, exact=False, always=False)
HARD_SWISH = Pass("silu-to-hardswish", to_hard_swish, exact=False, always=False)
PASSES = (FUSE, SPLIT, RELU, HARD_SWISH)
