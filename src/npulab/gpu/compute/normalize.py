"""Layer normalization along the last axis: (x - mean) / sqrt(variance + epsilon) * gamma + beta.

    lower(what, traits, gamma, beta) -> Lowered     "input" [rows, columns] -> "output", which may be the same buffer

The variance is of differences from the mean, in a second pass: the mean of squares less the square of the mean
loses all where the mean is large.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.gpu.compute import vectors
from npulab.gpu.compute.problems import LayerNorm
from npulab.gpu.compute.softmax import rows_each
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Traits


def lower(what: LayerNorm, traits: Traits, gamma: NDArray[Any] | None = None,
          beta: NDArray[Any] | None = None) -> Lowered:
    """gamma, beta: [columns]; none: ones, zeros. Raises: UnsupportedError unless float32 or float16."""
    affine = gamma is not None or beta is not None
    kernel, size, group = (_on_cpu if traits.cpu else _on_gpu)(what, traits, affine)
    constants = {}
    if affine:
        constants = {"gamma": np.ones(what.columns, np.float32) if gamma is None else gamma.astype(np.float32),
                     "beta": np.zeros(what.columns, np.float32) if beta is None else beta.astype(np.float32)}
    each = rows_each(what.rows, what.columns, traits)
    arguments: tuple[Argument, ...] = (
        Buffer("input"), Buffer("output"), *(Buffer(name) for name in constants), np.int32(what.rows),
        np.int32(what.columns), np.int32(each), np.float32(what.epsilon))
    count = what.rows * what.columns
    return Lowered((Launch(kernel, size, group, arguments, "layer norm", 8.0 * count,
                           2.0 * vectors.number_bytes(what.number) * count),), constants)


def _parameters(affine: bool) -> str:
    return "__global const T *input, __global T *output, " + (
        "__global const float *gamma, __global const float *beta, " if affine else "") + \
        "int rows, int columns, int each, float epsilon"


def _on_cpu(what: LayerNorm, traits: Traits, affine: bool) -> tuple[Kernel, tuple[int, ...], tuple[int, ...]]:
    """A work item has rows. The last vector of a row overlaps the one before; it is read first, as output may be
    input."""
    w = vectors.fitting(traits, what.columns)
    n = "" if w == 1 else str(w)

    def done(x: str, at: str) -> str:
        load = "({0}[{1}])" if w == 1 else f"vload{n}(0, {{0}} + {{1}})"
        inner = f"({x} - mean) * part"
        return f"{inner} * {load.format('gamma', at)} + {load.format('beta', at)}" if affine else inner

    source = vectors.preamble(what.number, w) + f"""
__kernel {vectors.attribute((1,))} void layer_norm({_parameters(affine)}) {{
    int first = get_global_id(0) * each, most = min(first + each, rows);
    int whole = (columns - 1) / {w} * {w}, tail = columns - {w};
    V fresh = {"1.0f" if w == 1 else f"select((V)(0.0f), (V)(1.0f), {vectors.lanes(w)} + tail >= whole)"};
    for (int row = first; row < most; row++) {{
        __global const T *x = input + (size_t)row * columns;
        __global T *y = output + (size_t)row * columns;
        V last = LOAD(x + tail), sums = last * fresh;
        for (int i = 0; i < whole; i += {w}) sums += LOAD(x + i);
        float mean = ({vectors.across(w, "sums", vectors.SUM)}) / columns;
        V d = (last - mean) * fresh;
        sums = d * d;
        for (int i = 0; i < whole; i += {w}) {{
            d = LOAD(x + i) - mean;
            sums = fma(d, d, sums);
        }}
        float part = 1.0f / sqrt(({vectors.across(w, "sums", vectors.SUM)}) / columns + epsilon);
        for (int i = 0; i < whole; i += {w}) STORE({done("LOAD(x + i)", "i")}, y + i);
        STORE({done("last", "tail")}, y + tail);
    }}
}}
"""
    return Kernel(source, "layer_norm"), (-(-what.rows // rows_each(what.rows, what.columns, traits)),), (1,)


def _on_gpu(what: LayerNorm, traits: Traits, affine: bool) -> tuple[Kernel, tuple[int, ...], tuple[int, ...]]:
    """Work items of a group beside each other share a row, or some rows if those are short."""
    group = vectors.split(vectors.group_items(traits), what.columns, what.rows)
    source = vectors.preamble(what.number, 1) + vectors.reduction("total", group[0], vectors.SUM) + f"""
__kernel {vectors.attribute(group)} void layer_norm({_parameters(affine)}) {{
    __local float room[{math.prod(group)}];
    int row = get_global_id(1), lid = get_local_id(0), count = row < rows ? columns : 0;
    __global const T *x = input + (size_t)row * columns;
    __global T *y = output + (size_t)row * columns;
    float sum = 0.0f, squares = 0.0f;
    for (int i = lid; i < count; i += {group[0]}) sum += LOAD1(x + i);
    float mean = total(sum, room) / columns;
    for (int i = lid; i < count; i += {group[0]}) {{
        float d = LOAD1(x + i) - mean;
        squares = fma(d, d, squares);
    }}
    float part = 1.0f / sqrt(total(squares, room) / columns + epsilon);
    for (int i = lid; i < count; i += {group[0]})
        STORE1((LOAD1(x + i) - mean) * part{" * gamma[i] + beta[i]" if affine else ""}, y + i);
}}
"""
    return Kernel(source, "layer_norm"), (group[0], vectors.up(what.rows, group[1])), group
