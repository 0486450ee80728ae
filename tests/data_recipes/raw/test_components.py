"""Tests of the rules that assign the records of merged files to components."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_recipes.raw.components import TABLES, find_table, match_component
from data_recipes.readers import llava_json
from data_recipes.schema.sample import DataError, Reason, Reject, Sample
from tests.data_recipes.merged_records import LETTER, MERGED, SHORT, coco, record, record_name
from tests.data_recipes.raw_folders import write_file

ALL = [(table, component, each) for table, parts in MERGED.items() for component, each in parts]


@pytest.mark.parametrize(("table", "component", "each"), ALL, ids=[f"{t}-{c}-{record_name(r)}" for t, c, r in ALL])
def test_published_records(table: str, component: str, each: dict[str, Any]) -> None:
    """The records of every component are assigned to it."""
    assert match_component(each, TABLES[table]) == component


@pytest.mark.parametrize("table", TABLES)
def test_every_rule_is_used(table: str) -> None:
    """No rule is shadowed by an earlier one: removing any rule changes the result for some record."""
    rules = TABLES[table]
    records = [each for _, each in MERGED[table]]
    expected = [match_component(each, rules) for each in records]
    for number, rule in enumerate(rules):
        rest = rules[:number] + rules[number + 1 :]
        # Rules of the same component may overlap: COCO captions match by id or by prompt.
        if [r.component for r in rules].count(rule.component) == 1:
            assert [match_component(each, rest) for each in records] != expected, rule


def test_number_of_questions_separates_vqav2_and_okvqa() -> None:
    """Both ask short questions about COCO images; those with at least three questions are VQAv2."""
    rules = TABLES["mix665k"]
    for num_questions in range(1, 7):
        turns = [(f"Question {n}?" + (f"\n{SHORT}" if n == 0 else ""), "yes") for n in range(num_questions)]
        expected = "vqav2" if num_questions >= 3 else "okvqa"
        assert match_component(record("1", coco(1), turns), rules) == expected


def test_format_instruction_in_any_turn_and_case() -> None:
    """A format instruction is found in any user turn and case, but not in answers."""
    rules = TABLES["mix665k"]
    assert match_component(record("1", coco(1), [("Hm?", "A"), (f"Which?\n{LETTER.upper()}", "B")]), rules) == "aokvqa"
    assert match_component(record("1", coco(1), [("What does the sign say?", SHORT)]), rules) == "llava_instruct"


def test_captions_by_id_or_prompt() -> None:
    """Either is sufficient, since neither was checked against the real file."""
    rules = TABLES["llava_next_779k"]
    assert match_component(record("coco2014_caps_9", coco(9), [("Caption?", "A boat.")]), rules) == "coco_captions"
    asked = [("Provide a one-sentence caption for the provided image.", "A boat.")]
    assert match_component(record("9", coco(9), asked), rules) == "coco_captions"


@pytest.mark.parametrize(
    "odd",
    [
        record("1", "flickr/1.jpg", [("What?", "That.")]),
        record("1", "my_coco/1.jpg", [("What?", "That.")]),
        record("1", "COCO/1.jpg", [("What?", "That.")]),
    ],
)
def test_unknown_folder(odd: dict[str, Any]) -> None:
    """A similar but unknown folder belongs to no component."""
    assert match_component(odd, TABLES["mix665k"]) is None


def test_text_only_record_in_release() -> None:
    """A record without an image belongs to no component."""
    assert match_component(record("x", None, [("Hello.", "Hi.")]), TABLES["llava_next_779k"]) is None


@pytest.mark.parametrize("broken", [{}, {"id": 1, "image": ["coco/1.jpg"]}, {"conversations": [3], "image": "coco/1"}])
def test_invalid_records(broken: dict[str, Any]) -> None:
    """Invalid records are assigned without an error; the reader rejects them."""
    assert match_component(broken, TABLES["mix665k"]) in ("sharegpt_text", "llava_instruct")


def test_reader_yields_its_component(tmp_path: Path) -> None:
    """The components together have every record once; a record that matches no rule is a reject of each."""
    odd = record("odd", "flickr/1.jpg", [("What?", "That.")])
    records = [each for _, each in MERGED["mix665k"]]
    write_file(tmp_path / "mix.json", json.dumps([*records, odd]))
    ids: list[str] = []
    for part in dict.fromkeys(rule.component for rule in TABLES["mix665k"]):
        items = list(llava_json.samples(tmp_path, "mix.json", components="mix665k", component=part))
        assert [(item.id, item.reason) for item in items if isinstance(item, Reject)] == [
            ("odd", Reason.UNKNOWN_COMPONENT)
        ]
        ids += [item.id for item in items if isinstance(item, Sample)]
    assert sorted(ids) == sorted(str(each["id"]) for each in records)


def test_unknown_names() -> None:
    """Messages about unknown tables and components list the known ones."""
    with pytest.raises(DataError, match="no table 'mix665'; known: mix665k, llava_next_779k"):
        find_table("mix665", ["vqav2"])
    with pytest.raises(DataError, match="table sharegpt4v_100k has no 'coko'; it has coco, lcs, sam, knowledge"):
        find_table("sharegpt4v_100k", ["coco", "coko"])
    with pytest.raises(DataError, match="component: not given; table sharegpt4v_100k has coco, lcs"):
        next(llava_json.samples(Path(), "mix.json", components="sharegpt4v_100k"))
