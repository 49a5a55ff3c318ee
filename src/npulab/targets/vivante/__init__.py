"""The Vivante (VeriSilicon VIP) family of NPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from npulab.targets.target import Target


def targets() -> dict[str, Target]:
    """Every chip of the family as a target, by name."""
    from npulab.targets.vivante.chips import CHIPS
    from npulab.targets.vivante.family import VivanteTarget

    return {name: VivanteTarget(chip) for name, chip in CHIPS.items()}
