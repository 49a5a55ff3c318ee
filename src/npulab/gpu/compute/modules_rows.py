"""Softmax and layer normalization as SPIR-V, for Vulkan: a work group a row, of any length.

Each thread takes every THREADS-th element; the group adds up in local memory, in a tree. Tensors are dense float32 and
finite, rows are not padded.
"""

from __future__ import annotations

from collections.abc import Callable

from npulab.errors import UnsupportedError
from npulab.gpu.compute.modules import Module
from npulab.gpu.compute.problems import LayerNorm, Softmax
from npulab.gpu.spirv_builder import Shader, Type, Value

THREADS = 64
GROUPS = 1 << 15
"""In a row of work groups; more rows are further rows of them (Vulkan 1.3: at least 65535 each way)."""
LOWEST = -3.4028234663852886e38


def softmax(what: Softmax) -> Module:
    """output = exp(x - max x) / sum of exp(x - max x), x = scale * input.

    Shapes:  input and output (rows, columns).
    Raises:  UnsupportedError unless float32, and where 32 bits do not count all elements.
    """
    s, row, last = _rows(what.rows, what.columns, what.number, 2)
    start, partial = row * what.columns, s.shared("float", THREADS)

    def scaled(i: Value) -> Value:
        return s.load(0, start + i) * what.scale

    most = s.variable(s.constant(LOWEST, "float"))
    with s.loop(what.columns, THREADS, s.local_id) as i:
        most.set(s.builtin("FMax", most.get(), scaled(i)))
    top = _reduced(s, partial, most.get(), lambda a, b: s.builtin("FMax", a, b))
    total = s.variable(s.constant(0.0, "float"))
    with s.loop(what.columns, THREADS, s.local_id) as i:
        total.set(total.get() + s.builtin("Exp", scaled(i) - top))
    whole = _reduced(s, partial, total.get(), lambda a, b: a + b)
    with s.when(last), s.loop(what.columns, THREADS, s.local_id) as i:
        s.store(1, start + i, s.builtin("Exp", scaled(i) - top) / whole)
    return _module(s, what.rows, what.columns, ("input", "output"), 5.0)


def layer_norm(what: LayerNorm, affine: bool = True) -> Module:
    """output = (input - mean) / sqrt(variance + epsilon) * gamma + beta, of each row; the variance is what the
    squares of input - mean are on average. affine: there are gamma and beta.

    Shapes:  input and output (rows, columns); gamma, beta (columns).
    Raises:  as `softmax`.
    """
    s, row, last = _rows(what.rows, what.columns, what.number, 4 if affine else 2)
    start, partial, part = row * what.columns, s.shared("float", THREADS), 1.0 / what.columns

    def total(of: Callable[[Value], Value]) -> Value:
        sum_ = s.variable(s.constant(0.0, "float"))
        with s.loop(what.columns, THREADS, s.local_id) as i:
            sum_.set(of(s.load(0, start + i)) + sum_.get())
        return _reduced(s, partial, sum_.get(), lambda a, b: a + b)

    mean = total(lambda x: x) * part
    share = s.builtin("InverseSqrt", total(lambda x: (x - mean) * (x - mean)) * part + what.epsilon)
    with s.when(last), s.loop(what.columns, THREADS, s.local_id) as i:
        value = (s.load(0, start + i) - mean) * share
        s.store(3 if affine else 1, start + i, s.fma(value, s.load(1, i), s.load(2, i)) if affine else value)
    return _module(s, what.rows, what.columns, ("input", "gamma", "beta", "output") if affine else ("input", "output"),
                   8.0)


def _rows(rows: int, columns: int, number: str, buffers: int) -> tuple[Shader, Value, Value]:
    """(shader, the group's row, whether there is such a row: else it is the last one, and not to be stored)."""
    if number != "float32":
        raise UnsupportedError("shaders of rows compute on float32", got=number)
    if min(rows, columns) < 1 or rows * columns >= 1 << 31:
        raise UnsupportedError("shaders count in 32 bits", got=f"{rows} rows of {columns}")
    s = Shader(THREADS, [Type("float")] * buffers, ())
    row = s.group_y * GROUPS + s.group_id
    return s, s.builtin("UMin", row, s.constant(rows - 1)), row < rows


def _reduced(s: Shader, array: int, value: Value, join: Callable[[Value, Value], Value]) -> Value:
    """`value` of all threads joined, in each of them. Local memory `array`: THREADS floats, free for use again."""
    s.shared_store(array, s.local_id, value)
    s.barrier()
    half = THREADS // 2
    while half:
        with s.when(s.local_id < half):
            s.shared_store(array, s.local_id, join(s.shared_load(array, s.local_id),
                                                   s.shared_load(array, s.local_id + half)))
        s.barrier()
        half //= 2
    found = s.shared_load(array, s.constant(0))
    s.barrier()
    return found


def _module(s: Shader, rows: int, columns: int, buffers: tuple[str, ...], operations: float) -> Module:
    """operations: of an element."""
    groups = min(rows, GROUPS), -(-rows // GROUPS)
    return Module(s.assemble(), groups, buffers, operations * rows * columns, 3 * -(-columns // THREADS), 1,
                  4 * THREADS)
