"""Experiments that lie, and what is said against them: `python bench/gpu_sabotage.py [DEVICE]`.

Kernels whose loop a compiler folds, whose loads it takes out, whose stores it leaves out, that compute something else
or on numbers that are none; and devices whose clock, timer or memory lies, simulated. Then the same experiments left as
they are. Prints a line for each; exit status 1 if a lie is believed, is refused for another reason, or the truth is
refused. Experiments whose code the driver does not show are "uncounted": a probe takes none of them, true or not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Any
from unittest.mock import patch

import numpy as np

from npulab.errors import NpulabError, UnsupportedError
from npulab.gpu import counting, extras, kernels, opencl
from npulab.gpu.analysis import rates
from npulab.gpu.analysis.conclude import tried
from npulab.gpu.analysis.meter import Meter
from npulab.gpu.exact import DOTTED, congruential, dotted
from npulab.gpu.simulated import Hidden, Simulated, random_hidden
from npulab.gpu.types import Limits, Quantity, Timing

Do = Callable[[Any], str]


@dataclass(frozen=True)
class Case:
    """do: called with a bench, gives what is said against what was measured, "" if nothing. reason: what must be."""

    name: str
    reason: str
    do: Do


@contextmanager
def unhurried() -> Iterator[None]:
    """Short, and times are not compared: what is said is said of the code and the results alone."""
    with patch.multiple(opencl, SCALES=0.0, REPEATS=2, ENOUGH=1e-4):
        yield


# kernels: what the source is changed to, and the experiment


def changed(of: str, *changes: tuple[str, str]) -> Any:
    """Patches a source of npulab.gpu.kernels or extras, or what a function of kernels makes."""
    module = kernels if hasattr(kernels, of) else extras
    real = getattr(module, of)

    def change(source: str) -> str:
        for old, new in changes:
            if old not in source:
                raise ValueError(f"{of} has no '{old}' any more")
            source = source.replace(old, new)
        return source

    return patch.object(module, of, change(real) if isinstance(real, str) else lambda *a: change(real(*a)))


def uncounted(said: str) -> bool:
    return said.startswith(counting.STATED)


def kernel(name: str, reason: str, of: str, changes: list[tuple[str, str]], run: Callable[[Any], Timing],
           *more: Any) -> Case:
    def do(bench: Any) -> str:
        with ExitStack() as stack:
            for each in (changed(of, *changes), *more):
                stack.enter_context(each)
            t = run(bench)
            return t.wrong or (t.counted if uncounted(t.counted) else "")

    return Case(name, reason, do)


def one_of_four(operation: str, element: str, start: int, turns: int) -> float:
    return dotted(DOTTED[0] & 255, DOTTED[1], start, turns * kernels.STEPS)


ADVANCE = "at += step; at -= at >= size ? size : 0;"
FOUR = f"{ADVANCE} " * 4
READ4 = f"x += data[at]; {ADVANCE}\n        " * 4
WRITE4 = f"data[at] = x; {ADVANCE}\n        " * 4
COPY2 = f"data[at + size] = data[at]; {ADVANCE}\n        " * 2
ONE_PLACE = 1024
"""Bytes: with these every thread reads one place again and again, and what is read is right however often it is."""
FOLDED, MERGED, HOISTED, DEAD = ("folded, or is dead", "put steps together or left some out",
                                 "loads were taken out of the loop", "stores were left out as dead")


def chain(operation: str, element: str, width: int = 1, chains: int = 1) -> Callable[[Any], Timing]:
    return lambda b: b.chain(operation, element, width, chains, 64)


def stream(way: str, width: int = 4, footprint: int = 1 << 16) -> Callable[[Any], Timing]:
    return lambda b: b.stream(footprint, 1, width, way)


def spaced(way: str, width: int = 4, stride: int = 1) -> Callable[[Any], Timing]:
    """As a processor's cores are asked, whatever others do."""
    return lambda b: extras.stream_parts(b, 1 << 16, width, way, 1, False, stride)  # type: ignore[arg-type]


SIDE_BY_SIDE = [(f"p[{2 * k}]", f"p[{k}]") for k in range(kernels.IN_TURN)]
"""Of loads and stores that should be two words apart."""
TOGETHER = "the compiler put several together"
measured = opencl.OpenCL._measured


def eight_turns(self: opencl.OpenCL, run: Any, work: Any, most: int = 0, whole: int = 1) -> Timing:
    return measured(self, run, work, 8, whole)


def products_alone(operation: str, element: str, start: int, turns: int) -> float:
    return congruential(1664525, 0, start, turns * kernels.STEPS)


@cache
def last_sum_is_none(operation: str, element: str, start: int, turns: int) -> float:
    x = y = start
    for _ in range(turns):
        for _ in range(kernels.STEPS // 2 - 1):
            x, y = x + y, x + 2 * y
        x = (x + y) % (1 << 32)
        y = y % (1 << 32) ^ x
    return x ^ y


def meet(bench: Any) -> Timing:
    return bench.barrier()  # type: ignore[no-any-return]


APART = "did not wait for each other"
"""PoCL has barriers of its own where a loop with a barrier begins again: the last of a turn may be left out."""
MEET = "\n        barrier(CLK_LOCAL_MEM_FENCE);"
SUMS = "x0 = x0 + y0;\n        y0 = y0 + x0;\n        " * 8
FIBONACCI = "S t = x0; x0 = 610 * t + 987 * y0; y0 = 987 * t + 1597 * y0;\n"
"""16 steps: the numbers 15 to 17."""
POWER = """uint power(uint x, uint n) {
    uint p = 1;
    for (uint k = 0; k < 32; k++) { p = n >> k & 1 ? p * x : p; x = x * x; }
    return p;
}
"""
KERNELS = [
    kernel("folded loop: roots of a known 1", FOLDED, "chain", [("(V)(begin);", "(V)((S)1);")],
           chain("special", "float32")),
    kernel("folded loop: products of a known 1 by known numbers", FOLDED, "chain",
           [("(V)(begin);", "(V)((S)1);"), ("S a = (S)a0, b = (S)b0", "const S a = 2, b = 0.5f")],
           chain("mul", "float32")),
    kernel("folded loop: one turn whatever is asked", FOLDED, "chain", [("i < turns", "i < 1")],
           chain("mul", "float32")),
    kernel("folded loop: at most 10 turns", "not do the same mul float32 in each turn", "chain",
           [("i < turns", "i < min(turns, 10u)")], chain("mul", "float32")),
    kernel("folded loop: numbers that stay as they are", FOLDED, "hold",
           [("float r0 = a * 1.0f", "a = 0.5f; b = 0.5f; float r0 = 1.0f"), (" + own", ""),
            *((f"r{i} = a * {i + 1}.0f", f"r{i} = 1.0f") for i in range(1, 16))], lambda b: b.hold(16, 64)),
    kernel("half the turns, of products", MERGED, "chain", [("i < turns", "i < turns / 2")], chain("mul", "float32")),
    kernel("half the turns, of roots", MERGED, "chain", [("i < turns", "i < turns / 2")], chain("special", "float32")),
    kernel("half the turns, of multiply-adds", "ended with", "chain", [("i < turns", "i < turns / 2")],
           chain("fma", "float32")),
    kernel("half the turns, of integers", "ended with", "chain", [("i < turns", "i < turns / 2")],
           chain("fma", "int32")),
    kernel("dead code: a result that needs no products", FOLDED, "chain", [("] = total;", "] = c;")],
           chain("mul", "float32")),
    kernel("dead code: a result that needs no roots", FOLDED, "chain", [("] = total;", "] = c;")],
           chain("special", "float32")),
    kernel("dead code: one of two chains is added up", MERGED, "chain", [("total = x0 + x1", "total = x0 + x0")],
           chain("mul", "float32", 4, 2)),
    kernel("dead registers: one of 16 is stored", MERGED, "hold",
           [*((f"r{i} = fma(r{(i + 1) % 16},", f"r{i} = fma(r{i},") for i in range(16)),
            ("] = " + " + ".join(f"r{i}" for i in range(16)), "] = r0")], lambda b: b.hold(16, 64)),
    kernel("common subexpression: two chains that are one", MERGED, "chain",
           [("x1 = x1 * a", "x1 = x0"), ("x1 = x1 * b", "x1 = x0")], chain("mul", "float32", 4, 2)),
    kernel("steps put together: products of floats as mathematics has them", MERGED, "chain",
           [("x0 = x0 * a;", ""), ("x0 = x0 * b;", "x0 = x0 * (a * b);")], chain("mul", "float32")),
    kernel("steps put together: products of integers", MERGED, "chain", [("* a + b;", "* a;")],
           chain("fma", "int32"), patch.object(opencl, "chained", products_alone)),
    kernel("folded loop: sums of two numbers, a turn's at once", MERGED, "chain", [(SUMS.rstrip(), FIBONACCI)],
           chain("add", "int32")),
    kernel("folded loop: products of two numbers by the sums of their exponents", FOLDED, "chain",
           [("typedef uint S;", f"{POWER}typedef uint S;"), ("for (uint i", "S e = 1, f = 1;\n    for (uint i"),
            ("x0 = x0 * y0;", "e = e + f;"), ("y0 = y0 * x0;", "f = f + e;"),
            ("(x0 ^ y0)", "(power(x0, e) ^ power(y0, f))")], chain("mul", "int32")),
    kernel("a sum left out that the loop's own makes up for", "15 add int32 on data a turn, not 16", "chain",
           [("y0 = y0 + x0;\n    }", "y0 = y0 ^ x0;\n    }")], chain("add", "int32"),
           patch.object(opencl, "chained", last_sum_is_none)),
    kernel("half the turns, of sums of integers", "ended with", "chain", [("i < turns", "i < turns / 2")],
           chain("add", "int32")),
    kernel("half the turns, of products of integers", "ended with", "chain", [("i < turns", "i < turns / 2")],
           chain("mul", "int32")),
    kernel("dead code: one of two chains of products of integers is added up", r"ended with \d+, not \d{1,10}$",
           "chain", [("(x1 ^ y1)", "(x0 ^ y0)")], chain("mul", "int32", 4, 2)),
    kernel("steps left out: every second product", MERGED, "chain", 
           [("x0 = x0 * a;\n        x0 = x0 * b;\n        x0 = x0 * a;\n        x0 = x0 * b;",
             "x0 = x0 * a;\n        x0 = x0 * b;")], chain("mul", "float32")),
    kernel("steps doubled: twice as many as are said", "more of it than was asked", "chain",
           [("x0 = x0 * a;", "x0 = x0 * a; x0 = x0 * b; x0 = x0 * a;")], chain("mul", "float32")),
    kernel("another type: double for float", "0 mul float32 a turn, not 16", "chain",
           [("x0 = x0 * a;", "x0 = (float)((double)x0 * (double)a * (double)x0 / (double)x0);"),
            ("x0 = x0 * b;", "x0 = (float)((double)x0 * (double)b * (double)x0 / (double)x0);")],
           chain("mul", "float32")),
    kernel("products of bytes: one of four", MERGED, "chain",
           [(f"as_uchar4(a).{c}", "0") for c in "yzw"], chain("fma", "char4"),
           patch.object(opencl, "chained", one_of_four)),
    kernel("products of bytes: half of the steps", "ended with", "chain", [("i < turns", "i < turns / 2")],
           chain("fma", "char4")),
    kernel("products of bytes: one of four, of eight chains", MERGED, "chain",
           [(f"as_uchar4(a).{c}", "0") for c in "yzw"], chain("fma", "char4", 4, 2),
           patch.object(opencl, "chained", one_of_four)),
    kernel("hoisted texel: read once, added again and again", HOISTED, "IMAGE",
           [("x = (uint4)(0);", "x = (uint4)(0), h = TEXEL(at);"), ("x += TEXEL(at)", "x += h")],
           lambda b: b.image(16)),
    kernel("shared texels: one of four is read", "16 load bytes a turn, not 64", "IMAGE",
           [("uint i = 0; i < turns; i++) {", "uint i = 0; i < turns; i++) { uint4 h = TEXEL(at);"),
            ("x += TEXEL(at)", "x += h")], lambda b: b.image(16)),
    kernel("another operation: a sum for a multiply-add", "0 fma float32 a turn, not 16", "chain",
           [("fma(x0, (V)(a), (V)(b))", "x0 + b")], chain("fma", "float32")),
    kernel("multiply-adds in two operations", "0 fma float32 a turn, not 16", "chain",
           [("{\n    S a", "{\n#pragma STDC FP_CONTRACT OFF\n    S a"), ("fma(x0, (V)(a), (V)(b))", "x0 * a + b")],
           chain("fma", "float32")),
    kernel("hoisted load: read once, added again and again", HOISTED, "STREAM",
           [("T x = (T)(0);", "T x = (T)(0), h = data[at];"), ("x += data[at]", "x += h")],
           stream("read", 4, ONE_PLACE)),
    kernel("hoisted load: a constant place", HOISTED, "STREAM", 
           [("T x = (T)(0);", "T x = (T)(0); uint lone = at;"), ("x += data[at]", "x += data[lone]")],
           stream("read", 16, 4 * ONE_PLACE)),
    kernel("shared loads: one of four is done", "8 load bytes|4 load bytes", "STREAM",
           [(READ4.rstrip(), f"x += data[at]; x += data[at]; x += data[at]; x += data[at]; {FOUR}")],
           stream("read", 4, ONE_PLACE)),
    kernel("narrow loads: one word of a vector", "16 load bytes a turn, not 64", "STREAM",
           [("x += data[at]", "x += ((__global const uint *)data)[at * 4]")], stream("read", 16),
           patch.object(opencl.OpenCL, "_checked", lambda *a: "")),
    kernel("read, always the first", "did not read what is there", "STREAM", [("x += data[at]", "x += data[0]")],
           stream("read")),
    kernel("read, once", "did not read what is there", "STREAM",
           [("i < turns; i++) {{\n        x +=", "i < 1; i++) {{\n        x +=")], stream("read")),
    kernel("dead store: none is left", DEAD, "STREAM", [(WRITE4.rstrip(), FOUR)], stream("write")),
    kernel("dead store: three of four are overwritten", DEAD, "STREAM",
           [(WRITE4.rstrip(), f"data[at] = x; data[at] = x; data[at] = x; data[at] = x; {FOUR}")], stream("write", 16)),
    kernel("write, one of four", "did not go where it was to", "STREAM",
           [("data[at] = x; at += step; at -= at >= size ? size : 0;\n        data[at] = x;",
             "data[at] = x;\n        data[at] = x;")], stream("write")),
    kernel("copy without a load", HOISTED, "STREAM", [("= data[at];", "= (T)(i);")], stream("copy")),
    kernel("copy without a store", "loads were taken out|stores were left out", "STREAM",
           [("data[at + size] = data[at];", "at += (uint)data[at].s0 & 0u;")], stream("copy", 16)),
    kernel("narrow loads put together: four of 4 bytes in one of 16", TOGETHER, "spaced", [(" volatile", "")],
           spaced("read")),
    kernel("narrow loads put together: two of 8 bytes in one of 16", TOGETHER, "spaced",
           [("x0 += p[0];", "uint4 h = *(const __global volatile uint4 *)p; x0 += h.s01;"),
            ("x1 += p[1];", "x1 += h.s23;")], spaced("read", 8)),
    kernel("narrow stores put together", TOGETHER, "spaced", [(" volatile", "")], spaced("write")),
    kernel("narrow copies put together", TOGETHER, "spaced",
           [("q[0] = p[0];", "*(__global volatile ulong *)q = *(__global volatile ulong *)p;"), ("q[1] = p[1];", "")],
           spaced("copy")),
    kernel("loads apart: the stride is left out", "did not read what is there", "spaced", SIDE_BY_SIDE,
           spaced("read", 4, 2)),
    kernel("stores apart: the stride is left out", "the memory does not hold what was stored, 8 bytes apart", "spaced",
           SIDE_BY_SIDE, spaced("write", 4, 2)),
    kernel("loads apart: half of the turn", "did not read what is there", "spaced",
           [(f"x{k % 4} += p[{2 * k}];", "") for k in range(8)], spaced("read", 4, 2)),
    kernel("stores apart: half of the turn", DEAD + "|does not hold", "spaced",
           [(f"p[{2 * k}] = x;", "") for k in range(8, 16)], spaced("write", 4, 2)),
    kernel("wide loads of local memory: one word of four", r"thread \d+ read", "LOCAL",
           [("x += cells[at & (CELLS - 1)];", "x += (T)(words[at & (CELLS - 1)]);")], lambda b: b.local(1, 16)),
    kernel("wide loads of constant memory: one word of four", r"thread \d+ read", "CONSTANT",
           [("x += cells[at & {last}];", "x += (T)(cells[at & {last}].s0);")], lambda b: b.constant(False, 16)),
    kernel("texels of a column, read along a row", "did not read what is there", "image_source",
           [("(int2)((int)((at) / width), (int)((at) & (width - 1)))",
             "(int2)((int)((at) & (width - 1)), (int)((at) / width))")], lambda b: b.image(1 << 14, 16, "columns")),
    kernel("texels of a tile, read along a row", "did not read what is there", "image_source",
           [("/ 16 & (width - 1)) * 4 + ((at) & 3)", "& (width * 4 - 1))"), ("/ 16 / width * 4 + ((at) / 4 & 3)",
                                                                             "/ (width * 4)")],
           lambda b: b.image(1 << 14, 16, "tiles")),
    kernel("chase, seven of eight", "ended at another place", "CHASE",
           [("p = next[p]; p = next[p]; p = next[p]; p = next[p];\n    }",
             "p = next[p]; p = next[p]; p = next[p];\n    }")], lambda b: b.chase(1 << 16, 64)),
    kernel("chase, one place", "ended at another place", "CHASE", [("out[0] = p", "out[0] = next[0]")],
           lambda b: b.chase(1 << 16, 64)),
    kernel("divergence, one way", "ended with", "DIVERGE", [("(lid / period) & 1", "0")], lambda b: b.diverge(1)),
    kernel("divergence, fewer steps", "ended with", "DIVERGE",
           [("x = x * b + a; x = x * b + a; }", "x = x * b + a; }")], lambda b: b.diverge(4)),
    kernel("local memory, from registers", "thread 255 read", "LOCAL", [("x += cells[at & (CELLS - 1)];", "x += at;")],
           lambda b: b.local(1)),
    kernel("local memory, another stride", "thread 255 read", "LOCAL", [("lid * stride", "lid")], lambda b: b.local(4)),
    kernel("barrier: every second left out", APART, "BARRIER", [(f"one[other] + 1;{MEET}", "one[other] + 1;")], meet),
    kernel("barriers left out", APART, "BARRIER", [(f"+ 1;{MEET}", "+ 1;")], meet),
    kernel("barriers: half the turns", APART, "BARRIER", [("i < turns", "i < turns / 2")], meet),
    kernel("barriers: no word is exchanged, what comes of it is known", HOISTED, "BARRIER",
           [("two[lid] = one[other] + 1;", ""), ("one[lid] = two[other] + 1;", ""),
            ("= one[lid];", "= one[(lid + 2 * turns * apart) % {group}] + 2 * turns;")], meet),
    kernel("barriers: two words exchanged at once", "4 load bytes a turn, not 8", "BARRIER",
           [("two[lid] = one[other] + 1;", "uint x = one[(lid + 2 * apart) % {group}] + 2;"),
            ("one[lid] = two[other] + 1;", "one[lid] = x;")], meet),
    kernel("denormals: an operand", "denormal number in float32", "chain", [], chain("mul", "float32"),
           patch.object(opencl, "operands", lambda o, e: (2.0**140 / 2.0**13, 2.0**-127))),
    kernel("denormals: a result", "denormal number in float32", "chain", [("(V)(begin);", "(V)(begin * 1e-39f);")],
           chain("mul", "float32")),
    kernel("a result that is not finite", "computing on it is no measure", "chain", [], chain("mul", "float32"),
           patch.object(opencl, "operands", lambda o, e: (2.0**100, 2.0**100))),
    kernel("cached buffer: a tenth of it is gone through", "a cached buffer", "STREAM", [], stream("read", 4, 1 << 22),
           patch.object(opencl.OpenCL, "_measured", eight_turns)),
]


# devices: what lies is between the experiments and what is concluded


class Lying:
    """A bench that does what another does, with what `lie` makes of it: (experiment, arguments, Timing) -> Timing."""

    def __init__(self, bench: Any, lie: Callable[[str, tuple[Any, ...], Timing], Timing], limits: Limits | None = None
                 ) -> None:
        self._bench, self._lie = bench, lie
        self.identity, self.limits = bench.identity, limits or bench.limits

    def __getattr__(self, name: str) -> Any:
        true = getattr(self._bench, name)  # what a bench has not, a lying one has not
        return lambda *a: self._lie(name, a, true(*a))


def machine() -> Hidden:
    """Without noise and throttling, of 8 cores at 1 GHz."""
    h = random_hidden(3)
    return replace(h, cores=8, clock=1e9, jitter=0.0, outliers=0.0, throttle_to=1.0, throttle_after=float("inf"),
                   tick=1e-9)


def finding(bench: Any, name: str, unit: str, task: Callable[[Meter], list[Quantity]], *others: Quantity) -> str:
    meter = Meter(bench, quick=True)
    q = tried(meter, name, unit, lambda: task(meter), others)[0]
    return q.why if q.status == "refused" else ""


def scaled(name: str, factor: float) -> Callable[[str, tuple[Any, ...], Timing], Timing]:
    return lambda what, a, t: replace(t, seconds=tuple(s * factor for s in t.seconds)) if what == name else t


def rate_of(lie: Callable[[str, tuple[Any, ...], Timing], Timing], limits: Limits | None = None) -> Do:
    return lambda _: finding(Lying(Simulated(machine()), lie, limits), "fma float32 rate", "operations/s",
                             lambda m: [rates.rate(m, "fma", "float32")])


def with_times(make: Callable[[tuple[float, ...]], tuple[float, ...]]) -> Do:
    """Of a launch, which no reference touches."""
    lie = lambda what, a, t: replace(t, seconds=make(t.seconds)) if what == "launch" else t  # noqa: E731
    return lambda _: finding(Lying(Simulated(machine()), lie), "launch cost", "s", lambda m: [rates.launch(m)])


def bandwidth(lie: Callable[[str, tuple[Any, ...], Timing], Timing] | None = None, *others: Quantity, more: Any = None
              ) -> Do:
    def do(_: Any) -> str:
        with more or ExitStack():
            return finding(Lying(Simulated(machine()), lie or (lambda what, a, t: t)), "memory bandwidth", "GB/s",
                           lambda m: [rates.memory_bandwidth(m, None, "read")], *others)

    return do


def in_another_unit(divisor: float) -> Any:
    def per_second(name: str, took: Any, why: str) -> Quantity:
        return Quantity(name, 1 / took.value / divisor, "GB/s", (1 / took.high / divisor, 1 / took.low / divisor),
                        "measured", why)

    return patch.object(rates, "per_second", per_second)


def jumping() -> Callable[[str, tuple[Any, ...], Timing], Timing]:
    """A clock that is another at each experiment: 1, 1/2, 1/4, 1/8 of the first, and again."""
    turn = count()

    def lie(what: str, a: tuple[Any, ...], t: Timing) -> Timing:
        factor = 2.0 ** (next(turn) % 4)
        return replace(t, seconds=tuple(s * factor for s in t.seconds))

    return lie


def one_thread(what: str, a: tuple[Any, ...], t: Timing) -> Timing:
    """Steps of a lone chain in a fiftieth of their time."""
    return replace(t, seconds=tuple(s / 50 for s in t.seconds)) if what == "chain" and a[4] == 1 else t


def many_threads(what: str, a: tuple[Any, ...], t: Timing) -> Timing:
    """A hundred thousand times as quick, but for a lone chain."""
    return replace(t, seconds=tuple(s * 1e-5 for s in t.seconds)) if what == "chain" and a[4] > 1 else t


def a_cache(what: str, a: tuple[Any, ...], t: Timing) -> Timing:
    """A cache that nobody told of, which answers the more the smaller the footprint is: all that are asked for."""
    return replace(t, seconds=tuple(s * (a[0] / 2**29) ** 0.2 for s in t.seconds)) if what == "stream" else t


def known(name: str, value: float, unit: str) -> Quantity:
    return Quantity(name, value, unit, None, "measured", "")


def latency_with(seconds: float, *others: Quantity) -> Do:
    q = known("memory latency", seconds, "s")
    return lambda _: finding(Simulated(machine()), q.name, q.unit, lambda m: [q], *others)


M1 = Limits(8, 256, 32768, 1 << 30, frozenset(("float32",)), 1e9)
"""As Apple's OpenCL states an M1: 8 compute units at 1 GHz. Its GPU does 2.6 TFLOP/s, 1.3e12 multiply-adds."""
DEVICES = [
    Case("a rate of 100 PFLOP/s (SHOC on an M1, vetter/shoc issue 81)", "above a physical bound",
         rate_of(many_threads, M1)),
    Case("a rate of 107 TFLOP/s (mixbench on an M1, ekondis/mixbench issue 29)", "above a physical bound",
         rate_of(lambda what, a, t: replace(t, seconds=tuple(t.work["operations"] / 53.5e12 for _ in t.seconds))
                 if what == "chain" and a[4] > 1 else t, M1)),
    Case("the same with no clock stated", "as no clock is stated", rate_of(many_threads, replace(M1, clock_hz=0.0))),
    Case("a chain of more than a step a cycle", "steps were put together", rate_of(one_thread, M1)),
    Case("an infinite rate (krrishnarraj/clpeak issue 151): no time", "not times: 0, 0, 0",
         with_times(lambda s: (0.0,) * len(s))),
    Case("times that are no numbers", "not times", with_times(lambda s: (float("nan"), *s[1:]))),
    Case("a time without end", "not times", with_times(lambda s: (float("inf"), *s[1:]))),
    Case("a timer that goes back", "not times", with_times(lambda s: (-s[0], *s[1:]))),
    Case("a timer of coarse ticks", "too coarse",
         with_times(lambda s: (0.0, 0.016, 0.0, 0.0, 0.016, 0.016, 0.0, 0.0, 0.016))),
    Case("repetitions that slow down: the clock falls", "the clock moved",
         with_times(lambda s: tuple(1e-5 * (1 + k / 10) for k in range(len(s))))),
    Case("a clock that is another at each experiment", "the clock does not stay|the clock moved", rate_of(jumping())),
    Case("wrong unit: GiB/s as GB/s", "another unit", bandwidth(more=in_another_unit(2.0**30))),
    Case("wrong unit: MiB/s over a thousand as GB/s", "another unit", bandwidth(more=in_another_unit(2.0**20 * 1e3))),
    Case("wrong unit: gigabits", "another unit", bandwidth(more=in_another_unit(1e9 / 8))),
    Case("cached buffer: half of it is faster", "caches help", bandwidth(a_cache)),
    Case("memory faster than the cache before it", "above that of L1",
         bandwidth(None, known("L1 bandwidth", 0.5, "GB/s"))),
    Case("memory faster than all loads of all cores (clpeak issue 210)", "above a physical bound",
         bandwidth(scaled("stream", 1e-3))),
    Case("DRAM that a cache answers", "a cache answers", latency_with(4e-9)),
    Case("DRAM nearer than the cache before it", "less than that of L2",
         latency_with(5e-8, known("L2 latency", 6e-8, "s"))),
    Case("a transfer faster than any link", "above what any link has|do not take longer",
         lambda _: finding(Lying(Simulated(machine()), scaled("transfer", 1e-6)), "transfer to device bandwidth",
                           "GB/s", lambda m: rates.transfers(m, True))),
]


# the truth


def honest(bench: Any) -> Iterator[tuple[str, Callable[[], Timing]]]:
    """Every experiment that a bench has, in shapes that probes ask for."""
    yield "chase 64", lambda: bench.chase(1 << 16, 64)
    yield "chase 4", lambda: bench.chase(1 << 14, 4)
    for way in ("read", "write", "copy"):
        for width in (4, 8, 16):
            yield f"{way}, {width} bytes", lambda w=way, n=width: bench.stream(1 << 18, 1, n, w)
    for way in ("read", "write", "copy") if bench.one_by_one else ():
        for width, parts in ((16, 1), (64, 8)):
            yield (f"{way} {width} in {parts} parts", lambda w=way, n=width, p=parts:
                   bench.stream_parts(100_352, n, w, p))
    for way in ("read", "write", "copy") if bench.kernels is kernels else ():
        for width, stride in ((4, 1), (8, 1), (4, 2), (4, 16)):
            yield (f"{way} of a processor, {width} bytes, {stride} apart",
                   lambda a=(way, width, stride): spaced(*a)(bench))
    yield "read, far apart", lambda: bench.stream(1 << 20, 16, 4, "read")
    yield "read, an odd size", lambda: bench.stream(100_000, 3, 8, "read")
    yield "read, one place", lambda: bench.stream(ONE_PLACE, 1, 4, "read")
    for element in sorted(bench.limits.elements):
        for operation in ("fma", "mul", "add", "special"):
            for width, chains, threads in ((1, 1, 1), (2, 2, 512), (4, 1, 64)):
                try:
                    kernels.chain(operation, element, width, chains)  # type: ignore[arg-type]
                except UnsupportedError:
                    continue
                yield (f"{operation} {element}, {chains} of {width}, {threads} threads",
                       lambda o=operation, e=element, w=width, c=chains, t=threads: bench.chain(o, e, w, c, t))
    yield "diverge 1", lambda: bench.diverge(1)
    yield "diverge 32", lambda: bench.diverge(32)
    for registers in (16, 24, 64, 128):
        yield f"hold {registers}", lambda r=registers: bench.hold(r, 256)
    for stride in (1, 2, 32):
        yield f"local {stride}", lambda s=stride: bench.local(s)
    yield "chase in pieces", lambda: bench.chase_pieces(1 << 18, 64, 1 << 12)
    for texel, order in ((16, "rows"), (4, "rows"), (16, "columns"), (4, "tiles"), (16, "tiles")):
        yield f"image, {texel} bytes a texel, {order}", lambda t=texel, o=order: bench.image(10_000, t, o)
    for width in (4, 8, 16) if bench.kernels is kernels else (4, 16):
        yield f"constant, {width} bytes", lambda w=width: bench.constant(False, w)
        yield f"local, {width} bytes", lambda w=width: bench.local(1, w)
        yield f"local write, {width} bytes", lambda w=width: bench.local_write(1, w)
    yield "constant, spread", lambda: bench.constant(True)
    yield "local write", lambda: bench.local_write(3)
    yield "map", lambda: bench.map(1 << 16)
    yield "launch", bench.launch
    yield "barrier", bench.barrier
    yield "up", lambda: bench.transfer(1 << 20, True)
    yield "down", lambda: bench.transfer(1 << 20, False)


def main(device: int = 0) -> int:
    bench = opencl.open_device(device)
    bench.one_by_one = False  # the cases are about neighbours in a group
    print(bench.identity.name)
    bad = tried = unread = failed = 0
    with unhurried():
        for case in (*KERNELS, *DEVICES):
            try:
                said = case.do(bench)
            except NpulabError as e:  # what it has not, or does not compile
                print(f"left out {case.name}\n         {e.message}")
                continue
            tried += 1
            verdict = "refused" if re.search(case.reason, said) else "uncounted" if uncounted(said) else \
                f"REFUSED, not for '{case.reason}'" if said else "BELIEVED"
            unread += verdict == "uncounted"
            bad += verdict not in ("refused", "uncounted")
            print(f"{verdict:8} {case.name}\n         {said}")
        for name, run in honest(bench):
            try:
                t = run()
            except NpulabError as e:
                print(f"left out {name}: {e.message}; {e.facts.get('got', '')}")
                failed += 1
                continue
            bad += bool(t.wrong)
            unread += not t.wrong and uncounted(t.counted)
            verdict = "REFUSED" if t.wrong else "uncounted" if uncounted(t.counted) else "accepted"
            print(f"{verdict:8} {name}: {t.wrong or t.counted or 'nothing is counted'}")
    print(f"{tried} sabotaged, {len(list(honest(bench))) - failed} honest, {bad} judged wrongly, {unread} uncounted")
    return int(bad > 0)


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main(*map(int, sys.argv[1:2])))
