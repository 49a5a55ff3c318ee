"""From a network and labelled data to a figure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UsageError
from npulab.evaluation.classification import top1
from npulab.evaluation.coco import Instances, average_precision, need_pycocotools, read_instances
from npulab.evaluation.detection import category_ids, decoder_of
from npulab.evaluation.devices import Device, open_device
from npulab.evaluation.labels import by_folders, matched, read_table
from npulab.evaluation.types import Evaluation, Progress
from npulab.ir import Graph
from npulab.postprocess.boxes import on_picture
from npulab.postprocess.types import Post, read_post
from npulab.runtime.answers import Labels, labels_beside, read_labels
from npulab.runtime.array_samples import ArraySamples
from npulab.runtime.datasets import ImageSamples, open_samples, spread
from npulab.runtime.images import Fit, extents
from npulab.runtime.objects import post_beside

Path_ = str | os.PathLike[str]


def evaluate(model: Graph | Path_, data: Path_, labels: Path_ | Sequence[int] | NDArray[np.int64] | None = None,
             device: str | None = None, normalize: str | None = None, fit: Fit | None = None, limit: int | None = None,
             classes: Path_ | None = None, offset: int | None = None, post: Path_ | None = None,
             progress: Progress | None = None, place: Path_ | None = None) -> Evaluation:
    """How well a network does on labelled data: top-1 of a classifier, AP of a detector where labels are boxes.

    data       as `open_samples` takes it.
    labels     a table (`read_table`), COCO's instances.json, or a class for each sample. None: `instances.json` or
               `labels.tsv` in the folder, `labels` in the .npz file, or a folder for each class. Samples without a
               label are left out.
    device     as `open_device` takes it.
    normalize, fit   as `open_samples` takes them. A YOLO is given its images in gray bars unless `fit` says otherwise,
               and everything else squashed.
    limit      at most so many samples, evenly spread over all that have labels.
    classes    a file with the network's names of classes, one a line, where labels are names.
    offset     what the network's class is above the label's; None: found (`offset_of`).
    place      the file of a network that is given as a Graph: what lies beside it is found by its name.
    post       what follows a detector whose head was cut off; None: MODEL.post.json, if it is there.

    Raises: UsageError, ModelError and UnsupportedError as these do.
    """
    from npulab.importers import load

    at = model if isinstance(model, str | os.PathLike) else place
    beside = Path(at) if at is not None else None
    graph = load(model) if isinstance(model, str | os.PathLike) else model
    names = read_labels(classes) if classes is not None else None
    if limit is not None and limit < 1:
        raise UsageError("there is nothing to evaluate", got=f"a limit of {limit}", want="1 or more")
    if labels is None:
        labels = _beside(Path(data))
    if isinstance(labels, str | os.PathLike) and os.fspath(labels).lower().endswith(".json"):
        need_pycocotools()
        truth = read_instances(labels)
        after = read_post(post) if post is not None else post_beside(beside) if beside else None
        return _detector(_Task(graph, Path(data), normalize, fit, limit, names, progress), device, truth, labels, after)
    if post is not None:
        raise UsageError("--post is of detectors, and the labels are classes", try_="--labels instances.json")
    table = read_table(labels, names) if isinstance(labels, str | os.PathLike) else None
    running = open_device(graph, device)
    samples = open_samples(data, running.inputs, normalize, fit or "squash")
    truths, known, note = _truths(samples, table, labels, names, beside)
    positions, notes = truths[0], [note] if note else []
    if len(positions) < len(samples):
        notes.append(f"{len(samples) - len(positions)} samples without a label left out")
    chosen = [positions[i] for i in spread(len(positions), limit)]
    few = truths[1][np.asarray(spread(len(positions), limit), np.intp)]
    samples = samples.take(range(len(samples)) if len(chosen) == len(samples) else chosen)
    made = top1(running.run, samples, few, offset, known, progress)
    return _finished(made, graph, running, samples, notes)


def _finished(made: Evaluation, graph: Graph, device: Device, samples: ImageSamples | ArraySamples,
              notes: Sequence[str]) -> Evaluation:
    return replace(made, names=samples.names, model=graph.name, data=samples.origin, device=device.title,
                   how=samples.how, notes=(*notes, *made.notes))


def check_labels(labels: Path_) -> None:
    """Raises what `evaluate` does for a file of labels that cannot be read."""
    if os.fspath(labels).lower().endswith(".json"):
        need_pycocotools()
        read_instances(labels)
    else:
        read_table(labels)


def _beside(data: Path) -> Path | None:
    """Labels that lie in the folder of the data."""
    return next((p for p in (data / "instances.json", data / "labels.tsv") if data.is_dir() and p.is_file()), None)


Truths = tuple[Sequence[int], NDArray[np.int64]]
"""Positions of the samples that have labels, and these."""


def _truths(samples: ImageSamples | ArraySamples, table: dict[str, int] | None, labels: Any, names: Labels | None,
            model: Path | None) -> tuple[Truths, int | None, str]:
    """Also how many classes there are, if that is known, and a sentence."""
    everything, known = range(len(samples)), names.count if names else None
    if table is not None:
        if isinstance(samples, ArraySamples):
            raise UsageError("a table of labels is for images", want=f"'labels' in {samples.path}, N integers")
        positions, found = matched(samples.names, table, labels)
        return (positions, np.array(found, np.int64)), known, ""
    if labels is not None:
        given = np.asarray(labels)
        if given.shape != (len(samples),) or given.dtype.kind not in "iu":
            raise UsageError("there is not one label for each sample", want=f"{len(samples)} integers",
                             got=f"{given.dtype}{list(given.shape)}")
        return (everything, given.astype(np.int64)), known, ""
    if isinstance(samples, ArraySamples):
        if samples.labels is None:
            raise UsageError(f"nothing says which classes the samples of {samples.path} are of",
                             want="an array 'labels' of N integers in the .npz file")
        return (everything, samples.labels), known, ""
    beside = labels_beside(model) if model else None
    found_, count, note = by_folders(samples.names, samples.path, names, read_labels(beside) if beside else None)
    return (everything, found_), count, note


# detectors


@dataclass(frozen=True)
class _Task:
    graph: Graph
    data: Path
    normalize: str | None
    fit: Fit | None
    limit: int | None
    names: Labels | None
    progress: Progress | None


def _detector(task: _Task, device: str | None, truth: Instances, labels: Path_, post: Post | None) -> Evaluation:
    if task.fit in ("crop", "centre"):
        raise UsageError(f"--fit {task.fit} leaves out parts of the images that have objects",
                         want="squash, pad or letterbox")
    running = open_device(task.graph, device)
    if len(running.inputs) != 1:
        raise UsageError("a detector takes one image", got=", ".join(t.name for t in running.inputs))
    size = extents(running.inputs[0])[1:3]
    decoder = decoder_of(task.graph, running, truth, size, post, task.names)
    ids = category_ids(decoder, truth, task.names)
    fit = task.fit or decoder.fit
    samples = open_samples(task.data, running.inputs, task.normalize, fit)
    if isinstance(samples, ArraySamples):
        raise UsageError("boxes are measured on images", want="a folder or .zip of images", got=str(task.data))
    positions, pictures = matched(samples.names, {p.file_name: p for p in truth.images}, labels)
    notes = [f"boxes by {decoder.title}"]
    if len(positions) < len(truth.images):
        notes.append(f"{len(truth.images) - len(positions)} images of the labels are not among the data")
    few = spread(len(positions), task.limit)
    samples, pictures = samples.take([positions[i] for i in few]), [pictures[i] for i in few]

    def rows() -> Iterator[NDArray[np.float64]]:
        for k, (feed, picture) in enumerate(zip(samples, pictures, strict=True), 1):
            yield _rows(decoder.boxes(running.run(feed)), ids, picture.id, size, (picture.height, picture.width), fit)
            if task.progress:
                task.progress(k, len(samples))

    found = np.concatenate([np.zeros((0, 7)), *rows()])
    value, ap50 = average_precision(truth, found, [p.id for p in pictures])
    made = Evaluation("AP", value, len(samples), found, ap50=ap50)
    return _finished(made, task.graph, running, samples, notes)


def _rows(found: tuple[Any, Any, Any], ids: NDArray[np.int64], picture: int, size: tuple[int, int],
          whole: tuple[int, int], fit: Fit) -> NDArray[np.float64]:
    """Image id, left, top, width, height, score, category id: boxes of known classes, in pixels of the picture."""
    boxes, scores, classes = found
    boxes = on_picture(boxes, size, whole, "squash" if fit == "squash" else "pad")
    inside = (classes >= 0) & (classes < len(ids)) & np.isfinite(boxes).all(1)
    boxes, scores, kinds = boxes[inside], scores[inside], ids[classes[inside]]
    rows = np.column_stack([np.full(len(boxes), picture), boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, kinds])
    return np.asarray(rows[kinds >= 0], np.float64)

