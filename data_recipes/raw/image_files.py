"""Pictures as bytes: found inside their root, decoded once to be sure, measured, hashed.

Owns: the path rule, the decode check and its limits.
Leaves: doing it in many processes to `image_pool.py`, turning pixels into tiles to the model's side, keeping each
picture once to `writing/`.
This module imports neither `datasets` nor numpy, so that the processes it starts stay small.
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

MAX_PIXELS = 100_000_000  # a page scanned at 600 dpi has 35 million; a decompression bomb claims thousands of millions
MAX_BYTES = 256 * 2**20
MAX_ASPECT_RATIO = 100
# Pillow knows more, some of which call other programs (EPS). Cameras' MPO files count as JPEG.
Image.init()
FORMATS = tuple(
    kind for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if kind in Image.OPEN
)

_FORMAT_OF_SUFFIX = {
    suffix: kind
    for kind, suffixes in {
        "JPEG": (".jpg", ".jpeg"),
        "PNG": (".png",),
        "GIF": (".gif",),
        "WEBP": (".webp",),
        "BMP": (".bmp",),
        "TIFF": (".tif", ".tiff"),
    }.items()
    for suffix in suffixes
}


class PictureError(Exception):
    """One picture cannot be used; carries the reason and what was seen."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class PictureInfo:
    """A picture's sha256 (of its bytes), size in pixels after EXIF rotation, and format."""

    sha256: str
    height: int
    width: int
    format: str


@dataclass(frozen=True)
class LoadedPicture:
    """A picture that decodes, with its original bytes.

    `notes` says what was odd about its file, for the manifest to count: `wrong_extension` (the bytes are of
    another format than the name says; they are kept as they are) or `found_by_other_extension`.
    """

    info: PictureInfo
    data: bytes
    notes: tuple[str, ...] = ()


def inside(root: Path, name: str) -> Path:
    """The file `name` below `root`.

    Raises:
        PictureError: `path_outside_root` if `name` is absolute, steps up with `..`, or leaves by a symbolic
            link.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\", "~")) or ".." in parts or "\0" in name:
        raise PictureError(Reason.PATH_OUTSIDE_ROOT, f"{name!r} is not a plain path below the image root")
    path = root / name
    real_root = _real_folder(root)
    # A picture is rarely a link itself, and few folders hold all of them: one question to the disk, not one a folder.
    real_path = os.path.realpath(path) if path.is_symlink() else f"{_real_folder(path.parent)}/{path.name}"
    if real_path != real_root and not real_path.startswith(real_root.rstrip(os.sep) + os.sep):
        detail = (
            f"{name!r} leaves the image root by a symbolic link; make the link the root itself, or copy the pictures"
        )
        raise PictureError(Reason.PATH_OUTSIDE_ROOT, detail)
    return path


@lru_cache(maxsize=4096)
def _real_folder(folder: Path) -> str:
    return os.path.realpath(folder)


def probe(data: bytes) -> PictureInfo:
    """Decode the whole picture and measure it. Bytes that were cut off, or are something else, do not pass.

    The extension of the file has no say: the bytes tell the format. The size is the one after EXIF rotation,
    which is what the model will see.

    Raises:
        PictureError: `picture_empty`, `picture_too_large`, `aspect_ratio`, `picture_truncated` or
            `picture_unreadable`.
    """
    if not data:
        raise PictureError(Reason.PICTURE_EMPTY, "zero bytes")
    if len(data) > MAX_BYTES:
        raise PictureError(Reason.PICTURE_TOO_LARGE, f"{len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            # Our own limit is below; Pillow's warning about the same thing would be printed per picture.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            kind = image.format or "unknown"
            _check_size(image.height, image.width)
            image.load()
            # Both are what every consumer does next, and both can fail on odd files: better here than in a
            # run.
            ImageOps.exif_transpose(image, in_place=True)
            height, width = image.height, image.width
            if image.mode != "RGB":
                image.convert("RGB")
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(Reason.PICTURE_TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise PictureError(Reason.PICTURE_UNREADABLE, f"none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise nearly every type there is on damaged bytes
        detail = f"{type(error).__name__}: {error}"[:200]
        reason = Reason.PICTURE_TRUNCATED if _was_cut_off(data, detail) else Reason.PICTURE_UNREADABLE
        raise PictureError(reason, detail) from error
    return PictureInfo(hashlib.sha256(data).hexdigest(), height, width, kind)


def load(picture: Path | bytes) -> LoadedPicture:
    """Read one picture and probe it.

    A file that is not there under its name may be there under another picture's extension: OCR-VQA's lists say
    .jpg, and many of its covers are GIFs (LLaVA#601). It is taken if just one such file is there, and noted.

    Raises:
        PictureError: as `probe`, and `picture_missing` where there is no such file.
    """
    if isinstance(picture, bytes):
        return LoadedPicture(probe(picture), picture)
    try:
        path = picture if picture.is_file() else _by_other_extension(picture)
        num_bytes = path.stat().st_size
        if num_bytes > MAX_BYTES:
            raise PictureError(Reason.PICTURE_TOO_LARGE, f"{num_bytes} bytes; the limit is {MAX_BYTES}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise PictureError(Reason.PICTURE_MISSING, f"no file {picture.name!r}") from error
    except OSError as error:
        raise PictureError(Reason.PICTURE_UNREADABLE, f"{picture.name}: {error.strerror or error}") from error
    try:
        info = probe(data)
    except PictureError as error:
        raise PictureError(error.reason, f"{path.name}: {error.detail}") from error
    if path is not picture:
        return LoadedPicture(info, data, ("found_by_other_extension",))
    found = "JPEG" if info.format == "MPO" else info.format
    promised = _FORMAT_OF_SUFFIX.get(path.suffix.lower(), found)
    return LoadedPicture(info, data, () if promised == found else ("wrong_extension",))


def _by_other_extension(picture: Path) -> Path:
    """The one file beside the missing `picture` that differs from it in a picture's extension only."""
    found = []
    if picture.suffix.lower() in _FORMAT_OF_SUFFIX:
        others = [picture.with_suffix(suffix) for suffix in _FORMAT_OF_SUFFIX]
        # A link might lead out of the image root, which `inside` has checked for the other name only.
        found = [path for path in others if path.is_file() and not path.is_symlink()]
    if len(found) != 1:
        detail = f"no file {picture.name!r} in {picture.parent.name!r}"
        raise PictureError(Reason.PICTURE_MISSING, f"{detail}, but {len(found)} of other formats" if found else detail)
    return found[0]


def _was_cut_off(data: bytes, detail: str) -> bool:
    """Whether a picture that its decoder gave up on ends too early: Pillow says so, or a WebP's own length does."""
    if data[:4] == b"RIFF" and len(data) >= 8:
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return "truncated" in detail.lower()


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise PictureError(Reason.PICTURE_TOO_LARGE, f"{height} x {width} pixels; the limit is {MAX_PIXELS} in all")
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise PictureError(Reason.ASPECT_RATIO, f"{height} x {width} pixels; the limit is 1:{MAX_ASPECT_RATIO}")
