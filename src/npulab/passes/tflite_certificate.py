"""Whether a patched TFLite network, with its post-processing, computes what the untouched one did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.ir import DType, Graph, Value
from npulab.passes.certificate import Agreement, Feeds, agreement, parts, worse
from npulab.passes.head_forms import Run
from npulab.passes.litert import DEFAULT, feeds_of, networks
from npulab.passes.tflite_head import same_detections, unique_names
from npulab.passes.tflite_passes import Patched
from npulab.passes.tflite_yolo import tail, tail_in_floats
from npulab.postprocess import apply
from npulab.postprocess.glue import real
from npulab.postprocess.types import Post, Ssd

TAIL_TOLERANCE = 1e-4
"""Of the largest value, between post-processing and the tail in floats: both are float32, each in its own order."""
STEPS = 16.0
"""Steps of an output's quantization by which a tail that rounds each number on its way may be off what it means. Those
at hand are off by 5 in boxes and by 1 in scores."""
LIMITS = {DType.INT8: (-128, 127), DType.UINT8: (0, 255), DType.INT16: (-(1 << 15), (1 << 15) - 1)}
Array = NDArray[Any]


def compared_tflite(graph: Graph, made: Patched, inputs: Feeds | None = None) -> tuple[list[Agreement], str]:
    """Each output of both networks, in LiteRT, on random inputs and on `inputs`; and with which kernels.

    Of a quantized head that was cut off two things are compared with what post-processing gives: the tail computed in
    floats on the same maps, and the untouched outputs, in steps of their quantization.

    Raises: UsageError if LiteRT is not installed; UnsupportedError if it does not run one of them.
    """
    post = made.post
    if made.head is not None and post is not None and isinstance(post.stages[0], Ssd):
        return same_detections(graph, replace(made.head, data=made.data), inputs), DEFAULT
    names = unique_names(graph, graph.outputs)
    outputs = {names[v]: graph.values[v] for v in graph.outputs}
    both = networks(graph, list(outputs), made.data, list(post.body) if post else list(outputs))
    rounded = rounding_tail(graph) if post else None
    found: dict[str, Agreement] = {}
    for feed in feeds_of(graph, inputs):
        wanted, given = both.first(feed), both.second(feed)
        restored = apply(post, given) if post else given
        rows = _plain(outputs, wanted, restored, post) if post is None or rounded is None else (
            *_beside_floats(rounded(_first(post, given)), restored, post),
            *_beside_steps(graph, outputs, wanted, restored, post))
        for now in rows:
            found[now.output] = worse(found[now.output], now) if now.output in found else now
    return list(found.values()), both.kernels


def rounding_tail(graph: Graph) -> Run | None:
    """The tail in floats, if the network's own rounds to integers on its way."""
    t = tail(graph)
    rounds = t is not None and any(graph.values[v].quantization for n in t.nodes for v in n.outputs if v >= 0)
    return tail_in_floats(graph, t) if t is not None and rounds else None


def _first(post: Post, maps: dict[str, Array]) -> dict[str, Array]:
    """A body's maps as real numbers, channels before height and width."""
    return {name: np.ascontiguousarray(x.transpose(0, 3, 1, 2)) for name, x in real(maps, post.quantization).items()}


def _plain(outputs: Iterable[str], wanted: dict[str, Array], given: dict[str, Array], post: Post | None
           ) -> Iterator[Agreement]:
    for name in outputs:
        for part, x, y in parts(name, wanted[name], given[name], post):
            yield agreement(part, x, y)


def _beside_floats(exact: dict[str, Array], given: dict[str, Array], post: Post) -> Iterator[Agreement]:
    for name in exact:
        for part, x, y in parts(name, exact[name], given[name], post):
            yield replace(agreement(f"{part}, tail in floats", x, y), limit=TAIL_TOLERANCE)


def _beside_steps(graph: Graph, outputs: dict[str, Value], wanted: dict[str, Array], given: dict[str, Array],
                  post: Post) -> Iterator[Agreement]:
    """Real numbers, ours within what the quantization of the network's can say."""
    for name, v in outputs.items():
        n = graph.producer.get(v.index)
        last = graph.values[n.inputs[0]] if n is not None and n.op.name == "DEQUANTIZE" else v
        x, y, q = wanted[name], given[name], last.quantization
        if q is not None and last.dtype in LIMITS:
            low, high = ((edge - q.zero_point) * q.scale for edge in LIMITS[last.dtype])
            y = np.clip(y, low, high)
            x = x if last is not v else (x.astype(np.float64) - q.zero_point) * q.scale
        for part, a, b in parts(name, x, y, post):
            now = agreement(f"{part}, untouched", a, b)
            yield replace(now, steps=now.largest / q.scale, limit=STEPS) if q else replace(now, limit=np.inf)
