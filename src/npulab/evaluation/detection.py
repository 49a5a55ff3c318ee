"""Boxes out of a detector's outputs, of whatever form they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from npulab.errors import UnsupportedError, UsageError
from npulab.evaluation.coco import Instances
from npulab.evaluation.devices import Device
from npulab.evaluation.types import Array
from npulab.ir import Graph
from npulab.passes.tflite_head import detection, without_head
from npulab.postprocess import detect
from npulab.postprocess.boxes import turned
from npulab.postprocess.types import Post, Ssd, YoloV5, YoloV8
from npulab.postprocess.yolo import yolo_objects
from npulab.runtime.answers import NOTHING, Labels
from npulab.runtime.images import Fit

SCORE, IOU, LIMIT = 0.001, 0.65, 300
"""Least score, overlap that suppression allows, and boxes an image: what YOLOv5's own evaluation uses (val.py)."""
COCO_LAST, COCO_GAPS = 90, (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""The last id of a category of COCO's, and those that none has (cocodataset.org, instances_val2017.json)."""
Found = tuple[Array, Array, Array]
"""Boxes (N, 4: left, top, right, bottom, as fractions of the input), scores (N,), classes (N,)."""


@dataclass(frozen=True)
class Decoder:
    """How outputs become boxes. `classes`: how many the network knows. `fit`: how its kind is usually given images."""

    title: str
    classes: int
    fit: Fit
    boxes: Callable[[Mapping[str, Array]], Found]


def decoder_of(graph: Graph, device: Device, truth: Instances, size: tuple[int, int], post: Post | None = None,
               names: Labels | None = None) -> Decoder:
    """The decoder for a network: its post-processing's, TFLite_Detection_PostProcess's, or that of YOLO's rows.

    size  of the input: height, width.   names  the network's classes, if known; else those of `truth` say how many.

    Raises: UnsupportedError if the outputs are of no such form.
    """
    if post is not None:
        return _of_post(post)
    operator = detection(graph)
    if operator is not None:
        stage = without_head(graph).post.stages[0]
        assert isinstance(stage, Ssd)
        order = [graph.outputs.index(v) for v in operator.outputs]
        return Decoder("TFLite_Detection_PostProcess", stage.classes, "squash",
                       lambda outputs: _ssd([list(outputs.values())[i] for i in order]))
    kinds = names.count if names else len(truth.categories)
    shapes = [t.shape for t in device.outputs]
    last = _columns(shapes, kinds, -1)
    if last is None and _columns(shapes, kinds, -2) is None:
        raise UnsupportedError(
            f"the outputs of '{graph.name}' are no boxes that npulab knows",
            want=f"rows of 4 or 5 + {kinds} columns, TFLite_Detection_PostProcess, or MODEL.post.json",
            got="; ".join(f"{t.name}: {list(t.shape)}" for t in device.outputs)[:400],
            try_="--post FILE.post.json, as npulab patch --pass cut-head writes it; or --classes for other classes")
    axis = -2 if last is None else -1
    columns = last if last is not None else _columns(shapes, kinds, -2)
    objectness = columns == kinds + 5
    title = f"YOLOv{5 if objectness else 8}'s rows"
    return Decoder(title, kinds, "letterbox", lambda outputs: _rows(outputs, axis, objectness, size))


def _of_post(post: Post) -> Decoder:
    stage = post.stages[0]
    match stage:
        case YoloV5(maps=maps, anchors=anchors):
            kinds = post.body[maps[0]][1] // len(anchors[0]) - 5
        case YoloV8(classes=maps):
            kinds = post.body[maps[0]][1]
        case Ssd(classes=classes):
            kinds = classes
        case _:
            raise UnsupportedError(f"the boxes of '{post.model}' are in units that only its maker knows")
    return Decoder(f"post-processing of '{post.model}'", kinds, "squash" if isinstance(stage, Ssd) else "letterbox",
                   lambda outputs: detect(post, outputs, SCORE, IOU, LIMIT, several=True))


def _columns(shapes: list[tuple[int, ...]], kinds: int, axis: int) -> int | None:
    """Columns of outputs that are parts of the same rows, if there are as many as YOLO has."""
    if not all(len(s) == 3 and s[0] == 1 for s in shapes) or len({s[-3 - axis] for s in shapes}) != 1:
        return None
    count = sum(s[axis] for s in shapes)
    return count if count in (kinds + 4, kinds + 5) and shapes[0][axis] >= 4 else None


def _rows(outputs: Mapping[str, Array], axis: int, objectness: bool, size: tuple[int, int]) -> Found:
    """Of centre, width and height in pixels or as fractions, objectness for YOLOv5, a score a class."""
    parts = [x[0] if axis == -1 else x[0].T for x in outputs.values()]
    rows = np.concatenate(parts, 1).astype(np.float32, copy=False)
    boxes: Array = rows[:, :4]
    if np.max(boxes[:, :2], initial=0) > 2:  # centres lie all over the input
        boxes = boxes / np.array([size[1], size[0], size[1], size[0]], np.float32)
    scores = rows[:, 5:] * rows[:, 4:5] if objectness else rows[:, 4:]
    kind, box = np.nonzero((scores > SCORE).T & np.isfinite(boxes).all(1))
    likely = scores[box, kind], kind, box, np.zeros(len(rows), np.intp), np.arange(len(rows))
    return yolo_objects(likely, lambda _, at: turned(boxes[at], "xyxy"), IOU, LIMIT)


def _ssd(outputs: list[Array]) -> Found:
    """Of TFLite_Detection_PostProcess's four outputs."""
    edges, classes, scores = (x[0] for x in outputs[:3])
    count = min(max(0, int(np.nan_to_num(outputs[3].reshape(-1)[0]))), len(scores))
    rows = np.arange(count)[scores[:count] >= SCORE][:LIMIT]
    return edges[rows][:, [1, 0, 3, 2]], scores[rows], classes[rows].astype(np.int64)


def category_ids(decoder: Decoder, truth: Instances, names: Labels | None) -> Array:
    """The category of each of the network's classes, -1 where there is none.

    By name where names are given. Otherwise a network of as many classes as there are categories counts them in the
    order of their ids, one of as many as the largest id counts ids from 1, and one of 90 for COCO's 80 counts COCO's
    own ids, which have gaps.

    Raises: UsageError if neither fits.
    """
    ids, count = truth.ids, decoder.classes
    if names:
        known = {c.name: c.id for c in truth.categories}
        shift = int(names.names.get(0, "").lower() in NOTHING and names.count == count + 1)
        found = np.array([known.get(names.names.get(i + shift, ""), -1) for i in range(count)], np.int64)
        if (found < 0).all():
            raise UsageError(f"{names.source} names none of the categories", want=", ".join([*known][:5]),
                             got=", ".join([*names.names.values()][:5]))
        return found
    if count == len(ids):
        return np.array(ids, np.int64)
    if count == max(ids):
        return np.array([i if i in set(ids) else -1 for i in range(1, count + 1)], np.int64)
    if count == COCO_LAST and len(ids) == COCO_LAST - len(COCO_GAPS):
        left = iter(ids)
        return np.array([-1 if i in COCO_GAPS else next(left) for i in range(1, count + 1)], np.int64)
    raise UsageError("the network has other classes than the labels", got=f"{count} classes",
                     want=f"{len(ids)} categories", try_="--classes FILE with the network's names, one a line")
