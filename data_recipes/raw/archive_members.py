"""Lists the members of zip and tar archives one at a time, with the position of their content.

`zipfile` and `tarfile` keep an object for each member: 0.5 GiB for the 500,000 images of a dataset. The directory of a
zip archive is therefore parsed here; of `tarfile` only the parsing of headers is used.
"""

import posixpath
import shutil
import stat
import struct
import tarfile
import unicodedata
from collections.abc import Iterator
from typing import IO, BinaryIO, NamedTuple

from data_recipes.raw.split_files import PartsFile

STORED, DEFLATED, BZIP2 = 0, 8, 12
"""Compression methods of zip that are read. The content of a tar archive is `STORED`."""
ENCRYPTED, SPARSE = -1, -2
"""Values of `Member.method` for content that is not read."""

_END = struct.Struct("<4s4H2LH")
_END_ZIP64_LOCATOR = struct.Struct("<4sLQL")
_END_ZIP64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s4B4HL2L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_CHUNK_BYTES = 1 << 20
_MAX_ENTRY_BYTES = _ENTRY.size + 3 * 0xFFFF
_IGNORED_FOLDER = "__MACOSX/"  # macOS adds it, with a file of metadata for each file


class ArchiveDamagedError(Exception):
    """An archive is truncated or not an archive; the message says why."""


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        name: normalized path in the archive, see `normalize_name`.
        offset: position of the content in a tar archive, of the local header in a zip archive.
        num_stored: size in the archive in bytes.
        num_bytes: size of the file in bytes.
        method: the compression method, or `ENCRYPTED` or `SPARSE`.
        crc: checksum of the file; None in a tar archive, which has none.
        link_target: for a link in a tar archive, the name of the member that it refers to; else empty.
    """

    name: str
    offset: int
    num_stored: int
    num_bytes: int
    method: int
    crc: int | None
    link_target: str = ""


def normalize_name(name: str) -> str | None:
    """Return the path of a member with `/` between its parts and without `./`, in Unicode's composed form (NFC).

    Returns:
        The path, or None if it is absolute, contains `..`, or is empty. Such members are never read.
    """
    if name.startswith(("/", "\\")) or "\0" in name:
        return None
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts or ".." in parts or (len(parts[0]) == 2 and parts[0].endswith(":")):
        return None
    path = "/".join(parts)
    if not path.isascii():  # an archive in another encoding gives lone surrogates, which SQLite does not store
        path = unicodedata.normalize("NFC", path.encode("utf-8", "backslashreplace").decode("utf-8"))
    return path


# ------------------------------------------------------------------------------------------------------- zip


def iter_zip_members(file: PartsFile, has_disks: bool) -> Iterator[Member]:
    """Yield the files of a zip archive in the order of its central directory. Folders and links are left out.

    Args:
        file: the archive.
        has_disks: whether positions count from the start of a part.

    Raises:
        ArchiveDamagedError: the archive has no complete central directory.
        OSError: reading failed.
    """
    position, num_bytes, shift = _find_directory(file, has_disks)
    end = position + num_bytes
    buffer, at = b"", 0
    while at < len(buffer) or position < end:
        if len(buffer) - at < _MAX_ENTRY_BYTES and position < end:
            chunk = file.pread(min(_CHUNK_BYTES, end - position), position)
            buffer, at = buffer[at:] + chunk, 0
            position += len(chunk) if chunk else end
        if len(buffer) - at < _ENTRY.size or buffer[at : at + 4] != b"PK\x01\x02":
            raise ArchiveDamagedError("its central directory is damaged")
        fields = _ENTRY.unpack_from(buffer, at)
        name_start, extra_start = at + _ENTRY.size, at + _ENTRY.size + fields[12]
        at = extra_start + fields[13] + fields[14]
        raw_name, extra = buffer[name_start:extra_start], buffer[extra_start : extra_start + fields[13]]
        member = _parse_zip_entry(fields, raw_name, extra, file.starts if has_disks else None, shift)
        if member is not None:
            yield member


def _parse_zip_entry(
    fields: tuple[int, ...], raw_name: bytes, extra: bytes, disks: list[int] | None, shift: int
) -> Member | None:
    (_, _, system, _, _, flags, method, _, _, crc, num_stored, num_bytes, _, _, _, disk, _, attributes, offset) = fields
    name = normalize_name(_decode_zip_name(raw_name, bool(flags & 0x800)))
    is_link = system == 3 and stat.S_ISLNK(attributes >> 16)
    if name is None or is_link or raw_name.endswith((b"/", b"\\")) or name.startswith(_IGNORED_FOLDER):
        return None
    num_bytes, num_stored, offset, disk = _zip64_values(extra, num_bytes, num_stored, offset, disk)
    if disks is not None:
        if disk >= len(disks):
            raise ArchiveDamagedError(f"its directory names part {disk + 1} of {len(disks)}")
        offset += disks[disk]
    return Member(name, offset + shift, num_stored, num_bytes, ENCRYPTED if flags & 1 else method, crc)


def _decode_zip_name(raw: bytes, is_utf8: bool) -> str:
    if is_utf8:
        return raw.decode("utf-8", "surrogateescape")
    try:
        return raw.decode("utf-8")  # many programs write UTF-8 without saying so
    except UnicodeDecodeError:
        return raw.decode("cp437")


def _zip64_values(extra: bytes, num_bytes: int, num_stored: int, offset: int, disk: int) -> tuple[int, int, int, int]:
    """Replace the values that do not fit their fields by those of the zip64 extra field."""
    values = [(num_bytes, 0xFFFFFFFF, 8), (num_stored, 0xFFFFFFFF, 8), (offset, 0xFFFFFFFF, 8), (disk, 0xFFFF, 4)]
    if all(value != limit for value, limit, _ in values):
        return num_bytes, num_stored, offset, disk
    start = 0
    while start + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, start)
        if kind == 1:
            field, result = extra[start + 4 : start + 4 + length], []
            for value, limit, width in values:
                if value == limit and len(field) >= width:
                    value, field = int.from_bytes(field[:width], "little"), field[width:]
                result.append(value)
            return result[0], result[1], result[2], result[3]
        start += 4 + length
    return num_bytes, num_stored, offset, disk


def _find_directory(file: PartsFile, has_disks: bool) -> tuple[int, int, int]:
    """Return (position, size, shift) of the central directory; offsets in it are too small by `shift`."""
    tail_start = max(0, file.size - _END.size - 0xFFFF - _END_ZIP64_LOCATOR.size - _END_ZIP64.size)
    tail = file.pread(file.size - tail_start, tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + _END.size:
        raise ArchiveDamagedError("its central directory, which is at its end, is missing")
    _, _, disk, _, _, num_bytes, offset, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    locator_at = at - _END_ZIP64_LOCATOR.size
    if locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\x06\x07":
        _, end_disk, end_offset, _ = _END_ZIP64_LOCATOR.unpack_from(tail, locator_at)
        end = tail_start + locator_at - _END_ZIP64.size
        if has_disks:
            end = _start_of_disk(file, end_disk) + end_offset
        record = file.pread(_END_ZIP64.size, end)
        if len(record) < _END_ZIP64.size or record[:4] != b"PK\x06\x06":
            raise ArchiveDamagedError("its zip64 directory is damaged")
        _, _, _, _, _, disk, _, _, num_bytes, offset = _END_ZIP64.unpack(record)
    if has_disks:
        return _start_of_disk(file, disk) + offset, num_bytes, 0
    if disk not in (0, 0xFFFF):
        raise ArchiveDamagedError(f"it is the last of {disk + 1} parts, and the others are not beside it")
    shift = end - num_bytes - offset  # the size of data before the archive, as in a self-extracting one
    if shift < 0:
        raise ArchiveDamagedError("its central directory is not where its end says")
    return offset + shift, num_bytes, shift


def _start_of_disk(file: PartsFile, disk: int) -> int:
    if disk >= len(file.starts):
        raise ArchiveDamagedError(f"its end names part {disk + 1} of {len(file.starts)}")
    return file.starts[disk]


def zip_content_offset(header: bytes) -> int:
    """Return the size of a local header, after which the content of a member begins.

    Args:
        header: at least its first 30 bytes.

    Raises:
        ArchiveDamagedError: it is not a local header.
    """
    if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
        raise ArchiveDamagedError("there is no member where the directory says")
    *_, name_length, extra_length = _LOCAL.unpack_from(header)
    return int(_LOCAL.size + name_length + extra_length)


# ------------------------------------------------------------------------------------------------------- tar


def iter_tar_members(file: PartsFile) -> Iterator[Member]:
    """Yield the files and links of a tar archive in order, reading headers only.

    Raises:
        ArchiveDamagedError: the archive is truncated or damaged.
        OSError: reading failed.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", tarinfo=_StrictHeader) as tar:
            for info in _iter_headers(tar):
                member = _tar_member(info, info.offset_data)
                if member is not None:
                    yield member
    except tarfile.TarError as error:
        raise ArchiveDamagedError(str(error)) from error


def copy_tar_members(stream: IO[bytes], copy: BinaryIO) -> Iterator[Member]:
    """Yield the files and links of a tar archive in order, and append the content of the files to `copy`.

    Args:
        stream: the decompressed archive, read once from start to end.
        copy: receives the contents without headers; `Member.offset` is the position in it.

    Raises:
        ArchiveDamagedError: the archive is truncated or damaged.
        OSError: reading or writing failed.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|", encoding="utf-8", tarinfo=_StrictHeader) as tar:
            for info in _iter_headers(tar):
                member = _tar_member(info, copy.tell())
                if member is None:
                    continue
                content = None if member.link_target else tar.extractfile(info)
                if content is not None:
                    shutil.copyfileobj(content, copy, _CHUNK_BYTES)
                    member = member._replace(method=STORED)  # sparse files are filled in
                yield member
        while stream.read(_CHUNK_BYTES):  # to the checksum at the end
            pass
    except tarfile.TarError as error:
        raise ArchiveDamagedError(str(error)) from error


class _StrictHeader(tarfile.TarInfo):
    """A header whose damage is an error. `tarfile` takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if type(error).__name__ in ("EOFHeaderError", "EmptyHeaderError"):  # the end, with and without its mark
                raise
            raise tarfile.ReadError(f"a header is damaged: {error}") from error


def _iter_headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would keep every header
        yield info


def _tar_member(info: tarfile.TarInfo, offset: int) -> Member | None:
    name = normalize_name(info.name)
    if name is None or name.startswith(_IGNORED_FOLDER):
        return None
    if info.isreg():
        method = SPARSE if info.issparse() else STORED
        return Member(name, offset, info.size, info.size, method, None)
    if info.islnk() or info.issym():
        relative = info.linkname if info.islnk() else posixpath.join(posixpath.dirname(name), info.linkname)
        target = None if info.linkname.startswith("/") else normalize_name(posixpath.normpath(relative))
        return None if target is None else Member(name, 0, 0, 0, STORED, None, target)
    return None
