"""Fused attention against what it saves, in turn on the same device, and ONNX Runtime beside.

    python bench/gpu_attention.py [DEVICE [TURNS]]
    python bench/gpu_attention.py int8 [DEVICE [TURNS]]

fused    what the runtime makes of an exported attention: one launch.
apart    what it makes of the same operators with nothing fused, as their outputs are the network's, too: K packed,
         product, scale, softmax, V packed where it must be, product, with the kernels and tiles that any network gets.
network  what it makes of the file without fusing attention: the scale is the product's.
tuned    three launches made for this (gpu/compute/chain.py): scale inside the first product, softmax in place.

ONNX Runtime's threads go on in a loop for a while when they have nothing to do: a launch that follows at once shares
its cores with them (2 x 4096 x 64: 27 to 29 ms in place of 20.5). So it comes last in a turn and a pause follows. All
that is timed follows one of its kind: a launch, or a run of ONNX Runtime.

int8: the fused kernel of bytes, that of floats on the same numbers, and ONNX Runtime's chain of integer products
(MatMulInteger, Mul, Softmax, QuantizeLinear to bytes, MatMulInteger, Mul, QuantizeLinear). Inputs are random bytes in
steps of 1 / 74, so that their standard deviation is 1.

Ratios are of medians, over fused, with the range that holds 95 % of 2000 resampled ones. "of peak": the fused kernel's
operations a second, as a share of what a chain of multiply-adds reaches (the probe's figure for float32, vectors of 16,
measured here before and after, all cores together).
"""

import sys
import time
from dataclasses import replace

import numpy as np

from npulab.gpu import opencl
from npulab.gpu.compute import attention, integer_attention
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.network import compile_network
from npulab.gpu.compute.problems import Attention
from npulab.gpu.compute.traits import traits_of
from npulab.importers import load

SHAPES = ((12, 197, 64), (8, 1024, 64), (4, 2048, 64), (2, 4096, 64), (1, 8192, 64), (8, 1024, 32), (2, 4096, 32))
"""Batch times heads, sequence, size of a head."""
PAUSE_S = 0.2
"""After ONNX Runtime: 0.1 s later a launch is as fast as after another launch, 0.03 s later it is not."""


def interval(a, b):
    """Median a over median b, with what 95 % of resampled turns give: turns are drawn in pairs."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(a), (2000, len(a)))
    ratios = np.median(np.asarray(a)[picks], 1) / np.median(np.asarray(b)[picks], 1)
    return np.median(a) / np.median(b), *np.percentile(ratios, [2.5, 97.5])


def exported(batch, length, depth, outputs="o"):
    """Transpose, MatMul, Mul, Softmax, MatMul: as frameworks export attention. outputs: o, and of s, m, p."""
    import onnx
    from onnx import helper
    info = [helper.make_tensor_value_info(n, 1, [batch, length, length if n in "smp" else depth])
            for n in "qkv" + outputs]
    nodes = [helper.make_node("Transpose", ["k"], ["t"], perm=[0, 2, 1]), helper.make_node("MatMul", ["q", "t"], ["s"]),
             helper.make_node("Mul", ["s", "c"], ["m"]), helper.make_node("Softmax", ["m"], ["p"], axis=-1),
             helper.make_node("MatMul", ["p", "v"], ["o"])]
    scale = onnx.numpy_helper.from_array(np.float32(depth**-0.5), "c")
    graph = helper.make_graph(nodes, "attention", info[:3], info[3:], [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def peak(number, units):
    """Operations a second, the best of 3 goes: other guests halve it for moments."""
    bench = opencl.open_device(number)
    goes = [bench.chain("fma", "float32", 16, 8, 8 * units * bench.group) for _ in range(3)]
    return max(2 * t.work["operations"] / min(t.seconds) for t in goes)


def tuned(device, traits, what, feeds):
    """A call that runs the chain of three launches and gives seconds; its buffers, which must live as long."""
    chain = attention.unfused(what, traits)
    buffers = {role: device.upload(feeds[x]) for role, x in (("input", "q"), ("input1", "k"), ("input2", "v"))}
    buffers |= {"output": device.allocate(feeds["q"].nbytes)}
    buffers |= {role: device.allocate(size) for role, size in chain.scratch.items()}
    return device.prepared(chain.launches, buffers), buffers


def integer_chain(batch, length, depth, scales, scale_out):
    """Q, K, V and the output int8 with zero points 0; shares are bytes, steps of 1 / 255."""
    import onnx
    from onnx import helper
    constants = {"f": np.float32(scales[0] * scales[1] * depth**-0.5), "one": np.float32(1 / 255), "zp": np.uint8(0),
                 "g": np.float32(scales[2] / 255), "so": np.float32(scale_out), "zo": np.int8(0)}
    nodes = [helper.make_node(*x, **more) for x, more in [
        (("Transpose", ["k"], ["t"]), {"perm": [0, 2, 1]}), (("MatMulInteger", ["q", "t"], ["si"]), {}),
        (("Cast", ["si"], ["s"]), {"to": 1}), (("Mul", ["s", "f"], ["m"]), {}),
        (("Softmax", ["m"], ["p"]), {"axis": -1}), (("QuantizeLinear", ["p", "one", "zp"], ["pi"]), {}),
        (("MatMulInteger", ["pi", "v"], ["oi"]), {}), (("Cast", ["oi"], ["of"]), {"to": 1}),
        (("Mul", ["of", "g"], ["r"]), {}), (("QuantizeLinear", ["r", "so", "zo"], ["o"]), {})]]
    info = [helper.make_tensor_value_info(n, 3, [batch, length, depth]) for n in "qkvo"]
    graph = helper.make_graph(nodes, "attention", info[:3], info[3:],
                              [onnx.numpy_helper.from_array(x, n) for n, x in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def of_bytes(number=0, turns=9):
    import onnxruntime as ort
    device = Device(number)
    traits = traits_of(device)
    print(f"{device.identity.name}\n{device.identity.driver}")
    print(f"{'shape':10} {'int8':>7} {'float32':>7} {'ORT ms':>7}  {'float32 / int8':16} {'ORT / int8':16} "
          "steps off: int8 ORT")
    scales = (1 / 74,) * 3
    for batch, length, depth in SHAPES:
        what = Attention(batch, length, length, depth, depth, depth**-0.5, number="int8")
        rng = np.random.default_rng(0)
        feeds = {n: rng.integers(-128, 128, (batch, length, depth)).astype(np.int8) for n in "qkv"}
        step = 4 / 128 * (length**-0.5 * 2)  # of the output: 4 of its standard deviations, about, fit
        lowered = {"int8": integer_attention.lower(what, traits, scales, (0, 0, 0), step, 0),
                   "float32": attention.lower(replace(what, number="float32"), traits)}
        calls, outs, kept = {}, {}, []
        for name, x in lowered.items():
            given = [feeds[n] if name == "int8" else feeds[n] * np.float32(1 / 74) for n in "qkv"]
            buffers = dict(zip(("input", "input1", "input2"), map(device.upload, given), strict=True))
            buffers["output"] = device.allocate(given[0].nbytes)
            calls[name] = device.prepared(x.launches, buffers)
            calls[name]()
            outs[name] = device.download(buffers["output"], given[0].shape, given[0].dtype)
            kept.append(buffers)
        file = integer_chain(batch, length, depth, scales, step)
        peer = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        outs["ORT"] = peer.run(None, feeds)[0]
        want = np.clip(outs["float32"] / step, -128, 127)
        off = {n: np.abs(outs[n] - want).max() for n in ("int8", "ORT")}
        if not off["int8"] < 1.5:
            raise SystemExit(f"{batch}x{length}x{depth}: {off['int8']} steps off")
        times = {n: [] for n in ("int8", "float32", "ORT")}
        for turn in range(turns):
            for name in ("int8", "float32")[::1 if turn % 2 else -1]:
                calls[name]()
                times[name].append(sum(calls[name]()))
            peer.run(None, feeds)
            start = time.perf_counter()
            peer.run(None, feeds)
            times["ORT"].append(time.perf_counter() - start)
            time.sleep(PAUSE_S)
        ms = {n: np.median(t) * 1e3 for n, t in times.items()}
        ratios = ["{:5.2f} {:4.2f}-{:4.2f}".format(*interval(times[n], times["int8"])) for n in ("float32", "ORT")]
        print(f"{f'{batch}x{length}x{depth}':10} {ms['int8']:7.2f} {ms['float32']:7.2f} {ms['ORT']:7.2f}  "
              f"{ratios[0]:16} {ratios[1]:16} {off['int8']:.2f} {off['ORT']:.2f}", flush=True)


def main(number=0, turns=9):
    import onnxruntime as ort
    device = Device(number)
    traits = traits_of(device)
    before = peak(number, traits.compute_units)
    print(f"{device.identity.name}\n{device.identity.driver}")
    print(f"{'shape':10} {'fused':>7} {'apart':>7} {'network':>7} {'tuned':>7} {'ORT ms':>7}  {'apart / fused':16} "
          f"{'network / fused':16} {'tuned / fused':16} {'of peak':>7}")
    for batch, length, depth in SHAPES:
        what = Attention(batch, length, length, depth, depth, depth**-0.5)
        rng = np.random.default_rng(0)
        feeds = {n: rng.standard_normal((batch, length, depth)).astype(np.float32) for n in "qkv"}
        file = exported(batch, length, depth)
        peer = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        want = peer.run(None, feeds)[0]
        calls, parts = {}, ""
        for way in ("fused", "network", "apart"):
            plan = compile_network(load(exported(batch, length, depth, "smpo") if way == "apart" else file), traits,
                                   fuse_attention=way == "fused")
            opened = plan.open(device)
            off = np.abs(opened.run(feeds)["o"] - want).max()
            many = len({s.layer for s in plan.steps})
            if not off < 1e-4 or (many == 1) != (way == "fused") or (way == "apart" and many < 4):
                raise SystemExit(f"{batch}x{length}x{depth}, {way}: {off} off, {many} layers")
            calls[way], parts = opened.launch, [s.launch.label for s in plan.steps]
        calls["tuned"], buffers = tuned(device, traits, what, feeds)
        calls["tuned"]()
        if not np.abs(device.download(buffers["output"], want.shape) - want).max() < 1e-4:
            raise SystemExit(f"{batch}x{length}x{depth}: the tuned chain is wrong")
        times = {n: [] for n in (*calls, "ORT")}
        each = []
        for turn in range(turns):
            order = [*calls][turn % len(calls):] + [*calls][:turn % len(calls)]  # who is first after a pause has luck
            calls[order[-1]]()
            for name in order:
                found = calls[name]()
                times[name].append(sum(found))
                if name == "apart":
                    each.append(found)
            peer.run(None, feeds)
            start = time.perf_counter()
            peer.run(None, feeds)
            times["ORT"].append(time.perf_counter() - start)
            time.sleep(PAUSE_S)
        ms = {n: np.median(t) * 1e3 for n, t in times.items()}
        ratios = ["{:5.2f} {:4.2f}-{:4.2f}".format(*interval(times[n], times["fused"]))
                  for n in ("apart", "network", "tuned")]
        rate = what.operations / ms["fused"] * 1e3
        print(f"{f'{batch}x{length}x{depth}':10} {ms['fused']:7.2f} {ms['apart']:7.2f} {ms['network']:7.2f} "
              f"{ms['tuned']:7.2f} {ms['ORT']:7.2f}  {ratios[0]:16} {ratios[1]:16} {ratios[2]:16} {rate / before:7.0%}",
              flush=True)
    print("of those apart, the last shape, ms: " + ", ".join(
        f"{label} {np.median(t) * 1e3:.1f}" for label, t in zip(parts, zip(*each, strict=True), strict=True)))
    after = peak(number, traits.compute_units)
    print(f"multiply-adds in a chain: {before / 1e9:.0f} G op/s before, {after / 1e9:.0f} after")


if __name__ == "__main__":
    if sys.argv[1:2] == ["int8"]:
        of_bytes(*map(int, sys.argv[2:]))
    else:
        main(*map(int, sys.argv[1:]))
