"""What moves tensors and works on one element at a time: views copied, put together, added, multiplied, activated.

One kernel does all of it: it walks over the axes of the result and reads each operand with strides of its own. Sizes
and strides are arguments, so that networks share compiled kernels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from npulab.errors import CapacityError
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Number, Traits
from npulab.gpu.compute.vectors import bits, element, kept, loaded, number_bytes
from npulab.gpu.compute.views import Shape, collapsed

INDEX_MAX = 2**31 - 1
"""Kernels count elements in an int."""
FUNCTIONS: Mapping[str, str] = {
    "relu_": "fmax(x, 0.0f)",
    "relu6_": "fmin(fmax(x, 0.0f), 6.0f)",
    "sigmoid_": "1.0f / (1.0f + exp(-x))",
    "silu_": "x / (1.0f + exp(-x))",
    "hardswish_": "x * fmin(fmax(x / 6.0f + 0.5f, 0.0f), 1.0f)",
    "gelu_": "0.5f * x * (1.0f + erf(x * 0.70710678118654752f))",
    "gelu_tanh_": "0.5f * x * (1.0f + tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)))",
    "softplus_": "fmax(x, 0.0f) + log1p(exp(-fabs(x)))",
    "mish_": "x * tanh(fmax(x, 0.0f) + log1p(exp(-fabs(x))))",
    "softsign_": "x / (1.0f + fabs(x))",
    "reciprocal_": "1.0f / x",
    "sign_": "x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f",
}
"""Functions of one number that OpenCL C has not."""
NUMBERS: Mapping[str, str] = {
    "hardsigmoid_": "fmin(fmax(a * x + b, 0.0f), 1.0f)",
    "clip_": "fmin(fmax(x, a), b)",
    "leaky_": "x < 0.0f ? a * x : x",
    "elu_": "x < 0.0f ? a * expm1(x) : x",
    "celu_": "x < 0.0f ? a * expm1(x / a) : x",
    "selu_": "b * (x < 0.0f ? a * expm1(x) : x)",
    "threshold_": "x > a ? x : 0.0f",
    "swish_": "x / (1.0f + exp(-a * x))",
}
"""The same, with numbers a and b."""
ROUNDED = """float half_(const float x) {
    ushort t[1];
    vstore_half(x, 0, (half *)t);
    return vload_half(0, (const half *)t);
}
"""
"""half_(x): the nearest number that float16 has."""
LANES = 16
"""Neighbours that a work item of a CPU makes floats of halves at once: one by one takes PoCL ten times as long."""


@dataclass(frozen=True, slots=True)
class Map:
    """y = expression of operands, at every place of `shape`.

    expression  OpenCL C; {0}, {1}, ... are operands, in the order of the roles "input", "input1", ....
    reads       (strides over `shape`, offset) of each.      writes  of the output.     Counted in elements.
    stored      what the output and then the operands are stored as.
    operations  of one element, roughly.
    """

    expression: str
    shape: Shape
    reads: tuple[tuple[Shape, int], ...]
    writes: tuple[Shape, int]
    stored: tuple[Number, ...]
    operations: int = 0


@dataclass(frozen=True, slots=True)
class Take:
    """y[outer, i, inner] = x[outer, table[i], inner]; both dense. "input1": the table, int32 [count]."""

    outer: int
    size: int
    count: int
    inner: int
    number: Number = "float32"


def role(i: int) -> str:
    return f"input{i or ''}"


def literal(x: float) -> str:
    """A float of OpenCL C, exact. What is not finite by its name."""
    value = np.float32(x)
    if np.isfinite(value):
        return f"({float(value).hex()}f)"
    return "(NAN)" if np.isnan(value) else "(INFINITY)" if value > 0 else "(-INFINITY)"


def span(*axes: int, traits: Traits) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(work items in all, in a group) of a walk over up to three axes, the innermost first. Few kinds of groups: some
    drivers compile a kernel for each."""
    inner = axes[0]
    wide = (64, 4, 1) if inner >= 32 else (16, 16, 1) if inner >= 8 else (4, 64, 1)
    if len(axes) == 1 or (inner >= 128 and axes[1] < 4):
        wide = (256, 1, 1)
    group = list(wide[: len(axes)])
    while np.prod(group) > traits.group_max:
        group[group.index(max(group))] //= 2
    return tuple(-(-n // g) * g for n, g in zip(axes, group, strict=True)), tuple(group)


def lower_map(what: Map, traits: Traits) -> Lowered:
    """One launch."""
    # in the order in which the result lies, so that neighbours write side by side
    order = sorted(range(len(what.shape)), key=lambda i: (-abs(what.writes[0][i]), i))
    walks = [tuple(w[0][i] for i in order) for w in (what.writes, *what.reads)]
    shape, walks = collapsed(tuple(what.shape[i] for i in order), walks)
    total = int(np.prod(shape))
    reach = max(sum(abs(s) * (n - 1) for s, n in zip(w, shape, strict=True)) + start
                for w, start in zip(walks, (what.writes[1], *(r[1] for r in what.reads)), strict=True))
    if max(total, reach) > INDEX_MAX:
        raise CapacityError("a tensor has more elements than kernels count", got=max(total, reach), want=INDEX_MAX)
    rank = len(shape)
    numbers: list[int] = [what.writes[1], *(r[1] for r in what.reads)]
    for axis in range(rank):
        numbers += [shape[axis], *(w[axis] for w in walks)]
    label = "copy" if what.expression == "{0}" else "map"
    by_lanes = traits.cpu and "float16" in what.stored and not _copied(what.expression, what.stored) and (
        shape[-1] >= LANES)
    steps = tuple(min(w[-1], 2) if w[-1] >= 0 else 2 for w in walks) if by_lanes else ()
    axes = [-(-shape[-1] // LANES) if by_lanes else shape[-1], *shape[-2:-1], math.prod(shape[:-2])][: min(rank, 3)]
    size, group = span(*axes, traits=traits)
    arguments: tuple[Argument, ...] = (*(Buffer(role(i)) for i in range(len(what.reads))), Buffer("output"),
                                       *map(np.int32, numbers))
    read = sum(number_bytes(number) * math.prod(n for n, s in zip(what.shape, strides, strict=True) if s)
               for (strides, _), number in zip(what.reads, what.stored[1:], strict=True))
    return Lowered((Launch(map_kernel(what.expression, rank, what.stored, steps), size, group, arguments, label,
                           float(what.operations * total), float(read + number_bytes(what.stored[0]) * total)),))


def _copied(expression: str, stored: tuple[Number, ...]) -> bool:
    return expression == "{0}" and stored[0] == stored[1]


@cache
def map_kernel(expression: str, rank: int, stored: tuple[Number, ...], steps: tuple[int, ...] = ()) -> Kernel:
    """Axes count from the outermost, 0; those before the last two share one dimension of the launch. steps: a work item
    has `LANES` neighbours, and so they lie in the output and each operand: 0 the same, 1 side by side, 2 otherwise."""
    names = ["y", *(f"x{i}" for i in range(len(stored) - 1))]
    copied = _copied(expression, stored)
    types = [(bits if copied else element)(number) for number in stored]
    arguments = [f"__global const {t} *{n}" for n, t in zip(names[1:], types[1:], strict=True)]
    arguments.append(f"__global {types[0]} *y")
    arguments += [f"const int {n}_at" for n in names]
    for a in range(rank):
        arguments += [f"const int n{a}", *(f"const int {n}_s{a}" for n in names)]
    lines = [f"const int i{rank - 1} = get_global_id(0){f' * {LANES}' if steps else ''};"]
    ends = [f"i{rank - 1} >= n{rank - 1}"]
    if rank > 1:
        lines.append(f"const int i{rank - 2} = get_global_id(1);")
        ends.append(f"i{rank - 2} >= n{rank - 2}")
    if rank > 2:
        lines.append("int rest = get_global_id(2);")
        for a in range(rank - 3, 0, -1):
            lines.append(f"const int i{a} = rest % n{a}; rest /= n{a};")
        lines.append("const int i0 = rest;")
        ends.append("i0 >= n0")
    lines.append(f"if ({' || '.join(ends)}) return;")

    def at(n: str) -> str:
        return " + ".join([f"{n}_at", *(f"i{a} * {n}_s{a}" for a in range(rank))])

    value = re.sub(r"\{(\d+)\}", lambda m: f"v{m[1]}", expression)
    if copied:
        lines.append(f"y[{at('y')}] = x0[{at('x0')}];")
    elif steps:
        last = rank - 1
        lines += [f"const int left = min({LANES}, n{last} - i{last});", f"float w[{LANES}];"]
        for i, (n, number, step) in enumerate(zip(names[1:], stored[1:], steps[1:], strict=True)):
            one = loaded(number, f"{n} + {at(n)} + j * {n}_s{last}")
            if not step:
                lines.append(f"const float v{i} = {loaded(number, f'{n} + {at(n)}')};")
                continue
            many = f"vstore{LANES}(vload{'_half' * (number == 'float16')}{LANES}(0, {n} + {at(n)}), 0, w{i});"
            lines += [f"float w{i}[{LANES}];", f"if ({'1' if step == 1 else '0'} && left == {LANES}) {many}",
                      f"else for (int j = 0; j < left; j++) w{i}[j] = {one};"]
        own = " ".join(f"const float v{i} = w{i}[j];" for i, step in enumerate(steps[1:]) if step)
        one = kept(stored[0], "w[j]", f"y + {at('y')} + j * y_s{last}")
        many = f"vstore{'_half' * (stored[0] == 'float16')}{LANES}(vload{LANES}(0, w), 0, y + {at('y')});"
        lines += [f"for (int j = 0; j < left; j++) {{ {own} w[j] = {value}; }}",
                  f"if ({'1' if steps[0] == 1 else '0'} && left == {LANES}) {many}",
                  f"else for (int j = 0; j < left; j++) {one};"]
    else:
        lines += [f"const float v{i} = {loaded(number, f'{n} + {at(n)}')};"
                  for i, (n, number) in enumerate(zip(names[1:], stored[1:], strict=True))]
        lines.append(kept(stored[0], value, f"y + {at('y')}") + ";")
    body = "\n    ".join(lines)
    return Kernel(f"{functions(expression)}__kernel void map({', '.join(arguments)}) {{\n    {body}\n}}\n", "map")


def functions(expression: str) -> str:
    """Definitions of what it calls."""
    called = [n for n in (*FUNCTIONS, *NUMBERS) if re.search(rf"\b{n}\(", expression)]
    found = "".join(f"float {n}(const float x{', const float a, const float b' if n in NUMBERS else ''}) "
                    f"{{ return {FUNCTIONS.get(n) or NUMBERS[n]}; }}\n" for n in called)
    return (ROUNDED if re.search(r"\bhalf_\(", expression) else "") + found


TAKE = """
__kernel void take(__global const T *x, __global const int *table, __global T *y, const int outer,
                   const int size, const int count, const int inner) {
    const int k = get_global_id(0), i = get_global_id(1), o = get_global_id(2);
    if (k >= inner || i >= count || o >= outer) return;
    y[(o * count + i) * inner + k] = x[(o * size + table[i]) * inner + k];
}
"""


def lower_take(what: Take, traits: Traits) -> Lowered:
    size, group = span(what.inner, what.count, what.outer, traits=traits)
    numbers = map(np.int32, (what.outer, what.size, what.count, what.inner))
    kernel = Kernel(f"typedef {bits(what.number)} T;{TAKE}", "take")
    return Lowered((Launch(kernel, size, group, (Buffer("input"), Buffer("input1"), Buffer("output"), *numbers), "take",
                           0.0, 2.0 * number_bytes(what.number) * what.outer * what.count * what.inner),))
