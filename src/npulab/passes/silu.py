"""SiLU replaced by what more chips have. Not equivalent: the network has to be trained again."""

from __future__ import annotations

from npulab.ir.ops import OnnxOp
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def to_relu(r: Rewrite) -> list[str]:
    """x * Sigmoid(x) becomes Relu(x). The outputs change: train the network again, or at least look at its accuracy."""
    return _replaced(r, "Relu")


def to_hard_swish(r: Rewrite) -> list[str]:
    """x * Sigmoid(x) becomes HardSwish(x), which is within 0.15 of it. The outputs change: look at the accuracy, and
    train the network again if it fell."""
    return _replaced(r, "HardSwish")


def _replaced(r: Rewrite, other: str) -> list[str]:
    done = []
    for n in r.live():
        op = n.op
        if not isinstance(op, OnnxOp) or op.domain or op.name != "Mul" or len(n.inputs) != 2:
            continue
        for x, gate in (n.inputs, n.inputs[::-1]):
            sigmoid = r.maker(gate, "Sigmoid")
            if sigmoid is not None and sigmoid.inputs[0] == x:
                r.change(n, op=other, inputs=(x,), attributes={})
                done.append(f"{n.name or op.name}: x * Sigmoid(x) is {other}")
                break
    return done


RELU = Pass("silu-to-relu", to_relu, exact=False, always=False)
HARD_SWISH = Pass("silu-to-hardswish", to_hard_swish, exact=False, always=False)
