"""Downloads files from URLs: it continues what is there, repeats failed requests, and follows http and https only.

Proxies and certificates are those of the environment (HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE).
"""

import json
import re
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from data_recipes.fetch.byte_progress import ByteProgress
from data_recipes.fetch.remote_file import FetchError
from data_recipes.schema.sample import DataError

_TIMEOUT_S = (20.0, 60.0)
"""Seconds to connect, and between two pieces of an answer."""
_BLOCK_BYTES = 1 << 20
_MAX_FAILURES = 6
"""Failed attempts in a row, without a byte between them, after which a download fails."""
_MAX_BACKOFF_S = 30.0
_MAX_RETRY_AFTER_S = 600.0
"""Longest wait that a server can ask for; the next attempt may be refused again."""
_IDENTITY = {"Accept-Encoding": "identity"}
_PERMANENT = (
    requests.exceptions.InvalidSchema,
    requests.exceptions.InvalidURL,
    requests.exceptions.MissingSchema,
    requests.exceptions.TooManyRedirects,
    requests.exceptions.SSLError,
)


class _BusyError(Exception):
    """The server asks to come back later, with status 429 or 5xx; `wait_s` is its Retry-After in seconds, or 0."""

    def __init__(self, status: int, retry_after: str) -> None:
        super().__init__(f"the server answers with status {status}")
        self.wait_s = min(_MAX_RETRY_AFTER_S, _parse_retry_after(retry_after))


class _Received:
    """The received bytes of one file, of which the progress is told the changes."""

    def __init__(self, progress: ByteProgress) -> None:
        self._progress = progress
        self._num_bytes = 0

    def set(self, num_bytes: int) -> None:
        """Set the number of bytes that are there; fewer than before if some are received again."""
        change, self._num_bytes = num_bytes - self._num_bytes, num_bytes
        self._progress.add(change)


def find_size(session: requests.Session, url: str) -> int | None:
    """Ask for the size of a file in bytes; None if the server does not say.

    Raises:
        DataError, FetchError: the server cannot be reached, or says that the file is not there.
    """
    for failures in range(1, _MAX_FAILURES + 1):
        try:
            response = session.head(url, headers=_IDENTITY, timeout=_TIMEOUT_S, allow_redirects=True)
            if response.status_code in (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED):
                return None
            _check_status(response, url)
            return _total_size(response, 0)
        except _BusyError as error:
            reason = str(error)
            time.sleep(max(error.wait_s, _backoff_s(failures)))
        except (requests.RequestException, HTTPError) as error:
            raise FetchError(f"{url} cannot be reached: {_reason(error)}") from None
    raise FetchError(f"{url} cannot be reached: {reason}")


def download_url(
    session: requests.Session, url: str, part: Path, expected_size: int | None, progress: ByteProgress
) -> None:
    """Download a file to `part`, continuing what an interrupted download has left there.

    A file beside `part` records which version of the published file its bytes are of. They are discarded if the server
    has another one, or does not name versions.

    Raises:
        DataError: the server says that the file is not there or may not be read.
        FetchError: the server cannot be reached, fails again and again, or has a file of another size.
        OSError: the disk is full or failing.
    """
    received = _Received(progress)
    failures = 0
    while True:
        before, wait_s = _size(part), 0.0
        try:
            if _receive(session, url, part, expected_size, received):
                _state_file(part).unlink(missing_ok=True)
                return
            reason = "the connection was closed before the end of the file"
        except _PERMANENT as error:
            raise FetchError(f"{url} cannot be fetched: {_reason(error)}") from None
        except _BusyError as error:
            reason, wait_s = str(error), error.wait_s
        except (requests.RequestException, HTTPError) as error:
            reason = _reason(error)
        failures = 1 if _size(part) > before else failures + 1
        if failures >= _MAX_FAILURES:
            raise FetchError(
                f"{url}: {failures} attempts in a row failed ({reason}); {_size(part):,} bytes are kept, run the same "
                "command again to continue"
            )
        progress.wait(max(wait_s, _backoff_s(failures)))


def _backoff_s(failures: int) -> float:
    return min(_MAX_BACKOFF_S, 0.25 * 2.0**failures)


def _parse_retry_after(value: str) -> float:
    """The seconds of a Retry-After header, which is a number or a date; 0 without a valid one."""
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _receive(session: requests.Session, url: str, part: Path, expected_size: int | None, received: _Received) -> bool:
    """Receive the rest of a file in one request; return whether the file is complete."""
    offset, version = _read_state(part, url)
    received.set(offset)
    headers = _IDENTITY | ({"Range": f"bytes={offset}-", "If-Range": version} if offset else {})
    with session.get(url, headers=headers, timeout=_TIMEOUT_S, stream=True) as response:
        if offset and response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            if _total_of_range(response) == offset:
                return True
            part.unlink()
            return False
        _check_status(response, url)
        if offset and not _continues(response, offset):
            offset = 0
            received.set(0)
        total = _total_size(response, offset)
        if expected_size is not None and total is not None and total != expected_size:
            raise FetchError(f"{url} has {total:,} bytes, but the published file has {expected_size:,}")
        _check_no_page(response, url)
        _write_state(part, url, response)
        with part.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            for block in response.iter_content(_BLOCK_BYTES):
                file.write(block)
                offset += len(block)
                received.set(offset)
    return total is None or offset == total


def _continues(response: requests.Response, offset: int) -> bool:
    """Whether the server sends the rest of the file; it sends all of it if that is another version now."""
    given = response.headers.get("Content-Range", "")
    return response.status_code == HTTPStatus.PARTIAL_CONTENT and given.startswith(f"bytes {offset}-")


def _total_of_range(response: requests.Response) -> int | None:
    match = re.fullmatch(r"bytes .*/(\d+)", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _total_size(response: requests.Response, offset: int) -> int | None:
    """Size of the whole file in bytes; None if the answer does not say."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return None
    length = response.headers.get("Content-Length", "")
    return _total_of_range(response) or (offset + int(length) if length.isdigit() else None)


def _check_status(response: requests.Response, url: str) -> None:
    status = response.status_code
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise DataError(
            f"{url}: the server refuses the file with status {status}; it may ask for a registration: see the "
            "publisher's page, and put the file there by hand."
        )
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise DataError(f"{url}: there is no such file any more (status {status}); see the publisher's page.")
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise _BusyError(status, response.headers.get("Retry-After", ""))
    if status >= HTTPStatus.BAD_REQUEST:
        raise FetchError(f"{url}: the server answers with status {status}")


def _check_no_page(response: requests.Response, url: str) -> None:
    """A page in place of an archive asks for a confirmation or a login."""
    is_page = response.headers.get("Content-Type", "").startswith("text/html")
    if is_page and not urlsplit(url).path.endswith((".html", ".htm")):
        raise DataError(
            f"{url} answers with a web page instead of the file, which asks for a login or a confirmation; open it in "
            "a browser, and put the file there by hand."
        )


def _read_state(part: Path, url: str) -> tuple[int, str]:
    """Return the number of usable bytes of an interrupted download, and the version of the file that they are of."""
    try:
        state: dict[str, Any] = json.loads(_state_file(part).read_text(encoding="utf-8"))
        is_usable = state["url"] == url and bool(state["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""
    return (_size(part), str(state["version"])) if is_usable else (0, "")


def _write_state(part: Path, url: str, response: requests.Response) -> None:
    """Record which version of the file is received: its ETag, if that is a strong one, or its date."""
    etag = response.headers.get("ETag", "")
    version = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
    _state_file(part).write_text(json.dumps({"url": url, "version": version}), encoding="utf-8")


def _state_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
