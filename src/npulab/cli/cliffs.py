"""npulab cliffs: sizes that cost more than they look."""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.options import Json, ModelPath, Plan, PlanOption, TargetName
from npulab.cli.plan_options import (
    Channels,
    ChannelsOption,
    Features,
    NoImageCache,
    NoKernelCache,
    NoZeroRuns,
    SettingsOption,
    in_words,
    plan_options,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from npulab.cliffs import Cliff, Point, Walk

ROWS = 12
"""Cliffs of one walk that the table shows."""
PLOT_ROWS = 8


class Axis(enum.StrEnum):
    RESOLUTION = "resolution"
    CHANNELS = "channels"


def cliffs(
    model: ModelPath,
    target: TargetName,
    plan: PlanOption = Plan.BEST,
    axis: Annotated[Axis, typer.Option("--axis", help="Size of the input image, or channels of convolutions.")]
    = Axis.RESOLUTION,
    range_: Annotated[str | None, typer.Option(
        "--range", metavar="LOW:HIGH[:STEP]", show_default=False,
        help="Sizes to look at; by default from half to double of the model's own.")] = None,
    node: Annotated[list[int] | None, typer.Option(
        "--node", metavar="N", show_default=False,
        help="For channels: this convolution; once for each. By default the 3 that take longest.")] = None,
    factor: Annotated[float, typer.Option(
        "--factor", metavar="X", help="How much time per pixel or channel must jump in one operator; for the whole "
                                      "network a tenth of that counts.")] = 1.25,
    most: Annotated[int, typer.Option("--most", metavar="N", help="Compilations at most.")] = 60,
    no_zero_runs: NoZeroRuns = False,
    channels: ChannelsOption = Channels.ANY,
    no_kernel_cache: NoKernelCache = False,
    no_image_cache: NoImageCache = False,
    feature: Features = None,
    settings: SettingsOption = None,
    json: Json = False,
) -> None:
    """Find sizes from which on the network takes much more time.

    The image's size is its height; the width keeps its proportion. Times are those of the timing model.
    """
    from npulab import api
    from npulab.cli.plan_options import parse_settings
    from npulab.cli.printing import progress, say, write_json
    from npulab.cliffs import by_channels, by_resolution
    from npulab.errors import UsageError
    from npulab.passes.resize import kept_nodes
    from npulab.targets.target import find_target

    what_if = parse_settings(settings or ())
    options = plan_options(no_zero_runs, channels, no_kernel_cache, no_image_cache, feature)
    limits = parse_range(range_)
    if not 1 < factor < 1000:
        raise UsageError("--factor must be more than 1", got=factor, want="such as 1.25")
    if node and axis is Axis.RESOLUTION:
        raise UsageError("--node is for --axis channels: the resolution is one of the whole network")
    if most < 2:
        raise UsageError("a search needs at least 2 compilations", got=f"--most {most}")
    find_target(target)
    graph = api.load(model)
    done = 0

    def tell(text: str) -> None:
        nonlocal done
        done += 1
        progress(f"{done} of at most {most}: {text}")

    progress(f"at most {most} compilations")
    if axis is Axis.RESOLUTION:
        walks = by_resolution(graph, target, plan.plan_name, options, what_if, limits, most, factor, tell)
        kept = set(kept_nodes(graph))
    else:
        walks = by_channels(graph, target, plan.plan_name, options, what_if, limits, most, factor, tell, node)
        kept = {n.index for n in graph.nodes}
    left_out = [n for n in graph.nodes if n.index not in kept]
    if json:
        write_json({
            "model": graph.name, "target": target, "plan": plan.value, "options": options.as_text(),
            "settings": what_if, "axis": axis.value, "factor": factor,
            "measured": sum(len(w.points) for w in walks), "most": most,
            "left_out": [n.index for n in left_out], "walks": [as_data(w) for w in walks],
        })
        return
    say(f"{graph.name} on {target}, plan {plan.value}{in_words(options)}; times by the timing model")
    for w in walks:
        say()
        print_walk(w, "pixel" if axis is Axis.RESOLUTION else "channel")
    if left_out:
        say()
        say(f"Left out, as what they make of another size is not known: {', '.join(map(str, left_out))}.")


def parse_range(text: str | None) -> tuple[int, int, int | None] | None:
    """'128:320' -> (128, 320, None), '128:320:32' -> (128, 320, 32). Raises UsageError for anything else."""
    from npulab.errors import UsageError

    if text is None:
        return None
    parts = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})(?::([0-9]{1,5}))?", text)
    if not parts:
        raise UsageError("--range is not LOW:HIGH or LOW:HIGH:STEP", got=repr(text), try_="--range 128:320")
    return int(parts[1]), int(parts[2]), int(parts[3]) if parts[3] else None


def as_data(walk: Walk) -> dict[str, Any]:
    return {
        "title": walk.title, "skipped": walk.skipped,
        "points": [{"size": p.size, "work": p.work, "ms": None if p.problem else p.ns / 1e6,
                    "problem": p.problem or None} for p in walk.points],
        "cliffs": [{
            "node": c.node, "op": c.op or None, "kind": c.kind, "from": c.low, "to": c.high, "exact": c.exact,
            "before_ms": c.before_ns / 1e6, "after_ms": None if c.kind == "none" else c.after_ns / 1e6, "jump": c.jump,
            "excess_ms": c.excess_ns / 1e6, "why": c.why} for c in walk.cliffs],
    }


def print_walk(walk: Walk, unit: str) -> None:
    """The plot, the table, and which sizes to use instead. `unit` is what time is counted for."""
    from npulab.cli.printing import say, table
    from npulab.cliffs import DOUBLE

    say(f"{walk.title}: {len(walk.points)} sizes from {walk.points[0].size} to {walk.points[-1].size}, "
        f"{walk.skipped} between them not looked at" if walk.skipped else
        f"{walk.title}: {len(walk.points)} sizes from {walk.points[0].size} to {walk.points[-1].size}")
    say()
    if all(p.problem for p in walk.points):
        say(f"No size gives a program: {walk.points[0].problem}")
        return
    for line in plot(walk):
        print(line)
    if not walk.cliffs:
        say("No cliffs.")
        return
    say()
    shown = walk.cliffs[:ROWS]
    table([">from", ">to", "where+", ">ms", f">per {unit}", "why+"],
          [(c.low, f"{c.high}{'' if c.exact else '?'}", "network" if c.node is None else f"node {c.node} {c.op}",
            _times(c), "" if c.kind == "none" else f"x{c.jump:.3g}{'!' if c.jump >= DOUBLE else ''}", c.why)
           for c in shown])
    notes = []
    if any(c.jump >= DOUBLE and c.kind != "none" for c in shown):
        notes.append("! at least doubles.")
    if not all(c.exact for c in shown):
        notes.append("? somewhere between the two; --most allows more compilations.")
    if len(walk.cliffs) > len(shown):
        notes.append(f"{len(walk.cliffs) - len(shown)} more, each less expensive; --json shows all.")
    say()
    if notes:
        say(" ".join(notes))
    advice = [f"{c.low}, not {c.high}" for c in sorted(shown, key=lambda c: c.low)
              if c.exact and (c.excess_ns > 0 or c.kind == "none")]
    if advice:
        say(f"Use {'; '.join(dict.fromkeys(advice))}.")


def _times(c: Cliff) -> str:
    return f"{c.before_ns / 1e6:.3f} -> {'none' if c.kind == 'none' else f'{c.after_ns / 1e6:.3f}'}"


def plot(walk: Walk, width: int = 79, rows: int = PLOT_ROWS) -> list[str]:
    """Milliseconds against size in `rows` lines of text, and an axis below it with ^ under cliffs."""
    known = [p for p in walk.points if not p.problem]
    if not known:
        return []
    top = max(p.ns for p in known) / 1e6
    labels = [f"{top:.3g} ms", "0 ms"]
    margin = max(map(len, labels)) + 2
    across = width - margin
    low, high = walk.points[0].size, walk.points[-1].size

    def column(size: int) -> int:
        return round((size - low) / max(1, high - low) * (across - 1))

    grid = [[" "] * across for _ in range(rows)]
    for p in known:
        height = round(p.ns / 1e6 / top * (rows - 1)) if top else 0
        grid[rows - 1 - height][column(p.size)] = "*"
    marks = [" "] * across
    for c in walk.cliffs:
        marks[column(c.high)] = "^"
    names = [labels[0], *[""] * (rows - 2), labels[1]]
    lines = [f"{name:>{margin - 2}} |{''.join(row)}".rstrip() for name, row in zip(names, grid, strict=True)]
    lines.append(" " * (margin - 1) + "+" + "-" * across)
    if walk.cliffs:
        lines.append((" " * margin + "".join(marks)).rstrip() + ("  cliffs" if marks[-8:] == [" "] * 8 else ""))
    return [*lines, _scale(known, low, high, margin, across)]


def _scale(points: Sequence[Point], low: int, high: int, margin: int, across: int) -> str:
    return f"{' ' * margin}{low}{str(high).rjust(across - len(str(low)))}"
