"""Boxes in NumPy alone: overlap, greedy suppression, and back from the network's input to the picture."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
"""A NumPy array. This file is also written into stand-alone programs, for whatever NumPy they have."""
CHUNK = 256
"""Boxes that are compared with each other at once: bounds memory, and stops soon where few boxes are asked for."""


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) of floats, without overflow."""
    return 1 / (1 + np.exp(-np.clip(x, -80, 80)))


def logit(p: float) -> float:
    """Where the sigmoid is `p`; minus infinity for 0 and below, infinity for 1 and above."""
    if not 0 < p < 1:
        return float("-inf") if p <= 0 else float("inf")
    return float(np.log(p / (1 - p)))


def turned(boxes: Array, form: str) -> Array:
    """Boxes (N, 4) of centre, width and height as `form`: "xywh" itself, corners "xyxy" or "yxyx"."""
    if form == "xywh":
        return boxes
    half = boxes[:, 2:] / 2
    near, far = boxes[:, :2] - half, boxes[:, :2] + half
    if form == "yxyx":
        near, far = near[:, ::-1], far[:, ::-1]
    return np.concatenate([near, far], 1)


def overlaps(a: Array, b: Array) -> Array:
    """Intersection over union of boxes given by two corners, near one first: (..., 4) and (..., 4), broadcast. 0 where
    a box has no area. In float32 the same operations in the same order as LiteRT and ONNX Runtime do."""
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    sides = np.maximum(high - low, 0)
    both = sides[..., 0] * sides[..., 1]
    first, second = ((c[..., 2] - c[..., 0]) * (c[..., 3] - c[..., 1]) for c in (a, b))
    whole = first + second - both
    proper = (first > 0) & (second > 0)
    return np.divide(both, whole, out=np.zeros_like(whole), where=proper & (whole > 0))


def greedy(boxes: Array, classes: Array, iou: float, limit: int | None = None, per_class: int | None = None) -> Array:
    """Positions of the boxes that stay, in order: each box that no earlier one of its class, itself kept, overlaps by
    more than `iou`.

    boxes    (N, 4) corners, the best first.   classes  (N,) integers.
    limit    stop at so many.                  per_class  keep at most so many of each class.
    """
    limit = len(boxes) if limit is None else limit
    threshold = boxes.dtype.type(iou)
    edges, kinds = np.ascontiguousarray(boxes.T), classes.astype(np.int32)
    kept, start, step = np.zeros(0, np.intp), 0, min(CHUNK, max(32, 2 * limit)) // 4
    while start < len(boxes) and len(kept) < limit:
        here = np.arange(start, min(start + step, len(boxes)))
        start, step = start + step, min(CHUNK, 2 * step)
        i, j = _meeting(edges, kinds, kept, here)
        over = overlaps(boxes[i], boxes[j]) > threshold
        gone = np.zeros(len(here), bool)
        gone[j[over] - here[0]] = True
        here = here[~gone]
        i, j = _meeting(edges, kinds, here, here)
        i, j = i[i < j], j[i < j]
        over = overlaps(boxes[i], boxes[j]) > threshold
        kept = np.concatenate([kept, _unsuppressed(here, i[over], j[over])])
        if per_class is not None:
            kept = kept[_rank(classes[kept]) < per_class]
    return kept[:limit]


def _meeting(edges: Array, kinds: Array, a: Array, b: Array) -> tuple[Array, Array]:
    """Pairs of a box of `a` and one of `b` that are of one class and have a point in common: few, of very many."""
    near, far = edges[:, a][:, :, None], edges[:, b][:, None]
    found = near[0] < far[2]
    for one, other in ((far[0], near[2]), (near[1], far[3]), (far[1], near[3])):
        found &= one < other
    found &= kinds[a][:, None] == kinds[b]
    i, j = np.nonzero(found)
    return a[i], b[j]


def _unsuppressed(boxes: Array, by: Array, what: Array) -> Array:
    """Which of `boxes` (rising numbers) stay, where box `by[k]` would suppress the later box `what[k]` if it stays.

    Starting from "all stay", each round settles at least the next box, and most rounds settle all."""
    stays = np.ones(len(boxes), bool)
    first: Array = np.searchsorted(boxes, by)
    then: Array = np.searchsorted(boxes, what)
    while True:
        now = np.ones(len(boxes), bool)
        now[then[stays[first]]] = False
        if (now == stays).all():
            return boxes[now]
        stays = now


def _rank(classes: Array) -> Array:
    """How many earlier ones are of the same class."""
    order = np.argsort(classes, kind="stable")
    runs = classes[order]
    first = np.searchsorted(runs, runs, side="left")
    rank = np.empty(len(classes), np.intp)
    rank[order] = np.arange(len(classes)) - first
    return rank


def best_first(scores: Array, most: int | None = None) -> Array:
    """Positions by falling score, equal ones as they come, at most `most`."""
    return np.argsort(-scores, kind="stable")[:most]


def on_picture(boxes: Array, size: tuple[int, int], picture: tuple[int, int], fit: str = "pad") -> Array:
    """Corner boxes (N, 4: left, top, right, bottom) as fractions of the network's input, in pixels of the picture,
    inside it.

    size, picture  (height, width) of the input and of the picture.
    fit            how the picture became the input: "pad" (letterbox: one scale, centred) or "squash".
    """
    h, w = picture
    left, top, wide, high = 0.0, 0.0, float(w), float(h)
    if fit == "pad":
        scale = min(size[0] / h, size[1] / w)
        wide, high = size[1] / scale, size[0] / scale
        left, top = (w - wide) / 2, (h - high) / 2
    corners = boxes * np.array([wide, high, wide, high]) + np.array([left, top, left, top])
    return np.clip(corners, 0, np.array([w, h, w, h]))
