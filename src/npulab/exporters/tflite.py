"""Parts of a TFLite model as files of their own: what the host runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from npulab.errors import InvariantError
from npulab.formats.flatbuffer import Table, pack
from npulab.formats.tflite import IDENTIFIER, schema
from npulab.ir import Graph
from npulab.ir.ops import Generic


def cut(graph: Graph, nodes: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
    """A TFLite file with just these operators (by index), whose inputs and outputs are these values, in this order.

    Constants come along inside the file, wherever the source kept them. Nodes that call subgraphs take every subgraph
    with them. The same arguments give the same bytes.
    """
    if graph.format != "tflite":
        raise InvariantError(f"'{graph.name}' did not come from a TFLite file")
    model = Table.root(schema(), "Model", graph.source)
    subgraphs = list(model.tables("subgraphs"))
    main = subgraphs[0]
    kept = set(nodes)
    operators = [t.unpack() for i, t in enumerate(main.tables("operators")) if i in kept]
    calls = any(isinstance(graph.nodes[n].op, Generic) and graph.nodes[n].op.subgraphs  # type: ignore[union-attr]
                for n in nodes)
    tensors = list(main.tables("tensors"))
    used = sorted({v for o in operators for v in _all_indices(o) if v >= 0} | set(inputs) | set(outputs))
    files = _Buffers(graph, model)
    first = _subgraph(main, [tensors[v] for v in used], used, operators, inputs, outputs, files)
    others = [_whole(s, files) for s in subgraphs[1:]] if calls else []
    codes = list(model.tables("operator_codes"))
    order: dict[int, int] = {}
    for o in (o for s in (first, *others) for o in s["operators"]):
        old = o.get("opcode_index", 0)
        o["opcode_index"] = order.setdefault(old, len(order))
    content = {
        "version": 3, "description": "npulab", "operator_codes": [codes[i].unpack() for i in order],
        "subgraphs": [first, *others], "buffers": files.content,
    }
    return pack(schema(), "Model", content, IDENTIFIER)


def _all_indices(operator: dict[str, Any]) -> Iterable[int]:
    for name in ("inputs", "outputs", "intermediates"):
        yield from operator.get(name, ())


class _Buffers:
    """Buffers of the new file, in order of first use; number 0 is the empty one."""

    def __init__(self, graph: Graph, model: Table) -> None:
        self.source = graph.source
        self.tables = list(model.tables("buffers"))
        self.content: list[dict[str, Any]] = [{}]
        self.numbers: dict[int, int] = {0: 0}

    def number(self, old: int) -> int:
        if old not in self.numbers:
            table = self.tables[old]
            offset, size = table.integer("offset"), table.integer("size")
            data = self.source[offset : offset + size] if offset > 1 else table.bytes("data")
            if not data:
                self.numbers[old] = 0
            else:
                self.numbers[old] = len(self.content)
                self.content.append({"data": data})
        return self.numbers[old]


def _tensor(table: Table, files: _Buffers) -> dict[str, Any]:
    out = table.unpack()
    out["buffer"] = files.number(out.get("buffer", 0))
    out.pop("external_buffer", None)
    return out


def _subgraph(table: Table, tensors: list[Table], used: list[int], operators: list[dict[str, Any]],
              inputs: Sequence[int], outputs: Sequence[int], files: _Buffers) -> dict[str, Any]:
    number = {v: i for i, v in enumerate(used)} | {-1: -1}
    for o in operators:
        for name in ("inputs", "outputs", "intermediates"):
            if name in o:
                o[name] = [number[v] for v in o[name]]
        o.pop("debug_metadata_index", None)
        if o.get("large_custom_options_offset", 0) > 1:
            start, size = o.pop("large_custom_options_offset"), o.pop("large_custom_options_size")
            o["custom_options"] = files.source[start : start + size]
    return {
        "tensors": [_tensor(t, files) for t in tensors], "inputs": [number[v] for v in inputs],
        "outputs": [number[v] for v in outputs], "operators": operators, "name": table.text("name") or "main",
    }


def _whole(table: Table, files: _Buffers) -> dict[str, Any]:
    tensors = list(table.tables("tensors"))
    operators = [t.unpack() for t in table.tables("operators")]
    return _subgraph(table, tensors, list(range(len(tensors))), operators, table.numbers("inputs") or (),
                     table.numbers("outputs") or (), files)
