"""The shapes of a graph that passes changed, inferred anew without its weights."""

from __future__ import annotations

from dataclasses import replace

from npulab.exporters.onnx import CODES, IR_WITH_FREE_CONSTANTS, _info, _node, _tensor
from npulab.importers.onnx import SMALL, _types, _Values
from npulab.ir import Graph


def inferred(graph: Graph) -> Graph:
    """The graph with all types and shapes of computed values as reading its file anew would give them: what was folded
    may have made them fixed.

    Constants stay where they are: writing and reading those of a large network takes far longer than inference does.

    Raises: ModelError if ONNX's inference refuses the graph.
    """
    import onnx

    header = graph.header
    assert header is not None
    proto = onnx.ModelProto.FromString(header.shell)
    proto.ir_version = max(proto.ir_version, IR_WITH_FREE_CONSTANTS)
    constants = {v.name: _tensor(v) if len(v.shape) <= 1 and v.elements <= SMALL else
                 onnx.TensorProto(name=v.name, data_type=CODES[v.dtype], dims=v.shape)
                 for v in graph.values if v.is_constant}
    proto.graph.input.extend(_info(graph, v) for v in header.declared if not graph.values[v].is_constant)
    proto.graph.output.extend(_info(graph, v) for v in graph.outputs)
    types = _types(proto, [_node(graph, n) for n in graph.nodes], constants, graph.name)
    computed = [v for v in graph.values if not v.is_constant]
    found = _Values(graph.name)
    for v in computed:
        found.typed(v.name, types.get(v.name))
    values = list(graph.values)
    for v, new in zip(computed, found.all(), strict=True):
        values[v.index] = replace(new, index=v.index)
    infos = {computed[i].index: info for i, info in found.infos.items()}
    return replace(graph, values=tuple(values), header=replace(header, types=infos))
