"""Concatenation of tensors that may be stored in different ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from npulab.reference.types import Array, Stored


def concatenation(parts: Sequence[Stored], out: Stored, axis: int) -> Callable[[Sequence[Array]], Array]:
    """TFLite's CONCATENATION: uint8 parts of another scale or zero point are rescaled in float32, halves away.

    int8 and int16 parts are copied: LiteRT takes none that would need more.
    """
    tables = [None if p.same(out) or p.dtype != np.uint8 else _rescaled(p, out) for p in parts]

    def join(arrays: Sequence[Array]) -> Array:
        return np.concatenate([a if t is None else t[a] for a, t in zip(arrays, tables, strict=True)], axis)

    return join


def _rescaled(part: Stored, out: Stored) -> Array:
    f = np.float32
    scale = f(part.scale) * (f(1) / f(out.scale))
    steps = np.arange(256).astype(f) * scale + f(-part.zero) * scale
    whole = np.trunc(steps.astype(np.float64) + np.copysign(0.5, steps))
    return np.asarray(np.clip(whole.astype(np.int64) + out.zero, 0, 255), np.uint8)
