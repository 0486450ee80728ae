"""LLaVA's conversation JSON: what the authors publish, and what most derived sets are written in.

A list (or one object per line) of {id, image?, conversations: [{from, value}]}, where `image` is a path below
the image root, a list of them, or absent for text-only chats. Other keys are ignored: some published records
have more. `llava_parquet.py` reads the same columns from parquet.

A file that many sets were merged into gives one source a part: `components` names the table of rules that tells them
apart (`raw/components.py`), `component` the part. `samples_by_component` reads several parts of such a file at once.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from data_recipes.raw.components import component_of, find_table
from data_recipes.raw.image_files import PictureError
from data_recipes.raw.json_records import iter_records
from data_recipes.raw.parquet_records import picture_of
from data_recipes.schema.sample import Reason, Reject, Sample, assemble


def samples(
    root: Path,
    annotations: str,
    image_root: str = ".",
    components: str | None = None,
    component: str | None = None,
) -> Iterator[Sample | Reject]:
    """Yield the records of `root/annotations` in file order.

    Args:
        root: the source's raw folder.
        annotations: the JSON file, below `root`.
        image_root: the folder, below `root`, that the records' `image` paths start from.
        components: a table of `raw/components.py`; None where the file is one set.
        component: the part of the file to yield. A record that fits no rule is a `Reject` in every part.

    Raises:
        DataError: there is no such annotations file, table or component.
    """
    if components is not None:
        wanted = [] if component is None else [component]
        for _, item in samples_by_component(root, wanted, annotations, components, image_root):
            yield item
        return
    for place, record in iter_records(root / annotations):
        yield record if isinstance(record, Reject) else conversation(record, root / image_root, place)


def samples_by_component(
    root: Path, wanted: Collection[str], annotations: str, components: str, image_root: str = "."
) -> Iterator[tuple[str | None, Sample | Reject]]:
    """Yield (component, record) for the records of the `wanted` components, in file order, in one pass over the file.

    A record that may belong to any of them, broken or without a rule, is a `Reject` and has no component.

    Raises:
        DataError: as `samples`.
    """
    rules = find_table(components, wanted)
    for place, record in iter_records(root / annotations):
        if isinstance(record, Reject):
            yield None, record
            continue
        component = component_of(record, rules)
        if component is None:
            detail = f"no rule of table {components} fits it: image {str(record.get('image'))[:60]!r}"
            yield None, Reject(record_id(record, place), Reason.UNKNOWN_COMPONENT, detail, place)
        elif component in wanted:
            yield component, conversation(record, root / image_root, place)


def conversation(record: dict[str, Any], pictures_root: Path, place: str) -> Sample | Reject:
    """The sample of one record; a picture is a path below `pictures_root`, or a cell of parquet."""
    sample_id = record_id(record, place)
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return Reject(sample_id, Reason.BROKEN_RECORD, "`conversations` is not a list of turns", place)
    cells = record.get("image")
    cells = [] if cells is None else cells if isinstance(cells, list) else [cells]
    try:
        pictures = [picture_of(cell, pictures_root) for cell in cells]
    except PictureError as error:
        return Reject(sample_id, error.reason, error.detail, place)
    return assemble(sample_id, ((turn.get("from"), turn.get("value")) for turn in turns), pictures, place)


def record_id(record: dict[str, Any], place: str) -> str:
    """The record's own id, or its place where it has none."""
    raw_id = record.get("id")
    return str(raw_id) if isinstance(raw_id, str | int) and raw_id != "" else place
