"""Tests of the accuracy of image questions: it agrees with stock `generate`, and the numbers are consistent."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_recipes.mixture.mixture import Mixture
from data_recipes.raw.questions import SHORT_ANSWER
from data_recipes.schema.sample import Message
from data_recipes.store.reader import StoredSample
from llava_next.formats.hugging_face import read_hf
from llava_next.inputs.batch import Batch
from llava_next.inputs.processor import Processor
from llava_next.model.llava_next import TokenScores
from tests.tiny import tiny_mixture
from tests.train.evaluate.learned import ALONE, ANSWERS, Learned, sample
from train.config.schema import PackingConfig
from train.evaluate.answers import StockModel
from train.evaluate.evaluation_ranks import EvaluationError
from train.evaluate.image_questions import (
    Question,
    answer_all,
    answer_base_views,
    extract_questions,
    filter_askable,
    read_image_samples,
    summarize,
)
from train.validation.held_out import list_mixture_samples

WIDE = PackingConfig(max_tokens=8192, max_tiles=48)


def test_a_hit_is_what_generate_answers(learned: Learned) -> None:
    """Teacher-forced hits are exactly the questions whose truth stock `generate` answers."""
    processor, samples = learned.processor, learned.samples
    _, model = read_hf(learned.export, learned.config)
    questions = [question for n, s in enumerate(samples) for question in extract_questions("shapes", [s], 9, 9)]
    questions = [replace(question, sample=n) for n, question in enumerate(questions)]
    right, other = answer_all(model, processor, samples, questions, WIDE, ALONE)
    stock = StockModel(learned.export, processor, ALONE, batch_size=1, max_new_tokens=24)
    answers = [answer.answer for answer in stock.generate_answers(samples, questions, "none")]
    assert [answer == truth for answer, truth in zip(answers, ANSWERS, strict=True)] == right.tolist()
    assert right.tolist() == [True, True, True, False]
    assert not other.any()  # every answer differs, so another sample's picture leads to another answer


@pytest.mark.parametrize(("max_tokens", "max_tiles", "num_rows"), [(320, 48, 24), (8192, 12, 6), (1, 1, 48)])
def test_rows_keep_the_budgets(
    learned: Learned, monkeypatch: pytest.MonkeyPatch, max_tokens: int, max_tiles: int, num_rows: int
) -> None:
    """Rows have at most the tokens and tiles of the budgets, or one question alone that exceeds them. Questions about
    one image, of 5 tiles, share a row and its tiles. The answers are those of any other rows."""
    processor = learned.processor
    samples = [replace(learned.samples[number % 4], id=str(number)) for number in range(12)]
    questions = [
        Question("shapes", number, text, samples[number].messages[1].text)
        for number in range(len(samples))
        for text in ("What is it?", "What is it now?")
    ]
    _, model = read_hf(learned.export, learned.config)
    expected = answer_all(model, processor, samples, questions, WIDE, ALONE)
    rows: list[tuple[int, int, int]] = []
    score = model.score

    def watched(batch: Batch) -> TokenScores:
        rows.append((batch.input_ids.numel(), len(batch.tiles), len(batch.segments.lengths)))
        return score(batch)

    monkeypatch.setattr(model, "score", watched)
    packing = PackingConfig(max_tokens, max_tiles)
    actual = answer_all(model, processor, samples, questions, packing, ALONE)
    for hits, expected_hits in zip(actual, expected, strict=True):
        assert hits.tolist() == expected_hits.tolist()
    assert sum(num_examples for _, _, num_examples in rows) == 2 * len(questions)
    for num_tokens, num_tiles, num_examples in rows:
        assert num_examples == 1 or (num_tokens <= max_tokens and num_tiles <= max_tiles)
    assert len(rows) == num_rows


def test_base_view_is_the_first_view_alone(learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model sees exactly the first of the views that AnyRes cuts, and no newlines."""
    processor, samples = learned.processor, learned.samples
    questions = [Question("shapes", number, "What is it?", s.messages[1].text) for number, s in enumerate(samples)]
    _, model = read_hf(learned.export, learned.config)
    batches: list[Batch] = []
    score = model.score

    def watched(batch: Batch) -> TokenScores:
        batches.append(batch)
        return score(batch)

    monkeypatch.setattr(model, "score", watched)
    hits = answer_base_views(model, processor, samples, questions, PackingConfig(1, 1), ALONE)
    for sample_, batch in zip(samples, batches, strict=True):
        whole = processor.encode(sample_.messages, sample_.sizes_hw, sample_.images)
        assert len(whole.tiles) > 1
        assert np.array_equal(batch.tiles.numpy(), whole.tiles[:1])
        num_image_tokens = int((batch.input_ids == processor.image_token_id).sum())
        assert num_image_tokens == processor.config.patches_per_side**2
    assert hits.shape == (len(questions),)
    right, _ = answer_all(model, processor, samples, questions, WIDE, ALONE)
    accuracy = summarize(questions, right, np.zeros_like(right), hits)
    assert accuracy.base_view == hits.mean()
    assert accuracy.base_view_difference == right.mean() - hits.mean()
    assert summarize(questions, right, np.zeros_like(right)).base_view is None


def test_out_of_memory_names_what_to_lower(learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the size of the row, and the options with their values."""
    _, model = read_hf(learned.export, learned.config)

    def fail(batch: Batch) -> TokenScores:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    monkeypatch.setattr(model, "score", fail)
    questions = extract_questions("shapes", learned.samples, 9, 9)
    with pytest.raises(EvaluationError, match=r"a row of \d+ tokens .*--max-tokens \(8192\) or --max-tiles \(48\)"):
        answer_all(model, learned.processor, learned.samples, questions, WIDE, ALONE)


def test_figures_add_up() -> None:
    """Shares refer to all questions, and the interval contains the difference."""
    questions = [Question("s", n // 2, "q", "no" if n % 4 else "yes") for n in range(40)]
    right = np.array([n % 10 != 0 for n in range(40)])
    other = np.array([n % 2 == 0 for n in range(40)])
    base_view = np.array([n % 5 == 0 for n in range(40)])
    accuracy = summarize(questions, right, other, base_view)
    assert (accuracy.num_questions, accuracy.num_pictures) == (40, 20)
    assert accuracy.right_picture == right.mean()
    assert accuracy.other_picture == other.mean()
    assert (accuracy.commonest, accuracy.commonest_answer) == ("no", 0.75)
    assert accuracy.interval[0] < accuracy.difference < accuracy.interval[1]
    assert accuracy.difference == pytest.approx(accuracy.right_picture - accuracy.other_picture)
    assert accuracy.base_view_interval is not None
    assert accuracy.base_view_difference is not None
    assert accuracy.base_view_difference == pytest.approx(right.mean() - base_view.mean())
    assert accuracy.base_view_interval[0] < accuracy.base_view_difference < accuracy.base_view_interval[1]


def test_questions_are_asked_one_at_a_time(tmp_path: Path) -> None:
    """Only held-out samples with images are used, each turn as a question, without a placeholder about one image."""
    mixture_config, store_root = tiny_mixture(tmp_path, 20, holdout=5)
    mixture = Mixture.open(mixture_config, store_root)
    held_out = {source: read_image_samples(samples, 9) for source, samples in list_mixture_samples(mixture).items()}
    trained = {h for n in range(mixture.num_samples) for h in mixture.sample(n).image_hashes}
    assert set(held_out) == {"tiny_pictures"}
    samples = held_out["tiny_pictures"]
    assert samples
    assert all(len(sample.images) == 1 and not set(sample.image_hashes) & trained for sample in samples)
    questions = extract_questions("tiny_pictures", samples, limit=4, per_picture=2)
    assert len(questions) <= 4
    assert all("<image>" not in question.text and question.truth for question in questions)


def _set(*numbers: int, text: str = "First <image>, then <image>: what is it now?") -> StoredSample:
    """A set of learned images; the truth is the answer about the second."""
    parts = [sample(number) for number in numbers]
    messages = (Message("user", text), Message("assistant", ANSWERS[numbers[1]]))
    return replace(
        parts[0],
        id="".join(map(str, numbers)),
        messages=messages,
        sizes_hw=tuple(part.sizes_hw[0] for part in parts),
        images=tuple(part.images[0] for part in parts),
    )


def test_questions_about_sets() -> None:
    """The placeholders stay where they are. A later turn has the images of the earlier ones in front, a sample is asked
    with the images up to the question."""
    turns = ["<image> and <image>: equal?", "no", "And <image>?", "yes", "Why?", "so"]
    messages = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns))
    images = replace(_set(0, 1, 2), messages=messages)
    asked = extract_questions("sets", [images], limit=9, per_picture=9)
    assert [(question.num_images, question.prompt) for question in asked] == [
        (2, "<image> and <image>: equal?"),
        (3, "<image>\n<image>\nAnd <image>?"),
        (3, "<image>\n<image>\n<image>\nWhy?"),
    ]


def test_every_image_of_a_set_but_the_first_is_exchanged(learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    """With those of the next set that has as many; the hits with the own images are what stock `generate` answers."""
    processor = learned.processor
    samples = [_set(0, 1), sample(0), _set(2, 0), _set(1, 2, 0, text="<image><image><image>\nWhat?"), sample(1)]
    asked = extract_questions("sets", samples, 9, 9)
    questions, num_others = filter_askable(processor, samples, asked)
    assert (questions, num_others) == ([asked[0], asked[1], asked[2], asked[4]], 1)  # one set alone has three images
    _, model = read_hf(learned.export, learned.config)
    tiles: list[np.ndarray] = []
    score = model.score

    def watched(batch: Batch) -> TokenScores:
        tiles.append(batch.tiles.numpy())
        return score(batch)

    monkeypatch.setattr(model, "score", watched)
    right, other = answer_all(model, processor, samples, questions, PackingConfig(1, 1), ALONE)
    images = [processor.encode(each.messages, each.sizes_hw, each.images).tiles for each in map(sample, range(4))]
    # Sorted by the sample that the images are of: own and other images of samples 0, 1, 2, 3 and 4.
    shown = [[0, 1], [0], [0], [2, 0], [0, 0], [2, 2], [1], [1]]
    for actual, numbers in zip(tiles, shown, strict=True):
        assert np.array_equal(actual, np.concatenate([images[number] for number in numbers]))
    assert right.shape == other.shape == (4,)
    stock = StockModel(learned.export, processor, ALONE, batch_size=2, max_new_tokens=24)
    answers = [answer.answer for answer in stock.generate_answers(samples, questions, "none")]
    assert [answer == question.truth for answer, question in zip(answers, questions, strict=True)] == right.tolist()
    base_views = answer_base_views(model, processor, samples, questions, WIDE, ALONE)
    assert base_views.shape == (4,)


def test_a_source_of_sets_alone(learned: Learned) -> None:
    """It has no image that is exchanged with that of another single one."""
    samples = [_set(0, 1), _set(2, 0)]
    asked = extract_questions("sets", samples, 9, 9)
    _, model = read_hf(learned.export, learned.config)
    right, other = answer_all(model, learned.processor, samples, asked, PackingConfig(4096, 64), ALONE)
    assert right.shape == other.shape == (2,)


def test_questions_before_the_second_image_of_a_set_are_counted(learned: Learned) -> None:
    """Training shows the first image of a set in the views of sets, which a question about it alone would not have."""
    turns = ["Hello.", "Hi.", "<image>\nWhat is it?", "red", "And <image>?", "blue"]
    messages = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns))
    samples = [replace(_set(0, 1), messages=messages), _set(1, 2)]
    asked = extract_questions("sets", samples, 9, 9)
    assert [question.num_images for question in asked] == [0, 1, 2, 2]
    questions, num_others = filter_askable(learned.processor, samples, asked)
    assert (questions, num_others) == (asked[2:], 2)


def test_form_of_answer_is_appended_to_every_question() -> None:
    """The instruction of a conversation's first question is appended to every question."""
    turns = [f"<image>\nWhich is highest?\n{SHORT_ANSWER}", "2016", "Which is lowest?", "2011"]
    messages = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(turns))
    asked = extract_questions("charts", [replace(sample(0), messages=messages)], limit=9, per_picture=9)
    assert [question.text.split("\n") for question in asked] == [
        ["Which is highest?", SHORT_ANSWER],
        ["Which is lowest?", SHORT_ANSWER],
    ]


def test_questions_too_long_for_another_image_are_counted(learned: Learned) -> None:
    """A question is also asked with another image, so it must fit with the largest one."""
    small, large = replace(learned.samples[0], sizes_hw=((31, 90),)), learned.samples[1]
    short, long = extract_questions("shapes", [small], 9, 9)[0], Question("shapes", 0, "Which?", "a long truth " * 20)
    whole = [Message("user", f"<image>\n{long.text}"), Message("assistant", long.truth)]
    just_enough = learned.processor.layout(whole, small.sizes_hw).num_tokens
    processor = Processor(learned.processor.tokenizer, replace(learned.processor.config, max_length=just_enough))
    assert filter_askable(processor, [small], [short, long]) == ([short, long], 0)
    assert filter_askable(processor, [small, large], [short, long]) == ([short], 1)
