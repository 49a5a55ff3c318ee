"""Each door whose tool is at hand, on models of many kinds: `python bench/export.py VENVS MODELS_DIR [--door D]`.

VENVS is a folder of virtual environments named after doors (openvino, ncnn, mnn, qnn, rknn, esp-dl, tflm, vela; onnx
and tflite run in this one). Each model is exported, converted by the vendor's own tool and run where that is possible
here; the outputs are compared with ONNX Runtime or LiteRT on one random input. For TensorFlow Lite Micro the arena that
the interpreter allocated stands beside the estimate.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from npulab import zoo
from npulab.cli.printing import table
from npulab.doors import tools
from npulab.doors.bundle import bundle
from npulab.doors.catalog import find_door
from npulab.doors.folder import building, write_files
from npulab.errors import NpulabError
from npulab.importers import load

DOORS = ("onnx", "openvino", "ncnn", "mnn", "qnn", "rknn", "esp-dl", "tflite", "tflm", "vela")
ZOO = (("mobilenet-v2", 96), ("mobilenet-v3", 96), ("squeezenet", 96), ("yolov8n", 160), ("ssdlite", 160),
       ("vit-tiny", 96))
FILES = ("float/yolov5n_coco_float.onnx", "float/ch_ppocr_mobile_v2.0_cls_infer.onnx", "quantized/vww_96_int8.tflite",
         "quantized/kws_ref_model.tflite", "quantized/ad01_int8.tflite", "quantized/pretrainedResnet_quant.tflite",
         "quantized/mobilenet_v1_0.25_128_quant.tflite", "quantized/ssdlite_mobiledet_coco_qat_raw.tflite",
         "quantized/yolov8n_full_integer_quant_416.tflite", "float/vww_96_float.tflite",
         "float/selfie_segmentation.tflite")
SLOW = {"esp-dl": ("mobilenet-v2", "squeezenet")}
"""Doors that get few models: simulating integers takes minutes for each."""
ARENA = re.compile(r"^\[RecordingMicroAllocator\] Arena allocation total (\d+) bytes", re.M)


def measure(door_name: str, name: str, content: bytes, venvs: Path) -> dict[str, Any]:
    """One door and model: what came of it."""
    door = find_door(door_name)
    row: dict[str, Any] = {"door": door_name, "model": name, "converted": "no", "error": None, "cosine": None,
                           "seconds": 0.0, "note": ""}
    start = time.perf_counter()
    try:
        graph = load(content)
        dims = {} if graph.format == "tflite" else {f"{graph.values[v].name}.{axis}": (1, 3, 48, 192)[axis]
                                                    for v in graph.inputs for axis in graph.values[v].dynamic_axes}
        graph = load(content, dims) if dims else graph
        python = venvs / door_name / "bin" / "python"
        tool = tools.locate(door, python if python.exists() else None)
        with tempfile.TemporaryDirectory() as scratch, building(Path(scratch) / "out") as folder:
            made = bundle(graph, door, door.targets[0] if door.targets else "")
            write_files(folder, made.files)
            ran = tools.run(folder, door, tool, made)
    except NpulabError as e:
        row["note"] = (e.message + ": " + e.facts.get("got", ""))[:70]
        return row
    row["seconds"] = time.perf_counter() - start
    row["converted"] = "yes" if ran.converted else "no"
    if ran.agreements:
        row["error"] = max(a.relative for a in ran.agreements)
        row["cosine"] = min(a.cosine for a in ran.agreements)
    row["note"] = ran.why or (f"{ran.placed[0]} NPU, {len(ran.placed[1])} CPU" if ran.placed else "")
    if ran.why:
        words = [line for line in ran.log.strip().splitlines() if line.strip()]
        row["note"] += f": {words[-1].strip()[:70]}" if words else ""
    if door_name == "tflm" and (m := ARENA.search(ran.log)):
        row["arena"], row["hint"] = int(m[1]), made.manifest["tflm"]["arena_bytes"]
        row["note"] = f"arena {m[1]}, hint {row['hint']} (x{row['hint'] / int(m[1]):.2f})"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("venvs", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--door", action="append", choices=DOORS)
    parser.add_argument("--without", action="append", default=[], metavar="MODEL", help="leave out models so called")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models = {name: zoo.build(name, size, 10) for name, size in ZOO}
    models |= {Path(f).name: (options.models / f).read_bytes() for f in FILES}
    rows = []
    for door in options.door or DOORS:
        for name, content in models.items():
            if name not in SLOW.get(door, (name,)) or any(w in name for w in options.without):
                continue
            rows.append(measure(door, name, content, options.venvs))
            print(door, name, rows[-1]["converted"], rows[-1]["note"], file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    table(["door", "model+", "made", ">error", ">cosine", ">s", "note+"],
          [(r["door"], r["model"], r["converted"], "" if r["error"] is None else f"{r['error']:.1e}",
            "" if r["cosine"] is None else f"{r['cosine']:.6f}", f"{r['seconds']:.1f}", r["note"]) for r in rows])


if __name__ == "__main__":
    main()
