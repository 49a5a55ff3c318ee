"""Warp width: threads in two ways cost a warp both, threads of a warp that goes one way cost it one."""

from __future__ import annotations

from functools import partial

from npulab.gpu.analysis.meter import Meter, Refused
from npulab.gpu.analysis.statistics import jump
from npulab.gpu.types import Quantity

STAYS = 1.3  # times as long that turns within a warp take once more: else something else had the device meanwhile


def warp_width(meter: Meter) -> Quantity:
    """Turns every 1, 2, 4, ... threads: the first that is not slow is the width."""
    periods = [1 << i for i in range(12) if 1 << i < meter.limits.group_max]
    if len(periods) < 3:
        raise Refused(f"groups of {meter.limits.group_max} threads are too small to see a warp in")

    def took(period: int) -> float:
        return meter.seconds(partial(meter.bench.diverge, period), "operations", calls=2, divided=True).value

    times = [took(p) for p in periods]
    at = jump(times[::-1])
    if at is None:
        raise Refused("no step: turns every " + ", ".join(
            f"{p} threads take {t / min(times):.2f}" for p, t in zip(periods, times, strict=True)) + " of the shortest")
    width = periods[len(periods) - at]
    slow = times[len(periods) - at - 1] / times[len(periods) - at]
    if slow > 3:
        raise Refused(f"two ways take {slow:.1f} times as long as one, where 2 was to be expected")
    again = took(width // 2) / took(width)
    if again < STAYS:
        raise Refused(f"the step does not stay: turns every {width // 2} threads took {slow:.2f} times as long as "
                      f"every {width}, and {again:.2f} times asked once more")
    return Quantity("warp width", width, "threads", None, "measured",
                    f"two ways cost {slow:.2f} times as much if they turn every {width // 2} threads, "
                    f"nothing from {width} on"
                    + (f"; the device states subgroups of {stated}" if (stated := meter.limits.subgroup) else ""))
