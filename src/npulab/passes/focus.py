"""YOLOv5's Focus as one convolution."""

from __future__ import annotations

from typing import Any

import numpy as np

from npulab.ir import Node
from npulab.ir.ops import OnnxOp
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def fuse(r: Rewrite) -> list[str]:
    """Four strided slices of an image, every second row and column from each corner, joined along channels and read by
    one convolution of stride 1, are a convolution of twice the kernel and stride 2 (G. Jocher, YOLOv5 issue 4825)."""
    done = []
    for n in r.live():
        op = n.op
        if not isinstance(op, OnnxOp) or op.domain or op.name != "Concat" or op.attributes.get("axis") != 1 \
                or len(n.inputs) != 4:
            continue
        conv = r.only_reader(n.outputs[0], "Conv")
        corners = [_corner(r, v) for v in n.inputs]
        weights = r.constant(conv.inputs[1]) if conv is not None else None
        if conv is None or weights is None or weights.ndim != 4 or None in corners \
                or len({c[0] for c in corners if c}) != 1 or {c[1] for c in corners if c} != {(0, 0), (0, 1), (1, 0),
                                                                                             (1, 1)}:
            continue
        assert isinstance(conv.op, OnnxOp)
        attributes = conv.op.attributes
        strides: Any = attributes.get("strides", (1, 1))
        dilations: Any = attributes.get("dilations", (1, 1))
        pads: Any = attributes.get("pads", (0, 0, 0, 0))
        if tuple(strides) != (1, 1) or tuple(dilations) != (1, 1) or attributes.get("group", 1) != 1 \
                or attributes.get("auto_pad", "NOTSET") != "NOTSET":
            continue
        source = corners[0][0] if corners[0] else -1
        out_c, _, ky, kx = weights.shape
        channels = weights.shape[1] // 4
        if len(r.values[source].shape) != 4 or any(s % 2 for s in r.values[source].shape[2:]):
            continue
        wide = np.zeros((out_c, channels, 2 * ky, 2 * kx), weights.dtype)
        for i, corner in enumerate(corners):
            assert corner is not None
            y, x = corner[1]
            wide[:, :, y::2, x::2] = weights[:, i * channels : (i + 1) * channels]
        name = conv.name or "focus"
        r.change(conv, inputs=(source, r.add_constant(f"{name}_weights", wide), *conv.inputs[2:]),
                 attributes={**attributes, "kernel_shape": (2 * ky, 2 * kx), "strides": (2, 2),
                             "pads": tuple(2 * p for p in pads)})
        done.append(f"{name}: four slices and a {ky}x{kx} convolution are one of {2 * ky}x{2 * kx} with stride 2")
    return done


def _corner(r: Rewrite, value: int) -> tuple[int, tuple[int, int]] | None:
    """(the image, first row and column) if a value is every second row and column of an image, in one slice or two."""
    start = {2: 0, 3: 0}
    seen: set[int] = set()
    for _ in range(2):
        n = r.maker(value, "Slice")
        if n is None:
            break
        axes = _slice(r, n)
        if axes is None or seen & axes.keys():
            return None
        seen |= axes.keys()
        start |= axes
        value = n.inputs[0]
    return (value, (start[2], start[3])) if seen == {2, 3} else None


def _slice(r: Rewrite, n: Node) -> dict[int, int] | None:
    """axis -> first index, of a Slice that takes every second of rows or columns to the end; None for others."""
    if len(n.inputs) != 5:
        return None
    found = [r.constant(v) for v in n.inputs[1:]]
    if any(c is None for c in found):
        return None
    shape = r.values[n.inputs[0]].shape
    out = {}
    for start, end, axis, step in zip(*(np.atleast_1d(np.asarray(c)).tolist() for c in found), strict=True):
        axis %= len(shape)
        if step != 2 or start not in (0, 1) or axis not in (2, 3) or end < shape[axis]:
            return None
        out[axis] = start
    return out


PASS = Pass("focus", fuse, always=False)
