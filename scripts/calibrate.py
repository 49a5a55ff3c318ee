#!/usr/bin/env python3
"""Fit the A311D's timing constants to published latencies, and record the counts that the atlas predicts from.

    python scripts/calibrate.py DIRECTORY

DIRECTORY holds mobilenet_v1_1.0_224_quant.tflite and ssdlite_mobiledet_coco_qat_postprocess.tflite, the files that the
open driver's author timed (they ship in Mesa's source package). Writes calibration.toml and ladder.json beside
timing.py.

Two constants are fitted to MobileNetV1's three points, which prove little. What the model is worth shows on MobileDet's
four, which the fit never sees.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from scipy.optimize import least_squares

from npulab import api
from npulab.program.files import write_atomically
from npulab.targets.target import PlanOptions
from npulab.targets.vivante.chips import A311D
from npulab.targets.vivante.timing import Counts, Speeds, count

HERE = Path(__file__).resolve().parents[1] / "src" / "npulab" / "targets" / "vivante"
FIRST = PlanOptions(zero_runs=False, image_cache=False, channels="multiple-of-cores")
ZERO_RUNS = PlanOptions(image_cache=False, channels="multiple-of-cores")
ANY_CHANNELS = PlanOptions(image_cache=False)
LADDER = {
    "a311d-mesa-mobilenet_v1-before-zero-runs": ("mobilenet_v1_1.0_224_quant", FIRST, 15.7),
    "a311d-mesa-mobilenet_v1-zero-runs": ("mobilenet_v1_1.0_224_quant", ZERO_RUNS, 9.9),
    "a311d-mesa-mobilenet_v1-input-cache": ("mobilenet_v1_1.0_224_quant", PlanOptions(), 6.6),
    "a311d-mesa-mobiledet-before-zero-runs": ("ssdlite_mobiledet_coco_qat_postprocess", FIRST, 56.1),
    "a311d-mesa-mobiledet-zero-runs": ("ssdlite_mobiledet_coco_qat_postprocess", ZERO_RUNS, 32.7),
    "a311d-mesa-mobiledet-any-channels": ("ssdlite_mobiledet_coco_qat_postprocess", ANY_CHANNELS, 27.0),
    "a311d-mesa-mobiledet-input-cache": ("ssdlite_mobiledet_coco_qat_postprocess", PlanOptions(), 24.8),
}
"""Row of the atlas -> model, options of the driver at that time, published ms."""
START = (4.0, 0.4)
"""GB/s, slots: where the fit starts."""


def total_ms(counts: list[Counts], x: np.ndarray) -> float:
    speeds = replace(Speeds.of(A311D), dram_bandwidth=x[0] * 1e9, zero_cost=x[1])
    return sum(speeds.span(c).ns for c in counts) / 1e6


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    models = Path(sys.argv[1])
    counts = {row: count(api.compile(models / f"{model}.tflite", plan="reference", options=options), A311D)
              for row, (model, options, _) in LADDER.items()}
    published = {row: ms for row, (_, _, ms) in LADDER.items()}
    fit_rows = [row for row in LADDER if "mobilenet_v1" in row]

    def errors(x: np.ndarray, rows: list[str]) -> np.ndarray:
        return np.array([total_ms(counts[r], x) / published[r] - 1 for r in rows])

    best = least_squares(errors, START, args=(fit_rows,), bounds=((1, 0), (13, 1)), diff_step=1e-3,
                         x_scale=START).x
    worst = max(abs(errors(best, [r for r in LADDER if r not in fit_rows])))
    spread = np.ceil(200 * worst) / 100
    for row, e in zip(LADDER, errors(best, list(LADDER)), strict=True):
        print(f"{row:45} {published[row]:6.1f} ms  model {published[row] * (1 + e):6.2f} ms  {100 * e:+5.1f} %  "
              f"{'fit' if row in fit_rows else 'test'}")
    write_atomically(HERE / "calibration.toml", f"""\
# Written by scripts/calibrate.py: do not edit. What the constants mean is in docs/timing.md.

[fitted]
dram_bandwidth = {best[0] * 1e9:.4e}  # bytes per second
zero_cost = {best[1]:.4f}  # of a multiplier slot, for a weight that a zero run stands for

[fit]
rows = {msgspec.json.encode(fit_rows).decode().replace(",", ", ")}

[interval]
# Twice the worst error over the rows that were not fitted ({100 * worst:.1f} %).
spread = {spread:.2f}
""".encode())
    rows = (msgspec.json.encode(row) + b":[\n" + b",\n".join(map(_timed, spans)) + b"]"
            for row, spans in counts.items())
    write_atomically(HERE / "ladder.json", b"{" + b",\n".join(rows) + b"}\n")


def _timed(c: Counts) -> bytes:
    """What of a span its time depends on."""
    kept = ("cycles", "symbols", "weights", "elements", "launches", "copied", "submits", "host", "dram", "sram")
    values = msgspec.to_builtins(c)
    return msgspec.json.encode({"unit": c.unit, "name": ""} | {k: values[k] for k in kept if values[k]})


if __name__ == "__main__":
    main()
