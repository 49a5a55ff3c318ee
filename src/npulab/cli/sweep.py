"""npulab sweep: every point of a grid, profiled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.options import Json

if TYPE_CHECKING:
    from npulab.sweep.points import Point, Record
    from npulab.sweep.run import Swept

SHOWN = 12
"""Points of a model that the table shows, and failures that it tells."""


def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID.toml", show_default=False,
                                         help="What to combine; docs/sweep.md has the format.")],
    output: Annotated[Path | None, typer.Option(
        "-o", "--output", metavar="FILE.sqlite", show_default="GRID.sqlite",
        help="The results; what is there already is not run again.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, max=1024, metavar="N", show_default="CPUs",
                                                help="Processes of this machine.")] = None,
    scheduler: Annotated[str | None, typer.Option("--scheduler", metavar="ADDRESS", show_default=False,
                                                  help="Run on the Dask cluster of tcp://HOST:PORT.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run points again that failed before.")] = False,
    json: Json = False,
) -> None:
    """Profile every combination of models, plans, options and what-ifs.

    Exit code 1: some failed. A sweep that was stopped goes on with the same command.
    """
    import time

    from npulab.cli.printing import progress, write_json
    from npulab.sweep.run import sweep as run

    said = [0.0]

    def tell(done: int, failed: int, of: int) -> None:
        now = time.monotonic()
        if now - said[0] >= 2 or done + failed == of:
            said[0] = now
            progress(f"{done + failed} of {of} points" + (f", {failed} failed" if failed else ""))

    results = grid.parent / f"{grid.stem}.sqlite" if output is None else output
    try:
        swept = run(grid, results, workers, scheduler, retry_failed, tell)
    except KeyboardInterrupt:
        progress(f"stopped; {results} has what is done, and the same command goes on from there")
        raise
    failed = [(p, r) for _, p, r in swept.rows if r.state == "failed"]
    if json:
        write_json(as_data(swept))
    else:
        _print(swept, failed)
    if failed:
        raise typer.Exit(1)


def as_data(swept: Swept) -> dict[str, Any]:
    """The results for programs, in the grid's order."""
    import msgspec

    from npulab.sweep.store import NUMBERS

    rows = [{"key": key} | msgspec.to_builtins(p) | {name: getattr(r, name) for name in NUMBERS}
            for key, p, r in swept.rows]
    return {"grid": str(swept.grid.path), "results": str(swept.results), "points": len(rows), "ran": swept.ran,
            "failed": sum(r["state"] == "failed" for r in rows), "rows": rows}


def _print(swept: Swept, failed: list[tuple[Point, Record]]) -> None:
    from npulab.cli.printing import amount, say, table

    one_target = len({p.target for _, p, _ in swept.rows}) == 1
    done: dict[str, list[tuple[float, int, Point, Record]]] = {p.model: [] for _, p, _ in swept.rows}
    for i, (_, p, r) in enumerate(swept.rows):
        if r.total_ms is not None:
            done[p.model].append((r.total_ms, i, p, r))
    for model, some in done.items():
        some.sort(key=lambda found: found[:2])
        if some:
            say(model)
            table([">ms", ">interval", ">DRAM", ">SRAM", ">NPU", ">host", "with+"], [
                (f"{ms:.3f}", f"{r.low_ms:.2f}-{r.high_ms:.2f}", amount(r.dram_bytes or 0), amount(r.sram_bytes or 0),
                 r.npu_ops, r.host_ops, how(p, one_target)) for ms, _, p, r in some[:SHOWN]])
            if len(some) > SHOWN:
                say(f"and {len(some) - SHOWN} slower ones; --json has all.")
            say()
    for p, r in failed[:SHOWN]:
        say(f"failed: {p.model}, {how(p, one_target)}")
        for line in (r.error or "").split("\n"):
            say(f"  {line}")
    if len(failed) > SHOWN:
        say(f"and {len(failed) - SHOWN} more that failed; --json has all.")
    if failed:
        say()
    many = len(swept.rows)
    say(f"{many} point{'s' if many != 1 else ''}, {swept.ran} of them measured now, {len(failed)} failed. "
        f"{swept.results} has them. Bytes are of one inference; NPU and host count operators.")


def how(p: Point, one_target: bool = False) -> str:
    """What sets a point apart from others of its model: 'best, no-zero-runs, dram_bandwidth=8GB/s'."""
    options = (name if value == "on" else f"{name}={value}" for name, value in p.plan_options().as_text().items())
    settings = (f"{name}={_with_unit(name, value)}" for name, value in p.what_if.items())
    return ", ".join([*(() if one_target else (p.target,)), p.plan, *options, *settings])


def _with_unit(name: str, value: float) -> str:
    """As --set takes it, in the largest unit that makes it a number of six digits or fewer; else in the first."""
    from npulab.cli.plan_options import SETTINGS

    units = SETTINGS[name].units
    for unit, factor in sorted(units.items(), key=lambda item: -item[1]):
        text = f"{value / factor:g}"
        if value >= factor and "e" not in text and float(text) * factor == value:
            return text + unit
    return f"{value!r}{next(iter(units))}"
