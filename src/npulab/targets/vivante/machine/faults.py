"""What stops the virtual NPU inside a job, and the limits on the work one submission may ask for."""

from __future__ import annotations

from dataclasses import dataclass


class JobFault(Exception):  # noqa: N818  (a fault is what the device reports, not an error of the caller)
    """A fault on its way from where it is seen to the front end, which knows the word and the job."""

    def __init__(self, kind: str, message: str, address: int | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.address = kind, message, address


@dataclass(frozen=True, slots=True)
class Limits:
    """Most work of one submission, so that no stream can hang or fill the host. Far above any real network."""

    macs: int = 400_000_000_000
    elements: int = 1_000_000_000
    weights: int = 400_000_000
    words: int = 32 * 1024
    """The kernel takes streams of at most 128 KiB (TP notes 6.1)."""


class Budget:
    """What is left of the limits during one submission."""

    def __init__(self, limits: Limits) -> None:
        self._left = {"macs": limits.macs, "elements": limits.elements, "weights": limits.weights}

    def spend(self, what: str, amount: int) -> None:
        self._left[what] -= amount
        if self._left[what] < 0:
            raise JobFault("work limit", f"the submission asks for more {what} than the virtual NPU grants")
