"""npulab patch: rewrite a network for a board, and prove what that changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.options import DimOption, Json, parse_dims

if TYPE_CHECKING:
    from npulab.ir import Graph
    from npulab.passes.certificate import Agreement
    from npulab.passes.pipeline import Change
    from npulab.patching import Patched
    from npulab.targets.facts.board import Check

SHOWN = 6
"""Changes of one pass that the terminal lists."""


def patch(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", show_default=False,
                                                help="An .onnx or .tflite file.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT", show_default=False,
                                                help="The rewritten network.")] = None,
    target: Annotated[str | None, typer.Option("--target", metavar="BOARD", show_default=False, help=(
        "Also apply the exact passes that leave fewer operators off this board's NPU."))] = None,
    passes: Annotated[list[str] | None, typer.Option("--pass", metavar="NAME", show_default=False,
                                                     help="Apply this pass too; once for each.")] = None,
    as_: Annotated[str | None, typer.Option("--as", metavar="TYPE", show_default=False, help=(
        "The type that floats will have been given for the board. Otherwise int8 where it takes more so."))] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the passes and stop.")] = False,
    inputs: Annotated[Path | None, typer.Option(
        "--input", metavar="FILE.npz", show_default=False,
        help="Real inputs, by name, that the certificate compares outputs on beside random ones.")] = None,
    dim: DimOption = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE.json", show_default=False,
                                                help="Write the certificate.")] = None,
    json: Json = False,
) -> None:
    """Rewrite a network so that a board takes more of it, and prove it.

    Both networks are run in ONNX Runtime, or in LiteRT. A TFLite network stays one, with its inputs and outputs. A head
    that is cut off is written beside OUT: as a record that npulab run reads (.post.json), and as a Python program
    (_post.py).

    Exit code 1: a pass called exact changed the outputs, and nothing is written.
    """
    from npulab import api
    from npulab.cli.printing import progress, write_json
    from npulab.errors import UsageError
    from npulab.passes.pipeline import PASSES
    from npulab.program.files import write_atomically

    if list_:
        _list(PASSES, json)
        return
    if model is None or output is None:
        raise UsageError("npulab patch needs a model and -o OUT", try_="npulab patch --help")
    graph = api.load(model, parse_dims(dim))
    feeds = _feeds(inputs, graph) if inputs else None
    progress("rewriting")
    made = api.patch(graph, target, passes or [], as_)
    progress("running both networks")
    agreements, how = made.compare(feeds)
    broken = [a for a in agreements if made.exact and not a.equal]
    data = _as_data(graph, made, agreements) | {"measured_with": how, "notes": made.notes}
    written = {} if broken else _files(output, made)
    data["files"] = [str(path) for path in written]
    for path, content in written.items():
        write_atomically(path, content)
    if report:
        import json as formats

        write_atomically(report, (formats.dumps(data, indent=1) + "\n").encode())
    if json:
        write_json(data)
    else:
        _print(graph.name, data, made.changes, list(written))
    if broken:
        raise typer.Exit(1)


def _files(output: Path, made: Patched) -> dict[Path, bytes]:
    """What is written: what belongs to a cut head first."""
    found = {}
    if made.post is not None:
        import re

        from npulab.postprocess.program import standalone
        from npulab.postprocess.types import to_json

        found[output.with_suffix(".post.json")] = to_json(made.post)
        name = re.sub(r"\W", "_", output.stem)
        found[output.with_name(f"{name}_post.py")] = standalone(made.post).encode()
    return found | {output: made.data()}


def _feeds(path: Path, graph: Graph) -> dict[str, Any]:
    from npulab.importers.arrays import read_arrays

    return read_arrays(path, (graph.values[v] for v in graph.inputs))


def _list(passes: Any, json: bool) -> None:
    from npulab.cli.printing import say, write_json

    kinds = {(True, True): "always", (True, False): "where the board needs it", (False, False): "only by name"}
    if json:
        write_json([{"name": p.name, "exact": p.exact, "when": kinds[p.exact, p.always], "rule": p.rule}
                    for p in passes])
        return
    for p in passes:
        number = "" if p.number is None else f" (={p.number})"
        say(f"{p.name}{number}: {kinds[p.exact, p.always]}{'' if p.exact else ', NOT EXACT'}")
        say(f"    {p.rule}")
    say()
    say("What is not exact changes the outputs, and is done only if asked for with --pass NAME, or NAME=NUMBER.")


def _as_data(before: Graph, made: Patched, agreements: list[Agreement]) -> dict[str, Any]:
    """The certificate."""
    from npulab.teardown import layers, sized

    def size(graph: Graph) -> dict[str, Any]:
        constants = sum(len(v.constant or b"") for v in graph.values if v.is_constant)
        return {"nodes": len(graph.nodes), "constant_bytes": constants,
                "macs": sum(layer.macs for layer in layers(sized(graph)))}

    def verdicts(check: Check) -> dict[str, int]:
        return {where: check.count(where) for where in ("npu", "host", "refused", "unknown")}

    data: dict[str, Any] = {
        "model": before.name, "digest": before.digest, "equivalent": made.exact,
        "post_processing": any(c.stage for c in made.changes),
        "changes": [{"pass": c.name, "exact": c.exact, "text": c.text} for c in made.changes],
        "before": size(before), "after": size(made.graph),
        "outputs": [{"name": a.output, "largest_error": a.largest, "relative_error": a.relative, "cosine": a.cosine,
                     "steps": a.steps, "limit": a.limit if a.limit < 1e9 else None, "equal": a.equal}
                    for a in agreements],
    }
    if made.before and made.after:
        data |= {"target": made.before.board, "as": made.assume or None, "verdicts_before": verdicts(made.before),
                 "verdicts_after": verdicts(made.after)}
    return data


def _table_of(outputs: list[dict[str, Any]], stepped: bool) -> None:
    from npulab.cli.printing import table

    def row(o: dict[str, Any]) -> list[str]:
        steps = "" if o["steps"] is None else f"{o['steps']:.1f}"
        return [o["name"], f"{o['largest_error']:.3g}", f"{o['relative_error']:.3g}", f"{o['cosine']:.9f}",
                *([steps] if stepped else [])]

    table(["output+", ">error", ">of the largest", ">cosine", *([">steps"] if stepped else [])], map(row, outputs))


def _print(name: str, data: dict[str, Any], changes: Sequence[Change], written: list[Path]) -> None:
    from npulab.cli.printing import say, table

    say(name)
    say()
    for kind in dict.fromkeys(c.name for c in changes):
        texts = [c.text for c in changes if c.name == kind]
        say(f"{kind}: {len(texts)} {'place' if len(texts) == 1 else 'places'}")
        for text in texts[:SHOWN]:
            say(f"  {text}")
        if len(texts) > SHOWN:
            say(f"  and {len(texts) - SHOWN} more")
    if not changes:
        say("No pass found anything to change.")
    say()
    before, after = data["before"], data["after"]
    rows = [("nodes", before["nodes"], after["nodes"]), ("MACs", before["macs"], after["macs"]),
            ("bytes of constants", before["constant_bytes"], after["constant_bytes"])]
    if "target" in data:
        as_ = f", as {data['as']}" if data["as"] else ""
        rows += [(f"{where} on {data['target']}{as_}", data["verdicts_before"][where], data["verdicts_after"][where])
                 for where in data["verdicts_before"]]
    table([" ", ">before", ">after"], rows)
    say()
    stepped = any(o["steps"] is not None for o in data["outputs"])
    if data["outputs"]:
        _table_of(data["outputs"], stepped)
        say(f"Measured with {data['measured_with']}.")
        say()
    for note in data["notes"]:
        say(note)
    if not data["equivalent"]:
        inexact = ", ".join(dict.fromkeys(c.name for c in changes if not c.exact))
        say(f"NOT EQUIVALENT: {inexact} changed what the network computes. Train it again, or measure its accuracy.")
    elif not written:
        say("THE OUTPUTS CHANGED although every pass is exact: nothing was written. This is a defect of npulab, or the "
            "network has outputs that rounding decides.")
    elif not data["outputs"]:
        say("It is the same file.")
    elif stepped:
        say("Equivalent with its post-processing, up to rounding: it gives what the head computes in floats on the "
            "same maps, with its grids, strides and bins as they were before they were quantized. The untouched head "
            "rounds each number to 8 bits on its way, and is so many steps of its output away from that.")
    else:
        how = " with its post-processing" if data["post_processing"] else ""
        say(f"Equivalent{how}: the outputs agree within 1e-5 of their largest value, on random inputs and on those "
            "given.")
    for path in written[-1:]:
        say(f"Wrote {path}.")
    for path in written[:-1]:
        use = "for npulab run" if path.suffix == ".json" else "post-processing that needs NumPy alone"
        say(f"Wrote {path}: {use}.")
