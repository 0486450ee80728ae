"""Folders on disk that are complete or absent, whoever is killed and whatever fails.

Owns: the lock that keeps two programs apart, getting files safely onto the disk, the swap of a new folder for an old.
Leaves: what is in the folders to `reader.py`, `writing/` and `local_copy.py`.
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
def only_one(path: Path) -> Iterator[None]:
    """Hold the lock of the store `path`: two programs that write one store would spoil each other's work.

    Raises:
        DataError: another program holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with lock.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"another prepare is writing {path}; wait for it, or use another --stores.") from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                print(f"{path.parent} has no file locks: make sure that no other prepare writes {path}.")
            if not _is_file(lock, handle.fileno()):
                continue  # its last holder removed it after we had opened it: what we hold locks nobody out
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sync(folder: Path) -> None:
    """Force every file below `folder`, and the folders, onto the disk. A full disk shows here at the latest.

    Raises:
        OSError: the disk is full or failing.
    """
    for current, _, names in os.walk(folder):
        for path in [*(Path(current, name) for name in names), Path(current)]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def swap_in(partial: Path, path: Path) -> None:
    """Rename, the store that was there stepping aside first: at any moment `path` is complete or absent."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
