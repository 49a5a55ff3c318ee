"""Strides that a chip lacks: by pooling, by slices, by steps of two."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import Convolution, add, add_conv, add_slice, change_conv, convolution, nodes, opset

CHANNELS_MAX = 4096
"""Before the last convolution of a chain, times four."""


def to_pool(r: Rewrite) -> list[str]:
    """A convolution with a stride is one with stride 1, of which a max-pool of 1x1 takes every so many rows and
    columns; before it, where the kernel is 1x1 and that saves the work."""
    return _spaced(r, slices=False)


def to_slice(r: Rewrite) -> list[str]:
    """A convolution with a stride is one with stride 1, of which a Slice takes every so many rows and columns; before
    it, where the kernel is 1x1 and that saves the work."""
    return _spaced(r, slices=True)


def _spaced(r: Rewrite, *, slices: bool) -> list[str]:
    done = []
    for n in nodes(r, "Conv"):
        c = convolution(r, n)
        if c is None or c.strides == (1, 1) or (slices and opset(r) < 10):
            continue
        if c.kernel == (1, 1) and not any(c.pads):
            data = _every(r, c, c.data, slices)
            change_conv(r, c, c.weights, data=data, strides=(1, 1))
            done.append(f"{c.name}: stride {_by(c)} before a convolution of 1x1")
            continue
        fine = add_conv(r, n, c.name, c.data, c.weights, c.bias, dilations=c.dilations, pads=c.pads, groups=c.groups)
        r.substitute(n.outputs[0], _every(r, c, fine, slices))
        done.append(f"{c.name}: stride {_by(c)} behind a convolution of stride 1; "
                    f"{c.strides[0] * c.strides[1]} times the multiplications")
    return done


def _by(c: Convolution) -> str:
    return f"{c.strides[0]}x{c.strides[1]}"


def _every(r: Rewrite, c: Convolution, value: int, slices: bool) -> int:
    n, channels, h, w = r.values[value].shape
    if slices:
        return add_slice(r, c.node, f"{c.name}_every", value, (2, 3), (0, 0), (h, w), c.strides)
    out = ((h - 1) // c.strides[0] + 1, (w - 1) // c.strides[1] + 1)
    return add(r, c.node, f"{c.name}_every", "MaxPool", (value,), {"kernel_shape": (1, 1), "strides": c.strides},
                 shape=(n, channels, *out))


def to_twos(r: Rewrite) -> list[str]:
    """A convolution with kernel and stride 4, 8, 16 or 32, as patches of transformers have it, is a chain of
    convolutions of 3x3 with stride 2: those before the last gather pixels as channels, by ones and zeros."""
    done = []
    for n in nodes(r, "Conv"):
        c = convolution(r, n)
        if c is None or c.groups != 1 or c.dilations != (1, 1) or any(c.pads) \
                or c.strides != (c.strides[0],) * 2 or c.kernel != c.strides or c.strides[0] not in (4, 8, 16, 32) \
                or any(m % c.strides[0] for m in c.size) \
                or c.channels * c.strides[0] ** 2 > CHANNELS_MAX:
            continue
        levels = c.strides[0].bit_length() - 1
        data, channels = c.data, c.channels
        for k in range(levels - 1):
            gather = np.zeros((2, 2, channels, channels, 2, 2), np.float32)
            for y, x in np.ndindex(2, 2):
                gather[y, x, np.arange(channels), np.arange(channels), y, x] = 1
            data = add_conv(r, n, f"{c.name}_gather_{k}", data, _three(gather.reshape(-1, channels, 2, 2)),
                            strides=(2, 2), pads=(0, 0, 1, 1))
            channels *= 4
        bits = c.weights.reshape(len(c.weights), c.channels, *(2,) * (2 * levels))
        rows, columns = range(2, 2 + levels), range(2 + levels, 2 + 2 * levels)
        order = [0]
        for k in range(1, levels):  # the coarsest step that is no part of the last convolution comes first
            order += [rows[k], columns[k]]
        last = bits.transpose(*order, 1, rows[0], columns[0]).reshape(len(c.weights), channels, 2, 2)
        r.substitute(n.outputs[0], add_conv(r, n, c.name, data, _three(last), c.bias, strides=(2, 2),
                                            pads=(0, 0, 1, 1)))
        done.append(f"{c.name}: stride {c.strides[0]} is {levels} of stride 2")
    return done


def _three(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """2x2 kernels with a row and a column of zeros behind: who takes 2x2 takes 3x3, and not the other way round."""
    return np.pad(weights, ((0, 0), (0, 0), (0, 1), (0, 1)))


POOL = Pass("stride-to-pool", to_pool, always=False)
SLICE = Pass("stride-to-slice", to_slice, always=False)
TWOS = Pass("stride-to-twos", to_twos, always=False)
