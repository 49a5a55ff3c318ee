"""What products and convolutions share as shaders: a thread has a few rows (matrix rows, or pixels one after the other)
of four columns (filters), in registers, until they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from npulab.gpu.compute.modules import Module
from npulab.gpu.compute.modules_endings import end
from npulab.gpu.compute.modules_numbers import FOUR, STORED, computed, counted, fours, kept, load, store
from npulab.gpu.compute.modules_shapes import Shape
from npulab.gpu.compute.problems import Convolution, Product
from npulab.gpu.compute.types import Number
from npulab.gpu.spirv_builder import Shader, Type, Value, Variable

Finish = Callable[[Shader, Mapping[str, int], Value, Value, Value], Value]
"""(shader, buffers by roles, four sums, column, place in the output): what is stored there. Columns and places count
fours."""


class Tile:
    """The shader of a thread while it is written.

    buffers   role -> number.    batch, first  of the thread's tile: which matrix, and its first row there.
    column    counts fours, of `width`.              tall          rows of a tile.
    """

    def __init__(self, rows: int, columns: int, batch: int, roles: Mapping[str, Type],
                 shape: Shape | None = None) -> None:
        counted(rows, columns, batch, batch * rows * (columns + 3))
        self.roles, self.rows, self.columns, self.batches = roles, rows, columns, batch
        self.shape = shape or Shape()
        self.s = Shader(self.shape.group, list(roles.values()), ())
        self.buffers = {role: i for i, role in enumerate(roles)}
        self.tall = self.shape.tall(rows)
        self.width, self.down = fours(columns), -(-rows // self.tall)
        self.column, tile = self.s.global_id, self.s.global_y
        self.there = self.s.both(self.column < self.width, tile < self.down * batch)
        self.batch, self.first = tile // self.down, tile % self.down * self.tall

    def mine(self) -> list[Value]:
        """The thread's rows; the last one again where there is none."""
        return [self.s.builtin("UMin", self.first + i, self.s.constant(self.rows - 1)) for i in range(self.tall)]

    def sums(self, number: Number, begin: Value | None = None) -> list[Variable]:
        """Of each row four, that begin there, or at 0."""
        begin = begin or self.s.constant(0, computed(number), 4)
        return [self.s.variable(begin) for _ in range(self.tall)]

    def stored(self, number: Number, sums: Sequence[Value], finish: Finish) -> None:
        s = self.s
        for i, value in enumerate(sums):
            with s.when(self.first + i < self.rows):
                at = (self.batch * self.rows + self.first + i) * self.width + self.column
                value = finish(s, self.buffers, value, self.column, at)
                store(s, number, self.buffers["output"], at, kept(s, value, self.column, self.columns))

    def module(self, operations: float, turns: int) -> Module:
        across, down = self.shape.group
        groups = -(-self.width // across), -(-self.down * self.batches // down)
        return Module(self.s.assemble(), groups, tuple(self.roles), operations, turns, halves=self.s.has_halves,
                      threads=self.shape.threads)


def ending(what: Product | Convolution, residual: str = "input1", scale: float = 1.0) -> Finish:
    """activation(scale sums + bias + residual), with the bias if "bias" is among the buffers."""
    def finish(s: Shader, buffers: Mapping[str, int], value: Value, column: Value, at: Value) -> Value:
        if scale != 1:
            value = value * scale
        if "bias" in buffers:
            value = value + s.load(buffers["bias"], column)
        if what.residual:
            value = value + load(s, what.number, buffers[residual], at)
        return end(s, value, what.activation, what.slope)

    return finish


def shapes_of(what: Convolution) -> dict[str, tuple[int, ...]]:
    """Of the tensors, by roles."""
    out: tuple[int, ...] = (what.batch, *what.out, what.filters)
    return {"input": (what.batch, what.height, what.width, what.channels), "output": out} | (
        {"input1": out} if what.residual else {})


def roles_of(what: Product | Convolution, given: Mapping[str, Type], bias: bool, residual: str = "input1"
             ) -> dict[str, Type]:
    """`given`, and what an ending reads and writes."""
    more = {"bias": FOUR} if bias else {}
    if what.residual:
        more[residual] = STORED[what.number]
    return {**given, **more, "output": STORED[what.number]}
