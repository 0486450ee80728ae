"""Reader of ChartQA in its published layout, unpacked or as the published `ChartQA Dataset.zip`.

`ChartQA Dataset/{train,val,test}` contains the charts in `png` and two lists of questions, `train_human.json` and
`train_augmented.json`, of {imgname, query, label}. All questions about one chart form one conversation, human questions
first, as in the released LLaVA-NeXT data.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.json_records import iter_records
from data_recipes.raw.packed_folders import has_folder, locate_file
from data_recipes.raw.questions import Question, make_question, merge_by_image
from data_recipes.schema.sample import DataError, Reject, Sample


def samples(root: Path, split: str = "train") -> Iterator[Sample | Reject]:
    """Yield one sample per chart of `split`, in the order of each chart's first question.

    An invalid question is yielded as a `Reject`; the chart's other questions are kept.

    Raises:
        DataError: the split or a list of questions does not exist.
    """
    folder = root / "ChartQA Dataset" / split
    if not has_folder(folder):
        raise DataError(f"{folder}: no such folder; put `ChartQA Dataset.zip` into {root}, or unpack it there.")
    yield from merge_by_image(
        _iter_questions(folder, split), folder / "png", lambda name: f"chartqa_{split}_{Path(name).stem}"
    )


def _iter_questions(folder: Path, split: str) -> Iterator[Question | Reject]:
    for kind in ("human", "augmented"):
        for location, record in iter_records(locate_file(folder / f"{split}_{kind}.json")):
            if isinstance(record, Reject):
                yield record
                continue
            answer = record.get("label")
            if (
                isinstance(answer, list) and len(answer) == 1
            ):  # the mirror on the Hugging Face Hub wraps each label in a list
                answer = answer[0]
            yield make_question(record.get("imgname"), record.get("query"), answer, location)
