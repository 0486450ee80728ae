"""Owns the proofs about reading JSON record by record: nothing is lost but what is broken."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_recipes.raw import json_records
from data_recipes.raw.json_records import iter_records
from data_recipes.schema.sample import DataError, Reason, Reject
from tests.data_recipes.raw_folders import llava_record, put


def read(path: Path, kind: type = dict) -> tuple[list[Any], list[Reject]]:
    """The records that parse, and the rejects."""
    found = [record for _, record in iter_records(path, kind)]
    rejects = [record for record in found if isinstance(record, Reject)]
    return [record for record in found if not isinstance(record, Reject)], rejects


@pytest.fixture(params=[7, 64, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Windows from much smaller than a record to much larger than the file."""
    monkeypatch.setattr(json_records, "_CHUNK_CHARACTERS", request.param)
    return int(request.param)


RECORDS = [llava_record(n, f"{n}.png", note='a "quoted" } ], \\ \u2028 end') for n in range(30)]


@pytest.mark.usefixtures("chunk")
def test_any_window_reads_what_json_load_reads(tmp_path: Path) -> None:
    """Lists in any spelling, and lines, give the records that json.load gives."""
    spellings = [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        json.dumps(RECORDS, ensure_ascii=False, separators=(",", ":")),
        "\ufeff" + json.dumps(RECORDS),
        "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS),
        "\r\n\r\n".join(json.dumps(record) for record in RECORDS),
    ]
    for text in spellings:
        assert read(put(tmp_path / "a.json", text)) == (RECORDS, [])
    assert read(put(tmp_path / "a.json", "[]")) == ([], [])


@pytest.mark.usefixtures("chunk")
def test_a_cut_off_file_loses_only_its_end(tmp_path: Path) -> None:
    """Wherever a file ends, every whole record before is read, and the missing end is counted once."""
    text = json.dumps(RECORDS)
    ends = [text.index('"id": "000000010"') + shift for shift in range(-3, 60)]
    for end in ends:
        records, rejects = read(put(tmp_path / "a.json", text[:end]))
        assert records == RECORDS[: len(records)]
        assert len(records) == 10
        assert [reject.reason for reject in rejects] == [Reason.FILE_CUT_OFF]
    lines = "\n".join(json.dumps(record) for record in RECORDS)
    records, rejects = read(put(tmp_path / "a.jsonl", lines[:-30]))
    assert records == RECORDS[:-1]
    assert [reject.reason for reject in rejects] == [Reason.FILE_CUT_OFF]


@pytest.mark.usefixtures("chunk")
def test_a_broken_record_costs_itself(tmp_path: Path) -> None:
    """After a syntax error inside a record, reading goes on at the next one; turns are not taken for
    records."""
    texts = [json.dumps(record) for record in RECORDS]
    texts[4] = texts[4].replace('"from": "human",', '"from": "human"', 1)
    texts[9] = texts[9].replace('{"from"', '{from"', 1)
    records, rejects = read(put(tmp_path / "a.json", "[" + ", ".join(texts) + "]"))
    assert records == [record for number, record in enumerate(RECORDS) if number not in (4, 9)]
    assert [reject.place for reject in rejects] == ["a.json, record 5", "a.json, record 10"]
    records, rejects = read(put(tmp_path / "a.jsonl", "\n".join(texts)))
    assert len(records) == 28
    assert [reject.place for reject in rejects] == ["a.jsonl, record 5", "a.jsonl, record 10"]
    assert {reject.reason for reject in rejects} == {Reason.BROKEN_RECORD}


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("number", [4, 29])
def test_an_open_quote_is_not_the_end_of_the_file(tmp_path: Path, number: int) -> None:
    """A lost quotation mark swallows all that follows; what follows is read all the same, and the file was not cut
    off."""
    texts = [json.dumps(record) for record in RECORDS]
    texts[number] = texts[number].removesuffix('"}') + "}"
    records, rejects = read(put(tmp_path / "a.json", "[" + ", ".join(texts) + "]"))
    assert records == [record for at, record in enumerate(RECORDS) if at != number]
    assert [(reject.place, reject.reason) for reject in rejects] == [
        (f"a.json, record {number + 1}", Reason.BROKEN_RECORD)
    ]


def test_other_kinds_of_values_are_broken_records(tmp_path: Path) -> None:
    """A number, a list or null among objects is one reject each."""
    records, rejects = read(put(tmp_path / "a.json", '[{"id": 1}, 7, [1], null, "x", {"id": 2}]'))
    assert records == [{"id": 1}, {"id": 2}]
    assert [reject.reason for reject in rejects] == [Reason.BROKEN_RECORD] * 4


def test_lists_as_records(tmp_path: Path) -> None:
    """easy-VQA's records are lists, and a broken one costs itself too."""
    text = '[["a", "b", 1], ["c", "d" 2], ["e", "f", 3]]'
    records, rejects = read(put(tmp_path / "a.json", text), kind=list)
    assert records == [["a", "b", 1], ["e", "f", 3]]
    assert len(rejects) == 1


def test_wrong_encodings(tmp_path: Path) -> None:
    """UTF-16 is one reject for the file; a Latin-1 byte spoils its own record only, and is found by
    `check`."""
    path = put(tmp_path / "a.json", json.dumps(RECORDS).encode("utf-16"))
    records, rejects = read(path)
    assert (records, [reject.reason for reject in rejects]) == ([], [Reason.WRONG_ENCODING])
    path = put(tmp_path / "b.json", b'[{"id": "a"}, {"id": "caf\xe9"}]')
    assert read(path) == ([{"id": "a"}, {"id": "caf\udce9"}], [])


def test_deep_nesting_is_a_broken_record(tmp_path: Path) -> None:
    """A hostile record cannot end the program by recursion."""
    deep = '{"id": ' + "[" * 100_000 + "]" * 100_000 + "}"
    records, rejects = read(put(tmp_path / "a.json", f'[{{"id": 1}}, {deep}, {{"id": 2}}]'))
    assert records == [{"id": 1}, {"id": 2}]
    assert [reject.reason for reject in rejects] == [Reason.BROKEN_RECORD]


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    """The sentence names the file and the way out."""
    with pytest.raises(DataError, match=r"no\.json: there is no such file.*options"):
        read(tmp_path / "no.json")


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_a_list_under_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """DocVQA and COCO keep their records under a key; what stands before and after it is passed over."""
    monkeypatch.setattr(json_records, "_CHUNK_CHARACTERS", chunk)
    before = {"version": "1.0", "data2": [{"n": 9}], "nested": {"data": [{"n": 8}]}, "number": 3, "none": None}
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps({**before, "data": [{"n": n} for n in range(5)], "after": [1]}, indent=indent))
        assert [record for _, record in iter_records(path, under="data")] == [{"n": n} for n in range(5)]
    path.write_text(json.dumps({**before, "data": [{"n": 1}, {"n": 2}]})[:-12])
    found = [record for _, record in iter_records(path, under="data")]
    assert found[0] == {"n": 1}
    assert isinstance(found[-1], Reject)


@pytest.mark.parametrize("text", ["[]", "{}", '{"data": {}}', '{"other": []}', '{"other": [1, ', "", "{3}"])
def test_no_list_under_the_key(tmp_path: Path, text: str) -> None:
    """Another layout is the user's mistake: told, not read as nothing."""
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match="no list under the key 'data'"):
        list(iter_records(path, under="data"))
