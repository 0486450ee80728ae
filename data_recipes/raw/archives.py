"""Reads files out of zip and tar archives where they are, in any order.

The members of an archive are listed once, in an SQLite file of the cache folder. It is shared by all processes and
later runs, so memory does not grow with the number of members. The content is read from the archive itself. A
compressed tar archive (tar.gz) has no random access, so its content is copied to the cache folder once, in one pass.

This module imports neither `datasets` nor numpy, so that the worker processes that use it stay small.
"""

import atexit
import bz2
import fcntl
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn
from urllib.parse import quote

from data_recipes.raw.archive_members import (
    BZIP2,
    DEFLATED,
    ENCRYPTED,
    SPARSE,
    STORED,
    ArchiveDamagedError,
    Member,
    copy_tar_members,
    iter_tar_members,
    iter_zip_members,
    normalize_name,
    zip_content_offset,
)
from data_recipes.raw.file_kinds import HEAD_BYTES, describe_file_kind
from data_recipes.raw.split_files import ArchiveFile, PartsFile, find_archive, require_all_parts
from data_recipes.schema.sample import ArchiveMember, DataError

_INDEX_VERSION = 1
_MAX_OPEN_ARCHIVES = 64  # each has a few open files, and a process can often open no more than 1024
_SIGNATURE_BYTES = 1 << 16
_LOCAL_HEADER_BYTES = 512  # more than most headers of a zip member; a longer one costs a second read
_PIECE_BYTES = 16 << 20
_MIN_FREE_BYTES = 256 << 20
_COLUMNS = "name, offset, num_stored, num_bytes, method, crc"
_COMPRESSED: dict[str, Callable[[Any], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError)

_cache_folder: Path | None = None


@contextmanager
def archives_cached_in(folder: Path) -> Iterator[None]:
    """Within the block, indexes and decompressed copies are in `folder`, which is created for the first of them.

    Elsewhere they are in a temporary folder, which is removed at the end of the process.
    """
    global _cache_folder
    before = _cache_folder
    _cache_folder = folder.absolute()
    try:
        yield
    finally:
        _cache_folder = before


def cache_folder() -> Path:
    """Return the folder of indexes and decompressed copies, which exists."""
    global _cache_folder
    if _cache_folder is None:
        _cache_folder = Path(tempfile.mkdtemp(prefix="llava_next_archives_"))
        atexit.register(_remove_folder_of, os.getpid(), _cache_folder)
    _cache_folder.mkdir(parents=True, exist_ok=True)
    return _cache_folder


def describe_copies() -> str:
    """Describe the copies in the cache folder, which take the most space of it; empty if there are none."""
    if _cache_folder is None or not _cache_folder.exists():
        return ""
    copies = [*_cache_folder.glob("*.content"), *_cache_folder.glob("*.files/**/*")]
    num_bytes = sum(path.stat().st_size for path in copies if path.is_file())
    size = _format_gib(num_bytes)
    return f"{_cache_folder}: {size} of copies from archives, no longer needed" if num_bytes else ""


def _remove_folder_of(process: int, folder: Path) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


class Archive:
    """An open archive with its index. Use `open_archive`.

    Attributes:
        file: the archive on the disk.
        index_name: identifies the archive and its content in the cache folder.
        num_members: number of files in it.
        top: the folder that contains all of its files, such as `data/images`; empty if there is none.
    """

    def __init__(self, file: ArchiveFile, is_zip: bool, index: Path, content: PartsFile) -> None:
        self.file = file
        self._is_zip = is_zip
        self._index = index
        self._content = content
        # The index never changes, so it needs no locks, which cluster file systems often do not support.
        address = f"file:{quote(str(index))}?mode=ro&immutable=1"
        self._db = sqlite3.connect(address, uri=True, check_same_thread=False)
        self._db.execute("PRAGMA cache_size=-2048")
        self.index_name = index.stem
        facts = dict(self._query("SELECT key, value FROM facts"))
        self.num_members = int(facts["num_members"])
        self.top = str(facts["top"])

    def find(self, name: str) -> Member | None:
        """Return the member with this name; else the only one whose name differs in case; else None.

        The last of several members with one name is returned, which is the one that remains after unpacking.
        """
        normalized = normalize_name(name)
        if normalized is None:
            return None
        rows = self._query(f"SELECT {_COLUMNS} FROM member WHERE name = ? ORDER BY rowid", normalized)
        exact = [row for row in rows if row[0] == normalized]
        if not exact and len({row[0] for row in rows}) != 1:
            return None
        return Member(*(exact or rows)[-1])

    def list_folder(self, folder: str) -> list[str]:
        """Return the names of the files that are directly in a folder, sorted."""
        prefix = f"{folder}/" if folder else ""
        names = (row[0].removeprefix(prefix) for row in self._rows_below(prefix, "") if row[0].startswith(prefix))
        return sorted({name for name in names if "/" not in name})

    def has_folder(self, folder: str) -> bool:
        """Return whether a file is below a folder, whose name may differ in case."""
        return bool(self._rows_below(f"{folder}/", "LIMIT 1"))

    def read(self, member: Member) -> bytes:
        """Return the content of a member. Check `Member.num_bytes` before: it is the size of the result.

        Raises:
            OSError: the archive is damaged at this member, or the member is encrypted or compressed by another method.
        """
        return b"".join(self.iter_content(member))

    def iter_content(self, member: Member) -> Iterator[bytes]:
        """Yield the content of a member in pieces; at most `Member.num_bytes` bytes, also if this size is false.

        Raises:
            OSError: see `read`. The checksum is compared after the last piece.
        """
        if member.method not in (STORED, DEFLATED, BZIP2):
            problems = {ENCRYPTED: "it is encrypted", SPARSE: "it is a sparse file"}
            problem = problems.get(member.method, f"zip's compression method {member.method} is not supported")
            raise OSError(f"cannot be read from {self.file.path.name}: {problem}; unpack the archive")
        num_bytes, crc = 0, 0
        try:
            for piece in _decompress(self._iter_stored(member), member.method):
                num_bytes += len(piece)
                crc = zlib.crc32(piece, crc)
                if num_bytes > member.num_bytes:
                    break
                yield piece
        except (ArchiveDamagedError, zlib.error, OSError, EOFError) as error:
            raise OSError(f"cannot be read from {self.file.path.name}: {error}") from error
        if num_bytes != member.num_bytes or (member.crc is not None and crc != member.crc):
            raise OSError(f"is damaged in {self.file.path.name}: size or checksum differ from the archive's directory")

    def close(self) -> None:
        """Close its files."""
        self._db.close()
        self._content.close()

    def _iter_stored(self, member: Member) -> Iterator[bytes]:
        """Yield the stored bytes of a member; an image is one piece, which is one read."""
        offset, remaining = member.offset, member.num_stored
        if self._is_zip:
            data = self._content.pread(_LOCAL_HEADER_BYTES + min(remaining, _PIECE_BYTES), offset)
            start = zip_content_offset(data)
            first = data[start : start + remaining]
            yield first
            offset, remaining = offset + start + len(first), remaining - len(first)
        while remaining > 0:
            piece = self._content.pread(min(remaining, _PIECE_BYTES), offset)
            if not piece:
                raise ArchiveDamagedError("it ends before the end of the member")
            yield piece
            offset, remaining = offset + len(piece), remaining - len(piece)

    def _rows_below(self, prefix: str, limit: str) -> list[tuple[str]]:
        if not prefix:
            return self._query("SELECT name FROM member")
        end = prefix[:-1] + chr(ord("/") + 1)
        return self._query(f"SELECT name FROM member WHERE name >= ? AND name < ? {limit}", prefix, end)

    def _query(self, statement: str, *values: str) -> list:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise OSError(f"{error} ({self._index}; remove it, and it is written again)") from error


def _decompress(stored: Iterator[bytes], method: int) -> Iterator[bytes]:
    """Decompress in pieces of bounded size, so that a small member with a false size cannot exhaust the memory."""
    if method == STORED:
        yield from stored
    elif method == DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        for piece in stored:
            rest = piece
            while rest:
                yield inflater.decompress(rest, _PIECE_BYTES)
                rest = inflater.unconsumed_tail
        yield inflater.flush()
    else:
        decompressor = bz2.BZ2Decompressor()
        for piece in stored:
            rest = piece
            while not decompressor.eof and (rest or not decompressor.needs_input):
                yield decompressor.decompress(rest, _PIECE_BYTES)
                rest = b""


# -------------------------------------------------------------------------------------------------- opening

_open_archives: dict[Path, tuple[tuple[int, ...], Archive]] = {}


def open_archive(path: Path) -> Archive:
    """Return the archive at `path`, which remains open in this process; its members are listed if they are not yet.

    Args:
        path: the file; of a split archive its `ArchiveFile.path`.

    Raises:
        DataError: it is damaged or incomplete, or there is no space for its decompressed copy.
        OSError: it cannot be read, or the cache folder cannot be written.
    """
    status = path.stat()
    # SQLite connections must not be used after a fork; a changed file has another index.
    state = (os.getpid(), status.st_ino, status.st_size, status.st_mtime_ns)
    known = _open_archives.pop(path, None)
    if known is not None and known[0] != state:
        known = None
    archive = _open(find_archive(path)) if known is None else known[1]
    _open_archives[path] = (state, archive)  # the last one is the most recently used
    while len(_open_archives) > _MAX_OPEN_ARCHIVES:
        process_state, oldest = _open_archives.pop(next(iter(_open_archives)))
        if process_state[0] == os.getpid():
            oldest.close()
    return archive


def member_size(member: ArchiveMember) -> int:
    """Return the size of a file in an archive in bytes; 0 if there is no such file."""
    found = open_archive(member.archive).find(member.name)
    return 0 if found is None else found.num_bytes


def detect_type(file: ArchiveFile) -> str:
    """Return the type of an archive by its first bytes: zip, tar, gzip, bzip2 or xz; empty if it is none of them.

    Names do not decide: DocVQA's train.tar.gz is a tar archive without compression.
    """
    with closing(PartsFile(file.parts[:1])) as parts:
        head = parts.pread(HEAD_BYTES, 0)
    types = ((b"PK", "zip"), (b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"))
    named = next((name for prefix, name in types if head.startswith(prefix)), "")
    is_old_tar = file.path.name.lower().endswith(".tar") and len(head) == HEAD_BYTES and not describe_file_kind(head)
    return named or ("tar" if head[257:262] == b"ustar" or is_old_tar else "")


def read_first_name(file: ArchiveFile, archive_type: str) -> str:
    """Return the name of the first file in a compressed tar archive, without reading on; empty if there is none."""
    try:
        with _decompressed(file, archive_type) as stream, Path(os.devnull).open("wb") as nowhere:
            for member in copy_tar_members(stream, nowhere):
                return member.name
    except (ArchiveDamagedError, OSError, *_DECOMPRESSION_ERRORS):
        pass
    return ""


def _open(file: ArchiveFile) -> Archive:
    require_all_parts(file)
    archive_type = detect_type(file)
    if not archive_type:
        _raise_wrong_kind(file)
    index = cache_folder() / f"{file.path.name[:80]}.{_signature(file)}.index"
    copy = index.with_suffix(".content") if archive_type in _COMPRESSED else None
    if not index.exists():
        with _build_lock(index):
            if not index.exists():
                _build(file, archive_type, index, copy)
    content = PartsFile(file.parts if copy is None else (copy,))
    return Archive(file, archive_type == "zip", index, content)


def _signature(file: ArchiveFile) -> str:
    """Hash what changes when an archive is replaced: sizes, times, and its first and last bytes."""
    status = [part.stat() for part in file.parts]
    facts = [[each.st_size, each.st_mtime_ns] for each in status]
    digest = hashlib.sha256(json.dumps([_INDEX_VERSION, facts]).encode())
    with closing(PartsFile(file.parts)) as parts:
        digest.update(parts.pread(_SIGNATURE_BYTES, 0))
        digest.update(parts.pread(_SIGNATURE_BYTES, max(0, parts.size - _SIGNATURE_BYTES)))
    return digest.hexdigest()[:16]


def _raise_wrong_kind(file: ArchiveFile) -> NoReturn:
    with closing(PartsFile(file.parts[:1])) as parts:
        kind = describe_file_kind(parts.pread(HEAD_BYTES, 0))
    raise DataError(f"{file.path} is {kind or 'neither a zip nor a tar archive'}; download it again.")


# ------------------------------------------------------------------------------------------------- building


def _build(file: ArchiveFile, archive_type: str, index: Path, copy: Path | None) -> None:
    """Write the index of an archive, and the copy of a compressed one. They appear complete or not at all."""
    writer = f"{os.uname().nodename}.{os.getpid()}"
    partial = index.with_name(f"{index.name}.{writer}.partial")
    partial_copy = None if copy is None else copy.with_name(f"{copy.name}.{writer}.partial")
    try:
        if partial_copy is not None:
            with partial_copy.open("wb") as target:
                _write_index(partial, _copy_members(file, archive_type, target))
        else:
            with closing(PartsFile(file.parts)) as parts:
                is_zip = archive_type == "zip"
                _write_index(partial, iter_zip_members(parts, file.has_disks) if is_zip else iter_tar_members(parts))
        if copy is not None and partial_copy is not None:
            print(f"{file.path}: decompressed to {copy} ({_format_gib(partial_copy.stat().st_size)})", flush=True)
            partial_copy.replace(copy)
        partial.replace(index)
    except ArchiveDamagedError as error:
        parts_hint = "" if len(file.parts) == 1 else ", with all of its parts"
        raise DataError(f"{file.path} is incomplete or damaged: {error}. Download it again{parts_hint}.") from error
    finally:
        for path in (partial, partial_copy):
            if path is not None:
                path.unlink(missing_ok=True)


def _copy_members(file: ArchiveFile, archive_type: str, target: BinaryIO) -> Iterator[Member]:
    folder = cache_folder()
    print(f"{file.path}: being decompressed once to {folder}, because it has no random access", flush=True)
    _require_space(file, folder, sum(part.stat().st_size for part in file.parts))
    num_checked = 0
    try:
        with _decompressed(file, archive_type) as stream:
            for member in copy_tar_members(stream, target):
                if target.tell() - num_checked >= _MIN_FREE_BYTES // 4:
                    num_checked = target.tell()
                    _require_space(file, folder, _MIN_FREE_BYTES)
                yield member
    except _DECOMPRESSION_ERRORS as error:
        raise ArchiveDamagedError(str(error) or type(error).__name__) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ArchiveDamagedError(str(error)) from error  # damaged gzip and bzip2 data are errors without a number


@contextmanager
def _decompressed(file: ArchiveFile, archive_type: str) -> Iterator[IO[bytes]]:
    """Open a compressed archive as a stream of its decompressed bytes."""
    with (
        closing(PartsFile(file.parts)) as parts,
        io.BufferedReader(parts, 1 << 20) as buffered,
        _COMPRESSED[archive_type](buffered) as stream,
    ):
        yield stream


def _require_space(file: ArchiveFile, folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DataError(
            f"{file.path}: its decompressed copy needs at least {_format_gib(num_bytes)} in {folder}, which has "
            f"{_format_gib(free)}. Free some space, use another --stores, or unpack the archive."
        )


def _write_index(path: Path, members: Iterator[Member]) -> None:
    """Write the SQLite file of these members.

    Raises:
        OSError: the disk is full or failing.
    """
    path.unlink(missing_ok=True)
    top: list[str] | None = None

    def files(db: sqlite3.Connection) -> Iterator[tuple[str, int, int, int, int, int | None]]:
        nonlocal top
        for member in members:
            folder = member.name.split("/")[:-1]
            top = folder if top is None else _common_start(top, folder)
            if member.link_target:
                db.execute("INSERT INTO link VALUES (?, ?)", (member.name, member.link_target))
            else:
                yield member[:6]

    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode=OFF")
            db.execute("PRAGMA synchronous=OFF")
            db.execute("BEGIN")
            db.execute(
                "CREATE TABLE member (name TEXT COLLATE NOCASE, offset INTEGER, num_stored INTEGER, num_bytes INTEGER, "
                "method INTEGER, crc INTEGER)"
            )
            db.execute("CREATE TABLE link (name TEXT, target TEXT)")
            db.execute("CREATE TABLE facts (key TEXT, value TEXT)")
            for row in files(db):
                db.execute("INSERT INTO member VALUES (?, ?, ?, ?, ?, ?)", row)
            db.execute("CREATE INDEX by_name ON member (name)")
            db.execute(
                "INSERT INTO member SELECT link.name, offset, num_stored, num_bytes, method, crc FROM link JOIN member "
                "ON member.name = link.target AND member.name = link.target COLLATE BINARY ORDER BY member.rowid"
            )
            (num_members,) = db.execute("SELECT COUNT(*) FROM member").fetchone()
            db.execute("INSERT INTO facts VALUES ('num_members', ?), ('top', ?)", (num_members, "/".join(top or [])))
            db.execute("COMMIT")
    except sqlite3.OperationalError as error:  # "database or disk is full", "disk I/O error"
        raise OSError(f"{error} ({path})") from error


def _common_start(first: list[str], second: list[str]) -> list[str]:
    if first == second:
        return first
    length = next((n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    return first[: min(len(first), len(second)) if length is None else length]


@contextmanager
def _build_lock(index: Path) -> Iterator[None]:
    """Wait until no other process builds this index. Without locks of the file system, two may build the same one."""
    with index.with_name(f".{index.name}.lock").open("w") as handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            for path in index.parent.glob(f"{glob.escape(index.stem)}.*.partial"):  # of a process that was killed
                path.unlink(missing_ok=True)
        yield


def _format_gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.1f} MiB"
