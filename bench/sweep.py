"""Sweeps: `python bench/sweep.py`. No models but the sample are needed.

Prints points a second of 400 points of the sample (plan reference: one program, what-ifs that only change speeds), in
this process, on one and two worker processes and, where dask.distributed is installed, on a cluster of two workers on
this machine; bytes a row; the time to write a row; and the time to find that a finished sweep of 100,000 points has
nothing to do.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from pathlib import Path

from npulab.sweep.grid import read_grid
from npulab.sweep.points import measure
from npulab.sweep.run import sweep
from npulab.sweep.store import Store

SAMPLE = Path(__file__).resolve().parents[1] / "src" / "npulab" / "samples" / "digits.tflite"
GRID = """
models = ["digits.tflite"]
targets = ["a311d"]
plans = ["reference"]
[set]
clock = {}
dram_bandwidth = {}
"""


def grid(home: Path, clocks: int, bandwidths: int) -> Path:
    path = home / f"grid_{clocks}x{bandwidths}.toml"
    path.write_text(GRID.format([4e8 + 1e6 * i for i in range(clocks)], [2e9 + 1e7 * i for i in range(bandwidths)]))
    return path


def seconds(call: object) -> float:
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        shutil.copy(SAMPLE, home)
        small = grid(home, 20, 20)
        points = list(read_grid(small).points.values())
        records = []
        alone = seconds(lambda: records.extend(measure(p, SAMPLE.read_bytes) for p in points))
        print(f"in this process            {len(points) / alone:6.0f} points/s")
        for n in (1, 2):
            t = seconds(lambda n=n: sweep(small, home / f"{n}.sqlite", workers=n))
            print(f"worker processes: {n}        {len(points) / t:6.0f} points/s, start included")
        if importlib.util.find_spec("distributed"):
            from distributed import LocalCluster

            with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
                t = seconds(lambda: sweep(small, home / "dask.sqlite", scheduler=cluster.scheduler_address))
            print(f"Dask, 2 workers            {len(points) / t:6.0f} points/s, start of the cluster not included")
        print(f"file                       {(home / '1.sqlite').stat().st_size / len(points):6.0f} bytes a row")
        with Store(home / "rows.sqlite") as store:
            t = seconds(lambda: [store.write([row]) for row in zip(points, records, strict=True)])
        print(f"write, a row a time        {1e3 * t / len(points):6.2f} ms a row")
        large = grid(home, 100, 1000)
        start = time.perf_counter()
        found = read_grid(large).points
        print(f"grid of {len(found)} points      {time.perf_counter() - start:6.2f} s to read")
        with Store(home / "large.sqlite") as store:
            t = seconds(lambda: store.write((p, records[0]) for p in found.values()))
        print(f"  written at once          {t:6.2f} s, {(home / 'large.sqlite').stat().st_size / 1e6:.0f} MB")
        print(f"  nothing left to do       {seconds(lambda: sweep(large, home / 'large.sqlite')):6.2f} s")


if __name__ == "__main__":
    main()
