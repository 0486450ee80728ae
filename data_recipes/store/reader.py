"""One prepared source: a `datasets` Arrow directory that is complete or absent, and its manifest.

Owns: the layout on disk, reading it by memory map.
Leaves: making it to `writing/`, a picture's bytes to `images.py`, choosing
samples to `mixture.py`.

    <store>/samples/    {id, messages: [{role, text}], pictures: [row of the other table]}
    <store>/pictures/   {sha256, bytes, height, width, format}: each picture once, as published
    <store>/manifest.json     fingerprint, counts, licence, and sha256 and bytes of every file
    <store>/quarantine.jsonl  the records left out; `dataset_dict.json` lets load_from_disk open the whole;
                              `inputs.json` is for `prepare` alone
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from data_recipes.schema.sample import DataError, Message
from data_recipes.store.images import StorePictures

FORMAT = 2  # of the store; another number is another layout


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
        return list(self.iter_ids())

    def iter_ids(self) -> Iterator[str]:
        """The ids of all samples, without holding them."""
        for chunk in self._samples.data.column("id").chunks:
            yield from chunk.to_pylist()

    def all_picture_hashes(self) -> npt.NDArray[np.bytes_]:
        """sha256 (as 64 hexadecimal letters) of every picture, by row."""
        return self._pictures.all_hashes()

    def hashes_of_pictures(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bytes_]:
        """sha256 (as 64 hexadecimal letters) of these pictures, by their rows."""
        return np.array(self._pictures.hashes(rows.tolist()), dtype="S64")

    def picture_keys(self) -> npt.NDArray[np.uint64]:
        """The first 64 bits of every picture's sha256, by row: an eighth of a hash's memory."""
        return self._pictures.keys()

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
