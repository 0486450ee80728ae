"""Writing a `datasets` directory row by row, so that memory stays flat whatever its size.

Owns: the folder that plain `datasets.load_from_disk` opens (Arrow shards, `state.json`, `dataset_info.json`),
the digest of every shard, and getting bytes safely onto the disk.
Leaves: what the rows mean, and when a shard ends, to `store_tables.py`.

`Dataset.save_to_disk` writes the same folder, but from a dataset that exists already: pictures would be
written twice.
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import DatasetInfo, Features
from datasets.arrow_writer import ArrowWriter


@dataclass(frozen=True)
class Shard:
    """One finished Arrow file: its name, how many rows and bytes it has, and their sha256."""

    name: str
    num_rows: int
    num_bytes: int
    sha256: str


class TableWriter:
    """One table of a `DatasetDict` directory.

    Rows are kept until `batch_rows` or `batch_bytes` are together, then written as one record batch. `cut` ends a
    shard; what it returns is on the disk and can be gone on from.
    """

    def __init__(
        self,
        folder: Path,
        features: Features,
        batch_rows: int,
        batch_bytes: int = 16 << 20,
        shards: Sequence[Shard] = (),
    ) -> None:
        """`shards` are those of an earlier writer of this folder; every other file in it is removed."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name not in {shard.name for shard in shards}:
                path.unlink()
        self._folder = folder
        self._features = features
        self._schema: pa.Schema = features.arrow_schema
        self._batch_rows = batch_rows
        self._batch_bytes = batch_bytes
        self._rows: list[dict[str, Any]] = []
        self._rows_bytes = 0
        self._file: _HashedFile | None = None
        self._writer: ArrowWriter | None = None
        self.shards = list(shards)
        self.num_rows = sum(shard.num_rows for shard in shards)

    def write(self, row: dict[str, Any], num_bytes: int = 0) -> int:
        """Append a row that weighs about `num_bytes`; returns its number."""
        self._rows.append(row)
        self._rows_bytes += num_bytes
        self.num_rows += 1
        if len(self._rows) >= self._batch_rows or self._rows_bytes >= self._batch_bytes:
            self._flush()
        return self.num_rows - 1

    def cut(self) -> list[Shard]:
        """End the present shard, if it has rows, and force it onto the disk; returns all shards.

        Raises:
            OSError: the disk is full or failing.
        """
        self._flush()
        if self._writer is not None and self._file is not None:
            self._writer.finalize(close_stream=False)
            num_rows = self.num_rows - sum(shard.num_rows for shard in self.shards)
            self.shards.append(self._file.end(num_rows))
            self._writer = self._file = None
        return self.shards

    def close(self, fingerprint: str) -> None:
        """Write what is left and the two JSON files; `fingerprint` is the one `datasets` sees."""
        self._flush()
        if not self.shards and self._writer is None:
            self._open_shard()  # an empty table is a table too
        self.cut()
        state: dict[str, Any] = {
            "_data_files": [{"filename": shard.name} for shard in self.shards],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (self._folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        DatasetInfo(features=self._features).write_to_directory(str(self._folder), pretty_print=True)

    def abandon(self) -> None:
        """Let go of the open file and what waits for it."""
        if self._file is not None:
            self._file.abandon()
        self._writer = self._file = None
        self._rows = []

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._open_shard()
        assert self._writer is not None
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._rows_bytes = [], 0

    def _open_shard(self) -> None:
        self._file = _HashedFile(self._folder / f"data-{len(self.shards):05d}.arrow")
        self._writer = ArrowWriter(
            features=self._features,
            stream=pa.PythonFile(self._file, mode="w"),
            writer_batch_size=self._batch_rows,
        )


class _HashedFile(io.RawIOBase):
    """A file that is hashed while it is written: reading a hundred gigabytes again would take minutes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._stream = path.open("wb", buffering=0)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        left = view
        while left:  # an unbuffered file may take less than it was given
            left = left[self._stream.write(left) :]
        self._digest.update(view)
        self._num_bytes += len(view)
        return len(view)

    def end(self, num_rows: int) -> Shard:
        os.fsync(self._stream.fileno())
        self._stream.close()
        return Shard(self._path.name, num_rows, self._num_bytes, self._digest.hexdigest())

    def abandon(self) -> None:
        self._stream.close()


def write_dict_file(folder: Path, tables: Sequence[str]) -> None:
    """The file that makes `folder` a `DatasetDict` of those tables."""
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(tables)}), encoding="utf-8")


def file_digest(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a small file."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
