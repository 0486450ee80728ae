"""Tests of loading and validating images, and of the pool of worker processes."""

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

from data_recipes.raw.image_files import (
    ImageError,
    load_image,
    probe_image,
    resolve_image,
    resolve_images,
    resolve_inside,
)
from data_recipes.raw.image_pool import ImagePool
from data_recipes.schema.sample import Reason, Reject, Sample
from tests.data_recipes.raw_folders import make_image, make_sample, write_file


def png_header_of(height: int, width: int) -> bytes:
    """Return a PNG of a few bytes that claims any size, like a decompression bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", Reason.IMAGE_EMPTY),
        (lambda: b"<html>404</html>", Reason.IMAGE_UNREADABLE),
        (lambda: make_image(1, 64, 64, "JPEG")[:-200], Reason.IMAGE_TRUNCATED),
        (lambda: make_image(1, 64, 64)[:-2000], Reason.IMAGE_TRUNCATED),
        (lambda: make_image(1, 64, 64, "WEBP")[:-20], Reason.IMAGE_TRUNCATED),
        (lambda: make_image(1, 64, 64, "GIF")[:-20], Reason.IMAGE_TRUNCATED),
        (lambda: make_image(1, 64, 64)[:200] + make_image(2, 64, 64)[200:], Reason.IMAGE_UNREADABLE),
        (lambda: png_header_of(50_000, 50_000), Reason.IMAGE_TOO_LARGE),
        (lambda: png_header_of(12_000, 10_000), Reason.IMAGE_TOO_LARGE),
        (lambda: make_image(1, 2, 201), Reason.ASPECT_RATIO),
        (lambda: make_image(1, 101, 1), Reason.ASPECT_RATIO),
    ],
)
def test_invalid_images_have_reasons(make: Callable[[], bytes], reason: Reason) -> None:
    """Each kind of invalid image has its own reason."""
    with pytest.raises(ImageError) as caught:
        probe_image(make())
    assert caught.value.reason is reason
    assert caught.value.detail


def test_wrong_extension(tmp_path: Path) -> None:
    """The format is determined by the bytes, and a wrong extension is noted."""
    loaded = load_image(write_file(tmp_path / "photo.png", make_image(1, kind="JPEG")))
    assert (loaded.info.format, loaded.info.height, loaded.info.width) == ("JPEG", 12, 16)
    assert (loaded.data, loaded.notes) == (make_image(1, kind="JPEG"), ("wrong_extension",))
    for name, kind in (("a.png", "PNG"), ("b.JPEG", "JPEG"), ("c.img", "GIF"), ("d", "BMP")):
        assert load_image(write_file(tmp_path / name, make_image(1, kind=kind))).notes == ()


def test_other_extension(tmp_path: Path) -> None:
    """A missing file is replaced by the only one with another image extension, but never by a link."""
    write_file(tmp_path / "1.gif", make_image(1, kind="GIF"))
    loaded = load_image(tmp_path / "1.jpg")
    assert (loaded.info.format, loaded.notes) == ("GIF", ("found_by_other_extension",))
    write_file(tmp_path / "1.png", make_image(1))
    write_file(tmp_path / "2.txt", make_image(1))
    (tmp_path / "3.png").symlink_to(tmp_path / "1.png")
    for name in ("1.jpg", "2.jpg", "3.jpg", "1"):
        with pytest.raises(ImageError) as caught:
            load_image(tmp_path / name)
        assert caught.value.reason is Reason.IMAGE_MISSING


def test_other_case(tmp_path: Path) -> None:
    """A missing file is replaced by the only one whose path differs in case, but never by a link."""
    write_file(tmp_path / "Images" / "One.PNG", make_image(1))
    write_file(tmp_path / "images_2" / "two.png", make_image(2))
    write_file(tmp_path / "images_2" / "Two.png", make_image(3))
    (tmp_path / "Linked").symlink_to(tmp_path / "Images")
    for name in ("images/one.png", "IMAGES/ONE.png", "Images/one.PNG"):
        loaded = load_image(resolve_inside(tmp_path, name))
        assert (loaded.data, loaded.notes) == (make_image(1), ("found_by_other_case",))
    assert load_image(tmp_path / "images_2" / "two.png").notes == ()
    for name in ("images_2/TWO.png", "linked/one.png", "images/one.png/x.png"):
        with pytest.raises(ImageError) as caught:
            load_image(resolve_inside(tmp_path, name))
        assert caught.value.reason is Reason.IMAGE_MISSING


def test_image_fields(tmp_path: Path) -> None:
    """Bytes take precedence over a path, which is often only the original file name."""
    assert resolve_image({"bytes": b"x", "path": "../a.png"}, tmp_path) == b"x"
    assert resolve_image({"path": "a.png"}, tmp_path) == tmp_path / "a.png"
    assert resolve_image("a.png", tmp_path) == tmp_path / "a.png"
    for wrong in (None, 3, {}, {"bytes": None, "path": None}):
        with pytest.raises(ImageError) as caught:
            resolve_image(wrong, tmp_path)
        assert caught.value.reason is Reason.NOT_A_STRING
    assert resolve_images(None, tmp_path) == []
    assert resolve_images("a.png", tmp_path) == [tmp_path / "a.png"]
    assert resolve_images([b"x", "a.png"], tmp_path) == [b"x", tmp_path / "a.png"]


def test_size_after_rotation() -> None:
    """EXIF orientation 6 exchanges height and width."""
    image = Image.open(io.BytesIO(make_image(1)))
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif)
    info = probe_image(stream.getvalue())
    assert (info.height, info.width) == (16, 12)


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/etc/hosts", "~/a.png", "..\\a.png", "a\0.png"])
def test_paths_outside_root(tmp_path: Path, name: str) -> None:
    """A name that leads outside the image root is rejected, whether the file exists or not."""
    with pytest.raises(ImageError) as caught:
        resolve_inside(tmp_path, name)
    assert caught.value.reason is Reason.PATH_OUTSIDE_ROOT


def test_links(tmp_path: Path) -> None:
    """Links within the image root are followed; links that lead outside are rejected, even without a target."""
    root = tmp_path / "root"
    target = write_file(root / "real" / "a.png", make_image(1))
    outside = write_file(tmp_path / "secret" / "b.png", make_image(2))
    (root / "in.png").symlink_to(target)
    (root / "out.png").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    (root / "chain.png").symlink_to("folder/b.png")
    (root / "up.png").symlink_to("../secret/b.png")
    (root / "gone_outside.png").symlink_to(tmp_path / "none.png")
    (root / "near").symlink_to("real")
    (root / "two_steps.png").symlink_to("near/a.png")
    for name in ("in.png", "near/a.png", "two_steps.png"):
        assert load_image(resolve_inside(root, name)).data == make_image(1)
    for name in ("out.png", "folder/b.png", "chain.png", "up.png", "gone_outside.png"):
        with pytest.raises(ImageError) as caught:
            resolve_inside(root, name)
        assert caught.value.reason is Reason.PATH_OUTSIDE_ROOT
        assert "leaves the image root by a symbolic link" in caught.value.detail
    (tmp_path / "link_to_root").symlink_to(root)
    assert resolve_inside(tmp_path / "link_to_root", "real/a.png").is_file()


def test_links_of_a_hub_cache(tmp_path: Path) -> None:
    """In a snapshot of a Hugging Face cache, every file is a link into the blobs of its repository, and of no other."""
    for repository in ("datasets--me--ds", "datasets--other--ds"):
        write_file(tmp_path / repository / "blobs" / "b1", make_image(1))
    snapshot = tmp_path / "datasets--me--ds" / "snapshots" / "abc123"
    (snapshot / "images").mkdir(parents=True)
    (snapshot / "images" / "1.png").symlink_to("../../../blobs/b1")
    (snapshot / "images" / "2.png").symlink_to("../../../../datasets--other--ds/blobs/b1")
    (snapshot / "images" / "3.png").symlink_to("../../../refs")
    for root, folder in ((snapshot, "images/"), (snapshot / "images", "")):
        assert load_image(resolve_inside(root, f"{folder}1.png")).data == make_image(1)
        for name in ("2.png", "3.png"):
            with pytest.raises(ImageError) as caught:
                resolve_inside(root, folder + name)
            assert caught.value.reason is Reason.PATH_OUTSIDE_ROOT


def test_missing_files(tmp_path: Path) -> None:
    """Missing files, folders and broken links are `picture_missing`."""
    (tmp_path / "dead.png").symlink_to("no.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for path in (
        tmp_path / "no.png",
        tmp_path,
        resolve_inside(tmp_path, "dead.png"),
        resolve_inside(tmp_path, "loop.png"),
    ):
        with pytest.raises(ImageError) as caught:
            load_image(path)
        assert caught.value.reason is Reason.IMAGE_MISSING


def test_results_do_not_depend_on_workers(tmp_path: Path) -> None:
    """Order, bytes and rejects do not depend on the number of processes."""
    items: list[Sample | Reject] = []
    for number in range(60):
        path = write_file(tmp_path / f"{number}.png", make_image(number, height=4 + number % 50))
        items.append(make_sample(str(number), path, path.with_name("gone") if number % 7 == 0 else path))
        if number % 5 == 0:
            items.append(Reject(f"r{number}", Reason.BROKEN_RECORD, "as it came"))
    streams = []
    for num_workers in (1, 2, 4):
        with ImagePool(num_workers) as pool:
            streams.append(list(pool.load_in_order(items)))
    assert streams[0] == streams[1] == streams[2]
    assert len(streams[0]) == len(items)
    reasons = [item.reason for item in streams[0] if isinstance(item, Reject)]
    assert reasons.count(Reason.IMAGE_MISSING) == 9
    assert reasons.count(Reason.BROKEN_RECORD) == 12


def test_pool_reads_ahead_little(tmp_path: Path) -> None:
    """Only a few chunks are requested from the reader before the first result."""
    path = write_file(tmp_path / "a.png", make_image(1))
    num_requested = 0

    def endless() -> Iterator[Sample]:
        nonlocal num_requested
        while True:
            num_requested += 1
            yield make_sample(str(num_requested), path)

    with ImagePool(2) as pool:
        stream = pool.load_in_order(endless())
        next(stream)
        assert num_requested <= 64


def endless(_: int) -> None:
    """Run forever."""
    while True:
        time.sleep(1)


def test_workers_stop_after_ctrl_c() -> None:
    """After Ctrl-C the pool does not wait for running functions."""

    def interrupted() -> None:
        with ImagePool(2) as pool:
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            pool.map_items(endless, [1, 2, 3, 4])

    running = set(multiprocessing.active_children())  # of other tests
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert set(multiprocessing.active_children()) == running
