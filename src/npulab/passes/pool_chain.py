"""Large max-pools as chains of small ones."""

from __future__ import annotations

from typing import Any

from npulab.ir.ops import OnnxOp
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass


def chain(r: Rewrite) -> list[str]:
    """A max-pool of 5x5 or larger, square and odd, with stride 1 and padded to the same size, is a chain of 3x3 ones:
    the largest of a window is the largest of the largest of smaller windows (as SPPF does to SPP)."""
    done = []
    for n in r.live():
        op = n.op
        if not isinstance(op, OnnxOp) or op.domain or op.name != "MaxPool" or len(n.outputs) != 1 or not r.wanted(n):
            continue
        kernel: Any = op.attributes.get("kernel_shape")
        half = kernel[0] // 2
        strides: Any = op.attributes.get("strides", (1, 1))
        dilations: Any = op.attributes.get("dilations", (1, 1))
        if len(kernel) != 2 or kernel[0] != kernel[1] or kernel[0] % 2 == 0 or kernel[0] < 5 \
                or tuple(strides) != (1, 1) or tuple(dilations) != (1, 1) or op.attributes.get("pads") != (half,) * 4:
            continue
        name = n.name or "max_pool"
        small = {"kernel_shape": (3, 3), "strides": (1, 1), "pads": (1, 1, 1, 1)}
        value = n.inputs[0]
        for i in range(half - 1):
            value = r.add(n, f"{name}_{i + 1}", "MaxPool", (value,), small)
        r.change(n, inputs=(value,), attributes=small)
        done.append(f"{name}: {kernel[0]}x{kernel[1]} is {half} of 3x3")
    return done


PASS = Pass("pool-chain", chain, always=False)
