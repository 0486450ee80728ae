"""Reads a prepared source: a store, which is a `datasets` Arrow directory with a manifest, opened by memory map.

    <store>/samples/          {id, messages: [{role, text}], pictures: [row of the other table]}
    <store>/pictures/         {sha256, bytes, height, width, format}: every distinct image, with its original bytes
    <store>/manifest.json     fingerprint, counts, licence, and sha256 and size of every file
    <store>/quarantine.jsonl  the rejected records
    <store>/inputs.json       digests of what the store was prepared from, used by `prepare`

`dataset_dict.json` lets `datasets.load_from_disk` open both tables. A store is complete or absent.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from data_recipes.schema.denied_files import describe_denied
from data_recipes.schema.sample import DataError, Message
from data_recipes.store.images import StoreImages

FORMAT = 2
"""Version of the store layout; stores with another version are not read."""


@dataclass(frozen=True)
class StoredText:
    """A sample without the bytes of its images, sufficient to compute its length.

    Attributes:
        id: unique id within the source.
        source: name of the source.
        messages: the conversation.
        sizes_hw: (height, width) in pixels of each image.
    """

    id: str
    source: str
    messages: tuple[Message, ...]
    sizes_hw: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StoredSample:
    """A sample with its images.

    Attributes:
        id, source, messages, sizes_hw: as in `StoredText`.
        images: original encoded bytes of each image.
        image_hashes: sha256 of each image, in hexadecimal.
    """

    id: str
    source: str
    messages: tuple[Message, ...]
    sizes_hw: tuple[tuple[int, int], ...]
    images: tuple[bytes, ...]
    image_hashes: tuple[str, ...]


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Read the manifest of a complete store; returns None if there is none or if its format version differs.

    Raises:
        DataError: it exists and this process may not read it.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    except PermissionError as error:
        raise DataError(describe_denied(path) or str(error)) from error
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


class Store:
    """A complete store. Pickling is cheap, because the memory maps are opened again on demand."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.fingerprint: str = manifest["fingerprint"]
        self._tables: tuple[datasets.Dataset, StoreImages] | None = None

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open the store at `path`.

        Raises:
            DataError: it is missing, incomplete, damaged or has another format version, with the command that prepares
                it; or this process may not read it, with the file and its owner.
        """
        path = Path(path)
        command = f"python -m data_recipes.prepare --source {path.name} --raw RAW_ROOT --stores {path.parent}"
        manifest = read_manifest(path)
        if manifest is None:
            has_partial = path.with_name(path.name + ".partial").exists()
            note = " (its preparation was interrupted)" if has_partial else ""
            raise DataError(f"no complete store at {path}{note}. Prepare it: {command}")
        store = cls(path, manifest)
        try:
            num_rows = (len(store._samples), len(store._images))
        except (OSError, KeyError, ValueError) as error:
            raise DataError(
                describe_denied(path)
                or f"the store at {path} is damaged ({error}). Remove it and prepare it again: {command}"
            ) from error
        if num_rows != (manifest["num_samples"], manifest["num_pictures"]):
            raise DataError(
                f"the store at {path} has {num_rows[0]} samples and {num_rows[1]} images, but its manifest lists "
                f"{manifest['num_samples']} and {manifest['num_pictures']}. Remove it and prepare it again: {command}"
            )
        return store

    def __len__(self) -> int:
        return int(self.manifest["num_samples"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": None}

    def text(self, index: int) -> StoredText:
        """Return sample `index` without reading its images."""
        row = self._samples[self._check_index(index)]
        return StoredText(row["id"], self.name, _messages(row), self._images.sizes_hw(row["pictures"]))

    def sample(self, index: int) -> StoredSample:
        """Return sample `index` with its images.

        Raises:
            OSError: reading an image failed; the call may be repeated.
        """
        row = self._samples[self._check_index(index)]
        return StoredSample(
            id=row["id"],
            source=self.name,
            messages=_messages(row),
            sizes_hw=self._images.sizes_hw(row["pictures"]),
            images=tuple(self._images.read(image) for image in row["pictures"]),
            image_hashes=self._images.hashes(row["pictures"]),
        )

    def image_hashes(self, index: int) -> tuple[str, ...]:
        """Return the sha256 of each image of sample `index`, in order."""
        return self._images.hashes(self._samples[self._check_index(index)]["pictures"])

    def ids(self) -> list[str]:
        """Return the ids of all samples."""
        return list(self.iter_ids())

    def iter_ids(self) -> Iterator[str]:
        """Iterate over the ids of all samples without keeping them in memory."""
        for chunk in self._samples.data.column("id").chunks:
            yield from chunk.to_pylist()

    def all_image_hashes(self) -> npt.NDArray[np.bytes_]:
        """Return the sha256 of every image as 64 hexadecimal digits, S64 [num_images]."""
        return self._images.all_hashes()

    def hashes_of_images(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bytes_]:
        """Return the sha256 of the images in these rows as 64 hexadecimal digits, S64 [len(rows)]."""
        return np.array(self._images.hashes(rows.tolist()), dtype="S64")

    def image_keys(self) -> npt.NDArray[np.uint64]:
        """Return the first 64 bits of the sha256 of every image, uint64 [num_images]."""
        return self._images.keys()

    def image_rows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return which images each sample has.

        Returns:
            (starts int64 [num_samples + 1], rows int64 [number of references]): sample i has the images in rows
            `rows[starts[i]:starts[i + 1]]` of the images table.
        """
        chunks = self._samples.data.column("pictures").chunks
        counts = [np.diff(np.asarray(chunk.offsets)) for chunk in chunks]
        starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))]) if counts else np.zeros(1)
        rows = np.concatenate([np.asarray(chunk.flatten()) for chunk in chunks]) if chunks else np.zeros(0)
        return starts.astype(np.int64), rows.astype(np.int64)

    @property
    def _samples(self) -> datasets.Dataset:
        return self._open_tables()[0]

    @property
    def _images(self) -> StoreImages:
        return self._open_tables()[1]

    def _open_tables(self) -> tuple[datasets.Dataset, StoreImages]:
        if self._tables is None:
            samples = datasets.load_from_disk(str(self.path / "samples"), keep_in_memory=False)
            self._tables = (samples, StoreImages(self.path / "pictures"))
        return self._tables

    def _check_index(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of store {self.name}, which has {len(self)}")
        return int(index)


def _messages(row: dict[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(message["role"], message["text"]) for message in row["messages"])
