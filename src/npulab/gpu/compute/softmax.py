"""Softmax along the last axis: e(x) / sum e(x), e(x) = exp((x - the row's largest) scale).

    lower(what, traits) -> Lowered      "input" [rows, columns] -> "output", which may be the same buffer
"""

from __future__ import annotations

import math

import numpy as np

from npulab.gpu.compute import vectors
from npulab.gpu.compute.problems import Softmax
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Traits

ENOUGH = 4096
"""Numbers for one work item of a CPU, beside which starting it is little: assumed."""


def lower(what: Softmax, traits: Traits) -> Lowered:
    """Raises: UnsupportedError unless float32 or float16."""
    kernel, size, group = (_on_cpu if traits.cpu else _on_gpu)(what, traits)
    each = rows_each(what.rows, what.columns, traits)
    arguments: tuple[Argument, ...] = (Buffer("input"), Buffer("output"), np.int32(what.rows),
                                       np.int32(what.columns), np.int32(each), np.float32(what.scale))
    count = what.rows * what.columns
    return Lowered((Launch(kernel, size, group, arguments, "softmax", 5.0 * count,
                           2.0 * vectors.number_bytes(what.number) * count),))


def rows_each(rows: int, columns: int, traits: Traits) -> int:
    """Rows that one work item goes through. A CPU's: enough work, and some items for every core. A GPU's: one."""
    if not traits.cpu:
        return 1
    return max(1, min(-(-rows // (4 * traits.compute_units)), math.ceil(ENOUGH / max(1, columns))))


def _on_cpu(what: Softmax, traits: Traits) -> tuple[Kernel, tuple[int, ...], tuple[int, ...]]:
    """A work item has rows. The last vector of a row overlaps the one before; it is read first, as output may be
    input."""
    w = vectors.fitting(traits, what.columns)
    source = vectors.preamble(what.number, w) + vectors.exponential(w) + f"""
__kernel {vectors.attribute((1,))} void softmax(__global const T *input, __global T *output, int rows, int columns,
                                                int each, float scale) {{
    int first = get_global_id(0) * each, most = min(first + each, rows);
    int whole = (columns - 1) / {w} * {w}, tail = columns - {w};
    V fresh = {"1.0f" if w == 1 else f"select((V)(0.0f), (V)(1.0f), {vectors.lanes(w)} + tail >= whole)"};
    for (int row = first; row < most; row++) {{
        __global const T *x = input + (size_t)row * columns;
        __global T *y = output + (size_t)row * columns;
        V last = LOAD(x + tail) * scale, high = last;
        for (int i = 0; i < whole; i += {w}) high = fmax(high, LOAD(x + i) * scale);
        float top = {vectors.across(w, "high", vectors.MAX)};
        last = exponential(last - top);
        V sums = last * fresh;
        for (int i = 0; i < whole; i += {w}) {{
            V e = exponential(LOAD(x + i) * scale - top);
            sums += e;
            {"STORE(e, y + i);" if what.number == "float32" else ""}
        }}
        float part = 1.0f / ({vectors.across(w, "sums", vectors.SUM)});
        for (int i = 0; i < whole; i += {w})
            {"STORE(LOAD(y + i) * part, y + i);" if what.number == "float32"
             else "STORE(exponential(LOAD(x + i) * scale - top) * part, y + i);"}
        STORE(last * part, y + tail);
    }}
}}
"""
    return Kernel(source, "softmax"), (-(-what.rows // rows_each(what.rows, what.columns, traits)),), (1,)


def _on_gpu(what: Softmax, traits: Traits) -> tuple[Kernel, tuple[int, ...], tuple[int, ...]]:
    """Work items of a group beside each other share a row, or some rows if those are short."""
    group = vectors.split(vectors.group_items(traits), what.columns, what.rows)
    items = math.prod(group)
    source = vectors.preamble(what.number, 1) + vectors.reduction("highest", group[0], vectors.MAX) + \
        vectors.reduction("total", group[0], vectors.SUM) + f"""
__kernel {vectors.attribute(group)} void softmax(__global const T *input, __global T *output, int rows, int columns,
                                                 int each, float scale) {{
    __local float room[{items}];
    int row = get_global_id(1), lid = get_local_id(0), count = row < rows ? columns : 0;
    __global const T *x = input + (size_t)row * columns;
    __global T *y = output + (size_t)row * columns;
    float top = -INFINITY, sum = 0.0f;
    for (int i = lid; i < count; i += {group[0]}) top = fmax(top, LOAD1(x + i) * scale);
    top = highest(top, room);
    for (int i = lid; i < count; i += {group[0]}) sum += exp(LOAD1(x + i) * scale - top);
    float part = 1.0f / total(sum, room);
    for (int i = lid; i < count; i += {group[0]}) STORE1(exp(LOAD1(x + i) * scale - top) * part, y + i);
}}
"""
    return Kernel(source, "softmax"), (group[0], vectors.up(what.rows, group[1])), group
