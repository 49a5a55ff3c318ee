"""Other orders for the same jobs, so that a tensor's readers come soon after it and on-chip SRAM is free again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from npulab.targets.vivante.jobs import Job

JOBS_MAX = 1000
"""Jobs of a region whose order is looked at: dependencies are found pair by pair."""


def depth_first(jobs: Sequence[Job], bytes_of: Callable[[int], tuple[int, int, int]]) -> list[Job]:
    """The jobs so that one that reads what was just written goes first; the given order among equals.

    `bytes_of` a tensor: (root tensor, first byte, end) of what it covers there. Two jobs keep their order if one writes
    bytes that the other reads or writes.
    """
    if len(jobs) > JOBS_MAX:
        return list(jobs)
    reads = [bytes_of(job.source.tensor) for job in jobs]
    writes = [bytes_of(job.result.tensor) for job in jobs]
    needs = [[i for i in range(j) if _meet(writes[i], reads[j]) or _meet(reads[i], writes[j])
              or (_meet(writes[i], writes[j]) and jobs[i].result.tensor != jobs[j].result.tensor)]
             for j in range(len(jobs))]
    waiting = [len(n) for n in needs]
    dependents: list[list[int]] = [[] for _ in jobs]
    for j, before in enumerate(needs):
        for i in before:
            dependents[i].append(j)
    done = dict.fromkeys(range(len(jobs)), -1)
    ready = [j for j, n in enumerate(waiting) if not n]
    out: list[Job] = []
    while ready:
        chosen = min(ready, key=lambda j: (-max((done[i] for i in needs[j]), default=-1), j))
        ready.remove(chosen)
        done[chosen] = len(out)
        out.append(jobs[chosen])
        for j in dependents[chosen]:
            waiting[j] -= 1
            if not waiting[j]:
                ready.append(j)
    return out


def _meet(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
