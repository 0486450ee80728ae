"""Tests of the readers of LLaVA JSON, messages, ChartQA, SynthDoG and easy-VQA."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_recipes.raw.questions import OCR, sort_by_hash
from data_recipes.readers import chartqa, easy_vqa, llava_json, messages_jsonl, synthdog
from data_recipes.schema.sample import DataError, Message, Reason, Reject, Sample
from tests.data_recipes import raw_folders
from tests.data_recipes.raw_folders import llava_record, make_image, write_file

SUFFIX = "Answer the question using a single word or phrase."


def texts(sample: Sample | Reject) -> list[str]:
    """Return the texts of a sample's turns."""
    assert isinstance(sample, Sample), sample
    return [message.text for message in sample.messages]


def test_llava_json(tmp_path: Path) -> None:
    """Ids of either type; one image, a list of images, or none; other keys are noted."""
    extra = [
        llava_record(0, "images/00000.png", id=42, model="x"),
        llava_record(1, ["images/00000.png", "images/00001.png"], id="b"),
        llava_record(2, "../outside.png", id="c"),
        llava_record(3, 7, id="d"),
        llava_record(4, id="e", conversations="none"),
        llava_record(5, id="f", conversations=["none"]),
        llava_record(6, id=None),
    ]
    root = raw_folders.write_llava(tmp_path, 4, extra)
    items = list(llava_json.samples(root, "mix.json"))
    assert items[3] == Sample(
        "000000003",
        (Message("user", "What is it?"), Message("assistant", "Thing 3.")),
        (),
        "mix.json, record 4",
    )
    assert isinstance(items[4], Sample)
    assert (items[4].id, items[4].images) == ("42", (root / "images/00000.png",))
    assert items[4].notes == (("unknown_key:model", "'x'"),)
    assert isinstance(items[5], Sample)
    assert len(items[5].images) == 2
    rejects = {item.id: item.reason for item in items if isinstance(item, Reject)}
    assert rejects == {
        "c": Reason.PATH_OUTSIDE_ROOT,
        "d": Reason.NOT_A_STRING,
        "e": Reason.BROKEN_RECORD,
        "f": Reason.BROKEN_RECORD,
    }
    assert items[10].id == "mix.json, record 11"


def test_llava_json_image_root(tmp_path: Path) -> None:
    """Paths are relative to the image root and must not lead outside."""
    write_file(tmp_path / "list.json", json.dumps([llava_record(0, "00453/a.jpg"), llava_record(1, "../list.json")]))
    first, second = llava_json.samples(tmp_path, "list.json", image_root="images")
    assert isinstance(first, Sample)
    assert first.images == (tmp_path / "images" / "00453" / "a.jpg",)
    assert isinstance(second, Reject)


def test_messages_jsonl(tmp_path: Path) -> None:
    """Contents are strings or parts, images are paths or objects."""
    parts = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    bare = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    lines: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "<image>\nWhy?"}, {"role": "assistant", "content": "So."}]},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "So."}], "id": 7},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}], "id": "video"},
        {"messages": None, "id": "none"},
        {"messages": [], "images": [3], "id": "images"},
        {"messages": [], "images": ["/etc/hosts"], "id": "outside"},
        {"messages": bare, "images": ["a.png", "b.png"], "id": "unplaced"},
        {"messages": bare, "id": "chat"},
    ]
    lines[0]["images"] = ["a.png"]
    lines[1]["images"] = [{"path": "a.png"}]
    write_file(tmp_path / "own.jsonl", "\n".join(map(json.dumps, lines)))
    items = list(messages_jsonl.samples(tmp_path, "own.jsonl"))
    assert texts(items[0]) == texts(items[1]) == ["<image>\nWhy?", "So."]
    assert [item.id for item in items[:2]] == ["own.jsonl, record 1", "7"]
    assert [item.reason for item in items if isinstance(item, Reject)] == [
        Reason.UNSUPPORTED_KEY,
        Reason.BROKEN_RECORD,
        Reason.NOT_A_STRING,
        Reason.PATH_OUTSIDE_ROOT,
    ]
    # Without placeholders, the images are placed before the first question.
    assert texts(items[6]) == ["<image>\n<image>\nWhy?", "So."]
    assert texts(items[7]) == ["Why?", "So."]


def test_chartqa_merges_by_chart(tmp_path: Path) -> None:
    """One conversation per chart, human questions first, with image and format instruction in the first question."""
    items = list(chartqa.samples(raw_folders.write_chartqa(tmp_path)))
    assert [item.id for item in items] == [f"chartqa_train_two_col_{n}" for n in (0, 1, 2)]
    assert texts(items[0]) == [
        f"<image>\nWhich year is highest?\n{SUFFIX}",
        "2016",
        "What is the value in 2016?",
        "37.5",
    ]
    assert texts(items[2])[1] == "Blue"


def test_chartqa_invalid_questions(tmp_path: Path) -> None:
    """An invalid question is rejected alone."""
    root = raw_folders.write_chartqa(tmp_path)
    bad = [
        {"imgname": "two_col_0.png", "query": "Sum?", "label": 7},
        {"imgname": "two_col_0.png", "query": "Sum?", "label": " "},
        {"imgname": "../two_col_0.png", "query": "Sum?", "label": "7"},
    ]
    write_file(root / "ChartQA Dataset/train/train_human.json", json.dumps(bad))
    items = list(chartqa.samples(root))
    assert [item.reason for item in items if isinstance(item, Reject)] == [
        Reason.NOT_A_STRING,
        Reason.EMPTY_ANSWER,
        Reason.PATH_OUTSIDE_ROOT,
    ]
    assert sum(isinstance(item, Sample) for item in items) == 3
    with pytest.raises(DataError, match="no such folder"):
        list(chartqa.samples(root, split="dev"))


def test_synthdog(tmp_path: Path) -> None:
    """The OCR prompt, and the text with white space collapsed; an invalid ground truth is a reject."""
    root = raw_folders.write_synthdog(tmp_path, 2)
    with (root / "train" / "metadata.jsonl").open("a") as lines:
        for truth in ("{}", "no json", '{"gt_parse": {"text_sequence": 3}}', None):
            lines.write(json.dumps({"file_name": "image_0.jpg", "ground_truth": truth}) + "\n")
        lines.write(json.dumps({"ground_truth": "{}"}) + "\n")
    items = list(synthdog.samples(root))
    assert items[1].id == "synthdog_en_train_image_1"
    assert texts(items[1]) == [f"<image>\n{OCR}", "early morning in harbour 1"]
    reasons = [item.reason for item in items if isinstance(item, Reject)]
    assert reasons == [Reason.BROKEN_RECORD] * 4 + [Reason.NOT_A_STRING]


def test_easy_vqa_merges_by_hash(tmp_path: Path) -> None:
    """One conversation per image in an order that does not depend on the file; a limit selects a subset."""
    root = raw_folders.write_easy_vqa(tmp_path)
    items = list(easy_vqa.samples(root))
    assert [item.id for item in items] == [f"easy_vqa_train_{n}" for n in range(4)]
    assert all(len(texts(item)) == 6 for item in items)
    path = root / "data" / "train" / "questions.json"
    questions = json.loads(path.read_text())
    write_file(path, json.dumps(questions[::-1]))
    assert [texts(item) for item in easy_vqa.samples(root)] == [texts(item) for item in items]
    short = [texts(item) for item in easy_vqa.samples(root, max_questions=1)]
    assert short == [texts(item)[:2] for item in items]
    assert sort_by_hash([("b", "1"), ("a", "2")], 1)[0] in [("b", "1"), ("a", "2")]


def test_easy_vqa_invalid_records(tmp_path: Path) -> None:
    """Each kind of invalid record has its reason, and an invalid limit is a user error."""
    root = raw_folders.write_easy_vqa(tmp_path)
    bad = [["q?", "a"], ["q?", "a", "0"], ["q?", 1, 0], ["q?", "", 0], {"q": 1}]
    write_file(root / "data/train/questions.json", json.dumps(bad))
    assert [item.reason for item in easy_vqa.samples(root) if isinstance(item, Reject)] == [
        Reason.BROKEN_RECORD,
        Reason.BROKEN_RECORD,
        Reason.NOT_A_STRING,
        Reason.EMPTY_ANSWER,
        Reason.BROKEN_RECORD,
    ]
    with pytest.raises(DataError, match="max_questions: 0"):
        list(easy_vqa.samples(root, max_questions=0))


def test_readers_do_not_read_images(tmp_path: Path) -> None:
    """Readers yield paths without reading the images."""
    root = raw_folders.write_chartqa(tmp_path)
    before = list(chartqa.samples(root))
    for path in root.rglob("*.png"):
        path.unlink()
    assert list(chartqa.samples(root)) == before
    assert make_image(1) != make_image(2)


def test_easy_vqa_max_yes_no(tmp_path: Path) -> None:
    """`max_yes_no` removes only yes/no questions."""
    from data_recipes.readers.easy_vqa import samples

    folder = tmp_path / "data" / "train"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "0.png").write_bytes(b"")
    questions = [[f"is it {word}?", "no", 0] for word in "abcd"] + [["what is it?", "a circle", 0]]
    (folder / "questions.json").write_text(json.dumps(questions))
    answers = {}
    for limit in (None, 0, 1, 9):
        (sample,) = samples(tmp_path, max_yes_no=limit)
        assert isinstance(sample, Sample)
        answers[limit] = sorted(m.text for m in sample.messages if m.role == "assistant")
    assert answers == {
        None: ["a circle", *["no"] * 4],
        0: ["a circle"],
        1: ["a circle", "no"],
        9: ["a circle", *["no"] * 4],
    }
