"""Whether the clock stayed what it was, by the references between all experiments."""

from __future__ import annotations

import numpy as np

from npulab.gpu.analysis.meter import Meter, Refused
from npulab.gpu.types import Quantity

FALLEN = 0.03


def drift(meter: Meter) -> Quantity:
    """The slowest pace of the cores' clock that was kept for a while, as a share of its first; 1: it stayed."""
    paces = np.array(meter.paces["core"])
    if "core" in meter.faults:
        raise Refused(f"the reference does not run: {meter.faults['core']}")
    if len(paces) < 8:
        raise Refused("too few references between experiments")
    kept = np.array([np.median(paces[i:i + 7]) for i in range(len(paces) - 6)])
    slowest, fastest = float(kept.max()), float(kept.min())
    if slowest < 1 + FALLEN and fastest > 1 - FALLEN:
        return Quantity("lowest clock", 1.0, "of the first", (1 / slowest, 1.0), "measured",
                        f"{len(paces)} references agree within {100 * (slowest - fastest):.2g} %")
    when = int(np.argmax(kept > 1 + FALLEN)) if slowest >= 1 + FALLEN else 0
    memory = meter.paces["memory"]
    beside = f"; memory {max(memory):.2f} times" if memory else ""
    what = "throttling: a" if slowest >= 1 + FALLEN else "the clock rose: a"
    return Quantity("lowest clock", 1 / slowest, "of the first", None, "measured",
                    f"{what} reference chain came to take {slowest:.2f} times as long, from experiment {when} of "
                    f"{len(paces)} on{beside}; times are given as at the first clock")
