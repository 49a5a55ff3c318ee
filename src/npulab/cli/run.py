"""npulab run: from file to answer."""

from __future__ import annotations

import enum
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npulab.cli.compile import said_options
from npulab.cli.options import Json, Plan, PlanOption
from npulab.cli.plan_options import (
    Channels,
    ChannelsOption,
    Features,
    NoImageCache,
    NoKernelCache,
    NoZeroRuns,
    plan_options,
)

if TYPE_CHECKING:
    from npulab.ir import Graph
    from npulab.program.types import Program, Tensor
    from npulab.runtime.answers import Answer, Labels
    from npulab.runtime.compare import Difference
    from npulab.runtime.images import Prepared
    from npulab.runtime.session import StepRecord
    from npulab.targets.target import PlanOptions


class Compare(enum.StrEnum):
    LITERT = "litert"


class Stored(enum.StrEnum):
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Fit(enum.StrEnum):
    SQUASH = "squash"
    CROP = "crop"
    PAD = "pad"


def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL", show_default=False,
                                          help=(
                                              "A .tflite file, a .npu program, or an .onnx file to run here."))],
    inputs: Annotated[list[str] | None, typer.Option(
        "--input", metavar="[NAME=]FILE", show_default=False,
        help="An image or a .npy array; once for each input.")] = None,
    target: Annotated[str | None, typer.Option("--target", metavar="NAME", show_default=False,
                                               help="The chip; a .npu program knows its own.")] = None,
    device: Annotated[str | None, typer.Option(
        "--device", metavar="DEVICE", show_default=False,
        help="opencl:N: npulab's kernels on that OpenCL device, with a profile; onnxruntime: on this machine. Float "
             "networks.")] = None,
    plan: PlanOption = Plan.BEST,
    no_zero_runs: NoZeroRuns = False,
    channels: ChannelsOption = Channels.ANY,
    no_kernel_cache: NoKernelCache = False,
    no_image_cache: NoImageCache = False,
    feature: Features = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", show_default=False,
                                                help="Write the outputs: .npz, or .npy if there is one.")] = None,
    compare: Annotated[Compare | None, typer.Option(
        "--compare", show_default=False, help="Compare each layer and output with LiteRT's reference kernels.")] = None,
    labels: Annotated[Path | None, typer.Option(
        "--labels", metavar="FILE", show_default=False,
        help="Names of classes, one a line. Otherwise MODEL.labels.txt beside the model, if there.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, max=1000, help="How many classes to print.")] = 5,
    score: Annotated[float, typer.Option("--score", help="The lowest score of a box.")] = 0.5,
    draw: Annotated[Path | None, typer.Option("--draw", metavar="OUT.png", show_default=False,
                                              help="Draw the boxes on the image.")] = None,
    fit: Annotated[Fit, typer.Option("--fit", help="How an image of other proportions is fitted.")] = Fit.SQUASH,
    normalize: Annotated[str | None, typer.Option(
        "--normalize", metavar="HOW", show_default=False,
        help="raw, 0..1, -1..1 or MEAN,STD. Otherwise pixels as they are, 0..1 for floating point.")] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, max=1000, metavar="N",
                                        help="On OpenCL devices: runs whose median is the profile.")] = 5,
    probe: Annotated[Path | None, typer.Option(
        "--probe", metavar="FILE", show_default=False,
        help="What npulab probe --json wrote: how far each layer is from the device's roofline.")] = None,
    tuned: Annotated[Path | None, typer.Option(
        "--tuned", metavar="DIR", show_default="~/.cache/npulab/kernels",
        help="On OpenCL devices: the folder of what tuning found; kernels are chosen by it.")] = None,
    tune: Annotated[float, typer.Option("--tune", min=0, max=86400, metavar="SECONDS", show_default=False,
                                        help="Tune kernels into that folder first, for so long at most.")] = 0,
    number: Annotated[Stored | None, typer.Option("--number", show_default="as in the model", help=(
        "On OpenCL devices: what weights, and tensors between inputs and outputs, are stored as."))] = None,
    patience: Annotated[float | None, typer.Option("--patience", min=1, max=86400, metavar="SECONDS", help=(
        "On OpenCL devices: how long one kernel may take."), show_default="60")] = None,
    json: Json = False,
) -> None:
    """Compile, execute on the virtual NPU and the host, answer.

    An ONNX network runs in ONNX Runtime on this machine, or with --device on an OpenCL device. MODEL.post.json, which
    npulab patch writes for a network whose head it cut off, finds the objects.

    Exit code 1: --compare found a layer further than one step from LiteRT's.
    """
    from npulab import api
    from npulab.cli.printing import progress, write_json
    from npulab.errors import UsageError
    from npulab.postprocess import apply
    from npulab.runtime import answers
    from npulab.runtime.compare import compare_outputs
    from npulab.runtime.objects import answer_with, post_beside
    from npulab.runtime.session import tensor_names

    place = _device(device, target, {"--probe": probe, "--tuned": tuned, "--tune": tune, "--patience": patience,
                                    "--number": number})
    if place is not None:
        from npulab.cli.run_opencl import PATIENCE, run_opencl

        if compare or draw is not None:
            raise UsageError(f"{'--compare' if compare else '--draw'} is not for OpenCL devices",
                             try_="npulab run without it")
        run_opencl(model, place, inputs or [], output, labels, top, score, fit, normalize, repeat, probe, tuned, tune,
                   patience or PATIENCE, number.value if number else None, json)
        return
    if (model.suffix == ".onnx" or device) and target is None:
        if compare:
            raise UsageError("--compare is for what is compiled; an ONNX network runs in ONNX Runtime alone",
                             try_="npulab run without --compare")
        from npulab.cli.run_onnx import run_onnx

        run_onnx(model, inputs or [], output, labels, top, score, draw, fit, normalize, json)
        return
    options = plan_options(no_zero_runs, channels, no_kernel_cache, no_image_cache, feature)
    post = post_beside(model)
    program, graph = _program(model, target, plan, options)
    if compare and graph is None:
        raise UsageError("--compare needs the model, which a .npu file does not hold", try_="run the .tflite file")
    if output is not None:
        _check_output(output, len(post.outputs if post else set(program.outputs)))
    if draw is not None:
        _check_drawing(draw)
    found = labels or answers.labels_beside(model)
    names = answers.read_labels(found) if found else None
    tensors = tensor_names(program)
    wanted = {tensors[v]: t for v in program.inputs for t in program.tensors if t.value == v}
    arrays, images, notes = _inputs(wanted, inputs or [], fit, normalize)
    if draw is not None and len(images) != 1:
        raise UsageError("--draw needs one image among the inputs", got=f"{len(images)} images")
    progress(f"running {program.model} on the virtual NPU of {program.target}")
    session = api.open_session(program)
    known: dict[int, Any] = {}
    outputs = session.run(arrays, trace=known.__setitem__)
    real = _real(program, tensors, outputs) if post else {}
    answer = answer_with(post, real, names, score) if post else answers.answer(program, outputs, names, top, score)
    layers: list[Difference] = []
    wholes: list[Difference] = []
    if compare and graph is not None:
        progress("comparing with LiteRT")
        layers = _layers(program, graph, arrays, known)
        wholes = compare_outputs(program, graph, known)
    if output is not None:
        _write_outputs(output, apply(post, real) if post else outputs)
    if draw is not None:
        _draw(draw, answer, images[0])
    close = all(d.is_close for d in layers)
    if json:
        write_json(_as_data(program, notes, names, answer, session.records)
                   | ({"compare": _comparison(layers, wholes, close)} if compare else {}))
    else:
        _print(program, notes, answer, session.records)
        if compare:
            _print_comparison(layers, wholes, close)
        for path in (output, draw):
            if path is not None:
                print(f"\nwrote {path}")
    if not close:
        raise typer.Exit(1)


def _device(text: str | None, target: str | None, own: dict[str, object]) -> int | None:
    """The number of an OpenCL device; None for ONNX Runtime, and for what the network is compiled for.

    `own`: options that only OpenCL devices take.

    Raises: UsageError for another device, beside --target, and for options of `own` without one.
    """
    from npulab.errors import UsageError

    number = text.partition(":")[2] if text and text.startswith("opencl:") else ""
    if text is not None and target is not None:
        raise UsageError("--device runs the network here, --target compiles it for a chip", want="one of them")
    if text is None or text == "onnxruntime":
        if given := [name for name, value in own.items() if value]:
            raise UsageError(f"{given[0]} is for OpenCL devices", try_="--device opencl:0")
        return None
    if not (number.isdecimal() and number.isascii()) or len(number) > 4:
        raise UsageError(f"there is no device '{text[:60]}'", want="; ".join(_devices()))
    return int(number)


def _devices() -> list[str]:
    """What --device takes here."""
    from npulab.errors import UsageError
    from npulab.gpu import opencl

    try:
        found = [f"opencl:{i} ({d.name})" for i, d in enumerate(opencl.devices())]
    except UsageError:  # no pyopencl
        found = []
    return ["onnxruntime", *(found or ["opencl:N with a driver and pip install 'npulab[gpu]'"])]


def _program(path: Path, target: str | None, plan: Plan, options: PlanOptions) -> tuple[Program, Graph | None]:
    """What to run, and the model it came from if that is at hand."""
    from npulab import api
    from npulab.cli.printing import progress
    from npulab.errors import UsageError
    from npulab.program.container import is_program
    from npulab.targets.target import PlanOptions, all_targets

    if is_program(path):
        program = api.read_program(path)
        if target is not None and target != program.target:
            raise UsageError(f"{path} is for another target", want=program.target, got=target)
        if options != PlanOptions():
            raise UsageError(f"{path} is compiled already; options of the plan come too late",
                             try_="run the .tflite file with them")
        return program, None
    if target is None:
        raise UsageError("a model needs a target", want=", ".join(sorted(all_targets())),
                         try_=f"--target {min(all_targets())}")
    graph = api.convert(path, "tflite")
    progress(f"compiling {graph.name} for {target}")
    return api.compile(graph, target, plan.plan_name, options=options), graph


def _real(program: Program, names: dict[int, str], outputs: dict[str, Any]) -> dict[str, Any]:
    """A body's outputs as real numbers, where they are quantized."""
    import numpy as np

    from npulab.runtime.answers import real

    known = {names[t.value]: t for t in program.tensors}
    return {name: real(known[name], x).astype(np.float32) if known[name].scale else x for name, x in outputs.items()}


def _inputs(wanted: dict[str, Tensor], given: list[str], fit: Fit, normalize: str | None
            ) -> tuple[dict[str | int, Any], list[Prepared], list[tuple[str, str]]]:
    """Arrays by input name, the images among them, and (name, what was done) for each."""
    from npulab.errors import UsageError
    from npulab.runtime.images import prepare
    from npulab.runtime.session import describe

    if len(given) != len(wanted):
        raise UsageError(
            f"the model takes {len(wanted)} input{'s' if len(wanted) > 1 else ''}",
            want="; ".join(f"{n}: {describe(t)}" for n, t in wanted.items()), got=f"{len(given)} times --input",
            try_=" ".join(f"--input {n}=FILE" for n in wanted) if len(wanted) > 1 else "--input cat.jpg")
    arrays: dict[str | int, Any] = {}
    images: list[Prepared] = []
    notes: list[tuple[str, str]] = []
    for i, text in enumerate(given):
        name, file = _split(text, wanted, i)
        if name in arrays:
            raise UsageError(f"input '{name}' is given twice", try_="--input NAME=FILE for each")
        if (array := _npy(file, wanted[name])) is not None:
            arrays[name], done = array
        else:
            prepared = prepare(file, wanted[name], fit.value, normalize)
            images.append(prepared)
            arrays[name], done = prepared.array, "; ".join(prepared.notes)
        notes.append((name, done))
    return arrays, images, notes


def _split(text: str, wanted: dict[str, Tensor], position: int) -> tuple[str, str]:
    """NAME=FILE, or FILE for the input at this position. A name may hold '=' itself."""
    for name in wanted:
        if text.startswith(f"{name}="):
            return name, text[len(name) + 1 :]
    return list(wanted)[position], text


def _npy(file: str, tensor: Tensor) -> tuple[Any, str] | None:
    """The array of a .npy file and what it is; None if the file is not one."""
    import numpy as np

    from npulab.errors import ModelError, UsageError
    from npulab.runtime.session import describe

    try:
        with open(file, "rb") as f:
            if f.read(6) != b"\x93NUMPY":
                return None
        array = np.load(file, mmap_mode="r", allow_pickle=False)  # mapped: a header cannot ask for memory
    except OSError as e:
        raise UsageError(f"cannot read {file}", got=e.strerror or e) from e
    except Exception as e:  # NumPy's header is a Python literal; a damaged one ends in many ways
        raise ModelError(f"{file} is not an array that NumPy reads", got=str(e)[:200]) from e
    done = f"{Path(file).name}: {array.dtype}{list(array.shape)}"
    if array.dtype.name == tensor.dtype and tensor.shape[:1] == (1,) and array.shape == tensor.shape[1:]:
        return np.array(array)[None], f"{done}, as a batch of one"
    if array.dtype.name != tensor.dtype or array.shape != tensor.shape:
        raise UsageError(f"{file} does not fit the input '{tensor.name}'", want=describe(tensor),
                         got=f"{array.dtype}{list(array.shape)}")
    return np.array(array), done


def _check_output(path: Path, count: int) -> None:
    from npulab.errors import UsageError

    if path.suffix not in (".npy", ".npz"):
        raise UsageError(f"cannot tell how to write {path}", want="a name that ends in .npz or .npy")
    if path.suffix == ".npy" and count != 1:
        raise UsageError(f"{path} cannot hold {count} outputs", try_=str(path.with_suffix(".npz")))


def _write_outputs(path: Path, outputs: dict[str, Any]) -> None:
    """.npy: the one output. .npz: each by its name in the model; the same outputs give the same bytes."""
    import zipfile

    import numpy as np

    from npulab.program.files import write_atomically

    def write(file: Any) -> None:
        if path.suffix == ".npy":
            np.lib.format.write_array(file, next(iter(outputs.values())), allow_pickle=False)
            return
        with zipfile.ZipFile(file, "w") as z:
            for name, array in outputs.items():
                with z.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)

    write_atomically(path, write)


def _check_drawing(path: Path) -> None:
    from PIL import Image

    from npulab.errors import UsageError

    if Image.registered_extensions().get(path.suffix.lower()) not in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        raise UsageError(f"cannot tell how to draw {path}", want="a name that ends in .png, .jpg, .webp, .bmp or .tiff")


def _draw(path: Path, answer: Answer, image: Prepared) -> None:
    from PIL import Image

    from npulab.errors import UsageError
    from npulab.program.files import write_atomically
    from npulab.runtime.answers import draw

    if answer.boxes is None:
        raise UsageError("--draw is for detectors; this model's outputs are no boxes")
    picture = draw(image.image, answer.boxes, image.covered)
    write_atomically(path, lambda f: picture.save(f, Image.registered_extensions()[path.suffix.lower()]))


def _layers(program: Program, graph: Graph, arrays: dict[str | int, Any], known: dict[int, Any]) -> list[Difference]:
    """Layer by layer from a program that brings back every tensor, where the plan has one; else by region."""
    from npulab import api
    from npulab.runtime.compare import compare_layers

    if program.plan != "best":
        return compare_layers(program, graph, known)
    inside = api.compile(graph, program.target, "best", keep_all=True)
    seen: dict[int, Any] = {}
    api.open_session(inside).run(arrays, trace=seen.__setitem__)
    return compare_layers(inside, graph, seen)


def _as_data(program: Program, notes: list[tuple[str, str]], labels: Labels | None, answer: Answer,
             records: list[StepRecord]) -> dict[str, Any]:
    return {
        "target": program.target, "plan": program.plan, "options": program.options,
        "model": program.model, "digest": program.digest,
        "inputs": [{"name": n, "done": done} for n, done in notes],
        "outputs": [asdict(t) for t in answer.tensors],
        "classes": None if answer.classes is None else [asdict(g) for g in answer.classes],
        "boxes": None if answer.boxes is None else [asdict(b) for b in answer.boxes],
        "labels": labels.source if labels else None, "notes": list(answer.notes),
        "steps": [asdict(r) for r in records], "seconds_are": "wall time of this machine, not of a board",
    }


def _print(program: Program, notes: list[tuple[str, str]], answer: Answer, records: list[StepRecord]) -> None:
    from npulab.cli.printing import amount, listed, say, table

    say(f"{program.model} for {program.target}, plan {program.plan}{said_options(program)}")
    _print_answer(notes, answer)
    table([">step", "where", "operators+", ">jobs", ">MACs", ">up B", ">down B", ">ms here"], [
        (r.index, r.where, listed(r.ops), *(
            (r.jobs, amount(r.macs), r.upload_bytes, r.download_bytes) if r.where == "npu" else ("", "", "", "")),
         f"{1000 * r.seconds:.1f}") for r in records])
    say()
    say("ms here: wall time on this machine, whose virtual NPU executes the commands; it says nothing of a board.")


def _print_answer(notes: list[tuple[str, str]], answer: Answer) -> None:
    from npulab.cli.printing import say, table

    for name, done in notes:
        say(f"{name}  {done}")
    say()
    if answer.classes is not None:
        table([">class", "label+", ">score"], [(g.index, g.label, f"{g.score:.4f}") for g in answer.classes])
    elif answer.boxes is not None:
        if answer.boxes:
            table([">class", "label+", ">score", ">left", ">top", ">right", ">bottom"],
                  [(b.index, b.label, f"{b.score:.4f}", *(f"{x:.3f}" for x in (b.left, b.top, b.right, b.bottom)))
                   for b in answer.boxes])
        else:
            say("No object reaches the score that --score asks for.")
    else:
        table(["output+", "type", "shape", ">least", ">greatest"], [
            (t.name, t.dtype, "x".join(map(str, t.shape)), *("" if x is None else f"{x:.5g}" for x in (t.low, t.high)))
            for t in answer.tensors])
    for note in answer.notes:
        say(note)
    say()


def _comparison(layers: list[Difference], outputs: list[Difference], close: bool) -> dict[str, Any]:
    from npulab.runtime.compare import LAYER_LIMIT

    return {"with": "litert", "layer_limit": LAYER_LIMIT, "close": close,
            "layers": [asdict(d) for d in layers], "outputs": [asdict(d) for d in outputs]}


def _print_comparison(layers: list[Difference], outputs: list[Difference], close: bool) -> None:
    from npulab.cli.printing import listed, ranges, say, table
    from npulab.runtime.compare import LAYER_LIMIT

    def rows(found: list[Difference], first: bool) -> list[tuple[object, ...]]:
        return [((ranges(d.nodes), listed(d.ops)) if first else (d.name,))
                + (d.elements, d.mismatched, d.note if d.max_abs is None else f"{d.max_abs:g}") for d in found]

    if layers:
        say()
        say("Against LiteRT's reference kernels on the same input; the largest difference in steps of the tensor's "
            "quantization. Layers that come back together differ by what they add up to:")
        table([">node", "operators+", ">elements", ">differ", ">largest"], rows(layers, True))
    say()
    say("Whole model on the same input; floating-point outputs in their own unit:")
    table(["output+", ">elements", ">differ", ">largest"], rows(outputs, False))
    say()
    alone = sum(d.is_layer for d in layers)
    if not close:
        say(f"A layer is more than {LAYER_LIMIT} step from LiteRT's.")
    elif alone:
        say(f"Layers that can be looked at alone: {alone}, all within {LAYER_LIMIT} step.")
    else:
        say("No layer can be looked at alone, so no limit was checked.")
