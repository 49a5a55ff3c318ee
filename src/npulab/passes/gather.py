"""Gather of places that are known: slices."""

from __future__ import annotations

import numpy as np

from npulab.passes.patterns import At, each, shape_of, title
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

SLICES_MAX = 16
"""Of one Gather."""


def to_slices(r: Rewrite) -> list[str]:
    """Gather with constant indices becomes a Slice for each run of neighbours (16 at most), a Concat of them, and a
    Reshape that drops the axis where the index is no list."""
    done = []
    for n, own in each(r, "Gather"):
        index, shape, result = r.constant(n.inputs[1]), shape_of(r, n.inputs[0]), shape_of(r, n.outputs[0])
        if index is None or not shape or result is None or index.size == 0 or 0 in shape \
                or r.constant(n.inputs[0]) is not None:
            continue
        axis = int(own.get("axis", 0)) % len(shape)
        places = index.reshape(-1).astype(np.int64)
        if places.min() < -shape[axis] or places.max() >= shape[axis]:
            continue
        places = places % shape[axis]
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        if len(runs) > SLICES_MAX:
            continue
        at = At(r, n)
        parts = [at.slice(n.inputs[0], axis, int(run[0]), int(run[-1]) + 1) for run in runs]
        joined = (*shape[:axis], len(places), *shape[axis + 1:])
        value = parts[0] if len(parts) == 1 else at.op("Concat", *parts, shape=joined, axis=axis)
        at.replace(value if joined == result else at.reshape(value, result))
        done.append(f"{title(n)}: {len(parts)} Slice{'s' if len(parts) > 1 else ''}")
    return done


PASS = Pass("gather-to-slice", to_slices, always=False)
