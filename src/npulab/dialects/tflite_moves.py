"""TFLite operators that only move elements, in ONNX's words."""

from __future__ import annotations

import numpy as np

from npulab.dialects import layouts
from npulab.dialects.conversion import NotThereError
from npulab.dialects.layouts import Order
from npulab.dialects.onnx_file import OnnxFile
from npulab.ir.ops import FullyConnected, Pad


def reshape(f: OnnxFile) -> None:
    old, new, order = f.shape(0), f.out.shape, f.order(0)
    after = layouts.reshaped(old, new, order)
    if after is None and len(new) == 2 and new[0] == old[0] and order[0] == 0 and only_matrices(f, f.out.index):
        f.columns[f.out.index] = (old, order)
        after = (0, 1)
    if after is None:
        order, after = layouts.plain(len(old)), layouts.plain(len(new))
    x = f.input(0, order)
    if layouts.stored(old, order) != layouts.stored(new, after):
        x = f.op("Reshape", [x, f.numbers(*layouts.stored(new, after))])
    f.give(x, after)


def only_matrices(f: OnnxFile, value: int) -> bool:
    readers = f.graph.consumers.get(value, ())
    return bool(readers) and value not in f.graph.outputs and all(
        isinstance(n.op, FullyConnected) and n.inputs[0] == value and f.graph.values[n.inputs[1]].is_constant
        and f.graph.values[n.inputs[1]].shape[1] == f.graph.values[value].shape[1] for n in readers)


def transpose(f: OnnxFile) -> None:
    f.give(f.input(0), layouts.transposed(f.order(0), [int(n) for n in f.known(1, "permutations")]))


def concat(f: OnnxFile) -> None:
    rank = len(f.out.shape)
    order = f.common(rank, range(len(f.now.inputs)))
    axis = int(getattr(f.now.op, "axis", 0)) % rank
    parts = [f.input(i, order) for i in range(len(f.now.inputs))]
    f.give(f.op("Concat", parts, axis=order.index(axis)), order, f.fused)


def split(f: OnnxFile) -> None:
    by_size = f.now.op.name == "SPLIT_V"
    data = 0 if by_size else 1
    rank, order = len(f.shape(data)), f.order(data)
    axis = int(f.known(2 if by_size else 0, "axes").reshape(-1)[0]) % rank
    sizes = [f.graph.values[v].shape[axis] for v in f.now.outputs]
    outs = f.ops("Split", [f.input(data), f.numbers(*sizes)], len(sizes), axis=order.index(axis))
    for i, t in enumerate(outs):
        f.give(t, order, output=i)


def pack(f: OnnxFile) -> None:
    rank = len(f.out.shape)
    axis = int(f.options["axis"]) % rank
    parts = [f.op("Unsqueeze", [f.input(i, layouts.plain(rank - 1)), f.numbers(axis)])
             for i in range(len(f.now.inputs))]
    f.give(f.op("Concat", parts, axis=axis), layouts.plain(rank))


def unpack(f: OnnxFile) -> None:
    rank, count = len(f.shape(0)), len(f.now.outputs)
    axis = int(f.options["axis"]) % rank
    x = f.input(0, layouts.plain(rank))
    outs = f.ops("Split", [x, f.numbers(*[1] * count)], count, axis=axis) if count > 1 else [x]
    for i, t in enumerate(outs):
        f.give(f.op("Squeeze", [t, f.numbers(axis)]), layouts.plain(rank - 1), output=i)


def pad(f: OnnxFile) -> None:
    op, order = f.now.op, f.order(0)
    assert isinstance(op, Pad)
    table = f.known(1, "paddings")[list(order)]
    if op.mode == "symmetric":
        raise NotThereError("symmetric mirroring")
    table_in = f.numbers(*table[:, 0].tolist(), *table[:, 1].tolist())
    x = f.input(0)
    if op.mode == "reflect":
        f.give(f.op("Pad", [x, table_in], mode="reflect"), order)
    else:
        f.give(f.op("Pad", [x, table_in, *([f.op("Reshape", [f.input(2), f.constant(np.zeros(0, np.int64))])
                                            if f.shape(2) else f.input(2)] if op.valued else [])]), order)


def slice_(f: OnnxFile) -> None:
    rank, order = len(f.shape(0)), f.order(0)
    begin, size = f.known(1, "starts").tolist(), f.known(2, "sizes").tolist()
    ends = [n if s < 0 else b + s for n, b, s in zip(f.shape(0), begin, size, strict=True)]
    f.give(_sliced(f, f.input(0), order, begin, ends, [1] * rank), order)


def _sliced(f: OnnxFile, x: int, order: Order, begin: list[int], end: list[int], step: list[int]) -> int:
    axes = f.numbers(*range(len(order)))
    columns = [f.numbers(*layouts.stored(numbers, order)) for numbers in (begin, end)]
    return f.op("Slice", [x, *columns, axes, f.numbers(*layouts.stored(step, order))])


def strided_slice(f: OnnxFile) -> None:
    own, shape, order = f.options, f.shape(0), f.order(0)
    if own.get("ellipsis_mask") or own.get("new_axis_mask") or own.get("offset"):
        raise NotThereError("an ellipsis or new axes")
    begin, end, step = (f.known(i, "limits").tolist() for i in (1, 2, 3))
    starts: list[int] = []
    ends: list[int] = []
    gone = []
    for axis, n in enumerate(shape):
        if axis >= len(begin):
            begin.append(0)
            end.append(n)
            step.append(1)
        bit = 1 << axis
        if own.get("shrink_axis_mask", 0) & bit:
            at = begin[axis] % n
            starts.append(at)
            ends.append(at + 1)
            gone.append(axis)
            step[axis] = 1
            continue
        low = None if own.get("begin_mask", 0) & bit else begin[axis]
        high = None if own.get("end_mask", 0) & bit else end[axis]
        a, b, _ = slice(low, high, step[axis]).indices(n)
        starts.append(a)
        ends.append(b if b >= 0 else -n - 1)
    y = _sliced(f, f.input(0), order, starts, ends, step)
    if gone:
        y = f.op("Squeeze", [y, f.numbers(*sorted(order.index(a) for a in gone))])
        order = tuple(a - sum(g < a for g in gone) for a in order if a not in gone)
    f.give(y, order)


def gather(f: OnnxFile) -> None:
    if f.options.get("batch_dims"):
        raise NotThereError("batch dimensions")
    rank, where = len(f.shape(0)), len(f.shape(1))
    axis = int(f.options.get("axis", 0)) % rank
    index = f.input(1, layouts.plain(where))
    f.give(f.op("Gather", [f.input(0, layouts.plain(rank)), index], axis=axis), layouts.plain(rank - 1 + where))


def gather_nd(f: OnnxFile) -> None:
    index = f.op("Cast", [f.input(1, layouts.plain(len(f.shape(1))))], to=7)
    f.give(f.op("GatherND", [f.input(0, layouts.plain(len(f.shape(0)))), index]), layouts.plain(len(f.out.shape)))


def broadcast(f: OnnxFile) -> None:
    order = layouts.plain(len(f.out.shape))
    f.give(f.op("Expand", [f.aligned(0, order), f.numbers(*f.out.shape)]), order)


def tile(f: OnnxFile) -> None:
    order = f.order(0)
    f.give(f.op("Tile", [f.input(0), f.numbers(*layouts.stored(f.known(1, "repeats").tolist(), order))]), order)


def shape_of(f: OnnxFile) -> None:
    f.give(f.constant(np.array(f.shape(0), f.out.dtype.value), "shape"), (0,))
