"""Fused attention as SPIR-V, for Vulkan: a work group does a tile of queries, and scores never reach memory.

Keys and values come through local memory, a tile at a time; a thread has `rows` queries and every LANES-th vector of
four of their outputs, in registers. Of each query the largest score and the sum of exponentials so far are kept, and
what was added up is scaled when the largest grows.

Source: Dao et al., FlashAttention (2022), algorithm 1; Milakov and Gimelshein (2018) for the running softmax.
"""

from __future__ import annotations

from collections.abc import Callable

from npulab.errors import CapacityError
from npulab.gpu.compute.attention import operations
from npulab.gpu.compute.modules import Layer, Module
from npulab.gpu.compute.modules_numbers import FOUR, STORED, counted, floats, fours, load, multiply_add, store
from npulab.gpu.compute.problems import Attention
from npulab.gpu.spirv_builder import Kind, Shader, Type, Value, Variable

LANES, ROWS = 4, 16
"""Threads of a group: LANES share a query, ROWS times `rows` queries are a tile."""
THREADS = LANES * ROWS
TILES = ((2, 16), (1, 16), (1, 8), (1, 4))
"""(queries of a thread, keys of a tile), best first: fewer need less local memory."""
LOCAL = 1 << 14
"""Bytes of local memory that each Vulkan device has (Vulkan 1.3, maxComputeSharedMemorySize)."""
LOW = -1e30
"""Below all scores: nothing was seen."""


def attention(what: Attention, local_bytes: int = LOCAL) -> Layer:
    """output = softmax(input input1^T * scale) input2; causal: query q sees keys 0 to q. Numbers are finite, scores
    above -1e30. float32 is computed.

    Shapes:  as of `Attention`. `local_bytes` is what a work group may take of local memory.
    Raises:  UnsupportedError for int8, and where 32 bits do not count all elements; CapacityError where no tile fits
             local memory.
    """
    floats(what.number, "attention")
    return layer(what, local_bytes, lambda rows, keys: Flash(what, rows, keys).module())


def layer(what: Attention, local_bytes: int, made: Callable[[int, int], Module]) -> Layer:
    """With the best tile, (rows, keys), that has room. Raises: CapacityError if none has; UnsupportedError where 32
    bits do not count all elements."""
    counted(what.batch, what.queries, what.keys, what.depth, what.width,
            what.batch * max(what.queries, what.keys) * (max(what.depth, what.width) + 3))
    for rows, keys in TILES:
        if _local(what, rows, keys) <= local_bytes:
            q, k, v = ((what.batch, *x) for x in ((what.queries, what.depth), (what.keys, what.depth),
                                                  (what.keys, what.width)))
            shapes = {"input": q, "input1": k, "input2": v, "output": (what.batch, what.queries, what.width)}
            return Layer((made(rows, keys),), shapes, what.number)
    raise CapacityError("no tile of attention fits local memory", got=f"{local_bytes} bytes",
                        want=f"{_local(what, *TILES[-1])} for vectors of {what.depth} and {what.width}")


def _local(what: Attention, rows: int, keys: int) -> int:
    """Bytes: queries; keys, then values in their place; exponentials; the largest score of each thread."""
    depth, width = fours(what.depth) + 1, fours(what.width)
    return 16 * (ROWS * rows * depth + keys * max(depth, width)) + 4 * (ROWS * rows * (keys + LANES))


class Flash:
    """The shader while it is written. Rows in local memory have one vector more than is used: no two lanes' keys are
    in the same bank.

    four    scores are summed in.      low  is below all scores.      larger  the larger one of two scores.
    """

    four: Type = FOUR
    low: float = LOW
    larger = "FMax"

    def __init__(self, what: Attention, rows: int, keys: int) -> None:
        self.what, self.rows, self.keys = what, rows, keys
        self.depth, self.width = fours(what.depth), fours(what.width)
        s = self.s = Shader((LANES, ROWS), [STORED[what.number]] * 4, ())
        self.stride, self.tall = self.depth + 1, ROWS * rows
        self.queries = s.shared(self.four, self.tall * self.stride)
        self.tile = s.shared(self.four, keys * max(self.stride, self.width))
        self.shares = s.shared(self.kind, self.tall * keys)
        self.tops = s.shared(self.kind, self.tall * LANES)
        self.first = s.group_id * self.tall
        self.places = [s.local_y + ROWS * r for r in range(rows)]  # of a thread's queries in the tile
        self.lane = s.local_id
        self.linear = s.local_y * LANES + s.local_id

    @property
    def kind(self) -> Kind:
        return self.four.kind

    def module(self) -> Module:
        s, what, rows, keys = self.s, self.what, self.rows, self.keys
        self._bring(0, what.queries, what.depth, self.first, self.tall, self.queries, self.stride)
        most = [s.variable(s.constant(LOW, "float")) for _ in range(rows)]
        sums = [s.variable(s.constant(0.0, "float")) for _ in range(rows)]
        out = [[s.variable(s.constant(0.0, "float", 4)) for _ in range(-(-self.width // LANES))] for _ in range(rows)]
        with s.loop(self._end(), keys) as start:
            self._bring(1, what.keys, what.depth, start, keys, self.tile, self.stride)
            s.barrier()
            scores = self._scores(start)
            tops = self._tops(most, scores)
            self._bring(2, what.keys, what.width, start, keys, self.tile, self.width)
            self._shares(start, scores, tops)
            for r, top in enumerate(tops):
                fade = s.builtin("Exp", most[r].get() - top)
                most[r].set(top)
                for x in (sums[r], *out[r]):
                    x.set(x.get() * s.like(fade, x.get()))
            s.barrier()
            self._add(sums, out)
            s.barrier()
        self._finish(sums, out)
        return self._module()

    def _module(self) -> Module:
        """Of what was written."""
        s, what, rows, keys = self.s, self.what, self.rows, self.keys
        tiles = -(-what.keys // keys)
        loads = -(-self.tall * self.depth // THREADS) + tiles * sum(-(-keys * n // THREADS)
                                                                    for n in (self.depth, self.width))
        groups = -(-what.queries // self.tall), what.batch
        return Module(s.assemble(), groups, ("input", "input1", "input2", "output"), operations(what),
                      loads + tiles * (1 + self.depth + keys // 4), _local(what, rows, keys))

    def _end(self) -> Value:
        """How many keys the group's queries see."""
        end = self.s.constant(self.what.keys)
        return self.s.builtin("UMin", end, self.first + self.tall) if self.what.causal else end

    def _bring(self, buffer: int, count: int, columns: int, start: Value, high: int, to: int, stride: int,
               change: Callable[[Value], Value] = lambda four: four) -> None:
        """Rows from `start` on to local memory, computed on; what is beyond the matrix is read as the last row."""
        s, wide = self.s, fours(columns)
        with s.loop(high * wide, THREADS, self.linear) as i:
            row, column = i // wide, i % wide
            from_ = s.group_y * count + s.builtin("UMin", start + row, s.constant(count - 1))
            s.shared_store(to, row * stride + column, change(load(s, self.what.number, buffer, from_ * wide + column)))

    def _mine(self) -> list[Value]:
        """Places of a thread's keys in the tile."""
        return [self.lane + LANES * k for k in range(self.keys // LANES)]

    def _scores(self, start: Value) -> list[list[Value]]:
        """Of a thread's queries with its keys; LOW where a query does not see the key."""
        s = self.s
        found = [[s.variable(s.constant(0, self.kind, 4)) for _ in self._mine()] for _ in self.places]
        with s.loop(self.depth) as d:
            keys = [s.shared_load(self.tile, k * self.stride + d) for k in self._mine()]
            for place, row in zip(self.places, found, strict=True):
                query = s.shared_load(self.queries, place * self.stride + d)
                for x, key in zip(row, keys, strict=True):
                    x.set(multiply_add(s, query, key, x.get()))
        return [[s.select(self._seen(start + k, place), self._score(x.get()), s.constant(self.low, self.kind))
                 for x, k in zip(row, self._mine(), strict=True)]
                for place, row in zip(self.places, found, strict=True)]

    def _score(self, four: Value) -> Value:
        return self.s.sum(four) * self.what.scale

    def _seen(self, key: Value, place: Value) -> Value:
        there = key < self.what.keys
        return self.s.both(there, key < self.first + place + 1) if self.what.causal else there

    def _tops(self, most: list[Variable], scores: list[list[Value]]) -> list[Value]:
        """The largest score so far of each of a thread's queries, of all its lanes. When it is known, the group is
        through with the tile of keys."""
        s = self.s
        for place, row in zip(self.places, scores, strict=True):
            top = row[0]
            for x in row[1:]:
                top = s.builtin(self.larger, top, x)
            s.shared_store(self.tops, place * LANES + self.lane, top)
        s.barrier()
        found = []
        for place, before in zip(self.places, most, strict=True):
            top = before.get()
            for n in range(LANES):
                top = s.builtin(self.larger, top, s.shared_load(self.tops, place * LANES + n))
            found.append(top)
        return found

    def _shares(self, start: Value, scores: list[list[Value]], tops: list[Value]) -> None:
        """Exponentials to local memory: 0 of what is not seen, even where nothing was."""
        s = self.s
        for place, row, top in zip(self.places, scores, tops, strict=True):
            for k, score in zip(self._mine(), row, strict=True):
                share = s.select(self._seen(start + k, place), s.builtin("Exp", score - top), s.constant(0.0, "float"))
                s.shared_store(self.shares, place * self.keys + k, share)

    def _columns(self) -> list[Value]:
        """A thread's vectors of the output; the last one again where there is none."""
        return [self.s.builtin("UMin", self.lane + LANES * n, self.s.constant(self.width - 1))
                for n in range(-(-self.width // LANES))]

    def _add(self, sums: list[Variable], out: list[list[Variable]]) -> None:
        s, columns = self.s, self._columns()
        with s.loop(self.keys, 4) as first:
            for k in (first + n for n in range(4)):
                values = [s.shared_load(self.tile, k * self.width + c) for c in columns]
                for place, total, row in zip(self.places, sums, out, strict=True):
                    share = s.shared_load(self.shares, place * self.keys + k)
                    total.set(total.get() + share)
                    for x, value in zip(row, values, strict=True):
                        x.set(multiply_add(s, s.spread(share, 4), value, x.get()))

    def _finish(self, sums: list[Variable], out: list[list[Variable]]) -> None:
        s, what = self.s, self.what
        for place, total, row in zip(self.places, sums, out, strict=True):
            query = self.first + place
            at = s.group_y * what.queries + query
            whole = total.get()
            for n, x in enumerate(row):
                column, value = self.lane + LANES * n, x.get() / s.spread(whole, 4)
                with s.when(s.both(query < what.queries, column < self.width)):
                    store(s, what.number, 3, at * self.width + column, value)  # of padding: 0, as V's is
