"""Owns the proofs about raw layouts: each published layout is read field by field, and dirt gets its
reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_recipes.raw.questions import OCR, by_hash
from data_recipes.readers import chartqa, easy_vqa, llava_json, messages_jsonl, synthdog
from data_recipes.schema.sample import DataError, Message, Reason, Reject, Sample
from tests.data_recipes import raw_folders
from tests.data_recipes.raw_folders import llava_record, picture, put

SUFFIX = "Answer the question using a single word or phrase."


def texts(sample: Sample | Reject) -> list[str]:
    """The texts of a sample's turns."""
    assert isinstance(sample, Sample), sample
    return [message.text for message in sample.messages]


def test_llava_json(tmp_path: Path) -> None:
    """id of either type, one picture, a list of them, or none; keys that the schema does not have are
    ignored."""
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
    found = list(llava_json.samples(root, "mix.json"))
    assert found[3] == Sample(
        "000000003",
        (Message("user", "What is it?"), Message("assistant", "Thing 3.")),
        (),
        "mix.json, record 4",
    )
    assert isinstance(found[4], Sample)
    assert (found[4].id, found[4].pictures) == ("42", (root / "images/00000.png",))
    assert isinstance(found[5], Sample)
    assert len(found[5].pictures) == 2
    rejects = {item.id: item.reason for item in found if isinstance(item, Reject)}
    assert rejects == {
        "c": Reason.PATH_OUTSIDE_ROOT,
        "d": Reason.NOT_A_STRING,
        "e": Reason.BROKEN_RECORD,
        "f": Reason.BROKEN_RECORD,
    }
    assert found[10].id == "mix.json, record 11"


def test_llava_json_image_root(tmp_path: Path) -> None:
    """LCS-558K's paths start in the folder that its zip unpacks to, and may not climb out of it."""
    put(tmp_path / "list.json", json.dumps([llava_record(0, "00453/a.jpg"), llava_record(1, "../list.json")]))
    first, second = llava_json.samples(tmp_path, "list.json", image_root="images")
    assert isinstance(first, Sample)
    assert first.pictures == (tmp_path / "images" / "00453" / "a.jpg",)
    assert isinstance(second, Reject)


def test_messages_jsonl(tmp_path: Path) -> None:
    """One's own data as other trainers read it: plain strings or parts, paths or objects."""
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
    put(tmp_path / "own.jsonl", "\n".join(map(json.dumps, lines)))
    found = list(messages_jsonl.samples(tmp_path, "own.jsonl"))
    assert texts(found[0]) == texts(found[1]) == ["<image>\nWhy?", "So."]
    assert [item.id for item in found[:2]] == ["own.jsonl, record 1", "7"]
    assert [item.reason for item in found if isinstance(item, Reject)] == [
        Reason.NOT_A_STRING,
        Reason.BROKEN_RECORD,
        Reason.NOT_A_STRING,
        Reason.PATH_OUTSIDE_ROOT,
    ]
    # Where no message says where the images stand, they stand before the first question.
    assert texts(found[6]) == ["<image>\n<image>\nWhy?", "So."]
    assert texts(found[7]) == ["Why?", "So."]


def test_chartqa_merges_the_questions_of_a_chart(tmp_path: Path) -> None:
    """One conversation a chart, human questions first, picture and suffix with the first, as in the released
    sets."""
    found = list(chartqa.samples(raw_folders.write_chartqa(tmp_path)))
    assert [item.id for item in found] == [f"chartqa_train_two_col_{n}" for n in (0, 1, 2)]
    assert texts(found[0]) == [
        f"<image>\nWhich year is highest?\n{SUFFIX}",
        "2016",
        "What is the value in 2016?",
        "37.5",
    ]
    assert texts(found[2])[1] == "Blue"


def test_chartqa_bad_questions_do_not_cost_the_chart(tmp_path: Path) -> None:
    """A question without a usable label is a reject of its own."""
    root = raw_folders.write_chartqa(tmp_path)
    bad = [
        {"imgname": "two_col_0.png", "query": "Sum?", "label": 7},
        {"imgname": "two_col_0.png", "query": "Sum?", "label": " "},
        {"imgname": "../two_col_0.png", "query": "Sum?", "label": "7"},
    ]
    put(root / "ChartQA Dataset/train/train_human.json", json.dumps(bad))
    found = list(chartqa.samples(root))
    assert [item.reason for item in found if isinstance(item, Reject)] == [
        Reason.NOT_A_STRING,
        Reason.EMPTY_ANSWER,
        Reason.PATH_OUTSIDE_ROOT,
    ]
    assert sum(isinstance(item, Sample) for item in found) == 3
    with pytest.raises(DataError, match="no such folder"):
        list(chartqa.samples(root, split="dev"))


def test_synthdog(tmp_path: Path) -> None:
    """The OCR prompt, and the text with its white space collapsed; a broken ground truth is a reject."""
    root = raw_folders.write_synthdog(tmp_path, 2)
    with (root / "train" / "metadata.jsonl").open("a") as lines:
        for truth in ("{}", "no json", '{"gt_parse": {"text_sequence": 3}}', None):
            lines.write(json.dumps({"file_name": "image_0.jpg", "ground_truth": truth}) + "\n")
        lines.write(json.dumps({"ground_truth": "{}"}) + "\n")
    found = list(synthdog.samples(root))
    assert found[1].id == "synthdog_en_train_image_1"
    assert texts(found[1]) == [f"<image>\n{OCR}", "early morning in harbour 1"]
    reasons = [item.reason for item in found if isinstance(item, Reject)]
    assert reasons == [Reason.BROKEN_RECORD] * 4 + [Reason.NOT_A_STRING]


def test_easy_vqa_merges_by_hash(tmp_path: Path) -> None:
    """All questions on a picture in one conversation, in an order that no file order or seed decides; fewer
    on request, and then a part of the whole."""
    root = raw_folders.write_easy_vqa(tmp_path)
    found = list(easy_vqa.samples(root))
    assert [item.id for item in found] == [f"easy_vqa_train_{n}" for n in range(4)]
    assert all(len(texts(item)) == 6 for item in found)
    path = root / "data" / "train" / "questions.json"
    questions = json.loads(path.read_text())
    put(path, json.dumps(questions[::-1]))
    assert [texts(item) for item in easy_vqa.samples(root)] == [texts(item) for item in found]
    short = [texts(item) for item in easy_vqa.samples(root, max_questions=1)]
    assert short == [texts(item)[:2] for item in found]
    assert by_hash([("b", "1"), ("a", "2")], 1)[0] in [("b", "1"), ("a", "2")]


def test_easy_vqa_dirt(tmp_path: Path) -> None:
    """Each bad triple has its reason; a number of questions below one is the user's mistake."""
    root = raw_folders.write_easy_vqa(tmp_path)
    bad = [["q?", "a"], ["q?", "a", "0"], ["q?", 1, 0], ["q?", "", 0], {"q": 1}]
    put(root / "data/train/questions.json", json.dumps(bad))
    assert [item.reason for item in easy_vqa.samples(root) if isinstance(item, Reject)] == [
        Reason.BROKEN_RECORD,
        Reason.BROKEN_RECORD,
        Reason.NOT_A_STRING,
        Reason.EMPTY_ANSWER,
        Reason.BROKEN_RECORD,
    ]
    with pytest.raises(DataError, match="max_questions: 0"):
        list(easy_vqa.samples(root, max_questions=0))


def test_readers_read_no_picture(tmp_path: Path) -> None:
    """Readers hand out paths and leave the reading to the pool: a folder without pictures reads the same."""
    root = raw_folders.write_chartqa(tmp_path)
    before = list(chartqa.samples(root))
    for path in root.rglob("*.png"):
        path.unlink()
    assert list(chartqa.samples(root)) == before
    assert picture(1) != picture(2)


def test_easy_vqa_can_ask_fewer_yes_no_questions(tmp_path: Path) -> None:
    """`max_yes_no` leaves out only questions answered by yes or no, and every other question stays."""
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
