"""Shapes of threads tried on a Vulkan device, in a process of their own, as `trials` does with OpenCL's candidates."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from npulab.gpu import vulkan
from npulab.gpu.compute import checks, modules_convolution, modules_integers, modules_products, modules_winograd, tiles
from npulab.gpu.compute.checks import Array
from npulab.gpu.compute.modules import Layer, prepared
from npulab.gpu.compute.modules_numbers import DTYPES
from npulab.gpu.compute.modules_shapes import Choice, Fewer
from npulab.gpu.compute.problems import Convolution, Product
from npulab.gpu.compute.trials import Answer, answered
from npulab.gpu.vulkan import Vulkan

EXPONENTIAL = 2e-6
"""More than `checks` has that tanh and gelu may be off near 0: 16 units of 1, of exp and quotients (Vulkan 1.3,
appendix "Precision and Operation of SPIR-V Instructions")."""


class Problem(msgspec.Struct, frozen=True):
    """What is sent first: the device's number, one of the others."""

    number: int
    convolution: Convolution | None = None
    product: Product | None = None


class Asked(msgspec.Struct, frozen=True):
    """A candidate, and the best so far to run in turns with it."""

    choice: Choice
    rival: Choice | None = None


def layer(what: Convolution | Product, choice: Choice | None, weights: NDArray[Any] | None,
          bias: NDArray[Any] | None = None) -> Layer:
    """Of floats, as chosen. A product without weights: of two tensors."""
    if isinstance(what, Product):
        assert not isinstance(choice, Fewer)
        return modules_products.product(what, weights, bias, shape=choice)
    assert weights is not None
    if isinstance(choice, Fewer):
        return modules_winograd.convolution(what, weights, bias, choice.size, choice.shape)
    return modules_convolution.convolution(what, weights, bias, shape=choice)


class Trials:
    """Random inputs, the same in every process, and what may be asked for again."""

    def __init__(self, bench: Vulkan, what: Convolution | Product) -> None:
        self.bench, self.what = bench, what
        self.kept: dict[Choice, tuple[Callable[[], float], Callable[[], NDArray[Any]]]] = {}
        self.inputs, self.made, self.wanted = (_integers if what.number == "int8" else _floats)(what)

    def wrong(self, choice: Choice) -> str:
        """What is wrong with the output of a run; "" if nothing is."""
        launch, read = self.kept[choice]
        launch()
        found = read()
        want, bound = self.wanted(choice)
        beyond = ~(np.abs(found - want) <= bound)
        if not beyond.any():
            return ""
        at = tuple(int(i) for i in np.argwhere(beyond)[0])
        return (f"{int(beyond.sum())} of {found.size} numbers are wrong, the first at {at}: {found[at]:g}, not"
                f" {want[at]:g}")

    def answer(self, asked: Asked) -> Answer:
        return answered(asked.choice, asked.rival, self.kept,
                        lambda c: prepared(self.bench, self.made(c), self.inputs), self.wrong,
                        lambda c: self.kept[c][0]())


Trial = tuple[dict[str, NDArray[Any]], Callable[[Choice], Layer], Callable[[Choice], tuple[Array, Array]]]
"""Inputs by roles; a candidate's layer; what is right of it, and how far it may be off."""


def _floats(what: Convolution | Product) -> Trial:
    r = np.random.default_rng(0)

    def some(*shape: int) -> Any:
        return r.uniform(-1, 1, shape).astype(DTYPES[what.number])

    if isinstance(what, Convolution):
        inputs = {"input": some(what.batch, what.height, what.width, what.channels)}
        weights, columns = some(what.filters, *what.kernel, what.channels // what.groups), what.filters
        outputs: tuple[int, ...] = (what.batch, *what.out, columns)
    else:
        inputs = {"input": some(what.batch, what.rows, what.inner)}
        weights, columns = some(*modules_products.shape_of_b(what)), what.columns
        outputs = what.batch, what.rows, columns
    bias = some(columns).astype(np.float32)
    residual = some(*outputs) if what.residual else None
    if residual is not None:
        inputs["input1"] = residual

    @cache
    def right(size: int) -> tuple[Array, Array]:
        """size: of Winograd's patches; 0: none."""
        if isinstance(what, Product):
            want, bound = checks.product(what, inputs["input"], weights, bias, residual)
        else:
            want, bound = checks.convolution(what, inputs["input"], weights, bias, residual,
                                             tiles.Winograd(tiles.Tile(), size) if size else None)
        if what.activation in ("tanh", "gelu"):
            bound = bound + EXPONENTIAL
        if what.number == "float16":  # drivers round to either neighbour
            bound = bound + 2.0**-11 * (np.abs(want) + bound) + 2.0**-25
        return want, bound

    return (inputs, lambda choice: layer(what, choice, weights, bias),
            lambda choice: right(choice.size if isinstance(choice, Fewer) else 0))


def _integers(what: Convolution | Product) -> Trial:
    """Outputs are spread over the bytes: sums are about 5000 for each root of a term."""
    assert isinstance(what, Convolution)
    r = np.random.default_rng(0)
    x = r.integers(-128, 128, (what.batch, what.height, what.width, what.channels)).astype(np.int8)
    weights = r.integers(-127, 128, (what.filters, *what.kernel, what.channels // what.groups)).astype(np.int8)
    bias, zero_in, zero_out = r.integers(-9999, 9999, what.filters).astype(np.int32), 3, -5
    multipliers = [int(m) for m in r.integers(1 << 30, 1 << 31, what.filters)]
    shifts = [-6 - round(math.log2(weights[0].size) / 2)] * what.filters
    given = weights, bias, zero_in, multipliers, shifts, zero_out

    @cache
    def right() -> tuple[Array, Array]:
        return checks.integer_convolution(what, x, *given)

    def made(choice: Choice) -> Layer:
        assert not isinstance(choice, Fewer)
        return modules_integers.convolution(what, *given, shape=choice)

    return {"input": x}, made, lambda choice: right()


def main() -> None:
    problem = msgspec.json.decode(sys.stdin.readline(), type=Problem)
    what = problem.convolution or problem.product
    assert what is not None
    trials = Trials(vulkan.open_device(problem.number), what)
    for line in sys.stdin:
        answer = trials.answer(msgspec.json.decode(line, type=Asked))
        sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
