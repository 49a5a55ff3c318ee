"""An ONNX graph made ready for another dialect: QOperators taken apart, what constants decide decided, GELU named."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from npulab.dialects import qoperators
from npulab.dialects.quantities import is_op
from npulab.exporters.onnx import reread
from npulab.ir import Graph, Node
from npulab.passes import batch_norm, branches, constants, gelu, identities, pads
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

ROUNDS = 8
FOLDED_MAX = 1 << 16
"""Elements of a constant that is spelled out."""
BROADCASTING = ("Add", "Sub", "Mul", "Div", "Max", "Min")


def unexpand(r: Rewrite) -> list[str]:
    """What reads an expanded tensor beside one of that shape broadcasts by itself; small expanded constants are spelled
    out."""
    done = []
    for n in r.live():
        if not is_op(n, "Expand") or n.outputs[0] in r.outputs:
            continue
        out, constant = r.values[n.outputs[0]], r.constant(n.inputs[0])
        if not out.has_shape or out.dynamic_axes:
            continue
        for reader in r.readers(out.index):
            others = [r.values[v] for v in reader.inputs if v != out.index]
            if is_op(reader, *BROADCASTING) and any(v.has_shape and not v.dynamic_axes and v.shape == out.shape
                                                    for v in others):
                r.change(reader, inputs=[n.inputs[0] if v == out.index else v for v in reader.inputs])
                done.append(f"{reader.name}: broadcasts by itself")
        if constant is not None and out.elements <= FOLDED_MAX and r.readers(out.index):
            r.substitute(out.index, r.add_constant(out.name, np.broadcast_to(constant, out.shape)))
            done.append(f"{n.name}: spelled out")
    return done


PASSES = (Pass("unexpand", unexpand),
          qoperators.PASS, constants.PASS, identities.PASS, pads.PASS, batch_norm.PASS, branches.PASS, gelu.FUSE)


class _Quantized(Rewrite):
    """Passes do not see constants being dequantized: the integers are what TFLite wants."""

    def live(self) -> Iterator[Node]:
        return (n for n in super().live() if not is_op(n, "DequantizeLinear"))


def prepared(graph: Graph) -> Graph:
    """The graph behind passes that change no result, shapes inferred anew."""
    for _ in range(ROUNDS):
        changed = False
        for p in PASSES:
            rewrite = _Quantized(graph)
            if p.apply(rewrite):
                graph, changed = rewrite.graph(), True
        if not changed:
            break
        graph = reread(graph)
    return graph
