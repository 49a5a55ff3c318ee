"""Stages of post-processing put together, in NumPy alone: what a network would have given, and the objects found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from npulab.postprocess.boxes import Array
from npulab.postprocess.ssd import ssd
from npulab.postprocess.suppress import nms
from npulab.postprocess.yolo import (
    yolo_objects,
    yolov5,
    yolov5_corners,
    yolov5_likely,
    yolov8,
    yolov8_corners,
    yolov8_likely,
)

STAGES: Mapping[str, Any] = {"yolov5": yolov5, "yolov8": yolov8, "ssd": ssd, "nms": nms}
YOLO: Mapping[str, Any] = {"yolov5": (yolov5_likely, yolov5_corners), "yolov8": (yolov8_likely, yolov8_corners)}


def prepared(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages with what is long as an array."""
    return [s | {"anchors": np.array(s["anchors"], np.float32)} if s["kind"] == "ssd" else s for s in stages]


def settings(stage: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage's function takes by name."""
    return {k: v for k, v in stage.items() if k != "kind"}


def real(outputs: Mapping[str, Array], quantization: Mapping[str, Sequence[float]]) -> dict[str, Array]:
    """Outputs as real numbers: whole ones times their (scale, zero point) where those are known."""
    return {name: (x.astype(np.float32) - np.float32(quantization[name][1])) * np.float32(quantization[name][0])
            if x.dtype.kind in "iu" and name in quantization else x for name, x in outputs.items()}


def placed(outputs: Mapping[str, Array], body: Mapping[str, Sequence[int]]) -> Mapping[str, Array]:
    """Outputs with channels before height and width, as `body` has them, where all of them came with channels last, as
    TFLite's do."""
    last = [tuple((s[0], *s[2:], s[1]) if len(s) == 4 else s) for s in body.values()]
    if [outputs[name].shape for name in body] != last or last == [tuple(s) for s in body.values()]:
        return outputs
    return {name: np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x for name, x in outputs.items()}


def restored(stages: Sequence[Mapping[str, Any]], outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs together with those that the untouched network had, by name."""
    known = dict(outputs)
    for stage in stages:
        known |= STAGES[stage["kind"]](known, **settings(stage))
    return known


def objects(stages: Sequence[Mapping[str, Any]], outputs: Mapping[str, Array], score: float = 0.25, iou: float = 0.45,
            limit: int = 300, several: bool = False) -> tuple[Array, Array, Array]:
    """What was found: boxes (N, 4: left, top, right, bottom, as fractions of the input), scores (N,), classes (N,).

    score, iou  for YOLO the least score, and the overlap above which the worse box of one class goes; an SSD says its
                own, and `score` only drops more.   limit  objects at most, the best ones.
    several     a box of YOLO's may be of several classes.
    """
    first = stages[0]
    if first["kind"] in YOLO:
        likely, corners = YOLO[first["kind"]]
        given = settings(first)
        return yolo_objects(likely(outputs, score, several, **given),
                            lambda levels, at: corners(outputs, levels, at, **given), iou, limit)
    if first["kind"] != "ssd":
        raise ValueError("the boxes of this network are in units that only its maker knows")
    boxes, classes, scores, count = (ssd(outputs, **settings(first))[name] for name in first["results"])
    rows = np.arange(scores.shape[1])[: int(count[0]) * int(first["per_box"] if not first["regular"] else 1)]
    rows = rows[scores[0, rows] >= score][:limit]
    return boxes[0, rows][:, [1, 0, 3, 2]], scores[0, rows], classes[0, rows].astype(np.int64)
