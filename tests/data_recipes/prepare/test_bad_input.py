"""Tests of invalid raw data: a folder with every kind of error is prepared, and each invalid record is rejected with
its own reason and location, while irregular but valid records are kept.

The individual rules are tested in test_sample.py, test_image_files.py and test_json_records.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_recipes.prepare import __main__ as prepare
from data_recipes.schema.sample import MAX_CHARACTERS, Reason
from data_recipes.store.reader import Store
from tests.data_recipes.prepare.program import arguments, failure
from tests.data_recipes.raw.test_image_files import png_header_of
from tests.data_recipes.raw_folders import llava_record, make_image, write_file, write_messages

GOOD = make_image(1)


def turns(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Build the `conversations` of a LLaVA record."""
    return [{"from": speaker, "value": text} for speaker, text in pairs]


ASK, ANSWER = ("human", "<image>\nWhy?"), ("gpt", "Because.")

# {id of the record: (changes of the record, bytes of its image (None: no file), reason)}
BAD: dict[str, tuple[dict[str, Any], bytes | None, Reason]] = {
    "missing": ({}, None, Reason.IMAGE_MISSING),
    "truncated": ({}, make_image(2, 64, 64, "JPEG")[:-300], Reason.IMAGE_TRUNCATED),
    "web_page": ({}, b"<html>404</html>", Reason.IMAGE_UNREADABLE),
    "zero_bytes": ({}, b"", Reason.IMAGE_EMPTY),
    "bomb": ({}, png_header_of(60_000, 60_000), Reason.IMAGE_TOO_LARGE),
    "thin": ({}, make_image(3, 2, 201), Reason.ASPECT_RATIO),
    "up": ({"image": "../secret.png"}, None, Reason.PATH_OUTSIDE_ROOT),
    "absolute": ({"image": "/etc/hosts"}, None, Reason.PATH_OUTSIDE_ROOT),
    "link": ({"image": "link.png"}, None, Reason.PATH_OUTSIDE_ROOT),
    "folder_link": ({"image": "elsewhere/secret.png"}, None, Reason.PATH_OUTSIDE_ROOT),
    "dead_link": ({"image": "dead_link.png"}, None, Reason.IMAGE_MISSING),
    "more_placeholders": (
        {"conversations": turns(("human", "<image>\n<image>\nWhy?"), ANSWER)},
        GOOD,
        Reason.PLACEHOLDER_MISMATCH,
    ),
    "fewer_placeholders": ({"conversations": turns(("human", "Why?"), ANSWER)}, GOOD, Reason.PLACEHOLDER_MISMATCH),
    "empty_answer": ({"conversations": turns(ASK, ("gpt", " \n"))}, GOOD, Reason.EMPTY_ANSWER),
    "number_as_answer": ({"conversations": turns(ASK, ("gpt", 7))}, GOOD, Reason.NOT_A_STRING),
    "null_as_answer": ({"conversations": turns(ASK, ("gpt", None))}, GOOD, Reason.NOT_A_STRING),
    "two_questions": ({"conversations": turns(ASK, ("human", "Well?"), ANSWER)}, GOOD, Reason.ROLES_DO_NOT_ALTERNATE),
    "answers_first": ({"conversations": turns(ANSWER, ANSWER, ASK, ANSWER)}, GOOD, Reason.FIRST_TURN_NOT_USER),
    "no_answer": ({"conversations": turns(ASK)}, GOOD, Reason.NO_ANSWER),
    "endless": ({"conversations": turns(ASK, ("gpt", "word " * (MAX_CHARACTERS // 5)))}, GOOD, Reason.TOO_LONG),
    "half_a_pair": ({"conversations": turns(ASK, ("gpt", "\ud83d"))}, GOOD, Reason.WRONG_ENCODING),
    "not_a_list": ({"conversations": "Why? Because."}, GOOD, Reason.BROKEN_RECORD),
}


def write_invalid_records(root: Path) -> None:
    """Write valid records around each invalid one, irregular but valid records, broken JSON, a wrong byte and a
    truncated end."""
    write_file(root / "secret.png", GOOD)
    write_file(root / "images" / "good.png", GOOD)
    (root / "images" / "link.png").symlink_to(root / "secret.png")
    (root / "images" / "elsewhere").symlink_to(root)
    (root / "images" / "dead_link.png").symlink_to("not_there.png")
    (root / "images" / "link_that_stays.png").symlink_to("good.png")
    texts = []
    for number, (name, (changes, data, _)) in enumerate(BAD.items()):
        texts.append(json.dumps(llava_record(number, "good.png")))
        texts.append(json.dumps(llava_record(0, f"{name}.png", id=name) | changes))
        if data is not None:
            write_file(root / "images" / f"{name}.png", data)
    texts.append(texts[0])  # a duplicate
    broken = json.dumps(llava_record(0, "good.png", id="broken")).replace('"from": "gpt",', '"from": "gpt"')
    texts.insert(5, broken)
    write_file(root / "images" / "odd.png", make_image(4, kind="JPEG"))
    write_file(root / "images" / "cover.gif", make_image(5, kind="GIF"))
    odd = [
        llava_record(0, "odd.png", id="wrong_extension"),
        llava_record(0, "link_that_stays.png", id="link_that_stays"),
        llava_record(0, "cover.jpg", id="other_extension"),
        llava_record(0, "good.png", id="extra_keys", model="gpt-4", score=1.5, nested={"a": [1]}),
        llava_record(0, "good.png", id=12345),
        llava_record(0, "good.png", id="12345", conversations=turns(ASK, ("gpt", "Of the same id, as text."))),
        llava_record(0, "good.png", id="greeted", conversations=turns(("gpt", "Hello!"), ASK, ANSWER)),
        llava_record(0, "good.png", id="unanswered", conversations=turns(ASK, ANSWER, ("human", "And?"))),
    ]
    texts += [json.dumps(record) for record in odd]
    latin = json.dumps(llava_record(0, "good.png", id="latin")).replace(
        "Thing 0", "Caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    )
    whole = "[" + ",\n".join(texts) + ",\n"
    cut_off = json.dumps(llava_record(0, "good.png", id="cut_off"))[:-20]
    write_file(root / "mix.json", whole.encode() + latin.encode("latin-1") + b",\n" + cut_off.encode())


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with invalid records, and a source that accepts their number."""
    write_invalid_records(tmp_path / "raw" / "dirt")
    source = {
        "reader": "llava_json",
        "root": "dirt",
        "options": {"annotations": "mix.json", "image_root": "images"},
        "max_reject_share": 0.6,
    }
    write_file(tmp_path / "configs" / "source" / "dirt.yaml", yaml.safe_dump(source))
    return tmp_path


@pytest.mark.parametrize("workers", ["1", "2"])
def test_each_error_has_its_reason(workspace: Path, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every invalid record is in quarantine.jsonl with reason, detail and location, and in the table; all others are in
    the store."""
    assert prepare.main(arguments(workspace, "--source", "dirt", "--workers", workers)) == 0
    out = capsys.readouterr().out
    path = workspace / "stores" / "dirt"
    lines = [json.loads(line) for line in (path / "quarantine.jsonl").read_text().splitlines()]
    expected = {name: str(reason) for name, (_, _, reason) in BAD.items()}
    expected |= {"latin": "wrong_encoding", "000000000": "duplicate_id"}
    expected |= {"mix.json, record 6": "broken_record", f"mix.json, record {2 * len(BAD) + 12}": "file_cut_off"}
    assert {line["id"]: line["reason"] for line in lines} == expected
    assert len(lines) == len(expected)
    raw = (workspace / "raw/dirt/mix.json").read_text(encoding="latin-1").splitlines()
    for line in lines:
        assert line["detail"]
        record = int(line["place"].removeprefix("mix.json, record "))
        named = line["id"].startswith("mix.json") or f'"{line["id"]}"' in raw[record - 1]
        assert named, line
        assert str(workspace) not in json.dumps(line)  # does not depend on the machine
    store = Store.open(path)
    good = [f"{number:09d}" for number in range(len(BAD))]
    odd = [
        "wrong_extension",
        "link_that_stays",
        "other_extension",
        "extra_keys",
        "12345",
        "12345~",
        "greeted",
        "unanswered",
    ]
    assert [sample_id[: sample_id.find("~") + 1] or sample_id for sample_id in store.ids()] == good + odd
    assert {store.sample(row).images[0] for row in range(len(BAD))} == {GOOD}
    assert store.manifest["repairs"] == {
        "first_turn_dropped": 1,
        "found_by_other_extension": 1,
        "id_made_unique": 1,
        "last_turn_dropped": 1,
        "wrong_extension": 1,
    }
    assert store.manifest["notes"] == {
        "unknown_key:model": {"records": 1, "example": "'gpt-4'"},
        "unknown_key:nested": {"records": 1, "example": "an object with the keys a"},
        "unknown_key:score": {"records": 1, "example": "1.5"},
    }
    assert "unknown_key:score" in out
    counts = {reason: list(expected.values()).count(reason) for reason in expected.values()}
    assert store.manifest["rejects"] == dict(sorted(counts.items()))
    for reason, count in counts.items():
        row = next(row for row in out.splitlines() if row.startswith("dirt ") and f" {reason} " in row)
        assert row.split()[2] == str(count)


def test_unreadable_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A truncated parquet file is one rejected record; the rows of the other file are in the store."""
    root = tmp_path / "raw" / "pages"
    write_messages(root, "a.parquet")
    write_file(root / "b.parquet", (root / "a.parquet").read_bytes()[:-100])
    source = {"reader": "messages_parquet", "root": "pages", "max_reject_share": 0.5}
    write_file(tmp_path / "configs" / "source" / "pages.yaml", yaml.safe_dump(source))
    assert prepare.main(arguments(tmp_path, "--source", "pages")) == 0
    line = json.loads((tmp_path / "stores/pages/quarantine.jsonl").read_text())
    assert (line["reason"], line["place"]) == ("file_unreadable", "b.parquet")
    assert len(Store.open(tmp_path / "stores/pages")) == 2
    assert "file_unreadable" in capsys.readouterr().out


def test_every_reason_is_tested() -> None:
    """Every reason is tested, here or in the named tests."""
    here = {reason for _, _, reason in BAD.values()}
    here |= {Reason.DUPLICATE_ID, Reason.FILE_CUT_OFF}
    # Tested above, in test_shared_files.py, in test_user_layouts.py, and in test_image_values.py.
    elsewhere = {"file_unreadable", "unknown_component", "unsupported_key", "unfilled_placeholder", "image_not_local"}
    assert {str(reason) for reason in set(Reason) - here} <= elsewhere


def test_strict_stops_at_first_reject(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and a message with reason, location and detail; no store is written."""
    code, sentence = failure(workspace, capsys, "--source", "dirt", "--strict")
    assert (code, "picture_missing at mix.json, record 2: no file 'missing.png'" in sentence) == (1, True)
    assert not (workspace / "stores" / "dirt").exists()


def test_too_many_rejects_fail(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 and a message with the counts per reason; the rejected records are listed in a file."""
    code, sentence = failure(workspace, capsys, "--source", "dirt", "--max-rejects", "0.3")
    assert code == 1
    assert "26 of 56 records are rejected" in sentence
    assert "path_outside_root 4" in sentence
    assert "--max-rejects" in sentence
    assert len((workspace / "stores" / "dirt.quarantine.jsonl").read_text().splitlines()) == 26
