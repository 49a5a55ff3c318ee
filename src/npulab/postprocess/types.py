"""What was cut off a network, as a record: all that its post-processing needs, and JSON for it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import msgspec

from npulab.errors import ModelError
from npulab.postprocess.glue import prepared
from npulab.program.files import read_bounded

BYTES_MAX = 1 << 26
CELLS_MAX = 1 << 24
"""Numbers that a map, or what an SSD gives, may have: bounds what a hostile file can ask for."""

Column = Literal["xywh", "xyxy", "yxyx", "object", "classes", "scores"]
Name = str


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the records."""


class Result(Record, frozen=True):
    """An output of the untouched network: which columns, and whether they are its last axis or the one before."""

    name: Name
    columns: tuple[Column, ...]
    last: bool


class YoloV5(Record, frozen=True, tag_field="kind", tag="yolov5"):
    """`maps` (1, A (5 + classes), h, w) a stride each; `anchors` (width, height) in pixels, A a map."""

    maps: tuple[Name, ...]
    strides: tuple[float, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    order: Literal["ayx", "yxa"]
    results: tuple[Result, ...]

    @property
    def reads(self) -> tuple[Name, ...]:
        return self.maps

    @property
    def gives(self) -> tuple[Name, ...]:
        return tuple(r.name for r in self.results)


class YoloV8(Record, frozen=True, tag_field="kind", tag="yolov8"):
    """`boxes` (1, 4 bins, h, w) and `classes` (1, classes, h, w), a stride each."""

    boxes: tuple[Name, ...]
    classes: tuple[Name, ...]
    strides: tuple[float, ...]
    results: tuple[Result, ...]

    @property
    def reads(self) -> tuple[Name, ...]:
        return (*self.boxes, *self.classes)

    @property
    def gives(self) -> tuple[Name, ...]:
        return tuple(r.name for r in self.results)


class Ssd(Record, frozen=True, tag_field="kind", tag="ssd"):
    """TFLite_Detection_PostProcess: `anchors` and `scales` y, x, h, w; `results` boxes, classes, scores, count."""

    boxes: Name
    scores: Name
    anchors: tuple[tuple[float, float, float, float], ...]
    scales: tuple[float, float, float, float]
    classes: int
    most: int
    per_box: int
    per_class: int
    score: float
    iou: float
    regular: bool
    results: tuple[Name, Name, Name, Name]

    @property
    def reads(self) -> tuple[Name, ...]:
        return self.boxes, self.scores

    @property
    def gives(self) -> tuple[Name, ...]:
        return self.results


class Nms(Record, frozen=True, tag_field="kind", tag="nms"):
    """ONNX's NonMaxSuppression: `boxes` (B, N, 4), `scores` (B, classes, N)."""

    boxes: Name
    scores: Name
    centred: bool
    most: int
    iou: float
    score: float | None
    result: Name

    @property
    def reads(self) -> tuple[Name, ...]:
        return self.boxes, self.scores

    @property
    def gives(self) -> tuple[Name, ...]:
        return (self.result,)


Stage = YoloV5 | YoloV8 | Ssd | Nms


class Picture(Record, frozen=True):
    """The input that takes an image."""

    name: Name
    height: int
    width: int


class Post(Record, frozen=True, kw_only=True, dict=True):
    """What to do with a body's outputs.

    model         the network before the cut.            stages   in the order in which they run.
    outputs       names of the untouched network's.      picture  None if no input takes an image.
    body          what the body gives: name and shape.   quantization  (scale, zero point) of outputs in whole numbers.
    """

    format: Literal["npulab post-processing 1"] = "npulab post-processing 1"
    model: str
    digest: str
    picture: Picture | None
    body: dict[Name, tuple[int, ...]]
    outputs: tuple[Name, ...]
    quantization: dict[Name, tuple[float, int]]
    stages: tuple[Stage, ...]

    @cached_property
    def plain(self) -> list[dict[str, Any]]:
        """The stages as dictionaries, as the functions of `glue` take them; not to be changed."""
        return prepared(json.loads(msgspec.json.encode(self.stages)))


def to_json(post: Post) -> bytes:
    """The record as JSON, for people too."""
    return msgspec.json.format(msgspec.json.encode(post), indent=1 if _small(post) else 0) + b"\n"


def _small(post: Post) -> bool:
    return not any(isinstance(s, Ssd) and len(s.anchors) > 64 for s in post.stages)


def read_post(path: str | os.PathLike[str] | bytes) -> Post:
    """The record of a .post.json file.

    Raises: UsageError if it cannot be read; ModelError if it is not one, or says what cannot be.
    """
    name = "the post-processing" if isinstance(path, bytes) else os.path.basename(os.fspath(path))
    data = path if isinstance(path, bytes) else read_bounded(path, "post-processing", BYTES_MAX)
    try:
        post = msgspec.json.decode(data, type=Post)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise ModelError(f"{name} is no post-processing that npulab patch wrote", got=str(e)[:300]) from None
    for found, want in _wrong(post):
        raise ModelError(f"{name} does not fit together", got=found, want=want)
    return post


def _wrong(post: Post) -> Iterator[tuple[str, str]]:
    """What cannot be, and what is wanted instead."""
    known = set(post.body)
    for shape in post.body.values():
        if not all(n > 0 for n in shape) or math.prod(shape) > CELLS_MAX:
            yield f"an output of shape {list(shape)}", f"1..{CELLS_MAX} numbers"
    if not post.stages:
        yield "no stages", "one or more"
    for stage in post.stages:
        for name in stage.reads:
            if name not in known:
                yield f"a stage that reads '{name}'", f"one of {', '.join(sorted(known))}"
        yield from _wrong_stage(post, stage)
        known.update(stage.gives)
    for name in post.outputs:
        if name not in known:
            yield f"the output '{name}'", "an output that a stage or the body gives"


def _wrong_stage(post: Post, stage: Stage) -> Iterator[tuple[str, str]]:
    if isinstance(stage, YoloV5 | YoloV8):
        known = {"xywh", "xyxy", "yxyx", "scores", *(("object", "classes") if isinstance(stage, YoloV5) else ())}
        if not all(r.columns and known.issuperset(r.columns) for r in stage.results):
            yield "a result of other columns", ", ".join(sorted(known))
        if not all(s > 0 for s in stage.strides):
            yield f"strides {stage.strides}", "numbers above 0"
    match stage:
        case YoloV5():
            if not 0 < len(stage.maps) == len(stage.strides) == len(stage.anchors):
                yield f"{len(stage.maps)} maps, {len(stage.strides)} strides, {len(stage.anchors)} anchors", "as many"
            for name, anchors in zip(stage.maps, stage.anchors, strict=False):
                shape = post.body.get(name, ())
                if len(shape) != 4 or shape[0] != 1 or not anchors or shape[1] % len(anchors) \
                        or shape[1] // len(anchors) < 6:
                    yield f"'{name}' of shape {list(shape)}", f"1, {len(anchors)} x (5 + classes), height, width"
        case YoloV8():
            if not 0 < len(stage.boxes) == len(stage.classes) == len(stage.strides):
                yield f"{len(stage.boxes)} boxes, {len(stage.classes)} classes, {len(stage.strides)} strides", "as many"
            for box, classes in zip(stage.boxes, stage.classes, strict=False):
                a, b = post.body.get(box, ()), post.body.get(classes, ())
                if len(a) != 4 or len(b) != 4 or a[0] != 1 or b[0] != 1 or a[1] % 4 or a[2:] != b[2:]:
                    yield f"'{box}' {list(a)} and '{classes}' {list(b)}", "1, 4 bins, h, w and 1, classes, h, w"
        case Ssd():
            a, b = post.body.get(stage.boxes, ()), post.body.get(stage.scores, ())
            n = len(stage.anchors)
            if len(a) != 3 or a[:2] != (1, n) or a[2] < 4 or len(b) != 3 or b[:2] != (1, n) \
                    or not 0 < stage.classes <= b[2]:
                yield f"boxes {list(a)} and scores {list(b)}", f"1, {n}, 4 and 1, {n}, {stage.classes} or more"
            if not 0 < stage.most * stage.per_box <= 1 << 20 or min(stage.most, stage.per_box, stage.per_class) < 1:
                yield f"{stage.most} boxes of {stage.per_box} classes", "1..1048576 rows"
            if not all(s > 0 for s in stage.scales):
                yield f"scales {stage.scales}", "four numbers above 0"
        case Nms():
            pass  # what it reads may come from a stage: its shapes show when it runs
