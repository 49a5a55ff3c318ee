"""Which head a tail is: measured by running it, not by how its operators are written.

On maps of zeros a YOLOv5 tail gives each place's centre and each anchor, and a YOLOv8 tail each place's centre and the
mean bin. That fixes strides, anchors and order; random maps then show whether the rest is the same too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError
from npulab.ir import DType, Graph, Node, Value
from npulab.postprocess.boxes import turned
from npulab.postprocess.types import CELLS_MAX, Column, Result, YoloV5, YoloV8
from npulab.postprocess.yolo import yolov5_parts, yolov8_parts

MAPS_MAX = 16
ANCHORS_MAX = 9
TOLERANCE = 1e-5
"""Of the largest number among an output's boxes, its objects or its classes, each by themselves."""
Arrays = dict[str, NDArray[Any]]
CORNERS: tuple[Column, ...] = ("xywh", "xyxy", "yxyx")


@dataclass(frozen=True, slots=True)
class Tail:
    """Maps (1, C, h, w) that convolutions give, and the nodes from there to the network's outputs."""

    maps: tuple[int, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Map:
    """What a convolution gives, (1, C, h, w)."""

    name: str
    shape: tuple[int, ...]


Run = Callable[[Arrays], Arrays]
"""Runs a tail on maps by name, and gives the outputs by name; raises what it likes."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What the tail gives: on zeros, and on random maps."""

    zeros: Arrays
    random: Arrays
    maps: Arrays


def recognized(graph: Graph, tail: Tail) -> YoloV5 | YoloV8 | None:
    """The head that the tail of an ONNX graph is, proven on random maps; None if it is none of those known here."""
    values = [graph.values[v] for v in tail.maps]
    if not measurable(values, [graph.values[v] for v in graph.outputs]):
        return None
    run = _runner(graph, tail)
    return None if run is None else form_of([Map(v.name, v.shape) for v in values], run)


def measurable(maps: Sequence[Value], outputs: Sequence[Value]) -> bool:
    """Whether a tail from these maps to these outputs can be run to see what it is: floats of fixed, bearable size."""
    return 1 <= len(maps) <= MAPS_MAX and all(v.dtype is DType.FLOAT32 for v in (*maps, *outputs)) \
        and all(len(v.shape) == 3 and v.shape[0] == 1 and not v.dynamic_axes and v.has_shape for v in outputs) \
        and sum(v.elements for v in (*maps, *outputs)) <= CELLS_MAX


def form_of(maps: Sequence[Map], run: Run) -> YoloV5 | YoloV8 | None:
    """The head that a tail is, by running it."""
    sizes = {m.shape[2:] for m in maps}
    if len(sizes) < len(maps) / 2 or (len({m.shape[1] for m in maps}) > 1 and len(sizes) == len(maps)):
        return None
    probe = _probed(maps, run)
    if probe is None:
        return None
    for descending in (True, False):
        ordered = sorted(maps, key=lambda m: m.shape[2] * m.shape[3], reverse=descending)
        found = _v5(ordered, probe) if len(sizes) == len(maps) else _v8(ordered, probe)
        if found is not None:
            return found
    return None


def _runner(graph: Graph, tail: Tail) -> Run | None:
    from npulab.passes.certificate import session
    from npulab.passes.rewrite import Rewrite

    assert graph.header is not None
    alone = replace(graph, nodes=tail.nodes, inputs=tail.maps, header=replace(graph.header, declared=tail.maps))
    try:
        made = session(Rewrite(alone).graph())
    except UnsupportedError:  # no such operator here: nothing can be measured
        return None
    names = [graph.values[v].name for v in graph.outputs]
    return lambda feeds: dict(zip(names, made.run(names, feeds), strict=True))


def _probed(values: Sequence[Map], run: Run) -> Probe | None:
    rng = np.random.default_rng(0)
    maps = {v.name: rng.normal(0, 2, v.shape).astype(np.float32) for v in values}
    try:
        zeros = run({v.name: np.zeros(v.shape, np.float32) for v in values})
        random = run(maps)
    except Exception:  # the runtime is C++: it raises what it likes
        return None
    return Probe(zeros, random, maps) if all(np.isfinite(x).all() for x in (*zeros.values(), *random.values())) \
        else None


# YOLOv5


def _v5(values: Sequence[Map], probe: Probe) -> YoloV5 | None:
    channels = values[0].shape[1]
    if any(v.shape[1] != channels for v in values):
        return None
    places = [v.shape[2] * v.shape[3] for v in values]
    for boxes in _boxes(probe, sum(places)):
        count = len(boxes) // sum(places)
        if count > ANCHORS_MAX or channels % count or channels // count < 6:
            continue
        ends = np.cumsum(places) * count
        rows = np.split(boxes, ends[:-1])
        for order in ("ayx", "yxa"):
            first = [r[:: n] if order == "ayx" else r[:count] for r, n in zip(rows, places, strict=True)]
            strides = tuple(_short(2 * f[0, 0]) for f in first)
            anchors = tuple(tuple((_short(x), _short(y)) for x, y in f[:, 2:]) for f in first)
            if min(strides) <= 0 or min(min(a) for level in anchors for a in level) <= 0:
                continue
            parts = yolov5_parts([probe.maps[v.name] for v in values], strides, anchors, order)
            results = _results(probe.random, parts)
            if results is not None:
                return YoloV5(maps=tuple(v.name for v in values), strides=strides, anchors=anchors,
                              order="ayx" if order == "ayx" else "yxa", results=results)
    return None


def _boxes(probe: Probe, multiple: int) -> Iterator[NDArray[Any]]:
    """What may be boxes (N, 4) of centre and size among the outputs on zeros; N a multiple of `multiple`."""
    for x in probe.zeros.values():
        for last in (True, False):
            rows = x[0] if last else x[0].T
            if rows.shape[0] < multiple or rows.shape[0] % multiple or rows.shape[1] < 4:
                continue
            a = rows[:, :4].astype(np.float64)
            yield a
            for low, high in ((a[:, :2], a[:, 2:]), (a[:, 1::-1], a[:, :1:-1])):  # x, y first; y, x first
                yield np.concatenate([(low + high) / 2, high - low], 1)


def _short(x: float) -> float:
    """A number of float32 without the digits that arithmetic in float32 adds."""
    return float(f"{float(x):.6g}")


# YOLOv8


def _v8(values: Sequence[Map], probe: Probe) -> YoloV8 | None:
    levels: dict[tuple[int, ...], list[Map]] = {}
    for v in values:
        levels.setdefault(v.shape[2:], []).append(v)
    if any(len(pair) != 2 for pair in levels.values()):
        return None
    places = [h * w for h, w in levels]
    channels = sorted({v.shape[1] for v in values})
    if len(channels) > 2:
        return None
    # where both have as many channels, each may be the boxes
    pairings = [[sorted(p, key=lambda v: v.shape[1] == c) for p in levels.values()] for c in channels[::-1]] \
        if len(channels) == 2 else [list(levels.values()), [p[::-1] for p in levels.values()]]
    for pairs in pairings:
        bins, odd = divmod(pairs[0][0].shape[1], 4)
        if odd or bins < 2 or len({p[0].shape[1] for p in pairs}) > 1:
            continue
        for boxes in _boxes(probe, sum(places)):
            if len(boxes) != sum(places):
                continue
            firsts = np.cumsum([0, *places[:-1]])
            strides = tuple(_short(w / (bins - 1)) for w in boxes[firsts, 2])
            if min(strides) <= 0:
                continue
            parts = yolov8_parts([probe.maps[b.name] for b, _ in pairs], [probe.maps[c.name] for _, c in pairs],
                                 strides)
            results = _results(probe.random, parts)
            if results is not None:
                return YoloV8(boxes=tuple(b.name for b, _ in pairs), classes=tuple(c.name for _, c in pairs),
                              strides=strides, results=results)
    return None


# both


def _results(outputs: Arrays, parts: Mapping[str, NDArray[Any]]) -> tuple[Result, ...] | None:
    """How each output is made of the parts, if every one is."""
    found = []
    wide = {"xywh": 4, "xyxy": 4, "yxyx": 4, **{k: v.shape[1] for k, v in parts.items()}}
    forms: list[tuple[Column, ...]] = [(c,) for c in CORNERS]
    for c in CORNERS:
        forms += [(c, "object", "classes"), (c, "scores"), (c, "object", "scores"), (c, "object")]
    forms += [("scores",), ("classes",), ("object",), ("object", "classes")]
    for name, x in outputs.items():
        fit = next((Result(name=name, columns=form, last=last) for last in (True, False) for form in forms
                    if all(c in wide for c in form)
                    and _equal(x[0] if last else x[0].T, form, parts, sum(wide[c] for c in form))), None)
        if fit is None:
            return None
        found.append(fit)
    return tuple(found)


def _equal(rows: NDArray[Any], form: Sequence[str], parts: Mapping[str, NDArray[Any]], width: int) -> bool:
    if rows.shape != (len(parts["xywh"]), width):
        return False
    at = 0
    for c in form:
        want = turned(parts["xywh"], c) if c in CORNERS else parts[c]
        got = rows[:, at : at + want.shape[1]]
        at += want.shape[1]
        if np.abs(got - want).max() > TOLERANCE * np.abs(want).max():
            return False
    return True
