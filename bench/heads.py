"""Heads cut off, and their post-processing in NumPy: `python bench/heads.py [SHARED_DIR]`.

Boards on which YOLOv5n and the zoo's YOLOv8n are wholly on the NPU before and after `npulab patch --target BOARD`;
CPU milliseconds an image of each decoder; AP of YOLOv5n untouched, with an obvious suppression, against its body with
the post-processing (needs pycocotools); and TFLite_Detection_PostProcess against LiteRT's own. Needs the developers'
shared folder; takes three minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import npulab
from npulab import zoo
from npulab.importers import load
from npulab.ir import Graph
from npulab.passes.certificate import session
from npulab.passes.litert import networks
from npulab.passes.pipeline import patched, post_of
from npulab.passes.tflite_head import without_head
from npulab.postprocess import apply, detect
from npulab.postprocess.boxes import on_picture
from npulab.postprocess.types import Post
from npulab.targets.facts.board import boards

SHARED = Path(__file__).resolve().parents[2] / "shared"
Found = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Boxes (N, 4: left, top, right, bottom, in pixels of the picture), scores, classes."""


# boards


def on_boards(name: str, graph: Graph) -> None:
    """As `npulab patch --target BOARD` does it: floats as floats, or as int8 where the board takes more so."""
    before, after = [], []
    start = time.perf_counter()
    for board in boards():
        made = npulab.patch(graph, board)
        before += [board] if made.before and made.before.count("npu") == len(made.before.findings) else []
        after += [board] if made.after and made.after.count("npu") == len(made.after.findings) else []
    new, lost = ([b for b in a if b not in c] for a, c in ((after, before), (before, after)))
    print(f"{name}: wholly on the NPU of {len(before)} of {len(boards())} boards untouched, of {len(after)} patched "
          f"({time.perf_counter() - start:.0f} s)\n  new: {', '.join(new)}\n  lost: {', '.join(lost) or 'none'}",
          flush=True)


# time


SETTINGS = ((0.001, True), (0.001, False), (0.25, False))
"""Least score, and whether a box may be of several classes."""


def milliseconds(post: Post, outputs: dict[str, Any]) -> list[float]:
    """Of each of SETTINGS, CPU time of the one thread that works, the best of seven."""
    times = []
    for score, several in SETTINGS:
        one = []
        for _ in range(7):
            start = time.thread_time()
            detect(post, outputs, score, 0.65, 300, several)
            one.append(time.thread_time() - start)
        times.append(1000 * min(one))
    return times


def print_times(times: Sequence[Sequence[float]]) -> None:
    for (score, several), column in zip(SETTINGS, zip(*times, strict=True), strict=True):
        print(f"  score {score}, {'several classes' if several else 'one class'} a box: CPU mean "
              f"{np.mean(column):.1f}, median {np.median(column):.1f}, longest {max(column):.1f} ms", flush=True)


def random_maps(post: Post) -> dict[str, Any]:
    """Maps with about as many likely boxes as a street has: class scores of YOLOv8 in the way that trained ones lie."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(-11, 1.6, s).astype(np.float32) if s[1] == 80 else rng.normal(0, 2, s).astype(np.float32)
            for name, s in post.body.items()}


# accuracy


def pictures(shared: Path) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    folder = shared / "images" / "coco-138"
    for info in json.loads((folder / "instances.json").read_text())["images"]:
        yield info, Image.open(folder / "images" / info["file_name"]).convert("RGB")


def letterbox(image: Image.Image, side: int) -> NDArray[np.float32]:
    """One scale, centred, grey around it; 1,3,side,side from 0 to 1."""
    scale = min(side / image.width, side / image.height)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (side, side), (114, 114, 114))
    canvas.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return np.ascontiguousarray((np.asarray(canvas, np.float32) / 255).transpose(2, 0, 1)[None])


def obvious(rows: NDArray[Any], score: float, iou: float, limit: int) -> Found:
    """YOLOv5's suppression, box by box: rows of x, y, w, h, object, classes; a box may be of several classes."""
    found = []
    for c in range(rows.shape[1] - 5):
        scores = rows[:, 4] * rows[:, 5 + c]
        order = sorted(np.nonzero(scores > score)[0], key=lambda i: -scores[i])
        x, y, w, h = rows[order, :4].T.astype(np.float64)
        boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        alive = np.arange(len(order))
        while len(alive):
            best, alive = alive[0], alive[1:]
            found.append((float(scores[order[best]]), c, boxes[best]))
            alive = alive[overlap(boxes[best], boxes[alive]) <= iou]
    found.sort(key=lambda x: -x[0])
    found = found[:limit]
    return (np.array([b for _, _, b in found]).reshape(-1, 4), np.array([s for s, _, _ in found]),
            np.array([c for _, c, _ in found], np.int64))


def overlap(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union of one box with each of the others."""
    w = np.maximum(np.minimum(a[2], b[:, 2]) - np.maximum(a[0], b[:, 0]), 0)
    h = np.maximum(np.minimum(a[3], b[:, 3]) - np.maximum(a[1], b[:, 1]), 0)
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) - w * h)


def ap(shared: Path, found: dict[int, Found], categories: Sequence[int]) -> float | None:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        print("pip install pycocotools to measure AP")
        return None
    rows = [{"image_id": i, "category_id": int(categories[c]), "score": float(s),
             "bbox": [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])]}
            for i, (boxes, scores, classes) in found.items() for b, s, c in zip(boxes, scores, classes, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(shared / "images" / "coco-138" / "instances.json"))
        judge = COCOeval(truth, truth.loadRes(rows), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0])


def yolov5(shared: Path) -> None:
    graph = load(shared / "models" / "float" / "yolov5n_coco_float.onnx")
    on_boards("YOLOv5n", graph)
    body, changes = patched(graph, ["cut-head"])
    post = post_of(graph, body, changes)
    assert post is not None
    first, second = session(graph), session(body)
    ids = [c["id"] for c in json.loads((shared / "images/coco-138/instances.json").read_text())["categories"]]
    theirs, ours, times, largest = {}, {}, [], 0.0
    for info, image in pictures(shared):
        x = letterbox(image, 640)
        (rows,) = first.run(None, {"input": x})
        outputs = dict(zip(post.body, second.run(list(post.body), {"input": x}), strict=True))
        largest = max(largest, float(np.abs(apply(post, outputs)["output"] - rows).max()))
        size = image.height, image.width
        boxes, scores, classes = obvious(rows[0], 0.001, 0.65, 300)
        theirs[info["id"]] = on_picture(boxes / 640, (640, 640), size), scores, classes
        boxes, scores, classes = detect(post, outputs, 0.001, 0.65, 300, several=True)
        ours[info["id"]] = on_picture(boxes, (640, 640), size), scores, classes
        times.append(milliseconds(post, outputs))
    same = sum(len(a[0]) == len(b[0]) and np.array_equal(a[2], b[2]) and np.allclose(a[0], b[0], atol=0.01)
               for a, b in zip(theirs.values(), ours.values(), strict=True))
    one, other = ap(shared, theirs, ids), ap(shared, ours, ids)
    print(f"YOLOv5n, {len(ours)} images: AP untouched {one:.7f}, body and post-processing {other:.7f}\n"
          f"  the same boxes in the same order on {same}; largest difference of an output {largest:.2g}")
    print_times(times)


def yolov8() -> None:
    graph = load(zoo.build("yolov8n"))
    on_boards("YOLOv8n", graph)
    body, changes = patched(graph, ["cut-head"])
    post = post_of(graph, body, changes)
    assert post is not None
    maps = random_maps(post)
    counts = [len(detect(post, maps, score, 1.0, 1 << 20, several)[0]) for score, several in SETTINGS]
    print(f"  random maps with {', '.join(map(str, counts))} candidates:")
    print_times([milliseconds(post, maps) for _ in range(5)])


def ssd(shared: Path, name: str, side: int) -> None:
    graph = load(shared / "models" / "quantized" / f"{name}.tflite")
    made = without_head(graph)
    both = networks(graph, [graph.values[v].name for v in graph.outputs], made.data, list(made.post.body), quick=True)
    (entry,) = (graph.values[v].name for v in graph.inputs)
    equal, times, count = 0, [], 0
    for _, image in pictures(shared):
        x = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))[None]
        wanted, raw = both.first({entry: x}), both.second({entry: x})
        start = time.thread_time()
        given = apply(made.post, raw)
        times.append(1000 * (time.thread_time() - start))
        equal += all(np.array_equal(wanted[n], given[n]) for n in wanted)
        count += 1
    print(f"{name}: boxes, classes, scores and count the same bits as LiteRT's on {equal} of {count} images; "
          f"CPU mean {np.mean(times):.1f}, median {np.median(times):.1f}, longest {max(times):.1f} ms")


def main() -> None:
    shared = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED
    steps: list[Callable[[], None]] = [
        lambda: yolov5(shared), yolov8, lambda: ssd(shared, "coco_ssd_mobilenet_v1_1.0_quant_2018_06_29", 300),
        lambda: ssd(shared, "ssdlite_mobiledet_coco_qat_postprocess", 320)]
    for step in steps:
        step()


if __name__ == "__main__":
    main()
