"""Tests of sources that are components of one raw file: it is read once, and each store is byte for byte that of its
component prepared prepare_alone.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes.prepare import __main__ as prepare
from data_recipes.prepare.shared_files import group_by_file, read_group
from data_recipes.raw.json_records import iter_records
from data_recipes.readers import llava_json
from data_recipes.schema.sample import DataError, Reason, Reject, Sample
from data_recipes.schema.source import SourceInfo, read_source
from data_recipes.store.reader import read_manifest
from data_recipes.writing import store_tables
from data_recipes.writing.sample_stream import StreamPosition
from tests.data_recipes.merged_records import MERGED, record
from tests.data_recipes.prepare.program import arguments, contents, failure, write_mixture
from tests.data_recipes.raw_folders import make_image, write_file

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
    """Return ten records per rule with different ids, one with a missing image and one that matches no rule."""
    parts = [each | {"id": f"{each['id']} {turn}"} for turn in range(10) for _, each in MERGED["sharegpt4v_100k"]]
    gone = record("gone", "sam/images/gone.jpg", [("Is it here?", "No.")])
    return [*parts[:7], record("odd", "flickr/1.jpg", [("What?", "That.")]), *parts[7:], gone]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A merged file with its images, a source for each component, and the mixture `all` of them."""
    for name, source in SOURCES.items():
        write_file(tmp_path / "configs" / "source" / f"{name}.yaml", yaml.safe_dump(source))
    write_mixture(tmp_path, "all", {name: {} for name in SOURCES})
    write_file(tmp_path / "raw" / "mix" / "mix.json", json.dumps(records()))
    for number, (_, each) in enumerate(MERGED["sharegpt4v_100k"]):
        write_file(tmp_path / "raw" / "mix" / each["image"], make_image(number % 3, 20, 30, "JPEG"))
    return tmp_path


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of records that were opened, in order."""
    opened: list[Path] = []

    def counted(path: Path, **options: Any) -> Iterator[tuple[str, Any]]:
        opened.append(path)
        return iter_records(path, **options)

    monkeypatch.setattr(llava_json, "iter_records", counted)
    return opened


def prepare_alone(workspace: Path) -> Path:
    """Prepare the sources one by one and return the folder of their stores."""
    for name in SOURCES:
        assert prepare.main(arguments(workspace, "--source", name, stores="prepare_alone")) == 0
    return workspace / "prepare_alone"


def assert_same(workspace: Path, expected: Path) -> None:
    """Check that each store is that of its component prepared prepare_alone."""
    assert sorted(path.name for path in (workspace / "stores").iterdir()) == sorted([*SOURCES, "mixtures"])
    for name in SOURCES:
        assert contents(workspace / "stores" / name) == contents(expected / name)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_merged_file_is_read_once(workspace: Path, parses: list[Path], workers: str) -> None:
    """The file is read once for the disk space and once for all stores."""
    assert prepare.main(arguments(workspace, "--mixture", "all", "--workers", workers)) == 0
    assert len(parses) == (2 if workers == "1" else 1)  # the disk space is estimated in a worker process
    expected = prepare_alone(workspace)
    assert_same(workspace, expected)
    rejects = {name: (read_manifest(expected / name) or {})["rejects"] for name in SOURCES}
    assert rejects.pop("mix_sam") == {"picture_missing": 1, "unknown_component": 1}
    assert {json.dumps(each) for each in rejects.values()} == {'{"unknown_component": 1}'}


def test_existing_stores_are_skipped(workspace: Path, parses: list[Path]) -> None:
    """Existing stores are skipped, and the others are still read together."""
    expected = prepare_alone(workspace)
    assert prepare.main(arguments(workspace, "--source", "mix_sam", "mix_lcs")) == 0
    before = (workspace / "stores" / "mix_sam" / "manifest.json").stat().st_mtime_ns
    parses.clear()
    assert prepare.main(arguments(workspace, "--mixture", "all")) == 0
    assert len(parses) == 2
    assert (workspace / "stores" / "mix_sam" / "manifest.json").stat().st_mtime_ns == before
    assert_same(workspace, expected)


def test_interrupted_run_is_resumed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every store is resumed from its items_of_source checkpoint."""
    monkeypatch.setattr(store_tables, "CHECKPOINT_RECORDS", 3)
    expected = prepare_alone(workspace)
    add, taken = store_tables.StoreTables.add, []

    def stop_at_40(
        tables: store_tables.StoreTables, loaded: Any, position: StreamPosition, strict: bool = False
    ) -> Reject | None:
        taken.append((tables._source.name, position.num_records))
        if len(taken) == 40:
            raise KeyboardInterrupt
        return add(tables, loaded, position, strict)

    with monkeypatch.context() as patch:
        patch.setattr(store_tables.StoreTables, "add", stop_at_40)
        assert prepare.main(arguments(workspace, "--mixture", "all")) == 130
        assert [path for path in (workspace / "stores").iterdir() if read_manifest(path)] == []
        first = taken[:]
        assert prepare.main(arguments(workspace, "--mixture", "all")) == 0
    again = set(taken[40:]) & set(first[:39])
    # Records after the last checkpoint are added again: at most two per source.
    assert all(sum(name == source for source, _ in again) <= 2 for name in SOURCES)
    assert len(set(first[:39]) - again) > 20
    assert_same(workspace, expected)


def test_slices_of_a_merged_file(workspace: Path, parses: list[Path]) -> None:
    """A job reads the file twice, whatever the number of components, and the merged stores are those of one process."""
    for part in ("1/2", "2/2"):
        parses.clear()
        assert prepare.main(arguments(workspace, "--mixture", "all", "--slice", part)) == 0
        assert len(parses) == 2
    assert prepare.main(arguments(workspace, "--mixture", "all", "--merge", "2")) == 0
    assert_same(workspace, prepare_alone(workspace))


def test_components_with_too_many_rejects(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and a message about all bad components; the other stores are complete."""
    write_file(
        workspace / "configs/source/mix_sam.yaml", yaml.safe_dump(SOURCES["mix_sam"] | {"max_reject_share": 0.2})
    )
    shutil.rmtree(workspace / "raw/mix/sam")
    (workspace / "raw/mix/sam").mkdir()
    write_file(
        workspace / "configs/source/mix_coco.yaml", yaml.safe_dump(SOURCES["mix_coco"] | {"max_reject_share": 0.05})
    )
    assert prepare.main(arguments(workspace, "--mixture", "all")) == 1
    message = capsys.readouterr().err
    assert "source mix_sam: all 12 records are rejected (picture_missing 11, unknown_component 1)" in message
    assert "source mix_coco: 1 of 11 records are rejected (unknown_component 1)" in message
    incomplete = [name for name in SOURCES if read_manifest(workspace / "stores" / name) is None]
    assert incomplete == ["mix_coco", "mix_sam"]


def test_strict(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first invalid record of any component stops the preparation."""
    code, sentence = failure(workspace, capsys, "--mixture", "all", "--strict")
    assert (code, "unknown_component at mix.json, record 8" in sentence) == (1, True)
    assert [name for name in SOURCES if (workspace / "stores" / name).exists()] == []


def test_group_by_file() -> None:
    """Sources with the same file and table and different components form a group; others do not."""

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
    prepare_alone = [["whole"], ["other_folder"], ["again"], ["other_file"], ["other_reader"], ["other_reader_2"]]
    assert groups == [["a", "b", "c"], *prepare_alone]


def test_groups_of_shipped_sources() -> None:
    """Each of the five merged files forms one group."""
    configs = Path(__file__).resolve().parents[3] / "configs"
    sources = [read_source(configs, path.stem) for path in sorted((configs / "source").glob("*.yaml"))]
    merged = [group for group in group_by_file(sources) if len(group) > 1]
    assert sorted((group[0].options["components"], len(group)) for group in merged) == [
        ("llava_next_779k", 16),
        ("m4_instruct", 5),
        ("mix665k", 10),
        ("open_llava_next_1m", 8),
        ("sharegpt4v_100k", 4),
    ]


def test_unknown_component_is_a_reject_of_every_source(tmp_path: Path) -> None:
    """A record that matches no rule is a reject of every source, as if the sources were read prepare_alone."""
    write_file(tmp_path / "mix.json", json.dumps(records()))
    group = [SourceInfo(name, "llava_json", ".", SOURCES[name]["options"]) for name in ("mix_sam", "mix_lcs")]
    items = list(read_group(group, tmp_path))
    unassigned = [item for name, item in items if name is None]
    assert [item.reason for item in unassigned if isinstance(item, Reject)] == [Reason.UNKNOWN_COMPONENT]
    assert {name for name, _ in items} == {None, "mix_sam", "mix_lcs"}
    for source in group:
        items_of_source = [item for name, item in items if name in (None, source.name)]
        assert items_of_source == list(source.samples(tmp_path))
        assert sum(isinstance(item, Sample) for item in items_of_source) > 4
    wrong = SourceInfo("mix_vq", "llava_json", ".", SOURCES["mix_sam"]["options"] | {"component": "vq"})
    with pytest.raises(DataError, match="table sharegpt4v_100k has no 'vq'"):
        list(read_group([group[0], wrong], tmp_path))
