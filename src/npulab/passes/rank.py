"""Elementwise operators on four dimensions, and Expand where the next operator spreads its operands itself."""

from __future__ import annotations

import math

import numpy as np

from npulab.passes.patterns import At, each, shape_of, title
from npulab.passes.rewrite import Rewrite
from npulab.passes.transposes import BINARY, UNARY
from npulab.passes.types import Pass

SPREADS = (*BINARY[:-1], "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Where", "And", "Or")


def to_four(r: Rewrite) -> list[str]:
    """Elementwise operators on fewer than four dimensions, and on more where the operands are alike or one number, work
    on four: Reshapes before and behind, which merge with those of their neighbours. Constants are reshaped here."""
    done = []
    for n, own in each(r, *UNARY, *BINARY):
        shape = shape_of(r, n.outputs[0])
        count = len(n.inputs) if n.op.name in BINARY else 1
        shapes = [shape_of(r, v) for v in n.inputs[:count]]
        if shape is None or len(shape) == 4 or 0 in shape or None in shapes:
            continue
        target = (*(1,) * (4 - len(shape)), *shape) if len(shape) < 4 else (*shape[:3], math.prod(shape[3:]))
        if len(shape) > 4 and any(s != shape and math.prod(s or ()) != 1 for s in shapes):
            continue
        at, inputs = At(r, n), list(n.inputs)
        for i, s in enumerate(shapes):
            assert s is not None
            wide = target if len(shape) > 4 and s == shape else (*(1,) * (4 - len(s)), *s) if len(s) < 4 else (1,) * 4
            c = r.constant(n.inputs[i])
            inputs[i] = at.reshape(n.inputs[i], wide) if c is None else r.add_constant(
                f"{at.name}_constant", c.reshape(wide))
        y = r.add(n, f"{at.name}_4d", n.op.name, inputs, own, like=n.outputs[0], shape=target)
        at.replace(at.reshape(y, shape))
        done.append(f"{title(n)}: four dimensions instead of {len(shape)}")
    return done


def drop_expand(r: Rewrite) -> list[str]:
    """An Expand is dropped where every reader spreads its operands itself and gives the same shape without it."""
    done = []
    for n, _ in each(r, "Expand", all_=True):
        source, readers = shape_of(r, n.inputs[0]), r.readers(n.outputs[0])
        if source is None or not readers or n.outputs[0] in r.outputs:
            continue
        fits = True
        for m in readers:
            shapes = [source if v == n.outputs[0] else shape_of(r, v) for v in m.inputs]
            known = [s for s in shapes if s is not None]
            fits = fits and r.maker(m.outputs[0], *SPREADS) is not None and len(known) == len(shapes) \
                and np.broadcast_shapes(*known) == shape_of(r, m.outputs[0])
        if fits:
            r.substitute(n.outputs[0], n.inputs[0])
            done.append(f"{title(n)}: spread by {title(readers[0])}")
    return done


FOUR = Pass("elementwise-4d", to_four, always=False)
EXPAND = Pass("expand", drop_expand)
PASSES = (EXPAND, FOUR)
