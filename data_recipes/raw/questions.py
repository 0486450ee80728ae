"""Questions on pictures: how they are worded, and how those on one picture become one conversation.

Owns: the endings that ask for a form of answer, the merging rule and its order, choosing by hash.
Leaves: finding questions and pictures in raw files to the readers.

LLaVA-1.5 merged its question sets by picture, and the released LLaVA-NeXT set has one conversation a chart and a
page (recipe 4.2, 4.4): the picture, by far the longest part of a sequence, is then paid for once. In the released
conversations the ending stands after the first question only; the later ones are understood to want the same.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_recipes.raw.image_files import PictureError, inside
from data_recipes.schema.sample import IMAGE_PLACEHOLDER, Reason, Reject, Sample, assemble

# The wordings of the released sets (recipe 4.3).
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
ONE_SENTENCE_CAPTION = "Provide a one-sentence caption for the provided image."
OCR = (
    "OCR this image section by section, from top to bottom, and left to right. Do not insert line breaks in the "
    "output text. If a word is split due to a line break in the image, use a space instead."
)
ENDINGS = (SHORT_ANSWER, LETTER_ANSWER)
"""Those that stand with the first question of a conversation and hold for all of it."""


@dataclass(frozen=True)
class Question:
    """One question on one picture, named as the raw files name it; `place` finds the record again."""

    picture: str
    text: str
    answer: str
    place: str


def question(picture: object, text: object, answer: object, place: str) -> Question | Reject:
    """A question of raw fields of any type; a `Reject` where one is no string, or the answer is empty."""
    if not isinstance(picture, str) or not isinstance(text, str) or not isinstance(answer, str):
        wrong = next(value for value in (picture, text, answer) if not isinstance(value, str))
        detail = f"picture, question and answer must be strings; one is {type(wrong).__name__} {str(wrong)[:60]!r}"
        return Reject(place, Reason.NOT_A_STRING, detail, place)
    if not answer.strip():
        return Reject(place, Reason.EMPTY_ANSWER, f"no answer to {text[:60]!r}", place)
    return Question(picture, text, answer, place)


def one_conversation_a_picture(
    items: Iterable[Question | Reject],
    folder: Path,
    sample_id: Callable[[str], str],
    suffix: str = SHORT_ANSWER,
    mixed: bool = False,
) -> Iterator[Sample | Reject]:
    """All questions on a picture as one conversation, pictures in the order in which they are first asked about.

    Rejects come first, since every question is read before the first conversation is whole; the text of a set fits
    in memory (2.3 million questions of DVQA: 0.3 GiB), its pictures are read later, one by one.

    Args:
        items: the questions, in the order that they are to have; rejects pass.
        folder: where the pictures' names start from; a name that leaves it is a `Reject`.
        sample_id: the id of the conversation on a picture, from the picture's name.
        suffix: the ending of the first question.
        mixed: order the questions of a picture by hash, where the file lists them in blocks of a kind.
    """
    by_picture: dict[str, list[tuple[str, str]]] = {}
    places: dict[str, str] = {}
    for item in items:
        if isinstance(item, Reject):
            yield item
            continue
        # Synthetic sets ask the same things of every picture: one copy of a text is enough.
        pair = (sys.intern(item.text), sys.intern(item.answer))
        by_picture.setdefault(item.picture, []).append(pair)
        places.setdefault(item.picture, item.place)
    for name, pairs in by_picture.items():
        try:
            picture = inside(folder, name)
        except PictureError as error:
            yield Reject(sample_id(name), error.reason, error.detail, places[name])
            continue
        yield merge(sample_id(name), by_hash(pairs) if mixed else pairs, picture, places[name], suffix)


def merge(
    sample_id: str,
    questions: Sequence[tuple[str, str]],
    picture: Path | bytes,
    place: str,
    suffix: str = SHORT_ANSWER,
) -> Sample | Reject:
    """One conversation of (question, answer) pairs in their order; picture and ending belong to the first."""
    turns: list[tuple[object, object]] = []
    for number, (text, answer) in enumerate(questions):
        first = f"{IMAGE_PLACEHOLDER}\n{text}\n{suffix}".rstrip("\n")
        turns.append(("user", first if number == 0 else text))
        turns.append(("assistant", answer))
    return assemble(sample_id, turns, [picture], place)


def multiple_choice(text: str, options: Sequence[str], right: int) -> tuple[str, str]:
    """(question with its options as lettered lines, letter of the right one).

    Raises:
        IndexError: there is no option of that number, or there are more than letters.
    """
    if not 0 <= right < len(options) <= 26:
        raise IndexError(f"option {right} of {len(options)}")
    letters = [chr(ord("A") + number) for number in range(len(options))]
    lines = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
    return "\n".join([text, *lines]), letters[right]


def by_hash(questions: Sequence[tuple[str, str]], num_wanted: int | None = None) -> list[tuple[str, str]]:
    """The questions ordered by their hash, the first `num_wanted` of them.

    A hash mixes the kinds of questions that files list in blocks, needs no seed, and a smaller number is
    always a part of a larger one.
    """
    return sorted(questions, key=lambda pair: _hash("\n".join(pair)))[:num_wanted]


def pick_by_hash(options: Sequence[str], key: str) -> str:
    """One of the options, the same one for the same key on every machine and in every run.

    Each option is hashed with the key and the smallest hash wins, so that an option more moves few choices.
    """
    return min(options, key=lambda option: _hash(f"{key}\n{option}"))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()
