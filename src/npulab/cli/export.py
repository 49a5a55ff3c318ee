"""npulab export: a folder for a vendor's own converter, and that converter run where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.options import DimOption, Json, parse_dims

if TYPE_CHECKING:
    from npulab.doors.bundle import Bundle
    from npulab.doors.tools import Ran
    from npulab.doors.types import Door, Preprocessing

LOG_SHOWN = 12
"""Last lines of a failed tool's log that the terminal shows."""
FILES_SHOWN = 8


def export(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", show_default=False,
                                                 help="An .onnx or .tflite file.")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="DOOR", show_default=False, help=(
        "The vendor's tool; --list has them. Without it, the one of --board."))] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FOLDER", show_default="MODEL-DOOR",
                                                help="The folder to write.")] = None,
    board: Annotated[str | None, typer.Option("--board", metavar="BOARD", show_default=False, help=(
        "A described board: it picks the tool and the tool's word for the chip."))] = None,
    chip: Annotated[str | None, typer.Option("--chip", metavar="WORD", show_default=False,
                                             help="The tool's own word for the chip.")] = None,
    calibration: Annotated[Path | None, typer.Option("--calibration", metavar="FOLDER", show_default=False, help=(
        "Pictures, or .npz files with arrays by input name, to measure ranges on."))] = None,
    mean: Annotated[str | None, typer.Option("--mean", metavar="M[,M,M]", show_default=False, help=(
        "The network's number is (pixel - M) / S, pixels 0..255."))] = None,
    std: Annotated[str | None, typer.Option("--std", metavar="S[,S,S]", show_default=False, help="See --mean.")] = None,
    order: Annotated[str, typer.Option("--order", metavar="rgb|bgr", help="The network's order of channels.")] = "rgb",
    dim: DimOption = None,
    run: Annotated[bool, typer.Option("--run", help="Run the vendor's tool, and compare what it made.")] = False,
    tool: Annotated[Path | None, typer.Option("--tool", metavar="PATH", show_default=False, help=(
        "Where the tool is: its program, or a Python that has it. Implies --run."))] = None,
    seconds: Annotated[int, typer.Option("--seconds", metavar="N", min=0, show_default="the door's",
                                         help="Time that the conversion may take.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that npulab did not write.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the doors and stop.")] = False,
    json: Json = False,
) -> None:
    """Write what a vendor's converter needs: model, script, calibration set, example, README.

    With --run the converter is run and its result compared with ONNX Runtime or LiteRT. Exit code 1: it failed.
    """
    from npulab import api
    from npulab.cli.printing import progress, write_json
    from npulab.doors.catalog import DOORS, chosen
    from npulab.errors import UsageError

    if list_:
        _list(DOORS, json)
        return
    from npulab.doors import folder as folders
    from npulab.doors import tools
    from npulab.doors.bundle import bundle
    from npulab.runtime.objects import post_beside

    if model is None:
        raise UsageError("npulab export needs a model", try_="npulab export --help")
    door, target = chosen(to, board, chip)
    how = _preprocessing(mean, std, order)
    place = output or Path(f"{model.stem}-{door.name}")
    folders.check_free(place, force)
    located = tools.locate(door, tool) if run or tool else None
    graph = api.load(model, parse_dims(dim))
    progress(f"preparing {door.name}")
    made = bundle(graph, door, target, board, how, calibration, _opset(board, door), post_beside(model))
    ran = None
    with folders.building(place, force) as building:
        folders.write_files(building, made.files)
        if located:
            progress(f"running {door.tool}")
            ran = tools.run(building, door, located, made, seconds)
            _keep(building, made, ran)
    data = _as_data(graph.name, place, door, made, ran)
    if json:
        write_json(data)
    else:
        _print(data, made, ran, door)
    if ran and ran.why:
        raise typer.Exit(1)


def _opset(board: str | None, door: Door) -> int:
    """The newest opset that the board's facts state, 0 for the door's own."""
    from npulab.targets.facts.schema import load_one

    fact = load_one(board).facts.get("onnx_opset") if board and door.opset else None
    return int(fact.value) if fact and isinstance(fact.value, int) else 0


def _preprocessing(mean: str | None, std: str | None, order: str) -> Preprocessing | None:
    from npulab.doors.types import Preprocessing
    from npulab.errors import UsageError

    if order not in ("rgb", "bgr"):
        raise UsageError(f"--order does not know '{order[:40]}'", want="rgb or bgr")
    if mean is None and std is None:
        if order == "bgr":
            raise UsageError("--order says nothing without --mean or --std", try_="--mean 0 --std 1 --order bgr")
        return None
    return Preprocessing(_numbers("--mean", mean or "0"), _numbers("--std", std or "1"),
                         "bgr" if order == "bgr" else "rgb")


def _numbers(option: str, text: str) -> tuple[float, ...]:
    import math

    from npulab.errors import UsageError

    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        raise UsageError(f"{option} does not know '{text[:60]}'", want="one number or three, such as 123.7,116.3,103.5")
    return numbers


def _keep(folder: Path, made: Bundle, ran: Ran) -> None:
    """Note in export.json what the run left in the folder, so that a later export knows it as its own."""
    import json as formats

    made.manifest["made"] = list(ran.made)
    (folder / "export.json").write_text(formats.dumps(made.manifest, indent=1) + "\n", "utf-8")


def _as_data(name: str, place: Path, door: Door, made: Bundle, ran: Ran | None) -> dict[str, Any]:
    data: dict[str, Any] = {
        "model": name, "door": door.name, "tool": door.tool, "target": made.manifest["target"],
        "board": made.manifest["board"], "folder": str(place), "files": sorted(made.files), "notes": list(made.notes),
        "tflm": made.manifest.get("tflm"), "run": None}
    if ran:
        data["run"] = {
            "converted": ran.converted, "seconds": round(ran.seconds, 2), "why": ran.why, "made": list(ran.made),
            "outputs": [{"name": a.output, "largest_error": a.largest, "relative_error": a.relative, "cosine": a.cosine}
                        for a in ran.agreements],
            "npu_operators": ran.placed[0] if ran.placed else None,
            "cpu_operators": list(ran.placed[1]) if ran.placed else None}
    return data


def _print(data: dict[str, Any], made: Bundle, ran: Ran | None, door: Door) -> None:
    from npulab.cli.printing import listed, say, table

    chip = f" for {data['target']}" if data["target"] else ""
    say(f"{data['model']} to {door.tool}{chip}: {data['folder']}")
    shown = [p for p in data["files"] if not p.startswith("calibration/")]
    say(f"  {', '.join(shown)}")
    for note in data["notes"]:
        say(f"  {note}")
    if data["tflm"]:
        say(f"  {len(data['tflm']['operators'])} operators to register, arena {data['tflm']['arena_bytes']} bytes")
    say()
    if ran is None:
        say("Next: README.txt there says what to run where." + ("" if door.verify else
                                                                f" {door.tool}: {door.install}."))
        return
    if ran.why:
        say(f"{door.tool} did not do it: {ran.why}. Its last words ({data['folder']}):")
        for line in ran.log.strip().splitlines()[-LOG_SHOWN:]:
            say(f"  {line[:300]}")
        return
    if ran.made:
        say(f"Made in {ran.seconds:.1f} s: {', '.join(ran.made[:FILES_SHOWN])}"
            + (f" and {len(ran.made) - FILES_SHOWN} more" if len(ran.made) > FILES_SHOWN else ""))
    if ran.placed:
        say(f"{ran.placed[0]} operators for the NPU; on the CPU: {listed(ran.placed[1]) or 'none'}")
    if ran.agreements:
        say()
        table(["output", ">largest error", ">of the largest value", ">cosine"],
              [(a.output, f"{a.largest:.3g}", f"{a.relative:.3g}", f"{a.cosine:.9f}") for a in ran.agreements])
        say()
        say("On one random input, beside what the source network computes."
            + (" The tool computes integers, so that outputs agree roughly; measure accuracy on real inputs."
               if door.integers or made.manifest["calibration"]["samples"] else ""))
    elif not ran.placed:
        say("What it made does not run on this machine, so nothing was compared.")


def _list(doors: tuple[Door, ...], json: bool) -> None:
    from npulab.cli.printing import say, table, write_json
    from npulab.doors.catalog import boards_of

    if json:
        write_json({"doors": [{
            "name": d.name, "about": d.about, "takes": list(d.takes), "tool": d.tool, "install": d.install,
            "package": d.package or None, "product": d.product, "chips": list(d.targets), "boards": list(boards_of(d)),
            "integer_only": d.integer, "opset": d.opset or None, "calibration": d.calibration or None,
            "needs_calibration": d.needs, "preprocessing_inside": d.bakes, "runs_here": d.verify, "source": d.source}
            for d in doors]})
        return
    table(["door", "tool", "pip", "boards+"],
          [(d.name, d.tool, d.package or "-", ", ".join(boards_of(d)) or "-") for d in doors])
    say()
    say("pip: the package that has the tool; without one, the folder's README.txt says where it is. --json has more.")
