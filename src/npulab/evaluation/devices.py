"""What runs a network: ONNX Runtime, LiteRT, or a chip's virtual NPU. All give real numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npulab.errors import UnsupportedError, UsageError, runtime_said
from npulab.evaluation.types import Array
from npulab.ir import Graph
from npulab.passes.bounds import affordable, limited_run
from npulab.program.types import Tensor
from npulab.quantization.types import Feeds
from npulab.runtime.datasets import input_tensors, tensor_of

HERE = ("onnxruntime", "onnxruntime-fast", "litert", "litert-fast")


@dataclass(frozen=True)
class Device:
    """A network ready to run. `graph` is what runs, perhaps converted; `run` takes arrays as the inputs store them, and
    gives the outputs by name, dequantized."""

    title: str
    graph: Graph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    run: Callable[[Feeds], dict[str, Array]]


def open_device(graph: Graph, device: str | None = None) -> Device:
    """The network on a device, by default the runtime of its file's format.

    onnxruntime       every operator as the file has it: no fusing, one thread. QDQ is computed in floats, so that the
                      result does not depend on which integer instructions this CPU has.
    onnxruntime-fast  with ONNX Runtime's own optimizations, as it runs by default; one thread.
    litert            LiteRT's reference kernels, which are the specification of TFLite's arithmetic.
    litert-fast       LiteRT's default kernels, XNNPACK among them; one thread.
    a chip            compiled with plan best, on its virtual NPU.
    another target    an integer network in its exact arithmetic, where that is published: generic-int8, esp32p4.

    A network of the other dialect is converted.

    Raises: UsageError for another device, or if the runtime is not installed; UnsupportedError if it does not run it.
    """
    from npulab.targets.facts.quantization import names
    from npulab.targets.target import all_targets

    name = device or ("onnxruntime" if graph.format == "onnx" else "litert")
    if name not in (*HERE, *all_targets(), *names()):
        raise UsageError(f"there is no device '{name[:60]}' to run networks on",
                         want=", ".join((*HERE, *sorted(all_targets()))) + ", or a target of npulab quantize")
    affordable(graph)
    if name not in (*HERE, *all_targets()):
        return _exact(graph, name)
    if name.startswith("onnxruntime"):
        return _onnxruntime(graph, name.endswith("-fast"))
    return _litert(graph, name.endswith("-fast")) if name.startswith("litert") else _chip(graph, name)


def _onnxruntime(graph: Graph, quick: bool) -> Device:
    from npulab.api import convert
    from npulab.exporters.onnx import to_onnx

    try:
        import onnxruntime
    except ImportError:
        raise UsageError("this needs ONNX Runtime, which is not installed", try_="pip install 'npulab[onnx]'") from None
    made = convert(graph, "onnx", keep_layout=True)
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if quick else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(to_onnx(made), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # the runtime is C++: it raises what it likes
        raise UnsupportedError(f"ONNX Runtime does not load '{graph.name}'", got=runtime_said(e)) from None
    inputs, outputs = input_tensors(made), tuple(tensor_of(made, v) for v in made.outputs)
    names, own = [t.name for t in outputs], [made.values[v].name for v in made.inputs]

    def run(feeds: Feeds) -> dict[str, Array]:
        try:
            found = limited_run(session, [made.values[v].name for v in made.outputs],
                                {n: feeds[t.name] for n, t in zip(own, inputs, strict=True)})
        except Exception as e:
            raise UnsupportedError(f"ONNX Runtime does not run '{graph.name}'", got=runtime_said(e)) from None
        return _real(names, found, outputs)

    return Device(f"ONNX Runtime {onnxruntime.__version__}, {'optimized' if quick else 'not optimized'}", made, inputs,
                  outputs, run)


def _litert(graph: Graph, quick: bool) -> Device:
    from npulab.api import convert
    from npulab.runtime.host import HostModel

    made = convert(graph, "tflite", keep_layout=True)
    model = HostModel(made.source, f"'{graph.name}'", quick=quick)
    inputs, outputs = input_tensors(made), tuple(tensor_of(made, v) for v in made.outputs)

    def run(feeds: Feeds) -> dict[str, Array]:
        return _real([t.name for t in outputs], model.run([feeds[t.name] for t in inputs]), outputs)

    return Device("LiteRT, default kernels" if quick else "LiteRT, reference kernels", made, inputs, outputs, run)


def _chip(graph: Graph, name: str) -> Device:
    from npulab import api
    from npulab.runtime.session import tensor_names

    made = api.convert(graph, "tflite")
    program = api.compile(made, name)
    session = api.open_session(program)
    names, by_value = tensor_names(program), {t.value: t for t in program.tensors}
    inputs, outputs = ([by_value[v] for v in values] for values in (program.inputs, program.outputs))
    known = tuple(Tensor(t.value, names[t.value], t.dtype, t.shape, t.scale, t.zero_point) for t in inputs)

    def run(feeds: Feeds) -> dict[str, Array]:
        found = session.run({t.name: feeds[t.name] for t in known})
        own = [names[t.value] for t in outputs]
        return _real(own, [found[n] for n in own], outputs)

    return Device(f"virtual NPU of {name}", made, known, tuple(outputs), run)


def _exact(graph: Graph, name: str) -> Device:
    from npulab.api import convert
    from npulab.reference.execute import prepare
    from npulab.targets.facts.quantization import rules_of

    rules = rules_of(name)
    if rules.arithmetic is None:
        raise UsageError(f"how {rules.title} rounds is not published, so that it cannot be simulated exactly",
                         try_=f"--device {'litert' if rules.file == 'tflite' else 'onnxruntime'}")
    made = convert(graph, "onnx" if rules.arithmetic == "onnx" else "tflite", keep_layout=True)
    machine = prepare(made, rules.arithmetic)
    inputs, outputs = input_tensors(made), tuple(tensor_of(made, v) for v in made.outputs)
    own = {t.name: made.values[v].name for t, v in zip((*inputs, *outputs), (*made.inputs, *made.outputs), strict=True)}

    def run(feeds: Feeds) -> dict[str, Array]:
        found = machine.run({own[t.name]: feeds[t.name] for t in inputs})
        return _real([t.name for t in outputs], [found[own[t.name]] for t in outputs], outputs)

    return Device(f"exact integers, {rules.arithmetic} arithmetic", made, inputs, outputs, run)


def _real(names: Sequence[str], found: Sequence[Any], tensors: Sequence[Tensor]) -> dict[str, Array]:
    """Outputs as real numbers, float32, where they are quantized."""
    return {name: (x.astype(np.float32) - np.float32(t.zero_point or 0)) * np.float32(t.scale)
            if t.scale and x.dtype.kind in "iu" else np.asarray(x)
            for name, x, t in zip(names, found, tensors, strict=True)}
