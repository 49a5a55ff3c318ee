"""Nouns of measuring a GPU: experiments that a device does, the times that they took, and what was concluded.

A Bench does experiments, a real device through OpenCL or a simulated one. Conclusions (`npulab.gpu.analysis`) see
nothing but Timings: what a simulated GPU hides must be found the same way as what a real one hides.

GB/s are 10^9 bytes a second. Sizes are bytes, times seconds, rates per second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Element = Literal["float32", "float16", "int32", "int8x4", "char4"]
"""What is computed on; int8x4: a dot product of four pairs of bytes, added to an int32, by the device's own instruction
(cl_khr_integer_dot_product); char4: the same written out in plain C. A step of these is OPERATIONS_A_STEP."""
OPERATIONS_A_STEP: dict[Element, int] = {"float32": 1, "float16": 1, "int32": 1, "int8x4": 4, "char4": 4}
"""Scalar operations of a step of a chain, for each element of a vector: a multiply-add is one."""
Operation = Literal["fma", "mul", "add", "special"]
"""A dependent step of a chain: a * b + c, a * b, a + b, 1 / sqrt(a). Of int8x4 and char4 only "fma", of int32 no
"special"."""
Way = Literal["read", "write", "copy"]
Order = Literal["rows", "columns", "tiles"]
"""How neighbouring threads read an image: along a row, down a column, tiles of four by four texels."""
Status = Literal["measured", "refused"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who was measured. `api`: "opencl", "vulkan" or "simulated"; versions as the device states them."""

    api: str
    platform: str
    name: str
    vendor: str
    driver: str
    version: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device says that it takes. Experiments stay within; conclusions do not repeat it as a finding.

    compute_units  cores.      group_max  threads of a work group.     local_bytes  of local memory a group.
    buffer_max     bytes of one buffer.       elements  what it computes on.      clock_hz  as stated, 0: not.
    subgroup       threads of a subgroup (warp, wavefront) as stated, 0: not.
    processor      it is the host's.
    """

    compute_units: int
    group_max: int
    local_bytes: int
    buffer_max: int
    elements: frozenset[Element]
    clock_hz: float = 0.0
    subgroup: int = 0
    processor: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """One experiment, repeated.

    seconds  of each repetition, in their order, by the device's own clock where it has one.
    work     of one repetition, counted in the compiled code: "operations", "bytes", "loads".
    wrong    what is wrong with the result: it is not to be believed; "" if nothing is.
    doubtful what speaks against the times alone; another try may do better on a busy machine.
    counted  where the work was counted, or that it was not (`npulab.gpu.counting.STATED`) and why; "" where nothing
             was compiled.
    """

    seconds: tuple[float, ...]
    work: Mapping[str, float] = field(default_factory=dict)
    wrong: str = ""
    doubtful: str = ""
    counted: str = ""


class Bench(Protocol):
    """A device that does experiments. Each does the same work however often it is asked.

    Raises: DeviceError if the device is lost, hangs or does not compile; UnsupportedError for what it has not.
    """

    @property
    def identity(self) -> Identity: ...

    @property
    def limits(self) -> Limits: ...

    def chase(self, footprint: int, stride: int) -> Timing:
        """One thread follows pointers through `footprint` bytes of global memory, places `stride` bytes apart in a
        random order, all of them once before the clock starts. work: "loads"."""
        ...

    def stream(self, footprint: int, stride: int, width: int, way: Way) -> Timing:
        """All threads go through `footprint` bytes of global memory again and again, `width` bytes a load (4..16),
        neighbours `stride` loads apart (1: side by side): all of its lines in each turn through it, and of their bytes
        one in `stride`. work: "bytes", as far as they are asked for."""
        ...

    def chain(self, operation: Operation, element: Element, width: int, chains: int, threads: int) -> Timing:
        """Each thread does `chains` independent chains of dependent operations on vectors of `width` elements.
        work: "operations", of scalars: a fused multiply-add is one."""
        ...

    def diverge(self, period: int) -> Timing:
        """Threads of a group take one of two ways of equal length, turns every `period` threads. work: "operations"."""
        ...

    def hold(self, registers: int, threads: int) -> Timing:
        """`threads` threads on the whole device wait for memory or for each step of a chain, each with `registers` live
        32-bit registers; only what fits at once runs side by side. work: "operations"."""
        ...

    def local(self, stride: int, width: int = 4) -> Timing:
        """A group's threads load `width` bytes of local memory (4, 8, 16), neighbours `stride` loads apart. work:
        "loads", of words."""
        ...

    def launch(self) -> Timing:
        """A kernel that does nothing, from the call to its end."""
        ...

    def barrier(self) -> Timing:
        """A full group meets at a barrier. work: "barriers"."""
        ...

    def transfer(self, size: int, to_device: bool) -> Timing:
        """`size` bytes between host and device. work: "bytes"."""
        ...


class Extra(Protocol):
    """Experiments that not every Bench does: one that has no method of a name is taken to raise UnsupportedError."""

    def chase_pieces(self, footprint: int, stride: int, piece: int) -> Timing:
        """As `Bench.chase`, but in pieces: a random order within `piece` bytes, then the next piece, at random. A piece
        that is no larger than what address translation keeps makes translation cost next to nothing."""
        ...

    def stream_parts(self, footprint: int, width: int, way: Way, parts: int, own: bool = False, stride: int = 1
                     ) -> Timing:
        """As `Bench.stream` with neighbours side by side and 16, 32 or 64 bytes a load, but each thread goes through
        `parts` (1, 2, 4, 8, 16) parts of the footprint at once. Of devices that do a group's threads one by one.

        In one part also with 4 and 8 bytes a load, and neighbours `stride` loads apart: as they are, none put together.

        own: each thread through as much memory of its own ("write" alone): caches of cores that store to the same
        lines take them from each other, which is no bandwidth of theirs."""
        ...

    def primed(self, footprint: int, behind: int) -> Timing:
        """All threads read `footprint` bytes twice, side by side, then `behind` bytes once; then one loads lines of the
        `footprint` bytes at random, which alone is timed, without translation. work: "loads". Of devices that share a
        cache with others: what chases leave behind is thrown out before they come again, this is read too quickly."""
        ...

    def image(self, footprint: int, texel: int = 16, order: Order = "rows") -> Timing:
        """All threads read `footprint` bytes of a two-dimensional image (of 32-bit integers, `texel` bytes a texel: 4,
        8, 16) again and again, a group's threads side by side in an order. work: "bytes"."""
        ...

    def constant(self, spread: bool, width: int = 4) -> Timing:
        """All threads read `width` bytes of constant memory (4, 8, 16), all of a group the same or (`spread`) each
        others. work: "bytes"."""
        ...

    def local_write(self, stride: int, width: int = 4) -> Timing:
        """A group's threads store `width` bytes in local memory (4, 8, 16), neighbours `stride` stores apart. work:
        "stores", of words."""
        ...

    def map(self, size: int) -> Timing:
        """A buffer of `size` bytes made visible to the host, one word changed, and given back. work: "bytes"."""
        ...


@dataclass(frozen=True, slots=True)
class Quantity:
    """A finding.

    interval  95 %, of what is measured; None where it is exact, or refused.     value  None if it is refused.
    why       what it rests on; of what is refused, what speaks against it.
    """

    name: str
    value: float | None
    unit: str
    interval: tuple[float, float] | None = None
    status: Status = "measured"
    why: str = ""
