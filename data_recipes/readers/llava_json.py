"""Reader of LLaVA's conversation JSON, the format of the authors' datasets and of most datasets derived from them.

The file is a list (or one object per line) of {id, image?, conversations: [{from, value}]}, where `image` is a path
below the image root, a list of paths, or absent for text-only conversations. Other keys are ignored.
`llava_parquet.py` reads the same columns from parquet.

A merged file contains several datasets, which are separate sources here. `components` names the table of rules that
assign its records (`raw/components.py`), `component` the dataset to read. `samples_by_component` reads several of them
in one pass.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from data_recipes.raw.components import find_table, match_component
from data_recipes.raw.image_files import ImageError, resolve_images
from data_recipes.raw.json_records import iter_records
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
        annotations: path of the JSON file, relative to `root`.
        image_root: folder that the records' `image` paths are relative to, itself relative to `root`.
        components: a table of `raw/components.py`; None if the file is a single dataset.
        component: the component to yield. A record that matches no rule is a `Reject` in every component.

    Raises:
        DataError: the annotations file, table or component does not exist.
    """
    if components is not None:
        selected = [] if component is None else [component]
        for _, item in samples_by_component(root, selected, annotations, components, image_root):
            yield item
        return
    for location, record in iter_records(root / annotations):
        yield record if isinstance(record, Reject) else convert_record(record, root / image_root, location)


def samples_by_component(
    root: Path, selected: Collection[str], annotations: str, components: str, image_root: str = "."
) -> Iterator[tuple[str | None, Sample | Reject]]:
    """Yield (component, sample) for the records of the selected components, in file order and in one pass.

    Args:
        root: the source's raw folder.
        selected: names of the components.
        annotations, components, image_root: see `samples`.

    Yields:
        The component's name and the sample. For a record that cannot be parsed or that matches no rule, the name is
        None and the sample is a `Reject`, because the record may belong to any component.

    Raises:
        DataError: see `samples`.
    """
    rules = find_table(components, selected)
    for location, record in iter_records(root / annotations):
        if isinstance(record, Reject):
            yield None, record
            continue
        component = match_component(record, rules)
        if component is None:
            detail = f"no rule of table {components} fits it: image {str(record.get('image'))[:60]!r}"
            yield None, Reject(record_id(record, location), Reason.UNKNOWN_COMPONENT, detail, location)
        elif component in selected:
            yield component, convert_record(record, root / image_root, location)


def convert_record(record: dict[str, Any], image_root: Path, location: str) -> Sample | Reject:
    """Convert one record to a sample.

    Args:
        record: the raw record; an image is a path below `image_root` or a parquet cell.
        image_root: folder that image paths are relative to.
        location: file and record number.
    """
    sample_id = record_id(record, location)
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return Reject(sample_id, Reason.BROKEN_RECORD, "`conversations` is not a list of turns", location)
    try:
        images = resolve_images(record.get("image"), image_root)
    except ImageError as error:
        return Reject(sample_id, error.reason, error.detail, location)
    return assemble(sample_id, ((turn.get("from"), turn.get("value")) for turn in turns), images, location)


def record_id(record: dict[str, Any], location: str) -> str:
    """Return the record's id, or its location if it has none."""
    raw_id = record.get("id")
    return str(raw_id) if isinstance(raw_id, str | int) and raw_id != "" else location
