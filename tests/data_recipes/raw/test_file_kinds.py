"""Tests of naming files by their first bytes."""

import io
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_recipes.raw.file_kinds import HEAD_BYTES, describe_file_kind, is_heif
from data_recipes.raw.image_files import FORMATS, ImageError, load_image
from data_recipes.schema.sample import Reason
from tests.data_recipes.archive_files import tar_bytes
from tests.data_recipes.raw_folders import make_image, write_file

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100
AVIF = b"\0\0\0\x1cftypavif\0\0\0\0mif1avifmiaf" + b"\0" * 100


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:8\nsize 20176754\n",
            "a git-lfs pointer, not the file",
        ),
        (b"\n <!DOCTYPE html>\n<html>", "an HTML page"),
        (b"\xef\xbb\xbf<html lang='en'>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
        (b"<?xml version='1.0'?>\n<svg width='1'/>", "an SVG drawing"),
        (b"<svg xmlns=''>", "an SVG drawing"),
        (b"\x1f\x8b\x08\0rest", "gzip data"),
        (b"PK\x03\x04rest", "a zip archive"),
        (tar_bytes({"a": b"b"})[:HEAD_BYTES], "a tar archive"),
        (b"%PDF-1.7", "a PDF document"),
        (HEIC, "a HEIC/HEIF image"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2avc1mp41", "an MP4 or QuickTime video"),
        (b"RIFF\0\0\0\0WAVEfmt ", "WAV sound"),
        (bytes(100), "filled with zero bytes, as by an interrupted download"),
    ],
)
def test_kinds(data: bytes, kind: str) -> None:
    """Kinds that replace expected files are named."""
    assert describe_file_kind(data) == kind


def test_expected_files_have_no_kind(tmp_path: Path) -> None:
    """Data in the expected formats is not named: JSON, text, parquet and every image format that is read."""
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    heads = [
        json.dumps([{"id": 1}]).encode(),
        b"\xef\xbb\xbf[]",
        b"a,b\n1,2\n",
        (tmp_path / "a.parquet").read_bytes(),
        AVIF,
    ]
    for name in FORMATS:
        stream = io.BytesIO()
        Image.new("RGB", (16, 16), "red").save(stream, name)
        heads.append(stream.getvalue())
    assert [describe_file_kind(head[:HEAD_BYTES]) for head in heads] == [None] * len(heads)
    assert is_heif(HEIC)
    assert not is_heif(AVIF)


@pytest.mark.parametrize("length", range(0, 40, 3))
def test_short_heads(length: int) -> None:
    """Truncated heads are described without an error."""
    for head in (HEIC, AVIF, b"RIFF1234WEBP", b"<?xml", make_image(1), b"\xff" * 40):
        describe_file_kind(head[:length])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:8\nsize 2\n", "a git-lfs pointer, not the file"),
        (b"<html>404</html>", "an HTML page, not an image"),
        (b"\x1f\x8b\x08\0rest", "gzip data, not an image"),
        (b"Not Found", "text that begins with 'Not Found', not an image"),
        (b"\x01\x02\x03\x04", "none of JPEG, PNG"),
    ],
)
def test_undecodable_images_are_named(tmp_path: Path, data: bytes, words: str) -> None:
    """The detail of an unreadable image says what the file is."""
    with pytest.raises(ImageError) as caught:
        load_image(write_file(tmp_path / "a.jpg", data))
    assert caught.value.reason is Reason.IMAGE_UNREADABLE
    assert caught.value.detail.startswith(f"a.jpg: {words}")


def test_heif_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A HEIC image is named with the command that installs what reads it."""
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    for image in (HEIC, write_file(tmp_path / "a.heic", HEIC)):
        with pytest.raises(ImageError) as caught:
            load_image(image)
        assert caught.value.reason is Reason.IMAGE_UNREADABLE
        assert "a HEIC/HEIF image, which needs the package pillow-heif: ./scripts/setup.sh --extras heif" in (
            caught.value.detail
        )


def test_heif_is_converted(tmp_path: Path) -> None:
    """A HEIC image is stored as a PNG of its pixels; a damaged one is rejected."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif: ./scripts/setup.sh --extras heif")
    picture = Image.new("RGB", (64, 48), (200, 40, 10))
    stream = io.BytesIO()
    pillow_heif.from_pillow(picture).save(stream, quality=100)
    data = stream.getvalue()
    loaded = load_image(write_file(tmp_path / "a.heic", data))
    assert (loaded.info.format, loaded.info.height, loaded.info.width) == ("PNG", 48, 64)
    assert loaded.notes == ("converted_from_heif",)
    assert all(
        abs(one - other) < 8
        for one, other in zip(Image.open(io.BytesIO(loaded.data)).getpixel((9, 9)), (200, 40, 10), strict=True)  # type: ignore[arg-type]
    )
    assert load_image(write_file(tmp_path / "b.jpg", data)).notes == ("converted_from_heif",)
    for broken in (data[: len(data) // 2], data[:200]):
        with pytest.raises(ImageError) as caught:
            load_image(broken)
        assert caught.value.reason is Reason.IMAGE_UNREADABLE


def test_zip_is_not_an_image(tmp_path: Path) -> None:
    """An archive in place of an image is named too."""
    with zipfile.ZipFile(tmp_path / "a.png", "w") as archive:
        archive.writestr("a", b"x")
    with pytest.raises(ImageError, match="a zip archive, not an image"):
        load_image(tmp_path / "a.png")
