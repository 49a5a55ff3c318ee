"""Parts of a TFLite model as files of their own (what the host runs), and TFLite files from dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from npulab.errors import InvariantError, ModelError
from npulab.formats.flatbuffer import Table, pack
from npulab.formats.tflite import IDENTIFIER, VERSION, schema
from npulab.importers.tflite import Buffers
from npulab.ir import Graph
from npulab.ir.ops import Generic


def write_tflite(model: Mapping[str, Any]) -> bytes:
    """A TFLite file from its Model table as dictionaries by the schema's field names (see `flatbuffer.pack`).

    The same content gives the same bytes; tensor data lies at multiples of 16 bytes.

    Raises: UsageError for a field or value that the schema does not have; CapacityError beyond 2 GiB.
    """
    return pack(schema(), "Model", model, IDENTIFIER)


def cut(graph: Graph, nodes: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
    """A TFLite file with just these operators (by Node.index), with these values as inputs and outputs, in this order.

    Operators keep the order and all options they have in the source. Constants come along inside the file, wherever
    the source kept them, each once. If one of the operators calls a subgraph, all other subgraphs come along whole,
    under their old numbers. The same arguments give the same bytes.

    Raises: ModelError if the source uses what the schema does not know, or a part that reading the Graph did not visit
    is damaged; InvariantError if an operator would read a value that nothing gives it.
    """
    _check(graph, nodes, inputs, outputs)
    model = Table.root(schema(), "Model", graph.source)
    main, *others = model.tables("subgraphs")
    kept = set(nodes)
    operators = [t.unpack() for i, t in enumerate(main.tables("operators")) if i in kept]
    used = sorted({v for o in operators for v in _reads_and_writes(o) if v >= 0} | set(inputs) | set(outputs))
    file = _NewFile(graph, model)
    subgraphs = [file.part(main, operators, used, inputs, outputs)]
    if any(_calls(graph, n) for n in kept):
        subgraphs += [file.whole(s) for s in others]
    return write_tflite({
        "version": VERSION, "description": "npulab", "operator_codes": file.operator_codes, "subgraphs": subgraphs,
        "buffers": file.buffers,
    })


def _check(graph: Graph, nodes: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]) -> None:
    if graph.format != "tflite":
        raise InvariantError(f"'{graph.name}' did not come from a TFLite file", got=graph.format)
    for what, chosen, count in (("node", nodes, len(graph.nodes)), ("value", inputs, len(graph.values)),
                                ("value", outputs, len(graph.values))):
        for i in chosen:
            if not 0 <= i < count:
                raise InvariantError(f"'{graph.name}' has no {what} {i}", want=f"0..{count - 1}")
    ready = {v.index for v in graph.values if v.is_constant or v.is_variable} | set(inputs)
    for n in sorted(set(nodes)):
        node = graph.nodes[n]
        if missing := [v for v in node.inputs if v >= 0 and v not in ready]:
            raise InvariantError(f"{node} cannot be cut out: nothing in the part gives it what it reads",
                                 got=f"values {missing}", want="inputs, constants, or values computed before it")
        ready.update(node.outputs)
    if missing := [v for v in outputs if v not in ready]:
        raise InvariantError(f"a part of '{graph.name}' has outputs that nothing in it computes",
                             got=f"values {missing}")


def _calls(graph: Graph, node: int) -> bool:
    op = graph.nodes[node].op
    return isinstance(op, Generic) and bool(op.subgraphs)


_INDICES = ("inputs", "outputs", "intermediates")
"""Fields of Operator that hold tensor indices."""


def _reads_and_writes(operator: Mapping[str, Any]) -> list[int]:
    return [v for field in _INDICES for v in operator.get(field, ())]


class _NewFile:
    """The lists that all subgraphs of the new file share, in order of first use. Buffer 0 is the empty one."""

    def __init__(self, graph: Graph, model: Table) -> None:
        self._name = graph.name
        self._source = Buffers(model, graph.source)
        self._codes = list(model.tables("operator_codes"))
        self._code_numbers: dict[int, int] = {}
        self._buffer_numbers: dict[int, int] = {}
        self.operator_codes: list[dict[str, Any]] = []
        self.buffers: list[dict[str, Any]] = [{}]

    def part(self, table: Table, operators: list[dict[str, Any]], used: Sequence[int], inputs: Sequence[int],
             outputs: Sequence[int]) -> dict[str, Any]:
        """A subgraph of these operators and of the tensors `used`, which get the numbers 0, 1, ..."""
        number = {v: i for i, v in enumerate(used)} | {-1: -1}
        for o in operators:
            self._move_operator(o)
            for field in _INDICES:
                if field in o:
                    o[field] = [self._find(number, v) for v in o[field]]
        tensors = list(table.tables("tensors"))
        return {
            "name": table.text("name") or "main", "operators": operators,
            "tensors": [self._tensor(tensors[self._find(range(len(tensors)), v)]) for v in used],
            "inputs": [self._find(number, v) for v in inputs], "outputs": [self._find(number, v) for v in outputs],
        }

    def whole(self, table: Table) -> dict[str, Any]:
        """A subgraph as it is."""
        return self.part(table, [t.unpack() for t in table.tables("operators")], range(table.count("tensors")),
                         table.numbers("inputs"), table.numbers("outputs"))

    def _find(self, numbers: Mapping[int, int] | range, old: int) -> int:
        if old not in numbers:
            raise ModelError(f"'{self._name}' names tensor {old} in a subgraph that has none of that number")
        return numbers[old]

    def _move_operator(self, operator: dict[str, Any]) -> None:
        """Point the operator at the new file's code, and bring its large options inside."""
        old = operator.get("opcode_index", 0)
        if old not in self._code_numbers:
            if old >= len(self._codes):
                raise ModelError(f"'{self._name}' has an operator of code {old}, which does not exist",
                                 want=f"0..{len(self._codes) - 1}")
            self._code_numbers[old] = len(self.operator_codes)
            self.operator_codes.append(self._codes[old].unpack())
        operator["opcode_index"] = self._code_numbers[old]
        operator.pop("debug_metadata_index", None)
        offset = operator.pop("large_custom_options_offset", 0)
        size = operator.pop("large_custom_options_size", 0)
        if not operator.get("custom_options"):
            operator["custom_options"] = self._source.behind(offset, size, f"an operator of '{self._name}'")

    def _tensor(self, table: Table) -> dict[str, Any]:
        tensor = table.unpack()
        tensor.pop("external_buffer", None)
        old = tensor.get("buffer", 0)
        if old not in self._buffer_numbers:
            data = self._source.content(old, f"a tensor of '{self._name}'")
            self._buffer_numbers[old] = len(self.buffers) if data else 0
            if data:
                self.buffers.append({"data": data})
        tensor["buffer"] = self._buffer_numbers[old]
        return tensor
