"""npulab patch: rewrite a network for a board, and prove what that changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.options import DimOption, Json, parse_dims

if TYPE_CHECKING:
    from npulab.ir import Graph
    from npulab.passes.certificate import Agreement
    from npulab.passes.pipeline import Change
    from npulab.targets.facts.board import Check

SHOWN = 6
"""Changes of one pass that the terminal lists."""


def patch(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", show_default=False, help="An .onnx file.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT.onnx", show_default=False,
                                                help="The rewritten network.")] = None,
    target: Annotated[str | None, typer.Option("--target", metavar="BOARD", show_default=False, help=(
        "Also apply the exact passes that leave fewer operators off this board's NPU."))] = None,
    passes: Annotated[list[str] | None, typer.Option("--pass", metavar="NAME", show_default=False,
                                                     help="Apply this pass too; once for each.")] = None,
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

    Both networks are run in ONNX Runtime. Exit code 1: a pass called exact changed the outputs, and nothing is written.
    """
    from npulab import api
    from npulab.cli.printing import progress, write_json
    from npulab.errors import UsageError
    from npulab.exporters.onnx import to_onnx
    from npulab.passes.certificate import compared
    from npulab.passes.pipeline import PASSES, find_passes, patched
    from npulab.program.files import write_atomically
    from npulab.targets.facts.board import find_board

    if list_:
        _list(PASSES, json)
        return
    if model is None or output is None:
        raise UsageError("npulab patch needs a model and -o OUT.onnx", try_="npulab patch --help")
    find_passes(passes or ())
    board = find_board(target) if target else None
    graph = api.load(model, parse_dims(dim))
    if graph.format != "onnx":
        raise UsageError(f"{model} is not an ONNX model", got=graph.format, try_="patch the ONNX file it was made from")
    feeds = _feeds(inputs, graph) if inputs else None
    progress("rewriting")
    after, changes = patched(graph, passes or (), (lambda g: _off(board.check(g))) if board else None)
    progress("running both networks")
    agreements = compared(graph, after, feeds)
    exact = all(c.exact for c in changes)
    broken = [a for a in agreements if exact and not a.equal]
    data = _as_data(graph, after, changes, agreements, board.check(graph) if board else None,
                    board.check(after) if board else None)
    if not broken:
        write_atomically(output, to_onnx(after))
    if report:
        import json as formats

        write_atomically(report, (formats.dumps(data, indent=1) + "\n").encode())
    if json:
        write_json(data)
    else:
        _print(graph.name, data, changes, None if broken else output)
    if broken:
        raise typer.Exit(1)


def _off(check: Check) -> set[int]:
    return {f.node for f in check.findings if f.where != "npu"}


def _feeds(path: Path, graph: Graph) -> dict[str, Any]:
    import zipfile

    import numpy as np

    from npulab.errors import ModelError, UsageError

    names = [graph.values[v].name for v in graph.inputs]
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in names if name in stored}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, TypeError, AttributeError) as e:
        raise ModelError(f"{path} is not a file of arrays by name", got=str(e)[:200],
                         want="what numpy.savez writes") from None
    for v in graph.inputs:
        value = graph.values[v]
        if value.name not in found:
            raise UsageError(f"{path} has no array '{value.name}'", want=", ".join(names))
        if found[value.name].shape != value.shape or found[value.name].dtype != value.dtype.numpy:
            raise UsageError(f"the array '{value.name}' of {path} does not fit",
                             got=f"{found[value.name].dtype}{list(found[value.name].shape)}", want=str(value))
    return found


def _list(passes: Any, json: bool) -> None:
    from npulab.cli.printing import say, table, write_json

    kinds = {(True, True): "always", (True, False): "where the board needs it", (False, False): "only by name"}
    if json:
        write_json([{"name": p.name, "exact": p.exact, "when": kinds[p.exact, p.always], "rule": p.rule}
                    for p in passes])
        return
    table(["pass", "exact", "when", "rule+"],
          [(p.name, "yes" if p.exact else "NO", kinds[p.exact, p.always], p.rule) for p in passes])
    say()
    say("What is not exact changes the outputs, and is done only if asked for with --pass.")


def _as_data(before: Graph, after: Graph, changes: list[Change], agreements: list[Agreement], was: Check | None,
             now: Check | None) -> dict[str, Any]:
    """The certificate."""
    from npulab.teardown import layers

    def size(graph: Graph) -> dict[str, Any]:
        constants = sum(len(v.constant or b"") for v in graph.values if v.is_constant)
        return {"nodes": len(graph.nodes), "constant_bytes": constants,
                "macs": sum(layer.macs for layer in layers(graph))}

    def verdicts(check: Check) -> dict[str, int]:
        return {where: check.count(where) for where in ("npu", "host", "refused", "unknown")}

    data: dict[str, Any] = {
        "model": before.name, "digest": before.digest, "equivalent": all(c.exact for c in changes),
        "changes": [{"pass": c.name, "exact": c.exact, "text": c.text} for c in changes],
        "before": size(before), "after": size(after),
        "outputs": [{"name": a.output, "largest_error": a.largest, "relative_error": a.relative, "cosine": a.cosine,
                     "equal": a.equal} for a in agreements],
    }
    if was and now:
        data |= {"target": was.board, "verdicts_before": verdicts(was), "verdicts_after": verdicts(now)}
    return data


def _print(name: str, data: dict[str, Any], changes: list[Change], output: Path | None) -> None:
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
        rows += [(f"{where} on {data['target']}", data["verdicts_before"][where], data["verdicts_after"][where])
                 for where in data["verdicts_before"]]
    table([" ", ">before", ">after"], rows)
    say()
    table(["output", ">largest error", ">of the largest value", ">cosine"],
          [(o["name"], f"{o['largest_error']:.3g}", f"{o['relative_error']:.3g}", f"{o['cosine']:.9f}")
           for o in data["outputs"]])
    say()
    if not data["equivalent"]:
        inexact = ", ".join(dict.fromkeys(c.name for c in changes if not c.exact))
        say(f"NOT EQUIVALENT: {inexact} changed what the network computes. Train it again, or measure its accuracy.")
    elif output is None:
        say("THE OUTPUTS CHANGED although every pass is exact: nothing was written. This is a defect of npulab, or the "
            "network has outputs that rounding decides.")
    else:
        say("Equivalent: the outputs agree within 1e-5 of their largest value, on random inputs and on those given.")
    if output is not None:
        say(f"Wrote {output}.")
