"""Operators of ONNX that compute on 8 bits, taken apart: dequantize, compute in floats, quantize.

Source: ONNX's operators QLinearConv and QLinearMatMul, ONNX Runtime's contrib operators of the domain com.microsoft.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from npulab.ir import Node
from npulab.ir.ops import OnnxOp
from npulab.passes.rewrite import Rewrite
from npulab.passes.types import Pass

ONE_INPUT = {"QLinearGlobalAveragePool": "GlobalAveragePool", "QLinearAveragePool": "AveragePool",
             "QLinearSigmoid": "Sigmoid", "QLinearLeakyRelu": "LeakyRelu", "QLinearSoftmax": "Softmax",
             "QLinearReduceMean": "ReduceMean"}
"""Inputs: x, its scale and zero point, scale and zero point of the result."""
TWO_INPUTS = {"QLinearAdd": "Add", "QLinearMul": "Mul", "QLinearMatMul": "MatMul"}
"""Inputs: a, its scale and zero point, b, its scale and zero point, scale and zero point of the result."""


def expand(r: Rewrite) -> list[str]:
    """QLinearConv and its relatives become DequantizeLinear, the float operator and QuantizeLinear."""
    done = []
    for n in r.live():
        op = n.op
        if not isinstance(op, OnnxOp) or op.domain not in ("", "com.microsoft") or op.attributes.get("channels_last"):
            continue
        own = {k: v for k, v in op.attributes.items() if k not in ("channels_last", "opset")}
        at = _Place(r, n)
        if op.name == "QLinearConv":
            x, w = at.real(0), at.real(3, axis=0)
            bias = [at.bias(8, 1, 4)] if len(n.inputs) > 8 and n.inputs[8] >= 0 else []
            at.replace("Conv", [x, w, *bias], own, 6)
        elif op.name in TWO_INPUTS:
            inputs = [at.real(0), at.real(3, axis=len(r.values[n.inputs[3]].shape) - 1)]
            at.replace(TWO_INPUTS[op.name], inputs, own, 6)
        elif op.name in ONE_INPUT:
            at.replace(ONE_INPUT[op.name], [at.real(0)], own, 3)
        elif op.name == "QLinearConcat":
            inputs = [at.real(i) for i in range(2, len(n.inputs), 3)]
            at.replace("Concat", inputs, own, 0)
        elif op.name == "QGemm" and len(n.inputs) > 7 and n.inputs[7] >= 0 and op.attributes.get("alpha", 1.0) == 1:
            inputs = [at.real(0), at.real(3, axis=0 if op.attributes.get("transB") else 1)]
            inputs += [at.bias(6, 1, 4)] if n.inputs[6] >= 0 else []
            at.replace("Gemm", inputs, own, 7)
        else:
            continue
        done.append(f"{n.name or op.name}: {op.name} taken apart")
    return done


class _Place:
    """In front of a node, which is to be replaced."""

    def __init__(self, r: Rewrite, node: Node) -> None:
        self.r = r
        self.node = node
        self.name = node.name or f"{node.op.name}_{node.index}"

    def real(self, i: int, axis: int = 1) -> int:
        """Input `i`, whose scale and zero point follow it, dequantized."""
        r, v = self.r, self.node.inputs
        many = r.values[v[i + 1]].elements > 1
        zero = [v[i + 2]] if i + 2 < len(v) and v[i + 2] >= 0 else []
        return self._add("DequantizeLinear", [v[i], v[i + 1], *zero], {"axis": axis} if many else {}, v[i + 1],
                         r.values[v[i]].shape)

    def bias(self, i: int, data_scale: int, weight_scale: int) -> int:
        """Input `i`, 32-bit sums, as floats."""
        r, v = self.r, self.node.inputs
        a, b = r.constant(v[data_scale]), r.constant(v[weight_scale])
        if a is None or b is None:
            return v[i]
        product = np.multiply(a.reshape(-1), b.reshape(-1), dtype=np.float32)
        scale = r.add_constant(f"{self.name}_bias_scale", product if b.size > 1 else product.reshape(()))
        return self._add("DequantizeLinear", [v[i], scale], {"axis": 0} if b.size > 1 else {}, scale,
                         r.values[v[i]].shape)

    def replace(self, op: str, inputs: Sequence[int], attributes: Mapping[str, Any], scale: int) -> None:
        """The node becomes `op`, quantized with the scale and zero point that are its inputs from `scale` on. The
        float operator gets the node's name."""
        r, v = self.r, self.node.inputs
        shape = r.values[self.node.outputs[0]].shape
        r.release_name(self.node)
        out = self._add(op, inputs, attributes, inputs[0], shape, self.name)
        zero = v[scale + 1] if scale + 1 < len(v) and v[scale + 1] >= 0 else r.add_constant(f"{self.name}_zero",
                                                                                          np.array(0, np.uint8))
        r.substitute(self.node.outputs[0], self._add("QuantizeLinear", [out, v[scale], zero], {}, zero, shape))

    def _add(self, op: str, inputs: Sequence[int], attributes: Mapping[str, Any], like: int, shape: tuple[int, ...],
             name: str = "") -> int:
        return self.r.add(self.node, name or f"{self.name}_{op}", op, inputs, attributes, like, shape)


PASS = Pass("q-operators", expand)
