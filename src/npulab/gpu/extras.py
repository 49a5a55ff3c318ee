"""Experiments that not every OpenCL device has room for, or use of: streams in parts, samples of what was read, images,
constant memory, stores to local memory, mapping.

Each is of an `npulab.gpu.opencl.OpenCL`, is checked by what the host computes, and follows `npulab.gpu.types.Extra`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import UnsupportedError
from npulab.gpu import counting, kernels
from npulab.gpu.counting import Asked
from npulab.gpu.filled import Sums
from npulab.gpu.shaders import TILE
from npulab.gpu.types import Order, Timing, Way

if TYPE_CHECKING:
    from npulab.gpu.opencl import OpenCL

NARROW, WIDE = (4, 8), (16, 32, 64)
"""Bytes of a load of `stream_parts`."""
SMALL = 16
"""Threads of a group that reads images on a processor, or multiplies bytes: the code of all of them is followed to be
counted, and PoCL has a hundred instructions for a texel."""
TURNS_MAX = 1 << 20
"""Of a loop, unless memory takes more."""
READ = 4
"""Texels, words or stores of a turn of each kernel."""
SAME = kernels.IN_TURN << 10
"""Bytes that turns of all strides up to 64 words go through whole."""
PAGE, LINE = 4096, 64
"""Bytes of a processor's smallest page and of a load of PRIME: no processor's lines are shorter."""
SAMPLED, A_PAGE = 1024, 4
"""Loads of `primed`: few beside what a large cache holds, and few of the lines of a page, so that prefetchers find no
order."""
WORDS = 1024
"""Of constant memory: 4 KiB of the 64 that each device has at least (OpenCL 1.2, table 4.3)."""

IMAGE = """
__constant sampler_t NEAREST = CLK_NORMALIZED_COORDS_FALSE | CLK_ADDRESS_NONE | CLK_FILTER_NEAREST;
#define TEXEL(at) read_imageui(data, NEAREST, PLACE(at))
__kernel void image(__read_only image2d_t data, __global uint *out, uint width, uint size, uint offset, uint turns) {
    uint step = get_local_size(0) % size;
    uint at = (uint)(((ulong)get_group_id(0) * offset + (ulong)get_local_id(0)) % size);
    uint4 x = (uint4)(0);
    for (uint i = 0; i < turns; i++) {
        x += TEXEL(at); at += step; at -= at >= size ? size : 0;
        x += TEXEL(at); at += step; at -= at >= size ? size : 0;
        x += TEXEL(at); at += step; at -= at >= size ? size : 0;
        x += TEXEL(at); at += step; at -= at >= size ? size : 0;
    }
    out[get_global_id(0)] = SUM;
}
"""
PLACES: dict[Order, str] = {
    "rows": "(int2)((int)((at) & (width - 1)), (int)((at) / width))",
    "columns": "(int2)((int)((at) / width), (int)((at) & (width - 1)))",
    "tiles": "(int2)((int)(((at) / 16 & (width - 1)) * 4 + ((at) & 3)), (int)((at) / 16 / width * 4 + ((at) / 4 & 3)))"}
"""Of texel number `at`. width: texels of a row, or of a column, a power of two; or tiles of a row."""

CONSTANT = """
typedef {type} T;
__kernel void constants(__constant T *cells, __global uint *out, uint turns, uint spread) {{
    uint at = get_local_id(0) * spread;
    T x = (T)(0);
    for (uint i = 0; i < turns; i++) {{
        x += cells[at & {last}]; x += cells[(at + 1) & {last}];
        x += cells[(at + 2) & {last}]; x += cells[(at + 3) & {last}];
        at += 4 + ({first} & turns & 0x80000000u);
    }}
    out[get_global_id(0)] = {sum};
}}
"""

LOCAL_WRITE = """
typedef {type} T;
#define CELLS {cells}
__kernel void local_stores(__global uint *out, uint turns, uint stride) {{
    __local T cells[CELLS];
    __local uint *words = (__local uint *)cells;
    uint lid = get_local_id(0), at = lid * stride;
    for (uint i = lid; i < {words}; i += get_local_size(0)) words[i] = 0;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint i = 0; i < turns; i++) {{
        uint w = at & (CELLS - 1); cells[w] = (T)(w * 2654435761u);
        w = (at + 1) & (CELLS - 1); cells[w] = (T)(w * 2654435761u);
        w = (at + 2) & (CELLS - 1); cells[w] = (T)(w * 2654435761u);
        w = (at + 3) & (CELLS - 1); cells[w] = (T)(w * 2654435761u);
        at += 4;
    }}
    barrier(CLK_LOCAL_MEM_FENCE);
    uint x = 0;
    for (uint i = lid; i < {words}; i += get_local_size(0)) x += words[i] + 1;
    out[get_global_id(0)] = x;
}}
"""

PRIME = """
__kernel void prime(__global const uint16 *data, __global uint *out, uint first, uint turns) {
    uint at = first + get_group_id(0) * turns * 16;
    uint16 x0 = (uint16)(0), x1 = x0, x2 = x0, x3 = x0;
    for (uint i = 0; i < turns; i++) {
        for (uint k = 0; k < 16; k += 4) {
            x0 += data[at + k]; x1 += data[at + k + 1]; x2 += data[at + k + 2]; x3 += data[at + k + 3];
        }
        at += 16;
    }
    x0 += x1 + x2 + x3;
    x0.s01234567 += x0.s89abcdef;
    x0.s0123 += x0.s4567;
    out[get_group_id(0)] = x0.s0 + x0.s1 + x0.s2 + x0.s3;
}
"""


def stream_parts(bench: OpenCL, footprint: int, width: int, way: Way, parts: int, own: bool = False, stride: int = 1
                 ) -> Timing:
    spaced = stride > 1 or width not in WIDE
    row, lanes = kernels.IN_TURN * stride // parts, width // 4
    size = footprint // width // parts // row * row  # vectors of a part
    if spaced and footprint >= 1 << 20 and SAME % (row * width) == 0:  # filled once for all strides
        size = (footprint & -SAME) // width
    if parts > 1 and size > row and size // row % 2 == 0:
        size -= row  # parts that are powers of two apart share sets of caches
    if own and way != "write":
        raise UnsupportedError("memory of their own is for stores", got=way)
    if size < 1 or width not in (*NARROW, *WIDE) or (spaced and parts > 1):
        raise UnsupportedError("a stream has no room", got=f"{footprint} bytes in {parts} parts of vectors of {width}, "
                               f"{stride} apart")
    # one for a core where each has its own: of several, one after the other, each would first fetch what is its
    groups = bench.limits.compute_units if own else bench.full_groups
    apart = parts * size if own else 0
    buffer, sums = bench.filled(bench, way, parts * groups if own else parts, size, lanes)
    out = bench._buffer(np.zeros(groups, np.uint32))
    kernel = bench._kernel(kernels.spaced(width, stride) if spaced else kernels.parts(width, parts), way)
    offset = max(row, size // groups // row * row)
    spots = np.arange(groups)

    def run(turns: int) -> tuple[float, str]:
        seconds = bench._time(kernel, (groups,), (1,), buffer, out, np.uint32(size), np.uint32(offset),
                              np.uint32(turns), np.uint32(apart))
        wrong = bench._checked(way, out, sums, spots, 1, offset, stride, stride, turns, row // stride)
        if spaced and way == "write" and not wrong:  # where the loop ends says nothing of what lies between its stores
            vectors = bench._read(buffer, row * lanes).reshape(-1, stride * lanes) == kernels.stored(stride)
            if not vectors[:, :lanes].all() or vectors[:, lanes:].any():
                wrong = f"the memory does not hold what was stored, {stride * width} bytes apart"
        return seconds, wrong

    asked = Asked("bytes", {f"{what} bytes": kernels.IN_TURN * width for what in ("load", "store")
                            if way in ("copy", {"load": "read", "store": "write"}[what])}, each=width * spaced)
    whole = -(-size // row) if own else -(-size // (groups * row))
    return bench._measured(run, asked, max(TURNS_MAX, whole), whole)


def image(bench: OpenCL, footprint: int, texel: int, order: Order) -> Timing:
    cl = bench.cl
    if not bench.device.image_support:
        raise UnsupportedError("the device has no images")
    texels = footprint // texel
    width = 1
    while width * width < texels and 2 * width <= int(bench.device.image2d_max_width):
        width *= 2
    height = texels // width
    if order != "rows":
        height = 1 << height.bit_length() - 1
    if height < 1 or height > int(bench.device.image2d_max_height) or (order == "tiles" and min(width, height) < TILE):
        raise UnsupportedError("the device has no images of this size", got=f"{footprint} bytes")
    size = width * height
    data = (np.arange(size * texel // 4, dtype=np.uint32) * np.uint32(2654435761)) >> np.uint32(7)
    flags = cl.mem_flags.READ_ONLY | cl.mem_flags.COPY_HOST_PTR
    channels = {4: cl.channel_order.R, 8: cl.channel_order.RG, 16: cl.channel_order.RGBA}[texel]
    kind = cl.ImageFormat(channels, cl.channel_type.UNSIGNED_INT32)
    if kind not in cl.get_supported_image_formats(bench.context, flags, cl.mem_object_type.IMAGE2D):
        raise UnsupportedError(f"the device has no images of {texel // 4} 32-bit integers a texel")
    make = getattr(cl, "create_image", cl.Image)  # older bindings have the latter alone
    picture = bench._do(lambda: make(bench.context, flags, kind, shape=(width, height), hostbuf=data))
    kernel = bench._kernel(image_source(texel, order), "image")
    group = min(bench.group, SMALL) if bench.device.type & cl.device_type.CPU else bench.group
    groups = bench.full_groups * bench.group // group
    out = bench._buffer(np.zeros(groups * group, np.uint32))
    offset, step = max(1, size // groups), group % size
    row = {"rows": width, "columns": height, "tiles": width // TILE}[order]
    sums = Sums(in_order(data.reshape(height, width, texel // 4).sum(axis=2, dtype=np.uint32), order))
    spots = np.random.default_rng(0).integers(0, groups * group, 8)

    def run(turns: int) -> tuple[float, str]:
        seconds = bench._time(kernel, (groups * group,), (group,), picture, out, np.uint32(row), np.uint32(size),
                              np.uint32(offset), np.uint32(turns))
        return seconds, bench._checked("read", out, sums, spots, group, offset, 1, step, turns)

    return bench._measured(run, Asked("bytes", {"load bytes": READ * texel}, texel=texel),
                           whole=-(-size // (groups * group * READ)))


def image_source(texel: int, order: Order) -> str:
    """A read gives four numbers, of which as many are added up as are stored."""
    total = "x.s0" if texel == 4 else kernels.added("x", texel)
    return f"#define PLACE(at) {PLACES[order]}\n#define SUM {total}\n{IMAGE}"


def in_order(picture: NDArray[np.uint32], order: Order) -> NDArray[np.uint32]:
    """The texels of a picture one after the other."""
    if order == "tiles":
        high, wide = (n // TILE for n in picture.shape)
        picture = picture.reshape(high, TILE, wide, TILE).swapaxes(1, 2)
    return np.ascontiguousarray(picture.T if order == "columns" else picture).ravel()


def constant(bench: OpenCL, spread: bool, width: int) -> Timing:
    count = 4 * WORDS // width
    kernel = bench._kernel(CONSTANT.format(type=kernels.vector(width), last=count - 1, sum=kernels.added("x", width),
                                           first="x" if width == 4 else "x.s0"), "constants")
    group, threads = bench.group, bench.group * bench.full_groups
    cells = ((np.arange(WORDS, dtype=np.uint64) * 2654435761) % (1 << 32)).astype(np.uint32)
    sums = cells.reshape(count, -1).sum(axis=1, dtype=np.uint64)
    table, out = bench._buffer(cells), bench._buffer(np.zeros(threads, np.uint32))

    def run(turns: int) -> tuple[float, str]:
        seconds = bench._time(kernel, (threads,), (group,), table, out, np.uint32(turns), np.uint32(spread))
        found = bench._read(out, threads)
        for i in (0, group - 1):
            at = (i * spread + np.arange(turns * READ, dtype=np.uint64)) % count
            want = int(sums[at].sum(dtype=np.uint64)) % (1 << 32)
            if int(found[i]) != want:
                return seconds, f"thread {i} read {found[i]}, not {want}"
        return seconds, ""

    return bench._measured(run, Asked("bytes", {"load bytes": width * READ}), 1 << 18)


def local_write(bench: OpenCL, stride: int, width: int) -> Timing:
    words, lanes = bench.words, width // 4
    count = words // lanes
    kernel = bench._kernel(LOCAL_WRITE.format(words=words, cells=count, type=kernels.vector(width)), "local_stores")
    group, threads = bench.group, bench.group * bench.full_groups
    out = bench._buffer(np.zeros(threads, np.uint32))
    written = (np.arange(count, dtype=np.uint64) * 2654435761) % (1 << 32)

    def run(turns: int) -> tuple[float, str]:
        seconds = bench._time(kernel, (threads,), (group,), out, np.uint32(turns), np.uint32(stride))
        found = bench._read(out, threads)
        vectors = np.zeros(count, np.uint64)
        many = min(turns * READ, count)
        for lane in range(group if many < count else 1):
            at = (lane * stride + np.arange(many)) % count
            vectors[at] = written[at]
        cells = vectors.repeat(lanes)
        for i in (0, group - 1):
            want = int((cells[i::group] + 1).sum(dtype=np.uint64)) % (1 << 32)
            if int(found[i]) != want:
                return seconds, f"thread {i} found {found[i]} in local memory, not {want}"
        return seconds, ""

    return bench._measured(run, Asked("stores", {"store bytes": width * READ}, 4), 1 << 18)


def map_buffer(bench: OpenCL, size: int, repeats: int) -> Timing:
    cl = bench.cl
    flags = cl.mem_flags.READ_WRITE | cl.mem_flags.ALLOC_HOST_PTR
    buffer = bench._do(lambda: cl.Buffer(bench.context, flags, size))
    cells = size // 4

    def once(value: int) -> float:
        start = time.perf_counter()
        view, _ = cl.enqueue_map_buffer(bench.queue, buffer, cl.map_flags.READ | cl.map_flags.WRITE, 0, (cells,),
                                        np.uint32, is_blocking=True)
        view[value % cells] = value
        view.base.release(bench.queue)
        bench.queue.finish()
        return time.perf_counter() - start

    found = [bench._do(lambda v=v: once(v)) for v in range(1, repeats + 1)]  # type: ignore[misc]
    seen = bench._read(buffer, cells)
    places = np.arange(1, repeats + 1) % cells
    wrong = "" if (seen[places[-cells:]] == np.arange(1, repeats + 1)[-cells:]).all() else "the device did not get it"
    return Timing(tuple(found[repeats // 8:]), {"bytes": float(size)}, wrong)


def read_all(bench: OpenCL, data: Any, size: int) -> None:
    """Begins to: nothing is waited for. What is left over beyond whole turns of all groups is not read."""
    turns = size // (bench.full_groups * kernels.IN_TURN * LINE)
    if turns:
        out = bench._buffer(np.zeros(bench.full_groups, np.uint32))
        read = bench._kernel(PRIME, "prime")
        bench._do(lambda: read(bench.queue, (bench.full_groups,), (1,), data, out, np.uint32(0), np.uint32(turns)))


def primed(bench: OpenCL, footprint: int, behind: int, repeats: int) -> Timing:
    each = bench.full_groups * kernels.IN_TURN * LINE
    footprint, behind = (-(-size // each) * each for size in (footprint, behind))  # whole turns of all groups
    if footprint < SAMPLED // A_PAGE * PAGE:
        raise UnsupportedError("a sample has no room", got=f"{footprint} bytes")
    order = samples(footprint, 1 + repeats)
    cells = (np.arange((footprint + behind) // 4, dtype=np.uint32) * np.uint32(2654435761)) >> np.uint32(7)
    cells[order] = np.roll(order, -1)
    data, at, done = bench._buffer(cells), bench._buffer(order[:1]), 0
    read, chase = bench._kernel(PRIME, "prime"), bench._kernel(kernels.CHASE, "chase")
    asked = Asked("loads", {"load bytes": 4 * kernels.CHASED}, 4)
    pieces = [(first // LINE, size // each, bench._buffer(np.zeros(bench.full_groups, np.uint32)), part.reshape(
        bench.full_groups, -1).sum(axis=1, dtype=np.uint32)) for first, size, part in (
            (0, footprint, cells[:footprint // 4]), (footprint, behind, cells[footprint // 4:])) if size]

    def once() -> tuple[float, str]:
        nonlocal done
        def begun() -> None:  # nothing is waited for: meanwhile others take from the cache
            for first, turns, out, _ in (pieces[0], *pieces):
                read(bench.queue, (bench.full_groups,), (1,), data, out, np.uint32(first), np.uint32(turns))
            chase(bench.queue, (1,), (1,), data, at, np.uint32(SAMPLED // A_PAGE // kernels.CHASED))

        bench._do(begun)
        seconds = bench._time(chase, (1,), (1,), data, at, np.uint32(SAMPLED // kernels.CHASED))
        done += SAMPLED // A_PAGE + SAMPLED
        # looked at last: the host's reading would throw out what is to be found
        if any((bench._read(out, bench.full_groups) != want).any() for _, _, out, want in pieces):
            return seconds, "threads did not read what is there"
        return seconds, "" if bench._read(at, 1)[0] == order[done % len(order)] else "the chase ended at another place"

    found = [once() for _ in range(1 + repeats)][1:]
    counted, _ = bench._count()
    wrong = next((w for _, w in found if w), counting.objection(counted, asked))
    loads = counting.work(counted, asked) * SAMPLED / kernels.CHASED
    return Timing(tuple(s for s, _ in found), {"loads": loads}, wrong, "", counting.source(counted))


def samples(footprint: int, most: int) -> NDArray[np.uint32]:
    """Words of `footprint` bytes, in `most` samples as far as there are pages: a word a page of SAMPLED / A_PAGE pages,
    then SAMPLED in other lines of these. What was loaded once is kept longer than what is read side by side, so that
    each sample has pages of its own."""
    r = np.random.default_rng(footprint)
    each = SAMPLED // A_PAGE
    found = []
    for pages in r.permutation(footprint // PAGE)[:min(most, footprint // PAGE // each) * each].reshape(-1, each):
        lines = np.argsort(r.random((each, PAGE // LINE), np.float32), axis=1)[:, :1 + A_PAGE]
        places = (pages[:, None] * (PAGE // LINE) + lines) * (LINE // 4)
        found += [places[:, 0], r.permutation(places[:, 1:].ravel())]
    return np.concatenate(found).astype(np.uint32)
