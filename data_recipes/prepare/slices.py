"""Splits the preparation of a source into slices, for array jobs of a cluster, and merges them.

    <stores>/<source>.slices/003-of-032/   a store whose samples also have {record, place, repairs, notes}

Merging replays the records in their original order without decoding images, so the result is byte for byte the store
that a single process writes. It needs the disk space of the store once more; the slices are removed afterwards.
"""

import heapq
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import datasets
from datasets import Features, List, Value

from data_recipes.raw.image_files import ImageInfo, LoadedImage
from data_recipes.schema.sample import DataError, Message, Reason, Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.store.reader import read_manifest
from data_recipes.writing.progress import Progress
from data_recipes.writing.sample_stream import LoadedRecord, Slice, StreamPosition
from data_recipes.writing.store_tables import StoreReport, StoreTables
from data_recipes.writing.writer import StoreWriter, read_inputs, write_records


def slices_folder(store: Path) -> Path:
    """Return the folder of all slices of `store`."""
    return store.with_name(store.name + ".slices")


def slice_path(store: Path, part: Slice) -> Path:
    """Return the folder of one slice of `store`."""
    return slices_folder(store) / f"{part.number:03d}-of-{part.num_slices:03d}"


class SliceTables(StoreTables):
    """The tables of a slice. Samples keep their raw ids and duplicates, which are resolved when merging."""

    features: ClassVar[Features] = Features(
        {
            **StoreTables.features,
            "record": Value("int64"),
            "place": Value("string"),
            "repairs": List(Value("string")),
            "notes": List({"name": Value("string"), "example": Value("string")}),
        }
    )

    def _add_sample(self, sample: Sample, images: list[LoadedImage], position: StreamPosition) -> Reject | None:
        repairs = [*sample.repairs, *(note for image in images for note in image.notes)]
        notes = [{"name": name, "example": example} for name, example in sample.notes]
        extra = {"record": position.num_records - 1, "place": sample.location, "repairs": repairs, "notes": notes}
        self._write_sample(sample.id, sample, images, **extra)
        return None

    def _quarantine_line(self, reject: Reject, position: StreamPosition) -> dict[str, object]:
        return {**super()._quarantine_line(reject, position), "record": position.num_records - 1}


def make_slice_writer(
    store: Path, part: Slice, source: SourceInfo, inputs: Mapping[str, str], strict: bool = False
) -> StoreWriter:
    """Create the writer of one slice of `store`; arguments and errors as for `StoreWriter`.

    The share of rejected records is not limited, because only the merged store can be judged.
    """

    def extra_manifest(end: StreamPosition) -> dict[str, Any]:
        return {"slice": str(part), "stream": {"num_records": end.num_records, "digest": end.digest}}

    path = slice_path(store, part)
    return StoreWriter(
        path, source, inputs, SliceTables, extra_manifest=extra_manifest, max_reject_share=1.0, strict=strict
    )


def read_slices(store: Path, num_slices: int, recipe: str) -> list[Path]:
    """Return the folders of all slices of `store`, after checking that they belong together.

    Args:
        store: path of the store.
        num_slices: number of slices.
        recipe: `SourceInfo.recipe_digest()` of the source, with which the slices must have been prepared.

    Raises:
        DataError: slices are missing, or were prepared from different raw files or options.
    """
    folders = [slice_path(store, Slice(number, num_slices)) for number in range(1, num_slices + 1)]
    manifests = [read_manifest(folder) for folder in folders]
    missing = [str(number) for number, manifest in enumerate(manifests, start=1) if manifest is None]
    if missing:
        raise DataError(
            f"source {store.name}: {len(missing)} of {num_slices} slices are missing: {', '.join(missing[:40])}. "
            f"Prepare each of them: --source {store.name} --slice {missing[0]}/{num_slices}"
        )
    streams = [json.dumps(manifest["stream"], sort_keys=True) for manifest in manifests if manifest]
    for number, folder in enumerate(folders, start=1):
        if read_inputs(folder).get("recipe") != recipe:
            problem = f"configs/source/{store.name}.yaml has changed since slice {number} was prepared"
        elif streams[number - 1] != streams[0]:
            problem = f"slices 1 and {number} were prepared from different raw files"
        else:
            continue
        raise DataError(f"source {store.name}: {problem}. Remove {slices_folder(store)} and prepare the slices again.")
    return folders


def merge_slices(
    store: Path,
    source: SourceInfo,
    folders: list[Path],
    progress: Progress | None = None,
    min_records: int = 0,
) -> StoreReport:
    """Merge slices to a store and remove them; raises the errors of `write_records`.

    Args:
        store: path of the store.
        source: the source.
        folders: folders of all slices, from `read_slices`.
        progress: receives every record.
        min_records: see `StoreWriter`.
    """

    def records(starts: Mapping[str, StreamPosition]) -> Iterator[tuple[str, StreamPosition, LoadedRecord | None]]:
        number = 0
        for record, loaded in heapq.merge(*(_iter_slice(folder) for folder in folders), key=lambda pair: pair[0]):
            number = record + 1
            if number > starts[source.name].num_records:
                yield source.name, StreamPosition(number), loaded
        yield source.name, StreamPosition(number), None

    writer = StoreWriter(store, source, read_inputs(folders[0]), min_records=min_records)
    report = write_records([writer], records, progress)[0]
    remove_slices(store)
    return report


def remove_slices(store: Path) -> None:
    """Remove all slices of `store`."""
    shutil.rmtree(slices_folder(store), ignore_errors=True)


def count_slice_bytes(folders: Iterable[Path]) -> int:
    """Return the total size of slices in bytes, which is the disk space that merging needs."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def _iter_slice(folder: Path) -> Iterator[tuple[int, LoadedRecord]]:
    """Yield (record number, record) of a slice in order, with rejected records."""
    return heapq.merge(_iter_slice_samples(folder), _iter_slice_rejects(folder), key=lambda pair: pair[0])


def _iter_slice_samples(folder: Path) -> Iterator[tuple[int, LoadedRecord]]:
    tables = datasets.load_from_disk(str(folder), keep_in_memory=False)
    columns = {name: tables["pictures"].data.column(name) for name in ("sha256", "bytes", "height", "width", "format")}

    def load_row(row: int) -> LoadedImage:
        values = {name: column[row].as_py() for name, column in columns.items()}
        data = values.pop("bytes")
        return LoadedImage(ImageInfo(**values), data)

    for batch in tables["samples"].data.to_batches():
        for row in batch.to_pylist():
            sample = Sample(
                row["id"],
                tuple(Message(message["role"], message["text"]) for message in row["messages"]),
                (),
                row["place"],
                tuple(row["repairs"]),
                tuple((note["name"], note["example"]) for note in row.get("notes", ())),
            )
            yield row["record"], (sample, [load_row(number) for number in row["pictures"]])


def _iter_slice_rejects(folder: Path) -> Iterator[tuple[int, LoadedRecord]]:
    with (folder / "quarantine.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            values = json.loads(line)
            record = values.pop("record")
            yield record, Reject(values["id"], Reason(values["reason"]), values["detail"], values["place"])
