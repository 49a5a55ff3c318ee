"""Large bytes in files instead of memory: written once, mapped, their pages given back when they have been read.

A mapped page counts as memory of the process from its first use on. `let_go` ends that: it is read again when it is
wanted again.
"""

from __future__ import annotations

import errno
import math
import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

from npulab.errors import CapacityError

Buffer = bytes | memoryview
LARGE = 1 << 20
"""Bytes from which a file is worth it."""
ALIGNED = 64
"""Bytes that arrays begin at multiples of."""
TRY = "set TMPDIR to a folder with more room"


class Scratch:
    """A file without a name, gone once it is closed, however the process ends. Nothing is buffered, so that a full disk
    is said by the write that it has no room for.

    Raises: CapacityError if the disk for temporary files is full, or there is none.
    """

    def __init__(self, pieces: Iterable[Buffer] = ()) -> None:
        try:
            self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it is closed with this
        except OSError as e:
            raise CapacityError("no temporary file can be made", got=e.strerror or e, try_=TRY) from e
        self.size = 0
        try:
            for piece in pieces:
                self.write(piece)
                let_go(piece)
        except BaseException:
            self.close()
            raise

    def write(self, piece: Buffer) -> None:
        """Behind what is there."""
        left = memoryview(piece).cast("B")
        self.size += len(left)
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CapacityError("the disk for temporary files is full", where=tempfile.gettempdir(),
                                want=f"{-(-self.size >> 20)} MiB or more", try_=TRY) from e

    def array(self, at: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """What was written there, once all is."""
        self.file.seek(at)
        return np.fromfile(self.file, dtype, math.prod(shape)).reshape(shape)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def put_away(pieces: Iterable[Buffer], size: int) -> memoryview:
    """The pieces one behind the other, `size` bytes in all. Large ones lie in a Scratch, which is gone with the last
    view of it. Raises as that does."""
    if size < LARGE:
        return memoryview(b"".join(pieces))
    with Scratch(pieces) as scratch:
        return memoryview(mmap.mmap(scratch.file.fileno(), 0, access=mmap.ACCESS_READ))


def arrays_away(arrays: Sequence[NDArray[Any]], now: Callable[[NDArray[Any], int], NDArray[Any]] | None = None
                ) -> list[NDArray[Any]]:
    """The same arrays, contiguous and aligned, read-only where they are large together: in one file then. `now` makes
    others of the same shapes and types of them, each when it is its turn; called with the array and its number."""
    now = now or (lambda array, _: array)
    size = sum(-(-a.nbytes // ALIGNED) * ALIGNED for a in arrays)
    if size < LARGE:
        return [np.require(now(a, i), requirements=["C", "A"]) for i, a in enumerate(arrays)]

    def pieces() -> Iterator[Buffer]:
        for i, a in enumerate(arrays):
            yield content_of(now(a, i))
            let_go(a)
            yield bytes(-a.nbytes % ALIGNED)

    kept, at, found = put_away(pieces(), size), 0, []
    for a in arrays:
        found.append(np.frombuffer(kept[at : at + a.nbytes], a.dtype).reshape(a.shape))
        at += -(-a.nbytes // ALIGNED) * ALIGNED
    return found


def content_of(array: NDArray[Any]) -> memoryview:
    """An array's bytes, not copied where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def passing(data: Buffer) -> Iterator[memoryview]:
    """The bytes, LARGE at a time; each piece is let go when the next is asked for."""
    view = memoryview(data)
    for at in range(0, len(view), LARGE):
        yield view[at : at + LARGE]
        let_go(view[at : at + LARGE])


def let_go(buffer: Buffer | NDArray[Any]) -> None:
    """Pages of a mapped file behind bytes or an array, out of memory; nothing where no file is behind them, or where it
    can be written to: pages of a copy on write would be lost."""
    held: Any = buffer
    while isinstance(held, np.ndarray | memoryview):
        held = held.base if isinstance(held, np.ndarray) else held.obj
    if not isinstance(held, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED") or not memoryview(held).readonly:
        return
    part = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, np.uint8)
    if not part.size:
        return
    (low, high), (first, _) = byte_bounds(part), byte_bounds(np.frombuffer(held, np.uint8))
    page = (low - first) // mmap.PAGESIZE * mmap.PAGESIZE
    held.madvise(mmap.MADV_DONTNEED, page, high - first - page)
