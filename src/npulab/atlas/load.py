"""The data file to an Atlas, checked; and questions to it."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from npulab.atlas.types import MS, Atlas, Row
from npulab.errors import ModelError, UnsupportedError
from npulab.program.files import read_bounded

PUBLISHED = Path(__file__).parent / "published.toml"
LIMIT = 16 << 20
"""Bytes that a data file may have."""


def load(path: str | os.PathLike[str] = PUBLISHED) -> Atlas:
    """The atlas of a data file; without one, the atlas of the package.

    Raises: UsageError if the file cannot be read; ModelError if it breaks the schema or the law.
    """
    data = read_bounded(path, "an atlas of latencies", LIMIT)
    try:
        atlas = msgspec.toml.decode(data, type=Atlas)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        problem, _, where = str(e).partition(" - at ")
        raise ModelError(f"{os.fspath(path)} is not an atlas of latencies", got=problem,
                         **({"where": where.strip("`")} if where else {})) from e
    for row, want, got in _faults(atlas):
        raise ModelError(f"{os.fspath(path)} breaks the law of the atlas", where=row, want=want, got=got)
    return atlas


def _faults(atlas: Atlas) -> Iterator[tuple[str, str, str]]:
    """(row, what is wanted, what is there)."""
    ids = [r.id for r in atlas.rows]
    programs = {r.id for r in atlas.rows if r.program is not None}
    for before, after in itertools.pairwise(ids):
        if after <= before:
            yield after, "unique ids, in order", f"it stands behind {before}"
    known = {"source": {s.key for s in atlas.sources}, "model": {m.id for m in atlas.models},
             "device": {d.name for d in atlas.devices}}
    for r in atlas.rows:
        for name, values in known.items():
            if getattr(r, name) not in values:
                yield r.id, f"a {name} that the file declares", getattr(r, name)
        if (r.kind == "latency") != (r.unit in MS):
            yield r.id, "a latency in us, ms or s; a throughput in fps or img/s", f"a {r.kind} in {r.unit}"
        if not (math.isfinite(r.value) and r.value > 0):
            yield r.id, "a value above 0", str(r.value)
        for name in ("batch", "threads", "cores"):
            if getattr(r, name) is not None and getattr(r, name) < 1:
                yield r.id, f"{name} of 1 or more", str(getattr(r, name))
        if r.same_program_as is not None and (r.program is not None or r.same_program_as not in programs):
            yield r.id, "same_program_as: the id of another row, which has the program", r.same_program_as
        if (r.comparable == "same program") != (r.program is not None or r.same_program_as is not None):
            yield r.id, "program or same_program_as where a row is comparable as the same program", r.comparable
        if r.program is not None and (r.kind != "latency" or atlas.network(r).file is None):
            yield r.id, "a latency and a model file, for a row with a program", r.kind


@dataclass(frozen=True, slots=True)
class Conflict:
    """Figures that may well be of the same thing, and differ. `unit`: ms or fps, of `lowest` and `highest`."""

    rows: tuple[Row, ...]
    lowest: float
    highest: float
    unit: str

    @property
    def ratio(self) -> float:
        """The highest over the lowest."""
        return self.highest / self.lowest


def conflicts(rows: Iterable[Row]) -> list[Conflict]:
    """Every largest set of rows that agree on what was timed but not on the figure, widest apart first.

    Rows agree if nothing that both state differs; what a source does not say could be anything. So a row can be in
    several sets. The two ends of one published range are one statement.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for r in rows:
        groups.setdefault((r.device, r.engine, r.model, r.kind, r.setup), []).append(r)
    found = []
    for group in groups.values():
        for together in _largest(group, _agree):
            values = [_figure(r) for r in together]
            if min(values) < max(values):
                ordered = sorted(together, key=lambda r: (_figure(r), r.id))
                unit = "ms" if together[0].kind == "latency" else "fps"
                found.append(Conflict(tuple(ordered), min(values), max(values), unit))
    return sorted(found, key=lambda c: (-c.ratio, c.rows[0].id))


def _figure(row: Row) -> float:
    return row.value if row.ms is None else row.ms


ALIKE = {"uint8": "8 bit", "int8": "8 bit", "fp16": "float", "fp32": "float"}
"""Precisions that sources do not tell apart reliably."""


def _agree(a: Row, b: Row) -> bool:
    def may_be_same(x: object, y: object) -> bool:
        return x is None or y is None or x == y

    if a.range is not None and (a.source, a.range) == (b.source, b.range):
        return False
    precisions = (p if p is None else ALIKE.get(p, p) for p in (a.precision, b.precision))
    exact = {a.precision, b.precision} != {"fp16", "fp32"}
    return exact and may_be_same(*precisions) and all(
        may_be_same(getattr(a, name), getattr(b, name))
        for name in ("stack", "input", "batch", "threads", "cores", "included"))


def _largest(rows: Sequence[Row], agree: Callable[[Row, Row], bool]) -> Iterator[list[Row]]:
    """Every set of rows that agree pairwise and that no further row fits (Bron and Kerbosch, 1973)."""
    near = {i: {j for j in range(len(rows)) if i != j and agree(rows[i], rows[j])} for i in range(len(rows))}

    def grow(chosen: list[int], open_: set[int], seen: set[int]) -> Iterator[list[Row]]:
        if not open_ and not seen:
            yield [rows[i] for i in chosen]
        for i in sorted(open_):
            yield from grow([*chosen, i], open_ & near[i], seen & near[i])
            open_, seen = open_ - {i}, seen | {i}

    return grow([], set(range(len(rows))), set())


def select(atlas: Atlas, device: str = "", model: str = "", stack: str = "", source: str = "",
           kind: str = "", predicted: bool = False) -> list[Row]:
    """Rows whose names contain the given texts, whatever their case. `predicted`: only those with a program of ours.

    Raises: UnsupportedError naming what there is, if no row is left.
    """
    def names(r: Row, what: str) -> tuple[str | None, ...]:
        match what:
            case "device":
                return r.device, atlas.chip(r), r.board
            case "model":
                return r.model, atlas.network(r).title, r.published_as
            case "stack":
                return (r.stack,)
            case _:
                return r.source, atlas.source(r).title, atlas.source(r).url

    left = [r for r in atlas.rows if kind in ("", r.kind) and (r.program is not None or not predicted)]
    asked = f"{kind or 'row'}{' that npulab can model' if predicted else ''}"
    if not left:
        raise UnsupportedError(f"the atlas has no {asked}", want="latencies: only times are modelled")
    for what, text in {"device": device, "model": model, "stack": stack, "source": source}.items():
        kept = [r for r in left if any(text.lower() in (n or "").lower() for n in names(r, what))]
        if not kept:
            have = {n for n in (names(r, what)[0] for r in left) if n}
            raise UnsupportedError(f"the atlas has no {asked} with {what} '{text}'",
                                   want=", ".join(sorted(have, key=str.lower)))
        asked += f" of {what} '{text}'" if text else ""
        left = kept
    return left
