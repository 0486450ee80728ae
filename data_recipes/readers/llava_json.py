"""Reader of LLaVA's conversation JSON, the format of the authors' datasets and of most datasets derived from them.

The file is a list (or one object per line) of {id, image?, conversations: [{from, value}]}, where `image` is a path
below the image root, a list of paths, or absent for text-only conversations. The other layouts of
`messages_jsonl.py` are read too. `llava_parquet.py` reads the same columns from parquet.

A merged file contains several datasets, which are separate sources here. `components` names the table of rules that
assign its records (`raw/components.py`), `component` the dataset to read. `samples_by_component` reads several of them
in one pass.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from data_recipes.raw.components import find_table, match_component
from data_recipes.raw.conversation_record import convert_record, record_id
from data_recipes.raw.json_records import iter_records
from data_recipes.readers import messages_jsonl
from data_recipes.schema.sample import Reason, Reject, Sample, describe_value


def samples(
    root: Path,
    annotations: str,
    image_root: str = ".",
    components: str | None = None,
    component: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    dataset: str | None = None,
) -> Iterator[Sample | Reject]:
    """Yield the records of `root/annotations` in file order.

    Args:
        root: the source's raw folder.
        annotations: path of the JSON file, relative to `root`.
        image_root: folder that the records' `image` paths are relative to, itself relative to `root`.
        components: a table of `raw/components.py`; None if the file is a single dataset.
        component: the component to yield. A record that matches no rule is a `Reject` in every component.
        columns, dataset: see `messages_jsonl.samples`.

    Raises:
        DataError: the annotations file, table or component does not exist, or an option has an invalid value.
    """
    if components is None:
        yield from messages_jsonl.samples(root, annotations, image_root, columns, dataset)
        return
    selected = [] if component is None else [component]
    for _, item in samples_by_component(root, selected, annotations, components, image_root, columns, dataset):
        yield item


def samples_by_component(
    root: Path,
    selected: Collection[str],
    annotations: str,
    components: str,
    image_root: str = ".",
    columns: Mapping[str, str | None] | None = None,
    dataset: str | None = None,
) -> Iterator[tuple[str | None, Sample | Reject]]:
    """Yield (component, sample) for the records of the selected components, in file order and in one pass.

    Args:
        root: the source's raw folder.
        selected: names of the components.
        annotations, components, image_root, columns, dataset: see `samples`.

    Yields:
        The component's name and the sample. For a record that cannot be parsed or that matches no rule, the name is
        None and the sample is a `Reject`, because the record may belong to any component.

    Raises:
        DataError: see `samples`.
    """
    rules = find_table(components, selected)
    path, keys = messages_jsonl.find_annotations(root / annotations, columns, dataset)
    for location, record in iter_records(path, record_keys=keys.record_keys()):
        if isinstance(record, Reject):
            yield None, record
            continue
        component = match_component(record, rules)
        if component is None:
            detail = f"no rule of table {components} fits it: image {describe_value(record.get('image'))}"
            yield None, Reject(record_id(record, location, keys), Reason.UNKNOWN_COMPONENT, detail, location)
        elif component in selected:
            yield component, convert_record(record, root / image_root, location, keys)
