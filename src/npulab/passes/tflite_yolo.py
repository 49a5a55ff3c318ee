"""The heads of YOLO cut off TFLite networks, quantized ones too, for NumPy to do.

A quantized tail rounds every number on its way, and its grid, strides and bins as well. What it would compute without
that is measured as heads.py measures ONNX tails: the tail in floats, behind its maps dequantized. The body stays what
it was, bit by bit: operators of the file, in its integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError
from npulab.exporters.tflite import cut
from npulab.importers import load
from npulab.ir import DType, Graph, Node, Value
from npulab.passes.head_forms import MAPS_MAX, Map, Run, form_of, measurable
from npulab.passes.heads import described
from npulab.passes.pipeline import Change, picture
from npulab.passes.tflite_head import Cut, needed, unique_names
from npulab.postprocess.types import CELLS_MAX, Post, YoloV5, YoloV8

Array = NDArray[Any]
WEIGHTED = ("CONV_2D",)
WALLS = ("FULLY_CONNECTED", "BATCH_MATMUL", "TRANSPOSE_CONV", "DEPTHWISE_CONV_2D", "CONV_3D", "IF", "WHILE",
         "CALL_ONCE", "UNIDIRECTIONAL_SEQUENCE_LSTM", "LSTM")
"""Operators with weights, or with bodies, that no tail of YOLO's has: behind them there is none."""
ARITHMETIC = ("LOGISTIC", "SOFTMAX", "EXP", "POW", "SQUARE", "MUL", "DIV", "SUB")
SECONDS_MAX = 60.0
"""Of one run of a tail."""
EIGHT_BITS = (DType.INT8, DType.UINT8)


@dataclass(frozen=True, slots=True)
class Tail:
    """What lies behind the last convolutions: their results (1, h, w, C), and the nodes from there to the outputs."""

    maps: tuple[int, ...]
    nodes: tuple[Node, ...]


def tail(graph: Graph) -> Tail | None:
    """The tail of a TFLite network; None if something else with weights, or an input, feeds it.

    A convolution to one channel with the weights 0, 1, 2, ... belongs to it: so YOLOv8 sums its distributions."""
    maps: dict[int, None] = {}
    nodes: dict[int, Node] = {}
    todo = list(dict.fromkeys(graph.outputs))
    while todo:
        v = todo.pop()
        if v < 0 or graph.values[v].is_constant or v in maps:
            continue
        n = graph.producer.get(v)
        if n is None or n.op.name in WALLS:
            return None
        if n.index in nodes:
            continue
        if n.op.name in WEIGHTED and not _sums_bins(graph, n):
            x = graph.values[v]
            if len(x.shape) != 4 or x.shape[0] != 1 or not x.elements or x.dynamic_axes or (x.quantization and (
                    not x.quantization.per_tensor or x.dtype not in EIGHT_BITS)):
                return None
            maps[v] = None
            continue
        nodes[n.index] = n
        todo.extend(n.inputs)
    if not nodes or not maps or any(v in maps for v in graph.outputs):
        return None
    return Tail(tuple(sorted(maps)), tuple(nodes[i] for i in sorted(nodes)))


def without_yolo(graph: Graph, wanted: Callable[[Node], bool] | None = None) -> Cut | None:
    """The network without the head of YOLOv5 or YOLOv8 at its end: the maps of its last convolutions are outputs.

    wanted  whether a node is to go: one of the tail has to be. None: the cut was asked for.
    Gives None if there is nothing to cut.

    Raises: UnsupportedError if the cut was asked for, and what follows the maps looks like a head but is none of these.
    """
    t = tail(graph)
    names = {n.op.name for n in t.nodes} if t else set()
    if t is None or not names.intersection(ARITHMETIC) or not (wanted is None or any(wanted(n) for n in t.nodes)):
        return None
    known = unique_names(graph, [*t.maps, *graph.outputs])
    maps = [Map(known[v], channels_first(graph.values[v].shape)) for v in t.maps]
    run = tail_in_floats(graph, t)
    stage = form_of(maps, run) if run else None
    if stage is None:
        if wanted is None and len({m.shape[2:] for m in maps}) > 1 and {"LOGISTIC", "EXP"} & names:
            raise UnsupportedError(
                f"the head of '{graph.name}' cannot be cut off: what follows its last convolutions computes neither "
                "YOLOv5's boxes nor YOLOv8's", where=", ".join(sorted(names)),
                got="; ".join(str(graph.values[v]) for v in t.maps[:6]),
                try_="patch without --pass cut-head, or export the network with another head")
        return None
    return _cut(graph, known, stage)


def _cut(graph: Graph, known: dict[int, str], stage: YoloV5 | YoloV8) -> Cut:
    number = {name: v for v, name in known.items()}
    outputs = [number[name] for name in stage.reads]
    data = cut(graph, needed(graph, outputs), graph.inputs, outputs)
    body = load(data)
    given = {known[v]: graph.values[v] for v in outputs}
    post = Post(model=graph.name, digest=graph.digest, picture=picture(graph),
                body={name: channels_first(v.shape) for name, v in given.items()},
                outputs=tuple(known[v] for v in graph.outputs), stages=(stage,),
                quantization={name: (v.quantization.scale, v.quantization.zero_point) for name, v in given.items()
                              if v.quantization})
    text = f"{', '.join(stage.gives)}: {described(stage)}, left to NumPy; {len(outputs)} maps are outputs instead"
    return Cut(data, replace(body, name=graph.name), post, Change("cut-head", True, text, stage))


def channels_first(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[0], shape[3], shape[1], shape[2])


# the tail in floats


def tail_in_floats(graph: Graph, t: Tail) -> Run | None:
    """Runs the tail as arithmetic on real numbers: on maps channels first, by their unique names, gives the outputs.

    Nothing is rounded on the way, and constants of 8 bits that lie within half a step of YOLO's grids, strides or bins
    are those. None where the tail has an operator that is not known in ONNX Runtime.
    """
    from npulab.dialects import from_tflite
    from npulab.passes.bounds import affordable, limited_run
    from npulab.passes.certificate import session

    if len(t.maps) > MAPS_MAX or sum(graph.values[v].elements for v in t.maps) > CELLS_MAX:
        return None
    alone = _in_floats(graph, t)
    if not measurable([alone.values[v] for v in t.maps], [alone.values[v] for v in alone.outputs]):
        return None
    try:
        affordable(alone)
        made = from_tflite(alone)
        runs = session(made.graph)
    except UnsupportedError:
        return None
    names = [alone.values[v].name for v in alone.outputs]

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        last = {name: x.transpose(0, 2, 3, 1) for name, x in feeds.items()}
        there = {name: np.ascontiguousarray(x.transpose(made.inputs.get(name, range(4)))) for name, x in last.items()}
        found = zip(names, limited_run(runs, names, there, SECONDS_MAX), strict=True)
        return {name: x.transpose(np.argsort(made.outputs[name])) if name in made.outputs else x for name, x in found}

    return run


def _in_floats(graph: Graph, t: Tail) -> Graph:
    """The tail as a graph of its own, from the maps, without quantization."""
    known = unique_names(graph, [*t.maps, *graph.outputs])
    read = {v for n in t.nodes for v in n.inputs}
    levels = [(s[1], s[2]) for s in (graph.values[v].shape for v in t.maps)]
    bins = {n.inputs[1] for n in t.nodes if n.op.name in WEIGHTED}
    image = picture(graph)
    regular = _Regular(levels, (image.height, image.width) if image else None)
    values = []
    for v in graph.values:
        name = known.get(v.index, f"value {v.index}")
        if v.quantization is None or v.dtype not in (*EIGHT_BITS, DType.INT32, DType.INT16):
            values.append(replace(v, name=name, constant=v.constant if v.index in read else None))
            continue
        constant = None
        if v.is_constant and v.index in read:
            real = dequantized(v)
            if v.dtype in EIGHT_BITS and v.quantization.per_tensor:
                half = 0.51 * v.quantization.scale
                real = _bins(real) if v.index in bins else regular.near(real, half)
            constant = memoryview(np.ascontiguousarray(real, np.float32).tobytes())
        values.append(replace(v, name=name, dtype=DType.FLOAT32, quantization=None, constant=constant))
    nodes = tuple(replace(n, index=i) for i, n in enumerate(t.nodes))
    return replace(graph, values=tuple(values), nodes=nodes, inputs=t.maps, signature_inputs=(), signature_outputs=())


def dequantized(v: Value) -> Array:
    """A constant's real numbers."""
    q, array = v.quantization, v.array().astype(np.float32)
    if q is None:
        return array
    shape = [1] * array.ndim
    if not q.per_tensor:
        shape[q.axis] = len(q.scales)
    zeros = q.zero_points if len(q.zero_points) == len(q.scales) else q.zero_points * len(q.scales)
    found: Array = (array - np.array(zeros, np.float32).reshape(shape)) * np.array(q.scales, np.float32).reshape(shape)
    return found


def _sums_bins(graph: Graph, n: Node) -> bool:
    w = graph.values[n.inputs[1]] if len(n.inputs) > 1 and n.inputs[1] >= 0 else None
    if w is None or not w.is_constant or w.dtype.numpy is None or w.shape[:3] != (1, 1, 1) or not 1 < w.elements < 256:
        return False
    half = 0.51 * w.quantization.scale if w.quantization else 0.0
    return bool(np.abs(dequantized(w).reshape(-1) - np.arange(w.elements)).max() <= half)


def _bins(real: Array) -> Array:
    return np.arange(real.size, dtype=np.float32).reshape(real.shape)


LINES_MAX = 8
"""Numbers that a constant of YOLO's has at one place."""


class _Regular:
    """What YOLO's constants may be at the places of maps: columns and rows with an offset, in places, pixels or
    fractions of the input, and strides."""

    def __init__(self, levels: Sequence[tuple[int, int]], size: tuple[int, int] | None) -> None:
        sizes = sorted(set(levels), key=lambda s: -s[0] * s[1])
        self._orders = [[s] for s in sizes] + ([sizes, sizes[::-1]] if len(sizes) > 1 else [])
        self._fields = {(h, w): list(_fields(h, w, size)) for h, w in sizes}

    def near(self, real: Array, half: float) -> Array:
        """The constants that lie no further than `half` from these; these themselves if not all places have one."""
        for h, w in self._fields:
            for i in range(real.ndim - 1):
                if real.shape[i : i + 2] == (h, w):  # rows and columns apart
                    flat = real.reshape(*real.shape[:i], h * w, *real.shape[i + 2 :])
                    found = self._along(flat, i, [(h, w)], 1, half)
                    if found is not None:
                        return found.reshape(real.shape)
        for order in self._orders:
            for count in (1, 2, 3, 4):  # anchors at each place, which lie one after the other or side by side
                ends = np.cumsum([h * w * count for h, w in order])
                for axis in (i for i, n in enumerate(real.shape) if n == ends[-1]):
                    found = self._along(real, axis, order, count, half)
                    if found is not None:
                        return found
        return real

    def _along(self, real: Array, axis: int, order: Sequence[tuple[int, int]], count: int, half: float
               ) -> Array | None:
        """The same with the places of these maps, `count` times each, along an axis."""
        lines = np.moveaxis(real, axis, 0).reshape(real.shape[axis], -1).astype(np.float64)
        if lines.shape[1] > LINES_MAX:
            return None
        ends = np.cumsum([h * w * count for h, w in order])
        found = [self._fitted(part, level, count, half)
                 for part, level in zip(np.split(lines, ends[:-1]), order, strict=True)]
        if any(f is None for f in found):
            return None
        whole = np.concatenate([f for f in found if f is not None])
        shape = (real.shape[axis], *real.shape[:axis], *real.shape[axis + 1 :])
        return np.moveaxis(whole.reshape(shape), 0, axis).astype(np.float32)

    def _fitted(self, part: Array, level: tuple[int, int], count: int, half: float) -> Array | None:
        columns = []
        for line in part.T:
            best: tuple[float, Array] | None = None
            for field in self._fields[level]:
                for x in (field,) if count == 1 else (np.tile(field, count), np.repeat(field, count)):
                    apart = float(np.abs(x - line).max())
                    if apart <= half and (best is None or apart < best[0]):
                        best = apart, x
            if best is None and np.ptp(line) == 0:
                best = 0.0, line  # a size of anchors, say, repeated at each place
            if best is None:
                return None
            columns.append(best[1])
        return np.stack(columns, 1)


def _fields(h: int, w: int, size: tuple[int, int] | None) -> Iterator[Array]:
    """Numbers at each place of a map, row by row."""
    column, row = np.tile(np.arange(w), h), np.repeat(np.arange(h), w)
    high, wide = size or (h, w)
    units = {1.0, high / h, wide / w, 1 / h, 1 / w, high / h / wide, wide / w / high} if size else {1.0}
    for unit in units:
        yield np.full(h * w, unit)
        for offset in (-0.5, 0.0, 0.5, 1.0):
            yield (column + offset) * unit
            yield (row + offset) * unit
