"""ChartQA as its authors publish it.

In `ChartQA Dataset/{train,val,test}`: the charts in `png`, and two lists of questions, `train_human.json` and
`train_augmented.json`, of {imgname, query, label}.

All questions on one chart become one conversation, human ones first, as in the released LLaVA-NeXT set.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.json_records import iter_records
from data_recipes.raw.questions import Question, one_conversation_a_picture, question
from data_recipes.schema.sample import DataError, Reject, Sample


def samples(root: Path, split: str = "train") -> Iterator[Sample | Reject]:
    """Yield one sample per chart of `split`, in the order in which the charts are first asked about.

    A question that cannot be used (not a string, no answer) is a `Reject` of its own; the chart's others
    remain.

    Raises:
        DataError: there is no such split, or a list of questions is absent.
    """
    folder = root / "ChartQA Dataset" / split
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; ChartQA is unpacked as `ChartQA Dataset/{{train,val,test}}`."
        )
    yield from one_conversation_a_picture(
        _questions(folder, split), folder / "png", lambda name: f"chartqa_{split}_{Path(name).stem}"
    )


def _questions(folder: Path, split: str) -> Iterator[Question | Reject]:
    for kind in ("human", "augmented"):
        for place, record in iter_records(folder / f"{split}_{kind}.json"):
            if isinstance(record, Reject):
                yield record
                continue
            answer = record.get("label")
            if isinstance(answer, list) and len(answer) == 1:  # the mirror on the hub wraps each label
                answer = answer[0]
            yield question(record.get("imgname"), record.get("query"), answer, place)
