"""TFLite's operators made ready: for each node a function from its computed inputs to its outputs, in integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np

from npulab.errors import UnsupportedError
from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import (
    Add,
    Concat,
    Conv2D,
    DepthwiseConv2D,
    Elementwise,
    FullyConnected,
    Generic,
    Mean,
    Pad,
    Pool2D,
    Softmax,
    Split,
)
from npulab.reference import activations, elementwise, moves, pools, resize
from npulab.reference.accumulate import Pads, matrix, same_pads
from npulab.reference.convolve import NO_PADS, biased, convolution, depthwise, transposed, transposed_pads
from npulab.reference.joins import concatenation
from npulab.reference.requantize import ENGINE, RULES, Rescale, nearest_away
from npulab.reference.softmax import softmax
from npulab.reference.types import Array, Step, Stored, codes, stored

INTEGERS = (DType.INT8, DType.UINT8, DType.INT16)
Pair = tuple[int, int]


class UnknownError(Exception):
    """A node that has no integer arithmetic here; it may be a float one."""


def step_of(graph: Graph, node: Node, arithmetic: str) -> Step:
    """The node as a function of those of its inputs that are computed.

    Raises: UnknownError for operators and types that are not here; UnsupportedError, ModelError for what LiteRT
    refuses too.
    """
    out = graph.values[node.outputs[0]]
    data = next((graph.values[v] for v in node.inputs if v >= 0), None)
    moved = moves.step_of(graph, node)
    if moved is not None:
        return moved
    types = {v.dtype for v in (graph.value(node, 0), out) if v is not None}
    if isinstance(node.op, Generic) and node.op.name in ("QUANTIZE", "DEQUANTIZE"):
        assert data is not None
        return _quantize(data, out)
    if isinstance(node.op, Split):
        types = {out.dtype}
    if isinstance(node.op, Generic) and node.op.name == "TRANSPOSE_CONV":
        types = {graph.values[node.inputs[2]].dtype, out.dtype}
    if not types <= set(INTEGERS):
        raise UnknownError
    made = _made(graph, node, arithmetic)
    constants = {i: codes(graph.values[node.inputs[i]]) for i in made.inputs
                 if graph.values[node.inputs[i]].is_constant}
    places = _places(graph, node, made.inputs)
    return lambda arrays: [made.run(*(constants.get(i) if n is None else arrays[n]
                                      for i, n in zip(made.inputs, places, strict=True)))]


def _places(graph: Graph, node: Node, inputs: Sequence[int]) -> list[int | None]:
    """Where each of these inputs is among the node's computed ones; None for constants."""
    computed = [i for i, v in enumerate(node.inputs) if v >= 0 and not graph.values[v].is_constant]
    return [computed.index(i) if i in computed else None for i in inputs]


class _Made:
    """A function, and which inputs of the node it takes."""

    def __init__(self, run: Callable[..., Array], *inputs: int) -> None:
        self.run = run
        self.inputs = inputs


def _made(graph: Graph, node: Node, arithmetic: str) -> _Made:
    op, out = node.op, stored(graph.values[node.outputs[0]])
    values = [graph.values[v] if v >= 0 else None for v in node.inputs]

    def tensor(i: int) -> Value:
        found = values[i] if i < len(values) else None
        if found is None:
            raise UnsupportedError(f"{node} lacks input {i}")
        return found

    match op:
        case Conv2D() | DepthwiseConv2D():
            return _Made(_convolution(tensor(0), tensor(1), graph.value(node, 2), out, op, arithmetic), 0)
        case FullyConnected():
            return _dense(graph, node, out, op, arithmetic)
        case Generic(name="TRANSPOSE_CONV", attributes=a):
            return _Made(_transposed(graph, node, out, dict(a), arithmetic), 2)
        case Add():
            return _sum(tensor(0), tensor(1), out, op.activation, 1, arithmetic, graph, node)
        case Generic(name="SUB", attributes=a):
            return _sum(tensor(0), tensor(1), out, str(a.get("fused_activation_function", "none")), -1, arithmetic,
                        graph, node)
        case Generic(name="MUL", attributes=a):
            low, high = activations.fused(str(a.get("fused_activation_function", "none")), out)
            rule = arithmetic if arithmetic.startswith("esp") else "tflite"
            return _Made(elementwise.multiply_tensors(stored(tensor(0)), stored(tensor(1)), out, low, high, rule), 0, 1)
        case Pool2D():
            return _Made(_pool(tensor(0), out, op, arithmetic), 0)
        case Mean():
            axes = [int(a) for a in codes(tensor(1)).reshape(-1)]
            return _Made(pools.mean(stored(tensor(0)), out, axes, op.keep_dims), 0)
        case Softmax():
            return _Made(softmax(stored(tensor(0)), out, op.beta), 0)
        case Elementwise():
            return _Made(_function(op, stored(tensor(0)), out), 0)
        case Generic(name="PRELU"):
            return _Made(activations.parametric(stored(tensor(0)), stored(tensor(1)), out), 0, 1)
        case Generic(name="RELU_0_TO_1"):
            return _Made(activations.rectifier("relu_0_to_1", stored(tensor(0)), out), 0)
        case Concat():
            rank = len(graph.values[node.outputs[0]].shape)
            join = concatenation([stored(v) for v in values if v is not None], out, op.axis % rank)
            return _Made(lambda *arrays: join(arrays), *range(len(values)))
        case Pad(mode="constant"):
            return _pad(graph, node, out, op)
        case Generic(name="RESIZE_NEAREST_NEIGHBOR" | "RESIZE_BILINEAR", attributes=a):
            size = graph.values[node.outputs[0]].shape[1:3]
            how = resize.nearest if op.name == "RESIZE_NEAREST_NEIGHBOR" else resize.bilinear
            flags = bool(a.get("align_corners")), bool(a.get("half_pixel_centers"))
            return _Made(lambda x: how(x, cast(Pair, size), *flags), 0)
    raise UnknownError


def finish(sums: Array, bias: Array | None, rescale: Rescale, out: Stored, low: int, high: int) -> Array:
    """Sums (channels last) to codes. Sums that lie planar in memory are left so until they are bytes."""
    if sums.ndim == 4 and not sums.flags.c_contiguous:
        planar = sums.transpose(0, 3, 1, 2)
        planar = biased(planar, None if bias is None else bias[:, None, None])
        found = rescale(planar, out, low, high, 1)
        return np.ascontiguousarray(found.transpose(0, 2, 3, 1))
    return rescale(biased(sums, bias), out, low, high)


def factor(x: Stored, w: Value, out: Stored, arithmetic: str, always_double: bool = False) -> Array:
    """input scale * weight scale / output scale, of each channel or of all, computed as whoever rounds computes it."""
    q = w.quantization
    assert q is not None
    f = np.float32
    scales = np.array(q.scales, f)
    if arithmetic == "tflite":
        if q.per_tensor and not always_double:  # the kernels for one scale multiply in float32
            return np.asarray((f(x.scale) * scales).astype(np.float64) / float(f(out.scale)))
        return np.asarray(float(f(x.scale)) * scales.astype(np.float64) / float(f(out.scale)))
    if arithmetic.startswith("esp"):
        return np.asarray(float(x.scale) * scales.astype(np.float64) / float(out.scale))
    return np.asarray(f(x.scale) * scales / f(out.scale))


def _bias(value: Value | None) -> Array | None:
    return None if value is None else codes(value)


def _zero_of_weights(w: Value, x: Value) -> int:
    q = w.quantization
    if q is None:
        raise UnsupportedError(f"weights '{w.name}' have no scale")
    return q.zero_point if x.dtype is DType.UINT8 else 0  # kernels of signed types take weights to be symmetric


def _convolution(x: Value, w: Value, b: Value | None, out: Stored, op: Conv2D | DepthwiseConv2D, arithmetic: str
                 ) -> Callable[[Array], Array]:
    source = stored(x)
    weights = codes(w)
    size = cast(Pair, x.shape[1:3])
    window = cast(Pair, weights.shape[1:3])
    pads: Pads = same_pads(size, window, op.stride, op.dilation) if op.padding == "same" else NO_PADS
    low, high = activations.fused(op.activation, out)
    make = depthwise if isinstance(op, DepthwiseConv2D) else convolution
    sums = make(weights, _zero_of_weights(w, x), source.zero, source.dtype, op.stride, op.dilation, pads, x.shape[3])
    bias = _bias(b)
    rescale = RULES[arithmetic](factor(source, w, out, arithmetic, x.dtype is not DType.UINT8))
    return lambda data: finish(_narrow(sums(data), bias), bias, rescale, out, low, high)


def _narrow(sums: Array, bias: Array | None) -> Array:
    """16-bit activations whose biases have 32 bits have 32-bit sums."""
    return sums.astype(np.int32) if bias is not None and bias.dtype == np.int32 and sums.dtype == np.int64 else sums


def _dense(graph: Graph, node: Node, out: Stored, op: FullyConnected, arithmetic: str) -> _Made:
    x, w = graph.values[node.inputs[0]], graph.values[node.inputs[1]]
    source, shape = stored(x), graph.values[node.outputs[0]].shape
    low, high = activations.fused(op.activation, out)
    bias = _bias(graph.value(node, 2))
    rescale = (nearest_away if arithmetic == "tflite" else RULES[arithmetic])(factor(source, w, out, arithmetic, True))
    q = w.quantization
    assert q is not None
    zero = q.zero_point
    m, n = w.shape

    def run(data: Array, weights: Array | None = None) -> Array:
        product = fixed or matrix(cast(Array, weights), zero, source.zero, source.dtype)
        sums = _narrow(product(data.reshape(-1, n)), bias)
        return rescale(biased(sums, bias), out, low, high).reshape(-1, m).reshape(
            (*data.shape[:-1], m) if op.keep_dims else shape if len(data) == 1 else (-1, m))

    fixed = matrix(codes(w), zero, source.zero, source.dtype) if w.is_constant else None
    return _Made(run, 0) if fixed else _Made(run, 0, 1)


def _transposed(graph: Graph, node: Node, out: Stored, attributes: dict[str, Any], arithmetic: str
                ) -> Callable[[Array], Array]:
    w, x = graph.values[node.inputs[1]], graph.values[node.inputs[2]]
    source, weights = stored(x), codes(w)
    size = cast(Pair, graph.values[node.outputs[0]].shape[1:3])
    stride = (int(attributes["stride_h"]), int(attributes["stride_w"]))
    window = cast(Pair, weights.shape[1:3])
    pads = transposed_pads(size, window, stride, attributes["padding"] == "same")
    sums = transposed(weights, _zero_of_weights(w, x), source.zero, source.dtype, stride, pads, size)
    low, high = activations.fused(str(attributes.get("fused_activation_function", "none")), out)
    bias = _bias(graph.value(node, 3))
    rescale = RULES[arithmetic](factor(source, w, out, arithmetic, x.dtype is not DType.UINT8))
    return lambda data: rescale(biased(_narrow(sums(data), bias), bias), out, low, high)


def _sum(a: Value, b: Value, out: Stored, activation: str, sign: Literal[1, -1], arithmetic: str, graph: Graph,
         node: Node) -> _Made:
    first, second = stored(a), stored(b)
    low, high = activations.fused(activation, out)
    if arithmetic.startswith("esp"):
        return _Made(elementwise.shifted_add(first, second, out, low, high, arithmetic, sign), 0, 1)
    if arithmetic == ENGINE and sign == 1 and a.shape == b.shape and out.dtype.itemsize == 1:
        return _Made(elementwise.engine_add(first, second, out, low, high), 0, 1)
    if out.dtype.itemsize > 1 and _marked(graph, node) and all(
            s.zero == 0 and np.frexp(s.scale)[0] == 0.5 for s in (first, second, out)):
        return _Made(elementwise.power_of_two_add(first, second, out, low, high, sign), 0, 1)
    return _Made(elementwise.add(first, second, out, low, high, sign), 0, 1)


def _marked(graph: Graph, node: Node) -> bool:
    """Whether the file's own option `pot_scale_int16` is set, as it is unless a file says otherwise."""
    from npulab.formats.flatbuffer import Table
    from npulab.formats.tflite import schema

    if isinstance(node.op, Generic):
        return bool(node.op.attributes.get("pot_scale_int16", True))
    main = next(Table.root(schema(), "Model", graph.source).tables("subgraphs"))
    options = list(main.tables("operators"))[node.index].union("builtin_options")
    return True if options is None else bool(options.value("pot_scale_int16"))


def _pool(x: Value, out: Stored, op: Pool2D, arithmetic: str) -> Callable[[Array], Array]:
    size = cast(Pair, x.shape[1:3])
    pads = same_pads(size, op.window, op.stride, (1, 1)) if op.padding == "same" else NO_PADS
    low, high = activations.fused(op.activation, out)
    how = pools.average if op.kind == "average" else pools.maximum
    if op.kind == "average" and arithmetic.startswith("esp"):
        return _shifted_average(stored(x), out, op, pads, low, high, arithmetic)
    if op.kind == "average" and arithmetic == ENGINE and pads == NO_PADS and op.window != (1, 1):
        return pools.engine_average(stored(x), out, op.window, op.stride, low, high)
    return lambda data: how(data, op.window, op.stride, pads, low, high)


def _shifted_average(x: Stored, out: Stored, op: Pool2D, pads: Pads, low: int, high: int, arithmetic: str
                     ) -> Callable[[Array], Array]:
    """The mean in real numbers, then one rounding (inferred)."""
    def step(data: Array) -> Array:
        sums, count = pools.window_sums(data.astype(np.int64) - x.zero, op.window, op.stride, pads)
        steps = sums / count * (x.scale / out.scale)
        whole = np.rint(steps) if arithmetic == "esp32p4" else np.floor(steps + 0.5)
        return np.asarray(np.clip(whole + out.zero, low, high), out.dtype)

    return step


def _function(op: Elementwise, x: Stored, out: Stored) -> Callable[[Array], Array]:
    if op.name in ("RELU", "RELU6", "RELU_N1_TO_1"):
        return activations.rectifier(op.name.lower(), x, out)
    if op.name == "LEAKY_RELU":
        return activations.leaky(op.alpha, x, out)
    if op.name == "HARD_SWISH" and x.dtype.itemsize == 1:
        return activations.hard_swish(x, out)
    if op.name in ("LOGISTIC", "TANH"):
        if x.dtype.itemsize == 1:
            return activations.function(op.name, x, out)
        return activations.logistic_16(x) if op.name == "LOGISTIC" else activations.tanh_16(x)
    raise UnknownError


def _pad(graph: Graph, node: Node, out: Stored, op: Pad) -> _Made:
    table = graph.values[node.inputs[1]]
    if not table.is_constant:
        raise UnknownError
    pads = [(int(a), int(b)) for a, b in codes(table)]
    value = out.zero
    if op.valued and (given := graph.value(node, 2)) is not None:
        if not given.is_constant:
            raise UnknownError
        value = int(codes(given).reshape(-1)[0])
    return _Made(lambda x: np.pad(x, pads, constant_values=value), 0)


def _quantize(x: Value, out: Value) -> Step:
    if x.dtype is DType.FLOAT32 and out.dtype in INTEGERS:
        run = activations.quantized(stored(out))
    elif x.dtype in INTEGERS and out.dtype is DType.FLOAT32:
        run = activations.dequantized(stored(x))
    elif x.dtype in INTEGERS and out.dtype in INTEGERS:
        run = activations.requantized(stored(x), stored(out))
    else:
        raise UnknownError
    return lambda arrays: [run(arrays[0])]
