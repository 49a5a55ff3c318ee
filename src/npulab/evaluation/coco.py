"""COCO's labels and its average precision, which pycocotools computes."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Collection
from typing import Any

import msgspec

from npulab.errors import ModelError, UsageError
from npulab.evaluation.types import Array
from npulab.program.files import read_bounded

BYTES_MAX = 1 << 29


class Picture(msgspec.Struct, frozen=True):
    id: int
    file_name: str
    width: int
    height: int


class Category(msgspec.Struct, frozen=True):
    id: int
    name: str


class Annotation(msgspec.Struct, frozen=True):
    """`bbox`: left, top, width, height in pixels."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int = 0


class Instances(msgspec.Struct, frozen=True):
    """What of an instances.json AP needs."""

    images: list[Picture]
    annotations: list[Annotation]
    categories: list[Category]

    @property
    def ids(self) -> list[int]:
        """Of the categories, rising: the order in which networks of as many classes count them."""
        return sorted(c.id for c in self.categories)


def read_instances(path: str | os.PathLike[str]) -> Instances:
    """Raises: UsageError if it cannot be read; ModelError if it is no such file."""
    name = os.path.basename(os.fspath(path))
    try:
        found = msgspec.json.decode(read_bounded(path, "labels", BYTES_MAX), type=Instances)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise ModelError(f"{name} is not COCO's instances.json", got=str(e)[:300]) from None
    for what, ids in (("images", [i.id for i in found.images]), ("file names", [i.file_name for i in found.images]),
                      ("categories", [c.id for c in found.categories])):
        if len(set(ids)) < len(ids) or not ids:
            raise ModelError(f"{name} has {'two ' + what + ' that are one' if ids else 'no ' + what}")
    if any(i.width < 1 or i.height < 1 for i in found.images):
        raise ModelError(f"{name} has an image without a size")
    return found


def need_pycocotools() -> None:
    """Raises UsageError if it is not installed: better before an hour's work than after it."""
    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        raise UsageError("AP is computed with pycocotools, which is not installed",
                         try_="pip install 'npulab[evaluate]'") from None


def average_precision(truth: Instances, rows: Array, pictures: Collection[int]) -> tuple[float, float]:
    """AP and AP50 of `rows` (image id, left, top, width, height, score, category id) on these images, by their ids.

    Raises: UsageError if none of the images has an object.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    wanted = set(pictures)
    labels: list[dict[str, Any]] = [
        {"id": k, "image_id": a.image_id, "category_id": a.category_id, "bbox": list(a.bbox),
         "area": a.bbox[2] * a.bbox[3] if a.area is None else a.area, "iscrowd": a.iscrowd}
        for k, a in enumerate((a for a in truth.annotations if a.image_id in wanted), 1)]
    if not any(not a["iscrowd"] for a in labels):
        raise UsageError("none of the images has an object to be found", got=f"{len(wanted)} images")
    if not len(rows):
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {"images": [msgspec.to_builtins(i) for i in truth.images if i.id in wanted],
                         "annotations": labels, "categories": [msgspec.to_builtins(c) for c in truth.categories]}
        known.createIndex()
        judge = COCOeval(known, known.loadRes(rows), "bbox")
        judge.params.imgIds = sorted(wanted)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return max(0.0, float(judge.stats[0])), max(0.0, float(judge.stats[1]))
