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
FIRST = 2048
"""Of them that are decoded at first."""
MARGIN = 1e-3
"""By which logits are let through before scores are compared exactly."""


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
                  anchors: Sequence[Any], **_: Any) -> Array:
    """Boxes whose score is above `score`: rows of score, class, map, and place in it, counted anchor by anchor.
    `several`: a box may be of more than one class. Only logits that can be among them are looked at."""
    least, found = np.float32(logit(score) - MARGIN), list[Array]()
    for level, (name, sizes) in enumerate(zip(maps, anchors, strict=True)):
        m = outputs[name]
        flat = m.reshape(len(sizes), -1, m.shape[2] * m.shape[3])
        a, place = np.nonzero(flat[:, 4] > least)
        rows = flat[a, :, place]
        box, kind = np.nonzero(rows[:, 5:] > least) if several else (np.arange(len(rows)), rows[:, 5:].argmax(1))
        scores = sigmoid(rows[box, 5 + kind]) * sigmoid(rows[box, 4])
        found.append(_rows(scores, kind, level, (a * flat.shape[2] + place)[box], score))
    return np.concatenate(found)


def yolov5_corners(outputs: Mapping[str, Array], level: int, at: Array, *, maps: Sequence[str],
                   strides: Sequence[float], anchors: Sequence[Any], **_: Any) -> Array:
    """Boxes of one map at these places, as fractions of the input (N, 4: left, top, right, bottom)."""
    m, sizes = outputs[maps[level]], np.array(anchors[level], np.float32)
    h, w = m.shape[2:]
    a, place = np.divmod(at, h * w)
    y = sigmoid(m.reshape(len(sizes), -1, h * w)[a, :4, place].astype(np.float32, copy=False))
    whole = np.array([w, h], np.float32)
    xy = (y[:, :2] * 2 - np.float32(0.5) + places(h, w)[:, place].T) / whole
    wh = (y[:, 2:] * 2) ** 2 * (sizes[a] / (whole * np.float32(strides[level])))
    return turned(np.concatenate([xy, wh], 1), "xyxy")


def _rows(scores: Array, kinds: Array, level: int, at: Array, score: float) -> Array:
    """Those above the score. Numbers of places and classes are exact in float64."""
    above = scores > score
    wide = scores[above].astype(np.float64)
    return np.stack([wide, kinds[above], np.full(len(wide), level), at[above]], 1)


# YOLOv8


def sides(bins: Array) -> Array:
    """Mean bin of each softmaxed distribution: (N, 4, bins) to (N, 4)."""
    e = np.exp(bins - bins.max(-1, keepdims=True))
    return (e @ np.arange(bins.shape[-1], dtype=e.dtype)) / e.sum(-1)


def _centred(distances: Array, centres: Array) -> Array:
    """Centre, width and height of boxes by the distances to their left, top, right and bottom, in places."""
    near, far = centres - distances[:, :2], centres + distances[:, 2:]
    return np.concatenate([(near + far) / 2, far - near], 1)


def yolov8_parts(boxes: Sequence[Array], classes: Sequence[Array], strides: Sequence[float]) -> dict[str, Array]:
    """Every box of the maps (1, 4 bins, h, w) and (1, classes, h, w): "xywh" (N, 4) and "scores" (N, classes)."""
    found, scores = [], []
    for b, c, stride in zip(boxes, classes, strides, strict=True):
        h, w = b.shape[2:]
        bins = b.reshape(4, -1, h * w).transpose(2, 0, 1).astype(np.float32, copy=False)
        found.append(_centred(sides(bins), places(h, w).T + np.float32(0.5)) * np.float32(stride))
        scores.append(sigmoid(c.reshape(-1, h * w).T.astype(np.float32, copy=False)))
    return {"xywh": np.concatenate(found), "scores": np.concatenate(scores)}


def yolov8(outputs: Mapping[str, Array], *, boxes: Sequence[str], classes: Sequence[str], strides: Sequence[float],
           results: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """The untouched network's outputs from the maps."""
    parts = yolov8_parts([outputs[b] for b in boxes], [outputs[c] for c in classes], strides)
    return by_columns(results, parts)


def yolov8_likely(outputs: Mapping[str, Array], score: float, several: bool, *, classes: Sequence[str],
                  **_: Any) -> Array:
    """As `yolov5_likely`."""
    least, found = np.float32(logit(score) - MARGIN), list[Array]()
    for level, name in enumerate(classes):
        m = outputs[name]
        flat = m.reshape(m.shape[1], -1)
        (place,) = np.nonzero(flat.max(0) > least)
        rows = flat[:, place].T
        box, kind = np.nonzero(rows > least) if several else (np.arange(len(rows)), rows.argmax(1))
        found.append(_rows(sigmoid(rows[box, kind]), kind, level, place[box], score))
    return np.concatenate(found)


def yolov8_corners(outputs: Mapping[str, Array], level: int, at: Array, *, boxes: Sequence[str], **_: Any) -> Array:
    """As `yolov5_corners`."""
    m = outputs[boxes[level]]
    h, w = m.shape[2:]
    bins = m.reshape(4, -1, h * w)[:, :, at].transpose(2, 0, 1).astype(np.float32, copy=False)
    centred = _centred(sides(bins), places(h, w)[:, at].T + np.float32(0.5))
    return turned(centred / np.array([w, h, w, h], np.float32), "xyxy")


# both


def yolo_objects(likely: Array, corners: Callable[[int, Array], Array], iou: float, limit: int
                 ) -> tuple[Array, Array, Array]:
    """Boxes, scores and classes that suppression, class by class, leaves, the best first.

    What a box suppresses is worse than itself, so that the best boxes alone decide about themselves: only if they are
    not enough are all decoded."""
    likely = likely[best_first(likely[:, 0], CANDIDATES)]
    scores: Array = likely[:, 0].astype(np.float32)
    classes, levels, at = (likely[:, k].astype(np.int64) for k in (1, 2, 3))
    for most in (FIRST, len(likely)):
        boxes = np.empty((len(likely[:most]), 4), np.float32)
        for level in np.unique(levels[:most]):
            here = levels[:most] == level
            boxes[here] = corners(int(level), at[:most][here])
        kept = greedy(boxes, classes[:most], iou, limit)
        if len(kept) >= limit or len(boxes) == len(likely):
            break
    return boxes[kept], scores[kept], classes[kept]
