"""npulab zoo: well-known topologies as ONNX files, built from code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npulab.cli.options import Json

zoo = typer.Typer(no_args_is_help=True, help="Build the topology of a well-known network as an ONNX file.")


@zoo.command(no_args_is_help=True)
def build(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="`npulab zoo list` has them.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.onnx", show_default=False,
                                         help="Where to write it.")],
    size: Annotated[int | None, typer.Option("--size", metavar="N", show_default="the source's",
                                             help="Side of the input in pixels.")] = None,
    classes: Annotated[int | None, typer.Option("--classes", metavar="N", show_default="the source's",
                                                help="Classes that it tells apart.")] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the random weights.")] = 0,
    json: Json = False,
) -> None:
    """Write a topology with random weights. The same options give the same bytes."""
    from npulab import zoo as room
    from npulab.cli.printing import progress, say, write_json
    from npulab.errors import UsageError
    from npulab.program.files import write_atomically

    if output.suffix.lower() != ".onnx":
        raise UsageError(f"zoo build does not write {output}", want=f"a name like {output.stem or name}.onnx")
    topology = room.find(name)
    progress(f"building {name}")
    content = room.build(name, size, classes, seed)
    write_atomically(output, content)
    made = {"name": name, "file": str(output), "bytes": len(content), "size": size or topology.size,
            "classes": classes or topology.classes, "seed": seed}
    if json:
        write_json(made)
    else:
        say(f"wrote {output} ({len(content)} bytes): {name}, input {made['size']}x{made['size']}, "
            f"{made['classes']} classes, seed {seed}")


@zoo.command(name="list")
def list_(json: Json = False) -> None:
    """List the topologies."""
    from npulab.cli.printing import say, table, write_json
    from npulab.zoo import topologies

    known = topologies().values()
    if json:
        write_json({"topologies": [{"name": t.name, "size": t.size, "stride": t.stride, "classes": t.classes,
                                    "about": t.about, "source": t.source} for t in known]})
        return
    table(["name", ">input", ">classes", "what+"], [(t.name, t.size, t.classes, t.about) for t in known])
    say()
    say("Weights are random: for times, sizes and placement, not for answers. --json has the sources.")
