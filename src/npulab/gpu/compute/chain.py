"""Attention as product, softmax, product, with all scores in memory: what the fused kernel is compared with.

The products are tuned like the fused one: on a CPU 6 rows by 4 vectors at a time (24 of 32 registers), K packed once
for many rows; on a GPU tiles of A and B in local memory, 4 by 4 sums for a work item.
"""

from __future__ import annotations

from npulab.errors import UnsupportedError
from npulab.gpu.compute import softmax, vectors
from npulab.gpu.compute.attention_cpu import STACK
from npulab.gpu.compute.problems import Attention, Softmax
from npulab.gpu.compute.types import Buffer, Kernel, Launch, Lowered, Traits

ROWS = 6
VECTORS = 4
STRETCH = 192
"""Rows for one work item of a CPU: the packing of its columns is little beside."""
EACH = 4


def lower(what: Attention, traits: Traits) -> Lowered:
    """Raises: UnsupportedError if causal, or unless float32 or float16."""
    if what.causal:
        raise UnsupportedError("the chain of three kernels has no mask", want="causal=False")
    stored = vectors.number_bytes(what.number)
    q, k, v, o, scores = (Buffer(r) for r in ("input", "input1", "input2", "output", "scores"))
    product = _on_cpu if traits.cpu else _on_gpu
    rows = Softmax(what.batch * what.queries, what.keys, 1.0, what.number)
    found, size, group = product(what, traits, what.queries, what.keys, what.depth, True, what.scale)
    operations = 2.0 * what.batch * what.queries * what.keys
    square = stored * what.batch * what.queries * what.keys
    first = Launch(found, size, group, (q, k, scores), "scores", operations * what.depth,
                   stored * what.batch * (what.queries + what.keys) * what.depth + square)
    middle = softmax.lower(rows, traits).launches[0]
    middle = Launch(middle.kernel, middle.size, middle.group, (scores, scores, *middle.arguments[2:]), middle.label,
                    middle.operations, middle.traffic)
    found, size, group = product(what, traits, what.queries, what.width, what.keys, False, 1.0)
    last = Launch(found, size, group, (scores, v, o), "values", operations * what.width,
                  stored * what.batch * (what.queries + what.keys) * what.width + square)
    return Lowered((first, middle, last), scratch={"scores": square})


def _on_cpu(what: Attention, traits: Traits, rows: int, columns: int, inner: int, transposed: bool, scale: float
            ) -> tuple[Kernel, tuple[int, ...], tuple[int, ...]]:
    """C [rows, columns] = A [rows, inner] B scale; B [inner, columns], or transposed [columns, inner]: a strip of that
    one is on the thread's stack, where there is room."""
    w = vectors.fitting(traits, columns)
    many = min(VECTORS, columns // w)
    strip = w * many
    if transposed and 4 * strip * inner > STACK:
        return _on_gpu(what, traits, rows, columns, inner, transposed, scale)
    chunk = min(rows, max(STRETCH, -(-rows * -(-columns // strip) * what.batch // (8 * traits.compute_units))))
    chunk = vectors.up(min(chunk, rows), ROWS)
    ns, ms, factor = range(many), range(ROWS), vectors.literal(scale)
    if transposed:  # rows of K into lanes
        packed = f"V bt[{inner * many}];\n    gather(B, column, {columns}, {inner}, {many}, {factor}, bt);"
        load = " ".join(f"V b{n} = bt[i * {many} + {n}];" for n in ns)
    else:
        packed = ""
        load = " ".join(f"V b{n} = LOAD(B + (size_t)i * {columns} + column + {n * w});" for n in ns)
    sums = " ".join(f"V c{m}_{n} = (V)(0.0f);" for m in ms for n in ns)
    step = "\n".join(f"            {{ float a = LOAD1(a{m} + i); "
                     + " ".join(f"c{m}_{n} = fma((V)(a), b{n}, c{m}_{n});" for n in ns) + " }" for m in ms)
    ends = "\n".join(f"        if (row + {m} < {rows}) {{ " + " ".join(
        f"STORE(c{m}_{n}, C + (size_t)(row + {m}) * {columns} + column + {n * w});" for n in ns) + " }" for m in ms)
    lines = " ".join(f"__global const T *a{m} = A + (size_t)min(row + {m}, {rows - 1}) * {inner};" for m in ms)
    source = vectors.preamble(what.number, w) + vectors.transposition(w) + f"""
__kernel {vectors.attribute((1, 1, 1))} void product(__global const T *A, __global const T *B, __global T *C) {{
    int column = min((int)get_global_id(0) * {strip}, {columns - strip});  // the last strip overlaps the one before
    int first = get_global_id(1) * {chunk}, most = min(first + {chunk}, {rows});
    size_t b = get_global_id(2);
    A += b * {rows * inner}; B += b * {inner * columns}; C += b * {rows * columns};
    {packed}
    for (int row = first; row < most; row += {ROWS}) {{
        {lines}
        {sums}
        for (int i = 0; i < {inner}; i++) {{
            {load}
{step}
        }}
{ends}
    }}
}}
"""
    return Kernel(source, "product"), (-(-columns // strip), -(-rows // chunk), what.batch), (1, 1, 1)


def _on_gpu(what: Attention, traits: Traits, rows: int, columns: int, inner: int, transposed: bool, scale: float
            ) -> tuple[Kernel, tuple[int, ...], tuple[int, ...]]:
    side = 8 if vectors.group_items(traits) >= 64 else 4 if vectors.group_items(traits) >= 16 else 1
    tile, deep, items = side * EACH, 16, side * side
    rs, factor = range(EACH), vectors.literal(scale)
    load = " ".join(f"float a{i} = as[d * {tile + 1} + y * {EACH} + {i}];" for i in rs) + " " + " ".join(
        f"float b{j} = bs[d * {tile + 1} + x + {j * side}];" for j in rs)
    step = " ".join(f"c{i}_{j} = fma(a{i}, b{j}, c{i}_{j});" for i in rs for j in rs)
    ends = "\n".join(f"    if (row + {i} < {rows} && column + {j * side} < {columns}) "
                     f"STORE1(c{i}_{j} * {factor}, C + (size_t)(row + {i}) * {columns} + column + {j * side});"
                     for i in rs for j in rs)
    if transposed:
        across = (f"int c = first_column + i / {deep}, d = i % {deep};\n"
                  f"            bs[d * {tile + 1} + i / {deep}] = c < {columns} && at + d < {inner} ? "
                  f"LOAD1(B + (size_t)c * {inner} + at + d) : 0.0f;")
    else:
        across = (f"int c = first_column + i % {tile}, d = i / {tile};\n"
                  f"            bs[d * {tile + 1} + i % {tile}] = c < {columns} && at + d < {inner} ? "
                  f"LOAD1(B + (size_t)(at + d) * {columns} + c) : 0.0f;")
    source = vectors.preamble(what.number, 1) + f"""
__kernel {vectors.attribute((side, side, 1))} void product(__global const T *A, __global const T *B, __global T *C) {{
    __local float as[{deep * (tile + 1)}], bs[{deep * (tile + 1)}];
    int x = get_local_id(0), y = get_local_id(1), lid = y * {side} + x;
    int first_column = get_group_id(0) * {tile}, first_row = get_group_id(1) * {tile};
    int column = first_column + x, row = first_row + y * {EACH};
    size_t b = get_global_id(2);
    A += b * {rows * inner}; B += b * {inner * columns}; C += b * {rows * columns};
    {" ".join(f"float c{i}_{j} = 0.0f;" for i in rs for j in rs)}
    for (int at = 0; at < {inner}; at += {deep}) {{
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int i = lid; i < {tile * deep}; i += {items}) {{
            int r = first_row + i / {deep}, e = i % {deep};
            as[e * {tile + 1} + i / {deep}] = r < {rows} && at + e < {inner} ? LOAD1(A + (size_t)r * {inner} + at + e)
                                                                             : 0.0f;
            {across}
        }}
        barrier(CLK_LOCAL_MEM_FENCE);
        for (int d = 0; d < {deep}; d++) {{
            {load}
            {step}
        }}
    }}
{ends}
}}
"""
    size = (-(-columns // tile) * side, -(-rows // tile) * side, what.batch)
    return Kernel(source, "product"), size, (side, side, 1)
