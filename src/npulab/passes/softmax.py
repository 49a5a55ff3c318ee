"""Softmax: along another axis, of another rank, or in the operators that it is."""

from __future__ import annotations

import math
from collections.abc import Iterator

from npulab.ir import Node
from npulab.passes.patterns import At, attributes, each, is_float, opset, shape_of, title
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def along_last(r: Rewrite) -> list[str]:
    """Softmax or LogSoftmax along another axis than the last becomes Transpose, Softmax along the last, and Transpose
    back."""
    done = []
    for n, shape, axis in _found(r):
        if axis == len(shape) - 1:
            continue
        at, perm = At(r, n), list(range(len(shape)))
        perm[axis], perm[-1] = perm[-1], perm[axis]
        y = at.op(n.op.name, at.transpose(n.inputs[0], perm), axis=len(shape) - 1)
        at.replace(at.transpose(y, perm))
        done.append(f"{title(n)}: along the last axis instead of axis {axis}")
    return done


def rows(r: Rewrite) -> list[str]:
    """Softmax or LogSoftmax along the last axis of more than two becomes one of the rows of a matrix, between two
    Reshapes."""
    done = []
    for n, shape, axis in _found(r):
        if axis == len(shape) - 1 and len(shape) > 2:
            at = At(r, n)
            flat = at.reshape(n.inputs[0], (math.prod(shape[:-1]), shape[-1]))
            at.replace(at.reshape(at.op(n.op.name, flat, axis=1), shape))
            done.append(f"{title(n)}: {n.op.name} of a matrix")
    return done


def split(r: Rewrite) -> list[str]:
    """Softmax becomes ReduceMax, Sub, Exp, ReduceSum and Div; LogSoftmax the same up to the sum, then Log and Sub."""
    done = []
    for n, _, axis in _found(r):
        at, x = At(r, n), n.inputs[0]
        x = at.op("Sub", x, at.reduce("ReduceMax", x, [axis]))
        e = at.op("Exp", x)
        total = at.reduce("ReduceSum", e, [axis])
        at.replace(at.op("Div", e, total) if n.op.name == "Softmax" else at.op("Sub", x, at.op("Log", total)))
        done.append(f"{title(n)}: {n.op.name} spelled out")
    return done


def _found(r: Rewrite) -> Iterator[tuple[Node, tuple[int, ...], int]]:
    """(node, shape, axis from 0); before opset 13 the operator was another."""
    for n, _ in each(r, "Softmax", "LogSoftmax"):
        shape = shape_of(r, n.inputs[0])
        if shape and opset(r) >= 13 and is_float(r, n.inputs[0]):
            yield n, shape, int(attributes(n).get("axis", -1)) % len(shape)


LAST = Pass("softmax-last-axis", along_last, always=False)
ROWS = Pass("softmax-rows", rows, always=False)
SPLIT = Pass("softmax-split", split, always=False)
PASSES = (LAST, ROWS, SPLIT)
