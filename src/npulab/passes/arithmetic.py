"""Arithmetic with numbers, in the operators that more chips have."""

from __future__ import annotations

import numpy as np

from npulab.passes.patterns import At, each, is_float, present, scalar, title
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def div_to_mul(r: Rewrite) -> list[str]:
    """Div by constants, none of them 0, becomes Mul with their reciprocals."""
    done = []
    for n, _ in each(r, "Div"):
        c = r.constant(n.inputs[1])
        if c is None or not is_float(r, n.inputs[1]) or r.constant(n.inputs[0]) is not None or not c.all():
            continue
        inverse = (1 / c.astype(np.float64)).astype(c.dtype)
        if np.isfinite(inverse).all():
            r.change(n, op="Mul", inputs=(n.inputs[0], r.add_constant(f"{title(n)}_inverse", inverse)))
            done.append(f"{title(n)}: Div is Mul with the reciprocal")
    return done


def sub_to_add(r: Rewrite) -> list[str]:
    """Sub of constants becomes Add of their negatives."""
    done = []
    for n, _ in each(r, "Sub"):
        c = r.constant(n.inputs[1])
        if c is not None and is_float(r, n.inputs[1]) and r.constant(n.inputs[0]) is None:
            r.change(n, op="Add", inputs=(n.inputs[0], r.add_constant(f"{title(n)}_negative", np.negative(c))))
            done.append(f"{title(n)}: Sub is Add of the negative")
    return done


def square_to_mul(r: Rewrite) -> list[str]:
    """Pow with an exponent of 2 or 3 becomes Mul, with 0.5 Sqrt."""
    done = []
    for n, _ in each(r, "Pow"):
        at, x, exponent = At(r, n), n.inputs[0], scalar(r, n.inputs[1])
        if exponent not in (2, 3, 0.5) or not is_float(r, x) or len(r.values[n.inputs[1]].shape) > len(
                r.values[x].shape):
            continue
        at.replace(at.op("Sqrt", x) if exponent == 0.5 else at.op("Mul", at.op("Mul", x, x) if exponent == 3 else x, x))
        done.append(f"{title(n)}: Pow {exponent:g} is {'Sqrt' if exponent == 0.5 else 'Mul'}")
    return done


def neg_to_mul(r: Rewrite) -> list[str]:
    """Neg of floats becomes Mul with the number -1."""
    done = []
    for n, _ in each(r, "Neg"):
        if is_float(r, n.inputs[0]):
            at = At(r, n)
            at.replace(at.op("Mul", n.inputs[0], -1.0))
            done.append(f"{title(n)}: Neg is Mul with -1")
    return done


def abs_to_relu(r: Rewrite) -> list[str]:
    """Abs becomes Relu(x) + Relu(-x), the minus as Mul with -1."""
    done = []
    for n, _ in each(r, "Abs"):
        if is_float(r, n.inputs[0]):
            at, x = At(r, n), n.inputs[0]
            at.replace(at.op("Add", at.op("Relu", x), at.op("Relu", at.op("Mul", x, -1.0))))
            done.append(f"{title(n)}: Abs is Relu(x) + Relu(-x)")
    return done


def reciprocal_to_div(r: Rewrite) -> list[str]:
    """Reciprocal becomes Div, of the number 1 by the tensor."""
    done = []
    for n, _ in each(r, "Reciprocal"):
        one = r.add_constant(f"{title(n)}_one", np.array(1, r.values[n.inputs[0]].dtype.numpy))
        r.change(n, op="Div", inputs=(one, n.inputs[0]))
        done.append(f"{title(n)}: Reciprocal is Div")
    return done


def sum_to_add(r: Rewrite) -> list[str]:
    """Sum of several tensors becomes Adds, one behind the other."""
    done = []
    for n, _ in each(r, "Sum"):
        if present(n, 1):
            at, value = At(r, n), n.inputs[0]
            for v in n.inputs[1:]:
                a, b = (r.values[i].shape for i in (value, v))
                value = at.op("Add", value, v, shape=np.broadcast_shapes(a, b))
            at.replace(value)
            done.append(f"{title(n)}: Sum is {len(n.inputs) - 1} Add{'s' if len(n.inputs) > 2 else ''}")
    return done


PASSES = (Pass("div-to-mul", div_to_mul, always=False), Pass("sub-to-add", sub_to_add, always=False),
          Pass("pow-to-mul", square_to_mul, always=False), Pass("neg-to-mul", neg_to_mul, always=False),
          Pass("abs-to-relu", abs_to_relu, always=False), Pass("reciprocal-to-div", reciprocal_to_div, always=False),
          Pass("sum-to-add", sum_to_add, always=False))
