"""The atlas: published times of networks on edge devices, with their sources, beside what the timing model says."""

from __future__ import annotations

from npulab.atlas.load import Conflict, conflicts, load, select
from npulab.atlas.types import Atlas, Row

__all__ = ["Atlas", "Conflict", "Row", "conflicts", "load", "select"]
