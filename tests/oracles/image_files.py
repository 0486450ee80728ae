"""Image files that are more than RGB pixels: EXIF orientation, transparency, 16 bits; and their plain counterparts.

Input of the authors' loader and of ours. Standard library only, as `inputs.py`: PNG is written here, so that files do
not depend on the version of Pillow.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGBA = 0, 2, 3, 4, 6
"""PNG's colour types."""


@dataclass(frozen=True)
class ImageFile:
    """A PNG file, and the one that is left when one property of it is not read.

    Attributes:
        kind: what is special about it.
        rule: of tests/oracles/differences.md: what the authors' loader does with it.
        data: the file.
        plain: the same pixels without the property (rule `exif_ignored`, `alpha_dropped`), or clipped to 8 bits
            (`clipped_to_8_bits`).
    """

    kind: str
    rule: str
    data: bytes
    plain: bytes

    @property
    def about(self) -> list[str]:
        """For the fixture's digest of its inputs."""
        return [self.kind, self.rule, *(hashlib.sha256(data).hexdigest() for data in (self.data, self.plain))]


def image_files() -> list[ImageFile]:
    """Every property once; of the orientations all seven that change an image."""
    return [*_turned(), *_transparent(), *_deep()]


def _turned() -> Iterator[ImageFile]:
    height, width = 60, 100
    pixels = _noise("turned", height * width * 3)
    plain = _png((height, width), _RGB, 8, pixels)
    for orientation in range(2, 9):
        # A TIFF header and one entry: tag 0x0112, one unsigned short.
        exif = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
        data = _png((height, width), _RGB, 8, pixels, {b"eXIf": exif})
        yield ImageFile(f"orientation {orientation}", "exif_ignored", data, plain)


def _transparent() -> Iterator[ImageFile]:
    height, width = 45, 61
    num = height * width
    colours, alpha, grey = _noise("colours", num * 3), _noise("alpha", num), _noise("grey", num)
    rgba = b"".join(colours[3 * i : 3 * i + 3] + alpha[i : i + 1] for i in range(num))
    grey_alpha = b"".join(grey[i : i + 1] + alpha[i : i + 1] for i in range(num))
    palette, clear = {b"PLTE": _noise("palette", 768)}, {b"tRNS": _noise("clear", 256)}
    keyed = b"".join(colours[:3] if i % 5 == 0 else colours[3 * i : 3 * i + 3] for i in range(num))
    key = {b"tRNS": struct.pack(">3H", *colours[:3])}
    size = height, width
    for kind, data, plain in (
        ("RGB with alpha", _png(size, _RGBA, 8, rgba), _png(size, _RGB, 8, colours)),
        ("grey with alpha", _png(size, _GREY_ALPHA, 8, grey_alpha), _png(size, _GREY, 8, grey)),
        ("palette with alpha", _png(size, _PALETTE, 8, grey, palette | clear), _png(size, _PALETTE, 8, grey, palette)),
        ("one clear colour", _png(size, _RGB, 8, keyed, key), _png(size, _RGB, 8, keyed)),
    ):
        yield ImageFile(kind, "alpha_dropped", data, plain)


def _deep() -> Iterator[ImageFile]:
    height, width = 50, 40
    noise = _noise("deep", height * width * 2)
    values = struct.unpack(f">{height * width}H", noise)
    for kind, shown in (
        ("16 bits", values),
        ("16 bits, bright", [256 + value % 65280 for value in values]),
        ("16 bits, dark", [value % 256 for value in values]),
    ):
        data = _png((height, width), _GREY, 16, struct.pack(f">{height * width}H", *shown))
        plain = _png((height, width), _GREY, 8, bytes(min(value, 255) for value in shown))
        yield ImageFile(kind, "clipped_to_8_bits", data, plain)


def _noise(name: str, num_bytes: int) -> bytes:
    return hashlib.shake_256(name.encode()).digest(num_bytes)


def _png(
    size_hw: tuple[int, int], colour_type: int, depth: int, pixels: bytes, chunks: dict[bytes, bytes] | None = None
) -> bytes:
    """A PNG file of rows of pixels; `chunks` come before them, in their order."""
    height, width = size_hw
    stride = len(pixels) // height
    rows = b"".join(b"\0" + pixels[row * stride : (row + 1) * stride] for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    # Level 0 stores the rows as they are: the file's bytes do not depend on the version of zlib.
    named = {b"IHDR": header, **(chunks or {}), b"IDAT": zlib.compress(rows, 0), b"IEND": b""}
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in named.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
