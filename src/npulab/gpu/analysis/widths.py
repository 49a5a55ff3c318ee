"""Bandwidths by width and stride, beside the fastest shape: of caches and memory, local and constant memory, images.

What is counted is what threads load or store. Neighbours `stride` loads apart leave what lies between them, in every
turn through the footprint, but none of its lines: of a level that comes behind another one, a stride that leaves out
whole lines would be of a smaller footprint, which the level before may hold, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable

from npulab.gpu.analysis import local, rates
from npulab.gpu.analysis.caches import Hierarchy
from npulab.gpu.analysis.meter import Meter, Refused
from npulab.gpu.types import Order, Quantity, Way

SHAPES = (*((width, 1) for width in rates.WIDTHS), *((4, stride) for stride in rates.STRIDES))
"""Bytes a load and loads from a thread's to its neighbour's."""
COPIES = tuple((width, 1) for width in rates.WIDTHS)
LOCAL = (*((width, 1) for width in (8, 16)), *((4, stride) for stride in local.TABLE))
CONSTANTS = (8, 16)
"""Bytes a load beside 4."""
IMAGES: tuple[tuple[int, Order], ...] = ((4, "rows"), (8, "rows"), (16, "columns"), (16, "tiles"))
"""Bytes a texel and order of neighbours beside 16 and rows."""
CALLS, SPREAD = 2, 0.01
Task = tuple[str, str, Callable[[], list[Quantity]]]
Named = Callable[[str], Quantity | None]


def tasks(meter: Meter, hierarchy: list[Hierarchy], levels: int, named: Named) -> list[Task]:
    """Of so many caches. named: what was found of a name."""
    def one() -> Hierarchy | None:
        return hierarchy[0] if hierarchy else None

    ways: tuple[Way, ...] = ("read", "write")
    out: list[Task] = []
    for way, shapes in (("write", SHAPES), ("copy", COPIES)):
        out += [(rates.memory_name(way, *shape), "GB/s",  # type: ignore[arg-type]
                 lambda w=way, s=shape: [rates.memory_bandwidth(meter, one(), w, *s)]) for shape in shapes]
    for way in ways:
        out += [(local.name(way, *shape), "GB/s", lambda w=way, s=shape: [local.bandwidth(meter, w, *s)])
                for shape in LOCAL]
    out += [(f"constant bandwidth, {w} bytes a load", "GB/s", lambda w=w: [rates.constant_bandwidth(meter, False, w)])
            for w in CONSTANTS]
    out += [(rates.image_name(*shape), "GB/s", lambda s=shape: [rates.image_bandwidth(meter, one(), *s)])
            for shape in IMAGES]
    for index in range(levels):
        for way in ways:
            out += [(rates.name_of(index, way) + rates.shaped_as(way, *shape), "GB/s",
                     lambda i=index, w=way, s=shape: [_of_level(meter, one(), i, w, *s, named)]) for shape in SHAPES]
    return out


def _of_level(meter: Meter, found: Hierarchy | None, index: int, way: Way, width: int, stride: int, named: Named
              ) -> Quantity:
    """With a footprint at which the fastest shape has shown that the level answers."""
    name = rates.name_of(index, way)
    best = named(name)
    if found is None or best is None or best.value is None:
        raise Refused(f"needs the {name}, which was refused")
    footprint, own = meter.plateaus.get((index, way)) or rates.plateau(meter, found, index, way)
    before = found.levels[index - 1] if index else None
    if before and stride * width > before.line:
        raise Refused(f"loads {stride * width} bytes apart leave out lines of {before.line} bytes: what is left of a "
                      f"footprint that misses L{index} may be there")
    took = meter.seconds(lambda: meter.extra.stream_parts(footprint, width, way, 1, True, stride) if own else
                         meter.bench.stream(footprint, stride, width, way), "bytes", "core", CALLS, SPREAD)
    why = f"{way}, {width} bytes a {rates.UNIT[way]}, {footprint} bytes again and again, as {name}"
    why += f", neighbours {stride * width} bytes apart" if stride > 1 else ""
    return rates.per_second(name + rates.shaped_as(way, width, stride), took,
                            why + (", each thread in memory of its own" if own else ""))
