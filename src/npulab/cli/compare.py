"""npulab compare: one model on several targets and plans, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.options import Json, ModelPath
from npulab.cli.plan_options import (
    Channels,
    ChannelsOption,
    Features,
    NoImageCache,
    NoKernelCache,
    NoZeroRuns,
    in_words,
    plan_options,
)

if TYPE_CHECKING:
    from npulab.errors import CapacityError, UnsupportedError
    from npulab.profiling.types import Profile
    from npulab.targets.target import PlanName

COLUMNS = 5
"""Variants that a table holds within 80 columns."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One column: a target, what is set differently on it, and a plan. `text`: the target as the user wrote it."""

    target: str
    settings: Mapping[str, float | int]
    plan: PlanName
    text: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.text}, plan {self.plan}"


def compare(
    model: ModelPath,
    targets: Annotated[str, typer.Option("--targets", metavar="NAME[:KEY=VALUE[+...]],...", help=(
        "Targets, each with what is set differently: a311d,a311d:nn_cores=4,a311d:clock=1GHz+dram_bandwidth=8GB/s"))],
    plans: Annotated[str, typer.Option("--plans", metavar="PLAN,...", help="best, reference, or both.")] = "best",
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="Operators to show.")] = 10,
    no_zero_runs: NoZeroRuns = False,
    channels: ChannelsOption = Channels.ANY,
    no_kernel_cache: NoKernelCache = False,
    no_image_cache: NoImageCache = False,
    feature: Features = None,
    json: Json = False,
) -> None:
    """Compare one model's modelled time on targets and plans, and show the operators that differ most.

    Keys: dram_bandwidth (B/s), clock (Hz), sram (B), nn_cores. Options of the plan are for every column; features for
    plan best only. Exit code 1: the model does not compile for one of them.
    """
    from npulab import api
    from npulab.cli.printing import progress, write_json
    from npulab.errors import CapacityError, UnsupportedError, UsageError
    from npulab.targets.target import find_target

    variants = parse_variants(targets, plans)
    options = plan_options(no_zero_runs, channels, no_kernel_cache, no_image_cache, feature)
    if options.features and all(v.plan == "reference" for v in variants):
        raise UsageError("features are for plan best", got="--plans reference")
    options_of = {"best": options, "reference": replace(options, features=frozenset())}
    if rows < 0:
        raise UsageError("--rows is a number of operators", got=rows, want="0 or more")
    for v in variants:
        find_target(v.target).with_settings(v.settings)
    graph = api.load(model)
    found: list[Profile | UnsupportedError | CapacityError] = []
    for v in variants:
        progress(str(v))
        try:
            found.append(api.profile(graph, v.target, v.plan, options_of[v.plan], v.settings))
        except (UnsupportedError, CapacityError) as e:
            found.append(e)
    if json:
        write_json({"model": graph.name, "variants": [
            {"target": v.target, "settings": dict(v.settings), "plan": v.plan,
             "options": options_of[v.plan].as_text(), **as_data(p)}
            for v, p in zip(variants, found, strict=True)]})
    else:
        _print(graph.name, variants, [in_words(options_of[v.plan]) for v in variants], found, rows)
    if any(isinstance(p, UnsupportedError | CapacityError) for p in found):
        raise typer.Exit(1)


def parse_variants(targets: str, plans: str) -> list[Variant]:
    """'a,a:clock=1GHz+nn_cores=4' and 'best,reference' -> all pairs, plans varying fastest.

    Raises: UsageError for no target, an unknown plan or setting, a variant given twice, or fewer than two.
    """
    from npulab.cli.options import Plan
    from npulab.cli.plan_options import parse_settings
    from npulab.errors import UsageError

    known = {p.value: p for p in Plan}
    chosen = [text.strip() for text in plans.split(",")]
    for name in chosen:
        if name not in known:
            raise UsageError(f"there is no plan '{name}'", want=", ".join(known))
    variants: list[Variant] = []
    for text in targets.split(","):
        name, colon, rest = text.strip().partition(":")
        if not name or (colon and not rest):
            raise UsageError(f"--targets: '{text}' is no target" if targets.strip() else "--targets names no target",
                             want="NAME or NAME:KEY=VALUE+KEY=VALUE, separated by commas", try_="npulab targets")
        try:
            settings = parse_settings(rest.split("+") if rest else ())
        except UsageError as e:
            message = e.message.replace("--set does not know", "there is no setting").removeprefix("--set ")
            raise UsageError(f"in '{text.strip()}': {message}", **e.facts) from None
        variants += [Variant(name, settings, known[p].plan_name, text.strip()) for p in chosen]
    for i, v in enumerate(variants):
        if v in variants[:i]:
            raise UsageError("--targets and --plans give one column twice", got=str(v))
    if len(variants) < 2:
        raise UsageError("there is nothing to compare", got=str(variants[0]), want="two targets or plans, or more",
                         try_="--plans best,reference")
    return variants


def as_data(found: Profile | Exception) -> dict[str, Any]:
    """One column for programs: the error, or the figures and the time of each operator."""
    if isinstance(found, Exception):
        return {"error": str(found)}
    operators = [r for r in found.rows if r.node is not None]
    host = sum("host" in r.unit for r in operators)
    return {
        "total_ms": found.total_ns / 1e6, "interval_ms": [t / 1e6 for t in found.interval_ns],
        "dram_bytes": found.dram_bytes, "npu": len(operators) - host, "host": host,
        "jobs": sum(s.unit in ("nn", "tp") for s in found.spans),
        "nodes": [{"node": r.node, "op": r.op, "ms": r.ns / 1e6, "unit": r.unit, "bound": r.bound}
                  for r in found.rows],
    }


def _print(model: str, variants: Sequence[Variant], options: Sequence[str],
           found: Sequence[Profile | UnsupportedError | CapacityError], rows: int) -> None:
    from npulab.cli.printing import say, table
    from npulab.profiling.types import Profile

    names = [_letters(i) for i in range(len(variants))]
    say(f"{model}; times by the timing model")
    say()
    for name, v, more, p in zip(names, variants, options, found, strict=True):
        say(f"{name}  {v}{more}{'' if isinstance(p, Profile) else f': does not compile: {p.message}'}")
    columns = [(name, as_data(p)) for name, p in zip(names, found, strict=True) if isinstance(p, Profile)]
    times = [{(n["node"], n["op"]): n["ms"] for n in data["nodes"]} for _, data in columns]
    differing = _most_different(times)
    for i in range(0, len(columns), COLUMNS):
        part = columns[i : i + COLUMNS]
        heads = [f">{name}" for name, _ in part]
        say()
        table([" ", *heads], [
            ("total ms", *(f"{d['total_ms']:.3f}" for _, d in part)),
            ("between", *("-".join(f"{t:.3g}" if t < 100 else f"{t:.0f}" for t in d["interval_ms"]) for _, d in part)),
            ("DRAM MB", *(f"{d['dram_bytes'] / 1e6:.2f}" for _, d in part)),
            ("NPU ops", *(d["npu"] for _, d in part)),
            ("host ops", *(d["host"] for _, d in part)),
            ("NPU jobs", *(d["jobs"] for _, d in part)),
        ])
        if differing[:rows] and len(columns) > 1:
            say()
            table([">node", "ms+", *heads],
                  [("" if key[0] is None else key[0], key[1],
                    *(f"{t.get(key, 0.0):.3f}" for t in times[i : i + COLUMNS])) for key in differing[:rows]])
    if len(columns) > 1 and len(differing) > rows:
        say()
        say(f"{len(differing) - rows} more rows differ, each by less." if rows else
            f"{len(differing)} rows differ.")
    if len(columns) > 1 and not differing:
        say()
        say("No operator differs.")


def _most_different(times: Sequence[Mapping[tuple[int | None, str], float]]) -> list[tuple[int | None, str]]:
    """Rows whose times differ, the widest spread first."""
    keys = dict.fromkeys(k for t in times for k in t)
    spread = {k: max(values) - min(values) for k in keys for values in [[t.get(k, 0.0) for t in times]]}
    return sorted((k for k in keys if spread[k] > 0), key=lambda k: -spread[k])


def _letters(i: int) -> str:
    """A, B, .. Z, AA, AB, .."""
    return (_letters(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)
