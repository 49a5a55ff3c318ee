"""Bandwidths by width and stride, beside the fastest shape: of caches and memory, local and constant memory, images.

What is counted is what threads load or store. Neighbours `stride` loads apart leave what lies between them, in every
turn through the footprint, but none of its lines: of a level that comes behind another one, a stride that leaves out
whole lines would be of a smaller footprint, which the level before may hold, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from npulab.errors import NpulabError
from npulab.gpu.analysis import local, rates
from npulab.gpu.analysis.caches import Hierarchy
from npulab.gpu.analysis.meter import Meter, Refused, reason
from npulab.gpu.analysis.statistics import Estimate
from npulab.gpu.types import Order, Quantity, Way

SHAPES = (*((width, 1) for width in rates.WIDTHS), *((4, stride) for stride in rates.STRIDES))
"""Bytes a load and loads from a thread's to its neighbour's."""
COPIES = tuple((width, 1) for width in rates.WIDTHS)
LOCAL = (*((width, 1) for width in (8, 16)), *((4, stride) for stride in local.TABLE))
CONSTANTS = (8, 16)
"""Bytes a load beside 4."""
IMAGES: tuple[tuple[int, Order], ...] = ((4, "rows"), (8, "rows"), (16, "columns"), (16, "tiles"))
"""Bytes a texel and order of neighbours beside 16 and rows."""
ALWAYS, TURNS = 2, 4
"""That each shape of a level is asked for, and those that differ."""
Shape = tuple[int, int]
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
    out += [(name, "GB/s", lambda i=index, w=way: of_level(meter, one(), i, w, named))
            for name, index, way in of_levels(levels)]
    return out


def of_levels(levels: int) -> list[tuple[str, int, Way]]:
    """(name of the first shape, index of the level, way) of so many caches."""
    ways: tuple[Way, ...] = ("read", "write")
    return [(rates.name_of(index, way) + rates.shaped_as(way, *SHAPES[0]), index, way)
            for index in range(levels) for way in ways]


def of_level(meter: Meter, found: Hierarchy | None, index: int, way: Way, named: Named,
             shapes: Sequence[Shape] = SHAPES) -> list[Quantity]:
    """With a footprint at which the fastest shape has shown that the level answers; what one shape is refused for does
    not touch the others. All are asked for in turns, and those that differ from turn to turn again: of these the
    quickest counts, as others may take from a device for a while, and nothing adds to it."""
    name = rates.name_of(index, way)
    best = named(name)
    times: dict[Shape, list[Estimate]] = {shape: [] for shape in shapes}
    refused: dict[Shape, str] = {}
    if best is None or best.value is None:
        refused = dict.fromkeys(shapes, f"needs the {name}, which was refused")
    elif found is None:
        refused = dict.fromkeys(shapes, "needs the caches, whose levels were not found again")
    else:
        footprint, own = meter.plateaus.get((index, way)) or rates.plateau(meter, found, index, way)
        for turn in range(TURNS):
            for width, stride in shapes:
                shape = width, stride
                if shape in refused or (turn >= ALWAYS and rates.apart(times[shape]) <= rates.EVEN):
                    continue
                try:
                    if index and width * stride > (line := found.levels[index - 1].line):
                        raise Refused(f"loads {width * stride} bytes apart leave out lines of {line} bytes: what is "
                                      f"left of a footprint that misses L{index} may be there")
                    times[shape].append(meter.seconds(
                        lambda w=width, s=stride: meter.extra.stream_parts(footprint, w, way, 1, True, s) if own else
                        meter.bench.stream(footprint, s, w, way), "bytes"))
                except (Refused, NpulabError) as e:
                    refused[shape] = reason(e)
    out = []
    for shape in shapes:
        called = name + rates.shaped_as(way, *shape)
        if shape in refused:
            out.append(Quantity(called, None, "GB/s", None, "refused", refused[shape]))
            continue
        even = rates.apart(times[shape]) <= rates.EVEN
        took = min(times[shape], key=lambda t: t.spread if even else t.value)
        why = f"{way}, {shape[0]} bytes a {rates.UNIT[way]}, {footprint} bytes again and again, as {name}"
        why += f", neighbours {shape[0] * shape[1]} bytes apart" if shape[1] > 1 else ""
        why += ", each thread in memory of its own" if own else ""
        out.append(rates.per_second(called, took, why))
    return out
