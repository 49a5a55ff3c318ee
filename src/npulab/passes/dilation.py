"""Dilated convolutions without dilation."""

from __future__ import annotations

import numpy as np

from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import (
    add_blocks,
    add_conv,
    add_pad,
    add_slice,
    change_conv,
    convolution,
    floats,
    nodes,
)

DENSE_MAX = 7
"""Rows and columns of the kernel with its zeros."""
COPIES_MAX = 64
"""Of the weights, in a convolution by phases."""


def dense(r: Rewrite) -> list[str]:
    """A dilated convolution whose kernel spans at most 7x7 is a convolution with zeros between its weights."""
    done = []
    for n in nodes(r, "Conv"):
        c = convolution(r, n)
        if c is None or c.dilations == (1, 1) or max(c.reach) > DENSE_MAX:
            continue
        change_conv(r, c, c.dense(), pads=c.pads)
        more = c.reach[0] * c.reach[1] / (c.kernel[0] * c.kernel[1])
        done.append(f"{c.name}: {c.kernel[0]}x{c.kernel[1]}, dilated, is {c.reach[0]}x{c.reach[1]}; {more:.3g} times "
                    "the multiplications")
    return done


def phases(r: Rewrite) -> list[str]:
    """A convolution of stride 1, dilated alike both ways by d, is SpaceToDepth with blocks of d, a convolution without
    dilation on each of the d x d phases (as groups) and DepthToSpace, padded before and cropped behind where sizes ask
    for it. As many multiplications; d x d copies of the weights."""
    done = []
    for n in nodes(r, "Conv"):
        c = convolution(r, n)
        d = c.dilations[0] if c is not None else 1
        if c is None or d < 2 or c.dilations != (d, d) or c.strides != (1, 1) or d * d > COPIES_MAX:
            continue
        # result y reads rows y - top + d k: they are of its own phase once `top` is rounded up to whole blocks
        before = [-(-p // d) for p in c.pads[:2]]
        need = [-(-(before[i] * d - c.pads[i] + c.out[i]) // d) * d + (c.kernel[i] - 1) * d - before[i] * d
                for i in (0, 1)]
        if min(need) < 1:
            continue
        after = [need[i] - c.size[i] for i in (0, 1)]
        behind = [a // d if size % d == 0 and a >= 0 else 0 for a, size in zip(after, c.size, strict=True)]
        extra = [max(a - b * d, 0) for a, b in zip(after, behind, strict=True)]
        data = c.data
        if any(extra):
            data = add_pad(r, n, f"{c.name}_pad", data, (0, 0, extra[0], extra[1]))
        if any(a < 0 for a in after):
            ends = [c.size[i] + extra[i] + min(after[i], 0) for i in (0, 1)]
            data = add_slice(r, n, f"{c.name}_crop", data, (2, 3), (0, 0), ends)
        data = add_blocks(r, n, f"{c.name}_phases", data, d, to_space=False)
        own = floats(r, c.bias)
        bias = r.add_constant(f"{c.name}_bias", np.tile(own, d * d)) if own is not None else -1
        data = add_conv(r, n, c.name, data, np.tile(c.weights, (d * d, 1, 1, 1)), bias, groups=c.groups * d * d,
                        pads=(before[0], before[1], behind[0], behind[1]))
        data = add_blocks(r, n, f"{c.name}_together", data, d, to_space=True)
        first = [before[i] * d - c.pads[i] for i in (0, 1)]
        if any(first) or r.values[data].shape[2:] != c.out:
            data = add_slice(r, n, f"{c.name}_part", data, (2, 3), first, [first[i] + c.out[i] for i in (0, 1)])
        r.substitute(n.outputs[0], data)
        done.append(f"{c.name}: dilated by {d}, is one on {d * d} phases")
    return done


DENSE = Pass("dilation-to-dense", dense, always=False)
PHASES = Pass("dilation-to-phases", phases, always=False)
