"""The model as a door takes it: format, fixed shapes, opset, integers; and an example of what it computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.doors.types import Door, ModelFormat, Picture, Preprocessing
from npulab.errors import UnsupportedError, UsageError, runtime_said
from npulab.ir import DType, Graph
from npulab.ir.ops import OnnxOp

Array = NDArray[Any]
INTEGERS = (DType.INT8, DType.UINT8, DType.INT16)
BORDERS = ("QUANTIZE", "DEQUANTIZE", "CAST", "RESHAPE")
"""TFLite operators that a network with integers may have floats at."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """The file for the tool, the graph it holds, and what was done to get there."""

    format: ModelFormat
    content: bytes
    graph: Graph
    notes: tuple[str, ...]


def prepare(graph: Graph, door: Door, opset: int = 0) -> Prepared:
    """The model as `door` takes it. `opset`: the newest that the board's tool takes, 0 for the door's own.

    Raises: UsageError for a dynamic shape; UnsupportedError where the network cannot be said in the door's format.
    """
    notes: list[str] = []
    dynamic = [graph.values[i] for i in graph.inputs if graph.values[i].dynamic_axes or not graph.values[i].has_shape]
    if dynamic and graph.format == "onnx":
        raise UsageError(f"{door.tool} wants fixed sizes, and input '{dynamic[0].name}' has none", got=str(dynamic[0]),
                         try_="--dim NAME=SIZE for each dynamic dimension")
    if dynamic:  # such a file has both: a signature that leaves sizes open, and the sizes to begin with
        notes.append(f"dynamic sizes taken as the file's own: {', '.join(map(str, dynamic))}")
        graph = replace(graph, values=tuple(replace(v, dynamic_axes=()) for v in graph.values))
    if door.floats and is_quantized(graph):
        raise UnsupportedError(f"{door.tool} takes networks of floats, and '{graph.name}' holds integers",
                               try_="export the float network that it was quantized from"
                               + (", with --calibration" if door.calibration else ""))
    wanted: ModelFormat = graph.format if graph.format in door.takes else door.takes[0]
    if wanted != graph.format:
        graph = _crossed(graph, wanted, door)
        notes.append(f"converted to {'TFLite' if wanted == 'tflite' else 'ONNX'}")
    if wanted == "tflite":
        if door.integer:
            _need_integers(graph, door)
        if door.name in ("tflm", "vela") and any(v.dtype is DType.UINT8 and v.quantization for v in graph.values):
            notes.append("uint8 activations: TensorFlow Lite Micro's kernels take int8")
        return Prepared(wanted, _inlined(graph, notes), graph, tuple(notes))
    from npulab.exporters.onnx import to_onnx

    content = to_onnx(graph)
    limit = opset or door.opset
    if limit and (now := opset_of(graph)) > limit:
        content, graph = _older(content, graph, now, limit, door, notes)
    return Prepared(wanted, content, graph, tuple(notes))


def opset_of(graph: Graph) -> int:
    """The version of ONNX's own operators, 0 for TFLite."""
    return max((v for domain, v in graph.header.opsets if domain in ("", "ai.onnx")), default=0) if graph.header else 0


def _crossed(graph: Graph, wanted: str, door: Door) -> Graph:
    """The same network in the other format."""
    names = {"onnx": "ONNX", "tflite": "TFLite"}
    advice = "give the TFLite file of this network" if wanted == "tflite" else "give the ONNX file of this network"
    try:
        if wanted == "tflite":
            from npulab.dialects import to_tflite as crossing
        else:
            from npulab.dialects import to_onnx as crossing
    except ImportError:
        raise UnsupportedError(f"{door.tool} takes {names[wanted]}, and '{graph.name}' is {names[graph.format]}",
                               try_=advice) from None
    return crossing(graph)


def _inlined(graph: Graph, notes: list[str]) -> bytes:
    """The file, with weights that lie behind the FlatBuffer brought inside: most readers take those for zeros."""
    from npulab.exporters.tflite import cut
    from npulab.formats.flatbuffer import Table
    from npulab.formats.tflite import schema

    model = Table.root(schema(), "Model", graph.source)
    if not any(b.integer("offset") > 1 for b in model.tables("buffers")):
        return bytes(graph.source)
    notes.append("weights brought inside the FlatBuffer")
    return cut(graph, [n.index for n in graph.nodes], graph.inputs, graph.outputs)


def _need_integers(graph: Graph, door: Door) -> None:
    """Refuse a network whose operators compute floats."""
    floats = [n for n in graph.nodes if n.op.name not in BORDERS and n.outputs
              and graph.values[n.outputs[0]].dtype is DType.FLOAT32]
    whole = [n for n in graph.nodes if n.outputs and graph.values[n.outputs[0]].dtype in INTEGERS]
    if not whole or len(floats) > len(whole):
        raise UnsupportedError(f"{door.tool} takes integer networks, and '{graph.name}' computes floats",
                               got=f"{len(floats)} of {len(graph.nodes)} operators compute floats",
                               want="int8 or uint8 weights and activations",
                               try_="quantize the network first, then export it")


def _older(content: bytes, graph: Graph, now: int, limit: int, door: Door, notes: list[str]) -> tuple[bytes, Graph]:
    """The file at the opset that the tool documents, if ONNX's own converter can say it; as it is if not."""
    import onnx
    import onnx.version_converter

    from npulab.importers.onnx import read_onnx

    try:
        older = onnx.version_converter.convert_version(onnx.ModelProto.FromString(content), limit)
        made: bytes = older.SerializeToString(deterministic=True)
        again = read_onnx(memoryview(made), graph.name)
    except Exception:  # the converter is C++ and raises what it likes
        notes.append(f"opset {now}, newer than the {limit} that {door.tool} documents, and not to be lowered")
        return content, graph
    if [again.values[v].shape for v in again.outputs] != [graph.values[v].shape for v in graph.outputs]:
        notes.append(f"opset {now}, newer than the {limit} that {door.tool} documents")
        return content, graph
    notes.append(f"opset {now} lowered to {limit}")
    return made, again


def picture(graph: Graph) -> Picture | None:
    """The one input as a picture of 1 or 3 channels; None if it is none."""
    if len(graph.inputs) != 1:
        return None
    v = graph.values[graph.inputs[0]]
    match v.shape:
        case (1, 1 | 3 as c, h, w) if graph.format == "onnx":
            return Picture(v.name, h, w, c, True)
        case (1, h, w, 1 | 3 as c):
            return Picture(v.name, h, w, c, False)
    return None


def is_quantized(graph: Graph) -> bool:
    """Whether the file already says which integers to use."""
    if graph.format == "onnx":
        return any(isinstance(n.op, OnnxOp) and (n.op.name.startswith("QLinear") or n.op.name == "DequantizeLinear")
                   for n in graph.nodes)
    return any(v.quantization and v.dtype in INTEGERS and not v.is_constant for v in graph.values)


def real(pixels: Array, how: Preprocessing | None, where: Picture) -> NDArray[np.float32]:
    """Pixels N,H,W,C, channels red first, as the network's numbers in its own layout."""
    x: NDArray[np.float32] = pixels.astype(np.float32)
    if how is not None:
        if how.order == "bgr":
            x = x[..., ::-1]
        x = ((x - np.asarray(how.mean)) / np.asarray(how.std)).astype(np.float32)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2) if where.planes_first else x)


def stored(x: NDArray[np.float32], graph: Graph) -> Array:
    """Real numbers as the first input stores them."""
    v = graph.values[graph.inputs[0]]
    assert v.dtype.numpy is not None
    if v.dtype is DType.FLOAT32 or not v.quantization:
        return x.astype(v.dtype.numpy)
    limits = np.iinfo(v.dtype.numpy)  # type: ignore[type-var]
    q: Array = np.rint(x / v.quantization.scale) + v.quantization.zero_point
    return q.clip(limits.min, limits.max).astype(v.dtype.numpy)


def example(graph: Graph, how: Preprocessing | None, seed: int = 0) -> dict[str, Array]:
    """A random input: `in0`, `in1`, ... in order; with preprocessing also `pixels`, uint8 [1,H,W,C], red first."""
    rng = np.random.default_rng(seed)
    where = picture(graph)
    if how is not None and where is not None:
        pixels = rng.integers(0, 256, (1, where.height, where.width, where.channels), np.uint8)
        return {"in0": stored(real(pixels, how, where), graph), "pixels": pixels}
    from npulab.passes.certificate import random_inputs

    named = random_inputs(graph, seed)
    return {f"in{k}": named[graph.values[i].name] for k, i in enumerate(graph.inputs)}


def computed(graph: Graph, inputs: dict[str, Array]) -> list[Array]:
    """The graph's outputs in order: by ONNX Runtime without its optimizations, or LiteRT (integers: reference kernels).

    Raises: UsageError if the runtime is not installed; UnsupportedError if it does not run the network.
    """
    feeds = [inputs[f"in{k}"] for k in range(len(graph.inputs))]
    if graph.format == "tflite":
        from npulab.runtime.host import HostModel

        model = HostModel(graph.source, f"'{graph.name}'", quick=not is_quantized(graph))
        return model.run([a.reshape(d["shape"]) for a, d in zip(feeds, model.inputs, strict=True)])
    from npulab.passes.certificate import session

    running = session(graph)
    names = [graph.values[v].name for v in graph.outputs]
    try:
        found: list[Array] = running.run(names, {graph.values[i].name: a
                                                 for i, a in zip(graph.inputs, feeds, strict=True)})
    except Exception as e:  # the runtime is C++: it raises what it likes
        raise UnsupportedError(f"ONNX Runtime does not run '{graph.name}'", got=runtime_said(e)) from None
    return found

