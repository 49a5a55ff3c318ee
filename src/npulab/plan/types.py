"""What a check says of each node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a node is not for the NPU: the rule, what was found, where the rule comes from, what would make it legal.

    `allowed` is what the rule allows where that can be said apart from it: "int8, float16", a predicate.
    """

    rule: str
    found: str
    source: str
    remedy: str = ""
    allowed: str = ""

    def __str__(self) -> str:
        text = f"{self.rule} Found: {self.found}."
        return f"{text} Try: {self.remedy}." if self.remedy else text


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where a node runs. `reasons` is empty for the NPU.

    `where`: "npu"; "host"; "refused", the vendor's tool does not take it; "unknown", nothing that is published says.
    """

    node: int
    op: str
    where: str
    reasons: tuple[Reason, ...]
