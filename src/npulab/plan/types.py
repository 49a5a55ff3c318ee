"""What a check says of each node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a node is not for the NPU: the rule, what was found, where the rule comes from, what would make it legal."""

    rule: str
    found: str
    source: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.rule} Found: {self.found}."
        return f"{text} Try: {self.remedy}." if self.remedy else text


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where a node runs. `reasons` is empty for the NPU."""

    node: int
    op: str
    where: str
    reasons: tuple[Reason, ...]
