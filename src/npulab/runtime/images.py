"""Photographs to input tensors, saying exactly what was done to them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from npulab.errors import ModelError, UsageError
from npulab.ir.types import DType
from npulab.program.types import Tensor

Fit = Literal["squash", "crop", "pad", "centre", "letterbox"]

PIXELS_LIMIT = 100_000_000
"""Pixels of an image: 300 MB as RGB. A file of a few kilobytes can claim far more."""

UNSAFE_FORMATS = ("EPS", "WMF")
"""Pillow hands these to programs of the system."""


@dataclass(frozen=True, slots=True)
class Normalization:
    """real = (pixel - mean) / std, per channel or one for all. `raw`: the stored number is the pixel itself."""

    raw: bool
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, slots=True)
class Covered:
    """The part of the original image that the model sees, in its pixels; with `pad` and `letterbox` it reaches beyond
    the image."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """An input tensor, the upright original, and what was done to get from one to the other."""

    array: NDArray[Any]
    image: Image.Image
    covered: Covered
    notes: tuple[str, ...]


def open_image(path: str | os.PathLike[str], source: BinaryIO | None = None) -> tuple[Image.Image, list[str]]:
    """The first picture of a file, upright, as 8-bit RGB or L; and notes on what that took.

    `source` holds the file's bytes where they lie in another file, and `path` is then its name there.

    Raises: UsageError if the file cannot be read; ModelError if it is no image, damaged, or too large.
    """
    name = os.path.basename(os.fspath(path))
    Image.init()
    formats = [f for f in Image.OPEN if f not in UNSAFE_FORMATS]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = open(path, "rb") if source is None else contextlib.nullcontext(source)  # noqa: SIM115
            with held as f, Image.open(f, formats=formats) as image:
                width, height = image.size
                if width * height > PIXELS_LIMIT or not width * height:
                    raise ModelError(f"{name} is too large an image", want=f"1..{PIXELS_LIMIT} pixels",
                                     got=f"{width}x{height}", try_="make it smaller first")
                notes = [f"{name}: {image.format} {width}x{height} {image.mode}"]
                if getattr(image, "n_frames", 1) > 1:
                    notes.append("first of several pictures in the file")
                image.load()
                upright = ImageOps.exif_transpose(image)
                if upright.size != image.size or upright.tobytes()[:4096] != image.tobytes()[:4096]:
                    notes.append("turned upright as its EXIF tag says")
                return _eight_bit(upright, notes), notes
    except (ModelError, KeyboardInterrupt):
        raise
    except OSError as e:
        if e.errno is not None:
            raise UsageError(f"cannot read {os.fspath(path)} as an image", got=e.strerror) from e
        raise _no_image(name, e) from e
    except Image.DecompressionBombError as e:
        raise ModelError(f"{name} is too large an image", want=f"1..{PIXELS_LIMIT} pixels", got=e) from e
    except Exception as e:  # damaged files end in whatever a decoder stumbles over
        raise _no_image(name, e) from e


def _no_image(name: str, error: Exception) -> ModelError:
    return ModelError(f"{name} is not an image that Pillow reads, or is damaged",
                      got=str(error)[:200] or type(error).__name__, try_="a PNG or JPEG file, or a .npy array")


def _eight_bit(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        wide = np.asarray(image).astype(np.float64)
        low, high = (float(np.nanmin(wide)), float(np.nanmax(wide))) if wide.size else (0.0, 0.0)
        if low < 0 or high > 65535 or image.mode == "F":
            span = high - low or 1.0
            notes.append(f"values {low:g}..{high:g} spread over 0..255")
            wide = (wide - low) * (255.0 / span)
        elif high > 255 or image.mode.startswith("I;16"):
            notes.append("16 bits a pixel cut to 8")
            wide = wide / 257.0
        return Image.fromarray(np.nan_to_num(np.rint(wide)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        notes.append("transparent parts made white")
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image if image.mode in ("RGB", "L") else image.convert("L" if image.mode == "1" else "RGB")


def prepare(path: str | os.PathLike[str], tensor: Tensor, fit: Fit = "squash",
            normalize: str | None = None, source: BinaryIO | None = None) -> Prepared:
    """The image as the model's input `tensor` takes it.

    Resized with Pillow's bilinear filter: `squash` changes the proportions, `crop` cuts the longer side, `pad` adds
    black, `letterbox` gray, and `centre` squashes the middle 87.5 % of both sides (TF-Slim's inception_preprocessing,
    by which its ImageNet figures are measured). `normalize` as parse_normalization takes it; None decides by the
    tensor's type and quantization. `source` as open_image takes it.

    Raises: UsageError if the tensor cannot hold an image.
    """
    planes_first, height, width, channels = extents(tensor)
    image, notes = open_image(path, source)
    gray = image.convert("L" if channels == 1 else "RGB")
    small, covered = resize(gray, width, height, fit)
    if gray.mode != image.mode:
        notes.append("made gray" if channels == 1 else "gray repeated in three channels")
    notes.append(f"{FITTED[fit]} to {width}x{height}, bilinear")
    pixels = np.asarray(small, np.uint8).reshape(height, width, channels)
    array, said = quantize(pixels, tensor, parse_normalization(normalize, tensor))
    if planes_first:
        array = array.transpose(2, 0, 1)
        notes.append("colour planes first")
    return Prepared(np.ascontiguousarray(array).reshape(tensor.shape), image, covered, (*notes, said))


FITTED = {"squash": "squashed", "crop": "centre cut and resized", "pad": "resized and padded with black",
           "centre": "middle 87.5 % squashed", "letterbox": "resized and padded with gray"}
MIDDLE = 0.875
"""Of each side, what `centre` keeps."""
GRAY = 114
"""Of `letterbox`, as YOLO's networks are trained with (ultralytics' LetterBox)."""


def extents(t: Tensor) -> tuple[bool, int, int, int]:
    """(planes first, height, width, channels) of an image tensor."""
    match t.shape:
        case (1, h, w, 1 | 3 as c) if h and w:
            return False, h, w, c
        case (1, 1 | 3 as c, h, w) if h and w:
            return True, h, w, c
        case (1, h, w) if h and w:
            return False, h, w, 1
    raise UsageError(f"input '{t.name}' does not take an image", want="1,H,W,3 or 1,H,W,1 or 1,H,W",
                     got=f"{t.dtype}{list(t.shape)}", try_="give it a .npy array")


def resize(image: Image.Image, width: int, height: int, fit: Fit) -> tuple[Image.Image, Covered]:
    """The image at this size, and the part of it that is there. `fit` as prepare takes it."""
    w0, h0 = image.size
    if fit == "squash":
        return image.resize((width, height), Image.Resampling.BILINEAR), Covered(0, 0, w0, h0)
    if fit == "centre":
        left, top = w0 * (1 - MIDDLE) / 2, h0 * (1 - MIDDLE) / 2
        small = image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, w0 - left, h0 - top))
        return small, Covered(left, top, w0 * MIDDLE, h0 * MIDDLE)
    scale = (max if fit == "crop" else min)(width / w0, height / h0)
    w, h = width / scale, height / scale
    covered = Covered((w0 - w) / 2, (h0 - h) / 2, w, h)
    if fit == "crop":
        left, top = max(0.0, covered.left), max(0.0, covered.top)
        box = (left, top, min(w0, left + w), min(h0, top + h))
        return image.resize((width, height), Image.Resampling.BILINEAR, box=box), covered
    inner = (max(1, min(width, round(w0 * scale))), max(1, min(height, round(h0 * scale))))
    gray = GRAY if fit == "letterbox" else 0
    padded = Image.new(image.mode, (width, height), gray if image.mode == "L" else (gray,) * 3)
    padded.paste(image.resize(inner, Image.Resampling.BILINEAR),
                 ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return padded, covered


PRESETS: Mapping[str, Normalization] = {
    "raw": Normalization(True),
    "0..1": Normalization(False, (0.0,), (255.0,)),
    "-1..1": Normalization(False, (127.5,), (127.5,)),
    "tf": Normalization(False, (127.5,), (127.5,)),
    "imagenet": Normalization(False, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
"""By name. `tf` as TF-Slim's networks take pixels, `imagenet` as torchvision's do."""


FLOAT_MAX = 1e18
"""Means below it, over deviations above its inverse, are float32."""


def parse_normalization(text: str | None, tensor: Tensor) -> Normalization:
    """`raw`, `0..1`, `-1..1`, `tf`, `imagenet`, or `mean,std` (or three means and three stds).

    None: integer inputs take pixels as they are, shifted to the type's range, because that is what converters make of
    [0,1] and [-1,1] inputs (scale near 1/255 or 1/128); floating-point inputs take 0..1.
    """
    if text is None:
        return PRESETS["0..1" if tensor.dtype.startswith("float") else "raw"]
    if text in PRESETS:
        return PRESETS[text]
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    half = len(numbers) // 2
    if len(numbers) not in (2, 6) or not all(-FLOAT_MAX < x < FLOAT_MAX for x in numbers) or not all(
            abs(x) > 1 / FLOAT_MAX for x in numbers[half:]):
        raise UsageError(f"--normalize does not know '{text}'",
                         want="raw, 0..1, -1..1, tf, imagenet, mean,std or r,g,b,r,g,b", try_="--normalize 127.5,127.5")
    return Normalization(False, tuple(numbers[:half]), tuple(numbers[half:]))


def quantize(pixels: NDArray[np.uint8], tensor: Tensor, n: Normalization) -> tuple[NDArray[Any], str]:
    """Pixels (H, W, C) as stored numbers of `tensor`, and a sentence on how."""
    dtype = DType(tensor.dtype).numpy
    if dtype is None or dtype.kind not in "iuf":
        raise UsageError(f"input '{tensor.name}' does not take an image", got=tensor.dtype, try_="give it a .npy array")
    scale, zero_point = tensor.scale, tensor.zero_point or 0
    shift = -128 if dtype == np.int8 else 0
    if n.raw:
        as_read = "" if not scale or dtype.kind == "f" else (
            f", read by the model as {scale * (shift - zero_point):.3g}..{scale * (255 + shift - zero_point):.3g}")
        stored = "pixel - 128" if shift else "the pixel"
        return (pixels.astype(np.int16) + shift).astype(dtype), f"stored: {stored}{as_read}"
    if len(n.mean) > 1 and len(n.mean) != pixels.shape[-1]:
        raise UsageError("--normalize gives three means for an image of one channel", try_="--normalize MEAN,STD")
    real = (pixels - np.array(n.mean)) / np.array(n.std)
    said = f"real: (pixel - {_listed(n.mean)}) / {_listed(n.std)}"
    if dtype.kind == "f":
        return real.astype(dtype), said
    if not scale:
        raise UsageError(f"input '{tensor.name}' has no single scale to normalize by", try_="--normalize raw")
    limits = np.iinfo(dtype)  # type: ignore[type-var]
    whole = np.rint(real / scale) + zero_point
    return (whole.clip(limits.min, limits.max).astype(dtype),
            f"{said}, quantized with scale {scale:.6g} and zero point {zero_point}")


def _listed(numbers: tuple[float, ...]) -> str:
    text = ", ".join(f"{x:g}" for x in numbers)
    return f"[{text}]" if len(numbers) > 1 else text
