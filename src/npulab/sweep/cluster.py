"""Points measured by the workers of a Dask cluster (dask.distributed, the extra `npulab[dask]`).

Workers need npulab and nothing else: no common file system. A model's bytes go to the cluster once, as the result of a
small task and not by `scatter`: scattered data is lost with the worker that holds it, a task is run again. Points and
records travel as JSON, and the function that reads them by value, so that the scheduler does not need npulab.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import queue
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from npulab.errors import DeviceError, NpulabError, UnsupportedError, UsageError
from npulab.sweep.points import Point, Record, failed, read_model, version

CONNECT_SECONDS = 5.0
WORKERLESS_SECONDS = 30.0
"""A cluster may lose its last worker and get another; this long is waited for one."""
FETCH_SECONDS = 2.0
AHEAD = 256
"""Points that the cluster has at a time, for few workers; four times its threads for many."""


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """A client of the scheduler at `address`.

    Raises: UnsupportedError without dask.distributed; UsageError if that is no address; DeviceError if nobody answers.
    """
    try:
        distributed = _distributed()
    except ImportError as e:
        raise UnsupportedError("--scheduler needs dask.distributed", got=e,
                               try_="pip install 'npulab[dask]'") from None
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client", "asyncio")]
    levels = [g.level for g in loggers]
    for g in loggers:
        g.setLevel(logging.CRITICAL + 1)  # what a person has to know is said by the errors here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _knock(address, distributed)
            try:
                client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
            except Exception as e:
                raise _no_answer(address, e) from e
            try:
                yield client
            finally:
                with contextlib.suppress(Exception):
                    client.close(timeout=CONNECT_SECONDS)  # the scheduler forgets what only this client waits for
    finally:
        for g, level in zip(loggers, levels, strict=True):
            g.setLevel(level)


def _knock(address: str, distributed: Any) -> None:
    """Ask who is there. A Client would do that too, but one that nobody answers ends in tracebacks of its own."""
    async def identity() -> Any:
        async with distributed.rpc(address) as there:
            return await asyncio.wait_for(there.identity(), CONNECT_SECONDS)

    try:
        if not address.partition("://")[2]:
            raise ValueError("it has no tcp://")
        with ThreadPoolExecutor(1) as thread:  # the caller may be in a loop of its own
            found = thread.submit(lambda: asyncio.run(identity())).result()
        kind = str(found["type"])
    except (ValueError, RuntimeError, TypeError) as e:  # a scheme that does not exist; no port; TLS without keys
        raise UsageError(f"'{address}' is no scheduler's address", got=e, want="tcp://HOST:PORT") from e
    except Exception as e:
        raise _no_answer(address, e) from e
    if kind != "Scheduler":
        raise DeviceError("that is not a Dask scheduler", where=address, got=kind)


def _no_answer(address: str, error: Exception) -> DeviceError:
    got = str(error) or f"nothing in {CONNECT_SECONDS:g} s"
    return DeviceError("there is no answer from a Dask scheduler", where=address,
                       got=got if isinstance(error, OSError | TimeoutError) else "an answer of another kind",
                       try_="start one with `dask scheduler`")


def measure_all(points: Sequence[Point], files: Mapping[str, Path],
                client: Any) -> Generator[list[tuple[Point, Record]]]:
    """Each point's record, in the order in which they come. A point whose worker was lost is given to another.

    Raises: DeviceError if the scheduler is lost, there are no workers, or one has another npulab.
    """
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    waiting = iter(points)
    pending: dict[str, tuple[Point, Any]] = {}
    session = uuid.uuid4().hex[:8]
    task, same = _task(), _same()
    ahead = max(AHEAD, 4 * sum(_threads(client).values()))
    digest, model = "", None

    def send_ahead() -> list[tuple[Point, Record]]:
        """The points whose model cannot be read."""
        nonlocal digest, model
        lost = []
        while len(pending) < ahead and (point := next(waiting, None)) is not None:
            if point.digest != digest:
                digest, model = point.digest, None
                try:
                    data = read_model(files[digest], digest)
                except NpulabError as e:
                    unread = failed(e)
                else:
                    model = client.submit(same, data, key=f"model-{session}-{digest}")
            if model is None:
                lost.append((point, unread))
                continue
            future = client.submit(task, msgspec.json.encode(point), model, key=f"point-{session}-{point.key()}")
            pending[future.key] = point, future
            future.add_done_callback(done.put)
        return lost

    batch = send_ahead()
    seen = time.monotonic()
    while True:
        if batch:
            yield batch
        if not pending:
            return
        try:
            ready = [done.get(timeout=1.0)]
        except queue.Empty:
            ready = []
        with contextlib.suppress(queue.Empty):
            while True:
                ready.append(done.get_nowait())
        batch = []
        for future, record in _outcomes(client, ready):
            if record is None:
                done.put(future)
            else:
                batch.append((pending.pop(future.key)[0], record))
        batch += send_ahead()
        if batch or _threads(client):
            seen = time.monotonic()
        elif time.monotonic() - seen > WORKERLESS_SECONDS:
            raise DeviceError("the scheduler has no workers", where=client.scheduler.address,
                              got=f"none for {WORKERLESS_SECONDS:g} s", try_="start some with `dask worker`")


def _outcomes(client: Any, futures: list[Any]) -> Iterator[tuple[Any, Record | None]]:
    """What finished tasks give; None for those whose results have to be waited for, as they were lost with a worker."""
    async def gather() -> Any:
        return await client.gather(futures, asynchronous=True)

    try:
        answers = client.sync(gather, callback_timeout=FETCH_SECONDS)
    except Exception:  # of which one? they are few
        answers = None
    late = False
    for i, future in enumerate(futures):
        record = None if late else _outcome(client, future, None if answers is None else answers[i])
        late = record is None  # the others can wait too, while somebody looks whether there are workers at all
        yield future, record


def _outcome(client: Any, future: Any, answer: tuple[str | None, str, bytes] | None) -> Record | None:
    distributed = _distributed()
    try:
        theirs, address, record = answer or future.result(timeout=FETCH_SECONDS)
    except (TimeoutError, distributed.TimeoutError):
        return None
    except distributed.KilledWorker:
        return Record("failed", error_class="KilledWorker", error=(
            "every worker that got it was lost; the scheduler gave it up\n"
            "  try     more memory for a worker; then --retry-failed"))
    except (distributed.CancelledError, OSError) as e:
        raise _scheduler_lost(client) from e
    except Exception as e:
        raise DeviceError("a worker of the cluster cannot run points", got=f"{type(e).__name__}: {e}",
                          try_="the same Python and dask.distributed on every machine") from e
    if theirs != version():
        raise DeviceError("a worker of the cluster has another npulab", where=address, got=theirs or "none",
                          want=version(), try_="install the same npulab on every worker, and start them again")
    return msgspec.json.decode(record, type=Record)


def _threads(client: Any) -> dict[str, int]:
    """Worker -> its threads. Raises DeviceError if the scheduler is gone."""
    try:
        if client.status != "running":
            raise OSError(client.status)
        found: dict[str, int] = client.nthreads()
        return found
    except Exception as e:
        raise _scheduler_lost(client) from e


def _scheduler_lost(client: Any) -> DeviceError:
    return DeviceError("the scheduler is gone", where=client.scheduler.address if client.scheduler else "unknown",
                       try_="the same command goes on from the results so far, when it is back")


def _distributed() -> Any:
    return importlib.import_module("distributed")


def _task() -> Callable[[bytes, bytes], tuple[str | None, str, bytes]]:
    """What a worker runs. A function inside a function: it is sent by value, and names no module of ours outside."""

    def measure_there(point_json: bytes, data: bytes) -> tuple[str | None, str, bytes]:
        from distributed import get_worker

        address = get_worker().address
        try:
            import msgspec

            from npulab.sweep.points import Point, measure, version
        except ImportError:
            return None, address, b""
        point = msgspec.json.decode(point_json, type=Point)
        return version(), address, msgspec.json.encode(measure(point, lambda: data))

    return measure_there


def _same() -> Callable[[bytes], bytes]:
    def model(data: bytes) -> bytes:
        return data

    return model
