"""Copies of stores on a disk of this machine, for runs whose stores lie on a busy network file system.

Owns: which files, room first, going on where an interrupted copy stopped, proof that the copy is the store.
Leaves: the format to `reader.py`, which process of a node copies and what the others wait for to the training side.

    <root>/<source>-<fingerprint>/   one copy: another preparation of a source has another fingerprint and its own copy
    <root>/<source>-<fingerprint>.partial/   while it is made; files in it are whole but for `*.unverified`
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

from data_recipes.schema.sample import DataError
from data_recipes.store.durable import sync
from data_recipes.store.reader import Store, read_manifest

_BLOCK_BYTES = 8 << 20
_NUM_THREADS = 4  # a network file system gives several streams more than one


@dataclass(frozen=True)
class LocalCopy:
    """One store and the place of its copy.

    `sizes` are the bytes of every file of the store; `listed` the sha256 of those that its manifest lists.
    """

    source: Path
    place: Path
    sizes: dict[str, int]
    listed: dict[str, str]

    @classmethod
    def of(cls, source: Path, root: Path) -> "LocalCopy":
        """The copy below `root` of the store at `source`. Errors are those of `Store.open`."""
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
        listed = {name: str(file["sha256"]) for name, file in files.items()}
        return cls(source, root / f"{manifest['name']}-{manifest['fingerprint'][:16]}", sizes, listed)

    @property
    def is_there(self) -> bool:
        """Whether the copy is whole: every file has its size (its contents were proved before it got its name)."""
        return self.place.is_dir() and all(_size(self.place / name) == size for name, size in self.sizes.items())

    @property
    def partial(self) -> Path:
        """Where it is made."""
        return self.place.with_name(self.place.name + ".partial")

    @property
    def missing(self) -> dict[str, int]:
        """Files that must still be copied, with their sizes in bytes."""
        return {name: size for name, size in self.sizes.items() if _size(self.partial / name) != size}


def copy_stores(copies: Sequence[LocalCopy], on_bytes: Callable[[int], object], on_wait: Callable[[], object]) -> None:
    """Makes those copies that are not there, below one root; only one process of the machine at a time.

    Args:
        copies: with one parent folder, which is made.
        on_bytes: called with the number of bytes that were copied, or proved, since the last call; from threads.
        on_wait: called every second while another process of this machine copies to the same root.

    Raises:
        DataError: not enough room, a damaged store, or a failing disk; what was copied stays, and a new start goes on.
    """
    root = copies[0].place.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_one(root, on_wait), ThreadPoolExecutor(_NUM_THREADS) as pool:
            todo = [copy for copy in copies if not copy.is_there]
            _check_room(root, todo)
            for copy in todo:
                _copy(copy, pool, on_bytes)
    except OSError as error:
        raise DataError(
            f"the stores could not be copied to {root} ({error}); what was copied stays there: mend it and start "
            "again, or read the stores where they lie (data.local_dir=null)"
        ) from error


def num_bytes_to_move(copies: Sequence[LocalCopy]) -> int:
    """What `on_bytes` will add up to: every missing byte is copied once and read once more."""
    return 2 * sum(size for copy in copies if not copy.is_there for size in copy.missing.values())


def _check_room(root: Path, todo: Sequence[LocalCopy]) -> None:
    # Half a file that an interrupted copy left is written over: it is room that can be used.
    halves = sum(path.stat().st_size for copy in todo for path in copy.partial.rglob("*.unverified"))
    needed = sum(sum(copy.missing.values()) for copy in todo)
    free = shutil.disk_usage(root).free + halves
    if needed > free:
        raise DataError(
            f"data.local_dir={root} has {free / 2**30:.2f} GiB free, and the stores need {needed / 2**30:.2f} GiB "
            "there; remove what is no longer used (copies of older preparations too), or read the stores where they "
            "lie (data.local_dir=null)"
        )


def _copy(copy: LocalCopy, pool: ThreadPoolExecutor, on_bytes: Callable[[int], object]) -> None:
    if copy.place.exists():  # cut short: not a copy of this store any more
        shutil.rmtree(copy.place)
    jobs = [pool.submit(_copy_file, copy, name, on_bytes) for name in copy.missing]
    try:
        for job in jobs:
            job.result()
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    sync(copy.partial)
    copy.partial.rename(copy.place)


def _copy_file(copy: LocalCopy, name: str, on_bytes: Callable[[int], object]) -> None:
    """Copies one file, proves it by its sha256 as read back from the disk, and only then gives it its name."""
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
        os.posix_fadvise(writing.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is asked, not the cache
    listed = copy.listed.get(name, digest.hexdigest())
    if digest.hexdigest() != listed:
        raise DataError(
            f"{source} is not what its store's manifest says (sha256 {digest.hexdigest()[:12]}, listed {listed[:12]}): "
            f"the store is damaged; remove {copy.source} and prepare it again"
        )
    proof = hashlib.sha256()
    with unverified.open("rb", buffering=0) as reading:
        while block := reading.read(_BLOCK_BYTES):
            proof.update(block)
            on_bytes(len(block))
    if proof.digest() != digest.digest():
        raise DataError(
            f"{unverified} reads back other bytes than were written: the disk is failing; use another data.local_dir"
        )
    unverified.rename(target)


@contextmanager
def _only_one(root: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """A lock that ends with its process; on a local disk, where it can be relied upon."""
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
