"""A network run part by part: in memory are one part's weights and tensors, on disk what lies between two parts.

All samples go through the first part, what later parts read of them is written to a file, and so on. A part ends where
little lies between, once it is large enough; small networks are one part. Where cuts are follows from sizes alone, so
that the same samples give the same numbers on every run. Samples that are too many for the file go in turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from npulab.errors import InvariantError, UsageError
from npulab.importers.onnx import grows
from npulab.importers.onnx_parts import Thin, thin
from npulab.program.pages import Buffer, Scratch, content_of
from npulab.quantization.session import Progress, in_order, runner, workers
from npulab.quantization.types import Array, Feeds, Samples

if TYPE_CHECKING:
    import onnx

PART = 4 << 20
"""Bytes of a part's weights and of the tensors that leave it, from which on it ends where it can."""
STEP = 16 << 20
"""Bytes that nodes of a step make of a sample, from which on it ends where it can."""
HEAVY = 12 << 20
"""Bytes that nodes of a step make of a sample, from which on one sample at a time goes through it: others go through
lighter steps meanwhile."""
DISK = 128 << 20
"""Bytes of all samples' tensors between two parts."""
FEW = 4
"""Samples that go one after the other: so few do not take long."""
TURN = 512
"""Samples that go through all parts together."""
BLOCKED = frozenset(("Add", "Sum", "Mul", "BatchNormalization", "Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu",
                     "HardSigmoid", "HardSwish", "AveragePool", "GlobalAveragePool"))
"""Operators that ONNX Runtime fuses with what makes their inputs, or that sum in another order where these have its own
layout: no cut lies in front of them, for their results would have other last bits."""
T = TypeVar("T")
Work = Callable[[int, Mapping[str, Array]], T]
"""Called with a sample's number, from 0 on, and some of its tensors by name; samples side by side."""


@dataclass(eq=False)
class Part:
    """Some of the nodes, with their constants. Of what they make, `made` bytes a sample, `asked` is wanted; parts
    behind read what is `kept`, of what they make or read."""

    model: Thin
    asked: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    made: int = 0


def each(model: Buffer, names: Sequence[str], samples: Samples, work: Callable[[Sequence[Array]], T],
         progress: Progress | None = None) -> Iterator[T]:
    """`work` on the tensors `names` of each sample, samples side by side, results in their order."""
    parts = _parts(thin(model), names, len(samples), together=True)

    def job(_: int, arrays: Mapping[str, Array]) -> T:
        return work([arrays[name] for name in names])

    del model
    return (found for _, found in _run(parts, samples, job, progress))


def apart(model: Buffer | Thin, names: Sequence[str], samples: Samples, work: Work[T],
          progress: Progress | None = None, groups: Sequence[Sequence[str]] = ()) -> Iterator[tuple[int, T]]:
    """`work` on some of the tensors `names`, in turns until all have been there, with the sample's number. Of each
    tensor the samples come in their order. `groups`: tensors that are needed together.
    """
    made = model if isinstance(model, Thin) else thin(model)
    del model
    return _run(_parts(made, names, len(samples), groups=groups), samples, work, progress)


def _run(parts: Sequence[Sequence[Part]], samples: Samples, work: Work[T], progress: Progress | None
         ) -> Iterator[tuple[int, T]]:
    if not len(samples):
        raise UsageError("there are no samples to calibrate with", got=samples.origin)
    total, source = len(samples), iter(samples)
    count = workers() if total > FEW else 1
    with ExitStack() as opened:
        for first in range(0, total, TURN) if len(parts) > 1 else (0,):
            turn = min(TURN, total - first) if len(parts) > 1 else total
            feeds: Iterable[Feeds] = islice(source, turn)
            for at, steps in enumerate(parts):
                between = opened.enter_context(closing(_Between()))
                for i, (found, kept) in enumerate(_through(steps, enumerate(feeds, first), work, count)):
                    for one in found:
                        yield first + i, one
                        del one  # before the next is made
                    if kept:
                        between.put(kept)
                    if progress:
                        progress(first + (at * turn + i + 1) // len(parts), total)
                feeds = between.all()


def _through(steps: Sequence[Part], samples: Iterable[tuple[int, Feeds]], work: Work[T], count: int
             ) -> Iterator[tuple[Iterable[T], Feeds]]:
    """Each numbered sample's results, and what parts behind read, `count` samples side by side. The latter is there
    once the results have been taken: of one sample at a time, each step runs when its result is asked for."""
    ready = []
    alone = threading.Lock()
    for step in steps:
        names = list(dict.fromkeys([*step.asked, *step.kept]))
        ready.append((names, step, runner(step.model, names)))

    def through(sample: tuple[int, Feeds], left: dict[str, Array]) -> Iterator[T]:
        number, feeds = sample
        for names, step, run in ready:
            results: list[T] = []
            with alone if step.made >= HEAVY else nullcontext():
                found = dict(zip(names, run(feeds), strict=True))
                feeds = {name: found[name] for name in step.kept}
                asked = {name: found[name] for name in step.asked}
                del found
                if step.asked or not step.kept:
                    results.append(work(number, asked))
                del asked
            while results:
                yield results.pop()
        left.update(feeds)

    def job(sample: tuple[int, Feeds]) -> tuple[list[T], Feeds]:
        left: dict[str, Array] = {}
        return list(through(sample, left)), left

    if count == 1:
        for sample in samples:
            left: dict[str, Array] = {}
            yield through(sample, left), left
        return
    with ThreadPoolExecutor(count) as pool:
        yield from in_order(pool, job, samples, count)


class _Between:
    """Tensors of samples one behind the other, on disk."""

    def __init__(self) -> None:
        self.scratch: Scratch | None = None
        self.kinds: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = []
        self.count = 0

    def put(self, arrays: Mapping[str, Array]) -> None:
        """One more sample."""
        kinds = [(name, a.dtype, a.shape) for name, a in arrays.items()]
        if self.scratch is None:
            self.scratch, self.kinds = Scratch(), kinds
        if kinds != self.kinds:
            raise InvariantError("tensors between parts of a network have other shapes from sample to sample",
                                 got=kinds, want=self.kinds)
        self.count += 1
        for a in arrays.values():
            self.scratch.write(content_of(a))

    def close(self) -> None:
        if self.scratch is not None:
            self.scratch.close()

    def all(self) -> Iterator[Feeds]:
        """The samples again, once."""
        at = 0
        for _ in range(self.count):
            feeds = {}
            for name, dtype, shape in self.kinds:
                assert self.scratch is not None
                feeds[name] = self.scratch.array(at, dtype, shape)
                at += feeds[name].nbytes
            yield feeds
        self.close()


# where to cut


@dataclass(eq=False)
class _Walk:
    """The nodes of a model that samples go through, in order, and when what they make is read for the last time.

    fixed   names of initializers, and of what nodes make of these alone, with their bytes.
    makers  the latter -> its node's place in the model.
    born    tensor -> its node's place in `nodes`, -1 for inputs.      last  that of its last reader.
    """

    nodes: list[onnx.NodeProto]
    fixed: dict[str, int]
    makers: dict[str, int]
    born: dict[str, int]
    last: dict[str, int]

    def __init__(self, model: Thin, sizes: Mapping[str, int]) -> None:
        graph = model.proto.graph
        self.fixed = {t.name: model.contents[t.name][0] if t.name in model.contents else len(t.raw_data)
                      for t in graph.initializer}
        self.nodes, self.makers, self.last = [], {}, {}
        self.born = {i.name: -1 for i in graph.input if i.name not in self.fixed}
        for place, n in enumerate(graph.node):
            reads = list(reads_of(n))
            if (reads or n.op_type == "Constant") and all(name in self.fixed for name in reads):
                for name in filter(None, n.output):
                    self.makers[name] = place
                    self.fixed[name] = sizes.get(name) or sum(self.fixed[r] for r in reads)
                continue
            at = len(self.nodes)
            self.last.update((name, at) for name in reads if name not in self.fixed)
            self.born.update((name, at) for name in n.output if name)
            self.nodes.append(n)


def reads_of(node: onnx.NodeProto) -> Iterator[str]:
    """Tensors that an operator reads, those inside of its branches too."""
    yield from (name for name in node.input if name)
    for a in node.attribute:
        for inner in (*([a.g] if a.HasField("g") else []), *a.graphs):
            for n in inner.node:
                yield from reads_of(n)


def _parts(model: Thin, names: Sequence[str], count: int, together: bool = False,
           groups: Sequence[Sequence[str]] = ()) -> list[list[Part]]:
    """The model in parts of steps, for so many samples. `together`: all `names` are asked of the last step; `groups` of
    names: each of one step."""
    whole = [[Part(model, asked=list(names))]]
    if together and sum(size for size, _ in model.contents.values()) < PART:
        return whole
    types = _types(model)
    sizes = {name: size for name, (_, size) in types.items()}
    walk = _Walk(model, sizes)
    end = len(walk.nodes)
    if together:
        walk.last.update((name, end) for name in names if name in walk.born)
    places = [tuple(walk.born.get(name, 0) for name in group) for group in groups]
    own = set() if together else set(names)
    leaving = [sum(walk.fixed.get(name, 0) for name in n.input) + sum(sizes.get(o, 0) for o in n.output if o in own)
               for n in walk.nodes]
    made = [sum(sizes.get(o, 0) for o in n.output) for n in walk.nodes]
    ends = _cuts(walk, sizes, places, leaving, PART, DISK // max(1, min(count, TURN)))
    steps = _cuts(walk, sizes, places, made, STEP, sum(made))
    if not ends and not steps:
        return whole
    parts: list[list[Part]] = [[]]
    cuts = sorted({*ends, *steps})
    for first, behind in zip((0, *cuts), (*cuts, end), strict=True):
        if first in ends:
            parts.append([])
        kept = [name for name, born in walk.born.items() if born < behind <= walk.last.get(name, -1)]
        here = range(first, behind)
        asked = [name for name in names if (behind == end if together else max(0, walk.born.get(name, 0)) in here)]
        piece = _part(model, walk, first, behind, {*asked, *kept}, types)
        parts[-1].append(Part(piece, asked, kept if behind < end else [], sum(made[first:behind])))
    return parts


def _types(model: Thin) -> dict[str, tuple[onnx.TypeProto, int]]:
    """Of tensors of numbers that NumPy has, too, whose sizes are known: types, and bytes."""
    from onnx import helper
    from onnx.shape_inference import infer_shapes

    try:
        graph = infer_shapes(model.proto, data_prop=not grows(model.proto.graph, {})).graph
    except Exception:  # C++: it raises what it likes; the runtime will say what is wrong
        return {}
    found = {}
    for v in (*graph.value_info, *graph.output, *graph.input):
        tensor = v.type.tensor_type
        dims = [d.dim_value for d in tensor.shape.dim]
        if v.type.HasField("tensor_type") and tensor.HasField("shape") and all(n > 0 for n in dims):
            try:
                dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            except KeyError:
                continue
            if dtype.kind in "biuf":  # ONNX Runtime does not give others away
                found[v.name] = v.type, int(np.prod(dims)) * dtype.itemsize
    return found


def _cuts(walk: _Walk, sizes: Mapping[str, int], groups: Sequence[Sequence[int]], costs: Sequence[int], most: int,
          limit: int) -> list[int]:
    """The nodes that pieces behind the first begin with, so that those of each cost `most`, where that can be: where
    least of a sample's tensors lies between, `limit` bytes at most, all of known size."""
    leaves: dict[int, list[str]] = {}
    for name, at in walk.last.items():
        leaves.setdefault(at, []).append(name)
    blocked = {name: i for i, n in enumerate(walk.nodes) if n.op_type in BLOCKED for name in n.input}
    inside = {i for group in groups for i in range(min(group), max(group))}
    alive = {name for name, born in walk.born.items() if born < 0 and name in walk.last}
    found: list[int] = []
    cost, best = 0, (0, 0, 0)  # the place behind the node with the least between, that, and the cost until there
    for i, n in enumerate(walk.nodes):
        if cost + costs[i] > most and best[0]:
            found.append(best[0])
            cost, best = cost - best[2], (0, 0, 0)
        cost += costs[i]
        alive.update(name for name in n.output if walk.last.get(name, -1) > i)
        alive.difference_update(leaves.get(i, ()))
        if cost < most // 2 or i in inside or i + 1 == len(walk.nodes) or not alive:
            continue
        known = all(name in sizes and blocked.get(name, -1) <= i for name in alive)
        between = sum(sizes.get(name, 0) for name in alive)
        if known and between <= limit and (not best[0] or between <= best[1]):
            best = i + 1, between, cost
    return found


def _part(model: Thin, walk: _Walk, first: int, behind: int, wanted: set[str],
          types: Mapping[str, tuple[onnx.TypeProto, int]]) -> Thin:
    """The nodes from `first` up to `behind`, with their constants; outputs of the model that are among them stay."""
    import onnx

    nodes = walk.nodes[first:behind]
    reads = {name for n in nodes for name in reads_of(n)} | wanted
    stack = [name for name in reads if name in walk.makers]
    old = model.proto.graph
    makers: set[int] = set()
    while stack:
        place = walk.makers[stack.pop()]
        if place not in makers:
            makers.add(place)
            own = set(reads_of(old.node[place]))
            stack += own & walk.makers.keys()
            reads |= own
    new = onnx.ModelProto(ir_version=model.proto.ir_version, opset_import=model.proto.opset_import,
                          functions=model.proto.functions)
    new.graph.name = old.name
    new.graph.node.extend(old.node[place] for place in sorted(makers))
    new.graph.node.extend(nodes)
    new.graph.initializer.extend(t for t in old.initializer if t.name in reads)
    given = {i.name: i for i in old.input}
    inputs = [name for name, born in walk.born.items() if born < first and (name in reads or not first)]
    new.graph.input.extend(given.get(name) or onnx.ValueInfoProto(name=name, type=types[name][0]) for name in inputs)
    made = {o for n in nodes for o in n.output}
    new.graph.output.extend(o for o in old.output if o.name in made)
    return Thin(new, {name: content for name, content in model.contents.items() if name in reads})
