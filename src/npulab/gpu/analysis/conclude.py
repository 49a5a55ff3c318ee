"""All that is concluded of a device, each finding for itself: what one is refused for does not touch the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from npulab.errors import NpulabError
from npulab.gpu import bounds
from npulab.gpu.analysis import caches, drift, groups, local, rates, registers, vectors, widths
from npulab.gpu.analysis.meter import Meter, Refused, reason
from npulab.gpu.counting import STATED, UNREAD
from npulab.gpu.counting.opencl import NO_CAPSTONE
from npulab.gpu.types import Bench, Quantity, Way

NOT_COUNTED = "NOT COUNTED in compiled code, taken by --trust-source"
TRY = "; try "
"""Before what a person can do about a refusal."""
SOURCE_TRUSTED = "--trust-source, which takes what the source states"
Progress = Callable[[str, float], None]
Keep = Callable[[list[Quantity]], None]
Task = tuple[str, str, Callable[[], list[Quantity]]]
"""Name and unit of the first quantity that it finds."""


def conclude(bench: Bench, progress: Progress | None = None, quick: bool = False, known: Sequence[Quantity] = (),
             keep: Keep | None = None, trust_source: bool = False) -> list[Quantity]:
    """What a device is made of, from experiments alone.

    progress  called with what is measured next and the share that is done, 0..1.
    quick     fewer repetitions and operations, no footprint of a chase beyond 64 MiB.
    known     findings of an earlier run on the device, which are not measured again.
    keep      called with findings as they come.
    trust_source  work that was not counted in compiled code is taken as the source states it; else what rests on such
              is refused.

    Bounded: 10000 experiments or 15 minutes (quick: 2000, 2.5), and no task takes more than half of what is left of
    them; what is not measured until then is refused. Never raises what a bench raises on purpose (NpulabError).
    """
    meter = Meter(bench, quick, trust_source)
    found, done = list(known), {q.name for q in known}
    hierarchy: list[caches.Hierarchy] = []

    def width() -> list[Quantity]:
        return [groups.warp_width(meter)]

    def held() -> list[Quantity]:
        warp = next((q.value for q in found if q.name == "warp width" and q.value is not None), None)
        if warp is None:
            raise Refused("needs the warp width, which was refused")
        return registers.registers(meter, int(warp))

    def levels() -> list[Quantity]:
        made = caches.hierarchy(meter)
        if made.levels and (hidden := bounds.first_objection(made.levels[0].latency.value, meter.limits)):
            return [Quantity("L1 size", None, "bytes", None, "refused", hidden),
                    *(q for q in _of(made) if q.name == "memory latency")]
        hierarchy.append(made)
        return _of(made)

    def bandwidth(index: int, way: Way) -> list[Quantity]:
        if not hierarchy:
            raise Refused(f"needs the caches, whose levels were not found again: {again}")
        return [rates.level_bandwidth(meter, hierarchy[0], index, way)]

    first: list[Task] = [
        ("warp width", "threads", width),
        ("register file", "bytes a core", held),
        ("local memory banks", "words", lambda: [local.banks(meter)]),
        ("local memory bandwidth", "GB/s", lambda: [local.bandwidth(meter)]),
        ("launch cost", "s", lambda: [rates.launch(meter)]),
        ("barrier cost", "s", lambda: [rates.barrier(meter)]),
        ("transfer to device bandwidth", "GB/s", lambda: rates.transfers(meter, True)),
        ("transfer from device bandwidth", "GB/s", lambda: rates.transfers(meter, False)),
        ("L1 size", "bytes", levels),
    ]
    then: list[Task] = [
        ("memory bandwidth", "GB/s", lambda: [rates.memory_bandwidth(meter, _one(hierarchy), "read")]),
        ("memory write bandwidth", "GB/s", lambda: [rates.memory_bandwidth(meter, _one(hierarchy), "write")]),
        ("memory copy bandwidth", "GB/s", lambda: [rates.memory_bandwidth(meter, _one(hierarchy), "copy")]),
        ("map cost", "s", lambda: [rates.mapped(meter)]),
        ("constant bandwidth", "GB/s", lambda: [rates.constant_bandwidth(meter, False)]),
        ("image bandwidth", "GB/s", lambda: [rates.image_bandwidth(meter, _one(hierarchy))]),
        *((f"{o} {e} rate", "operations/s", lambda o=o, e=e: [rates.rate(meter, o, e)])
          for o, e in rates.wanted(meter)),
        *((f"{o} {e} latency", "s", lambda o=o, e=e: [rates.latency(meter, o, e)]) for o, e in rates.wanted(meter)),
        *([] if quick else _more(meter, hierarchy, found)),
    ]

    def do(name: str, unit: str, task: Callable[[], list[Quantity]], share: float) -> None:
        if name in done:
            return
        if progress:
            progress(name, share)
        made = tried(meter, name, unit, task, found)
        found.extend(made)
        if keep:
            keep(made)

    total, again = len(first) + len(then), ""

    def named(name: str) -> Quantity | None:
        return next((q for q in found if q.name == name), None)

    for i, (name, unit, task) in enumerate(first):
        do(name, unit, task, i / total)
    ways: tuple[Way, ...] = ("read",) if quick else ("read", "write")
    of_levels = [(rates.name_of(i, way), i, way) for i in range(_levels(found)) for way in ways]
    shapes = [] if quick else widths.of_levels(_levels(found))
    if not hierarchy and not done.issuperset(name for name, *_ in (*of_levels, *shapes)):
        again = tried(meter, "L1 size", "bytes", levels)[0].why  # what was known of it is not all that follows needs
    for name, index, way in of_levels:
        do(name, "GB/s", lambda index=index, way=way: bandwidth(index, way), len(first) / total)  # type: ignore[misc]
    then += [] if quick else [*vectors.tasks(meter), *widths.tasks(meter, hierarchy, _levels(found), named)]
    total = len(first) + len(then)
    for i, (name, unit, task) in enumerate(then, len(first)):
        do(name, unit, task, i / total)
    do("lowest clock", "of the first", lambda: [drift.drift(meter)], 1.0)
    if progress:
        progress("done", 1.0)
    return found


def _more(meter: Meter, hierarchy: list[caches.Hierarchy], found: list[Quantity]) -> list[Task]:
    """What a quick run leaves out, beside what `widths` has: memory by width and stride, stores, and ratios."""
    def named(name: str) -> Quantity | None:
        return next((q for q in found if q.name == name), None)

    return [
        ("fma against mul float32", "times", lambda: [rates.against_multiply(
            meter, named("fma float32 rate"), named("mul float32 rate"))]),
        ("local memory write bandwidth", "GB/s", lambda: [local.bandwidth(meter, "write")]),
        ("constant bandwidth, spread", "GB/s", lambda: [rates.constant_bandwidth(meter, True)]),
        *((f"memory bandwidth, {w} bytes a load", "GB/s",
           lambda w=w: [rates.memory_bandwidth(meter, _one(hierarchy), "read", w)]) for w in rates.WIDTHS),
        *((f"memory bandwidth, 4 bytes a load, stride {s}", "GB/s",
           lambda s=s: [rates.memory_bandwidth(meter, _one(hierarchy), "read", 4, s)]) for s in rates.STRIDES),
    ]


def tried(meter: Meter, name: str, unit: str, task: Callable[[], list[Quantity]], others: Sequence[Quantity] = ()
          ) -> list[Quantity]:
    """What a task finds, or that it is refused: by itself, by the device, as above what can be (`gpu.bounds`), or as
    work that nobody counted."""
    meter.begin()
    try:
        return [_sourced(meter, bounds.checked(q, meter.limits, others, meter.seen)) for q in task()]
    except (Refused, NpulabError) as e:
        return [Quantity(name, None, unit, None, "refused", reason(e))]


def _sourced(meter: Meter, found: Quantity) -> Quantity:
    """Saying where the work was counted; refused where it was not."""
    if found.status != "measured":
        return found
    said = sorted(meter.counted)
    stated = [s for s in said if s.startswith(STATED)]
    if stated and not meter.trust_source:
        return replace(found, value=None, interval=None, status="refused",
                       why=_uncounted(found, stated, meter.bench.identity.api))
    loud = [f"{NOT_COUNTED}: "] if stated else []
    return replace(found, why="".join(loud) + "; ".join(filter(None, (found.why, *said))))


def _uncounted(found: Quantity, stated: Sequence[str], api: str) -> str:
    reasons = " and ".join(s.partition(UNREAD)[2] or "there is no way yet to find it there" for s in stated)
    tries = ["pip install 'npulab[gpu]'"] if any(NO_CAPSTONE in s for s in stated) else []
    if api == "opencl":
        tries.append("--device vulkan:N if the device is there, too: SPIR-V is counted")
    return (f"its work was not counted in compiled code: {reasons}; by the source's count it would be "
            f"{found.value:.4g} {found.unit}{TRY}{'; or '.join((*tries, SOURCE_TRUSTED))}")


def _levels(found: Sequence[Quantity]) -> int:
    """Of caches whose size is known."""
    return sum(q.name.startswith("L") and q.name.endswith(" size") and q.status == "measured" for q in found)


def _one(hierarchy: list[caches.Hierarchy]) -> caches.Hierarchy | None:
    return hierarchy[0] if hierarchy else None


def _of(found: caches.Hierarchy) -> list[Quantity]:
    out = []
    for i, level in enumerate(found.levels, 1):
        out += [Quantity(f"L{i} size", level.size, "bytes", level.cliff.interval, "measured", level.cliff.why),
                Quantity(f"L{i} line", level.line, "bytes", None, "measured",
                         "the shortest distance of loads at which none helps another"),
                Quantity(f"L{i} latency", level.latency.value, "s", (level.latency.low, level.latency.high), "measured",
                         level.rests)]
    if found.memory:
        m = found.memory
        return [*out, Quantity("memory latency", m.value, "s", (m.low, m.high), "measured",
                               found.rests)]
    return [*out, Quantity("memory latency", None, "s", None, "refused", found.fault)]
