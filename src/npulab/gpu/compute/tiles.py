"""How products and convolutions can be cut into work items, and a model that says which cut to try first.

The model counts cycles of one core (on a GPU: of one work item's lane) for each step of the inner loop: multiply-adds
that padding adds included, loads, what registers do not hold, the panel of columns from the cache that it fits, and
cores without work at the end. It orders; it does not predict times.
"""

from __future__ import annotations

import math
from itertools import product

import msgspec

from npulab.gpu.compute.problems import Convolution, Product
from npulab.gpu.compute.types import Traits
from npulab.gpu.compute.vectors import FOUR, checked_halves


class Tile(msgspec.Struct, frozen=True):
    """What a work item computes, and how many go together.

    rows, vectors, width   of the output in registers: rows x vectors of `width` float32.
    unroll                 steps of the inner loop written out.
    group                  work items across columns and down rows. (1, 1): rows next to each other follow in time.
    depth                  steps of rows and columns that a group copies to local memory; 0: none.
    passes                 tiles of rows that a work item goes through for each stretch of the inner loop: all but the
                           first read its columns from the first cache. Only where `group` is (1, 1), without depth.
    halves                 of float16, four products at a time are added up as halves, before they are added as floats;
                           so many steps are written out.
    """

    rows: int = 4
    vectors: int = 1
    width: int = 4
    unroll: int = 1
    group: tuple[int, int] = (1, 1)
    depth: int = 0
    passes: int = 1
    halves: bool = False

    @property
    def steps(self) -> int:
        """Of the inner loop that are written out."""
        return FOUR if self.halves else self.unroll

    @property
    def columns(self) -> int:
        """Of a panel, which a group computes."""
        return self.vectors * self.width * self.group[0]

    @property
    def block(self) -> int:
        """Rows of a group."""
        return self.rows * self.group[1] * self.passes

    @property
    def stretch(self) -> int:
        """Steps of the inner loop whose columns take about half of a first cache (16 KiB)."""
        return max(32, 4096 // self.columns // 32 * 32)

    @property
    def local_bytes(self) -> int:
        each = 2 if self.halves else 4
        return each * self.depth * (self.columns + self.block) + 12 * self.block if self.depth else 0


class Matrix(msgspec.Struct, frozen=True, tag="matrix"):
    """A product; of convolutions those of one tap and stride. packed: columns copied to panels first."""

    tile: Tile
    packed: bool = True


class Direct(msgspec.Struct, frozen=True, tag="direct"):
    """A convolution as a product whose rows are read from the image (implicit GEMM)."""

    tile: Tile


class Winograd(msgspec.Struct, frozen=True, tag="winograd"):
    """F(size x size, 3 x 3)."""

    tile: Tile
    size: int = 2


Choice = Matrix | Direct | Winograd


def candidates(what: Convolution | Product, traits: Traits, halves: bool = False) -> list[Choice]:
    """The likely best first. Deterministic. Never empty. halves: with those that add up by fours as halves.

    Raises: UnsupportedError for halves unless float16, on a device that computes on them.
    """
    if halves:
        checked_halves(what.number, traits)
    ways: list[tuple[float, Choice]] = []
    if isinstance(what, Product):
        rows, batch = (what.rows, what.batch) if what.batched else (what.rows * what.batch, 1)
        tiles = _tiles(traits, rows, 4 * what.inner * what.columns, halves)
        ways = [(_cycles(traits, t, rows, what.inner, what.columns, batch), Matrix(t)) for t in tiles]
    else:
        rows = what.batch * math.prod(what.out)
        inner = what.channels // what.groups * math.prod(what.kernel)
        filters = what.filters // what.groups
        pointwise = is_pointwise(what)
        for t in _tiles(traits, rows, 4 * inner * filters, halves):
            cycles = _cycles(traits, t, rows, inner, filters, what.groups)
            if is_narrow(what) and traits.cpu:  # a work item has a row of tiles, none beyond it
                cycles -= _START * math.ceil(-(-rows // t.rows) * -(-filters // t.columns) / traits.compute_units)
                if what.out[1] % t.rows:
                    cycles *= _GUARDED * -(-what.out[1] // t.rows) * t.rows / what.out[1]
            ways.append((cycles, Matrix(t) if pointwise else Direct(t)))
        if suits_winograd(what):
            for size in SIZES:
                points = (size + 2) ** 2
                found = _tiles(traits, _patches(what, size), 4 * points * inner // 9 * filters)
                ways += [(_winograd(what, traits, t, size), Winograd(t, size)) for t in found]
    return [w for _, w in sorted(ways, key=lambda w: w[0])]


def first(what: Convolution | Product, traits: Traits, halves: bool = False) -> Choice:
    """The likely best; of those on halves, if these are asked for."""
    return next(c for c in candidates(what, traits, halves) if c.tile.halves == halves)


SIZES = (2, 4)
"""Of outputs of a Winograd tile, each way."""


def is_pointwise(what: Convolution) -> bool:
    """Whether its rows are a matrix's."""
    return (what.kernel, what.strides, what.groups) == ((1, 1), (1, 1), 1) and not any(what.pads)


def is_narrow(what: Convolution) -> bool:
    """Whether taps of a row lie side by side and are worth an inner loop through them."""
    return what.channels < NARROW and what.groups == 1 and what.dilations[1] == 1 < what.kernel[1]


def suits_winograd(what: Convolution) -> bool:
    return (what.kernel, what.strides, what.dilations, what.groups) == ((3, 3), (1, 1), (1, 1), 1)


def _tiles(traits: Traits, rows: int = 0, columns_bytes: int = 0, halves: bool = False) -> list[Tile]:
    """With `rows` that few passes take, and columns that a core's caches do not hold, those with passes too. halves:
    each on halves, too."""
    if halves:
        floats = _tiles(traits, rows, columns_bytes)
        own = dict.fromkeys(msgspec.structs.replace(t, unroll=FOUR, halves=True) for t in floats)
        return [*floats, *own]
    if traits.cpu:
        widths = [w for w in (4, 8, 16) if traits.vector // 2 <= w <= max(4, traits.vector)]
        shapes = [(r, v) for r, v in product((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14), (1, 2, 3, 4))
                  if (r + 1) * v + 1 <= max(8, traits.registers // traits.vector)]  # one too many costs a factor
        found = [Tile(r, v, w, u) for (r, v), w, u in product(shapes, widths, (2, 4))]
        if columns_bytes > max(traits.caches[:2], default=0):
            found += [msgspec.structs.replace(t, passes=-(-rows // t.rows)) for t in found
                      if 1 < -(-rows // t.rows) <= _PASSES]
        return found
    found = []
    for r, v, (across, down) in product((2, 4, 8), (1, 2), ((8, 8), (16, 8), (16, 16), (8, 4), (16, 4), (32, 8))):
        if across * down > traits.group_max or across * down % min(traits.warp, across * down):
            continue
        for depth in (0, 8, 16):
            t = Tile(r, v, 4, 1 if depth else 4, (across, down), depth)
            if t.local_bytes <= traits.local_bytes or not depth:
                found.append(t)
    return found or [Tile(4, 1, 4)]


def _cycles(traits: Traits, t: Tile, rows: int, inner: int, columns: int, batch: int = 1) -> float:
    """Of `batch` products, from the first work item's start to the last one's end."""
    groups = -(-rows // t.block) * -(-columns // t.columns) * batch
    if traits.cpu:  # on halves no less: vectors have as many lanes, and sums are converted
        lanes = max(1, traits.vector)
        parts = t.vectors * max(1, t.width // lanes)
        fed = 4.0 * t.columns * inner
        panel = 4.0 * t.columns / next((rate for rate, size in zip((64, 32, 12), traits.caches[:3], strict=False)
                                        if fed <= 0.8 * size), 6.0)
        loads = t.rows + parts
        kept = 0.0
        if t.passes > 1:  # columns from the first cache, sums to it and back for each stretch
            panel, kept = 4.0 * t.columns / 64, 4.0 * t.rows * parts / t.stretch
        issue = max(t.rows * parts / 2, loads / 2, _LATENCY, panel)
        cycles = issue + 0.15 * loads + 0.2 * (t.unroll - 2) + kept
        once = 4.0 * batch * inner * columns / _streamed(traits)  # columns come from memory, whoever needs them
        if t.passes > 1:
            tiles = -(-rows // t.rows)  # not the last pass's rows that are none
            return (math.ceil(groups / traits.compute_units) * t.passes * (inner * cycles + 6 * t.rows * parts)
                    * tiles / (-(-tiles // t.passes) * t.passes) + _WAITED * once)
        return math.ceil(groups / traits.compute_units) * (inner * cycles + _START + 6 * t.rows * parts) + once
    items = t.group[0] * t.group[1]
    accumulators = t.rows * t.vectors * t.width
    operands = t.vectors * t.width + t.rows  # of a step; on halves those of four, in half the registers
    used = accumulators + operands * (FOUR // 2 if t.halves else 1) + 16
    occupancy = min(1.0, 2 * traits.registers / used)  # half full is enough to hide latencies
    read = (t.rows + t.vectors * t.width) * (1.0 if t.depth else 2.5)
    step = (accumulators * (_HALVES if t.halves else 1.0) + read) / max(0.25, occupancy) + (
        8.0 / t.depth if t.depth else 0.0)
    if t.depth:
        step += (t.block + t.columns) / items * 3
    turns = math.ceil(groups / (2 * traits.compute_units)) * 2
    return turns * (inner * step + 4 * accumulators) * max(traits.warp, items) / 64


def _patches(what: Convolution, size: int) -> int:
    height, width = what.out
    return what.batch * -(-height // size) * -(-width // size)


def _winograd(what: Convolution, traits: Traits, t: Tile, size: int) -> float:
    points, patches = (size + 2) ** 2, _patches(what, size)
    core = _cycles(traits, t, patches, what.channels, what.filters, points)
    moved = 8.0 * points * patches * (what.channels + what.filters)  # patches and products, written and read
    return core + moved / (_MOVED if traits.cpu else 16.0) / traits.compute_units + 2 * _LAUNCH


NARROW = 16
"""Channels below which the inner loop goes through the taps of a row, too: they lie side by side in an image with zeros
around it."""
_START = 40.0
"""Cycles of a work item's beginning."""
_GUARDED = 1.05
"""Stores that are tested, of a first layer: measured, 224 x 224 x 3 with 6 rows beside 4."""
_PASSES = 10
"""More are tiles enough to share what columns cost."""
_WAITED = 0.6
"""Of the time that columns take from memory, where they are fetched ahead: measured as `_STREAMED`."""
_LATENCY = 4.0
"""Cycles of a multiply-add: Cortex-A76 to Ice Lake (their vendors' optimization guides)."""
_LAUNCH = 50_000.0
"""Cycles of one more launch: assumed, about 20 us."""
_MOVED = 5.0
"""Bytes a cycle of a core that Winograd's transformations move: measured on two cores of an Ice Lake server with PoCL,
56 x 56 x 64."""
_STREAMED = 8.0
"""Bytes a cycle that columns come at from memory, all cores together: measured there, 512 x 512 filters of 3 x 3."""
_HALVES = 0.75
"""Of a float multiply-add, one of halves on a GPU: half, and an addition of floats for each four, whose operand is
converted on the way: assumed, no such device was measured."""


def _streamed(traits: Traits) -> float:
    """From a probe's bandwidth and clock (two multiply-adds of the widest vector a cycle) where there is one."""
    if traits.operations and traits.bandwidth:
        return traits.bandwidth / (traits.operations / (4 * traits.vector * traits.compute_units))
    return _STREAMED
