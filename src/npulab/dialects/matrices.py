"""Products with matrices: FULLY_CONNECTED with constant ones, BATCH_MATMUL with computed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npulab.dialects import layouts
from npulab.dialects.conversion import Conversion, NotThereError
from npulab.dialects.functions import scalar
from npulab.dialects.integers import PLAIN
from npulab.dialects.weights import integer_bias, integer_weights


def gemm(c: Conversion) -> None:
    alpha, beta = float(c.attribute("alpha", 1.0)), float(c.attribute("beta", 1.0))
    columns = c.out.shape[1]
    bias = c.constant(2)
    fits = not c.has(2) or (bias is not None and bias.size in (1, columns) and bias.shape[:-1] in ((), (1,)))
    across = 0 if c.attribute("transB", 0) else 1
    order = (1, 0) if c.attribute("transA", 0) else (0, 1)
    if c.constant(1) is None or not fits:
        if c.integer:
            raise NotThereError("such operands in integers")
        a = _plain_matrix(c, 0)
        product = c.step("BATCH_MATMUL", [a, _plain_matrix(c, 1)], c.out.shape, adj_x=bool(c.attribute("transA", 0)),
                         adj_y=bool(c.attribute("transB", 0)), asymmetric_quantize_inputs=False)
        product = _with_addend(c, product, alpha, beta)
        c.put(product if c.activation == "NONE" else c.step(c.activation, [product]), (0, 1))
        return
    if c.integer and alpha != 1:
        raise NotThereError("alpha in integers")
    data = c.input(0, order)
    _matrix(c, data, across, alpha, lambda d, q: (
        integer_bias(c, c.node.inputs[2] if c.has(2) else -1, d, q, columns, beta) if q else
        c.file.constant(f"{c.file.origin}_bias", np.broadcast_to(
            np.zeros(1, np.float32) if bias is None else (bias.reshape(-1) * beta).astype(np.float32), (columns,)))))


def _plain_matrix(c: Conversion, i: int) -> int:
    return c.input(i, layouts.plain(len(c.shape(i))))


def _with_addend(c: Conversion, product: int, alpha: float, beta: float) -> int:
    if alpha != 1:
        product = c.step("MUL", [product, scalar(c, alpha)], **PLAIN)
    if not c.has(2) or beta == 0:
        return product
    addend = c.aligned(2, (0, 1))
    if beta != 1:
        addend = c.step("MUL", [addend, scalar(c, beta)], **PLAIN)
    return c.step("ADD", [product, addend], c.out.shape, **PLAIN)


def _matrix(c: Conversion, data: int, across: int, alpha: float, bias: Callable[[int, Any], int]) -> None:
    """FULLY_CONNECTED with the constant matrix of input 1, whose results lie along its axis `across`."""
    own = None
    if c.integer:
        own = integer_weights(c, "FULLY_CONNECTED", across, 0)
        array = own.array
    else:
        array = c.needed(1, "weights").astype(np.float32)
        array = array if alpha == 1 else (array * np.float32(alpha)).astype(np.float32)
    array = array if across == 0 else array.T
    if c.node.inputs[0] in c.columns:  # what a Reshape left in another order
        shape, order = c.columns[c.node.inputs[0]]
        array = array.reshape(len(array), *shape[1:]).transpose(0, *order[1:]).reshape(len(array), -1)
    q = own.quantization if own else None
    weights = own.constant(c, array) if own else c.file.constant(f"{c.file.origin}_weights", array)
    rank = len(c.out.shape)
    c.emit("FULLY_CONNECTED", [data, weights, bias(data, q)], layouts.plain(rank), version=5 if rank != 2 else None,
           fused_activation_function=c.activation, keep_num_dims=rank != 2)


def matmul(c: Conversion) -> None:
    a, b = c.shape(0), c.shape(1)
    if min(len(a), len(b)) < 2:
        raise NotThereError("vectors")
    if c.constant(1) is not None and len(b) == 2:
        data = c.input(0, layouts.plain(len(a)))
        addend = c.quantities.real(c.addend) if c.addend >= 0 else np.zeros(b[1], np.float32)
        assert addend is not None
        _matrix(c, data, 1, 1.0, lambda d, q: integer_bias(c, c.addend, d, q, b[1]) if q
                else c.file.constant(f"{c.file.origin}_bias", addend.reshape(-1)))
        return
    if c.integer and c.dtype == "uint8":
        raise NotThereError("products of two tensors in uint8")
    operands, swapped = [], []
    for i, shape in ((0, a), (1, b)):
        rank = len(shape)
        other = (*range(rank - 2), rank - 1, rank - 2)
        swap = c.node.inputs[i] in c.held and c.order(i) == other
        operands.append(c.input(i, other if swap else layouts.plain(rank)))
        swapped.append(swap)
    c.emit("BATCH_MATMUL", operands, layouts.plain(len(c.out.shape)), adj_x=swapped[0], adj_y=swapped[1],
           asymmetric_quantize_inputs=False)
    if c.activation != "NONE":
        held = c.held[c.end]
        c.put(c.step(c.activation, [held.tensor]), held.order)
