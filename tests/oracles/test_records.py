"""Records that preparation repairs or rejects, and what the authors' own functions make of them.

The fixture is made by ./scripts/oracles.sh, which runs the authors' code in a separate environment.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from data_recipes.raw.image_files import ImageError, load_image
from data_recipes.schema.sample import Reason, Reject, Sample, assemble, check_sample
from llava_next.config import AUTHORS_GRIDS, ProcessorConfig, ViewsConfig
from llava_next.inputs.processor import Processor
from tests.oracles.differences import RECORD_RULES
from tests.oracles.digests import supervised_runs
from tests.oracles.inputs import GENERATOR, UNREADABLE_RECORDS, Conversation, inputs_sha256, odd_records
from tests.oracles.real_tokenizers import tokenizer

FOLDER = Path(__file__).parent
FIXTURES = FOLDER / "fixtures"
ANSWER = "A red bicycle.</s>"
# What ours does, and the rule that says what the authors do; None: the same.
CASES: dict[str, tuple[Reason | str, str | None]] = {
    "first turn is an answer": ("first_turn_dropped", None),
    "last turn is a question": ("last_turn_dropped", "no_labels"),
    "empty answer": (Reason.EMPTY_ANSWER, "no_labels"),
    "white space for an answer": (Reason.EMPTY_ANSWER, "blank_answer"),
    "no answer": (Reason.NO_ANSWER, "no_labels"),
    "two questions": (Reason.ROLES_DO_NOT_ALTERNATE, "error_raised"),
    "two answers": (Reason.ROLES_DO_NOT_ALTERNATE, "error_raised"),
    "unknown speaker": (Reason.ROLES_DO_NOT_ALTERNATE, "error_raised"),
}


def _authors(name: str = "records", inputs: Iterable[object] = tuple(odd_records())) -> dict[str, dict[str, Any]]:
    fixture = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    assert fixture["inputs"] == {"generator": GENERATOR, "sha256": inputs_sha256(inputs)}
    records: dict[str, dict[str, Any]] = fixture["records"]
    return records


def _ours(record: Conversation) -> Sample | Reject:
    made = assemble(record.kind, [(turn.speaker, turn.value) for turn in record.turns], (), "here")
    return made if isinstance(made, Reject) else check_sample(made) or made


@pytest.mark.parametrize("record", odd_records(), ids=lambda record: record.kind)
def test_each_record_is_handled_as_listed(record: Conversation) -> None:
    """Ours supervises the answer of a record that it repairs and rejects one that it cannot repair; the authors keep
    each, without labels or with a blank answer, or raise an exception."""
    expected, rule = CASES[record.kind]
    ours, authors, real = _ours(record), _authors()[record.kind], tokenizer("vicuna")
    if rule == "error_raised":
        assert authors in ({"error": "AssertionError"}, {"error": "KeyError"})
    else:
        answers = {None: [ANSWER], "no_labels": [], "blank_answer": [ANSWER, "  </s>"]}[rule]
        assert [real.decode(authors["ids"][a:b]).strip(" ") for a, b in authors["supervised"]] == [
            answer.strip(" ") for answer in answers
        ]
    if isinstance(expected, Reason):
        assert isinstance(ours, Reject)
        assert ours.reason == expected
        return
    assert isinstance(ours, Sample)
    assert ours.repairs == (expected,)
    config = ProcessorConfig("vicuna_v1", ViewsConfig("crop", "crop"), AUTHORS_GRIDS, 336, 24, max_length=2048)
    layout = Processor(real, config).layout(ours.messages, [])
    (run,) = supervised_runs(layout.labels.tolist())
    assert real.decode(layout.ids[slice(*run)]) == ANSWER
    assert (layout.ids.tolist() == authors["ids"] and [run] == authors["supervised"]) == (rule is None)


def test_an_image_that_cannot_be_read_is_replaced_by_nothing(tmp_path: Path) -> None:
    """The authors' repository takes the next record, or raises an exception where there is none; preparation rejects
    the record by its reason."""
    authors = _authors("unreadable", UNREADABLE_RECORDS)
    assert set(authors) == {name for name, _ in UNREADABLE_RECORDS}
    for name, image in UNREADABLE_RECORDS:
        if image is None:
            assert authors[name] == {"taken": name}
            continue
        with pytest.raises(ImageError) as raised:
            load_image(tmp_path / image)
        assert raised.value.reason == Reason.IMAGE_MISSING
    assert authors["missing image"] == {"taken": "more text"}
    assert authors["last image missing"] == {"error": "FileNotFoundError"}


def test_the_tables_count_the_records() -> None:
    """differences.md lists each rule with its number of records, and no record is outside the cases."""
    counts = {
        "records": Counter(rule for _, rule in CASES.values() if rule is not None),
        "unreadable": Counter(["next_record_taken", "error_raised"]),
    }
    for name, rules in counts.items():
        pattern = rf"^\| `{name}` \| `(\w+)` \| (\d+) of (\d+) \|"
        rows = re.findall(pattern, (FOLDER / "differences.md").read_text(), re.MULTILINE)
        assert {rule: int(count) for rule, count, _ in rows} == rules
        inputs = odd_records() if name == "records" else UNREADABLE_RECORDS
        assert {int(total) for _, _, total in rows} == {len(inputs)}
    assert set().union(*counts.values()) == set(RECORD_RULES)
    assert set(_authors()) == set(CASES)
