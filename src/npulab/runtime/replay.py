"""What the execution of a recorded case gives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplayedOutput:
    """One output tensor of one subgraph, against the reference."""

    subgraph: int
    tensor: int
    max_abs_diff: int
    mismatched: int
    elements: int


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay gave. Differences are of bytes; faults as text, empty if every stream ran to its end."""

    outputs: tuple[ReplayedOutput, ...]
    faults: tuple[str, ...]
    jobs: int

    @property
    def max_abs_diff(self) -> int:
        return max((o.max_abs_diff for o in self.outputs), default=0)

    @property
    def mismatched(self) -> int:
        return sum(o.mismatched for o in self.outputs)

    @property
    def elements(self) -> int:
        return sum(o.elements for o in self.outputs)
