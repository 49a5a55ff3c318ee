"""Single operators of ONNX networks run by ONNX Runtime, for what is no integer arithmetic: floats, moves, shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from npulab.errors import UnsupportedError
from npulab.ir import DType, Graph, Node
from npulab.ir.ops import OnnxOp
from npulab.reference import accumulate
from npulab.reference.accumulate import open_session
from npulab.reference.types import Array, Step


def single(graph: Graph, node: Node, reads: Sequence[int], dtype: DType | None = None,
           shape: tuple[int | None, ...] | None = None, known: Mapping[int, Array] = MappingProxyType({})) -> Step:
    """The node alone, run by ONNX Runtime; with `dtype`, its first input and its outputs are of that type.

    `known` are inputs that were computed when the network was made ready.

    Raises: UnsupportedError naming the operator if ONNX Runtime is not installed or refuses it.
    """
    if accumulate.runtime() is None:
        raise UnsupportedError(f"{node} of '{graph.name}' needs ONNX Runtime, which is not installed",
                               try_="pip install 'npulab[onnx]'")
    from onnx import TensorProto, helper, numpy_helper

    from npulab.exporters.onnx import CODES, attribute

    op = node.op
    assert isinstance(op, OnnxOp)
    first = node.inputs[0] if node.inputs else -1

    def info(v: int) -> Any:
        moved = dtype is not None and (v == first or v in node.outputs)
        code = CODES[dtype if moved and dtype is not None else graph.values[v].dtype]
        sizes = shape if v == first and shape is not None else (None,) * len(graph.values[v].shape)
        return helper.make_tensor_value_info(f"v{v}", code, sizes if v in reads and graph.values[v].has_shape else None)

    made = helper.make_node(op.name, [f"v{v}" if v >= 0 else "" for v in node.inputs],
                            [f"v{v}" if v >= 0 else "" for v in node.outputs], domain=op.domain)
    made.attribute.extend(attribute(name, value) for name, value in op.attributes.items())
    outputs = [v for v in node.outputs if v >= 0]
    held = {v for v in node.inputs if v >= 0 and v not in reads}
    weights = []
    for v in sorted(held):
        value = graph.values[v]
        if v in known:
            weights.append(numpy_helper.from_array(known[v], f"v{v}"))
        else:
            tensor = TensorProto(name=f"v{v}", data_type=CODES[value.dtype], dims=value.shape)
            tensor.raw_data = bytes(value.constant or b"")
            weights.append(tensor)
    opsets = graph.header.opsets if graph.header else (("", 17),)
    model = helper.make_model(
        helper.make_graph([made], "one", [info(v) for v in reads], [info(v) for v in outputs], weights),
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets], ir_version=8)
    try:
        session = open_session(model.SerializeToString(), optimized=False)
    except Exception as e:  # its errors have no common type of their own
        raise UnsupportedError(f"{node} of '{graph.name}' has no integer arithmetic, and ONNX Runtime refuses it",
                               got=" ".join(str(e).split())[:200]) from e
    names = [f"v{v}" for v in outputs]

    def step(arrays: Sequence[Array]) -> list[Array]:
        found = iter(session.run(names, {f"v{v}": np.ascontiguousarray(a).reshape(a.shape)
                                         for v, a in zip(reads, arrays, strict=True)}))
        return [next(found) if v >= 0 else np.empty(0) for v in node.outputs]

    return step


def sigmoid(graph: Graph, node: Node) -> Callable[[Array], Array]:
    """Sigmoid in float32 by ONNX Runtime's own kernel; without it NumPy's, a last bit off at most."""
    if accumulate.runtime() is None:
        return lambda v: (1 / (1 + np.exp(-v.astype(np.float64)))).astype(np.float32)
    run = single(graph, node, (node.inputs[0],), DType.FLOAT32, (None,))
    return lambda v: run([v])[0]
