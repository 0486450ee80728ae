"""Making a store: beside its place first, gone on with where an earlier start was stopped, renamed when it is whole.

Owns: `<store>.partial`, several stores out of one stream, the share of rejects that is too much.
Leaves: what is in the folder to `store_tables.py`, reading it to `reader.py`, which sources need work to `prepare/`.

At any moment a store is complete or absent. What is being made lies in `<store>.partial` and stays there when the
program is stopped, by Ctrl-C, by a full disk or by a kill: the next start goes on from its last checkpoint.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_recipes.raw.image_pool import PicturePool
from data_recipes.schema.sample import Reject, Sample
from data_recipes.schema.source import SourceInfo, describe
from data_recipes.store.durable import swap_in
from data_recipes.store.reader import FORMAT, read_manifest
from data_recipes.writing.progress import Progress
from data_recipes.writing.sample_stream import Loaded, Mark, NumberedStream, StreamChangedError
from data_recipes.writing.seen import remove_index
from data_recipes.writing.store_tables import RejectedError, StoreReport, StoreTables

Records = Callable[[Mapping[str, Mark]], Iterator[tuple[str, Mark, Loaded | None]]]
"""The stream behind each source's mark; at its end each source's last mark, and None."""


def write_store(
    path: Path,
    source: SourceInfo,
    samples: Iterable[Sample | Reject],
    pool: PicturePool | None = None,
    inputs: Mapping[str, str] | None = None,
    strict: bool = False,
    root: Path = Path(),
) -> StoreReport:
    """Make the store `path` of a reader's stream, or go on with it.

    The contents and the fingerprint depend neither on the number of workers nor on where an earlier start was
    stopped: samples are written in the order in which they come.

    Args:
        path, source, inputs, strict: as `StoreWriter` has them.
        samples: a reader's stream, from its first record.
        pool: where pictures are decoded; None for this process.
        root: the raw folder.

    Raises:
        RejectedError, StreamChangedError, OSError: as `write_records`.
    """

    def records(starts: Mapping[str, Mark]) -> Iterator[tuple[str, Mark, Loaded | None]]:
        return NumberedStream(((None, sample) for sample in samples), root, starts).load(pool or PicturePool())

    return write_records([StoreWriter(path, source, inputs, strict=strict)], records)[0]


class StoreWriter:
    """A store, or a slice of one, while it is made in `<path>.partial`."""

    def __init__(
        self,
        path: Path,
        source: SourceInfo,
        inputs: Mapping[str, str] | None = None,
        kind: type[StoreTables] = StoreTables,
        *,
        about: Callable[[Mark], dict[str, Any]] | None = None,
        max_reject_share: float | None = None,
        strict: bool = False,
    ) -> None:
        """Begin the store, or open what an earlier start left of it.

        Args:
            path: the store's folder; its parent is made. A store that is there is replaced at the very end.
            source: goes into the manifest; `max_reject_share` is enforced.
            inputs: digests of what the store is made from, kept beside the manifest for the next `prepare`. What is
                left of an earlier start is gone on with if its were the same; without any, nothing is.
            kind: the tables; a slice's are others.
            about: what else the manifest says, from the mark at the stream's end.
            max_reject_share: the source's where None is given.
            strict: stop at the first reject.

        Raises:
            OSError: the disk is full or failing.
        """
        self.source = source
        self._path = path
        self._inputs = inputs or {}
        self._about = about
        self._allowed = source.max_reject_share if max_reject_share is None else max_reject_share
        self._strict = strict
        self._is_whole = False
        self._partial = _open_partial(path, self._inputs)
        self._tables = kind(self._partial, source)
        if strict and self._tables.rejects:
            self.abandon(keep=False)  # the first bad record lies behind: meet it again
            self._tables = kind(_open_partial(path, self._inputs), source)

    @property
    def mark(self) -> Mark:
        """Behind the last record that was taken in."""
        return self._tables.mark

    @property
    def num_records(self) -> int:
        """Records that were taken in, by earlier starts too."""
        return self._tables.num_records

    def add(self, loaded: Loaded, mark: Mark) -> Reject | None:
        """Take in one record; returns it if it is left out. `mark` lies behind it; errors are `StoreTables.add`'s."""
        return self._tables.add(loaded, mark, self._strict)

    def finish(self, end: Mark) -> StoreReport:
        """Make it whole and put it into its place.

        Raises:
            RejectedError: too many records are bad. The quarantine is kept as `<path>.quarantine.jsonl`.
            OSError: the disk is full or failing; what is there does not look like a store.
        """
        tables = self._tables
        if tables.rejects.total() > self._allowed * max(1, tables.num_records):
            tables.checkpoint()
            raise _too_many(self._path, self.source, tables, self._allowed)
        report = tables.finish(self._path, self._about(end) if self._about else None)
        self._is_whole = True
        swap_in(self._partial, self._path)
        self._path.with_name(self._path.name + ".quarantine.jsonl").unlink(missing_ok=True)
        return report

    def abandon(self, keep: bool = True) -> None:
        """Stop here; what was checkpointed stays for the next start if `keep`, and what is whole in any case."""
        if self._is_whole:
            return
        self._tables.abandon()
        if not (keep and self._inputs and self._tables.has_checkpoint):
            shutil.rmtree(self._partial, ignore_errors=True)


def write_records(
    writers: Sequence[StoreWriter], records: Records, progress: Progress | None = None
) -> list[StoreReport]:
    """Fill stores from one stream, each named after its source; a store is whole when the stream has ended.

    One with too many bad records keeps no other from its place.

    Args:
        progress: told of every record.

    Raises:
        RejectedError: see `StoreWriter.finish`, and its `strict`.
        StreamChangedError: what an earlier start has met of the stream is not what it is now; nothing of it is
            left, so that a second call begins anew.
        OSError: the disk is full or failing; what is there does not look like a store.
    """
    under_way = {writer.source.name: writer for writer in writers}
    reports: list[StoreReport] = []
    rejected: RejectedError | None = None
    try:
        if progress is not None:
            progress.begin(sum(writer.num_records for writer in writers))
        for name, mark, loaded in records({name: writer.mark for name, writer in under_way.items()}):
            if loaded is not None:
                left_out = under_way[name].add(loaded, mark)
                if progress is not None:
                    pictures = [] if isinstance(loaded, Reject) else loaded[1]
                    progress.record(sum(len(picture.data) for picture in pictures), left_out is not None)
                continue
            try:
                reports.append(under_way[name].finish(mark))
                del under_way[name]
            except RejectedError as error:
                rejected = rejected or error
        if rejected is not None:
            raise rejected
    except BaseException as error:
        for writer in under_way.values():
            writer.abandon(keep=not isinstance(error, StreamChangedError))
        raise
    return reports


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
        swap_in(partial, path)
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
