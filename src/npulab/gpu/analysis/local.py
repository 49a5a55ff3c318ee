"""Local memory: banks by the strides that make threads meet at one, and what goes through without conflicts."""

from __future__ import annotations

from functools import partial

from npulab.gpu.analysis.meter import Meter, Refused
from npulab.gpu.analysis.rates import PRECISE, SHAPED, shaped_as
from npulab.gpu.types import Quantity, Way

STRIDES = tuple(1 << i for i in range(9))
TABLE = (2, 4, 8, 16, 32)


def name(way: Way, width: int = 4, stride: int = 1) -> str:
    """Of words side by side, or in another width or stride."""
    found = "local memory bandwidth" if way == "read" else f"local memory {way} bandwidth"
    return found + (shaped_as(way, width) if width != 4 else "") + (f", stride {stride}" if stride != 1 else "")


def bandwidth(meter: Meter, way: Way = "read", width: int = 4, stride: int = 1) -> Quantity:
    """work is counted in words, whatever a load has."""
    took = meter.seconds(lambda: meter.bench.local(stride, width) if way == "read" else
                         meter.extra.local_write(stride, width), "loads" if way == "read" else "stores", calls=2,
                         spread=PRECISE if (width, stride) == (4, 1) else SHAPED)
    each = "words" if width == 4 else f"{width} bytes"
    return Quantity(name(way, width, stride), 4 / took.value / 1e9, "GB/s",
                    (4 / took.high / 1e9, 4 / took.low / 1e9), "measured",
                    f"{each} side by side, in all the groups that the experiment starts" if stride == 1 else
                    f"neighbours {stride} words apart")


def banks(meter: Meter) -> Quantity:
    """The stride from which on conflicts do not get worse; one word more than it must have none."""
    times = [meter.seconds(partial(meter.bench.local, s), "loads", calls=2, divided=True).value for s in STRIDES]
    one, most = times[0], max(times)
    seen = ", ".join(f"{s}: {t / one:.2f}" for s, t in zip(STRIDES, times, strict=True))
    if most < 1.5 * one:
        raise Refused(f"no conflicts: time at strides of words {seen}")
    at = next(i for i, t in enumerate(times) if t > 0.85 * most)
    if min(times[at:]) < 0.85 * most:
        raise Refused(f"time is not worst from one stride on: {seen}")
    if at == len(STRIDES) - 1:
        raise Refused(f"conflicts still get worse at the largest stride: {seen}")
    count = STRIDES[at]
    odd = meter.seconds(lambda: meter.bench.local(count + 1), "loads", calls=2, divided=True).value
    if odd > 1.15 * one:
        raise Refused(f"a stride of {count + 1} words takes {odd / one:.2f} times as long as 1; no banks explain that")
    return Quantity("local memory banks", count, "words", None, "measured",
                    f"a stride of {count} words takes {most / one:.3g} times as long as 1, {count + 1} as long")
