"""Reader of DVQA in its published layout, unpacked or as archives: `{split}_qa.json` and the bar charts in `images`.

The publisher's archives are `images.tar.gz` and one of the questions, which may be unpacked to a folder `qa`. The
splits are train, val_easy and val_hard. The JSON file is a list of {image, question, answer, ...}, with about twelve
questions per chart of the types structure, data and reasoning. All questions about one chart form one conversation;
their order is determined by hash, which mixes the types.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.raw.json_records import iter_records
from data_recipes.raw.packed_folders import locate_file
from data_recipes.raw.questions import Question, make_question, merge_by_image
from data_recipes.schema.sample import Reject, Sample


def samples(root: Path, split: str = "train") -> Iterator[Sample | Reject]:
    """Yield one sample per chart of `split`, in the order of each chart's first question.

    Raises:
        DataError: the file of questions does not exist.
    """
    name = f"{split}_qa.json"
    located = (locate_file(folder / name) for folder in (root, root / "qa"))
    path = next((path for path in located if path.is_file()), root / name)
    yield from merge_by_image(
        _iter_questions(path), root / "images", lambda name: f"dvqa_{Path(name).stem}", by_hash=True
    )


def _iter_questions(path: Path) -> Iterator[Question | Reject]:
    for location, record in iter_records(path):
        if isinstance(record, Reject):
            yield record
        else:
            yield make_question(record.get("image"), record.get("question"), record.get("answer"), location)
