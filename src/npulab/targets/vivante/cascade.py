"""Run convolutions that feed each other stripe by stripe, so that what lies between them fits on-chip SRAM.

A chain is convolutions in a row, each the only reader of the one before. Cut the rows of the last output into stripes;
each stripe needs some rows of every tensor before it, a few more than its share where kernels are higher than one, and
only those are computed, into a buffer of that many rows. Rows at the seams are computed twice; nothing else changes, so
every byte is the same.

The descriptors can say all of it: sizes apart from pitches, and an offset only where the image's border is. Circular
buffers, which would save computing seams twice, are fields that nobody has seen in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from npulab.targets.vivante.jobs import Job, NNJob, Place
from npulab.targets.vivante.tiling import cdiv

STRIPES = (2, 3, 4, 5, 6, 8)
"""Stripes that are tried."""
LONGEST = 4
"""Convolutions of a chain."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Jobs first..last (exclusive) of a list: one convolution, whole or in pieces, from one tensor to one other."""

    first: int
    last: int
    source: int
    result: int


def stages(jobs: Sequence[Job]) -> list[Stage | None]:
    """The jobs' stages in order; None stands for a job that cannot be in a chain."""
    out: list[Stage | None] = []
    for i, job in enumerate(jobs):
        if not isinstance(job, NNJob) or job.last_word is not None:
            out.append(None)
            continue
        before = out[-1] if out else None
        if before and (before.source, before.result) == (job.source.tensor, job.result.tensor):
            out[-1] = replace(before, last=i + 1)
        else:
            out.append(Stage(i, i + 1, job.source.tensor, job.result.tensor))
    return out


def chains(jobs: Sequence[Job], fixed: set[int]) -> list[list[Stage]]:
    """Every run of 2 to LONGEST stages, each tensor between them written by one and read by the next alone.

    `fixed` tensors are needed elsewhere, or share memory with others.
    """
    readers: dict[int, int] = {}
    writers: dict[int, int] = {}
    found = stages(jobs)
    for s in found:
        if s:
            readers[s.source] = readers.get(s.source, 0) + 1
            writers[s.result] = writers.get(s.result, 0) + 1
    others = {t for job in jobs if not isinstance(job, NNJob) or job.last_word is not None
              for t in (job.source.tensor, job.result.tensor)}

    def linked(a: Stage | None, b: Stage | None) -> bool:
        return (a is not None and b is not None and a.result == b.source and a.result not in fixed
                and a.result not in others and readers[a.result] == writers[a.result] == 1)

    out = []
    for i in range(len(found)):
        for n in range(2, LONGEST + 1):
            if i + n > len(found) or not linked(found[i + n - 2], found[i + n - 1]):
                break
            out.append([s for s in found[i : i + n] if s])
    return out


@dataclass(frozen=True, slots=True)
class Striped:
    """A chain as stripes: the jobs, and the sizes (bytes) of the new tensors, numbered from `new` on."""

    jobs: tuple[NNJob, ...]
    sizes: tuple[int, ...]


def striped(jobs: Sequence[Job], chain: Sequence[Stage], count: int, new: int) -> Striped | None:
    """The chain in `count` stripes, its inner tensors replaced by new ones. None if there are not enough rows."""
    heads = [h for h in (jobs[s.first] for s in chain) if isinstance(h, NNJob)]  # all are
    rows = heads[-1].output.y
    if rows < 2 * count:
        return None
    cuts = [cdiv(rows * i, count) for i in range(count + 1)]
    # Rows of each stage's output that each stripe computes, from the last stage back.
    needs: list[list[tuple[int, int]]] = []
    for top, end in pairwise(cuts):
        own = [(top, end)]
        for h in reversed(heads[1:]):
            own.append(input_rows(h, *own[-1]))
        needs.append(own[::-1])
    pitches = [max(end - top for top, end in (need[i] for need in needs)) for i in range(len(heads) - 1)]
    out: list[NNJob] = []
    for k, need in enumerate(needs):
        for i, stage in enumerate(chain):
            again = max(0, needs[k - 1][i][1] - need[i][0]) if k else 0
            for job in jobs[stage.first : stage.last]:
                assert isinstance(job, NNJob)
                out.append(_stripe(job, need[i], again,
                                   None if i == 0 else (new + i - 1, pitches[i - 1], need[i - 1][0]),
                                   None if i == len(chain) - 1 else (new + i, pitches[i])))
    sizes = [_channels(jobs, s) * p * h.output.row
             for s, p, h in zip(chain, pitches, heads, strict=False)]
    return Striped(tuple(out), tuple(sizes))


def _channels(jobs: Sequence[Job], stage: Stage) -> int:
    """Output channels of a stage, over all its pieces."""
    return sum(job.output.z for job in jobs[stage.first : stage.last] if isinstance(job, NNJob))


def input_rows(job: NNJob, top: int, end: int) -> tuple[int, int]:
    """Rows of the input, inside it, that rows top..end of the output need."""
    step = 2 if job.first_pixel else 1
    first = top * step + job.offset_y
    last = (end - 1) * step + job.kernel_y + job.offset_y
    return max(0, first), min(job.input.y, last)


def _stripe(job: NNJob, rows: tuple[int, int], again: int, source: tuple[int, int, int] | None,
            result: tuple[int, int] | None) -> NNJob:
    """Rows top..end of a job's output. `source` (tensor, rows of its planes, first row it holds) and `result` (tensor,
    rows of its planes) replace whole tensors by buffers of a stripe."""
    top, end = rows
    first, last = input_rows(job, top, end)
    step = 2 if job.first_pixel else 1
    offset_y = min(0, top * step + job.offset_y)
    row_in, row_out = job.input.row, job.output.row
    if source is None:
        pitch_in, place_in = job.input.rows, Place(job.source.tensor, job.source.offset + first * row_in)
    else:
        tensor, pitch_in, held = source
        channel = job.source.offset // job.input.plane
        place_in = Place(tensor, (channel * pitch_in + first - held) * row_in)
    if result is None:
        pitch_out, place_out = job.output.rows, Place(job.result.tensor, job.result.offset + top * row_out)
    else:
        tensor, pitch_out = result
        place_out = Place(tensor, job.result.offset // job.output.plane * pitch_out * row_out)
    wide, _ = job.tile_extent
    return replace(
        job, source=place_in, result=place_out, offset_y=offset_y,
        input=replace(job.input, y=last - first, x_stride=row_in, y_stride=pitch_in),
        output=replace(job.output, y=end - top, x_stride=row_out, y_stride=pitch_out),
        tile_extent=(wide, (end - top) * step), tiling=None, again=again,
    )
