"""The best shape of threads for a product or a convolution on a Vulkan device, found by trying within a time, and kept
in the store: the search and the files are those of `tuner`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from npulab.errors import InvariantError
from npulab.gpu import vulkan
from npulab.gpu.compute import modules_shapes, tuner
from npulab.gpu.compute.modules_shapes import Choice
from npulab.gpu.compute.modules_trials import Problem
from npulab.gpu.compute.problems import Convolution, Product
from npulab.gpu.compute.types import Traits
from npulab.gpu.vulkan import Vulkan

WORKER = (sys.executable, "-m", "npulab.gpu.compute.modules_trials")
MAKERS = ("modules_convolution", "modules_endings", "modules_integers", "modules_numbers", "modules_products",
          "modules_tiles", "modules_winograd", "winograd", "../spirv_builder", "../spirv_values", "../spirv_words")
"""As of `choices.makers`."""


def tune(bench: Vulkan, traits: Traits, what: Convolution | Product, store: Path, seconds: float,
         tell: Callable[[str], None] | None = None, worker: Sequence[str] = WORKER) -> Choice:
    """The best found by now; the model's first where nothing was. int8: a convolution, or a product as one of 1 x 1.
    Otherwise as `tuner.search`. Raises: InvariantError for a product of int8, too."""
    ways = _candidates(what, traits)
    return cast(Choice, tuner.search(*_place(store, bench, what), ways, lambda: _problem(bench, what), seconds, tell,
                                     worker))


def best(store: Path, bench: Vulkan, traits: Traits, what: Convolution | Product) -> Choice | None:
    """What tuning found; None where there was none, or the file is damaged."""
    return cast(Choice | None, tuner.known(*_place(store, bench, what), _candidates(what, traits)))


def _candidates(what: Convolution | Product, traits: Traits) -> list[Choice]:
    if isinstance(what, Product) and what.number == "int8":
        raise InvariantError("a product of int8 is tuned as a convolution", want="Convolution(batch, 1, rows, inner, "
                             "columns, number='int8')", got=what)
    return modules_shapes.candidates(what, traits)


def _place(store: Path, bench: Vulkan, what: Convolution | Product) -> tuple[Path, dict[str, Any]]:
    return tuner.place(store, bench.identity, MAKERS, what)


def _problem(bench: Vulkan, what: Convolution | Product) -> Problem:
    numbers = [i for i, d in enumerate(vulkan.devices()) if d == bench.identity]
    if not numbers:
        raise InvariantError("the device is not among those that there are", got=bench.identity.name)
    return Problem(numbers[0], what if isinstance(what, Convolution) else None,
                   what if isinstance(what, Product) else None)
