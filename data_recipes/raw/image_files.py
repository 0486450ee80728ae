"""Resolves, loads and validates image files.

Images are decoded once, completely, and identified by the sha256 of their bytes. This module imports neither `datasets`
nor numpy, so that the worker processes that use it stay small.
"""

import hashlib
import io
import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from data_recipes.schema.sample import Reason

MAX_PIXELS = 100_000_000  # a page scanned at 600 dpi has 35 million; decompression bombs claim more than a billion
MAX_BYTES = 256 * 2**20
MAX_ASPECT_RATIO = 100
# Pillow supports more formats, some of which run external programs (EPS). MPO files of cameras are opened as JPEG.
Image.init()
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)

_FORMAT_OF_SUFFIX = {
    suffix: name
    for name, suffixes in {
        "JPEG": (".jpg", ".jpeg"),
        "PNG": (".png",),
        "GIF": (".gif",),
        "WEBP": (".webp",),
        "BMP": (".bmp",),
        "TIFF": (".tif", ".tiff"),
    }.items()
    for suffix in suffixes
}


class ImageError(Exception):
    """An image cannot be used.

    Attributes:
        reason: the category of the error.
        detail: a description of the error.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ImageInfo:
    """Properties of an encoded image.

    Attributes:
        sha256: hash of the encoded bytes, in hexadecimal.
        height, width: size in pixels after EXIF rotation.
        format: name of the format in Pillow.
    """

    sha256: str
    height: int
    width: int
    format: str


@dataclass(frozen=True)
class LoadedImage:
    """A valid image with its original bytes.

    Attributes:
        info: properties of the image.
        data: the encoded bytes, unchanged.
        notes: irregularities of the file, counted in the manifest: `wrong_extension` (the format of the bytes differs
            from the extension) or `found_by_other_extension`.
    """

    info: ImageInfo
    data: bytes
    notes: tuple[str, ...] = ()


def resolve_inside(root: Path, name: str) -> Path:
    """Return the path of `name` below `root`.

    Raises:
        ImageError: `path_outside_root` if `name` is absolute, contains `..`, or leads outside `root` through a symbolic
            link.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\", "~")) or ".." in parts or "\0" in name:
        raise ImageError(Reason.PATH_OUTSIDE_ROOT, f"{name!r} is not a plain path below the image root")
    path = root / name
    real_root = _resolve_folder(root)
    # Images are rarely links and are in few folders, so resolving the parent through a cache saves system calls.
    real_path = os.path.realpath(path) if path.is_symlink() else f"{_resolve_folder(path.parent)}/{path.name}"
    if real_path != real_root and not real_path.startswith(real_root.rstrip(os.sep) + os.sep):
        detail = (
            f"{name!r} leaves the image root by a symbolic link; make the link the root itself, or copy the pictures"
        )
        raise ImageError(Reason.PATH_OUTSIDE_ROOT, detail)
    return path


@lru_cache(maxsize=4096)
def _resolve_folder(folder: Path) -> str:
    return os.path.realpath(folder)


def resolve_image(value: object, root: Path) -> Path | bytes:
    """Resolve an image field: {"bytes": ..., "path": ...} as written by `datasets`, or a path below `root`.

    Raises:
        ImageError: `not_a_string` if the value has another type, `path_outside_root` if the path leads outside `root`.
    """
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        value = data if isinstance(data, bytes) else path
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ImageError(Reason.NOT_A_STRING, "a picture is neither a path nor holds `bytes` or a `path`")
    return resolve_inside(root, value)


def resolve_images(value: object, root: Path) -> list[Path | bytes]:
    """Resolve a field with no image (None), one image or a list of images; errors as in `resolve_image`."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [resolve_image(each, root) for each in values]


def probe_image(data: bytes) -> ImageInfo:
    """Decode an image completely and return its properties.

    The format is determined by the bytes, not by the file extension. The size is that after EXIF rotation, as the model
    sees it.

    Raises:
        ImageError: `picture_empty`, `picture_too_large`, `aspect_ratio`, `picture_truncated` or `picture_unreadable`.
    """
    if not data:
        raise ImageError(Reason.IMAGE_EMPTY, "zero bytes")
    if len(data) > MAX_BYTES:
        raise ImageError(Reason.IMAGE_TOO_LARGE, f"{len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            # `_check_size` has its own limit; Pillow's size warning would be printed for every image.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image_format = image.format or "unknown"
            _check_size(image.height, image.width)
            image.load()
            # Training applies both of these operations. They fail on some files, which must be rejected here.
            ImageOps.exif_transpose(image, in_place=True)
            height, width = image.height, image.width
            if image.mode != "RGB":
                image.convert("RGB")
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(Reason.IMAGE_TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError(Reason.IMAGE_UNREADABLE, f"none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise many types of exceptions on damaged bytes
        detail = f"{type(error).__name__}: {error}"[:200]
        reason = Reason.IMAGE_TRUNCATED if _is_truncated(data, detail) else Reason.IMAGE_UNREADABLE
        raise ImageError(reason, detail) from error
    return ImageInfo(hashlib.sha256(data).hexdigest(), height, width, image_format)


def load_image(image: Path | bytes) -> LoadedImage:
    """Read and validate one image.

    If the file does not exist, a file with another image extension is used instead, provided that there is exactly one:
    OCR-VQA's annotations say .jpg for covers that are GIF files (LLaVA#601). This is recorded in `notes`.

    Args:
        image: path of a file, or encoded bytes.

    Raises:
        ImageError: see `probe_image`; also `picture_missing` if the file does not exist.
    """
    if isinstance(image, bytes):
        return LoadedImage(probe_image(image), image)
    try:
        path = image if image.is_file() else _find_other_extension(image)
        num_bytes = path.stat().st_size
        if num_bytes > MAX_BYTES:
            raise ImageError(Reason.IMAGE_TOO_LARGE, f"{num_bytes} bytes; the limit is {MAX_BYTES}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(Reason.IMAGE_MISSING, f"no file {image.name!r}") from error
    except OSError as error:
        raise ImageError(Reason.IMAGE_UNREADABLE, f"{image.name}: {error.strerror or error}") from error
    try:
        info = probe_image(data)
    except ImageError as error:
        raise ImageError(error.reason, f"{path.name}: {error.detail}") from error
    if path is not image:
        return LoadedImage(info, data, ("found_by_other_extension",))
    actual = "JPEG" if info.format == "MPO" else info.format
    expected = _FORMAT_OF_SUFFIX.get(path.suffix.lower(), actual)
    return LoadedImage(info, data, () if expected == actual else ("wrong_extension",))


def _find_other_extension(image: Path) -> Path:
    """Return the only file whose path differs from that of the missing `image` in its image extension."""
    candidates = []
    if image.suffix.lower() in _FORMAT_OF_SUFFIX:
        others = [image.with_suffix(suffix) for suffix in _FORMAT_OF_SUFFIX]
        # `resolve_inside` has checked the original path only; a link could lead outside the image root.
        candidates = [path for path in others if path.is_file() and not path.is_symlink()]
    if len(candidates) != 1:
        detail = f"no file {image.name!r} in {image.parent.name!r}"
        if candidates:
            detail += f", but {len(candidates)} of other formats"
        raise ImageError(Reason.IMAGE_MISSING, detail)
    return candidates[0]


def _is_truncated(data: bytes, detail: str) -> bool:
    """Return whether an undecodable image is truncated, by Pillow's message or by the length in a WebP header."""
    if data[:4] == b"RIFF" and len(data) >= 8:
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return "truncated" in detail.lower()


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ImageError(Reason.IMAGE_TOO_LARGE, f"{height} x {width} pixels; the limit is {MAX_PIXELS} in all")
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(Reason.ASPECT_RATIO, f"{height} x {width} pixels; the limit is 1:{MAX_ASPECT_RATIO}")
