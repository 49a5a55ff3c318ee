"""Whole networks stored as float16 against float32: `python bench/gpu_number.py [DEVICE [NAME...]]`.

Networks of npulab's zoo with random weights, at the sizes of their sources, and real ones beside the project if they
are there. For each: how often both have the same class first (of classifiers), and the largest difference as a share of
the output's range, over pictures (beside the project, or random numbers from 0 to 1); memory of tensors and of weights;
medians of times by the device's own clock, in turns.

    ORT     ONNX Runtime's run of the network with weights and inputs rounded to float16, which computes in float32
            and rounds nothing between nodes: what of the difference is the weights' and the inputs'
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab import zoo
from npulab.dialects import to_onnx
from npulab.exporters.onnx import to_onnx as onnx_file
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.network import compile_network
from npulab.gpu.compute.traits import traits_of
from npulab.importers import load
from npulab.ir import Graph, Value

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL = SHARED / "models" / "float"
ZOO = ("repvgg-a2", "mobilenet-v2", "resnet50", "vit-tiny")
FILES = ("efficientnet_lite0_imagenet_float.onnx", "mobilenet_v1_0.25_224_1_default_1.tflite",
         "pretrainedResnet_large_float.tflite", "face_detection_short_range.tflite")
PICTURES = 24
TURNS = 9


def pictures(v: Value) -> list[NDArray[np.float32]]:
    """Inputs of a network: parts of pictures, or random numbers."""
    from PIL import Image

    r = np.random.default_rng(0)
    files = sorted((SHARED / "images" / "imagenet-500").glob("*.jpg")) if len(v.shape) == 4 else []
    first = v.shape[1] == 3 if len(v.shape) == 4 else False
    found = []
    for i in range(PICTURES):
        if not files or 3 not in v.shape:
            found.append(r.random(v.shape, np.float32))
            continue
        image = Image.open(files[i * len(files) // PICTURES]).convert("RGB")
        side = int(min(image.size) * r.uniform(0.4, 1))
        left, top = (int(r.integers(0, n - side + 1)) for n in image.size)
        size = v.shape[2:] if first else v.shape[1:3]
        image = image.crop((left, top, left + side, top + side)).resize(size[::-1])
        x = np.asarray(image, np.float32) / 255
        found.append(np.ascontiguousarray((x.transpose(2, 0, 1) if first else x)[None]))
    return found


def rounded(graph: Graph) -> Any:
    """ONNX Runtime, with constants of floats rounded to float16."""
    import onnx
    import onnxruntime

    proto = onnx.ModelProto.FromString(onnx_file(graph))
    for t in proto.graph.initializer:
        if t.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(t).astype(np.float16).astype(np.float32)
            t.CopyFrom(onnx.numpy_helper.from_array(array, t.name))
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def main() -> int:
    import onnxruntime

    number, only = int(sys.argv[1]) if len(sys.argv) > 1 else 0, sys.argv[2:]
    device = Device(number)
    traits = traits_of(device)
    print(f"{device.identity.name}, {device.identity.platform}; {PICTURES} pictures")
    print(f"{'network':<26} {'top-1':>6} {'of range':>9} {'ORT':>9} {'tensors MB':>13} {'weights MB':>15} "
          f"{'ms float32':>10} {'float16':>8} {'ratio':>6}")
    for name in (*ZOO, *FILES):
        if (only and name not in only) or (name not in ZOO and not (REAL / name).exists()):
            continue
        graph = to_onnx(load(zoo.build(name) if name in ZOO else REAL / name), keep_layout=True)
        (v,) = (graph.values[i] for i in graph.inputs)
        theirs = onnxruntime.InferenceSession(onnx_file(graph), providers=["CPUExecutionProvider"])
        other = rounded(graph)
        whole, half = (compile_network(graph, traits, number=n).open(device) for n in ("float32", "float16"))
        same, share, weights = 0, 0.0, 0.0
        for x in pictures(v):
            found = list(half.run({v.name: x}).values())
            wanted = theirs.run(None, {v.name: x})
            alone = other.run(None, {v.name: x.astype(np.float16).astype(np.float32)})
            same += found[0].argmax() == wanted[0].argmax()
            share = max(share, *(float(np.abs(a - b).max() / np.ptp(b)) for a, b in zip(found, wanted, strict=True)))
            weights = max(weights, *(float(np.abs(a - b).max() / np.ptp(b))
                                     for a, b in zip(alone, wanted, strict=True)))
        times: dict[str, list[float]] = {"whole": [], "half": []}
        for _ in range(TURNS):
            times["whole"].append(sum(whole.launch()))
            times["half"].append(sum(half.launch()))
        before, after = (1e3 * median(t) for t in times.values())
        memory, kept = (f"{a / 1e6:.2f} {b / 1e6:6.2f}" for a, b in (
            (whole.arenas.bytes, half.arenas.bytes), (whole.plan.weights, half.plan.weights)))
        is_class = len(found) == 1 and found[0].size == max(found[0].shape)
        print(f"{name[:26]:<26} {same if is_class else '':>6} {share:9.2e} {weights:9.2e} {memory:>13} {kept:>15} "
              f"{before:10.2f} {after:8.2f} {after / before:6.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
