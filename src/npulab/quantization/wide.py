"""Which layers need 16 bits or floats so that the outputs come close enough to the float network's, with the fewest
multiply-accumulates in them.

Steps are layers that get 16 bits for what they read and make, and groups of layers that are left in floats: one, or
all around a tensor, which then needs no integers. The step that takes away most noise for its work is taken until the
sum of noises is low enough; then the outcome is measured, and steps are added or, the costly ones first, taken back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from npulab.errors import CapacityError
from npulab.quantization.configurations import FLOAT, Configuration, Trial, neighbours
from npulab.quantization.network import Network
from npulab.quantization.sensitivity import Sensitivity, decibels, macs, tensor_schemes

WIDE = 16
WIDE_COST = 0.5
"""What a multiply-accumulate of 16 bits counts, one in floats counting 1: chips compute them at a part of their speed,
floats mostly not at all."""
ROUNDS = 8
"""Of measuring and adding steps."""
TRIMS = 8
"""Steps that are tried to be taken back."""


@dataclass(frozen=True, slots=True)
class Step:
    """Layers that go into floats, and points that get 16 bits; numbers."""

    floats: frozenset[int] = frozenset()
    wide: frozenset[int] = frozenset()


class _Plan:
    """Noise and work of steps together, by the sum of sensitivities."""

    def __init__(self, trial: Trial, rows: Iterable[Sensitivity]) -> None:
        net = trial.net
        net.restore(trial.before)
        self.base = trial.base
        self.weights = [{r.bits: r.noise for r in rows if r.kind == "weights" and r.index == i}
                        for i in range(len(net.layers))]
        self.tensors = [{r.bits: r.noise for r in rows if r.kind == "tensor" and r.index == i}
                        for i in range(len(net.points))]
        self.macs = [macs(net, layer) for layer in net.layers]
        number = {layer.node: i for i, layer in enumerate(net.layers)}
        self.around: list[frozenset[int]] = []
        self.touching: list[set[int]] = [set() for _ in net.points]
        for p in net.points:
            nodes = neighbours(net, p)
            self.around.append(frozenset(number[n] for n in nodes) if nodes else frozenset())
        self.of_layer: list[frozenset[int]] = []
        index = {id(p): i for i, p in enumerate(net.points)}
        for i, layer in enumerate(net.layers):
            points = {index[id(net.of[v])] for v in (layer.data, layer.result) if v in net.of}
            self.of_layer.append(frozenset(k for k in points if net.points[k].scheme is not None))
            for k in points:
                self.touching[k].add(i)
        self.steps = list(dict.fromkeys(self._steps(net)))

    def _steps(self, net: Network) -> Iterable[Step]:
        if WIDE in tensor_schemes(net):
            for points in self.of_layer:
                if points:
                    yield Step(wide=points)
            for k, p in enumerate(net.points):
                if p.scheme is not None and not self.touching[k]:
                    yield Step(wide=frozenset((k,)))
        if net.rules.float_islands:
            for i, layer in enumerate(net.layers):
                if layer.scheme is not None:
                    yield Step(floats=frozenset((i,)))
            for p, around in zip(net.points, self.around, strict=True):
                if p.scheme is not None and around:
                    yield Step(floats=around)

    def configuration(self, taken: Iterable[Step]) -> Configuration:
        floats = frozenset[int]().union(*(s.floats for s in taken))
        wide = frozenset[int]().union(*(s.wide for s in taken))
        return Configuration(tuple(FLOAT if i in floats else b for i, b in enumerate(self.base.weights)),
                             tuple(max(b, WIDE) if k in wide else b for k, b in enumerate(self.base.tensors)))

    def noise(self, c: Configuration) -> float:
        floats = {i for i, b in enumerate(c.weights) if b == FLOAT}
        total = sum(own.get(b, 0.0) for own, b in zip(self.weights, c.weights, strict=True))
        return float(total + sum(own.get(b, 0.0) for own, b, around in zip(self.tensors, c.tensors, self.around,
                                                                           strict=True)
                                 if not (around and around <= floats)))

    def work(self, c: Configuration) -> float:
        """Multiply-accumulates in floats, and those that read or make 16 bits as WIDE_COST."""
        wide = {k for k, b in enumerate(c.tensors) if b == WIDE and self.base.tensors[k] != WIDE}
        floats = [i for i, b in enumerate(c.weights) if b == FLOAT and self.base.weights[i] != FLOAT]
        some = {i for k in wide for i in self.touching[k]} - set(floats)
        return sum(self.macs[i] for i in floats) + WIDE_COST * sum(self.macs[i] for i in some)


def search_wide(trial: Trial, rows: Sequence[Sensitivity], most: float) -> Configuration:
    """The configuration with the fewest multiply-accumulates in floats and 16 bits whose outputs have, measured, no
    more noise over signal than `most`; weights of the other layers as the network has them.

    Raises: CapacityError if all that the chip has is not enough, saying what is reached.
    """
    plan = _Plan(trial, rows)
    taken: list[Step] = []
    limit = most
    for _ in range(ROUNDS):
        while plan.noise(plan.configuration(taken)) > limit and (step := _best(plan, taken)) is not None:
            taken.append(step)
        noise = trial.noise(plan.configuration(taken))
        if noise <= most:
            break
        more = _best(plan, taken)
        if more is None:
            break
        taken.append(more)
        limit *= min(0.9, most / noise)
    c = plan.configuration(taken)
    if trial.noise(c) > most:
        every = plan.configuration(plan.steps)
        if trial.noise(every) > most:
            raise CapacityError(f"the outputs do not come to {decibels(most):.4g} dB on {trial.net.rules.title}",
                                got=f"{decibels(min(trial.noise(c), trial.noise(every))):.4g} dB with all that it has",
                                try_="a recipe with repairs")
        taken, c = list(plan.steps), every
    return _trimmed(trial, plan, taken, most)


def _best(plan: _Plan, taken: Sequence[Step]) -> Step | None:
    """The step that takes away most noise for its work."""
    now = plan.configuration(taken)
    noise, work = plan.noise(now), plan.work(now)
    best, most = None, 0.0
    for step in plan.steps:
        c = plan.configuration([*taken, step])
        gain = (noise - plan.noise(c)) / max(1.0, plan.work(c) - work)
        if c != now and gain > most:
            best, most = step, gain
    return best


def _trimmed(trial: Trial, plan: _Plan, taken: list[Step], most: float) -> Configuration:
    """Without the steps that it does as well without."""
    tries = 0
    for step in sorted(taken, key=lambda s: -plan.work(plan.configuration([s]))):
        rest = [s for s in taken if s is not step]
        c, now = plan.configuration(rest), plan.configuration(taken)
        if c == now:
            taken = rest
            continue
        believed = trial.noise(now) / max(plan.noise(now), 1e-300)
        if tries < TRIMS and plan.noise(c) * min(1.0, believed) <= most:
            tries += 1
            if trial.noise(c) <= most:
                taken = rest
    return plan.configuration(taken)
