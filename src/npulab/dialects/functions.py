"""Operators of ONNX that compute element by element, or along axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npulab.dialects import layouts
from npulab.dialects.conversion import Conversion, NotThereError
from npulab.dialects.integers import PLAIN, affine, clamped, codes_of, edges, fixed_result
from npulab.dialects.moves import axis_at
from npulab.dialects.tflite_file import Spec
from npulab.ir import Quantization

Translate = Callable[[Conversion], None]
SLOPE_MAX = 1.0
"""The largest slope of PReLU that is rounded to 8 bits."""


def activation_of(c: Conversion, node: Any) -> str | None:
    """The activation that TFLite fuses, if `node` is one: RELU, RELU6 or RELU_N1_TO_1."""
    op = node.op
    if getattr(op, "domain", "?") or len(node.outputs) != 1:
        return None
    if op.name == "Relu":
        return "RELU"
    return {(0.0, np.inf): "RELU", (0.0, 6.0): "RELU6", (-1.0, 1.0): "RELU_N1_TO_1"}.get(limits(c, node)) \
        if op.name == "Clip" else None


def limits(c: Conversion, node: Any) -> tuple[float, float]:
    """The limits of a Clip; not a number where they are computed."""
    found = [float(node.op.attributes.get("min", -np.inf)), float(node.op.attributes.get("max", np.inf))]
    for i in (1, 2):
        if i < len(node.inputs) and node.inputs[i] >= 0:
            array = c.quantities.real(node.inputs[i])
            found[i - 1] = float(array.reshape(-1)[0]) if array is not None and array.size == 1 else np.nan
    low, high = (limit if abs(limit) < 1e30 else np.copysign(np.inf, limit) for limit in found)
    return float(low), float(high)


# element by element


def one(name: str, **options: Any) -> Translate:
    """A function of one number that TFLite has under this name."""

    def translate(c: Conversion) -> None:
        c.emit(name, [c.input(0)], c.order(0), **options)
    return translate


def fixed(name: str, scale: float, zero: int) -> Translate:
    """One whose results of 8 bits always have this scale and, unsigned, this zero point; of 16 bits 1/32768 and 0."""

    def translate(c: Conversion) -> None:
        data, order = c.input(0), c.order(0)
        if not c.integer:
            c.emit(name, [data], order)
            return
        c.put(fixed_result(c, name, data, scale, zero), order)
    return translate


def only(types: Sequence[str], translate: Translate) -> Translate:
    """A translation whose integer kernel takes data of these types alone."""

    def checked(c: Conversion) -> None:
        if c.integer and c.dtype not in types:
            raise NotThereError(f"integers of type {c.dtype}")
        translate(c)
    return checked


def extreme(name: str) -> Translate:
    """MAXIMUM or MINIMUM, which in integers want all at one scale: that of the result."""

    def translate(c: Conversion) -> None:
        if not c.integer:
            two(name)(c)
            return
        assert c.quantized
        order = c.common(len(c.out.shape), range(len(c.node.inputs)))
        parts = [c.requantized(c.aligned(i, order), c.quantized) for i in range(len(c.node.inputs))]
        while len(parts) > 1:
            shape = np.broadcast_shapes(*(c.file.specs[p].shape for p in parts[:2]))
            parts[:2] = [c.step(name, parts[:2], shape)]
        c.put(parts[0], order)
    return translate


def divide(c: Conversion) -> None:
    """DIV, which TFLite has in floats and uint8 alone; in integers by one constant number."""
    if not c.integer:
        two("DIV", True)(c)
        return
    divisor = c.constant(1)
    if divisor is None or divisor.size != 1 or c.activation != "NONE" or not divisor.any() or c.out.shape != c.shape(0):
        raise NotThereError("quotients in integers")
    assert c.quantized
    c.put(affine(c, c.input(0), 1 / float(divisor.reshape(-1)[0]), 0.0, c.quantized), c.order(0))


def two(name: str, fused: bool = False, **options: Any) -> Translate:
    """A function of two tensors, or of several taken two by two."""

    def translate(c: Conversion) -> None:
        rank, count = len(c.out.shape), len(c.node.inputs)
        order = c.common(rank, range(count))
        parts = [c.aligned(i, order) for i in range(count)]
        extra: dict[str, Any] = {"fused_activation_function": c.activation} if fused else {}
        while len(parts) > 2:
            shape = np.broadcast_shapes(*(c.file.specs[p].shape for p in parts[:2]))
            parts[:2] = [c.step(name, parts[:2], shape, **(PLAIN if fused else {}))]
        if len(parts) == 1:
            c.put(parts[0], order)
            return
        c.emit(name, parts, order, **options, **extra)
    return translate


def mean_of_several(c: Conversion) -> None:
    order = c.common(len(c.out.shape), range(len(c.node.inputs)))
    total = c.aligned(0, order)
    for i in range(1, len(c.node.inputs)):
        other = c.aligned(i, order)
        shape = np.broadcast_shapes(c.file.specs[total].shape, c.file.specs[other].shape)
        total = c.step("ADD", [total, other], shape, **PLAIN)
    share = c.file.constant("share", np.array(1 / len(c.node.inputs), np.float32))
    c.emit("MUL", [total, share], order, **PLAIN)


def where(c: Conversion) -> None:
    order = c.common(len(c.out.shape), range(3))
    c.emit("SELECT_V2", [c.aligned(i, order) for i in range(3)], order)


def power(c: Conversion) -> None:
    """Squares and roots have operators of their own; POW else."""
    exponent = c.constant(1)
    simple = {2.0: "SQUARE", 0.5: "SQRT"}.get(float(exponent.reshape(-1)[0])) if exponent is not None \
        and exponent.size == 1 else None
    if simple and c.out.dtype.value == "float32":
        c.emit(simple, [c.input(0)], c.order(0))
    else:
        two("POW")(c)


def clip(c: Conversion) -> None:
    order, data = c.order(0), c.input(0)
    low, high = limits(c, c.node)
    if np.isnan(low) or np.isnan(high):
        raise NotThereError("limits that are computed")
    name = activation_of(c, c.node)
    if name == "RELU_N1_TO_1" and c.integer and c.dtype == "int16":
        name = None  # which has no kernel
    if c.integer and c.quantized:  # rounded, then kept within the limits' codes: the same as the other way round
        spec = Spec(c.file.specs[data].shape, c.dtype, c.quantized)
        if codes_of(spec, low, high) == edges(spec) or name is None:
            c.put(clamped(c, c.requantized(data, c.quantized), low, high), order)
            return
    if name:
        c.emit(name, [data], order, None, None if c.quantized else data)
        return
    if c.integer:
        raise NotThereError("these limits in integers")
    kind = np.dtype(c.file.specs[data].dtype)
    if (low, high) == (0.0, 1.0) and kind == np.float32:
        c.emit("RELU_0_TO_1", [data], order)
        return
    for limit, step in ((low, "MAXIMUM"), (high, "MINIMUM")):
        if np.isfinite(limit):
            data = c.step(step, [data, c.file.constant("limit", np.array(limit, kind))])
    c.put(data, order)


def relu(c: Conversion) -> None:
    data = c.input(0)
    c.emit("RELU", [data], c.order(0), None, None if c.quantized else data)


def scalar(c: Conversion, value: float) -> int:
    return c.file.constant("number", np.array(value, np.float32))


def hard_sigmoid(c: Conversion) -> None:
    order = c.order(0)
    if c.integer:
        assert c.quantized
        moved = affine(c, c.input(0), c.attribute("alpha", 0.2), c.attribute("beta", 0.5), c.quantized)
        c.put(clamped(c, moved, 0.0, 1.0), order)
        return
    scaled = c.step("MUL", [c.input(0), scalar(c, c.attribute("alpha", 0.2))], **PLAIN)
    moved = c.step("ADD", [scaled, scalar(c, c.attribute("beta", 0.5))], **PLAIN)
    c.emit("RELU_0_TO_1", [moved], order)


def hard_swish(c: Conversion) -> None:
    """Of 16 bits, for which there is no kernel, as x * hard sigmoid of x."""
    data = c.input(0)
    if c.integer and c.dtype == "int16":
        gate = affine(c, data, 1 / 6, 0.5, Quantization((float(np.float32(1 / 32767)),), (0,)))
        c.emit("MUL", [data, clamped(c, gate, 0.0, 1.0)], c.order(0), **PLAIN)
    else:
        c.emit("HARD_SWISH", [data], c.order(0))


def swish(c: Conversion) -> None:
    data = c.input(0)
    inner = data if c.attribute("alpha", 1.0) == 1 else c.step("MUL", [data, scalar(c, c.attribute("alpha"))], **PLAIN)
    c.emit("MUL", [data, c.step("LOGISTIC", [inner])], c.order(0), **PLAIN)


def softplus(c: Conversion) -> None:
    c.put(_softplus(c, c.input(0)), c.order(0))


def _softplus(c: Conversion, x: int) -> int:
    """log(1 + e^x) as max(x, 0) + log(1 + e^-|x|): no power overflows."""
    small = c.step("EXP", [c.step("NEG", [c.step("ABS", [x])])])
    tail = c.step("LOG", [c.step("ADD", [small, scalar(c, 1.0)], **PLAIN)])
    return c.step("ADD", [c.step("RELU", [x]), tail], **PLAIN)


def mish(c: Conversion) -> None:
    x = c.input(0)
    c.emit("MUL", [x, c.step("TANH", [_softplus(c, x)])], c.order(0), **PLAIN)


def elu(c: Conversion) -> None:
    if c.attribute("alpha", 1.0) != 1:
        raise NotThereError("alpha other than 1")
    c.emit("ELU", [c.input(0)], c.order(0))


def gelu(c: Conversion) -> None:
    c.emit("GELU", [c.input(0)], c.order(0), approximate=c.attribute("approximate", "none") == "tanh")


def leaky_relu(c: Conversion) -> None:
    c.emit("LEAKY_RELU", [c.input(0)], c.order(0), alpha=float(c.attribute("alpha", 0.01)))


def prelu(c: Conversion) -> None:
    """Slopes that are floats beside integers get 127 steps to the largest: an error of half a step of the data."""
    order = c.order(0)
    slope = c.needed(1, "slopes").astype(np.float32)
    rank = len(order)
    code = c.coded(1)
    shape = (1,) * (rank - slope.ndim) + slope.shape
    kept = slope.reshape(shape).transpose(order)
    if rank > 1 and kept.shape[0] == 1:
        kept = kept[0]
    if not c.integer:
        c.emit("PRELU", [c.input(0), c.file.constant("slopes", kept)], order)
        return
    stored = c.quantities.stored(code, c.dtype) if code else None
    if stored:
        codes, q = stored[0].reshape(shape).transpose(order), stored[1]
        codes = codes[0] if rank > 1 and codes.shape[0] == 1 else codes
    else:
        zero = 128 if c.dtype == "uint8" else 0
        q = Quantization((max(float(np.float32(np.abs(kept).max(initial=0) / 127)), 1e-30),), (zero,))
        if not q.scale <= 1 / 127 * SLOPE_MAX:
            raise NotThereError("steep slopes in integers")
        codes = (np.rint(kept / q.scale) + zero).astype(c.dtype)
    c.emit("PRELU", [c.input(0), c.file.constant("slopes", codes, q)], order)


def reciprocal(c: Conversion) -> None:
    c.emit("DIV", [scalar(c, 1.0), c.input(0)], c.order(0), **PLAIN)


# along axes


def reduce(name: str, before: str = "", after: str = "") -> Translate:
    """A reduction, of the elements after `before`, and `after` of its results."""

    def translate(c: Conversion) -> None:
        shape, order = c.shape(0), c.order(0)
        rank = len(shape)
        axes = c.attribute("axes")
        if c.has(1):
            axes = c.needed(1, "axes").tolist()
        if not axes and c.attribute("noop_with_empty_axes", 0):
            c.put(c.input(0), order)
            return
        gone = {axis % rank for axis in (axes if axes else range(rank))}
        keep = bool(c.attribute("keepdims", 1))
        left = order if keep else tuple(a - sum(g < a for g in gone) for a in order if a not in gone)
        data = c.input(0)
        if before:
            data = c.step(before, [data])
        same = data if c.integer and name != "MEAN" else None
        at = c.file.numbers(*sorted(order.index(a) for a in gone))
        if after:
            kept = layouts.stored(c.out.shape, left)
            c.emit(after, [c.step(name, [data, at], kept, keep_dims=keep)], left)
        else:
            c.emit(name, [data, at], left, None, same, keep_dims=keep)
    return translate


def softmax(c: Conversion) -> None:
    """Along the last stored axis; before opset 13 over all axes from `axis` on."""
    shape = c.shape(0)
    rank = len(shape)
    axis = c.attribute("axis", -1 if c.opset >= 13 else 1) % rank
    flat = c.opset < 13 and any(n != 1 for n in shape[axis + 1 :])
    order = c.order(0)
    if flat:
        order = layouts.plain(rank)
    elif order[-1] != axis:
        order = (*(a for a in order if a != axis), axis)
    data = c.input(0, order)
    if flat:
        data = c.reshape(data, (int(np.prod(shape[:axis])), int(np.prod(shape[axis:]))))
    if c.op.name == "LogSoftmax":
        c.put(c.step("LOG_SOFTMAX", [data]), order)
    elif c.integer:
        c.put(fixed_result(c, "SOFTMAX", data, 1 / 256, 0, beta=1.0), order)
    else:
        c.put(c.step("SOFTMAX", [data], beta=1.0), order)


def arg_extreme(c: Conversion) -> None:
    order, rank = c.order(0), len(c.shape(0))
    if c.attribute("select_last_index", 0):
        raise NotThereError("the last of equal elements")
    axis = c.attribute("axis", 0) % rank
    at = c.file.constant("axis", np.array(order.index(axis), np.int32))
    left = tuple(a - (a > axis) for a in order if a != axis)
    spec_shape = tuple(n for i, n in enumerate(c.file.specs[c.input(0)].shape) if i != order.index(axis))
    name = "ARG_MAX" if c.op.name == "ArgMax" else "ARG_MIN"
    found = c.step(name, [c.input(0), at], spec_shape, "int64", output_type="INT64")
    keep = c.attribute("keepdims", 1)
    after = order if keep else left
    c.put(c.reshape(found, layouts.stored(c.out.shape, after)), after)


def batch_norm(c: Conversion) -> None:
    """What no convolution took in: a factor and an addend for each channel."""
    if len([v for v in c.node.outputs if v >= 0]) > 1 and c.attribute("training_mode", 0):
        raise NotThereError("training")
    gamma, beta, mean, variance = (c.needed(i, "statistics").astype(np.float64) for i in range(1, 5))
    factor = gamma / np.sqrt(variance + c.attribute("epsilon", 1e-5))
    order = c.order(0)
    shape = layouts.stored([-1 if a == 1 else 1 for a in range(len(order))], order)
    name = c.file.origin
    scaled = c.step("MUL", [c.input(0), c.file.constant(f"{name}_factor", factor.astype(np.float32).reshape(shape))],
                    **PLAIN)
    addend = (beta - mean * factor).astype(np.float32).reshape(shape)
    c.emit("ADD", [scaled, c.file.constant(f"{name}_addend", addend)], order, fused_activation_function=c.activation)


def _normalized(c: Conversion, data: int, axes: list[int], epsilon: float) -> int:
    """(x - mean) / sqrt(variance + epsilon) over the stored axes."""
    at = c.file.numbers(*axes)
    shape = [1 if i in axes else n for i, n in enumerate(c.file.specs[data].shape)]
    mean = c.step("MEAN", [data, at], shape, keep_dims=True)
    centred = c.step("SUB", [data, mean], **PLAIN)
    variance = c.step("MEAN", [c.step("SQUARE", [centred]), at], shape, keep_dims=True)
    root = c.step("RSQRT", [c.step("ADD", [variance, scalar(c, epsilon)], **PLAIN)])
    return c.step("MUL", [centred, root], **PLAIN)


def layer_norm(c: Conversion) -> None:
    shape, order = c.shape(0), c.order(0)
    rank = len(shape)
    first = c.attribute("axis", -1) % rank
    if len([v for v in c.node.outputs if v >= 0]) > 1:
        raise NotThereError("mean and deviation as results")
    x = _normalized(c, c.input(0), [order.index(a) for a in range(first, rank)], c.attribute("epsilon", 1e-5))
    x = c.step("MUL", [x, c.aligned(1, order)], **PLAIN)
    if c.has(2):
        x = c.step("ADD", [x, c.aligned(2, order)], **PLAIN)
    c.put(x, order)


def instance_norm(c: Conversion) -> None:
    order = c.order(0)
    rank = len(order)
    x = _normalized(c, c.input(0), [order.index(a) for a in range(2, rank)], c.attribute("epsilon", 1e-5))
    shape = layouts.stored([-1 if a == 1 else 1 for a in range(rank)], order)
    factor, addend = (c.file.constant("by_channel", c.needed(i, "factors").reshape(shape)) for i in (1, 2))
    c.put(c.step("ADD", [c.step("MUL", [x, factor], **PLAIN), addend], **PLAIN), order)


def cum_sum(c: Conversion) -> None:
    order = c.order(0)
    axis = axis_at(int(c.needed(1, "axes").reshape(())), len(order), order)
    c.emit("CUMSUM", [c.input(0), c.file.constant("axis", np.array(axis, np.int32))], order,
           exclusive=bool(c.attribute("exclusive", 0)), reverse=bool(c.attribute("reverse", 0)))
