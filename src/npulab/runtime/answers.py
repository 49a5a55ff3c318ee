"""Output tensors as answers for people: the likeliest classes, boxes on the image, or what the tensors hold."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from npulab.errors import ModelError
from npulab.program.files import read_bounded
from npulab.program.types import Program, Tensor
from npulab.runtime.images import Covered
from npulab.runtime.session import tensor_names

Array = NDArray[Any]

DETECTION = "TFLite_Detection_PostProcess"
LABEL_BYTES = 1 << 24
LABELS = 1_000_000
LABEL_LENGTH = 200
NOTHING = ("background", "???", "unlabeled", "n/a", "__background__")
"""What label files call a class 0 that is no class."""


@dataclass(frozen=True, slots=True)
class Guess:
    index: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Box:
    """A detected object; edges as fractions of the model's input."""

    index: int
    label: str
    score: float
    top: float
    left: float
    bottom: float
    right: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What a tensor holds, in real numbers where it is quantized."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """One of `classes` and `boxes` is not None if the model is of that kind; `tensors` is there always."""

    classes: tuple[Guess, ...] | None
    boxes: tuple[Box, ...] | None
    tensors: tuple[Summary, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Labels:
    """Names by class index."""

    names: Mapping[int, str]
    source: str

    @property
    def count(self) -> int:
        return max(self.names, default=-1) + 1


def read_labels(path: str | os.PathLike[str]) -> Labels:
    """A label file: one name a line, or `index<TAB>name`.

    Raises: UsageError if it cannot be read; ModelError if it is not such a file.
    """
    name = os.path.basename(os.fspath(path))
    try:
        text = read_bounded(path, "labels", LABEL_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ModelError(f"{name} is not a label file", want="text in UTF-8", got=e) from e
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines or len(lines) > LABELS:
        raise ModelError(f"{name} is not a label file", want=f"1..{LABELS} lines", got=f"{len(lines)} lines")
    split = [line.split("\t", 1) for line in lines if line.strip()]
    if all(len(p) == 2 and p[0].strip().isdecimal() and len(p[0]) < 10 for p in split):
        return Labels({int(a): b.strip()[:LABEL_LENGTH] for a, b in split}, name)
    return Labels({i: line.strip()[:LABEL_LENGTH] for i, line in enumerate(lines)}, name)


def labels_beside(model: str | os.PathLike[str]) -> Path | None:
    """The label file that goes with a model by its name: `cat.tflite` -> `cat.labels.txt`, if it is there."""
    path = Path(model).with_suffix(".labels.txt")
    return path if path.is_file() else None


def answer(program: Program, outputs: Mapping[str, Array], labels: Labels | None, top: int = 5,
           threshold: float = 0.5) -> Answer:
    """What `outputs` (by name, as a Session gives them) say. `threshold` is the lowest score of a box."""
    names = tensor_names(program)
    found = [(t, outputs[names[t.value]]) for t in _output_tensors(program)]
    tensors = tuple(_summary(names[t.value], t, a) for t, a in found)
    if (boxes := _boxes(program, found, labels, threshold)) is not None:
        return Answer(None, boxes[0], tensors, boxes[1])
    if len(found) == 1 and _is_scores(program, *found[0], labels):
        guesses, notes = _top(real(*found[0]).reshape(-1), labels, top)
        return Answer(guesses, None, tensors, notes)
    return Answer(None, None, tensors)


def real(t: Tensor, array: Array) -> NDArray[np.float64]:
    """Stored numbers as real ones: scale * (stored - zero point)."""
    wide = array.astype(np.float64)
    return wide if not t.scale or array.dtype.kind == "f" else t.scale * (wide - (t.zero_point or 0))


def _output_tensors(program: Program) -> list[Tensor]:
    by_value = {t.value: t for t in program.tensors}
    return [by_value[v] for v in dict.fromkeys(program.outputs)]


def _summary(name: str, t: Tensor, array: Array) -> Summary:
    if array.dtype.kind not in "iufb" or not array.size:
        return Summary(name, t.dtype, array.shape, None, None)
    values = real(t, array)
    return Summary(name, t.dtype, array.shape, float(values.min()), float(values.max()))


def _is_scores(program: Program, t: Tensor, array: Array, labels: Labels | None) -> bool:
    """One vector of scores: labels were given for it, or the model ends in a softmax."""
    if array.dtype.kind not in "iuf" or array.size < 2 or array.size != max(array.shape, default=0):
        return False
    return labels is not None or "SOFTMAX" in program.ops[-3:]


def _shift(classes: int | None, labels: Labels) -> tuple[int, str]:
    """What to add to a class index to get its label's index, and why."""
    first = labels.names.get(0, "").lower()
    if first in NOTHING and (classes is None or labels.count == classes + 1):
        return 1, f"{labels.source} starts with '{first}', which the model does not count"
    if classes is not None and classes == labels.count + 1:
        return -1, f"{labels.source} has one label less than the model has classes: class 0 taken as background"
    if classes is not None and classes != labels.count:
        return 0, f"{labels.source} has {labels.count} labels for {classes} classes: names may be wrong"
    return 0, ""


def _label(labels: Labels | None, shift: int, index: int) -> str:
    if labels is None:
        return f"class {index}"
    if index + shift < 0:
        return "background"
    return labels.names.get(index + shift) or f"class {index}"


def _top(scores: NDArray[np.float64], labels: Labels | None, top: int) -> tuple[tuple[Guess, ...], tuple[str, ...]]:
    shift, note = _shift(len(scores), labels) if labels else (0, "")
    order = np.argsort(np.nan_to_num(-scores, nan=np.inf), kind="stable")[: max(1, top)]
    return (tuple(Guess(int(i), _label(labels, shift, int(i)), float(scores[i])) for i in order),
            (note,) if note else ())


def _boxes(program: Program, found: Sequence[tuple[Tensor, Array]], labels: Labels | None,
           threshold: float) -> tuple[tuple[Box, ...], tuple[str, ...]] | None:
    if DETECTION not in program.ops or len(found) != 4:
        return None
    edges, classes, scores, count = (real(t, a) for t, a in found)
    n = edges.size // 4
    if edges.shape[-1:] != (4,) or classes.size != n or scores.size != n or count.size != 1:
        return None
    shift, note = _shift(None, labels) if labels else (0, "")
    said = float(count.reshape(-1)[0])
    total = min(n, max(0, int(said))) if math.isfinite(said) else 0
    boxes = []
    for edge, c, s in zip(edges.reshape(n, 4)[:total], classes.reshape(n), scores.reshape(n), strict=False):
        if s >= threshold and np.isfinite(edge).all() and math.isfinite(c):
            top, left, bottom, right = (float(e) for e in edge)
            boxes.append(Box(int(c), _label(labels, shift, int(c)), float(s), top, left, bottom, right))
    boxes.sort(key=lambda b: -b.score)
    return tuple(boxes), (note,) if note else ()


COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075", "#f032e6")


def draw(image: Image.Image, boxes: Sequence[Box], covered: Covered) -> Image.Image:
    """A copy of the original image with each box, its label and score. `covered` maps the model's view back."""
    picture = image.convert("RGB")
    pen = ImageDraw.Draw(picture)
    width = max(2, round(min(picture.size) / 200))
    font = ImageFont.load_default(max(11, round(min(picture.size) / 36)))
    for b in reversed(boxes):  # the surest on top
        colour = COLOURS[b.index % len(COLOURS)]
        left, right = (covered.left + x * covered.width for x in sorted((b.left, b.right)))
        top, bottom = (covered.top + y * covered.height for y in sorted((b.top, b.bottom)))
        left, right = (min(max(x, 0), picture.width - 1) for x in (left, right))
        top, bottom = (min(max(y, 0), picture.height - 1) for y in (top, bottom))
        pen.rectangle((left, top, right, bottom), outline=colour, width=width)
        text = f"{b.label} {b.score:.2f}"
        x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
        high, margin = y1 - y0, width
        y = top - high - 2 * margin if top > high + 2 * margin else top
        x = min(left, max(0, picture.width - (x1 - x0) - 2 * margin))
        pen.rectangle((x, y, x + x1 - x0 + 2 * margin, y + high + 2 * margin), fill=colour)
        pen.text((x + margin - x0, y + margin - y0), text, fill="white", font=font)
    return picture
