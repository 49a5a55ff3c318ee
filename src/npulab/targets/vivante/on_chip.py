"""Which tensors lie in on-chip SRAM, in which order jobs run and which run in stripes so that more of them can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from npulab.plan.memory import Lifetime, choose_resident
from npulab.program.types import Choice
from npulab.targets.vivante.cascade import STRIPES, groups, inner_results, striped
from npulab.targets.vivante.jobs import Job
from npulab.targets.vivante.order import depth_first
from npulab.targets.vivante.search import Search

GROUPS_MAX = 24
"""Groups of jobs that are tried in stripes, those that save most first."""
BYTES_PER_NS = 16
"""A byte kept off the DRAM bus counts as this fraction of a nanosecond, even where it saves no time by itself."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """What the arrangement has to know of tensors.

    home    the root that a tensor is part of.    extent  (root, first byte in it, end).
    lives   the roots' lifetimes, for a list of jobs and sizes.
    fixed   roots that the host reads or writes.  shared  those, and tensors that are part of others or have parts.
    """

    home: Callable[[int], int]
    extent: Callable[[int], tuple[int, int, int]]
    lives: Callable[[Sequence[Job], Sequence[int]], dict[int, Lifetime]]
    fixed: set[int]
    shared: set[int]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Jobs, the sizes of all tensors, root tensor -> offset in SRAM, nanoseconds of all jobs, what was chosen."""

    jobs: list[Job]
    sizes: list[int]
    resident: Mapping[int, int]
    ns: int
    choices: tuple[Choice, ...] = ()


def arrange(jobs: list[Job], sizes: list[int], tensors: Tensors, search: Search, capacity: int, alignment: int,
            stripes: bool) -> Arrangement:
    """The fastest arrangement found; never slower, by the model, than all tensors in DRAM."""
    plain = sum(search.cost(j) for j in jobs)
    best = _resident(jobs, sizes, tensors, search, capacity, alignment)
    choices = []
    other = depth_first(jobs, tensors.extent)
    if other != jobs:
        reordered = _resident(other, sizes, tensors, search, capacity, alignment)
        if reordered.ns < min(best.ns, plain):
            moved = next(b for a, b in zip(jobs, other, strict=True) if a is not b)
            choices.append(Choice(moved.nodes[0], "jobs right behind what they read", "jobs in the model's order",
                                  best.ns - reordered.ns, "axi-sram", "inferred"))
            best = reordered
    if best.ns >= plain:
        best = Arrangement(jobs, sizes, {}, plain)
    choices += _residents_chosen(best, tensors, search)
    tried = 0
    while stripes and tried < GROUPS_MAX:
        better, count = _one_group_more(best, tensors, search, capacity, alignment)
        tried += count
        if better is None:
            break
        best = better
        choices.append(best.choices[-1])
    return Arrangement(best.jobs, best.sizes, best.resident, best.ns, tuple(choices))


def _costs(jobs: Sequence[Job], resident: Mapping[int, int], tensors: Tensors, search: Search) -> list[int]:
    return [search.cost(j, tensors.home(j.source.tensor) in resident, tensors.home(j.result.tensor) in resident)
            for j in jobs]


def _resident(jobs: list[Job], sizes: list[int], tensors: Tensors, search: Search, capacity: int,
              alignment: int) -> Arrangement:
    """The jobs as they are, with the best choice of tensors in SRAM."""
    lives = tensors.lives(jobs, sizes)
    inner = [r for r in lives if r not in tensors.fixed]
    values = dict.fromkeys(inner, 0)
    for job in jobs:
        whole = search.cost(job)
        for tensor, moved, other in zip((job.source.tensor, job.result.tensor), search.traffic(job),
                                        (search.cost(job, True), search.cost(job, False, True)), strict=True):
            root = tensors.home(tensor)
            if root in values:
                values[root] += whole - other + moved // BYTES_PER_NS
    kept = choose_resident([lives[r] for r in inner], [values[r] for r in inner], capacity, alignment)
    resident = {inner[i]: offset for i, offset in kept.items()}
    return Arrangement(jobs, sizes, resident, sum(_costs(jobs, resident, tensors, search)))


def _residents_chosen(found: Arrangement, tensors: Tensors, search: Search) -> list[Choice]:
    saved: dict[int, int] = {}
    for job, ns in zip(found.jobs, _costs(found.jobs, found.resident, tensors, search), strict=True):
        if gain := search.cost(job) - ns:
            saved[job.nodes[0]] = saved.get(job.nodes[0], 0) + gain
    return [Choice(node, "tensors in on-chip SRAM", "tensors in DRAM", ns, "axi-sram", "inferred")
            for node, ns in saved.items() if ns > 0]


def _one_group_more(now: Arrangement, tensors: Tensors, search: Search, capacity: int,
                    alignment: int) -> tuple[Arrangement | None, int]:
    """(the arrangement with one more group in stripes, if some group makes it faster; how many were tried)."""
    found = []
    ns = _costs(now.jobs, now.resident, tensors, search)
    for group in groups(now.jobs, tensors.shared):
        between = inner_results(group)
        if all(t in now.resident for t in between):
            continue
        first, last = group[0].first, group[-1].last
        before = sum(ns[first:last])
        outer = {group[0].source, *(s.result for s in group)} - set(between)
        for count in STRIPES:
            cut = striped(now.jobs, group, count, len(now.sizes))
            if cut is None or sum(cut.sizes) > capacity:
                continue
            inside = {t for t in outer if tensors.home(t) in now.resident} | set(range(len(now.sizes),
                                                                                    len(now.sizes) + len(cut.sizes)))
            after = sum(search.cost(j, j.source.tensor in inside, j.result.tensor in inside) for j in cut.jobs)
            if after < before:
                found.append((before - after, -count, first, last, group, cut))
    found.sort(key=lambda f: (-f[0], -f[1], f[2], f[3]))
    for tried, (_, count, first, last, group, cut) in enumerate(found[:3], 1):
        jobs = [*now.jobs[:first], *cut.jobs, *now.jobs[last:]]
        better = _resident(jobs, [*now.sizes, *cut.sizes], tensors, search, capacity, alignment)
        if better.ns < now.ns:
            nodes = ", ".join(dict.fromkeys(str(now.jobs[s.first].nodes[0]) for s in group))
            choice = Choice(now.jobs[first].nodes[0], f"operators {nodes} in {-count} stripes through on-chip SRAM",
                            "one after the other", now.ns - better.ns, "cascade", "inferred")
            return Arrangement(better.jobs, better.sizes, better.resident, better.ns, (choice,)), tried
    return None, max(1, len(found[:3]))
