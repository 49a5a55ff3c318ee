"""Cliffs: sizes from which on a network, or one of its operators, takes more time than its size explains.

    walk      sizes, a way to measure one  -> points and the cliffs between them
    by_resolution, by_channels             walks over a model's input images, or the channels of its convolutions

Time is counted for each pixel of the input, or each channel. A cliff lies where one step in size

- makes that of one operator jump by `factor`, if the excess comes to `SHARE` of the network's time;
- makes that of the whole walk (the network, or the one convolution) jump by `slack(factor)`, which is a tenth of it;
- takes an operator from the NPU, or ends what can be compiled at all.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from npulab.errors import CapacityError, UnsupportedError, UsageError
from npulab.profiling.types import BOUND_NAMES, Span, Term

if TYPE_CHECKING:
    from npulab.ir import Graph
    from npulab.profiling.types import Profile
    from npulab.targets.target import PlanName, PlanOptions, Settings

FACTOR = 1.25
SHARE = 0.01
DOUBLE = 2.0
"""A jump that is marked."""
MOST = 60
"""Compilations of one search."""
WORTH_A_LOOK = 0.5
"""Suspicion from which on an interval is divided: a cliff is diluted in it."""
SIZE_MAX = 65535

WASTE_NAMES = {"cores": "idle cores", "lanes": "idle lanes", "lowering": "zeros", "slots": "idle slots"}

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Part:
    """One operator at one size: its spans, and the rules that keep it on the host."""

    node: int
    op: str
    spans: tuple[Span, ...]
    reasons: tuple[str, ...] = ()

    @property
    def ns(self) -> int:
        return sum(s.ns for s in self.spans)

    @property
    def on_host(self) -> bool:
        return any(s.unit == "host" for s in self.spans)

    @property
    def bound(self) -> Term:
        """What most of the time goes to."""
        total: dict[Term, int] = {}
        for s in self.spans:
            for name, ns in s.terms.items():
                total[name] = total.get(name, 0) + ns
        bus: tuple[Term, Term] = ("weights", "activations")
        shared = sum(total.get(t, 0) for t in bus)
        alone: Term = max((t for t in total if t not in bus), key=lambda t: total[t], default="activations")
        return alone if total.get(alone, 0) > shared else max(bus, key=lambda t: total.get(t, 0))

    @property
    def kind(self) -> tuple[object, ...]:
        """What does not change as long as the operator is computed in the same way."""
        return self.on_host, self.bound, len(self.spans), *(round(_reads(self, s)) for s in ("weights", "input"))


@dataclass(frozen=True, slots=True)
class Point:
    """One size. `work` is what time is counted for: pixels or channels. `problem`: why there is no time (ns is 0)."""

    size: int
    work: int
    ns: int
    parts: Mapping[int, Part]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Cliff:
    """Between two sizes. `node` None: the network as a whole. `jump`: of the time for each pixel or channel.

    `exact`: there is no size in between; else the search ended before it looked there.
    """

    node: int | None
    op: str
    low: int
    high: int
    before_ns: int
    after_ns: int
    jump: float
    excess_ns: int
    kind: Literal["time", "host", "none"]
    why: str
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Walk:
    """The points of one axis, by size, and the cliffs, the most expensive first. `skipped`: sizes not looked at."""

    title: str
    points: tuple[Point, ...]
    cliffs: tuple[Cliff, ...]
    skipped: int


def slack(factor: float) -> float:
    """The jump of a whole that counts: 1.25 -> 1.025. Many operators take part in it, or one with nothing beside it."""
    return 1 + (factor - 1) / 10


def walk(title: str, sizes: Sequence[int], coarse: Iterable[int], measure: Callable[[int], Point], most: int = MOST,
         factor: float = FACTOR) -> Walk:
    """Measure at most `most` of `sizes` (rising): all if they are that few, else the `coarse` ones first, then the
    middle of the interval that most looks like a cliff, over and over.
    """
    if len(sizes) <= most:
        points = {i: measure(n) for i, n in enumerate(sizes)}
    else:
        places = {n: i for i, n in enumerate(sizes)}
        points = {}
        for n in coarse:
            if n in places and len(points) < most:
                points[places[n]] = measure(n)
        while len(points) < most:
            open_ = [(i, j) for i, j in pairwise(sorted(points)) if j > i + 1]
            scores = suspicions([(points[i], points[j]) for i, j in open_], factor)
            score, _, i, j = max((score, j - i, i, j) for score, (i, j) in zip(scores, open_, strict=True)) if open_ \
                else (0.0, 0, 0, 0)
            if score < WORTH_A_LOOK:
                break
            points[(i + j) // 2] = measure(sizes[(i + j) // 2])
    done = sorted(points)
    found: list[Cliff] = []
    for i, j in pairwise(done):
        found += cliffs_between(points[i], points[j], factor, j == i + 1)
    found.sort(key=lambda c: (c.kind == "time", -c.excess_ns))
    return Walk(title, tuple(points[i] for i in done), tuple(found), len(sizes) - len(points))


def suspicions(intervals: Sequence[tuple[Point, Point]], factor: float) -> list[float]:
    """How much each interval looks as if it held a cliff, from 1 on as much as one that is reported.

    Two signs: time for each unit of work at its end against that at its start; and what a unit more costs in it against
    the intervals on both sides, which shows a step that falling shares of a fixed cost hide.
    """
    return [max(_jumps(a, b, factor), min((_steeper(a, b, *other, factor) for k in (i - 1, i + 1)
                                           if 0 <= k < len(intervals) and not any(p.problem for p in intervals[k])
                                           for other in [intervals[k]]), default=0.0))
            for i, (a, b) in enumerate(intervals)]


def _jumps(a: Point, b: Point, factor: float) -> float:
    if a.problem or b.problem:
        return 0.0 if a.problem and b.problem else math.inf
    growth = b.work / a.work
    score = (b.ns / max(1.0, a.ns * growth) - 1) / (slack(factor) - 1)
    for node in a.parts.keys() & b.parts.keys():
        before, after = a.parts[node], b.parts[node]
        if after.on_host != before.on_host:
            return math.inf
        score = max(score, (after.ns - before.ns * growth) / max(1, b.ns) / SHARE)
        if after.kind != before.kind and after.ns >= 5 * SHARE * b.ns:
            score = max(score, WORTH_A_LOOK)
    return score


def _steeper(a: Point, b: Point, c: Point, d: Point, factor: float) -> float:
    """The score of what a -> b costs beyond the rate of c -> d, as a share of the time of b."""
    if a.problem or b.problem:
        return 0.0
    ratio = (b.work - a.work) / max(1, d.work - c.work)
    score = (b.ns - a.ns - (d.ns - c.ns) * ratio) / max(1, b.ns) / (slack(factor) - 1)
    for node in a.parts.keys() & b.parts.keys() & c.parts.keys() & d.parts.keys():
        extra = b.parts[node].ns - a.parts[node].ns - (d.parts[node].ns - c.parts[node].ns) * ratio
        if extra >= (factor - 1) * a.parts[node].ns:
            score = max(score, extra / max(1, b.ns) / SHARE)
    return score


def cliffs_between(a: Point, b: Point, factor: float = FACTOR, exact: bool = True) -> list[Cliff]:
    """The cliffs from one point to the next."""
    if a.problem:
        return []
    if b.problem:
        return [Cliff(None, "", a.size, b.size, a.ns, 0, math.inf, 0, "none", b.problem, exact)]
    growth = b.work / a.work
    alone = len(b.parts) == 1  # the whole is this operator
    found: list[Cliff] = []
    for node, after in b.parts.items():
        before = a.parts.get(node)
        if before is None:
            continue
        jump, excess = after.ns / max(1.0, before.ns * growth), round(after.ns - before.ns * growth)
        leaves = after.on_host and not before.on_host
        if leaves or (jump >= (slack(factor) if alone else factor) and excess >= SHARE * b.ns):
            found.append(Cliff(node, after.op, a.size, b.size, before.ns, after.ns, jump, excess,
                               "host" if leaves else "time", why(before, after), exact))
    jump, excess = b.ns / max(1.0, a.ns * growth), round(b.ns - a.ns * growth)
    if not alone and jump >= slack(factor) and 2 * sum(c.excess_ns for c in found) < excess:
        found.append(Cliff(None, "", a.size, b.size, a.ns, b.ns, jump, excess, "time", _contributors(a, b), exact))
    return found


def why(before: Part, after: Part) -> str:
    """What changed in how an operator is computed."""
    if after.on_host and not before.on_host:
        first, *others = after.reasons or ("the host runs it",)
        return f"leaves the NPU: {first}{f' And {len(others)} more.' if others else ''}"
    said: list[str] = []
    if len(after.spans) != len(before.spans):
        said.append(f"{len(before.spans)} jobs become {len(after.spans)}" if len(before.spans) != 1 else
                    f"1 job becomes {len(after.spans)}")
    for side in ("weights", "input"):
        a, b = _reads(before, side), _reads(after, side)
        if a and b > 1.1 * a:
            kept = _sum(before, "sram", side) and not _sum(after, "sram", side)
            said.append(f"{side} read {a:.3g} -> {b:.3g} times from DRAM"
                        + (", no longer kept on chip" if kept else ""))
    for cause, name in WASTE_NAMES.items() if after.bound == "macs" else ():
        a, b = (_sum(p, "waste", cause) / max(1, sum(s.macs for s in p.spans)) for p in (before, after))
        if b > a + 0.02:
            said.append(f"{name} {a:.0%} -> {b:.0%}")
    shapes = [max(p.spans, key=lambda s: s.ns).name.split(" -> ") if p.spans else [""] for p in (before, after)]
    if not said and len(shapes[0]) > 1 and shapes[0][0] != shapes[1][0]:
        said.append(f"{shapes[0][0]} becomes {shapes[1][0]}")
    bound = f"bound by {BOUND_NAMES[after.bound]}"
    if before.bound != after.bound:
        bound += f", before by {BOUND_NAMES[before.bound]}"
    return "; ".join([*said, bound])


def _reads(part: Part, side: str) -> float:
    """How often each byte of the weights, or the input, is read from DRAM."""
    touched = _sum(part, "touched", side)
    return _sum(part, "dram", side) / touched if touched else 0.0


def _sum(part: Part, counts: Literal["dram", "sram", "touched", "waste"], name: str) -> int:
    return sum(getattr(s, counts).get(name, 0) for s in part.spans)


def _contributors(a: Point, b: Point) -> str:
    growth = b.work / a.work
    excess = {n: p.ns - a.parts[n].ns * growth for n, p in b.parts.items() if n in a.parts}
    more = sorted((n for n, ns in excess.items() if ns > 0), key=lambda n: -excess[n])
    if not more:
        return "work beside the operators"
    n = more[0]
    return (f"{len(more)} operators take more, most of all {b.parts[n].op} (node {n}), {a.parts[n].ns / 1e6:.3f} -> "
            f"{b.parts[n].ns / 1e6:.3f} ms: {why(a.parts[n], b.parts[n])}")


# the two axes


def by_resolution(graph: Graph, target: str, plan: PlanName = "best", options: PlanOptions | None = None,
                  settings: Settings | None = None, limits: tuple[int, int, int | None] | None = None,
                  most: int = MOST, factor: float = FACTOR, progress: Progress = lambda _: None) -> list[Walk]:
    """One walk over the height of the input images; the width keeps its proportion. Nodes keep their numbers.

    `limits` are (lowest, highest, step) of the height; without them half to double of the model's own. Without a step
    it is the smallest power of two, up to 64, that the network can follow.

    Raises: UsageError for limits that hold no two sizes; UnsupportedError if the network cannot follow any size.
    """
    from npulab.passes.resize import input_size, kept_nodes, with_input_size

    height, width = input_size(graph)
    lowest, highest, step = limits or (max(1, height // 2), 2 * height, None)
    _check(lowest, highest, step, most)

    def wide(n: int) -> int:
        """In proportion, and as far as the height and the model's own width are, a multiple of powers of two."""
        unit = min(n & -n, width & -width, 32)
        return max(1, round(n * width / height / unit)) * unit

    if step is None:
        step = _smallest_step(lambda k: with_input_size(graph, (height // k + 1) * k, wide((height // k + 1) * k)))
        sizes = [n for n in range(lowest, highest + 1) if n % step == 0]
    else:
        sizes = list(range(lowest, highest + 1, step))
    _at_least_two(sizes, lowest, highest, step)
    numbers = kept_nodes(graph)

    def measure(n: int) -> Point:
        work = n * wide(n)
        try:
            resized = with_input_size(graph, n, wide(n))
            found = _profile(resized, target, plan, options, settings)
        except (UnsupportedError, CapacityError) as e:
            progress(f"{n}x{wide(n)}: {e.message}")
            return Point(n, work, 0, {}, e.message)
        progress(f"{n}x{wide(n)}: {found.total_ns / 1e6:.3f} ms")
        parts = _parts(found, numbers)
        if any(p.on_host for p in parts.values()):
            parts = _with_reasons(parts, resized, numbers, target, plan, options, settings)
        return Point(n, work, found.total_ns, parts)

    return [walk(f"{graph.name}, input height", sizes, _coarse(sizes, _total_stride(graph), most, height), measure,
                 most, factor)]


def by_channels(graph: Graph, target: str, plan: PlanName = "best", options: PlanOptions | None = None,
                settings: Settings | None = None, limits: tuple[int, int, int | None] | None = None, most: int = MOST,
                factor: float = FACTOR, progress: Progress = lambda _: None, nodes: Sequence[int] | None = None,
                heaviest: int = 3) -> list[Walk]:
    """A walk over the output channels of each of these convolutions, alone; by default the `heaviest` ones.

    Times are those of the convolution itself, without moving its tensors in and out. `limits` as in `by_resolution`,
    of the channels; the compilations are shared out evenly.

    Raises: UsageError for limits that hold no two sizes; UnsupportedError for a node without channels to change.
    """
    from npulab.ir.ops import DepthwiseConv2D
    from npulab.passes.resize import with_channels

    if limits:
        _check(*limits, most)
    for n in nodes or ():
        if not 0 <= n < len(graph.nodes):
            raise UsageError(f"'{graph.name}' has no node {n}", want=f"0..{len(graph.nodes) - 1}")
    whole = _profile(graph, target, plan, options, settings)
    cores = next((int(c.value) for c in whole.constants if c.name == "nn_cores"), 8)
    if nodes is None:
        nodes = []
        for row in sorted(whole.rows, key=lambda r: -r.ns):
            if row.node is not None and len(nodes) < heaviest and _has_channels(graph, row.node):
                nodes.append(row.node)
        if not nodes:
            raise UnsupportedError(f"'{graph.name}' has no convolution whose channels can change")
    nodes = list(dict.fromkeys(nodes))
    share = (most - 1) // len(nodes)
    if share < 2:
        raise UsageError(f"{most} compilations are too few for the channels of {len(nodes)} convolutions",
                         want=f"{2 * len(nodes) + 1} or more")
    walks = []
    for node in nodes:
        convolution = graph.nodes[node]
        with_channels(graph, node, own := graph.values[convolution.outputs[0]].shape[-1])
        lowest, highest, step = limits or (max(1, own // 2), 2 * own, None)
        multiplier = convolution.op.multiplier if isinstance(convolution.op, DepthwiseConv2D) else 1
        sizes = [c for c in range(lowest, highest + 1, step or 1) if c % multiplier == 0]
        _at_least_two(sizes, lowest, highest, step or multiplier)

        def measure(count: int, node: int = node) -> Point:
            try:
                single = with_channels(graph, node, count)
                found = _profile(single, target, plan, options, settings)
            except CapacityError as e:
                progress(f"node {node}, {count} channels: {e.message}")
                return Point(count, count, 0, {}, e.message)
            parts = _parts(found, [node])
            if parts[node].on_host:
                parts = _with_reasons(parts, single, [node], target, plan, options, settings)
            else:
                parts = {node: _only_engine(parts[node])}
            progress(f"node {node}, {count} channels: {parts[node].ns / 1e6:.3f} ms")
            return Point(count, count, parts[node].ns, parts)

        walks.append(walk(f"{convolution}, output channels", sizes, _coarse(sizes, cores, share, own), measure, share,
                          factor))
    return walks


def _profile(graph: Graph, target: str, plan: PlanName, options: PlanOptions | None,
             settings: Settings | None) -> Profile:
    from npulab import api

    return api.profile(graph, target, plan, options, settings)


def _parts(profile: Profile, numbers: Sequence[int]) -> dict[int, Part]:
    spans: dict[int, list[Span]] = {}
    for s in profile.spans:
        if s.nodes:
            spans.setdefault(s.nodes[0], []).append(s)
    return {numbers[r.node]: Part(numbers[r.node], r.op, tuple(spans.get(r.node, ())))
            for r in profile.rows if r.node is not None}


def _with_reasons(parts: dict[int, Part], graph: Graph, numbers: Sequence[int], target: str, plan: PlanName,
                  options: PlanOptions | None, settings: Settings | None) -> dict[int, Part]:
    from npulab.targets.target import PlanOptions, find_target

    chip = find_target(target).with_settings(settings or {})
    out = dict(parts)
    for v in chip.check(graph, plan, options or PlanOptions()):
        p = parts[numbers[v.node]]
        if p.on_host:
            out[p.node] = replace(p, reasons=tuple(str(r) for r in v.reasons))
    return out


def _only_engine(part: Part) -> Part:
    """Without the jobs that bring a tensor into the engine's layout: inside a network they do not happen."""
    engine = tuple(s for s in part.spans if s.unit == "nn")
    return replace(part, spans=engine or part.spans)


def _has_channels(graph: Graph, node: int) -> bool:
    from npulab.passes.resize import with_channels

    try:
        with_channels(graph, node, graph.values[graph.nodes[node].outputs[0]].shape[-1])
    except (UnsupportedError, IndexError):
        return False
    return True


def _smallest_step(attempt: Callable[[int], object]) -> int:
    refusal: UnsupportedError | None = None
    for k in (1, 2, 4, 8, 16, 32, 64):
        try:
            attempt(k)
            return k
        except UnsupportedError as e:
            refusal = e
    assert refusal is not None
    raise refusal


def _total_stride(graph: Graph) -> int:
    """What the strides on the way to the smallest image multiply to, 8..32: sizes behind its multiples round up."""
    from npulab.ir.ops import Conv2D, DepthwiseConv2D, Pool2D

    stride: dict[int, int] = {}
    for n in graph.nodes:
        own = n.op.stride[0] if isinstance(n.op, Conv2D | DepthwiseConv2D | Pool2D) else 1
        for v in n.outputs:
            stride[v] = own * max((stride.get(i, 1) for i in n.inputs), default=1)
    return min(32, max(8, *stride.values())) if stride else 8


def _coarse(sizes: Sequence[int], unit: int, most: int, own: int) -> list[int]:
    """At most two thirds of `most`: the ends, the model's own size, multiples of `unit` and the size behind each."""
    positions = max(1, most // 3 - 2)
    spacing = unit * max(1, math.ceil((sizes[-1] - sizes[0]) / unit / positions))
    chosen = {0, len(sizes) - 1}
    for n in (*range(sizes[0] - sizes[0] % spacing, sizes[-1] + 1, spacing), own):
        i = bisect.bisect_right(sizes, n) - 1
        chosen |= {i, i + 1}
    return [sizes[i] for i in sorted(chosen) if 0 <= i < len(sizes)]


def _check(lowest: int, highest: int, step: int | None, most: int) -> None:
    if not 1 <= lowest <= highest <= SIZE_MAX or (step is not None and step < 1):
        raise UsageError("that is no range of sizes", got=f"{lowest}:{highest}{'' if step is None else f':{step}'}",
                         want=f"LOW:HIGH[:STEP], 1 <= LOW < HIGH <= {SIZE_MAX}, STEP 1 or more")
    if most < 2:
        raise UsageError("a search needs at least 2 compilations", got=most)


def _at_least_two(sizes: Sequence[int], lowest: int, highest: int, step: int) -> None:
    if len(sizes) < 2:
        raise UsageError(f"the range {lowest}:{highest} holds {len(sizes) or 'no'} "
                         f"size{'' if len(sizes) == 1 else 's'}", want="2 sizes or more",
                         got=f"multiples of {step}" if step > 1 else f"{list(sizes)}", try_="a wider range")
