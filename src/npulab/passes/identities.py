"""Operators that hand on what they read."""

from __future__ import annotations

from npulab.ir.ops import OnnxOp
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def drop(r: Rewrite) -> list[str]:
    """Identity, Dropout outside training, a Cast to the type there is, a Reshape or Transpose to what there is, and a
    Clip without limits hand on what they read: readers take it from there."""
    done = []
    for n in r.live():
        op = n.op
        if not isinstance(op, OnnxOp) or op.domain or not n.inputs or n.inputs[0] < 0 or len(n.outputs) < 1:
            continue
        source, result = (r.values[v] for v in (n.inputs[0], n.outputs[0]))
        static = source.has_shape and result.has_shape and not source.dynamic_axes and not result.dynamic_axes
        match op.name:
            case "Identity":
                nothing = True
            case "Dropout":
                nothing = len(n.outputs) == 1 and len(n.inputs) < 3
            case "Cast":
                nothing = source.dtype is result.dtype and source.dtype.numpy is not None
            case "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten":
                nothing = static and source.shape == result.shape
            case "Transpose":
                nothing = op.attributes.get("perm") == tuple(range(len(source.shape)))
            case "Clip":
                nothing = not any(v >= 0 for v in n.inputs[1:]) and not {"min", "max"} & op.attributes.keys()
            case _:
                nothing = False
        at_border = result.index in r.outputs and (source.is_constant or source.index in r.source.inputs
                                                   or source.index in r.outputs)
        if nothing and not at_border:
            r.substitute(result.index, source.index)
            done.append(f"{n.name or op.name}: {op.name} dropped")
    return done


PASS = Pass("identities", drop)
