"""Findings beyond single operators, each with its reason, remedy and price.

    for_board     of a described board           for_chip, for_profile   of a chip that npulab compiles for
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from npulab.ir import Graph
from npulab.plan.types import Reason, Verdict
from npulab.profiling.types import Profile
from npulab.targets.facts.board import Board, Check, Finding
from npulab.targets.facts.costs import nbytes
from npulab.targets.facts.survey import Survey, descendants, survey

SHOWN = 3
"""Kinds, tensors or nodes that a sentence names."""
LAST = 0.25
"""A last round of channels that is filled up to this share is called nearly empty."""
WORTH = 0.01
"""Share of a network's multiply-accumulates from which on waste is told."""
SIZE_RULE = re.compile(r"\b(out_)?(height|width|channels|elements|shape)\b.*<|<=?\s*(out_)?(height|width|channels)\b")
"""Predicates that limit how large a tensor is."""
LANES = (("nn_core_count", "cores, which share the output channels"),
         ("channel_parallel", "channels, which the array computes at once"))
"""Facts that say how many output channels are computed together."""
STORES = (("weight_sram_kib", "weights"), ("data_sram_kib", "data"), ("kpu_sram_kib", "data"))
"""Facts that are KiB of a memory which must hold all weights, or what one operator reads and writes."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One finding. `nodes` it is about, by index; `command`: what does it, "" where npulab does not.

    kind  tail, quantize, ranges, image, channels, size, memory, nms, normalization, dynamic.
    """

    kind: str
    nodes: tuple[int, ...]
    found: str
    why: str
    remedy: str
    price: str
    source: str
    command: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One graph on one target. `facts` and `check` are those of a described board. `model`: the file, for commands."""

    known: Survey
    off: frozenset[int]
    target: str
    model: str
    assume: str = ""
    board: Board | None = None
    check: Check | None = None

    @property
    def graph(self) -> Graph:
        return self.known.graph

    def patch(self, name: str) -> str:
        """The command, if npulab has the pass and it takes this network: of a quantized one, only heads are cut."""
        whole = any(v.quantization is not None for v in self.graph.values)
        if name not in _passes() or (whole and name != "cut-head"):
            return ""
        as_ = f" --as {self.assume}" if self.assume else ""
        return f"npulab patch {shlex.quote(self.model)} --target {self.target}{as_} --pass {name} -o OUT"


def for_chip(graph: Graph, verdicts: Sequence[Verdict], target: str, model: str = "MODEL") -> tuple[Advice, ...]:
    """Advice for a chip that npulab compiles for, from its verdicts."""
    off = frozenset(v.node for v in verdicts if v.where != "npu")
    case = Case(survey(graph), off, target, model)
    return (*_tail(case), *_ranges(case), *_image(case), *_normalization(case), *_dynamic(case))


def for_profile(profile: Profile, model: str = "MODEL") -> tuple[Advice, ...]:
    """Convolutions of a compiled network whose output channels leave cores idle for a good part of their time."""
    found = []
    for row in profile.rows:
        idle = row.waste.get("cores", 0)
        if row.node is not None and row.macs and idle > LAST * row.macs and row.ns > WORTH * profile.total_ns:
            found.append((row.ns * idle / row.macs, row))
    found.sort(key=lambda p: -p[0])
    if not found:
        return ()
    shown = _few(f"node {row.node} ({row.shape}) idle for {100 * row.waste['cores'] / row.macs:.0f} %"
                 for _, row in found)
    return (Advice("channels", tuple(sorted(row.node for _, row in found if row.node is not None)), shown,
                   "Output channels are dealt out to the cores; a last round of few takes as long as a full one.",
                   "train with multiples of the cores", f"modelled: up to {sum(ns for ns, _ in found) / 1e6:.2f} ms of "
                   f"{profile.total_ns / 1e6:.2f} ms", "npulab's timing model, docs/timing.md",
                   f"npulab cliffs {shlex.quote(model)} --target {profile.target} --axis channels"),)


def for_board(case: Case, before: Check, dtype: str) -> Iterator[Advice]:
    """Everything about a described board. `before`: the check of the file as it is; `dtype`: the type that puts more on
    the NPU, or ""."""
    if dtype and case.check is not None:
        yield Advice("quantize", (), f"as the file has it {before.count('npu')} operators run on the NPU, as {dtype} "
                     f"{case.check.count('npu')} of {len(before.findings)}", "The NPU does not compute this type.",
                     f"quantize the network to {dtype} with the vendor's tool, on some hundred typical inputs",
                     "accuracy: measure it on labelled data", "the verdicts of both",
                     f"npulab check {shlex.quote(case.model)} --target {case.target} --as {dtype}")
    yield from _tail(case)
    yield from _ranges(case)
    yield from _nms(case)
    yield from _image(case)
    yield from _channels(case)
    yield from _size(case)
    yield from _memory(case)
    yield from _normalization(case)
    yield from _dynamic(case)


def _tail(case: Case) -> Iterator[Advice]:
    """What is off the NPU behind the last operators with weights. Of several heads the whole tail is cut, so that raw
    maps are left; else, and where suppression takes all of them in, before the first operator that does not run."""
    known, graph = case.known, case.graph
    off = case.off & known.tail
    if not off or len(case.off) == len(graph.nodes):
        return
    alone = bool(off & set(known.nms))
    least = len(known.heads) < 2 or alone
    cut = descendants(graph, off) & known.tail if least else known.tail
    at = known.entries(set(cut)) if least else known.heads
    if not at:
        return
    size = sum(nbytes(graph.values[v], case.assume) or 0 for v in at)
    rest = len(case.off - known.tail)
    yield Advice(
        "tail", tuple(sorted(cut)), f"{len(off)} of {len(case.off)} operators off the NPU lie behind the last ones "
        f"with weights: {_few(sorted({known.names[i] for i in off}))}",
        "What follows the last convolutions is little arithmetic on many numbers: the CPU does it as well, and a "
        "region of the NPU that waits for it in the middle is worse.",
        f"end the network at {_few(_short(graph.values[v].name) for v in at)} and compute what is behind on the CPU",
        f"{size} bytes of outputs, {len(cut)} {'operator' if len(cut) == 1 else 'operators'} for the CPU"
        + (f"; {rest} more stay off the NPU" if rest else ""), "npulab, from the graph",
        case.patch("cut-head") if len(at) > 1 else "")


def _ranges(case: Case) -> Iterator[Advice]:
    """Told of quantized data, and of data that will be quantized: the worst concatenation, and where the others are."""
    known, values = case.known, case.graph.values
    whole = "int" in case.assume or any(v.quantization for v in values)
    if not known.joints or not (whole or case.board is None or not _floats(case.board)):
        return
    worst = min(known.joints, key=lambda j: j.kept)
    (most, high), (least, low) = worst.inputs[0], worst.inputs[-1]
    left = f"{worst.kept:.3g}" if worst.kept >= 1 else "less than one"
    yield Advice(
        "ranges", tuple(j.node for j in known.joints), f"node {worst.node} joins {_short(values[most].name)}, up to "
        f"{high:.4g}, and {_short(values[least].name)}, up to {low:.4g}"
        + (f"; {len(known.joints) - 1} more are like it" if len(known.joints) > 1 else ""),
        f"In 8 bits a concatenation has one scale: of 256 steps the smaller range keeps {left}. Scores that share it "
        "with boxes in pixels become all alike.", "end the network before it: the parts keep scales of their own",
        "the concatenation and what follows it run on the CPU", "npulab, interval arithmetic over the graph",
        case.patch("cut-head") if len(known.heads) > 1 else "")


def _nms(case: Case) -> Iterator[Advice]:
    said = {"built-in": "the board's stack has it built in", "host": "the vendor's tool parses it, and the CPU runs it",
            "cut": "the vendor's tool does not take it"}
    if not case.known.nms or case.board is None or case.board.facts.nms not in said:
        return
    cut = case.board.facts.nms == "cut"
    yield Advice(
        "nms", case.known.nms, said[case.board.facts.nms], "Suppression of overlapping boxes has no fixed work: its "
        "loop runs as long as there are boxes.", "cut it off and run it behind the network" if cut else "leave it in",
        "its time on the CPU" if case.board.facts.nms != "built-in" else "none", case.board.title,
        case.patch("cut-head") if cut else "")


def _image(case: Case) -> Iterator[Advice]:
    i = case.known.image
    if i is None:
        return
    h, w = i.rounded
    yield Advice(
        "image", (), f"the input is {i.height}x{i.width}, and the network shrinks it by {i.stride}",
        "Each stride rounds up: the last row and column of the small maps see mostly padding, and maps that are "
        "enlarged again do not fit those that they join.",
        f"train or export it at {h}x{w}, unless it was made for this size with corners aligned",
        f"{100 * (h * w / (i.height * i.width) - 1):+.1f} % pixels", "npulab, strides of the graph")


def _channels(case: Case) -> Iterator[Advice]:
    """Convolutions whose last round of output channels is nearly empty."""
    known = case.known
    total = sum(known.macs.values())
    for key, lanes in LANES if case.board is not None and total else ():
        fact = case.board.facts.facts.get(key) if case.board is not None else None
        if case.board is None or fact is None or not isinstance(fact.value, int) or fact.value < 2:
            continue
        n, wasted, found = fact.value, 0.0, []
        for i, macs in known.macs.items():
            channels = known.properties[i].get("out_channels")
            if not channels or known.names[i] != "Conv" or not 0 < channels % n <= LAST * n or channels < n:
                continue
            wasted += macs * (-channels % n) / channels
            found.append((macs, i, channels))
        if wasted < WORTH * total:
            continue
        found.sort(reverse=True)
        shown = _few(f"node {i} has {c} channels, {c % n} over {c - c % n}" for _, i, c in found)
        yield Advice("channels", tuple(sorted(i for _, i, _ in found)), shown,
                     f"The chip has {n} {lanes}; a last round of few takes as long as a full one.",
                     f"train with multiples of {n}", f"idle slots: up to {100 * wasted / total:.1f} % of the network's "
                     "multiplications", case.board.facts.title(fact.source))


def _size(case: Case) -> Iterator[Advice]:
    """Rules about sizes of tensors that are broken, each with its nodes."""
    broken: dict[str, list[tuple[Finding, Reason]]] = {}
    for f in case.check.findings if case.check is not None else ():
        for r in f.reasons if f.where != "npu" else ():
            if SIZE_RULE.search(r.allowed):
                broken.setdefault(r.rule, []).append((f, r))
    for rule, found in broken.items():
        f, r = found[0]
        nodes = tuple(dict.fromkeys(f.node for f, _ in found))
        yield Advice(
            "size", nodes, f"{r.found} (node {f.node}" + (f", and {len(nodes) - 1} more)" if len(nodes) > 1 else ")"),
            rule, r.remedy or "a smaller input, or the tensor in parts", "in parts: rows that they share are computed "
            "twice", r.source, case.patch("split-channels" if "channels" in r.allowed else "split-rows"))


def _memory(case: Case) -> Iterator[Advice]:
    known, graph, board = case.known, case.graph, case.board
    on = [n for n in graph.nodes if n.index not in case.off]
    for key, what in STORES if board is not None and on else ():
        fact = board.facts.facts.get(key) if board is not None else None
        if board is None or fact is None or not isinstance(fact.value, int):
            continue
        if what == "weights":
            held = {w.index for n in on if n.index in known.macs
                    and (w := known.properties[n.index].weights) is not None}
            need, where = sum(nbytes(graph.values[v], case.assume) or 0 for v in held), ""
        else:
            sizes = {n.index: sum(nbytes(graph.values[v], case.assume) or 0 for v in {*n.inputs, *n.outputs}
                                  if v >= 0 and v not in known.fixed) for n in on}
            worst = max(sizes, key=lambda i: sizes[i])
            need, where = sizes[worst], f" at node {worst}"
        if need > 1024 * fact.value:
            yield Advice("memory", (), f"{need / 1024:.0f} KiB of {what}{where}",
                         f"The chip has {fact.value} KiB for {what}.", "a smaller network"
                         + (" or input" if what == "data" else ", or weights of fewer bits"),
                         "accuracy: measure it", board.facts.title(fact.source))


def _normalization(case: Case) -> Iterator[Advice]:
    if case.known.scaling:
        yield Advice(
            "normalization", case.known.scaling, _few(f"{case.known.names[i]} (node {i})" for i in case.known.scaling),
            "The network begins with the normalization of its pixels: it is work on the largest tensor, and a float "
            "input has four bytes a pixel.", "fold it into the first convolution, or give mean and scale to the "
            "vendor's converter, which does the same", "none", "npulab, from the graph",
            case.patch("fold-normalization"))


def _dynamic(case: Case) -> Iterator[Advice]:
    graph = case.graph
    names = [f"{graph.values[v].name}.{a}" for v in graph.inputs for a in graph.values[v].dynamic_axes if a]
    if names:
        sizes = " ".join(f"--dim {shlex.quote(n)}=SIZE" for n in names[:SHOWN] if len(n) <= 60)
        yield Advice("dynamic", (), f"no fixed size: {_few(map(_short, names))}",
                     "Rules about sizes cannot be decided, and most NPUs are compiled for fixed shapes.",
                     "give them sizes", "none", "npulab, from the graph",
                     f"npulab check {shlex.quote(case.model)} --target {case.target} {sizes}" if sizes else "")


@cache
def _passes() -> frozenset[str]:
    from npulab.passes.pipeline import PASSES

    return frozenset(p.name for p in PASSES)


def _floats(board: Board) -> bool:
    """Whether the board computes floats."""
    fact = board.facts.facts.get("dtypes")
    stated = fact.value if fact is not None and isinstance(fact.value, tuple) else ()
    return any("float" in str(t) for t in (*stated, *(t for e in board.facts.op for t in e.dtypes))) or not (
        stated or any(e.dtypes for e in board.facts.op))


def _few(texts: Iterable[str]) -> str:
    found = list(texts)
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"...{name[-57:]}"
