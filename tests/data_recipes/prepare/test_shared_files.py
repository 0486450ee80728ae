"""Owns the proofs about sources that are parts of one raw file: the file is read once, and each store is, byte for
byte, the one that is made of its part alone."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes.prepare import __main__ as prepare
from data_recipes.prepare.shared_files import group_by_file, read_together
from data_recipes.raw.json_records import iter_records
from data_recipes.readers import llava_json
from data_recipes.schema.sample import DataError, Reason, Reject, Sample
from data_recipes.schema.source import SourceInfo, read_source
from data_recipes.store.reader import read_manifest
from data_recipes.writing import store_tables
from data_recipes.writing.sample_stream import Mark
from tests.data_recipes.merged_records import MERGED, record
from tests.data_recipes.prepare.program import arguments, contents, failure, put_mixture
from tests.data_recipes.raw_folders import picture, put

PARTS = list(dict.fromkeys(component for component, _ in MERGED["sharegpt4v_100k"]))
SOURCES: dict[str, dict[str, Any]] = {
    f"mix_{part}": {
        "reader": "llava_json",
        "root": "mix",
        "options": {"annotations": "mix.json", "components": "sharegpt4v_100k", "component": part},
        "max_reject_share": 0.9,
    }
    for part in PARTS
}


def records() -> list[dict[str, Any]]:
    """Every part's records ten times under other ids, one whose picture is not there, one without a rule."""
    parts = [each | {"id": f"{each['id']} {turn}"} for turn in range(10) for _, each in MERGED["sharegpt4v_100k"]]
    gone = record("gone", "sam/images/gone.jpg", [("Is it here?", "No.")])
    return [*parts[:7], record("odd", "flickr/1.jpg", [("What?", "That.")]), *parts[7:], gone]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A merged file with its pictures, a source for each part, and the mixture `all` of them."""
    for name, source in SOURCES.items():
        put(tmp_path / "configs" / "source" / f"{name}.yaml", yaml.safe_dump(source))
    put_mixture(tmp_path, "all", {name: {} for name in SOURCES})
    put(tmp_path / "raw" / "mix" / "mix.json", json.dumps(records()))
    for number, (_, each) in enumerate(MERGED["sharegpt4v_100k"]):
        put(tmp_path / "raw" / "mix" / each["image"], picture(number % 3, 20, 30, "JPEG"))
    return tmp_path


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file of records that was opened, in order."""
    opened: list[Path] = []

    def counted(path: Path) -> Iterator[tuple[str, Any]]:
        opened.append(path)
        return iter_records(path)

    monkeypatch.setattr(llava_json, "iter_records", counted)
    return opened


def alone(place: Path) -> Path:
    """The stores of the sources prepared one by one."""
    for name in SOURCES:
        assert prepare.main(arguments(place, "--source", name, stores="alone")) == 0
    return place / "alone"


def assert_same(place: Path, expected: Path) -> None:
    """Each store is the one that its part alone makes."""
    assert sorted(path.name for path in (place / "stores").iterdir()) == sorted([*SOURCES, "mixtures"])
    for name in SOURCES:
        assert contents(place / "stores" / name) == contents(expected / name)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_merged_file_is_read_once(place: Path, parses: list[Path], workers: str) -> None:
    """Once for the room, once for all stores; every store is that of its part alone, rejects and bytes."""
    assert prepare.main(arguments(place, "--mixture", "all", "--workers", workers)) == 0
    assert len(parses) == (2 if workers == "1" else 1)  # measured in a worker, which counts for itself
    expected = alone(place)
    assert_same(place, expected)
    rejects = {name: (read_manifest(expected / name) or {})["rejects"] for name in SOURCES}
    assert rejects.pop("mix_sam") == {"picture_missing": 1, "unknown_component": 1}
    assert {json.dumps(each) for each in rejects.values()} == {'{"unknown_component": 1}'}


def test_only_what_is_missing_is_written(place: Path, parses: list[Path]) -> None:
    """A store that stands takes no part, and the others are still read together."""
    expected = alone(place)
    assert prepare.main(arguments(place, "--source", "mix_sam", "mix_lcs")) == 0
    before = (place / "stores" / "mix_sam" / "manifest.json").stat().st_mtime_ns
    parses.clear()
    assert prepare.main(arguments(place, "--mixture", "all")) == 0
    assert len(parses) == 2
    assert (place / "stores" / "mix_sam" / "manifest.json").stat().st_mtime_ns == before
    assert_same(place, expected)


def test_an_interrupted_start_goes_on_in_every_part(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each from its own checkpoint: no record that one had taken in is taken in again."""
    monkeypatch.setattr(store_tables, "CHECKPOINT_RECORDS", 3)
    expected = alone(place)
    add, taken = store_tables.StoreTables.add, []

    def stop_at_40(tables: store_tables.StoreTables, loaded: Any, mark: Mark, strict: bool = False) -> Reject | None:
        taken.append((tables._source.name, mark.num_records))
        if len(taken) == 40:
            raise KeyboardInterrupt
        return add(tables, loaded, mark, strict)

    with monkeypatch.context() as patch:
        patch.setattr(store_tables.StoreTables, "add", stop_at_40)
        assert prepare.main(arguments(place, "--mixture", "all")) == 130
        assert [path for path in (place / "stores").iterdir() if read_manifest(path)] == []
        first = taken[:]
        assert prepare.main(arguments(place, "--mixture", "all")) == 0
    again = set(taken[40:]) & set(first[:39])
    # What was taken in behind a checkpoint of three records is taken in again: two records of a source at most.
    assert all(sum(name == source for source, _ in again) <= 2 for name in SOURCES)
    assert len(set(first[:39]) - again) > 20
    assert_same(place, expected)


def test_slices_of_a_merged_file(place: Path, parses: list[Path]) -> None:
    """A job reads the file twice, whatever the number of parts; merged, they are the stores of one process."""
    for part in ("1/2", "2/2"):
        parses.clear()
        assert prepare.main(arguments(place, "--mixture", "all", "--slice", part)) == 0
        assert len(parses) == 2
    assert prepare.main(arguments(place, "--mixture", "all", "--merge", "2")) == 0
    assert_same(place, alone(place))


def test_one_part_with_too_many_bad_records(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told, exit code 1; the other parts are in their places, and it alone is left."""
    put(place / "configs/source/mix_sam.yaml", yaml.safe_dump(SOURCES["mix_sam"] | {"max_reject_share": 0.2}))
    shutil.rmtree(place / "raw/mix/sam")
    (place / "raw/mix/sam").mkdir()
    code, sentence = failure(place, capsys, "--mixture", "all")
    assert (code, "source mix_sam: 12 of 12 records are bad" in sentence) == (1, True)
    assert [name for name in SOURCES if read_manifest(place / "stores" / name) is None] == ["mix_sam"]


def test_strict_names_the_part(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first bad record of any part stops all."""
    code, sentence = failure(place, capsys, "--mixture", "all", "--strict")
    assert (code, "unknown_component at mix.json, record 8" in sentence) == (1, True)
    assert [name for name in SOURCES if (place / "stores" / name).exists()] == []


def test_what_goes_together() -> None:
    """The same file and table, another component; another file, table, folder, reader, or no component stands alone."""

    def source(name: str, reader: str = "llava_json", root: str = "r", **options: Any) -> SourceInfo:
        return SourceInfo(name, reader, root, options)

    merged = {"annotations": "m.json", "components": "mix665k"}
    sources = [
        source("a", **merged, component="gqa"),
        source("whole", annotations="m.json"),
        source("b", **merged, component="vg"),
        source("other_folder", root="q", **merged, component="okvqa"),
        source("again", **merged, component="gqa"),
        source("other_file", **merged | {"annotations": "n.json"}, component="okvqa"),
        source("other_reader", reader="messages_jsonl", annotations="m.json", component="x"),
        source("other_reader_2", reader="messages_jsonl", annotations="m.json", component="y"),
        source("c", **merged, component="aokvqa"),
    ]
    groups = [[each.name for each in group] for group in group_by_file(sources)]
    alone = [["whole"], ["other_folder"], ["again"], ["other_file"], ["other_reader"], ["other_reader_2"]]
    assert groups == [["a", "b", "c"], *alone]


def test_the_shipped_parts_go_together() -> None:
    """Four merged files, and each is read once."""
    configs = Path(__file__).resolve().parents[3] / "configs"
    sources = [read_source(configs, path.stem) for path in sorted((configs / "source").glob("*.yaml"))]
    merged = [group for group in group_by_file(sources) if len(group) > 1]
    assert sorted((group[0].options["components"], len(group)) for group in merged) == [
        ("llava_next_779k", 16),
        ("mix665k", 10),
        ("open_llava_next_1m", 8),
        ("sharegpt4v_100k", 4),
    ]


def test_a_record_of_no_part_is_every_parts(tmp_path: Path) -> None:
    """As in a source that is read alone, and a wrong component is told."""
    put(tmp_path / "mix.json", json.dumps(records()))
    group = [SourceInfo(name, "llava_json", ".", SOURCES[name]["options"]) for name in ("mix_sam", "mix_lcs")]
    items = list(read_together(group, tmp_path))
    of_none = [item for name, item in items if name is None]
    assert [item.reason for item in of_none if isinstance(item, Reject)] == [Reason.UNKNOWN_COMPONENT]
    assert {name for name, _ in items} == {None, "mix_sam", "mix_lcs"}
    for source in group:
        own = [item for name, item in items if name in (None, source.name)]
        assert own == list(source.samples(tmp_path))
        assert sum(isinstance(item, Sample) for item in own) > 4
    wrong = SourceInfo("mix_vq", "llava_json", ".", SOURCES["mix_sam"]["options"] | {"component": "vq"})
    with pytest.raises(DataError, match="table sharegpt4v_100k has no 'vq'"):
        list(read_together([group[0], wrong], tmp_path))
