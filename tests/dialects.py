"""Two runtimes as each other's witness: a graph in ONNX Runtime, and what it was converted to in LiteRT."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from npulab.dialects import Converted
from npulab.exporters.onnx import to_onnx
from npulab.exporters.tflite import cut
from npulab.importers.tflite import read_tflite
from npulab.ir import DType
from npulab.passes.certificate import session
from npulab.runtime.host import HostModel


def feeds(graph, seed=0):
    """Random inputs by name: floats around zero, integers over 8 bits. Dynamic axes count as 1."""
    rng = np.random.default_rng(seed)
    return {v.name: _random(v, rng) for v in (graph.values[i] for i in graph.inputs)}


def _random(v, rng):
    if v.dtype is DType.BOOL:
        return rng.random(v.shape) < 0.5
    if np.issubdtype(v.dtype.numpy, np.floating):
        return rng.normal(size=v.shape).astype(v.dtype.numpy)
    low = -128 if v.dtype is DType.INT8 else 0
    return rng.integers(low, low + 256, v.shape).astype(v.dtype.numpy)


def run(graph, inputs):
    """Outputs by name, by the runtime of the graph's format, without optimizations."""
    if graph.format == "onnx":
        names = [graph.values[v].name for v in graph.outputs]
        return dict(zip(names, session(graph).run(names, inputs), strict=True))
    model = HostModel(graph.source, graph.name)
    arrays = model.run([inputs[graph.values[v].name] for v in graph.inputs])
    return {graph.values[v].name: a for v, a in zip(graph.outputs, arrays, strict=True)}


def run_converted(made: Converted, inputs):
    """The same of a converted graph, with inputs and outputs in the order of axes of the graph before."""
    there = {name: a.transpose(made.inputs.get(name, range(a.ndim))) for name, a in inputs.items()}
    out = run(made.graph, there)
    return {name: a.transpose(np.argsort(made.outputs[name])) if name in made.outputs else a
            for name, a in out.items()}


def furthest(want, got):
    """The largest difference of any output, as a share of its largest value."""
    assert list(want) == list(got)
    worst = 0.0
    for name, w in want.items():
        assert w.shape == got[name].shape, name
        assert w.dtype == got[name].dtype, name
        if w.size:
            a, b = w.astype(np.float64), got[name].astype(np.float64)
            apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
            worst = max(worst, float(np.max(apart) / max(np.max(np.abs(a)), 1e-30)))
    return worst


def check_onnx(made: Converted):
    import onnx

    onnx.checker.check_model(to_onnx(made.graph))


def layer_differences(graph, convert, seed=0):
    """(operator, elements, how many differ, largest difference) of each layer of a quantized TFLite graph, that layer
    alone converted, on the inputs that LiteRT's reference kernels computed. Differences of integers are in steps."""
    known = dict(zip(graph.inputs, feeds(replace_dynamic(graph), seed).values(), strict=True))
    for n in graph.nodes:
        inputs = [v for v in dict.fromkeys(n.inputs) if v >= 0 and not graph.values[v].is_constant]
        part = cut(graph, [n.index], inputs, n.outputs)
        for v, a in zip(n.outputs, HostModel(part, str(n)).run([known[v] for v in inputs]), strict=True):
            known[v] = a
        if not inputs:
            continue
        alone = read_tflite(part, "layer")
        got = run_converted(convert(alone, keep_layout=True),
                            {alone.values[i].name: known[v] for i, v in zip(alone.inputs, inputs, strict=True)})
        for v, b in zip(n.outputs, got.values(), strict=True):
            apart = np.abs(known[v].astype(np.float64) - b)
            yield n.op.name, apart.size, int(np.count_nonzero(apart)), float(apart.max(initial=0))


def replace_dynamic(graph):
    return replace(graph, values=tuple(replace(v, dynamic_axes=()) for v in graph.values))
