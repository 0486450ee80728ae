"""Where the raw files of a source are published: the entries of `download` in its YAML.

An entry is a repository of the Hugging Face hub, a URL, or a page from which a person must fetch files by hand.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from data_recipes.schema.sample import DataError

_REPOSITORY = re.compile(r"(datasets|models)/\w[\w.-]*/\w[\w.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubDownload:
    """Files of a repository of the hub.

    Attributes:
        hub: `datasets/ORG/NAME` or `models/ORG/NAME`.
        folder: the folder of the repository that the files are taken from.
        files: patterns of paths below `folder`, as in `fnmatch`; `*` also matches slashes.
        revision: a branch, a tag or a commit.
        to: folder below the source's root; a file keeps its path below `folder`.
        licence: shown before anything is fetched.
        gated: whether the publisher's terms must be accepted on the repository's page first.
    """

    hub: str
    folder: str = "."
    files: tuple[str, ...] = ("*",)
    revision: str = "main"
    to: str = "."
    licence: str = ""
    gated: bool = False


@dataclass(frozen=True)
class UrlDownload:
    """One file behind a URL.

    Attributes:
        url: http or https.
        to: path of the file below the source's root.
        bytes: size of the file if it is published, in bytes.
        sha256: digest of the file if it is published, in hexadecimal digits.
        licence: shown before anything is fetched.
        gated: whether the publisher's terms must be accepted first.
    """

    url: str
    to: str
    bytes: int | None = None
    sha256: str | None = None
    licence: str = ""
    gated: bool = False


@dataclass(frozen=True)
class PageDownload:
    """Files that a person must fetch from a page, because it asks for a registration or has no lasting links.

    Attributes:
        page: address of the page.
        files: names of the files or folders that are put into `to`.
        why: what the page asks for.
        to: folder below the source's root.
        bytes: size of all files if it is published, in bytes.
        licence: shown before anything is fetched.
        gated: whether the publisher's terms must be accepted first.
    """

    page: str
    files: tuple[str, ...]
    why: str
    to: str = "."
    bytes: int | None = None
    licence: str = ""
    gated: bool = False


Download = HubDownload | UrlDownload | PageDownload

_KINDS: dict[str, type[Download]] = {"hub": HubDownload, "url": UrlDownload, "page": PageDownload}


def parse_downloads(origin: str, entries: object, reject_unknown: Callable[..., None]) -> tuple[Download, ...]:
    """Validate the value of `download`.

    Args:
        origin: the YAML file, for messages.
        entries: the value.
        reject_unknown: raises DataError for an unknown key, with the known ones.

    Raises:
        DataError: an entry has no or several of `hub`, `url` and `page`, an unknown or missing key, or a wrong value.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise DataError(f"{origin}: `download` must be a list of entries, got {_short(entries)}.")
    downloads = []
    for number, entry in enumerate(entries, start=1):
        place = f"{origin}: entry {number} of `download`"
        if not isinstance(entry, Mapping):
            raise DataError(f"{place} must be a mapping with `hub`, `url` or `page`, got {_short(entry)}.")
        kinds = [key for key in _KINDS if key in entry]
        if len(kinds) != 1:
            raise DataError(f"{place} must have exactly one of `hub`, `url` and `page`; it has {kinds or 'none'}.")
        downloads.append(_parse_entry(place, entry, _KINDS[kinds[0]], reject_unknown))
    return tuple(downloads)


def _parse_entry(
    place: str, entry: Mapping[str, Any], kind: type[Download], reject_unknown: Callable[..., None]
) -> Download:
    reject_unknown(place, entry, [field.name for field in fields(kind)])
    values: dict[str, Any] = {}
    for key, value in entry.items():
        check, rule = _CHECKS[key]
        if not check(value):
            raise DataError(f"{place}: `{key}` is {_short(value)}, but must be {rule}.")
        values[key] = tuple(value) if key == "files" else value
    required = {UrlDownload: ("to",), PageDownload: ("files", "why")}.get(kind, ())
    missing = [key for key in required if key not in values]
    if missing:
        raise DataError(f"{place}: `{missing[0]}` is missing; such an entry needs {', '.join(map(repr, required))}.")
    if kind is UrlDownload and PurePosixPath(values["to"]) == PurePosixPath("."):
        raise DataError(f"{place}: `to` must be the path of a file below the source's root, got {values['to']!r}.")
    return kind(**values)


def is_path_below(value: object) -> bool:
    """Whether a value is a relative path that does not leave its folder."""
    return (
        isinstance(value, str)
        and bool(value)
        and value.isprintable()
        and "\\" not in value
        and not PurePosixPath(value).is_absolute()
        and ".." not in PurePosixPath(value).parts
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_url(value: object) -> bool:
    if not isinstance(value, str) or not value.isprintable() or " " in value:
        return False
    parts = urlsplit(value)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None


def _is_list_of_paths(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(is_path_below(each) for each in value)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "hub": (
        lambda value: isinstance(value, str) and _REPOSITORY.fullmatch(value) is not None,
        "datasets/ORG/NAME or models/ORG/NAME",
    ),
    "folder": (is_path_below, "a folder of the repository"),
    "files": (_is_list_of_paths, "a list of relative paths without `..`"),
    "revision": (_is_text, "a branch, a tag or a commit, in quotes if it looks like a number"),
    "to": (is_path_below, "a relative path without `..`"),
    "licence": (_is_text, "a text"),
    "gated": (lambda value: isinstance(value, bool), "true or false"),
    "url": (_is_url, "an http or https URL without a user name"),
    "bytes": (_is_size, "a size in bytes"),
    "sha256": (
        lambda value: isinstance(value, str) and _SHA256.fullmatch(value) is not None,
        "64 hexadecimal digits in lower case",
    ),
    "page": (_is_url, "the http or https address of a page"),
    "why": (_is_text, "a text that says what the page asks for"),
}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
