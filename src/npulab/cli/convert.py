"""npulab convert: a network in the other dialect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.options import DimOption, Json, parse_dims

if TYPE_CHECKING:
    from npulab.dialects import Converted
    from npulab.ir import Graph


def convert(
    model: Annotated[Path, typer.Argument(metavar="IN", show_default=False, help="An .onnx or .tflite file.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", show_default=False,
                                         help="The file to write: its name ends in .tflite or .onnx.")],
    keep_layout: Annotated[bool, typer.Option("--keep-layout", help=(
        "Pictures come and go as in IN, and not channels last in TFLite or first in ONNX."))] = False,
    dim: DimOption = None,
    json: Json = False,
) -> None:
    """Convert a network between ONNX and TFLite, in floats and in integers, and say what became of it.

    Quantized TFLite layers become operators between DequantizeLinear and QuantizeLinear, and the other way round.
    Exit code 1: an operator has no counterpart.
    """
    from npulab import api
    from npulab.cli.printing import progress, write_json
    from npulab.dialects import Converted, from_onnx, from_tflite
    from npulab.errors import UsageError
    from npulab.exporters.onnx import to_onnx
    from npulab.program.files import write_atomically

    wanted = output.suffix.lower().removeprefix(".")
    if wanted not in ("tflite", "onnx"):
        raise UsageError(f"cannot tell what {output} shall be", want="a name that ends in .tflite or .onnx")
    graph = api.load(model, parse_dims(dim))
    progress(f"converting {graph.name}")
    if graph.format == wanted:
        made = Converted(graph, {}, {}, ("it was in this dialect before",))
    else:
        made = from_onnx(graph, keep_layout) if wanted == "tflite" else from_tflite(graph, keep_layout)
    content = bytes(made.graph.source) if wanted == "tflite" else to_onnx(made.graph)
    write_atomically(output, content)
    data = _as_data(graph, made, output, len(content))
    if json:
        write_json(data)
    else:
        _print(data)


def _as_data(before: Graph, made: Converted, output: Path, size: int) -> dict[str, Any]:
    after = made.graph

    def ends(values: tuple[int, ...], orders: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
        return [{"name": v.name, "dtype": v.dtype.value, "shape": list(v.shape),
                 "order": list(orders[v.name]) if v.name in orders else None}
                for v in (after.values[i] for i in values)]

    return {
        "model": before.name, "from": before.format, "to": after.format, "output": str(output), "bytes": size,
        "nodes_before": len(before.nodes), "nodes_after": len(after.nodes), "notes": list(made.notes),
        "inputs": ends(after.inputs, made.inputs), "outputs": ends(after.outputs, made.outputs),
        "nodes": [{"node": n.index, "op": n.op.name, "from": n.name} for n in after.nodes],
    }


def _print(data: dict[str, Any]) -> None:
    from npulab.cli.printing import listed, say, table

    titles = {"onnx": "ONNX", "tflite": "TFLite"}
    say(f"{data['model']}: {titles[data['from']]}, {data['nodes_before']} nodes, to {titles[data['to']]}, "
        f"{data['nodes_after']} nodes")
    say(listed(n["op"] for n in data["nodes"]))
    say()
    table([" ", "name+", "type", "shape", "axes of the old"],
          [(kind[:-1], e["name"], e["dtype"], "x".join(map(str, e["shape"])) or "scalar",
            ", ".join(map(str, e["order"])) if e["order"] else "as before")
           for kind in ("inputs", "outputs") for e in data[kind]])
    say()
    if any(e["order"] for kind in ("inputs", "outputs") for e in data[kind]):
        say(f"Pictures are channels {'last' if data['to'] == 'tflite' else 'first'} now; --keep-layout keeps them as "
            "they were.")
    for note in data["notes"]:
        say(f"Note: {note}.")
    say(f"Wrote {data['output']} ({data['bytes']} bytes).")
