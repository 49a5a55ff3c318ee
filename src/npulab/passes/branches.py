"""Parallel convolutions of one tensor whose results are added: one convolution (RepVGG's re-parameterization)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.ir import Node
from npulab.ir.ops import OnnxOp
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def merge(r: Rewrite) -> list[str]:
    """The sum of two convolutions of one tensor, with equal strides and groups and centred odd kernels, is one
    convolution: the smaller kernel is padded with zeros and added. A BatchNormalization of the tensor itself counts as
    a 1x1 convolution, and so does the tensor (Ding et al. 2021)."""
    done = []
    for n in r.live():
        add = n.op
        if not isinstance(add, OnnxOp) or add.domain or add.name != "Add":
            continue
        for main, other in (n.inputs, n.inputs[::-1]):
            first = r.maker(main, "Conv")
            if first is None or r.only_reader(main) is None:
                continue
            a = _kernel(r, first)
            b = _branch(r, other, first, a) if a is not None else None
            if a is None or b is None:
                continue
            weights = _sum(a[0], b[0])
            name = n.name or "sum"
            assert isinstance(first.op, OnnxOp)
            ky, kx = weights.shape[2:]
            attributes = {**first.op.attributes, "kernel_shape": (ky, kx),
                          "pads": (ky // 2, kx // 2, ky // 2, kx // 2)}
            attributes.pop("auto_pad", None)
            r.change(first, attributes=attributes, inputs=(
                first.inputs[0], r.add_constant(f"{name}_weights", weights.astype(np.float32)),
                r.add_constant(f"{name}_bias", (a[1] + b[1]).astype(np.float32))))
            r.substitute(n.outputs[0], main)
            done.append(f"{n.name or add.name}: one convolution of {ky}x{kx}, {first.name or first.op.name}")
            break
    return done


Kernel = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Weights (O, I/groups, ky, kx) and bias."""


def _kernel(r: Rewrite, n: Node) -> Kernel | None:
    """A 2-D convolution with odd kernels, padded to the centre, without dilation."""
    assert isinstance(n.op, OnnxOp)
    weights = r.constant(n.inputs[1])
    has_bias = len(n.inputs) > 2 and n.inputs[2] >= 0
    if weights is None or weights.ndim != 4 or weights.dtype != np.float32:
        return None
    bias = r.constant(n.inputs[2]) if has_bias else np.zeros(weights.shape[0])
    ky, kx = weights.shape[2:]
    pads: Any = n.op.attributes.get("pads", (0, 0, 0, 0))
    dilations: Any = n.op.attributes.get("dilations", (1, 1))
    automatic = n.op.attributes.get("auto_pad", "NOTSET")
    if bias is None or ky % 2 == 0 or kx % 2 == 0 or tuple(pads) != (ky // 2, kx // 2) * 2 \
            or tuple(dilations) != (1, 1) or automatic not in ("NOTSET", "VALID" if ky == kx == 1 else "NOTSET"):
        return None
    return weights.astype(np.float64), bias.astype(np.float64)


def _branch(r: Rewrite, value: int, first: Node, main: Kernel) -> Kernel | None:
    """What the other operand is, as a convolution of what `first` reads, with its stride and groups."""
    assert isinstance(first.op, OnnxOp)
    groups: Any = first.op.attributes.get("group", 1)
    strides: Any = first.op.attributes.get("strides", (1, 1))
    outputs, inputs = main[0].shape[0], main[0].shape[1] * groups
    source = first.inputs[0]
    if value == source and outputs == inputs and tuple(strides) == (1, 1):
        return _identity(np.ones(outputs), inputs // groups), np.zeros(outputs)
    other = r.maker(value, "Conv", "BatchNormalization")
    if other is None or other.inputs[0] != source or r.only_reader(value) is None:
        return None
    assert isinstance(other.op, OnnxOp)
    if other.op.name == "Conv":
        theirs: Any = other.op.attributes.get("strides", (1, 1))
        alike = tuple(theirs) == tuple(strides) and other.op.attributes.get("group", 1) == groups
        found = _kernel(r, other) if alike else None
        return found if found is not None and found[0].shape[:2] == main[0].shape[:2] else None
    constants = [r.constant(v) for v in other.inputs[1:5]]
    if any(c is None for c in constants) or outputs != inputs or tuple(strides) != (1, 1) \
            or other.op.attributes.get("training_mode"):
        return None
    gamma, beta, mean, variance = (np.asarray(c, np.float64) for c in constants)
    epsilon: Any = other.op.attributes.get("epsilon", 1e-5)
    scale = gamma / np.sqrt(variance + epsilon)
    return _identity(scale, inputs // groups), beta - mean * scale


def _identity(scale: NDArray[np.float64], per_group: int) -> NDArray[np.float64]:
    weights = np.zeros((len(scale), per_group, 1, 1))
    weights[np.arange(len(scale)), np.arange(len(scale)) % per_group, 0, 0] = scale
    return weights


def _sum(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two kernels on one centre."""
    ky, kx = (max(m, n) for m, n in zip(a.shape[2:], b.shape[2:], strict=True))
    out = np.zeros((*a.shape[:2], ky, kx))
    for w in (a, b):
        y, x = (ky - w.shape[2]) // 2, (kx - w.shape[3]) // 2
        out[:, :, y : y + w.shape[2], x : x + w.shape[3]] += w
    return out


PASS = Pass("branches", merge)
