"""Points measured by processes of this machine.

Not concurrent.futures: when one of its workers dies it gives up all that was under way, and does not say which point
killed it. Here each worker has its own pipe and one point at a time.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec

from npulab.errors import DeviceError
from npulab.sweep.points import Point, Record, measure, read_model

DEATHS = 2
"""A point that this many workers died of has failed. One could have been somebody's `kill`."""


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    point: Point
    started: bool = False


def measure_all(points: Sequence[Point], files: Mapping[str, Path],
                workers: int) -> Generator[list[tuple[Point, Record]]]:
    """Each point's record, in the order in which they come; workers have their next point before a batch is given.

    A script that calls this needs `if __name__ == "__main__":`, since the processes are spawned.

    Raises: DeviceError if processes cannot be started.
    """
    waiting = list(reversed(points))
    deaths: dict[str, int] = {}
    crew: list[_Worker] = []
    try:
        while len(crew) < workers and waiting:
            crew.append(_start(waiting.pop(), files))
        while crew:
            batch: list[tuple[Point, Record]] = []
            ready = wait([w.pipe for w in crew])
            for w in [w for w in crew if w.pipe in ready]:
                try:
                    answer = w.pipe.recv_bytes()
                except (EOFError, OSError):  # it died
                    crew.remove(w)
                    code = _end(w)
                    if not w.started:
                        raise DeviceError("a worker process of the sweep did not start", got=f"exit code {code}",
                                          try_="fewer --workers") from None
                    key = w.point.key()
                    deaths[key] = deaths.get(key, 0) + 1
                    if deaths[key] < DEATHS:
                        waiting.append(w.point)
                    else:
                        batch.append((w.point, _killed(code)))
                    if waiting:
                        crew.append(_start(waiting.pop(), files))
                    continue
                if not w.started:
                    w.started = True
                    continue
                batch.append((w.point, msgspec.json.decode(answer, type=Record)))
                if waiting:
                    w.point = waiting.pop()
                    _give(w, files)
                else:
                    crew.remove(w)
                    _end(w)
            if batch:
                yield batch
    finally:
        for w in crew:
            w.process.terminate()
        for w in crew:
            _end(w)


def _start(point: Point, files: Mapping[str, Path]) -> _Worker:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    try:
        with _without_interrupts():
            process.start()
    except OSError as e:
        ours.close()
        raise DeviceError("a worker process of the sweep did not start", got=e.strerror or e,
                          try_="fewer --workers") from e
    finally:
        theirs.close()  # else the end of the worker would not end the pipe
    worker = _Worker(process, ours, point)
    _give(worker, files)
    return worker


def _give(w: _Worker, files: Mapping[str, Path]) -> None:
    with contextlib.suppress(OSError):  # it died; reading from it will tell
        w.pipe.send((w.point, os.fspath(files[w.point.digest])))


def _end(w: _Worker) -> int | None:
    w.pipe.close()
    w.process.join()
    return w.process.exitcode


def _killed(code: int | None) -> Record:
    how = f"exit code {code}" if code is None or code >= 0 else f"signal {-code}"
    return Record("failed", error_class="WorkerDied", error=(
        f"the process that measured it died, {DEATHS} times\n  got     {how}\n"
        "  try     fewer --workers, if memory ran out; then --retry-failed"))


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal; one started in here inherits that it does not care."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: Connection) -> None:
    """A worker's life: points in, records out, until the other end of the pipe is gone, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        pipe.send_bytes(b"started")
        while True:
            point, path = pipe.recv()
            pipe.send_bytes(msgspec.json.encode(measure(point, functools.partial(read_model, path, point.digest))))
