"""npulab roofline: a network under a device's ceilings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npulab.cli.options import DimOption, Json, parse_dims
from npulab.cli.teardown import DataType

if TYPE_CHECKING:
    from npulab.rooflines import Roofline


def roofline(
    model: Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help="A .tflite or .onnx file.")],
    device: Annotated[str, typer.Option("--device", metavar="RESULT.json|TARGET", show_default=False,
                                        help="What npulab probe --json wrote, or a name of npulab targets.")],
    numbers: Annotated[DataType | None, typer.Option("--numbers", show_default="the file's own",
                                                     help="Count bytes and rates as if all data had this type.")]
    = None,
    all_: Annotated[bool, typer.Option("--all", help="Also operators that multiply nothing, each by itself.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE.html", show_default=False,
                                              help="Write the picture and the table as one page.")] = None,
    dim: DimOption = None,
    json: Json = False,
) -> None:
    """Say how fast each layer can be at most on a device, and what decides it.

    Ceilings are measured, stated or assumed, and say which. A multiply-add is two operations; a layer moves its
    weights, its input and its output once. The times are floors, not predictions.
    """
    from npulab.cli.printing import write_json
    from npulab.importers import load
    from npulab.rooflines import as_data, ceilings_of
    from npulab.rooflines import roofline as draw

    known = ceilings_of(device)
    found = draw(load(model, parse_dims(dim)), known, numbers.numbers if numbers else None, all_)
    if html is not None:
        from npulab.program.files import write_atomically
        from npulab.report.roofline import page

        write_atomically(html, page(found).encode())
    if json:
        write_json(as_data(found))
    else:
        _print(found, html)


def _print(found: Roofline, html: Path | None) -> None:
    from npulab.cli.printing import say
    from npulab.report.roofline import sketch

    say(f"{found.model} on {found.device.title}: {found.numbers} rates, bytes as "
        f"{found.numbers if found.forced else 'the file has them'}")
    say()
    _layers(found)
    say()
    _ceilings(found)
    say()
    for line in sketch(found):
        print(line)
    _totals(found)
    for note in found.notes:
        say(f"note    {note}")
    for x in found.device.left_out:
        say(f"note    {x.name} is not used: {x.why}")
    if html is not None:
        say(f"Wrote {html}")


def _layers(found: Roofline) -> None:
    from itertools import groupby

    from npulab.cli.printing import table
    from npulab.report.roofline import seconds

    rows = []
    for _, group in groupby(found.layers, key=lambda x: (x.layer, x.outputs)):  # equal neighbours in one row
        same = list(group)
        x = same[0]
        size = f"{_sides(x.layer.in_size)} {x.layer.in_channels}>{x.layer.out_channels}"
        rows.append((f"{len(same)} x" if len(same) > 1 else "", x.layer.label, size, *_amounts(x.operations, x.bytes),
                     seconds(x.seconds).replace(" ", ""), x.bound, f"{100 * sum(map(found.share, same)):.1f}"))
    whole = found.seconds
    rows.append((f"{len(found.layers)} x", "all", "",
                 *_amounts(sum(x.operations for x in found.layers), sum(x.bytes for x in found.layers)),
                 seconds(whole).replace(" ", ""), "", "100.0" if whole else "0.0"))
    table([">", "layer+", ">input, ch+", ">ops", ">bytes", ">op/B", ">floor", "bound", ">%"], rows)


def _amounts(operations: int, size: int) -> tuple[str, str, str]:
    """Operations, bytes and their ratio in few characters."""
    from npulab.cli.printing import amount
    from npulab.report.figures import data

    return (amount(operations).replace(" ", ""), data(float(f"{size:.3g}")).replace(" ", ""),
            f"{operations / size:.3g}" if operations and size else "")


def _ceilings(found: Roofline) -> None:
    from npulab.cli.printing import say, table
    from npulab.report.roofline import rate, seconds

    rows = []
    for i, c in enumerate(found.ceilings):
        ridge = found.ridge(i)
        rows.append((str(i + 1), c.name, rate(c.value, c.unit), c.standing, seconds(found.at(i)),
                     "" if ridge is None else f"{ridge:.4g}", "yes" if i in found.limits else "no"))
    table([">", "ceiling", ">at most", "standing", ">all layers", ">ridge op/B", "limits"], rows)
    for i, c in enumerate(found.ceilings):
        say(f"  {i + 1}  {c.source}" + (f": {c.note}" if c.note else ""))


def _totals(found: Roofline) -> None:
    from npulab.cli.printing import amount, say
    from npulab.report.figures import data
    from npulab.report.roofline import hidden, percent, seconds
    from npulab.rooflines import by_bound

    whole = found.seconds
    if whole is not None:
        parts = ", ".join(f"{resource} bounds {percent(s / whole)}" for resource, s in by_bound(found).items())
        say(f"floor   {seconds(whole)} layer after layer: {parts}")
    w = found.whole
    if w.seconds is not None:
        say(f"network {seconds(w.seconds)} if no tensor between layers left the chip: "
            f"{amount(w.operations)} operations, {data(float(f'{w.bytes:.3g}'))} of weights, inputs and outputs; "
            f"{w.bound} bounds it")
    if found.hidden:
        say(f"hidden  {found.hidden} operators: {hidden(found)}" + ("" if found.everything else "; --all lists them"))


def _sides(sides: tuple[int, ...]) -> str:
    return str(sides[0]) if len(set(sides)) == 1 else "x".join(map(str, sides))
