"""Matrix products as convolutions of 1x1, and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npulab.ir import Node
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass
from npulab.passes.windows import add, add_conv, add_reshape, attributes, convolution, floats, image, nodes

WEIGHTS_MAX = 1 << 26


def to_convolution(r: Rewrite) -> list[str]:
    """A Gemm or MatMul of a matrix with constant weights is a convolution: of 1x1, or, behind a Flatten or Reshape of
    an image, with a kernel as large as the image, which then is not flattened before but behind."""
    done = []
    for n in nodes(r, "Gemm", "MatMul"):
        found = _product(r, n)
        v = r.values[n.inputs[0]]
        if found is None or not v.has_shape or v.dynamic_axes or len(v.shape) != 2 \
                or v.shape[1] != found[0].shape[1]:
            continue
        weights, bias = found
        name, rows = n.name or "product", v.shape[0]
        flat = r.maker(n.inputs[0], "Flatten", "Reshape")
        shape = image(r, flat.inputs[0]) if flat is not None else None
        if flat is not None and shape is not None and shape[0] == rows and v.shape[1] == np.prod(shape[1:]):
            data, kernel = flat.inputs[0], shape[1:]
        else:
            data, kernel = add_reshape(r, n, f"{name}_image", n.inputs[0], (*v.shape, 1, 1)), (v.shape[1], 1, 1)
        constant = r.add_constant(f"{name}_bias", bias) if bias is not None else -1
        value = add_conv(r, n, name, data, weights.reshape(-1, *kernel), constant)
        if flat is not None and getattr(flat.op, "name", "") == "Flatten":
            value = add(r, n, f"{name}_flat", "Flatten", (value,), {"axis": 1}, shape=(rows, len(weights)))
        else:
            value = add_reshape(r, n, f"{name}_flat", value, (rows, len(weights)))
        r.substitute(n.outputs[0], value)
        done.append(f"{name}: a convolution of {kernel[1]}x{kernel[2]}")
    return done


def _product(r: Rewrite, n: Node) -> tuple[NDArray[np.float32], NDArray[np.float32] | None] | None:
    """(weights [outputs, inputs], bias) of a Gemm or MatMul with constants, alpha and beta taken in."""
    weights, a = floats(r, n.inputs[1]), attributes(n)
    if weights is None or weights.ndim != 2 or weights.size > WEIGHTS_MAX or a.get("transA"):
        return None
    if n.op.name == "MatMul":
        return np.ascontiguousarray(weights.T), None
    bias = floats(r, n.inputs[2]) if len(n.inputs) > 2 else None
    if len(n.inputs) > 2 and n.inputs[2] >= 0 and bias is None:
        return None
    w = weights if a.get("transB") else weights.T
    if bias is not None:
        if bias.size not in (1, len(w)) or (bias.ndim == 2 and bias.shape[0] != 1) or bias.ndim > 2:
            return None
        bias = np.broadcast_to(bias.reshape(-1) * np.float32(a.get("beta", 1.0)), len(w)).astype(np.float32)
    return (np.ascontiguousarray(w) * np.float32(a.get("alpha", 1.0))).astype(np.float32), bias


def to_gemm(r: Rewrite) -> list[str]:
    """A convolution of one group with no padding whose kernel is as large as its image is a Gemm between two
    Reshapes."""
    done = []
    for n in nodes(r, "Conv"):
        c = convolution(r, n)
        if c is None or c.groups != 1 or c.reach != c.size or any(c.pads) or c.dilations != (1, 1):
            continue
        depth, out_c = int(np.prod(c.weights.shape[1:])), len(c.weights)
        value = add_reshape(r, n, f"{c.name}_flat", c.data, (c.batch, depth))
        inputs = [value, r.add_constant(f"{c.name}_weights", c.weights.reshape(out_c, depth)),
                  *([c.bias] if c.bias >= 0 else [])]
        value = add(r, n, c.name, "Gemm", inputs, {"transB": 1}, shape=(c.batch, out_c))
        r.substitute(n.outputs[0], add_reshape(r, n, f"{c.name}_image", value, (c.batch, out_c, 1, 1)))
        done.append(f"{c.name}: a Gemm of {depth} by {out_c}")
    return done


CONVOLUTION = Pass("gemm-to-convolution", to_convolution, always=False)
GEMM = Pass("convolution-to-gemm", to_gemm, always=False)
