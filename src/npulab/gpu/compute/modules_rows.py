"""Softmax and layer normalization as SPIR-V, for Vulkan: a work group a row, of any length.

Each thread takes every THREADS-th four; the group adds up in local memory, in a tree. Numbers are finite; float32 is
computed. `Row` is of int8, too: modules_integer_rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError
from npulab.gpu.compute.modules import Layer, Module
from npulab.gpu.compute.modules_numbers import (
    FOUR,
    STORED,
    computed,
    counted,
    floats,
    fours,
    inside,
    kept,
    load,
    padded,
    store,
)
from npulab.gpu.compute.problems import LayerNorm, Softmax
from npulab.gpu.spirv_builder import Shader, Type, Value

THREADS = 64
GROUPS = 1 << 15
"""In a row of work groups; more rows are further rows of them (Vulkan 1.3: at least 65535 each way)."""
LOWEST = -3.4028234663852886e38
CONSTANTS = {"gamma": FOUR, "beta": FOUR, "exponentials": Type("uint")}
"""What their buffers are of; others are of fours of the layer's number."""


def softmax(what: Softmax) -> Layer:
    """output = exp(x - max x) / sum of exp(x - max x), x = scale * input.

    Shapes:  input and output (rows, columns).
    Raises:  UnsupportedError for int8, and where 32 bits do not count all elements.
    """
    floats(what.number, "softmax")
    row = Row(what, ("input", "output"))
    s = row.s

    def scaled(i: Value) -> Value:
        return load(s, what.number, 0, row.start + i) * what.scale

    most = s.variable(s.constant(LOWEST, "float", 4))
    with row.each() as i:
        value = scaled(i)
        if what.columns % 4:
            value = s.select(inside(s, i, what.columns), value, s.constant(LOWEST, "float", 4))
        most.set(s.builtin("FMax", most.get(), value))
    top = s.spread(row.joined(most.get(), lambda a, b: s.builtin("FMax", a, b)), 4)
    whole = s.spread(row.total(lambda i: s.builtin("Exp", scaled(i) - top)), 4)
    row.stored(1, lambda i: s.builtin("Exp", scaled(i) - top) / whole)
    return row.layer(5.0)


def layer_norm(what: LayerNorm, gamma: NDArray[Any] | None = None, beta: NDArray[Any] | None = None) -> Layer:
    """output = (input - mean) / sqrt(variance + epsilon) * gamma + beta, of each row; the variance is what the
    squares of input - mean are on average.

    Shapes:  input and output (rows, columns); gamma, beta: both [columns], or None.
    Raises:  as `softmax`; InvariantError for arrays of other shapes.
    """
    floats(what.number, "layer normalization")
    constants = {}
    for role, values in (("gamma", gamma), ("beta", beta)):
        if values is not None:
            constants[role] = padded(values, np.float32)
        if (values is None) != (gamma is None) or (values is not None and values.shape != (what.columns,)):
            raise InvariantError("layer normalization has both gamma and beta, of a row's length, or none of them",
                                 want=(what.columns,), got=f"{role} {None if values is None else values.shape}")
    row = Row(what, ("input", *constants, "output"))
    s, part = row.s, 1.0 / what.columns

    def apart(i: Value) -> Value:
        return load(s, what.number, 0, row.start + i) - mean

    mean = s.spread(row.total(lambda i: load(s, what.number, 0, row.start + i)) * part, 4)
    share = s.builtin("InverseSqrt", row.total(lambda i: apart(i) * apart(i)) * part + what.epsilon)

    def normal(i: Value) -> Value:
        value = apart(i) * s.spread(share, 4)
        return s.fma(value, s.load(1, i), s.load(2, i)) if constants else value

    row.stored(3 if constants else 1, normal)
    return row.layer(8.0, constants)


class Row:
    """The shader of a group while it is written. start: of its row, in fours; where there is no such row it is the last
    one, and not stored."""

    def __init__(self, what: Softmax | LayerNorm, roles: tuple[str, ...]) -> None:
        counted(what.rows, what.columns, what.rows * (what.columns + 3))
        self.what, self.roles, self.width = what, roles, fours(what.columns)
        self.kind = computed(what.number)
        s = self.s = Shader(THREADS, [CONSTANTS.get(role, STORED[what.number]) for role in roles], ())
        row = s.group_y * GROUPS + s.group_id
        self.there = row < what.rows
        self.start = s.builtin("UMin", row, s.constant(what.rows - 1)) * self.width
        self.array = s.shared(self.kind, THREADS)

    def each(self) -> Any:
        """A loop over the thread's fours."""
        return self.s.loop(self.width, THREADS, self.s.local_id)

    def total(self, of: Callable[[Value], Value]) -> Value:
        """Of the row's numbers, in each thread. of: a four, by its number."""
        s = self.s
        sums = s.variable(s.constant(0, self.kind, 4))
        with self.each() as i:
            sums.set(kept(s, of(i), i, self.what.columns) + sums.get())
        return self.joined(sums.get(), lambda a, b: a + b)

    def joined(self, value: Value, join: Callable[[Value, Value], Value]) -> Value:
        """The lanes of all threads joined, in each of them."""
        s = self.s
        one = s.lane(value, 0)
        for i in range(1, 4):
            one = join(one, s.lane(value, i))
        s.shared_store(self.array, s.local_id, one)
        s.barrier()
        half = THREADS // 2
        while half:
            with s.when(s.local_id < half):
                s.shared_store(self.array, s.local_id, join(s.shared_load(self.array, s.local_id),
                                                            s.shared_load(self.array, s.local_id + half)))
            s.barrier()
            half //= 2
        found = s.shared_load(self.array, s.constant(0))
        s.barrier()
        return found

    def stored(self, buffer: int, of: Callable[[Value], Value]) -> None:
        s, what = self.s, self.what
        with s.when(self.there), self.each() as i:
            store(s, what.number, buffer, self.start + i, kept(s, of(i), i, what.columns))

    def layer(self, operations: float, constants: Mapping[str, NDArray[Any]] | None = None) -> Layer:
        """operations: of an element."""
        rows, columns = self.what.rows, self.what.columns
        module = Module(self.s.assemble(), (min(rows, GROUPS), -(-rows // GROUPS)), self.roles,
                        operations * rows * columns, 3 * -(-self.width // THREADS), 4 * THREADS)
        return Layer((module,), dict.fromkeys(("input", "output"), (rows, columns)), self.what.number, constants or {})
