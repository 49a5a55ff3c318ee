"""The passes in the order in which they help each other, and running them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from npulab.errors import UsageError
from npulab.exporters.onnx import to_onnx
from npulab.importers.onnx import read_onnx
from npulab.ir import Graph
from npulab.passes import (
    activations,
    batch_norm,
    branches,
    constants,
    convolutions,
    focus,
    heads,
    identities,
    pads,
    pool_chain,
    transformers,
)
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.postprocess.types import Picture, Post, Stage

PASSES: tuple[Pass, ...] = (constants.PASS, identities.PASS, pads.PASS, batch_norm.PASS, branches.PASS, heads.PASS,
                            focus.PASS, pool_chain.PASS, *convolutions.PASSES, *transformers.PASSES,
                            *activations.PASSES)
ROUNDS = 8
"""Times that the passes run at most: one may make room for another."""

GROWTH, SPARE = 2, 1 << 16
"""A pass that is not asked for by name may make constants so many times as large, and add these bytes for small ones:
weights with zeros filled in can outgrow what chips hold, and no verdict says so."""


@dataclass(frozen=True, slots=True)
class Change:
    """What one pass did in one place. `stage`: what it took off the end of the network."""

    name: str
    exact: bool
    text: str
    stage: Stage | None = None


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
                done += [Change(p.name, p.exact, text, rewrite.stage) for text in texts]
        if len(done) == before:
            break
        if stale:
            graph = _with_shapes(graph)
    return graph, done


def patched(graph: Graph, asked: Collection[str] = (), off: Callable[[Graph], Collection[int]] | None = None,
            ) -> tuple[Graph, list[Change]]:
    """The graph made simpler, then changed by the passes that are `asked` for, and by those exact ones that leave fewer
    nodes off the NPU: `off` gives those that a board does not take.

    Such a pass must not leave a kind of operator off that was not off before: five operators fused into one that the
    board does not know either are no gain. Nor may it make the constants `GROWTH` times as large.

    Raises: UsageError for an unknown pass.
    """
    named = find_passes(asked)
    always = [p for p in PASSES if p.always]
    graph, done = run(graph, [*always, *(p for p in named if not p.always)])
    names = {p.name for p in named}
    left = set(off(graph)) if off else set()
    for p in PASSES:
        if not left or not off:
            break
        if p.always or not p.exact or p.name in names or not p.apply(Rewrite(graph, left, p.number)):
            continue
        other, changes = run(graph, [p, *always], off)
        still = set(off(other))
        if changes and len(still) < len(left) and _kinds(other, still) <= _kinds(graph, left) \
                and _constants(other) <= GROWTH * _constants(graph) + SPARE:
            graph, left = other, still
            done += changes
    return graph, done


def _kinds(graph: Graph, nodes: Collection[int]) -> set[str]:
    return {graph.nodes[i].op.name for i in nodes}


def _constants(graph: Graph) -> int:
    """Bytes of them."""
    return sum(len(v.constant or b"") for v in graph.values)


def post_of(before: Graph, after: Graph, changes: Collection[Change]) -> Post | None:
    """What gives the outputs of `before` from those of `after`; None if nothing was taken off."""
    stages = tuple(c.stage for c in changes if c.stage is not None)[::-1]  # the last one cut comes first
    if not stages:
        return None
    outputs = (before.values[v] for v in before.outputs)
    body = {after.values[v].name: after.values[v].shape for v in after.outputs}
    return Post(model=before.name, digest=before.digest, picture=picture(before), body=body,
                outputs=tuple(v.name for v in outputs), quantization={}, stages=stages)


def picture(graph: Graph) -> Picture | None:
    """The one input that takes an image, if there is one: three channels, last in TFLite, before the sizes in ONNX."""
    found = []
    for v in (graph.values[i] for i in graph.inputs):
        if len(v.shape) == 4 and v.shape[0] == 1 and v.shape[3 if graph.format == "tflite" else 1] in (1, 3):
            h, w = v.shape[1:3] if graph.format == "tflite" else v.shape[2:]
            found.append(Picture(name=v.name, height=h, width=w))
    return found[0] if len(found) == 1 else None


def _with_shapes(graph: Graph) -> Graph:
    """The graph with all its shapes inferred anew: what was folded may have made them fixed."""
    return read_onnx(to_onnx(graph, shapes=False), graph.name)
