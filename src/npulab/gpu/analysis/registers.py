"""Register file and resident threads: more threads than fit at once run in waves, and time goes in steps."""

from __future__ import annotations

import math
from collections.abc import Mapping

from npulab.errors import UnsupportedError
from npulab.gpu.analysis.meter import Meter, Refused
from npulab.gpu.types import Quantity

COUNTS = (16, 32, 48, 64, 80, 96, 112, 128)
COUNTS_QUICK = (16, 32, 64, 96, 128)
THREADS_MAX = 1 << 14  # a core
SPARE_MAX = 12  # registers beside those asked for


def registers(meter: Meter, warp: int) -> list[Quantity]:
    """Threads that fit at once for each number of registers, and the one register file that explains them."""
    fit: dict[int, int] = {}  # registers: warps of a core
    for count in COUNTS_QUICK if meter.quick else COUNTS:
        try:
            fit[count] = _resident(meter, count, warp)
        except UnsupportedError:
            break
    if not fit:
        raise Refused("no kernel with a known number of registers runs")
    most = max(fit.values())
    if len(fit) > 1 and most == min(fit.values()):
        raise Refused(f"as many threads, {most * warp}, fit at once with {min(fit)} registers each as with {max(fit)}")
    if fit[min(fit)] < most:  # whatever a compiler spills, none has more room than those with the fewest registers
        seen = ", ".join(f"{n * warp} with {r}" for r, n in fit.items())
        raise Refused(f"more threads fit at once with more registers each: {seen}")
    out = [Quantity("resident threads", most * warp, "threads a core", None, "measured",
                    f"with {min(fit)} registers each; more run in a second wave")]
    limited = {r: n for r, n in fit.items() if n < most}
    while len(limited) >= 2:
        found = explain(limited, warp)
        if found:
            size, grain, spare = found
            seen = ", ".join(f"{n * warp} with {r}" for r, n in limited.items())
            return [*out, Quantity("register file", size, "bytes a core", None, "measured",
                                   f"threads that fit at once: {seen} registers" + (
                                       f", {spare} more in each" if spare else "") + (
                                       f"; given in multiples of {grain}" if grain > 1 else ""))]
        del limited[max(limited)]  # the compiler may have spilled the largest
    seen = ", ".join(f"{n * warp} with {r}" for r, n in fit.items())
    why = f"no register file explains how many threads fit at once: {seen} registers"
    return [*out, Quantity("register file", None, "bytes a core", None, "refused", why)]


def explain(limited: Mapping[int, int], warp: int) -> tuple[int, int, int] | None:
    """(bytes, grain, spare): a register file, given in multiples of `grain` registers a thread, `spare` of them beside
    those asked for, that holds just so many warps with so many registers. The fewest spare ones, then the smallest
    grain; None if there is none.
    """
    for spare in range(SPARE_MAX + 1):
        for grain in (1, 2, 4, 8, 16):
            for group in (1, 2, 4):  # warps that come and go together
                low, high = 0, 1 << 62
                for count, warps in limited.items():
                    each = math.ceil((count + spare) / grain) * grain * 4 * warp
                    low, high = max(low, warps * each), min(high, (warps + group) * each)
                if low < high and spare + group == 1:
                    return low, grain, spare  # counts of many sizes: one of them fills it without a rest
                if low < high:
                    rounds = [-(-low >> n) << n for n in range(30) if -(-low >> n) << n < high]
                    return rounds[-1], grain, spare
    return None


def _resident(meter: Meter, count: int, warp: int) -> int:
    """Warps of a core that run side by side."""
    for _attempt in (0, 1):  # the clock may have fallen in between
        low, why = _last_of_first_wave(meter, count, warp)
        if not why:
            return low
    if not meter.quick:
        low = _first_jump(meter, count, warp)
        if low:
            return low
    raise Refused(why)


def _ratio(meter: Meter, count: int, warp: int, warps: int) -> float:
    """Time of so many warps a core over that of one, asked one after the other: whatever clock it is, it is one."""
    cores = meter.limits.compute_units

    def seconds(n: int) -> float:
        threads = n * warp * cores
        return meter.seconds(lambda: meter.bench.hold(count, threads), "operations", "host").value * threads

    return seconds(warps) / seconds(1)


def _last_of_first_wave(meter: Meter, count: int, warp: int) -> tuple[int, str]:
    """(warps, what speaks against it), of threads that wait so long that the others do not delay them."""
    low, high = 1, 2
    while _ratio(meter, count, warp, high) < 1.5:
        low, high = high, 2 * high
        if high * warp > THREADS_MAX:
            return low, f"{low * warp} threads a core with {count} registers each take no longer than {warp}"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _ratio(meter, count, warp, middle) < 1.5 else (low, middle)
    first, second = (_ratio(meter, count, warp, n) for n in (low, low + 1))
    if first < 1.3 and 1.7 < second < 2.5:
        return low, ""
    return low, (f"time does not go in steps: with {count} registers each {warp} threads a core take 1, {low * warp} "
                 f"{first:.2f}, {(low + 1) * warp} {second:.2f}")


def _first_jump(meter: Meter, count: int, warp: int) -> int:
    """Warps before the first that makes time jump by half of what one takes alone, where each more one makes it grow a
    little; 0 if there is no such."""
    before = 1.0
    growth = 0.0
    for n in range(2, min(64, THREADS_MAX // warp) + 2):
        now = _ratio(meter, count, warp, n)
        if now - before > max(0.5, 3 * growth):
            return n - 1 if n > 2 else 0
        growth, before = max(growth, now - before), now
    return 0
