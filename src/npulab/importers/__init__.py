"""Model files to Graphs, by what the file says it is."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from npulab.errors import ModelError, UsageError

if TYPE_CHECKING:
    from npulab.ir import Graph

SIZE_MAX = 2**32
"""Bytes of a model file: a FlatBuffer's own offsets have 32 bits."""


def load(source: str | os.PathLike[str] | bytes | memoryview, dims: Mapping[str, int] | None = None) -> Graph:
    """The Graph of a model file, or of its content. A file is mapped, not read, and must stay as it is meanwhile.

    `dims` gives sizes to dynamic dimensions of an ONNX model (importers.onnx.read_onnx).

    Raises: ModelError saying what the file is, if it is not a model that npulab reads; UsageError for `dims` that the
    model does not have.
    """
    if isinstance(source, bytes | memoryview):
        return _read(memoryview(source), "model", None, dims)
    path = Path(source)
    return _read(_map(path), path.stem, path.parent, dims)


def _read(data: memoryview, name: str, folder: Path | None, dims: Mapping[str, int] | None) -> Graph:
    """What the content says counts, not what the file is called."""
    from npulab.importers.tflite import is_onnx, is_tflite, read_tflite, what_is

    if is_onnx(data):
        from npulab.importers.onnx import read_onnx

        return read_onnx(data, name, folder, dims)
    if not is_tflite(data):
        found, advice = what_is(data)
        raise ModelError(f"'{name}' is neither a TFLite nor an ONNX model",
                         want="identifier TFL3 at byte 4, or ONNX's ir_version at byte 0", got=found, try_=advice)
    if dims:
        raise UsageError(f"'{name}' is not an ONNX model: its dimensions have sizes", got=", ".join(dims))
    return read_tflite(data, name)


def _map(path: Path) -> memoryview:
    """The file's content, mapped. Only a regular file is opened: a pipe would wait for its writer."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            saved = (path / "saved_model.pb").exists()
            raise ModelError(f"{path} is a directory{', a TensorFlow SavedModel' if saved else ''}", want="a file",
                             try_="convert it to TFLite" if saved else "name the .tflite file in it")
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"{path} is not a regular file", want="a .tflite file")
        if found.st_size > SIZE_MAX:
            raise ModelError(f"{path} is too large for a model file", got=f"{found.st_size} bytes",
                             want=f"at most {SIZE_MAX} bytes")
        if not found.st_size:
            raise ModelError(f"{path} is empty", try_="get the file again")
        with path.open("rb") as f:
            return memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", where=f"looked in {Path.cwd()}") from None
    except (OSError, ValueError) as e:
        raise ModelError(f"{path} cannot be read", got=getattr(e, "strerror", None) or e) from None
