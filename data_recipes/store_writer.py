"""Making a store: beside its place first, gone on with where an earlier start was stopped, renamed when it is whole.

Owns: `<store>.partial`, the lock that keeps two programs apart, the share of rejects that is too much, the swap.
Leaves: what is in the folder to `store_tables.py`, reading it to `store.py`, which sources need work to `prepare.py`.

At any moment a store is complete or absent. What is being made lies in `<store>.partial` and stays there when the
program is stopped, by Ctrl-C, by a full disk or by a kill: the next start goes on from its last checkpoint.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_recipes.pictures import PicturePool
from data_recipes.progress import Progress
from data_recipes.sample import DataError, Reject, Sample
from data_recipes.seen import remove_index
from data_recipes.source import SourceInfo, describe
from data_recipes.store import read_manifest
from data_recipes.store_tables import FORMAT, RejectedError, StoreReport, StoreTables
from data_recipes.stream import Loaded, Mark, NumberedStream, StreamChangedError

Records = Callable[[Mark], Iterator[tuple[Mark, Loaded | None]]]
"""The stream behind a mark; at its end the mark of the end, and None."""


def write_store(
    path: Path,
    source: SourceInfo,
    samples: Iterable[Sample | Reject],
    pool: PicturePool | None = None,
    inputs: Mapping[str, str] | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    root: Path = Path(),
) -> StoreReport:
    """Make the store `path` of a reader's stream, or go on with it.

    The contents and the fingerprint depend neither on the number of workers nor on where an earlier start was
    stopped: samples are written in the order in which they come.

    Args:
        path: the store's folder; its parent is made. A store that is there is replaced at the very end.
        source: goes into the manifest; `max_reject_share` is enforced.
        samples: a reader's stream, from its first record.
        pool: where pictures are decoded; None for this process.
        inputs: digests of what the store is made from, kept beside the manifest for the next `prepare`. What is
            left of an earlier start is gone on with if its were the same; without any, nothing is.
        strict: stop at the first reject.
        progress: told of every record.
        root: the raw folder.

    Raises:
        RejectedError: see `strict` and `max_reject_share`. The quarantine is kept as
            `<path>.quarantine.jsonl`.
        StreamChangedError: what an earlier start has met of the stream is not what it is now; nothing of it is
            left, so that a second call begins anew.
        OSError: the disk is full or failing; what is there does not look like a store.
    """

    def records(start: Mark) -> Iterator[tuple[Mark, Loaded | None]]:
        return NumberedStream(samples, root, start=start).load(pool or PicturePool())

    return write_records(path, source, records, StoreTables, inputs or {}, strict=strict, progress=progress)


def write_records(
    path: Path,
    source: SourceInfo,
    records: Records,
    kind: type[StoreTables],
    inputs: Mapping[str, str],
    *,
    about: Callable[[Mark], dict[str, Any]] | None = None,
    max_reject_share: float | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> StoreReport:
    """`write_store` for records that are loaded already, and for other tables than a whole store's.

    Args:
        about: what else the manifest says, from the mark at the stream's end.
        max_reject_share: the source's where None is given.
    """
    allowed = source.max_reject_share if max_reject_share is None else max_reject_share
    partial = _open_partial(path, inputs)
    tables = kind(partial, source)
    try:
        if strict and tables.rejects:
            tables.abandon()
            shutil.rmtree(partial)  # the first bad record lies behind: meet it again
            tables = kind(_open_partial(path, inputs), source)
        if progress is not None:
            progress.begin(tables.num_records)
        end = tables.mark
        for mark, loaded in records(tables.mark):
            if loaded is None:
                end = mark
                break
            rejected = tables.add(loaded, mark, strict)
            if progress is not None:
                pictures = [] if isinstance(loaded, Reject) else loaded[1]
                progress.record(sum(len(picture.data) for picture in pictures), rejected is not None)
        if tables.rejects.total() > allowed * max(1, tables.num_records):
            tables.checkpoint()
            raise _too_many(path, source, tables, allowed)
        report = tables.finish(path, about(end) if about else None)
    except BaseException as error:
        tables.abandon()
        if not inputs or not tables.has_checkpoint or isinstance(error, StreamChangedError):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    _swap_in(partial, path)
    path.with_name(path.name + ".quarantine.jsonl").unlink(missing_ok=True)
    return report


def finish_interrupted(path: Path, inputs: Mapping[str, str]) -> bool:
    """Put a store into its place that an earlier start had finished and not renamed; True if there was one.

    Whatever else an earlier start left that cannot be gone on with is removed.
    """
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    if old.exists() and not path.exists():
        old.rename(path)  # it had stepped aside for one that did not come
    shutil.rmtree(old, ignore_errors=True)
    if not partial.exists():
        return False
    if _kept_inputs(partial) != _with_format(inputs):
        shutil.rmtree(partial)
    elif read_manifest(partial) is not None:
        remove_index(partial / "seen.sqlite")
        _swap_in(partial, path)
        return True
    return False


def read_inputs(path: Path) -> dict[str, str]:
    """The digests of what a complete store was made from; empty where there is no such store."""
    kept = _kept_inputs(path) if read_manifest(path) is not None else {}
    return {key: value for key, value in kept.items() if key != "format"}


def refresh_description(path: Path, source: SourceInfo) -> None:
    """Bring what the manifest says about a store's source (licence, citation) to what the YAML says now."""
    manifest = read_manifest(path)
    if manifest is None or {**manifest, **describe(source)} == manifest:
        return
    scratch = path / ".manifest.json.new"
    scratch.write_text(json.dumps({**manifest, **describe(source)}, indent=2, ensure_ascii=False) + "\n", "utf-8")
    scratch.replace(path / "manifest.json")


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold the lock of the store `path`: two programs that write one store would spoil each other's work.

    Raises:
        DataError: another program holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with lock.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"another prepare is writing {path}; wait for it, or use another --stores.") from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                print(f"{path.parent} has no file locks: make sure that no other prepare writes {path}.")
            if not _is_file(lock, handle.fileno()):
                continue  # its last holder removed it after we had opened it: what we hold locks nobody out
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _open_partial(path: Path, inputs: Mapping[str, str]) -> Path:
    """`<path>.partial`, with what an earlier start made of the same inputs, or empty."""
    partial = path.with_name(path.name + ".partial")
    if partial.exists() and (not inputs or _kept_inputs(partial) != _with_format(inputs)):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "manifest.json").unlink(missing_ok=True)
    (partial / "inputs.json").write_text(json.dumps(_with_format(inputs), indent=2) + "\n", encoding="utf-8")
    return partial


def _with_format(inputs: Mapping[str, str]) -> dict[str, str]:
    return {**inputs, "format": str(FORMAT)}


def _kept_inputs(folder: Path) -> dict[str, str]:
    try:
        kept = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(kept) if isinstance(kept, dict) else {}


def _too_many(path: Path, source: SourceInfo, tables: StoreTables, allowed: float) -> RejectedError:
    kept = path.with_name(path.name + ".quarantine.jsonl")
    shutil.copyfile(path.with_name(path.name + ".partial") / "quarantine.jsonl", kept)
    reasons = ", ".join(f"{reason} {count}" for reason, count in tables.rejects.most_common())
    return RejectedError(
        f"source {source.name}: {tables.rejects.total()} of {tables.num_records} records are bad ({reasons}), more "
        f"than max_reject_share {allowed}. Each is listed in {kept}; mend the raw files, or allow more: "
        f"`max_reject_share` in configs/source/{source.name}.yaml, or --max-rejects."
    )


def _swap_in(partial: Path, path: Path) -> None:
    """Rename, the store that was there stepping aside first: at any moment `path` is complete or absent."""
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
