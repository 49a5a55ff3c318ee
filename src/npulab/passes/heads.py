"""Detection heads and suppression cut off the end of a network, for NumPy to do."""

from __future__ import annotations

from typing import Any

import numpy as np

from npulab.errors import UnsupportedError
from npulab.ir import Node
from npulab.ir.ops import OnnxOp
from npulab.passes.head_forms import Tail, recognized
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.postprocess.types import Nms, Stage, YoloV5, YoloV8

ARITHMETIC = ("Sigmoid", "Softmax", "Exp", "Pow", "Mul", "Div", "Sub")
"""What a head has beside moving numbers around."""


def cut(r: Rewrite) -> list[str]:
    """What follows the last convolutions of YOLOv5 and YOLOv8 (sigmoids, grids, anchors, distributions of distances)
    is left to NumPy, and so is a NonMaxSuppression at the end: the network then gives the maps of the convolutions, or
    boxes and scores. Strides, anchors and layout are measured by running the tail, and it is cut only if NumPy gives
    the same numbers, within 1e-5 of the largest, from random maps."""
    return _cut_suppression(r) or _cut_head(r)


def _cut_suppression(r: Rewrite) -> list[str]:
    for n in r.live():
        op = n.op
        if not isinstance(op, OnnxOp) or op.domain or op.name != "NonMaxSuppression" or not r.wanted(n):
            continue
        stage = _nms(r, n)
        if isinstance(stage, str):
            if r.off is None:
                raise UnsupportedError(f"the suppression of '{r.source.name}' cannot be cut off", where=n, got=stage,
                                       try_="export the network without it")
            continue
        place = r.outputs.index(n.outputs[0])
        r.outputs[place : place + 1] = [v for v in dict.fromkeys(n.inputs[:2]) if v not in r.outputs]
        r.stage = stage
        return [f"{n.name or op.name}: left to NumPy; '{stage.boxes}' and '{stage.scores}' are outputs instead of "
                f"'{stage.result}'"]
    return []


def _nms(r: Rewrite, n: Node) -> Nms | str:
    """The stage, or why there is none."""
    assert isinstance(n.op, OnnxOp)
    if n.outputs[0] not in r.outputs or r.readers(n.outputs[0]):
        return "its result is not just an output of the network: others read it"
    if any(r.constant(v) is not None for v in n.inputs[:2]):
        return "its boxes or scores are constant"
    numbers: list[Any] = []
    for i, default in ((2, 0), (3, 0.0), (4, None)):
        v = n.inputs[i] if i < len(n.inputs) else -1
        c = r.constant(v)
        if v >= 0 and (c is None or c.size != 1):
            return "its thresholds are computed"
        numbers.append(default if c is None else c.reshape(-1)[0].item())
    boxes, scores = (r.values[v] for v in n.inputs[:2])
    return Nms(boxes=boxes.name, scores=scores.name, centred=bool(n.op.attributes.get("center_point_box", 0)),
               most=int(min(numbers[0], 1 << 31)), iou=numbers[1], score=numbers[2], result=r.values[n.outputs[0]].name)


def _cut_head(r: Rewrite) -> list[str]:
    tail = _tail(r)
    if tail is None or not any(r.wanted(n) for n in tail.nodes):
        return []
    names = {n.op.name for n in tail.nodes}
    stage = recognized(r.source, tail) if names.intersection(ARITHMETIC) else None
    if stage is None:
        if r.off is None and len({r.values[v].shape[2:] for v in tail.maps}) > 1 and {"Sigmoid", "Exp"} & names:
            raise UnsupportedError(
                f"the head of '{r.source.name}' cannot be cut off: what follows its last convolutions computes neither "
                "YOLOv5's boxes nor YOLOv8's", where=", ".join(sorted(names)),
                got="; ".join(str(r.values[v]) for v in tail.maps[:6]),
                try_="patch without --pass cut-head, or export the network with another head")
        return []
    number = {r.values[v].name: v for v in tail.maps}
    r.outputs = [number[name] for name in stage.reads]
    r.stage = stage
    return [f"{', '.join(stage.gives)}: {described(stage)}, left to NumPy; {len(r.outputs)} maps are outputs instead"]


def described(stage: Stage) -> str:
    """A head of YOLO's, in a few words."""
    assert isinstance(stage, YoloV5 | YoloV8)
    kind = "YOLOv5's head" if isinstance(stage, YoloV5) else "YOLOv8's head"
    unit = " of the input" if max(stage.strides) < 1 else ""
    return f"{kind} at strides {', '.join(f'{s:g}' for s in stage.strides)}{unit}"


def _tail(r: Rewrite) -> Tail | None:
    """What lies behind the last convolutions of maps; None if something else with weights, or an input, feeds it.

    One to one channel with the weights 0, 1, 2, ... is no such convolution: so YOLOv8 sums its distributions."""
    maps: dict[int, None] = {}
    nodes: dict[int, Node] = {}
    todo = list(dict.fromkeys(r.outputs))
    while todo:
        v = todo.pop()
        if v < 0 or r.values[v].is_constant or v in maps:
            continue
        n = r.maker(v)
        if n is None:
            return None
        if n.index in nodes:
            continue
        name = n.op.name
        if name == "Conv" and not _sums_bins(r, n):
            x = r.values[v]
            if len(x.shape) != 4 or x.shape[0] != 1 or x.dynamic_axes or not x.has_shape:
                return None
            maps[v] = None
            continue
        if name in ("ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "NonMaxSuppression", "Loop", "If", "Scan"):
            return None
        nodes[n.index] = n
        todo.extend(n.inputs)
    if not nodes or not maps or any(v in maps for v in r.outputs):
        return None
    return Tail(tuple(sorted(maps)), tuple(nodes[i] for i in sorted(nodes)))


def _sums_bins(r: Rewrite, n: Node) -> bool:
    weights = r.constant(n.inputs[1])
    return weights is not None and weights.ndim == 4 and weights.shape[0] == 1 < weights.shape[1] == weights.size \
        and bool((weights.reshape(-1) == np.arange(weights.size)).all())


PASS = Pass("cut-head", cut, always=False)
