"""DocVQA (single page) as the challenge publishes it: `train_v1.0.json`, or its twin with question types.

One object, whose `data` lists {questionId, question, image, docId, ucsf_document_id, ucsf_document_page_no, answers,
data_split}; `image` is `documents/NAME_PAGE.png`, beside the file. Other keys, such as `question_types`, are not read.

All questions on one page become one conversation. Of several accepted answers the first is taught.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.json_records import iter_records
from data_recipes.raw.questions import Question, one_conversation_a_picture, question
from data_recipes.schema.sample import Reason, Reject, Sample


def samples(root: Path, annotations: str = "train_v1.0.json") -> Iterator[Sample | Reject]:
    """Yield one sample per page, in the order in which the pages are first asked about.

    Raises:
        DataError: there is no such file, or it has no list `data`.
    """
    yield from one_conversation_a_picture(
        _questions(root / annotations), root, lambda name: f"docvqa_{Path(name).stem}"
    )


def _questions(path: Path) -> Iterator[Question | Reject]:
    for place, record in iter_records(path, under="data"):
        if isinstance(record, Reject):
            yield record
            continue
        answers = record.get("answers")
        if not isinstance(answers, list) or not answers:
            # The test file is laid out alike, without answers.
            yield Reject(place, Reason.NO_ANSWER, "`answers` is absent or empty; is this the test file?", place)
            continue
        yield question(record.get("image"), record.get("question"), answers[0], place)
