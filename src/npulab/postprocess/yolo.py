"""What YOLOv5's and YOLOv8's last convolutions mean, in NumPy alone.

YOLOv5: with y = sigmoid(map), centre (2 y - 0.5 + place) stride and size (2 y)^2 anchor. Source: the Detect layer that
the ultralytics/yolov5 README and issue 471 describe. YOLOv8: each side's distance from the centre of its place is the
mean of a softmaxed distribution over bins (Li et al., Generalized Focal Loss, arXiv:2006.04388), times the stride.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from npulab.postprocess.boxes import Array, best_first, greedy, logit, sigmoid, turned

CANDIDATES = 30000
"""Boxes that suppression looks at, the best ones."""
FIRST = 2560
"""Of them that are decoded at first."""
MARGIN = 1e-3
"""By which logits are let through before scores are compared exactly."""
Likely = tuple[Array, Array, Array, Array, Array]
"""Boxes that may be objects: scores, classes and boxes (N,), and of those boxes the number of the map, and the place in
that map, counted anchor by anchor (M,)."""


def places(h: int, w: int) -> Array:
    """x and y of each place of a map, row by row: (2, h w)."""
    return np.stack([np.tile(np.arange(w), h), np.repeat(np.arange(h), w)]).astype(np.float32)


def by_columns(results: Sequence[Mapping[str, Any]], parts: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs that the untouched network had, each a row of columns, which come last or before the boxes."""
    out = {}
    for r in results:
        columns = [turned(parts["xywh"], c) if c in ("xyxy", "yxyx") else parts[c] for c in r["columns"]]
        whole = np.concatenate(columns, 1) if len(columns) > 1 else columns[0]
        out[r["name"]] = np.ascontiguousarray(whole if r["last"] else whole.T)[None]
    return out


# YOLOv5


def yolov5_parts(maps: Sequence[Array], strides: Sequence[float], anchors: Sequence[Any], order: str
                 ) -> dict[str, Array]:
    """Every box of every map (1, A (5 + classes), h, w): "xywh" (N, 4), "object" (N, 1), "classes" (N, classes), and
    "scores", the product of the last two. Boxes lie map by map; inside one, `order` "ayx" or "yxa" says how."""
    rows = []
    for m, stride, sizes in zip(maps, strides, anchors, strict=True):
        h, w = m.shape[2:]
        y = sigmoid(m.reshape(len(sizes), -1, h * w).astype(np.float32, copy=False))
        y[:, :2] = (y[:, :2] * 2 - np.float32(0.5) + places(h, w)) * np.float32(stride)
        y[:, 2:4] = (y[:, 2:4] * 2) ** 2 * np.array(sizes, np.float32)[:, :, None]
        rows.append(y.transpose((0, 2, 1) if order == "ayx" else (2, 0, 1)).reshape(-1, y.shape[1]))
    whole = np.concatenate(rows)
    parts = {"xywh": whole[:, :4], "object": whole[:, 4:5], "classes": whole[:, 5:]}
    return parts | {"scores": parts["object"] * parts["classes"]}


def yolov5(outputs: Mapping[str, Array], *, maps: Sequence[str], strides: Sequence[float], anchors: Sequence[Any],
           order: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """The untouched network's outputs from the maps."""
    return by_columns(results, yolov5_parts([outputs[m] for m in maps], strides, anchors, order))


def yolov5_likely(outputs: Mapping[str, Array], score: float, several: bool, *, maps: Sequence[str],
                  anchors: Sequence[Any], **_: Any) -> Likely:
    """What has a score above `score`. A box has the first class of the largest logit, or `several`.

    In the order map by map, there anchor by anchor, there place by place; `several` class by class, there as said.
    Only logits that can be among them are looked at: classes where an object is likely enough."""
    least, found = np.float32(logit(score) - MARGIN), list[tuple[Array, int, Array]]()
    for level, (name, sizes) in enumerate(zip(maps, anchors, strict=True)):
        m = outputs[name]
        cells = m.shape[2] * m.shape[3]
        for a, planes in enumerate(m.reshape(len(sizes), -1, cells)):
            (place,) = np.nonzero(planes[4] > least)
            if len(place) or not found:
                found.append((planes[4:].take(place, 1), level, a * cells + place))
    logits, levels, at = _joined(found)
    objects = sigmoid(logits[0])
    box, kind = _chosen(logits[1:], _least_logit(score, objects), several)
    return *_above(score, sigmoid(logits[1:][kind, box]) * objects[box], kind, box), levels, at


def _joined(found: Sequence[tuple[Array, int, Array]]) -> tuple[Array, Array, Array]:
    """Logits (classes, M), maps (M,) and places (M,) of parts that each lie in one map."""
    logits, levels, at = zip(*found, strict=True)
    return np.concatenate(logits, 1), np.repeat(levels, [len(x) for x in at]), np.concatenate(at)


def _least_logit(score: float, objects: Array) -> Array:
    """Below which a class's logit cannot give the score, by each box's objectness.

    Near 1 a sigmoid loses digits: what lies there is let through."""
    p = np.minimum(np.float32(score) / objects, np.float32(0.9))
    return np.log(p / (1 - p)) - np.float32(MARGIN) if score > 0 else np.full(p.shape, -np.inf, p.dtype)


def _chosen(logits: Array, least: Array, several: bool) -> tuple[Array, Array]:
    """Box and class of the logits (classes, M) above `least` (M,) or a number; of each box only the best, or
    `several`."""
    if several:
        kind, box = np.divmod(np.flatnonzero(logits > least), max(1, logits.shape[1]))
        return box, kind
    best = logits.max(0)
    kind, of = np.divmod(np.flatnonzero(logits == best), max(1, len(best)))
    first = np.zeros(len(best), np.intp)
    first[of[::-1]] = kind[::-1]  # the smallest is written last
    (box,) = np.nonzero(best > least)
    return box, first[box]


def _above(score: float, scores: Array, kinds: Array, box: Array) -> tuple[Array, Array, Array]:
    """Those above the score."""
    (above,) = np.nonzero(scores > score)
    return scores[above], kinds[above], box[above]


def yolov5_corners(outputs: Mapping[str, Array], levels: Array, at: Array, *, maps: Sequence[str],
                   strides: Sequence[float], anchors: Sequence[Any], **_: Any) -> Array:
    """Boxes at these places of these maps, as fractions of the input (N, 4: left, top, right, bottom)."""
    codes, sizes, wholes, xy = (np.empty((k, len(at)), np.float32) for k in (4, 2, 2, 2))
    for level, (name, stride) in enumerate(zip(maps, strides, strict=True)):
        (here,) = np.nonzero(levels == level)
        m, size = outputs[name], np.array(anchors[level], np.float32)
        h, w = m.shape[2:]
        whole = np.array([w, h], np.float32)
        a, place = np.divmod(at[here], h * w)
        codes[:, here] = m.reshape(len(size), -1, h * w)[a, :4, place].T
        sizes[:, here] = (size / (whole * np.float32(stride)))[a].T
        wholes[:, here], xy[:, here] = whole[:, None], np.divmod(place, w)[::-1]
    y = sigmoid(codes)
    centre = (y[:2] * 2 - np.float32(0.5) + xy) / wholes
    return turned(np.concatenate([centre, (y[2:] * 2) ** 2 * sizes]).T, "xyxy")


# YOLOv8


def sides(bins: Array) -> Array:
    """Mean bin of each softmaxed distribution: (4 bins, N) to (N, 4). Bin after bin for all boxes at once: a box's bits
    are the same among few and among many."""
    k, n = len(bins) // 4, bins.shape[1]
    e = np.ascontiguousarray(bins.reshape(4, k, n).transpose(1, 0, 2).reshape(k, 4 * n))
    e = np.exp(e - e.max(0))
    mean = (e * np.arange(len(e), dtype=e.dtype)[:, None]).sum(0) / e.sum(0)
    return mean.reshape(4, n).T


def _centred(distances: Array, centres: Array) -> Array:
    """Centre, width and height of boxes by the distances to their left, top, right and bottom, in places."""
    near, far = centres - distances[:, :2], centres + distances[:, 2:]
    return np.concatenate([(near + far) / 2, far - near], 1)


def yolov8_parts(boxes: Sequence[Array], classes: Sequence[Array], strides: Sequence[float]) -> dict[str, Array]:
    """Every box of the maps (1, 4 bins, h, w) and (1, classes, h, w): "xywh" (N, 4) and "scores" (N, classes)."""
    found, scores = [], []
    for b, c, stride in zip(boxes, classes, strides, strict=True):
        h, w = b.shape[2:]
        bins = b.reshape(-1, h * w).astype(np.float32, copy=False)
        found.append(_centred(sides(bins), places(h, w).T + np.float32(0.5)) * np.float32(stride))
        scores.append(sigmoid(c.reshape(-1, h * w).T.astype(np.float32, copy=False)))
    return {"xywh": np.concatenate(found), "scores": np.concatenate(scores)}


def yolov8(outputs: Mapping[str, Array], *, boxes: Sequence[str], classes: Sequence[str], strides: Sequence[float],
           results: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """The untouched network's outputs from the maps."""
    parts = yolov8_parts([outputs[b] for b in boxes], [outputs[c] for c in classes], strides)
    return by_columns(results, parts)


def yolov8_likely(outputs: Mapping[str, Array], score: float, several: bool, *, classes: Sequence[str],
                  **_: Any) -> Likely:
    """As `yolov5_likely`."""
    least, found = np.float32(logit(score) - MARGIN), list[tuple[Array, int, Array]]()
    for level, name in enumerate(classes):
        planes = outputs[name].reshape(outputs[name].shape[1], -1)
        (place,) = np.nonzero(planes.max(0) > least)
        found.append((planes.take(place, 1), level, place))
    logits, levels, at = _joined(found)
    box, kind = _chosen(logits, least, several)
    return *_above(score, sigmoid(logits[kind, box]), kind, box), levels, at


def yolov8_corners(outputs: Mapping[str, Array], levels: Array, at: Array, *, boxes: Sequence[str], **_: Any) -> Array:
    """As `yolov5_corners`."""
    found = np.empty((len(at), 4), np.float32)
    for level, name in enumerate(boxes):
        (here,) = np.nonzero(levels == level)
        m, place = outputs[name], at[here]
        h, w = m.shape[2:]
        bins = m.reshape(-1, h * w).take(place, 1).astype(np.float32, copy=False)
        xy = np.stack(np.divmod(place, w)[::-1], 1).astype(np.float32)
        found[here] = _centred(sides(bins), xy + np.float32(0.5)) / np.array([w, h, w, h], np.float32)
    return turned(found, "xyxy")


# both


def yolo_objects(likely: Likely, corners: Callable[[Array, Array], Array], iou: float, limit: int
                 ) -> tuple[Array, Array, Array]:
    """Boxes, scores and classes that suppression, class by class, leaves, the best first; of equal ones those that
    `likely` has first. No more than the best CANDIDATES are looked at.

    What a box suppresses is worse than itself, so that the best boxes alone decide about themselves: only if they are
    not enough are more decoded."""
    *candidates, levels, at = likely
    boxes, kept, most = np.zeros((0, 4), np.float32), np.zeros(0, np.intp), FIRST
    while True:
        order = best_first(candidates[0], min(most, CANDIDATES))
        scores, classes, box = (column[order] for column in candidates)
        known, new = len(boxes), box[len(boxes) :]
        boxes = np.concatenate([boxes, corners(levels[new], at[new])])
        kept = greedy(boxes, classes, iou, limit, start=known, kept=kept)
        if len(kept) >= limit or len(order) < most:
            return boxes[kept], scores[kept], classes[kept]
        most += most // 4
