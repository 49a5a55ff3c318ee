"""How products and convolutions as SPIR-V are cut into threads, and a model that says which way to try first.

The model counts, for each step of the inner loop, a thread's multiply-adds, what it loads, cache lines that threads in
step read at once, and registers that it has not; of all, rows and columns that are none, and cores without work at the
end. It orders; it does not predict times. What a device does not say is assumed: `modules_traits`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from npulab.errors import InvariantError
from npulab.gpu.compute import tiles
from npulab.gpu.compute.modules_numbers import fours
from npulab.gpu.compute.problems import Convolution, Product
from npulab.gpu.compute.types import Traits
from npulab.gpu.vulkan import GROUPS_MAX

ROWS = (1, 2, 4, 8)
GROUPS = ((8, 8), (16, 4), (32, 2), (64, 1), (4, 16), (16, 16))
"""Of equal ones the first is the first candidate."""


class Shape(msgspec.Struct, frozen=True, tag="shape"):
    """rows   of a thread, at most: matrix rows, or pixels one after the other, of four columns (filters) each.
    group  threads: columns (in fours), rows (in tiles).

    Raises: InvariantError unless rows are among `ROWS` and there are threads.
    """

    rows: int = 4
    group: tuple[int, int] = (8, 8)

    def __post_init__(self) -> None:
        if self.rows not in ROWS or min(self.group) < 1:
            raise InvariantError("there is no such shape of threads", want=f"rows of {ROWS} and groups of 1 or more",
                                 got=f"{self.rows} rows, groups of {self.group}")

    @property
    def threads(self) -> int:
        return self.group[0] * self.group[1]

    def tall(self, rows: int) -> int:
        """Rows of a thread where there are so many."""
        return next(n for n in ROWS if n >= min(rows, self.rows))


class Fewer(msgspec.Struct, frozen=True, tag="fewer"):
    """Winograd's convolution: its products' threads, and outputs of a patch each way."""

    shape: Shape
    size: int


Choice = Shape | Fewer


@dataclass(frozen=True, slots=True)
class Work:
    """rows, columns, batch  of a product; a convolution's pixels and filters.      steps  of the inner loop.
    deep  numbers that a step takes of each row, and rows of weights: four; 1 where filters read channels of their own.
    """

    rows: int
    columns: int
    batch: int
    steps: int
    deep: int = 4


def first(what: Convolution | Product, traits: Traits | None = None) -> Choice:
    """The likely best; `Shape()` where no device is known."""
    return candidates(what, traits)[0] if traits else Shape()


def candidates(what: Convolution | Product, traits: Traits) -> list[Choice]:
    """The likely best first. Deterministic. Never empty."""
    work = work_of(what)
    ways: list[tuple[float, Choice]] = [(_cycles(work, traits, s), s) for s in _shapes(work, traits)]
    if isinstance(what, Convolution) and what.number != "int8" and tiles.suits_winograd(what):
        for size in tiles.SIZES:
            points, grid = (size + 2) ** 2, (-(-what.out[0] // size), -(-what.out[1] // size))
            patches = what.batch * grid[0] * grid[1]
            middle = Work(patches, what.filters, points, fours(what.channels))
            moved = 8.0 * points * patches * (what.channels + what.filters)  # patches, products; written and read
            ways += [(_cycles(middle, traits, s) + _MOVED * moved / traits.compute_units, Fewer(s, size))
                     for s in _shapes(middle, traits)]
    return [choice for _, choice in sorted(ways, key=lambda way: way[0])]


def work_of(what: Convolution | Product) -> Work:
    if isinstance(what, Product):
        batch, rows = (what.batch, what.rows) if what.batched else (1, what.batch * what.rows)
        return Work(rows, what.columns, batch, fours(what.inner))
    inner, filters = what.channels // what.groups, what.filters // what.groups
    alone = what.groups == what.channels == what.filters or (what.groups > 1 and (inner % 4 > 0 or filters % 4 > 0))
    return Work(what.batch * math.prod(what.out), what.filters, 1,
                math.prod(what.kernel) * (inner if alone else fours(inner)), 1 if alone else 4)


def _shapes(work: Work, traits: Traits) -> list[Shape]:
    """Those that differ, and that the device starts."""
    rows = sorted({Shape(n).tall(work.rows) for n in ROWS}, key=lambda n: (n != Shape().rows, n))
    found = [Shape(n, group) for n in rows for group in GROUPS]
    found = [s for s in found if s.threads <= traits.group_max
             and -(-(-(-work.rows // s.rows) * work.batch) // s.group[1]) <= GROUPS_MAX]
    return found or [Shape(rows[0], (1, min(8, traits.group_max)))]


def _cycles(work: Work, traits: Traits, shape: Shape) -> float:
    """Of the core that has most to do."""
    across, down = fours(work.columns), -(-work.rows // shape.rows) * work.batch
    wide = min(shape.group[0], traits.warp)
    high = max(1, traits.warp // wide)  # threads in step, each way
    threads = -(-across // wide) * -(-down // high) * wide * high
    groups = -(-across // shape.group[0]) * -(-down // shape.group[1])
    each = threads / groups * math.ceil(groups / traits.compute_units)
    return work.steps * _step(work, traits, shape) * max(each, 1 if traits.cpu else _LANES)


def _step(work: Work, traits: Traits, shape: Shape) -> float:
    rows, deep = shape.rows, work.deep
    reads = min(traits.warp, _READING)
    lines = rows * (reads // min(shape.group[0], reads) - 1)  # more than one for each load
    if deep > 1 and rows * shape.group[1] * 64 > min(traits.caches, default=0) / _WAYS:
        lines += rows  # gone until the next step reads on in them
    cycles = 4 * deep * rows + _LOADED * 4 * (rows + deep) + _LINE * lines
    if traits.cpu:
        return cycles + _SPILLED * max(0, 4 * rows - traits.registers)
    used = 4 * rows + 4 * (rows + deep) + 16  # sums, operands, places
    return cycles / max(0.25, min(1.0, 2 * traits.registers / used))  # half full is enough to hide latencies


_LOADED = 2.0
"""Multiply-adds that take as long as a number's load: measured on lavapipe (Mesa 22.3.6, two cores, 256 bits), products
of 256 with 1 to 8 rows."""
_READING = 8
"""Threads that a load of four numbers each is done for at once, 128 bytes: lavapipe's; of GPUs assumed."""
_LINE = 7.0
"""As `_LOADED`, of a cache line more that they read: measured there, groups of (8, 8) to (2, 32); of GPUs assumed."""
_SPILLED = 0.6
"""As `_LOADED`, of a sum that registers do not hold: measured there, 3 x 3 depthwise, 4 and 8 rows."""
_WAYS = 8
"""Part of the first cache that rows may take which lie a power of two apart: assumed, caches have 8 ways or more."""
_LANES = 128
"""Of a GPU's core, and threads below which some of them idle: assumed, desktop GPUs have 64 to 128."""
_MOVED = 1.0
"""Multiply-adds that take as long as a byte of Winograd's patches and products: measured on lavapipe, 56 x 56 x 64."""
