"""easy-VQA as its package lays it out.

In `data/{train,test}`: `questions.json`, a list of [question, answer, picture number], and the pictures as
`images/NUMBER.png`.

All questions on one picture become one conversation. They ask for one word as they are, so no suffix says so.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.json_records import iter_records
from data_recipes.raw.questions import by_hash, merge
from data_recipes.schema.sample import DataError, Reason, Reject, Sample


def samples(
    root: Path, split: str = "train", max_questions: int | None = None, max_yes_no: int | None = None
) -> Iterator[Sample | Reject]:
    """Yield one sample per picture of `split`, by number.

    Args:
        root: the folder that holds `data/`.
        split: train or test.
        max_questions: at most so many questions on a picture, those with the smallest hashes; None for all.
        max_yes_no: at most so many of them that are answered by yes or no, chosen alike. Three quarters of the
            set's questions are, and most of those by "no", so that hardly a picture is needed to answer them.

    Raises:
        DataError: `max_questions` is below 1, or there is no such split.
    """
    if max_questions is not None and max_questions < 1:
        raise DataError(f"max_questions: {max_questions} is below 1; leave it out to keep all questions.")
    folder = root / "data" / split
    # 48,248 questions in all; the pictures are read later, one by one.
    by_picture: dict[int, list[tuple[str, str]]] = {}
    for place, record in iter_records(folder / "questions.json", kind=list):
        if isinstance(record, Reject):
            yield record
            continue
        if len(record) != 3 or not isinstance(record[2], int) or isinstance(record[2], bool):
            detail = "not a list of question, answer and picture number"
            yield Reject(place, Reason.BROKEN_RECORD, detail, place)
        elif not isinstance(record[0], str) or not isinstance(record[1], str):
            yield Reject(place, Reason.NOT_A_STRING, "question and answer must be strings", place)
        elif not record[1].strip():
            yield Reject(place, Reason.EMPTY_ANSWER, f"no answer to {record[0][:60]!r}", place)
        else:
            by_picture.setdefault(record[2], []).append((record[0], record[1]))
    for number in sorted(by_picture):
        place = f"{split}/questions.json, picture {number}"
        picture = folder / "images" / f"{number}.png"
        questions = _fewer_yes_no(by_picture[number], max_yes_no)
        yield merge(f"easy_vqa_{split}_{number}", by_hash(questions, max_questions), picture, place, suffix="")


def _fewer_yes_no(questions: list[tuple[str, str]], num_wanted: int | None) -> list[tuple[str, str]]:
    yes_no = [question for question in questions if question[1] in ("yes", "no")]
    return [question for question in questions if question not in yes_no] + by_hash(yes_no, num_wanted)
