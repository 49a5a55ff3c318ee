"""npulab quantize: a float network made into integers for a target."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from npulab.cli.options import DimOption, Json, parse_dims

if TYPE_CHECKING:
    from npulab.quantizing import Quantized
    from npulab.runtime.images import Fit

WORST = 8
"""Tensors that the terminal lists."""
SAID = 3
"""Lines of a step that it prints."""
FIRST = 5
"""Layers and tensors whose share of the noise it prints."""
NAME = 40
"""Characters of their names."""


class Ends(enum.StrEnum):
    INTEGER = "integer"
    FLOAT = "float"


def quantize(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL", show_default=False, help=(
        "A float .tflite or .onnx file, or one that was trained with quantization."))] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT", show_default=False, help=(
        "The integer network: its name ends as the target's tools want it, .tflite or .onnx."))] = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="FOLDER|ZIP|NPZ", show_default=False, help=(
        "Samples to calibrate with: images, or arrays by input name. Without: made up, and less accurate."))] = None,
    target: Annotated[str, typer.Option("--target", metavar="NAME", help=(
        "A chip or board, generic-int8 (TFLite) or generic-onnx."))] = "generic-int8",
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="NAME", show_default=False, help=(
        "A recipe, or methods: mse+weights-mse+adaround. Otherwise auto, a search."))] = None,
    list_: Annotated[bool, typer.Option("--list", help="List recipes and methods and stop.")] = False,
    time: Annotated[str | None, typer.Option("--time", metavar="60s", show_default=False, help=(
        "Try methods, the quick ones first, and stop after this time with the best network so far."))] = None,
    weights: Annotated[int | None, typer.Option("--weights", metavar="8|4|2", show_default=False,
                                                help="Bits of weights.")] = None,
    activations: Annotated[int | None, typer.Option("--activations", metavar="8|16", show_default=False,
                                                    help="Bits of activations.")] = None,
    per_channel: Annotated[bool | None, typer.Option("--per-channel/--per-tensor", show_default=False, help=(
        "Scales of weights; otherwise as the target has it."))] = None,
    keep: Annotated[list[str] | None, typer.Option("--float", metavar="LAYER", show_default=False, help=(
        "A layer, by name, number or pattern, that stays in floats; once for each."))] = None,
    wide: Annotated[list[str] | None, typer.Option("--wide", metavar="LAYER", show_default=False, help=(
        "A layer whose tensors get 16 bits; once for each."))] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="60%|300k", show_default=False, help=(
        "Choose each layer's bits so that the weights take no more than this."))] = None,
    latency: Annotated[str | None, typer.Option("--latency", metavar="3ms", show_default=False, help=(
        "Choose them so that an inference takes no longer, by the chip's timing model."))] = None,
    decibels: Annotated[float | None, typer.Option("--min-decibels", metavar="DB", show_default=False, help=(
        "Choose them so that the outputs have this signal-to-noise ratio."))] = None,
    agreement: Annotated[float | None, typer.Option("--min-agreement", metavar="SHARE", show_default=False, help=(
        "Choose them so that this share of the samples (0..1) gets the float network's answer."))] = None,
    labels: Annotated[Path | None, typer.Option("--labels", metavar="FILE", show_default=False, help=(
        "Labels of the data (as npulab evaluate has them): measure the accuracy before and after, too."))] = None,
    normalize: Annotated[str | None, typer.Option("--normalize", metavar="HOW", show_default=False, help=(
        "How pixels become inputs: raw, 0..1, -1..1, imagenet, or mean,std."))] = None,
    fit: Annotated[str, typer.Option("--fit", metavar="HOW", help=(
        "How images become the input's size: squash, crop, pad, centre or letterbox."))] = "squash",
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", show_default=False,
                                              help="At most so many samples, evenly spread.")] = None,
    ends: Annotated[Ends | None, typer.Option("--ends", show_default=False, help=(
        "Inputs and outputs; integer in .tflite files and float in .onnx files unless told."))] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of what is drawn.", min=0)] = 0,
    dim: DimOption = None,
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE", show_default=False, help=(
        "Write what was done and measured: a page for .html, data for .json."))] = None,
    json: Json = False,
) -> None:
    """Make a float network into an integer one that a target takes, and say what each step brought.

    The network is compared with the float one tensor by tensor, and the file is checked against the target's rules. A
    run that was stopped goes on where it was, with the same command.
    """
    from npulab import api
    from npulab.cli.printing import progress, write_json
    from npulab.errors import UsageError
    from npulab.program.files import write_atomically
    from npulab.quantization.job import Options

    if list_:
        _list(json)
        return
    if model is None or output is None:
        raise UsageError("npulab quantize needs a model and -o OUT", try_="npulab quantize --help")
    if time is not None and recipe not in (None, "auto"):
        raise UsageError("--time is of the search, not of a recipe", try_="one of --time and --recipe")
    options = Options(recipe or "auto", weights, activations, per_channel, tuple(keep or ()), tuple(wide or ()),
                      None if ends is None else ends is Ends.INTEGER, seed, None if time is None else seconds_of(time),
                      size, latency, decibels, agreement)
    resume = output.with_name(output.name + ".resume")
    _check_places({"-o": output, "--report": report}, {"MODEL": model, "--data": data, "--labels": labels})
    if labels is not None or normalize is not None or limit is not None:
        _check_data(data, labels, normalize)
    graph = api.load(model, parse_dims(dim))
    rules = api.quantization_rules(target)
    if output.suffix.lower() != f".{rules.file}":
        raise UsageError(f"{rules.title} takes .{rules.file} files", got=str(output),
                         try_=f"-o {output.with_suffix('.' + rules.file).name}")
    line = _Line(progress)
    made = api.quantize(graph, data, target, options, normalize=normalize, fit=cast("Fit", fit), limit=limit,
                        tell=line, resume=resume)
    write_atomically(output, made.data)
    if resume.is_file():
        resume.unlink()
    found = api.quantization_report(graph, made, report is not None, line) | {"output": str(output)}
    if labels is not None and data is not None:
        from npulab.explaining import judged

        progress("measuring accuracy")
        beside = None if labels == data else labels  # a .npz file has its own
        found["accuracy"] = judged(graph, made, data, beside, normalize, cast("Fit", fit))
    if report is not None:
        write_atomically(report, _report(report, found))
    if json:
        write_json(found)
    else:
        _print(made, found)


def _check_places(written: dict[str, Path | None], read: dict[str, Path | None]) -> None:
    """What is written can be, and is none of what is read; by option. Raises: UsageError."""
    import os

    from npulab.errors import UsageError
    from npulab.program.files import check_place

    taken = {os.path.realpath(path): option for option, path in read.items() if path is not None}
    for option, path in written.items():
        if path is None:
            continue
        if (at := os.path.realpath(path)) in taken:
            raise UsageError(f"{option} and {taken[at]} name the same file", got=str(path), try_="another name")
        taken[at] = option
        check_place(path)


def _check_data(data: Path | None, labels: Path | None, normalize: str | None) -> None:
    """Raises: UsageError for what is said of data that are not there, and as evaluating for labels that are none."""
    from npulab.errors import UsageError
    from npulab.evaluation.measure import check_labels

    if data is None:
        option = "--labels" if labels is not None else "--normalize" if normalize is not None else "--limit"
        raise UsageError(f"{option} is of the data, and there are none", try_="--data FOLDER")
    if labels is not None and labels != data:
        check_labels(labels)


def _list(json: bool) -> None:
    """Recipes and the methods that they are sums of."""
    from npulab.cli.printing import say, table, write_json
    from npulab.quantization.ranges import METHODS
    from npulab.quantization.recipes import RECIPES, STEPS

    ranges = {**{name: "ranges of activations" for name in METHODS}, "weights-mse": "ranges of weights, clipped"}
    steps = {s.name: {"title": s.title, "when": f"{s.stage} ranges", "paper": s.paper} for s in STEPS.values()}
    if json:
        write_json({"recipes": {r.name: r.text for r in RECIPES.values()}, "ranges": ranges, "steps": steps})
        return
    table(["recipe", "methods+"], [(r.name, "a search over all of these" if r.name == "auto" else r.text)
                                   for r in RECIPES.values()])
    say()
    table(["method", "when", "what+", "source+"],
          [*((name, "ranges", what, "") for name, what in ranges.items()),
           *((name, d["when"], d["title"], d["paper"]) for name, d in steps.items())])


def seconds_of(text: str) -> float:
    """60, "60s", "5min" and "1h" in seconds. Raises: UsageError for anything else."""
    import re

    from npulab.errors import UsageError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|)", text.strip())
    if not found or not 0 < float(found[1]) < 1e6:
        raise UsageError(f"--time {text} is no time", want="such as 60s, 5min or 1h")
    return float(found[1]) * {"s": 1, "": 1, "min": 60, "h": 3600}[found[2]]


class _Line:
    """Progress at most twice a second."""

    def __init__(self, say: Any) -> None:
        self.say = say
        self.last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        import time

        now = time.monotonic()
        if done == total or now - self.last > 0.5:
            self.last = now
            self.say(f"{what}: {done} of {total}")


def _report(path: Path, found: dict[str, Any]) -> bytes:
    import json

    if path.suffix.lower() in (".html", ".htm"):
        from npulab.report.quantization import page

        return str(page(found)).encode()
    from npulab.cli.printing import finite

    return (json.dumps(finite(found), indent=1) + "\n").encode()


def _print_shares(found: dict[str, Any]) -> None:
    """What most of the noise comes from, and what answers to expect."""
    from npulab.cli.printing import say, table

    rows = sorted(found["sensitivity"], key=lambda r: -float(r["share"]))[:FIRST]
    table(["most of the noise+", " ", ">bits", ">alone", ">share"],
          [(_short(r["name"]), r["kind"], r["bits"], f"{r['decibels']:.1f} dB", f"{r['share']:.0%}") for r in rows])
    say()
    if found["agreement"]:
        a = found["agreement"]
        say(f"The float network's answer for {a['measured']:.1%} of {a['samples']} samples; {a['expected']:.1%} "
            "expected from the noise.")


def _short(name: str) -> str:
    """TensorFlow's names of tensors may be as long as a page; their ends tell them apart."""
    return name if len(name) <= NAME else f"...{name[3 - NAME:]}"


def _print(made: Quantized, found: dict[str, Any]) -> None:
    from npulab.cli.printing import say, table

    say(f"{found['model']} for {found['title']}, {found['samples']} samples of {found['origin']}")
    say()
    rows = []
    last = None
    for s in found["stages"]:
        gain = "" if s["decibels"] is None or last is None or not s["kept"] else f"{s['decibels'] - last:+.1f}"
        rows.append((s["title"], f"{s['seconds']:.1f} s",
                     "" if s["decibels"] is None else f"{s['decibels']:.1f} dB", gain,
                     "\n".join(s["notes"][:SAID]) + (f"\n{len(s['notes']) - SAID} more" if s["notes"][SAID:] else "")))
        last = s["decibels"] if s["decibels"] is not None and s["kept"] else last
    table(["step", ">time", ">outputs", ">gain", "what it did+"], rows)
    say()
    tensors = sorted(found["tensors"], key=lambda t: float(t["decibels"]))
    table(["noisiest tensors+", "stored", ">range", ">signal/noise"],
          [(_short(t["made_by"] or t["name"]), t["stored"],
            f"{t['low']:.3g}..{t['high']:.3g}" if t["low"] is not None else "", f"{t['decibels']:.1f} dB")
           for t in tensors[:WORST]])
    say()
    for name, n in (found["exact"] or {"outputs": {}})["outputs"].items():
        say(f"Output {name}: {n['decibels']:.1f} dB, cosine {n['cosine']:.5f}, in the exact integer arithmetic of the "
            "target.")
    if found["exact"] is None:
        say(f"How {found['title']} rounds is not published: only the comparison in floats is there.")
    for a in found.get("accuracy", ()):
        say(f"{a['what']}: {a['metric']} {a['value']:.4f} on {a['samples']} samples")
    if found.get("sensitivity"):
        _print_shares(found)
    if found["searched"]:
        say(f"To have the same again without the search: --recipe {found['recipe']}")
    for note in found["notes"]:
        say(f"Note: {note}.")
    say(f"Wrote {found['output']} ({found['bytes']} bytes, {found['bytes'] / found['float_bytes']:.0%} of the float "
        f"network); {found['integer_layers']} of {found['layers']} layers in integers.")
