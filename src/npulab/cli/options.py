"""Options that several verbs share."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from npulab.targets.target import PlanName


class Plan(enum.StrEnum):
    BEST = "best"
    REFERENCE = "reference"

    @property
    def plan_name(self) -> PlanName:
        return "best" if self is Plan.BEST else "reference"


ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A .tflite file.", show_default=False)]
TargetName = Annotated[str, typer.Option("--target", metavar="NAME", help="The chip; `npulab targets` lists them.")]
PlanOption = Annotated[Plan, typer.Option("--plan", help="best: npulab's own; reference: what the open driver does.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
