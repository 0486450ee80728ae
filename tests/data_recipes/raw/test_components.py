"""Owns the proofs about merged files: every part is told by its rule, and what fits none is counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_recipes.raw.components import TABLES, component_of, find_table
from data_recipes.readers import llava_json
from data_recipes.schema.sample import DataError, Reason, Reject, Sample
from tests.data_recipes.merged_records import LETTER, MERGED, SHORT, coco, record
from tests.data_recipes.raw_folders import put

ALL = [(table, component, each) for table, parts in MERGED.items() for component, each in parts]


@pytest.mark.parametrize(("table", "component", "each"), ALL, ids=[f"{t}-{c}-{r['id']}" for t, c, r in ALL])
def test_the_published_forms(table: str, component: str, each: dict[str, Any]) -> None:
    """One record or more of every part of every file, as recipe.md describes them."""
    assert component_of(each, TABLES[table]) == component


@pytest.mark.parametrize("table", TABLES)
def test_every_rule_is_met(table: str) -> None:
    """No rule is shadowed by one before it: taking any out changes a verdict on the records above."""
    rules = TABLES[table]
    records = [each for _, each in MERGED[table]]
    verdicts = [component_of(each, rules) for each in records]
    for number, rule in enumerate(rules):
        rest = rules[:number] + rules[number + 1 :]
        # Two rules of one component may meet one record: a caption of COCO is known by its id or by its prompt.
        if [r.component for r in rules].count(rule.component) == 1:
            assert [component_of(each, rest) for each in records] != verdicts, rule


def test_the_number_of_questions_tells_vqav2_from_okvqa() -> None:
    """Both ask for a word or phrase about COCO pictures: three questions on a picture or more are VQAv2's."""
    rules = TABLES["mix665k"]
    for num_questions in range(1, 7):
        turns = [(f"Question {n}?" + (f"\n{SHORT}" if n == 0 else ""), "yes") for n in range(num_questions)]
        expected = "vqav2" if num_questions >= 3 else "okvqa"
        assert component_of(record("1", coco(1), turns), rules) == expected


def test_the_ending_may_stand_anywhere_and_in_any_case() -> None:
    """A later turn that asks for a letter or a region is enough; an answer that says so is not."""
    rules = TABLES["mix665k"]
    assert component_of(record("1", coco(1), [("Hm?", "A"), (f"Which?\n{LETTER.upper()}", "B")]), rules) == "aokvqa"
    assert component_of(record("1", coco(1), [("What does the sign say?", SHORT)]), rules) == "llava_instruct"


def test_captions_are_known_by_id_or_by_prompt() -> None:
    """Either is enough: neither has been checked against the real file here."""
    rules = TABLES["llava_next_779k"]
    assert component_of(record("coco2014_caps_9", coco(9), [("Caption?", "A boat.")]), rules) == "coco_captions"
    asked = [("Provide a one-sentence caption for the provided image.", "A boat.")]
    assert component_of(record("9", coco(9), asked), rules) == "coco_captions"


@pytest.mark.parametrize(
    "odd",
    [
        record("1", "flickr/1.jpg", [("What?", "That.")]),
        record("1", "my_coco/1.jpg", [("What?", "That.")]),
        record("1", "COCO/1.jpg", [("What?", "That.")]),
    ],
)
def test_what_fits_no_rule(odd: dict[str, Any]) -> None:
    """A folder that no rule names is no part's, however much it looks like one."""
    assert component_of(odd, TABLES["mix665k"]) is None


def test_the_raw_form_of_the_release_has_no_chats() -> None:
    """They are not in it, so a record without a picture is not taken for one of its parts."""
    assert component_of(record("x", None, [("Hello.", "Hi.")]), TABLES["llava_next_779k"]) is None


@pytest.mark.parametrize("broken", [{}, {"id": 1, "image": ["coco/1.jpg"]}, {"conversations": [3], "image": "coco/1"}])
def test_broken_records_have_a_verdict_too(broken: dict[str, Any]) -> None:
    """The reader of that part rejects them; telling the part never fails."""
    assert component_of(broken, TABLES["mix665k"]) in ("sharegpt_text", "llava_instruct")


def test_a_reader_yields_its_part_and_counts_what_fits_none(tmp_path: Path) -> None:
    """Parts together give every record once; one that fits no rule is a reject in each of them."""
    odd = record("odd", "flickr/1.jpg", [("What?", "That.")])
    records = [each for _, each in MERGED["mix665k"]]
    put(tmp_path / "mix.json", json.dumps([*records, odd]))
    found: list[str] = []
    for part in dict.fromkeys(rule.component for rule in TABLES["mix665k"]):
        items = list(llava_json.samples(tmp_path, "mix.json", components="mix665k", component=part))
        assert [(item.id, item.reason) for item in items if isinstance(item, Reject)] == [
            ("odd", Reason.UNKNOWN_COMPONENT)
        ]
        found += [item.id for item in items if isinstance(item, Sample)]
    assert sorted(found) == sorted(str(each["id"]) for each in records)


def test_wrong_names_list_the_known() -> None:
    """Both options of the YAML."""
    with pytest.raises(DataError, match="no table 'mix665'; known: mix665k, llava_next_779k"):
        find_table("mix665", ["vqav2"])
    with pytest.raises(DataError, match="table sharegpt4v_100k has no 'coko'; it has coco, lcs, sam, knowledge"):
        find_table("sharegpt4v_100k", ["coco", "coko"])
    with pytest.raises(DataError, match="component: it is missing; table sharegpt4v_100k has coco, lcs"):
        next(llava_json.samples(Path(), "mix.json", components="sharegpt4v_100k"))
