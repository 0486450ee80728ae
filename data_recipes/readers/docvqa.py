"""Reader of single-page DocVQA in its published layout: `train_v1.0.json`, or its variant with question types.

`data` is a list of {questionId, question, image, docId, ucsf_document_id, ucsf_document_page_no, answers, data_split};
`image` is `documents/NAME_PAGE.png`, relative to the folder of the JSON file. Other keys are ignored. All questions
about one page form one conversation, with the first of several accepted answers as the target.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.json_records import iter_records
from data_recipes.raw.questions import Question, make_question, merge_by_image
from data_recipes.schema.sample import Reason, Reject, Sample


def samples(root: Path, annotations: str = "train_v1.0.json") -> Iterator[Sample | Reject]:
    """Yield one sample per page, in the order of each page's first question.

    Raises:
        DataError: the annotations file does not exist, or has no list `data`.
    """
    yield from merge_by_image(_iter_questions(root / annotations), root, lambda name: f"docvqa_{Path(name).stem}")


def _iter_questions(path: Path) -> Iterator[Question | Reject]:
    for location, record in iter_records(path, list_key="data"):
        if isinstance(record, Reject):
            yield record
            continue
        answers = record.get("answers")
        if not isinstance(answers, list) or not answers:
            # The test file has the same layout without answers.
            yield Reject(location, Reason.NO_ANSWER, "`answers` is absent or empty; is this the test file?", location)
            continue
        yield make_question(record.get("image"), record.get("question"), answers[0], location)
