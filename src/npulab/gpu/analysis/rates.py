"""Rates and latencies of operations, bandwidths of the levels, costs of launches, barriers and transfers."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from npulab.errors import UnsupportedError
from npulab.gpu.analysis.caches import Hierarchy
from npulab.gpu.analysis.meter import Meter, Refused
from npulab.gpu.analysis.statistics import Estimate
from npulab.gpu.types import OPERATIONS_A_STEP, Element, Operation, Quantity, Timing, Way

ELEMENTS: tuple[Element, ...] = get_args(Element)
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
FASTEST = 1.5
"""Times the stated clock that a device may really have: many state their base."""
CHAINED_MOST = 128
"""Chains times elements of a vector of a thread: more do not stay in the registers of any device."""


def wanted(meter: Meter) -> list[tuple[Operation, Element]]:
    """Quick: multiply-adds, and what is special in float32."""
    return [(o, e) for e in ELEMENTS if e in meter.limits.elements for o in OPERATIONS
            if o == "fma" or (e not in ("int8x4", "char4") and not (e == "int32" and o == "special") and not meter.quick)
            or (o, e) == ("special", "float32")]


def rate(meter: Meter, operation: Operation, element: Element) -> Quantity:
    """The fastest shape: vectors, threads and chains one after the other, the best of each kept. Where a thread has a
    core's vector unit for itself (a CPU) it takes vectors of 16 and eight chains to fill it; a GPU fills its own."""
    _one_chain(meter, operation, element)
    shape = {"width": 1, "chains": 4, "threads": 4 * meter.limits.compute_units * meter.limits.group_max}
    tried = {"width": (2, 4, 8, 16), "threads": (2 * shape["threads"], shape["threads"] // 4),
             "chains": (8, 12, 16, 2, 1)}

    def ask(shape: dict[str, int]) -> Callable[[], Timing]:
        return lambda: meter.bench.chain(operation, element, shape["width"], shape["chains"], shape["threads"])

    best = meter.seconds(ask(shape), "operations").value
    for what, values in tried.items():
        for value in values:
            other = {**shape, what: value}
            if other["chains"] * other["width"] > CHAINED_MOST:
                continue
            try:
                now = meter.seconds(ask(other), "operations", calls=2).value
            except UnsupportedError:
                continue
            if now < 0.99 * best:
                best, shape = now, other
    took = meter.seconds(ask(shape), "operations", calls=3, spread=0.005)  # anew: the best of many is flattered
    return Quantity(f"{operation} {element} rate", 1 / took.value, "operations/s", (1 / took.high, 1 / took.low),
                    "measured", f"{shape['threads']} threads of {shape['chains']} chains of vectors of "
                                f"{shape['width']}, on the whole device")


def latency(meter: Meter, operation: Operation, element: Element) -> Quantity:
    took, lanes = _one_chain(meter, operation, element, 0.005), OPERATIONS_A_STEP[element]
    return Quantity(f"{operation} {element} latency", took.value * lanes, "s", (took.low * lanes, took.high * lanes),
                    "measured", "one thread, one chain")


def _one_chain(meter: Meter, operation: Operation, element: Element, spread: float = 0.0) -> Estimate:
    """Seconds of a dependent operation. Raises: Refused if no clock is that fast: the compiler put steps together."""
    took = meter.seconds(lambda: meter.bench.chain(operation, element, 1, 1, 1), "operations", "alone",
                         spread=spread)
    clock, step = meter.limits.clock_hz, took.value * OPERATIONS_A_STEP[element]
    if clock and step < 1 / (FASTEST * clock):
        raise Refused(f"a step of a chain takes {1e9 * step:.3g} ns, {step * clock:.2g} cycles of the stated "
                      f"{1e-9 * clock:.3g} GHz: steps were put together, or not done")
    return took


def level_bandwidth(meter: Meter, found: Hierarchy, index: int) -> Quantity:
    """Of level `index` of the hierarchy: footprints that it holds and the one before does not must agree."""
    name = f"L{index + 1} bandwidth"
    size = found.levels[index].size
    inner = found.levels[index - 1].size if index else 0
    gradual = found.levels[index].cliff.shape == "gradual"
    shares = (0.5, 0.7) if not index else (0.4, 0.55) if gradual else (0.65, 0.75, 0.85)
    footprints = [int(size * s) // 1024 * 1024 for s in shares]
    if index and footprints[0] < 1.5 * inner:
        raise Refused(f"no footprint misses L{index} and fits in L{index + 1}: {inner} and {size} bytes")
    times = [_stream(meter, max(1024, f), 16, "read") for f in footprints]
    if index and max(t.value for t in times) > 1.04 * min(t.value for t in times):
        rates = ", ".join(f"{1e-9 / t.value:.4g}" for t in times)
        raise Refused(f"no plateau: footprints of {', '.join(map(str, footprints))} bytes reach {rates} GB/s")
    took = min(times, key=lambda t: t.spread)
    return _per_second(name, took, f"read, 16 bytes a load, {footprints[times.index(took)]} bytes again and again")


def memory_bandwidth(meter: Meter, found: Hierarchy | None, way: Way) -> Quantity:
    name = {"read": "memory bandwidth", "write": "memory write bandwidth", "copy": "memory copy bandwidth"}[way]
    largest = min(meter.limits.buffer_max // (2 if way == "copy" else 1), 1 << (29 if meter.quick else 30))
    known = found is not None and not found.fault
    need = 4 * found.levels[-1].size if found and known else min(largest, 1 << (27 if meter.quick else 28))
    if need > largest:
        raise Refused(f"buffers of at most {largest} bytes are not large enough to miss the caches")
    footprint = min(largest, max(int(2.6 * need), 1 << 26)) if known else need
    took = _stream(meter, footprint, 16, way, True)
    why = f"{way}, 16 bytes a load, through {footprint} bytes again and again"
    if not known or footprint // 2 > 1.25 * need:
        half = _stream(meter, footprint // 2, 16, way, True)
        if abs(half.value - took.value) > 0.05 * took.value:
            raise Refused(f"caches help: {footprint // 2} bytes reach {1e-9 / half.value:.4g} GB/s, twice as many "
                          f"{1e-9 / took.value:.4g}")
        why += f"; half as many reach {1e-9 / half.value:.4g}"
    return _per_second(name, took, why)


def _stream(meter: Meter, footprint: int, width: int, way: Way, memory: bool = False) -> Estimate:
    return meter.seconds(lambda: meter.bench.stream(footprint, 1, width, way), "bytes",
                         "memory" if memory else "core", 2, 0.005)


def _per_second(name: str, took: Estimate, why: str) -> Quantity:
    return Quantity(name, 1e-9 / took.value, "GB/s", (1e-9 / took.high, 1e-9 / took.low), "measured", why)


def launch(meter: Meter) -> Quantity:
    took = meter.seconds(meter.bench.launch, kind="host", calls=3, spread=0.01)
    return Quantity("launch cost", took.value, "s", (took.low, took.high), "measured", "a kernel that does nothing")


def barrier(meter: Meter) -> Quantity:
    took = meter.seconds(meter.bench.barrier, "barriers", calls=2, spread=0.01)
    return Quantity("barrier cost", took.value, "s", (took.low, took.high), "measured", "a full group")


def transfers(meter: Meter, to_device: bool) -> list[Quantity]:
    """Bandwidth by what a large one takes longer than one of a quarter, cost by what a small one takes beside it."""
    name = "transfer to device" if to_device else "transfer from device"
    large = min(1 << 26, meter.limits.buffer_max // 16 * 4)
    small = 4096

    def took(size: int) -> Estimate:
        return meter.seconds(lambda: meter.bench.transfer(size, to_device), kind="host", calls=3, spread=0.005)

    whole, quarter, least = took(large), took(large // 4), took(small)
    seconds = whole.value - quarter.value
    error = max(whole.high - whole.value, quarter.high - quarter.value) * 1.4
    if seconds <= max(4 * error, 0.05 * whole.value):
        raise Refused(f"{large} bytes do not take longer than a quarter of them")
    bandwidth = large * 0.75 / seconds / 1e9
    why = f"{large} bytes against {large // 4}"
    out = [Quantity(f"{name} bandwidth", bandwidth, "GB/s", (large * 0.75 / (seconds + error) / 1e9,
                                                             large * 0.75 / (seconds - error) / 1e9), "measured", why)]
    beside = small / bandwidth / 1e9
    if least.value <= 2 * beside:
        return [*out, Quantity(f"{name} cost", None, "s", None, "refused",
                               f"{small} bytes take {least.value:.3g} s, no longer than their share of the bandwidth")]
    return [*out, Quantity(f"{name} cost", least.value - beside, "s", (least.low - beside, least.high - beside),
                           "measured", f"{small} bytes, less their share of the bandwidth")]
