"""Writing a `datasets` directory row by row, so that memory stays flat whatever its size.

Owns: the folder that plain `datasets.load_from_disk` opens (Arrow shards, `state.json`, `dataset_info.json`),
and getting bytes safely onto the disk.
Leaves: what the rows mean to `store.py`.

`Dataset.save_to_disk` writes the same folder, but from a dataset that exists already: pictures would be
written twice.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import DatasetInfo, Features
from datasets.arrow_writer import ArrowWriter


class TableWriter:
    """One table of a `DatasetDict` directory.

    Rows are kept until `batch_rows` or `batch_bytes` are together, then written as one record batch; a shard
    ends above `shard_bytes`, so that no file grows beyond what file systems and copies like.
    """

    def __init__(
        self,
        folder: Path,
        features: Features,
        batch_rows: int,
        batch_bytes: int = 16 << 20,
        shard_bytes: int = 1 << 30,
    ) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._features = features
        self._schema: pa.Schema = features.arrow_schema
        self._batch_rows = batch_rows
        self._batch_bytes = batch_bytes
        self._shard_bytes = shard_bytes
        self._rows: list[dict[str, Any]] = []
        self._rows_bytes = 0
        self._writer: ArrowWriter | None = None
        self._written_bytes = 0
        self._shards: list[str] = []
        self.num_rows = 0

    def write(self, row: dict[str, Any], num_bytes: int = 0) -> int:
        """Append a row that weighs about `num_bytes`; returns its number."""
        self._rows.append(row)
        self._rows_bytes += num_bytes
        self.num_rows += 1
        if len(self._rows) >= self._batch_rows or self._rows_bytes >= self._batch_bytes:
            self._flush()
        return self.num_rows - 1

    def close(self, fingerprint: str) -> None:
        """Write what is left and the two JSON files; `fingerprint` is the one `datasets` sees."""
        self._flush()
        if not self._shards:
            self._open_shard()  # an empty table is a table too
        self._close_shard()
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in self._shards],
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
        """Let go of the open file; the caller removes the folder."""
        if self._writer is not None:
            self._writer.stream.close()
            self._writer = None

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._open_shard()
        assert self._writer is not None
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._written_bytes += self._rows_bytes
        self._rows, self._rows_bytes = [], 0
        if self._written_bytes >= self._shard_bytes:
            self._close_shard()

    def _open_shard(self) -> None:
        name = f"data-{len(self._shards):05d}.arrow"
        self._writer = ArrowWriter(
            features=self._features, path=str(self._folder / name), writer_batch_size=self._batch_rows
        )
        self._shards.append(name)
        self._written_bytes = 0

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.finalize()
            self._writer = None


def write_dict_file(folder: Path, tables: Sequence[str]) -> None:
    """The file that makes `folder` a `DatasetDict` of those tables."""
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(tables)}), encoding="utf-8")


def sync(folder: Path) -> None:
    """Force every file below `folder`, and the folders, onto the disk. A full disk shows here at the latest.

    Raises:
        OSError: the disk is full or failing.
    """
    for current, _, names in os.walk(folder):
        for path in [*(Path(current, name) for name in names), Path(current)]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
