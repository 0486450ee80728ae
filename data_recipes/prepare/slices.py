"""A source in slices, for the array jobs of a cluster: each job makes one, the last step merges them.

Owns: what a slice keeps that a store does not (each record's number, its raw id, where it was), the merging order.
Leaves: making either to `writing/`, the command line to `__main__.py`.

    <stores>/<source>.slices/003-of-032/   a store's folder whose samples also have {record, place, repairs}

Merging replays the records in their order without decoding a picture, so the merged store is, byte for byte, the one
that one process makes. It needs the room of the store once more; the slices are removed when it is whole.
"""

import heapq
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import datasets
from datasets import Features, List, Value

from data_recipes.raw.image_files import LoadedPicture, PictureInfo
from data_recipes.schema.sample import DataError, Message, Reason, Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.store.reader import read_manifest
from data_recipes.writing.progress import Progress
from data_recipes.writing.sample_stream import Loaded, Mark, Slice
from data_recipes.writing.store_tables import StoreReport, StoreTables
from data_recipes.writing.writer import StoreWriter, read_inputs, write_records


def slices_folder(store: Path) -> Path:
    """Where all slices of `store` lie until they are merged."""
    return store.with_name(store.name + ".slices")


def slice_path(store: Path, part: Slice) -> Path:
    """Where one slice of `store` lies."""
    return slices_folder(store) / f"{part.number:03d}-of-{part.num_slices:03d}"


class SliceTables(StoreTables):
    """A slice's tables: every sample under its raw id, repetitions too, since only the whole can tell them."""

    features: ClassVar[Features] = Features(
        {
            **StoreTables.features,
            "record": Value("int64"),
            "place": Value("string"),
            "repairs": List(Value("string")),
        }
    )

    def _add_sample(self, sample: Sample, pictures: list[LoadedPicture], mark: Mark) -> Reject | None:
        repairs = [*sample.repairs, *(note for picture in pictures for note in picture.notes)]
        more = {"record": mark.num_records - 1, "place": sample.place, "repairs": repairs}
        self._write_sample(sample.id, sample, pictures, **more)
        return None

    def _quarantine_line(self, reject: Reject, mark: Mark) -> dict[str, object]:
        return {**super()._quarantine_line(reject, mark), "record": mark.num_records - 1}


def slice_writer(
    store: Path, part: Slice, source: SourceInfo, inputs: Mapping[str, str], strict: bool = False
) -> StoreWriter:
    """Begins one slice of `store`; arguments and errors are `StoreWriter`'s. No share of rejects is too much yet."""

    def about(end: Mark) -> dict[str, Any]:
        return {"slice": str(part), "stream": {"num_records": end.num_records, "digest": end.digest}}

    path = slice_path(store, part)
    return StoreWriter(path, source, inputs, SliceTables, about=about, max_reject_share=1.0, strict=strict)


def read_slices(store: Path, num_slices: int, recipe: str) -> list[Path]:
    """The folders of all slices of `store`.

    Args:
        recipe: the digest of the source's YAML as it is now; the slices must have been made by the same.

    Raises:
        DataError: some are not there, or they were not made of the same raw files by the same YAML.
    """
    folders = [slice_path(store, Slice(number, num_slices)) for number in range(1, num_slices + 1)]
    manifests = [read_manifest(folder) for folder in folders]
    missing = [str(number) for number, manifest in enumerate(manifests, start=1) if manifest is None]
    if missing:
        raise DataError(
            f"source {store.name}: {len(missing)} of {num_slices} slices are not there: {', '.join(missing[:40])}. "
            f"Make each of them: --source {store.name} --slice {missing[0]}/{num_slices}"
        )
    streams = [json.dumps(manifest["stream"], sort_keys=True) for manifest in manifests if manifest]
    for number, folder in enumerate(folders, start=1):
        if read_inputs(folder).get("recipe") != recipe:
            what = f"configs/source/{store.name}.yaml has changed since slice {number} was made"
        elif streams[number - 1] != streams[0]:
            what = f"slices 1 and {number} were not made of the same raw files"
        else:
            continue
        raise DataError(f"source {store.name}: {what}. Remove {slices_folder(store)} and make the slices again.")
    return folders


def merge_slices(
    store: Path,
    source: SourceInfo,
    folders: list[Path],
    progress: Progress | None = None,
) -> StoreReport:
    """Make the store of its slices and remove them; errors are `write_records`'s."""

    def records(starts: Mapping[str, Mark]) -> Iterator[tuple[str, Mark, Loaded | None]]:
        number = 0
        for record, loaded in heapq.merge(*(_replay(folder) for folder in folders), key=lambda pair: pair[0]):
            number = record + 1
            if number > starts[source.name].num_records:
                yield source.name, Mark(number), loaded
        yield source.name, Mark(number), None

    report = write_records([StoreWriter(store, source, read_inputs(folders[0]))], records, progress)[0]
    remove_slices(store)
    return report


def remove_slices(store: Path) -> None:
    """Remove every slice of `store`."""
    shutil.rmtree(slices_folder(store), ignore_errors=True)


def num_slice_bytes(folders: Iterable[Path]) -> int:
    """Bytes of all slices: what merging them needs."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def _replay(folder: Path) -> Iterator[tuple[int, Loaded]]:
    """A slice's (record number, record) in order, bad records among the good."""
    return heapq.merge(_replay_samples(folder), _replay_rejects(folder), key=lambda pair: pair[0])


def _replay_samples(folder: Path) -> Iterator[tuple[int, Loaded]]:
    both = datasets.load_from_disk(str(folder), keep_in_memory=False)
    columns = {name: both["pictures"].data.column(name) for name in ("sha256", "bytes", "height", "width", "format")}

    def picture(row: int) -> LoadedPicture:
        values = {name: column[row].as_py() for name, column in columns.items()}
        data = values.pop("bytes")
        return LoadedPicture(PictureInfo(**values), data)

    for batch in both["samples"].data.to_batches():
        for row in batch.to_pylist():
            sample = Sample(
                row["id"],
                tuple(Message(message["role"], message["text"]) for message in row["messages"]),
                (),
                row["place"],
                tuple(row["repairs"]),
            )
            yield row["record"], (sample, [picture(number) for number in row["pictures"]])


def _replay_rejects(folder: Path) -> Iterator[tuple[int, Loaded]]:
    with (folder / "quarantine.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            values = json.loads(line)
            record = values.pop("record")
            yield record, Reject(values["id"], Reason(values["reason"]), values["detail"], values["place"])
