"""HardSwish and HardSigmoid: one operator, or the Clip and Mul that they are made of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from npulab.ir import Node
from npulab.passes.patterns import (
    At,
    affine,
    along,
    any_wanted,
    attributes,
    each,
    is_float,
    near,
    opset,
    present,
    product,
    raised,
    scalar,
    title,
)
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

SIXTH = float(np.float32(1 / 6))


def fuse(r: Rewrite) -> list[str]:
    """x * HardSigmoid(x) and x * Clip(x + 3, 0, 6) / 6 become HardSwish, an operator of opset 14 (Howard et al.
    2019)."""
    done = []
    for n, x, nodes in _swishes(r):
        if n.op.name != "HardSwish" and any_wanted(r, n, *nodes) and raised(r, 14):
            r.change(n, op="HardSwish", inputs=(x,), attributes={})
            done.append(f"{title(n)}: x * Clip(x + 3, 0, 6) / 6 is HardSwish")
    return done


def split(r: Rewrite) -> list[str]:
    """HardSwish(x) becomes x * HardSigmoid(x), its slope 1/6."""
    done = []
    for n, _ in each(r, "HardSwish"):
        gate = At(r, n).op("HardSigmoid", n.inputs[0], alpha=SIXTH, beta=0.5)
        r.change(n, op="Mul", inputs=(n.inputs[0], gate), attributes={})
        done.append(f"{title(n)}: HardSwish is x * HardSigmoid(x)")
    return done


def clipped(r: Rewrite) -> list[str]:
    """HardSwish(x) becomes x * Clip(x + 3, 0, 6) / 6."""
    done = []
    for n, _ in each(r, "HardSwish"):
        if opset(r) < 11:
            continue
        at, x = At(r, n), n.inputs[0]
        gate = at.op("Mul", x, at.op("Clip", at.op("Add", x, 3.0), 0.0, 6.0))
        at.replace(at.op("Mul", gate, 1 / 6))
        done.append(f"{title(n)}: HardSwish is x * Clip(x + 3, 0, 6) / 6")
    return done


def to_relu(r: Rewrite) -> list[str]:
    """HardSwish, or what it is made of, becomes Relu(x), which is within 0.38 of it. The outputs change: RETRAINING is
    needed, or at least a look at the accuracy."""
    done = []
    for n, x, _ in _swishes(r):
        r.change(n, op="Relu", inputs=(x,), attributes={})
        done.append(f"{title(n)}: HardSwish is Relu")
    return done


def sigmoid_fuse(r: Rewrite) -> list[str]:
    """Clip(a x + b, 0, 1), and Clip(x + 3, 0, 6) / 6, become HardSigmoid."""
    done = []
    for n, _ in each(r, "Clip", "Mul", "Div", all_=True):
        found = _gate(r, n.outputs[0])
        if found is None or not any_wanted(r, n, *found[3]) or not is_float(r, found[0]):
            continue
        x, a, b, _ = found
        at = At(r, n)
        at.replace(at.op("HardSigmoid", x, alpha=a, beta=b))
        done.append(f"{title(n)}: a Clip that is HardSigmoid")
    return done


def sigmoid_split(r: Rewrite) -> list[str]:
    """HardSigmoid(x) becomes Clip(a x + b, 0, 1)."""
    done = []
    for n, own in each(r, "HardSigmoid"):
        if opset(r) < 11:
            continue
        at = At(r, n)
        scaled = at.op("Mul", n.inputs[0], float(own.get("alpha", 0.2)))
        at.replace(at.op("Clip", at.op("Add", scaled, float(own.get("beta", 0.5))), 0.0, 1.0))
        done.append(f"{title(n)}: HardSigmoid is Clip(a x + b, 0, 1)")
    return done


def limits(r: Rewrite, n: Node) -> tuple[float, float] | None:
    """What a Clip clips to; None if that is computed."""
    own = attributes(n)
    low, high = float(own.get("min", -np.inf)), float(own.get("max", np.inf))
    for i in (1, 2):
        if present(n, i):
            c = scalar(r, n.inputs[i])
            if c is None:
                return None
            low, high = (c, high) if i == 1 else (low, c)
    return low, high


def _gate(r: Rewrite, value: int) -> tuple[int, float, float, list[Node]] | None:
    """(x, a, b, nodes) where the value is min(max(a x + b, 0), 1), made of a Clip."""
    value, scale, shift, nodes = affine(r, value)
    clip = r.maker(value, "Clip")
    bounds = limits(r, clip) if clip is not None else None
    if clip is None or bounds is None or bounds[0] != 0 or shift or not near(bounds[1] * scale, 1.0):
        return None
    x, a, b, inner = affine(r, clip.inputs[0])
    return (x, a * scale, b * scale, [*nodes, clip, *inner]) if a else None


def _swishes(r: Rewrite) -> Iterator[tuple[Node, int, list[Node]]]:
    """(node, x, nodes within) of what makes x * min(max(x / 6 + 1/2, 0), 1)."""
    for n, _ in each(r, "HardSwish", all_=True):
        yield n, n.inputs[0], []
    keep = {v for n, _ in each(r, "HardSigmoid", "Clip", all_=True) for v in along(r, n.inputs[0])}
    for n, _ in each(r, "Mul", "Div", all_=True):
        c, factors, nodes = product(r, n.outputs[0], keep)
        for x, gate in (factors, factors[::-1]) if len(factors) == 2 else ():
            hard = r.maker(gate, "HardSigmoid", "Clip")
            if hard is None or not is_float(r, x):
                continue
            if hard.op.name == "HardSigmoid":
                own = attributes(hard)
                found = hard.inputs[0] == x and near(c, 1) and near(own.get("beta", 0.5), 0.5) \
                    and near(own.get("alpha", 0.2), 1 / 6)
                inner: list[Node] = []
            else:
                bounds = limits(r, hard)
                source, a, b, inner = affine(r, hard.inputs[0], x)
                found = source == x and bounds is not None and bounds[0] == 0 and near(bounds[1] * c, 1) \
                    and near(a * c, 1 / 6) and near(b * c, 0.5)
            if found:
                yield n, x, [*nodes, hard, *inner]
                break


FUSE = Pass("hardswish", fuse, always=False)
SPLIT = Pass("hardswish-to-hardsigmoid", split, always=False)
CLIPPED = Pass("hardswish-to-clip", clipped, always=False)
RELU = Pass("hardswish-to-relu", to_relu, exact=False, always=False)
SIGMOID_FUSE = Pass("hardsigmoid", sigmoid_fuse, always=False)
SIGMOID_SPLIT = Pass("hardsigmoid-to-clip", sigmoid_split, always=False)
PASSES = (FUSE, SPLIT, CLIPPED, SIGMOID_FUSE, SIGMOID_SPLIT, RELU)
