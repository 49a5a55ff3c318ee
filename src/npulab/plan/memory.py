"""Place tensors in memory: those alive at the same time must not overlap, and the arena shall be small.

The problem is dynamic storage allocation, which is NP-hard. What helps: no arena is smaller than the bytes alive at the
busiest time, and on networks that is nearly always enough. So, cheapest first, and only until that bound is reached:

1. Greedy orders: by size (the baseline; Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference",
   2020), by breadth (the same), by size times duration, by duration.
2. Tensors that find room wherever the others are go aside, to be placed last. Of the others, those that are alive
   throughout go to the bottom. What is left falls apart in time. Again, for each part. Few tensors are left to search.
3. Branch and bound over packings in order of offset, exact if it ends, in three orders of preference.
4. Hill climbing over orders of placing, as in Arm's Vela, on the tensors that hold the peak up; then 3 again, for peaks
   between the bound and the best one.

Searches are limited by counted work, never by a clock: the same tensors get the same offsets everywhere.
Sizes inside are in blocks of `alignment` bytes, times are positions among the distinct first times.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import fsum, gcd
from typing import Any

from npulab.errors import UsageError

SIZE_MAX = 1 << 40
"""Bytes of a tensor. Sums over a million of them still fit 64 bits."""
PAIRS_MAX = 100_000
"""Pairs of tensors alive at the same time that are listed for the searches; beyond, only greedy orders are tried."""
WORK = 600_000
"""Steps that the searches may take, each a look at one neighbour or at one time. All of them are about 0.4 s."""
LEVELS_MAX = 20
"""Times that a group is taken apart."""
EXACT_MAX = 200
"""Tensors of a group that branch and bound is tried on; it recurses up to twice as deep."""
STATES = 60_000
"""States that a choice of residents looks at; of those with many tensors alive fewer."""
TRIES = 4
"""Choices of residents, each for a memory with less room than the one before."""
WIDTH_LEAST = 8
"""States at one time below which residents are chosen greedily."""
SUBSETS_MAX = 10
"""Tensors of a group of which every subset is tried, if need be, as residents."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A tensor: bytes, 0..2**40, and the first and last time at which it is needed, both included."""

    size: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Byte offsets in the order of the tensors. peak: bytes of the arena. bound: no placement has a smaller peak.

    All are multiples of the alignment. The bound is the largest sum of aligned sizes alive at one time.
    """

    offsets: tuple[int, ...]
    peak: int
    bound: int


def place(tensors: Sequence[Lifetime], alignment: int = 64) -> Placement:
    """Offsets with a peak as small as bounded work finds: never above `greedy_by_size`; the least for a few tensors.

    Time grows with the pairs alive at the same time. A tensor of no bytes is at offset 0 and in nobody's way.

    Raises: UsageError for a size or alignment out of range, or a life that ends before it begins.
    """
    group = _group_of(tensors, alignment)
    return _placement(tensors, alignment, group, _pack(group, group.load, _Budget(WORK)))


def greedy_by_size(tensors: Sequence[Lifetime], alignment: int = 64) -> Placement:
    """The largest first, each in the smallest gap that takes it, else on top of what is alive with it."""
    group = _group_of(tensors, alignment)
    return _placement(tensors, alignment, group, _fit(group, _by_size(group), True))


def greedy_by_breadth(tensors: Sequence[Lifetime], alignment: int = 64) -> Placement:
    """The tensors of the busiest time first, of those the largest; gaps as in `greedy_by_size`."""
    group = _group_of(tensors, alignment)
    return _placement(tensors, alignment, group, _fit(group, _by_breadth(group), True))


def choose_resident(tensors: Sequence[Lifetime], values: Sequence[int], capacity: int,
                    alignment: int = 64) -> dict[int, int]:
    """Tensor -> byte offset, of those to keep in a memory of `capacity` bytes so that the sum of `values` is large.

    What is chosen fits at every time and does not overlap. A tensor without a positive value is never chosen. The
    choice is the best one for up to ten tensors; beyond, a search of bounded work.

    Raises: UsageError like `place`, or if there are not as many values as tensors.
    """
    if len(values) != len(tensors):
        raise UsageError("every tensor needs one value", want=f"{len(tensors)} values", got=f"{len(values)}")
    if capacity < 0:
        raise UsageError("a memory cannot have less than no bytes", got=f"a capacity of {capacity}")
    group = _group_of(tensors, alignment)
    blocks = capacity // alignment
    wanted = [i for i in group.ids if values[i] > 0 and tensors[i].size <= blocks * alignment]
    chosen = {i: 0 for i, t in enumerate(tensors) if t.size == 0 and values[i] > 0}
    group = group.part(wanted)
    width = STATES // (len(group) + 1 + group.pairs // 8)
    budget = _Budget(WORK)
    for part in _apart(group):
        chosen.update({i: low * alignment for i, low in _residents(part, values, blocks, width, budget).items()})
    return dict(sorted(chosen.items()))


# one group of tensors


class _Group:
    """Tensors of a packing problem by their `ids`; lists are by position in it. Sizes in blocks, all above 0.

    first, last: positions among `times` distinct first times. load: the most blocks alive at one time.
    """

    def __init__(self, ids: Sequence[int], size: Sequence[int], first: Sequence[int], last: Sequence[int]) -> None:
        starts = sorted(set(first))
        index = {start: i for i, start in enumerate(starts)}
        self.ids, self.size, self.times = list(ids), list(size), len(starts)
        self.first = [index[f] for f in first]
        self.last = [bisect_right(starts, x) - 1 for x in last]
        change, born, gone = [0] * (self.times + 1), [0] * (self.times + 1), [0] * (self.times + 1)
        for s, f, x in zip(self.size, self.first, self.last, strict=True):
            change[f] += s
            change[x + 1] -= s
            born[f] += 1
            gone[x + 1] += 1
        self.loads = list(accumulate(change))[:-1]
        self.load = max(self.loads, default=0)
        alive = accumulate(b - g for b, g in zip(born, gone, strict=True))
        self.pairs = sum(b * (a - b) + b * (b - 1) // 2 for b, a in zip(born, alive, strict=True))
        self._near: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def near(self) -> list[list[int]]:
        """For each tensor those that are alive with it; two entries for each of `pairs`."""
        if self._near is None:
            self._near = [[] for _ in self.ids]
            alive: list[int] = []
            for t in sorted(range(len(self)), key=self.first.__getitem__):
                alive = [o for o in alive if self.last[o] >= self.first[t]]
                self._near[t].extend(alive)
                for o in alive:
                    self._near[o].append(t)
                alive.append(t)
        return self._near

    def part(self, ids: Iterable[int]) -> _Group:
        """The group of these tensors alone."""
        at = {t: i for i, t in enumerate(self.ids)}
        where = [at[t] for t in ids]
        return _Group([self.ids[i] for i in where], [self.size[i] for i in where], [self.first[i] for i in where],
                      [self.last[i] for i in where])


def _group_of(tensors: Sequence[Lifetime], alignment: int) -> _Group:
    if not 1 <= alignment <= SIZE_MAX:
        raise UsageError("an alignment is a positive number of bytes", want=f"1..{SIZE_MAX}", got=f"{alignment}")
    for i, t in enumerate(tensors):
        if not 0 <= t.size <= SIZE_MAX:
            raise UsageError(f"tensor {i} cannot have that size", want=f"0..{SIZE_MAX} bytes", got=f"{t.size}")
        if t.first > t.last:
            raise UsageError(f"the life of tensor {i} ends before it begins", want="first <= last",
                             got=f"{t.first}..{t.last}")
    ids = [i for i, t in enumerate(tensors) if t.size]
    return _Group(ids, [-(-tensors[i].size // alignment) for i in ids], [tensors[i].first for i in ids],
                  [tensors[i].last for i in ids])


def _placement(tensors: Sequence[Lifetime], alignment: int, group: _Group, at: list[int]) -> Placement:
    offsets = [0] * len(tensors)
    for i, a in zip(group.ids, at, strict=True):
        offsets[i] = a * alignment
    return Placement(tuple(offsets), _peak(group, at) * alignment, group.load * alignment)


def _peak(group: _Group, at: Sequence[int]) -> int:
    return max((a + s for a, s in zip(at, group.size, strict=True)), default=0)


def _apart(group: _Group) -> list[_Group]:
    """Groups that never meet in time, in order of time."""
    parts: list[list[int]] = []
    end = -1
    for t in sorted(range(len(group)), key=lambda t: (group.first[t], t)):
        if group.first[t] > end:
            parts.append([])
        parts[-1].append(group.ids[t])
        end = max(end, group.last[t])
    return [group] if len(parts) == 1 else [group.part(ids) for ids in parts]


# packing


class _Budget:
    """Steps that are left."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def share(self, steps: int) -> Iterator[_Budget]:
        """At most that many of the steps; what is not used comes back."""
        some = _Budget(min(steps, self.left))
        self.left -= some.left
        yield some
        self.left += some.left


def _pack(group: _Group, goal: int, budget: _Budget) -> list[int]:
    """Offsets with a peak of at most `goal` blocks, or the least that was found."""
    best, best_peak = _greedy(group, goal)
    if best_peak <= goal or group.pairs > PAIRS_MAX:
        return best
    cores, at, easy = _cores(group, goal)
    peak = goal
    for base, part in sorted(cores, key=lambda core: -core[0] - core[1].load):
        found = _search(part, peak - base, budget)
        peak = max(peak, base + _peak(part, found))
        if peak >= best_peak:
            return best
        at.update((t, base + a) for t, a in zip(part.ids, found, strict=True))
    where = {t: i for i, t in enumerate(group.ids)}
    return _fit_below(group, [where[t] for t in reversed(easy)], False, best_peak - 1,
                      {where[t]: a for t, a in at.items()}) or best


def _cores(group: _Group, goal: int) -> tuple[list[tuple[int, _Group]], dict[int, int], list[int]]:
    """(base, group) of the hard parts, each to be packed above its base; places already found; the easy tensors.

    Easy: whatever is done with the tensors that come later in the list and with the hard ones, below `goal` there is
    room for it. Of the others, those that are alive throughout go to the bottom; what is left falls apart in time, and
    so on. Levels are limited, because in a nest of lives there would be one for each tensor.
    """
    cores: list[tuple[int, _Group]] = []
    at: dict[int, int] = {}
    easy: list[int] = []
    todo = [(0, 0, group)]
    while todo:
        level, base, part = todo.pop()
        peeled = _easy(part, goal - base)
        easy.extend(part.ids[t] for t in peeled)
        under = {part.ids[t] for t in peeled}
        for p in _apart(part.part(t for t in part.ids if t not in under)):
            through = [t for t in range(len(p)) if p.first[t] == 0 and p.last[t] == p.times - 1]
            if not through or level == LEVELS_MAX:
                cores.append((base, p))
                continue
            bottom = base
            for t in through:
                at[p.ids[t]] = bottom
                bottom += p.size[t]
            under = set(p.ids[t] for t in through)
            todo.append((level + 1, bottom, p.part(t for t in p.ids if t not in under)))
    return cores, at, easy


def _easy(group: _Group, goal: int) -> list[int]:
    """Tensors that find room below `goal` wherever the others are, in an order: the others are those not before it.

    Places are sums of sizes, so they are counted in the sizes' greatest common divisor, `unit`. A tensor o keeps t from
    starting at size[o] + size[t] - 1 places at most, and t has goal - size[t] + 1.
    """
    unit = gcd(*group.size) or 1  # of an empty group
    size, near, goal = [s // unit for s in group.size], group.near, goal // unit
    free = [goal - size[t] + 1 - sum(size[o] for o in near[t]) - (size[t] - 1) * len(near[t])
            for t in range(len(group))]
    todo = [t for t in range(len(group)) if free[t] > 0]
    gone = set(todo)
    for t in todo:  # grows on the way
        for o in near[t]:
            free[o] += size[t] + size[o] - 1
            if free[o] > 0 and o not in gone:
                gone.add(o)
                todo.append(o)
    return todo


def _by_size(group: _Group) -> list[int]:
    return sorted(range(len(group)), key=lambda t: (-group.size[t], group.first[t], t))


def _by_breadth(group: _Group) -> list[int]:
    rank = [0] * group.times
    for i, time in enumerate(sorted(range(group.times), key=lambda time: (-group.loads[time], time))):
        rank[time] = i
    busiest = [min(rank[f : x + 1]) for f, x in zip(group.first, group.last, strict=True)]
    return sorted(range(len(group)), key=lambda t: (busiest[t], -group.size[t], t))


def _orders(group: _Group) -> Iterable[tuple[list[int], bool]]:
    """(order, whether to take the smallest gap) of the greedy tries, the baseline first."""
    size, first, last = group.size, group.first, group.last
    every = range(len(group))
    by_size = _by_size(group)
    yield by_size, True
    yield by_size, False
    if group.pairs > PAIRS_MAX:
        return
    breadth = _by_breadth(group)
    yield breadth, True
    yield breadth, False
    yield sorted(every, key=lambda t: (-size[t] * (last[t] - first[t] + 1), t)), False
    yield sorted(every, key=lambda t: (first[t] - last[t], -size[t], t)), False


def _greedy(group: _Group, goal: int) -> tuple[list[int], int]:
    best, best_peak = [0] * len(group), -1
    for order, tight in _orders(group):
        at = _fit(group, order, tight)
        peak = _peak(group, at)
        if best_peak < 0 or peak < best_peak:
            best, best_peak = at, peak
        if best_peak <= goal:
            break
    return best, best_peak


def _fit(group: _Group, order: Sequence[int], tight: bool) -> list[int]:
    """Offsets when tensors are placed in this order, each in the lowest gap that takes it, or if `tight` the least."""
    if group.pairs > PAIRS_MAX:
        return _fit_many(group, order, tight)
    at = _fit_below(group, order, tight, sum(group.size))
    assert at is not None
    return at


def _fit_below(group: _Group, order: Sequence[int], tight: bool, limit: int,
               before: Mapping[int, int] | None = None) -> list[int] | None:
    """The same by lists of neighbours; None as soon as a tensor reaches above `limit`. `before`: placed already."""
    size, near = group.size, group.near
    at, end = [0] * len(group), [0] * len(group)  # an end of 0: not yet placed
    for t, low in (before or {}).items():
        at[t], end[t] = low, low + size[t]
    for t in order:
        need = size[t]
        low, best, slack = 0, -1, limit + 1
        for start, stop in sorted([(at[o], end[o]) for o in near[t] if end[o]]):
            if need <= start - low < slack:
                best, slack = low, start - low
                if not tight:
                    break
            if stop > low:
                low = stop
        at[t] = low if best < 0 else best
        end[t] = at[t] + need
        if end[t] > limit:
            return None
    return at


def _fit_many(group: _Group, order: Sequence[int], tight: bool) -> list[int]:
    """The same in linear memory, for when the lists of neighbours would be long."""
    import numpy as np

    count = len(group)
    placed = np.zeros((4, count), np.int64)  # offset, end, first, last; in order of offset
    at = [0] * count
    for k, t in enumerate(order):
        start, end, first, last = placed[:, :k]
        need = group.size[t]
        busy = np.flatnonzero((first <= group.last[t]) & (last >= group.first[t]))
        low = np.zeros(len(busy) + 1, np.int64)
        np.maximum.accumulate(end[busy], out=low[1:])
        gap = start[busy] - low[:-1]
        fits = np.flatnonzero(gap >= need)
        where = len(busy) if not len(fits) else fits[int(np.argmin(gap[fits]))] if tight else fits[0]
        at[t] = int(low[where])
        i = int(np.searchsorted(start, at[t], side="right"))
        placed[:, i + 1 : k + 1] = placed[:, i:k].copy()
        placed[:, i] = at[t], at[t] + need, group.first[t], group.last[t]
    return at


def _search(group: _Group, goal: int, budget: _Budget) -> list[int]:
    """Offsets with a peak of at most `goal`, or the least that the budget allows to find."""
    best, peak = _greedy(group, goal)
    if peak <= goal:
        return best
    unit = gcd(*group.size)
    share = max(budget.left // 16, 6 * len(group) ** 2)  # a descent without a step back takes up to four

    def attempt(limit: int) -> list[int]:
        for rank in _ranks(group):
            with budget.share(share) as some:
                found, complete = _fill(group, rank, limit, some)
            if complete:
                return found
        return []

    found = attempt(goal)
    if found:
        return found
    best, peak = _climb(group, best, peak, goal, budget)
    part = 4
    while peak > goal and budget.left > 0:
        step = max((peak - goal) // part, 1)
        limit = (peak - step) // unit * unit  # every place is a sum of sizes
        found = attempt(limit) if limit >= goal else []
        if found:
            best, peak = found, _peak(group, found)
        elif step == 1:
            break
        else:
            part *= 4
    return best


def _climb(group: _Group, at: list[int], peak: int, goal: int, budget: _Budget) -> tuple[list[int], int]:
    """Better offsets by small changes of the order of placing, of those tensors that hold the peak up.

    Takes half of what is left of the budget.
    """
    chance = random.Random(len(group))
    size, near = group.size, group.near
    order = sorted(range(len(group)), key=lambda t: (at[t], t))
    cost = len(group) + 2 * group.pairs
    least = budget.left // 2
    while peak > goal and budget.left - cost >= least:
        budget.left -= cost
        pillars = [t for t in order if at[t] + size[t] == peak]
        seen = set(pillars)
        for t in pillars:  # grows on the way
            under = [o for o in near[t] if o not in seen and at[o] + size[o] == at[t]]
            pillars.extend(under)
            seen.update(under)
        turn = {t: i for i, t in enumerate(order)}
        t = pillars[int(chance.random() * len(pillars))]
        before = [o for o in near[t] if turn[o] < turn[t]]
        if not before:
            continue
        o = before[int(chance.random() * len(before))]
        tried = [x for x in order if x != t]
        tried.insert(turn[o], t)
        found = _fit_below(group, tried, False, peak)
        if found is not None:
            order, at, peak = tried, found, _peak(group, found)
    return at, peak


def _ranks(group: _Group) -> Iterable[list[int]]:
    """Orders for `_fill` to prefer tensors in: where one gets lost, another may find its way."""
    size, long = group.size, [x - f for f, x in zip(group.first, group.last, strict=True)]
    every = range(len(group))
    yield sorted(every, key=lambda t: (-long[t], -size[t], t))
    yield sorted(every, key=lambda t: (-size[t] * (long[t] + 1), t))
    yield sorted(every, key=lambda t: (-size[t], t))


def _fill(group: _Group, rank: Sequence[int], limit: int, budget: _Budget) -> tuple[list[int], bool]:
    """(offsets with a peak of at most `limit`, True); ([], True) if there are none, ([], False) if unknown.

    Depth first over packings in which each tensor rests on an earlier one and offsets never fall: among the packings
    that fit, the one whose sum of offsets is least is of that kind. For the same reason a tensor is not tried where
    another one, not yet placed, would fit wholly below it. A branch ends when what is left does not fit at some time.
    Tensors that are left and fall apart in time are filled in separately.
    """
    if len(group) > EXACT_MAX:
        return [], False
    size, first, end = group.size, group.first, [x + 1 for x in group.last]
    turn = [0] * len(group)
    for i, t in enumerate(rank):
        turn[t] = i
    sky, rest, at = [0] * group.times, list(group.loads), [0] * len(group)

    def fill(left: list[int], floor: tuple[int, int]) -> bool:
        if not left:
            return True
        parts, reach = [], -1
        for t in left:  # in order of `first`
            if first[t] >= reach:
                parts.append([t])
            else:
                parts[-1].append(t)
            reach = max(reach, end[t])
        if len(parts) == 1:
            return fill_one(left, floor, first[left[0]], reach)
        a, b = first[left[0]], reach
        kept = sky[a:b], rest[a:b]
        for part in sorted(parts, key=len):
            if not fill(part, floor):
                sky[a:b], rest[a:b] = kept
                return False
        return True

    def fill_one(left: list[int], floor: tuple[int, int], a: int, b: int) -> bool:
        lows = [(max(sky[first[t] : end[t]]), turn[t]) for t in left]
        lows.sort()
        base = [limit] * (b - a)  # where the lowest of the tensors that are left can start, at each time
        for low, i in reversed(lows):
            t = rank[i]
            f, e = first[t] - a, end[t] - a
            base[f:e] = [low if low > floor[0] else floor[0]] * (e - f)
        budget.left -= 4 * len(left) + 2 * (b - a)
        if any(low + r > limit for low, r in zip(base, rest[a:b], strict=True) if r):
            return False
        roof = min(low + size[rank[i]] for low, i in lows)
        for low, i in lows:
            if low >= roof or budget.left <= 0:
                return False
            if (low, i) < floor:
                continue
            t = rank[i]
            f, e = first[t], end[t]
            kept = sky[f:e], rest[f:e]
            sky[f:e] = [low + size[t]] * (e - f)
            rest[f:e] = [r - size[t] for r in kept[1]]
            if all(s + r <= limit for s, r in zip(sky[f:e], rest[f:e], strict=True)):
                at[t] = low
                if fill([u for u in left if u != t], (low, i)):
                    return True
            sky[f:e], rest[f:e] = kept
        return False

    found = fill(sorted(range(len(group)), key=lambda t: (first[t], t)), (0, -1))
    return (at, True) if found else ([], budget.left > 0)


# residents of a small memory


def _residents(group: _Group, values: Sequence[int], capacity: int, width: int, budget: _Budget) -> dict[int, int]:
    """Tensor -> offset in blocks, of the tensors of one group worth most. `width` limits the states of `_knapsack`.

    First whom to keep, by the bytes alive at each time; then where. If the chosen do not fit, because there would be
    gaps between them, those that stick out leave, and a choice for a memory with less room is tried as well.
    """
    value = [values[i] for i in group.ids]
    best: dict[int, int] = {}
    room = capacity
    for _ in range(TRIES if group.pairs <= PAIRS_MAX else 1):
        chosen = _knapsack(group, value, room, width)
        some = group.part(group.ids[t] for t in chosen)
        with budget.share(budget.left // 4) as steps:
            at = _pack(some, capacity, steps)
        over = _peak(some, at) - capacity
        if over > 0 and len(group) <= SUBSETS_MAX:
            return _best_subset(group, value, sum(value[t] for t in chosen), capacity, budget)
        held = {t: low for t, low in zip(chosen, at, strict=True) if low + group.size[t] <= capacity}
        if len(group) > SUBSETS_MAX and group.pairs <= PAIRS_MAX:
            with budget.share(budget.left // 4) as steps:
                _exchange(group, value, held, capacity, steps)
        if sum(value[t] for t in held) > sum(value[t] for t in best):
            best = held
        if over <= 0 or room <= over:
            break
        room -= over
    return {group.ids[t]: low for t, low in best.items()}


def _best_subset(group: _Group, value: Sequence[int], most: int, capacity: int, budget: _Budget) -> dict[int, int]:
    """The same by trying every subset worth at most `most`, the best first."""
    every = range(len(group))
    subsets = [[t for t in every if bits >> t & 1] for bits in range(1 << len(group))]
    for worth, subset in sorted((-sum(value[t] for t in ts), ts) for ts in subsets):
        if -worth <= most:
            some = group.part(group.ids[t] for t in subset)
            if some.load <= capacity:
                with budget.share(budget.left // 4) as steps:
                    at = _pack(some, capacity, steps)
                if _peak(some, at) <= capacity:
                    return dict(zip(some.ids, at, strict=True))
    return {}


def _knapsack(group: _Group, value: Sequence[int], capacity: int, width: int) -> list[int]:
    """Tensors of most value of which never more than `capacity` blocks are alive.

    In order of time, for every set of tensors that may be alive the best choice that leads to it. That is the best of
    all unless more than `width` sets come together: then those go that are worth least, after what their tensors will
    still take of the memory has been paid at `_prices`.
    """
    first, last, size = group.first, group.last, group.size
    if group.load <= capacity:
        return list(range(len(group)))
    paid = _prices(group, value, capacity)
    if width < WIDTH_LEAST:
        return _by_gain(group, value, capacity, paid)
    states: dict[tuple[int, ...], tuple[int, tuple[int, Any] | None]] = {(): (0, None)}
    for t in sorted(range(len(group)), key=lambda t: (first[t], t)):
        now = first[t]
        must = max(group.loads[now : last[t] + 1]) <= capacity
        after: dict[tuple[int, ...], tuple[int, tuple[int, Any] | None]] = {}
        for state, (worth, taken) in states.items():
            alive = tuple([o for o in state if last[o] >= now])
            if sum([size[o] for o in alive]) + size[t] <= capacity:
                key = (*alive, t)
                if key not in after or after[key][0] < worth + value[t]:
                    after[key] = worth + value[t], (t, taken)
            if not must and (alive not in after or after[alive][0] < worth):
                after[alive] = worth, taken
        if len(after) > width:
            cost = {o: size[o] * (paid[last[o] + 1] - paid[now]) for state in after for o in state}
            net = [(fsum([cost[o] for o in state]) - worth, state) for state, (worth, _) in after.items()]
            after = {state: after[state] for _, state in sorted(net)[:width]}
        states = after
    _, chosen = max(states.values(), key=lambda s: s[0])
    out = []
    while chosen:
        t, chosen = chosen
        out.append(t)
    return out[::-1]


def _by_gain(group: _Group, value: Sequence[int], capacity: int, paid: Sequence[float]) -> list[int]:
    """The same, quickly: by what a block of a tensor is worth above its price, as long as there is room."""
    spans = [(s, f, x + 1) for s, f, x in zip(group.size, group.first, group.last, strict=True)]
    gain = [v / s - paid[e] + paid[f] for v, (s, f, e) in zip(value, spans, strict=True)]
    loads = [0] * group.times
    out = []
    for t in sorted(range(len(group)), key=lambda t: (-gain[t], t)):
        s, f, e = spans[t]
        if max(loads[f:e]) + s <= capacity:
            loads[f:e] = [x + s for x in loads[f:e]]
            out.append(t)
    return sorted(out)


def _prices(group: _Group, value: Sequence[int], capacity: int) -> list[float]:
    """At each time, the sum of all earlier prices of a block, so that demand at these prices about fills the memory.

    Lagrange multipliers of the capacity at each time, by subgradient steps with a falling target.
    """
    spans = [(s, f, x + 1) for s, f, x in zip(group.size, group.first, group.last, strict=True)]
    price = [0.0] * group.times
    best, best_sums = float("inf"), [0.0] * (group.times + 1)
    for i in range(min(100, 200_000 // len(group))):
        sums = [0.0, *accumulate(price)]
        change = [0] * (group.times + 1)
        worth = capacity * sums[-1]
        for (s, f, e), v in zip(spans, value, strict=True):
            gain = v - s * (sums[e] - sums[f])
            if gain > 0:
                worth += gain
                change[f] += s
                change[e] -= s
        if worth < best:
            best, best_sums = worth, sums
        slope = [load - capacity if load > capacity or p > 0 else 0
                 for load, p in zip(accumulate(change), price, strict=False)]
        norm = sum(g * g for g in slope)
        if not norm:
            break
        step = (worth - best * (1 - 0.2 * 0.95**i)) / norm
        price = [max(p + step * g, 0.0) for p, g in zip(price, slope, strict=True)]
    return best_sums


def _exchange(group: _Group, value: Sequence[int], held: dict[int, int], capacity: int,
              budget: _Budget) -> None:
    """Take in tensors that are left out, in the place of those in their way if these are worth less together."""
    size, near = group.size, group.near
    order = sorted(range(len(group)), key=lambda t: (-value[t] / size[t], t))
    changed = True
    while changed:
        changed = False
        for t in order:
            if t in held:
                continue
            busy = [(held[o], held[o] + size[o], value[o], o) for o in near[t] if o in held]
            budget.left -= len(busy) ** 2 + 1
            if budget.left < 0:
                return
            best, cost = -1, value[t]
            for low in {0, capacity - size[t], *(b[1] for b in busy), *(b[0] - size[t] for b in busy)}:
                if 0 <= low <= capacity - size[t]:
                    lost = sum([b[2] for b in busy if b[0] < low + size[t] and low < b[1]])
                    if (lost, low) < (cost, best):
                        best, cost = low, lost
            if cost < value[t]:
                for start, stop, _, o in busy:
                    if start < best + size[t] and best < stop:
                        del held[o]
                held[t] = best
                changed = True
