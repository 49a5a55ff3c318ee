"""npulab check: where each operator runs, and why."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.options import DimOption, Json, ModelPath, Plan, PlanOption, parse_dims
from npulab.cli.plan_options import Channels, ChannelsOption, Features, plan_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from npulab.ir import Graph
    from npulab.plan.types import Reason, Verdict
    from npulab.targets.facts.board import Check, Finding

PLACES = ("npu", "host", "refused", "unknown")
OBSTACLES = 3
"""Kinds of operators off the NPU that a line names."""


def check(
    model: ModelPath,
    target: Annotated[list[str] | None, typer.Option("--target", metavar="NAME", show_default=False, help=(
        "A chip that npulab compiles for, or a described board; once for each to see them side by side."))] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every described board, side by side.")] = False,
    plan: PlanOption = Plan.BEST, channels: ChannelsOption = Channels.ANY, feature: Features = None,
    as_: Annotated[str | None, typer.Option("--as", metavar="TYPE", show_default=False, help=(
        "For boards: the type that floats will have been given, such as int8 by the vendor's quantizer."))] = None,
    dim: DimOption = None, json: Json = False,
) -> None:
    """Say which operators an NPU takes, and why not the others.

    Exit code 1: it takes none; for several, none of them takes any.
    """
    from npulab import api
    from npulab.cli.printing import progress, write_json
    from npulab.errors import UsageError
    from npulab.targets.target import all_targets

    names = list(dict.fromkeys(target or ()))
    if bool(names) == all_:
        raise UsageError("--all and --target exclude each other" if all_ else "npulab check needs a target, or --all",
                         want="--target NAME", try_="npulab targets --boards")
    chips = all_targets()
    graph = api.load(model, parse_dims(dim))
    if len(names) == 1 and names[0] in chips:
        verdicts = api.check(graph, names[0], plan.plan_name, plan_options(channels=channels, features=feature))
        if json:
            write_json(_chip_data(graph, names[0], plan.value, verdicts))
        else:
            _print_chip(graph, names[0], plan.value, verdicts)
        npu = sum(v.where == "npu" for v in verdicts)
    else:
        checks = [_checked(graph, name, as_, progress) for name in (names or _all())]
        if json:
            data = [_board_data(graph, c) for c in checks]
            write_json(data[0] if len(names) == 1 else {"model": graph.name, "targets": data})
        elif len(names) == 1:
            _print_board(graph, checks[0])
        else:
            _print_side_by_side(graph, checks)
        npu = max(c.count("npu") for c in checks)
    if not npu:
        raise typer.Exit(1)


def _all() -> list[str]:
    from npulab.targets.facts.board import boards

    return list(boards())


def _checked(graph: Graph, name: str, as_: str | None, progress: Any) -> Check:
    from npulab.errors import UsageError
    from npulab.targets.facts.board import find_board
    from npulab.targets.target import all_targets

    if name in all_targets():
        raise UsageError(f"{name} is compiled for, and not described: it is not shown beside boards",
                         try_=f"--target {name} alone, or its described family")
    progress(name)
    return find_board(name).check(graph, as_ or "")


# a chip that npulab compiles for


def _reason_data(r: Reason) -> dict[str, str]:
    return {"rule": r.rule, "found": r.found, "allowed": r.allowed or r.rule, "source": r.source, "remedy": r.remedy}


def _node_data(v: Verdict) -> dict[str, Any]:
    return {"node": v.node, "op": v.op, "where": v.where, "verdict": v.where,
            "reasons": [_reason_data(r) for r in v.reasons],
            "remedies": list(dict.fromkeys(r.remedy for r in v.reasons if r.remedy))}


def _chip_data(graph: Graph, target: str, plan: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    npu = sum(v.where == "npu" for v in verdicts)
    return {"target": target, "plan": plan, "model": graph.name, "npu": npu, "host": len(verdicts) - npu,
            "nodes": [_node_data(v) for v in verdicts],
            "summary": {"npu": npu, "host": len(verdicts) - npu, "refused": 0, "unknown": 0}}


def _print_chip(graph: Graph, target: str, plan: str, verdicts: Sequence[Verdict]) -> None:
    from npulab.cli.printing import say, table

    npu = sum(v.where == "npu" for v in verdicts)
    table([">node", "operator", "where", "why not the NPU+"],
          [(v.node, v.op, v.where, "\n".join(str(r) for r in v.reasons)) for v in verdicts])
    say()
    say(f"{npu} of {len(verdicts)} operators of {graph.name} run on the NPU of {target}, plan {plan}; "
        f"{len(verdicts) - npu} on the host.")


# boards that are described


def _board_data(graph: Graph, c: Check) -> dict[str, Any]:
    counts = {where: c.count(where) for where in PLACES}
    return {
        "target": c.board, "model": graph.name,
        "nodes": [_node_data(f) | {"name": graph.nodes[f.node].name, "notes": [_reason_data(r) for r in f.notes],
                                   "undecided": [_reason_data(r) for r in f.undecided]} for f in c.findings],
        "summary": counts | {"partitions": c.partitions, "macs": c.macs, "npu_macs": c.npu_macs},
        "graph": [_reason_data(r) for r in c.graph], "graph_undecided": [_reason_data(r) for r in c.undecided],
        "advice": [_reason_data(r) for r in c.advice],
    }


def _print_board(graph: Graph, c: Check) -> None:
    from npulab.cli.printing import listed, ranges, say, table

    alike: dict[tuple[str, str], list[Finding]] = {}
    for f in c.findings:
        notes = [] if f.where != "npu" else [str(r) for r in f.notes if r.source != "npulab"]
        if text := "\n".join([*(str(r) for r in f.reasons), *(f"Note: {n}" for n in notes)]):
            alike.setdefault((f.where, text), []).append(f)
    rows = [(ranges([f.node for f in found]), listed(f.op for f in found), where, text)
            for (where, text), found in alike.items()]
    if rows:
        table(["nodes+", "operators+", "where", "why+"], rows)
        say()
    for title, reasons in (("The whole network: ", c.graph), ("Not decided: ", c.undecided)):
        for r in reasons:
            say(f"{title}{r}")
    for r in c.advice:
        say(f"Advice: {r.rule}")
    if c.graph or c.undecided or c.advice:
        say()
    say(_verdict(graph, c))


def _verdict(graph: Graph, c: Check) -> str:
    """One sentence to act on."""
    total = len(c.findings)
    percent = c.npu_percent
    text = f"{c.board}: {c.count('npu')} of {total} operators of {graph.name} run on the NPU"
    text += f", {percent:.1f} % of the multiplications" if percent is not None else ""
    text += f", in {c.partitions} {'region' if c.partitions == 1 else 'regions'}" if c.partitions else ""
    others = [f"{c.count(where)} {words}: {_kinds(c, where)}" for where, words in
              (("host", "on the host"), ("refused", "refused"), ("unknown", "unknown, as nothing published says"))
              if c.count(where)]
    return "; ".join([text, *others]) + "."


def _kinds(c: Check, where: str) -> str:
    """'4 Expand, Where, 3 more kinds'."""
    counts = Counter(f.op for f in c.findings if f.where == where).most_common()
    shown = [f"{n} {op}" if n > 1 else op for op, n in counts[:OBSTACLES]]
    return ", ".join(shown + ([f"{len(counts) - OBSTACLES} more kinds"] if len(counts) > OBSTACLES else []))


def _print_side_by_side(graph: Graph, checks: Sequence[Check]) -> None:
    from npulab.cli.printing import say, table

    ranked = sorted(checks, key=lambda c: (c.count("refused") + c.count("unknown"), c.count("host"), c.board))
    table(["board", ">NPU", ">host", ">refused", ">unknown", ">MACs %", "off the NPU+"], [
        (c.board, *(c.count(where) or "" for where in PLACES),
         "" if c.npu_percent is None else f"{c.npu_percent:.1f}",
         ", ".join(_kinds(c, where) for where in ("refused", "host", "unknown") if c.count(where)))
        for c in ranked])
    say()
    say(f"{graph.name}, {len(graph.nodes)} operators. refused: the vendor's tool does not take it. unknown: nothing "
        "published says. --target NAME gives the rules, their sources and what to change.")
