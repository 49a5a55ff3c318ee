"""The passes in the order in which they help each other, and running them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache

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
from npulab.passes.price import affordable
from npulab.passes.rewrite import Rewrite
from npulab.passes.shapes import inferred
from npulab.passes.types import Pass
from npulab.postprocess.types import Picture, Post, Stage

PASSES: tuple[Pass, ...] = (constants.PASS, identities.PASS, pads.PASS, batch_norm.PASS, branches.PASS, heads.PASS,
                            focus.PASS, pool_chain.PASS, *convolutions.PASSES, *transformers.PASSES,
                            *activations.PASSES)
ROUNDS = 8
"""Times that the passes run at most: one may make room for another."""
SWEEPS = 3
"""Times that a board's passes are tried: one may make what another clears."""
PAIRED = 128
"""Nodes off the NPU up to which pairs of passes are tried: with more, the search takes longer than it is worth."""
Off = Callable[[Graph], Collection[int]]
"""The nodes of a graph that a board does not take."""



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
            close = get_close_matches(name, known, 4, 0.4)
            raise UsageError(f"there is no pass '{name[:60]}'", **({"want": ", ".join(close)} if close else {}),
                             try_="npulab patch --list")
        numbers[name] = known[name].number
        if equals and (known[name].number is None or not number.isdecimal() or not 0 < int(number) < 1 << 16):
            raise UsageError(f"the pass '{name}' does not take '{number}'", want=(
                "no number" if known[name].number is None else f"{name}=NUMBER, for example {known[name].number}"))
        if equals:
            numbers[name] = int(number)
    return [replace(p, number=numbers[p.name]) for p in PASSES if p.name in numbers]


def run(graph: Graph, passes: Collection[Pass], off: Off | None = None) -> tuple[Graph, list[Change]]:
    """The graph behind these passes, again and again until nothing changes, and what they did.

    `off` gives the nodes that a board does not take: passes that are not for everyone leave the others alone.
    """
    done: list[Change] = []
    for _ in range(ROUNDS):
        before, stale = len(done), False
        for p in passes:
            if stale and not p.always:
                graph, stale = inferred(graph), False
            rewrite = Rewrite(graph, None if off is None or p.always else off(graph), p.number)
            if changes := applied(p, rewrite):
                graph, stale = rewrite.graph(), True
                done += changes
        if len(done) == before:
            break
        if stale:
            graph = inferred(graph)
    return graph, done


def applied(p: Pass, rewrite: Rewrite) -> list[Change]:
    """What the pass did to it."""
    return [Change(p.name, p.exact, text, rewrite.stage) for text in p.apply(rewrite)]


def patched(graph: Graph, asked: Collection[str] = (), off: Off | None = None, opset: int | None = None,
            leave: Collection[str] = ()) -> tuple[Graph, list[Change]]:
    """The graph made simpler, then changed by the passes that are `asked` for, and by those exact ones that leave fewer
    nodes off the NPU: `off` gives those that a board does not take.

    Such a pass must not leave a kind of operator off that was not off before: five operators fused into one that the
    board does not know either are no gain. Nor may it cost too much (`price`), or raise the graph above
    `opset`, the last version of ONNX's operators that the board's tools read; None where that is not known.
    `leave` are passes that do nothing unless they are asked for.

    Raises: UsageError for an unknown pass.
    """
    named = find_passes(asked)
    always = [p for p in PASSES if p.always and p.name not in leave]
    found, done = run(graph, [*always, *(p for p in named if not p.always)])
    if off is not None:
        names = {*leave, *(p.name for p in named)}
        others = [p for p in PASSES if p.exact and not p.always and p.name not in names]
        found, more = Search(off, always, opset).all(found, others)
        done += more
    if not done:
        return graph, done
    return read_onnx(to_onnx(found, shapes=False), graph.name), done


@dataclass(frozen=True)
class Trial:
    """A graph that passes made, the nodes that are off the NPU there, and the keys of those nodes of the graph before
    that were changed without being cleared."""

    graph: Graph
    changes: list[Change]
    off: frozenset[int]
    futile: frozenset[str]


class Search:
    """Which passes leave fewer nodes off a board's NPU."""

    def __init__(self, off: Off, always: Collection[Pass], opset: int | None) -> None:
        self.off = lru_cache(maxsize=4)(lambda graph: frozenset(off(graph)))
        self.always = always
        self.opset = opset

    def all(self, graph: Graph, passes: Collection[Pass]) -> tuple[Graph, list[Change]]:
        """Each pass in order, and again those that may find something in what others made."""
        done: list[Change] = []
        seen: dict[str, set[str]] = {}
        for _ in range(SWEEPS):
            before = len(done)
            for p in passes:
                left = self.off(graph)
                names = {key(graph, i) for i in left}
                if names <= seen.get(p.name, set()):
                    continue
                seen[p.name] = names
                if trial := self.best(graph, p):
                    graph, done = trial.graph, done + trial.changes
            if len(done) == before and (pair := self.pair(graph, passes)):
                graph, done = pair.graph, done + pair.changes
            if len(done) == before:
                break
        return graph, done

    def pair(self, graph: Graph, passes: Collection[Pass]) -> Trial | None:
        """The best of two passes of which neither is a gain, where the second takes up what the first leaves off."""
        left = {key(graph, i) for i in self.off(graph)}
        if len(left) > PAIRED:
            return None
        found: Trial | None = None
        for p in passes:
            one = self.trial(graph, p)
            names = {key(one.graph, i) for i in one.off} if one else set()
            if one is None or names <= left:
                continue
            for q in passes:
                two = self.trial(one.graph, q, frozenset(names & left)) if q is not p else None
                if two and self.gain(graph, two) and (found is None or len(two.off) < len(found.off)):
                    found = Trial(two.graph, one.changes + two.changes, two.off, frozenset())
        return found

    def best(self, graph: Graph, p: Pass) -> Trial | None:
        """What the pass makes of the graph, if that is a gain: only where it clears nodes, if that can be told."""
        trial = self.trial(graph, p)
        if trial is None:
            return None
        second = self.trial(graph, p, trial.futile) if trial.futile else None
        gains = [t for t in (second, trial) if t is not None and self.gain(graph, t)]
        return min(gains, key=lambda t: len(t.off), default=None)

    def trial(self, graph: Graph, p: Pass, futile: frozenset[str] = frozenset()) -> Trial | None:
        """What the pass, and passes for everyone, make of the graph; None if it finds nothing."""
        def wanted(g: Graph) -> set[int]:
            return {i for i in self.off(g) if key(g, i) not in futile}

        rewrite = Rewrite(graph, wanted(graph), p.number)
        changes = applied(p, rewrite)
        if not changes:
            return None
        other, more = run(inferred(rewrite.graph()), [*self.always, p], wanted)
        off = self.off(other)
        sources = rewrite.sources()
        still = {sources[name] for i in off if (name := other.nodes[i].name) in sources}
        return Trial(other, changes + more, off, frozenset(key(graph, i) for i in still & wanted(graph)))

    def gain(self, graph: Graph, trial: Trial) -> bool:
        left = self.off(graph)
        return (len(trial.off) < len(left) and _kinds(trial.graph, trial.off) <= _kinds(graph, left)
                and affordable(graph, trial.graph)
                and version(trial.graph) <= max(self.opset or 1 << 30, version(graph)))


def key(graph: Graph, node: int) -> str:
    """What a node is called by, also where it has no name."""
    n = graph.nodes[node]
    return n.name or next((graph.values[v].name for v in n.outputs if v >= 0), "")


def version(graph: Graph) -> int:
    """Of ONNX's own operators."""
    assert graph.header is not None
    return next((v for d, v in graph.header.opsets if d in ("", "ai.onnx")), 1)


def _kinds(graph: Graph, nodes: Collection[int]) -> set[str]:
    return {graph.nodes[i].op.name for i in nodes}


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
