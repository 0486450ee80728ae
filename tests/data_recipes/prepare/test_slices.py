"""Owns the proofs about slices: 32 jobs and a merge make the store that one process makes, or say why not."""

import json
from pathlib import Path

import pytest

from data_recipes.prepare import __main__ as prepare
from data_recipes.prepare.slices import merge_slices, read_slices
from data_recipes.raw.image_pool import PicturePool
from data_recipes.schema.sample import Reason, Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.store.reader import Store
from data_recipes.writing import store_tables
from data_recipes.writing.sample_stream import Mark, NumberedStream, Slice, StreamChangedError
from data_recipes.writing.writer import write_store
from tests.data_recipes.prepare.program import SOURCES, arguments, contents, failure, make_place, started, write_slice
from tests.data_recipes.raw_folders import conversation, llava_record, picture, put, write_llava

SOURCE = SourceInfo(name="s", reader="test", root=".", max_reject_share=1.0)


def dirty_records(folder: Path) -> list[Sample | Reject]:
    """70 records: pictures that several show, repetitions, namesakes, bad records of both kinds."""
    items: list[Sample | Reject] = []
    for number in range(60):
        shown = put(folder / f"{number % 25}.png", picture(number % 25, 30, 40))
        items.append(conversation(str(number), shown))
        if number % 12 == 0:
            items.append(conversation(str(number), shown))  # again
            items.append(conversation(str(number), shown, answer="Another."))
        if number % 20 == 7:
            items.append(Reject(f"r{number}", Reason.BROKEN_RECORD, "cut off", f"file, record {number}"))
            items.append(conversation(f"gone {number}", folder / "gone.png"))
    items.append(conversation("odd name", put(folder / "odd.gif", picture(99))))
    return items


@pytest.mark.parametrize("num_slices", [2, 7])
def test_merged_slices_are_the_store_of_one_process(
    tmp_path: Path, num_slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte: order, kept pictures, told-apart ids, repetitions, rejects, repairs, shards."""
    monkeypatch.setattr(store_tables, "CHECKPOINT_RECORDS", 20)
    items = dirty_records(tmp_path / "raw")
    report = write_store(tmp_path / "one" / "s", SOURCE, items)
    assert report.rejects == {"broken_record": 3, "duplicate_id": 5, "picture_missing": 3}
    assert report.repairs == {"id_made_unique": 5, "wrong_extension": 1}
    store = tmp_path / "many" / "s"
    for number in range(num_slices, 0, -1):
        inputs = {"recipe": "r"} | ({"raw": "state"} if number == 1 else {})
        write_slice(store, Slice(number, num_slices), SOURCE, items, inputs)
    merged = merge_slices(store, SOURCE, read_slices(store, num_slices, "r"))
    assert merged.fingerprint == report.fingerprint
    assert contents(store) == contents(tmp_path / "one" / "s")
    assert json.loads((store / "inputs.json").read_text())["raw"] == "state"
    assert [path.name for path in store.parent.iterdir()] == ["s"]


def test_more_slices_than_records(tmp_path: Path) -> None:
    """Some are empty, and merge all the same."""
    items: list[Sample | Reject] = [conversation("a", picture(1)), conversation("b")]
    for number in range(1, 5):
        write_slice(tmp_path / "s", Slice(number, 4), SOURCE, items, {"recipe": "r"})
    merge_slices(tmp_path / "s", SOURCE, read_slices(tmp_path / "s", 4, "r"))
    assert Store.open(tmp_path / "s").ids() == ["a", "b"]


def test_the_program_in_slices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two jobs at once and one later, then the merge: the fingerprint of a start without slices, and a plain start
    afterwards finds everything prepared."""
    place = make_place(tmp_path)
    assert prepare.main(arguments(place, "--mixture", "all", stores="plain")) == 0
    expected = capsys.readouterr().out.split("fingerprint ")[1].split()[0]
    line = ("--mixture", "all", "--slice")
    with started(place, *line, "1/3") as one, started(place, *line, "3/3") as other:
        for job in (one, other):
            code, out, err = job.end()
            assert code == 0, err
            assert "when all are: --merge 3" in out
    code, sentence = failure(place, capsys, "--mixture", "all", "--merge", "3")
    assert (code, "1 of 3 slices are not there: 2. Make each of them: --source charts --slice 2/3" in sentence) == (
        2,
        True,
    )
    assert prepare.main(arguments(place, *line, "2/3")) == 0
    assert prepare.main(arguments(place, *line, "2/3")) == 0
    assert capsys.readouterr().out.count("2/3: already prepared") == len(SOURCES)
    for _ in range(2):  # a second merge finds nothing to do
        assert prepare.main(arguments(place, "--mixture", "all", "--merge", "3")) == 0
        assert f"fingerprint {expected}" in capsys.readouterr().out
    assert prepare.main(arguments(place, "--mixture", "all")) == 0
    assert capsys.readouterr().out.count("already prepared") == len(SOURCES)
    for name in (*SOURCES, "mixtures"):
        assert contents(place / "stores" / name) == contents(place / "plain" / name)


def test_slices_of_other_raw_files_or_yaml_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Records that changed between two jobs, and a YAML that changed before the merge, are told; so are too many
    rejects, when all are counted."""
    place = make_place(tmp_path)
    line = ("--source", "talk", "--slice")
    assert prepare.main(arguments(place, *line, "1/2")) == 0
    write_llava(place / "raw" / "llava", 20, [llava_record(77, "gone.png")])
    assert prepare.main(arguments(place, *line, "2/2")) == 0
    capsys.readouterr()
    code, sentence = failure(place, capsys, "--source", "talk", "--merge", "2")
    assert (code, "slices 1 and 2 were not made of the same raw files" in sentence) == (2, True)
    assert "talk.slices and make the slices again" in sentence
    (place / "stores/talk.slices/001-of-002/manifest.json").unlink()
    assert prepare.main(arguments(place, *line, "1/2")) == 0
    code, sentence = failure(place, capsys, "--source", "talk", "--merge", "2")
    assert (code, "1 of 21 records are bad (picture_missing 1)" in sentence) == (1, True)
    put(place / "configs/source/talk.yaml", "reader: llava_json\nroot: llava\noptions: {annotations: other.json}")
    code, sentence = failure(place, capsys, "--source", "talk", "--merge", "2")
    assert (code, "configs/source/talk.yaml has changed since slice 1 was made" in sentence) == (2, True)


def test_an_interrupted_merge_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle it keeps its slices and its checkpoint; stopped before the slices were removed it is whole
    already."""
    monkeypatch.setattr(store_tables, "CHECKPOINT_RECORDS", 20)
    items = dirty_records(tmp_path / "raw")
    write_store(tmp_path / "one" / "s", SOURCE, items)
    store = tmp_path / "many" / "s"
    for number in (1, 2):
        write_slice(store, Slice(number, 2), SOURCE, items, {"recipe": "r"})
    add, seen = store_tables.StoreTables.add, []

    def stop_at_50(tables: store_tables.StoreTables, loaded: object, mark: Mark, strict: bool = False) -> object:
        seen.append(mark.num_records)
        if len(seen) == 50:
            raise KeyboardInterrupt
        return add(tables, loaded, mark, strict)  # type: ignore[arg-type]

    monkeypatch.setattr(store_tables.StoreTables, "add", stop_at_50)
    with pytest.raises(KeyboardInterrupt):
        merge_slices(store, SOURCE, read_slices(store, 2, "r"))
    assert not store.exists()
    merge_slices(store, SOURCE, read_slices(store, 2, "r"))
    assert seen[50:] == list(range(41, 78))
    assert contents(store) == contents(tmp_path / "one" / "s")


def test_slices_are_every_nth_record() -> None:
    """Each record is in exactly one slice of any number."""
    for num_slices in (1, 3, 32):
        parts = [Slice(number, num_slices) for number in range(1, num_slices + 1)]
        assert all([part.has(record) for part in parts].count(True) == 1 for record in range(100))
    assert Slice.parse("3/32") == Slice(3, 32)
    assert [record for record in range(70) if Slice(3, 32).has(record)] == [2, 34, 66]


def test_a_stream_that_changed_before_its_mark_is_told(tmp_path: Path) -> None:
    """The digest is of ids, texts, pictures' names and places; it does not depend on where the raw folder lies."""

    def marks(items: list[Sample | Reject], root: Path, begin: Mark | None = None) -> list[Mark]:
        stream = NumberedStream(((None, item) for item in items), root, {"s": begin or Mark()})
        return [mark for _, mark, _ in stream.load(PicturePool())]

    items: list[Sample | Reject] = [conversation(str(n), tmp_path / "a" / f"{n}.png") for n in range(5)]
    first = marks(items, tmp_path / "a")
    assert [mark.num_records for mark in first] == [1, 2, 3, 4, 5, 5]
    moved: list[Sample | Reject] = [conversation(str(n), tmp_path / "b" / f"{n}.png") for n in range(5)]
    assert marks(moved, tmp_path / "b") == first
    assert marks(items, tmp_path / "a", begin=first[2]) == first[3:]
    changed = [*items[:1], conversation("1", tmp_path / "a" / "1.png", answer="Else."), *items[2:]]
    for others in (changed, items[:2], items[1:]):
        with pytest.raises(StreamChangedError):
            marks(others, tmp_path / "a", begin=first[2])
    assert marks([*items[:3], *changed[:1]], tmp_path / "a", begin=first[2])[0].num_records == 4


def test_a_slice_opens_as_a_store(tmp_path: Path) -> None:
    """It is a store's folder: what is in it can be looked at before the others are there."""
    write_slice(tmp_path / "s", Slice(2, 3), SOURCE, dirty_records(tmp_path / "raw"), {"recipe": "r"})
    store = Store.open(tmp_path / "s.slices" / "002-of-003")
    assert len(store) + sum(store.manifest["rejects"].values()) == store.manifest["num_records"] == 26
    assert store.sample(0).id == "0"
