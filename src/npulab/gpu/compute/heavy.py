"""Convolutions, products, attention, pools and normalization as layers: what tuned kernels do."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from npulab.errors import InvariantError
from npulab.gpu.compute.convolution import checked
from npulab.gpu.compute.fusing import Group, attributes, is_factor
from npulab.gpu.compute.layers import Builder, RefusedError
from npulab.gpu.compute.moves import INDEX_MAX, literal
from npulab.gpu.compute.problems import Attention, Convolution, LayerNorm, Product, Softmax
from npulab.gpu.compute.views import Shape, dense
from npulab.gpu.compute.windows import Pool, TransposedConvolution
from npulab.ir import Node

NHWC = (0, 2, 3, 1)
NCHW = (0, 3, 1, 2)


def _pair(own: Any, name: str, rank: int) -> tuple[int, ...]:
    found = tuple(own.get(name) or (1,) * rank)
    if len(found) != rank or min(found) < 1 or max(found) > INDEX_MAX:
        raise RefusedError(f"{name} {found}")
    return found


def padding(own: Any, size: Shape, kernel: Shape, strides: Shape, dilations: Shape) -> tuple[int, ...]:
    """Pads as ONNX has them: all beginnings, then all ends. Raises: RefusedError unless kernels can count with them."""
    auto = own.get("auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    if auto == "VALID":
        return (0,) * (2 * len(size))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [max((-(-m // s) - 1) * s + (k - 1) * d + 1 - m, 0)
                  for m, k, s, d in zip(size, kernel, strides, dilations, strict=True)]
        first = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in totals]
        return (*first, *(t - f for t, f in zip(totals, first, strict=True)))
    found = tuple(own.get("pads") or (0,) * (2 * len(size)))
    if len(found) != 2 * len(size) or min(found) < 0 or max(map(sum, zip(
            size, found, found[len(size):], strict=False))) > INDEX_MAX:
        raise RefusedError(f"pads {found}")
    return found


def convolution(b: Builder, g: Group) -> None:
    """Of images, or of rows, which are images one element high."""
    n = g.anchor
    own: Any = attributes(n)
    weights = b.packed(n.inputs[1])
    x = b.get(n.inputs[0])
    if weights is None:
        raise RefusedError("its weights are computed")
    flat = len(x.shape) == 3
    if len(x.shape) not in (3, 4) or weights.ndim != len(x.shape):
        raise RefusedError(f"it is of {len(x.shape) - 2} dimensions")
    rank = len(x.shape) - 2
    strides, dilations = _pair(own, "strides", rank), _pair(own, "dilations", rank)
    pads = padding(own, x.shape[2:], weights.shape[2:], strides, dilations)
    if flat:
        weights, strides, dilations = weights[:, :, None], (1, *strides), (1, *dilations)
        pads = (0, pads[0], 0, pads[1])
    batch, channels = x.shape[:2]
    height, width = (1, x.shape[2]) if flat else x.shape[2:]
    kernel = weights.shape[2:]
    packed = np.ascontiguousarray(weights.transpose(0, 2, 3, 1))
    bias = _bias(b, n, g)
    try:
        what = Convolution(
            batch, height, width, channels, weights.shape[0], (kernel[0], kernel[1]), (strides[0], strides[1]),
            (dilations[0], dilations[1]), (pads[0], pads[1], pads[2], pads[3]), int(own.get("group", 1)),
            g.residual >= 0, g.activation, g.slope, b.number)
        checked(what, packed, bias)
    except InvariantError as e:
        raise RefusedError(f"{e.message}: {e.facts['got']}") from None
    order = (0, 2, 1) if flat else NHWC
    reads = [b.dense(n.inputs[0], order)] + ([b.dense(g.residual, order)] if g.residual >= 0 else [])
    out = b.emit(what, reads, (batch, *what.out, what.filters), (packed, bias))
    if flat:
        b.set(g.output, dense(out.tensor, (batch, what.out[1], what.filters)).transposed((0, 2, 1)))
    else:
        b.set(g.output, out.transposed(NCHW))


def _bias(b: Builder, n: Node, g: Group) -> Any:
    value = n.inputs[2] if len(n.inputs) > 2 and n.inputs[2] >= 0 else g.bias
    if value < 0:
        return None
    found = b.numbers(value)
    if found is None:
        raise RefusedError("its bias is computed")
    return np.ascontiguousarray(found.reshape(-1))


def product(b: Builder, g: Group) -> None:
    if g.anchor.op.name == "Gemm":
        _gemm(b, g)
        return
    n = g.anchor
    left, right = (b.shape(v) for v in n.inputs[:2])
    bias = b.numbers(g.bias) if g.bias >= 0 else None
    fused: dict[str, Any] = {"scale": g.scale, "residual": g.residual >= 0, "activation": g.activation,
                             "slope": g.slope, "number": b.number}
    if not left or not right:
        raise RefusedError("one of its operands is a single number")
    rows_out, columns_out = left[-2:-1], right[-1:] if len(right) > 1 else ()  # what a vector has is no axis
    left, right = ((1, *left) if len(left) == 1 else left), ((*right, 1) if len(right) == 1 else right)
    _same_inner(left[-1], right[-2])
    lead = np.broadcast_shapes(left[:-2], right[:-2])
    shape = (*lead, *rows_out, *columns_out)
    matrix = b.packed(n.inputs[1])
    constant = matrix is not None and math.prod(right[:-2]) == 1
    if constant or math.prod(right[:-2]) == 1:
        rows = math.prod(left[:-1])
        a = b.dense(n.inputs[0])
        reads, transposed = [a], False
        if matrix is not None:
            packed = np.ascontiguousarray(matrix.reshape(right[-2:]))
        else:
            packed = None
            transposed = _lies_transposed(b, n.inputs[1])
            reads.append(b.dense(n.inputs[1], _last_swapped(len(right)) if transposed else None))
        what = Product(1, rows, left[-1], right[-1], transposed, **fused)
    else:
        transposed = _lies_transposed(b, n.inputs[1])
        reads = []
        for v, own in ((n.inputs[0], left), (n.inputs[1], right)):
            order = _last_swapped(len(lead) + 2) if transposed and v is n.inputs[1] else None
            held = b.get(v)
            if own[:-2] != lead:
                held = b.as_held(b.stored(held).broadcast((*lead, *own[-2:])))
            reads.append(b.dense_of(held, order))
        packed = None
        what = Product(math.prod(lead), left[-2], left[-1], right[-1], transposed, True, **fused)
    if g.residual >= 0:
        reads.append(b.dense(g.residual))
    row = None if bias is None else np.ascontiguousarray(bias.reshape(-1))
    b.set(g.output, b.emit(what, reads, shape, (packed, row)))


def _same_inner(left: int, right: int) -> None:
    if left != right:
        raise RefusedError(f"it multiplies rows of {left} by columns of {right}")


def _last_swapped(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1, rank - 2)


def _lies_transposed(b: Builder, value: int) -> bool:
    """Whether a matrix lies column by column."""
    view = b.get(value).view
    if view is None or view.is_dense or len(view.shape) < 2:
        return False
    return view.transposed(_last_swapped(len(view.shape))).is_dense


def _gemm(b: Builder, g: Group) -> None:
    """alpha A B + beta C."""
    n = g.anchor
    own: Any = attributes(n)
    alpha, beta = own.get("alpha", 1.0), own.get("beta", 1.0)
    if not is_factor(alpha):
        raise RefusedError(f"its alpha is {alpha}")
    turned = bool(own.get("transB"))
    left = b.get(n.inputs[0])
    matrix = b.packed(n.inputs[1])
    sides = (1, 0) if own.get("transA") else (0, 1)
    right = b.shape(n.inputs[1])[::-1] if turned else b.shape(n.inputs[1])
    if len(left.shape) != 2 or len(right) != 2:
        raise RefusedError("one of its operands is no matrix")
    rows, inner = (left.shape[i] for i in sides)
    columns = right[1]
    _same_inner(inner, right[0])
    reads = [b.dense_of(left, sides)]
    if matrix is None:
        reads.append(b.dense(n.inputs[1]))
    third = n.inputs[2] if len(n.inputs) > 2 else -1
    bias = b.numbers(third) if third >= 0 else None
    if bias is not None and (bias.size == 1 or bias.shape in ((columns,), (1, columns))):
        third = -1  # a row
    row = None
    if bias is not None and third < 0:
        row = np.ascontiguousarray(np.broadcast_to(beta * bias.reshape(-1), (columns,)), np.float32)
    elif g.bias >= 0:
        found = b.numbers(g.bias)
        assert found is not None
        row = np.ascontiguousarray(found.reshape(-1))
    added = [b.get(g.residual)] if g.residual >= 0 else []
    if third >= 0:
        matrix_held = b.as_held(b.stored(b.get(third)).broadcast((rows, columns)))
        if beta != 1.0:
            matrix_held = b.applied(f"({{0}} * {literal(beta)})", [matrix_held], (rows, columns))
        added.append(matrix_held)
    if added:
        reads.append(b.dense_of(added[0] if len(added) == 1 else b.applied("({0} + {1})", added, (rows, columns))))
    what = Product(1, rows, inner, columns, turned, False, float(alpha), bool(added), g.activation, g.slope,
                   b.number)
    packed = None if matrix is None else np.ascontiguousarray(matrix)
    b.set(g.output, b.emit(what, reads, (rows, columns), (packed, row)))


def attention(b: Builder, g: Group) -> None:
    """The key comes as it enters the product, transposed."""
    query, key, value = g.inputs
    rank = len(b.shape(query))
    _same_inner(b.shape(query)[-1], b.shape(key)[-2])
    _same_inner(b.shape(key)[-1], b.shape(value)[-2])
    q, k, v = b.dense(query), b.dense(key, _last_swapped(rank)), b.dense(value)
    lead = b.shape(query)[:-2]
    what = Attention(math.prod(lead), b.shape(query)[-2], b.shape(key)[-1], b.shape(query)[-1], b.shape(value)[-1],
                     g.scale, g.causal, b.number)
    b.set(g.output, b.emit(what, (q, k, v), (*lead, what.queries, what.width)))


def softmax(b: Builder, n: Node) -> None:
    """Up to opset 12 along all axes from `axis` on."""
    own: Any = attributes(n)
    shape = b.get(n.inputs[0]).shape
    if b.opset >= 13:
        axis = own.get("axis", -1) % len(shape)
        order = (*(i for i in range(len(shape)) if i != axis), axis)
        columns = shape[axis]
    else:
        axis = own.get("axis", 1) % max(1, len(shape))
        order, columns = tuple(range(len(shape))), math.prod(shape[axis:])
    number = b.number
    if n.op.name == "LogSoftmax":  # float16 has no probabilities below 6e-8, their logarithms it has
        b.number = "float32"
    tensor = b.dense(n.inputs[0], order)
    what = Softmax(math.prod(shape) // columns, columns, number=b.number)
    found = b.emit(what, (tensor,), tuple(shape[i] for i in order))
    b.number = number
    view = found.transposed(sorted(range(len(order)), key=lambda i: order[i]))
    if n.op.name == "LogSoftmax":
        b.set(n.outputs[0], b.applied("log({0})", [b.as_held(view)], shape))
    else:
        b.set(n.outputs[0], view)


def layer_norm(b: Builder, n: Node) -> None:
    own: Any = attributes(n)
    shape = b.get(n.inputs[0]).shape
    axis = own.get("axis", -1) % len(shape)
    if any(v >= 0 for v in n.outputs[1:]):
        raise RefusedError("its mean is asked for")
    columns = math.prod(shape[axis:])
    gamma, beta = (b.numbers(n.inputs[i]) if i < len(n.inputs) and n.inputs[i] >= 0 else None for i in (1, 2))
    if gamma is None or (beta is None and len(n.inputs) > 2 and n.inputs[2] >= 0):
        raise RefusedError("its scale is computed")
    rows = [np.ascontiguousarray(np.broadcast_to(a, shape[axis:])).reshape(-1).astype(np.float32)
            for a in (gamma, np.zeros(1, np.float32) if beta is None else beta)]
    what = LayerNorm(math.prod(shape[:axis]), columns, float(own.get("epsilon", 1e-5)), b.number)
    b.set(n.outputs[0], b.emit(what, (b.dense(n.inputs[0]),), shape, rows))


def pool(b: Builder, n: Node) -> None:
    own: Any = attributes(n)
    shape = b.get(n.inputs[0]).shape
    if len(shape) not in (3, 4):
        raise RefusedError(f"it is of {len(shape) - 2} dimensions")
    if len(n.outputs) > 1 and n.outputs[1] >= 0:
        raise RefusedError("its indices are asked for")
    rank = len(shape) - 2
    out = b.graph.values[n.outputs[0]].shape[2:]
    kernel, strides, dilations = (_pair(own, k, rank) for k in ("kernel_shape", "strides", "dilations"))
    pads = padding(own, shape[2:], kernel, strides, dilations)
    size = shape[2:]
    if rank == 1:
        kernel, strides, dilations, out, size = (1, *kernel), (1, *strides), (1, *dilations), (1, *out), (1, *size)
        pads = (0, pads[0], 0, pads[1])
    kind: Literal["max", "average"] = "max" if n.op.name == "MaxPool" else "average"
    what = Pool(kind, (shape[0], size[0], size[1], shape[1]), (out[0], out[1]), (kernel[0], kernel[1]),
                (strides[0], strides[1]), (dilations[0], dilations[1]), (pads[0], pads[1]),
                bool(own.get("count_include_pad")), (size[0] + pads[2], size[1] + pads[3]), b.number)
    order = (0, 2, 1) if rank == 1 else NHWC
    found = b.emit(what, (b.dense(n.inputs[0], order),), (shape[0], *out, shape[1]))
    if rank == 1:
        b.set(n.outputs[0], dense(found.tensor, (shape[0], out[1], shape[1])).transposed((0, 2, 1)))
    else:
        b.set(n.outputs[0], found.transposed(NCHW))


def transposed_convolution(b: Builder, n: Node) -> None:
    own: Any = attributes(n)
    weights = b.packed(n.inputs[1])
    shape, out = b.get(n.inputs[0]).shape, b.graph.values[n.outputs[0]].shape
    if weights is None or len(shape) != 4:
        raise RefusedError("its weights are computed" if weights is None else f"it is of {len(shape) - 2} dimensions")
    groups = int(own.get("group", 1))
    kernel, strides, dilations = weights.shape[2:], _pair(own, "strides", 2), _pair(own, "dilations", 2)
    auto = own.get("auto_pad", "NOTSET")
    if auto not in ("NOTSET", b"NOTSET") or own.get("output_shape"):  # the whole result, cut to its size
        whole = [(m - 1) * s + (k - 1) * d + 1 + e for m, s, k, d, e in zip(
            shape[2:], strides, kernel, dilations, own.get("output_padding") or (0, 0), strict=True)]
        over = [max(0, w - o) for w, o in zip(whole, out[2:], strict=True)]
        pads = [t // 2 if auto in ("SAME_UPPER", b"SAME_UPPER") else t - t // 2 for t in over]
    else:
        pads = list(padding(own, shape[2:], kernel, strides, dilations)[:2])
    own_filters = weights.shape[1]
    # [channels, filters / groups, h, w] -> [filters, h, w, channels / groups]
    packed = weights.reshape(groups, shape[1] // groups, own_filters, *kernel).transpose(0, 2, 3, 4, 1)
    bias = b.numbers(n.inputs[2]) if len(n.inputs) > 2 and n.inputs[2] >= 0 else np.zeros(own_filters * groups)
    if bias is None:
        raise RefusedError("its bias is computed")
    if bias.size != own_filters * groups:
        raise RefusedError(f"its bias is of {bias.size}, not of {own_filters * groups}")
    kinds = np.float16 if b.number == "float16" else np.float32, np.float32
    tensors = [b.tensor(a.size, np.ascontiguousarray(a, k).reshape(-1)) for a, k in zip((packed, bias), kinds,
                                                                                        strict=True)]
    what = TransposedConvolution((shape[0], shape[2], shape[3], shape[1]), own_filters * groups, (out[2], out[3]),
                                 (kernel[0], kernel[1]), (strides[0], strides[1]), (dilations[0], dilations[1]),
                                 (pads[0], pads[1]), groups, b.number)
    found = b.emit(what, (b.dense(n.inputs[0], NHWC), *tensors), (shape[0], out[2], out[3], own_filters * groups))
    b.set(n.outputs[0], found.transposed(NCHW))
