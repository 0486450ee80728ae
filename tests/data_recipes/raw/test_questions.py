"""Tests of the published prompts, multiple-choice questions and merging by image."""

from pathlib import Path

import pytest

from data_recipes.raw.questions import (
    LETTER_ANSWER,
    OCR,
    ONE_SENTENCE_CAPTION,
    SHORT_ANSWER,
    format_multiple_choice,
    make_question,
    merge_by_image,
)
from data_recipes.schema.sample import Sample


def test_published_prompts() -> None:
    """The prompts are verbatim, because models are sensitive to their wording."""
    assert SHORT_ANSWER == "Answer the question using a single word or phrase."
    assert LETTER_ANSWER == "Answer with the option's letter from the given choices directly."
    assert ONE_SENTENCE_CAPTION == "Provide a one-sentence caption for the provided image."
    assert OCR == (
        "OCR this image section by section, from top to bottom, and left to right. "
        "Do not insert line breaks in the output text. "
        "If a word is split due to a line break in the image, use a space instead."
    )


def test_multiple_choice() -> None:
    """Options have letters in order; an index out of range is an error."""
    assert format_multiple_choice("Which?", ["a", "b", "c"], 2) == ("Which?\nA. a\nB. b\nC. c", "C")
    for right in (-1, 3):
        with pytest.raises(IndexError):
            format_multiple_choice("Which?", ["a", "b", "c"], right)


def test_repeated_texts_are_interned(tmp_path: Path) -> None:
    """Repeated texts are stored once, because synthetic datasets have millions of equal questions."""
    questions = [
        make_question(image, "".join(["How many ", "bars?"]), "".join(["fo", "ur"]), "here")
        for image in ("p.png", "q.png")
        for _ in range(2)
    ]
    samples = list(merge_by_image(questions, tmp_path, str))
    texts = [sample.messages[2:] for sample in samples if isinstance(sample, Sample)]
    assert len(texts) == 2
    for first, second in zip(*texts, strict=True):
        assert first.text is second.text
