"""The stages of one run: what a recipe says in its order, or a search that keeps what helps.

A search begins with the ranges: every way to choose them is tried on the same statistics. Then one repair after
another is tried, the quick ones first, and kept if the outputs of a few samples that took no part in the calibration
come nearer to the float network's. With a time to keep, it stops before the repair that would not fit; what a repair
costs is estimated from what the statistics cost.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from npulab.errors import UsageError
from npulab.exporters.onnx import to_view
from npulab.program.files import write_atomically
from npulab.program.pages import Buffer, passing
from npulab.quantization import datafree, precision, state
from npulab.quantization.calibrate import Known, choose_activations, choose_weights, statistics
from npulab.quantization.compare import SILENCE, noise
from npulab.quantization.emit import integer_model
from npulab.quantization.gram import Reference, reference
from npulab.quantization.joints import part_mixed, parted
from npulab.quantization.network import Network
from npulab.quantization.observe import Statistics
from npulab.quantization.parts import each
from npulab.quantization.ranges import METHODS, NEEDS_HISTOGRAM
from npulab.quantization.recipes import AUTO, STEPS, Context, Recipe, Step
from npulab.quantization.sampling import held, some, taken
from npulab.quantization.session import Progress
from npulab.quantization.trained import Kept
from npulab.quantization.types import Array, Samples

CHECKED, CHECKED_MOST = 8, 32
"""Samples that each stage is measured on: more than the least where there are eight times as many, and the network is
small. One sample whose answer tips over outweighs the noise of seven others."""
CHECKED_ELEMENTS = 1 << 24
"""Of tensors of all those samples, beyond the least: EfficientNet-Lite0 has 13 million of one."""
SPARE = 24
"""From so many samples on, those take no part in the calibration."""
TRIED = 32
"""Samples for ranges behind a repair that is tried; all of them once it is kept."""
CLIPS = ("min-max", "mse")
Budget = Callable[[Network, Samples, Mapping[int, Statistics], str, str], list[str]]
"""Gives a network the bits that keep a budget, by its statistics and two methods for ranges, and says which."""
Tell = Callable[[str, int, int], None]
"""Called with what is being done, samples done and samples in all."""


@dataclass(frozen=True)
class Options:
    """What is asked for. None and empty: as the target has it.

    recipe       a name or a sum of methods (quantization.recipes).
    weights      bits of weights, `activations` of activations; `per_channel` scales of weights.
    keep, wide   layers by name, number or pattern that stay in floats, or get 16 bits.
    integer_ends inputs and outputs come and go as integers; None: they do in TFLite files.
    seconds      time to keep, of a search.
    size, latency, min_decibels, min_agreement   a budget that layers' bits are chosen for (quantizing_budget.Asked);
                 at most one.
    """

    recipe: str = "auto"
    weights: int | None = None
    activations: int | None = None
    per_channel: bool | None = None
    keep: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    integer_ends: bool | None = None
    seed: int = 0
    seconds: float | None = None
    size: str | None = None
    latency: str | None = None
    min_decibels: float | None = None
    min_agreement: float | None = None


@dataclass(frozen=True)
class Measured:
    """A stage, what it said, how long it took, and the outputs' signal-to-noise ratio (dB) with it; None before there
    are integers. `kept`: whether it made things better, in a search."""

    name: str
    title: str
    paper: str
    notes: Sequence[str]
    seconds: float
    decibels: float | None
    kept: bool = True


class Job:
    """One run over a network. `recipe` says, after `run`, what was done; a search's outcome can be had again by it.

    made_up  the samples are noise: ranges come from batch normalization where they can.
    trained  what the network brought with it, which stays: only the rest is calibrated, and no repairs are searched.
    """

    def __init__(self, net: Network, recipe: Recipe, options: Options, samples: Samples, tell: Tell | None = None,
                 made_up: bool = False, trained: Kept | None = None,
                 budget: Budget | None = None) -> None:
        early = [s for s in recipe.steps if STEPS[s].stage == "before"] if recipe.name != AUTO.name else []
        if trained is not None and early:
            raise UsageError(f"'{net.graph.name}' was trained with quantization, and {early[0]} changes the tensors "
                             "that its scales are of", try_="the recipe without it, or the float network")
        self.trained = trained
        self.net, self.options, self.tell, self.made_up = net, options, tell, made_up
        self.recipe = replace(recipe, steps=()) if recipe.name == AUTO.name else recipe
        self.begin = time.monotonic()
        self.reference: Callable[[], Buffer] = partial(to_view, net.graph, shapes=False)
        self.outputs = [net.name(v) for v in net.graph.outputs]
        self.every = samples
        count = len(samples)
        checked = _checked(net, count)
        at = [i * count // checked for i in range(checked)] if count >= SPARE else list(range(min(count, checked)))
        self.check = held(taken(samples, at))
        left = sorted(set(range(count)) - set(at))
        self.samples = taken(samples, left) if count >= SPARE else samples
        self.budget = budget
        self.wanted: list[list[Array]] = []  # the float network's outputs for `check`
        self.best = -np.inf
        self.aim: Reference | None = None  # from the ranges on

    @property
    def searches(self) -> bool:
        return self.recipe.name == AUTO.name

    def run(self, resume: Path | None = None) -> list[Measured]:
        """All stages, each saved in `resume`; those that it holds from an interrupted run are not done again."""
        stages: list[Measured] = []
        key = self._key() if resume else ""
        if resume is not None and resume.exists():
            stages = self._resumed(resume, key)
        plan = self._plan()
        for name in plan[len(stages):]:
            if stages and self._too_late(name, stages):
                break
            stages.append(self._trial(name) if self.searches else self._stage(name))
            if resume is not None:
                about = {"key": key, "stages": [asdict(s) for s in stages], "recipe": asdict(self.recipe)}
                write_atomically(resume, partial(state.save, net=self.net, about=about,
                                                 aim=self.aim.biases if self.aim else None))
        return stages

    def _plan(self) -> list[str]:
        if self.searches and self.trained is not None:
            return ["ranges"]
        if self.searches:
            schemes = [layer.scheme for layer in self.net.layers if layer.scheme is not None]
            coarse = self.budget is not None or any(s.bits < 8 or not s.per_channel for s in schemes)
            return ["ranges", *(s for s in AUTO.steps if self.options.seconds or not STEPS[s].slow
                                or (coarse and s in ("equalize", "adaround", "correct-full")))]
        return [*(s for s in self.recipe.steps if STEPS[s].stage == "before"), "ranges",
                *(s for s in self.recipe.steps if STEPS[s].stage == "after")]

    def _too_late(self, name: str, stages: Sequence[Measured]) -> bool:
        """Whether the next repair would go past the time to keep."""
        if self.options.seconds is None:
            return False
        cost = stages[0].seconds * STEPS[name].cost
        return time.monotonic() - self.begin + cost > self.options.seconds

    # stages

    def _stage(self, name: str) -> Measured:
        """As the recipe says, whether it helps or not."""
        start = time.perf_counter()
        if name == "ranges":
            title, paper, lines = "ranges", "", self._ranges()
        else:
            step = STEPS[name]
            title, paper, lines = step.title, step.paper, self._apply(step)
        ready = any(p.params for p in self.net.points)
        return Measured(name, title, paper, lines, time.perf_counter() - start, self.decibels() if ready else None)

    def _trial(self, name: str) -> Measured:
        """Kept if it helps."""
        start = time.perf_counter()
        if name == "ranges":
            lines = self._best_ranges()
            return Measured(name, "ranges", "", lines, time.perf_counter() - start, self.best)
        step, before, recipe, aim = STEPS[name], self.net.snapshot(), self.recipe, self.aim
        spared = [s for s in recipe.steps if s in step.spared_by]
        if spared and not self.options.seconds:
            return Measured(name, step.title, step.paper, [f"left out: {STEPS[spared[0]].title} sees to that"], 0.0,
                            self.best, False)
        try:
            lines = self._apply(step)
        except UsageError as e:  # too few samples for it, or a package that is not installed
            self.net.restore(before)
            return Measured(name, step.title, step.paper, [f"left out: {e.message}"], 0.0, self.best, False)
        if not lines:
            seconds = time.perf_counter() - start
            return Measured(name, step.title, step.paper, ["nothing to do"], seconds, self.best, False)
        self.recipe = replace(self.recipe, steps=(*self.recipe.steps, name))
        said = self._ranges(some(self.samples, TRIED)) if step.stage == "before" else []
        now = self.decibels()
        if step.stage == "before" and now >= self.best + step.gain and len(self.samples) > TRIED:
            said = self._ranges()
            now = self.decibels()
        lines += said
        seconds = time.perf_counter() - start
        if now < self.best + step.gain:
            self.net.restore(before)
            self.recipe, self.aim = recipe, aim
            lines = [f"left out: {now:.1f} dB with it", *lines]
            return Measured(name, step.title, step.paper, lines, seconds, now, False)
        self.best = now
        return Measured(name, step.title, step.paper, lines, seconds, now)

    def _apply(self, step: Step) -> list[str]:
        samples = some(self.samples, step.samples)
        end = None if self.options.seconds is None else self.begin + self.options.seconds
        stop = None if end is None else lambda: time.monotonic() > end
        return step.run(self.net, Context(samples, self.options.seed, self.aim, self._progress(step.title), stop))

    def decibels(self) -> float:
        """The outputs' mean signal-to-noise ratio on a few samples, against the network as it came; of detectors whose
        heads were parted that of the parts."""
        ends = [self.net.name(v) for v in parted(self.net)]
        if ends and ends != self.outputs:
            self.outputs, self.wanted = ends, []
        if not self.wanted:
            self.wanted = list(each(self.reference(), self.outputs, self.check, list))
        total = dict.fromkeys(self.outputs, SILENCE)
        made = each(integer_model(self.net), self.outputs, self.check, list)
        for want, got in zip(self.wanted, made, strict=True):
            for name, x, y in zip(self.outputs, want, got, strict=True):
                total[name] += noise(x, y)
        return float(np.mean([n.decibels for n in total.values()]))

    def _ranges(self, samples: Samples | None = None) -> list[str]:
        """Statistics, of some samples or all, and ranges as the recipe has them."""
        samples = self.samples if samples is None else samples
        if self.trained is not None and self.trained.is_complete(self.net) and not self.options.wide:
            return ["as trained", *precision.leave_float(self.net, precision.matching(self.net, self.options.keep))]
        seen, lines = self._seen(self.recipe.activations, samples)
        lines += self._choose(seen, self.recipe.activations, self.recipe.weights)
        return [f"activations by {self.recipe.activations}, weights by {self.recipe.weights}, from {len(samples)} "
                "samples", *lines]

    def _best_ranges(self) -> list[str]:
        """Statistics once, and of all ways to choose ranges the best."""
        seen, lines = self._seen(next(iter(NEEDS_HISTOGRAM)), self.samples)
        found: dict[tuple[str, str], float] = {}
        known: Known = {}
        for clip in CLIPS:
            for how in METHODS if clip == CLIPS[0] else [max(found, key=lambda k: found[k])[0]]:
                self._choose(seen, how, clip, known)
                found[how, clip] = self.decibels()
        how, clip = max(found, key=lambda k: found[k])
        self.recipe = replace(self.recipe, activations=how, weights=clip)
        lines += self._choose(seen, how, clip, None if self.budget else known)
        self.best = self.decibels() if self.budget else found[how, clip]
        tried = ", ".join(f"{a} {db:.1f}" for (a, c), db in found.items() if c == CLIPS[0])
        return [f"activations by {how}, weights by {clip}, from {len(self.samples)} samples", f"dB tried: {tried}",
                *lines]

    def _choose(self, seen: Mapping[int, Statistics], how: str, clip: str,
                known: Known | None = None) -> list[str]:
        """Params of everything, within the budget unless this is one of several tries, which share what they know;
        what was trained keeps its own."""
        lines = self.budget(self.net, self.samples, seen, how, clip) if known is None and self.budget else []
        if not lines:
            choose_activations(self.net, seen, how, known)
            choose_weights(self.net, clip, known)
        if self.trained is not None:
            self.trained.put_back(self.net)
        return lines

    def _seen(self, how: str, samples: Samples) -> tuple[Mapping[int, Statistics], list[str]]:
        """Statistics of the tensors that are to be integers, once it is settled which ones are."""
        net = self.net
        self.aim = reference(net)
        lines = precision.leave_float(net, precision.matching(net, self.options.keep))
        lines += precision.make_wide(net, precision.matching(net, self.options.wide))
        seen = statistics(net, samples, how, progress=self._progress("ranges"))
        lines += datafree.remember(net, seen) if self.made_up else []
        lines += part_mixed(net, seen) if self.trained is None else []
        return seen, lines

    def _progress(self, what: str) -> Progress | None:
        tell = self.tell
        return (lambda done, total: tell(what, done, total)) if tell else None

    # going on with an earlier run

    def _key(self) -> str:
        """What the outcome depends on: the model, the options, the samples (number, origin and some of them)."""
        h = hashlib.sha256()
        for piece in passing(self.reference()):
            h.update(piece)
        h.update(repr((self.options, self.net.rules, len(self.every), self.every.origin)).encode())
        for feeds in self.check:
            for name in sorted(feeds):
                h.update(np.ascontiguousarray(feeds[name]).tobytes())
        return h.hexdigest()

    def _resumed(self, path: Path, key: str) -> list[Measured]:
        try:
            data = path.read_bytes()
        except OSError as e:
            raise UsageError(f"cannot read {path}, where a run to go on with would lie", got=e.strerror or e,
                             try_="remove it, or give -o another name") from e
        about = state.about(data)
        if about is None or about.get("key") != key:
            return []
        self.net.restore(state.restored(data, self.net.rules).snapshot())
        biases = state.aimed_at(data, self.net)
        if biases is not None:
            self.aim = reference(self.net)
            for layer, bias in zip(self.aim.net.layers, biases, strict=True):
                layer.bias = bias
        r = about["recipe"]
        self.recipe = Recipe(r["name"], r["activations"], r["weights"], tuple(r["steps"]))
        stages = [Measured(**s) for s in about["stages"]]
        self.best = max((s.decibels for s in stages if s.kept and s.decibels is not None), default=-np.inf)
        return stages


def _checked(net: Network, count: int) -> int:
    """How many of `count` samples each stage is measured on."""
    made = sum(v.elements for v in net.graph.values if not v.is_constant)
    return max(CHECKED, min(CHECKED_MOST, count // CHECKED, CHECKED_ELEMENTS // max(1, made)))
