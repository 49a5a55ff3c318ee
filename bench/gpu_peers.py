"""The probe against clpeak on the same device in one run, in turns: `python bench/gpu_peers.py [DEVICE] [ROUNDS]`.

One line a quantity: both medians over ROUNDS (3 unless told otherwise), their ratio, and, where they differ because
something else is measured, what. Then the cache sizes that each of three probes finds, beside what the system states of
a CPU. Skips, with the reason, without pyopencl, a device or clpeak (apt install clpeak). Minutes on two cores.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from npulab.errors import NpulabError
from npulab.gpu import kernels
from npulab.gpu.analysis import caches, rates
from npulab.gpu.analysis.meter import Meter, Refused, reason
from npulab.gpu.opencl import open_device
from npulab.gpu.types import Quantity

ROUNDS = 3
PATIENCE = 300  # seconds for clpeak
WITHIN = 0.1
LAUNCHES = 1000
PAUSES = (0.0, 1e-4, 1e-3)  # seconds
PEERS_GROUP = 4096
"""Threads of a group at most where clpeak 1.1.2 asks PoCL, which states as many."""
PEERS_BYTES = 1 << 29
"""Of clpeak's buffer on a CPU: its process holds 1.1 GB, that and the host's copy."""
ROWS = ("float32 compute, G operations/s", "memory read, GB/s", "transfer to device, GB/s",
        "transfer from device, GB/s", "launch, queued to start, us")
WHY = {
    "float32 compute, G operations/s": (
        "clpeak's kernel is one chain of mad a thread, of vectors up to 16: where a core runs one thread (a CPU) "
        "its latency is measured; the probe also takes 2 to 16 chains. Both count two operations a multiply-add."),
    "memory read, GB/s": (
        "clpeak goes once through a buffer (of a CPU 512 MiB), each thread to 16 places, the mean of its turns; the "
        "probe again and again through 128 MiB at least. Neither fits a cache: what the probe reads at clpeak's size, "
        "and what NumPy adds up, stand below."),
    "transfer to device, GB/s": (
        "clpeak divides a large copy by its time; the probe the difference of a large copy and a quarter of it, which "
        "leaves the cost of the call out."),
    "launch, queued to start, us": (
        "Both by the device's clock, of a kernel of 16 loads a thread that fills the cores; clpeak's is a mean, the "
        "probe's a median. clpeak calls from C++, the probe from Python: the more time between calls, the longer a "
        "start takes, below. The probe's launch cost is another thing: from the call until the host knows of the end."),
}
WHY["transfer from device, GB/s"] = WHY["transfer to device, GB/s"]


def clpeak(platform: int, device: int) -> dict[str, float]:
    """Best figures of clpeak, in the units of ROWS. Raises: OSError, subprocess.SubprocessError, ET.ParseError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peak.xml"
        subprocess.run(["clpeak", "-p", str(platform), "-d", str(device), "--compute-sp", "--global-bandwidth",
                        "--transfer-bandwidth", "--kernel-latency", "--xml-file", str(out)],
                       check=True, capture_output=True, timeout=PATIENCE)
        return parsed(out.read_text())


def parsed(text: str) -> dict[str, float]:
    """clpeak's XML -> figures by the names of ROWS; those that it has not are left out."""
    found = ET.fromstring(text).find("platform/device")
    if found is None:
        return {}

    def best(group: str, *names: str) -> list[float]:
        part = found.find(group) if found is not None else None
        return [float(e.text) for e in (part if part is not None else ()) if e.text and (not names or e.tag in names)]

    latency = found.findtext("kernel_launch_latency")
    figures = {ROWS[0]: best("single_precision_compute"), ROWS[1]: best("global_memory_bandwidth"),
               ROWS[2]: best("transfer_bandwidth", "enqueuewritebuffer"),
               ROWS[3]: best("transfer_bandwidth", "enqueuereadbuffer"), ROWS[4]: [float(latency)] if latency else []}
    return {name: max(values) for name, values in figures.items() if values}


def probed(meter: Meter) -> tuple[dict[str, float], dict[str, str]]:
    """(figures by the names of ROWS, what is refused)."""
    def of(found: Quantity, factor: float) -> float:
        assert found.value is not None
        return found.value * factor

    tasks = {ROWS[0]: lambda: of(rates.rate(meter, "fma", "float32"), 2e-9),
             ROWS[1]: lambda: of(rates.memory_bandwidth(meter, None, "read"), 1),
             ROWS[2]: lambda: of(rates.transfers(meter, True)[0], 1),
             ROWS[3]: lambda: of(rates.transfers(meter, False)[0], 1),
             ROWS[4]: lambda: launched(meter.bench, True)["queued to start"]}
    made, refused = {}, {}
    for name, task in tasks.items():
        meter.begin()
        try:
            made[name] = task()
        except (Refused, NpulabError) as e:
            refused[name] = reason(e)
    return made, refused


def launched(bench: Any, full: bool, pause: float = 0.0) -> dict[str, float]:
    """Parts of a launch in us, medians of LAUNCHES with at least `pause` seconds from one's end to the next, by events:
    of a kernel that does nothing, or (`full`) of as many groups as cores, of 16 loads a thread."""
    units, group = (bench.limits.compute_units, min(PEERS_GROUP, bench.limits.group_max)) if full else (1, 1)
    out = bench._buffer(np.zeros(16 * units * group, np.uint32))
    if full:
        kernel = bench._kernel(kernels.stream(4), "read")
        arguments = (out, bench._buffer(np.zeros(units * group, np.uint32)), np.uint32(16 * units * group),
                     np.uint32(16 * group), np.uint32(1), np.uint32(16 // kernels.STREAMED["read"]))
    else:
        kernel, arguments = bench._kernel(kernels.LAUNCH, "launch"), (out, np.uint32(0))
    found = defaultdict(list)
    ended = time.perf_counter()
    for _ in range(LAUNCHES):
        while (begun := time.perf_counter()) < ended + pause:
            pass
        event = kernel(bench.queue, (units * group,), (group,), *arguments)
        event.wait()
        ended = time.perf_counter()
        found["from the call until the host knows of the end"].append(1e6 * (ended - begun))
        found["queued to start"].append(1e-3 * (event.profile.start - event.profile.queued))
        found["start to end"].append(1e-3 * (event.profile.end - event.profile.start))
    return {name: statistics.median(values[LAUNCHES // 10:]) for name, values in found.items()}


def witnessed(meter: Meter) -> tuple[float, float]:
    """GB/s of (reading clpeak's footprint, NumPy adding it up in a thread a core)."""
    width, parts = rates.SHAPES[-1]
    mine = 1e-9 / meter.seconds(lambda: meter.extra.stream_parts(PEERS_BYTES, width, "read", parts), "bytes", "memory",
                                2).value
    cores = os.cpu_count() or 1
    shares = np.array_split(np.arange(PEERS_BYTES // 8, dtype=np.uint64), cores)
    took = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(4):
            begun = time.perf_counter()
            list(pool.map(np.sum, shares))
            took.append(time.perf_counter() - begun)
    return mine, 1e-9 * PEERS_BYTES / min(took)


def place(device: Any) -> tuple[int, int]:
    """(platform, device) as clpeak numbers them: the order of the loader, which is pyopencl's."""
    import pyopencl as cl

    for p, platform in enumerate(cl.get_platforms()):
        for d, other in enumerate(platform.get_devices()):
            if other == device:
                return p, d
    raise LookupError("the device is gone")


def compared(mine: Mapping[str, list[float]], theirs: Mapping[str, list[float]],
             refused: Mapping[str, str]) -> list[str]:
    lines = [f"{'':32} {'probe':>9} {'clpeak':>9} {'ratio':>6}"]
    for name in ROWS:
        a = statistics.median(mine[name]) if mine.get(name) else None
        b = statistics.median(theirs[name]) if theirs.get(name) else None
        ratio = f"{a / b:6.2f}" if a and b else f"{'':6}"
        lines.append(f"{name:32} {f'{a:9.4g}' if a else '  refused':>9} {f'{b:9.4g}' if b else '        -':>9} {ratio}")
        if a is None and name in refused:
            lines.append(f"    {refused[name]}")
        elif a and b and abs(a / b - 1) > WITHIN and name in WHY:
            lines.append(f"    {WHY[name]}")
    return lines


def stated() -> str:
    """Caches of the first CPU, as Linux says (a virtual machine may have a share of the last)."""
    out = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            out.append(f"L{(index / 'level').read_text().strip()} {(index / 'size').read_text().strip()}")
    return ", ".join(out) or "nothing"


def main() -> int:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS
    try:
        bench = open_device(number)
    except NpulabError as e:
        print(f"skipped: {e.message}")
        return 0
    if not shutil.which("clpeak"):
        print("skipped: clpeak is not installed (apt install clpeak)")
        return 0
    print(f"{bench.identity.name}, {bench.identity.platform}, driver {bench.identity.driver}")
    at = place(bench.device)
    mine, theirs, refused = defaultdict(list), defaultdict(list), {}
    for _ in range(rounds):
        try:
            peak = clpeak(*at)
        except (OSError, subprocess.SubprocessError, ET.ParseError) as e:
            print(f"skipped: clpeak fails: {e}")
            return 0
        for name, value in peak.items():
            theirs[name].append(value)
        found, refused = probed(Meter(bench, quick=True))
        for name, value in found.items():
            mine[name].append(value)
    print("\n".join(compared(mine, theirs, refused)))
    if bench.one_by_one:
        try:
            mine_there, numpy_there = witnessed(Meter(bench, quick=True))
            print(f"memory read through clpeak's {PEERS_BYTES >> 20} MiB: {mine_there:.4g} GB/s; np.sum of as many, a "
                  f"thread a core: {numpy_there:.4g} GB/s")
        except (Refused, NpulabError) as e:
            print(f"memory read through clpeak's {PEERS_BYTES >> 20} MiB: refused: {reason(e)}")
    nothing = launched(bench, False)
    print("launch of a kernel that does nothing, us: " + ", ".join(f"{k} {v:.3g}" for k, v in nothing.items()))
    later = [launched(bench, True, s)["queued to start"] for s in PAUSES]
    print("queued to start of one that fills the cores, us: " + ", ".join(
        f"{v:.3g} at a pause of {1e6 * s:.0f} us" for s, v in zip(PAUSES, later, strict=True)))
    print(f"\ncaches, stated by the system: {stated()}")
    for _ in range(rounds):
        meter = Meter(bench, quick=True)
        try:
            levels = caches.hierarchy(meter).levels
        except (Refused, NpulabError) as e:
            print(f"  refused: {reason(e)}")
            continue
        print("  found: " + ", ".join(f"L{i} {x.size / 1024:.0f}K ({x.cliff.shape})" for i, x in enumerate(levels, 1)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
