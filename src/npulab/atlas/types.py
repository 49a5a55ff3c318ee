"""What a record of the atlas says. A key that is absent means that the source does not say it."""

from __future__ import annotations

from typing import Literal

import msgspec

from npulab.targets.target import Channels, PlanName, PlanOptions

Kind = Literal["latency", "throughput"]
Unit = Literal["us", "ms", "s", "fps", "img/s"]
Evidence = Literal["measured", "vendor claim", "forum", "talk", "estimate"]
"""measured: by the author, who says how. vendor claim: the maker of chip or software. forum: a user's report. talk: a
table in a talk, without method. estimate: computed by a tool, never run on the device."""

Comparable = Literal["same program", "same silicon, other compiler", "none"]
"""What the figure can say of our timing model: it timed the driver whose bytes plan reference repeats; it timed the
same chip under another compiler; nothing."""

Precision = Literal["int8", "uint8", "w8a16", "fp16", "fp32", "float"]
Included = Literal["device", "network", "pipeline"]
"""device: the accelerator's part. network: input tensor to output tensor, host operators too. pipeline: with pre- or
postprocessing."""

MS: dict[str, float] = {"us": 1e-3, "ms": 1.0, "s": 1e3}
"""Milliseconds in a unit of time."""


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Strict: a key that is not declared is refused."""


class Source(Record, frozen=True, kw_only=True):
    """Where figures were published. `date` of publication: year, month or day."""

    key: str
    title: str
    url: str
    date: str | None = None


class Model(Record, frozen=True, kw_only=True):
    """A network. `file`, `sha256`: the file that was timed, if it is known and public."""

    id: str
    title: str
    file: str | None = None
    sha256: str | None = None


class Device(Record, frozen=True, kw_only=True):
    """A chip or a board, by the name it goes under here."""

    name: str
    chip: str


class TimedProgram(Record, frozen=True, kw_only=True):
    """How npulab makes the program that the figure timed. The switches are those of PlanOptions."""

    plan: PlanName
    target: str = "a311d"
    zero_runs: bool = True
    channels: Channels = "any"
    kernel_cache: bool = True
    image_cache: bool = True

    def options(self) -> PlanOptions:
        return PlanOptions(self.zero_runs, self.channels, self.kernel_cache, self.image_cache)


class Row(Record, frozen=True, kw_only=True):
    """One published figure.

    id               never changes; other files name rows by it.
    model            id of the network; `published_as` is the source's name for it.
    input            of the image, height x width as far as the source tells them apart.
    threads, cores   of the host that feed the network; of the accelerator that run it.
    setup            what sets this figure apart from others of the same source: "before zero runs".
    value, unit      as published; `unit_inferred`: the source prints none. `approximate`: it says "about".
    range            the published range that this figure is an end of.
    program          set where npulab can make the program that was timed.
    same_program_as  a row with such a program, of which this is another figure: it is compared with the model once.
    """

    id: str
    device: str
    model: str
    kind: Kind
    value: float
    unit: Unit
    source: str
    evidence: Evidence
    engine: Literal["npu", "gpu", "cpu"] | None = None
    board: str | None = None
    stack: str | None = None
    published_as: str | None = None
    input: str | None = None
    precision: Precision | None = None
    batch: int | None = None
    threads: int | None = None
    cores: int | None = None
    setup: str | None = None
    unit_inferred: bool = False
    approximate: bool = False
    range: str | None = None
    included: Included | None = None
    date: str | None = None
    comparable: Comparable = "none"
    program: TimedProgram | None = None
    same_program_as: str | None = None
    note: str | None = None

    @property
    def ms(self) -> float | None:
        """Milliseconds of a latency. None for a throughput: its reciprocal is nobody's latency."""
        return round(self.value * MS[self.unit], 9) if self.kind == "latency" else None


class Atlas(Record, frozen=True, kw_only=True):
    """All rows, sorted by id, and what they name."""

    sources: tuple[Source, ...]
    models: tuple[Model, ...]
    devices: tuple[Device, ...]
    rows: tuple[Row, ...]

    def source(self, row: Row) -> Source:
        return next(s for s in self.sources if s.key == row.source)

    def network(self, row: Row) -> Model:
        return next(m for m in self.models if m.id == row.model)

    def chip(self, row: Row) -> str:
        return next(d.chip for d in self.devices if d.name == row.device)
