"""Finds files of a raw folder that are still in the archives that their publisher ships.

An archive in a folder stands for what unpacking it there would give: `gqa/images.zip` for `gqa/images/`, whether its
members begin with `images/` or not, and `vg/images.zip` for `vg/VG_100K/` if it has such a folder. A folder that wraps
all members is ignored. Archives are consulted only where the folder does not exist. Each use is printed once.
"""

import multiprocessing
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePath

from data_recipes.raw.archive_members import Member
from data_recipes.raw.archives import Archive, cache_folder, detect_type, open_archive, read_first_name
from data_recipes.raw.split_files import UNREADABLE_TYPES, ArchiveFile, has_archive_name, list_archives
from data_recipes.schema.sample import ArchiveMember, DataError

_RECENT_S = 2.0  # a folder that has changed so recently may change again without another modification time
_MAX_FILE_BYTES = 256 << 20

_printed: set[str] = set()
_unreadable: set[tuple[Path, int]] = set()  # archives that are not named for a missing folder, with `folder_state`


def find_member(path: Path, root: Path, other_suffixes: Sequence[str] = ()) -> ArchiveMember | None:
    """Return the member of an archive that stands for a file, or None if no archive does.

    Args:
        path: expected path of the file.
        root: the image root. An archive that is a symbolic link out of it is not read.
        other_suffixes: file extensions that may replace that of `path`, if exactly one of them exists.

    Raises:
        DataError: an archive with the name of the expected folder cannot be read, or is a link out of the root.
        OSError: an archive or the cache folder cannot be accessed.
    """
    folder, missing = _split_existing(path)
    if len(missing) == 1:
        if not _sources(str(folder), folder_state(folder), "", path.suffix.lower()):
            _print_unused_archives(str(folder), str(root))
            return None
        if os.path.lexists(path):
            return None
    searched, suffixes = [], other_suffixes if path.suffix.lower() in other_suffixes else ()
    member = None
    for archive, names in _search(folder, missing, is_folder=False, root=root):
        searched.append((archive, names))
        member = _first(archive.find(name) for name in names)
        if member is not None:
            break
    else:
        for archive, names in searched:
            member = _first(_find_other_suffix(archive, name, suffixes) for name in names)
            if member is not None:
                break
    if member is None:
        return None
    _print_use(archive, folder, missing)
    return ArchiveMember(archive.file.path, member.name, path)


def has_folder(folder: Path) -> bool:
    """Return whether a folder exists, or an archive stands for it."""
    if folder.is_dir():
        return True
    existing, missing = _split_existing(folder)
    for archive, names in _search(existing, missing, is_folder=True):
        if any(archive.has_folder(name) if name else archive.num_members for name in names):
            return True
    return False


def list_files(folder: Path, suffix: str) -> list[str]:
    """Return the sorted names of the files in a folder, or in the archive that stands for it, with this suffix."""
    if folder.is_dir():
        return sorted(path.name for path in folder.glob(f"*{suffix}"))
    existing, missing = _split_existing(folder)
    for archive, candidates in _search(existing, missing, is_folder=True):
        for candidate in candidates:
            names = [name for name in archive.list_folder(candidate) if name.endswith(suffix)]
            if names:
                _print_use(archive, existing, [*missing, ""])
                return names
    return []


def read_file(path: Path) -> bytes:
    """Return the content of a small file, which may be in an archive.

    Raises:
        OSError: it does not exist, is larger than 256 MiB, or cannot be read.
    """
    member = None if path.exists() else find_member(path, path.parent)
    if member is None:
        return path.read_bytes()
    archive = open_archive(member.archive)
    found = archive.find(member.name)
    if found is None or found.num_bytes > _MAX_FILE_BYTES:
        raise OSError(f"{path.name}: larger than {_MAX_FILE_BYTES} bytes")
    return archive.read(found)


def locate_file(path: Path) -> Path:
    """Return the path of a file of any size. If it is in an archive, it is copied to the cache folder once.

    The result has the same name. If the file does not exist, `path` is returned.

    Raises:
        DataError: an archive cannot be read, or there is no space for the copy.
        OSError: an archive or the cache folder cannot be accessed.
    """
    member = None if path.exists() else find_member(path, path.parent)
    if member is None:
        return path
    archive = open_archive(member.archive)
    found = archive.find(member.name)
    if found is None:
        return path
    target = cache_folder() / f"{archive.index_name}.files" / member.name
    if target.is_file() and target.stat().st_size == found.num_bytes:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < found.num_bytes:
        raise DataError(
            f"{member.archive}: {member.name} has {found.num_bytes:,} bytes, and {target.parent} has {free:,} free. "
            "Free some space, or unpack the archive."
        )
    partial = target.with_name(f".{target.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            for chunk in archive.iter_content(found):
                stream.write(chunk)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


# ------------------------------------------------------------------------------------------------- searching


def _split_existing(path: Path) -> tuple[Path, list[str]]:
    """Return the deepest folder above `path` that exists, and the rest of the path, at least its last part."""
    folder, missing = path.parent, [path.name]
    while not os.path.isdir(folder) and folder.parent != folder:  # noqa: PTH112  (Path.is_dir raises for long names)
        missing.insert(0, folder.name)
        folder = folder.parent
    return folder, missing


def _search(
    folder: Path, missing: list[str], is_folder: bool, root: Path | None = None
) -> Iterator[tuple[Archive, list[str]]]:
    """Yield the archives in `folder` that may stand for the missing path, with the names that it may have in them."""
    first = missing[0] if is_folder or len(missing) > 1 else ""
    suffix = "" if is_folder else PurePath(missing[-1]).suffix.lower()
    state = folder_state(folder)
    for file, is_named in _sources(str(folder), state, first, suffix):
        if (file.path, state) in _unreadable:
            continue
        if root is not None and _is_link_outside(file, folder, root):
            problem = f"{file.path} is a symbolic link that leaves the image root"
            if is_named:
                raise DataError(f"{problem}; make it a hard link, or make the root itself the link.")
            _print_once(f"{problem}; it is not read")
            continue
        try:
            archive = open_archive(file.path)
        except DataError as error:
            if is_named:
                raise
            _unreadable.add((file.path, state))
            _print_once(f"not read: {error}")
            continue
        top = archive.top.split("/") if archive.top else []
        tails = [missing, missing[1:]] if is_named else [missing]
        yield archive, ["/".join([*top[:depth], *tail]) for tail in tails for depth in range(len(top) + 1)]


@lru_cache(maxsize=4096)
def _sources(folder: str, state: int, first: str, suffix: str) -> tuple[tuple[ArchiveFile, bool], ...]:
    """List the archives in a folder that may stand for a missing path, those with the name of its first folder first.

    The name of an archive may end in a number. A compressed tar archive of another name is listed only if its first
    file shows that it may have the path, or if it is one of several numbered ones, because decompressing it takes time
    and space.

    Args:
        folder: the existing folder.
        state: changes with the content of the folder.
        first: the missing folder in it; empty if a file in `folder` itself is missing.
        suffix: file extension of the missing file in lower case; empty for a folder.

    Raises:
        DataError: only an archive of a type that is not read has the name of the folder.
    """
    named, others = [], []
    archives = _archives_in(folder, state)
    series = Counter(_without_number(file.stem) for file, _, _ in archives)
    for file, archive_type, first_name in archives:
        name = PurePath(first_name)
        if first and first.casefold() in (file.stem.casefold(), _without_number(file.stem).casefold()):
            named.append((file, True))
        elif archive_type in ("zip", "tar"):
            others.append((file, False))
        elif first and len(name.parts) > 1:
            if name.parts[0] == first or series[_without_number(file.stem)] > 1:
                others.append((file, False))
        elif not first and len(name.parts) == 1 and name.suffix.lower() == suffix != ".json":
            others.append((file, False))
    if first and not named:
        for extension in UNREADABLE_TYPES:
            path = Path(folder, first + extension)
            if os.path.exists(path):  # noqa: PTH110  (Path.exists raises for long names)
                raise DataError(f"{path}: {extension} archives are not read; unpack it to {Path(folder, first)}.")
    return (*named, *others)


@lru_cache(maxsize=256)
def _archives_in(folder: str, state: int) -> tuple[tuple[ArchiveFile, str, str], ...]:
    """List the archives in a folder with their types, and for compressed tar archives the name of the first file."""
    try:
        files = list_archives(Path(folder))
    except PermissionError:  # a folder that may be entered and not listed
        return ()
    archives = []
    for file in files:
        archive_type = detect_type(file)
        if archive_type or has_archive_name(file.path):
            is_compressed = archive_type not in ("zip", "tar", "")
            archives.append((file, archive_type, read_first_name(file, archive_type) if is_compressed else ""))
    return tuple(archives)


def _without_number(stem: str) -> str:
    """Return the name of an archive without the number of one of several: `images` of `images_11`."""
    return re.sub(r"[._-]?\d+$", "", stem)


def folder_state(folder: Path) -> int:
    """Return a number that changes with the content of a folder, for caches of what is in it.

    Raises:
        OSError: the folder does not exist.
    """
    modified = folder.stat().st_mtime_ns
    return modified if time.time_ns() - modified > _RECENT_S * 1e9 else time.monotonic_ns()


def _first(members: Iterable[Member | None]) -> Member | None:
    return next((member for member in members if member is not None), None)


def _find_other_suffix(archive: Archive, name: str, suffixes: Sequence[str]) -> Member | None:
    """Return the only member whose name differs in its file extension, which is one of `suffixes`."""
    stem = name.removesuffix(PurePath(name).suffix)
    found = {archive.find(stem + suffix) for suffix in suffixes} - {None}
    return found.pop() if len(found) == 1 else None


# ------------------------------------------------------------------------------------------------- links


def is_inside(real_path: str, real_root: str) -> bool:
    """Return whether a resolved path is a resolved folder or below it.

    If the folder is in a snapshot of a Hugging Face cache, all of its files are links to the `blobs` of the same
    repository, which count as inside.
    """
    roots = [real_root, *_blob_folder(real_root)]
    return any(real_path == root or real_path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


@lru_cache(maxsize=1024)
def _blob_folder(real_root: str) -> list[str]:
    """Return the `blobs` of `.../datasets--ORG--NAME/snapshots/REVISION/...`, or an empty list."""
    for folder in Path(real_root).parents:
        repository = folder.parent
        if folder.name == "snapshots" and repository.name.startswith(("datasets--", "models--", "spaces--")):
            return [str(repository / "blobs")]
    return []


@lru_cache(maxsize=1024)
def _is_link_outside(file: ArchiveFile, folder: Path, root: Path) -> bool:
    links = [part for part in file.parts if part.is_symlink()]
    if not links:
        return False
    real_folder, real_root = os.path.realpath(folder), os.path.realpath(root)
    base = real_folder if is_inside(real_root, real_folder) else real_root  # the root itself may be packed
    return not all(is_inside(os.path.realpath(link), base) for link in links)


# ------------------------------------------------------------------------------------------------- messages


def _print_use(archive: Archive, folder: Path, missing: list[str]) -> None:
    expected = folder / missing[0] if len(missing) > 1 else folder
    _print_once(f"{archive.file.path}: read in place of {expected}{os.sep} ({archive.num_members:,} files)")


@lru_cache(maxsize=4096)
def _print_unused_archives(folder: str, root: str) -> None:
    """Print the archives that are not read because the folder that they stand for exists."""
    folders = [Path(folder), *Path(folder).parents]
    if Path(root) not in folders:
        return
    for current in folders[: folders.index(Path(root)) + 1]:
        with suppress(OSError):
            for file in list_archives(current.parent) if current.name else ():
                if file.stem.casefold() == current.name.casefold():
                    _print_once(f"{current}{os.sep}: the folder is read, not {file.path.name} beside it")


def _print_once(text: str) -> None:
    """Print a line, unless this process has printed it before. Workers print nothing, because the program does."""
    if text not in _printed and multiprocessing.parent_process() is None:
        _printed.add(text)
        print(text, flush=True)
