"""int8 softmax and layer normalization along the last axis.

    softmax(what, traits, scale_in) -> Lowered
        byte for byte what TFLite's reference kernel computes; output: of scale 1 / 256 and zero point -128, as there
    layer_norm(what, traits, scale_in, scale_out, zero_out, gamma, beta) -> Lowered

"input" int8 [rows, columns] -> "output", which may be the same buffer. The input's zero point makes no difference to
either: numbers are taken from the row's largest, or from its mean.

Softmax (tensorflow/lite/kernels/internal/reference/softmax.h; npulab.reference.softmax): there are 256 differences from
the largest, and their exponentials are a table. A sum of them stops at 512, from where on each share of 1 / 256 is
rounded to 0: such rows are -128 throughout. (LiteRT ends its process there: a shift of more than 31 bits.)

Layer normalization, which TFLite has not: with S = sum of q, d = columns q - S and V = columns (sum of q q) - S S,
whole numbers all of them,

    zero_out + rint(d / sqrt(V + epsilon (columns / scale_in)**2) gamma / scale_out + beta / scale_out), in -128..127,

is (x - mean) / sqrt(variance + epsilon) gamma + beta rounded once, ties to even numbers as ONNX's QuantizeLinear does.
From V on it is computed in floats: before rint the first term is off by 10 2**-24 of itself at most, the second by
2 2**-24. A row of equal numbers is beta, with epsilon 0 too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError, UnsupportedError
from npulab.gpu.compute import vectors
from npulab.gpu.compute.integers import whole
from npulab.gpu.compute.problems import LayerNorm, Softmax
from npulab.gpu.compute.softmax import rows_each
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Traits
from npulab.reference.softmax import exponentials

MOST = 1 << 28
"""Of a sum of exponentials, in units of 2**-19: 512."""
SEEN = 1 << 22
"""Of an exponential, in units of 2**-31, at least: what is less is rounded to 0, whatever the sum."""
BLOCK = 4096
"""Exponentials that 32 bits add up, beside `MOST`."""
NEWTON = round(48 / 17 * 2**29), round(-32 / 17 * 2**29)
"""Where a reciprocal's approximation begins, in units of 2**-29."""
COLUMNS = (1 << 17) - 1
"""Of layer normalization at most: sums of squares, up to 2**14 each, have 31 bits; columns q and S are exact floats."""
LARGEST, LEAST = float(np.finfo(np.float32).max), 2.0**-100
"""Of what is added to V. V is 0 or 1 at least, and where it is 0 so is d: so little makes no difference."""
MAX, SUM, SUM_OF_TERMS = "max({a}, {b})", vectors.SUM, f"min({{a}} + {{b}}, {MOST})"


def softmax(what: Softmax, traits: Traits, scale_in: float) -> Lowered:
    """`what.scale` is TFLite's beta. Raises: as `exponentials_of`."""
    table = exponentials_of(what, scale_in)
    source = (_softmax_on_cpu(vectors.fitting(traits, what.columns)) if traits.cpu
              else _softmax_on_gpu(_group(what, traits)))
    numbers = (np.int32(np.argmax(table >= SEEN)),)
    return _lowered(what, traits, Kernel(source, "softmax"), {"exponentials": table}, numbers, 5.0)


def exponentials_of(what: Softmax, scale_in: float) -> NDArray[np.uint32]:
    """As `npulab.reference.softmax.exponentials`. Raises: UnsupportedError for another number, and scales that TFLite's
    fixed point does not hold; InvariantError for sizes below 1, and what is no scale."""
    _checked(what)
    _scale("beta", what.scale)
    _scale("scale_in", scale_in)
    return exponentials(scale_in, what.scale).astype(np.uint32)


def layer_norm(what: LayerNorm, traits: Traits, scale_in: float, scale_out: float, zero_out: int,
               gamma: NDArray[Any] | None = None, beta: NDArray[Any] | None = None) -> Lowered:
    """gamma, beta: [columns]; none: ones, zeros. Raises: as `factors_of`."""
    constants, added = factors_of(what, scale_in, scale_out, zero_out, gamma, beta)
    source = (_layer_norm_on_cpu(vectors.fitting(traits, what.columns)) if traits.cpu
              else _layer_norm_on_gpu(_group(what, traits)))
    numbers = (np.float32(added), np.int32(zero_out))
    return _lowered(what, traits, Kernel(source, "layer_norm"), constants, numbers, 8.0)


def factors_of(what: LayerNorm, scale_in: float, scale_out: float, zero_out: int, gamma: NDArray[Any] | None,
               beta: NDArray[Any] | None) -> tuple[dict[str, NDArray[np.float32]], float]:
    """(gamma and beta over scale_out, what is added to V). Raises: UnsupportedError for another number, and more than
    `COLUMNS`; InvariantError for sizes below 1, what is no scale and no byte, arrays of another shape, and factors that
    float32 does not hold."""
    _checked(what)
    if what.columns > COLUMNS:
        raise UnsupportedError("integer layer normalization adds up squares in 31 bits",
                               want=f"{COLUMNS} columns at most", got=what.columns)
    _scale("scale_in", scale_in)
    _scale("scale_out", scale_out)
    whole("the zero points", np.asarray([zero_out]), -128, 127, "bytes")
    ratio = what.columns / scale_in
    added = what.epsilon * ratio * ratio  # a power would raise where it overflows
    if not 0 <= added <= LARGEST:
        raise InvariantError("epsilon (columns / scale_in)**2 is no number from 0 on that float32 holds",
                             got=f"epsilon {what.epsilon:g}, {what.columns} columns, scale_in {scale_in:g}")
    found = {}
    for name, array in (("gamma", gamma), ("beta", beta)):
        values = np.full(what.columns, 1.0 if name == "gamma" else 0.0) if array is None else np.asarray(array)
        if values.shape != (what.columns,):
            raise InvariantError(f"{name} is of another shape", want=(what.columns,), got=values.shape)
        with np.errstate(over="ignore"):
            values = values.astype(np.float64) / scale_out
        if not (np.abs(values) <= LARGEST).all():
            raise InvariantError(f"{name} / scale_out has a number that float32 has not",
                                 got=f"{values[np.argmax(np.abs(values))]:g}")
        found[name] = values.astype(np.float32)
    return found, max(added, LEAST)


def _checked(what: Softmax | LayerNorm) -> None:
    if what.number != "int8":
        raise UnsupportedError("kernels of integer rows read int8", got=what.number)
    whole("rows and columns", np.asarray([what.rows, what.columns]), 1, (1 << 31) - 1)


def _scale(name: str, value: float) -> None:
    if not 0 < value <= LARGEST:
        raise InvariantError(f"{name} is no scale", want="a finite number above 0", got=value)


def _group(what: Softmax | LayerNorm, traits: Traits) -> tuple[int, ...]:
    return (1,) if traits.cpu else vectors.split(vectors.group_items(traits), what.columns, what.rows)


def _lowered(what: Softmax | LayerNorm, traits: Traits, kernel: Kernel, constants: Mapping[str, NDArray[Any]],
             numbers: tuple[Argument, ...], operations: float) -> Lowered:
    """numbers: the kernel's last arguments. operations: of an element."""
    group, each, count = _group(what, traits), rows_each(what.rows, what.columns, traits), what.rows * what.columns
    size = (-(-what.rows // each),) if traits.cpu else (group[0], vectors.up(what.rows, group[1]))
    arguments: tuple[Argument, ...] = (
        Buffer("input"), Buffer("output"), *(Buffer(name) for name in constants), np.int32(what.rows),
        np.int32(what.columns), np.int32(each), *numbers)
    label = "int8 " + kernel.entry.replace("_", " ")
    return Lowered((Launch(kernel, size, group, arguments, label, operations * count, 2.0 * count),), constants)


def _vectors(w: int) -> str:
    """C: bytes, I: ints, V: floats of a vector. LOAD(p), STORE(v, p): C there."""
    n = "" if w == 1 else str(w)
    load, store = ("(*(p))", "(*(p) = (v))") if w == 1 else (f"vload{w}(0, p)", f"vstore{w}(v, 0, p)")
    return (f"typedef char{n} C;\ntypedef int{n} I;\ntypedef float{n} V;\n#define LOAD(p) {load}\n"
            f"#define STORE(v, p) {store}\n#define FLOATS(p) {load}\n#define INTS(v) convert_int{n}(v)\n")


def _across(name: str, kind: str, w: int, combine: str) -> str:
    """name(v): its lanes put together, half by half: of single lanes LLVM 15 makes three times as many instructions."""
    kinds = {1: kind} | {n: f"{kind}{n}" for n in vectors.WIDTHS[1:]}
    halves, of = "", "v"
    for n in reversed([n for n in vectors.WIDTHS if n < w]):
        halves += f"    {kinds[n]} v{n} = {combine.format(a=f'{of}.lo', b=f'{of}.hi')};\n"
        of = f"v{n}"
    return f"{kind} {name}({kinds[w]} v) {{\n{halves}    return {of};\n}}\n"


_SCALAR = "#pragma clang loop vectorize(disable) unroll_count(8)"
"""A loop that looks numbers up: LLVM 15 gathers vectors of them, which takes a fifth more."""
SHARES = f"""
int high_product(int a, int b) {{ return convert_int((convert_long(a) * b + (1L << 30)) >> 31); }}
uint reciprocal(uint sum, int zeros) {{
    // 1 / x in units of 2**-31, x = sum << zeros in the same, 1 to 2: Newton's steps from 48 / 17 - 32 / 17 (x / 2) on
    int half_x = convert_int((sum << zeros) >> 1);
    int y = {NEWTON[0]} + high_product(half_x, {NEWTON[1]});
    for (int i = 0; i < 3; i++) y += high_product(y, (1 << 29) - high_product(half_x, y)) * 4;
    return min((uint)y * 2, 0x7fffffffu);
}}
uint term(uint exponential) {{ return (exponential + (1u << 11)) >> 12; }}
// a product over 2**31, then over 2**(35 - zeros): both roundings at once
char share(uint exponential, ulong factor, int shift) {{
    return convert_char((int)min((exponential * factor + (1ul << 30) + (1ul << (shift - 1))) >> shift, 255ul) - 128);
}}
"""
"""What becomes of a row's sum, and of an exponential."""


def _softmax_on_cpu(w: int) -> str:
    """A work item has rows. Of each it makes a table of outputs by differences, too. seen: from where on in that table
    any is above -128."""
    return _vectors(w) + SHARES + _across("highest", "char", w, MAX) + f"""
__kernel {vectors.attribute((1,))} void softmax(__global const char *input, __global char *output,
        __global const uint *exponentials, int rows, int columns, int each, int seen) {{
    int first = get_global_id(0) * each, most = min(first + each, rows);
    char shares[384];  // 256, and what `at` may point to
    for (int i = 0; i < seen; i++) shares[i] = -128;
    for (int row = first; row < most; row++) {{
        __global const char *x = input + (size_t)row * columns;
        __global char *y = output + (size_t)row * columns;
        C high = LOAD(x + columns - {w});
        for (int i = 0; i < columns - {w}; i += {w}) high = max(high, LOAD(x + i));
        int lowest = 255 - highest(high);
        __global const uint *terms = exponentials + lowest;  // by numbers, not by differences
        char *at = shares + lowest;
        uint sum = 0;
        for (int block = 0; block < columns; block += {BLOCK}) {{
            int end = min(block + {BLOCK}, columns);
{_SCALAR}
            for (int i = block; i < end; i++) sum += term(terms[x[i]]);
            sum = min(sum, {MOST}u);
        }}
        int zeros = clz(sum);
        ulong factor = reciprocal(sum, zeros);
        for (int i = seen; i < 256; i++) shares[i] = share(exponentials[i], factor, 66 - zeros);
{_SCALAR}
        for (int i = 0; i < columns; i++) y[i] = at[x[i]];
    }}
}}
"""


def _softmax_on_gpu(group: tuple[int, ...]) -> str:
    """Work items of a group beside each other share a row, or some rows if those are short."""
    return SHARES + vectors.reduction("highest", group[0], MAX, "int") + \
        vectors.reduction("total", group[0], SUM_OF_TERMS, "int") + f"""
__kernel {vectors.attribute(group)} void softmax(__global const char *input, __global char *output,
        __global const uint *exponentials, int rows, int columns, int each, int seen) {{
    __local int room[{math.prod(group)}];
    int row = get_global_id(1), lid = get_local_id(0), count = row < rows ? columns : 0;
    __global const char *x = input + (size_t)row * columns;
    __global char *y = output + (size_t)row * columns;
    int top = -128, sum = 0;
    for (int i = lid; i < count; i += {group[0]}) top = max(top, (int)x[i]);
    __global const uint *terms = exponentials + 255 - highest(top, room);
    for (int i = lid; i < count; i += {group[0]}) sum = min(sum + (int)term(terms[x[i]]), {MOST});
    sum = total(sum, room);
    int zeros = clz(sum);
    ulong factor = reciprocal(sum, zeros);
    for (int i = lid; i < count; i += {group[0]}) y[i] = share(terms[x[i]], factor, 66 - zeros);
}}
"""


def _normal(w: int) -> str:
    """part_of(...): 1 / sqrt(V + added). normal(q, ...): outputs; d is exact up to 2**24."""
    n = "" if w == 1 else str(w)
    return _vectors(w) + f"""
float part_of(int columns, int sum, int squares, float added) {{
    return rsqrt(convert_float((long)columns * squares - (long)sum * sum) + added);
}}
C normal(C q, float columns, float sum, float part, V gamma, V beta, int zero_out) {{
    V y = fma((convert_float{n}(q) * columns - sum) * part, gamma, beta);
    V low = (V)(-128 - zero_out), high = (V)(127 - zero_out);
    y = y > low ? y : low;
    y = y < high ? y : high;
    // 1.5 * 2**23 rounds to a whole number, in the lowest bits
    return convert_char{n}(as_int{n}(y + 12582912.0f) + (zero_out - 0x4b400000));
}}
"""


_NORM_PARAMETERS = """__global const char *input, __global char *output, __global const float *gamma,
        __global const float *beta, int rows, int columns, int each, float added, int zero_out"""


def _layer_norm_on_cpu(w: int) -> str:
    """A work item has rows. The last vector of a row overlaps the one before; it is read first, as output may be
    input."""
    return _normal(w) + _across("total", "int", w, SUM) + f"""
__kernel {vectors.attribute((1,))} void layer_norm({_NORM_PARAMETERS}) {{
    int first = get_global_id(0) * each, most = min(first + each, rows);
    int whole = (columns - 1) / {w} * {w}, tail = columns - {w};
    I fresh = {"1" if w == 1 else f"-({vectors.lanes(w)} + tail >= whole)"};
    for (int row = first; row < most; row++) {{
        __global const char *x = input + (size_t)row * columns;
        __global char *y = output + (size_t)row * columns;
        C last = LOAD(x + tail);
        I sums = INTS(last) * fresh, squares = INTS(last) * sums;
        for (int i = 0; i < whole; i += {w}) {{
            I q = INTS(LOAD(x + i));
            sums += q;
            squares += q * q;
        }}
        int sum = total(sums);
        float part = part_of(columns, sum, total(squares), added);
        for (int i = 0; i < whole; i += {w})
            STORE(normal(LOAD(x + i), columns, sum, part, FLOATS(gamma + i), FLOATS(beta + i), zero_out), y + i);
        STORE(normal(last, columns, sum, part, FLOATS(gamma + tail), FLOATS(beta + tail), zero_out), y + tail);
    }}
}}
"""


def _layer_norm_on_gpu(group: tuple[int, ...]) -> str:
    """Work items of a group beside each other share a row, or some rows if those are short."""
    return _normal(1) + vectors.reduction("total", group[0], SUM, "int") + f"""
__kernel {vectors.attribute(group)} void layer_norm({_NORM_PARAMETERS}) {{
    __local int room[{math.prod(group)}];
    int row = get_global_id(1), lid = get_local_id(0), count = row < rows ? columns : 0;
    __global const char *x = input + (size_t)row * columns;
    __global char *y = output + (size_t)row * columns;
    int sum = 0, squares = 0;
    for (int i = lid; i < count; i += {group[0]}) {{
        sum += x[i];
        squares += x[i] * x[i];
    }}
    sum = total(sum, room);
    float part = part_of(columns, sum, total(squares, room), added);
    for (int i = lid; i < count; i += {group[0]}) y[i] = normal(x[i], columns, sum, part, gamma[i], beta[i], zero_out);
}}
"""
