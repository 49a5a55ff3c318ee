"""Which operators each plan takes, as declared rules: a docstring is the rule, the function finds what breaks it.

The same rules give the verdict of `check`, the error of `compile` and the support table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from npulab.ir import DType, Graph, Node, Value
from npulab.ir.ops import (
    Add,
    Concat,
    Conv2D,
    DepthwiseConv2D,
    Elementwise,
    FullyConnected,
    Mean,
    Pad,
    Pool2D,
    Reshape,
    Split,
)
from npulab.plan.types import Reason
from npulab.targets.vivante.chips import Chip
from npulab.targets.vivante.reference import unsigned_zero_point
from npulab.targets.vivante.tables import STEPS_OFF, steps_off
from npulab.targets.vivante.tiling import cdiv

EIGHT_BIT = (DType.INT8, DType.UINT8)
TEFLON = "Mesa 25.0.7 Teflon (TP notes 3.8, 4.2)"
ENGINE = "NN notes, sections 2 and 6"


@dataclass(frozen=True, slots=True)
class Case:
    """What a rule looks at."""

    graph: Graph
    node: Node
    chip: Chip
    features: frozenset[str] = frozenset()

    def input(self, i: int) -> Value | None:
        return self.graph.value(self.node, i)

    @property
    def data(self) -> Value:
        """The first computed input (SPLIT has its axis first)."""
        return self.graph.values[self.node.inputs[1 if isinstance(self.node.op, Split) else 0]]

    @property
    def output(self) -> Value:
        return self.graph.values[self.node.outputs[0]]

    def activations(self) -> Iterator[Value]:
        """Inputs that are data, and outputs."""
        op = self.node.op
        inputs: tuple[int, ...] = self.node.inputs
        if isinstance(op, Conv2D | DepthwiseConv2D | FullyConnected | Pad | Pool2D | Mean | Reshape | Elementwise):
            inputs = inputs[:1]
        elif isinstance(op, Split):
            inputs = inputs[1:2]
        for v in (*inputs, *self.node.outputs):
            if v >= 0:
                yield self.graph.values[v]


Found = Iterator[tuple[str, str]]
"""(what was found, what would make it legal)."""
Check = Callable[[Case], Found]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule for some operators in some plans."""

    text: str
    ops: tuple[type, ...]
    plans: tuple[str, ...]
    source: str
    find: Check


RULES: list[Rule] = []
SUPPORTED: dict[str, tuple[type, ...]] = {
    "reference": (Conv2D, DepthwiseConv2D, Add, Concat, Split, Pad, FullyConnected),
    "best": (Conv2D, DepthwiseConv2D, Add, Concat, Split, Pad, FullyConnected, Pool2D, Mean, Reshape,
             Elementwise),
}
"""Operators that a plan can lower at all."""

BOTH = ("reference", "best")
CONVOLUTIONS = (Conv2D, DepthwiseConv2D)
WEIGHTED = (Conv2D, DepthwiseConv2D, FullyConnected)


def rule(*ops: type, plans: tuple[str, ...] = BOTH, source: str = ENGINE) -> Callable[[Check], Check]:
    """Register the decorated function; its docstring is the rule as users read it."""

    def register(find: Check) -> Check:
        RULES.append(Rule(" ".join((find.__doc__ or "").split()), ops, plans, source, find))
        return find

    return register


def names(op: type) -> str:
    """An operator class as users know it."""
    return {
        Conv2D: "CONV_2D", DepthwiseConv2D: "DEPTHWISE_CONV_2D", Add: "ADD", Concat: "CONCATENATION", Split: "SPLIT",
        Pad: "PAD", FullyConnected: "FULLY_CONNECTED", Pool2D: "AVERAGE_POOL_2D", Mean: "MEAN", Reshape: "RESHAPE",
        Elementwise: "ABS, ELU, HARD_SWISH, LEAKY_RELU, LOGISTIC, RELU, RELU6, RELU_N1_TO_1, TANH",
    }[op]


def reasons(graph: Graph, node: Node, chip: Chip, plan: str,
            features: frozenset[str] = frozenset()) -> tuple[Reason, ...]:
    """Every rule of `plan`, with these features asked for, that `node` breaks."""
    if not isinstance(node.op, SUPPORTED[plan]):
        return (_no_lowering(graph, node, plan),)
    if missing := _missing(node):
        return (Reason("An operator has all its inputs and outputs.", missing, "npulab", "fix the export"),)
    case = Case(graph, node, chip, features)
    broken: list[Reason] = []
    for r in RULES:
        if plan in r.plans and isinstance(node.op, r.ops):
            broken += [Reason(r.text, found, r.source, remedy) for found, remedy in r.find(case)]
            if broken and r.find in GATES:
                break  # the rules behind a gate rely on it
    return tuple(broken)


def uneven_channels(graph: Graph, node: Node, chip: Chip) -> tuple[Reason, ...]:
    """What the open driver refused until February 2024; an option asks for it again."""
    if not isinstance(node.op, WEIGHTED) or not node.outputs:
        return ()
    channels = graph.values[node.outputs[0]].shape[-1:] or (0,)
    if channels[0] % chip.nn_cores == 0:
        return ()
    return (Reason(f"Output channels are a multiple of the {chip.nn_cores} NN cores.", f"{channels[0]} channels",
                   "option --channels multiple-of-cores: the open driver until February 2024", "--channels any"),)


def _missing(node: Node) -> str:
    """What a node of a supported operator lacks: its operands, present; at least one result."""
    op = node.op
    if isinstance(op, Concat):
        needed = range(max(1, len(node.inputs)))
    else:
        needed = range(2 if isinstance(op, (*WEIGHTED, Add, Split, Pad, Mean)) else 1)
    for i in needed:
        if i >= len(node.inputs) or node.inputs[i] < 0:
            return f"input {i} is absent"
    return "" if node.outputs else "it has no output"


_WHY_NOT = {
    "SOFTMAX": ("A softmax needs the largest value and a sum of exponentials; what the engines are known to do between "
                "jobs is 8-bit sums and tables, which cannot hold either within a step of the output.",
                "NN notes 9.2, TP notes 2.5"),
    "MAX_POOL_2D": ("The descriptor has a max pooling field, but what it does on silicon is not known.",
                    "NN notes, section 14, item 8"),
}


def _no_lowering(graph: Graph, node: Node, plan: str) -> Reason:
    rule_text, source = _WHY_NOT.get(node.op.name, ("", ""))
    if plan == "reference" or not rule_text:
        listed = ", ".join(names(op) for op in SUPPORTED[plan])
        rule_text = f"Plan {plan} has lowerings for {listed}."
        source = TEFLON if plan == "reference" else "npulab"
    return Reason(rule_text, node.op.name, source)


def support_table() -> list[tuple[str, str, str]]:
    """(operators, rule, source), in order of declaration."""
    out = []
    for r in RULES:
        plans = "" if r.plans == BOTH else f" [plan {r.plans[0]}]"
        ops = "every operator" if r.ops == EVERY else ", ".join(names(op) for op in r.ops)
        out.append((ops, r.text + plans, r.source))
    return out


EVERY = SUPPORTED["best"]

@rule(*EVERY)
def has_shapes(case: Case) -> Found:
    """Tensors have known shapes of one to four dimensions, none of size zero, and a batch of one."""
    for v in case.activations():
        if not 1 <= len(v.shape) <= 4 or 0 in v.shape:
            yield f"'{v.name}' has shape {list(v.shape)}", "give the tensor a shape of one to four dimensions"
        elif len(v.shape) == 4 and v.shape[0] != 1:
            yield f"'{v.name}' has a batch of {v.shape[0]}", "run one image at a time"
        elif any(axis > 0 for axis in v.dynamic_axes):  # a dynamic batch is run with the batch of one it is stored with
            yield f"'{v.name}' has a dynamic dimension", "fix the input size when exporting the model"


@rule(*EVERY)
def eight_bits(case: Case) -> Found:
    """Activations are int8 or uint8 with one scale and one zero point for the whole tensor."""
    for v in case.activations():
        if v.dtype not in EIGHT_BIT:
            yield f"'{v.name}' is {v.dtype.value}", "quantize the model to 8 bits, inputs and outputs included"
        elif v.quantization is None:
            yield f"'{v.name}' has no quantization", "quantize the model to 8 bits"
        elif not v.quantization.per_tensor:
            yield f"'{v.name}' has {len(v.quantization.scales)} scales", "quantize activations per tensor"
        elif not _holds_zero_point(v):
            yield f"'{v.name}' has the zero point {v.quantization.zero_point}", "fix the export"


def _holds_zero_point(v: Value) -> bool:
    low = -128 if v.dtype is DType.INT8 else 0
    return v.quantization is None or low <= v.quantization.zero_point <= low + 255


@rule(*WEIGHTED)
def fitting_shapes(case: Case) -> Found:
    """Weights, data and result have shapes that belong together; groups are whole."""
    w, op = case.input(1), case.node.op
    assert w is not None
    data, out = case.data, case.output
    bias = case.input(2)
    if isinstance(op, FullyConnected):
        if len(w.shape) != 2 or not w.elements:
            yield f"weights {list(w.shape)}", "use a matrix"
        elif case.data.elements != w.shape[1] or out.elements != w.shape[0]:
            yield (f"{data.elements} data elements, weights {list(w.shape)}, {out.elements} results",
                   "run one sample at a time")
        elif bias is not None and bias.elements != w.shape[0]:
            yield f"{bias.elements} biases for {w.shape[0]} rows", "fix the export"
        return
    assert isinstance(op, Conv2D | DepthwiseConv2D)
    if not len(w.shape) == len(data.shape) == len(out.shape) == 4 or not w.elements:
        yield f"data {list(data.shape)}, weights {list(w.shape)}, result {list(out.shape)}", "use NHWC and OHWI"
        return
    if min(*op.stride, *op.dilation) < 1:
        yield f"stride {op.stride}, dilation {op.dilation}", "fix the export"
        return
    channels, out_c = data.shape[3], out.shape[3]
    if isinstance(op, Conv2D):
        kernels, groups = w.shape[0], channels // w.shape[3]
        if channels % w.shape[3] or kernels % max(groups, 1):
            yield f"{channels} channels, weights {list(w.shape)}", "fix the export"
            return
    else:
        kernels = w.shape[3]
        if w.shape[0] != 1 or kernels % channels:
            yield f"{channels} channels, depthwise weights {list(w.shape)}", "fix the export"
            return
    if bias is not None and bias.elements != kernels:
        yield f"{bias.elements} biases for {kernels} kernels", "fix the export"
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[1:3], op.dilation, strict=True)]
    sizes = [cdiv(n if op.padding == "same" else n - r + 1, s)
             for n, r, s in zip(data.shape[1:3], reach, op.stride, strict=True)]
    if (*sizes, kernels) != (*out.shape[1:3], out_c):
        yield f"a result of {list(out.shape)}, expected [1, {sizes[0]}, {sizes[1]}, {kernels}]", "fix the export"


@rule(*WEIGHTED)
def constant_weights(case: Case) -> Found:
    """Weights are constant, int8 or uint8, with one scale for the whole tensor."""
    w = case.input(1)
    if w is None or not w.is_constant:
        yield "weights are computed", "fold them to constants when exporting"
        return
    if w.dtype not in EIGHT_BIT:
        yield f"weights are {w.dtype.value}", "quantize weights to 8 bits"
    elif w.quantization is None:
        yield "weights have no quantization", "quantize weights to 8 bits"
    elif not w.quantization.per_tensor:
        yield (f"weights have {len(w.quantization.scales)} scales, one for each output channel",
               "quantize weights per tensor: the v7 engine has one multiplier for a job")
    elif not _holds_zero_point(w):
        yield f"weights have the zero point {w.quantization.zero_point}", "fix the export"
    bias = case.input(2)
    if bias is not None and (not bias.is_constant or bias.dtype is not DType.INT32):
        computed = "" if bias.is_constant else " and computed"
        yield f"the bias is {bias.dtype.value}{computed}", "use a constant int32 bias"
    elif bias is not None and bias.quantization is not None and not bias.quantization.per_tensor:
        yield f"the bias has {len(bias.quantization.scales)} scales", "quantize per tensor"


@rule(*CONVOLUTIONS)
def square_stride(case: Case) -> Found:
    """Strides are equal in both directions, and 1 or 2."""
    op = case.node.op
    assert isinstance(op, Conv2D | DepthwiseConv2D)
    if op.stride[0] != op.stride[1] or op.stride[0] not in (1, 2):
        yield f"stride {op.stride[0]}x{op.stride[1]}", "use stride 1 or 2, or a convolution and a pooling"


@rule(*WEIGHTED, Add, Concat, Pad, Pool2D, Mean)
def fitting_scales(case: Case) -> Found:
    """Scales of inputs over those of outputs lie between 2**-64 and 2**8 (a 7-bit shift)."""
    scales = [v.quantization.scale for v in case.activations() if v.quantization is not None]
    if len(scales) < 2:
        return
    weight = 1.0
    if isinstance(case.node.op, WEIGHTED):
        w = case.input(1)
        weight = w.quantization.scale if w is not None and w.quantization is not None else 1.0
    for s in scales[:-1]:
        ratio = s * weight / scales[-1]
        if not 2.0**-64 < ratio < 2.0**8 or not 2.0**-64 < s * weight < 2.0**64:
            yield f"a ratio of {ratio:g}", "quantize the layer again: its scales do not belong together"


@rule(*CONVOLUTIONS, plans=("reference",), source=TEFLON)
def no_dilation(case: Case) -> Found:
    """Dilation is 1."""
    op = case.node.op
    assert isinstance(op, Conv2D | DepthwiseConv2D)
    if op.dilation != (1, 1):
        yield f"dilation {op.dilation[0]}x{op.dilation[1]}", "use plan best"


@rule(*CONVOLUTIONS, FullyConnected, Add)
def known_activation(case: Case) -> Found:
    """A fused activation is none, RELU or RELU6."""
    op = case.node.op
    assert isinstance(op, Conv2D | DepthwiseConv2D | FullyConnected | Add)
    if op.activation not in ("none", "relu", "relu6"):
        yield f"fused {op.activation.upper()}", "use RELU or RELU6"


@rule(*CONVOLUTIONS, plans=("reference",), source=TEFLON)
def relu6_by_range(case: Case) -> Found:
    """With a fused RELU6 the output's quantized range ends at 6.0 or below, in float32."""
    op, q = case.node.op, case.output.quantization
    assert isinstance(op, Conv2D | DepthwiseConv2D)
    if op.activation == "relu6" and q is not None:
        top = 127 if case.output.dtype is DType.INT8 else 255
        end = np.float32(np.float32(top - q.zero_point) * np.float32(q.scale))
        if end > np.float32(6.0):
            yield f"the range ends at {float(end):.9g}", "use plan best, which clamps by moving the zero point"


@rule(*CONVOLUTIONS)
def kernel_limit(case: Case) -> Found:
    """A kernel, dilation included, is at most 11 by 11."""
    op, w = case.node.op, case.input(1)
    assert isinstance(op, Conv2D | DepthwiseConv2D)
    if w is not None:
        most = case.chip.kernel_max
        reach = [(k - 1) * d + 1 for k, d in zip(w.shape[1:3], op.dilation, strict=True)]
        if max(reach) > most:
            yield f"{reach[0]}x{reach[1]}", f"split the kernel into parts of at most {most}x{most}"


@rule(*CONVOLUTIONS, plans=("best",))
def padding_limit(case: Case) -> Found:
    """Padding on top and left is at most 8 pixels (a signed 4-bit offset)."""
    from npulab.targets.vivante.best import convolution_pads

    pads = convolution_pads(case.graph, case.node)
    if max(pads) > 8:
        yield f"padding {pads[0]} on top and {pads[1]} on the left", "pad in a PAD operator before the convolution"


@rule(*EVERY)
def image_limit(case: Case) -> Found:
    """Image width and height are at most 8184 (13 bits, padding included), channels at most 16383."""
    for v in case.activations():
        if len(v.shape) == 4:
            _, h, w, c = v.shape
            if max(h, w) > 8184 or c > 16383:
                yield f"'{v.name}' is {h}x{w}x{c}", "cut the image into parts"
        elif v.elements > 16383 and not isinstance(case.node.op, Reshape | Concat | Elementwise):
            yield f"'{v.name}' has {v.elements} elements", "cut the tensor into parts"


@rule(Add)
def two_computed_operands(case: Case) -> Found:
    """Both operands of an addition are computed tensors of one shape."""
    a, b = case.input(0), case.input(1)
    if a is None or b is None:
        yield "an operand is missing", "fix the export"
        return
    for v in (a, b):
        if v.is_constant:
            yield f"'{v.name}' is constant", "fold it into the bias of the operator before"
    if a.shape != b.shape:
        yield f"shapes {list(a.shape)} and {list(b.shape)}", "broadcast before the addition"


@rule(Add)
def same_result(case: Case) -> Found:
    """An addition's result has the shape of its operands."""
    if case.output.shape != case.data.shape:
        yield f"{list(case.data.shape)} becomes {list(case.output.shape)}", "fix the export"


@rule(Add, plans=("reference",), source=TEFLON)
def four_dimensions(case: Case) -> Found:
    """Operands of an addition have four dimensions; others make that driver divide by zero."""
    if len(case.data.shape) != 4:
        yield f"shape {list(case.data.shape)}", "use plan best"


@rule(Add, plans=("best",))
def two_different_operands(case: Case) -> Found:
    """The operands of an addition are two tensors."""
    if case.node.inputs[0] == case.node.inputs[1]:
        yield "a tensor added to itself", "scale it instead"


@rule(Split)
def split_along_channels(case: Case) -> Found:
    """Tensors are split along channels, the last of four dimensions."""
    if len(case.data.shape) != 4:
        yield f"rank {len(case.data.shape)}", "use four-dimensional tensors"
        return
    constant = case.input(0)
    if constant is None or not constant.is_constant or constant.dtype is not DType.INT32 or constant.elements != 1:
        yield "the axis is not a constant", "fix the export"
        return
    axis = int(constant.array().reshape(-1)[0])
    if axis not in (3, -1):
        yield f"axis {axis}", "use the channel axis"


@rule(Concat, plans=("reference",), source=TEFLON)
def joined_along_channels(case: Case) -> Found:
    """Tensors are joined along channels, the last of four dimensions."""
    op = case.node.op
    assert isinstance(op, Concat)
    if len(case.data.shape) != 4:
        yield f"rank {len(case.data.shape)}", "use plan best"
    elif op.axis not in (3, -1):
        yield f"axis {op.axis}", "use plan best"


@rule(Concat, plans=("best",))
def joined_one_behind_the_other(case: Case) -> Found:
    """Tensors are joined along channels, the last of four dimensions, or along an axis before which all are 1."""
    op, shape = case.node.op, case.data.shape
    assert isinstance(op, Concat)
    rank = len(shape)
    if not -rank <= op.axis < rank:
        yield f"axis {op.axis} of {list(shape)}", "fix the export"
    elif not (rank == 4 and op.axis % 4 == 3) and any(n != 1 for n in shape[: op.axis % rank]):
        yield f"axis {op.axis} of {list(shape)}", "use the channel axis, or the first that is longer than one"


@rule(Concat, plans=("reference",), source=TEFLON)
def equal_channels(case: Case) -> Found:
    """Joined tensors have equal channel counts and no constant among them."""
    counts = [case.graph.values[v].shape[-1] for v in case.node.inputs if case.graph.values[v].shape]
    if len(set(counts)) > 1:
        yield f"channels {counts}", "use plan best"


@rule(Concat, plans=("best",))
def no_constant_part(case: Case) -> Found:
    """Joined tensors are all computed, and there is no fused activation."""
    op = case.node.op
    assert isinstance(op, Concat)
    for v in case.node.inputs:
        if case.graph.values[v].is_constant:
            yield f"'{case.graph.values[v].name}' is constant", "fold it"
    if op.activation != "none":
        yield f"fused {op.activation.upper()}", "apply it before"


@rule(Split)
def equal_pieces(case: Case) -> Found:
    """A split's pieces have equal channel counts."""
    counts = {case.graph.values[v].shape[-1] for v in case.node.outputs if case.graph.values[v].shape}
    if len(counts) > 1:
        yield f"channels {sorted(counts)}", "split into equal parts"


@rule(Conv2D, DepthwiseConv2D, FullyConnected, Split, Pad, Pool2D, Mean, Reshape, Elementwise, plans=("best",))
def computed_data(case: Case) -> Found:
    """Data is computed: the NPU is given inputs and results of other operators, and of constants weights alone."""
    if case.data.is_constant:
        yield f"'{case.data.name}' is constant", "fold it into a constant before"


@rule(Split, Reshape, plans=("best",))
def same_quantization(case: Case) -> Found:
    """An operator that only moves bytes has one quantization on both sides."""
    first = case.data
    for v in case.node.outputs:
        out = case.graph.values[v]
        if out.quantization != first.quantization or out.dtype is not first.dtype:
            yield f"'{first.name}' and '{out.name}' are quantized differently", "use one quantization"


def paddings(case: Case) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
    """The constant paddings [rank, 2] of a PAD, or None."""
    v = case.input(1)
    if v is None or not v.is_constant or v.dtype not in (DType.INT32, DType.INT64):
        return None
    if v.shape != (len(case.data.shape), 2) or len(case.data.shape) != 4:
        return None
    return v.array().astype(np.int64)


@rule(Pad)
def pads_rows_and_columns(case: Case) -> Found:
    """Padding is constant, with the zero point, on rows and columns of four-dimensional tensors only."""
    op = case.node.op
    assert isinstance(op, Pad)
    if op.mode != "constant" or op.valued:
        yield op.name, "pad with zero"
    pads = paddings(case)
    if pads is None:
        yield "paddings are not a constant [4, 2] tensor", "fix the export"
    elif pads[0].any() or pads[3].any():
        yield f"paddings {pads.tolist()}", "pad rows and columns only"
    elif pads.min() < 0:
        yield f"paddings {pads.tolist()}", "crop with a slice instead"


@rule(Pad, plans=("reference",), source=TEFLON)
def pads_one_pixel(case: Case) -> Found:
    """Padding is exactly one pixel on each side."""
    pads = paddings(case)
    if pads is not None and (pads[1:3] != 1).any():
        yield f"paddings {pads.tolist()}", "use plan best"


@rule(Pool2D, Mean, plans=("best",))
def averages(case: Case) -> Found:
    """Averages are taken over the whole image, or over windows of at most 11x11 without padding, stride 1 or 2."""
    op = case.node.op
    if len(case.data.shape) != 4:
        yield f"rank {len(case.data.shape)}", "average over rows and columns of a four-dimensional tensor"
        return
    _, h, w, c = case.data.shape
    if isinstance(op, Pool2D):
        whole = op.window == (h, w) and case.output.elements == c
        if op.kind != "average":
            text, _source = _WHY_NOT["MAX_POOL_2D"]
            yield f"max pooling. {text}", "use a stride-2 convolution"
        elif op.activation not in ("none", "relu", "relu6"):
            yield f"fused {op.activation.upper()}", "use RELU or RELU6"
        elif not (whole and op.activation == "none"):
            yield from _windows(case, op)
    elif isinstance(op, Mean):
        axes = case.input(1)
        if axes is None or not axes.is_constant or axes.dtype is not DType.INT32:
            yield "axes are not constant", "fix the export"
        elif sorted(int(a) % 4 for a in axes.array().reshape(-1)) != [1, 2]:
            yield f"axes {axes.array().reshape(-1).tolist()}", "average over rows and columns"
        elif case.output.elements != c:
            yield f"{case.output.elements} results for {c} channels", "fix the export"
    if h * w > 16383 and (isinstance(op, Mean) or (isinstance(op, Pool2D) and op.window == (h, w))):
        yield f"{h * w} pixels", "average in two steps"


def _windows(case: Case, op: Pool2D) -> Found:
    """What keeps averages over windows from being a depthwise convolution."""
    _, h, w, c = case.data.shape
    found = f"window {op.window[0]}x{op.window[1]}, stride {op.stride[0]}x{op.stride[1]}, on an image of {h}x{w}"
    if op.stride not in ((1, 1), (2, 2)) or not 1 <= min(op.window) <= max(op.window) <= case.chip.kernel_max:
        yield found, "use windows of at most 11x11 with stride 1 or 2"
        return
    inside = tuple((n - k) // s + 1 for n, k, s in zip((h, w), op.window, op.stride, strict=True))
    if case.output.shape != (1, *inside, c):
        yield f"{found}, {op.padding.upper()} padding, result {list(case.output.shape)}", "average without padding"


@rule(Concat, Split, Pad)
def fitting_results(case: Case) -> Found:
    """Results have the shape that follows from the inputs."""
    op, node, graph = case.node.op, case.node, case.graph
    shapes = [graph.values[v].shape for v in (node.inputs if isinstance(op, Concat) else node.outputs)]
    whole = case.output.shape if isinstance(op, Concat) else case.data.shape
    if isinstance(op, Pad):
        pads = paddings(case)
        if pads is not None and tuple(int(n + p.sum()) for n, p in zip(whole, pads, strict=True)) != shapes[0]:
            yield f"{list(whole)} becomes {list(shapes[0])}", "fix the export"
        return
    axis = op.axis if isinstance(op, Concat) else -1
    if any(len(s) != len(whole) for s in shapes) or any(
            n != sum(s[i] for s in shapes) if i == axis % len(whole) else any(s[i] != n for s in shapes)
            for i, n in enumerate(whole)):
        yield f"parts {[list(s) for s in shapes]} of {list(whole)}", "fix the export"


@rule(Elementwise, plans=("best",), source="TP notes, section 2.5")
def tables_asked_for(case: Case) -> Found:
    """A function of one number is a table job of the TP engine. No stream of the recorded driver has one, and no board
    has run ours: it is done if asked for."""
    if "tp-table" not in case.features:
        yield f"{case.node.op.name}, and no feature tp-table", "--feature tp-table"


@rule(Elementwise, plans=("best",), source="TP notes, section 2.5")
def tables_hold_the_function(case: Case) -> Found:
    """A function of one number keeps its tensor's shape; its table gives every byte within three quarters of a step."""
    op, data, out = case.node.op, case.data, case.output
    assert isinstance(op, Elementwise)
    if data.shape != out.shape:
        yield f"{list(data.shape)} becomes {list(out.shape)}", "fix the export"
        return
    assert data.quantization is not None
    assert out.quantization is not None
    scales = data.quantization.scale, out.quantization.scale
    if not all(2.0**-32 < s < 2.0**32 for s in scales):
        yield f"scales {scales[0]:g} and {scales[1]:g}", "quantize the layer again"
        return
    off = steps_off(op, *scales, unsigned_zero_point(data), unsigned_zero_point(out))
    if not off <= STEPS_OFF:
        yield f"{off:.2f} steps at scales {scales[0]:g} and {scales[1]:g}", "leave it to the host"


@rule(Reshape, plans=("best",))
def moves_all_elements(case: Case) -> Found:
    """A reshape keeps every element."""
    if case.data.elements != case.output.elements:
        yield f"{case.data.elements} elements become {case.output.elements}", "fix the export"


GATES = (has_shapes, eight_bits, fitting_shapes, constant_weights, split_along_channels, joined_along_channels,
         joined_one_behind_the_other)
"""Rules that later ones rely on."""
