"""One prepared source: a `datasets` Arrow directory that is complete or absent, and its manifest.

Owns: the layout on disk, writing it aside and renaming it, reading it by memory map.
Leaves: rows, counts and fingerprint while it is written to `store_tables.py`, a picture's bytes to
`store_pictures.py`, raw layouts to `readers/`, the decode check to `pictures.py`, choosing samples to `mixture.py`.

    <store>/samples/    {id, messages: [{role, text}], pictures: [row of the other table]}
    <store>/pictures/   {sha256, bytes, height, width, format}: each picture once, as published
    <store>/manifest.json   <store>/quarantine.jsonl   <store>/dataset_dict.json (so load_from_disk opens it)
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from data_recipes.arrow_folder import sync
from data_recipes.pictures import PicturePool
from data_recipes.sample import DataError, Message, Reject, Sample, check
from data_recipes.source import SourceInfo
from data_recipes.store_pictures import StorePictures
from data_recipes.store_tables import FORMAT, RejectedError, StoreReport, StoreTables


@dataclass(frozen=True)
class StoredText:
    """A sample without its pictures' bytes: what lengths are counted from. Sizes are (height, width)."""

    id: str
    source: str
    messages: tuple[Message, ...]
    sizes_hw: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StoredSample:
    """A sample with its pictures' original bytes and their sha256."""

    id: str
    source: str
    messages: tuple[Message, ...]
    sizes_hw: tuple[tuple[int, int], ...]
    pictures: tuple[bytes, ...]
    picture_hashes: tuple[str, ...]


def write_store(
    path: Path,
    source: SourceInfo,
    samples: Iterable[Sample | Reject],
    pool: PicturePool | None = None,
    inputs: dict[str, str] | None = None,
    strict: bool = False,
    on_record: Callable[[], object] | None = None,
) -> StoreReport:
    """Write the store `path`: beside it first (`<path>.partial`), renamed once every byte is on the disk.

    The contents and the fingerprint do not depend on the number of workers: samples are written in the order
    in which they come. A store that was there is replaced only at the very end.

    Args:
        path: the store's folder; its parent is made.
        source: goes into the manifest; `max_reject_share` is enforced.
        samples: a reader's stream.
        pool: where pictures are decoded; None for this process.
        inputs: digests of what the store is made from, kept in the manifest for the next `prepare`.
        strict: stop at the first reject.
        on_record: called once per record, for a progress bar.

    Raises:
        RejectedError: see `strict` and `max_reject_share`. The quarantine is kept as
            `<path>.quarantine.jsonl`.
        OSError: the disk is full or failing; nothing that looks like a store is left.
    """
    partial = path.with_name(path.name + ".partial")
    remove_leftovers(path)
    partial.mkdir(parents=True)
    tables = StoreTables(partial, source)
    try:
        with (partial / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine:
            for item in (pool or PicturePool()).load_in_order(_checked(samples)):
                tables.add(item, quarantine, strict)
                if on_record is not None:
                    on_record()
        num_rejects = tables.rejects.total()
        if num_rejects > source.max_reject_share * max(1, tables.num_records):
            reasons = ", ".join(f"{reason} {count}" for reason, count in tables.rejects.most_common())
            kept = path.with_name(path.name + ".quarantine.jsonl")
            (partial / "quarantine.jsonl").replace(kept)
            raise RejectedError(
                f"source {source.name}: {num_rejects} of {tables.num_records} records are bad ({reasons}), "
                f"more than "
                f"max_reject_share {source.max_reject_share}. Each is listed in {kept}; mend the raw files, "
                f"or raise "
                f"`max_reject_share` in configs/source/{source.name}.yaml."
            )
        report = tables.finish(path, inputs or {})
        sync(partial)
        _swap_in(partial, path)
        path.with_name(path.name + ".quarantine.jsonl").unlink(missing_ok=True)
        return report
    except BaseException:
        tables.abandon()
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_leftovers(path: Path) -> bool:
    """Remove what a killed `prepare` left beside the store `path`; True if there was anything."""
    leftovers = [path.with_name(path.name + suffix) for suffix in (".partial", ".old")]
    found = [folder for folder in leftovers if folder.exists()]
    for folder in found:
        shutil.rmtree(folder)
    return bool(found)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a complete store of the present format; None where there is none."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


class Store:
    """A complete store, read by memory map. Cheap to pickle: the map is opened again where it is needed."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.fingerprint: str = manifest["fingerprint"]
        self._tables: tuple[datasets.Dataset, StorePictures] | None = None

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open the store at `path`.

        Raises:
            DataError: it is absent, unfinished, of another format or damaged; with the command that makes it.
        """
        path = Path(path)
        command = f"python -m data_recipes.prepare --source {path.name} --raw RAW_ROOT --stores {path.parent}"
        manifest = read_manifest(path)
        if manifest is None:
            half = " (an unfinished one lies beside it)" if path.with_name(path.name + ".partial").exists() else ""
            raise DataError(f"no complete store at {path}{half}. Make it: {command}")
        store = cls(path, manifest)
        try:
            found = (len(store._samples), len(store._pictures))
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"the store at {path} is damaged ({error}). Remove it and make it: {command}") from error
        if found != (manifest["num_samples"], manifest["num_pictures"]):
            raise DataError(
                f"the store at {path} holds {found[0]} samples and {found[1]} pictures, its manifest says "
                f"{manifest['num_samples']} and {manifest['num_pictures']}. Remove it and make it: {command}"
            )
        return store

    def __len__(self) -> int:
        return int(self.manifest["num_samples"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": None}

    def text(self, index: int) -> StoredText:
        """Sample `index` without touching picture bytes."""
        row = self._samples[self._checked_index(index)]
        return StoredText(row["id"], self.name, _messages(row), self._pictures.sizes_hw(row["pictures"]))

    def sample(self, index: int) -> StoredSample:
        """Sample `index` with its pictures.

        Raises:
            OSError: the file system failed to read a picture; another try may succeed.
        """
        row = self._samples[self._checked_index(index)]
        return StoredSample(
            id=row["id"],
            source=self.name,
            messages=_messages(row),
            sizes_hw=self._pictures.sizes_hw(row["pictures"]),
            pictures=tuple(self._pictures.read(picture) for picture in row["pictures"]),
            picture_hashes=self._pictures.hashes(row["pictures"]),
        )

    def picture_hashes(self, index: int) -> tuple[str, ...]:
        """sha256 of each picture of sample `index`, in order."""
        return self._pictures.hashes(self._samples[self._checked_index(index)]["pictures"])

    def ids(self) -> list[str]:
        """The ids of all samples."""
        return [str(sample_id) for sample_id in self._samples.data.column("id").to_pylist()]

    def all_picture_hashes(self) -> npt.NDArray[np.bytes_]:
        """sha256 (as 64 hexadecimal letters) of every picture, by row."""
        return self._pictures.all_hashes()

    def picture_rows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(starts [num_samples + 1], rows): the pictures of sample i are rows[starts[i]:starts[i + 1]]."""
        chunks = self._samples.data.column("pictures").chunks
        counts = [np.diff(np.asarray(chunk.offsets)) for chunk in chunks]
        starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))]) if counts else np.zeros(1)
        rows = np.concatenate([np.asarray(chunk.flatten()) for chunk in chunks]) if chunks else np.zeros(0)
        return starts.astype(np.int64), rows.astype(np.int64)

    @property
    def _samples(self) -> datasets.Dataset:
        return self._open_tables()[0]

    @property
    def _pictures(self) -> StorePictures:
        return self._open_tables()[1]

    def _open_tables(self) -> tuple[datasets.Dataset, StorePictures]:
        if self._tables is None:
            samples = datasets.load_from_disk(str(self.path / "samples"), keep_in_memory=False)
            self._tables = (samples, StorePictures(self.path / "pictures"))
        return self._tables

    def _checked_index(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of store {self.name}, which has {len(self)}")
        return int(index)


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(message["role"], message["text"]) for message in row["messages"])


def _checked(samples: Iterable[Sample | Reject]) -> Iterator[Sample | Reject]:
    for item in samples:
        yield (check(item) or item) if isinstance(item, Sample) else item


def _swap_in(partial: Path, path: Path) -> None:
    """Rename, the store that was there stepping aside first: at any moment `path` is complete or absent."""
    old = path.with_name(path.name + ".old")
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
