"""Our ids and labels against the authors' own, conversation by conversation; every difference is a listed one.

The fixtures are made by ./scripts/oracles.sh, which runs the authors' code in a separate environment.
"""

import json
import re
import unicodedata
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from llava_next.config import ModelError
from llava_next.inputs.conversation import TEMPLATES
from tests.jinja_shapes import MISTRAL, QWEN, VICUNA
from tests.oracles.differences import RECORD_RULES, RULES, Comparison
from tests.oracles.digests import IGNORE, numbers_digest, supervised_runs
from tests.oracles.image_files import image_files
from tests.oracles.inputs import GENERATOR, captions, conversations, inputs_sha256
from tests.oracles.real_tokenizers import NAMES, tokenizer

FOLDER = Path(__file__).parent
FIXTURES = FOLDER / "fixtures"
HINT = "make the fixtures again: ./scripts/oracles.sh"

PACKAGE = ("one_picture_a_turn", "word_mark_before_space", "sample_ignored")
LATER = ("picture_line_as_written", "whole_assistant_message", "special_tokens_everywhere")
CASES: dict[str, tuple[str, ...]] = {
    "plain__vicuna": PACKAGE,
    "vicuna_v1__vicuna": PACKAGE,
    "vicuna_v1__vicuna_legacy": PACKAGE,
    "vicuna_v1__vicuna__cut": (*PACKAGE, "cut_in_an_answer", "kept_unfinished"),
    "mistral_instruct__mistral": PACKAGE,
    "chatml_direct__vicuna_chatml": (*PACKAGE, "one_token_early"),
    "chatml_direct__vicuna_chatml__later": ("picture_line_as_written", "word_mark_before_space", "sample_ignored"),
    "qwen_1_5__qwen__later": LATER,
    "llava_llama_3__llama3__later": (*LATER, "trimmed"),
}
"""Fixture → the rules that may explain a difference in it."""


def _fixture(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))


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
    there = {path.stem for path in FIXTURES.glob("*__*.json")}
    assert there == set(CASES)
    text = (FOLDER / "differences.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, re.MULTILINE)
    of_pictures = {
        ("anyres_sizes", "authors_rounding"),
        *((fixture, "height_taken_for_channels") for fixture in ("anyres_pixels", "squash_pixels")),
        *(("image_files", file.rule) for file in image_files()),
    }
    of_records = {("records", rule) for rule in RECORD_RULES if rule != "next_record_taken"}
    of_records |= {("unreadable", rule) for rule in ("next_record_taken", "error_raised")}
    assert {rule for name, rule in rows if name in there} == set(RULES)
    assert {(name, rule) for name, rule in rows if name not in there} == of_pictures | of_records


@pytest.mark.parametrize("name", CASES)
def test_ids_and_labels_are_the_authors(name: str) -> None:
    """Each conversation's ids and labels are theirs, or become theirs by listed rules, in as many as are listed."""
    fixture = _fixture(name)
    records = captions() if fixture["template"] == "plain" else conversations()
    assert fixture["inputs"] == {"generator": GENERATOR, "sha256": inputs_sha256(records)}, HINT
    limit = {"max_length": fixture["max_length"]} if "max_length" in fixture else {}
    comparison = Comparison(fixture["template"], tokenizer(fixture["tokenizer"]), CASES[name], **limit)
    used: Counter[str] = Counter()
    num_unsupervised = 0
    for index, (record, authors) in enumerate(zip(records, fixture["digests"], strict=True)):
        for rules in comparison.subsets():
            ids, labels = comparison.encode(record, rules)
            if f"{numbers_digest(ids)} {numbers_digest(labels)}" == authors:
                used.update(rules)
                num_unsupervised += "kept_unfinished" in rules and not supervised_runs(labels)
                break
        else:
            ids, labels = comparison.encode(record, frozenset())
            whole = fixture["whole"].get(str(index), "kept as a digest only")
            pytest.fail(
                f"conversation {index} ({record.kind}) differs from the authors' in a way that no rule makes:\n{record}"
                f"\nours: {ids} supervised {supervised_runs(labels)}\ntheirs: {whole}"
            )
    assert dict(used) == _listed()[name], "the table in differences.md tells other numbers"
    if "kept_unfinished" in used:
        assert f"{num_unsupervised} of them supervise no token" in (FOLDER / "differences.md").read_text()


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


SENTENCEPIECE = ("vicuna", "vicuna_legacy", "vicuna_chatml", "mistral", "mistral_gemma")
CHATML_TOKENIZERS = ("vicuna_chatml", "qwen", "smollm2")
SPEAK: dict[str, tuple[str, ...]] = {
    "plain": NAMES,
    "vicuna_v1": SENTENCEPIECE[:4],
    "mistral_instruct": SENTENCEPIECE[:4],
    "chatml_direct": CHATML_TOKENIZERS,
    "qwen_1_5": CHATML_TOKENIZERS,
    "chatml": CHATML_TOKENIZERS,
    "qwen_2_5": CHATML_TOKENIZERS,
    "qwen3": CHATML_TOKENIZERS,
    "llava_llama_3": ("llama3",),
    "llama_3_2": ("llama3",),
    "gemma": ("mistral_gemma",),
    "phi_4": ("qwen_phi",),
    "tokenizer": NAMES,
}
"""Template → the tokenizers that have its tokens. Every other pair is refused."""

SHAPES = {"vicuna": VICUNA, "vicuna_legacy": VICUNA, "vicuna_chatml": QWEN, "mistral": MISTRAL, "qwen": QWEN}
"""What the cached tokenizers lack; llama3 and smollm2 bring chat templates of their own."""


def _speaking(name: str, template: str) -> Any:
    """The tokenizer, with a chat template where one is asked for and the cache has it without."""
    real = tokenizer(name)
    if template == "tokenizer" and name in SHAPES:
        real = deepcopy(real)
        real.chat_template = SHAPES[name]
    return real


def _comparable(text: str) -> str:
    """What tokenizers do to a text on purpose is no difference: composed characters, ▁ for a space, first spaces."""
    return unicodedata.normalize("NFC", text).replace("▁", " ").lstrip(" ")


def test_every_template_is_tried_with_every_tokenizer() -> None:
    """No template is missing from the table of pairs."""
    assert set(SPEAK) == {*TEMPLATES, "tokenizer"}


@pytest.mark.parametrize(("template", "name"), [(template, name) for template in SPEAK for name in SPEAK[template]])
def test_supervised_text_is_the_answers_with_their_ends(template: str, name: str) -> None:
    """With real tokenizers, every supervised run decodes to one answer and its end token, and nothing else."""
    real = _speaking(name, template)
    comparison = Comparison(template, real, ())
    rendered = comparison.processor(frozenset()).template
    for record in captions() if template == "plain" else conversations():
        ids, labels = comparison.encode(record, frozenset())
        answers = [turn.value for turn in record.turns if turn.speaker == "gpt"]
        answers = [answer.strip() if rendered.trims else answer for answer in answers]
        expected = [rendered.answer_format.replace("{text}", answer) + rendered.end for answer in answers]
        runs = []
        for (start, stop), answer in zip(supervised_runs(labels), expected, strict=True):
            run = real.decode(ids[start:stop])
            shared = run.removesuffix(answer)
            # A token that holds the header's last line break and the answer's first white space is the answer's.
            if rendered.header.endswith(shared) and len(real.decode(ids[start])) > len(shared) > 0:
                run = answer
            runs.append(run)
        runs, expected = [_comparable(text) for text in runs], [_comparable(text) for text in expected]
        if record.kind == "special" and name in SENTENCEPIECE:
            # Behind an end token inside an answer stands a word mark, which decodes to a space.
            runs, expected = ([text.replace(" ", "") for text in texts] for texts in (runs, expected))
        assert runs == expected, record


@pytest.mark.parametrize(
    ("template", "name"),
    [(template, name) for template in SPEAK for name in NAMES if name not in SPEAK[template]],
)
def test_other_pairs_are_refused(template: str, name: str) -> None:
    """A tokenizer without the template's tokens is refused with the way out, never used without a stop token."""
    with pytest.raises(ModelError, match=r"choose another template with stage\.template=NAME"):
        Comparison(template, _speaking(name, template), ()).processor(frozenset())
