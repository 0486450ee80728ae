"""Decides what is fetched for a list of sources: every file once, with its size and place, and what remains by hand."""

import fnmatch
import posixpath
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import requests

from data_recipes.fetch.hub import Repository, page_of, read_repository
from data_recipes.fetch.lock_file import LockFile
from data_recipes.fetch.plain_http import find_size
from data_recipes.fetch.remote_file import FetchError, RemoteFile
from data_recipes.schema.downloads import Download, HubDownload, UrlDownload
from data_recipes.schema.sample import DataError
from data_recipes.schema.source import NOT_STATED, SourceInfo


@dataclass(frozen=True)
class Item:
    """One entry of `download`, of all sources that share it.

    Attributes:
        title: the repository, URL or page.
        folder: where its files are put.
        sources: names of the sources.
        licence: as the source or the publisher states it.
        terms: page on which terms must be accepted first; empty if there is none.
        files: the files to fetch; empty for those that are fetched by hand.
        refusal: a sentence that says why the publisher does not give them to this account; empty if it does.
    """

    title: str
    folder: Path
    sources: tuple[str, ...]
    licence: str
    terms: str = ""
    files: tuple[RemoteFile, ...] = ()
    refusal: str = ""


@dataclass(frozen=True)
class ByHand:
    """Files that a person must fetch from a page.

    Attributes:
        item: the entry; its `title` is the page.
        files: where the files have to be.
        why: why they cannot be fetched.
        num_bytes: their size if it is published.
    """

    item: Item
    files: tuple[Path, ...]
    why: str
    num_bytes: int | None

    @property
    def missing(self) -> list[Path]:
        """The files that are not there."""
        return [path for path in self.files if not path.exists()]


@dataclass
class Plan:
    """What is fetched and what is not.

    Attributes:
        items: entries that are fetched.
        by_hand: files that a person must fetch.
        undescribed: sources whose YAML has no `download`, with what it says about fetching.
        problems: sentences about entries that cannot be fetched.
    """

    items: list[Item] = field(default_factory=list)
    by_hand: list[ByHand] = field(default_factory=list)
    undescribed: list[SourceInfo] = field(default_factory=list)
    problems: list[DataError | FetchError] = field(default_factory=list)

    @property
    def files(self) -> list[RemoteFile]:
        """Every file that this account may fetch, once."""
        return list({file.name: file for item in self.items if not item.refusal for file in item.files}.values())


def make_plan(
    sources: Sequence[SourceInfo], raw: Path, lock: LockFile, session: requests.Session, *, is_enforced: bool
) -> Plan:
    """Look up what the `download` entries of sources name.

    Args:
        sources: the sources; entries that several of them share are fetched once.
        raw: the folder of raw folders.
        lock: its revisions take precedence over a repository's newest one.
        session: of plain HTTP.
        is_enforced: files, sizes and digests are those of `lock`, and nothing is looked up.

    Raises:
        DataError: two entries name different files for one place, or an enforced lock file lacks an entry.
    """
    plan = Plan()
    read_once = cache(read_repository)  # several entries name the same repository
    for (root, entry), names in _shared_entries(sources).items():
        try:
            if isinstance(entry, HubDownload):
                plan.items.append(
                    _plan_locked_hub(entry, root, names, raw, lock)
                    if is_enforced
                    else _plan_hub(entry, root, names, raw, lock, read_once)
                )
            elif isinstance(entry, UrlDownload):
                plan.items.append(_plan_url(entry, root, names, raw, lock, session, is_enforced))
            else:
                item = Item(
                    entry.page, raw / root / entry.to, names, _licence(entry), entry.page if entry.gated else ""
                )
                paths = tuple(item.folder / name for name in entry.files)
                plan.by_hand.append(ByHand(item, paths, entry.why, entry.bytes))
        except (DataError, FetchError) as error:
            if is_enforced:
                raise
            plan.problems.append(error)
    plan.undescribed = [source for source in sources if not source.download]
    _check_places(plan.items)
    return plan


def _shared_entries(sources: Iterable[SourceInfo]) -> dict[tuple[str, Download], tuple[str, ...]]:
    """Return {(root, entry): names of the sources that have it}."""
    shared: dict[tuple[str, Download], tuple[str, ...]] = {}
    for source in sources:
        for entry in source.download:
            key = (source.root, entry)
            shared[key] = (*shared.get(key, ()), source.name)
    return shared


def _place(entry: HubDownload, root: str, path: str) -> str | None:
    """Return the name of a file of a repository below the folder of raw folders; None if the entry leaves it out."""
    below = posixpath.relpath(path, entry.folder)
    if below.startswith("../") or not any(fnmatch.fnmatchcase(below, pattern) for pattern in entry.files):
        return None
    return posixpath.normpath(posixpath.join(root, entry.to, below))


def _plan_locked_hub(entry: HubDownload, root: str, names: tuple[str, ...], raw: Path, lock: LockFile) -> Item:
    """The files that a lock file records for an entry."""
    files = [
        each.as_remote(name)
        for name, each in lock.files.items()
        if (each.source, each.requested) == (entry.hub, entry.revision) and _place(entry, root, each.path) == name
    ]
    if not files:
        raise DataError(f"{lock.path} has no file of {entry.hub} for {root}; it was written for other sources.")
    terms = page_of(entry.hub) if entry.gated else ""
    return Item(entry.hub, raw / root / entry.to, names, _licence(entry), terms, tuple(files))


def _plan_hub(
    entry: HubDownload,
    root: str,
    names: tuple[str, ...],
    raw: Path,
    lock: LockFile,
    read: Callable[[str, str], Repository],
) -> Item:
    """The files of a repository, at the commit of the lock file if it records one."""
    repository = read(entry.hub, lock.find_revision(entry.hub, entry.revision) or entry.revision)
    files = [
        RemoteFile(
            name, entry.hub, file.path, entry.revision, repository.revision, file.size, file.sha256, file.git_blob
        )
        for file in repository.files
        if (name := _place(entry, root, file.path)) is not None
    ]
    unused = [pattern for pattern in entry.files if not any(_matches(file, entry, pattern) for file in files)]
    if unused:
        where = "" if entry.folder == "." else f"/{entry.folder}"
        raise DataError(
            f"{entry.hub}{where} has no file {unused[0]} at {repository.revision[:12]}; correct `files` of "
            f"configs/source/{names[0]}.yaml, see {page_of(entry.hub)}."
        )
    terms = page_of(entry.hub) if repository.is_gated or entry.gated else ""
    licence = _licence(entry, repository.licence)
    return Item(entry.hub, raw / root / entry.to, names, licence, terms, tuple(files), repository.refusal)


def _matches(file: RemoteFile, entry: HubDownload, pattern: str) -> bool:
    return fnmatch.fnmatchcase(posixpath.relpath(file.path, entry.folder), pattern)


def _plan_url(
    entry: UrlDownload,
    root: str,
    names: tuple[str, ...],
    raw: Path,
    lock: LockFile,
    session: requests.Session,
    is_enforced: bool,
) -> Item:
    name = posixpath.normpath(posixpath.join(root, entry.to))
    locked = lock.files.get(name)
    if is_enforced:
        if locked is None or locked.source != entry.url:
            raise DataError(f"{lock.path} has no file {name} from {entry.url}; it was written for other sources.")
        file = locked.as_remote(name)
        if entry.sha256 not in (None, file.sha256):
            raise DataError(f"{lock.path} and configs/source/{names[0]}.yaml state different sha256 of {name}.")
    else:
        size = entry.bytes
        if size is None and locked is not None and locked.source == entry.url and (raw / name).is_file():
            size = locked.size
        file = RemoteFile(name, entry.url, size=size or find_size(session, entry.url), sha256=entry.sha256)
    terms = entry.url if entry.gated else ""
    return Item(entry.url, (raw / name).parent, names, _licence(entry), terms, (file,))


def _licence(entry: Download, published: str = "") -> str:
    return entry.licence or published or NOT_STATED


def _check_places(items: Iterable[Item]) -> None:
    """Two entries may name the same published file for one place, but not different ones."""
    placed: dict[str, tuple[RemoteFile, Item]] = {}
    for item in items:
        for file in item.files:
            other, other_item = placed.setdefault(file.name, (file, item))
            if str(other) != str(file):
                raise DataError(
                    f"sources {other_item.sources[0]} and {item.sources[0]} put different files at {file.name}: "
                    f"{other} and {file}; correct `download` of one of them."
                )
