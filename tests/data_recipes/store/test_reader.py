"""Tests of writing and reading a store."""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest

from data_recipes.raw.image_pool import ImagePool
from data_recipes.readers import llava_json
from data_recipes.schema.sample import DataError, Message, Reason, Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.store.reader import Store
from data_recipes.writing import store_tables
from data_recipes.writing.arrow_folder import TableWriter
from data_recipes.writing.store_tables import RejectedError
from data_recipes.writing.writer import write_store
from tests.data_recipes.raw_folders import llava_record, make_image, make_sample, make_store, write_file, write_llava
from tests.permissions import public_folder, unprivileged

SOURCE = SourceInfo(name="s", reader="test", root=".", max_reject_share=1.0, licence="CC0")
UNLISTED = ("manifest.json", "inputs.json")
REJECT = Reject("r", Reason.BROKEN_RECORD, "cut off", "file, record 9")


def test_round_trip(tmp_path: Path) -> None:
    """Ids, messages, sizes, hashes and bytes are unchanged and in order."""
    first_item, second_item = make_image(1, 12, 16), make_image(2, 20, 10, "JPEG")
    chat = Sample("text", (Message("system", "S"), Message("user", "é\u2028"), Message("assistant", "日本")))
    store = make_store(tmp_path / "s", [make_sample("a", first_item), chat, make_sample("b", second_item, first_item)])
    assert (len(store), store.name) == (3, "s")
    assert store.text(1).messages == chat.messages
    assert [store.text(i).id for i in range(3)] == ["a", "text", "b"]
    assert store.text(2).sizes_hw == ((20, 10), (12, 16))
    sample = store.sample(2)
    assert (sample.images, sample.sizes_hw) == ((second_item, first_item), ((20, 10), (12, 16)))
    assert (sample.source, sample.image_hashes) == ("s", store.image_hashes(2))
    assert store.sample(1).images == ()
    assert store.manifest["num_pictures"] == 2  # each distinct image is stored once
    starts, rows = store.image_rows()
    assert [rows[starts[i] : starts[i + 1]].tolist() for i in range(3)] == [[0], [], [1, 0]]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            store.text(index)


def test_load_from_disk(tmp_path: Path) -> None:
    """`datasets.load_from_disk` opens both tables by memory map."""
    make_store(tmp_path / "s", [make_sample("a", make_image(1)), make_sample("b")])
    both = datasets.load_from_disk(str(tmp_path / "s"))
    assert isinstance(both, datasets.DatasetDict)
    assert both["samples"][0]["messages"][1] == {"role": "assistant", "text": "A thing."}
    assert both["pictures"][0]["bytes"] == make_image(1)
    assert both["pictures"].cache_files
    assert both["samples"].filter(lambda row: row["id"] == "b", keep_in_memory=True)[0]["pictures"] == []


def test_many_rows_and_shards(tmp_path: Path) -> None:
    """Batches and shards are read in order, buffers are limited, and a writer continues after existing shards."""
    features = datasets.Features({"x": datasets.Value("int32"), "b": datasets.Value("binary")})
    writer = TableWriter(tmp_path / "t", features, batch_rows=10, batch_bytes=300)
    for number in range(60):
        assert writer.write({"x": number, "b": b"." * 50}, 50) == number
        assert len(writer._rows) < 10
        if number % 20 == 19:
            shards = writer.finish_shard()
    writer.write({"x": 1000, "b": b"lost"}, 300)
    writer.abort()
    writer = TableWriter(tmp_path / "t", features, batch_rows=10, batch_bytes=300, shards=shards)
    for number in range(60, 95):
        assert writer.write({"x": number, "b": b"." * 50}, 50) == number
    writer.close("f")
    table = datasets.load_from_disk(str(tmp_path / "t"))
    assert table["x"][:] == list(range(95))
    assert len(list((tmp_path / "t").glob("*.arrow"))) == 4
    store = make_store(tmp_path / "s", (make_sample(str(n)) for n in range(2500)))
    assert [store.text(n).id for n in (0, 999, 1000, 2499)] == ["0", "999", "1000", "2499"]


def test_empty_store(tmp_path: Path) -> None:
    """A source without valid records gives an empty store."""
    store = make_store(tmp_path / "s", [REJECT], max_reject_share=1.0)
    assert len(store) == 0
    assert store.image_rows()[0].tolist() == [0]


def test_fingerprint(tmp_path: Path) -> None:
    """The fingerprint depends on texts, images, ids and order, and on nothing else."""
    base = [make_sample("a", make_image(1)), make_sample("b", make_image(2))]
    variants = [
        base,
        base[::-1],
        [make_sample("a", make_image(1)), make_sample("b", make_image(3))],
        [make_sample("a", make_image(1)), make_sample("c", make_image(2))],
        [make_sample("a", make_image(1)), make_sample("b", make_image(2), answer="Another.")],
    ]
    prints = [make_store(tmp_path / str(n), samples).fingerprint for n, samples in enumerate(variants)]
    assert len(set(prints)) == len(variants)
    assert make_store(tmp_path / "elsewhere" / "named_otherwise", base).fingerprint == prints[0]


def test_stores_do_not_depend_on_workers(tmp_path: Path) -> None:
    """1, 2 and 4 processes write the same files."""
    root = write_llava(tmp_path / "raw", 60, [llava_record(99, "gone.png"), llava_record(98, "bad.png")])
    write_file(root / "images" / "bad.png", b"not a picture")
    contents = []
    for num_workers in (1, 2, 4):
        path = tmp_path / str(num_workers) / "s"
        with ImagePool(num_workers) as pool:
            write_store(path, SOURCE, llava_json.samples(root, "mix.json", "images"), pool)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        contents.append({str(file.relative_to(path)): file.read_bytes() for file in files})
    assert contents[0] == contents[1] == contents[2]
    manifest = json.loads(contents[0]["manifest.json"])
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents[0].items()
        if name not in UNLISTED
    }
    assert (manifest["num_samples"], manifest["num_pictures"]) == (60, 45)
    assert manifest["rejects"] == {"picture_missing": 1, "picture_unreadable": 1}


def test_quarantine(tmp_path: Path) -> None:
    """Each reject has id, reason, detail and location, and the manifest has the counts per reason."""
    bad = Sample("bad \udce9", (Message("user", "?"), Message("assistant", "!")), (), "file, record 2")
    write_store(tmp_path / "s", SOURCE, [REJECT, bad, make_sample("a", tmp_path / "gone.png")])
    lines = (tmp_path / "s" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "id": "r",
        "reason": "broken_record",
        "detail": "cut off",
        "place": "file, record 9",
    }
    assert [json.loads(line)["reason"] for line in lines[1:]] == ["wrong_encoding", "picture_missing"]
    manifest = Store.open(tmp_path / "s").manifest
    assert manifest["rejects"] == {"broken_record": 1, "picture_missing": 1, "wrong_encoding": 1}
    assert manifest["num_records"] == 3
    assert manifest["licence"] == "CC0"


def test_duplicates_and_repeated_ids(tmp_path: Path) -> None:
    """A repeated record is `duplicate_id`; another record with the same id gets a unique id that depends on its
    content."""
    first_item, second_item = make_sample("a", make_image(1)), make_sample("a", make_image(1), answer="Another.")
    report = write_store(tmp_path / "s", SOURCE, [first_item, first_item, second_item, second_item, first_item])
    assert report.rejects == {"duplicate_id": 3}
    assert report.repairs == {"id_made_unique": 1}
    first, second = Store.open(tmp_path / "s").ids()
    assert first == "a"
    assert second.startswith("a~")
    third = make_sample("a", answer="A third.")
    assert make_store(tmp_path / "t", [third, first_item, second_item], max_reject_share=1.0).ids()[2] == second


def test_too_many_rejects_leave_no_store(tmp_path: Path) -> None:
    """Above the limit the old store is kept, and the rejects are listed in a file."""
    source = SourceInfo(name="s", reader="test", root=".", max_reject_share=0.3)
    write_store(tmp_path / "s", source, [make_sample("a"), make_sample("b")])
    with pytest.raises(RejectedError, match=r"1 of 2 records are rejected \(broken_record 1\).*max_reject_share 0.3"):
        write_store(tmp_path / "s", source, [make_sample("a"), REJECT])
    assert len(Store.open(tmp_path / "s")) == 2
    assert "broken_record" in (tmp_path / "s.quarantine.jsonl").read_text()
    write_store(tmp_path / "s", source, [make_sample("c")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_strict_stops_at_first_reject(tmp_path: Path) -> None:
    """--strict reports the first reject and leaves no files."""
    with pytest.raises(RejectedError, match="broken_record at file, record 9: cut off"):
        write_store(tmp_path / "s", SOURCE, [make_sample("a"), REJECT], strict=True)
    assert list(tmp_path.iterdir()) == []


def failing(error: BaseException) -> Iterator[Sample]:
    """Yield first_item sample, then raise an error."""
    yield make_sample("a", make_image(1))
    raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_write(tmp_path: Path, error: BaseException) -> None:
    """A full disk or Ctrl-C leaves the previous state."""
    with pytest.raises(type(error)):
        write_store(tmp_path / "s", SOURCE, failing(error))
    assert list(tmp_path.iterdir()) == []
    old = make_store(tmp_path / "s", [make_sample("old")])
    with pytest.raises(type(error)):
        write_store(tmp_path / "s", SOURCE, failing(error))
    assert Store.open(tmp_path / "s").fingerprint == old.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_full_disk_at_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk that is reported by fsync only is detected before the rename."""

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(store_tables, "sync_folder", full)
    with pytest.raises(OSError, match="No space left"):
        write_store(tmp_path / "s", SOURCE, [make_sample("a")])
    assert list(tmp_path.iterdir()) == []


def test_incomplete_stores(tmp_path: Path) -> None:
    """Missing, incomplete, damaged and incompatible stores are reported with the command that prepares them."""
    command = "python -m data_recipes.prepare --source s"
    with pytest.raises(DataError, match=rf"no complete store at .*{command}"):
        Store.open(tmp_path / "s")
    make_store(tmp_path / "s", [make_sample("a", make_image(1))])
    (tmp_path / "s").rename(tmp_path / "s.partial")
    with pytest.raises(DataError, match="its preparation was interrupted"):
        Store.open(tmp_path / "s")
    (tmp_path / "s.partial").rename(tmp_path / "s")
    manifest = tmp_path / "s" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"num_samples": 1', '"num_samples": 2'))
    with pytest.raises(DataError, match="has 1 samples"):
        Store.open(tmp_path / "s")
    manifest.write_text(text.replace('"format": 2', '"format": 1'))
    with pytest.raises(DataError, match=command):
        Store.open(tmp_path / "s")
    manifest.write_text(text)
    (tmp_path / "s" / "samples" / "state.json").unlink()
    with pytest.raises(DataError, match="damaged"):
        Store.open(tmp_path / "s")


def test_pickling(tmp_path: Path) -> None:
    """A pickled store has its path, not its images."""
    store = make_store(tmp_path / "s", [make_sample("a", make_image(1, 300, 300)), make_sample("b")])
    store.sample(0)
    assert store.text(0).sizes_hw == ((300, 300),)
    data = pickle.dumps(store)
    assert len(data) < 4000
    again = pickle.loads(data)
    assert again.sample(0) == store.sample(0)
    assert np.array_equal(again.all_image_hashes(), store.all_image_hashes())


@pytest.mark.parametrize("name", ["manifest.json", "data"])
def test_denied_store_is_a_permission_problem(name: str) -> None:
    """A store of another user that may not be read is neither missing nor damaged: the file and its owner are named."""
    with public_folder() as folder:
        store = make_store(folder / "s", [make_sample("a", make_image(1, 12, 16))])
        path = store.path / name if name == "manifest.json" else next(store.path.rglob("*.arrow"))
        Store.open(store.path)
        path.chmod(0o600 if os.geteuid() == 0 else 0)
        with pytest.raises(DataError, match=rf"{path} exists but .*owner {path.owner()}") as error, unprivileged():
            Store.open(store.path)
        assert "repare it" not in str(error.value)
