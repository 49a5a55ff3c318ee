"""Joins and splits of channels beside convolutions, taken into the convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np

from npulab.ir import Node
from npulab.ir.ops import OnnxOp
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import (
    Convolution,
    add,
    add_conv,
    add_sum,
    captured,
    convolution,
    floats,
    image,
    nodes,
    number,
)

POINTWISE = ("Relu", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Clip", "Elu", "Softplus", "Mish",
             "Gelu", "Identity", "Neg", "Abs", "Exp", "Sqrt", "Erf", "Softsign", "Selu", "Celu")
"""Functions of one number, whose other inputs, if any, are constants for all numbers alike."""
BETWEEN_MAX = 16
"""Nodes between a convolution and a Split."""
BINARY = ("Add", "Mul", "Sub", "Div")


def to_sums(r: Rewrite) -> list[str]:
    """A Concat along channels that only convolutions of one group read is none: each convolution is the sum of
    convolutions of the parts. As many multiplications; an addition for each part after the first."""
    done = []
    inside = captured(r)
    for n in nodes(r, "Concat"):
        shapes = [image(r, v) for v in n.inputs]
        readers = r.readers(n.outputs[0])
        convs = [convolution(r, reader) for reader in readers]
        if number(n, "axis", 0) not in (1, -3) or n.outputs[0] in r.outputs or not readers \
                or any(s is None for s in shapes) or any(c is None or c.groups != 1 for c in convs) or len(shapes) < 2 \
                or any(not inside.isdisjoint(m.outputs) for m in readers):
            continue
        ends = np.cumsum([s[1] for s in shapes if s is not None]).tolist()
        for c in convs:
            assert c is not None
            parts = []
            for k, (value, start, end) in enumerate(zip(n.inputs, [0, *ends[:-1]], ends, strict=True)):
                parts.append(add_conv(r, c.node, f"{c.name}_of_{k}", value, c.weights[:, start:end],
                                      c.bias if k == 0 else -1, strides=c.strides, dilations=c.dilations, pads=c.pads))
            r.substitute(c.node.outputs[0], add_sum(r, c.node, c.name, parts))
        done.append(f"{n.name or 'Concat'}: {len(n.inputs)} parts, read by "
                    f"{len(convs)} convolution{'s' if len(convs) > 1 else ''}")
    return done


def to_convolutions(r: Rewrite) -> list[str]:
    """A Split along channels of what one convolution of one group gives, functions of single numbers between them, is a
    convolution for each part with those functions behind it. As many multiplications."""
    done = []
    for n in nodes(r, "Split"):
        source = image(r, n.inputs[0])
        shapes = [image(r, v) if v >= 0 else None for v in n.outputs]
        if source is None or number(n, "axis", 0) not in (1, -3) or any(s is None for s in shapes):
            continue
        between: dict[int, Node] = {}
        if not _reachable(r, n.inputs[0], source, between) or any(
                v in r.outputs or {m.index for m in r.readers(v)} - between.keys() - {n.index}
                for m in between.values() for v in m.outputs):
            continue
        start = 0
        for v, shape in zip(n.outputs, shapes, strict=True):
            assert shape is not None
            r.substitute(v, _part(r, n, n.inputs[0], start, start + shape[1], {}))
            start += shape[1]
        done.append(f"{n.name or 'Split'}: {len(n.outputs)} convolutions")
    return done


def _reachable(r: Rewrite, value: int, shape: tuple[int, ...], found: dict[int, Node]) -> bool:
    """Whether parts of the channels can be computed alone; `found` gets the nodes that do it, by their index."""
    n = r.maker(value)
    if n is None or len(n.outputs) != 1 or image(r, value) != shape or len(found) >= BETWEEN_MAX:
        return False
    if n.index in found:
        return True
    c = convolution(r, n)
    found[n.index] = n
    if c is not None:
        return c.groups == 1
    if n.op.name in POINTWISE:
        return all(v < 0 or _size(r, v) == 1 for v in n.inputs[1:]) and _reachable(r, n.inputs[0], shape, found)
    if n.op.name not in BINARY or len(n.inputs) != 2:
        return False
    return any(not r.values[v].is_constant for v in n.inputs) and all(
        _size(r, v) == 1 or (floats(r, v) is not None and r.values[v].shape[-3:] == (shape[1], 1, 1))
        if r.values[v].is_constant else _reachable(r, v, shape, found) for v in n.inputs)


def _size(r: Rewrite, value: int) -> int:
    found = r.constant(value)
    return -1 if found is None else found.size


def _part(r: Rewrite, before: Node, value: int, start: int, end: int, made: dict[int, int]) -> int:
    """Channels of a value, computed alone in front of `before`."""
    if value in made:
        return made[value]
    n = r.maker(value)
    assert n is not None
    assert isinstance(n.op, OnnxOp)
    c: Convolution | None = convolution(r, n)
    name = f"{n.name or n.op.name}_from_{start}"
    if c is not None:
        bias = floats(r, c.bias)
        made[value] = add_conv(
            r, before, name, c.data, c.weights[start:end],
            r.add_constant(f"{name}_bias", bias[start:end]) if bias is not None else -1,
            strides=c.strides, dilations=c.dilations, pads=c.pads)
        return made[value]
    inputs: list[int] = []
    for v in n.inputs:
        if v < 0 or _size(r, v) == 1:
            inputs.append(v)
        elif r.values[v].is_constant:
            constant: Any = r.constant(v)
            inputs.append(r.add_constant(f"{name}_constant", constant[..., start:end, :, :]))
        else:
            inputs.append(_part(r, before, v, start, end, made))
    like = next(v for v in inputs if v >= 0 and not r.values[v].is_constant)
    made[value] = add(r, before, name, n.op.name, inputs, n.op.attributes, like=like)
    return made[value]


CONCAT = Pass("concat-to-sums", to_sums, always=False)
SPLIT = Pass("split-to-convolutions", to_convolutions, always=False)
