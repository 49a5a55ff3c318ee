"""The passes in the order in which they help each other, and running them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from npulab.errors import UsageError
from npulab.exporters.onnx import to_onnx
from npulab.importers.onnx import read_onnx
from npulab.ir import Graph
from npulab.passes import batch_norm, branches, constants, focus, identities, pads, pool_chain, silu
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

PASSES: tuple[Pass, ...] = (constants.PASS, identities.PASS, pads.PASS, batch_norm.PASS, branches.PASS, focus.PASS,
                            pool_chain.PASS, silu.RELU, silu.HARD_SWISH)
ROUNDS = 8
"""Times that the passes run at most: one may make room for another."""


@dataclass(frozen=True, slots=True)
class Change:
    """What one pass did in one place."""

    name: str
    exact: bool
    text: str


def find_passes(names: Collection[str]) -> list[Pass]:
    """The passes of these names ("pad-channels", "pad-channels=16"), in the order in which they run.

    Raises: UsageError for an unknown one, and for a number that a pass does not take.
    """
    known = {p.name: p for p in PASSES}
    numbers: dict[str, int | None] = {}
    for text in names:
        name, equals, number = text.partition("=")
        if name not in known:
            raise UsageError(f"there is no pass '{name}'", want=", ".join(known))
        numbers[name] = known[name].number
        if equals and (known[name].number is None or not number.isdecimal() or not 0 < int(number) < 1 << 16):
            raise UsageError(f"the pass '{name}' does not take '{number}'", want=(
                "no number" if known[name].number is None else f"{name}=NUMBER, for example {known[name].number}"))
        if equals:
            numbers[name] = int(number)
    return [replace(p, number=numbers[p.name]) for p in PASSES if p.name in numbers]


def run(graph: Graph, passes: Collection[Pass], off: Callable[[Graph], Collection[int]] | None = None,
        ) -> tuple[Graph, list[Change]]:
    """The graph behind these passes, again and again until nothing changes, and what they did.

    `off` gives the nodes that a board does not take: passes that are not for everyone leave the others alone.
    """
    done: list[Change] = []
    for _ in range(ROUNDS):
        before, stale = len(done), False
        for p in passes:
            if stale and not p.always:
                graph, stale = _with_shapes(graph), False
            rewrite = Rewrite(graph, None if off is None or p.always else off(graph), p.number)
            if texts := p.apply(rewrite):
                graph, stale = rewrite.graph(), True
                done += [Change(p.name, p.exact, text) for text in texts]
        if len(done) == before:
            break
        if stale:
            graph = _with_shapes(graph)
    return graph, done


def patched(graph: Graph, asked: Collection[str] = (), off: Callable[[Graph], Collection[int]] | None = None,
            ) -> tuple[Graph, list[Change]]:
    """The graph made simpler, then changed by the passes that are `asked` for, and by those exact ones that leave fewer
    nodes off the NPU: `off` gives those that a board does not take.

    Raises: UsageError for an unknown pass.
    """
    named = find_passes(asked)
    always = [p for p in PASSES if p.always]
    graph, done = run(graph, [*always, *(p for p in named if not p.always)])
    names = {p.name for p in named}
    for p in PASSES if off else ():
        if p.always or not p.exact or p.name in names:
            continue
        other, changes = run(graph, [p, *always], off)
        if changes and off and len(off(other)) < len(off(graph)):
            graph = other
            done += changes
    return graph, done


def _with_shapes(graph: Graph) -> Graph:
    """The graph with all its shapes inferred anew: what was folded may have made them fixed."""
    return read_onnx(to_onnx(graph, shapes=False), graph.name)
