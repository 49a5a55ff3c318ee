"""Padding into the convolution or pooling behind it."""

from __future__ import annotations

from typing import Any

from npulab.ir.ops import OnnxOp
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def fold(r: Rewrite) -> list[str]:
    """A Pad with zeros of rows and columns, read by a convolution alone, becomes padding of that convolution."""
    done = []
    for n in r.live():
        op = n.op
        if not isinstance(op, OnnxOp) or op.domain or op.name != "Pad" \
                or op.attributes.get("mode", "constant") != "constant":
            continue
        reader = r.only_reader(n.outputs[0], "Conv")
        pads = r.constant(n.inputs[1]) if len(n.inputs) > 1 else None
        own: Any = op.attributes.get("pads") if pads is None else pads.tolist()
        value: Any = op.attributes.get("value", 0.0)
        if len(n.inputs) > 2 and n.inputs[2] >= 0:
            constant = r.constant(n.inputs[2])
            value = None if constant is None or constant.size != 1 else float(constant.reshape(-1)[0])
        if reader is None or own is None or value != 0 or len(n.inputs) > 3 or reader.inputs[0] != n.outputs[0]:
            continue
        rank = len(own) // 2
        if any(own[i] or own[rank + i] for i in (0, 1)) or min(own) < 0:
            continue
        assert isinstance(reader.op, OnnxOp)
        if reader.op.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            continue
        theirs: Any = reader.op.attributes.get("pads", (0,) * (2 * rank - 4))
        total = tuple(a + b for a, b in zip(theirs, (*own[2:rank], *own[rank + 2 :]), strict=True))
        attributes = {k: v for k, v in reader.op.attributes.items() if k != "auto_pad"} | {"pads": total}
        r.change(reader, attributes=attributes, inputs=(n.inputs[0], *reader.inputs[1:]))
        done.append(f"{n.name or op.name}: padding of {reader.name or reader.op.name}")
    return done


PASS = Pass("pads", fold)
