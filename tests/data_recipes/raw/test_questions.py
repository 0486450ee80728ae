"""Owns the proofs about questions: the published wordings, lettered options, one conversation a picture."""

from pathlib import Path

import pytest

from data_recipes.raw.questions import (
    LETTER_ANSWER,
    OCR,
    ONE_SENTENCE_CAPTION,
    SHORT_ANSWER,
    multiple_choice,
    one_conversation_a_picture,
    question,
)
from data_recipes.schema.sample import Sample


def test_the_published_wordings() -> None:
    """Letter for letter as the released sets have them: a model that was trained on other words answers otherwise."""
    assert SHORT_ANSWER == "Answer the question using a single word or phrase."
    assert LETTER_ANSWER == "Answer with the option's letter from the given choices directly."
    assert ONE_SENTENCE_CAPTION == "Provide a one-sentence caption for the provided image."
    assert OCR == (
        "OCR this image section by section, from top to bottom, and left to right. "
        "Do not insert line breaks in the output text. "
        "If a word is split due to a line break in the image, use a space instead."
    )


def test_multiple_choice() -> None:
    """Options are lettered in their order; an index outside them is an error."""
    assert multiple_choice("Which?", ["a", "b", "c"], 2) == ("Which?\nA. a\nB. b\nC. c", "C")
    for right in (-1, 3):
        with pytest.raises(IndexError):
            multiple_choice("Which?", ["a", "b", "c"], right)


def test_texts_that_repeat_are_held_once(tmp_path: Path) -> None:
    """Of two million drawn questions most say the same: reading them must not cost a copy of each."""
    asked = [
        question(picture, "".join(["How many ", "bars?"]), "".join(["fo", "ur"]), "here")
        for picture in ("p.png", "q.png")
        for _ in range(2)
    ]
    samples = list(one_conversation_a_picture(asked, tmp_path, str))
    texts = [sample.messages[2:] for sample in samples if isinstance(sample, Sample)]
    assert len(texts) == 2
    for one, other in zip(*texts, strict=True):
        assert one.text is other.text
