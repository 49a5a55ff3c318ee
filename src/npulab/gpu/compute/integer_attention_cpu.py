"""int8 attention on a CPU: a work item has a tile of queries, one in each lane, and goes through tiles of keys.

Bytes are widened to 16 bits, two to a word: neighbours of a vector of Q and of K; the shares and the values of two
keys. x86 multiplies and adds such pairs (VPMADDWD; Intel SDM 2B), and shares have 15 bits at no cost. K and V are
widened anew for each tile of queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from npulab.errors import CapacityError
from npulab.gpu.compute import vectors
from npulab.gpu.compute.attention_cpu import NARROW, STACK, WIDE, Lanes, step_of
from npulab.gpu.compute.problems import Attention
from npulab.gpu.compute.types import Kernel, Traits

if TYPE_CHECKING:
    from npulab.gpu.compute.integer_attention import Factors

STEPS = (1 << 15) - 1
"""Of a share: 1 is so many."""
KEYS_MOST = 256
"""Of a tile: more products of shares and values, less their zero point, may not fit 32 bits."""
KEYS = 128
"""Of a tile, about: anything from 48 to 192 is within 3 %."""


def kernel(what: Attention, traits: Traits, choice: Lanes | None, factors: Factors
           ) -> tuple[Kernel, tuple[int, ...], tuple[int, ...]]:
    """(kernel, global size, local size). Raises: CapacityError for heads that a thread's stack has no room for."""
    w = vectors.fitting(traits, what.queries)
    wide, sums = WIDE if traits.registers >= 32 * traits.vector else NARROW
    many = min(choice.vectors if choice else wide, -(-what.queries // w))
    tiles, rest = divmod(what.queries, many * w)
    last = -(-rest // w)  # vectors of the last tile: fewer, if that is enough
    if last == many:
        tiles, last = tiles + 1, 0
    kinds = [_Tile(what, w, n, sums, choice.keys if choice else 0, factors) for n in sorted({many, last or many})]
    if (need := kinds[-1].stack_bytes) > STACK:
        raise CapacityError("int8 attention has no room on a thread's stack", got=f"{need} bytes for heads of "
                            f"{what.depth} and {what.width}", want=f"at most {STACK}")
    n = "" if w == 1 else w
    text = f"typedef float{n} V;\ntypedef int{n} I;\n" + vectors.exponential2(w) + _pairs(w)
    text += f"""I rounded(V x) {{  // in the lowest bits of a number around 1.5 * 2**23
    return as_int{n}(fma(x, (V)({STEPS}.0f), (V)(12582912.0f))) - 0x4b400000;
}}
"""
    text += "".join(kind.text() for kind in kinds)
    end = f"else tile_{last}(q, k, v, o, {tiles * many * w}, queries, keys, factor, gain);" if last else ""
    groups = tiles + bool(last)
    step = step_of(groups * what.batch, traits.compute_units)
    source = text + f"""
__kernel {vectors.attribute((1, 1))} void attention(__global const char *q, __global const char *k,
        __global const char *v, __global char *o, int queries, int keys, float factor, float gain) {{
    size_t b = get_global_id(1);
    int tile = get_global_id(0) / {step};
    if (get_global_id(0) % {step}) return;
    q += b * queries * {what.depth}; k += b * keys * {what.depth};
    v += b * keys * {what.width}; o += b * queries * {what.width};
    if (tile < {tiles}) tile_{many}(q, k, v, o, tile * {many * w}, queries, keys, factor, gain);
    {end}
}}
"""
    return Kernel(source, "attention"), (groups * step, what.batch), (1, 1)


def _pairs(w: int) -> str:
    """pairs(sum, a, b): sum and both products of the 16-bit numbers in each word of a and b."""
    own = {16: ("__AVX512BW__", "512"), 8: ("__AVX2__", "256"), 4: ("__SSE2__", "128")}.get(w)
    plain = "    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);\n"
    body = f"""#ifdef PAIRS
    return sum + __builtin_astype(__builtin_ia32_pmaddwd{own[1]}(__builtin_astype(a, S), __builtin_astype(b, S)), I);
#else
{plain}#endif
""" if own else plain
    head = f"""
#if defined({own[0]}) && defined(__has_builtin)
#if __has_builtin(__builtin_ia32_pmaddwd{own[1]})
#define PAIRS
typedef short S __attribute__((ext_vector_type({2 * w})));
#endif
#endif""" if own else ""
    return f"{head}\nI pairs(I sum, I a, I b) {{\n{body}}}\n"


class _Tile:
    """`many` vectors of queries against all keys.

    rows    keys whose scores are summed at a time.          keys    of a tile.
    halves  words of a vector of Q or K.
    parts   of the output's columns, that are summed at a time: the first column, parts, columns of each.
    """

    def __init__(self, what: Attention, w: int, many: int, sums: int, keys: int, factors: Factors) -> None:
        self.what, self.w, self.many, self.factors, self.low = what, w, many, factors, factors.low
        most = max(1, sums // many)
        self.rows, self.halves = min(most, vectors.up(what.keys, 2)), -(-what.depth // 2)
        count = -(-what.width // most)
        less, more = divmod(what.width, count)
        sizes = [(0, more, less + 1), (more * (less + 1), count - more, less)]
        self.parts = [x for x in sizes if x[1]]
        step = self.rows if self.rows % 2 == 0 else 2 * self.rows
        keys = keys or -(-what.keys // -(-what.keys // KEYS))  # tiles alike
        self.keys = min(vectors.up(keys, step), KEYS_MOST // step * step)

    @property
    def stack_bytes(self) -> int:
        """Of the arrays that `text` declares."""
        what, many = self.what, self.many
        return 4 * (self.w * many * (self.halves + what.width + self.keys)
                    + self.keys * self.halves + self.keys // 2 * what.width)

    def text(self) -> str:
        what, many, keys, half, w = self.what, self.many, self.keys, self.halves, self.w
        depth, width, ns = what.depth, what.width, range(many)
        minus = "" if self.factors.sign > 0 else "-"
        n = "" if w == 1 else w
        seen = " ".join(f"I seen{i} = {vectors.lanes(w)} + first + {i * w};" for i in ns)
        return f"""
void tile_{many}(__global const char *q, __global const char *k, __global const char *v, __global char *o, int first,
            int queries, int keys, float factor, float gain) {{
    I qt[{half * many}], room[{keys * many}];
    V ot[{width * many}];
    short ks[{keys * 2 * half}];
    int vs[{keys // 2 * width}];
    {" ".join(f"I high{i} = (I)({self.low}); V sum{i} = (V)(0.0f);" for i in ns)}
    {seen if what.causal else ""}
    for (int i = 0; i < {width * many}; i++) ot[i] = (V)(0.0f);
    for (int i = 0; i < {many * w}; i++) {{
        __global const char *x = q + (size_t)min(first + i, queries - 1) * {depth};
        short row[{2 * half}];
        row[{2 * half - 1}] = 0;
        for (int d = 0; d < {depth}; d++) row[d] = {minus}(x[d] - ({self.factors.zeros[0]}));
        for (int d = 0; d < {half}; d++) ((int *)(qt + d * {many}))[i] = as_int(vload2(d, row));
    }}
    int most = {f"min(keys, first + {many * w})" if what.causal else "keys"};
    for (int key = 0; key < most; key += {keys}) {{
        int count = min({keys}, most - key);
{self.widened()}
        {" ".join(f"I top{i} = (I)({self.low});" for i in ns)}
{self.scores()}
        {" ".join(f"I now{i} = max(high{i}, top{i}), more{i} = (I)(0);" for i in ns)}
        {" ".join(f"V fade{i} = exponential2(convert_float{n}(high{i} - now{i}) * factor);" for i in ns)}
        {" ".join(f"V part{i} = exponential2(convert_float{n}(top{i} - now{i}) * factor);" for i in ns)}
        {" ".join(f"high{i} = now{i};" for i in ns)}
{self.shares()}
        {" ".join(f"sum{i} = fma(convert_float{n}(more{i}), part{i}, sum{i} * fade{i});" for i in ns)}
{chr(10).join(self.part(*p) for p in self.parts)}
    }}
    {" ".join(f"sum{i} = gain / sum{i};" for i in ns)}
{self.ends()}
}}
"""

    def widened(self) -> str:
        """The tile's keys and values; the last key stands for those beyond."""
        what, half = self.what, self.halves
        odd = f"ks[i * {2 * half} + {what.depth}] = 0;" if what.depth % 2 else ""
        zero = self.factors.zeros[2]
        return f"""        for (int i = 0; i < {self.keys} && i < count + {self.rows}; i++) {{
            __global const char *x = k + (size_t)min(key + i, keys - 1) * {what.depth};
            for (int d = 0; d < {what.depth}; d++) ks[i * {2 * half} + d] = x[d];
            {odd}
        }}
        for (int i = 0; i < count; i += 2) {{
            __global const char *x = v + (size_t)(key + i) * {what.width};
            __global const char *y = v + (size_t)min(key + i + 1, keys - 1) * {what.width};
            for (int c = 0; c < {what.width}; c++)
                vs[i / 2 * {what.width} + c] = ((x[c] - ({zero})) & 0xffff) | (y[c] - ({zero})) << 16;
        }}"""

    def scores(self) -> str:
        half, many, ms, ns = self.halves, self.many, range(self.rows), range(self.many)
        sums = " ".join(f"I s{m}_{n} = (I)(0);" for m in ms for n in ns)
        step = " ".join(f"I q{n} = qt[d * {many} + {n}];" for n in ns) + "\n" + "\n".join(
            f"                {{ I e = (I)(as_int(vload2(d + {m * half}, x))); "
            + " ".join(f"s{m}_{n} = pairs(s{m}_{n}, q{n}, e);" for n in ns) + " }" for m in ms)
        mask = "\n".join(f"                s{m}_{n} = key + at + {m} > seen{n} ? (I)({self.low}) : s{m}_{n};"
                         for m in ms for n in ns)
        masked = f"if (key + at + {self.rows - 1} > first) {{\n{mask}\n            }}" if self.what.causal else ""
        kept = "\n".join("            " + " ".join(
            f"room[(at + {m}) * {many} + {n}] = s{m}_{n}; top{n} = max(top{n}, s{m}_{n});" for n in ns) for m in ms)
        return f"""        for (int at = 0; at < count; at += {self.rows}) {{
            const short *x = ks + at * {2 * half};
            {sums}
            for (int d = 0; d < {half}; d++) {{
                {step}
            }}
            {masked}
{kept}
        }}"""

    def shares(self) -> str:
        """Of two keys in a word, in place of their scores; 0 of what is not seen."""
        many, n_ = self.many, "" if self.w == 1 else self.w
        lines = []
        for n in range(many):
            hidden = f"""
                if (key + i + 1 > first) pair &= (key + i > seen{n} ? (I)(0) : (I)(0xffff))
                    | (key + i + 1 > seen{n} ? (I)(0) : (I)(0xffff0000));""" if self.what.causal else ""
            lines.append(f"""            {{
                V a = exponential2(convert_float{n_}(room[i * {many} + {n}] - top{n}) * factor);
                V b = exponential2(convert_float{n_}(room[(i + 1) * {many} + {n}] - top{n}) * factor);
                I pair = (rounded(a) + (rounded(b) << 16)) & mask;{hidden}
                more{n} = pairs(more{n}, pair, (I)(0x10001));
                room[i / 2 * {many} + {n}] = pair;
            }}""")
        return """        for (int i = 0; i < count; i += 2) {
            int mask = i + 1 < count ? 0xffffffff : 0xffff;
""" + "\n".join(lines) + "\n        }"

    def part(self, first: int, count: int, columns: int) -> str:
        width, many, ms, ns = self.what.width, self.many, range(columns), range(self.many)
        n_ = "" if self.w == 1 else self.w
        sums = " ".join(f"I o{m}_{n} = (I)(0);" for m in ms for n in ns)
        step = " ".join(f"I p{n} = room[i * {many} + {n}];" for n in ns) + "\n" + "\n".join(
            f"                {{ I e = (I)(x[{m}]); " + " ".join(f"o{m}_{n} = pairs(o{m}_{n}, p{n}, e);" for n in ns)
            + " }" for m in ms)
        ends = "\n".join("            " + " ".join(
            f"to[{m * many + n}] = fma(convert_float{n_}(o{m}_{n}), part{n}, to[{m * many + n}] * fade{n});"
            for n in ns) for m in ms)
        return f"""        for (int at = {first}; at < {first + count * columns}; at += {columns}) {{
            V *to = ot + at * {many};
            const int *x = vs + at;
            {sums}
            for (int i = 0; i < (count + 1) / 2; i++, x += {width}) {{
                {step}
            }}
{ends}
        }}"""

    def ends(self) -> str:
        """Four bytes of a row at a time, in a word of its lane."""
        width, many, w = self.what.width, self.many, self.w
        n_ = "" if w == 1 else w
        left = "4" if width % 4 == 0 else f"min(4, {width} - c)"
        store = ("vstore4(as_char4(four), 0, to);" if width % 4 == 0 else
                 f"for (int j = 0; j < {left}; j++) to[j] = four >> 8 * j;")
        each = "\n".join(f"""        word = (I)(0);
        for (int i = {left} - 1; i >= 0; i--) {{
            V y = fma(ot[(c + i) * {many} + {n}], sum{n}, (V)({self.factors.zero_out}.0f));
            word = word << 8 | (as_int{n_}(clamp(y, (V)(-128.0f), (V)(127.0f)) + 12582912.0f) & 0xff);
        }}
        for (int i = 0; i < min({w}, queries - first - {n * w}); i++) {{
            __global char *to = o + (size_t)(first + {n * w} + i) * {width} + c;
            int four = ((int *)&word)[i];
            {store}
        }}""" for n in range(many))
        return f"    for (int c = 0; c < {width}; c += 4) {{\n        I word;\n{each}\n    }}"
