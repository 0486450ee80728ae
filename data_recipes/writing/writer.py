"""Writes stores so that they are complete or absent at any moment.

A store is written to `<store>.partial` and renamed when it is complete. If the program is interrupted, the partial
store remains, and the next run resumes from its last checkpoint.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_recipes.raw.image_pool import ImagePool
from data_recipes.schema.sample import Reject, Sample
from data_recipes.schema.source import SourceInfo, describe_source
from data_recipes.store.durable import replace_folder, write_text_atomically
from data_recipes.store.reader import FORMAT, read_manifest
from data_recipes.writing.progress import Progress
from data_recipes.writing.sample_stream import LoadedRecord, NumberedStream, StreamChangedError, StreamPosition
from data_recipes.writing.seen import remove_index
from data_recipes.writing.store_tables import IncompleteError, RejectedError, StoreReport, StoreTables

RecordStream = Callable[[Mapping[str, StreamPosition]], Iterator[tuple[str, StreamPosition, LoadedRecord | None]]]
"""Maps start positions to a stream of (source, position, record), as `NumberedStream.load` yields it."""


def write_store(
    path: Path,
    source: SourceInfo,
    samples: Iterable[Sample | Reject],
    pool: ImagePool | None = None,
    inputs: Mapping[str, str] | None = None,
    strict: bool = False,
    root: Path = Path(),
) -> StoreReport:
    """Write a store from a reader's records, or resume an interrupted one.

    Samples are written in the order of the records, so contents and fingerprint depend neither on the number of workers
    nor on interruptions.

    Args:
        path, source, inputs, strict: see `StoreWriter`.
        samples: the reader's records, from the first one.
        pool: decodes the images; None for the current process.
        root: the raw folder.

    Raises:
        RejectedError, StreamChangedError, OSError: see `write_records`.
    """

    def records(starts: Mapping[str, StreamPosition]) -> Iterator[tuple[str, StreamPosition, LoadedRecord | None]]:
        return NumberedStream(((None, sample) for sample in samples), root, starts).load(pool or ImagePool())

    return write_records([StoreWriter(path, source, inputs, strict=strict)], records)[0]


class StoreWriter:
    """Writes a store, or a slice of one, to `<path>.partial`."""

    def __init__(
        self,
        path: Path,
        source: SourceInfo,
        inputs: Mapping[str, str] | None = None,
        tables_type: type[StoreTables] = StoreTables,
        *,
        extra_manifest: Callable[[StreamPosition], dict[str, Any]] | None = None,
        max_reject_share: float | None = None,
        min_records: int = 0,
        strict: bool = False,
    ) -> None:
        """Start a store, or resume an interrupted one.

        Args:
            path: folder of the store; its parent is created. An existing store is replaced by the complete new one.
            source: the source, which is described in the manifest.
            inputs: digests of the configuration and raw files, saved for the next run of `prepare`. A partial store is
                resumed if it has the same digests, and never if there are none.
            tables_type: class of the tables.
            extra_manifest: maps the final position of the stream to additional entries of the manifest.
            max_reject_share: largest accepted fraction of rejected records; None for that of the source.
            min_records: fewest records of a complete store, rejected ones included. At least 1 also refuses a store
                without samples.
            strict: stop at the first rejected record.

        Raises:
            OSError: the disk is full or failing.
        """
        self.source = source
        self._path = path
        self._inputs = inputs or {}
        self._extra_manifest = extra_manifest
        self._max_reject_share = source.max_reject_share if max_reject_share is None else max_reject_share
        self._min_records = min_records
        self._strict = strict
        self._is_complete = False
        self._partial = _open_partial(path, self._inputs)
        self._tables = tables_type(self._partial, source)
        if strict and self._tables.rejects:
            self.abort(keep=False)  # start over to report the first rejected record
            self._tables = tables_type(_open_partial(path, self._inputs), source)

    @property
    def position(self) -> StreamPosition:
        """Position in the stream after the last added record."""
        return self._tables.position

    @property
    def num_records(self) -> int:
        """Number of added records, including those of earlier runs."""
        return self._tables.num_records

    def add(self, loaded: LoadedRecord, position: StreamPosition) -> Reject | None:
        """Add one record; see `StoreTables.add`."""
        return self._tables.add(loaded, position, self._strict)

    def finish(self, end: StreamPosition) -> StoreReport:
        """Complete the store and move it to its path.

        Args:
            end: final position of the stream.

        Raises:
            RejectedError: too many records are rejected. They are listed in `<path>.quarantine.jsonl`.
            IncompleteError: there are fewer than `min_records` records.
            OSError: the disk is full or failing. No incomplete store is left at the path.
        """
        tables = self._tables
        is_empty = self._min_records > 0 and 0 < tables.num_records == tables.rejects.total()
        if is_empty or tables.rejects.total() > self._max_reject_share * max(1, tables.num_records):
            tables.checkpoint()
            raise _make_rejected_error(self._path, self.source, tables, self._max_reject_share)
        if tables.num_records < self._min_records:
            tables.checkpoint()
            raise IncompleteError(describe_incomplete(self.source, tables.num_records, self._min_records))
        report = tables.finish(self._path, self._extra_manifest(end) if self._extra_manifest else None)
        self._is_complete = True
        replace_folder(self._partial, self._path)
        self._path.with_name(self._path.name + ".quarantine.jsonl").unlink(missing_ok=True)
        return report

    def abort(self, keep: bool = True) -> None:
        """Stop writing. With `keep`, the last checkpoint remains for the next run; a complete store always remains."""
        if self._is_complete:
            return
        self._tables.abort()
        if not (keep and self._inputs and self._tables.has_checkpoint):
            shutil.rmtree(self._partial, ignore_errors=True)


def write_records(
    writers: Sequence[StoreWriter], records: RecordStream, progress: Progress | None = None
) -> list[StoreReport]:
    """Write the stores of all sources of one stream.

    If a store has too many rejected or too few records, the others are still completed, and the error names all such
    stores.

    Args:
        writers: one writer per source.
        records: the stream.
        progress: receives every record.

    Raises:
        RejectedError, IncompleteError: see `StoreWriter.finish` and `StoreTables.add`.
        StreamChangedError: the records before a start position have changed. The partial stores are removed, so that a
            second call starts over.
        OSError: the disk is full or failing. No incomplete store is left at its path.
    """
    pending = {writer.source.name: writer for writer in writers}
    reports: list[StoreReport] = []
    errors: list[RejectedError | IncompleteError] = []
    try:
        if progress is not None:
            progress.start(sum(writer.num_records for writer in writers))
        for name, position, loaded in records({name: writer.position for name, writer in pending.items()}):
            if loaded is not None:
                reject = pending[name].add(loaded, position)
                if progress is not None:
                    images = [] if isinstance(loaded, Reject) else loaded[1]
                    progress.update(sum(len(image.data) for image in images), reject is not None)
                continue
            try:
                reports.append(pending[name].finish(position))
                del pending[name]
            except (RejectedError, IncompleteError) as error:
                errors.append(error)
        if errors:
            raise _join_errors(errors)
    except BaseException as error:
        for writer in pending.values():
            writer.abort(keep=not isinstance(error, StreamChangedError))
        raise
    return reports


def complete_interrupted(path: Path, inputs: Mapping[str, str]) -> bool:
    """Publish a store that an interrupted run completed but did not rename; returns whether there was one.

    Other remains of an earlier run are removed unless they can be resumed.
    """
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    if old.exists() and not path.exists():
        old.rename(path)  # interrupted between the two renames of `replace_folder`
    shutil.rmtree(old, ignore_errors=True)
    if not partial.exists():
        return False
    if _read_inputs_file(partial) != _with_format(inputs):
        shutil.rmtree(partial)
    elif read_manifest(partial) is not None:
        remove_index(partial / "seen.sqlite")
        replace_folder(partial, path)
        return True
    return False


def read_inputs(path: Path) -> dict[str, str]:
    """Return the `inputs` of a complete store, or an empty dictionary if there is no store."""
    stored = _read_inputs_file(path) if read_manifest(path) is not None else {}
    return {key: value for key, value in stored.items() if key != "format"}


def refresh_description(path: Path, source: SourceInfo) -> None:
    """Update the description of the source (such as licence and citation) in the manifest of a store."""
    manifest = read_manifest(path)
    if manifest is None or {**manifest, **describe_source(source)} == manifest:
        return
    updated = {**manifest, **describe_source(source)}
    write_text_atomically(path / "manifest.json", json.dumps(updated, indent=2, ensure_ascii=False) + "\n")


def _open_partial(path: Path, inputs: Mapping[str, str]) -> Path:
    """Return `<path>.partial`, which is empty unless an earlier run with the same inputs can be resumed."""
    partial = path.with_name(path.name + ".partial")
    if partial.exists() and (not inputs or _read_inputs_file(partial) != _with_format(inputs)):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "manifest.json").unlink(missing_ok=True)
    (partial / "inputs.json").write_text(json.dumps(_with_format(inputs), indent=2) + "\n", encoding="utf-8")
    return partial


def _with_format(inputs: Mapping[str, str]) -> dict[str, str]:
    return {**inputs, "format": str(FORMAT)}


def _read_inputs_file(folder: Path) -> dict[str, str]:
    try:
        stored = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(stored) if isinstance(stored, dict) else {}


def describe_incomplete(source: SourceInfo, num_records: int, min_records: int) -> str:
    """Describe a source of which the raw files have `num_records` records, fewer than `min_records`."""
    if num_records == 0:
        return (
            f"source {source.name}: there is no usable record in the raw files. Check them, and `root` and `options` "
            f"in configs/source/{source.name}.yaml."
        )
    published = f" of {source.expected_count:,} published" if source.expected_count else ""
    return (
        f"source {source.name}: the raw files have {num_records:,}{published} records; at least {min_records:,} are "
        "needed. Download the rest, or use what is there with --partial."
    )


def _join_errors(errors: Sequence[RejectedError | IncompleteError]) -> RejectedError | IncompleteError:
    """One error with all messages; rejected records take precedence for the kind of the error."""
    if len(errors) == 1:
        return errors[0]
    message = "\n".join(map(str, errors))
    rejected = [error for error in errors if isinstance(error, RejectedError)]
    if not rejected:
        return IncompleteError(message)
    return RejectedError(message, [name for error in rejected for name in error.all_rejected])


def _make_rejected_error(path: Path, source: SourceInfo, tables: StoreTables, max_reject_share: float) -> RejectedError:
    quarantine = path.with_name(path.name + ".quarantine.jsonl")
    shutil.copyfile(path.with_name(path.name + ".partial") / "quarantine.jsonl", quarantine)
    reasons = ", ".join(f"{reason} {count}" for reason, count in tables.rejects.most_common())
    if tables.rejects.total() == tables.num_records:
        with quarantine.open(encoding="utf-8") as stream:
            first = json.loads(stream.readline())
        return RejectedError(
            f"source {source.name}: all {tables.num_records} records are rejected ({reasons}). They are listed in "
            f"{quarantine}. The first, {first['place'] or first['id']}: {first['detail']}.",
            [source.name],
        )
    return RejectedError(
        f"source {source.name}: {tables.rejects.total()} of {tables.num_records} records are rejected ({reasons}), "
        f"more than max_reject_share {max_reject_share}. They are listed in {quarantine}. Fix the raw files, or raise "
        f"the limit with `max_reject_share` in configs/source/{source.name}.yaml or --max-rejects."
    )
