"""`python -m data_recipes.fetch` through the hub's own client against a hub on loopback."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub_server import TOKEN, ClientProcess, Ended, Fault, Hub, running_hub

RECORDS = b'[{"id": "1"}]'
IMAGES = bytes(range(256)) * 10_000
STORED = f"/storage/{hashlib.sha256(IMAGES).hexdigest()}"
PAGE = "https://example.org/register"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, ClientProcess]]:
    """A hub and its client for all tests."""
    with running_hub(tmp_path_factory.mktemp("home")) as running:
        yield running


class Workspace:
    """A folder with YAML files and raw folders, and the program."""

    def __init__(self, folder: Path, hub: Hub, client: ClientProcess) -> None:
        self.folder, self.hub, self._client = folder, hub, client
        self.raw = folder / "raw"

    def source(self, name: str, *download: Mapping[str, Any], root: str = "mine") -> None:
        """Writes a source's YAML."""
        self._write("source", name, {"reader": "llava_json", "root": root, "download": [*download]})

    def mixture(self, name: str, *sources: str) -> None:
        """Writes a mixture's YAML."""
        self._write("mixture", name, {"name": name, "sources": {source: {"count": None} for source in sources}})

    def _write(self, group: str, name: str, values: Mapping[str, Any]) -> None:
        path = self.folder / "configs" / group / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dict(values)))

    def fetch(self, *arguments: str, raw: Path | None = None, token: str | None = None) -> Ended:
        """Runs the program on these sources or this mixture."""
        words = [*arguments, "--raw", str(raw or self.raw), "--configs", str(self.folder / "configs")]
        ended = self._client.run("data_recipes.fetch.__main__", words, HF_TOKEN=token)
        assert TOKEN not in ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        return ended

    def content(self, raw: Path | None = None) -> dict[str, bytes]:
        """The files below the raw folder, without lock files."""
        folder = raw or self.raw
        files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock.json"))
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    def lock(self, raw: Path | None = None) -> dict[str, Any]:
        """The files of the lock file."""
        files = json.loads(((raw or self.raw) / "fetch.lock.json").read_text())["files"]
        assert isinstance(files, dict)
        return files


@pytest.fixture
def space(servers: tuple[Hub, ClientProcess], tmp_path: Path) -> Workspace:
    """A workspace, and a hub without faults that has two repositories and a file."""
    hub, client = servers
    hub.repositories.clear()
    hub.faults, hub.requests = [], []
    hub.files = {"extra.zip": IMAGES[::-1]}
    files = {
        "README.md": b"card",
        "raw/mix.json": RECORDS,
        "raw/a.zip": IMAGES,
        "raw/b.zip": IMAGES[:999],
        "x/y.bin": b"y",
    }
    hub.add("datasets/org/data", files, licence="apache-2.0")
    return Workspace(tmp_path, hub, client)


DATA = {"hub": "datasets/org/data", "folder": "raw", "files": ["mix.json", "*.zip"]}
EXPECTED = {"mine/mix.json": RECORDS, "mine/a.zip": IMAGES, "mine/b.zip": IMAGES[:999]}


def test_several_mixtures_share_files(space: Workspace) -> None:
    """The files of all their sources are fetched, each once."""
    space.source("both", DATA)
    space.source("second", {"hub": "datasets/org/data", "folder": "x", "files": ["*"]}, root="other")
    space.mixture("first", "both")
    space.mixture("other", "both", "second")
    assert space.fetch("--mixture", "first", "other").code == 0
    assert space.content() == EXPECTED | {"other/y.bin": b"y"}


def test_a_mixture_is_shown_then_fetched_then_complete(space: Workspace) -> None:
    """Two sources share a repository, which is fetched once; what must be fetched by hand decides the exit code."""
    url = {"url": f"{space.hub.url}/files/extra.zip", "to": "more/extra.zip", "licence": "CC-BY-4.0"}
    page = {"page": PAGE, "files": ["train.json"], "why": "registration", "to": "by_hand"}
    space.source("one", DATA, url)
    space.source("two", DATA, page)
    space.mixture("both", "one", "two")
    shown = space.fetch("--mixture", "both", "--dry-run")
    assert (shown.code, shown.stderr) == (0, "")
    for part in ("3 files", "apache-2.0", "CC-BY-4.0", "one, two", PAGE, "registration", "4.9 MiB", "free"):
        assert part in shown.stdout
    assert not space.raw.exists()
    assert space.hub.downloads() == []
    first = space.fetch("--mixture", "both")
    assert first.code == 2
    assert f"put train.json into {space.raw}/mine/by_hand" in first.stderr
    assert space.content() == EXPECTED | {"mine/more/extra.zip": IMAGES[::-1]}
    assert len(space.hub.downloads()) == 4
    before = len(space.hub.requests)
    (space.raw / "mine" / "by_hand").mkdir()
    (space.raw / "mine" / "by_hand" / "train.json").write_bytes(b"[]")
    again = space.fetch("--mixture", "both")
    assert (again.code, again.stderr) == (0, "")
    assert space.hub.downloads(before) == []


def test_the_lock_file_pins_what_was_fetched(space: Workspace) -> None:
    """A publisher's later commit is not mixed into a folder that has a lock file; another folder gets it, or with
    --locked exactly the first one."""
    space.source("one", DATA)
    assert space.fetch("--source", "one").code == 0
    locked = space.lock()["mine/a.zip"]
    first = next(iter(space.hub.repositories["datasets/org/data"].commits))
    assert (locked["revision"], locked["size"], locked["source"]) == (first, len(IMAGES), "datasets/org/data")
    space.hub.repositories["datasets/org/data"].push({"raw/mix.json": b"[]", "raw/a.zip": b"new", "raw/b.zip": b"b"})
    (space.raw / "mine" / "b.zip").unlink()
    assert space.fetch("--source", "one").code == 0
    assert space.content() == EXPECTED
    newer, same = space.folder / "newer", space.folder / "same"
    assert space.fetch("--source", "one", raw=newer).code == 0
    assert space.content(newer)["mine/a.zip"] == b"new"
    lock = str(space.raw / "fetch.lock.json")
    assert space.fetch("--source", "one", "--locked", lock, raw=same).code == 0
    assert space.content(same) == EXPECTED
    differing = space.fetch("--source", "one", "--locked", lock, raw=newer)
    assert differing.code == 1
    assert "mine/a.zip is not as" in differing.stderr or "mine/b.zip is not as" in differing.stderr
    assert space.content(newer)["mine/a.zip"] == b"new"
    space.source("other", {"hub": "datasets/org/data", "folder": "x"}, root="elsewhere")
    foreign = space.fetch("--source", "other", "--locked", lock)
    assert foreign.code == 2
    assert "written for other sources" in foreign.stderr


def test_a_changed_url_is_named(space: Workspace) -> None:
    """With --locked, a file that the publisher has replaced is an error, and the file is not put at its place."""
    space.source("one", {"url": f"{space.hub.url}/files/extra.zip", "to": "extra.zip"})
    assert space.fetch("--source", "one").code == 0
    space.hub.files["extra.zip"] = IMAGES  # of the same size
    other = space.folder / "other"
    changed = space.fetch("--source", "one", "--locked", str(space.raw / "fetch.lock.json"), raw=other)
    assert changed.code == 1
    assert "mine/extra.zip" in changed.stderr
    assert "sha256" in changed.stderr
    assert space.content(other) == {}


def test_wrong_content_is_not_kept(space: Workspace) -> None:
    """A file of the right size with another digest ends the fetch; the next one fetches it again, and only it."""
    space.source("one", DATA)
    space.hub.faults = [Fault("/storage/", content=IMAGES[::-1][: len(IMAGES)])]
    space.hub.repositories["datasets/org/data"].push({"raw/mix.json": RECORDS, "raw/a.zip": IMAGES})
    failed = space.fetch("--source", "one", "--threads", "1")
    assert failed.code == 1
    assert "mine/a.zip" in failed.stderr
    assert "sha256" in failed.stderr
    assert "mine/a.zip" not in space.content()
    assert space.fetch("--source", "one").code == 0
    assert space.content()["mine/a.zip"] == IMAGES


def test_busy_servers_and_cut_connections_are_survived(space: Workspace) -> None:
    """The listing, a page of it, and a file are refused with 429 or 5xx; a transfer is cut, and continued."""
    large = bytes(11 << 20)  # more than the client writes at once
    space.hub.repositories["datasets/org/data"].push({"raw/mix.json": RECORDS, "raw/a.zip": large})
    space.hub.faults = [
        Fault("^/api/datasets/org/data/revision", status=429, headers={"Retry-After": "0"}),
        Fault("/tree/", status=503, times=2),
        Fault("/resolve/", method="HEAD", status=429, headers={"Retry-After": "0"}, times=2),
        Fault("/storage/", cut_after=len(large) - 1),
    ]
    space.source("one", DATA)
    ended = space.fetch("--source", "one")
    assert ended.code == 0, ended.stderr
    assert space.content() == {"mine/mix.json": RECORDS, "mine/a.zip": large}
    assert any("range" in each.headers for each in space.hub.requests if each.server == "storage")


def test_a_gated_repository_needs_an_account(space: Workspace) -> None:
    """Without one it is shown and refused with its page, and the rest is fetched; with a token it is fetched, and the
    token goes to the hub only."""
    space.hub.add("datasets/org/gated", {"a.zip": IMAGES}, gated=True)
    gated = {"hub": "datasets/org/gated", "to": "gated"}
    space.source("one", DATA, gated)
    shown = space.fetch("--source", "one", "--dry-run")
    assert f"{space.hub.url}/datasets/org/gated" in shown.stdout
    refused = space.fetch("--source", "one")
    assert refused.code == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "HF_TOKEN" in refused.stderr
    assert space.content() == EXPECTED
    granted = space.fetch("--source", "one", token=TOKEN)
    assert granted.code == 0, granted.stderr
    assert space.content()["mine/gated/a.zip"] == IMAGES
    assert any(each.headers.get("authorization") for each in space.hub.requests if each.server == "hub")
    assert not any(each.headers.get("authorization") for each in space.hub.requests if each.server == "storage")
    wrong = space.fetch("--source", "one", token="hf_wrong")
    assert wrong.code == 2
    assert "refuses the token" in wrong.stderr


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"hub": "datasets/org/nothing"}, "no such repository"),
        ({"hub": "datasets/org/private"}, "no such repository"),
        ({"hub": "datasets/org/data", "revision": "v9"}, "no branch, tag or commit v9"),
        ({"hub": "datasets/org/data", "files": ["none.json"]}, "has no file none.json"),
    ],
    ids=["missing", "private", "revision", "file"],
)
def test_what_is_not_there_is_one_sentence(space: Workspace, entry: dict[str, Any], part: str) -> None:
    """Exit code 2, and what the other source names is fetched."""
    space.hub.add("datasets/org/private", {"a.json": b"[]"}, private=True)
    space.source("absent", entry, root="absent")
    space.source("one", DATA)
    ended = space.fetch("--source", "absent", "one")
    assert ended.code == 2
    assert len(ended.stderr.splitlines()) == 1
    assert part in ended.stderr
    assert space.content() == EXPECTED


def test_a_file_of_the_user_is_not_replaced(space: Workspace) -> None:
    """A file with the published content that was put there by hand is taken; another one is an error that names it."""
    space.source("one", DATA)
    mine = space.raw / "mine"
    mine.mkdir(parents=True)
    (mine / "a.zip").write_bytes(IMAGES)
    (mine / "b.zip").write_bytes(b"notes of mine")
    refused = space.fetch("--source", "one")
    assert refused.code == 2
    assert f"{mine / 'b.zip'} is not the published file" in refused.stderr
    assert (mine / "b.zip").read_bytes() == b"notes of mine"
    (mine / "b.zip").unlink()
    before = len(space.hub.requests)
    assert space.fetch("--source", "one").code == 0
    assert space.content() == EXPECTED
    assert STORED not in space.hub.downloads(before)


def test_a_mirror_is_looked_up_first(space: Workspace) -> None:
    """Copies are found below their place, their repository or their host; a wrong one is reported and fetched."""
    url = f"{space.hub.url}/files/extra.zip"
    space.source("one", DATA, {"url": url, "to": "extra.zip"})
    mirror = space.folder / "mirror"
    copies = {
        "mine/mix.json": RECORDS,
        "datasets/org/data/raw/a.zip": IMAGES,
        "mine/b.zip": b"another one",
        "127.0.0.1/files/extra.zip": IMAGES[::-1],
    }
    for name, content in copies.items():
        (mirror / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror / name).write_bytes(content)
    ended = space.fetch("--source", "one", "--mirror", str(mirror))
    assert ended.code == 0, ended.stderr
    assert space.content() == EXPECTED | {"mine/extra.zip": IMAGES[::-1]}
    assert f"{mirror / 'mine/b.zip'} is not the published file" in ended.stdout
    assert len(space.hub.downloads()) == 1


def test_two_sources_cannot_put_different_files_at_one_place(space: Workspace) -> None:
    """Both sources are named before anything is fetched."""
    space.source("one", {"url": f"{space.hub.url}/files/extra.zip", "to": "a.zip"})
    space.source("two", DATA)
    ended = space.fetch("--source", "one", "two")
    assert ended.code == 2
    assert "sources one and two put different files at mine/a.zip" in " ".join(ended.stderr.split())
    assert space.hub.downloads() == []


def test_a_source_without_entries_is_listed(space: Workspace) -> None:
    """With what its YAML says about fetching; a damaged lock file and a missing mirror are refused."""
    space.source("one")
    ended = space.fetch("--source", "one")
    assert ended.code == 0
    assert "which are not fetched" in ended.stdout
    (space.folder / "bad.json").write_text('{"format": 1, "files": {"a": 1}}')
    for option in ("--lock", "--locked"):
        refused = space.fetch("--source", "one", option, str(space.folder / "bad.json"))
        assert refused.code == 2
        assert "is not a lock file" in refused.stderr
    assert "there is no folder" in space.fetch("--source", "one", "--mirror", str(space.folder / "none")).stderr
