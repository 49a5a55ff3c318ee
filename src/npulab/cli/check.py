"""npulab check: where each operator runs, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.options import DimOption, Json, ModelPath, Plan, PlanOption, parse_dims
from npulab.cli.plan_options import Channels, ChannelsOption, Features, plan_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from npulab.ir import Graph
    from npulab.plan.types import Reason, Verdict
    from npulab.profiling.types import Profile
    from npulab.targets.facts.advice import Advice
    from npulab.targets.facts.board import Check, Finding
    from npulab.targets.facts.costs import Cost
    from npulab.targets.facts.outlook import Outlook

PLACES = ("npu", "host", "refused", "unknown")
NAME = 60
"""Characters of an operator's name that a table shows."""
RANGES = 8
"""Stretches of node numbers that a cell lists."""


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
        options = plan_options(channels=channels, features=feature)
        graph = api.convert(graph, "tflite")
        verdicts = api.check(graph, names[0], plan.plan_name, options)
        found = _profiled(graph, names[0], plan, options)
        advice = _chip_advice(graph, names[0], verdicts, found, str(model))
        if json:
            write_json(_chip_data(graph, names[0], plan.value, verdicts, found, advice))
        else:
            _print_chip(graph, names[0], plan.value, verdicts, found, advice)
        npu = sum(v.where == "npu" for v in verdicts)
    else:
        outlooks = [_outlook(graph, name, as_, str(model), progress) for name in (names or _all())]
        if json:
            data = [_board_data(graph, o) for o in outlooks]
            _write(data[0] if len(names) == 1 else {"model": graph.name, "targets": data})
        elif len(names) == 1:
            _print_board(graph, outlooks[0])
        else:
            _print_side_by_side(graph, outlooks, str(model))
        npu = max(o.check.count("npu") for o in outlooks)
    if not npu:
        raise typer.Exit(1)


def _all() -> list[str]:
    from npulab.targets.facts.board import boards

    return list(boards())


def _outlook(graph: Graph, name: str, as_: str | None, model: str, progress: Any) -> Outlook:
    from npulab.errors import UsageError
    from npulab.targets.facts.board import find_board
    from npulab.targets.facts.outlook import outlook
    from npulab.targets.target import all_targets

    if name in all_targets():
        raise UsageError(f"{name} is compiled for, and not described: it is not shown beside boards",
                         try_=f"--target {name} alone, or its described family")
    progress(name)
    return outlook(graph, find_board(name), as_ or "", model)


def _write(data: Any) -> None:
    """As `write_json`, ten times as fast: of all boards it is megabytes."""
    import json

    import msgspec

    from npulab.cli.printing import write_json

    try:
        text = json.dumps(data, allow_nan=False)
    except ValueError:
        write_json(data)
    else:
        print(msgspec.json.format(text, indent=1))


def _reason_data(r: Reason) -> dict[str, str]:
    return {"rule": r.rule, "found": r.found, "allowed": r.allowed or r.rule, "source": r.source, "remedy": r.remedy}


def _node_data(v: Verdict) -> dict[str, Any]:
    return {"node": v.node, "op": v.op, "where": v.where, "verdict": v.where,
            "reasons": [_reason_data(r) for r in v.reasons],
            "remedies": list(dict.fromkeys(r.remedy for r in v.reasons if r.remedy))}


def _advice_data(a: Advice) -> dict[str, Any]:
    return {"kind": a.kind, "nodes": list(a.nodes), "found": a.found, "why": a.why, "remedy": a.remedy,
            "price": a.price, "source": a.source, "command": a.command}


def _print_advice(advice: Sequence[Advice]) -> None:
    """Each finding as a paragraph: what, why, what to do at what price, and the command that does it."""
    from npulab.cli.printing import say

    for a in advice:
        say(f"{a.kind}: {a.found}. {a.why} Try: {a.remedy}. Price: {a.price}. ({a.source})")
        if a.command:
            say(f"    {a.command}")
    if advice:
        say()


# a chip that npulab compiles for


def _profiled(graph: Graph, target: str, plan: Plan, options: Any) -> Profile | None:
    """The modelled times, where the network can be compiled."""
    from npulab import api
    from npulab.errors import NpulabError

    try:
        return api.profile(graph, target, plan.plan_name, options)
    except NpulabError:
        return None


def _chip_advice(graph: Graph, target: str, verdicts: Sequence[Verdict], profile: Profile | None,
                 model: str) -> tuple[Advice, ...]:
    from npulab.targets.facts.advice import for_chip, for_profile

    return (*for_chip(graph, verdicts, target, model), *(for_profile(profile, model) if profile else ()))


def _times(profile: Profile) -> dict[str, Any]:
    """Milliseconds by where they go, all modelled."""
    ms = {"npu": 0.0, "host": 0.0, "transfer": 0.0, "submit": 0.0}
    for span in profile.spans:
        ms[span.unit if span.unit in ms else "npu"] += span.ns / 1e6
    low, high = profile.interval_ns
    return {"label": "modelled", "total_ms": profile.total_ns / 1e6, "interval_ms": [low / 1e6, high / 1e6],
            **{f"{k}_ms": v for k, v in ms.items()}, "host_cpu": profile.host}


def _chip_data(graph: Graph, target: str, plan: str, verdicts: Sequence[Verdict], profile: Profile | None,
               advice: Sequence[Advice]) -> dict[str, Any]:
    npu = sum(v.where == "npu" for v in verdicts)
    return {"target": target, "plan": plan, "model": graph.name, "npu": npu, "host": len(verdicts) - npu,
            "nodes": [_node_data(v) for v in verdicts],
            "summary": {"npu": npu, "host": len(verdicts) - npu, "refused": 0, "unknown": 0},
            "cost": _times(profile) if profile else None, "findings": [_advice_data(a) for a in advice]}


def _print_chip(graph: Graph, target: str, plan: str, verdicts: Sequence[Verdict], profile: Profile | None,
                advice: Sequence[Advice]) -> None:
    from npulab.cli.printing import say, table

    npu = sum(v.where == "npu" for v in verdicts)
    table([">node", "operator", "where", "why not the NPU+"],
          [(v.node, v.op[:NAME], v.where, "\n".join(str(r) for r in v.reasons)) for v in verdicts])
    say()
    _print_advice(advice)
    if profile:
        t = _times(profile)
        say(f"Modelled: {t['total_ms']:.2f} ms, of it the NPU {t['npu_ms']:.2f}, the host's operators "
            f"{t['host_ms']:.2f}, copies between them {t['transfer_ms']:.2f}, submissions {t['submit_ms']:.2f}.")
    say(f"{npu} of {len(verdicts)} operators of {graph.name} run on the NPU of {target}, plan {plan}; "
        f"{len(verdicts) - npu} on the host.")


# boards that are described


def _summary(c: Check) -> dict[str, int]:
    return {where: c.count(where) for where in PLACES} | {
        "partitions": c.partitions, "macs": c.macs, "npu_macs": c.npu_macs}


def _cost_data(k: Cost) -> dict[str, Any]:
    return {"label": "from shapes", "transfers": k.transfers, "bytes": k.bytes, "values_of_unknown_size": k.open,
            "host_macs": k.host_macs, "host_elements": k.host_elements, "topology": k.topology or None,
            "topology_source": k.topology_source or None, "least_ms": k.least_ms, "basis": k.basis,
            "regions": [{"nodes": len(r.nodes), "first": r.nodes[0], "last": r.nodes[-1], "in_values": r.in_values,
                         "in_bytes": r.in_bytes, "out_values": r.out_values, "out_bytes": r.out_bytes}
                        for r in k.regions]}


def _board_data(graph: Graph, o: Outlook) -> dict[str, Any]:
    c = o.check
    return {
        "target": c.board, "model": graph.name, "state": o.state, "verdict": o.verdict,
        "nodes": [_node_data(f) | {"name": graph.nodes[f.node].name, "notes": [_reason_data(r) for r in f.notes],
                                   "undecided": [_reason_data(r) for r in f.undecided]} for f in c.findings],
        "summary": _summary(c),
        "quantized": {"as": o.dtype, "summary": _summary(o.quantized)} if o.quantized else None,
        "cost": _cost_data(o.cost), "findings": [_advice_data(a) for a in o.advice],
        "graph": [_reason_data(r) for r in c.graph], "graph_undecided": [_reason_data(r) for r in c.undecided],
        "advice": [_reason_data(r) for r in c.advice],
    }


def _print_board(graph: Graph, o: Outlook) -> None:
    from npulab.cli.printing import listed, say, table

    c = o.check
    alike: dict[tuple[str, str], list[Finding]] = {}
    for f in c.findings:
        notes = [] if f.where != "npu" else [str(r) for r in f.notes if r.source != "npulab"]
        if text := "\n".join([*(str(r) for r in f.reasons), *(f"Note: {n}" for n in notes)]):
            alike.setdefault((f.where, text), []).append(f)
    rows = [(_numbers([f.node for f in found]), listed(f.op[:NAME] for f in found), where, text)
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
    _print_advice(o.advice)
    _print_cost(o)
    say(o.verdict)


def _numbers(nodes: list[int]) -> str:
    """'0-3, 5'; of many stretches the first."""
    from npulab.cli.printing import ranges

    parts = ranges(nodes).split(", ")
    return ", ".join(parts) if len(parts) <= RANGES else ", ".join([*parts[:RANGES], f"... {len(nodes)} in all"])


def _print_cost(o: Outlook) -> None:
    from npulab.cli.printing import amount, say

    k = o.cost
    if not k.transfers and not k.host_macs:
        return
    as_ = f", as {o.assume or o.dtype}" if o.assume or o.dtype else ""
    text = (f"The fallback{as_}: {k.transfers} tensors of {amount(k.bytes)}B cross between NPU and CPU"
            + (f", and {k.open} of unknown size" if k.open else "") + f"; {amount(k.host_macs)} MACs and "
            f"{amount(k.host_elements)} elements are left to the CPU, whose time is not modelled.")
    bound = f"At least {k.least_ms:.3g} ms: {k.basis}" if k.least_ms is not None else k.basis.capitalize() if \
        k.basis[0].islower() else k.basis
    say(f"{text} {bound}" + (f" (memory: {k.topology_source})." if k.topology_source else "."))
    say()


def _print_side_by_side(graph: Graph, outlooks: Sequence[Outlook], model: str) -> None:
    from npulab.cli.printing import say, table
    from npulab.targets.facts.outlook import best_first, kinds

    ranked = best_first(outlooks)
    table(["board", "state", ">NPU", ">host", ">no", ">?", ">MACs %", "off the NPU+"], [
        (o.check.board, o.state, *(o.best.count(where) or "" for where in PLACES),
         "" if o.best.npu_percent is None else f"{o.best.npu_percent:.1f}",
         ", ".join(kinds(o.best, where) for where in ("refused", "host", "unknown") if o.best.count(where)))
        for o in ranked])
    say()
    say(f"{graph.name}, {len(graph.nodes)} operators. no: the vendor's tool does not take it. ?: nothing published "
        "says. all: runs whole. tail: all but what follows the last convolutions, which can be cut off. quantize: "
        "counted as the type that the board wants (--as). limit: a rule about the whole network is broken.")
    best = ranked[0]
    say(best.verdict)
    say(f"--target NAME gives a board's rules, their sources and what to change: npulab check {model} --target "
        f"{best.check.board}")
