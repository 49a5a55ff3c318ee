"""The host's share measured instead of modelled: its steps run in LiteRT on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from npulab.errors import UnsupportedError
from npulab.ir.types import DType
from npulab.profiling.host import SPREAD
from npulab.profiling.types import Span
from npulab.program.types import HostStep, Program
from npulab.runtime.host import HostModel
from npulab.targets.target import Timing

RUNS = 7


def with_measured_host(program: Program, timing: Timing) -> Timing:
    """The timing with each host step's time measured here: the median of RUNS, after one to warm up.

    Inputs are zeros; the kernels are LiteRT's default ones, on one thread.

    A step's time is shared out to its operators as the model does. The interval takes the fastest and the slowest run.

    Raises: UnsupportedError if LiteRT is missing or refuses a host model.
    """
    spans = list(timing.spans)
    low, high = timing.interval_ns
    for i, step in enumerate(program.steps):
        if not isinstance(step, HostStep):
            continue
        times = _times(program, step)
        at = [k for k, s in enumerate(spans) if s.unit == "host" and s.step == i]
        modelled = sum(spans[k].ns for k in at)
        low += times[0] - round(modelled / SPREAD)
        high += times[-1] - round(modelled * SPREAD)
        for k, ns in zip(at, _shared(times[len(times) // 2], [spans[k].ns for k in at]), strict=True):
            spans[k] = _with_host(spans[k], ns)
    return replace(timing, spans=tuple(spans), interval_ns=(low, high), host="this machine, measured",
                   witness=f"{timing.witness}; host steps measured on this machine, median of {RUNS} runs")


def _with_host(span: Span, ns: int) -> Span:
    return replace(span, terms={"host": ns})


def _times(program: Program, step: HostStep) -> list[int]:
    """Nanoseconds of each run, in ascending order."""
    tensors = {t.value: t for t in program.tensors}
    inputs = []
    for v in step.inputs:
        dtype = DType(tensors[v].dtype).numpy
        if dtype is None:
            raise UnsupportedError(f"tensor '{tensors[v].name}' is of a type that NumPy does not have",
                                   got=tensors[v].dtype, try_="without --measure-host")
        inputs.append(np.zeros(tensors[v].shape, dtype))
    model = HostModel(step.model, "a host step", quick=True)
    model.run(inputs)
    out = []
    for _ in range(RUNS):
        start = time.perf_counter_ns()
        model.run(inputs)
        out.append(time.perf_counter_ns() - start)
    return sorted(out)


def _shared(total: int, weights: Sequence[int]) -> list[int]:
    """`total` in whole parts, in proportion to the weights; they add up exactly."""
    whole = sum(weights) or 1
    ends = [0]
    for i in range(len(weights)):
        ends.append(total * sum(weights[: i + 1]) // whole)
    ends[-1] = total
    return [b - a for a, b in pairwise(ends)]
