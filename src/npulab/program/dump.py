"""A Program as loose files, for other tools: `jobs.json`, and raw little-endian descriptors and streams beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from npulab.errors import UsageError
from npulab.program.files import write_atomically
from npulab.program.law import DESCRIPTOR_BYTES, Memory
from npulab.program.types import NpuStep, Program


def dump(program: Program, directory: str | os.PathLike[str]) -> None:
    """Write `program` into `directory`, which is made if need be; `jobs.json` comes last, once all it names is there.

        {"target", "plan", "jobs": [{"index", "kind", "role", "nodes", "nn", "coef", "tp": [...], "cmd"}],
         "submits": [file, ...], "host_nodes": [{"node", "op", "reasons"}], "memory": [{"name", "address", "bytes"}]}

    A job's "nn" and "coef" are null where it has none. Jobs stand in the order of execution. The first submission is
    the initialisation stream; each NPU step has one more.

    Raises: UsageError if the directory cannot be written.
    """
    folder = Path(directory)
    memory = Memory(program.sections)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:
        raise UsageError(f"cannot make the folder {folder}", got=getattr(e, "strerror", None) or e) from e

    def put(name: str, data: bytes) -> str:
        try:
            (folder / name).write_bytes(data)
        except OSError as e:
            raise UsageError(f"cannot write {folder / name}", got=e.strerror or e) from e
        return name

    jobs: list[dict[str, Any]] = []
    submits: list[str] = []
    if program.init:
        submits.append(put("submit_0.bin", _raw(program.init)))
    for step in program.steps:
        if not isinstance(step, NpuStep):
            continue
        submits.append(put(f"submit_{len(submits)}.bin", _raw(step.words)))
        for job in step.jobs:
            stem = f"job_{job.index:03}"
            found = [memory.content(a, DESCRIPTOR_BYTES[job.kind]) for a in job.descriptors]
            first, count = job.words
            jobs.append({
                "index": job.index, "kind": job.kind, "role": job.role, "nodes": job.nodes,
                "nn": put(f"{stem}_nn.bin", found[0]) if job.kind == "nn" else None,
                "coef": put(f"{stem}_coef.bin", memory.content(*job.coefficients)) if job.coefficients else None,
                "tp": [put(f"{stem}_tp{c}.bin", d) for c, d in enumerate(found)] if job.kind == "tp" else [],
                "cmd": put(f"{stem}_cmd.bin", _raw(step.words[first : first + count])),
            })
    report = {
        "target": program.target, "plan": program.plan, "jobs": jobs, "submits": submits,
        "host_nodes": [{"node": h.node, "op": h.op, "reasons": h.reasons} for h in program.host_nodes],
        "memory": [{"name": s.name, "address": s.address, "bytes": s.size} for s in program.sections],
    }
    write_atomically(folder / "jobs.json", msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def _raw(words: tuple[int, ...]) -> bytes:
    return np.array(words, "<u4").tobytes()
