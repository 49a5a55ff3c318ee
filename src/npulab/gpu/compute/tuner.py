"""The best of a problem's candidates, found by trying them within a time, and kept.

A folder has one JSON file for a device, its driver, npulab's version and a problem. It is written whole before and
after each candidate: a tuner that is killed at any moment goes on where it was. A candidate that it twice ended at
is left out.
"""

from __future__ import annotations

import hashlib
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import msgspec

from npulab.errors import InvariantError, NpulabError
from npulab.gpu import opencl
from npulab.gpu.compute import choices
from npulab.gpu.compute.choices import Choice, Kept, Work
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.problems import Attention, Convolution, Product
from npulab.gpu.compute.trials import Answer, Asked, Problem
from npulab.gpu.compute.types import Traits
from npulab.gpu.types import Identity
from npulab.program.files import read_bounded, write_atomically

WORKER = (sys.executable, "-m", "npulab.gpu.compute.trials")
LIMIT = 4 << 20
"""Bytes of a file of the store."""
ATTEMPTS = 2
"""At a candidate that the tuner ended at."""
MOST = 0.7
"""Of the turns, that a candidate must be quicker in than the best so far: with 11 of them, equal ones do in 11 %."""
AGAIN = 2
"""Times that it must be: beside other work one of 69 won 15 % slower (measured: bytes, 3 x 3, 28 x 28 x 128)."""
FAIR = 10.0
"""Seconds that a candidate must have had if the end of time is to count as an attempt."""


def default_store() -> Path:
    """Where tuning is kept unless a folder is named (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "npulab" / "kernels"


class Tried(msgspec.Struct, frozen=True):
    """seconds, rival: medians of its own and of the best so far, run in turns. won: it is the best from here on.
    why: it is out."""

    choice: Kept
    seconds: float = 0.0
    rival: float = 0.0
    won: bool = False
    why: str = ""


class Tuned(msgspec.Struct, frozen=True):
    """A file. trying: what was begun, and how often."""

    key: dict[str, Any]
    tried: tuple[Tried, ...] = ()
    trying: Kept | None = None
    attempts: int = 0


def tune(device: Device, traits: Traits, what: Work, store: Path, seconds: float,
         tell: Callable[[str], None] | None = None, worker: Sequence[str] = WORKER, halves: bool = False
         ) -> Choice | None:
    """The best found by now; the model's first where nothing was; None where there is nothing to choose. halves: as of
    `choices.candidates`, kept on their own. Otherwise as `search`."""
    path, key = _of(store, device, what, halves)
    return cast(Choice | None, search(path, key, choices.candidates(what, traits, halves),
                                      lambda: _problem(device, traits, what), seconds, tell, worker))


def best(store: Path, device: Device, traits: Traits, what: Work, halves: bool = False) -> Choice | None:
    """What tuning found; None where there was none, or the file is damaged."""
    return cast(Choice | None, known(*_of(store, device, what, halves), choices.candidates(what, traits, halves)))


def known(path: Path, key: dict[str, Any], ways: Sequence[Kept]) -> Kept | None:
    """The best of `ways` that a file with this key has."""
    return _best(_read(path, key, ways).tried)


def search(path: Path, key: dict[str, Any], ways: Sequence[Kept], problem: Callable[[], msgspec.Struct],
           seconds: float, tell: Callable[[str], None] | None, worker: Sequence[str]) -> Kept | None:
    """The best of `ways` by now, of a file with this key; the first where nothing was found; None of none.

    Candidates are tried in order in a process of its own, to which the problem is sent first. It is ended when
    `seconds` are over, whatever it hangs in: to that come only a write of the file and the end of the process. `tell`:
    a line for each candidate.

    Raises: UsageError if the file cannot be written.
    """
    end = time.monotonic() + seconds
    found = _read(path, key, ways)
    tried = list(found.tried)
    if found.trying is not None and found.attempts >= ATTEMPTS:
        tried.append(Tried(found.trying, why="the tuner ended while it was tried"))
        found = Tuned(key, tuple(tried))
    open_ = [w for w in ways if w not in {t.choice for t in tried}]
    if found.trying in open_:  # where it was
        open_.sort(key=lambda w: w != found.trying)
    if not open_ or time.monotonic() >= end:
        return _best(tried) or next(iter(ways), None)
    with suppress(OSError):  # the write says it better
        path.parent.mkdir(parents=True, exist_ok=True)
    child: _Child | None = None
    try:
        for i, choice in enumerate(open_):
            left = end - time.monotonic()
            if left <= 0:
                break
            attempts = found.attempts + 1 if choice == found.trying else 1
            found = Tuned(key, tuple(tried), choice, attempts)
            write_atomically(path, msgspec.json.encode(found))
            child = child or _Child(worker, problem())
            rival = _best(tried)
            result = _asked(child, Asked(choice, rival), end)
            if result is None:
                child.end()
                child = None
                if time.monotonic() >= end:
                    if left < FAIR:  # not its fault
                        write_atomically(path, msgspec.json.encode(Tuned(key, tuple(tried))))
                    break
                result = Tried(choice, why="the process died of it")
            tried.append(result)
            found = Tuned(key, tuple(tried))
            write_atomically(path, msgspec.json.encode(found))
            if tell:
                tell(f"{i + 1} of {len(open_)}: " + (tried[-1].why or f"{tried[-1].seconds * 1e6:.0f} us"))
    finally:
        if child:
            child.end()
    return _best(tried) or ways[0]


def _asked(child: _Child, asked: Asked, end: float) -> Tried | None:
    """Who wins must win again. None if the process died, or time is over."""
    for _ in range(AGAIN):
        answer = child.ask(asked, end)
        if answer is None:
            return None
        result = _judged(asked.choice, asked.rival, answer)
        if asked.rival is None or not result.won:
            break
    return result


def _judged(choice: Kept, rival: Kept | None, answer: Answer) -> Tried:
    """The candidate wins by a lower median and most of the turns: one of many that are as quick would win by luck."""
    if answer.why or not answer.seconds:
        return Tried(choice, why=answer.why or "no times")
    own = statistics.median(answer.seconds)
    if rival is None or not answer.rival:
        return Tried(choice, own, own, rival is None)
    against = statistics.median(answer.rival)
    turns = [a < b for a, b in zip(answer.seconds, answer.rival, strict=False)]
    return Tried(choice, own, against, own < against and sum(turns) >= MOST * len(turns))


def _best(tried: Sequence[Tried]) -> Kept | None:
    return next((t.choice for t in reversed(tried) if t.won), None)


def _of(store: Path, device: Device, what: Work, halves: bool) -> tuple[Path, dict[str, Any]]:
    return place(store, device.identity, choices.makers(what), what, halves)


def place(store: Path, device: Identity, makers: tuple[str, ...], what: Work, halves: bool = False
          ) -> tuple[Path, dict[str, Any]]:
    """(file, key). makers: as of `choices.makers`."""
    key = {"device": asdict(device), "npulab": _version(makers), "problem": type(what).__name__, **asdict(what),
           "halves": halves}
    key = msgspec.json.decode(msgspec.json.encode(key))
    name = hashlib.sha256(msgspec.json.encode(key, order="sorted")).hexdigest()[:24]
    return store / f"{name}.json", key


@cache
def _version(makers: tuple[str, ...]) -> str:
    """npulab's, and a digest of what makes the kernels: times of others are of no use."""
    here = Path(__file__).parent
    made = hashlib.sha256(b"".join((here / f"{n}.py").read_bytes() for n in makers))
    try:
        return f"{metadata.version('npulab')}+{made.hexdigest()[:12]}"
    except metadata.PackageNotFoundError:  # run from its sources
        return made.hexdigest()[:12]


def _read(path: Path, key: dict[str, Any], ways: Sequence[Kept]) -> Tuned:
    """Of a file that is not there, damaged, or of something else, nothing; of one that is right, what is among `ways`
    and has times that can be."""
    try:
        found = msgspec.json.decode(read_bounded(path, "a tuner's file", LIMIT), type=Tuned)
    except (NpulabError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Tuned(key)
    if found.key != key:
        return Tuned(key)
    known = set(ways)
    tried = tuple({t.choice: t for t in found.tried
                   if t.choice in known and (t.why or 0 < t.seconds < 1e6) and not (t.why and t.won)}.values())
    trying = found.trying if found.trying in known and found.trying not in {t.choice for t in tried} else None
    return Tuned(key, tried, trying, found.attempts if trying is not None else 0)


def _problem(device: Device, traits: Traits, what: Work) -> Problem:
    numbers = [i for i, d in enumerate(opencl.devices()) if d == device.identity]
    if not numbers:
        raise InvariantError("the device is not among those that there are", got=device.identity.name)
    return Problem(numbers[0], traits, what if isinstance(what, Convolution) else None,
                   what if isinstance(what, Product) else None, what if isinstance(what, Attention) else None)


class _Child:
    """A worker, asked line by line."""

    def __init__(self, worker: Sequence[str], problem: msgspec.Struct) -> None:
        environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.process = subprocess.Popen(list(worker), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, env=environment)
        self.lines: queue.Queue[bytes | None] = queue.Queue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        self._send(problem)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                self.lines.put(line)
        except ValueError:  # closed meanwhile
            pass
        self.lines.put(None)

    def _send(self, what: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(msgspec.json.encode(what) + b"\n")
            self.process.stdin.flush()
        except OSError:  # it is dead; who listens finds out
            pass

    def ask(self, asked: Asked, end: float) -> Answer | None:
        """None if it died, or `end` came first."""
        self._send(asked)
        while (left := end - time.monotonic()) > 0:
            try:
                line = self.lines.get(timeout=left)
            except queue.Empty:
                return None
            if line is None:
                return None
            try:
                return msgspec.json.decode(line, type=Answer)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue  # what a driver has to say
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.listener.join(timeout=5)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
