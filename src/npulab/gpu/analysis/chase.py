"""Seconds of a load of a pointer chase, each footprint and stride asked once."""

from __future__ import annotations

from npulab.errors import UnsupportedError
from npulab.gpu.analysis.meter import Kind, Meter
from npulab.gpu.analysis.statistics import Estimate
from npulab.gpu.types import Timing

LARGEST = 1 << 29  # bytes of a footprint
PIECE = 1 << 16
"""Bytes that are gone through at random before others: what the first buffer of translations keeps anywhere (16 pages
of 4 KiB), and so many that a prefetcher finds no order in them."""


class Chase:
    """In pieces where the bench can: an order at random through all of a footprint misses buffers of translations long
    before caches, and their cliffs look the same."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.largest = min(LARGEST >> (3 if meter.quick else 0), meter.limits.buffer_max)
        self.pieces = True
        self._known: dict[tuple[int, int], float] = {}

    def __call__(self, footprint: int, stride: int) -> float:
        what = footprint // stride * stride, stride
        if what not in self._known:
            self._known[what] = self.again(footprint, stride)
        return self._known[what]

    def forget(self) -> None:
        self._known.clear()

    def again(self, footprint: int, stride: int, calls: int = 1, piece: int = PIECE) -> float:
        footprint = footprint // stride * stride
        return self.meter.seconds(lambda: self._ask(footprint, stride, piece), "loads", "alone", calls).value

    def at_random(self, footprint: int, stride: int, kind: Kind = "alone", through: float = 0.0) -> Estimate:
        """All of a footprint in one random order, precisely."""
        footprint = footprint // stride * stride
        return self.meter.seconds(lambda: self.meter.bench.chase(footprint, stride), "loads", kind, 4, 0.004, through)

    def precisely(self, footprint: int, stride: int, kind: Kind = "alone", through: float = 0.0) -> Estimate:
        footprint = footprint // stride * stride
        return self.meter.seconds(lambda: self._ask(footprint, stride, PIECE), "loads", kind, 4, 0.004, through)

    def _ask(self, footprint: int, stride: int, piece: int) -> Timing:
        if self.pieces:
            try:
                return self.meter.extra.chase_pieces(footprint, stride, piece)
            except UnsupportedError:
                self.pieces = False
        return self.meter.bench.chase(footprint, stride)
