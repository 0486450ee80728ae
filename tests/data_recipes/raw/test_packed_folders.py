"""Tests of which archive stands for a folder that does not exist."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_recipes.raw import archives, packed_folders
from data_recipes.raw.image_files import ImageError, load_image, resolve_image
from data_recipes.raw.packed_folders import find_member, has_folder, list_files, locate_file, read_file
from data_recipes.schema.sample import ArchiveMember, DataError, Reason
from tests.data_recipes.archive_files import pack, split, tar_bytes, zip_bytes
from tests.data_recipes.raw_folders import make_image, write_file

IMAGES = {f"{number % 2}/{number}.png": make_image(number) for number in range(6)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[None]:
    """Use a cache folder of the test's own, and print every message again."""
    packed_folders._printed.clear()
    with archives.archives_cached_in(tmp_path.parent / f"{tmp_path.name}_cache"):
        yield


def prefixed(prefix: str) -> dict[str, bytes]:
    """Return the images in a folder."""
    return {f"{prefix}{name}": data for name, data in IMAGES.items()}


def load(root: Path, name: str) -> bytes:
    """Return the bytes of an image that is in an archive."""
    reference = resolve_image(name, root)
    assert isinstance(reference, ArchiveMember), reference
    return load_image(reference).data


@pytest.mark.parametrize("archive", ["images.zip", "images.tar", "images.tar.gz", "Images.ZIP"])
@pytest.mark.parametrize("prefix", ["", "images/", "./", "data/images/", "data/", "mnt/data/images/"])
def test_archive_beside_the_expected_folder(
    tmp_path: Path, archive: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An archive with the name of the missing folder is read, whatever its members begin with, in any order."""
    path = pack(tmp_path / "gqa" / archive.lower(), prefixed(prefix))
    path = path.rename(path.with_name(archive))
    names = list(IMAGES)
    random.Random(0).shuffle(names)
    for name in names:
        assert load(tmp_path, f"gqa/images/{name}") == IMAGES[name]  # the root is above the folder,
        assert load(tmp_path / "gqa", f"images/{name}") == IMAGES[name]
        assert load(tmp_path / "gqa" / "images", name) == IMAGES[name]  # or is the folder itself
    missing = resolve_image("gqa/images/none.png", tmp_path)
    assert missing == tmp_path / "gqa/images/none.png"
    out = [line for line in capsys.readouterr().out.splitlines() if "decompressed" not in line]
    assert out == [f"{path}: read in place of {tmp_path / 'gqa/images'}/ (6 files)"]


def test_archives_with_other_names(tmp_path: Path) -> None:
    """Archives whose content unpacks to the expected folder are read: Visual Genome's images.zip has VG_100K/."""
    pack(tmp_path / "vg" / "images.zip", {"VG_100K/1.png": IMAGES["0/0.png"]})
    pack(tmp_path / "vg" / "images2.zip", {"VG_100K_2/2.png": IMAGES["1/1.png"]})
    pack(tmp_path / "vg" / "more.tar.gz", {"VG_100K_3/3.png": IMAGES["1/3.png"]})
    assert load(tmp_path, "vg/VG_100K/1.png") == IMAGES["0/0.png"]
    assert load(tmp_path, "vg/VG_100K_2/2.png") == IMAGES["1/1.png"]
    assert load(tmp_path, "vg/VG_100K_3/3.png") == IMAGES["1/3.png"]
    pack(tmp_path / "all.zip", {"docvqa/documents/4.png": IMAGES["0/4.png"]})
    assert load(tmp_path, "docvqa/documents/4.png") == IMAGES["0/4.png"]
    pack(tmp_path / "textvqa" / "train_val_images.zip", {"train_val_images/train_images/5.png": IMAGES["1/5.png"]})
    assert load(tmp_path, "textvqa/train_images/5.png") == IMAGES["1/5.png"]


@pytest.mark.parametrize("extension", ["zip", "tar.gz"])
def test_numbered_archives(tmp_path: Path, extension: str) -> None:
    """The raw LLaVA-NeXT release has eleven numbered archives, each with parts of many folders; other publishers number
    the archives of one folder."""
    for number in range(3):
        files = {
            f"{folder}/{number}.png": IMAGES[f"{number % 2}/{number}.png"] for folder in ("ai2d/images", "vg/VG_100K")
        }
        pack(tmp_path / "next" / f"llava_next_raw_format_images_{number + 1}.{extension}", files)
        pack(
            tmp_path / "allava" / f"images_{number}.{extension}",
            {f"{number}.png": IMAGES[f"{number % 2}/{number}.png"]},
        )
    for number in (2, 0, 1):
        for root, folder in (("next", "vg/VG_100K"), ("next", "ai2d/images"), ("allava", "images")):
            assert load(tmp_path / root, f"{folder}/{number}.png") == IMAGES[f"{number % 2}/{number}.png"]
    assert resolve_image("vg/VG_100K/9.png", tmp_path / "next") == tmp_path / "next/vg/VG_100K/9.png"


def test_unrelated_compressed_archives_are_not_decompressed(tmp_path: Path) -> None:
    """A compressed archive of another name is read only if its first file shows that it may have the path."""
    pack(tmp_path / "ocr.tar.gz", {"ocr/1.json": b"{}"})
    pack(tmp_path / "flat.tar.gz", {"1.json": b"{}"})
    assert resolve_image("images/1.png", tmp_path) == tmp_path / "images/1.png"
    assert resolve_image("1.png", tmp_path) == tmp_path / "1.png"
    assert locate_file(tmp_path / "train.json") == tmp_path / "train.json"
    assert not archives.cache_folder().exists() or not list(archives.cache_folder().glob("*.content"))


def test_archives_inside_the_folder(tmp_path: Path) -> None:
    """SAM's archives sa_000000.tar have images without a folder; files that are unpacked already win."""
    folder = tmp_path / "sam" / "images"
    pack(folder / "sa_000000.tar", {"./sa_1.png": IMAGES["0/0.png"], "./sa_1.json": b"{}"})
    pack(folder / "sa_000001.tar", {"./sa_2.png": IMAGES["1/1.png"], "./sa_3.png": b"broken"})
    pack(folder / "sa_000002.tar.gz", {"./sa_4.png": IMAGES["0/2.png"]})
    write_file(folder / "sa_3.png", IMAGES["0/4.png"])
    assert load(tmp_path, "sam/images/sa_1.png") == IMAGES["0/0.png"]
    assert load(tmp_path, "sam/images/sa_2.png") == IMAGES["1/1.png"]
    assert load(tmp_path, "sam/images/sa_4.png") == IMAGES["0/2.png"]
    assert resolve_image("sam/images/sa_3.png", tmp_path) == folder / "sa_3.png"


def test_the_folder_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where folder and archive exist, the folder is read, which is printed once."""
    pack(tmp_path / "images.zip", {"0/0.png": IMAGES["1/1.png"], "0/2.png": IMAGES["0/2.png"]})
    path = write_file(tmp_path / "images" / "0" / "0.png", IMAGES["0/0.png"])
    for _ in range(2):
        assert resolve_image("images/0/0.png", tmp_path) == path
        assert resolve_image("0/0.png", tmp_path / "images") == path
    assert resolve_image("images/0/2.png", tmp_path) == tmp_path / "images/0/2.png"
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'images'}/: the folder is read, not images.zip beside it"
    ]


def test_split_archive_stands_for_its_folder(tmp_path: Path) -> None:
    """Parts are found by the stem of their names."""
    split(pack(tmp_path / "images.tar.gz", IMAGES), 3, "{path}.part_{letters}")
    assert load(tmp_path, "images/1/3.png") == IMAGES["1/3.png"]
    split(pack(tmp_path / "more" / "images.zip", IMAGES), 3, "images_part_{letters}")
    assert load(tmp_path / "more", "images/1/3.png") == IMAGES["1/3.png"]


def test_new_archive_is_seen(tmp_path: Path) -> None:
    """What was missing at the first question is found after it was downloaded, and again after unpacking."""
    path = tmp_path / "images" / "0" / "0.png"
    assert resolve_image("images/0/0.png", tmp_path) == path
    pack(tmp_path / "images.zip", IMAGES)
    assert load(tmp_path, "images/0/0.png") == IMAGES["0/0.png"]
    write_file(path, IMAGES["0/0.png"])
    assert resolve_image("images/0/0.png", tmp_path) == path


def test_links_to_archives(tmp_path: Path) -> None:
    """An archive that is a link out of the image root is not read; one into the blobs of a hub cache is."""
    outside = pack(tmp_path / "elsewhere" / "images.zip", IMAGES)
    root = tmp_path / "root"
    root.mkdir()
    (root / "images.zip").symlink_to(outside)
    with pytest.raises(DataError, match="is a symbolic link that leaves the image root"):
        resolve_image("images/0/0.png", root)
    with pytest.raises(DataError, match="is a symbolic link that leaves the image root"):
        resolve_image("0/0.png", root / "images")
    (root / "other.zip").symlink_to(outside)
    assert resolve_image("0/0.png", root) == root / "0/0.png"
    snapshot = tmp_path / "datasets--me--ds" / "snapshots" / "abc"
    write_file(tmp_path / "datasets--me--ds" / "blobs" / "b1", outside.read_bytes())
    snapshot.mkdir(parents=True)
    (snapshot / "images.zip").symlink_to("../../blobs/b1")
    assert load(snapshot, "images/0/0.png") == IMAGES["0/0.png"]


def test_archives_that_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unreadable archive is an error if it has the name of the folder, else a printed line."""
    write_file(tmp_path / "a" / "images.7z", b"7z\xbc\xaf\x27\x1c")
    with pytest.raises(DataError, match=r"\.7z archives are not read; unpack it to .*images"):
        resolve_image("images/1.png", tmp_path / "a")
    write_file(tmp_path / "b" / "images.zip", b"<html>Sign in</html>")
    with pytest.raises(DataError, match=r"images\.zip is an HTML page"):
        resolve_image("images/1.png", tmp_path / "b")
    pack(tmp_path / "c" / "good.zip", {"images/1.png": IMAGES["0/0.png"]})
    write_file(tmp_path / "c" / "bad.zip", zip_bytes(IMAGES)[:-30])
    assert load(tmp_path / "c", "images/1.png") == IMAGES["0/0.png"]
    assert "bad.zip is incomplete or damaged" in capsys.readouterr().out


def test_extension_and_case_in_an_archive(tmp_path: Path) -> None:
    """As with files: the only member that differs in case, else the only one with another image extension."""
    files = {"images/One.PNG": IMAGES["0/0.png"], "images/two.gif": make_image(2, kind="GIF")}
    pack(
        tmp_path / "images.zip", {**files, "images/3.gif": make_image(3, kind="GIF"), "images/3.png": IMAGES["1/3.png"]}
    )
    for name, data in files.items():
        write_file(tmp_path / "files" / name, data)
    for name, notes in (
        ("images/one.png", ("found_by_other_case",)),
        ("images/two.jpg", ("found_by_other_extension",)),
    ):
        packed, unpacked = resolve_image(name, tmp_path), resolve_image(name, tmp_path / "files")
        assert isinstance(packed, ArchiveMember)
        assert isinstance(unpacked, Path)
        assert load_image(packed) == load_image(unpacked)
        assert load_image(packed).notes == notes
    assert resolve_image("images/3.jpg", tmp_path) == tmp_path / "images/3.jpg"  # two candidates


def test_members_have_the_same_errors_as_files(tmp_path: Path) -> None:
    """Reason and detail of an invalid image do not depend on whether it is packed."""
    bad = {
        "images/empty.png": b"",
        "images/text.png": b"<html>404</html>",
        "images/cut.png": make_image(1, 64, 64)[:-99],
    }
    pack(tmp_path / "packed" / "images.tar", bad)
    for name, data in bad.items():
        write_file(tmp_path / "files" / name, data)
        errors = []
        for folder in ("packed", "files"):
            with pytest.raises(ImageError) as caught:
                load_image(resolve_image(name, tmp_path / folder))
            errors.append((caught.value.reason, caught.value.detail))
        assert errors[0] == errors[1]


def test_large_members_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit holds for the size of the unpacked file, before anything is read."""
    pack(tmp_path / "images.zip", {"a.png": b"\0" * 5000})
    reference = resolve_image("images/a.png", tmp_path)
    monkeypatch.setattr("data_recipes.raw.image_files.MAX_BYTES", 4999)
    monkeypatch.setattr(archives.Archive, "read", lambda *_: pytest.fail("must not be read"))
    with pytest.raises(ImageError) as caught:
        load_image(reference)
    assert caught.value.reason is Reason.IMAGE_TOO_LARGE


def test_damaged_and_removed_archives_reject_their_images(tmp_path: Path) -> None:
    """What happens to an archive after its index was read is a reason of each image."""
    data = bytearray(zip_bytes(IMAGES))
    data[data.find(IMAGES["0/0.png"]) + 60] ^= 1
    path = write_file(tmp_path / "images.zip", bytes(data))
    reference = resolve_image("images/0/0.png", tmp_path)
    with pytest.raises(ImageError) as caught:
        load_image(reference)
    assert caught.value.reason is Reason.IMAGE_UNREADABLE
    assert "is damaged in images.zip" in caught.value.detail
    path.unlink()
    with pytest.raises(ImageError) as caught:
        load_image(reference)
    assert caught.value.reason is Reason.IMAGE_MISSING
    with pytest.raises(ImageError) as caught:
        load_image(ArchiveMember(pack(tmp_path / "b.tar", IMAGES), "none.png"))
    assert (caught.value.reason, caught.value.detail) == (Reason.IMAGE_MISSING, "no file 'none.png' in b.tar")


def test_folders_and_files_of_readers(tmp_path: Path) -> None:
    """Readers list folders and read files that are packed; large ones are copied once, with their name."""
    files = {"ai2d/questions/2.json": b"[2]", "ai2d/questions/1.json": b"[1]", "ai2d/questions/deep/3.json": b"[3]"}
    pack(tmp_path / "ai2d-all.zip", files)
    write_file(tmp_path / "plain" / "1.json", b"[0]")
    questions = tmp_path / "ai2d" / "questions"
    assert [has_folder(folder) for folder in (questions, tmp_path / "plain", tmp_path / "ai2d" / "images")] == [
        True,
        True,
        False,
    ]
    assert list_files(questions, ".json") == ["1.json", "2.json"]
    assert list_files(tmp_path / "plain", ".json") == ["1.json"]
    assert list_files(tmp_path / "none", ".json") == []
    assert read_file(questions / "1.json") == b"[1]"
    assert read_file(tmp_path / "plain" / "1.json") == b"[0]"
    with pytest.raises(FileNotFoundError):
        read_file(questions / "9.json")
    located = locate_file(questions / "2.json")
    assert (located.name, located.read_bytes()) == ("2.json", b"[2]")
    before = located.stat().st_mtime_ns
    assert locate_file(questions / "2.json") == located
    assert located.stat().st_mtime_ns == before
    assert locate_file(tmp_path / "plain" / "1.json") == tmp_path / "plain" / "1.json"


def test_folder_that_may_not_be_listed(tmp_path: Path) -> None:
    """A folder that may be entered but not listed has files and no archives."""
    if os.geteuid() == 0:
        pytest.skip(reason="root may list every folder: run pytest as another user, not as root")
    path = write_file(tmp_path / "images" / "1.png", IMAGES["0/0.png"])
    path.parent.chmod(0o111)
    assert resolve_image("images/1.png", tmp_path) == path
    path.parent.chmod(0o755)


def test_find_member_of_a_tar_has_the_expected_path(tmp_path: Path) -> None:
    """A member knows the path of the unpacked file, which is not part of its identity."""
    archive = write_file(tmp_path / "images.tar", tar_bytes(IMAGES))
    member = find_member(tmp_path / "images/0/0.png", tmp_path)
    assert member == ArchiveMember(archive, "0/0.png")
    assert member is not None
    assert member.path == tmp_path / "images/0/0.png"
