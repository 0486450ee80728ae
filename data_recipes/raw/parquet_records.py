"""Reads the rows of parquet files of any size in small batches.

A damaged row group or shard is reported as a `Reject`; the rest of the dataset is still read.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_recipes.raw.file_kinds import HEAD_BYTES, describe_file_kind
from data_recipes.schema.sample import DataError, Reason, Reject

# Published shards contain up to a gigabyte of images, so only one page and a few rows are in memory.
_ROWS_AT_ONCE = 16
_BUFFER_BYTES = 1 << 20


def find_shards(root: Path, patterns: str | Sequence[str]) -> list[Path]:
    """Return the files below `root` that match a glob pattern (`data/train-*.parquet`), sorted by name.

    Args:
        root: the source's raw folder.
        patterns: the pattern, or several of them, whose files follow each other.

    Raises:
        DataError: no file matches one of the patterns.
    """
    shards: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = sorted(path for path in root.glob(pattern) if path.is_file())
        if not found:
            raise DataError(
                f"{root / pattern}: no file matches. The raw folder exists, but has no such shards: download them, or "
                "correct the pattern in `options` of the source's YAML."
            )
        shards += found
    return list(dict.fromkeys(shards))


def list_columns(shard: Path) -> list[str]:
    """Return the names of a shard's columns; none if it cannot be opened, which `iter_rows` reports."""
    try:
        return list(pq.read_schema(shard).names)
    except (pa.ArrowException, OSError):
        return []


def iter_rows(shard: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) for each row of a shard; a row is a dictionary {column: value}.

    If the shard cannot be opened, or a row group cannot be read to its end, one `Reject` is yielded instead of the lost
    rows. Its detail gives their number if it is known.

    Args:
        shard: path of the file.
        columns: columns to read.
        optional: columns to read if the shard has them.

    Raises:
        DataError: the shard lacks one of `columns`, or is another kind of file, such as a pointer of git-lfs.
    """
    with shard.open("rb") as stream:
        kind = describe_file_kind(stream.read(HEAD_BYTES))
    if kind is not None and shard.stat().st_size:
        raise DataError(f"{shard} is {kind}, where parquet is expected. Download or unpack the file itself.")
    try:
        # Memory-mapping and pre-buffering would both keep a whole row group of images in memory.
        with pq.ParquetFile(shard, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            known = file.schema_arrow.names
            missing = [name for name in columns if name not in known]
            if missing:
                raise DataError(f"{shard}: no column {missing[0]!r}; the shard has {', '.join(known)}.")
            selected = [*columns, *(name for name in optional if name in known)]
            first = 0
            for group in range(file.num_row_groups):
                yield from _rows_of_group(file, group, first, selected, shard.name)
                first += file.metadata.row_group(group).num_rows
    except (pa.ArrowException, OSError) as error:
        yield shard.name, _make_unreadable_reject(shard.name, f"the shard cannot be opened: {_first_line(error)}")


def _rows_of_group(
    file: pq.ParquetFile, group: int, first: int, columns: list[str], name: str
) -> Iterator[tuple[str, Any]]:
    num_rows = file.metadata.row_group(group).num_rows
    row = first
    batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False)
    while row < first + num_rows:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            num_lost = first + num_rows - row
            location = f"{name}, row {row + 1}"
            detail = f"{num_lost} rows from here on cannot be read: {_first_line(error)}"
            yield location, _make_unreadable_reject(location, detail)
            return
        for values in _to_rows(batch):
            row += 1
            yield f"{name}, row {row}", values


def _to_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows; a column that Python cannot represent, such as times in nanoseconds, has its type as values."""
    columns: dict[str, list[Any]] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except (ValueError, OverflowError, ImportError):
            columns[name] = [f"({column.type})"] * batch.num_rows
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _make_unreadable_reject(location: str, detail: str) -> Reject:
    return Reject(location, Reason.FILE_UNREADABLE, detail, location)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
