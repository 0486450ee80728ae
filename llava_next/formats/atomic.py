"""Directories that are complete or absent.

A directory is written under a temporary name and renamed when it is complete, so that an interrupted write never leaves
a directory that looks complete.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of a directory that is being written."""

REMOVED = ".removed"
"""Suffix of a directory that is being deleted."""


@contextmanager
def atomic_directory(target: Path | None) -> Iterator[Path | None]:
    """Context manager that yields an empty directory and renames it to `target` on success.

    An existing `target` is replaced. If the body raises, `target` is unchanged.

    Args:
        target: the final path; None on ranks that write nothing, which receive None.
    """
    if target is None:
        yield None
        return
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    replace_directory(target)


def partial_path(target: Path) -> Path:
    """The temporary path of a directory that will be renamed to `target`."""
    return target.with_name(target.name + PARTIAL)


def replace_directory(target: Path) -> None:
    """Renames `partial_path(target)` to `target`, deletes a directory of that name, and syncs the parent directory.

    Raises:
        OSError: the file system fails.
    """
    if target.exists():
        shutil.rmtree(retire_directory(target))
    partial_path(target).rename(target)
    sync_directory(target.parent)


def retire_directory(target: Path) -> Path:
    """Renames a directory before it is deleted, so that a partly deleted one does not look complete.

    Returns:
        The new path.
    """
    retired = target.with_name(target.name + REMOVED)
    shutil.rmtree(retired, ignore_errors=True)  # left by an interrupted deletion
    target.rename(retired)
    return retired


def sync_directory(directory: Path) -> None:
    """Writes the entries of a directory to the disk (fsync)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
