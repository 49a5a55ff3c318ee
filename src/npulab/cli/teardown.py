"""npulab teardown: what each layer of a network reads and multiplies."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npulab.cli.options import DimOption, Json, parse_dims

if TYPE_CHECKING:
    from collections.abc import Sequence

    from npulab.teardown import Layer, Numbers, Row, Totals

WIDTH = 80
BAR_MAX = 16


class DataType(enum.StrEnum):
    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"

    @property
    def numbers(self) -> Numbers:
        return "fp32" if self is DataType.FP32 else "fp16" if self is DataType.FP16 else "int8"


def teardown(
    model: Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help="A .tflite or .onnx file.")],
    dtype: Annotated[DataType | None, typer.Option("--dtype", show_default="the file's own",
                                                   help="Count bytes as if all data had this type.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Show every operator, not only layers with weights.")] = False,
    dim: DimOption = None,
    json: Json = False,
) -> None:
    """Say what each layer reads and multiplies: size, channels, kB of input and weights, MACs.

    kB are 1024 bytes; biases are not counted. A network that is nine tenths convolutions is shown without its fully
    connected layers.
    """
    from npulab.cli.printing import write_json
    from npulab.importers import load
    from npulab.teardown import as_data, fold, kinds, layers, sized

    graph = load(model, parse_dims(dim))
    numbers = dtype.numbers if dtype else None
    found = layers(sized(graph), numbers)
    wanted = kinds(found)
    rows = fold(x for x in found if all_ or x.kind in wanted)
    if json:
        write_json({"model": graph.name, "dtype": dtype.value if dtype else None, **as_data(rows)})
    else:
        _print(graph.name, rows, [] if all_ else [x for x in found if x.kind not in wanted], numbers)


def _print(name: str, rows: Sequence[Row], hidden: Sequence[Layer], numbers: Numbers | None) -> None:
    from npulab.cli.printing import amount, say, table
    from npulab.teardown import totals

    whole = totals(rows)
    macs = [r.repeat * r.layer.macs for r in rows]
    every = sum(macs) or 1
    cells: list[tuple[str, ...]] = [
        (f"{r.repeat} x" if r.repeat > 1 else "", r.layer.label, _sides(r.layer.in_size),
         f"{r.layer.in_channels}>{r.layer.out_channels}", *_amounts(r.layer, whole), f"{100 * m / every:.1f}")
        for r, m in zip(rows, macs, strict=True)]
    total: tuple[str, ...] = (f"{whole.layers} x", "all", "", "", *_numbers(whole), "100.0" if sum(macs) else "0.0")
    columns = [">", "layer", ">input", ">channels", ">in kB", ">weight kB", ">MMAC", ">%"]
    taken = sum(max(len(c.lstrip(">")), *(len(row[i]) for row in (*cells, total))) + 2 for i, c in enumerate(columns))
    bar = min(BAR_MAX, WIDTH - taken)
    if bar >= 4 and macs and max(macs):
        columns.append("MACs")
        cells = [(*row, "#" * round(bar * m / max(macs))) for row, m in zip(cells, macs, strict=True)]
        total = (*total, "")
    else:
        columns[1] += "+"
    table(columns, [*cells, total])
    say()
    for t, what in ((totals(rows, "convolution"), "convolution"),
                    (totals(rows, "fully connected"), "fully connected layer")):
        if t.layers:
            inputs, weights, mmacs = _numbers(t)
            say(f"{t.layers} {what}{'s' * (t.layers != 1)}: {inputs} kB of inputs, {weights} kB of weights, "
                f"{mmacs} M MACs")
    say(f"{name}: bytes as {numbers or 'the file has them'}; kB are 1024 bytes. A row's numbers are of one of its "
        "layers, its % of all MACs are by all of them. Biases are not counted.")
    if hidden:
        more, kilobytes = sum(x.macs for x in hidden), sum(x.weight_bits for x in hidden) / 8192
        say(f"{len(hidden)} other operator{'s' * (len(hidden) != 1)}"
            + (f", {amount(more)} MACs and {kilobytes:,.0f} kB of weights," if more else "")
            + f" {'are' if len(hidden) != 1 else 'is'} not shown.")


def _amounts(layer: Layer, whole: Totals) -> tuple[str, str, str]:
    from npulab.teardown import kb

    return (_number(kb(layer.input_bits), whole.input_kb), _number(kb(layer.weight_bits), whole.weight_kb),
            _number(layer.macs / 1e6, whole.mmacs))


def _numbers(t: Totals) -> tuple[str, str, str]:
    return _number(t.input_kb, t.input_kb), _number(t.weight_kb, t.weight_kb), _number(t.mmacs, t.mmacs)


def _sides(sides: tuple[int, ...]) -> str:
    return str(sides[0]) if len(set(sides)) == 1 else "x".join(map(str, sides))


def _number(x: float, total: float) -> str:
    """Whole numbers in a column whose total has four digits, else as many decimals as show three."""
    return f"{x:,.{0 if total >= 1000 or not total else 1 if total >= 100 else 2 if total >= 1 else 4}f}"
