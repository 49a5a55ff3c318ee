"""int8 attention as SPIR-V, for Vulkan: what `integer_attention` does in OpenCL C, defined there, in the tiles of
`modules_attention`. Both products are of ints, four at a time; shares have 15 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from npulab.gpu.compute.integer_attention import Factors, checked
from npulab.gpu.compute.modules import Layer, Module
from npulab.gpu.compute.modules_attention import LANES, LOCAL, Flash, layer
from npulab.gpu.compute.modules_numbers import WHOLE, kept, store
from npulab.gpu.compute.problems import Attention
from npulab.gpu.spirv_builder import Value, Variable

STEPS = (1 << 15) - 1
"""Of a share: 1 is so many. Products of a tile's 16 keys with V less its zero point fit 32 bits."""
LEAST = -200.0
"""Of what exponentials are taken of: below it, and at it, they are 0."""


def attention(what: Attention, scales: Sequence[float], zeros: Sequence[int], scale_out: float, zero_out: int,
              local_bytes: int = LOCAL) -> Layer:
    """"input" Q, "input1" K, "input2" V -> "output", all int8. scales, zeros: of Q, K, V. `local_bytes` is what a work
    group may take of local memory. Raises: as `integer_attention.checked`; UnsupportedError where 32 bits do not count
    all elements; CapacityError where no tile fits local memory."""
    factors = checked(what, scales, zeros, scale_out, zero_out)
    return layer(what, local_bytes, lambda rows, keys: _Flash(what, rows, keys, factors).module())


class _Flash(Flash):
    four, larger = WHOLE, "SMax"

    def __init__(self, what: Attention, rows: int, keys: int, factors: Factors) -> None:
        self.factors, self.low = factors, factors.low
        super().__init__(what, rows, keys)

    def module(self) -> Module:
        s, what, rows, keys, (zero_q, _, zero_v) = self.s, self.what, self.rows, self.keys, self.factors.zeros
        sign, wide = self.factors.sign, range(-(-self.width // LANES))
        self._bring(0, what.queries, what.depth, self.first, self.tall, self.queries, self.stride,
                    lambda q: (q - zero_q) * sign)  # padding of K is 0
        none, empty = s.constant(0.0, "float"), s.constant(0.0, "float", 4)
        most = [s.variable(s.constant(self.low, "int")) for _ in range(rows)]
        sums = [s.variable(none) for _ in range(rows)]
        out = [[s.variable(empty) for _ in wide] for _ in range(rows)]
        # of a tile
        highest = [s.variable(s.constant(self.low, "int")) for _ in range(rows)]
        more = [s.variable(s.constant(0, "int")) for _ in range(rows)]
        added = [[s.variable(s.constant(0, "int", 4)) for _ in wide] for _ in range(rows)]
        with s.loop(self._end(), keys) as start:
            self._bring(1, what.keys, what.depth, start, keys, self.tile, self.stride)
            s.barrier()
            scores = self._scores(start)
            tops = self._tops(highest, scores)
            self._bring(2, what.keys, what.width, start, keys, self.tile, self.width, lambda v: v - zero_v)
            self._shares(start, scores, tops)
            s.barrier()
            for x in (*more, *(x for row in added for x in row)):
                x.set(s.constant(0, "int", x.type.lanes))
            self._add(more, added)
            for before, top, r in zip(most, tops, range(rows), strict=True):
                now = s.builtin("SMax", before.get(), top)
                fade, part = self._exponential(before.get() - now), self._exponential(top - now)
                before.set(now)
                for total, x in zip((sums[r], *out[r]), (more[r], *added[r]), strict=True):
                    faded = total.get() * s.like(fade, total.get())
                    total.set(s.fma(s.convert(x.get(), "float"), part, faded))
            s.barrier()
        self._finish(sums, out)
        return self._module()

    def _exponential(self, difference: Value) -> Value:
        """Of a difference of scores that is not above 0."""
        s = self.s
        x = s.convert(difference, "float") * self.factors.score
        return s.builtin("Exp", s.builtin("FMax", x, s.constant(LEAST, "float")))

    def _score(self, four: Value) -> Value:
        return self.s.sum(four)

    def _shares(self, start: Value, scores: list[list[Value]], tops: list[Value]) -> None:
        """Rounded, to local memory: 0 of what is not seen."""
        s = self.s
        for place, row, top in zip(self.places, scores, tops, strict=True):
            for k, score in zip(self._mine(), row, strict=True):
                share = s.convert(s.builtin("RoundEven", self._exponential(score - top) * STEPS), "int")
                share = s.select(self._seen(start + k, place), share, s.constant(0, "int"))
                s.shared_store(self.shares, place * self.keys + k, share)

    def _finish(self, sums: list[Variable], out: list[list[Variable]]) -> None:
        s, what, gain = self.s, self.what, self.factors.out
        for place, total, row in zip(self.places, sums, out, strict=True):
            query = self.first + place
            at = s.group_y * what.queries + query
            whole = total.get()
            for n, x in enumerate(row):
                column, mean = self.lane + LANES * n, x.get() / s.spread(whole, 4)
                y = s.fma(mean, s.constant(gain, "float", 4), s.constant(self.factors.zero_out, "float", 4))
                y = s.builtin("FMin", s.builtin("FMax", y, s.like(-128.0, y)), s.like(127.0, y))
                value = kept(s, s.convert(s.builtin("RoundEven", y), "int"), column, what.width)
                with s.when(s.both(query < what.queries, column < self.width)):
                    store(s, "int8", 3, at * self.width + column, value)
