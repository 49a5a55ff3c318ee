"""InstanceNormalization and GroupNormalization in simpler operators (Wu, He, arXiv:1803.08494)."""

from __future__ import annotations

import numpy as np

from npulab.passes.patterns import At, each, opset, shape_of, title
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def instance_split(r: Rewrite) -> list[str]:
    """InstanceNormalization becomes ReduceMean, Sub, Mul, ReduceMean, Add, Sqrt, Div, Mul and Add."""
    done = []
    for n, own in each(r, "InstanceNormalization"):
        shape = shape_of(r, n.inputs[0])
        scale, shift = r.constant(n.inputs[1]), r.constant(n.inputs[2])
        if shape is None or len(shape) < 3 or scale is None or shift is None:
            continue
        at, axes, ones = At(r, n), range(2, len(shape)), (1,) * (len(shape) - 2)
        x = at.op("Sub", n.inputs[0], at.reduce("ReduceMean", n.inputs[0], axes))
        variance = at.reduce("ReduceMean", at.op("Mul", x, x), axes)
        root = at.op("Sqrt", at.op("Add", variance, float(own.get("epsilon", 1e-5))))
        a, b = (r.add_constant(f"{at.name}_{k}", c.reshape(-1, *ones)) for k, c in (("scale", scale), ("shift", shift)))
        at.replace(at.op("Add", at.op("Mul", at.op("Div", x, root), a), b))
        done.append(f"{title(n)}: InstanceNormalization spelled out")
    return done


def group_to_instance(r: Rewrite) -> list[str]:
    """GroupNormalization becomes InstanceNormalization of the groups as channels, between two Reshapes, and Mul and Add
    for the channels."""
    done = []
    for n, own in each(r, "GroupNormalization"):
        shape, groups = shape_of(r, n.inputs[0]), int(own["num_groups"])
        scale, shift = r.constant(n.inputs[1]), r.constant(n.inputs[2])
        dtype = r.values[n.inputs[0]].dtype.numpy
        if shape is None or len(shape) < 3 or scale is None or shift is None or not groups or shape[1] % groups:
            continue
        at, ones = At(r, n), (1,) * (len(shape) - 2)
        x = at.reshape(n.inputs[0], (shape[0], groups, -1))
        unit, zero = (r.add_constant(f"{at.name}_{k}", np.full(groups, k, dtype)) for k in (1, 0))
        x = at.op("InstanceNormalization", x, unit, zero, epsilon=float(own.get("epsilon", 1e-5)))
        x = at.reshape(x, shape)
        if opset(r) < 21:  # until then a scale for each group
            scale, shift = (np.repeat(c, shape[1] // groups) for c in (scale, shift))
        a, b = (r.add_constant(f"{at.name}_{k}", c.reshape(-1, *ones)) for k, c in (("scale", scale), ("shift", shift)))
        at.replace(at.op("Add", at.op("Mul", x, a), b))
        done.append(f"{title(n)}: InstanceNormalization of {groups} groups")
    return done


INSTANCE = Pass("instance-norm-split", instance_split, always=False)
GROUP = Pass("group-norm-to-instance-norm", group_to_instance, always=False)
PASSES = (GROUP, INSTANCE)
