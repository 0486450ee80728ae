"""Tests of `python -m data_recipes.guess`: what it says about raw data, what it writes, and how much it reads."""

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes.guess import __main__ as guess
from data_recipes.guess import candidates, trial
from data_recipes.guess.folder_look import look_at
from data_recipes.mixture.mixture import read_mixture
from data_recipes.prepare import __main__ as prepare
from data_recipes.schema.source import read_source
from tests.data_recipes import raw_folders
from tests.data_recipes.raw_folders import cell, llava_record, make_image, write_file, write_parquet
from tests.data_recipes.readers.test_image_text_readers import write_lines, write_shard


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run the program; return exit code, stdout and stderr."""
    code = guess.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def written(capsys: pytest.CaptureFixture[str], data: Path) -> dict[str, Any]:
    """Run the program on raw data and return the YAML that it prints."""
    code, out, err = run(capsys, data)
    assert code == 0, out + err
    source = yaml.safe_load(out.split("# MINE/source/NAME.yaml\n")[1])
    assert Path(source.pop("root")) == (data if data.is_dir() else data.parent)
    assert isinstance(source, dict)
    return source


def write_llava(root: Path) -> Path:
    """LLaVA's JSON with images two folders below."""
    for number in range(3):
        write_file(root / "pictures/part" / f"{number}.png", make_image(number))
    records = [llava_record(number, f"part/{number}.png") for number in range(3)]
    write_file(root / "train.json", json.dumps(records))
    return root


def write_messages(root: Path) -> Path:
    """Messages in JSON lines."""
    return raw_folders.write_messages(root)


def write_captions(root: Path) -> Path:
    """An imagefolder with a column of another name."""
    write_lines(root / "train/metadata.jsonl", [{"file_name": "1.jpg", "description": "A cup."}])
    write_file(root / "train/1.jpg", make_image(1))
    return root


def write_questions(root: Path) -> Path:
    """Questions with options in parquet, in two splits."""
    row = {"image": cell(1), "question": "What?", "options": ["sun", "sea"], "answer": "B"}
    for split in ("test", "train"):
        write_parquet(root / "data" / f"{split}-00000-of-00002.parquet", [row])
    return root


def write_webdataset(root: Path) -> Path:
    """Two tar shards."""
    for shard in range(2):
        write_shard(root / f"{shard:05d}.tar", {"1.jpg": make_image(shard), "1.txt": "A cup."})
    return root


def write_llava_parquet(root: Path) -> Path:
    """The released LLaVA-NeXT data."""
    return raw_folders.write_llava_parquet(root)


LAYOUTS: list[tuple[Callable[[Path], Path], dict[str, Any]]] = [
    (write_llava, {"reader": "llava_json", "options": {"annotations": "train.json", "image_root": "pictures"}}),
    (write_messages, {"reader": "messages_jsonl", "options": {"annotations": "own.jsonl"}}),
    (
        write_captions,
        {"reader": "imagefolder", "options": {"metadata": "train/metadata.jsonl", "columns": {"text": "description"}}},
    ),
    (write_questions, {"reader": "image_text_parquet", "options": {"shards": "data/train-*.parquet"}}),
    (write_webdataset, {"reader": "webdataset", "options": {"shards": "*.tar"}}),
    (write_llava_parquet, {"reader": "llava_parquet", "options": {"shards": "data/train-*.parquet"}}),
    (raw_folders.write_chartqa, {"reader": "chartqa"}),
    (raw_folders.write_synthdog, {"reader": "synthdog"}),
]


@pytest.mark.parametrize(("write", "source"), LAYOUTS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_reader_that_fits(
    write: Callable[[Path], Path], source: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reader and options of each layout."""
    assert written(capsys, write(tmp_path)) == source


def test_a_file_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only this file is read; its images are looked for in its folder."""
    write_llava(tmp_path)
    write_lines(
        tmp_path / "other.jsonl",
        [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}],
    )
    assert written(capsys, tmp_path / "other.jsonl") == {
        "reader": "messages_jsonl",
        "options": {"annotations": "other.jsonl"},
    }
    assert written(capsys, tmp_path / "train.json")["reader"] == "llava_json"
    write_questions(tmp_path)
    file = tmp_path / "data/test-00000-of-00002.parquet"
    assert written(capsys, file) == {"reader": "image_text_parquet", "options": {"shards": "test-*.parquet"}}


def test_samples_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three samples with roles, the beginning of each text, and the sizes of images; rejects with a reason."""
    records = [llava_record(number, f"{number}.png") for number in range(5)]
    records[1]["conversations"][1]["value"] = "Line one.\n\x1b[31mLine two. " + "x" * 1000
    write_file(tmp_path / "train.json", json.dumps(records))
    for number in range(4):
        write_file(tmp_path / f"{number}.png", make_image(number, 12 + number, 16))
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert "reader: llava_json, options: {annotations: train.json}: 4 of 5 records are kept" in out
    assert "  rejected: picture_missing 1; train.json, record 5: no file '4.png'" in out
    assert "\ntrain.json, record 1: images 16 x 12 PNG (width x height)\n" in out
    assert "\n  user       <image> What is it?\n  assistant  Thing 0.\n" in out
    assert "  assistant  Line one. ?[31mLine two. xxx" in out
    assert max(map(len, out.splitlines())) < 260
    assert len(re.findall(r"^train.json, record \d:", out, re.MULTILINE)) == 3
    assert re.search(r"imagefolder +train.json +\d of 5 kept", out)
    assert re.search(r"no files in the published layout of ai2d, chartqa, .*synthdog", out)


def test_files_are_written_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The source and the mixture are what the preparation reads; existing files are not replaced."""
    write_captions(tmp_path / "raw" / "own")
    words = [
        tmp_path / "raw/own",
        "--raw",
        tmp_path / "raw",
        "--write",
        tmp_path / "mine/source/cups.yaml",
        "--mixture",
        "cups_1",
    ]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    source = read_source(tmp_path / "mine", "cups")
    assert (source.reader, source.root) == ("imagefolder", "own")
    assert set(read_mixture(tmp_path / "mine", "cups_1").sources) == {"cups"}
    line = out.split("next: python -m data_recipes.prepare ")[1].split()
    assert line[:4] == ["--mixture", "cups_1", "--config-dir", str(tmp_path / "mine")]
    line[line.index("data/stores")] = str(tmp_path / "stores")
    assert prepare.main([*line, "--workers", "1"]) == 0
    assert "cups_1: 1 samples" in capsys.readouterr().out
    for path in ("source/cups.yaml", "mixture/cups_1.yaml"):
        code, _, err = run(capsys, *words)
        assert (code, f"{path} exists" in err) == (2, True)
        (tmp_path / "mine" / path).unlink()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "none: there is no such folder or file"),
        (["own", "--mixture", "m"], "add --write MINE/source/NAME.yaml"),
        (["own", "--write", "cups.yaml"], "write to source/cups.yaml"),
        (["own", "--write", "source/cups.txt"], "write to source/source/cups.yaml"),
        (["own", "--write", "source/cups.yaml", "--mixture", "../m"], "--mixture ../m: "),
        (["own", "--raw", "elsewhere"], "own is not below it"),
    ],
)
def test_user_errors(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence and exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    write_captions(tmp_path / "own")
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and what the folder looks like: classes, an Arrow directory, a store, unknown columns."""
    write_file(tmp_path / "classes/cat/1.jpg", make_image(1))
    code, out, err = run(capsys, tmp_path / "classes")
    assert (code, "folders 2, images 1" in out, "It has images and no texts" in err) == (2, True, True)
    write_file(tmp_path / "saved/data-00000-of-00001.arrow", "x")
    write_file(tmp_path / "saved/state.json", "{}")
    code, _, err = run(capsys, tmp_path / "saved")
    assert (code, "save_to_disk" in err) == (2, True)
    for name in ("manifest.json", "inputs.json"):
        write_file(tmp_path / "store" / name, "{}")
    code, _, err = run(capsys, tmp_path / "store")
    assert (code, "It is a prepared store" in err) == (2, True)
    write_lines(tmp_path / "odd/odd.jsonl", [{"a": 1}])
    code, out, err = run(capsys, tmp_path / "odd")
    assert (code, "columns" in err) == (2, True)
    assert re.search(
        r"imagefolder +odd.jsonl +0 of 1 kept +broken_record 1; odd.jsonl, record 1: the row has none of", out
    )
    assert run(capsys, tmp_path / "odd", "--write", tmp_path / "mine/source/odd.yaml")[0] == 2
    assert not (tmp_path / "mine").exists()


def test_damaged_files_do_not_end_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that are not what their names say are reported among the readers that do not fit."""
    for name in ("a.json", "b.jsonl", "c.csv", "d.parquet", "e.tar", "f.tar.gz"):
        write_file(tmp_path / name, b"\x89PNG\xff\x00" * 300)
    write_file(tmp_path / "deep.json", "[" * 100_000)
    write_file(tmp_path / "empty.json", "")
    code, out, _ = run(capsys, tmp_path)
    assert code == 2
    assert re.search(r"webdataset +\*?e?\.tar +0 of 1 kept +file_unreadable", out)
    assert re.search(r"llava_json +empty.json +", out)


def test_columns_of_conversations(tmp_path: Path) -> None:
    """Unusual names of columns are named in the options; usual ones are not."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    write_lines(tmp_path / "odd.jsonl", [{"talk": talk, "photo": "1.jpg"}])
    write_lines(tmp_path / "photo.jsonl", [{"messages": talk, "photo": "1.jpg"}])
    write_lines(tmp_path / "usual.jsonl", [{"messages": talk, "images": ["1.jpg"]}])
    write_file(tmp_path / "1.jpg", make_image(1))
    trials = [each for each in trial.try_readers(look_at(tmp_path)) if each.candidate.reader == "messages_jsonl"]
    assert [each.num_kept for each in trials] == [1, 1, 1]
    assert {each.candidate.file: each.candidate.options.get("columns") for each in trials} == {
        "odd.jsonl": {"messages": "talk", "images": "photo"},
        "photo.jsonl": {"images": "photo"},
        "usual.jsonl": None,
    }


def test_dataset_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA-Factory's description of a file gives the names of its keys."""
    entry = {"file_name": "own.json", "columns": {"prompt": "ask", "response": "say"}}
    write_file(tmp_path / "dataset_info.json", json.dumps({"hub": {"hf_hub_url": "a/b"}, "own": entry, "bad": 3}))
    write_file(tmp_path / "own.json", json.dumps([{"ask": "Why?", "say": "So."}]))
    assert written(capsys, tmp_path) == {
        "reader": "messages_jsonl",
        "options": {"annotations": "dataset_info.json", "dataset": "own"},
    }


def test_names_of_shards() -> None:
    """Shards of one split are one group; training splits come first, and special characters are escaped."""
    files = [
        "data/test-00000-of-00002.parquet",
        "data/train-00000-of-00002-a1b2.parquet",
        "data/train-00001-of-00002-c3d4.parquet",
    ]
    assert list(candidates._group_shards(files, (".parquet",))) == ["data/train-*.parquet", "data/test-*.parquet"]
    files = ["mix665k-train-00000.tar", "mix665k-val-00000.tar", "000.tar", "[a]/one.tar", "x.zip"]
    assert list(candidates._group_shards(files, (".tar",))) == [
        "*.tar",
        "mix665k-train-*.tar",
        "mix665k-val-*.tar",
        "[[]a]/one.tar",
    ]


def test_large_folder_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that was opened is listed to its end, so that its table is found; further folders are not opened."""
    monkeypatch.setattr("data_recipes.guess.folder_look._MAX_ENTRIES", 300)
    for number in range(400):
        write_file(tmp_path / "images" / f"{number}.jpg", "")
    for number in range(50):
        write_file(tmp_path / "more" / f"{number}" / "x.json", "[]")
    write_file(tmp_path / "images" / "metadata.jsonl", "")
    (tmp_path / "images" / "around").symlink_to(tmp_path)
    look = look_at(tmp_path)
    assert look.tables == ["images/metadata.jsonl"]
    assert (look.num_images, look.folders, look.is_cut) == (400, [".", "images"], True)
    monkeypatch.setattr("data_recipes.guess.folder_look._MAX_ENTRIES", 3000)
    look = look_at(tmp_path)
    assert (len(look.tables), look.is_cut, look.num_images) == (51, False, 400)


def test_few_records_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader is asked for its first records only, and not for longer than the limit."""
    raw_folders.write_llava(tmp_path, 8, [llava_record(number) for number in range(100)])
    candidate = candidates.Candidate("llava_json", {"annotations": "mix.json", "image_root": "images"}, "mix.json")
    tried = trial.try_reader(tmp_path, candidate)
    assert (tried.num_records, tried.num_kept) == (trial.NUM_RECORDS, trial.NUM_RECORDS)
    monkeypatch.setattr(trial, "_SECONDS", 0.05)
    write_file(
        tmp_path / "slow_lab" / "endless_reader.py", "def samples(root):\n    while True:\n        pass\n    yield\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    started = time.monotonic()
    stopped = trial.try_reader(tmp_path, candidates.Candidate("slow_lab.endless_reader"))
    assert time.monotonic() - started < 5
    assert "did not read a record within" in stopped.error
