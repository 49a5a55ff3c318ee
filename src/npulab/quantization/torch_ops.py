"""ONNX operators in PyTorch, as far as networks to be quantized have them: for gradients through a network.

Each takes one sample, of the very shapes that the graph says; `torch.vmap` makes batches. Operands that decide shapes
must be constants. What is not here, or is used in a way that is not here, `supported` says.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npulab.errors import UnsupportedError, UsageError
from npulab.ir import Graph, Node
from npulab.ir.ops import OnnxOp
from npulab.quantization.types import Array

Tensor = Any
MOST_ELEMENTS = 1 << 26
"""Of a constant that an index or a shape is made of."""


def pytorch() -> Any:
    """The module torch. Raises: UsageError where it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UsageError("distillation computes gradients in PyTorch, which is not installed",
                         want="the extra 'quantize'", try_="pip install 'npulab[quantize]'") from None


@dataclass(slots=True)
class Call:
    """One node as a function sees it. `constants`: inputs that are constant, None for the others and absent ones."""

    torch: Any
    name: str
    attributes: Mapping[str, object]
    constants: Sequence[Array | None]
    inputs: Sequence[tuple[int, ...]]
    outputs: Sequence[tuple[int, ...]]
    opset: int

    def number(self, name: str, default: float) -> float:
        found = self.attributes.get(name, default)
        assert isinstance(found, int | float)
        return found

    def numbers(self, name: str, place: int | None = None) -> tuple[int, ...] | None:
        """Integers of an attribute, or of the constant input at `place`."""
        found = self.attributes.get(name)
        if isinstance(found, tuple):
            return tuple(int(n) for n in found)
        if isinstance(found, int):
            return (found,)
        array = self.operand(place) if place is not None else None
        return None if array is None else tuple(int(n) for n in array.ravel())

    def operand(self, place: int) -> Array | None:
        return self.constants[place] if place < len(self.constants) else None

    def text(self, name: str, default: str) -> str:
        found = self.attributes.get(name, default)
        return found.decode() if isinstance(found, bytes) else str(found)


class NotHereError(Exception):
    """The operator is used in a way that is not translated."""


def demand(ok: bool, what: str) -> None:
    if not ok:
        raise NotHereError(what)


Made = Callable[..., Any]
"""A function from the node's tensors (None for absent inputs) to its result, or to a tuple of results."""


def made(graph: Graph, n: Node) -> Made:
    """The node as a function. Raises: UnsupportedError for what is not here."""
    op = n.op
    assert isinstance(op, OnnxOp)
    build = BUILD.get(op.name) if not op.domain else None
    values = graph.values
    try:
        demand(build is not None, "the operator")
        assert build is not None
        demand(all(values[v].has_shape and not values[v].dynamic_axes for v in (*n.inputs, *n.outputs) if v >= 0),
               "sizes that are not fixed")
        constants = [np.asarray(values[v].array()) if v >= 0 and values[v].is_constant
                     and values[v].elements <= MOST_ELEMENTS else None for v in n.inputs]
        opset = next((v for d, v in graph.header.opsets if d in ("", "ai.onnx")), 13) if graph.header else 13
        return build(Call(pytorch(), op.name, op.attributes, constants,
                          [values[v].shape if v >= 0 else () for v in n.inputs],
                          [values[v].shape if v >= 0 else () for v in n.outputs], opset))
    except NotHereError as e:
        raise UnsupportedError(f"{op.name} of '{n.name}' is not translated to PyTorch", got=str(e)) from None


def supported(graph: Graph, n: Node) -> bool:
    try:
        made(graph, n)
    except UnsupportedError:
        return False
    return True


def _simple(make: Callable[[Any], Made]) -> Callable[[Call], Made]:
    return lambda c: make(c.torch)


def _windows(c: Call, kernel: Sequence[int], transposed: bool = False
             ) -> tuple[list[int], list[int], list[int], list[int]]:
    """(begins, ends, strides, dilations) of a window over the data's sizes, ends as the result's sizes demand."""
    rank = len(kernel)
    strides, dilations = (list(c.numbers(a) or (1,) * rank) for a in ("strides", "dilations"))
    pads, auto = c.numbers("pads"), c.text("auto_pad", "NOTSET")
    extra = c.numbers("output_padding") or (0,) * rank
    begins, ends = [], []
    for i in range(rank):
        size, out = c.inputs[0][2 + i], c.outputs[0][2 + i]
        reach = (kernel[i] - 1) * dilations[i] + 1
        total = strides[i] * (size - 1) + reach - out if transposed else (out - 1) * strides[i] + reach - size
        if auto.startswith("SAME") or (transposed and c.numbers("output_shape")):  # which has no use for pads
            begin = max(0, total + extra[i])
            begin = begin // 2 if auto == "SAME_UPPER" else begin - begin // 2
        else:
            begin = pads[i] if pads and auto == "NOTSET" else 0
        begins.append(begin)
        ends.append(total - begin)
    return begins, ends, strides, dilations


def _padded(torch: Any, x: Tensor, begins: Sequence[int], ends: Sequence[int], value: float = 0.0) -> Tensor:
    """Negative ends cut off."""
    if not any(begins) and not any(ends):
        return x
    flat = [n for b, e in zip(reversed(begins), reversed(ends), strict=True) for n in (b, e)]
    return torch.nn.functional.pad(x, flat, value=value)


def _conv(c: Call) -> Made:
    torch = c.torch
    begins, ends, strides, dilations = _windows(c, c.inputs[1][2:])
    groups = int(c.number("group", 1))
    demand(len(begins) in (1, 2, 3), "rank")
    f = getattr(torch.nn.functional, f"conv{len(begins)}d")
    if begins == ends:
        return lambda x, w, b=None: f(x, w, b, strides, begins, dilations, groups)
    return lambda x, w, b=None: f(_padded(torch, x, begins, ends), w, b, strides, 0, dilations, groups)


def _conv_transpose(c: Call) -> Made:
    torch = c.torch
    begins, ends, strides, dilations = _windows(c, c.inputs[1][2:], True)
    groups = int(c.number("group", 1))
    demand(len(begins) in (1, 2, 3), "rank")
    f = getattr(torch.nn.functional, f"conv_transpose{len(begins)}d")

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y = _padded(torch, f(x, w, None, strides, 0, 0, groups, dilations), [-n for n in begins], [-n for n in ends])
        return y if b is None else y + b.reshape(-1, *(1,) * len(begins))

    return run


def _gemm(c: Call) -> Made:
    alpha, beta = c.number("alpha", 1.0), c.number("beta", 1.0)
    ta, tb = c.number("transA", 0), c.number("transB", 0)

    def run(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        y = (a.transpose(0, 1) if ta else a) @ (b.transpose(0, 1) if tb else b)
        y = y if alpha == 1 else y * alpha
        return y if bias is None else y + (bias if beta == 1 else bias * beta)

    return run


def _clip(c: Call) -> Made:
    limits = []
    for i, name in enumerate(("min", "max")):
        array = c.operand(1 + i)
        demand(array is not None or len(c.constants) <= 1 + i or c.inputs[1 + i] == (), "computed limits")
        limits.append(float(array.ravel()[0]) if array is not None else c.attributes.get(name))
    return lambda x, *_: c.torch.clamp(x, limits[0], limits[1])


def _pool(c: Call) -> Made:
    torch = c.torch
    kernel = c.numbers("kernel_shape") or ()
    begins, ends, strides, dilations = _windows(c, kernel)
    rank = len(kernel)
    demand(rank in (1, 2, 3) and len(c.outputs) == 1, "rank or indices")
    if c.name == "MaxPool":
        f = getattr(torch.nn.functional, f"max_pool{rank}d")
        return lambda x: f(_padded(torch, x, begins, ends, -math.inf), kernel, strides, 0, dilations)
    demand(all(d == 1 for d in dilations), "dilations")
    inside = not c.number("count_include_pad", 0)
    demand(inside or not c.number("ceil_mode", 0), "ceil_mode with count_include_pad")
    f = getattr(torch.nn.functional, f"avg_pool{rank}d")
    ones = _padded(torch, torch.ones((1, 1, *c.inputs[0][2:])), begins, ends)
    share = f(ones, kernel, strides) if inside else torch.ones(())
    return lambda x: f(_padded(torch, x, begins, ends), kernel, strides) / share


def _reduce(c: Call) -> Made:
    rank = len(c.inputs[0])
    if c.name.startswith("Global"):
        axes, keep = tuple(range(2, rank)), True
    else:
        axes, keep = c.numbers("axes", 1) or tuple(range(rank)), bool(c.number("keepdims", 1))
        demand(len(c.inputs) < 2 or c.operand(1) is not None, "computed axes")
    f = {"ReduceMean": c.torch.mean, "GlobalAveragePool": c.torch.mean, "ReduceSum": c.torch.sum,
         "ReduceMax": c.torch.amax, "GlobalMaxPool": c.torch.amax}[c.name]
    return lambda x, *_: f(x, axes, keep)


def _softmax(c: Call) -> Made:
    rank = len(c.inputs[0])
    axis = int(c.number("axis", -1 if c.opset >= 13 else 1)) % max(1, rank)
    demand(c.opset >= 13 or axis == rank - 1, "axes together")
    return lambda x: c.torch.softmax(x, axis)


def _concat(c: Call) -> Made:
    axis = int(c.number("axis", 0))
    return lambda *xs: c.torch.cat(xs, axis)


def _shaped(c: Call) -> Made:
    """Reshape, Flatten, Squeeze, Unsqueeze, Expand: the graph knows the result's shape."""
    shape = c.outputs[0]
    if c.name == "Expand":
        return lambda x, *_: x.expand(shape)
    return lambda x, *_: x.reshape(shape)


def _transpose(c: Call) -> Made:
    order = c.numbers("perm") or tuple(reversed(range(len(c.inputs[0]))))
    return lambda x: x.permute(order)


def _slice(c: Call) -> Made:
    shape = c.inputs[0]
    starts, ends = c.numbers("starts", 1), c.numbers("ends", 2)
    demand(starts is not None and ends is not None, "computed limits")
    assert starts is not None
    assert ends is not None
    axes = c.numbers("axes", 3) or tuple(range(len(starts)))
    steps = c.numbers("steps", 4) or (1,) * len(starts)
    index: list[Any] = [slice(None)] * len(shape)
    turned = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = range(*slice(start, end if end > -(1 << 31) else None, step).indices(shape[axis]))
        at = axis % len(shape)
        if step < 0:
            turned.append(at)
            places = places[::-1]
        index[at] = slice(places.start, places.stop, places.step)
    return lambda x, *_: x[tuple(index)].flip(turned) if turned else x[tuple(index)]


def _split(c: Call) -> Made:
    axis = int(c.number("axis", 0))
    sizes = [s[axis] for s in c.outputs]
    return lambda x, *_: tuple(c.torch.split(x, sizes, axis))


def _gather(c: Call) -> Made:
    index = c.operand(1)
    demand(index is not None, "computed indices")
    assert index is not None
    axis = int(c.number("axis", 0)) % len(c.inputs[0])
    flat = c.torch.from_numpy(np.where(index < 0, index + c.inputs[0][axis], index).astype(np.int64).ravel())
    return lambda x, _: c.torch.index_select(x, axis, flat).reshape(c.outputs[0])


def _pad(c: Call) -> Made:
    pads, mode = c.numbers("pads", 1), c.text("mode", "constant")
    demand(pads is not None and len(c.inputs) < 4 and mode in ("constant", "reflect", "edge"), "pads")
    assert pads is not None
    fill = c.operand(2)
    value = float(fill.ravel()[0]) if fill is not None and fill.size else c.number("value", 0.0)
    rank = len(pads) // 2
    if mode == "constant":
        return lambda x, *_: _padded(c.torch, x, pads[:rank], pads[rank:], value)
    demand(not any(pads[:2]) and not any(pads[rank : rank + 2]) and rank > 2, "axes")
    flat = [n for i in range(rank - 1, 1, -1) for n in (pads[i], pads[rank + i])]
    return lambda x, *_: c.torch.nn.functional.pad(x, flat, {"edge": "replicate"}.get(mode, mode))


def _resize(c: Call) -> Made:
    torch = c.torch
    before, after = c.inputs[0], c.outputs[0]
    demand(len(before) == 4 and before[:2] == after[:2], "axes")
    mode = c.text("mode", "nearest")
    how = c.text("coordinate_transformation_mode", "half_pixel" if c.name == "Resize" else "asymmetric")
    if mode == "nearest":
        rounding = c.text("nearest_mode", "round_prefer_floor" if c.name == "Resize" else "floor")
        index = [torch.from_numpy(_sources(b, a, how, rounding)) for b, a in zip(before[2:], after[2:], strict=True)]
        return lambda x, *_: x.index_select(2, index[0]).index_select(3, index[1])
    demand(mode == "linear" and how in ("half_pixel", "pytorch_half_pixel", "align_corners"), how)
    demand(how != "pytorch_half_pixel" or min(after[2:]) > 1, how)
    demand(not c.number("antialias", 0), "antialias")
    return lambda x, *_: torch.nn.functional.interpolate(x, after[2:], mode="bilinear",
                                                         align_corners=how == "align_corners")


def _sources(before: int, after: int, how: str, rounding: str) -> Array:
    """Which element each one of the result is of."""
    at = np.arange(after, dtype=np.float64)
    scale = after / before
    if how == "align_corners":
        place = at * (before - 1) / max(1, after - 1)
    elif how == "asymmetric":
        place = at / scale
    else:
        demand(how in ("half_pixel", "pytorch_half_pixel"), how)
        place = (at + 0.5) / scale - 0.5
    f: Mapping[str, Callable[[Any], Any]] = {
        "floor": np.floor, "ceil": np.ceil, "round_prefer_floor": lambda p: np.ceil(p - 0.5),
        "round_prefer_ceil": lambda p: np.floor(p + 0.5)}
    return np.asarray(np.clip(f[rounding](place), 0, before - 1).astype(np.int64))


def _layer_norm(c: Call) -> Made:
    axis = int(c.number("axis", -1)) % len(c.inputs[0])
    shape, epsilon = c.inputs[0][axis:], c.number("epsilon", 1e-5)
    demand(len(c.outputs) == 1, "means as results")

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        y = c.torch.nn.functional.layer_norm(x, shape, eps=epsilon) * scale
        return y if bias is None else y + bias

    return run


def _depth_to_space(c: Call) -> Made:
    b = int(c.number("blocksize", 1))
    n, d, h, w = c.inputs[0]
    dcr = c.text("mode", "DCR") == "DCR"

    def run(x: Tensor) -> Tensor:
        if dcr:
            x = x.reshape(n, b, b, d // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
        else:
            x = x.reshape(n, d // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(c.outputs[0])

    return run


def _space_to_depth(c: Call) -> Made:
    b = int(c.number("blocksize", 1))
    n, d, h, w = c.inputs[0]
    return lambda x: x.reshape(n, d, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(c.outputs[0])


def _gelu(c: Call) -> Made:
    how = c.text("approximate", "none")
    return lambda x: c.torch.nn.functional.gelu(x, approximate=how)


def _fold(c: Call) -> Made:
    f = {"Max": c.torch.maximum, "Min": c.torch.minimum}[c.name]

    def run(*xs: Tensor) -> Tensor:
        y = xs[0]
        for x in xs[1:]:
            y = f(y, x)
        return y

    return run


def _same(c: Call) -> Made:
    demand(len(c.outputs) == 1, "a mask")
    return lambda x, *_: x


def _leaky(c: Call) -> Made:
    alpha = c.number("alpha", 0.01)
    return lambda x: c.torch.where(x >= 0, x, x * alpha)


def _hard_sigmoid(c: Call) -> Made:
    alpha, beta = c.number("alpha", 0.2), c.number("beta", 0.5)
    return lambda x: c.torch.clamp(x * alpha + beta, 0, 1)


def _elu(c: Call) -> Made:
    alpha = c.number("alpha", 1.0)
    return lambda x: c.torch.nn.functional.elu(x, alpha)


BUILD: Mapping[str, Callable[[Call], Made]] = {
    "Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "Clip": _clip, "MaxPool": _pool,
    "MatMul": _simple(lambda t: t.matmul), "Add": _simple(lambda t: t.add), "Sub": _simple(lambda t: t.sub),
    "Mul": _simple(lambda t: t.mul), "Div": _simple(lambda t: t.div), "Pow": _simple(lambda t: t.pow),
    "Relu": _simple(lambda t: t.relu), "Sigmoid": _simple(lambda t: t.sigmoid), "Tanh": _simple(lambda t: t.tanh),
    "Sqrt": _simple(lambda t: t.sqrt), "Exp": _simple(lambda t: t.exp), "Log": _simple(lambda t: t.log),
    "Abs": _simple(lambda t: t.abs), "Neg": _simple(lambda t: t.neg), "Erf": _simple(lambda t: t.erf),
    "Reciprocal": _simple(lambda t: t.reciprocal), "Softplus": _simple(lambda t: t.nn.functional.softplus),
    "HardSwish": _simple(lambda t: t.nn.functional.hardswish),
    "PRelu": _simple(lambda t: lambda x, slope: t.where(x >= 0, x, x * slope)),
    "AveragePool": _pool, "GlobalAveragePool": _reduce, "GlobalMaxPool": _reduce, "ReduceMean": _reduce,
    "ReduceSum": _reduce, "ReduceMax": _reduce, "Softmax": _softmax, "Concat": _concat, "Reshape": _shaped,
    "Flatten": _shaped, "Squeeze": _shaped, "Unsqueeze": _shaped, "Expand": _shaped, "Transpose": _transpose,
    "Slice": _slice, "Split": _split, "Gather": _gather, "Pad": _pad, "Resize": _resize, "Upsample": _resize,
    "LayerNormalization": _layer_norm, "DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth,
    "Gelu": _gelu, "Max": _fold, "Min": _fold, "Identity": _same, "Dropout": _same, "LeakyRelu": _leaky,
    "HardSigmoid": _hard_sigmoid, "Elu": _elu,
}
