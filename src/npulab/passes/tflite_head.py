"""TFLite_Detection_PostProcess cut off the end of a TFLite network, for NumPy to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError, UnsupportedError
from npulab.exporters.tflite import cut
from npulab.importers import load
from npulab.ir import Graph, Node, Value
from npulab.ir.ops import Custom
from npulab.passes.certificate import Agreement, Feeds, agreement, worse
from npulab.passes.litert import feeds_of, networks
from npulab.passes.pipeline import Change, picture
from npulab.postprocess import apply
from npulab.postprocess.types import CELLS_MAX, Post, Ssd

OPERATOR = "TFLite_Detection_PostProcess"
OPTIONS_MAX = 1 << 16
"""Bytes of the operator's options; real ones have a few hundred."""
Options = dict[str, float]


@dataclass(frozen=True, slots=True)
class Cut:
    """The network without the operator, what replaces it, and what to say of it."""

    data: bytes
    body: Graph
    post: Post
    change: Change


def detection(graph: Graph) -> Node | None:
    """The operator, if the network has one."""
    return next((n for n in graph.nodes if isinstance(n.op, Custom) and n.op.name == OPERATOR), None)


def without_head(graph: Graph) -> Cut:
    """The network without its TFLite_Detection_PostProcess, whose boxes and scores are outputs instead, as they were
    before they were dequantized for it alone.

    Raises: UnsupportedError if it has none, or one that is not at its end; ModelError if that is damaged.
    """
    n = detection(graph)
    if n is None:
        raise UnsupportedError(f"'{graph.name}' has no head that can be cut off",
                               want=f"a TFLite network with {OPERATOR}")
    if graph.consumers.keys() & set(n.outputs) or len(n.outputs) != 4 or len(n.inputs) != 3 \
            or not set(n.outputs) <= set(graph.outputs):
        raise UnsupportedError(f"the {OPERATOR} of '{graph.name}' cannot be cut off", where=n,
                               want="three inputs, and four outputs that are the network's own")
    boxes, scores = (_raw(graph, v) for v in n.inputs[:2])
    others = [v for v in graph.outputs if v not in n.outputs]
    outputs = list(dict.fromkeys((boxes.index, scores.index, *others)))
    data = cut(graph, needed(graph, outputs), graph.inputs, outputs)
    body = load(data)
    given = [graph.values[v] for v in outputs]
    names = unique_names(graph, [*outputs, *graph.outputs])
    stage = _stage(graph, n, boxes, scores, names)
    quantization = {names[v.index]: (v.quantization.scale, v.quantization.zero_point) for v in given
                    if v.quantization is not None and v.quantization.per_tensor}
    post = Post(model=graph.name, digest=graph.digest, picture=picture(graph), quantization=quantization,
                body={names[v.index]: v.shape for v in given},
                outputs=tuple(names[v] for v in graph.outputs), stages=(stage,))
    text = f"{n}: left to NumPy; '{boxes.name}' and '{scores.name}' are outputs instead"
    return Cut(data, body, post, Change("cut-head", True, text, stage))


def _raw(graph: Graph, v: int) -> Value:
    """The value, or the quantized one behind a DEQUANTIZE."""
    made = graph.producer.get(v)
    if made is not None and made.op.name == "DEQUANTIZE":
        source = graph.values[made.inputs[0]]
        if source.quantization is not None and source.quantization.per_tensor and not source.is_constant:
            return source
    return graph.values[v]


def needed(graph: Graph, outputs: Sequence[int]) -> list[int]:
    """The nodes that compute these values, in order."""
    wanted, nodes = set(outputs), []
    for n in reversed(graph.nodes):
        if wanted.intersection(n.outputs):
            nodes.append(n.index)
            wanted.update(v for v in n.inputs if v >= 0)
    return nodes[::-1]


def unique_names(graph: Graph, values: Sequence[int]) -> dict[int, str]:
    """value -> its name; with its number where the file names none, or two the same."""
    count = Counter(graph.values[v].name for v in set(values))
    return {v: name if (name := graph.values[v].name) and count[name] == 1 else f"{name or 'tensor'}#{v}"
            for v in values}


def _stage(graph: Graph, n: Node, boxes: Value, scores: Value, known: Mapping[int, str]) -> Ssd:
    assert isinstance(n.op, Custom)
    anchors = _real(graph.values[n.inputs[2]])
    o = _options(n.op.options)
    try:
        classes, most, per_box = (int(o[k]) for k in ("num_classes", "max_detections", "max_classes_per_detection"))
        scales = (o["y_scale"], o["x_scale"], o["h_scale"], o["w_scale"])
        score, iou = o["nms_score_threshold"], o["nms_iou_threshold"]
    except KeyError as e:
        raise ModelError(f"{n} of '{graph.name}' has no option {e}", got=", ".join(o) or "none") from None
    count = len(anchors)
    if anchors.shape != (count, 4) or boxes.shape[:2] != (1, count) or len(boxes.shape) != 3 or boxes.shape[2] < 4 \
            or scores.shape[:2] != (1, count) or len(scores.shape) != 3 or not 0 <= scores.shape[2] - classes <= 1 \
            or classes < 1 or not 0 < most * per_box <= 1 << 20 or scores.elements > CELLS_MAX \
            or not all(s > 0 for s in scales):
        raise ModelError(f"{n} of '{graph.name}' does not fit its inputs",
                         want=f"boxes 1,{count},4; scores 1,{count},C",
                         got=f"{boxes}; {scores}; {classes} classes, {most} x {per_box} boxes")
    names = [known[v] for v in n.outputs]
    return Ssd(boxes=known[boxes.index], scores=known[scores.index], classes=classes, most=most, per_box=per_box,
               score=score, iou=iou, scales=scales, per_class=int(o.get("detections_per_class", 100)),
               regular=bool(o.get("use_regular_nms", 0)), results=(names[0], names[1], names[2], names[3]),
               anchors=tuple((a[0], a[1], a[2], a[3]) for a in ([float(str(x)) for x in row] for row in anchors)))


def _real(v: Value) -> NDArray[np.float32]:
    """A constant's numbers, dequantized as the operator does it."""
    array = v.array()
    if array.dtype == np.float32:
        return array.astype(np.float32)
    if v.quantization is None or not v.quantization.per_tensor or array.dtype.kind not in "iu":
        raise ModelError(f"the anchors '{v.name}' are no real numbers", got=str(v))
    zero, scale = np.float32(v.quantization.zero_point), np.float32(v.quantization.scale)
    return (array.astype(np.float32) - zero) * scale


def _options(data: bytes) -> Options:
    """The numbers of a FlexBuffer's outermost map. What is deeper is not read: it may refer to itself many times."""
    from flatbuffers import flexbuffers

    if len(data) > OPTIONS_MAX:
        raise ModelError(f"{OPERATOR} has too many options", want=f"at most {OPTIONS_MAX} bytes", got=f"{len(data)}")
    try:
        fields = flexbuffers.GetRoot(bytearray(data)).AsMap
        found = {}
        for key, value in zip(fields.Keys, fields.Values, strict=True):
            if value.IsFloat or value.IsInt or value.IsBool:
                found[str(key.AsKey)] = float(value.AsFloat if value.IsFloat else value.AsInt)
    except Exception as e:  # the reader trusts what it reads
        raise ModelError(f"the options of {OPERATOR} are no FlexBuffer map", got=str(e)[:200]) from None
    if not all(np.isfinite(x) for x in found.values()):
        raise ModelError(f"the options of {OPERATOR} are no numbers", got=str(found)[:200])
    return found


# the certificate


def same_detections(graph: Graph, made: Cut, inputs: Feeds | None = None) -> list[Agreement]:
    """The untouched network's outputs and those of its body with the post-processing, both in LiteRT, on random inputs
    and on `inputs`. Of boxes, classes and scores those that the count counts.

    Raises: UsageError if LiteRT is not installed; UnsupportedError if it does not run one of them.
    """
    both = networks(graph, made.post.outputs, made.data, list(made.post.body), quick=True)
    stage = made.post.stages[0]
    assert isinstance(stage, Ssd)
    found: dict[str, Agreement] = {}
    for feed in feeds_of(graph, inputs):
        wanted = both.first(feed)
        given = apply(made.post, both.second(feed))
        rows = min(int(x[stage.results[3]].reshape(-1)[0]) for x in (wanted, given))
        rows *= 1 if stage.regular else min(stage.per_box, stage.classes)
        for name in made.post.outputs:
            x, y = (np.asarray(o[name])[:, :rows] if name in stage.results[:3] else np.asarray(o[name]).reshape(-1)
                    for o in (wanted, given))
            now = agreement(name, x, y)
            found[name] = worse(found[name], now) if name in found else now
    return list(found.values())

