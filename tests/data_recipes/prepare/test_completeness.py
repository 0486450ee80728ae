"""Tests of incomplete raw files: parts of a download, sources without a record or with rejected ones only."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes.prepare import __main__ as prepare
from data_recipes.prepare.completeness import count_required
from data_recipes.schema.mixture_config import MixtureConfig, SourceShare
from data_recipes.schema.source import SourceInfo
from data_recipes.store.reader import Store
from tests.data_recipes.merged_records import MERGED
from tests.data_recipes.prepare.program import arguments, contents, failure, write_mixture
from tests.data_recipes.raw_folders import cell, llava_record, make_image, write_file, write_llava, write_parquet


def write_source(workspace: Path, name: str, **values: Any) -> None:
    """Write a source's YAML."""
    write_file(workspace / "configs" / "source" / f"{name}.yaml", yaml.safe_dump({"root": name, **values}))


def write_talk(workspace: Path, num_samples: int, expected_count: int) -> None:
    """Write `talk`, whose images are files, so that its records are counted before it is prepared."""
    write_llava(workspace / "raw" / "talk", num_samples)
    options = {"annotations": "mix.json", "image_root": "images"}
    write_source(workspace, "talk", reader="llava_json", options=options, expected_count=expected_count)


def write_shards(workspace: Path, num_shards: int, expected_count: int) -> None:
    """Write `shards`, whose images are in its shards of four records, so that records are counted at the end only."""
    for shard in range(num_shards):
        rows = [{"image": cell(10 * shard + row), "question": "What?", "answer": f"{shard} {row}"} for row in range(4)]
        write_parquet(workspace / "raw" / "shards" / "data" / f"train-{shard:05d}-of-00250.parquet", rows)
    write_source(workspace, "shards", reader="image_text_parquet", expected_count=expected_count)


_FEW, _MORE = SourceShare(count=20, holdout=5), SourceShare(count=30)


@pytest.mark.parametrize(
    ("shares", "required"),
    [
        ([], 900),
        ([SourceShare()], 900),
        ([SourceShare(share=0.5)], 900),
        ([_FEW], 25),
        ([SourceShare(count=2000)], 900),
        ([_FEW, _MORE], 30),
        ([_FEW, SourceShare()], 900),
        ([_FEW, None], 900),
    ],
)
def test_required_number(shares: list[SourceShare | None], required: int) -> None:
    """Nine tenths of the published number, or what the mixtures take if that is less; None: one excludes the source."""
    source, other = SourceInfo("s", "r", "s", expected_count=1000), {"other": SourceShare()}
    mixtures = [
        MixtureConfig("m", 0, other | ({"s": share} if share else {}), () if share else ("s",)) for share in shares
    ]
    assert count_required(source, mixtures, False) == required
    assert count_required(source, mixtures, True) == 1
    assert count_required(SourceInfo("s", "r", "s"), mixtures, False) == 1


def test_several_mixtures_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each source is prepared once, with enough records for every mixture; each mixture has its manifest."""
    write_shards(tmp_path, 2, 1000)
    write_talk(tmp_path, 20, 20)
    write_mixture(tmp_path, "few", {"shards": {"count": 4, "holdout": 2}})
    write_mixture(tmp_path, "both", {"talk": {}, "shards": {"count": 3}})
    assert prepare.main(arguments(tmp_path, "--mixture", "few", "both")) == 0
    printed = capsys.readouterr().out
    assert (
        printed.count("shards: 8 samples") == printed.count("few: 4 samples") == printed.count("both: 23 samples") == 1
    )
    assert {path.parent.name for path in tmp_path.rglob("manifest.tex")} == {"few", "both"}


def test_partial_sources_are_listed_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them at once, without a store; --partial accepts them."""
    write_talk(tmp_path, 20, 23)
    write_llava(tmp_path / "raw" / "other", 4)
    options = {"annotations": "mix.json", "image_root": "images"}
    write_source(tmp_path, "other", reader="llava_json", options=options, expected_count=2000)
    assert prepare.main(arguments(tmp_path, "--source", "talk", "other")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "prepare: source talk: the raw files have 20 of 23 published records; at least 21 are needed. Download the "
        "rest, or use what is there with --partial.",
        "source other: the raw files have 4 of 2,000 published records; at least 1,800 are needed. Download the rest, "
        "or use what is there with --partial.",
    ]
    assert not (tmp_path / "stores").exists()
    assert prepare.main(arguments(tmp_path, "--source", "talk", "other", "--partial")) == 0
    assert "4 (-1,996)" in capsys.readouterr().out
    code, sentence = failure(tmp_path, capsys, "--source", "other")  # the store does not change the answer
    assert (code, "4 of 2,000" in sentence) == (2, True)


def test_complete_within_a_tenth(tmp_path: Path) -> None:
    """A release that lacks a few records is complete, and rejected records count as found."""
    write_talk(tmp_path, 20, 22)
    assert prepare.main(arguments(tmp_path, "--source", "talk")) == 0
    (tmp_path / "raw/talk/images/00000.png").unlink()
    assert prepare.main(arguments(tmp_path, "--source", "talk", "--max-rejects", "0.1")) == 0
    assert len(Store.open(tmp_path / "stores/talk")) == 19


def test_one_shard_of_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is noticed at the end; what was read is kept for --partial, and thrown away when the rest has come."""
    write_shards(tmp_path, 1, 12)
    code, sentence = failure(tmp_path, capsys, "--source", "shards")
    assert (code, "the raw files have 4 of 12 published records; at least 11 are needed" in sentence) == (2, True)
    assert not (tmp_path / "stores/shards").exists()
    assert prepare.main(arguments(tmp_path, "--source", "shards", "--partial")) == 0
    assert "resuming after 4 records" in capsys.readouterr().out
    assert len(Store.open(tmp_path / "stores/shards")) == 4
    write_shards(tmp_path, 3, 12)
    assert prepare.main(arguments(tmp_path, "--source", "shards")) == 0
    whole = contents(tmp_path / "stores/shards")
    assert prepare.main(arguments(tmp_path, "--source", "shards", stores="again")) == 0
    assert contents(tmp_path / "again/shards") == whole


def test_smaller_count_of_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mixture that takes four samples of a source needs no more; an excluded source must be complete."""
    write_shards(tmp_path, 2, 1000)
    write_mixture(tmp_path, "few", {"shards": {"count": 4, "holdout": 2}})
    write_mixture(tmp_path, "many", {"shards": {"count": 7, "holdout": 2}})
    assert prepare.main(arguments(tmp_path, "--mixture", "few")) == 0
    capsys.readouterr()
    code, sentence = failure(tmp_path, capsys, "--mixture", "many")
    assert (code, "8 of 1,000 published records; at least 9 are needed" in sentence) == (2, True)
    write_talk(tmp_path, 8, 8)
    write_mixture(tmp_path, "clean", {"talk": {}}, exclude=["shards"])
    code, sentence = failure(tmp_path, capsys, "--mixture", "clean")
    assert (code, "at least 900 are needed" in sentence) == (2, True)


def test_slices_are_judged_when_merging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A slice has a part of the records by its nature."""
    write_shards(tmp_path, 2, 20)
    for part in ("1/2", "2/2"):
        assert prepare.main(arguments(tmp_path, "--source", "shards", "--slice", part)) == 0
    capsys.readouterr()
    code, sentence = failure(tmp_path, capsys, "--source", "shards", "--merge", "2")
    assert (code, "8 of 20 published records" in sentence) == (2, True)
    assert prepare.main(arguments(tmp_path, "--source", "shards", "--merge", "2", "--partial")) == 0
    assert len(Store.open(tmp_path / "stores/shards")) == 8


@pytest.mark.parametrize("more", [[], ["--partial"]])
def test_source_without_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    """No store, and one sentence; of a merged file, the other components are not prepared either."""
    write_file(tmp_path / "raw/empty/mix.json", "[]")
    write_source(tmp_path, "empty", reader="llava_json", options={"annotations": "mix.json"})
    code, sentence = failure(tmp_path, capsys, "--source", "empty", *more)
    assert (code, "source empty: there is no usable record in the raw files" in sentence) == (2, True)
    assert not (tmp_path / "stores").exists()


def test_component_without_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named among the components of its file."""
    [record] = [each for part, each in MERGED["sharegpt4v_100k"] if part == "sam"]
    write_file(tmp_path / "raw/mix/mix.json", json.dumps([record]))
    write_file(tmp_path / "raw/mix" / record["image"], make_image(1))
    options = {"annotations": "mix.json", "components": "sharegpt4v_100k"}
    for part in ("sam", "coco"):
        write_source(tmp_path, part, reader="llava_json", root="mix", options={**options, "component": part})
    code, sentence = failure(tmp_path, capsys, "--source", "sam", "coco")
    assert (code, "source coco: there is no usable record" in sentence) == (2, True)


def test_all_rejected_names_the_fitting_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the first record's own words, and the reader and options that keep it."""
    record = {"file_name": "1.jpg", "text": "Two dots on a wall. " * 40}
    write_file(tmp_path / "raw/own/metadata.jsonl", json.dumps(record) + "\n")
    write_file(tmp_path / "raw/own/1.jpg", make_image(1))
    write_source(tmp_path, "own", reader="messages_jsonl", options={"annotations": "metadata.jsonl"})
    assert prepare.main(arguments(tmp_path, "--source", "own", "--max-rejects", "1")) == 2
    first, shown, advice = capsys.readouterr().err.splitlines()
    assert "source own: all 1 records are rejected (broken_record 1)" in first
    assert "The first, metadata.jsonl, record 1: " in first
    assert shown.startswith('  the first record: {"file_name": "1.jpg", "text": "Two dots on a wall. Two')
    assert len(shown) < 240
    assert advice == "  it looks like reader: imagefolder, options: {metadata: metadata.jsonl}"
    assert not (tmp_path / "stores/own").exists()


def test_all_rejected_for_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of the images is found."""
    write_file(tmp_path / "raw/own/train.json", json.dumps([llava_record(1, "1.jpg")]))
    write_file(tmp_path / "raw/own/pictures/1.jpg", make_image(1))
    write_source(tmp_path, "own", reader="llava_json", options={"annotations": "train.json", "image_root": "images"})
    assert prepare.main(arguments(tmp_path, "--source", "own")) == 2
    message = capsys.readouterr().err
    assert "it looks like reader: llava_json, options: {annotations: train.json, image_root: pictures}" in message


def test_all_rejected_and_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is that of rejected records, and the program that says more is named."""
    write_file(tmp_path / "raw/own/train.json", json.dumps([{"a": 1}, {"a": 2}]))
    write_source(tmp_path, "own", reader="llava_json", options={"annotations": "train.json"})
    assert prepare.main(arguments(tmp_path, "--source", "own")) == 1
    message = capsys.readouterr().err
    assert '  the first record: {"a": 1}' in message
    assert f"python -m data_recipes.guess {tmp_path}/raw/own/train.json" in message
