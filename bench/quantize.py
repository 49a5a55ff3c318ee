"""Methods of quantization on real networks: accuracy, time, memory, against other quantizers.

    python bench/quantize.py matrix [SHARED_DIR]    every method's accuracy change against plain min-max, 3 networks
    python bench/quantize.py low                    4-bit weights: what is lost, what is recovered, with an interval
    python bench/quantize.py rows [SHARED_DIR]      EfficientNet-Lite0, CIFAR ResNets, MobileNetV1, YOLOv5n
    python bench/quantize.py side NNCF_PYTHON [SHARED_DIR]   against ONNX Runtime's quantizer and NNCF, one run

`side` runs each quantizer in a process of its own, with the same network, images and threads; NNCF in the Python of an
environment that has nncf, onnx and onnxruntime. Accuracy is of the QDQ file in ONNX Runtime, on all images; calibration
takes every n-th. Where rows do not say otherwise, weights have one scale a tensor.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import npulab
from npulab.dialects import from_tflite
from npulab.program.pages import Buffer
from npulab.quantization.job import Options
from npulab.quantization.types import ListedSamples, Samples, Scheme
from npulab.quantizing import Quantized, Turned, quantize
from npulab.runtime.datasets import input_tensors, open_samples
from npulab.samples import networks
from npulab.targets.facts.quantization import rules_of

SHARED = Path(__file__).resolve().parents[2] / "shared"
RULES = replace(rules_of("generic-int8"), file="onnx", arithmetic=None)
"""TFLite's integers in an ONNX file, which ONNX Runtime runs faster than LiteRT's reference kernels."""


@dataclass
class Case:
    """A network with samples to calibrate and labelled ones to measure; samples as the ONNX form takes them."""

    name: str
    graph: Any
    calibration: Samples
    test: Samples
    labels: NDArray[np.int64]
    offset: int = 0

    def right(self, model: Buffer, output: str) -> NDArray[np.bool_]:
        """Which test images the model gets right in ONNX Runtime, layers between QDQ nodes in floats."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else data become int8
        session = onnxruntime.InferenceSession(bytes(model), options, providers=["CPUExecutionProvider"],
                                               disabled_optimizers=["WeightBiasQuantization"])
        found = [int(np.argmax(session.run([output], dict(x))[0])) for x in self.test]
        return np.array([p - self.offset == t for p, t in zip(found, self.labels, strict=True)])


def of_files(name: str, model: Path, data: Path, normalize: str, fit: str = "squash", calibrate: int = 128,
             measure: int | None = None) -> Case:
    graph = npulab.load(model)
    inputs = input_tensors(graph)
    calibration = open_samples(data, inputs, normalize, fit, calibrate)  # type: ignore[arg-type]
    test = open_samples(data, inputs, normalize, fit, measure)  # type: ignore[arg-type]
    labels = labels_of(data, test)
    held: Samples = ListedSamples(list(test), test.origin)
    if graph.format == "tflite":
        held = ListedSamples(list(Turned(held, from_tflite(graph).inputs)), test.origin)
    outputs = graph.values[graph.outputs[0]].elements
    return Case(name, graph, calibration, held, labels, outputs - 1000 if outputs in (1000, 1001) else 0)


def labels_of(data: Path, samples: Any) -> NDArray[np.int64]:
    table = data / "labels.tsv"
    if data.is_dir() and table.exists():
        rows = dict(line.split("\t")[:2] for line in table.read_text().splitlines()[1:])
        return np.array([int(rows[Path(n).name]) for n in samples.names])
    folders = sorted({Path(n).parent.name for n in samples.names})
    return np.array([folders.index(Path(n).parent.name) for n in samples.names])


def of_samples(name: str) -> Case:
    graph = npulab.load(networks.path(name))
    (inp,) = (graph.values[v] for v in graph.inputs)
    calibration, test, labels = networks.data(name)
    return Case(name, graph, ListedSamples([{inp.name: x.reshape(inp.shape)} for x in calibration], "training images"),
                ListedSamples([{inp.name: x.reshape(inp.shape)} for x in test], "held-out images"), np.asarray(labels))


def run(case: Case, recipe: str, rules: Any = RULES, **options: Any) -> tuple[Quantized, NDArray[np.bool_], float]:
    start = time.process_time()
    made = quantize(case.graph, case.calibration, rules, Options(recipe=recipe, integer_ends=False, **options))
    seconds = time.process_time() - start
    return made, case.right(made.qdq, made.network.name(made.network.graph.outputs[0])), seconds


def reference(case: Case) -> NDArray[np.bool_]:
    from npulab.dialects import to_onnx
    from npulab.exporters.onnx import to_onnx as written

    graph = to_onnx(case.graph)
    return case.right(written(graph), graph.values[graph.outputs[0]].name)


def points(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Difference of accuracies in points."""
    return 100 * float(a.mean() - b.mean())


# the lecture's matrix

SYMMETRIC = replace(RULES, activations=(Scheme(8, symmetric=True), *RULES.activations[1:]))
METHODS: Sequence[tuple[str, str, str, dict[str, Any]]] = (
    ("basic calibration", "moving average", "moving-average", {}),
    ("", "percentile", "percentile", {}),
    ("", "entropy", "entropy", {}),
    ("", "mean squared error", "mse", {}),
    ("asymmetric", "symmetric instead", "min-max", {"rules": SYMMETRIC}),
    ("distillation", "block by block", "min-max+distil", {}),
    ("bias correction", "fast", "min-max+correct", {}),
    ("", "full", "min-max+correct-full", {}),
    ("AdaRound", "", "min-max+adaround", {}),
    ("clipping", "weights", "min-max+weights-mse", {}),
    ("", "activations", "min-max+clip", {}),
    ("part of the layers", "first and last float", "min-max", {"keep": "ends"}),
    ("", "16-bit activations", "min-max", {"activations": 16}),
    ("INT4", "8-bit weights instead", "min-max", {"weights": 8}),
    ("equalization", "", "min-max+equalize", {}),
    ("", "and absorption", "min-max+equalize+absorb", {}),
    ("migration", "SmoothQuant", "min-max+smooth", {}),
    ("per channel", "", "min-max", {"per_channel": True}),
    ("search", "auto", "auto", {}),
)


DISTILLED = 1 << 20
"""Bytes of the largest network that is distilled here: one of EfficientNet-Lite0's dozen blocks takes 20 minutes."""


def matrix(shared: Path) -> None:
    cases = [of_samples(name) for name in networks.NAMES]
    bits = [4] * len(cases)
    if shared.is_dir():
        cases += [of_files("CIFAR ResNet", shared / "models/float/pretrainedResnet.tflite",
                           shared / "images/cifar10-5000.zip", "raw", measure=1000),
                  of_files("EfficientNet-Lite0", shared / "models/float/efficientnet_lite0_imagenet_float.onnx",
                           shared / "images/imagenet-500", "127,128", "centre", 64)]
        bits += [4, 8]
    names = [f"{c.name} W{b}A8" for c, b in zip(cases, bits, strict=True)]
    print("top-1 points against plain min-max, weights per tensor", flush=True)
    base, floats = [], []
    for case, b in zip(cases, bits, strict=True):
        floats.append(reference(case))
        base.append(run(case, "min-max", weights=b, per_channel=False)[1])
    print(f"{'':20}{'':22}" + "".join(f"{n:>24}" for n in names))
    print(f"{'float':42}" + "".join(f"{100 * f.mean():24.1f}" for f in floats))
    print(f"{'min-max':42}" + "".join(f"{100 * f.mean():24.1f}" for f in base), flush=True)
    for row, kind, recipe, extra in METHODS:
        cells = []
        for case, b, before in zip(cases, bits, base, strict=True):
            options = {"weights": b, "per_channel": False, **extra}
            rules = options.pop("rules", RULES)
            if options.get("keep") == "ends":
                count = run_layers(case)
                options["keep"] = ("0", str(count - 1))
            try:
                if "distil" in recipe and len(case.graph.source) > DISTILLED:
                    raise npulab.UsageError("not run: too long")
                _, right, seconds = run(case, recipe, rules, **options)
                cells.append(f"{points(right, before):+17.1f} {seconds:5.0f}s")
            except npulab.NpulabError as e:
                cells.append(f"{str(e)[:23]:>24}")
        print(f"{row:20}{kind:22}" + "".join(f"{c:>24}" for c in cells), flush=True)


def run_layers(case: Case) -> int:
    from npulab.dialects import to_onnx
    from npulab.quantization.network import network

    return len(network(to_onnx(case.graph), RULES).layers)


# 4-bit weights

BOOTSTRAPS = 2000


def low() -> None:
    print("W4A8, one scale a tensor; recovered: share of what min-max loses, 95 % bootstrap interval over images")
    for name in networks.NAMES:
        case = of_samples(name)
        full = reference(case)
        plain = run(case, "min-max", weights=4, per_channel=False)[1]
        print(f"{name}: float {full.mean():.4f}, min-max {plain.mean():.4f} ({points(plain, full):+.1f} points)")
        for recipe in ("mse", "mse+adaround", "mse+adaround+distil"):
            _, right, seconds = run(case, recipe, weights=4, per_channel=False)
            at, (a, b) = recovered(full, plain, right)
            print(f"  {recipe:24} {right.mean():.4f}  recovered {at:6.1%} ({a:.1%} to {b:.1%})  {seconds:.0f} CPU-s",
                  flush=True)


def recovered(full: NDArray[np.bool_], plain: NDArray[np.bool_], right: NDArray[np.bool_]
              ) -> tuple[float, tuple[float, float]]:
    """The share of the loss that is gone, and its interval."""
    rng = np.random.default_rng(0)

    def share(i: Any) -> float:
        lost = full[i].mean() - plain[i].mean()
        return float((right[i].mean() - plain[i].mean()) / lost) if lost > 0 else 1.0

    drawn = [share(rng.integers(0, len(full), len(full))) for _ in range(BOOTSTRAPS)]
    return share(slice(None)), (float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975)))


# rows of accuracy


def rows(shared: Path) -> None:
    images, models = shared / "images", shared / "models/float"
    lite = of_files("EfficientNet-Lite0", models / "efficientnet_lite0_imagenet_float.onnx", images / "imagenet-500",
                    "127,128", "centre", 128)
    mobile = of_files("MobileNetV1 0.25", models / "mobilenet_v1_0.25_224_1_default_1.tflite", images / "imagenet-500",
                      "-1..1", "centre", 128)
    a311d = replace(rules_of("a311d"), file="onnx", arithmetic=None)
    for case, tries in (
            (lite, (("per tensor, min-max", "min-max", {"per_channel": False}),
                    ("per tensor, auto", "auto", {"per_channel": False}),
                    ("per tensor, auto in 5 min", "auto", {"per_channel": False, "seconds": 300}),
                    ("per channel, min-max", "min-max", {}), ("per channel, auto", "auto", {}))),
            (mobile, (("uint8 per tensor, min-max", "min-max", {"rules": a311d}),
                      ("uint8 per tensor, auto", "auto", {"rules": a311d}),
                      ("uint8 per tensor, auto in 5 min", "auto", {"rules": a311d, "seconds": 300})))):
        _rows(case, tries)
    for name in ("pretrainedResnet.tflite", "pretrainedResnet_large_float.tflite"):
        case = of_files(f"CIFAR {name}", models / name, images / "cifar10-5000.zip", "raw", calibrate=256)
        _rows(case, (("int8", "auto", {}), ("W4A8 min-max", "min-max", {"weights": 4}),
                     ("W4A8 auto", "auto", {"weights": 4})))


def _rows(case: Case, tries: Any) -> None:
    full = reference(case)
    print(f"{case.name}: float {full.mean():.4f} on {len(full)} images")
    for title, recipe, options in tries:
        options = dict(options)
        made, right, seconds = run(case, recipe, options.pop("rules", RULES), **options)
        print(f"  {title:32} {right.mean():.4f} ({points(right, full):+.2f})  {seconds:5.0f} CPU-s  {made.recipe.text}",
              flush=True)


# side by side

HELD = 100
"""Images for ONNX Runtime's percentile calibration, which holds every tensor of every image."""


def side(python: str, shared: Path, count: int = 500) -> None:
    """The same network, images and threads (2), each quantizer in a process of its own; then memory by itself, with
    every calibration on a network that is small enough for all of them."""
    model = shared / "models/float/efficientnet_lite0_imagenet_float.onnx"
    case = of_files("EfficientNet-Lite0", model, shared / "images/imagenet-500", "127,128", "centre", count)
    full = reference(case)
    print(f"EfficientNet-Lite0, float {full.mean():.4f}; {count} images calibrate, {len(full)} measure; 2 threads")
    with tempfile.TemporaryDirectory() as folder:
        for who, runs_in, some in (("npulab min-max", sys.executable, count), ("npulab auto", sys.executable, count),
                                   ("ONNX Runtime MinMax", sys.executable, count), ("NNCF", python, count),
                                   ("npulab percentile", sys.executable, HELD),
                                   ("ONNX Runtime Percentile", sys.executable, HELD)):
            for granularity in ("per-tensor", "per-channel")[some < count:]:
                said = _aside(who, runs_in, model, case, some, granularity, Path(folder))
                if said is None:
                    continue
                out = Path(folder) / "out.onnx"
                graph = npulab.load(out)
                right = case.right(out.read_bytes(), graph.values[graph.outputs[0]].name)
                print(f"  {who:24} {granularity:12} {some} images: top-1 {right.mean():.4f} "
                      f"({points(right, full):+.1f})  CPU {said['cpu']:6.1f} s  wall {said['wall']:6.1f} s  "
                      f"peak {said['peak'] / 1024:6.0f} MiB", flush=True)
        alone = _aside("one image in ONNX Runtime", sys.executable, model, case, 1, "", Path(folder))
        if alone is not None:
            print(f"  opened in ONNX Runtime, one image: peak {alone['peak'] / 1024:.0f} MiB", flush=True)
        case = of_files("CIFAR ResNet", shared / "models/float/pretrainedResnet.tflite",
                        shared / "images/cifar10-5000.zip", "raw", measure=count)
        model = Path(folder) / "cifar.onnx"
        model.write_bytes(from_tflite(case.graph).graph.source)
        print(f"CIFAR ResNet, {count} images calibrate: peak memory")
        for who in ("npulab min-max", "npulab percentile", "npulab entropy", "npulab auto", "ONNX Runtime MinMax",
                    "ONNX Runtime Percentile", "ONNX Runtime Entropy"):
            said = _aside(who, sys.executable, model, case, count, "per-channel", Path(folder))
            if said is not None:
                print(f"  {who:24} {said['peak'] / 1024:6.0f} MiB ({said['before'] / 1024:.0f} when loaded)",
                      flush=True)


def _aside(who: str, runs_in: str, model: Path, case: Case, count: int, granularity: str, folder: Path
           ) -> dict[str, float] | None:
    """What a quantizer in a process of its own says of itself; None if it failed, which is said."""
    (name,) = next(iter(case.test))
    path, out = folder / f"{case.name}.npy", folder / "out.onnx"
    if not path.exists():
        np.save(path, np.concatenate([f[name] for f in case.test]))
    code = {"NNCF": NNCF, "ONNX": ORT, "one": ONCE}.get(who.split()[0], NPULAB)
    done = subprocess.run([runs_in, "-c", code, who, str(model), str(path), str(count), str(out), granularity, name],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1][:90]
        print(f"  {who:24} {granularity:12} {count} images: {why}", flush=True)
        return None
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


COMMON = """
import json, resource, sys, time, logging
import numpy as np
who, model, path, count, out, granularity, name = sys.argv[1:8]
class Images:  # read when they are asked for: pages of a mapped file would count as memory
    def __init__(self):
        data = np.load(path, mmap_mode="r")
        self.shape, self.first = data.shape, data.offset
        self.bytes = int(np.prod(data.shape[1:])) * 4
    def __len__(self): return int(count)
    def __getitem__(self, i):
        at = int(i * self.shape[0] / int(count))
        return np.fromfile(path, np.float32, self.bytes // 4, offset=self.first + at * self.bytes
                           ).reshape(1, *self.shape[1:])
data = Images()
class Stream:
    origin = "images"
    def __len__(self): return int(count)
    def __iter__(self): return ({name: data[i]} for i in range(int(count)))
def memory(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])  # KiB, of this program
"""
DONE = """
print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "peak": memory(),
                  "before": before}))
"""
NPULAB = COMMON + """
from dataclasses import replace
import npulab
import npulab.quantizing as q
from npulab.program.pages import Buffer
from npulab.quantization.job import Options
from npulab.targets.facts.quantization import rules_of
before, cpu, wall = memory(), time.process_time(), time.perf_counter()
made = q.quantize(npulab.load(model), Stream(), rules_of("generic-onnx"),
                  Options(recipe=who.split()[1], per_channel=granularity == "per-channel"))
open(out, "wb").write(made.data)
""" + DONE
ORT = COMMON + """
import onnx, onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
class Reader(CalibrationDataReader):
    def __init__(self): self.left = iter(Stream())
    def get_next(self): return next(self.left, None)
logging.disable(logging.WARNING)
before, cpu, wall = memory(), time.process_time(), time.perf_counter()
quantize_static(model, out, Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8, per_channel=granularity == "per-channel",
                calibrate_method=getattr(CalibrationMethod, who.split()[-1]))
""" + DONE
ONCE = COMMON + """
import onnx, onnxruntime
before, cpu, wall = memory(), time.process_time(), time.perf_counter()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
options.enable_cpu_mem_arena = False
onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {name: data[0]})
""" + DONE
NNCF = COMMON + """
import nncf, onnx, onnxruntime
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
advanced = AdvancedQuantizationParameters(weights_quantization_params=QuantizationParameters(
    per_channel=granularity == "per-channel"))
before, cpu, wall = memory(), time.process_time(), time.perf_counter()
made = nncf.quantize(onnx.load(model), nncf.Dataset(list(range(int(count))), lambda i: {
    name: data[i]}), subset_size=int(count), advanced_parameters=advanced)
onnx.save(made, out)
""" + DONE


def main() -> None:
    what, *rest = sys.argv[1:] or [""]
    if what == "matrix":
        matrix(Path(rest[0]) if rest else SHARED)
    elif what == "low":
        low()
    elif what == "rows":
        rows(Path(rest[0]) if rest else SHARED)
    elif what == "side" and rest:
        side(rest[0], Path(rest[1]) if len(rest) > 1 else SHARED)
    else:
        print(__doc__)
        sys.exit(2)
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
