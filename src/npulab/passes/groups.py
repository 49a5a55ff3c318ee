"""Grouped convolutions, depthwise ones, and what they are otherwise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import Convolution, add_concat, add_conv, add_split, change_conv, convolution, floats, nodes

WEIGHTS_MAX = 1 << 22
"""Elements of a dense convolution's weights that a grouped one may become."""
PARTS_MAX = 64


def to_split(r: Rewrite) -> list[str]:
    """A convolution of some groups, more than one and fewer than channels, is a Split, a convolution for each group and
    a Concat."""
    done = []
    for n in nodes(r, "Conv"):
        c = convolution(r, n)
        if c is None or not 1 < c.groups < c.channels or c.groups > PARTS_MAX:
            continue
        parts = []
        own = floats(r, c.bias)
        each = len(c.weights) // c.groups
        for k, data in enumerate(add_split(r, n, f"{c.name}_split", c.data, c.groups)):
            mine = slice(k * each, (k + 1) * each)
            bias = r.add_constant(f"{c.name}_bias_{k}", own[mine]) if own is not None else -1
            parts.append(add_conv(r, n, f"{c.name}_{k}", data, c.weights[mine], bias, strides=c.strides,
                                  dilations=c.dilations, pads=c.pads))
        r.substitute(n.outputs[0], add_concat(r, n, f"{c.name}_join", parts, 1))
        done.append(f"{c.name}: {c.groups} groups are {c.groups} convolutions")
    return done


def to_dense(r: Rewrite) -> list[str]:
    """A convolution of some groups, more than one and fewer than channels, is one of one group with zeros between
    channels of different groups."""
    return _dense(r, depthwise=False)


def depthwise_to_dense(r: Rewrite) -> list[str]:
    """A depthwise convolution is one of one group with zeros between different channels."""
    return _dense(r, depthwise=True)


def _dense(r: Rewrite, *, depthwise: bool) -> list[str]:
    done = []
    for n in nodes(r, "Conv"):
        c = convolution(r, n)
        if c is None or c.groups == 1 or c.depthwise != depthwise or c.weights.size * c.groups > WEIGHTS_MAX:
            continue
        change_conv(r, c, dense_weights(c), dilations=c.dilations, groups=1)
        done.append(f"{c.name}: {c.groups} groups are one; {c.groups} times the multiplications")
    return done


def dense_weights(c: Convolution) -> NDArray[np.float32]:
    """O, I, ky, kx with zeros between groups."""
    out_c, depth = c.weights.shape[:2]
    wide = np.zeros((c.groups, out_c // c.groups, c.groups, depth, *c.kernel), np.float32)
    every = np.arange(c.groups)
    wide[every, :, every] = c.weights.reshape(c.groups, -1, depth, *c.kernel)
    return wide.reshape(out_c, c.channels, *c.kernel)


def to_depthwise(r: Rewrite) -> list[str]:
    """A convolution of one group, each output channel of which reads one channel of the input, and in their order, is a
    depthwise one: the zeros are left out."""
    done = []
    for n in nodes(r, "Conv"):
        c = convolution(r, n)
        if c is None or c.groups != 1 or c.channels < 2 or len(c.weights) % c.channels:
            continue
        each = len(c.weights) // c.channels
        of = np.arange(len(c.weights))
        own = c.weights[of, of // each]
        if np.count_nonzero(own) != np.count_nonzero(c.weights):
            continue
        change_conv(r, c, own[:, None], dilations=c.dilations, groups=c.channels)
        done.append(f"{c.name}: depthwise; a {c.channels}th of the multiplications")
    return done


SPLIT = Pass("grouped-to-split", to_split, always=False)
DENSE = Pass("grouped-to-dense", to_dense, always=False)
FROM_DEPTHWISE = Pass("depthwise-to-dense", depthwise_to_dense, always=False)
TO_DEPTHWISE = Pass("dense-to-depthwise", to_depthwise, always=False)
