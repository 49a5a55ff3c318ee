"""Seconds of a load of a pointer chase, each footprint and stride asked once, and what translation is of them."""

from __future__ import annotations

import math

from npulab.errors import UnsupportedError
from npulab.gpu.analysis.meter import Kind, Meter
from npulab.gpu.analysis.statistics import Estimate
from npulab.gpu.types import Timing

LARGEST = 1 << 29  # bytes of a footprint
PIECE = 1 << 16
"""Bytes that are gone through at random before others: what the first buffer of translations keeps anywhere (16 pages
of 4 KiB), and so many that a prefetcher finds no order in them."""
FEW = 1024  # lines, and pages with them, that a buffer of translations may keep: spread, they tell nothing
APART = 1.03  # a chase at random that takes so much longer than one in pieces pays for something


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

    def latency(self, footprint: int, line: int, within: int, kind: Kind = "alone",
                through: float = 0.0) -> tuple[Estimate, str]:
        """(seconds of a load of a random chase less those of translation, what was taken off; "" if nothing was).

        within: bytes of the level before, 0: there is none. A chase of as many lines as a quarter of that holds, spread
        over the footprint, takes longer than one of lines side by side by what translation takes. Without a level
        before a chase in pieces does: all its lines are in the first cache, whatever the order.
        """
        found = self.at_random(footprint, line, kind, through)
        if not self.pieces or self.again(footprint, line, 2) * APART > found.value:
            return found, ""
        if not within:
            return self._in_pieces(footprint, line), f"in pieces of {PIECE} bytes; at random {found.value * 1e9:.4g} ns"
        apart = max(1, math.ceil(2 * footprint / within)) | 1  # an odd number of lines: all sets of a cache take part
        count = footprint // (apart * line)
        if count < FEW:
            return self._in_pieces(footprint, line, kind, through), (
                f"in pieces of {PIECE} bytes; at random {found.value * 1e9:.4g} ns")
        spread = self.at_random(count * apart * line, apart * line)
        together = self._in_pieces(count * line, line)
        cost = spread.value - together.value
        if cost < 0.02 * found.value:
            return found, ""
        if through:  # translation goes at the pace of the cores, too
            found = self.at_random(footprint, line, kind, through + cost)
        half = math.hypot(found.high - found.value, spread.high - spread.value, together.high - together.value)
        # lines that are spread visit a page less often than all of them do, and may miss more: a chase in pieces, which
        # translation does not slow, bounds that
        value = max(found.value - cost, self._in_pieces(footprint, line, kind, through).value)
        return Estimate(value, value - min(half, 0.99 * value), value + half), (
            f"{found.value * 1e9:.4g} ns, of which {(found.value - value) * 1e9:.3g} for translation of addresses: "
            f"{count} lines spread over as many bytes take as much longer than side by side")

    def _in_pieces(self, footprint: int, stride: int, kind: Kind = "alone", through: float = 0.0) -> Estimate:
        footprint = footprint // stride * stride
        return self.meter.seconds(lambda: self._ask(footprint, stride), "loads", kind, 4, 0.004, through)

    def _ask(self, footprint: int, stride: int, piece: int = PIECE) -> Timing:
        if self.pieces:
            try:
                return self.meter.extra.chase_pieces(footprint, stride, piece)
            except UnsupportedError:
                self.pieces = False
        return self.meter.bench.chase(footprint, stride)
