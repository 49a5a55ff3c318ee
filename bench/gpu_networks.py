"""Whole float networks on an OpenCL device: `python bench/gpu_networks.py [DEVICE [NAME...]]`.

Networks of npulab's zoo with random weights, at the sizes of their sources (detectors at 320), and real ones beside the
project if they are there. For each: the largest difference of an output from ONNX Runtime's, absolute and as a share of
that output's range; medians of times in turns with ONNX Runtime on the CPU with 2 threads; memory. Inputs are random
numbers from 0 to 1. Exit status 1 if a network is further than 1e-4 from ONNX Runtime in both ways, or cannot run.

    ms device   sum of the launches, by the device's own clock      ms wall   from arrays to arrays, by this machine's
    ms ORT      ONNX Runtime, all its optimizations, from arrays to arrays, 2 threads
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

from npulab import zoo
from npulab.dialects import to_onnx
from npulab.errors import NpulabError
from npulab.exporters.onnx import to_onnx as onnx_file
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.network import compile_network
from npulab.gpu.compute.traits import traits_of
from npulab.importers import load
from npulab.passes.certificate import random_inputs

REAL = Path(__file__).resolve().parents[2] / "shared" / "models" / "float"
ZOO = {"repvgg-a2": None, "mobilenet-v2": None, "resnet50": None, "mobilenet-v3": None, "squeezenet": None,
       "vit-tiny": None, "yolov8n": 320, "ssdlite": 320}
FILES = ("efficientnet_lite0_imagenet_float.onnx", "yolov5n_coco_float.onnx", "ad01_fp32.tflite",
         "face_detection_short_range.tflite", "kws_ref_model_float32.tflite",
         "mobilenet_v1_0.25_224_1_default_1.tflite", "pretrainedResnet_large_float.tflite", "vww_96_float.tflite")
CLOSE = 1e-4
TURNS = 7


def main() -> int:
    import onnxruntime

    number = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    only = sys.argv[2:]
    device = Device(number)
    traits = traits_of(device)
    print(f"{device.identity.name}, {device.identity.platform}, driver {device.identity.driver}; ONNX Runtime "
          f"{onnxruntime.__version__}, 2 threads")
    print(f"{'network':<26} {'largest':>9} {'of range':>9} {'launches':>8} {'ms device':>9} {'ms wall':>8} "
          f"{'ms ORT':>8} {'planned MB':>10} {'apart MB':>8} {'weights MB':>10} {'open s':>6}")
    failed = 0
    for name in (*ZOO, *FILES):
        if only and name not in only:
            continue
        if name not in ZOO and not (REAL / name).exists():
            continue
        try:
            graph = to_onnx(load(zoo.build(name, ZOO[name]) if name in ZOO else REAL / name), keep_layout=True)
            opened = compile_network(graph, traits).open(device)
        except NpulabError as e:
            failed += 1
            print(f"{name[:26]:<26} {e.message}")
            continue
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would wait in our way
        theirs = onnxruntime.InferenceSession(onnx_file(graph), options, providers=["CPUExecutionProvider"])
        feeds = random_inputs(graph, 0)
        wanted = dict(zip(opened.plan.outputs, theirs.run(list(opened.plan.outputs), feeds), strict=True))
        ours, other = [], []
        for _ in range(TURNS):
            start = time.perf_counter()
            found = opened.run(feeds)
            ours.append(time.perf_counter() - start)
            start = time.perf_counter()
            theirs.run(None, feeds)
            other.append(time.perf_counter() - start)
        _, profile = opened.profile(feeds, TURNS)
        errors = [np.abs(found[n].astype(np.float64) - w) for n, w in wanted.items()]
        largest = max(float(e.max()) for e in errors)
        share = max(float(e.max() / max(np.ptp(w), 1e-30)) for e, w in zip(errors, wanted.values(), strict=True))
        far = largest > CLOSE and share > CLOSE
        failed += far
        a = opened.arenas
        print(f"{name[:26]:<26} {largest:9.2e} {share:9.2e} {len(opened.plan.steps):8} {1e3 * profile.seconds:9.2f} "
              f"{1e3 * median(ours):8.2f} {1e3 * median(other):8.2f} {a.bytes / 1e6:10.2f} {a.apart / 1e6:8.2f} "
              f"{opened.plan.weights / 1e6:10.2f} {opened.opened:6.1f}{'  too far' if far else ''}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
