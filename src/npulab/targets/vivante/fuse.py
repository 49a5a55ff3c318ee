"""Jobs that another job can do on its way: a requantizing copy behind a transpose."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from npulab.targets.vivante.jobs import Job, Place, Share, TPJob

SCALING = ("in_zp", "out_zp", "alu_output_post_multiplier", "alu_output_postshift")
"""The fields of a requantization, the same in every share of a job."""


def scaling_transposes(jobs: Iterable[Job], needed: Collection[int]) -> list[Job]:
    """The jobs, with each requantizing copy done by the transpose that made its input, and by nothing else read.

    A transpose changes no byte, so what is rounded, and how, stays the same. `needed` are tensors that are part of
    others, have parts, or cross a border.
    """
    out = list(jobs)
    touching: dict[int, list[int]] = {}
    for i, job in enumerate(out):
        for tensor in {job.source.tensor, job.result.tensor}:
            touching.setdefault(tensor, []).append(i)
    gone = set()
    for tensor, users in touching.items():
        if len(users) != 2 or tensor in needed:
            continue
        first, second = (out[i] for i in users)
        if (isinstance(first, TPJob) and first.role in ("transpose", "detranspose") and first.result == Place(tensor)
                and isinstance(second, TPJob) and second.role == "rescale" and second.source == Place(tensor)
                and all(s.fields["in_zp"] == s.fields["out_zp"] for s in first.shares)):
            fields = {name: second.shares[0].fields[name] for name in SCALING}
            shares = tuple(Share(s.source, s.result, {**s.fields, **fields}) for s in first.shares)
            out[users[0]] = replace(first, nodes=second.nodes, result=second.result, shares=shares)
            gone.add(users[1])
    return [job for i, job in enumerate(out) if i not in gone]
