"""npulab evaluate: how well a network does on labelled data."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npulab.cli.options import DimOption, Json, parse_dims

if TYPE_CHECKING:
    from npulab.evaluation import Evaluation

EVERY_SECONDS = 5.0
"""Between two lines of progress."""


class Fit(enum.StrEnum):
    SQUASH = "squash"
    CROP = "crop"
    PAD = "pad"
    CENTRE = "centre"
    LETTERBOX = "letterbox"


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", show_default=False, help="A .tflite or .onnx file.")],
    data: Annotated[Path, typer.Option("--data", metavar="PATH", show_default=False,
                                       help="A folder or .zip of images, a .npz or .npy file.")],
    labels: Annotated[Path | None, typer.Option(
        "--labels", metavar="FILE", show_default=False,
        help="FILE<TAB>CLASS lines, or COCO's instances.json. Otherwise those in the data: a file of that kind, a "
             "folder a class, or the array 'labels'.")] = None,
    device: Annotated[str | None, typer.Option(
        "--device", metavar="NAME", show_default=False,
        help="litert, litert-fast, onnxruntime, onnxruntime-fast, or a target. Otherwise by the file.")] = None,
    normalize: Annotated[str | None, typer.Option(
        "--normalize", metavar="HOW", show_default=False,
        help="raw, 0..1, -1..1, tf, imagenet or MEAN,STD. Otherwise pixels as they are, 0..1 for floating point."),
    ] = None,
    fit: Annotated[Fit | None, typer.Option(
        "--fit", show_default=False,
        help="How an image becomes the input's size. Otherwise letterbox for YOLO, squash for others.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", show_default=False,
                                              help="At most so many samples, evenly spread.")] = None,
    classes: Annotated[Path | None, typer.Option(
        "--classes", metavar="FILE", show_default=False,
        help="Names of the network's classes, one a line, where labels are names.")] = None,
    offset: Annotated[int | None, typer.Option(
        "--offset", metavar="N", show_default=False,
        help="What the network's class is above the label's; 1 with a background class. Otherwise found.")] = None,
    post: Annotated[Path | None, typer.Option(
        "--post", metavar="FILE", show_default=False,
        help="What follows a detector without its head. Otherwise MODEL.post.json, if there.")] = None,
    dim: DimOption = None,
    json: Json = False,
) -> None:
    """Measure top-1 of a classifier, or COCO's AP of a detector, float or quantized.

    litert and onnxruntime compute as the file says, operator by operator; -fast is the runtime as it usually runs. A
    target runs on its virtual NPU.
    """
    import time

    from npulab import api
    from npulab.cli.printing import progress, write_json
    from npulab.evaluation import evaluate as measure

    graph = api.load(model, parse_dims(dim))
    last = time.monotonic()

    def told(done: int, of: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY_SECONDS:
            last = time.monotonic()
            progress(f"{done} of {of} samples")

    progress(f"evaluating {graph.name}")
    made = measure(graph, data, labels, device, normalize, fit.value if fit else None, limit, classes, offset, post,
                   told, model)
    if json:
        write_json(made.as_data())
    else:
        _print(made)


def _print(made: Evaluation) -> None:
    from npulab.cli.printing import say, table

    rows = [(made.metric, f"{made.value:.4f}", _interval(made.interval))]
    if made.top5 is not None:
        rows.append(("top-5", f"{made.top5:.4f}", ""))
    if made.ap50 is not None:
        rows.append(("AP50", f"{made.ap50:.4f}", ""))
    say(f"{made.model} on {made.samples} samples, {made.data}; {made.device}")
    say(f"each {made.how}")
    for note in made.notes:
        say(note)
    say()
    table(["metric", ">value", "95 % interval"] if made.interval else ["metric", ">value"],
          [r if made.interval else r[:2] for r in rows])


def _interval(ends: tuple[float, float] | None) -> str:
    return f"{ends[0]:.4f}..{ends[1]:.4f}" if ends else ""
