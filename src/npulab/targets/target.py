"""What a target must offer, and how one is found: each family is a folder here with a function `targets`."""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import TYPE_CHECKING, Literal, Protocol

from npulab.errors import UsageError

if TYPE_CHECKING:
    from npulab.ir import Graph
    from npulab.plan.types import Verdict
    from npulab.program.types import Program
    from npulab.runtime.device import Device
    from npulab.runtime.replay import ReplayResult

PlanName = Literal["reference", "best"]


class Target(Protocol):
    """One chip that npulab compiles for."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    def check(self, graph: Graph, plan: PlanName) -> list[Verdict]:
        """Per node: NPU or host, with every reason."""

    def support_table(self) -> list[tuple[str, str, str]]:
        """(operator, rule, source) of every declared constraint."""

    def compile(self, graph: Graph, plan: PlanName, keep_all: bool = False) -> Program:
        """Partition, lower, plan and encode. `keep_all` brings back every tensor the NPU computes (plan best)."""

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
