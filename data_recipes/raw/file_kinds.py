"""Names what a file is by its first bytes, for files that are not what was expected.

A download often leaves another file under the expected name: a pointer of git-lfs, the HTML page of a sign-in, an
archive.
"""

_PREFIXES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer, not the file"),
    (b"\x1f\x8b", "gzip data"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ\0", "xz data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"PK\x07\x08", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"%PDF-", "a PDF document"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (b"ID3", "MP3 sound"),
    (b"OggS", "Ogg sound or video"),
    (b"fLaC", "FLAC sound"),
    (b"8BPS", "a Photoshop document"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"ARROW1", "an Arrow file"),
)
_RIFF_KINDS = {b"WAVE": "WAV sound", b"AVI ": "an AVI video"}
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_HTML_STARTS = (b"<!doctype html", b"<html", b"<head", b"<body", b"<title", b"<script")
HEAD_BYTES = 512
"""Number of first bytes that are sufficient for `describe_file_kind`."""


def describe_file_kind(head: bytes) -> str | None:
    """Describe what a file is by its first `HEAD_BYTES` bytes.

    Returns:
        A noun phrase such as "an HTML page", or None for what may be expected of a file with data: text, JSON, parquet,
        an image that Pillow reads, or an unknown kind.
    """
    if not head:
        return "empty"
    for prefix, kind in _PREFIXES:
        if head.startswith(prefix):
            return kind
    if head[:4] == b"RIFF":
        return _RIFF_KINDS.get(head[8:12])
    if is_heif(head):
        return "a HEIC/HEIF image"
    if head[4:8] == b"ftyp" and not _brands(head) & _AVIF_BRANDS:
        return "an MP4 or QuickTime video"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if len(head) >= 16 and not head.strip(b"\0"):
        return "filled with zero bytes, as by an interrupted download"
    return _describe_markup(head.removeprefix(b"\xef\xbb\xbf").lstrip()[:HEAD_BYTES].lower())


def is_heif(head: bytes) -> bool:
    """Return whether the first bytes are those of a HEIC or HEIF image. AVIF, which Pillow reads, is not one."""
    return head[4:8] == b"ftyp" and bool(_brands(head) & _HEIF_BRANDS) and not _brands(head) & _AVIF_BRANDS


def _brands(head: bytes) -> set[bytes]:
    """Return the brands of an ISO media file: the major one and the compatible ones."""
    end = min(len(head), int.from_bytes(head[:4], "big"))
    return {head[8:12], *(head[start : start + 4] for start in range(16, end - 3, 4))}


def _describe_markup(text: bytes) -> str | None:
    if text.startswith(_HTML_STARTS):
        return "an HTML page"
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "an SVG drawing"
    if text.startswith(b"<?xml"):
        return "an HTML page" if b"<html" in text else "an XML document"
    return None
