"""Fetches planned files into a folder: complete ones are left as they are, and every new one is checked before it
appears under its name.
"""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import requests

from data_recipes.fetch.byte_progress import ByteProgress, Stopped
from data_recipes.fetch.hub import download_file
from data_recipes.fetch.lock_file import LockFile
from data_recipes.fetch.plain_http import download_url
from data_recipes.fetch.remote_file import FetchError, RemoteFile, describe_difference, read_content
from data_recipes.schema.sample import DataError

STAGING = ".fetch"
"""Folder below the target folder in which the hub's client writes; it is removed when all files are complete."""


def has_published_size(file: RemoteFile, folder: Path) -> bool:
    """Whether a file of the published size is at its place; its content is not read."""
    path = folder / file.name
    return path.is_file() and file.size in (None, path.stat().st_size)


def run_parallel(jobs: Sequence[Callable[[], Any]], num_threads: int, progress: ByteProgress) -> None:
    """Run jobs in threads. After the first error no other job starts, transfers end, and the error is raised."""
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if any(future.done() and future.exception() for future in futures) or not all(f.done() for f in futures):
                progress.stop()
                for future in futures:
                    future.cancel()
    errors = [future.exception() for future in futures if not future.cancelled()]
    for error in errors:
        if error is not None and not isinstance(error, Stopped):
            raise error


class Transfer:
    """Fetches files into one folder.

    Args:
        folder: the files' names are paths below it.
        lock: receives every complete file.
        expected: the lock file that the planned files are from, with which present files are compared in full; None if
            they are from the publishers.
        mirror: a folder with copies of published files, in which each is looked up first; None without one.
        session: of plain HTTP.
        progress: counts received and copied bytes.
    """

    def __init__(
        self,
        folder: Path,
        lock: LockFile,
        session: requests.Session,
        progress: ByteProgress,
        *,
        mirror: Path | None = None,
        expected: Path | None = None,
    ) -> None:
        self._folder = folder
        self._lock = lock
        self._session = session
        self._progress = progress
        self._mirror = mirror
        self._expected = expected

    def fetch(self, file: RemoteFile) -> None:
        """Fetch one file unless it is complete.

        Raises:
            DataError: another file is at its place, or the publisher refuses it.
            FetchError: it cannot be received, or is not the expected one.
        """
        path = self._folder / file.name
        if path.exists():
            self._check_present(path, file)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        received = self._receive(file, path.with_name(path.name + ".part"))
        content = read_content(received)
        difference = describe_difference(content, file)
        if difference:
            received.unlink()
            origin = f"as {self._expected} records it" if self._expected is not None else "what is published"
            raise FetchError(f"{file.name}: the file received from {file} is not {origin}: {difference}")
        received.replace(path)
        self._lock.record(file, content)

    def clean_up(self) -> None:
        """Remove what the hub's client has left; call it when all files are complete."""
        shutil.rmtree(self._folder / STAGING, ignore_errors=True)

    def _check_present(self, path: Path, file: RemoteFile) -> None:
        if not path.is_file():
            raise DataError(f"{path} is a folder, but the published file {file} belongs there; move it away.")
        size = path.stat().st_size
        if self._expected is None and self._lock.has(file, size):
            return
        if file.size not in (None, size):
            difference = f"it has {size:,} bytes instead of {file.size:,}"
        else:
            content = read_content(path)
            difference = describe_difference(content, file)
        if not difference:
            self._lock.record(file, content)
        elif self._expected is not None:
            raise FetchError(f"{path} is not as {self._expected} records it: {difference}; move it away to fetch it")
        else:
            raise DataError(
                f"{path} is not the published file {file}: {difference}; move it away to fetch the published one."
            )

    def _receive(self, file: RemoteFile, part: Path) -> Path:
        """Write a file next to its place, or into the staging folder; return where it is."""
        copy = self._find_in_mirror(file)
        if copy is not None:
            return self._copy(copy, part.with_suffix(".copy"))
        if not file.is_on_hub:
            download_url(self._session, file.source, part, file.size, self._progress)
            return part
        staging = self._folder / STAGING / file.source.replace("/", "--")
        return download_file(file.source, file.path, file.revision, staging, self._progress.add)

    def _find_in_mirror(self, file: RemoteFile) -> Path | None:
        """Return the copy of a file in the mirror: below its name, its repository, or its host.

        A copy that is not the published file is reported, and the file is fetched instead.
        """
        if self._mirror is None:
            return None
        url = urlsplit(file.source)
        elsewhere = f"{file.source}/{file.path}" if file.is_on_hub else f"{url.hostname}{unquote(url.path)}"
        for name in (file.name, elsewhere):
            path = self._mirror / name
            if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
                continue
            difference = describe_difference(read_content(path), file)
            if not difference:
                return path
            print(f"{path} is not the published file ({difference}); it is fetched instead", flush=True)
        return None

    def _copy(self, source: Path, copy: Path) -> Path:
        with source.open("rb") as reader, copy.open("wb") as writer:
            while block := reader.read(1 << 20):
                writer.write(block)
                self._progress.add(len(block))
        return copy


def count_bytes_to_fetch(files: Sequence[RemoteFile], folder: Path) -> tuple[int, int]:
    """Return the bytes that are not there yet, and the number of those files whose size is not known."""
    absent = [file for file in files if not has_published_size(file, folder)]
    return sum(file.size or 0 for file in absent), sum(file.size is None for file in absent)
