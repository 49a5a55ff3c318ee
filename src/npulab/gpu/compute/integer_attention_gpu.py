"""int8 attention on a GPU: a group of work items has a tile of queries, and goes through tiles of keys in local memory.

A word has four bytes: neighbours of a vector of Q or K; the shares, or the values, of four keys. Each work item has
`each` x `each` scores of a tile, and of the output its queries' columns x, x + across, ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from npulab.errors import CapacityError, InvariantError
from npulab.gpu.compute import vectors
from npulab.gpu.compute.attention_gpu import Items
from npulab.gpu.compute.problems import Attention
from npulab.gpu.compute.types import Kernel, Traits

if TYPE_CHECKING:
    from npulab.gpu.compute.integer_attention import Factors

SHAPES = ((16, 16, 4), (8, 8, 4), (16, 4, 4), (8, 8, 2), (8, 4, 2), (4, 4, 2), (4, 2, 2), (4, 1, 1))
"""Across, down, each: the first that has room is taken."""
STEPS = 255
"""Of a share: 1 is so many."""
DOTS = """#ifdef __opencl_c_integer_dot_product_input_4x8bit_packed
#define DOT(a, b) dot_4x8packed_ss_int(a, b)
#define SHARED(a, b) dot_4x8packed_us_int(a, b)
#else
int DOT(uint a, uint b) {
    char4 x = as_char4(a), y = as_char4(b);
    return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}
int SHARED(uint a, uint b) {
    uchar4 x = as_uchar4(a);
    char4 y = as_char4(b);
    return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
}
#endif
"""
"""DOT: of four bytes by four. SHARED: the first four have no sign."""


def local_bytes(what: Attention, across: int, down: int, each: int) -> int:
    """Of a group: queries, keys or values, shares, maxima."""
    queries, keys, words = down * each, across * each, -(-what.depth // 4)
    return 4 * (words * (queries + 1) + max(keys * (words | 1), keys // 4 * what.width)
                + queries * (keys // 4 + 1) + queries * across)


def kernel(what: Attention, traits: Traits, choice: Items | None, factors: Factors
           ) -> tuple[Kernel, tuple[int, ...], tuple[int, ...]]:
    """Raises: CapacityError if local memory is too small for any tile; InvariantError for tiles of keys that are no
    fours."""
    shapes = [(choice.across, choice.down, choice.each)] if choice else SHAPES
    items = vectors.group_items(traits) if not choice else traits.group_max
    fit = [s for s in shapes if s[0] * s[1] <= items and local_bytes(what, *s) <= traits.local_bytes]
    if not fit:
        raise CapacityError("int8 attention has no room in local memory", got=f"{traits.local_bytes} bytes",
                            want=f"{min(local_bytes(what, *s) for s in shapes)} for heads of {what.depth}")
    across, down, each = fit[0]
    if across * each % 4:
        raise InvariantError("keys of a tile are no fours", got=f"{across} by {each}", want="a multiple of 4")
    tiles = -(-what.queries // (down * each))
    source = _source(what, across, down, each, factors)
    return Kernel(source, "attention"), (tiles * across, down, what.batch), (across, down, 1)


def _source(what: Attention, across: int, down: int, each: int, factors: Factors) -> str:
    depth, width, items = what.depth, what.width, across * down
    bq, bk, words, columns = down * each, across * each, -(-depth // 4), -(-width // across)
    zeros, low = factors.zeros, factors.low
    pitch = words | 1  # odd: keys beside each other lie in different banks
    fours = bk // 4
    rs, cs = range(each), range(columns)
    sums = " ".join(f"s{i}_{j} += DOT(q{i}, k{j});" for i in rs for j in rs)
    lack = " ".join(f"r{j} += DOT(k{j}, 0x01010101);" for j in rs) if zeros[0] else ""
    less = " ".join(f"s{i}_{j} -= {zeros[0]} * r{j};" for i in rs for j in rs) if zeros[0] else ""
    signed = " ".join(f"s{i}_{j} = -s{i}_{j};" for i in rs for j in rs) if factors.sign < 0 else ""
    also = " && key + x + {0} <= first + y * {1} + {2}" if what.causal else ""
    mask = "\n".join(f"        bool seen{i}_{j} = key + x + {j * across} < keys{also.format(j * across, each, i)}; "
                     f"s{i}_{j} = seen{i}_{j} ? s{i}_{j} : {low};" for i in rs for j in rs)
    highest = "\n".join(f"        most[(y * {each} + {i}) * {across} + x] = {_most([f's{i}_{j}' for j in rs])};"
                        for i in rs)
    shares = "\n".join(f"""        {{
            int top = {low}, more = 0, now;
            for (int j = 0; j < {across}; j++) top = max(top, most[(y * {each} + {i}) * {across} + j]);
            now = max(high{i}, top);
            fade{i} = exp2((float)(high{i} - now) * factor);
            part{i} = exp2((float)(top - now) * factor);
            high{i} = now;
            __local uchar *to = (__local uchar *)(p + (y * {each} + {i}) * {fours + 1}) + x;
            {" ".join(f"s{i}_{j} = seen{i}_{j} ? (int)rint(exp2((float)(s{i}_{j} - top) * factor) * {STEPS}.0f) : 0; "
                      f"to[{j * across}] = s{i}_{j}; more += s{i}_{j};" for j in rs)}
            sum{i} = fma((float)more, part{i}, sum{i} * fade{i});
        }}""" for i in rs)
    out = " ".join(f"uint p{i} = p[(y * {each} + {i}) * {fours + 1} + j];" for i in rs) + "\n" + "\n".join(
        f"            {{ uint e = kv[j * {width} + min(x + {c * across}, {width - 1})]; "
        + " ".join(f"o{i}_{c} += SHARED(p{i}, e);" for i in rs) + " }" for c in cs)
    ends = "\n".join(f"""    {{
        float total = 0.0f;
        for (int j = 0; j < {across}; j++) total += as_float(most[(y * {each} + {i}) * {across} + j]);
        int row = first + y * {each} + {i};
        __global char *to = o + (size_t)row * {width} + x;
        if (row < queries) {{
            {" ".join(f"if (x + {c * across} < {width}) to[{c * across}] = rescaled(a{i}_{c} / total, gain);"
                      for c in cs)}
        }}
    }}""" for i in rs)
    return DOTS + f"""
uint four(__global const char *row, int at) {{  // 0 beyond the row
    uint word = 0;
    for (int i = min(at + 4, {depth}) - 1; i >= at; i--) word = word << 8 | (uchar)row[i];
    return word;
}}
char rescaled(float mean, float gain) {{
    return convert_char_sat_rte(clamp(fma(mean - {zeros[2]}.0f, gain, {factors.zero_out}.0f), -128.0f, 127.0f));
}}
__kernel {vectors.attribute((across, down, 1))} void attention(__global const char *q, __global const char *k,
        __global const char *v, __global char *o, int queries, int keys, float factor, float gain) {{
    __local uint qs[{words * (bq + 1)}], kv[{max(bk * pitch, fours * width)}], p[{bq * (fours + 1)}];
    __local int most[{bq * across}];
    int x = get_local_id(0), y = get_local_id(1), lid = y * {across} + x, first = get_group_id(0) * {bq};
    size_t b = get_global_id(2);
    q += b * queries * {depth}; k += b * keys * {depth}; v += b * keys * {width}; o += b * queries * {width};
    for (int i = lid; i < {bq * words}; i += {items})  // the last query stands for those beyond
        qs[i % {words} * {bq + 1} + i / {words}] =
            four(q + (size_t)min(first + i / {words}, queries - 1) * {depth}, i % {words} * 4);
    {" ".join(f"int high{i} = {low}; float sum{i} = 0.0f, fade{i}, part{i};" for i in rs)}
    {" ".join(f"float a{i}_{c} = 0.0f;" for i in rs for c in cs)}
    int last = {f"min(keys, first + {bq})" if what.causal else "keys"};
    for (int key = 0; key < last; key += {bk}) {{
        barrier(CLK_LOCAL_MEM_FENCE);  // values and shares of the tile before have been read
        for (int i = lid; i < {bk * words}; i += {items})
            kv[i / {words} * {pitch} + i % {words}] =
                four(k + (size_t)min(key + i / {words}, keys - 1) * {depth}, i % {words} * 4);
        barrier(CLK_LOCAL_MEM_FENCE);
        {" ".join(f"int s{i}_{j} = 0;" for i in rs for j in rs)}
        {" ".join(f"int r{j} = 0;" for j in rs) if zeros[0] else ""}
        for (int d = 0; d < {words}; d++) {{
            {" ".join(f"uint q{i} = qs[d * {bq + 1} + y * {each} + {i}];" for i in rs)}
            {" ".join(f"uint k{j} = kv[(x + {j * across}) * {pitch} + d];" for j in rs)}
            {sums}
            {lack}
        }}
        {less}
        {signed}
{mask}
{highest}
        barrier(CLK_LOCAL_MEM_FENCE);  // maxima are there, keys have been read
        for (int i = lid; i < {fours * width}; i += {items}) {{
            uint word = 0;
            for (int j = 3; j >= 0; j--)
                word = word << 8 | (uchar)v[(size_t)min(key + i / {width} * 4 + j, keys - 1) * {width} + i % {width}];
            kv[i] = word;
        }}
{shares}
        barrier(CLK_LOCAL_MEM_FENCE);
        {" ".join(f"int o{i}_{c} = 0;" for i in rs for c in cs)}
        for (int j = 0; j < {fours}; j++) {{
            {out}
        }}
        {" ".join(f"a{i}_{c} = fma((float)o{i}_{c}, part{i}, a{i}_{c} * fade{i});" for i in rs for c in cs)}
    }}
    barrier(CLK_LOCAL_MEM_FENCE);
    {" ".join(f"most[(y * {each} + {i}) * {across} + x] = as_int(sum{i});" for i in rs)}
    barrier(CLK_LOCAL_MEM_FENCE);
{ends}
}}
"""


def _most(names: list[str]) -> str:
    found = names[0]
    for name in names[1:]:
        found = f"max({found}, {name})"
    return found
