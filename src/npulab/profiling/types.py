"""Profile: where the time of one inference goes. Times are whole nanoseconds, so that sums are exact.

A Span is one piece of work that nothing else overlaps: a job, a host step, a transfer, a submission. What goes on at
the same time inside it are its terms: nanoseconds that each resource alone would need.

    time of a span = the longest of (macs | weights + activations | sram | tp)  +  launch + host + transfer

Weights and activations share the DRAM bus, so they add up; the rest of the first group runs beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["nn", "tp", "host", "transfer", "submit"]
"""nn, tp: a job of that engine. transfer: the CPU copies a tensor to or from NPU memory. submit: the kernel call."""

Term = Literal["macs", "weights", "activations", "sram", "tp", "launch", "host", "transfer"]
TERMS: tuple[Term, ...] = ("macs", "weights", "activations", "sram", "tp", "launch", "host", "transfer")

BOUND_NAMES: Mapping[str, str] = {
    "macs": "multiply-accumulates", "weights": "weight bytes from DRAM", "activations": "activation bytes from DRAM",
    "sram": "bytes of on-chip SRAM", "tp": "TP cores", "launch": "starting the job", "host": "host CPU",
    "transfer": "copies between host and NPU memory",
}


def span_ns(terms: Mapping[Term, int]) -> int:
    """Nanoseconds of a span with these terms; see the module's text."""
    get = terms.get
    together = max(get("macs", 0), get("weights", 0) + get("activations", 0), get("sram", 0), get("tp", 0))
    return together + get("launch", 0) + get("host", 0) + get("transfer", 0)


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work. Byte counts are by purpose: "weights", "input", "output"; "touched" counts each byte once.

    macs         multiply-accumulates that the engine has slots for in this time: those asked for, zeros that the
                 lowering put in, and lanes and cores that idle.
    macs_useful  those that the source operator asks for.
    waste        macs - macs_useful, by cause: "lowering" (zeros of a dense-lowered depthwise or padded kernel),
                 "lanes" (tile rows and columns that do not fill them), "cores" (kernels that do not fill the cores),
                 "slots" (taps that do not fill the multipliers of a lane).
    dram, sram   bytes moved, tiles that are read again counted again.
    touched      distinct bytes, as the virtual NPU counts them.
    """

    unit: Unit
    name: str
    nodes: tuple[int, ...]
    step: int
    job: int | None
    terms: Mapping[Term, int]
    macs: int = 0
    macs_useful: int = 0
    waste: Mapping[str, int] = field(default_factory=dict)
    dram: Mapping[str, int] = field(default_factory=dict)
    sram: Mapping[str, int] = field(default_factory=dict)
    touched: Mapping[str, int] = field(default_factory=dict)

    @property
    def ns(self) -> int:
        return span_ns(self.terms)

    @property
    def dram_bytes(self) -> int:
        return sum(self.dram.values())

    @property
    def sram_bytes(self) -> int:
        return sum(self.sram.values())


@dataclass(frozen=True, slots=True)
class Row:
    """One source operator: the sum of its spans. `node` None: work of no operator (a submission).

    unit         where it runs: "nn", "tp", "nn+tp", "host", "none" (nothing to do: a reshape), "transfer", "submit".
    bound        the Term that costs most, or "none" when ns is 0.
    terms        sums over the spans: what each resource alone would need, in ns. They do not add up to ns.
    gains        ns saved if that resource were free, all else unchanged.
    utilisation  macs_useful over the MACs the engine could have done in the row's time at its peak, 0 to 1.
    shape        for people: '112x112x32 -> 112x112x64, 3x3/1'.
    origin       the node that the operator was made from, of a model that came in another dialect.
    """

    node: int | None
    op: str
    shape: str
    unit: str
    ns: int
    bound: str
    terms: Mapping[Term, int]
    gains: Mapping[Term, int]
    macs: int
    macs_useful: int
    waste: Mapping[str, int]
    dram: Mapping[str, int]
    sram: Mapping[str, int]
    utilisation: float
    origin: str = ""

    @property
    def dram_bytes(self) -> int:
        return sum(self.dram.values())

    @property
    def sram_bytes(self) -> int:
        return sum(self.sram.values())


State = Literal["witnessed", "inferred", "assumed", "fitted", "stated", "set"]
"""What stands behind a number or a feature: seen in streams of a real driver; concluded from them; taken for want of
better; fitted to published latencies; stated by a named source; set by the user (a what-if)."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A number that the model uses. `value` in `unit`."""

    name: str
    value: float
    unit: str
    state: State
    source: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What the search chose for an operator, instead of what, and the nanoseconds that saves by the model."""

    node: int
    choice: str
    instead: str
    saved_ns: int
    feature: str
    state: State


@dataclass(frozen=True, slots=True)
class Profile:
    """Where one inference's time goes. Modelled, unless `witness` says measured.

    interval_ns  (low, high): the total is expected between them; how they are made is in docs/timing.md.
    peak_macs    multiply-accumulates per second that the NN cores have at most.
    constants    every number behind the times, with what stands behind it.
    features     options in use that no recorded stream shows -> their state.
    """

    model: str
    digest: str
    target: str
    title: str
    plan: str
    options: Mapping[str, str]
    spans: tuple[Span, ...]
    rows: tuple[Row, ...]
    interval_ns: tuple[int, int]
    peak_macs: float
    constants: tuple[Constant, ...]
    witness: str
    host: str
    features: Mapping[str, State] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()

    @property
    def total_ns(self) -> int:
        return sum(s.ns for s in self.spans)

    @property
    def dram_bytes(self) -> int:
        return sum(s.dram_bytes for s in self.spans)

    @property
    def sram_bytes(self) -> int:
        return sum(s.sram_bytes for s in self.spans)

    def constant(self, name: str) -> Constant:
        """The constant of that name: "dram_bandwidth" (B/s), "clock" (Hz), "sram_bandwidth" (B/s), ..."""
        return next(c for c in self.constants if c.name == name)
