"""Owns the proofs about parquet: every row once, in small pieces, and damage costs itself."""

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from data_recipes.raw.image_files import PictureError
from data_recipes.raw.parquet_records import find_shards, iter_rows, picture_of
from data_recipes.schema.sample import DataError, Reason, Reject
from tests.data_recipes.raw_folders import put, write_parquet


def test_every_row_with_its_place(tmp_path: Path) -> None:
    """Rows are numbered through the row groups; columns that are not asked for are not there."""
    shard = write_parquet(tmp_path / "a.parquet", [{"n": n, "other": "x"} for n in range(45)], rows_per_group=20)
    found = list(iter_rows(shard, ["n"], optional=["absent"]))
    assert [place for place, _ in found] == [f"a.parquet, row {n}" for n in range(1, 46)]
    assert [row for _, row in found] == [{"n": n} for n in range(45)]


def test_shards_come_by_name(tmp_path: Path) -> None:
    """Whatever order the file system lists them in; none at all is the user's mistake."""
    for name in ("c", "a", "b"):
        put(tmp_path / "data" / f"train-{name}.parquet", "")
    assert [path.name[6] for path in find_shards(tmp_path, "data/train-*.parquet")] == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"data/test-\*\.parquet: there is no such file"):
        find_shards(tmp_path, "data/test-*.parquet")


def test_a_missing_column_is_the_users_mistake(tmp_path: Path) -> None:
    """It is another layout, not dirt: the sentence lists what the shard has."""
    shard = write_parquet(tmp_path / "a.parquet", [{"text": "x", "n": 1}])
    with pytest.raises(DataError, match="no column 'messages'; it has text, n"):
        list(iter_rows(shard, ["messages"]))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 10])
def test_a_shard_that_cannot_be_opened(tmp_path: Path, content: bytes) -> None:
    """One reject in its stead."""
    shard = put(tmp_path / "a.parquet", content)
    ((place, reject),) = iter_rows(shard, ["n"])
    assert place == "a.parquet"
    assert isinstance(reject, Reject)
    assert reject.reason is Reason.FILE_UNREADABLE


def test_a_shard_that_was_cut_off(tmp_path: Path) -> None:
    """Its footer is gone, so nothing of it can be read: one reject."""
    shard = write_parquet(tmp_path / "a.parquet", [{"n": n} for n in range(45)])
    put(shard, shard.read_bytes()[:-30])
    assert [type(row) for _, row in iter_rows(shard, ["n"])] == [Reject]


def test_damage_in_the_middle_costs_its_row_group(tmp_path: Path) -> None:
    """What comes before and after is read; the reject says how many rows are lost."""
    rows = [{"data": bytes([n]) * 4000} for n in range(30)]
    shard = write_parquet(tmp_path / "a.parquet", rows, rows_per_group=10)
    with pa.memory_map(str(shard)) as whole:
        content = bytearray(whole.read())
    metadata = pa.parquet.ParquetFile(shard).metadata.row_group(1).column(0)
    start = metadata.dictionary_page_offset or metadata.data_page_offset
    content[start : start + metadata.total_compressed_size] = bytes(metadata.total_compressed_size)
    put(shard, bytes(content))
    found = [row for _, row in iter_rows(shard, ["data"])]
    rejects = [row for row in found if isinstance(row, Reject)]
    assert len(rejects) == 1
    assert "10 rows from here on cannot be read" in rejects[0].detail
    assert [row for row in found if not isinstance(row, Reject)] == rows[:10] + rows[20:]


def test_a_shard_is_never_held_whole(tmp_path: Path) -> None:
    """Eighty pictures of a megabyte, each its own page, in one row group: a few are in memory at any time."""
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


def test_the_forms_of_a_picture(tmp_path: Path) -> None:
    """Bytes win over a path, which is often no more than the file's old name."""
    assert picture_of({"bytes": b"x", "path": "../a.png"}, tmp_path) == b"x"
    assert picture_of({"path": "a.png"}, tmp_path) == tmp_path / "a.png"
    assert picture_of("a.png", tmp_path) == tmp_path / "a.png"
    for wrong in (None, 3, {}, {"bytes": None, "path": None}):
        with pytest.raises(PictureError) as caught:
            picture_of(wrong, tmp_path)
        assert caught.value.reason is Reason.NOT_A_STRING
