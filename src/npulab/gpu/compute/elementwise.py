"""Layers that compute each number by itself, or only move numbers. Broadcasting as NumPy's.

    unary(kind, shape, traits, number, slope)                   "input" -> "output": an activation
    binary(kind, left, right, traits, number, activation, slope)  "input" of shape left, "input1" of shape right
    transpose(shape, order, traits, number)                     output axis i is input axis order[i]
    concat(shapes, axis, traits, number)                        "input", "input1", ...: a launch each
    crop(shape, starts, sizes, traits, number, steps)           a slice
    resize(shape, out, kind, coordinates, traits, number)       NHWC, by tables that the host makes

All return Lowered, and are one kernel: a strided walk over the output, vectors along its last axis where every tensor
is dense there or constant along it. "output" may be "input" in unary, and in binary if their shapes are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError
from npulab.gpu.compute import activations, vectors
from npulab.gpu.compute.types import Activation, Argument, Buffer, Kernel, Launch, Lowered, Number, Traits

Binary = Literal["add", "sub", "mul", "div", "max", "min"]
Coordinates = Literal["half_pixel", "asymmetric", "align_corners"]
"""Of ONNX's Resize: (x + 1/2) / scale - 1/2; x / scale; corners on corners."""
BINARY = {"add": "a + b", "sub": "a - b", "mul": "a * b", "div": "a / b", "max": "fmax(a, b)", "min": "fmin(a, b)"}
ENOUGH = 4096
"""Numbers for one work item of a CPU: assumed."""


def unary(kind: Activation, shape: Sequence[int], traits: Traits, number: Number = "float32", slope: float = 0.01
          ) -> Lowered:
    """Raises (like all here): UnsupportedError unless float32 or float16."""
    strides = _dense(shape)
    return Lowered((_walk(shape, strides, 0, [("input", strides, 0)], "a", kind, slope, traits, number, kind),))


def binary(kind: Binary, left: Sequence[int], right: Sequence[int], traits: Traits, number: Number = "float32",
           activation: Activation = "none", slope: float = 0.01) -> Lowered:
    shape = np.broadcast_shapes(tuple(left), tuple(right))
    inputs = [(f"input{i or ''}", _broadcast(s, shape), 0) for i, s in enumerate((left, right))]
    return Lowered((_walk(shape, _dense(shape), 0, inputs, BINARY[kind], activation, slope, traits, number, kind),))


def transpose(shape: Sequence[int], order: Sequence[int], traits: Traits, number: Number = "float32") -> Lowered:
    strides, out = _dense(shape), [shape[i] for i in order]
    return Lowered((_copy(out, _dense(out), 0, ("input", [strides[i] for i in order], 0), traits, number,
                          "transpose"),))


def concat(shapes: Sequence[Sequence[int]], axis: int, traits: Traits, number: Number = "float32") -> Lowered:
    axis %= len(shapes[0])
    out = list(shapes[0])
    out[axis] = sum(s[axis] for s in shapes)
    strides, at, launches = _dense(out), 0, []
    for i, shape in enumerate(shapes):
        launches.append(_copy(shape, strides, at * strides[axis], (f"input{i or ''}", _dense(shape), 0), traits, number,
                              "concat"))
        at += shape[axis]
    return Lowered(tuple(launches))


def crop(shape: Sequence[int], starts: Sequence[int], sizes: Sequence[int], traits: Traits, number: Number = "float32",
         steps: Sequence[int] | None = None) -> Lowered:
    """input[start : start + size * step : step] on every axis; steps may be negative."""
    strides, steps = _dense(shape), steps or [1] * len(shape)
    offset = sum(s * d for s, d in zip(starts, strides, strict=True))
    return Lowered((_copy(sizes, _dense(sizes), 0, ("input", [d * s for d, s in zip(strides, steps, strict=True)],
                                                    offset), traits, number, "crop"),))


def _copy(shape: Sequence[int], strides: Sequence[int], offset: int, source: tuple[str, Sequence[int], int],
          traits: Traits, number: Number, label: str) -> Launch:
    return _walk(shape, strides, offset, [source], "a", "none", 0.0, traits, number, label)


def _walk(shape: Sequence[int], strides: Sequence[int], offset: int, inputs: Sequence[tuple[str, Sequence[int], int]],
          expression: str, activation: Activation, slope: float, traits: Traits, number: Number, label: str) -> Launch:
    """output[offset + i strides] = expression of a, b: inputs (role, strides, offset) at i, for all i of shape."""
    if 0 in shape:
        raise InvariantError("a layer without numbers is not to be launched", got=f"{tuple(shape)}")
    sizes, walks = _joined(list(shape), [list(strides), *(list(s) for _, s, _ in inputs)])
    out, *ins = walks
    last = sizes[-1]
    dense = out[-1] == 1 and all(s[-1] in (0, 1) for s in ins)
    w = vectors.fitting(traits, last) if dense else 1
    strips, rows = -(-last // w), math.prod(sizes[:-1])
    group = (1, 1) if traits.cpu else vectors.split(vectors.group_items(traits), strips, rows)
    each = max(1, min(strips, ENOUGH // w)) if traits.cpu else 1
    deep = max(1, min(rows, ENOUGH // (each * w), -(-rows // (4 * traits.compute_units)))) if traits.cpu else 1
    names = "ab"[:len(ins)]

    def at(walk: list[int]) -> str:
        return " + ".join([f"(long)i{d} * {s}" for d, s in enumerate(walk[:-1]) if s] or ["0"])

    parts = []
    rest = "row"
    for d in range(len(sizes) - 2, -1, -1):
        parts.append(f"int i{d} = {rest}{f' % {sizes[d]}' if d else ''};")
        rest = f"({rest} / {sizes[d]})"
    loads = " ".join(f"V {n} = " + (f"(V)(LOAD1({n}0));" if not s[-1] and w > 1 else f"LOAD({n}0 + (long)c * {s[-1]});")
                     for n, s in zip(names, ins, strict=True))
    pointers = " ".join(f"__global const T *{n}0 = {role} + {start} + {at(s)};"
                        for n, (role, _, start), s in zip(names, inputs, ins, strict=True))
    final = activations.activation(activation, "r", w, slope)
    source = vectors.preamble(number, w) + activations.helpers(activation, w) + f"""
__kernel {vectors.attribute(group)} void walk({"".join(f"__global const T *{r}, " for r, _, _ in inputs)}
                                              __global T *output) {{
    int low = get_global_id(1) * {deep}, high = min(low + {deep}, {rows});
    int first = get_global_id(0) * {each}, most = min(first + {each}, {strips});
    for (int row = low; row < high; row++) {{
        {" ".join(parts)}
        {pointers}
        __global T *to = output + {offset} + {at(out)};
        for (int i = first; i < most; i++) {{
            int c = i * {w};
            {f"if (c + {w} > {last}) break;" if last % w else ""}
            {loads}
            V r = {expression};
            STORE({final}, to + (long)c * {out[-1]});
        }}
        {_tail(w, last, names, ins, expression, activations.activation(activation, "r", 1, slope)) if last % w else ""}
    }}
}}
"""
    if last % w:  # the tail is scalar: the output may be the input, which must not be read when written
        source = source.replace("__kernel", activations.helpers(activation, 1) + "__kernel", 1)
    arguments: tuple[Argument, ...] = (*(Buffer(r) for r, _, _ in inputs), Buffer("output"))
    count = math.prod(shape)
    size = (vectors.up(-(-strips // each), group[0]), vectors.up(-(-rows // deep), group[1]))
    return Launch(Kernel(source, "walk"), size, group, arguments, label, float(count),
                  float(vectors.number_bytes(number) * count * (1 + len(inputs))))


def _tail(w: int, last: int, names: str, ins: list[list[int]], expression: str, final: str) -> str:
    loads = " ".join(f"float {n} = LOAD1({n}0 + (long)c * {s[-1]});" for n, s in zip(names, ins, strict=True))
    return (f"if (most == {-(-last // w)} && first < most) for (int c = {last // w * w}; c < {last}; c++) {{ {loads} "
            f"float r = {expression}; STORE1({final}, to + c); }}")


def _dense(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1:]) for i in range(len(shape))]


def _broadcast(shape: Sequence[int], to: Sequence[int]) -> list[int]:
    strides = [0 if n == 1 else s for n, s in zip(shape, _dense(shape), strict=True)]
    return [0] * (len(to) - len(shape)) + strides


def _joined(sizes: list[int], walks: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Fewer axes: those of size 1 go, neighbours that every walk goes through in one stride become one."""
    keep = [d for d, n in enumerate(sizes) if n > 1]
    sizes, walks = [sizes[d] for d in keep], [[s[d] for d in keep] for s in walks]
    d = 0
    while d + 1 < len(sizes):
        if all(s[d] == s[d + 1] * sizes[d + 1] for s in walks):
            sizes[d:d + 2] = [sizes[d] * sizes[d + 1]]
            for s in walks:
                s[d:d + 2] = [s[d + 1]]
        else:
            d += 1
    return (sizes, walks) if sizes else ([1], [[1] for _ in walks])


def resize(shape: Sequence[int], out: tuple[int, int], kind: Literal["nearest", "bilinear"], coordinates: Coordinates,
           traits: Traits, number: Number = "float32") -> Lowered:
    """shape: [batch, height, width, channels]. nearest: rounds down; half pixels to the nearer, half of one down."""
    batch, height, width, channels = shape
    w = vectors.fitting(traits, channels)
    strips = -(-channels // w)
    group = (1, 1, 1) if traits.cpu else (*vectors.split(vectors.group_items(traits), strips, out[1]), 1)
    rows, columns = (_table(n, m, kind, coordinates) for n, m in zip((height, width), out, strict=True))
    blend = ("V v = LOAD(image + ((long)y0 * width + x0) * channels);" if kind == "nearest" else "\n        ".join([
        *(f"V v{i}{j} = LOAD(image + ((long)y{i} * width + x{j}) * channels);" for i in (0, 1) for j in (0, 1)),
        "V t = v00 + (v01 - v00) * fx, u = v10 + (v11 - v10) * fx, v = t + (u - t) * fy;"]))
    each = out[1] if traits.cpu else 1
    source = vectors.preamble(number, w) + f"""
__kernel {vectors.attribute(group)} void resize(__global const T *input, __global const int *rows,
        __global const float *row_parts, __global const int *columns, __global const float *column_parts,
        __global T *output, int height, int width, int channels, int out_height, int out_width, int each) {{
    if ((int)get_global_id(0) * {w} >= channels) return;
    int c = min((int)get_global_id(0) * {w}, channels - {w}), row = get_global_id(2);
    int oy = row % out_height, y0 = rows[oy], y1 = min(y0 + 1, height - 1);
    float fy = row_parts[oy];
    int first = get_global_id(1) * each, most = min(first + each, out_width);
    __global const T *image = input + (size_t)(row / out_height) * height * width * channels + c;
    for (int ox = first; ox < most; ox++) {{
        int x0 = columns[ox], x1 = min(x0 + 1, width - 1);
        float fx = column_parts[ox];
        {blend}
        STORE(v, output + ((size_t)row * out_width + ox) * channels + c);
    }}
}}
"""
    arguments: tuple[Argument, ...] = (
        Buffer("input"), *(Buffer(r) for r in ("rows", "row_parts", "columns", "column_parts")), Buffer("output"),
        *(np.int32(v) for v in (height, width, channels, *out, each)))
    size = (vectors.up(strips, group[0]), vectors.up(-(-out[1] // each), group[1]), batch * out[0])
    count = batch * channels * (height * width + math.prod(out))
    launch = Launch(Kernel(source, "resize"), size, group, arguments, "resize", 0.0,
                    float(vectors.number_bytes(number) * count))
    return Lowered((launch,), {"rows": rows[0], "row_parts": rows[1], "columns": columns[0],
                               "column_parts": columns[1]})


def _table(size: int, out: int, kind: str, coordinates: Coordinates) -> tuple[NDArray[Any], NDArray[Any]]:
    """For each place of the output the one before it in the input, and the part of the next."""
    x = np.arange(out, dtype=np.float64)
    match coordinates:
        case "half_pixel":
            at = (x + 0.5) * size / out - 0.5
        case "asymmetric":
            at = x * size / out
        case "align_corners":
            at = x * (size - 1) / (out - 1) if out > 1 else x
    if kind == "nearest":
        at = np.floor(at) if coordinates == "asymmetric" else np.ceil(at - 0.5)
    at = np.clip(at, 0, size - 1)
    return np.floor(at).astype(np.int32), (at - np.floor(at)).astype(np.float32)
