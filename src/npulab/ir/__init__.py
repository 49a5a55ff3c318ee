"""The Graph and its parts."""

from npulab.ir.graph import Graph, Node
from npulab.ir.types import DType, Quantization, Value

__all__ = ["DType", "Graph", "Node", "Quantization", "Value"]
