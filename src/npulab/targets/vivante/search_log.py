"""Answers of the search in a file, a line each, so that a search that was stopped goes on where it was.

    {"key": SHA-256 of everything that the answer depends on, "piece": 64, "tile": [28, 22, 3], "image": "driver"}

Lines are only ever appended. A last line without its end, left by a kill, is dropped. What a file says is not believed:
the search takes an answer only if it is one of its own candidates.
"""

from __future__ import annotations

import os
from typing import Literal

import msgspec

from npulab.errors import UsageError

SIZE_MAX = 1 << 26
"""Bytes of a log: some 400,000 answers."""


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A variant of a job: channels of a piece; tile width, height and superblocks; who gets SRAM."""

    key: str
    piece: int
    tile: tuple[int, int, int]
    image: Literal["driver", "first", "never"]


class SearchLog:
    """Answers by key. Raises UsageError if the file is not a search log, or cannot be read or written."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        try:
            with open(path, "a+b") as f:
                if f.tell() > SIZE_MAX:
                    raise UsageError(f"{path} is too large for a search log", got=f"{f.tell()} bytes",
                                     want=f"at most {SIZE_MAX} bytes")
                f.seek(0)
                whole = f.read()
                kept = whole.rfind(b"\n") + 1
                for line in whole[:kept].splitlines():
                    answer = msgspec.json.decode(line, type=Answer)
                    self.answers[answer.key] = answer
                if kept == 0 and len(whole) > 1024:
                    raise msgspec.DecodeError("no line ends in its first 1024 bytes")
                f.truncate(kept)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise UsageError(f"{path} is not a search log", got=e,
                             try_="another name: this one would be written to") from None
        except OSError as e:
            raise UsageError(f"{path} cannot be used as a search log", got=e.strerror or e) from None

    def add(self, answer: Answer) -> None:
        self.answers[answer.key] = answer
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(descriptor, msgspec.json.encode(answer) + b"\n")  # one write: no line is mixed with another
            finally:
                os.close(descriptor)
        except OSError as e:
            raise UsageError(f"{self.path} cannot be written", got=e.strerror or e) from None
