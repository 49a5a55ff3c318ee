"""Seconds of a load that a level answers, less what translation of its address takes."""

from __future__ import annotations

import math

import numpy as np

from npulab.gpu.analysis.chase import PIECE, Chase
from npulab.gpu.analysis.kept import Before
from npulab.gpu.analysis.meter import Kind
from npulab.gpu.analysis.statistics import Estimate

FEW = 1024  # lines, and pages with them, that a buffer of translations may keep: spread, they tell nothing
APART = 1.01  # a chase that takes so much longer than one in pieces, or with more loads a page, pays for something
LINEAR = 0.15  # of what translation takes: how far from a line of loads a page it may be


def latency(chase: Chase, footprint: int, line: int, before: Before | None = None, kind: Kind = "alone",
            through: float = 0.0) -> tuple[Estimate, str]:
    """(seconds of a load of a random chase less those of translation, what was taken off; "" if nothing was).

    A chase of as many lines as half of the level before holds, spread over the footprint, takes longer than one of
    lines side by side by what translation takes. Where such lines are too few, or there is no level before, a chase in
    pieces stands for all.
    """
    found = chase.at_random(footprint, line, kind, through)
    side, wide = chase.again(footprint, line, 2), chase.again(footprint, 2 * line, 2)
    translated = chase.pieces and (side * APART <= found.value or wide >= APART * side)
    found = _without(before, footprint // line, line, found)
    if not translated:
        return found, ""
    apart = max(1, math.ceil(2 * footprint / before.size)) | 1 if before else 1  # odd: all sets of a cache take part
    count = footprint // (apart * line)
    pieces = in_pieces(chase, footprint, line, before, kind, through)
    if not before or count < FEW:
        return pieces, f"in pieces of {PIECE} bytes; at random {found.value * 1e9:.4g} ns"
    spread = chase.at_random(count * apart * line, apart * line)
    together = in_pieces(chase, count * line, line, before.before)
    first = before.before  # answers as many of them as of those side by side
    share = (first.kept(count, line) if first and first.shape == "random" else None) or 0.0
    cost = spread.value - (1 - share) * together.value - (share * first.seconds if first else 0.0)
    if through and cost > 0:  # translation goes at the pace of the cores, too
        found = _without(before, footprint // line, line, chase.at_random(footprint, line, kind, through + cost))
    half = math.hypot(found.high - found.value, spread.high - spread.value, together.high - together.value)
    if cost < half:
        return found, ""
    # lines that are spread visit a page less often than all of them do, and may miss more: a chase in pieces, which
    # translation does not slow, bounds that
    value = max(found.value - cost, pieces.value)
    return Estimate(value, value - min(half, 0.99 * value), value + half), (
        f"{found.value * 1e9:.4g} ns, of which {(found.value - value) * 1e9:.3g} for translation of addresses: "
        f"{count} lines spread over as many bytes take as much longer than side by side")


def in_pieces(chase: Chase, footprint: int, line: int, before: Before | None = None, kind: Kind = "alone",
              through: float = 0.0) -> Estimate:
    """A chase in pieces, less what translation is of it: a miss a page, which the loads of a visit share.

    With a half and a quarter of the lines, as many bytes apart, the share of each is 2 and 4 times that:

        t(s) = kept(s) before + (1 - kept(s)) latency + s share,    s = 1, 2, 4

    Three equations for two unknowns; nothing is taken off where they do not agree, as with a prefetcher of pairs.
    """
    kept: list[float | None] = []
    whole = footprint
    for footprint in (whole, whole * 7 // 8, whole * 3 // 4):  # one of them is clear of the level before
        kept = [before.kept(footprint // (s * line), s * line) if before else 0.0 for s in (1, 2, 4)]
        if None not in kept:
            break
    found = chase.precisely(footprint, line, kind, through)
    least = _without(before, footprint // line, line, found)
    if None in kept or (kept[0] or 0.0) > 0.5 or footprint // (16 * line) < 4:
        return least
    times = [found, *(chase.precisely(footprint, s * line, kind, through) for s in (2, 4))]
    share = np.array([k or 0.0 for k in kept])
    rows = np.stack([1 - share, np.array([1.0, 2.0, 4.0])], 1)
    right = np.array([t.value for t in times]) - share * (before.seconds if before else 0.0)
    (value, cost), *_ = np.linalg.lstsq(rows, right, rcond=None)
    error = max(t.high - t.value for t in times)
    half = error * math.sqrt(float(np.linalg.inv(rows.T @ rows)[0, 0]))
    if not 0 < value < found.value or cost < error / 2 or np.abs(rows @ (value, cost) - right).max() > max(
            error, LINEAR * cost):
        return least
    return Estimate(float(value), float(value) - half, float(value) + half)


def _without(before: Before | None, lines: int, stride: int, found: Estimate) -> Estimate:
    """Less the loads that the level before answers at random."""
    k = before.kept(lines, stride) if before else None
    if before is None or not k or k > 0.5:
        return found
    value, low, high = ((t - k * before.seconds) / (1 - k) for t in (found.value, found.low, found.high))
    return Estimate(value, low, high)
