"""What each operator of ONNX is as layers. Attributes and their defaults are those of ONNX's operator specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError
from npulab.gpu.compute.fusing import Group, attributes, is_float32, limits
from npulab.gpu.compute.heavy import attention, convolution, layer_norm, pool, product, softmax, transposed_convolution
from npulab.gpu.compute.layers import Builder, Held, Network, RefusedError, Tensor
from npulab.gpu.compute.moves import Take, literal
from npulab.gpu.compute.views import Shape, View, dense, nested
from npulab.gpu.compute.windows import Reduce, Resample
from npulab.ir import DType, Graph, Node
from npulab.ir.ops import OnnxOp

LISTED = 30
"""Nodes that an error names."""

ONE: dict[str, str] = {
    "Relu": "relu_({0})", "Sigmoid": "sigmoid_({0})", "Tanh": "tanh({0})", "HardSwish": "hardswish_({0})",
    "Softplus": "softplus_({0})", "Mish": "mish_({0})", "Softsign": "softsign_({0})", "Exp": "exp({0})",
    "Log": "log({0})", "Sqrt": "sqrt({0})", "Reciprocal": "reciprocal_({0})", "Abs": "fabs({0})", "Neg": "(-{0})",
    "Floor": "floor({0})", "Ceil": "ceil({0})", "Round": "rint({0})", "Erf": "erf({0})", "Sin": "sin({0})",
    "Cos": "cos({0})", "Sign": "sign_({0})", "Identity": "{0}",
}
"""Functions of one number."""
TWO: dict[str, str] = {"Add": "({0} + {1})", "Sub": "({0} - {1})", "Mul": "({0} * {1})", "Div": "({0} / {1})",
                       "Pow": "pow({0}, {1})", "PRelu": "leaky_({0}, {1}, 0.0f)"}
MANY: dict[str, str] = {"Max": "fmax({0}, {1})", "Min": "fmin({0}, {1})", "Sum": "({0} + {1})",
                        "Mean": "({0} + {1})"}
REDUCED: dict[str, str] = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min",
                           "ReduceProd": "product", "ReduceL1": "l1", "ReduceL2": "l2", "ReduceSumSquare": "squares"}


def network(graph: Graph, groups: Sequence[Group]) -> Network:
    """The layers of a network in normal form (fusing.normal).

    Raises: UnsupportedError naming every node that there are no kernels for; CapacityError for tensors beyond counting.
    """
    b = Builder(graph)
    refused: list[tuple[Node, str]] = []
    inputs: dict[str, tuple[int, Shape]] = {}
    for v in (graph.values[i] for i in graph.inputs):
        if v.dtype is not DType.FLOAT32:
            raise UnsupportedError(f"the input '{v.name}' of '{graph.name}' is not of floats", got=str(v),
                                   want="float32", try_="--device onnxruntime, or a float network")
        tensor = b.tensor(v.elements)
        inputs[v.name] = (tensor, v.shape)
        b.held[v.index] = b.as_held(dense(tensor, v.shape))
    for g in groups:
        b.title, b.operators = g.title, g.operators
        try:
            _one(b, g)
        except RefusedError as e:
            refused.append((g.anchor, str(e)))
            for v in (v for n in g.nodes for v in n.outputs if v >= 0):
                b.held[v] = b.as_held(dense(b.tensor(graph.values[v].elements), graph.values[v].shape))
    if refused:
        raise refusal(graph, refused)
    outputs = {}
    b.title, b.operators = "outputs", ""
    for v in (graph.values[i] for i in graph.outputs):
        if b.constant(v.index) is None and not is_float32(graph, v.index):
            raise UnsupportedError(f"the output '{v.name}' of '{graph.name}' is not of floats", got=str(v),
                                   want="float32", try_="--device onnxruntime")
        held = b.get(v.index)
        outputs[v.name] = (b.dense_of(held), held.shape)
    return Network(graph.name, tuple(b.tensors), tuple(b.layers), inputs, outputs, tuple(groups))


def refusal(graph: Graph, refused: Sequence[tuple[Node, str]]) -> UnsupportedError:
    """All of them, by operator."""
    by_kind: dict[tuple[str, str], list[str]] = {}
    for n, why in refused:
        by_kind.setdefault((n.op.name, why), []).append(n.name or str(n.index))
    lines = []
    left = LISTED
    for (op, why), names in by_kind.items():
        shown = ", ".join(names[:max(1, left)]) + (f" and {len(names) - left} more" if len(names) > left > 0 else "")
        left -= len(names)
        lines.append(f"{op}: {why} ({len(names)}: {shown})")
    return UnsupportedError(f"'{graph.name}' has nodes that there are no OpenCL kernels for",
                            got="\n          ".join(lines), want=f"{len(refused)} nodes fewer",
                            try_="--device onnxruntime runs the network here; npulab patch changes operators")


def _one(b: Builder, g: Group) -> None:
    n = g.anchor
    op = n.op
    if g.kind == "attention":
        attention(b, g)
        return
    if isinstance(op, OnnxOp) and op.domain:
        raise RefusedError(f"an operator of {op.domain}")
    if _folded(b, n):
        return
    for v in n.outputs:
        if v >= 0 and (b.graph.values[v].dynamic_axes or not b.graph.values[v].has_shape):
            raise RefusedError("the size of its result is known only when it runs")
        if v >= 0 and not is_float32(b.graph, v):
            raise RefusedError(f"its result is of {b.graph.values[v].dtype.value}")
    if g.kind == "convolution":
        convolution(b, g)
    elif g.kind == "product":
        product(b, g)
    elif op.name in TABLE:
        TABLE[op.name](b, n)
    else:
        raise RefusedError("no such kernel")


def _folded(b: Builder, n: Node) -> bool:
    """Constants of constants that the pass left: weights stored as integers, and moves of large ones."""
    given = [b.constant(v) if v >= 0 else None for v in n.inputs]
    own: Any = attributes(n)
    if not given or given[0] is None or any(a is None for v, a in zip(n.inputs, given, strict=True) if v >= 0):
        return False
    x: NDArray[Any] = given[0]
    match n.op.name:
        case "DequantizeLinear" if not own.get("block_size"):
            scale = np.asarray(given[1])
            axis = own.get("axis", 1)
            zero = given[2] if len(given) > 2 and given[2] is not None else np.zeros(1, x.dtype)
            wide = [1] * x.ndim
            if scale.size > 1:
                wide[axis] = -1
            found = (x.astype(np.int32) - zero.astype(np.int32).reshape(wide)).astype(np.float32) * scale.reshape(wide)
        case "Transpose":
            found = x.transpose(own.get("perm") or range(x.ndim)[::-1])
        case "Reshape":
            found = x.reshape(b.graph.values[n.outputs[0]].shape)
        case "Cast" if b.graph.values[n.outputs[0]].dtype.numpy is not None:
            found = x.astype(b.graph.values[n.outputs[0]].dtype.numpy)
        case "Identity":
            found = x
        case _:
            return False
    b.fold(n.outputs[0], found)
    return True


# one element at a time


def _one_number(b: Builder, n: Node) -> None:
    x = b.get(n.inputs[0])
    own: Any = attributes(n)

    def call(name: str, a: float = 0.0, c: float = 0.0) -> str:
        return f"{name}({{0}}, {literal(a)}, {literal(c)})"

    match n.op.name:
        case "Clip":
            bounds = limits(b.graph, n)
            if bounds is None:
                raise RefusedError("its limits are computed")
            text = call("clip_", *bounds)
        case "LeakyRelu":
            text = call("leaky_", own.get("alpha", 0.01))
        case "HardSigmoid":
            text = call("hardsigmoid_", own.get("alpha", 0.2), own.get("beta", 0.5))
        case "Elu" | "Celu":
            text = call(f"{n.op.name.lower()}_", own.get("alpha", 1.0))
        case "Selu":
            text = call("selu_", own.get("alpha", 1.6732632423543772), own.get("gamma", 1.0507009873554805))
        case "ThresholdedRelu":
            text = call("threshold_", own.get("alpha", 1.0))
        case "Swish":
            text = call("swish_", own.get("alpha", 1.0))
        case "Gelu":
            text = "gelu_tanh_({0})" if own.get("approximate") in ("tanh", b"tanh") else "gelu_({0})"
        case "Cast" | "Dropout":
            if n.op.name == "Dropout" and len(n.outputs) > 1 and n.outputs[1] >= 0:
                raise RefusedError("its mask is asked for")
            text = "{0}"
        case name:
            text = ONE[name]
    b.set(n.outputs[0], b.applied(text, [x], x.shape))


def _numbers(b: Builder, n: Node) -> None:
    """Operators of two, or of any number, that broadcast."""
    values = [b.get(v) for v in n.inputs]
    shape = np.broadcast_shapes(*(v.shape for v in values))
    text = TWO.get(n.op.name) or MANY[n.op.name]
    if n.op.name == "Pow" and (c := b.numbers(n.inputs[1])) is not None and c.size == 1:
        power = float(c.reshape(-1)[0])
        plain = {2.0: "({0} * {0})", 0.5: "sqrt({0})", -0.5: "rsqrt({0})", 1.0: "{0}", -1.0: "reciprocal_({0})"}
        if power in plain:
            x = b.as_held(b.stored(values[0])) if power == 2.0 else values[0]
            b.set(n.outputs[0], b.applied(plain[power], [x], shape))
            return
    found = values[0]
    for other in values[1:]:
        found = b.applied(text, [found, other], shape)
    if n.op.name == "Mean":
        found = b.applied(f"({{0}} / {literal(len(values))})", [found], shape)
    b.set(n.outputs[0], found)


def _batch_norm(b: Builder, n: Node) -> None:
    """x * scale + shift, for each channel."""
    gamma, beta, mean, variance = (b.numbers(v) for v in n.inputs[1:5])
    own: Any = attributes(n)
    if gamma is None or beta is None or mean is None or variance is None or own.get("training_mode"):
        raise RefusedError("its statistics are computed")
    x = b.get(n.inputs[0])
    scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + own.get("epsilon", 1e-5))
    shift = beta - mean * scale
    wide = [-1 if i == 1 else 1 for i in range(len(x.shape))]
    parts = [b.as_held(dense(b.tensor(a.size, a.astype(np.float32)), a.reshape(wide).shape)) for a in (scale, shift)]
    b.set(n.outputs[0], b.applied("fma({0}, {1}, {2})", [x, *parts], x.shape, 2))


def _where(b: Builder, n: Node) -> None:
    if b.constant(n.inputs[0]) is None:
        raise RefusedError("its condition is computed")
    values = [b.get(v) for v in n.inputs]
    shape = np.broadcast_shapes(*(v.shape for v in values))
    b.set(n.outputs[0], b.applied("({0} != 0.0f ? {1} : {2})", values, shape))


# views


def _views(b: Builder, n: Node, how: Callable[[View], View | None], shape: Shape) -> None:
    """The same change of every operand of an expression; of the dense result, where a view cannot have it."""
    held = b.get(n.inputs[0])
    changed = [how(v.broadcast(held.shape)) for v in held.operands]
    if any(v is None for v in changed):
        plain = b.as_held(dense(b.dense_of(held), held.shape))
        changed = [how(plain.operands[0])]
        held = plain
    b.set(n.outputs[0], Held(held.expression, tuple(v for v in changed if v is not None), shape, held.operations))


def _reshape(b: Builder, n: Node) -> None:
    shape = b.graph.values[n.outputs[0]].shape
    if math.prod(shape) != math.prod(b.get(n.inputs[0]).shape):
        raise RefusedError("its result has another number of elements")
    _views(b, n, lambda v: v.reshaped(shape), shape)


def _transpose(b: Builder, n: Node) -> None:
    shape = b.get(n.inputs[0]).shape
    own: Any = attributes(n)
    perm = tuple(own.get("perm") or range(len(shape))[::-1])
    _views(b, n, lambda v: v.transposed(perm), tuple(shape[p] for p in perm))


def _expand(b: Builder, n: Node) -> None:
    shape = b.graph.values[n.outputs[0]].shape
    _views(b, n, lambda v: v.broadcast(shape), shape)


def _integers(b: Builder, n: Node, i: int, name: str) -> tuple[int, ...] | None:
    """Whole numbers that are an input in newer opsets and an attribute in older ones."""
    if i < len(n.inputs) and n.inputs[i] >= 0:
        found = b.constant(n.inputs[i])
        if found is None:
            raise RefusedError(f"its {name} are computed")
        return tuple(int(k) for k in found.reshape(-1))
    own: Any = attributes(n).get(name)
    return None if own is None else tuple(own)


def _slice(b: Builder, n: Node) -> None:
    shape = b.get(n.inputs[0]).shape
    starts, ends = _integers(b, n, 1, "starts"), _integers(b, n, 2, "ends")
    assert starts is not None
    assert ends is not None
    axes = _integers(b, n, 3, "axes") or tuple(range(len(starts)))
    steps = _integers(b, n, 4, "steps") or (1,) * len(starts)
    ranges = {a % len(shape): range(*slice(s, e if not (e < -shape[a % len(shape)] and k < 0) else None, k).indices(
        shape[a % len(shape)])) for a, s, e, k in zip(axes, starts, ends, steps, strict=True)}

    def cut(v: View) -> View:
        for axis, r in ranges.items():
            v = v.sliced(axis, r.start if len(r) else 0, len(r), r.step)
        return v

    _views(b, n, cut, tuple(len(ranges[i]) if i in ranges else m for i, m in enumerate(shape)))


def _split(b: Builder, n: Node) -> None:
    held = b.get(n.inputs[0])
    own: Any = attributes(n)
    axis = own.get("axis", 0) % len(held.shape)
    view, at = b.stored(held), 0
    for v in n.outputs:
        count = b.graph.values[v].shape[axis] if v >= 0 else 0
        if v >= 0:
            b.set(v, view.sliced(axis, at, count))
        at += count
    if at != held.shape[axis]:
        raise RefusedError("its parts are not those of its input")


def _gather(b: Builder, n: Node) -> None:
    """With constant indices: a part, or rows in another order."""
    held, index = b.get(n.inputs[0]), b.constant(n.inputs[1])
    own: Any = attributes(n)
    if index is None:
        raise RefusedError("its indices are computed")
    axis = own.get("axis", 0) % len(held.shape)
    size = held.shape[axis]
    if index.size and not (-size <= int(index.min()) and int(index.max()) < size):
        raise RefusedError("its indices are out of range")
    places = index.reshape(-1).astype(np.int64) % max(size, 1)
    shape = (*held.shape[:axis], *index.shape, *held.shape[axis + 1 :])
    if not index.ndim:
        _views(b, n, lambda v: v.picked(axis, int(places[0])), shape)
        return
    taken = _take(b, held, axis, places)
    view = taken.reshaped(shape)
    assert view is not None
    b.set(n.outputs[0], view)


def _take(b: Builder, held: Held, axis: int, places: NDArray[Any]) -> View:
    """Elements along an axis, by position; dense."""
    steps = set(np.diff(places).tolist())
    if len(places) and len(steps) <= 1:  # evenly spaced: a view, copied later if at all
        view = b.stored(held).sliced(axis, int(places[0]), len(places), steps.pop() if steps else 1)
        return b.stored(b.as_held(view), tuple(range(len(held.shape))))
    tensor = b.dense_of(held)
    table = b.tensor(len(places), places.astype(np.int32))
    shape = (*held.shape[:axis], len(places), *held.shape[axis + 1 :])
    what = Take(math.prod(held.shape[:axis]), held.shape[axis], len(places), math.prod(held.shape[axis + 1 :]))
    return b.emit(what, (tensor, table), shape)


def _concat(b: Builder, n: Node) -> None:
    parts = [b.get(v) for v in n.inputs]
    shape = list(b.graph.values[n.outputs[0]].shape)
    own: Any = attributes(n)
    axis = own["axis"] % len(shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    first = max((v.broadcast(p.shape) for p in parts for v in p.operands), key=lambda v: v.elements)
    order = nested(first)
    out = dense(b.tensor(math.prod(shape)), [shape[i] for i in order])
    inverse = sorted(range(len(order)), key=lambda i: order[i])
    view, at = out.transposed(inverse), 0
    for p in parts:
        b.place(p, view.sliced(axis, at, p.shape[axis]))
        at += p.shape[axis]
    b.set(n.outputs[0], view)


def _pad(b: Builder, n: Node) -> None:
    held = b.get(n.inputs[0])
    rank = len(held.shape)
    own: Any = attributes(n)
    mode = own.get("mode", "constant")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    given = _integers(b, n, 1, "pads")
    axes = [a % rank for a in _integers(b, n, 3, "axes") or range(rank)]
    assert given is not None
    pads = {a: (given[i], given[i + len(axes)]) for i, a in enumerate(axes)}
    if mode != "constant":
        view = b.stored(held)
        for a, (before, after) in pads.items():
            if before or after:
                kinds = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
                if mode not in kinds or min(before, after) < 0:
                    raise RefusedError(f"mode {mode}")
                places = np.pad(np.arange(view.shape[a]), (before, after), kinds[mode])  # type: ignore[call-overload]
                view = _take(b, b.as_held(view), a, places)
        b.set(n.outputs[0], view)
        return
    value = 0.0
    if len(n.inputs) > 2 and n.inputs[2] >= 0:
        number = b.constant(n.inputs[2])
        if number is None:
            raise RefusedError("its value is computed")
        value = float(number.reshape(-1)[0])
    shape = tuple(m + sum(pads.get(i, (0, 0))) for i, m in enumerate(held.shape))
    if any(min(p) < 0 for p in pads.values()):  # negative: cut
        view = b.stored(held)
        for a, (before, after) in pads.items():
            view = view.sliced(a, max(0, -before), view.shape[a] + min(before, 0) + min(after, 0))
        held, pads = b.as_held(view), {a: (max(0, p), max(0, q)) for a, (p, q) in pads.items()}
    order = nested(max((v.broadcast(held.shape) for v in held.operands), key=lambda v: v.elements))
    out = dense(b.tensor(math.prod(shape)), [shape[i] for i in order])
    view = out.transposed(sorted(range(rank), key=lambda i: order[i]))
    b.place(Held(literal(value), (), shape), view)
    for a, (before, _) in pads.items():
        view = view.sliced(a, before, held.shape[a])
    b.place(held, view)
    b.set(n.outputs[0], out.transposed(sorted(range(rank), key=lambda i: order[i])))


def _tile(b: Builder, n: Node) -> None:
    times = _integers(b, n, 1, "repeats")
    shape = b.get(n.inputs[0]).shape
    assert times is not None
    apart = tuple(m for pair in zip((1,) * len(shape), shape, strict=True) for m in pair)
    wide = tuple(m for pair in zip(times, shape, strict=True) for m in pair)
    view = b.view(n.inputs[0]).reshaped(apart)
    assert view is not None
    whole = b.dense_of(b.as_held(view.broadcast(wide)))
    b.set(n.outputs[0], dense(whole, tuple(t * m for t, m in zip(times, shape, strict=True))))


def _blocks(b: Builder, n: Node) -> None:
    """DepthToSpace and SpaceToDepth: a reshape, a transpose, a reshape."""
    own: Any = attributes(n)
    k = own["blocksize"]
    count, c, h, w = b.get(n.inputs[0]).shape
    if n.op.name == "SpaceToDepth":
        first, perm, last = (count, c, h // k, k, w // k, k), (0, 3, 5, 1, 2, 4), (count, c * k * k, h // k, w // k)
    elif own.get("mode", "DCR") in ("DCR", b"DCR"):
        first, perm, last = (count, k, k, c // k**2, h, w), (0, 3, 4, 1, 5, 2), (count, c // k**2, h * k, w * k)
    else:
        first, perm, last = (count, c // k**2, k, k, h, w), (0, 1, 4, 2, 5, 3), (count, c // k**2, h * k, w * k)
    view = b.view(n.inputs[0])
    split = view.reshaped(first) or dense(b.dense(n.inputs[0]), first)
    moved = split.transposed(perm)
    joined = moved.reshaped(last)
    if joined is None:  # channels last again, whatever they were
        inner = (0, 2, 4, 1, 3, 5) if n.op.name == "SpaceToDepth" else (0, 2, 3, 4, 5, 1)
        if n.op.name == "SpaceToDepth":
            inner = (0, 4, 5, 1, 2, 3)
        tensor = b.dense_of(b.as_held(moved), inner)
        joined = dense(tensor, (last[0], last[2], last[3], last[1])).transposed((0, 3, 1, 2))
    b.set(n.outputs[0], joined)


# several elements at a time


def _reduce(b: Builder, n: Node) -> None:
    own: Any = attributes(n)
    axes = _integers(b, n, 1, "axes")
    if not axes and own.get("noop_with_empty_axes"):
        b.set(n.outputs[0], b.get(n.inputs[0]))
        return
    _reduced(b, n, REDUCED[n.op.name], axes or None, bool(own.get("keepdims", 1)))


def _global_pool(b: Builder, n: Node) -> None:
    rank = len(b.get(n.inputs[0]).shape)
    _reduced(b, n, "mean" if n.op.name == "GlobalAveragePool" else "max", tuple(range(2, rank)), True)


def _reduced(b: Builder, n: Node, kind: Any, axes: Sequence[int] | None, keep: bool) -> None:
    view = b.view(n.inputs[0])
    rank = len(view.shape)
    over = tuple(sorted({a % rank for a in axes})) if axes is not None else tuple(range(rank))
    # the axes that stay lie as they did
    order = nested(view)
    turned = view.transposed(order)
    inside = tuple(i for i, a in enumerate(order) if a in over)
    kept = [a for a in order if a not in over]
    found = b.emit(Reduce(kind, turned.shape, inside, (turned.strides, turned.offset)), (view.tensor,),
                   tuple(view.shape[a] for a in kept))
    plain = found.transposed([kept.index(a) for a in range(rank) if a not in over])
    if keep:
        strides = iter(zip(plain.shape, plain.strides, strict=True))
        pairs = [(1, 0) if a in over else next(strides) for a in range(rank)]
        plain = View(plain.tensor, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))
    b.set(n.outputs[0], plain)


def _resize(b: Builder, n: Node) -> None:
    own: Any = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes(n).items()}
    x, out = b.get(n.inputs[0]).shape, b.graph.values[n.outputs[0]].shape
    mode = own.get("mode", "nearest")
    if mode not in ("nearest", "linear") or own.get("antialias") or own.get("exclude_outside"):
        raise RefusedError(f"mode {mode}{', antialiased' if own.get('antialias') else ''}")
    if len(x) != 4 or x[:2] != out[:2]:
        raise RefusedError("it resizes something else than the height and width of images")
    asked = b.constant(n.inputs[2]) if len(n.inputs) > 2 and n.inputs[2] >= 0 else None
    if n.op.name == "Upsample":
        asked = b.constant(n.inputs[1]) if len(n.inputs) > 1 else np.array(own.get("scales", ()))
    tables = []
    for axis in (2, 3):
        scale = float(asked.reshape(-1)[axis]) if asked is not None and asked.size == 4 else out[axis] / x[axis]
        kind = own.get("coordinate_transformation_mode",
                       "asymmetric" if n.op.name == "Upsample" or b.opset < 11 else "half_pixel")
        at = positions(kind, x[axis], out[axis], scale)
        tables += list(taps(at, x[axis], mode, own.get("nearest_mode", "round_prefer_floor" if b.opset > 10 and
                                                       n.op.name == "Resize" else "floor")))
    count = tables[0].shape[1]
    constants = [b.tensor(t.size, t.reshape(-1)) for t in tables]
    image = b.dense(n.inputs[0], (0, 2, 3, 1))
    what = Resample((x[0], x[2], x[3], x[1]), out[2:], count)
    b.set(n.outputs[0], b.emit(what, (image, *constants), (x[0], *out[2:], x[1])).transposed((0, 3, 1, 2)))


def positions(kind: str, size: int, out: int, scale: float) -> NDArray[np.float64]:
    """Where each element of the result lies in the input."""
    i = np.arange(out, dtype=np.float64)
    match kind:
        case "half_pixel":
            return np.asarray((i + 0.5) / scale - 0.5)
        case "asymmetric":
            return np.asarray(i / scale)
        case "align_corners":
            return i * (size - 1) / (out - 1) if out > 1 else i * 0
        case "pytorch_half_pixel":
            return (i + 0.5) / scale - 0.5 if out > 1 else i * 0
    raise RefusedError(f"coordinates {kind}")


def taps(at: NDArray[np.float64], size: int, mode: str, nearest: str) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(elements of the input, their weights), [out, taps]."""
    if mode == "linear":
        low = np.floor(at)
        weight = (at - low).astype(np.float32)
        both = np.clip(np.stack([low, low + 1], 1), 0, size - 1).astype(np.int32)
        return both, np.stack([1 - weight, weight], 1)
    rounded = {"round_prefer_floor": np.ceil(at - 0.5), "round_prefer_ceil": np.floor(at + 0.5),
               "floor": np.floor(at), "ceil": np.ceil(at)}[nearest]
    return np.clip(rounded, 0, size - 1).astype(np.int32)[:, None], np.ones((len(at), 1), np.float32)


Lowering = Callable[[Builder, Node], None]
TABLE: dict[str, Lowering] = {
    **dict.fromkeys(ONE, _one_number), **dict.fromkeys(TWO, _numbers), **dict.fromkeys(MANY, _numbers),
    **dict.fromkeys(("Clip", "LeakyRelu", "HardSigmoid", "Elu", "Celu", "Selu", "ThresholdedRelu", "Swish", "Gelu",
                     "Cast", "Dropout"), _one_number),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _blocks), **dict.fromkeys(REDUCED, _reduce),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    **dict.fromkeys(("MaxPool", "AveragePool"), pool), **dict.fromkeys(("Resize", "Upsample"), _resize),
    "BatchNormalization": _batch_norm, "Where": _where, "Transpose": _transpose, "Expand": _expand, "Slice": _slice,
    "Split": _split, "Gather": _gather, "Concat": _concat, "Pad": _pad, "Tile": _tile, "Softmax": softmax,
    "LogSoftmax": softmax, "LayerNormalization": layer_norm, "ConvTranspose": transposed_convolution,
}
__all__ = ["TABLE", "Tensor", "network"]
