"""Whether two graphs compute the same, by running both in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError, UsageError
from npulab.exporters.onnx import to_onnx
from npulab.ir import DType, Graph, Value

RUNS = 3
"""Random inputs that both graphs get."""
TOLERANCE = 1e-5
"""Of the largest output, that what is called exact may differ: sums of floats in another order."""
Feeds = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """One output over all runs: the largest difference, that as a share of the largest value, and the least cosine."""

    output: str
    largest: float
    relative: float
    cosine: float

    @property
    def equal(self) -> bool:
        return self.relative <= TOLERANCE


def compared(before: Graph, after: Graph, inputs: Feeds | None = None) -> list[Agreement]:
    """Each output of two graphs with the same inputs and outputs, on random inputs and on `inputs` if there are any.

    Raises: UsageError if ONNX Runtime is not installed; UnsupportedError if it does not run one of the graphs.
    """
    first, second = _session(before), _session(after)
    feeds = [_random(before, seed) for seed in range(RUNS)] + ([inputs] if inputs else [])
    names = [before.values[v].name for v in before.outputs]
    found = [Agreement(name, 0.0, 0.0, 1.0) for name in names]
    for feed in feeds:
        try:
            pairs = zip(first.run(names, dict(feed)), second.run(names, dict(feed)), strict=True)
        except Exception as e:  # the runtime is C++: it raises what it likes
            raise UnsupportedError(f"ONNX Runtime does not run '{before.name}'", got=str(e).strip()[:300]) from None
        found = [_worse(a, _agreement(a.output, x, y)) for a, (x, y) in zip(found, pairs, strict=True)]
    return found


def _session(graph: Graph) -> Any:
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
        raise UnsupportedError(f"ONNX Runtime does not load '{graph.name}'", got=str(e).strip()[:300]) from None


def _random(graph: Graph, seed: int) -> dict[str, NDArray[np.generic]]:
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


def _agreement(name: str, x: NDArray[np.generic], y: NDArray[np.generic]) -> Agreement:
    if x.shape != y.shape:
        return Agreement(name, np.inf, np.inf, -1.0)
    a, b = (np.asarray(z, np.float64).reshape(-1) for z in (x, y))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    difference = float(np.max(np.where(same, 0.0, np.abs(a - b)), initial=0.0))
    top = float(np.max(np.abs(np.where(np.isfinite(a), a, 0.0)), initial=0.0))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else float(same.all())
    return Agreement(name, difference, difference / top if top else difference, cosine if np.isfinite(cosine) else -1.0)


def _worse(a: Agreement, b: Agreement) -> Agreement:
    return Agreement(a.output, max(a.largest, b.largest), max(a.relative, b.relative), min(a.cosine, b.cosine))
