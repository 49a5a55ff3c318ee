"""An OpenCL device that runs launches: sources compiled once, buffers, times of its own clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import CapacityError, DeviceError, UnsupportedError
from npulab.gpu import opencl
from npulab.gpu.compute.types import Buffer, Kernel, Launch
from npulab.gpu.compute.watch import Doing

OPTIONS = ("-cl-std=CL1.2",)
"""No -cl-fast-relaxed-math: results are compared with others'."""
DOTS = ("-cl-std=CL3.0",)
"""For kernels with cl_khr_integer_dot_product, where the device has it: it is declared for no language before."""


class Device:
    """Raises everywhere: DeviceError if the device fails or does not compile; CapacityError if memory is short."""

    def __init__(self, number: int = 0) -> None:
        """Raises: DeviceError if there is no such device; UsageError without pyopencl; UnsupportedError if its driver
        ends loops early, as results would be wrong."""
        bench = opencl.open_device(number)
        if bench.turns_max < opencl.TURNS_MAX:
            raise UnsupportedError(f"{bench.identity.name} ends loops after {bench.turns_max} turns, and says nothing",
                                   where="its OpenCL driver", want="loops that do all of their turns",
                                   try_="another driver of the device; npulab probe measures it nevertheless")
        self.cl, self.context, self.device = bench.cl, bench.context, bench.device
        self.identity, self.limits = bench.identity, bench.limits
        self.queue = self.cl.CommandQueue(self.context,
                                          properties=self.cl.command_queue_properties.PROFILING_ENABLE)
        self._programs: dict[Kernel, tuple[Any, Any]] = {}
        self.doing = Doing()

    def kernel(self, kernel: Kernel) -> Any:
        """Compiled, at the first call."""
        if kernel not in self._programs:
            dots = "dot_4x8packed" in kernel.source and "int8x4" in self.limits.elements
            self.doing.begin(f"the kernel '{kernel.entry}', to be compiled")
            try:
                program = self.cl.Program(self.context, kernel.source).build(
                    options=list(DOTS if dots else OPTIONS))
            except self.cl.Error as e:
                raise DeviceError(f"{self.identity.name} does not compile the kernel '{kernel.entry}'",
                                  got=str(e).strip()[:300]) from None
            finally:
                self.doing.end()
            self._programs[kernel] = program, getattr(program, kernel.entry)
        return self._programs[kernel][1]

    def allocate(self, size: int) -> Any:
        """A buffer of `size` bytes."""
        if size > self.limits.buffer_max:
            raise CapacityError(f"{self.identity.name} has no buffers of this size", got=f"{size} bytes",
                                want=f"at most {self.limits.buffer_max}")
        return self._do("a buffer", lambda: self.cl.Buffer(self.context, self.cl.mem_flags.READ_WRITE, max(1, size)))

    def part(self, buffer: Any, offset: int, size: int) -> Any:
        """A piece of a buffer, as a buffer. The offset is a multiple of the device's alignment."""
        return self._do("a buffer", lambda: buffer.get_sub_region(offset, max(1, size)))

    def upload(self, array: NDArray[Any], buffer: Any = None) -> Any:
        """The array in `buffer`, or in a new one."""
        array = np.ascontiguousarray(array)
        buffer = buffer if buffer is not None else self.allocate(array.nbytes)
        if array.nbytes:
            self._do("a copy to the device", lambda: self.cl.enqueue_copy(self.queue, buffer, array))
        return buffer

    def download(self, buffer: Any, shape: Sequence[int], dtype: Any = np.float32) -> NDArray[Any]:
        found = np.empty(tuple(shape), dtype)
        if found.nbytes:
            self._do("a copy from the device", lambda: self.cl.enqueue_copy(self.queue, found, buffer))
        return found

    def run(self, launches: Sequence[Launch], buffers: Mapping[str, Any]) -> list[float]:
        """Seconds of each launch by the device's clock, after the last has ended. `buffers`: of the roles."""
        def arguments(launch: Launch) -> list[Any]:
            return [buffers[a.role] if isinstance(a, Buffer) else a for a in launch.arguments]

        for x in launches:
            self.kernel(x.kernel)

        def run() -> list[float]:
            return self._times([self.kernel(x.kernel)(self.queue, x.size, x.group, *arguments(x)) for x in launches],
                               launches)

        found: list[float] = self._do("launches", run)
        return found

    def prepared(self, launches: Sequence[Launch], buffers: Mapping[str, Any]) -> Callable[[], list[float]]:
        """`run` of these, to be called again and again: arguments are set once, which takes longer than many a launch
        (on PoCL 250 us of 300)."""
        def made(x: Launch) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
            kernel = self.cl.Kernel(self._programs[x.kernel][0], x.kernel.entry)
            kernel.set_args(*(buffers[a.role] if isinstance(a, Buffer) else a for a in x.arguments))
            return kernel, x.size, x.group

        for x in launches:
            self.kernel(x.kernel)
        ready: list[Any] = self._do("arguments of kernels", lambda: [made(x) for x in launches])

        def run() -> list[float]:
            return self._times([self.cl.enqueue_nd_range_kernel(self.queue, *r) for r in ready], launches)

        return lambda: list(self._do("launches", run))

    def _times(self, events: Sequence[Any], launches: Sequence[Launch]) -> list[float]:
        self.doing.labels, self.doing.events = [x.label for x in launches], events
        self.queue.finish()
        return [(e.profile.end - e.profile.start) * 1e-9 for e in events]

    def _do(self, doing: str, what: Callable[[], Any]) -> Any:
        self.doing.begin(doing)
        try:
            return what()
        except self.cl.MemoryError as e:
            raise CapacityError(f"{self.identity.name} has no room for the network", got=str(e)[:200]) from None
        except self.cl.Error as e:
            raise DeviceError(f"{self.identity.name} failed", got=str(e).strip()[:300],
                              try_="update the driver; --device onnxruntime runs the network here") from None
        finally:
            self.doing.end()
