"""The pipeline on one page. Each verb takes one noun to the next; nothing else chains them.

    load         model file              -> Graph
    convert      Graph                   -> the same network in the other dialect
    check        Graph                   -> one Verdict a node
    patch        Graph, board            -> Patched: the network rewritten, and how to compare both
    quantize     float Graph, samples   -> Quantized: the network in integers for a target
    compile      Graph (or model file)   -> Program
    profile      Program (or model)      -> Profile: where the time goes
    roofline     Graph, device           -> Roofline: how fast each layer can be at most, and what decides it
    open_session Program, Device         -> Session; its `run` gives the outputs
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any, Literal

    from npulab.gpu.ceilings import Ceilings, Numbers
    from npulab.ir import Graph
    from npulab.patching import Patched
    from npulab.plan.types import Verdict
    from npulab.profiling.types import Profile
    from npulab.program.types import Program
    from npulab.quantization.job import Options as QuantizeOptions
    from npulab.quantization.job import Tell
    from npulab.quantization.types import Rules, Samples
    from npulab.quantizing import Quantized
    from npulab.rooflines import Roofline
    from npulab.runtime.device import Device
    from npulab.runtime.images import Fit
    from npulab.runtime.session import Session
    from npulab.targets.target import PlanName, PlanOptions, Settings, Target

    Dialect = Literal["tflite", "onnx"]


def load(path: str | os.PathLike[str] | bytes, dims: Mapping[str, int] | None = None) -> Graph:
    """The Graph of a TFLite or ONNX file. Raises ModelError if it is neither, or is damaged.

    `dims` gives sizes to dynamic dimensions of an ONNX model: {"height": 320}, or {"images.2": 320} for an axis.
    """
    from npulab.importers import load

    return load(path, dims)


def convert(model: Graph | str | os.PathLike[str], dialect: Dialect, keep_layout: bool = False) -> Graph:
    """The network in the dialect "tflite" or "onnx"; one that is in it stays as it is. TFLite nodes keep the names of
    the ONNX nodes that they were made from. Pictures come and go channels last in TFLite and first in ONNX, unless
    `keep_layout`.

    Raises: UnsupportedError naming every operator that the dialect has no words for; UsageError for another dialect.
    """
    from npulab.dialects import to_onnx, to_tflite
    from npulab.errors import UsageError

    if dialect not in ("tflite", "onnx"):
        raise UsageError(f"there is no dialect '{dialect}'", want="tflite or onnx")
    graph = load(model) if isinstance(model, str | os.PathLike) else model
    return to_tflite(graph, keep_layout) if dialect == "tflite" else to_onnx(graph, keep_layout)


def check(model: Graph | str | os.PathLike[str], target: str = "a311d", plan: PlanName = "best",
          options: PlanOptions | None = None, assume: str = "") -> Sequence[Verdict]:
    """Where each node runs, and every reason why the NPU does not take it.

    `target` is a chip that npulab compiles for, or a board that is described ("rk3588"): then the verdicts are what its
    published rules say (`targets.facts.board.Finding`), and `assume` is the type that floats will have been given
    ("int8"). For a chip, the nodes of an ONNX model are those of `convert(model, "tflite")`.

    Raises: UsageError for an unknown target or type.
    """
    from npulab.targets.target import PlanOptions, all_targets, find_target

    if target not in all_targets():
        from npulab.targets.facts.board import find_board

        graph = load(model) if isinstance(model, str | os.PathLike) else model
        return find_board(target).check(graph, assume).findings
    return find_target(target).check(_graph(model), plan, options or PlanOptions())


def patch(model: Graph | str | os.PathLike[str], target: str | None = None, passes: Sequence[str] = (),
          assume: str | None = None) -> Patched:
    """The network made simpler, changed by `passes`, and by the exact ones that a described board needs; `compare` of
    the result runs both. See `patching.patch`.

    Raises: UsageError for an unknown pass, board or type; UnsupportedError where a pass that is asked for cannot work.
    """
    from npulab.patching import patch

    return patch(load(model) if isinstance(model, str | os.PathLike) else model, target, passes, assume)


def quantization_rules(target: str) -> Rules:
    """What a target takes of a network of integers: "generic-int8", "a311d", "rk3588". Raises: UsageError."""
    from npulab.targets.facts.quantization import rules_of

    return rules_of(target)


def quantize(model: Graph | str | os.PathLike[str], data: Samples | str | os.PathLike[str] | None,
             target: str = "generic-int8", options: QuantizeOptions | None = None, normalize: str | None = None,
             fit: Fit = "squash", limit: int | None = None, tell: Tell | None = None,
             resume: Path | None = None) -> Quantized:
    """The float network in integers, as `target` takes it, calibrated with the samples of `data`: a folder or .zip of
    images, a .npz file, or Samples. The file that comes out has been checked against the target's rules.

    Raises: UsageError for data or options that do not fit; UnsupportedError for what cannot be quantized.
    """
    from npulab.quantization.job import Options
    from npulab.quantizing import checked, quantize
    from npulab.runtime.datasets import input_tensors, open_samples

    graph = load(model) if isinstance(model, str | os.PathLike) else model
    samples = (open_samples(data, input_tensors(graph), normalize, fit, limit)
               if isinstance(data, str | os.PathLike) else data)
    made = quantize(graph, samples, quantization_rules(target), options or Options(), tell, resume)
    checked(made)
    return made


def quantization_report(graph: Graph, made: Quantized, explain: bool = False, tell: Tell | None = None
                        ) -> dict[str, Any]:
    """What was done and measured, as plain data. `explain`: with each layer's share of the noise, measured anew."""
    from npulab.explaining import explained
    from npulab.quantizing import report

    progress = (lambda done, total: tell("sensitivities", done, total)) if tell else None
    return report(graph, made) | (explained(made, progress) if explain else {})


def compile(model: Graph | str | os.PathLike[str], target: str = "a311d", plan: PlanName = "best",
            keep_all: bool = False, options: PlanOptions | None = None) -> Program:
    """The Program for `target`. `keep_all` (plan best) brings back every tensor the NPU computes.

    An ONNX model is converted to TFLite first.

    Raises: UsageError for an unknown target; UnsupportedError or CapacityError if the model does not fit it.
    """
    from npulab.targets.target import find_target

    return _compile(_graph(model), find_target(target), plan, keep_all, options)


def _compile(graph: Graph, chip: Target, plan: PlanName, keep_all: bool = False,
             options: PlanOptions | None = None) -> Program:
    from npulab.errors import InvariantError, ModelError
    from npulab.program.law import verify
    from npulab.targets.target import PlanOptions

    program = chip.compile(graph, plan, keep_all, options or PlanOptions())
    try:
        verify(program)
    except ModelError as e:
        raise InvariantError(f"the compiler made a program that breaks its own law: {e.message}", **e.facts) from e
    if any(n.name for n in graph.nodes):
        import msgspec

        program = msgspec.structs.replace(program, origins=tuple(n.name for n in graph.nodes))
    return program


def profile(model: Program | Graph | str | os.PathLike[str], target: str = "a311d", plan: PlanName = "best",
            options: PlanOptions | None = None, what_if: Settings | None = None, measure_host: bool = False) -> Profile:
    """Where the time of one inference goes, by the target's timing model.

    `measure_host` runs the host's operators here, instead of modelling the CPU of a board.

    `what_if` replaces numbers of the chip: "dram_bandwidth" (B/s), "clock" (Hz), "sram" (B), "nn_cores". For a Program
    only the first two; its commands were made for the others.

    Raises: UsageError for settings no chip can have; otherwise like `compile`.
    """
    from npulab.errors import UsageError
    from npulab.profiling.join import join
    from npulab.program.types import Program
    from npulab.targets.target import find_target

    settings = dict(what_if or {})
    if isinstance(model, Program):
        fixed = [name for name in settings if name in ("sram", "nn_cores")]
        if fixed:
            raise UsageError(f"a compiled program cannot have another {fixed[0]}", try_="give the model it was made of")
        if options is not None and options.as_text() != model.options:
            raise UsageError("a compiled program keeps the options it was made with",
                             got=", ".join(model.options) or "none", try_="give the model it was made of")
        program, chip = model, find_target(model.target).with_settings(settings)
    else:
        chip = find_target(target).with_settings(settings)
        program = _compile(_graph(model), chip, plan, options=options)
    timing = chip.timing(program)
    if measure_host:
        from npulab.profiling.measure import with_measured_host

        timing = with_measured_host(program, timing)
    return join(program, chip.title, timing, settings)


def probe(device: int | str = 0, quick: bool = False, trust_source: bool = False) -> dict[str, Any]:
    """What GPU `device` of `npulab probe --list` is made of: plain data, as `npulab probe --json` writes it. Minutes.

    `trust_source`: work that cannot be counted in compiled code is taken as the source states it, else refused.

    Raises: DeviceError without that device, or if it fails before anything is measured; UsageError without pyopencl.
    """
    from npulab.probing import probe

    return probe(device, quick, trust_source=trust_source)


def roofline(model: Graph | str | os.PathLike[str], device: Ceilings | str | os.PathLike[str],
             numbers: Numbers | None = None, everything: bool = False) -> Roofline:
    """The network's layers under a device's ceilings: operations, least bytes, floor times, what bounds them.

    `device`: a file of `npulab probe --json`, or a name that `npulab targets` lists. See `rooflines.roofline`.

    Raises: UsageError for an unknown device; ModelError for a damaged file; UnsupportedError without any ceiling.
    """
    from npulab.rooflines import roofline

    return roofline(load(model) if isinstance(model, str | os.PathLike) else model, device, numbers, everything)


def read_program(path: str | os.PathLike[str] | bytes) -> Program:
    """The Program of a `.npu` file, verified."""
    from npulab.program.container import read_program

    return read_program(path)


def write_program(program: Program, path: str | os.PathLike[str]) -> None:
    """Write a `.npu` file, whole or not at all."""
    from npulab.program.container import write_program

    write_program(program, path)


def open_session(program: Program, device: Device | None = None) -> Session:
    """The program on `device`, ready to run; None: on the virtual NPU of its target."""
    from npulab.program.types import NpuStep
    from npulab.runtime.session import Session
    from npulab.targets.target import find_target

    if device is None and any(isinstance(s, NpuStep) for s in program.steps):
        device = find_target(program.target).device()
    return Session(program, device)


def _graph(model: Graph | str | os.PathLike[str]) -> Graph:
    """What targets compile: TFLite."""
    return convert(model, "tflite")
