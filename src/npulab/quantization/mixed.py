"""How many bits each layer's weights get, under a budget of bytes, of time or of quality.

Noise adds up (`sensitivity`), so the least noise for a number of bytes, or the fewest bytes for a noise, is a knapsack
(`allot`). What it chooses is measured, and where measurement and sum differ, the measurement decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from npulab.errors import CapacityError, UsageError
from npulab.quantization import allot
from npulab.quantization.configurations import FLOAT, Configuration, Trial, layer_bytes, size, total
from npulab.quantization.network import Network
from npulab.quantization.sensitivity import Sensitivity, decibels, ratio, weight_schemes
from npulab.quantization.wide import search_wide

TIMED = 3
"""Configurations within the time that are measured in the end: those of the lowest sums."""

@dataclass(frozen=True, slots=True)
class Budget:
    """What a configuration has to keep: one of these.

    size      bytes of weights, biases and scales, at most.
    seconds   of an inference, at most, by a function that tells them.
    decibels  the outputs' signal-to-noise ratio, at least.
    score     by a function that scores a network, at least.
    """

    size: int | None = None
    seconds: float | None = None
    decibels: float | None = None
    score: float | None = None


def parse_size(text: str, net: Network) -> int:
    """Bytes of "60%" (of 8-bit weights), "1.5M", "300k", "123456". Raises: UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[kKM]?)(?:i?B)?", text.strip())
    if not found or not 0 < float(found[1]) < 1e15:
        raise UsageError(f"'{text[:40]}' is no size", want="a share of 8-bit weights, or bytes: 60%, 1.5M, 300k")
    number = float(found[1])
    if found[2] == "%":
        eight = [8 if 8 in weight_schemes(net, layer) else max(weight_schemes(net, layer)) for layer in net.layers]
        return int(size(net, eight) * number / 100)
    return int(number * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6}[found[2]])


def parse_seconds(text: str) -> float:
    """Of "3ms", "250us", "0.5s". Raises: UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s)", text.strip())
    if not found or not 0 < float(found[1]) < 1e15:
        raise UsageError(f"'{text[:40]}' is no time", want="3ms, 250us or 0.5s")
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]


def search(trial: Trial, budget: Budget, cost: Callable[[Network], float] | None = None,
           score: Callable[[Network], float] | None = None, rows: Sequence[Sensitivity] | None = None) -> list[str]:
    """Leave the trial's network in the best configuration that keeps the budget; what was chosen, in lines.

    cost   seconds of an inference of a network whose params are chosen, for `seconds`; infinite if it cannot run.
    score  the higher the better, of such a network, for `score`.

    Raises: UsageError for no budget, or several; CapacityError if no configuration keeps it, saying how close the best
    comes.
    """
    asked = [b is not None for b in (budget.size, budget.seconds, budget.decibels, budget.score)]
    if sum(asked) != 1:
        raise UsageError("one budget at a time", want="a size, a time or a quality", got=f"{sum(asked)} of them")
    rows = trial.rows() if rows is None else rows
    if budget.size is not None:
        c = by_size(trial, rows, budget.size)
    elif budget.decibels is not None:
        c = by_noise(trial, rows, ratio(budget.decibels))
    elif budget.score is not None:
        assert score is not None
        c = by_score(trial, rows, budget.score, score)
    else:
        assert cost is not None
        assert budget.seconds is not None
        c = by_time(trial, rows, budget.seconds, cost)
    return report(trial, rows, c)


def report(trial: Trial, rows: Sequence[Sensitivity], c: Configuration) -> list[str]:
    """The network in the configuration; what it has, and how the noise came out against the sum."""
    noise = trial.noise(c)
    lines = trial.take(c)
    now, eight = size(trial.net, c.weights), size(trial.net, trial.base.weights)
    return [*lines, f"weights of {now} bytes, {now / eight:.0%} of {eight}; outputs at {decibels(noise):.1f} dB, "
            f"{decibels(total(rows, c)):.1f} dB by the sum of sensitivities"]


def by_size(trial: Trial, rows: Sequence[Sensitivity], most: int) -> Configuration:
    """The least noise within so many bytes of weights. What the sum of noises says is best is measured beside each
    width for all layers that fits, and beside what the predicted noises say. Raises: CapacityError."""
    found = _Weights(trial, rows, trial.base)
    i = found.front.within(most)
    if i < 0:
        raise CapacityError(f"no widths of weights make so small a network for {trial.net.rules.title}",
                            want=f"at least {int(found.front.costs[0])} bytes", got=f"{most} bytes")
    other = _Weights(trial, [replace(r, noise=r.predicted) for r in rows], trial.base)
    tried = [found.at(i), other.at(other.front.within(most))]
    tried += [c for c in found.uniform() if size(trial.net, c.weights) <= most]
    return min(dict.fromkeys(tried), key=trial.noise)


def by_noise(trial: Trial, rows: Sequence[Sensitivity], most: float) -> Configuration:
    """The fewest bytes of weights with no more noise over signal, measured; tensors of 16 bits and layers in floats
    only if no widths of weights do (`wide.search_wide`). Raises: CapacityError."""
    c = _cheapest(trial, rows, trial.base, lambda c: trial.noise(c) <= most)
    if c is None:
        wide = search_wide(trial, rows, most)
        c = _cheapest(trial, rows, wide, lambda c: trial.noise(c) <= most)
        return c or wide
    return c


def by_score(trial: Trial, rows: Sequence[Sensitivity], least: float, score: Callable[[Network], float]
             ) -> Configuration:
    """The fewest bytes of weights with at least this score. Raises: CapacityError."""
    scores: dict[Configuration, float] = {}

    def good(c: Configuration) -> bool:
        if c not in scores:
            trial.take(c)
            scores[c] = score(trial.net)
        return scores[c] >= least

    found = _cheapest(trial, rows, trial.base, good)
    if found is None:
        raise CapacityError(f"no widths of weights score {least:.4g}", got=f"{max(scores.values()):.4g} at best",
                            try_="a recipe with repairs, or a lower score")
    return found


def _cheapest(trial: Trial, rows: Sequence[Sensitivity], base: Configuration, good: Callable[[Configuration], bool]
              ) -> Configuration | None:
    """By halving along the front, which takes it that less noise is no worse."""
    found = _Weights(trial, rows, base)
    i = allot.first_good(allot.stops(found.front), lambda i: good(found.at(i)))
    return None if i is None else found.at(i)


class _Weights:
    """Widths of the layers' weights, by bytes and noise; tensors, and layers in floats, as `base` has them."""

    def __init__(self, trial: Trial, rows: Sequence[Sensitivity], base: Configuration) -> None:
        self.base = base
        self.options: list[list[tuple[int, float]]] = [[] for _ in base.weights]
        for r in rows:
            if r.kind == "weights" and base.weights[r.index] != FLOAT:
                self.options[r.index].append((r.bits, r.noise))
        self.options = [o or [(bits, 0.0)] for o, bits in zip(self.options, base.weights, strict=True)]
        layers = trial.net.layers
        self.front = allot.front([[(layer_bytes(trial.net, layer, bits), noise) for bits, noise in o]
                                  for layer, o in zip(layers, self.options, strict=True)])

    def at(self, i: int) -> Configuration:
        return replace(self.base, weights=tuple(o[k][0] for o, k in zip(self.options, self.front.choice(i),
                                                                       strict=True)))

    def uniform(self) -> list[Configuration]:
        """All layers that can have it in one width, the others in the nearest wider one."""
        every = sorted({bits for o in self.options for bits, _ in o if bits != FLOAT})
        return [replace(self.base, weights=tuple(
            min((b for b, _ in o if b >= bits), default=max(b for b, _ in o)) for o in self.options)) for bits in every]


def by_time(trial: Trial, rows: Sequence[Sensitivity], most: float, cost: Callable[[Network], float]) -> Configuration:
    """The least noise within so many seconds: each layer's other widths, and floats where the chip's rules have such
    islands, are timed alone; what their sum says is best is timed as a whole. Raises: CapacityError."""
    base, net = trial.base, trial.net
    times: dict[Configuration, float] = {}

    def seconds(c: Configuration) -> float:
        if c not in times:
            trial.take(c)
            times[c] = cost(net)
        return times[c]

    start = seconds(base)
    items: list[list[tuple[int, float, float]]] = []
    for i, bits in enumerate(base.weights):
        own = {r.bits: r.noise for r in rows if r.kind == "weights" and r.index == i}
        options = [(bits, 0.0, own.get(bits, 0.0))]
        if bits != FLOAT:
            others = [*own, *([FLOAT] if net.rules.float_islands and start < most else [])]
            for b in (b for b in others if b != bits):
                weights = (*base.weights[:i], b, *base.weights[i + 1 :])
                time = seconds(replace(base, weights=weights))
                if np.isfinite(time):
                    options.append((b, time - start, own.get(b, 0.0)))
        items.append(options)
    f = allot.front([[(time, noise) for _, time, noise in o] for o in items])

    def at(i: int) -> Configuration:
        return replace(base, weights=tuple(o[k][0] for o, k in zip(items, f.choice(i), strict=True)))

    place = allot.first_good(allot.stops(f)[::-1], lambda i: seconds(at(i)) <= most)
    fitting = [c for c, t in times.items() if t <= most]
    if not fitting:
        raise CapacityError("no configuration is that quick", want=f"at most {most * 1e3:.4g} ms",
                            got=f"{min(times.values()) * 1e3:.4g} ms at best", try_="a smaller network")
    best = sorted(fitting, key=lambda c: total(rows, c))[:TIMED]
    return min(dict.fromkeys([*([at(place)] if place is not None else []), *best]), key=trial.noise)
