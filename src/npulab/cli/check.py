"""npulab check: where each operator runs, and why."""

from __future__ import annotations

import typer

from npulab.cli.options import Json, ModelPath, Plan, PlanOption, TargetName
from npulab.cli.plan_options import Channels, ChannelsOption, Features, plan_options


def check(model: ModelPath, target: TargetName, plan: PlanOption = Plan.BEST, channels: ChannelsOption = Channels.ANY,
          feature: Features = None, json: Json = False) -> None:
    """Say which operators the NPU takes, and why not the others.

    Exit code 1: it takes none.
    """
    from npulab import api
    from npulab.cli.printing import say, table, write_json

    graph = api.load(model)
    verdicts = api.check(graph, target, plan.plan_name, plan_options(channels=channels, features=feature))
    npu = sum(v.where == "npu" for v in verdicts)
    if json:
        write_json({
            "target": target, "plan": plan.value, "model": graph.name, "npu": npu, "host": len(verdicts) - npu,
            "nodes": [{"node": v.node, "op": v.op, "where": v.where, "reasons": [
                {"rule": r.rule, "found": r.found, "source": r.source, "remedy": r.remedy} for r in v.reasons]}
                for v in verdicts],
        })
    else:
        table([">node", "operator", "where", "why not the NPU+"],
              [(v.node, v.op, v.where, "\n".join(str(r) for r in v.reasons)) for v in verdicts])
        say()
        say(f"{npu} of {len(verdicts)} operators of {graph.name} run on the NPU of {target}, plan {plan.value}; "
            f"{len(verdicts) - npu} on the host.")
    if not npu:
        raise typer.Exit(1)
