"""Boxes in NumPy alone: overlap, greedy suppression, and back from the network's input to the picture."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
"""A NumPy array. This file is also written into stand-alone programs, for whatever NumPy they have."""
WINDOW, CHUNK = 2048, 128
"""Boxes that suppression takes up at once, and those of them that it settles at once: they bound memory, and it stops
soon where few boxes are asked for."""


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) of floats, without overflow."""
    y = np.clip(x, -80, 80)
    np.exp(np.negative(y, out=y), out=y)
    y += 1
    return np.divide(1, y, out=y)


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


def greedy(boxes: Array, classes: Array, iou: float, limit: int | None = None, per_class: int | None = None,
           start: int = 0, kept: Array = ()) -> Array:
    """Positions of the boxes that stay, in order: each box that no earlier one of its class, itself kept, overlaps by
    more than `iou`: intersection over union, 0 if a box has no area, or an infinite one. In float32 the same operations
    in the same order as LiteRT and ONNX Runtime do.

    boxes    (N, 4) corners, the best first.   classes  (N,) integers below 2^24.
    limit    stop at so many.                  per_class  keep at most so many of each class.
    kept     what is known to stay of the first `start` boxes.
    """
    limit = len(boxes) if limit is None else limit
    near_x, near_y, far_x, far_y = boxes.T
    with np.errstate(invalid="ignore", over="ignore"):
        areas = (far_x - near_x) * (far_y - near_y)
    facts = np.stack([*boxes.T, areas, classes.astype(boxes.dtype)])
    reaches, threshold = _reaches(boxes, areas, classes, iou), boxes.dtype.type(iou)

    def over(a: Array, b: Array, which: Array | bool = True) -> tuple[Array, Array]:
        """Which of `a` overlap which of `b` by too much, as places in both. `which`: the pairs to be looked at."""
        one, other = reaches.take(a, 1)[:, :, None], reaches.take(b, 1)
        found = one[0] <= other[2]
        for begins, ends in ((other[0], one[2]), (one[1], other[3]), (other[1], one[3])):
            found &= begins <= ends
        found &= which
        i, j = np.divmod(found.ravel().nonzero()[0], max(1, len(b)))
        first, second = facts.take(a[i], 1), facts.take(b[j], 1)
        sides = np.maximum(np.minimum(first[2:4], second[2:4]) - np.maximum(first[:2], second[:2]), 0)
        both = sides[0] * sides[1]
        too_much = both / (first[4] + second[4] - both) > threshold
        too_much &= first[5] == second[5]
        return i[too_much], j[too_much]

    def without(left: Array, gone: Array) -> Array:
        stays = np.ones(len(left), bool)
        stays[gone] = False
        return left[stays]

    kept, earlier = np.array(kept, np.intp), ~np.tri(CHUNK, dtype=bool)
    for begin in range(start, len(boxes), WINDOW):
        left = np.arange(begin, min(begin + WINDOW, len(boxes)))
        for k in range(0, len(kept), WINDOW):
            left = without(left, over(kept[k : k + WINDOW], left)[1])
        while len(left) and len(kept) < limit:
            here, left = left[:CHUNK], left[CHUNK:]
            new = here[_unsuppressed(len(here), *over(here, here, earlier[: len(here), : len(here)]))]
            if per_class is not None:
                new = new[_rank(classes[np.concatenate([kept, new])])[len(kept) :] < per_class]
            kept = np.concatenate([kept, new])
            if len(left) and len(kept) < limit:
                left = without(left, over(new, left)[1])
        if len(kept) >= limit:
            break
    return kept[:limit]


def _reaches(boxes: Array, areas: Array, classes: Array, iou: float) -> Array:
    """For each box its near edges, x and y, and how far the near edges of another may lie for both to overlap by more
    than `iou`: (4, N) in whole numbers, which are quickly compared. Few other pairs are within, hardly any of two
    classes, and none with a box whose area is nothing, infinite or no number.

    Boxes overlap by no more than their shadows on an axis do, and those by no more than 1 - shift / width of the one
    that begins first. A margin covers what float32 rounds, and rounding downwards keeps the order of what is compared.
    Areas so small that they lose digits get no bound but that the boxes meet."""
    proper = (areas > 0) & (areas < np.inf)
    edges = np.where(proper, boxes.T, 0).astype(np.float64)
    first, last = np.min(edges, initial=0), np.max(edges, initial=0)
    share = np.where(areas < 1e-30, 1, 1 - max(iou, 0)) + 1e-5
    edges[2:] = edges[:2] + share * (edges[2:] - edges[:2])
    edges -= first
    edges[::2] += classes * (1.01 * (last - first))
    edges[::2] *= 65534 / np.max(edges[0], initial=max(last - first, 1e-300))
    edges[1::2] *= 65534 / max(last - first, 1e-300)
    reaches = np.clip(edges, 0, 65534, out=edges).astype(np.uint16)
    reaches[:2, ~proper] = 65535
    return reaches


def _unsuppressed(n: int, by: Array, what: Array) -> Array:
    """Which of `n` boxes stay, a bool each, where box `by[k]` would suppress the later box `what[k]` if it stays.

    Starting from "all stay", each round settles at least the next box, and most rounds settle all."""
    stays, again = np.ones(n, bool), True
    while again:
        now = np.ones(n, bool)
        now[what[stays[by]]] = False
        again, stays = bool((now != stays).any()), now
    return stays


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
    if most is None or not 0 < most < len(scores):
        return np.argsort(-scores, kind="stable")[:most]
    (rows,) = np.nonzero(scores >= np.partition(scores, len(scores) - most)[len(scores) - most])
    return rows[np.argsort(-scores[rows], kind="stable")[:most]]


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
