"""Activations that are straight on one side, and Clip: as other ones, or in simple operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from npulab.ir import Node
from npulab.passes.hard_swish import limits
from npulab.passes.patterns import At, any_wanted, each, is_float, opset, title, with_number
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

SELU = (1.6732632423543772, 1.0507009873554805)
"""alpha and gamma: Klambauer et al., arXiv:1706.02515."""


def prelu_split(r: Rewrite) -> list[str]:
    """PRelu and LeakyRelu become Relu(x) + slope * (x - Relu(x))."""
    done = []
    for n, own in each(r, "PRelu", "LeakyRelu"):
        at, x = At(r, n), n.inputs[0]
        positive = at.op("Relu", x)
        slope = n.inputs[1] if n.op.name == "PRelu" else float(own.get("alpha", 0.01))
        at.replace(at.op("Add", positive, at.op("Mul", at.op("Sub", x, positive), slope)))
        done.append(f"{title(n)}: {n.op.name} in Relu, Sub, Mul and Add")
    return done


def leaky_to_max(r: Rewrite) -> list[str]:
    """LeakyRelu with a slope of 0 to 1 becomes Max(x, slope * x)."""
    done = []
    for n, own in each(r, "LeakyRelu"):
        slope = float(own.get("alpha", 0.01))
        if 0 <= slope <= 1:
            at = At(r, n)
            at.replace(at.op("Max", n.inputs[0], at.op("Mul", n.inputs[0], slope)))
            done.append(f"{title(n)}: LeakyRelu is Max(x, {slope:g} x)")
    return done


def leaky_to_prelu(r: Rewrite) -> list[str]:
    """LeakyRelu becomes PRelu, with its one slope for all channels."""
    done = []
    for n, own in each(r, "LeakyRelu"):
        rank = len(r.values[n.inputs[0]].shape)
        dtype = r.values[n.inputs[0]].dtype.numpy
        slope = r.add_constant(f"{title(n)}_slope", np.full((1,) * max(rank - 1, 1), own.get("alpha", 0.01), dtype))
        r.change(n, op="PRelu", inputs=(n.inputs[0], slope), attributes={})
        done.append(f"{title(n)}: LeakyRelu is PRelu")
    return done


def prelu_to_leaky(r: Rewrite) -> list[str]:
    """PRelu with the same slope everywhere becomes LeakyRelu."""
    done = []
    for n, _ in each(r, "PRelu"):
        slopes = r.constant(n.inputs[1])
        if slopes is not None and slopes.size and (slopes == slopes.reshape(-1)[0]).all():
            r.change(n, op="LeakyRelu", inputs=n.inputs[:1], attributes={"alpha": float(slopes.reshape(-1)[0])})
            done.append(f"{title(n)}: PRelu is LeakyRelu")
    return done


def elu_split(r: Rewrite) -> list[str]:
    """Elu, Selu and Celu become Relu(x) + a (Exp(x - Relu(x)) - 1), whose Exp is at most 1, with each one's factors."""
    done = []
    for n, own in each(r, "Elu", "Selu", "Celu"):
        at, x = At(r, n), n.inputs[0]
        alpha, outer, inner = _elu(n, own)
        positive = at.op("Relu", x)
        below = at.op("Sub", x, positive)
        bend = at.op("Sub", at.op("Exp", below if inner == 1 else at.op("Mul", below, inner)), 1.0)
        total = at.op("Add", positive, bend if alpha == 1 else at.op("Mul", bend, alpha))
        at.replace(total if outer == 1 else at.op("Mul", total, outer))
        done.append(f"{title(n)}: {n.op.name} in Relu and Exp")
    return done


def elu_to_relu(r: Rewrite) -> list[str]:
    """Elu, Selu and Celu become Relu, which is off by up to their alpha (1 in most networks); Selu's factor is kept.
    The outputs change: RETRAINING is needed."""
    done = []
    for n, own in each(r, "Elu", "Selu", "Celu"):
        at, outer = At(r, n), _elu(n, own)[1]
        positive = at.op("Relu", n.inputs[0])
        at.replace(positive if outer == 1 else at.op("Mul", positive, outer))
        done.append(f"{title(n)}: {n.op.name} is Relu")
    return done


def leaky_to_relu(r: Rewrite) -> list[str]:
    """LeakyRelu and PRelu become Relu: what is below zero is off by slope * |x|, without a bound. The outputs change:
    RETRAINING is needed."""
    done = []
    for n, _ in each(r, "LeakyRelu", "PRelu"):
        r.change(n, op="Relu", inputs=n.inputs[:1], attributes={})
        done.append(f"{title(n)}: {n.op.name} is Relu")
    return done


def threshold_split(r: Rewrite) -> list[str]:
    """ThresholdedRelu becomes Where(x > threshold, x, 0)."""
    done = []
    for n, own in each(r, "ThresholdedRelu"):
        x = n.inputs[0]
        dtype = r.values[x].dtype.numpy
        zero, limit = (r.add_constant(f"{title(n)}_number", np.array(v, dtype))
                       for v in (0, own.get("alpha", 1.0)))
        yes = r.add_constant(f"{title(n)}_yes", np.array(True))
        above = r.add(n, f"{title(n)}_greater", "Greater", (x, limit), like=yes, shape=r.values[x].shape)
        r.change(n, op="Where", inputs=(above, x, zero), attributes={})
        done.append(f"{title(n)}: ThresholdedRelu is Where")
    return done


def clip_to_relu(r: Rewrite) -> list[str]:
    """Clip from 0 to anything becomes Relu(x); Clip(x, low, high) becomes low + Relu(x - low) - Relu(x - high)."""
    done = []
    for n, _ in each(r, "Clip"):
        bounds = limits(r, n)
        if bounds is None or not is_float(r, n.inputs[0]) or not -np.inf < bounds[0] <= bounds[1]:
            continue
        at, x, (low, high) = At(r, n), n.inputs[0], bounds
        value = at.op("Relu", at.op("Sub", x, low) if low else x)
        if high < _largest(r, x):
            value = at.op("Sub", value, at.op("Relu", at.op("Sub", x, high)))
        at.replace(at.op("Add", value, low) if low else value)
        done.append(f"{title(n)}: Clip in Relu")
    return done


def clip_to_min_max(r: Rewrite) -> list[str]:
    """Clip becomes Min(Max(x, low), high), and Min(Relu(x), high) if low is 0."""
    done = []
    for n, _ in each(r, "Clip"):
        bounds = limits(r, n)
        if bounds is None or not is_float(r, n.inputs[0]) or opset(r) < 8:
            continue
        at, value, (low, high) = At(r, n), n.inputs[0], bounds
        if low > -np.inf:
            value = at.op("Relu", value) if low == 0 else at.op("Max", value, low)
        if high < np.inf:
            value = at.op("Min", value, high)
        if value != n.inputs[0]:
            at.replace(value)
            done.append(f"{title(n)}: Clip is Min and Max")
    return done


def clip_fuse(r: Rewrite) -> list[str]:
    """Min and Max with numbers, one behind the other, or Relu and Min, become one Clip."""
    done = []
    for n, _ in each(r, "Min", "Max", all_=True):
        outer = with_number(r, n.outputs[0], "Min", "Max")
        if outer is None or opset(r) < 11 or not is_float(r, outer[1]):
            continue
        inner = with_number(r, outer[1], "Max" if n.op.name == "Min" else "Min")
        relu = r.maker(outer[1], "Relu") if n.op.name == "Min" else None
        if inner is None and relu is None:
            continue
        node, x, other = inner if inner is not None else (relu, relu.inputs[0] if relu else -1, 0.0)
        low, high = (other, outer[2]) if n.op.name == "Min" else (outer[2], other)
        if node is not None and low <= high and any_wanted(r, n, node):
            at = At(r, n)
            at.replace(at.op("Clip", x, float(low), float(high)))
            done.append(f"{title(n)}: Min and Max are Clip")
    return done


def _elu(n: Node, own: Mapping[str, Any]) -> tuple[float, float, float]:
    """(factor below zero, factor of all, factor of x) of Elu, Selu and Celu."""
    alpha = float(own.get("alpha", SELU[0] if n.op.name == "Selu" else 1.0))
    if n.op.name == "Selu":
        return alpha, float(own.get("gamma", SELU[1])), 1.0
    return alpha, 1.0, 1 / alpha if n.op.name == "Celu" else 1.0


def _largest(r: Rewrite, x: int) -> float:
    """What no number of the type exceeds: exporters write a missing limit so."""
    return float(np.finfo(str(r.values[x].dtype.value)).max)


PRELU = Pass("prelu-to-relu-parts", prelu_split, always=False)
LEAKY_MAX = Pass("leakyrelu-to-max", leaky_to_max, always=False)
LEAKY_PRELU = Pass("leakyrelu-to-prelu", leaky_to_prelu, always=False)
PRELU_LEAKY = Pass("prelu-to-leakyrelu", prelu_to_leaky, always=False)
ELU = Pass("elu-to-exp", elu_split, always=False)
THRESHOLD = Pass("thresholdedrelu-to-where", threshold_split, always=False)
CLIP_RELU = Pass("clip-to-relu", clip_to_relu, always=False)
CLIP_MIN_MAX = Pass("clip-to-min-max", clip_to_min_max, always=False)
CLIP_FUSE = Pass("min-max-to-clip", clip_fuse, always=False)
ELU_RELU = Pass("elu-to-relu", elu_to_relu, exact=False, always=False)
LEAKY_RELU = Pass("leakyrelu-to-relu", leaky_to_relu, exact=False, always=False)
PASSES = (LEAKY_PRELU, PRELU_LEAKY, LEAKY_MAX, PRELU, ELU, THRESHOLD, CLIP_FUSE, CLIP_MIN_MAX, CLIP_RELU, ELU_RELU,
          LEAKY_RELU)
