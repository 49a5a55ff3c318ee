"""npulab compile: a model to the NPU's own commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.options import DimOption, Json, Plan, PlanOption, TargetName, parse_dims
from npulab.cli.plan_options import (
    Channels,
    ChannelsOption,
    Features,
    NoImageCache,
    NoKernelCache,
    NoZeroRuns,
    plan_options,
)

if TYPE_CHECKING:
    from npulab.program.types import Program


def compile(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A .tflite or .onnx file.", show_default=False)],
    target: TargetName,
    plan: PlanOption = Plan.BEST,
    no_zero_runs: NoZeroRuns = False,
    channels: ChannelsOption = Channels.ANY,
    no_kernel_cache: NoKernelCache = False,
    no_image_cache: NoImageCache = False,
    feature: Features = None,
    search_log: Annotated[Path | None, typer.Option(
        "--search-log", metavar="FILE", show_default=False,
        help="Keep the search's answers here, and go on from there.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE.npu",
                                                help="Write the program here.", show_default=False)] = None,
    dump: Annotated[Path | None, typer.Option("--dump", metavar="DIR", show_default=False,
                                              help="Write jobs.json and the raw streams here.")] = None,
    dim: DimOption = None,
    json: Json = False,
) -> None:
    """Compile a model, and say what runs where. Writes only what -o and --dump ask for.

    An ONNX model is converted to TFLite first: what is quantized in it (QDQ, QOperator) runs in integers.
    """
    from npulab import api
    from npulab.cli.printing import write_json
    from npulab.program.dump import dump as write_dump

    options = plan_options(no_zero_runs, channels, no_kernel_cache, no_image_cache, feature)
    if search_log is not None:
        options = replace(options, search_log=str(search_log))
    program = api.compile(api.load(model, parse_dims(dim)), target, plan.plan_name, options=options)
    if output is not None:
        api.write_program(program, output)
    if dump is not None:
        write_dump(program, dump)
    if json:
        write_json(as_data(program) | {"output": None if output is None else str(output),
                                       "dump": None if dump is None else str(dump)})
    else:
        print_summary(program)
        if output is not None:
            print(f"\nwrote {output} ({output.stat().st_size} bytes)")
        if dump is not None:
            print(f"\nwrote {dump / 'jobs.json'} and the files it names")


def as_data(program: Program) -> dict[str, Any]:
    """What the summary says, for programs."""
    from npulab.program.types import NpuStep

    steps = []
    for i, s in enumerate(program.steps):
        npu = isinstance(s, NpuStep)
        steps.append({
            "step": i, "where": "npu" if npu else "host", "nodes": list(s.nodes),
            "ops": [program.ops[n] for n in s.nodes],
            **({"origins": [program.origins[n] for n in s.nodes]} if program.origins else {}),
            "jobs": len(s.jobs) if isinstance(s, NpuStep) else 0,
            "macs": sum(j.macs for j in s.jobs) if isinstance(s, NpuStep) else 0,
            "upload_bytes": sum(t.size for t in s.uploads) if isinstance(s, NpuStep) else 0,
            "download_bytes": sum(t.size for t in s.downloads) if isinstance(s, NpuStep) else 0,
        })
    return {
        "target": program.target, "plan": program.plan, "options": program.options, "model": program.model,
        "digest": program.digest,
        "steps": steps, "memory": _memory(program),
        "host_nodes": [{"node": h.node, "op": h.op, "reasons": list(h.reasons)} for h in program.host_nodes],
    }


def print_summary(program: Program) -> None:
    from npulab.cli.printing import amount, listed, say, table

    data = as_data(program)
    say(f"{program.model} for {program.target}, plan {program.plan}{said_options(program)}")
    say()
    table([">step", "where", "operators+", ">jobs", ">MACs", ">up B", ">down B"], [
        (s["step"], s["where"], listed(s["ops"]), *(
            (s["jobs"], amount(s["macs"]), s["upload_bytes"], s["download_bytes"]) if s["where"] == "npu"
            else ("", "", "", ""))) for s in data["steps"]])
    memory = data["memory"]
    say()
    say(f"NPU memory: coefficients {memory['coefficients']} B, tensors {memory['tensor']} B, "
        f"descriptors {memory['descriptor']} B; {memory['words']} command words.")
    if program.host_nodes:
        say()
        if program.origins:
            table([">node", "operator", "made from+", "why the host runs it+"],
                  [(h.node, h.op, program.origins[h.node], "\n".join(h.reasons)) for h in program.host_nodes])
        else:
            table([">node", "operator", "why the host runs it+"],
                  [(h.node, h.op, "\n".join(h.reasons)) for h in program.host_nodes])


def said_options(program: Program) -> str:
    """', no-zero-runs, channels multiple-of-cores': what is not default."""
    return "".join(f", {name}" if value == "on" else f", {name} {value}" for name, value in program.options.items())


def _memory(program: Program) -> dict[str, int]:
    from npulab.program.types import NpuStep, SectionKind

    found = {k.value: sum(s.size for s in program.sections if s.kind is k) for k in SectionKind}
    return found | {"words": len(program.init) + sum(len(s.words) for s in program.steps if isinstance(s, NpuStep))}
