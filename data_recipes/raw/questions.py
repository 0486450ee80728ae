"""Builds conversations from visual question answering datasets.

All questions about one image form one conversation, as in LLaVA-1.5 and the released LLaVA-NeXT data, so that the
image, which is the longest part of the sequence, is processed once. As in the released data, the format instruction
follows the first question only.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_recipes.raw.image_files import ImageError, resolve_image
from data_recipes.schema.sample import (
    IMAGE_PLACEHOLDER,
    ImageReference,
    Reason,
    Reject,
    Sample,
    assemble,
    describe_value,
)

# The prompts of the released datasets, verbatim.
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
ONE_SENTENCE_CAPTION = "Provide a one-sentence caption for the provided image."
OCR = (
    "OCR this image section by section, from top to bottom, and left to right. Do not insert line breaks in the "
    "output text. If a word is split due to a line break in the image, use a space instead."
)
RESPONSE_FORMAT_PROMPTS = (SHORT_ANSWER, LETTER_ANSWER)
"""Format instructions that follow the first question of a conversation and apply to all of its questions."""


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        image: file name of the image in the raw annotations.
        text: the question.
        answer: the answer.
        location: file and record number of the raw record.
    """

    image: str
    text: str
    answer: str
    location: str


def make_question(image: object, text: object, answer: object, location: str) -> Question | Reject:
    """Build a `Question` from raw fields, which may have any type.

    Returns:
        The question, or a `Reject` if a field is not a string or the answer is empty.
    """
    if not isinstance(image, str) or not isinstance(text, str) or not isinstance(answer, str):
        wrong = next(value for value in (image, text, answer) if not isinstance(value, str))
        detail = f"image, question and answer must be strings; one is {describe_value(wrong)}"
        return Reject(location, Reason.NOT_A_STRING, detail, location)
    if not answer.strip():
        return Reject(location, Reason.EMPTY_ANSWER, f"no answer to {text[:60]!r}", location)
    return Question(image, text, answer, location)


def merge_by_image(
    items: Iterable[Question | Reject],
    folder: Path,
    sample_id: Callable[[str], str],
    suffix: str = SHORT_ANSWER,
    by_hash: bool = False,
) -> Iterator[Sample | Reject]:
    """Yield one conversation per image, in the order of each image's first question.

    All questions are read before the first conversation is yielded, so rejects come first. The texts of a dataset fit
    in memory (0.3 GiB for the 2.3 million questions of DVQA).

    Args:
        items: questions in the order of the conversations; rejects are passed through.
        folder: folder that image names are relative to. A name that leads outside is a `Reject`.
        sample_id: maps the name of an image to the id of its conversation.
        suffix: format instruction after the first question.
        by_hash: order the questions of an image by hash, for files that are sorted by question type.
    """
    by_image: dict[str, list[tuple[str, str]]] = {}
    locations: dict[str, str] = {}
    for item in items:
        if isinstance(item, Reject):
            yield item
            continue
        # Synthetic datasets repeat the same questions for every image; interning keeps one copy of each text.
        pair = (sys.intern(item.text), sys.intern(item.answer))
        by_image.setdefault(item.image, []).append(pair)
        locations.setdefault(item.image, item.location)
    for name, pairs in by_image.items():
        try:
            image = resolve_image(name, folder)
        except ImageError as error:
            yield Reject(sample_id(name), error.reason, error.detail, locations[name])
            continue
        yield make_conversation(
            sample_id(name), sort_by_hash(pairs) if by_hash else pairs, image, locations[name], suffix
        )


def make_conversation(
    sample_id: str,
    questions: Sequence[tuple[str, str]],
    image: ImageReference,
    location: str,
    suffix: str = SHORT_ANSWER,
) -> Sample | Reject:
    """Build a conversation about one image.

    Args:
        sample_id: id of the sample.
        questions: (question, answer) pairs in order.
        image: the image; its placeholder precedes the first question.
        location: file and record number.
        suffix: format instruction after the first question.
    """
    turns: list[tuple[object, object]] = []
    for number, (text, answer) in enumerate(questions):
        first = f"{IMAGE_PLACEHOLDER}\n{text}\n{suffix}".rstrip("\n")
        turns.append(("user", first if number == 0 else text))
        turns.append(("assistant", answer))
    return assemble(sample_id, turns, [image], location)


def format_multiple_choice(text: str, options: Sequence[str], right: int) -> tuple[str, str]:
    """Format a multiple-choice question.

    Args:
        text: the question.
        options: the answer options.
        right: index of the correct option.

    Returns:
        (the question followed by one line per option, the letter of the correct option).

    Raises:
        IndexError: `right` is out of range, or there are more than 26 options.
    """
    if not 0 <= right < len(options) <= 26:
        raise IndexError(f"option {right} of {len(options)}")
    letters = [chr(ord("A") + number) for number in range(len(options))]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return "\n".join([text, *lines]), letters[right]


def sort_by_hash(questions: Sequence[tuple[str, str]], limit: int | None = None) -> list[tuple[str, str]]:
    """Sort questions by hash and return the first `limit` of them (None: all).

    The order mixes question types that a file lists in blocks and needs no seed. A smaller limit selects a subset of a
    larger one.
    """
    return sorted(questions, key=lambda pair: _hash("\n".join(pair)))[:limit]


def pick_by_hash(options: Sequence[str], key: str) -> str:
    """Select one option, deterministically for each key.

    The option with the smallest hash of (key, option) is selected, so an additional option changes few selections
    (rendezvous hashing).
    """
    return min(options, key=lambda option: _hash(f"{key}\n{option}"))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()
