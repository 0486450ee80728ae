"""Finds the archives in a folder, and reads archives that are split into several files as one.

Publishers split archives in two ways. The parts `images.zip.001`, `images.tar.gz.part_aa` or `part_aa` are the pieces
of one file. The parts `images.z01`, ..., `images.zip` are the disks of one zip archive, whose directory counts from the
start of each disk.
"""

import io
import os
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_recipes.schema.sample import DataError

_TYPES = r"\.(?:zip|tar|tar\.gz|tgz|tar\.bz2|tbz2?|tar\.xz|txz)"
_ARCHIVE = re.compile(rf"(?P<stem>.+?){_TYPES}", re.IGNORECASE)
_PART = re.compile(rf"(?P<stem>.+?){_TYPES}[._-]?(?:part[._-]?)?(?P<number>\d{{1,4}}|[a-z]{{2,3}})", re.IGNORECASE)
_PART_WITHOUT_TYPE = re.compile(r"(?P<stem>.*?)[._-]?part[._-]?(?P<number>\d{1,4}|[a-z]{2,3})", re.IGNORECASE)
# Checked first, because an image folder may have half a million names.
_MAY_BE_ARCHIVE = re.compile(r"\.(?:zip|tar|tgz|tbz|txz)|part", re.IGNORECASE)
_DISK = re.compile(r"(?P<stem>.+)\.z(?P<number>\d{2,3})", re.IGNORECASE)
UNREADABLE_TYPES = (".7z", ".rar", ".tar.zst", ".tar.lz4")
"""Extensions of archives that are not read."""


@dataclass(frozen=True)
class ArchiveFile:
    """An archive on the disk.

    Attributes:
        path: the file; of a split archive its first part, or `images.zip` of the disks `images.z01`, ....
        stem: name of the archive without its extension.
        parts: all files, in the order of their content.
        has_disks: whether the parts are the disks of one zip archive.
        missing_part: a description of a missing part; empty if no gap is known.
    """

    path: Path
    stem: str
    parts: tuple[Path, ...]
    has_disks: bool = False
    missing_part: str = ""


def list_archives(folder: Path) -> list[ArchiveFile]:
    """Return the archives directly in a folder by their names, sorted by path; split archives are one each.

    A file without an extension may be a part by its name and no archive by its content.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if _MAY_BE_ARCHIVE.search(entry.name))
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    archives = []
    for name in names:
        if match := _ARCHIVE.fullmatch(name):
            archives.append(_with_disks(folder, name, match["stem"]))
        elif (match := _PART.fullmatch(name)) or (match := _PART_WITHOUT_TYPE.fullmatch(name)):
            start = match.start("number")
            groups.setdefault((match["stem"], name[:start]), []).append((_part_number(name[start:]), name))
    for (stem, prefix), parts in groups.items():
        if min(parts)[0] <= 1:  # without its first part, it is another file, such as `images.zip.bak`
            archives.append(_join_parts(folder, stem, prefix, sorted(parts)))
    return sorted(archives, key=lambda archive: archive.path)


def has_archive_name(path: Path) -> bool:
    """Return whether a file is an archive, or a part of one, by its extension."""
    return bool(_ARCHIVE.fullmatch(path.name) or _PART.fullmatch(path.name))


def find_archive(path: Path) -> ArchiveFile:
    """Return the archive whose `ArchiveFile.path` is this path, with its other parts."""
    name = path.name
    if match := _ARCHIVE.fullmatch(name):
        return _with_disks(path.parent, name, match["stem"])
    if _PART.fullmatch(name) or _PART_WITHOUT_TYPE.fullmatch(name):
        for archive in list_archives(path.parent):
            if archive.path == path:
                return archive
    return ArchiveFile(path, path.stem, (path,))


def _with_disks(folder: Path, name: str, stem: str) -> ArchiveFile:
    """Return the archive with the disks `stem.z01`, ... before it, if it has any."""
    path = folder / name
    if not name.lower().endswith(".zip") or not any((folder / f"{stem}.{z}01").exists() for z in "zZ"):
        return ArchiveFile(path, stem, (path,))
    disks = []
    for other in folder.iterdir():
        match = _DISK.fullmatch(other.name)
        if match and match["stem"] == stem:
            disks.append((int(match["number"]), other))
    disks.sort()
    gap = next((number for number, (actual, _) in enumerate(disks, 1) if actual != number), None)
    missing = "" if gap is None else f"{stem}.z{gap:02d}"
    return ArchiveFile(path, stem, (*(disk for _, disk in disks), path), True, missing)


def _join_parts(folder: Path, stem: str, prefix: str, parts: list[tuple[int, str]]) -> ArchiveFile:
    paths = tuple(folder / name for _, name in parts)
    first = parts[0][0]
    gap = next((number for number, (actual, _) in enumerate(parts, first) if actual != number), None)
    missing = "" if gap is None else f"a part between {parts[gap - first - 1][1]} and {parts[gap - first][1]}"
    return ArchiveFile(paths[0], stem.rstrip("._-"), paths, False, missing)


def _part_number(text: str) -> int:
    """Return the number of a part: of `aa` 0, of `ab` 1, of `003` 3."""
    if text.isdigit():
        return int(text)
    number = 0
    for letter in text.lower():
        number = 26 * number + ord(letter) - ord("a")
    return number


class PartsFile(io.RawIOBase):
    """The parts of a file as one file for reading. `pread` has no position, so it may be used after a fork.

    Args:
        parts: the files in order.

    Raises:
        OSError: a file cannot be opened.
    """

    def __init__(self, parts: Iterable[Path]) -> None:
        super().__init__()
        self._descriptors: list[int] = []
        try:
            for part in parts:
                self._descriptors.append(os.open(part, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self.close()
            raise
        sizes = [os.fstat(descriptor).st_size for descriptor in self._descriptors]
        self.starts = [0, *accumulate(sizes)][:-1]
        self.size = sum(sizes)
        self._position = 0

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Return up to `num_bytes` bytes from `offset`; fewer at the end of the last part only.

        Raises:
            OSError: the read failed.
        """
        pieces = []
        end = min(self.size, offset + num_bytes)
        while offset < end:
            number = bisect_right(self.starts, offset) - 1
            piece = os.pread(self._descriptors[number], end - offset, offset - self.starts[number])
            if not piece:
                raise OSError("a part of the archive has become shorter")
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.pread(len(view), self._position)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
        super().close()


def require_all_parts(archive: ArchiveFile) -> None:
    """Check that no part is known to be missing.

    Raises:
        DataError: a part is missing.
    """
    if archive.missing_part:
        raise DataError(f"{archive.path}: {archive.missing_part} is missing; put all parts of the archive beside it.")
