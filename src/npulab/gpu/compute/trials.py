"""Candidates tried on a device, in a process of their own: it may hang or die of them.

It reads a line of JSON that says device and problem, then one for each candidate, and answers each by a line.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import msgspec
import numpy as np

from npulab.errors import NpulabError
from npulab.gpu.compute import (
    attention,
    checks,
    convolution,
    integer_attention,
    integer_attention_cpu,
    integer_attention_gpu,
    integers,
    matrices,
    tiles,
)
from npulab.gpu.compute.attention_gpu import Items
from npulab.gpu.compute.checks import Array
from npulab.gpu.compute.choices import Kept, Work
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.problems import Attention, Convolution, Product
from npulab.gpu.compute.types import Lowered, Traits

C = TypeVar("C")
T = TypeVar("T")
REPEATS = 11
WARM = 2


class Problem(msgspec.Struct, frozen=True):
    """What is sent first: the device's number and traits, one of the others."""

    number: int
    traits: Traits
    convolution: Convolution | None = None
    product: Product | None = None
    attention: Attention | None = None


class Asked(msgspec.Struct, frozen=True):
    """A candidate, and the best so far to run in turns with it."""

    choice: Kept
    rival: Kept | None = None


class Answer(msgspec.Struct, frozen=True):
    """Seconds of each repetition by the device's clock. why: the candidate is out, and this is the reason."""

    why: str = ""
    seconds: tuple[float, ...] = ()
    rival: tuple[float, ...] = ()


@dataclass(frozen=True)
class Trial:
    """inputs: by role. shape, kind: of the output. lower: a candidate's launches. wanted: what is right, and how far a
    candidate may be from it. weights, bias: of products and convolutions of floats."""

    inputs: dict[str, Any]
    shape: tuple[int, ...]
    kind: type
    lower: Callable[[Any], Lowered]
    wanted: Callable[[Any], tuple[Array, Array]]
    weights: Any = None
    bias: Any = None


def trial(what: Work, traits: Traits) -> Trial:
    """Random inputs, the same in every process."""
    match what:
        case Convolution(number="int8"):
            return _integers(what, traits)
        case Product(number="int8"):
            return _integers(integers.as_convolution(what), traits)
        case Attention():
            return _attention(what, traits)
    return _floats(what, traits)


def _floats(what: Convolution | Product, traits: Traits) -> Trial:
    r = np.random.default_rng(0)
    kind = np.float16 if what.number == "float16" else np.float32

    def some(*shape: int) -> Any:
        return r.uniform(-1, 1, shape).astype(kind)

    outputs: tuple[int, ...]
    if isinstance(what, Convolution):
        outputs = (what.batch, *what.out, what.filters)
        inputs = {"input": some(what.batch, what.height, what.width, what.channels)}
        weights = some(what.filters, *what.kernel, what.channels // what.groups)
        bias = some(what.filters).astype(np.float32)
    else:
        outputs = (what.batch, what.rows, what.columns)
        inputs = {"input": some(what.batch, what.rows, what.inner)}
        shape = (what.columns, what.inner) if what.transposed else (what.inner, what.columns)
        weights = some(*([what.batch] if what.batched else []), *shape)
        bias = some(what.columns).astype(np.float32)
    residual = some(*outputs) if what.residual else None
    if residual is not None:
        inputs["input1"] = residual

    def lower(choice: tiles.Choice) -> Lowered:
        if isinstance(what, Convolution):
            return convolution.lower(what, traits, weights, bias, choice)
        return matrices.lower(what, traits, weights, bias, choice)

    def wanted(choice: tiles.Choice) -> tuple[Array, Array]:
        if isinstance(what, Convolution):
            return checks.convolution(what, inputs["input"], weights, bias, residual, choice, choice.tile.halves)
        return checks.product(what, inputs["input"], weights, bias, residual, choice.tile.halves)

    return Trial(inputs, outputs, kind, lower, wanted, weights, bias)


def _integers(what: Convolution, traits: Traits) -> Trial:
    """Outputs are spread over the bytes: sums are about 5000 for each root of a term."""
    r = np.random.default_rng(0)
    x = r.integers(-128, 128, (what.batch, what.height, what.width, what.channels)).astype(np.int8)
    weights = r.integers(-127, 128, (what.filters, *what.kernel, what.channels // what.groups)).astype(np.int8)
    bias, zero_in, zero_out = r.integers(-9999, 9999, what.filters).astype(np.int32), 3, -5
    multipliers = [int(m) for m in r.integers(1 << 30, 1 << 31, what.filters)]
    shifts = [-6 - round(math.log2(weights[0].size) / 2)] * what.filters
    given = zero_in, multipliers, shifts, zero_out

    @cache
    def right() -> tuple[Array, Array]:
        return checks.integer_convolution(what, x, weights, bias, *given)

    return Trial({"input": x}, (what.batch, *what.out, what.filters), np.int8,
                 lambda choice: integers.convolution(what, traits, weights, bias, *given, choice=choice),
                 lambda choice: right())


def _attention(what: Attention, traits: Traits) -> Trial:
    r = np.random.default_rng(0)
    shapes = [(what.batch, n, d) for n, d in ((what.queries, what.depth), (what.keys, what.depth),
                                              (what.keys, what.width))]
    roles, outputs = ("input", "input1", "input2"), (what.batch, what.queries, what.width)
    if what.number != "int8":
        kind = np.float16 if what.number == "float16" else np.float32
        q, k, v = (r.uniform(-1, 1, s).astype(kind) for s in shapes)

        @cache
        def right(halves: bool) -> tuple[Array, Array]:
            return checks.attention(what, q, k, v, halves)

        return Trial(dict(zip(roles, (q, k, v), strict=True)), outputs, kind,
                     lambda choice: attention.lower(what, traits, choice),
                     lambda choice: right(isinstance(choice, Items) and choice.halves))
    q, k, v = (r.integers(-128, 128, s).astype(np.int8) for s in shapes)
    scales, zeros, scale_out, zero_out = (0.02, 0.02, 0.02), (3, -7, 5), 0.005, 2
    steps = (integer_attention_cpu if traits.cpu else integer_attention_gpu).STEPS

    @cache
    def bytes_() -> tuple[Array, Array]:
        return checks.integer_attention(what, q, k, v, scales, zeros, scale_out, zero_out, steps)

    return Trial(dict(zip(roles, (q, k, v), strict=True)), outputs, np.int8,
                 lambda choice: integer_attention.lower(what, traits, scales, zeros, scale_out, zero_out, choice),
                 lambda choice: bytes_())


class Trials:
    """Buffers of the candidates that may be asked for again."""

    def __init__(self, device: Device, traits: Traits, what: Work) -> None:
        self.device, self.trial = device, trial(what, traits)
        self.buffers = {role: device.upload(array) for role, array in self.trial.inputs.items()}
        self.buffers["output"] = device.allocate(math.prod(self.trial.shape) * np.dtype(self.trial.kind).itemsize)
        self.kept: dict[Kept, tuple[Lowered, dict[str, Any]]] = {}

    def wrong(self, choice: Kept) -> str:
        """What is wrong with the output of a run; "" if nothing is. Before it the output has what is wrong."""
        shape, kind, (want, bound) = self.trial.shape, self.trial.kind, self.trial.wanted(choice)
        bad = np.full(shape, np.nan) if kind is not np.int8 else np.where(want < 0, 127, -128)
        self.device.upload(bad.astype(kind), self.buffers["output"])
        self.run(choice)
        found = self.device.download(self.buffers["output"], shape, kind).astype(np.float64)
        beyond = ~(np.abs(found - want) <= bound)
        if not beyond.any():
            return ""
        at = tuple(int(i) for i in np.argwhere(beyond)[0])
        return (f"{int(beyond.sum())} of {found.size} numbers are wrong, the first at {at}: {found[at]:g}, not"
                f" {want[at]:g}")

    def run(self, choice: Kept) -> float:
        """Seconds, of all launches."""
        lowered, buffers = self.kept[choice]
        return sum(self.device.run(lowered.launches, {**self.buffers, **buffers}))

    def prepared(self, choice: Kept) -> tuple[Lowered, dict[str, Any]]:
        lowered = self.trial.lower(choice)
        buffers = {role: self.device.upload(a) for role, a in lowered.constants.items()}
        return lowered, buffers | {role: self.device.allocate(size) for role, size in lowered.scratch.items()}

    def answer(self, asked: Asked) -> Answer:
        return answered(asked.choice, asked.rival, self.kept, self.prepared, self.wrong, self.run)


def answered(choice: C, rival: C | None, kept: dict[C, T], prepared: Callable[[C], T], wrong: Callable[[C], str],
             run: Callable[[C], float]) -> Answer:
    """Both are made and compared, then run in turns. kept: what was made of candidates; the best so far stays in it.
    wrong, run: of a candidate that is in it."""
    if rival is not None:
        for old in kept.keys() - {rival}:
            del kept[old]
    for one in (rival, choice):
        if one is None or one in kept:
            continue
        try:
            kept[one] = prepared(one)
            why = wrong(one)
        except NpulabError as e:
            why = f"{e.message}: {e.facts.get('got', '')}"[:300]
        if why:
            kept.pop(one, None)
            if one == choice:
                return Answer(why)
    times: dict[bool, list[float]] = {False: [], True: []}
    for i in range(WARM + REPEATS):
        for one, is_rival in ((rival, True), (choice, False)):
            if one is not None and one in kept:
                seconds = run(one)
                if i >= WARM:
                    times[is_rival].append(seconds)
    return Answer("", tuple(times[False]), tuple(times[True]))


def main() -> None:
    problem = msgspec.json.decode(sys.stdin.readline(), type=Problem)
    what = problem.convolution or problem.product or problem.attention
    assert what is not None
    trials = Trials(Device(problem.number), problem.traits, what)
    for line in sys.stdin:
        answer = trials.answer(msgspec.json.decode(line, type=Asked))
        sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
