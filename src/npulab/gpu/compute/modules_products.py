"""Products of matrices as SPIR-V, for Vulkan, with scale, bias, residual and activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import InvariantError
from npulab.gpu.compute.modules import Layer, Module
from npulab.gpu.compute.modules_numbers import (
    DTYPES,
    STORED,
    WHOLE,
    counted,
    floats,
    fours,
    load,
    multiply_add,
    padded,
)
from npulab.gpu.compute.modules_shapes import Shape
from npulab.gpu.compute.modules_tiles import Finish, Tile, ending, roles_of
from npulab.gpu.compute.problems import Product
from npulab.gpu.spirv_builder import Type, Value, Variable


def product(what: Product, b: NDArray[Any] | None = None, bias: NDArray[Any] | None = None, halves: bool = False,
            shape: Shape | None = None) -> Layer:
    """output = activation(input B * scale + bias + residual). `b`: what.inner x what.columns (or the other way round,
    if transposed), with a batch in front if batched; None: it is "input1". The residual is the last input.
    halves: of float16, four products at a time are added up as halves, before they are added as floats.
    shape: how threads share the work.

    Raises: InvariantError for arrays of other shapes; UnsupportedError for int8, for halves of anything but float16,
    and where 32 bits do not count all elements.
    """
    floats(what.number, "products", halves)
    constants = {} if b is None else {"weights": packed(what, b)}
    residual = "input2" if b is None else "input1"
    out = (what.batch, what.rows, what.columns)
    shapes: dict[str, tuple[int, ...]] = {"input": (what.batch, what.rows, what.inner), "output": out}
    if what.residual:
        shapes[residual] = out
    if b is None:
        shapes["input1"] = shape_of_b(what)
    if bias is not None:
        if bias.shape != (what.columns,):
            raise InvariantError("the bias is of another shape", want=(what.columns,), got=bias.shape)
        constants["bias"] = padded(bias, np.float32)
    roles = {"input": STORED[what.number], "weights" if b is not None else "input1": STORED[what.number]}
    made = module(what, roles_of(what, roles, bias is not None, residual), ending(what, residual, what.scale), halves,
                  shape)
    return Layer((made,), shapes, what.number, constants)


def shape_of_b(what: Product) -> tuple[int, ...]:
    return (*([what.batch] if what.batched else []),
            *((what.columns, what.inner) if what.transposed else (what.inner, what.columns)))


def packed(what: Product, b: NDArray[Any]) -> NDArray[Any]:
    """[batch or 1, inner, columns], both padded with zeros. Raises: InvariantError for another shape."""
    shape = shape_of_b(what)
    if b.shape != shape:
        raise InvariantError("B is of another shape", want=shape, got=b.shape)
    matrix = b.reshape(-1, *shape[-2:])
    matrix = matrix.transpose(0, 2, 1) if what.transposed else matrix
    return padded(np.pad(matrix, ((0, 0), (0, -what.inner % 4), (0, 0))), DTYPES[what.number])


def module(what: Product, roles: dict[str, Type], finish: Finish, halves: bool = False, shape: Shape | None = None
           ) -> Module:
    """B is in "weights", as `packed` has it, or in "input1" as it is. With buffers of `WHOLE` numbers float32 says how
    they lie, and sums are int32."""
    batch, rows = (what.batch, what.rows) if what.batched else (1, what.batch * what.rows)
    constant, inner = "weights" in roles, fours(what.inner)
    counted(batch * rows * 4 * inner, batch * (what.inner + 3) * (what.columns + 3))
    t = Tile(rows, what.columns, batch, roles, shape)
    s, number = t.s, what.number
    matrix, high = t.buffers["weights" if constant else "input1"], 4 * inner if constant else what.inner

    def rows_of_b(k: Value) -> list[Value]:
        if what.transposed and not constant:  # a row of four columns is a column of four rows
            across = [s.builtin("UMin", t.column * 4 + i, s.constant(what.columns - 1)) for i in range(4)]
            lines = [load(s, number, matrix, (t.batch * what.columns + c) * inner + k) for c in across]
            return [s.vector(*(s.lane(line, i) for line in lines)) for i in range(4)]
        places = [k * 4 + i for i in range(4)]
        if high % 4:  # the last row again: it is multiplied by padding
            places = [s.builtin("UMin", p, s.constant(high - 1)) for p in places]
        return [load(s, number, matrix, (t.batch * high + p) * t.width + t.column) for p in places]

    with s.when(t.there):
        sums = t.sums(number, s.constant(0, "int", 4) if roles["input"] == WHOLE else None)
        starts = [(t.batch * rows + row) * inner for row in t.mine()]
        with s.loop(inner) as k:
            xs = [load(s, number, t.buffers["input"], start + k) for start in starts]
            add(t, sums, xs, rows_of_b(k), halves)
        t.stored(number, [x.get() for x in sums], finish)
    return t.module(what.operations, inner)


def add(t: Tile, sums: Sequence[Variable], xs: Sequence[Value], rows: Sequence[Value], halves: bool = False) -> None:
    """To each of `sums` its four numbers of `xs` times the four rows. halves: the four are added up as halves."""
    s = t.s
    if halves:
        xs, rows = ([s.convert(v, "half") for v in values] for values in (xs, rows))
    for x, total in zip(xs, sums, strict=True):
        value = s.spread(s.lane(x, 0), 4) * rows[0] if halves else multiply_add(s, s.spread(s.lane(x, 0), 4), rows[0],
                                                                               total.get())
        for i in range(1, 4):
            value = multiply_add(s, s.spread(s.lane(x, i), 4), rows[i], value)
        total.set(total.get() + s.convert(value, "float") if halves else value)
