"""ChartQA as its authors publish it.

In `ChartQA Dataset/{train,val,test}`: the charts in `png`, and two lists of questions, `train_human.json` and
`train_augmented.json`, of {imgname, query, label}.

All questions on one chart become one conversation, human ones first, as in the released LLaVA-NeXT set.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.json_records import iter_records
from data_recipes.pictures import PictureError, inside
from data_recipes.questions import merge
from data_recipes.sample import DataError, Reason, Reject, Sample


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
    # 28,299 questions in all, so the text fits in memory; the pictures are read later, one by one.
    charts: dict[str, list[tuple[str, str]]] = {}
    places: dict[str, str] = {}
    for kind in ("human", "augmented"):
        for place, record in iter_records(folder / f"{split}_{kind}.json"):
            if isinstance(record, Reject):
                yield record
                continue
            name, question, answer = record.get("imgname"), record.get("query"), record.get("label")
            if isinstance(answer, list) and len(answer) == 1:  # the mirror on the hub wraps each label
                answer = answer[0]
            if not isinstance(name, str) or not isinstance(question, str) or not isinstance(answer, str):
                yield Reject(place, Reason.NOT_A_STRING, "`imgname`, `query` and `label` must be strings", place)
            elif not answer.strip():
                yield Reject(place, Reason.EMPTY_ANSWER, f"no label for {question[:60]!r}", place)
            else:
                charts.setdefault(name, []).append((question, answer))
                places.setdefault(name, place)
    for name, questions in charts.items():
        sample_id = f"chartqa_{split}_{Path(name).stem}"
        try:
            picture = inside(folder / "png", name)
        except PictureError as error:
            yield Reject(sample_id, error.reason, error.detail, places[name])
            continue
        yield merge(sample_id, questions, picture, places[name])
