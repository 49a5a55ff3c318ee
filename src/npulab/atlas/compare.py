"""Published figures beside modelled ones. Only rows that timed a program of ours count as the model's errors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from npulab.atlas.types import Atlas, Model, Row, TimedProgram
from npulab.errors import ModelError, UsageError
from npulab.program.files import read_bounded
from npulab.targets.target import find_target

if TYPE_CHECKING:
    from npulab.atlas.load import Conflict

LIMIT = 1 << 30
"""Bytes that a model file may have."""

OURS = TimedProgram(plan="best")
"""What a row of another compiler is set beside."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A row and what the timing model says of its program. `made_from`: what the time was computed from."""

    row: Row
    modelled_ms: float
    interval_ms: tuple[float, float]
    role: Literal["fit", "test"]
    made_from: Literal["recorded counts", "model file"]

    @property
    def error_percent(self) -> float:
        """Of the modelled time: above 0 if the model is slower than the device was."""
        published = self.row.ms
        assert published is not None
        return 100 * (self.modelled_ms / published - 1)


@dataclass(frozen=True, slots=True)
class Errors:
    """Of some compared rows. `worst` keeps its sign; `inside` counts published figures within their intervals."""

    rows: int
    mean_absolute_percent: float
    worst_percent: float
    inside: int


def predict(row: Row) -> Compared | None:
    """What the target's model says, from counts recorded in the package. None: it has no such row."""
    if row.program is None:
        return None
    p = find_target(row.program.target).predict(row.id)
    return None if p is None else Compared(row, p.ms, p.interval_ms, p.role, "recorded counts")


def find_models(atlas: Atlas, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Ids of the atlas's models -> files of these names in the folder or in folders in it.

    Raises: UsageError if there is no such folder or none of the files; ModelError if a file is not the timed one.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"--models: {root} is not a folder", try_="a folder that holds the model files")
    wanted = {m.file: m for m in atlas.models if m.file is not None}
    found: dict[str, Path] = {}
    for file, model in wanted.items():
        paths = sorted(p for p in (root / file, *root.glob(f"*/{file}")) if p.is_file())
        if paths:
            found[model.id] = paths[0]
            _check_digest(model, paths[0])
    if not found:
        raise UsageError(f"--models: {root} holds no model of the atlas", want=", ".join(sorted(wanted)))
    return found


def _check_digest(model: Model, path: Path) -> None:
    got = hashlib.sha256(read_bounded(path, "a model file", LIMIT)).hexdigest()
    if model.sha256 not in (None, got):
        raise ModelError(f"{path} is not the file that the figures are of", want=f"SHA-256 {model.sha256}",
                         got=f"SHA-256 {got}", try_="the file of that name in Mesa's source package")


class Profiler:
    """Times of programs compiled from model files, each computed once."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._done: dict[tuple[str, TimedProgram], tuple[float, tuple[float, float]]] = {}

    def has(self, row: Row) -> bool:
        return row.model in self._files

    def time(self, row: Row, program: TimedProgram) -> tuple[float, tuple[float, float]]:
        """(ms, interval in ms) of the row's network, compiled so."""
        from npulab import api

        key = row.model, program
        if key not in self._done:
            p = api.profile(self._files[row.model], program.target, program.plan, program.options())
            self._done[key] = p.total_ns / 1e6, (p.interval_ns[0] / 1e6, p.interval_ns[1] / 1e6)
        return self._done[key]

    def compared(self, row: Row) -> Compared | None:
        """What the model says of the row's program, compiled anew. A row unknown to the calibration is a test."""
        if row.program is None or not self.has(row):
            return None
        recorded = predict(row)
        return Compared(row, *self.time(row, row.program), recorded.role if recorded else "test", "model file")

    def ours(self, row: Row) -> float | None:
        """ms of our own plan, beside a figure of another compiler for the same chip."""
        other = row.comparable == "same silicon, other compiler" and row.kind == "latency"
        return self.time(row, OURS)[0] if other and self.has(row) else None


def errors(compared: Iterable[Compared], role: str) -> Errors | None:
    """Errors of the rows with that role; None if there are none."""
    some = [c for c in compared if c.role == role]
    if not some:
        return None
    found = [c.error_percent for c in some]
    return Errors(len(some), sum(map(abs, found)) / len(found), max(found, key=abs),
                  sum(c.interval_ms[0] <= (c.row.ms or 0) <= c.interval_ms[1] for c in some))


def as_data(atlas: Atlas, rows: Sequence[Row], compared: Sequence[Compared], ours: dict[str, float],
            found: Sequence[Conflict]) -> dict[str, Any]:
    """The answer of `npulab atlas --json`."""
    by_id = {c.row.id: c for c in compared}
    in_conflict: dict[str, set[str]] = {}
    for c in found:
        for r in c.rows:
            in_conflict.setdefault(r.id, set()).update(o.id for o in c.rows if o.id != r.id)
    return {
        "rows": [_row(atlas, r, by_id.get(r.id), ours.get(r.id), sorted(in_conflict.get(r.id, ()))) for r in rows],
        "summary": {
            "rows": len(rows), "latency": sum(r.kind == "latency" for r in rows),
            "throughput": sum(r.kind == "throughput" for r in rows), "predicted": len(compared),
            **{role: _errors(errors(compared, role)) for role in ("fit", "test")},
            "conflicts": [{"rows": [r.id for r in c.rows], "lowest": c.lowest, "highest": c.highest, "unit": c.unit,
                           "ratio": c.ratio} for c in found],
        },
    }


def _errors(e: Errors | None) -> dict[str, float] | None:
    return None if e is None else {
        "rows": e.rows, "mean_absolute_percent": e.mean_absolute_percent, "worst_percent": e.worst_percent,
        "inside_interval": e.inside,
    }


def _row(atlas: Atlas, r: Row, c: Compared | None, ours: float | None, in_conflict: list[str]) -> dict[str, Any]:
    source = atlas.source(r)
    program = r.program and {"target": r.program.target, "plan": r.program.plan,
                             "options": r.program.options().as_text()}
    return {
        "id": r.id, "device": r.device, "chip": atlas.chip(r), "board": r.board, "engine": r.engine, "stack": r.stack,
        "model": r.model, "published_as": r.published_as, "input": r.input, "setup": r.setup,
        "published_ms": r.ms, "value": r.value, "unit": r.unit, "unit_inferred": r.unit_inferred,
        "approximate": r.approximate, "range": r.range, "kind": r.kind,
        "modelled_ms": c.modelled_ms if c else None, "interval_ms": c.interval_ms if c else None,
        "error_percent": c.error_percent if c else None, "role": c.role if c else None,
        "made_from": c.made_from if c else None, "best_plan_ms": ours, "comparable": r.comparable, "program": program,
        "same_program_as": r.same_program_as, "included": r.included, "precision": r.precision, "batch": r.batch,
        "threads": r.threads, "cores": r.cores, "evidence": r.evidence, "date": r.date, "source": source.title,
        "url": source.url, "note": r.note, "conflicts_with": in_conflict,
    }
