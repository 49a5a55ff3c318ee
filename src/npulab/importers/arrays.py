"""Arrays by name out of a .npz file that is not believed: what one says of itself is compared before it is read."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable
from typing import IO

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError, UsageError
from npulab.importers.tflite import shown
from npulab.ir import Value


def read_arrays(path: str | os.PathLike[str], values: Iterable[Value]) -> dict[str, NDArray[np.generic]]:
    """The array of each value, by its name. No more is unpacked than the values have bytes.

    Raises: ModelError if the file is no such archive; UsageError if an array is missing, or of another type or shape.
    """
    wanted = list(values)
    try:
        with zipfile.ZipFile(path) as archive:
            inside = set(archive.namelist())
            found = {}
            for v in wanted:
                if f"{v.name}.npy" not in inside:
                    raise UsageError(f"{path} has no array {shown(v.name)}",
                                     want=", ".join(shown(w.name) for w in wanted))
                with archive.open(f"{v.name}.npy") as f:
                    found[v.name] = _array(f, v, os.fspath(path))
            return found
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError,
            RecursionError, SyntaxError, TypeError) as e:
        raise ModelError(f"{path} is not a file of arrays by name", got=str(e)[:200],
                         want="what numpy.savez writes") from None


def _array(f: IO[bytes], v: Value, path: str) -> NDArray[np.generic]:
    version = np.lib.format.read_magic(f)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the array format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(f)
    if shape != v.shape or dtype != v.dtype.numpy or dtype.hasobject:
        raise UsageError(f"the array {shown(v.name)} of {path} does not fit", got=f"{dtype}{list(shape)}"[:200],
                         want=str(v)[:200])
    size = v.elements * dtype.itemsize
    data = f.read(size)
    if len(data) != size:
        raise EOFError(f"{len(data)} of {size} bytes of {shown(v.name)}")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
