"""DVQA as its authors publish it: `{split}_qa.json` and the bar charts in `images`.

A list of {image, question, answer, question_type, bbox_answer, question_id}, about twelve questions on each chart, of
the types structure, data and reasoning. All questions on one chart become one conversation, types mixed by hash.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.json_records import iter_records
from data_recipes.raw.questions import Question, one_conversation_a_picture, question
from data_recipes.schema.sample import Reject, Sample


def samples(root: Path, split: str = "train") -> Iterator[Sample | Reject]:
    """Yield one sample per chart of `split`, in the order in which the charts are first asked about.

    Raises:
        DataError: there is no such file of questions.
    """
    yield from one_conversation_a_picture(
        _questions(root / f"{split}_qa.json"), root / "images", lambda name: f"dvqa_{Path(name).stem}", mixed=True
    )


def _questions(path: Path) -> Iterator[Question | Reject]:
    for place, record in iter_records(path):
        if isinstance(record, Reject):
            yield record
        else:
            yield question(record.get("image"), record.get("question"), record.get("answer"), place)
