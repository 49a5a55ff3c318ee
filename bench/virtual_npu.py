"""The warm virtual NPU against LiteRT: `python bench/virtual_npu.py [MODELS_DIR] [--rounds N] [--model NAME]`.

Replays the open driver's recorded streams of the network (the NPU's share of it) with decoded kernels kept, and runs
the whole model in LiteRT with its reference kernels and with its default ones, in turns, in one process. One thread
each, as the virtual NPU has; LiteRT's default kernels also with two. Also the first replay, which decodes every
stream. Prints medians of wall time and their ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from npulab.targets.vivante.chips import A311D
from npulab.targets.vivante.machine import convolve, requantize
from npulab.targets.vivante.replay import open_submits

SHARED = Path(__file__).resolve().parents[2] / "shared"


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def virtual(case: Path) -> tuple[Callable[[], None], float]:
    """(replay every stream again, seconds of the first time)."""
    submits = open_submits(case, A311D)

    def run() -> None:
        for npu, words in submits:
            faults = npu.submit(words)
            if faults:
                raise SystemExit(f"{case.name}: {faults[0]}")

    return run, timed(run)


def litert(model: Path, reference: bool, threads: int = 1) -> Callable[[], None]:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kind = OpResolverType.BUILTIN_REF if reference else OpResolverType.AUTO
    interpreter = Interpreter(model_path=str(model), num_threads=threads, experimental_op_resolver_type=kind)
    interpreter.allocate_tensors()
    rng = np.random.default_rng(0)
    for d in interpreter.get_input_details():
        interpreter.set_tensor(d["index"], rng.integers(0, 256, d["shape"]).astype(d["dtype"]))
    interpreter.invoke()
    return interpreter.invoke


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="?", default=SHARED / "models" / "quantized", type=Path)
    parser.add_argument("--cases", default=SHARED / "golden" / "vivante" / "real", type=Path)
    parser.add_argument("--model", default="mobilenet_v1_1.0_224_quant")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--numpy", action="store_true", help="without the compiled loops")
    a = parser.parse_args()
    if a.numpy:
        convolve.kernels = requantize.kernels = None
    replay, first = virtual(a.cases / f"{a.model}.zip")
    model = a.models / f"{a.model}.tflite"
    runs = {"virtual NPU, warm": replay, "LiteRT BUILTIN_REF": litert(model, True),
            "LiteRT default": litert(model, False), "LiteRT default, 2 threads": litert(model, False, 2)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(a.rounds):
        for name, run in runs.items():
            times[name].append(timed(run))
    medians = {name: statistics.median(t) for name, t in times.items()}
    loops = "compiled loops" if requantize.kernels else "NumPy alone"
    print(f"{a.model}, {a.rounds} rounds in turns, {loops}")
    print(f"  {'virtual NPU, first':26} {1e3 * first:8.1f} ms")
    for name, t in times.items():
        print(f"  {name:26} {1e3 * medians[name]:8.1f} ms   {1e3 * min(t):.1f} to {1e3 * max(t):.1f}")
    for name in list(runs)[1:]:
        print(f"  virtual NPU / {name}: {medians['virtual NPU, warm'] / medians[name]:.2f}")


if __name__ == "__main__":
    main()
