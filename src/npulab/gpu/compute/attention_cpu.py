"""Attention on a CPU: a work item has a tile of queries, one in each lane, and goes through tiles of keys.

Maxima, sums and exponentials never go across lanes. Elements of K and V are broadcast; only Q is transposed on the way
in and the output on the way out. While a tile's scores are summed its values are fetched, and exponentials are taken of
some keys' scores as soon as they are known: multiply-adds for the next go on beside.

Scores are in units of log 2 (the factor is in Q with the scale) and less the query's `high`: the sums of a score begin
at -high. `high` is the largest score of the first tile. It is looked for anew, and what was summed is scaled down, only
where exponentials of a tile add up to more than MOST: any `high` gives the same result but for rounding while nothing
overflows, and maxima of all tiles are not needed (rescaling late: Zadouri et al., FlashAttention-4, arXiv 2603.05451).
"""

from __future__ import annotations

import msgspec

from npulab.errors import CapacityError
from npulab.gpu.compute import vectors
from npulab.gpu.compute.problems import Attention
from npulab.gpu.compute.types import Kernel, Traits

WIDE, NARROW = (4, 24), (2, 12)
"""Vectors of queries in a tile, and vectors that are summed at a time: of 32 registers, of 16."""
LINE = 64
"""Bytes that are fetched at once."""
ROOM = 2 / 3
"""Of the first cache, for the scores of a tile and a line of each of its values: each part of the output reads them."""
MOST = 4096.0
"""Of the sum of a tile's exponentials."""
STACK = 1 << 20
"""Bytes that a tile has on its thread's stack at most. Linux gives a thread 8 MiB unless told (`ulimit -s`)."""
STEP_MOST = 32
"""A group with nothing to do takes 4 ns, a tile of 64 queries by 197 keys 17 us."""


class Lanes(msgspec.Struct, frozen=True, tag="lanes"):
    """Vectors of queries of a work item, keys of a tile; 0: as many as the caches are for."""

    vectors: int
    keys: int = 0


def candidates(what: Attention, traits: Traits) -> list[Lanes]:
    """What is taken unasked comes first, then by loads for each multiply-add and tiles of the core that has most; then
    other tiles of keys. Whether a stack has room for them is not looked at."""
    wide, sums = WIDE if traits.registers >= 32 * traits.vector else NARROW
    most = -(-what.queries // vectors.fitting(traits, what.queries))

    def cycles(many: int) -> float:
        turns = -(-what.batch * -(-most // many) // traits.compute_units)
        return turns * many * (1 + 1 / many + 1 / (sums // many))

    usual = min(wide, most)
    order = sorted(range(1, min(_VECTORS, most) + 1), key=lambda n: (n != usual, cycles(n)))
    return [Lanes(n, keys) for keys in (0, *(k for k in _KEYS if k < what.keys)) for n in order]


_VECTORS, _KEYS = 6, (32, 64, 128, 192)
"""That are tried: vectors up to so many."""


def kernel(what: Attention, traits: Traits, choice: Lanes | None
           ) -> tuple[Kernel, tuple[int, ...], tuple[int, ...]]:
    """(kernel, global size, local size). Raises: CapacityError for heads that a thread's stack has no room for."""
    w = vectors.fitting(traits, what.queries)
    wide, sums = WIDE if traits.registers >= 32 * traits.vector else NARROW
    many = min(choice.vectors if choice else wide, -(-what.queries // w))
    tiles, rest = divmod(what.queries, many * w)
    last = -(-rest // w)  # vectors of the last tile: fewer, if that is enough
    if last == many:
        tiles, last = tiles + 1, 0
    kinds = [_Tile(what, w, n, sums, traits, choice.keys if choice else 0) for n in sorted({many, last or many})]
    if (need := kinds[-1].stack_bytes) > STACK:
        raise CapacityError("attention has no room on a thread's stack", got=f"{need} bytes for heads of {what.depth} "
                            f"and {what.width}", want=f"at most {STACK}")
    text = vectors.FETCH + vectors.preamble(what.number, w) + vectors.exponential2(w) + vectors.transposition(w)
    text += "".join(kind.text() for kind in kinds)
    end = f"else tile_{last}(q, k, v, o, {tiles * many * w}, queries, keys, scale);" if last else ""
    groups = tiles + bool(last)
    step = step_of(groups * what.batch, traits.compute_units)
    source = text + f"""
__kernel {vectors.attribute((1, 1))} void attention(__global const T *q, __global const T *k, __global const T *v,
                                                    __global T *o, int queries, int keys, float scale) {{
    size_t b = get_global_id(1);
    int tile = get_global_id(0) / {step};
    if (get_global_id(0) % {step}) return;
    q += b * queries * {what.depth}; k += b * keys * {what.depth};
    v += b * keys * {what.width}; o += b * queries * {what.width};
    if (tile < {tiles}) tile_{many}(q, k, v, o, tile * {many * w}, queries, keys, scale);
    {end}
}}
"""
    return Kernel(source, "attention"), (groups * step, what.batch), (1, 1)


def step_of(tiles: int, units: int) -> int:
    """Groups for each tile, all but the first with nothing to do: so a core gets fewer tiles at once, and one that
    other guests slow down keeps none waiting at the end. PoCL deals out 32 groups a core and core while at most 256 a
    core and core are left (pthread_scheduler.c of 1.x to 3.1), or a core's share if that is less."""
    return max(1, min(STEP_MOST, 256 * units**2 // tiles))


class _Tile:
    """`many` vectors of queries against all keys.

    rows    keys whose scores are summed at a time.          keys    of a tile.
    parts   of the output's columns, that are summed at a time: the first column, parts, columns of each. As equal as
            can be, at most `rows`.
    """

    def __init__(self, what: Attention, w: int, many: int, sums: int, traits: Traits, keys: int) -> None:
        self.what, self.w, self.many, self.half = what, w, many, what.number == "float16"
        self.rows = max(1, min(sums // many, what.keys))
        count = -(-what.width // self.rows)
        less, more = divmod(what.width, count)
        sizes = [(0, more, less + 1), (more * (less + 1), count - more, less)]
        self.parts = [x for x in sizes if x[1]]
        if not keys:
            first = traits.caches[0] if traits.caches else 32 << 10
            keys = int(ROOM * first) // (4 * many * w + LINE) // self.rows * self.rows
        self.keys = max(self.rows, vectors.up(min(keys, what.keys), self.rows))

    @property
    def stack_bytes(self) -> int:
        """Of the arrays that `text` declares."""
        what, many, more = self.what, self.many, self.keys + self.rows
        floats = more * what.depth + self.keys * what.width if self.half else 0
        return 4 * (self.w * many * (what.depth + what.width + more) + floats)

    def text(self) -> str:
        what, many, rows, keys = self.what, self.many, self.rows, self.keys
        depth, width, ns = what.depth, what.width, range(many)
        seen = " ".join(f"I seen{n} = {vectors.lanes(self.w)} + first + {n * self.w};" for n in ns)
        return f"""
void tile_{many}(__global const T *q, __global const T *k, __global const T *v, __global T *o, int first, int queries,
            int keys, float scale) {{
    V qt[{depth * many}], ot[{width * many}], room[{(keys + rows) * many}], *p = room + {rows * many};
    {f"float kr[{(keys + rows) * depth}], *kf = kr + {rows * depth}, vf[{keys * width}];" if self.half else ""}
    {" ".join(f"V high{n} = (V)(0.0f), sum{n} = (V)(0.0f);" for n in ns)}
    {seen if what.causal else ""}
    for (int i = 0; i < {width * many}; i++) ot[i] = (V)(0.0f);
    gather(q, first, queries, {depth}, {many}, scale, qt);
    int most = {f"min(keys, max({rows}, first + {many * self.w}))" if what.causal else "keys"}, again = 1;
    for (int key = 0; key < most;) {{
        int count = min({keys}, most - key);
        {" ".join(f"V more{n} = (V)(0.0f);" for n in ns)}
{self.scores()}
        if (again) {{
{self.highest()}
            for (int i = 0; i < count; i++) {{
                {" ".join(f"V e{n} = exponential2(p[i * {many} + {n}]); p[i * {many} + {n}] = e{n}; more{n} += e{n};"
                          for n in ns)}
            }}
        }} else if ({" || ".join(self.any(f"more{n} > {MOST}f") for n in ns)}) {{
            again = 1;
            continue;
        }}
        again = 0;
        {" ".join(f"sum{n} += more{n};" for n in ns)}
{self.outputs()}
        key += {keys};
    }}
    {" ".join(f"sum{n} = 1.0f / sum{n};" for n in ns)}
    for (int c = 0; c < {width}; c++) {{ {" ".join(f"ot[c * {many} + {n}] *= sum{n};" for n in ns)} }}
    scatter(ot, first, queries, {width}, {many}, o);
}}
"""

    def any(self, test: str) -> str:
        return f"any({test})" if self.w > 1 else f"({test})"

    def scores(self) -> str:
        depth, many, rows, ms, ns = self.what.depth, self.many, self.rows, range(self.rows), range(self.many)
        sums = " ".join(f"V s{m}_{n} = -high{n};" for m in ms for n in ns)
        step = " ".join(f"V q{n} = qt[d * {many} + {n}];" for n in ns) + "\n" + "\n".join(
            f"                {{ float e = x[d + {m * depth}]; "
            + " ".join(f"s{m}_{n} = fma((V)(e), q{n}, s{m}_{n});" for n in ns) + " }" for m in ms)
        each = -(-rows * self.what.width // depth)  # numbers of V to fetch in a step
        line = LINE // vectors.number_bytes(self.what.number)
        fetch = " ".join(f"FETCH(y + d * {each} + {i});" for i in range(0, each, line))
        mask = "\n".join(f"                s{m}_{n} = key + at + {m} > seen{n} ? (V)(-INFINITY) : s{m}_{n};"
                         for m in ms for n in ns)
        masked = f"if (key + at + {rows - 1} > first) {{\n{mask}\n            }}" if self.what.causal else ""
        kept = " ".join(f"to[{m * many + n}] = s{m}_{n};" for m in ms for n in ns)
        raised = "\n".join("                " + " ".join(
            f"V e{m}_{n} = exponential2(s{m}_{n}); to[{m * many + n}] = e{m}_{n};" for n in ns)
            + f" if (at + {m} >= start) {{ " + " ".join(f"more{n} += e{m}_{n};" for n in ns) + " }" for m in ms)
        converted = f"""        for (int i = min(0, count - {rows}) * {depth}; i < count * {depth}; i++)
            kf[i] = LOAD1(k + (long)key * {depth} + i);
""" if self.half else ""
        return f"""{converted}        for (int start = 0; start < count; start += {rows}) {{
            int at = min(start, count - {rows});  // the last rows overlap those before, of the tile before even
            {"float *x = kf + at" if self.half else "__global const T *x = k + (long)(key + at)"} * {depth};
            V *to = p + at * {many};
            __global const T *y = v + (long)(key + at) * {self.what.width};
            {sums}
            for (int d = 0; d < {depth}; d++) {{
                {fetch}
                {step}
            }}
            {masked}
            if (again) {{
                {kept}
            }} else {{  // while the next scores are begun with
{raised}
            }}
        }}"""

    def highest(self) -> str:
        """What is above `high` is added to it; in the first tile, what is below, too."""
        many, ns = self.many, range(self.many)
        return f"""            {" ".join(f"V top{n} = key ? (V)(0.0f) : (V)(-INFINITY);" for n in ns)}
            for (int i = 0; i < count * {many}; i += {many}) {{
                {" ".join(f"top{n} = p[i + {n}] > top{n} ? p[i + {n}] : top{n};" for n in ns)}
            }}
            for (int i = 0; i < count * {many}; i += {many}) {{ {" ".join(f"p[i + {n}] -= top{n};" for n in ns)} }}
            if (key) {{
                {" ".join(f"V part{n} = exponential2(-top{n}); sum{n} *= part{n};" for n in ns)}
                for (int c = 0; c < {self.what.width}; c++) {{
                    {" ".join(f"ot[c * {many} + {n}] *= part{n};" for n in ns)}
                }}
            }}
            {" ".join(f"high{n} += top{n};" for n in ns)}"""

    def outputs(self) -> str:
        width = self.what.width
        converted = f"""        for (int i = 0; i < count * {width}; i++) vf[i] = LOAD1(v + (size_t)key * {width} + i);
""" if self.half else ""
        return converted + "\n".join(self.part(*p) for p in self.parts)

    def part(self, first: int, count: int, columns: int) -> str:
        width, many, ms, ns = self.what.width, self.many, range(columns), range(self.many)
        sums = " ".join(f"V o{m}_{n} = (V)(0.0f);" for m in ms for n in ns)
        step = " ".join(f"V e{n} = p[i * {many} + {n}];" for n in ns) + "\n" + "\n".join(
            f"                {{ float e = x[{m}]; " + " ".join(f"o{m}_{n} = fma((V)(e), e{n}, o{m}_{n});" for n in ns)
            + " }" for m in ms)
        ends = " ".join(f"to[{m * many + n}] += o{m}_{n};" for m in ms for n in ns)
        return f"""        for (int at = {first}; at < {first + count * columns}; at += {columns}) {{
            V *to = ot + at * {many};
            {"float *x = vf + at" if self.half else f"__global const T *x = v + (size_t)key * {width} + at"};
            {sums}
            for (int i = 0; i < count; i++, x += {width}) {{
                {step}
            }}
            {ends}
        }}"""
