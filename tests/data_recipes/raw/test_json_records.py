"""Tests of reading JSON record by record: an invalid record does not affect the others."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_recipes.raw import json_records
from data_recipes.raw.json_records import iter_records
from data_recipes.schema.sample import DataError, Reason, Reject
from tests.data_recipes.raw_folders import llava_record, write_file


def read(path: Path, record_type: type = dict) -> tuple[list[Any], list[Reject]]:
    """Return the valid records and the rejects of a file."""
    items = [record for _, record in iter_records(path, record_type)]
    rejects = [record for record in items if isinstance(record, Reject)]
    return [record for record in items if not isinstance(record, Reject)], rejects


@pytest.fixture(params=[7, 64, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Windows from much smaller than a record to larger than the file."""
    monkeypatch.setattr(json_records, "_CHUNK_CHARACTERS", request.param)
    return int(request.param)


RECORDS = [llava_record(n, f"{n}.png", note='a "quoted" } ], \\ \u2028 end') for n in range(30)]


@pytest.mark.usefixtures("chunk")
def test_records_agree_with_json_load(tmp_path: Path) -> None:
    """Lists and lines in any formatting give the records of json.load."""
    spellings = [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        json.dumps(RECORDS, ensure_ascii=False, separators=(",", ":")),
        "\ufeff" + json.dumps(RECORDS),
        "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS),
        "\r\n\r\n".join(json.dumps(record) for record in RECORDS),
    ]
    for text in spellings:
        assert read(write_file(tmp_path / "a.json", text)) == (RECORDS, [])
    assert read(write_file(tmp_path / "a.json", "[]")) == ([], [])


@pytest.mark.usefixtures("chunk")
def test_truncated_file(tmp_path: Path) -> None:
    """All complete records of a truncated file are read, and its end is one reject."""
    text = json.dumps(RECORDS)
    ends = [text.index('"id": "000000010"') + shift for shift in range(-3, 60)]
    for end in ends:
        records, rejects = read(write_file(tmp_path / "a.json", text[:end]))
        assert records == RECORDS[: len(records)]
        assert len(records) == 10
        assert [reject.reason for reject in rejects] == [Reason.FILE_CUT_OFF]
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    records, rejects = read(write_file(tmp_path / "a.jsonl", lines[:-30]))
    assert records == RECORDS[:-1]
    assert [reject.reason for reject in rejects] == [Reason.FILE_CUT_OFF]


@pytest.mark.usefixtures("chunk")
def test_invalid_record(tmp_path: Path) -> None:
    """Reading continues after a syntax error; turns are not mistaken for records."""
    texts = [json.dumps(record) for record in RECORDS]
    texts[4] = texts[4].replace('"from": "human",', '"from": "human"', 1)
    texts[9] = texts[9].replace('{"from"', '{from"', 1)
    records, rejects = read(write_file(tmp_path / "a.json", "[" + ", ".join(texts) + "]"))
    assert records == [record for number, record in enumerate(RECORDS) if number not in (4, 9)]
    assert [reject.location for reject in rejects] == ["a.json, record 5", "a.json, record 10"]
    records, rejects = read(write_file(tmp_path / "a.jsonl", "\n".join(texts)))
    assert len(records) == 28
    assert [reject.location for reject in rejects] == ["a.jsonl, record 5", "a.jsonl, record 10"]
    assert {reject.reason for reject in rejects} == {Reason.BROKEN_RECORD}


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("number", [4, 29])
def test_missing_quotation_mark(tmp_path: Path, number: int) -> None:
    """A missing quotation mark invalidates one record only, and is not reported as truncation."""
    texts = [json.dumps(record) for record in RECORDS]
    texts[number] = texts[number].removesuffix('"}') + "}"
    records, rejects = read(write_file(tmp_path / "a.json", "[" + ", ".join(texts) + "]"))
    assert records == [record for at, record in enumerate(RECORDS) if at != number]
    assert [(reject.location, reject.reason) for reject in rejects] == [
        (f"a.json, record {number + 1}", Reason.BROKEN_RECORD)
    ]


def test_other_types(tmp_path: Path) -> None:
    """Values of other types are one reject each."""
    records, rejects = read(write_file(tmp_path / "a.json", '[{"id": 1}, 7, [1], null, "x", {"id": 2}]'))
    assert records == [{"id": 1}, {"id": 2}]
    assert [reject.reason for reject in rejects] == [Reason.BROKEN_RECORD] * 4


def test_lists_as_records(tmp_path: Path) -> None:
    """Records may be lists, as in easy-VQA."""
    text = '[["a", "b", 1], ["c", "d" 2], ["e", "f", 3]]'
    records, rejects = read(write_file(tmp_path / "a.json", text), record_type=list)
    assert records == [["a", "b", 1], ["e", "f", 3]]
    assert len(rejects) == 1


def test_wrong_encodings(tmp_path: Path) -> None:
    """A UTF-16 file is one reject; a Latin-1 byte becomes a lone surrogate in its record."""
    path = write_file(tmp_path / "a.json", json.dumps(RECORDS).encode("utf-16"))
    records, rejects = read(path)
    assert (records, [reject.reason for reject in rejects]) == ([], [Reason.WRONG_ENCODING])
    path = write_file(tmp_path / "b.json", b'[{"id": "a"}, {"id": "caf\xe9"}]')
    assert read(path) == ([{"id": "a"}, {"id": "caf\udce9"}], [])


def test_deep_nesting(tmp_path: Path) -> None:
    """Deep nesting does not end the program with a RecursionError."""
    deep = '{"id": ' + "[" * 100_000 + "]" * 100_000 + "}"
    records, rejects = read(write_file(tmp_path / "a.json", f'[{{"id": 1}}, {deep}, {{"id": 2}}]'))
    assert records == [{"id": 1}, {"id": 2}]
    assert [reject.reason for reject in rejects] == [Reason.BROKEN_RECORD]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("text", ['[{"id": 1}, {"id": LONG}, {"id": 2}]', '{"id": 1}\n{"id": LONG}\n{"id": 2}'])
def test_long_integer(tmp_path: Path, text: str) -> None:
    """An integer that Python refuses to parse rejects its record only."""
    records, rejects = read(write_file(tmp_path / "a.json", text.replace("LONG", "7" * 5000)))
    assert records == [{"id": 1}, {"id": 2}]
    assert [(reject.reason, "thousands of digits" in reject.detail) for reject in rejects] == [
        (Reason.BROKEN_RECORD, True)
    ]


def test_text_after_a_list(tmp_path: Path) -> None:
    """What follows the end of a list is a reject, for example a second list."""
    records, rejects = read(write_file(tmp_path / "a.json", '[{"id": 1}]\n[{"id": 2}]\n'))
    assert records == [{"id": 1}]
    assert [(reject.location, "text follows" in reject.detail) for reject in rejects] == [("a.json, record 2", True)]
    assert read(write_file(tmp_path / "b.json", '[{"id": 1}]  \n\n')) == ([{"id": 1}], [])


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:8\nsize 2\n", "a git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html></html>", "an HTML page"),
        (gzip.compress(b"[]", mtime=0), "gzip data"),
        (b"PK\x03\x04abc", "a zip archive"),
        (b"", "is empty"),
    ],
)
def test_other_kinds_of_files(tmp_path: Path, content: bytes, kind: str) -> None:
    """The message names the file and what it is."""
    with pytest.raises(DataError, match=rf"a\.json is .*{kind.removeprefix('is ')}"):
        read(write_file(tmp_path / "a.json", content))


KEYS = ("conversations", "image", "question")


def read_objects(path: Path) -> tuple[list[Any], list[Reject]]:
    """Return the records and rejects of a file of conversations."""
    items = [record for _, record in iter_records(path, record_keys=KEYS)]
    rejects = [record for record in items if isinstance(record, Reject)]
    return [record for record in items if not isinstance(record, Reject)], rejects


@pytest.mark.usefixtures("chunk")
def test_objects_and_list_in_object(tmp_path: Path) -> None:
    """Objects over several lines, one object that holds the list, and the usual forms have the same records."""
    head = {
        "version": 1.5,
        "tags": ["a", 3, None],
        "about": {"conversations": [{}]},
        "none": None,
        "counts": [{"n": 1}],
    }
    spellings = [
        json.dumps(RECORDS),
        "\n".join(json.dumps(record) for record in RECORDS),
        "\n".join(json.dumps(record, indent=2) for record in RECORDS),
        ",\n".join(json.dumps(record, indent=2) for record in RECORDS),
        "\ufeff" + "".join(json.dumps(record, indent=1) for record in RECORDS),
        json.dumps({**head, "data": RECORDS, "after": [1], "more": [{"n": 2}]}),
        json.dumps({**head, "data": RECORDS}, indent=2),
    ]
    for text in spellings:
        assert read_objects(write_file(tmp_path / "a.json", text)) == (RECORDS, []), text[:200]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("num_records", [1, 3])
def test_lines_of_turns(tmp_path: Path, num_records: int) -> None:
    """A line may be a list of turns, as in xtuner; a list of such lists is read too."""
    turns = [[{"role": "user", "content": str(number)}, {"role": "assistant"}] for number in range(num_records)]
    for text in ("\n".join(map(json.dumps, turns)) + "\n", json.dumps(turns, indent=1)):
        path = write_file(tmp_path / "a.jsonl", text)
        assert [record for _, record in iter_records(path, (dict, list), record_keys=KEYS)] == turns


@pytest.mark.parametrize("indent", [None, 1])
def test_single_record(tmp_path: Path, indent: int | None) -> None:
    """A file with one object is one record, also if lists of objects come first in it."""
    asked = {"meta": [{"score": 1}], "id": "a", "conversations": [{"question": "Who?", "answer": "Me."}]}
    for record in (RECORDS[0], asked):
        assert read_objects(write_file(tmp_path / "a.json", json.dumps(record, indent=indent))) == ([record], [])


@pytest.mark.usefixtures("chunk")
def test_invalid_objects(tmp_path: Path) -> None:
    """Of objects over several lines, a broken one is rejected alone, and of a truncated file the end."""
    texts = [json.dumps(record, indent=2) for record in RECORDS]
    texts[4] = texts[4].replace('"from": "human",', '"from": "human"', 1)
    records, rejects = read_objects(write_file(tmp_path / "a.json", "\n".join(texts)))
    assert records == [record for number, record in enumerate(RECORDS) if number != 4]
    assert [(reject.location, reject.reason) for reject in rejects] == [("a.json, record 5", Reason.BROKEN_RECORD)]
    records, rejects = read_objects(write_file(tmp_path / "a.json", "\n".join(texts[5:])[:-30]))
    assert records == RECORDS[5:-1]
    assert [reject.reason for reject in rejects] == [Reason.FILE_CUT_OFF]
    whole = json.dumps({"data": RECORDS})
    records, rejects = read_objects(write_file(tmp_path / "a.json", whole[:-40]))
    assert records == RECORDS[:-1]
    assert [reject.reason for reject in rejects] == [Reason.FILE_CUT_OFF]


@pytest.mark.parametrize(
    "record",
    [
        {"choices": [{"answer": "a"}, {"question": "b"}], "conversations": [{"from": "human"}], "n": 1},
        {"rounds": [{"question": "a"}], "image": "b.jpg"},
        {"rounds": [{"question": "a"}]},
    ],
)
def test_records_with_lists_of_objects(tmp_path: Path, record: dict[str, Any]) -> None:
    """A list of objects in a record is not taken for the list of records of the file."""
    for text in ("\n".join([json.dumps(record)] * 3), "\n".join([json.dumps(record, indent=1)] * 3)):
        assert read_objects(write_file(tmp_path / "a.json", text)) == ([record] * 3, [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"train": RECORDS, "n": 1, "test": RECORDS}), "another list, 'test', follows.*'train'"),
        (json.dumps({"rounds": [{"question": "a"}] * 99, "image": "b.jpg"}), "more text follows.*'rounds'"),
        ("\n".join([json.dumps({"rounds": [{"question": "a"}] * 99})] * 3), "more text follows.*'rounds'"),
    ],
)
def test_objects_with_more_than_a_list(tmp_path: Path, text: str, words: str) -> None:
    """Nothing is left out in silence: more than the list of records in an object is an error."""
    with pytest.raises(DataError, match=words):
        read_objects(write_file(tmp_path / "a.json", text))


FRAGMENTS = [
    *'{}[],:\n "',
    '"id"',
    '"a',
    "1",
    "-",
    "1e",
    "nul",
    "null",
    "\\",
    '{"conversations": []}',
    '"data": [',
    "\ufeff",
]


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=20) | st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join))
def test_any_file(tmp_path_factory: pytest.TempPathFactory, content: bytes | str) -> None:
    """Any content gives records, rejects of one short line, or an error that names the file."""
    path = write_file(tmp_path_factory.getbasetemp() / "any.json", content)
    message = "any.json"
    try:
        for location, record in iter_records(path, (dict, list), record_keys=KEYS):
            assert location.startswith("any.json")
            assert isinstance(record, dict | list) or len(record.detail.splitlines()) == 1
    except DataError as error:
        message = str(error)
    assert "any.json" in message


def test_missing_file(tmp_path: Path) -> None:
    """The message names the file and the option to correct."""
    with pytest.raises(DataError, match=r"no\.json: no such file.*options"):
        read(tmp_path / "no.json")


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_list_under_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Other keys before and after the list are skipped, as in DocVQA and COCO."""
    monkeypatch.setattr(json_records, "_CHUNK_CHARACTERS", chunk)
    before = {"version": "1.0", "data2": [{"n": 9}], "nested": {"data": [{"n": 8}]}, "number": 3, "none": None}
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps({**before, "data": [{"n": n} for n in range(5)], "after": [1]}, indent=indent))
        assert [record for _, record in iter_records(path, list_key="data")] == [{"n": n} for n in range(5)]
    path.write_text(json.dumps({**before, "data": [{"n": 1}, {"n": 2}]})[:-12])
    items = [record for _, record in iter_records(path, list_key="data")]
    assert items[0] == {"n": 1}
    assert isinstance(items[-1], Reject)


@pytest.mark.parametrize("text", ["[]", "{}", '{"data": {}}', '{"other": []}', '{"other": [1, ', "{3}"])
def test_missing_list(tmp_path: Path, text: str) -> None:
    """Another layout is an error, not an empty dataset."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match="no list under the key 'data'"):
        list(iter_records(path, list_key="data"))
