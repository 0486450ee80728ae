"""Folders that several ranks write, complete or absent: synced, with the sha256 of every file, and renamed at the end.

    NAME.partial/sums_rank_NNN.json   sizes and sha256 of the files of rank N
    NAME/sums.json                    the same of all files; only a complete folder has it

`saver.py` writes the other files.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from llava_next.formats.atomic import PARTIAL, replace_directory, sync_path

_SUMS = "sums.json"
_CHUNK = 2**24  # bytes that are hashed and written at a time
FileSum = dict[str, Any]
"""Size (`bytes`) and `sha256` of a file."""


class HashedFile:
    """A file that is hashed while it is written, as `torch.save` writes it: in order, without seeking.

    The first error is kept and raised by `finish`, because torch's writer, which is C++, aborts the process if a write
    raises while it is being destroyed.

    Args:
        file: open for writing.
        on_progress: called after every chunk.
    """

    def __init__(self, file: IO[bytes], on_progress: Callable[[], None]) -> None:
        self._file, self._on_progress = file, on_progress
        self._hash, self._num_bytes = hashlib.sha256(), 0
        self._error: OSError | None = None

    @property
    def name(self) -> str:
        """The path of the file."""
        return str(self._file.name)

    def write(self, data: Any) -> int:
        """Writes an object with a buffer; returns its number of bytes."""
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view) if self._error is None else 0, _CHUNK):
                chunk = view[start : start + _CHUNK]
                self._hash.update(chunk)
                self._file.write(chunk)
                self._on_progress()
        except OSError as error:
            self._error = error
        self._num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Does nothing: `finish` writes all bytes to the disk."""

    def finish(self) -> FileSum:
        """Syncs the file and returns its sum.

        Raises:
            OSError: the disk is full or fails.
        """
        if self._error is not None:
            raise self._error
        self._file.flush()
        os.fsync(self._file.fileno())
        self._on_progress()
        return {"bytes": self._num_bytes, "sha256": self._hash.hexdigest()}


def final_path(partial: Path) -> Path:
    """Returns the path of the folder once it is complete."""
    return partial.with_name(partial.name.removesuffix(PARTIAL))


def is_complete(folder: Path) -> bool:
    """Whether the folder was committed. `corrupt_files` checks whether its files have changed since."""
    return (folder / _SUMS).is_file()


def write_hashed(
    path: Path, write: Callable[[HashedFile], None], *, on_progress: Callable[[], None] = lambda: None
) -> FileSum:
    """Creates a file that `write` fills, syncs it, and returns its sum without reading it.

    Raises:
        OSError: the disk is full or fails, or the folder is not writable.
    """
    with path.open("wb") as file:
        hashed = HashedFile(file, on_progress)
        write(hashed)
        return hashed.finish()


def seal(
    partial: Path,
    rank: int,
    sums: Mapping[str, FileSum] | None = None,
    *,
    on_progress: Callable[[], None] = lambda: None,
) -> None:
    """Syncs the files of this rank and writes their sizes and sha256.

    Args:
        partial: the folder.
        rank: this rank.
        sums: of files that `write_hashed` has written, by path in the folder; the others are read.
        on_progress: called after every chunk that is read.

    Raises:
        OSError: the disk fails.
    """
    all_sums = dict(sums or {})
    for path in _files(partial):
        name = path.relative_to(partial)
        if _owner(name) == rank and name.as_posix() not in all_sums:
            all_sums[name.as_posix()] = file_sum(path, sync=True, on_progress=on_progress)
    _write_synced(_rank_sums(partial, rank), json.dumps(all_sums))


def commit(partial: Path, num_ranks: int) -> Path:
    """Completes a folder that every rank has sealed, and renames it; an existing folder of that name is replaced.

    Returns:
        The path of the complete folder.

    Raises:
        OSError: a rank has not sealed its files, or the disk fails.
        ValueError: the files differ from those that the ranks have sealed.
    """
    if not is_complete(partial):
        sums: dict[str, Any] = {}
        for rank in range(num_ranks):
            sums |= json.loads(_rank_sums(partial, rank).read_text())
        files = _files(partial)
        different = {path.relative_to(partial).as_posix() for path in files} ^ set(sums)
        if different:
            raise ValueError(f"missing, or not sealed by any rank: {', '.join(sorted(different))}")
        unfinished = partial / f"{_SUMS}{PARTIAL}"
        _write_synced(unfinished, json.dumps(sums, indent=1, sort_keys=True) + "\n")
        unfinished.rename(partial / _SUMS)
    for rank in range(num_ranks):
        _rank_sums(partial, rank).unlink(missing_ok=True)
    for subfolder in sorted({path.parent for path in partial.rglob("*")}, reverse=True):  # the innermost first
        sync_path(subfolder)
    folder = final_path(partial)
    replace_directory(folder)  # one may exist from before the run went back to an earlier checkpoint
    return folder


def corrupt_files(folder: Path, rank: int = 0, num_ranks: int = 1) -> str:
    """Checks every `num_ranks`-th file, beginning with number `rank`, by reading all of its bytes.

    Returns:
        A description of the first file that is missing or has changed; empty if there is none.
    """
    try:
        sums = json.loads((folder / _SUMS).read_text())
        for name, expected in sorted(sums.items())[rank::num_ranks]:
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes, {expected['bytes']:,} were written"
            if file_sum(path) != expected:
                return f"{name} has other bytes than were written (sha256)"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def file_sum(path: Path, *, sync: bool = False, on_progress: Callable[[], None] = lambda: None) -> FileSum:
    """Returns a file's sum; with `sync`, the file is synced first. `on_progress` is called after every chunk."""
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            num_bytes += len(chunk)
            on_progress()
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def _files(partial: Path) -> list[Path]:
    return [path for path in sorted(partial.rglob("*")) if path.is_file() and not path.name.startswith("sums")]


def _owner(name: Path) -> int:
    """Returns the rank that writes a file: DeepSpeed's names contain it, all other files are written by rank 0."""
    match = re.search(r"(?:zero_pp_rank_|offloaded_tensors/rank)(\d+)", name.as_posix())
    return int(match.group(1)) if match else 0


def _rank_sums(partial: Path, rank: int) -> Path:
    return partial / f"sums_rank_{rank:03d}.json"


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
