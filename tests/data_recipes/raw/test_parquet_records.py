"""Tests of reading parquet files in small batches, and of damaged files."""

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from data_recipes.raw.parquet_records import find_shards, iter_rows, list_columns
from data_recipes.schema.sample import DataError, Reason, Reject
from tests.data_recipes.raw_folders import write_file, write_parquet


def test_rows_and_locations(tmp_path: Path) -> None:
    """Rows are numbered across row groups, and other columns are not read."""
    shard = write_parquet(tmp_path / "a.parquet", [{"n": n, "other": "x"} for n in range(45)], rows_per_group=20)
    rows_found = list(iter_rows(shard, ["n"], optional=["absent"]))
    assert [location for location, _ in rows_found] == [f"a.parquet, row {n}" for n in range(1, 46)]
    assert [row for _, row in rows_found] == [{"n": n} for n in range(45)]


def test_find_shards(tmp_path: Path) -> None:
    """Shards are sorted by name; a pattern without matches is an error."""
    for name in ("c", "a", "b"):
        write_file(tmp_path / "data" / f"train-{name}.parquet", "")
    assert [path.name[6] for path in find_shards(tmp_path, "data/train-*.parquet")] == ["a", "b", "c"]
    several = find_shards(tmp_path, ["data/train-c.parquet", "data/train-*.parquet"])
    assert [path.name[6] for path in several] == ["c", "a", "b"]
    for patterns in ("data/test-*.parquet", ["data/train-*.parquet", "data/test-*.parquet"]):
        with pytest.raises(DataError, match=r"data/test-\*\.parquet: no file matches"):
            find_shards(tmp_path, patterns)


def test_missing_column(tmp_path: Path) -> None:
    """The message lists the columns of the shard."""
    shard = write_parquet(tmp_path / "a.parquet", [{"text": "x", "n": 1}])
    with pytest.raises(DataError, match="no column 'messages'; the shard has text, n"):
        list(iter_rows(shard, ["messages"]))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 10])
def test_unreadable_shard(tmp_path: Path, content: bytes) -> None:
    """An unreadable shard is one reject."""
    shard = write_file(tmp_path / "a.parquet", content)
    ((location, reject),) = iter_rows(shard, ["n"])
    assert location == "a.parquet"
    assert isinstance(reject, Reject)
    assert reject.reason is Reason.FILE_UNREADABLE


def test_other_kind_of_file(tmp_path: Path) -> None:
    """A pointer of git-lfs is a user error that names the file."""
    shard = write_file(tmp_path / "a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:8\nsize 2\n")
    assert list_columns(shard) == []
    with pytest.raises(DataError, match=r"a\.parquet is a git-lfs pointer"):
        list(iter_rows(shard, ["n"]))


def test_columns_of_any_type(tmp_path: Path) -> None:
    """A column that Python cannot represent does not prevent reading the others."""
    table = pa.table(
        {"n": [1, 2], "time": pa.array([1, 2], pa.timestamp("ns")), "day": pa.array([1, -(2**30)], pa.date32())}
    )
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    names = list_columns(tmp_path / "a.parquet")
    assert names == ["n", "time", "day"]
    rows = [row for _, row in iter_rows(tmp_path / "a.parquet", names)]
    assert [row["n"] for row in rows] == [1, 2]


def test_truncated_shard(tmp_path: Path) -> None:
    """A shard without footer is one reject."""
    shard = write_parquet(tmp_path / "a.parquet", [{"n": n} for n in range(45)])
    write_file(shard, shard.read_bytes()[:-30])
    assert [type(row) for _, row in iter_rows(shard, ["n"])] == [Reject]


def test_damaged_row_group(tmp_path: Path) -> None:
    """Other row groups are read, and the reject has the number of lost rows."""
    rows = [{"data": bytes([n]) * 4000} for n in range(30)]
    shard = write_parquet(tmp_path / "a.parquet", rows, rows_per_group=10)
    with pa.memory_map(str(shard)) as whole:
        content = bytearray(whole.read())
    metadata = pa.parquet.ParquetFile(shard).metadata.row_group(1).column(0)
    start = metadata.dictionary_page_offset or metadata.data_page_offset
    content[start : start + metadata.total_compressed_size] = bytes(metadata.total_compressed_size)
    write_file(shard, bytes(content))
    rows_found = [row for _, row in iter_rows(shard, ["data"])]
    rejects = [row for row in rows_found if isinstance(row, Reject)]
    assert len(rejects) == 1
    assert "10 rows from here on cannot be read" in rejects[0].detail
    assert [row for row in rows_found if not isinstance(row, Reject)] == rows[:10] + rows[20:]


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Of eighty images of one megabyte in one row group, only a few are in memory at any time."""
    rows = [{"data": bytes([n]) * (1 << 20)} for n in range(80)]
    table = pa.Table.from_pylist(rows)
    options = {"use_dictionary": False, "compression": "none", "write_batch_size": 1, "data_page_size": 1 << 20}
    pa.parquet.write_table(table, tmp_path / "a.parquet", **options)
    del table
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    peak = 0
    for number, (_, row) in enumerate(iter_rows(tmp_path / "a.parquet", ["data"])):
        assert row["data"][0] == number
        peak = max(peak, pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert 0 < peak < 60 << 20
