"""int8 convolutions, softmax and layer normalization on an OpenCL device beside floats:
`python bench/gpu_integers.py [DEVICE [TURNS]]`.

Direct sums and Winograd's algorithm on bytes, direct sums in float32 and the model's first choice there, all in turns,
in another order each time: seconds by the device's clock, medians. The star is at the algorithm that is chosen for
bytes. Bytes are compared with each other, and a layer's centre with npulab's reference, before anything is timed.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from npulab.gpu.compute import convolution, integer_rows, integers, normalize, softmax, tiles
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.problems import Convolution, LayerNorm, Softmax
from npulab.gpu.compute.traits import traits_of
from npulab.gpu.compute.types import Lowered
from npulab.reference import requantize

LAYERS = ((56, 64, 64, 3), (28, 128, 128, 3), (14, 256, 256, 3), (7, 512, 512, 3), (112, 32, 32, 3), (56, 16, 16, 3),
          (224, 3, 32, 3), (56, 64, 256, 1), (14, 576, 96, 1))
"""Height and width, channels, filters, taps each way."""
ROWS = ((16384, 64), (9456, 197), (4096, 1000), (256, 20000))
"""Of softmax and layer normalization: rows, columns."""
ZERO, FACTOR = 3, 3 << 29
ONCE = 3
"""Calls a turn; the least counts."""
Run = Callable[[], list[float]]


def main() -> int:
    device = Device(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    turns = int(sys.argv[2]) if len(sys.argv) > 2 else 15
    print(f"{device.identity.name}\n{device.identity.platform}\n\nmilliseconds")
    names = ("float direct", "float first", "int8 direct", "int8 Winograd")
    print(f"{'':18}" + "".join(f"{n:>15}" for n in names) + f"{'float/int8':>12}{'direct/W.':>11}")
    for layer in LAYERS:
        runs, chosen = contenders(device, *layer)
        ms = timed(runs, turns)
        cells = "".join(f"{ms[n]:>14.3f}{'*' if n == chosen else ' '}" if n in ms else f"{'-':>14} " for n in names)
        by = f"{ms['int8 direct'] / ms['int8 Winograd']:11.2f}" if "int8 Winograd" in ms else ""
        print(f"{layer[3]}x{layer[3]} {layer[0]}x{layer[0]} {layer[1]}-{layer[2]}".ljust(18)
              + f"{cells}{ms['float first'] / ms[chosen]:12.2f}{by}", flush=True)
    print(f"\n{'rows':18}" + "".join(f"{kind + ' ' + n:>22}" for kind in ("softmax", "layer norm")
                                     for n in ("float", "int8", "int8/float")))
    for rows, columns in ROWS:
        ms = timed(row_runs(device, rows, columns), turns)
        print(f"{rows} x {columns}".ljust(18) + "".join(
            f"{ms[k, 'float']:22.3f}{ms[k, 'int8']:22.3f}{ms[k, 'int8'] / ms[k, 'float']:22.2f}"
            for k in ("softmax", "layer norm")), flush=True)
    return 0


def timed(runs: dict[Any, Run], turns: int) -> dict[Any, float]:
    """Milliseconds of each, in turns."""
    times: dict[Any, list[float]] = {n: [] for n in runs}
    for _ in range(turns):
        for name in random.sample(list(runs), len(runs)):
            runs[name]()
            times[name].append(min(sum(runs[name]()) for _ in range(ONCE)))
    return {n: 1e3 * statistics.median(t) for n, t in times.items()}


def row_runs(device: Device, rows: int, columns: int) -> dict[tuple[str, str], Run]:
    """(kernel, number) -> a run."""
    traits = traits_of(device)
    x = np.random.default_rng(0).integers(-128, 128, (rows, 1, columns)).astype(np.int8)
    soft, norm = Softmax(rows, columns), LayerNorm(rows, columns)
    layers = {
        ("softmax", "float"): softmax.lower(soft, traits),
        ("softmax", "int8"): integer_rows.softmax(replace(soft, number="int8"), traits, 0.05),
        ("layer norm", "float"): normalize.lower(norm, traits),
        ("layer norm", "int8"): integer_rows.layer_norm(replace(norm, number="int8"), traits, 0.05, 0.05, 0)}
    return {key: _ready(device, lowered, x if key[1] == "int8" else x * np.float32(0.05), columns)[0]
            for key, lowered in layers.items()}


def contenders(device: Device, side: int, channels: int, filters: int, taps: int) -> tuple[dict[str, Run], str]:
    """Name -> a run, and which of bytes is chosen."""
    traits, r = traits_of(device), np.random.default_rng(0)
    what = Convolution(1, side, side, channels, filters, (taps, taps), pads=(taps // 2,) * 4)
    x = r.integers(-128, 128, (side, side, channels)).astype(np.int8)
    w = r.integers(-127, 128, (filters, taps, taps, channels)).astype(np.int8)
    shift = -9 - (channels * taps * taps).bit_length() // 2
    given = (w, None, ZERO, [FACTOR] * filters, [shift] * filters, 0)
    floats = w.astype(np.float32), None
    direct = next(c for c in tiles.candidates(what, traits) if not isinstance(c, tiles.Winograd))
    byte = replace(what, number="int8")
    layers = {"float direct": convolution.lower(what, traits, *floats, direct),
              "float first": convolution.lower(what, traits, *floats),
              "int8 direct": integers.convolution(byte, traits, *given, algorithm="direct")}
    if taps == 3:
        layers["int8 Winograd"] = integers.convolution(byte, traits, *given, algorithm="winograd")
    runs: dict[str, Run] = {}
    middle = side // 2
    patch = x[middle - taps // 2:, middle - taps // 2:][:taps, :taps].astype(np.int64) - ZERO
    sums = np.einsum("yxc,fyxc->f", patch, w.astype(np.int64))
    want, seen = np.clip(requantize.multiply(sums, FACTOR, shift), -128, 127), []
    for name, lowered in layers.items():
        number = np.int8 if name.startswith("int8") else np.float32
        runs[name], output = _ready(device, lowered, x.astype(number), filters)
        if number == np.int8:
            seen.append(device.download(output, (side, side, filters), number))
            if (seen[-1] != seen[0]).any() or (seen[-1][middle, middle] != want).any():
                raise SystemExit(f"{name}: other bytes, {side} x {side} x {channels} to {filters}")
    chosen = integers.convolution(byte, traits, *given)
    return runs, "int8 Winograd" if "patches" in chosen.scratch else "int8 direct"


def _ready(device: Device, lowered: Lowered, x: np.ndarray, filters: int) -> tuple[Run, Any]:
    """A run, and the output after one."""
    output = device.allocate(x.itemsize * x.shape[0] * x.shape[1] * filters)
    buffers = {"input": device.upload(x), "output": output}
    buffers |= {role: device.upload(array) for role, array in lowered.constants.items()}
    buffers |= {role: device.allocate(n) for role, n in lowered.scratch.items()}
    run = device.prepared(lowered.launches, buffers)
    run()
    return lambda kept=buffers: run(), output  # the buffers live as long


if __name__ == "__main__":
    raise SystemExit(main())
