"""Operators that move: views where strides say it all, copies where they do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.gpu.compute.fusing import attributes
from npulab.gpu.compute.layers import Builder, Held, RefusedError
from npulab.gpu.compute.moves import Take, literal
from npulab.gpu.compute.views import Shape, View, dense, nested
from npulab.ir import Node


def views(b: Builder, n: Node, how: Callable[[View], View | None], shape: Shape) -> None:
    """The same change of every operand of an expression; of the dense result, where a view cannot have it."""
    held = b.get(n.inputs[0])
    changed = [how(v.broadcast(held.shape)) for v in held.operands]
    if any(v is None for v in changed):
        plain = b.as_held(dense(b.dense_of(held), held.shape))
        changed = [how(plain.operands[0])]
        held = plain
    b.set(n.outputs[0], Held(held.expression, tuple(v for v in changed if v is not None), shape, held.number,
                             held.operations))


def reshape(b: Builder, n: Node) -> None:
    shape = b.graph.values[n.outputs[0]].shape
    if math.prod(shape) != math.prod(b.get(n.inputs[0]).shape):
        raise RefusedError("its result has another number of elements")
    views(b, n, lambda v: v.reshaped(shape), shape)


def transpose(b: Builder, n: Node) -> None:
    shape = b.get(n.inputs[0]).shape
    own: Any = attributes(n)
    perm = tuple(own.get("perm") or range(len(shape))[::-1])
    views(b, n, lambda v: v.transposed(perm), tuple(shape[p] for p in perm))


def expand(b: Builder, n: Node) -> None:
    shape = b.graph.values[n.outputs[0]].shape
    views(b, n, lambda v: v.broadcast(shape), shape)


def integers(b: Builder, n: Node, i: int, name: str) -> tuple[int, ...] | None:
    """Whole numbers that are an input in newer opsets and an attribute in older ones."""
    if i < len(n.inputs) and n.inputs[i] >= 0:
        found = b.constant(n.inputs[i])
        if found is None:
            raise RefusedError(f"its {name} are computed")
        return tuple(int(k) for k in found.reshape(-1))
    own: Any = attributes(n).get(name)
    return None if own is None else tuple(own)


def cut_out(b: Builder, n: Node) -> None:
    shape = b.get(n.inputs[0]).shape
    starts, ends = integers(b, n, 1, "starts"), integers(b, n, 2, "ends")
    assert starts is not None
    assert ends is not None
    axes = integers(b, n, 3, "axes") or tuple(range(len(starts)))
    steps = integers(b, n, 4, "steps") or (1,) * len(starts)
    ranges = {a % len(shape): range(*slice(s, e if not (e < -shape[a % len(shape)] and k < 0) else None, k).indices(
        shape[a % len(shape)])) for a, s, e, k in zip(axes, starts, ends, steps, strict=True)}

    def cut(v: View) -> View:
        for axis, r in ranges.items():
            v = v.sliced(axis, r.start if len(r) else 0, len(r), r.step)
        return v

    views(b, n, cut, tuple(len(ranges[i]) if i in ranges else m for i, m in enumerate(shape)))


def split(b: Builder, n: Node) -> None:
    held = b.get(n.inputs[0])
    own: Any = attributes(n)
    axis = own.get("axis", 0) % len(held.shape)
    view, at = b.stored(held), 0
    for v in n.outputs:
        count = b.graph.values[v].shape[axis] if v >= 0 else 0
        if v >= 0:
            b.set(v, view.sliced(axis, at, count))
        at += count
    if at != held.shape[axis]:
        raise RefusedError("its parts are not those of its input")


def gather(b: Builder, n: Node) -> None:
    """With constant indices: a part, or rows in another order."""
    held, index = b.get(n.inputs[0]), b.constant(n.inputs[1])
    own: Any = attributes(n)
    if index is None:
        raise RefusedError("its indices are computed")
    axis = own.get("axis", 0) % len(held.shape)
    size = held.shape[axis]
    if index.size and not (-size <= int(index.min()) and int(index.max()) < size):
        raise RefusedError("its indices are out of range")
    places = index.reshape(-1).astype(np.int64) % max(size, 1)
    shape = (*held.shape[:axis], *index.shape, *held.shape[axis + 1 :])
    if not index.ndim:
        views(b, n, lambda v: v.picked(axis, int(places[0])), shape)
        return
    taken = take(b, held, axis, places)
    view = taken.reshaped(shape)
    assert view is not None
    b.set(n.outputs[0], view)


def take(b: Builder, held: Held, axis: int, places: NDArray[Any]) -> View:
    """Elements along an axis, by position; dense."""
    steps = set(np.diff(places).tolist())
    if len(places) and len(steps) <= 1:  # evenly spaced: a view, copied later if at all
        view = b.stored(held).sliced(axis, int(places[0]), len(places), steps.pop() if steps else 1)
        return b.stored(b.as_held(view), tuple(range(len(held.shape))))
    tensor = b.dense_of(held)
    table = b.tensor(len(places), places.astype(np.int32))
    shape = (*held.shape[:axis], len(places), *held.shape[axis + 1 :])
    what = Take(math.prod(held.shape[:axis]), held.shape[axis], len(places), math.prod(held.shape[axis + 1 :]),
                b.number)
    return b.emit(what, (tensor, table), shape)


def concat(b: Builder, n: Node) -> None:
    parts = [b.get(v) for v in n.inputs]
    shape = list(b.graph.values[n.outputs[0]].shape)
    own: Any = attributes(n)
    axis = own["axis"] % len(shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    first = max((v.broadcast(p.shape) for p in parts for v in p.operands), key=lambda v: v.elements)
    order = nested(first)
    out = dense(b.tensor(math.prod(shape)), [shape[i] for i in order])
    inverse = sorted(range(len(order)), key=lambda i: order[i])
    view, at = out.transposed(inverse), 0
    for p in parts:
        b.place(p, view.sliced(axis, at, p.shape[axis]))
        at += p.shape[axis]
    b.set(n.outputs[0], view)


def pad(b: Builder, n: Node) -> None:
    held = b.get(n.inputs[0])
    rank = len(held.shape)
    own: Any = attributes(n)
    mode = own.get("mode", "constant")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    given = integers(b, n, 1, "pads")
    axes = [a % rank for a in integers(b, n, 3, "axes") or range(rank)]
    assert given is not None
    pads = {a: (given[i], given[i + len(axes)]) for i, a in enumerate(axes)}
    if mode != "constant":
        view = b.stored(held)
        for a, (before, after) in pads.items():
            if before or after:
                kinds = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
                if mode not in kinds or min(before, after) < 0:
                    raise RefusedError(f"mode {mode}")
                places = np.pad(np.arange(view.shape[a]), (before, after), kinds[mode])  # type: ignore[call-overload]
                view = take(b, b.as_held(view), a, places)
        b.set(n.outputs[0], view)
        return
    value = 0.0
    if len(n.inputs) > 2 and n.inputs[2] >= 0:
        number = b.constant(n.inputs[2])
        if number is None:
            raise RefusedError("its value is computed")
        value = float(number.reshape(-1)[0])
    shape = tuple(m + sum(pads.get(i, (0, 0))) for i, m in enumerate(held.shape))
    if any(min(p) < 0 for p in pads.values()):  # negative: cut
        view = b.stored(held)
        for a, (before, after) in pads.items():
            view = view.sliced(a, max(0, -before), view.shape[a] + min(before, 0) + min(after, 0))
        held, pads = b.as_held(view), {a: (max(0, p), max(0, q)) for a, (p, q) in pads.items()}
    order = nested(max((v.broadcast(held.shape) for v in held.operands), key=lambda v: v.elements))
    out = dense(b.tensor(math.prod(shape)), [shape[i] for i in order])
    view = out.transposed(sorted(range(rank), key=lambda i: order[i]))
    b.place(Held(literal(value), (), shape, b.number), view)
    for a, (before, _) in pads.items():
        view = view.sliced(a, before, held.shape[a])
    b.place(held, view)
    b.set(n.outputs[0], out.transposed(sorted(range(rank), key=lambda i: order[i])))


def tile(b: Builder, n: Node) -> None:
    times = integers(b, n, 1, "repeats")
    shape = b.get(n.inputs[0]).shape
    assert times is not None
    apart = tuple(m for pair in zip((1,) * len(shape), shape, strict=True) for m in pair)
    wide = tuple(m for pair in zip(times, shape, strict=True) for m in pair)
    view = b.view(n.inputs[0]).reshaped(apart)
    assert view is not None
    whole = b.dense_of(b.as_held(view.broadcast(wide)))
    b.set(n.outputs[0], dense(whole, tuple(t * m for t, m in zip(times, shape, strict=True))))


def blocks(b: Builder, n: Node) -> None:
    """DepthToSpace and SpaceToDepth: a reshape, a transpose, a reshape."""
    own: Any = attributes(n)
    k = own["blocksize"]
    count, c, h, w = b.get(n.inputs[0]).shape
    if n.op.name == "SpaceToDepth":
        first, perm, last = (count, c, h // k, k, w // k, k), (0, 3, 5, 1, 2, 4), (count, c * k * k, h // k, w // k)
    elif own.get("mode", "DCR") in ("DCR", b"DCR"):
        first, perm, last = (count, k, k, c // k**2, h, w), (0, 3, 4, 1, 5, 2), (count, c // k**2, h * k, w * k)
    else:
        first, perm, last = (count, c // k**2, k, k, h, w), (0, 1, 4, 2, 5, 3), (count, c // k**2, h * k, w * k)
    view = b.view(n.inputs[0])
    split = view.reshaped(first) or dense(b.dense(n.inputs[0]), first)
    moved = split.transposed(perm)
    joined = moved.reshaped(last)
    if joined is None:  # channels last again, whatever they were
        inner = (0, 2, 4, 1, 3, 5) if n.op.name == "SpaceToDepth" else (0, 2, 3, 4, 5, 1)
        if n.op.name == "SpaceToDepth":
            inner = (0, 4, 5, 1, 2, 3)
        tensor = b.dense_of(b.as_held(moved), inner)
        joined = dense(tensor, (last[0], last[2], last[3], last[1])).transposed((0, 3, 1, 2))
    b.set(n.outputs[0], joined)
