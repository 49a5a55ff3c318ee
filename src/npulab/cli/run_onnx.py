"""npulab run in ONNX Runtime on this machine: ONNX networks, because npulab compiles none yet, and what is asked to."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from npulab.cli.run import Fit
    from npulab.ir import Graph
    from npulab.program.types import Tensor
    from npulab.runtime.answers import Answer, Labels


def run_onnx(model: Path, given: list[str], output: Path | None, labels: Path | None, top: int, score: float,
             draw: Path | None, fit: Fit, normalize: str | None, json: bool) -> None:
    """The verb, as `npulab run` gives it its options."""
    from npulab import api
    from npulab.cli.printing import progress, say, write_json
    from npulab.cli.run import _check_drawing, _check_output, _draw, _inputs, _print_answer, _write_outputs
    from npulab.errors import UsageError
    from npulab.postprocess import apply
    from npulab.runtime import answers
    from npulab.runtime.objects import answer_with, post_beside

    post = post_beside(model)
    graph = api.convert(model, "onnx", keep_layout=True)
    if output is not None:
        _check_output(output, len(post.outputs if post else graph.outputs))
    if draw is not None:
        _check_drawing(draw)
    found = labels or answers.labels_beside(model)
    names = answers.read_labels(found) if found else None
    arrays, images, notes = _inputs(inputs_of(graph), given, fit, normalize)
    if draw is not None and len(images) != 1:
        raise UsageError("--draw needs one image among the inputs", got=f"{len(images)} images")
    progress(f"running {graph.name} in ONNX Runtime")
    outputs, seconds = run_here(graph, arrays)
    answer = answer_with(post, outputs, names, score) if post else answer_of(graph, outputs, names, top)
    if output is not None:
        _write_outputs(output, apply(post, outputs) if post else outputs)
    if draw is not None:
        _draw(draw, answer, images[0])
    if json:
        write_json(as_data(graph, notes, names, answer, seconds))
        return
    say(f"{graph.name} in ONNX Runtime{', with its post-processing' if post else ''}")
    _print_answer(notes, answer)
    say(f"{1000 * seconds:.1f} ms here: wall time on this machine; it says nothing of a board.")
    for path in (output, draw):
        if path is not None:
            print(f"\nwrote {path}")


def inputs_of(graph: Graph) -> dict[str, Tensor]:
    """The inputs as `npulab.runtime.images` takes them."""
    from npulab.errors import UsageError
    from npulab.program.types import Tensor

    found = {}
    for i in graph.inputs:
        v = graph.values[i]
        if v.dynamic_axes or not v.has_shape:
            raise UsageError(f"the input '{v.name}' of '{graph.name}' has no fixed size", got=str(v),
                             try_="npulab patch --dim NAME=SIZE writes a network of fixed size")
        found[v.name] = Tensor(i, v.name, v.dtype.value, v.shape)
    return found


def run_here(graph: Graph, arrays: dict[str | int, Any]) -> tuple[dict[str, Any], float]:
    """The outputs by name, and the seconds that took.

    Raises: UnsupportedError if ONNX Runtime does not run it; UsageError if that is not installed.
    """
    import time

    from npulab.errors import UnsupportedError, runtime_said
    from npulab.passes.certificate import session

    made = session(graph)
    names = [graph.values[v].name for v in graph.outputs]
    start = time.perf_counter()
    try:
        found = made.run(names, {str(name): array for name, array in arrays.items()})
    except Exception as e:  # the runtime is C++: it raises what it likes
        raise UnsupportedError(f"ONNX Runtime does not run '{graph.name}'", got=runtime_said(e)) from None
    return dict(zip(names, found, strict=True)), time.perf_counter() - start


def answer_of(graph: Graph, outputs: dict[str, Any], labels: Labels | None, top: int) -> Answer:
    """Classes, if the network ends in a softmax over one row or labels are given for one; else what outputs hold."""
    import numpy as np

    from npulab.runtime.answers import Answer, _top
    from npulab.runtime.objects import summaries

    tensors = summaries(outputs)
    row = next(iter(outputs.values()))
    ends = graph.producer.get(graph.outputs[0])
    if len(outputs) == 1 and row.dtype.kind == "f" and 1 < row.size == max(row.shape) \
            and (labels is not None or (ends is not None and ends.op.name == "Softmax")):
        guesses, notes = _top(row.reshape(-1).astype(np.float64), labels, top)
        return Answer(guesses, None, tensors, notes)
    return Answer(None, None, tensors)


def as_data(graph: Graph, notes: list[tuple[str, str]], labels: Labels | None, answer: Answer, seconds: float
            ) -> dict[str, Any]:
    return {
        "target": None, "where": "onnxruntime", "model": graph.name, "digest": graph.digest,
        "inputs": [{"name": n, "done": done} for n, done in notes],
        "outputs": [asdict(t) for t in answer.tensors],
        "classes": None if answer.classes is None else [asdict(g) for g in answer.classes],
        "boxes": None if answer.boxes is None else [asdict(b) for b in answer.boxes],
        "labels": labels.source if labels else None, "notes": list(answer.notes),
        "seconds": seconds, "seconds_are": "wall time of this machine, not of a board",
    }
