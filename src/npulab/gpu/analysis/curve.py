"""Cliffs that are gradual, by the curve of a load's time over footprints: plateaus and the middles of rises between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from npulab.gpu.analysis.chase import PIECE, Chase
from npulab.gpu.analysis.cliffs import Cliff, rising
from npulab.gpu.analysis.meter import Objection, Refused

STEPS = 4  # footprints an octave, half of them from LARGE on
LARGE = 1 << 25
FLAT = 1.12  # a plateau: half an octave in which time rises by less
SHOULDER = 1.25  # or by less than this, and its square or more in half octaves on both sides: the next level is near
RISE = 1.4  # from a plateau to the next
NEAREST = 2.0  # two cliffs that are nearer are one
REACH = 1 << 22  # bytes: 1024 pages of 4 KiB, which a second buffer of translations keeps
LOST = 4  # footprints of some sixty
PASSES, PASSES_OF_RISES = 2, 8  # tries of a footprint, and so many more of one on a rise; half of both where quick
AROUND, SLOPE = 2, 1.1  # footprints to each side; between those time rises by more
BROADEST = 6.0  # footprints from a tenth of a rise to nine: more is no cliff


@dataclass(frozen=True, slots=True)
class Rise:
    """A cliff between two plateaus: `inside` and `beyond` are footprints on them, a load takes `seconds` on the first.
    """

    cliff: Cliff
    inside: int
    beyond: int
    seconds: float


def rises(chase: Chase, start: int, line: int) -> tuple[list[Rise], str]:
    """(all cliffs beyond `start` bytes, what was no cliff; "" if nothing). A footprint of doubtful times is left out,
    LOST of them at most. Raises: Refused."""
    footprints, at = [], float(start)
    while at <= chase.largest:
        footprints.append(int(at) // line * line)
        at *= 2 ** (1 / STEPS if at < LARGE else 2 / STEPS)
    less = 2 if chase.meter.quick else 1
    seen = least(chase, footprints, line, PASSES // less)
    known = list(seen)
    rise = [f for i, f in enumerate(known) if seen[known[min(i + AROUND, len(known) - 1)]] >
            SLOPE * seen[known[max(0, i - AROUND)]]]
    with suppress(Refused):  # no time for more
        seen = least(chase, rise, line, PASSES_OF_RISES // less, seen)
    found, fault = found_in(list(seen), undisturbed(seen))
    return [_at_random(chase, r, line, PASSES_OF_RISES // less) for r in found], fault


def end(chase: Chase, size: int, line: int, limit: float) -> int:
    """Bytes up to which a load takes less than `limit`, within an octave and a half below `size`. Raises: Refused."""
    footprints = [int(size * 2 ** (i / STEPS)) // line * line for i in range(-6, 2)]
    seen = least(chase, footprints, line, (PASSES + PASSES_OF_RISES) // (2 if chase.meter.quick else 1))
    return int(_at(list(seen), undisturbed(seen), limit)) // 64 * 64


def least(chase: Chase, footprints: Sequence[int], line: int, passes: int,
          known: Mapping[int, float] | None = None, at_random: bool = False) -> dict[int, float]:
    """Seconds of a load by footprint, the least of several passes through all, each in other memory, and of `known`.

    Another program's lines, pages that fall on the same sets and lines that a prefetcher brings unasked throw out what
    would stay, and nothing makes a cache hold more than it does. Between the tries of a footprint is all of a pass, as
    what a neighbour does lasts. Footprints of doubtful times are left out. Raises: Objection if more than LOST are.
    """
    seen = dict(known or {})
    doubt: Objection | None = None
    for _ in range(passes):
        for f in footprints:
            try:
                seen[f] = min(seen.get(f, math.inf), chase.again(f, line, 1, f if at_random else PIECE))
            except Objection as e:
                doubt = e
    if doubt and sum(f not in seen for f in footprints) > LOST:
        raise doubt
    return dict(sorted(seen.items()))


def undisturbed(seen: Mapping[int, float]) -> list[float]:
    """What a larger footprint does not take no smaller one takes undisturbed."""
    times: list[float] = np.minimum.accumulate(list(seen.values())[::-1])[::-1].tolist()
    return times


def _at_random(chase: Chase, rise: Rise, line: int, passes: int) -> Rise:
    """The rise with its middle as it is in a random order through all of a footprint, where that is larger by half an
    octave at most.

    In pieces a prefetcher finds neighbours, whose lines throw out others early; at random translation begins early.
    Whichever says more is nearer. Beyond REACH translation is most of it."""
    middle = math.sqrt(math.prod(rise.cliff.interval or ()))
    if not chase.pieces or not 2 * PIECE <= middle <= REACH:
        return rise
    between = [middle * 2 ** (i / STEPS) for i in range(-2, 5)]
    places = [f for f in (min(rise.inside, middle / 2), *between) if f < rise.beyond]
    footprints = [int(f) // line * line for f in (*places, min(rise.beyond, 4 * middle))]
    try:
        seen = least(chase, footprints, line, passes, at_random=True)
    except Refused:
        return rise
    if not {footprints[0], footprints[-1]} <= seen.keys():
        return rise
    times = undisturbed(seen)
    later = _at(list(seen), times, (times[0] + times[-1]) / 2)
    if times[-1] < RISE * times[0] or not middle < later < math.sqrt(2) * middle:
        return rise
    why = (f"{rise.cliff.why.split(':')[0]}; at random through all of it from {times[0] * 1e9:.4g} to "
           f"{times[-1] * 1e9:.4g} ns: the middle of that, half an octave to each side")
    return replace(rise, cliff=Cliff(int(later) // 64 * 64, (later / math.sqrt(2), later * math.sqrt(2)), "gradual",
                                     why))


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
            last = _shoulder(footprints, times, i)
        if last == i:
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
                             footprints[(first + end) // 2], footprints[(begin + last) // 2], low))
        del level[0]
    if not fault and level and times[-1] > RISE * times[level[-1][1]]:
        fault = (f"load time rises from {footprints[level[-1][1]]} bytes on until the largest footprint, "
                 f"{footprints[-1]}: no plateau")
    return made, fault


def _shoulder(footprints: Sequence[int], times: Sequence[float], first: int) -> int:
    """The end of half an octave from `first` on, in which time rises far less than in some within an octave before and
    after; `first` if it is no such."""
    def rise(i: int) -> float:
        after = next((k for k in range(i, len(times)) if footprints[k] >= 1.4 * footprints[i]), i)
        return times[after] / times[i]

    last = next((k for k in range(first, len(times)) if footprints[k] >= 1.4 * footprints[first]), first)
    if last == first or times[last] >= SHOULDER * times[first]:
        return first
    before = [rise(i) for i in range(first) if 2.1 * footprints[i] >= footprints[first] >= 1.4 * footprints[i]]
    after = [rise(i) for i in range(last, len(times)) if footprints[i] <= 1.5 * footprints[last]]
    steep = max(1.5, (times[last] / times[first]) ** 2)
    return last if before and after and min(max(before), max(after)) > steep else first


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _at(footprints: Sequence[int], times: Sequence[float], limit: float) -> float:
    """Where time comes to `limit`, between two footprints in proportion."""
    i = next((i for i, t in enumerate(times) if t >= limit), len(times) - 1)
    if not i or times[i] <= times[i - 1]:
        return float(footprints[i])
    part = (limit - times[i - 1]) / (times[i] - times[i - 1])
    return float(footprints[i - 1] * (footprints[i] / footprints[i - 1]) ** min(1.0, part))
