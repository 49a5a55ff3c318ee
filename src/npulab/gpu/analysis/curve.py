"""Cliffs that are gradual, by the curve of a load's time over footprints: plateaus and the middles of rises between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from npulab.gpu.analysis.chase import Chase
from npulab.gpu.analysis.cliffs import Cliff, rising
from npulab.gpu.analysis.meter import Objection

STEPS = 4  # footprints an octave, half of them from LARGE on
LARGE = 1 << 25
FLAT = 1.12  # a plateau: half an octave in which time rises by less
RISE = 1.3  # from a plateau to the next
NEAREST = 2.0  # two cliffs that are nearer are one
LOST = 4  # footprints of some sixty
BROADEST = 6.0  # footprints from a tenth of a rise to nine: more is no cliff


@dataclass(frozen=True, slots=True)
class Rise:
    """A cliff between two plateaus: `inside` and `beyond` are footprints on them."""

    cliff: Cliff
    inside: int
    beyond: int


def rises(chase: Chase, start: int, line: int) -> tuple[list[Rise], str]:
    """(all cliffs beyond `start` bytes, what was no cliff; "" if nothing). Every footprint several times, each time in
    other memory: where pages fall on sets by chance, the mean is what counts. A footprint of doubtful times is left
    out, LOST of them at most. Raises: Refused."""
    footprints, at = [], float(start)
    while at <= chase.largest:
        footprints.append(int(at) // line * line)
        at *= 2 ** (1 / STEPS if at < LARGE else 2 / STEPS)
    seen: list[tuple[int, float]] = []
    for i, f in enumerate(footprints):
        try:
            seen.append((f, chase.again(f, line, 4 if f < LARGE else 2)))
        except Objection:
            if i - len(seen) >= LOST:
                raise
    return found_in([f for f, _ in seen], [s for _, s in seen])


def found_in(footprints: Sequence[int], seconds: Sequence[float]) -> tuple[list[Rise], str]:
    """The same of a curve.

    The size is the middle of a rise, its interval half an octave to each side: in a cache of sets that pages fall on at
    random half of the loads miss at its size, with random replacement at 1.39 times that.
    """
    times = rising(seconds)
    level: list[tuple[int, int]] = []  # first and last index of plateaus
    for i in range(len(times) - 2):
        last = i
        while last + 1 < len(times) and times[last + 1] < FLAT * times[i]:
            last += 1
        if footprints[last] < 1.4 * footprints[i]:
            continue
        if level and (i <= level[-1][1] or times[i] < RISE * times[level[-1][1]]):
            if times[last] < RISE * times[level[-1][0]]:
                level[-1] = (level[-1][0], max(last, level[-1][1]))
            continue
        level.append((i, last))
    made: list[Rise] = []
    fault = ""
    while len(level) > 1:
        (first, end), (begin, last) = level[0], level[1]
        low, high = _mean(times[first:end + 1]), _mean(times[begin:last + 1])
        bottom, middle, top = (_at(footprints, times, low + s * (high - low)) for s in (0.1, 0.5, 0.9))
        after = _at(footprints, times, high + 0.5 * (_mean(times[level[2][0]:level[2][1] + 1]) - high)) \
            if len(level) > 2 else math.inf
        if after < NEAREST * middle:
            del level[1]  # a ledge within a rise
            continue
        why = (f"load time rises from {low * 1e9:.4g} to {high * 1e9:.4g} ns between {bottom:.0f} and {top:.0f} bytes, "
               "neither in a step nor as sets or random replacement would have it")
        if top > BROADEST * bottom:
            fault = f"no cliff: {why}"
        else:
            size = int(middle) // 64 * 64
            made.append(Rise(Cliff(size, (middle / math.sqrt(2), middle * math.sqrt(2)), "gradual",
                                   f"{why}: its middle, half an octave to each side"),
                             footprints[(first + end) // 2], footprints[(begin + last) // 2]))
        del level[0]
    if not fault and level and times[-1] > RISE * times[level[-1][1]]:
        fault = (f"load time rises from {footprints[level[-1][1]]} bytes on until the largest footprint, "
                 f"{footprints[-1]}: no plateau")
    return made, fault


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _at(footprints: Sequence[int], times: Sequence[float], limit: float) -> float:
    """Where time comes to `limit`, between two footprints in proportion."""
    i = next((i for i, t in enumerate(times) if t >= limit), len(times) - 1)
    if not i or times[i] <= times[i - 1]:
        return float(footprints[i])
    part = (limit - times[i - 1]) / (times[i] - times[i - 1])
    return float(footprints[i - 1] * (footprints[i] / footprints[i - 1]) ** min(1.0, part))
