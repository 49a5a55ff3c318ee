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
KEYS = 96
"""In a tile: its scores stay in the first cache."""


def lower(what: Attention, traits: Traits, choice: Mapping[str, int] | None = None) -> Lowered:
    """choice: on a CPU "vectors" of queries and "keys" of a tile; on a GPU "across" work items for keys, "down" for
    queries, "each": keys and queries of each. Raises: UnsupportedError unless float32 or float16; CapacityError if
    local memory has no room (a GPU's)."""
    if traits.cpu:
        kernel, size, group = _on_cpu(what, traits, choice or {})
    else:
        kernel, size, group = attention_gpu.kernel(what, traits, choice or {})
    arguments: tuple[Argument, ...] = (Buffer("input"), Buffer("input1"), Buffer("input2"), Buffer("output"),
                                       np.int32(what.queries), np.int32(what.keys), np.float32(what.scale))
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
    text = vectors.preamble(what.number, w) + vectors.exponential(w) + vectors.transposition(w)
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
    rows = max(1, SUMS // many)
    keys = vectors.up(min(keys, what.keys), rows)
    rows_wide = min(rows, width)
    padded = vectors.up(width, rows_wide)
    ns, queries = range(many), many * w
    half = what.number == "float16"
    # scores: `rows` keys by `many` vectors of queries
    score_sums = " ".join(f"V s{m}_{n} = (V)(0.0f);" for m in range(rows) for n in ns)
    row = f"float *k{{0}} = kf + min(at + {{0}}, count - 1) * {depth};" if half else \
        f"__global const T *k{{0}} = k + (size_t)(key + min(at + {{0}}, count - 1)) * {depth};"
    score_rows = "\n".join(f"            {row.format(m)}" for m in range(rows))
    score_step = " ".join(f"V q{n} = qt[d * {many} + {n}];" for n in ns) + "\n" + "\n".join(
        f"                {{ float e = k{m}[d]; "
        + " ".join(f"s{m}_{n} = fma((V)(e), q{n}, s{m}_{n});" for n in ns) + " }" for m in range(rows))
    mask = "\n".join(f"                s{m}_{n} = key + at + {m} > seen{n} ? (V)(-INFINITY) : s{m}_{n};"
                     for m in range(rows) for n in ns)
    masked = f"if (key + at + {rows - 1} > first) {{\n{mask}\n            }}" if what.causal else ""
    score_ends = "\n".join(f"            p[(at + {m}) * {many} + {n}] = s{m}_{n}; high{n} = fmax(high{n}, s{m}_{n});"
                           for m in range(rows) for n in ns)
    # output: `rows_wide` of its columns by `many` vectors of queries
    out_sums = "\n".join(f"            V o{m}_{n} = ot[(at + {m}) * {many} + {n}] * part{n};"
                         for m in range(rows_wide) for n in ns)
    column = [f"at + {m}" if width % rows_wide == 0 else f"min(at + {m}, {width - 1})" for m in range(rows_wide)]
    columns = " ".join(f"int c{m} = {c};" for m, c in enumerate(column))
    out_step = " ".join(f"V e{n} = p[i * {many} + {n}];" for n in ns) + "\n" + "\n".join(
        f"                {{ float e = x[c{m}]; "
        + " ".join(f"o{m}_{n} = fma((V)(e), e{n}, o{m}_{n});" for n in ns) + " }" for m in range(rows_wide))
    weights = " ".join(f"V e{n} = exponential(p[i * {many} + {n}] - high{n}); "
                       f"p[i * {many} + {n}] = e{n}; sum{n} += e{n};" for n in ns)
    out_ends = "\n".join(f"            ot[(at + {m}) * {many} + {n}] = o{m}_{n};" for m in range(rows_wide) for n in ns)
    converted = f"""
        for (int i = 0; i < count * {depth}; i++) kf[i] = LOAD1(k + (size_t)key * {depth} + i);
        for (int i = 0; i < count * {width}; i++) vf[i] = LOAD1(v + (size_t)key * {width} + i);""" if half else ""
    return f"""
void tile_{many}(__global const T *q, __global const T *k, __global const T *v, __global T *o, int first, int queries,
            int keys, float scale) {{
    V qt[{depth * many}], ot[{padded * many}], p[{keys * many}];
    {f"float kf[{keys * depth}], vf[{keys * width}];" if half else ""}
    {" ".join(f"V high{n} = (V)(-INFINITY), sum{n} = (V)(0.0f);" for n in ns)}
    {" ".join(f"I seen{n} = {vectors.lanes(w)} + first + {n * w};" for n in ns) if what.causal else ""}
    for (int i = 0; i < {padded * many}; i++) ot[i] = (V)(0.0f);
    gather(q, first, queries, {depth}, {many}, scale, qt);
    int most = {f"min(keys, first + {queries})" if what.causal else "keys"};
    for (int key = 0; key < most; key += {keys}) {{
        int count = min({keys}, most - key);
        {" ".join(f"V before{n} = high{n};" for n in ns)}{converted}
        for (int at = 0; at < count; at += {rows}) {{
            {score_sums}
{score_rows}
            for (int d = 0; d < {depth}; d++) {{
                {score_step}
            }}
            {masked}
{score_ends}
        }}
        {" ".join(f"V part{n} = exponential(before{n} - high{n}); sum{n} *= part{n};" for n in ns)}
        for (int i = 0; i < count; i++) {{
            {weights}
        }}
        for (int at = 0; at < {padded}; at += {rows_wide}) {{
            {columns}
{out_sums}
            {"float *x = vf" if half else f"__global const T *x = v + (size_t)key * {width}"};
            for (int i = 0; i < count; i++, x += {width}) {{
                {out_step}
            }}
{out_ends}
        }}
    }}
    {" ".join(f"sum{n} = 1.0f / sum{n};" for n in ns)}
    for (int c = 0; c < {width}; c++) {{ {" ".join(f"ot[c * {many} + {n}] *= sum{n};" for n in ns)} }}
    scatter(ot, first, queries, {width}, {many}, o);
}}
"""
