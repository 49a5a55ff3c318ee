"""Experiments on an OpenCL device, by pyopencl. Each result is compared with what a host computes; a kernel that takes
no longer for twice the work is not believed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial, wraps
from typing import Any, Concatenate, ParamSpec

import numpy as np
from numpy.typing import NDArray

from npulab.errors import CapacityError, DeviceError, UnsupportedError, UsageError
from npulab.gpu import bounds, counting, extras, kernels
from npulab.gpu.counting import Asked, Counted
from npulab.gpu.exact import chained, congruential, operands
from npulab.gpu.filled import Filled, Sums, available
from npulab.gpu.types import OPERATIONS_A_STEP, Element, Identity, Limits, Operation, Order, Timing, Way

ENOUGH = 2e-3
"""Seconds of a repetition: a thousand ticks of a clock of microseconds, and little to wait for."""
LONGEST = 0.5
"""Seconds after which turns are not added any more."""
WAITED = 0.1
"""Seconds by the host's clock, of which the device's own must have seen a hundredth: events of Mesa 22.3's rusticl took
a nanosecond, whatever they did."""
REPEATS = 7
TURNS_MAX = extras.TURNS_MAX
TURNS_TRIED = 1 << 17
"""Of a loop that shows whether the driver ends loops early: llvmpipe does after 65535 turns of all loops of a thread
(Mesa, LP_MAX_TGSI_LOOP_ITERATIONS), over Vulkan and OpenCL."""
CHASE_AT_ONCE = 1 << 15
"""Turns of a chase's first round that one launch does: drivers end those that take seconds."""
READ_FIRST = 1 << 26
"""Bytes that all threads of a processor read before a chase: one that misses a cache which others use is slow, and
misses again for that alone, for good."""
SCALES = 1.5
"""Twice the turns must take this many times as long at least."""
GROUP = 256
GROUPS_A_UNIT = 8
"""Work groups for each core in what is to fill the device."""
SPOT_CHECKS = 32
"""Threads whose sums are computed again by the host."""
HELD_GROUP = 32
WORDS_MAX = 4096
"""Of local memory in `local`."""
WORDS_MIN = 256
P = ParamSpec("P")


@dataclass(frozen=True, eq=False)
class Compiled:
    """A kernel, and the source that it came from: drivers are asked for neither (not all can say)."""

    kernel: Any
    source: str
    name: str
    options: tuple[str, ...] = ()

    def __call__(self, queue: Any, size: tuple[int, ...], group: tuple[int, ...], *arguments: Any) -> Any:
        return self.kernel(queue, size, group, *arguments)


def devices() -> list[Identity]:
    """All OpenCL devices, in the order of their numbers. Raises: UsageError without pyopencl."""
    return [_identity(d) for d in _devices()]


def shuffled(places: int, piece: int) -> NDArray[np.uint32]:
    """0..places - 1 in a random order in which `piece` neighbours come together, pieces in a random order, too."""
    r = np.random.default_rng(places)
    if piece >= places:
        return r.permutation(places).astype(np.uint32)
    pieces = -(-places // piece)
    within = np.argsort(r.random((pieces, piece), np.float32), axis=1).astype(np.uint32)
    order = (within + (np.arange(pieces, dtype=np.uint32) * np.uint32(piece))[:, None])[r.permutation(pieces)].ravel()
    return order[order < places]


def _devices() -> list[Any]:
    try:
        import pyopencl as cl
    except ImportError:
        raise UsageError("OpenCL devices are reached through the package pyopencl, which is not installed",
                         try_="pip install 'npulab[gpu]'") from None
    warnings.filterwarnings("ignore", category=cl.CompilerWarning)  # of every driver that says what it did
    try:
        return [d for p in cl.get_platforms() for d in p.get_devices()]
    except cl.Error:  # a loader without a driver
        return []


def _identity(d: Any) -> Identity:
    return Identity("opencl", str(d.platform.version).strip(), str(d.name).strip(), str(d.vendor).strip(),
                    str(d.driver_version).strip(), str(d.version).strip())


def _subgroup(d: Any) -> int:
    """Threads of a subgroup as the vendor's queries state them (cl_nv_device_attribute_query,
    cl_amd_device_attribute_query, cl_intel_required_subgroup_size: the widest); 0 if none does."""
    for name in ("warp_size_nv", "wavefront_width_amd", "sub_group_sizes_intel"):
        try:
            found = getattr(d, name)
        except Exception:
            continue
        return int(max(found)) if isinstance(found, list | tuple) and found else int(found or 0)
    return 0


def open_device(number: int = 0) -> OpenCL:
    """Device `number` of `devices()`. Raises: DeviceError if there is none; UsageError without pyopencl."""
    found = _devices()
    if not 0 <= number < len(found):
        have = "; ".join(f"{i}: {str(d.name).strip()}" for i, d in enumerate(found)) or "none"
        raise DeviceError(f"there is no OpenCL device {number}", got=have,
                          try_="install a driver: pocl-opencl-icd (the CPU), mesa-opencl-icd, the vendor's"
                          if not found else "one of these")
    return OpenCL(found[number])


class Overstated(CapacityError):  # noqa: N818 - the device's limits are
    """A device that refuses what its limits allow: a group or local memory of this size."""


def shrinking(experiment: Callable[Concatenate[OpenCL, P], Timing]) -> Callable[Concatenate[OpenCL, P], Timing]:
    """Done again with half of the local memory and of the group, for good, where a device has less than it states."""
    @wraps(experiment)
    def done(self: OpenCL, /, *args: P.args, **more: P.kwargs) -> Timing:
        while True:
            try:
                return experiment(self, *args, **more)
            except Overstated:
                if self.words <= WORDS_MIN and self.group == 1:
                    raise
                if self.words > WORDS_MIN:
                    self.words //= 2
                else:
                    self.group //= 2

    return done


class OpenCL:
    """A Bench, and Extra. See npulab.gpu.types.

    waited        seconds of the last launch by the host's clock.
    turns_max     of a loop that are asked for: what the driver does.
    group, words  threads of a group and words of local memory that experiments take: less than it states if the device
                  was found to have less.
    """

    def __init__(self, device: Any) -> None:
        import pyopencl as cl

        self.cl, self.device = cl, device
        self.kernels: Any = kernels
        self.context = cl.Context([device])
        self.queue = cl.CommandQueue(self.context, properties=cl.command_queue_properties.PROFILING_ENABLE)
        names = set(str(device.extensions).split())
        more: set[Element] = {e for e, x in kernels.EXTENSIONS.items() if x in names}
        if "int8x4" not in more:
            more.add("char4")
        self.identity = _identity(device)
        self.limits = Limits(int(device.max_compute_units), int(device.max_work_group_size),
                             int(device.local_mem_size), int(device.max_mem_alloc_size),
                             frozenset(("float32", "int32", *more)), float(device.max_clock_frequency) * 1e6,
                             _subgroup(device), bool(device.type & cl.device_type.CPU))
        self.group = min(GROUP, self.limits.group_max)
        self.one_by_one = self.limits.processor  # the threads of a group, as PoCL does
        self.words = 1 << (min(WORDS_MAX, self.limits.local_bytes // 4).bit_length() - 1)
        self._kernel = lru_cache(maxsize=64)(self._compiled)
        self._counts: dict[tuple[Any, ...], Counted] = {}
        self._last: tuple[Any, ...] = ()  # of what was launched
        self._ways: dict[int, int] = {}  # loads that a chase was asked for, loads that it did
        self.filled = Filled()
        self.waited = 0.0
        self.turns_max = self._longest_loop()

    @property
    def full_groups(self) -> int:
        """Work groups that fill the device."""
        return self.limits.compute_units * GROUPS_A_UNIT

    # experiments

    def chase(self, footprint: int, stride: int) -> Timing:
        return self.chase_pieces(footprint, stride, footprint)

    def chase_pieces(self, footprint: int, stride: int, piece: int) -> Timing:
        places = max(2, footprint // stride)
        order = shuffled(places, max(1, piece // stride)) * np.uint32(stride // 4)
        cells = np.zeros(places * (stride // 4), np.uint32)
        cells[order] = np.roll(order, -1)
        at = {int(x): i for i, x in enumerate(order[:1])}
        kernel = self._kernel(self.kernels.CHASE, "chase")
        data, out = self._buffer(cells), self._buffer(order[:1])
        if self.one_by_one:
            extras.read_all(self, data, min(cells.nbytes, READ_FIRST))
        del cells
        needed = -(-places // kernels.CHASED)  # turns for all of it once
        for begun in range(0, needed, CHASE_AT_ONCE):
            self._time(kernel, (1,), (1,), data, out, np.uint32(min(CHASE_AT_ONCE, needed - begun)))
        done = needed * kernels.CHASED + at[int(order[0])]

        def run(turns: int) -> tuple[float, str]:
            nonlocal done
            seconds = self._time(kernel, (1,), (1,), data, out, np.uint32(turns))
            done += turns * kernels.CHASED
            found = int(self._read(out, 1)[0])
            return seconds, "" if found == int(order[done % places]) else "the chase ended at another place"

        return self._proven(self._measured(run, Asked("loads", {"load bytes": 4 * kernels.CHASED}, 4)))

    @shrinking
    def stream(self, footprint: int, stride: int, width: int, way: Way) -> Timing:
        size = footprint // width
        if self.one_by_one and size >= kernels.IN_TURN * stride and (
                stride > 1 or width in extras.NARROW or (width in extras.WIDE and size % kernels.IN_TURN == 0)):
            return extras.stream_parts(self, footprint, width, way, 1, stride=stride)
        group = 1 if self.one_by_one else self.group  # neighbouring loads follow each other, as a CPU likes them
        if size < 1 or width not in (4, 8, 16, 32, 64):
            raise UnsupportedError("a stream has no room", got=f"{footprint} bytes in vectors of {width}")
        groups, lanes = self.full_groups, width // 4
        buffer, sums = self.filled(self, way, 1, size, lanes)
        out = self._buffer(np.zeros(groups * group, np.uint32))
        kernel = self._kernel(self.kernels.stream(width), way)
        offset = max(1, size // groups)
        step = group * stride % size
        spots = np.unique(np.random.default_rng(0).integers(0, groups * group, SPOT_CHECKS))

        def run(turns: int) -> tuple[float, str]:
            seconds = self._time(kernel, (groups * group,), (group,), buffer, out, np.uint32(size), np.uint32(offset),
                                 np.uint32(stride), np.uint32(turns))
            return seconds, self._checked(way, out, sums, spots, group, offset, stride, step, turns)

        each = kernels.STREAMED[way] * width
        asked = Asked("bytes", {f"{what} bytes": each for what in ("load", "store")
                                if way in ("copy", {"load": "read", "store": "write"}[what])})
        whole = -(-size // (groups * group * kernels.STREAMED[way]))
        return self._measured(run, asked, max(TURNS_MAX, whole), whole)

    def _checked(self, way: Way, out: Any, sums: Sums, spots: Any, group: int, offset: int, stride: int, step: int,
                 turns: int, each: int = 0) -> str:
        """Whether some threads found what they were to read, or ended where they were to. each: places of a turn, 0:
        those of STREAM."""
        found = self._read(out, int(spots.max()) + 1)
        many = turns * (each or kernels.STREAMED[way])
        for spot in map(int, spots if way == "read" else spots[::-(-len(spots) // 4)]):
            first = (spot // group * offset + spot % group * stride) % sums.size
            if way != "read":
                if int(found[spot]) != (first + many * step) % sums.size:
                    return f"thread {spot} did not go where it was to"
            elif int(found[spot]) != sums.along(first, step, many):
                return f"thread {spot} did not read what is there"
        return ""

    @shrinking
    def chain(self, operation: Operation, element: Element, width: int, chains: int, threads: int) -> Timing:
        if element not in self.limits.elements:
            raise UnsupportedError(f"the device does not compute on {element}")
        kernel = self._kernel(self.kernels.chain(operation, element, width, chains), "chain")
        kind = np.float32 if element.startswith("float") else np.uint32
        a, b = (kind(v) for v in operands(operation, element))
        one = kind(1)
        group = min(threads, self.group)
        if element in ("char4", "int8x4") and self.limits.processor:
            group = min(group, extras.SMALL)  # hundreds of instructions a step in what is followed
        threads = max(group, threads // group * group)
        out = self._buffer(np.zeros(threads, kind))
        lids = [0] if group == 1 else [0, group // 2, threads - 1]

        def run(turns: int) -> tuple[float, str]:
            seconds = self._time(kernel, (threads,), (group,), out, np.uint32(turns), a, b, one)
            found = self._read(out, threads, kind)
            if small := bounds.subnormal([a, b, one, *found[lids]], element):
                return seconds, small
            for i in lids:
                starts = [(i % group & 7) + c + 1 for c in range(chains)]
                ends = [chained(operation, element, s, turns) for s in starts]
                want = sum(ends) * width
                if not element.startswith("float"):
                    right = int(found[i]) == (want := int(want) % (1 << 32))
                else:
                    right = bool(np.isclose(float(found[i]), want, rtol=2e-2 if element == "float16" else 1e-6))
                if not right:
                    return seconds, f"thread {i} ended with {found[i]}, not {want}"
            return seconds, ""

        most = (1 << 24) // kernels.STEPS - 64 if element == "float32" else TURNS_MAX
        each = kernels.STEPS * chains * width * OPERATIONS_A_STEP[element]
        if element == "char4":  # compilers make products of bytes of others, in lanes that not all are needed
            return self._measured(run, Asked("operations", {counting.PRODUCTS: each}, most=4), most)
        counted = {"fma int8x4": "fma int8", "add int32": counting.SUMS}.get(what := f"{operation} {element}", what)
        asked = Asked("operations", {counted: each},
                      pads=width * chains > 1 and (width == 2 or width * chains % 4 != 0))
        return self._measured(run, asked, most)

    @shrinking
    def diverge(self, period: int) -> Timing:
        kernel = self._kernel(self.kernels.DIVERGE, "diverge")
        group = self.group
        threads = group * self.full_groups
        out = self._buffer(np.zeros(threads, np.uint32))
        a, b = 1664525, 1013904223

        def run(turns: int) -> tuple[float, str]:
            seconds = self._time(kernel, (threads,), (group,), out, np.uint32(turns), np.uint32(period), np.uint32(a),
                                 np.uint32(b))
            found = self._read(out, threads)
            for i in (0, group - 1, threads // 2 + 1):
                first = (i % group // period) & 1
                want = congruential(*((a, b) if first else (b, a)), i, turns * kernels.DIVERGED)
                if int(found[i]) != want:
                    return seconds, f"thread {i} ended with {found[i]}, not {want}"
            return seconds, ""

        # a compiler may do both ways in all lanes of a vector
        return self._measured(run, Asked("operations", {"fma int32": kernels.DIVERGED}, most=2))

    @shrinking
    def hold(self, registers: int, threads: int) -> Timing:
        kernel = self._kernel(self.kernels.hold(registers), "hold")
        group = min(HELD_GROUP, self.group, threads)
        threads = max(group, threads // group * group)
        out = self._buffer(np.zeros(threads, np.float32))

        def run(turns: int) -> tuple[float, str]:
            seconds = self._time(kernel, (threads,), (group,), out, np.uint32(turns), np.float32(0.5),
                                 np.float32(0.5))
            found = self._read(out, threads, np.float32)
            return seconds, "" if (found == found[0]).all() else "threads disagree"

        return self._measured(run, Asked("operations", {"fma float32": registers}))

    @shrinking
    def local(self, stride: int, width: int = 4) -> Timing:
        words = self.words
        kernel = self._kernel(self.kernels.local(words, width), "local_loads")
        group = self.group
        threads = group * self.full_groups
        out = self._buffer(np.zeros(threads, np.uint32))
        cells = ((np.arange(words, dtype=np.uint64) * 2654435761) % (1 << 32)).reshape(-1, width // 4).sum(axis=1)

        def run(turns: int) -> tuple[float, str]:
            seconds = self._time(kernel, (threads,), (group,), out, np.uint32(turns), np.uint32(stride))
            found = self._read(out, threads)
            for i in (0, group - 1):
                at = (i * stride + np.arange(turns * kernels.LOADED, dtype=np.uint64)) % len(cells)
                want = int(cells[at].sum(dtype=np.uint64)) % (1 << 32)
                if int(found[i]) != want:
                    return seconds, f"thread {i} read {found[i]}, not {want}"
            return seconds, ""

        return self._measured(run, Asked("loads", {"load bytes": width * kernels.LOADED}, 4), 1 << 18)

    def launch(self) -> Timing:
        kernel = self._kernel(self.kernels.LAUNCH, "launch")
        out = self._buffer(np.zeros(1, np.uint32))
        found = []
        for _ in range(8 * REPEATS):
            start = time.perf_counter()
            self._time(kernel, (1,), (1,), out, np.uint32(0))
            found.append(time.perf_counter() - start)
        return Timing(tuple(found[REPEATS:]), {"launches": 1})

    @shrinking
    def barrier(self) -> Timing:
        group = self.group
        if group < 2:
            raise UnsupportedError("a thread alone meets nobody", got=f"groups of {group}")
        kernel = self._kernel(self.kernels.barrier(group), "meet")
        words = np.arange(group, dtype=np.uint32) * np.uint32(2654435761)
        out, apart = self._buffer(words), group // 2 | 1

        def run(turns: int) -> tuple[float, str]:
            nonlocal words
            seconds = self._time(kernel, (group,), (group,), out, np.uint32(turns), np.uint32(apart))
            met = turns * kernels.MET
            want, words = np.roll(words, -(met * apart % group)) + np.uint32(met), self._read(out, group)
            return seconds, "" if (words == want).all() else "threads did not wait for each other"

        # of a group; what a thread keeps for behind a barrier may be stored and loaded as well
        exchanged = {f"{way} bytes": 4 * kernels.MET for way in ("load", "store")}
        return self._measured(run, Asked("barriers", exchanged, 8 * group, most=4, besides={"barriers": kernels.MET}))

    def transfer(self, size: int, to_device: bool) -> Timing:
        host = self._content(size)
        buffer = self._buffer(host)
        back = np.zeros_like(host)
        found = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            if to_device:
                self._do(lambda: self.cl.enqueue_copy(self.queue, buffer, host).wait())
            else:
                self._do(lambda: self.cl.enqueue_copy(self.queue, back, buffer).wait())
            found.append(time.perf_counter() - start)
        self._do(lambda: self.cl.enqueue_copy(self.queue, back, buffer).wait())
        return Timing(tuple(found[1:]), {"bytes": float(size)}, "" if (back == host).all() else "bytes were lost")

    def _content(self, size: int) -> NDArray[np.uint8]:
        """To be transferred. Raises: CapacityError unless the host has room for it, a copy and what comes back."""
        if (room := available()) < 4 * size:
            raise CapacityError("the host has no room for a transfer", got=f"{room} bytes are available",
                                want=f"4 times {size}")
        return np.resize(np.random.default_rng(0).integers(0, 256, min(size, (1 << 20) - 1), np.uint8), size)

    @shrinking
    def stream_parts(self, footprint: int, width: int, way: Way, parts: int, own: bool = False, stride: int = 1
                     ) -> Timing:
        if not self.one_by_one:
            raise UnsupportedError("neighbouring threads share what they load: parts are for devices without")
        return extras.stream_parts(self, footprint, width, way, parts, own, stride)

    def primed(self, footprint: int, behind: int) -> Timing:
        if not self.one_by_one:
            raise UnsupportedError("a device of many threads has no single one whose chase is all that is timed")
        return self._proven(extras.primed(self, footprint, behind, REPEATS))

    @shrinking
    def image(self, footprint: int, texel: int = 16, order: Order = "rows") -> Timing:
        return extras.image(self, footprint, texel, order)

    @shrinking
    def constant(self, spread: bool, width: int = 4) -> Timing:
        return extras.constant(self, spread, width)

    @shrinking
    def local_write(self, stride: int, width: int = 4) -> Timing:
        return extras.local_write(self, stride, width)

    def map(self, size: int) -> Timing:
        return extras.map_buffer(self, size, 8 * REPEATS)

    # how they are done

    def _measured(self, run: Callable[[int], tuple[float, str]], asked: Asked, most: int = TURNS_MAX, whole: int = 1
                  ) -> Timing:
        """Repetitions of so many turns that one takes long enough; then once with half of them, which must be
        quicker.

        asked  of a turn of each thread: that is counted in the compiled code.
        whole  turns that go through all of the memory: with fewer, repetitions would find it in caches.
        """
        if self.turns_max < TURNS_MAX:  # the driver ends loops early
            most = min(most, self.turns_max)
        turns = min(whole, most)
        seconds, wrong = run(turns)  # compiles
        while turns < most:
            seconds, wrong = run(turns)
            if seconds < self.waited / 100 and self.waited > WAITED:
                self._clock_goes(partial(run, turns))
            if wrong or (seconds >= ENOUGH and run(turns)[0] >= ENOUGH):  # twice: something may have disturbed one
                break
            turns = min(most, turns * (2 if seconds > ENOUGH / 8 or seconds <= 0 else 4))
        found = []
        for _ in range(REPEATS):
            seconds, fault = run(turns)
            wrong = wrong or fault
            found.append(seconds)
            if sum(found) > LONGEST * REPEATS:
                break
        doubtful = ""
        if turns < whole:
            wrong = wrong or f"a cached buffer: {turns} turns go through {turns / whole:.2g} of it"
        if not wrong and turns >= 8 and min(found) < SCALES * min(run(turns // 2)[0] for _ in range(REPEATS)):
            # in turns, now: what a neighbour on a busy machine does in between meets both
            pairs = [(run(turns)[0], run(turns // 2)[0]) for _ in range(2 * REPEATS)]
            if min(p[0] for p in pairs) < SCALES * min(p[1] for p in pairs):
                doubtful = "twice the turns of the loop do not take longer in proportion"
        counted, threads = self._count()
        return Timing(tuple(found), {asked.work: counting.work(counted, asked) * turns * threads},
                      wrong or counting.objection(counted, asked), doubtful, counting.source(counted))

    def _clock_goes(self, run: Callable[[], tuple[float, str]]) -> None:
        """Raises: DeviceError if events say that nearly none of the time passed which did, again and again."""
        for _ in range(2):
            seconds, _ = run()
            if seconds >= self.waited / 100 or self.waited <= WAITED:
                return
        raise DeviceError(f"{self.identity.name} has no clock that can be believed",
                          got=f"{seconds:.3g} s by its events, {self.waited:.3g} s by the host's clock",
                          try_="another driver of the device, or a newer version")

    def _longest_loop(self) -> int:
        """Turns of a loop that the driver really does."""
        done = self._walked(TURNS_TRIED) // kernels.CHASED
        if not done:
            raise DeviceError(f"{self.identity.name} does not run a loop", want=f"{TURNS_TRIED} turns", got=done)
        return TURNS_MAX if done == TURNS_TRIED else 1 << (done.bit_length() - 1)

    def _walked(self, turns: int) -> int:
        """Loads of so many turns of a chase, by where it ends: place i leads to i + 1, and none is come to twice."""
        kernel, out = self._kernel(self.kernels.CHASE, "chase"), self._buffer(np.zeros(1, np.uint32))
        following = np.arange(1, turns * kernels.CHASED + 2, dtype=np.uint32)
        self._time(kernel, (1,), (1,), self._buffer(following), out, np.uint32(turns))
        return int(self._read(out, 1)[0])

    def _proven(self, chased: Timing) -> Timing:
        """Of a chase whose code was not read: its loads are counted by its result. One that goes round ends where it
        must with whole rounds left out, too; the same kernel with as many turns therefore goes a way without a round.
        """
        if chased.wrong or not chased.counted.startswith(counting.STATED):
            return chased
        loads = int(chased.work["loads"])
        if loads not in self._ways:
            self._ways[loads] = self._walked(loads // kernels.CHASED)
        if self._ways[loads] != loads:
            return replace(chased, wrong=f"the chase did {self._ways[loads]} loads, not {loads}")
        return replace(chased, counted=chased.counted.replace(counting.STATED, counting.PROVEN))

    def _count(self) -> tuple[Counted, int]:
        """(a turn of each thread, threads) of the last launch; counted once for a kernel and a size of groups."""
        kernel, size, group, arguments = self._last
        key = (kernel, group)
        if key not in self._counts:
            self._counts[key] = counting.count(self.cl, self.queue, kernel.source, kernel.name, size, group, arguments,
                                               kernel.options)
        return self._counts[key], int(np.prod(size))

    def _compiled(self, source: Any, name: str) -> Any:
        def build(*options: str) -> Compiled:
            program = self.cl.Program(self.context, source).build(options=list(options))
            return Compiled(getattr(program, name), source, name, options)

        try:
            if kernels.DOT in source:
                try:
                    return build("-cl-std=CL3.0")  # which has such functions; drivers take 1.2 unless they are told
                except self.cl.Error:
                    pass
            return build()
        except self.cl.Error as e:
            raise DeviceError(f"{self.identity.name} does not compile the kernel '{name}'",
                              got=str(e).strip()[:300]) from None

    def _do(self, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except self.cl.MemoryError as e:
            if self.filled.clear():
                return self._do(what)
            raise CapacityError(f"{self.identity.name} has no room for an experiment", got=str(e)[:200]) from None
        except self.cl.Error as e:
            status = self.cl.status_code
            if e.code in (status.INVALID_WORK_GROUP_SIZE, status.INVALID_WORK_ITEM_SIZE, status.OUT_OF_RESOURCES):
                raise Overstated(f"{self.identity.name} does not take what its limits allow", got=str(e)[:200],
                                 want=f"a group of {self.group} threads, {self.words} words of local memory") from None
            raise DeviceError(f"{self.identity.name} failed in an experiment", got=str(e).strip()[:300],
                              try_="update the driver; run the others with this one left out") from None

    def _buffer(self, content: Any) -> Any:
        flags = self.cl.mem_flags
        if content.nbytes > self.limits.buffer_max:
            raise CapacityError(f"{self.identity.name} has no buffers of this size", got=f"{content.nbytes} bytes",
                                want=f"at most {self.limits.buffer_max}")
        return self._do(lambda: self.cl.Buffer(self.context, flags.READ_WRITE | flags.COPY_HOST_PTR, hostbuf=content))

    def _read(self, buffer: Any, count: int, kind: Any = np.uint32) -> Any:
        found = np.empty(count, kind)
        self._do(lambda: self.cl.enqueue_copy(self.queue, found, buffer).wait())
        return found

    def _time(self, kernel: Any, size: tuple[int, ...], group: tuple[int, ...], *arguments: Any) -> float:
        """Seconds of one run by the device's clock."""
        self._last = kernel, size, group, arguments

        def run() -> float:
            begun = time.perf_counter()
            event = kernel(self.queue, size, group, *arguments)
            event.wait()
            self.waited = time.perf_counter() - begun
            return float(event.profile.end - event.profile.start) * 1e-9

        return float(self._do(run))
