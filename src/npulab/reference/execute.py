"""Quantized networks run in exact integers, node after node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from npulab.errors import CapacityError, ModelError, NpulabError, UnsupportedError, UsageError
from npulab.ir import Graph, Node, Value
from npulab.passes.bounds import TENSOR_MAX
from npulab.quantization.types import Arithmetic
from npulab.reference.requantize import RULES
from npulab.reference.types import Array, Step

INCONSISTENT = (ValueError, IndexError, KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError,
                AssertionError)
"""What a node whose shapes, types or options contradict one another comes to."""
Steps = Sequence[tuple[str, tuple[int, ...], tuple[int, ...], Step]]
"""(the node for people, values read, values written, how)."""

KEPT = 4
"""Networks that `run` keeps ready."""


def run(graph: Graph, feeds: Mapping[str, Array], arithmetic: Arithmetic = "tflite", *, every: bool = False
        ) -> dict[str, Array]:
    """The outputs by name; with `every`, all tensors that are computed. The last few networks are kept ready.

    feeds       an array for each input, of its own type and shape.
    arithmetic  who rounds. "onnx" is for ONNX graphs with QuantizeLinear and DequantizeLinear, and for nothing else.

    Raises: UnsupportedError naming the operators that have no integer arithmetic here and no runtime that computes
    them; UsageError for feeds that do not fit.
    """
    return _ready(graph, arithmetic).run(feeds, every=every)


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A network made ready. `islands` are the nodes that a runtime computes, not the integer arithmetic here."""

    graph: Graph
    arithmetic: str
    steps: Steps
    constants: Mapping[int, Array]
    islands: tuple[int, ...]
    last_use: Mapping[int, int] = field(default_factory=dict)

    def run(self, feeds: Mapping[str, Array], *, every: bool = False) -> dict[str, Array]:
        """As `run`."""
        held: dict[int, Array] = dict(self.constants)
        for v in self.graph.inputs:
            held[v] = _fed(self.graph.values[v], feeds)
        if unknown := sorted(feeds.keys() - {self.graph.values[v].name for v in self.graph.inputs}):
            raise UsageError(f"'{self.graph.name}' has no input {', '.join(unknown)}",
                             want=", ".join(self.graph.values[v].name for v in self.graph.inputs))
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for i, (who, reads, writes, step) in enumerate(self.steps):
                try:
                    results = step([held[v] for v in reads])
                except NpulabError:
                    raise
                except Exception as e:  # a runtime's errors have no common type of their own
                    raise _inconsistent(self.graph, who, e) from e
                for v, found in zip(writes, results, strict=True):
                    if v >= 0:
                        held[v] = found
                if not every:
                    for v in reads:
                        if self.last_use.get(v) == i:
                            held.pop(v, None)
        values = self.graph.values
        names = {v: values[v].name for v in (held if every else self.graph.outputs)}
        return {name: held[v] if v in held else values[v].array() for v, name in names.items()
                if not (every and values[v].is_constant)}


@lru_cache(maxsize=KEPT)
def _ready(graph: Graph, arithmetic: Arithmetic) -> Network:
    return prepare(graph, arithmetic)


def prepare(graph: Graph, arithmetic: Arithmetic = "tflite") -> Network:
    """A network ready to run many times. Raises as `run` does."""
    if arithmetic not in RULES:
        raise UsageError(f"there is no arithmetic '{arithmetic}'", want=", ".join(RULES))
    for v in graph.values:
        size = v.elements * (v.dtype.numpy.itemsize if v.dtype.numpy is not None else 1)
        if size > TENSOR_MAX:
            raise CapacityError(f"'{graph.name}' has a tensor that is not worth its memory",
                                got=f"'{v.name[:60]}' of {size} bytes", want=f"at most {TENSOR_MAX} bytes")
    if graph.format == "onnx":
        from npulab.reference.qdq import steps_of

        if arithmetic != "onnx":
            raise UsageError(f"'{graph.name}' is an ONNX network, which rounds as ONNX Runtime does",
                             got=arithmetic, want="onnx", try_="npulab convert it to .tflite for other arithmetics")
        try:
            steps, constants, islands = steps_of(graph)
        except INCONSISTENT as e:
            raise _inconsistent(graph, "a node", e) from e
        return _network(graph, arithmetic, steps, constants, islands)
    if arithmetic == "onnx":
        raise UsageError(f"'{graph.name}' is a TFLite network", got="arithmetic onnx",
                         want=", ".join(r for r in RULES if r != "onnx"), try_="npulab convert it to .onnx first")
    from npulab.reference.tflite import UnknownError, step_of

    made: list[tuple[str, tuple[int, ...], tuple[int, ...], Step]] = []
    strange: list[int] = []
    for node in graph.nodes:
        reads = tuple(v for v in node.inputs
                      if v >= 0 and not (graph.values[v].is_constant or graph.values[v].is_variable))
        try:
            step = step_of(graph, node, arithmetic)
        except UnknownError:
            strange.append(node.index)
            step = _island(graph, node, reads)
        except NpulabError as e:
            e.facts.setdefault("node", str(node))
            raise
        except INCONSISTENT as e:
            raise _inconsistent(graph, str(node), e) from e
        made.append((str(node), reads, node.outputs, step))
    return _network(graph, arithmetic, made, {}, strange)


def _inconsistent(graph: Graph, who: str, error: Exception) -> NpulabError:
    if isinstance(error, MemoryError):
        return CapacityError(f"{who} of '{graph.name}' needs more memory than there is")
    return ModelError(f"{who} of '{graph.name}' cannot be computed: its parts do not fit together",
                      got=" ".join(str(error).split())[:200] or type(error).__name__)


def _network(graph: Graph, arithmetic: str, steps: Steps, constants: Mapping[int, Array], islands: Sequence[int]
             ) -> Network:
    last = {v: i for i, (_, reads, _, _) in enumerate(steps) for v in reads}
    return Network(graph, arithmetic, tuple(steps), constants, tuple(islands),
                   {v: i for v, i in last.items() if v not in graph.outputs})


def _fed(value: Value, feeds: Mapping[str, Array]) -> Array:
    if value.name not in feeds:
        raise UsageError(f"input '{value.name}' is not given", want=f"{value.dtype.value}{list(value.shape)}")
    array = np.asarray(feeds[value.name])
    if array.dtype != value.dtype.numpy or array.shape != value.shape:
        raise UsageError(f"the array for input '{value.name}' does not fit", got=f"{array.dtype}{list(array.shape)}",
                         want=f"{value.dtype.value}{list(value.shape)}")
    return array


def _island(graph: Graph, node: Node, reads: Sequence[int]) -> Step:
    """The node run by LiteRT's reference kernels, for what is no integer arithmetic: floats, boxes, shapes.

    Raises: UnsupportedError naming the operator if LiteRT is not installed or refuses it.
    """
    from npulab.exporters.tflite import cut
    from npulab.runtime.host import HostModel

    outputs = [v for v in node.outputs if v >= 0]
    try:
        model = HostModel(cut(graph, [node.index], reads, outputs), str(node))
    except UnsupportedError as e:
        raise UnsupportedError(f"{node} of '{graph.name}' has no integer arithmetic here, and LiteRT cannot run it",
                               got=e.message, **{k: v for k, v in e.facts.items() if k != "got"}) from e

    def step(arrays: Sequence[Array]) -> list[Any]:
        found = iter(model.run(arrays))
        return [next(found) if v >= 0 else np.empty(0) for v in node.outputs]

    return step
