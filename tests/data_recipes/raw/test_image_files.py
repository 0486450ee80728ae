"""Owns the proofs about pictures: what is refused and why, sizes after rotation, the same result on any
workers."""

import io
import multiprocessing
import os
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from data_recipes.raw.image_files import PictureError, inside, load, probe
from data_recipes.raw.image_pool import PicturePool
from data_recipes.schema.sample import Reason, Reject, Sample
from tests.data_recipes.raw_folders import conversation, picture, put


def png_header_of(height: int, width: int) -> bytes:
    """A PNG of a few bytes that claims any size: what a decompression bomb looks like before it is
    decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", Reason.PICTURE_EMPTY),
        (lambda: b"<html>404</html>", Reason.PICTURE_UNREADABLE),
        (lambda: picture(1, 64, 64, "JPEG")[:-200], Reason.PICTURE_TRUNCATED),
        (lambda: picture(1, 64, 64)[:-2000], Reason.PICTURE_TRUNCATED),
        (lambda: picture(1, 64, 64, "WEBP")[:-20], Reason.PICTURE_TRUNCATED),
        (lambda: picture(1, 64, 64, "GIF")[:-20], Reason.PICTURE_TRUNCATED),
        (lambda: picture(1, 64, 64)[:200] + picture(2, 64, 64)[200:], Reason.PICTURE_UNREADABLE),
        (lambda: png_header_of(50_000, 50_000), Reason.PICTURE_TOO_LARGE),
        (lambda: png_header_of(12_000, 10_000), Reason.PICTURE_TOO_LARGE),
        (lambda: picture(1, 2, 201), Reason.ASPECT_RATIO),
        (lambda: picture(1, 101, 1), Reason.ASPECT_RATIO),
    ],
)
def test_bad_pictures_get_their_reason(make: Callable[[], bytes], reason: Reason) -> None:
    """Every way in which bytes can fail to be a usable picture has its reason; a cut-off file does not
    pass."""
    with pytest.raises(PictureError) as caught:
        probe(make())
    assert caught.value.reason is reason
    assert caught.value.detail


def test_a_wrong_extension_is_no_fault(tmp_path: Path) -> None:
    """The bytes tell the format, not the name: half the web calls its JPEGs .png. It is noted."""
    loaded = load(put(tmp_path / "photo.png", picture(1, kind="JPEG")))
    assert (loaded.info.format, loaded.info.height, loaded.info.width) == ("JPEG", 12, 16)
    assert (loaded.data, loaded.notes) == (picture(1, kind="JPEG"), ("wrong_extension",))
    for name, kind in (("a.png", "PNG"), ("b.JPEG", "JPEG"), ("c.img", "GIF"), ("d", "BMP")):
        assert load(put(tmp_path / name, picture(1, kind=kind))).notes == ()


def test_a_file_of_another_extension_is_found(tmp_path: Path) -> None:
    """OCR-VQA's lists say .jpg where the download gave a .gif: found and noted if there is just one such file, and
    never by a link, which might lead out of the image root."""
    put(tmp_path / "1.gif", picture(1, kind="GIF"))
    loaded = load(tmp_path / "1.jpg")
    assert (loaded.info.format, loaded.notes) == ("GIF", ("found_by_other_extension",))
    put(tmp_path / "1.png", picture(1))
    put(tmp_path / "2.txt", picture(1))
    (tmp_path / "3.png").symlink_to(tmp_path / "1.png")
    for name in ("1.jpg", "2.jpg", "3.jpg", "1"):
        with pytest.raises(PictureError) as caught:
            load(tmp_path / name)
        assert caught.value.reason is Reason.PICTURE_MISSING


def test_size_is_the_one_after_rotation() -> None:
    """EXIF orientation 6 turns 12 x 16 into 16 x 12, and the bytes are hashed as they are."""
    image = Image.open(io.BytesIO(picture(1)))
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif)
    info = probe(stream.getvalue())
    assert (info.height, info.width) == (16, 12)


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/etc/hosts", "~/a.png", "..\\a.png", "a\0.png"])
def test_paths_that_leave_the_root_are_refused(tmp_path: Path, name: str) -> None:
    """No annotation file may name a file outside its image root, whether it exists or not."""
    with pytest.raises(PictureError) as caught:
        inside(tmp_path, name)
    assert caught.value.reason is Reason.PATH_OUTSIDE_ROOT


def test_links_may_stay_and_not_leave(tmp_path: Path) -> None:
    """A symbolic link that stays inside the root is followed, through folders and chains too; one that leads out is
    refused, whether anything is there or not."""
    root = tmp_path / "root"
    target = put(root / "real" / "a.png", picture(1))
    outside = put(tmp_path / "secret" / "b.png", picture(2))
    (root / "in.png").symlink_to(target)
    (root / "out.png").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    (root / "chain.png").symlink_to("folder/b.png")
    (root / "up.png").symlink_to("../secret/b.png")
    (root / "gone_outside.png").symlink_to(tmp_path / "none.png")
    (root / "near").symlink_to("real")
    (root / "two_steps.png").symlink_to("near/a.png")
    for name in ("in.png", "near/a.png", "two_steps.png"):
        assert load(inside(root, name)).data == picture(1)
    for name in ("out.png", "folder/b.png", "chain.png", "up.png", "gone_outside.png"):
        with pytest.raises(PictureError) as caught:
            inside(root, name)
        assert caught.value.reason is Reason.PATH_OUTSIDE_ROOT
        assert "leaves the image root by a symbolic link" in caught.value.detail
    (tmp_path / "link_to_root").symlink_to(root)
    assert inside(tmp_path / "link_to_root", "real/a.png").is_file()


def test_a_missing_picture_and_a_folder_are_missing(tmp_path: Path) -> None:
    """No file, or something that is no file, is `picture_missing`; a link to nothing or to itself, too."""
    (tmp_path / "dead.png").symlink_to("no.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for path in (tmp_path / "no.png", tmp_path, inside(tmp_path, "dead.png"), inside(tmp_path, "loop.png")):
        with pytest.raises(PictureError) as caught:
            load(path)
        assert caught.value.reason is Reason.PICTURE_MISSING


def test_any_number_of_workers_gives_the_same_stream(tmp_path: Path) -> None:
    """Order, bytes and rejects do not depend on the number of processes."""
    items: list[Sample | Reject] = []
    for number in range(60):
        path = put(tmp_path / f"{number}.png", picture(number, height=4 + number % 50))
        items.append(conversation(str(number), path, path.with_name("gone") if number % 7 == 0 else path))
        if number % 5 == 0:
            items.append(Reject(f"r{number}", Reason.BROKEN_RECORD, "as it came"))
    streams = []
    for num_workers in (1, 2, 4):
        with PicturePool(num_workers) as pool:
            streams.append(list(pool.load_in_order(items)))
    assert streams[0] == streams[1] == streams[2]
    assert len(streams[0]) == len(items)
    reasons = [item.reason for item in streams[0] if isinstance(item, Reject)]
    assert reasons.count(Reason.PICTURE_MISSING) == 9
    assert reasons.count(Reason.BROKEN_RECORD) == 12


def test_the_pool_reads_ahead_only_a_little(tmp_path: Path) -> None:
    """Memory stays flat: when the first result is out, only a few chunks have been asked of the reader."""
    path = put(tmp_path / "a.png", picture(1))
    asked = 0

    def endless() -> Iterator[Sample]:
        nonlocal asked
        while True:
            asked += 1
            yield conversation(str(asked), path)

    with PicturePool(2) as pool:
        stream = pool.load_in_order(endless())
        next(stream)
        assert asked <= 64


def endless(_: int) -> None:
    """Work that never ends."""
    while True:
        time.sleep(1)


def test_workers_leave_at_once_when_they_are_not_wanted() -> None:
    """After Ctrl-C nobody waits for what a process is in the middle of."""

    def interrupted() -> None:
        with PicturePool(2) as pool:
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            pool.run_all(endless, [1, 2, 3, 4])

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert multiprocessing.active_children() == []
