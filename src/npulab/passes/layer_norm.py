"""LayerNormalization and RMSNormalization: one operator, or the arithmetic that it is.

Ba et al., arXiv:1607.06450; Zhang, Sennrich, arXiv:1910.07467. In 8 bits the squares lose most of what they have: keep
these nodes in 16 bits or floats where the vendor's tool allows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npulab.ir import Node
from npulab.passes.patterns import (
    At,
    any_wanted,
    attributes,
    each,
    is_float,
    near,
    present,
    raised,
    reduced,
    scalar,
    shape_of,
    title,
    with_number,
)
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

Root = Callable[[At, int, int], int]
"""(where, x, v) -> x / sqrt(v)."""


def split(r: Rewrite) -> list[str]:
    """LayerNormalization becomes ReduceMean, Sub, Mul, ReduceMean, Add, Sqrt, Div, Mul and Add; RMSNormalization the
    same without the mean."""
    return _split(r, lambda at, x, v: at.op("Div", x, at.op("Sqrt", v)))


def split_by_power(r: Rewrite) -> list[str]:
    """As layer-norm-split, for chips without division: x * Pow(v, -0.5)."""
    return _split(r, lambda at, x, v: at.op("Mul", x, at.op("Pow", v, -0.5)))


def split_by_log(r: Rewrite) -> list[str]:
    """As layer-norm-split, for chips without division and roots: x * Exp(-Log(v) / 2), both of them tables there."""
    return _split(r, lambda at, x, v: at.op("Mul", x, at.op("Exp", at.op("Mul", at.op("Log", v), -0.5))))


def fuse(r: Rewrite) -> list[str]:
    """(x - mean) / sqrt(mean of its square + e), times a scale, plus a shift, all spelled out, becomes
    LayerNormalization, an operator of opset 17, to which the network is raised."""
    done = []
    for n, _ in each(r, "Div", all_=True):
        found = _spelled(r, n)
        if found is None:
            continue
        x, axis, epsilon, nodes = found
        last, scale = _behind(r, n.outputs[0], "Mul", axis, x)
        end, shift = _behind(r, last, "Add", axis, x)
        tail = [m for v in (last, end) if (m := r.maker(v)) is not None]
        if not any_wanted(r, n, *nodes, *tail) or not raised(r, 17):
            continue
        shape = r.values[x].shape[axis:]
        scales = scale if scale is not None else np.ones(shape, r.values[x].dtype.numpy)
        inputs = [x, r.add_constant(f"{title(n)}_scale", np.broadcast_to(scales, shape))]
        if shift is not None:
            inputs.append(r.add_constant(f"{title(n)}_shift", np.broadcast_to(shift, shape)))
        made = r.add(tail[-1], f"{title(n)}_layer_norm", "LayerNormalization", inputs,
                     {"axis": axis - len(r.values[x].shape), "epsilon": epsilon})
        r.substitute(end, made)
        done.append(f"{title(n)}: LayerNormalization of {len(shape)} ax{'i' if len(shape) == 1 else 'e'}s")
    return done


def _split(r: Rewrite, over: Root) -> list[str]:
    done = []
    for n, own in each(r, "LayerNormalization", "RMSNormalization"):
        if len([v for v in n.outputs if v >= 0]) != 1 or not r.values[n.inputs[0]].has_shape \
                or not is_float(r, n.inputs[0]):
            continue
        at, x, rank = At(r, n), n.inputs[0], len(r.values[n.inputs[0]].shape)
        axes = range(int(own.get("axis", -1)) % rank, rank)
        if n.op.name == "LayerNormalization":
            x = at.op("Sub", x, at.reduce("ReduceMean", x, axes))
        square = at.reduce("ReduceMean", at.op("Mul", x, x), axes)
        value = at.op("Mul", over(at, x, at.op("Add", square, float(own.get("epsilon", 1e-5)))), n.inputs[1])
        at.replace(at.op("Add", value, n.inputs[2]) if present(n, 2) else value)
        done.append(f"{title(n)}: {n.op.name} spelled out")
    return done


def _spelled(r: Rewrite, n: Node) -> tuple[int, int, float, list[Node]] | None:
    """(x, first axis, epsilon, nodes) if the Div ends a normalization."""
    centred, root = r.maker(n.inputs[0], "Sub"), r.maker(n.inputs[1], "Sqrt")
    if centred is None or root is None:
        return None
    added = with_number(r, root.inputs[0], "Add")
    mean = r.maker(centred.inputs[1], "ReduceMean")
    variance = r.maker(added[1], "ReduceMean") if added is not None else None
    if added is None or mean is None or variance is None or mean.inputs[0] != centred.inputs[0]:
        return None
    x = mean.inputs[0]
    square = r.maker(variance.inputs[0], "Mul", "Pow")
    own, theirs = reduced(r, mean), reduced(r, variance)
    rank = len(r.values[x].shape)
    if square is None or own is None or own != theirs or not own[1] or not own[0] \
            or own[0] != tuple(range(own[0][0], rank)) or shape_of(r, x) is None:
        return None
    if not all(_is_centred(r, v, x, mean) for v in square.inputs[: 2 if square.op.name == "Mul" else 1]):
        return None
    if square.op.name == "Pow" and not near(scalar(r, square.inputs[1]), 2):
        return None
    return x, own[0][0], added[2], [centred, root, added[0], mean, variance, square]


def _is_centred(r: Rewrite, value: int, x: int, mean: Node) -> bool:
    """Whether a value is x minus its mean; exporters compute it twice."""
    n = r.maker(value, "Sub")
    other = r.maker(n.inputs[1], "ReduceMean") if n is not None else None
    return n is not None and other is not None and n.inputs[0] == x and other.inputs[0] == x \
        and attributes(other) == attributes(mean) and other.inputs[1:] == mean.inputs[1:]


def _behind(r: Rewrite, value: int, name: str, axis: int, x: int) -> tuple[int, Any]:
    """(value, constant) behind an operator with a constant that spreads over the normalized axes, if one follows."""
    n = r.only_reader(value, name)
    shape = r.values[x].shape[axis:]
    for v in n.inputs if n is not None else ():
        constant = r.constant(v)
        if n is not None and constant is not None and constant.ndim <= len(shape) and all(
                a in (1, b) for a, b in zip(constant.shape[::-1], shape[::-1], strict=False)):
            return n.outputs[0], constant
    return value, None


SPLIT = Pass("layer-norm-split", split, always=False)
POWER = Pass("layer-norm-split-pow", split_by_power, always=False)
LOG = Pass("layer-norm-split-log", split_by_log, always=False)
FUSE = Pass("layer-norm", fuse, always=False)
PASSES = (FUSE, SPLIT, POWER, LOG)
