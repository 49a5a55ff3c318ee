"""The probe against clpeak on the same device in one run, in turns: `python bench/gpu_peers.py [DEVICE] [ROUNDS]`.

One line a quantity: both medians over ROUNDS (7 unless told otherwise), their ratio, the least and the most of the
rounds' own ratios, and, where they differ because something else is measured, what. Sizes of caches: gpu_caches.py.
Skips, with the reason, without pyopencl, a device or clpeak (apt install clpeak). A minute a round on two cores.
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
from npulab.gpu.analysis import rates
from npulab.gpu.analysis.meter import Meter, Refused, reason
from npulab.gpu.opencl import open_device
from npulab.gpu.types import Quantity

ROUNDS = 7
PATIENCE = 300  # seconds for clpeak
WITHIN = 0.1
FRESH = 30  # seconds that a meter's references are taken for
LAUNCHES = 1000
PAUSES = (0.0, 1e-4, 1e-3)  # seconds
PEERS_GROUP = 4096
"""Threads of a group at most where clpeak 1.1.2 asks PoCL, which states as many."""
TURNS, IN_TURNS_BYTES = 8, 1 << 28
COPY_TURNS, COPIES = 3, (1 << 26, 1 << 27, 1 << 29)
"""Bytes; clpeak 1.1.2 copies 2^27 floats to a CPU, as a library in front of its calls saw."""
PATTERN = """
__kernel void pattern(__global const float16 *data, __global float *out) {
    uint ls = get_local_size(0), at = get_group_id(0) * ls * 16 + get_local_id(0);
    float16 x = (float16)(0);
    for (uint i = 0; i < 16; i++) x += data[at + i * ls];
    float8 y = x.lo + x.hi;
    float4 z = y.lo + y.hi;
    out[get_global_id(0)] = z.s0 + z.s1 + z.s2 + z.s3;
}
"""
"""Each thread at 16 places, a group's size apart: where a core does threads one by one it goes 16 ways at once."""
ROWS = ("float32 compute, G operations/s", "memory read, GB/s", "transfer to device, GB/s",
        "transfer from device, GB/s", "launch, queued to start, us")
PARTS = {"--compute-sp": ROWS[:1], "--global-bandwidth": ROWS[1:2], "--transfer-bandwidth": ROWS[2:4],
         "--kernel-latency": ROWS[4:]}
"""Of clpeak."""
WHY = {
    "float32 compute, G operations/s": (
        "clpeak's kernel is one chain of mad a thread, of vectors up to 16: where a core runs one thread (a CPU) "
        "its latency is measured; the probe also takes 2 to 16 chains. Both count two operations a multiply-add."),
    "memory read, GB/s": (
        "clpeak goes once through a buffer (of a CPU 512 MiB), each thread to 16 places; the probe again and again "
        "through 128 MiB at least, which fits no cache either. Where they are apart by what the machine does from one "
        "minute to the next, and not by what they do, the same in turns, below, shows it."),
    "transfer to device, GB/s": (
        "clpeak divides a large copy (512 MiB on a CPU) by its time; the probe the difference of copies of as many and "
        "of a quarter, or of next to nothing. Whole copies, below: C libraries copy what is large in another way."),
    "launch, queued to start, us": (
        "Both by the device's clock, of a kernel of 16 loads a thread that fills the cores; clpeak's is a mean, the "
        "probe's a median. clpeak calls from C++, the probe from Python: the more time between calls, the longer a "
        "start takes, below. The probe's launch cost is another thing: from the call until the host knows of the end."),
}
WHY["transfer from device, GB/s"] = WHY["transfer to device, GB/s"]


def clpeak(platform: int, device: int, *parts: str) -> dict[str, float]:
    """Best figures of clpeak's parts (PARTS), in the units of ROWS. Raises: OSError, subprocess.SubprocessError,
    ET.ParseError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peak.xml"
        subprocess.run(["clpeak", "-p", str(platform), "-d", str(device), *parts, "--xml-file", str(out)], check=True,
                       capture_output=True, timeout=PATIENCE)
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


def probed(meter: Meter, name: str) -> float:
    """The figure of one of ROWS. Raises: Refused, NpulabError."""
    def of(found: Quantity, factor: float) -> float:
        assert found.value is not None
        return found.value * factor

    tasks = {ROWS[0]: lambda: of(rates.rate(meter, "fma", "float32"), 2e-9),
             ROWS[1]: lambda: of(rates.memory_bandwidth(meter, None, "read"), 1),
             ROWS[2]: lambda: of(rates.transfers(meter, True)[0], 1),
             ROWS[3]: lambda: of(rates.transfers(meter, False)[0], 1),
             ROWS[4]: lambda: launched(meter.bench, True)["queued to start"]}
    meter.begin()
    return tasks[name]()


def launched(bench: Any, full: bool, pause: float = 0.0) -> dict[str, float]:
    """Parts of a launch in us, medians of LAUNCHES with at least `pause` seconds from one's end to the next, by events:
    of a kernel that does nothing, or (`full`) of as many groups as cores, of 16 loads a thread."""
    units, group = (bench.limits.compute_units, min(PEERS_GROUP, bench.limits.group_max)) if full else (1, 1)
    out = bench._buffer(np.zeros(16 * units * group, np.uint32))
    arguments: tuple[Any, ...]
    if full:
        kernel = bench._kernel(kernels.stream(4), "read")
        arguments = (out, bench._buffer(np.zeros(units * group, np.uint32)), np.uint32(16 * units * group),
                     np.uint32(16 * group), np.uint32(1), np.uint32(16 // kernels.STREAMED["read"]))
    else:
        kernel, arguments = bench._kernel(kernels.LAUNCH, "launch"), (out, np.uint32(0))
    found, events = defaultdict(list), []
    ended = time.perf_counter()
    for _ in range(LAUNCHES):
        while (begun := time.perf_counter()) < ended + pause:
            pass
        event = kernel(bench.queue, (units * group,), (group,), *arguments)
        event.wait()
        ended = time.perf_counter()
        found["from the call until the host knows of the end"].append(1e6 * (ended - begun))
        events.append(event)  # asked for its times later: that would be a pause
    for event in events:
        found["queued to start"].append(1e-3 * (event.profile.start - event.profile.queued))
        found["start to end"].append(1e-3 * (event.profile.end - event.profile.start))
    return {name: statistics.median(values[LAUNCHES // 10:]) for name, values in found.items()}


def in_turns(bench: Any) -> dict[str, list[float]]:
    """GB/s of reading IN_TURNS_BYTES, TURNS times in turns, as the machine is from second to second: the probe's widest
    stream, the pattern of clpeak's widest kernel, NumPy's sum by a thread a core."""
    cells = np.arange(IN_TURNS_BYTES // 4, dtype=np.uint32)
    count, group = IN_TURNS_BYTES // 64 // 16, min(1024, bench.limits.group_max)
    kernel = bench._kernel(PATTERN, "pattern")
    data, out = bench._buffer(cells.astype(np.float32)), bench._buffer(np.zeros(count, np.float32))
    shares = np.array_split(cells.view(np.uint64), os.cpu_count() or 1)
    width, parts = rates.SHAPES[-1]
    found = defaultdict(list)
    with ThreadPoolExecutor(len(shares)) as pool:
        def summed() -> float:
            begun = time.perf_counter()
            list(pool.map(np.sum, shares))
            return time.perf_counter() - begun

        for _ in range(TURNS):
            mine = bench.stream_parts(IN_TURNS_BYTES, width, "read", parts)
            if mine.wrong:
                raise Refused(mine.wrong)
            found["probe"].append(1e-9 * mine.work["bytes"] / statistics.median(mine.seconds))
            for name, run in (("clpeak's pattern", lambda: bench._time(kernel, (count,), (group,), data, out)),
                              ("np.sum", summed)):
                found[name].append(1e-9 * IN_TURNS_BYTES / statistics.median([run() for _ in range(7)]))
    return found


def copied(bench: Any) -> dict[str, list[float]]:
    """GB/s of whole copies to the device and back, COPY_TURNS times in turns, of the sizes that the probe takes the
    difference of and of clpeak's."""
    found = defaultdict(list)
    for _ in range(COPY_TURNS):
        for to_device in (True, False):
            for size in COPIES:
                took = statistics.mean(bench.transfer(size, to_device).seconds)
                found[f"{'to' if to_device else 'from'} it {size >> 20} MiB"].append(1e-9 * size / took)
    return found


def place(device: Any) -> tuple[int, int]:
    """(platform, device) as clpeak numbers them: the order of the loader, which is pyopencl's."""
    import pyopencl as cl

    for p, platform in enumerate(cl.get_platforms()):
        for d, other in enumerate(platform.get_devices()):
            if other == device:
                return p, d
    raise LookupError("the device is gone")


def compared(mine: Mapping[str, list[float | None]], theirs: Mapping[str, list[float | None]],
             refused: Mapping[str, str]) -> list[str]:
    """By round; None where there is no figure, the last reason in `refused`."""
    def middle(of: list[float | None] | None) -> float | None:
        values = [v for v in of or () if v]
        return statistics.median(values) if values else None

    lines = [f"{'':32} {'probe':>9} {'clpeak':>9} {'ratio':>6}  in rounds"]
    for name in ROWS:
        a, b = middle(mine.get(name)), middle(theirs.get(name))
        each = [x / y for x, y in zip(mine.get(name, ()), theirs.get(name, ()), strict=False) if x and y]
        ratio = f"{a / b:6.2f}" if a and b else f"{'':6}"
        ratio += f"  {min(each):.2f} to {max(each):.2f}" if each else ""
        lines.append(f"{name:32} {f'{a:9.4g}' if a else '  refused':>9} {f'{b:9.4g}' if b else '        -':>9} {ratio}")
        if a is None and name in refused:
            lines.append(f"    {refused[name]}")
        elif a and b and abs(a / b - 1) > WITHIN and name in WHY:
            lines.append(f"    {WHY[name]}")
    return lines


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
    mine: dict[str, list[float | None]] = defaultdict(list)
    theirs: dict[str, list[float | None]] = defaultdict(list)
    refused: dict[str, str] = {}
    meter, made = Meter(bench, quick=True), time.monotonic()
    for part, rows in [pair for _ in range(rounds) for pair in PARTS.items()]:
        try:
            peak = clpeak(*at, part)
        except (OSError, subprocess.SubprocessError, ET.ParseError) as e:
            print(f"skipped: clpeak fails: {e}")
            return 0
        if time.monotonic() > made + FRESH:
            meter, made = Meter(bench, quick=True), time.monotonic()
        for name in rows:
            theirs[name].append(peak.get(name))
            try:
                mine[name].append(probed(meter, name))
            except (Refused, NpulabError) as e:
                mine[name].append(None)
                refused[name] = reason(e)
    print("\n".join(compared(mine, theirs, refused)))
    if bench.one_by_one:
        try:
            turns = in_turns(bench)
            ratio = statistics.median(a / b for a, b in zip(turns["probe"], turns["clpeak's pattern"], strict=True))
            print(f"memory read, {TURNS} times in turns in one process, GB/s: " + ", ".join(
                f"{k} {statistics.median(v):.4g} ({min(v):.3g} to {max(v):.3g})" for k, v in turns.items())
                + f"; the probe's of the pattern's: {ratio:.2f}")
        except (Refused, NpulabError) as e:
            print(f"memory read in turns: refused: {reason(e)}")
    try:
        print(f"whole copies {COPY_TURNS} times in turns, GB/s: " + ", ".join(
            f"{k} {statistics.median(v):.3g}" for k, v in copied(bench).items()))
    except NpulabError as e:
        print(f"whole copies: refused: {reason(e)}")
    nothing = launched(bench, False)
    print("launch of a kernel that does nothing, us: " + ", ".join(f"{k} {v:.3g}" for k, v in nothing.items()))
    later = [launched(bench, True, s)["queued to start"] for s in PAUSES]
    print("queued to start of one that fills the cores, us: " + ", ".join(
        f"{v:.3g} at a pause of {1e6 * s:.0f} us" for s, v in zip(PAUSES, later, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
