"""Experiments on a Vulkan device, by wgpu: those of npulab.gpu.opencl with shaders in place of kernels.

wgpu's compiler (naga) reads each shader and writes it anew. It would guard accesses to memory and count the turns of
loops; where it can be told not to, it is: these shaders stay within their buffers. The costs of launches and transfers
are those of an application that uses wgpu.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from npulab.errors import CapacityError, DeviceError, UnsupportedError, UsageError
from npulab.gpu import opencl, shaders
from npulab.gpu import wgpu_native as native
from npulab.gpu.counting import Counted, spirv
from npulab.gpu.filled import Filled
from npulab.gpu.types import Element, Identity, Limits, Timing
from npulab.gpu.vulkan_more import MAPPABLE, More

DRIVERS = "mesa-vulkan-drivers (Intel, AMD, Mali, Adreno, VideoCore; lavapipe: the CPU), the vendor's"
INSTALL = "pip install 'npulab[vulkan]'"
FEATURES: dict[str, Element] = {"shader-f16": "float16"}
Call = tuple[Any, Any, Sequence[int]]
"""Of a shader: pipeline, what is bound, groups in x (and y)."""
ARGUMENTS = 32
"""Bytes of the uniform block, no shader has more than eight numbers."""
GROUPS_MAX = 65535
"""Work groups of a launch (Vulkan 1.3, maxComputeWorkGroupCount, and WebGPU)."""
EMPTY_RUNS = 21
CORES_MAX = 1 << 10
CROWDED = 1.4
"""Times what one work group takes: so many groups have to share cores."""


def devices() -> list[Identity]:
    """All Vulkan devices, in the order of their numbers. Raises: UsageError without wgpu."""
    return [_identity(a) for a in _adapters()]


@lru_cache(1)
def _adapters() -> list[Any]:
    try:
        import wgpu
        from wgpu.backends.wgpu_native.extras import set_instance_extras
    except ImportError:
        raise UsageError("Vulkan devices are measured through wgpu, and the package wgpu is not installed",
                         try_=INSTALL) from None
    except (OSError, RuntimeError) as e:  # its library does not load here: another processor or C library
        raise UsageError("the package wgpu does not work here", got=str(e)[:300], try_=INSTALL) from None
    os.environ.setdefault("NODEVICE_SELECT", "1")  # Mesa's layer that asks the desktop which device it prefers
    logging.getLogger("wgpu").setLevel(logging.CRITICAL)  # what it logs, it raises, too
    with suppress(RuntimeError):  # another part of the program uses wgpu already
        # drivers that have not passed the conformance tests yet are listed, too: results are checked here
        set_instance_extras(backends=["Vulkan"], flags=["Default", "AllowUnderlyingNoncompliantAdapter"])
    return [a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] == "Vulkan"]


def _identity(adapter: Any) -> Identity:
    import wgpu

    info = adapter.info
    clock = "" if "timestamp-query" in adapter.features else ", the host's clock"
    return Identity("vulkan", f"Vulkan by wgpu {wgpu.__version__}{clock}", str(info["device"]), str(info["vendor"]),
                    str(info["description"]) or "unknown", f"{info['adapter_type']}, {_subgroups(info)}")


def _subgroups(info: Mapping[str, Any]) -> str:
    low, high = subgroup(info)
    return f"subgroups of {low}" if low == high else f"subgroups of {low} to {high}"


def subgroup(info: Mapping[str, Any]) -> tuple[int, int]:
    """Threads of a subgroup as stated, at least and at most; 0: not. (wgpu 0.32 misspells the names.)"""
    low, high = (next((int(v) for k, v in info.items() if k.endswith(f"group_{end}_size")), 0)
                 for end in ("min", "max"))
    return low, high


def open_device(number: int = 0) -> Vulkan:
    """Device `number` of `devices()`. Raises: DeviceError if there is none; UsageError without wgpu."""
    found = _adapters()
    if not 0 <= number < len(found):
        have = "; ".join(f"{i}: {a.info['device']}" for i, a in enumerate(found)) or "none"
        raise DeviceError(f"there is no Vulkan device {number}", got=have,
                          try_="one of these" if found else f"install a driver: {DRIVERS}")
    return Vulkan(found[number])


@dataclass(frozen=True, slots=True)
class Kernel:
    recipe: shaders.Recipe
    entry: str


class Vulkan(More):
    """A Bench. See npulab.gpu.types.

    Experiments and their checks are the ones of OpenCL; what differs is how a kernel is made, run and timed.
    Vulkan does not state how many cores a device has: of a CPU they are counted, of a GPU measured when it is opened.
    """

    def __init__(self, adapter: Any) -> None:
        import wgpu

        self.wgpu, self.adapter = wgpu, adapter
        self.kernels = shaders
        self.identity = _identity(adapter)
        given = adapter.limits
        halves = {e for f, e in FEATURES.items() if f in adapter.features}
        self.clocked = "timestamp-query" in adapter.features
        wanted = [f for f in ("timestamp-query", MAPPABLE, *FEATURES) if f in adapter.features]
        self._empty: float | None = None
        self._counts: dict[tuple[Any, ...], Counted] = {}
        self._last: tuple[Any, ...] = ()  # of what was launched
        self._ways: dict[int, int] = {}
        self.filled = Filled()
        self.waited = 0.0  # its clock is compared with the host's where there is one
        self.device = self._do(lambda: adapter.request_device_sync(required_features=wanted,
                                                                   required_limits=dict(given)))
        self._kernel = lru_cache(maxsize=64)(self._compiled)
        self._pipeline = lru_cache(maxsize=64)(self._made)
        self._whole = lru_cache(maxsize=64)(partial(self._pipeline_of, name="main"))
        self._arguments = self._do(lambda: self.device.create_buffer(
            size=ARGUMENTS, usage=wgpu.BufferUsage.UNIFORM | wgpu.BufferUsage.COPY_DST))
        if self.clocked:
            self._queries = self._do(lambda: self.device.create_query_set(type="timestamp", count=2))
            self._ticks = self._do(lambda: self.device.create_buffer(
                size=16, usage=wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC))
            self._tick = native.tick(self.device)
        self.cpu = adapter.info["adapter_type"] == "CPU"
        self.limits = Limits(
            _cpus() if self.cpu else 1,
            min(int(given["max-compute-workgroup-size-x"]), int(given["max-compute-invocations-per-workgroup"])),
            int(given["max-compute-workgroup-storage-size"]),
            min(int(given["max-buffer-size"]), int(given["max-storage-buffer-binding-size"])) // 16 * 16,
            frozenset(("float32", "int32", *halves)), processor=self.cpu)
        self.group = min(opencl.GROUP, self.limits.group_max)
        self.one_by_one = False  # llvmpipe has neighbours in the lanes of a vector
        self.words = 1 << (min(opencl.WORDS_MAX, self.limits.local_bytes // 4).bit_length() - 1)
        self.turns_max = self._longest_loop()
        if not self.cpu:
            self.limits = replace(self.limits, compute_units=self._cores())

    def launch(self) -> Timing:
        kernel, out = self._kernel(self.kernels.LAUNCH, "launch"), self._buffer(np.zeros(1, np.uint32))
        call = self._prepared(kernel, (1,), (1,), out, np.uint32(0))
        found = []
        for _ in range(8 * opencl.REPEATS):
            start = time.perf_counter()
            self._do(lambda: self._submit(call, stamped=False))
            found.append(time.perf_counter() - start)
        return Timing(tuple(found[opencl.REPEATS:]), {"launches": 1})

    def transfer(self, size: int, to_device: bool) -> Timing:
        host = self._content(size)
        buffer = self._buffer(host if not to_device else np.zeros_like(host))
        queue = self.device.queue

        def up() -> None:
            queue.write_buffer(buffer, 0, host)
            queue.submit([])
            native.wait(self.device)

        found = []
        for _ in range(opencl.REPEATS + 1):
            start = time.perf_counter()
            self._do(up if to_device else lambda: queue.read_buffer(buffer))
            found.append(time.perf_counter() - start)
        back = self._read(buffer, size, np.uint8)
        return Timing(tuple(found[1:]), {"bytes": float(size)}, "" if (back == host).all() else "bytes were lost")

    def compute(self, words: bytes, groups: Sequence[int], buffers: Sequence[Any]) -> float:
        """Seconds of one run of a module with the entry point main, buffers in the order of their bindings. Of its
        first run a driver may make a compilation."""
        return self._timed(self._call(self._whole(words), groups, buffers))

    # how they are done

    def _cores(self) -> int:
        """How many work groups run without taking time from each other, each of as many threads as a group has and of
        multiply-adds alone: a device gives a group to a core that has none, as long as there are such."""
        kernel = self._kernel(self.kernels.chain("fma", "float32", 4, 4), "chain")
        group = self.limits.group_max
        out = self._buffer(np.zeros(CORES_MAX * group, np.float32))
        numbers = (np.float32(1), np.float32(1), np.float32(1))

        def seconds(groups: int, turns: int) -> float:
            return min(self._time(kernel, (groups * group,), (group,), out, np.uint32(turns), *numbers)
                       for _ in range(opencl.REPEATS))

        turns = 16
        while turns < self.turns_max // 2:
            alone = seconds(1, turns)
            if alone >= opencl.ENOUGH and seconds(1, 2 * turns) >= opencl.SCALES * alone:  # else it is a start's cost
                break
            turns *= 2
        alone, low = seconds(1, turns), 1
        while low < CORES_MAX and seconds(2 * low, turns) < CROWDED * alone:
            low *= 2
        if low >= CORES_MAX:
            return low
        high = 2 * low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if seconds(middle, turns) < CROWDED * alone else (low, middle)
        return low

    def _compiled(self, source: Any, name: str) -> Kernel:
        return Kernel(source, name)

    def module(self, kernel: Kernel, group: int) -> bytes:
        """The module that is given to wgpu."""
        return kernel.recipe.make(kernel.entry, group)

    def _made(self, kernel: Kernel, group: int) -> Any:
        """A compute pipeline."""
        return self._pipeline_of(self.module(kernel, group), kernel.entry)

    def _pipeline_of(self, words: bytes, name: str) -> Any:
        try:
            module = native.trusted(self.device, words)
            return self.device.create_compute_pipeline(layout="auto", compute={"module": module, "entry_point": "main"})
        except (self.wgpu.GPUError, RuntimeError) as e:
            raise DeviceError(f"{self.identity.name} does not compile the kernel '{name}'",
                              got=str(e).strip()[:300]) from None

    def _do(self, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except self.wgpu.GPUOutOfMemoryError as e:
            if self.filled.clear():
                return self._do(what)
            raise CapacityError(f"{self.identity.name} has no room for an experiment", got=str(e)[:200]) from None
        except (self.wgpu.GPUError, RuntimeError) as e:
            raise DeviceError(f"{self.identity.name} failed in an experiment", got=str(e).strip()[:300],
                              try_="update the driver; run the others with this one left out") from None

    def _buffer(self, content: Any) -> Any:
        if content.nbytes > self.limits.buffer_max:
            raise CapacityError(f"{self.identity.name} has no buffers of this size", got=f"{content.nbytes} bytes",
                                want=f"at most {self.limits.buffer_max}")
        usage = self.wgpu.BufferUsage
        return self._do(lambda: self.device.create_buffer_with_data(
            data=content, usage=usage.STORAGE | usage.COPY_SRC | usage.COPY_DST))

    def _read(self, buffer: Any, count: int, kind: Any = np.uint32) -> Any:
        found = self._do(lambda: self.device.queue.read_buffer(buffer, 0, count * np.dtype(kind).itemsize))
        return np.frombuffer(found, kind)

    def _time(self, kernel: Kernel, size: tuple[int, ...], group: tuple[int, ...], *arguments: Any) -> float:
        """Seconds of one run by the device's clock, else by the host's, less what an empty one takes."""
        self._last = kernel, size, group, arguments
        return self._timed(self._prepared(kernel, size, group, *arguments))

    def _count(self) -> tuple[Counted, int]:
        """(a turn of each thread, threads) of the last launch, in the module that wgpu is given; counted once for a
        kernel and a size of groups."""
        kernel, size, group, arguments = self._last
        key = (kernel, group)
        if key not in self._counts:
            numbers = [a for a in arguments if isinstance(a, np.generic)]
            binding = next(i for i, a in enumerate(arguments) if isinstance(a, np.generic))
            self._counts[key] = spirv.count(self.module(kernel, group[0]), size, group,
                                            b"".join(n.tobytes() for n in numbers), 4 * kernel.recipe.turns, binding)
        return self._counts[key], int(np.prod(size))

    def _timed(self, call: Call) -> float:
        def run() -> float:
            if self.clocked:
                self._submit(call, wait=False)  # reading does
                first, last = np.frombuffer(self.device.queue.read_buffer(self._ticks), np.uint64)
                return float(int(last) - int(first)) * self._tick
            start = time.perf_counter()
            self._submit(call, stamped=False)
            return time.perf_counter() - start

        seconds = float(self._do(run))
        return seconds if self.clocked else max(0.0, seconds - self._nothing())

    def _nothing(self) -> float:
        """Seconds of a run that does nothing, by the host's clock."""
        if self._empty is None:
            self._empty = 0.0
            self._empty = float(np.median(self.launch().seconds[-EMPTY_RUNS:]))
        return self._empty

    def _prepared(self, kernel: Kernel, size: tuple[int, ...], group: tuple[int, ...], *arguments: Any) -> Call:
        """A launch with its arguments in place: buffers, numbers, what else is bound."""
        numbers = [a for a in arguments if isinstance(a, np.generic)]
        first = next(i for i, a in enumerate(arguments) if isinstance(a, np.generic))
        buffers = [*arguments[:first], self._arguments, *arguments[first + len(numbers):]]
        call = self._call(self._pipeline(kernel, group[0]), (size[0] // group[0],), buffers)
        content = b"".join(n.tobytes() for n in numbers)
        self._do(lambda: self.device.queue.write_buffer(self._arguments, 0, content))
        return call

    def _call(self, pipeline: Any, groups: Sequence[int], buffers: Sequence[Any]) -> Call:
        if max(groups) > GROUPS_MAX:
            raise UnsupportedError(f"{self.identity.name} starts at most {GROUPS_MAX} groups at once", got=max(groups))
        bound = self._do(lambda: self.device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=[
            {"binding": i, "resource": {"buffer": b, "offset": 0, "size": b.size}
             if isinstance(b, self.wgpu.GPUBuffer) else b} for i, b in enumerate(buffers)]))
        return pipeline, bound, groups

    def _submit(self, call: Call, wait: bool = True, stamped: bool = True) -> None:
        pipeline, bound, groups = call
        encoder = self.device.create_command_encoder()
        stamps = {"timestamp_writes": {"query_set": self._queries, "beginning_of_pass_write_index": 0,
                                       "end_of_pass_write_index": 1}} if stamped else {}
        work = encoder.begin_compute_pass(**stamps)
        work.set_pipeline(pipeline)
        work.set_bind_group(0, bound)
        work.dispatch_workgroups(*groups)
        work.end()
        if stamped:
            encoder.resolve_query_set(self._queries, 0, 2, self._ticks, 0)
        self.device.queue.submit([encoder.finish()])
        if wait:
            native.wait(self.device)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
