"""A device that hangs: noticed from another thread, as the call that waits for the device never comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Doing:
    """What a Device was asked for last. Written by the thread that asks, read by the one that watches, which alone
    writes `ended`: the events that it looked at, and how many of them have ended.

    what    "" while nothing is asked.     since  by time.monotonic().
    events  of the launches under way, in their order; `labels` beside them.
    """

    what: str = ""
    since: float = 0.0
    events: Sequence[Any] = ()
    labels: Sequence[str] = ()
    ended: tuple[Sequence[Any], int] = field(default=((), 0), init=False)

    def begin(self, what: str) -> None:
        self.events, self.labels, self.since = (), (), time.monotonic()
        self.what = what

    def end(self) -> None:
        self.what, self.events = "", ()

    def silent(self) -> tuple[float, str]:
        """Seconds since something was asked or a launch ended, and what is waited for."""
        what, events, labels = self.what, self.events, self.labels
        ended = self.ended[1] if self.ended[0] is events else 0
        while ended < len(events) and _is_over(events[ended]):
            ended += 1
            self.since = time.monotonic()
        self.ended = events, ended
        if not what:
            return 0.0, ""
        if ended < len(labels):
            what = f"launch {ended + 1} of {len(labels)}, {labels[ended]}"
        return time.monotonic() - self.since, what


def _is_over(event: Any) -> bool:
    """Complete, or failed. One that cannot be asked, of a device that is lost, is waited for like others."""
    try:
        return bool(event.command_execution_status <= 0)
    except Exception:  # whatever the driver's binding raises
        return False


@contextmanager
def watched(doing: Doing, patience: float, hangs: Callable[[str], None]) -> Iterator[None]:
    """Call `hangs` once, from another thread, when the device says nothing for `patience` seconds, with what it is at.

    A driver that hangs in a call that holds Python's lock is not noticed; waiting and compiling do not hold it.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(1.0, patience / 4)):
            seconds, what = doing.silent()
            if seconds > patience:
                hangs(what)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
