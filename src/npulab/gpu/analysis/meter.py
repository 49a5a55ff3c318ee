"""Experiments asked for with their times checked, the clock's drift taken out of them, within bounds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, cast

from npulab.errors import CapacityError, NpulabError, UnsupportedError
from npulab.gpu import bounds, counting
from npulab.gpu.analysis.statistics import Estimate, estimate
from npulab.gpu.types import Bench, Element, Extra, Operation, Timing, Way

Kind = Literal["core", "alone", "memory", "host"]
ATTEMPTS, MOVES = 3, 8
"""Tries of an experiment that the bench doubts, and of one during which the clock moved: of two speeds that a machine
changes between some times a second each may end three tries."""
PAUSES = (0.5, 1.0, 2.0)
"""Seconds to wait for a quieter moment, where the first references scatter."""
ASTRAY = 0.4  # a reference that differs by more after all tries has the experiment refused; scatter of the first, all
TRIES = 8
MOVED = 0.03  # a reference that differs by more (and more than they scatter) from before to after: done again
UNTOLD = 0.08  # scatter of references that tells nothing of a clock
PATIENCE = 5.0  # seconds for a narrower interval
POOLED = 6  # references without a move that are taken together
STILL = 0.01  # a clock within this of its first pace is taken for unmoved
MEMORY_FOOTPRINT = 512 << 20
"""Bytes; an eighth of it where it must be quick. Of a stream through 256 MiB a cache of 80 MiB with random replacement
keeps 4.5 %: where it comes to wait for the cores, it would say as much too little of how memory's clock fell."""


class Refused(Exception):  # noqa: N818 - not an error: an answer
    """What was measured is not to be believed; the message says why."""


class Objection(Refused):
    """The bench itself doubts the times of an experiment."""


class Moved(Objection):
    """The clock did, during an experiment."""


class _Lacking:
    """A bench whose missing experiments raise when they are done."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def __getattr__(self, name: str) -> Any:
        if (found := getattr(self._bench, name, None)) is not None:
            return found

        def lacks(*_: object) -> Timing:
            raise UnsupportedError(f"there is no experiment '{name}' through {self._bench.identity.api} yet")

        return lacks


class Meter:
    """Does experiments on a bench. A reference between them tells how fast the clock still is: a chain for what the
    cores do, the same of one thread for what one thread does (behind a CPU another program may have the other cores), a
    stream through memory for what DRAM does. References that scatter too much from the first correct nothing.

    paces  of each kind of reference, how much slower than at first, one entry an experiment.
    plateaus  of each level and way, what a thread goes through where the level answers, and whether it is its own.
    """

    def __init__(self, bench: Bench, quick: bool = False, trust_source: bool = False) -> None:
        self.bench, self.quick, self.trust_source = bench, quick, trust_source
        self.extra = cast(Extra, _Lacking(bench))
        self.limits = bench.limits
        self.experiments, self.most = 0, 2000 if quick else 10000
        self.until = time.monotonic() + (150 if quick else 900)
        self._task_most, self._task_until = self.most, self.until
        self.paces: dict[Kind, list[float]] = {"core": [], "alone": [], "memory": []}
        self.faults: dict[Kind, str] = {}
        self.seen: dict[str, list[float]] = {}  # units of work a second, of this task
        self.counted: set[str] = set()  # where its work was counted, or why not
        # width, chains and threads that reach most operations a second
        self.shapes: dict[tuple[Operation, Element], tuple[int, int, int]] = {}
        self.cores_bound = 0.0  # seconds of a byte at first that the caches take: streams through memory wait for them
        self.plateaus: dict[tuple[int, Way], tuple[int, bool]] = {}
        self._streamed = min(MEMORY_FOOTPRINT // (8 if quick else 1), self.limits.buffer_max // 2)
        self._source = ""
        self._first: dict[Kind, float] = {}
        self._recent: dict[Kind, list[float]] = {}
        self._moved: dict[Kind, float] = {}
        self._astray: dict[Kind, str] = {}
        kinds: tuple[Kind, ...] = ("core", "alone", "memory")
        for kind in kinds:
            try:
                for pause in (*PAUSES, None):  # what disturbs the first references would cost every finding
                    found = [self._reference(kind) for _ in range(5)]
                    first = statistics.median(found)  # all that follows is compared with it: not with the disturbed
                    scatter = statistics.stdev(found) / first  # of a busy machine: no clock moves like this
                    if scatter <= ASTRAY or pause is None:
                        break
                    time.sleep(pause)
                if scatter > ASTRAY:
                    self._astray[kind] = f"the clock does not stay: the first references scatter by {scatter:.0%}"
                if scatter > UNTOLD:
                    raise Refused(f"references scatter by {scatter:.0%}: the clock cannot be told from the rest")
                self._first[kind], self._recent[kind] = first, sorted(found)[1:-1]
                self._moved[kind] = max(MOVED, 3 * scatter)
            except (Refused, NpulabError) as e:
                self.faults[kind] = reason(e)

    def begin(self) -> None:
        """A new task: it may take half of what is left of experiments and time, so that something is left for others.
        """
        self._task_most = self.experiments + (self.most - self.experiments) // 2
        self._task_until = (time.monotonic() + self.until) / 2
        self.seen, self.counted = {}, set()

    def seconds(self, ask: Callable[[], Timing], of: str = "", kind: Kind = "core", calls: int = 1,
                spread: float = 0.0, through: float = 0.0, divided: bool = False) -> Estimate:
        """Seconds of an experiment, or of one unit of its work `of`, as they are at the clock's first pace.

        through: of kind "memory", the seconds of a unit of work that pass at the pace of the cores all the same.
        divided: only ratios of these times are looked at, of one code with other arguments: its work divides out.
        calls: asked at least so often (quick: at most 2); more, up to 12 times (of kind "host", where the timer's tick
        may be much of it, 40; quick: 2) and PATIENCE, until the interval's half is within `spread`.
        Raises: Refused, and what the bench raises.
        """
        values: list[float] = []
        begun = time.monotonic()
        asked, most = 0, 2 if self.quick else 40 if kind == "host" else 12
        while True:
            values += self._once(ask, of, kind, through, divided)
            asked += 1
            found = estimate(values, 0.002 if self._first.get(kind) else 0.0)
            if asked >= most or (asked >= calls and (
                    not spread or found.spread <= spread or time.monotonic() > begun + PATIENCE)):
                self.seen.setdefault(of, []).append(1 / found.value)
                return found

    def quickest(self, ask: Callable[[], Timing], of: str, kind: Kind = "core") -> float:
        """Seconds of a unit of work in the quickest repetition: for what others take from, and nothing adds to.
        Raises: Refused, and what the bench raises."""
        return min(self._once(ask, of, kind, 0.0))

    def _once(self, ask: Callable[[], Timing], of: str, kind: Kind, through: float, divided: bool = False
              ) -> list[float]:
        if kind in self._astray:
            raise Refused(self._astray[kind])
        limit = self._moved.get(kind, MOVED)
        for attempt in range(TRIES):
            first = self._look("alone") if through else 1.0
            before = self._pace(kind)
            values = self._asked(ask, of)
            source = self._source.replace(counting.STATED, counting.DIVIDED) if divided else self._source
            self.counted |= {source} - {""}
            after = self._look(kind)
            moved = abs(after - before) / before
            if moved <= limit or (attempt >= 3 and moved <= ASTRAY):
                break
        if moved > ASTRAY:
            raise Refused(f"the clock does not stay: in each of {TRIES} tries a reference moved by more than "
                          f"{100 * limit:g} %, at last from {before:.2f} to {after:.2f} of its first time")
        pace = (before + after) / 2 if moved > limit else self._pace(kind)
        if through:  # memory's clock may stay while that of the cores falls
            last = self._look("alone")
            fell = abs(last - first) / first > self._moved.get("alone", MOVED) / 2
            core = (first + last) / 2 if fell else self._pace("alone")
            if pace <= 1.03 * self.cores_bound * core / self._first.get("memory", math.inf):
                pace = 1.0  # the reference waits for the cores by now: that DRAM has slowed is not seen
            return [max((v - through * core) / pace, 0.0) + through for v in values]
        return [v / pace for v in values]

    def _asked(self, ask: Callable[[], Timing], of: str) -> list[float]:
        """Doubtful times are asked for again: on a busy machine a check of them fails now and then. What is doubtful
        each time is refused, and a wrong result at once."""
        moved = doubted = 0
        while True:
            try:
                return self._checked(ask(), of)
            except Moved:
                moved += 1
                if moved == MOVES:
                    raise
            except Objection:
                doubted += 1
                if doubted == ATTEMPTS:
                    raise

    def _checked(self, timing: Timing, of: str) -> list[float]:
        self.experiments += 1
        if self.experiments > self._task_most or time.monotonic() > self._task_until:
            raise Refused(f"measuring takes too long: {self.experiments} experiments until here")
        if timing.wrong:
            raise Refused(timing.wrong)
        if timing.doubtful:
            raise Objection(timing.doubtful)
        if moved := bounds.drift_objection(timing.seconds):
            raise Moved(moved)
        if coarse := bounds.times_objection(timing.seconds):
            raise Refused(coarse)
        self._source = timing.counted
        work = float(timing.work.get(of, math.nan)) if of else 1.0
        if not (math.isfinite(work) and work > 0):
            raise Refused(f"the experiment did not say how many {of} it did")
        values = [float(s) for s in timing.seconds]
        if not values or not all(math.isfinite(v) and v > 0 for v in values):
            # a timer of coarse ticks may give 0 now and then; not mostly
            if not values or not all(math.isfinite(v) and v >= 0 for v in values) or sum(v > 0 for v in values) < 5:
                raise Refused("the experiment's times are not times: " + ", ".join(f"{v:g}" for v in values[:3]))
            values = [v for v in values if v > 0]
        return [v / work for v in values]

    def _reference(self, kind: Kind) -> float:
        if kind in ("core", "alone"):
            threads = self.limits.compute_units * self.limits.group_max if kind == "core" else 1
            return estimate(self._asked(lambda: self.bench.chain("fma", "float32", 1, 4, threads), "operations")).value
        while True:
            try:
                return estimate(self._asked(lambda: self.bench.stream(self._streamed, 1, 16, "read"), "bytes")).value
            except CapacityError:  # less memory than the device states
                if self._first.get(kind) or self._streamed < 1 << 24:
                    raise
                self._streamed //= 2

    def pace(self, kind: Kind = "alone") -> float:
        """How much slower than at first, now: one thread, or all cores, or memory."""
        return self._pace(kind)

    def _pace(self, kind: Kind) -> float:
        """How much slower than at first."""
        if not self._first.get(kind):
            return 1.0
        recent = self._recent[kind]
        pace = sum(recent) / len(recent) / self._first[kind]
        return 1.0 if abs(pace - 1) < STILL else pace

    def _look(self, kind: Kind) -> float:
        """The pace by one more reference; those before a move are forgotten."""
        if not self._first.get(kind):
            return 1.0
        now, recent = self._reference(kind), self._recent[kind]
        if abs(now / recent[-1] - 1) > 0.02 or abs(now * len(recent) / sum(recent) - 1) > 0.015:
            recent.clear()
        recent.append(now)
        del recent[:-POOLED]
        self.paces[kind].append(now / self._first[kind])
        return now / self._first[kind]


def reason(error: Exception) -> str:
    """In one line."""
    return str(error.message if isinstance(error, NpulabError) else error)
