"""Operators whose results look at several elements: reductions and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.gpu.compute.fusing import attributes
from npulab.gpu.compute.layers import Builder, RefusedError
from npulab.gpu.compute.movers import integers
from npulab.gpu.compute.views import View, nested
from npulab.gpu.compute.windows import Reduce, Resample
from npulab.ir import Node

REDUCED: dict[str, str] = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min",
                           "ReduceProd": "product", "ReduceL1": "l1", "ReduceL2": "l2", "ReduceSumSquare": "squares"}


def reduce(b: Builder, n: Node) -> None:
    own: Any = attributes(n)
    axes = integers(b, n, 1, "axes")
    if not axes and own.get("noop_with_empty_axes"):
        b.set(n.outputs[0], b.get(n.inputs[0]))
        return
    reduced(b, n, REDUCED[n.op.name], axes or None, bool(own.get("keepdims", 1)))


def global_pool(b: Builder, n: Node) -> None:
    rank = len(b.get(n.inputs[0]).shape)
    reduced(b, n, "mean" if n.op.name == "GlobalAveragePool" else "max", tuple(range(2, rank)), True)


def reduced(b: Builder, n: Node, kind: Any, axes: Sequence[int] | None, keep: bool) -> None:
    view = b.stored(b.get(n.inputs[0]), number=b.number)
    rank = len(view.shape)
    over = tuple(sorted({a % rank for a in axes})) if axes is not None else tuple(range(rank))
    # the axes that stay lie as they did
    order = nested(view)
    turned = view.transposed(order)
    inside = tuple(i for i, a in enumerate(order) if a in over)
    kept = [a for a in order if a not in over]
    found = b.emit(Reduce(kind, turned.shape, inside, (turned.strides, turned.offset), b.number), (view.tensor,),
                   tuple(view.shape[a] for a in kept))
    plain = found.transposed([kept.index(a) for a in range(rank) if a not in over])
    if keep:
        strides = iter(zip(plain.shape, plain.strides, strict=True))
        pairs = [(1, 0) if a in over else next(strides) for a in range(rank)]
        plain = View(plain.tensor, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))
    b.set(n.outputs[0], plain)


def resize(b: Builder, n: Node) -> None:
    own: Any = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes(n).items()}
    x, out = b.get(n.inputs[0]).shape, b.graph.values[n.outputs[0]].shape
    mode = own.get("mode", "nearest")
    if mode not in ("nearest", "linear") or own.get("antialias") or own.get("exclude_outside"):
        raise RefusedError(f"mode {mode}{', antialiased' if own.get('antialias') else ''}")
    if len(x) != 4 or x[:2] != out[:2]:
        raise RefusedError("it resizes something else than the height and width of images")
    asked = b.constant(n.inputs[2]) if len(n.inputs) > 2 and n.inputs[2] >= 0 else None
    if n.op.name == "Upsample":
        asked = b.constant(n.inputs[1]) if len(n.inputs) > 1 else np.array(own.get("scales", ()))
    tables = []
    for axis in (2, 3):
        scale = float(asked.reshape(-1)[axis]) if asked is not None and asked.size == 4 else out[axis] / x[axis]
        kind = own.get("coordinate_transformation_mode",
                       "asymmetric" if n.op.name == "Upsample" or b.opset < 11 else "half_pixel")
        at = positions(kind, x[axis], out[axis], scale)
        tables += list(taps(at, x[axis], mode, own.get("nearest_mode", "round_prefer_floor" if b.opset > 10 and
                                                       n.op.name == "Resize" else "floor")))
    count = tables[0].shape[1]
    constants = [b.tensor(t.size, t.reshape(-1)) for t in tables]
    image = b.dense(n.inputs[0], (0, 2, 3, 1))
    what = Resample((x[0], x[2], x[3], x[1]), (out[2], out[3]), count, b.number)
    b.set(n.outputs[0], b.emit(what, (image, *constants), (x[0], *out[2:], x[1])).transposed((0, 3, 1, 2)))


def positions(kind: str, size: int, out: int, scale: float) -> NDArray[np.float64]:
    """Where each element of the result lies in the input."""
    i = np.arange(out, dtype=np.float64)
    match kind:
        case "half_pixel":
            return np.asarray((i + 0.5) / scale - 0.5)
        case "asymmetric":
            return np.asarray(i / scale)
        case "align_corners":
            return i * (size - 1) / (out - 1) if out > 1 else i * 0
        case "pytorch_half_pixel":
            return (i + 0.5) / scale - 0.5 if out > 1 else i * 0
    raise RefusedError(f"coordinates {kind}")


def taps(at: NDArray[np.float64], size: int, mode: str, nearest: str) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(elements of the input, their weights), [out, taps]."""
    if mode == "linear":
        low = np.floor(at)
        weight = (at - low).astype(np.float32)
        both = np.clip(np.stack([low, low + 1], 1), 0, size - 1).astype(np.int32)
        return both, np.stack([1 - weight, weight], 1)
    rounded = {"round_prefer_floor": np.ceil(at - 0.5), "round_prefer_ceil": np.floor(at + 0.5),
               "floor": np.floor(at), "ceil": np.ceil(at)}[nearest]
    return np.clip(rounded, 0, size - 1).astype(np.int32)[:, None], np.ones((len(at), 1), np.float32)
