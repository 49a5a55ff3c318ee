"""NPU memory: ranges by 32-bit address, which of their bytes anything has written, and when they last changed."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from npulab.errors import DeviceError
from npulab.targets.vivante.machine.faults import JobFault

U8 = NDArray[np.uint8]
MAPPED_MAX = 1 << 30
"""Bytes of all ranges together."""


@dataclass(slots=True)
class Range:
    """One mapped range. `written` is None where every byte is known to be."""

    name: str
    address: int
    data: U8
    written: NDArray[np.bool_] | None
    version: int = 0

    @property
    def end(self) -> int:
        return self.address + len(self.data)


@dataclass(slots=True)
class Memory:
    """All ranges, in order of address. An access lies in one range: ranges are buffers, and jobs do not cross them."""

    ranges: list[Range] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    clock: int = 0

    def map(self, name: str, address: int, size: int, data: bytes | memoryview | None) -> None:
        """Raises DeviceError if the range is empty, overlaps another, leaves 32 bits or is too large."""
        if size < 1 or address < 0 or address + size > 1 << 32:
            raise DeviceError(f"'{name}' cannot be mapped", got=f"{size} bytes at {address:#x}",
                              want="32-bit addresses")
        if sum(len(r.data) for r in self.ranges) + size > MAPPED_MAX:
            raise DeviceError(f"'{name}' cannot be mapped", got=f"{size} bytes more",
                              want=f"at most {MAPPED_MAX} bytes in all")
        if data is not None and len(data) > size:
            raise DeviceError(f"'{name}' has {len(data)} bytes of content for {size} mapped ones")
        at = bisect_right(self.starts, address)
        before, after = self.ranges[at - 1 : at], self.ranges[at : at + 1]
        if any(r.end > address for r in before) or any(r.address < address + size for r in after):
            raise DeviceError(f"'{name}' overlaps '{(before + after)[0].name}'", got=f"{size} bytes at {address:#x}")
        content = np.zeros(size, np.uint8)
        if data is not None:
            content[: len(data)] = np.frombuffer(data, np.uint8)
        self.ranges.insert(at, Range(name, address, content, None if data is not None else np.zeros(size, np.bool_)))
        self.starts.insert(at, address)

    def find(self, address: int, size: int, what: str) -> Range:
        """The range that holds all of [address, address + size)."""
        at = bisect_right(self.starts, address) - 1
        if at < 0 or address + size > self.ranges[at].end or size < 1:
            inside = at >= 0 and address < self.ranges[at].end
            where = f"runs over the end of '{self.ranges[at].name}'" if inside else "is not mapped"
            raise JobFault("unmapped access", f"{what} of {size} bytes {where}",
                           self.ranges[at].end if inside else address)
        return self.ranges[at]

    def read(self, address: int, size: int, what: str) -> U8:
        """A view of bytes that something has written."""
        r = self.find(address, size, what)
        start = address - r.address
        if r.written is not None and not r.written[start : start + size].all():
            first = int(np.argmin(r.written[start : start + size]))
            raise JobFault("uninitialised read", f"{what} reads '{r.name}' where nothing was written", address + first)
        return r.data[start : start + size]

    def words(self, address: int, count: int, what: str) -> list[int]:
        return [int(w) for w in np.frombuffer(self.read(address, 4 * count, what).tobytes(), "<u4")]

    def touched(self, r: Range) -> None:
        """Note that a range has changed."""
        self.clock += 1
        r.version = self.clock

    def write(self, address: int, data: U8, what: str) -> None:
        r = self.find(address, data.size, what)
        start = address - r.address
        r.data[start : start + data.size] = data.reshape(-1)
        if r.written is not None:
            r.written[start : start + data.size] = True
        self.touched(r)

    def box(self, address: int, shape: tuple[int, int, int], strides: tuple[int, int, int], what: str,
            store: bool) -> tuple[U8, NDArray[np.bool_] | None]:
        """A strided view (z, y, x) of memory and of its written marks. Loads are checked for having been written."""
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        r = self.find(address, span, what)
        start = address - r.address
        view = np.lib.stride_tricks.as_strided(r.data[start:], shape, strides)
        marks = None
        if r.written is not None:
            marks = np.lib.stride_tricks.as_strided(r.written[start:], shape, strides)
            if not store and not marks.all():
                z, y, x = np.unravel_index(int(np.argmin(marks)), shape)
                bad = address + int(z) * strides[0] + int(y) * strides[1] + int(x) * strides[2]
                raise JobFault("uninitialised read", f"{what} reads '{r.name}' where nothing was written", bad)
        if store:
            self.touched(r)
        return view, marks
