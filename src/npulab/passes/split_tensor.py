"""Tensors over a chip's limits, in parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from npulab.ir import Node
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import (
    Convolution,
    Pads,
    Pair,
    add,
    add_concat,
    add_conv,
    add_slice,
    add_sum,
    attributes,
    convolution,
    floats,
    image,
    nodes,
    opset,
    whole,
    window,
)

SIDE_MIN = 240
"""Rows or columns that no chip at hand finds too many."""
POOLS = ("MaxPool", "AveragePool")


def rows(r: Rewrite) -> list[str]:
    """A convolution or pool over an image of more than NUMBER (2048) rows or columns is two of halves, with the rows
    that both read in both, and a Concat; again until no part is larger. For a board, also smaller images that it does
    not take, down to 240."""
    done = []
    limit = (r.number or 2048) if r.off is None else SIDE_MIN
    for n in nodes(r, "Conv", *POOLS):
        c = convolution(r, n)
        shape, a = image(r, n.inputs[0]), attributes(n)
        sides = c.kernel if c is not None else whole(n, "kernel_shape")
        if shape is None or max(shape[2:]) <= limit or (c is None and n.op.name == "Conv") or len(sides) != 2 \
                or a.get("ceil_mode") or len(n.outputs) != 1:
            continue
        kernel = (sides[0], sides[1])
        found = window(r, n, kernel)
        axis = 0 if shape[2] >= shape[3] else 1
        if found is None or found[4][axis] < 2 or r.values[n.outputs[0]].shape[2:] != found[4]:
            continue
        out, name = found[4][axis], n.name or n.op.name
        middle = -(-out // 2)
        parts = [_part(r, n, c, kernel, found, axis, ends) for ends in ((0, middle), (middle, out))]
        if None in parts:
            continue
        r.substitute(n.outputs[0], add_concat(r, n, f"{name}_join", [p for p in parts if p is not None], 2 + axis))
        done.append(f"{name}: {'rows' if axis == 0 else 'columns'} in two parts")
    return done


def _part(r: Rewrite, n: Node, c: Convolution | None, kernel: Pair,
          found: tuple[Pair, Pair, Pads, Pair, Pair], axis: int, ends: Pair) -> int | None:
    """Rows (columns) of the result from ends[0] to ends[1]; None where they read nothing but padding."""
    strides, dilations, pads, size, out = found
    start = ends[0] * strides[axis] - pads[axis]
    stop = (ends[1] - 1) * strides[axis] - pads[axis] + (kernel[axis] - 1) * dilations[axis] + 1
    own = list(pads)
    own[axis], own[axis + 2] = max(-start, 0), max(stop - size[axis], 0)
    first, last = max(start, 0), min(stop, size[axis])
    if last <= first or max(own[axis], own[axis + 2]) > (kernel[axis] - 1) * dilations[axis]:
        return None
    name = f"{n.name or n.op.name}_{ends[0]}"
    data = add_slice(r, n, f"{name}_crop", n.inputs[0], (2 + axis,), (first,), (last,))
    where: Pads = (own[0], own[1], own[2], own[3])
    if c is not None:
        return add_conv(r, n, name, data, c.weights, c.bias, strides=strides, dilations=dilations, pads=where,
                        groups=c.groups)
    a: dict[str, Any] = {k: v for k, v in attributes(n).items() if k != "auto_pad"} | {"pads": where}
    shape = [*r.values[data].shape[:2], *out]
    shape[2 + axis] = ends[1] - ends[0]
    assert hasattr(n.op, "name")
    return add(r, n, name, n.op.name, (data,), a, shape=tuple(shape))


def channels(r: Rewrite) -> list[str]:
    """A convolution with more than NUMBER (1024) channels in is the sum of two over half of them each; with more than
    NUMBER channels out it is two, joined; a depthwise one is two, before a Concat. A Gemm alike. Again until none has
    more."""
    done = []
    limit = r.number or 1024
    for n in nodes(r, "Conv", "Gemm"):
        value = _split_conv(r, convolution(r, n), limit) if n.op.name == "Conv" else _split_gemm(r, n, limit)
        if value is not None:
            r.substitute(n.outputs[0], value)
            done.append(f"{n.name or n.op.name}: channels in two parts")
    return done


def _split_conv(r: Rewrite, c: Convolution | None, limit: int) -> int | None:
    if c is None or c.groups not in (1, c.channels) or max(c.channels, len(c.weights)) <= limit \
            or (c.groups == 1 and c.channels <= limit and len(c.weights) < 2):
        return None
    n, name, bias = c.node, c.name, floats(r, c.bias)

    def part(k: int, data: int, weights: Any, own: Any, groups: int) -> int:
        constant = r.add_constant(f"{name}_{k}_bias", own) if own is not None else -1
        return add_conv(r, n, f"{name}_{k}", data, weights, constant, strides=c.strides, dilations=c.dilations,
                        pads=c.pads, groups=groups)
    if c.groups > 1 or c.channels > limit:
        half, each = -(-c.channels // 2), len(c.weights) // c.groups
        data = [add_slice(r, n, f"{name}_in_{k}", c.data, (1,), (ends[0],), (ends[1],))
                for k, ends in enumerate(((0, half), (half, c.channels)))]
        if c.groups == 1:
            return add_sum(r, n, name, [part(0, data[0], c.weights[:, :half], bias, 1),
                                        part(1, data[1], c.weights[:, half:], None, 1)])
        cut = half * each
        parts = [part(0, data[0], c.weights[:cut], None if bias is None else bias[:cut], half),
                 part(1, data[1], c.weights[cut:], None if bias is None else bias[cut:], c.channels - half)]
    else:
        cut = -(-len(c.weights) // 2)
        parts = [part(0, c.data, c.weights[:cut], None if bias is None else bias[:cut], 1),
                 part(1, c.data, c.weights[cut:], None if bias is None else bias[cut:], 1)]
    return add_concat(r, n, f"{name}_join", parts, 1)


def _split_gemm(r: Rewrite, n: Node, limit: int) -> int | None:
    weights, a, v = floats(r, n.inputs[1]), attributes(n), r.values[n.inputs[0]]
    bias = floats(r, n.inputs[2]) if len(n.inputs) > 2 else None
    if weights is None or weights.ndim != 2 or a.get("transA") or not v.has_shape or v.dynamic_axes \
            or len(v.shape) != 2 or opset(r) < 11 \
            or (len(n.inputs) > 2 and n.inputs[2] >= 0 and (bias is None or bias.ndim != 1)):
        return None
    w = weights if a.get("transB") else weights.T
    outputs, inputs = w.shape
    if max(w.shape) <= limit or v.shape[1] != inputs or (bias is not None and bias.size not in (1, outputs)):
        return None
    name = n.name or "product"
    if bias is not None:
        bias = np.broadcast_to(bias, outputs)

    def part(k: int, data: int, own: Any, constant: Any) -> int:
        operands = [data, r.add_constant(f"{name}_{k}_weights", own)]
        if constant is not None:
            operands.append(r.add_constant(f"{name}_{k}_bias", constant))
        return add(r, n, f"{name}_{k}", "Gemm", operands, a | {"transB": 1}, shape=(v.shape[0], len(own)))
    if inputs > limit:
        half = -(-inputs // 2)
        data = [add_slice(r, n, f"{name}_in_{k}", n.inputs[0], (1,), (ends[0],), (ends[1],))
                for k, ends in enumerate(((0, half), (half, inputs)))]
        return add_sum(r, n, name, [part(0, data[0], w[:, :half], bias), part(1, data[1], w[:, half:], None)])
    half = -(-outputs // 2)
    return add_concat(r, n, f"{name}_join", [
        part(0, n.inputs[0], w[:half], None if bias is None else bias[:half]),
        part(1, n.inputs[0], w[half:], None if bias is None else bias[half:])], 1)


ROWS = Pass("split-rows", rows, always=False, number=2048)
CHANNELS = Pass("split-channels", channels, always=False, number=1024)
