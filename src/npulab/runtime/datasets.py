"""Samples for a network, one at a time: images of a folder or a zip, arrays of a .npy or .npz file."""

from __future__ import annotations

import io
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from npulab.errors import ModelError, NpulabError, UsageError
from npulab.ir import Graph
from npulab.program.types import Tensor
from npulab.quantization.types import Feeds
from npulab.runtime.array_samples import DAMAGED, ArraySamples, array_samples, bounded, listed
from npulab.runtime.images import FITTED, Fit, extents, parse_normalization, prepare, quantize

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
DEPTH_MAX = 16
"""Folders inside each other."""
ENTRY_BYTES = 1 << 26
"""Of one image of a zip, unpacked."""


def input_tensors(graph: Graph) -> tuple[Tensor, ...]:
    """The network's inputs as the readers here take them, in order. An open batch counts as 1.

    Raises: UsageError for an ONNX network with other open sizes.
    """
    return tuple(tensor_of(graph, v, sizes=True) for v in graph.inputs)


def tensor_of(graph: Graph, value: int, sizes: bool = False) -> Tensor:
    """A value of the graph with its quantization, if it has one scale. `sizes`: they have to be known."""
    v = graph.values[value]
    if sizes and (not v.has_shape or (graph.format == "onnx" and set(v.dynamic_axes) - {0})):
        raise UsageError(f"the input '{v.name}' of '{graph.name}' has no fixed size", got=str(v),
                         try_="--dim NAME=SIZE for each dynamic dimension")
    q = v.quantization if v.quantization is not None and v.quantization.per_tensor else None
    name = v.name if v.name and sum(v.name == w.name for w in graph.values) == 1 else f"{v.name or 'tensor'}#{value}"
    return Tensor(value, name, v.dtype.value, v.shape, q.scale if q else None, q.zero_point if q else None)


def spread(count: int, limit: int | None) -> Sequence[int]:
    """`limit` positions of `count`, evenly spread; all of them if that is None or no less."""
    return range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]


def open_samples(source: str | os.PathLike[str], inputs: Sequence[Tensor], normalize: str | None = None,
                 fit: Fit = "squash", limit: int | None = None) -> ImageSamples | ArraySamples:
    """Samples (quantization.types) of a folder of images, a .zip of images, or a .npy or .npz file.

    source     a folder is searched with all that is in it, a zip likewise; samples are sorted by name. A folder with
               `images/` and `instances.json` (COCO's) means its images. A .npz file has one array for each input, by
               name, or the one array for the one input, and perhaps `labels`; the first axis is the sample.
    inputs     the network's, as `input_tensors` gives them. An image goes to N,H,W,C or N,C,H,W by the shape.
    normalize  as `parse_normalization` takes it, for images and for arrays of uint8 that have an image's shape. Other
               arrays hold the input's own numbers: real ones, which are quantized where the input is, or stored ones.
    fit        as `prepare` takes it, for images.
    limit      at most so many samples, evenly spread over all.

    Nothing but names and labels is held: each pass over the samples reads the files again, one sample at a time.

    Raises: UsageError for an unreadable or empty source, or one that does not fit the inputs; ModelError for damaged
    files. Going through the samples raises ModelError, naming the sample, for an image that cannot be read, and for
    numbers that are not finite.
    """
    path = Path(source)
    if limit is not None and limit < 1:
        raise UsageError(f"there is nothing to take from {path}", got=f"a limit of {limit}", want="1 or more")
    if fit not in FITTED:
        raise UsageError(f"there is no way '{fit}' to fit an image", want=", ".join(FITTED))
    found: ImageSamples | ArraySamples
    if path.is_dir() or path.suffix.lower() == ".zip":
        found = _images(path, inputs, normalize, fit)
    elif path.suffix.lower() in (".npy", ".npz"):
        found = array_samples(path, inputs, normalize)
    else:
        raise UsageError(f"{path} holds no samples", want="a folder or .zip of images, a .npy or a .npz file",
                         got="a file of another kind" if path.exists() else "no such file or folder")
    return found.take(spread(len(found), limit))


# images


@dataclass(frozen=True)
class ImageSamples:
    """Images of a folder or a zip. `names` are their paths inside it, `how` what is done to each."""

    path: Path
    names: tuple[str, ...]
    tensor: Tensor
    normalize: str | None
    fit: Fit
    origin: str
    how: str
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Feeds]:
        if self.path.is_dir():
            for name in self.names:
                yield self._feed(name, self.path / name, None)
            return
        with _zip(self.path) as archive:
            for name in self.names:
                yield self._feed(name, Path(name), io.BytesIO(_unpacked(archive, name, self.path)))

    def _feed(self, name: str, path: Path, source: io.BytesIO | None) -> Feeds:
        try:
            return {self.tensor.name: prepare(path, self.tensor, self.fit, self.normalize, source).array}
        except NpulabError as e:  # files of two folders may have one name
            raise type(e)(e.message, **{**e.facts, "where": f"{name} of {self.path}"}) from e

    def take(self, positions: Sequence[int]) -> ImageSamples:
        """Only these, in this order."""
        return replace(self, names=tuple(self.names[i] for i in positions))


def _images(path: Path, inputs: Sequence[Tensor], normalize: str | None, fit: Fit) -> ImageSamples:
    if len(inputs) != 1:
        raise UsageError("images are samples of a network with one input",
                         got=f"{len(inputs)} inputs: {listed(inputs)}",
                         try_="a .npz file with an array for each input, by name")
    tensor = inputs[0]
    _, height, width, channels = extents(tensor)
    _, said = quantize(np.zeros((1, 1, channels), np.uint8), tensor, parse_normalization(normalize, tensor))
    if path.is_dir():
        inner = path / "images"
        base = inner if inner.is_dir() and (path / "instances.json").is_file() else path
        names = _in_folder(base)
    else:
        base, names = path, _in_zip(path)
    if not names:
        raise UsageError(f"{base} holds no images", want=f"files that end in {', '.join(PICTURES)}")
    return ImageSamples(base, tuple(sorted(names)), tensor, normalize, fit, f"images of {path.name or path}",
                        f"{FITTED[fit]} to {width}x{height}, bilinear; {said}")


def _is_picture(name: str) -> bool:
    parts = name.split("/")
    return parts[-1].lower().endswith(PICTURES) and not any(p.startswith((".", "__MACOSX")) for p in parts)


def _in_folder(folder: Path) -> list[str]:
    """Images by their path inside the folder; links to folders are not followed."""
    found: list[str] = []

    def refuse(e: OSError) -> None:
        raise UsageError(f"cannot read the folder {e.filename or folder}", got=e.strerror) from e

    for here, folders, files in os.walk(folder, onerror=refuse):
        inner = Path(here).relative_to(folder)
        if len(inner.parts) >= DEPTH_MAX:
            raise UsageError(f"{folder} has too many folders inside each other", want=f"at most {DEPTH_MAX}")
        folders.sort()
        found += [name for f in files if _is_picture(name := (inner / f).as_posix()) and (folder / name).is_file()]
        bounded(len(found), folder)
    return found


def _in_zip(path: Path) -> list[str]:
    with _zip(path) as archive:
        entries = archive.infolist()
        bounded(len(entries), path)
        found = [e for e in entries if not e.is_dir() and _is_picture(e.filename)]
    for e in found:
        if e.flag_bits & 1:
            raise ModelError(f"{path} is encrypted", where=e.filename, try_="a zip without a password")
        if e.file_size > ENTRY_BYTES:
            raise _too_large(e.filename, path)
    names = [e.filename for e in found]
    if len(set(names)) < len(names):
        raise ModelError(f"{path} has two files of one name", where=Counter(names).most_common(1)[0][0])
    return names


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError as e:
        raise UsageError(f"cannot read {path}", got=e.strerror) from e
    except DAMAGED as e:
        raise ModelError(f"{path} is no zip file, or is damaged", got=str(e)[:200]) from e


def _unpacked(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        with archive.open(name) as f:
            data = f.read(ENTRY_BYTES + 1)
    except (*DAMAGED, KeyError) as e:
        raise ModelError(f"{path} is damaged", where=name, got=str(e)[:200]) from e
    if len(data) > ENTRY_BYTES:
        raise _too_large(name, path)
    return data


def _too_large(name: str, path: Path) -> ModelError:
    return ModelError(f"{path} holds too large an image", where=name, want=f"at most {ENTRY_BYTES} bytes, unpacked")
