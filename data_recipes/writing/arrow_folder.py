"""Writes a `datasets` directory (Arrow shards, `state.json`, `dataset_info.json`) row by row, with bounded memory.

`datasets.load_from_disk` opens the result. `Dataset.save_to_disk` writes the same format, but needs an existing
dataset, so that images would be written twice.
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
    """A complete Arrow file: its name, number of rows, size in bytes and sha256."""

    name: str
    num_rows: int
    num_bytes: int
    sha256: str


class TableWriter:
    """Writes one table of a `DatasetDict` directory.

    Rows are buffered up to `batch_rows` or `batch_bytes`, then written as one record batch. `finish_shard` makes the
    rows so far durable; a later writer can continue after them.
    """

    def __init__(
        self,
        folder: Path,
        features: Features,
        batch_rows: int,
        batch_bytes: int = 16 << 20,
        shards: Sequence[Shard] = (),
    ) -> None:
        """Create or open the folder of the table.

        Args:
            folder: folder of the table.
            features: its columns.
            batch_rows, batch_bytes: size limits of a record batch.
            shards: complete shards of an earlier writer, which are kept; all other files are removed.
        """
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
        """Append a row of about `num_bytes` bytes and return its number."""
        self._rows.append(row)
        self._rows_bytes += num_bytes
        self.num_rows += 1
        if len(self._rows) >= self._batch_rows or self._rows_bytes >= self._batch_bytes:
            self._flush()
        return self.num_rows - 1

    def finish_shard(self) -> list[Shard]:
        """Complete the current shard, if it has rows, flush it to the disk, and return all shards.

        Raises:
            OSError: the disk is full or failing.
        """
        self._flush()
        if self._writer is not None and self._file is not None:
            self._writer.finalize(close_stream=False)
            num_rows = self.num_rows - sum(shard.num_rows for shard in self.shards)
            self.shards.append(self._file.finish(num_rows))
            self._writer = self._file = None
        return self.shards

    def close(self, fingerprint: str) -> None:
        """Write the remaining rows and the JSON files.

        Args:
            fingerprint: fingerprint of the table for `datasets`.
        """
        self._flush()
        if not self.shards and self._writer is None:
            self._open_shard()  # an empty table needs a file for its schema
        self.finish_shard()
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

    def abort(self) -> None:
        """Close the open file and discard buffered rows."""
        if self._file is not None:
            self._file.abort()
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
    """A file that is hashed while it is written, because reading large shards again would take minutes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self._stream = path.open("wb", buffering=0)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        remaining = view
        while remaining:  # an unbuffered write may be partial
            remaining = remaining[self._stream.write(remaining) :]
        self._digest.update(view)
        self._num_bytes += len(view)
        return len(view)

    def finish(self, num_rows: int) -> Shard:
        os.fsync(self._stream.fileno())
        self._stream.close()
        return Shard(self._path.name, num_rows, self._num_bytes, self._digest.hexdigest())

    def abort(self) -> None:
        self._stream.close()


def write_dataset_dict(folder: Path, tables: Sequence[str]) -> None:
    """Write `dataset_dict.json`, which makes `folder` a `DatasetDict` of these tables."""
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(tables)}), encoding="utf-8")


def describe_file(path: Path) -> dict[str, Any]:
    """Return {"bytes": size, "sha256": digest} of a small file."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
