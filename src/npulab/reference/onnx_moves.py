"""ONNX operators that give the elements another shape or order and compute nothing: they hold for every type."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from npulab.ir import Graph, Node
from npulab.ir.ops import OnnxOp
from npulab.reference.types import Array, Step, codes


def step_of(graph: Graph, node: Node, reads: Sequence[int], known: Mapping[int, Array] = MappingProxyType({})
            ) -> Step | None:
    """The node as a function of its first input, the one that it `reads`; None if it is no such move, or if where to is
    not known before. `known` are inputs that were computed when the network was made ready."""
    op = node.op
    if not isinstance(op, OnnxOp) or op.domain not in ("", "ai.onnx") or tuple(reads) != tuple(node.inputs[:1]):
        return None
    a: dict[str, Any] = dict(op.attributes)

    def numbers(name: str) -> tuple[int, ...] | None:
        """The second input, or what older opsets have as an attribute."""
        value = graph.value(node, 1)
        if value is not None:
            given = known.get(value.index, codes(value) if value.is_constant else None)
            return None if given is None else tuple(int(n) for n in given.reshape(-1))
        return tuple(int(n) for n in a[name]) if name in a else None

    match op.name:
        case "Flatten":
            axis = int(a.get("axis", 1))
            return lambda arrays: [_flat(arrays[0], axis)]
        case "Reshape":
            shape = numbers("shape")
            if shape is None:
                return None
            whole = bool(a.get("allowzero", 0))
            return lambda arrays: [arrays[0].reshape([
                arrays[0].shape[i] if n == 0 and not whole else n for i, n in enumerate(shape)])]
        case "Squeeze" | "Unsqueeze":
            axes = numbers("axes")
            if axes is None:
                return None
            how = np.squeeze if op.name == "Squeeze" else np.expand_dims
            return lambda arrays: [how(arrays[0], axes)]
        case "Transpose":
            order = a.get("perm")
            return lambda arrays: [arrays[0].transpose(order).copy()]
    return None


def _flat(x: Array, axis: int) -> Array:
    if not -x.ndim <= axis <= x.ndim:
        raise ValueError(f"axis {axis} of {x.ndim}")
    first = x.shape[: axis + x.ndim if axis < 0 else axis]
    return x.reshape(math.prod(first), math.prod(x.shape[len(first) :]))
