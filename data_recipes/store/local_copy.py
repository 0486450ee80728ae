"""Copies stores to a local disk, for training with stores on a busy network file system.

    <root>/<source>-<fingerprint>/           a complete copy; every preparation of a source has its own fingerprint
    <root>/<source>-<fingerprint>.partial/   an incomplete copy; its files are complete except for `*.unverified`

An interrupted copy is resumed, and every file is verified by its sha256 as read back from the disk.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_recipes.schema.denied_files import describe_error
from data_recipes.schema.sample import DataError
from data_recipes.store.durable import sync_folder
from data_recipes.store.reader import Store, read_manifest

_BLOCK_BYTES = 8 << 20
_NUM_THREADS = 4  # parallel streams have a higher throughput on network file systems


@dataclass(frozen=True)
class LocalCopy:
    """A store and the path of its copy.

    Attributes:
        source: path of the store.
        path: path of the copy.
        sizes: size in bytes of every file of the store.
        file_sha256: sha256 of the files that the manifest lists.
    """

    source: Path
    path: Path
    sizes: dict[str, int]
    file_sha256: dict[str, str]

    @classmethod
    def from_store(cls, source: Path, root: Path) -> "LocalCopy":
        """Describe the copy below `root` of the store at `source`; raises the errors of `Store.open`."""
        manifest = read_manifest(source)
        try:
            if manifest is None:
                raise FileNotFoundError
            files = manifest["files"]
            sizes = {name: int(file["bytes"]) for name, file in files.items()}
            sizes["manifest.json"] = (source / "manifest.json").stat().st_size
        except OSError as error:
            Store.open(source)
            raise DataError(f"the store at {source} cannot be read: {error}") from error
        file_sha256 = {name: str(file["sha256"]) for name, file in files.items()}
        return cls(source, root / f"{manifest['name']}-{manifest['fingerprint'][:16]}", sizes, file_sha256)

    @property
    def is_complete(self) -> bool:
        """Whether the copy exists and all files have the expected size. Their content was verified when copying."""
        return self.path.is_dir() and all(_size(self.path / name) == size for name, size in self.sizes.items())

    @property
    def partial(self) -> Path:
        """Path of the copy while it is incomplete."""
        return self.path.with_name(self.path.name + ".partial")

    @property
    def missing(self) -> dict[str, int]:
        """{name: size in bytes} of the files that are not yet copied."""
        return {name: size for name, size in self.sizes.items() if _size(self.partial / name) != size}


def copy_stores(copies: Sequence[LocalCopy], on_bytes: Callable[[int], object], on_wait: Callable[[], object]) -> None:
    """Make the copies that do not exist yet. Only one process per machine copies at a time.

    Args:
        copies: copies with a common parent folder, which is created.
        on_bytes: called from several threads with the number of bytes copied or verified since the last call.
        on_wait: called every second while another process of this machine copies to the same folder.

    Raises:
        DataError: there is not enough disk space, a store is damaged, or the disk fails. Files that were copied are
            kept, and the next call continues with the others.
    """
    if all(copy.is_complete for copy in copies):
        return  # the folder may belong to another user, who has copied them
    root = copies[0].path.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock_root(root, on_wait), ThreadPoolExecutor(_NUM_THREADS) as pool:
            todo = [copy for copy in copies if not copy.is_complete]
            _check_free_space(root, todo)
            for copy in todo:
                _copy(copy, pool, on_bytes)
    except OSError as error:
        raise DataError(
            f"the stores could not be copied to {root} ({describe_error(error)}). Resolve the error and start again, "
            "which continues the copy, or read the stores from their original location (data.local_dir=null)"
        ) from error


def count_copy_bytes(copies: Sequence[LocalCopy]) -> int:
    """Return the total that `on_bytes` will report: every missing byte is copied once and read back once."""
    return 2 * sum(size for copy in copies if not copy.is_complete for size in copy.missing.values())


def _check_free_space(root: Path, todo: Sequence[LocalCopy]) -> None:
    # Incomplete files of an interrupted copy are overwritten, so their space is available.
    reusable = sum(path.stat().st_size for copy in todo for path in copy.partial.rglob("*.unverified"))
    needed = sum(sum(copy.missing.values()) for copy in todo)
    free = shutil.disk_usage(root).free + reusable
    if needed > free:
        raise DataError(
            f"data.local_dir={root} has {free / 2**30:.2f} GiB free, and the stores need {needed / 2**30:.2f} GiB "
            "there. Remove unused files, such as copies of older preparations, or read the stores from their original "
            "location (data.local_dir=null)"
        )


def _copy(copy: LocalCopy, pool: ThreadPoolExecutor, on_bytes: Callable[[int], object]) -> None:
    if copy.path.exists():  # incomplete, although it was published
        shutil.rmtree(copy.path)
    jobs = [pool.submit(_copy_file, copy, name, on_bytes) for name in copy.missing]
    try:
        for job in jobs:
            job.result()
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    sync_folder(copy.partial)
    copy.partial.rename(copy.path)


def _copy_file(copy: LocalCopy, name: str, on_bytes: Callable[[int], object]) -> None:
    """Copy one file, verify its sha256 as read back from the disk, and rename it to its final name."""
    source, target = copy.source / name, copy.partial / name
    unverified = target.with_name(target.name + ".unverified")
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as reading, unverified.open("wb") as writing:
        while block := reading.read(_BLOCK_BYTES):
            digest.update(block)
            writing.write(block)
            on_bytes(len(block))
        writing.flush()
        os.fsync(writing.fileno())
        os.posix_fadvise(writing.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read back from the disk, not the cache
    expected_sha256 = copy.file_sha256.get(name, digest.hexdigest())
    if digest.hexdigest() != expected_sha256:
        raise DataError(
            f"{source} has sha256 {digest.hexdigest()[:12]}, but {expected_sha256[:12]} in the store's manifest: the "
            f"store is damaged; remove {copy.source} and prepare it again"
        )
    read_back = hashlib.sha256()
    with unverified.open("rb", buffering=0) as reading:
        while block := reading.read(_BLOCK_BYTES):
            read_back.update(block)
            on_bytes(len(block))
    if read_back.digest() != digest.digest():
        raise DataError(
            f"{unverified} has other bytes than were written: the disk is failing; use another data.local_dir"
        )
    unverified.rename(target)


@contextmanager
def _lock_root(root: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Wait for the lock of `root`, which is released when the process ends. Local disks support such locks."""
    with (root / ".lock").open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(1.0)
        yield


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
