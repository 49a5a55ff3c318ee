"""The passes in the order in which they help each other, and running them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

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
    """The passes of these names, in the order in which they run. Raises UsageError for an unknown one."""
    known = {p.name: p for p in PASSES}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no pass '{name}'", want=", ".join(known))
    return [p for p in PASSES if p.name in names]


def run(graph: Graph, passes: Collection[Pass]) -> tuple[Graph, list[Change]]:
    """The graph behind these passes, again and again until nothing changes, and what they did."""
    done: list[Change] = []
    for _ in range(ROUNDS):
        before = len(done)
        for p in passes:
            rewrite = Rewrite(graph)
            if texts := p.apply(rewrite):
                graph = rewrite.graph()
                done += [Change(p.name, p.exact, text) for text in texts]
        if len(done) == before:
            break
        graph = _with_shapes(graph)
    return graph, done


def patched(graph: Graph, asked: Collection[str] = (), misfits: Callable[[Graph], int] | None = None,
            ) -> tuple[Graph, list[Change]]:
    """The graph made simpler, then changed by the passes that are `asked` for, and by those exact ones that leave fewer
    nodes off the NPU: `misfits` counts those.

    Raises: UsageError for an unknown pass.
    """
    named = find_passes(asked)
    always = [p for p in PASSES if p.always]
    graph, done = run(graph, [*always, *(p for p in named if not p.always)])
    for p in PASSES if misfits else ():
        if p.always or not p.exact or p in named:
            continue
        other, changes = run(graph, [p, *always])
        if changes and misfits and misfits(other) < misfits(graph):
            graph = other
            done += changes
    return graph, done


def _with_shapes(graph: Graph) -> Graph:
    """The graph with all its shapes inferred anew: what was folded may have made them fixed."""
    return read_onnx(to_onnx(graph, shapes=False), graph.name)
