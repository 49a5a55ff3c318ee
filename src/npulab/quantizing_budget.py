"""Budgets of the quantizer: a size, a time or a quality as it is asked for, and the time as a chip's model tells it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from npulab import api
from npulab.dialects import from_onnx
from npulab.errors import CapacityError, UnsupportedError, UsageError
from npulab.importers.onnx import read_onnx
from npulab.program.pages import Buffer
from npulab.quantization.agreement import agreeing
from npulab.quantization.configurations import Trial
from npulab.quantization.emit import integer_model
from npulab.quantization.mixed import Budget, parse_seconds, parse_size, search
from npulab.quantization.network import Network
from npulab.quantization.observe import Statistics
from npulab.quantization.sensitivity import ends
from npulab.quantization.session import Progress
from npulab.quantization.types import Samples
from npulab.targets.target import all_targets

MOST_DECIBELS = 200.0


@dataclass(frozen=True, slots=True)
class Asked:
    """Budgets as text and numbers; at most one of them.

    size       "60%" of 8-bit weights, "1.5M", "300k": of weights, biases and scales.
    latency    "3ms": of an inference, on a chip that npulab has a timing model of.
    decibels   the outputs' signal-to-noise ratio, at least.
    agreement  the share of samples, 0 to 1, that get the float network's answer, at least.
    """

    size: str | None = None
    latency: str | None = None
    decibels: float | None = None
    agreement: float | None = None

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.size, self.latency, self.decibels, self.agreement)) > 1:
            raise UsageError("one budget at a time", want="a size, a latency or a quality")
        if self.decibels is not None and not -MOST_DECIBELS <= self.decibels <= MOST_DECIBELS:
            raise UsageError(f"{self.decibels:g} dB is no signal-to-noise ratio to reach",
                             want=f"a number up to {MOST_DECIBELS:g}, which is the same results")
        if self.agreement is not None and not 0 <= self.agreement <= 1:
            raise UsageError(f"{self.agreement:g} is no share of the samples", want="0 to 1")

    def __bool__(self) -> bool:
        return any(x is not None for x in (self.size, self.latency, self.decibels, self.agreement))


def check(asked: Asked, net: Network) -> None:
    """Before there are statistics: raises UsageError for a budget that nothing can be told about."""
    if asked.latency is not None:
        latency(net.rules.name)
        parse_seconds(asked.latency)
    if asked.size is not None:
        parse_size(asked.size, net)


def keep(net: Network, samples: Samples, seen: Mapping[int, Statistics], asked: Asked, how: str = "min-max",
         clip: str = "min-max", reference: Buffer = b"", progress: Progress | None = None) -> list[str]:
    """Give the network the widths that keep the budget best, with params by these methods; lines on what was chosen.

    net        its schemes are the start: layers in floats and tensors of 16 bits stay such.
    seen       `calibrate.statistics`.      reference  the float network's file as it came.

    Raises: UsageError for a budget that nothing can be told about; CapacityError if no configuration keeps it.
    """
    if asked.latency is not None:
        cost = latency(net.rules.name)
        budget = Budget(seconds=parse_seconds(asked.latency))
    else:
        cost = None
        budget = Budget(size=parse_size(asked.size, net) if asked.size is not None else None, decibels=asked.decibels,
                        score=asked.agreement)
    trial = Trial(net, samples, seen, how, clip, reference, progress)
    score = agreeing(trial.reference, net.name(ends(net)[0]), samples) if asked.agreement is not None else None
    return search(trial, budget, cost, score)


def latency(target: str) -> Callable[[Network], float]:
    """Seconds of an inference by the target's timing model; infinite for configurations that do not compile, except for
    the first, whose error is raised.

    Raises: UsageError for a board without a timing model.
    """
    chips = all_targets()
    if target not in chips:
        raise UsageError(f"npulab has no timing model of {target}, so that no latency can be promised",
                         want=", ".join(sorted(chips)), try_="a size: --size 60%")
    known = False

    def seconds(net: Network) -> float:
        nonlocal known
        made = read_onnx(integer_model(net, integer_ends=True), net.graph.name)
        graph = from_onnx(made).graph if net.rules.file == "tflite" else made
        try:
            profile = api.profile(graph, target)
        except (CapacityError, UnsupportedError):
            if not known:
                raise
            return math.inf
        known = True
        return profile.total_ns / 1e9

    return seconds
