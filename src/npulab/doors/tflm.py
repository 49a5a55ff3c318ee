"""TensorFlow Lite Micro: the operators that a model registers, how large its arena will be, its numbers in a header."""

from __future__ import annotations

import re
from bisect import insort

from npulab.doors.types import Preprocessing
from npulab.errors import UnsupportedError
from npulab.exporters.c_array import to_c_array
from npulab.ir import DType, Graph
from npulab.ir.ops import Custom
from npulab.plan.memory import Lifetime, greedy_by_size

METHODS: frozenset[str] = frozenset("""
    Abs Add AddN ArgMax ArgMin AssignVariable AveragePool2D BatchMatMul BatchToSpaceNd BroadcastArgs BroadcastTo
    CallOnce Cast Ceil Concatenation Conv2D Cos CumSum DepthToSpace DepthwiseConv2D Dequantize Div DynamicUpdateSlice
    Elu EmbeddingLookup Equal Exp ExpandDims Fill Floor FloorDiv FloorMod FullyConnected Gather GatherNd Greater
    GreaterEqual HardSwish If L2Normalization L2Pool2D LeakyRelu Less LessEqual Log LogSoftmax LogicalAnd LogicalNot
    LogicalOr Logistic MaxPool2D Maximum Mean Minimum MirrorPad Mul Neg NotEqual Pack Pad PadV2 Prelu Quantize
    ReadVariable ReduceMax ReduceMin Relu Relu6 Reshape ResizeBilinear ResizeNearestNeighbor ReverseV2 Round Rsqrt
    SelectV2 Shape Sin Slice Softmax SpaceToBatchNd SpaceToDepth Split SplitV Sqrt Square SquaredDifference Squeeze
    StridedSlice Sub Sum Svdf Tanh Transpose TransposeConv UnidirectionalSequenceLSTM Unpack VarHandle While ZerosLike
    CircularBuffer DetectionPostprocess EthosU""".split())  # noqa: SIM905
"""`MicroMutableOpResolver::Add...` without Add. Source: tensorflow/lite/micro/micro_mutable_op_resolver.h."""
CUSTOM = {"TFLite_Detection_PostProcess": "DetectionPostprocess", "ethos-u": "EthosU",
          "CIRCULAR_BUFFER": "CircularBuffer"}
LIVES_MAX = 4000
"""Tensors beyond which the interpreter's placement, whose time grows with their square, is not repeated."""
_SPELLED = {m.lower(): m for m in METHODS}

NODE_BYTES, TENSOR_BYTES, CHANNEL_BYTES, BORDER_BYTES, FIXED_BYTES = 164, 24, 8, 64, 1200
"""What the interpreter keeps beside tensors: for a node and its kernel, a tensor, an output channel of a convolution
(multiplier and shift), an input or output, in all. Upper bounds over what 64-bit builds allocate (bench/export.py)."""


def resolver_calls(graph: Graph) -> list[str]:
    """The `Add...` calls that the model needs, each once, sorted.

    Raises: UnsupportedError naming every operator that TensorFlow Lite Micro has no kernel for.
    """
    found, missing = set(), set()
    for n in graph.nodes:
        name = CUSTOM.get(n.op.name) if isinstance(n.op, Custom) else _SPELLED.get(n.op.name.replace("_", "").lower())
        if name:
            found.add(f"Add{name}")
        else:
            missing.add(n.op.name)
    if missing:
        raise UnsupportedError(f"TensorFlow Lite Micro has no kernel for operators of '{graph.name}'",
                               got=", ".join(sorted(missing))[:400],
                               try_="cut them off and compute them from the outputs")
    return sorted(found)


def arena_bytes(graph: Graph) -> int:
    """An arena that should be enough, in bytes, a multiple of 1024: tensors as the interpreter places them, and more.

    The planner is the interpreter's own heuristic, largest tensor first; kernels tuned for a chip may ask for scratch
    memory beside it. The interpreter's own figure is `arena_used_bytes()` on the chip.
    """
    end = len(graph.nodes)
    first = dict.fromkeys(graph.inputs, 0) | {v: k for k, n in enumerate(graph.nodes) for v in n.outputs if v >= 0}
    last = {v: k for k, n in enumerate(graph.nodes) for v in n.inputs if v >= 0} | dict.fromkeys(graph.outputs, end)
    lives = [(_bytes(graph, v), k, max(k, last.get(v, k))) for v, k in sorted(first.items(), reverse=True)]
    lives += [(size, k, k) for k in range(end) if (size := _scratch(graph, k))]
    kept = sum(_bytes(graph, v.index) for v in graph.values if v.is_variable)
    channels = sum(graph.values[n.outputs[0]].shape[-1] for n in graph.nodes
                   if "CONV" in n.op.name and n.outputs and graph.values[n.outputs[0]].shape)
    own = (FIXED_BYTES + NODE_BYTES * len(graph.nodes) + TENSOR_BYTES * len(graph.values) + CHANNEL_BYTES * channels
           + BORDER_BYTES * (len(graph.inputs) + len(graph.outputs)))
    return -(-(_planned(lives) + kept + own) // 1024) * 1024


def _planned(lives: list[tuple[int, int, int]]) -> int:
    """Peak of (bytes, first node, last node) laid out by size, each in the first gap that takes it, aligned to 16.

    Of equal sizes the order given counts; with tensors in falling order of index the peak is the interpreter's own on
    every model at hand. (`plan.memory.greedy_by_size` takes the smallest gap instead of the first.)
    """
    if len(lives) > LIVES_MAX:
        return greedy_by_size([Lifetime(*life) for life in lives], 16).peak
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first node, last node; sorted by offset
    for size, first, last in sorted(lives, key=lambda t: -t[0]):
        size = -(-size // 16) * 16
        at = 0
        for start, end, a, b in placed:
            if a <= last and first <= b:
                if start - at >= size:
                    break
                at = max(at, end)
        insort(placed, (at, at + size, first, last))
    return max((end for _, end, _, _ in placed), default=0)


def _bytes(graph: Graph, index: int) -> int:
    """Of a tensor in the arena. Constants stay in the model."""
    v = graph.values[index]
    size = v.dtype.numpy.itemsize if v.dtype.numpy is not None else 1
    return 0 if v.is_constant else v.elements * size


def _scratch(graph: Graph, k: int) -> int:
    """Bytes that a node's reference kernel asks for while it runs: 32-bit sums."""
    n = graph.nodes[k]
    if n.op.name in ("MEAN", "SUM", "TRANSPOSE_CONV") and graph.values[n.outputs[0]].dtype is not DType.FLOAT32:
        return graph.values[n.outputs[0]].elements * 4
    if n.op.name == "TFLite_Detection_PostProcess":
        return graph.values[n.inputs[0]].elements * 8
    return 0


def sources(graph: Graph, model: bytes, digest: str, how: Preprocessing | None) -> dict[str, bytes]:
    """model_data.c and .h with the file, model_ops.h with operators and arena, model_io.h with scales."""
    data, header = to_c_array(model, "model_data", f"{len(model)} bytes, sha256 {digest}")
    return {"model_data.c": data, "model_data.h": header, "model_ops.h": _ops(graph), "model_io.h": _io(graph, how)}


def _ops(graph: Graph) -> bytes:
    calls = resolver_calls(graph)
    adds = "\n".join(f"  if (resolver.{call}() != kTfLiteOk) return kTfLiteError;" for call in calls)
    return f"""\
#ifndef MODEL_OPS_H_
#define MODEL_OPS_H_

#include <cstddef>

#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"

// Enough by estimate. Ask MicroInterpreter::arena_used_bytes() on the chip, then make it as small as that.
constexpr std::size_t kModelArenaSize = {arena_bytes(graph)};

using ModelOpResolver = tflite::MicroMutableOpResolver<{len(calls)}>;

inline TfLiteStatus AddModelOps(ModelOpResolver& resolver) {{
{adds}
  return kTfLiteOk;
}}

#endif  // MODEL_OPS_H_
""".encode()


def _io(graph: Graph, how: Preprocessing | None) -> bytes:
    """Shapes, scales and zero points as macros: real = (stored - ZERO_POINT) * SCALE."""
    lines = []
    for kind, indices in (("INPUT", graph.inputs), ("OUTPUT", graph.outputs)):
        for k, v in enumerate(graph.values[i] for i in indices):
            name = f"MODEL_{kind}{k}"
            said = re.sub(r"[^ -~]|\*/|/\*|\\", "?", v.name[:60])
            lines += [f"/* {said}: {v.dtype.value} {list(v.shape)} */", f"#define {name}_ELEMENTS {v.elements}"]
            if v.quantization and v.quantization.per_tensor:
                lines += [f"#define {name}_SCALE {v.quantization.scale!r}f",
                          f"#define {name}_ZERO_POINT ({v.quantization.zero_point})"]
    if how:
        lines += [f"/* real input = (pixel - MEAN) / STD for each channel, in the order {how.order} */",
                  f"#define MODEL_PIXEL_MEAN {{{', '.join(f'{m!r}f' for m in how.mean)}}}",
                  f"#define MODEL_PIXEL_STD {{{', '.join(f'{s!r}f' for s in how.std)}}}"]
    return ("#ifndef MODEL_IO_H_\n#define MODEL_IO_H_\n\n" + "\n".join(lines)
            + "\n\n#endif  /* MODEL_IO_H_ */\n").encode()
