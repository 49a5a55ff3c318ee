"""TFLite networks run by LiteRT, to compare them before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError, UsageError
from npulab.ir import Graph
from npulab.passes.bounds import affordable
from npulab.passes.certificate import RUNS, Feeds, random_inputs

Arrays = dict[str, NDArray[Any]]
REFERENCE_MACS = 60_000_000
"""Multiplications up to which LiteRT's reference kernels are used, which take some seconds for as many."""
PLAIN = "BUILTIN_WITHOUT_DEFAULT_DELEGATES"
REFERENCE, DEFAULT = "LiteRT's reference kernels", "LiteRT's default kernels, without delegates"


@dataclass(frozen=True, slots=True)
class Networks:
    """Both networks, ready to run with the same kernels; outputs come by name."""

    first: Callable[[Feeds], Arrays]
    second: Callable[[Feeds], Arrays]
    kernels: str


def networks(before: Graph, outputs: Sequence[str], data: bytes, others: Sequence[str], quick: bool = False
             ) -> Networks:
    """A network, whose outputs get these names, and the file `data` that is to take the same inputs.

    quick  the default kernels at once: what both have in common is computed alike by any.

    Raises: UsageError if LiteRT is not installed; UnsupportedError if it does not load one of them, or if that has
    tensors that are not worth their memory. So does running them.
    """
    affordable(before)
    files, kernels = (bytes(before.source), data), DEFAULT
    if quick or multiplications(before) > REFERENCE_MACS:
        first, second = (_interpreter(x, before.name, PLAIN) for x in files)
    else:
        try:
            first, second = (_interpreter(x, before.name, "BUILTIN_REF") for x in files)
            kernels = REFERENCE
        except UnsupportedError:  # an operator that has no reference kernel
            first, second = (_interpreter(x, before.name, PLAIN) for x in files)
    return Networks(lambda feeds: _run(first, before, outputs, feeds),
                    lambda feeds: _run(second, before, others, feeds), kernels)


def feeds_of(graph: Graph, inputs: Feeds | None) -> list[Feeds]:
    """Random inputs, and those that the user gave. Open axes count as 1."""
    fixed = replace(graph, values=tuple(replace(v, dynamic_axes=()) for v in graph.values))
    return [*(random_inputs(fixed, seed) for seed in range(RUNS)), *([inputs] if inputs else [])]


def multiplications(graph: Graph) -> int:
    """About how many one run takes: of what has weights."""
    found = 0
    for n in graph.nodes:
        if n.op.name in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL"):
            weights, out = graph.value(n, 1), graph.values[n.outputs[0]]
            if weights is not None and weights.shape:
                # a result takes the weights of one filter; depthwise ones lie along the last axis
                filters = weights.shape[-1] if n.op.name == "DEPTHWISE_CONV_2D" else weights.shape[0]
                found += out.elements * math.prod(weights.shape) // max(filters, 1)
    return found


def _interpreter(data: bytes, name: str, kind: str) -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError:
        raise UsageError("what a patch changes is measured with LiteRT, which is not installed",
                         try_="pip install 'npulab[litert]'") from None
    try:
        made = Interpreter(model_content=data, num_threads=1,
                           experimental_op_resolver_type=getattr(OpResolverType, kind))
        made.allocate_tensors()
    except (ValueError, RuntimeError, TypeError, MemoryError) as e:
        raise UnsupportedError(f"LiteRT does not load '{name}'", got=str(e).strip()[:300]) from None
    return made


def _run(interpreter: Any, graph: Graph, names: Sequence[str], feed: Mapping[str, NDArray[Any]]) -> Arrays:
    try:
        interpreter.reset_all_variables()
        for detail, v in zip(interpreter.get_input_details(), graph.inputs, strict=True):
            interpreter.set_tensor(detail["index"], feed[graph.values[v].name])
        interpreter.invoke()
        details = interpreter.get_output_details()
        return {name: np.array(interpreter.get_tensor(d["index"])) for name, d in zip(names, details, strict=True)}
    except (ValueError, RuntimeError, TypeError, MemoryError) as e:
        raise UnsupportedError(f"LiteRT does not run '{graph.name}'", got=str(e).strip()[:300]) from None
