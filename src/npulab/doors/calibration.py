"""A folder of pictures or arrays as a calibration set: bounded in number and size, relative paths, one list."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npulab.doors.model import picture
from npulab.doors.types import Door
from npulab.errors import UsageError
from npulab.importers.arrays import read_arrays
from npulab.ir import Graph

SAMPLES_MAX = 128
"""Samples taken: vendors ask for some tens to some hundreds, and converters keep them in memory."""
BYTES_MAX = 2**30
"""Of all arrays of a set."""
FILES_MAX = 100_000
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")
LIST = "calibration.txt"


@dataclass(frozen=True, slots=True)
class Set:
    """Files for the folder, how many samples they are, and whether they are pictures."""

    files: dict[str, bytes]
    samples: int
    pictures: bool


def gather(folder: Path, graph: Graph, door: Door) -> Set:
    """The samples of `folder`: pictures squashed to the input's size, or .npz files with arrays by input name.

    Pictures become PNG files where the tool reads files, and `calibration.npy`, uint8 [N,H,W,C] with red first, where
    it reads arrays. At most 128 are taken, spread evenly over the sorted names. LIST has one path a line.

    Raises: UsageError for a folder without samples or with others than the network takes; ModelError for bad files.
    """
    paths = _chosen(folder)
    if paths[0].suffix.lower() == ".npz":
        return _arrays(paths, graph, door)
    where = picture(graph)
    if where is None:
        raise UsageError(f"'{graph.name}' does not take one picture, so pictures cannot calibrate it",
                         got=", ".join(str(graph.values[i]) for i in graph.inputs),
                         try_=".npz files with arrays by name")
    if len(paths) * where.height * where.width * where.channels > BYTES_MAX:
        raise UsageError(f"{len(paths)} pictures of {where.height}x{where.width} are too many",
                         want=f"{BYTES_MAX} bytes")
    from PIL import Image

    from npulab.runtime.images import open_image

    small = []
    for path in paths:
        image, _ = open_image(path)
        image = image.convert("L" if where.channels == 1 else "RGB")
        small.append(image.resize((where.width, where.height), Image.Resampling.BILINEAR))
    if door.calibration == "arrays":
        shape = (len(small), where.height, where.width, where.channels)
        return Set({"calibration.npy": _npy(np.stack([np.asarray(i) for i in small]).reshape(shape))}, len(small), True)
    files = {}
    for k, image in enumerate(small):
        out = io.BytesIO()
        image.save(out, "PNG")
        files[f"calibration/{k:03}.png"] = out.getvalue()
    return Set({**files, LIST: _listed(files)}, len(small), True)


def _chosen(folder: Path) -> list[Path]:
    """Files of one kind, evenly spread."""
    try:
        found = sorted(p for p, _ in zip(folder.iterdir(), range(FILES_MAX), strict=False) if p.is_file())
    except OSError as e:
        raise UsageError(f"cannot read the calibration folder {folder}", got=e.strerror) from None
    pictures = [p for p in found if p.suffix.lower() in PICTURES]
    arrays = [p for p in found if p.suffix.lower() == ".npz"]
    kind = pictures or arrays
    if not kind or (pictures and arrays):
        raise UsageError(f"{folder} is no calibration set", got=f"{len(pictures)} pictures, {len(arrays)} .npz files",
                         want="pictures, or .npz files with one array for each input")
    count = min(len(kind), SAMPLES_MAX)
    return [kind[i * len(kind) // count] for i in range(count)]


def _arrays(paths: list[Path], graph: Graph, door: Door) -> Set:
    """.npz files as one .npy a sample and input, in the inputs' order."""
    if door.calibration == "pictures" and door.name != "rknn":
        raise UsageError(f"{door.tool} is calibrated with pictures here", got=f"{len(paths)} .npz files")
    files: dict[str, bytes] = {}
    lines = []
    total = 0
    for k, path in enumerate(paths):
        names = []
        for i, array in enumerate(_read(path, graph)):
            total += array.nbytes
            if total > BYTES_MAX:
                raise UsageError("the calibration set is too large", want=f"{BYTES_MAX} bytes")
            names.append(f"calibration/{k:03}_{i}.npy")
            files[names[-1]] = _npy(array)
        lines.append(" ".join(names))
    return Set({**files, LIST: ("\n".join(lines) + "\n").encode()}, len(paths), False)


def _read(path: Path, graph: Graph) -> list[NDArray[Any]]:
    inputs = [graph.values[i] for i in graph.inputs]
    found = read_arrays(path, inputs)
    return [found[v.name] for v in inputs]


def _npy(array: NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _listed(files: dict[str, bytes]) -> bytes:
    return ("\n".join(files) + "\n").encode()
