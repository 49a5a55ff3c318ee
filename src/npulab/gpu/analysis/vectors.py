"""Rates and latencies of operations by width of vectors, beside the fastest shape of `rates`.

A rate of a width is that of the quickest of a few shapes, of no more chains than registers take. A
latency is the time from a step on a whole vector to the next one that needs it, of one thread alone: wide vectors that
go through narrow units take several times a scalar's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from npulab.gpu.analysis import rates
from npulab.gpu.analysis.meter import Meter
from npulab.gpu.types import OPERATIONS_A_STEP, Element, Operation, Quantity, Timing

WIDTHS = (1, 2, 4, 8, 16)
CALLS = 2
CHAINS, MOST_CHAINS = 4, 12
"""Where an earlier run has found the fastest shape; beside it."""
Task = tuple[str, str, Callable[[], list[Quantity]]]


def name(operation: Operation, element: Element, what: str, width: int) -> str:
    return f"{operation} {element} {what}, vectors of {width}"


def tasks(meter: Meter) -> list[Task]:
    out: list[Task] = []
    for operation, element in rates.wanted(meter):
        for width in WIDTHS:
            out.append((name(operation, element, "rate", width), "operations/s",
                        partial(rate, meter, operation, element, width)))
        for width in WIDTHS[1:]:  # of one alone it is the latency
            out.append((name(operation, element, "latency", width), "s",
                        partial(latency, meter, operation, element, width)))
    return out


def rate(meter: Meter, operation: Operation, element: Element, width: int) -> list[Quantity]:
    """Of the quickest of a few shapes: narrow vectors need more chains or threads to fill the same units."""
    device = meter.limits.compute_units * meter.limits.group_max
    _, own, threads = meter.shapes.get((operation, element), (1, CHAINS, 4 * device))
    most = max(1, rates.chained_most(element) // width)
    shapes = [(c, t) for c in sorted({min(own, most), min(MOST_CHAINS, most)})
              for t in sorted({threads, 4 * device, 8 * device})]

    def ask(shape: tuple[int, int]) -> Callable[[], Timing]:
        return lambda: meter.bench.chain(operation, element, width, *shape)

    times = dict.fromkeys(shapes, math.inf)
    for _ in range(rates.ATTEMPTS):  # in turns: one that a neighbour slowed is not given up for that
        times = {shape: min(then, meter.seconds(ask(shape), "operations").value) for shape, then in times.items()}
    meter.counted.clear()  # nothing rests on what was only tried
    chains, threads = best = min(times, key=lambda shape: times[shape])
    took, more = rates.again(meter, ask(best), times[best], CALLS, rates.SHAPED)
    return [Quantity(name(operation, element, "rate", width), 1 / took.value, "operations/s",
                     (1 / took.high, 1 / took.low), "measured",
                     f"{threads} threads of {chains} chains of vectors of {width}, on the whole device{more}")]


def latency(meter: Meter, operation: Operation, element: Element, width: int) -> list[Quantity]:
    took = meter.seconds(lambda: meter.bench.chain(operation, element, width, 1, 1), "operations", "alone",
                         calls=CALLS, spread=rates.SHAPED)
    step = width * OPERATIONS_A_STEP[element]
    return [Quantity(name(operation, element, "latency", width), took.value * step, "s",
                     (took.low * step, took.high * step), "measured", f"one thread, one chain of vectors of {width}")]
