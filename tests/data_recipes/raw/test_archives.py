"""Tests of reading members of zip and tar archives in any order, split and damaged ones included."""

import io
import os
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_recipes.raw import archives
from data_recipes.raw.archive_members import normalize_name
from data_recipes.raw.archives import Archive, open_archive
from data_recipes.raw.split_files import find_archive, list_archives
from data_recipes.schema.sample import DataError
from tests.data_recipes.archive_files import pack, split, tar_bytes, zip_bytes
from tests.data_recipes.raw_folders import write_file

FILES = {f"images/{number % 3}/{number}.bin": os.urandom(50 + 150 * number) for number in range(30)}
TYPES = ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[Path]:
    """Use a cache folder of the test's own."""
    with archives.archives_cached_in(tmp_path / "cache"):
        yield tmp_path / "cache"


def read(archive: Archive, name: str) -> bytes:
    """Return the content of a member that must exist."""
    member = archive.find(name)
    assert member is not None, name
    return archive.read(member)


@pytest.mark.parametrize("name", TYPES)
def test_members_in_any_order(tmp_path: Path, cache: Path, name: str) -> None:
    """Every member is read with its size, in reverse order; a second process finds the index and does not write."""
    path = pack(tmp_path / name, FILES)
    archive = open_archive(path)
    assert (archive.num_members, archive.top) == (len(FILES), "images")
    for member, data in reversed(FILES.items()):
        assert read(archive, member) == data
    assert archive.find("images/none.bin") is None
    assert archive.find("images") is None
    written = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    archives._open_archives.clear()
    assert read(open_archive(path), "images/0/0.bin") == FILES["images/0/0.bin"]
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == written
    copied = [file for file in cache.iterdir() if file.suffix == ".content"]
    assert len(copied) == (name not in ("a.zip", "a.tar"))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compressed_members(tmp_path: Path, method: int) -> None:
    """Compressed members are decompressed, also from several pieces."""
    files = {"small.txt": b"a" * 1000, "noise.bin": os.urandom(70_000), "empty.bin": b""}
    archive = open_archive(write_file(tmp_path / "a.zip", zip_bytes(files, method)))
    assert {name: read(archive, name) for name in files} == files


def test_pieces_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that is larger than a piece is read in several."""
    monkeypatch.setattr(archives, "_PIECE_BYTES", 1000)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        data = (b"0123456789" * 700 + os.urandom(3000)) * 2
        archive = open_archive(write_file(tmp_path / f"{method}.zip", zip_bytes({"a": data}, method)))
        member = archive.find("a")
        assert member is not None
        pieces = list(archive.iter_content(member))
        assert b"".join(pieces) == data
        assert max(map(len, pieces)) <= 2000


def test_type_follows_from_the_content(tmp_path: Path) -> None:
    """DocVQA's train.tar.gz is a tar archive without compression; it needs no copy."""
    path = write_file(tmp_path / "train.tar.gz", tar_bytes(FILES))
    assert read(open_archive(path), "images/1/1.bin") == FILES["images/1/1.bin"]
    assert not list(tmp_path.glob("cache/*.content"))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("a.zip", "{path}.{number:03d}"),
        ("a.zip", "{path}.part-{letters}"),
        ("a.tar", "{path}.{number:02d}"),
        ("a.tar.gz", "{path}.part_{letters}"),
        ("a.tar.gz", "{path}.part{letters}"),
        ("a.zip", "part_{letters}"),
    ],
)
def test_parts_are_one_archive(tmp_path: Path, name: str, pattern: str) -> None:
    """Pieces of an archive are found by their names and read as one file; a member may extend over several."""
    parts = split(pack(tmp_path / name, FILES), 7, pattern)
    (found,) = list_archives(tmp_path)
    assert found.parts == tuple(parts)
    assert found == find_archive(parts[0])
    archive = open_archive(parts[0])
    assert {member: read(archive, member) for member in FILES} == FILES


def test_missing_part(tmp_path: Path) -> None:
    """A gap and a missing end are errors that say so; other files with an archive's name are left alone."""
    parts = split(pack(tmp_path / "a.zip", FILES), 4)
    parts[1].unlink()
    with pytest.raises(DataError, match=r"a part between a\.zip\.001 and a\.zip\.003 is missing"):
        open_archive(parts[0])
    parts = split(pack(tmp_path / "b.zip", FILES), 3)
    parts[2].unlink()
    with pytest.raises(DataError, match="central directory, which is at its end, is missing"):
        open_archive(parts[0])
    write_file(tmp_path / "other" / "a.zip.bak", b"PK")
    write_file(tmp_path / "other" / "department", b"PK")
    assert list_archives(tmp_path / "other") == []


def test_disks_of_a_zip(tmp_path: Path) -> None:
    """In the disks x.z01, ..., x.zip, positions count from the start of a disk."""
    data = bytearray(zip_bytes(FILES))
    end = data.rfind(b"PK\x05\x06")
    directory = struct.unpack_from("<L", data, end + 16)[0]
    cuts = [0, directory // 3, directory * 2 // 3, len(data)]
    cuts[2] = max(start for start in _local_headers(bytes(data)) if start <= cuts[2])  # a disk may begin with a member
    at = directory
    while data[at : at + 4] == b"PK\x01\x02":
        offset = struct.unpack_from("<L", data, at + 42)[0]
        disk = max(number for number in range(3) if cuts[number] <= offset)
        struct.pack_into("<H", data, at + 34, disk)
        struct.pack_into("<L", data, at + 42, offset - cuts[disk])
        at += 46 + sum(struct.unpack_from("<3H", data, at + 28))
    struct.pack_into("<2H", data, end + 4, 2, 2)
    struct.pack_into("<L", data, end + 16, directory - cuts[2])
    names = ["x.z01", "x.z02", "x.zip"]
    for number, name in enumerate(names):
        write_file(tmp_path / name, bytes(data[cuts[number] : cuts[number + 1]]))
    (found,) = list_archives(tmp_path)
    assert found.path == tmp_path / "x.zip"
    archive = open_archive(tmp_path / "x.zip")
    assert {member: read(archive, member) for member in FILES} == FILES
    (tmp_path / "x.z02").rename(tmp_path / "x.z03")
    archives._open_archives.clear()
    with pytest.raises(DataError, match=r"x\.z02 is missing"):
        open_archive(tmp_path / "x.zip")
    (tmp_path / "x.z03").unlink()
    with pytest.raises(DataError, match="its end names part 3 of 2"):
        open_archive(tmp_path / "x.zip")
    (tmp_path / "x.z01").unlink()
    with pytest.raises(DataError, match="it is the last of 3 parts"):
        open_archive(tmp_path / "x.zip")


def _local_headers(data: bytes) -> list[int]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [info.header_offset for info in archive.infolist()]


def test_zip64_and_data_before_the_archive(tmp_path: Path) -> None:
    """Sizes in the zip64 extra field are read, and an archive may follow other data, such as a program."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive, archive.open("a.bin", "w", force_zip64=True) as member:
        member.write(b"content")
    for name, prefix in (("plain.zip", b""), ("program.zip", b"#!/bin/sh\n" * 100)):
        path = write_file(tmp_path / name, stream.getvalue())
        if prefix:
            path.write_bytes(b"PK" + prefix + stream.getvalue())
        assert read(open_archive(path), "a.bin") == b"content"


def test_zip64_directory(tmp_path: Path) -> None:
    """A directory whose position is in the zip64 record is found."""
    data = bytearray(zip_bytes(FILES))
    end = data.rfind(b"PK\x05\x06")
    count, size, offset = struct.unpack_from("<H2L", data, end + 10)
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    struct.pack_into("<2H2L", data, end + 8, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    path = write_file(tmp_path / "a.zip", bytes(data[:end]) + record + locator + bytes(data[end:]))
    assert zipfile.ZipFile(path).namelist() == list(FILES)
    assert read(open_archive(path), "images/2/2.bin") == FILES["images/2/2.bin"]


def test_names(tmp_path: Path) -> None:
    """Names are compared without `./`, with either separator and in either Unicode form; then without case, if that is
    unambiguous. The last of several members with one name is read."""
    files = {"./a.bin": b"1", "b\\C.bin": b"2", "Cafe\u0301.bin": b"3", "x/Y.bin": b"4", "x/y.bin": b"5", "D.BIN": b"6"}
    names = ("a.bin", "b/C.bin", "caf\u00e9.bin".title(), "x/Y.bin", "d.bin")
    for path in (write_file(tmp_path / "a.zip", zip_bytes(files)), pack(tmp_path / "a.tar", files)):
        archive = open_archive(path)
        assert [read(archive, name) for name in names] == [b"1", b"2", b"3", b"4", b"6"]
        assert archive.find("X/y.bin") is None  # two members differ from it in case
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as twice:
        twice.writestr("a.bin", b"old")
        with pytest.warns(UserWarning, match="Duplicate name"):
            twice.writestr("a.bin", b"new")
    assert read(open_archive(write_file(tmp_path / "twice.zip", stream.getvalue())), "a.bin") == b"new"


def test_members_outside_are_never_read(tmp_path: Path) -> None:
    """Absolute paths and `..` are left out, in names and in what is asked for; links lead to members only."""
    files = {"/etc/passwd": b"1", "../up.bin": b"2", "a/../../up.bin": b"3", "C:/x.bin": b"4", "in.bin": b"5"}
    archive = open_archive(write_file(tmp_path / "a.zip", zip_bytes(files)))
    assert archive.num_members == 1
    for name in (*files, "etc/passwd", "x.bin", "up.bin", "a\0b"):
        assert (archive.find(name) is not None) == (name == "in.bin")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:") as tar:
        info = tarfile.TarInfo("d/in.bin")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
        for name, kind, target in [
            ("hard.bin", tarfile.LNKTYPE, "d/in.bin"),
            ("soft.bin", tarfile.SYMTYPE, "d/in.bin"),
            ("d/near.bin", tarfile.SYMTYPE, "./in.bin"),
            ("abs.bin", tarfile.SYMTYPE, "/etc/passwd"),
            ("up.bin", tarfile.SYMTYPE, "../../etc/passwd"),
            ("gone.bin", tarfile.SYMTYPE, "d/none.bin"),
        ]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    for name in ("b.tar", "b.tar.gz"):
        archive = open_archive(pack_bytes(tmp_path / name, stream.getvalue()))
        assert [read(archive, link) for link in ("hard.bin", "soft.bin", "d/near.bin")] == [b"abc"] * 3
        assert [archive.find(link) for link in ("abs.bin", "up.bin", "gone.bin")] == [None] * 3


def pack_bytes(path: Path, tar: bytes) -> Path:
    """Write a finished tar archive, compressed if its extension says so."""
    return write_file(path, zlib.compress(tar, wbits=31) if path.suffix == ".gz" else tar)


def test_links_in_a_zip_are_left_out(tmp_path: Path) -> None:
    """A symbolic link in a zip archive is not a file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        link = zipfile.ZipInfo("link.bin")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("in.bin", b"x")
    opened = open_archive(write_file(tmp_path / "a.zip", stream.getvalue()))
    assert (opened.num_members, opened.find("link.bin")) == (1, None)


@pytest.mark.parametrize("name", TYPES)
def test_truncated_archives(tmp_path: Path, name: str) -> None:
    """An interrupted download is one error with the file's name, and leaves nothing behind."""
    whole = pack(tmp_path / "whole" / name, FILES).read_bytes()
    for share in (0.3, 0.9):
        path = write_file(tmp_path / f"{share}" / name, whole[: int(share * len(whole)) // 512 * 512 - 100])
        with pytest.raises(DataError, match=rf"{name} is incomplete or damaged: .*Download it again\."):
            open_archive(path)
    assert [file.name for file in (tmp_path / "cache").iterdir() if not file.name.endswith(".lock")] == []


def test_damaged_header_in_a_tar(tmp_path: Path) -> None:
    """A damaged header is not the end of the archive."""
    data = bytearray(tar_bytes({f"{number}.bin": b"x" * 600 for number in range(5)}))
    data[2 * 1536 : 2 * 1536 + 512] = os.urandom(512)
    for name in ("a.tar", "a.tar.gz"):
        with pytest.raises(DataError, match="incomplete or damaged: a header is damaged"):
            open_archive(pack_bytes(tmp_path / name, bytes(data)))


def test_damaged_member(tmp_path: Path) -> None:
    """A member whose checksum, size or method is wrong is an error of this member; others are read."""
    files = {"a.bin": b"a" * 3000, "b.bin": os.urandom(3000)}
    data = bytearray(zip_bytes(files, zipfile.ZIP_DEFLATED))
    at = data.find(b"b.bin") + 5
    data[at + 1000] ^= 1
    archive = open_archive(write_file(tmp_path / "a.zip", bytes(data)))
    member = archive.find("b.bin")
    assert member is not None
    with pytest.raises(OSError, match=r"is damaged in a\.zip|cannot be read from a\.zip"):
        archive.read(member)
    assert read(archive, "a.bin") == files["a.bin"]
    for changes, message in (
        ({"num_bytes": 10}, "damaged"),
        ({"method": 14}, "compression method 14 is not supported"),
        ({"method": -1}, "encrypted"),
        ({"offset": 5}, "there is no member where the directory says"),
        ({"offset": 10**9}, "there is no member where the directory says"),
    ):
        member = archive.find("a.bin")
        assert member is not None
        with pytest.raises(OSError, match=message):
            archive.read(member._replace(**changes))  # type: ignore[arg-type]


def test_false_size_needs_no_memory(tmp_path: Path) -> None:
    """A member that decompresses to more than it says is stopped after the first piece."""
    archive = open_archive(write_file(tmp_path / "a.zip", zip_bytes({"a": b"\0" * 10**6}, zipfile.ZIP_DEFLATED)))
    member = archive.find("a")
    assert member is not None
    pieces: list[bytes] = []
    with pytest.raises(OSError, match="damaged"):
        pieces.extend(archive.iter_content(member._replace(num_bytes=100)))
    assert sum(map(len, pieces)) <= 100


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a git-lfs pointer, not the file"),
        (b"<!DOCTYPE html><html>Sign in</html>", "an HTML page"),
        (b"", "empty"),
        (b"\x01\x02\x03" * 400, "neither a zip nor a tar archive"),
    ],
)
def test_other_files_are_named(tmp_path: Path, data: bytes, kind: str) -> None:
    """A file that is no archive is named by what it is."""
    path = write_file(tmp_path / "images.zip", data)
    with pytest.raises(DataError, match=f"is {kind}; download it again"):
        open_archive(path)


def test_changed_archive(tmp_path: Path) -> None:
    """A replaced archive has another index."""
    path = write_file(tmp_path / "a.zip", zip_bytes({"a": b"old"}))
    assert read(open_archive(path), "a") == b"old"
    write_file(path, zip_bytes({"a": b"newer"}))
    assert read(open_archive(path), "a") == b"newer"


def test_after_a_fork(tmp_path: Path) -> None:
    """A forked process opens its own files, and reads the same."""
    path = pack(tmp_path / "a.zip", FILES)
    open_archive(path)
    process = os.fork()
    if process == 0:
        is_right = read(open_archive(path), "images/2/29.bin") == FILES["images/2/29.bin"]
        os._exit(0 if is_right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert read(open_archive(path), "images/0/0.bin") == FILES["images/0/0.bin"]


def test_no_space_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompressing stops before the disk is full, with the numbers."""
    path = pack(tmp_path / "a.tar.gz", FILES)
    monkeypatch.setattr("data_recipes.raw.archives.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match=r"decompressed copy needs at least .* which has 0\.0 MiB"):
        open_archive(path)


def test_open_archives_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used archive is closed; it opens again."""
    monkeypatch.setattr(archives, "_MAX_OPEN_ARCHIVES", 3)
    paths = [pack(tmp_path / f"{number}.zip", {"a": str(number).encode()}) for number in range(8)]
    num_files = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        assert [read(open_archive(path), "a") for path in paths] == [str(number).encode() for number in range(8)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= num_files + 3 * 2


def test_normalize_name() -> None:
    """Paths below the archive's top are normalized; others are None."""
    assert normalize_name("./a//b/./c.png") == "a/b/c.png"
    for name in ("", ".", "/a", "\\a", "a/../b", "C:\\a", "a\0"):
        assert normalize_name(name) is None
    assert normalize_name("\udc80.png") == "\\udc80.png"


@pytest.mark.full
def test_archives_of_other_programs(tmp_path: Path) -> None:
    """Archives of GNU tar (long names, sparse files) and of Info-ZIP (disks) are read, where these programs exist."""
    folder = tmp_path / "images"
    files = {f"{'deep/' * 30}{number}{'x' * 90}.bin": os.urandom(40_000) for number in range(12)}
    for name, data in files.items():
        write_file(folder / name, data)
    subprocess.run(["tar", "-cf", "images.tar", "images"], cwd=tmp_path, check=True)
    archive = open_archive(tmp_path / "images.tar")
    assert {name: read(archive, f"images/{name}") for name in files} == files
    if subprocess.run(["which", "zip"], capture_output=True, check=False).returncode:
        return
    subprocess.run(["zip", "-q", "-r", "-s", "100k", "images.zip", "images"], cwd=tmp_path, check=True)
    assert (tmp_path / "images.z01").exists()
    archive = open_archive(tmp_path / "images.zip")
    assert {name: read(archive, f"images/{name}") for name in files} == files
