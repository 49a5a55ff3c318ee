"""Recipes: which methods, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from npulab.errors import UsageError
from npulab.quantization.gram import Reference, reference
from npulab.quantization.network import Network
from npulab.quantization.ranges import METHODS
from npulab.quantization.session import Progress
from npulab.quantization.types import Samples

Stage = Literal["before", "after"]
GAIN = 0.05


@dataclass(frozen=True, slots=True)
class Context:
    """What a step may use: samples, a seed for whatever is drawn, someone who waits.

    aim  the float network that ranges were chosen for, before biases were corrected; None before there are ranges.
    stop whether the time to keep is over; None: there is none.
    """

    samples: Samples
    seed: int = 0
    aim: Reference | None = None
    progress: Progress | None = None
    stop: Callable[[], bool] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A repair: before ranges are chosen it changes the float network, after that the integers.

    cost  time that it takes, in that of the search for ranges, about.    slow  a search leaves it out unless it has
    time to keep; where weights have few bits or one scale a tensor, it tries the ones that help there all the same.
    samples  that it is given at most, evenly spread: what it measures settles long before a calibration set ends.
    gain  decibels that it must bring for a search to keep it.
    spared_by  repairs that do what it does: behind one of those a search tries it only if it has time to keep.
    run   changes the network, gives lines on what was done; none: there was nothing to do.
    """

    name: str
    stage: Stage
    title: str
    paper: str
    cost: float
    run: Callable[[Network, Context], list[str]]
    slow: bool = False
    samples: int = 128
    gain: float = GAIN
    spared_by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """Methods by name. `activations`: how ranges are chosen (ranges.METHODS); `weights`: "min-max" or "mse"."""

    name: str
    activations: str = "min-max"
    weights: str = "min-max"
    steps: tuple[str, ...] = field(default=())

    @property
    def text(self) -> str:
        """As `--recipe` takes it."""
        return "+".join([self.activations, *([] if self.weights == "min-max" else [f"weights-{self.weights}"]),
                         *self.steps])


def _equalize(net: Network, c: Context) -> list[str]:
    from npulab.quantization.equalize import equalize
    from npulab.quantization.moments import ceilings_met

    return equalize(net, ceilings_met(net, c.samples, progress=c.progress))


def _absorb(net: Network, c: Context) -> list[str]:
    from npulab.quantization.absorb import absorb
    from npulab.quantization.moments import results_seen

    return absorb(net, results_seen(net, c.samples, c.progress))


def _smooth(net: Network, c: Context) -> list[str]:
    from npulab.quantization.smooth import smooth

    return smooth(net, c.samples, progress=c.progress)


def _clip(net: Network, c: Context) -> list[str]:
    from npulab.quantization.clip import clip

    return clip(net, c.samples, progress=c.progress)


def _correct(net: Network, c: Context) -> list[str]:
    from npulab.quantization.correct import fast

    return fast(net, c.samples, c.progress)


def _correct_full(net: Network, c: Context) -> list[str]:
    from npulab.quantization.correct import full, linear_means

    with (c.aim or reference(net)).biases_in(net):  # the means to reach are the float network's
        means = linear_means(net, c.samples, c.progress)
    return full(net, c.samples, means, c.progress)


def _adaround(net: Network, c: Context) -> list[str]:
    from npulab.quantization.rounding import adaround

    return adaround(net, c.samples, aim=c.aim, progress=c.progress)


def _adaround_full(net: Network, c: Context) -> list[str]:
    from npulab.quantization.rounding import adaround

    return adaround(net, c.samples, passes=GROUPS, aim=c.aim, progress=c.progress)


def _distil(net: Network, c: Context) -> list[str]:
    from npulab.quantization.distil import distil

    return distil(net, c.samples, seed=c.seed, aim=c.aim, stop=c.stop, progress=c.progress)


GROUPS = 6
"""Of layers, each of which sees what those before it make, in the sequential rounding."""
DFQ = "Nagel et al. 2019, arXiv:1906.04721"
ADAROUND = "Nagel et al. 2020, arXiv:2004.10568"
STEPS: Mapping[str, Step] = {s.name: s for s in (
    Step("smooth", "before", "migration of scales to weights", "Xiao et al. 2022, arXiv:2211.10438", 1.2, _smooth,
         samples=32),
    Step("equalize", "before", "cross-layer equalization", DFQ, 1.2, _equalize, slow=True, samples=64,
         gain=1.0),
    Step("absorb", "before", "bias absorption", DFQ, 1.2, _absorb),
    Step("clip", "after", "clipping of activations", "", 2, _clip, slow=True, samples=64),
    Step("adaround", "after", "adaptive rounding", ADAROUND, 4, _adaround),
    Step("adaround-full", "after", "adaptive rounding, in groups", ADAROUND, 15, _adaround_full, slow=True),
    Step("correct", "after", "bias correction", DFQ, 1.5, _correct, samples=64, spared_by=("adaround",)),
    Step("correct-full", "after", "bias correction, layer by layer", DFQ, 4, _correct_full, slow=True,
         spared_by=("adaround",)),
    Step("distil", "after", "distillation, block by block", "BRECQ: Li et al. 2021, arXiv:2102.05426", 60, _distil,
         slow=True, samples=256),
)}

AUTO = Recipe("auto", steps=("smooth", "equalize", "clip", "adaround", "correct", "correct-full", "adaround-full",
                              "distil"))
"""A search over the ranges and these repairs, in this order."""
RECIPES: Mapping[str, Recipe] = {r.name: r for r in (
    AUTO,
    Recipe("min-max"),
    Recipe("percentile", "percentile"),
    Recipe("entropy", "entropy"),
    Recipe("mse", "mse", "mse"),
)}


def parse_recipe(text: str) -> Recipe:
    """A recipe by name, or written as "equalize+mse+weights-mse+adaround". Raises: UsageError for unknown words."""
    if text in RECIPES:
        return RECIPES[text]
    recipe, words = Recipe(text), text.split("+")
    ranges = [word for word in words if word in METHODS]
    if len(ranges) > 1:
        raise UsageError(f"'{text[:80]}' has two ways to choose ranges", got=" and ".join(ranges), try_="one of them")
    for i, word in enumerate(words):
        if word in words[:i]:
            raise UsageError(f"'{word}' is there twice", got=text[:80], try_="each method once")
        if word in METHODS:
            recipe = replace(recipe, activations=word)
        elif word in ("weights-mse", "weights-min-max"):
            recipe = replace(recipe, weights=word.removeprefix("weights-"))
        elif word in STEPS:
            recipe = replace(recipe, steps=(*recipe.steps, word))
        else:
            raise UsageError(f"no recipe and no method is called '{word}'",
                             want=f"{', '.join(RECIPES)}; or a sum of {', '.join((*METHODS, 'weights-mse', *STEPS))}",
                             try_="--recipe mse+weights-mse")
    ordered = sorted(recipe.steps, key=lambda name: STEPS[name].stage == "after")
    return replace(recipe, steps=tuple(ordered))
