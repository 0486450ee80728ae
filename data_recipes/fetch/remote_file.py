"""A published file: where it is, what is known of its content, and the check of a copy against it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 1 << 20


class FetchError(Exception):
    """The network, a publisher or the disk failed, or a file is not the expected one; programs exit with code 1.

    What a user can correct is a `DataError` instead.
    """


@dataclass(frozen=True)
class RemoteFile:
    """One published file.

    Attributes:
        name: path below the folder into which the files are fetched; it identifies the file in a lock file.
        source: a URL, or a repository of the hub as `datasets/ORG/NAME` or `models/ORG/NAME`.
        path: path in the repository; empty for a URL.
        requested: the branch, tag or commit that was asked for; empty for a URL.
        revision: the commit that `requested` is; empty for a URL.
        size: in bytes; None if it is not published.
        sha256: digest in hexadecimal digits; None if it is not published.
        git_blob: git's id of the content, which the hub publishes for small files; None for others.
    """

    name: str
    source: str
    path: str = ""
    requested: str = ""
    revision: str = ""
    size: int | None = None
    sha256: str | None = None
    git_blob: str | None = None

    @property
    def is_on_hub(self) -> bool:
        """Whether the file is in a repository of the hub."""
        return bool(self.path)

    def __str__(self) -> str:
        return f"{self.source}/{self.path}" if self.is_on_hub else self.source


@dataclass(frozen=True)
class Content:
    """Size and digests of a file on the disk. `git_blob` is the id that git would give it."""

    size: int
    sha256: str
    git_blob: str


def read_content(path: Path) -> Content:
    """Read a file and compute its digests."""
    size = path.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            sha256.update(block)
            blob.update(block)
    return Content(size, sha256.hexdigest(), blob.hexdigest())


def describe_difference(content: Content, file: RemoteFile) -> str:
    """Describe how a copy differs from what is published; empty if it does not, as far as that is known."""
    if file.size is not None and content.size != file.size:
        return f"it has {content.size:,} bytes instead of {file.size:,}"
    if file.sha256 is not None and content.sha256 != file.sha256:
        return f"its sha256 is {content.sha256} instead of {file.sha256}"
    if file.git_blob is not None and content.git_blob != file.git_blob:
        return f"its git id is {content.git_blob} instead of {file.git_blob}"
    return ""
