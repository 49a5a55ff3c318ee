"""What a pass is: one rewrite of an ONNX graph, with the rule that it applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from npulab.passes.rewrite import Rewrite

Apply = Callable[[Rewrite], list[str]]


@dataclass(frozen=True, slots=True)
class Pass:
    """`apply` changes the graph in place and says what, a line a change.

    exact   outputs stay what they are, up to the rounding of floats. What is not is done only when asked for by name.
    always  the graph is simpler for every target. What is not is done where a target needs it: at nodes that are
            `Rewrite.wanted`.
    number  the number that NAME=NUMBER replaces; None where a pass takes none.
    """

    name: str
    apply: Apply
    exact: bool = True
    always: bool = True
    number: int | None = None

    @property
    def rule(self) -> str:
        """What the pass does, in the words of its docstring."""
        return " ".join((self.apply.__doc__ or "").split())
