"""Tests of user data in the layouts of other frameworks, prepared as a user does: what is kept, rejected or refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes.prepare import __main__ as prepare
from data_recipes.store.reader import Store
from data_recipes.writing import store_tables
from tests.data_recipes.prepare.program import arguments, failure
from tests.data_recipes.raw_folders import make_image, write_file, write_parquet

QUESTION, ANSWER = "What is drawn?", "A shape."
IMAGE = make_image(1, kind="JPEG")


def llava(question: str = f"<image>\n{QUESTION}", **more: Any) -> dict[str, Any]:
    """Build a record in LLaVA's layout."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": ANSWER}]
    return {"id": "1", "conversations": turns, **more}


def chat(content: Any = f"<image>\n{QUESTION}", **more: Any) -> dict[str, Any]:
    """Build a record in OpenAI's layout."""
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}]
    return {"messages": turns, **more}


def write(workspace: Path, text: bytes | str, reader: str = "messages_jsonl", **options: Any) -> None:
    """Write the source `mine`: an annotations file, and an image."""
    write_file(workspace / "raw" / "mine" / "train.json", text)
    write_file(workspace / "raw" / "mine" / "images" / "1.jpg", IMAGE)
    source = {"reader": reader, "root": "mine", "options": {"annotations": "train.json", **options}}
    write_file(workspace / "configs" / "source" / "mine.yaml", yaml.safe_dump(source))


KEPT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "conversations and images": (llava(images=["images/1.jpg"]), []),
    "an image beside messages": (chat(image="images/1.jpg"), []),
    "an image in a part": (chat([{"type": "image", "image": "images/1.jpg"}, {"type": "text", "text": QUESTION}]), []),
    "query and response": (
        {"query": f"<image>\n{QUESTION}", "response": ANSWER, "images": ["images/1.jpg"]},
        [],
    ),
    "instruction and output": (
        {"instruction": f"<image>\n{QUESTION}", "input": "", "output": ANSWER, "images": ["images/1.jpg"]},
        [],
    ),
    "prompt and completion": (
        {"prompt": chat(QUESTION)["messages"][:1], "completion": chat()["messages"][1:], "images": ["images/1.jpg"]},
        [],
    ),
    "texts": ({"texts": [{"user": QUESTION, "assistant": ANSWER}], "images": ["images/1.jpg"]}, []),
    "a system prompt": (llava(image="images/1.jpg", system="Answer in French."), ["Answer in French."]),
}


@pytest.mark.parametrize("reader", ["llava_json", "messages_jsonl"])
@pytest.mark.parametrize("case", KEPT)
def test_records_that_are_kept(tmp_path: Path, case: str, reader: str) -> None:
    """Both readers read every layout; the text and the image are those of the record."""
    record, before = KEPT[case]
    write(tmp_path, json.dumps([record], indent=1), reader)
    assert prepare.main(arguments(tmp_path, "--source", "mine")) == 0
    store = Store.open(tmp_path / "stores" / "mine")
    sample = store.sample(0)
    assert [message.text for message in sample.messages] == [*before, f"<image>\n{QUESTION}", ANSWER]
    assert (sample.images, store.manifest["notes"]) == ((IMAGE,), {})


OBJECTS = {"ref": ["dot"], "bbox": [[10, 10, 50, 50]]}
REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "a clip in LLaVA's layout": (llava("<video>\nWhat happens?", video="v.mp4"), "`video`"),
    "a clip": (chat("<video>What happens?", videos=["v.mp4"]), "`videos`"),
    "a sound": (chat("<audio>What is said?", audios=["a.wav"]), "`audios`"),
    "an answer that is not wanted": (chat("2 + 2?", label=False), "`label`"),
    "a turn without loss": (
        {"messages": [chat("2 + 2?")["messages"][0], {"role": "assistant", "content": "4", "loss": False}]},
        "`loss` of turn 2",
    ),
    "boxes": (chat("<image>Find the <ref-object>", images=["images/1.jpg"], objects=OBJECTS), "`objects`"),
    "tools": (chat(QUESTION, tools='[{"name": "f"}]'), "`tools`"),
    "a placeholder": (chat("<video>What happens?"), "<video>"),
}


@pytest.mark.parametrize("reader", ["llava_json", "messages_jsonl"])
@pytest.mark.parametrize("case", REJECTED)
def test_records_that_are_rejected(tmp_path: Path, case: str, reader: str) -> None:
    """Nothing is trained on, and the quarantine names the key."""
    record, words = REJECTED[case]
    write(tmp_path, json.dumps([record]), reader)
    assert prepare.main(arguments(tmp_path, "--source", "mine")) == 1
    (line,) = (tmp_path / "stores" / "mine.quarantine.jsonl").read_text().splitlines()
    reject = json.loads(line)
    assert words in reject["detail"]
    assert reject["reason"] == ("unfilled_placeholder" if case == "a placeholder" else "unsupported_key")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:8\nsize 20176754\n", "git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n", "HTML page"),
        (gzip.compress(json.dumps([llava(QUESTION)]).encode()), "gzip"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence with the file and what it is, and exit code 2."""
    write(tmp_path, content)
    code, sentence = failure(tmp_path, capsys, "--source", "mine")
    assert (code, "train.json" in sentence, words in sentence) == (2, True, True)


def test_columns_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line of YAML names the columns, in JSON and in parquet; an invalid one is a user error."""
    rows = [{"talk": chat(QUESTION)["messages"], "photo": "images/1.jpg", "label": "cat"}]
    columns = {"messages": "talk", "images": "photo", "label": None}
    write(tmp_path, json.dumps(rows), columns=columns)
    write_parquet(tmp_path / "raw" / "mine" / "a.parquet", rows)
    table = {"reader": "messages_parquet", "root": "mine", "options": {"columns": columns}}
    write_file(tmp_path / "configs" / "source" / "table.yaml", yaml.safe_dump(table))
    assert prepare.main(arguments(tmp_path, "--source", "mine", "table")) == 0
    mine, table_store = (Store.open(tmp_path / "stores" / name) for name in ("mine", "table"))
    assert mine.sample(0).images == table_store.sample(0).images == (IMAGE,)
    assert mine.sample(0).messages == table_store.sample(0).messages
    expected = {"unknown_key:label": {"records": 1, "example": "'cat'"}}
    assert mine.manifest["notes"] == table_store.manifest["notes"] == expected
    capsys.readouterr()
    write(tmp_path, json.dumps(rows), columns={"message": "talk"})
    code, sentence = failure(tmp_path, capsys, "--source", "mine")
    assert (code, "columns: unknown part message" in sentence) == (2, True)


def test_parquet_without_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message lists the columns and shows the option that names them."""
    write_parquet(tmp_path / "raw" / "mine" / "a.parquet", [{"photo": "a.jpg", "talk": "Hello."}])
    source = {"reader": "messages_parquet", "root": "mine"}
    write_file(tmp_path / "configs" / "source" / "mine.yaml", yaml.safe_dump(source))
    code, sentence = failure(tmp_path, capsys, "--source", "mine")
    assert code == 2
    assert "a.parquet: no column with a conversation; the file has photo, talk." in sentence
    assert "columns: {messages: KEY" in sentence


def test_notes_are_counted_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file whose keys are ids, the manifest lists the first keys, and counts the others together."""
    monkeypatch.setattr(store_tables, "MAX_NOTES", 3)
    records = [chat(f"Question {number}?", **{f"key{number}": number}, score=0.5) for number in range(5)]
    write(tmp_path, "\n".join(map(json.dumps, records)))
    assert prepare.main(arguments(tmp_path, "--source", "mine")) == 0
    assert Store.open(tmp_path / "stores" / "mine").manifest["notes"] == {
        "other": {"records": 3, "example": "unknown_key:key2: 2"},
        "unknown_key:key0": {"records": 1, "example": "0"},
        "unknown_key:key1": {"records": 1, "example": "1"},
        "unknown_key:score": {"records": 5, "example": "0.5"},
    }
    out = capsys.readouterr().out
    assert "noted in" in out
    assert "unknown_key:score" in out
