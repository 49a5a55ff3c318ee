"""The stages of one run: what a recipe says in its order, or a search that keeps what helps.

A search begins with the ranges: every way to choose them is tried on the same statistics, with the weights in floats,
whose rounding would drown it where they have few bits. Then one repair after another is tried, the quick ones first,
and kept if samples that took no part in the calibration come nearer to the float network (quantization.distance), by
more than their number leaves to chance. With a time to keep, it stops before the repair that would not fit; what a
repair costs is estimated from what the statistics cost.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from npulab.quantization.distance import Distance, End, distance, ends_of, heard, simplest
from npulab.quantization.gram import Reference, reference
from npulab.quantization.joints import part_mixed
from npulab.quantization.network import Network
from npulab.quantization.observe import Statistics
from npulab.quantization.ranges import METHODS, NEEDS_HISTOGRAM
from npulab.quantization.recipes import AUTO, STEPS, Context, Recipe, Step
from npulab.quantization.sampling import held, some, taken
from npulab.quantization.session import Progress
from npulab.quantization.trained import Kept
from npulab.quantization.types import Array, Samples

CHECKED, CHECKED_MOST, CHECKED_SHARE = 8, 64, 4
"""Samples that each stage is measured on: more than the least where the network is small, one of four at most. What is
left to chance is as the root of their number."""
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
    """A stage, what it said, how long it took, and the signal-to-noise ratio (dB) of the outputs with it, as
    quantization.distance hears them; None before there are integers. `kept`: whether it made things better, in a
    search."""

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
        self.every = samples
        count = len(samples)
        checked = _checked(net, count)
        at = [i * count // checked for i in range(checked)] if count >= SPARE else list(range(min(count, checked)))
        self.check = held(taken(samples, at))
        left = sorted(set(range(count)) - set(at))
        self.samples = taken(samples, left) if count >= SPARE else samples
        self.budget = budget
        self.ends: list[End] = []
        self.wanted: list[list[Array]] = []  # the float network's ends for `check`
        self.best: Distance | None = None  # of what is kept, once there are integers; None too behind an interruption
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
            steps = [s for s in AUTO.steps if self.options.seconds or not STEPS[s].slow
                     or (coarse and s in ("equalize", "correct-full"))]
            if not coarse:  # means are most of what fine weights lose: rounding has to do better than biases alone
                steps.remove("correct")
                steps.insert(steps.index("adaround"), "correct")
            return ["ranges", *steps]
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
        return Measured(name, title, paper, lines, time.perf_counter() - start,
                        self.distance().decibels if ready else None)

    def _trial(self, name: str) -> Measured:
        """Kept if it helps."""
        start = time.perf_counter()
        if name == "ranges":
            lines, self.best = self._best_ranges()
            return Measured(name, "ranges", "", lines, time.perf_counter() - start, self.best.decibels)
        best = self.best = self.best or self.distance()
        step, before, recipe, aim = STEPS[name], self.net.snapshot(), self.recipe, self.aim

        def left(lines: list[str], seconds: float = 0.0, decibels: float = best.decibels) -> Measured:
            return Measured(name, step.title, step.paper, lines, seconds, decibels, False)

        spared = [s for s in recipe.steps if s in step.spared_by]
        if spared and not self.options.seconds:
            return left([f"left out: {STEPS[spared[0]].title} sees to that"])
        try:
            lines = self._apply(step)
        except UsageError as e:  # too few samples for it, or a package that is not installed
            self.net.restore(before)
            return left([f"left out: {e.message}"])
        if not lines:
            return left(["nothing to do"], time.perf_counter() - start)
        self.recipe = replace(self.recipe, steps=(*self.recipe.steps, name))
        said = self._ranges(some(self.samples, TRIED)) if step.stage == "before" else []
        now = self.distance()
        gain, error = now.less_than(best)
        if step.stage == "before" and gain >= max(step.gain, error) and len(self.samples) > TRIED:
            said = self._ranges()
            now = self.distance()
            gain, error = now.less_than(best)
        lines += said
        seconds = time.perf_counter() - start
        brought = f"a sample {gain:+.1f} dB on average, standard error {error:.1f}"
        if gain < max(step.gain, error):
            self.net.restore(before)
            self.recipe, self.aim = recipe, aim
            return left([f"left out: {now.decibels:.1f} dB with it; {brought}", *lines], seconds, now.decibels)
        self.best = now
        return Measured(name, step.title, step.paper, [*lines, brought], seconds, now.decibels)

    def _apply(self, step: Step) -> list[str]:
        samples = some(self.samples, step.samples)
        end = None if self.options.seconds is None else self.begin + self.options.seconds
        stop = None if end is None else lambda: time.monotonic() > end
        return step.run(self.net, Context(samples, self.options.seed, self.aim, self._progress(step.title), stop))

    def distance(self) -> Distance:
        """From the network as it came, on the samples to check."""
        ends = ends_of(self.net)
        if ends != self.ends:
            self.ends, self.wanted = ends, heard(self.reference(), ends, self.check)
        return distance(self.net, ends, self.wanted, self.check)

    def _ranges(self, samples: Samples | None = None) -> list[str]:
        """Statistics, of some samples or all, and ranges as the recipe has them."""
        samples = self.samples if samples is None else samples
        if self.trained is not None and self.trained.is_complete(self.net) and not self.options.wide:
            return ["as trained", *precision.leave_float(self.net, precision.matching(self.net, self.options.keep))]
        seen, lines = self._seen(self.recipe.activations, samples)
        lines += self._choose(seen, self.recipe.activations, self.recipe.weights)
        return [f"activations by {self.recipe.activations}, weights by {self.recipe.weights}, from {len(samples)} "
                "samples", *lines]

    def _best_ranges(self) -> tuple[list[str], Distance]:
        """Statistics once, and of all ways to choose ranges the simplest that none is better than; how far it is."""
        seen, lines = self._seen(next(iter(NEEDS_HISTOGRAM)), self.samples)
        known: Known = {}
        ways: dict[str, Distance] = {}
        for how in METHODS:
            self._choose(seen, how, CLIPS[0], known)
            with _float_weights(self.net):
                ways[how] = self.distance()
        how = simplest(ways)
        clips: dict[str, Distance] = {}
        for clip in CLIPS:
            self._choose(seen, how, clip, known)
            clips[clip] = self.distance()
        clip = simplest(clips)
        self.recipe = replace(self.recipe, activations=how, weights=clip)
        lines += self._choose(seen, how, clip, None if self.budget else known)
        tried = ", ".join(f"{a} {d.decibels:.1f}" for a, d in ways.items())
        said = [f"activations by {how}, weights by {clip}, from {len(self.samples)} samples",
                f"dB tried, weights in floats: {tried}", *lines]
        return said, self.distance() if self.budget else clips[clip]

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
        return stages


def _checked(net: Network, count: int) -> int:
    """How many of `count` samples each stage is measured on."""
    made = sum(v.elements for v in net.graph.values if not v.is_constant)
    return max(CHECKED, min(CHECKED_MOST, count // CHECKED_SHARE, CHECKED_ELEMENTS // max(1, made)))


@contextmanager
def _float_weights(net: Network) -> Iterator[None]:
    """The layers' weights in floats for a while, tensors as they are."""
    params = [layer.params for layer in net.layers]
    for layer in net.layers:
        layer.params = None
    try:
        yield
    finally:
        for layer, p in zip(net.layers, params, strict=True):
            layer.params = p
