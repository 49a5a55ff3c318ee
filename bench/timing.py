"""Speed and worth of the timing model and the search: `python bench/timing.py [MODELS_DIR]`.

Prints the time of an estimate, of a full search (every feature allowed) and of the HTML page; what plan best comes to
beside plan reference, with and without features; and the two published MobileNetV2 points, for which there is no file
at hand: the network's shape with random weights stands in for it.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import numpy as np

import npulab
from npulab import api
from npulab.exporters.tflite_builder import ModelBuilder
from npulab.ir import Graph
from npulab.report.html import to_html
from npulab.targets.target import PlanOptions, find_target

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models" / "quantized"
NETWORKS = ("mobilenet_v1_1.0_224_quant", "ssdlite_mobiledet_coco_qat_postprocess")
RUNS = 9
BEFORE_ZERO_RUNS = PlanOptions(zero_runs=False, image_cache=False, channels="multiple-of-cores")


def median_ms(call: object) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    models = Path(sys.argv[1]) if len(sys.argv) > 1 else MODELS
    target = find_target("a311d")
    every = PlanOptions(features=frozenset(target.features))
    for name in NETWORKS:
        graph = npulab.load(models / f"{name}.tflite")
        program = api.compile(graph)
        profile = api.profile(program)
        print(name)
        print(f"  estimate of a compiled program  {median_ms(lambda p=program: target.timing(p)):7.1f} ms  (limit 20)")
        print(f"  HTML page                       {median_ms(lambda p=profile: to_html(p)):7.1f} ms  (limit 1000)")
        start = time.process_time()
        api.compile(graph, options=every)
        print(f"  compile, every feature searched {time.process_time() - start:7.2f} CPU-s  (limit 10)")
        reference = api.profile(graph, plan="reference")
        for label, p in (("plan reference", reference), ("plan best", profile),
                         *((f"with {f}", api.profile(graph, options=PlanOptions(features=frozenset({f}))))
                           for f in sorted(target.features)),
                         ("with every feature", api.profile(graph, options=every))):
            print(f"  {label:22} {p.total_ns / 1e6:7.2f} ms  {p.dram_bytes / 1e6:6.2f} MB of DRAM traffic  "
                  f"{p.dram_bytes / reference.dram_bytes - 1:+7.1%}")
    graph = mobilenet_v2()
    print("MobileNetV2, random weights (published: ~15.5 and ~6.9 ms, the Mesa documentation)")
    for options, published in ((BEFORE_ZERO_RUNS, 15.5), (PlanOptions(), 6.9)):
        p = api.profile(graph, plan="reference", options=options)
        low, high = (t / 1e6 for t in p.interval_ns)
        print(f"  {p.total_ns / 1e6:6.2f} ms ({low:.1f} to {high:.1f})  published {published} ms  "
              f"{p.total_ns / 1e6 / published - 1:+.0%}")


def mobilenet_v2() -> Graph:
    """MobileNetV2 1.0 224 (Sandler et al. 2018, table 2) in uint8, weights from a fixed seed."""
    rng = np.random.default_rng(1)
    model = ModelBuilder("mobilenet_v2")
    count = 0

    def tensor(shape: tuple[int, ...], dtype: str = "uint8", scale: float = 0.05, zero: int = 128,
               data: np.ndarray | None = None) -> int:
        nonlocal count
        count += 1
        return model.tensor(f"t{count}", shape, dtype, scale=scale, zero_point=zero, data=data)

    def convolution(x: int, size: int, in_c: int, out_c: int, kernel: int, stride: int, depthwise: bool = False) -> int:
        shape = (1, kernel, kernel, out_c) if depthwise else (out_c, kernel, kernel, in_c)
        weights = tensor(shape, scale=0.004, data=rng.integers(0, 256, shape).astype(np.uint8))
        bias = tensor((out_c,), "int32", 0.05 * 0.004, 0, np.zeros(out_c, np.int32))
        out = tensor((1, -(-size // stride), -(-size // stride), out_c))
        extra = {"depth_multiplier": 1} if depthwise else {}
        model.op("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D", [x, weights, bias], [out], padding="SAME",
                 stride_w=stride, stride_h=stride, fused_activation_function="NONE", dilation_h_factor=1,
                 dilation_w_factor=1, **extra)
        return out

    first = h = tensor((1, 224, 224, 3))
    h, size, channels = convolution(h, 224, 3, 32, 3, 2), 112, 32
    for expand, out_c, repeats, first_stride in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
                                                 (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):
        for i in range(repeats):
            stride = first_stride if i == 0 else 1
            wide = channels * expand
            y = convolution(h, size, channels, wide, 1, 1) if expand > 1 else h
            y = convolution(y, size, wide, wide, 3, stride, depthwise=True)
            size = -(-size // stride)
            y = convolution(y, size, wide, out_c, 1, 1)
            if stride == 1 and channels == out_c:
                total = tensor((1, size, size, out_c))
                model.op("ADD", [h, y], [total], fused_activation_function="NONE")
                y = total
            h, channels = y, out_c
    h = convolution(h, size, channels, 1280, 1, 1)
    pooled = tensor((1, 1, 1, 1280))
    model.op("AVERAGE_POOL_2D", [h], [pooled], padding="VALID", stride_w=1, stride_h=1, filter_width=size,
             filter_height=size, fused_activation_function="NONE")
    return npulab.load(model.build([first], [convolution(pooled, 1, 1280, 1001, 1, 1)]))


if __name__ == "__main__":
    main()
