"""Transposed convolutions as convolutions whose channels become pixels, or as what else they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npulab.ir import Node
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import (
    Pair,
    add_blocks,
    add_conv,
    add_slice,
    attributes,
    floats,
    image,
    nodes,
    number,
    opset,
    text,
    whole,
)

WEIGHTS_MAX = 1 << 24


@dataclass(frozen=True, slots=True)
class Transposed:
    """A 2-D ConvTranspose of float32; weights I,O/groups,ky,kx with the zeros of dilation.

    `before`: rows and columns of the result that padding cuts off above and left.
    """

    node: Node
    name: str
    weights: NDArray[np.float32]
    bias: int
    strides: Pair
    before: Pair
    groups: int
    channels: int
    size: Pair
    out: Pair


def transposed(r: Rewrite, n: Node) -> Transposed | None:
    """The node with its constants, or None where they are none, sizes are not fixed, or padding is automatic."""
    weights, shape, result = floats(r, n.inputs[1]), image(r, n.inputs[0]), image(r, n.outputs[0])
    bias = n.inputs[2] if len(n.inputs) > 2 else -1
    groups, auto = number(n, "group", 1), text(n, "auto_pad", "NOTSET")
    strides, dilations = (whole(n, k, (1, 1)) for k in ("strides", "dilations"))
    pads = whole(n, "pads", (0, 0, 0, 0))
    if weights is None or weights.ndim != 4 or not weights.size or shape is None or result is None \
            or auto not in ("NOTSET", "VALID") or "output_shape" in attributes(n) \
            or (bias >= 0 and floats(r, bias) is None) or weights.shape[0] != shape[1] \
            or groups < 1 or shape[1] % groups or weights.shape[1] * groups != result[1] \
            or len(strides) != 2 or len(dilations) != 2 or len(pads) != 4 or min(*strides, *dilations) < 1 \
            or min(pads) < 0:
        return None
    reach = [(k - 1) * d + 1 for k, d in zip(weights.shape[2:], dilations, strict=True)]
    if weights.shape[0] * weights.shape[1] * reach[0] * reach[1] > WEIGHTS_MAX:
        return None
    full = np.zeros((*weights.shape[:2], *reach), np.float32)
    full[:, :, :: dilations[0], :: dilations[1]] = weights
    before = tuple(pads[:2]) if auto == "NOTSET" else (0, 0)
    return Transposed(n, n.name or "transposed", full, bias, (strides[0], strides[1]), (before[0], before[1]), groups,
                      shape[1], shape[2:], result[2:])


def to_depth(r: Rewrite) -> list[str]:
    """A transposed convolution with stride s both ways is a convolution of stride 1 with s x s times the channels, one
    set for each place within a block of s x s pixels, and DepthToSpace; what is too much is cropped (Shi et al. 2016).
    None of the multiplications with inserted zeros is left, but kernels that s does not divide get some."""
    done = []
    for n in nodes(r, "ConvTranspose"):
        t = transposed(r, n)
        if t is None or t.strides[0] != t.strides[1] or (t.groups > 1 and opset(r) < 11):
            continue
        s = t.strides[0]
        blocks = (-(-t.out[0] // s), -(-t.out[1] // s))
        taps = [_taps(t.weights.shape[2 + i], s, t.before[i], t.size[i], blocks[i]) for i in (0, 1)]
        (y0, rows), (x0, columns) = taps
        inputs, each = t.channels // t.groups, t.weights.shape[1]
        if t.groups * each * s * s * inputs * rows.shape[1] * columns.shape[1] > WEIGHTS_MAX:
            continue
        # padded with one row and column of zeros, which the index of a missing tap names
        w = np.pad(t.weights, ((0, 0), (0, 0), (0, 1), (0, 1))).reshape(t.groups, inputs, each, *(
            k + 1 for k in t.weights.shape[2:]))
        picked = w[:, :, :, rows[:, None, :, None], columns[None, :, None, :]]  # g, i, o, phase y, phase x, ky, kx
        order = (0, 2, 3, 4, 1, 5, 6) if t.groups > 1 else (0, 3, 4, 2, 1, 5, 6)
        weights = picked.transpose(order).reshape(-1, inputs, rows.shape[1], columns.shape[1])
        own = floats(r, t.bias)
        bias = -1
        if own is not None:
            bias = r.add_constant(f"{t.name}_bias", np.repeat(own, s * s) if t.groups > 1 else np.tile(own, s * s))
        pads = (-y0, -x0, blocks[0] - 1 + y0 + rows.shape[1] - t.size[0],
                blocks[1] - 1 + x0 + columns.shape[1] - t.size[1])
        data = add_conv(r, n, t.name, n.inputs[0], weights, bias, pads=pads, groups=t.groups)
        if s > 1:
            data = add_blocks(r, n, f"{t.name}_pixels", data, s, to_space=True, by_channel=t.groups > 1)
        if (blocks[0] * s, blocks[1] * s) != t.out:
            data = add_slice(r, n, f"{t.name}_part", data, (2, 3), (0, 0), t.out)
        r.substitute(n.outputs[0], data)
        done.append(f"{t.name}: {t.weights.shape[2]}x{t.weights.shape[3]} with stride {s} is "
                    f"{rows.shape[1]}x{columns.shape[1]} with {s * s} times the channels")
    return done


def _taps(k: int, s: int, before: int, size: int, blocks: int) -> tuple[int, NDArray[np.int64]]:
    """(first row relative to the block's own, index of the kernel [phase, row]); k stands for none.

    Output row y = s q + p reads input row q + u through the tap p + before - s u.
    """
    first = min(-((k - 1 - before) // s), 0)
    last = max((s - 1 + before) // s, 0, size - blocks)
    tap = np.arange(s)[:, None] + before - s * np.arange(first, last + 1)[None, :]
    return first, np.where((tap >= 0) & (tap < k), tap, k)


def to_resize(r: Rewrite) -> list[str]:
    """A depthwise transposed convolution whose kernel is as large as its stride and all ones, without padding, is
    Resize to the nearest."""
    done = []
    for n in nodes(r, "ConvTranspose"):
        t = transposed(r, n)
        if t is None or t.groups != t.channels or t.weights.shape[1] != 1 or t.weights.shape[2:] != t.strides \
                or not (t.weights == 1).all() or t.before != (0, 0) or opset(r) < 11 or t.bias >= 0 \
                or t.out != (t.size[0] * t.strides[0], t.size[1] * t.strides[1]):
            continue
        scales = r.add_constant(f"{t.name}_scales", np.array([1, 1, *t.strides], np.float32))
        roi = r.add_constant(f"{t.name}_roi", np.zeros(0, np.float32)) if opset(r) < 13 else -1
        r.change(n, op="Resize", inputs=(n.inputs[0], roi, scales), attributes={
            "mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"})
        done.append(f"{t.name}: nearest by {t.strides[0]}x{t.strides[1]}")
    return done


def to_convolution(r: Rewrite) -> list[str]:
    """A transposed convolution of stride 1 is a convolution with the kernel turned around and padding of its reach less
    one less its own."""
    done = []
    for n in nodes(r, "ConvTranspose"):
        t = transposed(r, n)
        if t is None or t.strides != (1, 1):
            continue
        inputs, each = t.channels // t.groups, t.weights.shape[1]
        ky, kx = t.weights.shape[2:]
        turned = t.weights.reshape(t.groups, inputs, each, ky, kx)[..., ::-1, ::-1].transpose(0, 2, 1, 3, 4)
        before = (ky - 1 - t.before[0], kx - 1 - t.before[1])
        behind = [t.out[i] - 1 + k - t.size[i] - before[i] for i, k in enumerate((ky, kx))]
        data = n.inputs[0]
        low, high = [min(b, 0) for b in before], [min(b, 0) for b in behind]
        if any(low) or any(high):
            data = add_slice(r, n, f"{t.name}_crop", data, (2, 3), [-b for b in low],
                             [m + h for m, h in zip(t.size, high, strict=True)])
        r.substitute(n.outputs[0], add_conv(
            r, n, t.name, data, turned.reshape(t.groups * each, inputs, ky, kx), t.bias, groups=t.groups,
            pads=(max(before[0], 0), max(before[1], 0), max(behind[0], 0), max(behind[1], 0))))
        done.append(f"{t.name}: {ky}x{kx} with stride 1 is a convolution")
    return done


DEPTH = Pass("transposed-to-depth", to_depth, always=False)
RESIZE = Pass("transposed-to-resize", to_resize, always=False)
ONES = Pass("transposed-to-convolution", to_convolution, always=False)
