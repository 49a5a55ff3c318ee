"""Attention in one kernel: softmax(Q K^T scale) V without a matrix of queries by keys in memory.

    lower(what, traits, choice) -> Lowered      "input" Q, "input1" K, "input2" V -> "output"
    unfused(what, traits) -> Lowered            the same as product, softmax, product with scratch "scores"

Keys and values are gone through once, in tiles. For each query the largest score so far and the sum of exponentials
are kept; when the largest grows, what was summed is scaled down (Dao et al., FlashAttention, arXiv 2205.14135; the
running sum: Milakov and Gimelshein, arXiv 1805.02867).

causal: query q sees keys 0..q.

On a CPU (here) a work item has a tile of queries, one in each lane: maxima, sums and exponentials never go across
lanes, elements of K and V are broadcast from where they lie, and only Q is transposed on the way in and the output on
the way out. On a GPU (attention_gpu) a group has a tile of queries and tiles of K and V in local memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from npulab.gpu.compute import attention_gpu, chain, vectors
from npulab.gpu.compute.problems import Attention
from npulab.gpu.compute.types import Argument, Buffer, Kernel, Launch, Lowered, Traits

VECTORS = 4
"""Of queries in a tile, on a CPU: with 6 keys they are 24 sums, in 32 registers of AVX-512."""
SUMS = 24
"""Vectors that are summed at a time, of 32 registers."""
KEYS = 66
"""In a tile: its scores and its values stay in the first cache (of 48 KB) for heads of 64."""


def lower(what: Attention, traits: Traits, choice: Mapping[str, int] | None = None) -> Lowered:
    """choice: on a CPU "vectors" of queries and "keys" of a tile; on a GPU "across" work items for keys, "down" for
    queries, "each": keys and queries of each. Raises: UnsupportedError unless float32 or float16; CapacityError if
    local memory has no room (a GPU's)."""
    scale = what.scale
    if traits.cpu:
        kernel, size, group = _on_cpu(what, traits, choice or {})
        scale *= vectors.LOG2E
    else:
        kernel, size, group = attention_gpu.kernel(what, traits, choice or {})
    arguments: tuple[Argument, ...] = (Buffer("input"), Buffer("input1"), Buffer("input2"), Buffer("output"),
                                       np.int32(what.queries), np.int32(what.keys), np.float32(scale))
    traffic = vectors.number_bytes(what.number) * what.batch * (what.queries + what.keys) * (what.depth + what.width)
    return Lowered((Launch(kernel, size, group, arguments, "attention", operations(what), traffic),))


def unfused(what: Attention, traits: Traits) -> Lowered:
    """Three launches. Raises: UnsupportedError if causal, or unless float32 or float16."""
    return chain.lower(what, traits)


def operations(what: Attention) -> float:
    """Of what is seen: half of it where causal."""
    if not what.causal:
        return what.operations
    seen = sum(min(q + 1, what.keys) for q in range(what.queries))
    return what.operations * seen / (what.queries * what.keys)


def _on_cpu(what: Attention, traits: Traits, choice: Mapping[str, int]
            ) -> tuple[Kernel, tuple[int, ...], tuple[int, ...]]:
    w = vectors.fitting(traits, what.queries)
    many = min(choice.get("vectors", VECTORS), -(-what.queries // w))
    keys = choice.get("keys", KEYS)
    tiles, rest = divmod(what.queries, many * w)
    last = -(-rest // w)  # vectors of the last tile: fewer, if that is enough
    if last == many:
        tiles, last = tiles + 1, 0
    text = vectors.preamble(what.number, w) + vectors.exponential2(w) + vectors.transposition(w)
    text += "".join(_tile(what, w, n, keys) for n in sorted({many, last or many}))
    end = f"else tile_{last}(q, k, v, o, {tiles * many * w}, queries, keys, scale);" if last else ""
    source = text + f"""
__kernel {vectors.attribute((1, 1))} void attention(__global const T *q, __global const T *k, __global const T *v,
                                                    __global T *o, int queries, int keys, float scale) {{
    size_t b = get_global_id(1);
    int tile = get_global_id(0);
    q += b * queries * {what.depth}; k += b * keys * {what.depth};
    v += b * keys * {what.width}; o += b * queries * {what.width};
    if (tile < {tiles}) tile_{many}(q, k, v, o, tile * {many * w}, queries, keys, scale);
    {end}
}}
"""
    return Kernel(source, "attention"), (tiles + bool(last), what.batch), (1, 1)


def _tile(what: Attention, w: int, many: int, keys: int) -> str:
    """`many` vectors of queries against all keys."""
    depth, width = what.depth, what.width
    rows = max(1, min(SUMS // many, what.keys))
    keys = vectors.up(min(keys, what.keys), rows)
    ns, queries = range(many), many * w
    half = what.number == "float16"
    # scores: `rows` keys by `many` vectors of queries
    score_sums = " ".join(f"V s{m}_{n} = (V)(0.0f);" for m in range(rows) for n in ns)
    score_step = " ".join(f"V q{n} = qt[d * {many} + {n}];" for n in ns) + "\n" + "\n".join(
        f"                {{ float e = x[d + {m * depth}]; "
        + " ".join(f"s{m}_{n} = fma((V)(e), q{n}, s{m}_{n});" for n in ns) + " }" for m in range(rows))
    mask = "\n".join(f"                s{m}_{n} = key + at + {m} > seen{n} ? (V)(-INFINITY) : s{m}_{n};"
                     for m in range(rows) for n in ns)
    masked = f"if (key + at + {rows - 1} > first) {{\n{mask}\n            }}" if what.causal else ""
    score_ends = "\n".join(f"            to[{m * many + n}] = s{m}_{n}; "
                           f"high{n} = s{m}_{n} > high{n} ? s{m}_{n} : high{n};"
                           for m in range(rows) for n in ns)
    weights = " ".join(f"V e{n} = exponential2(p[i * {many} + {n}] - high{n}); "
                       f"p[i * {many} + {n}] = e{n}; sum{n} += e{n};" for n in ns)
    # output: parts of as equal numbers of columns as can be, as many as there are rows of scores or fewer
    parts = -(-width // rows)
    less, more = width // parts, width % parts
    outs = _outputs(more * (less + 1), 0, less + 1, many, width, half) if more else ""
    outs += _outputs(width, more * (less + 1), less, many, width, half)
    converted = f"""
        for (int i = min(0, count - {rows}) * {depth}; i < count * {depth}; i++)
            kf[i] = LOAD1(k + (long)key * {depth} + i);
        for (int i = 0; i < count * {width}; i++) vf[i] = LOAD1(v + (long)key * {width} + i);""" if half else ""
    return f"""
void tile_{many}(__global const T *q, __global const T *k, __global const T *v, __global T *o, int first, int queries,
            int keys, float scale) {{
    V qt[{depth * many}], ot[{width * many}], room[{(keys + rows) * many}], *p = room + {rows * many};
    {f"float kr[{(keys + rows) * depth}], *kf = kr + {rows * depth}, vf[{keys * width}];" if half else ""}
    {" ".join(f"V high{n} = (V)(-INFINITY), sum{n} = (V)(0.0f);" for n in ns)}
    {" ".join(f"I seen{n} = {vectors.lanes(w)} + first + {n * w};" for n in ns) if what.causal else ""}
    for (int i = 0; i < {width * many}; i++) ot[i] = (V)(0.0f);
    gather(q, first, queries, {depth}, {many}, scale, qt);
    int most = {f"min(keys, max({rows}, first + {queries}))" if what.causal else "keys"};
    for (int key = 0; key < most; key += {keys}) {{
        int count = min({keys}, most - key);
        {" ".join(f"V before{n} = high{n};" for n in ns)}{converted}
        for (int start = 0; start < count; start += {rows}) {{
            int at = min(start, count - {rows});  // the last rows overlap those before, of the tile before even
            {"float *x = kf + at" if half else "__global const T *x = k + (long)(key + at)"} * {depth};
            V *to = p + at * {many};
            {score_sums}
            for (int d = 0; d < {depth}; d++) {{
                {score_step}
            }}
            {masked}
{score_ends}
        }}
        {" ".join(f"V part{n} = exponential2(before{n} - high{n}); sum{n} *= part{n};" for n in ns)}
        for (int i = 0; i < count; i++) {{
            {weights}
        }}
{outs}
    }}
    {" ".join(f"sum{n} = 1.0f / sum{n};" for n in ns)}
    for (int c = 0; c < {width}; c++) {{ {" ".join(f"ot[c * {many} + {n}] *= sum{n};" for n in ns)} }}
    scatter(ot, first, queries, {width}, {many}, o);
}}
"""


def _outputs(most: int, first: int, columns: int, many: int, width: int, half: bool) -> str:
    """Columns first.. of the output, `columns` by `many` vectors of queries in registers."""
    ns, ms = range(many), range(columns)
    sums = "\n".join(f"            V o{m}_{n} = to[{m * many + n}] * part{n};" for m in ms for n in ns)
    step = " ".join(f"V e{n} = p[i * {many} + {n}];" for n in ns) + "\n" + "\n".join(
        f"                {{ float e = x[{m}]; " + " ".join(f"o{m}_{n} = fma((V)(e), e{n}, o{m}_{n});" for n in ns)
        + " }" for m in ms)
    ends = "\n".join(f"            to[{m * many + n}] = o{m}_{n};" for m in ms for n in ns)
    return f"""
        for (int at = {first}; at < {most}; at += {columns}) {{
            V *to = ot + at * {many};
{sums}
            {"float *x = vf + at" if half else f"__global const T *x = v + (size_t)key * {width} + at"};
            for (int i = 0; i < count; i++, x += {width}) {{
                {step}
            }}
{ends}
        }}"""
