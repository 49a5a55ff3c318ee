"""A grid swept: the points that the results file does not have are measured, and added to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from npulab.errors import UsageError
from npulab.sweep.grid import Grid, read_grid
from npulab.sweep.points import Point, Record
from npulab.sweep.store import Store


@dataclass(frozen=True)
class Swept:
    """rows  (key, point, record) of every point, in the grid's order, without the records' nodes.
    ran   how many of them were measured now.
    """

    grid: Grid
    results: Path
    rows: tuple[tuple[str, Point, Record], ...]
    ran: int


def sweep(grid: str | os.PathLike[str], results: str | os.PathLike[str], workers: int | None = None,
          scheduler: str | None = None, retry_failed: bool = False,
          tell: Callable[[int, int, int], None] = lambda done, failed, of: None) -> Swept:
    """Measure every point of the grid file that the results file does not have.

    On `workers` processes (default: one a CPU), or on the Dask cluster at `scheduler`. `retry_failed`: those that
    failed before are measured again. `tell` is called with the numbers of points done, failed, and in all.
    A script that calls this needs `if __name__ == "__main__":`, since the processes are spawned.

    Raises: UsageError, ModelError for files that are not what they should be; DeviceError, UnsupportedError for a
    cluster. What a point raises is its record. However it ends, the results file has every point measured so far.
    """
    if scheduler is not None and workers is not None:
        raise UsageError("a cluster has its own workers", got="--workers and --scheduler", try_="one of the two")
    if workers is not None and workers < 1:
        raise UsageError("a sweep needs a worker", got=workers)
    found = read_grid(grid)
    with Store(results) as store:
        before = store.states()
        states = {key: before[key] for key in found.points if key in before}
        if retry_failed:
            states = {key: state for key, state in states.items() if state == "done"}
        todo = [p for key, p in found.points.items() if key not in states]
        failures = sum(s == "failed" for s in states.values())
        done = len(states) - failures
        tell(done, failures, len(found.points))
        if todo:
            with contextlib.ExitStack() as stack:
                if scheduler is None:
                    from npulab.sweep import pool

                    batches = pool.measure_all(todo, found.files, min(workers or pool.cpus(), len(todo)))
                else:
                    from npulab.sweep import cluster

                    client = stack.enter_context(cluster.connected(scheduler))
                    batches = cluster.measure_all(todo, found.files, client)
                stack.callback(batches.close)
                for batch in batches:
                    store.write(batch)
                    failures += sum(r.state == "failed" for _, r in batch)
                    done += sum(r.state == "done" for _, r in batch)
                    tell(done, failures, len(found.points))
        records = dict(store.records(found.points))
    return Swept(found, Path(results), tuple((key, p, records[key]) for key, p in found.points.items()), len(todo))
