"""Distillation of the float network into the integer one: weights' roundings, scales, zero points and biases learned.

A block at a time, each fed with what the integer network makes before it and aiming at the float network's results
(BRECQ, Li et al. 2021, arXiv:2102.05426), quantization of activations dropped at random if wished (QDrop, Wei et al.
2022, arXiv:2203.05740), or the network as one block with everything free (QFT, Finkelstein et al. 2022,
arXiv:2212.02634). Gradients pass roundings as if these were not there; scales learn as in LSQ (Esser et al. 2020,
arXiv:1902.08153). The last samples are held out: a block is kept only if its error on these shrank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from npulab.errors import ModelError, UsageError
from npulab.quantization.calibrate import roomy
from npulab.quantization.emit import integer_model
from npulab.quantization.gram import Reference, reference, upto
from npulab.quantization.network import FUSING, Layer, Network, Point
from npulab.quantization.ranges import weight_params
from npulab.quantization.session import Progress, in_order, runner
from npulab.quantization.torch_block import Block, Student
from npulab.quantization.torch_ops import pytorch, supported
from npulab.quantization.types import Array, Params, Samples

HELD_OUT = 0.2
"""Of the samples, the last ones."""
LEAST_SAMPLES = 5
CACHE_BYTES = 1 << 30
"""Inputs and results of a block over the samples; with more, fewer samples are taken."""
CHECKS = 10
"""Times that a block is measured on the samples held out."""
HALVES = 2
"""Parts of a batch whose gradients are computed side by side, and added in order: the same bits on any machine."""


def distil(net: Network, samples: Samples, iterations: int = 200, layers: int = 4, drop: float = 0.0, batch: int = 32,
           rate: float = 1.0, seed: int = 0, aim: Reference | None = None, stop: Callable[[], bool] | None = None,
           progress: Progress | None = None) -> list[str]:
    """Codes, params and biases of layers and params of points, learned.

    iterations  of Adam a block.              layers  of a block at least, where it can be cut; 0: the whole network.
    drop        share of the elements of activations that stay floats while learning.
    rate        multiplies all learning rates.
    aim         the float network, where the layers' biases are no longer its own.
    stop        asked after each iteration; once it says so, the best so far is kept.

    Returns: a note for each block: noise of its results against the float network's on held-out samples, in dB.
    Raises: UsageError without PyTorch, for too few samples; ModelError for tensors that are not finite.
    """
    torch = pytorch()
    if len(samples) < LEAST_SAMPLES:
        raise UsageError("there are too few samples to distil with", want=f"{LEAST_SAMPLES} or more",
                         got=f"{len(samples)} of {samples.origin}")
    aim = aim or reference(net)
    notes: list[str] = []
    found, left = blocks(net, layers)
    notes += [f"{net.graph.nodes[n].op.name} '{net.graph.nodes[n].name}' is not translated to PyTorch: no layer learns "
              "through it" for n in left]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, block in enumerate(found):
            if stop and stop():
                notes.append(f"stopped: {len(found) - number} of {len(found)} blocks stay as they were")
                break
            share = _Share(progress, number, len(found), iterations) if progress else None
            data = _data(net, block, samples, aim)
            notes.append(_learn(net, block, data, len(samples), iterations, drop, batch, rate, seed + number, stop,
                                share))
    finally:
        torch.set_num_threads(threads)
    return notes


class _Share:
    """Progress of one block as part of all."""

    def __init__(self, progress: Progress, number: int, count: int, iterations: int) -> None:
        self.progress, self.before, self.total = progress, number * iterations, count * iterations

    def __call__(self, done: int) -> None:
        self.progress(self.before + done, self.total)


def blocks(net: Network, least: int) -> tuple[list[Block], list[int]]:
    """Runs of nodes with integer layers in them, and the nodes between that are not translated.

    A block ends where only one tensor goes on and `least` layers are in it; where nothing may go on (0), it does not.
    """
    graph = net.graph
    last_use: dict[int, int] = {}
    for n in graph.nodes:
        last_use.update((v, n.index) for v in n.inputs if v >= 0 and not graph.values[v].is_constant)
    weighted = {layer.node: layer for layer in net.layers if layer.scheme is not None and layer.params is not None}
    runs: list[list[int]] = [[]]
    left: list[int] = []
    live = set(graph.inputs)
    inside = 0
    for n in graph.nodes:
        if not supported(graph, n):
            left.append(n.index)
            runs.append([])
            inside = 0
        else:
            runs[-1].append(n.index)
            inside += n.index in weighted
        live = {v for v in (*live, *(o for o in n.outputs if o >= 0)) if last_use.get(v, -1) > n.index}
        if least and inside >= least and len(live) <= 1 and all(_whole(net, v) for v in live):
            runs.append([])
            inside = 0
    if least and len(runs) > 1 and inside < least and runs[-1] and runs[-2] and runs[-2][-1] not in left and not left:
        runs[-2:] = [runs[-2] + runs[-1]]
    found = []
    for run in runs:
        own = [weighted[i] for i in run if i in weighted]
        if own:
            found.append(_block(net, run, own))
    return found, left


def _whole(net: Network, v: int) -> bool:
    """Whether a tensor is not between an operator and the clamp that it takes along."""
    made = net.graph.producer.get(v)
    return v in net.of or made is None or made.op.name not in FUSING


def _block(net: Network, run: Sequence[int], own: list[Layer]) -> Block:
    graph = net.graph
    nodes = [graph.nodes[i] for i in run]
    made = {v for n in nodes for v in n.outputs if v >= 0}
    reads = dict.fromkeys(v for n in nodes for v in n.inputs if v >= 0 and v not in made
                          and not graph.values[v].is_constant)
    index = set(run)
    results = []
    for n in nodes:
        for v in n.outputs:
            if v >= 0 and (v in graph.outputs or any(r.index not in index for r in net.readers(v))):
                if n.op.name == "Softmax" and n.inputs[0] in made and v in graph.outputs:
                    v = n.inputs[0]  # behind a softmax little is to be seen of what came in
                results.append(v)
    points = list({id(p): p for v in sorted(made) if (p := net.of.get(v)) is not None and p.params is not None
                   and p.scheme is not None}.values())
    return Block(nodes, list(reads), list(dict.fromkeys(results)), own, points,
                 [p for p in points if _learns(net, p, made)])


def _learns(net: Network, p: Point, made: set[int]) -> bool:
    """Whether scale and zero point of a point are the block's own to choose: all of its tensors, and of those that
    share its params, are made here, and nothing prescribes them."""
    sharing = [o for o in net.points if o.params is p.params]
    for o in sharing:
        producer = net.graph.producer.get(o.value)
        if o.value not in made or producer is None or o.scheme is None or o.scheme.power_of_two \
                or (producer.op.name, o.scheme.dtype) in net.rules.fixed:
            return False
    return True


def _data(net: Network, block: Block, samples: Samples, aim: Reference) -> tuple[list[Array], list[Array], list[Array]]:
    """(what the integer network reads, what the float one reads, float results), each (samples, *shape)."""
    values = net.graph.values
    size = 4 * (2 * sum(values[v].elements for v in block.inputs) + sum(values[v].elements for v in block.results))
    count = max(LEAST_SAMPLES, min(len(samples), CACHE_BYTES // max(1, size)))
    names = [net.name(v) for v in (*block.inputs, *block.results)]
    reads = names[: len(block.inputs)]
    float_run = runner(upto(aim.model(), names), names)
    ends = set(net.graph.inputs)
    integer_run = None if set(block.inputs) <= ends else runner(upto(integer_model(net), reads), reads, plain=True)
    found: tuple[list[list[Array]], ...] = ([], [], [])

    def job(feeds: Any) -> tuple[list[Array], list[Array], list[Array]]:
        floats = float_run(feeds)
        read = integer_run(feeds) if integer_run else floats[: len(reads)]
        shown = []
        for v, a in zip(block.inputs, read, strict=True):
            p = net.of[v].params if v in net.of else None
            shown.append(p.seen(a) if p is not None and a.dtype == np.float32 else a)
        return shown, floats[: len(reads)], floats[len(reads) :]

    with ThreadPoolExecutor(2) as pool:
        for number, parts in enumerate(in_order(pool, job, samples, 3)):
            if number >= count:
                break
            for have, part in zip(found, parts, strict=True):
                have.append(part)
    out = tuple([np.stack(a) for a in zip(*have, strict=True)] for have in found)
    for name, array in zip(names, (*out[1], *out[2]), strict=True):
        if not np.isfinite(array).all():
            raise ModelError(f"'{name}' is not finite", got=f"on samples of {samples.origin}",
                             try_="look for NaN in the data, or for overflow in the network")
    return out  # type: ignore[return-value]


def _learn(net: Network, block: Block, data: tuple[list[Array], list[Array], list[Array]], count: int, iterations: int,
           drop: float, batch: int, rate: float, seed: int, stop: Callable[[], bool] | None,
           progress: Callable[[int], None] | None) -> str:
    torch = pytorch()
    shown, floats, results = ([torch.from_numpy(np.ascontiguousarray(a)) for a in part] for part in data)
    total = len(results[0])
    held = max(1, int(total * HELD_OUT))
    train = total - held
    powers = [max(float(r[:train].square().mean()), 1e-30) for r in results]
    rng = np.random.default_rng(seed)

    def error(student: Student) -> float:
        with torch.no_grad():
            sums = [0.0] * len(results)
            for at in range(train, total, batch):
                part = slice(at, min(total, at + batch))
                made = student([x[part] for x in shown], None)
                sums = [s + float((m - r[part]).double().square().sum()) for s, m, r in zip(sums, made, results,
                                                                                           strict=True)]
            whole = [max(float(r[train:].double().square().sum()), 1e-30) for r in results]
        return sum(s / w for s, w in zip(sums, whole, strict=True)) / len(results)

    def gradients(part: Array, masks: Any, size: int) -> Any:
        at = torch.from_numpy(part)
        read = [x[at] for x in shown]
        keep, inner = masks or ([], None)
        read = [torch.where(k, q, x[at]) for k, q, x in zip(keep, read, floats, strict=True)] if keep else read
        made = student(read, inner)
        loss = sum((m - r[at]).square().mean() / p for m, r, p in zip(made, results, powers, strict=True))
        return torch.autograd.grad(loss * (len(part) / size), student.free, allow_unused=True)

    student = Student(net, block, rate)
    before = least = error(student)
    own = _clip_weights(net, block)
    clipped = Student(net, block, rate)
    if own and (now := error(clipped)) < before:
        student, least = clipped, now
    else:
        _put_back(own)
        own = []
    best = student.state()
    optimizer = torch.optim.Adam(student.groups(), betas=(0.9, 0.99))
    starts = [g["lr"] for g in optimizer.param_groups]
    check = max(1, iterations // CHECKS)
    with ThreadPoolExecutor(HALVES) as pool:
        for i in range(iterations):
            chosen = rng.choice(train, min(batch, train), replace=False)
            parts = [p for p in np.array_split(chosen, HALVES) if len(p)]
            masks = [student.masks(len(p), drop, rng) if drop else None for p in parts]
            found = list(pool.map(gradients, parts, masks, [len(chosen)] * len(parts)))
            for p, *grads in zip(student.free, *found, strict=True):
                some = [g for g in grads if g is not None]
                p.grad = sum(some[1:], some[0]) if some else None
            fade = 0.5 * (1 + np.cos(np.pi * i / iterations))
            for g, start in zip(optimizer.param_groups, starts, strict=True):
                g["lr"] = start * fade
            optimizer.step()
            ends = i + 1 == iterations or bool(stop and stop())
            if (i + 1) % check == 0 or ends:
                now = error(student)
                if now < least:
                    least, best = now, student.state()
            if progress:
                progress(i + 1)
            if ends:
                break
    first, last = block.layers[0].name, block.layers[-1].name
    name = f"{first} .. {last} ({len(block.layers)} layers)" if first != last else first
    shown_error = f"held-out noise {_db(before)}"
    if not np.isfinite(least) or least >= before:
        _put_back(own)
        return f"{name}: {shown_error} dB stays: learning did not lessen it"
    student.restore(best)
    if not _write(net, block, student):
        _put_back(own)
        return f"{name}: {shown_error} dB stays: biases would not fit their integers"
    few = f", on {total} samples for memory" if total < count else ""
    return f"{name}: {shown_error} -> {_db(least)} dB{few}"


def _clip_weights(net: Network, block: Block) -> list[tuple[Layer, Params | None]]:
    """The weights' ranges of least squared error instead of those that they have, where no repair chose the integers:
    in few bits a better start. Gives those that they had."""
    before = [(layer, layer.params) for layer in block.layers if layer.codes is None]
    for layer, _ in before:
        assert layer.scheme is not None
        layer.params = roomy(net, layer, weight_params(layer.rows(), layer.scheme, layer.axis, "mse"))
    return before


def _put_back(before: Sequence[tuple[Layer, Params | None]]) -> None:
    for layer, params in before:
        layer.params = params


def _db(ratio: float) -> str:
    return f"{10 * np.log10(max(ratio, 1e-30)):.1f}"


def _write(net: Network, block: Block, student: Student) -> bool:
    """What was learned, into layers and points; False, and nothing written, if a bias would leave its integers."""
    shared = {id(p.params): student.point(p) for p in block.learning}
    points = [(p, p.params) for p in block.learning]
    layers = [(x, x.params, x.codes, x.bias) for x in block.layers]
    learned = [student.layer(x) for x in block.layers]
    for p in block.learning:
        p.params = shared[id(p.params)]
    for layer, (now, codes, bias) in zip(block.layers, learned, strict=True):
        layer.params, layer.codes, layer.bias = now, codes, bias
    if all(layer.params is not None and roomy(net, layer, layer.params) is layer.params for layer in block.layers):
        return True
    for p, old in points:
        p.params = old
    for layer, was, before, bias in layers:
        layer.params, layer.codes, layer.bias = was, before, bias
    return False
