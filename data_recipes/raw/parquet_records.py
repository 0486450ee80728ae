"""Rows out of parquet files of any size, a few at a time; and pictures as their cells hold them.

Owns: finding the shards, reading them in pieces, what happens at a shard that cannot be read, the two forms that a
picture takes in a cell.
Leaves: what a row means to the readers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_recipes.raw.image_files import PictureError, inside
from data_recipes.schema.sample import DataError, Reason, Reject

# Published shards hold up to a gigabyte of pictures: no more is held than a page of the file and a few rows.
_ROWS_AT_ONCE = 16
_BUFFER_BYTES = 1 << 20


def find_shards(root: Path, pattern: str) -> list[Path]:
    """The files below `root` that match (`data/train-*.parquet`), by name.

    Raises:
        DataError: there is none.
    """
    shards = sorted(path for path in root.glob(pattern) if path.is_file())
    if not shards:
        raise DataError(
            f"{root / pattern}: there is no such file. The raw folder exists, but its shards are not in it: "
            "fetch them, or name the right ones in `options` of the source's YAML."
        )
    return shards


def iter_rows(shard: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) for each row of a shard; a row is a dictionary of the columns.

    A shard that cannot be opened, or whose rows cannot be read on, is yielded as one `Reject` in their stead, and
    says how many rows are lost where that is known.

    Args:
        shard: the file.
        columns: columns to read; others are not touched.
        optional: columns to read where the shard has them.

    Raises:
        DataError: the shard has not all of `columns`.
    """
    try:
        # Memory-mapping and pre-buffering would both hold a whole row group of pictures.
        with pq.ParquetFile(shard, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            known = file.schema_arrow.names
            missing = [name for name in columns if name not in known]
            if missing:
                raise DataError(f"{shard}: no column {missing[0]!r}; it has {', '.join(known)}.")
            wanted = [*columns, *(name for name in optional if name in known)]
            first = 0
            for group in range(file.num_row_groups):
                yield from _rows_of_group(file, group, first, wanted, shard.name)
                first += file.metadata.row_group(group).num_rows
    except (pa.ArrowException, OSError) as error:
        yield shard.name, _unreadable(shard.name, f"the shard cannot be opened: {_first_line(error)}")


def _rows_of_group(
    file: pq.ParquetFile, group: int, first: int, columns: list[str], name: str
) -> Iterator[tuple[str, Any]]:
    num_rows = file.metadata.row_group(group).num_rows
    row = first
    batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False)
    while row < first + num_rows:
        try:
            rows = next(batches).to_pylist()
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            lost = first + num_rows - row
            place = f"{name}, row {row + 1}"
            yield place, _unreadable(place, f"{lost} rows from here on cannot be read: {_first_line(error)}")
            return
        for values in rows:
            row += 1
            yield f"{name}, row {row}", values


def picture_of(cell: object, root: Path) -> Path | bytes:
    """The picture of a cell: {"bytes": ..., "path": ...} as `datasets` writes it, or a path below `root`.

    Raises:
        PictureError: `not_a_string` where it is neither, `path_outside_root` where the path leaves `root`.
    """
    if isinstance(cell, dict):
        data, path = cell.get("bytes"), cell.get("path")
        cell = data if isinstance(data, bytes) else path
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str):
        raise PictureError(Reason.NOT_A_STRING, "a picture is neither a path nor holds `bytes` or a `path`")
    return inside(root, cell)


def _unreadable(place: str, detail: str) -> Reject:
    return Reject(place, Reason.FILE_UNREADABLE, detail, place)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
