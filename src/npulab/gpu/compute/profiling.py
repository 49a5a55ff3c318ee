"""How long the layers of a network take by the device's clock, and how long they must take at least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from npulab.gpu.ceilings import COMPUTE, Ceilings


@dataclass(frozen=True, slots=True)
class Timed:
    """Launches of one layer, named after the node that does the work. kernel: of its longest launch.

    seconds     of the median of each launch.       operations, traffic  as npulab.gpu.compute.types.Launch has them.
    """

    title: str
    operators: str
    kernel: str
    launches: int
    seconds: float
    operations: float
    traffic: float


@dataclass(frozen=True, slots=True)
class Profile:
    """layers: in order.     seconds: of all launches, in the median run.       runs: how many.
    wall: seconds from the first launch to the last one's end as the host saw them, median; uploads and downloads are
    not in it."""

    layers: tuple[Timed, ...]
    seconds: float
    wall: float
    runs: int


@dataclass(frozen=True, slots=True)
class Roof:
    """What a probe found: operations and bytes a second. None: refused, or not measured; `missing` says so of each."""

    operations: float | None
    bandwidth: float | None
    missing: tuple[str, ...] = ()

    def floor(self, x: Timed) -> tuple[float, Literal["compute", "memory", ""]]:
        """(least seconds of a layer, what bounds it); ("", 0) where nothing is known."""
        times: list[tuple[float, Literal["compute", "memory", ""]]] = [(0.0, "")]
        if self.operations:
            times.append((x.operations / self.operations, "compute"))
        if self.bandwidth:
            times.append((x.traffic / self.bandwidth, "memory"))
        return max(times)


def roof_of(ceilings: Ceilings) -> Roof:
    """float32 and memory, the highest of each."""
    rates = [c.value for c in ceilings.ceilings if c.resource == COMPUTE and c.numbers == "fp32"]
    widths = [c.value for c in ceilings.ceilings if c.resource == "DRAM"]
    why = {x.name: x.why for x in ceilings.left_out}
    missing = tuple(f"{name}: {why.get(name, 'not measured')}" for name, found in (
        ("fma float32 rate", rates), ("memory bandwidth", widths)) if not found)
    return Roof(max(rates, default=None), max(widths, default=None), missing)


def timed(steps: Sequence[tuple[str, str, str, float, float]], seconds: Sequence[float]) -> tuple[Timed, ...]:
    """`steps`: (title, operators, kernel, operations, traffic) of each launch. Those of one title together, in the
    order of the first."""
    found: dict[str, list[int]] = {}
    for i, s in enumerate(steps):
        found.setdefault(s[0], []).append(i)
    out = []
    for title, own in found.items():
        longest = max(own, key=lambda i: seconds[i])
        out.append(Timed(title, steps[own[0]][1], steps[longest][2], len(own), sum(seconds[i] for i in own),
                         sum(steps[i][3] for i in own), sum(steps[i][4] for i in own)))
    return tuple(out)
