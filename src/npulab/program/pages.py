"""Large bytes in files instead of memory: written once, mapped, their pages given back when they have been read.

A mapped page counts as memory of the process from its first use on. `let_go` ends that: it is read again when it is
wanted again.
"""

from __future__ import annotations

import errno
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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


def put_away(pieces: Iterable[Buffer], size: int) -> memoryview:
    """The pieces one behind the other, `size` bytes in all. Large ones lie in a file without a name, which is gone with
    the last view of it, however the process ends.

    Raises: CapacityError if the disk for temporary files is full.
    """
    if size < LARGE:
        return memoryview(b"".join(pieces))
    try:
        with tempfile.TemporaryFile() as f:
            for piece in pieces:
                f.write(piece)
                let_go(piece)
            f.flush()
            return memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as e:
        raise no_room(e, size) from e


def arrays_away(arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """The same arrays, contiguous and aligned, read-only where they are large together: in one file then."""
    size = sum(-(-a.nbytes // ALIGNED) * ALIGNED for a in arrays)
    if size < LARGE:
        return [np.require(a, requirements=["C", "A"]) for a in arrays]

    def pieces() -> Iterator[Buffer]:
        for a in arrays:
            yield content_of(a)
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


def no_room(e: OSError, size: int) -> Exception:
    """What to raise for an error of the disk while `size` bytes were written to a temporary file."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CapacityError("the disk for temporary files is full", where=tempfile.gettempdir(),
                             want=f"{size >> 20} MiB", try_="set TMPDIR to a folder with more room")
    return e


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
