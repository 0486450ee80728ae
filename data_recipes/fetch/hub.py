"""Lists and downloads the files of repositories of the Hugging Face hub through its own client.

The client reads HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and the proxies of the environment. Its errors become
one sentence each; a token is never part of one.
"""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging
from tqdm import tqdm

from data_recipes.fetch.remote_file import FetchError
from data_recipes.schema.sample import DataError

_TYPES = {"datasets": "dataset", "models": "model"}
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Base class of the errors of the client's HTTP library, which is another one from version to version of the client."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS)
_MAX_RETRIES = 5
_MAX_WAIT_S = 60.0
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `sha256` is known of files in large file storage, `git_blob` of the others."""

    path: str
    size: int
    sha256: str | None
    git_blob: str | None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Attributes:
        source: `datasets/ORG/NAME` or `models/ORG/NAME`.
        revision: the commit.
        licence: as its card says; empty if it says nothing.
        is_gated: whether its terms must be accepted on its page before files can be downloaded.
        refusal: a sentence that says why this account cannot download its files; empty if it can.
        files: all files, by path.
    """

    source: str
    revision: str
    licence: str
    is_gated: bool
    refusal: str
    files: tuple[HubFile, ...]


def page_of(source: str) -> str:
    """Return the address of a repository's page."""
    return f"{constants.ENDPOINT}/{source.removeprefix('models/')}"


def read_repository(source: str, revision: str) -> Repository:
    """List a repository at a branch, tag or commit.

    Raises:
        DataError: it does not exist, is private, or the client is offline.
        FetchError: the hub cannot be reached or fails.
    """
    kind, repository = _split(source)
    api = HfApi()
    with _explained_errors(source, revision):
        info: Any = _retried(lambda: api.repo_info(repository, repo_type=kind, revision=revision))
        commit = str(info.sha)
        tree = _retried(lambda: list(api.list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind)))
    card = info.card_data
    licence = card.get("license") if card is not None and hasattr(card, "get") else None
    files = [
        HubFile(
            each.path,
            each.lfs.size if each.lfs is not None else each.size,
            each.lfs.sha256 if each.lfs is not None else None,
            each.blob_id if each.lfs is None else None,
        )
        for each in tree
        if isinstance(each, RepoFile)
    ]
    return Repository(
        source,
        commit,
        ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence or ""),
        bool(info.gated),
        _find_refusal(source, revision) if info.gated else "",
        tuple(sorted(files, key=lambda file: file.path)),
    )


def _find_refusal(source: str, revision: str) -> str:
    kind, repository = _split(source)
    try:
        with _explained_errors(source, revision):
            _retried(lambda: HfApi().auth_check(repository, repo_type=kind))
    except DataError as error:
        return str(error)
    return ""


def download_file(
    source: str, path: str, revision: str, folder: Path | None, count_bytes: Callable[[int], None]
) -> Path:
    """Download one file unless it is there, and return its path.

    The client continues a file whose connection was cut, and begins it again after the program was stopped.

    Args:
        source: the repository.
        path: of the file in the repository.
        revision: a commit.
        folder: where the file is put, at `path`; None for the hub's cache.
        count_bytes: is called with the numbers of received bytes, from the thread that downloads.

    Raises:
        DataError: the repository's terms are not accepted, or the token is refused.
        FetchError: the hub fails, or the connection is cut again and again.
    """
    kind, repository = _split(source)
    # Waiting and retrying is no news for a user; what ends the download is raised.
    logging.set_verbosity_error()
    with _explained_errors(source, revision):
        return Path(
            hf_hub_download(
                repository,
                path,
                repo_type=kind,
                revision=revision,
                local_dir=folder,
                tqdm_class=_make_counter(count_bytes),
            )
        )


def pin_branch(source: str, requested: str, revision: str) -> None:
    """Record in the hub's cache which commit a branch or tag is, so that it is found without the network.

    Raises:
        FetchError: the publisher has changed the branch since it was listed as `revision`.
    """
    kind, repository = _split(source)
    with _explained_errors(source, requested):
        resolved = HfApi().resolve_revision(repository, repo_type=kind, revision=requested).resolved
    if resolved != revision:
        raise FetchError(f"{source}: the publisher has just changed {requested}; run the same command again")


def _split(source: str) -> tuple[str, str]:
    """Return the client's type of repository and its id."""
    kind, _, repository = source.partition("/")
    return _TYPES[kind], repository


def _make_counter(count_bytes: Callable[[int], None]) -> type[tqdm]:
    """Return a progress bar that shows nothing and passes the numbers of bytes on."""

    class Counter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            count_bytes(int(n or 0))

    return Counter


def _retried(call: Callable[[], _Result]) -> _Result:
    """Return the result of a request, repeated while the hub answers that it is busy."""
    for number in range(_MAX_RETRIES):
        try:
            return call()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status != 429 and status < 500:
                raise
            wanted = error.response.headers.get("Retry-After", "")
            time.sleep(min(_MAX_WAIT_S, float(wanted) if wanted.isdigit() else 2.0**number))
    return call()


@contextmanager
def _explained_errors(source: str, revision: str) -> Iterator[None]:
    """Turn the client's errors into `DataError` or `FetchError` with one sentence."""
    try:
        yield
    except (OSError, _HTTP_ERROR, ValueError, RevisionResolutionError) as error:
        cause: BaseException = error
        if not isinstance(error, HfHubHTTPError) and isinstance(error.__cause__, (OSError, _HTTP_ERROR)):
            cause = error.__cause__  # the client wraps what the connection or the hub said
        raise _explain(cause, source, revision) from None


def _explain(error: BaseException, source: str, revision: str) -> DataError | FetchError | OSError:
    response = error.response if isinstance(error, HfHubHTTPError) else None
    status = None if response is None else response.status_code
    if isinstance(error, OfflineModeIsEnabled):
        return DataError(f"{source} cannot be fetched while HF_HUB_OFFLINE is set; unset it.")
    if isinstance(error, GatedRepoError) or status == 403:
        return DataError(
            f"{source}: its publisher asks every user to accept the terms on {page_of(source)}; accept them there, and "
            "set HF_TOKEN to a token of the same account."
        )
    if isinstance(error, RevisionNotFoundError):
        return DataError(f"{source} has no branch, tag or commit {revision}; see {page_of(source)}.")
    if response is not None and status == 401 and "credentials" in response.headers.get("X-Error-Message", ""):
        return DataError(f"{source}: the hub refuses the token; correct HF_TOKEN, or unset it and run `hf auth login`.")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return DataError(
            f"{source}: the hub {constants.ENDPOINT} has no such repository or file, or shows it only to accounts with "
            "access; correct the name, or set HF_TOKEN to a token of such an account."
        )
    if isinstance(error, HFValidationError):
        return DataError(f"{source} is not the name of a repository: {_first_line(error)}.")
    if status is not None:
        return FetchError(f"{source}: the hub {constants.ENDPOINT} answered with status {status}; try again later")
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return error
    return FetchError(
        f"{source} cannot be fetched from {constants.ENDPOINT}: {type(error).__name__}: {_first_line(error)}; complete "
        "files are kept, run the same command again"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).partition("Please retry")[0]  # with an option of the client's function
    return " ".join(text.split())[:160].rstrip(".")
