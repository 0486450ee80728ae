"""Downloads from URLs are continued, repeated, checked and refused as a server on loopback asks for it."""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import requests

from data_recipes.fetch.byte_progress import ByteProgress, Stopped
from data_recipes.fetch.plain_http import download_url, find_size
from data_recipes.fetch.remote_file import FetchError
from data_recipes.schema.sample import DataError
from tests.hub_server import Fault, Hub

CONTENT = bytes(range(256)) * 40_000  # about 10 MB, so that a cut comes between two writes
PATH = "/files/images.zip"


class Progress(ByteProgress):
    """Notes the waits between attempts instead of waiting."""

    def __init__(self) -> None:
        super().__init__("test", None)
        self.waits: list[float] = []
        self.received = 0

    def add(self, num_bytes: int) -> None:
        super().add(num_bytes)
        self.received += num_bytes

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        super().wait(0)


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    """A server for all tests."""
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server with one file and no faults; no proxy of the environment is asked."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server.files = {"images.zip": CONTENT}
    server.faults, server.requests, server.redirects, server.content_types = [], [], {}, {}
    return server


def download(hub: Hub, part: Path, size: int | None = None, path: str = PATH) -> Progress:
    """Download the file; return what the progress was told."""
    progress = Progress()
    with requests.Session() as session:
        download_url(session, hub.url + path, part, size, progress)
    return progress


def test_a_file_is_received(hub: Hub, tmp_path: Path) -> None:
    """Its bytes are counted, and nothing else is left beside it."""
    progress = download(hub, tmp_path / "part", len(CONTENT))
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert progress.received == len(CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["part"]
    with requests.Session() as session:
        assert find_size(session, hub.url + PATH) == len(CONTENT)


def test_a_cut_connection_is_continued(hub: Hub, tmp_path: Path) -> None:
    """The rest is asked for by ranges, each byte is counted once, and progress resets the number of failures."""
    hub.faults = [Fault(PATH, cut_after=1_500_000, times=8)]
    progress = download(hub, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert progress.received == len(CONTENT)
    ranges = [each.headers["range"] for each in hub.requests if "range" in each.headers]
    assert len(ranges) == len(hub.requests) - 1 > 5
    assert len(set(progress.waits)) == 1


def stop_half_way(hub: Hub, part: Path) -> int:
    """Ends a download as Ctrl-C does; returns the number of bytes that are kept."""

    class Stopping(Progress):
        def add(self, num_bytes: int) -> None:
            super().add(num_bytes)
            if self.received > len(CONTENT) // 2:
                self.stop()

    with requests.Session() as session, pytest.raises(Stopped):
        download_url(session, hub.url + PATH, part, None, Stopping())
    return part.stat().st_size


def test_a_stopped_program_continues(hub: Hub, tmp_path: Path) -> None:
    """The next one receives only the rest, and counts all."""
    kept = stop_half_way(hub, tmp_path / "part")
    assert 0 < kept < len(CONTENT)
    progress = download(hub, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert hub.requests[-1].headers["range"] == f"bytes={kept}-"
    assert progress.received == len(CONTENT)


def test_another_version_begins_anew(hub: Hub, tmp_path: Path) -> None:
    """The bytes of a file that the publisher has changed are not continued with those of the new one."""
    stop_half_way(hub, tmp_path / "part")
    hub.files["images.zip"] = changed = CONTENT[::-1]
    progress = download(hub, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == changed
    assert progress.received == len(changed)


def test_bytes_of_unknown_origin_are_discarded(hub: Hub, tmp_path: Path) -> None:
    """A part that no download has left, or one of another URL."""
    (tmp_path / "part").write_bytes(b"something else")
    download(hub, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    stop_half_way(hub, tmp_path / "other")
    hub.files["b.zip"] = b"b" * 100
    download(hub, tmp_path / "other", path="/files/b.zip")
    assert (tmp_path / "other").read_bytes() == b"b" * 100


def test_a_complete_part_is_taken(hub: Hub, tmp_path: Path) -> None:
    """The server has nothing behind the last byte (416)."""
    part = tmp_path / "part"
    stop_half_way(hub, part)
    part.write_bytes(CONTENT)
    download(hub, part)
    assert hashlib.sha256(part.read_bytes()).digest() == hashlib.sha256(CONTENT).digest()
    assert sum(each.method == "GET" for each in hub.requests) == 2


def test_a_busy_server_is_asked_later(hub: Hub, tmp_path: Path) -> None:
    """After the seconds or at the time of its Retry-After."""
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    hub.faults = [
        Fault(PATH, status=429, headers={"Retry-After": "7"}),
        Fault(PATH, status=503, headers={"Retry-After": date}),
        Fault(PATH, status=500),
    ]
    progress = download(hub, tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert progress.waits[0] == 7
    assert 80 < progress.waits[1] <= 90
    assert 0 < progress.waits[2] < 7


def test_a_failing_server_ends_the_download(hub: Hub, tmp_path: Path) -> None:
    """With the number of bytes that are kept."""
    kept = stop_half_way(hub, tmp_path / "part")
    hub.faults = [Fault(PATH, status=502, times=100)]
    with pytest.raises(FetchError, match=rf"502.*{kept:,} bytes are kept, run the same command again"):
        download(hub, tmp_path / "part")
    assert hub.faults[0].times > 80


@pytest.mark.parametrize(
    ("status", "expected"), [(404, "no such file any more"), (403, "by hand"), (401, "by hand")], ids=str
)
def test_a_refusal_is_final(hub: Hub, tmp_path: Path, status: int, expected: str) -> None:
    """It is one sentence with the URL, after one request, also where only the size is asked for."""
    hub.faults = [Fault(PATH, status=status), Fault(PATH, status=status, method="HEAD")]
    with pytest.raises(DataError, match=rf"^{hub.url}{PATH}.*{expected}"):
        download(hub, tmp_path / "part")
    assert len(hub.requests) == 1
    with requests.Session() as session, pytest.raises(DataError, match=expected):
        find_size(session, hub.url + PATH)


def test_a_page_is_not_taken_for_an_archive(hub: Hub, tmp_path: Path) -> None:
    """As a shared drive answers, which asks for a confirmation."""
    hub.content_types["images.zip"] = "text/html; charset=utf-8"
    with pytest.raises(DataError, match="answers with a web page"):
        download(hub, tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_another_size_is_refused_before_it_is_received(hub: Hub, tmp_path: Path) -> None:
    """Both sizes are in the message."""
    with pytest.raises(FetchError, match=rf"{len(CONTENT):,} bytes, but the published file has 17"):
        download(hub, tmp_path / "part", 17)
    assert not (tmp_path / "part").exists()


def test_redirects_lead_to_http_only(hub: Hub, tmp_path: Path) -> None:
    """Another server of the publisher is followed; another scheme is an error that is not repeated."""
    hub.redirects = {
        "/moved": f"{hub.storage_url}{PATH}",
        "/local": f"file://{tmp_path}/secret",
        "/ftp": "ftp://127.0.0.1/a",
    }
    download(hub, tmp_path / "part", path="/moved")
    assert (tmp_path / "part").read_bytes() == CONTENT
    for path in ("/local", "/ftp"):
        before = len(hub.requests)
        with pytest.raises(FetchError, match="cannot be fetched"):
            download(hub, tmp_path / "other", path=path)
        assert len(hub.requests) == before + 1


def test_proxies_of_the_environment_are_used(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of a host that does not exist comes through the proxy."""
    monkeypatch.setenv("http_proxy", hub.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with requests.Session() as session:
        download_url(session, f"http://publisher.invalid{PATH}", tmp_path / "part", None, Progress())
    assert (tmp_path / "part").read_bytes() == CONTENT
