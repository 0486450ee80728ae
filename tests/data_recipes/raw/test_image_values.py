"""Tests of the values by which records name an image: paths, bytes, base64 text and objects with one of them."""

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data_recipes.raw.image_files import ImageError, load_image, resolve_image, resolve_images
from data_recipes.schema.sample import ArchiveMember, Reason
from tests.data_recipes.archive_files import pack
from tests.data_recipes.raw_folders import make_image, write_file

PNG, JPEG = make_image(1), make_image(2, kind="JPEG")
BASE64 = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{BASE64}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image root with files, links and an archive, and files beside it that must never be read."""
    folder = tmp_path_factory.mktemp("values")
    write_file(folder / "secret.png", make_image(99))
    root = folder / "root"
    write_file(root / "images" / "1.png", PNG)
    write_file(root / "images" / "b\\c.png", JPEG)
    (root / "up.png").symlink_to(folder / "secret.png")
    (root / "elsewhere").symlink_to(folder)
    pack(root / "packed.zip", {"1.png": PNG, "../secret.png": PNG})
    return root


@pytest.mark.parametrize(
    "value",
    [
        PNG,
        bytearray(PNG),
        URI,
        URI.replace("image/png", ""),
        "data:image;base64," + BASE64.rstrip("="),
        "DATA:image/png;BASE64," + "\n".join(BASE64[start : start + 76] for start in range(0, len(BASE64), 76)),
        BASE64,
        {"bytes": PNG, "path": "../../etc/hosts"},
        {"bytes": BASE64},
        {"bytes": URI},
        {"url": URI},
        {"image": URI, "type": "image"},
        {"type": "image_url", "image_url": {"url": URI}},
    ],
)
def test_bytes_of_a_record(root: Path, value: object) -> None:
    """Bytes, data URIs and base64 text, also inside objects, are the image."""
    assert resolve_image(value, root) == PNG


@pytest.mark.parametrize(
    "value",
    [
        "images/1.png",
        "./images//1.png",
        "images\\1.png",
        ".\\images\\1.png",
        "ABSOLUTE/images/1.png",
        "file://ABSOLUTE/images/1.png",
        "file://localhostABSOLUTE/images/%31.png",
        {"path": "images/1.png"},
        {"bytes": None, "path": "images/1.png"},
        {"image": "images/1.png"},
        {"url": "images/1.png"},
        {"image_url": {"url": "images/1.png"}},
    ],
)
def test_paths_of_a_record(root: Path, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may be relative or absolute and have either separator; a relative root means the same."""
    value = json.loads(json.dumps(value).replace("ABSOLUTE", str(root)))
    assert resolve_image(value, root) == root / "images" / "1.png"
    monkeypatch.chdir(root.parent)
    assert resolve_image(value, Path("root")) == Path("root/images/1.png")


def test_absolute_paths_through_links(root: Path, tmp_path: Path) -> None:
    """An absolute path is below the root also if one of them leads through a link."""
    link = tmp_path / "link"
    link.symlink_to(root)
    assert resolve_image(str(link / "images/1.png"), root) == root / "images/1.png"
    assert resolve_image(str(root / "images/1.png"), link) == link / "images/1.png"


def test_backslash_in_a_file_name(root: Path) -> None:
    """A file whose name has a backslash is found by it."""
    assert load_image(resolve_image("images/b\\c.png", root)).data == JPEG


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, Reason.NOT_A_STRING),
        (3, Reason.NOT_A_STRING),
        (["a.png"], Reason.NOT_A_STRING),
        ({}, Reason.NOT_A_STRING),
        ({"bytes": None, "path": None}, Reason.NOT_A_STRING),
        ({"image": {"image": {"image": {"image": {"image": "a.png"}}}}}, Reason.NOT_A_STRING),
        ("https://example.org/a.png", Reason.IMAGE_NOT_LOCAL),
        ("HTTP://example.org/a.png", Reason.IMAGE_NOT_LOCAL),
        ("s3://bucket/a.png", Reason.IMAGE_NOT_LOCAL),
        ("file://server/a.png", Reason.IMAGE_NOT_LOCAL),
        ({"image_url": {"url": "https://example.org/a.png"}}, Reason.IMAGE_NOT_LOCAL),
        ("data:image/png;base64,%%%", Reason.IMAGE_UNREADABLE),
        ("data:image/svg+xml,<svg/>", Reason.IMAGE_UNREADABLE),
        ("data:image/png;base64", Reason.IMAGE_UNREADABLE),
        ({"bytes": "images/1.png"}, Reason.IMAGE_UNREADABLE),
        ("x" * 256 + ".jpg", Reason.IMAGE_MISSING),
        ("images/" * 800 + "1.png", Reason.IMAGE_MISSING),
        ("x" * 252 + "/1.png", Reason.IMAGE_MISSING),
        ("\N{SNOWMAN}" * 86, Reason.IMAGE_MISSING),
        ("a\0.png", Reason.PATH_OUTSIDE_ROOT),
        ("/etc/hosts", Reason.PATH_OUTSIDE_ROOT),
        ("file:///etc/hosts", Reason.PATH_OUTSIDE_ROOT),
        ("file:///%2e%2e/etc/hosts", Reason.PATH_OUTSIDE_ROOT),
        ("C:\\images\\1.png", Reason.PATH_OUTSIDE_ROOT),
        ("images\\..\\..\\secret.png", Reason.PATH_OUTSIDE_ROOT),
        ("~/a.png", Reason.PATH_OUTSIDE_ROOT),
        ("up.png", Reason.PATH_OUTSIDE_ROOT),
        ("elsewhere/secret.png", Reason.PATH_OUTSIDE_ROOT),
        ("\ud83d.png", Reason.WRONG_ENCODING),
    ],
)
def test_values_that_are_rejected(root: Path, value: object, reason: Reason) -> None:
    """Each value that is no image below the root has a reason, in a message of one short line."""
    with pytest.raises(ImageError) as caught:
        load_image(resolve_image(value, root))
    assert caught.value.reason is reason
    assert len(caught.value.detail) < 300
    assert caught.value.detail.isprintable()


def test_absolute_path_outside_by_its_prefix(root: Path) -> None:
    """`/data/images_2` is not below `/data/images`."""
    write_file(root.with_name("root_2") / "1.png", PNG)
    with pytest.raises(ImageError) as caught:
        resolve_image(f"{root}_2/1.png", root)
    assert caught.value.reason is Reason.PATH_OUTSIDE_ROOT


def test_large_base64(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base64 text beyond the limit is not decoded."""
    monkeypatch.setattr("data_recipes.raw.image_files.MAX_BYTES", 100)
    with pytest.raises(ImageError) as caught:
        resolve_image(URI, root)
    assert caught.value.reason is Reason.IMAGE_TOO_LARGE


def test_long_text_is_checked_in_linear_time(root: Path) -> None:
    """A megabyte of white space and letters that is not base64 is rejected at once."""
    for text in (" " * 10**6 + "!", "a b" * 300_000 + "!", "=" * 10**6):
        with pytest.raises(ImageError) as caught:
            resolve_image(text, root)
        assert caught.value.reason is Reason.IMAGE_MISSING


NAMES = st.sampled_from(
    ["images", "1.png", "..", ".", "~", "", "up.png", "elsewhere", "packed", "secret.png", "C:", "IMAGES"]
)
PATHS = st.builds(
    lambda start, parts, separator: start + separator.join(parts),
    st.sampled_from(["", "/", "\\", "./", "file://", "file:///", "https://", "//"]),
    st.lists(NAMES | st.text(max_size=4), max_size=5),
    st.sampled_from(["/", "\\", "//"]),
)
TEXTS = (
    PATHS
    | st.text(max_size=300)
    | st.builds("data:{},{}".format, st.sampled_from(["image/png;base64", ";base64", ""]), st.text(max_size=40))
    | st.sampled_from([URI, BASE64, BASE64[:-7], "images/1.png", "packed/1.png", "x" * 300, "a\0b"])
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=40) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["bytes", "path", "image", "image_url", "url", "type", "x"]) | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def outcome(function: Callable[[], Any]) -> Any:
    """Return the result of a function, or its ImageError; other exceptions fail the test."""
    try:
        return function()
    except ImageError as error:
        return error


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=VALUES)
@example(value="\udcff/\ud800")
@example(value="\U0010ffff" * 100)
@example(value={"path": ["images/1.png"]})
def test_any_value_is_an_image_or_a_reason(root: Path, value: Any) -> None:
    """No value ends the program, none leads outside the root, and no message prints more than a part of a line."""
    images = outcome(lambda: resolve_images(value, root))
    if isinstance(images, ImageError):
        assert 0 < len(images.detail) < 300
        assert images.detail.isprintable()
        return
    for image in images:
        if isinstance(image, Path):
            real = os.path.realpath(image)
            assert real == str(root) or real.startswith(f"{root}/")
        elif isinstance(image, ArchiveMember):
            assert image.archive == root / "packed.zip"
        loaded = outcome(lambda image=image: load_image(image))  # type: ignore[misc]
        if isinstance(loaded, ImageError):
            assert 0 < len(loaded.detail) < 400
        else:
            assert loaded.data != make_image(99)
