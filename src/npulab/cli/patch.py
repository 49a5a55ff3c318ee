"""npulab patch: rewrite a network for a board, and prove what that changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.options import DimOption, Json, parse_dims

if TYPE_CHECKING:
    from npulab.ir import Graph
    from npulab.passes.certificate import Agreement
    from npulab.passes.pipeline import Change
    from npulab.postprocess.types import Post
    from npulab.targets.facts.board import Board, Check

SHOWN = 6
"""Changes of one pass that the terminal lists."""


def patch(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", show_default=False,
                                                help="An .onnx file; a .tflite file for cut-head.")] = None,
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

    Both networks are run in ONNX Runtime, or LiteRT. A head that is cut off is written beside OUT: as a record that
    npulab run reads (.post.json), and as a Python program (_post.py).

    Exit code 1: a pass called exact changed the outputs, and nothing is written.
    """
    from npulab import api
    from npulab.cli.printing import progress, write_json
    from npulab.errors import UsageError
    from npulab.passes.pipeline import PASSES, find_passes
    from npulab.program.files import write_atomically
    from npulab.targets.facts.board import find_board

    if list_:
        _list(PASSES, json)
        return
    if model is None or output is None:
        raise UsageError("npulab patch needs a model and -o OUT", try_="npulab patch --help")
    find_passes(passes or ())
    board = find_board(target) if target else None
    graph = api.load(model, parse_dims(dim))
    kind = as_ or (_quantized(board, graph) if board else "")

    def check(g: Graph) -> Check | None:
        return board.check(g, kind) if board else None

    feeds = _feeds(inputs, graph) if inputs else None
    progress("rewriting")
    made = (_tflite if graph.format == "tflite" else _onnx)(graph, passes or [], check if board else None)
    progress("running both networks")
    agreements = made.agreements(feeds)
    exact = all(c.exact for c in made.changes)
    broken = [a for a in agreements if exact and not a.equal]
    data = _as_data(graph, made.graph, made.changes, agreements, check(graph), check(made.graph))
    if board:
        data["as"] = kind or None
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


@dataclass(frozen=True)
class Made:
    """The new network, as a file too, and how to compare it with the old one."""

    graph: Graph
    data: Callable[[], bytes]
    changes: list[Change]
    post: Post | None
    agreements: Callable[[dict[str, Any] | None], list[Agreement]]


def _onnx(graph: Graph, passes: list[str], check: Callable[[Graph], Any] | None) -> Made:
    from npulab.exporters.onnx import to_onnx
    from npulab.passes.certificate import compared
    from npulab.passes.pipeline import patched, post_of

    after, changes = patched(graph, passes, (lambda g: _off(check(g))) if check else None)
    post = post_of(graph, after, changes)
    return Made(after, lambda: to_onnx(after), changes, post, lambda feeds: compared(graph, after, feeds, post))


def _tflite(graph: Graph, passes: list[str], check: Callable[[Graph], Any] | None) -> Made:
    """A TFLite network without its detection operator, if that was asked for or the board does not take it."""
    from npulab.errors import UsageError
    from npulab.passes.tflite_head import detection, same_detections, without_head

    if others := [p for p in passes if p != "cut-head"]:
        raise UsageError(f"the pass '{others[0]}' works on ONNX networks", got=f"{graph.name}, a TFLite network",
                         try_="patch the ONNX file it was made from; --pass cut-head alone takes TFLite")
    n = detection(graph)
    if not passes and not (check and n is not None and n.index in _off(check(graph))):
        raise UsageError(f"nothing of '{graph.name}' is to be patched", got=(
            "a TFLite network, of which only a detection head can be cut off" if n is None
            else f"{n}, which {'the board takes' if check else 'no --target asks to be cut off'}"),
            try_="patch the ONNX file it was made from" if n is None else "--pass cut-head")
    made = without_head(graph)
    return Made(made.body, lambda: made.data, [made.change], made.post,
                lambda feeds: same_detections(graph, made, feeds))


def _files(output: Path, made: Made) -> dict[Path, bytes]:
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


def _quantized(board: Board, graph: Graph) -> str:
    """int8 if the board takes more of the network so, as its vendor's quantizer would make it; else nothing."""
    return "int8" if board.check(graph, "int8").count("npu") > board.check(graph).count("npu") else ""


def _off(check: Check) -> set[int]:
    return {f.node for f in check.findings if f.where != "npu"}


def _feeds(path: Path, graph: Graph) -> dict[str, Any]:
    from npulab.importers.arrays import read_arrays

    return read_arrays(path, (graph.values[v] for v in graph.inputs))


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
        "post_processing": any(c.stage for c in changes),
        "changes": [{"pass": c.name, "exact": c.exact, "text": c.text} for c in changes],
        "before": size(before), "after": size(after),
        "outputs": [{"name": a.output, "largest_error": a.largest, "relative_error": a.relative, "cosine": a.cosine,
                     "equal": a.equal} for a in agreements],
    }
    if was and now:
        data |= {"target": was.board, "verdicts_before": verdicts(was), "verdicts_after": verdicts(now)}
    return data


def _print(name: str, data: dict[str, Any], changes: list[Change], written: list[Path]) -> None:
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
    table(["output", ">largest error", ">of the largest value", ">cosine"],
          [(o["name"], f"{o['largest_error']:.3g}", f"{o['relative_error']:.3g}", f"{o['cosine']:.9f}")
           for o in data["outputs"]])
    say()
    if not data["equivalent"]:
        inexact = ", ".join(dict.fromkeys(c.name for c in changes if not c.exact))
        say(f"NOT EQUIVALENT: {inexact} changed what the network computes. Train it again, or measure its accuracy.")
    elif not written:
        say("THE OUTPUTS CHANGED although every pass is exact: nothing was written. This is a defect of npulab, or the "
            "network has outputs that rounding decides.")
    else:
        how = " with its post-processing" if data["post_processing"] else ""
        say(f"Equivalent{how}: the outputs agree within 1e-5 of their largest value, on random inputs and on those "
            "given.")
    for path in written[-1:]:
        say(f"Wrote {path}.")
    for path in written[:-1]:
        use = "for npulab run" if path.suffix == ".json" else "post-processing that needs NumPy alone"
        say(f"Wrote {path}: {use}.")
