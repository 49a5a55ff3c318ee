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
DimOption = Annotated[list[str] | None, typer.Option(
    "--dim", metavar="NAME=SIZE", show_default=False,
    help="Size of a dynamic dimension of an ONNX model, by its name or as INPUT.AXIS; once for each.")]


def parse_dims(texts: list[str] | None) -> dict[str, int]:
    """['height=320', 'images.3=640'] -> sizes by name. Raises UsageError for anything else."""
    from npulab.errors import UsageError

    found: dict[str, int] = {}
    for text in texts or ():
        name, equals, size = text.rpartition("=")
        if not name or not equals or not size.isdecimal() or not 1 <= int(size) < 2**31:
            raise UsageError(f"--dim {text} is not NAME=SIZE", want="such as height=320")
        if found.get(name, int(size)) != int(size):
            raise UsageError(f"--dim gives {name} two sizes", got=f"{found[name]} and {size}")
        found[name] = int(size)
    return found
