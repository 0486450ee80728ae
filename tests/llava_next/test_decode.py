"""Pictures of every kind, as bytes, become RGB pixels whose size is the one the data side measured."""

import io
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_recipes.pictures import probe
from llava_next.anyres import decode

HEIGHT, WIDTH = 6, 10
EXIF_ORIENTATION = 0x0112


def _saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def _ramp() -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, WIDTH, dtype=np.uint8)
    pixels[..., 1] = np.linspace(0, 255, HEIGHT, dtype=np.uint8)[:, None]
    return Image.fromarray(pixels)


def _half_clear() -> Image.Image:
    """Red, its left half fully transparent."""
    pixels = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    pixels[..., 0] = 255
    pixels[:, WIDTH // 2 :, 3] = 255
    return Image.fromarray(pixels)


def _palette_with_transparency() -> bytes:
    image = Image.new("P", (WIDTH, HEIGHT), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (WIDTH // 2, 0, WIDTH, HEIGHT))
    return _saved(image, "PNG", transparency=0)


def _exif(orientation: int, file_format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return _saved(_ramp(), file_format, exif=exif)


def _grey16() -> bytes:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    return _saved(Image.fromarray(values), "PNG")


def _grey16_with_transparency() -> bytes:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    return _saved(Image.fromarray(values), "PNG", transparency=0)


def _animated() -> bytes:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "green", "blue")]
    return _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


KINDS: dict[str, bytes] = {
    "rgb_png": _saved(_ramp(), "PNG"),
    "jpeg": _saved(_ramp(), "JPEG"),
    "webp": _saved(_ramp(), "WEBP"),
    "bmp": _saved(_ramp(), "BMP"),
    "tiff": _saved(_ramp(), "TIFF"),
    "grey": _saved(_ramp().convert("L"), "PNG"),
    "black_and_white": _saved(_ramp().convert("1"), "PNG"),
    "grey_alpha": _saved(_half_clear().convert("LA"), "PNG"),
    "rgba": _saved(_half_clear(), "PNG"),
    "palette": _saved(_ramp().convert("P"), "PNG"),
    "palette_transparency": _palette_with_transparency(),
    "rgb_transparency": _saved(_ramp(), "PNG", transparency=(0, 0, 0)),
    "cmyk": _saved(_ramp().convert("CMYK"), "JPEG"),
    "ycbcr_tiff": _saved(_ramp().convert("YCbCr"), "TIFF"),
    "lab_tiff": _saved(Image.new("LAB", (WIDTH, HEIGHT), (128, 128, 128)), "TIFF"),
    "grey16_png": _grey16(),
    "grey16_transparency": _grey16_with_transparency(),
    "grey16_tiff": _saved(Image.fromarray(np.full((HEIGHT, WIDTH), 40_000, dtype=np.uint16)), "TIFF"),
    "grey32_tiff": _saved(Image.fromarray(np.full((HEIGHT, WIDTH), 40_000, dtype=np.int32)), "TIFF"),
    "float_tiff": _saved(Image.fromarray(np.full((HEIGHT, WIDTH), 128.0, dtype=np.float32)), "TIFF"),
    "animated_gif": _animated(),
    **{f"exif_{orientation}": _exif(orientation) for orientation in range(1, 9)},
    "exif_png": _exif(6, "PNG"),
    "exif_webp": _exif(8, "WEBP"),
    "one_pixel": _saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"),
    "one_pixel_gif": _saved(Image.new("P", (1, 1)), "GIF"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_size_is_the_measured_size(kind: str) -> None:
    """What `data_recipes` measures (and lengths are counted from) is what the model's side decodes."""
    info = probe(KINDS[kind])
    image = decode(KINDS[kind])
    assert image.mode == "RGB"
    assert (image.height, image.width) == (info.height, info.width)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture(orientation: int) -> None:
    """Orientations 5 to 8 swap the sides; each of the eight puts the bright red corner where it belongs."""
    image = decode(_exif(orientation, "PNG"))
    assert (image.height, image.width) == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    # Stored, red grows to the right: the axis and end at which it is brightest after turning.
    axis, at_end = {
        1: ("x", True), 2: ("x", False), 3: ("x", False), 4: ("x", True),
        5: ("y", True), 6: ("y", True), 7: ("y", False), 8: ("y", False),
    }[orientation]  # fmt: skip
    red = np.asarray(image)[..., 0].astype(int)
    line = red[0] if axis == "x" else red[:, 0]
    assert (line[-1] > line[0]) == at_end


@pytest.mark.parametrize("kind", ["rgba", "palette_transparency"])
def test_transparency_lies_on_white(kind: str) -> None:
    """Clear pixels are white, whatever colour hides below them; solid ones keep their colour."""
    pixels = np.asarray(decode(KINDS[kind]))
    assert (pixels[:, : WIDTH // 2] == 255).all()
    assert not (pixels[:, WIDTH // 2 :] == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    """Full range in, full range out: 16-bit scans do not turn white."""
    pixels = np.asarray(decode(KINDS["grey16_png"]))[..., 0].ravel()
    assert pixels[0] == 0
    assert pixels[-1] == 255
    assert abs(int(pixels[len(pixels) // 2]) - 128) < 4


def test_animation_shows_its_first_frame() -> None:
    """Of an animated GIF the first frame is seen."""
    assert decode(KINDS["animated_gif"]).getpixel((0, 0)) == (255, 0, 0)


def test_pixels_without_alpha_are_untouched() -> None:
    """A plain RGB picture comes back bit for bit."""
    np.testing.assert_array_equal(np.asarray(decode(KINDS["rgb_png"])), np.asarray(_ramp()))


def test_bytes_that_are_no_picture_are_an_oserror() -> None:
    """The documented error, for text and for a file that was cut off."""
    for data in (b"not a picture", KINDS["jpeg"][:-40], b""):
        with warnings.catch_warnings(), pytest.raises(OSError):
            decode(data).load()
