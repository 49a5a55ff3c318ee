"""Arrays of a .npy or .npz file as samples, read one at a time."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError, UsageError
from npulab.ir.types import DType
from npulab.program.types import Tensor
from npulab.quantization.types import Feeds
from npulab.runtime.images import extents, parse_normalization, quantize

Array = NDArray[Any]

SAMPLES_MAX = 1_000_000
"""Files of a folder or zip, or length of an array's first axis."""
LABELS = "labels"
"""The array of a .npz file that holds a class for each sample."""
DAMAGED = (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError,
           RecursionError, SyntaxError, TypeError, OverflowError, MemoryError)
"""What the readers of zips and arrays raise on damaged files."""


def bounded(count: int, path: Path) -> None:
    if count > SAMPLES_MAX:
        raise UsageError(f"{path} holds too many samples", want=f"at most {SAMPLES_MAX}", got=f"{count} or more")

CHANNELS_MAX = 4
"""Of a picture whose axes may lie the other way round."""


@dataclass(frozen=True)
class Column:
    """An array of a file that is read sample by sample."""

    name: str
    tensor: Tensor
    open: Callable[[ExitStack], IO[bytes]]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def sample_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class ArraySamples:
    """Samples along the first axis of arrays, one array an input. `names` are positions along it."""

    path: Path
    names: Sequence[int]
    columns: tuple[Column, ...]
    normalize: str | None
    origin: str
    how: str
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Feeds]:
        with ExitStack() as stack:
            files = [column.open(stack) for column in self.columns]
            at = 0
            for i in self.names:
                feed = {}
                for column, f in zip(self.columns, files, strict=True):
                    record = _record(f, column, i, i - at, self.path)
                    feed[column.tensor.name] = _fed(record, column.tensor, self.normalize, f"{column.name}[{i}]",
                                                    self.path)
                at = i + 1
                yield feed

    def take(self, positions: Sequence[int]) -> ArraySamples:
        """Only these, which must rise."""
        names = self.names if positions == range(len(self)) else [self.names[i] for i in positions]
        labels = None if self.labels is None else self.labels[np.asarray(positions, np.intp)]
        return replace(self, names=names, labels=labels)


def array_samples(path: Path, inputs: Sequence[Tensor], normalize: str | None) -> ArraySamples:
    try:
        columns, labels = _columns(path, inputs)
    except FileNotFoundError as e:
        raise UsageError(f"cannot read {path}", got=e.strerror) from e
    except DAMAGED as e:
        raise ModelError(f"{path} is no file of arrays, or is damaged", got=str(e)[:200],
                         want="what numpy.save or numpy.savez writes") from e
    counts = {c.shape[0] for c in columns}
    if len(counts) > 1:
        raise UsageError(f"the arrays of {path} are of different numbers of samples",
                         got=", ".join(f"{c.name} {list(c.shape)}" for c in columns))
    count = counts.pop()
    if not count:
        raise UsageError(f"{path} holds no samples", got=f"{columns[0].name} {list(columns[0].shape)}")
    bounded(count, path)
    if labels is not None and len(labels) != count:
        raise UsageError(f"{path} has not a label for each sample", want=str(count), got=f"{len(labels)} labels")
    if normalize is not None and not any(_pixels(c.dtype, c.shape[1:], c.tensor) for c in columns):
        raise UsageError(f"the arrays of {path} are no pixels to normalize", want="uint8 in an image's shape",
                         got=", ".join(f"{c.name} {c.dtype}{list(c.shape)}" for c in columns))
    said = [_said(c, normalize) for c in columns]
    return ArraySamples(path, range(count), columns, normalize, f"arrays of {path.name}", "; ".join(said), labels)


def _said(c: Column, normalize: str | None) -> str:
    if _pixels(c.dtype, c.shape[1:], c.tensor):
        channels = extents(c.tensor)[3]
        said = quantize(np.zeros((1, 1, channels), np.uint8), c.tensor, parse_normalization(normalize, c.tensor))[1]
        return f"{c.name}: {said}"
    return f"{c.name}: the input's own numbers"


def _columns(path: Path, inputs: Sequence[Tensor]) -> tuple[tuple[Column, ...], NDArray[np.int64] | None]:
    labels = None
    if path.suffix.lower() == ".npy":
        if len(inputs) != 1:
            raise UsageError(f"{path} is one array, and the network has {len(inputs)} inputs", want=listed(inputs),
                             try_="a .npz file with an array for each input, by name")
        return (_column("array", inputs[0], lambda s: s.enter_context(open(path, "rb")), path,
                        os.path.getsize(path)),), None
    with zipfile.ZipFile(path) as archive:
        sizes = {e.filename.removesuffix(".npy"): e.file_size for e in archive.infolist()
                 if e.filename.endswith(".npy")}
    wanted = {t.name for t in inputs}
    if LABELS in sizes and LABELS not in wanted:
        labels = _labels(path, sizes.pop(LABELS))
    if len(inputs) == 1 and len(sizes) == 1:
        chosen = {inputs[0].name: next(iter(sizes))}
    else:
        chosen = {name: name for name in wanted}
        if wanted - sizes.keys():
            raise UsageError(f"{path} has no array for the input '{min(wanted - sizes.keys())}'",
                             want=listed(inputs), got=", ".join(sorted(sizes)[:8]) or "no arrays")

    def opener(name: str) -> Callable[[ExitStack], IO[bytes]]:
        return lambda s: s.enter_context(s.enter_context(zipfile.ZipFile(path)).open(f"{name}.npy"))

    return tuple(_column(chosen[t.name], t, opener(chosen[t.name]), path, sizes[chosen[t.name]])
                 for t in inputs), labels


def _column(name: str, tensor: Tensor, opened: Callable[[ExitStack], IO[bytes]], path: Path, size: int) -> Column:
    """After checks; `size` in bytes is what the file says that it has."""
    with ExitStack() as stack:
        f = opened(stack)
        shape, fortran, dtype = _header(f)
        rest = size - f.tell()
    if dtype.kind not in "iufb":
        raise ModelError(f"the array '{name}' of {path} holds no numbers", got=str(dtype)[:100])
    own = (tensor.shape, tensor.shape[1:]) if tensor.shape[:1] == (1,) else (tensor.shape,)
    if not shape or (shape[1:] not in own and not _pixels(dtype, shape[1:], tensor)
                     and _turned(shape[1:], tensor) is None):
        raise UsageError(f"the array '{name}' of {path} does not fit the input '{tensor.name}'",
                         want=f"N,{','.join(map(str, own[-1]))}", got=f"{dtype}{list(shape)}"[:200])
    if fortran and len(shape) > 1:
        raise ModelError(f"the array '{name}' of {path} cannot be read sample by sample", got="Fortran order",
                         try_="save numpy.ascontiguousarray(array)")
    made = Column(name, tensor, opened, shape, dtype)
    if rest != shape[0] * made.sample_bytes:
        raise ModelError(f"the array '{name}' of {path} is cut off, or longer than it says",
                         want=f"{shape[0] * made.sample_bytes} bytes for {dtype}{list(shape)}"[:200],
                         got=f"{rest} bytes")
    return made


def _header(f: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(f)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the array format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(f)


def _labels(path: Path, size: int) -> NDArray[np.int64]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{LABELS}.npy") as f:
        shape, _, dtype = _header(f)
        if dtype.kind not in "iu" or len(shape) not in (1, 2) or shape[1:] not in ((), (1,)):
            raise UsageError(f"the array '{LABELS}' of {path} is no class for each sample", want="integers, N",
                             got=f"{dtype}{list(shape)}"[:200])
        bounded(shape[0], path)
        data = f.read(shape[0] * dtype.itemsize + 1)
    if len(data) != shape[0] * dtype.itemsize:
        raise ModelError(f"the array '{LABELS}' of {path} is cut off, or longer than it says",
                         want=f"{shape[0] * dtype.itemsize} bytes", got=f"{size} bytes with its header")
    return np.frombuffer(data, dtype).astype(np.int64)


def _record(f: IO[bytes], column: Column, i: int, skip: int, path: Path) -> Array:
    """Sample `i`, `skip` samples further on; `f` stands before the header, or behind the last one that was read."""
    try:
        if f.tell() == 0:
            _header(f)
        if skip:
            f.seek(skip * column.sample_bytes, os.SEEK_CUR)
        data = f.read(column.sample_bytes)
        if len(data) != column.sample_bytes:
            raise EOFError(f"{len(data)} of {column.sample_bytes} bytes")
    except DAMAGED as e:
        raise ModelError(f"{path} is damaged", where=f"{column.name}[{i}]", got=str(e)[:200]) from e
    return np.frombuffer(data, column.dtype).reshape(column.shape[1:])


def _pixels(dtype: np.dtype[Any], shape: tuple[int, ...], tensor: Tensor) -> bool:
    """Whether such samples are pixels: uint8 in an image's shape, which the input takes; channels first or last."""
    if dtype != np.uint8:
        return False
    try:
        _, height, width, channels = extents(tensor)
    except UsageError:
        return False
    sample = list(shape[1:] if len(shape) == 4 and shape[0] == 1 else shape)
    return sample in ([height, width, channels], [channels, height, width]) or (
        channels == 1 and sample == [height, width])


def _turned(shape: tuple[int, ...], tensor: Tensor) -> tuple[int, ...] | None:
    """The order of axes that makes such a picture, channels first or last, the other way round, if that is how the
    input has it: the same arrays serve a network and what it was converted to."""
    sample = shape[1:] if len(shape) == 4 and shape[0] == 1 else shape
    if len(sample) != 3 or len(tensor.shape) != 4 or tensor.shape[0] != 1 or sample == tensor.shape[1:]:
        return None
    for order in ((1, 2, 0), (2, 0, 1)):
        if tuple(sample[i] for i in order) == tensor.shape[1:] and min(sample[0], sample[2]) <= CHANNELS_MAX:
            return order
    return None


def _fed(x: Array, tensor: Tensor, normalize: str | None, where: str, path: Path) -> Array:
    """A sample as the input stores it."""
    if _pixels(x.dtype, x.shape, tensor):
        first, height, width, channels = extents(tensor)
        x = x.reshape(x.shape[-3:])
        last, planes = [height, width, channels], [channels, height, width]
        if list(x.shape) == planes and (first or planes != last):
            x = x.transpose(1, 2, 0)
        x, _ = quantize(x.reshape(height, width, channels), tensor, parse_normalization(normalize, tensor))
        return np.ascontiguousarray(x.transpose(2, 0, 1) if first else x).reshape(tensor.shape)
    dtype = DType(tensor.dtype).numpy
    if dtype is None:
        raise UsageError(f"the input '{tensor.name}' takes no arrays", got=tensor.dtype)
    order = _turned(x.shape, tensor)
    if order is not None:
        x = x.reshape(x.shape[-3:]).transpose(order)
    x = x.reshape(tensor.shape)
    if x.dtype.kind == "f" and dtype.kind in "iu":
        if not tensor.scale:
            raise UsageError(f"the input '{tensor.name}' has no single scale to quantize by", want=str(dtype),
                             got=str(x.dtype))
        x = np.rint(_finite(x, x, where, path) / tensor.scale) + (tensor.zero_point or 0)
        limits = np.iinfo(dtype)  # type: ignore[type-var]
        return x.clip(limits.min, limits.max).astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        made = x.astype(dtype)
    if dtype.kind == "f":
        return _finite(made, x, where, path)
    if not np.array_equal(made, x):
        raise ModelError(f"{path} has numbers that the input '{tensor.name}' does not hold", where=where,
                         want=str(dtype), got=f"{x.min()}..{x.max()}")
    return made


def _finite(made: Array, x: Array, where: str, path: Path) -> Array:
    bad = ~np.isfinite(made)
    if bad.any():
        raise ModelError(f"{path} has numbers that are not finite", where=where, want=f"finite {made.dtype}",
                         got=f"{x[bad][0]}, {int(bad.sum())} of {bad.size}")
    return made


def listed(tensors: Iterable[Tensor]) -> str:
    return "; ".join(f"{t.name}: {t.dtype}{list(t.shape)}" for t in tensors)
