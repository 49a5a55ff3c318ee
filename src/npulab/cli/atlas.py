"""npulab atlas: published latencies, and how far the timing model is from them."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npulab.cli.options import Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from npulab.atlas.compare import Compared
    from npulab.atlas.load import Conflict
    from npulab.atlas.types import Atlas, Row


class Kind(enum.StrEnum):
    LATENCY = "latency"
    THROUGHPUT = "throughput"


def atlas(
    device: Annotated[str, typer.Option("--device", metavar="TEXT", help="Devices whose name has this in it.")] = "",
    model: Annotated[str, typer.Option("--model", metavar="TEXT", help="Networks whose name has this in it.")] = "",
    stack: Annotated[str, typer.Option("--stack", metavar="TEXT", help="Drivers and compilers, likewise.")] = "",
    source: Annotated[str, typer.Option("--source", metavar="TEXT", help="Sources, by title or address.")] = "",
    kind: Annotated[Kind | None, typer.Option("--kind", help="Only times, or only rates.", show_default=False)] = None,
    predicted: Annotated[bool, typer.Option("--predicted", help="Only what npulab has the program of.")] = False,
    models: Annotated[Path | None, typer.Option(
        "--models", metavar="DIR", show_default=False,
        help="Compile the programs from model files here, instead of using recorded counts.")] = None,
    json: Json = False,
) -> None:
    """List published latencies with their sources, beside the timing model's.

    Exit code 1: no row matches.
    """
    from npulab.atlas import compare
    from npulab.atlas.load import conflicts, load, select
    from npulab.cli.printing import progress, write_json

    data = load()
    rows = select(data, device, model, stack, source, kind.value if kind else "", predicted)
    profiler = compare.Profiler(compare.find_models(data, models) if models is not None else {})
    compared, ours = [], {}
    for r in rows:
        if profiler.has(r) and r.comparable != "none" and r.same_program_as is None:
            progress(f"compiling the program of {r.id}")
        found = profiler.compared(r) or compare.predict(r)
        if found is not None:
            compared.append(found)
        best = profiler.ours(r)
        if best is not None:
            ours[r.id] = best
    differing = conflicts(rows)
    if json:
        write_json(compare.as_data(data, rows, compared, ours, differing))
    else:
        _print_rows(data, rows, differing)
        _print_conflicts(data, differing)
        _print_compared(data, rows, compared)
        _print_ours(data, rows, ours)


def _print_rows(data: Atlas, rows: Sequence[Row], differing: Sequence[Conflict]) -> None:
    from npulab.cli.printing import say, table

    marks = {r.id: "" for r in rows}
    for n, c in enumerate(differing, 1):
        for r in c.rows:
            marks[r.id] += f" C{n}"
    for title in sorted({data.network(r).title for r in rows}, key=str.lower):
        say(title)
        some = sorted((r for r in rows if data.network(r).title == title), key=_order)
        table([">published", "device+", "stack+", "how+", "source+"],
              [(_figure(r), r.device, r.stack or "?", _how(r) + marks[r.id], r.source) for r in some])
        say()
    say(f"{len(rows)} rows: {sum(r.kind == 'latency' for r in rows)} latencies, "
        f"{sum(r.kind == 'throughput' for r in rows)} throughputs (fps, never turned into ms). ?: not stated. "
        "--json has titles and addresses of the sources, and notes.")


def _print_conflicts(data: Atlas, differing: Sequence[Conflict]) -> None:
    from npulab.cli.printing import say, table

    if differing:
        say()
        say("Figures that may well be of the same thing, and differ:")
        table(["mark", "device+", "network+", ">figures", ">lowest", ">highest", ">ratio"], [
            (f"C{n}", c.rows[0].device, data.network(c.rows[0]).title, len(c.rows), f"{c.lowest:g}",
             f"{c.highest:g} {c.unit}", f"{c.ratio:.2f}" if c.ratio >= 1.005 else "<1.01")
            for n, c in enumerate(differing, 1)])


def _print_compared(data: Atlas, rows: Sequence[Row], compared: Sequence[Compared]) -> None:
    from npulab.atlas.compare import errors
    from npulab.cli.printing import say, table

    missing = sum(r.program is not None for r in rows) - len(compared)
    if compared:
        say()
        say("Published times of programs that npulab makes too, and its timing model:")
        table(["network+", "driver+", ">published", ">modelled", ">interval", ">error", "role"], [
            (data.network(c.row).title, f"{c.row.stack}, {c.row.setup}", _figure(c.row), f"{c.modelled_ms:.2f} ms",
             f"{c.interval_ms[0]:.1f}-{c.interval_ms[1]:.1f}", f"{c.error_percent:+.1f} %",
             c.role + ("*" if c.made_from == "model file" else ""))
            for c in sorted(compared, key=lambda c: (data.network(c.row).title, _order(c.row)))])
        if any(c.made_from == "model file" for c in compared):
            say("* compiled from the model file; the others from counts recorded in the package.")
        for role, what in (("fit", "the model's constants were fitted to them"), ("test", "the fit never saw them")):
            e = errors(compared, role)
            if e is not None:
                say(f"{role + ':':<5}  {e.rows} rows, mean absolute error {e.mean_absolute_percent:.1f} %, "
                    f"worst {e.worst_percent:+.1f} %, {e.inside} within the interval; {what}.")
    if missing:
        say()
        say(f"{missing} more could be modelled from {'their' if missing > 1 else 'its'} model file: --models DIR.")


def _print_ours(data: Atlas, rows: Sequence[Row], ours: dict[str, float]) -> None:
    from npulab.cli.printing import say, table

    if ours:
        say()
        say("Other compilers on the same chip, beside plan best by the timing model. The difference is between "
            "programs; it is no error of the model.")
        table(["network+", "stack+", ">published", ">plan best"],
              [(data.network(r).title, r.stack or "?", _figure(r), f"{ours[r.id]:.2f} ms") for r in rows
               if r.id in ours])


INCLUDED = {"device": "accelerator only", "network": "whole network", "pipeline": "pipeline"}


def _order(r: Row) -> tuple[object, ...]:
    """By device and stack; within them as time went by, and improvements after what they improved."""
    return r.device.lower(), r.stack or "", r.date or "9", -r.value, r.id


def _figure(r: Row) -> str:
    return f"{'~' if r.approximate else ''}{r.value:.10g} {r.unit}{'?' if r.unit_inferred else ''}"


def _how(r: Row) -> str:
    """The rest of what sets a figure apart, in few words."""
    parts = [
        r.setup, r.engine if r.engine != "npu" else None, r.precision, r.input,
        f"batch {r.batch}" if r.batch not in (None, 1) else None, _count(r.cores, "core"), _count(r.threads, "thread"),
        f"end of {r.range}" if r.range else None, INCLUDED.get(r.included or ""),
        r.evidence if r.evidence != "measured" else None,
    ]
    return ", ".join(p for p in parts if p)


def _count(n: int | None, what: str) -> str | None:
    return f"{n} {what}{'s' if n > 1 else ''}" if n else None
