"""Experiments as OpenCL C: made from parameters, with results that no compiler can know and a host can compute.

Every kernel takes its counts as arguments, so that nothing can be unrolled away, and writes what it computed.
Chains are exact in their element type (whole floats below 2**24, products of 2 and 1/2, integers modulo 2**32).
Products and sums of whole numbers may be put together, and compilers do it (16 multiplications by two numbers in turn
became one by their product). Those of integers are therefore of two numbers in turn, x = x + y and y = y + x: each
waits for the one before and is needed twice, so that none is left out by putting two together. They begin with what the
buffer has times a, 0: who counts cannot know it, and tells them from the loop's own sums, which can be known.
No two threads may be known to compute the same: a compiler for processors did so once for 16 of them, and some GPUs
have units for that. What would begin alike is therefore added the least of 0 and what the thread's place in the buffer
has: 0.
"""

from __future__ import annotations

from npulab.errors import UnsupportedError
from npulab.gpu.types import Element, Operation

STEPS = 16
"""Of a chain in one turn of its loop: what the loop itself costs is little beside."""
EXTENSIONS: dict[Element, str] = {"float16": "cl_khr_fp16", "int8x4": "cl_khr_integer_dot_product"}
"""That a device must have to compute on these (OpenCL 3.0 extension specification)."""
OWN = "fmin(out[get_global_id(0)], 0.0f)"
"""0 for each thread, but not known to be: results are above 0."""

DOT = "dot_4x8packed_uu_uint"
"""The function of cl_khr_integer_dot_product."""

CHASE = """
__kernel void chase(__global const uint *next, __global uint *out, uint turns) {
    uint p = out[0];
    for (uint i = 0; i < turns; i++) {
        p = next[p]; p = next[p]; p = next[p]; p = next[p];
        p = next[p]; p = next[p]; p = next[p]; p = next[p];
    }
    out[0] = p;
}
"""
CHASED = 8
"""Loads of a turn of CHASE."""

LAUNCH = "__kernel void launch(__global uint *out, uint turns) { if (turns) out[0] = turns; }"

BARRIER = """
__kernel void meet(__global uint *out, uint turns, uint apart) {{
    __local uint one[{group}], two[{group}];
    uint lid = get_local_id(0), other = (lid + apart) % {group};
    one[lid] = out[lid];
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint i = 0; i < turns; i++) {{
        two[lid] = one[other] + 1;
        barrier(CLK_LOCAL_MEM_FENCE);
        one[lid] = two[other] + 1;
        barrier(CLK_LOCAL_MEM_FENCE);
    }}
    out[lid] = one[lid];
}}
"""
MET = 2
"""Barriers of a turn of BARRIER. At each every thread stores a word and loads another thread's: processors have no
instruction for a barrier, but a word that was exchanged is seen in their code, and where it ends in the result."""

LOCAL = """
typedef {type} T;
#define CELLS {cells}
__kernel void local_loads(__global uint *out, uint turns, uint stride) {{
    __local T cells[CELLS];
    __local uint *words = (__local uint *)cells;
    uint lid = get_local_id(0), at = lid * stride;
    T x = (T)(0);
    for (uint i = lid; i < {words}; i += get_local_size(0)) words[i] = i * 2654435761u;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint i = 0; i < turns; i++) {{
        x += cells[at & (CELLS - 1)]; x += cells[(at + 1) & (CELLS - 1)];
        x += cells[(at + 2) & (CELLS - 1)]; x += cells[(at + 3) & (CELLS - 1)];
        at += 4 + ({first} & turns & 0x80000000u);
    }}
    out[get_global_id(0)] = {sum};
}}
"""
LOADED = 4
"""Loads of a turn of LOCAL."""

DIVERGE = """
__kernel void diverge(__global uint *out, uint turns, uint period, uint a, uint b) {
    uint x = get_global_id(0), lid = get_local_id(0);
    if ((lid / period) & 1) {
        for (uint i = 0; i < turns; i++) { x = x * a + b; x = x * a + b; x = x * a + b; x = x * a + b; }
    } else {
        for (uint i = 0; i < turns; i++) { x = x * b + a; x = x * b + a; x = x * b + a; x = x * b + a; }
    }
    out[get_global_id(0)] = x;
}
"""
DIVERGED = 4
"""Multiply-adds of a turn of DIVERGE."""

STREAM = """
typedef {type} T;
__kernel void read(__global const T *data, __global uint *out, uint size, uint offset, uint stride, uint turns) {{
    uint ls = get_local_size(0), step = ls * stride % size;
    uint at = (uint)(((ulong)get_group_id(0) * offset + (ulong)get_local_id(0) * stride) % size);
    T x = (T)(0);
    for (uint i = 0; i < turns; i++) {{
        x += data[at]; at += step; at -= at >= size ? size : 0;
        x += data[at]; at += step; at -= at >= size ? size : 0;
        x += data[at]; at += step; at -= at >= size ? size : 0;
        x += data[at]; at += step; at -= at >= size ? size : 0;
    }}
    out[get_global_id(0)] = {sum};
}}
__kernel void write(__global T *data, __global uint *out, uint size, uint offset, uint stride, uint turns) {{
    uint ls = get_local_size(0), step = ls * stride % size;
    uint at = (uint)(((ulong)get_group_id(0) * offset + (ulong)get_local_id(0) * stride) % size);
    T x = (T)(7);
    for (uint i = 0; i < turns; i++) {{
        data[at] = x; at += step; at -= at >= size ? size : 0;
        data[at] = x; at += step; at -= at >= size ? size : 0;
        data[at] = x; at += step; at -= at >= size ? size : 0;
        data[at] = x; at += step; at -= at >= size ? size : 0;
    }}
    out[get_global_id(0)] = at;
}}
__kernel void copy(__global T *data, __global uint *out, uint size, uint offset, uint stride, uint turns) {{
    uint ls = get_local_size(0), step = ls * stride % size;
    uint at = (uint)(((ulong)get_group_id(0) * offset + (ulong)get_local_id(0) * stride) % size);
    for (uint i = 0; i < turns; i++) {{
        data[at + size] = data[at]; at += step; at -= at >= size ? size : 0;
        data[at + size] = data[at]; at += step; at -= at >= size ? size : 0;
    }}
    out[get_global_id(0)] = at;
}}
"""
STREAMED = {"read": 4, "write": 4, "copy": 2}
"""Vectors of a turn of STREAM."""
IN_TURN = 16
"""Vectors of a turn of `parts` and `spaced`."""


def vector(width: int) -> str:
    """The type of `width` bytes: 4, 8, 16, 32, 64."""
    return "uint" if width == 4 else f"uint{width // 4}"


def added(name: str, width: int) -> str:
    """The sum of the lanes of a variable of `width` bytes."""
    return name if width == 4 else " + ".join(f"{name}.s{i:x}" for i in range(width // 4))


def stream(width: int) -> str:
    """The three kernels for vectors of `width` bytes: 4, 8, 16, 32, 64."""
    return STREAM.format(type=vector(width), sum=added("x", width))


def parts(width: int, number: int) -> str:
    """The three kernels of `stream` for groups of one thread, as processors like them: a turn has IN_TURN vectors at
    places that are known when it begins, in as many parts of the memory, `size` vectors each, and four sums that do not
    wait for each other. size, offset: multiples of IN_TURN / number. apart: vectors from a group's memory to the next
    group's, 0 where all go through the same.

    number: 1, 2, 4, 8, 16. A prefetcher follows several ways through memory at once, each until a page ends. A sum
    begins with a function's result: for processors that have registers of 64 bytes compilers take those of 32 (LLVM
    prefers them for skylake-avx512, for which PoCL compiles) unless a function of whole vectors was called.
    """
    row = IN_TURN // number
    at = [f"at + {j}u * size + {k}u" for k in range(row) for j in range(number)]
    read = "\n        ".join(f"x{i % 4} += data[{a}];" for i, a in enumerate(at))
    write = "\n        ".join(f"data[{a}] = x;" for a in at)
    copy = "\n        ".join(f"data[{number}u * size + {a}] = data[{a}];" for a in at)
    return _of_one_thread(width, row, "T x0 = min((T)(0), (T)(turns))", read, write, copy)


def spaced(width: int, stride: int) -> str:
    """As `parts`, with loads and stores of `width` bytes, neighbours `stride` such vectors apart. size, offset:
    multiples of IN_TURN * stride. They are volatile: compilers put four of four bytes side by side in one of 16. What
    is stored says the stride."""
    p = "__global volatile T *p = data + at;"
    read = "\n        ".join((f"const {p}", *(f"x{k % 4} += p[{k * stride}];" for k in range(IN_TURN))))
    write = "\n        ".join((p, *(f"p[{k * stride}] = x;" for k in range(IN_TURN))))
    copy = "\n        ".join((p, "__global volatile T *q = p + size;",
                              *(f"q[{k * stride}] = p[{k * stride}];" for k in range(IN_TURN))))
    return _of_one_thread(width, IN_TURN * stride, "T x0 = (T)(0)", read, write, copy, stored(stride))


def stored(stride: int) -> int:
    """The number that `spaced` stores."""
    return 6 + stride


def _of_one_thread(width: int, row: int, start: str, read: str, write: str, copy: str, number: int = 7) -> str:
    """Kernels for groups of one thread, by their turns; a turn goes `row` vectors further. number: that is stored."""
    def kernel(way: str, const: str, start: str, turn: str, out: str) -> str:
        return f"""
__kernel void {way}(__global {const}T *data, __global uint *out, uint size, uint offset, uint turns, uint apart) {{
    uint at = get_group_id(0) * offset % size;
    data += get_group_id(0) * apart;
    {start}
    for (uint i = 0; i < turns; i++) {{
        {turn}
        at += {row}; at = at >= size ? 0 : at;
    }}
    {out};
}}
"""

    return f"typedef {vector(width)} T;" + "".join((
        kernel("read", "const ", f"{start}, x1 = x0, x2 = x0, x3 = x0;", read,
               f"x0 += x1 + x2 + x3; out[get_global_id(0)] = {added('x0', width)}"),
        kernel("write", "", f"T x = (T)({number});", write, "out[get_global_id(0)] = at"),
        kernel("copy", "", "", copy, "out[get_global_id(0)] = at")))


def barrier(group: int) -> str:
    """Of so many threads."""
    return BARRIER.format(group=group)


def local(words: int, width: int = 4) -> str:
    """`words`: a power of two, loaded `width` bytes at once."""
    return LOCAL.format(words=words, cells=4 * words // width, type=vector(width), sum=added("x", width),
                        first="x" if width == 4 else "x.s0")


def chain(operation: Operation, element: Element, width: int, chains: int) -> str:
    """A kernel `chain(out, turns, a, b, c)`; roots and products of floats begin with c. Results by
    `npulab.gpu.exact.chained`.

    Raises: UnsupportedError for a step that an element type has not.
    """
    scalar = {"float32": "float", "float16": "half"}.get(element, "uint")
    step = _step(operation, element)
    if element in ("int8x4", "char4"):  # a word is a vector already, and dot products have no wider ones
        width, chains, weight = 1, width * chains, width
    else:
        weight = 1
    vector = scalar if width == 1 else f"{scalar}{width}"
    names = [f"x{c}" for c in range(chains)]
    turn = "\n        ".join(" ".join(step[s % len(step)].format(x=f"x{c}", y=f"y{c}") for c in range(chains))
                             for s in range(STEPS))
    start = " ".join(f"V {x} = (V)((S)(get_local_id(0) & 7)) + (V)((S){c // weight + 1});" for c, x in enumerate(names))
    if operation in ("mul", "special"):
        start = " ".join((f"S begin = c + (S){OWN};", *(f"V {x} = (V)(begin);" for x in names)))
    total = " + ".join(names)
    if element == "int32" and operation != "fma":
        start, total = _two(operation, chains)
    parts = total if width == 1 else " + ".join(f"total.s{i:x}" for i in range(width))
    pragma = f"#pragma OPENCL EXTENSION {EXTENSIONS[element]} : enable\n" if element == "float16" else ""
    return f"""{pragma}typedef {scalar} S;
typedef {vector} V;
__kernel void chain(__global {"float" if "float" in element else "uint"} *out, uint turns, {_argument(element)} a0,
                    {_argument(element)} b0, {_argument(element)} c0) {{
    S a = (S)a0, b = (S)b0, c = (S)c0;
    {start}
    for (uint i = 0; i < turns; i++) {{
        {turn}
    }}
    V total = {total};
    out[get_global_id(0)] = {parts if width > 1 else "total"};
}}
"""


def _two(operation: Operation, chains: int) -> tuple[str, str]:
    """(beginning, result) of chains of two integers each. Products begin with odd ones, or would soon be 0."""
    begin = "2 * (first + {}) + 1" if operation == "mul" else "first + {}"
    numbers = [f"V x{c} = (V)({begin.format(c + 1)}), y{c} = x{c};" for c in range(chains)]
    return (" ".join(("S first = (S)(get_local_id(0) & 7) + out[get_global_id(0)] * a;", *numbers)),
            " + ".join(f"(x{c} ^ y{c})" for c in range(chains)))


def _argument(element: Element) -> str:
    return "float" if "float" in element else "uint"


def _step(operation: Operation, element: Element) -> tuple[str, ...]:
    """Statements of steps, taken in turn."""
    found: dict[tuple[bool, Operation], tuple[str, ...]] = {
        (True, "fma"): ("{x} = fma({x}, (V)(a), (V)(b));",),
        (True, "mul"): ("{x} = {x} * a;", "{x} = {x} * b;"),
        (True, "add"): ("{x} = {x} + a;", "{x} = {x} + b;"),
        (True, "special"): ("{x} = rsqrt({x});",),
        (False, "fma"): ("{x} = {x} * a + b;",),
        (False, "mul"): ("{x} = {x} * {y};", "{y} = {y} * {x};"),
        (False, "add"): ("{x} = {x} + {y};", "{y} = {y} + {x};"),
    }
    if element == "int8x4" and operation == "fma":
        return (f"{{x}} = {DOT}({{x}}, a) + b;",)
    if element == "char4" and operation == "fma":
        return ("{x} = as_uchar4({x}).x * as_uchar4(a).x + as_uchar4({x}).y * as_uchar4(a).y "
                "+ as_uchar4({x}).z * as_uchar4(a).z + as_uchar4({x}).w * as_uchar4(a).w + b;",)
    if (key := (element.startswith("float"), operation)) not in found or element in ("int8x4", "char4"):
        raise UnsupportedError(f"there is no chain of {operation} on {element}")
    return found[key]


def hold(registers: int) -> str:
    """A kernel `hold(out, turns, a, b)` whose loop keeps `registers` numbers alive, each made of the next: with a = b =
    1/2 all of them go to 1."""
    names = [f"r{i}" for i in range(registers)]
    start = " ".join((f"float own = {OWN};", *(f"float {x} = a * {i + 1}.0f + own;" for i, x in enumerate(names))))
    turn = "\n        ".join(f"{x} = fma({y}, a, b);" for x, y in zip(names, [*names[1:], names[0]], strict=True))
    return f"""__kernel void hold(__global float *out, uint turns, float a, float b) {{
    {start}
    for (uint i = 0; i < turns; i++) {{
        {turn}
    }}
    out[get_global_id(0)] = {" + ".join(names)};
}}
"""
