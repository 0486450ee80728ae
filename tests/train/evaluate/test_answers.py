"""Tests of free answers: they do not depend on their batch, other prompts are rejected, and cut answers are marked."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_next.config import ANYRES, ModelError
from llava_next.formats.hugging_face import write_hf
from llava_next.model.build import build_model, read_backbone
from tests.tiny import SIZES_HW, encoded_picture, tiny_model
from tests.train.evaluate.learned import ALONE, Learned, sample
from train.evaluate.answers import Answer, StockModel
from train.evaluate.image_questions import Question


def _answers(learned: Learned, batch_size: int, max_new_tokens: int = 12, export: Path | None = None) -> list[Answer]:
    """Answers questions of different lengths about images of different shapes, so that batches are padded and tiles
    differ."""
    samples, questions = list(learned.samples), []
    for number, size_hw in enumerate(SIZES_HW):
        picture = encoded_picture(50 + number, size_hw)
        samples.append(replace(samples[0], id=f"shape {number}", sizes_hw=(size_hw,), images=(picture,)))
    for number, item in enumerate(samples):
        text = "What is it?" if number < 4 else "What is it, " + "and what " * (number % 4) + "else?"
        questions.append(Question(item.source, number, text, item.messages[1].text))
    stock = StockModel(
        export or learned.export,
        learned.processor,
        ALONE,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    return stock.generate_answers(samples, questions, "exact_match")


def test_answers_do_not_depend_on_their_batch(learned: Learned) -> None:
    """Padded on the left in a batch, or alone: the same texts, in the order of the questions."""
    alone, together = _answers(learned, 1), _answers(learned, 5)
    assert together == alone
    assert [answer.id for answer in alone[:4]] == ["0", "1", "2", "3"]
    assert [answer.score for answer in alone[:4]] == [1.0, 1.0, 1.0, 0.0]
    assert len({answer.answer for answer in alone}) > 2


def test_cut_answer_is_marked(learned: Learned) -> None:
    """With one token, every answer is marked as cut."""
    assert all(answer.is_cut for answer in _answers(learned, 4, max_new_tokens=1))
    assert not any(answer.is_cut for answer in _answers(learned, 4)[:3])


def test_another_prompt_is_refused(learned: Learned, tmp_path: Path) -> None:
    """A chat template with one more word than the training is an error."""
    export = tmp_path / "export"
    shutil.copytree(learned.export, export)
    file = export / "chat_template.jinja"
    file.write_text(file.read_text() + "{{ 'Well, ' }}")
    with pytest.raises(ModelError, match="renders another prompt than the training"):
        _answers(learned, 4, export=export)


def test_a_template_that_begins_the_text_itself(tmp_path: Path) -> None:
    """If both Vicuna's template and its tokenizer add <s>, the prompt differs from the training's."""
    config = tiny_model(tmp_path, template="vicuna_v1", kind="metaspace")
    backbone = read_backbone(config)
    processor = backbone.processor(template=None, views=ANYRES, max_length=512)
    write_hf(build_model(backbone, dtype=torch.float32, seed=0), backbone, processor, tmp_path / "export")
    stock = StockModel(tmp_path / "export", processor, ALONE, batch_size=2, max_new_tokens=1)
    samples = [sample(number) for number in range(2)]
    questions = [Question("shapes", number, "What is it?", "red") for number in range(2)]
    assert len(stock.generate_answers(samples, questions, "exact_match")) == 2
