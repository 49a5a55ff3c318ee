"""What predicates read of a node's operands together: their types, quantization, ranks, and what constants hold.

Parameters, such as the axes of a reduction, are no data. Of ONNX graphs, whose tensors carry no quantization, what has
to do with scales is answered only where `assume` says that a converter will give them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from npulab.ir import DType, Value

if TYPE_CHECKING:
    from npulab.targets.facts.properties import Properties

PARAMETERS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("RESHAPE", "TRANSPOSE", "PAD", "MIRROR_PAD", "MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN",
                     "REDUCE_PROD", "REDUCE_ANY", "REDUCE_ALL", "ARG_MAX", "ARG_MIN", "RESIZE_BILINEAR",
                     "RESIZE_NEAREST_NEIGHBOR", "TILE", "EXPAND_DIMS", "GATHER", "GATHER_ND", "CUMSUM", "BROADCAST_TO",
                     "REVERSE_V2", "TOPK_V2", "PADV2"), (1,)),
    "SLICE": (1, 2), "STRIDED_SLICE": (1, 2, 3), "SPLIT": (0,), "SPLIT_V": (1, 2), "TRANSPOSE_CONV": (0,),
    "BATCH_TO_SPACE_ND": (1, 2), "SPACE_TO_BATCH_ND": (1, 2), "ONE_HOT": (0, 1),
    "Reshape": (1,), "Pad": (1, 3), "Resize": (1, 2, 3), "Upsample": (1,), "Slice": (1, 2, 3, 4), "Squeeze": (1,),
    "Unsqueeze": (1,), "ReduceMean": (1,), "ReduceSum": (1,), "ReduceMax": (1,), "ReduceMin": (1,), "ReduceProd": (1,),
    "ReduceL2": (1,), "Split": (1,), "Tile": (1,), "Expand": (1,), "Gather": (1,), "GatherElements": (1,),
    "GatherND": (1,), "TopK": (1,), "CumSum": (1,), "Clip": (1, 2),
}
"""Operator of TFLite or ONNX -> its inputs that are parameters."""
SUMMED_MAX = 1 << 24
"""Weights that are added up."""


def data_inputs(p: Properties) -> Iterator[Value]:
    """Inputs that are worked on: neither parameters nor weights nor biases."""
    skipped = PARAMETERS.get(p.node.op.name, ())
    others = {id(v) for v in (p.weights, p.bias) if v is not None} if p.node.op.name != "BATCH_MATMUL" else set()
    for i, v in enumerate(p.node.inputs):
        if v >= 0 and i not in skipped and id(p.graph.values[v]) not in others:
            yield p.graph.values[v]


def outputs(p: Properties) -> list[Value]:
    return [p.graph.values[v] for v in p.node.outputs if v >= 0]


def activations(p: Properties) -> list[Value]:
    """Inputs that are worked on, and outputs."""
    return [*data_inputs(p), *outputs(p)]


def all_quantized(p: Properties) -> bool | None:
    """Whether inputs, outputs and weights have scales, bool aside."""
    if p.onnx:
        return p.quantized()
    weights = [p.weights] if p.weights is not None else []
    if p.assume and "int" in p.assume:
        return True
    scaled = (v for v in (*activations(p), *weights) if v.dtype is not DType.BOOL)
    return all(p.source(v)[0].quantization is not None for v in scaled)  # type: ignore[index]


def weighted(p: Properties) -> bool:
    """Whether the operator has weights."""
    return p.weights is not None


def data_per_channel(p: Properties) -> bool | None:
    """Whether an input or output has several scales."""
    if p.onnx:
        return False if p.assume else None
    found = [v.quantization for v in activations(p) if v.quantization is not None]
    return any(not q.per_tensor for q in found) if found else None


def results_per_channel(p: Properties) -> bool | None:
    """Whether an output has several scales."""
    if p.onnx:
        return False if p.assume else None
    found = [v.quantization for v in outputs(p) if v.quantization is not None]
    return any(not q.per_tensor for q in found) if found else None


def inputs_centred(p: Properties) -> bool | None:
    """Whether the zero points of inputs are 0."""
    if p.onnx:
        return True if p.assume else None
    found = [v.quantization for v in data_inputs(p) if v.quantization is not None]
    return not any(any(q.zero_points) for q in found)


def same_quantization(p: Properties) -> bool | None:
    """Whether inputs and outputs share scale and zero point."""
    if p.onnx:
        return True if p.assume else None
    found = [v.quantization for v in activations(p)]
    return all(q == found[0] for q in found)


def same_scales(p: Properties) -> bool | None:
    """Whether inputs and outputs that have scales share them."""
    if p.onnx:
        return True if p.assume else None
    found = [v.quantization.scales for v in activations(p) if v.quantization is not None]
    return all(s == found[0] for s in found)


def same_types(p: Properties) -> bool:
    """Whether the inputs have one element type."""
    return len({p.type_of(v) for v in data_inputs(p)}) <= 1


def static(p: Properties) -> bool:
    """Whether sizes are fixed, but for the first."""
    return all(v.has_shape and not any(v.dynamic_axes) for v in activations(p))


def least_rank(p: Properties) -> int | None:
    """The smallest rank of computed inputs and of outputs."""
    return min((len(v.shape) for v in activations(p) if not v.is_constant and v.has_shape), default=None)


def parameters_constant(p: Properties) -> bool:
    """Whether axes, begins, sizes, paddings and the like are."""
    places = PARAMETERS.get(p.node.op.name, ())
    given = [p.input(i) for i in places]
    return all(v.is_constant for v in given if v is not None)


def zero_points_fit(p: Properties) -> bool | None:
    """Whether zero points are 0 for 16 and 32 bits, and not below 0 for unsigned numbers."""
    if p.onnx:
        return True if p.assume else None
    for v in activations(p):
        zeros = v.quantization.zero_points if v.quantization is not None else ()
        wide, unsigned = v.dtype.value in ("int32", "int64"), v.dtype.value.startswith("u")
        if (wide and any(zeros)) or (unsigned and min(zeros, default=0) < 0):
            return False
    return True


def least_unsigned_zero_point(p: Properties) -> int | None:
    """The smallest one of unsigned inputs and outputs; 0 without such."""
    if p.onnx:
        return 0 if p.assume else None
    return min((z for v in activations(p) if v.quantization is not None and v.dtype.value.startswith("u")
                for z in v.quantization.zero_points), default=0)


def out_zero_point(p: Properties) -> int | None:
    """Of the first output."""
    found = p.output.quantization if p.output is not None else None
    return found.zero_point if found is not None and found.per_tensor else None


def bias_constant(p: Properties) -> bool | None:
    found = p.source(p.bias)
    return None if found is None else found[0].is_constant


def bias_largest(p: Properties) -> int:
    """The largest absolute value of a constant bias of integers; 0 without one."""
    b = p.bias
    if b is None or not b.is_constant or b.dtype.numpy is None or b.dtype.numpy.kind != "i" or not b.elements:
        return 0
    return max(abs(int(b.array().min())), abs(int(b.array().max())))


def weight_sum(p: Properties) -> int | None:
    """The largest sum of absolute weights, less their zero point, of an output channel of constant weights.

    Of floating point, as 8-bit weights with a scale for each channel would have it.
    """
    w = p.weights
    if w is None or not w.is_constant or w.dtype.numpy is None or not 0 < w.elements <= SUMMED_MAX or len(w.shape) < 2:
        return 0 if w is not None and w.is_constant and not w.elements else None
    last = p.kind == "DepthwiseConv" if not p.onnx else p.kind in ("Gemm", "MatMul") and not p.own("transB")
    channel = len(w.shape) - 1 if last else 1 if p.onnx and p.kind == "ConvTranspose" else 0
    others = tuple(i for i in range(len(w.shape)) if i != channel)
    a = np.asarray(w.array(), np.float64)
    if w.dtype.numpy.kind == "f":
        a = np.abs(a)
        return int(np.ceil((a.sum(axis=others) / np.maximum(a.max(axis=others), 1e-30) * 127).max()))
    zero = w.quantization.zero_point if w.quantization is not None and w.quantization.per_tensor else 0
    return int(np.abs(a - zero).sum(axis=others).max())


def steps(p: Properties) -> list[int] | None:
    """Of Slice, one an axis, in NCHW order."""
    from npulab.targets.facts.properties import Unknown, numbers

    rank = p.rank(p.data)
    if p.kind != "Slice" or rank is None:
        return None
    out = [1] * rank
    if p.node.op.name == "SLICE":
        return out
    given = numbers(p.input(4 if p.onnx else 3))
    if given is None:
        if p.input(4 if p.onnx else 3) is not None:
            raise Unknown
        return out
    axes = [p.axis_of(i, rank) for i in range(len(given))] if not p.onnx else numbers(p.input(3)) or range(len(given))
    for axis, step in zip(axes, given, strict=False):
        out[int(axis)] = int(step)
    return out


def steps_elsewhere(p: Properties) -> int | None:
    """The largest step of Slice over an axis other than height and width: in TFLite the two before the last."""
    found, rank = steps(p), p.rank(p.data)
    if found is None or rank is None:
        return None
    inside = (2, 3) if p.onnx or rank == 4 else (rank - 3, rank - 2)
    return max((s for i, s in enumerate(found) if i not in inside), default=1)


def _bits(types: Iterable[str | None]) -> int | None:
    digits = ["".join(c for c in t or "" if c.isdigit()) for t in types]
    return max((int(d) for d in digits if d), default=None)


def in_bits(p: Properties) -> int | None:
    """Of the widest input that is worked on."""
    return _bits(p.type_of(v) for v in data_inputs(p))


def out_bits(p: Properties) -> int | None:
    """Of the widest output."""
    return _bits(p.type_of(v, out=True) for v in outputs(p))


NAMES = {f.__name__: f for f in (
    weighted, all_quantized, data_per_channel, results_per_channel, inputs_centred, same_quantization, same_scales,
    same_types, static, least_rank, parameters_constant, zero_points_fit, least_unsigned_zero_point, out_zero_point,
    bias_constant, bias_largest, weight_sum, steps, steps_elsewhere, in_bits, out_bits)}
"""Names of the facts format -> what finds their values."""
