"""Rates and latencies of operations, bandwidths of the levels, costs of launches, barriers and transfers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import get_args

import numpy as np

from npulab.errors import CapacityError, UnsupportedError
from npulab.gpu import bounds
from npulab.gpu.analysis.caches import Hierarchy
from npulab.gpu.analysis.meter import STILL, Meter, Refused
from npulab.gpu.analysis.statistics import Estimate
from npulab.gpu.types import OPERATIONS_A_STEP, Element, Operation, Order, Quantity, Timing, Way

ELEMENTS: tuple[Element, ...] = get_args(Element)
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
SMALLEST_MEMORY = 1 << 24  # bytes: a device whose buffers are smaller is asked no more
UNIT: dict[Way, str] = {"read": "load", "write": "store", "copy": "load"}
ORDERS: dict[Order, str] = {"rows": "rows", "columns": "columns", "tiles": "tiles of 4x4"}
WIDTHS, STRIDES = (4, 8), (2, 4, 8, 16)
"""Bytes a load beside 16; words of 4 bytes from a thread's to its neighbour's."""
SHAPES = ((32, 1), (64, 1), (64, 8))
"""Bytes a load and parts of the memory that each thread goes through at once, tried beside 16 bytes: a processor's core
reaches its caches' bandwidth with its widest loads, and memory's with several ways through it (of ways side by side, 1
reached 0.73, 4 0.90, 8 and 16 1.0 times clpeak's bandwidth of a server processor)."""
ATTEMPTS = 2  # more at a comparison that something disturbed
PRECISE = 0.005  # half of an interval, relative
SHAPED = 0.02  # the same of what is measured beside the fastest shape: there are many
AGAIN = 5  # at most that footprints of one level, or of memory, are asked again
EVEN, EVEN_GRADUAL, EVEN_MEMORY = 0.04, 0.1, 0.05
"""How far apart they may be; of a level that is shared, and of memory, the interval says how far they are."""
BETWEEN = (0.35, 0.45, 0.55)
"""Of the way, in octaves, from a level to the one after it: the middle is neither one's cliff, however gradual."""
UNEVEN = 0.1  # of a transfer: how far from one of four times its size it may be
COPIED, COPIED_AT_MOST, BRIEF = 1 << 26, 1 << 29, 0.01
"""Bytes of a transfer; of one where the former take less than so many seconds: what is larger may be copied otherwise
(glibc's memcpy stores past the caches from `glibc.cpu.x86_non_temporal_threshold` on, 288 MiB on one server: there 256
MiB went at 17.5 and 512 at 19.6 GB/s, and both at 20 with a threshold of 4 MiB)."""
SLOWER = 1.1
"""Times as long as before: more than the best of many shapes is flattered by. Something else has the device: who shares
a core takes half of its units, which the references do not see, as their few chains leave as many idle."""
IN_TURNS = 3
CHAINED_MOST = 192
"""Chains times elements of a vector of a thread: more do not stay in the registers of most devices. 12 chains of 16
reached 1.05 times what 8 did on a processor of two units of 16 multiply-adds, 4 cycles each, which 8 just fill. Of
integers, with two numbers a chain of sums or products, 12 chains of 16 still stay there, in 24 of 32 registers."""


PACKED_MOST = 32
"""The same of elements that are words of four bytes: a vector register for each, of which AVX-512 has 32."""


def wanted(meter: Meter) -> list[tuple[Operation, Element]]:
    """Quick: multiply-adds, and what is special in float32."""
    return [(o, e) for e in ELEMENTS if e in meter.limits.elements for o in OPERATIONS
            if o == "fma" or (OPERATIONS_A_STEP[e] == 1 and not (e == "int32" and o == "special") and not meter.quick)
            or (o, e) == ("special", "float32")]


def rate(meter: Meter, operation: Operation, element: Element) -> Quantity:
    """The fastest shape: vectors, threads and chains one after the other, the best of each kept. Where a thread has a
    core's vector unit for itself (a CPU) it takes vectors of 16 and eight chains to fill it; a GPU fills its own."""
    _one_chain(meter, operation, element)
    shape = {"width": 1, "chains": 4, "threads": 4 * meter.limits.compute_units * meter.limits.group_max}
    most = chained_most(element)
    tried = {"width": (2, 4, 8, 16), "threads": (2 * shape["threads"], shape["threads"] // 4),
             "chains": (8, 12, 16, 2, 1)}

    def ask(shape: dict[str, int]) -> Callable[[], Timing]:
        return lambda: meter.bench.chain(operation, element, shape["width"], shape["chains"], shape["threads"])

    best = math.inf
    for what, values in tried.items():
        quickest: dict[int, float] = {}
        for _ in range(ATTEMPTS):  # in turns: one that a neighbour slowed is not given up for that
            for value in (shape[what], *values):
                other = {**shape, what: value}
                if other["chains"] * other["width"] > most:
                    continue
                try:
                    now = meter.seconds(ask(other), "operations").value
                except UnsupportedError:
                    continue
                quickest[value] = min(now, quickest.get(value, math.inf))
        for value, now in quickest.items():
            if now < 0.99 * best:
                best, shape = now, {**shape, what: value}
    meter.shapes[operation, element] = shape["width"], shape["chains"], shape["threads"]
    meter.counted.clear()  # nothing rests on what was only tried
    why = f"{shape['threads']} threads of {shape['chains']} chains of vectors of {shape['width']}, on the whole device"
    took, more = again(meter, ask(shape), best, 3, 0.005)
    why += more
    return Quantity(f"{operation} {element} rate", 1 / took.value, "operations/s", (1 / took.high, 1 / took.low),
                    "measured", why)


def again(meter: Meter, ask: Callable[[], Timing], best: float, calls: int, spread: float) -> tuple[Estimate, str]:
    """What the quickest of several shapes takes, asked anew, for the best of many is flattered; and what is to be said
    of it."""
    for _ in range(1 + ATTEMPTS):
        took = meter.seconds(ask, "operations", calls=calls, spread=spread)
        if took.value < SLOWER * best:
            return took, ""
    return Estimate(best, best, took.high), \
        f"; {1 / took.value:.4g} when asked again: something else has the device"


def chained_most(element: Element) -> int:
    return CHAINED_MOST if OPERATIONS_A_STEP[element] == 1 else PACKED_MOST


def latency(meter: Meter, operation: Operation, element: Element) -> Quantity:
    took, lanes = _one_chain(meter, operation, element, 0.005), OPERATIONS_A_STEP[element]
    return Quantity(f"{operation} {element} latency", took.value * lanes, "s", (took.low * lanes, took.high * lanes),
                    "measured", "one thread, one chain")


def _one_chain(meter: Meter, operation: Operation, element: Element, spread: float = 0.0) -> Estimate:
    """Seconds of a dependent operation. Raises: Refused if no clock is that fast: the compiler put steps together."""
    took = meter.seconds(lambda: meter.bench.chain(operation, element, 1, 1, 1), "operations", "alone",
                         spread=spread)
    clock, step = meter.limits.clock_hz, took.value * OPERATIONS_A_STEP[element]
    if clock and step < 1 / bounds.steps_most(f"{operation} {element}", clock):
        raise Refused(f"a step of a chain takes {1e9 * step:.3g} ns, {step * clock:.2g} cycles of the stated "
                      f"{1e-9 * clock:.3g} GHz: steps were put together, or not done")
    return took


def against_multiply(meter: Meter, fma: Quantity | None, mul: Quantity | None) -> Quantity:
    """How many multiply-adds go through in the time of a multiplication: 1 where they are one instruction."""
    if fma is None or mul is None or not fma.value or not mul.value or not fma.interval or not mul.interval:
        raise Refused("needs the rates of both, one of which was refused")
    ratio, together = fma.value / mul.value, _in_turns(meter)
    if together and not 1 / SLOWER < together / ratio < SLOWER:
        raise Refused(f"their rates one after the other are {ratio:.2f} times each other, in turns {together:.2f}: "
                      "something else had the device at one of them")
    half = ratio * math.hypot(*((q.interval[1] - q.interval[0]) / 2 / q.value  # type: ignore[index, operator]
                                for q in (fma, mul)))
    return Quantity("fma against mul float32", ratio, "times", (ratio - half, ratio + half), "measured",
                    "their rates; a fused multiply-add is one operation")


def _in_turns(meter: Meter) -> float | None:
    """How many multiply-adds go through in the time of a multiplication, asked in turns; None where an earlier run has
    found their fastest shapes."""
    fma, mul = (meter.shapes.get((operation, "float32")) for operation in ("fma", "mul"))
    if fma is None or mul is None:
        return None

    def took(operation: Operation, shape: tuple[int, int, int]) -> float:
        return meter.seconds(lambda: meter.bench.chain(operation, "float32", *shape), "operations").value

    return float(np.median([took("mul", mul) / took("fma", fma) for _ in range(IN_TURNS)]))


def name_of(index: int, way: Way) -> str:
    """The bandwidth's of level `index`, 0 the first."""
    return f"L{index + 1} bandwidth" if way == "read" else f"L{index + 1} {way} bandwidth"


def level_bandwidth(meter: Meter, found: Hierarchy, index: int, way: Way = "read") -> Quantity:
    """Of level `index` of the hierarchy: footprints that it holds and the one before does not must agree."""
    gradual = found.levels[index].cliff.shape == "gradual"
    footprints, asked, own = _footprints(meter, found, index, way)
    shape = _shape(meter, asked[0], way, own=own)
    if not shape[1]:  # a bench that has no such streams
        asked = footprints
    even = EVEN_GRADUAL if index and gradual else EVEN
    times = _agreed([lambda spread, f=f: _shaped(meter, f, shape, way, own=own, spread=spread)  # type: ignore[misc]
                     for f in asked], EVEN, _at_least)
    if index and apart(times) > even:
        rates = ", ".join(f"{1e-9 / t.value:.4g}" for t in times)
        raise Refused(f"no plateau: footprints of {', '.join(map(str, footprints))} bytes reach {rates} GB/s")
    took = min(times, key=lambda t: t.spread)
    at = max(i for i, t in enumerate(times) if t is took)  # `_at_least` gives smaller ones what the last of them took
    why = f"{way}, {_spoken(shape)}, {footprints[at]} bytes again and again"
    meter.plateaus[index, way] = asked[at], own and shape[1] > 0
    if own and shape[1]:
        why += f", each thread {asked[at]} of its own"
    if index and gradual:
        took = replace(took, low=min(t.low for t in times), high=max(t.high for t in times))
    return per_second(name_of(index, way), took, why)


def _footprints(meter: Meter, found: Hierarchy, index: int, way: Way) -> tuple[list[int], list[int], bool]:
    """(that a level holds and the one before does not, what each thread goes through of them, whether of its own)."""
    size = found.levels[index].size
    inner = found.levels[index - 1].size if index else 0
    shares = (0.65, 0.75, 0.85) if index else (0.5, 0.7)
    if index and found.levels[index].cliff.shape == "gradual":  # of which others may have much
        shares = tuple((inner / size) ** (1 - s) for s in BETWEEN)
    footprints = [max(1024, int(size * s) // 1024 * 1024) for s in shares]
    if index and footprints[0] < 1.5 * inner:
        raise Refused(f"no footprint misses L{index} and fits in L{index + 1}: {inner} and {size} bytes")
    own, asked = way == "write", footprints
    if own and index and index + 1 == len(found.levels):  # the last is shared, as a rule; those before are cores' own
        asked = [f // meter.limits.compute_units for f in footprints]
        own = asked[0] >= 1.5 * inner
        asked = asked if own else footprints
    return footprints, asked, own


def plateau(meter: Meter, found: Hierarchy, index: int, way: Way) -> tuple[int, bool]:
    """What each thread goes through of a level whose bandwidth an earlier run has found, and whether of its own."""
    footprints, asked, own = _footprints(meter, found, index, way)
    own = own and _shape(meter, asked[0], way, own=own)[1] > 0
    return (asked if own else footprints)[len(footprints) // 2], own


def shaped_as(way: Way, width: int, stride: int = 1) -> str:
    """Behind the name of what is measured in another shape than the fastest."""
    return f", {width} bytes a {UNIT[way]}" + (f", stride {stride}" if stride != 1 else "")


def memory_name(way: Way, width: int = 16, stride: int = 1) -> str:
    name = {"read": "memory bandwidth", "write": "memory write bandwidth", "copy": "memory copy bandwidth"}[way]
    return name + (shaped_as(way, width, stride) if (width, stride) != (16, 1) else "")


def image_name(texel: int = 16, order: Order = "rows") -> str:
    return "image bandwidth" + (f", {texel} bytes a texel" if texel != 16 else "") + (
        f", {ORDERS[order]}" if order != "rows" else "")


def constant_name(width: int = 4) -> str:
    return "constant bandwidth" + (shaped_as("read", width) if width != 4 else "")


def memory_bandwidth(meter: Meter, found: Hierarchy | None, way: Way, width: int = 16, stride: int = 1) -> Quantity:
    """By all threads, `width` bytes a load, neighbours `stride` loads apart. A device that has no buffers of the size
    that it states is asked for half of it, and so on."""
    name = memory_name(way, width, stride)
    largest = min(meter.limits.buffer_max // (2 if way == "copy" else 1), 1 << (29 if meter.quick else 30))
    while True:
        try:
            return _memory_bandwidth(meter, found, way, width, stride, name, largest)
        except CapacityError:
            if largest < SMALLEST_MEMORY:
                raise
            largest //= 2


def _memory_bandwidth(meter: Meter, found: Hierarchy | None, way: Way, width: int, stride: int, name: str,
                      largest: int) -> Quantity:
    known = found is not None and not found.fault
    need = min(largest, 1 << (27 if meter.quick else 28))
    if found and known:  # of the lines that a wide stride leaves out the caches keep nothing
        need = 4 * found.levels[-1].size * max(1, stride * width // found.levels[-1].line)
    if need > largest:
        raise Refused(f"buffers of at most {largest} bytes are not large enough to miss the caches")
    footprint = min(largest, max(int(2.6 * need), 1 << 26)) if known else need
    fastest = (width, stride) == (16, 1)
    while True:
        shape = _shape(meter, footprint, way, True) if fastest else (width, 0)
        ask = [lambda spread, size=size, shape=shape: _shaped(
            meter, size, shape, way, True, stride, spread=spread if fastest or not spread else SHAPED)
               for size in (footprint, footprint // 2)]
        if known and footprint // 2 <= 1.25 * need:
            took, more = ask[0](PRECISE), ""
            break
        took, half = _agreed(ask, EVEN_MEMORY)
        more = f"; half as many reach {1e-9 / half.value:.4g}"
        slower = half.value > took.value
        if apart([took, half]) <= EVEN_MEMORY:
            took = replace(took, low=min(took.low, half.low), high=max(took.high, half.high))
            break
        if known or slower or 2 * footprint > largest:
            raise Refused(f"{'it does not stay' if slower else 'caches help'}: {footprint // 2} bytes reach "
                          f"{1e-9 / half.value:.4g} GB/s, twice as many {1e-9 / took.value:.4g}")
        footprint *= 2  # caches whose sizes are not known
    why = f"{way}, {_spoken(shape)}, through {footprint} bytes again and again"
    why += (f", neighbours {stride * width} bytes apart" if stride > 1 else "") + more
    if width != 16 and abs(meter.pace("core") / meter.pace("memory") - 1) > STILL:
        took = _either(meter, found, footprint, width, stride, took, way)
    return per_second(name, took, why)


def _either(meter: Meter, found: Hierarchy | None, footprint: int, width: int, stride: int, took: Estimate,
            way: Way = "read") -> Estimate:
    """Narrow loads are bound by the cores or by memory, whose clocks differ by now. By memory, if they reach what wide
    loads do, less what they leave of their lines; else by the cores, and by memory at most."""
    wide = _shaped(meter, footprint, (16, 0), way, True).value
    line = found.levels[-1].line if found and found.levels else 64
    least = wide * max(1.0, min(stride, line / width))
    if took.value < 1.02 * least:
        return took
    clocks = meter.pace("core") / meter.pace("memory")
    most = took.value * max(clocks, 1 / clocks) * (1 + EVEN_GRADUAL)  # the same, but for what the clocks make of it
    for _ in range(1 + ATTEMPTS):
        cores = meter.seconds(lambda: meter.bench.stream(footprint, stride, width, way), "bytes", "core", 2, 0.005)
        if cores.value <= most:
            break
    else:
        raise Refused(f"it does not stay: {1e-9 / took.value:.4g} GB/s, and {1e-9 / cores.value:.4g} a little later")
    if cores.value > least:
        return cores
    meter.seen.setdefault("bytes", []).append(1 / least)  # timed with wide loads
    return Estimate(least, least * (1 - cores.spread), least * (1 + cores.spread))


def image_bandwidth(meter: Meter, found: Hierarchy | None, texel: int = 16, order: Order = "rows") -> Quantity:
    """Of an image that half of the first cache holds."""
    footprint = max(1024, found.levels[0].size // 2 if found else 1 << 13)
    spread = PRECISE if (texel, order) == (16, "rows") else SHAPED
    took = meter.seconds(lambda: meter.extra.image(footprint, texel, order), "bytes", "core", 2, spread)
    why = f"texels of {texel} bytes, {footprint} bytes again and again"
    return per_second(image_name(texel, order), took, why + (f", neighbours in {ORDERS[order]}" * (order != "rows")))


def constant_bandwidth(meter: Meter, spread: bool, width: int = 4) -> Quantity:
    precise = PRECISE if width == 4 else SHAPED
    took = meter.seconds(lambda: meter.extra.constant(spread, width), "bytes", "core", 2, precise)
    each = "words" if width == 4 else f"{width} bytes a load"
    if spread:
        return per_second("constant bandwidth, spread", took, f"{each}, each thread of a group another one")
    return per_second(constant_name(width), took, f"{each}, all threads of a group the same one")


def mapped(meter: Meter) -> Quantity:
    """Of a buffer of 1 MiB; a copy behind it shows in a larger one."""
    size = min(1 << 20, meter.limits.buffer_max)

    def took(size: int) -> Estimate:
        return meter.seconds(lambda: meter.extra.map(size), kind="host", calls=3, spread=0.01)

    small, large = took(size), took(min(16 * size, meter.limits.buffer_max // 4 * 4))
    grows = large.value > 2 * small.value
    return Quantity("map cost", small.value, "s", (small.low, small.high), "measured",
                    f"mapped, one word changed, unmapped: {size} bytes; "
                    + (f"bytes are copied, 16 times as many take {large.value:.3g} s" if grows else
                       "16 times as many take no longer in proportion: nothing is copied"))


def _shape(meter: Meter, footprint: int, way: Way, memory: bool = False, own: bool = False) -> tuple[int, int]:
    """The fastest of 16 bytes a load and SHAPES, as far as the bench has them: (bytes a load, parts; 0: of one piece).
    """
    quickest: dict[tuple[int, int], float] = {}
    for _ in range(ATTEMPTS):  # in turns: one that a neighbour slowed is not given up for that
        for shape in (*SHAPES, *([] if own else [(16, 0)])):
            try:
                now = _shaped(meter, footprint, shape, way, memory, own=own, spread=0.0).value
            except UnsupportedError:  # nothing to choose from, nothing asked
                return 16, 0
            quickest[shape] = min(now, quickest.get(shape, math.inf))
    best = SHAPES[0]
    for shape, seconds in quickest.items():
        if seconds < 0.98 * quickest[best]:
            best = shape
    meter.counted.clear()  # nothing rests on what was only tried
    return best


def _agreed(asks: Sequence[Callable[[float], Estimate]], even: float,
            seen: Callable[[list[Estimate]], list[Estimate]] = lambda times: times) -> list[Estimate]:
    """What each takes, asked for with a spread, as `seen` has it; all are asked again, once each, where they are
    further than `even` apart, and the quickest answers taken: others may take from a device for a while, and nothing
    adds to it."""
    times = [ask(PRECISE) for ask in asks]
    for _ in range(AGAIN):
        if apart(seen(times)) <= even:
            break
        times = [min(t, ask(0.0), key=_value) for t, ask in zip(times, asks, strict=True)]
    return seen(times)


def _at_least(times: list[Estimate]) -> list[Estimate]:
    """Of footprints from small to large: what a level reaches with a larger one it reaches with a smaller one, too,
    whose pages lay badly, or whom something disturbed."""
    return list(accumulate(reversed(times), lambda *t: min(t, key=_value)))[::-1]


def _value(of: Estimate) -> float:
    return of.value


def apart(times: Sequence[Estimate]) -> float:
    """Of the least, how much more the most is."""
    values = [t.value for t in times]
    return max(values) / min(values) - 1


def _shaped(meter: Meter, footprint: int, shape: tuple[int, int], way: Way, memory: bool = False, stride: int = 1,
            own: bool = False, spread: float = PRECISE) -> Estimate:
    width, parts = shape
    return meter.seconds(lambda: meter.extra.stream_parts(footprint, width, way, parts, own) if parts else
                         meter.bench.stream(footprint, stride, width, way), "bytes", "memory" if memory else "core",
                         2 if spread else 1, spread)


def _spoken(shape: tuple[int, int]) -> str:
    return f"{shape[0]} bytes a load" + (f" in {shape[1]} parts at once" if shape[1] > 1 else "")


def per_second(name: str, took: Estimate, why: str) -> Quantity:
    return Quantity(name, 1e-9 / took.value, "GB/s", (1e-9 / took.high, 1e-9 / took.low), "measured", why)


def launch(meter: Meter) -> Quantity:
    took = meter.seconds(meter.bench.launch, kind="host", calls=3, spread=0.01)
    return Quantity("launch cost", took.value, "s", (took.low, took.high), "measured", "a kernel that does nothing")


def barrier(meter: Meter) -> Quantity:
    took = meter.seconds(meter.bench.barrier, "barriers", calls=2, spread=0.01)
    return Quantity("barrier cost", took.value, "s", (took.low, took.high), "measured",
                    "a full group; each thread stores a word at each and loads another thread's")


def transfers(meter: Meter, to_device: bool) -> list[Quantity]:
    """Bandwidth by what a large one takes longer than one of a quarter, cost by what a small one takes beside it. Where
    a quarter does not take a quarter (past caches, say), by what the large one takes longer than the small one."""
    name = "transfer to device" if to_device else "transfer from device"
    large = min(COPIED, meter.limits.buffer_max // 16 * 4)
    small = 4096

    def took(size: int) -> Estimate:
        return meter.seconds(lambda: meter.bench.transfer(size, to_device), kind="host", calls=3, spread=0.005)

    whole = took(large)
    if whole.value < BRIEF and (larger := min(COPIED_AT_MOST, meter.limits.buffer_max // 16 * 4)) > large:
        with suppress(CapacityError):  # so many bytes have no room
            whole, large = took(larger), larger
    quarter, least = took(large // 4), took(small)
    seconds = whole.value - quarter.value
    error = max(whole.high - whole.value, quarter.high - quarter.value) * 1.4
    if seconds <= max(4 * error, 0.05 * whole.value):
        raise Refused(f"{large} bytes do not take longer than a quarter of them")
    why = f"{large} bytes against {large // 4}"
    if abs(quarter.value - least.value - seconds / 3) > UNEVEN * quarter.value:  # what is large is copied otherwise
        why = f"{large} bytes against {small}: {large // 4} take {quarter.value * 1e3:.3g} ms, not in proportion"
        seconds, error = 0.75 * (whole.value - least.value), whole.high - whole.value
    bandwidth = large * 0.75 / seconds / 1e9
    out = [Quantity(f"{name} bandwidth", bandwidth, "GB/s", (large * 0.75 / (seconds + error) / 1e9,
                                                             large * 0.75 / (seconds - error) / 1e9), "measured", why)]
    beside = small / bandwidth / 1e9
    if least.value <= 2 * beside:
        return [*out, Quantity(f"{name} cost", None, "s", None, "refused",
                               f"{small} bytes take {least.value:.3g} s, no longer than their share of the bandwidth")]
    return [*out, Quantity(f"{name} cost", least.value - beside, "s", (least.low - beside, least.high - beside),
                           "measured", f"{small} bytes, less their share of the bandwidth")]
