"""Attention on a GPU: a group of work items has a tile of queries, and goes through tiles of keys in local memory.

Each work item has `each` x `each` scores of a tile, and of the output its queries' columns x, x + across, ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from npulab.errors import CapacityError
from npulab.gpu.compute import vectors
from npulab.gpu.compute.problems import Attention
from npulab.gpu.compute.types import Kernel, Traits

SHAPES = ((16, 16, 4), (8, 8, 4), (16, 4, 4), (8, 8, 2), (8, 4, 2), (4, 4, 2), (4, 4, 1), (2, 2, 1), (1, 1, 1))
"""Across, down, each: the first that has room is taken."""


MORE = ((16, 8, 4), (8, 16, 4), (32, 4, 4), (32, 8, 4), (16, 8, 2), (16, 16, 2), (32, 8, 2))
"""That are tried, too."""


class Items(msgspec.Struct, frozen=True, tag="items"):
    """Work items of a group: for keys, for queries; keys and queries of each; whether it computes on halves."""

    across: int
    down: int
    each: int
    halves: bool = False


def candidates(traits: Traits, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> list[Items]:
    """In their order, those of larger groups behind. Whether local memory has room for them is not looked at."""
    first = [s for s in shapes if s[0] * s[1] <= vectors.group_items(traits)]
    found = dict.fromkeys((*first, *(s for s in (*shapes, *MORE) if s[0] * s[1] <= traits.group_max)))
    return [Items(*s) for s in found]


def local_bytes(what: Attention, across: int, down: int, each: int, halves: bool = False) -> int:
    """Of a group: queries, keys or values, scores, maxima."""
    queries, keys = down * each, across * each
    scores = keys * (queries + 1) if halves else queries * (keys + 1)
    read = what.depth * (queries + 1) + keys * (max(what.depth, what.width) + 1) + scores
    return (2 if halves else 4) * read + 4 * queries * across


def kernel(what: Attention, traits: Traits, choice: Items | None, halves: bool = False
           ) -> tuple[Kernel, tuple[int, ...], tuple[int, ...]]:
    """Raises: CapacityError if local memory is too small for any tile."""
    shapes = [(choice.across, choice.down, choice.each)] if choice else SHAPES
    items = vectors.group_items(traits) if not choice else traits.group_max
    fit = [s for s in shapes if s[0] * s[1] <= items and local_bytes(what, *s, halves) <= traits.local_bytes]
    if not fit:
        raise CapacityError("attention has no room in local memory", got=f"{traits.local_bytes} bytes",
                            want=f"{min(local_bytes(what, *s, halves) for s in shapes)} for heads of {what.depth}")
    across, down, each = fit[0]
    source = _source(what, across, down, each, halves)
    tiles = -(-what.queries // (down * each))
    return Kernel(source, "attention"), (tiles * across, down, what.batch), (across, down, 1)


def _source(what: Attention, across: int, down: int, each: int, halves: bool) -> str:
    """halves: Q, K, V and exponentials are halves in local memory, queries of a work item next to each other: it
    computes on all of them at once. Scores are scaled when they are summed."""
    depth, width, items = what.depth, what.width, across * down
    bq, bk = down * each, across * each
    columns = -(-width // across)
    rs = range(each)
    pitch = max(depth, width) + 1  # odd: keys beside each other lie in different banks
    if halves:
        head = vectors.preamble(what.number, each) + vectors.half_operations(each)
        number, load, factor = "H1", "HALF_ONE", ""
        scores, kept, outputs = _on_halves(what, across, down, each, pitch)
    else:
        head = vectors.preamble(what.number, 1) + "#define FLOAT_ONE(p, i) LOAD1((p) + (i))\n"
        number, load, factor = "float", "FLOAT_ONE", " * scale"
        scores, kept, outputs = _on_floats(what, across, down, each, pitch)
    hidden = " || key + x + {0} > first + y * {1} + {2}" if what.causal else ""
    mask = "\n".join(f"        if (key + x + {j * across} >= keys{hidden.format(j * across, each, i)}) "
                     f"s{i}_{j} = -INFINITY;" for i in rs for j in rs)
    highest = "\n".join(f"        most[(y * {each} + {i}) * {across} + x] = {_most([f's{i}_{j}' for j in rs])};"
                        for i in rs)
    softmax = "\n".join(f"""        {{
            float high = high{i};
            for (int j = 0; j < {across}; j++) high = fmax(high, most[(y * {each} + {i}) * {across} + j]);
            part{i} = exp(high{i} - high);
            high{i} = high;
            sum{i} *= part{i};
            {" ".join(f"s{i}_{j} = exp(s{i}_{j} - high); sum{i} += s{i}_{j};" for j in rs)}
        }}""" for i in rs)
    ends = "\n".join(f"""    {{
        float total = 0.0f;
        for (int j = 0; j < {across}; j++) total += most[(y * {each} + {i}) * {across} + j];
        int row = first + y * {each} + {i};
        __global T *to = o + (size_t)row * {width} + x;
        if (row < queries) {{
            {" ".join(f"if (x + {c * across} < {width}) STORE1(o{i}_{c} / total, to + {c * across});"
                      for c in range(columns))}
        }}
    }}""" for i in rs)
    return head + f"""
__kernel {vectors.attribute((across, down, 1))} void attention(__global const T *q, __global const T *k,
        __global const T *v, __global T *o, int queries, int keys, float scale) {{
    __local {number} qs[{depth * (bq + 1)}], kv[{bk * pitch}], p[{bk * (bq + 1) if halves else bq * (bk + 1)}];
    __local float most[{bq * across}];
    int x = get_local_id(0), y = get_local_id(1), lid = y * {across} + x, first = get_group_id(0) * {bq};
    size_t b = get_global_id(2);
    q += b * queries * {depth}; k += b * keys * {depth}; v += b * keys * {width}; o += b * queries * {width};
    for (int i = lid; i < {bq * depth}; i += {items})  // the last query stands for those beyond
        qs[i % {depth} * {bq + 1} + i / {depth}] =
            {load}(q, (size_t)min(first + i / {depth}, queries - 1) * {depth} + i % {depth}){factor};
    {" ".join(f"float high{i} = -INFINITY, sum{i} = 0.0f, part{i};" for i in rs)}
    {" ".join(f"float o{i}_{c} = 0.0f;" for i in rs for c in range(columns))}
    int last = {f"min(keys, first + {bq})" if what.causal else "keys"};
    for (int key = 0; key < last; key += {bk}) {{
        barrier(CLK_LOCAL_MEM_FENCE);  // values and scores of the tile before have been read
        for (int i = lid; i < {bk * depth}; i += {items})
            kv[i / {depth} * {pitch} + i % {depth}] =
                {load}(k, (size_t)min(key + i / {depth}, keys - 1) * {depth} + i % {depth});
        barrier(CLK_LOCAL_MEM_FENCE);
        {" ".join(f"float s{i}_{j} = 0.0f;" for i in rs for j in rs)}
{scores}
{mask}
{highest}
        barrier(CLK_LOCAL_MEM_FENCE);  // maxima are there, keys have been read
        for (int i = lid; i < {bk * width}; i += {items})
            kv[i / {width} * {pitch} + i % {width}] =
                {load}(v, (size_t)min(key + i / {width}, keys - 1) * {width} + i % {width});
{softmax}
{kept}
        barrier(CLK_LOCAL_MEM_FENCE);
        {" ".join(f"o{i}_{c} *= part{i};" for i in rs for c in range(columns))}
{outputs}
    }}
    barrier(CLK_LOCAL_MEM_FENCE);
    {" ".join(f"most[(y * {each} + {i}) * {across} + x] = sum{i};" for i in rs)}
    barrier(CLK_LOCAL_MEM_FENCE);
{ends}
}}
"""


def _on_floats(what: Attention, across: int, down: int, each: int, pitch: int) -> tuple[str, str, str]:
    """How scores are summed, exponentials kept in p and outputs summed."""
    bq, bk, rs = down * each, across * each, range(each)
    step = " ".join(f"float q{i} = qs[d * {bq + 1} + y * {each} + {i}];" for i in rs) + " " + " ".join(
        f"float k{j} = kv[(x + {j * across}) * {pitch} + d];" for j in rs)
    sums = " ".join(f"s{i}_{j} = fma(q{i}, k{j}, s{i}_{j});" for i in rs for j in rs)
    kept = " ".join(f"p[(y * {each} + {i}) * {bk + 1} + x + {j * across}] = s{i}_{j};" for i in rs for j in rs)
    out = " ".join(f"float p{i} = p[(y * {each} + {i}) * {bk + 1} + j];" for i in rs) + "\n" + "\n".join(
        f"            {{ float e = kv[j * {pitch} + min(x + {c * across}, {what.width - 1})]; "
        + " ".join(f"o{i}_{c} = fma(p{i}, e, o{i}_{c});" for i in rs) + " }" for c in range(-(-what.width // across)))
    return f"""        for (int d = 0; d < {what.depth}; d++) {{
            {step}
            {sums}
        }}""", f"        {kept}", f"""        for (int j = 0; j < {bk}; j++) {{
            {out}
        }}"""


def _on_halves(what: Attention, across: int, down: int, each: int, pitch: int) -> tuple[str, str, str]:
    """As `_on_floats`, four products at a time as halves. Lanes are queries."""
    bq, bk, rs = down * each, across * each, range(each)

    def queries(array: str, step: str) -> str:
        at = f"{array} + ({step}) * {bq + 1} + y * {each}"
        return f"vload{each}(0, {at})" if each > 1 else f"*({at})"

    def lane(name: str, i: int) -> str:
        return f"{name}.s{i:x}" if each > 1 else name

    def added(us: range, left: str, right: str, sums: str) -> str:
        """left, right: names of vectors, {0} the step's number."""
        short = vectors.short_sum([(left.format(u), right.format(u)) for u in us])
        return f"V added = {short}; " + " ".join(f"{sums.format(i)} += {lane('added', i)};" for i in rs)

    def score(us: range) -> str:
        lines = ["        " + " ".join(f"H q{u} = {queries('qs', f'd + {u}')};" for u in us)]
        lines += ["        { " + " ".join(
            f"H k{u} = (H)(kv[(x + {j * across}) * {pitch} + d + {u}]);" for u in us) + " "
            + added(us, "q{0}", "k{0}", f"s{{0}}_{j}") + " }" for j in rs]
        return "\n".join(lines)

    def output(us: range) -> str:
        lines = ["        " + " ".join(f"H p{u} = {queries('p', f'j + {u}')};" for u in us)]
        lines += ["        { " + " ".join(
            f"H e{u} = (H)(kv[(j + {u}) * {pitch} + min(x + {c * across}, {what.width - 1})]);" for u in us) + " "
            + added(us, "p{0}", "e{0}", f"o{{0}}_{c}") + " }" for c in range(-(-what.width // across))]
        return "\n".join(lines)

    def loop(name: str, count: int, body: Callable[[range], str]) -> str:
        whole, rest = count // vectors.FOUR * vectors.FOUR, count % vectors.FOUR
        text = f"        for (int {name} = 0; {name} < {whole}; {name} += {vectors.FOUR}) {{\n" + body(
            range(vectors.FOUR)) + "\n        }" if whole else ""
        return text + (f"\n        {{ const int {name} = {whole};\n{body(range(rest))}\n        }}" if rest else "")

    scaled = " ".join(f"s{i}_{j} *= scale;" for i in rs for j in rs)
    kept = []
    for j in rs:
        value = f"HALVES((V)({', '.join(f's{i}_{j}' for i in rs)}))"
        at = f"p + (x + {j * across}) * {bq + 1} + y * {each}"
        kept.append(f"        vstore{each}({value}, 0, {at});" if each > 1 else f"        *({at}) = {value};")
    return f"{loop('d', what.depth, score)}\n        {scaled}", "\n".join(kept), loop("j", bk, output)


def _most(names: list[str]) -> str:
    found = names[0]
    for name in names[1:]:
        found = f"fmax({found}, {name})"
    return found
