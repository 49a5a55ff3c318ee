"""What a rewrite costs: multiplications and constants of an ONNX graph."""

from __future__ import annotations

import math

from npulab.ir import Graph, Node

GROWTH = 2
"""Times as many multiplications, and bytes of constants, that a rewrite may leave which nobody asked for by name:
weights with zeros filled in, results computed and thrown away, can outgrow what chips hold and do, and no verdict says
so."""
SPARE_BYTES, SPARE_MACS = 1 << 20, 1 << 24
"""More that it may leave in any case: a small network stays a small one."""


def affordable(before: Graph, after: Graph) -> bool:
    """Whether `after` costs no more than so many times what `before` does."""
    return (constants(after) <= GROWTH * constants(before) + SPARE_BYTES
            and multiplications(after) <= GROWTH * multiplications(before) + SPARE_MACS)


def constants(graph: Graph) -> int:
    """Bytes of them."""
    return sum(len(v.constant or b"") for v in graph.values)


def multiplications(graph: Graph) -> int:
    """Multiply-accumulates of convolutions and matrix products of known sizes."""
    return sum(_of(graph, n) for n in graph.nodes)


def _of(graph: Graph, n: Node) -> int:
    if n.op.name not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or len(n.inputs) < 2:
        return 0
    data, weights, out = (graph.values[v] for v in (*n.inputs[:2], n.outputs[0]))
    if not data.shape or not weights.shape or any(v.dynamic_axes or not v.has_shape for v in (data, weights, out)):
        return 0
    if n.op.name == "Conv":
        return out.elements * math.prod(weights.shape[1:])
    if n.op.name == "ConvTranspose":
        return data.elements * math.prod(weights.shape[1:])
    across = n.op.name == "Gemm" and bool(getattr(n.op, "attributes", {}).get("transA", 0))
    return out.elements * data.shape[0 if across else -1]
