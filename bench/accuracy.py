"""Accuracy as the NPU computes it, against LiteRT on the same images: `python bench/accuracy.py [SHARED_DIR]`.

MobileNetV1 1.0 on labelled ImageNet images: top-1 of both, and how often they name the same class. SSDLite MobileDet on
labelled COCO images: AP of both (needs pycocotools). Needs the developers' shared folder; takes a few minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import npulab

SHARED = Path(__file__).resolve().parents[2] / "shared"
Run = Callable[[NDArray[np.generic]], list[NDArray[np.generic]]]


def litert(path: Path) -> Run:
    """The model in LiteRT with its reference kernels, the only ones that are a specification."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(model_path=str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    (one,) = interpreter.get_input_details()

    def run(image: NDArray[np.generic]) -> list[NDArray[np.generic]]:
        interpreter.set_tensor(one["index"], image)
        interpreter.invoke()
        return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]

    return run


def virtual(path: Path) -> Run:
    """The model compiled with plan best, on the virtual NPU."""
    program = npulab.compile(npulab.load(path), target="a311d")
    session = npulab.open_session(program)
    names = {t.value: t.name for t in program.tensors}

    def run(image: NDArray[np.generic]) -> list[NDArray[np.generic]]:
        out = session.run({names[program.inputs[0]]: image})
        return [out[names[v]] for v in program.outputs]

    return run


def middle(path: Path, side: int) -> NDArray[np.uint8]:
    """The middle of a 256-pixel image: the central 87.5 % that MobileNet is evaluated on (TF-Slim's preprocessing)."""
    image = Image.open(path).convert("RGB")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))[None]


def pixels(path: Path, side: int) -> NDArray[np.uint8]:
    """The image, squashed to a square, as a batch of one."""
    return np.asarray(Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR))[None]


def classification(shared: Path) -> None:
    images = shared / "images" / "imagenet-500"
    rows = [line.split("\t") for line in (images / "labels.tsv").read_text().splitlines()[1:]]
    path = shared / "models" / "quantized" / "mobilenet_v1_1.0_224_quant.tflite"
    ours, theirs = virtual(path), litert(path)
    right_ours = right_theirs = same = 0
    for name, label, *_ in rows:
        image = middle(images / name, 224)
        a, b = int(np.argmax(ours(image)[0])), int(np.argmax(theirs(image)[0]))
        right_ours += a == int(label) + 1  # class 0 of the model is background
        right_theirs += b == int(label) + 1
        same += a == b
    n = len(rows)
    print(f"MobileNetV1 1.0, {n} images: top-1 npulab {right_ours / n:.4f}, LiteRT {right_theirs / n:.4f}, "
          f"difference {100 * (right_ours - right_theirs) / n:+.2f} points; same top-1 {100 * same / n:.1f} %")


def detection(shared: Path) -> None:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        print("MobileDet: pip install pycocotools to measure AP")
        return
    folder = shared / "images" / "coco-138"
    path = shared / "models" / "quantized" / "ssdlite_mobiledet_coco_qat_postprocess.tflite"
    labels = json.loads((folder / "instances.json").read_text())
    names = (shared / "images" / "coco_labels.txt").read_text().splitlines()  # the model's classes, with gaps
    ids = {c["name"]: c["id"] for c in labels["categories"]}
    quiet = io.StringIO()
    scores = {}
    for who, run in (("npulab", virtual(path)), ("LiteRT", litert(path))):
        found = []
        for info in labels["images"]:
            boxes, classes, confidence, count = (x[0] for x in run(pixels(folder / "images" / info["file_name"], 320)))
            for k in range(int(np.ravel(count)[0])):
                top, left, bottom, right = (float(v) for v in boxes[k])
                w, h = info["width"], info["height"]
                category = ids.get(names[int(classes[k])], -1)
                found.append({"image_id": info["id"], "category_id": category, "score": float(confidence[k]),
                              "bbox": [left * w, top * h, (right - left) * w, (bottom - top) * h]})
        with contextlib.redirect_stdout(quiet):
            truth = COCO(str(folder / "instances.json"))
            judge = COCOeval(truth, truth.loadRes(found), "bbox")
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        scores[who] = float(judge.stats[0])
    print(f"SSDLite MobileDet, {len(labels['images'])} images: AP npulab {scores['npulab']:.4f}, "
          f"LiteRT {scores['LiteRT']:.4f}, difference {100 * (scores['npulab'] - scores['LiteRT']):+.2f} points")


def main() -> None:
    shared = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED
    for measure in (classification, detection):
        start = time.perf_counter()
        measure(shared)
        print(f"  took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
