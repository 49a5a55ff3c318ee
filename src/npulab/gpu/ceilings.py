"""What a device can do at most: rates of multiply-adds and bandwidths, each with what stands behind it.

They come from a probe's result file, or from what others published (published.toml). Here too: the kernels that a
published study of one GPU timed, and a model of two parameters that explains their times.

One multiply-add is two operations. Rates are operations a second, bandwidths bytes a second, sizes bytes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from npulab.errors import InvariantError, ModelError
from npulab.program.files import read_bounded

Numbers = Literal["fp32", "fp16", "int8"]
Standing = Literal["measured", "stated", "assumed"]
"""Measured on the device; stated by whom `source` names; taken for want of better, as `note` says."""

COMPUTE = "compute"
"""The resource of ceilings that count operations; the others are memories."""
PUBLISHED = Path(__file__).parent / "published.toml"
LIMIT = 4 << 20
"""Bytes that a result file may have."""
LARGEST = 1e18
"""Operations or bytes a second that no single device comes near: those of the largest computers of many thousand."""

_RATES: Mapping[str, tuple[Numbers, int]] = {
    "fma float32 rate": ("fp32", 2), "fma float16 rate": ("fp16", 2), "fma int8x4 rate": ("int8", 2)}
"""A probe's quantities -> number format, operations in one of its operations."""
_BANDWIDTH = re.compile(r"(memory|L[1-4]) bandwidth")
_SIZE = re.compile(r"(L[1-4]) size")
_UNITS: Mapping[str, Mapping[str, float]] = {
    "rate": {"operations/s": 1.0}, "bandwidth": {"GB/s": 1e9, "bytes/s": 1.0}, "size": {"bytes": 1.0}}
"""Units of a probe's quantities, by the last word of their names -> factor to ours."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """One limit.

    resource  COMPUTE, or a memory: "DRAM", "L2", "L1", "SRAM".      numbers  of COMPUTE, what is computed on.
    interval  95 %, of what was measured with one.                   note     how the number came about.
    """

    resource: str
    value: float
    standing: Standing
    source: str
    numbers: Numbers | None = None
    note: str = ""
    interval: tuple[float, float] | None = None

    @property
    def unit(self) -> str:
        return "op/s" if self.resource == COMPUTE else "B/s"

    @property
    def name(self) -> str:
        return f"{self.numbers} compute" if self.resource == COMPUTE else self.resource


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A figure that is not used, and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Ceilings:
    """All that is known of a device. `sizes`: name -> bytes."""

    name: str
    title: str
    ceilings: tuple[Ceiling, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()


# a probe's result file


class _Quantity(msgspec.Struct, frozen=True):
    name: str
    value: float | None
    unit: str
    status: Literal["measured", "refused"]
    interval: tuple[float | None, float | None] | None = None
    why: str = ""


class _Result(msgspec.Struct, frozen=True):
    identity: dict[str, Any]
    quantities: tuple[_Quantity, ...]


def read_result(path: str | os.PathLike[str]) -> Ceilings:
    """The ceilings in what `npulab probe --json` wrote. Refused quantities are not used, and listed.

    Raises: UsageError if the file cannot be read; ModelError if it is no such file, or has a number that cannot be.
    """
    who = os.fspath(path)
    data = read_bounded(path, "a probe's result", LIMIT)
    try:
        found = msgspec.json.decode(data, type=_Result)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        problem, _, where = str(e).partition(" - at ")
        place = {"where": where.strip("`")} if where else {}
        raise ModelError(f"{who} is not a probe's result", got=problem or "too deep a structure",
                         want="what npulab probe --json writes", **place) from e
    ceilings, sizes, left = [], {}, []
    seen: set[str] = set()
    for q in found.quantities:
        kind = _kind(q.name)
        if not kind:
            continue
        if q.name in seen:
            raise ModelError(f"{who} has a quantity twice", where=q.name)
        seen.add(q.name)
        if q.status == "refused":
            left.append(LeftOut(q.name, "refused: " + (q.why or "the probe does not say why")))
            continue
        numbers, factor = _RATES.get(q.name, (None, 1))
        value, interval = _checked(q, kind, factor, who)
        if kind == "size":
            sizes[q.name.split()[0]] = int(value)
        else:
            resource = COMPUTE if numbers else q.name.split()[0].replace("memory", "DRAM")
            ceilings.append(Ceiling(resource, value, "measured", "probe", numbers, q.why, interval))
    title = " ".join(dict.fromkeys(str(found.identity[k]) for k in ("vendor", "name") if found.identity.get(k)))
    return Ceilings(Path(path).name, title or Path(path).name, tuple(ceilings), sizes, tuple(left))


def _kind(name: str) -> str:
    """"rate", "bandwidth" or "size" of a quantity that says something about ceilings, else ""."""
    return name.split()[-1] if name in _RATES or _BANDWIDTH.fullmatch(name) or _SIZE.fullmatch(name) else ""


def _checked(q: _Quantity, kind: str, factor: int, who: str) -> tuple[float, tuple[float, float] | None]:
    """Value and interval in our units."""
    units = _UNITS[kind]
    if q.unit not in units:
        raise ModelError(f"{who} has '{q.name}' in an unknown unit", want=" or ".join(units), got=q.unit[:40])
    scale = factor * units[q.unit]

    def sound(v: float | None) -> float:
        if v is None or not math.isfinite(v) or not 0 < v * scale < LARGEST:
            raise ModelError(f"{who} has '{q.name}' with a number that no device can have", got=v,
                             want="a number above 0" if v is None or v <= 0 else f"less than {LARGEST / scale:g}")
        return v * scale

    value = sound(q.value)
    if kind == "size" or q.interval is None or None in q.interval:
        return value, None
    low, high = map(sound, q.interval)
    if not low <= value <= high:
        raise ModelError(f"{who} has '{q.name}' outside its own interval", got=q.value,
                         want=f"{low / scale:g} to {high / scale:g} {q.unit}")
    return value, (low, high)


# what was published


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class _Source(_Record, frozen=True, kw_only=True):
    title: str
    origin: str
    rev: str = ""


class _CeilingRow(_Record, frozen=True, kw_only=True):
    resource: str
    value: float
    standing: Standing
    source: str
    numbers: Numbers | None = None
    note: str = ""


class _SizeRow(_Record, frozen=True, kw_only=True):
    name: str
    value: int
    source: str


class _DeviceRow(_Record, frozen=True, kw_only=True):
    name: str
    title: str
    ceiling: tuple[_CeilingRow, ...]
    size: tuple[_SizeRow, ...] = ()


class Kernel(_Record, frozen=True, kw_only=True):
    """A kernel that a study timed. Numbers are those of one invocation; published.toml says how each is counted."""

    name: str
    device: str
    multiplies: int
    tuples: int
    bytes: int
    group: int
    gflops: float
    role: Literal["fit", "test"]
    source: str
    gops: float | None = None
    note: str = ""

    @property
    def slots(self) -> int:
        """Issue slots: two a tuple, empty ones included."""
        return 2 * self.tuples

    @property
    def seconds(self) -> float:
        """An invocation's share of the measured time, on the whole device."""
        return self.multiplies / (self.gflops * 1e9)


class _Published(_Record, frozen=True, kw_only=True):
    sources: dict[str, _Source]
    device: tuple[_DeviceRow, ...]
    kernel: tuple[Kernel, ...]


@cache
def _published() -> _Published:
    return msgspec.toml.decode(PUBLISHED.read_bytes(), type=_Published)


def published() -> Mapping[str, Ceilings]:
    """Devices whose ceilings somebody published, by name."""
    data = _published()
    return {d.name: Ceilings(
        d.name, d.title,
        tuple(Ceiling(c.resource, c.value, c.standing, data.sources[c.source].title, c.numbers, c.note)
              for c in d.ceiling),
        {s.name: s.value for s in d.size}) for d in data.device}


def kernels(device: str) -> tuple[Kernel, ...]:
    """The timed kernels of a published study, in its order; none of most devices."""
    return tuple(k for k in _published().kernel if k.device == device)


# a model of the timed kernels


@dataclass(frozen=True, slots=True)
class KernelModel:
    """Time of an invocation on a GPU whose other invocations run beside it:

        seconds = group_seconds / group + max(slots / slot_rate, bytes / byte_rate)

    Issue slots and memory overlap, because other invocations compute while one waits, so the longer decides; that is
    the roofline. A work group costs `group_seconds` of the whole device besides, during which it does neither: it is
    begun and ended, and the first loads of a small group have nobody to hide behind. Shared by its invocations, this is
    what separates groups of 8 from groups of 16.

    slot_rate      issue slots a second, as stated (two of each lane and cycle): not fitted.
    byte_rate      of images while groups run: an effective figure, no ceiling. The published bandwidth of a whole
                   kernel has the groups' cost in it and is lower.
    """

    slot_rate: float
    byte_rate: float
    group_seconds: float

    def seconds(self, k: Kernel) -> float:
        return self.group_seconds / k.group + max(k.slots / self.slot_rate, k.bytes / self.byte_rate)

    def bound(self, k: Kernel) -> str:
        """What takes longest: "slots", "bytes" or "group"."""
        terms = {"slots": k.slots / self.slot_rate, "bytes": k.bytes / self.byte_rate,
                 "group": self.group_seconds / k.group}
        return max(terms, key=lambda t: terms[t])

    def error(self, k: Kernel) -> float:
        """The model's time over the measured, less 1."""
        return self.seconds(k) / k.seconds - 1


def solve(first: Kernel, second: Kernel, slot_rate: float) -> KernelModel:
    """The model that has both kernels' times exactly, both bound by memory: two linear equations in the two unknowns.

    Raises: InvariantError if memory does not bind both, or no positive parameters do it.
    """
    a, b, c, d = 1 / first.group, float(first.bytes), 1 / second.group, float(second.bytes)
    det = a * d - b * c
    group = (first.seconds * d - b * second.seconds) / det if det else 0.0
    each = (a * second.seconds - c * first.seconds) / det if det else 0.0
    if group <= 0 or each <= 0 or any(k.slots / slot_rate > k.bytes * each for k in (first, second)):
        raise InvariantError(f"the kernels '{first.name}' and '{second.name}' do not tell the model's parameters")
    return KernelModel(slot_rate, 1 / each, group)


def kernel_model(device: str) -> KernelModel:
    """Solved from the two kernels of the study whose role is "fit"; the others test it."""
    first, second = (k for k in kernels(device) if k.role == "fit")
    peak = next(c for c in published()[device].ceilings if c.resource == COMPUTE)
    return solve(first, second, peak.value)  # slots a second: the same number as operations, see published.toml


def highest(ceilings: Sequence[Ceiling]) -> Iterator[Ceiling]:
    """Of several figures of one resource, the one that limits: what one kernel reached is no limit of another."""
    for resource in dict.fromkeys((c.resource, c.numbers) for c in ceilings):
        yield max((c for c in ceilings if (c.resource, c.numbers) == resource), key=lambda c: c.value)
