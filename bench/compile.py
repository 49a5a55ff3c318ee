"""Compile time, cold and in process, and the time to choose zero-run widths: `python bench/compile.py [MODELS_DIR]`.

Prints CPU seconds (median of fresh processes), and for the whole command wall seconds. Rows and limits are those of
the project's table; ratios are of one run.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models" / "quantized"
ROWS = (("mobilenet_v1_1.0_224_quant", 0.7), ("ssdlite_mobiledet_coco_qat_postprocess", 1.2))
RUNS = 5

INSIDE = """
import sys, time
from npulab.importers import load
from npulab.targets.target import find_target
target = find_target("a311d")
start = time.process_time()
program = target.compile(load(sys.argv[1]), sys.argv[2])
print(time.process_time() - start)
"""

WIDTHS = """
import sys, time
from npulab.importers import load
from npulab.targets.target import find_target
from npulab.targets.vivante import best, encode
from npulab.targets.vivante.coefficients_v7 import Streams, best_zero_run_bits
from npulab.targets.vivante.jobs import NNJob
target = find_target("a311d")
graph = load(sys.argv[1])
jobs = [j for p in target._divide(graph, "best")[0] if p.on_npu for j in best.lower(graph, p, target.chip).jobs]
jobs = [j for j in jobs if isinstance(j, NNJob)]
kernels = [j.kernels(8, encode.tiling_of(j, target.chip).superblocks) for j in jobs]
start = time.process_time()
for k in kernels:
    best_zero_run_bits(Streams(k), 5)
print(time.process_time() - start)
"""


def seconds(code: str, *args: str) -> float:
    """What `code`, run in a fresh process, prints: the median of several."""
    out = [float(subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True, text=True).stdout)
           for _ in range(RUNS)]
    return statistics.median(out)


def main() -> None:
    models = Path(sys.argv[1]) if len(sys.argv) > 1 else MODELS
    for name, limit in ROWS:
        path = str(models / f"{name}.tflite")
        for plan in ("reference", "best"):
            got = seconds(INSIDE, path, plan)
            print(f"{name:<42} {plan:<10} {got:6.3f} CPU-s, limit {limit}, ratio {got / limit:.2f}")
    path = str(models / f"{ROWS[0][0]}.tflite")
    print(f"zero-run widths of every layer of {ROWS[0][0]}: {seconds(WIDTHS, path):.3f} CPU-s, limit 0.2")
    for command, limit in ((["--help"], 0.3), (["compile", path, "--target", "a311d"], 2.0)):
        walls = []
        for _ in range(RUNS):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", "npulab", *command], check=True, capture_output=True)
            walls.append(time.perf_counter() - start)
        got = statistics.median(walls)
        print(f"npulab {command[0]:<35} whole process {got:6.3f} s, limit {limit}, ratio {got / limit:.2f}")


if __name__ == "__main__":
    main()
