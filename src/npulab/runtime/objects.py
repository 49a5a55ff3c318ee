"""Objects that a body and its post-processing find, as answers for people."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from npulab.errors import UnsupportedError
from npulab.postprocess import Arrays, apply, detect
from npulab.postprocess.types import Post, YoloV5, YoloV8, read_post
from npulab.runtime.answers import Answer, Array, Box, Labels, Summary, _label, _shift

IOU = 0.45
"""Overlap above which the worse of two boxes of one class goes."""


def post_beside(model: str | os.PathLike[str]) -> Post | None:
    """The post-processing that goes with a body by its name: `body.onnx` -> `body.post.json`, if it is there."""
    path = Path(model).with_suffix(".post.json")
    return read_post(path) if path.is_file() else None


def answer_with(post: Post, outputs: Arrays, labels: Labels | None, threshold: float = 0.5) -> Answer:
    """What a body's outputs say with its post-processing. `threshold` is the lowest score of a box.

    Raises: ModelError if the outputs are not those that the post-processing was made for.
    """
    restored = apply(post, outputs)
    tensors = summaries(restored)
    try:
        edges, scores, classes = detect(post, outputs, threshold, IOU)
    except UnsupportedError as e:
        return Answer(None, None, tensors, (e.message,))
    shift, note = _shift(_classes(post), labels) if labels else (0, "")
    boxes = tuple(Box(int(c), _label(labels, shift, int(c)), float(s), *(float(e[i]) for i in (1, 0, 3, 2)))
                  for e, s, c in zip(edges, scores, classes, strict=True) if np.isfinite(e).all())
    return Answer(None, boxes, tensors, (note,) if note else ())


def summaries(outputs: Mapping[str, Array]) -> tuple[Summary, ...]:
    """What arrays hold."""
    return tuple(Summary(name, str(x.dtype), x.shape, float(x.min()), float(x.max()))
                 if x.size and x.dtype.kind in "iufb" else Summary(name, str(x.dtype), x.shape, None, None)
                 for name, x in outputs.items())


def _classes(post: Post) -> int | None:
    """How many the network knows; an SSD does not say whether its labels count the background."""
    match post.stages[0]:
        case YoloV5(maps=maps, anchors=anchors):
            return post.body[maps[0]][1] // len(anchors[0]) - 5
        case YoloV8(classes=maps):
            return post.body[maps[0]][1]
    return None
