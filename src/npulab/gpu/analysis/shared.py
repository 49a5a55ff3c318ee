"""The last level of a cache that others use, too: how much of what was read at full speed is still there.

A chase loads a line at a time. Until it comes to the same line again others have read through much of the cache, and
it finds room for a part: of C bytes about C v / (v + r), where it loads v bytes a second and the others r. What it does
not find there slows it further. All threads that read at once are ten times and more as quick, and keep most of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from npulab.gpu.analysis.chase import LARGEST, Chase
from npulab.gpu.analysis.cliffs import Cliff
from npulab.gpu.analysis.meter import Objection, Refused
from npulab.gpu.analysis.statistics import Estimate, estimate
from npulab.gpu.types import Timing

SMALLEST = 1 << 20  # bytes: less is a core's own
BEHIND = 4  # times a footprint, read after it: a cache of any replacement has lost all but 2 % of one that filled it
RISE = 1.4  # from a level to memory
HIT = 0.1  # of a rise: less is the level itself
ENOUGH = 0.9  # of a footprint, still there: the cache is larger
LEAST = 0.4  # of a footprint: where less is there the sample's error is much of it
PASSES, PASSES_BEHIND = 16, 3  # tries of what is there, and of what was read since; half of the former where quick
FEWEST = 4  # footprints


@dataclass(frozen=True, slots=True)
class Seen:
    """Seconds of a load, one a pass, of lines of a footprint that all threads have read, and where more was read since.
    """

    footprint: int
    there: list[float]
    gone: list[float]

    def share(self, hit: float) -> float:
        """Of the footprint that is still there. Others take from a cache and nothing adds to it: the quickest pass."""
        memory = float(np.median(self.gone))
        return min(1.0, max(0.0, (memory - min(self.there)) / (memory - hit))) if memory > RISE * hit else 1.0


@dataclass(frozen=True, slots=True)
class Held:
    """seconds: of a load that the level answers; memory: of one that it does not, neither with translation."""

    cliff: Cliff
    seconds: float
    memory: Estimate


def held(chase: Chase) -> Held:
    """What the last cache has room for. Raises: Refused; UnsupportedError where the bench does not read in this way."""
    quick = chase.meter.quick
    largest = min(LARGEST // (2 if quick else 1), chase.meter.limits.buffer_max) // (1 + BEHIND)
    seen = [Seen(int(SMALLEST * 2 ** (i / 2)), [], []) for i in range(1 + int(2 * math.log2(largest / SMALLEST)))]
    asked = seen
    for passed in range(PASSES // (2 if quick else 1)):
        for one in asked:
            with suppress(Objection):  # asked again in the next pass
                one.there.append(_loads(chase, one.footprint, 0))
                if passed < PASSES_BEHIND:
                    one.gone.append(_loads(chase, one.footprint, BEHIND * one.footprint))
        seen = [one for one in seen if one.there and one.gone]
        found = concluded(seen)
        # of what is there wholly, and of what is not there, more tries say no more
        asked = [one for one in seen if LEAST / 2 < one.share(found.seconds) < ENOUGH + HIT / 2]
    return found


def _loads(chase: Chase, footprint: int, behind: int) -> float:
    """Seconds of a load; of what is there in the quickest repetition, each of which is of other lines, read anew."""
    def ask() -> Timing:
        return chase.meter.extra.primed(footprint, behind)

    if behind:
        return chase.meter.seconds(ask, "loads", "alone").value
    return chase.meter.quickest(ask, "loads", "alone")


def concluded(seen: Sequence[Seen]) -> Held:
    """Raises: Refused."""
    if len(seen) < FEWEST:
        raise Refused("too few footprints could be timed after all threads had read them")
    low, high = min(min(one.there) for one in seen), max(float(np.median(one.gone)) for one in seen)
    if high < RISE * low:
        raise Refused(f"loads of what all threads have read take {low * 1e9:.4g} ns, and {high * 1e9:.4g} where "
                      f"{BEHIND} times as much was read since: no cache")
    hit = float(np.median([min(one.there) for one in seen if min(one.there) < low + HIT * (high - low)]))
    last = seen[-1]
    if last.share(hit) > ENOUGH:
        raise Refused(f"{last.share(hit):.0%} of {last.footprint} bytes are still there after all threads have read "
                      "them: no footprint is large enough")
    best = max((one for one in seen if one.share(hit) >= LEAST), key=lambda one: one.share(hit) * one.footprint)
    size = int(best.share(hit) * best.footprint) // 64 * 64
    memory = estimate([t for one in seen if BEHIND * one.footprint >= size for t in one.gone])
    why = (f"{best.share(hit):.0%} of {best.footprint} bytes are still there after all threads have read them "
           f"({hit * 1e9:.4g} ns a load, {memory.value * 1e9:.4g} where {BEHIND} times as much was read since), and no "
           "footprint leaves more: half an octave to each side, as others may have a part")
    return Held(Cliff(size, (size / math.sqrt(2), size * math.sqrt(2)), "gradual", why), hit, memory)
