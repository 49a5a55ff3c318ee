"""Images in: any size and mode, upright, fitted, normalized, and what was done is said."""

import io

import numpy as np
import pytest
from PIL import Image

from npulab.errors import ModelError, UsageError
from npulab.program.types import Tensor
from npulab.runtime import images
from npulab.runtime.images import parse_normalization, prepare, quantize

U8 = Tensor(0, "x", "uint8", (1, 8, 8, 3), 1 / 128, 128)
I8 = Tensor(0, "x", "int8", (1, 8, 8, 3), 1 / 255, -128)
F32 = Tensor(0, "x", "float32", (1, 8, 8, 3))
GRAY = Tensor(0, "x", "uint8", (1, 8, 8, 1), 1 / 255, 0)


def saved(tmp_path, image, name="a.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def gradient(w=16, h=8):
    x = np.linspace(0, 255, w).astype(np.uint8)
    return Image.fromarray(np.stack([np.tile(x, (h, 1))] * 3, axis=-1))


def test_uint8_pixels_go_in_as_they_are_and_the_range_they_mean_is_said(tmp_path):
    image = gradient(8, 8)
    made = prepare(saved(tmp_path, image), U8)

    assert np.array_equal(made.array[0], np.asarray(image))
    assert made.notes == ("a.png: PNG 8x8 RGB", "squashed to 8x8, bilinear",
                          "stored: the pixel, read by the model as -1..0.992")


def test_int8_pixels_are_shifted(tmp_path):
    made = prepare(saved(tmp_path, gradient(8, 8)), I8)

    assert (made.array.min(), made.array.max(), made.array.dtype) == (-128, 127, np.int8)
    assert made.notes[-1] == "stored: pixel - 128, read by the model as 0..1"


def test_resizing_is_pillows_bilinear_squash(tmp_path):
    image = gradient(50, 30)
    want = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))

    assert np.array_equal(prepare(saved(tmp_path, image), U8).array[0], want)


def test_floating_point_takes_zero_to_one_unless_told(tmp_path):
    path = saved(tmp_path, gradient(8, 8))

    assert prepare(path, F32).array.max() == 1.0
    assert prepare(path, F32, normalize="-1..1").array.min() == -1.0
    assert prepare(path, F32, normalize="raw").array.max() == 255.0
    assert prepare(path, F32).notes[-1] == "real: (pixel - 0) / 255"


@pytest.mark.parametrize("how", ["-1..1", "127.5,127.5", "127.5,127.5,127.5,127.5,127.5,127.5"])
def test_normalized_pixels_are_quantized_with_the_tensors_scale(how):
    pixels = np.array([[[0, 128, 255]]], np.uint8)
    tensor = Tensor(0, "x", "int8", (1, 1, 1, 3), 0.02, 3)

    stored, said = quantize(pixels, tensor, parse_normalization(how, tensor))

    assert stored.tolist() == [[[-47, 3, 53]]]
    assert said.endswith("quantized with scale 0.02 and zero point 3")


def test_crop_cuts_the_longer_side_and_pad_adds_black(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 10, 20))
    path = saved(tmp_path, image)

    crop = prepare(path, U8, "crop")
    pad = prepare(path, U8, "pad")

    assert crop.array[:, :, 1:].min() == 255  # the filter reaches over the first column
    assert (crop.covered.left, crop.covered.width) == (10, 20)
    assert pad.array[0, :2].max() == 0
    assert pad.array[0, 2:6, 3:].min() == 255
    assert (pad.covered.top, pad.covered.height) == (-10, 40)


def test_the_exif_tag_turns_the_image_and_that_is_said(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    made = prepare(saved(tmp_path, image, exif=exif), Tensor(0, "x", "uint8", (1, 4, 2, 3), 1 / 255, 0))

    assert made.array[0, 0, 1, 0] == 255
    assert "turned upright as its EXIF tag says" in made.notes


@pytest.mark.parametrize(("mode", "note"), [
    ("1", None), ("L", "gray repeated in three channels"), ("P", None), ("CMYK", None), ("YCbCr", None),
    ("RGBA", "transparent parts made white"), ("LA", "transparent parts made white"),
    ("I;16", "16 bits a pixel cut to 8"), ("F", "values 0..255 spread over 0..255"),
])
def test_every_mode_becomes_eight_bits(tmp_path, mode, note):
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.linspace(0, 255, 64).reshape(8, 8).astype(np.float32))
    else:
        image = gradient(8, 8).convert(mode)
    name = "a.tiff" if mode in ("F", "CMYK", "YCbCr") else "a.png"

    made = prepare(saved(tmp_path, image, name), U8)

    assert made.array.shape == (1, 8, 8, 3)
    assert made.array.max() > 250
    assert note is None or note in made.notes


def test_colour_becomes_gray_for_a_model_of_one_channel(tmp_path):
    made = prepare(saved(tmp_path, Image.new("RGB", (9, 9), (255, 0, 0))), GRAY)

    assert set(made.array.ravel()) == {76}
    assert "made gray" in made.notes


def test_a_model_with_colour_planes_first_gets_them_so(tmp_path):
    made = prepare(saved(tmp_path, Image.new("RGB", (9, 9), (1, 2, 3))), Tensor(0, "x", "uint8", (1, 3, 8, 8), 1.0, 0))

    assert made.array[0, :, 0, 0].tolist() == [1, 2, 3]


def test_an_image_that_claims_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "PIXELS_LIMIT", 100)

    with pytest.raises(ModelError) as e:
        prepare(saved(tmp_path, gradient(20, 20)), U8)
    assert str(e.value) == ("a.png is too large an image\n  want    1..100 pixels\n  got     20x20\n"
                            "  try     make it smaller first")


def test_a_bomb_that_pillow_itself_refuses_is_a_typed_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)

    with pytest.raises(ModelError, match="too large an image"):
        prepare(saved(tmp_path, gradient(20, 20)), U8)


def test_damaged_images_are_typed_errors(tmp_path):
    rng = np.random.default_rng(3)
    buffers = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        gradient(32, 32).save(buffer, kind)
        buffers.append(buffer.getvalue())
    path = tmp_path / "a.img"
    for case in range(300):
        data = bytearray(buffers[case % len(buffers)])
        for at in rng.integers(0, len(data), 1 + case % 4):
            data[at] = rng.integers(256)
        path.write_bytes(data[: rng.integers(1, len(data) + 1)])
        try:
            assert prepare(path, U8).array.shape == (1, 8, 8, 3)
        except ModelError as e:
            assert "a.img is" in str(e)  # noqa: PT017


def test_formats_that_start_other_programs_are_not_opened(tmp_path):
    path = tmp_path / "a.eps"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")

    with pytest.raises(ModelError, match="not an image that Pillow reads"):
        prepare(path, U8)


def test_what_cannot_be_done_is_told(tmp_path):
    path = saved(tmp_path, gradient())

    with pytest.raises(UsageError, match=r"cannot read .* as an image"):
        prepare(tmp_path / "no.png", U8)
    with pytest.raises(UsageError, match=r"does not take an image\n  want    1,H,W,3"):
        prepare(path, Tensor(0, "x", "uint8", (1, 640)))
    with pytest.raises(UsageError, match="--normalize does not know 'loud'"):
        prepare(path, U8, normalize="loud")
    for zero in ("0,0", "1,nan", "1", "1,2,3"):
        with pytest.raises(UsageError, match="--normalize does not know"):
            prepare(path, U8, normalize=zero)
    with pytest.raises(UsageError, match="no single scale"):
        prepare(path, Tensor(0, "x", "uint8", (1, 8, 8, 3)), normalize="0..1")
    with pytest.raises(UsageError, match="three means for an image of one channel"):
        prepare(path, GRAY, normalize="1,2,3,1,1,1")
