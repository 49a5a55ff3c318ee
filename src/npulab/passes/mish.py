"""Mish, x * Tanh(Softplus(x)), and Softplus: one operator, or what they are made of."""

from __future__ import annotations

from collections.abc import Iterator

from npulab.ir import Node
from npulab.passes.patterns import At, any_wanted, each, near, raised, title, with_number
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def fuse(r: Rewrite) -> list[str]:
    """x * Tanh(Softplus(x)) becomes Mish, an operator of opset 18, to which the network is raised (Misra 2019)."""
    done = []
    for n, x, nodes in _found(r):
        if n.op.name == "Mul" and any_wanted(r, n, *nodes) and raised(r, 18):
            r.change(n, op="Mish", inputs=(x,), attributes={})
            done.append(f"{title(n)}: x * Tanh(Softplus(x)) is Mish")
    return done


def split(r: Rewrite) -> list[str]:
    """Mish(x), one operator, becomes x * Tanh(Softplus(x))."""
    done = []
    for n, _ in each(r, "Mish"):
        at = At(r, n)
        r.change(n, op="Mul", inputs=(n.inputs[0], at.op("Tanh", at.op("Softplus", n.inputs[0]))))
        done.append(f"{title(n)}: Mish is x * Tanh(Softplus(x))")
    return done


def in_parts(r: Rewrite) -> list[str]:
    """Mish(x), or x * Tanh(Softplus(x)), becomes x * Tanh(Relu(x) + Log(1 + Exp(x - 2 Relu(x)))): nothing in it
    overflows."""
    done = []
    for n, x, nodes in _found(r):
        if any_wanted(r, n, *nodes):
            at = At(r, n)
            r.change(n, op="Mul", inputs=(x, at.op("Tanh", _softplus(at, x))), attributes={})
            done.append(f"{title(n)}: Mish in Exp, Log and Tanh")
    return done


def softplus_fuse(r: Rewrite) -> list[str]:
    """Log(1 + Exp(x)) becomes Softplus, which does not overflow."""
    done = []
    for n, _ in each(r, "Log", all_=True):
        total = with_number(r, n.inputs[0], "Add")
        exp = r.maker(total[1], "Exp") if total is not None and near(total[2], 1) else None
        if total is not None and exp is not None and any_wanted(r, n, total[0], exp):
            r.change(n, op="Softplus", inputs=(exp.inputs[0],), attributes={})
            done.append(f"{title(n)}: Log(1 + Exp(x)) is Softplus")
    return done


def softplus_split(r: Rewrite) -> list[str]:
    """Softplus(x) becomes Relu(x) + Log(1 + Exp(x - 2 Relu(x))), whose Exp is of -|x| and so at most 1."""
    done = []
    for n, _ in each(r, "Softplus"):
        at = At(r, n)
        at.replace(_softplus(at, n.inputs[0]))
        done.append(f"{title(n)}: Softplus in Exp and Log")
    return done


def to_relu(r: Rewrite) -> list[str]:
    """Mish(x), or x * Tanh(Softplus(x)), becomes Relu(x), which is within 0.31 of it. The outputs change: RETRAINING is
    needed, or at least a look at the accuracy."""
    return _replaced(r, "Relu")


def to_hard_swish(r: Rewrite) -> list[str]:
    """Mish(x), or x * Tanh(Softplus(x)), becomes HardSwish(x), which is within 0.29 of it. The outputs change:
    RETRAINING is needed, or at least a look at the accuracy."""
    return _replaced(r, "HardSwish") if raised(r, 14) else []


def _softplus(at: At, x: int) -> int:
    positive = at.op("Relu", x)
    below = at.op("Sub", x, at.op("Mul", positive, 2.0))
    return at.op("Add", positive, at.op("Log", at.op("Add", at.op("Exp", below), 1.0)))


def _found(r: Rewrite) -> Iterator[tuple[Node, int, list[Node]]]:
    """(node, x, nodes within)."""
    for n, _ in each(r, "Mish", all_=True):
        yield n, n.inputs[0], []
    for n, _ in each(r, "Mul", all_=True):
        for x, gate in (n.inputs, n.inputs[::-1]):
            tanh = r.maker(gate, "Tanh")
            soft = r.maker(tanh.inputs[0], "Softplus") if tanh is not None else None
            if tanh is not None and soft is not None and soft.inputs[0] == x:
                yield n, x, [tanh, soft]
                break


def _replaced(r: Rewrite, other: str) -> list[str]:
    done = []
    for n, x, _ in _found(r):
        r.change(n, op=other, inputs=(x,), attributes={})
        done.append(f"{title(n)}: Mish is {other}")
    return done


FUSE = Pass("mish", fuse, always=False)
SPLIT = Pass("mish-to-softplus", split, always=False)
PARTS = Pass("mish-to-exp", in_parts, always=False)
SOFTPLUS_FUSE = Pass("softplus", softplus_fuse, always=False)
SOFTPLUS_SPLIT = Pass("softplus-to-exp", softplus_split, always=False)
RELU = Pass("mish-to-relu", to_relu, exact=False, always=False)
HARD_SWISH = Pass("mish-to-hardswish", to_hard_swish, exact=False, always=False)
PASSES = (FUSE, SPLIT, PARTS, SOFTPLUS_FUSE, SOFTPLUS_SPLIT, RELU, HARD_SWISH)
