"""Owns the proofs about reading one picture: its own bytes, whichever shard they stand in, or an OSError."""

import errno
import gc
import os
from pathlib import Path

import pytest

from data_recipes.store import images as store_pictures
from data_recipes.store.images import StorePictures
from data_recipes.writing.arrow_folder import TableWriter
from data_recipes.writing.store_tables import _PICTURES


def content(number: int) -> bytes:
    """A picture of its own length and bytes; every fifth is empty."""
    return bytes([number % 251]) * (number % 5 * 17)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """95 pictures in several record batches and files."""
    writer = TableWriter(tmp_path / "pictures", _PICTURES, batch_rows=10, batch_bytes=300)
    for number in range(95):
        data = content(number)
        record = {"sha256": f"{number:064x}", "bytes": data, "height": number, "width": 2 * number, "format": "PNG"}
        writer.write(record, len(data))
        if number % 30 == 29:
            writer.cut()
    writer.close("f")
    assert len(list((tmp_path / "pictures").glob("*.arrow"))) > 2
    return tmp_path / "pictures"


def test_every_picture_is_its_own(folder: Path) -> None:
    """Bytes, sizes and hashes of each row, across batches and files, in any order."""
    pictures = StorePictures(folder)
    assert len(pictures) == 95
    for number in [*range(94, -1, -7), *range(95)]:
        assert pictures.read(number) == content(number)
    assert pictures.sizes_hw([3, 90]) == ((3, 6), (90, 180))
    assert pictures.hashes([94]) == (f"{94:064x}",)
    assert pictures.all_hashes()[1] == f"{1:064x}".encode()


def num_open(folder: Path) -> int:
    """How many files below a folder this process holds open."""
    targets = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(target.startswith(str(folder)) for target in targets)


def test_few_files_are_open_and_none_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many files a store has, few are open at a time, and none when the store is let go."""
    monkeypatch.setattr(store_pictures, "_MOST_OPEN", 2)
    pictures = StorePictures(folder)
    mapped = num_open(folder)
    for number in range(94, -1, -1):
        assert pictures.read(number) == content(number)
        assert num_open(folder) <= mapped + 2
    assert num_open(folder) > 0
    del pictures
    gc.collect()
    assert num_open(folder) == 0


def test_a_file_that_ended_is_an_error_to_try_again(folder: Path) -> None:
    """Bytes that are not there are an OSError, never a shorter picture; when they are back, the picture is too."""
    pictures = StorePictures(folder)
    last = max(folder.glob("*.arrow"))
    whole = last.read_bytes()
    # The headers stay: they are memory-mapped, and what a map has lost kills the process that looks.
    end = whole.rindex(content(94))
    os.truncate(last, end + 10)
    with pytest.raises(OSError, match=rf"{last.name} ended at byte {end + 10}, before a picture's end"):
        pictures.read(94)
    with last.open("r+b") as file:
        file.write(whole)
    assert pictures.read(94) == content(94)


def test_after_a_failed_read_the_file_is_opened_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle that a network file system calls stale would fail every further try."""
    pictures = StorePictures(folder)
    pread = os.pread
    failed: list[int] = []

    def stale(descriptor: int, num_bytes: int, position: int) -> bytes:
        if not failed:
            failed.append(descriptor)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(descriptor, num_bytes, position)

    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(OSError, match="Stale"):
        pictures.read(7)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(failed[0])
    assert pictures.read(7) == content(7)
