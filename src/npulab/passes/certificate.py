"""Whether two graphs compute the same, by running both in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError, UsageError, runtime_said
from npulab.exporters.onnx import to_onnx
from npulab.ir import DType, Graph, Value
from npulab.passes.bounds import affordable, limited_run
from npulab.postprocess import apply
from npulab.postprocess.types import Post, YoloV5, YoloV8

RUNS = 3
"""Random inputs that both graphs get."""
TOLERANCE = 1e-5
"""Of the largest output, that what is called exact may differ: sums of floats in another order."""
Feeds = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """One output over all runs: the largest difference, that as a share of the largest value, and the least cosine.

    limit  the share up to which both are called equal.
    steps  the largest difference in steps of the output's quantization, where rounding is part of the comparison; then
           `limit` counts steps.
    """

    output: str
    largest: float
    relative: float
    cosine: float
    limit: float = TOLERANCE
    steps: float | None = None

    @property
    def equal(self) -> bool:
        return (self.relative if self.steps is None else self.steps) <= self.limit


def compared(before: Graph, after: Graph, inputs: Feeds | None = None, post: Post | None = None) -> list[Agreement]:
    """Each output of two graphs with the same inputs and outputs, on random inputs and on `inputs` if there are any.

    post  what makes the outputs of `before` from those of `after`. Boxes, objectness and classes that it puts into one
          output are then compared apart, because boxes are numbers of pixels and would hide the others.

    Raises: UsageError if ONNX Runtime is not installed; UnsupportedError if it does not run one of the graphs.
    """
    affordable(before)
    affordable(after)
    first, second = session(before), session(after)
    feeds = [random_inputs(before, seed) for seed in range(RUNS)] + ([inputs] if inputs else [])
    names = [before.values[v].name for v in before.outputs]
    others = [after.values[v].name for v in after.outputs]
    found: dict[str, Agreement] = {}
    for feed in feeds:
        try:
            wanted = dict(zip(names, limited_run(first, names, feed), strict=True))
            given = dict(zip(others, limited_run(second, others, feed), strict=True))
        except Exception as e:  # the runtime is C++: it raises what it likes
            raise UnsupportedError(f"ONNX Runtime does not run '{before.name}'", got=runtime_said(e)) from None
        if post is not None:
            given = apply(post, given)
        for name in names:
            for part, x, y in parts(name, wanted[name], given[name], post):
                now = agreement(part, x, y)
                found[part] = worse(found[part], now) if part in found else now
    return list(found.values())


def parts(name: str, x: NDArray[Any], y: NDArray[Any], post: Post | None
          ) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """An output, or its groups of columns, in both networks."""
    result = next((r for s in (post.stages if post else ()) if isinstance(s, YoloV5 | YoloV8) for r in s.results
                   if r.name == name and len(r.columns) > 1), None)
    if result is None or x.shape != y.shape:
        yield name, x, y
        return
    at, rest, axis = 0, x.shape[2 if result.last else 1], 2 if result.last else 1
    wide = {"xywh": 4, "xyxy": 4, "yxyx": 4, "object": 1}
    for column in result.columns:
        width = wide.get(column, rest - at)
        one, other = (np.take(z, range(at, at + width), axis) for z in (x, y))
        at += width
        yield f"{name}: {column}", one, other


def session(graph: Graph) -> Any:
    """The graph in ONNX Runtime, without its own optimizations.

    Raises: UsageError if that is not installed; UnsupportedError if it does not load the graph.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UsageError("what a patch changes is measured with ONNX Runtime, which is not installed",
                         try_="pip install 'npulab[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(to_onnx(graph), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise UnsupportedError(f"ONNX Runtime does not load '{graph.name}'", got=runtime_said(e)) from None


def random_inputs(graph: Graph, seed: int) -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(seed)
    return {v.name: _values(v, rng) for v in (graph.values[i] for i in graph.inputs)}


def _values(v: Value, rng: np.random.Generator) -> NDArray[np.generic]:
    """Numbers as pictures have them: floats from 0 to 1, integers over 8 bits."""
    if v.dtype.numpy is None or v.dtype is DType.BOOL or not v.has_shape or v.dynamic_axes:
        raise UnsupportedError(f"there are no random values for the input '{v.name}'", got=str(v),
                               want="numbers of a fixed size", try_="--dim NAME=SIZE")
    if np.issubdtype(v.dtype.numpy, np.floating):
        return rng.random(v.shape).astype(v.dtype.numpy)
    low = -128 if np.issubdtype(v.dtype.numpy, np.signedinteger) else 0
    return rng.integers(low, low + 256, v.shape).astype(v.dtype.numpy)


def agreement(name: str, x: NDArray[np.generic], y: NDArray[np.generic]) -> Agreement:
    if x.shape != y.shape:
        return Agreement(name, np.inf, np.inf, -1.0)
    a, b = (np.asarray(z, np.float64).reshape(-1) for z in (x, y))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    difference = float(np.max(np.where(same, 0.0, np.abs(a - b)), initial=0.0))
    top = float(np.max(np.abs(np.where(np.isfinite(a), a, 0.0)), initial=0.0))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else float(same.all())
    return Agreement(name, difference, difference / top if top else difference, cosine if np.isfinite(cosine) else -1.0)


def worse(a: Agreement, b: Agreement) -> Agreement:
    steps = None if a.steps is None or b.steps is None else max(a.steps, b.steps)
    return Agreement(a.output, max(a.largest, b.largest), max(a.relative, b.relative), min(a.cosine, b.cosine), a.limit,
                     steps)
