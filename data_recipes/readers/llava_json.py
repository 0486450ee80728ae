"""LLaVA's conversation JSON: what the authors publish, and what most derived sets are written in.

A list (or one object per line) of {id, image?, conversations: [{from, value}]}, where `image` is a path below
the image root, a list of them, or absent for text-only chats. Other keys are ignored: some published records
have more.
"""

from collections.abc import Iterator
from pathlib import Path

from data_recipes.json_records import iter_records
from data_recipes.pictures import PictureError, inside
from data_recipes.sample import Reason, Reject, Sample, assemble


def samples(root: Path, annotations: str, image_root: str = ".") -> Iterator[Sample | Reject]:
    """Yield the records of `root/annotations` in file order.

    Args:
        root: the source's raw folder.
        annotations: the JSON file, below `root`.
        image_root: the folder, below `root`, that the records' `image` paths start from.

    Raises:
        DataError: there is no such annotations file.
    """
    pictures_root = root / image_root
    for place, record in iter_records(root / annotations):
        if isinstance(record, Reject):
            yield record
            continue
        raw_id = record.get("id")
        sample_id = str(raw_id) if isinstance(raw_id, str | int) and raw_id != "" else place
        turns = record.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            yield Reject(sample_id, Reason.BROKEN_RECORD, "`conversations` is not a list of turns", place)
            continue
        names = record.get("image")
        names = [] if names is None else names if isinstance(names, list) else [names]
        if not all(isinstance(name, str) for name in names):
            yield Reject(sample_id, Reason.NOT_A_STRING, "`image` is neither a path nor a list of paths", place)
            continue
        try:
            pictures = [inside(pictures_root, name) for name in names]
        except PictureError as error:
            yield Reject(sample_id, error.reason, error.detail, place)
            continue
        yield assemble(sample_id, ((turn.get("from"), turn.get("value")) for turn in turns), pictures, place)
