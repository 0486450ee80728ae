"""Reader of easy-VQA in the layout of its package.

`data/{train,test}` contains `questions.json`, a list of [question, answer, image number], and `images/NUMBER.png`. All
questions about one image form one conversation. They imply a one-word answer, so no format instruction is added.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.json_records import iter_records
from data_recipes.raw.questions import make_conversation, sort_by_hash
from data_recipes.schema.sample import DataError, Reason, Reject, Sample


def samples(
    root: Path, split: str = "train", max_questions: int | None = None, max_yes_no: int | None = None
) -> Iterator[Sample | Reject]:
    """Yield one sample per image of `split`, sorted by number.

    Args:
        root: the folder that contains `data/`.
        split: train or test.
        max_questions: maximum number of questions per image, selected by smallest hash; None for all.
        max_yes_no: maximum number of yes/no questions per image, selected in the same way. Three quarters of the
            questions are yes/no questions, most of them with the answer "no", so a model could answer them without
            the image.

    Raises:
        DataError: `max_questions` is below 1, or the split does not exist.
    """
    if max_questions is not None and max_questions < 1:
        raise DataError(f"max_questions: {max_questions} is below 1; remove the option to keep all questions.")
    folder = root / "data" / split
    # There are 48,248 questions in total, so they fit in memory.
    by_image: dict[int, list[tuple[str, str]]] = {}
    for location, record in iter_records(folder / "questions.json", record_type=list):
        if isinstance(record, Reject):
            yield record
            continue
        if len(record) != 3 or not isinstance(record[2], int) or isinstance(record[2], bool):
            detail = "not a list of question, answer and image number"
            yield Reject(location, Reason.BROKEN_RECORD, detail, location)
        elif not isinstance(record[0], str) or not isinstance(record[1], str):
            yield Reject(location, Reason.NOT_A_STRING, "question and answer must be strings", location)
        elif not record[1].strip():
            yield Reject(location, Reason.EMPTY_ANSWER, f"no answer to {record[0][:60]!r}", location)
        else:
            by_image.setdefault(record[2], []).append((record[0], record[1]))
    for number in sorted(by_image):
        location = f"{split}/questions.json, image {number}"
        image = folder / "images" / f"{number}.png"
        questions = _limit_yes_no(by_image[number], max_yes_no)
        yield make_conversation(
            f"easy_vqa_{split}_{number}", sort_by_hash(questions, max_questions), image, location, suffix=""
        )


def _limit_yes_no(questions: list[tuple[str, str]], max_yes_no: int | None) -> list[tuple[str, str]]:
    yes_no = [question for question in questions if question[1] in ("yes", "no")]
    return [question for question in questions if question not in yes_no] + sort_by_hash(yes_no, max_yes_no)
