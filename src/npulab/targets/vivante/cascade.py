"""Run convolutions that feed each other stripe by stripe, so that what lies between them fits on-chip SRAM.

A group is a chain of convolutions, or a tree of them where branches read one tensor. Cut the rows of what leaves it
into stripes; each stripe needs some rows of every tensor before, a few more than its share where kernels are higher
than one, and only those are computed, into a buffer of that many rows. Rows at the seams are computed twice; nothing
else changes, so every byte is the same.

An addition ends a group. The engine adds planes as one run of bytes, and a stripe of a tensor is none: it would have to
be copied together first, which costs more than it saves.

The descriptors can say all of it: sizes apart from pitches, and an offset only where the image's border is. Circular
buffers, which would save computing seams twice, are fields that nobody has seen in use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from npulab.targets.vivante.jobs import Job, NNJob, Place
from npulab.targets.vivante.tiling import cdiv

STRIPES = (2, 3, 4, 5, 6, 8)
"""Stripes that are tried."""
LONGEST = 6
"""Convolutions of a group."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Jobs first..last (exclusive) of a list: one convolution, whole or in pieces, from one tensor to one other."""

    first: int
    last: int
    source: int
    result: int


def stages(jobs: Sequence[Job]) -> list[Stage | None]:
    """The jobs' stages in order; None stands for a job that cannot be in a group."""
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


def groups(jobs: Sequence[Job], fixed: set[int]) -> list[list[Stage]]:
    """Every run of 2 to LONGEST stages in which all but the first read what an earlier one of them writes.

    Of what is written, either all readers are in the group, or none: a chain, or a tree where a tensor has several
    readers. `fixed` tensors are needed elsewhere, or share memory with others.
    """
    found = stages(jobs)
    readers = Counter(s.source for s in found if s)
    writers = Counter(s.result for s in found if s)
    others = {t for job in jobs if not isinstance(job, NNJob) or job.last_word is not None
              for t in (job.source.tensor, job.result.tensor)}
    out = []
    for i in range(len(found)):
        group: list[Stage] = []
        for stage in found[i : i + LONGEST]:
            if stage is None or (group and stage.source not in {s.result for s in group}):
                break
            group.append(stage)
            inner = inner_results(group)
            if inner and not any(t in fixed or t in others or writers[t] != 1
                                 or readers[t] != sum(s.source == t for s in group) for t in inner):
                out.append(list(group))
    return out


def inner_results(group: Sequence[Stage]) -> list[int]:
    """Tensors that one stage of the group writes and others of it read, in the order in which they are written."""
    read = {s.source for s in group}
    return [s.result for s in group if s.result in read]


@dataclass(frozen=True, slots=True)
class Striped:
    """A group as stripes: the jobs, and the sizes (bytes) of the new tensors, numbered from `new` on."""

    jobs: tuple[NNJob, ...]
    sizes: tuple[int, ...]


def striped(jobs: Sequence[Job], group: Sequence[Stage], count: int, new: int) -> Striped | None:
    """The group in `count` stripes, its inner tensors replaced by new ones. None if there are not enough rows."""
    heads = [h for h in (jobs[s.first] for s in group) if isinstance(h, NNJob)]  # all are
    inner = inner_results(group)
    if any(h.output.y < 2 * count for h, s in zip(heads, group, strict=True) if s.result not in inner):
        return None
    needs = [_rows(heads, group, k, count) for k in range(count)]
    writer = {s.result: i for i, s in enumerate(group)}
    pitches = {t: max(need[writer[t]][1] - need[writer[t]][0] for need in needs) for t in inner}
    buffers = {t: (new + i, pitches[t]) for i, t in enumerate(inner)}
    out: list[NNJob] = []
    for k, need in enumerate(needs):
        for i, stage in enumerate(group):
            again = max(0, needs[k - 1][i][1] - need[i][0]) if k else 0
            source = (*buffers[stage.source], need[writer[stage.source]][0]) if stage.source in buffers else None
            for job in jobs[stage.first : stage.last]:
                assert isinstance(job, NNJob)
                out.append(_stripe(job, need[i], again, source, buffers.get(stage.result)))
    sizes = [_channels(jobs, group[writer[t]]) * pitches[t] * heads[writer[t]].output.row for t in inner]
    return Striped(tuple(out), tuple(sizes))


def _rows(heads: Sequence[NNJob], group: Sequence[Stage], stripe: int, count: int) -> list[tuple[int, int]]:
    """Rows of each stage's output that one of `count` stripes computes: a share of what leaves the group, and of what
    lies inside as many as its readers need."""
    needed: dict[int, tuple[int, int]] = {}
    out: list[tuple[int, int]] = []
    for h, s in zip(reversed(heads), reversed(group), strict=True):
        own = needed.get(s.result) or (cdiv(h.output.y * stripe, count), cdiv(h.output.y * (stripe + 1), count))
        top, end = input_rows(h, *own)
        known = needed.get(s.source, (top, end))
        needed[s.source] = min(top, known[0]), max(end, known[1])
        out.append(own)
    return out[::-1]


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
