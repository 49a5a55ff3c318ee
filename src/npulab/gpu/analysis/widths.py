"""Bandwidths by width and stride, beside the fastest shape: of caches and memory, local and constant memory, images.

What is counted is what threads load or store. Neighbours `stride` loads apart leave what lies between them, in every
turn through the footprint, but none of its lines: of a level that comes behind another one, a stride that leaves out
whole lines would be of a smaller footprint, which the level before may hold, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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
CALLS = 2
"""Of the first turn, which counts where the next says the same."""
WAYS: tuple[Way, ...] = ("read", "write")
Shape = tuple[int, int]
Task = tuple[str, str, Callable[[], list[Quantity]]]
Named = Callable[[str], Quantity | None]
Found = Callable[[], Hierarchy | None]


def tasks(meter: Meter, hierarchy: list[Hierarchy], levels: int, named: Named) -> list[Task]:
    """Of so many caches. named: what was found of a name."""
    def one() -> Hierarchy | None:
        return hierarchy[0] if hierarchy else None

    def added(name: str, conclude: Callable[[], Quantity]) -> None:
        out.append((name, "GB/s", lambda: [conclude()]))

    out: list[Task] = []
    of_memory: tuple[tuple[Way, tuple[Shape, ...]], ...] = (("write", SHAPES), ("copy", COPIES))
    for way, shapes in of_memory:
        for shape in shapes:
            added(rates.memory_name(way, *shape), partial(_of_memory, meter, one, way, *shape))
    for way in WAYS:
        for shape in LOCAL:
            added(local.name(way, *shape), partial(local.bandwidth, meter, way, *shape))
    for width in CONSTANTS:
        added(rates.constant_name(width), partial(rates.constant_bandwidth, meter, False, width))
    for texel, order in IMAGES:
        added(rates.image_name(texel, order), partial(_of_images, meter, one, texel, order))
    for name, index, way in of_levels(levels):
        out.append((name, "GB/s", partial(_of_level, meter, one, index, way, named)))
    return out


def _of_memory(meter: Meter, found: Found, way: Way, width: int, stride: int) -> Quantity:
    return rates.memory_bandwidth(meter, found(), way, width, stride)


def _of_images(meter: Meter, found: Found, texel: int, order: Order) -> Quantity:
    return rates.image_bandwidth(meter, found(), texel, order)


def _of_level(meter: Meter, found: Found, index: int, way: Way, named: Named) -> list[Quantity]:
    return of_level(meter, found(), index, way, named)


def of_levels(levels: int) -> list[tuple[str, int, Way]]:
    """(name of the first shape, index of the level, way) of so many caches."""
    return [(rates.name_of(index, way) + rates.shaped_as(way, *SHAPES[0]), index, way)
            for index in range(levels) for way in WAYS]


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
                    ask = partial(meter.extra.stream_parts, footprint, width, way, 1, True, stride) if own else \
                        partial(meter.bench.stream, footprint, stride, width, way)
                    times[shape].append(meter.seconds(ask, "bytes", calls=1 if turn else CALLS,
                                                      spread=0.0 if turn else rates.SHAPED))
                except (Refused, NpulabError) as e:
                    refused[shape] = reason(e)
    out = []
    for shape in shapes:
        called = name + rates.shaped_as(way, *shape)
        if shape in refused:
            out.append(Quantity(called, None, "GB/s", None, "refused", refused[shape]))
            continue
        even = rates.apart(times[shape]) <= rates.EVEN
        took = times[shape][0] if even else min(times[shape], key=lambda t: t.value)
        why = f"{way}, {shape[0]} bytes a {rates.UNIT[way]}, {footprint} bytes again and again, as {name}"
        why += f", neighbours {shape[0] * shape[1]} bytes apart" if shape[1] > 1 else ""
        why += ", each thread in memory of its own" if own else ""
        out.append(rates.per_second(called, took, why))
    return out
