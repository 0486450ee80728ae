"""Tests of reading single images of a store."""

import errno
import gc
import os
from pathlib import Path

import pytest

from data_recipes.store import images as store_images
from data_recipes.store.images import StoreImages
from data_recipes.writing.arrow_folder import TableWriter
from data_recipes.writing.store_tables import _IMAGES


def content(number: int) -> bytes:
    """Return bytes of different length and content; every fifth is empty."""
    return bytes([number % 251]) * (number % 5 * 17)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """95 images in several record batches and files."""
    writer = TableWriter(tmp_path / "pictures", _IMAGES, batch_rows=10, batch_bytes=300)
    for number in range(95):
        data = content(number)
        record = {"sha256": f"{number:064x}", "bytes": data, "height": number, "width": 2 * number, "format": "PNG"}
        writer.write(record, len(data))
        if number % 30 == 29:
            writer.finish_shard()
    writer.close("f")
    assert len(list((tmp_path / "pictures").glob("*.arrow"))) > 2
    return tmp_path / "pictures"


def test_read_any_order(folder: Path) -> None:
    """Bytes, sizes and hashes are correct in any order, across batches and files."""
    images = StoreImages(folder)
    assert len(images) == 95
    for number in [*range(94, -1, -7), *range(95)]:
        assert images.read(number) == content(number)
    assert images.sizes_hw([3, 90]) == ((3, 6), (90, 180))
    assert images.hashes([94]) == (f"{94:064x}",)
    assert images.all_hashes()[1] == f"{1:064x}".encode()


def count_open_files(folder: Path) -> int:
    """Return the number of open files below a folder."""
    targets = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(target.startswith(str(folder)) for target in targets)


def test_number_of_open_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of open files is limited, and they are closed with the store."""
    monkeypatch.setattr(store_images, "_MAX_OPEN_FILES", 2)
    images = StoreImages(folder)
    mapped = count_open_files(folder)
    for number in range(94, -1, -1):
        assert images.read(number) == content(number)
        assert count_open_files(folder) <= mapped + 2
    assert count_open_files(folder) > 0
    del images
    gc.collect()
    assert count_open_files(folder) == 0


def test_truncated_file(folder: Path) -> None:
    """A truncated file raises OSError, and can be read again when it is restored."""
    images = StoreImages(folder)
    last = max(folder.glob("*.arrow"))
    whole = last.read_bytes()
    # Keep the headers, because accessing a truncated memory map kills the process.
    end = whole.rindex(content(94))
    os.truncate(last, end + 10)
    with pytest.raises(OSError, match=rf"{last.name} ended at byte {end + 10}, before the end of an image"):
        images.read(94)
    with last.open("r+b") as file:
        file.write(whole)
    assert images.read(94) == content(94)


def test_stale_handle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale file handle is closed, so that the next read succeeds."""
    images = StoreImages(folder)
    pread = os.pread
    failed: list[int] = []

    def stale(descriptor: int, num_bytes: int, position: int) -> bytes:
        if not failed:
            failed.append(descriptor)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(descriptor, num_bytes, position)

    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(OSError, match="Stale"):
        images.read(7)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(failed[0])
    assert images.read(7) == content(7)
