"""Fused attention against the unfused chain of three kernels, in turn on the same device, and ONNX Runtime beside.

    python bench/gpu_attention.py [DEVICE [TURNS]]

ratio: the medians' (unfused over fused), with the range that holds 95 % of 2000 resampled ratios. Two figures of the
same work: operations a second of the fused kernel, and their share of what a chain of multiply-adds reaches (the
probe's figure for float32, vectors of 16, measured here before and after).
"""

import sys
import time

import numpy as np

from npulab.gpu import opencl
from npulab.gpu.compute import attention
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.problems import Attention
from npulab.gpu.compute.types import Traits

SHAPES = {"ViT 12x197x64": (12, 197, 64), "8x1024x64": (8, 1024, 64), "4x2048x64": (4, 2048, 64),
          "8x1024x32": (8, 1024, 32)}


def assumed(device):
    cpu = "pocl" in device.identity.platform.lower() or "cpu" in device.identity.name.lower()
    limits = device.limits
    return Traits(device.identity.name, cpu, limits.compute_units, 16 if cpu else 1, 512 if cpu else 64, 1 if cpu
                  else 32, limits.local_bytes, limits.group_max)


def interval(a, b):
    """Median a over median b, with what 95 % of resampled turns give: turns are drawn in pairs."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(a), (2000, len(a)))
    ratios = np.median(np.asarray(a)[picks], 1) / np.median(np.asarray(b)[picks], 1)
    return np.median(a) / np.median(b), *np.percentile(ratios, [2.5, 97.5])


def session(batch, length, depth):
    """MatMul, Mul, Softmax, MatMul."""
    import onnx
    import onnxruntime as ort
    from onnx import helper
    info = [helper.make_tensor_value_info(n, 1, [batch, length, depth]) for n in "qkvo"]
    nodes = [helper.make_node("Transpose", ["k"], ["t"], perm=[0, 2, 1]), helper.make_node("MatMul", ["q", "t"], ["s"]),
             helper.make_node("Mul", ["s", "c"], ["m"]), helper.make_node("Softmax", ["m"], ["p"], axis=-1),
             helper.make_node("MatMul", ["p", "v"], ["o"])]
    scale = onnx.numpy_helper.from_array(np.float32(depth**-0.5), "c")
    graph = helper.make_graph(nodes, "attention", info[:3], info[3:], [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def peak(number, units):
    """Operations a second."""
    bench = opencl.open_device(number)
    timing = bench.chain("fma", "float32", 16, 8, 8 * units)
    return 2 * timing.work["operations"] / min(timing.seconds)


def main(number=0, turns=9):
    device = Device(number)
    traits = assumed(device)
    before = peak(number, traits.compute_units)
    print(f"{device.identity.name}\n{device.identity.driver}")
    print(f"{'shape':14} {'fused ms':>9} {'chain ms':>9} {'ORT ms':>8} {'ratio':>6} {'95 %':>13} {'G op/s':>7} "
          f"{'of peak':>8}")
    for name, (batch, length, depth) in SHAPES.items():
        what = Attention(batch, length, length, depth, depth, depth**-0.5)
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((batch, length, depth)).astype(np.float32) for _ in range(3))
        buffers = {role: device.upload(x) for role, x in (("input", q), ("input1", k), ("input2", v))}
        fused, chain = attention.lower(what, traits), attention.unfused(what, traits)
        buffers |= {"output": device.allocate(q.nbytes)} | {r: device.allocate(n) for r, n in chain.scratch.items()}
        peer = session(batch, length, depth)
        feeds = {"q": q, "k": k, "v": v}
        want = peer.run(None, feeds)[0]
        for way in (fused, chain):
            device.run(way.launches, buffers)
            off = np.abs(device.download(buffers["output"], q.shape) - want).max()
            if not off < 1e-4:
                raise SystemExit(f"{name}: {off} off")
        times = {"fused": [], "chain": [], "peer": []}
        for _ in range(turns):
            times["fused"].append(sum(device.run(fused.launches, buffers)))
            times["chain"].append(sum(device.run(chain.launches, buffers)))
            start = time.perf_counter()
            peer.run(None, feeds)
            times["peer"].append(time.perf_counter() - start)
        ms = {n: np.median(t) * 1e3 for n, t in times.items()}
        ratio, low, high = interval(times["chain"], times["fused"])
        rate = what.operations / ms["fused"] * 1e3
        print(f"{name:14} {ms['fused']:9.2f} {ms['chain']:9.2f} {ms['peer']:8.2f} {ratio:6.2f} {low:6.2f}-{high:6.2f} "
              f"{rate / 1e9:7.1f} {rate / before:8.0%}", flush=True)
    after = peak(number, traits.compute_units)
    print(f"multiply-adds in a chain: {before / 1e9:.0f} G op/s before, {after / 1e9:.0f} after")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
