"""Pieces of OpenCL C that kernels share: vectors of a width, loads and stores of what is stored, sums over a group.

Everything is computed in floats: float16 is how tensors lie in memory (vload_half and vstore_half need no extension).
Where halves are asked for, products are computed on as `half_operations` has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from npulab.errors import UnsupportedError
from npulab.gpu.compute.types import Number, Traits

WIDTHS = (1, 2, 4, 8, 16)
"""Of vectors (OpenCL C 1.2, section 6.1.2; 3 is left out, as it lies in memory like 4)."""
GROUP = 64
"""Work items of a group on a GPU, unless a warp is more: two warps or one, and rooms for many groups."""
LOG2E = 1.44269504
LN2 = (0.693145752, 1.42860677e-6)
"""ln 2 in two parts: products of the first with whole numbers below 256 are exact."""
EXP = (9.999997020e-01, 4.999915063e-01, 1.666763574e-01, 4.189793020e-02, 8.290315047e-03)
"""exp(r) = 1 + r q(r) for |r| <= ln(2) / 2, q by rising powers: fitted, 9.2e-8 of it off at most."""
EXP2 = (6.931470037e-01, 2.402224243e-01, 5.550733581e-02, 9.671512991e-03, 1.326472731e-03)
"""2**r = 1 + r q(r) for |r| <= 1 / 2, likewise."""
POWER2 = (9.999999404e-01, 6.931530833e-01, 2.401536107e-01, 5.582631752e-02, 8.989339694e-03, 1.877576695e-03)
"""2**r = q(r) for 0 <= r <= 1, likewise: 7.5e-8 of it off at most."""
FOUR = 4
"""Products at most that are added up as halves, before they are added as floats: longer sums are of no use."""
FETCH = """#if defined(__has_builtin)
#if __has_builtin(__builtin_prefetch)
#define FETCH(p) __builtin_prefetch(p, 0, 2)
#endif
#endif
#ifndef FETCH
#define FETCH(p)
#endif
"""
"""FETCH(p): what is there is on its way to the second cache."""


def fitting(traits: Traits, size: int) -> int:
    """Lanes of a vector over `size` neighbours: the device's, or the most that are all used."""
    return max(w for w in WIDTHS if w <= max(1, min(traits.vector, size)))


def group_items(traits: Traits) -> int:
    """Work items of a group: a power of two."""
    most = max(1, min(traits.group_max, max(GROUP, traits.warp)))
    return 1 if traits.cpu else 1 << (most.bit_length() - 1)


def split(items: int, *sizes: int) -> tuple[int, ...]:
    """A group of at most `items` (a power of two) over sizes, the first filled first."""
    found = []
    for size in sizes:
        here = min(items, 1 << max(0, size - 1).bit_length())
        found.append(here)
        items //= here
    return tuple(found)


def up(size: int, step: int) -> int:
    return -(-size // step) * step


def attribute(group: tuple[int, ...]) -> str:
    """That the group's size is known when the kernel is compiled; PoCL 3 makes vectors of work items otherwise."""
    x, y, z = (*group, 1, 1)[:3]
    return f"__attribute__((reqd_work_group_size({x}, {y}, {z})))"


def number_bytes(number: Number) -> int:
    """Raises: UnsupportedError if kernels of floats do not read it."""
    if number not in ("float32", "float16"):
        raise UnsupportedError(f"this layer has no kernel for {number}", want="float32 or float16")
    return 4 if number == "float32" else 2


def element(number: Number) -> str:
    """Type of what is stored."""
    return "half" if number_bytes(number) == 2 else "float"


def bits(number: Number) -> str:
    """Type of what is stored where it is moved, not computed on."""
    return "ushort" if number_bytes(number) == 2 else "float"


def loaded(number: Number, p: str) -> str:
    """The float of what is stored at p."""
    return f"vload_half(0, {p})" if number == "float16" else f"*({p})"


def kept(number: Number, v: str, p: str) -> str:
    """The float v stored at p: a statement's expression."""
    return f"vstore_half({v}, 0, {p})" if number == "float16" else f"*({p}) = ({v})"


def preamble(number: Number, width: int) -> str:
    """T: what is stored. V: floats of `width`. LOAD(p), STORE(v, p): V there; LOAD1, STORE1: one number;
    LOAD4, STORE4: a float4."""
    number_bytes(number)
    n = "" if width == 1 else str(width)
    text = f"typedef float{n} V;\ntypedef int{n} I;\n"
    half = "_half" if number == "float16" else ""
    one = (f"typedef {element(number)} T;\n#define LOAD1(p) ({loaded(number, 'p')})\n"
           f"#define STORE1(v, p) ({kept(number, 'v', 'p')})\n")
    text += f"#define LOAD4(p) vload{half}4(0, p)\n#define STORE4(v, p) vstore{half}4(v, 0, p)\n"
    if number == "float16":
        return text + one + (f"#define LOAD(p) vload_half{n}(0, p)\n#define STORE(v, p) vstore_half{n}(v, 0, p)\n")
    if width == 1:
        return text + one + "#define LOAD(p) LOAD1(p)\n#define STORE(v, p) STORE1(v, p)\n"
    return text + one + f"#define LOAD(p) vload{n}(0, p)\n#define STORE(v, p) vstore{n}(v, 0, p)\n"


def checked_halves(number: Number, traits: Traits) -> None:
    """Raises: UnsupportedError to compute on halves what is not stored as halves, or where the device has none."""
    if number != "float16":
        raise UnsupportedError("only what is stored as halves is computed as halves", got=number, want="float16")
    if not traits.halves:
        raise UnsupportedError(f"{traits.name} does not compute on halves", want="the extension cl_khr_fp16",
                               try_="without halves: they are stored, floats computed")


def half_operations(width: int) -> str:
    """All that kernels do with halves, here alone: H1: one. H: `width` of them. HALF_ONE(p, i), HALF_MANY(p): what is
    stored there. HALF_FMA(a, b, c): rounded once. HALVES(v): of floats. HALF_FLOATS(h): exact."""
    n = "" if width == 1 else str(width)
    return f"""#pragma OPENCL EXTENSION cl_khr_fp16 : enable
typedef half H1;
typedef half{n} H;
#define HALF_ONE(p, i) ((p)[i])
#define HALF_MANY(p) {f"vload{n}(0, p)" if n else "(*(p))"}
#define HALF_FMA(a, b, c) fma(a, b, c)
#define HALVES(v) convert_half{n}(v)
#define HALF_FLOATS(h) convert_float{n}(h)
"""


def short_sum(pairs: Sequence[tuple[str, str]]) -> str:
    """Products of halves, at most `FOUR`, added up as halves: a float V. Operands are of H."""
    text = "(H)(0)"
    for a, b in pairs:
        text = f"HALF_FMA({a}, {b}, {text})"
    return f"HALF_FLOATS({text})"


def by_fours(count: int) -> list[range]:
    """0, 1, ... `count` - 1 in parts of `FOUR`, the last of what is left."""
    return [range(i, min(i + FOUR, count)) for i in range(0, count, FOUR)]


def literal(value: float) -> str:
    """A float's exact value, rounded to float32 by the compiler."""
    return f"{float(value)!r}f"


def vector_type(width: int) -> str:
    return "float" if width == 1 else f"float{width}"


def prelude(number: Number, width: int) -> str:
    """Types N, V and functions on them: one(p, i), many(p), put(v, p), and their kin for the first `left` of a
    vector: some(p, left), put_some(v, p, left); floats(p) of float32 whatever N is."""
    number_bytes(number)
    half, w = number == "float16", "" if width == 1 else str(width)
    if half:
        one, many, put = "vload_half(i, p)", f"vload_half{w}(0, p)", f"vstore_half{w}(v, 0, p)"
    elif width == 1:
        one, many, put = "p[i]", "*p", "*p = v"
    else:
        one, many, put = "p[i]", f"vload{w}(0, p)", f"vstore{w}(v, 0, p)"
    spread = "*t = v" if width == 1 else f"vstore{w}(v, 0, t)"
    gather = "*t" if width == 1 else f"vload{w}(0, t)"
    keep = "vstore_half(t[i], i, p)" if half else "p[i] = t[i]"
    return f"""typedef {"half" if half else "float"} N;
typedef {vector_type(width)} V;
#define W {width}
inline float one(__global const N *p, int i) {{ return {one}; }}
inline V many(__global const N *p) {{ return {many}; }}
inline void put(V v, __global N *p) {{ {put}; }}
inline V floats(__global const float *p) {{ return {"*p" if width == 1 else f"vload{w}(0, p)"}; }}
__attribute__((noinline)) V some(__global const N *p, int left) {{
    if (left >= W) return many(p);
    float t[W];
    for (int i = 0; i < W; i++) t[i] = i < left ? one(p, i) : 0.0f;
    return {gather};
}}
__attribute__((noinline)) void put_some(V v, __global N *p, int left) {{
    if (left >= W) {{ put(v, p); return; }}
    float t[W];
    {spread};
    for (int i = 0; i < left; i++) {keep};
}}
"""


def lanes(width: int) -> str:
    """0, 1, 2... as an I."""
    return f"(I)({', '.join(map(str, range(width)))})"


def across(width: int, x: str, combine: str) -> str:
    """Lanes of the variable x put together: combine has {a} and {b}."""
    if width == 1:
        return x
    parts = [f"{x}.s{i:x}" for i in range(width)]
    while len(parts) > 1:  # a tree: rounding grows with its depth alone
        parts = [combine.format(a=a, b=b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


SUM, MAX = "({a} + {b})", "fmax({a}, {b})"


def reduction(name: str, items: int, combine: str, kind: str = "float") -> str:
    """kind name(kind x, local kind *room): of `items` neighbours of dimension 0 (a power of two) in each row of
    the group; all of them get it. room: a number for each work item of the group."""
    step = combine.format(a="at[lid]", b="at[lid + s]")
    return f"""
{kind} {name}({kind} x, __local {kind} *room) {{
    int lid = get_local_id(0);
    __local {kind} *at = room + get_local_id(1) * {items};
    barrier(CLK_LOCAL_MEM_FENCE);
    at[lid] = x;
    for (int s = {items} / 2; s > 0; s >>= 1) {{
        barrier(CLK_LOCAL_MEM_FENCE);
        if (lid < s) at[lid] = {step};
    }}
    barrier(CLK_LOCAL_MEM_FENCE);
    return at[0];
}}
"""


_PAIRS = {"LOW": "a0 b0 a1 b1", "HIGH": "a2 b2 a3 b3", "FIRST": "a0 a1 b0 b1", "LAST": "a2 a3 b2 b3"}
"""Of every four lanes of a and b: shuffles that x86 has as instructions (UNPCKLPS, UNPCKHPS, SHUFPS)."""


def _shuffles(width: int) -> str:
    """`_PAIRS` as macros. By the compiler's own shuffle where there is one: LLVM 15 takes a vector that is written out
    lane by lane to pieces, and what it puts together of them takes four times as long."""
    own, plain = [], []
    for name, of in _PAIRS.items():
        lanes = [(x[0], q + int(x[1])) for q in range(0, width, 4) for x in of.split()]
        own.append(f"#define {name}(a, b) __builtin_shufflevector(a, b, "
                   f"{', '.join(str(i + width * (x == 'b')) for x, i in lanes)})")
        plain.append(f"#define {name}(a, b) ((V)({', '.join(f'({x}).s{i:x}' for x, i in lanes)}))")
    return """#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif
""" + "\n".join(["#ifdef SHUFFLES", *own, "#else", *plain, "#endif\n"])


def transposition(width: int) -> str:
    """gather(from, first, rows, columns, many, scale, to): rows first.. of a matrix into lanes: to[c * many + n],
    `many` vectors a column; rows beyond the last repeat it. scatter(from, first, rows, columns, many, to): back.

    Four columns at a time: a vector is put together of 4 numbers of every fourth row, so that each four of lanes is
    transposed on its own.
    """
    by_fours, back_by_fours = _by_fours(width) if width >= 4 else ("", "")
    return f"""{_shuffles(width) if width >= 4 else ""}
void gather(__global const T *from, int first, int rows, int columns, int many, float scale, V *to) {{
    for (int n = 0; n < many; n++) {{
        int row = first + n * {width};
        {by_fours}for (int c = 0; c < columns; c++)
            for (int i = 0; i < {width}; i++)
                ((float *)(to + c * many + n))[i] = LOAD1(from + (size_t)min(row + i, rows - 1) * columns + c) * scale;
    }}
}}
void scatter(const V *from, int first, int rows, int columns, int many, __global T *to) {{
    for (int n = 0; n < many; n++) {{
        int row = first + n * {width};
        {back_by_fours}for (int c = 0; c < columns; c++)
            for (int i = 0; i < {width} && row + i < rows; i++)
                STORE1(((const float *)(from + c * many + n))[i], to + (size_t)(row + i) * columns + c);
    }}
}}
"""


def _by_fours(width: int) -> tuple[str, str]:
    """What `gather` and `scatter` do with 4 columns and more."""
    fours, each = range(0, width, 4), range(4)
    steps = """                V b0 = LOW(a0, a1), b1 = HIGH(a0, a1), b2 = LOW(a2, a3), b3 = HIGH(a2, a3);
                V c0 = FIRST(b0, b2), c1 = LAST(b0, b2), c2 = FIRST(b1, b3), c3 = LAST(b1, b3);"""
    rows = "\n".join(f"            __global const T *r{i} = from + (size_t)min(row + {i}, rows - 1) * columns;"
                     for i in range(width))
    loads = "\n".join(f"                V a{i} = (V)({', '.join(f'LOAD4(r{q + i} + c)' for q in fours)}) * scale;"
                      for i in each)
    stores = "\n".join(f"                if (row + {q + i} < rows) STORE4(c{i}.s{q:x}{q + 1:x}{q + 2:x}{q + 3:x}, "
                       f"r + (size_t){q + i} * columns + c);" for q in fours for i in each)
    every = """for (int block = 0; block < columns; block += 4) {
                int c = min(block, columns - 4);  // the last block overlaps the one before"""
    return f"""if (columns >= 4) {{
{rows}
            {every}
{loads}
{steps}
                {" ".join(f"to[(c + {i}) * many + n] = c{i};" for i in each)}
            }}
        }} else """, f"""if (columns >= 4) {{
            __global T *r = to + (size_t)row * columns;
            {every}
                {" ".join(f"V a{i} = from[(c + {i}) * many + n];" for i in each)}
{steps}
{stores}
            }}
        }} else """


def exponential(w: int) -> str:
    """exponential(x): exp of what is not above 0, of -INFINITY too; 3e-7 of it off at most. No library's special
    cases."""
    return f"""
V exponential(V x) {{
    V t = fma(x, (V)({LOG2E}f), (V)(12582912.0f));  // 1.5 * 2**23: rounds to a whole number, in the lowest bits
    V n = t - 12582912.0f;
    V r = fma(n, (V)({-LN2[1]}f), fma(n, (V)({-LN2[0]}f), x));
    {_power(EXP, w)}
    return x < -87.0f ? (V)(0.0f) : q;
}}
"""


def exponential2(w: int) -> str:
    """exponential2(x): 2**x, of -INFINITY too; 3e-7 of it off at most, below 2**-126 nothing or a denormal, above
    2**127 that or more. Four instructions fewer than `exponential`; of AVX-512 it takes its own (Intel SDM 2C,
    VREDUCEPS and VSCALEFPS, which takes the whole part itself), four fewer again."""
    plain = f"""
V exponential2(V x) {{
    x = (V)(-127.0f) > x ? (V)(-127.0f) : x;  // 2**-127 comes out as bits of 0; NaN stays
    x = (V)(127.0f) < x ? (V)(127.0f) : x;
    V t = x + 12582912.0f;
    V r = x - (t - 12582912.0f);
    {_power(EXP2, w)}
    return q;
}}
"""
    if w != 16:
        return plain
    steps = " ".join(f"q = fma(q, r, (V)({c}f));" for c in reversed(POWER2[:-1]))
    return f"""
#if defined(__AVX512DQ__) && defined(__has_builtin)
#if __has_builtin(__builtin_ia32_reduceps512_mask) && __has_builtin(__builtin_ia32_scalefps512_mask)
#define SCALEF
#endif
#endif
#ifdef SCALEF
V exponential2(V x) {{
    V r = __builtin_ia32_reduceps512_mask(x, 1, x, (ushort)0xffff, 4);  // x - floor(x)
    V q = (V)({POWER2[-1]}f); {steps}
    q = __builtin_ia32_scalefps512_mask(q, x, x, (ushort)0xffff, 4);  // q 2**floor(x)
    return x < -126.0f ? (V)(0.0f) : q;  // products with denormals take a hundred times as long
}}
#else{plain}#endif
"""


def _power(by: tuple[float, ...], w: int) -> str:
    """q = (1 + r by(r)) 2**t, t whole in the lowest bits."""
    n = w if w > 1 else ""
    steps = " ".join(f"q = fma(q, r, (V)({c}f));" for c in (*reversed(by[:-1]), 1.0))
    return f"V q = (V)({by[-1]}f); {steps}\n    q = as_float{n}(as_int{n}(q) + (as_int{n}(t) << 23));"
