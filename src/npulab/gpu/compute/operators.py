"""What each operator of ONNX is as layers. Attributes and their defaults are those of ONNX's operator specification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError
from npulab.gpu.compute import movers, reductions
from npulab.gpu.compute.fusing import Group, attributes, is_float, limits
from npulab.gpu.compute.heavy import attention, convolution, layer_norm, pool, product, softmax, transposed_convolution
from npulab.gpu.compute.layers import Builder, Network, RefusedError
from npulab.gpu.compute.moves import literal
from npulab.gpu.compute.numbers import Numbers
from npulab.gpu.compute.views import Shape, dense
from npulab.ir import DType, Graph, Node
from npulab.ir.ops import OnnxOp

LISTED = 30
"""Nodes that an error names."""
MISFITS = (KeyError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError, AssertionError)
"""What a node that breaks ONNX's rules ends in."""

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


def network(graph: Graph, groups: Sequence[Group], numbers: Numbers | None = None) -> Network:
    """The layers of a network in normal form (fusing.normal). Without `numbers` all is float32.

    Raises: UnsupportedError naming every node that there are no kernels for; CapacityError for tensors beyond counting.
    """
    numbers = numbers or Numbers()
    b = Builder(graph)
    refused: list[tuple[Node, str]] = []
    inputs: dict[str, tuple[int, Shape]] = {}
    for v in (graph.values[i] for i in graph.inputs):
        if v.dtype is not DType.FLOAT32:
            raise UnsupportedError(f"the input '{v.name}' of '{graph.name}' is not of floats", got=str(v),
                                   want="float32 or float16", try_="--device onnxruntime, or a float network")
        if not v.elements:
            raise UnsupportedError(f"the input '{v.name}' of '{graph.name}' is empty", got=str(v))
        tensor = b.tensor(v.elements, number=numbers.border.get(v.name))
        inputs[v.name] = (tensor, v.shape)
        b.held[v.index] = b.as_held(dense(tensor, v.shape))
    for g in groups:
        b.title, b.operators = g.title, g.operators
        b.number = numbers.between.get(g.output, "float32")
        why = ""
        try:
            _one(b, g)
        except RefusedError as e:
            why = str(e)
        except MISFITS as e:
            why = f"its attributes or operands do not fit it, {type(e).__name__}: {e}"[:150].rstrip(": ")
        if why:
            refused.append((g.anchor, why))
            for i in (i for n in g.nodes for i in n.outputs if i >= 0):  # so that the others are looked at, too
                b.held[i] = b.as_held(dense(b.tensor(graph.values[i].elements), graph.values[i].shape))
    if refused:
        raise refusal(graph, refused)
    outputs = {}
    b.title, b.operators = "outputs", ""
    for v in (graph.values[i] for i in graph.outputs):
        if not is_float(graph, v.index):
            raise UnsupportedError(f"the output '{v.name}' of '{graph.name}' is not of floats", got=str(v),
                                   want="float32 or float16", try_="--device onnxruntime")
        b.number = numbers.border.get(v.name, "float32")
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
        if v >= 0 and not b.graph.values[v].elements:
            raise RefusedError("its result is empty")
        if v >= 0 and not is_float(b.graph, v):
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
            if b.graph.values[n.outputs[0]].dtype is DType.FLOAT16 and (
                    x.view is None or b.number_in(x.view) != "float16"):
                text = "half_({0})"
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


Lowering = Callable[[Builder, Node], None]
TABLE: dict[str, Lowering] = {
    **dict.fromkeys((*ONE, "Clip", "LeakyRelu", "HardSigmoid", "Elu", "Celu", "Selu", "ThresholdedRelu", "Swish",
                     "Gelu", "Cast", "Dropout"), _one_number),
    **dict.fromkeys((*TWO, *MANY), _numbers), "BatchNormalization": _batch_norm, "Where": _where,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), movers.reshape),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), movers.blocks),
    "Transpose": movers.transpose, "Expand": movers.expand, "Slice": movers.cut_out, "Split": movers.split,
    "Gather": movers.gather, "Concat": movers.concat, "Pad": movers.pad, "Tile": movers.tile,
    **dict.fromkeys(reductions.REDUCED, reductions.reduce),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), reductions.global_pool),
    **dict.fromkeys(("Resize", "Upsample"), reductions.resize),
    **dict.fromkeys(("MaxPool", "AveragePool"), pool), **dict.fromkeys(("Softmax", "LogSoftmax"), softmax),
    "LayerNormalization": layer_norm, "ConvTranspose": transposed_convolution,
}
