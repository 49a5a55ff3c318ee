"""The lowest seam: what a device must offer to run a command stream. The virtual NPU and a board look the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Fault:
    """Something a stream did that hardware would not survive, or that has no meaning.

    `word` is the position in the submitted stream, `job` the number of the job in it (None: between jobs), `address`
    the NPU address concerned (None: no address).
    """

    kind: str
    message: str
    word: int
    job: int | None = None
    address: int | None = None

    def __str__(self) -> str:
        where = [f"word {self.word}"]
        if self.job is not None:
            where.append(f"job {self.job}")
        if self.address is not None:
            where.append(f"address {self.address:#010x}")
        return f"{self.kind}: {self.message} ({', '.join(where)})"


class Device(Protocol):
    """NPU memory by 32-bit address, and a queue for command streams."""

    def map(self, name: str, address: int, size: int, data: bytes | memoryview | None) -> None:
        """Make `size` bytes at `address` exist. `data` None: mapped, but nothing has written it."""

    def write(self, address: int, data: NDArray[np.uint8]) -> None:
        """Copy bytes into NPU memory."""

    def read(self, address: int, size: int) -> NDArray[np.uint8]:
        """Copy bytes out of NPU memory."""

    def submit(self, words: Sequence[int]) -> list[Fault]:
        """Execute one command stream to its end, or to its first fault."""
