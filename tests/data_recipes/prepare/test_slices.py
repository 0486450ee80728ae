"""Tests of slices: merged slices give the store that a single process writes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_recipes.prepare import __main__ as prepare
from data_recipes.prepare.slices import merge_slices, read_slices
from data_recipes.raw.image_pool import ImagePool
from data_recipes.schema.sample import Reason, Reject, Sample
from data_recipes.schema.source import SourceInfo
from data_recipes.store.reader import Store
from data_recipes.writing import store_tables
from data_recipes.writing.sample_stream import NumberedStream, Slice, StreamChangedError, StreamPosition
from data_recipes.writing.writer import write_store
from tests.data_recipes.prepare.program import (
    SOURCES,
    arguments,
    contents,
    failure,
    make_workspace,
    started,
    write_slice,
)
from tests.data_recipes.raw_folders import llava_record, make_image, make_sample, write_file, write_llava

SOURCE = SourceInfo(name="s", reader="test", root=".", max_reject_share=1.0)


def make_records(folder: Path) -> list[Sample | Reject]:
    """Build 77 records with shared images, duplicates, repeated ids and invalid records."""
    items: list[Sample | Reject] = []
    for number in range(60):
        shown = write_file(folder / f"{number % 25}.png", make_image(number % 25, 30, 40))
        items.append(make_sample(str(number), shown))
        if number % 12 == 0:
            items.append(make_sample(str(number), shown))  # a duplicate
            items.append(make_sample(str(number), shown, answer="Another."))
        if number % 20 == 7:
            items.append(Reject(f"r{number}", Reason.BROKEN_RECORD, "cut off", f"file, record {number}"))
            items.append(make_sample(f"gone {number}", folder / "gone.png"))
    items.append(make_sample("odd name", write_file(folder / "odd.gif", make_image(99))))
    for number in (3, 9, 40):
        item = items[number]
        assert isinstance(item, Sample)
        items[number] = replace(item, notes=(("unknown_key:score", str(number)), (f"unknown_key:{number}", "x")))
    return items


@pytest.mark.parametrize("num_slices", [2, 7])
def test_merged_slices_are_the_store_of_one_process(
    tmp_path: Path, num_slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged store is byte for byte that of one process."""
    monkeypatch.setattr(store_tables, "CHECKPOINT_RECORDS", 20)
    items = make_records(tmp_path / "raw")
    report = write_store(tmp_path / "one" / "s", SOURCE, items)
    assert report.rejects == {"broken_record": 3, "duplicate_id": 5, "picture_missing": 3}
    assert report.repairs == {"id_made_unique": 5, "wrong_extension": 1}
    assert report.notes["unknown_key:score"] == {"records": 3, "example": "3"}
    assert len(report.notes) == 4
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
    """Empty slices can be merged."""
    items: list[Sample | Reject] = [make_sample("a", make_image(1)), make_sample("b")]
    for number in range(1, 5):
        write_slice(tmp_path / "s", Slice(number, 4), SOURCE, items, {"recipe": "r"})
    merge_slices(tmp_path / "s", SOURCE, read_slices(tmp_path / "s", 4, "r"))
    assert Store.open(tmp_path / "s").ids() == ["a", "b"]


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slices of several jobs and a merge give the same fingerprint as a run without slices."""
    workspace = make_workspace(tmp_path)
    assert prepare.main(arguments(workspace, "--mixture", "all", stores="plain")) == 0
    expected = capsys.readouterr().out.split("fingerprint ")[1].split()[0]
    line = ("--mixture", "all", "--slice")
    with started(workspace, *line, "1/3") as one, started(workspace, *line, "3/3") as other:
        for job in (one, other):
            code, out, err = job.wait()
            assert code == 0, err
            assert "after all slices, run --merge 3" in out
    code, sentence = failure(workspace, capsys, "--mixture", "all", "--merge", "3")
    assert (code, "1 of 3 slices are missing: 2. Prepare each of them: --source charts --slice 2/3" in sentence) == (
        2,
        True,
    )
    assert prepare.main(arguments(workspace, *line, "2/3")) == 0
    assert prepare.main(arguments(workspace, *line, "2/3")) == 0
    assert capsys.readouterr().out.count("2/3: already prepared") == len(SOURCES)
    for _ in range(2):  # the second merge has no effect
        assert prepare.main(arguments(workspace, "--mixture", "all", "--merge", "3")) == 0
        assert f"fingerprint {expected}" in capsys.readouterr().out
    assert prepare.main(arguments(workspace, "--mixture", "all")) == 0
    assert capsys.readouterr().out.count("already prepared") == len(SOURCES)
    for name in (*SOURCES, "mixtures"):
        assert contents(workspace / "stores" / name) == contents(workspace / "plain" / name)


def test_slices_that_do_not_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slices of different raw files or options are not merged, and the share of rejects is checked when merging."""
    workspace = make_workspace(tmp_path)
    line = ("--source", "talk", "--slice")
    assert prepare.main(arguments(workspace, *line, "1/2")) == 0
    write_llava(workspace / "raw" / "llava", 20, [llava_record(77, "gone.png")])
    assert prepare.main(arguments(workspace, *line, "2/2")) == 0
    capsys.readouterr()
    code, sentence = failure(workspace, capsys, "--source", "talk", "--merge", "2")
    assert (code, "slices 1 and 2 were prepared from different raw files" in sentence) == (2, True)
    assert "talk.slices and prepare the slices again" in sentence
    (workspace / "stores/talk.slices/001-of-002/manifest.json").unlink()
    assert prepare.main(arguments(workspace, *line, "1/2")) == 0
    code, sentence = failure(workspace, capsys, "--source", "talk", "--merge", "2")
    assert (code, "1 of 21 records are rejected (picture_missing 1)" in sentence) == (1, True)
    write_file(
        workspace / "configs/source/talk.yaml", "reader: llava_json\nroot: llava\noptions: {annotations: other.json}"
    )
    code, sentence = failure(workspace, capsys, "--source", "talk", "--merge", "2")
    assert (code, "configs/source/talk.yaml has changed since slice 1 was prepared" in sentence) == (2, True)


def test_interrupted_merge_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted merge keeps its slices and is resumed."""
    monkeypatch.setattr(store_tables, "CHECKPOINT_RECORDS", 20)
    items = make_records(tmp_path / "raw")
    write_store(tmp_path / "one" / "s", SOURCE, items)
    store = tmp_path / "many" / "s"
    for number in (1, 2):
        write_slice(store, Slice(number, 2), SOURCE, items, {"recipe": "r"})
    add, seen = store_tables.StoreTables.add, []

    def stop_at_50(
        tables: store_tables.StoreTables, loaded: object, position: StreamPosition, strict: bool = False
    ) -> object:
        seen.append(position.num_records)
        if len(seen) == 50:
            raise KeyboardInterrupt
        return add(tables, loaded, position, strict)  # type: ignore[arg-type]

    monkeypatch.setattr(store_tables.StoreTables, "add", stop_at_50)
    with pytest.raises(KeyboardInterrupt):
        merge_slices(store, SOURCE, read_slices(store, 2, "r"))
    assert not store.exists()
    merge_slices(store, SOURCE, read_slices(store, 2, "r"))
    assert seen[50:] == list(range(41, 78))
    assert contents(store) == contents(tmp_path / "one" / "s")


def test_slices_are_every_nth_record() -> None:
    """Each record is in exactly one slice."""
    for num_slices in (1, 3, 32):
        parts = [Slice(number, num_slices) for number in range(1, num_slices + 1)]
        assert all([part.contains(record) for part in parts].count(True) == 1 for record in range(100))
    assert Slice.parse("3/32") == Slice(3, 32)
    assert [record for record in range(70) if Slice(3, 32).contains(record)] == [2, 34, 66]


def test_changed_stream_is_detected(tmp_path: Path) -> None:
    """The digest contains ids, texts, image names and locations, but not the path of the raw folder."""

    def positions(
        items: list[Sample | Reject], root: Path, begin: StreamPosition | None = None
    ) -> list[StreamPosition]:
        stream = NumberedStream(((None, item) for item in items), root, {"s": begin or StreamPosition()})
        return [position for _, position, _ in stream.load(ImagePool())]

    items: list[Sample | Reject] = [make_sample(str(n), tmp_path / "a" / f"{n}.png") for n in range(5)]
    first = positions(items, tmp_path / "a")
    assert [position.num_records for position in first] == [1, 2, 3, 4, 5, 5]
    moved: list[Sample | Reject] = [make_sample(str(n), tmp_path / "b" / f"{n}.png") for n in range(5)]
    assert positions(moved, tmp_path / "b") == first
    assert positions(items, tmp_path / "a", begin=first[2]) == first[3:]
    changed = [*items[:1], make_sample("1", tmp_path / "a" / "1.png", answer="Else."), *items[2:]]
    for others in (changed, items[:2], items[1:]):
        with pytest.raises(StreamChangedError):
            positions(others, tmp_path / "a", begin=first[2])
    assert positions([*items[:3], *changed[:1]], tmp_path / "a", begin=first[2])[0].num_records == 4


def test_a_slice_opens_as_a_store(tmp_path: Path) -> None:
    """A slice can be opened as a store before it is merged."""
    write_slice(tmp_path / "s", Slice(2, 3), SOURCE, make_records(tmp_path / "raw"), {"recipe": "r"})
    store = Store.open(tmp_path / "s.slices" / "002-of-003")
    assert len(store) + sum(store.manifest["rejects"].values()) == store.manifest["num_records"] == 26
    assert store.sample(0).id == "0"
