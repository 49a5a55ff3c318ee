"""What no device does, whatever its times say: rates above its lanes and its clock, memory faster than caches, times
that are no times, numbers in another unit than they say, numbers so small that devices treat them otherwise.

Bounds are loose on purpose: what is above them is wrong, what is below need not be right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from npulab.gpu.types import Limits, Quantity

FASTEST = 1.5
"""Times the stated clock that a device may really have: many state their base."""
CLOCK_MOST = 6.5e9
"""Hertz, of a device that states no clock; above all that are sold. Source: assumed."""
LANES = {"float32": 256, "float16": 512, "int32": 256, "int8x4": 1024, "char4": 1024}
"""Scalar operations a cycle and compute unit, without matrix units. Published: 128 float32 multiply-adds in an NVIDIA
SM (compute capability 8.6 to 9.0) and an Apple core, 256 in an Intel Xe core of Ponte Vecchio and an AMD work group
processor of RDNA 3; twice that of halves, four times of bytes."""
LOAD_BYTES = 256
"""A cycle and compute unit out of its nearest memory: NVIDIA and AMD 128, an x86 core 128 and 64 stored beside."""
DRAM_LEAST = 1e-8
"""Seconds: a row's column access (CL) alone takes 13 ns in DDR4 and DDR5 (JEDEC JESD79-4, JESD79-5)."""
FIRST_OF_PROCESSOR = 5e-9
"""Seconds, of a load from a processor's first cache: 4 or 5 cycles (Intel, AMD and Arm, optimization manuals), of 1 GHz
and more. Slower ones are no first cache: what the driver does for each load hides the smaller ones."""
LINK_MOST = 1e12
"""Bytes a second between host and device: twice the widest link, NVLink-C2C's 450 GB/s each way."""
NEARER = 1.25
"""Times an inner level's bandwidth that an outer one may reach by error alone."""
UNITS = (("bandwidth", "GB/s"), ("rate", "operations/s"), ("latency", "s"), ("cost", "s"))
TICKS = 0.5
"""Of a time that the timer's step may be; of a coarser one the mean is no mean."""
ZERO = 0.05
"""Of a tick: less is none, beside what the timer itself takes."""
MOVED = 0.25
"""By how much the last third of repetitions may differ from the first before the clock is said to have moved."""
TINY = {"float32": 2.0**-126, "float16": 2.0**-14}
"""The smallest normal number (IEEE 754)."""
RATE = re.compile(r"(fma|mul|add|special) (float32|float16|int32|int8x4|char4) (rate|latency)$")
LEVEL = re.compile(r"L(\d+) (bandwidth|latency)$")
SHAPED = re.compile(r"(?:L(\d+)|memory) bandwidth(, \d+ bytes a load.*)$")
"""Reads of a level in another shape than the fastest."""
FASTEST_SHAPE = re.compile(r"L\d+ (write )?bandwidth$")


def steps_most(what: str, stated: float) -> float:
    """Dependent steps a second that no chain goes beyond; what: "add int32". Sums of integers take one cycle on
    processors, whose clock may be far above what is stated (base 1.1 GHz, turbo 4.7: Intel, Core i7-1250U); all other
    steps take several."""
    return max(FASTEST * stated or CLOCK_MOST, CLOCK_MOST if what == "add int32" else 0.0)


def checked(found: Quantity, limits: Limits, others: Sequence[Quantity] = (),
            seen: Mapping[str, Sequence[float]] | None = None) -> Quantity:
    """The finding, or the finding refused. others: of the same device. seen: units of work a second that were timed for
    it, as {"bytes": [...], "operations": [...], "loads": [...]}; bandwidths and rates must be one of them."""
    if found.status != "measured":
        return found
    why = objection(found, limits, others) or (unit_objection(found, seen) if seen else "")
    return replace(found, value=None, interval=None, status="refused", why=why) if why else found


def objection(found: Quantity, limits: Limits, others: Sequence[Quantity] = ()) -> str:
    """Why a measured value cannot be; "" if nothing says so."""
    value = found.value
    if value is None or not math.isfinite(value) or value <= 0:
        return f"{found.name} of {value} {found.unit} is no measure"
    if found.interval and not found.interval[0] <= value <= found.interval[1]:
        return f"{found.name} of {value:.4g} is outside of its own interval, {found.interval[0]:.4g}.." \
               f"{found.interval[1]:.4g}"
    what = found.name.partition(",")[0]  # "memory bandwidth, 4 bytes a load"
    for word, unit in UNITS:
        if what.endswith(word) and found.unit != unit:
            return f"{found.name} is in {found.unit}, not in {unit}"
    clock = FASTEST * limits.clock_hz or CLOCK_MOST
    spoken = f"{limits.compute_units} compute units at " + (
        f"{FASTEST:g} times the stated {1e-9 * limits.clock_hz:.3g} GHz" if limits.clock_hz else
        f"{1e-9 * CLOCK_MOST:g} GHz, as no clock is stated")
    if m := RATE.match(what):
        if m[3] == "latency":
            clock = steps_most(f"{m[1]} {m[2]}", limits.clock_hz)
        return _compute(found.name, value, m[2], m[3] == "rate", limits, clock, spoken)
    if what.endswith("bandwidth"):
        return _bandwidth(found.name, value * 1e9, limits, clock, spoken, others)
    if what.endswith("latency"):
        return _latency(found.name, value, clock, others)
    return ""


def _compute(name: str, value: float, element: str, rate: bool, limits: Limits, clock: float, spoken: str) -> str:
    if not rate:
        least = 1 / clock
        return f"{name} of {1e9 * value:.3g} ns is less than a cycle of {1e-9 * clock:.3g} GHz" if value < least else ""
    most = limits.compute_units * clock * LANES[element]
    return f"{name} of {value:.3g} operations/s is above a physical bound, {most:.3g}: {spoken}, {LANES[element]} " \
           f"{element} a cycle" if value > most else ""


def _bandwidth(name: str, value: float, limits: Limits, clock: float, spoken: str, others: Sequence[Quantity]) -> str:
    if name.startswith("transfer"):
        return f"{name} of {1e-9 * value:.4g} GB/s is above what any link has, {1e-9 * LINK_MOST:g}" \
            if value > LINK_MOST else ""
    most = limits.compute_units * clock * LOAD_BYTES * (2 if "copy" in name else 1)
    if value > most:
        return f"{name} of {1e-9 * value:.4g} GB/s is above a physical bound, {1e-9 * most:.4g}: {spoken}, " \
               f"{LOAD_BYTES} bytes a cycle"
    for q in others:
        if q.value and 1e-9 * value > NEARER * q.value and _bounds(q.name, name):
            return f"{name} of {1e-9 * value:.4g} GB/s is above that of {q.name}, {q.value:.4g}"
    inner = _levels(others, "bandwidth", _level(name))
    slowest = min(inner, key=lambda q: q.value or 0.0, default=None)
    if slowest and slowest.value and 1e-9 * value > NEARER * slowest.value:
        return f"{name} of {1e-9 * value:.4g} GB/s is above that of {slowest.name.split()[0]} before it, " \
               f"{slowest.value:.4g}"
    return ""


def _bounds(other: str, name: str) -> bool:
    """Whether nothing of the one name is faster than the other: the same level in its fastest shape, or one before it
    in the same."""
    if FASTEST_SHAPE.match(other) and name.startswith(f"{other}, "):
        return True
    near, far = SHAPED.match(other), SHAPED.match(name)
    return bool(near and far and near[2] == far[2] and float(near[1] or "inf") < float(far[1] or "inf"))


def _latency(name: str, value: float, clock: float, others: Sequence[Quantity]) -> str:
    if value < 1 / clock:
        return f"{name} of {1e9 * value:.3g} ns is less than a cycle of {1e-9 * clock:.3g} GHz"
    if name == "memory latency" and value < DRAM_LEAST:
        return f"{name} of {1e9 * value:.3g} ns is less than DRAM takes by itself: a cache answers"
    for q in _levels(others, "latency", _level(name)):
        if q.value and value < q.value:
            return f"{name} of {1e9 * value:.3g} ns is less than that of {q.name.split()[0]} before it, " \
                   f"{1e9 * q.value:.3g}"
    return ""


def _level(name: str) -> float:
    m = LEVEL.match(name)
    return int(m[1]) if m else math.inf if name.startswith("memory") else 0


def _levels(others: Sequence[Quantity], what: str, below: float) -> list[Quantity]:
    """Measured ones of levels nearer than `below`."""
    return [q for q in others if q.status == "measured" and (m := LEVEL.match(q.name)) and m[2] == what
            and int(m[1]) < below]


def first_objection(latency: float, limits: Limits) -> str:
    """Why the first level of memory that shows is not the first cache; "" if nothing says so."""
    return (f"the first level that shows takes {1e9 * latency:.3g} ns a load, a processor's first cache at most "
            f"{1e9 * FIRST_OF_PROCESSOR:g}: what the driver does for each load hides it"
            if limits.processor and latency > FIRST_OF_PROCESSOR else "")


def unit_objection(found: Quantity, seen: Mapping[str, Sequence[float]]) -> str:
    """A bandwidth or rate that is not the work over the seconds that were timed for it. GB/s are 10^9 bytes."""
    scale = {"GB/s": (1e9, (("bytes", 1.0), ("loads", 4.0), ("stores", 4.0))),
             "operations/s": (1.0, (("operations", 1.0),))}
    if found.unit not in scale or found.value is None or found.name.startswith("transfer"):
        return ""  # a transfer's bandwidth is a difference of two
    unit, of = scale[found.unit]
    timed = [rate * size for kind, size in of for rate in seen.get(kind, ())]
    if any(math.isclose(found.value * unit, rate, rel_tol=1e-6) for rate in timed):
        return ""
    near = min(timed, key=lambda rate: abs(math.log(rate / (found.value or 1.0) / unit)), default=0.0)
    return f"{found.name} of {found.value:.5g} {found.unit} is not the work over its seconds, {near / unit:.5g}: " \
           "another unit (GB/s are 10^9 bytes)"


def times_objection(seconds: Sequence[float]) -> str:
    """What speaks against repetitions of the same work; "" if nothing does."""
    v = np.asarray(seconds, np.float64)
    if not len(v) or not np.isfinite(v).all() or (v < 0).any() or not v.any():
        return "the experiment's times are not times: " + ", ".join(f"{x:g}" for x in v[:3])
    levels = np.unique(v)
    if len(levels) > 1 and len(levels) <= len(v) / 2:
        step, middle = float(np.diff(levels).min()), float(v.mean())
        if step > TICKS * middle and levels[0] < ZERO * step:  # a step from more is a repetition that was disturbed
            return f"the timer's ticks of {step:.3g} s are too coarse for times of {middle:.3g} s"
    return ""


def drift_objection(seconds: Sequence[float]) -> str:
    """Repetitions that become slower or quicker all along: the clock moves, or another program came or went."""
    v = np.asarray(seconds, np.float64)
    third = len(v) // 3
    if third < 2:
        return ""
    first, last = v[:third], v[-third:]
    ratio = float(np.median(last) / np.median(first)) if first.min() > 0 else 1.0
    apart = first.max() < last.min() or first.min() > last.max()  # noise alone does that once in ten
    between = min(np.median(first), np.median(last)) <= np.median(v[third:-third]) <= max(np.median(first),
                                                                                         np.median(last))
    if apart and between and abs(ratio - 1) > MOVED:
        return f"the clock moved: the last repetitions take {ratio:.2f} times as long as the first"
    return ""


def subnormal(values: ArrayLike, element: str) -> str:
    """What is wrong with the numbers that are computed on: devices flush subnormal ones, or take far longer over them.
    """
    v = np.abs(np.asarray(values, np.float64).ravel())
    if element not in TINY:
        return ""
    if not np.isfinite(v).all():
        return f"a result is {v[~np.isfinite(v)][0]:g}: computing on it is no measure"
    small = v[(v > 0) & (v < TINY[element])]
    return f"{small[0]:.3g} is a denormal number in {element}, flushed or slow on devices" if len(small) else ""
