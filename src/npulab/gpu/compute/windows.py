"""Reductions, pools, resizing and transposed convolutions: each element of the result looks at several.

Images are NHWC and dense. Sums of many are compensated (Kahan, "Further remarks on reducing truncation errors", 1965).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from npulab.gpu.compute.moves import span
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Number, Traits
from npulab.gpu.compute.vectors import number_bytes, preamble
from npulab.gpu.compute.views import Shape, collapsed

Reduction = Literal["sum", "mean", "max", "min", "product", "l1", "l2", "squares"]
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Reduce:
    """Over the axes `over` of a view (strides over shape, offset); the others are kept, dense, in their order."""

    kind: Reduction
    shape: Shape
    over: Shape
    reads: tuple[Shape, int]
    number: Number = "float32"


@dataclass(frozen=True, slots=True)
class Pool:
    """Windows over [batch, height, width, channels]. pads: top, left. `padded`: averages count the padding that lies
    within `bounds`, the extent of the padded image."""

    kind: Literal["max", "average"]
    image: tuple[int, int, int, int]
    out: Pair
    kernel: Pair
    strides: Pair
    dilations: Pair
    pads: Pair
    padded: bool = False
    bounds: Pair = (0, 0)
    number: Number = "float32"


@dataclass(frozen=True, slots=True)
class Resample:
    """y[b, i, j, c] from `taps` rows and columns each: "input1", int32 [out, taps] rows, "input2" their weights,
    "input3" and "input4" the columns'."""

    image: tuple[int, int, int, int]
    out: Pair
    taps: int
    number: Number = "float32"


@dataclass(frozen=True, slots=True)
class TransposedConvolution:
    """[batch, height, width, channels] -> [batch, *out, filters]. Constants: weights [filters, kernel, channels //
    groups] as "input1", bias as "input2". pads: top, left."""

    image: tuple[int, int, int, int]
    filters: int
    out: Pair
    kernel: Pair
    strides: Pair
    dilations: Pair
    pads: Pair
    groups: int = 1
    number: Number = "float32"

    @property
    def operations(self) -> float:
        return 2.0 * math.prod(self.image) * math.prod(self.kernel) * self.filters / self.groups


START = {"max": "-INFINITY", "min": "INFINITY", "product": "1.0f"}
STEP = {"max": "s = (v > s) | isnan(v) ? v : s", "min": "s = (v < s) | isnan(v) ? v : s", "product": "s *= v"}
TERM = {"l1": "fabs(v)", "l2": "v * v", "squares": "v * v"}


def lower_reduce(what: Reduce, traits: Traits) -> Lowered:
    kept = [i for i in range(len(what.shape)) if i not in what.over]
    strides, offset = what.reads
    out, (steps,) = collapsed(tuple(what.shape[i] for i in kept), [tuple(strides[i] for i in kept)])
    inner, (runs,) = collapsed(tuple(what.shape[i] for i in what.over), [tuple(strides[i] for i in what.over)])
    total, count = math.prod(out), math.prod(inner)
    numbers = [offset, total, *(n for pair in (*zip(out, steps, strict=True), *zip(inner, runs, strict=True))
                                for n in pair)]
    width = vectors(traits, out[-1]) if steps[-1] == 1 else 1
    size, group = span(total // width, traits=traits)
    arguments: tuple[Argument, ...] = (Buffer("input"), Buffer("output"), *map(np.int32, numbers),
                                       np.float32(count))
    kernel = reduce_kernel(what.kind, len(out), len(inner), width, what.number)
    return Lowered((Launch(kernel, size, group, arguments, f"reduce {what.kind}", float(total * count),
                           float(number_bytes(what.number) * (total * count + total))),))


@cache
def reduce_kernel(kind: Reduction, kept: int, over: int, width: int, number: Number) -> Kernel:
    arguments = ["__global const T *x", "__global T *y", "const int at", "const int total"]
    arguments += [f"const int n{a}, const int s{a}" for a in range(kept)]
    arguments += [f"const int m{a}, const int t{a}" for a in range(over)] + ["const float count"]
    lines = ["int rest = get_global_id(0) * W, from = at;", "if (rest >= total) return;",
             "const int to = rest;"]
    lines += [f"from += rest % n{a} * s{a}; rest /= n{a};" for a in range(kept - 1, -1, -1)]
    compensated = kind not in STEP
    lines.append("V s = 0.0f, lost = 0.0f;" if compensated else f"V s = {START[kind]};")
    lines += [f"for (int j{a} = 0; j{a} < m{a}; j{a}++)" for a in range(over)]
    at = " + ".join(["from", *(f"j{a} * t{a}" for a in range(over))])
    load = f"const V v = LOAD(x + {at})"
    if compensated:  # an infinite or undefined sum has no error to compensate
        lines.append(f"{{ {load}, w = {TERM.get(kind, 'v')} - lost, n = s + w, e = (n - s) - w; "
                     "lost = isfinite(n) ? e : (V)(0.0f); s = n; }")
    else:
        lines.append(f"{{ {load}; {STEP[kind]}; }}")
    lines.append(f"STORE({'s / count' if kind == 'mean' else 'sqrt(s)' if kind == 'l2' else 's'}, y + to);")
    body = "\n    ".join(lines)
    return Kernel(f"{typed(number, width)}__kernel void reduce({', '.join(arguments)}) {{\n    {body}\n}}\n", "reduce")


POOL = """
int up(int a, int b) { return a > 0 ? (a + b - 1) / b : 0; }  // places of a window before a
__kernel void pool(__global const T *x, __global T *y, const int batch, const int height, const int width,
                   const int channels, const int rows, const int columns, const int kh, const int kw, const int sh,
                   const int sw, const int dh, const int dw, const int top, const int left, const int bottom,
                   const int right) {
    const int c = get_global_id(0) * W, j = get_global_id(1), bi = get_global_id(2);
    if (c >= channels || j >= columns || bi >= batch * rows) return;
    const int b = bi / rows, h = bi % rows * sh - top, w = j * sw - left;
    const int p0 = up(-h, dh), p1 = min(kh, up(height - h, dh)), q0 = up(-w, dw), q1 = min(kw, up(width - w, dw));
    V s = START;
    for (int p = p0; p < p1; p++) {
        __global const T *row = x + ((b * height + h + p * dh) * width + w) * channels + c;
        for (int q = q0; q < q1; q++) {
            const V v = LOAD(row + q * dw * channels);
            STEP;
        }
    }
    const int count = bottom ? min(kh, up(bottom - h, dh)) * min(kw, up(right - w, dw)) : (p1 - p0) * (q1 - q0);
    STORE(END, y + (bi * columns + j) * channels + c);
}
"""


def vectors(traits: Traits, count: int) -> int:
    """Neighbours that a work item computes at once."""
    return next((w for w in (16, 8, 4, 2) if w <= traits.vector and count % w == 0), 1)


def typed(number: Number, width: int) -> str:
    """T, V, and how they are loaded and stored."""
    return f"#define W {width}\n{preamble(number, width)}"


@cache
def pool_kernel(kind: str, width: int, number: Number) -> Kernel:
    start, step, end = {"max": ("-INFINITY", "s = (v > s) | isnan(v) ? v : s", "s"),
                        "average": ("0.0f", "s += v", "s / (float)count")}[kind]
    parts = f"#define START {start}\n#define STEP {step}\n#define END ({end})\n"
    return Kernel(typed(number, width) + parts + POOL, "pool")


def lower_pool(what: Pool, traits: Traits) -> Lowered:
    b, h, w, c = what.image
    numbers = (b, h, w, c, *what.out, *what.kernel, *what.strides, *what.dilations, *what.pads,
               *(what.bounds if what.padded else (0, 0)))
    width = vectors(traits, c)
    size, group = span(c // width, what.out[1], b * what.out[0], traits=traits)
    done = b * c * math.prod(what.out)
    return Lowered((Launch(pool_kernel(what.kind, width, what.number), size, group,
                           (Buffer("input"), Buffer("output"), *map(np.int32, numbers)), f"pool {what.kind}",
                           float(done * math.prod(what.kernel)),
                           float(number_bytes(what.number) * (b * h * w * c + done))),))


RESAMPLE = """
__kernel void resample(__global const T *x, __global const int *rows_at, __global const float *rows_weight,
                       __global const int *columns_at, __global const float *columns_weight, __global T *y,
                       const int batch, const int height, const int width, const int channels, const int rows,
                       const int columns, const int taps) {
    const int c = get_global_id(0) * W, j = get_global_id(1), bi = get_global_id(2);
    if (c >= channels || j >= columns || bi >= batch * rows) return;
    const int b = bi / rows, i = bi % rows;
    V s = 0.0f;
    for (int p = 0; p < taps; p++) {
        V t = 0.0f;
        for (int q = 0; q < taps; q++)
            t += columns_weight[j * taps + q] * LOAD(
                x + ((b * height + rows_at[i * taps + p]) * width + columns_at[j * taps + q]) * channels + c);
        s += rows_weight[i * taps + p] * t;
    }
    STORE(s, y + (bi * columns + j) * channels + c);
}
"""


def lower_resample(what: Resample, traits: Traits) -> Lowered:
    b, h, w, c = what.image
    width = vectors(traits, c)
    size, group = span(c // width, what.out[1], b * what.out[0], traits=traits)
    kernel = Kernel(typed(what.number, width) + RESAMPLE, "resample")
    roles = (Buffer("input"), *(Buffer(f"input{i}") for i in range(1, 5)), Buffer("output"))
    done = b * c * math.prod(what.out)
    return Lowered((Launch(kernel, size, group, (*roles, *map(np.int32, (b, h, w, c, *what.out, what.taps))),
                           "resample", 2.0 * done * what.taps**2,
                           float(number_bytes(what.number) * (b * h * w * c + done))),))


TRANSPOSED = """
__kernel void transposed(__global const T *x, __global const T *weights, __global const float *bias,
                         __global T *y, const int batch, const int height, const int width, const int channels,
                         const int filters, const int rows, const int columns, const int kh, const int kw, const int sh,
                         const int sw, const int dh, const int dw, const int top, const int left, const int groups) {
    const int f = get_global_id(0), j = get_global_id(1), bi = get_global_id(2);
    if (f >= filters || j >= columns || bi >= batch * rows) return;
    const int b = bi / rows, i = bi % rows, own = channels / groups, first = f / (filters / groups) * own;
    float s = bias[f];
    for (int p = 0; p < kh; p++) {
        const int h = i + top - p * dh;
        if (h < 0 || h % sh || h / sh >= height) continue;
        for (int q = 0; q < kw; q++) {
            const int w = j + left - q * dw;
            if (w < 0 || w % sw || w / sw >= width) continue;
            __global const T *row = x + ((b * height + h / sh) * width + w / sw) * channels + first;
            __global const T *own_weights = weights + ((f * kh + p) * kw + q) * own;
            for (int c = 0; c < own; c++) s = fma(LOAD(row + c), LOAD(own_weights + c), s);
        }
    }
    STORE(s, y + ((b * rows + i) * columns + j) * filters + f);
}
"""


def lower_transposed(what: TransposedConvolution, traits: Traits) -> Lowered:
    b, h, w, c = what.image
    size, group = span(what.filters, what.out[1], b * what.out[0], traits=traits)
    numbers = (b, h, w, c, what.filters, *what.out, *what.kernel, *what.strides, *what.dilations, *what.pads,
               what.groups)
    moved = b * h * w * c + b * what.filters * math.prod(what.out) + what.filters * c * math.prod(what.kernel)
    roles = (Buffer("input"), Buffer("input1"), Buffer("input2"), Buffer("output"))
    kernel = Kernel(typed(what.number, 1) + TRANSPOSED, "transposed")
    return Lowered((Launch(kernel, size, group, (*roles, *map(np.int32, numbers)), "transposed convolution",
                           what.operations, float(number_bytes(what.number) * moved)),))
