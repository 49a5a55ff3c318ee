"""One network in two dialects: ONNX graphs to TFLite graphs and back, in floats and in integers.

What is converted computes the same, up to the rounding of floats or a step of a quantized layer; it is not the same
file: operators are fused, constants folded, and pictures come and go in the order that the dialect has (channels last
in TFLite, first in ONNX) unless `keep_layout`.
"""

from __future__ import annotations

from npulab.dialects.from_onnx import Converted, from_onnx
from npulab.dialects.from_tflite import from_tflite
from npulab.ir import Graph

__all__ = ["Converted", "from_onnx", "from_tflite", "to_onnx", "to_tflite"]


def to_tflite(graph: Graph, keep_layout: bool = False) -> Graph:
    """The graph as a TFLite graph; a TFLite graph as it is. `source` is the file.

    Raises: UnsupportedError naming every operator that TFLite has no words for.
    """
    return graph if graph.format == "tflite" else from_onnx(graph, keep_layout).graph


def to_onnx(graph: Graph, keep_layout: bool = False) -> Graph:
    """The graph as an ONNX graph of opset 17, quantized layers between DequantizeLinear and QuantizeLinear; an ONNX
    graph as it is.

    Raises: UnsupportedError naming every operator that there is no translation for.
    """
    return graph if graph.format == "onnx" else from_tflite(graph, keep_layout).graph
