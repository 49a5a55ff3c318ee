"""Candidates tried on a device, in a process of their own: it may hang or die of them.

It reads a line of JSON that says device and problem, then one for each candidate, and answers each by a line.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import numpy as np

from npulab.errors import NpulabError
from npulab.gpu.compute import checks, convolution, matrices
from npulab.gpu.compute.device import Device
from npulab.gpu.compute.problems import Convolution, Product
from npulab.gpu.compute.tiles import Choice
from npulab.gpu.compute.types import Lowered, Traits

REPEATS = 11
WARM = 2


class Problem(msgspec.Struct, frozen=True):
    """What is sent first: the device's number and traits, one of the two."""

    number: int
    traits: Traits
    convolution: Convolution | None = None
    product: Product | None = None


class Asked(msgspec.Struct, frozen=True):
    """A candidate, and the best so far to run in turns with it."""

    choice: Choice
    rival: Choice | None = None


class Answer(msgspec.Struct, frozen=True):
    """Seconds of each repetition by the device's clock. why: the candidate is out, and this is the reason."""

    why: str = ""
    seconds: tuple[float, ...] = ()
    rival: tuple[float, ...] = ()


class Trials:
    """Random inputs, the same in every process, and buffers of the candidates that may be asked for again."""

    def __init__(self, device: Device, traits: Traits, what: Convolution | Product) -> None:
        self.device, self.traits, self.what = device, traits, what
        r = np.random.default_rng(0)
        kind = np.float16 if what.number == "float16" else np.float32

        def some(*shape: int) -> Any:
            return r.uniform(-1, 1, shape).astype(kind)

        outputs: tuple[int, ...]
        if isinstance(what, Convolution):
            outputs = (what.batch, *what.out, what.filters)
            self.inputs = {"input": some(what.batch, what.height, what.width, what.channels)}
            self.weights = some(what.filters, *what.kernel, what.channels // what.groups)
            self.bias = some(what.filters).astype(np.float32)
        else:
            outputs = (what.batch, what.rows, what.columns)
            self.inputs = {"input": some(what.batch, what.rows, what.inner)}
            shape = (what.columns, what.inner) if what.transposed else (what.inner, what.columns)
            self.weights = some(*([what.batch] if what.batched else []), *shape)
            self.bias = some(what.columns).astype(np.float32)
        self.outputs, self.kind = outputs, kind
        self.residual = some(*outputs) if what.residual else None
        if self.residual is not None:
            self.inputs["input1"] = self.residual
        self.buffers = {role: device.upload(array) for role, array in self.inputs.items()}
        self.buffers["output"] = device.allocate(int(np.prod(outputs)) * np.dtype(kind).itemsize)
        self.kept: dict[Choice, tuple[Lowered, dict[str, Any]]] = {}

    def lowered(self, choice: Choice) -> Lowered:
        if isinstance(self.what, Convolution):
            return convolution.lower(self.what, self.traits, self.weights, self.bias, choice)
        return matrices.lower(self.what, self.traits, self.weights, self.bias, choice)

    def wrong(self, choice: Choice) -> str:
        """What is wrong with the output; "" if nothing is."""
        found = self.device.download(self.buffers["output"], self.outputs, self.kind).astype(np.float64)
        if isinstance(self.what, Convolution):
            want, bound = checks.convolution(self.what, self.inputs["input"], self.weights, self.bias, self.residual,
                                             choice, choice.tile.halves)
        else:
            want, bound = checks.product(self.what, self.inputs["input"], self.weights, self.bias, self.residual,
                                         choice.tile.halves)
        beyond = ~(np.abs(found - want) <= bound)
        if not beyond.any():
            return ""
        at = tuple(int(i) for i in np.argwhere(beyond)[0])
        return (f"{int(beyond.sum())} of {found.size} numbers are wrong, the first at {at}: {found[at]:g}, not"
                f" {want[at]:g}")

    def run(self, choice: Choice) -> float:
        """Seconds, of all launches."""
        lowered, buffers = self.kept[choice]
        return sum(self.device.run(lowered.launches, {**self.buffers, **buffers}))

    def answer(self, asked: Asked) -> Answer:
        if asked.rival is not None:
            self.kept = {c: k for c, k in self.kept.items() if c == asked.rival}
        for choice in (asked.rival, asked.choice):
            if choice is None or choice in self.kept:
                continue
            try:
                lowered = self.lowered(choice)
                buffers = {role: self.device.upload(a) for role, a in lowered.constants.items()}
                buffers |= {role: self.device.allocate(size) for role, size in lowered.scratch.items()}
                self.kept[choice] = lowered, buffers
                empty = np.full(self.outputs, np.nan, self.kind)
                self.device.upload(empty, self.buffers["output"])
                self.run(choice)
                why = self.wrong(choice)
            except NpulabError as e:
                why = f"{e.message}: {e.facts.get('got', '')}"[:300]
            if why:
                self.kept.pop(choice, None)
                if choice == asked.choice:
                    return Answer(why)
        times: dict[bool, list[float]] = {False: [], True: []}
        for i in range(WARM + REPEATS):
            for choice, is_rival in ((asked.rival, True), (asked.choice, False)):
                if choice in self.kept:
                    seconds = self.run(choice)
                    if i >= WARM:
                        times[is_rival].append(seconds)
        return Answer("", tuple(times[False]), tuple(times[True]))


def main() -> None:
    problem = msgspec.json.decode(sys.stdin.readline(), type=Problem)
    what = problem.convolution or problem.product
    assert what is not None
    trials = Trials(Device(problem.number), problem.traits, what)
    for line in sys.stdin:
        answer = trials.answer(msgspec.json.decode(line, type=Asked))
        sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
