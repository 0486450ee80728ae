"""Tests of converting one record: each framework's layouts, keys that change the meaning, notes, and any values."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_recipes.raw import conversation_record
from data_recipes.raw.conversation_keys import PARTS, UNSUPPORTED, read_columns
from data_recipes.raw.conversation_record import convert_record
from data_recipes.raw.image_files import ImageError
from data_recipes.schema.sample import DataError, Reason, Reject, Sample, check_sample

ROOT = Path("/raw")
QUESTION, ANSWER, SYSTEM = "What is drawn?", "A shape.", "Be brief."
ASK = {"role": "user", "content": QUESTION}
REPLY = {"role": "assistant", "content": ANSWER}
LLAVA = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]

PLAIN = [("user", QUESTION), ("assistant", ANSWER)]
WITH_SYSTEM = [("system", SYSTEM), *PLAIN]
TWO_ROUNDS = [("user", "Who?"), ("assistant", "Me."), *PLAIN]


def convert(record: dict[str, Any] | list[Any], **columns: str | None) -> Sample | Reject:
    """Convert and check a record."""
    sample = convert_record(record, ROOT, "a.json, record 7", read_columns(columns))
    return check_sample(sample) or sample if isinstance(sample, Sample) else sample


def read(record: dict[str, Any] | list[Any], **columns: str | None) -> Sample:
    """Convert a record that can be read."""
    sample = convert(record, **columns)
    assert isinstance(sample, Sample), sample
    return sample


def turns(sample: Sample) -> list[tuple[str, str]]:
    """Return the turns of a sample."""
    return [(message.role, message.text) for message in sample.messages]


def rejected(record: dict[str, Any], **columns: str | None) -> Reject:
    """Convert a record that cannot be read."""
    reject = convert(record, **columns)
    assert isinstance(reject, Reject), reject
    assert "\n" not in reject.detail
    assert len(reject.detail) < 300
    return reject


def chat(content: Any, **more: Any) -> dict[str, Any]:
    """Build a record of one question and its answer."""
    return {"messages": [{"role": "user", "content": content}, REPLY], **more}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        # FastChat, LLaVA
        ({"id": "a", "conversations": [{"from": "human", "value": QUESTION}, LLAVA[1]]}, PLAIN),
        ({"conversations": [{"from": "human", "value": QUESTION}, LLAVA[1]], "system": SYSTEM}, WITH_SYSTEM),
        # OpenAI
        ({"messages": [{"role": "system", "content": SYSTEM}, ASK, REPLY]}, WITH_SYSTEM),
        ({"messages": [{"role": "developer", "content": SYSTEM}, ASK, REPLY | {"weight": 1}]}, WITH_SYSTEM),
        (chat([{"type": "text", "text": QUESTION}]), PLAIN),
        # LLaMA-Factory
        ({"instruction": QUESTION, "input": "", "output": ANSWER}, PLAIN),
        ({"instruction": "Look.", "input": QUESTION, "output": ANSWER}, [("user", f"Look.\n{QUESTION}"), PLAIN[1]]),
        ({"instruction": QUESTION, "output": ANSWER, "system": SYSTEM, "history": None}, WITH_SYSTEM),
        ({"instruction": QUESTION, "output": ANSWER, "history": [["Who?", "Me."]]}, TWO_ROUNDS),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "value": QUESTION}], "loss_weight": 0.0},
                    REPLY,
                ]
            },
            PLAIN,
        ),
        # ms-swift
        ({"query": QUESTION, "response": ANSWER, "history": [["Who?", "Me."]]}, TWO_ROUNDS),
        ({"system": SYSTEM, "conversation": [{"human": QUESTION, "assistant": ANSWER}]}, WITH_SYSTEM),
        ({"messages": [ASK | {"loss": False}, REPLY | {"loss": True}]}, PLAIN),
        # xtuner
        ({"conversation": [{"system": SYSTEM, "input": QUESTION, "output": ANSWER}]}, WITH_SYSTEM),
        ([ASK, REPLY], PLAIN),
        ({"conversation": [{"input": "Who?", "output": "Me."}, {"input": QUESTION, "output": ANSWER}]}, TWO_ROUNDS),
        ({"id": 0, "messages": [ASK, {"from": "assistant", "value": ANSWER}]}, PLAIN),
        # TRL
        ({"prompt": QUESTION, "completion": ANSWER}, PLAIN),
        ({"prompt": [ASK], "completion": [REPLY]}, PLAIN),
        ({"prompt": [{"role": "system", "content": SYSTEM}, ASK], "completion": REPLY}, WITH_SYSTEM),
        # the hub
        ({"texts": [{"user": "Who?", "assistant": "Me."}, {"user": QUESTION, "assistant": ANSWER}]}, TWO_ROUNDS),
        ({"system_prompt": SYSTEM, "question": QUESTION, "response": ANSWER}, WITH_SYSTEM),
        ({"conversations": {"from": ["human", "gpt"], "value": [QUESTION, ANSWER]}}, PLAIN),
        ({"messages": [ASK, {"role": "model", "content": ANSWER}]}, PLAIN),
    ],
)
def test_layouts_of_texts(record: dict[str, Any] | list[Any], expected: list[tuple[str, str]]) -> None:
    """Each framework's documented layout gives the same turns, and nothing is noted."""
    sample = read(record)
    assert turns(sample) == expected
    assert (sample.notes, sample.repairs) == ((), ())


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": LLAVA, "image": "a.jpg"},
        {"conversations": LLAVA, "images": ["a.jpg"]},
        chat(f"<image>\n{QUESTION}", images=["a.jpg"]),
        chat(f"<image>\n{QUESTION}", image="a.jpg"),
        chat(QUESTION, images=["a.jpg"]),
        chat([{"type": "image"}, {"type": "text", "text": QUESTION}], images=[{"path": "a.jpg"}]),
        chat([{"type": "image", "image": "a.jpg"}, {"type": "text", "text": QUESTION}]),
        chat([{"type": "image", "path": "a.jpg"}, {"type": "text", "text": QUESTION}]),
        chat([{"image": "a.jpg"}, {"text": QUESTION}]),
        chat([{"type": "image_url", "value": "a.jpg"}, {"type": "text", "value": QUESTION}]),
        chat([{"type": "image_url", "image_url": "a.jpg"}, {"type": "text", "text": f"<IMG_CONTEXT>\n{QUESTION}"}]),
        chat([{"type": "image", "image": "a.jpg"}, {"type": "text", "text": f"<image>\n{QUESTION}"}]),
        {"query": f"<image>\n{QUESTION}", "response": ANSWER, "images": ["a.jpg"]},
        {"instruction": f"<image>\n{QUESTION}", "input": "", "output": ANSWER, "images": ["a.jpg"]},
        {"prompt": [{"role": "user", "content": QUESTION}], "completion": [REPLY], "images": ["a.jpg"]},
        {"texts": [{"user": QUESTION, "assistant": ANSWER}], "images": [{"bytes": None, "path": "a.jpg"}]},
        {"question": QUESTION, "answer": ANSWER, "image": "a.jpg"},
        chat(f"<image>\n{QUESTION}", images=["a.jpg"], image="a.jpg"),
    ],
)
def test_layouts_with_an_image(record: dict[str, Any]) -> None:
    """The image is found, and its placeholder is before the question."""
    sample = read(record)
    assert sample.images == (ROOT / "a.jpg",)
    assert turns(sample) == [("user", f"<image>\n{QUESTION}"), PLAIN[1]]


def test_order_of_images() -> None:
    """Images in parts and beside the turns are in the order of their placeholders."""
    parts = [{"type": "text", "text": "First."}, {"type": "image", "image": "own.jpg"}, {"type": "image"}]
    record = {
        "messages": [{"role": "user", "content": "<image>Who?"}, REPLY, {"role": "user", "content": parts}, REPLY],
        "images": ["one.jpg", "two.jpg"],
    }
    sample = read(record)
    assert sample.images == (ROOT / "one.jpg", ROOT / "own.jpg", ROOT / "two.jpg")
    assert turns(sample)[2] == ("user", "First.\n<image>\n<image>")
    assert rejected(record | {"images": ["one.jpg"]}).detail == "3 <image> for 2 images"
    assert rejected(record | {"images": ["1", "2", "3"]}).detail == "3 <image> for 4 images"
    assert rejected({"conversations": [LLAVA[0] | {"value": "Who?"}, LLAVA[1]], "image": "a"}).reason == (
        Reason.PLACEHOLDER_MISMATCH
    )


def test_images_of_any_form_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an image may be is decided in one place: values are passed on as they are."""
    seen: list[object] = []

    def resolve(values: list[object], _: Path) -> list[bytes]:
        seen[:] = values
        return [b"x"] * len(values)

    monkeypatch.setattr(conversation_record, "resolve_images", resolve)
    url = {"url": "data:image/png;base64,AAAA", "detail": "low"}
    read(chat([{"type": "image_url", "image_url": url}, {"type": "text", "text": QUESTION}]))
    assert seen == [url]
    read(chat("<image><image>?", images=["data:image/png;base64,AAAA", {"bytes": b"1", "path": None}]))
    assert seen == ["data:image/png;base64,AAAA", {"bytes": b"1", "path": None}]


def test_questions_that_follow_each_other() -> None:
    """Two user messages, as in OpenAI's example, are one question, which is counted; not so in LLaVA's layout."""
    shown = [{"type": "image_url", "image_url": "a.jpg"}]
    sample = read({"messages": [ASK, {"role": "user", "content": shown}, REPLY]})
    assert turns(sample) == [("user", f"{QUESTION}\n<image>"), PLAIN[1]]
    assert sample.repairs == ("questions_joined",)
    asked = {"from": "human", "value": QUESTION}
    assert rejected({"conversations": [asked, asked, LLAVA[1]]}).reason == Reason.ROLES_DO_NOT_ALTERNATE


@pytest.mark.parametrize("key", sorted(UNSUPPORTED))
def test_keys_that_change_the_meaning(key: str) -> None:
    """Each rejects the record with its name, in the record and in a turn, unless it is empty or named as unused."""
    value = ["x.mp4"]
    reject = rejected(chat(QUESTION) | {key: value})
    assert (reject.reason, reject.detail.startswith(f"`{key}` is ")) == (Reason.UNSUPPORTED_KEY, True)
    in_turn = rejected({"messages": [ASK, REPLY | {key: value}]})
    assert (in_turn.reason, f"`{key}` of turn 2" in in_turn.detail) == (Reason.UNSUPPORTED_KEY, True)
    empties: list[object] = [None, "", " ", [], {}, {"ref": [], "bbox": None}]
    for empty in empties:
        assert read(chat(QUESTION) | {key: empty}).notes == ()
        assert read({"messages": [ASK, REPLY | {key: empty}]}).notes == ()
    unused = read(chat(QUESTION) | {key: value}, **{key: None})
    assert unused.notes == ((f"unknown_key:{key}", "a list of 1"),)
    moved = rejected(chat(QUESTION) | {"mine": value}, **{key: "mine"})
    assert moved.detail.startswith("`mine` is a list of 1")


@pytest.mark.parametrize(
    ("turn", "key", "value", "is_kept"),
    [
        (1, "loss", True, True),
        (1, "loss", 1.0, True),
        (1, "loss", False, False),
        (1, "loss", 0.5, False),
        (1, "loss", float("nan"), False),
        (1, "loss", "false", False),
        (1, "weight", 0, False),
        (0, "loss", False, True),
        (0, "loss", True, False),
        (None, "loss", True, True),
        (None, "loss", False, False),
        (None, "label", True, True),
        (None, "label", False, False),
        (None, "label", 1, False),
        (None, "kto_tag", False, False),
    ],
)
def test_flags(turn: int | None, key: str, value: object, is_kept: bool) -> None:
    """A flag that says what is done anyway is accepted; any other value rejects the record."""
    record: dict[str, Any] = {"messages": [dict(ASK), dict(REPLY)]}
    (record if turn is None else record["messages"][turn])[key] = value
    result = convert(record)
    assert isinstance(result, Sample) == is_kept
    if isinstance(result, Reject):
        assert f"`{key}`" in result.detail


def test_system_prompts() -> None:
    """A system prompt beside the turns is the first turn; two different ones are rejected."""
    twice = {"messages": [{"role": "system", "content": SYSTEM}, ASK, REPLY]}
    assert turns(read(twice | {"system": SYSTEM})) == WITH_SYSTEM
    assert "system" in rejected(twice | {"system": "Be long."}).detail
    assert "`system` and `system_prompt`" in rejected(chat(QUESTION, system="a", system_prompt="b")).detail
    assert turns(read(chat(QUESTION, system=SYSTEM, system_prompt=SYSTEM))) == WITH_SYSTEM
    assert rejected(chat(QUESTION, system=["a"])).reason == Reason.NOT_A_STRING


def test_unknown_keys_are_noted() -> None:
    """With a short example on one line, also those of turns and parts; a used key is not noted."""
    record = chat(
        [{"type": "text", "text": QUESTION, "cache": 1}],
        id={"a": 1},
        score=0.5,
        note="two\nlines " + "x" * 500,
        nested=[{"a": []}],
        empty="",
        **{"a\nb": True, "k" * 500: None},
    )
    record["messages"][1] = REPLY | {"name": "bot"}
    assert dict(read(record).notes) == {
        "unknown_key:id": "an object with the keys a",
        "unknown_key:score": "0.5",
        "unknown_key:note": "'two\\nlines " + "x" * 50 + "'...",
        "unknown_key:nested": "a list of 1",
        "unknown_key:'a\\nb'": "true",
        "unknown_key:turn.cache": "1",
        "unknown_key:turn.name": "'bot'",
    }
    beside = read(chat(QUESTION, prompt="p", answer="a"))
    assert [name for name, _ in beside.notes] == ["unknown_key:prompt", "unknown_key:answer"]


def test_columns() -> None:
    """The option names the key of a part; the usual keys of that part are then noted only."""
    rows = {"talk": [ASK, REPLY], "photo": "a.jpg", "messages": "other"}
    sample = read(rows, messages="talk", images="photo")
    assert (turns(sample), sample.images) == ([("user", f"<image>\n{QUESTION}"), PLAIN[1]], (ROOT / "a.jpg",))
    assert [name for name, _ in sample.notes] == ["unknown_key:messages"]
    assert turns(read({"input": QUESTION, "target": ANSWER}, prompt="input", response="target")) == PLAIN
    assert turns(read({"chosen": [ASK, REPLY], "rejected": "no"}, messages="chosen", rejected=None)) == PLAIN
    assert "`photo` is" in rejected({"messages": [ASK, REPLY], "photo": "a.jpg"}).detail


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": "messages"}, r"unknown part text.*Parts come first: \{messages: text\}"),
        ({"messages": 3}, "columns.messages: 3"),
        ("messages", "columns: 'messages'"),
        (["a"], "a list of 1"),
    ],
)
def test_invalid_columns(columns: object, words: str) -> None:
    """The message has the key, the value and the rule."""
    with pytest.raises(DataError, match=words):
        read_columns(columns)


@pytest.mark.parametrize(
    ("record", "reason", "words"),
    [
        ({}, Reason.BROKEN_RECORD, "an empty object"),
        ({"file_name": "1.jpg", "text": "Dots."}, Reason.BROKEN_RECORD, "file_name, text"),
        ({"messages": None}, Reason.BROKEN_RECORD, "the keys messages"),
        ({"messages": []}, Reason.NO_ANSWER, "0 turns"),
        ({"messages": "Hi"}, Reason.BROKEN_RECORD, "`messages` is 'Hi', not a list of turns"),
        ({"messages": [ASK, None]}, Reason.BROKEN_RECORD, "turn 2 of `messages` is null"),
        ({"messages": [ASK, {"text": "x"}]}, Reason.BROKEN_RECORD, "turn 2 is an object with the keys text"),
        ({"messages": [ASK, {"role": 3, "content": "x"}]}, Reason.NOT_A_STRING, "turn 2"),
        ({"messages": [ASK, REPLY | {"value": "other"}]}, Reason.BROKEN_RECORD, "`content` and `value`"),
        ({"messages": [ASK, {"role": "tool", "content": "3"}, REPLY]}, Reason.ROLES_DO_NOT_ALTERNATE, "'tool'"),
        ({"messages": [ASK, REPLY], "conversations": LLAVA}, Reason.BROKEN_RECORD, "`messages` and `conversations`"),
        (chat(QUESTION, images=["a", "b"], image="c"), Reason.BROKEN_RECORD, "`images` and `image`"),
        (chat(QUESTION, history=[["Who?", "Me."]]), Reason.UNSUPPORTED_KEY, "`history`"),
        (chat([{"type": "video", "video": "a.mp4"}]), Reason.UNSUPPORTED_KEY, "type 'video'"),
        (chat([{"type": "image", "image": "a", "bbox": [1]}]), Reason.UNSUPPORTED_KEY, "`bbox` of a part of turn 1"),
        (chat([3]), Reason.NOT_A_STRING, "a part of turn 1 is 3"),
        (chat([{"type": "text", "text": None}]), Reason.NOT_A_STRING, "`text` of a part of turn 1 is null"),
        ({"messages": [ASK | {"image": "a.jpg"}, REPLY]}, Reason.UNSUPPORTED_KEY, "`image` of turn 1"),
        ({"query": QUESTION}, Reason.NO_ANSWER, "`query`"),
        ({"query": QUESTION, "response": ""}, Reason.EMPTY_ANSWER, "`query`"),
        ({"response": ANSWER}, Reason.BROKEN_RECORD, "`response` is a response without a prompt"),
        ({"query": "a", "instruction": "b", "response": "c"}, Reason.BROKEN_RECORD, "`instruction` and `query`"),
        ({"query": "a", "response": "c", "history": ["b"]}, Reason.BROKEN_RECORD, "round 1 of `history` is 'b'"),
        ({"instruction": ["a"], "input": "b", "output": "c"}, Reason.NOT_A_STRING, "must be texts"),
        ({"question": "Sum?", "answer": 4}, Reason.NOT_A_STRING, "turn 2 holds 4"),
        (chat("<video>What happens?"), Reason.UNFILLED_PLACEHOLDER, "'<video>' in turn 1"),
        (chat("<|image_pad|>Who?"), Reason.UNFILLED_PLACEHOLDER, "'<|image_pad|>'"),
    ],
)
def test_rejected_records(record: dict[str, Any], reason: Reason, words: str) -> None:
    """Each has a reason, and a detail that names the key and shows at most a line of its value."""
    reject = rejected(record)
    assert (reject.reason, reject.location) == (reason, "a.json, record 7")
    assert words in reject.detail


def test_ids() -> None:
    """Texts and integers are ids; a record with anything else is named by its location."""
    assert [read(chat("?", id=value)).id for value in ("x", 7, 10**400)] == ["x", "7", str(10**400)]
    for value in (None, "", True, float("nan"), 1.5, {"a": 1}, [1]):
        assert read(chat("?", id=value)).id == "a.json, record 7"


def test_long_details_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message shows at most a line of an image's value, whatever the value is."""

    def fail(*_: object) -> list[bytes]:
        raise ImageError(Reason.IMAGE_MISSING, "no file\n" + "A" * 100_000)

    monkeypatch.setattr(conversation_record, "resolve_images", fail)
    assert rejected(chat("<image>", images=["a"])).detail.startswith("no file AAA")


def test_page_of_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record that the page shows is read, and it names every key that rejects a record."""
    monkeypatch.setattr(conversation_record, "resolve_images", lambda values, root: [b"x"] * len(values))
    page = (Path(__file__).parents[3] / "docs" / "data_layouts.md").read_text()
    cells = [cell for cell in re.findall(r"`([^`]+)`", page) if "[...]" not in cell]
    records = [json.loads(cell) for cell in cells if cell.startswith(('{"', '[{"'))]
    records += [chat(json.loads(f"{{{cell}}}")["content"]) for cell in cells if cell.startswith('"content"')]
    assert len(records) >= 10
    assert {turns(read(record))[-1] for record in records} == {("assistant", "A cat."), ("assistant", ANSWER)}
    assert set(re.findall(r"`(\w+)`", page)) >= set(UNSUPPORTED)


# Values of any type in any place: what JSON can hold, and what parquet can.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "system", "human", "gpt", "text", "image", "<image>", "<video>", "a.jpg"])
)
PARQUET = SCALARS | st.binary(max_size=4) | st.just(datetime.datetime(2026, 1, 1)) | st.just(datetime.timedelta(1))
KEYS = st.sampled_from(
    [
        *(key for keys in PARTS.values() for key in keys),
        *("role", "from", "content", "value", "type", "text", "image_url", "user", "assistant", "human", "loss"),
        *("label", "videos", "objects", "score", "\ud800"),
    ]
)
VALUES = st.recursive(
    PARQUET, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=24
)


@settings(max_examples=120, deadline=None)
@given(record=st.dictionaries(KEYS, VALUES, max_size=6), columns=st.dictionaries(st.sampled_from(list(PARTS)), KEYS))
def test_any_record_gives_a_sample_or_a_reason(record: dict[str, Any], columns: dict[str, str | None]) -> None:
    """No exception, and every message and note is one short line that can be written as UTF-8."""
    result = convert_record(record, ROOT, "a.json, record 7", read_columns(columns))
    if isinstance(result, Sample):
        check = check_sample(result)
        lines = [text for note in result.notes for text in note] + ([check.detail] if check else [])
    else:
        lines = [result.detail]
    for line in lines:
        assert len(line) < 300
        assert len(line.splitlines()) <= 1
        line.encode()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_good_record_with_one_other_value(data: st.DataObject) -> None:
    """A value of any type in one place of a good record: a sample or a reason, and the other turns are unchanged."""
    record = json.loads(json.dumps(chat([{"type": "image", "image": "a.jpg"}, {"type": "text", "text": QUESTION}])))
    places: list[Any] = [record, *record["messages"], *record["messages"][0]["content"]]
    place = data.draw(st.sampled_from(places))
    place[data.draw(KEYS)] = data.draw(VALUES)
    result = convert(record)
    if isinstance(result, Sample):
        assert result.messages[-1].role == "assistant"
    else:
        assert isinstance(result.reason, Reason)


def test_deep_nesting() -> None:
    """A value nested almost as deeply as Python allows is described without recursion."""
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for record in (chat(QUESTION, id=deep, note=deep), chat(deep), chat(QUESTION, system=deep), {"messages": deep}):
        convert(record)
    assert "a list of 1" in rejected(chat(QUESTION, videos=deep)).detail
