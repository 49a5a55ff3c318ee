"""Passes on TFLite networks: as an ONNX graph there and back, and heads cut off the file itself."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from npulab.dialects import from_onnx, from_tflite
from npulab.dialects.from_onnx import ELEMENTS_MAX
from npulab.errors import UnsupportedError
from npulab.ir import DType, Graph, Node
from npulab.ir.ops import OnnxOp
from npulab.passes.pipeline import Change, find_passes, patched
from npulab.passes.price import constants
from npulab.passes.tflite_head import OPERATOR, Cut, detection, without_head
from npulab.passes.tflite_yolo import without_yolo
from npulab.postprocess.types import Post

Off = Callable[[Graph], Collection[int]]
SPARE = 1 << 16
"""Bytes of constants more that count as none."""
WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL")
WHOLE = (DType.INT8, DType.UINT8, DType.INT16)


@dataclass(frozen=True, slots=True)
class Patched:
    """The new network and its file, what was done, and what a user should know beside that.

    head  the network with its head alone cut off, if it was.
    """

    graph: Graph
    data: bytes
    changes: list[Change]
    notes: list[str]
    head: Cut | None = None

    @property
    def post(self) -> Post | None:
        return self.head.post if self.head else None


def patched_tflite(graph: Graph, asked: Collection[str] = (), off: Off | None = None) -> Patched:
    """As `pipeline.patched`, of a TFLite network: it keeps the names, types and layout of its inputs and outputs. `off`
    gives the nodes of a TFLite graph that a board does not take.

    Where no pass has anything to do the file stays as it is, byte by byte.

    Raises: UsageError for an unknown pass; UnsupportedError for one that was asked for and cannot be done.
    """
    names = {p.name for p in find_passes(asked)}
    head = _head(graph, "cut-head" in names, off)
    body, data = (head.body, head.data) if head else (graph, bytes(graph.source))
    changes = [head.change] if head else []
    others = [p for p in asked if p.partition("=")[0] != "cut-head"]
    try:
        after, more = _there_and_back(body, others, off)
    except UnsupportedError as e:
        if others:
            facts = dict(e.facts)
            if detection(body) is not None:
                facts["try_"] = f"cut its head off too: --pass cut-head --pass {others[0]}"
                facts.pop("try", None)
            raise UnsupportedError(f"the pass '{others[0]}' cannot be done on '{graph.name}': {e.message}",
                                   **facts) from None
        return Patched(body, data, changes, [f"Other passes were not tried: {_said(e)}"], head)
    if not more or (not others and not _is_better(body, after, off)):
        return Patched(body, data, changes, [], head)
    _check_ends(body, after)
    return Patched(after, bytes(after.source), changes + more, [], head)


def _said(e: UnsupportedError) -> str:
    return e.message + (f" ({e.facts['got'][:200]})" if "got" in e.facts else "") + "."


def _head(graph: Graph, asked: bool, off: Off | None) -> Cut | None:
    left = set(off(graph)) if off and not asked else set()
    if not asked and not left:
        return None
    n = detection(graph)
    if n is not None:
        return without_head(graph) if asked or n.index in left else None
    found = without_yolo(graph, None if asked else lambda n: n.index in left)
    if found is None and asked:
        raise UnsupportedError(f"'{graph.name}' has no head that can be cut off",
                               want=f"a TFLite network with {OPERATOR}, or with the head of YOLOv5 or YOLOv8")
    return found


def _there_and_back(graph: Graph, asked: Collection[str], off: Off | None) -> tuple[Graph, list[Change]]:
    """The graph behind the passes, and what they did; without changes it is the same one.

    Raises: UnsupportedError if it cannot be said in ONNX, or what passes asked for made of it not in TFLite.
    """
    if n := _hybrid(graph):
        raise UnsupportedError("8-bit weights beside data in floats stay as they are", where=n, got=(
            "TFLite rounds the data of such a layer too, and what is converted would not"))
    for v in graph.values:
        if v.elements > ELEMENTS_MAX:
            raise UnsupportedError(f"'{v.name}' has a size that is not converted", got=str(v),
                                   want=f"at most {ELEMENTS_MAX} elements")
    there = from_tflite(graph, keep_layout=True).graph
    integers = _in_floats(graph) < _computed(graph)
    leave = ("cut-head", *(("constants",) if integers else ()))  # those would turn weights of integers into floats
    most = _in_floats(graph) if integers else None
    after, changes = patched(there, asked, _Asked(off, most) if off else None, leave=leave)
    if not changes:
        return graph, []
    back = from_onnx(after, keep_layout=True).graph
    if most is not None and _in_floats(back) > most:
        raise UnsupportedError("layers would leave the integers that they were quantized to",
                               got=f"{_in_floats(back)} tensors of floats, {_in_floats(graph)} before",
                               try_="patch the network in floats, and quantize it then")
    return back, changes


def _hybrid(graph: Graph) -> Node | None:
    """A layer whose weights are quantized and whose data are not."""
    for n in graph.nodes:
        if n.op.name in WEIGHTED and n.outputs and graph.values[n.outputs[0]].dtype is DType.FLOAT32:
            w = graph.value(n, 1)
            if w is not None and w.is_constant and w.dtype in (*WHOLE, DType.INT4):
                return n
    return None


def _in_floats(graph: Graph) -> int:
    """Tensors of floats that are computed."""
    return sum(graph.values[v].dtype is DType.FLOAT32 for n in graph.nodes for v in n.outputs if v >= 0)


def _computed(graph: Graph) -> int:
    """Tensors of floats, and of integers that stand for them."""
    return _in_floats(graph) + sum(graph.values[v].quantization is not None and graph.values[v].dtype in WHOLE
                                   for n in graph.nodes for v in n.outputs if v >= 0)


class _Asked:
    """What a board says of the TFLite form of ONNX graphs: `off` of those nodes that it came from.

    A graph that has no such form, or more than `most` tensors of floats there, is none for it: all its nodes are off.
    """

    def __init__(self, off: Off, most: int | None) -> None:
        self._off = off
        self._most = most
        self._last: tuple[Graph, set[int]] | None = None

    def __call__(self, graph: Graph) -> set[int]:
        if self._last is None or self._last[0] is not graph:
            self._last = graph, self._found(graph)
        return self._last[1]

    def _found(self, graph: Graph) -> set[int]:
        try:
            made = from_onnx(graph, keep_layout=True).graph
        except UnsupportedError:
            return set(range(len(graph.nodes)))
        if self._most is not None and _in_floats(made) > self._most:
            return set(range(len(graph.nodes)))
        left = {made.nodes[i].name for i in self._off(made)}
        return {n.index for n in graph.nodes if origin(n) in left}


def origin(n: Node) -> str:
    """What `from_onnx` calls the TFLite nodes that it makes of an ONNX node."""
    return n.name or (f"{n.op.name}_{n.index}" if isinstance(n.op, OnnxOp) else "")


def _is_better(before: Graph, after: Graph, off: Off | None) -> bool:
    """Fewer nodes off the NPU, or as many and fewer nodes that weigh as little: what ONNX alone needs is not worth
    another file, and weights in half precision are single there."""
    was, now = (len(off(g)) if off else 0 for g in (before, after))
    smaller = len(after.nodes) < len(before.nodes) and constants(after) <= constants(before) + SPARE
    return now < was or (now == was and smaller)


def _check_ends(before: Graph, after: Graph) -> None:
    """Raises: UnsupportedError if an input or output is not what it was."""
    for what, old, new in (("input", before.inputs, after.inputs), ("output", before.outputs, after.outputs)):
        for i, j in zip(old, new, strict=True):
            x, y = before.values[i], after.values[j]
            if (x.name, x.shape, x.dtype) != (y.name, y.shape, y.dtype):
                raise UnsupportedError(f"the {what} '{x.name}' of '{before.name}' would become another one", got=str(y),
                                       want=str(x))
