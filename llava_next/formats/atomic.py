"""Directories that are complete or absent.

A directory is written under a temporary name and renamed when all of it is on the disk, so that neither an interrupted
write nor a power failure leaves a directory that looks complete.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of a directory that is being written."""

REMOVED = ".removed"
"""Suffix of a directory that is being deleted."""


@contextmanager
def atomic_directory(target: Path | None, attachments: Sequence[Path] = ()) -> Iterator[Path | None]:
    """Context manager that yields an empty directory, syncs its content, and renames it to `target` on success.

    An existing `target` is replaced. If the body raises or the disk fails, `target` is unchanged and nothing else
    remains.

    Args:
        target: the final path; None on ranks that write nothing, which receive None.
        attachments: files that are copied into the directory after the body.

    Raises:
        OSError: the file system fails.
    """
    if target is None:
        yield None
        return
    partial = partial_path(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in attachments:
            shutil.copyfile(path, partial / path.name)
        sync_tree(partial)
        replace_directory(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
    sync_path(target.parent)


def retire_directory(target: Path) -> Path:
    """Renames a directory before it is deleted, so that a partly deleted one does not look complete.

    Returns:
        The new path.
    """
    retired = target.with_name(target.name + REMOVED)
    shutil.rmtree(retired, ignore_errors=True)  # left by an interrupted deletion
    target.rename(retired)
    return retired


def sync_tree(directory: Path) -> None:
    """Writes all files and directories below a directory, and itself, to the disk (fsync).

    Raises:
        OSError: the disk is full or fails.
    """
    for current, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync_path(Path(current, name))
        sync_path(Path(current))


def sync_path(path: Path) -> None:
    """Writes a file, or the entries of a directory, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
