"""What a target must offer, and how one is found: each family is a folder here with a function `targets`."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from npulab.errors import UsageError

if TYPE_CHECKING:
    from npulab.ir import Graph
    from npulab.plan.types import Verdict
    from npulab.profiling.types import Constant, Span
    from npulab.program.types import Program
    from npulab.quantization.types import Rules
    from npulab.runtime.device import Device
    from npulab.runtime.replay import ReplayResult

PlanName = Literal["reference", "best"]
Channels = Literal["any", "multiple-of-cores"]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a plan may use. The defaults are the plan's own; each switch takes a step of the open driver's history back.

    zero_runs     runs of zero weights are compressed.
    channels      convolutions the NPU takes, by output channels; "multiple-of-cores" leaves the others to the host.
    kernel_cache  coefficients are kept in on-chip SRAM.
    image_cache   input tiles that are read several times are kept in on-chip SRAM.
    features      names of features that no recorded stream shows, which plan best may use.
    search_log    a file that the search writes its answers to, and takes them from when it runs again.
    """

    zero_runs: bool = True
    channels: Channels = "any"
    kernel_cache: bool = True
    image_cache: bool = True
    features: frozenset[str] = frozenset()
    search_log: str | None = field(default=None, compare=False)

    def as_text(self) -> dict[str, str]:
        """The options that are not default, by their names on the command line."""
        switches = {"no-zero-runs": not self.zero_runs, "no-kernel-cache": not self.kernel_cache,
                    "no-image-cache": not self.image_cache}
        out = {name: "on" for name, on in switches.items() if on}
        if self.channels != "any":
            out["channels"] = self.channels
        if self.features:
            out["features"] = ",".join(sorted(self.features))
        return out


Settings = Mapping[str, float]
"""What a what-if changes: "dram_bandwidth" (B/s), "clock" (Hz), "sram" (B), "nn_cores". Any subset."""
SETTINGS = ("dram_bandwidth", "clock", "sram", "nn_cores")


@dataclass(frozen=True, slots=True)
class Prediction:
    """The modelled time of a published row. `role`: whether the model's constants were fitted to it."""

    ms: float
    interval_ms: tuple[float, float]
    role: Literal["fit", "test"]


@dataclass(frozen=True, slots=True)
class Timing:
    """A program's spans in the order in which they run, and what stands behind their times (profile.types)."""

    spans: tuple[Span, ...]
    interval_ns: tuple[int, int]
    peak_macs: float
    constants: tuple[Constant, ...]
    host: str
    witness: str


class Target(Protocol):
    """One chip that npulab compiles for."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def features(self) -> Mapping[str, str]:
        """What plan best may use when asked by name, as no recorded stream shows it: name -> what it is."""

    def with_settings(self, settings: Settings) -> Target:
        """The same chip with other numbers, for what-ifs. Raises UsageError for settings that no chip can have."""

    def check(self, graph: Graph, plan: PlanName, options: PlanOptions = PlanOptions()) -> list[Verdict]:
        """Per node: NPU or host, with every reason."""

    def support_table(self) -> list[tuple[str, str, str]]:
        """(operator, rule, source) of every declared constraint."""

    def rules(self) -> Rules:
        """What the chip takes of a network of integers."""

    def compile(self, graph: Graph, plan: PlanName, keep_all: bool = False,
                options: PlanOptions = PlanOptions()) -> Program:
        """Partition, lower, plan and encode. `keep_all` brings back every tensor the NPU computes (plan best)."""

    def timing(self, program: Program) -> Timing:
        """How long the program takes on this chip, by the model."""

    def predict(self, row: str) -> Prediction | None:
        """The modelled time of a published row that a program of ours stands for; None: it is of something else."""

    def device(self) -> Device:
        """A virtual NPU of this chip."""

    def replay(self, case: str | os.PathLike[str]) -> ReplayResult:
        """Execute a recorded case of this chip's driver on the virtual NPU."""

    def disassemble(self, program: Program) -> str:
        """The program's command words, descriptors and origins as text."""


def find_target(name: str) -> Target:
    """The target called `name`. Raises UsageError listing the known ones."""
    known = all_targets()
    if name not in known:
        raise UsageError(f"there is no target '{name}'", want=", ".join(sorted(known)))
    return known[name]


def all_targets() -> dict[str, Target]:
    """Every target of every family folder, by name."""
    import npulab.targets as home

    found: dict[str, Target] = {}
    for module in pkgutil.iter_modules(home.__path__):
        if module.ispkg and module.name != "facts":
            found.update(importlib.import_module(f"npulab.targets.{module.name}").targets())
    return found
