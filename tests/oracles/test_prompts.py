"""Our ids and labels against the authors' own, conversation by conversation; every difference is a listed one.

The fixtures are made by ./scripts/oracles.sh, which runs the authors' code in an environment of its own.
"""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scripts.oracles.digests import IGNORE, numbers_digest, supervised_runs
from scripts.oracles.inputs import GENERATOR, captions, conversations, inputs_sha256
from tests.oracles.differences import RULES, Comparison
from tests.oracles.real_tokenizers import tokenizer

FOLDER = Path(__file__).parent
HINT = "make the fixtures again: ./scripts/oracles.sh"

PACKAGE = ("one_picture_a_turn", "word_mark_before_space", "sample_ignored")
LATER = ("picture_line_as_written", "whole_assistant_message", "special_tokens_everywhere")
CASES: dict[str, tuple[str, ...]] = {
    "plain__vicuna": PACKAGE,
    "vicuna_v1__vicuna": PACKAGE,
    "vicuna_v1__vicuna_legacy": PACKAGE,
    "mistral_instruct__mistral": PACKAGE,
    "chatml_direct__vicuna_chatml": (*PACKAGE, "one_token_early"),
    "chatml_direct__vicuna_chatml__later": ("picture_line_as_written", "word_mark_before_space", "sample_ignored"),
    "qwen_1_5__qwen__later": LATER,
    "llava_llama_3__llama3__later": (*LATER, "trimmed"),
}
"""Fixture → the rules that may explain a difference in it."""


def _fixture(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _listed() -> dict[str, dict[str, int]]:
    """differences.md's table: fixture → rule → number of conversations."""
    listed: dict[str, dict[str, int]] = {name: {} for name in CASES}
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| (\d+) of \d+ \|", (FOLDER / "differences.md").read_text(), re.MULTILINE
    )
    for name, rule, count in rows:
        if name in listed:
            listed[name][rule] = int(count)
    return listed


def test_every_prompt_fixture_is_compared() -> None:
    """No fixture lies unused, and the table of differences names known fixtures and rules only."""
    there = {path.stem for path in FOLDER.glob("*__*.json")}
    assert there == set(CASES)
    text = (FOLDER / "differences.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, re.MULTILINE)
    of_pictures = {("anyres_sizes", "authors_rounding"), ("anyres_pixels", "height_taken_for_channels")}
    assert {rule for name, rule in rows if name in there} == set(RULES)
    assert {(name, rule) for name, rule in rows if name not in there} == of_pictures


@pytest.mark.parametrize("name", CASES)
def test_ids_and_labels_are_the_authors(name: str) -> None:
    """Each conversation's ids and labels are theirs, or become theirs by listed rules, in as many as are listed."""
    fixture = _fixture(name)
    records = captions() if fixture["template"] == "plain" else conversations()
    assert fixture["inputs"] == {"generator": GENERATOR, "sha256": inputs_sha256(records)}, HINT
    comparison = Comparison(fixture["template"], tokenizer(fixture["tokenizer"]), CASES[name])
    used: Counter[str] = Counter()
    for index, (record, theirs) in enumerate(zip(records, fixture["digests"], strict=True)):
        for rules in comparison.subsets():
            ids, labels = comparison.encode(record, rules)
            if f"{numbers_digest(ids)} {numbers_digest(labels)}" == theirs:
                used.update(rules)
                break
        else:
            ids, labels = comparison.encode(record, frozenset())
            whole = fixture["whole"].get(str(index), "kept as a digest only")
            pytest.fail(
                f"conversation {index} ({record.kind}) differs from the authors' in a way that no rule makes:\n{record}"
                f"\nours: {ids} supervised {supervised_runs(labels)}\ntheirs: {whole}"
            )
    assert dict(used) == _listed()[name], "the table in differences.md tells other numbers"


@pytest.mark.parametrize("name", CASES)
def test_whole_conversations_are_readable_in_the_fixture(name: str) -> None:
    """What a fixture keeps as it is belongs to its digests: the file was not edited by hand."""
    fixture = _fixture(name)
    assert len(fixture["whole"]) == 20
    for index, whole in fixture["whole"].items():
        labels = [IGNORE] * len(whole["ids"])
        for start, stop in whole["supervised"]:
            labels[start:stop] = whole["ids"][start:stop]
        assert f"{numbers_digest(whole['ids'])} {numbers_digest(labels)}" == fixture["digests"][int(index)]


PAIRS = [
    ("plain", "vicuna"), ("plain", "mistral"), ("plain", "llama3"), ("vicuna_v1", "vicuna"),
    ("vicuna_v1", "vicuna_legacy"), ("vicuna_v1", "mistral"), ("mistral_instruct", "mistral"),
    ("chatml_direct", "vicuna_chatml"), ("chatml_direct", "qwen"), ("qwen_1_5", "qwen"), ("chatml", "qwen"),
    ("llava_llama_3", "llama3"),
]  # fmt: skip


def _comparable(text: str) -> str:
    """What tokenizers do to a text on purpose is no difference: composed characters, ▁ for a space, first spaces."""
    return unicodedata.normalize("NFC", text).replace("▁", " ").lstrip(" ")


@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_supervised_text_is_the_answers_with_their_ends(template: str, name: str) -> None:
    """With real tokenizers, every supervised run decodes to one answer and its end token, and nothing else."""
    real = tokenizer(name)
    comparison = Comparison(template, real, ())
    rendered = comparison._processor(frozenset()).template
    sentencepiece = name.startswith(("vicuna", "mistral"))
    for record in captions() if template == "plain" else conversations():
        if record.kind == "special" and sentencepiece:
            continue  # an end token inside an answer gets a word mark behind it, which decodes to a space
        ids, labels = comparison.encode(record, frozenset())
        found = [_comparable(real.decode(ids[start:stop])) for start, stop in supervised_runs(labels)]
        answers = [turn.value for turn in record.turns if turn.speaker == "gpt"]
        wanted = [_comparable(rendered.answer_format.replace("{text}", answer) + rendered.end) for answer in answers]
        for index, (run, answer) in enumerate(zip(found, wanted, strict=True)):
            # One token may hold the header's last line break and the answer's first: it is the answer's.
            if answer.startswith("\n") and rendered.header.endswith(run.removesuffix(answer)):
                found[index] = answer
        assert found == wanted, record
