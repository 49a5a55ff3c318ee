"""Experiments as SPIR-V: those of `npulab.gpu.kernels` under the same names, with the same arguments and results.

What is there a source in OpenCL C is here a `Recipe`: the size of a work group is part of SPIR-V, so that a shader is
made when its group is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from npulab.errors import UnsupportedError
from npulab.gpu.kernels import CHASED, DIVERGED, LOADED, MET, STEPS, STREAMED
from npulab.gpu.spirv_builder import Kind, Shader, Type, Value, Variable
from npulab.gpu.types import Element, Operation, Order

__all__ = ["CHASE", "CHASED", "DIVERGE", "DIVERGED", "LAUNCH", "LOADED", "MET", "STEPS", "STREAMED",
           "Recipe", "barrier", "chain", "constant", "hold", "image", "local", "local_write", "stream"]

KINDS: dict[Element, Kind] = {"float32": "float", "float16": "half", "int32": "uint"}
TILE = 4
"""Texels of a side of what neighbours read in order "tiles"."""
LANES = (1, 2, 4)
"""Vectors of a shader: those of 8 and 16 are of OpenCL's kernels alone (SPIR-V, capability Vector16)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """make: (entry, threads of a group) to the words of the module. key: what tells it from others of its name.
    turns: which of its numbers says how often the loop turns."""

    name: str
    key: tuple[object, ...]
    make: Callable[[str, int], bytes] = field(compare=False)
    turns: int = 0


def _chase(_: str, group: int) -> bytes:
    s = Shader(group, ("uint", "uint"), ("uint",))
    p = s.variable(s.load(1, s.constant(0)))
    with s.loop(s.arguments[0]):
        x = p.get()
        for _step in range(CHASED):
            x = s.load(0, x)
        p.set(x)
    s.store(1, s.constant(0), p.get())
    return s.assemble()


def _launch(_: str, group: int) -> bytes:
    s = Shader(group, ("uint",), ("uint",))
    with s.when(s.arguments[0].differs(0)):
        s.store(0, s.constant(0), s.arguments[0])
    return s.assemble()


def _barrier(_: str, group: int) -> bytes:
    s = Shader(group, ("uint",), ("uint", "uint"))
    turns, apart = s.arguments
    one, two = s.shared("uint", group), s.shared("uint", group)
    other = (s.local_id + apart) % group
    s.shared_store(one, s.local_id, s.load(0, s.local_id))
    s.barrier()
    with s.loop(turns):
        for from_, to in ((one, two), (two, one)):
            s.shared_store(to, s.local_id, s.shared_load(from_, other) + 1)
            s.barrier()
    s.store(0, s.local_id, s.shared_load(one, s.local_id))
    return s.assemble()


def _diverge(_: str, group: int) -> bytes:
    s = Shader(group, ("uint",), ("uint", "uint", "uint", "uint"))
    turns, period, a, b = s.arguments
    x = s.variable(s.global_id)

    def way(times: Value, plus: Value) -> None:
        with s.loop(turns):
            now = x.get()
            for _step in range(DIVERGED):
                now = now * times + plus
            x.set(now)

    s.either(((s.local_id // period) & 1).differs(0), lambda: way(a, b), lambda: way(b, a))
    s.store(0, s.global_id, x.get())
    return s.assemble()


CHASE, LAUNCH = Recipe("chase", (), _chase), Recipe("launch", (), _launch)
DIVERGE = Recipe("diverge", (), _diverge)


def barrier(group: int) -> Recipe:
    """Of so many threads."""
    return Recipe("meet", (group,), _barrier)


def local(words: int, width: int = 4) -> Recipe:
    """`words`: a power of two, loaded `width` bytes at once."""
    return Recipe("local_loads", (words, width), partial(_local, words, width // 4))


def _local(words: int, lanes: int, _: str, group: int) -> bytes:
    s = Shader(group, ("uint",), ("uint", "uint"))
    turns, stride = s.arguments
    count = words // lanes
    cells = s.shared(Type("uint", lanes), count)
    with s.loop(count, group, s.local_id) as i:
        numbers = [((i * lanes + k) if lanes > 1 else i) * 2654435761 for k in range(lanes)]
        s.shared_store(cells, i, s.vector(*numbers) if lanes > 1 else numbers[0])
    s.barrier()
    at, x = s.variable(s.local_id * stride), s.variable(s.constant(0, "uint", lanes))
    with s.loop(turns):
        now, total = at.get(), x.get()
        for step in range(LOADED):
            total = total + s.shared_load(cells, ((now + step) if step else now) & (count - 1))
        x.set(total)
        # no load can be done before its turn
        at.set(now + (s.constant(LOADED) + (s.lane(total, 0) & turns & 0x80000000)))
    s.store(0, s.global_id, s.sum(x.get()))
    return s.assemble()


def local_write(words: int, width: int = 4) -> Recipe:
    """`words`: a power of two, stored `width` bytes at once, all of the place times a number; LOADED stores a turn."""
    return Recipe("local_stores", (words, width), partial(_local_write, words, width // 4))


def _local_write(words: int, lanes: int, _: str, group: int) -> bytes:
    s = Shader(group, ("uint",), ("uint", "uint", "uint"))
    turns, stride, factor = s.arguments
    count = words // lanes
    cells = s.shared(Type("uint", lanes), count)
    with s.loop(count, group, s.local_id) as i:
        s.shared_store(cells, i, s.constant(0, "uint", lanes))
    s.barrier()
    at = s.variable(s.local_id * stride)
    with s.loop(turns):
        now = at.get()
        for _step in range(LOADED):
            place = now & (count - 1)
            s.shared_store(cells, place, s.spread(place * factor, lanes))
            now = now + 1
        at.set(now)
    s.barrier()
    x = s.variable(at.get())
    with s.loop(count, group, s.local_id) as i:
        x.set(x.get() + s.sum(s.shared_load(cells, i)))
    s.store(0, s.global_id, x.get())
    return s.assemble()


def constant(vectors: int, spread: bool, width: int = 4) -> Recipe:
    """`vectors` of four words, a power of two, loaded whole or a word at once (`width` 4). spread: neighbours read
    neighbours, else all threads the same one."""
    return Recipe("constant", (vectors, spread, width), partial(_constant, vectors, spread, width // 4))


def _constant(vectors: int, spread: bool, lanes: int, _: str, group: int) -> bytes:
    s = Shader(group, ("uint",), ("uint",), vectors)
    turns, count = s.arguments[0], vectors * 4 // lanes
    at, x = s.variable(s.local_id if spread else s.constant(0)), s.variable(s.constant(0, "uint", lanes))
    with s.loop(turns):
        now, total = at.get(), x.get()
        for step in range(LOADED):
            place = ((now + step) if step else now) & (count - 1)
            total = total + (s.load_constant(place) if lanes == 4 else s.load_constant(place >> 2, place & 3))
        x.set(total)
        at.set(now + LOADED)
    s.store(0, s.global_id, s.sum(x.get()))
    return s.assemble()


def stream(width: int) -> Recipe:
    """Entries read, write and copy for vectors of `width` bytes: 4, 8, 16."""
    return Recipe("stream", (width,), partial(_stream, width // 4), 3)


def _stream(lanes: int, way: str, group: int) -> bytes:
    s = Shader(group, (Type("uint", lanes), "uint"), ("uint", "uint", "uint", "uint"))
    size, offset, stride, turns = s.arguments
    step = (stride * group) % size
    at = s.variable((s.group_id * offset + s.local_id * stride) % size)
    x = s.variable(s.constant(0, "uint", lanes))
    seven = s.constant(7, "uint", lanes)
    with s.loop(turns):
        now, total = at.get(), x.get()
        for _step in range(STREAMED[way]):
            if way == "read":
                total = total + s.load(0, now)
            else:
                s.store(0, now + size if way == "copy" else now, s.load(0, now) if way == "copy" else seven)
            now = now + step
            now = now - s.select(now >= size, size, s.constant(0))
        at.set(now)
        x.set(total)
    s.store(1, s.global_id, s.sum(x.get()) if way == "read" else at.get())
    return s.assemble()


def image(row: int, texel: int = 16, order: Order = "rows") -> Recipe:
    """As reading in `stream`, of an image of `size` texels in all. row, a power of two: texels of a row or, in order
    "columns", of a column; in order "tiles" the tiles of a row."""
    return Recipe("image", (row, texel, order), partial(_image, row, texel // 4, order), 2)


def _image(row: int, lanes: int, order: Order, _: str, group: int) -> bytes:
    s = Shader(group, ("uint",), ("uint", "uint", "uint"), image=True)
    size, offset, turns = s.arguments
    step = s.constant(group) % size
    at = s.variable((s.group_id * offset + s.local_id) % size)
    x = s.variable(s.constant(0, "uint", 4))

    def place(at: Value) -> tuple[Value, Value]:
        if order == "tiles":
            tile = at >> 4
            return (tile & (row - 1)) * TILE + (at & 3), (tile >> (row.bit_length() - 1)) * TILE + (at >> 2 & 3)
        along, across = at & (row - 1), at >> (row.bit_length() - 1)
        return (along, across) if order == "rows" else (across, along)

    with s.loop(turns):
        now, total = at.get(), x.get()
        for _step in range(STREAMED["read"]):
            total = total + s.texel(*place(now))
            now = now + step
            now = now - s.select(now >= size, size, s.constant(0))
        at.set(now)
        x.set(total)
    total = x.get()
    of_texel = s.lane(total, 0)
    for k in range(1, lanes):  # a read gives four numbers, whatever is stored
        of_texel = of_texel + s.lane(total, k)
    s.store(0, s.global_id, of_texel)
    return s.assemble()


def chain(operation: Operation, element: Element, width: int, chains: int) -> Recipe:
    """Arguments: turns, a, b, c; roots and products of floats begin with c. Results by `npulab.gpu.exact.chained`.

    Raises: UnsupportedError for a step that an element type has not, or vectors that shaders have not.
    """
    if element not in KINDS or (element == "int32" and operation == "special"):
        raise UnsupportedError(f"there is no chain of {operation} on {element}")
    if width not in LANES:
        raise UnsupportedError(f"shaders have no vectors of {width}")
    two = element == "int32" and operation != "fma"
    make = partial(_two if two else partial(_chain, KINDS[element]), operation, width, chains)
    return Recipe("chain", (operation, element, width, chains), make)


def _chain(kind: Kind, operation: Operation, width: int, chains: int, _: str, group: int) -> bytes:
    given: Kind = "uint" if kind == "uint" else "float"
    s = Shader(group, (given,), ("uint", given, given, given))
    turns = s.arguments[0]
    a, b, c = (s.spread(s.convert(v, kind), width) for v in s.arguments[1:])
    first = s.convert(s.convert(s.local_id & 7, given), kind)
    if operation in ("mul", "special"):
        begin = c + s.spread(s.convert(_own(s), kind), width)
        xs = [s.variable(begin) for _ in range(chains)]
    else:
        xs = [s.variable(s.spread(first + (i + 1), width)) for i in range(chains)]
    with s.loop(turns):
        now = [x.get() for x in xs]
        for step in range(STEPS):
            now = [_step(s, operation, x, a, b, step) for x in now]
        for x, value in zip(xs, now, strict=True):
            x.set(value)
    total = xs[0].get()
    for x in xs[1:]:
        total = total + x.get()
    s.store(0, s.global_id, s.convert(s.sum(total), given))
    return s.assemble()


def _two(operation: Operation, width: int, chains: int, _: str, group: int) -> bytes:
    """A chain of two integers, as `npulab.gpu.kernels` has it."""
    s = Shader(group, ("uint",), ("uint", "uint", "uint", "uint"))
    turns, a = s.arguments[:2]
    first = (s.local_id & 7) + s.load(0, s.global_id) * a
    starts = [first + (i + 1) for i in range(chains)]
    if operation == "mul":
        starts = [x * 2 + 1 for x in starts]
    pairs = [(s.variable(x), s.variable(x)) for x in (s.spread(x, width) for x in starts)]
    with s.loop(turns):
        now = [(x.get(), y.get()) for x, y in pairs]
        for _step in range(STEPS):
            now = [(y, x * y if operation == "mul" else x + y) for x, y in now]
        for (x, y), values in zip(pairs, now, strict=True):
            x.set(values[0])
            y.set(values[1])
    total, *others = [x.get() ^ y.get() for x, y in pairs]
    for other in others:
        total = total + other
    s.store(0, s.global_id, s.sum(total))
    return s.assemble()


def _step(s: Shader, operation: Operation, x: Value, a: Value, b: Value, step: int) -> Value:
    if operation == "special":
        return s.builtin("InverseSqrt", x)
    if operation == "fma":
        return x * a + b if x.type.kind == "uint" else s.fma(x, a, b)
    other = b if step % 2 else a
    return x * other if operation == "mul" else x + other


def _own(s: Shader) -> Value:
    """0 for each thread, but not known to be: as `npulab.gpu.kernels` has it."""
    return s.builtin("FMin", s.load(0, s.global_id), s.constant(0, "float"))


def hold(registers: int) -> Recipe:
    """A loop that keeps `registers` numbers alive, each made of the next: with a = b = 1/2 all of them go to 1."""
    return Recipe("hold", (registers,), partial(_hold, registers))


def _hold(registers: int, _: str, group: int) -> bytes:
    s = Shader(group, ("float",), ("uint", "float", "float"))
    turns, a, b = s.arguments
    own = _own(s)
    held: list[Variable] = [s.variable(a * (i + 1) + own) for i in range(registers)]
    with s.loop(turns):
        now = [x.get() for x in held]
        for i in range(registers):
            now[i] = s.fma(now[(i + 1) % registers], a, b)
        for x, value in zip(held, now, strict=True):
            x.set(value)
    total = held[0].get()
    for x in held[1:]:
        total = total + x.get()
    s.store(0, s.global_id, total)
    return s.assemble()
