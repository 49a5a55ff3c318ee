"""Channels between convolutions, as many as the chip likes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from npulab.ir import Node
from npulab.ir.ops import OnnxOp
from npulab.passes.joins import BINARY, POINTWISE
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import WEIGHTS_MAX, Convolution, attributes, convolution, floats, image

POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
FINITE = frozenset(POINTWISE)
"""Functions that make a finite number of zero: weights of zero take it away again."""


@dataclass(slots=True)
class Tensor:
    """Tensors with the same channels: what makes them, what carries them on, what reads them at last."""

    values: set[int] = field(default_factory=set)
    makers: dict[int, Convolution] = field(default_factory=dict)
    inner: dict[int, Node] = field(default_factory=dict)
    readers: dict[int, Convolution] = field(default_factory=dict)


def pad(r: Rewrite) -> list[str]:
    """Channels that convolutions give and only convolutions of one group take, functions of single numbers, pools,
    depthwise convolutions, sums and products of them between, are filled up with zeros to a multiple of NUMBER (8).
    Inputs and outputs of the network stay as they are, and so does what is joined by Concat."""
    done = []
    number = r.number or 8
    if r.off is not None:  # which multiple a board wants, its rules do not say in a way that helps here
        return []
    seen: set[int] = set()
    for n in r.live():
        if n.index >= len(r.source.nodes):
            break
        if not n.outputs or n.outputs[0] in seen:
            continue
        shape, c = image(r, n.outputs[0]), convolution(r, n)
        if c is None or c.groups != 1 or shape is None or shape[1] % number == 0:
            continue
        t = Tensor()
        fits = _spread(r, n.outputs[0], t)
        seen |= t.values
        if not fits:
            continue
        extra = -shape[1] % number
        if any((len(k.weights) + extra) * (k.channels + extra) * k.kernel[0] * k.kernel[1] > WEIGHTS_MAX
               for k in (*t.makers.values(), *t.readers.values())):
            continue
        _widen(r, t, shape[1], extra)
        names = [c.name for c in t.makers.values()]
        done.append(f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: {shape[1]} channels are "
                    f"{shape[1] + extra}")
    return done


def _spread(r: Rewrite, value: int, t: Tensor) -> bool:
    """Put into `t` all that has the channels of a value. False if something there cannot have more of them."""
    todo = [value]
    while todo:
        v = todo.pop()
        if v in t.values:
            continue
        t.values.add(v)
        maker = r.maker(v)
        if maker is None or v in r.outputs or image(r, v) is None:
            return False
        if maker.index not in t.inner:
            c = convolution(r, maker)
            if c is not None and c.groups == 1:
                t.makers[maker.index] = c
            elif not _carries(r, maker, c):
                return False
            else:
                t.inner[maker.index] = maker
                todo += _carried(r, maker)
        for n in r.readers(v):
            c = convolution(r, n)
            if c is not None and c.groups == 1 and n.inputs[0] == v:
                t.readers[n.index] = c
            elif _carries(r, n, c):
                t.inner[n.index] = n
                todo += [*n.outputs, *_carried(r, n)]
            else:
                return False
    return bool(t.readers)


def _carried(r: Rewrite, n: Node) -> Iterator[int]:
    """Inputs that are images, not constants."""
    return (v for v in n.inputs if v >= 0 and not r.values[v].is_constant)


def _carries(r: Rewrite, n: Node, c: Convolution | None) -> bool:
    """Whether the node gives as many channels as it reads, each from its own, and zeros give finite numbers."""
    if not isinstance(n.op, OnnxOp) or n.op.domain or len(n.outputs) != 1:
        return False
    shape = image(r, n.outputs[0])
    if shape is None:
        return False
    if c is not None:
        return c.depthwise and len(c.weights) == c.channels
    if n.op.name in POOLS:
        return True
    if n.op.name in FINITE:
        return all(v < 0 or ((k := r.constant(v)) is not None and k.size == 1) for v in n.inputs[1:])
    if n.op.name not in BINARY or len(n.inputs) != 2:
        return False
    if n.op.name == "Div" and floats(r, n.inputs[1]) is None:
        return False  # by zeros
    for v in n.inputs:
        constant = floats(r, v)
        if r.values[v].is_constant and (constant is None or not (
                constant.size == 1 or (constant.ndim >= 3 and constant.shape[-3] == shape[1]
                                       and constant.size == shape[1]))):
            return False
        if not r.values[v].is_constant and (image(r, v) or (0, 0))[1] != shape[1]:
            return False
    return True


def _widen(r: Rewrite, t: Tensor, old: int, extra: int) -> None:
    both = t.makers.keys() & t.readers.keys()
    for i, c in t.makers.items():
        weights = np.pad(c.weights, ((0, extra), (0, extra if i in both else 0), (0, 0), (0, 0)))
        _put(r, c, weights, extra)
    for i, c in t.readers.items():
        if i not in both:
            _put(r, c, np.pad(c.weights, ((0, 0), (0, extra), (0, 0), (0, 0))), 0)
    for n in t.inner.values():
        depthwise = convolution(r, n)
        if depthwise is not None:
            weights = np.pad(depthwise.weights, ((0, extra), (0, 0), (0, 0), (0, 0)))
            _put(r, depthwise, weights, extra, groups=old + extra)
            continue
        inputs = list(n.inputs)
        for k, v in enumerate(inputs):
            constant = floats(r, v) if v >= 0 else None
            if constant is not None and constant.size == old > 1 and constant.ndim >= 3:
                # a one is harmless for products and quotients, and for the others no worse than anything finite
                sides = [(0, 0)] * (constant.ndim - 3) + [(0, extra), (0, 0), (0, 0)]
                inputs[k] = r.add_constant(f"{n.name or n.op.name}_wide", np.pad(constant, sides, constant_values=1))
        r.change(n, inputs=inputs)
    for v in t.values:
        shape = list(r.values[v].shape)
        shape[1] = old + extra
        r.values[v] = replace(r.values[v], shape=tuple(shape))


def _put(r: Rewrite, c: Convolution, weights: NDArray[np.float32], extra: int, groups: int | None = None) -> None:
    bias = floats(r, c.bias)
    inputs = [c.node.inputs[0], r.add_constant(f"{c.name}_weights", weights.astype(np.float32))]
    if bias is not None:
        inputs.append(r.add_constant(f"{c.name}_bias", np.pad(bias, (0, extra))))
    r.change(c.node, inputs=inputs, attributes=attributes(c.node) | ({"group": groups} if groups else {}))


PASS = Pass("pad-channels", pad, always=False, number=8)
