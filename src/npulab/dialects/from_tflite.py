"""TFLite graphs to ONNX: node by node, quantized ones between DequantizeLinear and QuantizeLinear."""

from __future__ import annotations

import importlib.util
from collections import Counter

from npulab.dialects import layouts
from npulab.dialects.conversion import MISFITS, NotThereError
from npulab.dialects.fake_quant import folded
from npulab.dialects.from_onnx import Converted
from npulab.dialects.layouts import Order
from npulab.dialects.onnx_file import QUANTIZED, TYPES, Held, OnnxFile
from npulab.dialects.tflite_operators import TABLE
from npulab.errors import ModelError, UnsupportedError, UsageError
from npulab.ir import DType, Graph


def from_tflite(graph: Graph, keep_layout: bool = False) -> Converted:
    """The ONNX graph that computes the same; pictures come and go channels first unless `keep_layout`.

    Raises: UnsupportedError naming every operator that there is no translation for; UsageError without onnx.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UsageError(f"'{graph.name}' becomes an ONNX network on the way, and the package onnx is not installed",
                         try_="pip install 'npulab[onnx]'")
    _check(graph)
    graph = folded(graph)
    pictures = [] if keep_layout else [v for v in graph.inputs if len(graph.values[v].shape) == 4]
    best: OnnxFile | None = None
    for first in ([pictures, []] if pictures else [[]]):
        file = OnnxFile(graph, first)
        _translate(file)
        if best is None or file.moved < best.moved:
            best = file
    assert best is not None
    return _finished(best, keep_layout)


def _check(graph: Graph) -> None:
    missing = Counter(n.op.name for n in graph.nodes if n.op.name not in TABLE)
    if missing:
        raise UnsupportedError(
            f"'{graph.name}' has operators that are not converted to ONNX",
            got=", ".join(f"{count} {name}" if count > 1 else name for name, count in sorted(missing.items())),
            try_="cut the network before them, or compute them on the host")
    for v in graph.values:
        computed = v.index in graph.producer or v.index in (*graph.inputs, *graph.outputs)
        known = v.dtype in TYPES and (v.dtype is not DType.INT16 or v.quantization is not None)
        strange = computed and not known and not _is_constant_cast(graph, v.index)
        if strange or (v.quantization and not v.quantization.per_tensor and computed and v.dtype in QUANTIZED):
            raise UnsupportedError(f"'{v.name}' of '{graph.name}' has elements that are not converted",
                                   got=str(v), want=", ".join(t.value for t in TYPES) + ", one scale a tensor")


def _is_constant_cast(graph: Graph, value: int) -> bool:
    node = graph.producer.get(value)
    return node is not None and all(graph.values[v].is_constant for v in node.inputs if v >= 0)


def _translate(file: OnnxFile) -> None:
    failed = []
    for n in file.graph.nodes:
        file.node, file.origin = n, n.name or f"{n.op.name}_{n.index}"
        try:
            TABLE[n.op.name](file)
        except NotThereError as e:
            failed.append(f"{n}: {e}")
            for v in n.outputs:
                file.held.setdefault(v, Held(file.tensor("?"), layouts.plain(len(file.graph.values[v].shape))))
        except MISFITS as e:
            raise ModelError(f"{n} of '{file.graph.name}' has attributes or operands that do not fit it",
                             got=f"{type(e).__name__}: {e}"[:200]) from e
    if failed:
        raise UnsupportedError(f"'{file.graph.name}' has operators that are not converted to ONNX",
                               got="; ".join(failed[:20]))


def _finished(file: OnnxFile, keep_layout: bool) -> Converted:
    graph = file.graph
    outputs: dict[int, None] = {}
    shapes = []
    moved: dict[str, Order] = {}
    for i in graph.outputs:
        v = graph.values[i]
        rank = len(v.shape)
        file.origin = f"output {v.name}"
        if i in file.held:
            h = file.held[i]
            first = layouts.channels_first(rank)
            order = first if h.order == first and rank == 4 and not keep_layout else layouts.plain(rank)
            tensor = file.ordered(h.tensor, v.shape, h.order, order)
        else:
            tensor, order = file.constant(v.array(), v.name), layouts.plain(rank)
        if tensor in outputs or tensor in file.inputs or i not in file.held:
            tensor = file.op("Identity", [tensor])
        if order != layouts.plain(rank):
            moved[v.name] = order
        outputs[tensor] = None
        shapes.append(layouts.stored(v.shape, order))
    inputs = {graph.values[i].name: file.held[i].order for i in graph.inputs
              if file.held[i].order != layouts.plain(len(file.held[i].order))}
    return Converted(file.graph_of(list(outputs), shapes), inputs, moved)
