"""Durable and atomic operations on files and folders, and the lock of a store.

After a crash, a folder that is published by `replace_folder` is either complete or absent.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_recipes.schema.sample import DataError


@contextmanager
def exclusive_lock(path: Path, option: str = "--stores") -> Iterator[None]:
    """Hold the lock of the store at `path`, so that no other program writes it at the same time.

    On file systems without locks, a warning is printed instead.

    Args:
        path: the folder or file that is written.
        option: of the command line, which the message names.

    Raises:
        DataError: another program holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with lock.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"another process is writing {path}; wait for it to finish, or use another {option}."
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                print(f"{path.parent} does not support file locks: make sure that no other process writes {path}.")
            if not _is_same_file(lock, handle.fileno()):
                continue  # the previous holder removed the file after it was opened here, so this lock has no effect
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Flush all files and folders below `folder` to the disk (fsync). A full disk is detected here at the latest.

    Raises:
        OSError: the disk is full or failing.
    """
    for current, _, names in os.walk(folder):
        for path in [*(Path(current, name) for name in names), Path(current)]:
            _fsync(path)


def replace_folder(partial: Path, path: Path) -> None:
    """Move `partial` to `path`, replacing an existing folder. At any moment, `path` is complete or absent."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    _fsync(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file in UTF-8 through a temporary file and a rename, so that readers never see a part of it."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
