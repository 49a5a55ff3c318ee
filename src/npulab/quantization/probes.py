"""Nodes added to a float network's file to measure what a change would do, without running the change by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from npulab.quantization.emit import float_model
from npulab.quantization.network import Layer, Network
from npulab.quantization.types import Array

AXES_AS_INPUT = 18
"""Opset from which reductions but ReduceSum take their axes as an input (ONNX)."""


class Probed:
    """The float network's file with more nodes. Their tensors' names are new."""

    def __init__(self, net: Network) -> None:
        import onnx

        self.proto = onnx.ModelProto.FromString(float_model(net))
        self.opset = max(o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx"))
        self.stem = "probe"
        while any(v.name.startswith(self.stem) for v in net.graph.values):
            self.stem += "_"
        self.count = 0
        self.original = list(self.proto.graph.node)

    def _name(self) -> str:
        self.count += 1
        return f"{self.stem}{self.count}"

    def constant(self, array: Array) -> str:
        from onnx import numpy_helper

        name = self._name()
        self.proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node; gives its result's name."""
        from onnx import helper

        name = self._name()
        self.proto.graph.node.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def round(self, data: str) -> str:
        """To the nearest integer, half to even, of |x| < 2 ** 22."""
        if self.opset >= 11:
            return self.add("Round", [data])
        magic = self.constant(np.array(1.5 * 2**23, np.float32))  # there float32 has integers only
        return self.add("Sub", [self.add("Add", [data, magic]), magic])

    def reduce(self, op: str, data: str, axes: Sequence[int]) -> str:
        """A reduction other than ReduceSum; the axes are gone."""
        if self.opset >= AXES_AS_INPUT:
            return self.add(op, [data, self.constant(np.array(axes, np.int64))], keepdims=0)
        return self.add(op, [data], keepdims=0, axes=list(axes))

    def again(self, layer: Layer, data: str, weight: Array, bias: Array | None) -> str:
        """The layer once more, with other data, weights and bias, up to its result before the clamp."""
        import onnx

        node = onnx.NodeProto()
        node.CopyFrom(self.original[layer.node])
        node.name = name = self._name()
        del node.input[:], node.output[:]
        node.input.extend([data, self.constant(weight)])
        node.output.append(name)
        if layer.kind != "matmul" and (bias is not None or layer.kind == "gemm"):  # no optional C before opset 11
            node.input.append(self.constant(np.zeros(layer.channels, np.float32) if bias is None else bias))
        self.proto.graph.node.append(node)
        if layer.kind == "matmul" and bias is not None:
            return self.add("Add", [name, self.constant(bias)])
        return name

    def model(self) -> bytes:
        return bytes(self.proto.SerializeToString())
