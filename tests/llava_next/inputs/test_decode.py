"""Decoding of image files of many kinds to known RGB pixels, with the size that data preparation measures."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_recipes.mixture.mixture import Mixture
from data_recipes.raw.image_files import probe_image
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.sample import Message, Sample
from llava_next.config import AUTHORS_GRIDS, ProcessorConfig, ViewsConfig
from llava_next.inputs.anyres import decode
from llava_next.inputs.processor import Processor
from llava_next.model.build import read_tokenizer
from tests.tiny import PATCHES_PER_SIDE, TILE, tiny_store, tiny_tokenizer

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


def _four(values: list[Any], dtype: Any = np.uint8) -> np.ndarray:
    """Four fields of 16 x 24 pixels with one value each: top left, top right, bottom left, bottom right."""
    grid = np.array(values, dtype=dtype).reshape(2, 2, -1)
    return grid.repeat(16, axis=0).repeat(24, axis=1).squeeze()


RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
COLOURS = [RED, GREEN, BLUE, WHITE]
GREYS_16 = [0, 0x4000, 0x8000, 0xFFFF]
GREYS = [0, 64, 128, 255]


def _colours() -> Image.Image:
    return Image.fromarray(_four(COLOURS))


def _clear_first() -> Image.Image:
    """The four colors; the first field is transparent, the second half transparent."""
    return Image.fromarray(_four([(*RED, 0), (*GREEN, 128), (*BLUE, 255), (*WHITE, 255)]))


def _palette(**options: Any) -> bytes:
    image = Image.fromarray(_four([0, 1, 2, 3]), "P")
    image.putpalette([value for colour in COLOURS for value in colour])
    return _saved(image, "PNG", **options)


def _turned(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return exif


def _frames(file_format: str, **options: Any) -> bytes:
    others = [Image.new("RGB", (48, 32), colour) for colour in (BLACK, WHITE)]
    return _saved(_colours(), file_format, save_all=True, append_images=others, **options)


def _png(pixels: np.ndarray, colour_type: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """A 16-bit PNG, of which Pillow writes only gray ones, with optional chunks before and after the pixels."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = _chunk(b"IHDR", header) + before + _chunk(b"IDAT", zlib.compress(rows)) + after + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _grey16(file_format: str = "PNG", byte_order: str = "<", **options: Any) -> bytes:
    return _saved(Image.fromarray(_four(GREYS_16, f"{byte_order}u2")), file_format, **options)


def _grey_colours(greys: list[int]) -> list[tuple[int, int, int]]:
    return [(grey, grey, grey) for grey in greys]


LUMA = _grey_colours([76, 150, 29, 255])  # ITU-R 601-2: 0.299 red, 0.587 green, 0.114 blue
COLOURS_16 = np.array(_four(COLOURS), dtype=np.uint16) * 257
ALPHA_16 = _four([0, 0x8080, 0xFFFF, 0xFFFF], np.uint16)[..., None]
OVER_WHITE = [WHITE, (127, 255, 127), BLUE, WHITE]
FLOATS = [0.0, 0.25, 0.5, 1.0]
EXIF_CHUNK = _chunk(b"eXIf", _turned().tobytes().removeprefix(b"Exif\0\0"))

KINDS: dict[str, tuple[bytes, list[tuple[int, int, int]], int]] = {
    # bytes, colors of the four fields, tolerance for a lossy format
    "png": (_saved(_colours(), "PNG"), COLOURS, 0),
    "jpeg": (_saved(_colours(), "JPEG", quality=95), COLOURS, 6),
    "webp": (_saved(_colours(), "WEBP", lossless=True), COLOURS, 0),
    "bmp": (_saved(_colours(), "BMP"), COLOURS, 0),
    "tiff": (_saved(_colours(), "TIFF"), COLOURS, 0),
    "ppm": (_saved(_colours(), "PPM"), COLOURS, 0),
    "jpeg2000": (_saved(_colours(), "JPEG2000"), COLOURS, 0),
    "grey": (_saved(_colours().convert("L"), "PNG"), LUMA, 0),
    "grey_jpeg": (_saved(_colours().convert("L"), "JPEG", quality=95), LUMA, 3),
    "black_and_white": (
        _saved(Image.fromarray(_four([0, 255, 255, 0])).convert("1"), "PNG"), [BLACK, WHITE, WHITE, BLACK], 0,
    ),
    "rgba": (_saved(_clear_first(), "PNG"), OVER_WHITE, 0),
    "rgba_webp": (_saved(_clear_first(), "WEBP", lossless=True), OVER_WHITE, 0),
    "grey_alpha": (
        _saved(Image.fromarray(_four([(9, 0), (0, 128), (128, 255), (0, 255)]), "LA"), "PNG"),
        _grey_colours([255, 127, 128, 0]), 0,
    ),
    "rgb_transparency": (_saved(_colours(), "PNG", transparency=BLUE), [RED, GREEN, WHITE, WHITE], 0),
    "grey_transparency": (
        _saved(Image.fromarray(_four(GREYS)), "PNG", transparency=64), _grey_colours([0, 255, 128, 255]), 0,
    ),
    "palette": (_palette(), COLOURS, 0),
    "palette_transparency": (_palette(transparency=2), [RED, GREEN, WHITE, WHITE], 0),
    "palette_alphas": (_palette(transparency=b"\x00\x80\xff\xff"), OVER_WHITE, 0),
    "cmyk_jpeg": (_saved(_colours().convert("CMYK"), "JPEG", quality=95), COLOURS, 3),
    "cmyk_tiff": (_saved(_colours().convert("CMYK"), "TIFF"), COLOURS, 0),
    "cmyk_black": (
        _saved(Image.fromarray(_four([(0, 0, 0, black) for black in (255, 191, 127, 0)]), "CMYK"), "TIFF"),
        _grey_colours(GREYS), 0,
    ),
    "ycbcr_tiff": (_saved(_colours().convert("YCbCr"), "TIFF"), COLOURS, 2),
    "lab_tiff": (_saved(Image.new("LAB", (48, 32), (128, 128, 128)), "TIFF"), _grey_colours([119] * 4), 2),
    "grey16_png": (_grey16(), _grey_colours(GREYS), 1),
    "grey16_transparency": (_grey16(transparency=0x8000), _grey_colours([0, 64, 255, 255]), 1),
    "grey16_tiff": (_grey16("TIFF"), _grey_colours(GREYS), 1),
    "grey16_tiff_big_endian": (_grey16("TIFF", ">"), _grey_colours(GREYS), 1),
    "grey32_tiff": (_saved(Image.fromarray(_four(GREYS_16, np.int32)), "TIFF"), _grey_colours(GREYS), 1),
    "float_tiff": (_saved(Image.fromarray(_four(FLOATS, np.float32)), "TIFF"), _grey_colours(GREYS), 1),
    "rgb16_png": (_png(COLOURS_16, 2), COLOURS, 0),
    "rgba16_png": (_png(np.concatenate([COLOURS_16, ALPHA_16], axis=2), 6), OVER_WHITE, 0),
    "animated_gif": (_frames("GIF"), COLOURS, 0),
    "animated_webp": (_frames("WEBP", lossless=True), COLOURS, 0),
    "animated_png": (_frames("PNG"), COLOURS, 0),
    "pages_tiff": (_frames("TIFF"), COLOURS, 0),
    "mpo": (_frames("MPO", quality=95), COLOURS, 6),
}  # fmt: skip

# Field indices after rotation by a quarter turn: the left side becomes the top.
TURNED = [2, 0, 3, 1]
EXIF: dict[str, tuple[bytes, list[tuple[int, int, int]], int]] = {
    name: (data, [colours[index] for index in TURNED], stray)
    for name, (data, colours, stray) in {
        "exif_png": (_saved(_colours(), "PNG", exif=_turned()), COLOURS, 0),
        "exif_jpeg": (_saved(_colours(), "JPEG", quality=95, exif=_turned()), COLOURS, 6),
        "exif_webp": (_saved(_colours(), "WEBP", lossless=True, exif=_turned()), COLOURS, 0),
        "exif_tiff": (_saved(_colours(), "TIFF", exif=_turned()), COLOURS, 0),
        "exif_palette": (_palette(exif=_turned()), COLOURS, 0),
        "exif_palette_transparency": (_palette(exif=_turned(), transparency=0), [WHITE, GREEN, BLUE, WHITE], 0),
        "exif_rgba": (_saved(_clear_first(), "PNG", exif=_turned()), OVER_WHITE, 0),
        "exif_cmyk": (_saved(_colours().convert("CMYK"), "JPEG", quality=95, exif=_turned()), COLOURS, 3),
        "exif_grey": (_saved(_colours().convert("L"), "PNG", exif=_turned()), LUMA, 0),
        "exif_grey16": (_grey16(exif=_turned()), _grey_colours(GREYS), 1),
        "exif_grey16_transparency": (
            _grey16(exif=_turned(), transparency=0), _grey_colours([255, 64, 128, 255]), 1,
        ),
        "exif_grey16_tiff": (_grey16("TIFF", exif=_turned()), _grey_colours(GREYS), 1),
        "exif_animated": (_frames("WEBP", lossless=True, exif=_turned()), COLOURS, 0),
        "exif_mpo": (_frames("MPO", quality=95, exif=_turned()), COLOURS, 6),
        "exif_before_pixels": (_png(COLOURS_16, 2, before=EXIF_CHUNK), COLOURS, 0),
        "exif_after_pixels": (_png(COLOURS_16, 2, after=EXIF_CHUNK), COLOURS, 0),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, *EXIF])
def test_pixels_and_size(kind: str) -> None:
    """The color of every field is the expected one, with EXIF orientation applied, and the size is the one that
    `data_recipes` measures."""
    data, colours, stray = {**KINDS, **EXIF}[kind]
    image = decode(data)
    assert image.mode == "RGB"
    info = probe_image(data)
    assert (image.height, image.width) == (info.height, info.width) == ((48, 32) if kind in EXIF else (32, 48))
    pixels = np.asarray(image).astype(int)
    fields = [field for half in np.split(pixels, 2) for field in np.split(half, 2, axis=1)]
    for field, colour in zip(fields, colours, strict=True):
        inside = field[4:-4, 4:-4]  # without the border, where a JPEG's chroma is mixed
        assert abs(inside - np.array(colour)).max() <= stray, (inside[0, 0], colour)


# Maps the visible image to the stored one. Comments: the visible sides of the stored first row and column (EXIF).
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda visible: visible,  # top, left
    2: np.fliplr,  # top, right
    3: lambda visible: visible[::-1, ::-1],  # bottom, right
    4: np.flipud,  # bottom, left
    5: lambda visible: visible.swapaxes(0, 1),  # left, top
    6: lambda visible: visible[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda visible: visible[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda visible: visible[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation: int, file_format: str) -> None:
    """Each of the eight orientations gives the visible image, bitwise, and its size."""
    visible = np.asarray(_ramp())
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](visible)))
    data = _saved(stored, file_format, exif=_turned(orientation))
    np.testing.assert_array_equal(np.asarray(decode(data)), visible)
    assert (probe_image(data).height, probe_image(data).width) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("orientation", [0, 9])
def test_invalid_orientation_is_ignored(orientation: int) -> None:
    """Cameras write such values; the image is unchanged."""
    data = _saved(_ramp(), "PNG", exif=_turned(orientation))
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(_ramp()))
    assert (probe_image(data).height, probe_image(data).width) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 100), (100, 1), (1, 7), (2, 200)])
def test_thin_images(size_hw: tuple[int, int]) -> None:
    """Images that are one pixel high or wide are decoded completely."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    data = _saved(Image.fromarray(pixels), "PNG")
    np.testing.assert_array_equal(np.asarray(decode(data)), pixels)
    assert (probe_image(data).height, probe_image(data).width) == size_hw


@pytest.mark.parametrize("view", ["anyres", "crop"])
def test_samples_encode_as_counted(tmp_path: Path, view: str) -> None:
    """The layout from the sizes in a store equals that of the encoded sample, for samples with images of every kind,
    rotated ones and thin ones."""
    thin = [_saved(Image.new("RGB", size), "PNG") for size in ((1, 100), (100, 1), (1, 1))]
    turned = [data for data, _, _ in EXIF.values()]
    groups = [[data] for data, _, _ in KINDS.values()] + [turned, thin]
    samples = [
        Sample(
            f"{number}",
            (Message("user", "<image>" * len(group) + "\nWhat?"), Message("assistant", "It.")),
            tuple(group),
        )
        for number, group in enumerate(groups)
    ]
    tiny_store(tmp_path, "odd", samples)
    mixture = Mixture.open(MixtureConfig("odd", 0, {"odd": SourceShare()}), tmp_path)
    config = ProcessorConfig("chatml", ViewsConfig(view, view), AUTHORS_GRIDS, TILE, PATCHES_PER_SIDE, max_length=4096)
    processor = Processor(read_tokenizer(str(tiny_tokenizer(tmp_path / "tokenizer"))), config)
    assert mixture.num_samples == len(groups)
    for number in range(mixture.num_samples):
        text, sample = mixture.text(number), mixture.sample(number)
        layout = processor.layout(text.messages, text.sizes_hw)
        example = processor.encode(sample.messages, sample.sizes_hw, sample.images)
        assert layout.images == example.layout.images
        assert len(example.tiles) == layout.num_tiles >= len(groups[number])
        assert [image.size_hw for image in layout.images] == [
            (decode(encoded).height, decode(encoded).width) for encoded in sample.images
        ]


def test_rgb_pixels_are_unchanged() -> None:
    """An RGB image is decoded bitwise."""
    np.testing.assert_array_equal(np.asarray(decode(_saved(_ramp(), "PNG"))), np.asarray(_ramp()))


def test_invalid_bytes_raise_oserror() -> None:
    """Text, a truncated file and empty bytes raise the documented error."""
    for data in (b"not a picture", KINDS["jpeg"][0][:-40], b""):
        with warnings.catch_warnings(), pytest.raises(OSError):
            decode(data).load()
