"""Operators of ONNX that only move elements: most cost nothing but another order, or an axis under another number."""

from __future__ import annotations

import numpy as np

from npulab.dialects import layouts
from npulab.dialects.conversion import Conversion, NotThereError
from npulab.dialects.layouts import Order
from npulab.dialects.quantities import is_op
from npulab.dialects.tflite_file import Spec
from npulab.dialects.windows import padded


def hand_on(c: Conversion) -> None:
    """Identity, and what is none only in training."""
    v = c.value(0)
    tensor = c.input(0)
    c.put(tensor, c.order(0) if v.index in c.held else layouts.plain(len(v.shape)))


def axis_at(axis: int, rank: int, order: Order) -> int:
    """Where an axis of the source (from the end if negative) is stored."""
    return order.index(axis + rank if axis < 0 else axis)


def transpose(c: Conversion) -> None:
    rank = len(c.shape(0))
    perm = c.attribute("perm", tuple(range(rank))[::-1])
    tensor = c.input(0)
    c.put(tensor, layouts.transposed(c.order(0), perm))


def reshape(c: Conversion) -> None:
    """RESHAPE, in the order that is held if blocks of axes stay together; a matrix behind it takes the columns as they
    come if its weights are constant."""
    old, new = c.shape(0), c.out.shape
    order = c.order(0)
    after = layouts.reshaped(old, new, order)
    if after is None and len(new) == 2 and new[0] == old[0] and order[0] == 0 and _only_matrices(c, c.end):
        c.columns[c.end] = (old, order)
        after = (0, 1)
    if after is None:
        order, after = layouts.plain(len(old)), layouts.plain(len(new))
    c.put(c.reshape(c.input(0, order), layouts.stored(new, after)), after)


def _only_matrices(c: Conversion, value: int, depth: int = 4) -> bool:
    """Whether all who read a value multiply it with constant matrices, whose columns can be put in any order; what
    quantizes in between does not mind."""
    readers = c.graph.consumers.get(value, ())
    if not readers or not depth or value in c.graph.outputs:
        return False
    for n in readers:
        if is_op(n, "QuantizeLinear", "DequantizeLinear"):
            if not _only_matrices(c, n.outputs[0], depth - 1):
                return False
        elif not is_op(n, "Gemm", "MatMul") or n.inputs[0] != value or n.inputs[1] == value \
                or getattr(n.op, "attributes", {}).get("transA") or c.quantities.real(n.inputs[1]) is None:
            return False
    return True


def concat(c: Conversion) -> None:
    rank = len(c.out.shape)
    order = c.common(rank, range(len(c.node.inputs)))
    parts = [c.input(i, order, as_it_is=True) for i in range(len(c.node.inputs))]
    if c.integer:
        q = c.quantized or c.file.specs[parts[0]].quantization
        assert q
        parts = [c.requantized(p, q) for p in parts]
    c.emit("CONCATENATION", parts, order, None, parts[0] if c.integer else None,
           axis=axis_at(c.attribute("axis", 0), rank, order), fused_activation_function="NONE")


def split(c: Conversion) -> None:
    rank, order = len(c.shape(0)), c.order(0)
    axis = axis_at(c.attribute("axis", 0), rank, order)
    data = c.input(0)
    spec = c.file.specs[data]
    outs = []
    for v in c.node.outputs:
        shape = layouts.stored(c.graph.values[v].shape, order)
        outs.append(c.file.tensor(c.graph.values[v].name, shape, spec.dtype, spec.quantization))
    where = c.file.constant("axis", np.array(axis, np.int32))
    sizes = [c.file.specs[t].shape[axis] for t in outs]
    if len(set(sizes)) == 1:
        c.file.op("SPLIT", [where, data], outs, num_splits=len(outs))
    else:
        c.file.op("SPLIT_V", [data, c.file.numbers(*sizes), where], outs, num_splits=len(outs))
    for i, t in enumerate(outs):
        c.put(t, order, i)


def slice_(c: Conversion) -> None:
    shape, order = c.shape(0), c.order(0)
    if c.opset < 10:
        starts, ends = c.attribute("starts"), c.attribute("ends")
        axes, steps = c.attribute("axes", range(len(starts))), [1] * len(starts)
    else:
        starts, ends = c.needed(1, "starts").tolist(), c.needed(2, "ends").tolist()
        axes = c.needed(3, "axes").tolist() if c.has(3) else range(len(starts))
        steps = c.needed(4, "steps").tolist() if c.has(4) else [1] * len(starts)
    begin, stop, step = [0] * len(shape), list(shape), [1] * len(shape)
    hidden = 0
    for axis, a, b, s in zip(axes, starts, ends, steps, strict=True):
        axis = axis + len(shape) if axis < 0 else axis
        a, b, s = slice(a, b, s).indices(shape[axis])
        begin[axis], stop[axis], step[axis] = a, b, s
        if b < 0:
            hidden |= 1 << order.index(axis)
    data = c.input(0)
    at = [c.file.numbers(*(numbers[axis] for axis in order)) for numbers in (begin, stop, step)]
    if all(s == 1 for s in step):
        out = layouts.stored(c.out.shape, order)
        c.emit("SLICE", [data, at[0], c.file.numbers(*out)], order, None, data)
    else:
        c.emit("STRIDED_SLICE", [data, *at], order, None, data, begin_mask=0, end_mask=hidden, ellipsis_mask=0,
               new_axis_mask=0, shrink_axis_mask=0)


def pad(c: Conversion) -> None:
    rank, order = len(c.shape(0)), c.order(0)
    pads = c.attribute("pads") if c.opset < 11 else c.needed(1, "pads").tolist()
    axes = [int(a) % rank for a in c.needed(3, "axes")] if c.has(3) else list(range(rank))
    value = float(c.attribute("value", 0.0))
    if c.has(2):
        value = float(c.needed(2, "a value").reshape(()))
    both = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        both[axis] = (int(pads[i]), int(pads[i + len(axes)]))
    mode = c.attribute("mode", "constant")
    data = c.input(0)
    there = [both[axis] for axis in order]
    if any(n < 0 for pair in there for n in pair):
        begin, size = [max(-a, 0) for a, _ in there], []
        for n, (a, b) in zip(c.file.specs[data].shape, there, strict=True):
            size.append(n - max(-a, 0) - max(-b, 0))
        data = c.step("SLICE", [data, c.file.numbers(*begin), c.file.numbers(*size)], size)
        there = [(max(a, 0), max(b, 0)) for a, b in there]
    if mode == "constant":
        c.put(padded(c, data, there, value), order)
    elif mode == "reflect":
        table = c.file.constant("paddings", np.array(there, np.int32).reshape(-1, 2))
        c.emit("MIRROR_PAD", [data, table], order, None, data, mode="REFLECT")
    else:
        raise NotThereError(f"mode {mode}")


def gather(c: Conversion) -> None:
    rank = len(c.shape(0))
    axis = c.attribute("axis", 0)
    axis = axis + rank if axis < 0 else axis
    order = c.order(0)
    where = c.constant(1)
    size = c.shape(0)[axis]
    index_rank = len(c.shape(1))
    data = c.input(0, order if index_rank <= 1 else layouts.plain(rank))
    order = order if index_rank <= 1 else layouts.plain(rank)
    if where is not None:
        index = c.file.constant("indices", np.where(where < 0, where + size, where).astype(np.int32))
    else:
        h = c.held[c.node.inputs[1]]
        index = c.ordered(h.tensor, c.shape(1), h.order, layouts.plain(index_rank))
        if c.file.specs[index].dtype not in ("int32", "int64"):
            raise NotThereError("such indices")
    if index_rank == 1:
        after = order
    elif index_rank == 0:
        after = tuple(a - (a > axis) for a in order if a != axis)
    else:
        after = layouts.plain(rank + index_rank - 1)
    at = order.index(axis)
    c.emit("GATHER", [data, index], after, None, data, axis=at)


def gather_nd(c: Conversion) -> None:
    if c.attribute("batch_dims", 0):
        raise NotThereError("batch dimensions")
    where = c.constant(1)
    index = c.file.constant("indices", where.astype(np.int32)) if where is not None \
        else c.input(1, layouts.plain(len(c.shape(1))))
    data = c.input(0, layouts.plain(len(c.shape(0))))
    c.emit("GATHER_ND", [data, index], layouts.plain(len(c.out.shape)), None, data)


def expand(c: Conversion) -> None:
    """BROADCAST_TO; where nothing grows, the same elements."""
    rank = len(c.out.shape)
    order = c.common(rank, [0])
    data = c.aligned(0, order)
    shape = layouts.stored(c.out.shape, order)
    if c.file.specs[data].shape == shape:
        c.put(data, order)
    else:
        c.emit("BROADCAST_TO", [data, c.file.numbers(*shape)], order, None, data)


def tile(c: Conversion) -> None:
    order = c.order(0)
    times = c.needed(1, "repeats").tolist()
    data = c.input(0)
    c.emit("TILE", [data, c.file.numbers(*layouts.stored(times, order))], order, None, data)


def depth_to_space(c: Conversion) -> None:
    block = c.attribute("blocksize")
    if c.integer and c.dtype == "int16":
        raise NotThereError("blocks of 16 bits")
    data = c.input(0, layouts.channels_last(4))
    mode = c.attribute("mode", "DCR")
    if c.op.name == "DepthToSpace" and mode == "CRD":
        n, h, w, d = c.file.specs[data].shape
        spec = c.file.specs[data]
        depth = np.arange(d).reshape(d // block**2, block**2).T.reshape(-1).astype(np.int32)
        data = c.file.make("GATHER", [data, c.file.constant("depths", depth)],
                           Spec((n, h, w, d), spec.dtype, spec.quantization), axis=3)
    name = "DEPTH_TO_SPACE" if c.op.name == "DepthToSpace" else "SPACE_TO_DEPTH"
    c.emit(name, [data], layouts.channels_last(4), None, data, block_size=block)


def cast(c: Conversion) -> None:
    v, out = c.value(0), c.out
    data = c.input(0)
    order = c.order(0)
    if v.dtype is out.dtype:
        c.put(data, order)
        return
    c.emit("CAST", [data], order, in_data_type=c.file.specs[data].dtype.upper(), out_data_type=out.dtype.value.upper())
