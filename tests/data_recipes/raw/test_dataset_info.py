"""Tests of reading entries of LLaMA-Factory's `dataset_info.json`."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_recipes.readers import llava_json, messages_jsonl
from data_recipes.schema.sample import DataError, Reject, Sample
from tests.data_recipes.raw_folders import write_file

SHAREGPT = {
    "file_name": "mine.json",
    "formatting": "sharegpt",
    "columns": {"messages": "talk", "images": "pics", "system": "rule"},
    "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "customer", "assistant_tag": "clerk"},
}
ALPACA = {"file_name": "mine.json", "columns": {"prompt": "question", "query": "more", "response": "reply"}}


def write(root: Path, entry: object, records: list[dict[str, Any]]) -> None:
    """Write a data folder of LLaMA-Factory with one dataset, `mine`."""
    write_file(root / "dataset_info.json", json.dumps({"other": {"hf_hub_url": "me/other"}, "mine": entry}))
    write_file(root / "mine.json", json.dumps(records))


def read(root: Path, **options: Any) -> Sample | Reject:
    """Read the only record."""
    (sample,) = messages_jsonl.samples(root, "dataset_info.json", **{"dataset": "mine", **options})
    return sample


def texts(sample: Sample | Reject) -> list[tuple[str, str]]:
    """Return the turns of a sample."""
    assert isinstance(sample, Sample), sample
    assert sample.notes == ()
    return [(message.role, message.text) for message in sample.messages]


def test_sharegpt(tmp_path: Path) -> None:
    """Columns and tags name the keys of the record, of the turns, and the speakers."""
    turns = [{"who": "customer", "says": "<image>Who?"}, {"who": "clerk", "says": "Me."}]
    write(tmp_path, SHAREGPT, [{"talk": turns, "pics": ["a.jpg"], "rule": "Be brief."}])
    sample = read(tmp_path)
    assert texts(sample) == [("system", "Be brief."), ("user", "<image>Who?"), ("assistant", "Me.")]
    assert isinstance(sample, Sample)
    assert sample.images == (tmp_path / "a.jpg",)
    assert list(llava_json.samples(tmp_path, "dataset_info.json", dataset="mine")) == [sample]


def test_default_columns(tmp_path: Path) -> None:
    """Without columns and tags, the file is in the alpaca format, or has LLaVA's turns."""
    write(tmp_path, {"file_name": "mine.json"}, [{"instruction": "Add.", "input": "1, 2", "output": "3"}])
    assert texts(read(tmp_path)) == [("user", "Add.\n1, 2"), ("assistant", "3")]
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    write(tmp_path, {"file_name": "mine.json", "formatting": "sharegpt"}, [{"conversations": turns}])
    assert texts(read(tmp_path)) == [("user", "Who?"), ("assistant", "Me.")]


def test_alpaca_columns(tmp_path: Path) -> None:
    """The parts have LLaMA-Factory's names; the reader's own `columns` come first."""
    write(tmp_path, ALPACA, [{"question": "Add.", "more": "1, 2", "reply": "3", "better": "three"}])
    sample = read(tmp_path)
    assert isinstance(sample, Sample)
    assert [message.text for message in sample.messages] == ["Add.\n1, 2", "3"]
    assert sample.notes == (("unknown_key:better", "'three'"),)
    other = read(tmp_path, columns={"response": "better"})
    assert isinstance(other, Sample)
    assert other.messages[1].text == "three"


def test_columns_that_reject(tmp_path: Path) -> None:
    """A column of clips or marks rejects its records."""
    write(tmp_path, ALPACA | {"columns": {"kto_tag": "good"}}, [{"instruction": "a", "output": "b", "good": False}])
    reject = read(tmp_path)
    assert isinstance(reject, Reject)
    assert (reject.reason, reject.detail[:18]) == ("unsupported_key", "`good` is false: i")


@pytest.mark.parametrize(
    ("entry", "options", "words"),
    [
        (ALPACA, {"dataset": None}, r"`dataset` is not given; with a file in this folder: mine\."),
        (ALPACA, {"dataset": "min"}, "there is no dataset 'min'"),
        (ALPACA, {"dataset": "other"}, "no `file_name`. It is on a hub, as me/other"),
        (ALPACA | {"ranking": True}, {}, "preference dataset"),
        (ALPACA | {"formatting": "chatml"}, {}, "`formatting` is 'chatml'; known: alpaca, sharegpt"),
        (ALPACA | {"num_samples": 9}, {}, "unknown key 'num_samples'"),
        (ALPACA | {"split": "test"}, {}, "`split` is 'test'"),
        (ALPACA | {"file_name": "../a.json"}, {}, "must be a path below the folder"),
        (ALPACA | {"file_name": "a.parquet"}, {}, "messages_parquet"),
        (ALPACA | {"file_name": 3}, {}, "no `file_name`"),
        (ALPACA | {"columns": {"texts": "a"}}, {}, "unknown part texts"),
        (ALPACA | {"columns": ["a"]}, {}, "`columns` is a list of 1"),
        (SHAREGPT | {"tags": {"user": "a"}}, {}, "unknown tag 'user'"),
        ("mine.json", {}, "there is no dataset 'mine'"),
    ],
)
def test_entries_that_are_refused(tmp_path: Path, entry: object, options: dict[str, Any], words: str) -> None:
    """The message names the file, the entry, the key and its value."""
    write(tmp_path, entry, [])
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path, **options)
    assert "dataset_info.json" in str(caught.value) or "columns" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3" * 5000, "\ufffe"])
def test_files_that_are_refused(tmp_path: Path, text: str) -> None:
    """A file that is not JSON, or not an object."""
    write_file(tmp_path / "dataset_info.json", text)
    with pytest.raises(DataError, match=r"dataset_info\.json"):
        read(tmp_path)
    (tmp_path / "dataset_info.json").unlink()
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path)


def test_dataset_of_another_file(tmp_path: Path) -> None:
    """`dataset` is meaningless for a data file."""
    with pytest.raises(DataError, match=r"dataset: 'mine' is an entry of dataset_info\.json"):
        list(messages_jsonl.samples(tmp_path, "mine.json", dataset="mine"))
