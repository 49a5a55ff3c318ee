"""Operators that move elements and compute nothing: they hold for every type and every chip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from npulab.ir import Graph, Node
from npulab.ir.ops import Generic, Pad, Reshape, Split
from npulab.reference.types import Array, Step, codes


def step_of(graph: Graph, node: Node) -> Step | None:
    """The node as a function of its computed inputs, or None if it is no pure move (or one with computed places)."""
    out = graph.values[node.outputs[0]]
    op = node.op

    def constant(i: int) -> Array | None:
        v = graph.value(node, i)
        return codes(v) if v is not None and v.is_constant else None

    first = graph.value(node, 0)
    if first is None:
        return None
    match op:
        case Reshape():
            return lambda arrays: [arrays[0].reshape(out.shape)]
        case Split():
            axis = constant(0)
            if axis is None:
                return None
            return lambda arrays: list(np.split(arrays[0], op.pieces, int(axis.reshape(-1)[0])))
        case Pad(mode="reflect" | "symmetric"):
            table = constant(1)
            if table is None:
                return None
            pads = [(int(a), int(b)) for a, b in table]
            mode: Any = op.mode
            return lambda arrays: [np.pad(arrays[0], pads, mode=mode)]
        case Generic(name="TRANSPOSE"):
            order = constant(1)
            if order is None:
                return None
            axes = [int(a) for a in order]
            return lambda arrays: [np.ascontiguousarray(arrays[0].transpose(axes))]
        case Generic(name="STRIDED_SLICE", attributes=a):
            return _strided(graph, node, dict(a))
        case Generic(name="SLICE"):
            begin, size = constant(1), constant(2)
            if begin is None or size is None:
                return None
            cuts = tuple(slice(int(b), None if s < 0 else int(b) + int(s)) for b, s in zip(begin, size, strict=True))
            return lambda arrays: [arrays[0][cuts]]
        case Generic(name="PACK", attributes=a):
            if any(graph.values[v].is_constant for v in node.inputs) or not _alike(graph, node):
                return None
            return lambda arrays: [np.stack(arrays, int(a["axis"]))]  # type: ignore[call-overload]
        case Generic(name="UNPACK", attributes=a):
            where = int(a["axis"])  # type: ignore[call-overload]
            return lambda arrays: [np.take(arrays[0], i, where) for i in range(arrays[0].shape[where])]
        case Generic(name="DEPTH_TO_SPACE" | "SPACE_TO_DEPTH", attributes=a):
            block = int(a["block_size"])  # type: ignore[call-overload]
            how = _to_space if op.name == "DEPTH_TO_SPACE" else _to_depth
            return lambda arrays: [how(arrays[0], block)]
    return None


def _alike(graph: Graph, node: Node) -> bool:
    """Whether all parts are stored as the result is."""
    wanted = graph.values[node.outputs[0]].quantization
    return all(graph.values[v].quantization == wanted for v in node.inputs)


def _strided(graph: Graph, node: Node, options: dict[str, Any]) -> Step | None:
    parts = [graph.value(node, i) for i in (1, 2, 3)]
    if any(p is None or not p.is_constant for p in parts) or options.get("ellipsis_mask") or options.get(
            "new_axis_mask") or options.get("offset"):
        return None
    begin, end, stride = (codes(p) for p in parts if p is not None)
    shape = graph.values[node.outputs[0]].shape
    cuts: list[slice] = []
    for i, (b, e, s) in enumerate(zip(begin, end, stride, strict=True)):
        if options.get("shrink_axis_mask", 0) >> i & 1:
            cuts.append(slice(int(b), int(b) + 1 or None))
            continue
        start = None if options.get("begin_mask", 0) >> i & 1 else int(b)
        stop = None if options.get("end_mask", 0) >> i & 1 else int(e)
        cuts.append(slice(start, stop, int(s)))

    def step(arrays: Sequence[Array]) -> list[Array]:
        return [np.ascontiguousarray(arrays[0][tuple(cuts)]).reshape(shape)]

    return step


def _to_space(x: Array, block: int) -> Array:
    n, h, w, c = x.shape
    parts = x.reshape(n, h, w, block, block, c // block**2).transpose(0, 1, 3, 2, 4, 5)
    return parts.reshape(n, h * block, w * block, c // block**2)


def _to_depth(x: Array, block: int) -> Array:
    n, h, w, c = x.shape
    parts = x.reshape(n, h // block, block, w // block, block, c).transpose(0, 1, 3, 2, 4, 5)
    return parts.reshape(n, h // block, w // block, block**2 * c)
