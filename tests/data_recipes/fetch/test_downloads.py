"""The entries of `download` in a source's YAML are validated, and change no digest of a prepared store."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes.schema.downloads import HubDownload, PageDownload, UrlDownload
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import describe_source, read_source

SOURCE: dict[str, Any] = {"reader": "llava_json", "root": "mine", "options": {"annotations": "a.json"}}


def write(folder: Path, download: Any = None) -> Path:
    """Write the source with this value of `download`; return the folder of YAML files."""
    (folder / "source").mkdir(exist_ok=True)
    values = SOURCE if download is None else SOURCE | {"download": download}
    (folder / "source" / "mine.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_entries_are_read(tmp_path: Path) -> None:
    """All three kinds, with their defaults; they are not part of what a store is made of."""
    plain = read_source(write(tmp_path), "mine")
    entries = [
        {"hub": "datasets/org/name"},
        {"url": "https://example.org/a.zip", "to": "images/a.zip", "bytes": 12},
        {"page": "https://example.org/register", "files": ["train.json"], "why": "registration", "gated": True},
    ]
    source = read_source(write(tmp_path, entries), "mine")
    assert source.download == (
        HubDownload("datasets/org/name"),
        UrlDownload("https://example.org/a.zip", "images/a.zip", bytes=12),
        PageDownload("https://example.org/register", ("train.json",), "registration", gated=True),
    )
    assert source.recipe_digest() == plain.recipe_digest()
    assert describe_source(source) == describe_source(plain)


HUB, URL, PAGE = {"hub": "datasets/o/n"}, {"url": "https://a.org/b", "to": "b"}, {"page": "https://a.org", "why": "x"}
WRONG: dict[str, tuple[Any, str]] = {
    "no list": ({"hub": "datasets/o/n"}, "must be list"),
    "no mapping": (["datasets/o/n"], "entry 1 of `download` must be a mapping"),
    "no kind": ([{"to": "."}], "exactly one of"),
    "two kinds": ([HUB | URL], "exactly one of"),
    "unknown key": ([HUB | {"unpack": True}], "unknown key 'unpack'"),
    "no type of repository": ([{"hub": "org/name"}], "datasets/ORG/NAME"),
    "path out of the root": ([URL | {"to": "../b"}], "`to` is '../b'"),
    "absolute path": ([HUB | {"to": "/etc"}], "`to` is '/etc'"),
    "files out of the root": ([HUB | {"files": ["../*"]}], "`files`"),
    "no files": ([HUB | {"files": []}], "`files`"),
    "files of a page": ([PAGE], "'files'"),
    "place of a URL": ([{"url": "https://a.org/b"}], "`to` is missing"),
    "folder as a file": ([URL | {"to": "."}], "path of a file"),
    "scheme": ([URL | {"url": "file:///etc/passwd"}], "http or https"),
    "password": ([URL | {"url": "https://me:secret@a.org/b"}], "without a user name"),
    "size": ([URL | {"bytes": "12"}], "a size in bytes"),
    "digest": ([URL | {"sha256": "AB"}], "64 hexadecimal digits"),
    "revision as a number": ([HUB | {"revision": 1}], "in quotes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_entries_are_refused(tmp_path: Path, name: str) -> None:
    """In one sentence with the file and the rule."""
    value, part = WRONG[name]
    with pytest.raises(DataError) as caught:
        read_source(write(tmp_path, value), "mine")
    assert part in str(caught.value)
    assert str(caught.value).startswith("configs/source/mine.yaml")
    assert "\n" not in str(caught.value)
