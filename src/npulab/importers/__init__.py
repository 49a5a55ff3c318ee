"""Model files to Graphs, by what the file says it is."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from npulab.errors import ModelError
from npulab.ir import Graph

SIZE_MAX = 2**32
"""Bytes of a model file; a FlatBuffer's own offsets have 32 bits."""


def load(source: str | os.PathLike[str] | bytes | memoryview) -> Graph:
    """The Graph of a model file, or of its content. The file is mapped, not read.

    Raises: ModelError saying what the file is, if it is not a model that npulab reads.
    """
    from npulab.importers.tflite import read_tflite

    if isinstance(source, bytes | memoryview):
        data, name = memoryview(source), "model"
    else:
        path = Path(source)
        data, name = _map(path), path.stem
    if bytes(data[4:8]) != b"TFL3":
        raise ModelError(f"'{name}' is not a TFLite model", got=_describe(data), want="identifier TFL3 at byte 4",
                         try_=_advice(data))
    return read_tflite(data, name)


def _map(path: Path) -> memoryview:
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size > SIZE_MAX:
                raise ModelError(f"{path} is too large", got=f"{size} bytes", want=f"at most {SIZE_MAX}")
            if not size:
                raise ModelError(f"{path} is empty", try_="get the file again")
            return memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as e:
        raise ModelError(f"{path} cannot be read", got=getattr(e, "strerror", None) or e) from None


def _describe(data: memoryview) -> str:
    head = bytes(data[:16])
    if head[:2] == b"PK":
        return "a zip archive"
    if head[:8] == b"NPULAB\r\n":
        return "a compiled npulab program"
    if head[:1] == b"\x08" and b"\x12" in head[2:8]:
        return "what looks like an ONNX model"
    return f"bytes {head[:8].hex(' ')}" if head else "nothing"


def _advice(data: memoryview) -> str:
    found = _describe(data)
    if "ONNX" in found:
        return "convert it to TFLite: this version of npulab does not read ONNX"
    if "program" in found:
        return "npulab run FILE.npu"
    return "give a .tflite file"
