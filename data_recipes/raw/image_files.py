"""Resolves, loads and validates images.

Records name an image by a path, by bytes, by base64 text or by an object with one of them. Images are decoded once,
completely, and identified by the sha256 of their bytes. This module imports neither `datasets` nor numpy, so that the
worker processes that use it stay small.
"""

import base64
import binascii
import hashlib
import io
import os
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from urllib.parse import unquote

from PIL import Image, ImageOps, UnidentifiedImageError

from data_recipes.raw.archives import open_archive
from data_recipes.raw.file_kinds import HEAD_BYTES, describe_file_kind, is_heif
from data_recipes.raw.packed_folders import find_member, folder_state, is_inside
from data_recipes.schema.sample import ArchiveMember, DataError, ImageReference, Reason

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
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095  # the limits of Linux
_MIN_BASE64_CHARACTERS = 200
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_IMAGE_KEYS = ("bytes", "path", "image", "image_url", "url")
_MAX_NESTING = 4
HEIF_COMMAND = "./scripts/setup.sh --extras heif"


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
        data: the encoded bytes, unchanged; of a HEIC or HEIF image a PNG of its pixels.
        notes: irregularities of the file, counted in the manifest: `wrong_extension` (the format of the bytes differs
            from the extension), `found_by_other_extension`, `found_by_other_case`, or `converted_from_heif`.
    """

    info: ImageInfo
    data: bytes
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------- references


def resolve_image(value: object, root: Path) -> ImageReference:
    """Resolve an image field of a record.

    The value is one of: the path of a file below `root` (see `resolve_inside`), which may be in an archive
    (`packed_folders.py`); encoded bytes; base64 text, with or without `data:image/...;base64,`; an object that has one
    of them under `bytes`, `path`, `image`, `image_url` or `url`. The first of these keys that is not null is used,
    because `path` beside `bytes` is often only the original file name.

    Raises:
        ImageError: `not_a_string` if the value is none of these, `image_not_local` for a URL, `path_outside_root` or
            `picture_missing` for a path, `picture_unreadable` or `picture_too_large` for base64 text.
        DataError: an archive that stands for the folder of the image cannot be read.
        OSError: an archive or the cache folder cannot be accessed.
    """
    key = ""
    for _ in range(_MAX_NESTING):
        if not isinstance(value, dict):
            break
        present = [(name, value[name]) for name in _IMAGE_KEYS if value.get(name) is not None]
        if not present:
            known = ", ".join(f"`{name}`" for name in _IMAGE_KEYS)
            raise ImageError(Reason.NOT_A_STRING, f"an image is an object with none of {known}")
        key, value = present[0]
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str):
        detail = f"an image is of type {type(value).__name__}, not a path, bytes, base64 text or an object with one"
        raise ImageError(Reason.NOT_A_STRING, detail)
    data = _decode_text(value, must_be_base64=key == "bytes")
    if data is not None:
        return data
    path = resolve_inside(root, _strip_scheme(value))
    return find_member(path, root, tuple(_FORMAT_OF_SUFFIX)) or path


def resolve_images(value: object, root: Path) -> list[ImageReference]:
    """Resolve a field with no image (None), one image or a list of images; errors as in `resolve_image`."""
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    return [resolve_image(each, root) for each in values]


def resolve_inside(root: Path, name: str) -> Path:
    """Return the path of `name` below `root`.

    `name` is relative to `root`, or absolute and below it. It may have backslashes between its parts. Symbolic links
    are followed inside `root`, and in a snapshot of a Hugging Face cache to the `blobs` of the same repository.

    Raises:
        ImageError: `path_outside_root` if `name` is absolute and not below `root`, contains `..`, or leads outside
            `root` through a symbolic link; `picture_missing` if no file system has such names; `wrong_encoding` if it
            is not valid text.
    """
    path = root / _relative_name(root, name)
    real_root = _resolve_folder(root)
    # Images are rarely links and are in few folders, so resolving the parent through a cache saves system calls.
    if os.path.islink(path):  # noqa: PTH114  (Path.is_symlink raises for long names)
        real_path = os.path.realpath(path)
    else:
        real_path = f"{_resolve_folder(path.parent)}/{path.name}"
    if not is_inside(real_path, real_root):
        problem = f"{_quote(name)} leaves the image root by a symbolic link"
        fix = "make the link the root itself, or copy the images"
        raise ImageError(Reason.PATH_OUTSIDE_ROOT, f"{problem}; {fix}")
    return path


def _relative_name(root: Path, name: str) -> str:
    """Return `name` relative to `root`, with `/` between its parts, if it may be a path below `root`."""
    outside = f"{_quote(name)} is not a path below the image root"
    if "\0" in name:
        raise ImageError(Reason.PATH_OUTSIDE_ROOT, f"{_quote(name)} contains a NUL character")
    if len(name) > _MAX_NAME_BYTES // 4 or not name.isascii():
        _check_name(root, name)
    if "\\" in name and not os.path.lexists(root / name):
        name = name.replace("\\", "/")
    parts = name.split("/")
    if ".." in parts or ".." in name.split("\\") or name.startswith("~") or re.fullmatch("[A-Za-z]:", parts[0]):
        raise ImageError(Reason.PATH_OUTSIDE_ROOT, outside)
    if not name.startswith("/"):
        return name
    path = Path(name)
    for base, candidate in (
        (root, path),
        (Path(os.path.abspath(root)), path),  # noqa: PTH100  (without following links)
        (Path(_resolve_folder(root)), Path(_resolve_folder(path.parent), path.name)),
    ):
        if candidate.is_relative_to(base):
            return str(candidate.relative_to(base))
    raise ImageError(Reason.PATH_OUTSIDE_ROOT, outside)


def _check_name(root: Path, name: str) -> None:
    """Reject a name that no file system has."""
    try:
        num_bytes = max(len(os.fsencode(part)) for part in re.split(r"[/\\]", name))
        num_path_bytes = len(os.fsencode(root / name))
    except UnicodeEncodeError as error:
        raise ImageError(Reason.WRONG_ENCODING, f"{_quote(name)} has an unpaired surrogate") from error
    if num_bytes > _MAX_NAME_BYTES or num_path_bytes > _MAX_PATH_BYTES:
        detail = f"{_quote(name)} has {len(name)} characters, which is too long for a file name"
        raise ImageError(Reason.IMAGE_MISSING, detail)


@lru_cache(maxsize=4096)
def _resolve_folder(folder: Path) -> str:
    return os.path.realpath(folder)


def _decode_text(text: str, must_be_base64: bool) -> bytes | None:
    """Return the bytes of a data URI or of base64 text; None if the text is neither.

    Text without `data:` is base64 only if it is long and what it encodes begins like an image, because a path may
    consist of the same characters.
    """
    encoded = text
    is_uri = text[:5].lower() == "data:"
    if is_uri:
        header, comma, encoded = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise ImageError(Reason.IMAGE_UNREADABLE, f"{_quote(text)} is not data:image/...;base64,...")
    elif not must_be_base64 and len(text) < _MIN_BASE64_CHARACTERS:
        return None
    if len(encoded) > MAX_BYTES * 4 // 3 + 4:
        raise ImageError(Reason.IMAGE_TOO_LARGE, f"{len(encoded)} characters of base64; the limit is {MAX_BYTES} bytes")
    compact = "".join(encoded.split())
    if not is_uri and not must_be_base64 and not _BASE64.fullmatch(compact):
        return None
    compact = compact.rstrip("=")
    try:
        data = base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        if not is_uri and not must_be_base64:
            return None
        raise ImageError(Reason.IMAGE_UNREADABLE, f"{_quote(text)} is not valid base64") from error
    return data if is_uri or must_be_base64 or _begins_like_image(data) else None


def _begins_like_image(data: bytes) -> bool:
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
    return data.startswith(starts) or data[8:12] == b"WEBP" or data[4:8] == b"ftyp"


def _strip_scheme(text: str) -> str:
    """Return the path of a `file://` URL, or the text if it is no URL; other URLs are rejected."""
    match = _SCHEME.match(text)
    if match is None:
        return text
    path = text[match.end() :]
    if match[1].lower() == "file" and path.startswith(("/", "localhost/")):
        return unquote(path.removeprefix("localhost"))
    detail = f"{_quote(text)} is a URL, and nothing is downloaded here; download the image and give its path"
    raise ImageError(Reason.IMAGE_NOT_LOCAL, detail)


def _quote(text: str, limit: int = 80) -> str:
    """Return the text in quotation marks, shortened to a part of a line."""
    quoted = repr(text if len(text) <= 2 * limit else text[:limit] + text[-limit:])
    return quoted if len(quoted) <= limit else f"{quoted[: limit - 20]}...{quoted[-17:]}"


# ------------------------------------------------------------------------------------------------- loading


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
        raise ImageError(Reason.IMAGE_UNREADABLE, _describe_unknown(data)) from error
    except Exception as error:  # Pillow's decoders raise many types of exceptions on damaged bytes
        detail = f"{type(error).__name__}: {error}"[:200]
        reason = Reason.IMAGE_TRUNCATED if _is_truncated(data, detail) else Reason.IMAGE_UNREADABLE
        raise ImageError(reason, detail) from error
    return ImageInfo(hashlib.sha256(data).hexdigest(), height, width, image_format)


def load_image(image: ImageReference) -> LoadedImage:
    """Read and validate one image.

    If the file does not exist, the only one whose path differs in case is used; else the only one with another image
    extension: OCR-VQA's annotations say .jpg for covers that are GIF files (LLaVA#601). Both are recorded in `notes`.

    Args:
        image: path of a file, encoded bytes, or a member of an archive.

    Raises:
        ImageError: see `probe_image`; also `picture_missing` if the file does not exist.
    """
    if isinstance(image, bytes):
        return _validate(image)
    if isinstance(image, ArchiveMember):
        return _validate(_read_member(image), PurePath(image.name), image.path or PurePath(image.name))
    try:
        path = image if image.is_file() else _find_other_case(image) or _find_other_extension(image)
        num_bytes = path.stat().st_size
        if num_bytes > MAX_BYTES:
            raise ImageError(Reason.IMAGE_TOO_LARGE, f"{num_bytes} bytes; the limit is {MAX_BYTES}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(Reason.IMAGE_MISSING, f"no file {_quote(image.name)}") from error
    except OSError as error:
        raise ImageError(Reason.IMAGE_UNREADABLE, f"{_quote(image.name)}: {error.strerror or error}") from error
    return _validate(data, path, image)


def _read_member(member: ArchiveMember) -> bytes:
    name = (member.path or PurePath(member.name)).name
    try:
        archive = open_archive(member.archive)
        found = archive.find(member.name)
        if found is None:
            raise ImageError(Reason.IMAGE_MISSING, f"no file {_quote(name)} in {member.archive.name}")
        if found.num_bytes > MAX_BYTES:  # before anything is decompressed
            raise ImageError(Reason.IMAGE_TOO_LARGE, f"{found.num_bytes} bytes; the limit is {MAX_BYTES}")
        return archive.read(found)
    except FileNotFoundError as error:
        raise ImageError(Reason.IMAGE_MISSING, f"no archive {member.archive.name}") from error
    except (OSError, DataError) as error:
        detail = getattr(error, "strerror", None) or str(error).replace(str(member.archive), member.archive.name)
        raise ImageError(Reason.IMAGE_UNREADABLE, f"{_quote(name)} {detail}"[:300]) from error


def _validate(data: bytes, found: PurePath | None = None, expected: PurePath | None = None) -> LoadedImage:
    """Validate an image that was found at one path and expected at another; both are None for bytes of a record."""
    notes: tuple[str, ...] = ()
    try:
        if is_heif(data[:HEAD_BYTES]):
            data, notes = _convert_heif(data), ("converted_from_heif",)
        info = probe_image(data)
    except ImageError as error:
        if found is None:
            raise
        raise ImageError(error.reason, f"{found.name}: {error.detail}") from error
    if found is None or expected is None:
        return LoadedImage(info, data, notes)
    if found.suffix.lower() != expected.suffix.lower():
        return LoadedImage(info, data, ("found_by_other_extension", *notes))
    parts = zip(reversed(found.parts), reversed(expected.parts), strict=False)
    if any(one != other and one.casefold() == other.casefold() for one, other in parts):
        notes = ("found_by_other_case", *notes)
    actual = "JPEG" if info.format == "MPO" else info.format
    is_expected = "converted_from_heif" in notes or actual == _FORMAT_OF_SUFFIX.get(found.suffix.lower(), actual)
    return LoadedImage(info, data, notes if is_expected else (*notes, "wrong_extension"))


def _convert_heif(data: bytes) -> bytes:
    """Convert a HEIC or HEIF image to PNG, so that the machines that train need no further package."""
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError(Reason.IMAGE_UNREADABLE, _describe_unknown(data)) from error
    pillow_heif.register_heif_opener()
    stream = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=["HEIF"])
            _check_size(image.height, image.width)
            ImageOps.exif_transpose(image, in_place=True)
            image.save(stream, "PNG", compress_level=1)
    except ImageError:
        raise
    except Exception as error:  # libheif raises several types of exceptions on damaged bytes
        detail = f"a HEIC/HEIF image: {type(error).__name__}: {error}"[:200]
        raise ImageError(Reason.IMAGE_UNREADABLE, detail) from error
    return stream.getvalue()


def _describe_unknown(data: bytes) -> str:
    """Describe bytes that are not an image that can be decoded."""
    head = data[:HEAD_BYTES]
    if is_heif(head):
        return f"a HEIC/HEIF image, which needs the package pillow-heif: {HEIF_COMMAND}"
    kind = describe_file_kind(head)
    if kind is not None:
        return f"{kind}, not an image" if "not" not in kind else kind
    text = head[:40].decode("ascii", "replace")
    if text.isprintable() and text.isascii():
        return f"text that begins with {text!r}, not an image"
    return f"none of {', '.join(FORMATS)}"


def _find_other_case(path: Path) -> Path | None:
    """Return the only file whose path differs from that of the missing `path` in case only; None if there is none."""
    folder, missing = path, []
    while not os.path.isdir(folder) and folder.parent != folder:  # noqa: PTH112  (Path.is_dir raises for long names)
        missing.append(folder.name)
        folder = folder.parent
    for name in reversed(missing):
        names = _names_by_folded_name(folder, folder_state(folder)).get(name.casefold(), ())
        # `resolve_inside` has checked the original path only; a link could lead outside the image root.
        if len(names) != 1 or (folder / names[0]).is_symlink():
            return None
        folder = folder / names[0]
    return folder if folder.is_file() else None


@lru_cache(maxsize=2)  # the images of a dataset are often in one folder of half a million names
def _names_by_folded_name(folder: Path, state: int) -> dict[str, tuple[str, ...]]:
    """Map the case-folded names in a folder to the names; `state` changes with the content of the folder."""
    names: dict[str, tuple[str, ...]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                folded = entry.name.casefold()
                names[folded] = (*names.get(folded, ()), entry.name)
    except OSError:  # a folder that may not be listed, or a file
        return {}
    return names


def _find_other_extension(image: Path) -> Path:
    """Return the only file whose path differs from that of the missing `image` in its image extension."""
    candidates = []
    if image.suffix.lower() in _FORMAT_OF_SUFFIX:
        others = [image.with_suffix(suffix) for suffix in _FORMAT_OF_SUFFIX]
        # `resolve_inside` has checked the original path only; a link could lead outside the image root.
        candidates = [path for path in others if path.is_file() and not path.is_symlink()]
    if len(candidates) != 1:
        detail = f"no file {_quote(image.name)} in {_quote(image.parent.name)}"
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
