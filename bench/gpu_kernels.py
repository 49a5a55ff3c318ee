"""Products and convolutions beside CLBlast and ONNX Runtime: `python bench/gpu_kernels.py [DEVICE] [tuned SECONDS]`.

Each problem is run by all in turns, on the same OpenCL device and queue (ONNX Runtime: on the CPU, with as many threads
as the device has compute units): calls one after the other for 3 ms at least, from the first to the end of the last,
medians of 15 such series, each after a rest, in which the others' threads go to sleep. Rates are 10^9 multiply-adds a
second of the plain convolution, whatever the algorithm: Winograd's may exceed the peak, that of direct sums cannot. The
peak is that of chains of multiply-adds: the best of several widths and chains is found first, and runs in turns with
the others; the column dir. is direct sums (dir.) over it. The last is ours over the roofline: the least of that peak
and of the rate at which the bytes that must be moved at least are moved, input and weights read and the output written
once, by a plain stream over as many bytes in the same turns. All results are checked. With `tuned` each problem is
tuned for so many seconds first.

CLBlast (Apache-2.0, apt install libclblast1) is called through ctypes: SGEMM, and of convolutions the quicker of its
convgemm and its im2col with SGEMM. CLBlast's tuning tables know PoCL's CPU no better than by vendor and kind.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from npulab.gpu import kernels, opencl
from npulab.gpu.compute import tiles, tuner
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.problems import Convolution, Product
from npulab.gpu.compute.tiles import Choice, Direct, Matrix, Winograd
from npulab.gpu.compute.traits import traits_of
from npulab.gpu.compute.trials import Trials
from npulab.gpu.compute.types import Buffer, Kernel, Launch, Traits

ROUNDS = 15
THREADS = 4096
"""A compute unit, in groups of 256: one that waits for a core of a busy machine does not hold up the rest."""
READERS = 16
"""Work items a compute unit."""
WIDTH = 6
"""Of a column."""
SERIES, REST = 3e-3, 10e-3
"""Seconds."""
ROW_MAJOR, AS_IS, TRANSPOSED, CROSS_CORRELATION = 101, 111, 112, 151
"""Of clblast_c.h."""
Run = Callable[[int], float]
"""So many calls -> seconds of one."""


def convolution(size: int, channels: int, filters: int, kernel: int = 3, stride: int = 1) -> Convolution:
    return Convolution(1, size, size, channels, filters, (kernel, kernel), (stride, stride), pads=(kernel // 2,) * 4)


PROBLEMS: tuple[tuple[str, Convolution | Product], ...] = (
    ("GEMM 512 512 512", Product(1, 512, 512, 512)),
    ("GEMM 768 768 768", Product(1, 768, 768, 768)),
    ("GEMM 1024 1024 1024", Product(1, 1024, 1024, 1024)),
    ("GEMM 64 2048 1024", Product(1, 64, 2048, 1024)),
    ("3x3 56x56 64-64", convolution(56, 64, 64)),
    ("3x3 28x28 128-128", convolution(28, 128, 128)),
    ("3x3 14x14 256-256", convolution(14, 256, 256)),
    ("3x3 7x7 512-512", convolution(7, 512, 512)),
    ("3x3/2 56x56 96-192", convolution(56, 96, 192, stride=2)),
    ("3x3/2 224x224 3-64", convolution(224, 3, 64, stride=2)),
    ("1x1 56x56 64-256", convolution(56, 64, 256, 1)),
    ("1x1 14x14 576-96", convolution(14, 576, 96, 1)),
    ("1x1 7x7 320-1280", convolution(7, 320, 1280, 1)),
)


def main() -> int:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    tuning = float(sys.argv[3]) if sys.argv[2:3] == ["tuned"] else 0.0
    device = Device(number)
    traits = traits_of(device)
    clblast = _library()
    peak = _peak(device, number, traits.compute_units)
    print(f"{device.identity.name}\n{device.identity.platform}, {traits.compute_units} compute units\n")
    names = ("ours", "dir.", "F(2)", "F(4)", "CLB", "ORT", "peak")
    print(f"{'G multiply-adds/s':18}" + "".join(f"{n:>{WIDTH}}" for n in names)
          + f"{'/CLB':>6}{'/peak':>6}{'dir.':>5}{'roof':>5}")
    worst = 9.9e9
    with tempfile.TemporaryDirectory() as folder:
        for title, what in PROBLEMS:
            best = tuner.tune(device, traits, what, Path(folder), tuning) if tuning else None
            runs, ours = contenders(device, traits, what, clblast, best)
            medians = _medians({**runs, "peak": peak[0], "move": _moving(device, traits.compute_units, *moved(what))})
            medians["ours"] = medians[ours]
            rates = {n: (peak[1] if n == "peak" else what.operations / 2) / s for n, s in medians.items()}
            roof = min(rates["peak"], rates["move"])
            cells = "".join(f"{rates[n] / 1e9:{WIDTH}.1f}" if n in rates else f"{'-':>{WIDTH}}" for n in names)
            ratio = rates["ours"] / rates["CLB"] if "CLB" in rates else float("nan")
            worst = min(worst, ratio if ratio == ratio else worst)
            print(f"{title:18}{cells}{ratio:6.1f}{rates['ours'] / rates['peak']:6.2f}"
                  f"{rates['dir.'] / rates['peak']:5.2f}{rates['ours'] / roof:5.2f}", flush=True)
    print(f"\nleast of ours over CLBlast: {worst:.2f}" if clblast else "\nno CLBlast: apt install libclblast1")
    return int(clblast is not None and worst < 1)


def contenders(device: Device, traits: Traits, what: Convolution | Product, clblast: Any,
               best: Choice | None) -> tuple[dict[str, Run], str]:
    """Name -> a run of it; the name that is ours: the model's first, or `best`."""
    found: dict[str, Run] = {}
    ways = tiles.candidates(what, traits)
    firsts = {"ours": best or ways[0]}
    firsts["dir."] = next((w for w in ways if isinstance(w, Direct | Matrix)), ways[0])
    firsts |= {f"F({s})": w for s in tiles.SIZES for w in reversed(ways) if isinstance(w, Winograd) and w.size == s}
    trials = Trials(device, traits, what)
    for name, choice in firsts.items():
        if name != "ours" or choice not in [c for n, c in firsts.items() if n != "ours"]:
            found[name] = _ours(trials, choice)
    same = next((n for n, c in firsts.items() if n != "ours" and c == firsts["ours"]), "ours")
    want = _ours_output(trials, firsts["dir."])
    if clblast is not None:
        found["CLB"] = _clblast(clblast, device, trials, what, want)
    with suppress(ImportError):
        found["ORT"] = _onnxruntime(traits.compute_units, trials, what, want)
    return found, same


def _ours(trials: Trials, choice: Choice) -> Run:
    _ours_output(trials, choice)

    lowered, buffers = trials.kept[choice]
    return _launches(trials.device, lowered.launches, {**trials.buffers, **buffers})


def _launches(device: Device, launches: tuple[Launch, ...], buffers: dict[str, Any]) -> Run:
    ready: dict[int, Callable[[], list[float]]] = {}

    def run(times: int) -> float:
        if times not in ready:
            ready[times] = device.prepared(launches * times, buffers)
        start = time.perf_counter()
        ready[times]()
        return (time.perf_counter() - start) / times

    return run


def _ours_output(trials: Trials, choice: Choice) -> Any:
    """Checked against float64."""
    if choice not in trials.kept:
        lowered = trials.trial.lower(choice)
        buffers = {role: trials.device.upload(a) for role, a in lowered.constants.items()}
        trials.kept[choice] = lowered, buffers | {r: trials.device.allocate(n) for r, n in lowered.scratch.items()}
    trials.run(choice)
    if why := trials.wrong(choice):
        raise SystemExit(f"{choice}: {why}")
    return trials.device.download(trials.buffers["output"], trials.trial.shape)


def _medians(runs: dict[str, Run]) -> dict[str, float]:
    found: dict[str, list[float]] = {n: [] for n in runs}
    times = {n: max(1, round(SERIES / min(run(1), run(1)))) for n, run in runs.items()}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(runs), len(runs)):
            time.sleep(REST)
            found[name].append(runs[name](times[name]))
    return {n: statistics.median(s) for n, s in found.items()}


def _peak(device: Device, number: int, units: int) -> tuple[Run, float]:
    """A run of the quickest chains, and its multiply-adds."""
    bench = opencl.open_device(number)
    rates = {}
    for width in (4, 8, 16):
        for chains in (4, 8, 16):
            t = bench.chain("fma", "float32", width, chains, THREADS * units)
            if not t.wrong and not t.doubtful:
                rates[t.work["operations"] / statistics.median(t.seconds)] = width, chains
    width, chains = rates[max(rates)]
    turns = max(1, round(max(rates) * SERIES / (THREADS * units * kernels.STEPS * width * chains)))
    launch = Launch(Kernel(kernels.chain("fma", "float32", width, chains), "chain"), (THREADS * units,), (256,), (
        Buffer("out"), np.uint32(turns), np.float32(1), np.float32(1), np.float32(1)), "chains")
    return (_launches(device, (launch,), {"out": device.allocate(4 * THREADS * units)}),
            float(turns) * kernels.STEPS * chains * width * THREADS * units)


def moved(what: Convolution | Product) -> tuple[int, int]:
    """Bytes of input and weights, of the output."""
    if isinstance(what, Product):
        return 4 * (what.rows * what.inner + what.inner * what.columns), 4 * what.rows * what.columns
    weights = what.filters * what.kernel[0] * what.kernel[1] * what.channels
    return (4 * (what.height * what.width * what.channels + weights), 4 * what.out[0] * what.out[1] * what.filters)


def _moving(device: Device, units: int, read: int, written: int) -> Run:
    """So many bytes read, then so many written, by vectors of 64 next to each other, by some work items a compute unit:
    the plain streams of a CPU."""
    source = """__kernel void move(__global const float16 *data, __global float16 *out, uint reads, uint writes) {
        __global const float16 *p = data + (size_t)get_global_id(0) * reads;
        __global float16 *q = out + (size_t)get_global_id(0) * writes;
        float16 a = 0, b = 0, c = 0, d = 0;
        for (uint i = 0; i < reads; i += 4) { a += p[i]; b += p[i + 1]; c += p[i + 2]; d += p[i + 3]; }
        a += b + c + d;
        for (uint i = 0; i < writes; i++) q[i] = a;
    }"""
    items = READERS * units
    reads, writes = max(4, read // (256 * items) * 4), max(1, written // (64 * items))
    data = np.ones(16 * items * reads, np.float32)
    buffers = {"data": device.upload(data), "out": device.allocate(64 * items * writes)}
    run = _launches(device, (Launch(Kernel(source, "move"), (items,), (1,), (
        Buffer("data"), Buffer("out"), np.uint32(reads), np.uint32(writes)), "move"),), buffers)
    run(1)
    assert (device.download(buffers["out"], (16 * items * writes,)) == reads).all()
    return lambda times: run(times) * (read + written) / (64 * items * (reads + writes))


# others


def _library() -> Any:
    try:
        return ctypes.CDLL("libclblast.so.1")
    except OSError:
        return None


def _clblast(lib: Any, device: Device, trials: Trials, what: Convolution | Product, want: Any) -> Run:
    """Images are NCHW there. Bias is left out."""
    queue = ctypes.c_void_p(device.queue.int_ptr)
    event = ctypes.POINTER(ctypes.c_void_p)()

    def size(*values: int) -> list[Any]:
        return [ctypes.c_size_t(v) for v in values]

    def memory(buffer: Any) -> list[Any]:
        return [ctypes.c_void_p(buffer.int_ptr), ctypes.c_size_t(0)]

    def gemm(a: Any, b: Any, c: Any, m: int, n: int, k: int) -> int:
        return int(lib.CLBlastSgemm(ROW_MAJOR, AS_IS, AS_IS, *size(m, n, k), ctypes.c_float(1), *memory(a), *size(k),
                                    *memory(b), *size(n), ctypes.c_float(0), *memory(c), *size(n), ctypes.byref(queue),
                                    event))

    def timed(call: Callable[[], int]) -> Run:
        def run(times: int) -> float:
            start = time.perf_counter()
            status = max(abs(call()) for _ in range(times))
            device.queue.finish()
            if status:
                raise SystemExit(f"CLBlast says {status}")
            return (time.perf_counter() - start) / times

        return run

    if isinstance(what, Product):
        b, c = device.upload(trials.trial.weights), device.allocate(4 * what.rows * what.columns)
        run = timed(lambda: gemm(trials.buffers["input"], b, c, what.rows, what.columns, what.inner))
        run(1)
        found = device.download(c, trials.trial.shape) + trials.trial.bias
        assert np.abs(found - want).max() < 1e-4 * np.abs(want).max()
        return run
    image = device.upload(trials.trial.inputs["input"].transpose(0, 3, 1, 2))
    kernel = device.upload(trials.trial.weights.transpose(0, 3, 1, 2))
    inner, points = what.channels * what.kernel[0] * what.kernel[1], what.out[0] * what.out[1]
    result, columns = device.allocate(4 * points * what.filters), device.allocate(4 * points * inner)
    shape = size(what.channels, what.height, what.width, *what.kernel, what.pads[0], what.pads[1], *what.strides, 1, 1)

    def convgemm() -> int:
        return int(lib.CLBlastSconvgemm(CROSS_CORRELATION, *shape, *size(what.filters, 1), *memory(image),
                                        *memory(kernel), *memory(result), ctypes.byref(queue), event))

    def im2col() -> int:
        status = 0 if what.kernel == (1, 1) and what.strides == (1, 1) else int(
            lib.CLBlastSim2col(CROSS_CORRELATION, *shape, *memory(image), *memory(columns), ctypes.byref(queue), event))
        return status or gemm(kernel, image if what.kernel == (1, 1) and what.strides == (1, 1) else columns, result,
                              what.filters, points, inner)

    ways = []
    for call in (convgemm, im2col):
        run = timed(call)
        run(1)
        found = device.download(result, (1, what.filters, *what.out)).transpose(0, 2, 3, 1) + trials.trial.bias
        assert np.abs(found - want).max() < 1e-4 * np.abs(want).max(), call.__name__
        ways.append((statistics.median(run(1) for _ in range(5)), run))
    return min(ways, key=lambda w: w[0])[1]


def _onnxruntime(threads: int, trials: Trials, what: Convolution | Product, want: Any) -> Run:
    import onnx
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    x = trials.trial.inputs["input"]
    if isinstance(what, Product):
        node = helper.make_node("Gemm", ["x", "w", "b"], ["y"])
        x, w = x[0], trials.trial.weights
    else:
        node = helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=list(what.pads), strides=list(what.strides))
        x, w = x.transpose(0, 3, 1, 2), trials.trial.weights.transpose(0, 3, 1, 2)
    x = np.ascontiguousarray(x)
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info("x", 1, x.shape)], [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(np.ascontiguousarray(w), "w"), numpy_helper.from_array(trials.trial.bias, "b")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = min(model.ir_version, 10)
    assert onnx is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})[0]
    found = found[None] if isinstance(what, Product) else found.transpose(0, 2, 3, 1)
    assert np.abs(found - want).max() < 1e-4 * np.abs(want).max()

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            session.run(None, {"x": x})
        return (time.perf_counter() - start) / times

    return run


if __name__ == "__main__":
    raise SystemExit(main())
